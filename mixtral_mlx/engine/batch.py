"""Several sequences through the model in one pass.

Their tokens stand side by side as rows of one long sequence. Everything that looks at one token only, which is nearly
all of the work, sees a larger batch and reads each weight once; only attention goes sequence by sequence, each over its
own cache. So nothing is padded, no cache is copied when a sequence comes or goes, sequences may have caches of
different kinds, and any number of tokens of each can go through: one that is decoded, guesses to be checked, or a
chunk of a prompt.

H heads, N tokens of all sequences, T of one, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

if TYPE_CHECKING:
    from ..model import Model


@dataclass(frozen=True)
class Part:
    """What one sequence puts into a pass: ids to be read into its `cache`; `wanted` logits, those of the last ones.

    With `hidden`, the hidden states of the last ones instead. Ids that are still being computed are an array (T,); the
    last `guesses` of the ids may prove wrong."""

    ids: Sequence[int] | mx.array
    cache: Sequence[Any]
    wanted: int
    hidden: bool = False
    guesses: int = 0


def run(model: Model, parts: Sequence[Part]) -> list[mx.array]:
    """One pass: what each part wants, logits (wanted, V) or hidden states (wanted, D), not evaluated yet.

    Its ids are in its cache then."""
    caches: Sequence[Any] = parts[0].cache
    if len(parts) > 1:
        lengths = [len(part.ids) for part in parts]
        caches = [SideBySide(layer, lengths) for layer in zip(*(part.cache for part in parts), strict=True)]
    if not any(part.wanted for part in parts):
        model.model.read(_ids(parts), caches)
        return [mx.zeros((0, model.args.vocab_size))] * len(parts)
    return _wanted(model, model.model(_ids(parts), caches)[0], parts)


def _ids(parts: Sequence[Part]) -> mx.array:
    """Those of all parts, (1, N)."""
    if any(isinstance(part.ids, mx.array) for part in parts):
        return mx.concatenate([mx.array(cast(Any, part.ids)) for part in parts])[None]
    return mx.array([[token for part in parts for token in part.ids]])


def _wanted(model: Model, hidden: mx.array, parts: Sequence[Part]) -> list[mx.array]:
    """hidden states (N, D) of all parts → what is wanted of each."""
    ends = list(accumulate(len(part.ids) for part in parts))
    counts = [0 if part.hidden else part.wanted for part in parts]
    rows = [row for count, end in zip(counts, ends, strict=True) for row in range(end - count, end)]
    logits = model.logits(hidden[mx.array(rows)][None])[0] if rows else mx.zeros((0, model.args.vocab_size))
    return [
        hidden[end - part.wanted : end] if part.hidden else logits[start:stop]
        for part, end, (start, stop) in zip(parts, ends, _bounds(counts), strict=True)
    ]


def _bounds(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """Where each of several begins and ends that stand one after the other."""
    return list(pairwise([0, *accumulate(lengths)]))


class SideBySide:
    """A layer's caches of several sequences, for `lengths` tokens of each that stand side by side."""

    def __init__(self, caches: Sequence[Any], lengths: Sequence[int]) -> None:
        self.caches = caches
        self.bounds = _bounds(lengths)

    @property
    def state(self) -> list[Any]:
        """The keys and values of each, as mlx-lm's caches give them."""
        return [cache.state for cache in self.caches]

    def make_mask(self, tokens: int, **how: Any) -> list[Any]:
        """A mask for each sequence, as mlx-lm's caches make them."""
        return [
            cache.make_mask(end - start, **how) for cache, (start, end) in zip(self.caches, self.bounds, strict=True)
        ]

    def each(
        self, attend: Callable[..., Any], queries: mx.array, keys: mx.array, values: mx.array, masks: Sequence[Any]
    ) -> list[Any]:
        """What `attend` says for each sequence: queries, keys and values (1, H, N, head_dim) → its share of them."""
        return [
            attend(queries[:, :, start:end], keys[:, :, start:end], values[:, :, start:end], mask, cache)
            for cache, mask, (start, end) in zip(self.caches, masks, self.bounds, strict=True)
        ]
