"""What requests mean: OpenAI's and Anthropic's JSON ↔ the engine's requests and events. No sockets, no arrays.

call          what the APIs share: a call, its answer, its stream, a refusal
fields        every field of the APIs and what is done with it
bodies        JSON → models, with refusals that name the field; settings, formats, conversation: parts of models
answers       ids, models' names, usage, log probabilities; errors: as the APIs write them
shapes        answers as the OpenAPI document has them; openapi: that document
openai_chat, completions, responses, embeddings, anthropic, tokens
              an API each: its bodies, its answers, its streams

For a server: `PARSERS[path](body, engine)` gives a `Call` or raises `Refused`. Its `asked` go to the engine's
`choices`, and the results to `answer`, or the events to a `stream`. `error_body` writes any error as that API does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Protocol

from . import anthropic, completions, embeddings, openai_chat, responses, tokens
from .answers import check_model, served
from .call import Asks, Call, Frame, Refused, Stream, now
from .errors import error_body, status_of
from .openapi import openapi

__all__ = [
    "PARSERS",
    "Asks",
    "Call",
    "Frame",
    "Refused",
    "Stream",
    "check_model",
    "error_body",
    "model",
    "models",
    "openapi",
    "status_of",
]


class Parser(Protocol):
    """Understands a decoded body; `aliases` are other names for the served model, as patterns (`claude-*`)."""

    def __call__(self, body: object, asks: Asks, *, aliases: tuple[str, ...] = ...) -> Call: ...


PARSERS: dict[str, Parser] = {
    openai_chat.PATH: openai_chat.parse,
    completions.PATH: completions.parse,
    responses.PATH: responses.parse,
    anthropic.PATH: anthropic.parse,
    anthropic.COUNT_PATH: anthropic.parse_count,
    embeddings.PATH: embeddings.parse,
    tokens.PATH: tokens.parse,
}
"""What understands a body, by path: `parser(body, asks, aliases=())`."""

_STARTED = now()


def models(asks: Asks, page: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """The answer of `/v1/models`, for clients of OpenAI and of Anthropic: the one model that is served.

    `page` is which part of the list is asked for, as Anthropic's API has it. Raises `Refused`."""
    one = model(asks)
    if not _LIMIT.fullmatch(limit := page.get("limit", "20")):
        raise _bad_page("limit", limit, "a number from 1 to 1000")
    besides = [name for name in ("after_id", "before_id") if name in page]
    for name in besides:
        if page[name] != one["id"]:
            raise _bad_page(name, page[name], f"the id of a model in the list, {one['id']!r}")
    data = [] if besides else [one]
    shown = one["id"] if data else None
    return {"object": "list", "data": data, "first_id": shown, "last_id": shown, "has_more": False}


_LIMIT = re.compile("[1-9][0-9]{0,2}|1000")


def _bad_page(name: str, found: str, expected: str) -> Refused:
    return Refused(f"{name} is {found[:60]!r}, expected {expected}.", code="bad_value", param=name)


def model(asks: Asks) -> dict[str, Any]:
    """The answer of `/v1/models/{model}`."""
    name = served(asks)
    started = datetime.fromtimestamp(_STARTED, UTC).isoformat().replace("+00:00", "Z")
    openai = {"id": name, "object": "model", "created": _STARTED, "owned_by": "mixtral-mlx"}
    anthropic = {"type": "model", "display_name": name, "created_at": started, "lifecycle": "active"}
    return {**openai, **anthropic, "max_input_tokens": asks.context, "max_tokens": asks.context}
