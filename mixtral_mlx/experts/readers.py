"""Threads that read experts from the disk, part by part: what is waited for first, then what is guessed.

An expert is cut into parts, so that even a single one keeps every thread, and so the disk, busy. Which expert goes
where is left to others."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from .files import SECTOR, WeightFile

_THREADS = 8
PART_BYTES = 8 << 20

Convert = Callable[[memoryview, memoryview], None]
"""`convert(stored, view)`: from the dtype in the file to that in memory."""


class Piece(NamedTuple):
    """A stretch of a file and where in memory it goes; through `convert`, if it is stored in another dtype."""

    file: WeightFile
    offset: int
    nbytes: int
    view: memoryview
    convert: Convert | None = None


class Load:
    """The reading of one expert. `error` is what went wrong, if it did.

    `is_done` says that nothing more will be written to its memory; it may have failed. It is set last of all, so that
    it may be read without the lock of the `Readers`, to whom the rest belongs."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.waiting = deque(part for piece in pieces for part in _parts(piece))
        self.nbytes = sum(piece.nbytes for piece in pieces)
        self.bytes_read = 0
        self.reading = 0
        self.error: Exception | None = None
        self.is_done = False

    @property
    def is_untouched(self) -> bool:
        """Whether no part of it has been begun."""
        return self.bytes_read == 0 and self.reading == 0


def _parts(piece: Piece) -> list[Piece]:
    if piece.convert or piece.nbytes <= PART_BYTES:
        return [piece]
    # Cut at sectors, so that only the ends of a piece are ever less than one.
    cuts = [0, *range(PART_BYTES - piece.offset % SECTOR, piece.nbytes, PART_BYTES), piece.nbytes]
    return [
        Piece(piece.file, piece.offset + begin, end - begin, piece.view[begin:end]) for begin, end in pairwise(cuts)
    ]


class Readers:
    """A few threads with two queues. One thread starts, finishes and cancels loads; the others read."""

    def __init__(self, threads: int = _THREADS) -> None:
        self.bytes_read = 0
        self._busy_s = 0.0
        self._changed = threading.Condition()
        self._urgent: deque[Load] = deque()
        self._ahead: deque[Load] = deque()
        self._active = 0
        self._since = 0.0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"expert-reader-{n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def busy_s(self) -> float:
        """Seconds in which something was being read."""
        with self._changed:
            return self._busy_s + (time.perf_counter() - self._since if self._active else 0)

    def start(self, load: Load, *, ahead: bool = False) -> None:
        """Queue a load: behind those that are waited for, and `ahead` behind all."""
        with self._changed:
            (self._ahead if ahead else self._urgent).append(load)
            self._changed.notify_all()

    def hurry(self, load: Load) -> None:
        """A guess has come true: its load is waited for now."""
        with self._changed:
            if load in self._ahead:
                self._ahead.remove(load)
                self._urgent.append(load)

    def cancel(self, load: Load) -> None:
        """Begin no further part of a load. Its memory is free once it `is_done`."""
        with self._changed:
            self._drop(load)
            load.is_done = load.reading == 0

    def first_done(self, loads: Sequence[Load]) -> None:
        """Wait until one of `loads` is done."""
        with self._changed:
            self._changed.wait_for(lambda: any(load.is_done for load in loads))

    @property
    def queued_bytes(self) -> int:
        """Bytes of the loads that no thread has begun."""
        with self._changed:
            return sum(part.nbytes for queue in (self._urgent, self._ahead) for load in queue for part in load.waiting)

    def close(self) -> None:
        """End the threads, when what they are reading is read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # Garbage is collected on any thread: on one of ours, which may hold the lock, the others are not waited for.
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()

    def _work(self) -> None:
        while self._read_next():
            pass

    def _read_next(self) -> bool:
        """Read a part when there is one, and remember nothing of it after; False when closed."""
        taken = self._take()
        if taken is None:
            return False
        load, part = taken
        error = None
        try:
            _read(part)
        except Exception as raised:  # Whatever it is, it belongs to who waits.
            error = raised
        self._read_one(load, part, error)
        return True

    def _take(self) -> tuple[Load, Piece] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._urgent or self._ahead)
            if self._closed:
                return None
            queue = self._urgent or self._ahead
            load = queue[0]
            part = load.waiting.popleft()
            load.reading += 1
            if not load.waiting:
                queue.popleft()
            if self._active == 0:
                self._since = time.perf_counter()
            self._active += 1
            return load, part

    def _read_one(self, load: Load, part: Piece, error: Exception | None) -> None:
        with self._changed:
            self._active -= 1
            if self._active == 0:
                self._busy_s += time.perf_counter() - self._since
            load.reading -= 1
            load.bytes_read += part.nbytes
            self.bytes_read += part.nbytes
            if error:
                load.error = load.error or error
                self._drop(load)
            if load.reading == 0 and not load.waiting:
                load.is_done = True
                self._changed.notify_all()

    def _drop(self, load: Load) -> None:
        """Begin no further part of it. With the lock held."""
        load.waiting.clear()
        for queue in (self._ahead, self._urgent):
            if load in queue:
                queue.remove(load)


def _read(part: Piece) -> None:
    if part.convert is None:
        part.file.read(part.view, part.offset)
        return
    stored = memoryview(bytearray(part.nbytes))
    part.file.read(stored, part.offset)
    part.convert(stored, part.view)
