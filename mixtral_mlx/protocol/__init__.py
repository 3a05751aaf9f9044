"""What requests mean: OpenAI's and Anthropic's JSON ↔ the engine's requests and events. No sockets, no arrays.

call          what the APIs share: a call, its answer, its stream, a refusal
fields        every field of the APIs and what is done with it
bodies        JSON → models, with refusals that name the field; settings, formats, conversation: parts of models
answers       ids, models' names, usage, log probabilities; errors: as the APIs write them
openai_chat   /v1/chat/completions

For a server: `PARSERS[path](body, engine)` gives a `Call` or raises `Refused`. Its `asked` go to the engine's
`choices`, and the results to `answer`, or the events to a `stream`. `error_body` writes any error as that API does."""

from __future__ import annotations

from typing import Any, Protocol

from . import openai_chat
from .answers import served
from .call import Asks, Call, Frame, Refused, Stream, now
from .errors import error_body, status_of

__all__ = ["PARSERS", "Asks", "Call", "Frame", "Refused", "Stream", "error_body", "models", "status_of"]


class Parser(Protocol):
    """Understands a decoded body; `aliases` are other names for the served model, as patterns (`claude-*`)."""

    def __call__(self, body: object, asks: Asks, *, aliases: tuple[str, ...] = ...) -> Call: ...


PARSERS: dict[str, Parser] = {openai_chat.PATH: openai_chat.parse}
"""What understands a body, by path: `parser(body, asks, aliases=())`."""

_STARTED = now()


def models(asks: Asks) -> dict[str, Any]:
    """The answer of `/v1/models`: the one model that is served."""
    model = {"id": served(asks), "object": "model", "created": _STARTED, "owned_by": "mixtral-mlx"}
    return {"object": "list", "data": [model]}
