"""Which experts each token is given: noted on a loaded model from outside, without changing what it computes.

What is done with that, counting and drawing, is left to others.

L layers, N tokens of a pass, D hidden, E experts, K chosen experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

if TYPE_CHECKING:
    from .model import Model

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Choices:
    """The `experts` (N, L, K) that tokens were given, and the `weights` (N, L, K) of their answers, greatest first."""

    experts: Array
    weights: Array

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, tokens: slice) -> Choices:
        return Choices(self.experts[tokens], self.weights[tokens])

    @classmethod
    def joined(cls, some: Sequence[Choices]) -> Choices:
        """One after the other; at least one."""
        return cls(np.concatenate([one.experts for one in some]), np.concatenate([one.weights for one in some]))


def counted(choices: Choices, experts: int) -> Array:
    """How often each layer chose each expert: (L, E)."""
    return np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in choices.experts.swapaxes(0, 1)])


@dataclass(frozen=True)
class Pass:
    """What was noted of a pass, for each layer: experts (N, K) in any order and their weights, not evaluated yet.

    `arrays` is for whoever evaluates the pass's results, so that this is done with them."""

    arrays: Sequence[tuple[mx.array, mx.array]]

    def choices(self) -> Choices:
        """The same as numbers, each token's experts in the order of their weights."""
        experts, weights = (np.stack([np.array(array) for array in part], 1) for part in zip(*self.arrays, strict=True))
        order = np.argsort(-weights, axis=-1, kind="stable")
        return Choices(np.take_along_axis(experts.astype(np.int64), order, -1), np.take_along_axis(weights, order, -1))


class Recorder:
    """Notes of the passes that went through a model, oldest first. Those that broke off are not among them."""

    def __init__(self, num_layers: int) -> None:
        self.passes: list[Pass] = []
        self._num_layers = num_layers
        self._begun: list[tuple[mx.array, mx.array]] = []

    def note(self, layer: int, experts: mx.array, weights: mx.array) -> None:
        """A layer chose `experts` (N, K)."""
        if layer == 0:
            self._begun = []
        self._begun.append((experts, weights))
        if len(self._begun) == self._num_layers:
            self.passes.append(Pass(self._begun))


@contextmanager
def recorded(model: Model) -> Iterator[Recorder]:
    """Note the choices of every pass that goes through `model` while entered.

    Each layer's experts are handed the choice whatever they are, resident or streamed, MLX's or our kernels': that is
    where it is seen. Their class is another one meanwhile, and nothing else of the model is touched."""
    recorder = Recorder(len(model.layers))
    modules: list[Any] = [layer.block_sparse_moe.switch_mlp for layer in model.layers]
    before: list[Any] = [type(module) for module in modules]
    assert not any("noted" in module.__dict__ for module in modules), "recorded already"
    try:
        for n, (module, cls, layer) in enumerate(zip(modules, before, model.layers, strict=True)):
            module.__class__ = _noting(cls)
            object.__setattr__(module, "noted", _Layer(n, layer.block_sparse_moe, recorder))
        yield recorder
    finally:
        for module, cls in zip(modules, before, strict=True):
            module.__class__ = cls
            module.__dict__.pop("noted", None)


class _Layer:
    """Notes what one layer chooses."""

    def __init__(self, number: int, moe: Any, recorder: Recorder) -> None:
        self.number, self.moe, self.recorder = number, moe, recorder

    def __call__(self, x: mx.array, chosen: mx.array) -> None:
        """x (.., D) was given to the experts `chosen` (.., K)."""
        # The experts see what the router saw, so their weights need not be handed on: this is its sum again.
        logits = self.moe.gate(x.astype(mx.float32))
        weights = mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1)
        per_token = chosen.shape[-1]
        self.recorder.note(self.number, chosen.reshape(-1, per_token), weights.reshape(-1, per_token))


@cache
def _noting(cls: Any) -> type[nn.Module]:
    """`cls` that notes what it is asked."""
    ways = {"__call__": _called(cls)}
    if hasattr(cls, "outputs"):
        ways["outputs"] = _kernels_called(cls)
    return type(cls.__name__, (cls,), ways)


def _called(cls: Any) -> Callable[..., mx.array]:
    def __call__(self: Any, x: mx.array, indices: mx.array) -> mx.array:  # noqa: N807
        # Our kernels are asked by `outputs`, here as by the decoder layer.
        if not hasattr(cls, "outputs") or self.training or not self.is_plain():
            self.noted(x, indices)
        answer: mx.array = cls.__call__(self, x, indices)
        return answer

    return __call__


def _kernels_called(cls: Any) -> Callable[..., Any]:
    def outputs(self: Any, x: Array, chosen: Array, per_token: int) -> Any:
        self.noted(mx.array(x), mx.array(chosen.reshape(-1, per_token)))
        return cls.outputs(self, x, chosen, per_token)

    return outputs
