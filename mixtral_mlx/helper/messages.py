"""Every message between an app and the helper, both ways: read, checked, written, and their JSON Schema.

Each message in has an id and is answered by exactly one message that ends it, with the same id: `ready`, `done`,
`ok`, `stats` or `error`. Others with its id may come before. Knows no sockets, no engine and no streams."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import models_json_schema

from ..config import MixtralError

PROTOCOL = 1
"""Counts up when a program that knows the number before could misunderstand something."""
MOST_LINE_BYTES = 16 << 20
_SHOWN = 60
"""Characters that an error repeats of what it found."""

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$", description="Names a request as long as it is answered.")]
Size = Annotated[str | int | None, Field(description='Bytes, or as "12GB".')]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


class Message(BaseModel):
    """A line; what all have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# From the app.


class Load(Message):
    """Bring a model into memory, in place of the one that is there. Ends with `ready`.

    What is not given is as on the command line, and where it is not there, as for `mixtral_mlx.load`."""

    type: Literal["load"]
    id: Id
    model: str = Field(description="A folder, a Hugging Face repository, or demo.", min_length=1)
    memory: Size = None
    context: int | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    kv_bits: Literal[4, 8] | None = None
    adapter: str | None = None
    draft: str | None = None
    prefix_memory: Size = None
    cache_dir: str | None = None
    cache_size: str | int = "10GB"
    max_concurrent: int = 16
    max_queue: int = 64
    idle_unload_s: float | None = None
    deterministic: bool = False
    offline: bool = False


class Chat(Message):
    """Answer a conversation. `body` is that of OpenAI's `/v1/chat/completions`. Ends with `done`."""

    type: Literal["chat"]
    id: Id
    body: dict[str, Any]


class Cancel(Message):
    """End another request, which ends as it would otherwise, only sooner; also a `load`. Ends with `ok` either way."""

    type: Literal["cancel"]
    id: Id
    request: Id = Field(description="The id of the request to end.")


class Unload(Message):
    """Let go of the model; refused while requests run. Ends with `ok`."""

    type: Literal["unload"]
    id: Id


class MemoryPressure(Message):
    """The system is short of memory, as the app was told. At 2 kept prompts go, at 4 the idle model. Ends with `ok`."""

    type: Literal["memory_pressure"]
    id: Id
    level: Literal[1, 2, 4] = Field(description="As macOS counts: 1 normal, 2 warning, 4 critical.")


class GetStats(Message):
    """Say how it is and what was done. Ends with `stats`."""

    type: Literal["stats"]
    id: Id


class Shutdown(Message):
    """End the process: requests end, `ok` comes, then `bye`."""

    type: Literal["shutdown"]
    id: Id


Incoming = Load | Chat | Cancel | Unload | MemoryPressure | GetStats | Shutdown


# To the app.

Reason = Literal["shutdown", "stdin_closed", "parent_gone", "signal"]
Phase = Literal["fetching", "loading"]
ModelState = Literal["unloaded", "loading", "ready", "failed", "closed"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


class Hello(Message):
    """The first line."""

    type: Literal["hello"] = "hello"
    protocol: int
    version: str
    pid: int


class Loading(Message):
    """How far a model has come: fetched from its repository first, where it is not here, then into memory.

    Without an id where no message asked for it."""

    type: Literal["loading"] = "loading"
    id: Id | None = None
    model: str
    phase: Phase = "loading"
    done_bytes: Count
    total_bytes: Count


class Serving(Message):
    """Where the HTTP API of this process is, and the key that it asks for."""

    url: str
    key: str


class Ready(Message):
    """A model is in memory. Without an id for the one named on the command line."""

    type: Literal["ready"] = "ready"
    id: Id | None = None
    model: str
    folder: str
    context: Count = Field(description="Tokens that a prompt and its answer may have together.")
    budget_bytes: Count
    weights_bytes: Count
    load_seconds: Seconds
    serving: Serving | None = None


class State(Message):
    """What has become of the model without being asked: let go of when idle, or loaded again for a request."""

    type: Literal["state"] = "state"
    state: ModelState


class Prompt(Message):
    """How far a prompt has been read; `cached` tokens of it were read for an earlier request."""

    type: Literal["prompt"] = "prompt"
    id: Id
    choice: Count
    done: Count
    total: Count
    cached: Count


class Alternative(Message):
    """A token that might have come; `text` is as `/v1/chat/completions` writes it."""

    id: Count
    text: str
    logprob: float


class TokenScore(Message):
    """A token and how likely it was. `text` is what it completes: possibly none."""

    id: Count
    text: str
    logprob: float
    top_logprobs: list[Alternative]


class Text(Message):
    """More of an answer's text. `tokens` are there if the body asked for logprobs."""

    type: Literal["text"] = "text"
    id: Id
    choice: Count
    text: str
    tokens: list[TokenScore] | None = None


class ToolCall(Message):
    """More of tool call number `call`: first its `call_id` and `name`, then its arguments' JSON text in parts."""

    type: Literal["tool_call"] = "tool_call"
    id: Id
    choice: Count
    call: Count
    call_id: str
    name: str
    arguments: str


class Usage(Message):
    """Tokens, as they are counted for all choices together."""

    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count


class Timings(Message):
    """Seconds, of the slowest choice."""

    queued: Seconds
    prompt: Seconds
    generation: Seconds


class Done(Message):
    """The answer has ended, also where it was cancelled: `finish_reasons` has one for each choice."""

    type: Literal["done"] = "done"
    id: Id
    finish_reasons: list[FinishReason]
    usage: Usage
    seconds: Timings


class Ok(Message):
    """It is done."""

    type: Literal["ok"] = "ok"
    id: Id


class Stats(Message):
    """How it is. What hangs on a model is left out where there is none."""

    type: Literal["stats"] = "stats"
    id: Id
    state: Literal["no_model"] | ModelState
    running: Count
    queued: Count
    process_bytes: Count
    log_lines_dropped: Count
    memory: dict[str, int] | None = None
    done: Annotated[dict[str, Any] | None, Field(description="`Engine.stats`: requests, prefixes, experts.")] = None


class Error(Message):
    """A request has failed, or a line could not be taken: then there is no `id` where none could be read in it."""

    type: Literal["error"] = "error"
    id: Annotated[Id | None, Field(description="The request that this ends.")] = None
    line_id: Annotated[Id | None, Field(description="That of a refused line, while its namesake goes on.")] = None
    code: str
    message: str
    hint: str = ""
    param: Annotated[str | None, Field(description="The field of a body that is the reason, as a dotted path.")] = None
    retryable: Annotated[bool, Field(description="Whether the same may well succeed later.")] = False


class Bye(Message):
    """The last line, and why: asked to, stdin ended, the parent has gone, or a signal."""

    type: Literal["bye"] = "bye"
    reason: Reason


Outgoing = Hello | Loading | Ready | State | Prompt | Text | ToolCall | Done | Ok | Stats | Error | Bye


class LineError(MixtralError):
    """A line that is no message; `line_id` is its id where it has one."""

    def __init__(self, message: str, *, code: str, hint: str = "", line_id: str | None = None) -> None:
        super().__init__(message, code=code, hint=hint)
        self.line_id = line_id


def parse(line: bytes) -> Incoming:
    """The message in a line; raises `LineError`."""
    found = _json(line)
    if not isinstance(found, dict):
        raise LineError(
            f"The line is {_kind(found)}, expected a JSON object.", code="not_json", hint="Write one message a line."
        )
    line_id = _id(found.get("id"))
    kind = found.get("type")
    cls = _TYPES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise LineError(
            f"The message's type is {_shown(kind)}, expected one of {', '.join(_TYPES)}.",
            code="unknown_type",
            line_id=line_id,
        )
    try:
        return cls.model_validate(found)
    except ValidationError as error:
        raise LineError(_what_is_wrong(str(kind), cls, error), code="bad_message", line_id=line_id) from None


def written(message: Outgoing) -> bytes:
    """The message's line. ASCII only: no reader can cut a character in two, or take one of Unicode's for a line end."""
    return json.dumps(message.model_dump(exclude_none=True), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def schema() -> dict[str, Any]:
    """A JSON Schema of both directions, under `$defs` as `Incoming` and `Outgoing`."""
    directions = {"Incoming": get_args(Incoming), "Outgoing": get_args(Outgoing)}
    classes = [cls for union in directions.values() for cls in union]
    _, made = models_json_schema([(cls, "validation") for cls in classes], ref_template="#/$defs/{model}")
    unions = {
        name: {"oneOf": [{"$ref": f"#/$defs/{cls.__name__}"} for cls in union]} for name, union in directions.items()
    }
    for cls in classes:
        made["$defs"][cls.__name__]["required"] = [
            "type",
            *(name for name in made["$defs"][cls.__name__].get("required", ()) if name != "type"),
        ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Messages of mixtral-mlx helper, protocol {PROTOCOL}",
        "description": "Each line to the helper is an Incoming, each line from it an Outgoing.",
        "anyOf": [{"$ref": "#/$defs/Incoming"}, {"$ref": "#/$defs/Outgoing"}],
        "$defs": {**_untitled(made["$defs"]), **unions},
    }


def _untitled(found: Any) -> Any:
    """A schema without the titles that only repeat its names."""
    if isinstance(found, dict):
        return {key: _untitled(value) for key, value in found.items() if key != "title"}
    return [_untitled(value) for value in found] if isinstance(found, list) else found


_TYPES: dict[str, type[Incoming]] = {
    get_args(cls.model_fields["type"].annotation)[0]: cls for cls in get_args(Incoming)
}


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise LineError(f"The line is not UTF-8: {error.reason} at byte {error.start}.", code="not_utf8") from None
    except RecursionError:
        raise LineError("The line is nested too deeply.", code="not_json") from None
    except ValueError as error:
        raise LineError(f"The line is not JSON: {error}.", code="not_json", hint="Write one message a line.") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _id(found: object) -> str | None:
    try:
        return Shutdown(type="shutdown", id=found).id  # type: ignore[arg-type]
    except ValidationError:
        return None


def _what_is_wrong(kind: str, cls: type[Message], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in cls.model_fields) or _shown(
        first["loc"][0]
    )
    if first["type"] == "extra_forbidden":
        return f"A message {kind} has no field {where}, it has {', '.join(cls.model_fields)}."
    if first["type"] == "missing":
        return f"A message {kind} needs the field {where}."
    return f"{where} of a message {kind} is {_shown(first['input'])}. {first['msg']}."


def _kind(found: object) -> str:
    return {list: "an array", str: "a string", type(None): "null"}.get(type(found), "a number or a boolean")


def _shown(found: object) -> str:
    text = json.dumps(found, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
