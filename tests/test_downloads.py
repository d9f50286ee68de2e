"""downloads.py against a server that stalls, cuts, lies, and asks for a password."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import digits, refusal, succeeds, toy_model

import checkpoint
import downloads
from models import UserError
from utils import to_jsonable, without_credentials

Answer = Callable[[Any, bytes], None]


class Server:
    """Serves one file, in a way that the test sets."""

    def __init__(self) -> None:
        self.content, self.answer, self.asked = b"", whole, []  # type: bytes, Answer, list[dict[str, str]]
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append({"path": self.path, **dict(self.headers)})
                outer.answer(self, outer.content)

            def log_message(self, *_: object) -> None: ...

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()


def send(handler: Any, content: bytes, announced: int, status: int = 200) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(announced))
    handler.send_header("ETag", '"1"')
    handler.end_headers()
    handler.wfile.write(content)


def whole(handler: Any, content: bytes) -> None:
    send(handler, content, len(content))


def cut(handler: Any, content: bytes) -> None:
    """At most 1000 bytes at a time, announced as all that is left, as a connection that breaks does."""
    start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
    send(handler, content[start : start + 1000], len(content) - start, 206 if start else 200)


def lying(handler: Any, content: bytes) -> None:
    send(handler, content, len(content) + 1)


def stalling(handler: Any, content: bytes) -> None:
    send(handler, content[:1000], len(content))
    handler.wfile.flush()
    time.sleep(3)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    torch.save({"model": {"a": torch.arange(1000.0)}, "epoch": 7}, tmp_path / "served.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds, real=time.sleep: real(min(seconds, 3)))
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    server.content = (tmp_path / "served.pth").read_bytes()
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


def test_a_transfer_that_breaks_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.answer = cut
    assert checkpoint.load_checkpoint(f"http://{server.address}/c.pth")["epoch"] == 7
    assert [asked.get("Range") for asked in server.asked[:3]] == [None, "bytes=1000-", "bytes=2000-"]
    assert len(list((tmp_path / "hub" / "checkpoints").iterdir())) == 1


def test_a_part_is_of_one_version_of_the_file(server: Server, tmp_path: Path) -> None:
    server.answer = lambda handler, content: send(handler, b"x" * 1000, len(content))
    with pytest.raises(UserError, match="announced"):
        server.asked.clear()
        checkpoint.load_checkpoint(f"http://{server.address}/c.pth")
    server.answer = whole  # 200 to a request for the rest: the file is another one by now
    assert checkpoint.load_checkpoint(f"http://{server.address}/c.pth")["epoch"] == 7


@pytest.mark.parametrize(("answer", "words"), [(lying, "announced 5"), (stalling, "timed out")])
def test_a_server_that_stalls_or_lies_ends_in_time(
    server: Server, monkeypatch: pytest.MonkeyPatch, answer: Answer, words: str
) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    server.answer = answer
    with pytest.raises(UserError, match=words):
        checkpoint.load_checkpoint(f"http://{server.address}/c.pth")


def test_a_server_that_drips_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr(downloads.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(downloads, "CHUNK", 10)
    with pytest.raises(UserError, match="0 bytes a second"):
        checkpoint.load_checkpoint(f"http://{server.address}/c.pth")
    assert len(server.asked) == 1


def test_the_hash_in_a_name_is_compared(server: Server, tmp_path: Path) -> None:
    digest = hashlib.sha256(server.content).hexdigest()[:8]
    url = f"http://{server.address}/deit-{digest}.pth"
    assert checkpoint.load_checkpoint(url)["epoch"] == 7
    (tmp_path / "hub" / "checkpoints" / f"deit-{digest}.pth").write_bytes(server.content[:-1] + b"x")
    assert checkpoint.load_checkpoint(url)["epoch"] == 7 and len(server.asked) == 2
    with pytest.raises(UserError, match=f"starts with {digest}, not with deadbeef"):
        checkpoint.load_checkpoint(f"http://{server.address}/deit-deadbeef.pth")


def test_a_damaged_cache_is_fetched_again(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://{server.address}/c.pth"
    checkpoint.load_checkpoint(url)
    (file,) = (tmp_path / "hub" / "checkpoints").iterdir()
    file.write_bytes(server.content[:2000])
    assert checkpoint.load_checkpoint(url)["epoch"] == 7
    assert "fetching it again" in capsys.readouterr().out
    server.content = b"<html>"
    with pytest.raises(UserError, match="serves no whole checkpoint"):
        checkpoint.load_checkpoint(f"http://{server.address}/page.pth")
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == [file]


def test_processes_that_want_one_file_fetch_it_once(server: Server) -> None:
    def slow(handler: Any, content: bytes) -> None:
        time.sleep(0.3)
        whole(handler, content)

    server.answer = slow
    found = []
    url = f"http://{server.address}/c.pth"
    threads = [threading.Thread(target=lambda: found.append(checkpoint.load_checkpoint(url))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(server.asked) == 1


def test_credentials_reach_the_server_and_nothing_else(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def locked(handler: Any, content: bytes) -> None:
        wanted = "Basic " + base64.b64encode(b"ann:s3cret").decode()
        if handler.headers.get("Authorization") == wanted and "sig=t0ken" in handler.path:
            whole(handler, content)
        else:
            send(handler, b"", 0, 403)

    with toy_model():
        succeeds(capsys, digits("--output_dir", tmp_path / "first", limit=20))
        server.content = (tmp_path / "first" / "checkpoint.pth").read_bytes()
        server.answer = locked
        flags = ["--finetune", f"http://ann:s3cret@{server.address}/c.pth?sig=t0ken", "--output_dir", tmp_path / "run"]
        out = succeeds(capsys, digits(*flags, limit=20))
        wrong = refusal(capsys, digits("--finetune", f"http://ann:guess3d@{server.address}/d.pth?sig=t0ken"))
    assert f"weights: http://{server.address}/c.pth\n" in out and "403" in wrong
    published = b"".join(file.read_bytes() for file in (tmp_path / "run").iterdir()) + (out + wrong).encode()
    assert not [secret for secret in (b"s3cret", b"t0ken", b"guess3d") if secret in published]
    assert json.loads((tmp_path / "run" / "args.json").read_text())["finetune"] == f"http://{server.address}/c.pth"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("see https://u:p@h.org/a/b.pth?x=1&y=2#z, or /tmp/a?b", "see https://h.org/a/b.pth or /tmp/a?b"),
        ("https://h.org:80/a@b.pth", "https://h.org:80/a@b.pth"),
        ("'https://t@h.org'", "'https://h.org'"),
    ],
)
def test_urls_lose_their_credentials(text: str, wanted: str) -> None:
    assert without_credentials(text) == wanted and to_jsonable({"a": [text]}) == {"a": [wanted]}
