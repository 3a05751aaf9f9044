"""Who is given how much of a model: pure arithmetic.

tensor     every rank has some heads of each layer, and some rows of each expert
expert     every rank has some heads of each layer, and some whole experts
pipeline   every rank has some whole layers"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..config import Config, MixtralError, Quantization

Kind = Literal["tensor", "expert", "pipeline"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_LEAST_ROWS = 32
"""Rows of an expert are given in multiples of this, and of the groups they are quantized in."""
_MOST_RANKS = 64


class DistributedError(MixtralError):
    """A model that cannot be run on these machines, or machines that do not work together."""


@dataclass(frozen=True)
class Split:
    """How a model is split among as many ranks as there are `weights`, each getting about its weight's share."""

    kind: Kind
    weights: tuple[float, ...]

    @classmethod
    def of(cls, kind: str, size: int, weights: Sequence[float] | None = None) -> Split:
        """Check what a person asked for; without `weights` all ranks get the same. Raises `DistributedError`."""
        if kind not in KINDS:
            raise DistributedError(f"The split is {kind!r}, expected {', '.join(KINDS)}.", code="bad_split")
        weights = tuple(weights or [1.0] * size)
        if len(weights) != size or not 1 <= size <= _MOST_RANKS:
            raise DistributedError(
                f"The split has {len(weights)} parts and there are {size} ranks.",
                code="bad_split",
                hint="Give one number for each rank, as --split 64,36.",
            )
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise DistributedError(f"The split is {weights}, expected numbers above 0.", code="bad_split")
        return cls(kind, weights)

    @property
    def size(self) -> int:
        return len(self.weights)

    def portions(self, config: Config) -> list[Portion]:
        """What each rank gets of `config`; raises `DistributedError` where there is not enough for all."""
        whole = Portion(
            range(config.num_key_value_heads),
            range(config.intermediate_size),
            range(config.num_local_experts),
            range(config.num_hidden_layers),
        )
        if self.kind == "pipeline":
            layers = self._divided(config.num_hidden_layers, 1, "layers")
            return [replace(whole, layers=some) for some in layers]
        heads = self._divided(config.num_key_value_heads, _heads_unit(config), "key/value heads")
        sides = [replace(whole, heads=some) for some in heads]
        if self.kind == "expert":
            experts = self._divided(config.num_local_experts, 1, "experts")
            return [replace(side, experts=some) for side, some in zip(sides, experts, strict=True)]
        rows = self._divided(config.intermediate_size, _rows_unit(config), "rows of an expert")
        return [replace(side, rows=some) for side, some in zip(sides, rows, strict=True)]

    def _divided(self, total: int, unit: int, what: str) -> list[range]:
        """`total` in multiples of `unit`, one at least for each rank, and the rest by weight."""
        units = total // unit
        if total % unit or units < self.size:
            of_so_many = "" if unit == 1 else f" in multiples of {unit}"
            raise DistributedError(
                f"{total} {what}{of_so_many} cannot be divided among {self.size} ranks.",
                code="cannot_split",
                hint="Use fewer ranks or another split.",
            )
        counts = [1] * self.size
        spare, weight = units - self.size, sum(self.weights)
        wanted = [max(units * part / weight - 1, 0) for part in self.weights]
        scale = spare / sum(wanted) if sum(wanted) else 0
        given = [int(part * scale) for part in wanted]
        by_rest = sorted(range(self.size), key=lambda n: given[n] - wanted[n] * scale)
        for n in by_rest[: spare - sum(given)]:
            given[n] += 1
        ranges, start = [], 0
        for one, more in zip(counts, given, strict=True):
            ranges.append(range(start, start + (one + more) * unit))
            start += (one + more) * unit
        return ranges


@dataclass(frozen=True)
class Portion:
    """What a rank has: key/value heads with the heads that use them, rows of an expert, experts, layers."""

    heads: range
    rows: range
    experts: range
    layers: range

    def config(self, whole: Config) -> Config:
        """A configuration that describes this portion, its layers numbered from 0."""
        shared = whole.num_attention_heads // whole.num_key_value_heads
        return replace(
            whole,
            num_attention_heads=len(self.heads) * shared,
            num_key_value_heads=len(self.heads),
            intermediate_size=len(self.rows),
            num_local_experts=len(self.experts),
            num_hidden_layers=len(self.layers),
            quantization=_renumbered(whole.quantization, self) if whole.quantization else None,
        )

    def renamed(self, name: str) -> str | None:
        """What a tensor or module is called in this portion; None where it is not in it. Without a layer: itself."""
        before, found, after = name.partition("model.layers.")
        if not found:
            return name
        number, dot, rest = after.partition(".")
        if int(number) not in self.layers:
            return None
        return f"{before}{found}{int(number) - self.layers.start}{dot}{rest}"


def _renumbered(quantization: Quantization, portion: Portion) -> Quantization:
    renamed = {portion.renamed(path): packing for path, packing in quantization.overrides.items()}
    return Quantization(quantization.default, {path: packing for path, packing in renamed.items() if path})


def _heads_unit(config: Config) -> int:
    """How many key/value heads go together, so that what their output is multiplied with has whole groups."""
    width = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    group = _group(config, ".self_attn.o_proj")
    return group // math.gcd(width, group)


def _rows_unit(config: Config) -> int:
    return math.lcm(_LEAST_ROWS, _group(config, ".switch_mlp.down_proj"))


def _group(config: Config, suffix: str) -> int:
    """A multiple of the groups in which the matrices of this name are quantized."""
    packings = [config.packing(path) for path in config.modules() if path.endswith(suffix)]
    return math.lcm(*(packing.group_size for packing in packings if packing))
