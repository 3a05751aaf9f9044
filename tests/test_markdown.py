"""A reply shown while it is written ends up exactly as it would look shown at once."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mixtral_mlx.markdown import StreamedMarkdown
from mixtral_mlx.terminal import clean

PARTS = [
    *(
        "# Heading\n",
        "\n",
        "\n\n",
        "A paragraph of some length with **bold** words.",
        "1. one\n",
        "2. two\n",
        "- item\n",
    ),
    *("  - nested\n", "```python\nx = 1\n", "```\n", "> quote\n", "| a | b |\n|---|--:|\n", "| longer cell | 2 |\n"),
    *("---\n", "#", "===\n", "`code`", "*", "_", "[link](http://x.org)", "<b>html</b>", "&#27;[31m", "&amp;", "word "),
    *("    four spaces\n", "漢字", "👩‍🚀", "~~gone~~", "[1]: http://x.org\n", "\\", "!"),
]


class Screen:
    """What a terminal of `height` rows shows: only the codes that the streamed view uses, everything else is text."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.lines = [""]
        self.row = 0

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[\d+A|\x1b\[2K|\r|\n|[^\x1b\r\n]+|\x1b", text):
            self._do(part)

    def _do(self, part: str) -> None:
        if part.endswith("A") and part.startswith("\x1b"):
            top = max(len(self.lines) - self.height, 0)
            self.row = max(self.row - int(part[2:-1]), top)
        elif part == "\n":
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif part == "\x1b[2K":
            self.lines[self.row] = ""
        elif part != "\r":
            assert part != "\x1b", "a code the view does not use"
            self.lines[self.row] += part

    def flush(self) -> None:
        pass


def shown(pieces: list[str], width: int, height: int) -> list[str]:
    """The lines on the terminal after `pieces` were streamed."""
    console = Console(file=io.StringIO(), highlight=False, width=width, height=height)
    screen = Screen(height)
    with patch("sys.stdout", screen):
        view = StreamedMarkdown(console)
        for piece in pieces:
            view._cost = 0.0  # Draw at every piece, however fast the test is.
            view.add(clean(piece))
        view.finish()
    return screen.lines[:-1]


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from(PARTS), min_size=1, max_size=25).map("".join), data=st.data())
def test_streamed_equals_shown_at_once(text: str, data: Any) -> None:
    width = data.draw(st.sampled_from([12, 34, 80]))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=30)) | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    at_once = shown([text], width, 1000)
    assert shown(pieces, width, 1000) == at_once
    # On a low screen, what had scrolled away too early may stand there twice, but the whole is there.
    low = shown(pieces, width, 6)
    assert low[max(len(low) - len(at_once), 0) :] == at_once


def test_a_block_longer_than_the_screen_is_in_the_scrollback_once() -> None:
    code = "```text\n" + "".join(f"line {n}\n" for n in range(50)) + "```\n\nAfter it."
    assert shown(list(code), 40, 10) == shown([code], 40, 1000)


def test_a_table_that_grows_wider_after_it_scrolled_is_shown_whole() -> None:
    table = "| n | name |\n|---|---|\n" + "".join(f"| {n} | {'x' * n} |\n" for n in range(1, 30))
    lines, at_once = shown(list(table), 60, 10), shown([table], 60, 1000)
    assert lines[-len(at_once) :] == at_once


@pytest.mark.parametrize("attack", ["&#27;[31mred", "&#x9b;31m", "[x](http://a/&#27;c)", "`&#7;`", "```\n&#27;\n```"])
def test_spelled_out_control_characters_stay_off_the_terminal(attack: str) -> None:
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\n".join(shown([attack], 80, 24)))


def test_nothing_a_model_writes_is_swallowed() -> None:
    text = "<div>tag</div> verse one\nverse two\n\n[1]: http://example.org/a\n\n[link](http://example.org/b)"
    assert shown([text], 80, 24) == [
        *("<div>tag</div> verse one", "verse two", "", "[1]: http://example.org/a", ""),
        "link (http://example.org/b)",
    ]
