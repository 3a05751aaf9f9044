"""What both pictures show: colours, labels, how a cell is shared, and which tokens have room."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..terminal import clean
from .report import Report

PALETTE = ("#332288", "#56B4E9", "#E69F00", "#117733", "#AA4499", "#A6DBA0", "#555555", "#F7B6D2")
"""Eight colours that stay apart for those who do not see red, green or blue, and on white as on black."""
COLUMN = 26
PER_BAND = 36
"""Tokens side by side; what follows goes below."""
GAP = 4
_LEAST = 4
_LONGEST = 16


def colour(expert: int) -> str:
    """An expert's colour. More than eight experts share them: their numbers tell them apart."""
    return PALETTE[expert % len(PALETTE)]


def ink_on(background: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = (int(background[n : n + 2], 16) for n in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#FFFFFF"


def row_height(layers: int) -> int:
    """How high a layer's row is: few layers have room for more."""
    return 26 if layers <= 8 else 22 if layers <= 16 else 18 if layers <= 32 else 14


def shares(weights: Sequence[float]) -> list[tuple[int, int]]:
    """Where each of a token's experts begins in its cell, and its width: as its weight, and wide enough to be seen."""
    width = COLUMN - GAP
    others = [max(round(weight * width), _LEAST) for weight in weights[1:]]
    widths = [width - sum(others), *others]
    return [(sum(widths[:n]), each) for n, each in enumerate(widths)]


@dataclass(frozen=True)
class Bands:
    """The tokens that are shown, row by row of the page, by their number in the report; None where some are left out.

    `left_out` is how many those are."""

    rows: tuple[tuple[int | None, ...], ...]
    left_out: int

    @classmethod
    def of(cls, report: Report, most: int) -> Bands:
        """As many tokens as `most` from both ends: how the text begins and how it ends says more than its middle."""
        count = len(report.tokens)
        numbers: list[int | None] = list(range(count))
        left_out = max(count - most + 1, 0) if count > most else 0
        if left_out:
            begin = most // 2
            numbers[begin : begin + left_out] = [None]
        lines = -(-len(numbers) // PER_BAND)
        each = -(-len(numbers) // lines)  # Rows of one length look better than a short last one.
        return cls(tuple(tuple(numbers[n : n + each]) for n in range(0, len(numbers), each)), left_out)

    @property
    def columns(self) -> int:
        return len(self.rows[0])

    @property
    def note(self) -> str:
        """What is to be said about tokens that are not shown."""
        return f"{self.left_out:,} tokens in the middle are left out here, not in the figures." if self.left_out else ""


def stretches(report: Report, row: Sequence[int | None]) -> Iterator[tuple[str, int, int]]:
    """The parts of a row that are prompt, answer or left out, and the columns where they begin and end."""
    kinds = ["…" if n is None else "answer" if report.tokens[n].is_answer else "prompt" for n in row]
    start = 0
    for n in range(1, len(kinds) + 1):
        if n == len(kinds) or kinds[n] != kinds[start]:
            yield kinds[start], start, n
            start = n


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NAMES = {0x0A: "\\n", 0x09: "\\t", 0x0D: "\\r"}


def label(piece: str) -> str:
    """A token as it is written on a picture: spaces as dots, bytes and controls by name, long ones cut."""
    if found := _BYTE.fullmatch(piece):
        code = int(found[1], 16)
        return _NAMES.get(code, f"<{found[1]}>")
    text = clean(piece.replace("▁", "·")).replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def heading(report: Report) -> str:
    """The picture's subtitle: what ran, and how much of it."""
    prompt, answer = report.prompt_tokens, len(report.tokens) - report.prompt_tokens
    layers, per_token = report.choices.experts.shape[1:]
    return (
        f"{report.model} · {report.dtype}, {report.mode} · {layers} layers, {per_token} of {report.experts} experts · "
        f"{prompt:,} tokens of prompt, {answer:,} of answer"
    )


TITLE = "Which experts each token used"
HOW_TO_READ = (
    "Across: the tokens of the text. Down: the layers. A cell shows the experts that answered, the first on the left, "
    "each as wide as its weight. A dot is a space."
)
LOAD = "How often each layer used each expert"
EVEN = "line: an even share"
MEANINGS = (
    "evenness: entropy of the loads, 1 where all have the same",
    "busiest: the largest load, in even shares",
    "same first: tokens with the first expert of the token before",
    "again: experts that the token before had too",
)
