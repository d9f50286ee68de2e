"""A model over its training: what class token and registers look at, register maps and norms, epoch by epoch.

    snapshots = [training.snapshot(model, images, pictures, epoch) for model, epoch in ...]
    training.draw(snapshots)             # a row per image and token, a column per epoch
    training.draw_curves(snapshots)

`main.py --log_images K` keeps a snapshot of four validation images every K epochs in log_images/ of its output folder;
checkpoints that were saved give snapshots of any images.

Command: run/analyze.py training. Shapes: K images, L blocks, P prefix tokens, I images that are measured, (gh,gw) the
patch grid.
"""

import os
import re
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models import UserError

from . import charts
from .attention import CLIP, UNIT, mass_by_token_type, spread_metrics
from .inputs import ImageBatches, batches, evaluation
from .intervals import LEAST, mean
from .outliers import norms
from .similarity import map_cosines
from .walk import Layer, attention, in_parts, per_patch, to_grid, walk

MOST_EPOCHS, MOST_ROWS = 10, 12  # columns and rows of the strip
FOLDER = "log_images"  # of a run's output folder


@dataclass(frozen=True)
class Snapshot:
    """A model at one epoch. Arrays are of the last block's output, or attention, unless they say otherwise.

    Attributes:
        epoch: counted from 0.
        token_types: names of the P prefix tokens.
        pictures: (K,H,W,3) the images that are drawn, in [0, 1].
        maps: (K,P,gh,gw) where prefix tokens look, mean over heads.
        norm_maps: (K,gh,gw) norms of patch tokens.
        patch_norms: (I,L,3) median, 98 % quantile and maximum of an image's patch tokens, after every block.
        prefix_norms: (I,L,P) norms of prefix tokens after every block; NaN where they have not entered.
        cosines: (I,P,P) of the prefix tokens' maps with each other.
        entropy: (I,) of the first token's map, normalised: 1 is even.
        mass: (I,3) what the first token spends on class (and distillation) token, registers and patches.
    """

    epoch: int
    token_types: tuple[str, ...]
    pictures: np.ndarray
    maps: np.ndarray
    norm_maps: np.ndarray
    patch_norms: np.ndarray
    prefix_norms: np.ndarray
    cosines: np.ndarray
    entropy: np.ndarray
    mass: np.ndarray

    @property
    def images(self) -> int:
        """Images that are measured."""
        return len(self.entropy)

    @property
    def registers(self) -> list[int]:
        """Places of the registers among the prefix tokens."""
        return [place for place, name in enumerate(self.token_types) if name.startswith("register")]


@dataclass
class _Parts:
    """What is gathered over batches."""

    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.arrays.setdefault(name, []).append(value.float().cpu().numpy())

    def joined(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(rows) for name, rows in self.arrays.items()}


@torch.no_grad()
def snapshot(model: VisionTransformer, images: ImageBatches, pictures: np.ndarray, epoch: int) -> Snapshot:
    """Take a snapshot.

    Args:
        model: a `MergingViT`, or a timm ViT that it can be made of; it runs as it merges.
        images: (I,3,H,W) as the model sees them, or batches of them; the first K are drawn.
        pictures: (K,H,W,3) those in [0, 1].

    Raises:
        UserError: there is no image.
    """
    parts = _Parts()
    with evaluation(model) as vit:
        types = vit.token_types()
        for batch in batches(images, vit):
            for part in in_parts(vit, batch):
                _add(parts, types, walk(vit, part))
    if not parts.arrays:
        raise UserError("none of the images can be read")
    found = parts.joined()
    kept = {name: found.pop(name)[: len(pictures)] for name in ("maps", "norm_maps")}
    return Snapshot(epoch, types, np.asarray(pictures), **kept, **found)


def _add(parts: _Parts, types: Sequence[str], layers: Any) -> None:
    patches, prefixes = [], []
    for layer in layers:
        lengths, prefix = norms(layer.after.x), layer.num_prefix_tokens
        of_patches = lengths[:, prefix:]
        levels = torch.tensor([0.5, 0.98, 1.0], device=lengths.device)
        patches.append(of_patches.float().quantile(levels, dim=1).T)
        absent = torch.full_like(lengths[:, 0], torch.nan)
        places = {name: index for index, name in enumerate(layer.token_types)}
        columns = [lengths[:, places[name]] if name in places else absent for name in types]
        prefixes.append(torch.stack(columns, dim=1) if columns else lengths[:, :0])
    last: Layer = layer
    attended = attention(last)
    maps = per_patch(attended[:, :, :prefix].mean(dim=1), last)
    first = attended[:, :, 0].mean(dim=1) if prefix else attended[:, :, prefix:].mean(dim=(1, 2))
    mass = mass_by_token_type(first, last)
    none = torch.zeros_like(mass["patches"])
    to_class = mass.get("class", none) + mass.get("distillation", none)
    parts.add(
        maps=maps,
        norm_maps=to_grid(of_patches, last.after.group, last.grid),
        patch_norms=torch.stack(patches, dim=1),
        prefix_norms=torch.stack(prefixes, dim=1),
        cosines=map_cosines(maps),
        entropy=spread_metrics(per_patch(first, last))["entropy"],
        mass=torch.stack((to_class, mass.get("registers", none), mass["patches"]), dim=1),
    )


# Files


def save(folder: Path, taken: Snapshot) -> Path:
    """Write a snapshot into a folder, by its epoch, in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    file, unfinished = folder / f"epoch_{taken.epoch:05d}.npz", folder / f"epoch_{taken.epoch:05d}.tmp"
    content = {part.name: np.asarray(getattr(taken, part.name)) for part in fields(taken)}
    content["pictures"] = (taken.pictures * 255).round().astype(np.uint8)
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, **content)  # type: ignore[arg-type]
    os.replace(unfinished, file)
    return file


def load(folder: Path) -> list[Snapshot]:
    """Read all snapshots of a folder, or of FOLDER below it, by their epochs.

    Raises:
        UserError: there are none, or one is damaged.
    """
    place = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    files = sorted(place.glob("epoch_*.npz"))
    if not files:
        raise UserError(f"{folder} holds no snapshot; train with main.py --log_images K, or give --checkpoints")
    return sorted((_read(file) for file in files), key=lambda taken: taken.epoch)


def _read(file: Path) -> Snapshot:
    try:
        with np.load(file, allow_pickle=False) as content:
            values: dict[str, Any] = {part.name: content[part.name] for part in fields(Snapshot)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the snapshot {file} ({error}); remove it") from error
    values["epoch"], values["pictures"] = int(values["epoch"]), values["pictures"] / 255.0
    values["token_types"] = tuple(str(name) for name in values["token_types"])
    return Snapshot(**values)


# Numbers


def register_cosine(taken: Snapshot) -> np.ndarray:
    """Mean cosine of all pairs of registers' maps, per image (I,); NaN below two registers."""
    places = taken.registers
    pairs = [taken.cosines[:, i, j] for n, i in enumerate(places) for j in places[n + 1 :]]
    return np.mean(pairs, axis=0) if pairs else np.full(taken.images, np.nan)


def class_cosine(taken: Snapshot) -> np.ndarray:
    """Mean cosine of the class token's map with the registers', per image (I,); NaN without either."""
    if "class" not in taken.token_types or not taken.registers:
        return np.full(taken.images, np.nan)
    found: np.ndarray = taken.cosines[:, taken.token_types.index("class"), taken.registers].mean(axis=1)
    return found


def summarise(snapshots: Sequence[Snapshot]) -> list[dict[str, Any]]:
    """A row per epoch, of the last block, with intervals over images."""
    rows = []
    for taken in snapshots:
        row: dict[str, Any] = {"epoch": taken.epoch, "n_images": taken.images}
        row |= mean(register_cosine(taken)).named("register_map_cosine") if len(taken.registers) > 1 else {}
        row |= mean(class_cosine(taken)).named("class_register_map_cosine") if taken.registers else {}
        row |= mean(taken.entropy).named("entropy")
        for index, name in enumerate(("class", "registers", "patches")):
            row |= mean(taken.mass[:, index]).named(f"mass_{name}")
        for index, name in enumerate(("median", "p98", "max")):
            row |= mean(taken.patch_norms[:, -1, index]).named(f"patch_norm_{name}")
        for index, name in enumerate(taken.token_types):
            row |= mean(taken.prefix_norms[:, -1, index]).named(f"norm_{name.replace(' ', '_')}")
        rows.append(row)
    return rows


# Figures


def _check(snapshots: Sequence[Snapshot]) -> None:
    if len({(taken.token_types, taken.maps.shape[2:]) for taken in snapshots}) > 1:
        raise UserError("the snapshots are of different models (prefix tokens or patch grid): they make no strip")


def draw(snapshots: Sequence[Snapshot], title: str = "Attention over the training") -> Figure:
    """Draw where class token and registers look: a row per image and token, a column per epoch, on one scale."""
    _check(snapshots)
    chosen = [snapshots[i] for i in _spread(len(snapshots))]
    even = chosen[0].maps.shape[2] * chosen[0].maps.shape[3]
    limits = 0.0, charts.common_limits([taken.maps for taken in chosen], CLIP)[1] * even
    names = chosen[0].token_types
    if not names:
        raise UserError("the model has neither class token nor registers, so there is no strip of their attention")
    rows, captions = [], []
    for image in range(min(len(chosen[0].pictures), max(1, MOST_ROWS // len(names)))):
        for place, name in enumerate(names):
            cells = [charts.map_cell(taken.maps[image, place] * even, limits) for taken in chosen]
            rows.append([charts.image_cell(chosen[0].pictures[image]), *cells])
            captions.append(name)
    bars = [charts.Bar((1, len(chosen)), limits, UNIT, over=True)]
    columns = ["input", *(f"epoch {taken.epoch}" for taken in chosen)]
    note = "Last block, mean over heads; one colour scale for all, which ends at the 98 % quantile."
    return charts.picture_table(rows, columns, captions, title, note=note, bars=bars)


def _spread(count: int) -> list[int]:
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, MOST_EPOCHS)).round().astype(int))]


@charts.styled
def draw_curves(snapshots: Sequence[Snapshot], title: str = "The last block over the training") -> Figure:
    """Draw norms, likeness of register maps, and what the class token attends to, epoch by epoch."""
    _check(snapshots)
    epochs = [taken.epoch for taken in snapshots]
    figure, axes = charts.new_figure(1, 4, 3.7, 3.4, title)
    names = snapshots[0].token_types
    series = [(f"patches, {name}", charts.COLOURS[0], i) for i, name in enumerate(("median", "98 %", "maximum"))]
    for (label, colour, index), style in zip(series, ("-", "--", ":"), strict=True):
        _curve(axes[0, 0], epochs, [taken.patch_norms[:, -1, index] for taken in snapshots], colour, label, style)
    for place, name in enumerate(names):
        values, style = [taken.prefix_norms[:, -1, place] for taken in snapshots], ("-", "--", "-.", ":")[place % 4]
        _curve(axes[0, 0], epochs, values, charts.token_colour(name), name, style)
    axes[0, 0].set(title="norms", ylabel="L2 norm")
    if len(snapshots[0].registers) > 1:
        values = [register_cosine(taken) for taken in snapshots]
        _curve(axes[0, 1], epochs, values, charts.token_colour("registers"), "registers, all pairs", "-")
    if snapshots[0].registers and "class" in names:
        values = [class_cosine(taken) for taken in snapshots]
        _curve(axes[0, 1], epochs, values, charts.token_colour("class"), "class with registers", "-")
    axes[0, 1].set(title="attention maps: cosine", ylabel="cosine", ylim=(0, 1.02))
    for index, name in enumerate(("class", "registers", "patches")):
        values = [taken.mass[:, index] for taken in snapshots]
        if max(value.max() for value in values) > 0:
            _curve(axes[0, 2], epochs, values, charts.token_colour(name), f"to {name}", "-")
    first = names[0] if names else "average patch"
    axes[0, 2].set(title=f"attention of the {first}", ylabel="share", ylim=(0, 1.02))
    _curve(axes[0, 3], epochs, [taken.entropy for taken in snapshots], charts.COLOURS[0], first, "-")
    axes[0, 3].set(title="normalised entropy (1: even)", ylabel="entropy over patches", ylim=(0, 1.02))
    axes[0, 0].set_ylim(0, None)
    for ax in axes[0]:
        ax.set_xlabel("epoch")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="best", fontsize=6.5)
        else:
            ax.text(0.5, 0.5, "fewer than two registers", transform=ax.transAxes, ha="center", color=charts.FAINT)
    number = min(taken.images for taken in snapshots)
    sure = "bands: 95 % over images" if number >= LEAST else "too few for intervals, so a look and no measurement"
    charts.footer(
        figure, f"Means over n = {number} images; {sure}. All axes start at 0; an epoch's weights are those at its end."
    )
    return figure


def _curve(ax: Axes, epochs: Sequence[int], values: Sequence[np.ndarray], colour: str, label: str, style: str) -> None:
    """Draw the means of values (I,) per epoch, with a band where there are images enough."""
    estimates = [mean(value[np.isfinite(value)]) for value in values]
    ax.plot(epochs, [value.value for value in estimates], color=colour, ls=style, marker="o", ms=2.5, label=label)
    if all(value.ci95 is not None for value in estimates):
        low, high = zip(*(value.ci95 or (0.0, 0.0) for value in estimates), strict=True)
        ax.fill_between(epochs, low, high, color=colour, alpha=0.12, lw=0)


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `training`."""
    from .command import add_command

    about = "attention of class token and registers, register maps and norms over the epochs of a run"
    parser = add_command(subparsers, "training", run, about)
    parser.add_argument(
        "--run", type=Path, metavar="DIR", dest="run_folder", help="of main.py --log_images; no model needed"
    )
    parser.add_argument(
        "--checkpoints", nargs="+", metavar="FILE", help="instead: saved checkpoints, for --data or --dataset"
    )
    parser.add_argument(
        "--show", type=int, default=3, metavar="K", help="images drawn, with --checkpoints (default: 3)"
    )


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Write training.json, training.npz and the figures."""
    from .command import Output

    if (args.run_folder is None) == (args.checkpoints is None):
        raise UserError("give --run DIR (of main.py --log_images) or --checkpoints FILE FILE ...")
    if args.run_folder is not None:
        if args.model or args.weights or args.models or args.data or main_argv:
            raise UserError("--run needs no model, images or options of main.py: the snapshots are of those of the run")
        snapshots, models = load(args.run_folder), list[Any]()
        out = Output(args, main_argv, [])
        out.about(f"{args.run_folder}: snapshots of {len(snapshots)} epochs, {snapshots[0].images} validation images")
    else:
        snapshots, models, data = _of_checkpoints(args, main_argv)
        out = Output(args, main_argv, models[:1])
        out.about(data)
    _check(snapshots)
    out.json("training", {"epochs": summarise(snapshots)})
    out.npz("training", {f"{taken.epoch}/{part}": getattr(taken, part) for taken in snapshots for part in KEPT})
    if snapshots[0].token_types:
        out.figure("training_strip", draw(snapshots))
    out.figure("training_curves", draw_curves(snapshots))


KEPT = ("maps", "norm_maps", "patch_norms", "prefix_norms", "cosines", "entropy", "mass")


def _epoch_of(state: dict[str, Any]) -> int | None:
    """The last epoch that a checkpoint has finished: ours name the one that comes next, with the step in it."""
    epoch, step = state.get("epoch"), state.get("step")
    if not isinstance(epoch, int):
        return None
    return max(0, epoch - 1) if step == 0 else epoch


def _of_checkpoints(args: Namespace, main_argv: Sequence[str]) -> tuple[list[Snapshot], list[Any], str]:
    """Snapshots of saved checkpoints, by their epochs; checkpoints without one by the number in their name."""
    from checkpoint import load_checkpoint

    from .command import Images, load_models

    if args.models or args.weights:
        raise UserError("--checkpoints names the weights; leave out --models and --weights")
    epochs = []
    for file in args.checkpoints:
        epoch = _epoch_of(load_checkpoint(file))
        numbers = re.findall(r"\d+", Path(file).stem)
        if epoch is None and not numbers:
            raise UserError(f"{file} says no epoch, and neither does its name; rename it, for instance epoch_20.pth")
        epochs.append(int(numbers[-1]) if epoch is None else epoch)
    if len(set(epochs)) < len(epochs):
        raise UserError(f"the checkpoints are of epochs {epochs}: one is there twice; leave it out")
    snapshots, models, note = [], [], ""
    for epoch, file in sorted(zip(epochs, args.checkpoints, strict=True)):
        (loaded,) = load_models(Namespace(**{**vars(args), "weights": file}), main_argv)
        models.append(replace(loaded, label=f"{loaded.label}, epochs {min(epochs)} to {max(epochs)}"))
        images = Images(args, loaded, title=f"epoch {epoch}")
        shown, pictures = Images(args, loaded, title="pictures", limit=max(1, args.show)).load()
        drawn = snapshot(loaded.model, shown, pictures, epoch)
        measured = snapshot(loaded.model, images, pictures[:0], epoch)
        snapshots.append(replace(measured, pictures=pictures, maps=drawn.maps, norm_maps=drawn.norm_maps))
        note = images.note
    return snapshots, models, note
