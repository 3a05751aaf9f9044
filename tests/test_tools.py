"""Tool calls: what a choice comes to, what its grammar lets through, and calls that come in any parts."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llguidance
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from mixtral_mlx.engine.answering import Answering
from mixtral_mlx.engine.drafts import PassSeconds
from mixtral_mlx.engine.reply import Channel, Reply
from mixtral_mlx.engine.request import Request
from mixtral_mlx.engine.tools import ToolCallDelta, ToolCallStream, ToolChoice, ToolError, ToolRules, tool_rules
from mixtral_mlx.generate import Sampling, Step
from mixtral_mlx.prompt import PromptError, Tokenizer, Tool, ToolCall

from .whole_calls import parse_tool_calls

WEATHER = Tool(
    "get_weather",
    "The weather now",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
STEP = {"type": "object", "properties": {"x": {"type": "integer"}, "next": {"$ref": "#/$defs/Step"}}, "required": ["x"]}
WALK = Tool(
    "walk",
    "Walk along steps",
    {"properties": {"first": {"$ref": "#/$defs/Step"}}, "required": ["first"], "$defs": {"Step": STEP}},
)
TIME = Tool("time", "The time", {})
TOOLS = [WEATHER, WALK, TIME]
PARIS = '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}'
STEPS = '{"name": "walk", "arguments": {"first": {"x": 1, "next": {"x": -2}}}}'


def carried(name: str) -> Path:
    spec = find_spec("mistral_common")
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "data", name)


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return read(tmp_path_factory.mktemp("v3"), "mistral_instruct_tokenizer_240323.model.v3")


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return read(tmp_path_factory.mktemp("v1"), "tokenizer.model.v1")


def read(folder: Path, name: str) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(carried(name).read_bytes())
    return Tokenizer.read(folder)


@pytest.fixture(scope="module")
def guide() -> llguidance.LLTokenizer:
    """The v3 tokenizer as llguidance wants it."""
    file = str(carried("mistral_instruct_tokenizer_240323.model.v3"))
    pieces: Any = sentencepiece.SentencePieceProcessor(model_file=file)

    class Pieces:
        def __init__(self) -> None:
            ids = range(pieces.vocab_size())
            self.eos_token_id, self.bos_token_id = pieces.eos_id(), pieces.bos_id()
            self.special_token_ids = [token for token in ids if pieces.is_control(token)]
            self.tokens = [written(token) for token in ids]

        def __call__(self, text: bytes) -> list[int]:
            return pieces.encode(text.decode().removeprefix(" "))  # SentencePiece writes a space of its own.

    def written(token: int) -> bytes:
        piece: str = pieces.id_to_piece(token)
        return bytes([int(piece[1:-1], 16)]) if pieces.is_byte(token) else piece.replace("▁", " ").encode()

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Pieces()))


def accepts(guide: llguidance.LLTokenizer, grammar: str | None, ids: list[int]) -> bool:
    """Whether a reply of `ids` is what the grammar asks for, from begin to end."""
    assert grammar is not None
    matcher = llguidance.LLMatcher(guide, grammar)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def called(tokenizer: Tokenizer, text: str) -> list[int]:
    assert tokenizer.tool_calls_id is not None
    return [tokenizer.tool_calls_id, *tokenizer.encode(text, bos=False)]


def test_a_required_call_may_be_to_any_of_the_tools_and_to_several(
    v3: Tokenizer, guide: llguidance.LLTokenizer
) -> None:
    rules = tool_rules(TOOLS, ToolChoice.of("required"), v3)
    assert rules.tools == tuple(TOOLS)
    for text in (f"[{PARIS}]", f"[{STEPS}]", f"[{PARIS}, {STEPS}, {PARIS}]", '[{"name": "time", "arguments": {}}]'):
        assert accepts(guide, rules.grammar, called(v3, text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        f"[{PARIS}",
        f"[{PARIS}] and more",
        f"[{PARIS.replace('get_weather', 'get_whether')}]",
        f"[{PARIS.replace('celsius', 'kelvin')}]",
        f"[{PARIS.replace('city', 'town')}]",
        f"[{STEPS.replace('-2', 'null')}]",
        '[{"name": "time", "arguments": 12}]',
        '[{"name": "time"}]',
    ],
)
def test_what_breaks_a_schema_or_is_no_list_of_calls_is_not_let_through(
    v3: Tokenizer, guide: llguidance.LLTokenizer, text: str
) -> None:
    assert not accepts(guide, tool_rules(TOOLS, ToolChoice.of("required"), v3).grammar, called(v3, text))


def test_a_required_call_is_no_plain_text(v3: Tokenizer, guide: llguidance.LLTokenizer) -> None:
    grammar = tool_rules(TOOLS, ToolChoice.of("required"), v3).grammar
    for text in ("Hello", f"[{PARIS}]", f"[TOOL_CALLS] [{PARIS}]"):
        assert not accepts(guide, grammar, v3.encode(text, bos=False))


def test_a_named_function_is_the_only_one_let_through(v3: Tokenizer, guide: llguidance.LLTokenizer) -> None:
    rules = tool_rules(TOOLS, ToolChoice.of("walk"), v3)
    assert rules.tools == tuple(TOOLS)
    assert accepts(guide, rules.grammar, called(v3, f"[{STEPS}]"))
    assert not accepts(guide, rules.grammar, called(v3, f"[{PARIS}]"))


def test_without_parallel_there_is_one_call(v3: Tokenizer, guide: llguidance.LLTokenizer) -> None:
    grammar = tool_rules(TOOLS, ToolChoice.of("required", parallel=False), v3).grammar
    assert accepts(guide, grammar, called(v3, f"[{PARIS}]"))
    assert not accepts(guide, grammar, called(v3, f"[{PARIS}, {STEPS}]"))


def test_much_of_a_required_call_is_forced(v3: Tokenizer, guide: llguidance.LLTokenizer) -> None:
    grammar = tool_rules(TOOLS, ToolChoice.of("get_weather"), v3).grammar
    assert grammar is not None
    matcher = llguidance.LLMatcher(guide, grammar)
    forced = matcher.compute_ff_tokens()
    expected = called(v3, '[{"name": "get_weather", "arguments": {"city":')
    assert forced[: len(expected)] == expected


def test_auto_leaves_it_to_the_model(v3: Tokenizer) -> None:
    assert tool_rules(TOOLS, ToolChoice(), v3) == tool_rules(TOOLS, ToolChoice.of("auto"), v3)
    assert tool_rules(TOOLS, ToolChoice(), v3).grammar is None
    assert tool_rules(TOOLS, ToolChoice(), v3).banned_tokens == ()
    assert tool_rules([], ToolChoice(), v3).tools == ()


def test_strict_auto_holds_only_calls_to_their_schemas(v3: Tokenizer, guide: llguidance.LLTokenizer) -> None:
    grammar = tool_rules(TOOLS, ToolChoice(strict=True), v3).grammar
    free = v3.encode('Well,\n {"city": [ 😀', bos=False)
    for ids in ([], free, called(v3, f"[{PARIS}]"), [*free, *called(v3, f"[{PARIS}]")]):
        assert accepts(guide, grammar, ids)
    assert not accepts(guide, grammar, called(v3, f"[{PARIS.replace('celsius', 'kelvin')}]"))
    assert not accepts(guide, grammar, called(v3, "Well"))


def test_none_bans_calls_and_does_not_tell_of_tools(v3: Tokenizer) -> None:
    rules = tool_rules(TOOLS, ToolChoice.of("none"), v3)
    assert rules.banned_tokens == (v3.tool_calls_id,)
    assert rules.tools == ()
    assert rules.grammar is None


def test_a_tokenizer_without_tool_tokens_refuses_tools_but_not_their_absence(v1: Tokenizer) -> None:
    for choice in ("auto", "required", "walk"):
        with pytest.raises(PromptError) as caught:
            tool_rules(TOOLS, ToolChoice.of(choice), v1)
        assert caught.value.code == "tools_not_supported"
    assert tool_rules(TOOLS, ToolChoice.of("none"), v1) == tool_rules([], ToolChoice(), v1)


@pytest.mark.parametrize(
    ("tools", "choice", "code", "says"),
    [
        ([], "required", "no_tools", "required"),
        ([], "walk", "no_tools", "walk"),
        (TOOLS, "run", "unknown_function", "run"),
        ([WALK, TIME, WALK], "auto", "duplicate_tool", "walk"),
        ([Tool("what's up", "", {})], "auto", "bad_tool_name", "what's up"),
        ([Tool("f", "", {"type": "string"})], "required", "bad_tool_parameters", "string"),
        ([Tool("f", "", {"default": {1, 2}})], "required", "bad_tool_parameters", "set"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_by_name(
    v3: Tokenizer, tools: list[Tool], choice: str, code: str, says: str
) -> None:
    with pytest.raises(ToolError, match=says) as caught:
        tool_rules(tools, ToolChoice.of(choice), v3)
    assert caught.value.code == code


def test_a_mode_that_cannot_be_is_refused() -> None:
    with pytest.raises(ToolError, match="sometimes"):
        ToolChoice("sometimes")  # type: ignore[arg-type]
    with pytest.raises(ToolError, match="walk"):
        ToolChoice("auto", "walk")


def test_a_function_named_like_a_mode_can_be_chosen(v3: Tokenizer, guide: llguidance.LLTokenizer) -> None:
    rules = tool_rules([Tool("none", "", {}), TIME], ToolChoice("required", "none"), v3)
    assert accepts(guide, rules.grammar, called(v3, '[{"name": "none", "arguments": {}}]'))


# Streams


def streamed(parts: list[str], *, cut: bool = False) -> tuple[ToolCallStream, list[ToolCall], str]:
    """A stream that was fed `parts`, the calls that its deltas make, and its text."""
    stream = ToolCallStream()
    out = [delta for part in parts for delta in stream.feed(part)] + stream.finish(cut=cut)
    text = "".join(delta for delta in out if isinstance(delta, str))
    calls: dict[int, ToolCall] = {}
    for delta in out:
        if isinstance(delta, ToolCallDelta):
            known = calls.get(delta.index, ToolCall(delta.name, "", delta.id))
            assert delta.index in calls or (delta.index == len(calls) and delta.id and delta.name)
            calls[delta.index] = ToolCall(known.name, known.arguments + delta.arguments, known.id)
    return stream, list(calls.values()), text


def meaning(calls: list[ToolCall]) -> list[tuple[str, Any]]:
    return [(call.name, loaded(call.arguments)) for call in calls]


def loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(max_size=5), values, max_size=3)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """A call as a model may write it: members in any order, arguments as an object, as text, as null or left out."""
    members: dict[str, Any] = {"name": draw(st.from_regex(r"[a-zA-Z0-9_-]{1,9}", fullmatch=True))}
    given_arguments = draw(arguments)
    kind = draw(st.sampled_from(["object", "text", "null", "none"]))
    if kind != "none":
        members["arguments"] = {
            "object": given_arguments,
            "text": json.dumps(given_arguments, ensure_ascii=draw(st.booleans())),
            "null": None,
        }[kind]
    members |= draw(st.dictionaries(st.sampled_from(["id", "type", "", "é"]), values, max_size=2))
    return dict(draw(st.permutations(list(members.items()))))


@st.composite
def replies(draw: st.DrawFn) -> str:
    """A valid reply, with its spaces and escapes in any of the ways JSON has."""
    calls: Any = draw(st.lists(entries(), min_size=1, max_size=3))
    calls = calls[0] if draw(st.booleans()) and len(calls) == 1 else calls
    indent = draw(st.sampled_from([None, 0, 2]))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:\r ")]))
    text = json.dumps(calls, indent=indent, separators=separators, ensure_ascii=draw(st.booleans()))
    return draw(st.sampled_from(["", " ", "\n "])) + text + draw(st.sampled_from(["", " \n"]))


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places})
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


cuts = st.lists(st.integers(0, 1 << 16), max_size=12)


@given(replies(), cuts)
def test_a_reply_in_any_parts_gives_the_calls_of_the_whole(reply: str, places: list[int]) -> None:
    _, expected = parse_tool_calls(reply, 0)
    stream, calls, text = streamed(cut(reply, places))
    assert expected
    assert meaning(calls) == meaning(expected)
    assert text == ""
    assert stream.is_complete
    assert stream.calls == calls


@given(replies(), cuts)
def test_one_by_one_gives_the_same_as_all_at_once(reply: str, places: list[int]) -> None:
    whole, single = streamed([reply])[1], streamed(list(reply))[1]
    assert [(call.name, call.arguments) for call in whole] == [(call.name, call.arguments) for call in single]


@given(replies(), st.integers(0, 1 << 16), st.text('[]{}",:\\u0123eE+-. \nntrue', max_size=6), cuts)
def test_a_damaged_reply_is_calls_only_as_far_as_it_is_valid_and_nothing_is_dropped(
    reply: str, place: int, damage: str, places: list[int]
) -> None:
    place %= len(reply)
    damaged = reply[:place] + damage + reply[place + 1 :]
    expected_text, expected = parse_tool_calls(damaged, 0)
    stream, calls, text = streamed(cut(damaged, places))
    assert damaged.endswith(text)
    if stream.is_complete:
        assert text == ""
        assert meaning(stream.calls) == meaning(expected)
    else:
        assert expected == [] or has_a_key_twice(damaged)
    if not calls:
        assert text == expected_text or stream.is_complete


def has_a_key_twice(text: str) -> bool:
    found = False

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        found |= len({key for key, _ in pairs}) < len(pairs)
        return dict(pairs)

    json.loads(text, object_pairs_hook=members)
    return found


@given(st.text(max_size=40), cuts)
def test_text_that_is_no_call_comes_back_whole(text: str, places: list[int]) -> None:
    stream, calls, given_back = streamed(cut(text, places))
    assert (stream.calls, calls, given_back) == ([], [], text)


def test_arguments_come_as_they_are_written() -> None:
    stream = ToolCallStream()
    assert stream.feed('[{"name": "f"') == []
    [first] = stream.feed(', "argum')
    assert isinstance(first, ToolCallDelta)
    assert (first.index, first.name, first.arguments, len(first.id)) == (0, "f", "", 9)
    assert stream.feed('ents": {"a": "x\\"}') == [ToolCallDelta(0, arguments='{"a": "x\\"}')]
    assert stream.feed(" \\u00") == [ToolCallDelta(0, arguments=" \\u00")]
    assert stream.feed('e9"}}') == [ToolCallDelta(0, arguments='e9"}')]
    assert stream.feed("]") == stream.finish() == []
    assert stream.calls == [ToolCall("f", '{"a": "x\\"} \\u00e9"}', first.id)]


def test_arguments_before_the_name_come_with_it_and_an_id_is_kept() -> None:
    stream = ToolCallStream()
    assert stream.feed('[{"id": "abcDEF123", "arguments": {"a": [1, 2]}, "name": "f"') == []
    assert stream.feed("}]") == [ToolCallDelta(0, "abcDEF123", "f", '{"a": [1, 2]}')]


def test_a_single_object_is_a_call() -> None:
    stream, calls, text = streamed(['{"name": "f"}'])
    assert (meaning(calls), text, stream.is_complete) == ([("f", {})], "", True)


def test_a_reply_that_is_cut_off_gives_what_came_and_is_not_complete() -> None:
    stream, calls, text = streamed(['[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": 1'])
    assert [call.name for call in stream.calls] == ["f"]
    assert [(call.name, call.arguments) for call in calls] == [("f", "{}"), ("g", '{"a": 1')]
    assert text == ""
    assert not stream.is_complete


TWO = f"[{PARIS}, {STEPS}]"


def test_of_calls_that_are_cut_anywhere_nothing_is_text_and_the_complete_ones_are_whole() -> None:
    whole = streamed([TWO])[1]
    for place in range(len(TWO)):
        stream, calls, text = streamed([TWO[:place]], cut=True)
        assert text == ""
        assert meaning(stream.calls) == meaning(whole)[: len(stream.calls)]
        assert len(stream.calls) == (place >= TWO.index(PARIS) + len(PARIS)) + (place >= TWO.index(STEPS) + len(STEPS))
        begun = calls[len(stream.calls) :]
        assert stream.begun == (len(stream.calls) if begun else None)
        for call in begun:
            expected = whole[len(stream.calls)]
            assert call.name == expected.name
            assert expected.arguments.startswith(call.arguments)


def test_what_was_no_list_of_calls_stays_text_where_it_is_cut() -> None:
    stream, calls, text = streamed(["[1, 2", ", 3"], cut=True)
    assert (calls, text, stream.begun) == ([], "[1, 2, 3", None)


@pytest.mark.parametrize("how", ["length", "cancelled"])
def test_an_answer_that_is_cut_in_its_calls_says_which_is_not_complete(v3: Tokenizer, how: str) -> None:
    ids = called(v3, TWO)
    model: Any = SimpleNamespace(args=SimpleNamespace(vocab_size=v3.vocab_size, eos_token_ids=[v3.eos_id]))
    seen = set()
    for count in range(1, len(ids)):
        limit = count if how == "length" else len(ids) + 1
        request = Request((1,), Sampling(max_tokens=limit), rules=ToolRules(tuple(TOOLS)))
        answering = Answering(request, channel := Channel(), limit, None, PassSeconds(8, 2))
        answering.start(model, v3, None)
        answering.begin_reading(model, (0, []))
        for token in ids[:count]:
            answering.take([Step(token, 0.0, ())])
        if how == "cancelled":
            answering.cancel()
        result = Reply(channel).result()
        assert (result.text, result.finish_reason) == ("", how)
        complete = result.tool_calls if result.cut_call is None else result.tool_calls[: result.cut_call]
        assert meaning(list(complete)) == meaning(streamed([TWO])[1])[: len(complete)]
        assert len(result.tool_calls) - len(complete) <= 1
        seen.add((len(complete), result.cut_call))
    assert {(0, None), (0, 0), (1, None), (1, 1)} <= seen


@pytest.mark.parametrize("text", ["[]", "[1]", '[{"arguments": {}}]', '[{"name": "no name"}]', "null", '{"name": 1}'])
def test_json_that_is_no_call_is_text(text: str) -> None:
    assert streamed([text])[1:] == ([], text)
    assert parse_tool_calls(text, 0) == (text, [])


def test_text_after_the_calls_is_given_back() -> None:
    stream, calls, text = streamed(['[{"name": "f"}] Do', "n", "e."])
    assert (meaning(calls), text, stream.is_complete) == ([("f", {})], " Done.", False)


def test_half_a_surrogate_pair_in_arguments_makes_no_call() -> None:
    stream, _, _ = streamed(['[{"name": "f", "arguments": {"a": "\\ud83d"}}]'])
    assert stream.calls == []
    _, calls, _ = streamed(['[{"name": "f", "arguments": "{\\"a\\": \\"', "\\ud8", '3d\\ude00\\"}"}]'])
    assert meaning(calls) == [("f", {"a": "😀"})]


def test_a_nest_that_json_could_not_read_is_no_call() -> None:
    nest = '[{"name": "f", "arguments": {"a": ' + "[" * 10_000 + "]" * 10_000 + "}}]"
    stream, _, text = streamed([nest])
    assert stream.calls == parse_tool_calls(nest, 0)[1] == []
    assert nest.endswith(text)
