"""What all the APIs share: a request of a client once it is understood, its answer, whole or streamed, and a refusal.

Knows neither JSON bodies nor HTTP; what a field means is said by the module of its API."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Unpack

from ..config import Config, MixtralError
from ..engine.request import Event, Request, Result
from ..engine.tools import ToolChoice
from ..prompt import Message, Tokenizer, Tool

if TYPE_CHECKING:
    from ..engine.engine import Settings


class Refused(MixtralError):  # noqa: N818  # It is what happened to the request, not a fault of ours.
    """A request that cannot be honoured. `status` is HTTP's, `param` the dotted path of the field it is about."""

    def __init__(
        self, message: str, *, code: str = "bad_request", hint: str = "", status: int = 400, param: str | None = None
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.status = status
        self.param = param


class Asks(Protocol):
    """What is needed of an engine to understand a request; nothing here makes it work."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Config: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def context(self) -> int: ...

    def chat_request(
        self,
        messages: str | Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Tool] = ...,
        tool_choice: str | ToolChoice = ...,
        parallel_tool_calls: bool = ...,
        **settings: Unpack[Settings],
    ) -> Request: ...
    def completion_request(
        self, prompt: str | Sequence[int], *, echo: bool = ..., **settings: Unpack[Settings]
    ) -> Request: ...
    def embed_request(self, text: str | Sequence[int]) -> Request: ...


def check_length(told: str | Sequence[Message], asks: Asks, param: str, max_kv: int | None = None) -> None:
    """Raise `Refused` for what no context holds, however it is encoded: that would take seconds for nothing."""
    context = asks.config.max_position_embeddings if max_kv else asks.context
    if (least := asks.tokenizer.fewest_tokens(told)) > context:
        raise Refused(
            f"The prompt is at least {least:,} tokens long and the context holds {context:,}.",
            code="context_full",
            hint="Shorten the prompt, or drop the oldest turns.",
            param=param,
        )


@dataclass(frozen=True)
class Frame:
    """One server-sent event: `data` is an object to be written as JSON, or text to be written as it is."""

    data: dict[str, Any] | str
    event: str | None = None


class Stream(ABC):
    """An answer as it comes: events of the engine in, frames out. Keeps no time and sends nothing."""

    @abstractmethod
    def begin(self) -> list[Frame]:
        """What comes before anything is known."""

    @abstractmethod
    def feed(self, index: int, event: Event) -> list[Frame]:
        """What an event of result number `index` brings. Progress with a prompt brings no frames."""

    @abstractmethod
    def fail(self, error: MixtralError) -> list[Frame]:
        """The error as this API writes it within a stream, and the stream's end; nothing comes after it."""

    @abstractmethod
    def end(self) -> list[Frame]:
        """What comes when every result is done."""


class Call(ABC):
    """A request of a client, understood.

    `asked` are requests for the engine, each with how many answers are wanted; nothing where the answer needs no model.
    `streams` is whether the client wants the answer as it comes."""

    def __init__(self, asked: Sequence[tuple[Request, int]] = (), *, streams: bool = False) -> None:
        self.asked = tuple(asked)
        self.streams = streams

    @abstractmethod
    def answer(self, results: Sequence[Result]) -> dict[str, Any]:
        """The whole answer. `results` come in order: all of the first request, then all of the next."""

    @abstractmethod
    def stream(self) -> Stream:
        """The answer as it comes; only for a call that `streams`."""


class Ready(Call):
    """A call whose answer is known already."""

    def __init__(self, ready: dict[str, Any]) -> None:
        super().__init__()
        self._ready = ready

    def answer(self, results: Sequence[Result]) -> dict[str, Any]:
        return self._ready

    def stream(self) -> Stream:
        raise AssertionError("There is nothing to stream.")


def now() -> int:
    """Seconds since 1970, as the APIs date their answers."""
    return int(time.time())
