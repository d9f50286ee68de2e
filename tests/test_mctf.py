"""MCTF: recorded outputs of the published implementation, and the slow oracle for what they do not cover.

Shapes: B batch, N tokens, P prefix tokens, n patch tokens, C channels, M tokens left.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from slow import assert_equals_slow, slow_match, slow_mctf_score
from tiny import candidates, images, ours, randomise, with_prefix
from torch import Tensor, nn

from models import MergeConfig, MergingViT, create_model, merge_by_map, unmerge
from models.blocks import attention_map, attention_score, project_qk, run_block
from models.merging import cosine_scores, group_map, match_scores, merge_columns, merge_rows, merge_sizes, pool_tokens
from models.methods.mctf import similarity, token_factor

PREFIXES = (0, 1, 2, 5)
pytestmark = pytest.mark.filterwarnings("ignore:r=.* is more than")
POOLINGS = ("size", "attention", "max", "mean")
MODES = ("off", "on", "precise")
CASES = ["r8", "fast_ratio", "r8_unidirectional", "r8_no_osa", "r8_osa_precise", "r8_pool_size", "r8_pool_max"]
CASES += ["r8_pool_mean", "r8_sim_only", "r8_no_prop", "r30_capped", "r7_tau"]


def mctf(**options: Any) -> MergeConfig:
    """MCTF on all blocks of a tiny model, without a smallest number of tokens."""
    return MergeConfig(**({"method": "mctf", "activate_layers": (0, 1, 2), "min_tokens": 0} | options))


# Recorded outputs


def golden_model(folder: Path, key: str) -> MergingViT:
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    case = next(case for case in cases if case["key"] == f"mctf/{key}")
    config = {name: case[name] for name in ("tau_sim", "tau_info", "tau_size", "r") if name in case}
    config |= {name: bool(case[name]) for name in ("prop_attn", "bidirectional") if name in case}
    config |= {"pooling": POOLINGS[case["pooling"]]} if "pooling" in case else {}
    config |= {"one_step_ahead": MODES[case["one_step_ahead"]]} if "one_step_ahead" in case else {}
    merge = MergeConfig(method="mctf", activate_layers=case["activate_layer"], **config)
    model = MergingViT(64, 8, 10, dim=96, depth=6, heads=3, mlp_dim=384, num_registers=0, merge=merge)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model.eval()


def test_every_recorded_case_is_tested(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "manifest.json").read_text())["cases"]
    assert {f"mctf/{key}" for key in CASES} == {c["key"] for c in cases if c["key"].startswith("mctf/")}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("key", CASES)
def test_recorded_outputs(key: str, fused: bool, golden_dir: Path, golden: dict[str, Tensor]) -> None:
    model = golden_model(golden_dir, key)
    for block in model.blocks:
        block.attn.fused_attn = fused
    with torch.no_grad():
        out = model(golden["input"], trace=True)
    torch.testing.assert_close(out.logits, golden[f"mctf/{key}/logits"], rtol=1e-5, atol=1e-5)
    assert torch.equal(out.size, golden[f"mctf/{key}/size"].squeeze(-1))
    member = torch.cat((torch.zeros(4, 1, dtype=torch.long), out.group + 1), dim=1)
    source = F.one_hot(member, out.size.shape[1]).transpose(1, 2).float()
    assert torch.equal(source, golden[f"mctf/{key}/source"])


@pytest.mark.parametrize("train", [True, False])
def test_recorded_training_step(train: bool, golden_dir: Path, golden: dict[str, Tensor]) -> None:
    """The same weights see the images merged and in full; the class token of the one follows that of the other."""
    model = golden_model(golden_dir, "r8").train(train)
    target = golden["target"].long()
    student, full = model(golden["input"], trace=True), model(golden["input"], r=0, trace=True)
    consistency = (full.tokens[:, 0].detach() - student.tokens[:, 0]).square().mean(dim=-1)
    found = {"student_logits": student.logits, "full_logits": full.logits, "consistency": consistency}
    for name, value in found.items():
        torch.testing.assert_close(value, golden[f"mctf/r8/train/{name}"], rtol=1e-4, atol=1e-5)
    loss = F.cross_entropy(student.logits, target) + F.cross_entropy(full.logits, target) + 3 * consistency.mean()
    loss.backward()
    recorded = {name.split("/grad/")[1]: g for name, g in golden.items() if name.startswith("mctf/r8/train/grad/")}
    assert len(recorded) == 5
    for name, gradient in recorded.items():
        mine = model.get_parameter(name).grad
        assert mine is not None
        assert (mine - gradient).norm() < 1e-4 * gradient.norm(), name


# The slow oracle


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_model_equals_the_slow_oracle(prefix: int, pooling: str, mode: str) -> None:
    """Values and every gradient, against a map that is merged on both axes."""
    config = mctf(r=(5, 4, 2), pooling=pooling, one_step_ahead=mode)
    assert_equals_slow(with_prefix(prefix, config, seed=prefix).double(), images(2).double())


@pytest.mark.parametrize(
    "options",
    [
        {"bidirectional": False},
        {"bidirectional": False, "pooling": "max"},
        {"r": 1},
        {"r": (8, 4, 2)},
        {"r": (0, 3, 0)},
        {"r": 0.3},
        {"r": 0.49, "activate_layers": (1, 2)},
        {"r": "(3,-1)"},
        {"r": 5, "min_tokens": None},
        {"prop_attn": False},
        {"prop_attn": False, "one_step_ahead": "precise"},
        {"tau_sim": 0},
        {"tau_info": 0},
        {"tau_size": 0},
        {"tau_sim": 2, "tau_info": 3, "tau_size": 5},
        {"tau_info": 0, "tau_size": 0, "bidirectional": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", [1, 2])
def test_options_equal_the_slow_oracle(prefix: int, options: dict[str, Any]) -> None:
    model = with_prefix(prefix, mctf(**({"r": 4} | options)), seed=3).double()
    assert_equals_slow(model, images(2, seed=4).double())


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 13])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_matching_equals_the_slow_oracle(prefix: int, n: int, bidirectional: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(3, prefix + n, 5, generator=generator, dtype=torch.float64)
    received = torch.rand(3, prefix + n, generator=generator, dtype=torch.float64) + 0.01
    size = torch.randint(1, 9, (3, prefix + n), generator=generator).double()
    config = mctf(bidirectional=bidirectional)
    for r in {1, 2, n // 2, max(1, n // 3)} & set(range(1, n // 2 + 1)):
        merge = config.rule.match(candidates(x, r, prefix, size, received))
        assert merge.keep.shape == (3, prefix + n - r)
        group = group_map(merge)
        for b in range(3):
            expected = slow_match(
                n, prefix, r, bidirectional, slow_mctf_score(x[b], received[b], size[b].tolist(), config)
            )
            members = [(group[b] == m).nonzero().flatten().tolist() for m in range(prefix + n - r)]
            assert members == [sorted(group) for group in expected]
            assert merge.keep[b].tolist() == [group[0] for group in expected]


def test_few_tokens_are_left_alone() -> None:
    """N < 10 with the published smallest number of tokens."""
    model = ours(MergeConfig(method="mctf", r=4), img_size=16)
    assert model.plan().merges == (0, 0, 0)
    assert torch.equal(model(images(2, 16)), model(images(2, 16), r=0))


# Parts


def test_a_destination_carries_along_what_merged_into_it() -> None:
    """P = 0: sources 0, 2, 4, destinations 1, 3, 5. Round one: 2 -> 3; round two: 3 -> 4."""
    scores = torch.tensor([[[0.1, 0.2, 0.0], [0.3, 0.9, 0.1], [0.2, 0.8, 0.4]]])
    merge = match_scores(scores, 2, 0, bidirectional=True)
    assert merge.keep.tolist() == [[0, 4, 5, 1]]
    assert group_map(merge).tolist() == [[0, 3, 1, 1, 1, 2]]
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]]])
    weight = torch.tensor([[1.0, 1.0, 2.0, 1.0, 3.0, 1.0]])
    assert pool_tokens(x, merge, weight).flatten().tolist() == pytest.approx([1, (6 + 4 + 15) / 6, 6, 2])
    assert pool_tokens(x, merge, None).flatten().tolist() == [1, 5, 6, 2]
    assert merge_sizes(weight, merge).tolist() == [[1.0, 6.0, 1.0, 1.0]]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("n", [4, 9, 16])
def test_two_way_merges_are_partitions_and_unmerge(prefix: int, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(3, prefix + n, 4, generator=generator)
    size = torch.randint(1, 6, (3, prefix + n), generator=generator).float()
    for r in range(1, n // 2 + 1):
        merge = match_scores(cosine_scores(x[:, prefix:], prefix), r, prefix, bidirectional=True)
        group, left = group_map(merge), prefix + n - r
        assert torch.equal(group[:, :prefix], torch.arange(prefix).expand(3, -1))
        assert (group[:, prefix:] >= prefix).all()
        assert all(len(set(row.tolist())) == left for row in group)
        assert torch.equal(merge_sizes(size, merge).sum(1), size.sum(1))
        merged = pool_tokens(x, merge, size)
        torch.testing.assert_close(merged, merge_by_map(x, group, left, size), rtol=1e-5, atol=1e-6)
        back = unmerge(merged, group)
        alone = merge_sizes(torch.ones_like(size), merge).gather(1, group) == 1
        assert torch.equal(back[alone], x[alone])
        torch.testing.assert_close(pool_tokens(back, merge, size), merged, rtol=1e-5, atol=1e-6)


def test_maps_merge_by_columns_and_rows() -> None:
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    merge = match_scores(cosine_scores(x[:, 1:], 1), 4, 1, bidirectional=True)
    attention = torch.rand(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    member = F.one_hot(group_map(merge), 5).double()[:, None]  # (B,1,N,M)
    columns = merge_columns(attention, merge)
    torch.testing.assert_close(columns, attention @ member)
    rows = (columns.unsqueeze(3) * member.unsqueeze(4)).amax(dim=2)  # the map is positive
    torch.testing.assert_close(merge_rows(columns, merge), rows)
    assert torch.autograd.gradcheck(lambda a: merge_rows(merge_columns(a, merge), merge), attention)


def test_gradient_of_max_pooling() -> None:
    merge = match_scores(torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)), 4, 1, bidirectional=True)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: pool_tokens(y, merge, None), x)


def test_criteria_switch_off_and_stay_finite() -> None:
    cosine = torch.tensor([-1.0 - 1e-6, 0.0, 1.0])
    assert similarity(cosine, 1).tolist() == [0.0, 0.5, 1.0]
    assert similarity(cosine, 2).tolist() == pytest.approx([0, 0.5**0.5, 1])
    assert similarity(cosine, 0).tolist() == [1.0, 1.0, 1.0]
    received = attention_score(torch.zeros(1, 2, 3, 3))
    factor = token_factor((received, 20.0), (torch.tensor([[1.0, 2.0, 3.0]]), 40.0))
    assert factor is not None
    assert factor.isfinite().all()
    assert token_factor((received, 0), (torch.ones(1, 3), 0)) is None


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_score_is_of_the_normed_keys_and_has_no_gradient(qk_norm: bool) -> None:
    attn = ours(qk_norm=qk_norm).blocks[0].attn
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    attn.fused_attn = False
    attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    attn(x)
    received = attention_score(attention_map(attn, *project_qk(attn, x), None))
    torch.testing.assert_close(received, seen[0].mean(dim=(1, 2)))
    assert not received.requires_grad


def test_output_norm_and_gate_of_an_attention_work_on_merged_tokens() -> None:
    block = ours(mctf(r=4), scale_attn_norm=True).blocks[0]
    block.attn.gate = nn.Linear(24, 24)
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    for part in (block.attn.norm, block.attn.gate):
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    before = candidates(x, 4, 1)
    out = run_block(block, before.tokens, before.plan, mctf(r=4).rule).tokens
    assert out.x.shape == (2, 13, 24)
    assert [tensor.shape for tensor in seen] == [out.x.shape, out.x.shape]


# ToMe with MCTF's matching and pooling


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_tome_equals_the_slow_oracle(prefix: int, pooling: str, bidirectional: bool) -> None:
    config = MergeConfig(r=(5, 4, 2), pooling=pooling, bidirectional=bidirectional)
    assert_equals_slow(with_prefix(prefix, config, seed=prefix).double(), images(2).double())


# The model


CONFIGS = [mctf(r=4, one_step_ahead=mode, pooling=pooling) for mode in MODES for pooling in ("attention", "max")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.one_step_ahead}-{c.pooling}")
def test_images_of_a_batch_do_not_see_each_other(config: MergeConfig) -> None:
    model = ours(config, num_registers=2)
    x = images(4, seed=3)
    with torch.no_grad():
        out = model(x, trace=True)
        singles = [model(image[None], trace=True) for image in x]
    assert torch.equal(out.group, torch.cat([single.group for single in singles]))
    torch.testing.assert_close(out.logits, torch.cat([single.logits for single in singles]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.one_step_ahead}-{c.pooling}")
def test_checkpointing_and_determinism_change_nothing(config: MergeConfig) -> None:
    model = ours(config, num_registers=2).train()
    gradients = []
    for checkpointing, deterministic in ((False, False), (True, False), (False, True)):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.use_deterministic_algorithms(deterministic)
        try:
            model(images(2)).square().sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.one_step_ahead}-{c.pooling}")
def test_bf16_autocast_is_close_and_trains(config: MergeConfig) -> None:
    model = ours(config, num_registers=2)
    exact = model(images(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(images(3))
    assert rough.dtype == torch.bfloat16
    rough.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (rough - exact).abs().max() < 0.2 * exact.abs().max()


def test_compiled_model_is_one_graph_and_equals_eager() -> None:
    torch._dynamo.reset()
    merge = MergeConfig(method="mctf", r=7)
    model = randomise(create_model("deit_digits", num_registers=2, merge=merge, depth=3)).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for r in (None, (0, 0, 5)):
        with torch.no_grad():
            torch.testing.assert_close(compiled(images(2), r=r), model(images(2), r=r), rtol=1e-5, atol=1e-5)


def test_weights_of_the_pooling_have_no_gradient() -> None:
    """Attention received weighs tokens, but nothing is learned through it: with v = 0 the map is not trained."""
    model = ours(mctf(r=(4, 0, 0)))
    attn = model.blocks[0].attn
    with torch.no_grad():
        attn.qkv.weight[48:].zero_()
        attn.qkv.bias[48:].zero_()
    model(images(2)).square().sum().backward()
    assert attn.qkv.weight.grad is not None
    assert attn.qkv.weight.grad[:48].abs().max() == 0
    assert attn.qkv.weight.grad[48:].abs().max() > 0
