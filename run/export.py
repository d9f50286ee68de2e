"""Export a model for other runtimes, and check what was written against eager PyTorch.

python run/export.py onnx --model deit_small --r 16 --num_registers 4 --finetune best.pth --out model.onnx
python run/export.py program --model deit_tiny --merge mctf --r 16 --out model.pt2
python run/export.py folder --model deit_small --resume output/best.pth --out exported/

`onnx` uses no scatter operator and takes any batch size unless --fixed_batch is given; `program` is torch.export's
.pt2; `folder` is safetensors + config.json, for `models.exporting.load_folder` and
`timm.create_model("local-dir:exported")`.
All other options are main.py's (model, weights, merging).
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build import Weights, build_config, build_model
from models import MergingViT, UserError
from models.exporting import Agreement, compare, export_onnx, export_program, load_folder, onnx_session, save_folder
from models.registry import data_settings
from options import Parser, parse_args
from utils import log, seed_all

TOLERANCE = 1e-3  # of logits; a near tie that falls the other way moves them more


def load(args: Namespace) -> tuple[MergingViT, str]:
    """The model on the CPU in evaluation mode, and its name."""
    seed_all(args.seed)
    weights = Weights(args, args.model)
    config = build_config(args, weights.name)
    head = (weights.tensors() or {}).get("head.weight")
    classes: Any = None if head is None else len(head)  # None: the model's own
    return build_model(args, weights, classes, config).eval(), weights.name


def batches(model: MergingViT, own: Namespace) -> list[torch.Tensor]:
    """Random images for the check: several sizes of a dynamic batch, several draws of a fixed one."""
    sizes = (
        [own.batch_size] * own.checks if own.fixed_batch else [own.batch_size + 2 * i + 1 for i in range(own.checks)]
    )
    channels, side = model.patch_embed.proj.in_channels, model.patch_embed.img_size
    return [torch.randn(size, channels, *side) for size in sizes]


def write_onnx(own: Namespace, model: MergingViT, name: str, example: torch.Tensor) -> list[Agreement]:
    export_onnx(model, example, own.out, dynamic=not own.fixed_batch)
    return compare(model, onnx_session(own.out), batches(model, own))


def write_program(own: Namespace, model: MergingViT, name: str, example: torch.Tensor) -> list[Agreement]:
    program = export_program(model, example, dynamic=not own.fixed_batch)
    torch.export.save(program, own.out)
    return compare(model, torch.export.load(own.out).module(), batches(model, own))


def write_folder(own: Namespace, model: MergingViT, name: str, example: torch.Tensor) -> list[Agreement]:
    settings = data_settings(name)
    save_folder(model, name, own.out, settings)
    return compare(model, load_folder(own.out), batches(model, own))


def run(own: Namespace, args: Namespace) -> int:
    """Write, check, report; 1 if the check fails."""
    if own.batch_size < (1 if own.fixed_batch else 2) or own.checks < 1:
        raise UserError("--batch_size must be at least 2 (1 with --fixed_batch), and --checks at least 1")
    model, name = load(args)
    try:
        (own.out if own.write is write_folder else own.out.parent).mkdir(parents=True, exist_ok=True)
        example = torch.randn(own.batch_size, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
        found = own.write(own, model, name, example)
    except OSError as error:
        raise UserError(f"cannot write --out {own.out}: {error}") from error
    for row in found:
        log(f"batch {row.batch}: logits differ by at most {row.difference:.1e}, same top-1 {row.top1:.1%}")
    log(f"wrote {own.out}")
    if max(row.difference for row in found) > TOLERANCE:
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
    try:
        own, rest = build_parser().parse_known_args(argv)
        return run(own, parse_args([*rest, "--eval"]))
    except UserError as error:
        print(f"export.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse after --help
        return int(stop.code or 0)


if __name__ == "__main__":
    sys.exit(main())
