"""Keys and values of prompts that were read before, in memory: what begins alike is not read again.

A hard cap in bytes; what was not used for longest goes first. Where `blocks` are given, what is kept goes to disk as
well and comes back from there, read on other threads. All else happens on the one that runs the model."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .blocks import Blocks, Reading, Writing
from .frozen import Frozen, Kind

__all__ = ["Kind", "Prefixes", "Statistics"]

_TOKEN_BYTES = 4


@dataclass
class Statistics:
    """What became of the prompts so far, in requests and tokens, and what is held now.

    Of the `hits`, `disk_hits` were not in memory, or not as long."""

    hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    dropped: int = 0
    entries: int = 0
    nbytes: int = 0


class Prefixes:
    """Beginnings of prompts with their keys and values: at most `most_bytes` in memory, more on `disk` if given."""

    def __init__(self, most_bytes: int, disk: Blocks | None = None) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self.disk = disk
        self._entries: OrderedDict[tuple[Kind, bytes], _Entry] = OrderedDict()  # The least recently used first.
        self._divisible: defaultdict[Kind, _Sorted] = defaultdict(_Sorted)
        self._whole: defaultdict[Kind, _Sorted] = defaultdict(_Sorted)
        self._counts = Statistics()

    @property
    def statistics(self) -> Statistics:
        """A copy of the counts."""
        return replace(self._counts, entries=len(self._entries), nbytes=self.nbytes)

    def find(
        self, kind: Kind, tokens: Sequence[int], *, multiple_of: int = 1, read: Reading | None = None
    ) -> tuple[int, list[Any]] | None:
        """The longest beginning of `tokens` in memory, or `read` from disk: how many tokens, and caches with them.

        At least the last token is left, to be read for its logits; `multiple_of` asks for such a length. The caches
        are the caller's: they share memory with what is kept, which nothing done to them changes."""
        usable = _usable(tokens, multiple_of)
        length, frozen = self._from_memory(kind, tokens[:usable], multiple_of)
        if read and (came := self._taken(read, kind, tokens)):
            on_disk = min(came.length, usable) // multiple_of * multiple_of
            if on_disk > length:
                self._counts.disk_hits += 1
                length, frozen = on_disk, came
        if not length or not frozen:
            self._counts.misses += 1
            return None
        self._counts.hits += 1
        self._counts.hit_tokens += length
        return length, frozen.caches(length)

    def begin_reading(
        self,
        kind: Kind,
        tokens: Sequence[int],
        *,
        multiple_of: int = 1,
        most_kept: int | None = None,
        on_done: Callable[[], object] = lambda: None,
    ) -> Reading | None:
        """Begin to read what `find` would not find in memory, or not as long; None where there is no more on disk.

        Before that takes memory, no more than `most_kept` bytes are left here. See `Blocks.begin_read`."""
        if self.disk is None:
            return None
        usable = _usable(tokens, multiple_of)
        length, _ = self._from_memory(kind, tokens[:usable], multiple_of)
        if min(self.disk.available(kind, tokens), usable) // multiple_of * multiple_of <= length:
            return None
        self.shrink_to(self.nbytes if most_kept is None else most_kept)
        return self.disk.begin_read(kind, tokens, on_done)

    def keep(self, kind: Kind, tokens: Sequence[int], caches: Sequence[Any]) -> None:
        """Take over `caches`, which hold `tokens`: they are not to be used again.

        Of more than there is room for at all, the beginning is kept."""
        frozen = Frozen.of(caches, len(tokens))
        if frozen and frozen.nbytes > self.most_bytes:
            fitting = self.most_bytes // frozen.form.token_bytes
            frozen = frozen.first(fitting) if fitting and not frozen.is_whole else None
        if frozen and (entry := self._add(kind, _key(tokens[: frozen.length]), frozen)) and self.disk:
            entry.writing = self.disk.write(kind, tokens, entry.frozen)

    def shrink_to(self, nbytes: int) -> None:
        """Drop what was not used for longest until no more than `nbytes` are left."""
        while self.nbytes > max(nbytes, 0):
            self.drop_oldest()

    def clear(self) -> bool:
        """Drop everything; False where there is nothing."""
        held = bool(self._entries)
        self.shrink_to(0)
        return held

    def finish_writing(self, timeout_s: float) -> None:
        """Write to disk what is on its way there, as far as that takes no longer than `timeout_s`."""
        if self.disk:
            self.disk.close(timeout_s)

    def drop_oldest(self) -> bool:
        """Drop what was not used for longest; False where there is nothing left."""
        if not self._entries:
            return False
        self._counts.dropped += 1
        self._remove(*next(iter(self._entries)))
        return True

    def _from_memory(self, kind: Kind, tokens: Sequence[int], multiple_of: int) -> tuple[int, Frozen | None]:
        length, key = self._longest(kind, _key(tokens), multiple_of)
        if not length:
            return 0, None
        self._entries.move_to_end((kind, key))
        return length, self._entries[kind, key].frozen

    def _taken(self, read: Reading, kind: Kind, tokens: Sequence[int]) -> Frozen | None:
        """What was read, kept from now on if it is not too large for that."""
        self.shrink_to(self.nbytes - read.copied_bytes)
        frozen = read.result()
        if frozen and frozen.nbytes <= self.most_bytes:
            self._add(kind, _key(tokens[: frozen.length]), frozen)
        return frozen

    def _longest(self, kind: Kind, wanted: bytes, multiple_of: int) -> tuple[int, bytes]:
        """The most tokens of `wanted` that some entry can give, and that entry's key."""
        shared, key = self._divisible[kind].most_shared(wanted)
        best = shared // multiple_of * multiple_of, key
        for whole in self._whole[kind].beginnings(wanted):
            length = len(whole) // _TOKEN_BYTES
            if length % multiple_of == 0:
                return max(best, (length, whole))
        return best

    def _add(self, kind: Kind, key: bytes, frozen: Frozen) -> _Entry | None:
        """Make an entry of what is no larger than the cap; None where there is one that can do the same."""
        shared, holder = self._divisible[kind].most_shared(key)
        if frozen.is_whole:
            shared, holder = frozen.length if (kind, key) in self._entries else 0, key
        if shared == frozen.length:
            self._entries.move_to_end((kind, holder))
            return None
        # A turned window cannot go back to what came before it, so that stays.
        if not frozen.is_whole:
            for beginning in list(self._divisible[kind].beginnings(key)):
                self._remove(kind, beginning)
        self.shrink_to(self.most_bytes - frozen.nbytes)
        entry = self._entries[kind, key] = _Entry(frozen.evaluated())
        self.nbytes += frozen.nbytes
        (self._whole if frozen.is_whole else self._divisible)[kind].add(key)
        return entry

    def _remove(self, kind: Kind, key: bytes) -> None:
        entry = self._entries.pop((kind, key))
        if entry.writing:
            entry.writing.cancel()
        frozen = entry.frozen
        self.nbytes -= frozen.nbytes
        index = self._whole if frozen.is_whole else self._divisible
        index[kind].remove(key)
        if not index[kind].keys:
            del index[kind]


@dataclass
class _Entry:
    frozen: Frozen
    writing: Writing | None = None


class _Sorted:
    """Token sequences in order, so that those that begin alike are neighbours."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []

    def add(self, key: bytes) -> None:
        insort(self.keys, key)

    def remove(self, key: bytes) -> None:
        del self.keys[bisect_left(self.keys, key)]

    def most_shared(self, wanted: bytes) -> tuple[int, bytes]:
        """The most tokens with which one of these begins like `wanted`, and which; 0 and nothing where none does."""
        at = bisect_left(self.keys, wanted)
        return max(((_shared(key, wanted), key) for key in self.keys[max(at - 1, 0) : at + 1]), default=(0, b""))

    def beginnings(self, wanted: bytes) -> Iterator[bytes]:
        """Those with which `wanted` begins, the longest first."""
        while at := bisect_right(self.keys, wanted):
            key = self.keys[at - 1]
            shared = _shared(key, wanted) * _TOKEN_BYTES
            if shared == len(key):
                yield key
                shared -= _TOKEN_BYTES
            # All others with which `wanted` begins come before `key`, and so `key` begins with them too.
            wanted = wanted[:shared]


def _usable(tokens: Sequence[int], multiple_of: int) -> int:
    """How many of `tokens` may be found: not the last, and a multiple."""
    return max(len(tokens) - 1, 0) // multiple_of * multiple_of


def _key(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.uint32).tobytes()


def _shared(one: bytes, other: bytes) -> int:
    """With how many of the same tokens two sequences begin."""
    length = min(len(one), len(other)) // _TOKEN_BYTES
    differing = np.frombuffer(one, np.uint32, length) != np.frombuffer(other, np.uint32, length)
    return int(differing.argmax()) if differing.any() else length
