"""How much to merge and where: `MergeConfig`, the forms of a schedule, and the tokens they leave in every block."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from .errors import UserError

METHODS = ("none", "tome", "mctf", "lgtm")
ONE_STEP_AHEAD = ("off", "on", "precise")
POOLINGS = ("size", "attention", "max", "mean")


@dataclass(frozen=True)
class Inflection:
    """A schedule that changes linearly over depth: first = int(r * (1 - inflection)), last = 2 r - first."""

    r: int
    inflection: float


Schedule = int | float | tuple[int, ...] | Inflection

# None in a row means that the method has no such knob: giving it is an error.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "none": {"prop_attn": True, "dense_layers": 0, "min_tokens": 0, "bidirectional": False, "pooling": "size"},
    "tome": {"prop_attn": True, "dense_layers": 0, "min_tokens": 0, "bidirectional": False, "pooling": "size"},
    "mctf": {"prop_attn": True, "dense_layers": 0, "min_tokens": 10, "bidirectional": True, "pooling": "attention"}
    | {"tau_sim": 1.0, "tau_info": 20.0, "tau_size": 40.0, "one_step_ahead": "on"},
    "lgtm": {"prop_attn": True, "dense_layers": 2, "min_tokens": 0, "bidirectional": False, "pooling": "size"}
    | {"local_grid": 2, "global_layer": 7},
}


@dataclass(frozen=True)
class MergeConfig:
    """What merges, how much and where; `None` is the method's published default, filled in when built.

    Args:
        method: "none", "tome" (arXiv 2210.09461), "mctf" (arXiv 2403.10030) or "lgtm" (our reading of 2303.02331).
        r: tokens merged per block: an int, a ratio 0 < r < 1 of the patch tokens, one int per block, `Inflection`
            (also a pair whose second item is a float or negative), or any of these as text: "16", "0.35", "16,0,8",
            "(16,-1)".
        activate_layers: indices of the blocks that merge; None: all, for mctf all but the first.
        dense_layers: the first blocks that merge nothing (DFE).
        prop_attn: add log(size) of the key token to the attention logits.
        tau_sim, tau_info, tau_size: inverse exponents of MCTF's criteria, 0 switches one off.
        bidirectional: match both ways, sources into destinations and then destinations into surviving sources.
        one_step_ahead: "off", "on" or "precise": which attention MCTF weighs tokens with.
        pooling: "size", "attention" (attention times size), "max" or "mean": how the features of a group combine.
        min_tokens: smallest number of tokens, prefix included, that a merge may leave.
        local_grid: windows per side of LGTM's local merge.
        global_layer: first block of LGTM's global merge.

    Raises:
        UserError: a value out of range, or a field that the method ignores.
    """

    method: str = "tome"
    r: Any = 0
    activate_layers: tuple[int, ...] | None = None
    dense_layers: int | None = None
    prop_attn: bool | None = None
    tau_sim: float | None = None
    tau_info: float | None = None
    tau_size: float | None = None
    bidirectional: bool | None = None
    one_step_ahead: str | None = None
    pooling: str | None = None
    min_tokens: int | None = None
    local_grid: int | None = None
    global_layer: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown merge method {self.method!r}; choose one of {', '.join(METHODS)}")
        set_field = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen dataclass)
        set_field("r", parse_schedule(self.r))
        set_field("activate_layers", _layers(self.activate_layers))
        for field in fields(self)[3:]:
            set_field(field.name, self._value_or_default(field.name))
        self._check_values()

    def _value_or_default(self, name: str) -> Any:
        value, defaults = getattr(self, name), _DEFAULTS[self.method]
        if value is not None and name not in defaults:
            raise UserError(f"{name} has no effect with method {self.method!r}; leave it out")
        return defaults.get(name) if value is None else value

    def _check_values(self) -> None:
        for name in ("tau_sim", "tau_info", "tau_size"):
            tau = getattr(self, name)
            if tau is not None and not (_is_number(tau) and 0 <= tau < float("inf")):
                raise UserError(f"{name} must be a number >= 0 (0 switches the criterion off), not {tau!r}")
        for name, low in (("dense_layers", 0), ("min_tokens", 0), ("local_grid", 1), ("global_layer", 0)):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < low):
                raise UserError(f"{name} must be an integer >= {low}, not {value!r}")
        for name, choices in (("one_step_ahead", ONE_STEP_AHEAD), ("pooling", POOLINGS)):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        for name in ("prop_attn", "bidirectional"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.method == "none" and (self.r != 0 or self.activate_layers is not None):
            raise UserError("method 'none' merges nothing: leave out r and activate_layers, or choose a method")

    def with_r(self, r: Any) -> "MergeConfig":
        """The same method with another schedule (any form)."""
        return replace(self, r=r)

    def active(self, depth: int) -> tuple[int, ...]:
        """The blocks that may merge in a model of `depth` blocks, in order.

        Raises:
            UserError: a layer outside [0, depth).
        """
        layers = self.activate_layers
        if layers is None:
            layers = tuple(range(1 if self.method == "mctf" else 0, depth))
        elif layers and layers[-1] >= depth:
            raise UserError(f"activate_layers names block {layers[-1]}, but the model has blocks 0..{depth - 1}")
        for name in ("dense_layers", "global_layer"):
            if (getattr(self, name) or 0) > depth and getattr(self, name) != _DEFAULTS[self.method].get(name):
                raise UserError(f"{name} is {getattr(self, name)}, but the model has {depth} blocks")
        return tuple(layer for layer in layers if layer >= (self.dense_layers or 0))

    def as_dict(self) -> dict[str, Any]:
        """Plain values (no tuples of ours), for checkpoints and json; `MergeConfig.from_dict` reads it back."""
        plain = asdict(self)
        plain["r"] = format_schedule(self.r)
        plain["activate_layers"] = None if self.activate_layers is None else list(self.activate_layers)
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "MergeConfig":
        """The inverse of `as_dict`."""
        return cls(**plain)


class TokenPlan(NamedTuple):
    """What a schedule comes to in one model: merged tokens and tokens left (prefix included), per block."""

    merges: tuple[int, ...]
    counts: tuple[int, ...]
    clamped: bool
    local: tuple[int, ...]  # those of `merges` that LGTM merges inside windows


def parse_schedule(r: Any) -> Schedule:
    """Any form of a schedule (see `MergeConfig`) as its canonical, hashable value.

    Raises:
        UserError: not a schedule.
    """
    if isinstance(r, str):
        return _parse_text(r)
    if isinstance(r, Inflection):
        return _inflection(r.r, r.inflection)
    if isinstance(r, (list, tuple)):
        if len(r) == 2 and (isinstance(r[1], float) or (_is_int(r[1]) and r[1] < 0)):
            return _inflection(*r)
        return _counts(r)
    if not _is_number(r) or r < 0 or (r > 1 and r != int(r)):
        raise UserError(f"r must be an integer >= 0, a ratio below 1, a list or (r, inflection), not {r!r}")
    return int(r) if r == int(r) else float(r)


def format_schedule(r: Schedule) -> str:
    """The command-line form of a schedule: parse_schedule(format_schedule(r)) == r."""
    if isinstance(r, Inflection):
        short = f"{r.inflection:g}"
        return f"({r.r},{short if float(short) == r.inflection else repr(r.inflection)})"
    return ",".join(map(str, r)) + ("," if len(r) == 1 else "") if isinstance(r, tuple) else str(r)


def token_plan(config: MergeConfig, patches: int, prefixes: tuple[int, ...]) -> TokenPlan:
    """The tokens each block merges and leaves, known before the forward so that shapes are static.

    Args:
        config: the method and its schedule.
        patches: patch tokens at the input.
        prefixes: prefix tokens present in each block, one per block.
    """
    depth = len(prefixes)
    wanted = _wanted(config.r, depth)
    active = config.active(depth)
    merges: list[int] = []
    counts: list[int] = []
    local: list[int] = []
    clamped = False
    for layer, prefix in enumerate(prefixes):
        want, inside = _amount(config, wanted[layer], layer, patches) if layer in active else (0, 0)
        # len(range()) makes torch.compile take r as a constant, also after other values: one graph per schedule
        r = len(range(min(want, max(0, patches + prefix - (config.min_tokens or 0)), patches // 2)))
        clamped |= r < want
        patches -= r
        merges.append(r)
        counts.append(patches + prefix)
        local.append(min(inside, r))
    return TokenPlan(tuple(merges), tuple(counts), clamped, tuple(local))


def warn_if_clamped(config: MergeConfig, plan: TokenPlan) -> None:
    """One warning, with the tokens per block, where a schedule asks for more than there is to merge."""
    if plan.clamped:
        warnings.warn(
            f"r={format_schedule(config.r)} is more than some blocks can merge (half of the patches, at least "
            f"{config.min_tokens} tokens left); tokens per block: {list(plan.counts)}",
            stacklevel=3,
        )


def _wanted(r: Schedule, depth: int) -> Sequence[float]:
    """One number per block: a count, or a ratio below 1."""
    if isinstance(r, Inflection):
        first = int(r.r * (1 - r.inflection))
        step = (2 * r.r - 2 * first) / (depth - 1) if depth > 1 else 0.0
        return [int(first + step * layer) for layer in range(depth)]
    if isinstance(r, tuple):
        if len(r) > depth:
            raise UserError(f"r lists {len(r)} blocks, but the model has {depth}")
        return list(r) + [0] * (depth - len(r))
    return [r] * depth


def _amount(config: MergeConfig, r: float, layer: int, patches: int) -> tuple[int, int]:
    """Tokens to merge in a block, and those of them that merge inside windows."""
    count = int(patches * r) if 0 < r < 1 else int(r)
    if config.method != "lgtm":
        return count, 0
    windows = config.local_grid**2  # type: ignore[operator]
    local = windows * -(-count // windows)
    return local + (count if layer >= config.global_layer else 0), local  # type: ignore[operator]


def _parse_text(text: str) -> Schedule:
    body = text.strip()
    pair = re.fullmatch(r"\(([^,()]*),([^,()]*)\)", body)
    listed = re.fullmatch(r"\[(.*)\]|\((.*)\)|(.*,.*)", body)
    try:
        if pair:
            return _inflection(_number(pair[1]), _number(pair[2]))
        if listed:
            items = next(group for group in listed.groups() if group is not None).split(",")
            # one trailing comma makes a list of a single number
            return _counts([_number(item) for item in (items[:-1] if items[-1].strip() == "" else items)])
        return parse_schedule(_number(body))
    except (ValueError, OverflowError) as error:
        why = f" ({error})" if isinstance(error, UserError) else ""
        raise UserError(f"cannot read r={text!r}{why}; write 16, 0.35, 16,0,8 or (16,-1)") from None


def _counts(r: Sequence[Any]) -> tuple[int, ...]:
    if not r or not all(_is_int(value) and value >= 0 for value in r):
        raise UserError(f"r must list one integer >= 0 per block, not {list(r)!r}")
    return tuple(int(value) for value in r)


def _inflection(r: Any, inflection: Any) -> Inflection:
    if not _is_number(r) or r != int(r) or r < 0 or not _is_number(inflection) or not -1 <= inflection <= 1:
        raise UserError(f"(r, inflection) needs an integer r >= 0 and -1 <= inflection <= 1, not ({r}, {inflection})")
    return Inflection(int(r), float(inflection))


def _layers(layers: Any) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if not isinstance(layers, (list, tuple)) or not all(_is_int(layer) and layer >= 0 for layer in layers):
        raise UserError(f"activate_layers must list block indices >= 0, not {layers!r}")
    if len(set(layers)) != len(layers):
        raise UserError(f"activate_layers names a block twice: {list(layers)}")
    return tuple(sorted(int(layer) for layer in layers))


def _number(text: str) -> float:
    text = text.strip()
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
