"""The view of the instruments is the forward itself: same tokens, same groups, same attention."""

import itertools
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from analysis.walk import allow_any_size, attention, final, patch_grid, qkv, to_grid, walk
from models import MergeConfig, MergingViT, UserError, apply_merging
from models.blocks import join_heads, project_out

TOY: dict[str, Any] = dict(image_size=32, patch_size=4, num_classes=5, dim=24, depth=4, heads=3, mlp_dim=48)
CASES = {
    "plain": dict(num_registers=0),
    "registers": dict(num_registers=4, r=5),
    "late": dict(num_registers=3, register_layer=2, class_layer=1, r=4),
    "distilled": dict(num_registers=2, distilled=True, r=6),
    "mctf": dict(num_registers=1, merge=MergeConfig(method="mctf", r=7)),
    "mctf off": dict(num_registers=1, merge=MergeConfig(method="mctf", r=7, one_step_ahead="off")),
    "mctf precise": dict(num_registers=1, merge=MergeConfig(method="mctf", r=7, one_step_ahead="precise")),
    "lgtm": dict(num_registers=2, merge=MergeConfig(method="lgtm", r=4, dense_layers=1, global_layer=2)),
    "no prefix": dict(num_registers=0, r=5, class_token=False, global_pool="avg"),
}


def make(name: str) -> tuple[MergingViT, torch.Tensor]:
    torch.manual_seed(0)
    model = MergingViT(**TOY, **CASES[name]).eval()
    for parameter in model.parameters():  # fresh weights are so small that nothing would depend on attention
        torch.nn.init.normal_(parameter, std=0.2)
    return model, torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", CASES)
def test_a_walk_ends_where_the_forward_does(name: str) -> None:
    model, images = make(name)
    layers = list(walk(model, images))
    with torch.no_grad():
        out = model(images, trace=True)
    assert torch.equal(final(model, layers[-1]), out.tokens)
    assert torch.equal(layers[-1].after.size, out.size)
    assert [layer.after.x.shape[1] for layer in layers] == list(out.counts)
    for layer, group in zip(layers, out.groups, strict=True):
        assert torch.equal(layer.after.group, group)
        assert len(layer.token_types) == layer.num_prefix_tokens
        assert layer.before.x.shape[1] - layer.num_prefix_tokens == int(layer.before.group.max()) + 1
    for before, after in itertools.pairwise(layers):
        assert torch.equal(before.after.group, after.before.group)
        assert torch.equal(before.after.x[:, before.num_prefix_tokens :], after.before.x[:, after.num_prefix_tokens :])


@pytest.mark.parametrize("name", ["registers", "late", "mctf off"])
def test_the_map_is_the_one_the_block_attends_with(name: str) -> None:
    model, images = make(name)
    for layer in walk(model, images):
        block, maps = layer.block, attention(layer)
        torch.testing.assert_close(maps.sum(dim=-1), torch.ones(maps.shape[:3]))
        normed = block.norm1(layer.before.x)
        fused = project_out(block.attn, normed, join_heads(maps @ qkv(layer)[2]))
        if layer.merge is None:
            x = layer.before.x + fused
            torch.testing.assert_close(x + block.mlp(block.norm2(x)), layer.after.x, atol=1e-4, rtol=1e-4)
        if (layer.before.size > 1).any():
            assert layer.attention_inputs["attn_mask"].max() > 0  # it counts merged tokens by their size
        plain = block.attn(normed, **layer.attention_inputs)
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)


def test_a_walk_leaves_gradients_and_schedule_alone() -> None:
    model, images = make("registers")
    for layer in walk(model, images, r=0):
        assert torch.is_grad_enabled() and not layer.after.x.requires_grad
        assert layer.after.x.shape[1] == 64 + 5
    assert list(walk(model, images))[-1].after.x.shape[1] == 64 + 5 - 4 * 5


def test_values_go_back_to_their_patches() -> None:
    group = torch.tensor([[0, 1, 1, 2, 0, 2], [0, 0, 0, 0, 0, 1]])
    values = torch.tensor([[[1.0, 10], [2, 20], [3, 30]], [[4, 40], [5, 50], [6, 60]]])
    grid = to_grid(values, group, (2, 3))
    assert grid.shape == (2, 2, 3, 2)
    assert grid[0, :, :, 0].tolist() == [[1, 2, 2], [3, 1, 3]]
    assert grid[1, :, :, 1].tolist() == [[40, 40, 40], [40, 40, 50]]
    assert to_grid(values[..., 0], torch.zeros(2, 4, dtype=torch.long)).shape == (2, 2, 2)
    with pytest.raises(UserError, match="name the grid"):
        to_grid(values, group)


def test_names_of_prefix_tokens() -> None:
    model = make("late")[0]
    assert model.token_types() == ("class", "register 1", "register 2", "register 3")
    assert [len(model.token_types(layer)) for layer in range(4)] == [0, 1, 4, 4]
    assert make("distilled")[0].token_types()[:3] == ("class", "distillation", "register 1")
    assert make("no prefix")[0].token_types() == ()


def test_any_size_is_timms_dynamic_size_and_changes_nothing_at_the_own_size() -> None:
    torch.manual_seed(0)
    vit = dict(img_size=32, patch_size=4, num_classes=5, embed_dim=24, depth=2, num_heads=3)
    fixed, dynamic = VisionTransformer(**vit), VisionTransformer(**vit, dynamic_img_size=True, dynamic_img_pad=True)
    dynamic.load_state_dict(fixed.state_dict())
    model = apply_merging(fixed, MergeConfig(method="none")).eval()
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    allow_any_size(model)
    assert torch.equal(model(images), before)
    odd = torch.randn(1, 3, 41, 30)  # padded to 44 x 32
    assert patch_grid(model, odd) == (11, 8)
    torch.testing.assert_close(model(odd), dynamic.eval()(odd))
    assert next(iter(walk(model, odd))).grid == (11, 8)
    fixed.eval()(images)
    with pytest.raises(AssertionError):
        fixed(odd)  # the model it was made from stays as it was
