"""Weight files that stay open: read past the page cache, and notice when they are not the files they were.

Knows nothing of experts, slots or threads of its own; any thread may read."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import threading
import weakref
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np

from ..config import MixtralError

# What direct reads must be a multiple of, on any disk.
SECTOR = 4096
_BOUNCE_BYTES = 1 << 20
# A page in every so many bytes tells whether a file that came back is the one that was loaded.
_SAMPLE_EVERY = 64 << 20
_HINT = "Bring the file back and ask again; if it was changed on purpose, load the model again."


class ExpertsError(MixtralError):
    """Experts that cannot be read from the disk."""


class WeightFile:
    """A file of weights, open for reading.

    After a failed read it is opened anew by the next one, and taken if it is what it was: so is a volume's that was
    away, or a copy's that kept the time of the last change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._opened: _Opened | None = _Opened(path)
        self._identity = self._opened.identity
        self._fingerprint = self._opened.fingerprint()

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`; raises `ExpertsError` naming the file.

        The disk writes into `view` itself where that lies in its page as `offset` lies in its sector."""
        opened = self._trusted()
        try:
            opened.read(view, offset)
            # Looked at after reading: whoever wrote meanwhile has left a mark.
            if opened.has_changed():
                raise ExpertsError(f"{self.path} was changed while in use.", code="file_changed", hint=_HINT)
        except OSError as error:
            self._distrust(opened)
            reason = error.strerror or error
            raise ExpertsError(f"{self.path} cannot be read: {reason}.", code="read_failed", hint=_HINT) from None
        except ExpertsError:
            self._distrust(opened)
            raise

    def _trusted(self) -> _Opened:
        with self._lock:
            if self._opened is None:
                opened = _Opened(self.path)
                try:
                    # Times too: no sample shows that nobody has written anywhere.
                    same = opened.identity == self._identity and opened.fingerprint() == self._fingerprint
                except OSError as error:
                    reason = error.strerror or error
                    raise ExpertsError(
                        f"{self.path} cannot be read: {reason}.", code="read_failed", hint=_HINT
                    ) from None
                if not same:
                    raise ExpertsError(f"{self.path} is not the file that was loaded.", code="file_changed", hint=_HINT)
                self._opened = opened
            return self._opened

    def _distrust(self, opened: _Opened) -> None:
        # Closed when the last thread that reads from it lets go.
        with self._lock:
            if self._opened is opened:
                self._opened = None


class _Opened:
    """A file as it was when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Not blocking, so that a pipe in a file's place cannot hang anybody.
            self.plain = FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            code = "missing_file" if isinstance(error, FileNotFoundError) else "read_failed"
            raise ExpertsError(f"{path} cannot be opened: {error.strerror}.", code=code, hint=_HINT) from None
        # By hand, since a file that goes without being closed is warned about.
        weakref.finalize(self, self.plain.close)
        self.direct: FileIO | None = None
        if hasattr(os, "O_DIRECT"):
            # The page cache would hold a second copy of what is in slots, and is charged to us in a container.
            with suppress(OSError):
                self.direct = FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
                weakref.finalize(self, self.direct.close)
        elif hasattr(fcntl, "F_NOCACHE"):
            fcntl.fcntl(self.plain, fcntl.F_NOCACHE, 1)
        self.identity = self._identity()

    def has_changed(self) -> bool:
        return self._identity() != self.identity

    def _identity(self) -> tuple[int, int]:
        """What changes when somebody writes to the file."""
        status = os.fstat(self.plain.fileno())
        return status.st_size, status.st_mtime_ns

    def fingerprint(self) -> bytes:
        """A hash of the file's size, its first bytes (the header begins there) and pages all over it."""
        size = self.identity[0]
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for offset in range(0, size, _SAMPLE_EVERY):
            digest.update(os.pread(self.plain.fileno(), SECTOR, offset))
        self._forget(0, size)
        return digest.digest()

    def read(self, view: memoryview, offset: int) -> None:
        if self.direct is None:
            self._fill(self.plain, view, offset, view.nbytes)
            self._forget(offset, view.nbytes)
        elif (_address(view) - offset) % SECTOR:
            self._by_way_of_a_buffer(self.direct, view, offset)
        else:
            # The sectors that lie wholly in `view` go straight there.
            begin = min(-offset % SECTOR, view.nbytes)
            end = begin + (view.nbytes - begin) // SECTOR * SECTOR
            self._by_way_of_a_buffer(self.direct, view[:begin], offset)
            self._fill(self.direct, view[begin:end], offset + begin, end - begin)
            self._by_way_of_a_buffer(self.direct, view[end:], offset + end)

    def _by_way_of_a_buffer(self, file: FileIO, view: memoryview, offset: int) -> None:
        if not view:
            return
        size = min(_BOUNCE_BYTES, view.nbytes + 2 * SECTOR) // SECTOR * SECTOR
        # Not closed by hand, which an error that still refers to its pages would turn into another error.
        pages = memoryview(mmap.mmap(-1, size))
        while view:
            skip = offset % SECTOR
            count = min(view.nbytes, size - skip)
            whole = -(-(skip + count) // SECTOR) * SECTOR
            self._fill(file, pages[:whole], offset - skip, skip + count)
            view[:count] = pages[skip : skip + count]
            view, offset = view[count:], offset + count

    def _fill(self, file: FileIO, view: memoryview, offset: int, needed: int) -> None:
        """At least the first `needed` bytes of `view`: a direct read may ask for more than the file has."""
        done = 0
        while done < needed:
            count = os.preadv(file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise ExpertsError(f"{self.path} is shorter than it was.", code="file_changed", hint=_HINT)
            done += count
            if done % SECTOR:  # Where a file ends, or a read came back early: no place for another direct one.
                file = self.plain

    def _forget(self, offset: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.plain.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)
