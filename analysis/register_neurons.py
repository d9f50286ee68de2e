"""Register neurons (Jiang et al., arXiv 2506.08010): the few hidden units that write outliers, found and moved.

A register neuron is a hidden unit of an MLP that is active at outlier patches. `find_neurons` ranks them;
`shift_neurons` gives a model that shares the weights, has one all-zero register more and moves the neurons'
activations there, without training. The new register is the last of the prefix tokens; among registers order does not
matter, for they have no position embedding. That model is an ordinary `MergingViT`, so every other instrument works on
it. The instrument `test_time_registers` measures what it changes.

Shapes: B batch, N tokens, P prefix tokens, n patches, C channels, F hidden units of an MLP, L blocks.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from models.blocks import attention_residual
from models.errors import UserError
from models.vit import MergingViT, apply_merging

from .intervals import resample
from .outliers import Histogram, norms
from .walk import Layer, check_layer, walk

Neuron = tuple[int, int]  # block, hidden unit
QUIET = 0.5  # |activation| below this counts as silent for `sparse`


class Shift(nn.Module):
    """Move every listed neuron's largest activation of an image to one token, and set its others to zero.

    It acts on hidden activations (B,N,F), per image and per neuron. The largest is that of the largest absolute value,
    and keeps its sign.
    """

    def __init__(self, neurons: Sequence[int], token: int) -> None:
        super().__init__()
        self.neurons, self.token = list(neurons), token

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = hidden[..., self.neurons]
        peak = chosen.gather(1, chosen.abs().argmax(dim=1, keepdim=True))
        moved = torch.zeros_like(chosen)
        moved[:, self.token : self.token + 1] = peak
        shifted = hidden.clone()
        shifted[..., self.neurons] = moved
        return shifted


def shift_neurons(model: MergingViT, neurons: Iterable[Neuron], add_token: bool = False) -> MergingViT:
    """Make a model that shares the weights and holds the neurons' activations in one extra register.

    Args:
        neurons: (block, hidden unit); none of them leaves the model as it is.
        add_token: add the empty token also without neurons (a control).

    Raises:
        UserError: a neuron that the model does not have, or an MLP of an unknown form.
    """
    by_block: dict[int, list[int]] = {}
    for block, unit in neurons:
        by_block.setdefault(block, []).append(unit)
    if not by_block and not add_token:
        return model
    check_neurons(model, by_block)
    if model.class_layer or (by_block and min(by_block) < model.register_layer):
        raise UserError("test-time registers need class token and registers to enter before the neurons' blocks")
    registers = None if model.reg_token is None else model.reg_token.detach()
    rng = torch.get_rng_state()
    shifted = apply_merging(model, model.merge, model.num_registers + 1)
    torch.set_rng_state(rng)  # the fresh register, which is overwritten, has drawn from it
    zero = model.patch_embed.proj.weight.new_zeros(1, 1, model.embed_dim)
    shifted.reg_token = nn.Parameter(zero if registers is None else torch.cat((registers, zero), dim=1))
    for block, units in by_block.items():
        # timm's MLPs apply `norm` to the activations (B,N,F), between non-linearity and second layer: the one place
        # where a module of the model's own, without a hook, can change them
        mlp: Any = shifted.blocks[block].mlp
        mlp.norm = nn.Sequential(Shift(units, shifted.num_prefix_tokens - 1), mlp.norm)
    return shifted.train(model.training)


def check_neurons(model: MergingViT, by_block: dict[int, list[int]]) -> None:
    """Raise a UserError for neurons that the model does not have."""
    for block, units in by_block.items():
        if not 0 <= block < len(model.blocks):
            raise UserError(f"neurons name block {block}, but the model has blocks 0..{len(model.blocks) - 1}")
        width = hidden_width(model.blocks[block].mlp)
        if len(set(units)) != len(units) or not all(0 <= unit < width for unit in units):
            raise UserError(f"neurons of block {block} must be different units in 0..{width - 1}, not {units}")


def hidden_width(mlp: Any) -> int:
    """The number F of hidden units of one of timm's MLPs."""
    if type(mlp) not in (Mlp, GluMlp, SwiGLU):
        raise UserError(
            f"the MLP {type(mlp).__name__} is not known; test-time registers need timm's Mlp, GluMlp or SwiGLU"
        )
    width: int = mlp.fc2.in_features
    return width


def hidden_activations(layer: Layer) -> Tensor:
    """Hidden activations (B,N,F) of a block that merges nothing, after the non-linearity."""
    block: Any = layer.block
    hidden_width(block.mlp)
    y = block.attn(block.norm1(layer.before.x), **layer.attention_inputs)
    mlp, x = block.mlp, block.norm2(attention_residual(block, layer.before.x, y))
    if isinstance(mlp, Mlp):
        return mlp.act(mlp.fc1(x))
    if isinstance(mlp, SwiGLU):
        return mlp.act(mlp.fc1_g(x)) * mlp.fc1_x(x)
    first, second = mlp.fc1(x).chunk(2, dim=-1)
    return first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second


# Finding them


@dataclass(frozen=True)
class NormTable:
    """Norms of the patch tokens of all images, by which outliers are judged."""

    detection: Tensor  # (images, n) at the detection layer
    largest: Tensor  # (images, L) largest patch norm after every block

    @property
    def histogram(self) -> Histogram:
        """The norms at the detection layer, for `Rule.cut`."""
        histogram = Histogram()
        histogram.add(self.detection)
        return histogram

    def top_layer(self) -> int:
        """The first block after which the mean largest norm exceeds twice that of the block before, else the one with
        the largest jump."""
        return _top_layer(self.largest.mean(dim=0).numpy())

    def jumps(self) -> list[float]:
        """Mean largest norm after each block over that after the block before (L-1,)."""
        mean = self.largest.mean(dim=0)
        ratios: list[float] = (mean[1:] / mean[:-1]).tolist()
        return ratios

    def top_layer_votes(self, draws: int = 1000) -> dict[int, float]:
        """How sure `top_layer` is: the share of bootstrap draws over images that choose each block, most first."""
        sums = resample(self.largest.double().numpy(), draws)
        votes = Counter(_top_layer(row / len(self.largest)) for row in sums)
        return {layer: count / draws for layer, count in votes.most_common()}


def _top_layer(mean: np.ndarray) -> int:
    jump = mean[1:] / mean[:-1]
    doubled = np.nonzero(jump > 2)[0]
    return int(doubled[0]) + 1 if len(doubled) else int(jump.argmax()) + 1 if len(jump) else 0


def norm_table(model: MergingViT, batches: Iterable[Tensor], detection_layer: int = -1) -> NormTable:
    """Collect the norms of patch tokens, without merging; detection_layer counts from the end if negative."""
    detection, largest = [], []
    detection_layer = check_layer(model, detection_layer, "detection_layer")
    for images in batches:
        rows = []
        for layer in walk(model, images, r=0):
            lengths = norms(layer.after.x[:, layer.num_prefix_tokens :]).cpu()
            rows.append(lengths.amax(dim=1))
            if layer.index == detection_layer:
                detection.append(lengths)
        largest.append(torch.stack(rows, dim=1))
    return NormTable(torch.cat(detection), torch.cat(largest))


@dataclass(frozen=True)
class Ranking:
    """Neurons, best first, see `find_neurons`."""

    neurons: tuple[Neuron, ...]
    scores: tuple[float, ...]  # mean absolute activation at outlier patches
    elsewhere: tuple[float, ...]  # at all other patches
    images_with_outliers: int
    images: int
    outliers: int

    @property
    def ratios(self) -> tuple[float, ...]:
        """Activation at outliers over that elsewhere: 1 for a unit that outliers are nothing special to."""
        return tuple(at / max(other, 1e-12) for at, other in zip(self.scores, self.elsewhere, strict=True))

    def by_block(self, top_k: int | None = None) -> dict[int, list[int]]:
        """{block: units} of the first top_k."""
        grouped: dict[int, list[int]] = {}
        for block, unit in self.neurons[:top_k]:
            grouped.setdefault(block, []).append(unit)
        return grouped


@dataclass
class _Sums:
    """Sums over images, per block (F,)."""

    at_outliers: list[Tensor] = field(default_factory=list)  # of the mean |activation| over outlier patches
    elsewhere: list[Tensor] = field(default_factory=list)  # of the mean |activation| over the other patches
    quiet: list[Tensor] = field(default_factory=list)  # of the share of patches at which a unit is silent

    def add(self, block: int, *values: Tensor) -> None:
        for sums, value in zip((self.at_outliers, self.elsewhere, self.quiet), values, strict=True):
            if len(sums) <= block:
                sums.append(value)
            else:
                sums[block] += value


@torch.no_grad()
def find_neurons(
    model: MergingViT,
    batches: Iterable[Tensor],
    outliers: Tensor,
    top_layer: int,
    top_k: int,
    sparse: bool = False,
    rank_by: str = "ratio",
) -> Ranking:
    """Rank the hidden units of blocks 0..top_layer: algorithm 1 of the paper, batched, and a second step.

    An image's score of a unit is its mean |activation| over the image's outlier patches; images without one do not
    count. The mean is taken per image first, so that an image with many outliers counts no more than others. By that
    score alone, as in the paper, units rank high that are as active everywhere. So the one unit in a hundred that is
    most active at outliers (at least top_k of them) is ranked again, by its activation there over that elsewhere.

    Args:
        batches: the images, in the order of `outliers`.
        outliers: (images, n) which patches are outliers.
        sparse: keep only units that are silent (|activation| < 0.5) at half of the patches or more.
        rank_by: "ratio", or "activation" for the paper's order.

    Raises:
        UserError: no image has an outlier, or top_layer does not exist.
    """
    top_layer = check_layer(model, top_layer, "top_layer")
    if not outliers.any():
        raise UserError("no patch is an outlier under this rule, so there is nothing to find; lower the threshold")
    sums, done = _Sums(), 0
    for images in batches:
        mask = outliers[done : done + len(images)].to(images.device)
        done += len(images)
        keep = mask.any(dim=1)
        if keep.any():
            _add_batch(sums, model, images[keep], mask[keep], top_layer)
    return _rank(sums, outliers, top_k, sparse, rank_by)


def _add_batch(sums: _Sums, model: MergingViT, images: Tensor, mask: Tensor, top_layer: int) -> None:
    for layer in walk(model, images, r=0):
        if layer.index > top_layer:
            return
        active = hidden_activations(layer)[:, layer.num_prefix_tokens :].float().abs()
        quiet = (active < QUIET).float().mean(dim=1)
        per_image = (_masked_mean(active, mask), _masked_mean(active, ~mask), quiet)
        sums.add(layer.index, *(values.sum(dim=0).double().cpu() for values in per_image))


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B,n,F) by (B,n) -> (B,F)."""
    weight = mask.float()
    return torch.einsum("bnf,bn->bf", values, weight) / weight.sum(dim=1, keepdim=True).clamp(min=1)


def _rank(sums: _Sums, outliers: Tensor, top_k: int, sparse: bool, rank_by: str) -> Ranking:
    assert len({len(score) for score in sums.at_outliers}) == 1, "blocks of one model have MLPs of one width"
    images = int(outliers.any(dim=1).sum())
    score, elsewhere, quiet = (
        torch.stack(table) / images for table in (sums.at_outliers, sums.elsewhere, sums.quiet)
    )  # (blocks,F) each
    # A unit that is always on scores high at outliers and everywhere else. Register neurons are the silent ones that
    # outliers alone switch on, which is what `sparse` asks for.
    allowed = score.masked_fill(quiet < 0.5, -torch.inf) if sparse else score
    order = allowed.flatten().argsort(descending=True)
    if rank_by == "ratio":
        candidates = order[: max(top_k, len(order) // 100)]
        contrast = score.flatten()[candidates] / elsewhere.flatten()[candidates].clamp(min=1e-12)
        order = candidates[contrast.argsort(descending=True)]
    order = order[:top_k]
    order = order[allowed.flatten()[order] > -torch.inf]
    width = score.shape[1]
    neurons = tuple((int(i) // width, int(i) % width) for i in order)
    at_outliers, at_others = (tuple(table.flatten()[order].tolist()) for table in (score, elsewhere))
    return Ranking(neurons, at_outliers, at_others, images, len(outliers), int(outliers.sum()))


def random_neurons(model: MergingViT, neurons: Sequence[Neuron], seed: int = 0) -> tuple[Neuron, ...]:
    """Draw as many other neurons of the same blocks, at random: the control."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Neuron] = []
    for block in sorted({block for block, _ in neurons}):
        taken = {unit for layer, unit in neurons if layer == block}
        order = torch.randperm(hidden_width(model.blocks[block].mlp), generator=generator).tolist()
        drawn += [(block, unit) for unit in [u for u in order if u not in taken][: len(taken)]]
    return tuple(drawn)
