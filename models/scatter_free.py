"""Scatters as comparisons and sums, for runtimes that do not support (or mishandle) adding and reducing scatters.

Used on exported graphs only: `program.run_decompositions(scatter_free(batch))`. Every function computes what the aten
operator of its name computes, from a one-hot table over (destinations, sources) of the scattered axis, K sources into
S destinations. Merging moves r tokens of an image, so that the tables are (M, r) and small beside the features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def scatter_free(batch: int) -> dict[Any, Callable[..., Tensor]]:
    """Decompositions of every scatter that the models use, and of the stable sort, which ONNX does not have.

    Args:
        batch: images of the example that the graph was traced with; rows of all images flattened into one axis, where
            the core adds rows by number, are split into images again by it.
    """
    return {
        aten.scatter.src: _scatter,
        aten.scatter_add.default: _scatter_add,
        aten.scatter_reduce.two: _scatter_reduce,
        aten.index_add.default: lambda *args, **options: _add_rows(batch, *args, **options),
        aten.argsort.stable: _stable_argsort,
    }


def _scatter(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    x, index, source = _axis_last(x, dim), _axis_last(index, dim), _axis_last(source, dim)
    if index.shape[-1] == x.shape[-1]:  # every destination once: sorting inverts it, without a table of S x S
        return _axis_last(source.gather(-1, index.argsort(dim=-1)), dim)
    hit = _hit(index, x.shape[-1])
    written = (hit * source.unsqueeze(-2)).sum(-1).to(x.dtype)  # an index occurs once
    return _axis_last(torch.where(hit.any(-1), written, x), dim)


def _scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    x, index, source = _axis_last(x, dim), _axis_last(index, dim), _axis_last(source, dim)
    hit = _hit(index, x.shape[-1]).to(source.dtype)
    if index.ndim > 2 and index.shape[-2] == 1:  # the same index for all rows of a matrix
        return _axis_last(x + source @ hit.squeeze(-3).transpose(-1, -2), dim)
    return _axis_last(x + (hit * source.unsqueeze(-2)).sum(-1), dim)


def _scatter_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    x, index, source = _axis_last(x, dim), _axis_last(index, dim), _axis_last(source, dim)
    limits = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
    empty, best, better = {
        "amax": (limits.min, torch.amax, torch.maximum),
        "amin": (limits.max, torch.amin, torch.minimum),
    }[reduce]
    hit = _hit(index, x.shape[-1])
    reduced = best(source.unsqueeze(-2).masked_fill(~hit, empty), -1)
    reduced = better(x, reduced) if include_self else torch.where(hit.any(-1), reduced, x)
    return _axis_last(reduced, dim)


def _add_rows(batch: int, x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """index_add over the flattened rows (B*M,C) of a batch, as one product of (M,r) and (r,C) per image.

    The core adds rows of all images by one index, for that is fastest. Its one-hot table would be (B*M, B*r), mostly
    zeros between images; and B is symbolic in a graph with a dynamic batch. Rows per image are static: with the batch
    of the example they follow from its length.
    """
    if dim != 0 or x.ndim != 2:
        raise NotImplementedError(f"index_add over axis {dim} of {x.ndim} is not rewritten")
    rows = _hint(x.shape[0]) // batch
    images = x.shape[0] // rows
    first = torch.arange(images, device=index.device).unsqueeze(1) * rows
    hit = _hit(index.reshape(images, -1) - first, rows).to(x.dtype)
    added = hit @ (alpha * source).reshape(images, -1, x.shape[1])
    return x + added.reshape(x.shape)


def _stable_argsort(x: Tensor, *, stable: bool | None = True, dim: int = -1, descending: bool = False) -> Tensor:
    """Sort integers stably by an unstable sort: keys are made unique as key * N + position."""
    if x.is_floating_point() or dim not in (-1, x.ndim - 1):
        raise NotImplementedError("a stable sort of floats, or along another axis than the last, is not rewritten")
    positions = torch.arange(x.shape[-1], device=x.device)
    unique = x.to(torch.int64) * x.shape[-1] + (-positions if descending else positions)
    return unique.sort(dim=-1, descending=descending).indices


def _hit(index: Tensor, size: int) -> Tensor:
    """The one-hot table of an index: (...,K) -> (...,S,K), true where source k goes to destination s.

    For sources 0 1 2 that go to 2 0 2, of S = 4 destinations (rows):

        0 1 0
        0 0 0
        1 0 1
        0 0 0

    so that a scattered sum is this table times the sources, and a scattered maximum one along its rows. An index that
    `expand` repeats along an axis, as over channels, has stride 0 there: the table is made once, with length 1.
    """
    for axis in range(index.ndim - 1):
        if index.stride(axis) == 0 and index.shape[axis] != 1:
            index = index.narrow(axis, 0, 1)
    return index.unsqueeze(-2) == torch.arange(size, device=index.device).unsqueeze(-1)


def _axis_last(x: Tensor, dim: int) -> Tensor:
    return x.transpose(dim, -1)


def _hint(size: Any) -> int:
    """A length, for a dynamic one that of the example."""
    return size if isinstance(size, int) else size.node.hint
