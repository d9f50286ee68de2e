"""RegToMe's own rule (docs/beyond.md): tokens go that are like a weightier one, and join the most similar that stays.

Shapes: B batch, N tokens, n = N - P patch tokens, P prefix tokens, C channels, r tokens merged, M = N - r.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..blocks import Candidates, Merged
from ..merging import Merge, PoolIndex, build_pool_index, max_tokens, pool_rows, unmerge
from .base import POOLINGS, Method, knob


@dataclass(frozen=True)
class RegToMe(Method):
    """Every token has a weight, and to lose it costs that weight times its distance from the nearest weightier token.

    The r tokens that cost least go, each into the most similar of all that stay. The weight is the geometric mean of a
    token's size and of the attention that the prefix tokens pay to it; the distance is one minus the cosine of the
    residual stream after attention. The features of a group are averaged by attention, and the length that the mean has
    lost is given back. Of the attention map one row per prefix token is computed, never the map.

    Weight times distance from the nearest weightier neighbour is how density peaks (Rodriguez and Laio, Science 2014)
    find the centres of clusters, there with the number of near neighbours as the weight.
    """

    name = "regtome"
    paper = "docs/beyond.md"
    variants: ClassVar = {
        "regtome": {"r": (18, -1.0), "dense_layers": 2}
    }  # a plain shape; --gmacs searches a better one

    pooling: str = knob("attention", "how the features of a group combine", choices=POOLINGS)
    memory: float = knob(0.5, "how much the attention seen in earlier blocks counts, per block", low=0, high=1)

    def needs_score(self) -> bool:
        """Always: the attention of the prefix weighs the tokens."""
        return True

    def score_queries(self, num_prefix_tokens: int) -> int:
        """The prefix tokens."""
        return num_prefix_tokens

    def most(self, patches: int) -> int:
        """All but one: there are no two sets, any token may be one that others join."""
        return max(0, patches - 1)

    def carry(self, x: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """The attention per patch (B,n,1) that was seen so far: none."""
        return {"attention": torch.zeros_like(x[:, :, :1], dtype=torch.float32)} if self.memory else {}

    def attention(self, candidates: Candidates) -> Tensor:
        """The attention (B,N) that every token receives in this block and, counting less and less, received before."""
        tokens, score = candidates.tokens, candidates.score
        assert score is not None, "needs_score says so"
        if not self.memory:
            return score
        return score + self.memory * tokens.carried["attention"].squeeze(-1) * tokens.size

    def weight(self, candidates: Candidates) -> Tensor | None:
        """As for every method, with the attention of `RegToMe.attention`."""
        return self.attention(candidates) if self.pooling == "attention" else super().weight(candidates)

    def match(self, candidates: Candidates) -> Merge:
        """The r tokens that cost least, each with the most similar token that stays."""
        tokens = candidates.tokens
        weight = (self.attention(candidates) * tokens.size).sqrt()
        return match_by_weight(tokens.x, weight, candidates.plan.r, tokens.num_prefix_tokens)

    def merge(self, candidates: Candidates) -> Merged:
        """Match, pool, and give back the length that the means have lost."""
        tokens = candidates.tokens
        merge, weight = self.match(candidates), self.weight(candidates)
        if self.memory:
            seen = (self.attention(candidates) / tokens.size).unsqueeze(-1)
            tokens = tokens._replace(carried={**tokens.carried, "attention": seen})
        if weight is None:
            return Merged(tokens.merged(max_tokens(tokens.x, merge), merge), merge, None)
        pool = build_pool_index(merge, weight)
        return Merged(tokens.merged(pool_with_length(tokens.x, pool), merge), merge, pool)

    def token_scores(self, candidates: Candidates) -> dict[str, Tensor]:
        """What every patch token is judged by, each (B,n).

        Returns:
            attention: received, times N: 1 is what every token gets when all are looked at equally.
            distance: from the nearest weightier token, in [0,2]; 2 for the weightiest.
            cost: weight times distance; the tokens of least cost go.
        """
        tokens, prefix = candidates.tokens, candidates.tokens.num_prefix_tokens
        attention = self.attention(candidates)
        weight = (attention * tokens.size).sqrt()[:, prefix:]
        order, _, distance = nearest_weightier(tokens.x, weight, prefix)
        distance = torch.empty_like(distance).scatter(1, order, distance)
        attention = attention[:, prefix:] * attention.shape[1]
        return {"attention": attention, "distance": distance, "cost": weight * distance}


@torch.no_grad()
def match_by_weight(x: Tensor, weight: Tensor, r: int, num_prefix_tokens: int) -> Merge:
    """Merge the r patch tokens of least weight times distance, each into the most similar one that stays.

    Args:
        x: (B,N,C) compared by cosine in fp32.
        weight: (B,N) > 0.
        r: tokens to merge, 0 < r < N - P.

    Returns:
        The merge; tokens that stay come in descending order of weight, behind the prefix.
    """
    batch, prefix = x.shape[0], num_prefix_tokens
    weight = weight[:, prefix:]
    order, cosine, distance = nearest_weightier(x, weight, prefix)
    by_cost = (weight.gather(1, order) * distance).argsort(dim=-1)
    go, stay = by_cost[:, :r], by_cost[:, r:].sort(dim=-1).values  # as ranks by weight
    gone = torch.zeros_like(distance).scatter(1, go, torch.ones_like(distance[:, :r]))
    choice = (unmerge(cosine, go) - 4 * gone.unsqueeze(1)).argmax(dim=-1)  # no cosine is below -1
    slots = (1 - gone).cumsum(dim=-1).long() - 1
    first = torch.arange(prefix, device=x.device).expand(batch, -1)
    keep = torch.cat((first, order.gather(1, stay) + prefix), dim=1)
    return Merge(keep, order.gather(1, go) + prefix, slots.gather(1, choice) + prefix)


@torch.no_grad()
def nearest_weightier(x: Tensor, weight: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """How far every patch token is from the nearest one that has more weight.

    Args:
        x: (B,N,C) compared in fp32.
        weight: (B,n) of the patch tokens.

    Returns:
        Tokens (B,n) in descending order of weight, and in this order the cosines (B,n,n) of all pairs and the distances
        1 - cosine (B,n), with 2 for the weightiest, which has none to be near to.
    """
    with torch.autocast(x.device.type, enabled=False):
        order = weight.argsort(dim=-1, descending=True)
        x = unmerge(x, order + num_prefix_tokens).float()
        x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        cosine = x @ x.transpose(1, 2)
        lighter = torch.full(cosine.shape[1:], -4.0, device=x.device).triu()  # added, for filling takes twice the time
        distance = 1 - (cosine + lighter).amax(dim=-1)
    return order, cosine, distance.clamp(min=0, max=2)  # rounding may leave a cosine above 1


def pool_with_length(x: Tensor, pool: PoolIndex) -> Tensor:
    """Weighted mean of every group, with the mean of its members' lengths: (B,N,C) -> (B,M,C).

    The mean of vectors that point apart is shorter than they are, and a short token has less of a say in all sums that
    follow (weighted means of lengths: MLERP of ToFu, arXiv 2312.01026, keeps the greatest length instead).
    """
    pooled = pool_rows(x, pool)
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    left = torch.linalg.vector_norm(pooled, dim=-1, keepdim=True, dtype=torch.float32)
    return pooled * (pool_rows(lengths, pool) / left.clamp_min(1e-12)).to(x.dtype)
