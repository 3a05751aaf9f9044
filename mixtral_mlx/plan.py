"""The command `plan`: which Mixtral runs in how much memory, how, and how fast that should be.

Puts together what `memory`, `budget` and `speeds` say and shows it as a table, with its arithmetic, or as data. Loads
no model; command lines are read in `cli`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import speeds as machine_speeds
from .budget import (
    BANDWIDTH_SHARE,
    NOT_OVERLAPPED,
    OPERATIONS_SHARE,
    BudgetError,
    Footprint,
    Plan,
    SizeError,
    Speed,
    Speeds,
    expected_speed,
    fit,
    in_gb,
)
from .config import KNOWN, Config, MixtralError, recipe
from .memory import Machine, default_budget, machine
from .terminal import Answer, CtrlC, notice

if TYPE_CHECKING:
    from .distributed.outlook import Wire

PRECISE_FIRST = ("q8", "q6", "q5", "q4", "q3", "q2")


class PlanError(MixtralError):
    """A model that nothing is known about."""


@dataclass(frozen=True)
class Request:
    """What to plan for: a model or all published ones; budgets, Macs by their RAM, or this machine.

    `hosts` are Macs by their RAM that share a model, over a `link`."""

    model: str | None = None
    memory: tuple[int, ...] = ()
    ram: tuple[int, ...] = ()
    context: int | None = None
    kv_bits: int | None = None
    measure: bool = False
    explain: bool = False
    hosts: tuple[int, ...] = ()
    link: Wire | None = None


@dataclass(frozen=True)
class Place:
    """Somewhere to run: a budget, and the speeds there.

    `computed` is the dtype computed in, `held` the one floats are kept in; None leaves each as the model has it."""

    label: str
    budget_bytes: int
    speeds: Speeds
    computed: str | None = None
    held: str | None = None


@dataclass(frozen=True)
class Own:
    """A model in a folder: its configuration, and its tensors' bytes if there are files yet."""

    config: Config
    stored: Mapping[str, int] | None = None

    @classmethod
    def read(cls, folder: Path) -> Own:
        """Read headers only; raises `ConfigError` or `WeightsError`."""
        from .weights import Checkpoint

        if not any(folder.glob("*.safetensors")):
            return cls(Config.read(folder))
        checkpoint = Checkpoint.open(folder)
        stored = {tensor.name: tensor.nbytes for tensor in checkpoint.tensors}
        return cls(replace(checkpoint.config, dtype=checkpoint.dtype), stored)

    @property
    def recipe(self) -> str:
        packing = self.config.packing("model.layers.0.block_sparse_moe.switch_mlp.gate_proj")
        return f"at {packing.bits} bits" if packing else f"in {self.config.dtype}"


@dataclass(frozen=True)
class Candidate:
    """A model at a recipe, as it is held in memory."""

    model: str
    recipe: str
    footprint: Footprint

    @property
    def name(self) -> str:
        return f"{self.model} {self.recipe}".rstrip()


@dataclass(frozen=True)
class Row:
    """A candidate at a place: its plan and speed, or why there is none."""

    place: Place
    candidate: Candidate
    plan: Plan | None = None
    speed: Speed | None = None
    refusal: BudgetError | SizeError | None = None


def plan(request: Request, *, quiet: bool = False) -> Answer:
    """Run `plan`. Raises `MixtralError`."""
    folder = _folder(request.model)
    own = Own.read(folder) if folder else None
    if request.hosts:
        return _over_hosts(request, own)
    measured, not_kept = _measure(folder, quiet=quiet) if request.measure else (None, "")
    rows = [row for place in _places(request, measured) for row in _rows(place, own, request)]
    plans = {"plans": [_entry(row) for row in rows]}
    if not_kept:
        return Answer(f"{_text(rows, request)}\n{_folded(not_kept)}", [plans | {"not_kept": not_kept}])
    return Answer(_text(rows, request), [plans])


def outlook(folder: Path) -> str:
    """In a line: how the model in `folder` will run on this machine."""
    (place,) = _places(Request())
    (row,) = _rows(place, Own.read(folder), Request())
    if row.plan is None or row.speed is None:
        return f"does not run here: {_short_reason(row)} of memory, and may use {in_gb(place.budget_bytes)}"
    speed = f"about {_tps(row.speed.decode_tps)} tokens/s (computed)"
    return f"runs here within {in_gb(place.budget_bytes)}: {_how(row)}, {speed}"


def _over_hosts(request: Request, own: Own | None) -> Answer:
    from .distributed import outlook

    wire = request.link or outlook.THUNDERBOLT
    macs = [_mac(ram) for ram in request.hosts]
    hosts = [outlook.Host(mac.label, mac.budget_bytes, mac.speeds) for mac in macs]
    if own:
        models = {f"{own.config.name} {own.recipe}": own.config}
    else:
        models = {f"{name} q4": replace(known, quantization=recipe(known, "q4")) for name, known in KNOWN.items()}
    found = [
        one
        for name, config in models.items()
        for one in outlook.outlooks(config, name, hosts, wire, context=request.context, kv_bits=request.kv_bits)
    ]
    return Answer(outlook.text(found, wire), [{"splits": outlook.entries(found)}])


# Where, and what.


def _folder(model: str | None) -> Path | None:
    from .weights import WeightsError, locate

    if not model:
        return None
    try:
        return locate(None if model == "demo" else model, offline=True)
    except WeightsError as error:
        if error.code != "no_model":
            raise
        raise PlanError(
            f"{model} is no folder, and no repository that was fetched to this machine.",
            code="no_model",
            hint="Give a folder, which needs no more than a config.json; or leave --model out for the published sizes.",
        ) from None


def _measure(folder: Path | None, *, quiet: bool) -> tuple[Speeds, str]:
    """What was measured, kept for later plans; and why it was not, if so."""
    with notice("Measuring the SSD and the memory …", quiet=quiet), CtrlC() as stopped:
        measured = machine_speeds.measure("float16", folder, stopped=stopped)
    try:
        machine_speeds.keep(measured, machine().chip)
    except machine_speeds.SpeedError as error:
        return measured, f"What was measured is not kept for later plans: {error}"
    return measured, ""


def _places(request: Request, measured: Speeds | None = None) -> list[Place]:
    macs = [_mac(ram) for ram in request.ram]
    if macs and not request.memory:
        return macs
    here = _here(measured)
    budgets = [replace(here, label=in_gb(size), budget_bytes=size) for size in request.memory]
    return [*budgets, *macs] or [here]


def _here(measured: Speeds | None) -> Place:
    from . import cpu

    here = machine(ask_metal=True)
    speeds = measured or machine_speeds.kept(here.chip) or machine_speeds.assumed(here).speeds
    computed = "float32" if cpu.is_backend() else None
    held = None if cpu.is_available() else computed  # As `weights.dtypes_for` decides.
    return Place("this machine", default_budget(here), speeds, computed, held)


def _mac(ram: int) -> Place:
    there = Machine(ram, ram, "Apple")
    return Place(f"{ram / 2**30:g} GB Mac", default_budget(there), machine_speeds.assumed(there).speeds)


def _rows(place: Place, own: Own | None, request: Request) -> Iterator[Row]:
    if own:
        footprint = _footprint(own.config, place.computed, place.held, request.kv_bits, own.stored)
        yield _row(place, Candidate(own.config.name, own.recipe, footprint), request.context)
        return
    for model in KNOWN:
        yield from _best(place, model, request)


def _best(place: Place, model: str, request: Request) -> list[Row]:
    """What somebody with so much memory wants to know of a model: the most precise recipe that is resident; and, where
    that is less than q4, q4 streamed, or what comes nearest to it."""
    rows = [_row(place, _published(model, name, place, request), request.context) for name in PRECISE_FIRST]
    resident = [row for row in rows if row.plan and row.plan.mode == "resident"][:1]
    q4 = PRECISE_FIRST.index("q4")
    if resident and resident[0] in rows[: q4 + 1]:
        return resident
    running = [row for row in rows[q4:] if row.plan]
    if not running:
        return rows[-1:]
    # Where q4 does not run at all, that is worth knowing too.
    streamed = rows[q4 : q4 + 1] if rows[q4].plan else [rows[q4], *running[:1]]
    return resident + [row for row in streamed if row not in resident]


def _row(place: Place, candidate: Candidate, context: int | None) -> Row:
    try:
        found = fit(candidate.footprint, place.budget_bytes, context=context)
    except (BudgetError, SizeError) as error:
        return Row(place, candidate, refusal=error)
    return Row(place, candidate, found, expected_speed(found, candidate.footprint, place.speeds))


def _published(model: str, name: str, place: Place, request: Request) -> Candidate:
    return Candidate(model, name, _published_footprint(model, name, place.computed, place.held, request.kv_bits))


@cache
def _published_footprint(
    model: str, name: str, computed: str | None, held: str | None, kv_bits: int | None
) -> Footprint:
    config = replace(KNOWN[model], quantization=recipe(KNOWN[model], name))
    return _footprint(config, computed, held, kv_bits)


def _footprint(
    config: Config,
    computed: str | None,
    held: str | None,
    kv_bits: int | None,
    stored: Mapping[str, int] | None = None,
) -> Footprint:
    """`stored` are the bytes of the tensors there are; without them, those that follow from the configuration."""
    specs = config.tensors(lambda path: stored is None or f"{path}.scales" in stored)
    sizes = stored
    if stored is None or held:
        sizes = {name: spec.nbytes(held or config.dtype) for name, spec in specs.items()}
    return Footprint.of(config, computed or config.dtype, kv_bits, sizes)


# Shown to people.

_HEAD = ("memory", "budget", "model", "runs", "context", "tok/s", "prompt tok/s")
_LEFT = 4  # The first columns are words.


def _text(rows: Sequence[Row], request: Request) -> str:
    table = [_HEAD, *(_cells(row, before) for row, before in zip(rows, [None, *rows], strict=False))]
    widths = [max(len(cells[n]) for cells in table) for n in range(len(_HEAD))]
    head, *lines = (_line(cells, widths) for cells in table)
    if request.explain:
        lines = [_with_sums(line, row) for line, row in zip(lines, rows, strict=True)]
    return "\n".join([head, *lines, *([] if request.explain else [""]), *_notes(rows)])


def _with_sums(line: str, row: Row) -> str:
    sums = [f"    {line}" for line in explained(row)]
    return "\n".join([line, *sums, ""])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell.ljust(width) if n < _LEFT else cell.rjust(width)
        for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded).rstrip()


def _cells(row: Row, before: Row | None) -> tuple[str, ...]:
    again = before is not None and before.place is row.place
    where = ("", "") if again else (row.place.label, in_gb(row.place.budget_bytes))
    if row.plan is None or row.speed is None:
        return (*where, row.candidate.name, f"no: {_short_reason(row)}", "", "", "")
    speeds = _tps(row.speed.decode_tps), _tps(row.speed.prompt_tps)
    return (*where, row.candidate.name, _how(row), f"{row.plan.context:,}", *speeds)


def _how(row: Row) -> str:
    assert row.plan
    if row.plan.mode == "resident":
        return "resident"
    return f"streamed, {row.plan.slots_per_layer:g} of {row.candidate.footprint.experts} experts in memory"


def _short_reason(row: Row) -> str:
    if isinstance(row.refusal, BudgetError):
        return f"needs {in_gb(row.refusal.need_bytes)}"
    return f"context at most {row.candidate.footprint.max_context:,}"


def _tps(speed: float) -> str:
    return f"{speed:.2f}" if speed < 1 else f"{speed:.1f}" if speed < 20 else f"{speed:,.0f}"


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = [_why_not(row) for row in rows if row.refusal]
    notes.append("Computed, not measured; decoding with a short context, and long prompts.")
    if any(row.plan and row.plan.mode == "streamed" for row in rows):
        notes[-1] += " Streamed: so many experts of each layer are in memory, others are read from the SSD when needed."
    notes += [_speeds_in_words(row.place.speeds) for row in rows]
    notes = list(dict.fromkeys(notes))
    return [_folded(note) for note in notes]


def _folded(note: str) -> str:
    # A path stays in one piece, to be copied.
    return textwrap.fill(note, _WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


_WIDTH = 100


def _why_not(row: Row) -> str:
    assert row.refusal
    if not isinstance(row.refusal, BudgetError):
        return f"{row.candidate.name}: {row.refusal}"
    parts = ", ".join(f"{name} {in_gb(size)}" for name, size in row.refusal.parts.items() if size)
    return (
        f"{row.candidate.name} needs {in_gb(row.refusal.need_bytes)} even with one expert of each layer in memory: "
        f"{parts}."
    )


def _speeds_in_words(speeds: Speeds) -> str:
    how = "measured here" if speeds.source == "measured" else "assumed"
    kinds = [kind.name for kind in (*machine_speeds.MACS, machine_speeds.PC) if kind.speeds is speeds]
    of = f" for {kinds[0]}" if kinds else ""
    ssd, memory = speeds.ssd_bytes_per_s / 1e9, speeds.memory_bytes_per_s / 1e9
    return f"Speeds {how}{of}: SSD {ssd:.1f} GB/s, memory {memory:.0f} GB/s."


def explained(row: Row) -> list[str]:
    """The arithmetic behind a row, in lines; why there is no plan stands below the table."""
    if row.plan is None or row.speed is None:
        return []
    found, speed, model, speeds = row.plan, row.speed, row.candidate.footprint, row.place.speeds
    layers = len(found.slots)
    details = {
        "dense": "all that is no expert",
        "experts": f"{sum(found.slots)} of {layers * model.experts}, {in_gb(sum(model.expert_bytes) / layers)} each",
        "kv cache": f"{found.context:,} tokens × {in_gb(model.kv_bytes_per_token)}, and one layer twice",
        "working memory": f"{found.chunk_tokens:,} tokens of a prompt at once",
    }
    parts = [
        f"{name} {in_gb(size)}" + (f" ({details[name]})" if name in details else "")
        for name, size in found.parts.items()
    ]
    return [
        f"{in_gb(found.needed_bytes)} of {in_gb(found.budget_bytes)}:",
        *(f"  {part}" for part in parts),
        f"a token: {in_gb(speed.touched_bytes)} touched ÷ ({BANDWIDTH_SHARE:g} × "
        f"{in_gb(speeds.memory_bytes_per_s)}/s) = {speed.compute_s:.3f} s",
        f"  {speed.hit_rate:.0%} of the experts needed are there; {in_gb(speed.missed_bytes)} missed ÷ "
        f"{in_gb(speeds.ssd_bytes_per_s)}/s = {speed.read_s:.3f} s",
        f"  the longer + {NOT_OVERLAPPED:g} × the shorter = {1 / speed.decode_tps:.3f} s",
        f"a chunk of {found.chunk_tokens:,}: {in_gb(speed.chunk_bytes)} of experts not there ÷ "
        f"{in_gb(speeds.ssd_bytes_per_s)}/s = {_short(speed.chunk_read_s)} s",
        f"  2 × {_short(model.parameters_per_token / 1e9)} G × {found.chunk_tokens:,} operations ÷ "
        f"({OPERATIONS_SHARE:g} × {speeds.operations_per_s / 1e12:.2g} T/s) = {_short(speed.chunk_compute_s)} s",
    ]


def _short(number: float) -> str:
    """One digit after the point; below 0.1, where that would be none that counts, two that do."""
    return f"{number:.1f}" if number >= 0.1 else f"{number:.2g}"


# Shown to programs.


def _entry(row: Row) -> dict[str, Any]:
    found, speed = row.plan, row.speed
    entry: dict[str, Any] = {
        "memory": row.place.label,
        "budget_bytes": row.place.budget_bytes,
        "model": row.candidate.model,
        "recipe": row.candidate.recipe,
        "mode": found.mode if found else None,
        "slots_per_layer": found.slots_per_layer if found else None,
        "experts": row.candidate.footprint.experts,
        "context": found.context if found else None,
        "chunk_tokens": found.chunk_tokens if found else None,
        "parts": dict(found.parts) if found else None,
        "generation_tps": round(speed.decode_tps, 3) if speed else None,
        "prompt_tps": round(speed.prompt_tps, 3) if speed else None,
        "hit_rate": round(speed.hit_rate, 4) if speed else None,
        "speeds": asdict(row.place.speeds),
    }
    if row.refusal:
        need = row.refusal.need_bytes if isinstance(row.refusal, BudgetError) else None
        entry["refused"] = {"code": row.refusal.code, "message": str(row.refusal), "need_bytes": need}
    return entry
