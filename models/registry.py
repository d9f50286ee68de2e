"""The size table, `create_model`, and our names in timm's registry."""

import difflib
import inspect
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from timm.models import (
    PretrainedCfg,
    is_model_in_modules,
    load_model_config_from_hf,
    load_pretrained,
    parse_model_name,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet
from timm.models._hub import load_model_config_from_path
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .checks import EVA_KEYWORDS, VIT_KEYWORDS, check_image_size, check_keyword, unserved
from .config import MergeConfig
from .errors import NoWeightsError, UserError
from .methods import all_knobs
from .schedule import is_int
from .vit import MergingViT, apply_merging, check_supported
from .weights import extract_state_dict, fit_weights, load_weights, read_weights

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
    "dinov3_small": "vit_small_patch16_dinov3",
    "dinov3_base": "vit_base_patch16_dinov3",
    "dinov3_large": "vit_large_patch16_dinov3",
}
# Rows that timm does not have: keywords of its VisionTransformer. deit_digits is the toy that trains in a minute.
OWN_SIZES: dict[str, dict[str, Any]] = {
    "deit_digits": {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10},
}
NAMES = (*TIMM_NAMES, *OWN_SIZES)
_BUILDER_KEYWORDS = ("cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict")  # of timm's builder
FEATURE_KEYWORDS = ("features_only", "out_indices", "feature_cls")
_MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid", "eva")


def create_model(
    name: str,
    num_registers: int | None = None,
    merge: MergeConfig | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    register_layer: int | None = None,
    class_layer: int | None = None,
    checkpoint_path: str | Path | None = None,
    **vit: Any,
) -> MergingViT:
    """A merging model by our name or any supported timm ViT name.

    Args:
        name: a name of `NAMES`, or of timm ("vit_small_patch16_224.augreg_in21k_ft_in1k", ...), or "hf-hub:OWNER/MODEL"
            and "local-dir:FOLDER" for a model that timm or `run/export.py folder` saved.
        num_registers: R in all; None keeps what the model has, or what the weights of `checkpoint_path` have.
        merge: what merges; None is ToMe with r = 0, which merges where a call says so: `model(images, r=8)`. Of a saved
            merging model None is its own.
        num_classes: None is the model's own.
        img_size: pixels, or (height, width); None is the model's own. Position entries are resampled for another size.
        pretrained: load timm's published weights (network or hub cache needed), or those of the saved model.
        register_layer, class_layer: the blocks before which registers and class token enter; None is the first, of a
            saved merging model its own.
        checkpoint_path: a file of weights of any origin that `models.weights` knows.
        **vit: keywords of timm's VisionTransformer, or of its Eva (drop_path_rate, ...); None means its default. As in
            timm, features_only=True with out_indices makes a `FeatureGetterNet` instead, which returns a list of maps
            (B,C,gh,gw) un-merged to the grid of patches, with its `feature_info`: see `feature_extractor`.

    Raises:
        UserError: unknown name or keyword (with the nearest ones), unsupported model, no weights, or weights that
            do not fit.
    """
    if pretrained and checkpoint_path is not None:
        raise UserError("give either pretrained=True or checkpoint_path, not both")
    features = {key: vit.pop(key) for key in FEATURE_KEYWORDS if key in vit}
    features = {key: value for key, value in features.items() if value not in (None, False)}
    _check_keywords(name, vit)
    options = {"num_classes": num_classes, "img_size": img_size, **vit}
    options = {key: value for key, value in options.items() if value is not None}
    weights = None if checkpoint_path is None else read_weights(checkpoint_path)
    if weights is not None and num_registers is None and "reg_token" in weights:
        num_registers = weights["reg_token"].shape[1]
    vit_model = _create_vit(name, pretrained, options)
    if merge is None:
        merge = vit_model.merge if isinstance(vit_model, MergingViT) else MergeConfig()
    model = apply_merging(vit_model, merge, num_registers, register_layer, class_layer)
    if weights is not None:
        fresh_head_ok = num_classes is not None  # who names the classes may mean others than the file's
        load_weights(model, weights, num_classes_changed_ok=fresh_head_ok, source=str(checkpoint_path), name=name)
    return feature_extractor(model, **features) if features else model  # type: ignore[return-value]


def check_name(name: str) -> None:
    """Raise a UserError for a name that nobody has, or that belongs to a family that cannot be served."""
    if name in NAMES:
        return
    if any(sign in name for sign in ":/\\"):
        try:
            parse_model_name(name)
        except ValueError as error:  # an unknown source, or a path or hub name without one
            raise UserError(str(error)) from error
        return
    base, _, tag = name.partition(".")
    if base in NAMES:
        raise UserError(f"{base} takes no tag; write {base}, or {timm_name(base)}.{tag} for these weights of timm")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*NAMES, *timm.list_models(module=["vision_transformer", "eva"])], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"ours are {', '.join(NAMES)}"
        raise UserError(f"unknown model {name!r}; {hint}")
    if not is_model_in_modules(name, _MODULES):
        module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        raise UserError(
            f"model {name!r} is not supported: timm's module {module}{unserved(module)} has neither its plain "
            "VisionTransformer (ViT, DeiT, DeiT-III, DINOv2) nor its Eva (DINOv3, EVA-02, RoPE-ViT, Perception Encoder)"
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
    cfg = _saved_settings(name) if _is_saved(name) else timm.get_pretrained_cfg(timm_name(name))
    assert cfg is not None, "check_name comes first"
    settings = {key: getattr(cfg, key) for key in ("mean", "std", "interpolation", "crop_pct")}
    crop = 0.875 if name.startswith("deit_") else settings["crop_pct"]
    return settings | {"input_size": cfg.input_size[-1], "crop_pct": crop}


def is_eva(name: str) -> bool:
    """Whether a name is that of timm's Eva (DINOv3, EVA-02, RoPE-ViT, Perception Encoder, Sapiens2)."""
    return not _is_saved(name) and is_model_in_modules(timm_name(name), ("eva",))


def native_model(name: str, **options: Any) -> VisionTransformer | Eva:
    """timm's own dense model with fused attention: what a user would otherwise run, and what speed is compared with."""
    check_name(name)
    return _create_vit(name, False, {key: value for key, value in options.items() if value is not None})


def _check_keywords(model: str, vit: dict[str, Any]) -> None:
    """Raise a UserError for a keyword of `create_model` that has another name here, another place, or no meaning."""
    for name in ("reg_tokens", "num_reg_tokens"):
        if vit.get(name) is not None:
            raise UserError(f"{name} would give registers position entries; write num_registers")
    own = list(inspect.signature(create_model).parameters)[:-1]
    for name in vit:
        if name in ("method", "r", "activate_layers", *all_knobs()):
            raise UserError(f"create_model has no keyword {name}; write merge=MergeConfig({name}=...)")
    known, base = (EVA_KEYWORDS, "Eva") if is_eva(model) else (VIT_KEYWORDS, "VisionTransformer")
    for name, value in vit.items():
        if value is not None:
            check_keyword("create_model", name, [*own, *known, *_BUILDER_KEYWORDS], base)


def _create_vit(name: str, pretrained: bool, options: dict[str, Any]) -> VisionTransformer | Eva:
    """timm's model, or its class with the sizes of one of ours; errors are told in one line."""
    check_name(name)
    num_classes = options.get("num_classes", 0)
    if not is_int(num_classes) or num_classes < 0:
        raise UserError(f"num_classes must be an integer >= 0, not {num_classes!r}")
    if "img_size" in options:
        check_image_size("img_size", options["img_size"], 1)
    if pretrained and name in OWN_SIZES:
        raise NoWeightsError(f"{name} has no published weights")
    if pretrained and not _is_saved(name) and not timm.is_model_pretrained(timm_name(name)):
        raise NoWeightsError(f"timm has no pretrained weights for {name}")
    try:
        if name in OWN_SIZES:
            vit: Any = VisionTransformer(**(OWN_SIZES[name] | options))
            size, parts = vit.patch_embed.img_size, {"first_conv": "patch_embed.proj", "classifier": "head"}
            cfg = PretrainedCfg(input_size=(vit.in_chans, *size), num_classes=vit.num_classes, **parts)
            vit.pretrained_cfg = vit.default_cfg = cfg.to_dict()  # timm's for its own
        else:
            if is_eva(name):  # those that are not served have billions of parameters
                with torch.device("meta"):
                    check_supported(timm.create_model(timm_name(name)))
            with quick_when_offline() if pretrained or _is_saved(name) else nullcontext():
                vit = timm.create_model(timm_name(name), pretrained=pretrained, **options)
    except Exception as error:  # of timm, torch and the hub client, which raise many types
        explained = _explain(error, name, pretrained, options)
        if explained is None:
            raise
        raise explained from error
    patch_size = getattr(getattr(vit, "patch_embed", None), "patch_size", None)
    if "img_size" in options and isinstance(patch_size, tuple) and not options.get("dynamic_img_pad"):
        check_image_size("img_size", options["img_size"], patch_size)
    return vit


def _explain(error: Exception, name: str, pretrained: bool, options: dict[str, Any]) -> UserError | None:
    """A mistake of the user or a missing network in one line; None for anything else, which keeps its traceback."""
    if isinstance(error, UserError):
        return UserError(str(error))
    if _is_saved(name):
        return _explain_saved(error, name)
    if pretrained and (isinstance(error, OSError) or (isinstance(error, RuntimeError) and _is_network_error(error))):
        return NoWeightsError(f"cannot get the pretrained weights of {name} ({type(error).__name__}, no network?)")
    if isinstance(error, (AssertionError, ValueError)):
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        return UserError(f"{name} cannot be built with {given}: {error}")
    return None


# Saved models: "hf-hub:OWNER/MODEL" and "local-dir:FOLDER"


def _is_saved(name: str) -> bool:
    return ":" in name


def _explain_saved(error: Exception, name: str) -> UserError:
    """Why a saved model does not load, in one line."""
    source, place = parse_model_name(name)
    why = str(error).strip().partition("\n")[0] or type(error).__name__
    if source == "local-dir" and not (Path(place) / "config.json").is_file():
        return UserError(
            f"{place} holds no config.json; give a folder that run/export.py folder or timm.models.save_for_hf wrote"
        )
    if source == "hf-hub" and (isinstance(error, OSError) or _is_network_error(error)):
        return UserError(
            f"cannot get {place} from the Hugging Face hub ({type(error).__name__}, no network?); "
            "'local-dir:FOLDER' reads a copy on this machine"
        )
    return UserError(f"cannot load {name}: {why}")


def _saved_settings(name: str) -> PretrainedCfg:
    """The preprocessing stored with a saved model."""
    source, place = parse_model_name(name)
    try:
        with quick_when_offline():
            config = load_model_config_from_hf(place) if source == "hf-hub" else load_model_config_from_path(place)
        return PretrainedCfg(**config[0])
    except Exception as error:  # of json, the hub client and timm
        raise _explain_saved(error, name) from error


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


def _entry(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    """What timm's create_model asks for: `create_model`, also with weights and a config of the caller's, or features.

    Args:
        options: those of `create_model`; and of timm's own pretrained_cfg, pretrained_cfg_overlay, cache_dir,
            features_only and out_indices.
    """
    options = {key: value for key, value in options.items() if value is not None}
    options.pop("pretrained_model_args", None)  # timm's record of how the weights were made
    features = {key: options.pop(key) for key in FEATURE_KEYWORDS if key in options}
    names = ["pretrained_cfg", "pretrained_cfg_overlay"]
    config = {key: options.pop(key) for key in names if key in options}
    own_weights = pretrained and not all(isinstance(value, str) for value in config.values())
    known = config if name not in OWN_SIZES else {}
    if not known and isinstance(config.get("pretrained_cfg"), dict):  # of timm's own models its builder reads this
        options.setdefault("num_classes", config["pretrained_cfg"].get("num_classes"))
    if isinstance(options.get("merge"), dict):  # out of a config.json
        options["merge"] = MergeConfig.from_dict(options["merge"])
    model = create_model(name, pretrained=pretrained and not own_weights, **known, **options)
    if own_weights:
        _load_by_config(model, name, config, options.get("cache_dir"))
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        model.pretrained_cfg["architecture"] = name  # what timm writes when it saves the model, and looks up again
    return feature_extractor(model, **features) if features else model


def _load_by_config(model: MergingViT, name: str, config: dict[str, Any], cache_dir: Any) -> None:
    """Load the weights that a pretrained_cfg names (file, url, hub, folder), with or without registers in them."""

    def fitted(weights: dict[str, Any], model: MergingViT) -> dict[str, Any]:
        return fit_weights(model, extract_state_dict(weights, source=source)[0], source=source, name=name)[0]

    try:
        resolved = resolve_pretrained_cfg(timm_name(name), **config).to_dict()
        source = str(next((resolved[key] for key in ("file", "hf_hub_id", "url") if resolved.get(key)), "the weights"))
        if resolved.get("file") and not Path(source).exists():
            raise UserError(f"{source}, which is to be loaded into {name}, is not there")
        with quick_when_offline():
            load_pretrained(model, resolved, model.num_classes, model.in_chans, filter_fn=fitted, cache_dir=cache_dir)
    except Exception as error:
        explained = _explain(error, name, True, {})
        if explained is None:
            raise
        raise explained from error


def feature_extractor(
    model: MergingViT, features_only: bool = False, out_indices: Any = 3, feature_cls: Any = "getter"
) -> nn.Module:
    """timm's features_only: the model cut off after the last block asked for, which returns a list of maps.

    Any model with timm's `forward_intermediates`, `prune_intermediate_layers` and `feature_info` becomes one, in place.
    Maps are those of `forward_intermediates`, without the final norm, on the whole grid of patches whatever merged.

    Args:
        out_indices: blocks, by the rule of `forward_intermediates`; a number is the last so many.
    """
    if not features_only:
        raise UserError("out_indices and feature_cls have no effect without features_only=True")
    if feature_cls not in ("getter", FeatureGetterNet):
        raise UserError(f"feature_cls={feature_cls!r} would read tokens that have merged; leave it out ('getter')")
    extractor = FeatureGetterNet(model, out_indices=out_indices)
    settings = getattr(model, "pretrained_cfg", None) or {}
    left_out = ("num_classes", "classifier", "global_pool")
    extractor.pretrained_cfg = extractor.default_cfg = {k: v for k, v in settings.items() if k not in left_out}
    return extractor


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
def dinov3_small(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's dinov3_small: DINOv3 ViT-S/16 (arXiv 2508.10104). Options: those of `create_model`."""
    return _entry("dinov3_small", pretrained, options)


@register_model
def dinov3_base(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's dinov3_base: DINOv3 ViT-B/16 (arXiv 2508.10104). Options: those of `create_model`."""
    return _entry("dinov3_base", pretrained, options)


@register_model
def dinov3_large(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's dinov3_large: DINOv3 ViT-L/16 (arXiv 2508.10104). Options: those of `create_model`."""
    return _entry("dinov3_large", pretrained, options)


@register_model
def deit_digits(pretrained: bool = False, **options: Any) -> MergingViT:
    """RegToMe's deit_digits, the toy of 32 px and 64 patches. Options: those of `create_model`."""
    return _entry("deit_digits", pretrained, options)
