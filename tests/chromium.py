"""A Chromium to try pages in. As a program: say that there is one, or how to get it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ON_A_MAC = "/Applications/{0}.app/Contents/MacOS/{0}"

MISSING = """The page is tried in a Chromium, and none was found.
Debian and Ubuntu: apt-get install chromium. macOS: brew install --cask chromium; Google Chrome does as well.
CHROMIUM=PROGRAM names one that lies elsewhere."""


def chromium() -> str | None:
    """The program: what CHROMIUM says, else one on the PATH, else a macOS application."""
    on_a_mac = [ON_A_MAC.format(name) for name in ("Chromium", "Google Chrome")]
    places = [
        os.environ.get("CHROMIUM"),
        *map(shutil.which, PROGRAMS),
        *(app for app in on_a_mac if Path(app).exists()),
    ]
    return next(filter(None, places), None)


@contextmanager
def running() -> Iterator[Browser]:
    """One that runs, and waits ten seconds for what is expected of a page."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=10_000)
    with sync_playwright() as playwright:
        # Root, as in a container, has no sandbox.
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium(), args=sandbox)
        yield browser
        browser.close()


def expect(what: Locator | Page) -> Any:
    """Playwright's `expect`, imported only where a page is tried."""
    from playwright.sync_api import expect

    return expect(what)


if __name__ == "__main__":
    sys.exit(0 if chromium() else MISSING)
