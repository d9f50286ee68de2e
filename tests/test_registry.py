"""Names: ours, timm's, unknown and unsupported ones, weights without a network, torch.hub."""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from tiny import images, randomise

import hubconf
from models import MergeConfig, MergingViT, UserError, create_model, registry
from models.export import save_folder
from models.registry import NAMES, TIMM_NAMES, native_model

PROMISED = {f"deit_{size}{kind}" for size in ("tiny", "small", "base") for kind in ("", "_distilled")}
PROMISED |= {f"deit3_{size}" for size in ("small", "medium", "base", "large")} | {"deit_digits"}
PROMISED |= {f"dinov3_{size}" for size in ("small", "base", "large")}
WIDTHS = {"tiny": 192, "small": 384, "medium": 512, "base": 768, "large": 1024, "digits": 96}


def one_line(caught: Any) -> str:
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# Our names


def test_names_are_the_promised_ones() -> None:
    assert set(NAMES) == set(timm.list_models(module="registry")) == PROMISED
    assert all(getattr(registry, name).__doc__ for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_our_names(name: str) -> None:
    """One block of each; timm's own model of the row takes the weights strictly and gives the same logits."""
    model = randomise(create_model(name, depth=1, num_classes=5, img_size=32)).eval()
    assert isinstance(model, MergingViT)
    assert model.embed_dim == WIDTHS[name.split("_")[1]]
    assert (model.head_dist is not None) == name.endswith("_distilled")
    is_eva = name.startswith("dinov3")
    if not is_eva:
        assert hasattr(model.blocks[0].ls1, "gamma") == name.startswith("deit3")
    native = native_model(name, depth=1, num_classes=5, img_size=32).eval()
    plain = Eva if is_eva else VisionTransformer
    assert type(native) is (VisionTransformerDistilled if name.endswith("_distilled") else plain)
    native.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images()), native(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_rows_have_their_published_depth_and_size(name: str) -> None:
    with torch.device("meta"):
        model = native_model(name)
    assert len(model.blocks) == (24 if "large" in name else 12)
    is_eva = name.startswith("dinov3")
    assert model.patch_embed.num_patches == (256 if is_eva else 196)
    assert model.num_classes == (0 if is_eva else 1000)


def test_arguments_reach_the_model() -> None:
    merge = MergeConfig(r=2)
    model = create_model("deit_tiny", 3, merge, 7, 64, register_layer=1, class_layer=2, depth=3, drop_path_rate=0.3)
    assert (model.num_registers, model.merge, model.num_classes) == (3, merge, 7)
    assert model.patch_embed.img_size == (64, 64)
    assert (model.register_layer, model.class_layer) == (1, 2)
    assert model.blocks[2].drop_path1.drop_prob == pytest.approx(0.3)


def test_none_is_the_models_own_default() -> None:
    model = create_model("deit_digits", num_classes=None, img_size=None, drop_path_rate=None, num_registers=None)
    assert (model.num_classes, model.patch_embed.img_size, model.num_registers) == (10, (32, 32), 0)
    assert model.merge == MergeConfig()


def test_a_reg4_model_keeps_or_is_given_its_registers() -> None:
    counts = [
        create_model("vit_small_patch14_reg4_dinov2", count, img_size=28, depth=1).num_registers
        for count in (None, 4, 0, 6)
    ]
    assert counts == [4, 4, 0, 6]


@pytest.mark.parametrize("name", NAMES)
def test_timm_creates_ours(name: str) -> None:
    assert timm.is_model(name)
    options: dict[str, Any] = {"num_registers": 2, "merge": MergeConfig(r=1), "depth": 1, "img_size": 32}
    model = timm.create_model(name, num_classes=3, **options)
    assert isinstance(model, MergingViT)
    assert model.num_registers == 2
    assert model.merge.r == 1
    assert model.eval()(images()).shape == (2, 3)


def test_timms_own_names_stay_timms() -> None:
    assert type(timm.create_model("deit_tiny_patch16_224", depth=1)) is VisionTransformer


# Names that are wrong


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("deit_smal", "deit_small"),
        ("deit3_smal", "deit3_small"),
        ("Deit_tiny", "deit_tiny"),
        ("deit_digit", "deit_digits"),
        ("deit_small_distiled", "deit_small_distilled"),
        ("vit_smal_patch16_224", "vit_small_patch16_224"),
        ("xyzzy", "deit_digits"),
        ("", "deit_small"),
    ],
)
def test_unknown_name_gives_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match="unknown model") as caught:
        create_model(name)
    assert nearest in one_line(caught)
    with pytest.raises(UserError, match="unknown model"):
        native_model(name)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("vit_small_patch16_224.nosuchtag", "augreg_in1k"),
        ("deit_small.fb_in1k", "deit_small_patch16_224.fb_in1k"),
    ],
)
def test_unknown_tag_names_the_known_ones(name: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        create_model(name)
    one_line(caught)


UNSUPPORTED = {
    "swin_tiny_patch4_window7_224": "swin_tiny_patch4_window7_224",
    "beit_base_patch16_224": "beit_base_patch16_224",
    "cait_xxs24_224": "cait_xxs24_224",
    "test_vit_relpos": "test_vit_relpos",
    "resnet50": "resnet50",
    "vit_pwee_patch16_reg1_gap_256": "ParallelScalingBlock",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention",
    "vit_base_patch16_rpn_224": "ResPostBlock",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_families_are_named(name: str) -> None:
    small = {"depth": 1} if name.startswith("vit_") else {}
    with pytest.raises(ValueError, match="not supported") as caught:
        create_model(name, **small)
    assert UNSUPPORTED[name] in one_line(caught)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"img_size": -16}, "not -16"),
        ({"img_size": (192, 250)}, r"img_size \(192, 250\) is not a multiple of the patches of 16 pixels"),
        ({"img_size": "x"}, "number of pixels > 0, or .height, width., not 'x'"),
        ({"drop_pth_rate": 0.1}, "create_model has no keyword drop_pth_rate; did you mean drop_path_rate"),
        ({"r": 16}, r"write merge=MergeConfig\(r=...\)"),
        ({"num_clases": 3}, "did you mean num_classes or no_embed_class"),
        ({"out_indices": (1,)}, "out_indices and feature_cls have no effect without features_only=True"),
        ({"pretrained": True, "checkpoint_path": "w.pth"}, "not both"),
        ({"checkpoint_path": "missing.pth"}, "missing.pth is not a file"),
        ({"checkpoint_path": __file__}, "cannot read .*test_registry.py: it is damaged"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"num_classes": -1}, "num_classes"),
        ({"num_registers": -1}, "num_registers"),
        ({"reg_tokens": 4}, "num_registers"),
        ({"register_layer": 2, "num_registers": 1}, "register_layer is 2"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ({"merge": MergeConfig(r=[1, 1, 1])}, "lists 3 blocks"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        create_model("deit_tiny", depth=2, **options)
    assert "--" not in one_line(caught)


# Published weights


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that refuses connections, no proxy, nothing cached."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["deit_tiny", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_pretrained_without_a_network_is_quick_and_says_what_to_do(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot get the pretrained weights") as caught:
        create_model(name, pretrained=True)
    assert time.monotonic() - start < 10
    message = one_line(caught)
    assert "checkpoint_path=FILE" in message and "pretrained=False" in message and "--" not in message
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("name", ["deit_digits", "vit_base_patch16_reg4_gap_256"])
def test_pretrained_where_nothing_was_published(name: str) -> None:
    with pytest.raises(UserError, match="no p[a-z]* weights") as caught:
        create_model(name, pretrained=True)
    assert "pretrained=False" in one_line(caught)


@pytest.mark.usefixtures("no_network")
def test_hub_names_without_a_network_are_one_line_at_once() -> None:
    start = time.monotonic()
    for name in ("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k", "hf_hub:someone/model"):
        for pretrained in (False, True):
            with pytest.raises(
                UserError, match=r"cannot get .* from the Hugging Face hub .*'local-dir:FOLDER'"
            ) as caught:
                create_model(name, pretrained=pretrained)
            one_line(caught)
    assert time.monotonic() - start < 10
    with pytest.raises(UserError, match="Use 'hf-hub:timm/vit_tiny' to load"):
        create_model("timm/vit_tiny")
    with pytest.raises(UserError, match="Unknown model source 's3'"):
        create_model("s3:vit_tiny")


# Weights of the caller's


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of the same model without registers and with three."""
    folder, registers = tmp_path_factory.mktemp("weights"), ("plain.pth", "registers.safetensors")
    model = randomise(create_model("deit_tiny", num_registers=3, depth=1, img_size=32))
    plain = {name: tensor for name, tensor in model.state_dict().items() if name != "reg_token"}
    torch.save({"model": plain, "args": argparse.Namespace(lr=1)}, folder / registers[0])
    save_file(model.state_dict(), folder / registers[1])
    return folder / registers[0], folder / registers[1]


TINY: dict[str, Any] = {"depth": 1, "img_size": 32}


def test_weights_of_a_file(weights: tuple[Path, Path]) -> None:
    plain, registers = weights
    model = create_model("deit_tiny", checkpoint_path=registers, **TINY)
    stored = load_file(registers)
    assert model.num_registers == 3
    assert all(torch.equal(model.state_dict()[name], stored[name]) for name in stored)
    more = create_model("deit_tiny", num_registers=5, checkpoint_path=str(plain), **TINY)
    assert torch.equal(more.cls_token, stored["cls_token"]) and more.num_registers == 5
    assert create_model("deit_tiny", checkpoint_path=plain, **TINY).num_registers == 0
    assert create_model("deit_tiny", checkpoint_path=plain, num_classes=3, **TINY).head.out_features == 3
    with pytest.raises(UserError, match="of a model with embed dim 192, deit_digits has 96"):
        create_model("deit_digits", checkpoint_path=plain)
    with pytest.raises(UserError, match=r"plain.pth cannot be evaluated as deit_tiny_distilled: distillation token"):
        create_model("deit_tiny_distilled", checkpoint_path=plain, **TINY)


def test_timm_loads_a_file_into_a_model_with_registers(weights: tuple[Path, Path]) -> None:
    """As any of timm's models: after it is made (checkpoint_path), or as its published weights (an overlay)."""
    plain, registers = weights
    stored = load_file(registers)
    with pytest.warns(UserWarning, match="have no registers: the 4 of the model stay as they are") as caught:
        model = timm.create_model("deit_tiny", num_registers=4, checkpoint_path=plain, **TINY)
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(model.head.weight, stored["head.weight"]) and model.reg_token.std() > 0
    model = timm.create_model("deit_tiny", num_registers=3, checkpoint_path=str(registers), **TINY)
    assert torch.equal(model.reg_token, stored["reg_token"])
    for file, count in itertools.product(weights, (0, 3, 5)):
        overlay = {"file": str(file)}
        model = timm.create_model("deit_tiny", True, pretrained_cfg_overlay=overlay, num_registers=count, **TINY)
        assert torch.equal(model.pos_embed, stored["pos_embed"])
        kept = min(count, 3) if file is registers else 0
        assert kept == 0 or torch.equal(model.reg_token[:, :kept], stored["reg_token"][:, :kept])
    with pytest.raises(UserError, match="wrong.pth"):
        timm.create_model("deit_tiny", True, pretrained_cfg_overlay={"file": "wrong.pth"}, **TINY)


def test_strict_loading_stays_strict_about_everything_but_registers(weights: tuple[Path, Path]) -> None:
    model, stored = create_model("deit_tiny", num_registers=4, **TINY), load_file(weights[1])
    with pytest.raises(RuntimeError, match="size mismatch for reg_token"):
        model.load_state_dict(stored)
    del stored["reg_token"]
    with pytest.warns(UserWarning, match="no registers"):
        assert model.load_state_dict(stored).missing_keys == ["reg_token"]
    del stored["cls_token"]
    with pytest.raises(RuntimeError, match="Missing key.*cls_token"):
        model.load_state_dict(stored)


# Saved models


def test_a_folder_of_ours_is_a_name(tmp_path: Path) -> None:
    merge = MergeConfig("mctf", 2, activate_layers=[0])
    saved = randomise(create_model("deit_digits", num_registers=2, merge=merge, depth=1, num_classes=5)).eval()
    save_folder(saved, "deit_digits", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["depth"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = f"local-dir:{tmp_path}"
    for make in (create_model, timm.create_model):
        model = make(name, pretrained=True).eval()
        assert model.merge == merge
        assert torch.equal(model(images()), saved(images()))
        assert make(name, pretrained=True, num_classes=3).head.out_features == 3
    assert not torch.equal(create_model(name).cls_token, saved.cls_token)
    other = create_model(name, num_registers=4, merge=MergeConfig(r=1), pretrained=True)
    assert (other.num_registers, other.merge.r) == (4, 1)
    assert torch.equal(other.reg_token[:, :2], saved.reg_token)
    assert len(timm.create_model(name, pretrained=True, features_only=True, out_indices=1)(images())) == 1


@pytest.mark.parametrize("name", ["deit_tiny", "deit_digits", "deit_tiny_patch16_224"])
def test_a_folder_of_timms_is_a_name(name: str, tmp_path: Path) -> None:
    """Also of our models: timm writes the arguments that they were made with."""
    ours: dict[str, Any] = {"num_registers": 2, "merge": MergeConfig(r=2).as_dict()} if name in NAMES else {}
    saved = randomise(timm.create_model(name, **TINY, **ours)).eval()
    saved.reset_classifier(7)
    save_for_hf(saved, tmp_path, safe_serialization=True)
    model = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert isinstance(model, MergingViT)
    assert (model.num_registers, model.merge.r) == ((2, 2) if ours else (0, 0))
    assert torch.equal(model(images()), saved(images()))
    assert registry.data_settings(f"local-dir:{tmp_path}")["input_size"] == 32


def test_a_folder_that_is_none_is_one_line(tmp_path: Path) -> None:
    for content in (None, "no json", '{"architecture": "resnet18"}', '{"architecture": "nobody_has_this"}', "{}"):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError) as caught:
            create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert str(tmp_path) in one_line(caught) or "not supported" in one_line(caught)


# torch.hub


def test_hub_entries(repo: Path) -> None:
    entries = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert entries == {*NAMES, "create_model", "load_folder", "MergeConfig"}
    assert hubconf.dependencies == ["torch", "timm"]
    for name in NAMES:
        assert name in getattr(hubconf, name).__doc__
    model = torch.hub.load(str(repo), "deit3_small", source="local", num_registers=2, depth=1, img_size=32)
    assert model.num_registers == 2
    assert model.embed_dim == 384


def test_hub_works_from_any_folder(repo: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch; hub = lambda *a, **k: torch.hub.load(sys.argv[1], *a, source='local', **k)\n"
        "model = hub('deit_digits', merge=hub('MergeConfig', r='8,4'), num_registers=2)\n"
        "print(model(torch.zeros(1, 3, 32, 32), trace=True).counts)"
    )
    command = [sys.executable, "-c", code, str(repo)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(59, 55, 55, 55, 55, 55)"
