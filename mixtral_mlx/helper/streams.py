"""The three standard streams, protected: lines in, lines out and log lines.

What the parent sends is read and what it is sent is written through copies of the descriptors that nothing else knows.
Reading, writing and logging each have a thread, because a parent that does not read can hold any of them up."""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_READ_BYTES = 1 << 16
_MOST_QUEUED_BYTES = 1 << 20
_WRITE_BYTES = 1 << 16
_MOST_LOG_BYTES = 1 << 18
_MOST_LOG_LINE = 4096


@dataclass(frozen=True)
class Descriptors:
    """Where the parent writes, where it reads, and where the log goes."""

    lines_in: int
    lines_out: int
    log: int


def take_over() -> Descriptors:
    """Take the standard streams away from everybody else, C libraries and child processes included.

    From here on stdin is empty and stdout is stderr."""
    sys.stdout.flush()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        if not _is_open(descriptor):  # A parent has closed it; the next file opened would take its place.
            os.dup2(nothing, descriptor)
    mine = Descriptors(os.dup(0), os.dup(1), os.dup(2))
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return mine


class TooLong:
    """Stands for a line that was longer than is taken."""


def lines(descriptor: int, most_bytes: int) -> Iterator[bytes | TooLong]:
    """The lines that arrive, without their ends and without empty ones; ends when the other side has closed.

    What is left without a line end is no line."""
    begun, is_skipping = bytearray(), False
    while data := _read(descriptor):
        *ended, rest = data.split(b"\n")
        for part in ended:
            begun += part
            line, begun = bytes(begun).rstrip(b"\r"), bytearray()
            if is_skipping:
                is_skipping = False
            elif len(line) > most_bytes:
                yield TooLong()
            elif line:
                yield line
        begun += rest
        if len(begun) > most_bytes and not is_skipping:
            yield TooLong()
            is_skipping = True
        if is_skipping:
            begun.clear()


def is_hung_up(descriptor: int) -> bool:
    """Whether the other side has closed, though what it wrote before may not have been read."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))


class Writer:
    """Writes lines in their order on a thread of its own. `on_closed` is called there when nobody reads any more."""

    def __init__(self, descriptor: int, on_closed: Callable[[], object]) -> None:
        self.is_closed = False
        self._descriptor = descriptor
        self._on_closed = on_closed
        self._queue: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._queued_bytes = 0
        self._on_room: Callable[[], object] | None = None
        threading.Thread(target=self._write, name="helper-writer", daemon=True).start()

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be read that nothing more should be put."""
        return self._queued_bytes >= _MOST_QUEUED_BYTES and not self.is_closed

    def has_room(self, on_room: Callable[[], object]) -> bool:
        """Whether a line may be put; if not, `on_room` is called once, on another thread, when one may."""
        with self._changed:
            if self.is_full:
                self._on_room = on_room
            return not self.is_full

    def put(self, line: bytes) -> None:
        """Have a line written, once those before it are. Never waits; to be asked for room is the caller's business."""
        with self._changed:
            if not self.is_closed:
                self._queue.append(line)
                self._queued_bytes += len(line)
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is written, no longer than `timeout_s`; whether it was."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_closed or not self._queued_bytes, timeout_s)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                data = bytearray()
                while self._queue and len(data) < _WRITE_BYTES:
                    data += self._queue.popleft()
            try:
                _write_all(self._descriptor, data)
            except OSError:
                self._close()
                return
            self._written(len(data))

    def _written(self, count: int) -> None:
        with self._changed:
            self._queued_bytes -= count
            on_room = None
            if self._queued_bytes <= _MOST_QUEUED_BYTES // 2:
                on_room, self._on_room = self._on_room, None
            self._changed.notify_all()
        if on_room:
            on_room()

    def _close(self) -> None:
        with self._changed:
            self.is_closed = True
            self._queue.clear()
            on_room, self._on_room = self._on_room, None
            self._changed.notify_all()
        if on_room:
            on_room()
        self._on_closed()


class Log(logging.Handler):
    """Log lines on their way to stderr. Where the parent does not read them they are dropped, and counted."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.dropped = 0
        self._descriptor = descriptor
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._unsaid = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._write, name="helper-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """For `logging`."""
        self.put(self.format(record))

    def put(self, text: str) -> None:
        """Log a line, if there is room. Never waits."""
        line = text.replace("\n", "\n  ").encode(errors="backslashreplace")[:_MOST_LOG_LINE] + b"\n"
        with self._changed:
            if self._queued_bytes + len(line) > _MOST_LOG_BYTES:
                self.dropped += 1
                self._unsaid += 1
                return
            if self._unsaid:
                line = b"(%d lines of log were not read in time and are left out)\n" % self._unsaid + line
                self._unsaid = 0
            self._queue.append(line)
            self._queued_bytes += len(line)
            self._changed.notify_all()

    def finish(self, timeout_s: float) -> None:
        """Wait until all is written, no longer than `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queued_bytes, timeout_s)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                line = self._queue.popleft()
            try:
                _write_all(self._descriptor, line)
            except OSError:  # Nobody reads the log: then there is none.
                self.dropped += 1
            with self._changed:
                self._queued_bytes -= len(line)
                self._changed.notify_all()


class LogFile(io.TextIOBase):
    """What stands in for `sys.stdout` and `sys.stderr`: whatever is printed is logged, line by line."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log
        self._begun = ""

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Log the lines that end in `text`; the rest waits for its end."""
        *ended, rest = (self._begun + text).split("\n")
        self._begun = rest[-_MOST_LOG_LINE:]
        for line in ended:
            self._log.put(line)
        return len(text)


def _read(descriptor: int) -> bytes:
    while True:
        try:
            return os.read(descriptor, _READ_BYTES)
        except BlockingIOError:  # The parent has made its end, and so ours, non-blocking.
            select.select([descriptor], [], [])
        except OSError:
            return b""


def _write_all(descriptor: int, data: bytes | bytearray) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
            time.sleep(0)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
