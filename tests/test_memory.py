"""The memory that a run is said to need, against what it takes; and what is said where there is less."""

from typing import Any

import pytest
import torch
from runs import digits, refusal, run, toy_model
from test_engine import ALONE, CPU, make_batch, make_learner
from tiny import ours
from torch import Tensor

import memory
import options
from engine import build_precision
from memory import activations, available, estimate, state_share
from models import MergeConfig
from models.parameters import freeze

Capture = pytest.CaptureFixture[str]


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("flags", [[], ["--opt", "lion"], ["--train_only", "norms,head", "--no_model_ema"]])
def test_weights_gradients_optimizer_and_average_are_counted(flags: list[object]) -> None:
    args = options.parse_args(digits(*flags))
    model = ours(MergeConfig(r=2), num_registers=2)
    freeze(model, args.train_only)
    need = estimate(args, model, 1, build_precision(args, CPU))
    learner = make_learner(*flags, model=model, double=False)
    learner.step_gradients([make_batch(4, dtype=torch.float32)], 0, 0)
    learner.update()
    parameters = list(learner.module.parameters())
    assert need.weights == bytes_of(parameters)
    assert need.gradients == bytes_of(p.grad for p in parameters if p.grad is not None)
    states = [value for state in learner.optimizer.state.values() for value in state.values()]
    assert need.optimizer == pytest.approx(bytes_of(value for value in states if value.numel() > 1), rel=0.01)
    shared = {p.data_ptr() for p in parameters}
    average = () if learner.ema is None else learner.ema.module.parameters()
    assert need.average == bytes_of(p for p in average if p.data_ptr() not in shared)


@pytest.mark.parametrize(("name", "share"), [("adamw", 2), ("lion", 1), ("momentum", 1)])
def test_states_of_optimizers(name: str, share: float) -> None:
    assert state_share(options.parse_args(digits("--opt", name))) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("merge", [MergeConfig(method="none"), MergeConfig(r=8), MergeConfig("mctf", r=8)], ids=str)
@pytest.mark.parametrize("flags", [[], ["--grad_checkpointing"], ["--train_only", "norms"]], ids=str)
def test_activations_are_estimated(merge: MergeConfig, flags: list[object]) -> None:
    args = options.parse_args(digits(*flags, "--batch_size", 8))
    model = ours(merge, img_size=64, embed_dim=48, depth=6).train()
    freeze(model, args.train_only)
    model.set_grad_checkpointing(args.grad_checkpointing)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(8, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images)
    found, said = sum(kept.values()), activations(args, model, build_precision(args, CPU))
    if args.grad_checkpointing:  # the blocks are kept as their inputs, and the largest comes back in the backward
        found += said - sum(4 * 48 * 8 * n for n in [65, *model.plan().counts[:-1]])
    assert 0.6 < said / found < 1.6, (said, found)
    assert out.requires_grad


def test_a_frozen_backbone_keeps_nothing() -> None:
    args = options.parse_args(digits("--train_only", "head"))
    model = ours()
    freeze(model, "head")
    assert activations(args, model, build_precision(args, CPU)) == 0


def test_slices_divide_all_but_the_blocks_that_run() -> None:
    args = options.parse_args(digits("--fsdp"))
    model, precision = ours(), build_precision(args, CPU)
    one, four = (estimate(args, model, world, precision) for world in (1, 4))
    for part in ("gradients", "optimizer", "average"):
        assert 4 * getattr(four, part) == pytest.approx(getattr(one, part), abs=4)
    block = bytes_of(model.blocks[0].parameters())
    assert four.weights == bytes_of(model.parameters()) // 4 + 2 * block
    bf16 = build_precision(options.parse_args(digits("--amp", "bf16")), CPU)
    half = estimate(args, model, 4, bf16)
    assert half.weights == bytes_of(model.parameters()) // 4 + block


def test_too_little_memory_is_told_first(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available(CPU) is not None and ALONE.device == CPU
    with toy_model():
        monkeypatch.setattr(memory, "available", lambda device: 100_000)
        line = refusal(capsys, digits())
        assert "deit_digits needs 0.000504 GiB in each process before the first image" in line and "--fsdp" in line
        monkeypatch.setattr(memory, "available", lambda device: 1_000_000)
        out = run(capsys, digits(limit=10)).out
        assert "memory per process: about" in out and "warning: a batch of 10 will hardly fit" in out
        monkeypatch.setattr(memory, "available", lambda device: 10**9)
        assert "warning" not in run(capsys, digits(limit=10)).out
