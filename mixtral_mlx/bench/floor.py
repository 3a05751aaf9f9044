"""The least a row can cost: bytes that must be read and operations that must be done, from the checkpoint's own sizes.

A row's floor is the longer of the two at this machine's limits. Activations, the cache's writing and the sampler are
left out: they are small, and a floor that is too low flatters nobody."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import Config
from .limits import Limits

if TYPE_CHECKING:
    from ..weights import Checkpoint

_FLOAT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Part:
    """Some of a model's weights: their bytes as stored, and how many they are."""

    nbytes: float
    parameters: float


@dataclass(frozen=True)
class Weighed:
    """A model's weights by how often a token needs them.

    `embedding` is read a row at a time, `dense` (attention, routers, norms) and `head` whole, `expert` (one of them in
    all layers) when it is chosen. With tied embeddings the head is the embedding."""

    config: Config
    embedding: Part
    dense: Part
    head: Part
    expert: Part

    @property
    def nbytes(self) -> float:
        """Bytes of all weights."""
        embedding = 0 if self.config.tie_word_embeddings else self.embedding.nbytes
        return embedding + self.dense.nbytes + self.head.nbytes + self.config.num_local_experts * self.expert.nbytes


@dataclass(frozen=True)
class Work:
    """Bytes to be read and operations to be done, and the seconds neither can be faster than."""

    nbytes: float
    operations: float

    def seconds(self, limits: Limits) -> float:
        return max(self.nbytes / limits.bytes_per_s, self.operations / limits.operations_per_s)


def weigh(checkpoint: Checkpoint) -> Weighed:
    """The weights of a checkpoint as stored."""
    return weighed(checkpoint.config, {tensor.name: tensor.nbytes for tensor in checkpoint.tensors})


def weighed(config: Config, nbytes: Mapping[str, int]) -> Weighed:
    """The same from the bytes of each tensor."""
    counts = {path: math.prod(shape) for path, shape in config.modules().items()}
    names = {"embedding": "model.embed_tokens", "head": "lm_head", "expert": ".switch_mlp."}

    def part(kind: str, share: int = 1) -> Part:
        return Part(
            sum(size for name, size in nbytes.items() if _kind(name, names) == kind) / share,
            sum(count for name, count in counts.items() if _kind(name, names) == kind) / share,
        )

    embedding = part("embedding")
    head = embedding if config.tie_word_embeddings else part("head")
    return Weighed(config, embedding, part("dense"), head, part("expert", config.num_local_experts))


def _kind(name: str, names: Mapping[str, str]) -> str:
    return next((kind for kind, word in names.items() if word in name), "dense")


def distinct_experts(config: Config, tokens: int) -> float:
    """How many of a layer's experts `tokens` tokens can be expected to choose, if they choose evenly."""
    missed = 1 - config.num_experts_per_tok / config.num_local_experts
    return config.num_local_experts * (1 - missed**tokens)


def decode_step(
    model: Weighed, *, context: int, batch: int, steps: int, kv_bits: int | None = None, dtype: str
) -> Work:
    """One of `steps` steps for `batch` sequences of `context` tokens and the one before the first timed step."""
    # The first step sees the tokens before it, the one that was not timed, and its own; on average half of all more.
    length = context + 2 + (steps - 1) / 2
    config = model.config
    length = min(length, config.sliding_window or length)
    nbytes = (
        _embedding_rows(model, batch)
        + model.dense.nbytes
        + model.head.nbytes
        + distinct_experts(config, batch) * model.expert.nbytes
        + batch * length * kv_bytes(config, kv_bits, dtype)
    )
    active = model.dense.parameters + model.head.parameters + config.num_experts_per_tok * model.expert.parameters
    return Work(nbytes, batch * (2 * active + _attention(config, length)))


def prompt(model: Weighed, tokens: int) -> Work:
    """Reading a prompt: all weights once, every token through its experts, and the head for the last one."""
    config = model.config
    nbytes = _embedding_rows(model, tokens) + model.dense.nbytes + model.head.nbytes
    nbytes += config.num_local_experts * model.expert.nbytes
    active = model.dense.parameters + config.num_experts_per_tok * model.expert.parameters
    seen = _tokens_seen(tokens, config.sliding_window or tokens)
    return Work(nbytes, 2 * (active * tokens + model.head.parameters) + _attention(config, seen))


def kv_bytes(config: Config, kv_bits: int | None, dtype: str) -> float:
    """Bytes of one token's keys and values in all layers; quantized ones with a scale and a bias for each group."""
    if not kv_bits:
        return config.kv_nbytes_per_token(dtype)
    group = 64 if config.head_dim % 64 == 0 else 32
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return values * (kv_bits / 8 + 2 * _FLOAT_BYTES[dtype] / group)


def _embedding_rows(model: Weighed, tokens: int) -> float:
    rows = tokens * model.embedding.nbytes / model.config.vocab_size
    return 0.0 if model.config.tie_word_embeddings else min(rows, model.embedding.nbytes)


def _attention(config: Config, seen: float) -> float:
    """Operations of queries with keys and scores with values, for tokens that see `seen` tokens in all."""
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen


def _tokens_seen(tokens: int, window: int) -> int:
    """What the tokens of a prompt see in all, each itself and those before it within the window."""
    full = min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * window
