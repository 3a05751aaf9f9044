"""The picture of a report as PNG: bands of tokens on the left, the experts' load on the right.

Drawn with the font that comes with Pillow, which has little more than English letters; what it lacks with one of the
system's, and what those lack is written by its number."""

from __future__ import annotations

import io
import math
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .report import Figures, Report, shown, table
from .view import (
    COLUMN,
    EVEN,
    GAP,
    HOW_TO_READ,
    LOAD,
    MEANINGS,
    PER_BAND,
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

INK, DIM, LINE, PAPER, ANSWER = "#1C1C1E", "#6B6B70", "#D8D8DE", "#FFFFFF", "#0B57B0"
_MARGIN = 28
_LABELS = (80, 112)
"""Least and most height above a band for the tokens' text."""
_NUMBERS = 38
"""Width before a band for the layers' numbers."""
_BELOW = 30
_BAR = 38
_FIGURE = 66
_NAME = 13
_MOST_BANDS = 12
_MOST_HEIGHT = 8000
_HEAD = 124


class Layout:
    """Where things are on the page, in pixels."""

    def __init__(self, report: Report) -> None:
        self.rows = report.layers
        self.row = row_height(report.layers)
        band = self.rows * self.row + _BELOW
        most = max(1, min((_MOST_HEIGHT - _HEAD) // (band + _LABELS[1]), _MOST_BANDS))
        self.bands = Bands.of(report, PER_BAND * most)
        names = [report.tokens[n].piece for row in self.bands.rows for n in row if n is not None]
        longest = max(face.getlength(text) for text, face in (typeset(label(name), _NAME) for name in names))
        self.labels = min(max(math.ceil(longest) + 24, _LABELS[0]), _LABELS[1])
        self.band = band + self.labels
        self.left = _MARGIN + _NUMBERS
        self.panel = self.left + max(self.bands.columns, 16) * COLUMN + 48
        self.panel_bars = self.panel + _NUMBERS
        self.panel_figures = self.panel_bars + report.experts * _BAR + 12
        self.width = self.panel_figures + 4 * _FIGURE + _MARGIN
        panel_height = self.labels + (self.rows + 1) * self.row + 44 + 24 * len(table(report)) + 18 * len(MEANINGS)
        self.height = _HEAD + max(len(self.bands.rows) * self.band, panel_height) + _MARGIN

    def cell(self, band: int, column: int, layer: int) -> tuple[int, int]:
        """The left upper corner of a token's cell."""
        return self.left + column * COLUMN, self.top(band) + layer * self.row

    def top(self, band: int) -> int:
        """Where a band's first layer begins."""
        return _HEAD + band * self.band + self.labels

    def bar(self, layer: int, expert: int) -> tuple[int, int]:
        """Where the bar of an expert's load begins."""
        return self.panel_bars + expert * _BAR, self.top(0) + layer * self.row


def png(report: Report) -> bytes:
    """The picture, as the contents of a file."""
    out = io.BytesIO()
    draw(report).save(out, "PNG")
    return out.getvalue()


def draw(report: Report) -> Image.Image:
    """The picture."""
    layout = Layout(report)
    image = Image.new("RGB", (layout.width, layout.height), PAPER)
    pen = Pen(image)
    _draw_head(pen, layout, report)
    for band in range(len(layout.bands.rows)):
        _draw_band(pen, layout, report, band)
    _draw_load(pen, layout, report)
    _draw_table(pen, layout, report)
    return image


class Pen:
    """Draws text and boxes on an image."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.draw = ImageDraw.Draw(image)

    def text(self, at: tuple[float, float], text: str, *, size: int = 14, ink: str = INK, anchor: str = "ls") -> None:
        """Text with its anchor, as Pillow names it, at a point."""
        text, face = typeset(text, size)
        self.draw.text(at, text, fill=ink, font=face, anchor=anchor)

    def upright(self, at: tuple[int, int], text: str, *, ink: str) -> None:
        """A token's text, which goes upwards from a point, in the middle of it."""
        text, face = typeset(text, _NAME)
        text = _cut(text, _LABELS[1] - 16, face)
        mask = Image.new("L", (math.ceil(face.getlength(text)) + 2, 2 * _NAME), 0)
        # The middle of small letters is in the middle of the column.
        ImageDraw.Draw(mask).text((1, _NAME * 1.27), text, fill=255, font=face, anchor="ls")
        mask = mask.rotate(90, expand=True)
        self.image.paste(ink, (at[0] - mask.width // 2, at[1] - mask.height), mask)

    def box(self, at: tuple[int, int], size: tuple[int, int], fill: str) -> None:
        """A filled box."""
        if size[0] > 0 and size[1] > 0:
            self.draw.rectangle((*at, at[0] + size[0] - 1, at[1] + size[1] - 1), fill=fill)


FALLBACKS: tuple[str, ...] = ("Arial Unicode.ttf", "DejaVuSans.ttf", "NotoSans-Regular.ttf")
"""Fonts of the system for what Pillow's own lacks, where they are there: macOS's, and what most Linuxes have."""
_IN_LATIN = str.maketrans({"×": "x", "–": "-"})


@cache
def font(size: int, name: str = "") -> Any:
    """A font of the system, or Pillow's own; None if there is no such font."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


@cache
def _has(name: str, character: str) -> bool:
    there = font(14, name)
    return there is not None and bytes(there.getmask(character)) != bytes(there.getmask("\U0010ffff"))


def typeset(text: str, size: int) -> tuple[str, Any]:
    """`text` and a font that has all of it; what none has is written by its number."""
    text = text.translate(_IN_LATIN)
    for name in ("", *FALLBACKS):
        if all(character == " " or _has(name, character) for character in text):
            return text, font(size, name)
    return "".join(c if c == " " or _has("", c) else f"U+{ord(c):04X} " for c in text).rstrip(), font(size)


def _cut(text: str, width: int, face: Any) -> str:
    """As much of `text` as fits."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _draw_head(pen: Pen, layout: Layout, report: Report) -> None:
    pen.text((_MARGIN, 44), TITLE, size=24)
    pen.text((_MARGIN, 68), heading(report), ink=DIM)
    pen.text((_MARGIN, 88), f"{HOW_TO_READ} {layout.bands.note}", ink=DIM)
    pen.text((_MARGIN, 112), "expert", ink=DIM, anchor="lm")
    for expert in range(report.experts):
        at = (_MARGIN + 52 + expert * 36, 102)
        pen.box(at, (32, 20), colour(expert))
        pen.text((at[0] + 16, at[1] + 10), str(expert), ink=ink_on(colour(expert)), anchor="mm")


def _draw_band(pen: Pen, layout: Layout, report: Report, band: int) -> None:
    row, top = layout.bands.rows[band], layout.top(band)
    bottom = top + layout.rows * layout.row
    pen.text((layout.left - 8, top - 8), "layer", size=12, ink=DIM, anchor="rs")
    every = 1 if layout.rows <= 12 else 4
    for layer in range(0, layout.rows, every):
        at = (layout.left - 8, top + layer * layout.row + layout.row // 2)
        pen.text(at, str(layer), size=12, ink=DIM, anchor="rm")
    for column, number in enumerate(row):
        if number is None:
            pen.text((layout.left + column * COLUMN + COLUMN // 2, top - 14), "…", ink=DIM, anchor="ms")
            continue
        token = report.tokens[number]
        middle = layout.left + column * COLUMN + (COLUMN - GAP) // 2
        pen.upright((middle, top - 8), label(token.piece), ink=ANSWER if token.is_answer else INK)
        for layer in range(layout.rows):
            _draw_cell(pen, layout, report, layout.cell(band, column, layer), number, layer)
    for kind, start, end in stretches(report, row):
        x, width = layout.left + start * COLUMN, (end - start) * COLUMN - GAP
        ink = {"prompt": DIM, "answer": ANSWER}.get(kind, LINE)
        pen.box((x, bottom + 3), (width, 3), ink)
        if kind != "…" and font(12).getlength(kind) <= width:
            pen.text((x, bottom + 18), kind, size=12, ink=ink)


def _draw_cell(pen: Pen, layout: Layout, report: Report, at: tuple[int, int], number: int, layer: int) -> None:
    experts, weights = (part[number, layer].tolist() for part in (report.choices.experts, report.choices.weights))
    height = layout.row - 2
    for expert, (start, width) in zip(experts, shares(weights), strict=True):
        fill = colour(expert)
        pen.box((at[0] + start, at[1]), (width, height), fill)
        if width >= 9 and height >= 14:
            middle = (at[0] + start + width / 2, at[1] + height / 2)
            pen.text(middle, str(expert), size=11, ink=ink_on(fill), anchor="mm")


def _draw_load(pen: Pen, layout: Layout, report: Report) -> None:
    """Bars of each layer's experts side by side, a mark at the even share, and figures."""
    top, height = layout.top(0), layout.row - 2
    pen.text((layout.panel, top - 62), LOAD, size=16)
    pen.text((layout.panel, top - 43), EVEN, size=12, ink=DIM)
    loads = report.counts / report.counts.sum(axis=-1, keepdims=True)
    scale = (_BAR - 8) / max(loads.max(), 2 / report.experts)
    even = round(scale / report.experts)
    for expert in range(report.experts):
        x, _ = layout.bar(0, expert)
        pen.box((x, top - 26), (_BAR - 8, 16), colour(expert))
        pen.text((x + (_BAR - 8) // 2, top - 18), str(expert), size=12, ink=ink_on(colour(expert)), anchor="mm")
    for layer in range(layout.rows):
        pen.text(
            (layout.panel_bars - 8, top + layer * layout.row + height / 2), str(layer), size=12, ink=DIM, anchor="rm"
        )
        for expert in range(report.experts):
            x, y = layout.bar(layer, expert)
            pen.box((x, y), (_BAR - 8, height), "#F1F1F4")
            pen.box((x, y), (round(float(loads[layer, expert]) * scale), height), colour(expert))
            pen.box((x + even - 1, y), (3, height), PAPER)
            pen.box((x + even, y), (1, height), INK)
        _draw_figures(pen, layout, layer, report.by_layer[layer])
    names = ("evenness", "busiest", "same first", "again")
    for n, name in enumerate(names):
        pen.text((layout.panel_figures + (n + 1) * _FIGURE - 4, top - 12), name, size=12, ink=DIM, anchor="rs")


def _draw_figures(pen: Pen, layout: Layout, layer: int, one: Figures) -> None:
    y = layout.top(0) + layer * layout.row + (layout.row - 2) / 2
    for n, text in enumerate(shown(one)):
        pen.text((layout.panel_figures + (n + 1) * _FIGURE - 4, y), text, size=12, anchor="rm")


def _draw_table(pen: Pen, layout: Layout, report: Report) -> None:
    """The means, next to chance and to what others measured."""
    y = layout.top(0) + layout.rows * layout.row + 44
    for n, cells in enumerate(table(report)):
        ink = DIM if n == 0 else INK
        pen.text((layout.panel, y + 24 * n), cells[0], size=13, ink=ink)
        for column, text in enumerate(cells[1:]):
            x = layout.width - _MARGIN - (3 - column) * 106
            pen.text((x, y + 24 * n), text, size=13 if n else 12, ink=ink, anchor="rs")
    y += 24 * len(table(report)) + 4
    for n, meaning in enumerate(MEANINGS):
        pen.text((layout.panel, y + 18 * n), meaning, size=12, ink=DIM)
