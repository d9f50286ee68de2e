"""The HTML page: complete, self-contained, safe; the command that fills it; pictures logged in training."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from PIL import Image

import run.analyze as analyze
from analysis.html import EmbeddedPng, Section, Table, cell_text, render, rounded
from analysis.log_images import log_images, sheet
from analysis.report import lookup
from analysis.walk import walk
from models import MergeConfig
from models.registry import OWN_SIZES

TOY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}


def png(width: int = 12) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, 5), "red").save(stream, "PNG")
    return stream.getvalue()


class Page(HTMLParser):
    """Tags with their attributes; open tags must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def self_contained(text: str) -> Page:
    """The page, after checking that it loads nothing."""
    page = Page(text)
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert not page.all("link") and not any("src" in attributes for attributes in page.all("script"))
    without_pictures = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert not re.search(r"https?://|url\(|@import", without_pictures)
    anchors = {a["href"][1:] for a in page.all("a")}
    assert anchors == {section["id"] for section in page.all("section")}
    return page


def test_page_holds_everything_and_nothing_else() -> None:
    table = Table(("a", "b"), (("x<y", 0.123456), (None, 2)), "cap & tion")
    sections = [
        Section(
            "one", "First <b>", "text", (table,), (EmbeddedPng(png(), 'a "picture"'),), raw={"v": [1.0, float("nan")]}
        ),
        Section("two", "Second", "text", problem="no <data>", command="python x.py --a 'b c'"),
    ]
    text = render("Title & more", "sub", sections, "foot")
    page = self_contained(text)
    (image,) = page.all("img")
    assert base64.b64decode(image["src"].split(",")[1]) == png() and image["alt"] == 'a "picture"'
    for shown in (
        "First &lt;b&gt;",
        "x&lt;y",
        "0.123",
        "no &lt;data&gt;",
        "Title &amp; more",
        "cap &amp; tion",
        "foot",
    ):
        assert shown in text
    assert len(page.all("tr")) == 3 and text.count("<td class=n>") == 2  # only the second column is numbers
    raw = re.search(r"<pre>(.*?)</pre>", text, re.S)
    assert raw and json.loads(raw[1].replace("&quot;", '"')) == {"v": [1.0, "nan"]}


def test_small_things() -> None:
    assert [cell_text(v) for v in (None, float("nan"), 0.123456, 12, "x", 1e9)] == [
        "-",
        "-",
        "0.123",
        "12",
        "x",
        "1.00e+09",
    ]
    assert lookup({"a": {"b": 1}}, "a/b") == 1 and lookup({"a": 1}, "a/b") is None and lookup({}, "x") is None
    assert rounded({1: (0.123456789, "x")}) == {"1": [0.123457, "x"]}
    assert EmbeddedPng(png(40), "").width == 40
    with pytest.raises(ValueError, match="PNG"):
        EmbeddedPng(b"GIF89a", "")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(OWN_SIZES, "deit_digits", TOY)
    return ["--dataset", "DIGITS", "--limit", "16", "--device", "cpu"]


def test_report_on_two_models(toy: list[str], tmp_path: Path) -> None:
    words = ["report", "--models", "deit_digits,label=plain", "deit_digits,registers=2,r=4,label=merged", *toy]
    sections = ["norms", "merged", "lost", "dynamics", "ttr", "probes", "similarity", "reconstruction"]
    assert analyze.main([*words, "--sections", *sections, "--show", "2", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    page = self_contained(text)
    assert [section["id"] for section in page.all("section")] == ["summary", "models", *sections]
    pictures = {base64.b64encode(file.read_bytes()).decode() for file in tmp_path.glob("*/*.png")}
    shown = {image["src"].split(",")[1] for image in page.all("img")}
    assert shown == pictures and len(shown) >= 6
    assert "Not shown: " in text and "--limit" in text  # lost has no images of DIGITS; that does not end the report
    assert "unprotected" in text
    summary = text[text.index('id="summary"') : text.index('id="models"')]
    assert "patches above the cut scaled by the medians" in summary and "(n = 16)" in summary
    assert "a normal distribution" in text and "0.637" in text  # bimodality beside its references
    assert text.count("<p class=may>") >= 6


def test_a_number_with_its_interval_and_n() -> None:
    row = {"a": {"x": 0.0196, "x_ci95": [0.0119, 0.0304], "x_n": 30}, "b": {"x": 0.09, "x_ci95": None, "x_n": 1}}
    assert lookup(row, "a/x*100~") == "1.96 [1.19, 3.04]" and lookup(row, "a/x*100~n") == "1.96 [1.19, 3.04] (n = 30)"
    assert lookup(row, "b/x~n") == "too few images (n = 1)" and lookup(row, "a/x*100") == pytest.approx(1.96)
    assert lookup(row, "a/y~") is None


def test_progress_over_all_sections_is_told(toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "report",
        "--model",
        "deit_digits",
        "--sections",
        "cka",
        "pca",
        *toy,
        "--show",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert analyze.main(words) == 0
    out = capsys.readouterr().out
    assert "section 1 of 2, cka" in out and re.search(r"section 2 of 2, pca \(0:\d\d:\d\d so far, about 0:", out)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["--models", "deit_digits", "deit_digits,r=2", "deit_digits,r=4", "deit_digits,r=3", "deit_digits,r=5"],
            "one to four",
        ),
        (["--model", "deit_digits", "--show", "0"], "--show"),
        (["--model", "deit_digits", "--sections", "nothing"], "nothing"),
        (["--model", "nomodel"], "nomodel"),
    ],
)
def test_mistakes_are_one_line(
    toy: list[str], flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze.main(["report", *flags, *toy, "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("analyze.py: error: ") and reason in err


# Pictures in training


class Recorder:
    """What a SummaryWriter would get."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}
        self.histograms: dict[str, np.ndarray] = {}
        self.pictures: dict[str, np.ndarray] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name] = value

    def add_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self.histograms[name] = values

    def add_image(self, name: str, picture: np.ndarray, step: int, dataformats: str) -> None:
        assert dataformats == "HWC"
        self.pictures[name] = picture


@pytest.mark.parametrize(("registers", "merge"), [(0, None), (2, MergeConfig(r=4)), (1, MergeConfig("mctf", r=2))])
def test_logged_pictures(registers: int, merge: MergeConfig | None) -> None:
    model, images, writer = tiny.ours(merge, num_registers=registers, drop_path_rate=0.5), tiny.images(3), Recorder()
    model.train()
    state = torch.get_rng_state()
    log_images(model, images, images.clamp(0, 1), writer, 7)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    panels = 3 + 1 + registers  # input, merged, norms, and each prefix token's attention
    height, width, _ = writer.pictures["pictures"].shape
    assert width > panels * 224 and height > 3 * 224 and writer.pictures["pictures"].dtype == np.uint8
    left = model.plan().counts[-1] - 1 - registers
    assert writer.histograms["norms/block_2/patches"].shape == (3, left)
    assert len(writer.scalars) == 3 * (1 + registers)


def test_the_sheet_has_one_scale_and_titles_that_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny.ours(num_registers=2), tiny.images(2)
    *_, last = walk(model, images)
    laid_out = {}
    monkeypatch.setattr(
        "analysis.log_images.lay_out",
        lambda rows, titles, captions, scales, heading: (
            laid_out.update(rows=rows, titles=titles) or np.zeros((2, 2, 3))
        ),
    )
    sheet(last, images.clamp(0, 1))
    names = [title for title, _ in laid_out["titles"]]
    assert names == ["input", "merged", "norms", "class", "register 1", "register 2"]
    low, high = (float(last.after.x[:, 3:].norm(dim=-1).min()), float(last.after.x[:, 3:].norm(dim=-1).max()))
    assert laid_out["titles"][2][1] == f"{low:.3g} dark, {high:.3g} bright"
    colours = {}  # equal values have equal colours in all images
    for index, row in enumerate(laid_out["rows"]):
        lengths = last.after.x[index, 3:].norm(dim=-1).view(4, 4)
        for (r, c), value in np.ndenumerate(lengths.detach().numpy()):
            colours[float(value)] = row[2][r * 56 + 3, c * 56 + 3].tolist()
    darkest, brightest = colours[min(colours)], colours[max(colours)]
    assert sum(brightest) > sum(darkest) and len({tuple(colour) for colour in colours.values()}) > 8


def test_training_logs_pictures_every_k_epochs_and_nothing_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with runs.toy_model():
        words = runs.digits("--r", 4, "--num_registers", 2, "--epochs", 3, "--device", "cpu")
        runs.succeeds(capsys, [*words, "--output_dir", str(tmp_path / "a"), "--log_images", "2"])
        runs.succeeds(capsys, [*words, "--output_dir", str(tmp_path / "b")])
    runs.same_run(tmp_path / "a", tmp_path / "b")
    steps = set()
    for file in (tmp_path / "a").glob("events*"):
        content = file.read_bytes()
        steps |= {tag for tag in (b"pictures", b"norms/block_2/patches", b"norms/register_1/block_0") if tag in content}
    assert len(steps) == 3
    assert not any(b"pictures" in file.read_bytes() for file in (tmp_path / "b").glob("events*"))


@pytest.mark.parametrize("flags", [["--log_images", "1"], ["--log_images", "1", "--eval", "--output_dir", "o"]])
def test_logging_pictures_to_nowhere_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--log_images" in runs.refusal(capsys, runs.digits(*flags))
