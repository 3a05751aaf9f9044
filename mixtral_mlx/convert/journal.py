"""The work folder of a conversion, `DEST.partial`, and the journal in it that survives being killed at any moment.

A line for each finished piece, with a checksum of the bytes it wrote, and for each source file that is used up. A
piece counts only as long as those bytes are there, so a power cut costs work, never correctness. Removes nothing but
what lies in a folder that has such a journal."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .names import ConvertError

JOURNAL = "journal"
OUTPUT = "output"
SOURCE = "source"
_WORTH_KEEPING_BYTES = 64 << 20
_GO_ON = "Make room, then run the same command again to go on."


class Journal:
    """A work folder taken by this process, and what has been done in it.

    Use as a context: a folder in which nothing was begun is removed at the end, any other is kept for the next try."""

    def __init__(self, work: Path, plan: dict[str, Any]) -> None:
        """Take `work` for `plan`, which says what becomes of what, making it if need be; raises `ConvertError`."""
        self.work = work
        self.lock = threading.Lock()
        self.begun = False
        with disk_errors(work):
            self.fd = _taken(work)
        try:
            with disk_errors(work):
                self._read(plan)
        except BaseException:
            os.close(self.fd)
            raise

    def _read(self, plan: dict[str, Any]) -> None:
        lines = (self.work / JOURNAL).read_bytes().split(b"\n")
        # The last line may have been cut off; what it said is done again.
        entries = [entry for line in lines[:-1] if (entry := _parsed(line)) is not None]
        if entries and entries[0].get("plan") != plan:
            if not self._is_worthless(entries):
                raise ConvertError(
                    f"{self.work} holds an unfinished conversion of another source or to another form.",
                    code="other_conversion",
                    hint="Finish that one with its own options, or remove the folder.",
                )
            entries = []
        if not entries:
            _clear(self.work)
            os.ftruncate(self.fd, 0)
            self._append({"plan": plan})
            # Whose work this is must be known before there is any.
            os.fsync(self.fd)
            fsync(self.work)
        elif lines[-1]:
            os.write(self.fd, b"\n")
        self.sums: dict[str, int] = {entry["done"]: entry["crc"] for entry in entries if "done" in entry}
        self.used: dict[str, list[str]] = {entry["used"]: entry["pieces"] for entry in entries if "used" in entry}
        self.facts: dict[str, Any] = {entry["fact"]: entry["value"] for entry in entries if "fact" in entry}
        self.resumed = bool(self.sums)

    def _is_worthless(self, entries: list[dict[str, Any]]) -> bool:
        """Whether what another conversion left is no loss: nothing converted and next to nothing fetched."""
        return not any("done" in entry for entry in entries) and allocated(self.work / SOURCE) < _WORTH_KEEPING_BYTES

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self.begun and not self.resumed:
                with suppress(OSError):
                    self.remove()
        finally:
            os.close(self.fd)

    def done(self, piece: str, crc: int) -> None:
        """Note that `piece` is written; `crc` is the checksum of its bytes."""
        with self.lock:
            self._append({"done": piece, "crc": crc})
            self.sums[piece] = crc

    def use_up(self, file: str, pieces: Iterable[str]) -> None:
        """Note that all there was in a source file are `pieces`, and that they are written."""
        self.used[file] = list(pieces)
        self._append({"used": file, "pieces": self.used[file]})

    def is_used_up(self, file: str) -> bool:
        """Whether a source file is needed no more."""
        return file in self.used and all(piece in self.sums for piece in self.used[file])

    def note(self, name: str, value: Any) -> Any:
        """Note a fact, durably, unless it is known from an earlier try; returns what is noted."""
        if name not in self.facts:
            self._append({"fact": name, "value": value})
            os.fsync(self.fd)
            self.facts[name] = value
        return self.facts[name]

    def _append(self, entry: dict[str, Any]) -> None:
        with disk_errors(self.work):
            line = memoryview(json.dumps(entry, sort_keys=True).encode() + b"\n")
            while line:
                line = line[os.write(self.fd, line) :]

    def remove(self) -> None:
        """Remove the folder, the journal last: whatever a kill leaves of it still shows whose it is."""
        _clear(self.work)
        (self.work / JOURNAL).unlink()
        with suppress(OSError):  # Another process may have taken it already.
            self.work.rmdir()
        fsync(self.work.parent)


def _taken(work: Path) -> int:
    """The journal's descriptor, locked."""
    if os.path.lexists(work) and not (work / JOURNAL).is_file() and not _is_empty_folder(work):
        raise ConvertError(
            f"{work} is in the way: it is not the work folder of a conversion.",
            code="exists",
            hint="Move it away, or choose another name.",
        )
    work.mkdir(exist_ok=True)
    fd = os.open(work / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have finished and removed it in between.
        if os.fstat(fd).st_nlink:
            return fd
    except BlockingIOError:
        pass
    os.close(fd)
    raise ConvertError(
        f"Another process is converting in {work}.", code="in_use", hint="Let it finish, or stop it."
    ) from None


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _clear(work: Path) -> None:
    """Remove all but the journal."""
    for path in work.iterdir():
        if path.name == JOURNAL:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def checksum(sums: Iterable[int]) -> int:
    """One CRC-32 for several: those of the places a piece was written to, in order."""
    return zlib.crc32(b"".join(crc.to_bytes(4, "little") for crc in sums))


# The disk.


@contextmanager
def disk_errors(folder: Path, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn what a full or failing disk says into an error; `needed` are the bytes that are still to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise no_space(folder, needed() if needed else None) from None
        raise ConvertError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}.",
            code="unwritable",
            hint="Check the folder and the disk, or choose another one.",
        ) from None


def no_space(folder: Path, needed: int | None) -> ConvertError:
    """The error that says what is needed and what is there."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = f"{there} has {shutil.disk_usage(there).free:,} bytes free"
    if needed is None:
        found = f"The disk is full, or a file may not grow further: {free}."
    else:
        found = f"{needed:,} bytes more are needed, {free}."
    return ConvertError(found, code="disk_full", hint=_GO_ON)


def allocated(folder: Path) -> int:
    """Bytes of disk that what lies below `folder` takes; planned files are sparse until they are filled."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # Files come and go meanwhile.
                if entry.is_dir(follow_symlinks=False):
                    total += allocated(Path(entry.path))
                else:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def fsync(path: Path) -> None:
    """Make a file or folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def sync(fd: int) -> None:
    """Make what was written to an open file durable."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # A Mac's fsync leaves it in the drive's own memory.
        with suppress(OSError):  # Not every file system knows it.
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)
