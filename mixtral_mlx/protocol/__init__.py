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

from datetime import UTC, datetime
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


def models(asks: Asks) -> dict[str, Any]:
    """The answer of `/v1/models`, for clients of OpenAI and of Anthropic: the one model that is served."""
    one = model(asks)
    return {"object": "list", "data": [one], "first_id": one["id"], "last_id": one["id"], "has_more": False}


def model(asks: Asks) -> dict[str, Any]:
    """The answer of `/v1/models/{model}`."""
    name = served(asks)
    started = datetime.fromtimestamp(_STARTED, UTC).isoformat().replace("+00:00", "Z")
    openai = {"id": name, "object": "model", "created": _STARTED, "owned_by": "mixtral-mlx"}
    anthropic = {"type": "model", "display_name": name, "created_at": started, "lifecycle": "active"}
    return {**openai, **anthropic, "max_input_tokens": asks.context, "max_tokens": asks.context}
