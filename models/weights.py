"""Weights of any origin into a model: find the state dict, rename to timm's names, fit what may differ, load strictly.

Shapes: n patch tokens, C channels, R registers. A *slot* is one prefix token, e.g. ("reg_token", 2).
"""

import argparse
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from .adapters import merge_lora
from .errors import UserError

if TYPE_CHECKING:
    from .vit import MergingViT

StateDict = dict[str, Tensor]
Slot = tuple[str, int]

_RAW_KEYS = ("model", "state_dict")
_EMA_KEYS = ("model_ema", "state_dict_ema")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|model\.|backbone\.)+")
_PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")  # timm's order in the sequence and in pos_embed
HEADS = ("head", "head_dist")
_MAX_NAMED = 8
# Types besides tensors and plain values that a checkpoint may hold.
# DeiT and MCTF save their argparse Namespace; under submitit DeiT's output_dir is a path, read here as a pure one,
# which has no way to the disk. Python 3.13 pickles paths as pathlib._local.
SAFE_TYPES: list[Any] = [
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
]


@dataclass(frozen=True)
class LoadReport:
    """The outcome of `load_weights`.

    Attributes:
        loaded: tensors taken from the checkpoint (also those taken in part).
        fresh: parameters that keep the model's own values, all or (registers, position entries) some of them.
        missing: those of `fresh` that the checkpoint does not have.
        unexpected: tensors of the checkpoint that were left over, on purpose.
        notes: one line for each thing that was adapted.
    """

    loaded: int
    fresh: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report for people, a line each."""
        summary = [f"loaded {self.loaded} tensors"]
        summary += [f"fresh: {', '.join(self.fresh)}"] if self.fresh else []
        summary += [f"left over: {', '.join(self.unexpected)}"] if self.unexpected else []
        return ["; ".join(summary), *self.notes]


def read_weights(file: str | pathlib.Path, *, ema: bool = False) -> StateDict:
    """The weights in a file of any origin, in timm's names. No code in the file is run.

    Args:
        file: .safetensors, or anything that torch.save wrote.
        ema: as for `unwrap_state_dict`.

    Raises:
        UserError: no such file, not readable, or no Vision Transformer in it.
    """
    file = pathlib.Path(file)
    if not file.is_file():
        raise UserError(f"{file} is not a file")
    try:
        if file.suffix == ".safetensors":
            checkpoint: Any = load_file(file)
        else:
            with torch.serialization.safe_globals(SAFE_TYPES):
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises nearly any type on foreign bytes, safetensors one of its own
        held = re.search(r"GLOBAL ([\w.]*\w) ", str(error))  # what a pickle would call
        why = f"it holds the Python object {held[1]}" if held else "it is damaged, or no such file"
        raise UserError(f"cannot read {file}: {why}; give a .safetensors file or a saved state_dict()") from error
    return extract_state_dict(checkpoint, ema=ema, source=str(file))[0]


def unwrap_state_dict(checkpoint: Any, *, ema: bool = False, source: str = "the checkpoint") -> StateDict:
    """The tensors of a checkpoint of any model, without the names that DDP, compile or a wrapper put in front.

    Understands {"model", "model_ema"} (DeiT, MCTF, ours), {"state_dict", "state_dict_ema"} (timm), a bare state dict,
    and weights stored as a 1-tuple (MCTF's EMA). The input is not changed.

    Args:
        ema: take the averaged weights where there are some. Without it they are taken only if there are no others.
        source: how messages name the checkpoint.

    Raises:
        UserError: nothing of this kind in there.
    """
    weights = _find_weights(checkpoint, ema)
    if weights is None:
        found = (
            f"keys {_some(list(map(str, checkpoint)))}" if isinstance(checkpoint, Mapping) else repr(type(checkpoint))
        )
        raise UserError(f"{source} holds no model weights (found {found}); give a DeiT, timm or RegToMe checkpoint")
    renamed = {_WRAPPERS.sub("", name): tensor for name, tensor in weights.items()}
    if len(renamed) != len(weights):
        raise UserError(f"{source} holds two models in one state dict; store only one of them")
    return renamed


def extract_state_dict(
    checkpoint: Any, *, ema: bool = False, source: str = "the checkpoint", merge_adapters: bool = True
) -> tuple[StateDict, str]:
    """The weights of a Vision Transformer in timm's names, and where they come from.

    Args:
        checkpoint, ema, source: as for `unwrap_state_dict`.
        merge_adapters: low-rank adapters become part of the weights that they adapt.

    Returns:
        The state dict, and one of "regtome", "mctf", "timm" (also DeiT, whose names are the same), "deit3",
        "regs-small-vits", "registers-merging", "dinov2", "dinov3".

    Raises:
        UserError: no weights, or not of a Vision Transformer.
    """
    weights = unwrap_state_dict(checkpoint, ema=ema, source=source)
    origin = _origin(checkpoint, weights)
    weights = _TO_TIMM[origin](weights)
    if merge_adapters:
        weights = merge_lora(weights, checkpoint.get("lora"), source)
    if "patch_embed.proj.weight" not in weights:
        raise UserError(
            f"{source} is not a Vision Transformer in DeiT's or timm's names (found {_some(list(weights))})"
        )
    return weights, origin


def from_deit3(weights: StateDict) -> StateDict:
    """DeiT-III (arXiv 2204.07118): LayerScale's gamma_1, gamma_2."""
    return {re.sub(r"\bgamma_([12])$", r"ls\1.gamma", name): tensor for name, tensor in weights.items()}


def from_regs_small_vits(weights: StateDict) -> StateDict:
    """regs-small-vits: DeiT-III's names, registers in reg_tokens."""
    return _rename(from_deit3(weights), "reg_tokens", "reg_token")


def from_registers_merging(weights: StateDict) -> StateDict:
    """Registers-Merging: registers in register_tokens."""
    return _rename(weights, "register_tokens", "reg_token")


def from_dinov2(weights: StateDict) -> StateDict:
    """DINOv2 (arXiv 2304.07193, 2309.16588): chunked block names, SwiGLU's names, registers, no mask token."""
    weights = {name: tensor for name, tensor in weights.items() if name != "mask_token"}
    weights = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): tensor for name, tensor in weights.items()}
    swiglu = {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}
    for old, new in swiglu.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    return _rename(weights, "register_tokens", "reg_token")


def from_dinov3(weights: StateDict) -> StateDict:
    """DINOv3 (arXiv 2508.10104): registers in storage_tokens, one bias of q, k and v of which k's is held at 0."""
    renamed: StateDict = {}
    for name, tensor in weights.items():
        if name.endswith((".periods", ".bias_mask", "mask_token")) or name.startswith("local_cls_norm"):
            continue  # computed by timm, or of pretraining alone
        if name.endswith("attn.qkv.bias"):
            attn = name.removesuffix("qkv.bias")
            renamed[attn + "q_bias"], _, renamed[attn + "v_bias"] = tensor.chunk(3)
            continue
        for old, new in {"mlp.w1.": "mlp.fc1_g.", "mlp.w2.": "mlp.fc1_x.", "mlp.w3.": "mlp.fc2."}.items():
            name = name.replace(old, new)
        renamed["reg_token" if name == "storage_tokens" else name] = tensor
    return renamed


def load_weights(
    model: "MergingViT",
    state_dict: Mapping[str, Tensor],
    *,
    num_classes_changed_ok: bool = True,
    source: str = "the checkpoint",
    name: str = "the model",
) -> LoadReport:
    """Load weights in timm's names strictly, after fitting what may differ; an error leaves the model unchanged.

    What may differ: the grid (position entries of the patches are resampled), which prefix tokens have a position
    entry (exact), the number of registers, the distillation token, and the head's classes.

    Args:
        model: not wrapped by DDP or compile.
        num_classes_changed_ok: keep a fresh head where the classes differ or the checkpoint has no head.
        source, name: how messages name the checkpoint and the model.

    Raises:
        UserError: anything else is missing, left over or of another shape; a fresh head that is not allowed; NaN or
            infinite values.
    """
    weights, report = fit_weights(
        model, state_dict, num_classes_changed_ok=num_classes_changed_ok, source=source, name=name
    )
    model.load_state_dict(weights, strict=True)
    return report


def fit_weights(
    model: "MergingViT",
    state_dict: Mapping[str, Tensor],
    *,
    num_classes_changed_ok: bool = True,
    source: str = "the checkpoint",
    name: str = "the model",
) -> tuple[StateDict, LoadReport]:
    """What `load_weights` would load, for every parameter of the model, and its report. Nothing is changed."""
    _check_width(model, state_dict, source, name)
    fit = _Fit(model, dict(state_dict), model.state_dict())
    fit.names()
    fit.positions()
    fit.registers()
    fit.distillation()
    fit.heads()
    untrained = [key for key in fit.fresh if key.split(".")[0] in (*HEADS, "dist_token")]
    if untrained and not num_classes_changed_ok:
        because = "; ".join(fit.head_notes)
        raise UserError(f"{source} cannot be evaluated as {name}: {because}; choose the model and data it was made for")
    fit.check(source, name)
    return {key: fit.weights.get(key, fresh) for key, fresh in fit.expected.items()}, fit.report()


@dataclass
class _Fit:
    """Work in progress of `load_weights`: `weights` turns step by step into what the model expects."""

    model: "MergingViT"
    weights: StateDict  # of the checkpoint, in timm's names
    expected: StateDict  # of the model
    fresh: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    head_notes: list[str] = field(default_factory=list)

    def names(self) -> None:
        """What timm's Eva calls otherwise, or does not store: LayerScale, tables of angles, a bias of zeros."""
        if any(key.endswith(".gamma_1") for key in self.expected):
            self.weights = {re.sub(r"\bls([12])\.gamma$", r"gamma_\1", key): x for key, x in self.weights.items()}
        for key in [key for key in self.weights if key not in self.expected]:
            zero_bias = key.endswith(("attn.q_bias", "attn.v_bias")) and not self.weights[key].any()
            if zero_bias or key.startswith("rope."):
                self._leave(key)

    def positions(self) -> None:
        """Resample the patch entries to the model's grid, and move prefix entries to where the model has them.

        A position embedding is [entries of the first prefix tokens | entries of the patches], and how many prefix
        tokens have one differs: timm's DeiT 1 or 2, DINOv2 with registers 1 (the registers have none), so150m all.
        Token plus entry is what the first block sees, so that an entry may move into its token, and a zero entry
        stand for none, without any change of what the model computes:

            checkpoint has, model has      the entry is taken
            checkpoint has, model has not  it is added to the token (`_fold`)
            model has, checkpoint has not  zeros if the checkpoint has the token, else the model's fresh entry
        """
        pos, expected = self.weights.get("pos_embed"), self.expected.get("pos_embed")
        if pos is None or expected is None or pos.ndim != 3:
            return
        slots, model_slots = _slots(self.weights), _slots(self.expected)
        entries = _count_entries(pos.shape[1], self.model.patch_embed.num_patches, self.weights)
        if entries is None:  # not a square grid of another size: `check` names the shapes
            return
        pos = pos.to(expected)
        prefix = dict(zip(slots, pos[0, :entries], strict=False))
        rows = [
            self._prefix_entry(slot, index, prefix, slots)
            for index, slot in enumerate(model_slots[: self.model.num_pos_prefix])
        ]
        for slot, entry in prefix.items():  # those that `_prefix_entry` did not take
            if slot in model_slots:
                self._fold(slot, entry)
        patches = self._resampled(pos[:, entries:])
        self.weights["pos_embed"] = torch.cat([torch.stack(rows)[None], patches], dim=1) if rows else patches

    def _prefix_entry(self, slot: Slot, index: int, prefix: dict[Slot, Tensor], slots: list[Slot]) -> Tensor:
        fresh = self.expected["pos_embed"][0, index]
        if slot in prefix:
            return prefix.pop(slot)
        if slot in slots:
            return torch.zeros_like(fresh)  # exact: the checkpoint adds nothing to this token
        self.fresh.append("pos_embed")
        self.notes.append(f"position entry of {slot[0]}: fresh, the checkpoint has none")
        return fresh

    def _fold(self, slot: Slot, entry: Tensor) -> None:
        """Token plus entry is what the first block sees, so the sum in the token is exact."""
        token, index = slot
        summed = self.weights[token].to(entry).clone()
        summed[:, index] += entry
        self.weights[token] = summed
        self.notes.append(f"position entry of {token} added to the token, the model has no entry for it")

    def _resampled(self, patches: Tensor) -> Tensor:
        new = self.model.patch_embed.grid_size
        if patches.shape[1] == new[0] * new[1]:
            return patches
        side = math.isqrt(patches.shape[1])
        self.notes.append(f"position embedding resampled from {side}x{side} to {new[0]}x{new[1]} patches")
        return resample_abs_pos_embed(patches, list(new), [side, side], num_prefix_tokens=0)

    def registers(self) -> None:
        """Take the first registers of the checkpoint, keep the model's own fresh ones for the rest."""
        theirs, fresh = self.weights.get("reg_token"), self.expected.get("reg_token")
        have = 0 if theirs is None else theirs.shape[1]
        want = 0 if fresh is None else fresh.shape[1]
        if have == want:
            return
        if have > want:
            self.notes.append(f"registers: the first {want} of the checkpoint's {have} kept")
        else:
            self.notes.append(f"registers: {have} from the checkpoint, {want - have} fresh")
            self.fresh.append("reg_token")
        if fresh is None:
            self._leave("reg_token")
        elif theirs is None:
            self.missing.append("reg_token")
        else:
            self.weights["reg_token"] = torch.cat([theirs.to(fresh), fresh[:, have:]], dim=1)[:, :want]

    def distillation(self) -> None:
        """The distillation token and its head: left over, or fresh."""

        def parts(weights: StateDict) -> list[str]:
            return [key for key in weights if key.split(".")[0] in ("dist_token", "head_dist")]

        if "dist_token" in self.weights and "dist_token" not in self.expected:
            for key in parts(self.weights):
                self._leave(key)
            self.notes.append("the checkpoint's distillation token and its head are left over, the model has none")
        elif "dist_token" in self.expected and "dist_token" not in self.weights:
            self.fresh += parts(self.expected)
            self.missing += parts(self.expected)
            self.head_notes.append("distillation token and its head are fresh, the checkpoint has none")

    def heads(self) -> None:
        """A head with other classes, or without a counterpart, stays as it is."""
        for head in HEADS:
            keys = [key for key in (f"{head}.weight", f"{head}.bias") if key in self.expected and key not in self.fresh]
            old = self.weights.get(f"{head}.weight")
            if not keys:
                for key in [key for key in self.weights if key.startswith(f"{head}.")]:
                    self._leave(key)
            elif old is None:
                self._fresh_head(keys, f"{head} is fresh, the checkpoint has none")
                self.missing += keys
            elif old.shape[0] != self.expected[keys[0]].shape[0]:
                new = self.expected[keys[0]].shape[0]
                self._fresh_head(keys, f"{head} is fresh: {old.shape[0]} classes in the checkpoint, {new} in the model")

    def _fresh_head(self, keys: list[str], note: str) -> None:
        self.fresh += keys
        self.head_notes.append(note)
        for key in keys:
            self.weights.pop(key, None)

    def _leave(self, key: str) -> None:
        del self.weights[key]
        self.unexpected.append(key)

    def check(self, source: str, name: str) -> None:
        """Raise a UserError that names what still does not fit."""
        missing = [key for key in self.expected if key not in self.weights and key not in self.fresh]
        unexpected = [key for key in self.weights if key not in self.expected]
        shapes = [
            f"{key} {tuple(tensor.shape)} (the model has {tuple(self.expected[key].shape)})"
            for key, tensor in self.weights.items()
            if key in self.expected and tensor.shape != self.expected[key].shape
        ]
        misfits = {"missing": missing, "unexpected": unexpected, "shapes": shapes}
        problems = [f"{what} {_some(keys)}" for what, keys in misfits.items() if keys]
        if problems:
            raise UserError(f"{source} does not fit {name}: {'; '.join(problems)}")
        broken = [key for key, tensor in self.weights.items() if not tensor.isfinite().all()]
        if broken:
            raise UserError(
                f"{source} holds NaN or infinite values in {_some(broken)}; choose weights from before that"
            )

    def report(self) -> LoadReport:
        loaded = sum(key in self.weights for key in self.expected)
        notes = tuple(dict.fromkeys(self.notes + self.head_notes))  # one line per kind, not per register
        return LoadReport(loaded, tuple(dict.fromkeys(self.fresh)), tuple(self.missing), tuple(self.unexpected), notes)


def _find_weights(checkpoint: Any, ema: bool) -> Mapping[str, Tensor] | None:
    if _is_state_dict(checkpoint):
        return checkpoint
    if not isinstance(checkpoint, Mapping):
        return None
    keys = _EMA_KEYS + _RAW_KEYS if ema else _RAW_KEYS + _EMA_KEYS
    candidates = (_first(checkpoint.get(key)) for key in keys)
    return next((weights for weights in candidates if _is_state_dict(weights)), None)


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _first(value: Any) -> Any:
    """MCTF saves its EMA as `state_dict,`: a 1-tuple."""
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value


def _origin(checkpoint: Mapping[str, Any], weights: StateDict) -> str:
    """Names of parameters tell most; the rest is told by what else the checkpoint stores."""
    if "storage_tokens" in weights:
        return "dinov3"
    if "mask_token" in weights or any(re.match(r"blocks\.\d+\.\d+\.", name) for name in weights):
        return "dinov2"
    if "register_tokens" in weights:
        return "registers-merging"
    if "reg_tokens" in weights:
        return "regs-small-vits"
    if any(name.endswith((".gamma_1", ".gamma_2")) for name in weights):
        return "deit3"
    if any(isinstance(checkpoint.get(key), (tuple, list)) for key in _EMA_KEYS):
        return "mctf"
    return "regtome" if "merge" in checkpoint else "timm"


_TO_TIMM: dict[str, Callable[[StateDict], StateDict]] = {
    **dict.fromkeys(("regtome", "mctf", "timm"), dict),  # in timm's names already
    "deit3": from_deit3,
    "regs-small-vits": from_regs_small_vits,
    "registers-merging": from_registers_merging,
    "dinov2": from_dinov2,
    "dinov3": from_dinov3,
}


def _rename(weights: StateDict, old: str, new: str) -> StateDict:
    return {new if name == old else name: tensor for name, tensor in weights.items()}


def _check_width(model: "MergingViT", state_dict: Mapping[str, Tensor], source: str, name: str) -> None:
    width = state_dict["patch_embed.proj.weight"].shape[0] if "patch_embed.proj.weight" in state_dict else None
    if width not in (None, model.embed_dim):
        raise UserError(
            f"{source} does not fit {name}: it is of a model with embed dim {width}, {name} has {model.embed_dim}; "
            f"choose the model that the weights are of"
        )


def _slots(weights: Mapping[str, Tensor]) -> list[Slot]:
    """The prefix tokens that a state dict describes, in order."""
    tokens = [name for name in _PREFIX_TOKENS if name in weights and weights[name].ndim == 3]
    return [(name, index) for name in tokens for index in range(weights[name].shape[1])]


def _count_entries(length: int, patches: int, weights: Mapping[str, Tensor]) -> int | None:
    """Count the prefix tokens of a checkpoint that have a position entry: what is left must be a grid of patches."""
    tokens = [sum(slot[0] in _PREFIX_TOKENS[:types] for slot in _slots(weights)) for types in range(4)]
    return next((n for n in tokens if length - n in (patches, math.isqrt(max(0, length - n)) ** 2)), None)


def _some(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
