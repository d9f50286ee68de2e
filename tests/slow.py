"""The slow oracle of merging, from the equations: one image, one pair, one group at a time; gradients flow through it.

An image is tokens (N,C) with a list of sizes. A merge is a list of groups in output order; a group lists positions, its
own token first. Nothing here is shared with models/ but the parameters.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import MergeConfig, MergingViT

Groups = list[list[int]]
Score = Callable[[int, int], float]  # of a source and a destination position


class Image(NamedTuple):
    """Tokens (N,C), their sizes, and the set of patches of every token (the prefix has none)."""

    x: Tensor
    size: list[float]
    held: list[set[int]]


# Matching


def slow_match(
    n: int, prefix: int, r: int, bidirectional: bool, score: Score, window: dict[int, int] | None = None
) -> Groups:
    """Groups of all tokens after merging r of n patch tokens; with windows the pairs inside them come first."""
    positions = range(prefix, prefix + n)
    sources, destinations = [p for p in positions if p % 2 == 0], [p for p in positions if p % 2 == 1]
    first = r // 2 if bidirectional else r
    pairs = slow_round(sources, destinations, first, score, window)
    goes_to = {s: d for s, d in pairs[:first]}
    left = [s for s in sources if s not in goes_to]
    order = destinations
    if bidirectional:
        back = slow_round(destinations, left, r - first, lambda d, s: score(s, d), window)
        goes_to |= {d: s for d, s in back[: r - first]}
        order = [d for d, _ in back[r - first :]]
    kept = [*range(prefix), *left, *order]
    groups = {p: [p] for p in kept}
    for token in goes_to:
        target = token
        while target in goes_to:
            target = goes_to[target]
        groups[target].append(token)
    return [groups[p] for p in kept]


def slow_round(
    proposers: list[int], targets: list[int], r: int, score: Score, window: dict[int, int] | None
) -> list[tuple[int, int]]:
    """(proposer, its target) from best to worst; with windows first those that windows give."""

    def proposals(pairs: list[tuple[int, int]]) -> list[tuple[float, int, int]]:
        best: dict[int, tuple[float, int, int]] = {}
        for p, t in pairs:
            value = score(p, t)
            if p not in best or value > best[p][0]:
                best[p] = (value, p, t)
        return sorted(best.values(), reverse=True)

    everyone = [(p, t) for p in proposers for t in targets]
    inside: list[tuple[float, int, int]] = []
    if window is not None:
        quota = math.ceil(r / (1 + max(window.values())))
        for w in set(window.values()):
            inside += proposals([(p, t) for p, t in everyone if window[p] == window[t] == w])[:quota]
    taken = {p for _, p, _ in inside}
    rest = proposals([(p, t) for p, t in everyone if p not in taken])
    return [(p, t) for _, p, t in [*sorted(inside, reverse=True), *rest]]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def slow_mctf_score(x: Tensor, received: Tensor, size: list[float], config: MergeConfig) -> Score:
    u = [float(1 / a) for a in received]
    v = [1 / s for s in size]
    u, v = [value / max(u) for value in u], [value / max(v) for value in v]

    def score(i: int, j: int) -> float:
        total = 1.0
        if config.tau_sim:
            total *= ((cosine(x[i], x[j]) + 1) / 2) ** (1 / config.tau_sim)
        if config.tau_info:
            total *= (u[i] * u[j]) ** (1 / config.tau_info)
        if config.tau_size:
            total *= (v[i] * v[j]) ** (1 / config.tau_size)
        return total

    return score


# Pooling


def slow_weights(pooling: str, size: list[float], received: Tensor) -> list[float]:
    return {
        "size": size,
        "attention": [float(a) * s / max(size) for a, s in zip(received, size, strict=True)],
        "mean": [1.0] * len(size),
        "max": [],
    }[pooling]


def slow_pool(rows: Tensor, groups: Groups, weights: list[float]) -> Tensor:
    """Rows (N,K) -> (M,K): weighted mean of every group, without weights the maximum."""
    if not weights:
        return torch.stack([rows[group].amax(dim=0) for group in groups])
    means = [sum(weights[i] * rows[i] for i in g) / sum(weights[i] for i in g) for g in groups]  # type: ignore[misc]
    return torch.stack(means)  # type: ignore[arg-type]


def slow_sum(columns: Tensor, groups: Groups) -> Tensor:
    """Columns (N,K) -> (N,M): sums over every group."""
    return torch.stack([columns[:, group].sum(dim=1) for group in groups], dim=1)


def merged_image(image: Image, x: Tensor, groups: Groups) -> Image:
    sizes = [sum(image.size[i] for i in group) for group in groups]
    return Image(x, sizes, [set().union(*(image.held[i] for i in group)) for group in groups])


# Blocks


def slow_maps(attn: Any, y: Tensor, size: list[float] | None) -> list[Tensor]:
    """softmax(q k^T / sqrt(D) + log s), one (N,N) per head."""
    q, k = heads_of(attn, y, 0), heads_of(attn, y, 1)
    bias = torch.zeros(len(y), dtype=y.dtype) if size is None else torch.tensor(size, dtype=y.dtype).log()
    return [(a @ b.T / math.sqrt(attn.head_dim) + bias).softmax(dim=-1) for a, b in zip(q, k, strict=True)]


def heads_of(attn: Any, y: Tensor, part: int) -> list[Tensor]:
    """q, k or v (part 0, 1, 2), one (N,D) per head."""
    rows = y @ attn.qkv.weight.T + attn.qkv.bias
    width = attn.num_heads * attn.head_dim
    return list(rows[:, part * width : (part + 1) * width].split(attn.head_dim, dim=1))


def slow_product(attn: Any, maps: list[Tensor], y: Tensor) -> Tensor:
    out = torch.cat([a @ v for a, v in zip(maps, heads_of(attn, y, 2), strict=True)], dim=1)
    return out @ attn.proj.weight.T + attn.proj.bias


def slow_received(maps: list[Tensor]) -> Tensor:
    return torch.stack(maps).mean(dim=(0, 1)).detach()


def slow_mctf_block(block: Any, image: Image, prefix: int, r: int, config: MergeConfig) -> Image:
    """MCTF with the map merged on both axes, as published."""
    sizes = image.size if config.prop_attn else None
    maps = slow_maps(block.attn, block.norm1(image.x), sizes)
    received = slow_received(maps)
    weights = slow_weights(config.pooling, image.size, received)  # type: ignore[arg-type]
    ahead = r > 0 and config.one_step_ahead != "off"
    x = image.x
    if not ahead:
        x = x + slow_product(block.attn, maps, block.norm1(x))
        x = x + block.mlp(block.norm2(x))
        if r == 0:
            return image._replace(x=x)
    score = slow_mctf_score(x.detach(), received, image.size, config)
    groups = slow_match(len(x) - prefix, prefix, r, bool(config.bidirectional), score)
    x = slow_pool(x, groups, weights)
    image = merged_image(image, x, groups)
    if not ahead:
        return image
    if config.one_step_ahead == "precise":
        maps = slow_maps(block.attn, block.norm1(x), image.size if config.prop_attn else None)
    else:
        maps = [slow_pool(slow_sum(a, groups), groups, weights) for a in maps]
    x = x + slow_product(block.attn, maps, block.norm1(x))
    return image._replace(x=x + block.mlp(block.norm2(x)))


def slow_key_block(
    block: Any, image: Image, prefix: int, r: int, config: MergeConfig, local: int = 0, grid: tuple[int, int] = (0, 0)
) -> Image:
    """ToMe's place; `local` of the r tokens by LGTM's windows on a grid."""
    y = block.norm1(image.x)
    maps = slow_maps(block.attn, y, image.size if config.prop_attn else None)
    weights = slow_weights(config.pooling, image.size, slow_received(maps))  # type: ignore[arg-type]
    x = image.x + slow_product(block.attn, maps, y)
    image = image._replace(x=x)
    keys = torch.stack(heads_of(block.attn, y, 1)).mean(dim=0).detach()
    groups = slow_key_groups(keys, image.held, weights, prefix, r, config, local, grid)
    image = merged_image(image, slow_pool(x, groups, weights), groups)
    return image._replace(x=image.x + block.mlp(block.norm2(image.x)))


def slow_key_groups(
    keys: Tensor,
    held: list[set[int]],
    weights: list[float],
    prefix: int,
    r: int,
    config: MergeConfig,
    local: int,
    grid: tuple[int, int],
) -> Groups:
    groups = [[i] for i in range(len(keys))]
    bidirectional = bool(config.bidirectional)
    if local:
        window = {i: slow_window(min(held[i]), grid, config.local_grid or 1) for i in range(prefix, len(keys))}
        window[-1] = (config.local_grid or 1) ** 2 - 1  # no token, but every window counts
        metric = keys
        groups = slow_match(
            len(keys) - prefix, prefix, local, bidirectional, lambda i, j: cosine(metric[i], metric[j]), window
        )
        keys = slow_pool(keys, groups, weights)
    if r - local:
        found = slow_match(len(keys) - prefix, prefix, r - local, bidirectional, lambda i, j: cosine(keys[i], keys[j]))
        groups = [[i for member in group for i in groups[member]] for group in found]
    return groups


def slow_window(patch: int, grid: tuple[int, int], per_side: int) -> int:
    """Rows and columns are cut into bands that differ by at most one: band of i = floor(i * bands / length)."""
    row, column = divmod(patch, grid[1])
    return math.floor(row * per_side / grid[0]) * per_side + math.floor(column * per_side / grid[1])


# Models


def tokens_in(model: MergingViT, x: Tensor) -> Tensor:
    """Prefix and patches with their positions, the way timm puts them together: (B,N,C)."""
    patches = model.patch_embed(x)
    prefix = [t.expand(len(x), -1, -1) for t in (model.cls_token, model.dist_token) if t is not None]
    registers = [] if model.reg_token is None else [model.reg_token.expand(len(x), -1, -1)]
    positioned = torch.cat((*prefix, patches), dim=1) + model.pos_embed
    return torch.cat((positioned[:, : len(prefix)], *registers, positioned[:, len(prefix) :]), dim=1)


def slow_forward(model: MergingViT, images: Tensor, r: Any = None) -> list[Image]:
    """Every image after the final norm, by the model's own plan of tokens."""
    plan, prefix, config = model.plan(r), model.num_prefix_tokens, model.merge
    out = []
    for x in tokens_in(model, images):
        image = Image(x, [1.0] * len(x), [{i - prefix} if i >= prefix else set() for i in range(len(x))])
        for block, amount, local in zip(model.blocks, plan.merges, plan.local, strict=True):
            if config.method == "mctf":
                image = slow_mctf_block(block, image, prefix, amount, config)
            else:
                image = slow_key_block(block, image, prefix, amount, config, local, model.patch_embed.grid_size)
        out.append(image._replace(x=model.norm(image.x)))
    return out


def assert_equals_slow(model: MergingViT, images: Tensor, r: Any = None, gradients: bool = True) -> None:
    """Tokens, sizes, groups, and every gradient of a random linear function of the tokens. The model is in double."""
    prefix = model.num_prefix_tokens
    model.zero_grad()
    out = model(images, r=r, trace=True)
    slow = slow_forward(model, images, r)
    tokens = torch.stack([image.x for image in slow])
    torch.testing.assert_close(out.tokens, tokens, rtol=1e-5, atol=1e-6)
    assert out.size.tolist() == [image.size for image in slow]
    for groups, image in zip(out.group, slow, strict=True):
        members = [set((groups == m).nonzero().flatten().tolist()) for m in range(len(image.held) - prefix)]
        assert members == image.held[prefix:]
    if gradients:
        direction = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0), dtype=tokens.dtype)
        names, parameters = zip(
            *((n, p) for n, p in model.named_parameters() if not n.startswith(("head", "fc_norm"))), strict=True
        )
        fast = torch.autograd.grad((out.tokens * direction).sum(), parameters, allow_unused=True)
        for name, ours, theirs in zip(
            names, fast, torch.autograd.grad((tokens * direction).sum(), parameters), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max() + 1), msg=name)
