"""Frames as bytes of an event stream (text/event-stream), and comments, which clients skip."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.request import PromptProgress
    from ..protocol import Frame

# Line ends to programs that split text rather than bytes, though not to the standard. Only JSON strings hold them.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def encoded(frame: Frame) -> bytes:
    """One event: its name, if it has one, and its data on one line."""
    data = frame.data if isinstance(frame.data, str) else dumped(frame.data)
    assert "\n" not in data
    assert "\r" not in data
    return (f"event: {frame.event}\n" if frame.event else "").encode() + f"data: {data}\n\n".encode()


def dumped(data: object) -> str:
    """JSON on one line, whoever splits it."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_LINE_ENDS)


def progress(event: PromptProgress) -> bytes:
    """How far the prompt has been read, as a comment."""
    return f": prompt {event.done}/{event.total} (cached {event.cached})\n\n".encode()


WAITING = b": waiting\n\n"
"""Says that the server is there, and finds out whether the client still is."""
