"""Which parameters train, with what weight decay and learning rate."""

import re
from typing import Any

from timm.models import group_parameters
from torch import nn

from .adapters import has_lora, is_lora
from .errors import UserError
from .vit import MergingViT

PARTS = ("lora", "registers", "norms", "head")  # what may train alone or beside others of these
_ALIASES = {"registers_head": "registers,head"}


def parse_train_only(text: str) -> tuple[str, ...]:
    """Parse "all", "registers_head", or parts of `PARTS` with commas between them; () is all.

    Raises:
        UserError: a part that nobody knows, or that is named twice.
    """
    if text == "all":
        return ()
    parts = tuple(part.strip() for part in _ALIASES.get(text, text).split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"train_only is all, or some of {', '.join(PARTS)} with commas, not {unknown[0]!r} in {text!r}")
    if len(set(parts)) < len(parts):
        raise UserError(f"train_only {text} names a part twice; leave one out")
    return parts


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: one of `PARTS`, or "backbone" for all others.

    The norm in front of the head counts as head, which reads nothing else.
    """
    if name.split(".")[0] in ("head", "head_dist", "fc_norm"):
        return "head"
    if name == "reg_token":
        return "registers"
    if is_lora(name):
        return "lora"
    return "norms" if re.search(r"norm\w*\.(?:weight|bias)$", name) else "backbone"


def freeze(model: MergingViT, train_only: str) -> dict[str, int]:
    """Leave only some parameters trainable.

    Args:
        train_only: as for `parse_train_only`.

    Returns:
        The number of trainable parameters of every part that has any.

    Raises:
        UserError: registers or adapters are asked for and the model has none.
    """
    parts = parse_train_only(train_only)
    if "registers" in parts and model.reg_token is None:
        raise UserError(f"train_only {train_only} needs registers; give num_registers (4, for example)")
    if "lora" in parts and not has_lora(model):
        raise UserError(f"train_only {train_only} needs adapters; give lora (8, for example)")
    trainable: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(not parts or part in parts)
        if parameter.requires_grad:
            trainable[part] = trainable.get(part, 0) + parameter.numel()
    return trainable


def parameter_groups(
    model: MergingViT, weight_decay: float, register_lr_mult: float = 1.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: no decay for biases, norms, tokens and positions; registers may have their own rate.

    `lr_scale` in a group is what timm's schedulers multiply the rate with.

    Args:
        register_lr_mult: factor on the rate of the registers, beside that of their layer.
        layer_decay: factor on the rate from a block to the one before it (BEiT, arXiv 2106.08254), in the layers of
            `group_matcher`: the head has 1, the stem with its tokens layer_decay ** (blocks + 1).
    """
    if register_lr_mult != 1.0 and model.reg_token is None:
        raise UserError("register_lr_mult has no effect without registers; give num_registers (4, for example)")
    layers: dict[str, int] = group_parameters(model, model.group_matcher(), reverse=True)  # also of frozen ones
    last = max(layers.values())
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in model.no_weight_decay()
            scale = layer_decay ** (last - layers[name])
            groups.setdefault((decays, scale, name == "reg_token"), []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay * decays, "lr_scale": scale * (register_lr_mult**registers)}
        for (decays, scale, registers), members in groups.items()
    ]
