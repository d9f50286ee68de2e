"""The size table, `create_model`, and our names in timm's registry."""

import difflib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import timm
from huggingface_hub import constants
from timm.models import is_model_in_modules, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .config import MergeConfig
from .errors import UserError
from .vit import MergingViT, apply_merging

# Ours -> timm's. The rows of published models; weights come from timm's entry of the second name.
TIMM_NAMES = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "deit_tiny_distilled": "deit_tiny_distilled_patch16_224",
    "deit_small_distilled": "deit_small_distilled_patch16_224",
    "deit_base_distilled": "deit_base_distilled_patch16_224",
    "deit3_small": "deit3_small_patch16_224",
    "deit3_medium": "deit3_medium_patch16_224",
    "deit3_base": "deit3_base_patch16_224",
    "deit3_large": "deit3_large_patch16_224",
}
# Rows that timm does not have: keywords of its VisionTransformer. deit_digits is the toy that trains in a minute.
OWN_SIZES: dict[str, dict[str, Any]] = {
    "deit_digits": {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10},
}
NAMES = (*TIMM_NAMES, *OWN_SIZES)
_MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid")


def create_model(
    name: str,
    num_registers: int | None = None,
    merge: MergeConfig | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    pretrained: bool = False,
    register_layer: int = 0,
    class_layer: int = 0,
    **vit: Any,
) -> MergingViT:
    """A merging model by our name or any supported timm ViT name.

    Args:
        name: a name of `NAMES`, or of timm ("vit_small_patch16_224.augreg_in21k_ft_in1k", ...).
        num_registers: R in all; None keeps what the model has.
        merge: what merges; None is ToMe with r = 0, which merges where a call says so: `model(images, r=8)`.
        num_classes, img_size: None is the model's own; position entries are resampled for another size.
        pretrained: load timm's published weights (network or hub cache needed).
        register_layer, class_layer: the blocks before which registers and class token enter.
        **vit: keywords of timm's VisionTransformer (drop_path_rate, ...); None means its default.

    Raises:
        UserError: unknown name (with the nearest ones), unsupported model, no weights to be had.
    """
    if vit.get("reg_tokens") is not None:
        raise UserError("reg_tokens would give registers position entries; write num_registers")
    options = {"num_classes": num_classes, "img_size": img_size, **vit}
    options = {key: value for key, value in options.items() if value is not None}
    vit_model = _create_vit(name, pretrained, options)
    _check_size(name, vit_model, img_size)
    return apply_merging(vit_model, merge or MergeConfig(), num_registers, register_layer, class_layer)


def check_name(name: str) -> None:
    """Raise a UserError for a name that nobody has, or that belongs to a family that cannot be served."""
    if name in NAMES:
        return
    base, _, tag = name.partition(".")
    if base in NAMES:
        raise UserError(f"{base} takes no tag; write {base}, or {timm_name(base)}.{tag} for these weights of timm")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*NAMES, *timm.list_models(module="vision_transformer")], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"ours are {', '.join(NAMES)}"
        raise UserError(f"unknown model {name!r}; {hint}")
    if not is_model_in_modules(name, _MODULES):
        raise UserError(
            f"model {name!r} is not supported: it is not timm's plain VisionTransformer (ViT, DeiT, DeiT-III, DINOv2)"
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise UserError(f"model {base!r} has no weights tagged {tag!r}; timm's are {', '.join(tags) or 'none'}")


def timm_name(name: str) -> str:
    """timm's name of one of ours; any other name is its own."""
    return TIMM_NAMES.get(name, name)


def data_settings(name: str) -> dict[str, Any]:
    """Preprocessing of a model's published weights: input_size, mean, std, interpolation, crop_pct.

    DeiT's own evaluation resizes 224 px to 256 (crop 0.875), where timm's entry says 0.9.
    """
    if name in OWN_SIZES:
        return {"input_size": OWN_SIZES[name]["img_size"]}
    cfg = timm.get_pretrained_cfg(timm_name(name))
    assert cfg is not None, "check_name comes first"
    settings = {key: getattr(cfg, key) for key in ("mean", "std", "interpolation", "crop_pct")}
    crop = 0.875 if name.startswith("deit_") else settings["crop_pct"]
    return settings | {"input_size": cfg.input_size[-1], "crop_pct": crop}


def native_model(name: str, **options: Any) -> VisionTransformer:
    """timm's own dense model with fused attention: what a user would otherwise run, and what speed is compared with."""
    check_name(name)
    return _create_vit(name, False, {key: value for key, value in options.items() if value is not None})


def _create_vit(name: str, pretrained: bool, options: dict[str, Any]) -> VisionTransformer:
    """timm's model, or its class with the sizes of one of ours; errors are told in one line."""
    check_name(name)
    if options.get("num_classes", 0) < 0:
        raise UserError(f"num_classes must be an integer >= 0, not {options['num_classes']}")
    if pretrained and name in OWN_SIZES:
        raise UserError(f"{name} has no published weights: train it, or give --finetune FILE and --no_pretrained")
    if pretrained and not timm.is_model_pretrained(timm_name(name)):
        raise UserError(f"timm has no pretrained weights for {name}: give --finetune FILE and --no_pretrained")
    try:
        if name in OWN_SIZES:
            return VisionTransformer(**(OWN_SIZES[name] | options))
        with quick_when_offline() if pretrained else nullcontext():
            return timm.create_model(timm_name(name), pretrained=pretrained, **options)  # type: ignore[return-value]
    except Exception as error:  # of timm, torch and the hub client, which raise many types
        explained = _explain(error, name, pretrained, options)
        if explained is None:
            raise
        raise explained from error


def _explain(error: Exception, name: str, pretrained: bool, options: dict[str, Any]) -> UserError | None:
    """A mistake of the user or a missing network in one line; None for anything else, which keeps its traceback."""
    if pretrained and (isinstance(error, OSError) or (isinstance(error, RuntimeError) and _is_network_error(error))):
        return UserError(
            f"cannot get the pretrained weights of {name} ({type(error).__name__}); without a network give "
            "--finetune FILE (weights you have), or --no_pretrained to start from random weights"
        )
    if isinstance(error, (AssertionError, ValueError)):
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        return UserError(f"{name} cannot be built with {given}: {error}")
    return None


def _check_size(name: str, vit: nn.Module, img_size: int | None) -> None:
    """timm's patch embedding drops the pixels that fill no patch, without a word."""
    patch = getattr(vit.patch_embed, "patch_size", None) if hasattr(vit, "patch_embed") else None
    if img_size is not None and isinstance(patch, tuple) and img_size % patch[0]:
        raise UserError(f"img_size {img_size} is not a multiple of {name}'s patches of {patch[0]} pixels")


@contextmanager
def quick_when_offline() -> Iterator[None]:
    """Spare a user without a network the hub client's minute of retries: cached weights still load, others fail now."""
    endpoint = urllib.parse.urlparse(constants.ENDPOINT)
    offline = constants.HF_HUB_OFFLINE
    if not urllib.request.getproxies():
        try:
            port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
            socket.create_connection((endpoint.hostname or "", port), timeout=5).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _is_network_error(error: BaseException | None) -> bool:
    """True if a hub client's error comes from a missing connection, however it is wrapped."""
    while error is not None:
        if isinstance(error, (OSError, ConnectionError, TimeoutError)) or "offline" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


# Entry points: our names in timm's registry (`timm.create_model("deit_small")`) and, by hubconf.py, in torch.hub


def _entry(name: str, pretrained: bool, options: dict[str, Any]) -> MergingViT:
    """`create_model` without the keywords that timm adds for its own models."""
    added = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    options = {key: value for key, value in options.items() if key not in added or value is not None}
    return create_model(name, pretrained=pretrained, **options)


@register_model
def deit_tiny(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's deit_tiny: DeiT-Ti (arXiv 2012.12877). Options: those of `create_model`."""
    return _entry("deit_tiny", pretrained, options)


@register_model
def deit_small(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's deit_small: DeiT-S (arXiv 2012.12877). Options: those of `create_model`."""
    return _entry("deit_small", pretrained, options)


@register_model
def deit_base(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's deit_base: DeiT-B (arXiv 2012.12877). Options: those of `create_model`."""
    return _entry("deit_base", pretrained, options)


@register_model
def deit_tiny_distilled(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's deit_tiny_distilled: DeiT-Ti with a distillation token. Options: those of `create_model`."""
    return _entry("deit_tiny_distilled", pretrained, options)


@register_model
def deit_small_distilled(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's deit_small_distilled: DeiT-S with a distillation token. Options: those of `create_model`."""
    return _entry("deit_small_distilled", pretrained, options)


@register_model
def deit_base_distilled(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's deit_base_distilled: DeiT-B with a distillation token. Options: those of `create_model`."""
    return _entry("deit_base_distilled", pretrained, options)


@register_model
def deit3_small(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's deit3_small: DeiT-III-S (arXiv 2204.07118). Options: those of `create_model`."""
    return _entry("deit3_small", pretrained, options)


@register_model
def deit3_medium(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's deit3_medium: DeiT-III-M (arXiv 2204.07118). Options: those of `create_model`."""
    return _entry("deit3_medium", pretrained, options)


@register_model
def deit3_base(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's deit3_base: DeiT-III-B (arXiv 2204.07118). Options: those of `create_model`."""
    return _entry("deit3_base", pretrained, options)


@register_model
def deit3_large(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's deit3_large: DeiT-III-L (arXiv 2204.07118). Options: those of `create_model`."""
    return _entry("deit3_large", pretrained, options)


@register_model
def deit_digits(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's deit_digits, the toy of 32 px and 64 patches. Options: those of `create_model`."""
    return _entry("deit_digits", pretrained, options)
