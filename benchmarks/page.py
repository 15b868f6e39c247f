"""The page that every report is: one HTML file that needs nothing else, light or dark as its reader likes."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template


def page(title: str, headline: str, sections: Iterable[tuple[str, str]]) -> str:
    """HTML of a page with a section for each pair of a heading and its HTML; ``title`` and ``headline`` are text."""
    body = "".join(f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections)
    shell = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return shell.substitute(title=escape(title), headline=escape(headline), body=body)
