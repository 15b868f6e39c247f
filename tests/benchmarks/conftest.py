"""A real browser, for the pages that edgepress writes; and the peers, which are not shipped, as modules."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edgepress.benchmarks
import pytest

edgepress.benchmarks.__path__.append(str(Path(__file__).parents[2] / "benchmarks"))  # an install may not have the peers


@pytest.fixture(scope="session")
def browser() -> Any:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None and not os.environ.get("EDGEPRESS_REQUIRE_BROWSER"):
        pytest.skip("Chromium is not installed; EDGEPRESS_REQUIRE_BROWSER=1 makes this an error")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any) -> Callable[..., tuple[Any, list[str]]]:
    """Opens a file; returns the page and, in a list that grows, everything it complains of or asks the network for."""

    def open_(path: Path, scheme: str = "light", width: int = 1280) -> tuple[Any, list[str]]:
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
        page.on(
            "request", lambda request: complaints.append(request.url) if not request.url.startswith("file:") else None
        )
        page.goto(path.as_uri())
        return page, complaints

    return open_
