"""Tool calls: which functions the model may or must call, a grammar that holds it to that, and calls while they come.

Only for tokenizers with a `[TOOL_CALLS]` token (v3, Mixtral 8x22B). Returns grammars as Lark text and never runs them;
how tools are told to the model is prompt.py's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal, TypeVar, cast

from ..config import MixtralError
from ..prompt import CALL_ID, FUNCTION_NAME, Tokenizer, Tool, ToolCall, new_call_id, refuse_tools

Mode = Literal["auto", "none", "required"]


class ToolError(MixtralError):
    """Tools that cannot be offered, or a choice among them that cannot be made."""


@dataclass(frozen=True)
class ToolChoice:
    """Whether to call functions: "auto" leaves it to the model, "none" forbids it, "required" makes it call one.

    With `function` it must be that one. With `parallel` it may call several at once. What must be called is always
    held to this and to the functions' schemas; `strict` holds calls to them that the model makes by itself too."""

    mode: Mode = "auto"
    function: str = ""
    parallel: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "none", "required"):
            raise ToolError(f"tool_choice is {self.mode!r}, expected auto, none or required.", code="bad_tool_choice")
        if self.function and self.mode != "required":
            raise ToolError(
                f"tool_choice names {self.function} but is {self.mode!r}.",
                code="bad_tool_choice",
                hint="A named function is always required.",
            )

    @classmethod
    def of(cls, choice: str, *, parallel: bool = True, strict: bool = False) -> ToolChoice:
        """The choice called "auto", "none" or "required", or else of the function of that name."""
        if choice in ("auto", "none", "required"):
            return cls(cast(Mode, choice), parallel=parallel, strict=strict)
        return cls("required", choice, parallel, strict)


@dataclass(frozen=True)
class ToolRules:
    """What a choice comes to: the tools to tell the model of, a Lark grammar for the reply, tokens it may not use."""

    tools: tuple[Tool, ...] = ()
    grammar: str | None = None
    banned_tokens: tuple[int, ...] = ()


def tool_rules(tools: Sequence[Tool], choice: ToolChoice, tokenizer: Tokenizer) -> ToolRules:
    """What follows from `choice` among `tools`. Raises `ToolError`, and `PromptError` if the tokenizer has no tools.

    For "none" the model is not told of the tools either: told of them, but kept from the token that begins a call, it
    might write calls as text."""
    _check(tools, choice)
    start = tokenizer.tool_calls_id
    if choice.mode == "none":
        return ToolRules(banned_tokens=() if start is None else (start,))
    if not tools:
        return ToolRules()
    if start is None:
        refuse_tools("Tools were given")
    allowed = [tool for tool in tools if choice.function in ("", tool.name)]
    if choice.mode == "required":
        return ToolRules(tuple(tools), _grammar(allowed, choice, "start: calls", start))
    if choice.strict:
        return ToolRules(tuple(tools), _grammar(allowed, choice, "start: TEXT calls?\nTEXT: /(.|\\n)*/", start))
    return ToolRules(tuple(tools))


def _check(tools: Sequence[Tool], choice: ToolChoice) -> None:
    names = [tool.name for tool in tools]
    for place, name in enumerate(names):
        if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
            raise ToolError(
                f"A tool is named {name!r}, expected 1 to 64 letters, digits, - and _.", code="bad_tool_name"
            )
        if name in names[:place]:
            raise ToolError(
                f"Two tools are named {name}.", code="duplicate_tool", hint="Give each function a name of its own."
            )
    for tool in tools:
        if not isinstance(tool.parameters, dict):
            raise ToolError(
                f"The parameters of the tool {tool.name} are a {type(tool.parameters).__name__}, expected a dict.",
                code="bad_tool_parameters",
                hint="Give a JSON schema of the arguments, {} if there are none.",
            )
    if choice.mode == "required" and not tools:
        raise ToolError(
            f"tool_choice is {choice.function or 'required'} but there are no tools.",
            code="no_tools",
            hint="Give the tools, or leave tool_choice out.",
        )
    if choice.function and choice.function not in names:
        raise ToolError(
            f"tool_choice names {choice.function}, which is none of the tools ({', '.join(names)}).",
            code="unknown_function",
        )


# As the model was taught to write calls. Without a choice of spaces, much of a call is forced and need not be sampled.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _grammar(tools: Sequence[Tool], choice: ToolChoice, start: str, token: int) -> str:
    """A reply as `start` says, where `calls` are to `tools`; each schema stays a document for its $refs to point to."""
    more = ' (", " call)*' if choice.parallel else ""
    lines = [start, f'calls: <[{token}]> " [" call{more} "]"']
    lines.append("call: " + " | ".join(f"call_{place}" for place in range(len(tools))))
    for place, tool in enumerate(tools):
        before = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
        lines.append(f'call_{place}: {before} arguments_{place} "}}"')
        lines.append(f"arguments_{place}: %json {_schema(tool)}")
    return "\n".join(lines) + "\n"


def _schema(tool: Tool) -> str:
    """JSON text of a schema of the arguments, which are an object whether or not `parameters` says so."""
    kind = tool.parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise ToolError(
            f"The parameters of the tool {tool.name} have the type {kind!r}, expected object.",
            code="bad_tool_parameters",
            hint="Describe each argument under properties.",
        )
    try:
        return json.dumps({**tool.parameters, "type": "object", "x-guidance": _LAYOUT}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolError(
            f"The parameters of the tool {tool.name} are no JSON: {error}", code="bad_tool_parameters"
        ) from error


@dataclass(frozen=True)
class ToolCallDelta:
    """More of the call number `index`: first its `id` and `name`, then its arguments' JSON text, part by part."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class ToolCallStream:
    """Text after `[TOOL_CALLS]` in, in any parts; calls out, as soon as they are known.

    `calls` are the complete ones, as reading the whole text at once would find them, but with arguments as written.
    What is no list of calls comes out as text, all of it that no call was made of. An id written after the name comes
    too late to be used."""

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        self.is_complete = False
        """Whether the text so far is a whole list of calls."""
        self._begun = 0
        self._held: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self._failed = False
        self._reader = self._read()
        next(self._reader)

    def feed(self, text: str) -> list[ToolCallDelta | str]:
        """Add `text`; returns what it brought of calls, and what turned out to be text."""
        if self._failed:
            return [text] if text else []
        for place, char in enumerate(text, 1):
            self._held.append(char)
            try:
                self._reader.send(char)
            except _NoCallsError:
                self._failed = True
                return [*self._take_deltas(), self._take_held() + text[place:]]
        return self._take_deltas()

    @property
    def begun(self) -> int | None:
        """The number of the call that was begun last, if it is not complete and may still become so."""
        return self._begun - 1 if self._begun > len(self.calls) and not self._failed else None

    def finish(self, *, cut: bool = False) -> list[ToolCallDelta | str]:
        """The text ends here; returns what was held back. Where it was `cut`, that is no text, but part of a call."""
        text = self._take_held()
        return [] if cut or self.is_complete or not text else [text]

    def _read(self) -> _Reader[None]:
        char = yield from _next()
        if char == "[":
            while char != "]":
                yield from self._read_call((yield from _next()))
                char = yield from _next()
                if char not in ",]":
                    raise _NoCallsError
        else:
            yield from self._read_call(char)
        self.is_complete = True
        self._held.clear()
        yield from _next()
        self.is_complete = False
        raise _NoCallsError

    def _read_call(self, char: str) -> _Reader[None]:
        if char != "{":
            raise _NoCallsError
        call = _Call(len(self.calls))
        while char != "}":
            key, colon = yield from _string((yield from _next()))
            if colon != ":" or key in call.keys:
                raise _NoCallsError
            char = yield from self._read_member(call, key, (yield from _next()))
            if char not in ",}":
                raise _NoCallsError
        self._complete(call)

    def _read_member(self, call: _Call, key: str, first: str) -> _Reader[str]:
        """Read the value of `key`, which begins with `first`; returns what comes after it."""
        if key in ("name", "arguments", "id"):
            call.keys.add(key)
        if key == "arguments":
            return (yield from _value(first, lambda value, char: self._add_arguments(call, value, char)))
        if key == "name" or (key == "id" and first == '"'):
            text, char = yield from _string(first)
            if key == "name":
                self._add_name(call, text)
            elif not call.id and CALL_ID.fullmatch(text):
                call.id = text
            return char
        return (yield from _value(first, _ignore))

    def _add_name(self, call: _Call, name: str) -> None:
        if not FUNCTION_NAME.fullmatch(name):
            raise _NoCallsError
        call.name, call.id = name, call.id or new_call_id()
        self._begun = call.index + 1
        self._give(ToolCallDelta(call.index, call.id, name, "".join(call.arguments)))

    def _add_arguments(self, call: _Call, value: _Value, char: str) -> None:
        if value.kind not in ("{", '"', "n") or value.has_half_pair:
            raise _NoCallsError
        text = {"{": char, '"': value.text, "n": ""}[value.kind]
        call.has_arguments = value.kind != "n"
        self._add(call, text)

    def _complete(self, call: _Call) -> None:
        if not call.name:
            raise _NoCallsError
        if not call.has_arguments:
            self._add(call, "{}")
        self.calls.append(ToolCall(call.name, "".join(call.arguments), call.id))
        self._held.clear()

    def _add(self, call: _Call, text: str) -> None:
        call.arguments.append(text)
        if call.name:
            self._give(ToolCallDelta(call.index, arguments=text))

    def _give(self, delta: ToolCallDelta) -> None:
        self._deltas.append(delta)
        self._held.clear()

    def _take_deltas(self) -> list[ToolCallDelta | str]:
        deltas, self._deltas = self._deltas, []
        joined = [_joined(list(parts)) for _, parts in groupby(deltas, key=lambda delta: delta.index)]
        return [delta for delta in joined if delta.id or delta.arguments]

    def _take_held(self) -> str:
        held, self._held = self._held, []
        return "".join(held)


def _joined(parts: Sequence[ToolCallDelta]) -> ToolCallDelta:
    return replace(parts[0], arguments="".join(part.arguments for part in parts))


class _NoCallsError(Exception):
    """The text is no list of calls."""


@dataclass
class _Call:
    """A call being read; it has a name once it was told to the reader of the stream."""

    index: int
    name: str = ""
    id: str = ""
    arguments: list[str] = field(default_factory=list)
    has_arguments: bool = False
    keys: set[str] = field(default_factory=set)


_T = TypeVar("_T")
_Reader = Generator[None, str, _T]  # Is sent the characters one by one.
_SPACE = " \t\n\r"
_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
_OF_SCALARS = frozenset("+-.0123456789eEtrufalsn")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def _next() -> _Reader[str]:
    """The next character that is no space."""
    while (char := (yield)) in _SPACE:
        pass
    return char


def _value(first: str, take: Callable[[_Value, str], None]) -> _Reader[str]:
    """Read the value that begins with `first`, its characters going to `take`; returns what comes after it."""
    value, char = _Value(first), first
    while value.takes(char):
        take(value, char)
        char = yield
    return (yield from _next()) if char in _SPACE else char


def _string(first: str) -> _Reader[tuple[str, str]]:
    """Read a string; returns its text and what comes after it."""
    if first != '"':
        raise _NoCallsError
    parts: list[str] = []
    after = yield from _value(first, lambda value, _: parts.append(value.text))
    return "".join(parts), after


def _ignore(value: _Value, char: str) -> None:
    pass


class _Value:
    """Checks a JSON value character by character, and keeps of it only which brackets are open."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        """The first character: a bracket, a quote, or that of a number, true, false or null."""
        self.text = ""
        """What the last character added to the text of a string."""
        self.has_half_pair = False
        """Whether some string spelled half of a surrogate pair, which is no text."""
        self._open: list[str] = []
        self._string: _String | None = None
        self._scalar: list[str] = []
        self._allowed = "value"

    def takes(self, char: str) -> bool:
        """Whether `char` belongs to the value, or comes after it; raises `_NoCallsError` if it can be neither."""
        self.text = ""
        if self._string:
            self._continue_string(self._string, char)
            return True
        if self._scalar:
            if char in _OF_SCALARS:
                self._scalar.append(char)
                return True
            self._end_scalar()
        if self._allowed == "nothing":
            return False
        if char not in _SPACE:
            self._take(char)
        return True

    def _take(self, char: str) -> None:
        allowed = self._allowed
        if self._open and char == _CLOSING[self._open[-1]] and allowed in ("first", "more"):
            self._open.pop()
            self._end()
        elif allowed == "more" and char == ",":
            self._allowed = "key" if self._open[-1] == "{" else "value"
        elif allowed == "colon" and char == ":":
            self._allowed = "value"
        elif allowed == "key" or (allowed == "first" and self._open[-1] == "{"):
            self._begin_string(char)
        elif allowed in ("value", "first"):
            self._begin(char)
        else:
            raise _NoCallsError

    def _begin(self, char: str) -> None:
        if char in _CLOSING and len(self._open) < _DEEPEST:
            self._open.append(char)
            self._allowed = "first"
        elif char in _OF_SCALARS:
            self._scalar = [char]
        else:
            self._begin_string(char)

    def _begin_string(self, char: str) -> None:
        if char != '"':
            raise _NoCallsError
        self._string = _String()

    def _continue_string(self, string: _String, char: str) -> None:
        self.text = string.add(char)
        self.has_half_pair |= string.has_half_pair
        if string.is_complete:
            self._string = None
            is_key = self._open[-1:] == ["{"] and self._allowed in ("first", "key")
            self._end()
            if is_key:
                self._allowed = "colon"

    def _end_scalar(self) -> None:
        if not _SCALAR.fullmatch("".join(self._scalar)):
            raise _NoCallsError
        self._scalar = []
        self._end()

    def _end(self) -> None:
        self._allowed = "more" if self._open else "nothing"


_CLOSING = {"{": "}", "[": "]"}
_DEEPEST = 500  # Python's json, which reads the arguments sooner or later, goes little further.


class _String:
    """The inside of a JSON string: characters as written in, text out."""

    def __init__(self) -> None:
        self.is_complete = False
        self.has_half_pair = False
        self._escape = ""
        self._first_half = ""

    def add(self, char: str) -> str:
        """The text that `char` completes, possibly none."""
        if self._escape:
            return self._unescape(self._escape + char)
        if char < " ":
            raise _NoCallsError
        if char == "\\":
            self._escape = char
            return ""
        self.is_complete = char == '"'
        return self._checked("" if self.is_complete else char)

    def _unescape(self, escape: str) -> str:
        self._escape = ""
        if len(escape) == 2 and escape[1] in _ESCAPES:
            return self._checked(_ESCAPES[escape[1]])
        if escape[1] != "u" or not _HEX.issuperset(escape[2:]):
            raise _NoCallsError
        if len(escape) == 6:
            return self._unit(chr(int(escape[2:], 16)))
        self._escape = escape
        return ""

    def _unit(self, unit: str) -> str:
        """A UTF-16 unit: a character, or half of a pair that together is one."""
        if self._first_half and "\udc00" <= unit <= "\udfff":
            pair, self._first_half = self._first_half + unit, ""
            return pair.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        if "\ud800" <= unit <= "\udbff":
            before, self._first_half = self._checked(""), unit
            return before
        return self._checked(unit)

    def _checked(self, text: str) -> str:
        """`text`, with the first half of a pair that it does not complete."""
        half, self._first_half = self._first_half, ""
        self.has_half_pair |= bool(half) or any("\udc00" <= unit <= "\udfff" for unit in text)
        return half + text


_HEX = frozenset("0123456789abcdefABCDEF")
