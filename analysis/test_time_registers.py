"""Test-time registers (Jiang et al., arXiv 2506.08010): move what a few MLP neurons write into outlier patches to one
extra token, without training.

A register neuron is a hidden unit of an MLP that is active at outlier patches. `find_neurons` ranks them;
`shift_neurons` gives a model that shares the weights, has one all-zero register more (last of the prefix: a token's
place means nothing to a transformer but for its position entry, which it has none of) and moves the neurons'
activations there. That model is an ordinary `MergingViT`, so every other instrument works on it.

Shapes: B batch, N tokens, P prefix tokens, n patches, C channels, F hidden units of an MLP, L blocks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import GluMlp, Mlp
from torch import Tensor, nn

from models.blocks import attend
from models.errors import UserError
from models.vit import MergingViT, apply_merging

from .outliers import Histogram
from .walk import Layer, attention, check_layer, walk

Neuron = tuple[int, int]  # block, hidden unit
QUIET = 0.5  # |activation| below this counts as silent for `sparse`


class Shift(nn.Module):
    """Hidden activations (B,N,F): the largest of every listed neuron goes to one token, all others become zero.

    Per image and per neuron; largest by absolute value, with its sign.
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
    """A model that shares the weights and holds the neurons' activations in one extra register.

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
    """Hidden units F of timm's MLPs."""
    if type(mlp) not in (Mlp, GluMlp):
        raise UserError(f"the MLP {type(mlp).__name__} is not known; test-time registers need timm's Mlp or GluMlp")
    width: int = mlp.fc2.in_features
    return width


def hidden_activations(layer: Layer) -> Tensor:
    """Hidden activations (B,N,F) of a block that merges nothing, after the non-linearity."""
    block: Any = layer.block
    hidden_width(block.mlp)
    y, _, _ = attend(block.attn, block.norm1(layer.before.x), layer.bias)
    mlp, x = block.mlp, block.norm2(layer.before.x + block.ls1(y))
    if isinstance(mlp, Mlp):
        return mlp.act(mlp.fc1(x))
    first, second = mlp.fc1(x).chunk(2, dim=-1)
    return first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second


# Finding them


@dataclass(frozen=True)
class NormTable:
    """Patch norms of all images, one forward each: what outliers are judged by."""

    detection: Tensor  # (images, n) at the detection layer
    largest: Tensor  # (images, L) largest patch norm after every block

    @property
    def histogram(self) -> Histogram:
        """Of the norms at the detection layer: what `analysis.outliers.Rule` cuts."""
        histogram = Histogram()
        histogram.add(self.detection)
        return histogram

    def top_layer(self) -> int:
        """The first block after which the mean largest norm exceeds twice that of the block before, else the one with
        the largest jump."""
        mean = self.largest.mean(dim=0)
        jump = mean[1:] / mean[:-1]
        doubled = (jump > 2).nonzero()
        return int(doubled[0]) + 1 if len(doubled) else int(jump.argmax()) + 1 if len(jump) else 0


def norm_table(model: MergingViT, batches: Iterable[Tensor], detection_layer: int = -1) -> NormTable:
    """Norms of patch tokens without merging; detection_layer counts from the end if negative."""
    detection, largest = [], []
    wanted = check_layer(model, detection_layer)
    for images in batches:
        rows = []
        for layer in walk(model, images, r=0):
            norms = layer.after.x[:, layer.num_prefix_tokens :].float().norm(dim=-1).cpu()
            rows.append(norms.amax(dim=1))
            if layer.index == wanted:
                detection.append(norms)
        largest.append(torch.stack(rows, dim=1))
    return NormTable(torch.cat(detection), torch.cat(largest))


@dataclass(frozen=True)
class Ranking:
    """Neurons by their mean absolute activation at outlier patches, highest first."""

    neurons: tuple[Neuron, ...]
    scores: tuple[float, ...]  # at outlier patches
    elsewhere: tuple[float, ...]  # at all other patches
    images_with_outliers: int
    images: int
    outliers: int

    def by_block(self, top_k: int | None = None) -> dict[int, list[int]]:
        """{block: units} of the first top_k."""
        grouped: dict[int, list[int]] = {}
        for block, unit in self.neurons[:top_k]:
            grouped.setdefault(block, []).append(unit)
        return grouped


@dataclass
class _Sums:
    at_outliers: list[Tensor] = field(default_factory=list)  # per block (F,): sum over images of their mean
    elsewhere: list[Tensor] = field(default_factory=list)
    quiet: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def find_neurons(
    model: MergingViT,
    batches: Iterable[Tensor],
    outliers: Tensor,
    top_layer: int,
    top_k: int,
    sparse: bool = False,
) -> Ranking:
    """Algorithm 1 of the paper, batched: rank hidden units of blocks 0..top_layer.

    An image's score of a unit is its mean |activation| over the image's outlier patches; images without one do not
    count.

    Args:
        batches: the images, in the order of `outliers`.
        outliers: (images, n) which patches are outliers.
        sparse: keep only units that are silent (|activation| < 0.5) at half of the patches or more.

    Raises:
        UserError: no image has an outlier, or top_layer does not exist.
    """
    top_layer = check_layer(model, top_layer)
    if not outliers.any():
        raise UserError("no patch is an outlier under this rule, so there is nothing to find; lower the threshold")
    sums, done, width = _Sums(), 0, top_layer + 1
    for images in batches:
        mask = outliers[done : done + len(images)].to(images.device)
        done += len(images)
        keep = mask.any(dim=1)
        if keep.any():
            _add_batch(sums, model, images[keep], mask[keep], width)
    with_outliers = int(outliers.any(dim=1).sum())
    return _rank(sums, with_outliers, outliers, top_k, sparse)


def _add_batch(sums: _Sums, model: MergingViT, images: Tensor, mask: Tensor, blocks: int) -> None:
    for layer in walk(model, images, r=0):
        if layer.index >= blocks:
            return
        active = hidden_activations(layer)[:, layer.num_prefix_tokens :].float().abs()
        at, off = (_masked_mean(active, which).sum(dim=0).double().cpu() for which in (mask, ~mask))
        quiet = (active < QUIET).float().mean(dim=1).sum(dim=0).double().cpu()
        if len(sums.at_outliers) <= layer.index:
            for store, value in ((sums.at_outliers, at), (sums.elsewhere, off), (sums.quiet, quiet)):
                store.append(value)
        else:
            sums.at_outliers[layer.index] += at
            sums.elsewhere[layer.index] += off
            sums.quiet[layer.index] += quiet


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B,n,F) by (B,n) -> (B,F)."""
    weight = mask.float()
    return torch.einsum("bnf,bn->bf", values, weight) / weight.sum(dim=1, keepdim=True).clamp(min=1)


def _rank(sums: _Sums, images: int, outliers: Tensor, top_k: int, sparse: bool) -> Ranking:
    score = torch.stack(sums.at_outliers) / images if len({len(s) for s in sums.at_outliers}) == 1 else None
    assert score is not None, "blocks of one model have MLPs of one width"
    off, quiet = torch.stack(sums.elsewhere) / images, torch.stack(sums.quiet) / images
    allowed = score.masked_fill(quiet < 0.5, -torch.inf) if sparse else score
    order = allowed.flatten().argsort(descending=True)[:top_k]
    order = order[allowed.flatten()[order] > -torch.inf]
    width = score.shape[1]
    neurons = tuple((int(i) // width, int(i) % width) for i in order)
    picked = [tuple(table.flatten()[order].tolist()) for table in (score, off)]
    return Ranking(neurons, picked[0], picked[1], images, len(outliers), int(outliers.sum()))


def random_neurons(model: MergingViT, neurons: Sequence[Neuron], seed: int = 0) -> tuple[Neuron, ...]:
    """As many other neurons of the same blocks, at random: the control."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Neuron] = []
    for block in sorted({block for block, _ in neurons}):
        taken = {unit for layer, unit in neurons if layer == block}
        order = torch.randperm(hidden_width(model.blocks[block].mlp), generator=generator).tolist()
        drawn += [(block, unit) for unit in [u for u in order if u not in taken][: len(taken)]]
    return tuple(drawn)


# What it does


@dataclass
class Effect:
    """Per-image facts of one model; `summary` turns them into means."""

    correct: list[Tensor] = field(default_factory=list)  # (B,)
    top: list[Tensor] = field(default_factory=list)  # (B,) predicted class
    largest: list[Tensor] = field(default_factory=list)  # (B,L) largest patch norm after every block
    norms: list[Tensor] = field(default_factory=list)  # (B,n) patch norms at the detection layer
    token: list[Tensor] = field(default_factory=list)  # (B,L) norm of the last prefix token
    class_peak: list[Tensor] = field(default_factory=list)  # (B,L) largest attention of the class token to a patch
    class_to_token: list[Tensor] = field(default_factory=list)  # (B,L) its attention to the last prefix token

    @torch.no_grad()
    def add(self, model: MergingViT, images: Tensor, targets: Tensor | None, detection_layer: int = -1) -> None:
        """Count a batch, without merging."""
        wanted, rows = check_layer(model, detection_layer), []
        for layer in walk(model, images, r=0):
            norms = layer.after.x.float().norm(dim=-1).cpu()
            weights = attention(layer).mean(dim=1)[:, 0].float().cpu()  # the first token: class
            patches = weights[:, layer.num_prefix_tokens :].amax(dim=1)
            largest, token = norms[:, layer.num_prefix_tokens :].amax(dim=1), norms[:, layer.num_prefix_tokens - 1]
            rows.append((largest, token, patches, weights[:, layer.num_prefix_tokens - 1]))
            if layer.index == wanted:
                self.norms.append(norms[:, layer.num_prefix_tokens :])
            last = layer
        for store, values in zip(
            (self.largest, self.token, self.class_peak, self.class_to_token), zip(*rows, strict=True), strict=True
        ):
            store.append(torch.stack(values, dim=1))
        tokens = model.norm(last.after.x)
        top = model._classify(tokens, last.after.size)[0].argmax(dim=1).cpu()
        self.top.append(top)
        if targets is not None:
            self.correct.append(top == targets.cpu())

    def summary(self, tau: float, before: "Effect | None" = None) -> dict[str, Any]:
        """Means over images; tau is the outlier threshold of the model before."""
        norms, largest = torch.cat(self.norms).double(), torch.cat(self.largest).double()
        row: dict[str, Any] = {"n_images": len(norms), "max_norm": float(norms.amax(dim=1).mean())}
        row["max_norm_se"] = float(norms.amax(dim=1).std() / len(norms) ** 0.5) if len(norms) > 1 else float("nan")
        row["p98_norm"] = float(norms.flatten().sort().values[int(0.98 * (norms.numel() - 1))])
        row |= {"median_norm": float(norms.median()), "outlier_share": 100 * float((norms > tau).double().mean())}
        row["max_norm_by_block"] = largest.mean(dim=0).tolist()
        row["token_norm_by_block"] = torch.cat(self.token).double().mean(dim=0).tolist()
        row["class_peak_by_block"] = torch.cat(self.class_peak).double().mean(dim=0).tolist()
        row["class_to_token_by_block"] = torch.cat(self.class_to_token).double().mean(dim=0).tolist()
        if self.correct:
            row["acc1"] = 100 * float(torch.cat(self.correct).double().mean())
        if before is not None:
            row["agree"] = 100 * float((torch.cat(self.top) == torch.cat(before.top)).double().mean())
        return row
