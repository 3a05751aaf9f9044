"""What the workers of `peers.py` share: two figures, timed alike for every engine, and the lines they come in.

Each worker runs in its engine's own environment, so this imports the standard library only. Requests on stdin and
answers on stdout are lines of JSON, one answer to each; first, unasked, {"ready": true, "engine": …, "version": …,
"dtype": …, "load_s": …}, or {"error": {"message": …}}. Requests:

    {"op": "prompt", "tokens": N}                   → {"seconds": …} from N ids to the next token
    {"op": "decode", "context": C, "tokens": N}     → {"seconds": …} for N tokens one by one after C, and one not timed
        "drawn": true feeds it tokens drawn at random, not its own: random weights soon repeat two or three
    {"op": "exit"}

What an engine cannot do it answers with {"unsupported": "why"}."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TextIO

_SEED = 20240108


class Engine(Protocol):
    """A loaded model that continues one sequence greedily."""

    name: str
    version: str
    dtype: str
    load_s: float
    vocab_size: int

    def read(self, ids: Sequence[int], *, kept: bool = False) -> int:
        """Read `ids` from the start; the token after them. `kept`: what is cached of them already may stay, and be
        filled in by any other means, because only the steps after them are timed."""

    def step(self, token: int) -> int:
        """Go on by one token; the one after it."""


def serve(load: Callable[[], Engine]) -> None:
    """Load, then answer until the requests end."""
    answers = _protected_stdout()
    try:
        engine = load()
    except (RuntimeError, MemoryError, ValueError, OSError, ImportError) as error:
        _say(answers, {"error": {"code": "cannot_load", "message": f"{type(error).__name__}: {error}", "hint": ""}})
        sys.exit(1)
    about = {"engine": engine.name, "version": engine.version, "dtype": engine.dtype, "load_s": engine.load_s}
    _say(answers, {"ready": True, **about})
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "exit":
            return
        _say(answers, _answer(engine, request))


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if request["op"] == "prompt":
            return {"seconds": _prompt_s(engine, request["tokens"])}
        if request["op"] == "decode":
            return {"seconds": _decode_s(engine, request["context"], request["tokens"], request.get("drawn", False))}
    except (RuntimeError, MemoryError, ValueError, NotImplementedError) as error:
        return {"unsupported": str(error) or type(error).__name__}
    return {"unsupported": f"there is no {request['op']} here"}


def _prompt_s(engine: Engine, tokens: int) -> float:
    ids = drawn_ids(engine.vocab_size, tokens)
    start = time.perf_counter()
    engine.read(ids)
    return time.perf_counter() - start


def _decode_s(engine: Engine, context: int, tokens: int, drawn: bool) -> float:
    ids = drawn_ids(engine.vocab_size, max(context, 1) + tokens)
    current = engine.step(engine.read(ids[:-tokens], kept=True))
    start = time.perf_counter()
    for given in ids[-tokens:]:
        current = engine.step(given if drawn else current)
    return time.perf_counter() - start


def drawn_ids(vocab_size: int, count: int) -> list[int]:
    """The first `count` of one endless list, so that a longer context begins with a shorter one."""
    drawn = random.Random(_SEED)
    return [drawn.randrange(3, vocab_size) for _ in range(count)]


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=answers, flush=True)


def _protected_stdout() -> TextIO:
    """A way to the real stdout; whatever else is printed from now on goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers
