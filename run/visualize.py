"""Pictures of what a model does to its tokens.

python run/visualize.py merged --model deit_small --r 16 --num_registers 4 --images photos --out merged.png
python run/visualize.py merged --model deit_digits --finetune output/best.pth --r 8 --dataset DIGITS --out digits.png

Model, merging and data options are those of main.py. `merged` draws, for some blocks, one row per image and view:

    groups     every group of patches in its mean colour, with its outline
    sizes      how many patches each token stands for
    pairs      what merged into what in this block
    criteria   (--merge mctf) what the block chose by: attention received, size factor, similarity of the best partner

--gif FILE.gif shows the same views block by block. Beside the picture lies a .json of all sizes; --data_out FILE.npz
has everything that is drawn, as arrays.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.pictures import Scale, State, block_states, draw_groups, draw_heat, draw_pairs, mean_colours, to_picture
from analysis.walk import patch_grid
from build import Weights, build_config, build_model, prepare
from datasets import Data, DataConfig, build_transform, decode, unnormalise
from distributed import init_distributed
from models import MergingViT, UserError
from models.schedule import format_schedule
from options import Parser, parse_args
from utils import log, seed_all, write_json

VIEWS = ("groups", "sizes", "pairs", "criteria")
CRITERIA = ("attention", "size", "similarity")  # those that are drawn; --data_out has the others too
LABELS = {
    "groups": "groups in their mean colour",
    "sizes": "patches per token",
    "pairs": "merged in the block: lines lead to the token joined",
    "attention": "attention received (1: an equal share)",
    "size": "size factor (1: merges readily)",
    "similarity": "similarity of the best partner",
}
SHORT = {"sizes": "patches per token", "attention": "attention", "size": "size factor", "similarity": "similarity"}
PANEL = 336  # pixels that a picture is scaled to, as far as whole patches allow
MIN_CELL = 8  # pixels of a patch, at least
CLIP = 0.01  # share of values beyond either end of a criterion's colours: few would hide what the others do
LEGEND = 84  # pixels, width of a colour scale
WIDE = 14  # pixels of a patch from which outlines have two
MAX_PIXELS = 100_000_000  # of a picture
GIF_PANEL, GIF_IMAGES, GIF_FRAMES = 224, 4, 40  # at most: some 1600 x 1000 pixels and 40 blocks
GIF_MS, GIF_LAST_MS = 800, 2500  # how long a frame, and the last one, is shown
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


# Layout: panels are arrays (height,width,3) of uint8


def lay_out(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[tuple[str, str]],
    captions: Sequence[str],
    scales: Sequence[Scale | None] = (),
) -> Any:
    """One picture: a row of panels with its caption underneath, a column per title (two lines), colour scales right."""
    height, width = rows[0][0].shape[:2]
    top, row_height = GAP + TEXT + SMALL + 16, height + SMALL + GAP + 6
    size = (GAP + len(titles) * (width + GAP) + LEGEND * any(scales), top + len(rows) * row_height)
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
    for line, scale in enumerate(scales):
        if scale:
            draw_scale(canvas, scale, (size[0] - LEGEND, top + line * row_height), height)
    return canvas


def draw_scale(canvas: Any, scale: Scale, corner: tuple[int, int], height: int, width: int = 16) -> None:
    """An upright colour scale with numbers, on a picture of Pillow's."""
    (x, y), draw, small = corner, ImageDraw.Draw(canvas), ImageFont.load_default(SMALL - 1)
    ends = Scale(0, 1)
    ramp = ends.colours(np.linspace(1, 0, height))[:, None].repeat(width, axis=1)
    canvas.paste(Image.fromarray((ramp * 255).round().astype(np.uint8)), (x, y))
    draw.rectangle((x - 1, y - 1, x + width, y + height), outline=INK)
    for tick in scale.ticks():
        at = y + (1 - float(scale.place(np.array(tick)))) * (height - 1)
        draw.line((x + width, at, x + width + 4, at), INK)
        text_at = min(max(at, y + SMALL / 2), y + height - SMALL / 2)
        draw.text((x + width + 8, text_at), f"{tick:.3g}", FAINT, small, anchor="lm")


def save(canvas: Any, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --out {file}: {error}; name a .png file") from error
    print(f"wrote {file}")


# Merged tokens


@dataclass(frozen=True)
class Drawing:
    """All that panels of merged tokens are made of."""

    images: Tensor  # (B,3,H,W) in [0, 1]
    captions: tuple[str, ...]
    grid: tuple[int, int]
    views: tuple[str, ...]  # "criteria" spelled out
    states: Sequence[State]  # of the blocks drawn
    scales: dict[str, Scale]  # of the views that have one: the same for all images and blocks

    def panel(self, view: str, state: State, image: int, cell: int) -> np.ndarray:
        """One view of one image in one block."""
        before = state.group_in[image].view(self.grid).numpy()
        after = state.group[image].view(self.grid).numpy()
        if view == "groups":
            colours = mean_colours(self.images[image : image + 1], state.group[image : image + 1], self.grid)
            return draw_groups(colours.view(*self.grid, 3).numpy(), after, cell, line=2 if cell >= WIDE else 1)
        if view == "pairs":
            picture = to_picture(self.images[image], self.grid, cell)
            return draw_pairs(picture, before, state.pairs[image].numpy(), cell)
        values = (state.size if view == "sizes" else state.criteria[view])[image].view(self.grid).numpy()
        return draw_heat(values, after if view == "sizes" else before, self.scales[view], cell)


def make_drawing(
    pictures: Pictures, grid: tuple[int, int], views: Sequence[str], states: Sequence[State], blocks: Sequence[int]
) -> Drawing:
    """One colour scale per view, for all images and blocks; a few extreme values lie beyond its ends."""
    names = tuple(name for view in views for name in (CRITERIA if view == "criteria" else (view,)))
    scales = {}
    for name in set(names) - {"groups", "pairs"}:
        maps = [states[block].size if name == "sizes" else states[block].criteria[name] for block in blocks]
        values = torch.stack(maps).numpy()
        low, high = np.quantile(values, (0.0, 1.0) if name in ("sizes", "size") else (CLIP, 1 - CLIP)).tolist()
        scales[name] = Scale(1.0, max(high, 2.0), True) if name == "sizes" else Scale(low, high, name == "attention")
    images = unnormalise(pictures.images, pictures.config)
    return Drawing(images, pictures.captions, grid, names, [states[block] for block in blocks], scales)


def draw_views(drawing: Drawing) -> Any:
    """One picture: a row per image and view, a column per block."""
    grid, cell = drawing.grid, max(MIN_CELL, round(PANEL / max(drawing.grid)))
    titles = [("input", f"{grid[0] * grid[1]} patches"), *(_title(state) for state in drawing.states)]
    lines = [(image, view) for image in range(len(drawing.images)) for view in drawing.views]
    if len(lines) * len(titles) * cell**2 * grid[0] * grid[1] > MAX_PIXELS:
        raise UserError("the picture would be too large; draw fewer images (--num_images), blocks or views")
    rows, captions = [], []
    for image, view in lines:
        row = [to_picture(drawing.images[image], grid, cell)]
        rows.append(row + [drawing.panel(view, state, image, cell) for state in drawing.states])
        plain = drawing.views == ("groups",)
        captions.append(drawing.captions[image] + ("" if plain else f" \N{MIDDLE DOT} {LABELS[view]}"))
    return lay_out(rows, titles, captions, [drawing.scales.get(view) for _, view in lines])


def _title(state: State) -> tuple[str, str]:
    return f"after block {state.index}", f"{state.tokens} patch tokens"


def draw_merged(
    images: Tensor, groups: Sequence[Tensor], blocks: Sequence[int], grid: tuple[int, int], pictures: Pictures
) -> Any:
    """The view `groups` alone: images (B,3,H,W) in [0, 1], and per block the map (B,n) of `MergeOutput.groups`."""
    maps = [groups[block].cpu() for block in blocks]
    nothing = torch.zeros(len(images), 0, 2, dtype=torch.long)
    states = [State(block, map_, map_, map_, nothing) for block, map_ in zip(blocks, maps, strict=True)]
    return draw_views(Drawing(images, pictures.captions, grid, ("groups",), states, {}))


def frames(drawing: Drawing) -> Iterator[Any]:
    """The input, then block by block, all of one size: a row per image, a column per view."""
    grid, count = drawing.grid, min(len(drawing.images), GIF_IMAGES)
    cell, captions = max(2, GIF_PANEL // max(grid)), drawing.captions[:count]
    inputs = [to_picture(image, grid, cell) for image in drawing.images[:count]]
    patches = ("input", f"{grid[0] * grid[1]} patches")
    blank = [np.full_like(inputs[0], 240)] * len(drawing.views)
    yield lay_out([[image, *blank] for image in inputs], [patches, *[("", "")] * len(blank)], captions)
    for state in drawing.states:
        panels = [[drawing.panel(view, state, i, cell) for view in drawing.views] for i in range(count)]
        titles = [patches, *(_frame_title(drawing, view, state) for view in drawing.views)]
        yield lay_out([[image, *row] for image, row in zip(inputs, panels, strict=True)], titles, captions)


def _frame_title(drawing: Drawing, view: str, state: State) -> tuple[str, str]:
    if view == "groups":
        return _title(state)
    if view == "pairs":
        return f"merged in block {state.index}", f"{state.pairs.shape[1]} tokens"
    scale = drawing.scales[view]
    return SHORT[view], f"{scale.low:.3g} (dark) to {scale.high:.3g}"


def save_gif(drawing: Drawing, file: Path) -> None:
    """The frames, endlessly, in one palette so that colours do not flicker."""
    shown = list(frames(drawing))
    palette = _joint_palette(shown)
    plain = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in shown]
    times = [GIF_MS] * (len(plain) - 1) + [GIF_LAST_MS]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        plain[0].save(file, save_all=True, append_images=plain[1:], duration=times, loop=0)
    except OSError as error:
        raise UserError(f"cannot write --gif {file}: {error}; name a .gif file") from error
    print(f"wrote {file}")


def _joint_palette(shown: Sequence[Any]) -> Any:
    """256 colours of the first, a middle and the last frame; the brightest become the white between panels."""
    some = [shown[0], shown[len(shown) // 2], shown[-1]]
    joint = Image.new("RGB", (some[0].width, 3 * some[0].height))
    for index, frame in enumerate(some):
        joint.paste(frame, (0, index * frame.height))
    found = joint.quantize(256)
    colours = np.array(found.getpalette()).reshape(-1, 3)
    brightness = colours.min(axis=1)
    colours[brightness >= min(246, brightness.max())] = 255  # all near white: Pillow looks colours up roughly
    found.putpalette(colours.ravel().tolist())
    return found


# Commands


def merged(own: Namespace, args: Namespace) -> None:
    """Draw each image and, for some blocks, what became of its patches."""
    for file, suffix in ((own.gif, ".gif"), (own.data_out, ".npz")):
        if file is not None and file.suffix.lower() != suffix:
            raise UserError(f"{file} does not end in {suffix}; name a {suffix} file")
    model, pictures = load(args, own.images, own.num_images)
    if not any(model.plan().merges):
        raise UserError("this model merges nothing, so there is nothing to draw; give --r, for instance --r 16")
    depth = len(model.blocks)
    blocks = own.blocks or _spread_blocks(depth)
    if max(blocks) >= depth:
        raise UserError(f"--blocks names block {max(blocks)}, but the model has blocks 0..{depth - 1}")
    film = _spread(depth, GIF_FRAMES) if own.gif else []
    wanted = sorted({*blocks, *film}) if "criteria" in own.views else []
    states = block_states(model, pictures.images, wanted)
    grid = patch_grid(model, pictures.images)
    save(draw_views(make_drawing(pictures, grid, own.views, states, blocks)), own.out)
    if own.gif:
        save_gif(make_drawing(pictures, grid, own.views, states, film), own.gif)
    save_data(own, model, pictures, states, grid)


def _spread_blocks(depth: int) -> tuple[int, ...]:
    """Four blocks, evenly spread, the last one included."""
    return tuple(sorted({max(0, round(depth * part / 4) - 1) for part in (1, 2, 3, 4)}))


def save_data(
    own: Namespace, model: MergingViT, pictures: Pictures, states: Sequence[State], grid: tuple[int, int]
) -> None:
    """The summary beside the picture, and with --data_out all arrays."""
    content: dict[str, Any] = {"merge": model.merge.method, "r": format_schedule(model.merge.r), "grid": list(grid)}
    content |= {"registers": model.num_registers, "images": list(pictures.captions)}
    content |= {"blocks": [summary(state) for state in states]}
    file = own.out.with_suffix(".json")
    try:
        write_json(file, content)
        print(f"wrote {file}")
        if own.data_out:
            own.data_out.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(own.data_out, **arrays(pictures, states, grid))
            print(f"wrote {own.data_out}")
    except OSError as error:
        raise UserError(f"cannot write the data: {error}; name another place") from error


def summary(state: State) -> dict[str, Any]:
    """One block in numbers; `sizes` has per image how many tokens stand for how many patches."""
    tables = []
    for size, group in zip(state.size, state.group, strict=True):
        per_token = size.new_zeros(state.tokens).scatter(0, group, size)
        values, counts = per_token.round().long().unique(return_counts=True)
        tables.append({str(value): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)})
    return {"block": state.index, "patch_tokens": state.tokens, "merged": state.pairs.shape[1], "sizes": tables}


def arrays(pictures: Pictures, states: Sequence[State], grid: tuple[int, int]) -> dict[str, Any]:
    """Maps of groups and sizes (L,B,n) of L blocks and B images; by block what else `State` has."""
    found: dict[str, Any] = {"captions": np.array(pictures.captions), "grid": np.array(grid)}
    found["group"] = np.stack([state.group.numpy() for state in states])
    found["size"] = np.stack([state.size.numpy() for state in states])
    for state in states:
        found[f"group_in/{state.index}"] = state.group_in.numpy()
        found[f"pairs/{state.index}"] = state.pairs.numpy()
        found |= {f"{name}/{state.index}": values.numpy() for name, values in state.criteria.items()}
    return found


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
    text = "groups of patches in their mean colour, sizes, what merged into what, criteria"
    command = commands.add_parser(
        "merged", help=text, description=text, epilog="All other options are main.py's.", allow_abbrev=False
    )
    command.add_argument("--images", type=Path, metavar="FOLDER", help="images to draw (default: of --dataset)")
    command.add_argument("--num_images", type=int, default=5, metavar="N")
    command.add_argument("--blocks", type=_blocks, metavar="0,5,11", help="default: four, evenly spread")
    command.add_argument(
        "--views", nargs="+", choices=VIEWS, default=("groups",), help="what is drawn, a row each (default: groups)"
    )
    command.add_argument("--weights", metavar="FILE|URL", help="the same as --finetune")
    command.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    text = f"the same block by block, of at most {GIF_IMAGES} images"
    command.add_argument("--gif", type=Path, metavar="FILE.gif", help=text)
    command.add_argument("--data_out", type=Path, metavar="FILE.npz", help="maps, pairs and criteria as arrays")
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
