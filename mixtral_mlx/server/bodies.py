"""JSON bodies: read within limits, and taken only where every reader would understand the same.

Refuses other encodings, NaN, and names given twice. What can be told of the decoded body is left to `protocol`."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

from ..protocol import Refused
from .settings import ServerSettings

_PARTS = (b",", b"[", b"{")
_LISTS = ("messages", "input")
_SCHEMAS = ("tools", "response_format", "text", "output_config", "output_format", "guided_json")


async def read(receive: Callable[[], Awaitable[Any]], settings: ServerSettings) -> bytes:
    """The body of a request. Raises `Refused` where it is too long, and ConnectionError where the client leaves."""
    parts: list[bytes] = []
    length = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("The client left while it sent its request.")
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > settings.max_body:
            raise too_long(settings)
        if not message.get("more_body", False):
            return b"".join(parts)


def too_long(settings: ServerSettings) -> Refused:
    """The refusal of a body that is longer than allowed."""
    return Refused(
        f"The body has more than {settings.max_body:,} bytes.",
        code="body_too_large",
        status=413,
        hint="Send less, or start the server with a larger --max-body.",
    )


def parsed(data: bytes, settings: ServerSettings) -> dict[str, Any]:
    """The object that a body is. Raises `Refused`."""
    if sum(map(data.count, _PARTS)) > settings.max_json_parts:
        raise _refused(f"The body has more than {settings.max_json_parts:,} parts.", 413, "body_too_large")
    try:
        body = json.loads(data.decode(), parse_constant=_no_constant, parse_int=_int, object_pairs_hook=_object)
        if not isinstance(body, dict):
            raise _refused(f"The body is a JSON {_kind(body)}, expected an object.")
        _check_limits(body, settings)
    except UnicodeDecodeError as error:
        raise _refused(f"The body is not UTF-8: {error.reason} at byte {error.start}.") from None
    except json.JSONDecodeError as error:
        raise _refused(f"The body is not JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise _refused("The body is nested too deep.", code="too_deep") from None
    return body


def _no_constant(name: str) -> NoReturn:
    raise _refused(f"The body holds {name}, which JSON does not know.")


def _int(text: str) -> int:
    if len(text) > 40:
        raise _refused(f"The body holds a whole number of {len(text)} digits.")
    return int(text)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise _refused(f"The body gives {json.dumps(name)[:80]} twice in one object.")
        made[name] = value
    return made


def _check_limits(body: dict[str, Any], settings: ServerSettings) -> None:
    for name in _LISTS:
        if isinstance(body.get(name), list) and len(body[name]) > settings.max_messages:
            raise _refused(
                f"{name} has {len(body[name]):,} entries, expected {settings.max_messages:,} at most.",
                413,
                "too_many_messages",
                name,
            )
    for name in _SCHEMAS:
        if isinstance(body.get(name), dict | list) and len(json.dumps(body[name])) > settings.max_schema_bytes:
            raise _refused(f"{name} has more than {settings.max_schema_bytes:,} bytes.", 413, "schema_too_large", name)


def _kind(value: object) -> str:
    return {type(None): "null", bool: "boolean", str: "string", list: "array"}.get(type(value), "number")


def _refused(message: str, status: int = 400, code: str = "bad_json", param: str | None = None) -> Refused:
    return Refused(message, code=code, status=status, param=param)
