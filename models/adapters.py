"""Low-rank adapters (LoRA, arXiv 2106.09685) in the linear layers of the blocks, through the `peft` package.

An adapted layer computes W x + s B A x, with A (R,in) and B (out,R) trained, W frozen and s = alpha / R. B starts at
zero, so that a model computes the same before its first step. Everything that reads weights reads W + s B A, in which
the adapter costs nothing; only a training that goes on keeps both apart.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .errors import UserError, require

if TYPE_CHECKING:
    from .vit import MergingViT

# A part of a block, and the layers that compute it in the models of timm: some split what others keep in one
TARGETS = {
    "qkv": ("qkv", "q_proj", "k_proj", "v_proj"),
    "proj": ("proj",),
    "fc1": ("fc1", "fc1_g", "fc1_x", "w12"),
    "fc2": ("fc2", "w3"),
}
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."  # in peft's names


@dataclass(frozen=True)
class LoraSettings:
    """What the adapters of a model are.

    Attributes:
        rank: R.
        alpha: adapters count alpha / R.
        targets: names of `TARGETS`.
        dropout: on the input of the adapters, in training.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = tuple(TARGETS)
    dropout: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """What must not change while a run goes on, in plain values: `lora` of a checkpoint."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}


def add_lora(model: "MergingViT", settings: LoraSettings) -> None:
    """Put adapters into a model. They and the layers they are in become its only trainable parameters.

    Raises:
        UserError: peft is not installed, the model has adapters, or it has no layer of some target.
    """
    require("peft")
    from peft import LoraConfig, inject_adapter_in_model  # only where it is asked for: a second and a half

    if has_lora(model):
        raise UserError("this model has adapters already; merge them first, or start from weights without them")
    found = _layers(model)
    for target in settings.targets:
        if not any(name.rpartition(".")[2] in TARGETS[target] for name in found):
            raise UserError(f"this model has no {target} layer to adapt; its blocks have {', '.join(found)}")
    layers = "|".join(layer for target in settings.targets for layer in TARGETS[target])
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number
        lora_dropout=settings.dropout,
        target_modules=rf"blocks\.\d+\..*\.(?:{layers})",  # not patch_embed.proj
    )
    inject_adapter_in_model(config, model)


def has_lora(model: nn.Module) -> bool:
    """Tell whether a model has adapters."""
    return any(is_lora(name) for name, _ in model.named_parameters())


def is_lora(name: str) -> bool:
    """Tell whether a parameter of that name belongs to an adapter."""
    return name.endswith((_A, _B))


def merge_lora(
    weights: Mapping[str, Tensor], stored: Mapping[str, Any] | None, source: str = "the checkpoint"
) -> dict[str, Tensor]:
    """Weights of a model with adapters as those of one without: W + alpha / R * B A, under the model's own names.

    Weights without adapters come back as they are.

    Args:
        stored: `LoraSettings.as_dict`.

    Raises:
        UserError: there are adapters, and nobody knows how much they count.
    """
    if not any(is_lora(name) for name in weights):
        return dict(weights)
    try:
        scale = float((stored or {})["alpha"]) / int((stored or {})["rank"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{source} holds adapters and does not say how much they count; give a checkpoint of a --lora run"
        ) from error
    merged: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if is_lora(name):
            continue
        plain = name.replace(_BASE, ".")
        layer = plain.removesuffix(".weight")
        if plain != name and layer + _A in weights:
            update = weights[layer + _B].float() @ weights[layer + _A].float()
            tensor = (tensor.float() + scale * update).to(tensor.dtype)
        merged[plain] = tensor
    return merged


def _layers(model: "MergingViT") -> list[str]:
    """Names of the linear layers in the blocks, without the numbers."""
    linear = [name for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)]
    return sorted({re.sub(r"^\d+\.", "", name) for name in linear})
