"""Blocks and layers are called as modules: hooks, adapters, quantisation, FSDP and counters see them.

Shapes: B batch, N tokens, M tokens left, C channels.
"""

import copy
import dataclasses
import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import every_method, images, ours, timm_vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import MergeConfig, MergingViT, UserError, apply_merging
from models.blocks import is_plain, project_qk, project_v
from models.gmacs import gmacs

pytestmark = [
    pytest.mark.filterwarnings("ignore:r=.* is more than"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning"),
]
every_config = pytest.mark.parametrize("config", [pytest.param(MergeConfig("none"), id="none"), *every_method()])


def looks_twice(config: MergeConfig) -> bool:
    """Whether the method needs queries and keys before the merge, and values of what is left after it."""
    return config.one_step_ahead in ("on", "precise")


@every_config
def test_hooks_fire_once_per_forward(config: MergeConfig) -> None:
    model = ours(config, num_registers=2)
    fired: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            fired[name] += 1
            shapes[name] = tuple(args[0].shape[:2]), tuple(output.shape[:2])  # type: ignore[assignment]

        return note

    parts = ("", ".attn", ".attn.qkv", ".attn.proj", ".mlp", ".mlp.fc1", ".norm2")
    for index, block in enumerate(model.blocks):
        for part in parts:
            block.get_submodule(part[1:]).register_forward_hook(hook(f"{index}{part}"))
    with torch.no_grad():
        out = model(images(2), trace=True)
    before = (out.counts[0] + model.plan().merges[0], *out.counts[:-1])
    for index, (entering, left) in enumerate(zip(before, out.counts, strict=True)):
        for part in parts:
            twice = part == ".attn.qkv" and looks_twice(config) and entering != left
            assert fired[f"{index}{part}"] == (2 if twice else 1), part
        assert shapes[f"{index}"] == ((2, entering), (2, left))
        if config.one_step_ahead != "off":
            assert shapes[f"{index}.mlp"][1] == (2, left)


@every_config
def test_hooks_see_and_may_replace_tensors(config: MergeConfig) -> None:
    model = ours(config)
    seen: list[Any] = []
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        plain = model(images(2))
        assert all(isinstance(tensor, Tensor) and tensor.shape[2] == 24 for tensor in seen) and len(seen) == 2
        model.blocks[2].register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        zeros = model(images(2), trace=True)
    assert not torch.equal(zeros.logits, plain)
    torch.testing.assert_close(zeros.tokens, model.norm(torch.zeros_like(zeros.tokens)))


def test_hooks_on_the_timm_model_stay_there() -> None:
    vit = timm_vit()
    fired: list[int] = []
    handle = vit.blocks[0].register_forward_hook(lambda *_: fired.append(1))
    model = apply_merging(vit, MergeConfig(r=2))
    handle.remove()
    model(images())
    assert not fired


class LoRA(nn.Module):
    """A low-rank adapter around a linear layer, as PEFT puts it: not an nn.Linear itself."""

    def __init__(self, base: nn.Linear, rank: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.constant_(self.lora_A.weight, 0.1 * scale)
        nn.init.constant_(self.lora_B.weight, 0.1 * scale)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # PEFT's wrappers have one too: reading it would skip the adapter

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@every_config
def test_an_adapter_around_qkv_acts_as_if_it_were_merged_into_the_weight(config: MergeConfig) -> None:
    adapted, folded = ours(config, num_registers=1), ours(config, num_registers=1)
    for block, plain in zip(adapted.blocks, folded.blocks, strict=True):
        block.attn.qkv = adapter = LoRA(block.attn.qkv)
        with torch.no_grad():
            plain.attn.qkv.weight += adapter.lora_B.weight @ adapter.lora_A.weight
    logits = adapted(images(2))
    torch.testing.assert_close(logits, folded(images(2)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, ours(config, num_registers=1)(images(2)), atol=1e-3)
    logits.square().sum().backward()
    for block in adapted.blocks:
        assert block.attn.qkv.lora_B.weight.grad.abs().max() > 0
    extra = gmacs(adapted) - gmacs(folded)  # rank 2: 24 -> 2 -> 72
    tokens = (adapted.plan().counts[0] + adapted.plan().merges[0], *adapted.plan().counts[:-1])
    if config.one_step_ahead in (None, "off"):
        assert extra * 1e9 == pytest.approx(sum(tokens) * (24 * 2 + 2 * 72), rel=0.02)
    assert extra > 0


@every_config
def test_dynamic_quantisation_acts_in_every_layer(config: MergeConfig) -> None:
    model = ours(config, num_registers=1)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert "DynamicQuantizedLinear" in str(quantised.blocks[0].attn.qkv)
    by_hand = copy.deepcopy(model)
    for module in by_hand.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().max() / 127.5
            with torch.no_grad():
                module.weight.copy_((module.weight / scale).round().clamp(-128, 127) * scale)
    with torch.no_grad():
        logits, exact = quantised(images(2)), model(images(2))
    assert not torch.equal(logits, exact)
    assert (logits - exact).abs().max() < 0.35 * exact.abs().max()
    assert gmacs(quantised) == pytest.approx(gmacs(model))


@every_config
def test_both_ways_through_qkv_are_equal(config: MergeConfig) -> None:
    """The rows of a plain layer's weight alone, and the whole layer called as a module."""
    fast, slow = ours(config, num_registers=2).train(), ours(config, num_registers=2).train()
    for block in slow.blocks:
        block.attn.qkv.register_forward_hook(lambda *_: None)
        assert not is_plain(block.attn.qkv)
    assert all(is_plain(block.attn.qkv) for block in fast.blocks)
    logits = [model(images(3)) for model in (fast, slow)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    for value in logits:
        value.square().sum().backward()
    for (name, ours_), theirs in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours_.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_parts_of_qkv_are_those_of_the_whole() -> None:
    attn = ours().blocks[0].attn
    x = torch.randn(2, 5, 24)
    q, k, v = attn.qkv(x).chunk(3, dim=-1)
    for watched in (False, True):
        if watched:
            attn.qkv.register_forward_hook(lambda *_: None)
        fast_q, fast_k = project_qk(attn, x)
        torch.testing.assert_close(fast_q.transpose(1, 2).flatten(2), q)
        torch.testing.assert_close(fast_k.transpose(1, 2).flatten(2), k)
        torch.testing.assert_close(project_v(attn, x), v)


@every_config
def test_fully_sharded_blocks_compute_the_same(config: MergeConfig, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, plain = (ours(config, num_registers=2).train() for _ in range(2))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        logits = model(images(2))
        logits.square().sum().backward()
        gradient = model.blocks[1].attn.qkv.weight.grad.full_tensor()
    finally:
        torch.distributed.destroy_process_group()
    expected = plain(images(2))
    expected.square().sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, plain.blocks[1].attn.qkv.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", every_method(choices=False))
def test_counters_show_blocks_and_layers(config: MergeConfig) -> None:
    model = ours(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(2))
    scopes = counter.get_flop_counts()
    for index in range(3):
        for part in ("", ".attn", ".mlp"):
            assert sum(scopes[f"MergingViT.blocks.{index}{part}"].values()) > 0


# The schedule of a model, and what it shows


def test_assigning_r_changes_the_schedule() -> None:
    model = ours(MergeConfig("mctf", 2, (0, 1, 2), min_tokens=0))
    model.r = 4
    assert model.r == 4 and model.merge == MergeConfig("mctf", 4, (0, 1, 2), min_tokens=0)
    by_call = ours(MergeConfig("mctf", 2, (0, 1, 2), min_tokens=0))(images(), r=[5, 0, 1])
    model.r = [5, 0, 1]
    assert model.r == (5, 0, 1) and torch.equal(model(images()), by_call)
    assert model.state_dict().keys() == timm_vit().state_dict().keys()


@pytest.mark.parametrize("r", [-1, "x", (1, 2, 3, 4), 1.5])
def test_a_wrong_schedule_is_refused_and_changes_nothing(r: Any) -> None:
    model = ours(MergeConfig(r=2))
    with pytest.raises(UserError):
        model.r = r
    assert model.r == 2
    with pytest.raises(UserError, match="'none' merges nothing"):
        ours(MergeConfig("none")).r = 4


def test_a_schedule_beyond_what_there_is_warns() -> None:
    model = ours(MergeConfig(r=2))
    with pytest.warns(UserWarning, match="r=9 is more than can merge: 8 of 9 in block 0"):
        model.r = 9


def test_repr_shows_method_schedule_and_registers() -> None:
    text = repr(ours(MergeConfig("mctf", 0.3), num_registers=4))
    assert text.splitlines()[1].strip() == "method=mctf, r=0.3, num_registers=4"
    assert "  method=tome, r=(4,-1), num_registers=0\n" in repr(ours(MergeConfig(r="(4,-1)")))


def test_the_schedule_is_read_once_and_no_config_is_built_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(MergeConfig(r=2), num_registers=1)
    monkeypatch.setattr(MergeConfig, "__init__", lambda *_, **__: pytest.fail("a config was built"))
    for r in (None, 3, "4", (1, 2, 3)):
        model(images(), r=r)


def test_the_patch_embedding_does_not_outlive_the_first_block() -> None:
    model = ours(MergeConfig(r=2), num_registers=1)
    embedded: list[Any] = []
    alive: list[bool] = []
    model.norm_pre.register_forward_hook(lambda module, args, output: embedded.append(weakref.ref(output)))

    def look(*_: Any) -> None:
        gc.collect()
        alive.append(embedded[0]() is not None)  # the first output is that of the patches

    for block in model.blocks:
        block.register_forward_pre_hook(look)
    with torch.no_grad():
        model(images())
    assert alive == [False, False, False]


def test_a_merging_model_of_a_merging_model_is_independent() -> None:
    first = ours(MergeConfig(r=3))
    second = MergingViT.from_timm(first, dataclasses.replace(first.merge, r=1))
    second.r = 2
    assert first.r == 3 and first.blocks[0] is not second.blocks[0]
    assert first.blocks[0].attn.qkv.weight is second.blocks[0].attn.qkv.weight
