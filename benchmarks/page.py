"""The page that every report is: one HTML file that needs nothing else, light or dark as its reader likes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

CONTENTS = 6
"""Sections from which on a page has a table of contents."""


def page(title: str, headline: str, sections: Iterable[tuple[str, str]]) -> str:
    """HTML of a page with a section for each pair of a heading and its HTML; all other arguments are text."""
    listed = list(sections)
    links = "".join(f'<li><a href="#s{at}">{escape(heading)}</a></li>' for at, (heading, _) in enumerate(listed))
    contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if len(listed) >= CONTENTS else ""
    body = "".join(
        f'<section id="s{at}"><h2>{escape(heading)}</h2>{content}</section>'
        for at, (heading, content) in enumerate(listed)
    )
    shell = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return shell.substitute(title=escape(title), headline=escape(headline), body=contents + body)


def note(text: str) -> str:
    """A paragraph of less weight."""
    return f'<p class="note">{escape(text)}</p>'


def scrolled(content: str, label: str) -> str:
    """HTML that may be wider than the page, in a box that scrolls; ``label`` names it."""
    return f'<div class="wide" role="group" aria-label="{escape(label)}">{content}</div>'


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
