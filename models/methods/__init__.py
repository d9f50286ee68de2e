"""The merging methods, one module each. A new one is a new module and a line in `METHODS`."""

from .base import POOLINGS, Knob, Method, knob
from .lgtm import LGTM
from .mctf import MCTF
from .pitome import PiToMe
from .regtome import RegToMe
from .tome import NoMerging, ToMe

METHODS: dict[str, type[Method]] = {}
AUTO = RegToMe.name  # what "auto" stands for


def register(method: type[Method]) -> type[Method]:
    """Make a method known under its name: to `MergeConfig`, the flags, GMACs, benchmark, export and tables."""
    METHODS[method.name] = method
    return method


register(NoMerging)
register(ToMe)
register(MCTF)
register(LGTM)
register(PiToMe)
register(RegToMe)


def all_knobs() -> dict[str, Knob]:
    """Every setting of any method by name; one that several methods share is that of the first."""
    settings: dict[str, Knob] = {}
    for method in METHODS.values():
        settings = {**method.knobs(), **settings}
    return settings


def methods_with(setting: str) -> tuple[str, ...]:
    """Names of the methods that have a setting."""
    return tuple(name for name, method in METHODS.items() if setting in method.knobs())


def variants() -> dict[str, dict]:
    """Published configurations of all methods by name, as keywords of `MergeConfig`."""
    return {
        name: {"method": method.name, **keywords}
        for method in METHODS.values()
        for name, keywords in method.variants.items()
    }


__all__ = ["AUTO", "METHODS", "POOLINGS", "Knob", "Method", "all_knobs", "knob", "methods_with", "register", "variants"]
