"""Anthropic's messages, and counting their tokens: what bodies ask of the engine, and answers as this API has them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from ..config import MixtralError
from ..engine.request import Done, Event, Request, Result, Text, Token, ToolCallDelta
from ..engine.tools import ToolChoice
from ..generate import Usage
from ..prompt import Message, Tool, ToolCall
from .answers import check_model, new_id, served
from .bodies import Body, TextOr, joined, read
from .call import Asks, Call, Frame, Ready, Stream, check_length
from .conversation import as_prompted
from .errors import anthropic_error, refusing
from .formats import schema_format
from .settings import Count, Extensions, Seed, temperature_and_top_p

PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"


class CacheControl(Body):
    """Prompts that begin alike share what was read in any case; what was found is told in the usage."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


Texts = list[Annotated[TextBlock, Tag("text")]]


class DirectCaller(Body):
    type: Literal["direct"]


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: DirectCaller | None = None
    toolset_name: None = None


class ToolResultBlock(Body):
    """What a tool gave; with `is_error` the model is told that it is an error."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: TextOr[Texts] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: None = None


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ToolUseBlock, Field(discriminator="type")]


class UserMessage(Body):
    role: Literal["user"]
    content: TextOr[list[UserBlock]]


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: TextOr[list[AssistantBlock]]


class SystemMessage(Body):
    role: Literal["system"]
    content: TextOr[Texts]


AnyMessage = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class CustomTool(Body):
    """A function of the client's; tools that Anthropic runs or defines are refused."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Literal[False] | None = None
    input_examples: Annotated[list[Any], Field(max_length=0)] | None = None


class AutoChoice(Body):
    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Body):
    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolOfName(Body):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class NoChoice(Body):
    type: Literal["none"]


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    format: JsonFormat | None = None
    effort: None = None


class Metadata(Body):
    user_id: str | None = None


class CountBody(Body):
    """The body of `/v1/messages/count_tokens`."""

    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    model: str | None = None
    system: TextOr[Texts] | None = None
    tools: list[CustomTool] | None = None
    tool_choice: Annotated[AutoChoice | AnyChoice | ToolOfName | NoChoice, Field(discriminator="type")] | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class MessagesBody(CountBody, Extensions):
    """The body of `/v1/messages`."""

    max_tokens: Count
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    metadata: Metadata | None = None


def parse(body: object, asks: Asks, *, aliases: Collection[str] = ()) -> Call:
    """The call a body of `/v1/messages` makes. Raises `Refused`."""
    asked = read(PATH, MessagesBody, body)
    check_model(asked.model, asks, aliases)
    settings = {
        **asked.extensions(),
        **temperature_and_top_p(asked.temperature, asked.top_p),
        "max_tokens": asked.max_tokens,
        "stop": tuple(asked.stop_sequences or ()),
        "seed": None if asked.seed is None else asked.seed % (1 << 64),
    }
    if asked.output_config and asked.output_config.format:
        settings["response_format"] = schema_format(asked.output_config.format.schema_)
    turns = as_prompted(_turns(asked))
    check_length(turns, asks, "messages", asked.max_kv)
    return MessagesCall(_request(asked, turns, asks, settings), asked, asks)


def parse_count(body: object, asks: Asks, *, aliases: Collection[str] = ()) -> Call:
    """The call a body of `/v1/messages/count_tokens` makes. Raises `Refused`."""
    asked = read(COUNT_PATH, CountBody, body)
    check_model(asked.model, asks, aliases)
    return Ready({"input_tokens": len(_request(asked, as_prompted(_turns(asked)), asks, {}).prompt)})


def _request(asked: CountBody, turns: Sequence[Message], asks: Asks, settings: dict[str, Any]) -> Request:
    with refusing("messages"):
        return asks.chat_request(
            turns,
            tools=[Tool(tool.name, tool.description or "", tool.input_schema) for tool in asked.tools or ()],
            tool_choice=_choice(asked),
            **settings,
        )


def _choice(asked: CountBody) -> ToolChoice:
    strict = any(tool.strict for tool in asked.tools or ())
    chosen = asked.tool_choice
    if isinstance(chosen, NoChoice):
        return ToolChoice("none")
    parallel = not (chosen and chosen.disable_parallel_tool_use)
    if isinstance(chosen, ToolOfName):
        return ToolChoice("required", chosen.name, parallel, strict)
    return ToolChoice("required" if isinstance(chosen, AnyChoice) else "auto", "", parallel, strict)


def _turns(asked: CountBody) -> Iterator[Message]:
    if asked.system:
        yield Message("system", _text(asked.system))
    for message in asked.messages:
        match message:
            case SystemMessage():
                yield Message("system", _text(message.content))
            case AssistantMessage():
                yield _assistant(message)
            case UserMessage():
                yield from _user(message)


def _text(content: str | Texts | None) -> str:
    return content if isinstance(content, str) else joined(block.text for block in content or ())


def _assistant(message: AssistantMessage) -> Message:
    if isinstance(message.content, str):
        return Message("assistant", message.content)
    texts = joined(block.text for block in message.content if isinstance(block, TextBlock))
    calls = [
        ToolCall(block.name, json.dumps(block.input, ensure_ascii=False), block.id)
        for block in message.content
        if isinstance(block, ToolUseBlock)
    ]
    return Message("assistant", texts, tuple(calls))


def _user(message: UserMessage) -> Iterator[Message]:
    """Results of tools are turns of their own."""
    if isinstance(message.content, str):
        yield Message("user", message.content)
        return
    for block in message.content or [TextBlock(type="text", text="")]:
        if isinstance(block, ToolResultBlock):
            text = _text(block.content)
            yield Message("tool", f"Error: {text}" if block.is_error else text, tool_call_id=block.tool_use_id)
        else:
            yield Message("user", block.text)


# Answers.


class MessagesCall(Call):
    """A message."""

    def __init__(self, request: Request, asked: MessagesBody, asks: Asks) -> None:
        super().__init__([(request, 1)], streams=bool(asked.stream))
        self.request = request
        self.max_tokens = asked.max_tokens
        self.id = new_id("msg_")
        self.model = served(asks)

    def message(self, content: list[dict[str, Any]], ending: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
        """A message, whole or about to begin."""
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
        return {**head, "content": content, **ending, "usage": usage}

    def answer(self, results: Sequence[Result]) -> dict[str, Any]:
        (result,) = results
        content: list[dict[str, Any]] = [{"type": "text", "text": result.text}] if result.text else []
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)}
            for place, call in enumerate(result.tool_calls)
            if place != result.cut_call  # Half of an input is no object; a stream gives as much as there is.
        ]
        ending = self.ending(result.finish_reason, result.stop_text, result.usage)
        return self.message(content, ending, _usage(result.usage))

    def stream(self) -> MessagesStream:
        return MessagesStream(self)

    def ending(self, reason: str, stop_text: str, usage: Usage) -> dict[str, Any]:
        """Why it ended."""
        if reason == "length" and usage.completion_tokens < self.max_tokens:
            reason = "context"
        if reason == "stop" and stop_text:
            return {"stop_reason": "stop_sequence", "stop_sequence": stop_text}
        names = {"stop": "end_turn", "tool_calls": "tool_use", "context": "model_context_window_exceeded"}
        return {"stop_reason": names.get(reason, "max_tokens"), "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Tokens of the prompt are those that were read, and those that were still there, apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call as an object; what is none is kept as text under `arguments`."""
    try:
        found = json.loads(arguments, parse_float=_finite)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


class MessagesStream(Stream):
    """A message as it comes: block after block, each with a start, its deltas and a stop."""

    def __init__(self, call: MessagesCall) -> None:
        self._call = call
        self._blocks = 0
        self._open: int | None = None  # -1 while a text is open, and the number of a call while that is

    def begin(self) -> list[Frame]:
        # How much of the prompt is still there from before is told at the end: it is not known yet.
        usage = _usage(Usage(len(self._call.request.prompt), 0, 0, 0, 0))
        message = self._call.message([], {"stop_reason": None, "stop_sequence": None}, usage)
        return [_frame("message_start", message=message), _frame("ping")]

    def feed(self, index: int, event: Event) -> list[Frame]:
        match event:
            case Token() | Text() if event.text:
                delta = {"type": "text_delta", "text": event.text}
                return [*self._opened(-1, {"type": "text", "text": ""}), self._delta(delta)]
            case ToolCallDelta():
                return self._call_delta(event)
            case Done():
                ending = self._call.ending(event.finish_reason, event.stop_text, event.usage)
                return [*self._closed(), _frame("message_delta", delta=ending, usage=_usage(event.usage))]
        return []

    def fail(self, error: MixtralError) -> list[Frame]:
        return [Frame(anthropic_error(error), "error")]

    def end(self) -> list[Frame]:
        return [_frame("message_stop")]

    def _call_delta(self, event: ToolCallDelta) -> list[Frame]:
        frames = self._opened(event.index, {"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
        if event.arguments:
            frames.append(self._delta({"type": "input_json_delta", "partial_json": event.arguments}))
        return frames

    def _opened(self, kind: int, block: dict[str, Any]) -> list[Frame]:
        """What opens a block of this kind, if none is open."""
        if self._open == kind:
            return []
        frames = self._closed()
        self._open = kind
        return [*frames, _frame("content_block_start", index=self._blocks, content_block=block)]

    def _closed(self) -> list[Frame]:
        if self._open is None:
            return []
        self._open, place = None, self._blocks
        self._blocks += 1
        return [_frame("content_block_stop", index=place)]

    def _delta(self, delta: dict[str, Any]) -> Frame:
        return _frame("content_block_delta", index=self._blocks, delta=delta)


def _frame(kind: str, **data: Any) -> Frame:
    return Frame({"type": kind, **data}, kind)
