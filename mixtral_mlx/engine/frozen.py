"""The caches of a sequence as plain arrays that nobody writes to any more, and back.

The only place that knows what mlx-lm's caches are made of. Which are kept, and where, is for others to say.

H heads, T tokens, D numbers (or words they are packed in) a head has for a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..borrowed import KVCache, QuantizedKVCache, RotatingKVCache
from ..weights import bytes_of

CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (KVCache, QuantizedKVCache, RotatingKVCache)}
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16, "uint32": mx.uint32}


@dataclass(frozen=True)
class Kind:
    """What must agree for keys and values to be of use to a request.

    `adapter` tells apart what was done to the weights, a name and a hash of them, say, and other models' from ours."""

    kv_bits: int | None = None
    max_kv: int | None = None
    adapter: str = ""


@dataclass(frozen=True)
class Form:
    """What keys and values are but for their tokens: the class of cache, what it has beside them, and each array.

    `arrays` are a layer's: dtype, H and D of two, or of six where they are quantized."""

    name: str
    settings: tuple[int, ...]
    layers: int
    arrays: tuple[tuple[str, int, int], ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, over all layers."""
        return self.layers * sum(heads * width * DTYPES[dtype].size for dtype, heads, width in self.arrays)


@dataclass(frozen=True)
class Frozen:
    """Keys and values of `length` tokens, a layer's as arrays (1, H, T, D).

    Where a rotating window has turned, `is_whole`: there is no going back to fewer tokens. `handle` is what other
    machines, where a model is split among several, know their part of this by; caches have one too."""

    form: Form
    length: int
    layers: tuple[tuple[mx.array, ...], ...]
    is_whole: bool = False
    handle: Any = None

    @classmethod
    def of(cls, caches: Sequence[Any], length: int) -> Frozen | None:
        """The first `length` tokens in `caches`, or as many as all layers have; None where nothing can be kept.

        Takes the caches over: they are not to be used again. Nothing is computed yet."""
        lengths = {cache.offset for cache in caches}
        is_whole = not all(cache.is_trimmable() for cache in caches)
        length = min(length, *lengths)
        if length == 0 or (is_whole and lengths != {length}):
            return None
        layers = tuple(_flat(cache) for cache in caches)
        arrays = tuple((str(array.dtype).rpartition(".")[2], array.shape[1], array.shape[3]) for array in layers[0])
        settings = tuple(caches[0].state[3:])
        if isinstance(caches[0], RotatingKVCache) and not is_whole:
            settings = (*settings[:-1], 0)  # The place of the next token, which is `length`.
        form = Form(type(caches[0]).__name__, settings, len(layers), arrays)
        handle = getattr(caches[0], "handle", None)
        return cls(form, length, layers, is_whole, handle and handle.frozen(length)).first(length)

    @classmethod
    def zeros(cls, form: Form, length: int) -> Frozen:
        """Memory for so many tokens, to be filled by way of `views`."""
        layers = tuple(
            tuple(mx.zeros((1, heads, length, width), DTYPES[dtype]) for dtype, heads, width in form.arrays)
            for _ in range(form.layers)
        )
        mx.eval(layers)
        return cls(form, length, layers)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for layer in self.layers for array in layer)

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
        settings = self.form.settings
        if self.form.name == RotatingKVCache.__name__ and not self.is_whole:
            settings = (*settings[:-1], length)
        # A cache writes into its array objects, so these are new ones even where they hold the same.
        caches = [
            CLASSES[self.form.name].from_state((*_paired([array[...] for array in layer]), length, *settings))
            for layer in self.first(length).layers
        ]
        if self.handle:
            caches[0].handle = self.handle.forked(length)
        return caches

    def views(self) -> Views:
        """The memory of what is evaluated, for threads that know nothing of MLX."""
        arrays = [array for layer in self.layers for array in layer]
        return Views(self.length, tuple((bytes_of(array), array.shape[1]) for array in arrays))


@dataclass(frozen=True)
class Views:
    """Memory of keys and values of `length` tokens: of each array its bytes and its heads."""

    length: int
    arrays: tuple[tuple[memoryview, int], ...]

    def of_tokens(self, start: int, end: int) -> Iterator[memoryview]:
        """Where the tokens from `start` to `end` are, piece by piece, in the order of layers, arrays and heads."""
        for view, heads in self.arrays:
            row = view.nbytes // (heads * self.length)
            for first in range(0, heads * self.length, self.length):
                yield view[(first + start) * row : (first + end) * row]


def _flat(cache: Any) -> tuple[mx.array, ...]:
    keys, values = cache.keys, cache.values
    return (*keys, *values) if isinstance(keys, tuple | list) else (keys, values)


def _paired(arrays: Sequence[mx.array]) -> tuple[Any, Any]:
    if len(arrays) == 2:
        return arrays[0], arrays[1]
    half = len(arrays) // 2
    return tuple(arrays[:half]), tuple(arrays[half:])
