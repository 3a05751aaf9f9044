"""A model over several machines, with MLX's own distributed engine. Done to the model from outside.

    split     who is given how much: heads, rows, experts or layers, in whole units
    outlook   what each machine would hold, what goes between them, and how fast that should be
    part      a rank's share of a checkpoint, read from disk by itself and joined with the others' in a group
    layers    the model's layers with the sums and messages that they need between ranks
    kernels   the same for layers that compute with `cpu`'s kernels
    link      what ranks say to each other beside that: who they are, what is next, and that they are alive
    mirror    rank 0's caches, as the other ranks have them
    ranks     all of it together: rank 0 is asked and tells, the others follow

Rank 0 holds the embeddings, the last norm and the head, and is the only one with logits. Nothing here is imported
where a model runs on one machine; importing this alone does not import MLX."""

from .split import KINDS, DistributedError, Split

__all__ = ["KINDS", "DistributedError", "Split"]
