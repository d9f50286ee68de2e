"""LOST: one object box per image from a ViT's last features (Siméoni et al., arXiv 2109.14279), and its measure.

CorLoc is the share of images whose box overlaps an object by half or more. Images keep their own resolution and run
one at a time.

Shapes: N patches of an image, row by row on a grid (gh,gw); C feature channels; H heads, D their channels. A box is
(x1,y1,x2,y2) in pixels, the right and lower sides excluded.
"""

import itertools
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.errors import UserError
from models.vit import MergingViT

from . import charts
from .inputs import ImageBatches, as_list, evaluation
from .intervals import difference, mean, text
from .panels import stretch
from .walk import Layer, allow_any_size, attention, check_layer, per_patch, qkv, to_grid, walk

if TYPE_CHECKING:
    from .command import Loaded
    from .voc import Annotated

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class LostOptions:
    """The options of LOST; the defaults are the original's.

    Attributes:
        k: patches of lowest degree that may join the seed.
        center: subtract the mean feature first.
        normalize: scale features to unit length.
        bias: added to the Gram matrix.
    """

    k: int = 100
    center: bool = False
    normalize: bool = False
    bias: float = 0.0


@dataclass(frozen=True)
class LostSetting:
    """Which features LOST reads (`k`, `q` or `v` of a block), and how it compares them."""

    feat: str = "k"
    layer: int = -1
    options: LostOptions = LostOptions()


PRESETS = {
    "lost-original": LostSetting(),
    "regs-small-vits": LostSetting("v", options=LostOptions(center=True, normalize=True, bias=0.05)),
}
FEATURES = ("k", "q", "v")
SWEEP_LAYERS, SWEEP_BIASES = 4, tuple(round(0.0 - 0.1 * step, 1) for step in range(11))
DINO_HEAD = 4  # of the published baseline
WIDE = 4  # pictures of a single model in a row
HIT = 0.5  # overlap from which a box has found an object
VIEWS = ("pred", "fms", "seed", "none")

# One image


@dataclass(frozen=True)
class LostBox:
    """The box of one image, and how LOST came to it."""

    box: Box
    seed: int  # patch index
    degrees: np.ndarray  # (N,) patches that each one correlates with positively
    expansion: np.ndarray  # (K,) patch indices that joined the seed, with it
    mask: np.ndarray  # (gh,gw) bool: correlates with the expanded seed
    similarity: np.ndarray  # (N,) Gram row of the seed


def lost(
    features: Tensor, grid: tuple[int, int], patch: int, image_size: tuple[int, int], options: LostOptions | None = None
) -> LostBox:
    """Find one box: seed = the patch least like the others, expanded by what is like it, largest connected part.

    Args:
        features: (N,C), N = gh * gw.
        grid: (gh,gw).
        patch: side in pixels.
        image_size: (height,width) of the image before it was padded to whole patches; boxes end there.
    """
    options = options or LostOptions()
    gram = gram_matrix(features, options)
    positive = gram > 0
    degrees = positive.sum(dim=1) - positive.diagonal().long()  # itself does not count
    order = degrees.argsort(stable=True)  # ties are common, and only a stable sort decides them alike everywhere
    # An object covers less of an image than the background does, so its patches correlate with few others: the patch
    # of lowest degree is the seed. One patch is a small part of an object. Those of the next k lowest degrees that
    # correlate with the seed are taken for more of the same object, and a patch belongs to the mask if it correlates
    # with all of them in sum: single wrong ones are outvoted.
    seed = int(order[0])
    candidates = order[: options.k]
    expansion = candidates[gram[seed, candidates] > 0]
    mask = (gram[expansion].sum(dim=0) > 0).view(grid).numpy()
    box = clip_box(component_box(mask, seed, patch), image_size)
    return LostBox(box, seed, degrees.numpy(), expansion.numpy(), mask, gram[seed].numpy())


def gram_matrix(features: Tensor, options: LostOptions) -> Tensor:
    """Dot products (N,N) of all patches, in fp32."""
    features = features.detach().float().cpu()
    if options.center:
        features = features - features.mean(dim=0, keepdim=True)
    if options.normalize:
        features = F.normalize(features, dim=1)
    return features @ features.T + options.bias


def component_box(mask: np.ndarray, seed: int, patch: int) -> Box:
    """Box of the 4-connected part of a mask (gh,gw) that holds the seed; of the seed's cell if the mask does not."""
    from scipy import ndimage  # importing it sets warning filters

    row, column = divmod(seed, mask.shape[1])
    labels, _ = ndimage.label(mask)
    if labels[row, column] == 0:
        return column * patch, row * patch, (column + 1) * patch, (row + 1) * patch
    return _box_of(labels == labels[row, column], patch)


def _box_of(part: np.ndarray, patch: int) -> Box:
    rows, columns = np.nonzero(part)
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return int(left) * patch, int(top) * patch, int(right) * patch, int(bottom) * patch


def clip_box(box: Box, image_size: tuple[int, int]) -> Box:
    """End a box at the image (height,width)."""
    height, width = image_size
    return box[0], box[1], min(box[2], width), min(box[3], height)


def dino_seg(
    attention: Tensor, grid: tuple[int, int], patch: int, image_size: tuple[int, int], share: float = 0.6
) -> Box:
    """The baseline of the LOST paper: box of the biggest 4-connected part of the patches that hold most attention.

    Args:
        attention: (N,) of the class token to the patches.
        share: part of the mass on patches that is kept, strongest patches first.
    """
    from scipy import ndimage

    mass = attention.detach().double().cpu()
    order = mass.argsort(descending=True, stable=True)
    before = mass[order].cumsum(0) - mass[order]
    mask = torch.zeros(len(mass), dtype=torch.bool)
    mask[order[before < share * mass.sum()]] = True
    labels, count = ndimage.label(mask.view(grid).numpy())
    sizes = ndimage.sum_labels(labels > 0, labels, index=np.arange(1, count + 1))
    return clip_box(_box_of(labels == 1 + int(np.argmax(sizes)), patch), image_size)


def box_iou(box: Sequence[float], others: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with others (n,4): (n,)."""
    first, others = np.asarray(box, dtype=np.float64), np.asarray(others, dtype=np.float64).reshape(-1, 4)
    sides = np.minimum(first[2:], others[:, 2:]) - np.maximum(first[:2], others[:, :2])
    common = np.clip(sides, 0, None).prod(axis=1)
    area, areas = (first[2:] - first[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(axis=1)
    return common / (area + areas - common + 1e-7)


def best_overlap(box: Box, objects: np.ndarray) -> float:
    """Intersection over union of a box with the object (n,4) that it overlaps best."""
    return float(box_iou(box, objects).max())


def corloc(overlaps: Sequence[float], least: float = HIT) -> float:
    """Share (a fraction) of images whose box overlaps some object by at least `least`."""
    return float(np.mean(np.asarray(overlaps) >= least)) if len(overlaps) else float("nan")


def hits(overlaps: Sequence[float]) -> np.ndarray:
    """Which images (I,) count for CorLoc: 1 or 0."""
    return (np.asarray(overlaps) >= HIT).astype(float)


@dataclass(frozen=True)
class Scene:
    """An image for `measure`.

    Attributes:
        image: (3,H,W) as the model sees it; None: it could not be read, which counts as missed.
        boxes: (n,4) of its objects; None: not known.
        picture: (H,W,3) in [0, 1] to draw on; None: the image itself, scaled to that range.
    """

    image: Tensor | None
    boxes: np.ndarray | None = None
    name: str = ""
    picture: np.ndarray | None = None


@dataclass(frozen=True)
class SceneBoxes:
    """All boxes of one image."""

    lost: LostBox
    dino_seg: Box | None  # None: the model has no class token
    swept: dict[LostSetting, Box]


def localise(
    model: MergingViT, image: Tensor, setting: LostSetting, head: int | None = None, sweep: bool = False
) -> SceneBoxes:
    """Find the boxes of an image (3,H,W): LOST's, DINO-seg's, and with `sweep` LOST's under many settings."""
    patch, size, depth = model.patch_embed.patch_size[0], (image.shape[1], image.shape[2]), len(model.blocks)
    box, dino_box, swept = None, None, {}
    for layer in walk(model, image.unsqueeze(0).to(next(model.parameters()).device)):
        is_read, is_swept = layer.index == setting.layer % depth, sweep and layer.index >= depth - SWEEP_LAYERS
        if layer.index == depth - 1 and "class" in layer.token_types:
            dino_box = dino_seg(_class_attention(layer, head), layer.grid, patch, size)
        if not is_read and not is_swept:
            continue
        features = {name: _patch_features(values, layer) for name, values in zip("qkv", qkv(layer), strict=True)}
        if is_read:
            box = lost(features[setting.feat], layer.grid, patch, size, setting.options)
        for feat, bias in itertools.product(FEATURES, SWEEP_BIASES) if is_swept else ():
            other = LostSetting(feat, layer.index, LostOptions(k=setting.options.k, normalize=True, bias=bias))
            swept[other] = lost(features[feat], layer.grid, patch, size, other.options).box
    assert box is not None, "the layer was checked before"
    return SceneBoxes(box, dino_box, swept)


def _patch_features(values: Tensor, layer: Layer) -> Tensor:
    """(1,H,N,D) -> (n,H*D) of the patches, merged ones given to all of their patches."""
    joined = values.transpose(1, 2).flatten(2)[:, layer.num_prefix_tokens :]
    return to_grid(joined, layer.before.group, layer.grid)[0].flatten(0, 1)


def _class_attention(layer: Layer, head: int | None) -> Tensor:
    """Attention (n,) of the class token to the patches: of one head, or the mean."""
    maps = per_patch(attention(layer)[:, :, 0], layer)[0]
    head = DINO_HEAD if head is None else head
    return (maps[head] if head < len(maps) else maps.mean(dim=0)).flatten()


# A set of images


@dataclass(frozen=True)
class ShownScene:
    """The parts of the picture of an image."""

    picture: np.ndarray  # (H,W,3) in [0, 1]
    lost: LostBox
    dino_seg: Box | None
    objects: np.ndarray | None  # (n,4)
    name: str = ""


@dataclass
class LostResult:
    """The boxes of one model. Overlaps are those with the best object, 0 where an image could not be read.

    Attributes:
        patch: its side in pixels.
        images: per readable image: name, box, seed, DINO-seg's box, and iou where objects are known.
        overlaps: of LOST's box, per image with known objects.
        dino_seg_overlaps: the same of the baseline's.
        whole_image_overlaps: the same of a box that is the whole image.
        swept_overlaps: the same of LOST's under other settings.
        shown: the images that `draw` draws.
    """

    label: str
    setting: LostSetting
    patch: int
    images: list[dict[str, Any]] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    dino_seg_overlaps: list[float] = field(default_factory=list)
    whole_image_overlaps: list[float] = field(default_factory=list)
    swept_overlaps: dict[LostSetting, list[float]] = field(default_factory=dict)
    shown: list[ShownScene] = field(default_factory=list)

    def add(self, scene: Scene, boxes: SceneBoxes) -> None:
        """Count an image."""
        row: dict[str, Any] = {"name": scene.name, "box": boxes.lost.box, "seed": boxes.lost.seed}
        row["dino_seg"] = boxes.dino_seg
        if scene.boxes is not None and scene.image is not None:
            row["iou"] = best_overlap(boxes.lost.box, scene.boxes)
            self.overlaps.append(row["iou"])
            whole = (0, 0, scene.image.shape[2], scene.image.shape[1])
            self.whole_image_overlaps.append(best_overlap(whole, scene.boxes))
            if boxes.dino_seg is not None:
                self.dino_seg_overlaps.append(best_overlap(boxes.dino_seg, scene.boxes))
            for setting, box in boxes.swept.items():
                self.swept_overlaps.setdefault(setting, []).append(best_overlap(box, scene.boxes))
        self.images.append(row)

    def miss(self, scene: Scene) -> None:
        """Count an image that could not be read."""
        kept = (self.overlaps, self.dino_seg_overlaps, self.whole_image_overlaps) if scene.boxes is not None else ()
        for overlaps in (*kept, *self.swept_overlaps.values()):
            overlaps.append(0.0)


def measure(
    model: VisionTransformer,
    images: ImageBatches | Iterable[Scene],
    *,
    setting: LostSetting = PRESETS["lost-original"],
    head: int | None = None,
    sweep: bool = False,
    show: int = 8,
    every: int = 1,
    label: str = "model",
    report: Callable[[str], None] | None = None,
) -> LostResult:
    """Localise one object in every image. One pass.

    Args:
        model: for images of other sizes than its own, give it `walk.allow_any_size` first.
        images: see `inputs.ImageBatches`; or `Scene`s, with objects (for CorLoc), names and pictures.
        head: of DINO-seg, the baseline; None: the published one, or the mean where there are fewer heads.
        sweep: also measure the last 4 blocks with k, q, v and biases from 0 to -1, where objects are known.
        show: images at most that are kept to be drawn, namely
        every: one in so many.
        report: takes a line per image that could not be read.

    Raises:
        UserError: a layer or head that the model does not have.
    """
    with evaluation(model) as vit:
        check_setting(vit, setting, head)
        result = LostResult(label, setting, vit.patch_embed.patch_size[0])
        for index, scene in enumerate(_scenes(images)):
            if scene.image is None:
                result.miss(scene)
                if report:
                    report(f"unreadable, counted as missed: {scene.name}")
                continue
            boxes = localise(vit, scene.image, setting, head, sweep and scene.boxes is not None)
            result.add(scene, boxes)
            if index % every == 0 and len(result.shown) < show:
                picture = scene.picture
                if picture is None:
                    picture = stretch(scene.image).permute(1, 2, 0).cpu().numpy()
                result.shown.append(ShownScene(picture, boxes.lost, boxes.dino_seg, scene.boxes, scene.name))
    return result


def check_setting(model: MergingViT, setting: LostSetting, head: int | None, label: str = "the model") -> None:
    """Raise a UserError for a layer or a head that the model does not have."""
    check_layer(model, setting.layer, "--layer", label)
    heads = model.blocks[0].attn.num_heads
    if head is not None and not 0 <= head < heads:
        raise UserError(f"--head is {head}, but {label} has heads 0..{heads - 1}")


def _scenes(images: ImageBatches | Iterable[Scene]) -> Iterator[Scene]:
    for item in [images] if isinstance(images, Tensor) else images:
        if isinstance(item, Scene):
            yield item
        else:
            yield from (Scene(image) for image in (item if isinstance(item, Tensor) else item[0]))


def summarise(result: LostResult, baseline: LostResult | None = None) -> dict[str, Any]:
    """CorLoc (fractions, with intervals over images) of the chosen setting, of both baselines, and of a sweep.

    Args:
        baseline: another model on the same images, whose difference is given, paired by image.
    """
    row: dict[str, Any] = {"label": result.label, "n_images": len(result.overlaps) or len(result.images)}
    whole = hits(result.whole_image_overlaps)
    named = {
        "corloc": result.overlaps,
        "dino_seg": result.dino_seg_overlaps,
        "whole_image": result.whole_image_overlaps,
    }
    for name, overlaps in named.items():
        row |= mean(hits(overlaps)).named(name) if overlaps else {name: None}
    row["mean_iou"] = float(np.mean(result.overlaps)) if result.overlaps else None
    if result.overlaps:
        row |= difference(whole, hits(result.overlaps)).named("corloc_minus_whole_image")
    if result.overlaps and baseline is not None and len(baseline.overlaps) == len(result.overlaps):
        row |= difference(hits(baseline.overlaps), hits(result.overlaps)).named("corloc_minus_first_model")
    if result.swept_overlaps:
        table = sorted(
            ((corloc(values), setting) for setting, values in result.swept_overlaps.items()), key=lambda x: -x[0]
        )
        row["sweep_best"] = {"corloc": table[0][0], "setting": _plain(table[0][1])}
        row["sweep_note"] = "the best of a sweep was chosen on the images it is measured on: it flatters"
        row["sweep"] = [{"corloc": value, **_plain(setting)} for value, setting in table]
    return row


def _plain(setting: LostSetting) -> dict[str, Any]:
    return {"feat": setting.feat, "layer": setting.layer, **asdict(setting.options)}


# Figures

Cell = Callable[[Axes], Any]


@charts.styled
def draw_corloc(results: LostResult | Sequence[LostResult]) -> Figure:
    """Draw CorLoc of LOST, DINO-seg and of the whole image as the box, with 95 % intervals over images."""
    results = [result for result in as_list(results) if result.overlaps]
    figure, axes = charts.new_figure(1, 1, 6.4, 0.9 + 0.5 * len(results), "Object localisation: CorLoc")
    ax = axes[0, 0]
    kinds = (("LOST", 1, "overlaps"), ("DINO-seg", 0, "dino_seg_overlaps"))
    whole = mean(hits(results[0].whole_image_overlaps))
    span = whole.ci95 or (whole.value, whole.value)
    ax.axvspan(100 * span[0], 100 * span[1], color=charts.FAINT, alpha=0.18, lw=0)
    ax.axvline(
        100 * whole.value, color=charts.INK, lw=1, ls=":", label=f"the whole image as the box {text(whole, 1, 100)}"
    )
    for y, result in enumerate(results):
        for index, (name, colour, field_name) in enumerate(kinds):
            overlaps = getattr(result, field_name)
            value = mean(hits(overlaps)) if overlaps else None
            if value is None or not value.shown:
                continue
            ends = None if value.ci95 is None else [100 * bound for bound in value.ci95]
            charts.dots(ax, y + 0.24 * index - 0.12, 100 * value.value, ends, charts.colour_of(colour), across=True)
            place = dict(textcoords="offset points", va="center", fontsize=7)
            at = 100 * (value.ci95[1] if value.ci95 else value.value)
            ax.annotate(f"{name} {100 * value.value:.1f}", (at, y + 0.24 * index - 0.12), (4, 0), **place)
    ax.set_yticks(range(len(results)), [f"{result.label} (n = {len(result.overlaps)})" for result in results])
    ax.set_ylim(len(results) - 0.5, -0.5)
    ax.set_xlim(0, 100)
    ax.set_xlabel("images whose box overlaps an object by half or more (%)")
    ax.grid(False, axis="y")
    figure.legend(loc="outside upper right")
    charts.footer(
        figure,
        f"LOST: {_setting_text(results[0].setting)}. Lines and band: 95 % over images. "
        "At the level of the whole image boxes say nothing about features.",
    )
    return figure


def _setting_text(setting: LostSetting) -> str:
    options = setting.options
    parts = [f"{setting.feat} of block {setting.layer}", f"k={options.k}", *(["centred"] if options.center else [])]
    parts += ["unit length"] if options.normalize else ["raw"]
    return ", ".join([*parts, f"bias {options.bias:g}"])


def draw(results: LostResult | Sequence[LostResult], view: str = "pred") -> Figure:
    """Draw the kept images: rows are images and columns models; a single model's pictures fill the rows.

    Args:
        view: "pred": boxes and objects; "fms": similarity to the seed and inverse degrees; "seed": its expansion.
    """
    results = as_list(results)
    limits = charts.common_limits([scene.lost.similarity for result in results for scene in result.shown])
    cells: list[list[Cell]] = [[] for _ in results[0].shown]
    columns: list[str] = []
    bars: list[charts.Bar] = []
    for result in results:
        label = result.label
        columns += {"pred": [label], "fms": ["image", f"{label}: seed", "inverse degree"], "seed": [label]}[view]
        if view == "fms":
            bars += [charts.Bar((len(columns) - 2,) * 2, limits, "product with the seed")]
            bars += [charts.Bar((len(columns) - 1,) * 2, (0.0, 1.0), "least degree / degree")]
        for row, scene in zip(cells, result.shown, strict=True):
            row += {"pred": _pred_cells, "fms": _fms_cells, "seed": _seed_cells}[view](scene, result.patch, limits)
    captions: list[str] | None = [scene.name for scene in results[0].shown]
    if len(columns) == 1:
        columns, captions = [], None
        cells = [[cell[0] for cell in cells[at : at + WIDE]] for at in range(0, len(cells), WIDE)]
    notes = {
        "pred": "orange: LOST (IoU with the best object; hit from 0.5); blue, dashed: DINO-seg; green: objects",
        "fms": "products of features with the seed's (outlined); patches like few others have a high inverse degree",
        "seed": "red: seed; magenta: patches that joined; yellow: box of the seed alone; orange: of the expanded one",
    }
    title = f"LOST, {_setting_text(results[0].setting)}"
    return charts.picture_table(cells, columns, captions, title, aspect=0.85, note=notes[view], bars=bars)


def _pred_cells(scene: ShownScene, patch: int, limits: tuple[float, float]) -> list[Cell]:
    def cell(ax: Axes) -> None:
        charts.show_image(ax, scene.picture)
        for known in () if scene.objects is None else scene.objects:
            charts.draw_box(ax, known, charts.colour_of(2))
        if scene.dino_seg is not None:
            charts.draw_box(ax, scene.dino_seg, charts.colour_of(0), dashed=True, inset=2)
        charts.draw_box(ax, scene.lost.box, charts.colour_of(1), inset=4)
        if scene.objects is not None:
            iou = best_overlap(scene.lost.box, scene.objects)
            ax.set_xlabel(f"{'hit' if iou >= HIT else 'miss'}, IoU {iou:.2f}", fontsize=7.5, labelpad=2)

    return [cell]


def _fms_cells(scene: ShownScene, patch: int, limits: tuple[float, float]) -> list[Cell]:
    grid = scene.lost.mask.shape
    seed = np.zeros(grid, dtype=bool)
    seed[divmod(scene.lost.seed, grid[1])] = True
    degrees = np.maximum(scene.lost.degrees.reshape(grid), 1)
    return [
        charts.image_cell(scene.picture),
        charts.map_cell(scene.lost.similarity.reshape(grid), limits, marked=seed),
        charts.map_cell(degrees.min() / degrees, (0.0, 1.0), marked=seed),
    ]


def _seed_cells(scene: ShownScene, patch: int, limits: tuple[float, float]) -> list[Cell]:
    grid = scene.lost.mask.shape

    def cell(ax: Axes) -> None:
        charts.show_image(ax, scene.picture)
        for index in scene.lost.expansion:
            charts.mark_patch(ax, divmod(int(index), grid[1]), patch, "#ff3df2")
        charts.mark_patch(ax, divmod(scene.lost.seed, grid[1]), patch)
        alone = component_box(scene.lost.similarity.reshape(grid) > 0, scene.lost.seed, patch)
        charts.draw_box(ax, clip_box(alone, scene.picture.shape[:2]), "#ffe119")
        charts.draw_box(ax, scene.lost.box, charts.colour_of(1), inset=3)

    return [cell]


# Command


def add_parser(subparsers: Any) -> None:
    from .command import add_command

    about = "LOST object localisation: boxes, CorLoc on Pascal VOC, and DINO-seg as the baseline"
    parser = add_command(subparsers, "lost", run, about)
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


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    from utils import log

    from . import command

    setting = setting_of(args)
    for flag in ("--input_size", "--batch_size", "--dataset", "--data_path", "--eval_crop_ratio"):
        if any(token.split("=")[0] == flag for token in main_argv):
            raise UserError(
                f"{flag} has no effect on lost, which takes every image whole, at its own size; leave it out"
            )
    models = command.load_models(args, main_argv)
    items = open_images(args)
    limit = models[0].args.limit
    total = len(items)
    items = items[:: math.ceil(total / limit)] if limit else items
    for loaded in models:
        check_setting(loaded.model, setting, args.head, loaded.label)
        allow_any_size(loaded.model)
    out = command.Output(args, main_argv, models)
    show = max(0, args.show)
    options = {"setting": setting, "head": args.head, "sweep": args.sweep, "show": show, "report": log}
    options["every"] = max(1, len(items) // show) if show else 1
    results = [measure(m.model, _read_scenes(items, m), **options, label=m.label) for m in models]
    rows = [summarise(result, results[0]) for result in results]
    for row in out.run["models"]:  # each image has its own size, so its own number of tokens
        row.update(input_size="each image's own", tokens=None, gmacs=None)
    out.about(_data_note(args, len(items), total))
    out.json("lost", {"setting": _plain(setting), "no_hard": args.no_hard, "models": rows})
    out.json("preds", {result.label: result.images for result in results})
    overlaps = {f"iou/{result.label}": np.array(result.overlaps) for result in results if result.overlaps}
    out.npz("lost", {**overlaps, "names": np.array([item.name for item in items])})
    for row in rows:
        if row["corloc"] is not None:
            log(_line(row))
    if any(result.overlaps for result in results):
        out.figure("lost_corloc", draw_corloc(results))
    if args.visualize != "none" and show:
        out.figure(f"lost_{args.visualize}", draw(results, args.visualize))


def setting_of(args: Namespace) -> LostSetting:
    """The preset, as flags change it."""
    preset = PRESETS[args.preset]
    flags = {"k": args.k_patches, "center": args.center, "normalize": args.normalize, "bias": args.bias}
    options = replace(preset.options, **{name: value for name, value in flags.items() if value is not None})
    if options.k < 1:
        raise UserError(f"--k_patches must be at least 1, not {options.k}")
    return LostSetting(args.feat or preset.feat, args.layer, options)


def open_images(args: Namespace) -> list["Annotated"]:
    from .voc import open_files, open_voc

    if (args.voc is None) == (args.data is None):
        raise UserError("give --voc FOLDER (a Pascal VOC tree, with CorLoc) or --data IMAGES (pictures only)")
    if args.data is not None and (args.no_hard or args.sweep or args.year):
        raise UserError("--no_hard, --sweep and --year need boxes; give --voc instead of --data")
    return open_voc(args.voc, args.year, args.set, args.no_hard) if args.voc else open_files(args.data)


def _read_scenes(items: Sequence["Annotated"], loaded: "Loaded") -> Iterator[Scene]:
    """Images at their native resolution, normalised; the model pads them to whole patches."""
    from torchvision import transforms as T

    from .command import track

    transform = T.Compose([T.ToTensor(), T.Normalize(loaded.config.mean, loaded.config.std)])
    for item in track(items, len(items), f"LOST, {loaded.label}"):
        picture = item.read()
        if picture is None:
            yield Scene(None, item.boxes, item.name)
        else:
            yield Scene(transform(picture), item.boxes, item.name, np.asarray(picture) / 255.0)


def _data_note(args: Namespace, used: int, total: int) -> str:
    from .command import ordinal

    every = f", every {ordinal(math.ceil(total / used))} of {total}" if used < total else ""
    return f"{args.voc or ' '.join(map(str, args.data))}: {used} images{every}, at their own size"


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['label']}: CorLoc {100 * row['corloc']:.2f} %"]
    parts += [] if row["dino_seg"] is None else [f"DINO-seg {100 * row['dino_seg']:.2f} %"]
    gap = row["corloc_minus_whole_image_ci95"]
    ends = "" if gap is None else f" [{100 * gap[0]:+.1f}, {100 * gap[1]:+.1f}]"
    whole = f"the whole image as box {100 * row['whole_image']:.2f} % (LOST less it: "
    whole += f"{100 * row['corloc_minus_whole_image']:+.1f}{ends})"
    return ", ".join([*parts, f"{whole} ({row['n_images']} images)"])
