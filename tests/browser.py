"""A headless Chromium, and pages in it of which every request and every error is noted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

NO_BROWSER = "VITEXPLAIN_NO_BROWSER"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@dataclass
class Opened:
    """A page and what went wrong or out while it was used."""

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@contextmanager
def launched() -> Iterator[Any]:
    """Debian's Chromium; where there is none the tests fail, unless they were told that."""
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if os.environ.get(NO_BROWSER) == "1":
        pytest.skip(f"{NO_BROWSER}=1: no test in a browser")
    if found is None:
        pytest.fail(f"none of {', '.join(BROWSERS)} is installed; set {NO_BROWSER}=1 to skip the tests that need one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield browser
        browser.close()


def watched(context: Any) -> Opened:
    """A new page of a browser's context."""
    opened = Opened(context.new_page())
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.on("console", lambda message: opened.errors.append(message.text) if message.type == "error" else None)
    opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
    return opened
