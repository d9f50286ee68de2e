"""Layer against layer, within a model and between models: linear CKA, and the cosine of the same token.

    first, second = cka.measure(model, images), cka.measure(another, images)
    cka.draw(first)                                   # the layers of each model with each other
    cka.draw_between([first, second])                 # layers of the first model against those of the others

Tokens of about 2048 random patches, the same ones in all models, are compared. Linear CKA (Kornblith et al., arXiv
1905.00414) is blind to rotation and scale, so it also compares models of different width.

Command: run/analyze.py cka. Shapes: L stages (input, every block's output, final norm), S sampled patches, C channels.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models import MergingViT, UserError

from . import charts
from .inputs import ImageBatches, as_list, batches, evaluation
from .walk import final, patch_grid, walk

SAMPLES = 2048  # patches that are compared


@dataclass
class CkaResult:
    """Tokens of the same random patches in all stages of one model.

    Attributes:
        label: the model's name in figures.
        images: number of images.
        stages: names of the L stages.
        tokens: (L,S,C) fp32; of a merged patch, the token that it is in.
        patches: (S,2) image and patch of each.
    """

    label: str
    images: int
    stages: tuple[str, ...]
    tokens: Tensor
    patches: np.ndarray

    def within(self) -> tuple[np.ndarray, np.ndarray]:
        """Linear CKA and mean cosine (L,L) of the stages with each other."""
        return layer_tables(self.tokens)


def linear_cka(first: Tensor, second: Tensor) -> np.ndarray:
    """Linear CKA of all stages of two models on the same tokens: (L,S,C), (K,S,D) -> (L,K)."""
    one, other = (_scaled(tokens) for tokens in (first, second))
    return np.array([[float((x.T @ y).square().sum()) for y in other] for x in one])


def _scaled(tokens: Tensor) -> list[Tensor]:
    """Centred tokens (L,S,C) of each stage, such that CKA is |x'y|^2: |x'y|^2 / (|x'x| |y'y|), divided beforehand."""
    centred = tokens.float() - tokens.float().mean(dim=1, keepdim=True)
    return [x / (x.T @ x).norm().sqrt().clamp(min=1e-20) for x in centred]


def layer_tables(samples: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Compare the same tokens in all layers (L,S,C): linear CKA (L,L) and mean cosine (L,L)."""
    unit = F.normalize(samples.float(), dim=-1)
    cosine = torch.einsum("isc,jsc->ij", unit, unit) / samples.shape[1]
    return linear_cka(samples, samples), cosine.cpu().numpy()


@torch.no_grad()
def measure(
    model: VisionTransformer, images: ImageBatches, *, number: int | None = None, seed: int = 0, label: str = "model"
) -> CkaResult:
    """Take the tokens of random patches in all stages.

    Args:
        model: a `MergingViT`, or a timm ViT that it can be made of.
        images: (B,3,H,W) as the model sees them, or batches of them.
        number: how many images there are; None: they are counted, for which `images` is iterated once more.
        seed: of the random patches, about 2048 in all and evenly spread over the images. Models that are compared need
            the same seed and images.

    Raises:
        UserError: there is no image, or not as many as `number`.
    """
    with evaluation(model) as model:
        number = sum(len(batch) for batch in batches(images, model)) if number is None else number
        if not number:
            raise UserError("none of the images can be read")
        generator = torch.Generator().manual_seed(seed)
        tokens, places, done, stages = [], [], 0, 0
        for batch in batches(images, model):
            image, patch = _sample_patches(model, batch, done, number, generator)
            tokens.append(_tokens_of_batch(model, batch, (image, patch)))
            places.append(torch.stack((image + done, patch), dim=1))
            done += len(batch)
            stages = len(tokens[-1])
    if done != number:
        raise UserError(f"the first pass saw {number} images, the second {done}; give a list, not a generator")
    names = ("input", *(str(index) for index in range(stages - 2)), "final norm")
    return CkaResult(label, done, names, torch.cat(tokens, dim=1), torch.cat(places).numpy())


def _sample_patches(
    model: MergingViT, images: Tensor, done: int, number: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose random patches of a batch: (S,) image in the batch and (S,) patch.

    Over all images they are about SAMPLES, evenly spread: after k of `number` images SAMPLES * k // number are chosen.

    Args:
        done: images before this batch.
    """
    rows, columns = patch_grid(model, images)
    patches = rows * columns
    until = [min(patches * k, SAMPLES * k // number) for k in range(done, done + len(images) + 1)]
    counts = torch.tensor(until).diff()
    order = torch.rand(len(images), patches, generator=generator).argsort(dim=1)
    chosen = torch.cat([order[image, :count] for image, count in enumerate(counts.tolist())])
    return torch.arange(len(images)).repeat_interleave(counts), chosen


def _tokens_of_batch(model: MergingViT, images: Tensor, chosen: tuple[Tensor, Tensor]) -> Tensor:
    """Tokens of the chosen patches in all stages: (L,S,C) in fp32 on the CPU."""
    stages = []
    for layer in walk(model, images):
        if layer.index == 0:
            stages.append(_tokens_of(layer.before.x, layer.before.group, layer.num_prefix_tokens, chosen))
        stages.append(_tokens_of(layer.after.x, layer.after.group, layer.num_prefix_tokens, chosen))
    stages.append(_tokens_of(final(model, layer), layer.after.group, layer.num_prefix_tokens, chosen))
    return torch.stack(stages)


def _tokens_of(x: Tensor, group: Tensor, num_prefix_tokens: int, chosen: tuple[Tensor, Tensor]) -> Tensor:
    rows, patches = chosen[0].to(x.device), chosen[1].to(x.device)
    return x[rows, group[rows, patches] + num_prefix_tokens].float().cpu()


def summarise(result: CkaResult) -> dict[str, Any]:
    """Tables of one model."""
    cka, cosine = result.within()
    return {
        "label": result.label,
        "n_images": result.images,
        "n_patches": result.tokens.shape[1],
        "stages": list(result.stages),
        "cka": cka.tolist(),
        "layer_cosine": cosine.tolist(),
    }


def between(first: CkaResult, second: CkaResult) -> np.ndarray:
    """Linear CKA (L,K) of the stages of two models.

    Raises:
        UserError: they were not measured on the same patches.
    """
    if not np.array_equal(first.patches, second.patches):
        raise UserError(
            f"{first.label} and {second.label} were not measured on the same patches: give them the same images, "
            "patch grid and seed"
        )
    return linear_cka(first.tokens, second.tokens)


# Figures


@charts.styled
def draw(results: CkaResult | Sequence[CkaResult]) -> Figure:
    """Draw each model's layers against each other: linear CKA and cosine of the same token."""
    results = as_list(results)
    figure, axes = charts.new_figure(len(results), 2, 4.2, 3.7, "Patch tokens: layer against layer")
    tables = [result.within() for result in results]
    low = min(0.0, *(float(cosine.min()) for _, cosine in tables))
    for row, result, (cka, cosine) in zip(axes, results, tables, strict=True):
        for ax, table, name, least in zip(row, (cka, cosine), ("linear CKA", "cosine"), (0.0, low), strict=True):
            drawn = ax.imshow(table, vmin=least, vmax=1, cmap=charts.HEAT)
            _ticks(ax, result.stages, result.stages)
            ax.set_title(f"{result.label}: {name}", fontsize=9)
            charts.colour_bar(figure, drawn, ax, name)
    charts.footer(figure, _sample_note(results[0]))
    return figure


def _sample_note(result: CkaResult) -> str:
    return f"{result.tokens.shape[1]} random patches of n = {result.images} images, the same ones in all models"


@charts.styled
def draw_between(results: Sequence[CkaResult]) -> Figure:
    """Draw linear CKA of the layers of the first model against those of every other one; dots: the best partner."""
    first, *others = results
    figure, axes = charts.new_figure(1, len(others), 4.6, 4.0, "Linear CKA between models")
    for ax, other in zip(axes[0], others, strict=True):
        table = between(first, other)
        drawn = ax.imshow(table, vmin=0, vmax=1, cmap=charts.HEAT)
        ax.plot(table.argmax(axis=1), range(len(table)), color="white", marker="o", ms=3, ls="")
        _ticks(ax, other.stages, first.stages)
        ax.set_xlabel(other.label)
        ax.set_ylabel(first.label)
    charts.colour_bar(figure, drawn, axes[0].tolist(), "linear CKA")
    note = "white: the layer of the other model that resembles each layer most. "
    charts.footer(figure, note + _sample_note(first))
    return figure


def _ticks(ax: Axes, across: Sequence[str], upright: Sequence[str]) -> None:
    ax.grid(False)
    for stages, set_ticks, turn in ((across, ax.set_xticks, 90), (upright, ax.set_yticks, 0)):
        shown = list(range(0, len(stages), max(1, round(len(stages) / 14))))
        set_ticks(shown, [stages[i] for i in shown], fontsize=7, rotation=turn)


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `cka`."""
    from .command import add_command

    add_command(subparsers, "cka", run, "layers against layers, within each model and between models: CKA and cosine")


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    """Measure all models and write cka.json, cka.npz and the figures."""
    from .command import Images, Output, load_models

    models = load_models(args, main_argv)
    out = Output(args, main_argv, models)
    results: list[CkaResult] = []
    for loaded in models:
        images = Images(args, loaded, title=(f"counting images for {loaded.label}", f"layers of {loaded.label}"))
        out.about(images.note)
        number = None if not results else results[0].images
        results.append(measure(loaded.model, images, number=number, seed=loaded.args.seed, label=loaded.label))
    tables = {f"{results[0].label} / {other.label}": between(results[0], other) for other in results[1:]}
    rows = [summarise(result) for result in results]
    out.json("cka", {"models": rows, "between": {name: table.tolist() for name, table in tables.items()}})
    arrays = {f"{result.label}/{name}": row[name] for result, row in zip(results, rows, strict=True) for name in TABLES}
    out.npz("cka", {**{name: np.asarray(table) for name, table in arrays.items()}, **tables})
    out.figure("cka_layers", draw(results))
    if tables:
        out.figure("cka_models", draw_between(results))


TABLES = ("cka", "layer_cosine")
