"""A layer's slots: which expert is in which, what is being read into them, what is given up for it.

Everything here happens on the thread that runs the model; readers only write into slots they were given. Nothing is
known of routing or products: who calls says which experts are needed, and computes with those that are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..memory import allocation_streams
from .files import WeightFile
from .readers import Convert, Load, Piece, Readers
from .usage import Usage

# Slots begin as far from a page's begin as experts do in their file, so that the disk can write into them directly.
_PAGE = 16384
_ALIGNED = 8


@dataclass(frozen=True)
class StackedTensor:
    """One of the tensors an expert is made of: its shape and dtype in memory, and where each expert's is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    places: tuple[tuple[WeightFile, int], ...]
    stored_bytes: int
    convert: Convert | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's in memory."""
        return int(np.prod(self.shape)) * self.dtype.size


@dataclass
class Statistics:
    """What streaming did so far, over all layers: experts, bytes, seconds.

    A use is an expert that a step asked for. `hits` were in memory then. Of the `bytes_read`, `hidden_bytes` had come
    before they were asked for; `ahead_reads` were begun on a guess, and `ahead_used` of these came true, which are
    `ahead_used_bytes`. `stall_s` is how long the model waited."""

    hits: int = 0
    misses: int = 0
    ahead_reads: int = 0
    ahead_used: int = 0
    ahead_used_bytes: int = 0
    hidden_bytes: int = 0
    bytes_read: int = 0
    io_s: float = 0.0
    stall_s: float = 0.0

    def __sub__(self, earlier: Statistics) -> Statistics:
        """What was done since."""
        return Statistics(**{name: value - getattr(earlier, name) for name, value in vars(self).items()})


@dataclass
class Pool:
    """S slots of a layer, in MLX's memory: `arrays` has a stack (S, ..) for each of the experts' tensors.

    With as many slots as experts each expert has its own, and once all are read no more reading is done.

    `unevaluated`, which all layers share, is what was computed from slots, perhaps not yet: it is evaluated before any
    of them is overwritten, and let go of as soon as the next layer asks, whose question hangs on it anyway."""

    tensors: Sequence[StackedTensor]
    num_slots: int
    usage: Usage
    readers: Readers
    statistics: Statistics
    unevaluated: list[mx.array] = field(default_factory=list)
    arrays: dict[str, mx.array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_experts = len(self.tensors[0].places)
        self.loads: dict[int, Load] = {}
        self.guessed: set[int] = set()
        """Experts whose reading began on a guess and that nobody has asked for yet."""
        self.table: mx.array | None = None
        """`slot_of` for MLX, made when it is first asked for after a change."""
        self._rearrange(self.num_slots, {})
        for tensor, array in zip(self.tensors, _stacks(self.tensors, self.num_slots), strict=True):
            self.arrays[tensor.name] = array

    @property
    def is_whole(self) -> bool:
        """Whether every expert is in memory, in its own slot."""
        return self.num_slots == self.num_experts and not self.loads and -1 not in self.slot_of

    @property
    def expert_bytes(self) -> int:
        """Bytes an expert takes on the disk."""
        return sum(tensor.stored_bytes for tensor in self.tensors)

    def ask(self, needed: Sequence[int]) -> Iterator[list[int]]:
        """Begin to read those of the distinct experts `needed` that are not in memory; returns them in waves.

        A wave is some of them, in memory, and stays there until the next is asked for. When there are more experts
        than slots, each has a wave of its own, the least wanted first, while the next one is read: so each is read
        once at most, and what is wanted most is there at the end, in all slots but two. Raises `ExpertsError`, also
        from a wave."""
        self._evaluate()
        self._settle(quietly=True)  # What failed for an earlier step may be there now.
        self._count(needed)
        for expert in [expert for expert in self.loads if expert not in needed]:
            self._cancel(expert)
        for expert in needed:
            if expert in self.loads:
                self.readers.hurry(self.loads[expert])
        missing = sorted((e for e in needed if self.slot_of[e] < 0), key=self.usage.scores.__getitem__)
        self._place_some(missing, keep=needed)
        return self._waves(list(needed), missing)

    def _waves(self, left: list[int], missing: list[int]) -> Iterator[list[int]]:
        # One slot to compute with and one to read into are enough to keep both going.
        wanted = sorted(left, key=self.usage.scores.__getitem__, reverse=True)[: max(self.num_slots - 2, 0)]
        while left:
            self._place_some(missing, keep=[*left, *wanted])
            here = [expert for expert in left if self.slot_of[expert] >= 0 and expert not in self.loads]
            if not here:
                self._wait()
                continue
            wave = [min(here, key=self.usage.scores.__getitem__)] if missing else here
            yield wave
            left = [expert for expert in left if expert not in wave]
            self._settle()

    def slots_of(self, experts: mx.array) -> mx.array:
        """Experts that are in memory → their slots."""
        if self.is_whole:
            return experts
        if self.table is None:
            self.table = mx.array(self.slot_of)
        return self.table[experts]

    def read_ahead(self, guessed: Sequence[int]) -> None:
        """Begin to read the experts `guessed` for the next step, the likeliest first, where slots can be spared."""
        for expert in [e for e, load in self.loads.items() if e not in guessed and load.is_untouched]:
            self._cancel(expert)
        for expert in guessed:
            if self.slot_of[expert] < 0 and not self._place(expert, keep=guessed, ahead=True):
                return

    def resize(self, num_slots: int, adopt: Callable[[str, mx.array], None]) -> None:
        """Have `num_slots` slots, and keep in them what is wanted most.

        `arrays` are new ones afterwards, each given to `adopt`, so that no more than one is ever there twice."""
        for expert in list(self.loads):
            self._cancel(expert)
        self._wait_for_drained()
        self._evaluate()
        held = sorted(filter(lambda expert: expert >= 0, self.slots), key=self.usage.scores.__getitem__, reverse=True)
        kept = {expert: self.slot_of[expert] for expert in held[:num_slots]}
        moves = self._rearrange(num_slots, kept)
        for tensor in self.tensors:
            (array,) = _stacks([tensor], num_slots)
            source, target, size = _bytes(self.arrays[tensor.name]), _bytes(array), tensor.nbytes
            for old, new in moves:
                target[new * size : (new + 1) * size] = source[old * size : (old + 1) * size]
            self.arrays[tensor.name] = array
            adopt(tensor.name, array)

    # Slots.

    def _rearrange(self, num_slots: int, kept: Mapping[int, int]) -> list[tuple[int, int]]:
        """Have `num_slots` slots without memory, the experts `kept` in them; returns their slots before and now."""
        self.num_slots = num_slots
        self.slots, self.slot_of = [-1] * num_slots, [-1] * self.num_experts
        self.table = None
        self.draining: dict[int, Load] = {}
        moves: list[tuple[int, int]] = []
        for expert, old in kept.items():
            new = expert if num_slots == self.num_experts else len(moves)
            moves.append((old, new))
            self._assign(expert, new)
        return moves

    def _place_some(self, missing: list[int], *, keep: Sequence[int]) -> None:
        """Take from the front of `missing` what a slot can be found for."""
        while missing and self._place(missing[0], keep=keep):
            missing.pop(0)

    def _place(self, expert: int, *, keep: Sequence[int], ahead: bool = False) -> bool:
        """Begin to read `expert` into the slot of the least wanted one that is not among `keep`; False if none is."""
        slot = self._victim(expert, keep)
        if slot is None:
            return False
        self._evaluate()
        if self.slots[slot] >= 0:
            self._forget(self.slots[slot])
        self._assign(expert, slot)
        load = Load([self._piece(tensor, expert, slot) for tensor in self.tensors])
        self.loads[expert] = load
        if ahead:
            self.guessed.add(expert)
            self.statistics.ahead_reads += 1
        self.readers.start(load, ahead=ahead)
        return True

    def _victim(self, expert: int, keep: Sequence[int]) -> int | None:
        self._drain()
        if self.num_slots == self.num_experts:
            return None if expert in self.draining else expert
        free = [slot for slot in range(self.num_slots) if slot not in self.draining]
        free = [slot for slot in free if self.slots[slot] not in keep and self.slots[slot] not in self.loads]
        scores = self.usage.scores
        return min(free, key=lambda slot: scores[self.slots[slot]] if self.slots[slot] >= 0 else -1.0, default=None)

    def _piece(self, tensor: StackedTensor, expert: int, slot: int) -> Piece:
        file, offset = tensor.places[expert]
        view = _bytes(self.arrays[tensor.name])[slot * tensor.nbytes : (slot + 1) * tensor.nbytes]
        return Piece(file, offset, tensor.stored_bytes, view, tensor.convert)

    def _assign(self, expert: int, slot: int) -> None:
        self.slots[slot], self.slot_of[expert], self.table = expert, slot, None

    def _forget(self, expert: int) -> None:
        self.slots[self.slot_of[expert]] = -1
        self.slot_of[expert], self.table = -1, None
        self.guessed.discard(expert)

    def _cancel(self, expert: int) -> None:
        load, slot = self.loads.pop(expert), self.slot_of[expert]
        self.readers.cancel(load)
        self._forget(expert)
        if not load.is_done:
            self.draining[slot] = load

    def _evaluate(self) -> None:
        if self.unevaluated:
            mx.eval(self.unevaluated)
            self.unevaluated.clear()

    # Loads.

    def _settle(self, *, quietly: bool = False) -> None:
        """Take note of loads that are done; raises what one that failed raised, if it was asked for."""
        self._drain()
        for expert, load in list(self.loads.items()):
            if not load.is_done:
                continue
            del self.loads[expert]
            if load.error:
                was_guess = expert in self.guessed
                self._forget(expert)
                if not was_guess and not quietly:
                    raise load.error

    def _drain(self) -> None:
        self.draining = {slot: load for slot, load in self.draining.items() if not load.is_done}

    def _wait(self) -> None:
        start = time.perf_counter()
        self.readers.first_done([*self.loads.values(), *self.draining.values()])
        self.statistics.stall_s += time.perf_counter() - start
        self._settle()

    def _wait_for_drained(self) -> None:
        for load in self.draining.values():
            self.readers.first_done([load])
        self.draining = {}

    def _count(self, needed: Sequence[int]) -> None:
        counts = self.statistics
        for expert in needed:
            here = self.slot_of[expert] >= 0
            load = self.loads.get(expert)
            counts.hits += here and load is None
            counts.misses += not here or load is not None
            if expert in self.guessed:
                self.guessed.discard(expert)
                counts.ahead_used += 1
                counts.ahead_used_bytes += self.expert_bytes
                counts.hidden_bytes += load.bytes_read if load else self.expert_bytes


def _stacks(tensors: Sequence[StackedTensor], num_slots: int) -> Iterator[mx.array]:
    """Stacks of zeros in which slots lie in their pages as a tensor's experts lie in theirs, if they all can."""
    streams = allocation_streams()
    sizes = [num_slots * tensor.nbytes for tensor in tensors]
    # First touch of memory takes longer than anything else here, and so is shared between two cores.
    whole = [mx.zeros((size + _PAGE,), mx.uint8, stream=streams[n % 2]) for n, size in enumerate(sizes)]
    mx.async_eval(whole)
    for tensor, size, memory in zip(tensors, sizes, whole, strict=True):
        mx.eval(memory)
        offset, address = tensor.places[0][1], np.frombuffer(cast(Any, memory), np.uint8).ctypes.data
        shift = 0 if offset % _ALIGNED else (offset - address) % _PAGE
        stack = memory[shift : shift + size].view(tensor.dtype).reshape(num_slots, *tensor.shape)
        mx.eval(stack)
        yield stack


def _bytes(array: mx.array) -> memoryview:
    return memoryview(cast(Any, array)).cast("B")
