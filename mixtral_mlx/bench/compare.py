"""Two saved reports side by side: each figure's change, and what else changed between the runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .report import Report, read
from .table import aligned, number

_LIMITS_ALIKE = 0.05


@dataclass(frozen=True)
class Difference:
    """Something besides the figures that is not the same in both runs."""

    what: str
    first: str
    second: str


@dataclass(frozen=True)
class Change:
    """A side's figure in both runs, the second divided by the first, and each run's own ratio of its two sides."""

    row: str
    side: str
    unit: str
    better: str
    first: float | None
    second: float | None
    ratio: float | None
    first_ratio: float | None
    second_ratio: float | None


@dataclass(frozen=True)
class Comparison:
    """What changed from one run to another."""

    first: str
    second: str
    differences: tuple[Difference, ...]
    changes: tuple[Change, ...]

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints. Its names are kept."""
        return {"kind": "mixtral-mlx bench comparison", "format": 1, **asdict(self)}


def compare(first: Path, second: Path) -> Comparison:
    """Read two reports and compare them; raises `BenchError`."""
    a, b = read(first), read(second)
    return Comparison(str(first), str(second), tuple(_differences(a, b)), tuple(_changes(a, b)))


def _differences(a: Report, b: Report) -> Iterator[Difference]:
    yield from _fields("machine", asdict(a.machine), asdict(b.machine))
    yield from _fields("model", asdict(a.model), asdict(b.model))
    yield from _fields("settings", asdict(a.settings), asdict(b.settings))
    yield from _fields("run", {"interrupted": a.interrupted}, {"interrupted": b.interrupted})
    sides = ({side.name: f"{side.version} ({side.dtype})" for side in report.sides} for report in (a, b))
    yield from _fields("side", *sides)
    limits = (asdict(report.limits) for report in (a, b))
    yield from (d for d in _fields("limits", *limits) if not _alike(d))


def _fields(what: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[Difference]:
    for name in [*a, *(name for name in b if name not in a)]:
        if a.get(name) != b.get(name):
            yield Difference(f"{what}, {name}", _shown(a.get(name)), _shown(b.get(name)))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return ",".join(map(str, value)) if isinstance(value, tuple) else "–" if value is None else str(value)


def _alike(difference: Difference) -> bool:
    """Whether two measured limits differ by no more than they do from run to run."""
    if not difference.what.endswith("per_s"):
        return False
    first, second = float(difference.first), float(difference.second)
    return abs(first - second) <= _LIMITS_ALIKE * max(first, second)


def _changes(a: Report, b: Report) -> Iterator[Change]:
    old, new = ({row.name: row for row in report.rows} for report in (a, b))
    for name, row in {**old, **new}.items():
        before, after = old.get(name), new.get(name)
        for side in dict.fromkeys([*(before or row).figures, *row.figures]):
            medians = [r.figures[side].median if r and side in r.figures else None for r in (before, after)]
            first, second = medians
            ratio = second / first if first and second else None
            ratios = (r.ratio if r else None for r in (before, after))
            if first is not None or second is not None:
                yield Change(name, side, row.unit, row.better, first, second, ratio, *ratios)


def text(comparison: Comparison) -> str:
    """The comparison people read."""
    both = f"A is {comparison.first}, B is {comparison.second}; for s and bytes less is better"
    rows = [["", "", "A", "B", "B ÷ A", "ratio in A", "ratio in B"], *map(_cells, comparison.changes)]
    return "\n".join([both, "", *aligned(rows), "", *_told(comparison.differences)])


def _cells(change: Change) -> list[str]:
    unit = "" if change.unit == "bytes" else f" {change.unit}"
    figures = [number(value, change.unit) + (unit if value else "") for value in (change.first, change.second)]
    ratios = [number(value, "") for value in (change.ratio, change.first_ratio, change.second_ratio)]
    return [change.row, change.side, *figures, *ratios]


def _told(differences: tuple[Difference, ...]) -> list[str]:
    if not differences:
        return ["Machine, model and settings are the same."]
    return ["What else differs:", *(f"- {d.what}: {d.first} → {d.second}" for d in differences)]
