"""What options ask for: weights, preprocessing and the model."""

import warnings
from argparse import Namespace
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from checkpoint import load_checkpoint, load_resume
from datasets import (
    Data,
    DataConfig,
    build_data,
)
from distributed import Distributed
from engine import (
    Precision,
    build_precision,
)
from models import MergeConfig, MergingViT, UserError, create_model
from models.gmacs import gmacs
from models.methods import all_knobs
from models.registry import OWN_SIZES, check_name, data_settings
from models.schedule import format_schedule, parse_schedule
from models.weights import extract_state_dict, load_weights
from utils import log, seed_all, setup_output


def merge_config(args: Namespace, stored: dict[str, Any] | None = None) -> MergeConfig:
    """The merging that the command line asks for, or a checkpoint's where it asks for nothing."""
    given = {name: getattr(args, name) for name in all_knobs() if getattr(args, name) is not None}
    if args.activate_layer is not None:
        given["activate_layers"] = args.activate_layer
    asks = args.merge is not None or args.r is not None or bool(given)
    if stored is not None and not asks and not (stored["method"] == "none" and args.r_evals):
        return MergeConfig.from_dict(stored)
    evaluated = [r for r in args.r_evals or () if parse_schedule(r) != 0]
    method = args.merge or ("tome" if args.r is not None or evaluated else "none")
    if method != "none" and args.r is None and not args.r_evals:
        raise UserError(f"--merge {method} merges nothing without an amount; give --r, for instance --r 16")
    r = args.r if args.r is not None else evaluated[0] if evaluated and method != "none" else 0
    return MergeConfig(method=method, r=r, **given)


class Weights:
    """Where weights come from: --resume wins over --finetune, which wins over published ones."""

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
        """The merging stored with our own checkpoint."""
        return self.state["merge"] if self.stored is not None and self.state is not None else None

    def tensors(self) -> dict[str, torch.Tensor] | None:
        """Weights in timm's names; None: published or random ones."""
        return None if self.state is None else extract_state_dict(self.state, source=str(self.path))[0]

    @property
    def source(self) -> str:
        return str(self.path or ("timm" if self.pretrained else "random"))


def build_model(args: Namespace, weights: Weights, num_classes: int | None, config: DataConfig) -> MergingViT:
    """The model with its weights; prints what was loaded."""
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
    """Preprocessing of a model's published weights, as flags change it."""
    check_name(name)
    config = DataConfig(**data_settings(name))
    changes = {"input_size": args.input_size, "crop_pct": args.eval_crop_ratio}
    return replace(config, **{key: value for key, value in changes.items() if value is not None})


def prepare(args: Namespace, dist: Distributed) -> tuple[Data, Weights, MergingViT, Precision]:
    """Everything that training and evaluation share, in the order in which mistakes are cheapest to find."""
    setup_output(args.output_dir, dist.is_main)
    seed_all(args.seed)  # the same fresh parameters on all ranks
    merge_config(args)
    precision = build_precision(args, dist.device)
    weights = Weights(args, args.model)
    data = build_data(args, build_config(args, weights.name))
    for note in data.notes:
        log(f"note: {note}")
    model = build_model(args, weights, data.num_classes, data.config).to(dist.device)
    describe(model, weights, data)
    return data, weights, model, precision


def describe(model: MergingViT, weights: Weights, data: Data) -> None:
    """What is about to run: model, weights, tokens per block and GMACs."""
    params = sum(p.numel() for p in model.parameters())
    log(f"{weights.name}: {params / 1e6:.2f} M parameters, {model.num_registers} registers, weights: {weights.source}")
    method, r = model.merge.method, format_schedule(model.merge.r)
    log(f"merging: {method}, r={r}; tokens per block: {list(model.plan().counts)}; {gmacs(model):.3f} GMACs")
    train = f"{len(data.train)} train, " if data.train is not None else ""
    log(f"data: {data.name}, {train}{len(data.val)} val images, {data.num_classes} classes")


def device_name(device: torch.device) -> str:
    """What a measurement ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


class Inference(NamedTuple):
    """A model in evaluation mode, and what it was made from."""

    model: MergingViT
    config: DataConfig  # how its images are prepared
    name: str
    source: str  # where its weights come from


def load_for_inference(args: Namespace, device: torch.device | str = "cpu") -> Inference:
    """The model that main.py's options ask for, without a data set: its classes are those of its weights."""
    seed_all(args.seed)
    weights = Weights(args, args.model)
    config = build_config(args, weights.name)
    if args.dataset == "DIGITS":  # normalised by its own mean
        config = build_data(args, config).config
    head = (weights.tensors() or {}).get("head.weight")
    classes = None if head is None else len(head)  # None: the model's own
    model = build_model(args, weights, classes, config).to(device).eval()
    return Inference(model, config, weights.name, weights.source)
