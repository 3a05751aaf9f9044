"""The commands `convert`, `verify` and `perplexity`: progress on stderr, and what they answer as text and as JSON.

Command lines are read in `cli`; the work is done in `run`, `verify` and `perplexity`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..config import MixtralError
from ..memory import peak_rss_bytes
from ..opening import located
from ..plan import outlook
from ..session import mlx_failures
from ..terminal import Answer, CtrlC, Screen, in_time
from . import perplexity as perplexities
from . import run
from . import verify as verifying
from .names import ConvertError
from .pipeline import Events


def convert(request: run.Request, *, quiet: bool) -> Answer:
    """Run `convert`; the first Ctrl-C stops it so that it can go on."""
    with _reported("Converting", quiet=quiet) as events:
        report = run.convert(request, events)
    shared = {
        "bytes_in": report.bytes_in,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_disk_bytes": report.peak_disk_bytes,
        "seconds": round(report.seconds, 3),
        "resumed": report.resumed,
    }
    objects = [
        {
            "source_format": report.source_format,
            "recipe": written.recipe,
            "tensors": written.tensors,
            "bytes_out": written.nbytes,
            "bits_per_weight": round(written.bits_per_weight, 4),
            **shared,
        }
        for written in report.written
    ]
    parent = request.dest.parent
    lines = [f"{run.in_words(report.bytes_in)} of {report.source_format} in {in_time(report.seconds)}"]
    for written in report.written:
        folder = parent / written.folder
        lines += [
            f"{folder}: {written.recipe}, {run.in_words(written.nbytes)}, "
            f"{written.bits_per_weight:.2f} bits per weight",
            f"  {outlook(folder)}",
            f"  mixtral-mlx chat --model {folder}",
        ]
    return Answer("\n".join(lines), objects)


def verify(folder: Path, *, quiet: bool) -> Answer:
    """Run `verify`."""
    with _reported("Checking", quiet=quiet) as events:
        found = verifying.verify(folder, on_progress=events.progress, cancelled=events.cancelled)
    speed = found.nbytes / max(found.seconds, 1e-9)
    text = f"{folder} is as it was written: {found.files} files, {run.in_words(found.nbytes)}, {run.in_words(speed)}/s"
    entry = {"folder": str(folder), "files": found.files, "bytes": found.nbytes, "seconds": round(found.seconds, 3)}
    return Answer(text, [entry])


def perplexity(models: Sequence[str | None], file: Path, *, context: int, offline: bool, quiet: bool) -> Answer:
    """Run `perplexity` of the first of `models`, against the second if there are two; None is the demo model."""
    start = time.perf_counter()
    folder, *against = (located(model, offline=offline, quiet=quiet) for model in models)
    with _reported("Scoring", quiet=quiet, size="layers") as events, mlx_failures():
        score = perplexities.perplexity(
            folder,
            _text(file),
            against=against[0] if against else None,
            context=context,
            on_progress=events.progress,
            cancelled=events.cancelled,
        )
    text = f"perplexity {score.perplexity:.4f} over {score.tokens:,} tokens"
    if score.kl is not None:
        text += f", KL divergence {score.kl:.6f} nats per token"
    seconds = round(time.perf_counter() - start, 3)
    return Answer(text, [{"perplexity": score.perplexity, "tokens": score.tokens, "kl": score.kl, "seconds": seconds}])


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConvertError(f"{file} is not UTF-8 text: {error.reason}.", code="not_text") from None
    except OSError as error:
        raise ConvertError(f"{file} cannot be read: {error.strerror}.", code="unreadable") from None


@contextmanager
def _reported(label: str, *, quiet: bool, size: str = "bytes") -> Iterator[Events]:
    """Whom to tell of progress, and the first Ctrl-C."""
    screen = Screen(label, quiet=quiet, size=size)
    try:
        with CtrlC() as stopped:
            yield Events(screen.phase, screen.progress, stopped)
    except MixtralError as error:
        screen.end()
        if error.code == "cancelled":
            print(f"Stopped. {error.hint}".rstrip(), file=sys.stderr)
        raise
    finally:
        screen.end()
