"""What all commands of run/analyze.py share: models, images and output files, from one set of flags.

A command is `command(own, rest)`: `own` are its parsed flags, `rest` those of main.py. The usual shape is

    models, out = load_models(own, rest), Output(own, rest)
    for loaded in models:
        for batch in Images(own, loaded): ...
    out.json("norms", {...}); out.npz(...); out.png(...)
"""

import argparse
import math
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from build import Weights, build_config, build_model
from datasets import (
    Batch,
    DataConfig,
    FileSource,
    ImageSet,
    build_data,
    build_eval_loader,
    build_transform,
    unnormalise,
)
from distributed import init_distributed
from models import MergingViT, UserError
from models.gmacs import gmacs
from models.schedule import format_schedule
from options import Parser, parse_args
from utils import Progress, git_revision, log, seed_all, to_jsonable, versions, write_json

# options of main.py that mean something to an instrument; any other one would do nothing and is refused
MEANINGFUL = frozenset(
    "config dataset data_path input_size batch_size num_workers limit pin_mem eval_crop_ratio interpolation"
    " model num_registers register_layer pretrained finetune"
    " merge r activate_layer dense_layers prop_attn tau_sim tau_info tau_size bidirectional one_step_ahead pooling"
    " min_tokens local_grid global_layer seed device eval".split()
)
SHORT = {"registers": "num_registers", "weights": "finetune"}
DATA_FLAGS = ("--dataset", "--data_set", "--data_path")
BATCH_SIZE = "16"  # maps of attention are large
SPEC = "NAME[:WEIGHTS][,label=TEXT][,num_registers=4][,r=16][,FLAG=VALUE ...]"


@dataclass(frozen=True)
class Spec:
    """One model of the command line: its label (None: made from what it is) and flags of main.py."""

    label: str | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and how its images are prepared."""

    label: str
    model: MergingViT
    config: DataConfig
    args: Namespace  # of main.py
    device: torch.device
    source: str  # where its weights come from

    @property
    def slug(self) -> str:
        """The label as part of a file name."""
        return re.sub(r"[^\w.=-]+", "_", self.label).strip("_")

    def info(self) -> dict[str, Any]:
        """What it is, for json."""
        model, plan = self.model, self.model.plan()
        info = {"label": self.label, "weights": self.source, "num_registers": model.num_registers}
        info |= {"merge": model.merge.method, "r": format_schedule(model.merge.r), "tokens": list(plan.counts)}
        info |= {"input_size": list(model.patch_embed.img_size), "gmacs": round(gmacs(model), 4)}
        return info


def add_flags(parser: argparse.ArgumentParser, images: bool = True) -> None:
    """Flags of every command. What is not here (--r, --merge, --dataset, --limit, ...) is main.py's."""
    group = parser.add_argument_group("models, images, output")
    group.add_argument("--model", metavar="NAME", help="ours or a timm ViT name (default: what --weights say)")
    group.add_argument("--weights", metavar="FILE|URL", help="any checkpoint (default: timm's published weights)")
    group.add_argument("--models", nargs="+", metavar="SPEC", help=f"several models instead; SPEC is {SPEC}")
    if images:
        group.add_argument("--data", type=Path, metavar="FOLDER", help="images (else --dataset, as in main.py)")
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="PNG, npz and json go here")
    parser.epilog = (
        "Also main.py's: --dataset --data_path --r --merge (and its options) --num_registers --input_size --limit "
        f"--batch_size (default {BATCH_SIZE}) --num_workers --seed --device; they hold for all models, those of a SPEC "
        "for that one."
    )


def parse_spec(text: str) -> Spec:
    """`deit_small:w.pth,registers=4,label=with` -> label and flags of main.py.

    Commas inside brackets do not separate: r=(16,-1), r=[16,0,8]. Booleans are prop_attn=false.
    """
    head, *items = re.split(r",(?![^(\[]*[)\]])", text)
    name, _, weights = head.partition(":")
    if not name or "=" in name:
        raise UserError(f"--models: cannot read {text!r}; write {SPEC}")
    flags = ["--model", name, *(["--finetune", weights] if weights else [])]
    label = None
    for item in items:
        key, equals, value = item.partition("=")
        key = SHORT.get(key.strip(), key.strip()).replace("-", "_")
        if not equals or not value:
            raise UserError(f"--models: {item!r} of {text!r} is not KEY=VALUE; write {SPEC}")
        if key == "label":
            label = value
        elif value.lower() in ("true", "false"):
            flags.append(f"--{key}" if value.lower() == "true" else f"--no_{key}")
        else:
            flags.append(f"--{key}={value}")
    return Spec(label, tuple(flags))


def specs_of(own: Namespace) -> list[Spec]:
    """The models of a command line, from --models or --model and --weights."""
    if own.models and (own.model or own.weights):
        raise UserError("give either --models or --model and --weights, not both")
    if own.models:
        return [parse_spec(text) for text in own.models]
    if not own.model and not own.weights:
        raise UserError("no model: give --model NAME (and --weights FILE), or --models for several")
    flags = ["--model", own.model] if own.model else []
    return [Spec(None, tuple(flags + (["--finetune", own.weights] if own.weights else [])))]


def main_args(rest: Sequence[str], spec: Spec | None = None) -> Namespace:
    """Options of main.py for one model; one that no instrument heeds is refused."""
    tokens = ["--eval", "--batch_size", BATCH_SIZE, *rest, *(spec.flags if spec else ())]
    args, idle = parse_args(tokens), parse_args(["--eval", "--dataset", "IMNET"])
    if args.dataset == "DIGITS":  # its recipe differs from the defaults in many places
        idle = parse_args(["--eval", "--dataset", "DIGITS"])
    for name, value in vars(args).items():
        if name not in MEANINGFUL and value != getattr(idle, name):
            raise UserError(f"--{name} has no effect on an analysis; leave it out")
    return args


def load_models(own: Namespace, rest: Sequence[str]) -> list[Loaded]:
    """All models, loaded before anything runs: mistakes come first. The first one is the baseline of comparisons."""
    specs = specs_of(own)
    if getattr(own, "data", None) is not None and any(token.split("=")[0] in DATA_FLAGS for token in rest):
        raise UserError("give either --data FOLDER or --dataset and --data_path, not both")
    models = [_load(spec, main_args(rest, spec)) for spec in specs]
    named: list[Loaded] = []
    for number, (spec, loaded) in enumerate(zip(specs, models, strict=True), start=1):
        one = replace(loaded, label=spec.label or _describe(loaded))
        taken = one.slug in [other.slug for other in named]  # its files would be overwritten
        named.append(replace(one, label=f"{one.label} {number}") if taken else one)
    return named


def _load(spec: Spec, args: Namespace) -> Loaded:
    dist = init_distributed(args.device)
    seed_all(args.seed)
    weights = Weights(args, args.model)
    config = build_config(args, weights.name)
    if args.dataset == "DIGITS":
        config = build_data(args, config).config
    head = (weights.tensors() or {}).get("head.weight")
    classes: Any = None if head is None else len(head)  # None: the model's own
    model = build_model(args, weights, classes, config).to(dist.device).eval()
    return Loaded(weights.name, model, config, args, dist.device, weights.source)


def _describe(loaded: Loaded) -> str:
    model = loaded.model
    parts = [loaded.label]
    parts += [f"{model.num_registers} registers"] if model.num_registers else []
    merges = any(model.plan().merges)
    parts += [f"{model.merge.method} r={format_schedule(model.merge.r)}"] if merges else []
    return ", ".join(parts)


class Images:
    """Batches of readable images, prepared for one model; unreadable ones are named and left out.

    Args:
        split: of a data set of ours, "val" or "train" (evaluation's transform for both).
        title: of the progress bar; None: no bar.
    """

    def __init__(
        self, own: Namespace, loaded: Loaded, split: str = "val", title: str | None = None, limit: int | None = None
    ) -> None:
        self.loaded, self.title = loaded, title or loaded.label
        self.set = image_set(own, loaded, split)
        if limit is not None and limit < len(self.set):
            keep = self.set.indices
            keep = range(keep.start, keep.stop, keep.step * math.ceil(len(keep) / limit))
            self.set = ImageSet(self.set.source, self.set.transform, self.set.size, keep)

    def __len__(self) -> int:
        """Images, unreadable ones included."""
        return len(self.set)

    def __iter__(self) -> Iterator[Batch]:
        loader = build_eval_loader(self.loaded.args, self.set, 0, 1)
        for batch in track(loader, len(loader), self.title):
            for name in batch.bad:
                log(f"unreadable, left out: {name}")
            if batch.valid.any():
                ok = batch.valid
                yield Batch(batch.images[ok].to(self.loaded.device), batch.targets[ok], ok[ok], batch.bad)

    def pictures(self, images: Tensor) -> np.ndarray:
        """Images (B,3,H,W) as they look: (B,H,W,3) in [0, 1]."""
        return unnormalise(images, self.loaded.config).permute(0, 2, 3, 1).cpu().numpy()


def track(items: Any, total: int, title: str) -> Iterator[Any]:
    """Iterate with a bar on a terminal, else with a line ten times in all."""
    progress = Progress(items, total, title, log_every=max(1, total // 10))
    for item in progress:
        yield item
        if progress.due and not sys.stderr.isatty():
            progress.show()


def image_set(own: Namespace, loaded: Loaded, split: str = "val") -> ImageSet:
    """The images of --data or --dataset with the model's evaluation transform."""
    folder, args, config = getattr(own, "data", None), loaded.args, loaded.config
    if folder is None and args.data_path is None and args.dataset == "IMNET":
        raise UserError("no images: give --data FOLDER, or --dataset (and --data_path) as in main.py")
    if folder is None:
        both = Namespace(**{**vars(args), "eval": split == "val"})
        data = build_data(both, config)
        chosen = data.val if split == "val" else data.train
        assert chosen is not None
        return ImageSet(chosen.source, data.val.transform, config.input_size, chosen.indices)
    files = find_images(folder)
    source = FileSource(folder, files, [0] * len(files))
    step = math.ceil(len(files) / args.limit) if args.limit else 1
    transform = build_transform(args, config, train=False)
    return ImageSet(source, transform, config.input_size, range(0, len(files), step))


def find_images(folder: Path) -> list[str]:
    """Images below a folder, in order, relative to it; hidden ones are left out."""
    if not folder.is_dir():
        raise UserError(f"--data {folder} is not a folder; name one that holds images")
    found = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
    files = [str(file) for file in found if not any(part.startswith(".") for part in file.parts)]
    if not files:
        raise UserError(f"--data {folder} holds no image ({', '.join(IMG_EXTENSIONS)})")
    return files


class Output:
    """The files of one command: --out DIR, and what every json says about the run."""

    def __init__(self, own: Namespace, rest: Sequence[str], models: Sequence[Loaded]) -> None:
        self.folder = Path(own.out)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to --out {own.out} ({error.strerror}); name a folder") from error
        flags = {key: str(value) for key, value in vars(own).items() if key != "run" and value is not None}
        self.run: dict[str, Any] = {
            "flags": flags,
            "main_flags": list(rest),
            "models": [loaded.info() for loaded in models],
        }
        self.run |= {"device": str(models[0].device) if models else None, "versions": versions(), "git": git_revision()}

    def json(self, name: str, content: dict[str, Any]) -> None:
        """Write NAME.json: `content` and, under "run", the command, versions, models."""
        write_json(self.folder / f"{name}.json", _finite(to_jsonable({**content, "run": self.run})))
        self._say(f"{name}.json")

    def npz(self, name: str, arrays: dict[str, Any]) -> None:
        """Write NAME.npz, compressed."""
        plain: dict[str, Any] = {
            key: value.cpu().numpy() if isinstance(value, Tensor) else value for key, value in arrays.items()
        }
        np.savez_compressed(self.folder / f"{name}.npz", **plain)
        self._say(f"{name}.npz")

    def png(self, name: str, figure: Any) -> None:
        """Write NAME.png of a matplotlib figure."""
        figure.savefig(self.folder / f"{name}.png", dpi=120)
        self._say(f"{name}.png")

    def _say(self, file: str) -> None:
        log(f"wrote {self.folder / file}")


def _finite(plain: Any) -> Any:
    """None for numbers that JSON does not know: NaN (a mean of nothing) and infinity."""
    if isinstance(plain, dict):
        return {key: _finite(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_finite(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def add_command(subparsers: Any, name: str, run: Any, text: str, images: bool = True) -> Parser:
    """A command with the common flags; `run(own, rest)` does it."""
    form = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(name, help=text, description=text, formatter_class=form, allow_abbrev=False)
    add_flags(parser, images)
    parser.set_defaults(run=run)
    return parser
