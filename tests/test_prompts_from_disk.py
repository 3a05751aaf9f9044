"""What comes from disk for a request: nobody else waits for it, and its memory is counted and let go of."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import pytest

from mixtral_mlx.budget import Plan
from mixtral_mlx.engine import blocks as blocks_module
from mixtral_mlx.engine.blocks import BLOCK_TOKENS, SUFFIX
from mixtral_mlx.engine.engine import Engine, load
from mixtral_mlx.engine.frozen import Form, Frozen
from mixtral_mlx.engine.request import Token
from mixtral_mlx.engine.worker import Worker
from mixtral_mlx.weights import load as load_weights

from .checkpoints import write_tiny
from .test_blocks import HeldDisk
from .test_engine import CONFIG, failing, on_thread, until, words

TOKENS = 300
ON_DISK = TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
CHUNK = 512


@dataclass(frozen=True)
class Stored:
    """A model, prompts that were read by it before it was closed, and what it said then."""

    folder: Path
    cache_dir: Path
    prompts: tuple[list[int], ...]
    said: tuple[tuple[int, ...], ...]


def store(
    folder: Path, cache_dir: Path, prompts: list[list[int]], tokens: int = 5, deterministic: bool = False, **how: Any
) -> Stored:
    """Have prompts read, and wait until they are on disk."""
    blocks = sum((CHUNK if deterministic else len(prompt)) // BLOCK_TOKENS for prompt in prompts)
    with load(folder, cache_dir=cache_dir, deterministic=deterministic) as engine:
        replies = [engine.complete(prompt, max_tokens=tokens, ignore_eos=True, **how) for prompt in prompts]
        said = tuple(reply.result().tokens for reply in replies)
        until(lambda: engine.stats()["prefix_files"]["written"] >= blocks)
    return Stored(folder, cache_dir, tuple(prompts), said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model", CONFIG)


@pytest.fixture(scope="module")
def stored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return store(folder, tmp_path_factory.mktemp("cache"), [words(TOKENS, seed) for seed in range(2)])


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldDisk]:
    held = HeldDisk(monkeypatch)
    yield held
    held.go.set()


@pytest.fixture
def engine(stored: Stored) -> Iterator[Engine]:
    with load(stored.folder, cache_dir=stored.cache_dir) as engine:
        engine.load()
        yield engine


def generated(engine: Engine) -> int:
    return int(engine.stats()["requests"]["generated_tokens"])


def wait_for(engine: Engine, disk: HeldDisk) -> None:
    """Until a request waits for the disk, which does not answer."""
    assert disk.asked.wait(30)
    until(lambda: bool(engine._worker._fetching))


def small(folder: Path, kv_bytes: int) -> Plan:
    """A plan with so many bytes for keys and values: 1,024 a token, in steps of 256, half as much again to grow."""
    plan = load_weights(folder).plan
    parts = {**plan.parts, "kv cache": kv_bytes}
    return replace(plan, parts=parts, budget_bytes=sum(parts.values()), context=800)


def test_other_streams_go_on_while_a_disk_does_not_answer(engine: Engine, stored: Stored, disk: HeldDisk) -> None:
    running = engine.complete(words(5), max_tokens=1500, ignore_eos=True)
    assert next(event for event in running if isinstance(event, Token))
    reply = engine.complete(stored.prompts[0], max_tokens=5, ignore_eos=True)
    wait_for(engine, disk)
    said = generated(engine)
    until(lambda: generated(engine) >= said + 10)
    assert engine.complete(words(5, seed=7), max_tokens=2).result().tokens
    assert (engine.health().running, engine.health().queued) == (1, 1)
    disk.go.set()
    result = reply.result()
    running.cancel()
    assert result.usage.cached_tokens == ON_DISK
    assert result.tokens == stored.said[0]


@pytest.mark.parametrize("how", [{"kv_bits": 8}, {"max_kv": 512}], ids=["8 bits", "window"])
def test_what_comes_later_is_what_came_at_once(folder: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    stored = store(folder, tmp_path, [words(TOKENS)], **how)
    with load(folder, cache_dir=tmp_path) as engine:
        result = engine.complete(stored.prompts[0], max_tokens=5, ignore_eos=True, **how).result()
        assert engine.stats()["prefixes"]["disk_hits"] == 1
    assert (result.tokens, result.usage.cached_tokens) == (stored.said[0], ON_DISK)


def test_a_deterministic_engine_takes_whole_chunks_from_disk(folder: Path, tmp_path: Path) -> None:
    stored = store(folder, tmp_path, [words(CHUNK + 90)], deterministic=True)
    with load(folder, cache_dir=tmp_path, deterministic=True) as engine:
        result = engine.complete(stored.prompts[0], max_tokens=5, ignore_eos=True).result()
    assert (result.tokens, result.usage.cached_tokens) == (stored.said[0], CHUNK)


def test_what_is_cancelled_while_it_comes_is_free_at_once(engine: Engine, stored: Stored, disk: HeldDisk) -> None:
    before = on_thread(engine, mx.get_active_memory)
    reply = engine.complete(stored.prompts[0], max_tokens=5, ignore_eos=True)
    wait_for(engine, disk)
    assert mx.get_active_memory() > before
    reply.cancel()
    assert reply.result().finish_reason == "cancelled"
    assert mx.get_active_memory() == before
    assert engine.complete(words(5), max_tokens=2).result().finish_reason == "length"
    disk.go.set()
    assert engine.complete(stored.prompts[0], max_tokens=5, ignore_eos=True).result().tokens == stored.said[0]


def test_those_that_begin_alike_are_read_from_disk_once(engine: Engine, stored: Stored, disk: HeldDisk) -> None:
    replies = [engine.complete(stored.prompts[0], max_tokens=5, ignore_eos=True) for _ in range(3)]
    wait_for(engine, disk)
    other = engine.complete(stored.prompts[1], max_tokens=5, ignore_eos=True)
    disk.go.set()
    assert {reply.result().tokens for reply in replies} == {stored.said[0]}
    assert other.result().tokens == stored.said[1]
    assert disk.count == 2 * ON_DISK // BLOCK_TOKENS
    prefixes = engine.stats()["prefixes"]
    assert (prefixes["hits"], prefixes["disk_hits"]) == (4, 2)


def test_where_the_first_of_those_is_cancelled_the_next_reads(engine: Engine, stored: Stored, disk: HeldDisk) -> None:
    first, second = (engine.complete(stored.prompts[0], max_tokens=5, ignore_eos=True) for _ in range(2))
    wait_for(engine, disk)
    first.cancel()
    disk.go.set()
    result = second.result()
    assert (result.tokens, result.usage.cached_tokens) == (stored.said[0], ON_DISK)


def test_the_thread_sleeps_while_the_disk_is_all_it_waits_for(stored: Stored, disk: HeldDisk) -> None:
    numbers, step = count(), Worker._step
    with (
        patch.object(Worker, "_step", lambda worker: (next(numbers), step(worker))),
        load(
            stored.folder, cache_dir=stored.cache_dir, memory=small(stored.folder, 1_600_000), idle_unload_s=0
        ) as engine,
    ):
        replies = [engine.complete(stored.prompts[0], max_tokens=5, ignore_eos=True) for _ in range(2)]
        wait_for(engine, disk)
        no_room = engine.complete(words(700), max_tokens=5)
        on_thread(engine, lambda: None)
        before = next(numbers)
        for _ in range(50):
            on_thread(engine, lambda: None)
        assert next(numbers) - before <= 52
        assert engine.health().queued == 3
        disk.go.set()
        assert [reply.result().tokens for reply in replies] == [stored.said[0]] * 2
        assert no_room.result().finish_reason == "length"


def test_closing_ends_a_request_that_waits_for_a_disk(engine: Engine, stored: Stored, disk: HeldDisk) -> None:
    reply = engine.complete(stored.prompts[0], max_tokens=5)
    wait_for(engine, disk)
    engine.close()
    assert failing(reply) == "closed"
    assert engine._worker._ended.is_set()


def test_what_is_read_into_is_within_the_budget_before_it_is_taken(stored: Stored) -> None:
    with load(stored.folder, cache_dir=stored.cache_dir, memory=small(stored.folder, 1_600_000)) as engine:
        zeros, before, after = Frozen.zeros, on_thread(engine, lambda: engine._worker.opened), list[int]()

        def allocate(form: Form, length: int) -> Frozen:
            frozen = zeros(form, length)
            running = sum(map(engine._worker._reserved, engine._worker._running))
            after.append(frozen.nbytes + running + engine._prefixes.nbytes)
            return frozen

        engine.complete(words(700, seed=7), max_tokens=5).result()
        running = engine.complete(words(5), max_tokens=700, ignore_eos=True)
        assert next(event for event in running if isinstance(event, Token))
        kept = on_thread(engine, lambda: engine._prefixes.nbytes)
        with patch.object(Frozen, "zeros", allocate):
            assert engine.complete(stored.prompts[0], max_tokens=5, ignore_eos=True).result().tokens == stored.said[0]
        running.cancel()
        assert kept > before.kv_bytes - 2 * 512 * 1536  # With it there, the two would be too much.
        assert after[0] <= before.kv_bytes


def test_what_comes_from_disk_gives_way_to_what_runs(stored: Stored, disk: HeldDisk) -> None:
    with load(stored.folder, cache_dir=stored.cache_dir, memory=small(stored.folder, 1_700_000)) as engine:
        reply = engine.complete(stored.prompts[0], max_tokens=5, ignore_eos=True)
        wait_for(engine, disk)
        growing = engine.complete(words(250, seed=5), max_tokens=265, ignore_eos=True)  # Soon more than 512 - 256.
        until(lambda: not engine._worker._fetching)
        assert engine.health().queued == 1
        disk.go.set()
        assert reply.result().tokens == stored.said[0]
        assert growing.result().finish_reason == "length"
        assert engine.stats()["requests"]["paused"] == 0


def test_a_paused_request_goes_on_from_disk(folder: Path, tmp_path: Path) -> None:
    stored = store(folder, tmp_path, [words(250, seed) for seed in range(3)], tokens=12)
    # Three have room until they are 256 tokens long, and from then on only two.
    with load(folder, cache_dir=tmp_path, memory=small(folder, 2_400_000), prefix_memory=0) as engine:
        replies = [engine.complete(prompt, max_tokens=265, ignore_eos=True) for prompt in stored.prompts]
        for reply, said in zip(replies, stored.said, strict=True):
            ids = (event.id for event in reply if isinstance(event, Token))
            assert tuple(islice(ids, 12)) == said
            reply.cancel()
        assert engine.stats()["requests"]["paused"] > 0
        assert engine.stats()["prefixes"]["disk_hits"] > 3


def broken(path: Path) -> Any:
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("wrong", ["damaged", "gone", "no answer"])
def test_what_cannot_be_read_is_computed(
    stored: Stored, tmp_path: Path, disk: HeldDisk, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    cache_dir = shutil.copytree(stored.cache_dir, tmp_path / "cache")
    with load(stored.folder, cache_dir=cache_dir) as engine:
        reply = engine.complete(stored.prompts[0], max_tokens=5, ignore_eos=True)
        wait_for(engine, disk)
        if wrong == "no answer":
            monkeypatch.setattr(blocks_module, "_opened", broken)
        for path in cache_dir.glob(f"*{SUFFIX}"):
            if wrong == "gone":
                path.unlink()
            elif wrong == "damaged":
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)
        disk.go.set()
        result = reply.result()
    assert (result.tokens, result.usage.cached_tokens) == (stored.said[0], 0)
