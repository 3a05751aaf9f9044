"""mlx-lm as a worker of `streaming.py`: python peer_mlx_lm.py FOLDER [lazy]

Its own model, caches and loader. `lazy` reads weights when a sum first needs them, instead of all before the first."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from peer import serve


class MlxLm:
    name = "mlx-lm"
    version = f"mlx-lm {version('mlx-lm')}"

    def __init__(self, folder: Path, lazy: bool) -> None:
        start = time.perf_counter()
        self._model, config = load_model(folder, lazy=lazy)
        self.load_s = time.perf_counter() - start
        self.dtype = str(config.get("torch_dtype", config.get("dtype", "")))
        self.vocab_size = int(config["vocab_size"])
        self._caches: list[Any] = []
        self._cached: list[int] = []

    def read(self, ids: Sequence[int], *, kept: bool = False) -> int:
        if not kept or self._cached[: len(ids)] != list(ids):
            self._caches, self._cached = make_prompt_cache(self._model), []
        else:
            for cache in self._caches:  # The last id is always read: its logits are what is asked for.
                cache.trim(len(self._cached) - len(ids) + 1)
            del self._cached[len(ids) - 1 :]
        return self._evaluated(ids[len(self._cached) :])

    def step(self, token: int) -> int:
        return self._evaluated([token])

    def _evaluated(self, ids: Sequence[int]) -> int:
        self._cached += ids
        chosen: Any = mx.argmax(self._model(mx.array([list(ids)]), cache=self._caches)[0, -1]).item()
        return int(chosen)


if __name__ == "__main__":
    serve(lambda: MlxLm(Path(sys.argv[1]), "lazy" in sys.argv[2:]))
