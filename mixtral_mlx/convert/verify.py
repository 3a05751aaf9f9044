"""Check a converted folder offline: every file is there, whole, and bit for bit what the conversion wrote."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config import exists
from ..weights import Checkpoint, Progress
from .manifest import MANIFEST, Sum, read_manifest, sums_of
from .names import ConvertError

_KNOWN = ("*.safetensors", "*.json", "*.model")
"""What a folder is loaded from: a file of these forms that no conversion wrote may change what the model says."""
_SHOWN = 8


@dataclass(frozen=True)
class Verified:
    """What was checked."""

    files: int
    nbytes: int
    seconds: float


def verify(
    folder: Path,
    *,
    on_progress: Progress = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Verified:
    """Check `folder` against its manifest; raises `ConvertError` naming every file that is not as it should be."""
    start = time.perf_counter()
    expected = read_manifest(folder)
    found = sums_of((folder / name for name in expected if exists(folder / name)), on_progress, cancelled)
    if wrong := [*_missing_or_damaged(expected, found), *_extra(folder, expected)]:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ConvertError(
            f"{folder} is damaged: {'; '.join(wrong[:_SHOWN])}{more}.", code="damaged", hint="Convert it again."
        )
    Checkpoint.open(folder)
    return Verified(len(expected), sum(entry.nbytes for entry in expected.values()), time.perf_counter() - start)


def _missing_or_damaged(expected: dict[str, Sum], found: dict[str, Sum]) -> Iterator[str]:
    for name, entry in expected.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name].nbytes != entry.nbytes:
            yield f"{name} is {found[name].nbytes:,} bytes, the manifest says {entry.nbytes:,}"
        elif found[name] != entry:
            yield f"{name} is not what was written"


def _extra(folder: Path, expected: dict[str, Sum]) -> Iterator[str]:
    there = {path.name for pattern in _KNOWN for path in folder.glob(pattern)}
    yield from (f"{name} is not in the manifest" for name in sorted(there - expected.keys() - {MANIFEST}))
