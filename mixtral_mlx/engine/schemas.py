"""What of JSON Schema can be kept to: every keyword is known or refused by its name, before anything is compiled.

Knows nothing of tokens; llguidance, which compiles schemas, finds what is wrong within a known keyword."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..config import MixtralError

MOST_DEPTH = 64
_MOST_MULTIPLE = 10_000  # digits of a number are counted modulo it, in so many states

_MOST_EXACT = 1 << 53

_ONE = {"additionalItems", "additionalProperties", "items"}
_LIST = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}
_MAP = {"$defs", "definitions", "properties", "patternProperties"}
_PLAIN = {
    *("$ref", "type", "enum", "const", "required", "pattern", "format", "multipleOf"),
    *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_REMARKS = {
    *("$schema", "$id", "$anchor", "$comment", "title", "description", "default", "examples"),
    *("deprecated", "readOnly", "writeOnly"),
}
_NUMBERS = ("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_KNOWN = _ONE | _LIST | _MAP | _PLAIN | _REMARKS
_FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")


class GrammarError(MixtralError):
    """What a text must be makes no sense, is too much to compile, or was too much to follow."""


def unsupported(what: str, hint: str = "") -> GrammarError:
    """The error for a schema that says `what`."""
    return GrammarError(
        f"The JSON schema {what}, which cannot be enforced.",
        code="unsupported_schema",
        hint=hint or "Leave it out, and check it when the answer is there.",
    )


def check_schema(schema: Any, *, embedded: bool = False) -> None:
    """Raise `GrammarError` for anything in `schema` that would not be kept; `embedded` ones may set spaces."""
    if not isinstance(schema, dict | bool):
        raise _bad(f"is {type(schema).__name__}", "an object or a truth value")
    if embedded and isinstance(schema, dict):
        schema = {key: value for key, value in schema.items() if key != "x-guidance"}
    waiting = [(schema, 0)]
    while waiting:
        part, depth = waiting.pop()
        if depth > MOST_DEPTH:
            raise GrammarError(
                f"The JSON schema is more than {MOST_DEPTH} levels deep.",
                code="grammar_too_large",
                hint="Name its parts in $defs.",
            )
        if isinstance(part, dict):
            _check_part(part)
            waiting += [(inner, depth + 1) for inner in _inner(part)]


def _check_part(part: dict[str, Any]) -> None:
    for key in part:
        if key not in _KNOWN:
            raise unsupported(f"uses {key[:100]!r}")
    name = part.get("format")
    if isinstance(name, str) and name not in _FORMATS:
        raise unsupported(f"has the format {name[:100]!r}", f"The formats are {', '.join(_FORMATS)}.")
    multiple = part.get("multipleOf")
    if isinstance(multiple, int | float) and multiple > _MOST_MULTIPLE:
        raise unsupported("has a large multipleOf", f"{_MOST_MULTIPLE:,} is the most.")
    if any(abs(number) > _MOST_EXACT for key in _NUMBERS for number in _whole_numbers(part.get(key))):
        raise unsupported("has a whole number beyond 2^53", "That large, the compiler would take a neighbour for it.")


def _whole_numbers(value: Any) -> Iterator[int]:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, int):
            yield part
        elif isinstance(part, list | tuple):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()


def _inner(part: dict[str, Any]) -> Iterator[Any]:
    """The schemas directly within one, and what stands in their place but is none, for the compiler to refuse."""
    for key, value in part.items():
        if key in _LIST and isinstance(value, list):
            yield from value
        elif key in _MAP and isinstance(value, dict):
            yield from value.values()
        elif key in _ONE:
            yield value


def schemas_within(lark: str) -> Iterator[Any]:
    """The schemas written into a Lark grammar."""
    decoder = json.JSONDecoder()
    for after in lark.split("%json")[1:]:
        try:
            yield decoder.raw_decode(after.lstrip())[0]
        except (ValueError, RecursionError):
            continue  # No schema, or no JSON: the compiler says where.


def _bad(found: str, expected: str) -> GrammarError:
    return GrammarError(f"The JSON schema {found}, expected {expected}.", code="bad_grammar")
