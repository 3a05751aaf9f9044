"""A model over several processes says what it says in one; each holds and reads its part only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mixtral_mlx.budget import Speeds
from mixtral_mlx.config import KNOWN
from mixtral_mlx.distributed import DistributedError, Split
from mixtral_mlx.distributed.outlook import Host, outlooks, parse_wire, sent_bytes
from mixtral_mlx.distributed.split import Kind
from mixtral_mlx.weights import Checkpoint, Tensor, opened_file, read_header, read_tensors

from . import ranks, sharded_worker
from .checkpoints import Q4, TINY, write_tiny

# Wide enough to be split in four, with a vocabulary that leaves most of the bytes to the experts.
SMALL = replace(
    TINY,
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=4096,
)
FORMS = {"fp32": SMALL, "4-bit": replace(SMALL, quantization=Q4)}
CASES = [{"tokens": 1, "batch": 1}, {"tokens": 600, "batch": 1}, {"tokens": 9, "batch": 4}]
WORKER = ["-m", "tests.sharded_worker"]
KINDS = ["tensor", "expert", "pipeline"]
EXPERT_FIRST = [
    "expert",
    pytest.param("pipeline", marks=pytest.mark.long),
    pytest.param("tensor", marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two layers, in float32 and in 4 bit."""
    where = tmp_path_factory.mktemp("small")
    return [write_tiny(where / name, config, tokenizer=None) for name, config in FORMS.items()]


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same with four layers."""
    where = tmp_path_factory.mktemp("deeper")
    return [
        write_tiny(where / name, replace(config, num_hidden_layers=4), tokenizer=None) for name, config in FORMS.items()
    ]


def agrees(
    size: int, folders: list[Path], where: Path, kind: str, cases: Any = CASES, *, timeout_s: float = 170, **job: Any
) -> list[Any]:
    """Run cases on so many ranks and in one process: the same tokens and logits. What the ranks said of each folder."""
    asked = {"folders": [str(folder) for folder in folders], "logits": str(where / "logits"), "kind": kind, **job}
    out = ranks.run([*WORKER, json.dumps({**asked, "cases": cases})], size, where, timeout_s=timeout_s)
    answers = list(zip(*map(json.loads, out), strict=True))
    for folder, said in zip(folders, answers, strict=True):
        for n, case in enumerate(cases):
            tokens, logits = sharded_worker.alone(str(folder), case)
            assert said[0]["cases"][n]["tokens"] == tokens
            np.testing.assert_allclose(np.load(where / f"logits.{folder.name}.{n}.npy"), logits, atol=1e-4)
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_say_what_one_process_says(folders: list[Path], kind: str, tmp_path: Path) -> None:
    for folder, said in zip(folders, agrees(2, folders, tmp_path, kind), strict=True):
        whole = Checkpoint.open(folder).nbytes
        for what in ("held_bytes", "read_bytes"):
            assert whole <= sum(rank[what] for rank in said) <= 1.03 * whole
        assert {rank["chunk_tokens"] for rank in said} == {512 if kind == "pipeline" else 2048}
        assert {rank["layers"] for rank in said} == {
            "mixtral_mlx.cpu.modules" if kind == "pipeline" else "mixtral_mlx.distributed.kernels"
        }


@pytest.mark.parametrize("kind", EXPERT_FIRST)
def test_what_is_sent_for_a_token_is_what_arithmetic_says(folders: list[Path], kind: Kind, tmp_path: Path) -> None:
    carried = []
    for generated in (1, 21):
        cases = [{"tokens": 1, "batch": 1, "generated": generated}]
        job = {"folders": [str(folders[0])], "logits": str(tmp_path / "logits"), "kind": kind, "cases": cases}
        with ranks.cabled(tmp_path, 2) as (files, cables):
            out = ranks.run([*WORKER, json.dumps(job)], 2, tmp_path, timeout_s=100, hosts=files)
            carried.append(sum(cable.carried_bytes for cable in cables))
    expected = sent_bytes(kind, SMALL, 2, float_bytes=4)
    counted = sum(json.loads(text)[0]["cases"][0]["sent_bytes"] for text in out)
    assert counted == 21 * expected
    # What the ranks of this test tell each other of the token that rank 0 chose is in it, too.
    assert (carried[1] - carried[0]) / 20 == pytest.approx(expected, abs=64)


def test_of_a_prompt_that_is_only_read_a_pipeline_sends_nothing_back(folders: list[Path], tmp_path: Path) -> None:
    chunk, rest = sharded_worker.CHUNK, 600 - sharded_worker.CHUNK
    (said,) = agrees(2, folders[:1], tmp_path, "pipeline", [{"tokens": 600, "batch": 1}])
    sent = [rank["cases"][0]["sent_bytes"] for rank in said]
    per_token, decoded = 4 * SMALL.hidden_size, sharded_worker.GENERATED - 1
    assert sent == [(chunk + rest + decoded) * per_token, (rest + decoded) * per_token]


@pytest.mark.parametrize(("kind", "slots"), [*((kind, None) for kind in KINDS), ("expert", 1), ("pipeline", 2)])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.long
def test_as_many_ranks_say_what_one_process_says(
    deeper: list[Path], size: int, kind: str, slots: int | None, tmp_path: Path
) -> None:
    cases = [{"tokens": tokens, "batch": batch} for tokens in (1, 600, 3000) for batch in (1, 4)]
    answers = agrees(size, deeper, tmp_path, kind, cases, timeout_s=600, slots=slots)
    for folder, said in zip(deeper, answers, strict=True):
        whole = sum(tensor.nbytes for tensor in Checkpoint.open(folder).tensors if not (slots and tensor.is_experts))
        assert sum(rank["held_bytes"] for rank in said) <= 1.03 * whole or slots
        assert whole <= sum(rank["read_bytes"] for rank in said) <= 1.03 * Checkpoint.open(folder).nbytes


@pytest.mark.parametrize("kind", EXPERT_FIRST[:2])
def test_ranks_that_stream_say_what_one_process_says(folders: list[Path], kind: str, tmp_path: Path) -> None:
    for folder, said in zip(folders, agrees(2, folders, tmp_path, kind, slots=2), strict=True):
        experts = sum(tensor.nbytes for tensor in Checkpoint.open(folder).tensors if tensor.is_experts)
        dense = Checkpoint.open(folder).nbytes - experts
        assert dense <= sum(rank["read_bytes"] for rank in said) <= dense + 0.03 * experts
        assert all(rank["streamed_bytes"] for rank in said)


@pytest.mark.parametrize("kind", EXPERT_FIRST)
def test_uneven_ranks_say_what_one_process_says(
    folders: list[Path], deeper: list[Path], kind: str, tmp_path: Path
) -> None:
    some = (deeper if kind == "pipeline" else folders)[1:]
    (said,) = agrees(2, some, tmp_path, kind, CASES[:1], weights=[75, 25])
    assert said[0]["held_bytes"] > 2 * said[1]["held_bytes"]


def test_portions_are_whole_units_and_cover_all() -> None:
    split = Split.of("expert", 2, [64, 36])
    big, small = split.portions(KNOWN["8x22B"])
    assert (len(big.experts), len(small.experts)) == (5, 3)
    assert (len(big.heads), len(small.heads)) == (5, 3)
    stages = Split.of("pipeline", 3, [1, 1, 2]).portions(KNOWN["8x22B"])
    assert [len(stage.layers) for stage in stages] == [14, 14, 28]
    assert [stage.layers.start for stage in stages] == [0, 14, 28]


def two_macs(link: str, speeds: Speeds) -> list[str]:
    hosts = [Host("a Mac", 80 << 30, speeds)] * 2
    found = outlooks(KNOWN["8x7B"], "8x7B", hosts, parse_wire(link))
    assert all(outlook.decode_tps for outlook in found)
    return [outlook.kind for outlook in found]


def test_a_slow_link_is_best_used_least_and_slow_memory_best_shared() -> None:
    slow, fast = Speeds(3e9, 20e9, 1e12), Speeds(3e9, 800e9, 1e12)
    assert two_macs("1Gb/s,2ms", fast)[0] == "pipeline"
    assert two_macs("40Gb/s,0.01ms", slow)[0] == "tensor"


def test_of_splits_that_are_about_as_fast_the_one_that_waits_least_is_named() -> None:
    hosts = [Host("a Mac", 80 << 30, Speeds(3e9, 100e9, 1e12))] * 2
    for latency_us in range(0, 2000, 10):
        found = outlooks(KNOWN["8x7B"], "8x7B", hosts, parse_wire(f"10Gb/s,{latency_us / 1000}ms"))
        speeds = {outlook.kind: outlook.decode_tps or 0 for outlook in found}
        is_worth_it = speeds["tensor"] > 1.1 * speeds["pipeline"]
        assert found[0].kind == ("tensor" if is_worth_it else "pipeline")
        if speeds["pipeline"] < speeds["tensor"] and not is_worth_it:
            return
    pytest.fail("no latency made them about as fast")


@pytest.mark.parametrize("text", ["fast", "10Gb/s", "0Gb/s,1ms", "10Gb/s,1s", "-1Gb/s,1ms"])
def test_links_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(DistributedError, match=r"expected something like 10Gb/s,0\.3ms"):
        parse_wire(text)


@pytest.mark.parametrize(
    ("kind", "size", "weights", "code"),
    [
        ("expert", 16, None, "cannot_split"),
        ("ring", 2, None, "bad_split"),
        ("expert", 2, [1, 2, 3], "bad_split"),
        ("expert", 2, [1, -1], "bad_split"),
        ("expert", 2, [1, float("nan")], "bad_split"),
    ],
)
def test_splits_that_cannot_be_are_refused_by_name(kind: str, size: int, weights: Any, code: str) -> None:
    with pytest.raises(DistributedError) as refused:
        Split.of(kind, size, weights).portions(KNOWN["8x22B"])
    assert refused.value.code == code


def test_a_part_of_a_tensor_is_what_slicing_gives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = mx.array(rng.standard_normal((4, 6, 8)).astype(np.float32))
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"x": whole})
    with opened_file(tmp_path / "x.safetensors") as fd:
        span = read_header(tmp_path / "x.safetensors", fd)["x"]
    for axis, start, stop in [(0, 1, 3), (1, 2, 5), (2, 0, 4), (2, 3, 8)]:
        part = span.part(axis, start, stop)
        ((_, array),) = read_tensors([Tensor("x", part.shape, part.dtype, (part,))], None)
        expected = np.array(whole)[(*[slice(None)] * axis, slice(start, stop))]
        np.testing.assert_array_equal(np.array(array), expected)
