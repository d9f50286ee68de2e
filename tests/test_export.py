"""Exported models compute what eager ones do, without scatters, for any batch; saved folders load back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny import every_method, images, ours
from torch import Tensor

from models import MergeConfig, UserError, create_model
from models.export import compare, export_onnx, load_folder, load_onnx, save_folder
from models.scatter_free import scatter_free
from run.export import main

aten = torch.ops.aten
MCTF = MergeConfig("mctf", r=3, min_tokens=4)


def onnx_operators(file: Path) -> set[str]:
    """Names of the operators of an ONNX file, functions included."""
    import onnx

    proto = onnx.load(str(file), load_external_data=False)
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    return {node.op_type for node in nodes}


@pytest.mark.parametrize("merge", every_method(depth=2, choices=False))
def test_onnx_agrees_with_eager_on_several_batches(merge: MergeConfig, tmp_path: Path) -> None:
    check_onnx(merge, True, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("merge", "dynamic"),
    [
        pytest.param(MergeConfig("none"), False, id="none"),
        pytest.param(MCTF, False, id="mctf-fixed"),
        pytest.param(replace(MCTF, one_step_ahead="precise", pooling="mean"), True, id="mctf-precise-mean"),
    ],
)
def test_onnx_of_other_settings(merge: MergeConfig, dynamic: bool, tmp_path: Path) -> None:
    check_onnx(merge, dynamic, tmp_path / "model.onnx")


def check_onnx(merge: MergeConfig, dynamic: bool, file: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = ours(merge, num_registers=2, depth=2)
    program = export_onnx(model, images(3), file, dynamic)
    operators = onnx_operators(file)
    assert not [name for name in operators if "Scatter" in name], operators
    batches = [images(size, seed=size) for size in ((1, 2, 5) if dynamic else (3, 3))]
    for run in (load_onnx(file), program.module()):
        for row in compare(model, run, batches):
            assert row.difference < 2e-5 and row.top1 == 1, row


# The rewritten operators, one by one, on shapes as the models have them

X, COLUMNS = torch.randn(2, 5, 4), torch.tensor([[0, 3, 3], [4, 4, 1]])
ROWS = COLUMNS.unsqueeze(-1).expand(-1, -1, 4)
MAP_INDEX = COLUMNS[:, None, None].expand(2, 3, 6, 3)


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        (aten.scatter.src, (torch.zeros(2, 5), 1, torch.tensor([[0, 3, 2], [4, 1, 2]]), torch.randn(2, 3))),
        (
            aten.scatter.src,
            (torch.zeros(2, 5).long(), 1, torch.tensor([[0, 3], [4, 1]]), torch.tensor([[7, 8], [9, 5]])),
        ),
        (aten.scatter_add.default, (torch.randn(2, 5), 1, COLUMNS, torch.randn(2, 3))),
        (aten.scatter_add.default, (torch.randn(2, 3, 6, 5), 3, MAP_INDEX, torch.randn(2, 3, 6, 3))),
        (aten.scatter_reduce.two, (X, 1, ROWS, torch.randn(2, 3, 4), "amax")),
        (
            aten.scatter_reduce.two,
            (torch.randn(2, 3, 5, 6), 2, MAP_INDEX.transpose(2, 3), torch.randn(2, 3, 3, 6), "amax"),
        ),
        (
            aten.index_add.default,
            (X.flatten(0, 1), 0, (COLUMNS + torch.tensor([[0], [5]])).flatten(), torch.randn(6, 4)),
        ),
        (aten.argsort.stable, (torch.tensor([[1, 0, 1, 0, 2, 0, 1]]),)),
    ],
    ids=lambda value: str(value) if not isinstance(value, tuple) else "",
)
def test_rewritten_operators_equal_their_originals(operator: Any, args: tuple[Any, ...]) -> None:
    rewritten = scatter_free(batch=2)[operator]
    for options in ({"stable": True, "descending": True}, {"stable": True}) if "sort" in str(operator) else ({},):
        torch.testing.assert_close(rewritten(*args, **options), operator(*args, **options))


def test_the_lowest_of_a_group_ignores_what_was_there() -> None:
    args = (torch.zeros(2, 5).long(), 1, COLUMNS, torch.tensor([[4, 7, 6], [2, 9, 8]]), "amin")
    operator = aten.scatter_reduce.two
    torch.testing.assert_close(
        scatter_free(2)[operator](*args, include_self=False), operator(*args, include_self=False)
    )


# Folders


@pytest.mark.parametrize("base", ["deit_tiny", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_a_folder_loads_back_through_timm_and_by_itself(base: str, tmp_path: Path) -> None:
    merge = MergeConfig(method="mctf", r=(0, 3), activate_layers=(1, 2), tau_info=5)
    model = create_model(base, num_registers=3, merge=merge, num_classes=7, img_size=64, register_layer=1).eval()
    save_folder(model, base, tmp_path, {"mean": (0.5, 0.5, 0.5), "crop_pct": 0.875, "input_size": 224})
    x = images(2, 64)
    # timm's way resolves model_args itself and overwrites nothing
    for loaded in (load_folder(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()):
        assert loaded.merge == merge and loaded.num_registers == 3 and loaded.register_layer == 1
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5] and config["pretrained_cfg"]["input_size"] == [3, 64, 64]


def test_hub_loads_a_folder(tmp_path: Path, repo: Path) -> None:
    model = create_model("deit_digits", num_registers=2, merge=MergeConfig(r=4)).eval()
    save_folder(model, "deit_digits", tmp_path)
    loaded = torch.hub.load(str(repo), "load_folder", str(tmp_path), source="local")
    assert torch.equal(loaded(images(2)), model(images(2)))


def test_a_folder_keeps_rectangular_images_and_patches_of_another_size(tmp_path: Path) -> None:
    model = create_model("deit_digits", 2, MergeConfig(r=3), img_size=(48, 24), patch_size=8).eval()
    save_folder(model, "deit_digits", tmp_path)
    loaded = load_folder(tmp_path)
    assert loaded.patch_embed.grid_size == (6, 3)
    assert torch.equal(loaded(images(2, (48, 24))), model(images(2, (48, 24))))


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a folder of run/export.py"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "num_classes": 2}')
    with pytest.raises(UserError, match="timm.create_model"):
        load_folder(tmp_path)
    save_folder(create_model("deit_digits"), "deit_digits", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read"):
        load_folder(tmp_path)


# The command line


def test_command_line_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "deit_digits", "--r", "8", "--num_registers", "2", "--checks", "2", "--batch_size", "2"]
    assert main(["folder", *model, "--out", str(tmp_path / "folder")]) == 0
    assert main(["program", *model, "--out", str(tmp_path / "model.pt2")]) == 0
    assert capsys.readouterr().out.count("same top-1 100.0%") == 2
    assert load_folder(tmp_path / "folder").num_registers == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["onnx", "--model", "deit_digits"],  # no --out
        ["other", "--out", "x"],
        ["program", "--model", "deit_digits", "--batch_size", "1", "--out", "x.pt2"],
        ["folder", "--model", "deit_digits", "--checks", "0", "--out", "x"],
        ["folder", "--model", "deit_digitz", "--out", "x"],
        ["folder", "--model", "deit_digits", "--finetune", "nowhere.pth", "--out", "x"],
    ],
)
def test_mistakes_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("export.py: error: ") and len(error.splitlines()) == 1


def test_a_failed_check_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(folder: Path) -> Any:
        loaded = load_folder(folder)

        def run(x: Tensor) -> Tensor:
            return loaded(x) + 1

        return run

    monkeypatch.setattr("run.export.load_folder", wrong)
    assert main(["folder", "--model", "deit_digits", "--checks", "1", "--out", str(tmp_path / "f")]) == 1
