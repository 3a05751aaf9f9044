"""OpenAI's responses: what a body asks of the engine, and answers as this API writes them.

Nothing is kept between requests: what came before is in the input, each time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ..config import MixtralError
from ..engine.grammar import Format
from ..engine.request import Done, Event, Request, Result, Text, Token, ToolCallDelta
from ..engine.tools import ToolChoice
from ..generate import Usage
from ..prompt import Message, Tokenizer, Tool, ToolCall
from .answers import Shown, ShownTokens, check_model, new_id, served, shown_tokens
from .bodies import Body, TextOr, joined, read
from .call import Asks, Call, Frame, Refused, Stream, check_length, now
from .conversation import as_prompted
from .errors import refusing, said, status_of
from .formats import AnyObject, AnyText, ChoiceFormat, LarkFormat, RegexFormat, schema_format
from .settings import Count, Extensions, Seed, temperature_and_top_p

PATH = "/v1/responses"
_LOGPROBS = "message.output_text.logprobs"

# Bodies.


class InputText(Body):
    type: Literal["input_text"]
    text: str


class OutputText(Body):
    """Text of an earlier answer, as it was given."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


Part = Annotated[InputText | OutputText, Field(discriminator="type")]
Status = Literal["in_progress", "completed", "incomplete"]


class MessageItem(Body):
    type: Literal["message"] | None = None
    role: Literal["user", "system", "developer", "assistant"]
    content: TextOr[list[Part]]
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Body):
    """A function the model called."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class OutputItem(Body):
    """What it gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: TextOr[list[Annotated[InputText, Tag("text")]]]
    id: str | None = None
    status: Status | None = None


def _item_kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")],
    Discriminator(_item_kind),
]


class FunctionTool(Body):
    """A function of the client's; tools that OpenAI runs or defines are refused."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    output_schema: None = None


class NamedTool(Body):
    type: Literal["function"]
    name: str


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None

    def format(self) -> Format | None:
        return schema_format(self.schema_)


class TextConfig(Body):
    format: (
        Annotated[
            AnyText | AnyObject | SchemaFormat | RegexFormat | LarkFormat | ChoiceFormat, Field(discriminator="type")
        ]
        | None
    ) = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    """There is none, which may be asked for."""

    effort: Literal["none"] | None = None
    summary: Literal["auto"] | None = None


class StreamOptions(Body):
    include_obfuscation: Literal[False] | None = None


class ResponsesBody(Extensions):
    """The body of `/v1/responses`."""

    input: TextOr[Annotated[list[Item], Field(min_length=1)]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("mode")] | Annotated[NamedTool, Tag("named")],
            Discriminator(lambda value: "mode" if isinstance(value, str) else "named"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def parse(body: object, asks: Asks, *, aliases: Collection[str] = ()) -> Call:
    """The call a body makes. Raises `Refused`."""
    asked = read(PATH, ResponsesBody, body)
    check_model(asked.model, asks, aliases)
    wants_logprobs = _LOGPROBS in (asked.include or ())
    if asked.top_logprobs and not wants_logprobs:
        raise Refused(
            "top_logprobs needs logprobs.",
            code="bad_value",
            hint=f"Put {_LOGPROBS} into include.",
            param="top_logprobs",
        )
    settings = {
        **asked.extensions(),
        **temperature_and_top_p(asked.temperature, asked.top_p),
        "max_tokens": asked.max_output_tokens,
        "seed": None if asked.seed is None else asked.seed % (1 << 64),
        "top_logprobs": asked.top_logprobs or 0,
    }
    if asked.text and asked.text.format:
        settings["response_format"] = asked.text.format.format()
    turns = as_prompted(_turns(asked))
    check_length(turns, asks, "input", asked.max_kv)
    with refusing("input"):
        request = asks.chat_request(
            turns,
            tools=[Tool(tool.name, tool.description or "", tool.parameters or {}) for tool in asked.tools or ()],
            tool_choice=_choice(asked),
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            **settings,
        )
    return ResponsesCall(request, asked, asks, wants_logprobs=wants_logprobs)


def _choice(asked: ResponsesBody) -> ToolChoice:
    strict = any(tool.strict for tool in asked.tools or ())
    if isinstance(asked.tool_choice, NamedTool):
        return ToolChoice("required", asked.tool_choice.name, strict=strict)
    return ToolChoice(asked.tool_choice or "auto", strict=strict)


def _turns(asked: ResponsesBody) -> Iterator[Message]:
    if asked.instructions:
        yield Message("system", asked.instructions)
    if isinstance(asked.input, str):
        yield Message("user", asked.input)
        return
    for item in asked.input:
        match item:
            case CallItem():
                yield Message("assistant", "", (ToolCall(item.name, item.arguments, item.call_id),))
            case OutputItem():
                yield Message("tool", _text(item.output), tool_call_id=item.call_id)
            case MessageItem():
                role = "system" if item.role == "developer" else item.role
                yield Message(role, _text(item.content))


def _text(content: str | Sequence[InputText | OutputText]) -> str:
    return content if isinstance(content, str) else joined(part.text for part in content)


# Answers.


@dataclass
class _Item:
    """An item of the output, while it is written."""

    id: str
    call: ToolCallDelta | None = None
    parts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def part(self) -> dict[str, Any]:
        """The text so far."""
        return {"type": "output_text", "text": "".join(self.parts), "annotations": [], "logprobs": [*self.logprobs]}

    def written(self, status: str, *, begins: bool = False) -> dict[str, Any]:
        """The item, as it is or as it `begins`."""
        if self.call:
            kind = {"type": "function_call", "call_id": self.call.id, "name": self.call.name}
            return {"id": self.id, **kind, "arguments": "".join(self.parts), "status": status}
        content = [] if begins else [self.part()]
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content}


def _message_item() -> _Item:
    return _Item(new_id("msg_"))


def _call_item(delta: ToolCallDelta) -> _Item:
    return _Item(new_id("fc_"), delta)


class ResponsesCall(Call):
    """A response."""

    def __init__(self, request: Request, asked: ResponsesBody, asks: Asks, *, wants_logprobs: bool) -> None:
        super().__init__([(request, 1)], streams=bool(asked.stream))
        self.request = request
        self.tokenizer = asks.tokenizer
        self.wants_logprobs = wants_logprobs
        self._told = {"id": new_id("resp_"), "object": "response", "created_at": now(), "model": served(asks)}
        self._settings = _settings_told(asked)

    def response(
        self,
        status: str,
        output: Sequence[dict[str, Any]] = (),
        usage: Usage | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The response as it stands."""
        return {
            **self._told,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": list(output),
            "usage": _usage(usage) if usage else None,
            **self._settings,
        }

    def answer(self, results: Sequence[Result]) -> dict[str, Any]:
        (result,) = results
        items = []
        if result.text or not result.tool_calls:
            item = _message_item()
            item.parts.append(result.text)
            if self.wants_logprobs:
                shown = shown_tokens(self.tokenizer, self.request.prompt, result)
                item.logprobs = [_entry(token, self.tokenizer) for token in shown]
            items.append(item)
        for call in result.tool_calls:
            item = _call_item(ToolCallDelta(0, call.id, call.name))
            item.parts.append(call.arguments)
            items.append(item)
        status = status_after(result.finish_reason)
        last = _status_of_last(items[-1], status, result.cut_call)
        return self.response(status, _all_written(items, last), result.usage)

    def stream(self) -> ResponsesStream:
        return ResponsesStream(self)


def status_after(reason: str) -> str:
    """What became of a response that ended for this reason."""
    return "completed" if reason in ("stop", "tool_calls") else "incomplete"


def _status_of_last(item: _Item, status: str, cut_call: int | None) -> str:
    """A call that is complete stays so where the response is not."""
    return "completed" if item.call and cut_call is None else status


def _all_written(items: Sequence[_Item], status: str) -> list[dict[str, Any]]:
    """The items; only the last can be incomplete."""
    return [item.written(status if item is items[-1] else "completed") for item in items]


def _settings_told(asked: ResponsesBody) -> dict[str, Any]:
    """What a response repeats of its request."""
    chosen = asked.tool_choice
    form = asked.text.format if asked.text else None
    return {
        "background": False,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
        "tool_choice": chosen.model_dump() if isinstance(chosen, NamedTool) else chosen or "auto",
        "tools": [_tool_told(tool) for tool in asked.tools or ()],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "truncation": "disabled",
    }


def _tool_told(tool: FunctionTool) -> dict[str, Any]:
    told = {"type": "function", "name": tool.name, "description": tool.description}
    return {**told, "parameters": tool.parameters or {}, "strict": bool(tool.strict)}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _entry(shown: Shown, tokenizer: Tokenizer) -> dict[str, Any]:
    text, data = shown.written(tokenizer)
    others = [
        {"token": other, "bytes": list(other.encode()) if bytes_ is None else bytes_, "logprob": logprob}
        for other, bytes_, logprob in shown.others(tokenizer)
    ]
    data = list(text.encode()) if data is None else data
    return {"token": text, "bytes": data, "logprob": shown.token.logprob, "top_logprobs": others}


class ResponsesStream(Stream):
    """A response as it comes: created, then item after item, each added, written and done, then completed."""

    def __init__(self, call: ResponsesCall) -> None:
        self._call = call
        self._items: list[_Item] = []
        self._open: int | None = None  # -1 while a text is open, and the number of a call while that is
        self._shown = ShownTokens(call.tokenizer, call.request.prompt)
        self._number = 0

    def begin(self) -> list[Frame]:
        return [
            self._frame("created", response=self._call.response("in_progress")),
            self._frame("in_progress", response=self._call.response("in_progress")),
        ]

    def feed(self, index: int, event: Event) -> list[Frame]:
        match event:
            case Token():
                return self._text(event.text, self._shown.add(event) if self._call.wants_logprobs else [])
            case Text():
                return self._text(event.text, self._shown.show(event.text))
            case ToolCallDelta():
                return self._call_delta(event)
            case Done():
                return self._done(event)
        return []

    def fail(self, error: MixtralError) -> list[Frame]:
        told = {"code": _error_code(error), "message": said(error)}
        output = _all_written(self._items, "incomplete")
        return [self._frame("failed", response=self._call.response("failed", output, error=told))]

    def end(self) -> list[Frame]:
        return []

    def _text(self, text: str, shown: Sequence[Shown]) -> list[Frame]:
        if not text and not shown:
            return []
        frames = [] if self._open == -1 else self._opened(-1, _message_item())
        item = self._items[-1]
        entries = [_entry(token, self._call.tokenizer) for token in shown] if self._call.wants_logprobs else []
        item.parts.append(text)
        item.logprobs += entries
        delta = self._frame("output_text.delta", **self._at(item), content_index=0, delta=text, logprobs=entries)
        return [*frames, delta]

    def _call_delta(self, event: ToolCallDelta) -> list[Frame]:
        frames = [] if self._open == event.index else self._opened(event.index, _call_item(event))
        item = self._items[-1]
        if event.arguments:
            item.parts.append(event.arguments)
            frames.append(self._frame("function_call_arguments.delta", **self._at(item), delta=event.arguments))
        return frames

    def _opened(self, kind: int, item: _Item) -> list[Frame]:
        frames = self._closed("completed")
        self._open = kind
        self._items.append(item)
        place = len(self._items) - 1
        frames.append(
            self._frame("output_item.added", output_index=place, item=item.written("in_progress", begins=True))
        )
        if not item.call:
            frames.append(self._frame("content_part.added", **self._at(item), content_index=0, part=item.part()))
        return frames

    def _closed(self, status: str) -> list[Frame]:
        if self._open is None:
            return []
        self._open, item = None, self._items[-1]
        at, text = self._at(item), "".join(item.parts)
        if item.call:
            frames = [self._frame("function_call_arguments.done", **at, name=item.call.name, arguments=text)]
        else:
            frames = [
                self._frame("output_text.done", **at, content_index=0, text=text, logprobs=item.logprobs),
                self._frame("content_part.done", **at, content_index=0, part=item.part()),
            ]
        done = self._frame("output_item.done", output_index=at["output_index"], item=item.written(status))
        return [*frames, done]

    def _done(self, event: Done) -> list[Frame]:
        frames = self._text("", self._shown.finish()) if self._call.wants_logprobs and self._open == -1 else []
        if not self._items:
            frames += self._opened(-1, _message_item())
        status = status_after(event.finish_reason)
        last = _status_of_last(self._items[-1], status, event.cut_call)
        frames += self._closed(last)
        response = self._call.response(status, _all_written(self._items, last), event.usage)
        return [*frames, self._frame(status, response=response)]

    def _at(self, item: _Item) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": len(self._items) - 1}

    def _frame(self, kind: str, **data: Any) -> Frame:
        number, self._number = self._number, self._number + 1
        name = f"response.{kind}"
        return Frame({"type": name, "sequence_number": number, **data}, name)


def _error_code(error: MixtralError) -> str:
    status = status_of(error)
    return "rate_limit_exceeded" if status == 429 else "invalid_prompt" if status < 500 else "server_error"
