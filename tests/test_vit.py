"""The model: equal to timm where nothing merges, registers, late tokens, pooling, trace, sharing, constructor."""

import copy
import io
import itertools
import pickle
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import PATCHES, SIZES, block_inputs, every_method, identity_blocks, images, ours, randomise, timm_vit
from torch import Tensor, nn

from models import MergeConfig, MergingViT, UserError, apply_merging, create_model, merge_by_map, unmerge
from models.registry import native_model

NONE = MergeConfig(method="none")

# timm's logits. Two blocks of every family keep its own forms: LayerScale, norms, prefix, positions, pooling.
FAMILIES: dict[str, dict[str, Any]] = {
    "deit_digits": {},
    "deit_tiny": {"img_size": 48},
    "deit_tiny_distilled": {"img_size": 48},
    "deit3_small": {"img_size": 48},
    "deit3_medium": {"img_size": 48},
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": {"img_size": 48},
    "vit_tiny_patch16_384": {"img_size": 48},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "num_classes": 10},
    "vit_small_patch14_dinov2": {"img_size": 56, "num_classes": 10},
    "vit_wee_patch16_reg1_gap_256": {"img_size": 64},
    "vit_little_patch16_reg4_gap_256": {"img_size": 64},
    "vit_medium_patch16_reg4_gap_256": {"img_size": 64},
    "vit_medium_patch16_gap_240": {"img_size": 64},
    "vit_so150m_patch16_reg4_map_256": {"img_size": 64},
    "vit_base_patch16_siglip_224": {"img_size": 48, "num_classes": 10},
    "vit_base_patch32_clip_224": {"img_size": 64},
    "vit_tiny_r_s16_p8_224": {"img_size": 64},
    "test_vit": {"img_size": 64},
    "test_vit2": {"img_size": 64},
    "test_vit3": {"img_size": 64},
    "test_vit4": {"img_size": 64},
}


def family(name: str) -> Any:
    return randomise(native_model(name, **({"depth": 2} | FAMILIES[name]))).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_without_merging_logits_and_tokens_are_timms(name: str) -> None:
    vit = family(name)
    x = images(2, FAMILIES[name].get("img_size", 32))
    model = apply_merging(vit, MergeConfig(r=0))
    assert set(model.state_dict()) == set(vit.state_dict())
    assert model.num_prefix_tokens == vit.num_prefix_tokens
    with torch.no_grad():
        out = model(x, trace=True)
        torch.testing.assert_close(out.logits, vit(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.tokens, vit.forward_features(x), rtol=1e-5, atol=1e-5)
    assert out.logits.abs().max() > 0.05  # a model that says nothing would agree with anything


@pytest.mark.parametrize("name", ["deit_tiny_distilled", "deit3_small", "vit_wee_patch16_reg1_gap_256", "test_vit3"])
def test_families_merge_with_registers(name: str) -> None:
    vit = family(name)
    size = FAMILIES[name]["img_size"]
    model = randomise(apply_merging(vit, MergeConfig(r=2), num_registers=3)).eval()
    out = model(images(2, size), trace=True)
    patches = model.patch_embed.num_patches
    assert out.counts == tuple(model.num_prefix_tokens + patches - 2 * k for k in range(1, len(out.counts) + 1))
    assert out.tokens.shape[1] == out.counts[-1]
    assert torch.isfinite(out.logits).all()
    assert not torch.allclose(out.logits, model(images(2, size), r=0), atol=1e-4)


POOLS: list[dict[str, Any]] = [
    {"global_pool": "avg", "class_token": False},
    {"global_pool": "avg"},
    {"global_pool": "avg", "fc_norm": False},
    {"global_pool": "token", "fc_norm": True},
    {"global_pool": "avg", "pool_include_prefix": True},
    {"global_pool": ""},
    {"global_pool": "max"},
    {"global_pool": "avgmax"},
    {"global_pool": "map"},
    {"global_pool": "map", "class_token": False},
    {"reg_tokens": 3},
    {"reg_tokens": 3, "no_embed_class": True},
    {"pos_embed": "none"},
    {"pre_norm": True},
    {"final_norm": False},
    {"qkv_bias": False, "proj_bias": False},
    {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    {"init_values": 0.1},
    {"num_classes": 0},
    {"in_chans": 3, "img_size": (24, 40)},
]


@pytest.mark.parametrize("options", POOLS, ids=str)
def test_without_merging_every_form_of_timm_agrees(options: dict[str, Any]) -> None:
    vit = timm_vit(**options)
    x = images(2, options.get("img_size", 32))
    torch.testing.assert_close(apply_merging(vit, NONE)(x), vit(x), rtol=1e-5, atol=1e-5)


def test_without_classes_a_distilled_model_gives_features() -> None:
    vit = timm_vit(distilled=True, num_classes=0)
    torch.testing.assert_close(apply_merging(vit, NONE)(images()), vit(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"drop_path_rate": 0.5}, {"proj_drop_rate": 0.3}, {"attn_drop_rate": 0.3}, {"drop_rate": 0.5}],
    ids=str,
)
def test_training_mode_drops_what_timm_drops(options: dict[str, Any]) -> None:
    vit = timm_vit(**options).train()
    model = apply_merging(vit, NONE)
    torch.manual_seed(5)
    theirs = vit(images(8))
    torch.manual_seed(5)
    mine = model(images(8))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mine, model.eval()(images(8)), atol=1e-3)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("size", [16, 48, (24, 40)], ids=str)
def test_dynamic_image_size(size: Any, distilled: bool) -> None:
    vit = timm_vit(distilled=distilled, dynamic_img_size=True)
    x = images(2, size)
    torch.testing.assert_close(apply_merging(vit, NONE)(x), vit(x), rtol=1e-5, atol=1e-5)
    model = randomise(apply_merging(vit, MergeConfig(r=1), num_registers=2)).eval()
    out = model(x, trace=True)
    patches = x.shape[-1] * x.shape[-2] // 64
    assert out.group.shape == (2, patches)
    assert out.counts[-1] == patches + model.num_prefix_tokens - 3


def test_dynamic_image_pad() -> None:
    vit = timm_vit(dynamic_img_size=True, dynamic_img_pad=True)
    x = images(2, (29, 37))
    torch.testing.assert_close(apply_merging(vit, NONE)(x), vit(x), rtol=1e-5, atol=1e-5)


# Parameters


def test_parameter_counts_of_regs_small_vits() -> None:
    counts = {r: sum(p.numel() for p in create_model("deit3_small", num_registers=r).parameters()) for r in (0, 4)}
    assert counts == {0: 22_059_496, 4: 22_061_032}


def test_deit_digits_is_the_toy_of_the_table() -> None:
    model = create_model("deit_digits")
    assert (model.patch_embed.num_patches, model.embed_dim, len(model.blocks)) == (64, 96, 6)
    assert model.blocks[0].attn.num_heads == 3
    assert model(images()).shape == (2, 10)


@pytest.mark.parametrize("distilled", [False, True])
def test_fresh_registers(distilled: bool) -> None:
    torch.manual_seed(0)
    vit = timm_vit(distilled=distilled, embed_dim=192)
    model = apply_merging(vit, NONE, num_registers=8)
    registers = model.reg_token
    assert isinstance(registers, nn.Parameter)
    assert registers.requires_grad
    assert registers.shape == (1, 8, 192)
    assert 0.018 < registers.std() < 0.022
    assert registers.abs().max() < 2.01
    assert torch.pdist(registers[0]).min() > 0.1
    assert model.num_registers == 8
    assert model.num_prefix_tokens == 9 + distilled
    assert "reg_token" in model.no_weight_decay()
    assert {"cls_token", "pos_embed"} <= model.no_weight_decay()


@pytest.mark.parametrize("distilled", [False, True])
def test_registers_have_no_position_entry(distilled: bool) -> None:
    model = ours(num_registers=4, distilled=distilled)
    assert model.pos_embed.shape[1] == PATCHES + 1 + distilled
    assert model.num_pos_prefix == 1 + distilled
    first = block_inputs(model, images())[0]
    assert torch.equal(first[:, 1 + distilled : 5 + distilled], model.reg_token.expand(2, -1, -1))
    assert torch.equal(first[:, 0], (model.cls_token + model.pos_embed[:, :1])[0].expand(2, -1))
    if distilled:
        assert torch.equal(first[:, 1], (model.dist_token + model.pos_embed[:, 1:2])[0].expand(2, -1))


def test_registers_of_create_model_have_no_position_entry() -> None:
    model = create_model("deit_tiny_distilled", num_registers=2, img_size=48, depth=1)
    assert model.pos_embed.shape[1] == 9 + 2
    assert set(model.state_dict()) - set(native_model("deit_tiny_distilled", depth=1).state_dict()) == {"reg_token"}


@pytest.mark.parametrize("merge", [NONE, MergeConfig(r=4)], ids=["none", "tome"])
def test_logits_and_gradient_depend_on_every_register(merge: MergeConfig) -> None:
    model = ours(merge, num_registers=3)
    before = model(images())
    before.square().sum().backward()
    assert (model.reg_token.grad.abs().sum(-1) > 0).all()
    for i in range(3):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.reg_token[:, i].neg_()  # not a shift, which the norm would take away
        assert not torch.allclose(changed(images()), before, atol=1e-4)


def test_registers_are_kept_cut_and_appended() -> None:
    vit = timm_vit(reg_tokens=3, no_embed_class=True)
    for count in (None, 0, 1, 3, 5):
        model = apply_merging(vit, NONE, num_registers=count)
        kept = 3 if count is None else min(3, count)
        assert model.num_registers == (3 if count is None else count)
        if kept:
            assert torch.equal(model.reg_token[:, :kept], vit.reg_token[:, :kept])
        assert model(images()).shape == (2, 10)
    assert apply_merging(vit, NONE, num_registers=0).reg_token is None


def test_registers_with_position_entries_keep_theirs_and_new_ones_get_none() -> None:
    """timm's so150m form: position entries for the class token and its own registers."""
    vit = timm_vit(reg_tokens=2)
    assert vit.pos_embed.shape[1] == PATCHES + 3
    for count in (0, 1, 2, 4):
        model = randomise(apply_merging(vit, NONE, num_registers=count)).eval()
        patches = model.pos_embed[:, -PATCHES:]
        assert model.num_pos_prefix == 1 + min(2, count)
        first = block_inputs(model, images())[0]
        assert torch.equal(first[:, 1 + count :], model.patch_embed(images()) + patches)
        for i in range(count):
            position = model.pos_embed[:, 1 + i] if i < 2 else 0
            assert torch.equal(first[:, 1 + i], (model.reg_token[:, i] + position).expand(2, -1))


@pytest.mark.parametrize("count", [-1, 1.0, True, "4"])
def test_bad_number_of_registers(count: Any) -> None:
    with pytest.raises(UserError, match="num_registers"):
        apply_merging(timm_vit(), NONE, num_registers=count)


# Sharing with the timm model


def snapshot(vit: nn.Module) -> dict[str, Any]:
    """All that apply_merging might touch, by value or identity."""
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    attributes = {name: sorted(module.__dict__) for name, module in vit.named_modules()}
    hooks = {name: list(module._forward_hooks) for name, module in vit.named_modules()}
    identities = {name: id(module) for name, module in vit.named_modules()}
    parameters = {name: id(parameter) for name, parameter in vit.named_parameters()}
    training = {name: module.training for name, module in vit.named_modules()}
    classes = {name: type(module) for name, module in vit.named_modules()}
    plain = (attributes, hooks, identities, parameters, training, classes)
    return {"state": state, "plain": plain}


@pytest.mark.parametrize("distilled", [False, True])
def test_the_timm_model_stays_as_it_is(distilled: bool) -> None:
    vit = timm_vit(distilled=distilled).train()
    seen: list[int] = []
    hook = vit.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    logits, before = vit(images()), snapshot(vit)
    model = apply_merging(vit, MergeConfig(r=4), num_registers=4, register_layer=1)
    model.eval()
    model(images())
    model.set_grad_checkpointing(True)
    model.set_input_size(48)
    after = snapshot(vit)
    assert after["plain"] == before["plain"]
    for name, tensor in before["state"].items():
        assert torch.equal(after["state"][name], tensor), name
    assert vit.training
    assert not vit.grad_checkpointing
    assert torch.equal(vit(images()), logits)
    assert len(seen) == 2
    hook.remove()


def test_parameters_are_shared() -> None:
    vit = timm_vit()
    model = apply_merging(vit, MergeConfig(r=4), num_registers=4)
    mine = dict(model.named_parameters())
    for name, parameter in vit.named_parameters():
        assert mine[name] is parameter, name
    assert set(mine) - set(dict(vit.named_parameters())) == {"reg_token"}
    before = model(images())
    with torch.no_grad():
        vit.blocks[2].mlp.fc1.weight.mul_(2)
        vit.cls_token.add_(1)
    assert not torch.allclose(model(images()), before, atol=1e-3)
    model(images()).sum().backward()
    assert vit.head.weight.grad is not None


def test_training_the_merging_model_trains_the_timm_model() -> None:
    vit = timm_vit()
    model = apply_merging(vit, MergeConfig(r=4))
    before = vit(images())
    model(images()).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.allclose(vit(images()), before, atol=1e-3)
    torch.testing.assert_close(model(images(), r=0), vit(images()), rtol=1e-5, atol=1e-5)


def test_a_merging_model_can_be_given_another_merge() -> None:
    first = ours(MergeConfig(r=4), num_registers=2, register_layer=1)
    second = apply_merging(first, MergeConfig(r=2))
    assert (second.num_registers, second.register_layer) == (2, 1)
    assert second.reg_token is first.reg_token
    assert torch.equal(second(images()), first(images(), r=2))
    assert first.merge == MergeConfig(r=4)
    third = apply_merging(first, MergeConfig(r=2), num_registers=5)
    assert (first.num_registers, third.num_registers) == (2, 5)
    assert first(images(), trace=True).counts[-1] == 3 + PATCHES - 12


# Late registers and class token

LATE = [pair for pair in itertools.product((0, 1, 2), (0, 1, 2)) if pair != (0, 0)]


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(("register_layer", "class_layer"), LATE)
def test_late_tokens_counts_sizes_and_provenance(register_layer: int, class_layer: int, distilled: bool) -> None:
    classes = 1 + distilled
    config = MergeConfig(r="3,2,2")
    model = ours(config, 4, register_layer, class_layer, distilled)
    out = model(images(3), trace=True)
    patches = (13, 11, 9)
    present = [classes * (layer >= class_layer) + 4 * (layer >= register_layer) for layer in range(3)]
    assert out.counts == tuple(n + p for n, p in zip(patches, present, strict=True))
    assert model.prefixes() == tuple(present)
    assert torch.equal(out.size[:, : classes + 4], torch.ones(3, classes + 4))
    assert_groups(out, PATCHES, patches)


def assert_groups(out: Any, n: int, patches: tuple[int, ...]) -> None:
    """Maps of all blocks are onto [0, patches left), refine one another, and their counts are the sizes."""
    batch = len(out.group)
    before = torch.arange(n).expand(batch, -1)
    for group, left in zip(out.groups, patches, strict=True):
        assert group.shape == (batch, n)
        for b in range(batch):
            assert set(group[b].tolist()) == set(range(left))
            pairs = set(zip(before[b].tolist(), group[b].tolist(), strict=True))
            assert len(pairs) == len(set(before[b].tolist()))  # who was together stays together
        before = group
    assert torch.equal(out.groups[-1], out.group)
    counts = torch.stack([torch.bincount(row, minlength=patches[-1]) for row in out.group])
    assert torch.equal(counts.float(), out.size[:, -patches[-1] :])


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(("register_layer", "class_layer"), [(0, 0), *LATE])
def test_late_tokens_enter_in_the_order_of_the_prefix(register_layer: int, class_layer: int, distilled: bool) -> None:
    model = identity_blocks(ours(None, 2, register_layer, class_layer, distilled))
    tokens = model(images(), trace=True).tokens
    classes = [model.cls_token, model.dist_token] if distilled else [model.cls_token]
    prefix = torch.cat(classes, dim=1) + model.pos_embed[:, : len(classes)]
    patches = model.patch_embed(images()) + model.pos_embed[:, len(classes) :]
    expected = torch.cat((prefix.expand(2, -1, -1), model.reg_token.expand(2, -1, -1), patches), dim=1)
    torch.testing.assert_close(tokens, expected)


def test_late_tokens_are_not_in_the_blocks_before() -> None:
    seen = block_inputs(ours(None, 4, register_layer=2, class_layer=1), images())
    assert [x.shape[1] for x in seen] == [16, 17, 21]


def test_patches_before_the_late_tokens_do_not_depend_on_them() -> None:
    model = ours(MergeConfig(r=2), 4, register_layer=2, class_layer=2)
    before = block_inputs(model, images())
    with torch.no_grad():
        model.reg_token.neg_()
        model.cls_token.neg_()
    after = block_inputs(model, images())
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2][:, 5:], after[2][:, 5:])
    assert not torch.equal(before[2][:, :5], after[2][:, :5])


def test_the_same_layer_late_or_not_is_the_same_at_zero() -> None:
    assert torch.equal(ours(None, 2, 0, 0)(images()), ours(None, 2)(images()))
    assert not torch.allclose(ours(None, 2, 1, 0)(images()), ours(None, 2)(images()), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"register_layer": 3, "num_registers": 2}, "register_layer is 3, but the model has blocks 0..2"),
        ({"register_layer": -1, "num_registers": 2}, "register_layer"),
        ({"class_layer": 3}, "class_layer is 3"),
        ({"register_layer": 1}, "no registers"),
        ({"register_layer": 1, "num_registers": 0}, "no registers"),
        ({"class_layer": 1, "class_token": False, "global_pool": "avg"}, "no class token"),
    ],
    ids=str,
)
def test_late_layers_out_of_range_or_without_effect(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        ours(**options)


def test_merge_layers_out_of_range() -> None:
    with pytest.raises(UserError, match="block 3, but the model has blocks 0..2"):
        ours(MergeConfig(r=1, activate_layers=[3]))
    with pytest.raises(UserError, match="lists 4 blocks, but the model has 3"):
        ours(MergeConfig(r=[1, 1, 1, 1]))
    with pytest.raises(UserError, match="lists 4 blocks, but the model has 3"):
        ours(MergeConfig(r=1))(images(), r=[1, 1, 1, 1])


# Pooling


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_average_pooling_counts_patches_not_tokens(class_token: bool, include: bool) -> None:
    options: dict[str, Any] = {"global_pool": "avg", "class_token": class_token, "pool_include_prefix": include}
    model = ours(MergeConfig(r="6,3,2"), 2, **options)
    out = model(images(3), trace=True)
    start = 0 if include else model.num_prefix_tokens
    rows = [
        sum(out.size[b, i] * out.tokens[b, i] for i in range(start, out.tokens.shape[1])) / out.size[b, start:].sum()
        for b in range(3)
    ]
    torch.testing.assert_close(out.logits, model.head(model.fc_norm(torch.stack(rows))), rtol=1e-5, atol=1e-5)
    plain = model.head(model.fc_norm(out.tokens[:, start:].mean(1)))
    assert not torch.allclose(out.logits, plain, atol=1e-3)
    if not include:
        dense = unmerge(out.tokens[:, start:], out.group)
        torch.testing.assert_close(out.logits, model.head(model.fc_norm(dense.mean(1))), rtol=1e-5, atol=1e-5)


def test_map_pooling_weighs_by_size() -> None:
    """Attention pooling over tokens of size s is attention pooling over each of them s times."""
    model = ours(MergeConfig(r="6,3,2"), 2, global_pool="map")
    out = model(images(3), trace=True)
    dense = unmerge(out.tokens[:, model.num_prefix_tokens :], out.group)
    expected = model.head(model.fc_norm(model.attn_pool(dense)))
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)


def test_registers_are_not_pooled() -> None:
    model = identity_blocks(ours(None, 4, global_pool="avg"))
    before = model(images())
    with torch.no_grad():
        model.reg_token.mul_(3)
        model.cls_token.mul_(3)
    assert torch.equal(model(images()), before)


# What the model returns


@pytest.mark.parametrize("distilled", [False, True])
def test_trace(distilled: bool) -> None:
    model = ours(MergeConfig(r="5,0,3"), num_registers=3, distilled=distilled)
    prefix = 4 + distilled
    out = model(images(3), trace=True)
    assert model.num_prefix_tokens == prefix
    assert out.counts == (prefix + 11, prefix + 11, prefix + 8)
    assert out.tokens.shape == (3, prefix + 8, 24)
    assert out.size.shape == (3, prefix + 8)
    assert out.logits.shape == out.logits_class.shape == (3, 10)
    assert out.group.dtype == torch.long
    assert len(out.groups) == 3
    assert torch.equal(out.groups[0], out.groups[1])
    assert_groups(out, PATCHES, (11, 11, 8))
    torch.testing.assert_close(out.logits, model(images(3)), rtol=0, atol=1e-6)
    assert torch.equal(model.forward_features(images(3)), out.tokens)


def test_heads_of_a_distilled_model() -> None:
    model = ours(MergeConfig(r=4), num_registers=2, distilled=True)
    for training in (False, True):
        out = model.train(training)(images(), trace=True)
        torch.testing.assert_close(out.logits_class, model.head(out.tokens[:, 0]))
        torch.testing.assert_close(out.logits_dist, model.head_dist(out.tokens[:, 1]))
        torch.testing.assert_close(out.logits, (out.logits_class + out.logits_dist) / 2)
    assert ours()(images(), trace=True).logits_dist is None


def test_group_of_identity_blocks_is_where_the_patches_went() -> None:
    """With blocks that write nothing a token is the mean of its patches."""
    model = identity_blocks(ours(MergeConfig(r="5,3,2"), num_registers=2))
    out = model(images(), trace=True)
    patches = model.patch_embed(images()) + model.pos_embed[:, 1:]
    torch.testing.assert_close(out.tokens[:, 3:], merge_by_map(patches, out.group, 6), rtol=1e-5, atol=1e-5)


def test_without_merging_the_map_is_the_identity() -> None:
    out = ours(num_registers=2)(images(), trace=True)
    assert out.counts == (19, 19, 19)
    assert all(torch.equal(group, torch.arange(16).expand(2, -1)) for group in out.groups)
    assert torch.equal(out.size, torch.ones(2, 19))


@pytest.mark.parametrize("r", [0, 3, 0.2, "2", [4, 1], "4,0,2", "(2,-1)", (2, -1.0)], ids=str)
def test_schedule_as_an_argument_equals_the_configured_one(r: Any) -> None:
    model = ours(MergeConfig(r=5, activate_layers=[0, 2]), num_registers=1)
    configured = ours(MergeConfig(r=r, activate_layers=[0, 2]), num_registers=1)
    assert torch.equal(model(images(), r=r), configured(images()))
    assert model.merge.r == 5


def test_bad_schedule_as_an_argument() -> None:
    with pytest.raises(UserError, match="cannot read r='x'"):
        ours(MergeConfig(r=1))(images(), r="x")


def test_clamped_schedule_warns_where_it_is_given_and_never_in_a_forward() -> None:
    with pytest.warns(UserWarning, match=r"r=9 .*\[9, 5, 3\]"):
        ours(MergeConfig(r=9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ours(MergeConfig(r=[8, 4, 2]))
        model.r = 7
        model(images(), r=[9, 9, 9])
    for change in (lambda: setattr(model, "r", (9, 1)), lambda: create_model("deit_digits", merge=MergeConfig(r=40))):
        with pytest.warns(UserWarning, match="block 0") as caught:
            change()
        assert [warning.filename for warning in caught] == [__file__]


# Training aids


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_checkpointing_gives_the_same_gradients(drop_path: float) -> None:
    def gradients(checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = ours(MergeConfig(r="5,3,2"), 2, register_layer=1, drop_path_rate=drop_path).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        loss = model(images(4)).square().sum()
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    loss, plain = gradients(False)
    loss_again, checkpointed = gradients(True)
    assert torch.equal(loss, loss_again)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


def test_checkpointing_saves_activations() -> None:
    def saved(checkpointing: bool) -> int:
        model = ours(MergeConfig(r=2)).train()
        model.set_grad_checkpointing(checkpointing)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(images(4))
        return sum(sizes)

    assert saved(True) < 0.5 * saved(False)


# Changing a model


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"no_embed_class": True}, {"distilled": True}], ids=str)
def test_input_size_resamples_patches_and_keeps_prefix_entries(options: dict[str, Any]) -> None:
    vit, model = timm_vit(**options), apply_merging(timm_vit(**options), MergeConfig(r=2))
    prefix = model.num_pos_prefix
    old = model.pos_embed.detach().clone()
    vit.set_input_size((48, 24))
    model.set_input_size((48, 24))
    assert torch.equal(model.pos_embed[:, :prefix], old[:, :prefix])
    assert model.pos_embed.shape[1] == prefix + 18
    torch.testing.assert_close(model(images(2, (48, 24)), r=0), vit(images(2, (48, 24))), rtol=1e-5, atol=1e-5)


def test_input_size_with_added_registers() -> None:
    model = ours(MergeConfig(r=2), num_registers=3)
    registers = model.reg_token.detach().clone()
    model.set_input_size(48)
    assert model.num_pos_prefix == 1
    assert torch.equal(model.reg_token, registers)
    assert model(images(2, 48), trace=True).counts[-1] == 4 + 36 - 6


@pytest.mark.parametrize("distilled", [False, True])
def test_classifier_can_be_replaced(distilled: bool) -> None:
    model = ours(MergeConfig(r=2), num_registers=2, distilled=distilled)
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7)


def test_state_dict_round_trip() -> None:
    source = ours(MergeConfig(r=4), num_registers=2, distilled=True, seed=1)
    target = ours(MergeConfig(r=4), num_registers=2, distilled=True, seed=2)
    assert not torch.allclose(source(images()), target(images()), atol=1e-3)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(source(images()), target(images()))


def test_timm_weights_load_strictly_both_ways() -> None:
    vit = timm_vit(seed=1, reg_tokens=2, no_embed_class=True)
    model = ours(None, 2, seed=2, no_embed_class=True)
    model.load_state_dict(vit.state_dict())
    torch.testing.assert_close(model(images()), vit(images()), rtol=1e-5, atol=1e-5)
    vit.load_state_dict(ours(None, 2, seed=3, no_embed_class=True).state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(copied: Any) -> None:
    model = ours(MergeConfig(r="4,2"), 2, register_layer=1, distilled=True)
    twin = copied(model)
    assert torch.equal(twin(images()), model(images()))
    assert twin.merge == model.merge
    before = model(images())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(images()), before)


# The stand-alone constructor

SMALL: dict[str, Any] = dict(image_size=32, patch_size=8, num_classes=10, dim=24, depth=3, heads=3, mlp_dim=96)


def test_constructor() -> None:
    model = MergingViT(**SMALL, r="(3,-1)", register_layer=1, class_layer=2).eval()
    assert isinstance(model, VisionTransformer)
    assert model.num_registers == 4
    assert model.merge == MergeConfig(r="(3,-1)")
    assert model.num_pos_prefix == 1
    out = model(images(), trace=True)
    assert out.counts == (10, 11, 12)
    assert MergingViT(**SMALL).eval()(images(), trace=True).counts == (21, 21, 21)


def test_constructor_equals_apply_merging() -> None:
    built = randomise(MergingViT(**SMALL, num_registers=2, r=3)).eval()
    applied = randomise(apply_merging(timm_vit(), MergeConfig(r=3), num_registers=2)).eval()
    applied.load_state_dict(built.state_dict())
    assert torch.equal(built(images()), applied(images()))


def test_constructor_passes_the_rest_on_to_timm() -> None:
    options: dict[str, Any] = {"init_values": 0.1, "no_embed_class": True, "drop_path_rate": 0.2}
    model = MergingViT(**SMALL, num_registers=0, **options)
    assert torch.equal(model.blocks[0].ls1.gamma, torch.full((24,), 0.1))
    assert model.num_pos_prefix == 0
    assert model.blocks[2].drop_path1.drop_prob == pytest.approx(0.2)


def test_constructor_distilled() -> None:
    model = randomise(MergingViT(**SMALL, num_registers=2, distilled=True)).eval()
    assert model.num_prefix_tokens == 4
    assert model.head_dist is not None
    assert MergingViT(**SMALL).head_dist is None


@pytest.mark.parametrize(("dim", "mlp_dim"), [(100, 29), (100, 57), (22, 15), (24, 1), (24, 73), (96, 384)])
def test_hidden_width_is_exact(dim: int, mlp_dim: int) -> None:
    """timm is told a ratio, and int(100 * (29 / 100)) is 28."""
    model = MergingViT(**(SMALL | {"dim": dim, "heads": 2, "depth": 1, "mlp_dim": mlp_dim}))
    assert model.blocks[0].mlp.fc1.out_features == mlp_dim


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"heads": 5}, "dim 24 does not divide into 5 heads"),
        ({"register_layer": 3}, "register_layer is 3"),
        ({"class_layer": -1}, "class_layer is -1"),
        ({"num_registers": 0, "register_layer": 1}, "no registers"),
        ({"num_registers": -2}, "num_registers"),
        ({"r": 4, "merge": MergeConfig(r=4)}, "either r or merge"),
        ({"r": "x"}, "cannot read r='x'"),
        ({"r": [1, 1, 1, 1]}, "lists 4 blocks"),
        ({"patch_drop_rate": 0.5}, "drops patches"),
        ({"global_pool": "prr"}, "pools by 'prr'"),
        ({"image_size": 100}, "image_size 100 is not a multiple of the patches of 8 pixels"),
        ({"image_size": (32, 30)}, r"image_size \(32, 30\) is not a multiple"),
        ({"patch_size": 0}, "patch_size must be a number of pixels > 0"),
        ({"image_size": 32.0}, "image_size must be a number of pixels > 0"),
        ({"num_register": 2}, "MergingViT has no keyword num_register; did you mean num_registers"),
        ({"drop_path": 0.1}, "MergingViT has no keyword drop_path; did you mean drop_path_rate"),
        ({"embed_dim": 24}, "MergingViT has no embed_dim; write dim"),
        ({"attn_layer": "diff"}, "DiffAttention"),
    ],
    ids=str,
)
def test_constructor_refuses(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        MergingViT(**(SMALL | options))
    assert "\n" not in str(caught.value)


def test_default_constructor_signature_is_a_vit_base() -> None:
    with torch.device("meta"):
        model = MergingViT()
    assert (model.embed_dim, len(model.blocks), model.num_registers, model.num_classes) == (768, 12, 4, 1000)
    assert model.blocks[0].mlp.fc1.out_features == 3072
    assert sum(p.numel() for p in model.parameters()) == 86_567_656 + 4 * 768


# What cannot be served


class Subclass(VisionTransformer):
    pass


@pytest.mark.parametrize(
    ("vit", "named"),
    [
        (lambda: Subclass(**SIZES), "Subclass"),
        (lambda: timm_vit(patch_drop_rate=0.3), "patch_drop_rate"),
        (lambda: timm_vit(global_pool="prr"), "pools by 'prr'"),
        (lambda: timm.create_model("test_vit_relpos"), "VisionTransformerRelPos"),
        (lambda: timm.create_model("test_convnext"), "ConvNeXt"),
        (lambda: nn.Linear(2, 2), "Linear"),
    ],
)
def test_unsupported_models_are_named(vit: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        apply_merging(vit(), NONE)
    assert "not supported" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merge", every_method())
def test_all_tensors_are_made_on_the_device_of_the_model(
    merge: MergeConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU: an operator refuses to mix it with the CPU, and nothing can be read from it."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # meta has none
    model = ours(merge, num_registers=2).to("meta", dtype)
    out = model(torch.empty(4, 3, 32, 32, device="meta", dtype=dtype), trace=True)
    out.logits.float().sum().backward()
    assert out.group.is_meta and out.size.dtype == torch.float32 and out.logits.dtype == dtype
