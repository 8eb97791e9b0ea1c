"""What every report's page is made of: one file, nothing loaded from elsewhere, every foreign text escaped."""

from __future__ import annotations

import html
import string
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from vlm2vla_client.evaluation.statistics import Interval


def page(path: Path, title: str, parts: Iterable[str]) -> Path:
    """Writes a page of these parts (HTML) and returns its path."""
    template = resources.files("vlm2vla_client").joinpath("view.html").read_text(encoding="utf-8")
    whole = string.Template(template).substitute(title=text(title), body="\n".join(parts))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(whole, encoding="utf-8", errors="backslashreplace")
    return path


def figure(url: str, caption: str) -> str:
    """A picture, given as a ``data:`` URL, with its caption."""
    shown = f'<img style="background:#fff;width:auto;max-width:100%" alt="{text(caption)}" src="{url}">'
    return f'<figure class="card">{shown}<figcaption>{text(caption)}</figcaption></figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    """A table of plain texts; numbers stand to the right, ``words`` to the left."""
    style = ' style="text-align:left"' if words else ""
    lines = "".join("<tr>" + "".join(f"<td{style}>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    names = "".join(f"<th{style}>{text(name)}</th>" for name in head)
    return f'<div style="overflow-x:auto"><table><tr>{names}</tr>{lines}</table></div>'


def text(value: str) -> str:
    """Plain text as HTML; what cannot be printed becomes a space."""
    return html.escape("".join(c if c.isprintable() else " " for c in value))


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"


def span(interval: Interval) -> str:
    """An interval of shares in per cent."""
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def seconds(value: float | None) -> str:
    """Seconds, or a dash where nothing was measured."""
    return "-" if value is None else f"{value:.2f}"


def facts(pairs: Mapping[str, str]) -> str:
    """Short facts with their names, side by side."""
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs.items())
    return f'<dl class="facts">{items}</dl>'


def note(words: str) -> str:
    """A line in small print."""
    return f'<p class="soft">{text(words)}</p>'
