"""Turns as clients send them → turns as Mixtral's prompt can say them.

One rule for all the APIs:
- instructions after the first turn are read as part of the user's turn there, the only place there is;
- answers that follow one another are one answer, and what a reply says besides calling tools is left out, as by the
  model's own template: a turn of Mixtral's is text or calls;
- an answer of nothing is left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..prompt import Message


def as_prompted(turns: Iterable[Message]) -> list[Message]:
    """The turns as `encode_chat` takes them."""
    told: list[Message] = []
    for turn in turns:
        if turn.role == "system" and any(before.role != "system" for before in told):
            turn = replace(turn, role="user")
        if turn.role == "assistant" and told and told[-1].role == "assistant":
            told[-1] = _together(told[-1], turn)
        else:
            told.append(turn)
    return [_text_or_calls(turn) for turn in told if turn.role != "assistant" or turn.content or turn.tool_calls]


def _together(first: Message, second: Message) -> Message:
    content = "\n\n".join(text for text in (first.content, second.content) if text)
    return replace(first, content=content, tool_calls=(*first.tool_calls, *second.tool_calls))


def _text_or_calls(turn: Message) -> Message:
    return replace(turn, content="") if turn.role == "assistant" and turn.tool_calls else turn
