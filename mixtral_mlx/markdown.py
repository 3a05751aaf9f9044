"""Markdown on a terminal while it is still being written.

A block (paragraph, list, code, table) is drawn again as it grows, but only from the first line that differs; once the
next block begins it is left alone, and the scrollback keeps it. Expects text without control characters."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from itertools import pairwise, takewhile
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, ListItem, Markdown
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text

from .terminal import clean

# HTML and link definitions would vanish when rendered; as plain text they are shown.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("reference")


class StreamedMarkdown:
    """Takes a reply piece by piece and shows it rendered, all of it that is there."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.screen = _Screen(self.console)
        self._text = ""
        self._drawn_at = self._cost = 0.0

    def add(self, text: str) -> None:
        """Show `text` after what came before."""
        self._text += text
        started = time.perf_counter()
        # Drawing takes at most a tenth of the time, however fast the words come.
        if started - self._drawn_at > 9 * self._cost:
            self._draw()
            self._drawn_at = time.perf_counter()
            self._cost = self._drawn_at - started

    def finish(self) -> None:
        """Show what is left and end the line."""
        self._draw()
        self.screen.commit()

    def _draw(self) -> None:
        finished, self._text = _split(self._text)
        for block in finished:
            self.screen.show(self._lines(block))
            self.screen.commit()
            self.screen.end_line()
        if self._text.strip():
            self.screen.show(self._lines(self._text))

    def _lines(self, block: str) -> list[str]:
        with self.console.capture() as captured:
            self.console.print(_Block(block), end="")
        return captured.get().strip("\n").split("\n")


def _split(text: str) -> tuple[list[str], str]:
    """The blocks of `text` that no later text can change, and the rest.

    Only whole lines decide: the beginning of a line may look like a new block and become a paragraph's next line."""
    whole = text[: text.rfind("\n") + 1]
    starts = [token.map[0] for token in _PARSER.parse(whole) if token.map and token.level == 0]
    lines = text.split("\n")
    bounds = [0, *starts[1:]]
    blocks = ["\n".join(lines[a:b]) for a, b in pairwise(bounds)]
    return blocks, "\n".join(lines[bounds[-1] :])


class _Screen:
    """The last lines on the terminal, which can still be changed as long as they have not scrolled away."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.lines: list[str] = []
        self.whole: list[str] = []
        self.width = 0
        self.torn = False

    def show(self, lines: list[str]) -> None:
        """Make the open lines read `lines`."""
        self.whole = lines
        if self.lines and self.console.width != self.width:
            # Nobody knows where a resized terminal has put the open lines: leave them and begin again below.
            self.end_line()
            self.lines = []
        self.width = self.console.width
        rows = max(self.console.height - 1, 1)
        gone = max(len(self.lines) - rows, 0)
        if lines[:gone] != self.lines[:gone]:
            # What would have to change is out of reach: show the end for now, and all of it when it is finished.
            self.lines, self.torn = self.lines[gone:], True
        self._redraw(lines[-rows:] if self.torn else lines)

    def commit(self) -> None:
        """Leave the open lines as they are, and the cursor below them."""
        if self.torn:
            self._redraw(self.whole)
        if self.lines:
            self.end_line()
        self.lines, self.torn = [], False

    def end_line(self) -> None:
        self._write("\n")

    def _redraw(self, lines: list[str]) -> None:
        pairs = zip(self.lines, lines, strict=False)
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if lines == self.lines:
            return
        same = min(same, len(lines) - 1)
        if same < len(self.lines):
            up = len(self.lines) - 1 - same
            start = "\r" + _up(up)
        else:
            start = "\n" if self.lines else ""
        # Lines are erased one by one: tmux takes clearing down from the top row for clearing the whole screen.
        spare = max(len(self.lines) - len(lines), 0)
        end = f"\n{_ERASE_LINE}" * spare + _up(spare)
        self._write(start + "\n".join(_ERASE_LINE + line for line in lines[same:]) + end)
        self.lines = list(lines)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


_ERASE_LINE = "\x1b[2K"


def _up(rows: int) -> str:
    return f"\x1b[{rows}A" if rows else ""


class _Block:
    """One block, rendered, without the spaces that fill lines up."""

    def __init__(self, text: str) -> None:
        self.markdown = _Markdown(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(self.markdown, options, pad=False):
            yield from _trimmed(line)
            yield Segment.line()


def _trimmed(line: Iterable[Segment]) -> list[Segment]:
    # Markdown spells characters as &#27; too, so cleaning the source is not enough.
    kept = [Segment(clean(segment.text), segment.style) for segment in line]
    while kept and not kept[-1].text.strip():
        kept.pop()
    if kept:
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].style)
    return kept


class _Code(CodeBlock):
    """Code between its fences, unindented and unpadded, so that it can be copied from the screen."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        syntax = Syntax("", self.lexer_name, theme=self.theme)
        code = syntax.highlight(str(self.text).rstrip("\n"))
        code.rstrip()
        code.no_wrap, code.overflow = False, "fold"
        name = "" if self.lexer_name == "text" else self.lexer_name
        yield Text("```" + name, style="dim")
        yield code
        yield Text("```", style="dim")


class _Heading(Heading):
    LEVEL_ALIGN = {f"h{n}": "left" for n in range(1, 7)}  # noqa: RUF012 - as in rich


class _Item(ListItem):
    def render_number(self, console: Console, options: ConsoleOptions, number: int, last_number: int) -> RenderResult:
        # Room for two digits from the start, or a tenth item would move the nine above it.
        return super().render_number(console, options, number, max(last_number, 99))


class _Markdown(Markdown):
    elements = {  # noqa: RUF012 - as in rich
        **Markdown.elements,
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Heading,
        "list_item_open": _Item,
    }

    def __init__(self, text: str) -> None:
        # A link shows its address: a terminal's hidden ones can say one thing and open another.
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.markup = text
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            _keep_line_ends(token)


def _keep_line_ends(token: Any) -> None:
    """Models end a line where they mean to, in verses and addresses, so it ends on the screen too."""
    for child in token.children or ():
        if child.type == "softbreak":
            child.type = "hardbreak"
