"""How kernels are compiled, and where what was compiled is kept.

Numba notices a change of the file a kernel is in, not of what it calls, and cannot read what an older version of this
package has kept. So each state of these sources has a folder of its own, in the user's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba
import platformdirs

compiled = numba.njit(nogil=True, boundscheck=False, fastmath={"nsz"})
"""For what kernels call. The order of sums is as written: a compiler that may choose it chooses another one for code
that is kept than for code that runs right after it was compiled."""

inlined = numba.njit(inline="always")
"""For what kernels call with numbers that are known: those make straight code."""


def entry(function: Callable[..., Any]) -> Any:
    """For a kernel that Python calls: compiled at its first call, on this machine once, and run on several threads.

    It takes arrays, numbers and plain tuples."""
    with _kept_in(folder()):
        return numba.njit(nogil=True, boundscheck=False, parallel=True, cache=True)(function)


def serial_entry(function: Callable[..., Any]) -> Any:
    """Like `entry`, for work too small to share."""
    with _kept_in(folder()):
        return numba.njit(nogil=True, boundscheck=False, cache=True)(function)


@cache
def folder() -> Path:
    """Where what these sources were compiled to is kept."""
    sources = hashlib.sha256(numba.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(file.read_bytes())
    return Path(platformdirs.user_cache_dir("mixtral-mlx")) / "kernels" / sources.hexdigest()[:16]


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Have numba keep what is decorated meanwhile in `folder`, or where it likes if that cannot be written."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
