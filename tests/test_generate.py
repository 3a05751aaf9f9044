"""The plain path: texts end where they should, seeds repeat, caches resume, requests can be stopped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx_lm.generate import generate_step

from mixtral_mlx.generate import Chunk, Conversation, GenerateError, Sampling, StopStrings, stream_generate
from mixtral_mlx.model import Model
from mixtral_mlx.prompt import Tokenizer

from .checkpoints import Q4, TINY, random_model, write_tiny

PROMPT = [1, 733, 16289, 28793, 22557, 733, 28748, 16289, 28793]
LONG = [1, *itertools.islice(itertools.cycle(range(300, 700)), 4999)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.read(write_tiny(tmp_path_factory.mktemp("v1") / "tiny"))


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(replace(TINY, quantization=Q4, max_position_embeddings=8192))


class Scripted(Model):
    """A model that says what it is told: after the prompt's last token, one id of the script after another."""

    def __init__(self, script: Sequence[int], prompt_tokens: int) -> None:
        super().__init__(TINY)
        self.script = list(script)
        self.prompt_tokens = prompt_tokens

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        kept = mx.zeros((1, TINY.num_key_value_heads, inputs.shape[1], TINY.head_dim))
        for layer in cache:
            layer.update_and_fetch(kept, kept)
        n = cache[0].offset - self.prompt_tokens
        token = self.script[n] if 0 <= n < len(self.script) else 2
        return mx.where(mx.arange(TINY.vocab_size) == token, 0.0, -1e4)[None, None]


def say(tokenizer: Tokenizer, text: str, **settings: Any) -> list[Chunk]:
    """The chunks in which a model that writes `text` is heard."""
    script = tokenizer.encode(text, bos=False)
    return list(stream_generate(Scripted(script, len(PROMPT)), tokenizer, PROMPT, Sampling(**settings)))


def text_of(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def run(model: Model, tokenizer: Tokenizer, prompt: Sequence[int] = PROMPT, **options: Any) -> list[Chunk]:
    settings = {key: options.pop(key) for key in list(options) if key in Sampling.__dataclass_fields__}
    sampling = Sampling(**{"max_tokens": 12, "ignore_eos": True, **settings})
    return list(stream_generate(model, tokenizer, prompt, sampling, **options))


def tokens_of(chunks: Sequence[Chunk]) -> list[int | None]:
    return [chunk.token for chunk in chunks]


def test_greedy_tokens_equal_mlx_lms(model: Model, tokenizer: Tokenizer) -> None:
    theirs = [token for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=64)]
    assert tokens_of(run(model, tokenizer, max_tokens=64)) == theirs


def test_logprobs_are_those_of_the_models_distribution(model: Model, tokenizer: Tokenizer) -> None:
    chunks = run(model, tokenizer, max_tokens=4, top_logprobs=5)
    ids = PROMPT + [chunk.token for chunk in chunks if chunk.token is not None]
    logits = model(mx.array([ids[:-1]]))[0, len(PROMPT) - 1 :].astype(mx.float32)
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    rows: list[list[float]] = expected.tolist()  # type: ignore[assignment]
    for chunk, row in zip(chunks, rows, strict=True):
        ranked = sorted(enumerate(row), key=lambda pair: -pair[1])[:5]
        assert chunk.token == ranked[0][0]
        assert chunk.logprob == pytest.approx(ranked[0][1], abs=1e-4)
        assert [token for token, _ in chunk.top_logprobs] == [token for token, _ in ranked]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("One line\nand another", "\n", "One line"),
        ("A part ### and more", "###", "A part "),
        ("Sure, I can.\nUser: and then?", "\nUser:", "Sure, I can."),
        ("The incomprehensibilities of life", "mprehensibil", "The inco"),
        ("naïve café, s'il vous plaît", "é, s", "naïve caf"),
        ("It is 20 degrees 🌞 and sunny", "🌞", "It is 20 degrees "),
        ("aaab", "aab", "a"),
        ("nothing of the kind", "###", "nothing of the kind"),
    ],
)
def test_stop_strings_end_the_text_exactly(tokenizer: Tokenizer, text: str, stop: str, expected: str) -> None:
    chunks = say(tokenizer, text, stop=(stop, "never said"))
    assert text_of(chunks) == expected
    assert [chunk.finish_reason for chunk in chunks][-1] == "stop"
    assert not any(chunk.finish_reason for chunk in chunks[:-1])


def test_a_stop_string_may_span_three_tokens(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("incomprehensibilities", bos=False)]
    stop = pieces[1][-1] + "".join(pieces[2:-1]) + pieces[-1][0]
    assert len(pieces) >= 4
    assert text_of(say(tokenizer, "incomprehensibilities", stop=(stop,))) == "incomprehensibilities".split(stop)[0]


def test_the_turn_after_a_stop_is_unharmed(model: Model, tokenizer: Tokenizer) -> None:
    free = run(model, tokenizer)
    stop = free[4].text or free[3].text
    conversation = Conversation(model)
    stopped = run(model, tokenizer, stop=(stop,), conversation=conversation)
    assert text_of(stopped) == text_of(free).split(stop)[0]
    following = [*PROMPT, *(chunk.token for chunk in stopped if chunk.token is not None), 733, 16289]
    again = run(model, tokenizer, following, conversation=conversation)
    assert again[0].usage.cached_tokens >= len(PROMPT)
    assert tokens_of(again) == tokens_of(run(model, tokenizer, following))


@example("\naa", ["a", "\naa"], [2])
@given(
    st.text("ab\né", max_size=30),
    st.lists(st.text("ab\né", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 5), max_size=40),
)
def test_stop_strings_do_not_depend_on_how_a_text_is_cut(text: str, stops: list[str], sizes: list[int]) -> None:
    complete = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(complete)[1]] if complete else text
    matcher, shown, rest = StopStrings(stops), "", text
    for size in [*sizes, len(text)]:
        shown += matcher.feed(rest[:size])
        rest = rest[size:]
        assert expected.startswith(shown)
    assert shown + matcher.rest() == expected
    end, start = min(complete, default=(0, 0))
    assert matcher.hit == text[start:end]


def test_no_character_is_ever_shown_half(tokenizer: Tokenizer) -> None:
    text = "日本語 🤷🏽‍♀️ ᚠᛇᚻ done"
    chunks = say(tokenizer, text)
    assert len(chunks) > len(text)  # Many of these characters take a token for each of their bytes.
    assert text_of(chunks) == text
    assert not any("\ufffd" in chunk.text for chunk in chunks)


def test_the_end_token_ends_and_its_text_is_not_shown(tokenizer: Tokenizer) -> None:
    chunks = say(tokenizer, "Bye")
    assert text_of(chunks) == "Bye"
    assert (chunks[-1].token, chunks[-1].finish_reason) == (tokenizer.eos_id, "stop")
    assert chunks[-1].usage.completion_tokens == len(chunks)


def test_before_min_tokens_the_model_cannot_end(tokenizer: Tokenizer) -> None:
    early = say(tokenizer, "Bye")
    late = say(tokenizer, "Bye", min_tokens=len(early) + 2, max_tokens=len(early) + 5)
    assert len(late) == len(early) + 3
    assert [chunk.token == tokenizer.eos_id for chunk in late] == [False] * (len(early) + 2) + [True]


def test_max_tokens_and_the_context_end_with_length(model: Model, tokenizer: Tokenizer) -> None:
    assert [len(c) for c in [run(model, tokenizer, max_tokens=5)]] == [5]
    filled = run(model, tokenizer, max_tokens=None, conversation=Conversation(model, context=len(PROMPT) + 3))
    assert len(filled) == 3
    assert filled[-1].finish_reason == "length"


def test_the_same_seed_gives_the_same_text(model: Model, tokenizer: Tokenizer) -> None:
    settings: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "top_k": 200, "min_p": 0.001}
    once = tokens_of(run(model, tokenizer, seed=7, **settings))
    assert tokens_of(run(model, tokenizer, seed=7, **settings)) == once
    assert tokens_of(run(model, tokenizer, seed=8, **settings)) != once
    assert tokens_of(run(model, tokenizer, **settings)) != tokens_of(run(model, tokenizer, **settings))


def test_a_seed_holds_when_two_texts_are_generated_in_turns(model: Model, tokenizer: Tokenizer) -> None:
    def stream(seed: int) -> Iterator[Chunk]:
        return stream_generate(model, tokenizer, PROMPT, Sampling(temperature=1.5, seed=seed, max_tokens=12))

    alone = [[chunk.token for chunk in stream(seed)] for seed in (1, 2)]
    together = list(zip(stream(1), stream(2), strict=True))
    assert [[pair[n].token for pair in together] for n in (0, 1)] == alone


def test_penalties_and_bias_change_what_is_chosen(model: Model, tokenizer: Tokenizer) -> None:
    assert set(tokens_of(run(model, tokenizer, logit_bias={421: 1000.0}))) == {421}
    held = run(model, tokenizer, logit_bias={421: 30.0}, presence_penalty=60.0)
    assert tokens_of(held).count(421) == 1
    assert tokens_of(run(model, tokenizer, logit_bias={421: 30.0}, repetition_penalty=50.0)).count(421) <= 2
    assert tokens_of(run(model, tokenizer, logit_bias={421: 30.0}, frequency_penalty=60.0)).count(421) == 1


def test_long_prompts_are_read_in_chunks_with_progress(model: Model, tokenizer: Tokenizer) -> None:
    seen: list[tuple[int, int]] = []
    chunks = run(model, tokenizer, LONG, max_tokens=2, on_prompt=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 5000), (2048, 5000), (4096, 5000), (4999, 5000), (5000, 5000)]
    assert chunks[-1].usage.prompt_tokens == 5000


def test_a_follow_up_reads_only_what_is_new(model: Model, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model)
    first = run(model, tokenizer, conversation=conversation)
    longer = [*PROMPT, *(chunk.token for chunk in first if chunk.token is not None), 5, 6, 7]
    second = run(model, tokenizer, longer, conversation=conversation)
    assert second[0].usage.cached_tokens == len(PROMPT) + len(first) - 1
    assert tokens_of(second) == tokens_of(run(model, tokenizer, longer))
    other = [*PROMPT[:5], 99, 98]
    third = run(model, tokenizer, other, conversation=conversation)
    assert third[0].usage.cached_tokens == 5
    assert tokens_of(third) == tokens_of(run(model, tokenizer, other))


def test_the_same_prompt_again_costs_one_token(model: Model, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model)
    once = run(model, tokenizer, conversation=conversation)
    again = run(model, tokenizer, conversation=conversation)
    assert again[0].usage.cached_tokens == len(PROMPT) - 1
    assert tokens_of(again) == tokens_of(once)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_cancelling_stops_between_chunks_and_tokens(model: Model, tokenizer: Tokenizer, after: int) -> None:
    asked = itertools.count()
    conversation = Conversation(model)
    chunks = run(model, tokenizer, LONG, cancelled=lambda: next(asked) >= after, conversation=conversation)
    assert [(chunk.token, chunk.finish_reason) for chunk in chunks] == [(None, "cancelled")]
    assert len(conversation.tokens) == [0, 2048, 4096, 4999][after]
    assert tokens_of(run(model, tokenizer, conversation=conversation)) == tokens_of(run(model, tokenizer))


def test_a_text_cancelled_midway_keeps_what_it_had(model: Model, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model)
    free = run(model, tokenizer)
    asked = itertools.count()
    chunks = run(model, tokenizer, conversation=conversation, cancelled=lambda: next(asked) >= 5)
    heard = [chunk.token for chunk in chunks if chunk.token is not None]
    assert heard == tokens_of(free)[: len(heard)]
    assert chunks[-1].finish_reason == "cancelled"
    assert tokens_of(run(model, tokenizer, conversation=conversation)) == tokens_of(free)


def test_dropping_the_stream_leaves_the_conversation_usable(model: Model, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model)
    stream = stream_generate(model, tokenizer, PROMPT, Sampling(ignore_eos=True), conversation=conversation)
    for _ in range(3):
        next(stream)
    del stream
    assert tokens_of(run(model, tokenizer, conversation=conversation)) == tokens_of(run(model, tokenizer))


def test_an_error_inside_the_model_does_not_poison_the_conversation(tokenizer: Tokenizer) -> None:
    model = random_model(TINY)
    conversation = Conversation(model)
    expected = tokens_of(run(model, tokenizer))
    run(model, tokenizer, max_tokens=3, conversation=conversation)
    layer, moe = model.layers[1], model.layers[1].block_sparse_moe

    def fail(x: mx.array) -> mx.array:
        raise RuntimeError("out of memory")

    layer["block_sparse_moe"] = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, tokenizer, conversation=conversation)
    layer["block_sparse_moe"] = moe
    assert tokens_of(run(model, tokenizer, conversation=conversation)) == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_the_cache_can_be_quantized(tokenizer: Tokenizer, bits: int) -> None:
    model = random_model(replace(TINY, num_attention_heads=2, num_key_value_heads=1, head_dim=32))
    plain, quantized = Conversation(model), Conversation(model, kv_bits=bits)
    run(model, tokenizer, LONG[:600], conversation=plain)
    chunks = run(model, tokenizer, LONG[:600], conversation=quantized)
    assert len(chunks) == 12
    assert quantized.nbytes <= plain.nbytes * (bits + 2) / 32  # A float32 scale and bias for each 32 values.
    follow = run(model, tokenizer, [*LONG[:600], 5], conversation=quantized)
    assert follow[0].usage.cached_tokens == 600


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("seed", -1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("max_tokens", 0),
        ("top_logprobs", -1),
        ("stop", ("",)),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: float("nan")}),
        ("temperature", None),
        ("temperature", "0.7"),
        ("temperature", True),
        ("top_k", 1.5),
        ("seed", 1.5),
        ("max_tokens", 2.5),
        ("max_tokens", "3"),
        ("max_tokens", True),
        ("top_logprobs", 1.5),
        ("repetition_penalty", None),
        ("stop", None),
        ("stop", "END"),
        ("stop", (1,)),
        ("logit_bias", None),
        ("logit_bias", {"5": 5}),
        ("logit_bias", {5: "5"}),
        ("logit_bias", {5: 10**400}),
        ("ignore_eos", "no"),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(GenerateError, match=name) as error:
        Sampling(**{name: value})
    assert error.value.code == "bad_sampling"


def test_impossible_prompts_are_refused_before_anything_runs(model: Model, tokenizer: Tokenizer) -> None:
    for prompt, code in (
        ([], "empty_prompt"),
        ([32000], "bad_token"),
        ([-1], "bad_token"),
        ([5] * 8192, "context_full"),
    ):
        with pytest.raises(GenerateError) as error:
            stream_generate(model, tokenizer, prompt)
        assert error.value.code == code
    for options in ({"kv_bits": 3}, {"kv_bits": 0}, {"kv_bits": 4}, {"context": 1}, {"context": 10_000}):
        with pytest.raises(GenerateError) as error:
            Conversation(model, **options)
        assert error.value.code == "bad_sampling"


def test_a_top_p_of_0_takes_the_likeliest_token(model: Model, tokenizer: Tokenizer) -> None:
    likeliest = tokens_of(run(model, tokenizer))
    for top_p in (0, 0.0, 1e-6):
        assert tokens_of(run(model, tokenizer, top_p=top_p, temperature=100.0, seed=3)) == likeliest
    assert tokens_of(run(model, tokenizer, top_p=0, top_k=5, temperature=100.0, seed=3)) == likeliest


@pytest.mark.parametrize("temperature", [1e-6, 1e-39, 1e-300])
def test_a_temperature_of_next_to_nothing_takes_the_likeliest_token(
    model: Model, tokenizer: Tokenizer, temperature: float
) -> None:
    assert tokens_of(run(model, tokenizer, temperature=temperature, seed=3)) == tokens_of(run(model, tokenizer))


def test_top_k_beyond_the_vocabulary_means_all_of_it(model: Model, tokenizer: Tokenizer) -> None:
    wide = run(model, tokenizer, top_k=50_000, temperature=1.0, seed=3)
    assert tokens_of(wide) == tokens_of(run(model, tokenizer, temperature=1.0, seed=3))


def test_generating_from_a_loaded_folder_reports_its_usage(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chunks = run(random_model(TINY), tokenizer, max_tokens=3)
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (len(PROMPT), 0, 3)
    assert usage.prompt_seconds > 0
    assert usage.prompt_tps > 0
    assert usage.generation_tps > 0
