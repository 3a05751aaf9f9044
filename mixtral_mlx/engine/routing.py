"""Which experts the engine's passes choose, counted while somebody looks."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..routing import Choices, Pass, counted, recorded
from . import batch

if TYPE_CHECKING:
    from ..config import Config
    from ..model import Model


@dataclass(frozen=True)
class Routing:
    """Which experts were chosen since the count began: `counts[layer][expert]` times, by so many `tokens`.

    `last[layer]` are the experts of the latest token, the one that counts most first; where several requests run, of
    the oldest one's. Tokens kept from an earlier prompt pass no expert and are not counted; guesses are, even wrong
    ones."""

    layers: int
    experts: int
    tokens: int
    counts: tuple[tuple[int, ...], ...]
    last: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Watched:
    """What was noted of a pass, if anything; its parts have `lengths` tokens, and `latest` is the first one's last.

    `arrays` are to be evaluated with the pass's results."""

    noted: Pass | None
    lengths: Sequence[int]
    latest: int

    @property
    def arrays(self) -> Sequence[tuple[mx.array, mx.array]]:
        return self.noted.arrays if self.noted else ()

    def choices(self) -> list[Choices]:
        """What was chosen for each part's tokens; nothing where nobody was looking."""
        if not self.noted:
            return []
        together = self.noted.choices()
        return [together[start:end] for start, end in pairwise([0, *accumulate(self.lengths)])]


class Watch:
    """Counts choices until a time that any thread may put off. `run` and `add` are the worker's."""

    def __init__(self, config: Config) -> None:
        self._layers, self._experts = config.num_hidden_layers, config.num_local_experts
        self._lock = threading.Lock()
        self._until = 0.0
        self.reset()

    def look(self, seconds: float) -> None:
        """Count for so many seconds from now at least; 0: no longer."""
        with self._lock:
            self._until = max(self._until, time.monotonic() + seconds) if seconds else 0.0

    def reset(self) -> None:
        """Begin to count anew."""
        with self._lock:
            self._tokens = 0
            self._counts = np.zeros((self._layers, self._experts), np.int64)
            self._last: tuple[tuple[int, ...], ...] = ()

    def now(self) -> Routing:
        """What was counted so far."""
        with self._lock:
            counts = tuple(map(tuple, self._counts.tolist()))
            return Routing(self._layers, self._experts, self._tokens, counts, self._last)

    def run(self, model: Model, parts: Sequence[batch.Part]) -> tuple[list[mx.array], Watched]:
        """`batch.run`, and what was noted of it if somebody looks."""
        lengths, latest = [len(part.ids) for part in parts], len(parts[0].ids) - 1 - parts[0].guesses
        if time.monotonic() >= self._until:
            return batch.run(model, parts), Watched(None, lengths, latest)
        with recorded(model) as recorder:
            results = batch.run(model, parts)
        return results, Watched(recorder.passes[0], lengths, latest)

    def add(self, watched: Watched) -> None:
        """Count a pass that is done."""
        parts = watched.choices()
        if not parts:
            return
        counts = sum(counted(choices, self._experts) for choices in parts)
        with self._lock:
            self._tokens += sum(watched.lengths)
            self._counts += counts
            self._last = tuple(map(tuple, parts[0].experts[watched.latest].tolist()))
