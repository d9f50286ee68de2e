"""ONNX files as other tools take them: checkers, quantisers, half precision, OpenVINO; the flags of run/export.py."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from tiny import images, ours

import run.predict as predict
from models import MergeConfig, MergingViT, create_model
from models.export import compare, export_onnx, load_onnx, together
from models.scatter_free import scatter_free
from run.export import main

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from models import onnx_files  # noqa: E402

METHODS = {"tome": MergeConfig(r=3), "mctf": MergeConfig("mctf", r=3, min_tokens=4)}
# Products with a weight in two blocks. In the last one MCTF has two for q, k and v, and so has ToMe, for its queries
# there are those of the class token alone.
WEIGHTS = {"tome": 2 * 4 + 1, "mctf": 2 * 4 + 1}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[MergingViT, Path]]:
    """A model of each method and its file."""
    found = {}
    for name, merge in METHODS.items():
        model, file = ours(merge, 2, depth=2), tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
        export_onnx(model, images(3), file, metadata={"model": name, "data": {"input_size": [32, 32]}})
        found[name] = model, file
    return found


def copy_of(file: Path, folder: Path) -> Path:
    copied = folder / file.name
    copied.write_bytes(file.read_bytes())
    return copied


@pytest.mark.parametrize("method", METHODS)
def test_a_file_passes_checkers_and_a_users_own_quantiser(
    method: str, exported: dict[str, tuple[MergingViT, Path]], tmp_path: Path
) -> None:
    from onnxruntime.quantization import quantize_dynamic

    model, file = exported[method]
    proto = onnx.load(str(file))
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    weights = {tensor.name for tensor in proto.graph.initializer}
    assert not weights & {
        info.name for info in proto.graph.value_info
    }  # a tool that transposes one cannot contradict it
    constant = [node.op_type for node in proto.graph.node if set(node.input) and set(node.input) <= weights]
    assert constant == []  # nothing is left to fold
    products = [node for node in proto.graph.node if node.op_type == "MatMul" and set(node.input) & weights]
    assert len(products) == WEIGHTS[method]
    quantize_dynamic(file, tmp_path / "theirs.onnx")
    theirs = onnx.load(str(tmp_path / "theirs.onnx"))
    onnx.checker.check_model(theirs, full_check=True)
    assert Counter(node.op_type for node in theirs.graph.node)["MatMulInteger"] == WEIGHTS[method] + 1  # and the head
    assert together(compare(model, load_onnx(tmp_path / "theirs.onnx"), [images(5)])).kl < 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["dynamic", "static", "half"])
def test_other_precisions_stay_near_and_keep_the_metadata(
    method: str, form: str, exported: dict[str, tuple[MergingViT, Path]], tmp_path: Path
) -> None:
    model, file = exported[method]
    changed = copy_of(file, tmp_path)
    if form == "half":
        onnx_files.halve_onnx(changed)
    else:
        onnx_files.quantise_onnx(changed, [images(4), images(4, seed=2)] if form == "static" else None)
    onnx_files.describe_onnx(changed, {"precision": form})
    proto = onnx.load(str(changed))
    onnx.checker.check_model(proto, full_check=True)
    kinds = Counter(tensor.data_type for tensor in proto.graph.initializer if len(tensor.dims) == 2)
    assert kinds[onnx.TensorProto.FLOAT16 if form == "half" else onnx.TensorProto.INT8] > WEIGHTS[method]
    run = load_onnx(changed)
    assert run.metadata["model"] == method and run.metadata["precision"] == form and run.batch is None
    # a decision of the matching that falls otherwise changes one image much: most images hardly change
    with torch.no_grad():
        differences = (model(images(16)) - run(images(16))).abs().amax(dim=1)
    assert 0 < differences.median() < 0.2 * model(images(16)).std()
    assert [path.name for path in tmp_path.iterdir()] == [changed.name]


@pytest.mark.parametrize("method", METHODS)
def test_openvino_reads_and_reshapes(method: str, exported: dict[str, tuple[MergingViT, Path]], tmp_path: Path) -> None:
    openvino: Any = pytest.importorskip("openvino", reason="openvino is not installed")
    model, file = exported[method]
    network = openvino.Core().read_model(str(file))
    network.reshape({"images": [3, 3, 32, 32]})
    assert list(network.output("logits").shape) == [3, 10]
    onnx_files.save_openvino(file, tmp_path / "vino", {"data": {"input_size": [32, 32]}})
    onnx_files.describe_openvino(tmp_path / "vino", {"precision": "fp32"})
    run = onnx_files.load_openvino(tmp_path / "vino")
    assert run.batch is None and run.metadata == {"data": {"input_size": [32, 32]}, "precision": "fp32"}
    whole = together(compare(model, run, [images(2), images(5)]))
    assert whole.batch == 7 and whole.difference < 1e-3


def test_a_permutation_is_inverted_by_a_sort() -> None:
    index = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    args = (torch.full((3, 7), -1), 1, index, torch.arange(21).view(3, 7))
    operator = torch.ops.aten.scatter.src
    assert torch.equal(scatter_free(3)[operator](*args), operator(*args))


def test_flags_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, file = tmp_path / "photos", tmp_path / "int8.onnx"
    photos.mkdir()
    random = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(photos / f"{index}.png")
    model = ["onnx", "--model", "deit_digits", "--r", "6", "--device", "cpu", "--num_workers", "0", "--batch_size", "2"]
    few = ["--images", str(photos), "--max_images", "3"]
    with runs.toy_model():
        assert main([*model, *few, "--int8", "--opset", "18", "--out", str(file)]) == 0
        tokens = list(create_model("deit_digits", merge=MergeConfig(r=6)).plan().counts)
    assert f"3 images, {photos}: same top-1 " in capsys.readouterr().out
    stored = load_onnx(file).metadata
    assert stored["precision"] == "int8 dynamic" and stored["agreement"]["kl"] < 0.1
    assert stored["agreement"]["images"].startswith("3 images") and stored["tokens"] == tokens
    assert {entry.version for entry in onnx.load(str(file)).opset_import if not entry.domain} == {18}
    rows = tmp_path / "rows.json"
    flags = ["--resume", str(file), "--device", "cpu", "--num_workers", "0", "--json", str(rows)]
    assert predict.main([str(photos), *flags]) == 0
    assert len(json.loads(rows.read_text())["images"]) == 5
    capsys.readouterr()
    for wrong, message in (
        (["--int8", "--fp16"], "give --int8 or --fp16"),
        (["--int8", "static"], "need each other"),
        (["--calibration_path", str(photos)], "need each other"),
        (["--opset", "11"], "--opset must be 18 or later"),
        (["--images", str(photos / "none")], "does not exist"),
        (["--images", str(photos), "--fixed_batch", "--batch_size", "9"], "fewer readable images than --batch_size 9"),
    ):
        assert main([*model, *wrong, "--out", str(file)]) == 2
        assert message in capsys.readouterr().err
