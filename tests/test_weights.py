"""Weights of any origin into our models: models/weights.py."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from models import MergeConfig, MergingViT, UserError, apply_merging
from models.weights import LoadReport, extract_state_dict, load_weights, read_weights, unwrap_state_dict

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
Weights = dict[str, Tensor]


def timm_vit(distilled: bool = False, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    return timm.create_model(name, **(TINY | options)).eval()


def ours(registers: int | None = 0, seed: int = 1, **options: Any) -> Any:
    return apply_merging(timm_vit(seed=seed, **options), MergeConfig(method="none"), num_registers=registers).eval()


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))


def deit3_native(weights: Weights) -> Weights:
    """As facebook's DeiT-III and regs-small-vits store it."""
    swaps = (("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"), ("reg_token", "reg_tokens"))
    for new, old in swaps:
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    return weights


def assert_equal_but(model: torch.nn.Module, weights: Mapping[str, Tensor], *names: str) -> None:
    own = model.state_dict()
    for name in own.keys() - set(names):
        assert torch.equal(own[name], weights[name]), name


# Where the weights lie in a checkpoint


@pytest.mark.parametrize(
    ("wrap", "origin"),
    [
        (lambda w: {"model": w}, "timm"),
        (lambda w: w, "timm"),
        (lambda w: {"state_dict": w, "epoch": 3, "arch": "vit"}, "timm"),
        (lambda w: {"model": w, "model_ema": None, "merge": {}, "epoch": 1}, "regtome"),
        (lambda w: {"model": w, "model_ema": (w,), "args": argparse.Namespace(lr=1)}, "mctf"),
        (lambda w: {"model": {f"module.{k}": v for k, v in w.items()}}, "timm"),
        (lambda w: {"module._orig_mod." + k: v for k, v in w.items()}, "timm"),
        (lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}}, "timm"),
        (lambda w: {f"backbone.{k}": v for k, v in w.items()}, "timm"),
    ],
)
def test_containers_and_prefixes(wrap, origin: str) -> None:
    weights = timm_vit().state_dict()
    checkpoint = wrap(weights)
    keys = list(checkpoint)
    found, found_origin = extract_state_dict(checkpoint)
    assert found_origin == origin
    assert list(checkpoint) == keys, "the input is not changed"
    assert found.keys() == weights.keys()
    model = ours()
    assert load_weights(model, found) == LoadReport(loaded=len(weights))
    assert_equal_but(model, weights)


@pytest.mark.parametrize("raw_key", ["model", "state_dict"])
@pytest.mark.parametrize("one_tuple", [False, True])
def test_ema_is_preferred_only_when_asked_for(raw_key: str, one_tuple: bool) -> None:
    raw, ema = timm_vit(seed=0).state_dict(), timm_vit(seed=5).state_dict()
    ema_key = {"model": "model_ema", "state_dict": "state_dict_ema"}[raw_key]
    checkpoint = {raw_key: raw, ema_key: (ema,) if one_tuple else ema}
    assert torch.equal(extract_state_dict(checkpoint)[0]["cls_token"], raw["cls_token"])
    assert torch.equal(extract_state_dict(checkpoint, ema=True)[0]["cls_token"], ema["cls_token"])
    assert torch.equal(extract_state_dict({raw_key: raw, ema_key: None}, ema=True)[0]["cls_token"], raw["cls_token"])
    assert torch.equal(extract_state_dict({ema_key: checkpoint[ema_key]})[0]["cls_token"], ema["cls_token"])


def test_safetensors_round_trip(tmp_path) -> None:
    model = ours(registers=3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    other = ours(registers=3, seed=9)
    weights, _ = extract_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"))
    assert load_weights(other, weights).fresh == ()
    assert torch.equal(model(images()), other(images()))


@pytest.mark.parametrize(
    "foreign",
    [None, [1, 2], {}, {"epoch": 3}, {"model": 5}, {"model": {}}, {"model": {"lr": 0.1}}, torch.zeros(3)],
)
def test_foreign_objects_are_one_line(foreign: object) -> None:
    with pytest.raises(UserError, match="ckpt.pth holds no model weights") as error:
        extract_state_dict(foreign, source="ckpt.pth")
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture_are_named() -> None:
    weights = {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}
    assert unwrap_state_dict({"state_dict": weights}) == weights
    with pytest.raises(UserError, match=r"not a Vision Transformer.*conv1.weight, fc.bias"):
        extract_state_dict({"state_dict": weights})


def test_two_models_in_one_dict_are_refused() -> None:
    weights = {"module.head.bias": torch.zeros(1), "head.bias": torch.ones(1)}
    with pytest.raises(UserError, match="two models"):
        unwrap_state_dict(weights)


# Names of other code bases


def test_deit3_names_and_positions_without_class_entry() -> None:
    options: dict[str, Any] = {"no_embed_class": True, "init_values": 1e-3}
    source = timm_vit(**options)
    weights, origin = extract_state_dict({"model": deit3_native(source.state_dict())})
    assert origin == "deit3"
    model = ours(**options)
    assert load_weights(model, weights).lines() == [f"loaded {len(weights)} tensors"]
    torch.testing.assert_close(model(images()), source(images()))


def test_regs_small_vits_registers() -> None:
    options: dict[str, Any] = {"no_embed_class": True, "init_values": 1e-3}
    source = ours(registers=4, **options)
    weights, origin = extract_state_dict({"model": deit3_native(source.state_dict()), "model_ema": None})
    assert origin == "regs-small-vits"
    model = ours(registers=4, seed=8, **options)
    load_weights(model, weights)
    assert_equal_but(model, source.state_dict())


def test_registers_merging_names() -> None:
    source = ours(registers=4, no_embed_class=True).state_dict()
    stored = {name.replace("reg_token", "register_tokens"): tensor for name, tensor in source.items()}
    weights, origin = extract_state_dict(stored)
    assert origin == "registers-merging"
    assert weights.keys() == source.keys()


def dinov2_native(source: MergingViT) -> Weights:
    """Facebook's: blocks in two chunks with absolute numbers, positions of class and patches, no head."""
    weights = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("head")}
    weights = {name.replace("blocks.0.", "blocks.0.0."): tensor for name, tensor in weights.items()}
    weights = {name.replace("blocks.1.", "blocks.1.1."): tensor for name, tensor in weights.items()}
    weights["register_tokens"] = weights.pop("reg_token")
    pos = weights["pos_embed"]
    entry = torch.full_like(pos[:, :1], 0.25)
    weights["cls_token"] = weights["cls_token"] - entry
    weights["pos_embed"] = torch.cat([entry, pos], dim=1)
    return weights | {"mask_token": torch.zeros(1, 24)}


def test_dinov2_names_chunks_and_class_position() -> None:
    source = ours(registers=4, no_embed_class=True, init_values=1e-3)
    torch.nn.init.normal_(source.cls_token)  # timm's 1e-6 would be lost in the rounding of the test's own subtraction
    weights, origin = extract_state_dict(dinov2_native(source))
    assert origin == "dinov2"
    model = ours(registers=4, seed=8, no_embed_class=True, init_values=1e-3)
    report = load_weights(model, weights)
    assert report.missing == ("head.weight", "head.bias")
    assert any("position entry of cls_token" in note for note in report.notes)
    assert any("head is fresh" in note for note in report.notes)
    torch.testing.assert_close(model(images(), trace=True).tokens, source(images(), trace=True).tokens)


# Registers


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_new_registers_keep_every_other_weight(no_embed_class: bool) -> None:
    weights = timm_vit(no_embed_class=no_embed_class).state_dict()
    model = ours(registers=4, no_embed_class=no_embed_class)
    fresh = model.reg_token.detach().clone()
    report = load_weights(model, weights)
    assert report.fresh == report.missing == ("reg_token",)
    assert report.loaded == len(weights)
    assert_equal_but(model, weights, "reg_token")
    assert torch.equal(model.reg_token, fresh)
    assert report.lines() == [
        f"loaded {len(weights)} tensors; fresh: reg_token",
        "registers: 0 from the checkpoint, 4 fresh",
    ]


@pytest.mark.parametrize(("have", "want"), [(2, 5), (5, 2), (3, 3), (4, 0)])
def test_another_number_of_registers(have: int, want: int) -> None:
    weights = ours(registers=have).state_dict()
    model = ours(registers=want, seed=8)
    fresh = model.state_dict().get("reg_token", torch.empty(1, 0, 24)).clone()
    report = load_weights(model, weights)
    kept = min(have, want)
    assert_equal_but(model, weights, "reg_token")
    if want:
        assert torch.equal(model.reg_token[:, :kept], weights["reg_token"][:, :kept])
        assert torch.equal(model.reg_token[:, kept:], fresh[:, kept:])
    assert report.fresh == (("reg_token",) if want > have else ())
    assert report.missing == ()
    assert report.unexpected == (("reg_token",) if want == 0 else ())
    assert bool(report.notes) == (have != want)


def test_register_positions_of_timm_are_added_to_the_registers() -> None:
    # timm's so150m models give their registers position entries; ours have none once the count changes
    vit = timm.create_model("vit_tiny_patch16_224", reg_tokens=2, **TINY).eval()
    weights = vit.state_dict()
    assert weights["pos_embed"].shape[1] == 16 + 3
    model = ours(registers=2, seed=8)
    assert model.num_pos_prefix == 1
    report = load_weights(model, weights)
    assert report.notes == ("position entry of reg_token added to the token, the model has no entry for it",)
    torch.testing.assert_close(model(images()), vit(images()))


# Positions


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("no_embed_class", [False, True])
def test_another_grid_resamples_patch_entries_only(no_embed_class: bool, registers: int) -> None:
    weights = ours(registers=registers, no_embed_class=no_embed_class).state_dict()
    model = ours(registers=registers, seed=8, no_embed_class=no_embed_class, img_size=48)
    report = load_weights(model, weights)
    entries = 0 if no_embed_class else 1
    assert_equal_but(model, weights, "pos_embed")
    assert torch.equal(model.pos_embed[:, :entries], weights["pos_embed"][:, :entries])
    wanted = resample_abs_pos_embed(weights["pos_embed"][:, entries:], [6, 6], [4, 4], num_prefix_tokens=0)
    assert torch.equal(model.pos_embed[:, entries:], wanted)
    assert report.notes == ("position embedding resampled from 4x4 to 6x6 patches",)
    assert report.fresh == ()


def test_class_entry_moves_where_the_model_has_it() -> None:
    with_entry, without = timm_vit(), timm_vit(seed=3, no_embed_class=True)
    model = ours(no_embed_class=True)
    report = load_weights(model, with_entry.state_dict())
    assert report.notes == ("position entry of cls_token added to the token, the model has no entry for it",)
    torch.testing.assert_close(model(images()), with_entry(images()))
    model = ours()
    report = load_weights(model, without.state_dict())
    assert report.notes == report.fresh == ()
    assert not model.pos_embed[:, 0].any()
    torch.testing.assert_close(model(images()), without(images()))


def test_loading_does_not_change_the_given_weights() -> None:
    weights = timm_vit().state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    load_weights(ours(no_embed_class=True, registers=2), weights)
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)


# Distillation


def test_distilled_round_trip() -> None:
    weights = timm_vit(distilled=True).state_dict()
    model = ours(registers=2, distilled=True)
    report = load_weights(model, weights)
    assert report.fresh == ("reg_token",)
    assert_equal_but(model, weights, "reg_token")


def test_distillation_token_is_left_over_in_a_plain_model() -> None:
    weights = timm_vit(distilled=True).state_dict()
    model = ours(registers=0)
    report = load_weights(model, weights, num_classes_changed_ok=False)
    assert set(report.unexpected) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    assert "left over: " in report.lines()[0]
    assert_equal_but(model, weights, "pos_embed")
    assert torch.equal(model.pos_embed, weights["pos_embed"][:, [0, *range(2, 18)]])


def test_plain_weights_in_a_distilled_model() -> None:
    weights = timm_vit().state_dict()
    model = ours(registers=0, distilled=True)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, weights)
    new = ("dist_token", "head_dist.weight", "head_dist.bias")
    assert set(report.missing) == set(new)
    assert set(report.fresh) == {*new, "pos_embed"}
    assert_equal_but(model, weights, *new, "pos_embed")
    assert all(torch.equal(model.state_dict()[name], own[name]) for name in new)
    assert torch.equal(model.pos_embed[:, 1], own["pos_embed"][:, 1])
    assert torch.equal(model.pos_embed[:, [0, *range(2, 18)]], weights["pos_embed"])
    assert any("distillation token and its head are fresh" in note for note in report.notes)
    with pytest.raises(UserError, match="cannot be evaluated"):
        load_weights(model, weights, num_classes_changed_ok=False)


# Heads


@pytest.mark.parametrize("distilled", [False, True])
def test_another_class_count_keeps_a_fresh_head_or_is_refused(distilled: bool) -> None:
    weights = timm_vit(distilled=distilled).state_dict()
    model = ours(distilled=distilled, num_classes=7)
    head = model.head.weight.detach().clone()
    report = load_weights(model, weights)
    assert torch.equal(model.head.weight, head)
    heads = ["head", "head_dist"] if distilled else ["head"]
    assert report.fresh == tuple(f"{name}.{part}" for name in heads for part in ("weight", "bias"))
    assert report.missing == report.unexpected == ()
    assert report.notes[0] == "head is fresh: 10 classes in the checkpoint, 7 in the model"
    with pytest.raises(UserError, match=r"w.pth cannot be evaluated as deit_x: head is fresh: 10 classes.*, 7"):
        load_weights(model, weights, num_classes_changed_ok=False, source="w.pth", name="deit_x")


def test_headless_model_leaves_the_head_over() -> None:
    report = load_weights(ours(num_classes=0), timm_vit().state_dict())
    assert report.unexpected == ("head.weight", "head.bias")


# What is wrong is named, and nothing is loaded


def test_unknown_and_missing_keys_are_named_up_to_eight() -> None:
    weights = timm_vit().state_dict()
    del weights["norm.weight"]
    weights |= {f"extra.{i}": torch.zeros(1) for i in range(11)}
    model = ours()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(model, weights, source="w.pth", name="deit_x")
    message = str(error.value)
    assert message.startswith("w.pth does not fit deit_x: missing norm.weight; unexpected extra.0, extra.1")
    assert message.endswith("extra.7 and 3 more")
    assert_equal_but(model, before)


def test_another_width_is_one_line_with_both() -> None:
    weights = timm_vit(embed_dim=48).state_dict()
    with pytest.raises(UserError, match="embed dim 48, deit_x has 24") as error:
        load_weights(ours(), weights, name="deit_x")
    assert "\n" not in str(error.value)


def test_another_depth_and_patch_size_are_errors() -> None:
    with pytest.raises(UserError, match=r"unexpected blocks\.2\.norm1\.weight"):
        load_weights(ours(), timm_vit(depth=3).state_dict())
    with pytest.raises(UserError, match=r"missing blocks\.2\.norm1\.weight"):
        load_weights(ours(depth=3), timm_vit().state_dict())
    with pytest.raises(
        UserError, match=r"shapes patch_embed.proj.weight \(24, 3, 8, 8\) \(the model has \(24, 3, 4, 4\)"
    ):
        load_weights(ours(patch_size=4), timm_vit().state_dict())


def test_positions_that_form_no_grid_are_an_error() -> None:
    weights = timm_vit().state_dict()
    weights["pos_embed"] = torch.zeros(1, 13, 24)
    assert math.isqrt(13) ** 2 != 13
    with pytest.raises(UserError, match=r"shapes pos_embed \(1, 13, 24\)"):
        load_weights(ours(), weights)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named_and_refused(value: float) -> None:
    weights, model = timm_vit().state_dict(), ours(registers=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["blocks.1.attn.qkv.weight"][3, 5] = weights["norm.bias"][0] = value
    with pytest.raises(UserError, match=r"w.pth holds NaN or infinite values in blocks.1.attn.qkv.weight, norm.bias;"):
        load_weights(model, weights, source="w.pth")
    assert_equal_but(model, before)


def test_a_file_with_code_in_it_is_named_and_not_run(tmp_path) -> None:
    torch.save({"model": timm_vit()}, tmp_path / "whole.pth")
    with pytest.raises(UserError, match="whole.pth: it holds the Python object timm.*VisionTransformer; give a"):
        read_weights(tmp_path / "whole.pth")
    torch.save({"model": timm_vit().state_dict(), "model_ema": ours(registers=2).state_dict()}, tmp_path / "ema.pth")
    assert "reg_token" not in read_weights(tmp_path / "ema.pth")
    assert "reg_token" in read_weights(str(tmp_path / "ema.pth"), ema=True)


def test_layer_scale_is_not_dropped_silently() -> None:
    with pytest.raises(UserError, match=r"unexpected blocks\.0\.ls1\.gamma"):
        load_weights(ours(), timm_vit(init_values=0.1).state_dict())


def test_round_trip_through_a_training_checkpoint(tmp_path) -> None:
    model = ours(registers=4)
    torch.save({"model": model.state_dict(), "merge": {"r": 2}, "epoch": 1}, tmp_path / "c.pth")
    other = ours(registers=4, seed=9)
    weights, origin = extract_state_dict(torch.load(tmp_path / "c.pth", weights_only=True))
    report = load_weights(other, weights, num_classes_changed_ok=False)
    assert origin == "regtome"
    assert (report.fresh, report.missing, report.unexpected, report.notes) == ((), (), (), ())
    assert_equal_but(other, model.state_dict())
