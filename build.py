"""Build what the options ask for: weights, preprocessing, the model, the teacher, and a model for scripts."""

import warnings
from argparse import Namespace
from dataclasses import replace
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from checkpoint import load_checkpoint, load_resume
from datasets import Data, DataConfig, build_data, with_own_normalisation
from distributed import Distributed
from engine import Precision, build_precision
from models import MergingViT, UserError, create_model
from models.gmacs import gmacs
from models.registry import NAMES, OWN_SIZES, check_name, data_settings, quick_when_offline, timm_name
from models.schedule import format_schedule
from models.weights import extract_state_dict, load_weights, unwrap_state_dict
from options import merge_config
from utils import log, seed_all, setup_output, without_credentials


class Weights:
    """Where weights come from: --resume wins over --finetune, which wins over published ones.

    Attributes:
        resumed: state and path of the checkpoint of --resume; None without one.
        path, state: file or URL and content that the model's weights are taken from; None: published or random weights.
        stored: arguments of the run that wrote the checkpoint, if it is one of ours.
        name: model of the command line, else of the checkpoint, else deit_small.
        pretrained: whether published weights are taken.
    """

    def __init__(self, args: Namespace, name: str | None) -> None:
        self.resumed = load_resume(args.resume, args.output_dir)
        if args.resume == "auto" and args.eval and self.resumed is None:
            raise UserError(f"--resume auto finds no checkpoint in {args.output_dir}; name a file")
        self.path = self.resumed[1] if self.resumed else args.finetune
        self.state = self.resumed[0] if self.resumed else (load_checkpoint(args.finetune) if args.finetune else None)
        state = self.state or {}
        ours = isinstance(state.get("args"), dict) and isinstance(state.get("merge"), dict)
        self.stored: dict[str, Any] | None = state["args"] if ours else None
        self.name = name or (self.stored or {}).get("model") or "deit_small"
        default = self.state is None and self.name not in OWN_SIZES
        self.pretrained = default if args.pretrained is None else args.pretrained and self.state is None
        if args.pretrained and self.state is not None:
            log(f"--pretrained gives way to {self.path}")

    @property
    def merge(self) -> dict[str, Any] | None:
        """The merging stored with a checkpoint of ours."""
        return self.state["merge"] if self.stored is not None and self.state is not None else None

    def tensors(self) -> dict[str, Tensor] | None:
        """Return the weights under timm's names; None: published or random ones."""
        return None if self.state is None else extract_state_dict(self.state, source=str(self.path))[0]

    @property
    def source(self) -> str:
        """Where the weights come from, for people."""
        return without_credentials(self.path or ("timm" if self.pretrained else "random"))


def build_model(args: Namespace, weights: Weights, num_classes: int | None, config: DataConfig) -> MergingViT:
    """Build the model and load its weights; prints what was loaded.

    The weights of a resumed run are loaded here too, through the adapter that serves --finetune: it knows the names of
    DeiT, timm and MCTF, and names what does not fit. `Trainer` restores the rest of such a checkpoint.

    Args:
        num_classes: None is the model's own number.
    """
    tensors = weights.tensors()
    registers, register_layer = args.num_registers, args.register_layer
    if tensors is not None and registers is None and "reg_token" in tensors:
        registers = tensors["reg_token"].shape[1]
    if weights.stored is not None and register_layer is None and registers:
        register_layer = weights.stored.get("register_layer")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = create_model(
            weights.name,
            num_registers=registers,
            merge=merge_config(args, weights.merge),
            num_classes=num_classes,
            img_size=config.input_size,
            pretrained=weights.pretrained,
            register_layer=register_layer or 0,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
        )
    for message in caught:
        log(f"warning: {message.message}")
    if tensors is not None:
        strict = args.eval or weights.resumed is not None
        report = load_weights(
            model, tensors, num_classes_changed_ok=not strict, source=str(weights.path), name=weights.name
        )
        for line in report.lines():
            log(f"{weights.path}: {line}")
    elif weights.pretrained and model.num_classes != 1000 and not args.eval:
        log(f"{weights.name}: published weights; the head is fresh, for {num_classes} classes")
    return model


def build_config(args: Namespace, name: str) -> DataConfig:
    """Return the preprocessing of a model's published weights, as flags change it."""
    check_name(name)
    config = DataConfig(**data_settings(name))
    changes = {"input_size": args.input_size, "crop_pct": args.eval_crop_ratio}
    return replace(config, **{key: value for key, value in changes.items() if value is not None})


def build_teacher(args: Namespace, num_classes: int, device: torch.device | str) -> nn.Module | None:
    """Build the frozen teacher on `device` in evaluation mode; None without distillation.

    It is any timm model, with weights from --teacher_path (file or URL) or published ones.

    Raises:
        UserError: no weights to be had, or not of these classes.
    """
    if args.distillation_type == "none":
        return None
    name, path = args.teacher_model, args.teacher_path
    if path:
        teacher = _teacher_from_file(name, path, num_classes, args.input_size)
    else:
        teacher = _published_teacher(timm_name(name), num_classes)
    return teacher.to(device).eval().requires_grad_(False)


def _teacher_from_file(name: str, path: str, num_classes: int, img_size: int | None) -> nn.Module:
    """Load a model of ours by our loading, any other by timm's, which knows the older names of each family."""
    weights = unwrap_state_dict(load_checkpoint(path), ema=True, source=path)
    if name in NAMES:
        return _own_teacher(name, weights, path, num_classes, img_size)
    overlay: dict[str, Any] = {"state_dict": weights, "num_classes": num_classes, "custom_load": False}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)
    except (RuntimeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--teacher_path {path} does not fit {name} with {num_classes} classes: {reason}") from error


def _own_teacher(name: str, weights: dict[str, Tensor], path: str, num_classes: int, img_size: int | None) -> nn.Module:
    weights, _ = extract_state_dict(weights, source=path)
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else None
    teacher = create_model(name, num_registers=registers, num_classes=num_classes, img_size=img_size)
    load_weights(teacher, weights, num_classes_changed_ok=False, source=path, name=name)
    return teacher


def _published_teacher(name: str, num_classes: int) -> nn.Module:
    try:
        with quick_when_offline():
            teacher = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        reason = f"{type(error).__name__}; no network?"
        raise UserError(f"cannot get weights of teacher {name} ({reason}); give a file with --teacher_path") from error
    if teacher.num_classes != num_classes:
        raise UserError(
            f"teacher {name} has {teacher.num_classes} classes, the data {num_classes}; give one by --teacher_path"
        )
    return teacher


def prepare(args: Namespace, dist: Distributed) -> tuple[Data, Weights, MergingViT, Precision]:
    """Build everything that training and evaluation share; the cheapest checks come first."""
    setup_output(args.output_dir, dist.is_main)
    seed_all(args.seed)  # the same fresh parameters on all ranks
    precision = build_precision(args, dist.device)
    weights = Weights(args, args.model)
    data = build_data(args, build_config(args, weights.name))
    for note in data.notes:
        log(f"note: {note}")
    model = build_model(args, weights, data.num_classes, data.config).to(dist.device)
    describe(model, weights, data)
    return data, weights, model, precision


def describe(model: MergingViT, weights: Weights, data: Data) -> None:
    """Print what is about to run: model, weights, tokens per block and GMACs."""
    params = sum(p.numel() for p in model.parameters())
    log(f"{weights.name}: {params / 1e6:.2f} M parameters, {model.num_registers} registers, weights: {weights.source}")
    method, r = model.merge.method, format_schedule(model.merge.r)
    log(f"merging: {method}, r={r}; tokens per block: {list(model.plan().counts)}; {gmacs(model):.3f} GMACs")
    train = f"{len(data.train)} train, " if data.train is not None else ""
    log(f"data: {data.name}, {train}{len(data.val)} val images, {data.num_classes} classes")


def device_name(device: torch.device) -> str:
    """Name the device that a measurement ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


class Inference(NamedTuple):
    """A model in evaluation mode, its preprocessing, and where both come from."""

    model: MergingViT
    config: DataConfig  # how its images are prepared
    name: str
    source: str  # of the weights


def load_for_inference(args: Namespace, device: torch.device | str = "cpu") -> Inference:
    """Build the model that main.py's options ask for, without a data set: its classes are those of its weights."""
    seed_all(args.seed)
    weights = Weights(args, args.model)
    config = build_config(args, weights.name)
    config = with_own_normalisation(config, args.dataset)
    head = (weights.tensors() or {}).get("head.weight")
    classes = None if head is None else len(head)  # None: the model's own
    model = build_model(args, weights, classes, config).to(device).eval()
    return Inference(model, config, weights.name, weights.source)
