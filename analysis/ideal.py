"""The yardstick of speed: a model whose tokens are dropped by slicing, so that matching and merging cost nothing.

An instrument: its outputs mean nothing, its time is what a merging model with the same tokens per block can at best
have. Shapes: B batch, N tokens in, M tokens out, C channels, H heads.
"""

import copy
from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.blocks import (
    BlockOutput,
    Local,
    attend,
    attention_map,
    join_heads,
    mlp_residual,
    project_out,
    project_qk,
    project_v,
    split_heads,
)
from models.schedule import TokenPlan
from models.vit import MergingViT


class IdealViT(MergingViT):
    """A merging model that keeps the first M tokens of every block instead. Made by `ideal_model`.

    There are no sizes either, so that attention takes no mask and runs on the fastest kernel there is.
    """

    def plan(self, r: Any = None, patches: int | None = None) -> TokenPlan:
        """The merging model's; no windows, which only matching needs."""
        plan = super().plan(r, patches)
        return plan._replace(local=(0,) * len(plan.local))

    def _run_block(
        self, block: Block, x: Tensor, size: Tensor, prefix: int, r: int, merged: bool, local: Local | None
    ) -> BlockOutput:
        left = x.shape[1] - r
        if r and self.merge.method == "mctf":
            place = {"off": drop_after_mlp, "on": drop_one_step_ahead, "precise": drop_and_attend_again}
            x = place[self.merge.one_step_ahead](block, x, left)  # type: ignore[index]
        else:
            x = drop_after_attention(block, x, left)
        return BlockOutput(x, size[:, :left], None)


def ideal_model(model: MergingViT) -> IdealViT:
    """The yardstick of a merging model, with the same parameters (shared, not copied) and the same tokens per block."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    ideal = IdealViT.__new__(IdealViT)
    nn.Module.__init__(ideal)
    ideal._adopt(copy.deepcopy(model, shared))
    return ideal


def drop_after_attention(block: Block, x: Tensor, left: int) -> Tensor:
    """Where ToMe merges: between attention and MLP. (B,N,C) -> (B,M,C)."""
    x = x + block.drop_path1(block.ls1(attend(block.attn, block.norm1(x))[0]))
    return mlp_residual(block, x[:, :left])


def drop_one_step_ahead(block: Block, x: Tensor, left: int) -> Tensor:
    """Where MCTF merges: q, k and the map on N tokens; v, product, projection and MLP on M."""
    attn: Any = block.attn
    attention = attention_map(attn, *project_qk(attn, block.norm1(x)), None)
    x = x[:, :left]
    y = block.norm1(x)
    v = split_heads(attn, project_v(attn, y))
    mixed = join_heads(attn.attn_drop(attention[:, :, :left, :left]) @ v)
    del attention  # as in the merging block
    x = x + block.drop_path1(block.ls1(project_out(attn, y, mixed)))
    return mlp_residual(block, x)


def drop_and_attend_again(block: Block, x: Tensor, left: int) -> Tensor:
    """Where precise MCTF merges: after q, k and the map, before a whole block."""
    attn: Any = block.attn
    attention_map(attn, *project_qk(attn, block.norm1(x)), None)
    return drop_after_attention(block, x[:, :left], left)


def drop_after_mlp(block: Block, x: Tensor, left: int) -> Tensor:
    """Where MCTF without looking ahead merges: after an ordinary block."""
    return drop_after_attention(block, x, x.shape[1])[:, :left]
