"""Convert a checkpoint in bounded memory: plan the output, fill it in any order from several workers, then rename.

One matrix is read, quantized and written to its place at a time, whatever the model's size. Everything happens in
`DEST.partial`, whose journal lets the same command go on where it was killed. What a source is made of, and where it
comes from, is left to `source`, `names` and `fetch`."""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from .. import __version__
from ..config import Config, Quantization
from ..weights import Progress, bytes_of
from .journal import OUTPUT, Journal, allocated, checksum, disk_errors, fsync, no_space, sync
from .layout import Layout
from .manifest import MANIFEST, sums_of, write_manifest
from .names import Block, ConvertError, Piece

_WORKERS = 3  # Two compute while one reads or writes; each holds one matrix and its quantized form.
_MLX_CACHE_BYTES = 128 << 20
_TOKENIZER_BYTES = 8 << 20
_READ_BYTES = 16 << 20
_Item = TypeVar("_Item")
_Slot = tuple[Path, str, int, int]
"""A place in the output: folder, file, offset and bytes."""


@dataclass(frozen=True)
class Events:
    """Whom to tell: `phase` a line for each step, `progress` bytes done and in all; `cancelled` is asked often."""

    phase: Callable[[str], None] = lambda line: None
    progress: Progress = lambda done, total: None
    cancelled: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Target:
    """One folder to write: its name, its recipe's name, and where everything in it lies."""

    folder: Path
    recipe: str
    layout: Layout

    @classmethod
    def plan(cls, folder: Path, recipe: str, config: Config, quantization: Quantization | None, dtype: str) -> Target:
        """Plan `folder` for `config` with `quantization` (None: floats), floats kept as `dtype`."""
        return cls(folder, recipe, Layout.plan(replace(config, quantization=quantization, dtype=dtype)))


@dataclass(frozen=True)
class Written:
    """A folder that was written."""

    folder: str
    recipe: str
    tensors: int
    nbytes: int
    bits_per_weight: float


class Conversion:
    """A conversion under way: pieces are filled as their sources come, then all is finished at once.

    Use as a context; leaving it without `finish` keeps everything for the next try."""

    def __init__(self, journal: Journal, targets: Sequence[Target], events: Events = Events()) -> None:
        self.journal = journal
        self.targets = tuple(targets)
        self.events = events
        self.peak_disk = 0
        self.stopped = threading.Event()
        self.fds: dict[tuple[Path, str], int] = {}

    def __enter__(self) -> Conversion:
        with ExitStack() as undo:
            for target in self.targets:
                with self._disk_errors():
                    target.layout.write_empty(self._partial(target))
                for file in target.layout.sizes:
                    fd = os.open(self._partial(target) / file, os.O_RDWR | os.O_CLOEXEC)
                    self.fds[target.folder, file] = fd
                    undo.callback(os.close, fd)
            # One pool for all there is to do: MLX keeps a thread for every thread that ever used it.
            self.pool = undo.enter_context(ThreadPoolExecutor(_WORKERS, "convert"))
            undo.callback(mx.set_cache_limit, mx.set_cache_limit(_MLX_CACHE_BYTES))
            self._check()
            self.undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stopped.set()
        if kind is not KeyboardInterrupt:  # Workers may still be writing; they and the process end together.
            self.undo.close()

    def _partial(self, target: Target) -> Path:
        """Where `target` is written until it is whole."""
        return self.journal.work / OUTPUT / target.folder.name

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        with disk_errors(self.journal.work, self._missing_bytes):
            yield

    def _missing_bytes(self) -> int:
        return missing_bytes(self.journal, self.targets)

    def write_tokenizer(self, write: Callable[[Path], None]) -> None:
        """Write the tokenizer files by `write(folder)`, first of all: without them the rest is no use.

        Whatever else an earlier try left in the output is removed."""
        first, *others = (self._partial(target) for target in self.targets)
        for target in self.targets:
            for path in self._partial(target).iterdir():
                if path.name not in target.layout.sizes:
                    path.unlink()
        with self._disk_errors():
            write(first)
            for path in sorted(first.iterdir()):
                for other in others:
                    if path.name not in self.targets[0].layout.sizes:
                        shutil.copyfile(path, other / path.name)

    def _check(self) -> None:
        """Forget the pieces of an earlier try whose bytes are not what was written: power may have failed."""
        if not self.journal.sums:
            return
        self.events.phase("Checking what is there already")
        sizes = {name: self._size(name) for name in self.journal.sums}
        done = 0
        for name, right in self._run(list(sizes), self._is_right):
            if not right:
                del self.journal.sums[name]
            done += sizes[name]
            self.events.progress(done, sum(sizes.values()))
        self.events.phase(f"Going on after {len(self.journal.sums):,} matrices")

    def _is_right(self, name: str) -> tuple[str, bool]:
        slots = (slot for target in self.targets for slot in self._slots(target, *self._named(name)))
        sums = (_crc_of(self.fds[folder, file], offset, size) for folder, file, offset, size in slots)
        return name, checksum(sums) == self.journal.sums[name]

    def _size(self, name: str) -> int:
        return sum(slot[-1] for target in self.targets for slot in self._slots(target, *self._named(name)))

    def _named(self, name: str) -> tuple[str, int | None]:
        """Path and expert of the piece `name`."""
        if f"{name}.weight" in self.targets[0].layout.places:
            return name, None
        path, _, expert = name.rpartition(".")
        return path, int(expert)

    def fill(self, pieces: Iterable[Piece], on_progress: Progress) -> None:
        """Read, quantize and write `pieces` that are not done; raises the first error once the others have stopped."""
        self.journal.begun = True
        pieces = list(pieces)
        total = sum(piece.nbytes for piece in pieces)
        todo = [piece for piece in pieces if piece.name not in self.journal.sums]
        done = total - sum(piece.nbytes for piece in todo)
        on_progress(done, total)
        for piece in self._run(todo, self._convert):
            done += piece.nbytes
            self.note_disk()
            on_progress(done, total)

    def left_after(self, pieces: Iterable[Piece]) -> int:
        """Bytes of the output that will be still to write when `pieces` are done."""
        planned = sum(place.nbytes for target in self.targets for place in target.layout.places.values())
        return planned - sum(map(self._size, {*self.journal.sums, *(piece.name for piece in pieces)}))

    def _run(self, items: Sequence[Any], work: Callable[[Any], _Item]) -> Iterator[_Item]:
        """Hand items to the workers, and one more to whoever is done first; yields what comes of each."""
        waiting = iter(items)
        running: set[Future[_Item]] = set()
        try:
            while True:
                while len(running) <= _WORKERS and (item := next(waiting, None)) is not None:
                    running.add(self.pool.submit(work, item))
                if not running:
                    return
                finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
                if self.events.cancelled():
                    raise cancelled()
        finally:
            if running:
                self.stopped.set()

    def _convert(self, piece: Piece) -> Piece:
        if self.stopped.is_set():
            return piece
        try:
            sums: dict[_Slot, int] = {}
            for block in piece.blocks():
                for target in self.targets:
                    self._write(target, piece, block, sums)
        except (RuntimeError, MemoryError) as error:
            raise ConvertError(
                f"{piece.name} could not be converted: {error}.",
                code="mlx_failed",
                hint="If memory ran out, close other programs and run the same command again to go on.",
            ) from error
        slots = (slot for target in self.targets for slot in self._slots(target, piece.path, piece.expert))
        self.journal.done(piece.name, checksum(sums[slot] for slot in slots))
        return piece

    def _write(self, target: Target, piece: Piece, block: Block, sums: dict[_Slot, int]) -> None:
        """Write a block to its places in `target`, going on with the checksum of each place in `sums`."""
        arrays = piece.packed(block.values, target.layout.config)
        for slot, array in zip(self._slots(target, piece.path, piece.expert), arrays, strict=True):
            folder, file, offset, size = slot
            view, row = bytes_of(array), size // block.rows
            assert view.nbytes == row * (block.stop - block.start), piece.name
            with self._disk_errors():
                _pwrite(self.fds[folder, file], view, offset + row * block.start)
            sums[slot] = zlib.crc32(view, sums.get(slot, 0))

    def _slots(self, target: Target, path: str, expert: int | None) -> Iterator[_Slot]:
        """The place of each tensor that a piece becomes."""
        for part in ("weight", "scales", "biases"):
            if place := target.layout.places.get(f"{path}.{part}"):
                yield (target.folder, place.file, *place.of_expert(expert))

    def sync(self) -> None:
        """Make all that is filled durable, so that its source may go."""
        with self._disk_errors():
            for fd in self.fds.values():
                sync(fd)

    def note_disk(self) -> int:
        """Bytes of disk the work folder takes now; the most ever seen is kept in `peak_disk`."""
        now = allocated(self.journal.work)
        self.peak_disk = max(self.peak_disk, now)
        return now

    def finish(self, origin: dict[str, Any], *, keep: tuple[str, str] | None = None) -> None:
        """Write what goes beside the weights, make all of it durable, and give the folders their names.

        `origin` says in the manifest what was converted; `keep` is a folder in the work folder that is not to be
        removed, and its name to be."""
        self.events.phase("Writing the manifest")
        with self._disk_errors():
            for target in self.targets:
                self._write_rest(target, origin)
        self.note_disk()
        moves = [(f"{OUTPUT}/{target.folder.name}", target.folder.name) for target in self.targets]
        self.journal.note("peak_disk_bytes", self.peak_disk)
        self.journal.note("written", [asdict(_written(target)) for target in self.targets])
        self.journal.note("moves", [*moves, *([keep] if keep else [])])
        deliver(self.journal)

    def _write_rest(self, target: Target, origin: dict[str, Any]) -> None:
        partial = self._partial(target)
        (partial / "config.json").write_text(json.dumps(target.layout.config.to_dict(), indent=1))
        (partial / "model.safetensors.index.json").write_text(target.layout.index())
        facts = {"source": origin, "recipe": target.recipe, "versions": versions()}
        write_manifest(partial, facts, sums_of(_listed(partial), self.events.progress, self.events.cancelled))
        for path in [*partial.iterdir(), partial, partial.parent]:
            fsync(path)


def versions() -> dict[str, str]:
    """What the output was made with."""
    return {"mixtral-mlx": __version__, "mlx": version("mlx")}


def _written(target: Target) -> Written:
    layout = target.layout
    bits = sum(place.nbytes for place in layout.places.values()) * 8 / layout.config.parameters()
    return Written(target.folder.name, target.recipe, len(layout.places), layout.nbytes, bits)


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != MANIFEST)


def _crc_of(fd: int, offset: int, size: int) -> int:
    crc, end = 0, offset + size
    while offset < end and (data := os.pread(fd, min(_READ_BYTES, end - offset), offset)):
        crc, offset = zlib.crc32(data, crc), offset + len(data)
    return crc


def _pwrite(fd: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def cancelled() -> ConvertError:
    """The error that says that all was stopped on request."""
    return ConvertError("The conversion was cancelled.", code="cancelled", hint="Run the same command again to go on.")


def missing_bytes(journal: Journal, targets: Sequence[Target]) -> int:
    """Bytes the output will take besides those it takes already."""
    planned = sum(target.layout.nbytes + _TOKENIZER_BYTES for target in targets)
    return max(planned - allocated(journal.work / OUTPUT), 0)


def check_room(journal: Journal, targets: Sequence[Target], beside_bytes: int = 0) -> None:
    """Raise `ConvertError` if the disk has no room for the rest of the output and `beside_bytes`."""
    needed = missing_bytes(journal, targets) + beside_bytes
    if needed > shutil.disk_usage(journal.work).free:
        raise no_space(journal.work.parent, needed)


def is_finished(journal: Journal) -> bool:
    """Whether all that an earlier try left to do is `deliver`."""
    return "moves" in journal.facts


def deliver(journal: Journal) -> None:
    """Give finished folders their names and remove the work folder; if killed meanwhile, to be called again."""
    for inside, name in journal.facts["moves"]:
        here, there = journal.work / inside, journal.work.with_name(name)
        if not os.path.lexists(here):
            continue
        if os.path.lexists(there):
            raise ConvertError(
                f"{there} came to exist meanwhile.",
                code="exists",
                hint="Move it away and run the same command again.",
            )
        with disk_errors(there):
            here.rename(there)
            fsync(there.parent)
    with disk_errors(journal.work):
        journal.remove()
