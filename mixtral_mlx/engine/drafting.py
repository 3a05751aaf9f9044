"""A small model beside the large one, which guesses what that will say; its guesses are checked as copied ones are.

What it may cost is bounded the same way: its own time counts, and where it does not pay it is left alone but for a try
now and then. Lives on the engine's thread."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import cpu
from ..borrowed import KVCache
from ..budget import Footprint, Plan, fit
from ..config import Config, MixtralError, read_json, shown
from ..memory import activation_dtype, default_budget, machine
from ..prompt import Tokenizer
from ..weights import MLX_DTYPES, Checkpoint, Tensor, dtypes_for, footprint, opened_file, read_header
from ..weights import load as load_weights
from .blocks import fingerprint
from .drafts import DraftLength, PassSeconds
from .frozen import Kind

_MOST_UNREAD = 256
"""How far behind the text it may be and still guess; beyond that, reading what it missed would hold up others."""
_SURENESS = 16
_LONGEST_WAIT = 64
_NEWEST_SHARE = 0.1
_USUAL_AT_FIRST = 0.6
_PRIOR_CHANCES = [min(max(sure / _SURENESS, 0.05), 0.95) for sure in range(_SURENESS + 1)]


class DraftError(MixtralError):
    """A draft model that cannot be used, or not with this model."""


@dataclass
class DraftCounts:
    """What a draft model did: how many tokens it guessed, those that were right, and answers it failed in."""

    guessed_tokens: int = 0
    right_tokens: int = 0
    failures: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class DraftFolder:
    """A checked folder of a draft model, of which nothing was read into memory yet.

    `config` is a Mixtral's, or a Mistral's put as that of a Mixtral with one expert."""

    folder: Path
    config: Config
    is_mixtral: bool
    dtype: str
    nbytes: int

    @classmethod
    def open(cls, folder: Path, dtype: str, tokenizer: Tokenizer, vocab_size: int) -> DraftFolder:
        """Check the folder against the model it is to guess for; raises `MixtralError`."""
        raw = read_json(folder / "config.json")
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        if kind == "mixtral":
            checkpoint = Checkpoint.open(folder)
            target, cast_to = dtypes_for(dtype, checkpoint)
            found = cls(folder, checkpoint.config, True, target, checkpoint.nbytes_as(cast_to))
        elif kind == "mistral":
            # All that is checked of the one's numbers holds of the other's.
            config = Config.from_dict(
                {**raw, "model_type": "mixtral", "num_local_experts": 1, "num_experts_per_tok": 1},
                source=str(folder / "config.json"),
            )
            target = "float32" if cpu.is_backend() else activation_dtype(dtype, config.dtype)
            found = cls(folder, config, False, target, sum(t.nbytes_as(target) for t in _tensors(folder)))
        else:
            raise DraftError(
                f"The draft model in {folder} is a {shown(kind)}, expected 'mistral' or 'mixtral'.", code="bad_draft"
            )
        _check_vocabulary(found, tokenizer, vocab_size)
        return found

    @property
    def footprint(self) -> Footprint:
        return Footprint.of(self.config, self.dtype)

    @property
    def kind(self) -> Kind:
        """What tells its keys and values from the large model's, and from those of other drafts."""
        return Kind(adapter=f"draft {fingerprint(self.folder, self.dtype)}")

    def plan(self, folder: Path, *, dtype: str, memory: int | None, context: int | None, kv_bits: int | None) -> Plan:
        """A plan for the model in `folder` with this draft beside it, whose keys and values grow with every token's."""
        checkpoint = Checkpoint.open(folder)
        target, cast_to = dtypes_for(dtype, checkpoint)
        alone = footprint(checkpoint, target, cast_to, kv_bits)
        both = replace(
            alone,
            dense_bytes=alone.dense_bytes + self.nbytes,
            kv_bytes_per_token=alone.kv_bytes_per_token + self.footprint.kv_bytes_per_token,
        )
        return fit(both, default_budget(machine(ask_metal=True)) if memory is None else memory, context=context)

    def load(self) -> DraftModel:
        """Bring it into memory and run it once; raises `MixtralError`."""
        model = self._mixtral() if self.is_mixtral else self._mistral()
        draft = DraftModel(model, self)
        draft.warm_up()
        return draft

    def _mixtral(self) -> Any:
        whole = fit(self.footprint, 1 << 50)
        return load_weights(self.folder, dtype=self.dtype, memory=whole).model

    def _mistral(self) -> Any:
        # Here, since it brings transformers, which takes seconds and nothing else needs.
        from mlx_lm.utils import load_model

        try:
            model, _ = load_model(self.folder, lazy=True)
            model.set_dtype(getattr(mx, self.dtype))
            mx.eval(model.parameters())
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise DraftError(f"The draft model in {self.folder} cannot be loaded: {reason}", code="bad_draft") from None
        return model


class DraftModel:
    """A draft model in memory."""

    def __init__(self, model: Any, folder: DraftFolder) -> None:
        config = folder.config
        self.context = config.max_position_embeddings
        self.kind = folder.kind
        self.nbytes: int = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        self.passes = PassSeconds(config.num_local_experts, config.num_experts_per_tok)
        self.counts = DraftCounts()
        self._model = model
        self._footprint = folder.footprint

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of a text of so many tokens."""
        return self._footprint.kv_bytes(tokens)

    def new_cache(self) -> list[Any]:
        """Caches for a text that begins."""
        return [KVCache() for _ in self._model.layers]

    def read(self, ids: Sequence[int], cache: Sequence[Any]) -> None:
        """Put tokens into a cache."""
        self._model.model(mx.array([list(ids)]), cache)
        mx.eval([layer.state for layer in cache])

    def guess(self, ids: Sequence[int], cache: Sequence[Any]) -> tuple[int, float, float]:
        """Read tokens; the likeliest next one, its probability, and the seconds that took."""
        begun = time.perf_counter()
        hidden = self._model.model(mx.array([list(ids)]), cache)
        logits = self._logits(hidden[:, -1:])[0, 0].astype(mx.float32)
        token = mx.argmax(logits)
        probability = mx.exp(logits[token] - mx.logsumexp(logits))
        mx.eval(token, probability)
        seconds = time.perf_counter() - begun
        self.passes.learn(len(ids), seconds)
        self.counts.seconds += seconds
        return cast(int, token.item()), cast(float, probability.item()), seconds

    def warm_up(self) -> None:
        """Know how long a guess takes before the first is wanted."""
        cache = self.new_cache()
        self.guess([1], cache)  # Compiles kernels.
        self.passes = PassSeconds(self.passes.num_experts, self.passes.experts_per_token)
        self.guess([1], cache)
        self.counts = DraftCounts()

    def _logits(self, hidden: mx.array) -> mx.array:
        if "lm_head" in self._model:
            return self._model.lm_head(hidden)
        return self._model.model.embed_tokens.as_linear(hidden)


class Drafting:
    """One sequence's guesses by a draft model, as many as pay; used as `Speculation` is.

    Its cache holds the first `read` of the sequence's tokens, and then guesses that may turn out wrong."""

    def __init__(self, model: DraftModel, tokens: Iterable[int], passes: PassSeconds) -> None:
        self.model = model
        self.length = DraftLength(passes, _PRIOR_CHANCES)
        self.tokens = list(tokens)
        self.read = 0
        self.cache: list[Any] = []
        self._passes = passes
        self._to_be_read = 0
        self._beyond: list[int] = []
        self._guesses: list[tuple[int, int]] = []
        self._spent = 0.0
        self._usual = _USUAL_AT_FIRST
        self._wait = self._waits = 0
        self._has_failed = False
        self.resume(None)

    # Reading.

    @property
    def is_behind(self) -> bool:
        """Whether it has still to read what was there when the answer began, or was taken up again."""
        return self.read < self._to_be_read and not self._has_failed

    def read_on(self, most: int) -> None:
        """Read the next tokens, `most` at most."""
        end = min(self.read + most, self._to_be_read)
        try:
            self.model.read(self.tokens[self.read : end], self.cache)
        except Exception:
            self._fail()
        self.read = end

    def resume(self, found: tuple[int, list[Any]] | None) -> None:
        """Begin anew, behind what was `found` of the text."""
        self.read, self.cache = found or (0, self.model.new_cache())
        self._beyond, self._guesses = [], []
        self._to_be_read = len(self.tokens) - 1

    def let_go(self) -> None:
        """Give up the cache; `resume` begins it again."""
        self.cache, self.read, self._beyond = [], 0, []

    def forget_guesses(self) -> None:
        """Take out of the cache what the text did not say."""
        held, self._beyond = self._beyond, []
        right = 0
        for guess, token in zip(held, self.tokens[self.read : -1], strict=False):
            if guess != token:
                break
            right += 1
        if surplus := len(held) - right:
            for layer in self.cache:
                layer.trim(surplus)
        self.read += right

    # Guessing.

    def draft(self, most: int, other_rows: int = 0) -> list[int]:
        """Up to `most` tokens to append to this sequence's row, in a pass with `other_rows` of other sequences'."""
        self._guesses, self._spent = [], 0.0
        if not self._can_guess(most):
            return []
        try:
            return self._draft(most, other_rows)
        except Exception:  # The answer can do without.
            self._fail()
            return []

    def add(self, tokens: Iterable[int]) -> None:
        """Add what a pass brought: the tokens of the draft that were right, and the one sampled after them."""
        tokens = list(tokens)
        for (guess, sure), token in zip(self._guesses, tokens, strict=False):
            right = guess == token
            self.length.learn(sure, right)
            self._usual += _NEWEST_SHARE * (right - self._usual)
            self.model.counts.right_tokens += right
            if not right:
                break
        self._count_wait(tokens)
        self.tokens += tokens
        self.length.settle(len(tokens), self._spent)
        self._guesses, self._spent = [], 0.0

    def _can_guess(self, most: int) -> bool:
        return not (
            most <= 0
            or self._has_failed
            or self.is_behind
            or len(self.tokens) - self.read > _MOST_UNREAD
            or len(self.tokens) + most > self.model.context
            or not self._passes.is_measured
        )

    def _draft(self, most: int, other_rows: int) -> list[int]:
        self.forget_guesses()
        chances: list[float] = []
        while len(chances) < most and self._another_pays(chances, most, other_rows):
            chances.append(self.length.chance(self._guess()))
        drafted = self.length.best(chances, other_rows, lambda _: self._spent)
        return [token for token, _ in self._guesses[:drafted]]

    def _another_pays(self, chances: Sequence[float], most: int, other_rows: int) -> bool:
        to_come = [self._usual] * (most - len(chances))
        planned = self.length.best([*chances, *to_come], other_rows, self._guessing)
        if planned > len(chances):
            return True
        # What was never tried is never learned, so now and then one is, where it could be checked as well.
        return not chances and self._waits <= 0 and self.length.can_afford(1, other_rows, self._guessing)

    def _guessing(self, drafted: int) -> float:
        """Seconds spent for this pass when so many guesses have been made."""
        more = drafted - len(self._guesses)
        if more <= 0:
            return self._spent
        passes = self.model.passes
        return self._spent + passes.expect(len(self._unread())) + (more - 1) * passes.expect(1)

    def _unread(self) -> list[int]:
        return [self._guesses[-1][0]] if self._guesses else self.tokens[self.read :]

    def _guess(self) -> int:
        """Make one more guess; how sure it is."""
        unread = self._unread()
        token, probability, seconds = self.model.guess(unread, self.cache)
        if self._guesses:
            self._beyond += unread
        else:
            self.read = len(self.tokens)
        sure = round(_SURENESS * probability)
        self._guesses.append((token, sure))
        self._spent += seconds
        self.model.counts.guessed_tokens += 1
        return sure

    def _count_wait(self, tokens: Sequence[int]) -> None:
        """After a wrong guess wait for twice as many tokens as the last time before one is made only to try."""
        if not self._guesses:
            self._waits -= len(tokens)
        elif tokens and self._guesses[0][0] == tokens[0]:
            self._wait = self._waits = 0
        else:
            self._wait = self._waits = min(max(2 * self._wait, 1), _LONGEST_WAIT)

    def _fail(self) -> None:
        self.model.counts.failures += 1
        self._has_failed = True
        self._guesses = []
        self.let_go()


def _check_vocabulary(draft: DraftFolder, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `DraftError` unless ids mean the same to both models."""
    hint = "A draft must come of the same family: ids have to mean the same to both."
    if draft.config.vocab_size != vocab_size:
        raise DraftError(
            f"The draft model in {draft.folder} has {draft.config.vocab_size:,} embeddings, the model {vocab_size:,}.",
            code="other_vocabulary",
            hint=hint,
        )
    theirs = Tokenizer.read(draft.folder)
    if difference := tokenizer.difference(theirs):
        raise DraftError(
            f"The draft model in {draft.folder} has another tokenizer: {difference}.",
            code="other_vocabulary",
            hint=hint,
        )


def _tensors(folder: Path) -> list[Tensor]:
    """The tensors in all files of the folder that mlx-lm reads, their headers checked."""
    tensors = []
    for file in sorted(folder.glob("model*.safetensors")):
        with opened_file(file) as fd:
            spans = read_header(file, fd)
        for name, span in spans.items():
            if span.dtype not in MLX_DTYPES:
                raise DraftError(
                    f"{file} holds {shown(name)} as {span.dtype}, expected one of {', '.join(MLX_DTYPES)}.",
                    code="bad_draft",
                )
            tensors.append(Tensor(name, span.shape, span.dtype, (span,)))
    if not tensors:
        raise DraftError(f"{folder} holds no model*.safetensors.", code="bad_draft")
    return tensors
