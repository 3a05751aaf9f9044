"""Real clients against a real server: each does what it can of 15 things, and gets what the engine says by itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import anthropic
import openai
import pytest
from langchain_openai import ChatOpenAI

from mixtral_mlx.engine.engine import Engine, load
from mixtral_mlx.prompt import Message, Tool, ToolCall

from .checkpoints import TINY, write_tiny
from .serving import Served, answers, events, served
from .test_server import until

HELLO = [{"role": "user", "content": "Hello"}]
CITIES = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = Tool("weather", "The weather", CITIES)
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"},
]
CALLED_TO_THE_ENGINE = [
    Message("user", "Weather in Rome?"),
    Message("assistant", "", (ToolCall("weather", '{"city": "Rome"}', "abcdefghi"),)),
    Message("tool", "sunny", tool_call_id="abcdefghi"),
]


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    with load() as engine:
        yield engine


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A model of random weights with 8x22B's tokenizer, which has tokens for tools."""
    folder = tmp_path_factory.mktemp("tools") / "tiny"
    with load(write_tiny(folder, replace(TINY, vocab_size=32768), tokenizer="v3")) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(demo: Engine) -> Iterator[Served]:
    with served(demo, api_key="secret") as running:
        yield running


@pytest.fixture(scope="module")
def tool_server(tools: Engine) -> Iterator[Served]:
    with served(tools, api_key="secret") as running:
        yield running


@dataclass(frozen=True)
class Question:
    """What a client is to ask, as OpenAI's API has it."""

    messages: Sequence[dict[str, Any]] = tuple(HELLO)
    max_tokens: int = 12
    temperature: float = 0.0
    model: str = "default"
    stop: tuple[str, ...] = ()
    tools: bool = False
    parallel: bool = True
    schema: dict[str, Any] | None = None
    top_logprobs: int = 0
    n: int = 1
    seed: int | None = None

    def openai(self) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": list(self.messages),
            "max_completion_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        if self.stop:
            asked["stop"] = list(self.stop)
        if self.tools:
            function = {"name": "weather", "description": "The weather", "parameters": CITIES}
            asked |= {"tools": [{"type": "function", "function": function}], "parallel_tool_calls": self.parallel}
            asked["tool_choice"] = "auto" if len(self.messages) > 1 else "required"
        if self.schema:
            asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": self.schema}}
        if self.top_logprobs:
            asked |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.n > 1:
            asked["n"] = self.n
        if self.seed is not None:
            asked["seed"] = self.seed
        return asked

    def anthropic(self) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [_to_anthropic(message) for message in self.messages],
            "max_tokens": self.max_tokens,
            "extra_body": {"temperature": self.temperature},  # The client no longer has an argument for it.
        }
        if self.stop:
            asked["stop_sequences"] = list(self.stop)
        if self.tools:
            asked["tools"] = [{"name": "weather", "description": "The weather", "input_schema": CITIES}]
            kind = "auto" if len(self.messages) > 1 else "any"
            asked["tool_choice"] = {"type": kind, "disable_parallel_tool_use": not self.parallel}
        if self.schema:
            asked["output_config"] = {"format": {"type": "json_schema", "schema": self.schema}}
        return asked


def _to_anthropic(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        part = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}
        return {"role": "user", "content": [part]}
    calls = [
        {
            "type": "tool_use",
            "id": call["id"],
            "name": call["function"]["name"],
            "input": json.loads(call["function"]["arguments"]),
        }
        for call in message.get("tool_calls", ())
    ]
    return {"role": message["role"], "content": calls or message["content"]}


@dataclass
class Said:
    """What a client made of an answer."""

    text: str = ""
    calls: tuple[tuple[str, Any], ...] = ()
    finish: str | None = None
    tokens: tuple[int, int] = (0, 0)  # of the prompt, and of the answer
    pieces: int = 1
    logprobs: tuple[float, ...] = ()
    tops: tuple[int, ...] = ()


class OpenAI:
    """openai-python."""

    def __init__(self, server: Served) -> None:
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)

    def close(self) -> None:
        self.client.close()

    def models(self) -> list[str]:
        return [model.id for model in self.client.models.list()]

    def ask(self, question: Question) -> list[Said]:
        return [_from_openai(answer) for answer in _split(self.client.chat.completions.create(**question.openai()))]

    def stream(self, question: Question, most: int | None = None) -> Said:
        options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        with self.client.chat.completions.create(**question.openai(), **options) as stream:
            return _joined_openai(chunk for chunk, _ in zip(stream, range(most or 10**6), strict=False))

    def failing(self, question: Question) -> tuple[int, str | None]:
        with pytest.raises(openai.APIStatusError) as failed:
            self.ask(question)
        return failed.value.status_code, failed.value.code


class AsyncOpenAI(OpenAI):
    """openai-python, asyncio."""

    def __init__(self, server: Served) -> None:
        self.url = f"{server.url}/v1"

    def close(self) -> None:
        """Each question has a client of its own."""

    def _run(self, ask: Callable[[openai.AsyncOpenAI], Any]) -> Any:
        async def run() -> Any:
            async with openai.AsyncOpenAI(base_url=self.url, api_key="secret", max_retries=0) as client:
                return await ask(client)

        return asyncio.run(run())

    def models(self) -> list[str]:
        async def ask(client: openai.AsyncOpenAI) -> list[str]:
            return [model.id async for model in client.models.list()]

        return self._run(ask)

    def ask(self, question: Question) -> list[Said]:
        answer = self._run(lambda client: client.chat.completions.create(**question.openai()))
        return [_from_openai(one) for one in _split(answer)]

    def stream(self, question: Question, most: int | None = None) -> Said:
        options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}

        async def ask(client: openai.AsyncOpenAI) -> list[Any]:
            chunks: list[Any] = []
            async with await client.chat.completions.create(**question.openai(), **options) as stream:
                async for chunk in stream:
                    chunks.append(chunk)
                    if len(chunks) == most:
                        break
            return chunks

        return _joined_openai(self._run(ask))


def _split(answer: Any) -> list[tuple[Any, Any]]:
    return [(choice, answer.usage) for choice in answer.choices]


def _from_openai(answer: tuple[Any, Any]) -> Said:
    choice, usage = answer
    calls = choice.message.tool_calls or ()
    logprobs = choice.logprobs.content if choice.logprobs else ()
    return Said(
        choice.message.content or "",
        tuple((call.function.name, json.loads(call.function.arguments)) for call in calls),
        choice.finish_reason,
        (usage.prompt_tokens, usage.completion_tokens),
        logprobs=tuple(one.logprob for one in logprobs),
        tops=tuple(len(one.top_logprobs) for one in logprobs),
    )


def _joined_openai(chunks: Any) -> Said:
    said, pieces = Said(), 0
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        if chunk.usage:
            said.tokens = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
        for choice in chunk.choices:
            said.text += choice.delta.content or ""
            said.finish = choice.finish_reason or said.finish
            pieces += bool(choice.delta.content)
            for call in choice.delta.tool_calls or ():
                parts = calls.setdefault(call.index, ["", ""])
                parts[0] += call.function.name or ""
                parts[1] += call.function.arguments or ""
    said.pieces = pieces
    said.calls = tuple((name, json.loads(arguments)) for name, arguments in calls.values()) if said.finish else ()
    return said


class Anthropic(OpenAI):
    """anthropic-python."""

    def __init__(self, server: Served) -> None:
        self.messages = anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0)

    def close(self) -> None:
        self.messages.close()

    def models(self) -> list[str]:
        return [model.id for model in self.messages.models.list()]

    def ask(self, question: Question) -> list[Said]:
        return [_from_anthropic(self.messages.messages.create(**question.anthropic()))]

    def stream(self, question: Question, most: int | None = None) -> Said:
        pieces = 0
        with self.messages.messages.stream(**question.anthropic()) as stream:
            for event in stream:
                pieces += event.type == "text"
                if pieces == most:
                    return Said(pieces=pieces)
            said = _from_anthropic(stream.get_final_message())
        said.pieces = pieces
        return said

    def failing(self, question: Question) -> tuple[int, str | None]:
        with pytest.raises(anthropic.APIStatusError) as failed:
            self.ask(question)
        body: Any = failed.value.body
        return failed.value.status_code, body["error"]["type"]


def _from_anthropic(message: Any) -> Said:
    finish = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}
    return Said(
        "".join(part.text for part in message.content if part.type == "text"),
        tuple((part.name, part.input) for part in message.content if part.type == "tool_use"),
        finish[message.stop_reason],
        (message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0), message.usage.output_tokens),
    )


class LangChain(OpenAI):
    """LangChain's ChatOpenAI."""

    def __init__(self, server: Served) -> None:
        self.url = f"{server.url}/v1"
        self.http = openai.DefaultHttpxClient()

    def close(self) -> None:
        self.http.close()

    def _model(self, question: Question) -> Any:
        asked = question.openai()
        made = {name: asked.pop(name) for name in ("temperature", "n", "seed", "model") if name in asked}
        del asked["messages"]
        url: Any = self.url
        key: Any = "secret"
        model = ChatOpenAI(base_url=url, api_key=key, stream_usage=True, max_retries=0, http_client=self.http, **made)
        return model.bind(**asked)

    def ask(self, question: Question) -> list[Said]:
        model = self._model(question)
        answer = model.bound.generate([list(map(_to_langchain, question.messages))], **model.kwargs)
        return [_from_langchain(one.message) for one in answer.generations[0]]

    def stream(self, question: Question, most: int | None = None) -> Said:
        whole, pieces = None, 0
        for chunk in self._model(question).stream(list(question.messages)):
            whole = chunk if whole is None else whole + chunk
            pieces += bool(chunk.content)
            if pieces == most:
                return Said(pieces=pieces)
        said = _from_langchain(whole)
        said.pieces = pieces
        return said


def _to_langchain(message: dict[str, Any]) -> Any:
    from langchain_core.messages import convert_to_messages

    return convert_to_messages([message])[0]


def _from_langchain(message: Any) -> Said:
    logprobs = (message.response_metadata.get("logprobs") or {}).get("content") or ()
    usage = message.usage_metadata
    return Said(
        message.content,
        tuple((call["name"], call["args"]) for call in message.tool_calls),
        message.response_metadata["finish_reason"],
        (usage["input_tokens"], usage["output_tokens"]),
        logprobs=tuple(one["logprob"] for one in logprobs),
        tops=tuple(len(one["top_logprobs"]) for one in logprobs),
    )


# The 15 things.


@dataclass(frozen=True)
class Place:
    """A client at work, and the engine it is served by."""

    client: OpenAI
    engine: Engine


def models(at: Place) -> None:
    assert at.client.models() == ["demo"]


def plain(at: Place) -> None:
    expected = at.engine.chat("Hello", max_tokens=12).result()
    [said] = at.client.ask(Question())
    assert (said.text, said.finish) == (expected.text, expected.finish_reason)


def stream(at: Place) -> None:
    expected = at.engine.chat("Hello", max_tokens=12).result()
    said = at.client.stream(Question())
    assert (said.text, said.finish) == (expected.text, expected.finish_reason)
    assert said.pieces > 3


def usage(at: Place) -> None:
    expected = at.engine.chat("Hello", max_tokens=5).result().usage
    tokens = (expected.prompt_tokens, expected.completion_tokens)
    assert [said.tokens for said in at.client.ask(Question(max_tokens=5))] == [tokens]
    assert at.client.stream(Question(max_tokens=5)).tokens == tokens


def stop(at: Place) -> None:
    text = at.engine.chat("Hello", max_tokens=12).text()
    [said] = at.client.ask(Question(stop=("would",)))
    assert said.text == text.partition("would")[0]
    assert said.finish == "stop"
    assert at.client.stream(Question(stop=("would",))).text == said.text


def tool(at: Place) -> None:
    question = Question(tools=True, parallel=False, max_tokens=200)
    for said in (*at.client.ask(question), at.client.stream(question)):
        assert said.finish == "tool_calls"
        [(name, arguments)] = said.calls
        assert name == "weather"
        assert arguments["city"] in ("Rome", "Oslo")


def parallel_tools(at: Place) -> None:
    # Random weights call as many tools as chance has it.
    for _ in range(40):
        [said] = at.client.ask(Question(tools=True, max_tokens=400, temperature=1.0))
        if said.finish == "tool_calls" and len(said.calls) > 1:
            break
    assert len(said.calls) > 1
    assert all(name == "weather" and arguments["city"] in ("Rome", "Oslo") for name, arguments in said.calls)


def tool_results(at: Place) -> None:
    [said] = at.client.ask(Question(messages=CALLED, tools=True, max_tokens=3))
    assert said.tokens[0] == len(at.engine.tokenizer.encode_chat(CALLED_TO_THE_ENGINE, (WEATHER,)))


def json_schema(at: Place) -> None:
    [said] = at.client.ask(Question(schema=CITIES, max_tokens=60))
    assert json.loads(said.text)["city"] in ("Rome", "Oslo")


def logprobs(at: Place) -> None:
    expected = at.engine.chat("Hello", max_tokens=5, top_logprobs=2).result()
    [said] = at.client.ask(Question(max_tokens=5, top_logprobs=2))
    assert said.logprobs == pytest.approx(expected.logprobs[: len(said.logprobs)], abs=1e-3)
    assert len(said.logprobs) == 5
    assert said.tops == (2,) * 5


def n(at: Place) -> None:
    request = at.engine.chat_request("Hello", max_tokens=5, temperature=1.5, seed=7)
    expected = sorted(reply.text() for reply in at.engine.choices(3, request))
    said = at.client.ask(Question(n=3, max_tokens=5, temperature=1.5, seed=7))
    assert sorted(one.text for one in said) == expected
    assert len(set(expected)) > 1


def seed(at: Place) -> None:
    question = Question(max_tokens=8, temperature=1.5, seed=3)
    expected = at.engine.chat("Hello", max_tokens=8, temperature=1.5, seed=3).text()
    assert [one.text for _ in range(2) for one in at.client.ask(question)] == [expected, expected]


def error(at: Place) -> None:
    status, code = at.client.failing(Question(model="gpt-9"))
    assert (status, code) in [(404, "model_not_found"), (404, "not_found_error")]
    status, code = at.client.failing(Question(temperature=-1))
    assert (status, code) in [(400, "bad_value"), (400, "invalid_request_error")]


def cancel(at: Place) -> None:
    before = at.engine.stats()["requests"]["cancelled"]
    at.client.stream(Question([{"role": "user", "content": "Count from 1 to 20."}], max_tokens=900), most=3)
    assert until(lambda: at.engine.health().running == 0)
    assert at.engine.stats()["requests"]["cancelled"] == before + 1


def long_prompt(at: Place) -> None:
    text = "Well, " * 300 + "what is the capital of Italy?"
    expected = at.engine.chat(text, max_tokens=8).result()
    said = at.client.stream(Question([{"role": "user", "content": text}], max_tokens=8))
    assert said.tokens[0] == expected.usage.prompt_tokens > 300
    assert said.text == expected.text
    status, _ = at.client.failing(Question([{"role": "user", "content": text * 200}]))
    assert status == 400


SCENARIOS = {scenario.__name__: scenario for scenario in (
    models, plain, stream, usage, stop, tool, parallel_tools, tool_results, json_schema, logprobs, n, seed, error,
    cancel, long_prompt,
)}  # fmt: skip
WITH_TOOLS = {"tool", "parallel_tools", "tool_results"}
CLIENTS: dict[str, type[OpenAI]] = {
    "openai": OpenAI,
    "openai async": AsyncOpenAI,
    "anthropic": Anthropic,
    "langchain": LangChain,
}
CANNOT = {
    ("anthropic", "logprobs"): "Anthropic's API has no log probabilities.",
    ("anthropic", "n"): "Anthropic's API gives one answer.",
    ("anthropic", "seed"): "Anthropic's API has no seed.",
    ("langchain", "models"): "A chat model of LangChain's does not list models.",
}
CASES = [(client, scenario) for client in CLIENTS for scenario in SCENARIOS if (client, scenario) not in CANNOT]


def test_there_are_15_scenarios_and_a_reason_for_each_that_a_client_does_not_do() -> None:
    assert len(SCENARIOS) == 15
    assert len(CASES) == 15 * len(CLIENTS) - len(CANNOT)


@pytest.mark.parametrize(("client", "scenario"), CASES)
def test_a_real_client_gets_what_the_engine_says(
    demo: Engine, tools: Engine, server: Served, tool_server: Served, client: str, scenario: str
) -> None:
    engine, at = (tools, tool_server) if scenario in WITH_TOOLS else (demo, server)
    with closing(CLIENTS[client](at)) as made:
        SCENARIOS[scenario](Place(made, engine))


# Programs that cannot run here: what they send, as it was seen or is in their source, and decoders as strict as theirs.

XCODE_HEADERS = "Host: 0.0.0.0:{port}\r\nAccept: */*\r\nUser-Agent: Xcode/24577 CFNetwork/3860 Darwin/25.0.0\r\n"


def asked(server: Served, head: str, body: Any = None) -> Any:
    """The answer to a request written out; {port} stands for the server's."""
    data = b"" if body is None else json.dumps(body).encode()
    sent = head.replace("{port}", str(server.port)) + f"Content-Length: {len(data)}\r\n\r\n"
    with server.connect() as client:
        client.sendall(sent.encode() + data)
        return next(answers(client))


@pytest.fixture(scope="module")
def keyless(demo: Engine) -> Iterator[Served]:
    with served(demo, aliases=("claude-*",)) as running:
        yield running


def is_chunk(chunk: Any, *, always: Sequence[str]) -> None:
    """What every client leans on in a chunk, and the names that some insist on."""
    assert set(always) <= chunk.keys()
    for choice in chunk["choices"]:
        assert isinstance(choice["index"], int)
        assert isinstance(choice["delta"], dict)
        for call in choice["delta"].get("tool_calls") or ():
            assert isinstance(call["index"], int)
    if chunk.get("usage"):
        assert all(isinstance(chunk["usage"][f"{kind}_tokens"], int) for kind in ("prompt", "completion", "total"))


def data_of(answer: Any) -> list[Any]:
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    *data, last = [data for _, data in events(answer.body)]
    assert last == "[DONE]"
    return [json.loads(one) for one in data]


def test_xcode_lists_models_and_chats_without_a_key(keyless: Served) -> None:
    models = asked(keyless, "GET /v1/models? HTTP/1.1\r\n" + XCODE_HEADERS)
    assert [model["id"] for model in models.json["data"]] == ["demo"]
    body = {
        "model": "demo",
        "stream": True,
        "messages": [
            {"role": "developer", "content": "You are a coding assistant."},
            {"role": "user", "content": [{"type": "text", "text": "x " * 500}, {"type": "text", "text": "Hello"}]},
        ],
        "max_tokens": 3,
    }
    head = "POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\n" + XCODE_HEADERS
    for chunk in data_of(asked(keyless, head, body)):
        is_chunk(chunk, always=("id", "object", "created", "model", "choices"))


def test_zed_reads_every_line(tool_server: Served) -> None:
    function = {"name": "weather", "description": "The weather", "parameters": CITIES}
    body = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Help."}, {"role": "user", "content": "Weather?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 200,
        "temperature": 1.0,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
        "Authorization: Bearer secret\r\n"
    )
    *chunks, last = data_of(asked(tool_server, head, body))
    for chunk in (*chunks, last):
        is_chunk(chunk, always=("choices",))
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    deltas = [call for chunk in chunks for choice in chunk["choices"] for call in choice["delta"].get("tool_calls", ())]
    assert deltas[0]["id"]
    assert deltas[0]["function"]["name"] == "weather"
    assert json.loads("".join(call["function"]["arguments"] for call in deltas))["city"] in ("Rome", "Oslo")


def test_open_webui_finds_models_and_streams_with_usage(server: Served) -> None:
    key = "Host: localhost:{port}\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
    assert asked(server, "GET /v1/models HTTP/1.1\r\n" + key).json["data"][0]["id"] == "demo"
    body = {"model": "demo", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    chunks = data_of(asked(server, "POST /v1/chat/completions HTTP/1.1\r\n" + key, body))
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    wrong = asked(server, "POST /v1/chat/completions HTTP/1.1\r\n" + key, {**body, "temperature": 99})
    assert isinstance(wrong.json["error"]["message"], str)
    assert wrong.headers["content-type"] == "application/json"


def test_macpaw_finds_every_field_that_its_decoder_must_have(server: Served) -> None:
    key = "Host: localhost\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
    always = ("id", "object", "created", "model", "choices")
    body = {"model": "demo", "messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    whole = asked(server, "POST /v1/chat/completions HTTP/1.1\r\n" + key, body).json
    assert set(always) <= whole.keys()
    tokens = whole["choices"][0]["logprobs"]["content"]
    for chunk in data_of(asked(server, "POST /v1/chat/completions HTTP/1.1\r\n" + key, {**body, "stream": True})):
        is_chunk(chunk, always=always)
        tokens += [one for choice in chunk["choices"] for one in (choice["logprobs"] or {"content": []})["content"]]
    assert len(tokens) == 8
    for token in tokens:
        assert isinstance(token["token"], str)
        assert isinstance(token["logprob"], float)
        assert bytes(token["bytes"]).decode() == token["token"]
        assert all({"token", "bytes", "logprob"} <= top.keys() for top in token["top_logprobs"])


def test_xcodes_agent_and_claude_code_stream_messages_with_the_system_among_them(keyless: Served) -> None:
    body = {
        "model": "claude-sonnet-4-5",
        "max_tokens": 4,
        "stream": True,
        "system": [{"type": "text", "text": "You help."}],
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello?"}]},
        ],
    }
    head = "POST /v1/messages?beta=true HTTP/1.1\r\nContent-Type: application/json\r\nx-api-key: none\r\n"
    head += "anthropic-version: 2023-06-01\r\n" + XCODE_HEADERS
    answer = asked(keyless, head, body)
    assert answer.status == 200, answer.body
    said = [(name, json.loads(data)) for name, data in events(answer.body)]
    assert all(name == data["type"] for name, data in said)
    names = [name for name, _ in said if name != "ping"]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) <= {"content_block_delta"}


def test_codex_streams_responses(keyless: Served) -> None:
    body = {
        "model": "demo",
        "instructions": "You help.",
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
        "stream": True,
        "store": False,
        "max_output_tokens": 8,
    }
    head = "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = asked(keyless, head, body)
    assert answer.status == 200, answer.body
    said = [(name, json.loads(data)) for name, data in events(answer.body)]
    assert [data["sequence_number"] for _, data in said] == list(range(len(said)))
    assert said[0][0] == "response.created"
    assert said[-1][0] in ("response.completed", "response.incomplete")


def test_clients_do_not_ask_again_for_an_answer_that_took_too_long(demo: Engine) -> None:
    endless: Any = {"model": "default", "messages": HELLO, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
    with served(demo, timeout_s=0.2) as server:
        theirs = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=2)
        others = anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=2)
        before = demo.stats()["requests"]["cancelled"]
        with closing(theirs), pytest.raises(openai.InternalServerError, match="took more than") as late:
            theirs.chat.completions.create(**endless)
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        with closing(others), pytest.raises(anthropic.APIStatusError, match="took more than"):
            others.messages.create(**endless)
    assert until(lambda: demo.stats()["requests"]["cancelled"] >= before + 2)
    assert demo.stats()["requests"]["cancelled"] == before + 2
