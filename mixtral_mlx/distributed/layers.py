"""The model's layers when other ranks have the rest of them: they compute what they can and add up what all have.

Given to existing modules as classes, as `cpu` and `experts` do. Every rank makes the same sums and messages in the same
order, or all would wait for ever: so a pass is computed to its end before it returns.

B batch, T tokens, N = B·T, D hidden, K chosen experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .. import model as plain
from .split import DistributedError, Kind

if TYPE_CHECKING:
    from ..model import Model


class Joint:
    """This rank's place among the others, what it has of the experts, and the bytes it has sent to other ranks.

    `passing(inputs, cache, wanted)` is entered around each pass: that is how rank 0 tells the others of it."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self.experts = range(0)
        self.all_experts = 0
        self.dtype = mx.float32
        self.sent_bytes = 0.0
        self.passing: Callable[[mx.array, Sequence[Any] | None, bool], AbstractContextManager[object]] = _untold

    def sum(self, x: mx.array) -> mx.array:
        """The sum of all ranks' x."""
        # In a ring each part of it goes round twice, but for one step each: to be summed, and to be known to all.
        self.sent_bytes += 2 * (self.size - 1) / self.size * x.nbytes
        return mx.distributed.all_sum(x, group=self.group)

    def hand_on(self, x: mx.array) -> None:
        """Send x to the next rank, or from the last one to the first."""
        self.sent_bytes += x.nbytes
        mx.eval(mx.distributed.send(x, (self.rank + 1) % self.size, group=self.group))

    def handed_on(self, shape: Sequence[int]) -> mx.array:
        """What the rank before has sent."""
        x = mx.distributed.recv(shape, self.dtype, (self.rank - 1) % self.size, group=self.group)
        mx.eval(x)
        return x


def _untold(inputs: mx.array, cache: Sequence[Any] | None, wanted: bool) -> AbstractContextManager[object]:
    return nullcontext()


def join(model: Model, joint: Joint, kind: Kind, dtype: mx.Dtype) -> None:
    """Have a rank's part of a model work with the others', hidden states going between them as `dtype`."""
    joint.dtype = dtype
    decoder: Any = model.model
    decoder.__class__ = Stage if kind == "pipeline" else Side
    decoder.joint = joint
    decoder.width = model.args.hidden_size
    model.runs_ahead = False  # A pass is over when it returns.
    if kind == "pipeline":
        return
    for layer in model.layers:
        attention: Any = layer.self_attn
        moe: Any = layer.block_sparse_moe
        attention.__class__ = Attention
        moe.__class__ = SomeExperts if kind == "expert" else SomeRows
        attention.joint = moe.joint = joint
        if stream := getattr(moe.switch_mlp, "stream", None):
            for guess in stream.guesses:
                guess.first = joint.experts.start
        if type(layer) is not plain.DecoderLayer:
            from . import kernels

            kernels.join(layer, joint, kind)


class Attention(plain.Attention):
    """Some of the heads."""

    joint: Joint

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        return self.joint.sum(super().__call__(x, mask, cache))


class SomeRows(plain.MoE):
    """Some rows of every expert."""

    joint: Joint

    def __call__(self, x: mx.array) -> mx.array:
        return self.joint.sum(super().__call__(x))


class SomeExperts(plain.MoE):
    """Some of the experts, for whichever tokens choose them."""

    joint: Joint

    def __call__(self, x: mx.array) -> mx.array:
        chosen, weights = self.route(x)
        # Routing must reach the CPU before we know what there is to do here.
        mx.eval(chosen)
        flat = np.array(chosen).reshape(-1)
        which = held(flat, self.joint.experts)
        rows = x.reshape(-1, x.shape[-1])  # (N, D)
        out = mx.zeros(rows.shape, mx.float32)
        if len(which):
            tokens = mx.array(which // chosen.shape[-1])
            experts = mx.array(flat[which] - self.joint.experts.start)
            answers = self.switch_mlp(rows[tokens][None], experts[None, :, None])[0, :, 0]
            out = out.at[tokens].add(answers * weights.reshape(-1)[mx.array(which)][:, None])
        return self.joint.sum(out.astype(x.dtype).reshape(x.shape))


def held(chosen: np.ndarray[Any, Any], experts: range) -> np.ndarray[Any, Any]:
    """Where in `chosen` (N · K,) those of `experts` are."""
    return np.flatnonzero((chosen >= experts.start) & (chosen < experts.stop))


class Side(plain.Decoder):
    """A part of every layer. The embeddings are rank 0's."""

    joint: Joint
    width: int

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        refuse_embeddings(input_embeddings)
        joint = self.joint
        with joint.passing(inputs, cache, True):
            if joint.rank:
                x = mx.zeros((*inputs.shape, self.width), joint.dtype)
            else:
                x = self.embed_tokens(inputs).astype(joint.dtype)
            x = self.through(joint.sum(x), cache)
            mx.eval(x)
        return x if joint.rank else self.norm(x)


class Stage(plain.Decoder):
    """Some of the layers: hidden states come from the rank before and go to the one after it."""

    joint: Joint
    width: int

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        refuse_embeddings(input_embeddings)
        joint = self.joint
        with joint.passing(inputs, cache, True):
            x = self._stage(inputs, cache)
            joint.hand_on(x)
            if joint.rank:
                return x
            x = joint.handed_on((*inputs.shape, self.width))
        return self.norm(x)

    def read(self, inputs: mx.array, cache: Sequence[Any]) -> None:
        """Put ids into `cache`. Nothing comes back, so a rank takes up the next chunk while others have this one."""
        joint = self.joint
        with joint.passing(inputs, cache, False):
            x = self._stage(inputs, cache)
            if joint.rank < joint.size - 1:
                joint.hand_on(x)
            else:
                mx.eval([layer.state for layer in cache])

    def _stage(self, inputs: mx.array, cache: Sequence[Any] | None) -> mx.array:
        joint = self.joint
        x = joint.handed_on((*inputs.shape, self.width)) if joint.rank else self.embed_tokens(inputs)
        return self.through(x, cache).astype(joint.dtype)


def refuse_embeddings(embeddings: mx.array | None) -> None:
    if embeddings is not None:
        raise DistributedError("A model over several machines takes ids, not embeddings.", code="not_available")
