"""What answers of several APIs are made of: who answers, ids, usage, finish reasons, log probabilities with bytes."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ..engine.request import Result, Token
from ..generate import Usage
from ..prompt import Tokenizer
from .call import Asks, Refused


def served(asks: Asks) -> str:
    """The id of the model as clients see it: where it lies on this machine is nobody's business."""
    is_path = asks.name.startswith(("/", "~", "."))
    return asks.name.rstrip("/").rpartition("/")[2] if is_path else asks.name


def check_model(asked: str | None, asks: Asks, aliases: Collection[str]) -> None:
    """Raise `Refused` for a model that is not the served one, nor matches an alias."""
    name = served(asks)
    if asked is None or asked in (name, asks.name, name.rpartition("/")[2], "default"):
        return
    if any(fnmatchcase(asked, alias) for alias in aliases):
        return
    raise Refused(
        f"There is no model {asked[:100]!r} here; {name!r} is served.",
        code="model_not_found",
        hint=f'Ask for {name!r} or "default", or have the server started with an alias for that name.',
        status=404,
        param="model",
    )


def new_id(prefix: str) -> str:
    """An id for an answer, or a part of it."""
    return prefix + secrets.token_hex(12)


def finish_reason(reason: str) -> str:
    """As OpenAI calls it. An answer that was cut off is one that has not come to its end, as with "length"."""
    return "length" if reason == "cancelled" else reason


@dataclass(frozen=True)
class Total:
    """Tokens of all choices together; the prompt of several choices counts once."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of(cls, usages: Sequence[Usage], counts: Sequence[int]) -> Total:
        """Of `usages` in order, where `counts` says how many each prompt has."""
        firsts, place = [], 0
        for count in counts:
            firsts.append(usages[place])
            place += count
        return cls(
            sum(usage.prompt_tokens for usage in firsts),
            sum(usage.cached_tokens for usage in firsts),
            sum(usage.completion_tokens for usage in usages),
        )

    def openai(self) -> dict[str, Any]:
        """As chat completions and completions tell it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


# Log probabilities.


@dataclass(frozen=True)
class Shown:
    """A token whose text was shown, from the character `at` on; `begins` if it lost a space, as the first of a text."""

    token: Token
    begins: bool = False
    at: int = 0

    def written(self, tokenizer: Tokenizer) -> tuple[str, list[int] | None]:
        """The token as text and as bytes."""
        return written(tokenizer, self.token.id, begins=self.begins)

    def others(self, tokenizer: Tokenizer) -> list[tuple[str, list[int] | None, float]]:
        """The likeliest tokens at its place as text and as bytes, with their log probabilities."""
        return [(*written(tokenizer, token, begins=self.begins), logprob) for token, logprob in self.token.top_logprobs]


def written(tokenizer: Tokenizer, token: int, *, begins: bool = False) -> tuple[str, list[int] | None]:
    """A token as text and as bytes; no bytes for those that are no text.

    Part of a character has the text that OpenAI gives it, as `bytes:\\xe2\\x82`."""
    data = _bytes(tokenizer, token)
    if data is None:
        return tokenizer.piece(token), None
    data = data.removeprefix(b" ") if begins else data
    try:
        return data.decode(), list(data)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)


def _bytes(tokenizer: Tokenizer, token: int) -> bytes | None:
    # A model may have more embeddings than its tokenizer has pieces.
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else None


class ShownTokens:
    """Tells which tokens have been shown: those whose text was, at least in part.

    A token is known before its text, which may be held back for a stop string and then never come. End tokens and
    calls of tools have no text of their own, so they are never among these. The bytes of all together are the text's,
    unless a stop string cut the last one."""

    latest: Shown
    """The token that was taken last, whether or not it has been shown."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._begins = tokenizer.begins(prompt)
        self._detokenizer = tokenizer.detokenizer(prompt)
        self._made = self._shown = 0
        self._waiting: deque[tuple[int, Shown]] = deque()  # with where in the text they end
        self._forming: list[Shown] = []  # a character that is not whole yet

    def add(self, token: Token) -> list[Shown]:
        """Take a token, and the text that came with it; returns what is shown now."""
        data = _bytes(self._tokenizer, token.id)
        if data is None:  # It may end a character that never became whole.
            self._form(self._detokenizer.finish())
        text = self._detokenizer.add(token.id)
        lost_space = self._begins and data is not None and len(text.encode()) < len(data)
        self.latest = Shown(token, begins=lost_space)
        if data is not None or text:
            self._forming.append(self.latest)
            self._begins = False
        self._form(text)
        return self.show(token.text)

    def show(self, text: str) -> list[Shown]:
        """More text was shown."""
        self._shown += len(text)
        return self._taken(lambda start, end: end <= self._shown)

    def finish(self) -> list[Shown]:
        """The text has ended."""
        self._form(self._detokenizer.finish())
        return self._taken(lambda start, end: start < self._shown)

    def _form(self, text: str) -> None:
        if text:
            start, self._made = self._made, self._made + len(text)
            self._waiting += [(self._made, replace(shown, at=start)) for shown in self._forming]
            self._forming = []

    def _taken(self, is_shown: Callable[[int, int], bool]) -> list[Shown]:
        taken = []
        while self._waiting and is_shown(self._waiting[0][1].at, self._waiting[0][0]):
            taken.append(self._waiting.popleft()[1])
        return taken


def shown_tokens(tokenizer: Tokenizer, prompt: Sequence[int], result: Result) -> list[Shown]:
    """The tokens of a whole answer that were shown."""
    shown = ShownTokens(tokenizer, prompt)
    parts = zip(result.tokens, result.logprobs, result.top_logprobs, strict=True)
    for token, logprob, top in parts:
        shown.add(Token("", token, logprob, top))
    return [*shown.show(result.text), *shown.finish()]
