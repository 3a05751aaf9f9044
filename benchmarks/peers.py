"""A model next to llama.cpp and transformers on the CPU: prompt and decode speed, in turns A B C A B C.

    python benchmarks/export.py FOLDER --gguf F.gguf --transformers D
    python benchmarks/peers.py FOLDER --python OTHER_PYTHON --gguf F.gguf --transformers D [--turns 5 --threads 2]

OTHER_PYTHON is that of an environment with llama-cpp-python, torch and transformers. Each engine has a process of its
own, which keeps its model. A row that would take an engine longer than --seconds a turn, judged by the rows before
it, is left out for that engine, and Ctrl-C shows what there is. The table is Markdown: medians (lowest to highest) in
tokens per second."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_mlx.memory import chip

_HERE = Path(__file__).parent
_WARM_UP_TOKENS = 8


class PeerError(Exception):
    """An engine that cannot load, or cannot do what it was asked; `str()` says why."""


@dataclass(frozen=True)
class Row:
    """`tokens` of a prompt, or made one by one after `context` others."""

    op: str
    tokens: int
    context: int = 0

    def __str__(self) -> str:
        if self.op == "prompt":
            return f"prompt of {self.tokens}"
        return f"decode of {self.tokens} at context {self.context:,}"

    def request(self) -> dict[str, Any]:
        return {"tokens": self.tokens} if self.op == "prompt" else {"tokens": self.tokens, "context": self.context}


_ROWS = (Row("prompt", 64), Row("prompt", 512), Row("decode", 32), Row("decode", 8, 2048))
_ROOM = max(row.context + row.tokens for row in _ROWS) + 64


@dataclass
class Peer:
    """An engine: the command that starts its worker, what it can be asked, and its samples by row, in tokens/s."""

    name: str
    command: tuple[str, ...]
    reads_contexts: bool = True  # asked for steps after a context
    fills_contexts: bool = False  # has a context at once, without reading it
    samples: dict[Row, list[float]] = field(default_factory=dict)
    reasons: dict[Row, str] = field(default_factory=dict)

    def expected_s(self, row: Row) -> float:
        """Seconds that a first turn will take, by the rows before it; 0 if there were none."""
        prompt_s = 1 / max((self._speed(other) for other in self.samples if other.op == "prompt"), default=float("inf"))
        if row.op == "prompt":
            return row.tokens * prompt_s
        step_s = 1 / max((self._speed(other) for other in self.samples if other.op == "decode"), default=float("inf"))
        return row.tokens * step_s + (0 if self.fills_contexts else row.context * prompt_s)

    def _speed(self, row: Row) -> float:
        return statistics.median(self.samples[row]) if self.samples[row] else float("inf")


class Worker:
    """A peer's process; starting one waits until its model is loaded. The protocol is described in `peer.py`."""

    def __init__(self, peer: Peer, threads: int) -> None:
        self._name = peer.name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, str(threads))}
        self._process = subprocess.Popen(
            peer.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C ends the measuring, and what was measured is still shown.
        )
        try:
            self.about = self._answer()
            self.ask("prompt", tokens=_WARM_UP_TOKENS)  # A process's first sums are slow.
        except BaseException:
            self.close()
            raise

    def ask(self, op: str, **request: Any) -> float:
        """The seconds it took; raises `PeerError`."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # What ended it is said by the missing answer.
            self._process.stdin.write(json.dumps({"op": op, **request}) + "\n")
            self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise PeerError(f"{self._name} ended with exit code {self._process.wait()}: {''.join(last)}")
        answered: dict[str, Any] = json.loads(line)
        if "error" in answered:
            raise PeerError(f"{self._name}: {answered['error']['message']}")
        if "unsupported" in answered:
            raise PeerError(answered["unsupported"])
        return answered


def measure(peers: Sequence[Peer], turns: int, threads: int, limit_s: float) -> dict[str, dict[str, Any]]:
    """Fill the peers' samples, row by row, in turns; what each said of itself, by name. Raises `PeerError`."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for peer in peers:
            workers[peer.name] = Worker(peer, threads)
            stack.callback(workers[peer.name].close)
        try:
            for row in _ROWS:
                _measure_row(row, peers, workers, turns, limit_s)
        except KeyboardInterrupt:
            print("\nStopped; this is what there is.", file=sys.stderr)
        print(f"\r{'':78}\r", end="", file=sys.stderr, flush=True)
        return {name: worker.about for name, worker in workers.items()}


def _measure_row(row: Row, peers: Sequence[Peer], workers: Mapping[str, Worker], turns: int, limit_s: float) -> None:
    for peer in peers:
        _leave_out_if_long(peer, row, limit_s)
    for turn in range(turns):
        for peer in peers:
            print(f"\r{row}: turn {turn + 1} of {turns}, {peer.name:20}", end="", file=sys.stderr, flush=True)
            _take_turn(peer, workers[peer.name], row)


def _leave_out_if_long(peer: Peer, row: Row, limit_s: float) -> None:
    peer_s = peer.expected_s(row)
    peer.samples[row] = []
    if row.context and not peer.reads_contexts:
        peer.reasons[row] = "not asked"
    elif peer_s > limit_s:
        peer.reasons[row] = f"left out: about {peer_s:.0f} s"


def _take_turn(peer: Peer, worker: Worker, row: Row) -> None:
    if row in peer.reasons:
        return
    try:
        peer.samples[row].append(row.tokens / worker.ask(row.op, **row.request()))
    except PeerError as failure:
        peer.reasons[row] = str(failure)


def table(peers: Sequence[Peer]) -> str:
    """Markdown: a row each, a column for each peer, and the first one's median divided by each other's."""
    ours, *others = peers
    head = ["tokens/s", *(peer.name for peer in peers), *(f"÷ {other.name}" for other in others)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in _ROWS:
        lines.append([str(row), *(_cell(peer, row) for peer in peers), *(_ratio(ours, other, row) for other in others)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(peer: Peer, row: Row) -> str:
    speeds = peer.samples.get(row)
    if row in peer.reasons or not speeds:
        return peer.reasons.get(row, "–")
    return f"{_speed(statistics.median(speeds))} ({_speed(min(speeds))} to {_speed(max(speeds))})"


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.3g}"


def _ratio(ours: Peer, other: Peer, row: Row) -> str:
    both = [peer.samples.get(row) for peer in (ours, other) if row not in peer.reasons]
    if len(both) < 2 or not both[0] or not both[1]:
        return "–"
    return f"{statistics.median(both[0]) / statistics.median(both[1]):.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", required=True, metavar="OTHER_PYTHON", help="where the other engines are installed")
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp")
    parser.add_argument("--transformers", type=Path, help="the model for transformers")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="of ours")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="the longest a row may take an engine in a turn")
    args = parser.parse_args()
    if args.turns < 1 or args.threads < 1:
        parser.error("--turns and --threads must be at least 1")
    threads = str(args.threads)
    ours = (sys.executable, str(_HERE / "peer_ours.py"), str(args.folder), args.dtype)
    peers = [Peer("mixtral-mlx", ours, fills_contexts=True)]
    if args.gguf:
        llama = (args.python, str(_HERE / "peer_llama.py"), str(args.gguf), threads, str(_ROOM))
        peers.append(Peer("llama.cpp", llama))
    if args.transformers:
        torch = (args.python, str(_HERE / "peer_transformers.py"), str(args.transformers), threads)
        peers.append(Peer("transformers", torch, reads_contexts=False))
    try:
        about = measure(peers, args.turns, args.threads, args.seconds)
    except (PeerError, OSError) as error:
        sys.exit(str(error))
    where = f"{chip() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{args.folder.name} on {where}; {threads} threads, {args.turns} turns, medians (lowest to highest)\n")
    print(table(peers) + "\n")
    for name, said in about.items():
        print(f"- {name}: {said['version']}, {said['dtype']}, loaded in {said['load_s']:.1f} s")


if __name__ == "__main__":
    main()
