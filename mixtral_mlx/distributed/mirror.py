"""The caches of rank 0, mirrored by the other ranks: which sequences there are, and what becomes of them.

A cache of rank 0's has a `Handle` from its first use on. What happens to caches is noted, and told with the next pass:
new ones, those frozen to be kept, those begun from what was kept, those that are gone. How far a cache was trimmed
needs no telling, since each pass says where it begins."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..borrowed import KVCache, QuantizedKVCache, RotatingKVCache
from ..config import Config
from ..engine.batch import SideBySide
from ..engine.frozen import Frozen
from .split import DistributedError

Operation = list[Any]
"""A verb and its operands, which are ids of handles, numbers and kinds of caches."""


class Handle:
    """What the other ranks know a cache of rank 0, or its frozen copy, by."""

    def __init__(self, notes: Notes) -> None:
        self.id = next(notes.ids)
        self._notes = notes
        weakref.finalize(self, notes.operations.append, ["drop", self.id]).atexit = False

    def frozen(self, length: int) -> Handle:
        """A handle of what is kept of the first `length` tokens."""
        return self._made("freeze", length)

    def forked(self, length: int) -> Handle:
        """A handle of new caches that begin with the first `length` tokens of what was kept."""
        return self._made("fork", length)

    def _made(self, verb: str, length: int) -> Handle:
        handle = Handle(self._notes)
        self._notes.operations.append([verb, handle.id, self.id, length])
        return handle


class Notes:
    """What has happened to rank 0's caches since the other ranks were last told."""

    def __init__(self) -> None:
        self.ids = itertools.count(1)
        # Things go whenever Python finds out that nobody has them: on any thread, in the middle of anything.
        self.operations: deque[Operation] = deque()

    def fill(self, caches: Sequence[Any], batch: int, length: int) -> None:
        """New caches are being filled with values that do not matter, and the other ranks' are to be as long."""
        self.operations.append(["fill", self._id(caches[0]), batch, length])

    def of_pass(self, inputs: mx.array, caches: Sequence[Any] | None) -> dict[str, Any]:
        """What to tell of a pass: everything noted, the ids, and for each sequence its cache and where it begins."""
        first = caches[0] if caches else None
        each = first.caches if isinstance(first, SideBySide) else [first]
        lengths = [end - start for start, end in first.bounds] if isinstance(first, SideBySide) else [inputs.shape[1]]
        places = [[self._id(cache), cache.offset if cache is not None else 0] for cache in each]
        operations = [self.operations.popleft() for _ in range(len(self.operations))]
        return {"do": operations, "ids": inputs.tolist(), "of": places, "lengths": lengths}

    def _id(self, cache: Any) -> int:
        if cache is None:
            return 0
        if getattr(cache, "handle", None) is None:
            if cache.offset:
                raise DistributedError("This cache is not known to the other ranks.", code="not_available")
            cache.handle = Handle(self)
            self.operations.append(["new", cache.handle.id, _kind(cache)])
        return int(cache.handle.id)


def _kind(cache: Any) -> list[Any]:
    if isinstance(cache, QuantizedKVCache):
        return ["quantized", cache.group_size, cache.bits]
    return ["window", cache.max_size, cache.keep] if isinstance(cache, RotatingKVCache) else ["plain"]


class Mirror:
    """The same caches on another rank, for the layers and heads that it has, in the dtype it computes in."""

    def __init__(self, config: Config, dtype: mx.Dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.caches: dict[int, list[Any]] = {}
        self.kept: dict[int, Frozen] = {}

    def for_pass(self, told: dict[str, Any]) -> tuple[mx.array, list[Any] | None]:
        """Do what was told, and make ready for the pass: its ids and caches."""
        for verb, *operands in told["do"]:
            getattr(self, f"_{verb}")(*operands)
        inputs = mx.array(told["ids"])
        if told["of"][0][0] == 0:
            return inputs, None
        each = [self._at(number, offset) for number, offset in told["of"]]
        if len(each) == 1:
            return inputs, each[0]
        return inputs, [SideBySide(layer, told["lengths"]) for layer in zip(*each, strict=True)]

    def _at(self, number: int, offset: int) -> list[Any]:
        caches = self.caches[number]
        for cache in caches:
            if surplus := cache.offset - offset:
                assert surplus > 0
                cache.trim(surplus)
        return caches

    def _new(self, number: int, kind: Sequence[Any]) -> None:
        self.caches[number] = [_made(*kind) for _ in range(self.config.num_hidden_layers)]

    def _fill(self, number: int, batch: int, length: int) -> None:
        zeros = mx.zeros((batch, self.config.num_key_value_heads, length, self.config.head_dim), self.dtype)
        for cache in self.caches[number]:
            cache.update_and_fetch(zeros, zeros)
            mx.eval(cache.state[:2])

    def _freeze(self, number: int, source: int, length: int) -> None:
        if frozen := Frozen.of(self.caches[source], length):
            self.kept[number] = frozen.evaluated()

    def _fork(self, number: int, source: int, length: int) -> None:
        self.caches[number] = self.kept[source].caches(length)

    def _drop(self, number: int) -> None:
        self.caches.pop(number, None)
        self.kept.pop(number, None)


def _made(kind: str, *settings: int) -> Any:
    if kind == "quantized":
        return QuantizedKVCache(*settings)
    return RotatingKVCache(settings[0], keep=settings[1]) if kind == "window" else KVCache()
