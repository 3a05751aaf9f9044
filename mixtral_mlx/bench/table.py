"""A report as text to read, aligned and plain, and as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..session import shown_bytes
from .report import Entry, Figure, Report


def text(report: Report) -> str:
    """The table people read: what was measured, the rows, the notes."""
    blocks = [[*heading(report), ""], aligned(_cells(report))]
    if streamed := streamed_cells(report):
        blocks.append(["", *aligned(streamed)])
    blocks.append(["", *(f"- {note}" for note in all_notes(report))])
    if report.interrupted:
        blocks.append(["", "Interrupted: these are the rows there were time for."])
    return "\n".join(line for block in blocks for line in block)


def heading(report: Report) -> list[str]:
    """Who was measured, on what, where and how."""
    model, machine, limits, settings = report.model, report.machine, report.limits, report.settings
    sides = " next to ".join(f"{s.name} {s.version} ({s.dtype})" if s.version else s.name for s in report.sides)
    return [
        f"{sides}: {_turns(settings.turns)}" + (", interleaved" if len(report.sides) > 1 else ""),
        f"{model.name}: {model.layers} layers, {model.quantization}, {shown_bytes(model.nbytes)}",
        *_budgets(report),
        f"{machine.system}, {machine.processor or 'unknown processor'}, {machine.cores} cores, "
        f"{shown_bytes(machine.ram_bytes)}, MLX {machine.mlx} on the {limits.device.upper()}",
        f"limits: {limits.bytes_per_s / 1e9:.1f} GB/s, {limits.operations_per_s / 1e9:,.0f} G operations/s in "
        f"{limits.dtype}",
    ]


def _budgets(report: Report) -> Iterator[str]:
    """What each side makes of its budget, where one was asked for or the model had no room."""
    for side in report.sides:
        if side.memory and (side.streams or report.settings.memory_bytes is not None):
            memory = side.memory
            slots = f"{memory.slots_per_layer:g} experts of each layer in memory"
            yield f"{side.name} within {shown_bytes(memory.budget_bytes)}: {memory.mode}, {slots}"


def streamed_cells(report: Report) -> list[list[str]]:
    """What decoded tokens of a streamed model took, as a table with a head; empty where none was."""
    head = ["each decoded token", "", "experts in memory", "read from SSD", "reading", "waiting", "guesses come true"]
    rows = [
        [
            row.name,
            name,
            percent(took.hit_rate),
            amount(took.bytes_read),
            f"{number(1000 * took.io_s, 'ms')} ms",
            f"{number(1000 * took.stall_s, 'ms')} ms",
            percent(took.guesses_true),
        ]
        for row in report.rows
        for name, figure in row.figures.items()
        if (took := figure.streamed)
    ]
    return [head, *rows] if rows else []


def _turns(count: int) -> str:
    return f"{count} turn{'s' if count != 1 else ''}"


def _cells(report: Report) -> list[list[str]]:
    names = [side.name for side in report.sides]
    head = ["", "", *(word for name in names for word in (name, "±", "of floor")), "read/token"]
    if len(names) == 2:
        head.append("ratio")
    return [head, *(_row_cells(row, names) for row in report.rows)]


def _row_cells(row: Entry, names: Sequence[str]) -> list[str]:
    cells = [row.name, "" if row.unit == "bytes" else row.unit]
    for name in names:
        figure = row.figures[name]
        mark = "*" if figure.shortened else ""
        cells += [number(figure.median, row.unit) + mark, spread(figure), share(figure)]
    per_token = row.figures[names[0]].bytes_per_token
    cells.append(amount(per_token) if per_token else "")
    return [*cells, shown_ratio(row)] if len(names) == 2 else cells


def number(value: float | None, unit: str) -> str:
    """A figure in three digits or more, `–` where there is none."""
    if value is None:
        return "–"
    if unit == "bytes":
        return amount(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def amount(count: float) -> str:
    """Bytes in three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"


def spread(figure: Figure) -> str:
    """Half of the way from the lowest to the highest, in per cent of the median."""
    if not figure.median or figure.lowest is None or figure.highest is None or len(figure.values) < 2:
        return ""
    return f"{50 * (figure.highest - figure.lowest) / figure.median:.0f} %"


def share(figure: Figure) -> str:
    """How much of its floor a figure reaches, in per cent."""
    return "" if figure.floor_share is None else percent(figure.floor_share)


def percent(value: float | None) -> str:
    """A share in two digits or more, `–` where there is none."""
    if value is None:
        return "–"
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.2g} %"


def shown_ratio(row: Entry) -> str:
    """The ratio, after a `~` where the two sides read prompts of different lengths."""
    if row.ratio is None:
        return "–"
    lengths = {figure.tokens for figure in row.figures.values() if row.group == "prompt"}
    return ("~" if len(lengths) > 1 else "") + (f"{row.ratio:,.0f}" if row.ratio >= 100 else f"{row.ratio:#.3g}")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells in columns, the first two to the left, the others to the right."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lefts = 2
    lines = [[*map(str.ljust, row[:lefts], widths), *map(str.rjust, row[lefts:], widths[lefts:])] for row in rows]
    return ["  ".join(line).rstrip() for line in lines]


def all_notes(report: Report) -> list[str]:
    """What was left out or shortened, and why, then what holds for all rows."""
    found: dict[str, list[str]] = {}
    for row in report.rows:
        for note, where in _reasons(row):
            found.setdefault(note, []).append(where)
    missing = [f"{'; '.join(where)}: {note}" for note, where in found.items()]
    short = [note for row in report.rows if (note := _shortened(row))]
    return [*missing, *([f"* shortened to fit the time: {'; '.join(short)}"] if short else []), *report.notes]


def _reasons(row: Entry) -> Iterator[tuple[str, str]]:
    """Why a row lacks figures, and of whom: of nobody by name where all sides lack it for one reason."""
    reasons = {figure.reason for figure in row.figures.values()}
    if len(reasons) == 1:
        yield from ((reason, row.name) for reason in reasons if reason)
    else:
        yield from ((figure.reason, f"{row.name} ({name})") for name, figure in row.figures.items() if figure.reason)


def _shortened(row: Entry) -> str:
    """What a row was shortened to, side by side; empty if it was not."""
    if not any(figure.shortened for figure in row.figures.values()):
        return ""
    run = " and ".join(f"{figure.tokens:,}" for figure in row.figures.values() if figure.tokens)
    return f"{row.name}: {run} {'steps' if 'context' in row.name else 'tokens'}"


def markdown(report: Report) -> str:
    """The table as Markdown, with a line on what was measured below it."""
    names = [side.name for side in report.sides]
    head = ["", *(word for name in names for word in (name, "of floor"))] + (["ratio"] if len(names) == 2 else [])
    rows = [_markdown_row(row, names) for row in report.rows if any(f.values for f in row.figures.values())]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", f"{'; '.join(heading(report))}. Medians; ratios of s and bytes: less is better."])


def _markdown_row(row: Entry, names: Sequence[str]) -> list[str]:
    cells = [row.name]
    for name in names:
        figure = row.figures[name]
        unit = "" if row.unit == "bytes" or figure.median is None else f" {row.unit}"
        short = f" (shortened to {figure.shortened:,})" if figure.shortened else ""
        cells += [f"{number(figure.median, row.unit)}{unit}{short}", share(figure)]
    return [*cells, shown_ratio(row)] if len(names) == 2 else cells
