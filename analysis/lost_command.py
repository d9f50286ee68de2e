"""analyze.py lost: LOST's object boxes, CorLoc on Pascal VOC, and pictures of both."""

import itertools
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from models import UserError
from utils import log

from . import charts
from .command import Loaded, Output, add_command, load_models, track
from .lost import Found, LostOptions, box_iou, corloc, dino_seg, lost
from .voc import Annotated, open_folder, open_voc
from .walk import allow_any_size, attention, per_patch, qkv, to_grid, walk

PRESETS = {
    "lost-original": ("k", LostOptions()),
    "regs-small-vits": ("v", LostOptions(center=True, normalize=True, bias=0.05)),
}
FEATURES = ("k", "q", "v")
SWEEP_LAYERS, SWEEP_BIASES = 4, tuple(round(0.0 - 0.1 * step, 1) for step in range(11))
DINO_HEAD = 4  # of the published baseline
WIDE = 4  # pictures of a single model in a row
VIEWS = ("pred", "fms", "seed", "none")


def add_parser(subparsers: Any) -> None:
    text = "LOST object localisation: boxes, CorLoc on Pascal VOC, and DINO-seg as the baseline"
    parser = add_command(subparsers, "lost", run, text)
    parser.add_argument("--voc", type=Path, metavar="FOLDER", help="Pascal VOC tree (instead of --data: no boxes)")
    parser.add_argument("--year", type=int, choices=(2007, 2012), help="of a VOCdevkit that holds both")
    parser.add_argument("--set", default="trainval", help="list of ImageSets/Main (default: trainval)")
    parser.add_argument("--no_hard", action="store_true", help="leave out truncated and difficult objects")
    parser.add_argument("--preset", choices=PRESETS, default="lost-original", help="what the options below change")
    parser.add_argument("--feat", choices=FEATURES, help="key, query or value")
    parser.add_argument("--layer", type=int, default=-1, metavar="BLOCK")
    parser.add_argument("--k_patches", type=int, metavar="K", help="default: 100")
    parser.add_argument("--center", action="store_true", default=None, help="subtract the mean feature")
    parser.add_argument("--no_center", dest="center", action="store_false")
    parser.add_argument("--normalize", action="store_true", default=None, help="features of unit length")
    parser.add_argument("--no_normalize", dest="normalize", action="store_false")
    parser.add_argument("--bias", type=float, help="added to the Gram matrix")
    parser.add_argument("--head", type=int, help="DINO-seg's (default: 4, or the mean where there are fewer than 5)")
    parser.add_argument("--sweep", action="store_true", help="also the last 4 blocks x k, q, v x bias 0 .. -1")
    parser.add_argument("--visualize", choices=VIEWS, default="pred")
    parser.add_argument("--show", type=int, default=8, metavar="K", help="images drawn")


@dataclass(frozen=True)
class Setting:
    """One way to run LOST."""

    feat: str
    layer: int
    options: LostOptions


@dataclass
class Result:
    """One model's boxes."""

    loaded: Loaded
    setting: Setting
    images: list[dict[str, Any]] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)  # of a box that is the whole image
    swept: dict[Setting, list[float]] = field(default_factory=dict)
    shown: list[tuple[np.ndarray, Found, Any, np.ndarray | None]] = field(default_factory=list)


def run(own: Namespace, rest: Sequence[str]) -> None:
    setting = setting_of(own)
    for flag in ("--input_size", "--batch_size", "--dataset", "--data_path", "--eval_crop_ratio"):
        if any(token.split("=")[0] == flag for token in rest):
            raise UserError(
                f"{flag} has no effect on lost, which takes every image whole, at its own size; leave it out"
            )
    models = load_models(own, rest)
    items = _limited(open_images(own), models[0].args.limit)
    for loaded in models:
        _check(own, loaded)
        allow_any_size(loaded.model)
    out = Output(own, rest, models)
    results = [localise(own, loaded, items, setting) for loaded in models]
    rows = [summarise(result) for result in results]
    out.json("lost", {"setting": _plain(setting), "no_hard": own.no_hard, "models": rows})
    out.json("preds", {result.loaded.label: result.images for result in results})
    arrays = {f"iou/{r.loaded.label}": np.array(r.overlaps) for r in results if r.overlaps}
    out.npz("lost", arrays | {"names": np.array([item.name for item in items])})
    for row in rows:
        if row["corloc"] is not None:
            baseline = "" if row["dino_seg"] is None else f", DINO-seg {row['dino_seg']:.2f} %"
            baseline += f", the whole image as box {row['whole_image']:.2f} %"
            log(f"{row['label']}: CorLoc {row['corloc']:.2f} %{baseline} ({row['n_images']} images)")
    if own.visualize != "none" and own.show > 0:
        out.png(f"lost_{own.visualize}", draw(own.visualize, results))


def setting_of(own: Namespace) -> Setting:
    """The preset, as flags change it."""
    feat, options = PRESETS[own.preset]
    given = {"k": own.k_patches, "center": own.center, "normalize": own.normalize, "bias": own.bias}
    options = replace(options, **{key: value for key, value in given.items() if value is not None})
    if options.k < 1:
        raise UserError(f"--k_patches must be at least 1, not {options.k}")
    return Setting(own.feat or feat, own.layer, options)


def open_images(own: Namespace) -> list[Annotated]:
    if (own.voc is None) == (own.data is None):
        raise UserError("give --voc FOLDER (a Pascal VOC tree, with CorLoc) or --data FOLDER (pictures only)")
    if own.data is not None and (own.no_hard or own.sweep or own.year):
        raise UserError("--no_hard, --sweep and --year need boxes; give --voc instead of --data")
    return open_voc(own.voc, own.year, own.set, own.no_hard) if own.voc else open_folder(own.data)


def _limited(items: list[Annotated], limit: int | None) -> list[Annotated]:
    return items[:: math.ceil(len(items) / limit)] if limit else items


def _check(own: Namespace, loaded: Loaded) -> None:
    depth, heads = len(loaded.model.blocks), loaded.model.blocks[0].attn.num_heads
    if not -depth <= own.layer < depth:
        raise UserError(f"--layer is {own.layer}, but {loaded.label} has blocks 0..{depth - 1} (or -{depth}..-1)")
    if own.head is not None and not 0 <= own.head < heads:
        raise UserError(f"--head is {own.head}, but {loaded.label} has heads 0..{heads - 1}")


def localise(own: Namespace, loaded: Loaded, items: Sequence[Annotated], setting: Setting) -> Result:
    """One image at a time, at its own resolution."""
    result = Result(loaded, setting)
    every = max(1, len(items) // own.show) if own.show > 0 else len(items) + 1
    for index, item in enumerate(track(items, len(items), f"LOST, {loaded.label}")):
        picture = item.read()
        if picture is None:
            log(f"unreadable, counted as missed: {item.name}")
            result.overlaps += [0.0] if item.boxes is not None else []
            result.baseline += [0.0] if item.boxes is not None else []
            result.whole += [0.0] if item.boxes is not None else []
            for overlaps in result.swept.values():
                overlaps.append(0.0)
            continue
        found, box = _one(own, result, item, picture)
        if index % every == 0 and len(result.shown) < own.show:
            result.shown.append((np.asarray(picture) / 255.0, found, box, item.boxes))
    return result


def _one(own: Namespace, result: Result, item: Annotated, picture: Image.Image) -> tuple[Found, Any]:
    model, setting = result.loaded.model, result.setting
    image, size = to_tensor(picture, result.loaded), (picture.height, picture.width)
    patch, depth, found, box = model.patch_embed.patch_size[0], len(model.blocks), None, None
    for layer in walk(model, image):
        wanted = layer.index == setting.layer % depth
        swept = own.sweep and layer.index >= depth - SWEEP_LAYERS
        if layer.index == depth - 1 and "class" in layer.token_types:
            box = dino_seg(_class_map(own, layer), layer.grid, patch, size)
        if not wanted and not swept:
            continue
        features = {name: _features(values, layer) for name, values in zip("qkv", qkv(layer), strict=True)}
        if wanted:
            found = lost(features[setting.feat], layer.grid, patch, size, setting.options)
        if swept and item.boxes is not None:
            _sweep(result, features, layer.index, layer.grid, patch, size, item.boxes)
    assert found is not None, "the layer was checked before"
    row: dict[str, Any] = {"name": item.name, "box": found.box, "seed": found.seed, "dino_seg": box}
    if item.boxes is not None:
        row["iou"] = float(box_iou(found.box, item.boxes).max())
        result.overlaps.append(row["iou"])
        result.whole.append(float(box_iou((0, 0, size[1], size[0]), item.boxes).max()))
        if box is not None:
            result.baseline.append(float(box_iou(box, item.boxes).max()))
    result.images.append(row)
    return found, box


def to_tensor(picture: Image.Image, loaded: Loaded) -> Tensor:
    """Native resolution; the model pads to whole patches, after normalisation."""
    transform = T.Compose([T.ToTensor(), T.Normalize(loaded.config.mean, loaded.config.std)])
    return transform(picture).unsqueeze(0).to(loaded.device)


def _features(values: Tensor, layer: Any) -> Tensor:
    """(1,H,N,D) -> (n,H*D) of the patches, merged ones given to all of their patches."""
    joined = values.transpose(1, 2).flatten(2)[:, layer.num_prefix_tokens :]
    return to_grid(joined, layer.before.group, layer.grid)[0].flatten(0, 1)


def _class_map(own: Namespace, layer: Any) -> Tensor:
    """Attention of the class token to the patches: of one head, or the mean."""
    maps = per_patch(attention(layer)[:, :, 0], layer)[0]
    head = own.head if own.head is not None else DINO_HEAD
    return (maps[head] if head < len(maps) else maps.mean(dim=0)).flatten()


def _sweep(
    result: Result,
    features: dict[str, Tensor],
    layer: int,
    grid: tuple[int, int],
    patch: int,
    size: tuple[int, int],
    boxes: np.ndarray,
) -> None:
    for feat, bias in itertools.product(FEATURES, SWEEP_BIASES):
        options = LostOptions(k=result.setting.options.k, normalize=True, bias=bias)
        found = lost(features[feat], grid, patch, size, options)
        overlap = float(box_iou(found.box, boxes).max())
        result.swept.setdefault(Setting(feat, layer, options), []).append(overlap)


def summarise(result: Result) -> dict[str, Any]:
    """CorLoc of the chosen setting, of the baseline, and the best of a sweep (chosen on the same images: inflated)."""
    row: dict[str, Any] = {"label": result.loaded.label, "n_images": len(result.overlaps) or len(result.images)}
    row["corloc"] = corloc(result.overlaps) if result.overlaps else None
    row["mean_iou"] = float(np.mean(result.overlaps)) if result.overlaps else None
    row["dino_seg"] = corloc(result.baseline) if result.baseline else None
    row["whole_image"] = corloc(result.whole) if result.whole else None
    if result.swept:
        table = sorted(((corloc(values), setting) for setting, values in result.swept.items()), key=lambda x: -x[0])
        row["sweep_best"] = {"corloc": table[0][0], "setting": _plain(table[0][1])}
        row["sweep_note"] = "the best of a sweep was chosen on the images it is measured on: it flatters"
        row["sweep"] = [{"corloc": value, **_plain(setting)} for value, setting in table]
    return row


def _plain(setting: Setting) -> dict[str, Any]:
    return {"feat": setting.feat, "layer": setting.layer, **asdict(setting.options)}


# Pictures


def draw(view: str, results: Sequence[Result]) -> Any:
    """Rows are images, columns models; a single model's pictures fill rows. pred: boxes and objects; fms: seed
    similarity and inverse degrees; seed: its expansion."""
    cells: list[list[Any]] = [[] for _ in results[0].shown]
    columns: list[str] = []
    for result in results:
        label = result.loaded.label
        columns += {"pred": [label], "fms": ["image", f"{label}: seed", "inverse degree"], "seed": [label]}[view]
        for row, shown in zip(cells, result.shown, strict=True):
            row += {"pred": _pred, "fms": _fms, "seed": _seed}[view](shown, result)
    title = None
    if len(columns) == 1:
        title, columns = columns[0], []
        cells = [[cell[0] for cell in cells[at : at + WIDE]] for at in range(0, len(cells), WIDE)]
    notes = {
        "pred": "orange: LOST; blue, dashed: DINO-seg; green: objects",
        "fms": "similarity to the seed (outlined), and 1 / degree",
        "seed": "red: seed; magenta: patches that joined it; orange: box of the expanded seed",
    }
    return charts.picture_table(cells, columns, title=title, aspect=0.8, note=notes[view])


def _boxes_cell(picture: np.ndarray, boxes: Sequence[tuple[Sequence[float], str, bool]]) -> Any:
    def cell(ax: Axes) -> None:
        charts.show_image(ax, picture)
        for box, colour, dashed in boxes:
            charts.draw_box(ax, box, colour, dashed=dashed)

    return cell


def _pred(shown: Any, result: Result) -> list[Any]:
    picture, found, box, objects = shown
    drawn = [] if objects is None else [(known, charts.colour_of(2), False) for known in objects]
    drawn += [(box, charts.colour_of(0), True)] if box is not None else []
    return [_boxes_cell(picture, [*drawn, (found.box, charts.colour_of(1), False)])]


def _fms(shown: Any, result: Result) -> list[Any]:
    picture, found, _, _ = shown
    grid = found.mask.shape
    seed = divmod(found.seed, grid[1])

    def similarity(ax: Axes) -> None:
        charts.show_map(ax, found.similarity.reshape(grid))
        charts.mark_patch(ax, seed)

    def degrees(ax: Axes) -> None:
        charts.show_map(ax, 1 / np.maximum(found.degrees.reshape(grid), 1))
        charts.mark_patch(ax, seed)

    return [lambda ax: charts.show_image(ax, picture), similarity, degrees]


def _seed(shown: Any, result: Result) -> list[Any]:
    picture, found, _, _ = shown
    patch, columns = result.loaded.model.patch_embed.patch_size[0], found.mask.shape[1]

    def cell(ax: Axes) -> None:
        charts.show_image(ax, picture)
        for index in found.expansion:
            charts.mark_patch(ax, divmod(int(index), columns), patch, "#ff3df2")
        charts.mark_patch(ax, divmod(found.seed, columns), patch)
        charts.draw_box(ax, found.box, charts.colour_of(1))

    return [cell]
