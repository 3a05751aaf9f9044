"""The terminal chat: `python -m mixtral_mlx.chat`, or `mixtral-mlx chat`.

Carries a `Session` on, with a person at a screen or with lines from a pipe. What a conversation is, how a model is
opened and how things look on a screen, is left to session, opening, terminal and markdown."""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Before anything that takes time, since Ctrl-C may come meanwhile.
    from .__main__ import run as run_command

    sys.exit(run_command(["chat", *sys.argv[1:]]))

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .config import MixtralError
from .opening import LONG_PROMPT, ModelChoice, open_engine
from .prompt import Message
from .session import COMMANDS, SETTINGS, ChatError, Outcome, Ready, Session
from .terminal import Bar, CtrlC, Keyboard, PlainText, clean, complain, ended_in_order, typing_ahead

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .markdown import StreamedMarkdown


def run(choice: ModelChoice, *, system: str = "", settings: Mapping[str, Any] | None = None, one: bool = False) -> int:
    """Talk until the person leaves or the input ends; returns the exit code."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not one
    if choice.name is None and not choice.quiet:
        print(_ABOUT_DEMO, file=sys.stderr, flush=True)

    def other_model(name: str, instead_of: Engine) -> Ready:
        return open_engine(replace(choice, name=None if name == "demo" else name), instead_of=instead_of)

    with typing_ahead() if at_terminal else nullcontext():
        ready = open_engine(choice)
        # The first conversation to be encoded takes a second; better now than when the person waits for an answer.
        ready.engine.tokenizer.encode_chat([Message("user", "Hello")])
    with Session(ready, other_model, system=system, settings=settings) as session:
        if at_terminal:
            with ended_in_order():
                return _Terminal(session, quiet=choice.quiet).talk()
        return _talk_in_pipe(session, one=one)


_ABOUT_DEMO = (
    "This is the built-in demo model, a toy. For a real one: --model FOLDER, or a Hugging Face name "
    "such as mistralai/Mixtral-8x7B-Instruct-v0.1"
)
_KEYS = "Alt-Enter, Ctrl-J: new line · Ctrl-C: stop · Ctrl-D: leave · /help: commands"


class _Terminal:
    """Carries a session on with a person at a screen."""

    def __init__(self, session: Session, *, quiet: bool) -> None:
        from platformdirs import user_state_path
        from rich.console import Console

        self.console = Console(highlight=False)
        self.session = session
        self.quiet = quiet
        commands = [f"/{name}" for name in COMMANDS]
        settings = [f"/set {name}" for name in SETTINGS]
        history = user_state_path("mixtral-mlx") / "chat_history"
        self.keyboard = Keyboard(history, commands + settings)
        self.leaving = False

    def talk(self) -> int:
        if not self.quiet:
            self._print(f"{self.session.ready}\n{_KEYS}\n", "dim")
        while True:
            try:
                line = self.keyboard.ask()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                if self.leaving:
                    return 130
                self.leaving = True
                self._print("(Ctrl-C again, or Ctrl-D, leaves)", "dim")
                continue
            self.leaving = False
            if line.strip() and self._take(line.rstrip()):
                return 0

    def _take(self, line: str) -> bool:
        """Do what a line asks for; True when that is to leave."""
        try:
            outcome = self.session.handle(line)
            if outcome.edit is not None:
                outcome = self._edited(outcome.edit)
            if outcome.text:
                self._print(outcome.text + "\n")
            if outcome.answer:
                self._answer()
        except MixtralError as error:
            _complain(error, self.session)
            print(file=sys.stderr, flush=True)
            return False
        return outcome.leave

    def _edited(self, text: str) -> Outcome:
        try:
            text = self.keyboard.ask(default=text)
        except (EOFError, KeyboardInterrupt):
            return Outcome("Nothing was changed.")
        return self.session.edit(text.rstrip())

    def _answer(self) -> None:
        view = self._view()
        with (
            CtrlC() as stopped,
            typing_ahead(),
            Bar("Reading the prompt", quiet=self.quiet, at_least=LONG_PROMPT) as bar,
        ):
            try:
                for text in self.session.reply(on_prompt=bar, cancelled=stopped):
                    view.add(clean(text))
            finally:
                view.finish()
        self.leaving = stopped()
        self._print(self.session.remark(), "dim")
        self._print(self.session.statistics() if self.session.stats else "", "dim")
        print()

    def _view(self) -> StreamedMarkdown | PlainText:
        """Rendered Markdown, or plain text where the terminal can do no better."""
        from .markdown import StreamedMarkdown

        return PlainText() if self.console.is_dumb_terminal else StreamedMarkdown(self.console)

    def _print(self, text: str, style: str = "") -> None:
        if text:
            self.console.print(clean(text), style=style, markup=False, emoji=False)


def _talk_in_pipe(session: Session, *, one: bool) -> int:
    """One message or command per line, or all of the input as one message; only replies go to stdout."""
    failed = False
    for data in [sys.stdin.buffer.read()] if one else sys.stdin.buffer:
        try:
            if text := _decoded(data):
                _do_in_pipe(session, session.say(text) if one else session.handle(text))
        except EOFError:
            break
        except MixtralError as error:
            _complain(error, session)
            failed = True
    return int(failed)


def _complain(error: MixtralError, session: Session) -> None:
    """Say what went wrong; that a machine was lost is said by whoever noticed it."""
    if error is not session.ready.engine.lost:
        complain(error)


def _decoded(data: bytes) -> str:
    try:
        text = data.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ChatError(f"The input is not UTF-8 text: {error.reason}.", code="not_text") from None
    return text if text.strip() else ""


def _do_in_pipe(session: Session, outcome: Outcome) -> None:
    if outcome.leave:
        raise EOFError
    if outcome.edit is not None:
        raise ChatError("/edit stands alone.", code="no_text", hint="In a pipe the new text follows it.")
    if outcome.text:
        print(outcome.text, file=sys.stderr, flush=True)
    if outcome.answer:
        _answer_in_pipe(session)


def _answer_in_pipe(session: Session) -> None:
    view = PlainText()
    with CtrlC() as stopped:
        for text in session.reply(cancelled=stopped):
            view.add(clean(text) if sys.stdout.isatty() else text)
    view.finish()
    if stopped():
        raise KeyboardInterrupt
    remarks = (session.remark(), session.statistics() if session.stats else "")
    for remark in filter(None, remarks):
        print(remark, file=sys.stderr, flush=True)
