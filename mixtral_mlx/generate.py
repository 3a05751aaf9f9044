"""One prompt → a stream of chunks, plainly: read the prompt, then sample token after token.

The readable path, which cleverer ones are tested against. Samplers, penalties and caches are mlx-lm's. Several prompts
at once, queues and threads are left to others; use a model on the thread that loaded it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from .borrowed import KVCache, QuantizedKVCache, make_logits_processors, make_sampler
from .budget import CHUNK_TOKENS
from .config import MixtralError

if TYPE_CHECKING:
    from .config import Config
    from .model import Model
    from .prompt import Tokenizer

_CLEAR_CACHE_EVERY = 256


class GenerateError(MixtralError):
    """A request that cannot be generated: impossible settings, or a prompt that is empty or too long."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to stop. A `temperature` or a `top_p` of 0 takes the likeliest token each time.

    The three penalties look back over the last 20 tokens, as mlx-lm's do. `max_tokens` of None means up to the end of
    the context; before `min_tokens` the model cannot end, though a stop string may. Raises `GenerateError` for values
    that cannot be."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, kind, low, high in _RANGES:
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not (is_number(value, kind) and low <= value <= high):  # Also refuses NaN.
                what = "a whole number" if kind is int else "a number"
                raise _impossible(name, value, f"{what} from {low:g} to {high:g}")
        if self.repetition_penalty == 0:
            raise _impossible("repetition_penalty", 0, "above 0")
        if not isinstance(self.stop, tuple | list) or not all(text and isinstance(text, str) for text in self.stop):
            raise _impossible("stop", self.stop, "texts of at least one character")
        if not isinstance(self.logit_bias, Mapping):
            raise _impossible("logit_bias", self.logit_bias, "token ids with a number for each")
        for token, bias in self.logit_bias.items():
            if not (is_number(token, int) and token >= 0 and is_number(bias, float) and abs(bias) <= _MOST_BIAS):
                raise _impossible("logit_bias", {token: bias}, "token ids with finite numbers")
        if not isinstance(self.ignore_eos, bool):
            raise _impossible("ignore_eos", self.ignore_eos, "True or False")


_RANGES: tuple[tuple[str, type[int | float], float, float], ...] = (
    ("temperature", float, 0, 100),
    ("top_p", float, 0, 1),
    ("top_k", int, 0, 1 << 20),
    ("min_p", float, 0, 1),
    ("seed", int, 0, (1 << 64) - 1),
    ("repetition_penalty", float, 0, 100),
    ("presence_penalty", float, -100, 100),
    ("frequency_penalty", float, -100, 100),
    ("max_tokens", int, 1, 1 << 31),
    ("min_tokens", int, 0, 1 << 31),
    ("top_logprobs", int, 0, 100),
)
_MAY_BE_NONE = ("seed", "max_tokens")
_NO_TEMPERATURE = 1e-6
_MOST_BIAS = 1e38  # What a float32 can still be added to.


def is_number(value: object, kind: type[int | float]) -> bool:
    """Whether `value` is a number, a whole one where `kind` is int; True and False are none."""
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Usage:
    """Tokens so far and the time they took. `cached_tokens` of the prompt were still in the cache from before."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_seconds: float
    generation_seconds: float

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens read per second."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.prompt_seconds, 1e-9)

    @property
    def generation_tps(self) -> float:
        """Tokens generated per second after the first, whose time is the prompt's."""
        return max(self.completion_tokens - 1, 0) / max(self.generation_seconds, 1e-9)


@dataclass(frozen=True)
class Chunk:
    """What one step brought. `text` may be empty while a character or a stop string is incomplete.

    The last chunk, and only it, has a `finish_reason`: "stop" (the model ended, or a stop string came), "length"
    (`max_tokens` or the context is used up) or "cancelled" (then `token` is None). `token` may be the end token."""

    text: str
    token: int | None
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: str | None
    usage: Usage


class Conversation:
    """A KV cache and the ids in it, for consecutive prompts: what a new one has in common is not read again.

    `kv_bits` (4 or 8) quantizes the cache. `context` is the most tokens it may hold; the model's own limit if None.
    A prompt is read `chunk_tokens` at a time: more need more memory, and fewer more reading where experts stream."""

    def __init__(
        self,
        model: Model,
        *,
        kv_bits: int | None = None,
        context: int | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        longest = model.args.max_position_embeddings
        check_kv_bits(model.args, kv_bits)
        if context is not None and not 2 <= context <= longest:
            raise _impossible("context", context, f"from 2 to {longest}, what this model was made for")
        self.model = model
        self.kv_bits = kv_bits
        self.context = context or longest
        self.chunk_tokens = chunk_tokens
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.tokens: list[int] = []
        self.cache = new_caches(self.model.args, self.kv_bits)

    @property
    def nbytes(self) -> int:
        """Bytes the cache takes."""
        return sum(layer.nbytes for layer in self.cache)

    def resume(self, prompt: Sequence[int]) -> int:
        """Keep the longest common beginning with `prompt`, less its last token; returns its length in tokens."""
        # An interrupted step may have reached some layers only.
        keep = min([len(prompt) - 1, *(layer.offset for layer in self.cache)])
        for n, (held, token) in enumerate(zip(self.tokens, prompt, strict=False)):
            if held != token:
                keep = min(keep, n)
                break
        keep = min(keep, len(self.tokens))
        for layer in self.cache:
            layer.trim(layer.offset - keep)
        del self.tokens[keep:]
        return keep


def stream_generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling = Sampling(),
    *,
    conversation: Conversation | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[Chunk]:
    """Continue the ids `prompt`, yielding a `Chunk` per token as it comes.

    The prompt is read in chunks; `on_prompt(done, total)` is called after each. `cancelled` is asked
    between chunks and between tokens. Dropping the iterator stops as well. Raises `GenerateError` at once."""
    conversation = conversation or Conversation(model)
    room = room_after(prompt, model.args.vocab_size, conversation.context)
    limit = min(room, sampling.max_tokens or room)
    return _chunks(
        model,
        tokenizer,
        list(prompt),
        sampling,
        limit,
        conversation,
        on_prompt or _ignore,
        cancelled or _never,
    )


def room_after(prompt: Sequence[int], vocab_size: int, context: int, *, least: int = 1) -> int:
    """How many tokens may follow the ids `prompt`; raises `GenerateError` for fewer than `least`, or for no prompt."""
    if not prompt:
        raise GenerateError("The prompt is empty.", code="empty_prompt", hint="Give at least one token.")
    if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
        raise GenerateError(
            f"The prompt holds id {wrong[0]}, expected ids from 0 to {vocab_size - 1}.",
            code="bad_token",
        )
    room = context - len(prompt)
    if room < least:
        raise GenerateError(
            f"The prompt is {len(prompt):,} tokens long and the context holds {context:,}.",
            code="context_full",
            hint="Shorten the prompt, or drop the oldest turns.",
        )
    return room


def new_caches(config: Config, kv_bits: int | None) -> list[Any]:
    """An empty cache for each layer, quantized if `kv_bits` says so."""
    if not kv_bits:
        return [KVCache() for _ in range(config.num_hidden_layers)]
    group = 64 if config.head_dim % 64 == 0 else 32
    return [QuantizedKVCache(group, kv_bits) for _ in range(config.num_hidden_layers)]


def check_kv_bits(config: Config, kv_bits: int | None) -> None:
    """Raise `GenerateError` if keys and values cannot be held in `kv_bits`."""
    if kv_bits is not None and not (is_number(kv_bits, int) and kv_bits in (4, 8)):
        raise _impossible("kv_bits", kv_bits, "4 or 8")
    if kv_bits and config.head_dim % 32:
        raise _impossible("kv_bits", kv_bits, f"none: heads {config.head_dim} wide cannot be quantized")


def _chunks(
    model: Model,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: Sampling,
    limit: int,
    conversation: Conversation,
    on_prompt: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> Iterator[Chunk]:
    clock = Clock(len(prompt), conversation.resume(prompt))
    ends = end_tokens(model, tokenizer)
    text, count = Text(tokenizer, prompt, sampling, limit, ends), 0
    for step in _steps(model, prompt, sampling, ends, limit, conversation, on_prompt, cancelled):
        clock.tick()
        count += 1
        shown, reason = text.add(step.token)
        yield Chunk(shown, step.token, step.logprob, step.top_logprobs, reason, clock.usage(count))
        if reason:
            return
    yield Chunk(text.rest(), None, None, (), "cancelled", clock.usage(count))


def end_tokens(model: Model, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids with which the model ends a text."""
    return frozenset((*model.args.eos_token_ids, tokenizer.eos_id))


class Text:
    """Generated ids → the text that can be shown, and why it ends."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling, limit: int, ends: Collection[int]
    ) -> None:
        self.detokenizer = tokenizer.detokenizer(prompt)
        self.stops = StopStrings(sampling.stop)
        self.ends = () if sampling.ignore_eos else ends
        self.left = limit

    def add(self, token: int) -> tuple[str, str | None]:
        """The text that `token` completes, and the reason if it was the last: "stop" or "length"."""
        self.left -= 1
        ended = token in self.ends
        text = self.stops.feed(self.detokenizer.finish() if ended else self.detokenizer.add(token))
        reason = "stop" if ended or self.stops.hit else "length" if self.left <= 0 else None
        if reason == "length":
            text += self.stops.feed(self.detokenizer.finish())
            reason = "stop" if self.stops.hit else reason
        return text + (self.stops.rest() if reason else ""), reason

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        return self.stops.feed(self.detokenizer.finish()) + self.stops.rest()


@dataclass(frozen=True)
class Step:
    """A token the model chose, its log probability, and the likeliest ids with theirs."""

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


def _steps(
    model: Model,
    prompt: list[int],
    sampling: Sampling,
    ends: Collection[int],
    limit: int,
    conversation: Conversation,
    on_prompt: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> Iterator[Step]:
    """Up to `limit` tokens after `prompt`; fewer when cancelled."""
    sampler = _Following(Sampler(sampling, model.args.vocab_size, ends), prompt)
    try:
        if not _read_prompt(model, prompt, conversation, on_prompt, cancelled):
            return
        current = sampler.sample(model(mx.array([prompt[-1:]]), conversation.cache))
        mx.async_eval(current)
        conversation.tokens = list(prompt)
        for n in range(1, limit + 1):
            following = None
            if n < limit and model.runs_ahead:
                # The next step is under way while this one's token is looked at.
                following = _launched(model, current, conversation, sampler)
            step = taken(current)
            if following is not None:
                conversation.tokens.append(step.token)
            if n == 1:
                on_prompt(len(prompt), len(prompt))
            if cancelled():
                return
            yield step
            if n == limit:
                return
            if following is None:
                following = _launched(model, current, conversation, sampler)
                conversation.tokens.append(step.token)
            current = following
            if n % _CLEAR_CACHE_EVERY == 0:
                mx.clear_cache()
    except (RuntimeError, MemoryError):
        conversation.clear()  # What the cache holds is unknown now.
        raise


def _launched(model: Model, current: Sampled, conversation: Conversation, sampler: _Following) -> Sampled:
    """The step after `current`, begun."""
    following = sampler.sample(model(current[0][None], conversation.cache))
    mx.async_eval(following)
    return following


def _read_prompt(
    model: Model,
    prompt: list[int],
    conversation: Conversation,
    on_prompt: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> bool:
    """Bring all of `prompt` but its last token into the cache; False when cancelled."""
    done = len(conversation.tokens)
    on_prompt(done, len(prompt))
    while done < len(prompt) - 1:
        if cancelled():
            return False
        chunk = prompt[done : min(done + conversation.chunk_tokens, len(prompt) - 1)]
        # Only the cache is asked for: logits are for the last token alone.
        model.model.read(mx.array([chunk]), conversation.cache)
        mx.eval([layer.state for layer in conversation.cache])
        done += len(chunk)
        conversation.tokens = prompt[:done]
        on_prompt(done, len(prompt))
        mx.clear_cache()
    return not cancelled()


Sampled = tuple[mx.array, ...]
"""Token (1,), its logprob (1,), and where asked for the ids and logprobs of the likeliest (K,)."""


class Sampler:
    """Logits → the next token, on the device, without waiting for it. Keeps nothing between tokens."""

    def __init__(self, sampling: Sampling, vocab_size: int, ends: Collection[int] = ()) -> None:
        self.seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self.num_top = min(sampling.top_logprobs, vocab_size - 1)
        self.choose = make_sampler(
            # A top_p of 0, which mlx-lm takes for none, leaves the likeliest token alone; so does a temperature by
            # which no float32 can be divided.
            temp=sampling.temperature if sampling.top_p and sampling.temperature > _NO_TEMPERATURE else 0.0,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            top_k=sampling.top_k if sampling.top_k < vocab_size else 0,
        )
        self.processors = make_logits_processors(
            logit_bias={token: float(bias) for token, bias in sampling.logit_bias.items() if token < vocab_size},
            repetition_penalty=sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
            presence_penalty=sampling.presence_penalty or None,
            frequency_penalty=sampling.frequency_penalty or None,
        )
        self.min_tokens = sampling.min_tokens
        self.is_end = mx.array([token in ends for token in range(vocab_size)]) if sampling.min_tokens else None

    def sample(self, logits: mx.array, place: int, before: mx.array, allowed: mx.array | None = None) -> Sampled:
        """logits (1, V) → the token at `place` of the text, counted from 0.

        `before` are ids before it, at least the last 20; they matter where there are penalties. `allowed` (V,) says
        which tokens may come there, whatever `min_tokens` says."""
        logits = logits.astype(mx.float32)
        for process in self.processors:
            logits = process(before, logits)
        if allowed is not None:
            logits = mx.where(allowed, logits, -mx.inf)
        elif self.is_end is not None and place < self.min_tokens:
            logits = mx.where(self.is_end, -mx.inf, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        # Seeding each draw by its place makes a text depend on its seed alone, whatever else draws in between.
        mx.random.seed((self.seed + place * 0x9E3779B97F4A7C15) % (1 << 64))
        token = self.choose(logprobs)  # (1,)
        chosen = mx.take_along_axis(logprobs[0], token, axis=0)
        if not self.num_top:
            return token, chosen
        top = mx.argpartition(-logprobs[0], kth=self.num_top - 1)[: self.num_top]  # Few of many: no need to sort all.
        top = top[mx.argsort(-logprobs[0][top])]
        return token, chosen, top, logprobs[0][top]


class _Following:
    """Samples one token after the other behind a prompt."""

    def __init__(self, sampler: Sampler, prompt: list[int]) -> None:
        self.sampler = sampler
        self.tokens = mx.array(prompt)
        self.place = 0

    def sample(self, logits: mx.array) -> Sampled:
        """logits (1, T, V) → what comes after the last of them."""
        sampled = self.sampler.sample(logits[:, -1, :], self.place, self.tokens)
        self.place += 1
        if self.sampler.processors:
            self.tokens = mx.concatenate([self.tokens, sampled[0]])
        return sampled


def taken(sampled: Sampled) -> Step:
    """Wait for a token's arrays and take them to Python."""
    token, logprob, *top = (cast(list[Any], array.tolist()) for array in sampled)
    return Step(token[0], logprob[0], tuple(zip(*top, strict=True)))


class StopStrings:
    """Ends a text where the first of several strings to be complete begins, however the text is cut into parts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.hit = ""
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        """Add `text`; returns what can be shown for certain. After a stop string, nothing more."""
        if self.hit:
            return ""
        self.held += text
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            _, start, self.hit = min(found)
            shown, self.held = self.held[:start], ""
            return shown
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def rest(self) -> str:
        """What was held back, when the text has ended and no stop string came of it."""
        rest, self.held = self.held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Clock:
    """Divides the time of a request into reading the prompt and generating."""

    def __init__(self, prompt_tokens: int, cached_tokens: int) -> None:
        self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens
        self.start = time.perf_counter()
        self.first: float | None = None

    def tick(self) -> None:
        if self.first is None:
            self.first = time.perf_counter()

    def usage(self, completion_tokens: int) -> Usage:
        now = time.perf_counter()
        first = now if self.first is None else self.first
        return Usage(self.prompt_tokens, self.cached_tokens, completion_tokens, first - self.start, now - first)


def _impossible(name: str, value: object, expected: str) -> GenerateError:
    return GenerateError(f"{name} is {value!r}, expected {expected}.", code="bad_sampling")


def _ignore(done: int, total: int) -> None:
    pass


def _never() -> bool:
    return False
