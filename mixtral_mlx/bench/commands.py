"""The command `bench`: progress on stderr, and what it answers as text and as JSON.

Command lines are read in `cli`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from .. import __version__
from ..budget import fit
from ..config import Quantization
from ..memory import activation_dtype, ram_bytes
from ..opening import located
from ..terminal import Answer, Bar
from ..weights import Checkpoint, dtypes_for, footprint
from ..writing import check_writable, write_output
from . import compare as comparisons
from . import floor, limits, rows, table, turns
from .page import html
from .process import Ready
from .report import (
    Entry,
    Measure,
    ModelInfo,
    Report,
    Settings,
    SideInfo,
    entry,
    in_unit,
    left_out,
    memory_notes,
    notes_of,
)
from .sides import OTHERS, Side, ours, shared

_WITH_ROOM = 1.3


@dataclass(frozen=True)
class Request:
    """What `bench` was asked; a `model` of None is the demo, `against` one of `sides.OTHERS`.

    `memory` is what our side may use, in bytes; None is what this machine can spare. With `ranks` above 1 others share
    the model, and `sharing` are the options that say how."""

    model: str | None
    against: str | None = None
    dtype: str = "auto"
    turns: int = 5
    seconds: int = 20
    groups: tuple[str, ...] = rows.GROUPS
    offline: bool = False
    save: Path | None = None
    output: Path | None = None
    memory: int | None = None
    ranks: int = 1
    sharing: tuple[str, ...] = ()


def bench(request: Request, *, quiet: bool) -> Answer:
    """Run `bench`; Ctrl-C ends it with what there is."""
    for path in filter(None, (request.save, request.output)):
        check_writable(path)
    folder = located(request.model, offline=request.offline, quiet=quiet)
    checkpoint = Checkpoint.open(folder)
    if request.memory is not None and request.ranks == 1:
        # Refused now rather than by a worker, after the limits were measured.
        fit(footprint(checkpoint, *dtypes_for(request.dtype, checkpoint)), request.memory)
    if request.ranks > 1:
        sides = [shared(folder, request.dtype, request.memory, request.ranks, request.sharing)]
    else:
        sides = [ours(folder, request.dtype, request.memory)]
    if request.against:
        sides.append(OTHERS[request.against](folder, request.dtype))
    report = measure(request, checkpoint, sides, quiet=quiet)
    if request.save:
        write_output(request.save, as_json(report))
    if request.output:
        write_output(request.output, html(report))
    return Answer(table.text(report), [report.to_dict()], report.interrupted)


def compare(first: Path, second: Path) -> Answer:
    """Run `bench --compare`."""
    comparison = comparisons.compare(first, second)
    return Answer(comparisons.text(comparison), [comparison.to_dict()])


def measure(request: Request, checkpoint: Checkpoint, sides: Sequence[Side], *, quiet: bool) -> Report:
    """Measure `sides` and report."""
    weighed = floor.weigh(checkpoint)
    wanted = {row: rows.left_out(row, checkpoint.config, request.ranks) for row in rows.all_rows(request.groups)}
    reached = limits.measure(activation_dtype(request.dtype, checkpoint.dtype))
    plan = turns.Plan(
        checkpoint.folder,
        checkpoint.config,
        request.turns,
        request.seconds,
        keep_all=checkpoint.nbytes * len(sides) * _WITH_ROOM < ram_bytes(),
    )
    with _Screen(quiet=quiet) as screen:
        possible = [row for row, reason in wanted.items() if not reason]
        outcome = turns.run(sides, possible, plan, turns.Events(screen.progress, screen.row))
    dtypes = {name: ready.dtype for name, ready in outcome.ready.items()}
    streaming = {name for name, ready in outcome.ready.items() if ready.streams}
    names = [side.name for side in sides]
    shown = _entries(wanted, outcome, Measure(weighed, reached, dtypes, streaming), names)
    settings = Settings(request.dtype, request.turns, request.seconds, request.groups, request.memory)
    infos = tuple(_side_info(side, outcome.ready.get(side.name)) for side in sides)
    side_notes = tuple(f"{side.name}: {side.note}" for side in sides if side.note and "first" in request.groups)
    if request.ranks > 1:
        side_notes += (f"The model is shared by {request.ranks} ranks; limits and floors are of this machine alone.",)
    return Report(
        version=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=limits.this_machine(),
        limits=reached,
        model=_model_info(checkpoint, is_demo=request.model is None),
        settings=settings,
        sides=infos,
        rows=shown,
        notes=(*notes_of(shown, names, reached), *memory_notes(infos, settings), *side_notes),
        interrupted=outcome.interrupted,
    )


def _entries(
    wanted: Mapping[rows.Row, str], outcome: turns.Outcome, how: Measure, names: list[str]
) -> tuple[Entry, ...]:
    """The table's rows in their order: those that were measured, and those that were left out for a reason."""
    found = {measured.row: entry(measured, how) for measured in outcome.measured}
    found |= {row: left_out(row, names, reason) for row, reason in wanted.items() if reason}
    return tuple(found[row] for row in wanted if row in found)


def _model_info(checkpoint: Checkpoint, *, is_demo: bool) -> ModelInfo:
    config = checkpoint.config
    return ModelInfo(
        name="the demo model" if is_demo else config.name,
        folder=checkpoint.folder.resolve().name,
        parameters=config.parameters(),
        nbytes=checkpoint.nbytes,
        layers=config.num_hidden_layers,
        quantization=_bits(config.quantization),
        dtype=checkpoint.dtype,
    )


def _bits(quantization: Quantization | None) -> str:
    if not quantization:
        return "not quantized"
    bits = {packing.bits for packing in (quantization.default, *quantization.overrides.values()) if packing}
    return f"{' and '.join(map(str, sorted(bits)))} bits"


def _side_info(side: Side, ready: Ready | None) -> SideInfo:
    return SideInfo(side.name, ready.version, ready.dtype, ready.memory) if ready else SideInfo(side.name, "", "")


class _Screen:
    """Shows progress: one bar, or where there is no terminal a line for each row."""

    def __init__(self, *, quiet: bool) -> None:
        self.lines = not quiet and not sys.stderr.isatty()
        self.bar = Bar("Measuring", quiet=quiet)

    def __enter__(self) -> _Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.__exit__()

    def progress(self, done: int, total: int) -> None:
        self.bar(done, total)

    def row(self, measured: turns.Measured) -> None:
        if self.lines:
            print(f"{measured.row.name}: {_brief(measured)}", file=sys.stderr, flush=True)


def _brief(measured: turns.Measured) -> str:
    """What a row brought, in a few words."""
    row, words = measured.row, []
    for name, samples in measured.samples.items():
        values = [in_unit(row, value, samples.tokens) for value in samples.values]
        unit = "" if row.unit == "bytes" else f" {row.unit}"
        words.append(f"{name} {table.number(median(values), row.unit)}{unit}" if values else f"{name} –")
    return ", ".join(words)


def as_json(report: Report) -> str:
    """What `--save` writes."""
    return json.dumps(report.to_dict(), ensure_ascii=False, indent=1)
