"""Expert layers whose weights are in slots: they ask for what a step needs, and compute while the rest is read.

Drop-ins for mlx-lm's, given to existing modules; the sums are MLX's own, over slots instead of experts.

B batch, T tokens, N = B·T, D hidden, E experts, K chosen experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..borrowed import QuantizedSwitchLinear, SwitchGLU, SwitchLinear
from .pool import Pool

# A step over more tokens needs nearly every expert anyway, and its own reading keeps the disk busy.
_FEW_TOKENS = 8
_SORTED = 64
# How clear a choice was, in cases: standard deviations of the logits between an expert and the first not chosen.
_MARGINS = (0.1, 0.25, 0.5)
_LEARNING = 0.02
# A wrong guess costs the disk what a right one saves, and may have driven out an expert that will be missed.
_WORTH_READING = 0.7
# Experts' worth of bytes that wait to be read: then nothing more is guessed.
_ENOUGH = 1.0


class Recall:
    """How often guesses come true, by their place among a router's choices and by how clear the choice was.

    Learned while running, from guesses that were acted on and from those that were not."""

    def __init__(self, per_token: int) -> None:
        self.chances = np.full((per_token, len(_MARGINS) + 1), 0.75)

    def of(self, margins: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """margins (N, K) over the first expert not chosen, in standard deviations → chances, and the cases they are."""
        cases = np.searchsorted(_MARGINS, margins)
        return self.chances[np.arange(margins.shape[-1]), cases], cases

    def learn(self, place: int, case: int, came_true: bool) -> None:
        self.chances[place, case] += _LEARNING * (came_true - self.chances[place, case])


class Guess:
    """Names the experts a later layer will want: what its router says to this layer's input.

    The input is what the earlier layer's norm made of the hidden state; `ratio` turns that into the later norm's."""

    def __init__(self, pool: Pool, gate: nn.Module, norm: mx.array, earlier_norm: mx.array, recall: Recall) -> None:
        self.pool = pool
        self.gate = gate
        self.recall = recall
        self.first = 0
        """The router's number of the first expert in `pool`, which may have some of them only."""
        there = earlier_norm.astype(mx.float32)
        self.ratio = mx.where(there == 0, 0, norm.astype(mx.float32) / mx.where(there == 0, 1, there))
        mx.eval(self.ratio)
        self.open: list[tuple[int, int, int]] = []
        """Expert, place and case of what was guessed for the step under way."""

    def logits(self, x: mx.array) -> mx.array:
        """x (.., D) → (.., E)."""
        return self.gate(x.astype(mx.float32) * self.ratio)

    def act(self, logits: np.ndarray[Any, Any]) -> None:
        """Begin to read what `logits` (N, E) name, the surest first, where such guesses come true often enough."""
        chosen = len(self.recall.chances)
        order = np.argsort(-logits, axis=-1)[:, : chosen + 1]
        ranked = np.take_along_axis(logits, order, axis=-1)
        margins = (ranked[:, :-1] - ranked[:, -1:]) / (logits.std(axis=-1, keepdims=True) + 1e-20)
        chances, cases = self.recall.of(margins)
        best: dict[int, float] = {}
        self.open = []
        for row, place in np.ndindex(*chances.shape):
            expert = int(order[row, place]) - self.first
            if not 0 <= expert < self.pool.num_experts:
                continue
            self.open.append((expert, place, int(cases[row, place])))
            best[expert] = max(best.get(expert, 0.0), float(chances[row, place]))
        likely = [expert for expert in best if best[expert] >= _WORTH_READING]
        self.pool.read_ahead(sorted(likely, key=best.__getitem__, reverse=True))

    def learn(self, needed: Sequence[int]) -> None:
        """The step that was guessed about has come: it needs these experts."""
        for expert, place, case in self.open:
            self.recall.learn(place, case, expert in needed)
        self.open = []


class Stream:
    """What a layer streams with: its slots, `guesses` about the layers that follow, and those `about` it.

    `begin` is called before the layer does anything in a step."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.guesses: list[Guess] = []
        self.about: list[Guess] = []
        self.begin: Callable[[], object] = lambda: None

    def guesses_for(self, tokens: int) -> list[Guess]:
        """The guesses that are worth their while for so many tokens."""
        return [guess for guess in self.guesses if not guess.pool.is_whole] if tokens <= _FEW_TOKENS else []

    def waves(
        self, chosen: np.ndarray[Any, Any], guessed: Sequence[tuple[Guess, np.ndarray[Any, Any]]]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Places in `chosen` (N, K) that can be answered, as flat indices, wave after wave.

        `guessed` are guesses for so many tokens and their logits."""
        needed = np.unique(chosen).tolist()
        for guess in self.about:
            guess.learn(needed)
        if len(chosen) <= _FEW_TOKENS:
            self.pool.usage.add(needed)
        else:
            self.pool.usage.add_prompt(chosen)
        waves = self.pool.ask(needed)
        # Queued after what this step needs, and before anybody waits for that.
        for n, (guess, logits) in enumerate(guessed):
            if n and self.pool.readers.queued_bytes >= _ENOUGH * self.pool.expert_bytes:
                break  # The disk has enough to do until the next layer asks, which knows better what comes then.
            guess.act(logits)
        for experts in waves:
            yield np.flatnonzero(np.isin(chosen, experts))


class StreamedExperts(SwitchGLU):
    """x (B, T, D), chosen experts (B, T, K) → each chosen expert's output (B, T, K, D)."""

    stream: Stream

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        stream, pool = self.stream, self.stream.pool
        stream.begin()
        rows, per_token = x.reshape(-1, x.shape[-1]), indices.shape[-1]
        guesses = stream.guesses_for(len(rows))
        if pool.is_whole and not guesses:
            return super().__call__(x, indices)
        logits = [guess.logits(rows) for guess in guesses]
        # Routing must reach the CPU before we know which experts to read: the one sync per layer.
        mx.eval(rows, indices, *logits)
        chosen = np.array(indices).reshape(-1)
        outputs, order = [], []
        guessed = list(zip(guesses, map(np.array, logits), strict=True))
        for which in stream.waves(chosen.reshape(-1, per_token), guessed):
            which = which[np.argsort(np.array(pool.slot_of)[chosen[which]], kind="stable")]
            outputs.append(self._answer(rows[mx.array(which // per_token)], mx.array(chosen[which])))
            mx.async_eval(outputs[-1])
            pool.unevaluated.append(outputs[-1])
            order.append(which)
        back = np.argsort(np.concatenate(order))
        return mx.concatenate(outputs)[mx.array(back)].reshape(*indices.shape, -1)

    def _answer(self, x: mx.array, experts: mx.array) -> mx.array:
        """x (M, D) and an expert for each (M,), in the order of their slots → (M, D)."""
        x, in_order = x[:, None], len(experts) >= _SORTED
        up = self.up_proj(x, experts, sorted_indices=in_order)
        gate = self.gate_proj(x, experts, sorted_indices=in_order)
        return self.down_proj(self.activation(up, gate), experts, sorted_indices=in_order).squeeze(-2)


class _InSlots:
    """A stack of the matrices that are in slots, addressed by expert; what multiplies comes after it."""

    pool: Pool

    @property
    def num_experts(self) -> int:
        return self.pool.num_experts

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        multiply: Any = super()
        return multiply.__call__(x, self.pool.slots_of(indices), sorted_indices)


class StreamedLinear(_InSlots, SwitchLinear):
    """Matrices of floats in slots."""


class StreamedQuantizedLinear(_InSlots, QuantizedSwitchLinear):
    """Quantized matrices in slots."""
