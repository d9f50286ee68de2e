"""Export a model for other runtimes, and check what was written against eager PyTorch.

python run/export.py onnx --resume output/best.pth --out model.onnx
python run/export.py onnx --resume output/best.pth --int8 --images photos/ --out int8.onnx --openvino openvino/
python run/export.py program --model deit_tiny --merge mctf --r 16 --out model.pt2
python run/export.py folder --model deit_small --resume output/best.pth --out exported/

`onnx` uses no scatter operator and takes any batch size unless --fixed_batch is given; `program` is torch.export's
.pt2; `folder` is safetensors + config.json, for `models.export.load_folder` and
`timm.create_model("local-dir:exported")`. All three carry the preprocessing and the class names, which
run/predict.py reads: in the metadata of an ONNX file, in metadata.json of a .pt2, in config.json of a folder.

What was written is run beside the eager model: --images names images for that, --data_path takes those of the data
set's validation split, and without either random images show that the logits are the same, but say nothing of what
8 bits or half precision cost. Agreement and KL are printed and stored with the model. All other options are main.py's
(model, weights, merging).
"""

import argparse
import math
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
from datasets import ImageSet, build_data, build_eval_loader, open_images
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
    together,
)
from models.onnx_files import (
    OpenVinoModel,
    describe_onnx,
    describe_openvino,
    halve_onnx,
    load_openvino,
    quantise_onnx,
    save_openvino,
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


def image_batches(images: ImageSet, args: Namespace, main_args: Namespace, limit: int) -> list[torch.Tensor]:
    """The readable ones of at most `limit` images, evenly spread, in batches of --batch_size."""
    step = -(-len(images.indices) // limit)
    chosen = ImageSet(images.source, images.transform, images.size, images.indices[::step])
    main_args.batch_size = args.batch_size
    batches = [batch.images[batch.valid] for batch in build_eval_loader(main_args, chosen, 0, 1)]
    whole = [batch for batch in batches if len(batch) == args.batch_size or (len(batch) and not args.fixed_batch)]
    if not whole:
        raise UserError(f"there are fewer readable images than --batch_size {args.batch_size}; name more, or lower it")
    return whole


def check_batches(args: Namespace, main_args: Namespace, loaded: Inference) -> tuple[list[torch.Tensor], str]:
    """The images of the check, and what they are in words."""
    if args.images:
        batches = image_batches(open_images(args.images, main_args, loaded.config), args, main_args, args.max_images)
        name = " ".join(map(str, args.images))
    elif main_args.data_path is not None:
        validation = build_data(main_args, loaded.config).val
        batches = image_batches(validation, args, main_args, args.max_images)
        name = f"{main_args.dataset} val"
    else:
        batches, name = random_batches(loaded.model, args), "random images"
    return batches, f"{sum(map(len, batches))} images, {name}"


# Each writes --out, and returns what was written as a function of images


def write_onnx(
    args: Namespace, main_args: Namespace, loaded: Inference, example: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    calibration = None
    if args.int8 == "static":
        images = open_images([args.calibration_path], main_args, loaded.config, "--calibration_path")
        calibration = image_batches(images, args, main_args, args.max_images)
    stored = metadata(loaded) | {"precision": precision(args)}
    export_onnx(loaded.model, example, args.out, not args.fixed_batch, stored, args.opset)
    if args.int8:
        quantise_onnx(args.out, calibration)
    if args.fp16:
        halve_onnx(args.out)
    return load_onnx(args.out)


def precision(args: Namespace) -> str:
    """What a file's numbers are: fp32, fp16, int8 dynamic, int8 static."""
    return f"int8 {args.int8}" if args.int8 else "fp16" if args.fp16 else "fp32"


def write_program(
    args: Namespace, main_args: Namespace, loaded: Inference, example: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    program = export_program(loaded.model, example, dynamic=not args.fixed_batch)
    save_program(program, args.out, metadata(loaded))
    return load_program(args.out)[0]


def write_folder(
    args: Namespace, main_args: Namespace, loaded: Inference, example: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    save_folder(loaded.model, loaded.name, args.out, data_record(loaded))
    return load_folder(args.out)


def metadata(loaded: Inference) -> dict[str, Any]:
    return export_metadata(loaded.model, loaded.name, data_record(loaded))


def run(argv: Sequence[str]) -> int:
    """Write, check, report; returns 1 if the check fails."""
    args, main_argv = build_parser().parse_known_args(argv)
    heeded = {"resume", "dataset", "data_path", "input_size", "eval_crop_ratio", "num_workers"}
    check_heeded(main_argv, flags_of("general", "model", "merging") | heeded, "an export")
    main_args = parse_args([*main_argv, "--eval"])
    check_flags(args)
    loaded = load_for_inference(main_args)
    batches, about = check_batches(args, main_args, loaded)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        written = args.write(args, main_args, loaded, random_images(loaded.model, args.batch_size))
        good = check_written(args, loaded, written, batches, about)
        if args.command == "onnx" and args.openvino:
            save_openvino(args.out, args.openvino, load_onnx(args.out).metadata)
            good &= check_written(args, loaded, load_openvino(args.openvino), batches, about)
    except OSError as error:
        raise UserError(f"cannot write --out {args.out}: {error}") from error
    return 0 if good else 1


def check_flags(args: Namespace) -> None:
    """Raise a UserError for options that contradict each other."""
    if args.batch_size < (1 if args.fixed_batch else 2) or args.checks < 1 or args.max_images < 1:
        raise UserError(
            "--batch_size must be at least 2 (1 with --fixed_batch), and --checks and --max_images at least 1"
        )
    if args.command != "onnx":
        return
    if args.int8 and args.fp16:
        raise UserError("give --int8 or --fp16, not both")
    if (args.int8 == "static") != (args.calibration_path is not None):
        raise UserError("--int8 static and --calibration_path IMAGES need each other: the images give the ranges")
    if args.opset is not None and args.opset < 18:
        raise UserError(f"--opset must be 18 or later, not {args.opset}")


def check_written(
    args: Namespace,
    loaded: Inference,
    written: Callable[[torch.Tensor], torch.Tensor],
    batches: list[torch.Tensor],
    about: str,
) -> bool:
    """Run what was written beside the eager model, print and store how well they agree; False if they do not."""
    agreements = compare(loaded.model, written, batches)
    whole = together(agreements)
    found = {"images": about, "top1": whole.top1, "kl": whole.kl, "difference": whole.difference}
    place, exact = args.out, args.command != "onnx" or precision(args) == "fp32"
    if isinstance(written, OpenVinoModel):
        place = args.openvino
        describe_openvino(place, {"agreement": found})
    elif args.command == "onnx":
        describe_onnx(place, {"agreement": found})
    log(
        f"{about}: same top-1 {whole.top1:.1%}, KL {whole.kl:.2g}, logits differ by at most {whole.difference:.1e}"
        + ("" if args.images or "random" not in about else " (random images: no measure of accuracy)")
    )
    log(f"wrote {place}")
    if not math.isfinite(whole.difference) or (exact and whole.difference > TOLERANCE):
        log(f"the check failed: logits differ by more than {TOLERANCE:g}" if exact else "the check failed: no numbers")
        return False
    return True


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
        command.add_argument("--checks", type=int, default=3, metavar="N", help="random batches (default: 3)")
        command.add_argument("--images", nargs="+", metavar="IMAGES", help="files, folders or patterns to check on")
        text = "to check and to calibrate on at most (default: 200)"
        command.add_argument("--max_images", type=int, default=200, metavar="N", help=text)
        command.set_defaults(write=write)
        if name == "onnx":
            add_onnx_flags(command)
    return parser


def add_onnx_flags(command: Parser) -> None:
    kinds = ("dynamic", "static")
    text = "weights of 8 bits; activations by each call's range (dynamic), or by that of --calibration_path (static)"
    command.add_argument("--int8", nargs="?", choices=kinds, const="dynamic", help=text)
    command.add_argument("--calibration_path", metavar="IMAGES", help="a folder of images, of --int8 static")
    command.add_argument("--fp16", action="store_true", help="half precision, for runtimes on a GPU")
    command.add_argument("--openvino", type=Path, metavar="FOLDER", help="write OpenVINO's form of the file there, too")
    command.add_argument("--opset", type=int, metavar="N", help="version of ONNX's operators (default: torch's choice)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, 1 if the check fails, 2 after the user's mistake."""
    return exit_status("export.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
