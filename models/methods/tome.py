"""ToMe (arXiv 2210.09461): the most similar pairs of keys merge between attention and MLP."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..blocks import Candidates, mean_over_heads
from ..merging import Merge, cosine_scores, match_scores
from .base import Method, knob


@dataclass(frozen=True)
class ToMe(Method):
    """Bipartite soft matching: every second token proposes its most similar destination, and the best proposals merge.

    Tokens are compared by the cosine of their keys, averaged over heads, before the scaling of query and key.
    """

    name = "tome"
    paper = "Token Merging: Your ViT But Faster, arXiv 2210.09461"
    variants: ClassVar = {"tome": {"r": 16}}

    bidirectional: bool = knob(False, "match both ways")

    def scores(self, candidates: Candidates) -> Tensor:
        """Cosines of keys (B,S,T)."""
        return cosine_scores(patch_keys(candidates), candidates.tokens.num_prefix_tokens)

    def match(self, candidates: Candidates) -> Merge:
        """The r best pairs."""
        prefix = candidates.tokens.num_prefix_tokens
        return match_scores(self.scores(candidates), candidates.plan.r, prefix, self.bidirectional)


@dataclass(frozen=True)
class NoMerging(ToMe):
    """A model that merges nothing, whatever its blocks could."""

    name = "none"
    paper = ""
    variants: ClassVar = {}


def patch_keys(candidates: Candidates) -> Tensor:
    """Keys (B,n,D) of the patch tokens, averaged over heads, in fp32 and without gradient."""
    assert candidates.keys is not None, "a method that compares keys merges after attention"
    return mean_over_heads(candidates.keys.detach())[:, candidates.tokens.num_prefix_tokens :]
