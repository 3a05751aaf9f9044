"""Between a program and the person at the terminal: clean text, answers, errors, progress, Ctrl-C and the keyboard.

Knows nothing of models and conversations. Markdown has a file of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from .config import MixtralError

# All control characters but newline and tab, and the marks that turn the direction of writing around.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_AT_LEAST_BYTES = 1 << 26
_LINE_EVERY_S = 10.0


def clean(text: str) -> str:
    """`text` without anything that could move the cursor, hide words or give the terminal orders."""
    return _UNSAFE.sub("", text)


def complain(error: MixtralError) -> None:
    """Write an error to stderr: its code, what was found and expected, and below it what to do."""
    lines = [f"error[{error.code}]: {error}", *(f"  {line}" for line in error.hint.splitlines())]
    if sys.stderr.isatty():
        width = max(shutil.get_terminal_size().columns, 20)
        lines = [textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False) for line in lines]
    print(clean("\n".join(lines)), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Answer:
    """What a command answers: `text` for people, `objects` for programs, whose names are kept; and whether Ctrl-C cut
    it short."""

    text: str
    objects: list[dict[str, Any]]
    interrupted: bool = False


class CtrlC:
    """While entered, the first Ctrl-C only makes this true when called; the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> CtrlC:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def __call__(self) -> bool:
        return self.pressed

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


@contextmanager
def typing_ahead() -> Iterator[None]:
    """Keep what is typed meanwhile, Enter and Ctrl-D included, off the screen; it waits for the next prompt."""
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    kept = termios.tcgetattr(keyboard)
    kept[0] &= ~termios.ICRNL
    kept[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(keyboard, termios.TCSANOW, kept)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


@contextmanager
def notice(text: str, *, quiet: bool) -> Iterator[None]:
    """Show `text` on stderr for as long as something takes, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    print(text, end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(" " * len(text), end="\r", file=sys.stderr, flush=True)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Let SIGTERM end the program by way of its clean-up, so that the terminal is left as it was."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


class Bar:
    """A progress bar on stderr, called with what is done and the total; gone as soon as all is done.

    It appears only on a terminal, unless `quiet`, and only when more than `at_least` is left at the first call."""

    def __init__(self, label: str, *, quiet: bool = False, at_least: int = 0, size: str = "") -> None:
        self.label = label
        self.shown = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.at_least = at_least
        self.size = size
        self._progress: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        self.shown, self._progress = False, None

    def __call__(self, done: int, total: int) -> None:
        if self.shown and not self._progress:
            self.shown = total - done > self.at_least
        if not self.shown:
            return
        if not self._progress:
            self._progress = self._start()
        self._progress.update(0, completed=done, total=total)
        if done >= total:
            self.__exit__()

    def above(self, line: str) -> None:
        """Print a line on stderr, above the bar if there is one."""
        if self._progress:
            self._progress.console.print(clean(line), markup=False, highlight=False, soft_wrap=True)
        else:
            print(clean(line), file=sys.stderr, flush=True)

    def _start(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as TimeLeft
        from rich.progress import TransferSpeedColumn as Speed

        amount = (DownloadColumn(), Speed(), TimeLeft()) if self.size == "bytes" else (MofNCompleteColumn(),)
        columns = (TextColumn("{task.description}"), BarColumn(24), *amount)
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        progress.add_task(self.label)
        progress.start()
        return progress


class Screen:
    """Shows progress: a line for each phase, and one bar; where there is no terminal, a line now and then instead."""

    def __init__(self, label: str, *, quiet: bool, size: str) -> None:
        self.label = label
        self.quiet = quiet
        self.size = size
        self.lock = threading.RLock()
        self.bar: Bar | None = None
        self.plain = not quiet and not sys.stderr.isatty()
        self.last = time.monotonic()
        self.first = (self.last, 0)

    def phase(self, line: str) -> None:
        """Say what is done from now on."""
        with self.lock:
            if not self.quiet:
                (self.bar or Bar(self.label)).above(line)

    def progress(self, done: int, total: int) -> None:
        """Show how far it is."""
        with self.lock:
            if self.plain:
                self._line(done, total)
                return
            if not self.bar:
                at_least = _AT_LEAST_BYTES if self.size == "bytes" else 4
                self.bar = Bar(self.label, quiet=self.quiet, at_least=at_least, size=self.size)
            self.bar(done, total)
            if done >= total:
                self.end()

    def end(self) -> None:
        """Take the bar away."""
        with self.lock:
            if self.bar:
                self.bar.__exit__()
            self.bar = None

    def _line(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < self.first[1] or not self.first[1]:
            self.first = (now, done)
        if now - self.last < _LINE_EVERY_S or done >= total:
            return
        self.last = now
        spent, came = now - self.first[0], done - self.first[1]
        left = f", {in_time((total - done) * spent / came)} left" if came else ""
        speed = f", {came / spent / 1e6:,.0f} MB/s" if self.size == "bytes" and came else ""
        print(f"{self.label}: {100 * done // total} %{speed}{left}", file=sys.stderr, flush=True)


def in_time(seconds: float) -> str:
    """A time as people read it."""
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{seconds:.1f} s"
    )


class PlainText:
    """Shows a reply piece by piece as it is; for terminals that can only go forward."""

    def __init__(self) -> None:
        self._last = ""

    def add(self, text: str) -> None:
        """Show `text` after what came before."""
        self._last = text or self._last
        sys.stdout.write(text)
        sys.stdout.flush()

    def finish(self) -> None:
        """End the line."""
        if not self._last.endswith("\n"):
            self.add("\n")


class Keyboard:
    """Asks for a line, or several: Enter sends; Alt-Enter, Ctrl-J and pasting make new lines; arrows go back."""

    def __init__(self, history: Path, completions: Sequence[str] = ()) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter

        self._session: PromptSession[str] = PromptSession(
            history=_history(history),
            key_bindings=_keys(),
            completer=WordCompleter(list(completions), sentence=True),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation="… ",
        )

    def ask(self, default: str = "") -> str:
        """What the person writes, beginning with `default`.

        Raises EOFError at Ctrl-D, and KeyboardInterrupt at Ctrl-C when there is nothing to discard."""
        return self._session.prompt("> ", default=default)


def _history(file: Path) -> Any:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # What people write to a model is nobody else's business.
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(file)


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _discard(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys
