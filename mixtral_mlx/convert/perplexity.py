"""How well a checkpoint predicts a text, and how far it is from another: perplexity and KL divergence.

Layer by layer: one layer's weights are read, run over the whole text and dropped, so that no model need fit in memory.
What is kept is the text's hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_map

from .. import cpu
from ..borrowed import create_attention_mask
from ..budget import check_context
from ..config import Config
from ..model import Model
from ..prompt import Tokenizer
from ..weights import Checkpoint, Progress, dtypes_for, quantize, read_tensors
from .names import ConvertError

_ROWS = 512  # logits are made for this many tokens at a time
_STATE_BYTES = 1 << 30  # hidden states of this size are held at a time; a longer text takes several rounds


@dataclass(frozen=True)
class Score:
    """`perplexity` over `tokens` predicted tokens; `kl` is the mean KL divergence from the other model, in nats."""

    perplexity: float
    tokens: int
    kl: float | None = None


def perplexity(
    folder: Path,
    text: str,
    *,
    against: Path | None = None,
    context: int = 512,
    on_progress: Progress = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Score:
    """Score `folder` on `text`, cut into windows of `context` tokens; with `against`, also its divergence from that.
    Raises `MixtralError`, as for a context that one of the models cannot have.

    The KL divergence is that of this model's distribution from the other's: sum of p_other · log(p_other / p_this)."""
    if cpu.is_backend():
        mx.disable_compile()  # There it would call a C++ compiler, for a second and a half and no gain.
    configs = [Config.read(path) for path in (folder, against) if path]  # First: a folder without one is no model.
    for config in configs:
        check_context(context, config.max_position_embeddings)
    tokenizer = Tokenizer.read(folder, configs[0].vocab_size)
    windows = _windows(tokenizer.encode(text, bos=False), context, tokenizer.bos_id)
    models = [_Streamed(path) for path in (folder, against) if path]
    if len({model.checkpoint.config.vocab_size for model in models}) > 1:
        raise ConvertError(f"{folder} and {against} have vocabularies of different sizes.", code="not_comparable")
    rounds = list(_rounds(windows, sum(model.checkpoint.config.hidden_size * 4 for model in models)))
    steps = _Steps(len(rounds) * sum(len(model.model.layers) for model in models), on_progress, cancelled)
    loss, divergence = 0.0, 0.0
    for some in rounds:
        hidden = [model.hidden(some, steps) for model in models]
        for window, *states in zip(some, *hidden, strict=True):
            for rows in _chunks(len(window) - 1):
                log_p, *log_q = (
                    _log_probabilities(model.head(state[:, rows])) for model, state in zip(models, states, strict=True)
                )
                targets = mx.array(window[1:])[rows][None, :, None]
                loss -= _sum(mx.take_along_axis(log_p, targets, axis=-1))
                divergence += sum(_sum(mx.exp(q) * (q - log_p)) for q in log_q)
    return _score(loss, divergence if against else None, sum(len(window) - 1 for window in windows))


def _score(loss: float, divergence: float | None, count: int) -> Score:
    if not math.isfinite(loss + (divergence or 0)) or loss / count > 700:
        raise ConvertError(
            f"The models' predictions are no numbers (loss {loss}, divergence {divergence}).",
            code="not_finite",
            hint="One of the checkpoints is damaged; `verify` may say more.",
        )
    return Score(math.exp(loss / count), count, None if divergence is None else divergence / count)


def _windows(ids: Sequence[int], context: int, bos: int) -> list[list[int]]:
    """Each begins with BOS; together they predict every token once."""
    if not ids:
        raise ConvertError("The text is empty.", code="empty_text", hint="Give at least a few words.")
    return [[bos, *ids[at : at + context - 1]] for at in range(0, len(ids), context - 1)]


def _rounds(windows: Sequence[Sequence[int]], token_bytes: int) -> Iterator[Sequence[Sequence[int]]]:
    each = max(_STATE_BYTES // (max(map(len, windows)) * token_bytes), 1)
    return (windows[at : at + each] for at in range(0, len(windows), each))


def _chunks(count: int) -> Iterator[slice]:
    return (slice(at, min(at + _ROWS, count)) for at in range(0, count, _ROWS))


def _log_probabilities(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _sum(values: mx.array) -> float:
    return cast(float, values.sum().item())


class _Steps:
    """Counts layers done."""

    def __init__(self, total: int, on_progress: Progress, cancelled: Callable[[], bool]) -> None:
        self.total, self.done = total, 0
        self.on_progress = on_progress
        self.cancelled = cancelled

    def step(self) -> None:
        if self.cancelled():
            raise ConvertError("Scoring was cancelled.", code="cancelled")
        self.done += 1
        self.on_progress(self.done, self.total)


class _Streamed:
    """A model whose layers are read when their turn comes."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        names = {tensor.name for tensor in self.checkpoint.tensors}
        _, self.dtype = dtypes_for("float32", self.checkpoint)
        self.model = Model(self.checkpoint.config)  # Unevaluated: it takes no memory until its weights are read.
        quantize(self.model, self.checkpoint.config, lambda path: f"{path}.scales" in names)
        for prefix in ("model.embed_tokens.", "model.norm.", "lm_head."):
            self._read(prefix)
        if cpu.is_available():
            self.model.eval()
            cpu.accelerate(self.model)

    def hidden(self, windows: Sequence[Sequence[int]], steps: _Steps) -> list[mx.array]:
        """The last hidden states of each window, normalized: (1, T, D)."""
        states = [self.model.model.embed_tokens(mx.array([window])) for window in windows]
        for n in range(len(self.model.layers)):
            self._read(f"model.layers.{n}.")
            for w, state in enumerate(states):
                mask = create_attention_mask(state, window_size=self.checkpoint.config.sliding_window)
                states[w] = self.model.layers[n](state, mask, None)
                mx.eval(states[w])
            self._drop(n)
            steps.step()
        return [self.model.model.norm(state) for state in states]

    def head(self, hidden: mx.array) -> mx.array:
        if self.checkpoint.config.tie_word_embeddings:
            return self.model.model.embed_tokens.as_linear(hidden)
        return self.model.lm_head(hidden)

    def _drop(self, n: int) -> None:
        """Put unevaluated zeros, which take no memory, in the place of a layer's weights."""
        layer = self.model.layers[n]
        layer.update(tree_map(lambda array: mx.zeros(array.shape, array.dtype), layer.parameters()))
        mx.clear_cache()

    def _read(self, prefix: str) -> None:
        tensors = [tensor for tensor in self.checkpoint.tensors if tensor.name.startswith(prefix)]
        self.model.load_weights(read_tensors(tensors, self.dtype), strict=False)
