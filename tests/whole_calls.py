"""A whole reply's tool calls, read at once by Python's JSON: what those that are given out as they come are held to."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from mixtral_mlx.prompt import CALL_ID, FUNCTION_NAME, ToolCall, new_call_id


def parse_tool_calls(text: str, start: int | None) -> tuple[str, list[ToolCall]]:
    """Split a whole reply into its text and the calls from `start`, a detokenizer's `tool_calls_at`.

    Calls without an id of 9 letters or digits get a new one. What does not parse stays in the text."""
    if start is None:
        return text, []
    try:
        found = json.loads(text[start:], parse_constant=_refuse_constant)
        calls = [_parsed_call(entry) for entry in (found if isinstance(found, list) else [found])]
    except (ValueError, TypeError, KeyError, RecursionError):
        return text, []
    return (text[:start], calls) if calls else (text, [])


def _parsed_call(entry: dict[str, Any]) -> ToolCall:
    """One call as the model wrote it; raises KeyError, TypeError or ValueError when it is none."""
    name, arguments, given = entry["name"], entry.get("arguments"), entry.get("id")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise ValueError(name)
    if arguments is None or isinstance(arguments, dict):
        arguments = json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)  # 1e999 would come out as Infinity
    if not isinstance(arguments, str):
        raise TypeError(arguments)
    arguments.encode()  # half a surrogate pair could never be prompted with again
    if not isinstance(given, str) or not CALL_ID.fullmatch(given):
        given = new_call_id()
    return ToolCall(name, arguments, given)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)
