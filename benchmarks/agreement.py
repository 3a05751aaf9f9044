"""Whether a model says the same here as in mlx-lm with the same weights, both in float32.

    python benchmarks/agreement.py FOLDER [--tokens 64] [--prompt 64]

Prints whether so many greedy tokens are equal, and how far the logits of a prompt of seeded ids are apart. Sums are
taken in another order here, so they differ a little; where two experts are as good as equal, a little decides."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mixtral_mlx.borrowed import KVCache
from mixtral_mlx.weights import load


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """What `model` continues `prompt` with, the likeliest token each time."""
    cache, ids, tokens = [KVCache() for _ in model.layers], list(prompt), list[int]()
    for _ in range(count):
        ids = [int(mx.argmax(model(mx.array([ids]), cache)[0, -1]))]
        tokens += ids
    return tokens


def differences(ours: mx.array, theirs: mx.array) -> np.ndarray[Any, Any]:
    """For each token of a prompt the largest difference of its logits."""
    return np.array(mx.abs(ours - theirs).max(axis=-1))[0]


def theirs_in_float32(folder: Path) -> Any:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    args = parser.parse_args()
    ours, theirs = load(args.folder, dtype="float32").model, theirs_in_float32(args.folder)
    ids = np.random.default_rng(0).integers(3, ours.args.vocab_size, args.prompt).tolist()
    reference = theirs(mx.array([ids]))
    apart = differences(ours(mx.array([ids])), reference)
    scale = float(mx.abs(reference).max())
    print(f"logits of {args.prompt} tokens, the largest {scale:.2f}: {np.median(apart):.1e} apart at the median token,")
    print(f"  {apart.max():.1e} at the worst, {int((apart > 1e-3).sum())} tokens by more than 1e-3")
    start = ids[:8]
    same = greedy(ours, start, args.tokens) == greedy(theirs, start, args.tokens)
    print(f"{args.tokens} greedy tokens: {'equal' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
