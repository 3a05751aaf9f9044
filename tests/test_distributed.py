"""A model over several processes says what it says in one; each holds and reads its part only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_mlx.weights import Checkpoint

from . import ranks, sharded_worker
from .checkpoints import Q4, TINY, write_tiny

# Wide enough to be split in four, with a vocabulary that leaves most of the bytes to the experts.
SMALL = replace(
    TINY,
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=4096,
)
FORMS = {"fp32": SMALL, "4-bit": replace(SMALL, quantization=Q4)}
WORKER = ["-m", "tests.sharded_worker"]


@pytest.fixture(scope="module", params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("small") / request.param, FORMS[request.param], tokenizer=None)


def sharded(folder: Path, size: int, job: dict[str, Any], where: Path) -> list[dict[str, Any]]:
    """Run a job of `sharded_worker` on so many ranks."""
    job = {"folder": str(folder), "logits": str(where / "logits"), **job}
    return [json.loads(out) for out in ranks.run([*WORKER, json.dumps(job)], size, where, timeout_s=150)]


def assert_as_one(folder: Path, answers: list[dict[str, Any]], cases: list[dict[str, Any]], where: Path) -> None:
    for n, case in enumerate(cases):
        tokens, logits = sharded_worker.alone(str(folder), case)
        assert answers[0]["cases"][n]["tokens"] == tokens
        np.testing.assert_allclose(np.load(where / f"logits.{n}.npy"), logits, atol=1e-4)


CASES = [{"tokens": 1, "batch": 1}, {"tokens": 1, "batch": 4}, {"tokens": 600, "batch": 1}, {"tokens": 40, "batch": 4}]


@pytest.mark.parametrize("kind", ["tensor", "expert", "pipeline"])
def test_two_ranks_say_what_one_process_says(folder: Path, kind: str, tmp_path: Path) -> None:
    answers = sharded(folder, 2, {"kind": kind, "cases": CASES}, tmp_path)
    assert_as_one(folder, answers, CASES, tmp_path)
    whole = Checkpoint.open(folder).nbytes
    for what in ("held_bytes", "read_bytes"):
        assert whole <= sum(answer[what] for answer in answers) <= 1.03 * whole
