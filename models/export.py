"""Models for other runtimes: torch.export, ONNX, and a folder of safetensors + config.json as timm writes them.

An instrument: eager models are not changed by it. `import models.export` also makes the architecture name "regtome"
known to timm, so that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads what `save_folder` wrote.
"""

import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import PatchEmbed
from timm.models import register_model
from torch import Tensor
from torch.export import Dim, ExportedProgram

from .config import MergeConfig
from .errors import UserError, require
from .onnx_graph import simplify
from .registry import FEATURE_KEYWORDS, create_model, feature_extractor
from .scatter_free import scatter_free
from .vit import MergingViT
from .weights import load_weights

ARCHITECTURE = "regtome"
MAX_BATCH = 4096
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_METADATA = ("model", "num_registers", "merge", "tokens", "data", "precision", "agreement")  # of a file


@dataclass(frozen=True)
class Agreement:
    """The difference between a runtime and eager PyTorch on one batch.

    Attributes:
        batch: images.
        difference: largest absolute difference of logits.
        top1: share of images with the same best class.
        kl: mean KL(eager || runtime) of the class probabilities, in nats.
    """

    batch: int
    difference: float
    top1: float
    kl: float


def export_program(model: MergingViT, images: Tensor, dynamic: bool = True) -> ExportedProgram:
    """torch.export of a model in evaluation mode, at its own schedule.

    Args:
        images: (B,3,H,W) an example; B > 1 with a dynamic batch.
        dynamic: accept any batch size, not only that of the example.
    """
    model = model.eval()
    shapes = ({0: Dim("batch", min=1, max=MAX_BATCH)},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=shapes)


def export_onnx(
    model: MergingViT,
    images: Tensor,
    file: Path,
    dynamic: bool = True,
    metadata: Mapping[str, Any] | None = None,
    opset: int | None = None,
) -> ExportedProgram:
    """Write an ONNX file without scatters; input "images", output "logits". Returns the program that it was made of.

    Args:
        metadata: stored with the model, each value as json.
        opset: version of ONNX's operators, 18 or later; None: torch's choice.

    Raises:
        UserError: onnx or onnxscript are not installed.
        OSError: the file cannot be written; what was there before is kept.
    """
    require("onnx", "onnxscript")
    program = export_program(model, images, dynamic)
    with torch.no_grad():
        plain = program.run_decompositions(scatter_free(len(images)))
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        written = torch.onnx.export(plain, (images,), dynamo=True, verbose=False, opset_version=opset, **names)
    assert written is not None  # only without dynamo
    simplify(written.model)
    for key, value in (metadata or {}).items():
        written.model.metadata_props[key] = json.dumps(value)
    with in_place_of(file) as temporary:
        written.save(str(temporary))
    return program


def save_program(program: ExportedProgram, file: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write torch.export's .pt2, with the metadata as json in its extra file "metadata.json".

    Raises:
        OSError: the file cannot be written; what was there before is kept.
    """
    with in_place_of(file) as temporary:
        torch.export.save(program, temporary, extra_files={"metadata.json": json.dumps(metadata or {})})


def load_program(file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """Read what `save_program` wrote: a function of images, and the metadata."""
    extra = {"metadata.json": ""}
    if not zipfile.is_zipfile(file):  # torch.export would log a traceback first
        raise UserError(f"{file} is not a .pt2 of run/export.py; name a file that it wrote")
    try:
        program = torch.export.load(file, extra_files=extra)
    except Exception as error:  # torch.export has no error class of its own for foreign files
        raise UserError(f"{file} is not a .pt2 of run/export.py ({type(error).__name__}: {error})") from error
    return program.module(), json.loads(extra["metadata.json"] or "{}")


@contextmanager
def in_place_of(file: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `file` when it is whole; a full disk is an OSError."""
    temporary = file.with_name(f"{file.stem}.{os.getpid()}.tmp{file.suffix}")
    try:
        yield temporary
        os.replace(temporary, file)
    except (SafetensorError, RuntimeError) as error:  # how safetensors and torch.save word a full disk
        if "write" not in str(error).lower() and "space" not in str(error).lower():
            raise
        raise OSError(" ".join(str(error).split())) from error
    finally:
        temporary.unlink(missing_ok=True)


def export_metadata(model: MergingViT, base: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a file for another runtime tells of its model.

    Args:
        base: the name that `create_model` made the model of.
        data: preprocessing (input_size, mean, std, interpolation, crop_pct) and classes (class_names, class_labels).
    """
    return {
        "model": base,
        "num_registers": model.num_registers,
        "merge": model.merge.as_dict(),
        "tokens": list(model.plan().counts),
        "data": dict(data),
    }


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file in onnxruntime on the CPU; called with images (B,3,H,W) it returns logits (B,C).

    Attributes:
        batch: the only number of images that it takes; None: any.
        metadata: what `export_onnx` stored.
    """

    session: Any
    batch: int | None
    metadata: dict[str, Any]

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"images": images.numpy()})[0])


def load_onnx(file: Path, threads: int = 0) -> OnnxModel:
    """Read an ONNX file of `export_onnx`.

    Args:
        threads: that share an operator; 0: onnxruntime's choice.

    Raises:
        UserError: onnxruntime is not installed, or the file is not one of ours.
    """
    require("onnxruntime")
    import onnxruntime  # only where it is asked for: half a second

    try:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        shape = {node.name: node.shape for node in session.get_inputs()}["images"]
        stored = session.get_modelmeta().custom_metadata_map
        metadata = {key: json.loads(stored[key]) for key in _METADATA if key in stored}
    except Exception as error:  # onnxruntime's error classes are not public
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not an ONNX file of run/export.py ({type(error).__name__}: {reason})") from error
    return OnnxModel(session, shape[0] if isinstance(shape[0], int) else None, metadata)


def compare(model: MergingViT, run: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> list[Agreement]:
    """A runtime against the eager model, batch by batch."""
    agreements = []
    for images in batches:
        with torch.inference_mode():
            expected, logits = model.eval()(images), run(images)
            expected_log, logs = expected.double().log_softmax(dim=1), logits.double().log_softmax(dim=1)
        same = (expected.argmax(1) == logits.argmax(1)).double().mean()
        kl = (expected_log.exp() * (expected_log - logs)).sum(dim=1).mean()
        difference = float((expected - logits).abs().max())
        agreements.append(Agreement(len(images), difference, float(same), max(float(kl), 0.0)))
    return agreements


def together(agreements: Sequence[Agreement]) -> Agreement:
    """Several batches as one: means over images, and the largest difference."""
    images = sum(row.batch for row in agreements)
    mean = {name: sum(row.batch * getattr(row, name) for row in agreements) / images for name in ("top1", "kl")}
    differences = [row.difference for row in agreements]
    worst = max(differences) if all(map(math.isfinite, differences)) else math.nan
    return Agreement(images, worst, **mean)


def save_folder(model: MergingViT, base: str, folder: Path, data: dict[str, Any] | None = None) -> None:
    """Weights and what rebuilds the model: model.safetensors and config.json.

    Args:
        base: the name that `create_model` made the model of.
        data: preprocessing (mean, std, interpolation, crop_pct) and classes (class_names, class_labels).

    Raises:
        UserError: the folder holds other files, and no model.
        OSError: the disk is full or fails.
    """
    fresh = not folder.exists()
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _CONFIG).is_file():
        raise UserError(f"{folder} holds other files, and no model; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    config = json.dumps(folder_config(model, base, data or {}), indent=2) + "\n"
    try:
        with in_place_of(folder / _WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        with in_place_of(folder / _CONFIG) as temporary:
            temporary.write_text(config)
    except BaseException:
        if fresh:  # nothing half-written stays
            shutil.rmtree(folder, ignore_errors=True)
        raise


def folder_config(model: MergingViT, base: str, data: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json, in the form of timm's."""
    size = tuple(model.patch_embed.img_size)
    arguments = {"base": base, "num_registers": model.num_registers, "merge": model.merge.as_dict()}
    arguments |= {"register_layer": model.register_layer, "class_layer": model.class_layer}
    side = size[0] if size[0] == size[1] else list(size)
    arguments |= {"img_size": side, "num_classes": model.num_classes}  # timm passes model_args on, and only them
    if type(model.patch_embed) is PatchEmbed:
        arguments["patch_size"] = list(model.patch_embed.patch_size)
    settings = {key: value for key, value in data.items() if key in ("mean", "std", "interpolation", "crop_pct")}
    pretrained = {"input_size": (3, *size), "num_classes": model.num_classes, "fixed_input_size": True}
    pretrained |= {"first_conv": "patch_embed.proj", "classifier": "head"} | settings
    names, labels = list(data.get("class_names") or ()), list(data.get("class_labels") or ())
    classes = {"label_names": names, "label_descriptions": dict(zip(names, labels, strict=True))} if names else {}
    return {
        "architecture": ARCHITECTURE,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
        **classes,
    }


def folder_data(folder: str | Path) -> dict[str, Any]:
    """The preprocessing and the classes of a folder, under the names that `save_folder` takes them by."""
    config = json.loads((Path(folder) / _CONFIG).read_text())
    pretrained = config["pretrained_cfg"]
    settings = {key: pretrained[key] for key in ("mean", "std", "interpolation", "crop_pct") if key in pretrained}
    names = config.get("label_names") or []
    labels = config.get("label_descriptions") or {}
    classes = {"class_names": names, "class_labels": [labels.get(name, name) for name in names]}
    return {"input_size": list(pretrained["input_size"][1:]), **settings, **classes}


def load_folder(folder: str | Path) -> MergingViT:
    """The model that `save_folder` wrote, in evaluation mode.

    Raises:
        UserError: not such a folder.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / _CONFIG).read_text())
        if config["architecture"] != ARCHITECTURE:
            raise UserError(f"{folder} holds timm's {config['architecture']}; load it with timm.create_model")
        arguments = dict(config["model_args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} is not a folder of run/export.py ({type(error).__name__}: {error})") from error
    return regtome(pretrained=True, pretrained_cfg={"file": str(folder)}, **arguments).eval()


@register_model
def regtome(pretrained: bool = False, base: str = "deit_small", merge: Any = None, **options: Any) -> MergingViT:
    """timm's entry for saved models: `create_model(base, ...)`, with the weights of a folder if pretrained.

    Args:
        base: a name of `create_model`.
        merge: a `MergeConfig`, or its plain dict out of config.json.
    """
    features = {key: options.pop(key) for key in FEATURE_KEYWORDS if key in options}
    if features:
        model = regtome(pretrained, base, merge, **options)
        return feature_extractor(model, **features)  # type: ignore[return-value]
    cfg = options.pop("pretrained_cfg", None)
    folder = cfg.get("file") if isinstance(cfg, dict) else getattr(cfg, "file", None)
    for name in ("pretrained_cfg_overlay", "pretrained_model_args", "cache_dir"):
        options.pop(name, None)
    merge = MergeConfig.from_dict(merge) if isinstance(merge, dict) else merge
    if not pretrained:
        return create_model(base, merge=merge, **options)
    if not folder:
        raise UserError(f"{ARCHITECTURE} has no published weights; name a folder of run/export.py")
    model = create_model(base, merge=merge, **options)
    # another num_classes than the folder's makes a fresh head, as in timm
    load_weights(model, _read_weights(Path(folder)), source=str(folder), name=base)
    return model


def _read_weights(place: Path) -> dict[str, Tensor]:
    file = place / _WEIGHTS if place.is_dir() else place
    try:
        return load_file(file)
    except Exception as error:  # safetensors has one error class of its own, which it does not document
        raise UserError(f"cannot read {file}: {error}") from error
