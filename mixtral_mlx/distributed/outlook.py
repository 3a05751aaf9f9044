"""What each of several machines would hold, what goes between them, and how fast that should be: computed, not run.

Pure arithmetic on top of `budget`'s, shown as a table or as data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

from ..budget import BANDWIDTH_SHARE, BudgetError, Footprint, Plan, Speeds, expected_speed, fit, hit_rate, in_gb
from ..config import Config
from .split import KINDS, DistributedError, Kind, Portion, Split

SUM_S = 0.25e-3
"""What MLX's ring takes for a small sum between two ranks that compute, beside the link: measured, on Linux."""
_MARGIN = 1.1
"""A split that waits for the link in every layer must be so much faster than one that does not, to be named before it:
what is computed is no more exact, and what is left out of it (ranks that wait for each other) slows that one only."""
_MOST_CHOICES = 2000
"""Which experts a token may choose is tried out one by one, so many at most."""


@dataclass(frozen=True)
class Wire:
    """What a link between two machines does: bytes per second, and seconds until a small message is there."""

    bytes_per_s: float
    latency_s: float

    def __str__(self) -> str:
        return f"{self.bytes_per_s * 8 / 1e9:g} Gb/s, {self.latency_s * 1e3:g} ms"


THUNDERBOLT = Wire(20e9 / 8, 0.3e-3)
"""Assumed, on the careful side: TCP over a Thunderbolt 4 cable."""


def parse_wire(text: str) -> Wire:
    """`10Gb/s,0.3ms`; raises `DistributedError`."""
    found = re.fullmatch(r"\s*([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*Gb/s\s*,\s*([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*ms\s*", text)
    if not found or not float(found[1]):
        raise DistributedError(f"The link is {text[:40]!r}, expected something like 10Gb/s,0.3ms.", code="bad_link")
    return Wire(float(found[1]) * 1e9 / 8, float(found[2]) / 1e3)


@dataclass(frozen=True)
class Host:
    """A machine: what the process may use there, and how fast it is."""

    label: str
    budget_bytes: int
    speeds: Speeds


@dataclass(frozen=True)
class Holding:
    """What a host has of a model, and the plan with which that runs; a refusal where it does not fit."""

    host: Host
    portion: Portion
    footprint: Footprint
    plan: Plan | None
    refusal: BudgetError | None

    @property
    def weights_bytes(self) -> int:
        return self.footprint.dense_bytes + self.footprint.experts_bytes


@dataclass(frozen=True)
class Outlook:
    """A split of a model among hosts: bytes that all of them send for a decoded token, and tokens per second.

    `refusal` says why it cannot be; `decode_tps` is None then, and where a host's part does not fit."""

    kind: Kind
    model: str
    holdings: tuple[Holding, ...] = ()
    sent_bytes: float = 0.0
    decode_tps: float | None = None
    refusal: str = ""


def outlooks(
    config: Config,
    name: str,
    hosts: Sequence[Host],
    wire: Wire,
    *,
    context: int | None = None,
    kv_bits: int | None = None,
) -> list[Outlook]:
    """Every split of a model among `hosts`, each given as much as it has memory; the one to take first."""
    found = [_outlook(kind, config, name, hosts, wire, context, kv_bits) for kind in KINDS]
    return sorted(found, key=_worth, reverse=True)


def _worth(outlook: Outlook) -> float:
    return (outlook.decode_tps or 0.0) * (_MARGIN if outlook.kind == "pipeline" else 1.0)


def _outlook(
    kind: Kind,
    config: Config,
    name: str,
    hosts: Sequence[Host],
    wire: Wire,
    context: int | None,
    kv_bits: int | None,
) -> Outlook:
    try:
        portions = Split.of(kind, len(hosts), [host.budget_bytes for host in hosts]).portions(config)
    except DistributedError as error:
        return Outlook(kind, name, refusal=str(error))
    holdings = tuple(
        _holding(host, portion, config, rank, context, kv_bits)
        for rank, (host, portion) in enumerate(zip(hosts, portions, strict=True))
    )
    sent = sent_bytes(kind, config, len(hosts), holdings[0].footprint.float_bytes)
    refusal = _refusal(kind, holdings)
    seconds = _link_s(kind, config, len(hosts), sent, wire) + _compute_s(kind, config, holdings)
    return Outlook(kind, name, holdings, sent, None if refusal else 1 / seconds, refusal)


def _refusal(kind: Kind, holdings: Sequence[Holding]) -> str:
    for rank, holding in enumerate(holdings):
        if holding.refusal:
            return f"rank {rank} needs {in_gb(holding.refusal.need_bytes)}"
        if kind == "tensor" and holding.plan and holding.plan.mode == "streamed":
            return f"rank {rank}'s part does not fit, and rows of experts cannot be streamed"
    return ""


def _holding(
    host: Host, portion: Portion, config: Config, rank: int, context: int | None, kv_bits: int | None
) -> Holding:
    part = portion.config(config)
    sizes = {
        name: spec.nbytes(config.dtype)
        for name, spec in part.tensors().items()
        if not rank or name.startswith("model.layers.")
    }
    footprint = Footprint.of(part, config.dtype, kv_bits, sizes)
    try:
        return Holding(host, portion, footprint, fit(footprint, host.budget_bytes, context=context), None)
    except BudgetError as error:
        return Holding(host, portion, footprint, None, error)


def sent_bytes(kind: Kind, config: Config, size: int, float_bytes: int) -> float:
    """What all of `size` ranks send for a decoded token."""
    hidden = config.hidden_size * float_bytes
    if kind == "pipeline":
        return size * hidden
    return _sums(config) * 2 * (size - 1) * hidden


def _sums(config: Config) -> int:
    """Sums over all ranks: after the embedding, and two in each layer."""
    return 2 * config.num_hidden_layers + 1


def _link_s(kind: Kind, config: Config, size: int, sent: float, wire: Wire) -> float:
    """Seconds that a token's messages take; what ranks send at the same time takes that time once."""
    if size == 1:
        return 0.0
    if kind == "pipeline":
        return size * wire.latency_s + sent / wire.bytes_per_s
    return _sums(config) * (SUM_S + 2 * (size - 1) * wire.latency_s) + sent / size / wire.bytes_per_s


def _compute_s(kind: Kind, config: Config, holdings: Sequence[Holding]) -> float:
    each = [_seconds(holding) for holding in holdings]
    if kind == "pipeline":
        return sum(each)
    if kind == "tensor":
        return max(each)
    dense = max(_dense_s(holding) for holding in holdings)
    return dense + sum(_experts_s(layer, config, holdings) for layer in range(config.num_hidden_layers))


def _seconds(holding: Holding) -> float:
    return 1 / expected_speed(holding.plan, holding.footprint, holding.host.speeds).decode_tps if holding.plan else 0.0


def _dense_s(holding: Holding) -> float:
    touched = holding.footprint.dense_bytes - holding.footprint.embedding_bytes
    return touched / (BANDWIDTH_SHARE * holding.host.speeds.memory_bytes_per_s)


def _experts_s(layer: int, config: Config, holdings: Sequence[Holding]) -> float:
    """A layer's experts: all wait for the rank that has most to do, whichever a token chooses."""
    each = [_expert_s(layer, holding) for holding in holdings]
    choices = list(islice(combinations(range(config.num_local_experts), config.num_experts_per_tok), _MOST_CHOICES))
    slowest = (
        max(
            seconds * sum(expert in holding.portion.experts for expert in chosen)
            for seconds, holding in zip(each, holdings, strict=True)
        )
        for chosen in choices
    )
    return sum(slowest) / len(choices)


def _expert_s(layer: int, holding: Holding) -> float:
    size, speeds = holding.footprint.expert_bytes[layer], holding.host.speeds
    here = hit_rate(holding.plan.slots[layer], holding.footprint.experts) if holding.plan else 1.0
    return size / (BANDWIDTH_SHARE * speeds.memory_bytes_per_s) + (1 - here) * size / speeds.ssd_bytes_per_s


# Shown.


def text(found: Sequence[Outlook], wire: Wire) -> str:
    """For people: a model's splits, the one to take first, and who holds what."""
    lines: list[str] = []
    for model in dict.fromkeys(outlook.model for outlook in found):
        mine = [outlook for outlook in found if outlook.model == model]
        lines += [f"{model}", *(line for outlook in mine for line in _lines(outlook, outlook is mine[0])), ""]
    return "\n".join(
        [
            *lines,
            f"Computed, not measured; decoding one sequence with a short context, over links of {wire} each.",
            "Bytes are what all machines send for a decoded token. Take the first that is not refused.",
        ]
    )


def _lines(outlook: Outlook, is_first: bool) -> Iterator[str]:
    if outlook.decode_tps:
        speed = f"{outlook.decode_tps:.1f} tok/s, {in_gb(outlook.sent_bytes)} a token"
        yield f"  {outlook.kind}: {speed}" + (" (recommended)" if is_first else "")
    else:
        yield f"  {outlook.kind}: no: {outlook.refusal}"
    for rank, holding in enumerate(outlook.holdings):
        how = _how(holding)
        yield f"    rank {rank}, {holding.host.label}: {_what(outlook.kind, holding.portion)}, {how}"


def _how(holding: Holding) -> str:
    held = in_gb(holding.weights_bytes)
    if holding.plan is None:
        return f"{held} of weights, which do not fit"
    if holding.plan.mode == "resident":
        return f"{held} of weights, resident"
    slots = f"{holding.plan.slots_per_layer:g} of {holding.footprint.experts}"
    return f"{held} of weights, streamed, {slots} experts of each layer in memory"


def _what(kind: Kind, portion: Portion) -> str:
    if kind == "pipeline":
        return f"layers {portion.layers.start} to {portion.layers.stop - 1}"
    heads = f"{len(portion.heads)} key/value heads"
    if kind == "expert":
        return f"experts {portion.experts.start} to {portion.experts.stop - 1}, {heads}"
    return f"{len(portion.rows):,} rows of each expert, {heads}"


def entries(found: Sequence[Outlook]) -> list[dict[str, Any]]:
    """For programs."""
    return [
        {
            "model": outlook.model,
            "split": outlook.kind,
            "generation_tps": round(outlook.decode_tps, 3) if outlook.decode_tps else None,
            "sent_bytes_per_token": round(outlook.sent_bytes),
            "refused": outlook.refusal or None,
            "ranks": [
                {
                    "host": holding.host.label,
                    "budget_bytes": holding.host.budget_bytes,
                    "weights_bytes": holding.weights_bytes,
                    "mode": holding.plan.mode if holding.plan else None,
                    "context": holding.plan.context if holding.plan else None,
                    "layers": [holding.portion.layers.start, holding.portion.layers.stop],
                    "experts": [holding.portion.experts.start, holding.portion.experts.stop],
                    "heads": [holding.portion.heads.start, holding.portion.heads.stop],
                    "rows": [holding.portion.rows.start, holding.portion.rows.stop],
                }
                for holding in outlook.holdings
            ],
        }
        for outlook in found
    ]
