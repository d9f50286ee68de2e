"""Features of a merging model as timm's callers expect them: sizes that go with tokens, and maps on the dense grid.

Shapes: B batch, M tokens left, n patches at the input, P prefix tokens, C channels, (gh,gw) the patch grid.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .errors import UserError
from .merging import unmerge
from .tokens import Tokens

OUTPUT_FORMATS = ("NCHW", "NLC")


class Intermediate(NamedTuple):
    """The tokens after one block, on the grid of patches."""

    patches: Tensor  # (B,n,C), or (B,C,gh,gw)
    prefix: Tensor  # (B,P,C), those present in the block


def attach_sizes(x: Tensor, tokens: Tokens) -> Tensor:
    """Features (B,M,C) of some tokens, that know the patches (B,M) each stands for: their attribute `token_sizes`.

    timm's `forward_head` takes a tensor and nothing else. What is computed from these features does not have the
    attribute, so a head that needs sizes and was given something else can tell.
    """
    x.token_sizes, x.tokens_merged = tokens.size, tokens.sizes_differ  # type: ignore[attr-defined]
    x.num_prefix_tokens = tokens.num_prefix_tokens  # type: ignore[attr-defined]
    return x


def attached_sizes(x: Tensor) -> tuple[bool, Tensor | None]:
    """Whether features (B,M,C) know their sizes, and the sizes (B,M); None if nothing has merged."""
    size = getattr(x, "token_sizes", None)
    if size is None or size.shape != x.shape[:2]:
        return False, None
    return True, size if getattr(x, "tokens_merged", True) else None


def dense_intermediate(tokens: Tokens, x: Tensor, output_fmt: str) -> Intermediate:
    """Features x (B,M,C) of some tokens with every patch given those of the token that it is in."""
    prefix, patches = x[:, : tokens.num_prefix_tokens], x[:, tokens.num_prefix_tokens :]
    if tokens.sizes_differ:
        patches = unmerge(patches, tokens.group)
    if output_fmt == "NCHW":
        patches = patches.unflatten(1, tokens.grid).permute(0, 3, 1, 2).contiguous()
    return Intermediate(patches, prefix)


def take_indices(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    """Blocks by timm's rule: None is all, a number the last so many, a list those blocks, counted from the end below 0.

    Raises:
        UserError: a block that the model does not have.
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise UserError(f"indices={indices} asks for the last {indices} of {depth} blocks")
        return list(range(depth - indices, depth))
    taken = [depth + index if index < 0 else index for index in indices]
    if not taken or not all(0 <= index < depth for index in taken):
        raise UserError(f"indices={list(indices)} must name blocks 0..{depth - 1}, or -1..-{depth} from the end")
    return taken


def check_output_fmt(output_fmt: Any) -> None:
    """Raise a UserError for a format other than NCHW and NLC."""
    if output_fmt not in OUTPUT_FORMATS:
        raise UserError(f"output_fmt must be one of {', '.join(OUTPUT_FORMATS)}, not {output_fmt!r}")
