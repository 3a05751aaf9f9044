"""Who gets how much of a memory budget, and how fast that should run: pure arithmetic.

A model's `Footprint` and a number of bytes make a `Plan`, or a refusal that says what is needed. Asks no machine and
reads no file but what `config` knows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .config import Config, MixtralError

_MIB = 1 << 20

PROCESS_BYTES = 300 * 10**6
"""Python, MLX, the tokenizer and compiled kernels, before there is any model."""
CHUNK_TOKENS = 2048
"""Tokens of a prompt that go through a layer together. Each reads an expert at most once, so long chunks read less."""
LEAST_CHUNK_TOKENS = 256
DEFAULT_CONTEXT = 8192
LEAST_CONTEXT = 2048
"""What a streamed model's context is when nobody asked, and how far it is halved while its cache takes too much."""
_CACHE_SHARE = 8  # Keys and values take an eighth of the budget at most, unless asked for.
_MARGIN_SHARE = 50  # 2 %: page rounding, the allocator's own, stacks of reader threads.
# Buffers that MLX keeps for its next step. Streaming uses the same few sizes again and again, so little is enough.
_BUFFER_CACHE_SHARE = 64
_MOST_BUFFER_CACHE_BYTES = 1 << 30
_KV_GROUP = 64  # mlx-lm's quantized cache: a scale and a bias for 64 values.
_KV_STEP = 256  # mlx-lm's caches grow by so many tokens.


class BudgetError(MixtralError):
    """A model that cannot run within a budget; `need_bytes` is the least that would do, `parts` what it is made of."""

    def __init__(self, message: str, *, need_bytes: int, have_bytes: int, parts: Mapping[str, int], hint: str) -> None:
        super().__init__(message, code="over_budget", hint=hint)
        self.need_bytes = need_bytes
        self.have_bytes = have_bytes
        self.parts = parts


class SizeError(MixtralError):
    """A size that cannot be understood."""


@dataclass(frozen=True)
class Footprint:
    """What a model asks of memory. Bytes are as held in memory; `expert_bytes` is one expert of each layer.

    `dense_bytes` is all that is no expert, `embedding_bytes` the part of it of which a token touches one row only,
    `float_bytes` the size of an activation, `parameters_per_token` the weights a token is multiplied with."""

    dense_bytes: int
    embedding_bytes: int
    expert_bytes: tuple[int, ...]
    experts: int
    chosen: int
    kv_bytes_per_token: int
    max_context: int
    hidden: int
    ffn: int
    queries: int
    vocab: int
    float_bytes: int
    parameters_per_token: int

    @classmethod
    def of(
        cls,
        config: Config,
        dtype: str,
        kv_bits: int | None = None,
        nbytes: Mapping[str, int] | None = None,
    ) -> Footprint:
        """The footprint of `config` computing in `dtype`; `nbytes` are each tensor's bytes, if not all as `dtype`."""
        if nbytes is None:
            nbytes = {name: spec.nbytes(dtype) for name, spec in config.tensors().items()}
        layers = [0] * config.num_hidden_layers
        dense = embedding = 0
        for name, size in nbytes.items():
            if ".switch_mlp." in name:
                layers[int(name.split(".")[2])] += size
            else:
                dense += size
            if name.startswith("model.embed_tokens.") and not config.tie_word_embeddings:
                embedding += size
        floats = 4 if dtype == "float32" else 2
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        attention = 2 * config.hidden_size * (queries + keys)
        experts = config.num_experts_per_tok * 3 * config.hidden_size * config.intermediate_size
        return cls(
            dense_bytes=dense,
            embedding_bytes=embedding,
            expert_bytes=tuple(size // config.num_local_experts for size in layers),
            experts=config.num_local_experts,
            chosen=config.num_experts_per_tok,
            kv_bytes_per_token=_kv_bytes_per_token(config, dtype, kv_bits, floats),
            max_context=config.max_position_embeddings,
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            queries=queries,
            vocab=config.vocab_size,
            float_bytes=floats,
            parameters_per_token=config.num_hidden_layers * (attention + experts),
        )

    @property
    def experts_bytes(self) -> int:
        """Bytes of all experts of all layers."""
        return self.experts * sum(self.expert_bytes)

    def kv_bytes(self, context: int) -> int:
        """Bytes of keys and values of `context` tokens; one layer's are there twice while its cache grows."""
        steps = -(-context // _KV_STEP)
        grown = self.kv_bytes_per_token * steps * _KV_STEP
        return grown + grown // len(self.expert_bytes)

    def working_bytes(self, tokens: int) -> int:
        """Bytes between the weights and the result while `tokens` tokens go through a layer.

        Six arrays of the hidden size (residuals, norms, queries, attention and its result), what each chosen expert
        says and the copy in which it is put in order, what is between the two products of one expert, which may have
        twice its share of tokens, and the last token's logits."""
        rows = tokens * self.chosen
        own = min(2 * rows // self.experts, tokens) + 1
        values = 6 * tokens * max(self.hidden, self.queries) + 2 * rows * self.hidden + 3 * own * self.ffn
        return self.float_bytes * (values + 2 * self.vocab)


def _kv_bytes_per_token(config: Config, dtype: str, kv_bits: int | None, floats: int) -> int:
    whole = config.kv_nbytes_per_token(dtype)
    if kv_bits is None:
        return whole
    values = whole // floats
    return values * kv_bits // 8 + 2 * floats * values // _KV_GROUP


@dataclass(frozen=True)
class Plan:
    """Who gets what: expert slots of each layer, tokens of context and of a prompt's chunk, and bytes by part.

    `cache_limit_bytes` is what MLX may keep of buffers it no longer uses."""

    mode: Literal["resident", "streamed"]
    budget_bytes: int
    slots: tuple[int, ...]
    context: int
    chunk_tokens: int
    parts: Mapping[str, int]
    cache_limit_bytes: int

    @property
    def slots_per_layer(self) -> int | float:
        """Slots of each layer; their mean where layers differ."""
        low, high = min(self.slots), max(self.slots)
        return low if low == high else round(sum(self.slots) / len(self.slots), 2)

    @property
    def needed_bytes(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())


def fit(
    footprint: Footprint, budget_bytes: int, *, context: int | None = None, process_bytes: int = PROCESS_BYTES
) -> Plan:
    """Divide `budget_bytes`: resident where everything fits, else as many expert slots as there is room for.

    A `context` of None is chosen: the model's own limit, or less where it would cost expert slots. The budget is
    counted in whole MiB. Raises `BudgetError`."""
    if context is not None:
        check_context(context, footprint.max_context)
    budget = budget_bytes // _MIB * _MIB
    for tokens in [context] if context else _resident_contexts(footprint, budget):
        plan = _divided(footprint, budget, tokens, CHUNK_TOKENS, process_bytes)
        if plan and plan.mode == "resident":
            return plan
    for tokens in [context] if context else _streamed_contexts(footprint, budget):
        for chunk in _halved(CHUNK_TOKENS, LEAST_CHUNK_TOKENS):
            if plan := _divided(footprint, budget, tokens, chunk, process_bytes):
                return plan
    raise _refusal(footprint, budget_bytes, context, process_bytes)


def check_context(context: int, most: int) -> None:
    """Raise `SizeError` for a context that a model which knows `most` positions cannot have."""
    if not 2 <= context <= most:
        raise SizeError(
            f"The context is {context:,} tokens, expected 2 to {most:,}, this model's own limit.", code="bad_context"
        )


def _resident_contexts(footprint: Footprint, budget: int) -> Iterator[int]:
    """The model's whole context, and less of it as long as that is more than a streamed model would be given."""
    yield from _halved(footprint.max_context, next(_streamed_contexts(footprint, budget)))


def _streamed_contexts(footprint: Footprint, budget: int) -> Iterator[int]:
    """The default context, halved until its cache is a fair share; then smaller ones, better than no answer at all."""
    least = min(LEAST_CONTEXT, footprint.max_context)
    for tokens in _halved(min(DEFAULT_CONTEXT, footprint.max_context), least):
        if tokens == least or footprint.kv_bytes(tokens) * _CACHE_SHARE <= budget:
            yield tokens


def _halved(first: int, last: int) -> Iterator[int]:
    while first > last:
        yield first
        first //= 2
    yield last


def _divided(footprint: Footprint, budget: int, context: int, chunk: int, process_bytes: int) -> Plan | None:
    """The plan with this context and chunk; None where not even one slot per layer is left."""
    chunk = min(chunk, context)
    parts = _fixed(footprint, budget, context, chunk, process_bytes)
    slots = _slots(footprint, budget - sum(parts.values()))
    if slots is None:
        return None
    parts["experts"] = sum(n * size for n, size in zip(slots, footprint.expert_bytes, strict=True))
    mode: Literal["resident", "streamed"] = "resident" if min(slots) == footprint.experts else "streamed"
    return Plan(mode, budget, slots, context, chunk, parts, parts["buffer cache"])


def _fixed(footprint: Footprint, budget: int, context: int, chunk: int, process_bytes: int) -> dict[str, int]:
    """Bytes by part, without the experts."""
    return {
        "process": process_bytes,
        "dense": footprint.dense_bytes,
        "experts": 0,
        "kv cache": footprint.kv_bytes(context),
        "working memory": footprint.working_bytes(chunk),
        "buffer cache": min(budget // _BUFFER_CACHE_SHARE, _MOST_BUFFER_CACHE_BYTES),
        "margin": budget // _MARGIN_SHARE,
    }


def _slots(footprint: Footprint, left: int) -> tuple[int, ...] | None:
    """The same number for every layer, and one more for the first ones while there is room.

    One slot is enough to run, though a token has two experts: they are read into it in turn. That is slow, but it lets
    a 26 GB model answer within 6 GB, where two per layer would need 9. What is left over goes to the first layers,
    because nothing comes before them that could tell in time what they will need."""
    sizes = footprint.expert_bytes
    each = min(left // sum(sizes), footprint.experts) if left > 0 else 0
    if each < 1:
        return None
    slots, left = [each] * len(sizes), left - each * sum(sizes)
    for layer, size in enumerate(sizes):
        if slots[layer] < footprint.experts and size <= left:
            slots[layer] += 1
            left -= size
        else:
            break
    return tuple(slots)


def _refusal(footprint: Footprint, have: int, context: int | None, process_bytes: int) -> BudgetError:
    tokens = context or min(LEAST_CONTEXT, footprint.max_context)
    need = _least_budget(footprint, tokens, process_bytes)
    parts = _fixed(footprint, need, tokens, min(LEAST_CHUNK_TOKENS, tokens), process_bytes)
    parts["experts"] = sum(footprint.expert_bytes)
    listed = ", ".join(f"{name} {in_gb(size)}" for name, size in parts.items())
    remedies = ["a model of fewer bits"]
    if tokens > LEAST_CONTEXT:
        remedies[:0] = ["a smaller --context", "--kv-bits 8 or 4"]
    return BudgetError(
        f"This model needs at least {in_gb(need)} with a context of {tokens:,} tokens and one expert of each layer in "
        f"memory; the budget is {in_gb(have)}.",
        need_bytes=need,
        have_bytes=have,
        parts=parts,
        hint=f"It is made of {listed}. Use {' or '.join(remedies)}, or give it more memory.",
    )


def _least_budget(footprint: Footprint, context: int, process_bytes: int) -> int:
    need = 0
    while True:
        fixed = _fixed(footprint, need, context, min(LEAST_CHUNK_TOKENS, context), process_bytes)
        missing = sum(fixed.values()) + sum(footprint.expert_bytes) - need
        if missing <= 0:
            return need
        need += -(-missing // _MIB) * _MIB


# Expected speed.

HIT_RATES = (0.0, 0.168, 0.343, 0.468, 0.590, 0.70, 0.81, 0.91, 1.0)
"""Share of the experts a token needs that are in memory, by slots of eight: Mixtral-8x7B-Instruct's measured routing,
per-layer LRU; 2 to 4 as published, the others extended from them."""
BANDWIDTH_SHARE = 0.6
"""What decoding reaches of the memory's bandwidth; published runs of Mixtral on Macs lie between 0.49 and 0.76."""
OPERATIONS_SHARE = 0.5
"""What reading a prompt reaches of the processor's operations."""
NOT_OVERLAPPED = 0.1
"""Share of the shorter of reading and computing that does not hide behind the longer: the first layer's misses, wrong
guesses, and waiting for the router."""


@dataclass(frozen=True)
class Speeds:
    """What a machine does per second at most: bytes from its SSD and its memory, multiplications and additions."""

    ssd_bytes_per_s: float
    memory_bytes_per_s: float
    operations_per_s: float
    source: Literal["measured", "assumed"] = "assumed"


@dataclass(frozen=True)
class Speed:
    """Expected tokens per second, and for one decoded token and one chunk of a prompt what it takes."""

    decode_tps: float
    prompt_tps: float
    hit_rate: float
    missed_bytes: float
    touched_bytes: float
    read_s: float
    compute_s: float
    chunk_bytes: float
    chunk_read_s: float
    chunk_compute_s: float


def expected_speed(plan: Plan, footprint: Footprint, speeds: Speeds) -> Speed:
    """Computed, not measured: what `plan` should reach on a machine of these `speeds`, with a short context."""
    uses = [footprint.chosen * size for size in footprint.expert_bytes]
    missing = [1 - hit_rate(slots, footprint.experts) for slots in plan.slots]
    missed = sum(use * miss for use, miss in zip(uses, missing, strict=True))
    touched = footprint.dense_bytes - footprint.embedding_bytes + sum(uses)
    read_s, compute_s = missed / speeds.ssd_bytes_per_s, touched / (BANDWIDTH_SHARE * speeds.memory_bytes_per_s)
    chunk_bytes = sum(
        (footprint.experts - slots) * size for slots, size in zip(plan.slots, footprint.expert_bytes, strict=True)
    )
    operations = 2 * footprint.parameters_per_token * plan.chunk_tokens
    chunk_read_s = chunk_bytes / speeds.ssd_bytes_per_s
    chunk_compute_s = operations / (OPERATIONS_SHARE * speeds.operations_per_s)
    return Speed(
        decode_tps=1 / _together(read_s, compute_s),
        prompt_tps=plan.chunk_tokens / _together(chunk_read_s, chunk_compute_s),
        hit_rate=1 - missed / sum(uses),
        missed_bytes=missed,
        touched_bytes=touched,
        read_s=read_s,
        compute_s=compute_s,
        chunk_bytes=chunk_bytes,
        chunk_read_s=chunk_read_s,
        chunk_compute_s=chunk_compute_s,
    )


def hit_rate(slots: int, experts: int) -> float:
    """The share of needed experts that are found in `slots` of `experts`, between the points of `HIT_RATES`."""
    place = slots / experts * (len(HIT_RATES) - 1)
    below = min(int(place), len(HIT_RATES) - 2)
    return HIT_RATES[below] + (place - below) * (HIT_RATES[below + 1] - HIT_RATES[below])


def _together(read_s: float, compute_s: float) -> float:
    """Seconds of reading and computing side by side."""
    return max(read_s, compute_s) + NOT_OVERLAPPED * min(read_s, compute_s)


# Sizes in words.

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str, *, as_chips: bool = False) -> int:
    """Bytes of `8GB`, `12.5GB`, `800MB` or `12GiB`; raises `SizeError`.

    `as_chips` takes GB for GiB: the 16 GB that a Mac is sold with are 2^34 bytes."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]{1,3})\s*", text)
    name = found[2].upper() if found else ""
    unit = _UNITS.get(f"{name[0]}IB" if as_chips and len(name) == 2 else name) if name else None
    if not found or not unit:
        raise _bad_size(text, "a number and a unit, as 12GB, 800MB or 12.5GiB")
    size = float(found[1]) * unit
    if not 1 <= size <= _MOST_TB * 10**12:
        raise _bad_size(text, f"more than 0 and at most {_MOST_TB}TB")
    return int(size)


_MOST_TB = 1000


def _bad_size(text: str, expected: str) -> SizeError:
    return SizeError(f"The size is {text[:40]!r}, expected {expected}.", code="bad_size")


def in_gb(size: float) -> str:
    """Bytes for people, in decimal units with one digit after the point: `12.7 GB`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"
