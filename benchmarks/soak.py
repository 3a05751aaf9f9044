"""Run a streamed model for a long time with random requests, and compare every token with the resident model's.

python benchmarks/soak.py FOLDER --memory 9GB [--seconds 3600 --requests 12]

First a process of its own, with the whole model in memory, answers some seeded requests. Then the streamed model is
asked for the same ones in random order, in fresh and in running conversations of random contexts, and many are
cancelled. Fails if a token differs, if the process ever holds more than the budget, or if open files or threads grow
in number."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixtral_mlx.bench.worker import NoText
from mixtral_mlx.budget import parse_size
from mixtral_mlx.generate import Conversation, Sampling, stream_generate
from mixtral_mlx.memory import peak_rss_bytes
from mixtral_mlx.weights import Loaded, load

_PROMPTS = (1, 5, 17, 40, 90)
_LONG_PROMPT = 300
_ENOUGH_BYTES = 1 << 40
# A process that is stopped for a while has not run meanwhile.
_MOST_OF_A_STEP_S = 120.0
_SAY_EVERY_S = 60.0


@dataclass(frozen=True)
class Request:
    """A prompt of seeded ids, and how it is continued."""

    prompt: tuple[int, ...]
    tokens: int
    temperature: float
    seed: int


def requests(count: int, vocabulary: int) -> list[Request]:
    """The same `count` requests each time; the last one is long."""
    draw = random.Random(20261126)
    lengths = [draw.choice(_PROMPTS) for _ in range(count - 1)] + [_LONG_PROMPT]
    return [
        Request(
            tuple(draw.randrange(vocabulary) for _ in range(length)),
            draw.randint(4, 16),
            draw.choice((0.0, 1.0)),
            draw.randrange(1 << 30),
        )
        for length in lengths
    ]


def answer(loaded: Loaded, request: Request, conversation: Conversation | None = None) -> Iterator[int]:
    """The tokens of an answer, one at a time."""
    sampling = Sampling(temperature=request.temperature, seed=request.seed, max_tokens=request.tokens, ignore_eos=True)
    without_text: Any = NoText()
    for chunk in stream_generate(loaded.model, without_text, request.prompt, sampling, conversation=conversation):
        if chunk.token is not None:
            yield chunk.token


def reference(folder: Path, count: int) -> None:
    """Print the resident model's answers, one a line."""
    loaded = load(folder, memory=_ENOUGH_BYTES)
    for request in requests(count, loaded.config.vocab_size):
        print(json.dumps(list(answer(loaded, request))), flush=True)


class Soak:
    """The streamed model under random use."""

    def __init__(self, loaded: Loaded, expected: list[list[int]], seed: int) -> None:
        self.loaded = loaded
        self.expected = expected
        self.requests = requests(len(expected), loaded.config.vocab_size)
        self.draw = random.Random(seed)
        self.conversation: Conversation | None = None
        self.counts: Counter[str] = Counter()

    def step(self) -> None:
        """One request, perhaps cancelled; an error if a token differs."""
        number = self.draw.randrange(len(self.requests))
        request, expected = self.requests[number], self.expected[number]
        stop = self.draw.randint(1, len(expected)) if self.draw.random() < 0.4 else len(expected)
        got = []
        for token in answer(self.loaded, request, self._conversation(request)):
            got.append(token)
            if len(got) == stop:
                break  # Dropping the iterator cancels.
        assert got == expected[:stop], f"request {number}: {got} instead of {expected[:stop]}"
        self.counts["cancelled" if stop < len(expected) else "whole"] += 1
        self.counts["tokens"] += len(got)

    def _conversation(self, request: Request) -> Conversation:
        """The running one, which may hold anything, or a new one of another size."""
        if self.conversation is None or self.draw.random() < 0.5:
            context = self.draw.choice((512, 1024, self.loaded.plan.context))
            self.conversation = Conversation(self.loaded.model, context=context)
        return self.conversation


def descriptors() -> int:
    """How many files this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def soak(folder: Path, memory: int, seconds: float, expected: list[list[int]], seed: int) -> dict[str, object]:
    """Use the streamed model for `seconds`; returns what was seen."""
    loaded = load(folder, memory=memory)
    assert loaded.streaming, "nothing to stream: the model fits"
    run = Soak(loaded, expected, seed)
    run.step()
    files, threads = descriptors(), threading.active_count()
    done = said = 0.0
    while done < seconds:
        start = time.monotonic()
        run.step()
        done += min(time.monotonic() - start, _MOST_OF_A_STEP_S)
        assert peak_rss_bytes() <= memory, f"{peak_rss_bytes() / 1e9:.2f} GB held"
        assert (descriptors(), threading.active_count()) == (files, threads), "files or threads have grown in number"
        if done - said > _SAY_EVERY_S:
            said = done
            print(
                f"{done:.0f} s: {dict(run.counts)}, peak {peak_rss_bytes() / 1e9:.2f} GB", file=sys.stderr, flush=True
            )
    return {
        "seconds": seconds,
        "budget_bytes": memory,
        "peak_rss_bytes": peak_rss_bytes(),
        "slots_per_layer": loaded.plan.slots_per_layer,
        "files": files,
        "threads": threads,
        **run.counts,
        **asdict(loaded.streaming.statistics),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", type=parse_size, default=parse_size("9GB"))
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reference:
        reference(args.folder, args.requests)
        return
    command = [sys.executable, __file__, str(args.folder), "--requests", str(args.requests), "--reference"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    expected = [json.loads(line) for line in done.stdout.splitlines()]
    print(f"the resident model has answered {len(expected)} requests", file=sys.stderr, flush=True)
    print(json.dumps(soak(args.folder, args.memory, args.seconds, expected, args.seed)))


if __name__ == "__main__":
    main()
