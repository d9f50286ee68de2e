"""RegToMe's own rule beside a slow oracle written from its equations.

Shapes: B batch, N tokens, P prefix tokens, n patch tokens, C channels.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import candidates, images, ours, with_prefix
from torch import Tensor

from models import MergeConfig, merge_by_map
from models.blocks import attention_map, project_qk
from models.merging import group_map
from models.methods.regtome import match_by_weight
from options import parse_args

PREFIXES = (0, 1, 2, 5)


def slow_regtome(x: Tensor, weight: list[float], r: int) -> list[list[int]]:
    """Groups of the patch tokens of one image, x (n,C), token by token; first members first."""
    n = len(x)
    cosine = [[float(F.cosine_similarity(x[i], x[j], dim=0)) for j in range(n)] for i in range(n)]
    cost = []
    for i in range(n):
        nearest = max((cosine[i][j] for j in range(n) if weight[j] > weight[i]), default=-1.0)
        cost.append(weight[i] * (1 - nearest))
    go = sorted(range(n), key=lambda i: cost[i])[:r]
    groups = {i: [i] for i in range(n) if i not in go}
    for i in go:
        groups[max(groups, key=lambda j: cosine[i][j])].append(i)
    return sorted(sorted(group) for group in groups.values())


def members_of(group: Tensor, prefix: int) -> list[list[int]]:
    """The same of one image's map (N)."""
    patches = (group[prefix:] - prefix).tolist()
    return sorted([i for i, token in enumerate(patches) if token == wanted] for wanted in set(patches))


@pytest.mark.parametrize("n", [2, 5, 13])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_matching_equals_the_slow_oracle(prefix: int, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(3, prefix + n, 6, generator=generator).double() + 0.5
    weight = torch.rand(3, prefix + n, generator=generator) + 0.1
    for r in {1, n // 2, n - 1}:  # more than half of them may go
        merge = match_by_weight(x, weight, r, prefix)
        assert torch.equal(merge.keep[:, :prefix], torch.arange(prefix).expand(3, -1))
        group = group_map(merge)
        kept = weight.gather(1, merge.keep)[:, prefix:]
        assert (kept.diff(dim=1) <= 0).all()  # heaviest first
        for b in range(3):
            expected = slow_regtome(x[b, prefix:], weight[b, prefix:].tolist(), r)
            assert members_of(group[b], prefix) == expected


def test_tokens_of_one_weight_still_merge() -> None:
    merge = match_by_weight(torch.ones(2, 9, 4), torch.ones(2, 9), 7, 1)
    assert group_map(merge).tolist() == 2 * [[0] + 8 * [1]]


@torch.no_grad()
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_block_of_the_model_equals_the_slow_oracle(prefix: int) -> None:
    """Weights from prefix rows of the map, remembered over blocks; means by attention, as long as their members."""
    memory = 0.3
    model = with_prefix(prefix, MergeConfig("regtome", (9, 3, 2), memory=memory))
    seen = torch.zeros(2, 16)
    for layer in model.layers(model.embed(images(2), follow=True), model.plan()):
        before, block, merge = layer.before, layer.block, layer.merge
        bias = before.size.log()[:, None, None] if before.sizes_differ else None
        q, k = project_qk(block.attn, block.norm1(before.x))
        queries = q[:, :, :prefix] if prefix else q.mean(dim=2, keepdim=True)
        received = attention_map(block.attn, queries, k, bias).mean(dim=(1, 2))
        if layer.index:
            received[:, prefix:] += memory * before.size[:, prefix:] * seen
        attended = before.x + block.attn(block.norm1(before.x), attn_mask=bias)
        weight = (received * before.size).sqrt()
        assert merge is not None
        group = group_map(merge)
        for b in range(2):
            expected = slow_regtome(attended[b, prefix:], weight[b, prefix:].tolist(), layer.plan.r)
            assert members_of(group[b], prefix) == expected
        left = layer.after.x.shape[1]
        mean = merge_by_map(attended, group, left, received)
        length = merge_by_map(attended.norm(dim=-1, keepdim=True), group, left, received)
        merged = mean / mean.norm(dim=-1, keepdim=True) * length
        torch.testing.assert_close(layer.after.x, merged + block.mlp(block.norm2(merged)), rtol=1e-4, atol=1e-5)
        per_patch = (received / before.size).unsqueeze(-1)
        seen = merge_by_map(per_patch, group, left, before.size)[:, prefix:, 0]
        torch.testing.assert_close(layer.after.carried["attention"][:, prefix:, 0], seen, rtol=1e-4, atol=1e-6)


def test_what_nobody_looks_at_goes_and_copies_go_first() -> None:
    """Eight tokens that point apart, and copies of the first one."""
    x = torch.cat((torch.zeros(1, 8), torch.eye(8), torch.eye(8)[:1].expand(3, -1)))[None]
    score = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.1, 0.1, 0.05, 0.02, 0.01, 0.06, 0.06, 0.06]])
    rule = MergeConfig("regtome", memory=0).rule
    asked = candidates(x, 4, 1, score=score, layer=1, depth=12)
    group = group_map(rule.match(asked))[0]
    assert group[1] == group[9] == group[10] == group[11]
    assert len(set(group.tolist())) == 8 and int((group == group[8]).sum()) > 1
    values = rule.token_scores(asked)
    assert set(values) == {"attention", "distance", "cost"} and all(value.shape == (1, 11) for value in values.values())
    torch.testing.assert_close(values["distance"][0, [0, 8]], torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(values["cost"][0, 7], torch.tensor(math.sqrt(0.01)))


def test_the_order_of_patches_does_not_matter() -> None:
    config = MergeConfig("regtome", (7, 3, 2))
    model = ours(config, num_registers=2)
    with torch.no_grad():
        model.pos_embed.zero_()
        x = images(2)
        rows = x.unflatten(2, (4, 8))[:, :, [2, 0, 3, 1]].flatten(2, 3)  # rows of patches change places
        torch.testing.assert_close(model(x), model(rows), rtol=1e-4, atol=1e-5)


def test_half_precision_matches_in_full_precision() -> None:
    x = torch.randn(2, 17, 24)
    score = torch.rand(2, 17) + 0.1
    rule = MergeConfig("regtome", memory=0).rule
    exact = rule.merge(candidates(x.bfloat16().float(), 9, 1, score=score))
    with torch.autocast("cpu", torch.bfloat16):
        half = rule.merge(candidates(x.bfloat16(), 9, 1, score=score, size=torch.ones(2, 17)))
    assert exact.merge is not None and half.merge is not None
    assert all(torch.equal(a, b) for a, b in zip(exact.merge, half.merge, strict=True))
    assert half.tokens.x.dtype == torch.bfloat16
    torch.testing.assert_close(half.tokens.x.float(), exact.tokens.x, rtol=0.02, atol=0.02)


def test_more_than_half_of_a_block_may_merge() -> None:
    assert ours(MergeConfig("regtome", (15, 0, 0))).plan().counts == (2, 2, 2)
    with pytest.warns(UserWarning, match="15 of 40 in block 0"):
        model = ours(MergeConfig("regtome", (40, 0, 0)))
    assert model(images()).isfinite().all()


def test_auto_is_our_rule() -> None:
    args = parse_args(["--merge", "auto", "--r", "4", "--memory", "0.2", "--dataset", "DIGITS", "--eval"])
    assert args.merge == "regtome" and args.memory == 0.2
    assert MergeConfig("auto", 4) == MergeConfig("regtome", 4)
