"""A model over several machines, with MLX's own distributed engine. Done to the model from outside.

    split     who is given how much: heads, rows, experts or layers, in whole units
    part      a rank's share of a checkpoint, read from disk by itself and joined with the others' in a group
    layers    the model's layers with the sums and messages that they need between ranks
    kernels   the same for layers that compute with `cpu`'s kernels

Rank 0 holds the embeddings, the last norm and the head, and is the only one with logits. Nothing here is imported
where a model runs on one machine."""

from .part import Part, shard
from .split import KINDS, DistributedError, Split

__all__ = ["KINDS", "DistributedError", "Part", "Split", "shard"]
