"""Runs the sides in turns, A B A B, row by row, each in a process of its own.

What comes out are samples; what they mean is left to `report`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ..config import Config
from .process import Ready, SideError, Streamed, Worker, first_token_s
from .rows import LEAST_PROMPT, MEMORY_STEPS, Row, room, shortened
from .sides import FIRST_PROMPT, Side


@dataclass(frozen=True)
class Plan:
    """What to run: how many turns, and the seconds a row may take of each side in each. `keep_all` leaves the workers
    of all sides in memory; where they do not fit, each is started again for its turn."""

    folder: Path
    config: Config
    turns: int
    seconds: float
    keep_all: bool = True


@dataclass(frozen=True)
class Samples:
    """What a side gave for a row: a number a turn, in seconds or bytes, for `tokens` tokens, or why it gave none.

    `streamed` is what streaming took in each turn, where the side streams and tokens were made."""

    values: tuple[float, ...] = ()
    tokens: int = 0
    reason: str = ""
    streamed: tuple[Streamed, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A row with each side's samples, by the side's name."""

    row: Row
    samples: dict[str, Samples]


@dataclass(frozen=True)
class Outcome:
    """All that was measured, what the sides said of themselves, and whether Ctrl-C ended it early."""

    measured: list[Measured]
    ready: dict[str, Ready]
    interrupted: bool


@dataclass(frozen=True)
class Events:
    """Whom to tell how far it is: `progress(done, total)` in samples, `row` with each row that is complete."""

    progress: Callable[[int, int], None] = lambda done, total: None
    row: Callable[[Measured], None] = lambda measured: None


def run(sides: Sequence[Side], rows: Sequence[Row], plan: Plan, events: Events = Events()) -> Outcome:
    """Measure `rows` of `sides`. Raises `SideError` where the first side cannot load, or loses a rank; others just have
    no figures."""
    measured: list[Measured] = []
    with _Turns(sides, plan) as turns:
        try:
            for n, row in enumerate(rows):
                done, total = n * turns.samples_per_row, len(rows) * turns.samples_per_row
                events.progress(done, total)
                measured.append(turns.measure(row, lambda more: events.progress(done + more, total)))  # noqa: B023
                events.row(measured[-1])
            events.progress(len(rows) * turns.samples_per_row, len(rows) * turns.samples_per_row)
        except KeyboardInterrupt:
            return Outcome([*measured, *turns.unfinished()], turns.ready, interrupted=True)
    return Outcome(measured, turns.ready, interrupted=False)


@dataclass
class _Collected:
    """A side's samples of a row as they come."""

    tokens: int = 0
    values: list[float] = field(default_factory=list)
    reason: str = ""
    streamed: list[Streamed] = field(default_factory=list)

    def samples(self) -> Samples:
        return Samples(tuple(self.values), self.tokens, self.reason, tuple(self.streamed))


class _Turns:
    """The sides, their workers, and the speeds seen so far."""

    def __init__(self, sides: Sequence[Side], plan: Plan) -> None:
        self.sides = sides
        self.plan = plan
        self.ready: dict[str, Ready] = {}
        self.samples_per_row = len(sides) * plan.turns
        self._pool = _Pool(keep_all=plan.keep_all, on_ready=self._note_ready)
        self._prompt_s: dict[str, float] = {}  # of each token of the longest prompt so far, by side
        self._row: Row | None = None
        self._collected: dict[str, _Collected] = {}

    def __enter__(self) -> _Turns:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def measure(self, row: Row, on_sample: Callable[[int], None]) -> Measured:
        """All turns of a row."""
        self._row, self._collected = row, {side.name: _Collected() for side in self.sides}
        for turn in range(self.plan.turns):
            for n, side in enumerate(self.sides):
                self._take_turn(row, side, self._collected[side.name])
                on_sample(turn * len(self.sides) + n + 1)
        (measured,) = self.unfinished()
        self._row = None
        return measured

    def unfinished(self) -> list[Measured]:
        """The row under way, if it has anything yet."""
        samples = {name: got.samples() for name, got in self._collected.items()}
        has_any = any(got.values or got.reason for got in samples.values())
        return [Measured(self._row, samples)] if self._row and has_any else []

    def _take_turn(self, row: Row, side: Side, got: _Collected) -> None:
        if got.reason:
            return
        try:
            got.tokens = got.tokens or self._affordable(row, side)
            got.values.append(self._sample(row, side, got))
        except SideError as failure:
            self._pool.drop_dead(side, failure)
            if side is self.sides[0] and (failure.at_start or (side.ranks > 1 and failure.code != "unsupported")):
                raise
            got.reason = str(failure)
        else:
            if row.kind == "prompt":
                self._prompt_s[side.name] = got.values[-1] / got.tokens

    def _affordable(self, row: Row, side: Side) -> int:
        """The tokens of `row` that this side can do in the seconds it has, by the speed seen last."""
        tokens = room(row, self.plan.config)
        if row.kind == "decode":
            each, _ = self._decode(row, side, 1)
        elif row.kind in ("prompt", "memory"):
            each = self._prompt_s.get(side.name) or self._first_prompt_s(side)
        else:
            return tokens
        return shortened(tokens, each, self.plan.seconds, row.least)

    def _first_prompt_s(self, side: Side) -> float:
        seconds = self._pool.worker(side).number("seconds", "prompt", tokens=LEAST_PROMPT) / LEAST_PROMPT
        self._prompt_s[side.name] = seconds
        return seconds

    def _sample(self, row: Row, side: Side, got: _Collected) -> float:
        if row.kind == "load":
            return self._load_s(row, side)
        if row.kind == "first":
            return _first_s(side)
        if row.kind == "memory":
            return self._peak_bytes(side, got.tokens)
        if row.kind == "prompt":
            return self._pool.worker(side).number("seconds", "prompt", tokens=got.tokens)
        seconds, streamed = self._decode(row, side, got.tokens)
        got.streamed += [streamed] if streamed else []
        return seconds

    def _decode(self, row: Row, side: Side, steps: int) -> tuple[float, Streamed | None]:
        shape = {"context": row.context, "batch": row.batch, "kv_bits": row.kv_bits}
        return self._pool.worker(side).decode(tokens=steps, **shape)

    def _load_s(self, row: Row, side: Side) -> float:
        if row.cold:
            drop_from_page_cache(self.plan.folder)
        with self._fresh(side) as worker:
            return worker.ready.load_s

    def _peak_bytes(self, side: Side, tokens: int) -> float:
        """The peak of a fresh process that reads a prompt and makes a few tokens."""
        with self._fresh(side) as worker:
            worker.number("seconds", "prompt", tokens=tokens)
            worker.number("seconds", "decode", context=0, batch=1, tokens=MEMORY_STEPS, kv_bits=None)
            return worker.number("peak_bytes", "memory")

    def _fresh(self, side: Side) -> Worker:
        self._pool.close()  # What it holds is not to be in the way.
        worker = Worker(side.name, side.worker)
        self._note_ready(side, worker.ready)
        return worker

    def _note_ready(self, side: Side, ready: Ready) -> None:
        self.ready[side.name] = ready


class _Pool:
    """Workers that stay from row to row, warmed up; one that died is started again, one that cannot start is not."""

    def __init__(self, *, keep_all: bool, on_ready: Callable[[Side, Ready], None]) -> None:
        self.keep_all = keep_all
        self.on_ready = on_ready
        self._workers: dict[str, Worker] = {}
        self._failed: dict[str, SideError] = {}

    def worker(self, side: Side) -> Worker:
        """The running worker of `side`; raises `SideError`."""
        if side.name in self._failed:
            raise self._failed[side.name]
        if side.name not in self._workers:
            if not self.keep_all:
                self.close()
            worker = self._workers[side.name] = Worker(side.name, side.worker, is_shared=side.ranks > 1)
            self.on_ready(side, worker.ready)
            # A process's first sums are slow: memory is touched, kernels are made.
            worker.number("seconds", "prompt", tokens=LEAST_PROMPT)
        return self._workers[side.name]

    def drop_dead(self, side: Side, failure: SideError) -> None:
        """Forget a worker that can no longer be asked."""
        if failure.at_start:
            self._failed[side.name] = failure
        elif failure.code != "unsupported" and (worker := self._workers.pop(side.name, None)):
            worker.kill()

    def close(self) -> None:
        """End all workers, whatever happens to one of them."""
        with ExitStack() as stack:
            for worker in self._workers.values():
                # Other ranks are told by one that leaves in good order.
                stack.callback(worker.close if worker.is_shared else worker.kill)
            self._workers = {}


def _first_s(side: Side) -> float:
    if side.first:
        return first_token_s(side.name, side.first, side.header)
    with Worker(side.name, side.worker) as worker:
        worker.ask("first", prompt=FIRST_PROMPT)
        return time.perf_counter() - worker.started


def drop_from_page_cache(folder: Path) -> None:
    """Make the next reader of the weights wait for the disk; raises `SideError` where that cannot be done."""
    if not hasattr(os, "posix_fadvise"):
        raise SideError("dropping files from memory needs posix_fadvise; on a Mac `sudo purge` does it", code="no_drop")
    for file in folder.glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
