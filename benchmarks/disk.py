"""How fast the disk reads a model's files past the page cache, in parallel: python benchmarks/disk.py FILE..."""

from __future__ import annotations

import mmap
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

_PART_BYTES = 16 << 20
_READERS = 8
_SAMPLE_BYTES = 2 * 10**9


def parallel_read_speed(files: Sequence[Path], seed: int | None = None) -> float:
    """Bytes per second of reads of 16 MiB, eight at a time, at random places of `files`."""
    places = [(file, at) for file in files for at in range(0, file.stat().st_size - _PART_BYTES + 1, _PART_BYTES)]
    if not places:
        raise ValueError(f"no file of {_PART_BYTES} bytes or more to measure the disk with")
    count = min(_SAMPLE_BYTES // _PART_BYTES, len(places))
    chosen = random.Random(seed).sample(places, count)
    start = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as readers:
        read = sum(readers.map(_read, chosen))
    return read / (time.perf_counter() - start)


def _read(place: tuple[Path, int]) -> int:
    file, at = place
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, _PART_BYTES) as part:  # Anonymous maps begin on a page, as direct reads want it.
            return os.preadv(descriptor, [part], at)
    finally:
        os.close(descriptor)


def read_at_random(files: Sequence[Path], draw: random.Random) -> Iterator[int]:
    """Read 16 MiB at random places for as long as somebody asks for the number of bytes."""
    with ExitStack() as opened, mmap.mmap(-1, _PART_BYTES) as part:
        descriptors = []
        for file in files:
            descriptors.append((os.open(file, os.O_RDONLY | os.O_DIRECT), file.stat().st_size // _PART_BYTES))
            opened.callback(os.close, descriptors[-1][0])
        large = [(descriptor, parts) for descriptor, parts in descriptors if parts]
        while True:
            descriptor, parts = draw.choice(large)
            yield os.preadv(descriptor, [part], draw.randrange(parts) * _PART_BYTES)


def forget(files: Sequence[Path]) -> None:
    """Have the page cache drop these files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # Pages not yet written stay.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    print(f"{parallel_read_speed([Path(name) for name in sys.argv[1:]]) / 1e9:.2f} GB/s")
