"""One self-contained HTML page from sections of text, tables and pictures: nothing is loaded from elsewhere.

Only the page is made here; what is on it comes from run/analyze.py report.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A PNG file's bytes, and the line under it."""

    png: bytes
    caption: str

    def __post_init__(self) -> None:
        if not self.png.startswith(_PNG):
            raise ValueError("not a PNG file")

    @property
    def width(self) -> int:
        """Pixels, from the header."""
        return int.from_bytes(self.png[16:20], "big")


@dataclass(frozen=True)
class Table:
    """Column names and rows of cells, which may be numbers (set to the right) or text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A chapter: why it is there, its tables, its pictures, and the raw numbers to unfold."""

    key: str
    title: str
    text: str
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    problem: str = ""  # why there is nothing to show
    raw: Any = None
    command: str = ""


def render(title: str, subtitle: str, sections: Sequence[Section], footer: str = "") -> str:
    """The page."""
    links = "".join(f'<a href="#{escape(s.key)}">{escape(s.title)}</a>' for s in sections)
    body = "".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>"
        f"<nav>{links}</nav><main>{body}</main><footer>{escape(footer)}</footer>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _section(section: Section) -> str:
    parts = [f'<section id="{escape(section.key)}"><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>']
    if section.problem:
        parts.append(f'<p class="problem">Not shown: {escape(section.problem)}</p>')
    parts += [_table(table) for table in section.tables]
    if section.pictures:
        parts.append(f'<div class="figures">{"".join(_picture(picture) for picture in section.pictures)}</div>')
    if section.raw is not None:
        text = json.dumps(rounded(section.raw), indent=1)
        parts.append(f"<details><summary>all numbers</summary><pre>{escape(text)}</pre></details>")
    if section.command:
        parts.append(f'<p class="command"><code>{escape(section.command)}</code></p>')
    return "".join([*parts, "</section>"])


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
    return f"<{tag}{' class=n' if right else ''}>{escape(show(value))}</{tag}>"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def show(value: Any) -> str:
    """A cell's text: four significant digits of a float, a dash for nothing."""
    if value is None or (isinstance(value, float) and value != value):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"
    return str(value)


def rounded(value: Any) -> Any:
    """Floats of nested lists and dictionaries to six significant digits; no NaN, which json does not have."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else str(value)
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    caption = escape(picture.caption)
    # pictures are drawn at 120 dots per inch; at 96 they have their natural size
    width = round(picture.width * 96 / 120)
    image = f'<img src="data:image/png;base64,{data}" alt="{caption}" style="width:{width}px" loading="lazy">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def lookup(content: Any, path: str) -> Any:
    """A value deep in nested dictionaries, by a path such as outliers/shared/share; None where it is missing."""
    for key in path.split("/"):
        if not isinstance(content, dict) or key not in content:
            return None
        content = content[key]
    return content


_CSS = """
:root{--ink:#1f2328;--faint:#667079;--rule:#e3e6e9;--accent:#0072b2;--paper:#fff;--wash:#f6f7f9}
*{box-sizing:border-box}html{scroll-behavior:smooth;scroll-padding-top:3.4rem}
body{margin:0;background:var(--wash);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
header{max-width:74rem;margin:0 auto;padding:2.2rem 1.5rem 1rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .3rem;letter-spacing:-.01em}header p{margin:0;color:var(--faint)}
nav{position:sticky;top:0;z-index:1;background:rgba(246,247,249,.94);border-bottom:1px solid var(--rule);
padding:.55rem max(1.5rem,calc((100% - 71rem)/2));display:flex;flex-wrap:wrap;gap:.2rem 1.1rem}
nav a{color:var(--accent);text-decoration:none;font-size:.92rem}nav a:hover{text-decoration:underline}
main{max-width:74rem;margin:0 auto;padding:1rem 1.5rem}
section{background:var(--paper);border:1px solid var(--rule);border-radius:8px;padding:1.2rem 1.5rem 1.4rem;
margin:0 0 1.3rem}
h2{font-size:1.22rem;margin:0 0 .4rem}section>p{max-width:52rem;margin:.2rem 0 1rem}
.problem{color:var(--faint);border-left:3px solid var(--rule);padding-left:.8rem}
.scroll{overflow-x:auto;margin:0 0 1rem}table{border-collapse:collapse;font-size:.88rem}
caption{text-align:left;color:var(--faint);padding-bottom:.35rem}
th,td{text-align:left;padding:.32rem .9rem .32rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600;color:var(--faint);vertical-align:bottom}td:first-child{white-space:nowrap}
.n{text-align:right;font-variant-numeric:tabular-nums}
.figures{display:flex;flex-wrap:wrap;gap:1.5rem 2.2rem;align-items:flex-start;margin:1.2rem 0 1rem}
figure{margin:0;max-width:100%}img{display:block;max-width:100%;height:auto;cursor:zoom-in}
img.full{max-width:none;cursor:zoom-out}figure:has(img.full){overflow-x:auto}
figcaption{color:var(--faint);font-size:.88rem;margin-top:.35rem;max-width:34rem}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--accent);font-size:.88rem}
pre{max-height:24rem;overflow:auto;background:var(--wash);border:1px solid var(--rule);border-radius:6px;padding:.8rem;
font-size:.78rem;line-height:1.4}
.command{margin:.7rem 0 0}code{font-size:.8rem;color:var(--faint);overflow-wrap:anywhere}
footer{max-width:74rem;margin:0 auto;padding:.5rem 1.5rem 2.5rem;color:var(--faint);font-size:.82rem}
@media (max-width:40rem){section{padding:1rem}header,main{padding-left:.8rem;padding-right:.8rem}}
@media print{nav{display:none}section{border:0;break-inside:avoid-page}body{background:#fff}}
""".replace("\n", "")

_SCRIPT = """document.addEventListener("click",e=>{if(e.target.tagName==="IMG")e.target.classList.toggle("full")})"""
