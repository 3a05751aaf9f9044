"""OpenAI's chat completions: what a body asks of the engine, and its answers as this API writes them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ..config import MixtralError
from ..engine.request import Done, Event, Request, Result, Text, Token, ToolCallDelta
from ..engine.tools import ToolChoice
from ..prompt import Message, Tokenizer, Tool, ToolCall
from .answers import Shown, ShownTokens, Total, check_model, finish_reason, new_id, served, shown_tokens
from .bodies import Body, TextOr, joined, read
from .call import Asks, Call, Frame, Refused, Stream, check_length, now
from .conversation import as_prompted
from .errors import openai_error, refusing
from .formats import ResponseFormat
from .settings import Count, OpenAISampling

PATH = "/v1/chat/completions"
DONE = Frame("[DONE]")


class TextPart(Body):
    """A part of a message. Images, audio and files are refused: Mixtral reads text only."""

    type: Literal["text"]
    text: str


Content = TextOr[list[Annotated[TextPart, Tag("text")]]]


class _Message(Body):
    name: str | None = None  # Mixtral's template has no place for it.


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Message):
    role: Literal["user"]
    content: Content


class CalledFunction(Body):
    name: str
    arguments: str


class CalledTool(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(_Message):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[CalledTool] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(_Message):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


AnyMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


ToolMode = Literal["none", "auto", "required"]
ToolChoiceField = Annotated[
    Annotated[ToolMode, Tag("mode")] | Annotated[NamedTool, Tag("named")],
    Discriminator(lambda value: "mode" if isinstance(value, str) else "named"),
]


class ChatBody(OpenAISampling):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: dict[str, str] | None = None


def parse(body: object, asks: Asks, *, aliases: Collection[str] = ()) -> Call:
    """The call a body makes. Raises `Refused`."""
    asked = read(PATH, ChatBody, body)
    check_model(asked.model, asks, aliases)
    settings = asked.settings(asks.config)
    settings["max_tokens"] = _most_tokens(asked)
    if asked.response_format:
        settings["response_format"] = asked.response_format.format()
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refused(
            "top_logprobs needs logprobs.", code="bad_value", hint="Set logprobs to true.", param="top_logprobs"
        )
    settings["top_logprobs"] = asked.top_logprobs or 0
    turns = as_turns(asked.messages)
    check_length(turns, asks, "messages", asked.max_kv)
    with refusing("messages"):
        request = asks.chat_request(
            turns,
            tools=[as_tool(tool) for tool in asked.tools or ()],
            tool_choice=_choice(asked),
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            **settings,
        )
    return ChatCall(request, asked, asks)


def _most_tokens(asked: ChatBody) -> int | None:
    given = {value for value in (asked.max_tokens, asked.max_completion_tokens) if value is not None}
    if len(given) > 1:
        raise Refused(
            f"max_tokens is {asked.max_tokens} and max_completion_tokens {asked.max_completion_tokens}.",
            code="bad_value",
            hint="They mean the same: give one of them.",
            param="max_tokens",
        )
    return next(iter(given), None)


def as_turns(messages: Iterable[AnyMessage]) -> list[Message]:
    """Messages as the engine takes them."""
    return as_prompted(map(_message, messages))


def _message(message: AnyMessage) -> Message:
    content = _text(message.content)
    match message:
        case ToolMessage():
            return Message("tool", content, tool_call_id=message.tool_call_id)
        case AssistantMessage():
            calls = [
                ToolCall(call.function.name, call.function.arguments, call.id) for call in message.tool_calls or ()
            ]
            return Message("assistant", content, tuple(calls))
        case UserMessage():
            return Message("user", content)
    return Message("system", content)


def _text(content: str | list[TextPart] | None) -> str:
    return content if isinstance(content, str) else joined(part.text for part in content or ())


def as_tool(tool: FunctionTool) -> Tool:
    """A tool as the engine takes it."""
    return Tool(tool.function.name, tool.function.description or "", tool.function.parameters or {})


def _choice(asked: ChatBody) -> ToolChoice:
    strict = any(tool.function.strict for tool in asked.tools or ())
    if isinstance(asked.tool_choice, NamedTool):
        return ToolChoice("required", asked.tool_choice.function.name, strict=strict)
    return ToolChoice(asked.tool_choice or "auto", strict=strict)


# Answers.


class ChatCall(Call):
    """A chat completion."""

    def __init__(self, request: Request, asked: ChatBody, asks: Asks) -> None:
        super().__init__([(request, asked.n or 1)], streams=bool(asked.stream))
        self.request = request
        self.tokenizer = asks.tokenizer
        self.wants_logprobs = bool(asked.logprobs)
        self.wants_usage = asked.wants_usage
        self._head = {"id": new_id("chatcmpl-"), "created": now(), "model": served(asks)}

    def head(self, kind: str) -> dict[str, Any]:
        """What begins the answer, and every chunk of it."""
        return {"id": self._head["id"], "object": kind, "created": self._head["created"], "model": self._head["model"]}

    def answer(self, results: Sequence[Result]) -> dict[str, Any]:
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        total = Total.of([result.usage for result in results], [len(results)])
        return {**self.head("chat.completion"), "choices": choices, "usage": total.openai()}

    def stream(self) -> ChatStream:
        return ChatStream(self)

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": result.text or None, "refusal": None}
        if result.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in result.tool_calls
            ]
        else:
            message["content"] = result.text
        shown = shown_tokens(self.tokenizer, self.request.prompt, result) if self.wants_logprobs else []
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(shown),
            "finish_reason": finish_reason(result.finish_reason),
        }

    def logprobs(self, shown: Sequence[Shown]) -> dict[str, Any] | None:
        """The log probabilities of tokens, if they are wanted."""
        if not self.wants_logprobs:
            return None
        return {"content": [_entry(token, self.tokenizer) for token in shown], "refusal": None}


def _entry(shown: Shown, tokenizer: Tokenizer) -> dict[str, Any]:
    text, data = shown.written(tokenizer)
    others = [{"token": text, "bytes": data, "logprob": logprob} for text, data, logprob in shown.others(tokenizer)]
    return {"token": text, "bytes": data, "logprob": shown.token.logprob, "top_logprobs": others}


class ChatStream(Stream):
    """A chat completion as it comes: for each choice first its role, then text and calls, last why it ends."""

    def __init__(self, call: ChatCall) -> None:
        self._call = call
        self._head = call.head("chat.completion.chunk")
        self._count = call.asked[0][1]
        self._shown = [ShownTokens(call.tokenizer, call.request.prompt) for _ in range(self._count)]
        self._done: dict[int, Done] = {}

    def begin(self) -> list[Frame]:
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self._count)]

    def feed(self, index: int, event: Event) -> list[Frame]:
        match event:
            case Token():
                return self._text(index, event.text, self._shown[index].add(event) if self._call.wants_logprobs else [])
            case Text():
                return self._text(index, event.text, self._shown[index].show(event.text))
            case ToolCallDelta():
                return [self._chunk(index, {"tool_calls": [_delta(event)]})]
            case Done():
                self._done[index] = event
                shown = self._shown[index].finish()
                frames = self._text(index, "", shown) if self._call.wants_logprobs else []
                return [*frames, self._chunk(index, {}, finish_reason(event.finish_reason))]
        return []

    def fail(self, error: MixtralError) -> list[Frame]:
        return [Frame(openai_error(error)), DONE]

    def end(self) -> list[Frame]:
        if not self._call.wants_usage:
            return [DONE]
        total = Total.of([self._done[index].usage for index in range(self._count)], [self._count])
        return [Frame({**self._head, "choices": [], "usage": total.openai()}), DONE]

    def _text(self, index: int, text: str, shown: Sequence[Shown]) -> list[Frame]:
        if not text and not shown:
            return []
        return [self._chunk(index, {"content": text}, logprobs=self._call.logprobs(shown))]

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> Frame:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._call.wants_usage else {}
        return Frame({**self._head, "choices": [choice], **usage})


def _delta(delta: ToolCallDelta) -> dict[str, Any]:
    if not delta.name:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}
