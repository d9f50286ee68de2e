"""PiToMe (arXiv 2405.16148): tokens that resemble many others merge, tokens of their own kind are protected.

Shapes: B batch, n patch tokens, P prefix tokens, D key channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import Candidates
from ..merging import Merge
from .base import Method, knob
from .tome import patch_keys


@dataclass(frozen=True)
class PiToMe(Method):
    """Protect informative tokens before merging: the 2r tokens of highest energy pair up, and r of them merge.

    The energy of a token is the mean of ELU(cosine - margin) over all tokens, with keys as in ToMe. It is high for a
    token in a large cluster (background) and low for one that stands apart, which is protected. The margin falls
    linearly over depth. Of the 2r tokens, sorted by energy, every second one is a source and merges into its most
    similar destination among the others.
    """

    name = "pitome"
    paper = "Accelerating Transformers with Spectrum-Preserving Token Merging, arXiv 2405.16148"
    variants: ClassVar = {"pitome": {"r": 0.0875}}

    margin: float = knob(0.75, "cosine above which tokens count as similar, in the first block", low=0, high=1)

    def match(self, candidates: Candidates) -> Merge:
        """The r sources, and the destination of each."""
        plan = candidates.plan
        margin = self.margin * (1 - plan.layer / plan.depth)
        return match_by_energy(patch_keys(candidates), plan.r, candidates.tokens.num_prefix_tokens, margin)

    def token_scores(self, candidates: Candidates) -> dict[str, Tensor]:
        """The energy (B,n) of every patch token, in (-1, 1); the highest ones merge."""
        margin = self.margin * (1 - candidates.plan.layer / candidates.plan.depth)
        return {"energy": energy(cosines(patch_keys(candidates)), margin)}


def cosines(keys: Tensor) -> Tensor:
    """Cosine of every pair of tokens in fp32: (B,n,D) -> (B,n,n)."""
    with torch.no_grad(), torch.autocast(keys.device.type, enabled=False):
        keys = keys.float()
        keys = keys / torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_min(1e-12)
        return keys @ keys.transpose(1, 2)


def energy(cosine: Tensor, margin: float) -> Tensor:
    """Mean over tokens of ELU(cosine - margin): (B,n,n) -> (B,n)."""
    return F.elu(cosine - margin).mean(dim=-1)


@torch.no_grad()
def match_by_energy(keys: Tensor, r: int, num_prefix_tokens: int, margin: float) -> Merge:
    """Merge every second of the 2r tokens of highest energy into its most similar one of the others.

    Args:
        keys: (B,n,D) of patch tokens.
        r: tokens to merge, 0 < r <= n // 2.

    Returns:
        The merge; tokens that are left keep their old order.
    """
    cosine = cosines(keys)
    batch, patches = cosine.shape[:2]
    order = energy(cosine, margin).argsort(dim=-1, descending=True)
    sources, destinations, protected = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
    rows = cosine.gather(1, sources.unsqueeze(-1).expand(-1, -1, patches))
    choice = rows.gather(2, destinations.unsqueeze(1).expand(-1, r, -1)).argmax(dim=-1)
    left = torch.cat((destinations, protected), dim=1).sort(dim=-1).values
    ranks = torch.arange(patches - r, device=keys.device).expand(batch, -1)
    rank = torch.zeros_like(order).scatter(1, left, ranks)  # of the tokens that are left; 0 elsewhere, never read
    prefix = torch.arange(num_prefix_tokens, device=keys.device).expand(batch, -1)
    return Merge(
        keep=torch.cat((prefix, left + num_prefix_tokens), dim=1),
        source=sources + num_prefix_tokens,
        into=rank.gather(1, destinations.gather(1, choice)) + num_prefix_tokens,
    )
