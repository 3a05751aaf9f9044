"""Beginnings of prompts kept in memory: what is found again, what it costs, and that it changes nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mixtral_mlx.borrowed import KVCache, QuantizedKVCache, RotatingKVCache
from mixtral_mlx.engine.frozen import Frozen
from mixtral_mlx.engine.prefixes import Kind, Prefixes
from mixtral_mlx.model import Model

from .checkpoints import TINY, random_model

CHUNK = 16
FLOATS, PLAIN = Kind(), 1 << 30
KINDS = {"float": FLOATS, "8 bits": Kind(kv_bits=8), "4 bits": Kind(kv_bits=4), "rotating": Kind(max_kv=48)}


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(replace(TINY, vocab_size=512, hidden_size=32, intermediate_size=32, head_dim=32))


def fresh(kind: Kind, layers: int = TINY.num_hidden_layers) -> list[Any]:
    if kind.kv_bits:
        return [QuantizedKVCache(32, kind.kv_bits) for _ in range(layers)]
    if kind.max_kv:
        return [RotatingKVCache(kind.max_kv, keep=4) for _ in range(layers)]
    return [KVCache() for _ in range(layers)]


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 512, length).tolist()


def read(model: Model, tokens: Sequence[int], caches: list[Any], done: int = 0) -> np.ndarray:
    """The last token's logits, the rest read in chunks before it."""
    while done < len(tokens) - 1:
        end = min(done + CHUNK, len(tokens) - 1)
        model.model(mx.array([tokens[done:end]]), caches)
        mx.eval([cache.state for cache in caches])
        done = end
    return np.array(model(mx.array([tokens[-1:]]), caches)[0, -1])


def continued(model: Model, logits: np.ndarray, caches: list[Any], count: int = 12) -> list[int]:
    """The likeliest tokens from here on."""
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = np.array(model(mx.array([tokens[-1:]]), caches)[0, -1])
    return tokens


def filled(length: int, layers: int = 1, width: int = 8, value: float = 1.0) -> list[Any]:
    """Caches of so many tokens, without a model."""
    caches = fresh(FLOATS, layers)
    for cache in caches:
        cache.update_and_fetch(mx.full((1, 2, length, width), value), mx.full((1, 2, length, width), -value))
    return caches


def nbytes(length: int) -> int:
    """What `filled` comes to."""
    return length * 2 * 2 * 8 * 4


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shared", [1, 16, 17, 40, 64])
def test_after_a_hit_the_model_says_what_it_says_without(model: Model, name: str, shared: int) -> None:
    kind, first = KINDS[name], prompt(72)
    second = first[:shared] + prompt(20, seed=1)
    prefixes, caches = Prefixes(PLAIN), fresh(kind)
    read(model, first[:shared], caches)
    prefixes.keep(kind, first[:shared], caches)

    found = prefixes.find(kind, second)
    assert found
    length, caches = found
    assert length == shared
    same, plain = fresh(kind), fresh(kind)
    read(model, first[:shared], same)
    logits = read(model, second, caches, length)
    assert np.array_equal(logits, read(model, second, same, shared))
    # In a window that has turned, what a token sees depends on where the chunks of the prompt end.
    if shared < (kind.max_kv or PLAIN):
        assert continued(model, logits, caches) == continued(model, read(model, second, plain), plain)


def test_cut_at_a_chunk_the_logits_are_the_same_bits(model: Model) -> None:
    first = prompt(72)
    second = first[:41] + prompt(20, seed=1)
    prefixes, caches = Prefixes(PLAIN), fresh(FLOATS)
    read(model, first, caches)
    prefixes.keep(FLOATS, first, caches)

    found = prefixes.find(FLOATS, second, multiple_of=CHUNK)
    assert found
    length, caches = found
    assert length == 32
    assert np.array_equal(read(model, second, caches, length), read(model, second, fresh(FLOATS)))


@pytest.mark.parametrize(("name", "length"), [*((name, 40) for name in KINDS), ("rotating", 60)])
def test_a_request_that_continued_leaves_what_is_kept_as_it_was(model: Model, name: str, length: int) -> None:
    kind, first = KINDS[name], prompt(length)
    prefixes, caches = Prefixes(PLAIN), fresh(kind)
    read(model, first, caches)
    prefixes.keep(kind, first, caches)

    answers = []
    for seed in (1, 2, 1):
        second = first + prompt(1, seed)
        found = prefixes.find(kind, second)
        assert found
        assert found[0] == length
        answers.append(continued(model, read(model, second, found[1], length), found[1]))
    assert answers[0] == answers[2] != answers[1]


def test_two_requests_may_continue_from_one_beginning_in_turns(model: Model) -> None:
    first = prompt(40)
    prefixes, caches = Prefixes(PLAIN), fresh(FLOATS)
    read(model, first, caches)
    prefixes.keep(FLOATS, first, caches)
    seconds = [first[:cut] + prompt(20, seed=cut) for cut in (30, 40)]
    expected = [read(model, second, fresh(FLOATS)) for second in seconds]

    both = [prefixes.find(FLOATS, second) for second in seconds]
    for at in range(20):
        for n, second in enumerate(seconds):
            found = both[n]
            assert found
            length, caches = found
            if length + at < len(second):
                logits = np.array(model(mx.array([[second[length + at]]]), caches)[0, -1])
                if length + at == len(second) - 1:
                    assert np.abs(logits - expected[n]).max() < 1e-4


def test_the_last_token_is_always_left_to_read() -> None:
    prefixes = Prefixes(PLAIN)
    prefixes.keep(FLOATS, prompt(40), filled(40))
    found = prefixes.find(FLOATS, prompt(40))
    assert found
    assert found[0] == 39
    assert prefixes.find(FLOATS, prompt(1)) is None
    assert prefixes.find(FLOATS, []) is None


def test_what_is_of_another_kind_is_not_found() -> None:
    prefixes = Prefixes(PLAIN)
    prefixes.keep(FLOATS, prompt(40), filled(40))
    for other in (Kind(kv_bits=8), Kind(max_kv=64), Kind(adapter="a")):
        assert prefixes.find(other, prompt(40)) is None
    assert (prefixes.statistics.hits, prefixes.statistics.misses) == (0, 3)


def test_a_window_that_has_turned_is_found_as_a_whole_only(model: Model) -> None:
    kind, tokens = KINDS["rotating"], prompt(80)
    prefixes = Prefixes(PLAIN)
    for length in (30, 60, 70):
        caches = fresh(kind)
        read(model, tokens[:length], caches)
        prefixes.keep(kind, tokens[:length], caches)

    def length_for(asked: list[int], multiple_of: int = 1) -> int:
        found = prefixes.find(kind, asked, multiple_of=multiple_of)
        return found[0] if found else 0

    other = prompt(50, seed=9)
    assert length_for(tokens) == 70
    assert length_for(tokens[:70]) == 60
    assert length_for(tokens[:65] + other) == 60
    assert length_for(tokens[:45] + other) == 30
    assert length_for(tokens[:20] + other) == 20
    assert length_for(tokens, multiple_of=20) == 60
    assert length_for(tokens, multiple_of=12) == 60
    assert length_for(tokens, multiple_of=25) == 25


def test_the_longest_common_beginning_is_found_among_many() -> None:
    random_tokens = random.Random(0)
    sequences = [[random_tokens.randrange(3) for _ in range(random_tokens.randrange(1, 12))] for _ in range(200)]
    prefixes = Prefixes(PLAIN)
    for sequence in sequences:
        prefixes.keep(FLOATS, sequence, filled(len(sequence)))
    for _ in range(500):
        asked = [random_tokens.randrange(3) for _ in range(12)]
        best = max(
            len(list(takewhile(lambda pair: pair[0] == pair[1], zip(sequence, asked[:-1], strict=False))))
            for sequence in sequences
        )
        found = prefixes.find(FLOATS, asked)
        assert (found[0] if found else 0) == best


def test_a_longer_conversation_takes_the_place_of_its_beginning() -> None:
    prefixes, tokens = Prefixes(PLAIN), prompt(60)
    for length in (20, 60, 40, 60):
        prefixes.keep(FLOATS, tokens[:length], filled(length))
    assert prefixes.statistics.entries == 1
    assert prefixes.nbytes == nbytes(60)


def test_what_was_used_longest_ago_goes_first() -> None:
    prefixes = Prefixes(nbytes(30))
    chats = [prompt(10, seed) for seed in range(4)]
    for chat in chats[:3]:
        prefixes.keep(FLOATS, chat, filled(10))
    assert prefixes.find(FLOATS, [*chats[0], 1])
    prefixes.keep(FLOATS, chats[1], filled(10))
    prefixes.keep(FLOATS, chats[3], filled(10))
    assert [bool(prefixes.find(FLOATS, [*chat, 1])) for chat in chats] == [True, True, False, True]
    assert prefixes.drop_oldest()
    assert not prefixes.find(FLOATS, [*chats[0], 1])
    prefixes.shrink_to(nbytes(10))
    assert [bool(prefixes.find(FLOATS, [*chat, 1])) for chat in chats] == [False, False, False, True]
    prefixes.clear()
    assert prefixes.nbytes == 0
    assert not prefixes.drop_oldest()


def test_of_a_prompt_larger_than_the_cap_the_beginning_is_kept() -> None:
    prefixes = Prefixes(nbytes(30))
    prefixes.keep(FLOATS, prompt(100), filled(100))
    found = prefixes.find(FLOATS, prompt(100))
    assert found
    assert found[0] == 30
    none = Prefixes(0)
    none.keep(FLOATS, prompt(100), filled(100))
    assert none.nbytes == 0


def test_a_step_that_reached_some_layers_only_is_kept_as_far_as_all() -> None:
    prefixes, caches = Prefixes(PLAIN), filled(40, layers=2)
    caches[1].trim(8)
    prefixes.keep(FLOATS, prompt(40), caches)
    found = prefixes.find(FLOATS, prompt(40))
    assert found
    assert found[0] == 32
    prefixes.keep(FLOATS, prompt(40, seed=1), fresh(FLOATS))
    assert prefixes.statistics.entries == 1


def test_ten_thousand_prompts_never_take_more_than_the_cap() -> None:
    random_lengths, tokens = random.Random(0), [prompt(64, seed) for seed in range(8)]
    prefixes = Prefixes(nbytes(300))
    key = mx.ones((1, 2, 64, 8))
    mx.eval(key)
    for _ in range(10_000):
        length, chat = random_lengths.randrange(1, 65), random_lengths.choice(tokens)
        start = random_lengths.randrange(3)
        cache = KVCache()
        cache.state = key[..., :length, :], key[..., :length, :], length
        prefixes.keep(FLOATS, [start, *chat[: length - 1]], [cache])
        held = sum(entry.frozen.nbytes for entry in prefixes._entries.values())
        assert prefixes.nbytes == held <= prefixes.most_bytes


@pytest.mark.parametrize("used", [1, 100, 1023])
def test_what_is_kept_holds_on_to_no_larger_memory(used: int) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    prefixes, caches = Prefixes(PLAIN), filled(1024, width=128)
    for cache in caches:
        cache.trim(1024 - used)
    prefixes.keep(FLOATS, prompt(used), caches)
    del cache, caches
    spare = 2 * 16384  # What MLX leaves an array rather than copy it.
    assert prefixes.nbytes <= mx.get_active_memory() - before <= prefixes.nbytes + spare
    prefixes.clear()
    assert mx.get_active_memory() == before


def test_what_was_found_shares_memory_with_what_is_kept() -> None:
    prefixes = Prefixes(PLAIN)
    prefixes.keep(FLOATS, prompt(1000), filled(1000, width=128))
    before = mx.get_active_memory()
    found = prefixes.find(FLOATS, prompt(900))
    assert found
    mx.eval([cache.state[:2] for cache in found[1]])
    assert mx.get_active_memory() == before


def test_frozen_caches_are_new_objects_each_time() -> None:
    frozen = Frozen.of(filled(256), 256)
    assert frozen
    one, other = frozen.caches(256)[0], frozen.caches(256)[0]
    assert len({id(array) for array in (one.keys, other.keys, frozen.layers[0][0])}) == 3
    one.keys[..., :1, :] = 5
    assert other.keys[0, 0, 0, 0].item() == 1
    assert frozen.layers[0][0][0, 0, 0, 0].item() == 1
