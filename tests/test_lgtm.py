"""LGTM, our reading of arXiv 2303.02331: local merges inside windows, then global ones, against the slow oracle.

Shapes: B batch, N tokens, P prefix tokens, n patch tokens, C channels.
"""

from typing import Any

import pytest
import torch
from slow import assert_equals_slow, slow_key_groups, slow_window
from tiny import candidates, images, ours, randomise, with_prefix

from models import MergeConfig, MergingViT, UserError, apply_merging, create_model
from models.merging import compose, group_map, match_bipartite, merge_sizes, pool_tokens
from models.methods.lgtm import first_patch, window_of

PREFIXES = (0, 1, 2, 5)
pytestmark = pytest.mark.filterwarnings("ignore:r=.* is more than")


def lgtm(**options: Any) -> MergeConfig:
    """LGTM on all blocks of a tiny model, with a global merge from the second one on."""
    return MergeConfig(**({"method": "lgtm", "dense_layers": 0, "global_layer": 1} | options))


# The slow oracle


@pytest.mark.parametrize(
    "options",
    [
        {"r": (4, 1, 1)},
        {"r": 1, "local_grid": 1},
        {"r": (2, 1, 0), "local_grid": 3},
        {"r": 0.2, "global_layer": 2},
        {"r": 1000, "global_layer": 0},
        {"r": (3, 2, 1), "bidirectional": True},
        {"r": (3, 2, 1), "pooling": "attention"},
        {"r": (3, 2, 1), "pooling": "max", "bidirectional": True},
        {"r": (3, 1, 1), "pooling": "mean", "prop_attn": False},
        {"r": 2, "min_tokens": 9},
        {"r": 2, "activate_layers": (0, 2), "global_layer": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_model_equals_the_slow_oracle(prefix: int, options: dict[str, Any]) -> None:
    assert_equals_slow(with_prefix(prefix, lgtm(**options), seed=prefix).double(), images(2).double())


@pytest.mark.parametrize("size", [(16, 48), (40, 24), (56, 40)])
@pytest.mark.parametrize("local_grid", [2, 3])
def test_uneven_and_oblong_grids_equal_the_slow_oracle(size: tuple[int, int], local_grid: int) -> None:
    config = lgtm(r=(4, 2, 2), local_grid=local_grid)
    assert_equals_slow(with_prefix(1, config, img_size=size).double(), images(2, size).double(), gradients=False)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("local_grid", [1, 2, 3, 7])
@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (3, 8)])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_matching_equals_the_slow_oracle(
    prefix: int, grid: tuple[int, int], local_grid: int, bidirectional: bool
) -> None:
    n = grid[0] * grid[1]
    keys = torch.randn(2, 1, prefix + n, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    size = torch.rand(2, prefix + n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    state = {"grid": grid, "followed": torch.arange(n).expand(2, -1)}
    config = lgtm(local_grid=local_grid, bidirectional=bidirectional)
    held = [set() if i < prefix else {i - prefix} for i in range(prefix + n)]
    for local, total in ((1, 1), (4, 4), (n // 3, n // 2), (n // 2, n // 2)):
        asked = candidates(keys[:, 0], total, prefix, size, keys=keys, local=local, **state)
        group = group_map(config.rule.match(asked))
        for b in range(2):
            weights = size[b].tolist()
            expected = slow_key_groups(keys[b, 0], held, weights, prefix, total, config, local, grid)
            members = [(group[b] == m).nonzero().flatten().tolist() for m in range(prefix + n - total)]
            assert members == [sorted(g) for g in expected]


# What it promises


def test_local_pairs_stay_in_their_window_and_every_window_gives_as_many() -> None:
    config = MergeConfig(method="lgtm", r=9, dense_layers=0, activate_layers=(0,))
    model = ours(config, img_size=112, num_registers=2)  # 14 x 14 patches, four windows of 7 x 7
    assert model.plan().local == model.plan().merges == (12, 0, 0)
    out = model(images(3, 112), trace=True)
    window = torch.tensor([slow_window(patch, (14, 14), 2) for patch in range(196)])
    for group in out.group:
        for w in range(4):
            mine = set(group[window == w].tolist())
            assert len(mine) == 49 - 3
            assert not mine & set(group[window != w].tolist())


def test_windows_follow_the_first_patch_of_a_group() -> None:
    group = torch.tensor([[2, 0, 1, 0, 2, 2], [0, 1, 2, 2, 1, 0]])
    assert first_patch(group, 3).tolist() == [[1, 2, 0], [0, 1, 2]]


@pytest.mark.parametrize(("grid", "per_side", "sizes"), [
    ((14, 14), 2, [49, 49, 49, 49]),
    ((7, 7), 2, [16, 12, 12, 9]),
    ((4, 6), 2, [6, 6, 6, 6]),
    ((5, 4), 3, [4, 2, 2, 4, 2, 2, 2, 1, 1]),
    ((2, 2), 3, [1, 1, 0, 1, 1, 0, 0, 0, 0]),
])  # fmt: skip
def test_grids_are_cut_as_evenly_as_they_go(grid: tuple[int, int], per_side: int, sizes: list[int]) -> None:
    windows = window_of(torch.arange(grid[0] * grid[1]), grid, per_side)
    assert torch.bincount(windows, minlength=per_side**2).tolist() == sizes


def test_windows_of_single_patches_are_refused() -> None:
    with pytest.raises(UserError, match=r"local_grid 4 cuts 4 x 4 patches into windows of one or none"):
        MergingViT(image_size=16, patch_size=4, dim=24, depth=3, heads=3, merge=MergeConfig("lgtm", 2, local_grid=4))


def test_what_windows_cannot_give_is_made_up() -> None:
    """Nine windows on 4 x 4 patches, where most cannot pair: still as many tokens in every image."""
    model = ours(lgtm(r=(5, 5, 0), local_grid=3), num_registers=3)
    plan = model.plan()
    assert plan.merges == (8, 4, 0)
    assert plan.local == (8, 4, 0)
    out = model(images(6), trace=True)
    assert out.counts == (4 + 8, 4 + 4, 4 + 4)
    assert torch.equal(out.size.sum(1), torch.full((6,), 20.0))
    assert all(len(set(row.tolist())) == 4 for row in out.group)


def test_plan_of_the_paper() -> None:
    """r = 8 on DeiT-S: four windows give 2 each from block 2 on, eight more merge globally from block 7 on."""
    with torch.device("meta"):
        plan = create_model("deit_small", merge=MergeConfig(method="lgtm", r=8)).plan()
    assert plan.merges == (0, 0, *[8] * 5, *[16] * 5)
    assert plan.local == (0, 0, *[8] * 10)
    assert plan.counts[-1] == 197 - 40 - 80


def test_one_window_without_a_global_merge_is_tome() -> None:
    tome = ours(MergeConfig(r=(4, 3, 2)), num_registers=1)
    local = apply_merging(tome, lgtm(r=(4, 3, 2), local_grid=1, global_layer=3))
    a, b = tome(images(3), trace=True), local(images(3), trace=True)
    assert torch.equal(a.group, b.group)
    torch.testing.assert_close(a.logits, b.logits)


def test_a_dynamic_grid_is_the_grid_of_the_image() -> None:
    """Without positions a model of dynamic size is the model of that size."""
    dynamic = ours(lgtm(r=(6, 3, 1)), dynamic_img_size=True)
    fixed = ours(lgtm(r=(6, 3, 1)), img_size=(24, 64))
    weights = dynamic.state_dict()
    fixed.load_state_dict(weights | {"pos_embed": torch.zeros_like(fixed.pos_embed)})
    dynamic.load_state_dict(weights | {"pos_embed": torch.zeros_like(dynamic.pos_embed)})
    x = images(2, (24, 64))
    a, b = dynamic(x, trace=True), fixed(x, trace=True)
    assert torch.equal(a.group, b.group)
    torch.testing.assert_close(a.logits, b.logits)


def test_registers_may_enter_late() -> None:
    model = ours(lgtm(r=(4, 2, 1)), num_registers=3, register_layer=1, class_layer=2)
    out = model(images(3), trace=True)
    assert out.counts == (12, 6 + 3, 3 + 4)
    assert torch.equal(out.size.sum(1), torch.full((3,), 20.0))
    assert torch.equal(out.size[:, :4], torch.ones(3, 4))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_two_merges_compose_into_one(prefix: int) -> None:
    x = torch.randn(3, prefix + 12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = torch.randint(1, 5, (3, prefix + 12), generator=torch.Generator().manual_seed(1)).double()
    first = match_bipartite(x[:, prefix:], 4, prefix, bidirectional=True)
    middle, middle_size = pool_tokens(x, first, size), merge_sizes(size, first)
    second = match_bipartite(middle[:, prefix:], 3, prefix)
    both = compose(first, second)
    assert torch.equal(group_map(both), group_map(second).gather(1, group_map(first)))
    torch.testing.assert_close(pool_tokens(x, both, size), pool_tokens(middle, second, middle_size))
    assert torch.equal(merge_sizes(size, both), merge_sizes(middle_size, second))


# The model


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model = ours(lgtm(r=(5, 1, 1), local_grid=3), num_registers=1)
    x = images(4, seed=3)
    with torch.no_grad():
        out = model(x, trace=True)
        singles = [model(image[None], trace=True) for image in x]
        plain = model(x)
    assert torch.equal(out.group, torch.cat([single.group for single in singles]))
    torch.testing.assert_close(out.logits, torch.cat([single.logits for single in singles]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logits, plain, rtol=0, atol=2e-6)  # whose last block serves the class token


def test_checkpointing_and_determinism_change_nothing() -> None:
    model = ours(lgtm(r=(5, 1, 1)), num_registers=2).train()
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


def test_compiled_model_is_one_graph_and_equals_eager() -> None:
    torch._dynamo.reset()
    merge = MergeConfig(method="lgtm", r=6, dense_layers=1, global_layer=2)
    model = randomise(create_model("deit_digits", num_registers=2, merge=merge, depth=3)).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(2)), model(images(2)), rtol=1e-5, atol=1e-5)
