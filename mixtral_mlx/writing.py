"""Files that appear whole or not at all: written beside, brought to the disk, then given their name."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from .config import MixtralError


class WriteError(MixtralError):
    """A file that a person asked for cannot be written."""


def check_writable(path: Path) -> None:
    """Raise `WriteError` now, rather than after the work, if `path` cannot be written."""
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        found = "is a folder" if path.is_dir() else "is in no folder that can be written to"
        raise WriteError(f"{path} {found}, expected a file to write.", code="write_failed")


def write_output(path: Path, data: bytes | str) -> None:
    """`write_whole` for a file that a person asked for; raises `WriteError`."""
    try:
        write_whole(path, data)
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror}.", code="write_failed") from None


def write_whole(path: Path, data: bytes | str, *, mode: int = 0o666) -> None:
    """Write `data`, text as UTF-8, in place of whatever file has this name; `mode` is cut by the process's umask.

    Raises OSError, with `path` as it was and nothing beside it."""
    content = data.encode() if isinstance(data, str) else data
    # No other file can have this name: one that did would be an error, and stay as it is.
    beside = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.partial")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
