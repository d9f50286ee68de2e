"""timm's Vision Transformer with register tokens and token merging, and the one loop over its blocks.

Shapes: B batch, N tokens in, M tokens out, n patches at the input, P prefix tokens, C channels, R registers.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import (
    ATTENTIONS,
    BLOCKS,
    BlockOutput,
    MergingBlock,
    adopt,
    attention_inputs,
    log_size,
    merging_block,
    run_block,
)
from .checks import check_constructor_keywords, check_image_size, unserved
from .config import MergeConfig
from .errors import UserError
from .features import Intermediate, attach_sizes, attached_sizes, check_output_fmt, dense_intermediate, take_indices
from .merging import Merge
from .methods.base import Method
from .rope import start_positions
from .schedule import (
    BlockPlan,
    Schedule,
    TokenPlan,
    format_schedule,
    parse_schedule,
    stacklevel_of_caller,
    token_plan,
    warn_if_clamped,
)
from .tokens import Tokens


class MergeOutput(NamedTuple):
    """The result of `model(images, trace=True)`."""

    logits: Tensor  # (B,classes); with a distillation token the mean of both heads
    tokens: Tensor  # (B,M,C) after the final norm, prefix first
    size: Tensor  # (B,M) patches a token stands for, 1 for the prefix
    group: Tensor  # (B,n) in [0, M-P): the token each patch ended in
    groups: tuple[Tensor, ...]  # the same after every block
    counts: tuple[int, ...]  # tokens after every block
    logits_class: Tensor  # (B,classes) of the class token's head
    logits_dist: Tensor | None  # (B,classes) of the distillation token's head


@dataclass(frozen=True)
class Layer:
    """A block of a forward: its input and output, and the merge in it (None: nothing merged)."""

    plan: BlockPlan
    block: MergingBlock
    before: Tokens  # with the prefix tokens that enter before this block
    after: Tokens
    merge: Merge | None
    rule: Method
    token_types: tuple[str, ...]  # names of the prefix tokens, P of them

    @property
    def index(self) -> int:
        """The block's number, from 0."""
        return self.plan.layer

    @property
    def num_prefix_tokens(self) -> int:
        """P, the prefix tokens present in this block."""
        return self.before.num_prefix_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns (gh,gw) of patches at the input."""
        return self.before.grid

    @property
    def attention_inputs(self) -> dict[str, Any]:
        """What the block's attention is given beside the tokens.

        `attn_mask` is the key bias (B,1,1,N), or None where it is all zeros; a model with rotary positions has `rope`
        too, see `Positions.angles`.
        """
        return attention_inputs(self.before, self.plan, self.rule)


class MergingViT(VisionTransformer):
    """A Vision Transformer with registers (arXiv 2309.16588) and token merging, in timm's parameter names.

    The prefix is [class, (distillation,) registers]; registers have no position entry, are never pooled and never
    merged. `apply_merging` makes one of a timm model, `create_model` of a name; this constructor stands alone.

    Args:
        image_size, patch_size: pixels.
        dim, depth, heads, mlp_dim: width C, blocks, heads, hidden width of the MLP.
        num_registers: R >= 0.
        r: schedule of ToMe merging, in any form of `MergeConfig`; `merge` gives the whole config instead.
        register_layer, class_layer: the blocks before which registers and class token enter.
        distilled: with DeiT's distillation token and second head.
        **vit: further keywords of timm's VisionTransformer (drop_path_rate, init_values, no_embed_class, ...).

    Raises:
        UserError: an option out of range or a form that merging does not support.
    """

    blocks: Any  # nn.Sequential of MergingBlock
    rope: Any  # timm's module of rotary positions, or None
    patch_drop: nn.Module | None
    timm_class: Any  # whose parameters, and whose ways beside the blocks, this model has

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_dim: int = 3072,
        num_registers: int = 4,
        r: Any = 0,
        register_layer: int = 0,
        class_layer: int = 0,
        merge: MergeConfig | None = None,
        distilled: bool = False,
        **vit: Any,
    ) -> None:
        if merge is not None and r != 0:
            raise UserError("give either r or merge (whose r it would contradict), not both")
        if dim % heads:
            raise UserError(f"dim {dim} does not divide into {heads} heads")
        check_constructor_keywords(vit)
        if not vit.get("dynamic_img_pad"):
            check_image_size("image_size", image_size, patch_size)
        sizes: dict[str, Any] = {"img_size": image_size, "patch_size": patch_size, "num_classes": num_classes}
        # timm computes int(dim * mlp_ratio): the half keeps rounding from losing a unit
        sizes |= {"embed_dim": dim, "depth": depth, "num_heads": heads, "mlp_ratio": (mlp_dim + 0.5) / dim}
        vit_class = VisionTransformerDistilled if distilled else VisionTransformer
        nn.Module.__init__(self)  # timm's constructor would build a second set of weights, see `adopt`
        self.__dict__.update(vit_class(**sizes, **vit).__dict__)
        self.timm_class = vit_class
        self._configure(merge or MergeConfig(r=r), num_registers, register_layer, class_layer)

    @classmethod
    def from_timm(
        cls,
        vit: VisionTransformer | Eva,
        merge: MergeConfig,
        num_registers: int | None = None,
        register_layer: int | None = None,
        class_layer: int | None = None,
    ) -> "MergingViT":
        """Take over a timm model: its parameters are shared, its modules copied, the model itself unchanged."""
        check_supported(vit)
        shared = {id(tensor): tensor for tensor in (*vit.parameters(), *vit.buffers())}
        model = adopt(cls, copy.deepcopy(vit, shared))
        if isinstance(vit, MergingViT):
            register_layer = vit.register_layer if register_layer is None and num_registers != 0 else register_layer
            class_layer = vit.class_layer if class_layer is None else class_layer
        else:
            model.timm_class = type(vit)
        model._configure(merge, num_registers, register_layer or 0, class_layer or 0)
        return model

    def _configure(self, merge: MergeConfig, num_registers: int | None, register_layer: int, class_layer: int) -> None:
        check_supported(self)
        if not hasattr(self, "dist_token"):  # only timm's distilled class has one
            self.dist_token, self.head_dist, self.distilled_training = None, None, False
        if not hasattr(self, "rope"):  # only timm's Eva may have one
            self.rope, self.rope_mixed = None, False
        if self.patch_drop is None:  # Eva's word for the same
            self.patch_drop = nn.Identity()
        self.blocks = nn.Sequential(*(merging_block(block) for block in self.blocks))
        if not isinstance(merge, MergeConfig):
            raise UserError(f"merge must be a MergeConfig, not a {type(merge).__name__}")
        depth = len(self.blocks)
        self.schedule_depth = self.__dict__.get("schedule_depth", depth)  # a pruned model keeps that of the whole one
        for name, layer in (("register_layer", register_layer), ("class_layer", class_layer)):
            if not 0 <= layer < depth:
                raise UserError(f"{name} is {layer}, but the model has blocks 0..{depth - 1}")
        if class_layer and self.cls_token is None:
            raise UserError("class_layer has no effect: this model has no class token")
        self.merge, self.register_layer, self.class_layer = merge, register_layer, class_layer
        self._resize_registers(self.num_registers if num_registers is None else num_registers)
        if register_layer and self.num_registers == 0:
            raise UserError("register_layer has no effect: this model has no registers")
        merge.active(self.schedule_depth)  # raises for layers out of range
        merge.rule.check_grid(self.patch_embed.grid_size)
        warn_if_clamped(merge, self.plan())

    def _resize_registers(self, count: int) -> None:
        """Keep the first registers there are, add fresh ones (trunc-normal .02) for the rest."""
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise UserError(f"num_registers must be an integer >= 0, not {count!r}")
        have, class_tokens = self.num_registers, self.num_class_tokens
        if count != have:
            fresh = self.patch_embed.proj.weight.new_empty(1, max(0, count - have), self.embed_dim)
            trunc_normal_(fresh, std=0.02)
            old = [] if self.reg_token is None else [self.reg_token.detach()[:, :count]]  # type: ignore[has-type]
            extra = self.num_pos_prefix - class_tokens  # so150m's own registers have position entries
            if count < extra:
                positions: Tensor = self.pos_embed.detach()  # type: ignore[has-type]
                kept = torch.cat((positions[:, : class_tokens + count], positions[:, self.num_pos_prefix :]), dim=1)
                self.pos_embed = nn.Parameter(kept)
            self.reg_token = nn.Parameter(torch.cat([*old, fresh], dim=1)) if count else None
        self.num_reg_tokens = count
        self.num_prefix_tokens = class_tokens + count

    @property
    def r(self) -> Schedule:
        """The schedule; assigning one, in any form of `MergeConfig.r`, changes it: `model.r = 8`."""
        return self.merge.r

    @r.setter
    def r(self, r: Any) -> None:
        merge = self.merge.with_r(r)
        warn_if_clamped(merge, self._token_plan(merge, merge.r, self.patch_embed.num_patches))
        self.merge = merge

    def extra_repr(self) -> str:
        """Method, schedule and registers, which `repr(model)` shows."""
        r = format_schedule(self.merge.r)
        settings = {"method": self.merge.method, "r": r, "num_registers": self.num_registers}
        return ", ".join(f"{name}={value}" for name, value in settings.items())

    @property
    def num_registers(self) -> int:
        """R, the registers in all."""
        return 0 if self.reg_token is None else self.reg_token.shape[1]

    @property
    def num_class_tokens(self) -> int:
        """Class and distillation tokens: 0, 1 or 2."""
        return int(self.cls_token is not None) + int(self.dist_token is not None)

    @property
    def num_pos_prefix(self) -> int:
        """Prefix tokens, from the first, that have a position entry: pos_embed is (1, num_pos_prefix + n, C)."""
        return 0 if self.pos_embed is None else self.pos_embed.shape[1] - self.patch_embed.num_patches

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides biases and norms."""
        names = {"pos_embed", "cls_token", "dist_token", "reg_token"}
        if hasattr(self.rope, "no_weight_decay"):  # learned frequencies
            names |= {f"rope.{name}" for name in self.rope.no_weight_decay()}
        return names

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise rates."""
        stem = r"^cls_token|dist_token|reg_token|pos_embed|patch_embed|norm_pre"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, or both heads, by fresh ones.

        Args:
            num_classes: 0 takes them away.
            global_pool: another pooling; "" gives all tokens (B,M,C).

        Raises:
            UserError: a pooling that this model cannot have.
        """
        if self.head_dist is not None:
            if global_pool not in (None, "", "token"):
                raise UserError(f"global_pool={global_pool!r}: a distilled model reads its two tokens, not a pool")
            global_pool = None  # as in timm
        try:
            self.timm_class.reset_classifier(self, num_classes, global_pool)
        except AssertionError as error:
            raise UserError(f"global_pool={global_pool!r} does not fit this model: {error}") from error
        if self.head_dist is not None:
            self.head_dist = copy.deepcopy(self.head)
            if isinstance(self.head_dist, nn.Linear):
                self.head_dist.reset_parameters()

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Make a training forward return the logits of both heads, (class, distillation), not their mean.

        Raises:
            UserError: the model has no distillation token.
        """
        if enable and self.head_dist is None:
            raise UserError("set_distilled_training has no effect: this model has no distillation token")
        self.distilled_training = enable

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load parameters by name, as any module does; weights without registers leave the model's own as they are.

        That one difference is warned about, and named in `missing_keys`: timm's models have no registers, and
        `timm.create_model(name, num_registers=4, checkpoint_path=FILE)` loads strictly.
        """
        if self.reg_token is None or "reg_token" in state_dict or not strict:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        result = super().load_state_dict({**state_dict, "reg_token": self.reg_token.detach()}, strict, assign)
        warnings.warn(
            f"the weights have no registers: the {self.num_registers} of the model stay as they are",
            stacklevel=stacklevel_of_caller(),
        )
        result.missing_keys.append("reg_token")
        return result

    def prefixes(self, depth: int | None = None) -> tuple[int, ...]:
        """Prefix tokens present in every block (of the first `depth`, also those that were pruned)."""
        return tuple(
            self.num_class_tokens * (layer >= self.class_layer) + self.num_registers * (layer >= self.register_layer)
            for layer in range(len(self.blocks) if depth is None else depth)
        )

    def token_types(self, layer: int | None = None) -> tuple[str, ...]:
        """Names of the prefix tokens in order: class, distillation, register 1..R (layer: only those in that block)."""
        names: list[str] = []
        if layer is None or layer >= self.class_layer:
            names += ["class", "distillation"][: self.num_class_tokens]
        if layer is None or layer >= self.register_layer:
            names += [f"register {index + 1}" for index in range(self.num_registers)]
        return tuple(names)

    def plan(self, r: Any = None, patches: int | None = None) -> TokenPlan:
        """Tokens merged and left per block for a schedule (default: the model's own) and a number of patches."""
        schedule = self.merge.r if r is None else parse_schedule(r)
        self.merge.check_schedule(schedule)
        return self._token_plan(self.merge, schedule, self.patch_embed.num_patches if patches is None else patches)

    def _token_plan(self, merge: MergeConfig, schedule: Schedule, patches: int) -> TokenPlan:
        return token_plan(merge, patches, self.prefixes(self.schedule_depth), schedule).first(len(self.blocks))

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the resolution: position entries of the patches are resampled (bicubic), the others kept; rotary
        positions are computed anew."""
        old_grid, prefix = self.patch_embed.grid_size, self.num_pos_prefix
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        if self.pos_embed is not None and self.patch_embed.grid_size != old_grid:
            resampled = resample_abs_pos_embed(
                self.pos_embed.detach(), self.patch_embed.grid_size, old_grid, num_prefix_tokens=prefix
            )
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        if hasattr(self.rope, "update_feat_shape"):
            self.rope.update_feat_shape(self.patch_embed.grid_size)

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        r: Any = None,
        trace: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor | MergeOutput | tuple[Tensor, Tensor]:
        """Logits (B,classes) of images (B,3,H,W); everything else with trace=True.

        Args:
            r: another schedule than the model's, in any form of `MergeConfig.r`.
            trace: return a `MergeOutput`.
            attn_mask, is_causal: timm's, for a forward that merges nothing (r=0).

        Returns:
            Logits; in training after `set_distilled_training` those of the class token and of the distillation token.
        """
        plan, layers = self._blocks(images, r, trace, attn_mask, is_causal, pooled=True)
        groups: list[Tensor] = []
        for layer in layers:
            tokens = layer.after
            groups += [tokens.group] if trace else []
            del layer
        tokens = tokens._replace(x=self.norm(tokens.x))
        logits, logits_class, logits_dist = self.classify(tokens.x, tokens.size if tokens.sizes_differ else None)
        if trace:
            return MergeOutput(
                logits, tokens.x, tokens.size, tokens.group, tuple(groups), plan.counts, logits_class, logits_dist
            )
        if logits_dist is not None and self.distilled_training and self.training:
            return logits_class, logits_dist
        return logits

    def _blocks(
        self,
        images: Tensor,
        r: Any,
        follow: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
        pooled: bool = False,
    ) -> tuple[TokenPlan, Iterator[Layer]]:
        """The plan of a forward, and its blocks. Nobody here holds on to the patch embedding while they run.

        Args:
            pooled: of the tokens that leave the last block, only what is pooled is read, unless they are followed.
        """
        if isinstance(images, torch.fx.Proxy):
            raise UserError(
                "torch.fx (create_feature_extractor) cannot trace this model: its shapes follow from the tokens left; "
                "use forward_intermediates, features_only or forward hooks, and torch.export for a graph"
            )
        if isinstance(r, Tensor):
            raise UserError("r, the second argument, is a schedule and not a tensor; give a mask as attn_mask=...")
        tokens = self.embed(images, follow)
        plan = self.plan(r, tokens.x.shape[1])
        masking = self._masking(plan, attn_mask, is_causal)
        if pooled and not follow and not masking and not self.training:
            plan = plan._replace(readers=self.readers(plan))
        return plan, self.layers(tokens, plan, masking=masking)

    def readers(self, plan: TokenPlan) -> int | None:
        """The first tokens, which alone need the last block's queries, projection and MLP; None: all tokens do.

        Where class (and distillation) token are all that is pooled, what becomes of the others in the last block is
        never seen: logits are the same without it, up to the order of sums. Not so for a method that merges before
        attention, or where a hook may look at the last block or the final norm. Training computes all tokens, and so
        does a forward that merges nothing, whose logits are timm's to the bit.
        """
        pools_tokens = self.global_pool == "token" and self.attn_pool is None and self.num_class_tokens > 0
        if not pools_tokens or not any(plan.merges):
            return None
        if plan.merges[-1] and not self.merge.rule.place().after_attention:
            return None
        return None if _hooked(self.blocks[-1]) or _hooked(self.norm) else self.num_class_tokens

    def _masking(self, plan: TokenPlan, attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
        """A mask as the blocks take it. It says who sees whom, and after a merge there is nobody to say it of."""
        if attn_mask is None and not is_causal:
            return {}
        what = "is_causal" if attn_mask is None else "attn_mask"
        if any(plan.merges):
            raise UserError(f"{what} needs a forward that merges nothing, for merging removes the tokens; give r=0 too")
        if self.class_layer or self.register_layer:
            raise UserError(f"{what} needs all tokens from the first block: class_layer=0 and register_layer=0")
        return {"attn_mask": attn_mask, "is_causal": is_causal}

    # timm's feature interface

    def forward_features(  # type: ignore[override]
        self, images: Tensor, r: Any = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens (B,M,C) after the final norm, prefix first, with their sizes (B,M) as attribute `token_sizes`.

        `forward_head` needs these sizes. The attribute goes with this very tensor: what is computed from it has none.
        """
        _, layers = self._blocks(images, r, False, attn_mask, is_causal)
        for layer in layers:
            tokens = layer.after
            del layer
        return self._features(tokens)

    def forward_head(  # type: ignore[override]
        self, x: Tensor, pre_logits: bool = False, size: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of features (B,M,C), or with pre_logits what the head reads, (B,C).

        Args:
            x: what `forward_features` returned; any other tensor where its sizes are known or not needed.
            size: (B,M) patches that each token stands for; None: those that came with x.

        Raises:
            UserError: pooling needs the sizes and x has none, or it has not this model's width.
        """
        if x.ndim != 3 or x.shape[2] != self.embed_dim or x.shape[1] < self.num_prefix_tokens:
            wanted = f"(B,M,{self.embed_dim}) with M >= {self.num_prefix_tokens}"
            raise UserError(f"forward_head takes tokens {wanted}, not {tuple(x.shape)}")
        if getattr(x, "num_prefix_tokens", self.num_prefix_tokens) != self.num_prefix_tokens:
            late = f"register_layer={self.register_layer}, class_layer={self.class_layer}"
            raise UserError(
                f"these features are from before all prefix tokens entered ({late}); the head reads later ones"
            )
        size = self._sizes(x, size)
        if pre_logits:
            pooled, pooled_dist = self._readouts(x, size)
            return pooled if pooled_dist is None else (pooled + pooled_dist) / 2
        logits, logits_class, logits_dist = self.classify(x, size)
        if logits_dist is not None and self.distilled_training and self.training:
            return logits_class, logits_dist
        return logits

    def _sizes(self, x: Tensor, size: Tensor | None) -> Tensor | None:
        """The sizes (B,M) of tokens as pooling needs them; None: it needs none, or all are 1."""
        if self.attn_pool is None and self.global_pool not in ("avg", "avgmax"):
            return None
        if size is not None:
            if size.shape != x.shape[:2]:
                raise UserError(f"size must be {tuple(x.shape[:2])}, one number per token, not {tuple(size.shape)}")
            return size
        known, size = attached_sizes(x)
        if known:
            return size
        tokens, dense = x.shape[1], self.patch_embed.num_patches + self.num_prefix_tokens
        # M tells that nothing merged where all images have the size of the model, or where the method never merges
        if (tokens == dense and self.patch_embed.strict_img_size) or self.merge.method == "none":
            return None
        pool = "attention" if self.attn_pool is not None else self.global_pool
        raise UserError(
            f"{pool} pooling counts a token as often as the patches it stands for, and these {tokens} tokens do "
            "not say how many: give what forward_features returned as it is, or size=features.token_sizes"
        )

    def forward_intermediates(  # type: ignore[override]
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        r: Any = None,
    ) -> Any:
        """Maps of the tokens after some blocks, on the grid of patches: each patch has the token that it is in.

        Args:
            x: images (B,3,H,W).
            indices: blocks; a number is the last so many, None all of them.
            return_prefix_tokens: pairs of map and prefix tokens (B,P,C), P those present in the block.
            norm: apply the final norm to the maps.
            stop_early: do not run the blocks after the last one asked for.
            output_fmt: "NCHW" for (B,C,gh,gw), "NLC" for (B,n,C).
            intermediates_only: only the list of maps.
            output_dict: a dictionary of "image_features", "image_intermediates" and "image_intermediates_prefix".
            attn_mask, is_causal, r: as for `forward`.

        Returns:
            Final features (B,M,C), merged, as `forward_features` gives them; and the list of maps.
        """
        check_output_fmt(output_fmt)
        taken = take_indices(len(self.blocks), indices)
        found: list[Intermediate] = []
        _, layers = self._blocks(x, r, True, attn_mask, is_causal)
        for layer in layers:
            tokens, index = layer.after, layer.index
            del layer
            if index in taken:
                found.append(dense_intermediate(tokens, self.norm(tokens.x) if norm else tokens.x, output_fmt))
            if stop_early and index == max(taken):
                break
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": [maps.patches for maps in found]}
            result |= {"image_intermediates_prefix": [maps.prefix for maps in found]} if with_prefix else {}
            return result if intermediates_only else result | {"image_features": self._features(tokens)}
        intermediates = [tuple(maps) if with_prefix else maps.patches for maps in found]
        return intermediates if intermediates_only else (self._features(tokens), intermediates)

    def _features(self, tokens: Tokens) -> Tensor:
        return attach_sizes(self.norm(tokens.x), tokens)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut off the blocks after the last one of `indices`; those that stay merge as they did. Returns the indices.

        Args:
            indices: as for `forward_intermediates`.
            prune_norm: also the final norm.
            prune_head: also the head; the model then returns all tokens (B,M,C).

        Raises:
            UserError: no such blocks, or prefix tokens would enter in a block that is cut off.
        """
        taken = take_indices(len(self.blocks), indices)
        kept = max(taken) + 1
        for name, layer in (("register_layer", self.register_layer), ("class_layer", self.class_layer)):
            if layer >= kept:
                raise UserError(f"only blocks 0..{kept - 1} would stay, but {name} is {layer}; keep a later block too")
        self.blocks = self.blocks[:kept]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return taken

    def embed_patches(self, images: Tensor) -> Tensor:
        """Patch embeddings with their positions: (B,3,H,W) -> (B,n,C)."""
        x = self.patch_embed(images)
        grid = tuple(x.shape[1:3]) if x.ndim == 4 else None  # NHWC: a model with dynamic image size
        x = x.flatten(1, 2) if x.ndim == 4 else x
        if self.pos_embed is not None:
            x = x + self._positions(grid)[:, self.num_pos_prefix :]
        return self.norm_pre(self.pos_drop(x))

    def _positions(self, grid: Sequence[int] | None) -> Tensor:
        if grid is None or tuple(grid) == tuple(self.patch_embed.grid_size):
            return self.pos_embed
        return resample_abs_pos_embed(
            self.pos_embed, list(grid), list(self.patch_embed.grid_size), num_prefix_tokens=self.num_pos_prefix
        )

    def embed(self, images: Tensor, follow: bool = False) -> Tokens:
        """The state before the first block: patch embeddings of images (B,3,H,W), before any prefix token enters.

        Args:
            follow: keep track of the token that each patch is in.
        """
        x = self.embed_patches(images)
        rows, columns = self.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        positions = start_positions(self.rope, self.rope_mixed, (rows, columns), self.patch_embed.grid_size)
        rule, size = self.merge.rule, x.new_ones(x.shape[:2], dtype=torch.float32)
        tokens = Tokens(x, size, 0, (rows, columns), rule.carry(x, (rows, columns)), positions=positions)
        if not follow and not rule.spatial:
            return tokens
        return tokens._replace(followed=torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1))

    def layers(
        self,
        tokens: Tokens,
        plan: TokenPlan,
        rule: Method | None = None,
        enter: Callable[[int, Tokens], Tokens] | None = None,
        masking: dict[str, Any] | None = None,
        start: int = 0,
    ) -> Iterator[Layer]:
        """Run all blocks and hand out each one: the one loop that the forward and all instruments share.

        Blocks are handed out one at a time, so that memory holds one block's tokens as long as the caller keeps none.

        Args:
            tokens: as `embed` makes them.
            rule: another method than the model's.
            enter: another way for prefix tokens to enter than `self.enter`.
            masking: attn_mask and is_causal of timm's block, for blocks that merge nothing.
            start: the first block to run, on the tokens that the block before it left.
        """
        rule, enter = rule or self.merge.rule, enter or self.enter
        for index, block in list(enumerate(self.blocks))[start:]:
            tokens = enter(index, tokens)
            block_plan = plan.block(index)
            after, merge = self._run_block(block, tokens, block_plan, rule, masking or {})
            after = after.follow(merge)
            yield Layer(block_plan, block, tokens, after, merge, rule, self.token_types(index))
            tokens = after
            del after, merge  # of a long loop only `tokens` may be alive while the next block runs

    def _run_block(
        self, block: MergingBlock, tokens: Tokens, plan: BlockPlan, rule: Method, masking: dict[str, Any]
    ) -> BlockOutput:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(run_block, block, tokens, plan, rule, **masking, use_reentrant=False)
        return run_block(block, tokens, plan, rule, **masking)

    def enter(self, layer: int, tokens: Tokens) -> Tokens:
        """Insert the prefix tokens whose layer this is, at their positions in [class, distillation, registers]."""
        present, batch = tokens.num_prefix_tokens, tokens.x.shape[0]
        prefix, entering = [tokens.x[:, :present]] if present else [], 0
        if layer == self.class_layer and self.cls_token is not None:
            prefix.insert(0, self._prefix_tokens(0, self.num_class_tokens, batch))
            entering += self.num_class_tokens
        if layer == self.register_layer and self.reg_token is not None:
            prefix.append(self._prefix_tokens(self.num_class_tokens, self.num_prefix_tokens, batch))
            entering += self.num_registers
        if not entering:
            return tokens
        return tokens.with_prefix(torch.cat([*prefix, tokens.x[:, present:]], dim=1), entering)

    def _prefix_tokens(self, start: int, stop: int, batch: int) -> Tensor:
        """Prefix tokens [start, stop) with their position entries, as (B, stop - start, C)."""
        tokens = [token for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        x = torch.cat(tokens, dim=1)[:, start:stop]
        with_position = max(0, min(self.num_pos_prefix, stop) - start)
        if with_position:
            positioned = x[:, :with_position] + self.pos_embed[:, start : start + with_position]
            x = torch.cat((positioned, x[:, with_position:]), dim=1)
        return self.norm_pre(self.pos_drop(x.expand(batch, -1, -1)))

    def classify(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, those of the class token's head and of the distillation token's, from normed tokens (B,M,C).

        Args:
            size: (B,M) patches that each token stands for; None: 1 each.
        """
        pooled, pooled_dist = self._readouts(x, size)
        logits = self.head(pooled)
        if pooled_dist is None:
            return logits, logits, None
        assert self.head_dist is not None
        logits_dist = self.head_dist(pooled_dist)
        return (logits + logits_dist) / 2, logits, logits_dist

    def _readouts(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The inputs (B,C) of the head and of the distillation head."""
        if self.head_dist is not None:
            return self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        return self.head_drop(self.fc_norm(self._pool(x, size))), None

    def _pool(self, x: Tensor, size: Tensor | None) -> Tensor:
        """(B,M,C) -> (B,C). A merged token counts as often as the patches it stands for; registers do not count."""
        if not self.global_pool:
            return x
        if self.global_pool == "token":
            return x[:, 0]
        # timm's Eva pools by attention over all tokens
        everything = self.attn_pool is not None if self.timm_class is Eva else self.pool_include_prefix
        start = 0 if everything else self.num_prefix_tokens
        x, size = x[:, start:], None if size is None else size[:, start:]
        if self.attn_pool is not None:
            return self.attn_pool(x) if size is None else self.attn_pool(x, attn_mask=log_size(size, x))
        if self.global_pool == "max":
            return x.amax(dim=1)
        mean = x.mean(dim=1) if size is None else _weighted_mean(x, size)
        return mean if self.global_pool == "avg" else 0.5 * (x.amax(dim=1) + mean)


def _weighted_mean(x: Tensor, size: Tensor) -> Tensor:
    """Mean of tokens (B,M,C) by their sizes (B,M): (B,C)."""
    weight = (size / size.sum(dim=1, keepdim=True)).to(x.dtype)
    return (x * weight.unsqueeze(-1)).sum(dim=1)


def _hooked(module: nn.Module) -> bool:
    """Whether a hook was put on a module or a part of it."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in module.modules()
    )


def apply_merging(
    vit: VisionTransformer | Eva,
    merge: MergeConfig,
    num_registers: int | None = None,
    register_layer: int | None = None,
    class_layer: int | None = None,
) -> MergingViT:
    """A merging model that shares the weights of a timm ViT or Eva, which itself stays unchanged.

    Args:
        num_registers: R in all; None keeps what the model has. New ones are fresh parameters.
        register_layer, class_layer: the blocks before which registers and class token enter; None: the first, or where
            they enter in a model that is a `MergingViT` already.

    Raises:
        UserError: (a ValueError) the model is of a form that cannot be served, which is named.
    """
    return MergingViT.from_timm(vit, merge, num_registers, register_layer, class_layer)


def check_supported(vit: nn.Module) -> None:
    """Raise a UserError that names what a model has that merging cannot serve, and what it would need."""
    name = type(vit).__name__
    problem = None
    blocks: Any = getattr(vit, "blocks", ())
    kinds = {type(block) for block in blocks} - {*BLOCKS, *BLOCKS.values()}
    attentions = {type(getattr(block, "attn", None)) for block in blocks} - {*ATTENTIONS, *ATTENTIONS.values()}
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled, Eva) and not isinstance(vit, MergingViT):
        problem = f"{name} is not timm's VisionTransformer or Eva" + unserved(name)
    elif kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        problem = f"its blocks are {names}, not timm's Block or EvaBlock" + unserved(names)
    elif attentions:
        names = ", ".join(sorted(attention.__name__ for attention in attentions))
        problem = f"its attention is {names}, not one of {', '.join(kind.__name__ for kind in ATTENTIONS)}"
    elif vit.global_pool not in ("", "token", "avg", "avgmax", "max", "map"):
        problem = f"it pools by {vit.global_pool!r}"
    elif not isinstance(vit.patch_drop, (nn.Identity, type(None))):
        problem = "it drops patches (patch_drop_rate > 0)"
    if problem:
        raise UserError(
            f"this model is not supported: {problem}; supported are plain ViT, DeiT, DeiT-III and DINOv2 of timm, "
            "and its Eva (DINOv3, EVA-02, RoPE-ViT, Perception Encoder)"
        )
