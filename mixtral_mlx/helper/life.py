"""How the process ends in time: whose parent it is watched, and a clock that nothing can hold up."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from contextlib import suppress

END_WITHIN_S = 2.0
"""Seconds from the wish to end until the process is gone, whatever it is doing."""
_LAST_RESORT_S = 2.3


class Parent:
    """The process that this one is there for: the one that started it, or another named by its id."""

    def __init__(self, pid: int | None = None) -> None:
        self._first = os.getppid()
        self._is_direct = pid in (None, self._first)
        self._pid = pid or self._first
        self._watched = None if self._is_direct else end_of(self._pid)

    def is_gone(self) -> bool:
        """Whether it has ended. A direct parent has when another took its place, also while nobody has reaped it."""
        if self._is_direct:
            return os.getppid() != self._first
        if self._watched is None:
            return not _exists(self._pid)
        return bool(select.select([self._watched], [], [], 0)[0])


def end_of(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where there is none such, or no such process."""
    with suppress(OSError):
        if hasattr(os, "pidfd_open"):
            return os.pidfd_open(pid)
        if sys.platform == "darwin":
            queue = select.kqueue()
            ends = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
            queue.control([ends], 0)
            _kept.append(queue)
            return queue.fileno()
    return None


_kept: list[object] = []
"""What would close a descriptor in use when it is collected."""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end_in_time() -> None:
    """Have the process end within `END_WITHIN_S`, however long what it does takes.

    A thread ends it; should something hold Python's lock for so long, the kernel does, by SIGALRM."""
    clock = threading.Timer(END_WITHIN_S, os._exit, [0])
    clock.daemon = True
    clock.start()
    signal.setitimer(signal.ITIMER_REAL, _LAST_RESORT_S)
