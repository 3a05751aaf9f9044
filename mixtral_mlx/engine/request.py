"""What can be asked of the engine, what comes back while it answers, and what can go wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..config import MixtralError
from ..generate import Sampling, Usage
from ..prompt import ToolCall
from .grammar import Format
from .tools import ToolCallDelta, ToolRules

__all__ = [
    "Done",
    "Embedding",
    "EngineError",
    "Event",
    "PromptProgress",
    "Request",
    "Result",
    "Scores",
    "Text",
    "Token",
    "ToolCallDelta",
]


class EngineError(MixtralError):
    """A request that was refused or broken off. `retryable`: the same request may well succeed later."""

    def __init__(self, message: str, *, code: str, hint: str = "", retryable: bool = False) -> None:
        super().__init__(message, code=code, hint=hint)
        self.retryable = retryable


@dataclass(frozen=True)
class Request:
    """A prompt of ids and how it is to be continued, or for another `purpose` scored or embedded.

    `kv_bits` (8 or 4) quantizes its keys and values; `max_kv` keeps those of its first 4 tokens and of the latest, so
    many together. `speculate` guesses tokens ahead, from the text so far or with a draft model, which changes the speed
    only. `response_format` is what the text
    must be, `rules` are those for the tools it may call. `echo` is text to come before the answer's own. To score is to
    give the log probabilities of the prompt's tokens from `scored_from` on."""

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    kv_bits: int | None = None
    max_kv: int | None = None
    speculate: Literal["n-gram", "draft"] | None = None
    response_format: Format | None = None
    rules: ToolRules = field(default_factory=ToolRules)
    echo: str = ""
    purpose: Literal["answer", "score", "embed"] = "answer"
    scored_from: int = 1


@dataclass(frozen=True)
class PromptProgress:
    """So many tokens of the prompt have been read, `cached` of them for an earlier request."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class Token:
    """A token, and the text that it completes: possibly none, and with the last one all that was held back."""

    text: str
    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Text:
    """Text that belongs to no one token: an echoed prompt, or what was held back when a request was cancelled."""

    text: str


@dataclass(frozen=True)
class Scores:
    """For consecutive tokens of a prompt: the log probability of each, and whether it was the likeliest of all."""

    logprobs: tuple[float, ...] = ()
    is_likeliest: tuple[bool, ...] = ()

    @property
    def logprob(self) -> float:
        """That of all of them together."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """How many equally likely tokens there might have been at each place, on average."""
        return math.exp(-self.logprob / len(self.logprobs))


@dataclass(frozen=True)
class Embedding:
    """The mean of the last hidden states over a text."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class Done:
    """The end: "stop" (the model, a stop string or a grammar ended it), "length", "tool_calls" or "cancelled".

    `stop_text` is the stop string, if one ended it; `cut_call` the number of the tool call that came in part only."""

    finish_reason: str
    usage: Usage
    queued_seconds: float = 0.0
    stop_text: str = ""
    cut_call: int | None = None


Event = PromptProgress | Token | Text | ToolCallDelta | Scores | Embedding | Done


@dataclass(frozen=True)
class Result:
    """A whole answer. `logprobs` and `top_logprobs` have an entry for each of its `tokens`.

    Of `tool_calls` the one numbered `cut_call` is not complete: `max_tokens` or a cancellation ended it."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage
    queued_seconds: float
    scores: Scores
    embedding: tuple[float, ...]
    stop_text: str = ""
    cut_call: int | None = None

    @classmethod
    def of(cls, events: Sequence[Event]) -> Result:
        """What `events`, the last of them `Done`, come to."""
        done = events[-1]
        assert isinstance(done, Done)
        tokens = [event for event in events if isinstance(event, Token)]
        return cls(
            text="".join(event.text for event in events if isinstance(event, Token | Text)),
            tokens=tuple(token.id for token in tokens),
            logprobs=tuple(token.logprob for token in tokens),
            top_logprobs=tuple(token.top_logprobs for token in tokens),
            tool_calls=_calls(event for event in events if isinstance(event, ToolCallDelta)),
            finish_reason=done.finish_reason,
            usage=done.usage,
            queued_seconds=done.queued_seconds,
            scores=next((event for event in events if isinstance(event, Scores)), Scores()),
            embedding=next((event.values for event in events if isinstance(event, Embedding)), ()),
            stop_text=done.stop_text,
            cut_call=done.cut_call,
        )


def _calls(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    calls: dict[int, list[ToolCallDelta]] = {}
    for delta in deltas:
        calls.setdefault(delta.index, []).append(delta)
    return tuple(
        ToolCall(
            name="".join(delta.name for delta in parts),
            arguments="".join(delta.arguments for delta in parts),
            id="".join(delta.id for delta in parts),
        )
        for parts in calls.values()
    )
