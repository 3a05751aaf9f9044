"""Lines on stderr that wait for nobody: where they are not read, they are lost rather than hold up the server."""

from __future__ import annotations

import queue
import sys
import threading
from contextlib import suppress

from ..terminal import clean

_MOST_LINES = 1000


class Log:
    """Writes lines on a thread of its own; a `quiet` one writes only what went wrong."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._lines: queue.Queue[str] = queue.Queue(_MOST_LINES)
        threading.Thread(target=self._write, name="mixtral-log", daemon=True).start()

    def say(self, line: str) -> None:
        """Write a line, unless quiet."""
        if not self.quiet:
            self.complain(line)

    def complain(self, line: str) -> None:
        """Write a line."""
        with suppress(queue.Full):
            self._lines.put_nowait(line)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            with suppress(OSError, ValueError):  # Nobody reads any more.
                print(clean(line), file=sys.stderr, flush=True)
