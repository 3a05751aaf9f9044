"""The HTTP server under load: many streams on few places, clients that leave, clients that hardly read.

    python benchmarks/serving.py [--requests 2000] [--streams 256] [--slots 8] [--mlx-lm]

Both servers run the demo model, each in a process of its own, one after the other, with the same prompts. Of the
clients one in five leaves at a random place, and eight more read one byte a second all the while. Every other answer
is compared with the one that was given when nobody else asked."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_PROMPTS = [
    "Hello",
    "What is the capital of Italy?",
    "What is the capital of France?",
    "What is 12 plus 30?",
    "What is the opposite of hot?",
    "What does a cow say?",
    "Count from 1 to 10.",
    "How many legs has a spider?",
]
_MAX_TOKENS = 40
_SLOW_READERS = 8
_LEAVE = 0.2
_PATIENCE_S = 600


@dataclass
class Seen:
    """What the clients saw of a server."""

    finished: int = 0
    left: int = 0
    wrong: int = 0
    refused: int = 0
    lost: int = 0
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    def report(self, side: str) -> None:
        first, gaps = _percentiles(self.first_s), _percentiles(self.gaps_s)
        tenth = max(len(self.rss) // 10, 1)
        print(f"{side}: {self.finished + self.left} requests in {self.seconds:.1f} s")
        print(f"  finished {self.finished}, left on purpose {self.left}, wrong {self.wrong}", end="")
        print(f", refused {self.refused}, lost {self.lost}")
        print(f"  first token p50 {first[0]:.3f} s, p95 {first[1]:.3f} s, longest {max(self.first_s, default=0):.3f} s")
        print(
            f"  gaps p50 {1e3 * gaps[0]:.1f} ms, p95 {1e3 * gaps[1]:.1f} ms; {self.tokens / self.seconds:.0f} pieces/s"
        )
        print(f"  RSS in the second tenth {statistics.mean(self.rss[tenth : 2 * tenth + 1]) / 1e6:.0f} MB", end="")
        print(f", in the last {statistics.mean(self.rss[-tenth:]) / 1e6:.0f} MB, at most {max(self.rss) / 1e6:.0f} MB")


def _percentiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (float("nan"), float("nan"))
    cuts = statistics.quantiles(values, n=20)
    return cuts[9], cuts[18]


@contextmanager
def ours(slots: int, streams: int) -> Iterator[tuple[int, int]]:
    """Our server: its port and process."""
    options = ["--max-concurrent", str(slots), "--max-queue", str(streams + 2 * _SLOW_READERS)]
    command = [sys.executable, "-m", "mixtral_mlx", "serve", "--port", "0", "--quiet", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield int(process.stdout.readline().rpartition(":")[2]), process.pid
        finally:
            process.terminate()


@contextmanager
def mlx_lms(slots: int, streams: int) -> Iterator[tuple[int, int]]:
    """mlx-lm's server, with what it needs to answer the same prompts."""
    from mixtral_mlx import locate

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(locate(None)), "--port", str(port)]
    command += ["--decode-concurrency", str(slots), "--log-level", "ERROR"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            for _ in range(600):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()


async def ask(port: int, prompt: str, leave_after: int | None, seen: Seen) -> str | None:
    """One streamed completion; the text of those that were read to the end."""
    asked = {"prompt": f"[INST] {prompt} [/INST]", "max_tokens": _MAX_TOKENS, "temperature": 0, "stream": True}
    body = json.dumps(asked).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    begun = last = time.monotonic()
    text, pieces = "", 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            seen.refused += 1
            return None
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                return text
            if not line.startswith(b"data: "):
                continue
            choices = json.loads(line[6:]).get("choices")
            if not choices or not choices[0].get("text"):
                continue
            now = time.monotonic()
            (seen.gaps_s if pieces else seen.first_s).append(now - (last if pieces else begun))
            last = now
            text += choices[0]["text"]
            pieces += 1
            seen.tokens += 1
            if pieces == leave_after:
                seen.left += 1
                return None
        seen.lost += 1
        return None
    except (OSError, asyncio.IncompleteReadError):
        seen.lost += 1
        return None
    finally:
        writer.close()


async def dawdle(port: int) -> None:
    """Ask for much, and read a byte of it a second."""
    asked = {"prompt": "Once", "max_tokens": 600, "temperature": 1, "stream": True, "logprobs": 5}
    body = json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    try:
        while await reader.read(1):
            await asyncio.sleep(1)
    finally:
        writer.close()


async def load(port: int, pid: int, requests: int, streams: int) -> Seen:
    """Ask so many times, so many at once."""
    seen, chance = Seen(), random.Random(0)
    right = {prompt: await ask(port, prompt, None, Seen()) for prompt in _PROMPTS}
    waiting = [
        (chance.choice(_PROMPTS), chance.randint(1, 6) if chance.random() < _LEAVE else None) for _ in range(requests)
    ]

    async def client() -> None:
        while waiting:
            prompt, leave_after = waiting.pop()
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    text = await ask(port, prompt, leave_after, seen)
                    seen.finished += text is not None
                    seen.wrong += text is not None and text != right[prompt]
                    continue
            seen.lost += 1

    async def watch() -> None:
        while True:
            seen.rss.append(_rss(pid))
            await asyncio.sleep(0.25)

    beside = [asyncio.ensure_future(dawdle(port)) for _ in range(_SLOW_READERS)] + [asyncio.ensure_future(watch())]
    begun = time.monotonic()
    await asyncio.gather(*(client() for _ in range(streams)))
    seen.seconds = time.monotonic() - begun
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    return seen


def _rss(pid: int) -> int:
    if sys.platform == "linux":
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--mlx-lm", action="store_true", help="then mlx-lm's server, too")
    parser.add_argument("--peer-requests", type=int, help="fewer requests for mlx-lm's (as many)")
    given = parser.parse_args()
    sides = [("mixtral-mlx", ours, given.requests)]
    if given.mlx_lm:
        sides.append(("mlx-lm", mlx_lms, given.peer_requests or given.requests))
    for side, server, requests in sides:
        with server(given.slots, given.streams) as (port, pid):
            asyncio.run(load(port, pid, requests, given.streams)).report(side)


if __name__ == "__main__":
    main()
