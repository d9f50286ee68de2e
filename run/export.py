"""Export a model for other runtimes, and check what was written against eager PyTorch.

python run/export.py onnx --resume output/best.pth --out model.onnx
python run/export.py program --model deit_tiny --merge mctf --r 16 --out model.pt2
python run/export.py folder --model deit_small --resume output/best.pth --out exported/

`onnx` uses no scatter operator and takes any batch size unless --fixed_batch is given; `program` is torch.export's
.pt2; `folder` is safetensors + config.json, for `models.export.load_folder` and
`timm.create_model("local-dir:exported")`. All three carry the preprocessing and the class names, which
run/predict.py reads: in the metadata of an ONNX file, in metadata.json of a .pt2, in config.json of a folder.
All other options are main.py's (model, weights, merging).
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

import torch

from build import Inference, data_record, load_for_inference
from models import MergingViT, UserError
from models.export import (
    compare,
    export_metadata,
    export_onnx,
    export_program,
    load_folder,
    load_onnx,
    load_program,
    save_folder,
    save_program,
)
from options import Parser, check_heeded, exit_status, flags_of, parse_args
from utils import log

TOLERANCE = 1e-3  # of logits; a near tie that falls the other way moves them more


def random_batches(model: MergingViT, args: Namespace) -> list[torch.Tensor]:
    """Random images for the check: several sizes of a dynamic batch, several draws of a fixed one."""
    sizes = [args.batch_size + (0 if args.fixed_batch else 2 * i + 1) for i in range(args.checks)]
    return [random_images(model, size) for size in sizes]


def random_images(model: MergingViT, batch: int) -> torch.Tensor:
    return torch.randn(batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


# Each writes --out, and returns what was written as a function of images


def write_onnx(args: Namespace, loaded: Inference, example: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    export_onnx(loaded.model, example, args.out, dynamic=not args.fixed_batch, metadata=metadata(loaded))
    return load_onnx(args.out)


def write_program(args: Namespace, loaded: Inference, example: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    program = export_program(loaded.model, example, dynamic=not args.fixed_batch)
    save_program(program, args.out, metadata(loaded))
    return load_program(args.out)[0]


def write_folder(args: Namespace, loaded: Inference, example: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    save_folder(loaded.model, loaded.name, args.out, data_record(loaded))
    return load_folder(args.out)


def metadata(loaded: Inference) -> dict[str, Any]:
    return export_metadata(loaded.model, loaded.name, data_record(loaded))


def run(argv: Sequence[str]) -> int:
    """Write, check, report; returns 1 if the check fails."""
    args, main_argv = build_parser().parse_known_args(argv)
    heeded = {"resume", "dataset", "input_size", "eval_crop_ratio"}
    check_heeded(main_argv, flags_of("general", "model", "merging") | heeded, "an export")
    main_args = parse_args([*main_argv, "--eval"])
    if args.batch_size < (1 if args.fixed_batch else 2) or args.checks < 1:
        raise UserError("--batch_size must be at least 2 (1 with --fixed_batch), and --checks at least 1")
    loaded = load_for_inference(main_args)
    example = random_images(loaded.model, args.batch_size)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        written = args.write(args, loaded, example)
    except OSError as error:
        raise UserError(f"cannot write --out {args.out}: {error}") from error
    agreements = compare(loaded.model, written, random_batches(loaded.model, args))
    for row in agreements:
        log(f"batch {row.batch}: logits differ by at most {row.difference:.1e}, same top-1 {row.top1:.1%}")
    log(f"wrote {args.out}")
    if max(row.difference for row in agreements) > TOLERANCE:
        log(f"the check failed: logits differ by more than {TOLERANCE:g}")
        return 1
    return 0


def build_parser() -> Parser:
    parser = Parser(prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, write, text in (
        ("onnx", write_onnx, "an ONNX file, checked in onnxruntime"),
        ("program", write_program, "torch.export's program"),
        ("folder", write_folder, "safetensors and config.json"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--out", type=Path, required=True, metavar="PLACE")
        command.add_argument("--batch_size", type=int, default=4, help="of the example (default: 4)")
        command.add_argument("--fixed_batch", action="store_true", help="only this batch size")
        command.add_argument("--checks", type=int, default=3, metavar="N", help="batches to check on (default: 3)")
        command.set_defaults(write=write)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, 1 if the check fails, 2 after the user's mistake."""
    return exit_status("export.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
