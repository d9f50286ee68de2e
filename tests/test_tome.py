"""ToMe merging against recorded outputs of the published implementation, and a slow oracle written from the equations.

Shapes: B batch, N tokens, P prefix tokens, n = N - P patch tokens, C channels, M tokens left.
"""

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import images, ours, randomise, with_prefix
from torch import Tensor

from models import MergeConfig, MergingViT, merge_by_map, unmerge
from models.blocks import attend, log_size
from models.merging import group_map, match_bipartite, merge_sizes, merge_tokens

PREFIXES = (0, 1, 2, 5)

# Recorded outputs

GOLDEN_CASES = ["r8", "r8_noprop", "r6_decreasing", "r_list", "r8_distilled", "r40_capped"]


def golden_case(folder: Path, key: str) -> dict[str, Any]:
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    return next(case for case in cases if case["key"] == f"tome/{key}")


def golden_config(case: dict[str, Any]) -> MergeConfig:
    r = tuple(case["r"]) if isinstance(case["r"], list) else case["r"]
    return MergeConfig(r=r, prop_attn=case.get("prop_attn"))


def golden_model(folder: Path, config: MergeConfig, distilled: bool = False) -> MergingViT:
    sizes: dict[str, Any] = dict(image_size=64, patch_size=8, num_classes=10, dim=96, depth=6, heads=3, mlp_dim=384)
    model = MergingViT(**sizes, num_registers=0, merge=config, distilled=distilled)
    model.load_state_dict(load_file(folder / f"weights{'_distilled' if distilled else ''}.safetensors"))
    return model.eval()


def test_every_recorded_case_is_tested(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "manifest.json").read_text())["cases"]
    assert {f"tome/{key}" for key in GOLDEN_CASES} == {c["key"] for c in cases if c["key"].startswith("tome/")}


def test_recorded_dense_logits(golden_dir: Path, golden: dict[str, Tensor]) -> None:
    model = golden_model(golden_dir, MergeConfig(r=0))
    torch.testing.assert_close(model(golden["input"]), golden["timm/logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", GOLDEN_CASES)
def test_recorded_outputs(key: str, golden_dir: Path, golden: dict[str, Tensor]) -> None:
    case = golden_case(golden_dir, key)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = golden_model(golden_dir, golden_config(case), case.get("distilled", False))
    assert bool(caught) == (key == "r40_capped")
    with torch.no_grad():
        out = model(golden["input"], trace=True)
    torch.testing.assert_close(out.logits, golden[f"tome/{key}/logits"], rtol=1e-5, atol=1e-5)
    assert torch.equal(out.size, golden[f"tome/{key}/size"].squeeze(-1))
    assert torch.equal(source_matrix(out, model.num_prefix_tokens), golden[f"tome/{key}/source"])


def source_matrix(out: Any, prefix: int) -> Tensor:
    """0/1 membership of all tokens (B,M,N), the prefix in itself."""
    own = torch.arange(prefix).expand(len(out.group), -1)
    member = torch.cat((own, out.group + prefix), dim=1)
    return F.one_hot(member, out.size.shape[1]).transpose(1, 2).float()


def test_recorded_gradients(golden_dir: Path, golden: dict[str, Tensor]) -> None:
    model = golden_model(golden_dir, MergeConfig(r=8))
    F.cross_entropy(model(golden["input"]), golden["target"].long()).backward()
    recorded = {name.split("/grad/")[1]: g for name, g in golden.items() if name.startswith("tome/r8/grad/")}
    assert len(recorded) == 4
    for name, gradient in recorded.items():
        mine = model.get_parameter(name).grad
        assert mine is not None
        assert (mine - gradient).norm() < 1e-4 * gradient.norm(), name


# The slow oracle: one image, one token at a time, in double precision


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def slow_groups(metric: list[list[float]], r: int, prefix: int) -> list[list[int]]:
    """Members (positions among all tokens) of every output token, in output order."""
    positions = range(prefix, prefix + len(metric))
    sources = [p for p in positions if p % 2 == 0]
    destinations = [p for p in positions if p % 2 == 1]
    proposals = []
    for source in sources:
        scores = [(cosine(metric[source - prefix], metric[d - prefix]), d) for d in destinations]
        if scores:
            proposals.append((*max(scores), source))
    proposals.sort(reverse=True)
    gone = {source: destination for _, destination, source in proposals[:r]}
    groups = [[p] for p in range(prefix)]
    groups += [[p] for p in sources if p not in gone]
    groups += [[d, *sorted(s for s in gone if gone[s] == d)] for d in destinations]
    return groups


def slow_attention(attn: Any, y: Tensor, size: list[float]) -> tuple[Tensor, list[list[float]]]:
    """(N,C) -> output of the attention (N,C), mean key of every token."""
    tokens, heads, width = len(y), attn.num_heads, attn.head_dim
    qkv = y @ attn.qkv.weight.T + attn.qkv.bias
    q, k, v = (qkv[:, i * heads * width : (i + 1) * heads * width] for i in range(3))
    out = torch.zeros(tokens, heads * width, dtype=y.dtype)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(tokens):
            weights = torch.stack([size[j] * (q[i, part] @ k[j, part] / math.sqrt(width)).exp() for j in range(tokens)])
            out[i, part] = (weights / weights.sum()) @ v[:, part]
    keys = torch.stack([k[:, h * width : (h + 1) * width] for h in range(heads)]).mean(0)
    return out @ attn.proj.weight.T + attn.proj.bias, keys.tolist()


def slow_forward(model: MergingViT, x: Tensor, rs: list[int], prop_attn: bool) -> tuple[Tensor, list[float], list[set]]:
    """Tokens (N,C) before the blocks -> tokens (M,C) after the final norm, sizes, patches of every token."""
    prefix = model.num_prefix_tokens
    size, held = [1.0] * len(x), [{i - prefix} if i >= prefix else set() for i in range(len(x))]
    for block, r in zip(model.blocks, rs, strict=True):
        y, keys = slow_attention(block.attn, block.norm1(x), size if prop_attn else [1.0] * len(x))
        x = x + y
        r = min(r, (len(x) - prefix) // 2)
        groups = slow_groups(keys[prefix:], r, prefix) if r else [[i] for i in range(len(x))]
        x = torch.stack([sum(size[i] * x[i] for i in g) / sum(size[i] for i in g) for g in groups])
        held = [set().union(*(held[i] for i in g)) for g in groups]
        size = [sum(size[i] for i in g) for g in groups]
        x = x + block.mlp(block.norm2(x))
    return model.norm(x), size, held


def tokens_in(model: MergingViT, x: Tensor) -> Tensor:
    """Prefix and patches with their positions, the way timm puts them together: (B,N,C)."""
    patches = model.patch_embed(x)
    prefix = [t.expand(len(x), -1, -1) for t in (model.cls_token, model.dist_token) if t is not None]
    registers = [] if model.reg_token is None else [model.reg_token.expand(len(x), -1, -1)]
    positioned = torch.cat((*prefix, patches), dim=1) + model.pos_embed
    return torch.cat((positioned[:, : len(prefix)], *registers, positioned[:, len(prefix) :]), dim=1)


def members(group: Tensor, groups: int) -> list[list[int]]:
    """Who is in each group of a map (N,)."""
    return [(group == m).nonzero().flatten().tolist() for m in range(groups)]


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("rs", [[1, 1, 1], [3, 0, 4], [8, 4, 2]], ids=str)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_model_equals_the_slow_oracle(prefix: int, rs: list[int], prop_attn: bool) -> None:
    model = with_prefix(prefix, MergeConfig(r=rs, prop_attn=prop_attn), seed=prefix).double()
    x = images(2).double()
    with torch.no_grad():
        out = model(x, trace=True)
        start = tokens_in(model, x)
        assert start.shape[1] == 16 + prefix
        for b in range(len(x)):
            tokens, size, held = slow_forward(model, start[b], rs, prop_attn)
            torch.testing.assert_close(out.tokens[b], tokens, rtol=1e-5, atol=1e-6)
            assert out.size[b].tolist() == size
            assert members(out.group[b], len(held) - prefix) == [sorted(patches) for patches in held[prefix:]]


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_matching_equals_the_slow_oracle(prefix: int, n: int) -> None:
    metric = torch.randn(4, n, 5, generator=torch.Generator().manual_seed(n))
    for r in {1, n // 2, max(1, n // 4)}:
        step = match_bipartite(metric, r, prefix)
        group = group_map(step)
        for b in range(4):
            expected = slow_groups(metric[b].double().tolist(), r, prefix)
            assert members(group[b], prefix + n - r) == [sorted(g) for g in expected]
            assert step.keep[b].tolist() == [g[0] for g in expected]


# Merging as such


def random_step(prefix: int, n: int, r: int, batch: int = 3) -> Any:
    metric = torch.randn(batch, n, 6, generator=torch.Generator().manual_seed(prefix * 100 + n * 10 + r))
    return match_bipartite(metric, r, prefix)


def steps() -> Iterator[tuple[int, int, int]]:
    for prefix in PREFIXES:
        for n in (2, 7, 16):
            for r in sorted({1, (n + 2) // 4, n // 2}):
                yield prefix, n, r


@pytest.mark.parametrize(("prefix", "n", "r"), list(steps()))
def test_merge_invariants(prefix: int, n: int, r: int) -> None:
    tokens = prefix + n
    step, group = random_step(prefix, n, r), group_map(random_step(prefix, n, r))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, tokens, 4, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 6, (3, tokens), generator=generator).double()
    size[:, :prefix] = 1
    merged, sizes = merge_tokens(x, step, size), merge_sizes(size, step)

    assert merged.shape == (3, tokens - r, 4)
    torch.testing.assert_close(merged, merge_by_map(x, group, tokens - r, size), rtol=1e-12, atol=1e-12)
    assert torch.equal(sizes.sum(1), size.sum(1))
    assert torch.equal(merged[:, :prefix], x[:, :prefix])
    assert torch.equal(sizes[:, :prefix], size[:, :prefix])
    assert torch.equal(group[:, :prefix], torch.arange(prefix).expand(3, -1))
    assert (group[:, prefix:] >= prefix).all()
    assert_unmerge(x, merged, group)


def assert_unmerge(x: Tensor, merged: Tensor, group: Tensor) -> None:
    """Every member gets its group's value; a token alone in its group gets itself back, bit by bit."""
    back = unmerge(merged, group)
    assert back.shape == x.shape
    for b in range(len(x)):
        counts = torch.bincount(group[b], minlength=merged.shape[1])
        assert (counts > 0).all()
        alone = counts[group[b]] == 1
        assert torch.equal(back[b, alone], x[b, alone])
        for i in range(x.shape[1]):
            assert torch.equal(back[b, i], merged[b, group[b, i]])


def test_merging_does_not_write_to_its_inputs() -> None:
    step = random_step(1, 8, 3)
    x, size = torch.randn(3, 9, 4), torch.ones(3, 9)
    x_before, size_before = x.clone(), size.clone()
    merge_tokens(x, step, size)
    merge_sizes(size, step)
    assert torch.equal(x, x_before)
    assert torch.equal(size, size_before)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_gradient_of_a_merge(prefix: int) -> None:
    step = random_step(prefix, 7, 3, batch=2)
    x = torch.randn(2, prefix + 7, 2, dtype=torch.float64, requires_grad=True)
    size = torch.rand(2, prefix + 7, dtype=torch.float64) + 1
    assert torch.autograd.gradcheck(lambda y: merge_tokens(y, step, size), x)


def test_several_sources_into_one_destination() -> None:
    """Tokens 1 and 3 are copies of 0; sources are 0, 2, 4, destinations 1, 3, 5 (P = 0)."""
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [1.0, 0.11], [0.0, 1.0], [1.0, 0.09], [-1.0, 0.0]]])
    step = match_bipartite(metric, 3, 0)
    assert group_map(step).tolist() == [[0, 0, 0, 1, 0, 2]]
    x = torch.arange(6.0).reshape(1, 6, 1)
    size = torch.tensor([[1.0, 2.0, 3.0, 1.0, 4.0, 1.0]])
    merged = merge_tokens(x, step, size)
    torch.testing.assert_close(merged.flatten(), torch.tensor([(0 + 2 + 6 + 16) / 10, 3.0, 5.0]))
    assert merge_sizes(size, step).tolist() == [[10.0, 1.0, 1.0]]


def test_ties_still_give_a_partition() -> None:
    step = match_bipartite(torch.ones(2, 9, 3), 4, 1)
    group = group_map(step)
    for row in group:
        assert sorted(set(row.tolist())) == list(range(6))
    assert step.keep[0].tolist() == step.keep[1].tolist()


def test_matching_scale_of_the_metric_does_not_matter() -> None:
    metric = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(3))
    scale = torch.rand(2, 12, 1, generator=torch.Generator().manual_seed(4)) * 50 + 0.1
    assert torch.equal(group_map(match_bipartite(metric, 4, 1)), group_map(match_bipartite(metric * scale, 4, 1)))


# Proportional attention


def test_a_token_of_size_two_is_two_tokens() -> None:
    """Attention over sizes (1,2,3) equals attention over each token repeated that often."""
    attn = ours().blocks[0].attn
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([[1.0, 2.0, 3.0]]).expand(2, -1)
    repeated = x[:, [0, 1, 1, 2, 2, 2]]
    short = attend(attn, x, log_size(size, x))[0]
    long = attend(attn, repeated)[0]
    torch.testing.assert_close(short, long[:, [0, 1, 3]], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(short, attend(attn, x)[0], atol=1e-3)


def test_attention_bias_is_never_expanded() -> None:
    assert log_size(torch.ones(2, 9), torch.zeros(1)).shape == (2, 1, 1, 9)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_plain_attention_equals_fused(qk_norm: bool) -> None:
    model = ours(MergeConfig(r=4), num_registers=2, qk_norm=qk_norm)
    fused = model(images())
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(images()), fused, rtol=1e-5, atol=1e-5)


def test_merging_identical_patches_changes_nothing() -> None:
    """Pairs of equal tokens: with proportional attention merging them is exact, without it is not."""
    model = ours(MergeConfig(r=[8, 0, 0]), num_registers=1)
    with torch.no_grad():
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:2]
    x = images(2)
    x[..., 8:16] = x[..., 0:8]
    x[..., 24:32] = x[..., 16:24]
    torch.testing.assert_close(model(x), model(x, r=0), rtol=1e-5, atol=1e-5)
    plain = ours(MergeConfig(r=[8, 0, 0], prop_attn=False), num_registers=1)
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(x), plain(x, r=0), atol=1e-4)


def test_r_zero_is_no_merging_whatever_the_options() -> None:
    dense = ours(num_registers=3)(images())
    for config in (MergeConfig(r=0), MergeConfig(r=0, prop_attn=False), MergeConfig(r=4, activate_layers=[])):
        assert torch.equal(ours(config, num_registers=3)(images()), dense)


# The batch, and registers


@pytest.mark.parametrize("prefix", PREFIXES)
def test_images_of_a_batch_do_not_see_each_other(prefix: int) -> None:
    model = with_prefix(prefix, MergeConfig(r="4,3,2"), seed=7)
    x = images(5, seed=3)
    with torch.no_grad():
        out = model(x, trace=True)
        singles = [model(image[None], trace=True) for image in x]
        order = torch.tensor([3, 0, 4, 2, 1])
        shuffled = model(x[order], trace=True)
    assert torch.equal(out.group, torch.cat([single.group for single in singles]))
    torch.testing.assert_close(out.logits, torch.cat([single.logits for single in singles]), rtol=1e-5, atol=1e-5)
    assert torch.equal(out.group[order], shuffled.group)
    torch.testing.assert_close(out.logits[order], shuffled.logits, rtol=1e-5, atol=1e-5)


def test_images_merge_differently() -> None:
    out = with_prefix(1, MergeConfig(r=4))(images(4), trace=True)
    assert len({tuple(row.tolist()) for row in out.group}) > 1


@pytest.mark.parametrize("registers", [2, 3, 4, 8])
def test_order_of_registers_does_not_matter(registers: int) -> None:
    model = ours(MergeConfig(r="5,4,2"), num_registers=registers)
    with torch.no_grad():
        before = model(images(3), trace=True)
        model.reg_token.copy_(model.reg_token.roll(1, dims=1))
        after = model(images(3), trace=True)
    for groups_before, groups_after in zip(before.groups, after.groups, strict=True):
        assert torch.equal(groups_before, groups_after)
    torch.testing.assert_close(before.logits, after.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:r=1000 is more than")
@pytest.mark.parametrize("registers", [0, 1, 2, 3, 4, 8])
def test_registers_are_never_merged(registers: int) -> None:
    model = ours(MergeConfig(r=1000, min_tokens=0), num_registers=registers)
    prefix = 1 + registers
    out = model(images(2), trace=True)
    assert out.counts == (prefix + 8, prefix + 4, prefix + 2)
    assert torch.equal(out.size[:, :prefix], torch.ones(2, prefix))
    assert torch.equal(out.size.sum(1), torch.full((2,), float(prefix + 16)))


def test_an_odd_number_of_registers_swaps_sources_and_destinations() -> None:
    metric = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(1))
    for prefix, parity in ((1, 1), (2, 0), (5, 1), (6, 0)):
        step = match_bipartite(metric, 3, prefix)
        assert all((p - prefix) % 2 == parity for p in step.source[0].tolist())


# Training


def test_gradients_reach_every_pixel_and_parameter() -> None:
    model = ours(MergeConfig(r="6,4,2"), num_registers=2).train()
    x = images(2).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).float().mean() > 0.999
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_merging_gradient_equals_finite_differences() -> None:
    """The groups are constants of the derivative: a small step does not change them."""
    model = ours(MergeConfig(r=4), num_registers=1).double()
    direction = images(1, seed=9).double()
    x = images(1).double().requires_grad_()
    model(x)[0, 3].backward()
    with torch.no_grad():
        numeric = (model(x + 1e-6 * direction) - model(x - 1e-6 * direction))[0, 3] / 2e-6
    torch.testing.assert_close((x.grad * direction).sum(), numeric, rtol=1e-5, atol=1e-8)


def test_deterministic_algorithms_give_the_same() -> None:
    model, x = ours(MergeConfig(r=4), num_registers=2), images(3)
    loss = model(x).square().sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.use_deterministic_algorithms(True)
    try:
        again = model(x).square().sum()
        again.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(again, loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)


def test_a_half_precision_metric_is_compared_in_full_precision() -> None:
    metric = torch.randn(8, 196, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    full = match_bipartite(metric.float(), 40, 1)
    assert torch.equal(group_map(match_bipartite(metric, 40, 1)), group_map(full))


def test_decisions_are_made_in_full_precision_under_autocast() -> None:
    metric = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0))
    metric[:, 1::2] = metric[:, ::2] * 0.01 + metric[:, :1]  # cosines that bf16 cannot tell apart
    expected = group_map(match_bipartite(metric, 16, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = match_bipartite(metric, 16, 1)
    assert torch.equal(group_map(step), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_finite_and_sizes_stay_exact(dtype: torch.dtype) -> None:
    model, x = ours(MergeConfig(r="6,4,2"), num_registers=2), images(4)
    with torch.autocast("cpu", dtype=dtype):
        out = model(x, trace=True)
        out.logits.float().square().sum().backward()
    assert torch.isfinite(out.logits).all()
    assert out.size.dtype == torch.float32
    assert torch.equal(out.size.sum(1), torch.full((4,), 19.0))
    torch.testing.assert_close(out.logits.float(), model(x), rtol=0.3, atol=0.3)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_sizes_stay_exact_in_a_half_precision_model() -> None:
    """300 patches in one token: bf16 has no odd numbers above 256."""
    model = randomise(MergingViT(image_size=40, patch_size=2, num_classes=3, dim=8, depth=8, heads=2, mlp_dim=8, r=0.5))
    out = model.bfloat16().eval()(images(1, 40).bfloat16(), trace=True)
    assert out.counts[-1] - 5 <= 3
    assert out.size.dtype == torch.float32
    assert out.size[0, 5:].tolist() == torch.bincount(out.group[0]).tolist()
