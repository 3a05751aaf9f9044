"""The rows of the table: what is measured, in which groups, which a model has no room for, how they are shortened."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..config import Config

GROUPS = ("load", "first", "prompt", "decode", "batch", "kv", "memory")
PROMPTS = (32, 512, 2048, 8192)
CONTEXTS = (0, 2048, 8192)
BATCHES = (1, 4, 8, 16)
BATCH_CONTEXTS = (0, 128)
KV_BITS = (8, 4)
KV_CONTEXT = 2048
STEPS = 64
MEMORY_PROMPT, MEMORY_STEPS = 512, 16
LEAST_PROMPT, LEAST_STEPS = 16, 1


@dataclass(frozen=True)
class Row:
    """One figure to measure. `kind` says how: "load", "first", "prompt", "decode" or "memory".

    `tokens` is the length of the prompt, or the number of steps, if there is time for it."""

    name: str
    group: str
    kind: str
    unit: str
    tokens: int = 0
    context: int = 0
    batch: int = 1
    kv_bits: int | None = None
    cold: bool = False

    @property
    def better(self) -> str:
        """Whether "more" of its unit is better, or "less"."""
        return "more" if self.unit == "tok/s" else "less"

    @property
    def least(self) -> int:
        """The fewest tokens that still measure it."""
        return LEAST_PROMPT if self.kind == "prompt" else LEAST_STEPS


def all_rows(groups: Collection[str] = GROUPS) -> list[Row]:
    """The rows of `groups`, in the order they are measured and shown: shorter ones first."""
    rows = [
        Row("load, cold", "load", "load", "s", cold=True),
        Row("load, warm", "load", "load", "s"),
        Row("first token, from process start", "first", "first", "s"),
        *(Row(f"prompt of {tokens:,}", "prompt", "prompt", "tok/s", tokens) for tokens in PROMPTS),
        *(Row(f"decode, context {context:,}", "decode", "decode", "tok/s", STEPS, context) for context in CONTEXTS),
        *(_batch_row(batch, context) for context in BATCH_CONTEXTS for batch in BATCHES),
        *(_kv_row(bits) for bits in KV_BITS),
        Row("peak memory", "memory", "memory", "bytes", MEMORY_PROMPT),
    ]
    return [row for row in rows if row.group in groups]


def _batch_row(batch: int, context: int) -> Row:
    return Row(f"batch of {batch}, context {context:,}", "batch", "decode", "tok/s", STEPS, context, batch)


def _kv_row(bits: int) -> Row:
    return Row(f"{bits}-bit cache, context {KV_CONTEXT:,}", "kv", "decode", "tok/s", STEPS, KV_CONTEXT, kv_bits=bits)


def left_out(row: Row, config: Config, ranks: int = 1) -> str:
    """Why a model that so many ranks share has no such row; empty if it has."""
    if ranks > 1 and row.kind in ("load", "first", "memory"):
        return "it takes a fresh process each time, and the ranks meet once"
    longest = config.max_position_embeddings
    # After a prompt comes a token, and before the steps that are timed one that is not.
    needed = row.tokens + 1 if row.kind == "prompt" else row.context + row.least + 1
    if row.kind in ("prompt", "decode") and needed > longest:
        return f"this model's context is {longest:,}"
    if row.kv_bits and config.head_dim % 32:
        return f"heads {config.head_dim} wide cannot be quantized"
    return ""


def room(row: Row, config: Config) -> int:
    """The tokens of `row` that the model's context has room for."""
    if row.kind == "decode":
        return min(row.tokens, config.max_position_embeddings - row.context - 1)
    return min(row.tokens, config.max_position_embeddings - MEMORY_STEPS - 1) if row.kind == "memory" else row.tokens


def shortened(tokens: int, seconds_each: float, seconds: float, least: int) -> int:
    """As many of `tokens` as `seconds` suffice for at `seconds_each`, but no fewer than `least`."""
    return max(min(tokens, int(seconds / max(seconds_each, 1e-9))), min(least, tokens))
