"""The page that every report is: one HTML file that needs nothing else, light or dark as its reader likes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template


def page(title: str, headline: str, sections: Iterable[tuple[str, str]]) -> str:
    """HTML of a page with a section for each pair of a heading and its HTML; ``title`` and ``headline`` are text."""
    body = "".join(f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections)
    shell = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return shell.substitute(title=escape(title), headline=escape(headline), body=body)


def note(text: str) -> str:
    """A paragraph of less weight."""
    return f'<p class="note">{escape(text)}</p>'


def scrolled(content: str, label: str) -> str:
    """HTML that may be wider than the page, in a box that scrolls by mouse and by keyboard; ``label`` names it."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def table(header: Sequence[str], lines: Iterable[Sequence[str]], *, name: str, caption: str = "") -> str:
    """A table whose ``id`` is ``name``; the first cell of each line is its heading."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(text)}</td>" for text in rest)}</tr>'
        for first, *rest in lines
    )
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    whole = f'<table id="{escape(name)}">{said}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return scrolled(whole, caption or name)
