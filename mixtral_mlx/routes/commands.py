"""The command `routes`: runs a prompt and its answer, and shows which experts their tokens used.

Command lines are read in `cli`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import MixtralError
from ..opening import LONG_PROMPT, ModelChoice, Plain, open_model, wired
from ..prompt import Message
from ..session import mlx_failures
from ..terminal import Answer, Bar, CtrlC
from ..writing import check_writable, write_output
from .report import Report, Token, table

if TYPE_CHECKING:
    from ..generate import Chunk
    from ..prompt import Tokenizer
    from ..routing import Choices


class RoutesError(MixtralError):
    """A picture that cannot be written, or has nothing to show."""


@dataclass(frozen=True)
class Request:
    """What `routes` was asked: a text to complete, or with `chat` a message to answer, and where the picture goes."""

    choice: ModelChoice
    text: str
    chat: bool
    system: str
    settings: dict[str, Any]
    output: Path | None


def routes(request: Request) -> Answer:
    """Run `routes`; the first Ctrl-C ends the answer, and what there is of it is shown."""
    if request.output:
        check_writable(request.output)
    with wired(request.choice):
        report = _run(request, open_model(request.choice))
    if request.output:
        write_output(request.output, drawn(report, request.output.suffix.lower()))
    text = _text(report, request.output)
    return Answer(text, [report.to_dict()], report.finish_reason == "cancelled")


def drawn(report: Report, kind: str) -> bytes:
    """The picture, as the contents of a file of this kind: ".png" or ".html"."""
    if kind == ".png":
        from .picture import png

        return png(report)
    from .page import html

    assert kind == ".html"
    return html(report).encode()


def _run(request: Request, ready: Plain) -> Report:
    """Read the prompt, answer it, and say what every token was given."""
    prompt = _prompt_ids(request, ready.tokenizer)
    chunks, choices = _followed(request, ready, prompt)
    # The last token is said and not read; where the model runs ahead, a step has begun with it all the same.
    ids = [*prompt, *[chunk.token for chunk in chunks if chunk.token is not None][:-1]]
    choices = choices[: len(ids)]
    piece = ready.tokenizer.piece
    return Report(
        model=ready.name,
        dtype=ready.loaded.dtype,
        mode=ready.loaded.plan.mode,
        experts=ready.loaded.config.num_local_experts,
        tokens=tuple(Token(ids[n], piece(ids[n]), n >= len(prompt)) for n in range(len(choices))),
        choices=choices,
        text="".join(chunk.text for chunk in chunks),
        finish_reason=chunks[-1].finish_reason or "",
    )


def _prompt_ids(request: Request, tokenizer: Tokenizer) -> list[int]:
    if not request.chat:
        return tokenizer.encode(request.text)
    system = [Message("system", request.system)] if request.system else []
    return tokenizer.encode_chat([*system, Message("user", request.text)])


def _followed(request: Request, ready: Plain, prompt: list[int]) -> tuple[list[Chunk], Choices]:
    """The answer, and what was chosen for each token that was read."""
    import mlx.core as mx

    from ..generate import Sampling, stream_generate
    from ..routing import Choices, recorded

    done: list[Choices] = []
    with (
        mlx_failures(),
        CtrlC() as stopped,
        Bar("Reading the prompt", quiet=request.choice.quiet, at_least=LONG_PROMPT) as bar,
        recorded(ready.loaded.model) as recorder,
    ):

        def collect() -> None:
            """Take what was noted: until then it keeps hidden states in memory."""
            mx.eval([each.arrays for each in recorder.passes])
            done.extend(each.choices() for each in recorder.passes)
            recorder.passes.clear()

        def on_prompt(read: int, total: int) -> None:
            collect()
            bar(read, total)

        chunks = []
        for chunk in stream_generate(
            ready.loaded.model,
            ready.tokenizer,
            prompt,
            Sampling(**request.settings),
            conversation=ready.conversation,
            on_prompt=on_prompt,
            cancelled=stopped,
        ):
            chunks.append(chunk)
            collect()
    if not done:
        raise RoutesError("Interrupted.", code="cancelled")
    return chunks, Choices.joined(done)


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
