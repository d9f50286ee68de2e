"""Files by URL, fetched once into torch's hub cache: in bounded time, checked, going on after an interruption."""

import base64
import contextlib
import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit, urlunsplit

import torch
from tqdm import tqdm

from models.errors import UserError
from utils import first_line, is_main_process, without_credentials

TIMEOUT = 20.0  # seconds without a byte
SLOWEST = 1024.0  # bytes per second, over a minute
TRIES = 3  # in a row without a new byte
CHUNK = 2**16
_HASHED = re.compile(r"-([0-9a-f]{8,64})\.[^/]*$")  # DeiT's names, and torch.hub's: the start of the file's sha256


class _Broken(OSError):
    """A transfer that ended early, and may be gone on with."""


class _TooSlow(OSError):
    """A transfer that would take for ever."""


def is_url(path: str | Path) -> bool:
    return str(path).startswith(("http://", "https://"))


def has_credentials(path: str | Path) -> bool:
    """Tell whether a URL holds what must not be published: a user, a password, or a query, which may be a signature."""
    return is_url(path) and without_credentials(str(path)) != str(path)


def fetch(url: str, anew: bool = False) -> Path:
    """Return the path of a URL's file in torch's hub cache; the file is downloaded if it is not there.

    A name with a hash in it, as DeiT's have, is kept, so that a cache filled elsewhere serves; its hash is compared.
    Other names get the hash of the URL, so that two files called checkpoint.pth are two files. Processes that want one
    file at a time wait for the first.

    Args:
        anew: distrust the file in the cache.

    Raises:
        UserError: it cannot be had, or is not what its length or its name says.
    """
    target = cached_path(url)
    distrusted = _version(target) if anew else None
    try:
        if _is_good(target, distrusted):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.with_name(f"{target.name}.part")) as part:
            if not _is_good(target, distrusted):  # it is not another process's by now
                _download(url, part, target)
    except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        hint = f"download it elsewhere and put it at {target}, or give a local file"
        reason = without_credentials(first_line(error)).replace(urlsplit(url).query or "\0", "...")
        raise UserError(f"cannot download {without_credentials(url)}: {reason}; {hint}") from error
    return target


def _version(file: Path) -> tuple[int, int] | None:
    return (file.stat().st_ino, file.stat().st_mtime_ns) if file.exists() else None


def _is_good(target: Path, distrusted: tuple[int, int] | None) -> bool:
    version = _version(target)
    return version is not None and version != distrusted and _mismatch(target, target.name) is None


def cached_path(url: str) -> Path:
    """Return where a URL's file is, or would be, kept."""
    parts = urlsplit(url)
    name = os.path.basename(parts.path) or "checkpoint.pth"
    if not _HASHED.search(name):
        address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        name = f"{hashlib.blake2b(address.encode(), digest_size=4).hexdigest()}-{name}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _mismatch(file: Path, name: str) -> str | None:
    """Say how a file contradicts the hash in a name; None if it does not, or if there is none."""
    wanted = _HASHED.search(name)
    if wanted is None:
        return None
    with open(file, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found.startswith(wanted[1]):
        return None
    return f"its sha256 starts with {found[: len(wanted[1])]}, not with {wanted[1]} as its name says"


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[BinaryIO]:
    """Open a file to append to it alone; other processes wait. Where files cannot be locked, one process is assumed."""
    while True:
        with open(path, "ab+") as file:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                continue  # the process before has moved it away
            try:
                yield file
            finally:
                if path.exists() and not path.stat().st_size:
                    path.unlink()
            return


def _download(url: str, part: BinaryIO, target: Path) -> None:
    """Write the file to `part`, going on where an earlier attempt ended, check it, and move it to `target`."""
    note = Path(f"{part.name}.of")  # which version of the file the part is of, in the server's words
    version = note.read_text() if note.exists() else ""
    failures = 0
    while True:
        have = part.seek(0, os.SEEK_END)
        try:
            _transfer(url, part, version, note)
            break
        except _TooSlow:
            raise
        except (OSError, http.client.HTTPException) as error:
            status = getattr(error, "code", None)
            if status == 416:  # the part is longer than the file
                part.truncate(0)
            elif status is not None and status < 500 and status not in (408, 429):
                raise
            failures = 1 if part.seek(0, os.SEEK_END) > have else failures + 1
            if failures >= TRIES:
                raise
        version = note.read_text() if note.exists() else ""
        time.sleep(0.5 * failures)
    part.flush()
    os.fsync(part.fileno())
    wrong = _mismatch(Path(part.name), target.name)
    if wrong is None:
        os.replace(part.name, target)
    else:
        os.unlink(part.name)
    note.unlink(missing_ok=True)
    if wrong is not None:
        raise ValueError(wrong)


def _transfer(url: str, part: BinaryIO, version: str, note: Path) -> None:
    """Append the rest of the file to `part`; without a known version it is written from its beginning."""
    have = part.seek(0, os.SEEK_END) if version else part.truncate(0)
    with urllib.request.urlopen(_request(url, have, version), timeout=TIMEOUT) as response:
        if response.status != 206:
            have = part.truncate(0)
        headers = response.headers
        note.write_text(headers.get("ETag", "") or headers.get("Last-Modified", ""))
        length = headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        hidden = not (sys.stderr.isatty() and is_main_process())
        with tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=hidden) as bar:
            _copy(response, part, bar.update)
    if total is not None and part.seek(0, os.SEEK_END) < total:
        raise _Broken(f"the server announced {total} bytes and sent {part.tell()}")


def _request(url: str, have: int, version: str) -> urllib.request.Request:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host, fragment="")))
    request.add_header("User-Agent", "regtome")
    if user:  # for this host only: a redirect to another one must not get it
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    if have and version:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", version)
    return request


def _copy(response: Any, part: BinaryIO, progress: Callable[[int], Any]) -> None:
    began, since = time.monotonic(), 0
    while chunk := response.read1(CHUNK):
        part.write(chunk)
        progress(len(chunk))
        since += len(chunk)
        seconds = time.monotonic() - began
        if seconds > 60:
            if since / seconds < SLOWEST:
                raise _TooSlow(f"the server sends {since / seconds:.0f} bytes a second")
            began, since = time.monotonic(), 0
