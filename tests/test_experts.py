"""Experts on the SSD: a streamed model is the resident one, bit for bit, whatever is in memory and wherever it comes from.

B batch, T tokens."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
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
from mixtral_mlx.experts import Streaming, WeightFile, converter
from mixtral_mlx.experts import files as files_module
from mixtral_mlx.experts.files import SECTOR
from mixtral_mlx.experts.pool import Pool, StackedTensor, Statistics
from mixtral_mlx.experts.readers import Load, Piece, Readers
from mixtral_mlx.experts.usage import Usage
from mixtral_mlx.generate import Conversation, Sampling, stream_generate
from mixtral_mlx.model import Model
from mixtral_mlx.prompt import Tokenizer
from mixtral_mlx.weights import Loaded, load

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


@pytest.mark.parametrize("read_ahead", [True, False], ids=["reading ahead", "on demand"])
@pytest.mark.usefixtures("way")
def test_streamed_equals_resident_at_every_number_of_slots(folder: Path, read_ahead: bool) -> None:
    resident = load(folder).model
    prompts = [prompt(1), prompt(17), prompt(17, batch=4)]
    expected = [answers(resident, ids) for ids in prompts]
    for slots in (*range(1, 9), (1, 8, 3), (8, 2, 8)):
        with streamed(folder, slots, read_ahead=read_ahead) as loaded:
            for ids, logits in zip(prompts, expected, strict=True):
                assert same(answers(loaded.model, ids), logits), (slots, ids.shape)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.usefixtures("way")
def test_streamed_equals_resident_after_600_tokens(folder: Path, batch: int) -> None:
    ids = prompt(600, batch)
    expected = answers(load(folder).model, ids)
    for slots in (1, 2, 5, 7):
        with streamed(folder, slots) as loaded:
            assert same(answers(loaded.model, ids), expected), slots


def test_streamed_equals_resident_after_5000_tokens_in_chunks(folder: Path) -> None:
    ids = prompt(5000)
    expected = answers(load(folder).model, ids)
    for slots in (1, 3):
        with streamed(folder, slots) as loaded:
            assert same(answers(loaded.model, ids), expected), slots


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.usefixtures("way")
def test_streamed_equals_resident_in_every_recipe(tmp_path: Path, recipe: str) -> None:
    folder = write_tiny(tmp_path / "tiny", RECIPES[recipe], tokenizer=None)
    resident = load(folder)
    for slots in (2, (3, 8, 5)):
        with streamed(folder, slots) as loaded:
            assert loaded.dtype == resident.dtype
            for ids in (prompt(17), prompt(40, batch=2)):
                assert same(answers(loaded.model, ids), answers(resident.model, ids))


BATCHES = st.tuples(st.just("tokens"), st.integers(1, 4), st.integers(1, 12), st.integers(0, 9))
CHANGES = st.tuples(st.sampled_from(["give up", "take back"]))
SIZES = st.tuples(st.just("resize"), st.tuples(*[st.integers(1, 8)] * LAYERS))
GUESSES = st.tuples(st.just("guess"), st.integers(0, LAYERS - 1), st.permutations(range(8)), st.integers(1, 8))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[Model, Loaded]]:
    with streamed(folder, (2, 3, 4)) as loaded:
        yield load(folder).model, loaded


@settings(max_examples=40, deadline=None)
@given(actions=st.lists(st.one_of(BATCHES, BATCHES, GUESSES, CHANGES, SIZES), min_size=3, max_size=14))
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
    (folder / "config.json").write_text(json.dumps(packed(replace(SMALL, dtype="float16"), 4, 32).to_dict()))
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
    convert(memoryview(bits).cast("B"), memoryview(out).cast("B"))
    expected = mx.array(bits).view(STORED[stored][0]).astype(STORED[target][0])
    theirs = np.array(expected.view(mx.uint32 if target == "F32" else mx.uint16))
    numbers = ~np.array(mx.isnan(expected))
    assert np.array_equal(out[numbers], theirs[numbers])
    ours = mx.array(out).view(STORED[target][0])
    assert np.array_equal(~np.array(mx.isnan(ours)), numbers)
