"""Which parameters train, with what weight decay and learning rate."""

from typing import Any

from torch import nn

from .errors import UserError
from .vit import MergingViT

TRAIN_ONLY = ("all", "registers_head", "head")


def freeze(model: MergingViT, train_only: str) -> None:
    """Leave only some parameters trainable: "all", "registers_head" (registers and heads) or "head".

    Raises:
        UserError: registers are asked for and the model has none.
    """
    if train_only == "registers_head" and model.reg_token is None:
        raise UserError("train_only registers_head needs registers; give num_registers (4, for example)")
    for name, parameter in model.named_parameters():
        is_head = name.split(".")[0] in ("head", "head_dist", "fc_norm")
        is_register = name == "reg_token" and train_only == "registers_head"
        parameter.requires_grad_(train_only == "all" or is_head or is_register)


def parameter_groups(model: MergingViT, weight_decay: float, register_lr_mult: float = 1.0) -> list[dict[str, Any]]:
    """Groups for an optimizer: no decay for biases, norms, tokens and positions; registers may have their own rate.

    `lr_scale` in a group is what timm's schedulers multiply the rate with.
    """
    if register_lr_mult != 1.0 and model.reg_token is None:
        raise UserError("register_lr_mult has no effect without registers; give num_registers (4, for example)")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in model.no_weight_decay()
            groups.setdefault((decays, name == "reg_token"), []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay * decays, "lr_scale": register_lr_mult if registers else 1.0}
        for (decays, registers), members in groups.items()
    ]
