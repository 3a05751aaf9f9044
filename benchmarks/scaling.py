"""What a token costs as work grows: decode time against context and against batch, prompt time against length.

    python benchmarks/scaling.py FOLDER --output DIR [--turns 5]

Prints a table for each, with the slope between neighbouring points beside the slope that arithmetic expects, and
writes DIR/scaling.svg and DIR/scaling.json. All sizes are measured once in each turn, upwards and downwards in
alternate turns, so that a machine that grows slower does not look like a slope. The whole table of a model against
another engine is `mixtral-mlx bench`."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx

from mixtral_mlx import __version__
from mixtral_mlx.bench import floor, limits
from mixtral_mlx.bench.limits import Limits
from mixtral_mlx.bench.rows import Row, left_out, room
from mixtral_mlx.bench.table import amount, number
from mixtral_mlx.bench.worker import Decode, Ours, in_the_shared_loop, seeded_ids
from mixtral_mlx.borrowed import KVCache
from mixtral_mlx.config import MixtralError
from mixtral_mlx.weights import Checkpoint
from mixtral_mlx.writing import write_whole

_STEPS = 16
_CHUNK_TOKENS = 2048  # as `generate` reads a prompt
_WARM_UP_SIZE = 256  # Sizes up to this one reach every kernel.


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    contexts: tuple[int, ...] = (0, 1024, 2048, 4096, 8192, 16384)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    batch_context: int = 128
    prompts: tuple[int, ...] = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Series:
    """Rows that differ in one size, the field `grows` of each. Slopes are in ms for each `per` of it, or `unit`."""

    title: str
    grows: str
    axis: str
    unit: str
    per: int
    rows: tuple[Row, ...]

    def size(self, row: Row) -> int:
        return int(getattr(row, self.grows))


@dataclass(frozen=True)
class Point:
    """A size: the seconds of each turn, and the fewest that its bytes and its operations take at the limits."""

    size: int
    seconds: tuple[float, ...]
    bytes_s: float
    operations_s: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def expected_s(self) -> float:
        return max(self.bytes_s, self.operations_s)


@dataclass(frozen=True)
class Curve:
    """A series as measured, with what was left out and why, and the arithmetic in words."""

    series: Series
    points: tuple[Point, ...]
    left_out: tuple[str, ...]
    why: str

    def slopes(self, of: Callable[[Point], float]) -> list[float]:
        """Milliseconds for each `per` more, from each point to the next."""
        pairs = pairwise(self.points)
        return [1000 * self.series.per * (of(b) - of(a)) / (b.size - a.size) for a, b in pairs]


@dataclass(frozen=True)
class Scaling:
    """All there is to say about a run."""

    model: str
    dtype: str
    turns: int
    limits: Limits
    curves: tuple[Curve, ...]


def all_series(sizes: Sizes) -> tuple[Series, ...]:
    """The three ways in which work grows."""
    contexts = tuple(Row(f"context {n:,}", "decode", "decode", "s", _STEPS, n) for n in sizes.contexts)
    batches = tuple(Row(f"batch {n}", "batch", "decode", "s", _STEPS, sizes.batch_context, n) for n in sizes.batches)
    prompts = tuple(Row(f"prompt of {n:,}", "prompt", "prompt", "s", n) for n in sizes.prompts)
    at_context = f"at context {sizes.batch_context:,}"
    return (
        Series(
            "A decoded token against context", "context", "positions in the cache", "1,000 positions", 1000, contexts
        ),
        Series(f"A decode step against batch, {at_context}", "batch", "sequences", "added sequence", 1, batches),
        Series("A prompt against its length", "tokens", "tokens", "token", 1, prompts),
    )


def scaling(folder: Path, turns: int, sizes: Sizes = Sizes()) -> Scaling:
    """Measure the model in `folder`; raises `MixtralError`."""
    model = floor.weigh(Checkpoint.open(folder))
    engine = Ours(folder, "auto")
    machine = limits.measure(engine.dtype)
    series = all_series(sizes)
    rows = [row for one in series for row in one.rows if not left_out(row, model.config)]
    samples = measure(engine, rows, turns)
    curves = tuple(_curve(one, samples, model, machine, engine.dtype) for one in series)
    return Scaling(model.config.name, engine.dtype, turns, machine, curves)


def measure(engine: Ours, rows: Sequence[Row], turns: int) -> dict[Row, list[float]]:
    """Seconds of each row, one of every turn."""
    for row in rows:
        if max(row.context, row.batch, row.tokens) <= _WARM_UP_SIZE:
            seconds_of(engine, row)
    samples: dict[Row, list[float]] = {row: [] for row in rows}
    for turn in range(turns):
        for row in rows if turn % 2 == 0 else rows[::-1]:
            print(f"\rturn {turn + 1} of {turns}: {row.name:20}", end="", file=sys.stderr, flush=True)
            samples[row].append(seconds_of(engine, row))
    print(f"\r{'':40}\r", end="", file=sys.stderr, flush=True)
    return samples


def seconds_of(engine: Ours, row: Row) -> float:
    """Seconds for a row's prompt, or for one of its steps."""
    mx.clear_cache()
    if row.kind == "prompt":
        return read_prompt(engine, row.tokens)
    steps = room(row, engine.model.args)
    return in_the_shared_loop(engine, Decode(row.context, row.batch, steps, None)).seconds / steps


def read_prompt(engine: Ours, tokens: int) -> float:
    """Seconds until a prompt is in an empty cache and the logits of its last token are there."""
    model, ids = engine.model, mx.array([seeded_ids(engine, tokens)])
    caches = [KVCache() for _ in model.layers]
    start = time.perf_counter()
    for at in range(0, tokens, _CHUNK_TOKENS):
        hidden = model.model(ids[:, at : at + _CHUNK_TOKENS], caches)
        mx.eval(hidden, [cache.state for cache in caches])
    last = hidden[:, -1:]
    mx.eval(model.model.embed_tokens.as_linear(last) if model.args.tie_word_embeddings else model.lm_head(last))
    return time.perf_counter() - start


def _curve(
    series: Series, samples: Mapping[Row, Sequence[float]], model: floor.Weighed, machine: Limits, dtype: str
) -> Curve:
    points = []
    for row in series.rows:
        if row in samples:
            work = work_of(row, model, dtype)
            bytes_s, operations_s = work.nbytes / machine.bytes_per_s, work.operations / machine.operations_per_s
            points.append(Point(series.size(row), tuple(samples[row]), bytes_s, operations_s))
    missing = tuple(f"{row.name}: {reason}" for row in series.rows if (reason := left_out(row, model.config)))
    return Curve(series, tuple(points), missing, _WHY[series.grows](series, model, machine, dtype))


def work_of(row: Row, model: floor.Weighed, dtype: str) -> floor.Work:
    """What a row's prompt, or one of its steps, cannot do without."""
    if row.kind == "prompt":
        return prompt_work(model, row.tokens)
    steps = room(row, model.config)
    return floor.decode_step(model, context=row.context, batch=row.batch, steps=steps, dtype=dtype)


def prompt_work(model: floor.Weighed, tokens: int) -> floor.Work:
    """As `floor.prompt`, but a short prompt reads only the experts it chooses, and each chunk reads its own anew."""
    whole, config = floor.prompt(model, tokens), model.config
    once = whole.nbytes - model.dense.nbytes - config.num_local_experts * model.expert.nbytes
    chunks = (min(_CHUNK_TOKENS, tokens - at) for at in range(0, tokens, _CHUNK_TOKENS))
    read = sum(model.dense.nbytes + floor.distinct_experts(config, n) * model.expert.nbytes for n in chunks)
    return floor.Work(once + read, whole.operations)


def _why_context(series: Series, model: floor.Weighed, machine: Limits, dtype: str) -> str:
    position = floor.kv_bytes(model.config, None, dtype)
    ms = 1e6 * position / machine.bytes_per_s
    return (
        f"From bytes: the keys and values of a position are {amount(position)} in all layers, {number(ms, 'ms')} ms "
        "for 1,000 positions. From operations: queries with keys, and scores with values."
    )


def _why_batch(series: Series, model: floor.Weighed, machine: Limits, dtype: str) -> str:
    config, ms = model.config, 1000 * model.expert.nbytes / machine.bytes_per_s
    E, K = config.num_local_experts, config.num_experts_per_tok
    touched = ", ".join(f"{floor.distinct_experts(config, row.batch):.1f} for {row.batch}" for row in series.rows)
    return (
        f"From bytes: of a layer's {E} experts B sequences touch {E}·(1 − (1 − {K}/{E})^B), which is {touched}. "
        f"One more in every layer is {amount(model.expert.nbytes)}, {number(ms, 'ms')} ms; the keys and values of each "
        "sequence are added. From operations: every sequence has its own."
    )


def _why_prompt(series: Series, model: floor.Weighed, machine: Limits, dtype: str) -> str:
    active = model.dense.parameters + model.config.num_experts_per_tok * model.expert.parameters
    ms = 2000 * active / machine.operations_per_s
    return (
        f"From operations: a token passes through {active / 1e6:,.1f} M weights, {number(ms, 'ms')} ms, and attends to "
        f"those before it. From bytes: until every expert has been chosen a longer prompt reads more of them, and each "
        f"chunk of {_CHUNK_TOKENS:,} tokens reads the weights again."
    )


_WHY: dict[str, Callable[[Series, floor.Weighed, Limits, str], str]] = {
    "context": _why_context,
    "batch": _why_batch,
    "tokens": _why_prompt,
}


def markdown(result: Scaling) -> str:
    """The tables, each with its arithmetic."""
    machine = result.limits
    head = (
        f"{result.model} in {result.dtype}, mixtral-mlx {__version__}: medians of {result.turns} turns (lowest to "
        f"highest). Limits measured: {machine.bytes_per_s / 1e9:.1f} GB/s, {machine.operations_per_s / 1e9:,.0f} G "
        f"operations/s in {machine.dtype}. Expected is the larger of what the bytes and the operations take there; "
        "slopes are from the row above."
    )
    return "\n\n".join([head, *(block for curve in result.curves for block in _blocks(curve))])


def _blocks(curve: Curve) -> Iterator[str]:
    series = curve.series
    yield f"**{series.title}**"
    head = [series.axis, "ms", "expected ms", f"ms per {series.unit}", "expected", "from bytes", "from operations"]
    rows = [head, ["---:"] * len(head), *_cells(curve)]
    yield "\n".join(f"| {' | '.join(row)} |" for row in rows)
    yield " ".join([curve.why, *(f"Left out: {reason}." for reason in curve.left_out)])


def _cells(curve: Curve) -> Iterator[list[str]]:
    columns = [curve.slopes(of) for of in _SLOPES.values()]
    slopes = [[""] * len(columns), *([_ms(value) for value in row] for row in zip(*columns, strict=True))]
    for point, row in zip(curve.points, slopes, strict=False):
        low, high = (_ms(1000 * end(point.seconds)) for end in (min, max))
        yield [f"{point.size:,}", f"{_ms(1000 * point.median_s)} ({low} to {high})", _ms(1000 * point.expected_s), *row]


_SLOPES: dict[str, Callable[[Point], float]] = {
    "measured": lambda point: point.median_s,
    "expected": lambda point: point.expected_s,
    "from_bytes": lambda point: point.bytes_s,
    "from_operations": lambda point: point.operations_s,
}


def _ms(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.0005 else "0"


def as_json(result: Scaling) -> str:
    """All numbers: times in seconds, slopes in milliseconds for each `per` of a series' `grows`."""
    entry: dict[str, Any] = {"version": __version__, **asdict(result), "machine": asdict(limits.this_machine())}
    entry["curves"] = [_entry(curve) for curve in result.curves]
    return json.dumps(entry, ensure_ascii=False, indent=1)


def _entry(curve: Curve) -> dict[str, Any]:
    series = curve.series
    points = [{**asdict(p), "median_s": p.median_s, "expected_s": p.expected_s} for p in curve.points]
    slopes = {name: curve.slopes(of) for name, of in _SLOPES.items()}
    about = {"title": series.title, "grows": series.grows, "per": series.per, "why": curve.why}
    return {**about, "points": points, "slopes_ms": slopes, "left_out": list(curve.left_out)}


_PANEL, _HEIGHT = 340, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 58, 46
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --dim: #6b6b70; --line: #dcdce0; --page: #fff; --a: #0a62c9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --dim: #9a9aa2; --line: #3a3a40; --page: #161618; --a: #6cb2ff }
}
text { font: 11px system-ui, sans-serif; fill: var(--dim) } .title { font-size: 12px; fill: var(--ink) }
.page { fill: var(--page) } .grid { stroke: var(--line) } .range { stroke: var(--a); stroke-width: 2 }
.expected { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 3; fill: none } .point { fill: var(--a) }
"""


@dataclass(frozen=True)
class _Axis:
    """Where values from `low` to `high` are between `start` and `end` on the page, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    is_log: bool

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def svg(result: Scaling) -> str:
    """The curves side by side: medians with their ranges, and the expected line."""
    curves = [curve for curve in result.curves if curve.points]
    panels = "".join(
        f'<g transform="translate({n * _PANEL} 0)">{"".join(_panel(curve))}</g>' for n, curve in enumerate(curves)
    )
    width = _PANEL * max(len(curves), 1)
    words = "Milliseconds against context, batch and prompt length: measured points and the expected line"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" role="img" aria-label="{words}">'
        f'<style>{_STYLE}</style><rect class="page" width="{width}" height="{_HEIGHT}"/>{panels}</svg>\n'
    )


def _panel(curve: Curve) -> Iterator[str]:
    x, y = _axes(curve)
    yield f'<text class="title" x="{_LEFT}" y="20">{escape(curve.series.title)}</text>'
    yield f'<text x="{_LEFT}" y="38">ms: <tspan class="point">●</tspan> measured, ┄ expected</text>'
    yield from _grid(x, y)
    middle = (x.start + x.end) / 2
    yield f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(curve.series.axis)}</text>'
    line = "L".join(f"{x.at(point.size):.1f} {y.at(1000 * point.expected_s):.1f}" for point in curve.points)
    yield f'<path class="expected" d="M{line}"/>'
    for point in curve.points:
        yield from _mark(point, x, y)


def _axes(curve: Curve) -> tuple[_Axis, _Axis]:
    """Prompts span powers of ten, so both their axes are logarithmic."""
    is_log = curve.series.grows == "tokens"
    sizes = [point.size for point in curve.points]
    times = [1000 * s for point in curve.points for s in (*point.seconds, point.expected_s)]
    right, bottom = _PANEL - _RIGHT, _HEIGHT - _BOTTOM
    if is_log:
        x, y = (min(sizes) / 1.3, max(sizes) * 1.3), (min(times) / 1.5, max(times) * 1.5)
        return (_Axis(*x, _LEFT, right, _powers(4, *x), True), _Axis(*y, bottom, _TOP, _powers(10, *y), True))
    x, y = (0, max(*sizes, 1) * 1.04), (0, max(times) * 1.06)
    return (
        _Axis(*x, _LEFT, right, _multiples(2.0 ** math.ceil(math.log2(x[1] / 5)), x[1]), False),
        _Axis(*y, bottom, _TOP, _multiples(_round_step(y[1] / 5), y[1]), False),
    )


def _powers(base: int, low: float, high: float) -> tuple[float, ...]:
    powers = range(math.ceil(math.log(low, base)), math.floor(math.log(high, base)) + 1)
    return tuple(float(base) ** power for power in powers)


def _multiples(step: float, high: float) -> tuple[float, ...]:
    return tuple(n * step for n in range(int(high / step) + 1))


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least)


def _grid(x: _Axis, y: _Axis) -> Iterator[str]:
    for value in x.ticks:
        yield f'<path class="grid" d="M{x.at(value):.1f} {y.start}V{y.end}"/>'
        yield f'<text x="{x.at(value):.1f}" y="{y.start + 16}" text-anchor="middle">{_tick(value)}</text>'
    for value in y.ticks:
        yield f'<path class="grid" d="M{x.start} {y.at(value):.1f}H{x.end}"/>'
        yield f'<text x="{x.start - 6}" y="{y.at(value) + 4:.1f}" text-anchor="end">{_tick(value)}</text>'


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _mark(point: Point, x: _Axis, y: _Axis) -> Iterator[str]:
    across, middle = x.at(point.size), 1000 * point.median_s
    low, high = y.at(1000 * min(point.seconds)), y.at(1000 * max(point.seconds))
    title = f"{point.size:,}: {_ms(middle)} ms, expected {_ms(1000 * point.expected_s)} ms"
    yield f'<path class="range" d="M{across:.1f} {low:.1f}V{high:.1f}"/>'
    yield f'<circle class="point" cx="{across:.1f}" cy="{y.at(middle):.1f}" r="4"><title>{title}</title></circle>'


def main(arguments: Sequence[str] | None = None, sizes: Sizes = Sizes()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the plot and the numbers go")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args(arguments)
    if args.turns < 1:
        parser.error("--turns must be at least 1")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        result = scaling(args.folder, args.turns, sizes)
        write_whole(args.output / "scaling.svg", svg(result))
        write_whole(args.output / "scaling.json", as_json(result))
    except MixtralError as error:
        sys.exit(f"{error} {error.hint}".strip())
    except OSError as error:
        sys.exit(str(error))
    print(markdown(result))


if __name__ == "__main__":
    main()
