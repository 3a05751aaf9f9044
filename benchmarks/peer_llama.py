"""llama.cpp as a worker of `peers.py`: python peer_llama.py FILE.gguf THREADS CONTEXT [mapped]

As it comes, through llama-cpp-python's plain bindings: float16 cache, flash attention as it chooses, weights mapped.
What its kernels want in another order it copies into memory of its own; `mapped` has all weights stay in the file."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from peer import serve


class Llama:
    name = "llama.cpp"

    def __init__(self, file: str, threads: int, context: int, *, mapped: bool = False) -> None:
        llama_cpp.llama_backend_init()
        start = time.perf_counter()
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(file), _model_params(mapped))
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        self._context = llama_cpp.llama_init_from_model(self._model, _context_params(threads, context))
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot hold a context of {context}")
        self.load_s = time.perf_counter() - start
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self.dtype = _description(self._model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._cached: list[int] = []

    def read(self, ids: Sequence[int], *, kept: bool = False) -> int:
        # The last id is always read: its logits are what is asked for.
        start = min(_common(self._cached, ids), len(ids) - 1) if kept else 0
        llama_cpp.llama_memory_seq_rm(self._memory, 0, start, -1)
        del self._cached[start:]
        return self._evaluated(ids[start:])

    def step(self, token: int) -> int:
        return self._evaluated([token])

    def _evaluated(self, ids: Sequence[int]) -> int:
        """Positions follow those in the cache, and only the last id has logits: both are this batch's defaults."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # The batch only points to them.
        if status := llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode answered {status}")
        self._cached += ids
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


def _model_params(mapped: bool) -> Any:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = not mapped
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    return params


def _context_params(threads: int, context: int) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = context
    params.n_threads = params.n_threads_batch = threads
    return params


def _description(model: Any) -> str:
    text = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_desc(model, text, len(text))
    return text.value.decode(errors="replace")


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many ids they begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


if __name__ == "__main__":
    serve(lambda: Llama(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), mapped="mapped" in sys.argv[4:]))
