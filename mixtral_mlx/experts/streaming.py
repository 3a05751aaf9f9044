"""A model's experts on the disk: slots for every layer, readers for all of them, and what streaming has done so far."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..borrowed import QuantizedSwitchLinear, SwitchGLU
from ..config import Config
from .pool import Pool, StackedTensor, Statistics
from .readers import Readers
from .streamed import Guess, Recall, Stream, StreamedExperts, StreamedLinear, StreamedQuantizedLinear
from .usage import Usage

if TYPE_CHECKING:
    from ..model import Model

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LAYERS_AHEAD = 2
"""How many layers ahead experts are guessed; 0 reads nothing ahead."""


class Streaming:
    """Slots for the experts of every layer, `slots[layer]` of them, and the threads that read into them.

    `stored[layer]` are the tensors an expert of that layer is made of, named as in `switch_mlp`. Each layer guesses
    about `layers_ahead` more. Build the model with `experts`, load `arrays` into it, then `attach` it. Use from the
    thread that runs the model. `before_step` is called as each step begins: only then slots may be given up. Making
    slots takes seconds: `on_slots` is called with the bytes of each layer's."""

    def __init__(
        self,
        stored: Sequence[Sequence[StackedTensor]],
        slots: Sequence[int],
        *,
        layers_ahead: int = LAYERS_AHEAD,
        on_slots: Callable[[int], object] = lambda nbytes: None,
    ) -> None:
        self.readers = Readers()
        # Threads know the readers only, so that they end when nobody has the model any more.
        self._finalizer = weakref.finalize(self, self.readers.close)
        self._counts = Statistics()
        self.layers_ahead = layers_ahead
        self.before_step: Callable[[], object] = lambda: None
        self.wanted = tuple(slots)
        self.pools: list[Pool] = []
        unevaluated: list[mx.array] = []
        for tensors, count in zip(stored, slots, strict=True):
            usage = Usage(len(tensors[0].places))
            self.pools.append(Pool(tensors, count, usage, self.readers, self._counts, unevaluated))
            on_slots(sum(array.nbytes for array in self.pools[-1].arrays.values()))

    def experts(self, config: Config, layer: int) -> SwitchGLU:
        """A layer's experts as far as they are in slots, for `Model`."""
        return SwitchGLU(config.hidden_size, config.intermediate_size, self.pools[layer].num_slots)

    def arrays(self) -> Iterator[tuple[str, mx.array]]:
        """The slots under the names of the parameters they stand for."""
        for layer, pool in enumerate(self.pools):
            for name, array in pool.arrays.items():
                yield f"model.layers.{layer}.block_sparse_moe.switch_mlp.{name}", array

    def attach(self, model: Model) -> None:
        """Have the layers of `model`, whose experts' parameters are `arrays`, ask for what they need."""
        self.layers: list[StreamedExperts] = []
        # By themselves, since an adapter may take a matrix's place among a layer's experts.
        self.matrices: list[dict[str, Any]] = []
        for pool, layer in zip(self.pools, model.layers, strict=True):
            experts: Any = layer.block_sparse_moe.switch_mlp
            experts.__class__ = StreamedExperts
            for name in _PROJECTIONS:
                matrix = experts[name]
                quantized = isinstance(matrix, QuantizedSwitchLinear)
                matrix.__class__ = StreamedQuantizedLinear if quantized else StreamedLinear
                matrix.pool = pool
            experts.stream = Stream(pool)
            self.layers.append(experts)
            self.matrices.append({name: experts[name] for name in _PROJECTIONS})
        self._guess_ahead(model)
        model.runs_ahead = False  # Each layer waits for its routing.
        # And so the model keeps this alive.
        self.layers[0].stream.begin = lambda: self.before_step()

    def _guess_ahead(self, model: Model) -> None:
        recall = Recall(model.args.num_experts_per_tok)
        for n, earlier in enumerate(model.layers):
            for later in range(n + 1, min(n + 1 + self.layers_ahead, len(model.layers))):
                gate, norm = model.layers[later].block_sparse_moe.gate, model.layers[later].post_attention_layernorm
                earlier_norm = earlier.post_attention_layernorm["weight"]
                guess = Guess(self.pools[later], gate, norm["weight"], earlier_norm, recall)
                self.layers[n].stream.guesses.append(guess)
                self.layers[later].stream.about.append(guess)

    @property
    def statistics(self) -> Statistics:
        """What was done so far."""
        return replace(self._counts, bytes_read=self.readers.bytes_read, io_s=self.readers.busy_s)

    @property
    def slots(self) -> tuple[int, ...]:
        """How many slots each layer has now."""
        return tuple(pool.num_slots for pool in self.pools)

    def give_up(self) -> bool:
        """Give the memory of one slot in each layer that has more than one back; False if none has."""
        return self._resize([max(pool.num_slots - 1, 1) for pool in self.pools])

    def take_back(self) -> bool:
        """Take one slot of those given up for each layer; False if none is missing."""
        return self._resize([min(pool.num_slots + 1, n) for pool, n in zip(self.pools, self.wanted, strict=True)])

    def _resize(self, slots: Sequence[int]) -> bool:
        changed = False
        for pool, matrices, count in zip(self.pools, self.matrices, slots, strict=True):
            if count == pool.num_slots:
                continue
            pool.resize(count, partial(_put, matrices))
            changed = True
        return changed

    def close(self) -> None:
        """End the reading threads; the model cannot be used any more."""
        self._finalizer()


def _put(matrices: Mapping[str, Any], name: str, array: mx.array) -> None:
    projection, part = name.split(".")
    matrices[projection][part] = array
