"""Which experts of a layer are wanted again soonest, told from what its router chose so far.

Only keeps the scores: which expert is given up, and when, is the cache's business."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Routing is skewed by what the text is about, and by little else that lasts: half of what is remembered is 46 tokens
# old or younger. A shorter memory guesses worse in long chats, a longer one takes too long to notice a new text.
_DECAY = 0.985
# An expert just used is used again by the next token more often than its share says, in most layers.
_AGAIN = 0.07


class Usage:
    """How likely each expert of a layer is to be asked for soon."""

    def __init__(self, experts: int) -> None:
        self._shares = [0.0] * experts
        self.scores = [0.0] * experts
        """For each expert about the chance that the next token wants it; the higher, the more it is worth keeping."""

    def add(self, chosen: Sequence[int]) -> None:
        """Note the distinct experts that one decode step used."""
        shares = [_DECAY * share for share in self._shares]
        for expert in chosen:
            shares[expert] += 1 - _DECAY
        self._see(shares, chosen)

    def add_prompt(self, chosen: np.ndarray) -> None:
        """Note the choices (T, K) of a prompt's tokens, with the same result as adding them one by one."""
        T, K = chosen.shape
        if T:
            weights = (1 - _DECAY) * _DECAY ** np.arange(T - 1, -1, -1.0)
            added = np.bincount(chosen.ravel(), np.repeat(weights, K), len(self._shares))
            self._see((_DECAY**T * np.array(self._shares) + added).tolist(), chosen[-1].tolist())

    def _see(self, shares: list[float], latest: Sequence[int]) -> None:
        self._shares, self.scores = shares, shares.copy()
        for expert in latest:
            self.scores[expert] += _AGAIN
