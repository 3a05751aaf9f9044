"""A rank that runs prompts through its part of a model: what it held, read and sent, and on rank 0 tokens and logits.

Greedy, by way of the engine's batches: the prompts of a case side by side, after being read one by one in chunks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mixtral_mlx.distributed import Split
from mixtral_mlx.distributed.part import shard
from mixtral_mlx.engine import batch
from mixtral_mlx.generate import new_caches
from mixtral_mlx.weights import Loaded, load

CHUNK = 512
GENERATED = 4


def answers(
    loaded: Loaded, prompts: Sequence[Sequence[int]], next_token: Any, generated: int = GENERATED
) -> tuple[list[list[int]], np.ndarray]:
    """Tokens after each prompt, and the logits (prompts, V) that the first is chosen from."""
    model, caches, first = loaded.model, [new_caches(loaded.config, None) for _ in prompts], []
    for prompt, cache in zip(prompts, caches, strict=True):
        for start in range(0, len(prompt), CHUNK):
            is_last = start + CHUNK >= len(prompt)
            (logits,) = run(model, [batch.Part(prompt[start : start + CHUNK], cache, int(is_last))])
            mx.eval([layer.state for layer in cache])
        first.append(logits)
    tokens = [[next_token(logits)] for logits in first]
    for _ in range(generated - 1):
        parts = [batch.Part(said[-1:], cache, 1) for said, cache in zip(tokens, caches, strict=True)]
        for said, logits in zip(tokens, run(model, parts), strict=True):
            said.append(next_token(logits))
    return tokens, np.concatenate([np.array(logits.astype(mx.float32)) for logits in first])


def run(model: Any, parts: Sequence[batch.Part]) -> list[mx.array]:
    """A pass; where there is no head, only the passage through the layers."""
    if "norm" in model.model:
        logits = batch.run(model, parts)
        mx.eval(logits)
        return logits
    model.logits = lambda hidden: mx.zeros((*hidden.shape[:-1], 1))
    return batch.run(model, parts)


def prompts_of(case: dict[str, Any]) -> list[list[int]]:
    rng = np.random.default_rng(case["tokens"])
    return rng.integers(3, 250, (case["batch"], case["tokens"])).tolist()


def main() -> None:
    """Run a job given as JSON: folders, kind, weights, slots, cases, and where logits go."""
    job = json.loads(sys.argv[1])
    group = mx.distributed.init(strict=True, backend="ring")
    split = Split.of(job["kind"], group.size(), job.get("weights"))

    def agreed(logits: mx.array) -> int:
        """Rank 0's choice, known to all."""
        token = mx.argmax(logits[-1]) if group.rank() == 0 else mx.array(0)
        return cast(int, mx.distributed.all_sum(token.astype(mx.int32), group=group).item())

    print(json.dumps([ran(folder, job, group, split, agreed) for folder in job["folders"]]))


def ran(folder: str, job: dict[str, Any], group: mx.distributed.Group, split: Split, agreed: Any) -> dict[str, Any]:
    """All cases with one folder."""
    loaded = shard(folder, group, split)
    if slots := job.get("slots"):
        plan = replace(loaded.plan, mode="streamed", slots=(slots,) * len(loaded.plan.slots))
        loaded = shard(folder, group, split, memory=plan)
    joint: Any = loaded.model.model.joint
    said = []
    for n, case in enumerate(job["cases"]):
        before = joint.sent_bytes
        tokens, logits = answers(loaded, prompts_of(case), agreed, case.get("generated", GENERATED))
        said.append({"tokens": tokens, "sent_bytes": joint.sent_bytes - before})
        if group.rank() == 0:
            np.save(f"{job['logits']}.{Path(folder).name}.{n}.npy", logits)
    streaming = loaded.streaming
    if streaming:
        streaming.close()
    return {
        "cases": said,
        "chunk_tokens": loaded.plan.chunk_tokens,
        "held_bytes": loaded.weights_bytes,
        "read_bytes": loaded.read_bytes,
        "streamed_bytes": streaming.statistics.bytes_read if streaming else 0,
        "layers": type(loaded.model.layers[0]).__module__,
    }


def alone(folder: str, case: dict[str, Any]) -> tuple[list[list[int]], np.ndarray]:
    """The same in one process."""
    loaded = load(folder)
    return answers(loaded, prompts_of(case), lambda logits: cast(int, mx.argmax(logits[-1]).item()))


if __name__ == "__main__":
    main()
