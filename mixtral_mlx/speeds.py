"""How fast this machine's SSD, memory and processor are: measured and kept, or assumed by the kind of Mac.

Measuring reads a real file past the page cache, in parallel as streaming does. What follows is `budget`'s business."""

from __future__ import annotations

import json
import math
import mmap
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from .budget import Speeds, in_gb
from .config import MixtralError, read_json
from .memory import Machine
from .writing import write_whole

_READERS = 8
_PART_BYTES = 8 << 20
_MOST_BYTES = 8 << 30
_MOST_SECONDS = 4.0
_FILE_BYTES = 2 << 30
_LEAST_FILE_BYTES = 256 << 20
"""A smaller file is read in too short a time to be measured."""


class SpeedError(MixtralError):
    """A measurement that could not be made."""


@dataclass(frozen=True)
class Kind:
    """A kind of machine and what is assumed of it; a Mac of unknown chip is of the first kind that has so much RAM."""

    name: str
    most_gb: float
    speeds: Speeds


# One set of assumptions, on the careful side of what is published: the memory is an M3's of each class, SSDs read 2.4
# to 14 GB/s, operations are those of half-precision products on the GPU.
MACS = (
    Kind("a Mac with a base chip", 24, Speeds(3.0e9, 100e9, 6e12)),
    Kind("a Mac with a Pro chip", 36, Speeds(5.0e9, 150e9, 11e12)),
    Kind("a Mac with a Max chip", 128, Speeds(6.0e9, 400e9, 25e12)),
    Kind("a Mac with an Ultra chip", math.inf, Speeds(6.0e9, 800e9, 50e12)),
)
PC = Kind("a PC without a GPU", math.inf, Speeds(2.0e9, 20e9, 0.4e12))


def assumed(machine: Machine) -> Kind:
    """What is assumed of a machine: a Mac by its chip's name, or by its RAM where only that is known."""
    if not machine.chip.startswith("Apple"):
        return PC
    if machine.chip == "Apple":
        return next(kind for kind in MACS if machine.ram_bytes <= kind.most_gb * 2**30)
    return next((kind for kind in MACS[1:] if f" {machine.chip.split()[-1]} " in kind.name), MACS[0])


# What was measured is kept for later plans.


def kept(chip: str, file: Path | None = None) -> Speeds | None:
    """What was measured on this machine earlier; None if nothing was, or on a machine with another processor."""
    try:
        entry = read_json(file or _kept_file())
        if not isinstance(entry, dict) or entry.pop("chip") != chip:
            return None
        speeds = {name: float(entry[name]) for name in _KEPT}
    except (MixtralError, KeyError, TypeError, ValueError):
        return None  # Not there, or from another version; measuring again mends it.
    return Speeds(**speeds, source="measured") if all(0 < v < math.inf for v in speeds.values()) else None


def keep(speeds: Speeds, chip: str, file: Path | None = None) -> Path:
    """Write what was measured where `kept` finds it; returns where. Raises `SpeedError`."""
    file = file or _kept_file()
    entry = {"chip": chip, **{name: asdict(speeds)[name] for name in _KEPT}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(entry))
    except OSError as error:
        raise SpeedError(f"{file} cannot be written: {error.strerror}.", code="write_failed") from None
    return file


_KEPT = ("ssd_bytes_per_s", "memory_bytes_per_s", "operations_per_s")


def _kept_file() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("mixtral-mlx") / "speeds.json"


# Measuring.


def measure(dtype: str, folder: Path | None, *, stopped: Callable[[], bool]) -> Speeds:
    """Measure on the largest file of weights in `folder`, or known to this machine, or else on one made for it.

    `stopped` is asked between two reads. Raises `SpeedError` and `BenchError`; leaves no file behind."""
    from .bench import limits

    with _file(folder, stopped) as file:
        ssd = read_speed(file, stopped=stopped)
    here = limits.measure(dtype)
    _stop_if(stopped)
    return Speeds(ssd, here.bytes_per_s, here.operations_per_s, "measured")


def read_speed(
    file: IO[bytes],
    *,
    stopped: Callable[[], bool] = lambda: False,
    part_bytes: int = _PART_BYTES,
    most_seconds: float = _MOST_SECONDS,
) -> float:
    """Bytes per second that parallel reads of parts of `file`, in no order, get from the disk and not from memory."""
    number = file.fileno()
    parts = [start * part_bytes for start in range(os.fstat(number).st_size // part_bytes)]
    random.Random(0).shuffle(parts)
    del parts[_MOST_BYTES // part_bytes :]
    _past_the_page_cache(number)
    taken, lock, end = iter(parts), threading.Lock(), time.perf_counter() + most_seconds

    def read() -> int:
        done = 0
        with mmap.mmap(-1, part_bytes) as buffer:  # Anonymous memory begins at a page, as O_DIRECT wants it.
            while time.perf_counter() < end and not stopped():
                with lock:
                    start = next(taken, None)
                if start is None:
                    break
                done += os.preadv(number, [buffer], start)
        return done

    begun = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as pool:
        readers = [pool.submit(read) for _ in range(_READERS)]
        total = sum(reader.result() for reader in readers)
    _stop_if(stopped)
    return total / (time.perf_counter() - begun)


def _past_the_page_cache(number: int) -> None:
    import fcntl

    if hasattr(fcntl, "F_NOCACHE"):
        fcntl.fcntl(number, fcntl.F_NOCACHE, 1)
        return
    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    with suppress(OSError):  # Some file systems have no direct reads; then the advice has to do.
        fcntl.fcntl(number, fcntl.F_SETFL, fcntl.fcntl(number, fcntl.F_GETFL) | os.O_DIRECT)


@contextmanager
def _file(folder: Path | None, stopped: Callable[[], bool]) -> Iterator[IO[bytes]]:
    """The file to read; one that is made for it has no name from the start, so that nothing can leave it behind."""
    if found := _largest(folder):
        with open(found, "rb") as file:
            yield file
        return
    where = _kept_file().parent
    with _unnamed(where) as file:
        free = shutil.disk_usage(where).free
        if free < 2 * _FILE_BYTES:
            raise SpeedError(
                f"{where} has {in_gb(free)} of room; {_WHY_WRITTEN}",
                code="no_room",
                hint="Make room, or give --model FOLDER: then its own files are read.",
            )
        block = os.urandom(16 << 20)
        for _ in range(_FILE_BYTES // len(block)):
            _stop_if(stopped)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        yield file


_WHY_WRITTEN = f"to measure without a model a file of {in_gb(_FILE_BYTES)} is written."


def _unnamed(where: Path) -> IO[bytes]:
    try:
        where.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=where)
    except OSError as error:
        raise SpeedError(
            f"{where} cannot be written to ({error.strerror}); {_WHY_WRITTEN}",
            code="write_failed",
            hint="Give --model FOLDER: then its own files are read.",
        ) from None


def _largest(folder: Path | None) -> Path | None:
    """The largest file of weights that is large enough, in `folder`, else in Hugging Face's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for files in (
        folder.glob("*.safetensors") if folder else (),
        Path(HF_HUB_CACHE).glob("*/snapshots/*/*.safetensors"),
    ):
        sizes: dict[Path, int] = {}
        for file in files:
            with suppress(OSError):
                sizes[file] = file.stat().st_size
        largest = max(sizes, key=sizes.__getitem__, default=None)
        if largest and sizes[largest] >= _LEAST_FILE_BYTES:
            return largest
    return None


def _stop_if(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise SpeedError("Interrupted.", code="cancelled")
