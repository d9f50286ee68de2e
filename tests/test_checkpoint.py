"""checkpoint.py: files that are torn, altered, foreign, or whole at every moment; and what is resumed."""

import argparse
import errno
import hashlib
import io
import os
import pathlib
import pickle
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_distributed_helpers import free_port
from test_utils import draw, names_in, one_line, plain_environment  # noqa: F401  (a fixture of every test here too)

import checkpoint
import utils
from checkpoint import DamagedCheckpoint
from distributed import Distributed
from runfolder import claimed
from utils import RunError


def state(epoch=0, size=10):
    return {"model": {"a": torch.arange(float(size)), "b": torch.ones(3, 4)}, "epoch": epoch, "args": {"x": [1, None]}}


def assert_same(loaded, expected):
    assert loaded.keys() == expected.keys() and loaded["model"].keys() == expected["model"].keys()
    assert all(torch.equal(loaded["model"][key], value) for key, value in expected["model"].items())
    assert (loaded["epoch"], loaded["args"]) == (expected["epoch"], expected["args"])


# Checkpoints: writing


def test_save_keeps_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for epoch in range(3):
        checkpoint.save_checkpoint(path, state(epoch))
    assert_same(checkpoint.load_checkpoint(path), state(2))
    assert_same(checkpoint.load_checkpoint(tmp_path / "checkpoint_prev.pth"), state(1))
    checkpoint.save_checkpoint(tmp_path / "best.pth", state(), keep_previous=False)
    checkpoint.save_checkpoint(tmp_path / "best.pth", state(), keep_previous=False)
    assert names_in(tmp_path) == ["best.pth", "checkpoint.pth", "checkpoint_prev.pth"]


def test_save_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in range(3):
        checkpoint.save_checkpoint(tmp_path / "checkpoint.pth", state(epoch))
    assert_same(checkpoint.load_checkpoint(tmp_path / "checkpoint.pth"), state(2))
    assert_same(checkpoint.load_checkpoint(tmp_path / "checkpoint_prev.pth"), state(1))
    assert len(names_in(tmp_path)) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("size", [10, 1_000_000])  # in the writer's buffer, and beyond it
def test_full_disk_keeps_the_old_files(tmp_path, monkeypatch, size):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint(path, state(0))
    checkpoint.save_checkpoint(path, state(1))

    def open_full(temporary):
        temporary.touch()
        return open("/dev/full", "wb")

    monkeypatch.setattr(utils, "_open_new", open_full)
    message = one_line(lambda: checkpoint.save_checkpoint(path, state(2, size)), RunError)
    assert "No space left on device" in message and str(path) in message
    one_line(lambda: utils.write_json(tmp_path / "args.json", {}), RunError)
    assert names_in(tmp_path) == ["checkpoint.pth", "checkpoint_prev.pth"]
    assert_same(checkpoint.load_checkpoint(path), state(1))


def in_child(function):
    """Exit status of a function run in a forked process."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_disk_that_fills_inside_the_zip_writer(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint(path, state(1))

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoint.save_checkpoint(path, state(2, 1_000_000))
        except RunError:
            os._exit(0)

    assert in_child(save) == 0
    assert names_in(tmp_path) == ["checkpoint.pth"]
    assert_same(checkpoint.load_checkpoint(path), state(1))


def die_before(step):
    """Make the given call of fsync, link or rename the process's last moment."""
    calls = 0

    def guard(real, *arguments):
        nonlocal calls
        calls += 1
        if calls == step:
            os._exit(0)
        return real(*arguments)

    for name in ("fsync", "link", "replace"):
        setattr(os, name, partial(guard, getattr(os, name)))


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("step", range(1, 7))
def test_killed_at_any_moment_a_whole_checkpoint_is_there(tmp_path, step, torn):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint(path, state(0))
    checkpoint.save_checkpoint(path, state(1))
    if torn:
        os.truncate(path, 300)

    def save():
        die_before(step)
        checkpoint.save_checkpoint(path, state(2))

    assert in_child(save) == (9 if step == 6 else 0)  # five moments, and then it is done
    loaded, _ = checkpoint.load_resume("auto", tmp_path)
    assert_same(loaded, state(2 if step > 3 else 0 if torn else 1))
    with claimed(argparse.Namespace(output_dir=tmp_path, resume="auto", overwrite=False), Distributed("cpu")):
        pass
    assert names_in(tmp_path) == ["checkpoint.pth", "checkpoint_prev.pth"]
    checkpoint.save_checkpoint(path, state(3))
    assert_same(checkpoint.load_checkpoint(path), state(3))
    assert names_in(tmp_path) == ["checkpoint.pth", "checkpoint_prev.pth"]


def test_save_when_both_names_are_one_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint(path, state(0))
    os.link(path, checkpoint.previous_path(path))
    checkpoint.save_checkpoint(path, state(1))
    assert names_in(tmp_path) == ["checkpoint.pth", "checkpoint_prev.pth"]
    assert_same(checkpoint.load_checkpoint(path), state(1))


def test_a_mistake_of_ours_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save_checkpoint(tmp_path / "c.pth", {"model": lambda: 0})
    assert names_in(tmp_path) == []


# Checkpoints: reading


def test_every_bit_flip_is_found_or_harmless(tmp_path):
    """Every third byte, one of its bits; only alignment padding and unused header fields may be harmless."""
    path = tmp_path / "c.pth"
    checkpoint.save_checkpoint(path, state())
    content, found = path.read_bytes(), 0
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            loaded = checkpoint.load_checkpoint(path)
        except DamagedCheckpoint:
            found += 1
        else:
            assert_same(loaded, state())
    assert found > len(content) / 3 / 3


def test_an_entry_marked_as_a_folder_is_found(tmp_path):
    """The one bit flip that neither zip's checksums nor torch notice: torch then returns uninitialised memory."""
    path = tmp_path / "c.pth"
    checkpoint.save_checkpoint(path, state())
    content = bytearray(path.read_bytes())
    content[content.rindex(b"archive/data/0") - 46 + 38] |= 0x10  # external attributes in the central directory
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert "archive/data/0" in one_line(lambda: checkpoint.load_checkpoint(path), DamagedCheckpoint)


def test_a_flip_in_the_weights_names_the_part(tmp_path):
    path = tmp_path / "c.pth"
    checkpoint.save_checkpoint(path, state(size=4000))
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(4000.0).numpy().tobytes()) + 9000] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch itself sees nothing
    assert "wrong checksum of" in one_line(lambda: checkpoint.load_checkpoint(path), DamagedCheckpoint)


def test_compressed_records_are_refused_before_they_are_unpacked(tmp_path):
    torch.save({"model": torch.zeros(1000)}, tmp_path / "plain.pth")
    bomb, copies = tmp_path / "bomb.pth", tmp_path / "copies.pth"
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in plain.infolist():
            archive.writestr(entry.filename, plain.read(entry))
    message = one_line(lambda: checkpoint.load_checkpoint(bomb), DamagedCheckpoint)
    assert "has compressed parts (" in message and "save it anew" in message
    content = bytearray((tmp_path / "plain.pth").read_bytes())
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0")) if b"archive/data/0" in content else 0
    content[start + 24 : start + 28] = (2**31).to_bytes(4, "little")  # the unpacked size in the central directory
    copies.write_bytes(content)
    one_line(lambda: checkpoint.load_checkpoint(copies), DamagedCheckpoint)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("legacy", [False, True])
def test_torn(tmp_path, share, legacy):
    path = tmp_path / "c.pth"
    torch.save(state(), path, _use_new_zipfile_serialization=not legacy)
    os.truncate(path, int(path.stat().st_size * share))
    words = "is empty" if share == 0 else str(path)
    assert words in one_line(lambda: checkpoint.load_checkpoint(path), DamagedCheckpoint)


def npz_bytes():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"hello world, a text file\n" * 9,
        b'{"a": 1}',
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        b"\xff\xd8\xff\xe0" + bytes(range(256)),
        bytes(4096),
        pickle.dumps([1, 2], protocol=2),
        pickle.dumps({"a": 1}, protocol=4),
        npz_bytes(),
        b"PK",
    ],
)
def test_foreign(tmp_path, content, recwarn):
    path = tmp_path / "c.pth"
    path.write_bytes(content)
    assert str(path) in one_line(lambda: checkpoint.load_checkpoint(path), DamagedCheckpoint)
    assert not recwarn.list


@pytest.mark.parametrize("content", [[1, 2], {}, {1: torch.ones(1)}, torch.ones(2), "text"])
def test_a_saved_object_that_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    message = one_line(lambda: checkpoint.load_checkpoint(tmp_path / "c.pth"), DamagedCheckpoint)
    assert type(content).__name__ in message


def test_no_file(tmp_path):
    assert "does not exist" in one_line(lambda: checkpoint.load_checkpoint(tmp_path / "none.pth"))
    assert "is a folder" in one_line(lambda: checkpoint.load_checkpoint(tmp_path))
    (tmp_path / "file").touch()
    assert "Not a directory" in one_line(lambda: checkpoint.load_checkpoint(tmp_path / "file" / "c.pth"))


def test_permission_denied(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint(path, state(0))
    checkpoint.save_checkpoint(path, state(1))
    path.chmod(0)
    if os.geteuid() == 0:  # whom no mode keeps out
        real = open

        def refuse(file, *arguments, **options):
            if Path(file) == path:
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return real(file, *arguments, **options)

        monkeypatch.setattr("builtins.open", refuse)
    assert "Permission denied" in one_line(lambda: checkpoint.load_checkpoint(path))
    assert "Permission denied" in one_line(lambda: checkpoint.load_resume("auto", tmp_path))  # no silent step back


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle0", "pickle2", "pickle5"])
@pytest.mark.parametrize("name", ["system", "eval"])
def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path, kind, name):
    trace, path = tmp_path / "ran", tmp_path / "checkpoint.pth"
    evil = Evil(os.system, f"touch {trace}") if name == "system" else Evil(eval, f"open({str(trace)!r}, 'w')")
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(evil, protocol=int(kind[-1])))
    else:
        torch.save({"model": {}, "args": evil}, path, _use_new_zipfile_serialization=kind == "zip")
    message = one_line(lambda: checkpoint.load_checkpoint(path))
    assert kind == "pickle5" or f"{name};" in message
    if kind == "zip":
        checkpoint.save_checkpoint(tmp_path / "checkpoint_prev.pth", state())
        assert name in one_line(lambda: checkpoint.load_resume("auto", tmp_path))  # refused, not passed over
    assert not trace.exists()


def test_a_whole_module_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "c.pth")
    assert "torch.nn.modules.linear.Linear" in one_line(lambda: checkpoint.load_checkpoint(tmp_path / "c.pth"))


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoint_of_deit_with_its_namespace(tmp_path, legacy):
    """DeiT's keys; its submitit launcher leaves a path in args."""
    args = argparse.Namespace(lr=5e-4, opt_betas=None, activate_layer=[1, 2], output_dir=pathlib.PosixPath("/a/b"))
    content = {**state(), "optimizer": {"state": {}}, "lr_scheduler": {}, "args": args}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    loaded = checkpoint.load_checkpoint(tmp_path / "c.pth")
    checkpoint.check_resumable(loaded, "c.pth")
    assert utils.to_jsonable(loaded["args"]) == {
        "lr": 5e-4,
        "opt_betas": None,
        "activate_layer": [1, 2],
        "output_dir": "/a/b",
    }
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed for that one file only


@pytest.mark.parametrize("end", ["pth", "safetensors"])
def test_bare_state_dict(tmp_path, end):
    weights = state()["model"]
    path = tmp_path / f"c.{end}"
    torch.save(weights, path) if end == "pth" else save_file(weights, path)
    loaded = checkpoint.load_checkpoint(path)
    assert list(loaded) == ["model"] and torch.equal(loaded["model"]["a"], weights["a"])
    assert "use --finetune" in one_line(lambda: checkpoint.check_resumable(loaded, path))
    os.truncate(path, path.stat().st_size - 40)
    one_line(lambda: checkpoint.load_checkpoint(path), DamagedCheckpoint)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of one checkpoint, and a hub cache of its own."""
    checkpoint.save_checkpoint(tmp_path / "served.pth", state(7))
    content, asked = (tmp_path / "served.pth").read_bytes(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if "good" in self.path else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_): ...

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "*")
    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", asked
    httpd.shutdown()
    httpd.server_close()


def test_url_is_cached_by_address(server, tmp_path):
    address, asked = server
    for folder in ("good1", "good1", "good2"):  # two files of one name are two files
        loaded, path = checkpoint.load_resume(f"{address}/{folder}/checkpoint.pth?download=1", "")
        assert path.startswith("http://") and loaded["epoch"] == 7
    assert len(asked) == 2
    digest = hashlib.sha256((tmp_path / "served.pth").read_bytes()).hexdigest()[:8]
    checkpoint.load_checkpoint(f"{address}/good/deit_small_patch16_224-{digest}.pth")
    assert (tmp_path / "hub" / "checkpoints" / f"deit_small_patch16_224-{digest}.pth").exists()


def test_url_that_does_not_answer(server, tmp_path):
    address, _ = server
    assert "404" in one_line(lambda: checkpoint.load_checkpoint(f"{address}/bad/checkpoint.pth"))
    offline = f"http://127.0.0.1:{free_port()}/c.pth"
    assert "give a local file" in one_line(lambda: checkpoint.load_checkpoint(offline))
    assert not list((tmp_path / "hub").rglob("*.pth*"))


# Resume


def test_resume_auto(tmp_path, capsys):
    assert checkpoint.load_resume("auto", tmp_path / "new") is None
    assert checkpoint.load_resume(None, tmp_path) is None and checkpoint.load_resume("", tmp_path) is None
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint(path, state(0))
    checkpoint.save_checkpoint(path, state(1))
    assert checkpoint.load_resume("auto", tmp_path)[1] == str(path) and capsys.readouterr().out == ""
    os.truncate(path, 700)
    loaded, found = checkpoint.load_resume("auto", tmp_path)
    output = capsys.readouterr().out
    assert loaded["epoch"] == 0 and found.endswith("checkpoint_prev.pth")
    assert output.startswith("warning: ") and output.count("\n") == 1
    assert "torn" in one_line(lambda: checkpoint.load_resume(str(path), tmp_path))  # a named file is taken or refused
    path.unlink()
    assert checkpoint.load_resume("auto", tmp_path)[1] == str(checkpoint.previous_path(path))
    os.truncate(checkpoint.previous_path(path), 700)
    assert "no checkpoint to resume" in one_line(lambda: checkpoint.load_resume("auto", tmp_path))


# Random streams


def test_rng_state_survives_a_checkpoint(tmp_path):
    utils.seed_all(1)
    draw()  # an odd number of Gaussian draws leaves a cached one in python and numpy
    checkpoint.save_checkpoint(tmp_path / "c.pth", {"rng": checkpoint.rng_state(), "epoch": 0})
    expected = [draw() for _ in range(3)]
    checkpoint.set_rng_state(checkpoint.load_checkpoint(tmp_path / "c.pth")["rng"])
    assert [draw() for _ in range(3)] == expected
