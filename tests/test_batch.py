"""Several sequences in one pass: each gets what it would have got alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mixtral_mlx import cpu
from mixtral_mlx.borrowed import KVCache, QuantizedKVCache, RotatingKVCache
from mixtral_mlx.engine.batch import Part, run
from mixtral_mlx.model import Model

from .checkpoints import Q4, TINY, random_model

CONFIG = replace(TINY, vocab_size=512, head_dim=32, quantization=Q4)
CACHES = {
    "float": KVCache,
    "8 bits": lambda: QuantizedKVCache(32, 8),
    "window": lambda: RotatingKVCache(16, keep=4),
}
LENGTHS = (1, 5, 40, 23)
# Sums in another order differ in their last digits; what lies between two steps of 8 bits then goes to the other one.
TOLERANCE = {"float": 1e-5, "window": 1e-5, "8 bits": 5e-3}


@pytest.fixture(scope="module", params=["MLX's", "our kernels"])
def model(request: pytest.FixtureRequest) -> Model:
    model = random_model(CONFIG)
    model.eval()
    if request.param == "our kernels":
        if not cpu.is_available():
            pytest.skip("there is a GPU, or no numba")
        cpu.accelerate(model)
    return model


def empty(kind: str) -> list[Any]:
    return [CACHES[kind]() for _ in range(CONFIG.num_hidden_layers)]


def ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()


def logits_of(model: Model, parts: Sequence[Part]) -> list[np.ndarray]:
    return [np.array(logits) for logits in run(model, parts)]


@pytest.mark.parametrize("kinds", [["float"] * 4, ["float", "8 bits", "window", "float"]], ids=["alike", "mixed"])
def test_prompts_decoding_and_guesses_share_a_pass_and_change_nothing(model: Model, kinds: list[str]) -> None:
    together, alone = [empty(kind) for kind in kinds], [empty(kind) for kind in kinds]
    steps = [  # How many ids of each go in, and the logits of how many are wanted.
        (LENGTHS, (1, 1, 0, 1)),
        ((1, 4, 7, 1), (1, 4, 1, 1)),
        ((1, 1, 1, 1), (1, 1, 1, 1)),
    ]
    for step, (counts, wanted) in enumerate(steps):
        tokens = [ids(count, 10 * step + n) for n, count in enumerate(counts)]
        shared = logits_of(model, [Part(*part) for part in zip(tokens, together, wanted, strict=True)])
        for n, part in enumerate(zip(tokens, alone, wanted, strict=True)):
            single = logits_of(model, [Part(*part)])[0]
            assert shared[n].shape == single.shape == (wanted[n], CONFIG.vocab_size)
            assert np.allclose(shared[n], single, atol=TOLERANCE[kinds[n]]), (step, n)


def test_one_sequence_in_a_pass_is_the_plain_model_to_the_bit(model: Model) -> None:
    ours, plain = empty("float"), empty("float")
    for tokens in (ids(9, 0), ids(1, 1)):
        expected = np.array(model(mx.array([tokens]), plain)[0])
        assert np.array_equal(logits_of(model, [Part(tokens, ours, len(tokens))])[0], expected)


def test_sequences_come_and_go_between_passes(model: Model) -> None:
    stays, plain = empty("float"), empty("float")
    for step, others in enumerate((0, 2, 1, 0)):
        tokens = [7 + step]
        parts = [Part(tokens, stays, 1), *(Part(ids(3, n), empty("float"), 1) for n in range(others))]
        expected = np.array(model(mx.array([tokens]), plain)[0])
        assert np.allclose(logits_of(model, parts)[0], expected, atol=TOLERANCE["float"]), step
        assert stays[0].offset == step + 1


def test_a_pass_that_only_reads_gives_no_logits(model: Model) -> None:
    caches = [empty("float"), empty("8 bits")]
    assert [len(logits) for logits in run(model, [Part(ids(6, n), cache, 0) for n, cache in enumerate(caches)])] == [
        0,
        0,
    ]
    assert [cache[0].offset for cache in caches] == [6, 6]
