"""A rank's part of a model: which bytes of a checkpoint it is made of, and how it is joined with the others'.

`weights.load` does the loading, resident or streamed, as it does for a whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from ..config import MixtralError
from ..weights import Checkpoint, Loaded, Span, Tensor, load
from .layers import Joint, join
from .split import DistributedError, Portion, Split

if TYPE_CHECKING:
    from ..budget import Plan
    from ..model import Model

_PIECE_TOKENS = 512
"""Ranks of a pipeline read different pieces of a prompt at the same time, so there have to be several. Where experts
are streamed, each piece reads them again, and larger ones are better."""
_ON_RANK_0 = ("model.embed_tokens.", "model.norm.", "lm_head.")


def shard(folder: str | Path, group: mx.distributed.Group, split: Split, **options: Any) -> Loaded:
    """Load this rank's part of a checkpoint folder, joined with the others of `group`: call it on every rank.

    The model is to be called on every rank with the same ids and with caches of its own; only rank 0 has logits. The
    `options` are those of `weights.load`. Raises `MixtralError`."""
    return load(folder, share=Part(split, Joint(group)), **options)


@dataclass(frozen=True)
class Part:
    """The part of a rank in `joint`'s group, computed in `dtype`: a `weights.Share`."""

    split: Split
    joint: Joint
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.split.size != self.joint.size:
            raise DistributedError(
                f"The split is for {self.split.size} ranks and there are {self.joint.size}.", code="bad_split"
            )

    def of(self, checkpoint: Checkpoint) -> Checkpoint:
        """The rank's tensors, and a configuration that describes them."""
        portion = self.split.portions(checkpoint.config)[self.joint.rank]
        self.joint.experts = portion.experts
        self.joint.all_experts = checkpoint.config.num_local_experts
        found = (self._of_tensor(tensor, portion, checkpoint) for tensor in checkpoint.tensors)
        tensors = tuple(tensor for tensor in found if tensor)
        return Checkpoint(checkpoint.folder, portion.config(checkpoint.config), tensors)

    def _of_tensor(self, tensor: Tensor, portion: Portion, checkpoint: Checkpoint) -> Tensor | None:
        name = portion.renamed(tensor.name)
        if name is None or (self.joint.rank and name.startswith(_ON_RANK_0)):
            return None
        if self.split.kind == "pipeline":
            return replace(tensor, name=name)
        config = checkpoint.config
        module = name.rpartition(".")[0].rpartition(".")[2]
        heads, rows = (portion.heads, config.num_key_value_heads), (portion.rows, config.intermediate_size)
        if tensor.is_experts and self.split.kind == "expert":
            return _sliced(tensor, 0, portion.experts, config.num_local_experts)
        if tensor.is_experts:
            return _sliced(tensor, 2 if module == "down_proj" else 1, *rows)
        if module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            return _sliced(tensor, 1 if module == "o_proj" else 0, *heads)
        return tensor

    def shape(self, model: Model) -> None:
        """Routers know all experts, whoever has them; and only rank 0 has what comes before and after the layers."""
        for layer in model.layers:
            layer.block_sparse_moe.gate = nn.Linear(model.args.hidden_size, self.joint.all_experts, bias=False)
        if self.joint.rank:
            model.model.pop("embed_tokens")
            model.model.pop("norm")
            model.pop("lm_head", None)

    def check(self, plan: Plan) -> None:
        """Rows of an expert lie in too many pieces to be read while somebody waits."""
        if plan.mode == "streamed" and self.split.kind == "tensor":
            raise DistributedError(
                "This rank's part does not fit its memory, and in a tensor split experts cannot be streamed.",
                code="cannot_stream",
                hint="Use an expert or pipeline split, or give it more memory.",
            )

    def join(self, model: Model, dtype: str, plan: Plan) -> Plan:
        """Have the layers sum, or hand on, what they compute."""
        join(model, self.joint, self.split.kind, getattr(mx, dtype))
        if self.split.kind == "pipeline" and plan.mode == "resident":
            return replace(plan, chunk_tokens=min(plan.chunk_tokens, _PIECE_TOKENS))
        return plan

    def when_lost(self, call: Callable[[MixtralError], object]) -> None:
        """Whoever calls `shard` sees to the other ranks."""


def _sliced(tensor: Tensor, axis: int, which: range, count: int) -> Tensor:
    """What `which` of the `count` units along `axis` have of a tensor."""
    size = tensor.shape[axis]
    start, stop = size * which.start // count, size * which.stop // count
    shape = (*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :])
    return replace(tensor, shape=shape, spans=tuple(_spans(tensor, axis, start, stop)))


def _spans(tensor: Tensor, axis: int, start: int, stop: int) -> list[Span]:
    single = len(tensor.spans[0].shape) < len(tensor.shape)  # An expert each.
    if single and axis == 0:
        return list(tensor.spans[start:stop])
    return [span.part(axis - single, start, stop) for span in tensor.spans]
