"""Pictures of what a model does to its tokens.

python run/visualize.py merged --model deit_small --r 16 --num_registers 4 --images photos --out merged.png
python run/visualize.py merged --model deit_digits --finetune output/best.pth --r 8 --dataset DIGITS --out digits.png

Model, merging and data options are those of main.py. `merged` draws every group of patches in its mean colour, with its
outline, after some blocks.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import Data, DataConfig, build_transform, decode, unnormalise
from main import Parser, Weights, build_config, build_model, parse_args, prepare
from models import MergingViT, UserError, merge_by_map, unmerge
from utils import init_distributed, log, seed_all

PANEL = 336  # pixels that a picture is scaled to, as far as whole patches allow
MIN_CELL = 8  # pixels of a patch, at least
GAP, TEXT, SMALL = 14, 17, 14
INK, FAINT = (25, 25, 25), (115, 115, 115)


@dataclass(frozen=True)
class Pictures:
    """Images (B,3,H,W) as the model sees them, their preprocessing, and one caption each."""

    images: Tensor
    config: DataConfig
    captions: tuple[str, ...]


# Model and images, from options of main.py


def load(args: Namespace, images: Path | None, count: int) -> tuple[MergingViT, Pictures]:
    """The model in evaluation mode, and `count` images, evenly spread over a folder or the validation split."""
    dist = init_distributed(args.device)
    if images is None:
        data, _, model, _ = prepare(args, dist)
        return model.eval(), _from_data(data, count)
    files = _find_images(images, count)
    seed_all(args.seed)
    weights = Weights(args, args.model)
    config = build_config(args, weights.name)
    head = (weights.tensors() or {}).get("head.weight")
    classes: Any = None if head is None else len(head)  # None: the model's own
    model = build_model(args, weights, classes, config).to(dist.device)
    transform = build_transform(args, config, train=False)
    batch = torch.stack([transform(_read(file)) for file in files])
    return model.eval(), Pictures(batch, config, tuple(file.name for file in files))


def _from_data(data: Data, count: int) -> Pictures:
    samples = [data.val[index] for index in _spread(len(data.val), count)]
    for sample in samples:
        if not sample.valid:
            log(f"unreadable image: {', '.join(sample.bad)}")
    captions = tuple(class_name(data.class_names[sample.target]) for sample in samples)
    return Pictures(torch.stack([sample.image for sample in samples]), data.config, captions)


def _find_images(folder: Path, count: int) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder; name one that holds images")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise UserError(f"--images {folder} holds no image ({', '.join(IMG_EXTENSIONS)})")
    return [files[index] for index in _spread(len(files), count)]


def _spread(available: int, count: int) -> list[int]:
    """`count` places (or all, if there are fewer), from the first to the last."""
    return np.linspace(0, available - 1, min(count, available)).round().astype(int).tolist()


def _read(file: Path) -> Image.Image:
    try:
        with file.open("rb") as stream:
            return decode(stream)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read the image {file}: {error}; remove it or name another folder") from error


def class_name(name: str) -> str:
    """A class's name to read: ImageNet's first synonym for one of its wnids, else the name itself."""
    info = ImageNetInfo()
    return info.label_name_to_description(name).split(",")[0] if name in info.label_names() else name


# Drawing: arrays (H,W,3) of uint8


def to_picture(image: Tensor, grid: tuple[int, int], cell: int) -> np.ndarray:
    """An image (3,H,W) in [0, 1], scaled so that a patch has `cell` pixels."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    scaled = Image.fromarray(pixels).resize((grid[1] * cell, grid[0] * cell), Image.Resampling.BICUBIC)
    return np.asarray(scaled)


def mean_colours(images: Tensor, group: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean colour of the group that each patch is in: images (B,3,H,W), group (B,n) -> (B,n,3)."""
    patches = F.adaptive_avg_pool2d(images, grid).flatten(2).transpose(1, 2)
    return unmerge(merge_by_map(patches, group, int(group.max()) + 1), group)


def draw_groups(colours: np.ndarray, group: np.ndarray, cell: int) -> np.ndarray:
    """Fill each patch with its colour (h,w,3) in [0, 1] and outline the groups (h,w), two pixels wide."""
    filled = np.kron(colours, np.ones((cell, cell, 1)))
    labels = np.kron(group, np.ones((cell, cell), dtype=group.dtype))
    edge = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        first, second = (np.arange(labels.shape[axis] - 1) + offset for offset in (0, 1))
        differs = np.take(labels, first, axis) != np.take(labels, second, axis)
        near, far = np.moveaxis(edge, axis, 0)[:-1], np.moveaxis(edge, axis, 0)[1:]
        near |= np.moveaxis(differs, axis, 0)
        far |= np.moveaxis(differs, axis, 0)
    # dark outlines, except where the picture itself is too dark to show them
    brightness = filled.mean(axis=2, keepdims=True)
    outline = np.where(brightness > 0.22, filled * 0.2, 0.36)
    return (np.where(edge[..., None], outline, filled) * 255).round().astype(np.uint8)


def lay_out(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[tuple[str, str]], captions: Sequence[str]) -> Any:
    """One picture: a row per image with its caption underneath, a column per title (two lines)."""
    height, width = rows[0][0].shape[:2]
    top, row_height = GAP + TEXT + SMALL + 16, height + SMALL + GAP + 6
    size = (GAP + len(titles) * (width + GAP), top + len(rows) * row_height)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(TEXT), ImageFont.load_default(SMALL)
    for column, (title, below) in enumerate(titles):
        middle = GAP + column * (width + GAP) + width // 2
        draw.text((middle, GAP), title, INK, large, anchor="mt")
        draw.text((middle, GAP + TEXT + 6), below, FAINT, small, anchor="mt")
    for line, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        y = top + line * row_height
        for column, picture in enumerate(row):
            x = GAP + column * (width + GAP)
            canvas.paste(Image.fromarray(picture), (x, y))
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=INK)
        draw.text((GAP, y + height + 5), caption, FAINT, small, anchor="lt")
    return canvas


def save(canvas: Any, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --out {file}: {error}; name a .png file") from error
    print(f"wrote {file}")


# Commands


@torch.no_grad()
def merged(own: Namespace, args: Namespace) -> None:
    """Draw each image and, after some blocks, its groups of patches."""
    model, pictures = load(args, own.images, own.num_images)
    if not any(model.plan().merges):
        raise UserError("this model merges nothing, so there is nothing to draw; give --r, for instance --r 16")
    depth = len(model.blocks)
    blocks = own.blocks or tuple(sorted({max(0, round(depth * part / 4) - 1) for part in (1, 2, 3, 4)}))
    if max(blocks) >= depth:
        raise UserError(f"--blocks names block {max(blocks)}, but the model has blocks 0..{depth - 1}")
    device = next(model.parameters()).device
    out = model(pictures.images.to(device), trace=True)
    canvas = draw_merged(unnormalise(pictures.images, pictures.config), out.groups, blocks, _grid(model), pictures)
    save(canvas, own.out)


def draw_merged(
    images: Tensor, groups: Sequence[Tensor], blocks: Sequence[int], grid: tuple[int, int], pictures: Pictures
) -> Any:
    """The picture of `merged`: images (B,3,H,W) in [0, 1], and per block the map (B,n) of `MergeOutput.groups`."""
    cell = max(MIN_CELL, round(PANEL / max(grid)))
    titles = [("input", f"{grid[0] * grid[1]} patches")]
    rows = [[to_picture(image, grid, cell)] for image in images]
    for block in blocks:
        group = groups[block].cpu()
        titles.append((f"after block {block}", f"{int(group.max()) + 1} patch tokens"))
        colours = mean_colours(images, group, grid)
        for row, colour, map_ in zip(rows, colours, group, strict=True):
            row.append(draw_groups(colour.view(*grid, 3).numpy(), map_.view(grid).numpy(), cell))
    return lay_out(rows, titles, pictures.captions)


def _grid(model: MergingViT) -> tuple[int, int]:
    height, width = model.patch_embed.grid_size
    return height, width


def _blocks(text: str) -> tuple[int, ...]:
    blocks = tuple(int(item) for item in text.split(","))
    if min(blocks) < 0:
        raise ValueError(text)
    return blocks


_blocks.__name__ = "list of blocks"


def build_parser() -> Parser:
    """One sub-command a picture; what it does not know goes to main.py's parser."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="visualize.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    text = "groups of patches, in their mean colour"
    command = commands.add_parser(
        "merged", help=text, description=text, epilog="All other options are main.py's.", allow_abbrev=False
    )
    command.add_argument("--images", type=Path, metavar="FOLDER", help="images to draw (default: of --dataset)")
    command.add_argument("--num_images", type=int, default=5, metavar="N")
    command.add_argument("--blocks", type=_blocks, metavar="0,5,11", help="default: four, evenly spread")
    command.add_argument("--weights", metavar="FILE|URL", help="the same as --finetune")
    command.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    command.set_defaults(draw=merged)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, or 2 after the user's mistake."""
    try:
        own, rest = build_parser().parse_known_args(argv)
        if own.num_images < 1:
            raise UserError(f"--num_images must be at least 1, not {own.num_images}")
        own.draw(own, parse_args([*rest, *(["--finetune", own.weights] if own.weights else []), "--eval"]))
        return 0
    except UserError as error:
        print(f"visualize.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse after --help
        return int(stop.code or 0)


if __name__ == "__main__":
    sys.exit(main())
