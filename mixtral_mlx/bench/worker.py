"""One side of a benchmark in a process of its own: `python -m mixtral_mlx.bench.worker ENGINE FOLDER DTYPE [BYTES]`,
for ours with `[--parallel KIND] [--split A,B]` after it where `mlx.launch` started the benchmark.

The protocol, which a worker for any other engine speaks too, is lines of JSON: requests on stdin, answers on stdout,
one answer to each, in order. The process ends with its stdin. Nothing else may reach stdout; what the engine prints
belongs on stderr. First, unasked, when the model is loaded:

    {"ready": true, "engine": "mlx-lm", "version": "0.32.2", "dtype": "float32", "load_s": 1.2}

`dtype` is what is computed in, `load_s` the time from weights on disk to weights in memory without imports. A side that
keeps to a budget (ours is given it as BYTES) may add `"memory": {"mode": "resident" | "streamed", "budget_bytes": …,
"slots_per_layer": …}`. If it cannot load:

    {"error": {"code": "unsupported_dtype", "message": "what was found and expected", "hint": "what to do"}}

and the process ends; so it may do later, in place of an answer, where it cannot go on. Requests:

    {"op": "prompt", "tokens": N}
        Read N seeded random ids into an empty cache → {"seconds": …} until the next token's logits are there.
    {"op": "decode", "context": C, "batch": B, "tokens": N, "kv_bits": null | 8 | 4}
        Make N tokens for each of B sequences that hold C tokens each, greedily, each step fed with the one before,
        after one step that is not timed → {"seconds": …} for the N steps. What the C tokens are is not said: a cache
        filled with seeded values will do. `kv_bits` is how the cache is quantized; null leaves it as it comes. A side
        that streams experts may add what the N steps took of that: {"seconds": …, "streamed": {"hits": …, "misses": …,
        "ahead_reads": …, "ahead_used": …, "bytes_read": …, "io_s": …, "stall_s": …}}, as `experts.Statistics` counts.
    {"op": "memory"}
        → {"peak_bytes": …}, the most memory the process has used so far.
    {"op": "first", "prompt": TEXT}
        Complete a text → {"seconds": …} until its first token. Asked of a fresh process, and timed from its start,
        where the engine has no command line of its own.
    {"op": "exit"}
        End; needs no answer.

What a side cannot do it answers with {"unsupported": "why"}; the row then shows the reason."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import mlx.core as mx

from .. import cpu
from ..config import MixtralError
from ..opening import ModelChoice, joined
from ..session import peak_bytes, shown_bytes
from .floor import kv_bytes

if TYPE_CHECKING:
    from ..experts import Streaming

_SEED = 20240108
_PRIMED = 1


class Engine(Protocol):
    """A loaded model with its own way of reading a prompt and making tokens one at a time.

    `memory` is what it says of its budget, if it has one. `streaming` is there if experts are read as they are needed.
    """

    name: str
    version: str
    dtype: str
    load_s: float
    model: Any
    memory: dict[str, Any] | None
    streaming: Streaming | None

    def caches(self, request: Decode) -> list[Any]:
        """New caches for `request`, which the caller fills."""

    def check_room(self, request: Decode) -> None:
        """Raise ValueError if the cache that `request` fills has no place in the budget."""

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[Any]:
        """Continue `prompt` by `count` tokens, greedily; each comes when it is known."""


class Ours:
    """This package, as `generate` runs it, without text; `memory` is what the process may use, in bytes.

    `share` is this process's part of a model that other machines have the rest of."""

    name = "mixtral-mlx"
    memory: dict[str, Any] | None
    streaming: Streaming | None

    def __init__(self, folder: Path, dtype: str, memory: int | None = None, share: Any = None) -> None:
        from .. import __version__
        from ..weights import load

        # Imports are not what loading is timed for, on either side.
        import_module("mixtral_mlx.model")
        if cpu.is_available():
            import_module("mixtral_mlx.cpu.modules")
        loaded = load(folder, dtype=dtype, memory=memory, share=share)
        self._share = share
        self.version = __version__
        self.dtype, self.load_s, self.model = loaded.dtype, loaded.seconds, loaded.model
        self.plan, self.streaming, self.has_budget = loaded.plan, loaded.streaming, memory is not None
        self.memory = {name: getattr(self.plan, name) for name in ("mode", "budget_bytes", "slots_per_layer")}

    def check_room(self, request: Decode) -> None:
        plan = self.plan
        room = plan.budget_bytes - plan.needed_bytes + plan.parts["kv cache"]
        tokens = request.batch * (request.context + request.tokens + _PRIMED)
        need = int(tokens * kv_bytes(self.model.args, request.kv_bits, self.dtype))
        if self.has_budget and need > room:
            raise ValueError(f"its cache takes {shown_bytes(need)}, the budget has room for {shown_bytes(room)}")

    def caches(self, request: Decode) -> list[Any]:
        made = new_caches(self.model.args, request)
        if self._share and request.context:
            self._share.fill(made, request.batch, request.context)
        return made

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[Any]:
        from ..generate import Conversation, Sampling, stream_generate

        without_text: Any = NoText()
        sampling = Sampling(max_tokens=count, ignore_eos=True)
        conversation = Conversation(self.model, context=self.plan.context, chunk_tokens=self.plan.chunk_tokens)
        return stream_generate(self.model, without_text, prompt, sampling, conversation=conversation)


class NoText:
    """Stands in for a tokenizer where only ids matter: neither side's text is timed."""

    eos_id = -1

    def detokenizer(self, after: Sequence[int] = ()) -> NoText:
        return self

    def add(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class MlxLm:
    """mlx-lm as it comes."""

    name = "mlx-lm"
    memory: dict[str, Any] | None = None
    streaming: Streaming | None = None

    def __init__(self, folder: Path, dtype: str) -> None:
        import mlx_lm
        import mlx_lm.models.mixtral
        from mlx_lm.utils import load_model

        start = time.perf_counter()
        self.model, _ = load_model(folder)
        if dtype != "auto":
            self.model.set_dtype(getattr(mx, dtype))
            mx.eval(self.model.parameters())
        self.load_s = time.perf_counter() - start
        self.version = mlx_lm.__version__
        self.dtype = str(self.model.model.norm.weight.dtype).removeprefix("mlx.core.")

    def caches(self, request: Decode) -> list[Any]:
        return new_caches(self.model.args, request)

    def check_room(self, request: Decode) -> None:
        pass

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[Any]:
        from mlx_lm.generate import generate_step

        return generate_step(mx.array(list(prompt)), self.model, max_tokens=count)


@dataclass(frozen=True)
class Decode:
    """A request to make tokens: `tokens` steps for `batch` sequences of `context` tokens."""

    context: int
    batch: int
    tokens: int
    kv_bits: int | None


def read_prompt(engine: Engine, tokens: int) -> float:
    """Seconds to read `tokens` ids and have the next token."""
    prompt = seeded_ids(engine, tokens)
    start = time.perf_counter()
    next(engine.tokens(prompt, 1))
    return time.perf_counter() - start


@dataclass(frozen=True)
class Passed:
    """Seconds, and what streaming experts has done in them, if they are streamed."""

    seconds: float
    streamed: dict[str, float] | None

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds} | ({"streamed": self.streamed} if self.streamed else {})


def stopwatch(engine: Engine) -> Callable[[], Passed]:
    """Begin to measure; what is returned says what has passed since."""
    before, start = _counts(engine), time.perf_counter()

    def passed() -> Passed:
        seconds, after = time.perf_counter() - start, _counts(engine)
        return Passed(seconds, {name: count - before[name] for name, count in after.items()} or None)

    return passed


def _counts(engine: Engine) -> dict[str, float]:
    return asdict(engine.streaming.statistics) if engine.streaming else {}


def decode(engine: Engine, request: Decode) -> Passed:
    """What the steps of `request` take: in the engine's own loop for one fresh sequence, else in one both share."""
    engine.check_room(request)
    if request.batch == 1 and request.context == 0 and request.kv_bits is None:
        return _in_its_own_loop(engine, request.tokens)
    return in_the_shared_loop(engine, request)


def _in_its_own_loop(engine: Engine, tokens: int) -> Passed:
    steps = engine.tokens(seeded_ids(engine, 1), tokens + _PRIMED)
    next(steps)
    passed = stopwatch(engine)
    for _ in range(tokens):
        next(steps)
    return passed()


def in_the_shared_loop(engine: Engine, request: Decode) -> Passed:
    """What the steps of `request` take in a loop that asks nothing of an engine but its model."""
    cache = _filled_cache(engine, request)

    def step(tokens: mx.array) -> mx.array:  # (B,) → (B,)
        following = mx.argmax(engine.model(tokens[:, None], cache)[:, -1], axis=-1)
        mx.async_eval(following)
        return following

    current = step(mx.array(seeded_ids(engine, request.batch)))
    mx.eval(current)
    passed = stopwatch(engine)
    current = step(current)
    for _ in range(request.tokens - 1):
        # The next step is under way while this one's tokens are looked at, as in `generate`.
        following = step(current)
        current.tolist()
        current = following
    current.tolist()
    return passed()


def _filled_cache(engine: Engine, request: Decode) -> list[Any]:
    """A cache of `context` tokens for each sequence, of seeded values: reading a prompt for it could take hours."""
    caches, args = engine.caches(request), engine.model.args
    if request.context:
        width = _head_width(args)
        shape = (2, request.batch, args.num_key_value_heads, request.context, width)
        keys, values = mx.random.normal(shape, dtype=mx.float32, key=mx.random.key(_SEED)).astype(
            getattr(mx, engine.dtype)
        )
        for cache in caches:
            cache.update_and_fetch(keys, values)
            mx.eval(cache.state[:2])
    return caches


def new_caches(args: Any, request: Decode) -> list[Any]:
    """An empty cache for each layer of a model."""
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    width = _head_width(args)
    if request.kv_bits and width % 32:
        raise ValueError(f"heads {width} wide cannot be quantized")
    group = 64 if width % 64 == 0 else 32
    return [
        QuantizedKVCache(group, request.kv_bits) if request.kv_bits else KVCache()
        for _ in range(args.num_hidden_layers)
    ]


def _head_width(args: Any) -> int:
    return getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads


def seeded_ids(engine: Engine, count: int) -> list[int]:
    """The same `count` random ids each time."""
    drawn: Any = mx.random.randint(0, engine.model.args.vocab_size, (count,), key=mx.random.key(_SEED)).tolist()
    return list(drawn)


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """What the worker says to a request."""
    op = request.pop("op")
    try:
        if op == "prompt":
            return {"seconds": read_prompt(engine, request["tokens"])}
        if op == "decode":
            return decode(engine, Decode(**request)).to_dict()
    except (MixtralError, RuntimeError, MemoryError, ValueError) as error:
        if isinstance(error, MixtralError) and error.code in ("rank_lost", "rank_failed"):
            raise
        return {"unsupported": str(error) or type(error).__name__}
    if op == "memory":
        return {"peak_bytes": peak_bytes()}
    return {"unsupported": f"{engine.name} has a command line; there is no {op} here"}


def serve(engine: Engine, requests: TextIO, answers: TextIO) -> None:
    """Answer until the requests end."""
    ready = {"engine": engine.name, "version": engine.version, "dtype": engine.dtype, "load_s": engine.load_s}
    memory = {"memory": engine.memory} if engine.memory else {}
    _say(answers, {"ready": True, **ready, **memory})
    for line in requests:
        request = json.loads(line)
        if request["op"] == "exit":
            return
        _say(answers, answer(engine, request))


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=answers, flush=True)


def protected_stdout() -> TextIO:
    """A way to the real stdout; whatever else is printed from now on goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main() -> None:
    asked = _parser().parse_args()
    answers = protected_stdout()
    try:
        with _engine(asked, lambda error: _say(answers, _failure(error))) as engine:
            serve(engine, sys.stdin, answers)
    except MixtralError as error:
        _say(answers, _failure(error))
        sys.exit(1)
    except (RuntimeError, MemoryError, ValueError, OSError, ImportError) as error:
        _say(answers, _failure(MixtralError(f"{type(error).__name__}: {error}", code="cannot_load")))
        sys.exit(1)


def _failure(error: MixtralError) -> dict[str, Any]:
    return {"error": {"code": error.code, "message": str(error), "hint": error.hint}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=("mixtral-mlx", "mlx-lm"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("memory", type=int, nargs="?")
    parser.add_argument("--parallel")
    parser.add_argument("--split", type=lambda text: tuple(map(float, text.split(","))))
    return parser


@contextmanager
def _engine(asked: argparse.Namespace, on_lost: Callable[[MixtralError], object]) -> Iterator[Engine]:
    if asked.engine == "mlx-lm":
        yield MlxLm(asked.folder, asked.dtype)
        return
    choice = ModelChoice(
        str(asked.folder),
        asked.dtype,
        memory_bytes=asked.memory,
        quiet=True,
        parallel=asked.parallel,
        split=asked.split,
    )
    with joined(choice, on_lost) as mine:
        assert mine
        yield Ours(asked.folder, asked.dtype, asked.memory, mine.share)


if __name__ == "__main__":
    main()
