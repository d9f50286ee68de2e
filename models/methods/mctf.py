"""MCTF (arXiv 2403.10030): pairs merge by similarity, informativeness and size, one attention step ahead.

Shapes: B batch, N tokens, n patch tokens, S sources, T destinations.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..blocks import AFTER_MLP, ATTEND_AGAIN, Candidates, Place
from ..blocks import ONE_STEP_AHEAD as MERGE_ONE_STEP_AHEAD
from ..merging import Merge, cosine_scores, match_scores, split_sets
from .base import POOLINGS, Method, knob

ONE_STEP_AHEAD = ("off", "on", "precise")


@dataclass(frozen=True)
class MCTF(Method):
    """Multi-criteria token fusion: similar tokens merge that receive little attention and stand for few patches.

    The score of a pair is the product of three criteria, each to the power 1/tau; tau = 0 switches one off.
    """

    name = "mctf"
    paper = "Multi-criteria Token Fusion with One-step-ahead Attention, arXiv 2403.10030"
    first_block = 1
    variants: ClassVar = {"mctf": {"r": 16}, "mctf_fast": {"r": 0.35, "activate_layers": (3, 6, 9)}}

    pooling: str = knob("attention", "how the features of a group combine", choices=POOLINGS)
    min_tokens: int = knob(10, "smallest number of tokens, with prefix, that a merge may leave", low=0)
    tau_sim: float = knob(1.0, "inverse exponent of similarity", low=0, note="0 switches the criterion off")
    tau_info: float = knob(20.0, "inverse exponent of informativeness", low=0, note="0 switches the criterion off")
    tau_size: float = knob(40.0, "inverse exponent of size", low=0, note="0 switches the criterion off")
    bidirectional: bool = knob(True, "match both ways")
    one_step_ahead: str = knob("on", "which attention weighs the tokens", choices=ONE_STEP_AHEAD)

    def place(self) -> Place:
        """Before attention, or after the MLP without one step ahead."""
        places: dict[str, Place] = {"off": AFTER_MLP, "on": MERGE_ONE_STEP_AHEAD, "precise": ATTEND_AGAIN}
        return places[self.one_step_ahead]

    def needs_score(self) -> bool:
        """Always: informativeness is the attention received."""
        return True

    def scores(self, candidates: Candidates) -> Tensor:
        """Products of the criteria (B,S,T)."""
        tokens, prefix = candidates.tokens, candidates.tokens.num_prefix_tokens
        with torch.no_grad(), torch.autocast(tokens.x.device.type, enabled=False):
            scores = similarity(cosine_scores(tokens.x[:, prefix:], prefix), self.tau_sim)
            factor = token_factor((candidates.score, self.tau_info), (tokens.size, self.tau_size))
            if factor is None:
                return scores
            sources, destinations = split_sets(factor[:, prefix:], prefix)
            return scores * sources.unsqueeze(2) * destinations.unsqueeze(1)

    def match(self, candidates: Candidates) -> Merge:
        """The r best pairs."""
        prefix = candidates.tokens.num_prefix_tokens
        return match_scores(self.scores(candidates), candidates.plan.r, prefix, self.bidirectional)

    def token_scores(self, candidates: Candidates) -> dict[str, Tensor]:
        """The criteria of every patch token, each (B,n).

        Returns:
            attention: received, times N: 1 is what every token gets when all are looked at equally.
            informativeness, size: the token's factors in a pair's score, in (0,1]; 1 merges most readily. Ones where
                the criterion is off.
            similarity: of the most similar token of the other set (sources, destinations), in [0,1].
        """
        tokens, prefix, score = candidates.tokens, candidates.tokens.num_prefix_tokens, candidates.score
        assert score is not None, "needs_score says so"
        factors = {"informativeness": (score, self.tau_info), "size": (tokens.size, self.tau_size)}
        values = {"attention": score * score.shape[1]}
        for name, criterion in factors.items():
            factor = token_factor(criterion)
            values[name] = torch.ones_like(score) if factor is None else factor
        best = best_partner(similarity(cosine_scores(tokens.x[:, prefix:], prefix), self.tau_sim), prefix)
        return {**{name: value[:, prefix:].float() for name, value in values.items()}, "similarity": best}


def similarity(cosine: Tensor, tau: float) -> Tensor:
    """((cos + 1) / 2)^(1/tau), in [0,1]; all ones for tau = 0."""
    if tau == 0:
        return torch.ones_like(cosine)
    half = ((cosine + 1) / 2).clamp(min=0)  # rounding may leave the cosine below -1
    return half if tau == 1 else half ** (1 / tau)


def token_factor(*criteria: tuple[Any, float]) -> Tensor | None:
    """f (B,N) such that f_i * f_j is the product of a pair's criteria, each of which is of rank one.

    Args:
        criteria: values (B,N), of which small ones merge readily, with tau; those of tau = 0 are left out.
    """
    factor = None
    for value, tau in criteria:
        if tau:
            value = (value.amin(dim=1, keepdim=True) / value) ** (1 / tau)
            factor = value if factor is None else factor * value
    return factor


def best_partner(scores: Tensor, num_prefix_tokens: int) -> Tensor:
    """The best score of every patch token, from a table (B,S,T) of sources and destinations: (B,S+T)."""
    best = scores.new_zeros(scores.shape[0], scores.shape[1] + scores.shape[2])
    if scores.numel():  # a single token has no partner
        sources, destinations = split_sets(best, num_prefix_tokens)
        sources.copy_(scores.amax(dim=2))
        destinations.copy_(scores.amax(dim=1))
    return best
