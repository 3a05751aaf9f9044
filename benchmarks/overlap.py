"""How near streaming comes to what cannot be beaten: the longer of computing alone and of reading alone.

python benchmarks/overlap.py FOLDER [--slots 2 3 4 6 --tokens 12 --turns 3]

FOLDER has to fit in memory beside its streamed self. In turns, in one process: the disk's parallel read speed, seconds
a token of the resident model (all hits), and seconds a token of the streamed one with the bytes it read. Tokens are
drawn at temperature 1, so that random weights route them evenly.

On a virtual machine the disk is served by the processor that computes. So the two are also measured at once: products
as the model does them, while other threads read as fast as they can. What both lose then, no streaming can win back;
the last column is the floor with that taken into account."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from disk import Reading, forget, parallel_read_speed

from mixtral_mlx.bench.worker import NoText
from mixtral_mlx.generate import Sampling, stream_generate
from mixtral_mlx.weights import Loaded, load

_ENOUGH_BYTES = 1 << 40


@dataclass(frozen=True)
class Turn:
    """One turn's figures: seconds a token, bytes a token, bytes a second."""

    compute_s: float
    token_s: float
    stall_s: float
    token_bytes: float
    read_bytes_per_s: float
    compute_beside_s: float
    read_beside_bytes_per_s: float

    @property
    def read_s(self) -> float:
        return self.token_bytes / self.read_bytes_per_s

    @property
    def floor_s(self) -> float:
        """Reading and computing as fast as each is alone, at the same time."""
        return max(self.compute_s, self.read_s)

    @property
    def shared_floor_s(self) -> float:
        """Both at once as fast as they are then; when the shorter is done, the other as fast as it is alone."""
        reading, computing = self.token_bytes / self.read_beside_bytes_per_s, self.compute_beside_s
        if computing <= reading:
            return computing + (1 - computing / reading) * self.read_s
        return reading + (1 - reading / computing) * self.compute_s


def tokens(loaded: Loaded, count: int, seed: int) -> Iterator[int]:
    """Drawn tokens after a short prompt; the first to come includes the prompt."""
    draw = random.Random(seed)
    prompt = [draw.randrange(loaded.config.vocab_size) for _ in range(4)]
    without_text: Any = NoText()
    sampling = Sampling(temperature=1.0, seed=seed, max_tokens=count, ignore_eos=True)
    for chunk in stream_generate(loaded.model, without_text, prompt, sampling):
        if chunk.token is not None:
            yield chunk.token


def seconds_per_token(loaded: Loaded, count: int, seed: int) -> float:
    """Median seconds between tokens, after the first two."""
    times = [time.perf_counter() for _ in tokens(loaded, count + 3, seed)]
    # The last is already there when the one before it is handed out.
    return median(after - before for before, after in pairwise(times[1:-1]))


def streamed(loaded: Loaded, count: int, seed: int) -> tuple[float, float, float]:
    """Mean seconds, bytes read and seconds stalled a token, after the first two."""
    assert loaded.streaming
    seen = [(time.perf_counter(), loaded.streaming.statistics) for _ in tokens(loaded, count + 3, seed)][1:-1]
    (start, before), (end, after) = seen[0], seen[-1]
    steps = len(seen) - 1
    read, stalled = after.bytes_read - before.bytes_read, after.stall_s - before.stall_s
    return (end - start) / steps, read / steps, stalled / steps


def side_by_side(loaded: Loaded, files: Sequence[Path], count: int, seed: int) -> tuple[float, float]:
    """Seconds a token of the resident model while the disk is read all the time, and how fast it is read then."""
    with Reading(files, seed) as reading:
        begun, start = reading.nbytes, time.perf_counter()
        compute_s = seconds_per_token(loaded, count, seed)
        return compute_s, (reading.nbytes - begun) / (time.perf_counter() - start)


def measure(folder: Path, slots: int, count: int, turns: int) -> list[Turn]:
    """The turns with `slots` slots in each layer."""
    files = sorted(folder.glob("*.safetensors"))
    resident = load(folder, memory=_ENOUGH_BYTES)
    plan = replace(resident.plan, mode="streamed", slots=(slots,) * resident.config.num_hidden_layers)
    behind = load(folder, memory=plan)
    assert behind.streaming
    forget(files)
    result = []
    for turn in range(turns):
        speed = parallel_read_speed(files, turn)
        compute_s = seconds_per_token(resident, count, turn)
        token_s, token_bytes, stall_s = streamed(behind, count, turn)
        beside = side_by_side(resident, files, count, turn)
        result.append(Turn(compute_s, token_s, stall_s, token_bytes, speed, *beside))
    behind.streaming.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slots", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.json:
        print("slots  s/token  compute  reading  stall   GB/token  GB/s  ÷ floor   beside: compute  GB/s  ÷ floor")
    for slots in args.slots:
        for turn in measure(args.folder, slots, args.tokens, args.turns):
            ratios = turn.token_s / turn.floor_s, turn.token_s / turn.shared_floor_s
            if args.json:
                print(json.dumps({"slots": slots, **vars(turn), "of_floor": ratios[0], "of_shared_floor": ratios[1]}))
                continue
            print(
                f"{slots:5}  {turn.token_s:7.3f}  {turn.compute_s:7.3f}  {turn.read_s:7.3f}  {turn.stall_s:5.3f}  "
                f"{turn.token_bytes / 1e9:9.2f}  {turn.read_bytes_per_s / 1e9:4.2f}  {ratios[0]:7.2f}  "
                f"{turn.compute_beside_s:15.3f}  {turn.read_beside_bytes_per_s / 1e9:4.2f}  {ratios[1]:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
