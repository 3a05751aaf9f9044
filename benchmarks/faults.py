"""What a streamed model does when its disk misbehaves: seeded requests while reads fail and files change.

    python benchmarks/faults.py [--runs 200] [--seed 0] [--model FOLDER] [--json]

Each run is a greedy request on a copy of the model, with one or two faults that begin at a random read, in the prompt
or while decoding. It has to give the resident model's tokens until it ends with a coded error that names the file, or
to its end; when the file is back as it was, the same request must give all of them. Open files and threads may not
grow."""

from __future__ import annotations

import argparse
import errno
import gc
import json
import os
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from mixtral_mlx.borrowed import KVCache
from mixtral_mlx.experts import ExpertsError, Streaming
from mixtral_mlx.model import Model
from mixtral_mlx.weights import Loaded, load, locate

_CODES = ("read_failed", "file_changed", "missing_file")
_STEPS = 6
_REQUESTS_PER_LOAD = 20
Read = Callable[[int, list[memoryview], int], int]


class Disk:
    """Stands before `os.preadv`: from read number `start` on, `faults` happen, for `count` reads.

    A fault is called with the read it stands before, and returns what that returns."""

    def __init__(self, faults: list[Callable[[Read, int, list[memoryview], int], int]], start: int, count: int) -> None:
        self.faults, self.start, self.count = faults, start, count
        self.reads = 0
        self.lock = threading.Lock()

    def preadv(self, real: Read, fd: int, views: list[memoryview], offset: int) -> int:
        with self.lock:
            self.reads += 1
            bad = self.start <= self.reads < self.start + self.count
        read = real
        for fault in self.faults if bad else ():
            read = _before(fault, read)
        return read(fd, views, offset)


def _before(fault: Callable[[Read, int, list[memoryview], int], int], read: Read) -> Read:
    return lambda fd, views, offset: fault(read, fd, views, offset)


@contextmanager
def in_place_of_reads(disk: Disk) -> Iterator[None]:
    """Every read of weights goes by `disk`."""
    real: Read = os.preadv
    with patch.object(os, "preadv", lambda fd, views, offset: disk.preadv(real, fd, list(views), offset)):
        yield


def short(chance: random.Random) -> Any:
    """Reads that return a part of what was asked for, by any number of bytes."""

    def fault(read: Read, fd: int, views: list[memoryview], offset: int) -> int:
        count = read(fd, views, offset)
        kept = min(count, chance.choice([1, count // 2 + 1, max(count - 4096, 1), count]))
        views[0][kept:count] = bytes(count - kept)
        return kept

    return fault


def failing(number: int) -> Any:
    """Reads that fail with an error of the system."""

    def fault(read: Read, fd: int, views: list[memoryview], offset: int) -> int:
        raise OSError(number, os.strerror(number))

    return fault


def once(action: Callable[[], None]) -> Any:
    """Something that is done to the file before the first of these reads."""
    lock = threading.Lock()
    done: list[bool] = []

    def fault(read: Read, fd: int, views: list[memoryview], offset: int) -> int:
        with lock:
            if not done:
                done.append(True)
                action()
        return read(fd, views, offset)

    return fault


class Weights:
    """A weight file that is harmed and put back as it was, with its times, as when a volume is there again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = path.with_suffix(".aside")
        shutil.copy2(path, self.aside)
        self.status = path.stat()

    def truncate(self, size: int) -> None:
        os.truncate(self.path, size)

    def overwrite(self) -> None:
        """Other weights in the same file; header and size stay."""
        with open(self.path, "r+b") as file:
            file.write(self._others())

    def replace(self) -> None:
        """Another file of the same size and with the same header under this name."""
        other = self.path.with_suffix(".other")
        other.write_bytes(self._others())
        other.rename(self.path)

    def _others(self) -> bytes:
        content = bytearray(self.aside.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        content[start:] = np.random.default_rng(0).bytes(len(content) - start)
        return bytes(content)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def restore(self) -> None:
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.write(self.aside.read_bytes())
            file.truncate()
        os.utime(self.path, ns=(self.status.st_atime_ns, self.status.st_mtime_ns))


def kinds(weights: Weights, chance: random.Random) -> dict[str, Any]:
    size = weights.status.st_size
    return {
        "short reads": short(chance),
        "EIO": failing(errno.EIO),
        "ENXIO": failing(errno.ENXIO),
        "EINTR": failing(errno.EINTR),
        "truncated": once(lambda: weights.truncate(chance.randrange(size))),
        "overwritten": once(weights.overwrite),
        "replaced": once(weights.replace),
        "removed": once(weights.remove),
    }


def answer(model: Model, prompt: list[int]) -> Iterator[np.ndarray]:
    """The logits after a prompt, and after each greedy token."""
    cache, ids = [KVCache() for _ in model.layers], prompt
    for _ in range(_STEPS):
        logits = np.array(model(mx.array([ids]), cache)[:, -1].astype(mx.float32))
        yield logits
        ids = logits.argmax(-1).tolist()


def request(model: Model, prompt: list[int], expected: list[np.ndarray], file: Path) -> str:
    """How a request ends: "right", or the code of its error; an assertion fails where it ends in no such way."""
    failure = None
    try:
        for ours, theirs in zip(answer(model, prompt), expected, strict=True):
            assert np.array_equal(ours, theirs), "a wrong token"
    except ExpertsError as error:
        failure = error
    if failure is None:
        return "right"
    assert failure.code in _CODES, failure.code
    assert str(file) in str(failure), str(failure)
    return failure.code


def let_reads_end(streaming: Streaming) -> None:
    """Wait for what was begun on a guess, so that nothing is read while the file is being put back."""
    for pool in streaming.pools:
        for reading in [*pool.loads.values(), *pool.draining.values()]:
            streaming.readers.first_done([reading])


@contextmanager
def streamed(folder: Path, slots: tuple[int, ...]) -> Iterator[Loaded]:
    loaded = load(folder, memory=replace(load(folder).plan, mode="streamed", slots=slots))
    try:
        yield loaded
    finally:
        assert loaded.streaming
        loaded.streaming.close()


def held() -> tuple[int, int]:
    """Threads and open files, without those that only a past error refers to."""
    gc.collect()
    return threading.active_count(), len(list(Path("/dev/fd").iterdir()))


def run(loaded: Loaded, weights: Weights, requests: list[tuple[list[int], list[np.ndarray]]], seed: int) -> str:
    """One request with faults and one without; says which faults there were and how it ended."""
    model, streaming = loaded.model, loaded.streaming
    assert streaming
    chance = random.Random(seed)
    prompt, expected = chance.choice(requests)
    known = kinds(weights, chance)
    chosen = chance.sample(sorted(known), chance.choice([1, 1, 2]))
    disk = Disk([known[name] for name in chosen], 1 + chance.randrange(60), chance.choice([1, 5, 1000]))
    with in_place_of_reads(disk):
        ended = request(model, prompt, expected, weights.path)
        let_reads_end(streaming)
    if disk.reads < disk.start:
        ended = "none of its reads was bad"
    weights.restore()
    again = request(model, prompt, expected, weights.path)
    assert again == "right", (chosen, ended, again)
    return f"{' + '.join(sorted(chosen))}: {ended}"


def runs(folder: Path, count: int, seed: int) -> Iterator[str]:
    """The outcome of each of `count` runs on a copy of the model in `folder`."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "model"
        shutil.copytree(folder, copy)
        (file,) = copy.glob("*.safetensors")
        weights, resident = Weights(file), load(copy)
        prompts = [[chance.randrange(3, resident.config.vocab_size) for _ in range(n)] for n in (1, 3, 9, 60)]
        requests = [(prompt, list(answer(resident.model, prompt))) for prompt in prompts]
        for start in range(0, count, _REQUESTS_PER_LOAD):
            layers, experts = resident.config.num_hidden_layers, resident.config.num_local_experts
            slots = tuple(chance.randint(1, experts - 1) for _ in range(layers))
            with streamed(copy, slots) as loaded:
                before = held()
                for n in range(start, min(start + _REQUESTS_PER_LOAD, count)):
                    yield run(loaded, weights, requests, seed * 1_000_003 + n)
                    assert all(now <= then for now, then in zip(held(), before, strict=True)), (held(), before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a folder with a single weight file (the demo)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    outcomes = Counter(runs(locate(options.model), options.runs, options.seed))
    if options.json:
        print(json.dumps(outcomes))
    else:
        for outcome, count in sorted(outcomes.items()):
            print(f"{count:>4}  {outcome}")
    print(f"{options.runs} runs, no wrong token, every next request right.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
