"""The program around the instruments: models, images and output files for the commands of run/analyze.py.

This is the one module of analysis/ that knows the command line, the data sets and the loading of weights; instruments
import it inside their commands only, so that their mathematics and figures work without it. A command is
`run(args, main_argv)`: `args` are its own parsed flags, `main_argv` the remaining words, which are flags of main.py.

    models = load_models(args, main_argv)
    out = Output(args, main_argv, models)
    results = [measure(loaded.model, Images(args, loaded), label=loaded.label) for loaded in models]
    out.json("norms", {...}); out.npz(...); out.figure(...)
"""

import argparse
import copy
import difflib
import math
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from build import load_for_inference
from datasets import (
    Batch,
    DataConfig,
    ImageSet,
    build_data,
    build_eval_loader,
    open_images,
    unnormalise,
)
from distributed import init_distributed
from models import MergingViT, UserError
from models.gmacs import gmacs
from models.schedule import format_schedule
from options import FLAG_GROUPS, INFERENCE_GROUPS, Parser, check_heeded, flags_of, parse_args
from utils import Progress, git_revision, log, to_jsonable, versions, write_json

from . import charts

SHORT = {"registers": "num_registers", "weights": "finetune"}
MISSPELT = {"regs": "registers", "reg": "registers", "reg_tokens": "registers", "num_regs": "registers"}
DATA_FLAGS = ("--dataset", "--data_set", "--data_path")
BATCH_SIZE = "16"  # maps of attention are large
FORMATS = ("png", "pdf", "svg")
SPEC = "NAME[:WEIGHTS][,label=TEXT][,num_registers=4][,r=16][,FLAG=VALUE ...]"


@dataclass(frozen=True)
class Spec:
    """A model of the command line: its label (None: derived from name, registers, schedule) and flags of main.py."""

    label: str | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and how its images are prepared."""

    label: str
    model: MergingViT
    config: DataConfig
    args: Namespace  # main.py's
    device: torch.device
    source: str  # where its weights come from
    name: str  # of the architecture

    @property
    def slug(self) -> str:
        """The label as part of a file name."""
        return re.sub(r"[^\w.=-]+", "_", self.label).strip("_")

    def caption(self) -> str:
        """The model in one line, for figures: label, architecture or weights, registers, merging."""
        model, parts = self.model, []
        parts.append(f"{model.num_registers} registers" if model.num_registers else "no registers")
        merges = any(model.plan().merges)
        parts.append(f"{model.merge.method} r={format_schedule(model.merge.r)}" if merges else "no merging")
        name = "" if self.label.startswith(self.name) else f"{self.name}, "
        return f"{self.label}: {name}{', '.join(parts)}"

    def info(self) -> dict[str, Any]:
        """The model in plain values, for json."""
        model = self.model
        return {
            "label": self.label,
            "weights": self.source,
            "num_registers": model.num_registers,
            "merge": model.merge.method,
            "r": format_schedule(model.merge.r),
            "tokens": list(model.plan().counts),
            "input_size": list(model.patch_embed.img_size),
            "gmacs": round(gmacs(model), 4),
        }


def add_flags(parser: argparse.ArgumentParser, images: bool = True) -> None:
    """Add the flags that every command has. Those that are not here (--r, --merge, --dataset, ...) are main.py's."""
    group = parser.add_argument_group("models, images, output")
    group.add_argument("--model", metavar="NAME", help="ours or a timm ViT name (default: what --weights say)")
    group.add_argument("--weights", metavar="FILE|URL", help="any checkpoint (default: timm's published weights)")
    group.add_argument("--models", nargs="+", metavar="SPEC", help=f"several models instead; SPEC is {SPEC}")
    if images:
        text = "files, folders or patterns (else --dataset, as in main.py)"
        group.add_argument("--data", "--images", nargs="+", metavar="IMAGES", help=text)
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="figures, npz and json go here")
    group.add_argument("--format", nargs="+", choices=FORMATS, default=["png"], help="of figures (default: png)")
    group.add_argument("--dpi", type=int, default=120, metavar="N", help="of figures, 300 for print (default: 120)")
    parser.epilog = (
        "Also main.py's: --dataset --data_path --r --merge (and its options) --num_registers --input_size --limit "
        f"--batch_size (default {BATCH_SIZE}) --num_workers --seed --device; they hold for all models, those of a SPEC "
        "for that one."
    )


def parse_spec(text: str) -> Spec:
    """Read one model: `deit_small:w.pth,registers=4,label=with` -> label and flags of main.py.

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
        _check_key(key, text)
        if not equals or not value:
            raise UserError(f"--models: {item!r} of {text!r} is not KEY=VALUE; write {SPEC}")
        if key == "label":
            label = value
        elif value.lower() in ("true", "false"):
            flags.append(f"--{key}" if value.lower() == "true" else f"--no_{key}")
        else:
            flags.append(f"--{key}={value}")
    return Spec(label, tuple(flags))


def _check_key(key: str, text: str) -> None:
    """Refuse a key of a SPEC that no analysis heeds, with the nearest one that it does."""
    known = flags_of(*INFERENCE_GROUPS)
    if key == "label" or key in known or key.removeprefix("no_") in known:
        return
    if key.removeprefix("no_") in flags_of(*FLAG_GROUPS):
        return  # `main_args` says that it has no effect
    near = MISSPELT.get(key) or next(iter(difflib.get_close_matches(key, [*known, *SHORT, "label"], n=1)), None)
    hint = f"did you mean {near}? " if near else ""
    raise UserError(f"--models: unknown {key!r} in {text!r}; {hint}write {SPEC}")


def specs_of(args: Namespace) -> list[Spec]:
    """The models of a command line, from --models or --model and --weights."""
    if args.models and (args.model or args.weights):
        raise UserError("give either --models or --model and --weights, not both")
    if args.models:
        return [parse_spec(text) for text in args.models]
    if not args.model and not args.weights:
        raise UserError("no model: give --model NAME (and --weights FILE), or --models for several")
    name = ["--model", args.model] if args.model else []
    weights = ["--finetune", args.weights] if args.weights else []
    return [Spec(None, (*name, *weights))]


def _negative(flag: str) -> str:
    """Return the flag that switches off what a boolean flag switches on, or the other way round."""
    return f"--{flag[5:]}" if flag.startswith("--no_") else f"--no_{flag[2:]}"


def main_args(main_argv: Sequence[str], spec: Spec | None = None) -> Namespace:
    """Options of main.py for one model.

    Raises:
        UserError: an option that no instrument heeds.
    """
    own = spec.flags if spec else ()
    argv = [*(word for word in main_argv if _negative(word) not in own), *own]
    check_heeded(argv, flags_of(*INFERENCE_GROUPS), "an analysis")
    return parse_args(["--eval", "--batch_size", BATCH_SIZE, *argv])


def load_models(args: Namespace, main_argv: Sequence[str]) -> list[Loaded]:
    """Load all models before anything runs: mistakes come first. The first one is the baseline of comparisons."""
    specs = specs_of(args)
    if getattr(args, "data", None) is not None and any(token.split("=")[0] in DATA_FLAGS for token in main_argv):
        raise UserError("give either --data IMAGES or --dataset and --data_path, not both")
    models = [_load(spec, main_args(main_argv, spec)) for spec in specs]
    named: list[Loaded] = []
    for number, loaded in enumerate(models, start=1):
        taken = loaded.slug in [other.slug for other in named]  # its files would be overwritten
        named.append(replace(loaded, label=f"{loaded.label} {number}") if taken else loaded)
    _check_same_images(named)
    return named


def _check_same_images(models: Sequence[Loaded]) -> None:
    """Refuse models that would see different images: differences between them would be differences of images too."""
    for flag in ("limit", "dataset", "data_path"):
        values = list(dict.fromkeys(str(getattr(loaded.args, flag)) for loaded in models))
        if len(values) > 1:
            raise UserError(
                f"models are compared on the same images, but --{flag} is {' and '.join(values)}; give it once, "
                "outside of --models"
            )


def _load(spec: Spec, args: Namespace) -> Loaded:
    device = init_distributed(args.device).device
    loaded = load_for_inference(args, device)
    label = spec.label or _describe(loaded.name, loaded.model)
    return Loaded(label, loaded.model, loaded.config, args, device, loaded.source, loaded.name)


def _describe(name: str, model: MergingViT) -> str:
    parts = [name]
    if model.num_registers:
        parts.append(f"{model.num_registers} registers")
    if any(model.plan().merges):
        parts.append(f"{model.merge.method} r={format_schedule(model.merge.r)}")
    return ", ".join(parts)


class Images:
    """Batches of readable images, prepared for one model; unreadable ones are named and left out.

    It may be iterated several times, and shows a progress bar each time.

    Args:
        split: "val" or "train" of one of our data sets (evaluation's transform for both).
        title: of the progress bar, the model's label by default; several: of successive passes, the last one repeats.
        limit: take at most so many images, evenly spread.
    """

    def __init__(
        self,
        args: Namespace,
        loaded: Loaded,
        split: str = "val",
        title: str | Sequence[str] | None = None,
        limit: int | None = None,
    ) -> None:
        self.loaded, self.args = loaded, args
        self._titles = [title] if isinstance(title, str) else list(title or [loaded.label])
        self.set = image_set(args, loaded, split)
        if limit is not None and limit < len(self.set):
            keep = self.set.indices
            keep = range(keep.start, keep.stop, keep.step * math.ceil(len(keep) / limit))
            self.set = ImageSet(self.set.source, self.set.transform, self.set.size, keep)
        self.readable: list[int] = []  # indices of the images that the last pass has read
        self.note = self._describe(split)

    def _describe(self, split: str) -> str:
        """The images in words: where from, how many, and which of them a limit took."""
        total, step, folder = len(self.set.source.labels), self.set.indices.step, getattr(self.args, "data", None)
        name = " ".join(map(str, folder)) if folder is not None else f"{self.loaded.args.dataset} {split}"
        every = f", every {ordinal(step)} of {total}" if step > 1 else ""
        return f"{name}: {len(self)} images{every}"

    def __len__(self) -> int:
        """Number of images, unreadable ones included."""
        return len(self.set)

    def __iter__(self) -> Iterator[Batch]:
        title = self._titles.pop(0) if len(self._titles) > 1 else self._titles[0]
        loader = build_eval_loader(self.loaded.args, self.set, 0, 1)
        self.readable, done = [], 0
        for batch in track(loader, len(loader), title):
            self.readable += [done + i for i, ok in enumerate(batch.valid.tolist()) if ok]
            done += len(batch.valid)
            for name in batch.bad:
                log(f"unreadable, left out: {name}")
            if batch.valid.any():
                ok = batch.valid
                yield Batch(batch.images[ok].to(self.loaded.device), batch.targets[ok], ok[ok], batch.bad)

    def pictures(self, images: Tensor) -> np.ndarray:
        """Images (B,3,H,W) as they look: (B,H,W,3) in [0, 1]."""
        return unnormalise(images, self.loaded.config).permute(0, 2, 3, 1).cpu().numpy()

    def load(self) -> tuple[Tensor, np.ndarray]:
        """All images at once, for a few: (K,3,H,W) as the model sees them, and (K,H,W,3) in [0, 1]."""
        parts = [batch.images for batch in self]
        if not parts:
            raise UserError(f"none of the {len(self)} images to be drawn can be read")
        images = torch.cat(parts)
        return images, self.pictures(images)

    def names(self) -> list[str]:
        """Short names of the images that the last pass has read, in order: what stands beside their pictures."""
        return [Path(self.set.name(index)).name for index in self.readable]

    def only(self, positions: Sequence[int], title: str = "pictures") -> "Images":
        """Some of the images that the last pass has read, by their positions in it."""
        chosen = copy.copy(self)
        places = [self.set.indices[self.readable[position]] for position in positions]
        chosen.set = copy.copy(self.set)
        chosen.set.indices = places  # type: ignore[assignment]
        chosen.set.targets = self.set.source.labels[places]
        chosen._titles = [title]
        return chosen


def ordinal(number: int) -> str:
    """2nd, 3rd, 4th, 11th, 21st."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def track(items: Any, total: int, title: str) -> Iterator[Any]:
    """Iterate with a bar on a terminal, else with a line ten times in all."""
    progress = Progress(items, total, title, log_every=max(1, total // 10))
    for item in progress:
        yield item
        if progress.due and not sys.stderr.isatty():
            progress.show()


def image_set(args: Namespace, loaded: Loaded, split: str = "val") -> ImageSet:
    """The images of --data or --dataset with the model's evaluation transform."""
    places, of_main, config = getattr(args, "data", None), loaded.args, loaded.config
    if places is None and of_main.data_path is None and of_main.dataset == "IMNET":
        raise UserError("no images: give --data IMAGES, or --dataset (and --data_path) as in main.py")
    if places is None:
        with_train = Namespace(**{**vars(of_main), "eval": split == "val"})
        data = build_data(with_train, config)
        chosen = data.val if split == "val" else data.train
        assert chosen is not None
        return ImageSet(chosen.source, data.val.transform, config.input_size, chosen.indices)
    return open_images(places, of_main, config, "--data")


def labels_fit(args: Namespace, loaded: Loaded) -> bool:
    """Tell whether the images have labels that are the model's classes; a data set with other classes is logged."""
    if getattr(args, "data", None) is not None:
        return False
    classes, dataset = build_data(loaded.args, loaded.config).num_classes, loaded.args.dataset
    if classes != loaded.model.num_classes:
        log(f"note: {dataset} has {classes} classes, {loaded.label} {loaded.model.num_classes}: no accuracy")
    return classes == loaded.model.num_classes


def class_namer(args: Namespace, loaded: Loaded) -> Callable[[int], str]:
    """The names of the model's classes: of the data set if it has the same ones, ImageNet's for 1000, else numbers."""
    names: Sequence[str] = ()
    if getattr(args, "data", None) is None:
        names = build_data(loaded.args, loaded.config).class_names
    info = ImageNetInfo() if loaded.model.num_classes == 1000 else None
    if len(names) != loaded.model.num_classes:
        names = info.label_names() if info is not None else ()

    def named(index: int) -> str:
        name = names[index] if index < len(names) else f"class {index}"
        known = info is not None and name in info.label_names()
        return info.label_name_to_description(name).split(",")[0] if info is not None and known else name

    return named


class Output:
    """The files of one command: --out DIR, and what every json says about the run."""

    def __init__(self, args: Namespace, main_argv: Sequence[str], models: Sequence[Loaded]) -> None:
        self.folder = Path(args.out)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to --out {args.out} ({error.strerror}); name a folder") from error
        if args.dpi < 20:
            raise UserError(f"--dpi must be at least 20, not {args.dpi}")
        self.models, self.dpi, self.formats = models, args.dpi, list(dict.fromkeys(args.format))
        self.data = ""  # the images, in words
        self.run: dict[str, Any] = {
            "flags": {key: str(value) for key, value in vars(args).items() if key != "run" and value is not None},
            "main_flags": list(main_argv),
            "models": [loaded.info() for loaded in models],
            "device": str(models[0].device) if models else None,
            "versions": versions(),
            "git": git_revision(),
        }

    def about(self, data: str) -> None:
        """Say which images it is about, as in `Images.note`."""
        if data != self.data:
            log(f"images: {data}")
        self.data = self.run["data"] = data

    def json(self, name: str, content: dict[str, Any]) -> None:
        """Write NAME.json: `content` and, under "run", the command, versions, models."""
        write_json(self.folder / f"{name}.json", _finite(to_jsonable({**content, "run": self.run})))
        self.wrote(f"{name}.json")

    def npz(self, name: str, arrays: dict[str, Any]) -> None:
        """Write NAME.npz, compressed."""
        plain: dict[str, Any] = {
            key: value.cpu().numpy() if isinstance(value, Tensor) else value for key, value in arrays.items()
        }
        np.savez_compressed(self.folder / f"{name}.npz", **plain)
        self.wrote(f"{name}.npz")

    def figure(self, name: str, figure: Any) -> None:
        """Write NAME.png (or what --format says) of a matplotlib figure, with models and data below it."""
        charts.footer(figure, *self.captions())
        for form in self.formats:
            figure.savefig(self.folder / f"{name}.{form}", dpi=self.dpi)
            self.wrote(f"{name}.{form}")

    def captions(self) -> list[str]:
        """What every figure is of: the models with their merging, and the images."""
        return [line for line in ("; ".join(loaded.caption() for loaded in self.models), self.data) if line]

    def memmap(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """NAME.npy as an array of NaN in fp32 that is kept on the disk; announce it by `wrote` once it is filled."""
        array = np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape)
        array[:] = np.nan
        return array

    def wrote(self, file: str) -> None:
        """Announce a file."""
        log(f"wrote {self.folder / file}")


def _finite(plain: Any) -> Any:
    """Put None for numbers that JSON does not know: NaN (a mean of nothing) and infinity."""
    if isinstance(plain, dict):
        return {key: _finite(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_finite(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def add_patches_flag(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --patches 7,7;0,3: rows and columns of patches."""
    text = f"rows and columns of patches {what}, such as '7,7;0,3' (default: three)"
    parser.add_argument("--patches", type=_read_patches, metavar="R,C;R,C", help=text)


def _read_patches(text: str) -> list[tuple[int, int]]:
    """7,7;0,3 -> [(7, 7), (0, 3)]."""
    try:
        pairs = [tuple(int(number) for number in item.split(",")) for item in text.split(";")]
    except ValueError:
        pairs = [()]
    if not all(len(pair) == 2 and min(pair) >= 0 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of patches; write row,column;row,column such as 7,7;0,3")
    return [(pair[0], pair[1]) for pair in pairs]


def add_command(
    subparsers: Any, name: str, run: Callable[[Namespace, list[str]], None], text: str, images: bool = True
) -> Parser:
    """Add a command with the common flags; `run(args, main_argv)` does it."""
    form = argparse.RawDescriptionHelpFormatter
    parser: Parser = subparsers.add_parser(name, help=text, description=text, formatter_class=form, allow_abbrev=False)
    add_flags(parser, images)
    parser.set_defaults(run=run)
    return parser


def measure_shown(
    measure: Callable[..., Any], args: Namespace, models: Sequence[Loaded], out: Output, what: str, **options: Any
) -> list[Any]:
    """Measure all models on the images that are drawn, args.show of them; returns a result each.

    Args:
        measure: an instrument's, of (model, images, pictures), that takes captions and a label.
        what: is read off the models, for the progress bar.
        options: of `measure`.
    """
    results = []
    for loaded in models:
        images = Images(args, loaded, title=f"{what} of {loaded.label}", limit=args.show)
        out.about(images.note)
        tensor, pictures = images.load()
        results.append(measure(loaded.model, tensor, pictures, captions=images.names(), label=loaded.label, **options))
    return results
