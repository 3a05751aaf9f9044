"""Turns as clients send them → turns as Mixtral's prompt can say them.

One rule for all the APIs:
- instructions after the first turn are read as part of the user's turn there, the only place there is;
- answers that follow one another are one answer, and what a reply says besides calling tools is left out, as by the
  model's own template: a turn of Mixtral's is text or calls;
- an answer of nothing is left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from ..prompt import Message


def as_prompted(turns: Iterable[Message]) -> list[Message]:
    """The turns as `encode_chat` takes them."""
    told: list[Message] = []
    for role, group in groupby(_placed(turns), key=lambda turn: turn.role):
        same = list(group)
        told += _as_one(same) if role == "assistant" else same
    return told


def _placed(turns: Iterable[Message]) -> Iterator[Message]:
    """The turns, with later instructions as the user's."""
    begun = False
    for turn in turns:
        yield replace(turn, role="user") if begun and turn.role == "system" else turn
        begun |= turn.role != "system"


def _as_one(answers: Sequence[Message]) -> list[Message]:
    """Answers that follow one another as one, or as none."""
    if calls := tuple(call for answer in answers for call in answer.tool_calls):
        return [Message("assistant", "", calls)]
    content = "\n\n".join(answer.content for answer in answers if answer.content)
    return [Message("assistant", content)] if content else []
