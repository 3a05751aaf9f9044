"""manifest.json, the record a conversion leaves beside the weights: what they were made of, and the hash of every file.

Writes it, reads it back with a check of its own, and hashes files. What follows from a difference is left to others."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import exists, read_json, shown
from ..weights import Progress, opened_file
from .names import ConvertError

MANIFEST = "manifest.json"
_BLOCK = 4 << 20
_HASHERS = 2


@dataclass(frozen=True)
class Sum:
    """Bytes of a file and their SHA-256."""

    nbytes: int
    sha256: str


def write_manifest(folder: Path, facts: Mapping[str, Any], sums: Mapping[str, Sum]) -> None:
    """Write `facts` and the sums of the folder's files."""
    files = {name: {"bytes": entry.nbytes, "sha256": entry.sha256} for name, entry in sorted(sums.items())}
    manifest = {"format": 1, **facts, "files": files}
    manifest["sha256"] = _of_itself(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def read_manifest(folder: Path) -> dict[str, Sum]:
    """The sums a folder's manifest holds; raises `ConvertError` if there is none or it is damaged."""
    if not exists(folder):
        raise ConvertError(f"There is no folder {folder}.", code="no_model")
    if not exists(folder / MANIFEST):
        raise ConvertError(
            f"{folder} has no {MANIFEST}.",
            code="no_manifest",
            hint="Only folders written by `convert` can be verified.",
        )
    manifest = read_json(folder / MANIFEST, hint="Convert it again.")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if (
        not isinstance(files, dict)
        or not all(_is_entry(*item) for item in files.items())
        or manifest.pop("sha256", None) != _of_itself(manifest)
    ):
        raise ConvertError(
            f"{folder / MANIFEST} is damaged, it holds {shown(files)}.", code="damaged", hint="Convert it again."
        )
    return {name: Sum(entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def _of_itself(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_entry(name: str, entry: Any) -> bool:
    plain = Path(name).name == name and name not in ("", ".", "..")
    return plain and isinstance(entry, dict) and type(entry.get("bytes")) is int and type(entry.get("sha256")) is str


def sums_of(paths: Iterable[Path], on_progress: Progress, cancelled: Callable[[], bool]) -> dict[str, Sum]:
    """File name → its sum, two files at a time; raises `MixtralError`."""
    paths = list(paths)
    hasher = _Hasher(sum(path.stat().st_size for path in paths), on_progress, cancelled)
    with ThreadPoolExecutor(_HASHERS) as pool:
        return dict(zip((path.name for path in paths), pool.map(hasher.of, paths), strict=True))


class _Hasher:
    """Hashes files, with one progress for all of them."""

    def __init__(self, total: int, on_progress: Progress, cancelled: Callable[[], bool]) -> None:
        self.total, self.done = total, 0
        self.on_progress = on_progress
        self.cancelled = cancelled
        self.lock = threading.Lock()

    def of(self, path: Path) -> Sum:
        digest, size = hashlib.sha256(), 0
        block = memoryview(bytearray(_BLOCK))
        with opened_file(path) as fd, open(fd, "rb", buffering=0, closefd=False) as file:
            while count := file.readinto(block):
                digest.update(block[:count])
                size += count
                self._report(count)
        return Sum(size, digest.hexdigest())

    def _report(self, count: int) -> None:
        if self.cancelled():
            raise ConvertError("Checking was cancelled.", code="cancelled")
        with self.lock:
            self.done += count
            self.on_progress(self.done, self.total)
