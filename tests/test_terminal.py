"""Nothing a model writes can give the terminal orders, and Ctrl-C asks before it insists."""

from __future__ import annotations

import os
import signal

import pytest

from mixtral_mlx.config import MixtralError
from mixtral_mlx.terminal import Bar, CtrlC, clean, complain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words, naïve 漢字 👩‍🚀\n\tindented\n", "plain words, naïve 漢字 👩‍🚀\n\tindented\n"),
        ("\x1b[2J\x1b]0;title\x07", "[2J]0;title"),
        ("\x9b31m\x9dname\x9c", "31mname"),
        ("hidden\rshown\b\b\x7f\x00\x0b\x0c\x85", "hiddenshown"),
        ("\u202eevil\u202c \u2066a\u2069", "evil a"),
    ],
)
def test_control_characters_never_reach_the_terminal(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_every_control_character_but_newline_and_tab_is_taken_out() -> None:
    controls = [chr(n) for n in (*range(0x20), *range(0x7F, 0xA0))]
    assert clean("".join(controls)) == "\t\n"


def test_errors_say_code_message_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    complain(MixtralError("found \x1b[31mthat", code="some_code", hint="do this"))
    assert capsys.readouterr() == ("", "error[some_code]: found [31mthat\n  do this\n")


def test_the_first_ctrl_c_is_only_noted_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with CtrlC() as pressed:
        assert not pressed()
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_no_progress_bar_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("Loading", size="bytes") as bar:
        bar(0, 10)
        bar(10, 10)
    assert capsys.readouterr() == ("", "")
