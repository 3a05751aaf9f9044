"""How fast the disk reads a model's files past the page cache, in parallel: python benchmarks/disk.py FILE..."""

from __future__ import annotations

import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from pathlib import Path

_PART_BYTES = 8 << 20
_STRETCH = 12
_READERS = 8
_SAMPLE_BYTES = 2 * 10**9


class Reading:
    """Threads that read `files` past the page cache for as long as it is entered, into memory that is in use.

    As experts lie: about 100 MB at a stretch, in parts of 8 MiB, several at a time."""

    def __init__(self, files: Sequence[Path], seed: int | None = None) -> None:
        self._read = [0] * _READERS
        self._lock = threading.Lock()
        self._places = _places(files, random.Random(seed))
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(_READERS)]

    def __enter__(self) -> Reading:
        for thread in self._threads:
            thread.start()
        while not all(self._read):  # The first read of each is also the first touch of its memory.
            self._end.wait(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self._places.close()

    @property
    def nbytes(self) -> int:
        """Bytes read so far."""
        return sum(self._read)

    def _work(self, number: int) -> None:
        with mmap.mmap(-1, _PART_BYTES) as part:
            while not self._end.is_set():
                with self._lock:
                    descriptor, at = next(self._places)
                self._read[number] += os.preadv(descriptor, [part], at)


def _places(files: Sequence[Path], draw: random.Random) -> Generator[tuple[int, int], None, None]:
    """Descriptors and offsets: stretch after stretch at random places, each part by part."""
    large = [file for file in files if file.stat().st_size >= _STRETCH * _PART_BYTES]
    if not large:
        raise ValueError(f"no file of {_STRETCH * _PART_BYTES:,} bytes or more to measure the disk with")
    with ExitStack() as opened:
        stretches = []
        for file in large:
            descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
            opened.callback(os.close, descriptor)
            stretches += [(descriptor, n) for n in range(file.stat().st_size // (_STRETCH * _PART_BYTES))]
        while True:
            descriptor, number = draw.choice(stretches)
            for part in range(_STRETCH):
                yield descriptor, (number * _STRETCH + part) * _PART_BYTES


def parallel_read_speed(files: Sequence[Path], seed: int | None = None) -> float:
    """Bytes per second of 2 GB read at random places of `files`."""
    with Reading(files, seed) as reading:
        begun, start = reading.nbytes, time.perf_counter()
        while reading.nbytes - begun < _SAMPLE_BYTES:
            time.sleep(0.005)
        return (reading.nbytes - begun) / (time.perf_counter() - start)


def forget(files: Sequence[Path]) -> None:
    """Have the page cache drop these files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # Pages not yet written stay.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    print(f"{parallel_read_speed([Path(name) for name in sys.argv[1:]]) / 1e9:.2f} GB/s")
