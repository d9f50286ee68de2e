"""Rotary positions of tokens (RoPE, arXiv 2104.09864, 2403.13298), also of merged ones.

Queries and keys are rotated, pair of channels by pair, by angles that follow from a token's place in the image. timm
keeps sines and cosines of all patches in a table; here the table goes with the tokens. Where tokens merge, sines and
cosines are averaged by size: the rotation of a group is then the mean of its patches' rotations, whatever was merged
before. docs/backbones.md compares this with other rules. Prefix tokens are not rotated: sine 0, cosine 1.

Shapes: B batch, N tokens, n patches at the input, P prefix tokens, L blocks, H heads, D their channels, (gh,gw) the
patch grid.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from timm.layers import RotaryEmbeddingCat
from torch import Tensor, nn

from .merging import Merge, PoolIndex, pool_rows


class Positions(Protocol):
    """Where the tokens of a state are, as rotary attention asks it. Never changed: every method makes another."""

    def angles(self, layer: int) -> Tensor:
        """Sines and cosines (1 or B, 1 or H, N, 2D) of all tokens for one block, as timm's attention takes them."""

    def with_prefix(self, count: int) -> "Positions":
        """The positions after `count` prefix tokens entered in front."""

    def merged(self, merge: Merge, by_size: PoolIndex) -> "Positions":
        """The positions after a merge, whose groups are averaged by size."""

    def take(self, index: Tensor | slice) -> "Positions":
        """The positions of some tokens, the same ones in every image."""


@dataclass(frozen=True)
class AxialPositions:
    """A table that all blocks and heads share.

    Attributes:
        table: (1 or B, N, 2D) sines, then cosines; 1 while all images have the same.
    """

    table: Tensor

    def angles(self, layer: int) -> Tensor:
        """See `Positions.angles`."""
        return self.table.unsqueeze(1)

    def with_prefix(self, count: int) -> "AxialPositions":
        """See `Positions.with_prefix`."""
        table = self.table
        still = unrotated(table, count).expand(table.shape[0], -1, -1)
        return replace(self, table=torch.cat((still, table), dim=1))

    def merged(self, merge: Merge, by_size: PoolIndex) -> "AxialPositions":
        """See `Positions.merged`."""
        return replace(self, table=_mean(self.table, merge, by_size))

    def take(self, index: Tensor | slice) -> "AxialPositions":
        """See `Positions.take`."""
        return replace(self, table=self.table[:, index])


@dataclass(frozen=True)
class MixedPositions:
    """A table per block and head (arXiv 2403.13298).

    The tables of all blocks are too large to be averaged per image. What is averaged instead is the share that each
    patch has in a token, and a block's table is looked up by it.

    Attributes:
        table: (L,H,K,2D) of the n patches, after one row for all prefix tokens once there are some.
        shares: (B,N,K) of the rows in each token; None while token i is row `rows[i]`.
        rows: (N,) of the table.
    """

    table: Tensor
    shares: Tensor | None
    rows: Tensor

    def angles(self, layer: int) -> Tensor:
        """See `Positions.angles`."""
        table = self.table[layer]
        if self.shares is None:
            return table[:, self.rows].unsqueeze(0)
        table = table[..., ::2]  # timm holds the angle of two neighbouring channels twice
        heads, rows, width = table.shape
        looked_up = self.shares.to(table.dtype) @ table.transpose(0, 1).reshape(rows, heads * width)
        return looked_up.unflatten(2, (heads, width)).transpose(1, 2).repeat_interleave(2, dim=-1)

    def with_prefix(self, count: int) -> "MixedPositions":
        """See `Positions.with_prefix`."""
        still = unrotated(self.table, 1).expand(*self.table.shape[:2], -1, -1)
        table = torch.cat((still, self.table), dim=2)
        rows = torch.cat((self.rows.new_zeros(count), self.rows + 1))
        if self.shares is None:
            return MixedPositions(table, None, rows)
        batch, tokens, patches = self.shares.shape
        shares = self.shares.new_zeros(batch, count + tokens, 1 + patches)
        shares[:, :count, 0] = 1
        shares[:, count:, 1:] = self.shares
        return MixedPositions(table, shares, rows)

    def merged(self, merge: Merge, by_size: PoolIndex) -> "MixedPositions":
        """See `Positions.merged`."""
        shares = self.shares
        if shares is None:
            every = torch.arange(self.table.shape[2], device=self.rows.device)
            shares = (self.rows.unsqueeze(1) == every).to(torch.float32).unsqueeze(0)
        return replace(self, shares=_mean(shares, merge, by_size))

    def take(self, index: Tensor | slice) -> "MixedPositions":
        """See `Positions.take`."""
        shares = None if self.shares is None else self.shares[:, index]
        return replace(self, shares=shares, rows=self.rows[index])


def start_positions(rope: nn.Module | None, mixed: bool, grid: tuple[int, int], own_grid: Any) -> Positions | None:
    """The positions of all patches, from timm's module; in training with its augmentations of coordinates.

    Args:
        rope: None for a model without rotary positions.
        mixed: whether every block and head has its own table.
        grid: (gh,gw) of the images.
        own_grid: that of the model, for which the module may keep a table.
    """
    if rope is None:
        return None
    table = _table(rope, grid, grid == tuple(own_grid))
    if mixed:
        return MixedPositions(table, None, torch.arange(table.shape[2], device=table.device))
    return AxialPositions(table.unsqueeze(0))


def _table(rope: Any, grid: tuple[int, int], fixed: bool) -> Tensor:
    if fixed and getattr(rope, "feat_shape", None) is not None:
        return rope.get_embed()
    if isinstance(rope, RotaryEmbeddingCat) and rope.feat_shape is not None:  # it would ignore the grid asked for
        rope = copy.deepcopy(rope)
        rope.update_feat_shape(list(grid))
    return rope.get_embed(shape=grid)


def rotate(x: Tensor, rope: Tensor, half: bool, dtype: torch.dtype) -> Tensor:
    """Queries or keys (B,H,N,D) rotated by sines and cosines (1 or B, 1 or H, N, 2D), as a tensor of `dtype`.

    timm's own function does the same; this one is faster on a CPU, for it keeps the order of memory (B,N,H,D) that
    queries and keys come in, and computes every pair of channels once.

    Args:
        half: channel i is paired with i + D/2, as in DINOv3; else neighbours are pairs.
    """
    x, rope = x.transpose(1, 2), rope.transpose(1, 2)
    width = x.shape[-1]
    if half:
        first, second = x[..., : width // 2], x[..., width // 2 :]
        sine, cosine = rope[..., : width // 2], rope[..., width : width + width // 2]
    else:
        first, second = x[..., ::2], x[..., 1::2]
        sine, cosine = rope[..., :width:2], rope[..., width::2]
    turned = (
        torch.addcmul(first * cosine, second.to(sine.dtype), sine, value=-1),
        torch.addcmul(second * cosine, first.to(sine.dtype), sine),
    )
    y = torch.cat(turned, dim=-1) if half else torch.stack(turned, dim=-1).flatten(-2)
    return y.to(dtype).transpose(1, 2)


def unrotated(table: Tensor, count: int) -> Tensor:
    """Sines 0 and cosines 1 of `count` tokens (count,2D), in the form of a table (...,2D)."""
    width = table.shape[-1] // 2
    return torch.cat((table.new_zeros(count, width), table.new_ones(count, width)), dim=-1)


def _mean(x: Tensor, merge: Merge, by_size: PoolIndex) -> Tensor:
    """Mean of every group by size, at least in fp32: (1 or B, N, K) -> (B,M,K)."""
    x = x.to(torch.promote_types(x.dtype, by_size.share.dtype))
    return pool_rows(x.expand(merge.keep.shape[0], -1, -1), by_size)
