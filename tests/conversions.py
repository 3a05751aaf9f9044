"""What the tests of conversions share: a source in shards, folders compared byte by byte, a process to be killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mixtral_mlx.convert import tokenizer
from mixtral_mlx.convert.run import Report, Request, convert

from .checkpoints import TINY, TOKENIZERS, read_arrays, unstacked, write_tiny, write_weights

SOURCE = replace(TINY, dtype="bfloat16", vocab_size=32000)


def write_source(folder: Path, shards: int = 3) -> Path:
    """A tiny Mixtral in Hugging Face's form, its tensors dealt out to `shards` files."""
    write_tiny(folder, SOURCE)
    weights = unstacked(read_arrays(folder))
    for file in folder.glob("model*"):
        file.unlink()
    names = sorted(weights)
    return write_weights(folder, *({name: weights[name] for name in names[n::shards]} for n in range(shards)))


def contents(folder: Path, *, manifest: bool = True) -> dict[str, bytes]:
    """File name → bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if manifest or path.name != "manifest.json"}


def source_arrays(source: Path) -> dict[str, mx.array]:
    """The source's tensors, its experts stacked."""
    arrays = read_arrays(source)
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    stacks: dict[str, dict[int, mx.array]] = {}
    result = {}
    for name, array in arrays.items():
        moe, found, rest = name.partition(".experts.")
        if found:
            expert, letter, part = rest.split(".")
            stacks.setdefault(f"{moe}.switch_mlp.{names[letter]}.{part}", {})[int(expert)] = array
        else:
            result[name] = array
    return result | {name: mx.stack([stack[n] for n in sorted(stack)]) for name, stack in stacks.items()}


@cache
def _tokenizer_text() -> str:
    import sentencepiece

    model = files("mistral_common") / "data" / TOKENIZERS["v1"]
    return tokenizer._tokenizer(sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes()))


@pytest.fixture
def quick_tokenizer(monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes tokenizer.json, always the same here, only once."""
    text = _tokenizer_text()
    monkeypatch.setattr(tokenizer, "_tokenizer", lambda pieces: text)
    return text


# A process that is killed.

_DISK_CALLS = {
    *("open", "write", "pwrite", "ftruncate", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "symlink"),
}


@dataclass(frozen=True)
class Task:
    """What a process converts, and before which of its disk calls it is killed; those made go to `log`."""

    request: Request
    tokenizer: str
    kill_before: int | None = None
    log: Path | None = None
    prepare: Callable[..., None] | None = None
    arguments: tuple[Any, ...] = ()


def run_task(task: Task) -> None:
    """Convert, in a process of its own: counts disk calls in all threads and dies before one of them."""
    if task.prepare:
        task.prepare(*task.arguments)
    tokenizer._tokenizer = lambda pieces: task.tokenizer
    calls: list[str] = []

    def hook(frame: Any, event: str, argument: Any) -> None:
        if event == "c_call" and getattr(argument, "__name__", "") in _DISK_CALLS:
            calls.append(argument.__name__)
            if len(calls) - 1 == task.kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(hook)
    sys.setprofile(hook)
    convert(task.request)
    sys.setprofile(None)
    if task.log:
        task.log.write_text("\n".join(calls))


def convert_counting(request: Request, counted: list[str], monkeypatch: pytest.MonkeyPatch) -> Report:
    """Convert, adding to `counted` the name of every piece that is done."""
    from mixtral_mlx.convert.journal import Journal

    done = Journal.done

    def counting(self: Journal, piece: str, crc: int) -> None:
        counted.append(piece)
        done(self, piece, crc)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "done", counting)
        return convert(request)


def ticked(work: Path) -> list[str]:
    """Names of the pieces a work folder's journal says are done."""
    return [entry["done"] for entry in _entries(work) if "done" in entry]


def used_up(work: Path) -> list[str]:
    """Names of the source files it says are used up."""
    return [entry["used"] for entry in _entries(work) if "used" in entry]


def _entries(work: Path) -> list[Mapping[str, Any]]:
    journal = work / "journal"
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return [json.loads(line) for line in lines]
