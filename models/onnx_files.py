"""Other forms of an ONNX file that `export_onnx` wrote: int8, half precision, OpenVINO; and its metadata.

Every function changes a file in place, or not at all. onnx, onnxruntime and openvino are imported where they are used.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError, require
from .export import in_place_of

GRAPH, METADATA = "model.xml", "metadata.json"  # in a folder of OpenVINO
# What stays in single precision: numbers below 6e-8, which half precision does not have, keep divisions finite
SINGLE = ("Clip", "Div", "Log", "Pow", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "Softmax")


def quantise_onnx(file: Path, calibration: Iterable[Tensor] | None = None) -> None:
    """Weights of matrix products to 8 bits, one scale for each output; all else stays in fp32.

    Args:
        calibration: batches of images (B,3,H,W): activations get the fixed ranges that these have ("static"). None:
            every call measures them ("dynamic"), which is more exact.

    Raises:
        UserError: onnx or onnxruntime are not installed.
    """
    require("onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    options: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8}
    with _quiet(), in_place_of(file) as temporary:
        if calibration is None:
            # a convolution of 8 bits is slower than one of 32 on a CPU, and the patch embedding is but one
            quantize_dynamic(file, temporary, op_types_to_quantize=["MatMul", "Gemm"], **options)
            return
        graph = onnx.load(str(file), load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        between = [node.name for node in graph.node if node.op_type == "MatMul" and not set(node.input) & weights]
        quantize_static(
            file,
            temporary,
            _reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=between,  # of two activations, whose values a fixed range would cut
            activation_type=QuantType.QUInt8,
            **options,
        )


def _reader(calibration: Iterable[Tensor]) -> Any:
    """The batches as onnxruntime reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            images = next(self.batches, None)
            return None if images is None else {"images": images.numpy()}

    return Reader()


def halve_onnx(file: Path) -> None:
    """Weights and most activations to fp16, for runtimes on a GPU; images and logits stay in fp32.

    Raises:
        UserError: onnx or onnxruntime are not installed.
    """
    require("onnx", "onnxruntime")
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    blocked = [*DEFAULT_OP_BLOCK_LIST, *SINGLE]
    with _quiet(), in_place_of(file) as temporary:
        half = convert_float_to_float16(onnx.load(str(file)), keep_io_types=True, op_block_list=blocked)
        _drop_repeated(half.graph.node, lambda node: tuple(node.output))
        _drop_repeated(half.graph.value_info, lambda info: info.name)
        OnnxModel.graph_topological_sort(half.graph)
        onnx.save(half, str(temporary))


def _drop_repeated(entries: Any, name_of: Callable[[Any], Any]) -> None:
    """Drop later entries of a name: the converter casts a tensor once for every node that reads it."""
    first: dict[Any, Any] = {}
    for entry in entries:
        first.setdefault(name_of(entry), entry)
    del entries[:]
    entries.extend(first.values())


def describe_onnx(file: Path, metadata: Mapping[str, Any]) -> None:
    """Store metadata in a file, each value as json, in place of what it has of these names."""
    require("onnx")
    import onnx

    with in_place_of(file) as temporary:
        model = onnx.load(str(file), load_external_data=False)
        kept = {entry.key: entry.value for entry in model.metadata_props}
        onnx.helper.set_model_props(model, kept | {key: json.dumps(value) for key, value in metadata.items()})
        onnx.save(model, str(temporary))


@dataclass(frozen=True)
class OpenVinoModel:
    """A model in OpenVINO on the CPU; called with images (B,3,H,W) it returns logits (B,C).

    Attributes:
        batch: the only number of images that it takes; None: any.
        metadata: what `save_openvino` stored.
    """

    compiled: Any
    batch: int | None
    metadata: dict[str, Any]

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.compiled({"images": images.numpy()})[0].copy())


def save_openvino(file: Path, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write an ONNX file in OpenVINO's form: model.xml and model.bin, with the metadata in metadata.json.

    Raises:
        UserError: openvino is not installed.
    """
    openvino = _openvino()
    folder.mkdir(parents=True, exist_ok=True)
    openvino.save_model(openvino.Core().read_model(str(file)), str(folder / GRAPH), compress_to_fp16=False)
    (folder / METADATA).write_text(json.dumps(dict(metadata)))


def describe_openvino(folder: Path, metadata: Mapping[str, Any]) -> None:
    """As `describe_onnx`, for a folder of `save_openvino`."""
    file = folder / METADATA
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(metadata)))


def load_openvino(folder: Path, threads: int = 0) -> OpenVinoModel:
    """Read what `save_openvino` wrote.

    Args:
        threads: 0: OpenVINO's choice.

    Raises:
        UserError: openvino is not installed, or the folder is not one of ours.
    """
    openvino = _openvino()
    try:
        metadata = json.loads((folder / METADATA).read_text())
        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        compiled = core.compile_model(core.read_model(str(folder / GRAPH)), "CPU", settings)
        length = compiled.input("images").partial_shape[0]
    except Exception as error:  # openvino's error classes are not public
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder} is not a folder of run/export.py --openvino ({type(error).__name__}: {reason})"
        ) from error
    return OpenVinoModel(compiled, None if length.is_dynamic else length.get_length(), metadata)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UserError("openvino is not installed; pip install openvino") from error
    return openvino


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence advice of onnxruntime's tools, which log through the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
