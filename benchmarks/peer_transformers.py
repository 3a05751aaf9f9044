"""transformers on torch's CPU as a worker of `peers.py`: python peer_transformers.py FOLDER THREADS

As it comes, in bfloat16, without `generate`, whose work around each token is not the model's."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch
import transformers
from peer import serve


class Transformers:
    name = "transformers"
    dtype = "bfloat16"

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        self._model = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.load_s = time.perf_counter() - start
        self.version = f"{transformers.__version__}, torch {torch.__version__}"
        self.vocab_size = self._model.config.vocab_size
        self._cache = transformers.DynamicCache()

    def read(self, ids: Sequence[int], *, kept: bool = False) -> int:
        self._cache = transformers.DynamicCache()
        return self._evaluated(ids)

    def step(self, token: int) -> int:
        return self._evaluated([token])

    def _evaluated(self, ids: Sequence[int]) -> int:
        with torch.inference_mode():
            said = self._model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            return int(said.logits[0, -1].argmax())


if __name__ == "__main__":
    serve(lambda: Transformers(sys.argv[1], int(sys.argv[2])))
