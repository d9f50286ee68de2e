"""--fsdp: two gloo processes with weights in slices are two with whole weights, and leave the same files."""

import copy
import dataclasses
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import digits, refusal, same_run, toy_model
from test_distributed import finish, play, start
from test_engine import make_batch
from tiny import ours
from torch import Tensor

import options
from build import build_precision
from datasets import Batch, DataConfig, build_data
from distributed import Distributed, close_distributed, init_distributed
from engine import Learner, build_learner
from linear_probe import init_head
from losses import build_mixup, build_objective
from memory import held
from models import MergeConfig
from models.adapters import LoraSettings, add_lora
from models.parameters import freeze, parameter_groups
from run.kill_test import checkpoint, log_lines
from sharding import load_whole, shard

CASES: dict[str, list[object]] = {
    "tome": ["--clip_grad", 0.5, "--accumulation_steps", 2, "--layer_decay", 0.7, "--smoothing", 0.1],
    "pairing": ["--full_weight", 1, "--consistency_weight", 3, "--consistency_threshold", 0, "--grad_checkpointing"],
    "mctf": ["--train_only", "norms,registers,head"],
    "bf16": ["--amp", "bf16"],
    "lora": ["--lora", 2, "--train_only", "lora,registers,head"],
}
if find_spec("peft") is None:
    del CASES["lora"]


def make_learner(case: str, dist: Distributed, spread: bool) -> Learner:
    """A learner as `Trainer` makes it, of whole weights or of slices."""
    args = options.parse_args(digits(*CASES[case], "--r", 2, "--num_registers", 2, "--lr", 0.1, "--opt_eps", 1e-3))
    module = ours(MergeConfig(method="mctf" if case == "mctf" else "tome", r=2), num_registers=2)
    if case != "bf16":
        module = module.double()
    if args.lora:
        torch.manual_seed(0)
        add_lora(module, LoraSettings(2, 2.0))
    freeze(module, args.train_only)
    precision = build_precision(args, dist.device)
    if spread and not dist.is_main:
        module = module.to("meta")
    averaged = shard(module, dist, precision.dtype) if spread else None
    groups = parameter_groups(module, args.weight_decay, layer_decay=args.layer_decay)
    objective, mixup = build_objective(args, None, module), build_mixup(args, 10)
    return build_learner(args, dist, module, groups, objective, precision, mixup, averaged)


def updates(learner: Learner, dist: Distributed, count: int) -> list[dict[str, float]]:
    sums = []
    for step in range(count):
        dtype = torch.float32 if learner.precision.dtype else torch.double
        whole = [make_batch(8, 2 * step + k, dtype) for k in range(learner.accumulation)]
        group = [Batch(*(part[dist.rank :: dist.world] for part in batch[:3]), ()) for batch in whole]  # type: ignore[arg-type]
        parts = learner.step_gradients(group, 0, step)
        sums.append({name: float(value) for name, value in parts.items()})
        assert learner.gradients_finite()
        learner.update()
    return sums


def checks(folder: str) -> int:
    """On each rank: two updates of whole weights and of slices, from there to a state, and on from the other's."""
    dist = init_distributed("cpu")
    found: dict[str, Any] = {}
    for case in CASES:
        learners = {kind: make_learner(case, dist, kind == "fsdp") for kind in ("ddp", "fsdp")}
        sums = {kind: updates(learner, dist, 2) for kind, learner in learners.items()}
        # without the average, which shares frozen weights with a model of whole ones only
        size = {kind: held(dataclasses.replace(learner, ema=None)) for kind, learner in learners.items()}
        states = {kind: copy.deepcopy(learner.state_dict()) for kind, learner in learners.items()}
        found[case] = {"sums": sums, "bytes": size, "states": states}
        if case == "tome":  # each goes on from the state of the other, which rank 0 alone has
            torch.save(states["ddp"], f"{folder}/whole{dist.rank}.pt")
            state = torch.load(f"{folder}/whole{dist.rank}.pt", weights_only=True)
            fresh = make_learner(case, dist, True)
            load_whole(fresh.module, state["model"])
            fresh.load_state_dict(state)
            updates(fresh, dist, 1)
            updates(learners["ddp"], dist, 1)
            found["gone on"] = {"ddp": learners["ddp"].state_dict(), "fsdp": fresh.state_dict()}
    found["probe"] = {kind: probed(dist, kind == "fsdp") for kind in ("ddp", "fsdp")}
    torch.save(found, f"{folder}/found{dist.rank}.pt")
    close_distributed()
    return 0


def probed(dist: Distributed, spread: bool) -> Tensor:
    """A head that starts as a linear probe."""
    args = options.parse_args(digits("--head_init", "probe", limit=40))
    module = ours(num_registers=2)
    if spread:
        shard(module, dist)
    precision = build_precision(args, dist.device)
    init_head(module, ("head.weight", "head.bias"), build_data(args, DataConfig(input_size=32)), args, precision, dist)
    weight = module.head.weight
    return weight.full_tensor() if spread else weight  # type: ignore[operator]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    statuses = finish(start(checks, 2, folder))
    assert statuses == [0, 0], [(folder / f"err{rank}.txt").read_text() for rank in range(2)]
    return [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in range(2)]


def same_states(first: dict[str, Any], second: dict[str, Any], **tolerance: float) -> None:
    """Two learners' states: the same names and plain values, and close tensors of the same types."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        other = second[key]
        assert type(value) is type(other), key
        if isinstance(value, dict):
            same_states(value, other, **tolerance)
        elif isinstance(value, list):
            same_states(dict(enumerate(value)), dict(enumerate(other)), **tolerance)
        elif isinstance(value, Tensor):
            torch.testing.assert_close(value, other, **tolerance, msg=lambda text, key=key: f"{key}: {text}")
        else:
            assert value == other, key


@pytest.mark.parametrize("case", CASES)
def test_slices_train_as_whole_weights(two: list[dict[str, Any]], case: str) -> None:
    for found in two:
        for whole, slices in zip(*found[case]["sums"].values(), strict=True):
            assert slices == pytest.approx(whole, rel=1e-2 if case == "bf16" else 1e-9)
    states = two[0][case]["states"]
    tolerance = {"rtol": 0.05, "atol": 0.02} if case == "bf16" else {"rtol": 1e-7, "atol": 1e-9}
    same_states(states["ddp"], states["fsdp"], **tolerance)
    assert two[1][case]["states"]["fsdp"]["model"]["head.weight"] is None, "rank 0 alone holds the whole"


@pytest.mark.parametrize("case", CASES)
def test_a_process_holds_its_part_only(two: list[dict[str, Any]], case: str) -> None:
    sizes = [found[case]["bytes"] for found in two]
    assert sizes[0]["ddp"] == sizes[1]["ddp"]
    # whole bias vectors and tokens may lie on the first rank, for tensors are cut along their first dimension
    assert sum(size["fsdp"] for size in sizes) < 1.1 * sizes[0]["ddp"]
    assert max(size["fsdp"] for size in sizes) < 0.6 * sizes[0]["ddp"]


def test_a_state_of_whole_weights_goes_on_in_slices(two: list[dict[str, Any]]) -> None:
    same_states(two[0]["gone on"]["ddp"], two[0]["gone on"]["fsdp"], rtol=1e-7, atol=1e-9)


def test_a_head_starts_as_the_same_probe(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert torch.equal(found["probe"]["ddp"], found["probe"]["fsdp"])


# Whole runs


def fsdp_run(folder: str, spread: bool, interrupt: str = "") -> int:
    """Two epochs of two updates; the validation set has one batch more for the first rank than for the other."""
    return play(folder, interrupt, flags=["--limit", "33", *(["--fsdp"] if spread else [])])


def test_a_run_in_slices_goes_on_bit_for_bit_and_in_whole(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("whole", "slices", "stopped", "other")}
    for folder in folders.values():
        folder.mkdir()
    assert finish(start(fsdp_run, 2, folders["whole"], False)) == [0, 0]
    assert finish(start(fsdp_run, 2, folders["slices"], True)) == [0, 0], (folders["slices"] / "err0.txt").read_text()
    close_runs(folders["whole"], folders["slices"])
    assert finish(start(fsdp_run, 2, folders["stopped"], True, "SIGTERM")) == [75, 75]
    shutil.copytree(folders["stopped"], folders["other"], dirs_exist_ok=True)
    assert finish(start(fsdp_run, 2, folders["stopped"], True)) == [0, 0]
    same_run(folders["slices"], folders["stopped"])
    assert finish(start(fsdp_run, 2, folders["other"], False)) == [0, 0]
    close_runs(folders["whole"], folders["other"])


def close_runs(first: Path, second: Path) -> None:
    """The same files of two runs, up to the last digits."""
    for a, b in zip(log_lines(first), log_lines(second), strict=True):
        assert a.pop("best") == b.pop("best")
        assert a == pytest.approx(b, rel=1e-4)
    states = [
        {key: checkpoint(folder)[key] for key in ("model", "model_ema", "optimizer")} for folder in (first, second)
    ]
    same_states(states[0], states[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["several processes", "torchrun --nproc_per_node=N"]),
        (["--sam_rho", "1"], ["--sam_rho does not go with --fsdp"]),
        (["--compile"], ["--compile does not go with --fsdp"]),
        (["--amp", "fp16"], ["--amp bf16"]),
        (["--opt", "adafactor"], ["--opt adafactor does not go with --fsdp", "adamw"]),
        (["--eval"], ["--fsdp has no effect with --eval"]),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]) -> None:
    with toy_model():
        line = refusal(capsys, digits("--fsdp", *flags))
    for word in words:
        assert word in line
