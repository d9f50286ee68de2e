"""A self-contained HTML page of sections of text, tables and pictures: nothing is loaded from elsewhere.

Its frame and its style are the template report.html; what is on the page comes from the command `report`.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

WIDE = 3.5  # width over height from which a picture takes the whole width
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class EmbeddedPng:
    """A picture on the page: a PNG file's bytes, and the line under it."""

    png: bytes
    caption: str

    def __post_init__(self) -> None:
        if not self.png.startswith(_PNG):
            raise ValueError("not a PNG file")

    @property
    def width(self) -> int:
        """Width in pixels, from the header."""
        return int.from_bytes(self.png[16:20], "big")

    @property
    def height(self) -> int:
        """Height in pixels, from the header."""
        return int.from_bytes(self.png[20:24], "big")


@dataclass(frozen=True)
class Table:
    """Column names and rows of cells, which may be numbers (set to the right) or text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: its anchor.
        text: why it is there.
        may, may_not: what one may conclude from it, and what not.
        more: pictures that are folded away.
        problem: why there is nothing to show.
        raw: numbers in plain values, to unfold.
        command: the command line that made it.
    """

    key: str
    title: str
    text: str
    tables: tuple[Table, ...] = ()
    pictures: tuple[EmbeddedPng, ...] = ()
    problem: str = ""
    raw: Any = None
    command: str = ""
    may: str = ""
    may_not: str = ""
    more: tuple[EmbeddedPng, ...] = ()


def render(title: str, subtitle: str, sections: Sequence[Section], footer: str = "") -> str:
    """The page: `report.html` with its places filled."""
    template = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        links="".join(f'<a href="#{escape(section.key)}">{escape(section.title)}</a>' for section in sections),
        sections="".join(_section(section) for section in sections),
        footer=escape(footer),
    )


def _section(section: Section) -> str:
    parts = [f'<section id="{escape(section.key)}"><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>']
    if section.problem:
        parts.append(f'<p class="problem">Not shown: {escape(section.problem)}</p>')
    if section.may or section.may_not:
        parts.append(f"<p class=may>{escape(section.may)} <span>{escape(section.may_not)}</span></p>")
    if section.tables:
        parts.append(f'<div class="tables">{"".join(_table(table) for table in section.tables)}</div>')
    parts.append(_figures(section.pictures))
    if section.more:
        count = len(section.more)
        summary = f"<summary>{count} more picture{'s' if count > 1 else ''}</summary>"
        parts.append(f"<details>{summary}{_figures(section.more)}</details>")
    if section.raw is not None:
        text = json.dumps(rounded(section.raw), indent=1)
        parts.append(f"<details><summary>all numbers</summary><pre>{escape(text)}</pre></details>")
    if section.command:
        parts.append(f"<details><summary>command</summary><code>{escape(section.command)}</code></details>")
    return "".join([*parts, "</section>"])


def _figures(pictures: Sequence[EmbeddedPng]) -> str:
    return f'<div class="figures">{"".join(map(_picture, pictures))}</div>' if pictures else ""


def _table(table: Table) -> str:
    # a column of numbers is set to the right with its head
    numeric = [all(_is_number(row[i]) or row[i] is None for row in table.rows) for i in range(len(table.columns))]
    head = "".join(_cell("th", name, right) for name, right in zip(table.columns, numeric, strict=True))
    rows = [
        "<tr>" + "".join(_cell("td", cell, right) for cell, right in zip(row, numeric, strict=True)) + "</tr>"
        for row in table.rows
    ]
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    inside = f"{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{inside}</table></div>'


def _cell(tag: str, value: Any, right: bool) -> str:
    text = cell_text(value)
    kind = " class=n" if right else " class=v" if text.endswith(("]", ")")) and len(text) < 40 else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def cell_text(value: Any) -> str:
    """A cell's text: three significant digits of a float, a dash for nothing."""
    if value is None or (isinstance(value, float) and value != value):
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 or not value else f"{value:.2e}"
    return str(value)


def rounded(value: Any) -> Any:
    """Round floats of nested lists and dictionaries to six digits; NaN, which json does not have, becomes text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else str(value)
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _picture(picture: EmbeddedPng) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    caption = escape(picture.caption)
    # half of the page's width holds most pictures; wide ones take all of it. A click shows the natural size.
    kind = "wide" if picture.width > WIDE * picture.height else ""
    image = f'<img src="data:image/png;base64,{data}" alt="{caption}" loading="lazy">'
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'
