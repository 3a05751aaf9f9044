"""This package as a worker of `peers.py`: python peer_ours.py FOLDER DTYPE

The model alone, a token at a time: `generate` prepares a step while the last one's token is looked at."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache
from peer import serve

from mixtral_mlx import __version__
from mixtral_mlx.weights import load


class Ours:
    name = "mixtral-mlx"
    version = __version__

    def __init__(self, folder: Path, dtype: str) -> None:
        loaded = load(folder, dtype=dtype)
        self.dtype, self.load_s, self._model = loaded.dtype, loaded.seconds, loaded.model
        self.vocab_size = self._model.args.vocab_size
        self._caches: list[Any] = []

    def read(self, ids: Sequence[int], *, kept: bool = False) -> int:
        self._caches = [KVCache() for _ in self._model.layers]
        if kept and len(ids) > 1:
            self._fill(len(ids) - 1)
        elif len(ids) > 1:
            self._model.model(mx.array([list(ids[:-1])]), self._caches)
            # As in `generate`, these ids' logits are never computed.
            mx.eval([cache.state for cache in self._caches])
        return self.step(ids[-1])

    def step(self, token: int) -> int:
        chosen: Any = mx.argmax(self._model(mx.array([[token]]), self._caches)[0, -1]).item()
        return int(chosen)

    def _fill(self, tokens: int) -> None:
        """Cached values of any kind cost the steps after them the same."""
        args = self._model.args
        shape = (2, 1, args.num_key_value_heads, tokens, args.head_dim)
        keys, values = mx.random.normal(shape, key=mx.random.key(0)).astype(getattr(mx, self.dtype))
        for cache in self._caches:
            cache.update_and_fetch(keys, values)
            mx.eval(cache.state)


if __name__ == "__main__":
    serve(lambda: Ours(Path(sys.argv[1]), sys.argv[2]))
