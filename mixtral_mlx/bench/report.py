"""Samples → a report: medians, spread, ratio, share of the floor, in one frozen object that can be saved and read."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..config import parse_json, shown
from . import floor
from .limits import Limits, Machine
from .process import BenchError, Memory, Streamed
from .rows import MEMORY_STEPS, Row
from .turns import Measured, Samples

KIND = "mixtral-mlx bench"
FORMAT = 1


@dataclass(frozen=True)
class PerToken:
    """What a decoded token of a streamed model took: the share of its experts that were in memory, bytes and seconds of
    reading, seconds of waiting; and the share of the experts read on a guess that were then wanted."""

    hit_rate: float | None
    bytes_read: float
    io_s: float
    stall_s: float
    guesses_true: float | None


@dataclass(frozen=True)
class Figure:
    """A side's figure of a row, in the row's unit. `tokens` were run, `shortened` says so if they are fewer than asked.

    `floor_share` is how much of the time (of peak memory: of the bytes) the floor makes up: 1 is as good as it gets. A
    side that streams has none: the floor is that of weights in memory. `streamed` is its alone."""

    values: tuple[float, ...]
    median: float | None
    lowest: float | None
    highest: float | None
    tokens: int
    shortened: int | None
    floor_share: float | None
    bytes_per_token: float | None
    operations_per_byte: float | None
    operations_per_s: float | None
    reason: str
    streamed: PerToken | None = None


@dataclass(frozen=True)
class Entry:
    """A row of the table: each side's figure, and the first side's median divided by the second's."""

    name: str
    group: str
    unit: str
    better: str
    figures: dict[str, Figure]
    ratio: float | None


@dataclass(frozen=True)
class ModelInfo:
    """Which model was measured."""

    name: str
    folder: str
    parameters: int
    nbytes: int
    layers: int
    quantization: str
    dtype: str


@dataclass(frozen=True)
class SideInfo:
    """An engine as it described itself; `version` and `dtype` are empty if it never came to that."""

    name: str
    version: str
    dtype: str
    memory: Memory | None = None

    @property
    def streams(self) -> bool:
        """Whether experts were read while it ran."""
        return self.memory is not None and self.memory.mode == "streamed"


@dataclass(frozen=True)
class Settings:
    """How it was measured; `memory_bytes` is what the first side was allowed, None what it takes by itself."""

    dtype: str
    turns: int
    seconds: int
    rows: tuple[str, ...]
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Report:
    """Everything there is to say about a run."""

    version: str
    date: str
    machine: Machine
    limits: Limits
    model: ModelInfo
    settings: Settings
    sides: tuple[SideInfo, ...]
    rows: tuple[Entry, ...]
    notes: tuple[str, ...]
    interrupted: bool

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints and `--save` writes. Its names are kept."""
        return {"kind": KIND, "format": FORMAT, **asdict(self)}


@dataclass(frozen=True)
class Measure:
    """What turns seconds into figures: the weights, the machine's limits, each side's dtype, and which sides stream."""

    model: floor.Weighed
    limits: Limits
    dtypes: Mapping[str, str]
    streaming: Collection[str] = ()


def entry(measured: Measured, measure: Measure) -> Entry:
    """A measured row as a row of the table."""
    row = measured.row
    figures = {name: figure(row, samples, measure, name) for name, samples in measured.samples.items()}
    return Entry(row.name, row.group, row.unit, row.better, figures, ratio([f.median for f in figures.values()]))


def left_out(row: Row, sides: list[str], reason: str) -> Entry:
    """A row that was not measured, and why."""
    empty = Figure((), None, None, None, 0, None, None, None, None, None, reason)
    return Entry(row.name, row.group, row.unit, row.better, dict.fromkeys(sides, empty), None)


def ratio(medians: list[float | None]) -> float | None:
    """The first of two medians divided by the second, where there are two."""
    if len(medians) != 2 or not medians[0] or not medians[1]:
        return None
    return medians[0] / medians[1]


def figure(row: Row, samples: Samples, measure: Measure, side: str) -> Figure:
    """A side's samples as medians, spread and share of the floor."""
    values = tuple(in_unit(row, value, samples.tokens) for value in samples.values)
    median = statistics.median(values) if values else None
    work = work_of(row, samples.tokens, measure, measure.dtypes.get(side, measure.model.config.dtype))
    seconds = statistics.median(samples.values) if values and work else None
    produced = row.batch * (samples.tokens if row.kind == "prompt" else 1)
    return Figure(
        values=values,
        median=median,
        lowest=min(values, default=None),
        highest=max(values, default=None),
        tokens=samples.tokens,
        shortened=samples.tokens if values and 0 < samples.tokens < row.tokens else None,
        floor_share=None if side in measure.streaming else _share(row, median, samples.tokens, work, measure),
        bytes_per_token=work.nbytes / produced if work else None,
        operations_per_byte=work.operations / work.nbytes if work else None,
        operations_per_s=work.operations * _repeats(row, samples.tokens) / seconds if work and seconds else None,
        reason=samples.reason,
        streamed=per_token(samples.streamed, samples.tokens * row.batch),
    )


def per_token(turns: Sequence[Streamed], tokens: int) -> PerToken | None:
    """What streaming took for each of the tokens made in each of `turns`."""
    if not turns:
        return None
    total = {field.name: sum(getattr(turn, field.name) for turn in turns) for field in fields(Streamed)}
    made, uses = len(turns) * tokens, total["hits"] + total["misses"]
    return PerToken(
        hit_rate=total["hits"] / uses if uses else None,
        bytes_read=total["bytes_read"] / made,
        io_s=total["io_s"] / made,
        stall_s=total["stall_s"] / made,
        # What was guessed before the first step may come true in it.
        guesses_true=min(total["ahead_used"] / total["ahead_reads"], 1.0) if total["ahead_reads"] else None,
    )


def work_of(row: Row, tokens: int, measure: Measure, dtype: str) -> floor.Work | None:
    """What a prompt, or one step of decoding, cannot do without; None for rows of another kind."""
    if not tokens:
        return None
    if row.kind == "prompt":
        return floor.prompt(measure.model, tokens)
    if row.kind == "decode":
        shape = {"context": row.context, "batch": row.batch, "steps": tokens}
        return floor.decode_step(measure.model, **shape, kv_bits=row.kv_bits, dtype=dtype)
    return None


def in_unit(row: Row, value: float, tokens: int) -> float:
    """A sample in the unit of its row."""
    return tokens * row.batch / value if row.unit == "tok/s" else value


def _repeats(row: Row, tokens: int) -> int:
    return tokens if row.kind == "decode" else 1


def _share(row: Row, median: float | None, tokens: int, work: floor.Work | None, measure: Measure) -> float | None:
    if not median:
        return None
    if work:
        produced = tokens * row.batch if row.kind == "prompt" else row.batch
        return work.seconds(measure.limits) * median / produced
    if row.kind == "memory":
        return measure.model.nbytes / median
    if row.kind == "load" and not row.cold:
        return measure.model.nbytes / measure.limits.bytes_per_s / median
    return None


def notes_of(report_rows: tuple[Entry, ...], sides: list[str], limits: Limits) -> tuple[str, ...]:
    """What a reader of these rows has to know."""
    groups = {row.group for row in report_rows}
    notes = [
        f"of floor: the least time this machine needs for the row, at {limits.bytes_per_s / 1e9:.1f} GB/s or "
        f"{limits.operations_per_s / 1e9:,.0f} G operations/s in {limits.dtype} (both measured just before), "
        "as a share of the time taken"
    ]
    if len(sides) == 2:
        notes.append(f"ratio: {sides[0]} ÷ {sides[1]}; for s and bytes less is better")
    if groups & {"decode", "batch", "kv"}:
        notes.append("caches at a context are filled with seeded values, not by reading a prompt")
        notes.append("prompts and decoding at 0 run in each engine's own loop, the rest in one that all share")
    if "memory" in groups:
        notes.append(
            f"peak memory: a process that loads, reads a prompt of 512 and makes {MEMORY_STEPS} tokens; its floor is "
            "the weights"
        )
    return tuple(notes)


def memory_notes(sides: Sequence[SideInfo], settings: Settings) -> Iterator[str]:
    """What a reader has to know of budgets and of models that are streamed."""
    for side in sides:
        if side.streams:
            yield (
                f"{side.name} has no share of a floor: that is of weights in memory, and it reads some from the SSD; "
                "read/token is what a token needs, wherever it comes from"
            )
    if settings.memory_bytes is not None:
        first, *others = sides
        if "memory" in settings.rows:
            yield f"peak memory: {first.name} may use {settings.memory_bytes / 1e6:,.0f} MB"
        yield from (f"{side.name} has no option for a budget: it runs as it is" for side in others)


def read(path: Path) -> Report:
    """A report that `--save` wrote; raises `BenchError`."""
    try:
        data = parse_json(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        if not isinstance(data, dict) or (data.pop("kind", None), data.pop("format", None)) != (KIND, FORMAT):
            raise ValueError(f"it does not say that it is one, of format {FORMAT}")
        report: Report = _built(Report, data)
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror}.", code="unreadable") from None
    except (ValueError, OverflowError) as error:
        raise BenchError(
            f"{path} is not a saved benchmark: {str(error)[:200]}.",
            code="not_a_bench",
            hint="Files to compare are written by: mixtral-mlx bench --save F.json",
        ) from None
    return report


def _no_number(name: str) -> Any:
    raise ValueError(f"it holds {name}")


def _built(kind: Any, value: Any) -> Any:
    """`value` of parsed JSON as `kind`; raises ValueError where it is none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _built_fields(kind, value)
    if origin in (Union, UnionType):
        return None if value is None else _built(arguments[0], value)
    if origin is tuple and isinstance(value, list):
        return tuple(_built(arguments[0], part) for part in value)
    if origin is dict and isinstance(value, dict):
        return {key: _built(arguments[1], part) for key, part in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is not None or type(value) is not kind:
        raise ValueError(f"{shown(value)} stands where {kind} should")
    return value


def _built_fields(kind: Any, value: Any) -> Any:
    names = {field.name for field in fields(kind)}
    # Fields that came later have defaults, so that reports from before can be read.
    required = {field.name for field in fields(kind) if field.default is MISSING}
    if not isinstance(value, dict) or not required <= value.keys() <= names:
        raise ValueError(f"its {kind.__name__} lacks fields or has others")
    hints = get_type_hints(kind)
    return kind(**{name: _built(hints[name], value[name]) for name in value})
