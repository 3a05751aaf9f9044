"""The engine: each request gets what it would get alone, and nothing that goes wrong with one is felt by another."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import math
import os
import random
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mixtral_mlx.config import MixtralError
from mixtral_mlx.convert.perplexity import perplexity
from mixtral_mlx.engine import batch, parking
from mixtral_mlx.engine.answering import Answering
from mixtral_mlx.engine.engine import Engine, load
from mixtral_mlx.engine.grammar import Compiler, Format, GrammarError, Matcher
from mixtral_mlx.engine.reply import Channel, Reply
from mixtral_mlx.engine.request import (
    Done,
    EngineError,
    PromptProgress,
    Request,
    Result,
    Token,
    ToolCallDelta,
)
from mixtral_mlx.engine.tools import ToolChoice
from mixtral_mlx.engine.worker import Worker
from mixtral_mlx.generate import Conversation, Sampling, Usage, stream_generate
from mixtral_mlx.memory import rss_bytes
from mixtral_mlx.prompt import Message, Tokenizer, Tool, ToolCall
from mixtral_mlx.weights import load as load_weights
from mixtral_mlx.weights import locate

from .checkpoints import Q4, TINY, write_tiny

CONFIG = replace(TINY, head_dim=32, quantization=Q4)
WEATHER = Tool("weather", "The weather", {"type": "object", "properties": {"city": {"enum": ["Rome"]}}})
WEATHER.parameters.update(required=["city"], additionalProperties=False)
SHORT_OBJECT = Format(
    "json_schema",
    {
        "type": "object",
        "properties": {"kind": {"enum": ["first", "second", "third"]}, "count": {"type": "integer", "maximum": 99}},
        "required": ["kind", "count"],
        "additionalProperties": False,
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model", CONFIG)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with load(folder) as engine:
        yield engine


def words(count: int, seed: int = 0) -> list[int]:
    chosen = random.Random(seed)
    return [1, *(chosen.randrange(3, 32000) for _ in range(count - 1))]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0)


def active_threads() -> int:
    """Threads, without those that have run a model and are parked for the next."""
    return sum(thread.name != parking.NAME for thread in threading.enumerate())


def os_threads() -> int:
    """Threads of the process, those that know nothing of Python included; 0 where that cannot be told."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 0


def on_thread(engine: Engine, function: Callable[[], Any]) -> Any:
    """What `function` says on the engine's thread, between two steps."""
    return engine._worker.call(lambda opened: function()).result()


def code_of(ask: Callable[[], Any]) -> str:
    with pytest.raises(MixtralError) as caught:
        ask()
    return caught.value.code


def outcome(reply: Reply) -> tuple[str, Result | None]:
    """The code of the error a request ended with, or else its result."""
    try:
        return "", reply.result()
    except MixtralError as error:
        return error.code, None


def failing(reply: Reply) -> str:
    return code_of(reply.result)


# Alone.


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=12),
        Sampling(max_tokens=12, temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, seed=7),
        Sampling(max_tokens=12, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5, top_logprobs=3),
        Sampling(max_tokens=12, temperature=1.0, seed=3, logit_bias={5: 9.0, 17: 8.0}, min_tokens=12),
        Sampling(max_tokens=40, temperature=2.0, seed=1, ignore_eos=True),
    ],
    ids=["greedy", "sampled", "penalties", "bias", "bold"],
)
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_request_alone_is_answered_as_on_the_plain_path(
    engine: Engine, folder: Path, sampling: Sampling, kv_bits: int | None
) -> None:
    prompt = words(30)
    loaded = load_weights(folder)
    chunks = list(
        stream_generate(
            loaded.model,
            Tokenizer.read(folder),
            prompt,
            sampling,
            conversation=Conversation(loaded.model, kv_bits=kv_bits),
        )
    )
    result = engine.submit(Request(tuple(prompt), sampling, kv_bits=kv_bits)).result()
    assert list(result.tokens) == [chunk.token for chunk in chunks]
    assert result.text == "".join(chunk.text for chunk in chunks)
    assert list(result.logprobs) == pytest.approx([chunk.logprob for chunk in chunks], abs=1e-4)
    assert [len(top) for top in result.top_logprobs] == [sampling.top_logprobs] * len(chunks)
    assert result.finish_reason == chunks[-1].finish_reason
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (30, len(chunks))


def test_a_stop_string_ends_a_text_before_it_and_is_told(engine: Engine) -> None:
    whole = engine.complete(words(10), max_tokens=20).result()
    stop = whole.text[8:12]
    result = engine.complete(words(10), max_tokens=20, stop=("\0", stop)).result()
    assert (result.text, result.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert (result.stop_text, whole.stop_text) == (stop, "")


def test_events_come_in_order(engine: Engine) -> None:
    mixed = list(engine.complete([*words(1100, seed=5)[1:], 7], max_tokens=3))
    progress = list(takewhile(lambda event: isinstance(event, PromptProgress), mixed))
    assert [(event.done, event.total) for event in progress if isinstance(event, PromptProgress)] == [
        (0, 1100),
        (512, 1100),
        (1024, 1100),
        (1099, 1100),
        (1100, 1100),
    ]
    assert [type(event) for event in mixed[len(progress) :]] == [Token, Token, Token, Done]


def test_echo_repeats_the_text_first(engine: Engine) -> None:
    result = engine.complete("Hello there", max_tokens=2, echo=True).result()
    assert result.text.startswith("Hello there")
    assert len(result.tokens) == 2


@pytest.fixture
def running_ahead(folder: Path) -> Iterator[Engine]:
    """An engine whose model runs by itself, as on Metal; what it says is the same here."""
    with load(folder) as engine:
        assert engine.loaded
        engine.loaded.model.runs_ahead = True
        yield engine


def test_a_pass_is_begun_before_the_next_is_described(running_ahead: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    done, run = list[str](), batch.run
    begin: Any = mx.async_eval

    def described(*arguments: Any) -> Any:
        done.append("described")
        return run(*arguments)

    def begun(*arguments: Any) -> None:
        done.append("begun")
        begin(*arguments)

    monkeypatch.setattr(batch, "run", described)
    monkeypatch.setattr(mx, "async_eval", begun)
    running_ahead.complete(words(5), max_tokens=4, ignore_eos=True).result()
    assert done == ["described", "begun"] * 5  # One reads the prompt, four say what follows.


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.5),
        Sampling(presence_penalty=3.0),
        Sampling(frequency_penalty=2.0, temperature=1.0, seed=5),
        Sampling(logit_bias={421: 8.0}, presence_penalty=2.0, temperature=1.0, seed=5),
    ],
    ids=["repetition", "presence", "frequency", "bias"],
)
def test_penalties_and_a_bias_do_not_keep_the_next_pass_from_being_under_way(
    running_ahead: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    sampling, ahead, launch = replace(sampling, max_tokens=30, ignore_eos=True), list[bool](), Worker._launch_ahead

    def launched(worker: Worker, before: Any) -> Any:
        ahead.append((following := launch(worker, before)) is not None)
        return following

    monkeypatch.setattr(Worker, "_launch_ahead", launched)
    loaded, prompt = load_weights(folder), words(30)
    expected = [chunk.token for chunk in stream_generate(loaded.model, Tokenizer.read(folder), prompt, sampling)]
    assert list(running_ahead.submit(Request(tuple(prompt), sampling)).result().tokens) == expected
    assert sum(ahead) == 29  # All but the first.


# Together.


def sentences(count: int, seed: int) -> str:
    """Questions as the demo model knows them."""
    chosen = random.Random(seed)
    asked = ["What is the capital of {}?", "Where is {}?", "Tell me about {}."]
    countries = ["France", "Italy", "Japan", "Spain", "Norway", "Egypt", "Peru"]
    return " ".join(chosen.choice(asked).format(chosen.choice(countries)) for _ in range(count))


def random_request(chosen: random.Random) -> Request:
    """Any of the things that can be asked of the demo model, on a prompt that may begin like others'.

    A model that has learned something, since with random weights all tokens are about as likely, and then the last
    digits of a sum decide every other draw."""
    tokenizer = Tokenizer.read(locate(None))
    shared = sentences(chosen.choice([0, 10, 30]), seed=chosen.randrange(2))
    text = f"{shared} {sentences(chosen.randrange(1, 6), seed=chosen.randrange(1 << 30))}".strip()
    prompt = tokenizer.encode_chat([Message("user", text)])
    sampling = Sampling(
        temperature=chosen.choice([0.0, 0.0, 1.0]),
        seed=chosen.randrange(1 << 32),
        max_tokens=chosen.choice([1, 5, 12, 30]),
        min_tokens=chosen.choice([0, 0, 6]),
        repetition_penalty=chosen.choice([1.0, 1.0, 1.2]),
        stop=chosen.choice([(), (), ("e",)]),
        logit_bias=chosen.choice([{}, {}, {11: 100.0, 2: 99.0}]),  # The second repeats itself, and ends.
    )
    return Request(
        tuple(prompt),
        sampling,
        kv_bits=chosen.choice([None, None, 8]),
        max_kv=None,
        speculate=chosen.choice([None, "n-gram"]),
        response_format=chosen.choice([None, None, SHORT_OBJECT]),
    )


def mixed(chosen: random.Random) -> list[tuple[Request, int | None]]:
    """Up to 8 requests, some of which are cancelled after so many events."""
    requests = [random_request(chosen) for _ in range(chosen.randrange(1, 9))]
    requests += chosen.choice([[], requests[:1]])  # Now and then twice the same.
    for n, request in enumerate(requests):
        if request.kv_bits is None and chosen.random() < 0.2:
            requests[n] = replace(request, max_kv=64, speculate=None)
    return [(request, chosen.choice([None, None, None, chosen.randrange(20)])) for request in requests[:8]]


def check_mix(together: Engine, alone: Engine, seed: int) -> None:
    asked = mixed(random.Random(seed))
    replies = [together.submit(request) for request, _ in asked]
    results = []
    for reply, (_, cancelled_after) in zip(replies, asked, strict=True):
        for _ in range(cancelled_after if cancelled_after is not None else 0):
            next(reply, None)
        if cancelled_after is not None:
            reply.cancel()
        results.append(reply.result())
    for result, (request, _) in zip(results, asked, strict=True):
        expected = alone.submit(replace(request, speculate=None)).result()
        length = len(result.tokens)
        assert result.tokens == expected.tokens[:length], (seed, request)
        if result.finish_reason != "cancelled":
            assert (result.tokens, result.text) == (expected.tokens, expected.text), (seed, request)
            assert result.finish_reason == expected.finish_reason
        assert list(result.logprobs) == pytest.approx(list(expected.logprobs[:length]), abs=1e-3)


@pytest.fixture(scope="module", params=["resident", "running ahead", "streamed"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Engine]]:
    """An engine for many requests, and one that answers one at a time and remembers nothing."""
    folder = locate(None)
    plan = load_weights(folder).plan
    if request.param == "streamed":
        plan = replace(plan, mode="streamed", slots=(3, 4, 3, 5))
    with load(folder, memory=plan) as together, load(folder, prefix_memory=0, max_concurrent=1) as alone:
        if request.param == "running ahead":
            assert together._worker.opened
            together._worker.opened.loaded.model.runs_ahead = True  # As on Metal; the results are the same here.
        yield together, alone


@pytest.mark.parametrize("seed", range(4))
def test_each_of_many_gets_what_it_would_get_alone(pair: tuple[Engine, Engine], seed: int) -> None:
    check_mix(*pair, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 300))
def test_each_of_many_gets_what_it_would_get_alone_in_200_mixes(pair: tuple[Engine, Engine], seed: int) -> None:
    check_mix(*pair, seed)


def check_bits(seed: int) -> None:
    chosen = random.Random(seed)
    windows = [chosen.choice([None, None, 64]) for _ in range(8)]
    requests = [replace(random_request(chosen), max_kv=window, speculate=None) for window in windows]
    requests = [replace(request, kv_bits=None) if request.max_kv else request for request in requests]
    with load(deterministic=True) as engine:
        alone = [engine.submit(request).result() for request in requests]
    with load(deterministic=True) as engine:
        together = [reply.result() for reply in [engine.submit(request) for request in requests]]
    assert [result.tokens for result in together] == [result.tokens for result in alone]
    assert [result.logprobs for result in together] == [result.logprobs for result in alone]


def test_a_deterministic_engine_gives_the_same_bits_whatever_the_neighbours() -> None:
    check_bits(0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 26))
def test_a_deterministic_engine_gives_the_same_bits_in_200_requests(seed: int) -> None:
    check_bits(seed)


def test_a_running_stream_goes_on_while_a_long_prompt_is_read(engine: Engine) -> None:
    running = engine.complete(words(5), max_tokens=200, ignore_eos=True)
    assert isinstance(next(event for event in running if isinstance(event, Token)), Token)
    long = engine.complete(words(1700, seed=9), max_tokens=1)
    unread = [len(running._channel._events) for event in long if isinstance(event, PromptProgress)]
    assert len(unread) == 6  # At the start, after each of four chunks, and with the first token.
    assert unread[-1] - unread[0] >= 4
    running.cancel()


def test_choices_differ_by_their_seeds_and_read_the_prompt_once(engine: Engine) -> None:
    request = engine.completion_request([77, *words(149)], temperature=1.5, seed=5, max_tokens=6)
    before = engine.stats()["requests"]["prompt_tokens"]
    results = [reply.result() for reply in engine.choices(3, request)]
    assert len({result.tokens for result in results}) == 3
    assert engine.stats()["requests"]["prompt_tokens"] - before == 149
    for k, result in enumerate(results):
        again = replace(request, sampling=replace(request.sampling, seed=5 + k))
        assert engine.submit(again).result().tokens == result.tokens


# What was read before.


def test_a_follow_up_resumes_where_the_conversation_was(engine: Engine) -> None:
    first = engine.complete(words(300, seed=3), max_tokens=5, ignore_eos=True).result()
    follow_up = [*words(300, seed=3), *first.tokens, *words(10, seed=4)]
    result = engine.complete(follow_up, max_tokens=1).result()
    assert result.usage.cached_tokens == 300 + 5 - 1


def test_what_was_read_survives_a_restart(folder: Path, tmp_path: Path) -> None:
    with load(folder, cache_dir=tmp_path) as engine:
        expected = engine.complete(words(300), max_tokens=5).result()
    with load(folder, cache_dir=tmp_path) as engine:
        result = engine.complete(words(300), max_tokens=5).result()
        assert engine.stats()["prefixes"]["disk_hits"] == 1
    assert result.usage.cached_tokens == 256
    assert result.tokens == expected.tokens


def test_kept_prompts_stay_within_their_memory(folder: Path) -> None:
    with load(folder, prefix_memory=200_000) as engine:
        for n in range(6):
            engine.complete(words(100, seed=n), max_tokens=1).result()
            assert engine.memory().prefix_bytes <= 200_000
        until(lambda: 100_000 < engine.memory().prefix_bytes <= 200_000)
        assert engine.stats()["prefixes"]["dropped"] > 0


def test_no_more_is_kept_than_can_be_held_twice_while_it_is_copied(folder: Path) -> None:
    plan = load_weights(folder).plan
    parts = {**plan.parts, "kv cache": 1_200_000, "working memory": 100_000}  # 1,024 bytes a token.
    small = replace(plan, parts=parts, budget_bytes=sum(parts.values()), context=800)
    with load(folder, memory=small) as engine:
        engine.complete(words(760), max_tokens=1).result()
        until(lambda: engine.health().running == 0)
        kept = on_thread(engine, lambda: engine._prefixes.nbytes)
        assert 0.8 * (1_300_000 - 768 * 1024) < kept <= 1_300_000 - 768 * 1024
        assert engine.complete(words(760), max_tokens=1).result().usage.cached_tokens == kept // 1024


def test_where_there_is_not_room_for_all_the_youngest_wait_and_lose_nothing(folder: Path) -> None:
    plan = load_weights(folder).plan
    parts = {**plan.parts, "kv cache": 2_400_000}  # 1,024 bytes a token, in steps of 256, half as much again to grow.
    small = replace(plan, parts=parts, budget_bytes=sum(parts.values()), context=700)
    requests = [Request(tuple(words(250, seed=n)), Sampling(max_tokens=265, ignore_eos=True)) for n in range(3)]
    with load(folder) as engine:
        expected = [engine.submit(request).result().tokens for request in requests]
    with load(folder, memory=small) as engine:
        replies = [engine.submit(request) for request in requests]
        assert [reply.result().tokens for reply in replies] == expected
        assert engine.stats()["requests"]["paused"] > 0


def paused_once_while_read(monkeypatch: pytest.MonkeyPatch) -> list[Answering]:
    """Take the room from the youngest request, once, when it has read the first part of its tokens; it is in the list
    then."""
    make_room, done = Worker._make_room, list[Answering]()

    def with_too_little(worker: Worker) -> None:
        opened, youngest = worker.opened, worker._running[-1] if len(worker._running) > 1 else None
        if opened and youngest and youngest.is_reading and youngest.read and not done:
            done.append(youngest)
            worker.opened = replace(opened, kv_bytes=0)
        make_room(worker)
        worker.opened = opened

    monkeypatch.setattr(Worker, "_make_room", with_too_little)
    return done


@pytest.mark.parametrize("purpose", ["score", "embed"])
def test_what_is_read_again_after_a_pause_counts_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, purpose: str
) -> None:
    ids = words(700, seed=35)
    request = engine.score_request(ids[:450], ids[450:]) if purpose == "score" else engine.embed_request(ids)
    expected = engine.submit(request).result()
    engine.forget()
    paused_once_while_read(monkeypatch)
    older = engine.complete(words(5), max_tokens=400, ignore_eos=True)
    next(event for event in older if isinstance(event, Token))
    paused = engine.stats()["requests"]["paused"]
    found = engine.submit(request).result()
    older.cancel()
    assert engine.stats()["requests"]["paused"] == paused + 1
    assert found.scores.logprobs == pytest.approx(expected.scores.logprobs, abs=1e-4)
    assert found.scores.is_likeliest == expected.scores.is_likeliest
    assert found.embedding == pytest.approx(expected.embedding, abs=1e-4)


def test_a_request_that_is_cancelled_while_it_is_paused_holds_on_to_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused, start = paused_once_while_read(monkeypatch), Worker._start
    monkeypatch.setattr(Worker, "_start", lambda worker, one: one not in paused and start(worker, one))
    older = engine.complete(words(5), max_tokens=400, ignore_eos=True)
    next(event for event in older if isinstance(event, Token))
    younger = engine.complete(words(700, seed=36), max_tokens=5, speculate="n-gram")
    until(lambda: bool(paused) and engine.health().queued == 1)
    assert paused[0]._speculation
    younger.cancel()
    assert younger.result().finish_reason == "cancelled"
    until(lambda: not paused[0]._speculation)
    older.cancel()


# Grammars and tools.


def test_a_text_is_held_to_its_format(engine: Engine) -> None:
    reply = engine.complete("Which?", response_format=Format("choice", ["red apple", "green pear"]))
    result = reply.result()
    assert result.text in ("red apple", "green pear")
    assert result.finish_reason == "stop"


def test_max_tokens_cuts_a_format_off(engine: Engine) -> None:
    result = engine.complete("?", response_format=SHORT_OBJECT, max_tokens=3).result()
    assert (len(result.tokens), result.finish_reason) == (3, "length")


def test_a_bad_format_ends_its_own_request_only(engine: Engine) -> None:
    good = engine.complete(words(5), max_tokens=30)
    bad = engine.complete(words(5), response_format=Format("regex", "("))
    assert failing(bad) == "bad_grammar"
    assert good.result().finish_reason


def test_choices_have_their_grammar_compiled_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, compile_one = list[Format](), Compiler.compiled

    def compiled(compiler: Compiler, format: Format, **how: Any) -> Any:
        asked.append(format)
        return compile_one(compiler, format, **how)

    monkeypatch.setattr(Compiler, "compiled", compiled)
    request = engine.completion_request("?", response_format=Format("choice", ["red apple", "green pear"]))
    assert {reply.text() for reply in engine.choices(4, request)} <= {"red apple", "green pear"}
    assert len(asked) == 1


def test_an_idle_engine_waits_for_a_grammar_without_looking_again_and_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, compile_one = threading.Event(), Compiler.compiled

    def compiled(*arguments: Any, **how: Any) -> Any:
        assert go.wait(30)
        return compile_one(*arguments, **how)

    monkeypatch.setattr(Compiler, "compiled", compiled)
    with load(folder, idle_unload_s=0) as engine:
        reply = engine.complete("?", response_format=Format("choice", ["red apple"]))
        assert on_thread(engine, lambda: engine._worker._until_unload(0.0)) is None
        go.set()
        assert reply.text() == "red apple"
        until(lambda: engine.health().state == "unloaded")


@pytest.mark.parametrize("parallel", [True, False])
def test_a_required_tool_is_called(tmp_path: Path, parallel: bool) -> None:
    config = replace(CONFIG, vocab_size=32768)
    with load(write_tiny(tmp_path / "model", config, tokenizer="v3")) as engine:
        events = list(
            engine.chat(
                [Message("user", "Weather?")],
                tools=[WEATHER],
                tool_choice="weather",
                parallel_tool_calls=parallel,
                max_tokens=80,
            )
        )
    result = Result.of(events)
    assert result.finish_reason in ("tool_calls", "length")
    call = result.tool_calls[0]
    assert (call.name, call.arguments.replace(" ", ""), len(call.id)) == ("weather", '{"city":"Rome"}', 9)
    assert result.text == "" or result.finish_reason == "length"
    assert parallel or len(result.tool_calls) == 1
    assert sum(isinstance(event, ToolCallDelta) for event in events) > 1


# What cannot be asked.


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (lambda engine: engine.complete([]), "empty_prompt"),
        (lambda engine: engine.complete([1, 32000]), "bad_token"),
        (lambda engine: engine.complete(words(2048)), "context_full"),
        (lambda engine: engine.complete("x", kv_bits=5), "bad_sampling"),
        (lambda engine: engine.complete("x", kv_bits=0), "bad_sampling"),
        (lambda engine: engine.complete("x", kv_bits=8.0), "bad_sampling"),
        (lambda engine: engine.complete("x", kv_bits=8, max_kv=64), "bad_sampling"),
        (lambda engine: engine.complete("x", max_kv=0), "bad_sampling"),
        (lambda engine: engine.complete("x", max_kv=64.5), "bad_sampling"),
        (lambda engine: engine.complete("x", stop=None), "bad_sampling"),
        (lambda engine: engine.complete("x", max_tokens="3"), "bad_sampling"),
        (lambda engine: engine.choices("2", engine.completion_request("x")), "bad_sampling"),
        (lambda engine: engine.complete("x", max_kv=4), "bad_sampling"),
        (lambda engine: engine.complete("x", speculate="magic"), "bad_sampling"),
        (lambda engine: engine.complete("x", speculate="n-gram", max_kv=64), "bad_sampling"),
        (lambda engine: engine.submit(Request((1, 2), purpose="score", echo="x")), "bad_request"),
        (lambda engine: engine.submit(Request((1, 2), Sampling(max_tokens=3), purpose="embed")), "bad_request"),
        (lambda engine: engine.submit(Request((1, 2), purpose="score", scored_from=3)), "bad_sampling"),
        (lambda engine: engine.chat([{"role": "assistant", "tool_calls": [{"nam": "x"}]}]), "bad_message"),
        (lambda engine: engine.chat("x", tools=[{"nam": "x"}]), "bad_tool"),
        (lambda engine: engine.chat("x", tools=["x"]), "bad_tool"),
        (lambda engine: engine.chat("x", tool_choice={"type": "function"}), "bad_tool_choice"),
        (lambda engine: engine.chat("x", tools=[Tool("f", "", None)]), "bad_tool_parameters"),  # type: ignore[arg-type]
        (lambda engine: engine.chat("x", tools=[Tool(5, "", {})]), "bad_tool_name"),  # type: ignore[arg-type]
        (lambda engine: engine.chat("x", response_format={"type": "json_object"}), "bad_response_format"),
        (lambda engine: engine.chat("x", response_format="json_object"), "bad_response_format"),
        (lambda engine: engine.submit(Request((1,), response_format={"kind": "regex"})), "bad_response_format"),  # type: ignore[arg-type]
        (lambda engine: engine.complete("x", temperature=-1), "bad_sampling"),
        (lambda engine: engine.complete("x", hurry=True), "unknown_setting"),
        (lambda engine: engine.chat([{"role": "user", "contents": "x"}]), "bad_message"),
        (lambda engine: engine.chat([{"content": "x"}]), "bad_message"),
        (lambda engine: engine.chat("x", tools=[WEATHER]), "tools_not_supported"),
        (lambda engine: engine.choices(0, engine.completion_request("x")), "bad_sampling"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(engine: Engine, ask: Callable[[Engine], Any], code: str) -> None:
    assert code_of(lambda: ask(engine)) == code


def test_a_deterministic_engine_guesses_nothing(folder: Path) -> None:
    with load(folder, deterministic=True) as engine:
        assert code_of(lambda: engine.complete("x", speculate="n-gram")) == "bad_sampling"


def test_what_has_fields_may_be_a_mapping_of_them(tmp_path: Path) -> None:
    with load(write_tiny(tmp_path / "model", replace(CONFIG, vocab_size=32768), tokenizer="v3")) as engine:
        call = {"name": "weather", "arguments": "{}", "id": "abcdefghi"}
        told: list[dict[str, Any]] = [
            {"role": "user", "content": "Weather?", "tool_calls": None},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi"},
        ]
        made = [
            Message("user", "Weather?"),
            Message("assistant", tool_calls=(ToolCall(**call),)),
            Message("tool", "sunny", tool_call_id="abcdefghi"),
        ]
        assert engine.chat_request(told) == engine.chat_request(made)
        tool, choice = asdict(WEATHER), {"mode": "required", "function": "weather"}
        expected = engine.chat_request(made, tools=[WEATHER], tool_choice=ToolChoice.of("weather"))
        assert engine.chat_request(told, tools=[tool], tool_choice=choice) == expected
        expected = engine.chat_request(made, response_format=Format("json_object"))
        assert engine.chat_request(told, response_format={"kind": "json_object"}) == expected


def test_a_thread_whose_work_failed_is_not_used_again() -> None:
    heard = list[threading.ExceptHookArgs]()
    before = threading.excepthook
    threading.excepthook = heard.append
    try:
        assert parking.run(lambda: 1 / 0).wait(30)
        assert parking.run(lambda: None).wait(30)
    finally:
        threading.excepthook = before
    until(lambda: len(heard) == 1)


@pytest.mark.parametrize(
    "options",
    [{"max_queue": 0}, {"max_concurrent": 0}, {"idle_unload_s": -1}, {"kv_bits": 3}, {"memory": "many"}],
    ids=str,
)
def test_what_an_engine_cannot_be_is_refused(folder: Path, options: dict[str, Any]) -> None:
    assert code_of(lambda: load(folder, **options)) in ("bad_option", "bad_size", "bad_sampling")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    threads = active_threads()
    assert code_of(lambda: load(tmp_path)) == "no_config"
    assert active_threads() == threads


# Cancelling.


class Held:
    """An engine whose next pass waits until it is let go."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        launch = Worker._launch

        def held(worker: Worker, group: Any) -> Any:
            self.entered.set()
            assert self.go.wait(30)
            return launch(worker, group)

        monkeypatch.setattr(Worker, "_launch", held)


def test_a_request_that_waits_is_cancelled_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(folder, max_concurrent=1) as engine:
        held = Held(engine, monkeypatch)
        running = engine.complete(words(5), max_tokens=5)
        assert held.entered.wait(30)
        waiting = engine.complete(words(5), max_tokens=5)
        waiting.cancel()
        assert waiting.result().finish_reason == "cancelled"
        assert (engine.health().running, engine.health().queued) == (1, 0)
        held.go.set()
        assert running.result().finish_reason == "length"


def test_more_than_may_wait_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(folder, max_concurrent=1, max_queue=2) as engine:
        held = Held(engine, monkeypatch)
        running = engine.complete(words(5), max_tokens=2)
        assert held.entered.wait(30)
        waiting = [engine.complete(words(5), max_tokens=2) for _ in range(2)]
        with pytest.raises(EngineError) as caught:
            engine.complete(words(5))
        assert (caught.value.code, caught.value.retryable) == ("queue_full", True)
        assert engine.health().step_seconds > 0
        held.go.set()
        assert {reply.result().finish_reason for reply in [running, *waiting]} == {"length"}


@pytest.mark.parametrize("how", ["cancel", "drop", "with", "while reading"])
def test_a_request_ends_when_nobody_wants_it(engine: Engine, how: str) -> None:
    before = engine.stats()["requests"]
    reply = engine.complete(words(1500, seed=8), max_tokens=400, ignore_eos=True)
    next(reply)
    if how != "while reading":
        next(event for event in reply if isinstance(event, Token))
    if how == "drop":
        del reply
    elif how == "with":
        with reply:
            pass
    else:
        reply.cancel()
    until(lambda: engine.stats()["requests"]["cancelled"] == before["cancelled"] + 1)
    assert engine.stats()["requests"]["generated_tokens"] - before["generated_tokens"] < 300
    assert engine.complete(words(5), max_tokens=3).result().finish_reason == "length"


def cancel_somewhere(engine: Engine, seed: int) -> None:
    """Cancel a request at some moment: it ends, its memory is free, and the same request is answered as before."""
    chosen = random.Random(seed)
    request = replace(random_request(chosen), max_kv=None)
    expected = engine.submit(request).result()
    until(lambda: engine.health().running == 0)
    on_thread(engine, engine._prefixes.clear)
    held = on_thread(engine, mx.get_active_memory)
    busy = [engine.complete(sentences(40, seed=seed), max_tokens=20) for _ in range(chosen.choice([0, 2]))]
    reply = engine.submit(request)
    for _ in range(chosen.randrange(14)):
        next(reply, None)
    said = engine.stats()["requests"]["generated_tokens"]
    reply.cancel()
    assert reply.result().finish_reason in ("cancelled", expected.finish_reason)
    assert busy or engine.stats()["requests"]["generated_tokens"] - said < 60
    for other in busy:
        other.result()
    until(lambda: engine.health().running == 0)
    on_thread(engine, engine._prefixes.clear)
    assert on_thread(engine, mx.get_active_memory) <= 1.01 * held
    assert engine.submit(request).result().tokens == expected.tokens


@pytest.mark.parametrize("seed", range(6))
def test_cancelling_at_any_moment_frees_memory_and_changes_nothing(pair: tuple[Engine, Engine], seed: int) -> None:
    cancel_somewhere(pair[0], seed)


@pytest.mark.long
def test_cancelling_at_200_moments(pair: tuple[Engine, Engine]) -> None:
    for seed in range(100, 200):
        cancel_somewhere(pair[0], seed)


def test_a_reply_that_is_dropped_once_it_has_ended_was_not_cancelled() -> None:
    for end in (Done("stop", Usage(1, 0, 1, 0.1, 0.1)), RuntimeError("boom")):
        channel = Channel()
        channel.put(end)
        channel.abandon()
        assert not channel.is_cancelled
    channel = Channel()
    channel.abandon()
    assert channel.is_cancelled


def test_a_cancelled_task_cancels_its_request(engine: Engine) -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async for event in engine.complete(words(5), max_tokens=1500, ignore_eos=True):
                if isinstance(event, Token):
                    begun.set()

        task = asyncio.ensure_future(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = engine.stats()["requests"]["cancelled"]
    asyncio.run(main())
    until(lambda: engine.stats()["requests"]["cancelled"] == before + 1)


def test_replies_are_read_with_async_for(engine: Engine) -> None:
    async def main() -> list[Result]:
        async def one(n: int) -> Result:
            reply = engine.complete(words(5, seed=n), max_tokens=6, ignore_eos=True)
            async with reply:
                count = sum([isinstance(event, Token) async for event in reply])
            assert count == 6
            return await reply

        return await asyncio.gather(*(one(n) for n in range(10)))

    together = asyncio.run(main())
    assert [len(result.tokens) for result in together] == [6] * 10


# Failing.


def test_a_failed_step_fails_what_ran_and_the_engine_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.complete(words(20), max_tokens=4).result()
    for error, code in ((RuntimeError("boom"), "step_failed"), (MemoryError(), "out_of_memory")):
        with monkeypatch.context() as broken:

            def fail(*_: Any, error: BaseException = error) -> Any:
                raise error

            broken.setattr("mixtral_mlx.engine.batch.run", fail)
            replies = [engine.complete(words(20), max_tokens=4) for _ in range(3)]
            assert [failing(reply) for reply in replies] == [code] * 3
        assert engine.complete(words(20), max_tokens=4).result().tokens == expected.tokens
        assert engine.health().state == "ready"


FAILURES = ("model", "memory", "sampler", "grammar", "reader")


@contextmanager
def failing_once(where: str, after: int) -> Iterator[list[str]]:
    """Something goes wrong, once: the `after`-th time that a pass, a sampler, a grammar or a reader is at work.

    What is yielded says whether it has, and whose request it was where only one is concerned."""
    left, happened = [after], list[str]()

    def now(whose: str = "") -> bool:
        left[0] -= 1
        if left[0] == 0:
            happened.append(whose)
        return left[0] == 0

    def run(model: Any, parts: Any) -> Any:
        if now():
            raise RuntimeError("[malloc] Unable to allocate 9 bytes." if where == "memory" else "boom")
        return batch_run(model, parts)

    def sample(self: Answering, *arguments: Any) -> Any:
        if now(str(self.request.sampling.seed)):
            raise ValueError("boom")
        return answering_sample(self, *arguments)

    def mask(self: Matcher) -> Any:
        if now():
            raise GrammarError("boom", code="grammar_too_slow")
        return matcher_mask(self)

    def preadv(*arguments: Any) -> int:
        if now():
            raise OSError(errno.EIO, "Input/output error")
        return os_preadv(*arguments)

    batch_run, answering_sample, matcher_mask, os_preadv = batch.run, Answering.sample, Matcher.mask, os.preadv
    target: Any
    target, name, broken = {
        "model": (batch, "run", run),
        "memory": (batch, "run", run),
        "sampler": (Answering, "sample", sample),
        "grammar": (Matcher, "mask", mask),
        "reader": (os, "preadv", preadv),
    }[where]
    with patch.object(target, name, broken):
        yield happened


CODES = {"model": "step_failed", "memory": "out_of_memory", "sampler": "step_failed", "grammar": "grammar_too_slow"}
CODES["reader"] = "read_failed"


def fail_somewhere(engine: Engine, alone: Engine, seed: int) -> int:
    """Let something go wrong in the midst of several requests; returns how many of them that ended."""
    chosen = random.Random(seed)
    where = FAILURES[seed % len(FAILURES)]
    requests = [random_request(chosen) for _ in range(4)]
    expected = [alone.submit(request).result() for request in requests]
    failed = 0
    with failing_once(where, chosen.randrange(1, 12)) as happened:
        for reply, one in zip([engine.submit(request) for request in requests], expected, strict=True):
            code, result = outcome(reply)
            assert result is None or result.tokens == one.tokens
            assert code in ("", CODES[where])
            failed += bool(code)
    assert failed <= (len(requests) if where in ("model", "memory", "reader") else 1)
    assert bool(failed) == bool(happened) or where == "grammar"  # Compiling asks for a mask as well.
    assert engine.submit(requests[0]).result().tokens == expected[0].tokens
    assert (engine.health().state, engine.health().is_alive, engine.health().queued) == ("ready", True, 0)
    return failed


@pytest.mark.parametrize("seed", range(5))
def test_what_fails_ends_alone_and_the_engine_answers_the_next(pair: tuple[Engine, Engine], seed: int) -> None:
    fail_somewhere(*pair, seed)


@pytest.mark.long
def test_300_failures(pair: tuple[Engine, Engine]) -> None:
    assert sum(fail_somewhere(*pair, seed) > 0 for seed in range(1000, 1100)) > 50


def test_a_model_that_cannot_be_loaded_again_fails_requests_and_is_tried_anew(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", CONFIG)
    with load(folder) as engine:
        engine.unload()
        weights = next(folder.glob("*.safetensors"))
        weights.rename(folder / "elsewhere")
        assert failing_at_any_time(engine)
        assert engine.health().state == "failed"
        (folder / "elsewhere").rename(weights)
        assert engine.complete(words(5), max_tokens=2).result().finish_reason == "length"
        assert engine.health().state == "ready"


def failing_at_any_time(engine: Engine) -> str:
    return code_of(lambda: engine.complete(words(5), max_tokens=2).result())


# The end.


def test_closing_ends_requests_and_threads(folder: Path) -> None:
    threads = active_threads()
    engine = load(folder)
    reply = engine.complete(words(5), max_tokens=1500, ignore_eos=True)
    next(reply)
    engine.close()
    assert failing(reply) == "closed"
    assert code_of(lambda: engine.complete("x")) == "closed"
    assert (engine.health().state, engine.health().is_alive) == ("closed", False)
    engine.close()
    assert active_threads() == threads


def test_whatever_is_asked_once_another_machine_was_lost_says_so(folder: Path) -> None:
    with load(folder) as engine:
        engine._worker.lose(EngineError("Rank 1 was lost.", code="rank_lost"))
        for ask in (lambda: engine.complete("x"), engine.load, engine.forget, engine.unload):
            assert code_of(ask) == "rank_lost"
        engine.close()
        assert code_of(lambda: engine.complete("x", response_format=SHORT_OBJECT)) == "rank_lost"


def test_an_engine_that_nobody_has_ends(folder: Path) -> None:
    threads = active_threads()
    engine = load(folder)
    assert engine.complete(words(5), max_tokens=2).result()
    del engine
    gc.collect()
    until(lambda: active_threads() == threads)


@pytest.mark.parametrize("how", ["read", "dropped"])
def test_a_reply_keeps_its_engine_until_it_has_been_read_or_dropped(folder: Path, how: str) -> None:
    engine = load(folder)
    worker, reply = engine._worker, engine.complete(words(5), max_tokens=8, ignore_eos=True)
    del engine
    gc.collect()
    assert isinstance(next(event for event in reply if isinstance(event, Token)), Token)
    assert worker.is_alive
    if how == "read":
        assert len(reply.result().tokens) == 8
    else:
        del reply
    until(lambda: not worker.is_alive)


def load_and_close(folder: Path, times: int) -> None:
    def once() -> tuple[int, int, int]:
        with load(folder) as engine:
            engine.complete(words(5), max_tokens=2).result()
        gc.collect()
        return rss_bytes(), os_threads(), len(os.listdir("/dev/fd"))  # noqa: PTH208 (it opens itself)

    for _ in range(3):
        rss, threads, files = once()
    held = mx.get_active_memory()
    for _ in range(times):
        last = once()
    assert last[1:] == (threads, files)
    assert last[0] - rss < 20_000_000
    assert mx.get_active_memory() <= held


def test_loading_and_closing_again_and_again_leaves_nothing(folder: Path) -> None:
    load_and_close(folder, 3)


@pytest.mark.long
def test_loading_and_closing_200_times(folder: Path) -> None:
    load_and_close(folder, 200)


def test_unloading_gives_the_weights_back_and_the_next_request_brings_them(folder: Path) -> None:
    with load(folder) as engine:
        tokens = engine.complete(words(50), max_tokens=3).result().tokens
        before, weights = mx.get_active_memory(), engine.memory().weights_bytes
        engine.unload()
        assert before - mx.get_active_memory() >= 0.95 * weights
        assert engine.health().state == "unloaded"
        assert engine.complete(words(50), max_tokens=3).result().tokens == tokens
        assert engine.stats()["requests"]["loads"] == 2


def test_an_idle_model_is_let_go_of(folder: Path) -> None:
    with load(folder, idle_unload_s=0) as engine:
        engine.complete(words(5), max_tokens=2).result()
        until(lambda: engine.health().state == "unloaded")
        assert engine.complete(words(5), max_tokens=2).result().finish_reason == "length"


# Scores and embeddings.


def test_perplexity_through_the_engine_is_the_plain_path_s(engine: Engine, folder: Path) -> None:
    text = " ".join(f"The {n}th sentence says something else about number {n * 7}." for n in range(120))
    ids, windows = engine.tokenizer.encode(text, bos=False), []
    for at in range(0, len(ids), 511):
        windows.append(engine.submit(engine.score_request([1], ids[at : at + 511])))
    scores = [reply.result().scores for reply in windows]
    logprobs = [logprob for one in scores for logprob in one.logprobs]
    assert len(logprobs) == len(ids)
    found = math.exp(-math.fsum(logprobs) / len(logprobs))
    assert found == pytest.approx(perplexity(folder, text, context=512).perplexity, rel=1e-5)
    assert scores[0].perplexity == pytest.approx(math.exp(-scores[0].logprob / 511))


def test_scores_do_not_hang_on_what_was_read_before(engine: Engine) -> None:
    before, after = words(700, seed=31), words(600, seed=32)[1:]
    first = engine.score(before, after)
    assert engine.score(before, after).logprobs == pytest.approx(first.logprobs, abs=1e-4)
    assert len(first.logprobs) == len(first.is_likeliest) == 599
    likeliest = engine.complete(before, max_tokens=1).result().tokens
    assert engine.score(before, likeliest).is_likeliest == (True,)
    assert engine.score(before, [(likeliest[0] + 1) % 32000]).is_likeliest == (False,)


def test_an_embedding_is_the_mean_of_the_last_hidden_states(engine: Engine, folder: Path) -> None:
    ids = words(700, seed=33)
    model = load_weights(folder).model
    expected = model.model(mx.array([ids]))[0].mean(axis=0).tolist()
    assert engine.embed(ids) == pytest.approx(expected, abs=1e-4)
    assert len(engine.embed("Hello")) == CONFIG.hidden_size
    assert code_of(lambda: engine.score("", [])) == "empty_prompt"


# Examples.


@pytest.mark.parametrize(("name", "says"), [("many_streams", "50 streams"), ("threads", "8 threads")])
def test_an_example_runs(name: str, says: str) -> None:
    file = Path(__file__).parent.parent / "examples" / f"{name}.py"
    answered = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=True)
    assert says in answered.stdout


# Adapters.


def write_adapter(folder: Path, base: Path, seed: int, keys: list[str] | None = None) -> Path:
    """A LoRA of the last layer with random weights, as mlx-lm's trainer would have left it."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0, **({"keys": keys} if keys else {})}
    model = load_weights(base).model
    linear_to_lora_layers(model, 1, dict(parameters))
    mx.random.seed(seed)
    weights = {
        name: mx.random.normal(array.shape) * 0.1
        for name, array in tree_flatten(model.parameters())
        if name.endswith((".lora_a", ".lora_b"))
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]


@pytest.mark.parametrize(
    ("mode", "keys"),
    [
        ("streamed", None),
        ("resident", ATTENTION),
        pytest.param("resident", None, marks=pytest.mark.long),
        pytest.param("streamed", ATTENTION, marks=pytest.mark.long),
    ],
)
def test_an_adapter_is_put_in_and_taken_out_while_the_engine_runs(
    folder: Path, tmp_path: Path, mode: Any, keys: list[str] | None
) -> None:
    from mlx_lm.tuner.utils import load_adapters

    first, second = (write_adapter(tmp_path / f"{seed}", folder, seed, keys) for seed in (1, 2))
    prompt = words(40)

    def theirs(adapter: Path) -> list[int]:
        model: Any = load_weights(folder).model
        load_adapters(model, str(adapter))
        model.eval()
        chunks = stream_generate(model, Tokenizer.read(folder), prompt, Sampling(max_tokens=8, ignore_eos=True))
        return [chunk.token for chunk in chunks if chunk.token is not None]

    plan = load_weights(folder).plan
    plan = plan if mode == "resident" else replace(plan, mode="streamed", slots=(3, 3))
    with load(folder, memory=plan, adapter=first) as engine:

        def ours() -> list[int]:
            return list(engine.complete(prompt, max_tokens=8, ignore_eos=True).result().tokens)

        assert ours() == theirs(first)
        running = engine.complete(prompt, max_tokens=8, ignore_eos=True)
        engine.use_adapter(second)
        assert list(running.result().tokens) == theirs(first)
        assert ours() == theirs(second)
        engine.unload()
        assert ours() == theirs(second)
        engine.use_adapter(None)
        with load(folder) as plain:
            expected = plain.complete(prompt, max_tokens=8, ignore_eos=True).result().tokens
        assert ours() == list(expected)
        assert ours() != theirs(first)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"fine_tune_type": "dora"}, "expected 'lora'"),
        ({"lora_parameters": {"rank": 4}}, "no num_layers"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "cannot be"),
        ({"lora_parameters": {"rank": 8, "scale": 1.0}}, "not for this model"),
        ({"lora_parameters": {"rank": 4, "scale": 1.0, "keys": "all"}}, "no list of names"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_and_changes_nothing(
    engine: Engine, folder: Path, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    before = engine.complete(words(40), max_tokens=5).result().tokens
    adapter = write_adapter(tmp_path / "adapter", folder, 1)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(MixtralError, match=says) as caught:
        engine.use_adapter(adapter)
    assert caught.value.code == "bad_adapter"
    assert engine.complete(words(40), max_tokens=5).result().tokens == before


@pytest.mark.parametrize("code", ["bad_adapter", "over_budget"])
def test_after_an_adapter_that_is_refused_there_is_none(folder: Path, tmp_path: Path, code: str) -> None:
    plan = load_weights(folder).plan
    parts = {**plan.parts, "kv cache": 4_000_000}
    small = replace(plan, parts=parts, budget_bytes=sum(parts.values()), context=700)
    good, bad = (write_adapter(tmp_path / name, folder, 1) for name in ("good", "bad"))
    if code == "bad_adapter":
        config = json.loads((bad / "adapter_config.json").read_text())
        (bad / "adapter_config.json").write_text(json.dumps(config | {"num_layers": 2}))
    else:
        weights = mx.load(str(bad / "adapters.safetensors"))
        assert isinstance(weights, dict)
        mx.save_safetensors(str(bad / "adapters.safetensors"), {**weights, "wide": mx.zeros((1_000_000,))})
    with load(folder, memory=small) as engine:

        def ours() -> tuple[int, ...]:
            return engine.complete(words(40), max_tokens=8, ignore_eos=True).result().tokens

        expected, room = ours(), engine.memory().kv_limit_bytes
        engine.use_adapter(good)
        assert ours() != expected
        assert code_of(lambda: engine.use_adapter(bad)) == code
        assert engine.memory().kv_limit_bytes == room
        assert ours() == expected
        engine.use_adapter(good)
        assert ours() != expected


def test_the_harness_adapter_scores_and_continues(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    class LM:
        """Stands in for the harness, which is too large to test with: a base class without a say in anything."""

    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        stand_in: Any = ModuleType(name)
        stand_in.LM, stand_in.simple_evaluate = LM, None
        monkeypatch.setitem(sys.modules, name, stand_in)
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "lm_eval_adapter.py"))
    model = example["MixtralLM"](engine)

    def asked(*args: Any) -> Any:
        return SimpleNamespace(args=args)

    pairs = [("The capital of France is ", "Paris"), ("", "Hello there"), ("One two", " three")] * 20
    ids = engine.tokenizer.encode("The capital of France is Paris")
    answers = model.loglikelihood([asked(*pair) for pair in pairs])
    assert len(answers) == 60
    before = len(engine.tokenizer.encode("The capital of France is"))
    assert answers[0][0] == pytest.approx(engine.score(ids[:before], ids[before:]).logprob, abs=1e-3)
    hello = engine.tokenizer.encode("Hello there")
    assert model.loglikelihood_rolling([asked("Hello there")]) == [pytest.approx(answers[1][0], abs=1e-3)]
    assert answers[1][0] == pytest.approx(engine.score(hello[:1], hello[1:]).logprob, abs=1e-3)
    (text,) = model.generate_until([asked("Hello", {"until": ["e"], "max_gen_toks": 9})])
    assert text == engine.complete("Hello", stop="e", max_tokens=9).text()
