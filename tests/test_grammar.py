"""Structured output: texts fit what was asked for, whatever tokens are chosen, and no grammar costs more than it may.

Tokens are chosen at random here, with no model; jsonschema, which shares nothing with the compiler, is the judge."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mixtral_mlx.engine import grammar
from mixtral_mlx.engine.grammar import Compiler, Format, Grammar, GrammarError, Limits, Matcher, Vocabulary, compiled
from mixtral_mlx.prompt import Message, Tokenizer
from mixtral_mlx.weights import locate

from .hostile_grammars import hostile

CARRIED = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
SCHEMAS: list[Any] = json.loads((Path(__file__).parent / "schemas.json").read_text(encoding="utf-8"))
HOSTILE = hostile()
SAMPLE = range(0, len(SCHEMAS), 12)
SPARE = 40  # logits past the tokenizer's last piece
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"enum": ["a", "é🙂", None]}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


class Speaker:
    """A tokenizer, a prompt for it, and texts said after that prompt."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.read(folder)
        self.prompt = self.tokenizer.encode_chat([Message("user", "Hi")])
        self.vocabulary = Vocabulary(self.tokenizer, self.tokenizer.vocab_size + SPARE)
        self.written = [self.tokenizer.token_bytes(token) or b"" for token in range(self.tokenizer.vocab_size)]
        self.grammars: dict[int, Grammar] = {}
        self.closing = np.array([any(sign in text for sign in (b'"', b"}", b"]", b",")) for text in self.written])

    def any_object(self) -> Grammar:
        return self.schema(next(n for n, schema in enumerate(SCHEMAS) if schema == {"type": "object"}))

    def schema(self, number: int) -> Grammar:
        """A grammar for one of the kept schemas, compiled once for all tests."""
        if number not in self.grammars:
            self.grammars[number] = self.compiled("json_schema", SCHEMAS[number])
        return self.grammars[number]

    def compiled(self, kind: Any, value: Any = None, **more: Any) -> Grammar:
        return compiled(Format(kind, value), self.vocabulary, **more)

    def shown(self, tokens: Sequence[int], after: Sequence[int] | None = None) -> str:
        detokenizer = self.tokenizer.detokenizer(self.prompt if after is None else after)
        return "".join([*map(detokenizer.add, tokens), detokenizer.finish()])

    def choose(self, mask: np.ndarray, pick: random.Random) -> int:
        """Any allowed token, but often one that closes something, or texts would seldom end."""
        allowed = mask[: len(self.closing)]
        closing = allowed & self.closing
        places = np.flatnonzero(closing if pick.random() < 0.5 and closing.any() else allowed)
        return int(places[pick.randrange(len(places))])

    def walk(self, matcher: Matcher, seed: int, limit: int = 150) -> tuple[list[int], bool]:
        """Tokens of a text that fits, and whether it came to its end before the limit."""
        pick, tokens = random.Random(seed), list[int]()
        end = self.tokenizer.eos_id
        while len(tokens) < limit and not matcher.must_end:
            mask = matcher.mask()
            if mask[end] and pick.random() < 0.3:
                return tokens, True
            mask[end] = False
            token = self.choose(mask, pick)
            matcher.advance(token)
            tokens.append(token)
        return tokens, matcher.must_end


@pytest.fixture(scope="session", params=CARRIED)
def speaker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(MistralTokenizer._data_path() / CARRIED[request.param], folder / "tokenizer.model")
    return Speaker(folder)


# The judge.

_FORMATS = jsonschema.FormatChecker()


def _format(name: str, **more: Any) -> Callable[[Callable[[str], bool]], object]:
    """Have strings of this format judged so, which jsonschema would let pass."""
    return lambda judge: _FORMATS.checks(name, **more)(lambda value: not isinstance(value, str) or judge(value))


def _is_time(text: str) -> bool:
    # Python knows no leap seconds, and no more than microseconds.
    return datetime.fromisoformat(re.sub(r":60|\.\d+", lambda m: m[0].replace("60", "59")[:7], text)).tzinfo is not None


_format("date-time", raises=ValueError)(lambda text: text[10] in "Tt" and _is_time(text.upper()))
_format("time", raises=ValueError)(lambda text: _is_time("2000-01-01T" + text.upper()))
_format("duration")(
    lambda text: bool(re.fullmatch(r"P(\d+W|(?=.)(\d+Y)?(\d+M)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?)", text))
)
_format("hostname")(
    lambda text: all(re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?", part) for part in text.split("."))
)
_format("uri", raises=ValueError)(lambda text: urlsplit(text).scheme != "")


def wrong(schema: Any, text: str) -> str:
    """Why `text` does not fit `schema`, or nothing."""
    validator = jsonschema.Draft202012Validator(schema, format_checker=_FORMATS)
    try:
        return next((error.message for error in validator.iter_errors(json.loads(text))), "")
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (PERSON, '{"name": "A", "age": 1.5, "tags": "a"}'),
        (PERSON, '{"name": "A", "age": 1, "tags": "a"'),
        ({"format": "date-time"}, '"2024-02-30T00:00:00Z"'),
        ({"format": "date-time"}, '"2024-02-03T00:00:00"'),
        ({"format": "time"}, '"25:00:00Z"'),
        ({"format": "date"}, '"2023-02-29"'),
        ({"format": "duration"}, '"P"'),
        ({"format": "hostname"}, '"-a.b"'),
        ({"format": "ipv4"}, '"1.2.3.256"'),
        ({"format": "uuid"}, '"0"'),
    ],
)
def test_the_judge_finds_what_is_wrong(schema: Any, text: str) -> None:
    assert wrong(schema, text)


# JSON.


def check_schema(speaker: Speaker, number: int, seeds: Sequence[int]) -> int:
    """Texts that came to their end, all of which must fit."""
    grammar, schema, ended = speaker.schema(number), SCHEMAS[number], 0
    for seed in seeds:
        tokens, is_whole = speaker.walk(grammar.matcher(), seed)
        if is_whole:
            assert wrong(schema, speaker.shown(tokens)) == "", (schema, speaker.shown(tokens))
        ended += is_whole
    return ended


def test_five_hundred_schemas_are_kept() -> None:
    assert len(SCHEMAS) == 500


def test_whatever_is_chosen_a_text_fits_its_schema(speaker: Speaker) -> None:
    assert sum(check_schema(speaker, number, [number, number + 1]) for number in SAMPLE) > len(SAMPLE)


@pytest.mark.long
def test_each_of_five_hundred_schemas_fits_with_three_seeds(speaker: Speaker) -> None:
    ended = sum(check_schema(speaker, n, range(3 * n, 3 * n + 3)) for n in range(len(SCHEMAS)))
    assert ended > 0.9 * 3 * len(SCHEMAS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8"), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('aé漢🙂 "\\\n', max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(document=st.dictionaries(st.text("ab", max_size=3), JSON, max_size=3))
def test_what_a_tokenizer_makes_of_any_json_may_be_said(speaker: Speaker, document: dict[str, Any]) -> None:
    text = json.dumps(document, ensure_ascii=False).replace("\x7f", "?")
    matcher = speaker.any_object().matcher()
    for token in speaker.tokenizer.encode(text, bos=False):
        assert matcher.mask()[token], (text, speaker.written[token])
        matcher.advance(token)
    assert matcher.must_end


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, "'not'"),
        ({"type": "array", "items": {"uniqueItems": True}}, "'uniqueItems'"),
        ({"anyOf": [{"if": {}}]}, "'if'"),
        ({"type": "object", "requierd": ["a"]}, "'requierd'"),
        ({"type": "string", "nullable": True}, "'nullable'"),
        ({"$defs": {"a": {"contains": {}}}, "$ref": "#/$defs/a"}, "'contains'"),
        ({"type": "string", "format": "idn-email"}, "'idn-email'"),
        ({"type": "string", "x-guidance": {"lenient": True}}, "'x-guidance'"),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, "oneOf"),
        ({"maximum": 2**53 + 1}, "2\\^53"),
    ],
)
def test_what_of_a_schema_would_not_be_kept_is_refused_by_name(speaker: Speaker, schema: Any, named: str) -> None:
    with pytest.raises(GrammarError, match=named) as refused:
        speaker.compiled("json_schema", schema)
    assert refused.value.code == "unsupported_schema"


@pytest.mark.parametrize(
    "schema", [{"properties": {"not": {"const": 1}}}, {"const": {"not": [1]}}, {"default": {"if": 1}}]
)
def test_names_and_values_that_look_like_keywords_are_none(speaker: Speaker, schema: Any) -> None:
    speaker.compiled("json_schema", schema)


# Other kinds.


def fits(speaker: Speaker, matcher: Matcher, text: str) -> bool:
    """Whether the tokens of `text` may all be said, and then no more."""
    for token in speaker.tokenizer.encode(text, bos=False):
        if not matcher.mask()[token]:
            return False
        matcher.advance(token)
    return matcher.may_end


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("regex", r"[a-z]+/\d{2,3}", ["ab/12", "z/123"], ["ab", "ab/1", "/12", "ab/1234", "ab/12 "]),
        ("regex", "(?i)grün|漢+", ["GRÜN", "漢漢"], ["gruen", ""]),
        ("regex", "^a\n?b$", ["ab", "a\nb"], ["a b"]),
        ("lark", 'start: "(" start? ")"', ["()", "((()))"], ["(()", "())"]),
        ("lark", 'start: %json {"enum": [1, "é"]}', ["1", '"é"'], ["2", "é"]),
        ("choice", ("yes", "no", "no way"), ["yes", "no", "no way"], ["n", "no w", "yesno"]),
        ("choice", ['quo"te', "back\\slash", "new\nline", "a/b", "🙂"], ['quo"te', "new\nline", "🙂"], ["quo", "a"]),
        ("json_object", None, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", '{"a":1}', "{ }"]),
    ],
)
def test_each_kind_takes_what_it_says_and_nothing_else(
    speaker: Speaker, kind: str, value: Any, good: list[str], bad: list[str]
) -> None:
    grammar = speaker.compiled(kind, value)
    assert [text for text in good if not fits(speaker, grammar.matcher(), text)] == []
    assert [text for text in bad if fits(speaker, grammar.matcher(), text)] == []


@pytest.mark.parametrize(
    ("kind", "value"),
    [("regex", "(a"), ("regex", None), ("lark", "start: missing"), ("choice", ()), ("choice", "yes"), ("xml", "<a/>")],
)
def test_a_format_that_makes_no_sense_is_a_clear_error(speaker: Speaker, kind: str, value: Any) -> None:
    with pytest.raises(GrammarError) as refused:
        speaker.compiled(kind, value)
    assert refused.value.code == "bad_grammar"
    assert "backtrace" not in str(refused.value)


# Where a text begins, and where it ends.


@pytest.mark.parametrize("texts", [("yes", "no"), (" yes", "  no"), ("\nyes", "é"), ("🙂",)])
def test_what_is_shown_after_a_prompt_is_what_was_asked_for(speaker: Speaker, texts: tuple[str, ...]) -> None:
    grammar = speaker.compiled("choice", texts)
    shown = {speaker.shown(speaker.walk(grammar.matcher(), seed)[0]) for seed in range(20)}
    assert shown == set(texts)


def test_a_continued_text_is_what_was_asked_for(speaker: Speaker) -> None:
    prompt = speaker.tokenizer.encode("The answer is")
    assert not speaker.tokenizer.begins(prompt)
    grammar = speaker.compiled("choice", (" yes", "no"), begins=False)
    shown = {speaker.shown(speaker.walk(grammar.matcher(), seed)[0], prompt) for seed in range(20)}
    assert shown == {" yes", "no"}


def test_the_space_that_is_dropped_is_the_one_a_tokenizer_writes(speaker: Speaker) -> None:
    grammar = speaker.compiled("choice", ("yes",))
    as_a_byte = speaker.written.index(b" ")
    assert speaker.shown([as_a_byte]) == " "
    assert not grammar.matcher().mask()[as_a_byte]
    assert grammar.matcher().valid([as_a_byte]) == 0
    assert grammar.matcher().forced() == speaker.tokenizer.encode("yes", bos=False)


def test_the_end_is_allowed_exactly_where_the_text_may_end(speaker: Speaker) -> None:
    matcher = speaker.compiled("choice", ("ab", "abc")).matcher()
    end = speaker.tokenizer.eos_id
    for text, may, must in [(b" a", False, False), (b"b", True, False), (b"c", True, True)]:
        assert bool(matcher.mask()[end]) == matcher.may_end
        matcher.advance(speaker.written.index(text) if text != b" a" else speaker.tokenizer.encode("a", bos=False)[0])
        assert (matcher.may_end, matcher.must_end) == (may, must)
    assert np.flatnonzero(matcher.mask()).tolist() == [end]
    matcher.advance(end)
    assert matcher.must_end


def test_a_models_own_end_tokens_end_a_text_too(speaker: Speaker) -> None:
    own = speaker.tokenizer.vocab_size + 1
    vocabulary = Vocabulary(speaker.tokenizer, speaker.tokenizer.vocab_size + SPARE, end_tokens=(own,))
    matcher = compiled(Format("regex", "a*"), vocabulary, begins=False).matcher()
    assert matcher.mask()[[own, speaker.tokenizer.eos_id]].all()
    matcher.advance(own)
    assert matcher.must_end


def test_only_tokens_that_are_text_are_ever_allowed(speaker: Speaker) -> None:
    mask = speaker.compiled("regex", "(?s:.)*", begins=False).matcher().mask()
    assert len(mask) == speaker.tokenizer.vocab_size + SPARE
    assert not mask[speaker.tokenizer.vocab_size :].any()
    no_text = [token for token, text in enumerate(speaker.written) if not text]
    assert np.flatnonzero(mask[no_text]).tolist() == [no_text.index(speaker.tokenizer.eos_id)]


def test_a_grammar_may_name_a_control_token(speaker: Speaker) -> None:
    start = speaker.tokenizer.tool_calls_id or speaker.tokenizer.bos_id
    matcher = speaker.compiled("lark", f'start: <[{start}]> " [" /[0-9]/ "]"', begins=False).matcher()
    assert matcher.forced()[:1] == [start]
    matcher.advance(start)
    assert not matcher.mask()[start]


def test_characters_may_come_byte_by_byte(speaker: Speaker) -> None:
    text = "漢🙂é"
    byte = {n: speaker.written.index(bytes([n])) for n in text.encode()}
    matcher = speaker.compiled("regex", "[漢🙂é]+").matcher()
    space = max(token for token, written in enumerate(speaker.written) if written == b" ")
    tokens = [space, *(byte[n] for n in text.encode())]
    for token in tokens:
        assert matcher.mask()[token]
        matcher.advance(token)
    assert matcher.may_end
    assert speaker.shown(tokens) == text


# Going ahead and back.


@settings(deadline=None, max_examples=40)
@given(number=st.sampled_from(SAMPLE), seed=st.integers(0, 10**6), back=st.integers(0, 12))
def test_going_back_equals_starting_afresh(speaker: Speaker, number: int, seed: int, back: int) -> None:
    grammar = speaker.schema(number)
    matcher, fresh = grammar.matcher(), grammar.matcher()
    tokens, _ = speaker.walk(matcher, seed, limit=20)
    back = min(back, len(tokens))
    matcher.rollback(back)
    for token in tokens[: len(tokens) - back]:
        fresh.advance(token)
    assert (matcher.mask() == fresh.mask()).all()
    assert (matcher.may_end, matcher.must_end, matcher.forced()) == (fresh.may_end, fresh.must_end, fresh.forced())
    assert speaker.walk(matcher, seed, 20) == speaker.walk(fresh, seed, 20)


def test_a_text_that_ended_can_be_taken_back(speaker: Speaker) -> None:
    matcher = speaker.compiled("choice", ("yes",)).matcher()
    before = matcher.mask()
    tokens = [*speaker.tokenizer.encode("yes", bos=False), speaker.tokenizer.eos_id]
    for token in tokens:
        matcher.advance(token)
    matcher.rollback(len(tokens))
    assert not matcher.must_end
    assert (matcher.mask() == before).all()


@settings(deadline=None, max_examples=40)
@given(number=st.sampled_from(SAMPLE), seed=st.integers(0, 10**6))
def test_forced_tokens_are_the_only_ones_allowed_one_by_one(speaker: Speaker, number: int, seed: int) -> None:
    matcher = speaker.schema(number).matcher()
    pick = random.Random(seed)
    for _ in range(15):
        forced = matcher.forced()
        for token in forced:
            assert np.flatnonzero(matcher.mask()).tolist() == [token]
            matcher.advance(token)
        matcher.rollback(len(forced))
        if matcher.must_end:
            break
        mask = matcher.mask()
        mask[speaker.tokenizer.eos_id] = False
        if not mask.any():
            break
        matcher.advance(speaker.choose(mask, pick))


def test_most_of_an_answer_of_known_layout_is_forced(speaker: Speaker) -> None:
    matcher = speaker.compiled("json_schema", PERSON).matcher()
    forced = matcher.forced()
    assert speaker.shown(forced) == '{"name":'
    for token in [*forced, *speaker.tokenizer.encode('{"name": "A",', bos=False)[len(forced) :]]:
        matcher.advance(token)
    assert "age" in speaker.shown(matcher.forced())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_valid_counts_the_tokens_that_advance_takes(speaker: Speaker, seed: int, data: st.DataObject) -> None:
    grammar = speaker.any_object()
    said, _ = speaker.walk(grammar.matcher(), seed, limit=12)
    start = data.draw(st.integers(0, len(said)))
    others = st.integers(0, speaker.tokenizer.vocab_size + SPARE - 1)
    drafted = data.draw(st.lists(others, max_size=3)) if data.draw(st.booleans()) else []
    drafted = [*said[start : start + 5], *drafted]
    matcher, plain = grammar.matcher(), grammar.matcher()
    for token in said[:start]:
        matcher.advance(token)
        plain.advance(token)
    taken = 0
    for token in drafted:
        if token == speaker.tokenizer.eos_id or (start + taken == 0 and not plain.mask()[token]):
            break
        try:
            plain.advance(token)
        except GrammarError:
            break
        taken += 1
    assert matcher.valid(drafted) == taken
    for token in drafted[:taken]:
        matcher.advance(token)


def test_texts_of_one_grammar_do_not_touch_each_other(speaker: Speaker) -> None:
    grammar = speaker.compiled("json_schema", PERSON)
    alone = [speaker.walk(grammar.matcher(), seed) for seed in (1, 2)]
    both = [grammar.matcher(), grammar.matcher()]
    for turn in range(max(len(tokens) for tokens, _ in alone)):
        for matcher, (tokens, _) in zip(both, alone, strict=True):
            if turn < len(tokens):
                assert matcher.mask()[tokens[turn]]
                matcher.advance(tokens[turn])
    assert [matcher.must_end for matcher in both] == [is_whole for _, is_whole in alone]


def test_a_token_that_is_not_allowed_ends_only_its_own_text(speaker: Speaker) -> None:
    grammar = speaker.compiled("choice", ("yes",))
    matcher, other = grammar.matcher(), grammar.matcher()
    with pytest.raises(GrammarError):
        matcher.advance(speaker.tokenizer.vocab_size + 1)
    with pytest.raises(GrammarError):
        matcher.mask()
    assert speaker.shown(speaker.walk(other, 0)[0]) == "yes"
    assert speaker.shown(speaker.walk(grammar.matcher(), 0)[0]) == "yes"


# What it costs.


def test_many_threads_may_compile_at_once(speaker: Speaker) -> None:
    numbers = SAMPLE[::3]
    with ThreadPoolExecutor(4) as threads:
        at_once = threads.map(lambda number: speaker.compiled("json_schema", SCHEMAS[number]), [*numbers, *numbers])
        texts = list(threads.map(lambda grammar: speaker.walk(grammar.matcher(), 5), at_once))
    assert texts == 2 * [speaker.walk(speaker.schema(number).matcher(), 5) for number in numbers]


def peak_bytes() -> int:
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]


def answer(speaker: Speaker, format: Format) -> float:
    """Seconds until a format is compiled or refused; what is compiled is followed for a while."""
    before = time.perf_counter()
    grammar = None
    with contextlib.suppress(GrammarError):
        grammar = compiled(format, speaker.vocabulary)
    seconds = time.perf_counter() - before
    with contextlib.suppress(GrammarError):
        if grammar:
            speaker.walk(grammar.matcher(), 0, limit=40)
    return seconds


@pytest.mark.parametrize("speaker", ["v1"], indirect=True)
@pytest.mark.parametrize(
    "name", [name if n % 3 == 0 else pytest.param(name, marks=pytest.mark.long) for n, name in enumerate(HOSTILE)]
)
def test_a_hostile_grammar_is_answered_in_a_second_and_little_memory(speaker: Speaker, name: str) -> None:
    format = HOSTILE[name]()
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_bytes()
    # Once more if something else had the machine.
    assert any(answer(speaker, format) < 1 for _ in range(2))
    if sys.platform == "linux":
        assert peak_bytes() - before + Limits().memory_bytes < 256 << 20


def test_others_go_on_while_a_hostile_grammar_is_compiled(speaker: Speaker) -> None:
    matcher = speaker.any_object().matcher()
    others = [HOSTILE[name]() for name in ("regex: a count of a million", "json_schema: 5,000 optional properties")]
    compiling = threading.Thread(target=lambda: [answer(speaker, format) for format in others])
    compiling.start()
    gaps, before = list[float](), time.perf_counter()
    while compiling.is_alive():
        matcher.mask()
        now = time.perf_counter()
        gaps.append(now - before)
        before = now
    assert len(gaps) > 100
    assert np.quantile(gaps, 0.99) < 0.02


def test_an_ambiguous_text_ends_before_it_gets_slow(speaker: Speaker) -> None:
    # What is looked at is bounded by a count, whatever the processor's time is worth at the moment.
    limits = Limits(step_seconds=10)
    hostile = HOSTILE["lark: as ambiguous as can be"]()
    matcher = compiled(hostile, speaker.vocabulary, begins=False, limits=limits).matcher()
    token = max((text, n) for n, text in enumerate(speaker.written) if text and set(text) == set(b"a"))[1]
    with pytest.raises(GrammarError, match="too much") as refused:  # noqa: PT012
        for _ in range(200):
            matcher.mask()
            matcher.advance(token)
    assert refused.value.code == "grammar_too_large"


def test_where_nothing_can_prove_what_it_costs_only_small_grammars_are_compiled(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/Applications/Talk.app/Contents/MacOS/Talk")
    assert speaker.shown(speaker.walk(speaker.compiled("choice", ("yes",)).matcher(), 0)[0]) == "yes"
    with pytest.raises(GrammarError, match="8 KiB"):
        speaker.compiled("choice", tuple(f"choice {n}" for n in range(1000)))


# Compiled once.


def test_a_format_asked_for_again_is_not_compiled_again_and_another_is() -> None:
    tokenizer = Tokenizer.read(locate(None))
    made: list[Vocabulary] = []

    def vocabulary() -> Vocabulary:
        made.append(Vocabulary(tokenizer, tokenizer.vocab_size))
        return made[-1]

    compiler = Compiler(vocabulary)
    with ThreadPoolExecutor(2) as threads:
        first, second = (threads.submit(compiler.compiled, Format("choice", [word])) for word in ("yes", "no"))
        grammars = [first.result(), second.result()]
    assert len(made) == 1
    assert compiler.compiled(Format("choice", ["yes"])) is grammars[0]
    assert compiler.compiled(Format("choice", ["yes"]), begins=False) is not grammars[0]
    with patch.object(grammar, "_MOST_KEPT", 3):
        compiler.compiled(Format("choice", ["maybe"]))
    assert compiler.compiled(Format("choice", ["yes"])) is grammars[0]
    assert compiler.compiled(Format("choice", ["no"])) is not grammars[1]  # Asked for longest ago.
