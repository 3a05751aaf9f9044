"""The command `routes`: runs a prompt and its answer, and shows which experts their tokens used.

Command lines are read in `cli`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat import LONG_PROMPT, ModelChoice, open_model, wired
from ..config import MixtralError
from ..session import Ready, mlx_failures
from ..terminal import Bar, CtrlC
from .report import Report, Token, table

if TYPE_CHECKING:
    from ..generate import Sampling

KINDS = (".png", ".html")


class RoutesError(MixtralError):
    """A picture that cannot be written."""


@dataclass(frozen=True)
class Request:
    """What `routes` was asked: a text to complete, or with `chat` a message to answer, and where the picture goes."""

    choice: ModelChoice
    text: str
    chat: bool
    system: str
    settings: dict[str, Any]
    output: Path | None


@dataclass(frozen=True)
class Answer:
    """What the command answers: `text` for people, `objects` for programs, and whether Ctrl-C cut it short."""

    text: str
    objects: list[dict[str, Any]]
    interrupted: bool = False


def routes(request: Request) -> Answer:
    """Run `routes`; the first Ctrl-C ends the answer, and what there is of it is shown."""
    if request.output:
        check_writable(request.output)
    with wired(request.choice):
        report = _run(request, open_model(request.choice))
    if request.output:
        write_whole(request.output, drawn(report, request.output.suffix.lower()))
    text = _text(report, request.output)
    return Answer(text, [report.to_dict()], report.finish_reason == "cancelled")


def drawn(report: Report, kind: str) -> bytes:
    """The picture, as the contents of a file of the kind that its suffix says."""
    if kind == ".png":
        from .picture import png

        return png(report)
    from .page import html

    return html(report).encode()


def _run(request: Request, ready: Ready) -> Report:
    """Read the prompt, answer it, and note what every token was given."""
    import mlx.core as mx

    from ..generate import stream_generate
    from ..prompt import Message
    from ..routing import Choices, recorded

    model, tokenizer, conversation = ready.loaded.model, ready.tokenizer, ready.conversation
    system = [Message("system", request.system)] if request.system else []
    message = [*system, Message("user", request.text)]
    prompt = tokenizer.encode_chat(message) if request.chat else tokenizer.encode(request.text)
    answer, text, reason = [], "", ""
    done: list[Choices] = []
    with (
        mlx_failures(),
        CtrlC() as stopped,
        Bar("Reading the prompt", quiet=request.choice.quiet, at_least=LONG_PROMPT) as bar,
        recorded(model) as recorder,
    ):

        def collect() -> None:
            """Take what was noted while little of it waits: until then it keeps hidden states in memory."""
            mx.eval([each.arrays for each in recorder.passes])
            done.extend(each.choices() for each in recorder.passes)
            recorder.passes.clear()

        def on_prompt(read: int, total: int) -> None:
            collect()
            bar(read, total)

        for chunk in stream_generate(
            model,
            tokenizer,
            prompt,
            _sampling(request),
            conversation=conversation,
            on_prompt=on_prompt,
            cancelled=stopped,
        ):
            text += chunk.text
            reason = chunk.finish_reason or reason
            answer += [] if chunk.token is None else [chunk.token]
            collect()
        collect()
    # The last token is said and not read. A step may have begun with it all the same.
    ids = [*prompt, *answer][: len(prompt) + max(len(answer) - 1, 0)]
    choices = Choices.joined(done)[: len(ids)]
    tokens = [Token(token, tokenizer.piece(token), n >= len(prompt)) for n, token in enumerate(ids[: len(choices)])]
    plan = ready.loaded.plan
    return Report(
        model=ready.name,
        dtype=ready.loaded.dtype,
        mode=plan.mode,
        experts=ready.loaded.config.num_local_experts,
        tokens=tuple(tokens),
        choices=choices,
        text=text,
        finish_reason=reason,
    )


def _sampling(request: Request) -> Sampling:
    from ..generate import Sampling

    return Sampling(**request.settings)


def _text(report: Report, output: Path | None) -> str:
    """What is printed: the figures next to chance and to what was measured elsewhere, and where the picture is."""
    rows: Sequence[tuple[str, ...]] = table(report)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{report.prompt_tokens:,} tokens of prompt, {len(report.tokens) - report.prompt_tokens:,} of answer, "
        f"{report.layers} layers",
        *(
            "  ".join(
                cell.rjust(width) if n else cell.ljust(width)
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ),
    ]
    lines.append(f"The picture is in {output}" if output else "--output F.png or F.html draws it.")
    return "\n".join(lines)


def check_writable(path: Path) -> None:
    """Raise `RoutesError` now rather than after the answer if no picture can be written to `path`."""
    if path.suffix.lower() not in KINDS:
        raise RoutesError(
            f"{path} ends in {path.suffix or 'nothing'!r}, expected {' or '.join(KINDS)}.",
            code="bad_output",
            hint="The suffix says what kind of picture it is to be.",
        )
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        found = "is a folder" if path.is_dir() else "is in no folder that can be written to"
        raise RoutesError(f"{path} {found}, expected a file to write.", code="write_failed")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all; raises `RoutesError`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RoutesError(f"{path} cannot be written: {error.strerror}.", code="write_failed") from None
