"""Decoder layers that compute with `cpu`'s kernels, when other ranks have the rest of them.

N tokens, D hidden, K chosen experts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ..cpu import modules, products
from ..cpu.modules import Floats, Indices
from ..model import DecoderLayer
from .layers import Joint, held
from .split import Kind


def join(layer: DecoderLayer, joint: Joint, kind: Kind) -> None:
    """Have an accelerated layer sum what all ranks compute."""
    accelerated: Any = layer
    accelerated.__class__ = SomeExperts if kind == "expert" else SomeRows
    accelerated.joint = joint


class SomeRows(modules.DecoderLayer):
    """Some heads, and some rows of every expert."""

    joint: Joint

    def _attended(self, x: Floats, mask: Any, cache: Any) -> Floats:
        return self._sum(super()._attended(x, mask, cache))

    def _add_chosen(self, hidden: Floats, x: Floats, chosen: Indices, shares: Floats) -> None:
        out = np.zeros_like(hidden)
        self._add_own(out, x, chosen, shares)
        hidden += self._sum(out)

    def _add_own(self, out: Floats, x: Floats, chosen: Indices, shares: Floats) -> None:
        super()._add_chosen(out, x, chosen, shares)

    def _sum(self, x: Floats) -> Floats:
        return np.array(self.joint.sum(mx.array(x)), copy=False)


class SomeExperts(SomeRows):
    """Some heads, and some of the experts."""

    def _add_own(self, out: Floats, x: Floats, chosen: Indices, shares: Floats) -> None:
        """out (N, D) += what the experts that are here say to x."""
        which, moe = held(chosen, self.joint.experts), self.block_sparse_moe
        if not len(which):
            return
        # What is chosen and is here, as if each choice were a token of its own.
        rows, at = moe.switch_mlp.outputs(x[which // moe.num_chosen], chosen[which] - self.joint.experts.start, 1)
        place, own = np.full(len(chosen), at[0]), np.zeros_like(shares)
        place[which], own[which] = at, shares[which]
        products.combine(out.reshape(-1), rows.reshape(-1), place, own, moe.num_chosen, out.shape[-1])
