"""A request while it is answered: what was read and said so far, what goes into the next pass, and what came of it.

Knows one sequence only; which of them share a pass is the worker's business."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from ..borrowed import RotatingKVCache
from ..generate import Clock, Sampled, Sampler, Step, Text, Usage, end_tokens, new_caches
from . import request as events
from .batch import Part
from .drafting import Drafting, DraftModel
from .drafts import PassSeconds, Speculation
from .frozen import Kind
from .reply import Channel
from .request import Done, Embedding, PromptProgress, Request, Scores, Token
from .tools import ToolCallStream

if TYPE_CHECKING:
    from ..model import Model
    from ..prompt import Tokenizer
    from .blocks import Reading
    from .grammar import Grammar, Matcher

WINDOW_CHUNK_TOKENS = 256
"""A window is read so many tokens at a time, whatever else is in the pass: where it turns, its sums depend on that."""
_KEPT_AT_START = 4  # What a window never gives up, as mlx-lm's: the model leans on its first tokens.
_LOOK_BACK = 20  # So far penalties look, as mlx-lm's do.
_MOST_DRAFTED = 16
_FORBIDDEN = -1e9
_CUT = ("length", "cancelled")
"""Reasons for which a text ends where it would have gone on."""


class Answering:
    """One request on its way. The first `read` of its `tokens` are in its `cache`."""

    def __init__(
        self,
        request: Request,
        channel: Channel,
        limit: int,
        grammar: Future[Grammar] | None,
        passes: PassSeconds,
    ) -> None:
        self.request = request
        self.channel = channel
        self.limit = limit
        self.kind = Kind(request.kv_bits, request.max_kv)
        self.tokens = list(request.prompt)
        self.cache: list[Any] = []
        self.read = 0
        self.cached = 0
        self.finished = self.has_started = False
        self.readings: dict[Kind, Reading] = {}
        self.behind: Answering | None = None
        self._grammar = grammar
        self._passes = passes
        self._asked_at = time.perf_counter()
        self._queued_seconds = 0.0
        self._clock: Clock | None = None
        self._draft: list[int] = []
        self._speculation: Speculation | Drafting | None = None
        self._calls: ToolCallStream | None = None
        self._shown = 0
        self._forget_what_was_read()

    @property
    def place(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def is_reading(self) -> bool:
        """Whether tokens are still to be read before the next can be generated."""
        return self.read < self._to_be_read

    @property
    def _to_be_read(self) -> int:
        # The last token goes into the pass that says what follows it.
        return len(self.tokens) - (self.request.purpose != "embed")

    @property
    def findable(self) -> Sequence[int]:
        """The tokens of which a beginning may have been read before; its last one is left to be read in any case."""
        ends = {"answer": len(self.tokens), "score": self.request.scored_from, "embed": 0}
        return self.tokens[: ends[self.request.purpose]]

    @property
    def is_ready(self) -> bool:
        """Whether it could start: its grammar, if it has one, is compiled, or has failed to, and the disk has answered.

        That is so of its own `readings`, and of those of whom it waits `behind`."""
        on_disk = self.is_fetching or (self.behind and self.behind.is_fetching)
        return not on_disk and (self._grammar is None or self._grammar.done())

    @property
    def is_fetching(self) -> bool:
        """Whether what was read for its beginning, or for its draft model's, is on the way from disk."""
        return not all(reading.is_done for reading in list(self.readings.values()))

    def stop_fetching(self) -> None:
        """Let go of what comes from disk, whether it has come or not."""
        readings, self.readings = self.readings, {}
        for reading in readings.values():
            reading.cancel()

    @property
    def most_tokens(self) -> int:
        """Tokens its cache may come to hold."""
        most = len(self.request.prompt) + self.limit
        return min(most, self.request.max_kv + WINDOW_CHUNK_TOKENS) if self.request.max_kv else most

    def start(self, model: Model, tokenizer: Tokenizer, draft: DraftModel | None) -> None:
        """Make ready what generating needs; raises what compiling its grammar did."""
        request, ends = self.request, end_tokens(model, tokenizer)
        sampling = request.sampling
        banned = dict.fromkeys(request.rules.banned_tokens, _FORBIDDEN)
        self._matcher: Matcher | None = self._grammar.result().matcher() if self._grammar else None
        self._sampler = Sampler(
            replace(sampling, logit_bias={**sampling.logit_bias, **banned}) if banned else sampling,
            model.args.vocab_size,
            ends,
        )
        self._ends = sorted(ends)
        self._text = Text(tokenizer, request.prompt, sampling, self.limit, ends)
        self._speculation = self._speculating(draft)
        self._queued_seconds = time.perf_counter() - self._asked_at
        self.has_started = True

    def begin_reading(self, model: Model, found: tuple[int, list[Any]] | None) -> None:
        """Start at the beginning of the tokens, or where what was `found` of them ends."""
        self.read, self.cache = found or (0, _new_caches(model, self.request))
        if self._clock is None:
            self.cached = min(self.read, len(self.request.prompt) - 1)
            self._clock = Clock(len(self.request.prompt), self.cached)
            self._report(self.read)
            if self.request.echo:
                self.channel.put(events.Text(self.request.echo))

    def _speculating(self, draft: DraftModel | None) -> Speculation | Drafting | None:
        if self.request.speculate == "draft":
            assert draft
            return Drafting(draft, self.tokens, self._passes)
        return Speculation(self.tokens, self._passes) if self.request.speculate else None

    @property
    def drafting(self) -> Drafting | None:
        """Its share of the draft model, if it uses that."""
        return self._speculation if isinstance(self._speculation, Drafting) else None

    def pause(self) -> None:
        """Give up the cache; the tokens are read again when there is room."""
        self.cache, self.read = [], 0
        self._forget_what_was_read()
        if self.drafting:
            self.drafting.let_go()

    def _forget_what_was_read(self) -> None:
        self._hidden = np.zeros(1)
        self._logprobs: list[float] = []
        self._is_likeliest: list[bool] = []

    def let_go(self) -> None:
        """Hold on to nothing of the model's any more: what has ended may be kept for as long as its reader likes."""
        self.cache, self._speculation = [], None

    # What goes into a pass.

    def to_read(self, most: int) -> Part:
        """The next tokens to be read, `most` at most, or as many as a window always takes."""
        most = WINDOW_CHUNK_TOKENS if self.request.max_kv else most
        end = min(self.read + most, self._to_be_read)
        ids, wanted = self.tokens[self.read : end], 0
        if self.request.purpose == "score":
            wanted = max(end - max(self.read, self.request.scored_from - 1), 0)
        elif self.request.purpose == "embed":
            wanted = len(ids)
        return Part(ids, self.cache, wanted, hidden=self.request.purpose == "embed")

    def to_decode(self, most_drafted: int, other_rows: int) -> Part:
        """The last token, and guesses at what follows it, which the same pass checks.

        `most_drafted` is how many tokens may be guessed from the text; what a grammar leaves no choice about comes
        in any case. The pass has `other_rows` of other sequences."""
        self._draft = self._guessed(most_drafted, other_rows)
        guesses = len(self._draft)
        return Part([self.tokens[-1], *self._draft], self.cache, 1 + guesses, guesses=guesses)

    def _guessed(self, most_drafted: int, other_rows: int) -> list[int]:
        if self.request.max_kv:
            return []  # A window that has turned cannot take tokens back, not even one that a grammar was sure of.
        most = self._most_drafted
        guess = self._matcher.forced()[:most] if self._matcher else []
        if not guess and self._speculation:
            guess = self._speculation.draft(min(most, most_drafted), other_rows)
        return guess[: self._matcher.valid(guess)] if guess and self._matcher else guess

    @property
    def _most_drafted(self) -> int:
        return min(_MOST_DRAFTED, self.limit - self.place - 1)

    def to_run_ahead(self, chosen: Sequence[Sampled], other_rows: int = 0) -> Part | None:
        """The token of `chosen`, which nobody has seen yet, for the pass after that; None where it has to be seen."""
        seen = (
            self.is_reading
            or self.request.max_kv  # A window that has turned cannot take it back.
            or self._matcher
            or (self._speculation and self._speculation.would_draft(self._most_drafted, other_rows))
            or self.limit - self.place < 2
        )
        return None if seen or len(chosen) != 1 else Part(chosen[0][0], self.cache, 1)

    # What comes of it.

    def results(self, part: Part, rows: mx.array, *, ahead: bool = False) -> list[Sampled]:
        """What the pass says of `part`, (wanted, V) or (wanted, D) → what is wanted of it, not evaluated yet.

        `ahead` is whether nobody has seen the ids of `part` yet."""
        if not len(rows):
            return []
        if not self.is_reading:
            return self.sample(rows, cast(mx.array, part.ids) if ahead else None)
        if self.request.purpose == "embed":
            return [(rows.astype(mx.float32).sum(axis=0),)]
        end = self.read + len(part.ids)
        targets = mx.array(self.tokens[end + 1 - len(rows) : end + 1])
        logits = rows.astype(mx.float32)
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return [(chosen - mx.logsumexp(logits, axis=-1), mx.argmax(logits, axis=-1) == targets)]

    def has_read(self, count: int, results: Sequence[Sampled]) -> None:
        """So many tokens more are in the cache, with what was wanted of them."""
        self.read += count
        if self.place == 0:
            self._report(self.read)
        for result in results:
            if self.request.purpose == "score":
                logprobs, is_likeliest = (cast(list[Any], array.tolist()) for array in result)
                self._logprobs += logprobs
                self._is_likeliest += is_likeliest
            else:
                self._hidden = self._hidden + np.array(result[0], np.float64)
        if self.request.purpose != "answer" and not self.is_reading:
            self.channel.put(self._came_of_reading())
            self.finish("stop")

    def _came_of_reading(self) -> Scores | Embedding:
        if self.request.purpose == "score":
            return Scores(tuple(self._logprobs), tuple(self._is_likeliest))
        return Embedding(tuple((self._hidden / len(self.tokens)).tolist()))

    def sample(self, logits: mx.array, unseen: mx.array | None = None) -> list[Sampled]:
        """logits (1 + guesses, V) → what comes after the last token, and after each guess if it were right.

        The last token may be one that is still being computed, `unseen` (1,)."""
        place = self.place + (unseen is not None)
        return [
            self._sampler.sample(logits[n : n + 1], place + n, self._before(n, unseen), allowed)
            for n, allowed in enumerate(self._allowed())
        ]

    def _before(self, guesses: int, unseen: mx.array | None) -> mx.array:
        if not self._sampler.processors:
            return mx.array([], mx.uint32)
        before = mx.array([*self.tokens[-_LOOK_BACK:], *self._draft[:guesses]], mx.uint32)
        return before if unseen is None else mx.concatenate([before, unseen])

    def _allowed(self) -> list[mx.array | None]:
        """For each place the tokens that may come there, or None where all may."""
        if self._matcher is None:
            return [None] * (1 + len(self._draft))
        masks = [self._mask(self._matcher, self.place)]
        for n, token in enumerate(self._draft, 1):
            self._matcher.advance(token)
            masks.append(self._mask(self._matcher, self.place + n))
        self._matcher.rollback(len(self._draft))
        return [mx.array(mask) for mask in masks]

    def _mask(self, matcher: Matcher, place: int) -> np.ndarray:
        """What the grammar allows; no end before `min_tokens` unless nothing else may come."""
        mask = matcher.mask()
        if place < self.request.sampling.min_tokens:
            longer = mask.copy()
            longer[self._ends] = False
            return longer if longer.any() else mask
        return mask

    def take(self, steps: Sequence[Step]) -> int:
        """Say the tokens up to the first that was not guessed; returns how many. The cache keeps what was right."""
        said = 0
        for step, guess in zip(steps, [*self._draft, None], strict=True):
            said += 1
            if not self._say(step) or step.token != guess:
                break
        if surplus := len(steps) - said:
            for layer in self.cache:
                layer.trim(surplus)
        self.read = len(self.tokens) - 1
        if self._speculation:
            self._speculation.add(self.tokens[-said:])
        return said

    def _say(self, step: Step) -> bool:
        """Put a token out; whether another may follow."""
        assert self._clock
        self._clock.tick()
        if self.place == 0:
            self._report(len(self.request.prompt))
        self.tokens.append(step.token)
        text, reason = self._text.add(step.token)
        if self._matcher and not reason:
            self._matcher.advance(step.token)
            if self._matcher.must_end:
                text, reason = text + self._text.rest(), "stop"
        self.channel.put(Token(self._apart(text, reason), step.token, step.logprob, step.top_logprobs))
        if reason:
            called = reason == "stop" and self._calls and self._calls.calls
            self.finish("tool_calls" if called else reason, self._text.stops.hit)
        return reason is None

    def _apart(self, text: str, reason: str | None) -> str:
        """The part of `text`, which is the last if there is a `reason`, that is no tool call; calls are put out by
        themselves."""
        start = self._text.detokenizer.tool_calls_at if self.request.rules.tools else None
        before = len(text) if start is None else max(start - self._shown, 0)
        self._shown += len(text)
        if start is None:
            return text
        self._calls = self._calls or ToolCallStream()
        found = self._calls.feed(text[before:])
        if reason:
            found += self._calls.finish(cut=reason in _CUT)
        for delta in found:
            if not isinstance(delta, str):
                self.channel.put(delta)
        return text[:before] + "".join(part for part in found if isinstance(part, str))

    # How it ends.

    def finish(self, reason: str, stop_text: str = "") -> None:
        """Say that it has ended, and with which stop string, if with one."""
        self.stop_fetching()
        self.finished = True
        cut_call = self._calls.begun if self._calls and reason in _CUT else None
        self.channel.put(Done(reason, self.usage(), self._queued_seconds, stop_text, cut_call))

    def cancel(self) -> None:
        """End it as its reader asked, with the text that was held back."""
        if self.has_started and (rest := self._apart(self._text.rest(), "cancelled")):
            self.channel.put(events.Text(rest))
        self.finish("cancelled")

    def fail(self, error: BaseException) -> None:
        """End it with an error."""
        self.stop_fetching()
        self.finished = True
        self.channel.put(error)

    def usage(self) -> Usage:
        """Tokens so far and the time they took."""
        return (self._clock or Clock(len(self.request.prompt), 0)).usage(self.place)

    def _report(self, done: int) -> None:
        self.channel.put(PromptProgress(done, len(self.request.prompt), self.cached))


def _new_caches(model: Model, request: Request) -> list[Any]:
    """An empty cache for each layer, of the kind that was asked for."""
    if request.max_kv:
        return [RotatingKVCache(request.max_kv, keep=_KEPT_AT_START) for _ in model.layers]
    return new_caches(model.args, request.kv_bits)
