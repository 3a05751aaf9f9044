"""OpenAI's completions of plain texts or ids, without turns: bodies, answers and streams."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from ..config import MixtralError
from ..engine.request import Done, Event, Request, Result, Text, Token
from ..prompt import Tokenizer
from .answers import Shown, ShownTokens, Total, check_model, finish_reason, new_id, served, shown_tokens
from .bodies import read
from .call import Asks, Call, Frame, Refused, Stream, check_length, now
from .errors import openai_error, refusing
from .formats import ResponseFormat
from .openai_chat import DONE
from .settings import OpenAISampling

PATH = "/v1/completions"
_MOST_PROMPTS = 128
_DEFAULT_MAX_TOKENS = 16


def prompt_kind(value: object) -> str:
    """Which of the four shapes a prompt, or an input to be embedded, has."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(value, list):
        return "ids" if isinstance(first, int) else "id_lists" if isinstance(first, list) else "texts"
    return "text"


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]
Prompts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(min_length=1), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Tag("id_lists")],
    Discriminator(prompt_kind),
]
"""A text, texts, ids, or lists of ids."""


def each(prompts: Any, most: int, param: str) -> list[str | list[int]]:
    """The prompts one by one."""
    found: list[str | list[int]] = [prompts] if prompt_kind(prompts) in ("text", "ids") else prompts
    if len(found) > most:
        raise Refused(f"{param} has {len(found)} entries, and {most} may come at once.", code="bad_value", param=param)
    return found


def check_lengths(prompts: Sequence[str | list[int]], asks: Asks, param: str, max_kv: int | None = None) -> None:
    """Raise `Refused` for texts of which one is longer than any context."""
    for prompt in prompts:
        if isinstance(prompt, str):
            check_length(prompt, asks, param, max_kv)


class CompletionBody(OpenAISampling):
    """The body of `/v1/completions`."""

    prompt: Prompts
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    response_format: ResponseFormat | None = None


def parse(body: object, asks: Asks, *, aliases: Collection[str] = ()) -> Call:
    """The call a body makes. Raises `Refused`."""
    asked = read(PATH, CompletionBody, body)
    check_model(asked.model, asks, aliases)
    if asked.best_of not in (None, asked.n or 1):
        raise Refused(
            f"best_of is {asked.best_of} and n {asked.n or 1}; answers are not ranked here.",
            code="unsupported_value",
            hint="Leave best_of out.",
            param="best_of",
        )
    if asked.echo and asked.logprobs is not None:
        raise Refused(
            "echo and logprobs cannot be honoured together: a prompt's tokens have no log probabilities here.",
            code="unsupported_value",
            hint="Leave one of them out.",
            param="echo",
        )
    settings = {
        **asked.settings(asks.config),
        "max_tokens": asked.max_tokens or _DEFAULT_MAX_TOKENS,
        "top_logprobs": asked.logprobs or 0,
    }
    if asked.response_format:
        settings["response_format"] = asked.response_format.format()
    prompts = each(asked.prompt, _MOST_PROMPTS, "prompt")
    check_lengths(prompts, asks, "prompt", asked.max_kv)
    with refusing("prompt"):
        requests = [asks.completion_request(prompt, echo=bool(asked.echo), **settings) for prompt in prompts]
    return CompletionCall(requests, asked, asks)


class CompletionCall(Call):
    """Completions of one text or several; choice k of prompt i is number i · n + k."""

    def __init__(self, requests: Sequence[Request], asked: CompletionBody, asks: Asks) -> None:
        self.n = asked.n or 1
        super().__init__([(request, self.n) for request in requests], streams=bool(asked.stream))
        self.tokenizer = asks.tokenizer
        self.wants_logprobs = asked.logprobs is not None
        self.wants_usage = asked.wants_usage
        self.head = {"id": new_id("cmpl-"), "object": "text_completion", "created": now(), "model": served(asks)}

    def prompt(self, index: int) -> tuple[int, ...]:
        """The ids that choice number `index` goes on from."""
        return self.asked[index // self.n][0].prompt

    def answer(self, results: Sequence[Result]) -> dict[str, Any]:
        choices = []
        for index, result in enumerate(results):
            shown = shown_tokens(self.tokenizer, self.prompt(index), result) if self.wants_logprobs else []
            choices.append(self.choice(index, result.text, shown, finish_reason(result.finish_reason)))
        total = Total.of([result.usage for result in results], [self.n] * len(self.asked))
        return {**self.head, "choices": choices, "usage": total.openai()}

    def choice(self, index: int, text: str, shown: Sequence[Shown], reason: str | None) -> dict[str, Any]:
        """A choice, or a part of it."""
        logprobs = _logprobs(shown, self.tokenizer) if self.wants_logprobs else None
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}

    def stream(self) -> CompletionStream:
        return CompletionStream(self)


def _logprobs(shown: Sequence[Shown], tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokens": [token.written(tokenizer)[0] for token in shown],
        "token_logprobs": [token.token.logprob for token in shown],
        "top_logprobs": [_likeliest(token, tokenizer) for token in shown],
        "text_offset": [token.at for token in shown],
    }


def _likeliest(shown: Shown, tokenizer: Tokenizer) -> dict[str, float]:
    """By text, as this API has it; of two that are written alike, the likelier."""
    likeliest: dict[str, float] = {}
    for text, _, logprob in shown.others(tokenizer):
        likeliest.setdefault(text, logprob)
    return likeliest


class CompletionStream(Stream):
    """Completions as they come."""

    def __init__(self, call: CompletionCall) -> None:
        self._call = call
        self._count = len(call.asked) * call.n
        self._shown = [ShownTokens(call.tokenizer, call.prompt(index)) for index in range(self._count)]
        self._done: dict[int, Done] = {}

    def begin(self) -> list[Frame]:
        return []

    def feed(self, index: int, event: Event) -> list[Frame]:
        match event:
            case Token():
                return self._text(index, event.text, self._shown[index].add(event) if self._call.wants_logprobs else [])
            case Text():
                return self._text(index, event.text, self._shown[index].show(event.text))
            case Done():
                self._done[index] = event
                shown = self._shown[index].finish()
                return [self._chunk(index, "", shown, finish_reason(event.finish_reason))]
        return []

    def fail(self, error: MixtralError) -> list[Frame]:
        return [Frame(openai_error(error)), DONE]

    def end(self) -> list[Frame]:
        if not self._call.wants_usage:
            return [DONE]
        usages = [self._done[index].usage for index in range(self._count)]
        total = Total.of(usages, [self._call.n] * len(self._call.asked))
        return [Frame({**self._call.head, "choices": [], "usage": total.openai()}), DONE]

    def _text(self, index: int, text: str, shown: Sequence[Shown]) -> list[Frame]:
        return [self._chunk(index, text, shown, None)] if text or shown else []

    def _chunk(self, index: int, text: str, shown: Sequence[Shown], reason: str | None) -> Frame:
        usage = {"usage": None} if self._call.wants_usage else {}
        return Frame({**self._call.head, "choices": [self._call.choice(index, text, shown, reason)], **usage})
