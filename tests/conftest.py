"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from .chromium import MISSING, chromium, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser

if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a worker for each core already: two threads in each would wait for one another.
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so, and tests of Ctrl-C would wait for it forever.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    pytest.importorskip("playwright.sync_api", reason="`make test-page` installs it")
    if not chromium():
        pytest.fail(MISSING)
    with running() as browser:
        yield browser
