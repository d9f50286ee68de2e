"""Ctrl-C while a command is still importing torch, which takes seconds: one line and status 130, as later.

Commands import this module first. It imports nothing that takes time, and does nothing in a program that is not one of
this project's commands.
"""

import os
import signal
import sys
import types
from pathlib import Path

_ROOT = Path(__file__).resolve().parent


def _leave(number: int, frame: types.FrameType | None) -> None:
    name = Path(sys.argv[0]).name
    os.write(2, f"{name}: error: interrupted\n".encode())
    os._exit(130)  # utils.INTERRUPTED_STATUS; raising would end in whatever catches exceptions around an import


def _is_command() -> bool:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return file is not None and Path(file).resolve().parent in (_ROOT, _ROOT / "run")


def imported() -> None:
    """Give Ctrl-C back to Python, which raises KeyboardInterrupt: the command has begun."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
