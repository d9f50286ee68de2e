"""Tiny models with random weights for the tests of the core, and what several of them check."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from models import MergeConfig, MergingViT, apply_merging
from models.blocks import ONE_STEP_AHEAD, Candidates
from models.methods import METHODS
from models.schedule import BlockPlan
from models.tokens import Tokens

SIZES: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 10,
}
PATCHES = 16


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Every parameter random, also those that start at 0 (class token, registers, biases) or at 1e-6 (LayerScale)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "token" not in name and "pos_embed" not in name:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model


def images(batch: int = 2, size: int | tuple[int, int] = 32, seed: int = 1) -> Tensor:
    """Random images (B,3,H,W)."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def timm_vit(distilled: bool = False, seed: int = 0, **options: Any) -> Any:
    """timm's own model with 16 patches, in evaluation mode."""
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    return randomise(timm.create_model(name, **(SIZES | options)), seed).eval()


def ours(
    merge: MergeConfig | None = None,
    num_registers: int | None = None,
    register_layer: int = 0,
    class_layer: int = 0,
    distilled: bool = False,
    seed: int = 0,
    **options: Any,
) -> MergingViT:
    """A merging model on `timm_vit`, also the registers random."""
    merge = merge or MergeConfig(method="none")
    vit = timm_vit(distilled, seed, **options)
    model = apply_merging(vit, merge, num_registers, register_layer, class_layer)
    return randomise(model, seed).eval()


def with_prefix(prefix: int, merge: MergeConfig, seed: int = 0, **options: Any) -> MergingViT:
    """P = 0: pooling model; 1: class; 2: class and distillation; more: class and registers."""
    if prefix == 0:
        return ours(merge, class_token=False, global_pool="avg", seed=seed, **options)
    if prefix == 2:
        return ours(merge, distilled=True, seed=seed, **options)
    return ours(merge, num_registers=prefix - 1, seed=seed, **options)


def identity_blocks(model: MergingViT) -> MergingViT:
    """Blocks whose branches write zeros, and no final norm: what goes in comes out."""
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    model.norm = nn.Identity()
    return model


def block_inputs(model: MergingViT, x: Tensor) -> list[Tensor]:
    """The tokens that enter each block, seen by hooks on its first norm."""
    seen: list[Tensor] = []
    hooks = [block.norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in model.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


def candidates(
    x: Tensor,
    r: int,
    prefix: int,
    size: Tensor | None = None,
    score: Tensor | None = None,
    keys: Tensor | None = None,
    layer: int = 0,
    depth: int = 1,
    **state: Any,
) -> Candidates:
    """What a method is asked in a block that r of the tokens x (B,N,C) are to leave."""
    size = torch.ones(x.shape[:2], dtype=x.dtype) if size is None else size
    local = state.pop("local", 0)
    tokens = Tokens(x, size, prefix, **({"grid": (1, x.shape[1] - prefix), "carried": {}} | state))
    return Candidates(tokens, BlockPlan(layer, depth, r, local), keys, score)


def every_method(r: int = 3, depth: int = 3, choices: bool = True) -> list[Any]:
    """pytest parameters: for every method a config that merges in all blocks of a tiny model.

    Args:
        choices: also one config for every other choice of a setting (poolings, one step ahead); else only for those
            that change where in the block tokens merge, or how an attention map does.
    """
    parameters = []
    for name, method in METHODS.items():
        if name == "none":
            continue
        settings = {knob.name: 0 for knob in method.knobs().values() if knob.is_layer} | {"min_tokens": 4}
        others = [(knob.name, choice) for knob in method.knobs().values() for choice in knob.choices]
        for setting, choice in [("prop_attn", True), *others]:
            config = MergeConfig(name, r, tuple(range(depth)), **settings, **{setting: choice})
            is_default = choice == method.knobs()[setting].default
            max_map = config.pooling == "max" and method().place() is ONE_STEP_AHEAD
            if setting == "prop_attn":
                parameters.append(pytest.param(config, id=name))
            elif not is_default and (choices or max_map or config.rule.place() is not method().place()):
                parameters.append(pytest.param(config, id=f"{name}-{setting}={choice}"))
    return parameters
