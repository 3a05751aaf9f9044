"""The caches of a sequence as plain arrays that nobody writes to any more, and back.

The only place that knows what mlx-lm's caches are made of. Which are kept, and where, is for others to say.

H heads, T tokens, D numbers (or words they are packed in) a head has for a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..borrowed import KVCache, QuantizedKVCache, RotatingKVCache

CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (KVCache, QuantizedKVCache, RotatingKVCache)}


@dataclass(frozen=True)
class Kind:
    """What must agree for keys and values to be of use to a request.

    `adapter` tells apart what was done to the weights: a name and a hash of them, say."""

    kv_bits: int | None = None
    max_kv: int | None = None
    adapter: str = ""


@dataclass(frozen=True)
class Frozen:
    """Keys and values of `length` tokens: a layer's are two arrays (1, H, T, D), or six where they are quantized.

    `settings` are what a cache of class `name` has beside keys, values and offset. Where a rotating window has turned,
    `is_whole`: there is no going back to fewer tokens."""

    name: str
    settings: tuple[int, ...]
    length: int
    layers: tuple[tuple[mx.array, ...], ...]
    is_whole: bool = False

    @classmethod
    def of(cls, caches: Sequence[Any], length: int) -> Frozen | None:
        """The first `length` tokens in `caches`, or as many as all layers have; None where nothing can be kept.

        Takes the caches over: they are not to be used again. Nothing is computed yet."""
        lengths = {cache.offset for cache in caches}
        is_whole = not all(cache.is_trimmable() for cache in caches)
        length = min(length, *lengths)
        if length == 0 or (is_whole and lengths != {length}):
            return None
        settings = tuple(caches[0].state[3:])
        layers = tuple(_flat(cache) for cache in caches)
        return cls(type(caches[0]).__name__, settings, length, layers, is_whole).first(length)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for layer in self.layers for array in layer)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, over all layers."""
        return sum(array.nbytes // array.shape[2] for layer in self.layers for array in layer)

    def first(self, length: int) -> Frozen:
        """The first `length` tokens, sharing memory with these. A turned window is only itself."""
        if self.is_whole:
            return self
        layers = tuple(tuple(array[..., :length, :] for array in layer) for layer in self.layers)
        return replace(self, length=length, layers=layers)

    def evaluated(self) -> Frozen:
        """The same in memory of its own, no more than it needs."""
        # A slice would hold on to all that it was cut from. Where there is nothing to spare, this copies nothing.
        layers = tuple(tuple(mx.contiguous(array) for array in layer) for layer in self.layers)
        mx.eval(layers)
        return replace(self, layers=layers)

    def caches(self, length: int) -> list[Any]:
        """New caches with the first `length` tokens. They share memory with this, and extending them copies it."""
        if self.name == RotatingKVCache.__name__ and not self.is_whole:
            settings = (*self.settings[:-1], length)  # The last is the place of the next token.
        else:
            settings = self.settings
        # Slices even of all: a cache writes into its array objects, so these must be new ones.
        shared = self if self.is_whole else self.first(length)
        return [
            CLASSES[self.name].from_state((*_paired([array[...] for array in layer]), length, *settings))
            for layer in shared.layers
        ]


def _flat(cache: Any) -> tuple[mx.array, ...]:
    keys, values = cache.keys, cache.values
    return (*keys, *values) if isinstance(keys, tuple | list) else (keys, values)


def _paired(arrays: Sequence[mx.array]) -> tuple[Any, Any]:
    if len(arrays) == 2:
        return arrays[0], arrays[1]
    half = len(arrays) // 2
    return tuple(arrays[:half]), tuple(arrays[half:])
