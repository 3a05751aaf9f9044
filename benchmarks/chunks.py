"""What a prompt reads of a model larger than memory: each chunk's bytes, over those of the experts that were missing.

python benchmarks/chunks.py FOLDER [--memory 12GB --tokens 2048]

A prompt of random ids is read in two chunks of --tokens, the first with empty slots, the second with what that left in
them. Each missing expert should be read once, and nothing else: then the ratio is 1. It is less where a chunk does not
need every expert; as long as both do, fewer tokens show the same bytes in less time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

from peer import drawn_ids

from mixtral_mlx.bench.worker import NoText
from mixtral_mlx.budget import CHUNK_TOKENS, parse_size
from mixtral_mlx.experts import Statistics, Streaming
from mixtral_mlx.generate import Conversation, Sampling, stream_generate
from mixtral_mlx.weights import Loaded, load

_CHUNKS = 2


@dataclass(frozen=True)
class Moment:
    """Between two chunks: what streaming has done so far, and the bytes of the experts that are not in slots."""

    seconds: float
    statistics: Statistics
    missing_bytes: int


def moment(streaming: Streaming) -> Moment:
    missing_bytes = sum(pool.slot_of.count(-1) * pool.expert_bytes for pool in streaming.pools)
    return Moment(perf_counter(), streaming.statistics, missing_bytes)


def measure(loaded: Loaded, tokens: int) -> list[Moment]:
    """Read the prompt; the moments before, between and after its chunks."""
    assert loaded.streaming, "nothing to stream: the model fits"
    streaming, moments = loaded.streaming, []
    prompt = drawn_ids(loaded.config.vocab_size, _CHUNKS * tokens + 1)  # The last one is no part of a chunk.
    without_text: Any = NoText()
    conversation = Conversation(loaded.model, context=loaded.plan.context, chunk_tokens=tokens)
    list(
        stream_generate(
            loaded.model,
            without_text,
            prompt,
            Sampling(max_tokens=1, ignore_eos=True),
            conversation=conversation,
            on_prompt=lambda done, total: moments.append(moment(streaming)),
        )
    )
    return moments[: _CHUNKS + 1]


def rows(moments: Sequence[Moment], tokens: int, experts: int) -> list[str]:
    """A line for each chunk."""
    lines = [" tokens   needed   missing GB   read GB   ratio   seconds   stall"]
    for before, after in pairwise(moments):
        done = after.statistics - before.statistics
        lines.append(
            f"{tokens:7,}  {(done.hits + done.misses) / experts:7.1%}  {before.missing_bytes / 1e9:11.3f}  "
            f"{done.bytes_read / 1e9:8.3f}  {done.bytes_read / before.missing_bytes:6.3f}  "
            f"{after.seconds - before.seconds:8.1f}  {done.stall_s:6.1f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", type=parse_size, default=parse_size("12GB"))
    parser.add_argument("--tokens", type=int, default=CHUNK_TOKENS)
    args = parser.parse_args()
    # As much as whole chunks need, so that the slots are the same for any number of tokens.
    loaded = load(args.folder, memory=args.memory, context=_CHUNKS * CHUNK_TOKENS + 2)
    assert args.tokens <= loaded.plan.chunk_tokens, f"the budget has room for chunks of {loaded.plan.chunk_tokens}"
    experts = loaded.config.num_local_experts * loaded.config.num_hidden_layers
    print(f"{loaded.plan.slots_per_layer} slots per layer")
    print("\n".join(rows(measure(loaded, args.tokens), args.tokens, experts)))


if __name__ == "__main__":
    main()
