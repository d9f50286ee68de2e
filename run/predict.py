"""Classify images: the most probable classes of each, by name.

python run/predict.py photo.jpg folder/ --resume output/best.pth
python run/predict.py 'photos/*.jpg' --resume exported/ --csv predictions.csv
python run/predict.py photo.jpg --resume model.onnx --json -
python run/predict.py photo.jpg --model deit_small --r 16 --picture merged.png

--resume takes a checkpoint, or what run/export.py wrote: a folder, an ONNX file, a .pt2, OpenVINO's folder. All of them
know their preprocessing and their classes. Model and merging options of a checkpoint are main.py's.
"""

import argparse
import csv
import io
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from build import load_for_inference, stored_config
from datasets import DataConfig, ImageSet, build_eval_loader, open_images, readable_samples, unnormalise
from distributed import init_distributed
from engine import build_precision
from models import MergingViT, UserError
from models.export import folder_data, load_folder, load_onnx, load_program
from models.onnx_files import GRAPH, load_openvino
from options import Parser, check_heeded, exit_status, flags_of, parse_args
from sources import find_images
from utils import Progress, RunError, atomic_write, to_jsonable

RUNTIME_FLAGS = frozenset({"device", "batch_size", "num_workers", "limit", "pin_mem", "seed"})
MODEL_FLAGS = {"resume", "dataset", "input_size", "eval_crop_ratio", "amp"} | RUNTIME_FLAGS
PICTURES = 5  # images that --picture shows at most


@dataclass(frozen=True)
class Classifier:
    """Anything that classifies images, whatever it runs in.

    Attributes:
        logits: of images (B,3,H,W), prepared as `config` says, on any device; (B,C) float32 on the CPU.
        class_names, class_labels: in the order of the logits, the second for people; None: unknown.
        batch: the only number of images that it takes; None: any.
        model: the eager model behind it; None: there is none.
    """

    logits: Callable[[Tensor], Tensor]
    config: DataConfig
    source: str
    class_names: tuple[str, ...] | None
    class_labels: tuple[str, ...] | None
    batch: int | None = None
    model: MergingViT | None = None

    def label(self, index: int) -> str:
        return self.class_labels[index] if self.class_labels else f"class {index}"

    def name(self, index: int) -> str:
        return self.class_names[index] if self.class_names else str(index)


# Loading


def load(argv: Sequence[str]) -> tuple[Classifier, Namespace]:
    """Load what --resume names, a checkpoint or an exported model; without it, the weights that main.py would take.

    Returns:
        The classifier, and main.py's options.
    """
    place = _exported(argv)
    if place is None:
        check_heeded(argv, flags_of("general", "model", "merging") | MODEL_FLAGS, "a prediction")
        args = parse_args([*argv, "--eval"])
        return _from_checkpoint(args), args
    check_heeded(argv, RUNTIME_FLAGS | {"resume"}, "an exported model, which is as it was exported")
    args = parse_args([*argv, "--eval"])
    if place.suffix == ".onnx":
        onnx = load_onnx(place)
        return _described(onnx, onnx.metadata.get("data"), str(place), onnx.batch), args
    if (place / GRAPH).is_file():
        vino = load_openvino(place)
        return _described(vino, vino.metadata.get("data"), str(place), vino.batch), args
    if place.suffix == ".pt2":
        program, metadata = load_program(place)
        return _described(program, metadata.get("data"), str(place)), args
    return _from_folder(place, args), args


def _exported(argv: Sequence[str]) -> Path | None:
    """Return the exported model that --resume names; None: it names a checkpoint, or is not given."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    text = parser.parse_known_args(list(argv))[0].resume
    place = Path(text).expanduser() if text else None
    if place is None or not (place.suffix in (".onnx", ".pt2") or place.is_dir()):
        return None
    if not place.exists():
        raise UserError(f"--resume {place} does not exist; check the path")
    if (place / "best.pth").is_file():
        raise UserError(f"--resume {place} is the folder of a run; name {place / 'best.pth'}")
    return place


def _from_checkpoint(args: Namespace) -> Classifier:
    device = init_distributed(args.device).device
    loaded = load_for_inference(args, device)
    precision = build_precision(args, device)

    def logits(images: Tensor) -> Tensor:
        with precision.autocast():
            return loaded.model(images.to(device)).float().cpu()

    names, labels = loaded.class_names, loaded.class_labels
    return Classifier(logits, loaded.config, loaded.source, names, labels, model=loaded.model)


def _from_folder(folder: Path, args: Namespace) -> Classifier:
    device = init_distributed(args.device).device
    model = load_folder(folder).to(device)
    try:
        data = folder_data(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is not a folder of run/export.py ({type(error).__name__}: {error})") from error
    return _described(lambda images: model(images.to(device)).float().cpu(), data, str(folder), model=model)


def _described(
    logits: Callable[[Tensor], Tensor],
    data: dict[str, Any] | None,
    source: str,
    batch: int | None = None,
    model: MergingViT | None = None,
) -> Classifier:
    if not data:
        raise UserError(f"{source} does not tell how its images are prepared; export it again with run/export.py")
    names, labels = tuple(data.get("class_names") or ()), tuple(data.get("class_labels") or ())
    return Classifier(logits, stored_config(data, source), source, names or None, labels or None, batch, model)


# Predicting


@torch.no_grad()
def predict(classifier: Classifier, images: ImageSet, args: Namespace, top: int) -> Iterator[dict[str, Any]]:
    """Yield a row per image, in order: its name with its `top` most probable classes, or with an error.

    Raises:
        RunError: the model's outputs are not finite.
    """
    loader = build_eval_loader(args, images, rank=0, world=1)
    index = 0
    for batch in Progress(loader, len(loader), "predict", log_every=10**9, is_main=sys.stderr.isatty()):
        probabilities = F.softmax(_logits(classifier, batch.images).double(), dim=1)
        if not probabilities[batch.valid].isfinite().all():
            raise RunError(f"{classifier.source} gives NaN or infinite outputs; its weights are damaged")
        best = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
        for valid, values, classes in zip(batch.valid.tolist(), best.values, best.indices, strict=True):
            row: dict[str, Any] = {"image": images.name(index)}
            index += 1
            if not valid:
                yield row | {"error": "unreadable"}
                continue
            pairs = zip(classes.tolist(), values.tolist(), strict=True)
            yield row | {
                "top": [
                    {"class": c, "name": classifier.name(c), "label": classifier.label(c), "probability": p}
                    for c, p in pairs
                ]
            }


def _logits(classifier: Classifier, images: Tensor) -> Tensor:
    """Run a batch, in portions of the size that a model of a fixed batch takes; the last is filled with zeros."""
    if classifier.batch is None:
        return classifier.logits(images)
    filled = F.pad(images, (0, 0) * 3 + (0, -len(images) % classifier.batch))
    return torch.cat([classifier.logits(part) for part in filled.split(classifier.batch)])[: len(images)]


# Output


def text_of(row: dict[str, Any]) -> str:
    """Format a row for people, in one line."""
    if "error" in row:
        return f"{row['image']}: {row['error']}, left out"
    return f"{row['image']}: " + ", ".join(f"{best['label']} {100 * best['probability']:.1f} %" for best in row["top"])


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as csv: a line per image and class, by rank; an unreadable image has one line without a class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "name", "label", "probability"])
    for row in rows:
        if "error" in row:
            writer.writerow([row["image"], "", "", "", row["error"], ""])
        for rank, best in enumerate(row.get("top", ()), start=1):
            values = [best["class"], best["name"], best["label"], f"{best['probability']:.6f}"]
            writer.writerow([row["image"], rank, *values])
    return text.getvalue()


def write(place: str, text: str, stdout: TextIO) -> None:
    """Write a file whole or not at all; - is the standard output."""
    if place == "-":
        stdout.write(text)
        return
    file = Path(place).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; name another place") from error
    atomic_write(file, lambda stream: stream.write(text.encode()))
    print(f"wrote {file}", file=sys.stderr)


def draw(classifier: Classifier, images: ImageSet, file: Path) -> None:
    """Draw what merged in the first images."""
    from analysis import merged_tokens  # matplotlib and Pillow's fonts are needed here only

    model = classifier.model
    assert model is not None, "checked in run"
    samples = readable_samples(images, range(min(len(images), PICTURES)))
    batch = torch.stack([sample.image for _, sample in samples])
    captions = tuple(Path(images.name(index)).name for index, _ in samples)
    pictures = unnormalise(batch, classifier.config)
    result = merged_tokens.measure(
        model, batch.to(next(model.parameters()).device), pictures=pictures, captions=captions, criteria=()
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        merged_tokens.draw(result, ("groups",), merged_tokens.spread_blocks(len(model.blocks))).save(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --picture {file}: {error}; name a .png file") from error
    print(f"wrote {file}", file=sys.stderr)


# The command


def build_parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="predict.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="images, folders of images, or patterns")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument(
        "--json", metavar="FILE", help="all rows, with what they were made of; - is the standard output"
    )
    parser.add_argument("--csv", metavar="FILE", help="a line per image and class; - is the standard output")
    text = f"what merged in the first images, at most {PICTURES}"
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help=text)
    parser.epilog = (
        "Also main.py's: --resume --finetune --model --num_registers --merge --r (and its options) --use_ema "
        "--input_size --eval_crop_ratio --batch_size --num_workers --limit --device --amp."
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Load, predict, print and write."""
    args, main_argv = _split(argv)
    if args.top < 1:
        raise UserError(f"--top must be at least 1, not {args.top}")
    if args.json == args.csv == "-":
        raise UserError("--json - and --csv - cannot both go to the standard output; name a file for one of them")
    find_images(args.images, "IMAGE")  # a mistake in the images is told before a model is loaded
    piped = "-" in (args.json, args.csv)
    with redirect_stdout(sys.stderr) if piped else nullcontext(sys.stdout):  # what is piped is the rows alone
        rows, seconds, source = _run(args, main_argv, piped)
    speed = len(rows) / seconds
    print(f"{len(rows)} images in {seconds:.2f} s: {speed:.1f} images/s, decoding included", file=sys.stderr)
    if args.json:
        content = {"source": source, "images_per_s": speed, "images": rows}
        write(args.json, json.dumps(to_jsonable(content), indent=1, allow_nan=False) + "\n", sys.stdout)
    if args.csv:
        write(args.csv, csv_of(rows), sys.stdout)
    return 0


def _run(args: Namespace, main_argv: Sequence[str], piped: bool) -> tuple[list[dict[str, Any]], float, str]:
    """Return the rows, the seconds that they took, and where the model comes from."""
    classifier, main_args = load(main_argv)
    if args.picture and (classifier.model is None or not any(classifier.model.plan().merges)):
        why = "this model merges nothing" if classifier.model else f"{classifier.source} does not show its tokens"
        raise UserError(f"--picture: {why}; give a checkpoint or a folder of a model that merges, or leave it out")
    images = open_images(args.images, main_args, classifier.config, "IMAGE")
    began, rows = time.perf_counter(), []
    for row in predict(classifier, images, main_args, args.top):
        rows.append(row)
        if not piped or "error" in row:
            print(text_of(row), flush=True)
    seconds = time.perf_counter() - began
    if all("error" in row for row in rows):
        raise UserError(f"none of the {len(rows)} images can be read; the first is {rows[0]['image']}")
    if args.picture:
        draw(classifier, images, args.picture)
    return rows, seconds, classifier.source


def _split(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Split a command line into this command's own flags and main.py's.

    Images may stand anywhere, so main.py's flags and their values are taken out first.
    """
    from options import build_parser as main_parser
    from options import normalise_flag

    spellings = main_parser().spellings()
    own, others, tokens = [], [], [normalise_flag(token) for token in argv]
    while tokens:
        token = tokens.pop(0)
        action = spellings.get(token.split("=")[0])
        if action is None or token == "--help":
            own.append(token)
            continue
        others.append(token)
        if "=" not in token and action.nargs != 0 and tokens:  # a flag with a value; none that predict heeds takes more
            others.append(tokens.pop(0))
    return build_parser().parse(own), others


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    return exit_status("predict.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
