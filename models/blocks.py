"""timm's transformer block with a merge in it: the places where tokens merge, and the parts of attention they need.

A block is called as a module that takes and gives a tensor, as timm's own, so that forward hooks, FSDP, profilers and
adapters around its layers see what they expect. The rest of the state goes with the call (`BlockCall`).

Shapes: B batch, N tokens in, M tokens out, P prefix tokens, C channels, H heads, D their channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .merging import Merge, PoolIndex
from .rope import rotate
from .schedule import BlockPlan
from .tokens import Tokens

if TYPE_CHECKING:
    from .methods.base import Method

M = TypeVar("M", bound=nn.Module)

# attention received may underflow; a token is divided by it, and a group of such tokens still needs a weight
_LEAST_SCORE = 1e-20


class BlockOutput(NamedTuple):
    """The tokens that leave a block, and the merge in it (None: nothing merged)."""

    tokens: Tokens
    merge: Merge | None


class Candidates(NamedTuple):
    """The tokens of a block at the place of its merge, with everything that a method may compare them by.

    Attributes:
        tokens: the state at the place of the merge; `tokens.x` (B,N,C) is the residual stream there.
        plan: how many tokens merge, in which block.
        keys: (B,H,N,D) of the block's attention, before any rotation; None at places that have none yet.
        score: (B,N) attention received, mean over heads and queries (`Method.score_queries`); None unless
            `Method.needs_score`.
    """

    tokens: Tokens
    plan: BlockPlan
    keys: Tensor | None
    score: Tensor | None


class Merged(NamedTuple):
    """The outcome of a merge: tokens, the merge itself, and the rows and weights that average any further tensor."""

    tokens: Tokens
    merge: Merge | None
    pool: PoolIndex | None  # None where features combine by their maximum


class BlockCall:
    """The state of one call of a block: tokens and plan go in, tokens and merge come out. Every call has its own."""

    def __init__(self, tokens: Tokens, plan: BlockPlan, rule: Method) -> None:
        self.tokens, self.plan, self.rule = tokens, plan, rule
        self.merge: Merge | None = None


class Readout:
    """Receives what a call of an attention layer computes beside its output."""

    def __init__(self, with_score: bool, queries: int | None = None) -> None:
        self.with_score = with_score
        self.queries = queries  # the tokens whose attention is the score, see `Method.score_queries`
        self.keys: Tensor | None = None  # (B,H,N,D), before any rotation
        self.score: Tensor | None = None  # (B,N) attention received


MergeAhead = Callable[[Tensor], tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]]


class MergingAttention(nn.Module):
    """What merging adds to timm's attention layers, called as modules: to show keys, or to merge before the values."""

    rotate_half: bool
    qkv: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    num_heads: int
    head_dim: int
    scale: float
    fused_attn: bool
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def forward(
        self,
        x: Tensor,
        *arguments: Any,
        readout: Readout | None = None,
        merge_ahead: MergeAhead | None = None,
        readers: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Attention of tokens (B,N,C) -> (B,N,C), or (B,M,C) with `merge_ahead`, or (B,readers,C).

        Args:
            arguments, options: timm's own, among them `attn_mask`, an additive key bias (B,1,1,N) that is never
                expanded to N x N, and in a model with rotary positions `rope`, see `Positions.angles`.
            readout: receives keys and, if it asks for it, the attention received.
            merge_ahead: merges by the attention received (B,H,N,N) map and returns the normed tokens (B,M,C) that are
                left, and the product of map and values (B,M,H*D).
            readers: only the first so many tokens, which are prefix tokens, attend to all.
        """
        if readers is not None:
            return attend_from(self, x, readers, options.get("attn_mask"), options.get("rope"))
        if merge_ahead is not None:
            q, k = project_qk(self, x, options.get("rope"))
            attention = attention_map(self, q, k, options.get("attn_mask"))
            del q, k
            merged, product = merge_ahead(attention)
            mixed = product(attention, project_v(self, merged))
            del attention  # freed before the projection and the MLP, the memory peak of the block
            return project_out(self, merged, mixed)
        if readout is None:
            return super().forward(x, *arguments, **options)
        mask, rope = options.get("attn_mask"), options.get("rope")
        y, readout.keys, readout.score = attend(self, x, mask, readout.with_score, readout.queries, rope)
        return y


class MergingViTAttention(MergingAttention, Attention):
    """The attention of timm's Vision Transformer."""


class MergingRopeAttention(MergingAttention, AttentionRope):
    """timm's attention with rotary positions, and with fewer keys and values than queries where a model has that."""


class MergingEvaAttention(MergingAttention, EvaAttention):
    """The attention of timm's Eva, with a bias of its own for queries and for values."""

    @property
    def qkv_bias_separate(self) -> bool:
        """Whether the layer is called as a module, without its bias; timm would take no notice of an adapter in it."""
        return self.__dict__["qkv_bias_separate"] or (self.qkv is not None and not is_plain(self.qkv))


class MergingBlock(nn.Module):
    """What merging adds to timm's blocks; without a call a block is timm's own."""

    attn: MergingAttention
    norm1: nn.Module
    norm2: nn.Module
    mlp: Any
    drop_path1: nn.Module
    drop_path2: nn.Module

    def forward(self, x: Tensor, call: BlockCall | None = None, **options: Any) -> Tensor:
        """Tokens (B,N,C) -> (B,M,C); the call receives sizes and merge.

        Args:
            options: timm's own; with a call attn_mask and is_causal, for a block that merges nothing.
        """
        if call is None:
            return super().forward(x, **options)
        tokens = call.tokens._replace(x=x)
        if call.plan.readers is not None:
            call.tokens = read_out(self, tokens, call.plan, call.plan.readers, call.rule)
        elif call.plan.r == 0:
            x = super().forward(x, **(attention_inputs(tokens, call.plan, call.rule) | options))
            call.tokens = tokens._replace(x=x)
        else:
            call.tokens, call.merge = call.rule.place().run(self, tokens, call.plan, call.rule)
        return call.tokens.x

    def scale_attention(self, y: Tensor) -> Tensor:
        """LayerScale (arXiv 2103.17239) of what attention adds to the tokens."""
        raise NotImplementedError

    def scale_mlp(self, y: Tensor) -> Tensor:
        """LayerScale of what the MLP adds to the tokens."""
        raise NotImplementedError


class MergingViTBlock(MergingBlock, Block):
    """The block of timm's Vision Transformer."""

    ls1: nn.Module
    ls2: nn.Module

    def scale_attention(self, y: Tensor) -> Tensor:
        """See `MergingBlock.scale_attention`."""
        scaled: Tensor = self.ls1(y)
        return scaled

    def scale_mlp(self, y: Tensor) -> Tensor:
        """See `MergingBlock.scale_mlp`."""
        scaled: Tensor = self.ls2(y)
        return scaled


class MergingEvaBlock(MergingBlock, EvaBlock):
    """The block of timm's Eva."""

    gamma_1: Tensor | None
    gamma_2: Tensor | None

    def scale_attention(self, y: Tensor) -> Tensor:
        """See `MergingBlock.scale_attention`."""
        return y if self.gamma_1 is None else self.gamma_1 * y

    def scale_mlp(self, y: Tensor) -> Tensor:
        """See `MergingBlock.scale_mlp`."""
        return y if self.gamma_2 is None else self.gamma_2 * y


# timm's -> ours
ATTENTIONS: dict[type[nn.Module], type[MergingAttention]] = {
    Attention: MergingViTAttention,
    EvaAttention: MergingEvaAttention,
    AttentionRope: MergingRopeAttention,
}
BLOCKS: dict[type[nn.Module], type[MergingBlock]] = {Block: MergingViTBlock, EvaBlock: MergingEvaBlock}


def run_block(block: MergingBlock, tokens: Tokens, plan: BlockPlan, rule: Method, **masking: Any) -> BlockOutput:
    """Call a block as a module; a forward hook may replace its output. Masking: attn_mask and is_causal of timm's."""
    call = BlockCall(tokens, plan, rule)
    x = block(tokens.x, call, **masking)
    return BlockOutput(call.tokens._replace(x=x), call.merge)


def adopt(cls: type[M], module: nn.Module) -> M:
    """A `cls` with the parameters, submodules and settings of a module of its base class.

    timm builds the module; we only want it to run another forward. So this object is made without its constructor,
    which would initialise weights a second time and would have to know every keyword of timm's. Forward and backward
    hooks stay with the module that they were put on.
    """
    adopted = cls.__new__(cls)
    nn.Module.__init__(adopted)
    state = {name: value for name, value in module.__dict__.items() if not name.startswith(("_forward_", "_backward_"))}
    adopted.__dict__.update(state)
    return adopted


def merging_block(block: Any) -> MergingBlock:
    """A block of `BLOCKS`, or one that merges already, as one that merges."""
    attn_class, block_class = type(block.attn), type(block)
    block.attn = adopt(ATTENTIONS.get(attn_class, attn_class), block.attn)
    if hasattr(block.attn, "num_prefix_tokens"):
        block.attn.num_prefix_tokens = 0  # of the tokens without an angle: ours have one that turns nothing
    return adopt(BLOCKS.get(block_class, block_class), block)


# Places


class Costs(NamedTuple):
    """Multiply-adds per token of a block's parts, and the width of its attention."""

    q: int
    k: int
    v: int
    out: int  # the projection after attention, with its gate
    mlp: int
    width: int  # H * D

    def attention(self, tokens: int) -> int:
        """A whole attention layer: q, k, v, map, product, projection."""
        return tokens * (self.q + self.k + self.v + self.out) + 2 * tokens**2 * self.width

    def map_alone(self, tokens: int) -> int:
        """Query, key and their product."""
        return tokens * (self.q + self.k) + tokens**2 * self.width


class Place(Protocol):
    """Where in a block tokens merge: how the block then runs, and what it costs.

    Attributes:
        after_attention: whether all tokens attend before any merge, so that what the prefix becomes in this block does
            not depend on the merge.
    """

    after_attention: bool

    def run(self, block: MergingBlock, tokens: Tokens, plan: BlockPlan, rule: Method) -> BlockOutput:
        """The block on N tokens, of which plan.r > 0 merge."""

    def macs(self, costs: Costs, tokens: int, left: int) -> int:
        """Multiply-adds of a block that N tokens enter and M leave."""


class AfterAttention:
    """ToMe's place (arXiv 2210.09461): tokens are compared by their keys and merge between attention and MLP."""

    after_attention = True

    def run(self, block: MergingBlock, tokens: Tokens, plan: BlockPlan, rule: Method) -> BlockOutput:
        """See `Place.run`."""
        readout = Readout(rule.needs_score(), rule.score_queries(tokens.num_prefix_tokens))
        y = block.attn(block.norm1(tokens.x), **attention_inputs(tokens, plan, rule), readout=readout)
        tokens = tokens._replace(x=attention_residual(block, tokens.x, y))
        del y  # and the keys below: the MLP is the peak of memory
        merged = rule.merge(Candidates(tokens, plan, readout.keys, readout.score))
        del readout
        tokens, merge = merged.tokens, merged.merge
        del merged
        return BlockOutput(tokens._replace(x=mlp_residual(block, tokens.x)), merge)

    def macs(self, costs: Costs, tokens: int, left: int) -> int:
        """See `Place.macs`."""
        return costs.attention(tokens) + left * costs.mlp


class OneStepAhead:
    """MCTF's place (arXiv 2403.10030): the attention map of all tokens says which merge, and serves merged ones."""

    after_attention = False

    def run(self, block: MergingBlock, tokens: Tokens, plan: BlockPlan, rule: Method) -> BlockOutput:
        """See `Place.run`."""
        ahead: list[Merged] = []

        def merge_ahead(attention: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
            score = attention_score(attention) if rule.needs_score() else None
            merged = rule.merge(Candidates(tokens, plan, None, score))
            ahead.append(merged)
            product = lambda attention, v: rule.attend_merged(block.attn, attention, v, merged)  # noqa: E731
            return block.norm1(merged.tokens.x), product

        y = block.attn(block.norm1(tokens.x), **attention_inputs(tokens, plan, rule), merge_ahead=merge_ahead)
        tokens, merge, _ = ahead.pop()
        tokens = tokens._replace(x=attention_residual(block, tokens.x, y))
        del y
        return BlockOutput(tokens._replace(x=mlp_residual(block, tokens.x)), merge)

    def macs(self, costs: Costs, tokens: int, left: int) -> int:
        """See `Place.macs`: map and product on N tokens (`Method.attend_merged`), all else on M."""
        product = tokens**2 * costs.width
        return costs.map_alone(tokens) + left * costs.v + product + left * costs.out + left * costs.mlp


class AttendAgain:
    """MCTF's precise place: the attention map of all tokens says which merge, and merged ones attend anew."""

    after_attention = False

    def run(self, block: MergingBlock, tokens: Tokens, plan: BlockPlan, rule: Method) -> BlockOutput:
        """See `Place.run`."""
        with torch.no_grad():
            inputs = attention_inputs(tokens, plan, rule)
            q, k = project_qk(block.attn, block.norm1(tokens.x), inputs.get("rope"))
            attention = attention_map(block.attn, q, k, inputs["attn_mask"])
            score = attention_score(attention) if rule.needs_score() else None
            del inputs, q, k, attention
        tokens, merge, _ = rule.merge(Candidates(tokens, plan, None, score))
        y = block.attn(block.norm1(tokens.x), **attention_inputs(tokens, plan, rule))
        tokens = tokens._replace(x=attention_residual(block, tokens.x, y))
        del y
        return BlockOutput(tokens._replace(x=mlp_residual(block, tokens.x)), merge)

    def macs(self, costs: Costs, tokens: int, left: int) -> int:
        """See `Place.macs`."""
        return costs.map_alone(tokens) + costs.attention(left) + left * costs.mlp


class AfterMlp:
    """MCTF's place without looking ahead: an ordinary block, whose output merges by that block's attention."""

    after_attention = True

    def run(self, block: MergingBlock, tokens: Tokens, plan: BlockPlan, rule: Method) -> BlockOutput:
        """See `Place.run`."""
        inputs = attention_inputs(tokens, plan, rule)
        readout = Readout(rule.needs_score(), rule.score_queries(tokens.num_prefix_tokens))
        y = block.attn(block.norm1(tokens.x), **inputs, readout=readout if readout.with_score else None)
        tokens = tokens._replace(x=mlp_residual(block, attention_residual(block, tokens.x, y)))
        merged = rule.merge(Candidates(tokens, plan, None, readout.score))
        return BlockOutput(merged.tokens, merged.merge)

    def macs(self, costs: Costs, tokens: int, left: int) -> int:
        """See `Place.macs`."""
        return costs.attention(tokens) + tokens * costs.mlp


AFTER_ATTENTION, ONE_STEP_AHEAD, ATTEND_AGAIN, AFTER_MLP = AfterAttention(), OneStepAhead(), AttendAgain(), AfterMlp()
PLACES: tuple[Place, ...] = (AFTER_ATTENTION, ONE_STEP_AHEAD, ATTEND_AGAIN, AFTER_MLP)


# The last block, where only some tokens are read


def read_out(block: MergingBlock, tokens: Tokens, plan: BlockPlan, readers: int, rule: Method) -> Tokens:
    """A block of which only the first tokens are read: exact for these, whatever would have merged after attention.

    Keys and values of all tokens are computed, and everything else for the readers alone, which are all that is left.
    """
    y = block.attn(block.norm1(tokens.x), **attention_inputs(tokens, plan, rule), readers=readers)
    x = mlp_residual(block, attention_residual(block, tokens.x[:, :readers], y))
    size = tokens.size[:, :readers]
    return tokens._replace(x=x, size=size, num_prefix_tokens=readers, carried={}, positions=None)


def read_out_macs(costs: Costs, tokens: int, readers: int) -> int:
    """Multiply-adds of `read_out`."""
    every = tokens * (costs.k + costs.v) + 2 * readers * tokens * costs.width
    return every + readers * (costs.q + costs.out + costs.mlp)


# Parts of a block


def attention_residual(block: MergingBlock, x: Tensor, y: Tensor) -> Tensor:
    """The first half of a block, from the output y of its attention."""
    return x + block.drop_path1(block.scale_attention(y))


def mlp_residual(block: MergingBlock, x: Tensor) -> Tensor:
    """The second half of a block."""
    return x + block.drop_path2(block.scale_mlp(block.mlp(block.norm2(x))))


def attention_inputs(tokens: Tokens, plan: BlockPlan, rule: Method) -> dict[str, Any]:
    """What a block's attention is given beside its tokens: the key bias, and where positions are rotary the angles."""
    inputs: dict[str, Any] = {"attn_mask": key_bias(tokens, rule)}
    if tokens.positions is not None:
        inputs["rope"] = tokens.positions.angles(plan.layer)
    return inputs


def key_bias(tokens: Tokens, rule: Method) -> Tensor | None:
    """Proportional attention's key bias (B,1,1,N), None where it would be all zeros or is switched off."""
    return log_size(tokens.size, tokens.x) if rule.prop_attn and tokens.sizes_differ else None


def log_size(size: Tensor, like: Tensor) -> Tensor:
    """Proportional attention's key bias: a token that stands for s patches counts s times. (B,N) -> (B,1,1,N)."""
    return size.log().to(like.dtype)[:, None, None, :]


def attend(
    attn: MergingAttention,
    x: Tensor,
    bias: Tensor | None = None,
    with_score: bool = False,
    queries: int | None = None,
    rope: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """timm's attention with an additive key bias (B,1,1,N), never expanded to N x N.

    Also returns the keys (B,H,N,D), before any rotation, and, if asked for, the attention received (B,N): from all
    tokens, which needs the map, or from the first `queries` alone.
    """
    q, k, v = project_qkv(attn, x)
    keys = k
    if rope is not None:
        q, k = (rotate(part, rope, attn.rotate_half, v.dtype) for part in (q, k))
    if with_score and queries is None:
        attention = attention_map(attn, q, k, bias)
        y = project_out(attn, x, join_heads(attn.attn_drop(attention) @ v))
        return y, keys, attention_score(attention)
    score = score_from(attn, q, k, bias, queries) if with_score and queries is not None else None
    return project_out(attn, x, join_heads(attention_product(attn, q, k, v, bias))), keys, score


def attend_from(
    attn: MergingAttention, x: Tensor, readers: int, bias: Tensor | None = None, rope: Tensor | None = None
) -> Tensor:
    """timm's attention of the first tokens to all of them: (B,N,C) -> (B,readers,C).

    Args:
        readers: prefix tokens, from the first, whose queries no angle turns.
    """
    first = x[:, :readers]
    q = attn.q_norm(split_heads(attn, _project(attn, first, 0, 1)[0]))
    k, v = (split_heads(attn, part) for part in _project(attn, x, 1, 3))
    k = attn.k_norm(k)
    if rope is not None:
        q, k = q.to(v.dtype), rotate(k, rope, attn.rotate_half, v.dtype)
    return project_out(attn, first, join_heads(attention_product(attn, q, k, v, bias)))


def attention_score(attention: Tensor) -> Tensor:
    """Attention received: the mean of a map (B,H,N,N) over heads and queries, in fp32 and without gradient: (B,N)."""
    return attention.detach().flatten(1, 2).mean(dim=1, dtype=torch.float32).clamp(min=_LEAST_SCORE)


@torch.no_grad()
def score_from(attn: MergingAttention, q: Tensor, k: Tensor, bias: Tensor | None, queries: int) -> Tensor:
    """`attention_score` of the first tokens' rows alone; of no tokens: that of the mean of all queries. (B,N)."""
    with torch.autocast(q.device.type, enabled=False):
        first = q[:, :, :queries].float() if queries else q.float().mean(dim=2, keepdim=True)
        return attention_score(attention_map(attn, first, k.float(), None if bias is None else bias.float()))


def mean_over_heads(x: Tensor) -> Tensor:
    """(B,H,N,D) -> (B,N,D) in fp32. Head by head, for a CPU's strided mean takes two to three times as long."""
    return reduce(torch.add, x.float().unbind(1)) / x.shape[1]


def project_qkv(attn: MergingAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B,N,C) -> q, k, v (B,H,N,D), normed where the model does, before any rotation."""
    q, k, v = (split_heads(attn, part) for part in _project(attn, x, 0, 3))
    return attn.q_norm(q), attn.k_norm(k), v


def project_qk(attn: MergingAttention, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first two of `project_qkv` alone, rotated where there are angles."""
    q, k = (split_heads(attn, part) for part in _project(attn, x, 0, 2))
    dtype, q, k = q.dtype, attn.q_norm(q), attn.k_norm(k)
    if rope is None:
        return q, k
    return rotate(q, rope, attn.rotate_half, dtype), rotate(k, rope, attn.rotate_half, dtype)


def project_v(attn: MergingAttention, x: Tensor) -> Tensor:
    """The third one, with heads joined: (B,N,C) -> (B,N,H*D)."""
    return _project(attn, x, 2, 3)[0]


def _project(attn: Any, x: Tensor, start: int, stop: int) -> list[Tensor]:
    """Those of query, key and value in [start, stop), with heads joined: (B,N,C) -> (B,N,H*D) each."""
    if attn.qkv is None:
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)[start:stop]
        return [_every_head(attn, layer(x)) for layer in layers]
    width = attn.num_heads * attn.head_dim
    rows = slice(start * width, stop * width)
    bias = getattr(attn, "q_bias", None)
    if bias is not None:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))[rows]
    if bias is not None and not attn.qkv_bias_separate:
        y = F.linear(x, attn.qkv.weight[rows], bias)
    else:
        y = attn.qkv(x) if (start, stop) == (0, 3) else _linear_rows(attn.qkv, x, rows)
        y = y if bias is None else y + bias
    return list(y.chunk(stop - start, dim=-1))


def _every_head(attn: Any, x: Tensor) -> Tensor:
    """Keys or values (B,N,G*D) of G groups of heads for every head: (B,N,H*D)."""
    heads = x.shape[2] // attn.head_dim
    if heads == attn.num_heads:
        return x
    return x.unflatten(2, (heads, attn.head_dim)).repeat_interleave(attn.num_heads // heads, dim=2).flatten(2)


def _linear_rows(linear: nn.Module, x: Tensor, rows: slice) -> Tensor:
    """Some of the outputs of a linear layer.

    A plain layer computes only those. A layer that is more than its weight (an adapter around it, a quantised or
    parametrised one, one with hooks) is called as a module, and the other outputs are thrown away.
    """
    if not is_plain(linear):
        return linear(x)[..., rows]
    assert isinstance(linear, nn.Linear)
    return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def is_plain(linear: nn.Module) -> bool:
    """True if calling a layer is the same as multiplying by its weight: nn.Linear itself, without hooks of its own.

    Hooks on all modules at once are left out: counters and profilers set them, to see what runs otherwise.
    """
    return type(linear) is nn.Linear and not (
        linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    )


def split_heads(attn: MergingAttention, x: Tensor) -> Tensor:
    """(B,N,H*D) -> (B,H,N,D)."""
    return x.unflatten(2, (attn.num_heads, attn.head_dim)).transpose(1, 2)


def join_heads(y: Tensor) -> Tensor:
    """(B,H,N,D) -> (B,N,H*D)."""
    return y.transpose(1, 2).flatten(2)


def attention_product(attn: MergingAttention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T * scale + bias) v, fused where timm would fuse: (B,H,N,D)."""
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return attn.attn_drop(attention_map(attn, q, k, bias)) @ v


def attention_map(attn: MergingAttention, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """The plain map softmax(q k^T * scale + bias): (B,H,N,N)."""
    logits = (q * attn.scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits += bias  # in place: another N x N map costs more than the sum
    return logits.softmax(dim=-1)


def project_out(attn: MergingAttention, x: Tensor, y: Tensor) -> Tensor:
    """Joined heads (B,N,H*D) back to the residual stream (B,N,C); x is the attention's input (a gate reads it)."""
    y = attn.norm(y)
    if attn.gate is not None:
        y = y * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y))
