"""Experts on the SSD: a streamed model is the resident one, bit for bit, whatever is in memory and whence it comes.

B batch, T tokens."""

from __future__ import annotations

import gc
import json
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from mixtral_mlx import cpu
from mixtral_mlx.config import Config, Packing, Quantization
from mixtral_mlx.experts import WeightFile, converter
from mixtral_mlx.experts import files as files_module
from mixtral_mlx.experts.files import SECTOR
from mixtral_mlx.experts.pool import Pool, StackedTensor, Statistics
from mixtral_mlx.experts.readers import Load, Piece, Readers
from mixtral_mlx.experts.usage import Usage
from mixtral_mlx.generate import Conversation, Sampling, stream_generate
from mixtral_mlx.memory import NORMAL, WARNING
from mixtral_mlx.model import Model
from mixtral_mlx.prompt import Tokenizer
from mixtral_mlx.weights import Loaded, load, relief

from .checkpoints import TINY, random_model, streamed, unstacked, write_tiny, write_weights

LAYERS = 3
SMALL = replace(TINY, vocab_size=200, head_dim=32, num_hidden_layers=LAYERS, max_position_embeddings=8192)
CHUNK = 2048


def packed(config: Config, *packing: Any) -> Config:
    """`config` with experts and all else packed, but the routers in 8 bits."""
    gates = {f"model.layers.{n}.block_sparse_moe.gate": Packing(8, 32) for n in range(LAYERS)}
    return replace(config, quantization=Quantization(Packing(*packing), gates))


Q4 = packed(SMALL, 4, 32)
RECIPES = {
    **{f"q{bits}": packed(SMALL, bits, 32) for bits in (8, 6, 5, 4, 3, 2)},
    **{f"q{bits} in bfloat16": packed(replace(SMALL, dtype="bfloat16"), bits, 32) for bits in (8, 4, 3)},
    "bf16": replace(SMALL, dtype="bfloat16"),
    "f16": replace(SMALL, dtype="float16"),
    "f32": SMALL,
    "mxfp4": packed(SMALL, 4, 32, "mxfp4"),
    "nvfp4": packed(SMALL, 4, 16, "nvfp4"),
    "mxfp8": packed(SMALL, 8, 32, "mxfp8"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("experts") / "q4", Q4)


@pytest.fixture(params=["our kernels", "MLX alone"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes: both are to give the resident model's bits."""
    if request.param == "MLX alone":
        monkeypatch.setattr(cpu, "is_available", lambda: False)
    return request.param


def prompt(tokens: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(tokens).integers(3, SMALL.vocab_size, (batch, tokens))


def answers(model: Model, ids: np.ndarray, steps: int = 5, cache: list[Any] | None = None) -> list[np.ndarray]:
    """The logits of a prompt (B, T), read in chunks, and of greedy tokens after it."""
    cache = make_prompt_cache(model) if cache is None else cache
    starts = [*range(0, ids.shape[1], CHUNK), ids.shape[1]]
    logits = [logits_of(model, ids[:, start:end], cache) for start, end in pairwise(starts)]
    for _ in range(steps):
        logits.append(logits_of(model, logits[-1][:, -1:].argmax(-1), cache))
    return logits


def logits_of(model: Model, ids: Any, cache: list[Any] | None = None) -> np.ndarray:
    return np.array(model(mx.array(ids), cache).astype(mx.float32))


def same(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> bool:
    """Equal to the bit on processors; on a GPU, which adds up few rows in another order than many, to rounding."""
    equal: Callable[[np.ndarray, np.ndarray], bool] = np.array_equal
    if not cpu.is_backend():
        equal = lambda a, b: np.allclose(a, b, rtol=1e-3, atol=1e-3)  # noqa: E731
    return len(ours) == len(theirs) and all(map(equal, ours, theirs))


# Streamed equals resident.


@pytest.mark.parametrize("layers_ahead", [2, 0], ids=["reading ahead", "on demand"])
@pytest.mark.usefixtures("way")
def test_streamed_equals_resident_at_every_number_of_slots(folder: Path, layers_ahead: int) -> None:
    resident = load(folder).model
    prompts = [prompt(1), prompt(17), prompt(17, batch=4)]
    expected = [answers(resident, ids, 3) for ids in prompts]
    for slots in (*range(1, 9), (1, 8, 3), (8, 2, 8)):
        with streamed(folder, slots, layers_ahead=layers_ahead) as loaded:
            for ids, logits in zip(prompts, expected, strict=True):
                assert same(answers(loaded.model, ids, 3), logits), (slots, ids.shape)


@pytest.mark.parametrize(("batch", "counts"), [(1, (1, 5)), (4, (3,))])
@pytest.mark.usefixtures("way")
def test_streamed_equals_resident_after_600_tokens(folder: Path, batch: int, counts: tuple[int, ...]) -> None:
    ids = prompt(600, batch)
    expected = answers(load(folder).model, ids, 2)
    for slots in counts:
        with streamed(folder, slots) as loaded:
            assert same(answers(loaded.model, ids, 2), expected), slots


def test_streamed_equals_resident_after_5000_tokens_in_chunks(folder: Path) -> None:
    ids = prompt(5000)
    expected = answers(load(folder).model, ids)
    with streamed(folder, 3) as loaded:
        assert same(answers(loaded.model, ids), expected)


@pytest.mark.usefixtures("way")
def test_no_more_than_a_layers_outputs_are_held_after_a_prompt(folder: Path) -> None:
    ids = prompt(256)
    with streamed(folder, 3) as loaded:
        mx.eval(loaded.model(mx.array(ids)))
        assert loaded.streaming
        held = {id(array): array.nbytes for pool in loaded.streaming.pools for array in pool.unevaluated}
        assert sum(held.values()) <= ids.size * SMALL.num_experts_per_tok * SMALL.hidden_size * 4


@pytest.mark.parametrize("slots", [3, (8, 3, 3), 8])
@pytest.mark.usefixtures("way")
def test_slots_may_be_given_up_before_every_step(folder: Path, slots: Any) -> None:
    with streamed(folder, slots) as loaded:
        assert loaded.streaming
        steps: list[int] = []
        loaded.streaming.before_step = lambda: steps.append(0)
        answers(loaded.model, prompt(64), 5)
        assert len(steps) == 6


@pytest.mark.usefixtures("way")
def test_a_lasting_warning_takes_a_slot_of_each_layer_each_second_while_tokens_are_made(folder: Path) -> None:
    level = [WARNING]
    with streamed(folder, 4) as loaded:
        assert loaded.streaming
        eased = relief(loaded.streaming, pressure=lambda: level[0])
        seconds = iter(range(0, 10**6, 31))
        eased._clock = lambda: next(seconds)
        loaded.streaming.before_step = eased.check
        ids = prompt(9)
        expected, slots = answers(load(folder).model, ids, 6), []
        cache = make_prompt_cache(loaded.model)
        assert same(answers(loaded.model, ids, 2, cache), expected[:3])
        slots.append(loaded.streaming.slots)
        level[0] = NORMAL
        assert same(answers(loaded.model, ids, 6), expected)
        slots.append(loaded.streaming.slots)
    assert slots == [(1, 1, 1), (4, 4, 4)]


@pytest.mark.usefixtures("way")
def test_experts_are_guessed_from_a_layer_that_has_all_of_its_own(folder: Path) -> None:
    with streamed(folder, (8, 3, 3), layers_ahead=1) as loaded:
        assert loaded.streaming
        answers(loaded.model, prompt(64), 1)
        first, second = loaded.streaming.layers[:2]
        assert first.stream.pool.is_whole
        asked: list[int] = []
        second.stream.pool.read_ahead = lambda guessed: asked.append(len(guessed))  # type: ignore[method-assign]
        answers(loaded.model, prompt(1), 3)
        assert len(asked) == 4


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.usefixtures("way")
def test_streamed_equals_resident_in_every_recipe(tmp_path: Path, recipe: str) -> None:
    folder = write_tiny(tmp_path / "tiny", RECIPES[recipe], tokenizer=None)
    resident = load(folder)
    for slots in (2, (3, 8, 5)):
        with streamed(folder, slots) as loaded:
            assert loaded.dtype == resident.dtype
            for ids in (prompt(9), prompt(17, batch=2)):
                assert same(answers(loaded.model, ids, 3), answers(resident.model, ids, 3))


def assert_streamed_equals_resident(folder: Path, *prompts: np.ndarray) -> None:
    """With 2 to 8 slots in each layer, reading ahead and on demand."""
    resident = load(folder).model
    expected = [answers(resident, ids, 3) for ids in prompts]
    for slots, layers_ahead in product(range(2, 9), (2, 0)):
        with streamed(folder, slots, layers_ahead=layers_ahead) as loaded:
            for ids, logits in zip(prompts, expected, strict=True):
                assert same(answers(loaded.model, ids, 3), logits), (slots, layers_ahead, ids.shape)


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.usefixtures("way")
def test_streamed_equals_resident_after_600_tokens_at_every_number_of_slots(folder: Path, batch: int) -> None:
    assert_streamed_equals_resident(folder, prompt(600, batch))


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 4])
def test_streamed_equals_resident_after_5000_tokens_at_every_number_of_slots(folder: Path, batch: int) -> None:
    assert_streamed_equals_resident(folder, prompt(5000, batch))


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.usefixtures("way")
def test_streamed_equals_resident_in_every_recipe_at_every_number_of_slots(tmp_path: Path, recipe: str) -> None:
    folder = write_tiny(tmp_path / "tiny", RECIPES[recipe], tokenizer=None)
    assert_streamed_equals_resident(folder, prompt(1), prompt(17, batch=4), prompt(600))


BATCHES = st.tuples(st.just("tokens"), st.integers(1, 4), st.integers(1, 12), st.integers(0, 9))
CHANGES = st.tuples(st.sampled_from(["give up", "take back"]))
SIZES = st.tuples(st.just("resize"), st.tuples(*[st.integers(1, 8)] * LAYERS))
GUESSES = st.tuples(st.just("guess"), st.integers(0, LAYERS - 1), st.permutations(range(8)), st.integers(1, 8))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[Model, Loaded]]:
    with streamed(folder, (2, 3, 4)) as loaded:
        yield load(folder).model, loaded


@settings(max_examples=25, deadline=None)
@given(actions=st.lists(st.one_of(BATCHES, BATCHES, GUESSES, CHANGES, SIZES), min_size=3, max_size=12))
def test_no_order_of_steps_guesses_and_changes_of_memory_alters_a_bit(
    pair: tuple[Model, Loaded], actions: list[tuple[Any, ...]]
) -> None:
    resident, loaded = pair
    streaming = loaded.streaming
    assert streaming
    for kind, *rest in [*actions, ("tokens", 2, 9, 0)]:
        if kind == "tokens":
            batch, tokens, seed = rest
            ids = np.random.default_rng(seed).integers(3, SMALL.vocab_size, (batch, tokens))
            assert same([logits_of(loaded.model, ids)], [logits_of(resident, ids)])
        elif kind == "guess":
            layer, experts, count = rest
            streaming.pools[layer].read_ahead(experts[:count])
        elif kind == "give up":
            streaming.give_up()
        elif kind == "take back":
            streaming.take_back()
        else:
            streaming._resize(rest[0])


@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.usefixtures("way")
def test_a_quantized_cache_gives_the_same_streamed(folder: Path, kv_bits: int) -> None:
    resident = load(folder).model
    with streamed(folder, 2) as loaded:
        for ids in (prompt(17), prompt(300)):
            ours, theirs = (
                answers(model, ids, cache=Conversation(model, kv_bits=kv_bits).cache)
                for model in (loaded.model, resident)
            )
            assert same(ours, theirs)


def adapt(model: Model) -> None:
    """Put seeded adapters around attention and experts."""
    model.freeze()
    mx.random.seed(3)
    keys = [f"self_attn.{name}_proj" for name in "qkvo"]
    keys += [f"block_sparse_moe.switch_mlp.{name}_proj" for name in ("gate", "up", "down")]
    linear_to_lora_layers(model, LAYERS, {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": keys})
    for name, array in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            array[:] = mx.random.normal(array.shape) * 0.02
    model.eval()


@pytest.mark.usefixtures("way")
def test_adapters_give_the_same_streamed_also_after_memory_was_given_up(folder: Path) -> None:
    resident = load(folder).model
    plain = answers(resident, prompt(17))
    adapt(resident)
    expected = [answers(resident, ids) for ids in (prompt(17), prompt(90))]
    assert not same(expected[0], plain)
    with streamed(folder, 4) as loaded:
        adapt(loaded.model)
        assert loaded.streaming
        for change in (lambda: None, loaded.streaming.give_up, loaded.streaming.take_back):
            change()
            assert same(answers(loaded.model, prompt(17)), expected[0])
            assert same(answers(loaded.model, prompt(90)), expected[1])


@pytest.mark.usefixtures("way")
def test_two_conversations_in_turns_get_their_own_answers(folder: Path) -> None:
    resident = load(folder).model
    ids = prompt(17), prompt(40)
    expected = [answers(resident, each) for each in ids]
    with streamed(folder, 2) as loaded:
        caches = [make_prompt_cache(loaded.model) for _ in ids]
        ours = [[logits_of(loaded.model, each, cache)] for each, cache in zip(ids, caches, strict=True)]
        for _ in range(5):
            for logits, cache in zip(ours, caches, strict=True):
                logits.append(logits_of(loaded.model, logits[-1][:, -1:].argmax(-1), cache))
        assert all(map(same, ours, expected))


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_cancelled_generation_leaves_nothing_behind(folder: Path, after: int) -> None:
    tokenizer = Tokenizer.read(folder)
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    first, second = (each[0].tolist() for each in (prompt(30), prompt(50)))
    expected = [chunk.token for chunk in stream_generate(load(folder).model, tokenizer, second, sampling)]
    with streamed(folder, 2) as loaded:
        conversation = Conversation(loaded.model)
        seen: list[Any] = []
        for chunk in stream_generate(
            loaded.model,
            tokenizer,
            first,
            sampling,
            conversation=conversation,
            cancelled=lambda: len(seen) >= after,
        ):
            seen.append(chunk)
        assert seen[-1].finish_reason == "cancelled"
        again = stream_generate(loaded.model, tokenizer, second, sampling, conversation=conversation)
        assert [chunk.token for chunk in again] == expected


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.usefixtures("way")
def test_what_nobody_has_looked_at_yet_is_right_though_its_slots_went_to_others(folder: Path, slots: int) -> None:
    resident = load(folder).model
    with streamed(folder, slots) as loaded:
        assert loaded.streaming
        ids = [prompt(tokens) for tokens in (2, 3, 5, 9)]
        lazy = [loaded.model(mx.array(each)) for each in ids]
        loaded.streaming.give_up()
        lazy.append(loaded.model(mx.array(ids[0])))
        ours = [np.array(logits) for logits in lazy]
        assert same(ours, [logits_of(resident, each) for each in [*ids, ids[0]]])


# Where experts come from.


def write_unstacked(folder: Path, config: Config, shards: int, padding: int) -> Path:
    """An expert a tensor, dealt out to files whose headers are made longer by `padding` bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    arrays = unstacked(dict(tree_flatten(random_model(config).parameters())))
    names = list(arrays)
    write_weights(folder, *({name: arrays[name] for name in names[n::shards]} for n in range(shards)))
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + length].rstrip()
        header += b" " * (padding + -len(header) % 8)
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return folder


@pytest.mark.parametrize("padding", [0, 1, 2, 4, 7, 8, 4000])
def test_any_layout_and_alignment_of_files_streams_to_the_same_bits(tmp_path: Path, padding: int) -> None:
    folder = write_unstacked(tmp_path / "torn", Q4, shards=3, padding=padding)
    resident = load(folder).model
    with streamed(folder, (2, 3, 8)) as loaded:
        for ids in (prompt(17), prompt(17, batch=4)):
            assert same(answers(loaded.model, ids), answers(resident, ids))


@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_another_dtype_than_the_files_is_the_resident_models(
    tmp_path: Path, source: str, target: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: False)  # Its kernels need no cast.
    config = replace(Q4, dtype=source)
    if form == "stacked":
        folder = write_tiny(tmp_path / "tiny", config, tokenizer=None)
    else:
        folder = write_unstacked(tmp_path / "tiny", config, shards=2, padding=1)
    resident = load(folder, dtype=target)
    with streamed(folder, (1, 2, 8), dtype=target) as loaded:
        assert loaded.dtype == resident.dtype == target
        assert same(answers(loaded.model, prompt(17)), answers(resident.model, prompt(17)))


def test_older_folders_with_a_router_of_floats_stream_too(tmp_path: Path) -> None:
    gates = {f"model.layers.{n}.block_sparse_moe.gate": None for n in range(LAYERS)}
    written = replace(SMALL, dtype="float16", quantization=Quantization(Packing(4, 32), gates))
    folder = write_unstacked(tmp_path / "old", written, shards=2, padding=0)
    said = replace(written, quantization=Quantization(Packing(4, 32)))
    (folder / "config.json").write_text(json.dumps(said.to_dict()))
    resident = load(folder).model
    with streamed(folder, 2) as loaded:
        assert same(answers(loaded.model, prompt(17)), answers(resident, prompt(17)))


STORED = {"F32": (mx.float32, np.uint32), "F16": (mx.float16, np.uint16), "BF16": (mx.bfloat16, np.uint16)}


def bit_patterns(dtype: str) -> np.ndarray:
    """All halves there are; of float32 what is special, everything near a tie, and a seeded sample."""
    if dtype != "F32":
        return np.arange(1 << 16, dtype=np.uint16)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    ties = [upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x1001, 0x2FFF, 0x3000)]
    sample = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    return np.concatenate([*ties, sample])


@pytest.mark.parametrize("target", STORED)
@pytest.mark.parametrize("stored", STORED)
def test_floats_are_converted_as_mlx_converts_them(stored: str, target: str) -> None:
    convert = converter(stored, target)
    assert (convert is None) == (stored == target)
    if convert is None:
        return
    bits = bit_patterns(stored)
    out = np.zeros(len(bits), STORED[target][1])
    convert(memoryview(bits.data).cast("B"), memoryview(out.data).cast("B"))
    expected = mx.array(bits).view(STORED[stored][0]).astype(STORED[target][0])
    theirs = np.array(expected.view(mx.uint32 if target == "F32" else mx.uint16))
    numbers = ~np.array(mx.isnan(expected))
    assert np.array_equal(out[numbers], theirs[numbers])
    ours = mx.array(out).view(STORED[target][0])
    assert np.array_equal(~np.array(mx.isnan(ours)), numbers)


# Files.


SIZE = 5 * SECTOR + 123


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    path = tmp_path_factory.mktemp("files") / "weights"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "plain"])
def test_reads_give_the_files_bytes_at_every_offset_and_into_every_address(
    file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    weights = WeightFile(file)
    memory = memoryview(bytearray(SIZE + 2 * SECTOR))

    @settings(max_examples=150, deadline=None)
    @given(
        offset=st.integers(0, SIZE), size=st.integers(0, SIZE), at=st.integers(0, 2 * SECTOR - 1), aligned=st.booleans()
    )
    def reads(offset: int, size: int, at: int, aligned: bool) -> None:
        size = min(size, SIZE - offset)
        if aligned:  # As far from a page's begin as the bytes are in their sector.
            at = (offset - files_module._address(memory)) % SECTOR
        memory[:] = bytes(len(memory))
        weights.read(memory[at : at + size], offset)
        assert memory[at : at + size] == content[offset : offset + size]
        assert not any(memory[:at])
        assert not any(memory[at + size :])

    reads()


# Readers.


class Disk:
    """Stands for a file: notes what is read, and lets no read return before `go` unless it is open."""

    def __init__(self, *, is_open: bool = True, error: Exception | None = None) -> None:
        self.read_offsets: list[int] = []
        self.is_open = is_open
        self.go = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.error = error

    def read(self, view: memoryview, offset: int) -> None:
        self.read_offsets.append(offset)
        self.begun.release()
        if not self.is_open:
            self.go.acquire()
        if self.error:
            raise self.error
        view[:] = bytes([offset % 256]) * len(view)

    def open(self) -> None:
        """Let every read return."""
        self.is_open = True
        self.go.release(64)


def load_of(disk: Any, *offsets: int) -> Load:
    return Load([Piece(disk, offset, 4, memoryview(bytearray(4))) for offset in offsets])


@pytest.fixture
def one_reader() -> Iterator[Readers]:
    """A single thread, so that there is an order."""
    readers = Readers(threads=1)
    yield readers
    readers.close()


def finish(readers: Readers, *loads: Load) -> None:
    for each in loads:
        readers.first_done([each])


def test_what_is_waited_for_is_read_before_what_is_guessed(one_reader: Readers) -> None:
    disk = Disk(is_open=False)
    first, guess, urgent = load_of(disk, 0), load_of(disk, 10, 11), load_of(disk, 20, 21)
    one_reader.start(first)
    disk.begun.acquire()
    one_reader.start(guess, ahead=True)
    one_reader.start(urgent)
    assert one_reader.queued_bytes == 16
    disk.go.release(5)
    finish(one_reader, first, guess, urgent)
    assert disk.read_offsets == [0, 20, 21, 10, 11]
    assert one_reader.bytes_read == 20


def test_a_load_is_not_done_while_its_last_part_is_on_its_way_to_a_thread(one_reader: Readers) -> None:
    load = load_of(Disk(), 0)
    seen: list[bool] = []

    class Watched(deque[Piece]):
        def popleft(self) -> Piece:
            part = super().popleft()
            seen.append(load.is_done)  # Here another thread may look.
            return part

    load.waiting = Watched(load.waiting)
    one_reader.start(load)
    finish(one_reader, load)
    assert seen == [False]


def test_a_guess_that_came_true_no_longer_waits_behind_other_guesses(one_reader: Readers) -> None:
    disk = Disk(is_open=False)
    first, wrong, true = load_of(disk, 0), load_of(disk, 10), load_of(disk, 20)
    one_reader.start(first)
    disk.begun.acquire()
    one_reader.start(wrong, ahead=True)
    one_reader.start(true, ahead=True)
    one_reader.hurry(true)
    disk.go.release(3)
    finish(one_reader, first, wrong, true)
    assert disk.read_offsets == [0, 20, 10]


def test_a_cancelled_load_begins_no_further_part_and_is_done_with_the_one_it_was_at(one_reader: Readers) -> None:
    disk = Disk(is_open=False)
    begun, queued = load_of(disk, 0, 1, 2), load_of(disk, 10)
    one_reader.start(begun)
    one_reader.start(queued, ahead=True)
    disk.begun.acquire()
    one_reader.cancel(begun)
    one_reader.cancel(queued)
    assert not begun.is_done
    assert queued.is_done
    disk.go.release()
    finish(one_reader, begun)
    assert disk.read_offsets == [0]
    last = load_of(disk, 30)
    disk.go.release()
    one_reader.start(last)
    finish(one_reader, last)
    assert disk.read_offsets == [0, 30]


def test_an_error_belongs_to_its_load_alone(one_reader: Readers) -> None:
    broken, whole = Disk(error=OSError("broken")), Disk()
    bad, good = load_of(broken, 0, 1, 2), load_of(whole, 10)
    one_reader.start(bad)
    one_reader.start(good)
    finish(one_reader, bad, good)
    assert str(bad.error) == "broken"
    assert broken.read_offsets == [0]
    assert good.error is None


def test_parts_cover_an_expert_without_overlap_and_are_cut_at_sectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_mlx.experts.readers.PART_BYTES", 2 * SECTOR)
    disk: Any = Disk()
    for offset, size in ((0, 7 * SECTOR), (5000, 7 * SECTOR + 1), (1, 2 * SECTOR), (4095, 2 * SECTOR + 1)):
        parts = list(Load([Piece(disk, offset, size, memoryview(bytearray(size)))]).waiting)
        assert [part.offset for part in parts] == [offset, *(part.offset + part.nbytes for part in parts[:-1])]
        assert parts[-1].offset + parts[-1].nbytes == offset + size
        assert all(part.offset % SECTOR == 0 for part in parts[1:])


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("expert-reader")]


def test_closing_ends_every_thread_after_what_it_is_reading() -> None:
    before = reading_threads()
    readers, disk = Readers(), Disk(is_open=False)
    loads = [load_of(disk, n) for n in range(40)]
    for each in loads:
        readers.start(each)
    for _ in range(8):
        disk.begun.acquire()
    disk.go.release(8)
    readers.close()
    assert reading_threads() == before
    assert len(disk.read_offsets) < 40
    readers.close()


def test_readers_may_be_closed_by_one_of_their_own_threads_whatever_it_is_at() -> None:
    """Garbage is collected on any thread, also on a reader's, while it holds the lock."""
    before = reading_threads()
    readers = Readers()

    class Last(Load):
        def __setattr__(self, name: str, value: Any) -> None:
            if threading.current_thread() in readers._threads:
                readers.close()
            super().__setattr__(name, value)

    readers.start(Last(load_of(Disk(), 0).waiting))
    for thread in readers._threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert reading_threads() == before


def open_files(folder: Path) -> list[Path]:
    found = []
    for descriptor in Path("/dev/fd").iterdir():
        if descriptor.is_symlink():  # On Linux; elsewhere they cannot be told.
            found.append(descriptor.readlink())
    return [path for path in found if folder in path.parents]


def test_a_model_nobody_has_any_more_leaves_no_thread_and_no_open_file(folder: Path) -> None:
    gc.collect()
    threads, files = reading_threads(), open_files(folder)
    with streamed(folder, 2) as loaded:
        model = loaded.model
        loaded.streaming.close = lambda: None  # type: ignore[union-attr, method-assign]
    del loaded
    gc.collect()
    assert len(reading_threads()) > len(threads)
    logits_of(model, prompt(9))  # The model alone keeps what it needs.
    del model
    gc.collect()
    assert reading_threads() == threads
    assert open_files(folder) == files


# Pools.


class Layer:
    """A pool of eight experts, each four floats that say which it is, on a disk that notes what is read."""

    def __init__(self, slots: int, *, is_open: bool = True) -> None:
        self.disk = Disk(is_open=is_open)
        disk: Any = self.disk
        tensor = StackedTensor("up_proj.weight", (4,), mx.uint8, tuple((disk, expert) for expert in range(8)), 4)
        self.readers, self.usage, self.counts = Readers(), Usage(8), Statistics()
        self.pool = Pool([tensor], slots, self.usage, self.readers, self.counts)

    def __enter__(self) -> Layer:
        return self

    def __exit__(self, *_: object) -> None:
        self.disk.open()
        self.readers.close()

    def take(self, *needed: int) -> list[int]:
        """Ask for experts and look at each when it is there; returns their order."""
        order = []
        for wave in self.pool.ask(needed):
            for expert in wave:
                slot = self.pool.slot_of[expert]
                assert np.array(self.pool.arrays["up_proj.weight"])[slot].tolist() == [expert] * 4
            order += wave
        assert sorted(order) == sorted(needed)
        return order

    @property
    def held(self) -> set[int]:
        return {expert for expert in self.pool.slots if expert >= 0}


@pytest.mark.parametrize("slots", range(1, 9))
def test_a_prompt_reads_each_expert_at_most_once_and_what_is_wanted_most_stays(slots: int) -> None:
    with Layer(slots) as layer:
        for count, chosen in ((8, [5, 2]), (4, [5, 6]), (2, [5, 2]), (1, [0, 1])):
            for _ in range(count):
                layer.usage.add(chosen)
        for _ in range(2):
            before, held = len(layer.disk.read_offsets), layer.held
            layer.take(*range(8))
            read = layer.disk.read_offsets[before:]
            assert sorted(read) == sorted(set(range(8)) - held)
        best = sorted(range(8), key=layer.usage.scores.__getitem__, reverse=True)
        assert set(best[: max(slots - 2, 0)]) <= layer.held
        assert layer.counts.hits + layer.counts.misses == 16


def test_what_is_in_memory_is_not_read_again() -> None:
    with Layer(4) as layer:
        layer.take(3, 6)
        layer.take(6, 3)
        layer.take(3)
        assert sorted(layer.disk.read_offsets) == [3, 6]
        assert (layer.counts.hits, layer.counts.misses) == (3, 2)


def test_the_least_wanted_is_given_up_and_never_what_the_step_needs() -> None:
    with Layer(3) as layer:
        for needed in ([1, 2], [1, 4], [1, 2]):
            layer.usage.add(needed)
            layer.take(*needed)
        layer.take(7)
        assert layer.held == {1, 2, 7}


def test_a_whole_layer_reads_each_expert_once_and_then_does_nothing() -> None:
    with Layer(8) as layer:
        layer.take(5, 1)
        assert not layer.pool.is_whole
        layer.take(*range(8))
        layer.pool.ask([])
        assert layer.pool.is_whole
        assert sorted(layer.disk.read_offsets) == list(range(8))
        layer.pool.read_ahead(range(8))
        assert not layer.pool.loads
        assert layer.pool.slots == list(range(8))


def test_a_guess_that_came_true_is_counted_and_waits_for_nothing_but_itself() -> None:
    with Layer(4) as layer:
        layer.pool.read_ahead([6, 3])
        layer.take(3, 5)
        assert (layer.counts.ahead_reads, layer.counts.ahead_used) == (2, 1)
        assert sorted(layer.disk.read_offsets)[:2] == [3, 5]


def test_guesses_never_take_the_slots_of_what_is_guessed_too() -> None:
    with Layer(2) as layer:
        layer.take(0, 1)
        layer.pool.read_ahead([0, 1, 2, 3])
        assert not layer.pool.loads
        assert layer.held == {0, 1}


def test_a_slot_that_is_still_being_written_is_given_to_nobody() -> None:
    with Layer(2, is_open=False) as layer:
        layer.pool.read_ahead([6, 7])
        for _ in range(2):
            layer.disk.begun.acquire()
        waves = layer.pool.ask([1])  # Neither guess came true, both are being read.
        assert layer.pool.loads == {}
        layer.disk.open()
        assert list(waves) == [[1]]
        layer.take(1, 6)


def test_slots_that_were_given_up_are_nobodys_memory() -> None:
    with Layer(4) as layer:
        layer.take(*range(8))
        (given_up,) = (weakref.ref(array) for array in layer.pool.arrays.values())
        adopted: dict[str, mx.array] = {}
        layer.pool.resize(1, adopted.__setitem__)
        gc.collect()
        assert given_up() is None
        assert adopted == layer.pool.arrays
        assert not any(type(each) is Piece and len(each.view) == 4 for each in gc.get_objects())


@pytest.mark.parametrize("after", range(1, 9))
@pytest.mark.parametrize("before", range(1, 9))
def test_another_number_of_slots_keeps_what_is_wanted_most(before: int, after: int) -> None:
    with Layer(before) as layer:
        for expert in range(8):
            layer.usage.add([expert])
            layer.take(expert)
        held = layer.held
        adopted: dict[str, mx.array] = {}
        layer.pool.resize(after, adopted.__setitem__)
        assert layer.held == set(sorted(held)[-after:])
        read = len(layer.disk.read_offsets)
        if layer.held:
            layer.take(*layer.held)
        assert len(layer.disk.read_offsets) == read
        layer.take(*range(8))
