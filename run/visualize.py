"""Pictures of what a model does to its tokens.

python run/visualize.py merged --model deit_small --r 16 --num_registers 4 --images photos --out merged.png
python run/visualize.py merged --model deit_digits --finetune output/best.pth --r 8 --dataset DIGITS --out digits.png

Model, merging and data options are those of main.py. `merged` draws, for some blocks, one row per image and view:

    groups     every group of patches in its mean colour, with its outline
    sizes      how many patches each token stands for
    pairs      what merged into what in this block
    criteria   what the block chose by; mctf: attention received, size factor, similarity of the best partner;
               pitome: energy

--gif FILE.gif shows the same views block by block. Beside the picture lies a .json of all sizes; --data_out FILE.npz
has everything that is drawn, as arrays.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

import numpy as np
import torch
from torch import Tensor

from analysis import merged_tokens
from analysis.panels import one_palette
from build import load_for_inference, prepare
from datasets import Data, DataConfig, Sample, open_images, readable_samples, unnormalise
from distributed import init_distributed
from models import MergingViT, UserError
from options import INFERENCE_GROUPS, Parser, check_heeded, exit_status, flags_of, parse_args
from sources import find_images
from utils import log, write_json

GIF_FRAMES = 40  # at most
GIF_MS, GIF_LAST_MS = 800, 2500  # how long a frame, and the last one, is shown


# Model and images, from options of main.py


def load(
    args: Namespace, places: Sequence[str] | None, count: int
) -> tuple[MergingViT, Tensor, DataConfig, tuple[str, ...]]:
    """Load the model, and `count` images evenly spread over what is named or the validation split.

    Returns:
        The model in evaluation mode, images (B,3,H,W) as it sees them, their preprocessing, and a caption each.
    """
    dist = init_distributed(args.device)
    if places is None:
        prepared = prepare(args, dist)
        return prepared.model.eval(), *_from_data(prepared.data, count)
    find_images(places, "--images")  # before a model is built, for a mistake in the place
    loaded = load_for_inference(args, dist.device)
    images = open_images(places, args, loaded.config)
    samples = readable_samples(images, spread(len(images), count))
    return loaded.model, _stack(samples), loaded.config, tuple(Path(images.name(index)).name for index, _ in samples)


def _from_data(data: Data, count: int) -> tuple[Tensor, DataConfig, tuple[str, ...]]:
    samples = readable_samples(data.val, spread(len(data.val), count))
    return _stack(samples), data.config, tuple(data.class_labels[sample.target] for _, sample in samples)


def _stack(samples: Sequence[tuple[int, Sample]]) -> Tensor:
    return torch.stack([sample.image for _, sample in samples])


def spread(available: int, count: int) -> list[int]:
    """Indices of `count` things (or all, if there are fewer), evenly spread from the first to the last."""
    return np.linspace(0, available - 1, min(count, available)).round().astype(int).tolist()


# Files


def save_picture(picture: Any, file: Path) -> None:
    """Write a picture of Pillow's."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --out {file}: {error}; name a .png file") from error
    print(f"wrote {file}")


def save_gif(frames: Sequence[Any], file: Path) -> None:
    """Write an endless animation, in one palette so that colours do not flicker."""
    plain = one_palette(frames)
    times = [GIF_MS] * (len(plain) - 1) + [GIF_LAST_MS]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        plain[0].save(file, save_all=True, append_images=plain[1:], duration=times, loop=0)
    except OSError as error:
        raise UserError(f"cannot write --gif {file}: {error}; name a .gif file") from error
    print(f"wrote {file}")


def save_data(args: Namespace, result: merged_tokens.MergedTokensResult) -> None:
    """Write the summary beside the picture, and with --data_out all arrays."""
    file = args.out.with_suffix(".json")
    try:
        write_json(file, merged_tokens.summarise(result))
        print(f"wrote {file}")
        if args.data_out:
            args.data_out.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(args.data_out, **merged_tokens.arrays(result))  # type: ignore[arg-type]
            print(f"wrote {args.data_out}")
    except OSError as error:
        raise UserError(f"cannot write the data: {error}; name another place") from error


# Commands


def merged(args: Namespace, main_args: Namespace) -> None:
    """Draw each image and, for some blocks, what became of its patches."""
    for file, suffix in ((args.gif, ".gif"), (args.data_out, ".npz")):
        if file is not None and file.suffix.lower() != suffix:
            raise UserError(f"{file} does not end in {suffix}; name a {suffix} file")
    model, images, config, captions = load(main_args, args.images, args.num_images)
    if not any(model.plan().merges):
        log("note: this model merges nothing, so every patch stays a token of its own; --r 16 would merge")
    depth = len(model.blocks)
    blocks = args.blocks or merged_tokens.spread_blocks(depth)
    if max(blocks) >= depth:
        raise UserError(f"--blocks names block {max(blocks)}, but the model has blocks 0..{depth - 1}")
    film = spread(depth, GIF_FRAMES) if args.gif else []
    criteria = {*blocks, *film} if "criteria" in args.views else ()
    shown = unnormalise(images, config)
    label = main_args.model or Path(str(main_args.finetune or "model")).stem
    result = merged_tokens.measure(model, images, pictures=shown, captions=captions, criteria=criteria, label=label)
    save_picture(merged_tokens.draw(result, args.views, blocks), args.out)
    if args.gif:
        save_gif(list(merged_tokens.draw_frames(result, args.views, film)), args.gif)
    save_data(args, result)


def _block_list(text: str) -> tuple[int, ...]:
    try:
        blocks = tuple(int(item) for item in text.split(","))
    except ValueError:
        blocks = (-1,)
    if min(blocks) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of blocks such as 0,5,11")
    return blocks


def build_parser() -> Parser:
    """Make the parser, a sub-command a picture; flags that it does not know go to main.py's parser."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="visualize.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    text = "groups of patches in their mean colour, sizes, what merged into what, criteria"
    command = commands.add_parser(
        "merged", help=text, description=text, epilog="All other options are main.py's.", allow_abbrev=False
    )
    text = "files, folders or patterns to draw (default: of --dataset)"
    command.add_argument("--images", nargs="+", metavar="IMAGE", help=text)
    command.add_argument("--num_images", type=int, default=5, metavar="N")
    command.add_argument("--blocks", type=_block_list, metavar="0,5,11", help="default: four, evenly spread")
    command.add_argument(
        "--views",
        nargs="+",
        choices=merged_tokens.VIEWS,
        default=("groups",),
        help="what is drawn, a row each (default: groups)",
    )
    command.add_argument("--weights", metavar="FILE|URL", help="the same as --finetune")
    command.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    text = f"the same block by block, of at most {merged_tokens.FRAME_IMAGES} images"
    command.add_argument("--gif", type=Path, metavar="FILE.gif", help=text)
    command.add_argument("--data_out", type=Path, metavar="FILE.npz", help="maps, pairs and criteria as arrays")
    command.set_defaults(draw=merged)
    return parser


def visualize(argv: Sequence[str]) -> None:
    """Run one command line."""
    args, main_argv = build_parser().parse_known_args(argv)
    if args.num_images < 1:
        raise UserError(f"--num_images must be at least 1, not {args.num_images}")
    check_heeded(main_argv, flags_of(*INFERENCE_GROUPS) | {"resume"}, "a picture")
    weights = ["--finetune", args.weights] if args.weights else []
    args.draw(args, parse_args([*main_argv, *weights, "--eval"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    return exit_status("visualize.py", visualize, argv)


if __name__ == "__main__":
    sys.exit(main())
