"""The picture of a report as one self-contained HTML page. It asks no server for anything.

The picture itself is SVG and needs no script; the page's own says what is under the pointer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from .report import Report, shown, table
from .view import (
    COLUMN,
    EVEN,
    GAP,
    HOW_TO_READ,
    LOAD,
    MEANINGS,
    PALETTE,
    TITLE,
    Bands,
    colour,
    heading,
    ink_on,
    label,
    row_height,
    shares,
    stretches,
)

MOST_TOKENS = 720
_LABELS, _NUMBERS, _BELOW = 116, 38, 26

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --dim: #6b6b70; --line: #dcdce0; --page: #fff; --answer: #0b57b0;
  --track: #f1f1f4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --dim: #9a9aa2; --line: #3a3a40; --page: #161618; --answer: #7db8ff; --track: #242428 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1640px;
  margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1rem; margin: 0 0 .25rem }
p { color: var(--dim); font-size: 14px; margin: .25rem 0 }
main { display: flex; flex-wrap: wrap; gap: 2rem 3rem; align-items: flex-start; margin-top: 1.5rem }
.bands { flex: 1 1 640px; min-width: 0; overflow-x: auto }
.bands svg { display: block; max-width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: var(--dim) }
.load { overflow-x: auto }
.bar span { display: block }
.key span { display: inline-block; width: 2rem; text-align: center; margin-right: .25rem; font-size: 13px }
.prompt { fill: var(--ink) } .answer { fill: var(--answer) }
.under.prompt { fill: var(--dim) } .under.gap { fill: var(--line) }
.labels { font-size: 13px } .digits { font-size: 11px; text-anchor: middle; pointer-events: none }
.black { fill: #000 } .white { fill: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin-bottom: 1.5rem }
th, td { text-align: right; padding: .1rem .5rem; white-space: nowrap; font-weight: normal }
th { color: var(--dim) } tr > :first-child { text-align: left }
.load td.bar, .load th.bar { padding: 0 4px 0 0; text-align: center }
.bar i { display: block; position: relative; width: 34px; height: 16px; background: var(--track) }
.bar i b { position: absolute; inset: 0 auto 0 0 } .bar i u { position: absolute; top: 0; bottom: 0; width: 1px;
  background: var(--ink); box-shadow: 0 0 0 1px var(--page) }
#tip { position: fixed; display: none; pointer-events: none; padding: .4rem .6rem; font-size: 13px; line-height: 1.35;
  background: var(--ink); color: var(--page); border-radius: 6px; white-space: pre; max-width: 90vw; z-index: 1 }
"""

_SCRIPT = """
const routes = JSON.parse(document.getElementById("routes").textContent), tip = document.getElementById("tip");
for (const svg of document.querySelectorAll(".bands svg")) {
  const numbers = JSON.parse(svg.dataset.tokens);
  svg.addEventListener("pointerleave", () => tip.style.display = "none");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const column = Math.floor(((event.clientX - box.left) * scale - routes.left) / routes.column);
    const layer = Math.floor(((event.clientY - box.top) * scale - routes.top) / routes.row);
    const number = numbers[column];
    if (number == null || layer < 0 || layer >= routes.layers) { tip.style.display = "none"; return }
    const [name, part, experts, weights] = routes.tokens[number];
    const said = experts[layer].map((expert, n) => `expert ${expert}: ${weights[layer][n]} %`);
    tip.textContent = [`${name}   (token ${number}, ${part})`, `layer ${layer}`, ...said].join("\\n");
    tip.style.display = "block";
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
}
"""


def html(report: Report) -> str:
    """The whole page."""
    bands = Bands.of(report, MOST_TOKENS)
    key = "".join(_swatch(n) for n in range(report.experts))
    meanings = "".join(f"<p>{meaning}</p>" for meaning in MEANINGS)
    pictures = "".join(_svg(report, row) for row in bands.rows)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}: {escape(report.model)}</title><style>{_STYLE}{_fills()}</style></head><body>"
        f"<h1>{TITLE}</h1><p>{escape(heading(report))}</p><p>{HOW_TO_READ} {bands.note}</p>"
        f'<p class="key">expert {key}</p><main><div class="bands">{pictures}</div>'
        f'<div class="load"><h2>{LOAD}</h2><p>{EVEN}</p>{_load(report)}{_table(report)}{meanings}</div></main>'
        f'<div id="tip" role="status"></div><script type="application/json" id="routes">{_data(report, bands)}</script>'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _swatch(expert: int) -> str:
    return f'<span style="background:{colour(expert)};color:{ink_on(colour(expert))}">{expert}</span>'


def _fills() -> str:
    return "".join(f".e{n} {{ fill: {fill} }}\n" for n, fill in enumerate(PALETTE))


def _svg(report: Report, row: tuple[int | None, ...]) -> str:
    """A band of tokens."""
    height = _LABELS + report.layers * row_height(report.layers) + _BELOW
    width = _NUMBERS + len(row) * COLUMN
    parts = [*_names(report, row), *_cells(report, row), *_stretches(report, row, height - _BELOW)]
    words = f"Experts of {len(row)} tokens in {report.layers} layers"
    tokens = json.dumps(row)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{words}" '
        f'data-tokens="{tokens}">{"".join(parts)}</svg>'
    )


def _names(report: Report, row: tuple[int | None, ...]) -> Iterator[str]:
    """What stands beside the layers and above the tokens."""
    yield f'<text x="{_NUMBERS - 8}" y="{_LABELS - 8}" text-anchor="end">layer</text>'
    high = row_height(report.layers)
    for layer in range(0, report.layers, 1 if report.layers <= 12 else 4):
        y = _LABELS + layer * high + high / 2 + 3
        yield f'<text x="{_NUMBERS - 8}" y="{y:g}" text-anchor="end">{layer}</text>'
    yield '<g class="labels">'
    for column, number in enumerate(row):
        x = _NUMBERS + column * COLUMN + (COLUMN - GAP) / 2 + 4
        name, kind = "…", "gap"
        if number is not None:
            token = report.tokens[number]
            name, kind = label(token.piece), "answer" if token.is_answer else "prompt"
        yield f'<text class="{kind}" transform="translate({x:g} {_LABELS - 8}) rotate(-90)">{escape(name)}</text>'
    yield "</g>"


def _cells(report: Report, row: tuple[int | None, ...]) -> Iterator[str]:
    """All cells, a path for each colour, and the numbers of experts where there is room."""
    high = row_height(report.layers)
    paths: dict[int, list[str]] = {}
    digits = []
    for column, number in enumerate(row):
        for layer in range(report.layers if number is not None else 0):
            experts, weights = (
                part[number, layer].tolist() for part in (report.choices.experts, report.choices.weights)
            )
            x, y = _NUMBERS + column * COLUMN, _LABELS + layer * high
            for expert, (start, width) in zip(experts, shares(weights), strict=True):
                paths.setdefault(expert % len(PALETTE), []).append(f"M{x + start} {y}h{width}v{high - 2}h-{width}z")
                if width >= 9 and high >= 16:
                    ink = "black" if ink_on(colour(expert)) == "#000000" else "white"
                    middle = x + start + width / 2
                    digits.append(f'<text class="{ink}" x="{middle:g}" y="{y + high / 2 + 3:g}">{expert}</text>')
    for number_of, path in sorted(paths.items()):
        yield f'<path class="e{number_of}" d="{"".join(path)}"/>'
    yield f'<g class="digits">{"".join(digits)}</g>'


def _stretches(report: Report, row: tuple[int | None, ...], bottom: int) -> Iterator[str]:
    """Lines below what is prompt and what is answer."""
    for kind, start, end in stretches(report, row):
        x, width = _NUMBERS + start * COLUMN, (end - start) * COLUMN - GAP
        name = "gap" if kind == "…" else kind
        yield f'<rect class="under {name}" x="{x}" y="{bottom + 3}" width="{width}" height="3"/>'
        if width >= 8 * len(kind):
            yield f'<text class="under {name}" x="{x}" y="{bottom + 19}">{kind}</text>'


def _load(report: Report) -> str:
    """Bars of each layer's experts side by side, a mark at the even share, and figures."""
    loads = report.counts / report.counts.sum(axis=-1, keepdims=True)
    most = max(float(loads.max()), 2 / report.experts)
    even = f'<u style="left:{100 / report.experts / most:.1f}%"></u>'
    heads = "".join(f'<th class="bar">{_swatch(expert)}</th>' for expert in range(report.experts))
    lines = []
    for layer, one in enumerate(report.by_layer):
        bars = "".join(
            f'<td class="bar" title="layer {layer}, expert {n}: {share:.1%}"><i>'
            f'<b style="width:{100 * share / most:.1f}%;background:{colour(n)}"></b>{even}</i></td>'
            for n, share in enumerate(loads[layer].tolist())
        )
        lines.append(f"<tr><th>{layer}</th>{bars}{''.join(f'<td>{text}</td>' for text in shown(one))}</tr>")
    names = "".join(f"<th>{name}</th>" for name in ("evenness", "busiest", "same first", "again"))
    return f"<table><tr><th>layer</th>{heads}{names}</tr>{''.join(lines)}</table>"


def _table(report: Report) -> str:
    head, *rows = table(report)
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _data(report: Report, bands: Bands) -> str:
    """What the script says of the tokens that are shown, as JSON that cannot end the element it stands in."""
    tokens: dict[int, list[Any]] = {}
    for number in (number for row in bands.rows for number in row if number is not None):
        token = report.tokens[number]
        weights = (report.choices.weights[number] * 100).round().astype(int).tolist()
        part = "answer" if token.is_answer else "prompt"
        tokens[number] = [label(token.piece), part, report.choices.experts[number].tolist(), weights]
    layout = {"left": _NUMBERS, "top": _LABELS, "column": COLUMN, "row": row_height(report.layers)}
    data = {**layout, "layers": report.layers, "tokens": tokens}
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
