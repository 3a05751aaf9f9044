"""A draft model beside the large one: the same tokens, only sooner, within the same memory."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mixtral_mlx.config import MixtralError
from mixtral_mlx.engine import batch
from mixtral_mlx.engine.answering import Answering
from mixtral_mlx.engine.drafting import DraftCounts, Drafting, DraftModel
from mixtral_mlx.engine.drafts import DraftLength, PassSeconds
from mixtral_mlx.engine.engine import Engine, load
from mixtral_mlx.engine.reply import Reply
from mixtral_mlx.engine.request import Request, Token
from mixtral_mlx.weights import load as load_weights
from mixtral_mlx.weights import locate

from .checkpoints import TINY, write_tiny
from .test_drafts import ACCEPTANCES, COSTS
from .test_engine import code_of, mixed, on_thread, until, words

DEMO = locate(None)
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model", replace(TINY, head_dim=32))


@pytest.fixture(scope="module", params=["resident", "streamed"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The demo model with itself as its draft."""
    plan = load_weights(DEMO).plan
    if request.param == "streamed":
        plan = replace(plan, mode="streamed", slots=(3, 4, 3, 5), parts={**plan.parts, "kv cache": 64 << 20})
    with load(memory=plan, draft=DEMO) as engine:
        yield engine


@contextmanager
def guessing_always(most: int = 5) -> Iterator[None]:
    """As if a guess always paid; whether it does on a busy machine is no question of right or wrong tokens."""

    def another_pays(self: Drafting, chances: Sequence[float], limit: int, other_rows: int) -> bool:
        return len(chances) < most

    def best(self: DraftLength, chances: Sequence[float], *how: Any) -> int:
        return len(chances)

    with patch.object(Drafting, "_another_pays", another_pays), patch.object(DraftLength, "best", best):
        yield


def passes(engine: Engine) -> int:
    return int(engine.stats()["requests"]["passes"])


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_the_tokens_are_those_without_a_draft(engine: Engine, how: dict[str, Any]) -> None:
    plain = engine.chat(QUESTION, max_tokens=40, ignore_eos=True, **how).result()
    with guessing_always():
        drafted = engine.chat(QUESTION, max_tokens=40, ignore_eos=True, speculate="draft", **how).result()
    assert drafted.tokens == plain.tokens
    assert list(drafted.logprobs) == pytest.approx(list(plain.logprobs), abs=1e-3)


def test_a_model_that_is_its_own_draft_guesses_right(engine: Engine) -> None:
    before, counts = passes(engine), dict(engine.stats()["draft"])
    with guessing_always(5):
        engine.chat("Tell me about Italy.", max_tokens=61, ignore_eos=True, speculate="draft").result()
    after = engine.stats()["draft"]
    guessed, right = (after[key] - counts[key] for key in ("guessed_tokens", "right_tokens"))
    assert guessed >= 40
    assert right >= 0.95 * guessed  # Sums of several rows differ in their last digits, so hardly ever a token does.
    assert passes(engine) - before <= 61 / 4


def test_a_mistral_of_mlx_lm_guesses_too(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "mistral")
    with load(draft=folder) as engine, guessing_always(3):
        plain = engine.chat(QUESTION, max_tokens=20).result()
        assert engine.chat(QUESTION, max_tokens=20, speculate="draft").result().tokens == plain.tokens
        assert engine.stats()["draft"]["guessed_tokens"] >= 20


def write_mistral(folder: Path, **changes: Any) -> Path:
    """A small Mistral of random weights, as Hugging Face has them."""
    from mlx_lm.models import llama

    config: dict[str, Any] = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 64}
    config |= {"num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"rms_norm_eps": 1e-5, "vocab_size": 32000, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    config |= changes
    model: Any = llama.Model(llama.ModelArgs.from_dict(config))
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(DEMO / "tokenizer.model", folder / "tokenizer.model")
    return folder


def check_mix(together: Engine, alone: Engine, seed: int) -> None:
    asked = [
        (replace(request, speculate="draft" if request.speculate else None), cancelled_after)
        for request, cancelled_after in mixed(random.Random(seed))
    ]
    replies = [together.submit(request) for request, _ in asked]
    for reply, (request, cancelled_after) in zip(replies, asked, strict=True):
        for _ in range(cancelled_after or 0):
            next(reply, None)
        if cancelled_after is not None:
            reply.cancel()
        result = reply.result()
        expected = alone.submit(replace(request, speculate=None)).result()
        assert result.tokens == expected.tokens[: len(result.tokens)], (seed, request)
        if result.finish_reason != "cancelled":
            assert (result.text, result.finish_reason) == (expected.text, expected.finish_reason)


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    with load(prefix_memory=0, max_concurrent=1) as engine:
        yield engine


@pytest.mark.parametrize("seed", range(4))
def test_each_of_many_gets_what_it_would_get_alone(engine: Engine, alone: Engine, seed: int) -> None:
    with guessing_always(3):
        check_mix(engine, alone, seed)


@pytest.mark.parametrize("seed", range(10, 13))
def test_each_of_many_gets_what_it_would_get_alone_where_steps_are_begun_ahead(alone: Engine, seed: int) -> None:
    with load(draft=DEMO) as engine, guessing_now_and_then():
        run_ahead(engine)
        check_mix(engine, alone, seed)


@pytest.mark.parametrize("speculate", ["n-gram", "draft"])
def test_where_guesses_do_not_pay_steps_are_begun_ahead_as_without(speculate: Any) -> None:
    no_gain = patch.object(DraftLength, "best", lambda *how: 0)
    no_try = patch.object(Drafting, "_another_pays", return_value=False)
    with load(draft=DEMO) as engine, no_gain, no_try:
        run_ahead(engine)
        plain = engine.chat(QUESTION, max_tokens=30, ignore_eos=True).result()
        with patch.object(batch, "run", side_effect=batch.run) as passes:
            result = engine.chat(QUESTION, max_tokens=30, ignore_eos=True, speculate=speculate).result()
        assert result.tokens == plain.tokens
        ahead = [call for call in passes.call_args_list if isinstance(call.args[1][0].ids, mx.array)]
        assert len(ahead) >= 27  # All but the first and the last.


def run_ahead(engine: Engine) -> None:
    """As on Metal; the results are the same here."""
    assert engine._worker.opened
    engine._worker.opened.loaded.model.runs_ahead = True


@contextmanager
def guessing_now_and_then() -> Iterator[None]:
    """As if guesses paid after every third token."""

    def another_pays(self: Drafting, chances: Sequence[float], limit: int, other_rows: int) -> bool:
        return len(chances) < 3 and len(self.tokens) % 3 == 0

    with guessing_always(), patch.object(Drafting, "_another_pays", another_pays):
        yield


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 150))
def test_each_of_many_gets_what_it_would_get_alone_in_100_mixes(engine: Engine, alone: Engine, seed: int) -> None:
    with guessing_always(seed % 6):
        check_mix(engine, alone, seed)


def test_a_paused_request_goes_on_with_the_same_tokens() -> None:
    def ask(engine: Engine, count: int, **how: Any) -> list[Reply]:
        return [engine.complete(words(250, seed), ignore_eos=True, max_tokens=count, **how) for seed in range(3)]

    with load(draft=DEMO) as engine, guessing_always(3):
        plain = [reply.result().tokens for reply in ask(engine, 12)]
        draft = engine._worker.opened.draft  # type: ignore[union-attr]
        assert draft
        # Three have room until they are 256 tokens long, and from then on only two: the third waits for them.
        on_thread(engine, lambda: narrow(engine, 3 * 2 * draft.kv_bytes(512)))
        replies = ask(engine, 300, speculate="draft")
        tokens = []
        for reply in replies:
            ids = (event.id for event in reply if isinstance(event, Token))
            tokens.append(tuple(islice(ids, 12)))
            reply.cancel()
        assert tokens == plain
        assert engine.stats()["requests"]["paused"] >= 1


def narrow(engine: Engine, kv_bytes: int) -> None:
    assert engine._worker.opened
    engine._worker.opened = replace(engine._worker.opened, kv_bytes=kv_bytes)


def test_a_prompt_that_was_read_before_is_not_read_again_by_the_draft() -> None:
    read = patch.object(DraftModel, "read", autospec=True, side_effect=DraftModel.read)
    with load(draft=DEMO) as engine, guessing_always(3), read as read_by_draft:
        first = engine.complete(words(700), max_tokens=8, ignore_eos=True, speculate="draft").result()
        assert sum(len(call.args[1]) for call in read_by_draft.call_args_list) == 699
        read_by_draft.reset_mock()
        follow_up = [*words(700), *first.tokens, 7, 8, 9]
        engine.complete(follow_up, max_tokens=8, ignore_eos=True, speculate="draft").result()
        assert sum(len(call.args[1]) for call in read_by_draft.call_args_list) < 20


def test_nor_is_it_after_a_restart(tmp_path: Path) -> None:
    read = patch.object(DraftModel, "read", autospec=True, side_effect=DraftModel.read)
    with load(draft=DEMO, cache_dir=tmp_path) as engine:
        first = engine.complete(words(300), max_tokens=8, ignore_eos=True, speculate="draft").result()
        until(lambda: engine.stats()["prefix_files"]["written"] >= 2 * (300 // 64))
    with load(draft=DEMO, cache_dir=tmp_path) as engine, read as read_by_draft:
        again = engine.complete(words(300), max_tokens=8, ignore_eos=True, speculate="draft").result()
        assert sum(len(call.args[1]) for call in read_by_draft.call_args_list) < 64
        assert engine.stats()["prefixes"]["disk_hits"] == 2
    assert again.tokens == first.tokens


def test_a_draft_reads_a_prompt_in_small_pieces_where_another_stream_goes_on() -> None:
    with load(draft=DEMO) as engine:
        running = engine.complete(words(5), max_tokens=600, ignore_eos=True)
        until(lambda: engine.health().running == 1)
        with patch.object(DraftModel, "read", autospec=True, side_effect=DraftModel.read) as read:
            engine.complete(words(600), max_tokens=12, ignore_eos=True, speculate="draft").result()
            assert read.call_args_list
            assert max(len(call.args[1]) for call in read.call_args_list) <= 128
        running.cancel()


def test_a_cancelled_request_ends_and_the_next_has_the_same_tokens(engine: Engine) -> None:
    with guessing_always():
        expected = engine.chat(QUESTION, max_tokens=30, speculate="draft").result().tokens
        for events in (0, 1, 3, 6):
            reply = engine.chat(QUESTION, max_tokens=400, ignore_eos=True, speculate="draft")
            for _ in range(events):
                next(reply)
            reply.cancel()
            assert reply.result().finish_reason == "cancelled"
        until(lambda: engine.health().running == 0)
        assert engine.chat(QUESTION, max_tokens=30, speculate="draft").result().tokens == expected


def test_a_draft_that_fails_costs_nobody_their_answer(engine: Engine) -> None:
    plain = engine.chat(QUESTION, max_tokens=20).result()
    before = engine.stats()["draft"]["failures"]
    with guessing_always(), patch.object(DraftModel, "guess", side_effect=RuntimeError("no")):
        assert engine.chat(QUESTION, max_tokens=20, speculate="draft").result().tokens == plain.tokens
    assert engine.stats()["draft"]["failures"] == before + 1


def test_a_prompt_longer_than_the_draft_knows_positions_for_is_answered_without_guesses(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "short", max_position_embeddings=64)
    with load(draft=folder) as engine, guessing_always(3):
        for count in (60, 100):
            plain = engine.complete(words(count), max_tokens=12, ignore_eos=True).result()
            drafted = engine.complete(words(count), max_tokens=12, ignore_eos=True, speculate="draft").result()
            assert drafted.tokens == plain.tokens
        assert engine.stats()["draft"]["guessed_tokens"] <= 4


def test_unloading_lets_go_of_the_draft_too_though_a_reply_is_kept(tiny: Path) -> None:
    with load(draft=tiny) as engine:
        reply = engine.chat(QUESTION, max_tokens=3, speculate="draft")
        tokens = reply.result().tokens
        before = engine.memory()
        engine.unload()
        assert before.mlx_bytes - engine.memory().mlx_bytes >= 0.95 * before.weights_bytes
        assert engine.chat(QUESTION, max_tokens=3, speculate="draft").result().tokens == tokens


# Memory.


def test_the_draft_is_in_the_budget(tiny: Path) -> None:
    with load(memory="1GB") as engine:
        without, weights = engine.memory(), engine.memory().weights_bytes
    with load(memory="1GB", draft=tiny) as engine:
        found, draft = engine.memory(), engine._worker.opened.draft  # type: ignore[union-attr]
        assert draft
        assert found.weights_bytes == weights + draft.nbytes
        assert found.kv_limit_bytes == pytest.approx(without.kv_limit_bytes - draft.nbytes, abs=1 << 20)


def test_keys_and_values_of_the_draft_are_counted(tiny: Path) -> None:
    with load(draft=tiny) as engine:
        draft = engine._worker.opened.draft  # type: ignore[union-attr]
        assert draft
        # TINY: 2 layers, 2 heads of 32 values, keys and values, 4 bytes; 1,024 tokens; a layer twice while it grows.
        assert draft.kv_bytes(1000) == 2 * 2 * 32 * 2 * 4 * 1024 * 3 // 2
        request = engine.completion_request(words(900), max_tokens=100)
        alone, beside = need(engine, request), need(engine, replace(request, speculate="draft"))
        assert beside - alone == draft.kv_bytes(1000)


def need(engine: Engine, request: Request) -> int:
    """What a request is refused with where there is no room for it at all."""
    on_thread(engine, lambda: narrow(engine, 1))
    asked: list[int] = []
    kv_bytes = engine._worker._kv_bytes

    def seen(answering: Answering, tokens: int) -> int:
        asked.append(kv_bytes(answering, tokens))
        return asked[-1]

    with patch.object(engine._worker, "_kv_bytes", side_effect=seen):
        assert code_of(engine.submit(request).result) == "over_budget"
    return asked[0]


def test_a_draft_that_a_given_plan_has_no_room_for_is_refused(tiny: Path) -> None:
    plan = load_weights(DEMO).plan
    tight = replace(plan, budget_bytes=plan.needed_bytes, parts={**plan.parts, "kv cache": 1 << 20})
    assert code_of(lambda: load(memory=tight, draft=tiny)) == "over_budget"


# Refusals.


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (lambda path: write_mistral(path, vocab_size=32768), "other_vocabulary", "32,768"),
        (lambda path: other_tokenizer(write_mistral(path)), "other_vocabulary", "another tokenizer"),
        (lambda path: renamed(write_mistral(path)), "bad_draft", "'qwen2'"),
        (lambda path: write_mistral(path) / "nothing", "no_model", "nothing"),
        (lambda path: unweighted(write_mistral(path)), "bad_draft", "no model"),
        (lambda path: other_layers(write_mistral(path)), "bad_draft", "cannot be loaded"),
        (lambda path: edited(write_mistral(path), hidden_size=-4), "bad_config", "hidden_size"),
    ],
)
def test_what_cannot_be_a_draft_is_refused_by_name(
    tmp_path: Path, make: Callable[[Path], Path], code: str, says: str
) -> None:
    with pytest.raises(MixtralError, match=says) as caught:
        load(draft=make(tmp_path / "model"))
    assert caught.value.code == code


def other_tokenizer(folder: Path) -> Path:
    write_tiny(folder.parent / "v3", tokenizer="v3", config=replace(TINY, vocab_size=32768))
    shutil.copyfile(folder.parent / "v3" / "tokenizer.model", folder / "tokenizer.model")
    return edited(folder, vocab_size=32000)


def renamed(folder: Path) -> Path:
    return edited(folder, model_type="qwen2")


def other_layers(folder: Path) -> Path:
    return edited(folder, num_hidden_layers=3)


def unweighted(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_asking_for_a_draft_where_there_is_none_is_refused(alone: Engine) -> None:
    assert code_of(lambda: alone.chat(QUESTION, speculate="draft")) == "no_draft"


def test_a_window_and_a_draft_are_refused_together(tiny: Path) -> None:
    with load(draft=tiny) as engine:
        assert code_of(lambda: engine.chat(QUESTION, speculate="draft", max_kv=64)) == "bad_sampling"
    with load(draft=tiny, deterministic=True) as engine:
        assert code_of(lambda: engine.chat(QUESTION, speculate="draft")) == "bad_sampling"


# What it may cost.


class Scripted:
    """A draft model that takes `seconds` for a guess, and is right about the text as often as `acceptance` says."""

    context = 1 << 30

    def __init__(self, seconds: float, acceptance: Callable[[int], float], is_sure: bool, seed: int) -> None:
        self.counts, self.passes = DraftCounts(), PassSeconds(1, 1)
        self.passes.learn(1, seconds)
        self.seconds, self.acceptance, self.is_sure = seconds, acceptance, is_sure
        self.random = random.Random(seed)
        self.place = 0  # How many tokens of the text there are with those that were guessed.

    def new_cache(self) -> list[Any]:
        return []

    def guess(self, ids: Sequence[int], cache: Sequence[Any]) -> tuple[int, float, float]:
        """1 is right, 0 is wrong."""
        right = self.random.random() < self.acceptance(self.place)
        self.place += 1
        sure = (0.95 if right else 0.3) if self.is_sure else 0.8
        self.passes.learn(len(ids), self.seconds)
        return int(right), sure, self.seconds


def speed(
    cost: Callable[[int], float],
    acceptance: Callable[[int], float],
    seconds: float,
    *,
    is_sure: bool = True,
    tokens: int = 200,
    seed: int = 0,
) -> float:
    """How many times as fast as without a draft `tokens` come; a plain pass takes `cost(1)`."""
    passes, model = PassSeconds(), Scripted(seconds * cost(1), acceptance, is_sure, seed)
    drafting = Drafting(cast(DraftModel, model), [1], passes)
    done, took = 0, 0.0
    while done < tokens:
        model.place, spent = done, model.counts.guessed_tokens
        draft = drafting.draft(15)
        took += (model.counts.guessed_tokens - spent) * model.seconds
        right = next((n for n, guess in enumerate(draft) if guess != 1), len(draft))
        passes.learn(1 + len(draft), cost(1 + len(draft)))
        took += cost(1 + len(draft))
        drafting.add([1] * (right + 1))
        done += right + 1
    return done * cost(1) / took


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("is_sure", [True, False])
def test_a_draft_never_costs_a_twentieth_of_the_speed(
    cost: str, acceptance: str, seconds: float, is_sure: bool
) -> None:
    speeds = [speed(COSTS[cost], ACCEPTANCES[acceptance], seconds, is_sure=is_sure, seed=seed) for seed in range(5)]
    assert min(speeds) >= 0.95


@pytest.mark.parametrize(("cost", "expected"), [("resident, flat GPU", 2.5), ("streamed", 1.2)])
def test_a_draft_pays_where_it_is_fast_and_mostly_right(cost: str, expected: float) -> None:
    speeds = [speed(COSTS[cost], ACCEPTANCES["mostly"], 0.1, tokens=1000, seed=seed) for seed in range(5)]
    assert sum(speeds) / len(speeds) >= expected


def test_a_draft_is_tried_again_when_the_text_becomes_easy() -> None:
    def late(place: int) -> float:
        return 0.0 if place < 500 else 0.95

    assert speed(COSTS["resident, flat GPU"], late, 0.1, tokens=1500) > 1.7
