"""The engines that can be measured, as command lines: a worker that speaks the protocol, and the way to a first token.

Another engine is one more entry in `OTHERS`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

FIRST_PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Side:
    """One engine with one model: `worker` starts a process that speaks the protocol of `worker.py`.

    `first` runs the engine's own command line up to a first token on stdout; None where it has none, and then a fresh
    worker is asked for it. `header` are the characters that the command writes before any text. With `ranks` above 1
    other machines share the model with its worker, of which there can be but one."""

    name: str
    worker: tuple[str, ...]
    first: tuple[str, ...] | None = None
    note: str = ""
    header: str = ""
    ranks: int = 1


def ours(folder: Path, dtype: str, memory: int | None = None) -> Side:
    """This package, within `memory` bytes."""
    command = ("generate", "--model", str(folder), "--dtype", dtype, "--prompt", FIRST_PROMPT, "--max-tokens", "1")
    first = (sys.executable, "-m", "mixtral_mlx", *command, "--quiet")
    worker = _mlx_worker("mixtral-mlx", folder, dtype)
    if memory is None:
        return Side("mixtral-mlx", worker, first)
    # A budget is counted in whole MiB.
    return Side("mixtral-mlx", (*worker, str(memory)), (*first, "--memory", f"{memory >> 20}MiB"))


def shared(folder: Path, dtype: str, memory: int | None, ranks: int, options: Sequence[str]) -> Side:
    """This package with a model that so many ranks share, as `options` of a command line say."""
    alone = ours(folder, dtype, memory)
    return replace(alone, worker=(*alone.worker, *options), first=None, ranks=ranks)


def mlx_lm(folder: Path, dtype: str) -> Side:
    """mlx-lm, with its own model, loader and loops."""
    command = ("generate", "--model", str(folder), "--prompt", FIRST_PROMPT, "--max-tokens", "1")
    first = (sys.executable, "-m", "mlx_lm", *command, "--ignore-chat-template")
    note = "" if dtype == "auto" else "its command line has no dtype, so its first token is in the checkpoint's own"
    return Side("mlx-lm", _mlx_worker("mlx-lm", folder, dtype), first, note, header="=\n")


def _mlx_worker(engine: str, folder: Path, dtype: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "mixtral_mlx.bench.worker", engine, str(folder), dtype)


OTHERS: dict[str, Callable[[Path, str], Side]] = {"mlx-lm": mlx_lm}
"""What `--vs` may name."""
