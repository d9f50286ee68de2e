"""`MergeConfig` says what merges, how much and where."""

from dataclasses import dataclass, replace
from typing import Any

from .errors import UserError
from .methods import AUTO, METHODS, all_knobs
from .methods.base import Method
from .schedule import Schedule, format_schedule, is_int, parse_schedule


@dataclass(frozen=True, init=False)
class MergeConfig:
    """A merging method with its settings, a schedule and the blocks that merge. Frozen, hashable, checked when built.

    The settings of the method are read as attributes of the config too: `config.prop_attn`, `config.tau_sim`. A setting
    that only other methods have is None.

    Attributes:
        method: a name of `models.methods.METHODS`: "none", "tome", "mctf", "lgtm", "pitome", "regtome"; "auto" is
            regtome, our own.
        r: tokens merged per block: an int, a ratio 0 < r < 1 of the patch tokens, one int per block, `Inflection`
            (also a pair whose second item is a float or negative), or any of these as text: "16", "0.35", "16,0,8",
            "(16,-1)".
        activate_layers: indices of the blocks that merge; None: all from the method's `first_block` on.
        rule: the method with its settings.
    """

    method: str
    r: Schedule
    activate_layers: tuple[int, ...] | None
    rule: Method

    def __init__(
        self,
        method: str = "tome",
        r: Any = 0,
        activate_layers: Any = None,
        rule: Method | None = None,
        **settings: Any,
    ) -> None:
        """Build a config from a method's name and its settings, where None is the published default.

        Args:
            rule: settings to start from; ignored if they are another method's. `dataclasses.replace` gives it.
            **settings: those of the method's module in `models/methods`.

        Raises:
            UserError: a value out of range, or a setting that the method does not have.
        """
        method = AUTO if method == "auto" else method
        if method not in METHODS:
            raise UserError(f"unknown merge method {method!r}; choose one of {', '.join(METHODS)}")
        known = METHODS[method].knobs()
        given = {name: value for name, value in settings.items() if value is not None}
        for name in settings:
            if name not in all_knobs():
                raise TypeError(f"MergeConfig has no setting {name!r}; those of {method} are {', '.join(known)}")
        for name in given:
            if name not in known:
                raise UserError(f"{name} has no effect with method {method!r}; leave it out")
        schedule, layers = parse_schedule(r), _layer_indices(activate_layers)
        start = rule if type(rule) is METHODS[method] else METHODS[method]()
        values = {"method": method, "r": schedule, "activate_layers": layers, "rule": replace(start, **given)}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.check_schedule(schedule)

    def __getattr__(self, name: str) -> Any:
        """A setting of the method; None for one that only other methods have."""
        if name.startswith("__") or "rule" not in self.__dict__:
            raise AttributeError(name)
        if name in self.rule.knobs():
            return getattr(self.rule, name)
        if name in all_knobs():
            return None
        raise AttributeError(f"MergeConfig has no attribute {name!r}")

    def check_schedule(self, r: Schedule) -> None:
        """Raise a UserError where the method cannot follow a schedule: "none" merges nothing."""
        if self.method == "none" and (r != 0 or self.activate_layers is not None):
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
            layers = tuple(range(self.rule.first_block, depth))
        elif layers and layers[-1] >= depth:
            raise UserError(f"activate_layers names block {layers[-1]}, but the model has blocks 0..{depth - 1}")
        self.rule.check_depth(depth)
        return tuple(layer for layer in layers if layer >= self.rule.dense_layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values (no types of ours), for checkpoints and json; `MergeConfig.from_dict` reads it back."""
        layers = None if self.activate_layers is None else list(self.activate_layers)
        head = {"method": self.method, "r": format_schedule(self.r), "activate_layers": layers}
        return {**head, **self.rule.settings()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "MergeConfig":
        """The inverse of `as_dict`."""
        return cls(**plain)


def _layer_indices(layers: Any) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if not isinstance(layers, (list, tuple)) or not all(is_int(layer) and layer >= 0 for layer in layers):
        raise UserError(f"activate_layers must list block indices >= 0, not {layers!r}")
    if len(set(layers)) != len(layers):
        raise UserError(f"activate_layers names a block twice: {list(layers)}")
    return tuple(sorted(int(layer) for layer in layers))
