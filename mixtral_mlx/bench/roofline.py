"""The picture of a report: where each row stands under the machine's limits, as SVG.

Across: operations for each byte that must be read; up: operations per second. Below the slope memory is the limit,
below the flat roof the processor. Both axes are logarithmic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from .limits import Limits
from .report import Report
from .table import number

WIDTH, HEIGHT = 960, 600
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 150, 24, 56
_LINE = 13
_LETTER = 6.2
_STEP = 3
_ROOM = 4  # below the lowest point, for labels


@dataclass(frozen=True)
class Point:
    """A side's figure of a row, where it stands in the picture's own terms."""

    label: str
    side: int
    operations_per_byte: float
    operations_per_s: float
    title: str


@dataclass(frozen=True)
class _Scale:
    """Where values are on the page: powers of ten `x` and `y` from low to high."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        low, high = self.x
        return _LEFT + (math.log10(value) - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def up(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - _BOTTOM - (math.log10(value) - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)


def svg(report: Report) -> str:
    """The picture; empty if no row has a place in it."""
    points = list(_points(report))
    if not points:
        return ""
    scale = _scale(points, report.limits)
    parts = [*_grid(scale), *_roof(scale, report.limits), *_marks(scale, points), *_labels(scale, points)]
    words = "Operations per second of each row against its operations per byte, under the machine's limits"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">{"".join(parts)}</svg>'


def _points(report: Report) -> Iterator[Point]:
    for row in report.rows:
        for n, (side, figure) in enumerate(row.figures.items()):
            if figure.operations_per_byte and figure.operations_per_s:
                title = f"{row.name}, {side}: {number(figure.median, row.unit)} {row.unit}"
                yield Point(_short(row.name), n, figure.operations_per_byte, figure.operations_per_s, title)


def _short(name: str) -> str:
    return name.replace(" of ", " ").replace(", context ", " @ ").replace("-bit cache", "-bit")


def _scale(points: Sequence[Point], limits: Limits) -> _Scale:
    ridge = limits.operations_per_s / limits.bytes_per_s
    across = [point.operations_per_byte for point in points]
    up = [point.operations_per_s for point in points]
    return _Scale(
        (math.log10(min(*across, ridge) / 2), math.log10(max(*across, ridge) * 2)),
        (math.log10(min(up) / _ROOM), math.log10(max(*up, limits.operations_per_s) * 2)),
    )


def _grid(scale: _Scale) -> Iterator[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for value in _ticks(scale.x):
        x = scale.across(value)
        yield f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>'
    for value in _ticks(scale.y):
        y = scale.up(value)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_in_words(value)}</text>'
    yield f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">operations per byte read</text>'
    yield f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">operations per second</text>'


def _ticks(powers: tuple[float, float]) -> Iterator[float]:
    """Round values between two powers of ten."""
    for power in range(math.floor(powers[0]), math.ceil(powers[1])):
        for digit in (1, 2, 5):
            value = digit * 10.0**power
            if powers[0] <= math.log10(value) <= powers[1]:
                yield value


def _in_words(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def _roof(scale: _Scale, limits: Limits) -> Iterator[str]:
    ridge = limits.operations_per_s / limits.bytes_per_s
    # The slope enters the picture at its left edge or at its bottom, whichever comes later.
    start = max(10.0 ** scale.x[0], 10.0 ** scale.y[0] / limits.bytes_per_s)
    begin = (scale.across(start), scale.up(start * limits.bytes_per_s))
    top = (scale.across(ridge), scale.up(limits.operations_per_s))
    yield f'<path class="roof" d="M{begin[0]:.1f} {begin[1]:.1f}L{top[0]:.1f} {top[1]:.1f}H{WIDTH - _RIGHT}"/>'
    middle = ((begin[0] + top[0]) / 2, (begin[1] + top[1]) / 2)
    angle = math.degrees(math.atan2(top[1] - begin[1], top[0] - begin[0]))
    place = f"translate({middle[0]:.1f} {middle[1] - 8:.1f}) rotate({angle:.1f})"
    reading = f"memory, {limits.bytes_per_s / 1e9:.1f} GB/s"
    yield f'<text class="limit" transform="{place}" text-anchor="middle">{reading}</text>'
    operations = f"{limits.operations_per_s / 1e9:,.0f} G operations/s in {limits.dtype}"
    yield f'<text class="limit" x="{WIDTH - _RIGHT}" y="{top[1] - 8:.1f}" text-anchor="end">{operations}</text>'


def _marks(scale: _Scale, points: Sequence[Point]) -> Iterator[str]:
    for point in points:
        x, y = scale.across(point.operations_per_byte), scale.up(point.operations_per_s)
        shape = (
            f'<circle class="side0" cx="{x:.1f}" cy="{y:.1f}" r="4.5">'
            if point.side == 0
            else f'<rect class="side1" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">'
        )
        kind = "circle" if point.side == 0 else "rect"
        yield f"{shape}<title>{escape(point.title)}</title></{kind}>"


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float

    def meets(self, other: _Box) -> bool:
        apart = self.x + self.width < other.x or other.x + other.width < self.x
        return not apart and abs(self.y - other.y) < _LINE


def _labels(scale: _Scale, points: Sequence[Point]) -> Iterator[str]:
    """A label to the right of each point; where it would cover another, above or below, with a line to its point."""
    places = [(scale.across(point.operations_per_byte), scale.up(point.operations_per_s)) for point in points]
    taken = [_Box(x - 6, y + 4, 12) for x, y in places]
    for point, (x, y) in zip(points, places, strict=True):
        box = _free(_Box(x + 12, y + 4, _LETTER * len(point.label)), taken)
        taken.append(box)
        if abs(box.y - y - 4) > 4:
            yield f'<path class="lead" d="M{x:.1f} {y:.1f}L{box.x - 2:.1f} {box.y - 4:.1f}"/>'
        yield f'<text class="side{point.side}" x="{box.x:.1f}" y="{box.y:.1f}">{escape(point.label)}</text>'


def _free(wanted: _Box, taken: Sequence[_Box]) -> _Box:
    """The nearest place above or below `wanted` that meets nothing."""
    for step in range(HEIGHT // _STEP):
        for y in (wanted.y - step * _STEP, wanted.y + step * _STEP):
            box = _Box(wanted.x, y, wanted.width)
            if _TOP < y < HEIGHT - _BOTTOM and not any(box.meets(other) for other in taken):
                return box
    return wanted
