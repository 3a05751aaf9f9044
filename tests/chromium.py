"""Where a Chromium is. As a program: say so, or how to get one."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

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


if __name__ == "__main__":
    sys.exit(0 if chromium() else MISSING)
