"""A report as one self-contained HTML page: the table, the picture, the notes. It asks no server for anything."""

from __future__ import annotations

from html import escape

from .report import Entry, Report
from .roofline import svg
from .table import all_notes, amount, heading, number, share, shown_ratio, spread, streamed_cells

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --dim: #6b6b70; --line: #dcdce0; --page: #fff;
  --a: #0a62c9; --b: #c2410c }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --dim: #9a9aa2; --line: #3a3a40; --page: #161618; --a: #6cb2ff; --b: #ff9a62 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1000px;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem }
p, li { color: var(--dim); font-size: 13px }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left }
td small { color: var(--dim) }
.side0 { color: var(--a); fill: var(--a) } .side1 { color: var(--b); fill: var(--b) }
svg { width: 100%; height: auto; font-size: 11px; fill: var(--dim) }
svg rect.side1 { fill: var(--page); stroke: var(--b); stroke-width: 2 }
.grid { stroke: var(--line); fill: none } .lead { stroke: var(--dim); stroke-width: .5; fill: none }
.roof { stroke: var(--ink); stroke-width: 2; fill: none } .limit { fill: var(--ink) }
"""


def html(report: Report) -> str:
    """The whole page."""
    title = f"{report.model.name}: {' next to '.join(side.name for side in report.sides)}"
    first, *rest = heading(report)
    facts = "".join(f"<p>{escape(line)}</p>" for line in (first, *rest, f"measured {report.date}"))
    notes = "".join(f"<li>{escape(note)}</li>" for note in all_notes(report))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1>{facts}<div class="wide">{_table(report)}{_streamed(report)}</div>{_picture(report)}'
        f"<ul>{notes}</ul></body></html>\n"
    )


def _picture(report: Report) -> str:
    drawn = svg(report)
    if not drawn:
        return ""
    names = " · ".join(
        f'<span class="side{n}">{"●" if n == 0 else "□"} {escape(side.name)}</span>'
        for n, side in enumerate(report.sides)
    )
    return f"<h2>Under the machine's limits</h2><p>{names}</p>{drawn}"


def _table(report: Report) -> str:
    names = [side.name for side in report.sides]
    sides = "".join(f'<th class="side{n}">{escape(name)}</th><th>of floor</th>' for n, name in enumerate(names))
    last = "<th>ratio</th>" if len(names) == 2 else ""
    rows = "".join(_row(row, names) for row in report.rows)
    return f"<table><tr><th></th>{sides}<th>read/token</th>{last}</tr>{rows}</table>"


def _streamed(report: Report) -> str:
    if not (cells := streamed_cells(report)):
        return ""
    head, *rows = cells
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _row(row: Entry, names: list[str]) -> str:
    cells = []
    for name in names:
        figure = row.figures[name]
        unit = "" if row.unit == "bytes" or figure.median is None else f" {row.unit}"
        mark = "*" if figure.shortened else ""
        around = f" <small>± {spread(figure)}</small>" if spread(figure) else ""
        value = f"{number(figure.median, row.unit)}{mark}{unit}{around}"
        cells += [f'<td title="{escape(figure.reason)}">{value}</td>', f"<td>{share(figure)}</td>"]
    per_token = row.figures[names[0]].bytes_per_token
    cells.append(f"<td>{amount(per_token) if per_token else ''}</td>")
    if len(names) == 2:
        cells.append(f"<td>{shown_ratio(row)}</td>")
    return f"<tr><td>{escape(row.name)}</td>{''.join(cells)}</tr>"
