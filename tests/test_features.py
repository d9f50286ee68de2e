"""timm's feature interface on merging models: bit for bit timm's where nothing merges, else beside slow oracles."""

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from tiny import every_method, images, ours, randomise, timm_vit
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from models import MergeConfig, MergingViT, UserError, apply_merging, create_model, unmerge
from models.registry import native_model, timm_name

# two blocks of each form: class token, two tokens, registers with and without positions, attention and mean pooling
FAMILIES: dict[str, dict[str, Any]] = {
    "deit_tiny": {"img_size": 48},
    "deit_tiny_distilled": {"img_size": 48},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "num_classes": 10},
    "vit_base_patch16_siglip_224": {"img_size": 48, "num_classes": 10},
    "vit_so150m_patch16_reg4_gap_256": {"img_size": 64},
    "test_vit2": {"img_size": 64, "dynamic_img_size": True},
}
CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "forward": lambda model, x: model(x),
    "features": lambda model, x: model.forward_features(x),
    "head": lambda model, x: model.forward_head(model.forward_features(x)),
    "pre_logits": lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
    "intermediates": lambda model, x: model.forward_intermediates(x),
    "all options": lambda model, x: model.forward_intermediates(
        x, [-2], return_prefix_tokens=True, norm=True, stop_early=True, output_fmt="NLC"
    ),
    "dictionary": lambda model, x: model.forward_intermediates(x, 1, output_dict=True, return_prefix_tokens=True),
    "layers": lambda model, x: model.get_intermediate_layers(x, 2, reshape=True, norm=True, return_prefix_tokens=True),
    "causal": lambda model, x: model(x, is_causal=True),
    "unpooled": lambda model, x: changed(model, lambda m: m.reset_classifier(0, ""))(x),
    "pruned": lambda model, x: changed(model, lambda m: m.prune_intermediate_layers([0], prune_norm=True))(x),
}
POOLS: list[dict[str, Any]] = [
    {},
    {"global_pool": "avg"},
    {"global_pool": "avg", "pool_include_prefix": True},
    {"global_pool": "avgmax", "dynamic_img_size": True},
    {"global_pool": "max"},
    {"global_pool": "map"},
    {"global_pool": ""},
    {"distilled": True},
]


def changed(model: Any, change: Callable[[Any], Any]) -> Any:
    model = copy.deepcopy(model)
    change(model)
    return model


def equal(one: Any, other: Any) -> bool:
    """Whether two nests of tensors are the same, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other)


# Without merging


@pytest.mark.parametrize("name", FAMILIES)
def test_without_merging_every_call_is_timms_bit_for_bit(name: str) -> None:
    vit = randomise(native_model(name, **({"depth": 2} | FAMILIES[name]))).eval()
    model = apply_merging(vit, MergeConfig(r=0))
    sizes = [FAMILIES[name]["img_size"]] + ([(32, 80)] if "dynamic_img_size" in FAMILIES[name] else [])
    for size in sizes:
        x = images(2, size)
        with torch.no_grad():
            different = [call for call, function in CALLS.items() if not equal(function(model, x), function(vit, x))]
            assert not different
            tokens = vit.forward_features(x)
            mask = torch.rand(2, 1, tokens.shape[1], tokens.shape[1]) < 0.7
            assert torch.equal(model(x, attn_mask=mask), vit(x, attn_mask=mask))
            if not vit.dynamic_img_size:  # where the number of tokens tells that none has merged
                assert torch.equal(model.forward_head(tokens), vit.forward_head(tokens))


def test_a_mask_and_merging_exclude_each_other() -> None:
    model, mask = ours(MergeConfig(r=2)), torch.ones(1, 1, 1, 17, dtype=torch.bool)
    assert torch.equal(model(images(), r=0, attn_mask=mask), model(images(), r=0))
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(UserError, match="attn_mask needs a forward that merges nothing"):
            call(images(), attn_mask=mask)
    with pytest.raises(UserError, match="is_causal needs a forward"):
        model(images(), is_causal=True)
    with pytest.raises(UserError, match="give a mask as attn_mask="):
        model(images(), mask)
    with pytest.raises(UserError, match="register_layer=0"):
        ours(num_registers=2, register_layer=1)(images(), attn_mask=mask)


# Features and head


@pytest.mark.parametrize("options", POOLS, ids=str)
def test_features_and_head_are_the_forward(options: dict[str, Any]) -> None:
    model = ours(MergeConfig(r="6,3,2"), 2, **options)
    features = model.forward_features(images(3))
    whole = model(images(3), trace=True)  # whose last block computes all tokens, as that of features
    torch.testing.assert_close(model(images(3)), whole.logits, rtol=0, atol=2e-6)
    assert features.shape[1] == model.plan().counts[-1] < 17
    assert torch.equal(features.token_sizes, whole.size)
    assert torch.equal(model.forward_head(features), whole.logits)
    assert torch.equal(model.forward_head(features + 0, size=features.token_sizes), whole.logits)
    if "distilled" not in options:
        assert torch.equal(model.head(model.forward_head(features, pre_logits=True)), whole.logits)
    final, _ = model.forward_intermediates(images(3))
    assert torch.equal(final, features) and torch.equal(model.forward_head(final), whole.logits)
    stored = io.BytesIO()
    torch.save(features, stored)
    stored.seek(0)
    assert torch.equal(model.forward_head(torch.load(stored, weights_only=True)), whole.logits)


def test_pre_logits_of_a_distilled_model_are_the_mean_of_its_tokens() -> None:
    model = ours(MergeConfig(r=4), 2, distilled=True)
    features = model.forward_features(images())
    assert torch.equal(model.forward_head(features, pre_logits=True), (features[:, 0] + features[:, 1]) / 2)


@pytest.mark.parametrize("options", POOLS, ids=str)
def test_a_head_without_sizes_is_right_or_says_why_not(options: dict[str, Any]) -> None:
    model = ours(MergeConfig(r="6,3,2"), 2, **options)
    features = model.forward_features(images())
    other = features * 2
    needs_sizes = options.get("global_pool") in ("avg", "avgmax", "map")
    for lost in (other, features[:1], features.flip(0)):
        if needs_sizes:
            with pytest.raises(UserError, match=r"pooling counts a token as often .* size=features.token_sizes"):
                model.forward_head(lost)
        else:
            assert model.forward_head(lost).shape[0] == len(lost)
    dense = model.forward_features(images(), r=0) * 1
    if not (needs_sizes and "dynamic_img_size" in options):  # there any number may have merged
        expected = model.forward_head(model.forward_features(images(), r=0))
        assert torch.equal(model.forward_head(dense), expected)
    wrong = [features[0], features[..., :5], features[:, :1], torch.zeros(2, 24)]
    for tensor in wrong:
        with pytest.raises(UserError, match=r"forward_head takes tokens \(B,M,24\)"):
            model.forward_head(tensor)
    if needs_sizes:
        with pytest.raises(UserError, match=r"size must be \(2, "):
            model.forward_head(features, size=torch.ones(2, 3))


def test_features_from_before_the_class_token_have_no_head() -> None:
    model = ours(MergeConfig(r=2), 2, class_layer=1, register_layer=2)
    early, _ = model.forward_intermediates(images(), [0], stop_early=True)
    with pytest.raises(UserError, match=r"before all prefix tokens entered \(register_layer=2, class_layer=1\)"):
        model.forward_head(early)
    logits = model.forward_head(model.forward_intermediates(images())[0])
    assert torch.equal(logits, model(images(), trace=True).logits)


def test_a_head_compiles_with_its_features() -> None:
    class Embedding(nn.Module):
        def __init__(self, model: MergingViT) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model.forward_head(self.model.forward_features(x), pre_logits=True)

    module = Embedding(ours(MergeConfig(r=3), 2, global_pool="avg"))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images()), module(images()))
    assert torch.equal(torch.export.export(module, (images(),)).module()(images()), module(images()))


# Intermediates


@pytest.mark.parametrize("merge", every_method(choices=False))
@pytest.mark.parametrize("late", [False, True])
def test_intermediates_are_unmerged_by_group(merge: MergeConfig, late: bool) -> None:
    """Every patch has, pixel by pixel, the token that the trace says it is in."""
    size = (24, 40)
    layers = {"register_layer": 1, "class_layer": 2} if late else {}
    model = ours(merge, 2, **layers, dynamic_img_size=True)
    x, seen = images(2, size), []
    hooks = [block.register_forward_hook(lambda module, args, output: seen.append(output)) for block in model.blocks]
    out = model(x, trace=True)
    for hook in hooks:
        hook.remove()
    assert out.counts[-1] < 15
    for norm, fmt in itertools.product((False, True), ("NCHW", "NLC")):
        maps = model.forward_intermediates(x, None, True, norm, output_fmt=fmt, intermediates_only=True)
        for layer, (patches, prefix) in enumerate(maps):
            tokens, group, present = seen[layer], out.groups[layer], model.prefixes()[layer]
            tokens = model.norm(tokens) if norm else tokens
            assert torch.equal(prefix, tokens[:, :present])
            assert patches.shape == ((2, 24, 3, 5) if fmt == "NCHW" else (2, 15, 24))
            for image, row, column in itertools.product(range(2), range(3), range(5)):
                expected = tokens[image, present + group[image, 5 * row + column]]
                at = patches[image, :, row, column] if fmt == "NCHW" else patches[image, 5 * row + column]
                assert torch.equal(at, expected)


def test_intermediates_take_blocks_as_timm_does() -> None:
    model, vit = ours(MergeConfig(r=2)), timm_vit()
    for indices in (None, 1, 2, [0, 2], (2, 0), [-1], [1, 1]):
        mine = model.forward_intermediates(images(), indices, intermediates_only=True)
        theirs = vit.forward_intermediates(images(), indices, intermediates_only=True)
        assert [part.shape for part in mine] == [part.shape for part in theirs]
    with pytest.raises(UserError, match="the last 4 of 3 blocks"):
        model.forward_intermediates(images(), 4)
    with pytest.raises(UserError, match=r"indices=\[3\] must name blocks 0..2"):
        model.forward_intermediates(images(), [3])
    with pytest.raises(UserError, match="NCHW, NLC, not 'NHWC'"):
        model.forward_intermediates(images(), output_fmt="NHWC")
    ran: list[int] = []
    model.blocks[1].register_forward_hook(lambda *_: ran.append(1))
    assert model.forward_intermediates(images(), [0], stop_early=True)[0].shape[1] == 15
    assert not ran
    assert torch.equal(
        model.get_intermediate_layers(images(), [1], reshape=True)[0], model.forward_intermediates(images(), [1])[1][0]
    )
    assert equal(model.forward_intermediates(images(), r=0), vit.forward_intermediates(images()))


def test_gradients_reach_the_images_through_intermediates() -> None:
    model, x = ours(MergeConfig(r=4), 2).train(), images().requires_grad_()
    model.set_grad_checkpointing(True)
    maps = model.forward_intermediates(x, [1], intermediates_only=True)
    maps[0].square().sum().backward()
    assert (x.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


# A model cut off


SCHEDULES = [
    MergeConfig(r="(3,-1)"),
    MergeConfig(r=[1, 2, 3]),
    MergeConfig(r=0.2),
    MergeConfig(r=2, activate_layers=[0, 2]),
    MergeConfig(r=2, dense_layers=3),
    MergeConfig("mctf", 2, min_tokens=2),
    MergeConfig("lgtm", 1, dense_layers=1, global_layer=2),
    MergeConfig("pitome", 3),
]


@pytest.mark.parametrize("merge", SCHEDULES, ids=str)
def test_blocks_that_stay_merge_as_they_did(merge: MergeConfig) -> None:
    model = ours(merge, 2)
    expected = model.forward_intermediates(images(), [0, 1], intermediates_only=True)
    pruned = ours(merge, 2)
    assert pruned.prune_intermediate_layers([0, -2], prune_norm=True) == [0, 1]
    assert len(pruned.blocks) == len(pruned.plan().merges) == 2
    assert pruned.plan().merges == model.plan().merges[:2]
    assert equal(pruned.forward_intermediates(images(), [0, 1], intermediates_only=True), expected)
    tokens = pruned(images())  # no head, no pooling
    assert tokens.shape == (2, pruned.plan().counts[-1], 24)
    again = apply_merging(copy.deepcopy(pruned), merge)
    assert torch.equal(again(images()), tokens)


def test_pruning_keeps_the_head_if_told_and_refuses_what_it_would_break() -> None:
    model = ours(MergeConfig(r=2), 2)
    model.prune_intermediate_layers(1, prune_head=False)
    assert model(images()).shape == (2, 10)
    with pytest.raises(UserError, match="the last 4 of 3 blocks"):
        model.prune_intermediate_layers(4)
    for late in ("register_layer", "class_layer"):
        with pytest.raises(UserError, match=rf"only blocks 0..0 would stay, but {late} is 1"):
            ours(MergeConfig(r=2), 2, **{late: 1}).prune_intermediate_layers([0])


@pytest.mark.parametrize("name", ["deit_tiny", "deit_tiny_distilled", "deit_digits"])
def test_features_only(name: str) -> None:
    options: dict[str, Any] = {"depth": 4, "img_size": 64, "num_registers": 2, "merge": MergeConfig(r="(2,-1)")}
    options |= {"dynamic_img_size": True}
    torch.manual_seed(0)
    model = create_model(name, **options).eval()
    torch.manual_seed(0)
    backbone = timm.create_model(name, features_only=True, out_indices=(0, -2), **options).eval()
    width, patch = model.embed_dim, model.patch_embed.patch_size[0]
    assert backbone.feature_info.channels() == [width, width]
    assert backbone.feature_info.reduction() == [patch, patch]
    assert len(backbone.model.blocks) == 3
    for size in (64, (64, 96)):
        maps = backbone(images(2, size))
        grid = [side // patch for side in images(1, size).shape[2:]]
        assert [part.shape for part in maps] == 2 * [(2, width, *grid)]
        assert equal(maps, model.forward_intermediates(images(2, size), [0, 2], intermediates_only=True))
    with pytest.raises(UserError, match="feature_cls='list' would read tokens that have merged"):
        timm.create_model(name, features_only=True, feature_cls="list", **options)
    with pytest.raises(UserError, match="no effect without features_only"):
        timm.create_model(name, out_indices=(1,), **options)


def test_features_only_without_merging_is_timms() -> None:
    theirs = timm.create_model("deit_tiny_patch16_224", features_only=True, depth=3, img_size=32, out_indices=(0, 2))
    mine = timm.create_model("deit_tiny", features_only=True, depth=3, img_size=32, out_indices=(0, 2))
    assert mine.model.load_state_dict(theirs.model.state_dict(), strict=True).missing_keys == []
    assert equal(mine.eval()(images()), theirs.eval()(images()))
    assert mine.pretrained_cfg["mean"] == theirs.pretrained_cfg["mean"]
    assert "classifier" not in mine.pretrained_cfg


@pytest.mark.parametrize("name", ["deit_tiny", "vit_small_patch14_reg4_dinov2", "test_vit2"])
def test_features_only_of_timms_names(name: str) -> None:
    """Without merging timm's own maps, bit for bit; with it those of the whole model, on the whole grid."""
    options = {"depth": 3} | FAMILIES[name]
    theirs = timm.create_model(timm_name(name), features_only=True, out_indices=(0, 2), **options).eval()
    mine = create_model(name, features_only=True, out_indices=(0, 2), **options).eval()
    mine.model.load_state_dict(randomise(theirs.model).state_dict())
    x = images(2, FAMILIES[name]["img_size"])
    with torch.no_grad():
        assert equal(mine(x), theirs(x))
        assert mine.feature_info.channels() == theirs.feature_info.channels()
        assert mine.feature_info.reduction() == theirs.feature_info.reduction()
        mine.model.r = 3
        out, maps = mine.model(x, trace=True), mine(x)
        assert [part.shape for part in maps] == [part.shape for part in theirs(x)]
        prefix = mine.model.num_prefix_tokens
        assert torch.equal(maps[1].flatten(2).mT, unmerge(out.tokens[:, prefix:], out.group))  # no norm stays
    assert create_model("deit_digits", features_only=False, out_indices=None)(images()).shape == (2, 10)
    with pytest.raises(UserError, match="out_indices and feature_cls have no effect"):
        create_model(name, out_indices=(1,), **options)


@pytest.mark.parametrize("merge", every_method(choices=False))
def test_patches_that_are_not_square_lie_where_they_were(merge: MergeConfig) -> None:
    """Patches of 8 x 4 pixels on a wide image: each has the token it is in, in rows and columns of its own."""
    model = ours(merge, 2, patch_size=(8, 4), img_size=(24, 40), register_layer=1)
    x = images(2, (24, 40))
    out = model(x, trace=True)
    (last,) = model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)
    assert last.shape == (2, 24, 3, 10) and out.group.shape == (2, 30)
    for row, column in itertools.product(range(3), range(10)):
        token = out.tokens[torch.arange(2), model.num_prefix_tokens + out.group[:, 10 * row + column]]
        assert torch.equal(last[:, :, row, column], token)
    theirs = timm_vit(patch_size=(8, 4), img_size=(24, 40))
    plain = apply_merging(theirs, MergeConfig(r=0)).eval()
    assert equal(plain.forward_intermediates(x), theirs.forward_intermediates(x))


# Training with two heads, other habits


def test_distilled_training_returns_both_heads_in_training_alone() -> None:
    vit, model = timm_vit(distilled=True), ours(MergeConfig(r=0), distilled=True)
    for either in (vit, model):
        either.train().set_distilled_training(True)
    assert equal(model(images()), vit(images()))
    assert equal(model.forward_head(model.forward_features(images())), vit(images()))
    out = model(images(), trace=True, r=4)
    assert equal((out.logits_class, out.logits_dist), model(images(), r=4))
    assert torch.equal(model.eval()(images()), vit.eval()(images()))
    model.train().set_distilled_training(False)
    assert model(images()).shape == (2, 10)
    with pytest.raises(UserError, match="no distillation token"):
        ours().set_distilled_training()


def test_pooling_can_be_changed_as_in_timm() -> None:
    model = ours(MergeConfig(r=4), 2)
    model.reset_classifier(7, "avg")
    assert model(images()).shape == (2, 7)
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, model.plan().counts[-1], 24)
    with pytest.raises(UserError, match="'map' does not fit this model"):
        model.reset_classifier(3, "map")
    with pytest.raises(UserError, match="a distilled model reads its two tokens"):
        ours(distilled=True).reset_classifier(3, "avg")


@pytest.mark.parametrize("merge", every_method())
def test_a_batch_of_none_gives_no_logits(merge: MergeConfig) -> None:
    for options in ({}, {"global_pool": "avg"}, {"distilled": True}):
        model = ours(merge, 2, **options)
        x = images(1)[:0]
        assert model(x).shape == (0, 10)
        out, (features, maps) = model(x, trace=True), model.forward_intermediates(x)
        assert out.group.shape == (0, 16) and features.shape == out.tokens.shape == (0, out.counts[-1], 24)
        assert [part.shape for part in maps] == 3 * [(0, 24, 4, 4)]
        assert model.forward_head(features).shape == (0, 10)


def test_symbolic_tracing_says_what_to_use_instead() -> None:
    for r in (0, 2):
        with pytest.raises(UserError, match="torch.fx .* cannot trace this model.*forward_intermediates"):
            create_feature_extractor(ours(MergeConfig(r=r)), ["blocks.1"])
