"""Checkpoint files: they are written whole or not at all, read without running code, and resumed from.

A run keeps two of them, checkpoint.pth and checkpoint_prev.pth. Writing goes

    checkpoint.pth.PID.tmp      the new one, written and synced
    checkpoint.pth.PID.old.tmp  a second name (hard link) of the old checkpoint.pth
    rename .tmp     -> checkpoint.pth        the new one is in place
    rename .old.tmp -> checkpoint_prev.pth   and only now the one before the old one is given up

so that a kill between any two lines leaves a whole checkpoint under one of the two names; `load_resume` takes the
newest whole one. A disk that lies about syncing can still leave a torn file: that is what the fallback is for.
"""

import os
import random
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from distributed import broadcast_object
from downloads import cached_path, fetch, is_url
from models.errors import UserError
from models.weights import SAFE_TYPES
from utils import atomic_write, first_line, is_main_process, log, temporary_path, without_credentials


class DamagedCheckpoint(UserError):
    """A file that is torn, altered or no checkpoint at all, so that the one before it may serve instead."""


_RESUME_KEYS = ("model", "optimizer", "lr_scheduler", "epoch")
_COUNTS = ("epoch", "step")
_RESUME_TYPES: dict[str, Any] = {
    **dict.fromkeys(_COUNTS, int),
    "best": (int, float),
    **dict.fromkeys(("optimizer", "lr_scheduler", "rng", "sampler", "epoch_log"), dict),
}
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before version 1.6


def previous_path(path: str | Path) -> Path:
    """Return the path under which the checkpoint before `path` is kept: checkpoint.pth -> checkpoint_prev.pth."""
    path = Path(path)
    return path.with_name(f"{path.stem}_prev{path.suffix}")


def save_checkpoint(path: str | Path, state: Mapping[str, Any], keep_previous: bool = True) -> None:
    """Write a checkpoint so that at every instant a whole one is on the disk; only rank 0 calls this.

    Args:
        state: tensors and plain values only. A run's has the keys model, model_ema, optimizer, lr_scheduler, scaler,
            epoch, step, rng, sampler, epoch_log, merge, args, best.
        keep_previous: keep the checkpoint before at `previous_path(path)`.

    Raises:
        RunError: the disk is full or fails; the files from before are unchanged.
    """
    path = Path(path)
    rename = _rotate if keep_previous and path.exists() else os.replace
    atomic_write(path, lambda file: torch.save(dict(state), file), rename)


def _rotate(new: Path, path: Path) -> None:
    """Rename `new` over `path` and the old `path` over its previous file.

    In this order the previous file is given up only when the new one is in place, even if `path` itself is torn; the
    link keeps the old `path` alive under a name of its own between the two renames.
    """
    old = temporary_path(path, "old.tmp")
    old.unlink(missing_ok=True)
    try:
        try:
            os.link(path, old)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, old)
        os.replace(new, path)
        os.replace(old, previous_path(path))
    finally:
        old.unlink(missing_ok=True)  # rename(2) leaves both names if they are the same file already


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a .pth (also of DeiT, MCTF and torch < 1.6) or .safetensors file or URL onto the CPU; runs no code from it.

    Args:
        mmap: leave tensors in the file until they are used, where the processes of a machine share them.

    Returns:
        The named contents; a bare state dict, as safetensors holds, comes back as {"model": state}.

    Raises:
        UserError: it is missing, unreadable, or holds objects other than tensors and plain values (named).
        DamagedCheckpoint: it is empty, torn, altered (each part's checksum is compared) or not a checkpoint.
    """
    return _load_url(str(path), mmap) if is_url(path) else _load_file(Path(path).expanduser(), mmap)


def _load_url(url: str, mmap: bool) -> dict[str, Any]:
    """Read a URL's file from the cache; what is damaged there is fetched again, once."""
    cached = cached_path(url).exists()
    try:
        return _load_file(fetch(url), mmap)
    except DamagedCheckpoint as error:
        damage = error
    try:
        if not cached:
            raise damage
        log(f"warning: {damage}: fetching it again")
        return _load_file(fetch(url, anew=True), mmap)
    except DamagedCheckpoint as error:
        cached_path(url).unlink(missing_ok=True)
        raise UserError(f"{without_credentials(url)} serves no whole checkpoint: {error}") from error


def _load_file(file: Path, mmap: bool) -> dict[str, Any]:
    start = _read_start(file)
    if file.suffix == ".safetensors":
        return {"model": _load_safetensors(file)}
    if start.startswith(b"PK") or zipfile.is_zipfile(file):
        _check_zip(file)
    state = _unpickle(file, start, mmap)
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) for key in state):
        raise DamagedCheckpoint(f"{file} is not a checkpoint: it holds a {type(state).__name__}, not named tensors")
    bare = all(isinstance(value, torch.Tensor) for value in state.values())
    return {"model": state} if bare else state


def _read_start(file: Path) -> bytes:
    """Return the first bytes of a file, after the checks that need no format."""
    try:
        if file.is_dir():
            raise UserError(f"{file} is a folder, not a checkpoint; name the .pth file in it")
        with open(file, "rb") as handle:
            start = handle.read(64)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {file} does not exist; check the path") from error
    except OSError as error:
        raise UserError(f"cannot read checkpoint {file}: {error.strerror}") from error
    if not start:
        raise DamagedCheckpoint(f"checkpoint {file} is empty (0 bytes); take another one")
    return start


def _damaged(file: Path, why: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"checkpoint {file} is torn or damaged ({why}); delete it and take another one")


def _check_zip(file: Path) -> None:
    """Compare the checksum of every part, which torch.load does not."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
            if packed is not None or sum(entry.file_size for entry in entries) > file.stat().st_size:
                raise DamagedCheckpoint(
                    f"checkpoint {file} has compressed parts ({packed or 'that share their bytes'}), which torch.save "
                    "never writes: unpacked they may fill the memory; save it anew"
                )
            bad = archive.testzip()
            # torch reads nothing for an entry that is marked as a folder, and leaves its tensor uninitialised
            folders = [entry.filename for entry in entries if entry.external_attr & 0x10]
    except DamagedCheckpoint:
        raise
    except Exception as error:  # zipfile raises nearly any type on altered bytes
        raise _damaged(file, first_line(error)) from error
    if bad is not None or folders:
        raise _damaged(file, f"wrong checksum of {bad}" if bad is not None else f"{folders[0]} is marked as a folder")


def _load_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise _damaged(file, first_line(error)) from error


def _unpickle(file: Path, start: bytes, mmap: bool) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE_TYPES):
            warnings.simplefilter("ignore")  # of foreign files; the error below says it in one line
            mmap = mmap and start.startswith(b"PK")  # older files cannot be
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # the unpickler raises nearly any type on foreign bytes
        raise _unpickle_error(file, start, error) from error


def _unpickle_error(file: Path, start: bytes, error: Exception) -> UserError:
    """Say why torch refused a file: it holds code or objects (named), is a damaged old file, or is no checkpoint."""
    refused = re.search(r"GLOBAL ([\w.]*\w) ", str(error))  # the pickle instruction that names a class or function
    if refused:
        rule = "only tensors and plain values are read, no code is run; save its state_dict() instead"
        return UserError(f"checkpoint {file} holds the Python object {refused[1]}; {rule}")
    why = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0] or type(error).__name__
    if start.startswith(_LEGACY_START):
        return _damaged(file, why)
    detail = f" ({why[:100]})" if start.startswith(b"PK") else ""  # for other kinds it is about random bytes
    return DamagedCheckpoint(
        f"{file} is not a checkpoint that torch can read{detail}; give a .pth or .safetensors file"
    )


def _newest_whole(output_dir: str | Path | None, mmap: bool) -> tuple[dict[str, Any], str] | tuple[None, None]:
    """Load the newest whole checkpoint of a run, with one warning for a torn one; (None, None) if there is none."""
    assert output_dir, "options refuses --resume auto without --output_dir"
    current = Path(output_dir).expanduser() / "checkpoint.pth"
    torn = ""
    for path in (current, previous_path(current)):
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path, mmap)
        except DamagedCheckpoint as error:
            torn = torn or str(error)
            continue
        if torn:
            log(f"warning: {torn}: resuming from {path}")
        return state, str(path)
    if torn:
        raise UserError(f"no checkpoint to resume in {output_dir}: {torn}, or start anew in another --output_dir")
    return None, None


def load_resume(
    resume: str | None, output_dir: str | Path | None, mmap: bool = False
) -> tuple[dict[str, Any], str] | None:
    """Load state and path for --resume FILE, URL or auto; None for no --resume, or for auto in a new folder.

    Rank 0 decides for all ranks, so that they never resume different files; all ranks must call it.

    Args:
        mmap: as for `load_checkpoint`.
    """
    if not resume:
        return None
    state, path, message = None, None, None
    if is_main_process():
        try:
            named = resume != "auto"
            state, path = (load_checkpoint(resume, mmap), resume) if named else _newest_whole(output_dir, mmap)
        except UserError as error:
            message = str(error)
    path, message = broadcast_object((path, message))
    if message is not None:
        raise UserError(message)
    if path is None:
        return None
    return state if state is not None else load_checkpoint(path, mmap), without_credentials(path)


def check_resumable(state: Mapping[str, Any], path: str | Path) -> None:
    """Raise UserError if a checkpoint holds weights only, from which training cannot go on, or odd values."""
    missing = [key for key in _RESUME_KEYS if key not in state]
    if missing:
        raise UserError(f"{path} cannot resume training: it has no {', '.join(missing)}; use --finetune {path}")
    for key, kinds in _RESUME_TYPES.items():
        value = state.get(key, 0)
        if key in state and (not isinstance(value, kinds) or isinstance(value, bool) or (key in _COUNTS and value < 0)):
            raise UserError(f"{path} was altered: its {key} is {value!r:.40}; take another checkpoint")
    counts = {"samples", "sums", "nonfinite", "seconds"}
    if not state.get("epoch_log", {}).keys() <= counts:
        raise UserError(f"{path} was altered: its epoch_log has {sorted(state['epoch_log'])}; take another checkpoint")


# Random streams


def rng_state() -> dict[str, Any]:
    """Return the state of the global random streams, in tensors and plain values that load without running code.

    A CUDA stream is that of the current device; it is None if CUDA is not in use.
    """
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]
    inner = numpy_state["state"]
    cached = [int(numpy_state["has_gauss"]), float(numpy_state["gauss"])]  # Gaussians are drawn in pairs
    return {
        "python": [version, list(words), gauss],
        "numpy": [torch.from_numpy(inner["key"].astype(np.int64)), int(inner["pos"]), *cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned; a CUDA state is skipped where there is no CUDA."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key, pos, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", key.cpu().numpy().astype(np.uint32), pos, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
