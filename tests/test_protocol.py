"""OpenAI's and Anthropic's JSON ↔ what the engine takes and gives, held to the real packages' own models."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic.types as anthropic
import anthropic.types.beta.message_create_params as anthropic_beta
import jsonschema
import pytest
import typing_extensions
from anthropic.types import message_create_params as anthropic_params
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import types as openai
from openai.types import chat as openai_chat
from openai.types import completion_create_params, responses
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params
from pydantic import TypeAdapter

from mixtral_mlx import Engine, MixtralError, Request, Result, Sampling, load
from mixtral_mlx.engine.request import Done, EngineError, Event, PromptProgress, Token, ToolCallDelta
from mixtral_mlx.engine.request import Text as Rest
from mixtral_mlx.generate import Text, Usage
from mixtral_mlx.prompt import Message, PromptError, Tokenizer, ToolCall
from mixtral_mlx.protocol import PARSERS, Call, Frame, Refused, error_body, model, models, openapi, shapes
from mixtral_mlx.protocol import anthropic as messages
from mixtral_mlx.protocol import openai_chat as chat
from mixtral_mlx.protocol import responses as replies
from mixtral_mlx.protocol.conversation import as_prompted
from mixtral_mlx.protocol.fields import ENTRIES, FIELDS, as_markdown
from mixtral_mlx.protocol.openapi import ANSWERS, BODIES
from tests.checkpoints import TINY, write_tiny
from tests.protocol_samples import CHAT_TOOL, LEAST, MESSAGES_TOOL, ONLY_ONE_VALUE, RESPONSES_TOOL, USER, VALUES, WITH

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT, EMBEDDINGS, TOKENIZE = "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/tokenize"
PUBLISHED: list[tuple[str, Any]] = [
    (CHAT, chat_params.CompletionCreateParamsStreaming),
    (COMPLETIONS, completion_create_params.CompletionCreateParamsStreaming),
    (RESPONSES, response_create_params.ResponseCreateParamsStreaming),
    (EMBEDDINGS, openai.EmbeddingCreateParams),
    (MESSAGES, anthropic_params.MessageCreateParamsStreaming),
    (MESSAGES, anthropic_beta.MessageCreateParamsStreaming),
    (COUNT, anthropic.MessageCountTokensParams),
]
USAGE = Usage(10, 4, 3, 0.1, 0.1)


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    with load() as engine:
        yield engine


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A model of random weights with 8x22B's tokenizer, which has tokens for tools."""
    folder = tmp_path_factory.mktemp("v3") / "model"
    with load(write_tiny(folder, replace(TINY, vocab_size=32768), tokenizer="v3")) as engine:
        yield engine


def understood(path: str, body: object, engine: Engine) -> Call:
    return PARSERS[path](body, engine)


def refused(path: str, body: object, engine: Engine) -> Refused:
    with pytest.raises(Refused) as caught:
        understood(path, body, engine)
    return caught.value


def events_of(call: Call, engine: Engine) -> list[list[Event]]:
    return [list(reply) for request, n in call.asked for reply in engine.choices(n, request)]


def whole(path: str, body: dict[str, Any], engine: Engine) -> dict[str, Any]:
    call = understood(path, body, engine)
    return call.answer([Result.of(events) for events in events_of(call, engine)])


def frames_of(call: Call, events: Sequence[Sequence[Event]]) -> list[Frame]:
    """The frames of all results, an event of each in turn."""
    stream = call.stream()
    frames = stream.begin()
    for place in range(max(map(len, events))):
        for index, some in enumerate(events):
            if place < len(some):
                frames += stream.feed(index, some[place])
    return [*frames, *stream.end()]


def streamed(path: str, body: dict[str, Any], engine: Engine) -> list[Frame]:
    call = understood(path, {**body, "stream": True}, engine)
    return frames_of(call, events_of(call, engine))


# Fields.


@pytest.mark.parametrize(("path", "params"), PUBLISHED)
def test_every_field_of_the_real_clients_is_in_the_table(path: str, params: Any) -> None:
    assert typing_extensions.get_type_hints(params).keys() <= FIELDS[path].keys()


@pytest.mark.parametrize("path", FIELDS)
def test_the_models_have_the_fields_that_are_read_and_no_other(path: str) -> None:
    read = {name for name, field in FIELDS[path].items() if field.treatment in ("honoured", "label")}
    assert BODIES[path].model_fields.keys() == read == VALUES[path].keys()


_MESSAGES_MODELS: dict[str, list[Any]] = {
    "messages[]": [messages.UserMessage, messages.AssistantMessage, messages.SystemMessage],
    "messages[].content[]": [messages.TextBlock, messages.ToolUseBlock, messages.ToolResultBlock],
}
MODELS: dict[str, dict[str, list[Any]]] = {
    CHAT: {
        "messages[]": [chat.SystemMessage, chat.UserMessage, chat.AssistantMessage, chat.ToolMessage],
        "messages[].content[]": [chat.TextPart],
    },
    RESPONSES: {
        "input[]": [replies.MessageItem, replies.CallItem, replies.OutputItem],
        "input[].content[]": [replies.InputText, replies.OutputText],
    },
    MESSAGES: _MESSAGES_MODELS,
    COUNT: _MESSAGES_MODELS,
}


def test_entries_of_lists_have_the_fields_that_the_table_says() -> None:
    found = {
        path: {where: {name for one in them for name in one.model_fields} for where, them in lists.items()}
        for path, lists in MODELS.items()
    }
    assert found == {path: {where: {*them} for where, them in lists.items()} for path, lists in ENTRIES.items()}


@pytest.mark.parametrize("role", ["System", "Developer", "User", "Assistant", "Tool"])
def test_every_field_of_a_message_of_the_real_client_is_in_the_table(role: str) -> None:
    params = getattr(openai_chat, f"ChatCompletion{role}MessageParam")
    assert typing_extensions.get_type_hints(params).keys() <= ENTRIES[CHAT]["messages[]"].keys()


@pytest.mark.parametrize("path", [CHAT, TOKENIZE])
def test_names_of_those_who_speak_change_nothing(path: str, v3: Engine) -> None:
    calls = [{"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "developer", "content": "Be brief."},
        USER,
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "Sunny."},
        USER,
    ]
    named = [{**turn, "name": "ann"} for turn in turns]
    assert effect(path, {"messages": named}, v3) == effect(path, {"messages": turns}, v3)
    for place, turn in enumerate(turns):
        error = refused(path, {"messages": [*turns[:place], {**turn, "name": 7}]}, v3)
        assert error.param == f"messages.{place}.name"


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in FIELDS for name, field in FIELDS[path].items() if field.treatment == "refused"],
)
def test_what_cannot_be_honoured_is_refused_by_name(path: str, name: str, v3: Engine) -> None:
    anything: list[Any] = ["anything", 1, True, {"a": "b"}, []]
    for value in anything:
        error = refused(path, {**LEAST[path], name: value}, v3)
        assert (error.status, error.param, error.code) == (400, name, "unsupported_field")
        assert name in str(error)
        assert error.hint
    assert understood(path, {**LEAST[path], name: None}, v3)


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in FIELDS for name, field in FIELDS[path].items() if field.treatment == "fixed"],
)
def test_a_fixed_field_takes_what_is_done_in_any_case_only(path: str, name: str, v3: Engine) -> None:
    plain = effect(path, LEAST[path], v3)
    for value in (None, *FIELDS[path][name].values):
        assert effect(path, {**LEAST[path], name: value}, v3) == plain
    for value in ("other", 1, 0, True, [], {"type": "enabled", "budget_tokens": 1024}):
        error = refused(path, {**LEAST[path], name: value}, v3)
        assert (error.param, error.code) == (name, "unsupported_value")
        assert all(json.dumps(allowed) in str(error) for allowed in FIELDS[path][name].values)


def effect(path: str, body: dict[str, Any], engine: Engine) -> str:
    """All that a body asks of the engine, and all that is said of the same events, but for ids and times."""
    call = understood(path, body, engine)
    (hi,) = engine.tokenizer.encode("Hi", bos=False)
    script: list[Event] = [Token("Hi", hi, -0.5, ((hi, -0.5), (6, -1.0))), Done("stop", USAGE)]
    count = sum(n for _, n in call.asked)
    said: object = call.answer([replace(Result.of(script), embedding=(0.6, 0.8))] * count)
    if call.streams:
        said = [frame.data for frame in frames_of(call, [script] * count)]
    return f"{call.asked} {call.streams} {without_ids(said)}"


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: without_ids(inner)
            for key, inner in value.items()
            if key not in ("id", "created", "created_at", "item_id")
        }
    return [without_ids(inner) for inner in value] if isinstance(value, list) else value


HONOURED = [(path, name) for path in FIELDS for name, field in FIELDS[path].items() if field.treatment == "honoured"]


@pytest.mark.parametrize(("path", "name"), HONOURED)
def test_what_is_honoured_reaches_the_engine_or_the_answer(path: str, name: str, v3: Engine) -> None:
    least = {**LEAST[path], **WITH.get((path, name), {})}
    if (path, name) == (TOKENIZE, "messages"):
        least = LEAST[path]
    body = {**least, **WITH.get((path, name), {}), name: VALUES[path][name]}
    without, with_it = effect(path, least, v3), effect(path, body, v3)
    assert (without == with_it) == ((path, name) in ONLY_ONE_VALUE)


LABELS = [(path, name) for path in FIELDS for name, field in FIELDS[path].items() if field.treatment == "label"]


@pytest.mark.parametrize(("path", "name"), LABELS)
def test_a_label_changes_nothing_and_must_be_one(path: str, name: str, v3: Engine) -> None:
    body = {**LEAST[path], name: VALUES[path][name]}
    assert effect(path, body, v3) == effect(path, LEAST[path], v3)
    assert refused(path, {**LEAST[path], name: 7}, v3).param == name


SETTINGS: dict[str, tuple[Any, Any]] = {
    "temperature": (0.5, 0.5),
    "top_p": (0.25, 0.25),
    "seed": (-1, (1 << 64) - 1),
    "stop": ("x", ("x",)),
    "max_tokens": (7, 7),
    "presence_penalty": (0.5, 0.5),
    "frequency_penalty": (-0.5, -0.5),
    "logit_bias": ({"17": -100}, {17: -100}),
    "top_k": (5, 5),
    "min_p": (0.1, 0.1),
    "repetition_penalty": (1.1, 1.1),
    "min_tokens": (2, 2),
    "ignore_eos": (True, True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_reaches_the_request_as_it_was_given(name: str, demo: Engine) -> None:
    sent, expected = SETTINGS[name]
    for path in (CHAT, COMPLETIONS):
        ((request, n),) = understood(path, {**LEAST[path], name: sent}, demo).asked
        assert n == 1
        assert getattr(request.sampling, name) == expected


def test_what_is_left_out_is_as_these_apis_have_it(demo: Engine) -> None:
    for path in (CHAT, RESPONSES, MESSAGES, COMPLETIONS):
        sampling = understood(path, LEAST[path], demo).asked[0][0].sampling
        most = {CHAT: None, RESPONSES: None, MESSAGES: 9, COMPLETIONS: 16}[path]
        assert sampling == Sampling(temperature=1, top_p=1, max_tokens=most)


def test_a_top_p_of_0_leaves_the_likeliest_token_alone(demo: Engine) -> None:
    for path in (CHAT, RESPONSES, MESSAGES, COMPLETIONS):
        asked = understood(path, {**LEAST[path], "top_p": 0, "seed": 4}, demo).asked[0][0]
        likeliest = replace(asked, sampling=replace(asked.sampling, temperature=0.0, max_tokens=5))
        bold = replace(asked, sampling=replace(asked.sampling, temperature=100.0, max_tokens=5))
        assert demo.submit(bold).result().tokens == demo.submit(likeliest).result().tokens


@pytest.mark.parametrize("path", LEAST)
def test_an_unknown_field_is_refused_by_name(path: str, demo: Engine) -> None:
    error = refused(path, {**LEAST[path], "frobnicate": 1}, demo)
    assert (error.status, error.param, error.code) == (400, "frobnicate", "unknown_field")


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": [{**USER, "colour": 1}]}, "messages.0.colour"),
    (CHAT, {"messages": [USER, {"role": "user"}]}, "messages.1.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    (CHAT, {"messages": [{"role": "bot", "content": ""}]}, "messages.0.role"),
    (CHAT, {"messages": [{"content": ""}]}, "messages.0.role"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": [USER], "temperature": 2.1}, "temperature"),
    (CHAT, {"messages": [USER], "temperature": True}, "temperature"),
    (CHAT, {"messages": [USER], "n": 0}, "n"),
    (CHAT, {"messages": [USER], "n": "2"}, "n"),
    (CHAT, {"messages": [USER], "stop": ["a", ""]}, "stop.1"),
    (CHAT, {"messages": [USER], "stop": ["a"] * 65}, "stop"),
    (CHAT, {"messages": [USER], "logit_bias": {"Hi": 1}}, "logit_bias"),
    (CHAT, {"messages": [USER], "logit_bias": {"32768": 1}}, "logit_bias"),
    (CHAT, {"messages": [USER], "logit_bias": {"1": 101}}, "logit_bias.1"),
    (CHAT, {"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": [USER], "stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    (CHAT, {"messages": [USER], "tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools.0.type"),
    (CHAT, {"messages": [USER], "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
    (CHAT, {"messages": [USER], "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt.1"),
    (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of"),
    (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "a"}]}, "input.0.type"),
    (RESPONSES, {"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.type"),
    (RESPONSES, {"input": "a", "include": ["file_search_call.results"]}, "include.0"),
    (RESPONSES, {"input": "a", "reasoning": {"effort": "high"}}, "reasoning.effort"),
    (MESSAGES, {"messages": [USER]}, "max_tokens"),
    (MESSAGES, {**LEAST[MESSAGES], "tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
    (MESSAGES, {**LEAST[MESSAGES], "output_config": {"effort": "low"}}, "output_config.effort"),
    (EMBEDDINGS, {"input": [[]]}, "input.0"),
    (EMBEDDINGS, {"input": ["a"] * 2049}, "input"),
    (TOKENIZE, {}, "prompt"),
    (TOKENIZE, {"prompt": "a", "messages": [USER]}, "prompt"),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_a_refusal_names_the_field(path: str, body: dict[str, Any], param: str, v3: Engine) -> None:
    error = refused(path, body, v3)
    assert (error.status, error.param) == (400, param)
    assert param.rpartition(".")[2] in str(error)


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([CHAT_TOOL, CHAT_TOOL], "auto", "tools"),
        ([{"type": "function", "function": {"name": "a b"}}], "auto", "tools"),
        ([], "required", "tool_choice"),
        ([CHAT_TOOL], {"type": "function", "function": {"name": "time"}}, "tool_choice"),
    ],
)
def test_tools_that_cannot_be_offered_are_refused_as_such(tools: Any, choice: Any, param: str, v3: Engine) -> None:
    assert refused(CHAT, {**LEAST[CHAT], "tools": tools, "tool_choice": choice}, v3).param == param


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (CHAT, {"type": "image_url", "image_url": {"url": "data:,"}}),
        (CHAT, {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
        (CHAT, {"type": "file", "file": {}}),
        (RESPONSES, {"type": "input_image", "image_url": "data:,"}),
        (MESSAGES, {"type": "image", "source": {}}),
        (MESSAGES, {"type": "document", "source": {}}),
    ],
)
def test_images_audio_and_files_are_refused_as_such(path: str, part: dict[str, Any], demo: Engine) -> None:
    turns = [{"role": "user", "content": [part]}]
    error = refused(path, {**LEAST[path], "input" if path == RESPONSES else "messages": turns}, demo)
    assert (error.status, error.code) == (400, "unsupported_content")
    assert "text only" in str(error)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES, COUNT])
def test_a_model_without_tokens_for_tools_refuses_them_by_name(path: str, demo: Engine) -> None:
    tool = {CHAT: CHAT_TOOL, RESPONSES: RESPONSES_TOOL}.get(path, MESSAGES_TOOL)
    error = refused(path, {**LEAST[path], "tools": [tool]}, demo)
    assert (error.status, error.code) == (400, "tools_not_supported")


# Names of the model.


@pytest.mark.parametrize("path", LEAST)
def test_the_served_name_default_and_aliases_are_taken_and_others_are_not_found(path: str, demo: Engine) -> None:
    for name in ("demo", "default", None):
        assert understood(path, {**LEAST[path], "model": name}, demo)
    error = refused(path, {**LEAST[path], "model": "claude-sonnet-4-5"}, demo)
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert PARSERS[path]({**LEAST[path], "model": "claude-sonnet-4-5"}, demo, aliases=("claude-*",))


def test_the_list_of_models_is_read_by_both_kinds_of_clients(v3: Engine) -> None:
    answer = models(v3)
    assert [openai.Model.model_validate(one).id for one in answer["data"]] == ["model"]
    assert anthropic.ModelInfo.model_validate(answer["data"][0]).max_input_tokens == v3.context
    assert shapes.Models.model_validate(answer).data == [shapes.Model.model_validate(model(v3))]


def test_a_list_of_one_has_nothing_before_or_after_it(v3: Engine) -> None:
    for page in ({"limit": "1"}, {"limit": "1000"}):
        assert models(v3, page) == models(v3)
    for page in ({"after_id": "model"}, {"before_id": "model", "limit": "5"}):
        answer = models(v3, page)
        assert (answer["data"], answer["first_id"], answer["has_more"]) == ([], None, False)
        shapes.Models.model_validate(answer)
    for name, value in (("limit", "0"), ("limit", "1001"), ("limit", "x"), ("after_id", "gpt-4o"), ("before_id", "")):
        with pytest.raises(Refused, match=f"{name} is '{value}', expected") as caught:
            models(v3, {name: value})
        assert (caught.value.status, caught.value.param) == (400, name)


def test_where_the_model_lies_is_told_to_nobody(v3: Engine) -> None:
    assert "/" in v3.name
    assert v3.name not in json.dumps([models(v3), whole(CHAT, {**LEAST[CHAT], "max_tokens": 1}, v3)])
    assert understood(CHAT, {**LEAST[CHAT], "model": models(v3)["data"][0]["id"]}, v3)


# Conversations.


def prompted(path: str, body: dict[str, Any], engine: Engine) -> tuple[int, ...]:
    return understood(path, {**LEAST[path], **body}, engine).asked[0][0].prompt


CALL = {"id": "call_abc", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TURNS = [
    Message("system", "Be kind."),
    Message("user", "Hi"),
    Message("assistant", "", (ToolCall("weather", '{"city": "Rome"}', "call_abc"),)),
    Message("tool", "Sunny", tool_call_id="call_abc"),
    Message("user", "And now?\n\nQuick."),
]
SAME: list[tuple[str, dict[str, Any]]] = [
    (
        CHAT,
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": []},
                {"role": "tool", "content": [{"type": "text", "text": "Sunny"}], "tool_call_id": "call_abc"},
                {"role": "user", "content": [{"type": "text", "text": "And now?"}, {"type": "text", "text": "Quick."}]},
            ]
        },
    ),
    (
        CHAT,
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                USER,
                {"role": "assistant", "content": "I shall look.", "tool_calls": [CALL]},
                {"role": "tool", "content": "Sunny", "tool_call_id": "call_abc"},
                {"role": "system", "content": "And now?"},
                {"role": "user", "content": "Quick."},
            ]
        },
    ),
    (
        RESPONSES,
        {
            "instructions": "Be kind.",
            "input": [
                USER,
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "I shall look.", "annotations": [], "logprobs": []}],
                },
                {"type": "function_call", "call_id": "call_abc", "name": "weather", "arguments": '{"city": "Rome"}'},
                {"type": "function_call_output", "call_id": "call_abc", "output": "Sunny"},
                {"role": "developer", "content": [{"type": "input_text", "text": "And now?"}]},
                {"role": "user", "content": "Quick."},
            ],
        },
    ),
    (
        MESSAGES,
        {
            "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral", "ttl": "5m"}}],
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "I shall look."},
                        {"type": "tool_use", "id": "call_abc", "name": "weather", "input": {"city": "Rome"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "call_abc", "content": "Sunny"},
                        {"type": "text", "text": "And now?"},
                    ],
                },
                {"role": "system", "content": "Quick."},
            ],
        },
    ),
]


@pytest.mark.parametrize(("path", "body"), SAME)
def test_the_same_conversation_is_the_same_prompt_by_every_api(path: str, body: dict[str, Any], v3: Engine) -> None:
    assert prompted(path, body, v3) == tuple(v3.tokenizer.encode_chat(TURNS))


def test_a_tool_that_failed_says_so(v3: Engine) -> None:
    turns = json.loads(json.dumps(SAME[3][1]["messages"]))
    turns[2]["content"][0]["is_error"] = True
    ids = prompted(MESSAGES, {"messages": turns}, v3)
    assert "Error: Sunny" in v3.tokenizer.decode(ids)


def test_answers_that_follow_one_another_are_one() -> None:
    call = ToolCall("f", "{}", "a")
    turns = [
        Message("assistant", ""),
        Message("assistant", "One"),
        Message("assistant", "Two"),
        Message("user", "Three"),
        Message("assistant", "Four", (call,)),
        Message("assistant", "", (call,)),
        Message("assistant", ""),
    ]
    assert as_prompted(turns) == [
        Message("assistant", "One\n\nTwo"),
        Message("user", "Three"),
        Message("assistant", "", (call, call)),
    ]


def test_a_conversation_that_ends_with_an_answer_is_refused(demo: Engine) -> None:
    error = refused(MESSAGES, {"max_tokens": 3, "messages": [USER, {"role": "assistant", "content": "The"}]}, demo)
    assert (error.status, error.code, error.param) == (400, "ends_with_assistant", "messages")


@pytest.mark.parametrize("system", [None, "Be kind.", [{"type": "text", "text": "Be kind."}]])
def test_the_count_of_tokens_is_exact(system: Any, demo: Engine) -> None:
    body = {"messages": [{"role": "user", "content": "¿Qué? 🤷🏽‍♀️"}], "system": system}
    counted = whole(COUNT, body, demo)
    usage = whole(MESSAGES, {**body, "max_tokens": 1}, demo)["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


# Answers, held to the real packages' models and to ours.

CAPITAL = "What is the capital of France?"
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": CAPITAL}], "temperature": 0},
    COMPLETIONS: {"prompt": "The capital of France", "temperature": 0},
    RESPONSES: {"input": CAPITAL, "temperature": 0},
    MESSAGES: {"messages": [{"role": "user", "content": CAPITAL}], "temperature": 0, "max_tokens": 20},
}
REAL: dict[str, Any] = {
    CHAT: openai_chat.ChatCompletion,
    COMPLETIONS: openai.Completion,
    RESPONSES: responses.Response,
    MESSAGES: anthropic.Message,
    EMBEDDINGS: openai.CreateEmbeddingResponse,
    COUNT: anthropic.MessageTokensCount,
}
REAL_EVENTS: dict[str, TypeAdapter[Any]] = {
    CHAT: TypeAdapter(openai_chat.ChatCompletionChunk),
    COMPLETIONS: TypeAdapter(openai.Completion),
    RESPONSES: TypeAdapter(responses.ResponseStreamEvent),
    MESSAGES: TypeAdapter(anthropic.RawMessageStreamEvent),
}
DOCUMENT = openapi("0")


def check_answer(path: str, answer: dict[str, Any]) -> None:
    """By the real package, by our model of it and by the document."""
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    if path in REAL:
        REAL[path].model_validate(answer)
    ANSWERS[path].model_validate(answer)
    (operation,) = DOCUMENT["paths"][path].values()
    check_schema(operation["responses"]["200"]["content"]["application/json"]["schema"], answer)


def check_schema(schema: dict[str, Any], value: object) -> None:
    jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


def check_frames(path: str, frames: Sequence[Frame]) -> None:
    for frame in frames:
        if isinstance(frame.data, str):
            assert frame == Frame("[DONE]")
            continue
        text = json.dumps(frame.data, allow_nan=False)
        text.encode()
        if path == COMPLETIONS:
            # The package has one type for both, so in it a chunk cannot say that it is not the last.
            text = text.replace('"finish_reason": null', '"finish_reason": "stop"')
        if frame.event != "ping":
            REAL_EVENTS[path].validate_json(text)
        if path in (CHAT, COMPLETIONS):
            (shapes.ChatCompletionChunk if path == CHAT else shapes.Completion).model_validate(frame.data)
        assert frame.event == (frame.data["type"] if path in (RESPONSES, MESSAGES) else None)


def datas(frames: Sequence[Frame]) -> list[dict[str, Any]]:
    return [frame.data for frame in frames if isinstance(frame.data, dict)]


def text_in(path: str, frames: Sequence[Frame], index: int = 0) -> str:
    """The text a client puts together."""
    found = []
    for data in datas(frames):
        if path in (CHAT, COMPLETIONS):
            for choice in data["choices"]:
                if choice["index"] == index:
                    found.append(choice["text"] if path == COMPLETIONS else choice["delta"].get("content") or "")
        elif data["type"] == "response.output_text.delta":
            found.append(data["delta"])
        elif data["type"] == "content_block_delta" and data["delta"]["type"] == "text_delta":
            found.append(data["delta"]["text"])
    return "".join(found)


def text_of(path: str, answer: dict[str, Any]) -> str:
    if path in (CHAT, COMPLETIONS):
        choice = answer["choices"][0]
        return choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    if path == MESSAGES:
        return "".join(block["text"] for block in answer["content"] if block["type"] == "text")
    return "".join(part["text"] for item in answer["output"] for part in item.get("content", ()))


ENDS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {}, "stop"),
    (CHAT, {"stop": ["Paris"]}, "stop"),
    (CHAT, {"max_tokens": 3}, "length"),
    (COMPLETIONS, {"stop": "Paris"}, "stop"),
    (COMPLETIONS, {"max_tokens": 2}, "length"),
    (RESPONSES, {}, "completed"),
    (RESPONSES, {"max_output_tokens": 3}, "incomplete"),
    (MESSAGES, {}, "end_turn"),
    (MESSAGES, {"stop_sequences": ["Paris"]}, "stop_sequence"),
    (MESSAGES, {"max_tokens": 3}, "max_tokens"),
]


@pytest.mark.parametrize(("path", "extra", "why"), ENDS)
def test_an_answer_is_the_same_whole_and_streamed(path: str, extra: dict[str, Any], why: str, demo: Engine) -> None:
    body = {**ASKED[path], **extra}
    answer, frames = whole(path, body, demo), streamed(path, body, demo)
    check_answer(path, answer)
    check_frames(path, frames)
    assert text_in(path, frames) == text_of(path, answer)
    assert ("Paris" in text_of(path, answer)) == (not extra or (path == COMPLETIONS and "max_tokens" in extra))
    assert ended(path, answer, frames) == [why, why]


def ended(path: str, answer: dict[str, Any], frames: Sequence[Frame]) -> list[str]:
    """Why the answer ends, and each reason in the frames."""
    if path == RESPONSES:
        last = datas(frames)[-1]
        assert last["type"] == f"response.{last['response']['status']}"
        return [answer["status"], last["response"]["status"]]
    if path == MESSAGES:
        deltas = [data for data in datas(frames) if data["type"] == "message_delta"]
        return [answer["stop_reason"], *(data["delta"]["stop_reason"] for data in deltas)]
    reasons = [choice["finish_reason"] for data in datas(frames) for choice in data["choices"]]
    return [answer["choices"][0]["finish_reason"], *filter(None, reasons)]


def test_anthropic_is_told_which_stop_sequence_it_was(demo: Engine) -> None:
    body = {**ASKED[MESSAGES], "stop_sequences": ["Rome", "is"]}
    answer, frames = whole(MESSAGES, body, demo), streamed(MESSAGES, body, demo)
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "is")
    assert datas(frames)[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "is"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_choices_keep_apart_and_end_once_each(path: str, demo: Engine) -> None:
    prompts = 2 if path == COMPLETIONS else 1
    body = {**ASKED[path], "n": 3, "temperature": 1.5, "seed": 5, "max_tokens": 8}
    body |= {"stream_options": {"include_usage": True}} | ({"prompt": ["One", "Two"]} if prompts == 2 else {})
    frames = streamed(path, body, demo)
    body.pop("stream_options")
    answer = whole(path, body, demo)
    check_frames(path, frames)
    check_answer(path, answer)
    assert [choice["index"] for choice in answer["choices"]] == [*range(3 * prompts)]
    for index in range(3 * prompts):
        assert text_in(path, frames, index) == text_of(path, {"choices": answer["choices"][index:]})
    *rest, usage, done = frames
    reasons = [choice["index"] for data in datas(rest) for choice in data["choices"] if choice["finish_reason"]]
    assert sorted(reasons) == [*range(3 * prompts)]
    assert all(data["usage"] is None for data in datas(rest))
    assert done == Frame("[DONE]")
    told = usage.data
    assert isinstance(told, dict)
    assert told["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert told["usage"][key] == answer["usage"][key]
    lengths = [len(request.prompt) for request, _ in understood(path, body, demo).asked]
    assert answer["usage"]["prompt_tokens"] == sum(lengths)


def test_an_echo_comes_first(demo: Engine) -> None:
    body = {**ASKED[COMPLETIONS], "echo": True, "max_tokens": 3}
    answer = whole(COMPLETIONS, body, demo)
    assert text_of(COMPLETIONS, answer).startswith("The capital of France")
    assert text_in(COMPLETIONS, streamed(COMPLETIONS, body, demo)) == text_of(COMPLETIONS, answer)


def test_embeddings_have_length_1_and_are_the_same_in_base64(demo: Engine) -> None:
    plain = whole(EMBEDDINGS, {"input": ["Hi", "Ho"]}, demo)
    check_answer(EMBEDDINGS, plain)
    assert sum(value * value for value in plain["data"][1]["embedding"]) == pytest.approx(1)
    ids = [demo.tokenizer.encode(text) for text in ("Hi", "Ho")]
    packed = whole(EMBEDDINGS, {"input": ids, "encoding_format": "base64"}, demo)
    for one, other in zip(plain["data"], packed["data"], strict=True):
        data = base64.b64decode(other["embedding"])
        other["embedding"] = list(struct.unpack(f"<{len(data) // 4}f", data))
        assert other["embedding"] == pytest.approx(one["embedding"], rel=1e-3, abs=1e-4)
    check_answer(EMBEDDINGS, packed)
    assert packed["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_tokens_are_those_the_model_would_read(demo: Engine) -> None:
    answer = whole(TOKENIZE, {"prompt": "Hi ᚠ", "return_token_strs": True}, demo)
    check_answer(TOKENIZE, answer)
    assert answer["tokens"] == demo.tokenizer.encode("Hi ᚠ")
    assert answer["token_strs"] == ["<s>", "▁Hi", "▁", "<0xE1>", "<0x9A>", "<0xA0>"]
    chat = whole(TOKENIZE, {"messages": [USER]}, demo)
    assert tuple(chat["tokens"]) == prompted(CHAT, {"messages": [USER]}, demo)
    bare = whole(TOKENIZE, {"prompt": "Hi", "add_special_tokens": False}, demo)
    assert bare["tokens"] == demo.tokenizer.encode("Hi", bos=False)


# Calls of tools.

TOOLED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER], "tools": [CHAT_TOOL], "tool_choice": "required", "max_tokens": 90},
    RESPONSES: {"input": "Hi", "tools": [RESPONSES_TOOL], "tool_choice": "required", "max_output_tokens": 90},
    MESSAGES: {"messages": [USER], "tools": [MESSAGES_TOOL], "tool_choice": {"type": "any"}, "max_tokens": 90},
}


def calls_of(path: str, answer: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """The id, name and arguments of each call."""
    if path == CHAT:
        called = answer["choices"][0]["message"]["tool_calls"]
        return [(one["id"], one["function"]["name"], json.loads(one["function"]["arguments"])) for one in called]
    if path == RESPONSES:
        items = [item for item in answer["output"] if item["type"] == "function_call"]
        return [(item["call_id"], item["name"], json.loads(item["arguments"])) for item in items]
    blocks = [block for block in answer["content"] if block["type"] == "tool_use"]
    return [(block["id"], block["name"], block["input"]) for block in blocks]


def calls_in(path: str, frames: Sequence[Frame]) -> list[tuple[str, str, Any]]:
    """The same as a client puts them together."""
    calls: dict[Any, list[str]] = {}
    for data in datas(frames):
        if path == CHAT:
            for choice in data["choices"]:
                for delta in choice["delta"].get("tool_calls", ()):
                    if "id" in delta:
                        assert delta["index"] not in calls
                        calls[delta["index"]] = [delta["id"], delta["function"]["name"], ""]
                    calls[delta["index"]][2] += delta["function"]["arguments"]
        elif data["type"] == "content_block_start" and data["content_block"]["type"] == "tool_use":
            calls[data["index"]] = [data["content_block"]["id"], data["content_block"]["name"], ""]
        elif data["type"] == "content_block_delta" and data["delta"]["type"] == "input_json_delta":
            calls[data["index"]][2] += data["delta"]["partial_json"]
        elif data["type"] == "response.output_item.added" and data["item"]["type"] == "function_call":
            calls[data["output_index"]] = [data["item"]["call_id"], data["item"]["name"], ""]
        elif data["type"] == "response.function_call_arguments.delta":
            calls[data["output_index"]][2] += data["delta"]
    return [(id, name, json.loads(arguments)) for id, name, arguments in calls.values()]


@pytest.mark.parametrize("path", TOOLED)
@pytest.mark.parametrize("parallel", [True, False])
def test_calls_come_whole_and_streamed_and_can_be_sent_back(path: str, parallel: bool, v3: Engine) -> None:
    body = dict(TOOLED[path])
    if not parallel:
        one = {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
        body |= one if path == MESSAGES else {"parallel_tool_calls": False}
    call = understood(path, body, v3)
    ((request, _),) = call.asked
    events = list(v3.submit(replace(request, sampling=replace(request.sampling, seed=7))))
    answer = call.answer([Result.of(events)])
    frames = frames_of(understood(path, {**body, "stream": True}, v3), [events])
    check_answer(path, answer)
    check_frames(path, frames)
    calls = calls_of(path, answer)
    assert calls == calls_in(path, frames)
    assert [name for _, name, _ in calls] == ["weather"] * (len(calls) if parallel else 1)
    jsonschema.validate(calls[0][2], MESSAGES_TOOL["input_schema"])
    assert set(ended(path, answer, frames)) == {{CHAT: "tool_calls", RESPONSES: "completed"}.get(path, "tool_use")}
    again = sent_back(path, answer, [id for id, _, _ in calls])
    ids = prompted(path, again, v3)
    assert all(call_id in v3.tokenizer.decode(ids) for call_id, _, _ in calls)


def sent_back(path: str, answer: dict[str, Any], ids: Sequence[str]) -> dict[str, Any]:
    """The next turn's body, with results for all calls."""
    if path == CHAT:
        results = [{"role": "tool", "content": "Sunny", "tool_call_id": call_id} for call_id in ids]
        return {"messages": [USER, answer["choices"][0]["message"], *results]}
    if path == RESPONSES:
        given = [{"type": "function_call_output", "call_id": call_id, "output": "Sunny"} for call_id in ids]
        return {"input": [USER, *answer["output"], *given]}
    blocks = [{"type": "tool_result", "tool_use_id": call_id, "content": "Sunny"} for call_id in ids]
    content = {"role": "assistant", "content": answer["content"]}
    return {"messages": [USER, content, {"role": "user", "content": blocks}]}


SCRIPT: list[Event] = [
    PromptProgress(10, 10, 4),
    Token("I shall ", 5, -0.1),
    Token("look.", 6, -0.1),
    ToolCallDelta(0, "aaaaaaaaa", "weather", ""),
    ToolCallDelta(0, arguments='{"city": '),
    Token("", 7, -0.1),
    ToolCallDelta(0, arguments='"Rome"}'),
    ToolCallDelta(1, "bbbbbbbbb", "weather", "{}"),
    Done("tool_calls", USAGE),
]


@pytest.mark.parametrize("path", TOOLED)
def test_text_and_parallel_calls_in_one_answer_are_told_apart(path: str, v3: Engine) -> None:
    call = understood(path, {**LEAST[path], "stream": True}, v3)
    answer, frames = call.answer([Result.of(SCRIPT)]), frames_of(call, [SCRIPT])
    check_answer(path, answer)
    check_frames(path, frames)
    expected = [("aaaaaaaaa", "weather", {"city": "Rome"}), ("bbbbbbbbb", "weather", {})]
    assert calls_of(path, answer) == calls_in(path, frames) == expected
    assert text_of(path, answer) == text_in(path, frames) == "I shall look."
    again = sent_back(path, answer, ["aaaaaaaaa", "bbbbbbbbb"])
    assert understood(path, {**LEAST[path], **again}, v3)


def test_the_blocks_of_a_message_come_one_after_the_other(v3: Engine) -> None:
    frames = frames_of(understood(MESSAGES, {**LEAST[MESSAGES], "stream": True}, v3), [SCRIPT])
    kinds = [frame.event for frame in frames]
    block = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"]
    second = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", "ping", *block, *block, *second, "message_delta", "message_stop"]
    places = [data["index"] for data in datas(frames) if "index" in data]
    assert places == [0] * 4 + [1] * 4 + [2] * 3
    usage = {"input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": 3}
    assert datas(frames)[-2]["usage"] == usage


def test_the_events_of_a_response_come_in_order_and_are_numbered(v3: Engine) -> None:
    frames = frames_of(understood(RESPONSES, {**LEAST[RESPONSES], "stream": True}, v3), [SCRIPT])
    kinds = [frame.event.removeprefix("response.") for frame in frames if frame.event]
    assert kinds == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert [data["sequence_number"] for data in datas(frames)] == [*range(len(frames))]
    last = datas(frames)[-1]["response"]
    assert last["output"] == [data["item"] for data in datas(frames) if data["type"] == "response.output_item.done"]


def test_arguments_that_are_no_object_are_kept_as_text(v3: Engine) -> None:
    for arguments in ("Rome", "[1]", '{"a": 1e999}', "[" * 5000, '{"a": ' + "9" * 5000 + "}"):
        events: list[Event] = [ToolCallDelta(0, "aaaaaaaaa", "weather", arguments), Done("tool_calls", USAGE)]
        answer = understood(MESSAGES, LEAST[MESSAGES], v3).answer([Result.of(events)])
        assert answer["content"][0]["input"] == {"arguments": arguments}
        check_answer(MESSAGES, answer)


@pytest.mark.parametrize("path", ASKED)
def test_an_answer_that_was_cut_off_does_not_look_whole(path: str, demo: Engine) -> None:
    script: list[Event] = [Token("Hi", 5, -0.1), Rest(" th"), Done("cancelled", USAGE)]
    call = understood(path, {**ASKED[path], "stream": True}, demo)
    answer, frames = call.answer([Result.of(script)]), frames_of(call, [script])
    check_answer(path, answer)
    check_frames(path, frames)
    assert text_in(path, frames) == text_of(path, answer) == "Hi th"
    expected = {RESPONSES: "incomplete", MESSAGES: "max_tokens"}.get(path, "length")
    assert ended(path, answer, frames) == [expected, expected]


@pytest.mark.parametrize("path", TOOLED)
def test_a_call_that_was_cut_off_is_told_from_a_complete_one(path: str, v3: Engine) -> None:
    call = understood(path, {**LEAST[path], "stream": True}, v3)
    complete: list[Event] = [ToolCallDelta(0, "aaaaaaaaa", "weather", '{"city": "Rome"}')]
    cut: list[Event] = [ToolCallDelta(1, "bbbbbbbbb", "weather", '{"ci'), Done("length", USAGE, cut_call=1)]
    for script in ([*complete, *cut], [*complete, Done("length", USAGE)]):
        answer, frames = call.answer([Result.of(script)]), frames_of(call, [script])
        check_answer(path, answer)
        check_frames(path, frames)
        assert not text_of(path, answer)
        if path == CHAT:
            assert [made["function"]["arguments"] for made in answer["choices"][0]["message"]["tool_calls"]] == [
                event.arguments for event in script if isinstance(event, ToolCallDelta)
            ]
        elif path == RESPONSES:
            told = datas(frames)[-1]["response"]
            for output in (answer["output"], told["output"]):
                assert [item["status"] for item in output] == ["completed", "incomplete"][: len(script) - 1]
        else:
            assert [(block["name"], block["input"]) for block in answer["content"]] == [("weather", {"city": "Rome"})]


def test_a_context_that_is_full_is_told_from_max_tokens(demo: Engine) -> None:
    call = understood(MESSAGES, {**LEAST[MESSAGES], "max_tokens": 3}, demo)
    full = understood(MESSAGES, {**LEAST[MESSAGES], "max_tokens": 4}, demo)
    result = Result.of([Done("length", USAGE)])
    assert call.answer([result])["stop_reason"] == "max_tokens"
    assert full.answer([result])["stop_reason"] == "model_context_window_exceeded"


@pytest.mark.parametrize("path", ASKED)
def test_an_answer_of_nothing_is_one(path: str, demo: Engine) -> None:
    call = understood(path, {**ASKED[path], "stream": True}, demo)
    script: list[Event] = [Done("stop", USAGE)]
    answer = call.answer([Result.of(script)])
    check_answer(path, answer)
    check_frames(path, frames_of(call, [script]))
    assert text_of(path, answer) == ""


# Errors.

FAULTS: list[tuple[MixtralError, int, str, str]] = [
    (Refused("No.", code="too_large", status=413), 413, "invalid_request_error", "request_too_large"),
    (Refused("No.", code="model_not_found", status=404), 404, "invalid_request_error", "not_found_error"),
    (Refused("No.", code="bad_key", status=401), 401, "authentication_error", "authentication_error"),
    (EngineError("Full.", code="queue_full", retryable=True), 429, "rate_limit_error", "rate_limit_error"),
    (EngineError("Closed.", code="closed"), 503, "server_error", "overloaded_error"),
    (EngineError("Too late.", code="timeout"), 504, "server_error", "timeout_error"),
    (EngineError("Failed.", code="step_failed", retryable=True), 500, "server_error", "api_error"),
    (EngineError("Too much.", code="over_budget"), 400, "invalid_request_error", "invalid_request_error"),
    (PromptError("Odd.", code="bad_conversation"), 400, "invalid_request_error", "invalid_request_error"),
    (MixtralError("The weights are gone.", code="no_weights"), 500, "server_error", "api_error"),
]


@pytest.mark.parametrize(("error", "status", "openai_type", "anthropic_type"), FAULTS)
def test_errors_are_written_as_each_api_has_them(
    error: MixtralError, status: int, openai_type: str, anthropic_type: str
) -> None:
    found, body = error_body(CHAT, error)
    assert (found, body["error"]["type"], body["error"]["code"]) == (status, openai_type, error.code)
    shapes.OpenAIError.model_validate(body)
    found, body = error_body(MESSAGES, error)
    assert (found, body["error"]["type"]) == (status, anthropic_type)
    shapes.AnthropicError.model_validate(body)
    if status != 413:  # It is in Anthropic's documentation, and not in this type.
        assert anthropic.ErrorResponse.model_validate(body).error.message == str(error)


def test_a_full_context_is_told_as_clients_look_for_it(demo: Engine) -> None:
    ((request, n),) = understood(COMPLETIONS, {"prompt": "a " * 2000}, demo).asked
    with pytest.raises(MixtralError) as caught:
        demo.choices(n, request)
    assert error_body(COMPLETIONS, caught.value)[1]["error"]["code"] == "context_length_exceeded"
    assert error_body(MESSAGES, caught.value)[1]["error"]["message"].startswith("prompt is too long")


LONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": [{"role": "user", "content": "hello world " * 40_000}]}, "messages"),
    (RESPONSES, {"input": "hello world " * 40_000}, "input"),
    (MESSAGES, {"messages": [{"role": "user", "content": "hello world " * 40_000}], "max_tokens": 9}, "messages"),
    (COMPLETIONS, {"prompt": ["Hi", "hello world " * 40_000]}, "prompt"),
    (EMBEDDINGS, {"input": ["Hi", "hello world " * 40_000]}, "input"),
]


@pytest.mark.parametrize(("path", "body", "param"), LONG)
def test_what_no_context_holds_is_refused_before_it_is_encoded(
    path: str, body: dict[str, Any], param: str, demo: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoded(*args: object, **how: object) -> list[int]:
        raise AssertionError("It was encoded.")

    monkeypatch.setattr(Tokenizer, "encode", encoded)
    monkeypatch.setattr(Tokenizer, "encode_chat", encoded)
    error = refused(path, body, demo)
    assert (error.status, error.code, error.param) == (400, "context_full", param)


PIECES = st.sampled_from(
    [" " * 16, " representatives", " straightforward", "a", "\n", "\t", "é", "e\u0301", "😀", "\0"]
)
SAID = st.lists(PIECES, min_size=1, max_size=8).map("".join)
RESULTS = SAID | st.sampled_from(
    ['{"a":   1,   "b":  [1.50000000000,  "\\u00e9"] }', '"[1,    2]"', "[" * 9000, "9" * 5000]
)


@settings(deadline=None)
@given(data=st.data(), saids=st.lists(SAID, min_size=1, max_size=4))
def test_told_from_its_length_a_prompt_is_never_longer_than_it_is(
    demo: Engine, v3: Engine, data: st.DataObject, saids: list[str]
) -> None:
    turns = [Message("system", data.draw(SAID))]
    for said in saids:
        turns += [Message("user", said), Message("assistant", "a" + said)]
    for engine, conversation in (
        (demo, turns[:-1]),
        (v3, turns[:-1]),
        (v3, [*turns, *_with_result(data.draw(RESULTS))]),
    ):
        with suppress(PromptError):
            assert engine.tokenizer.fewest_tokens(conversation) <= len(engine.tokenizer.encode_chat(conversation))
    text = "".join(saids)
    assert v3.tokenizer.fewest_tokens(text) <= len(v3.tokenizer.encode(text, bos=False))


def _with_result(result: str) -> list[Message]:
    call = ToolCall("weather", "{}", "abcdefghi")
    return [Message("user", "?"), Message("assistant", "", (call,)), Message("tool", result, tool_call_id="abcdefghi")]


def test_tokens_of_what_no_context_holds_can_be_counted(demo: Engine) -> None:
    long = {"role": "user", "content": "hello world " * 10_000}
    for path, body in (
        (COUNT, {"messages": [long]}),
        (TOKENIZE, {"prompt": long["content"]}),
        (TOKENIZE, {"messages": [long]}),
    ):
        answer = whole(path, body, demo)
        assert answer["input_tokens" if path == COUNT else "count"] > demo.context


@pytest.mark.parametrize("path", ASKED)
def test_an_error_within_a_stream_ends_it_as_the_api_says(path: str, demo: Engine) -> None:
    stream = understood(path, {**ASKED[path], "stream": True}, demo).stream()
    before = [*stream.begin(), *stream.feed(0, Token("Hi", 5, -0.1))]
    failed = stream.fail(EngineError("Out of memory.", code="out_of_memory", hint="Wait.", retryable=True))
    check_frames(path, before)
    if path in (CHAT, COMPLETIONS):
        error, done = failed
        assert done == Frame("[DONE]")
        assert error.data == error_body(path, EngineError("Out of memory.", code="out_of_memory", hint="Wait."))[1]
        return
    (last,) = failed
    assert isinstance(last.data, dict)
    if path == MESSAGES:
        assert last.event == "error"
        assert last.data == {"type": "error", "error": {"type": "overloaded_error", "message": "Out of memory. Wait."}}
        return
    check_frames(path, failed)
    response = last.data["response"]
    assert (last.event, response["status"], response["error"]["code"]) == ("response.failed", "failed", "server_error")
    assert response["output"][0]["content"][0]["text"] == "Hi"


# Log probabilities.


def scripted(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], stops: Sequence[str]) -> list[Event]:
    """What the engine puts out where a model says these ids."""
    text = Text(tokenizer, prompt, Sampling(stop=tuple(stops)), len(ids), [tokenizer.eos_id])
    events: list[Event] = []
    for token in ids:
        shown, reason = text.add(token)
        events.append(Token(shown, token, -0.25, ((token, -0.25), (5, -2.0))))
        if reason:
            return [*events, Done(reason, USAGE, stop_text=text.stops.hit)]
    raise AssertionError


TEXTS = st.text(st.sampled_from("ab é\u20ac\U0001f937\u200d\u2640ᚠ"), min_size=1, max_size=12)


@given(TEXTS, st.lists(st.text("abé\u20ac", min_size=1, max_size=3), max_size=2), st.integers(0, 3))
def test_the_bytes_of_the_tokens_are_the_text(demo: Engine, text: str, stops: list[str], cut: int) -> None:
    body = {**LEAST[CHAT], "logprobs": True, "top_logprobs": 2, "stream": True}
    call = understood(CHAT, body, demo)
    ids = [*demo.tokenizer.encode(text, bos=False)][: -cut or None] or [500]
    events = scripted(demo.tokenizer, call.asked[0][0].prompt, [*ids, demo.tokenizer.eos_id], stops)
    answer, frames = call.answer([Result.of(events)]), frames_of(call, [events])
    check_answer(CHAT, answer)
    check_frames(CHAT, frames)
    choice = answer["choices"][0]
    content, entries = choice["message"]["content"], choice["logprobs"]["content"]
    joined = b"".join(bytes(entry["bytes"]) for entry in entries)
    done = events[-1]
    assert isinstance(done, Done)
    if done.stop_text:  # The last token may have more text than was shown.
        assert joined.decode(errors="replace").startswith(content)
        assert len(joined) - len(content.encode()) < max((len(entry["bytes"]) for entry in entries), default=1)
    else:
        assert joined.decode(errors="replace").replace("\ufffd", "") == content.replace("\ufffd", "")
    parts = [data["choices"][0]["logprobs"] for data in datas(frames) if data["choices"]]
    assert [entry for part in parts if part for entry in part["content"]] == entries
    assert text_in(CHAT, frames) == content


def test_part_of_a_character_has_its_byte(demo: Engine) -> None:
    call = understood(CHAT, {**LEAST[CHAT], "logprobs": True}, demo)
    events = scripted(demo.tokenizer, call.asked[0][0].prompt, demo.tokenizer.encode("ᚠ", bos=False)[1:], ())
    entries = call.answer([Result.of(events)])["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"]) for entry in entries] == [
        ("bytes:\\xe1", [0xE1]),
        ("bytes:\\x9a", [0x9A]),
        ("bytes:\\xa0", [0xA0]),
    ]


def test_a_token_that_is_no_text_has_no_bytes_and_ends_a_character_that_was_not_whole(demo: Engine) -> None:
    call = understood(CHAT, {**LEAST[CHAT], "logprobs": True}, demo)
    half, unknown = demo.tokenizer.encode("ᚠ", bos=False)[1], 0
    events = scripted(demo.tokenizer, call.asked[0][0].prompt, [half, unknown, half, demo.tokenizer.eos_id], ())
    choice = call.answer([Result.of(events)])["choices"][0]
    assert choice["message"]["content"] == "\ufffd \u2047 \ufffd"
    written = [(entry["token"], entry["bytes"]) for entry in choice["logprobs"]["content"]]
    assert written == [("bytes:\\xe1", [0xE1]), ("<unk>", None), ("bytes:\\xe1", [0xE1])]


def test_tokens_of_completions_are_where_the_text_has_them(demo: Engine) -> None:
    answer = whole(COMPLETIONS, {**ASKED[COMPLETIONS], "logprobs": 3, "max_tokens": 8}, demo)
    check_answer(COMPLETIONS, answer)
    logprobs, text = answer["choices"][0]["logprobs"], text_of(COMPLETIONS, answer)
    for token, offset, top, logprob in zip(
        logprobs["tokens"], logprobs["text_offset"], logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True
    ):
        assert text[offset:].startswith(token)
        assert top[token] == logprob
    assert "".join(logprobs["tokens"]) == text


def test_responses_give_log_probabilities_where_they_are_included(demo: Engine) -> None:
    body = {**ASKED[RESPONSES], "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    answer, frames = whole(RESPONSES, body, demo), streamed(RESPONSES, body, demo)
    check_answer(RESPONSES, answer)
    check_frames(RESPONSES, frames)
    entries = answer["output"][0]["content"][0]["logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == text_of(RESPONSES, answer)
    deltas = [data["logprobs"] for data in datas(frames) if data["type"] == "response.output_text.delta"]
    assert [entry["token"] for part in deltas for entry in part] == [entry["token"] for entry in entries]


# Whatever comes.

KEYS = ["role", "content", "type", "text", "function", "name", "arguments", "tool_calls", "id", "input", "schema"]
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**40)
    | st.floats()
    | st.text()
    | st.text(st.characters(categories=["Cs", "Cc", "Lu"]), max_size=3)
    | st.sampled_from(["user", "assistant", "tool", "text", "function", "message", "auto", "json_schema"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(KEYS), inner),
    max_leaves=12,
)


def bodies(path: str) -> st.SearchStrategy[Any]:
    """Anything, and bodies that are right but for some fields."""
    values = {
        name: st.just(value) | ANY_JSON for name, value in {**dict.fromkeys(FIELDS[path]), **VALUES[path]}.items()
    }
    some = st.fixed_dictionaries({}, optional=values).map(lambda fields: {**LEAST[path], **fields})
    return ANY_JSON | some | st.fixed_dictionaries({}, optional=values)


@pytest.mark.parametrize("path", LEAST)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_comes_is_understood_or_refused(path: str, data: st.DataObject, demo: Engine) -> None:
    check_whatever(path, data.draw(bodies(path)), demo)


@pytest.mark.long
@pytest.mark.parametrize("path", LEAST)
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_comes_is_understood_or_refused_at_length(path: str, data: st.DataObject, v3: Engine) -> None:
    check_whatever(path, data.draw(bodies(path)), v3)


def check_whatever(path: str, body: Any, engine: Engine) -> None:
    try:
        call = PARSERS[path](body, engine)
    except Refused as error:
        refusal = error
    else:
        assert all(isinstance(request, Request) and n >= 1 for request, n in call.asked)
        return
    status, told = error_body(path, refusal)
    assert 400 <= status < 500
    json.dumps(told, ensure_ascii=False).encode()


def nested(depth: int, make: Any) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = make(value)
    return value


HOSTILE: list[Any] = [
    nested(100_000, lambda inner: [inner]),
    nested(100_000, lambda inner: {"a": inner}),
    10**5000,
    -(10**5000),
    float("nan"),
    float("inf"),
    1e308,
    "\ud800",
    "\udfff\ud800",
    "\x00",
    "a" * 100_000,
    [None] * 10_000,
    {"\ud800": 1},
    {"\x00": 1},
    {str(place): place for place in range(10_000)},
    [[]],
    [{}],
    True,
    b"bytes",
    {1: 2},
    {None: 1},
    object(),
]


@pytest.mark.parametrize("path", LEAST)
def test_hostile_values_are_refused_wherever_they_are(path: str, v3: Engine) -> None:
    for value in HOSTILE:
        check_whatever(path, value, v3)
        for name in VALUES[path]:
            check_whatever(path, {**LEAST[path], **WITH.get((path, name), {}), name: value}, v3)
        schema = {"type": "object", "properties": {"a": value}}
        for tool in ({"input_schema": schema}, {"function": {"name": "f", "parameters": schema}}):
            check_whatever(path, {**LEAST[path], "tools": [{"type": "function", "name": "f", **tool}]}, v3)


def test_a_nul_is_text_like_any_other(demo: Engine) -> None:
    ids = prompted(COMPLETIONS, {"prompt": "a\x00b"}, demo)
    assert demo.tokenizer.decode(ids[1:]) == "a\x00b"


# The document.


def test_the_document_is_openapi_and_has_every_operation() -> None:
    assert DOCUMENT["paths"].keys() == {*PARSERS, "/v1/models", "/v1/models/{model}"}
    jsonschema.Draft202012Validator.check_schema(
        {"$defs": DOCUMENT["components"]["schemas"], "allOf": [{"$ref": "#/$defs/ChatBody"}]}
    )
    keyed = openapi("0", with_key=True)
    assert keyed["security"] == [{name: []} for name in ("bearer", "x-api-key", "api-key")]


@pytest.mark.parametrize("path", LEAST)
def test_the_document_takes_and_refuses_fields_as_the_parser_does(path: str, v3: Engine) -> None:
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    check_schema(schema, LEAST[path])
    for name, value in VALUES[path].items():
        check_schema(schema, {**LEAST[path], name: value})
    wrong = [{**LEAST[path], name: "anything"} for name, field in FIELDS[path].items() if field.treatment == "refused"]
    wrong += [{**LEAST[path], "frobnicate": 1}, {}, {**LEAST[path], "model": 1}]
    for body in wrong:
        if path == TOKENIZE and body == {}:
            continue  # That one of two is needed is not said there.
        assert refused(path, body, v3)
        with pytest.raises(jsonschema.ValidationError):
            check_schema(schema, body)


def test_the_documentation_has_the_table_as_it_is() -> None:
    page = (Path(__file__).parent.parent / "docs" / "API.md").read_text(encoding="utf-8")
    assert page.partition("## `")[1] + page.partition("## `")[2] == as_markdown()
