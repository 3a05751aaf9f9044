"""Modules that compute with our kernels on MLX's own arrays: drop-ins for MLX's layers and for our decoder layer.

They keep parameters, names and interface of what they stand for, which is how they are put into a model: an existing
module is given one of these classes. While training they leave the work to MLX, which knows gradients; what an adapter
has wrapped is computed module by module.

B batch, T tokens, N = B·T, D hidden, H heads, S positions in the cache, E experts, K chosen experts."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numba
import numpy as np

from .. import model
from ..borrowed import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, scaled_dot_product_attention
from ..experts import streamed
from . import products, unpack
from .attention import FEW, PANEL, attend_few, attend_many, transpose_keys
from .products import Weights
from .simd import LANES

Floats = np.ndarray[Any, np.dtype[np.float32]]
Indices = np.ndarray[Any, Any]

_FORMS = {mx.float32: unpack.FLOAT32, mx.bfloat16: unpack.BFLOAT16, mx.float16: unpack.FLOAT16}
_FLOAT_GROUP = 32
_NOTHING = np.zeros(0, np.uint8)
# One caller at a time: some of numba's thread pools can serve no more, and there is one processor anyway.
_lock = threading.RLock()


@cache
def _threads() -> int:
    """How many threads kernels run on. The first call starts them, to sleep while there is nothing to do.

    OpenMP's own way is to wait busily, which brings everything to a halt where another program wants the core."""
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = before or "passive"
    try:
        return numba.get_num_threads()
    finally:
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]


def can_attend(attention: model.Attention) -> bool:
    """Whether the kernels can compute with heads of this width."""
    return attention.head_dim % PANEL == 0


def fits(module: nn.Module) -> bool:
    """Whether the kernels can multiply with the weights of `module`."""
    if "weight" not in module or "bias" in module or module.get("global_scale") is not None:
        return False
    quantized = "scales" in module
    columns = module.scales.shape[-1] * module.group_size if quantized else module.weight.shape[-1]
    if module.weight.shape[-2] % products.ROWS or columns % (LANES if quantized else _FLOAT_GROUP):
        return False
    if quantized and module.mode != "affine":
        return module.mode == "mxfp4" and module.group_size % (2 * LANES) == 0
    return (module.scales if quantized else module.weight).dtype in _FORMS


def weights_of(module: Any) -> Weights:
    """The module's weights, as they lie in MLX's memory."""
    weight = module["weight"]
    packed, rows = np.frombuffer(weight, np.uint8), weight.shape[-2]
    if "scales" not in module:
        form, bits = _FORMS[weight.dtype], weight.itemsize * 8
        return Weights(packed, _NOTHING, _NOTHING, rows, weight.shape[-1], bits, _FLOAT_GROUP, 1, False, form)
    scales, group, bits = module["scales"], module.group_size, module.bits
    columns, stored = scales.shape[-1] * group, np.frombuffer(scales, np.uint8)
    if module.mode == "mxfp4":
        return Weights(packed, stored, _NOTHING, rows, columns, bits, group, 2, True, unpack.E8M0)
    planes = 8 // bits if bits in (2, 4, 8) and 8 // bits * LANES <= group else 1
    biases = np.frombuffer(module["biases"], np.uint8)
    return Weights(packed, stored, biases, rows, columns, bits, group, planes, False, _FORMS[scales.dtype])


def _numpy(x: mx.array) -> Floats:
    """The values of `x`, once they are there, as contiguous floats; in MLX's memory where they are that already."""
    return np.ascontiguousarray(np.array(x if x.dtype == mx.float32 else x.astype(mx.float32), copy=False))


def _aligned(count: int) -> Floats:
    """Memory for so many floats that begins with a cache line: no vector of it lies in two."""
    memory = np.empty(count + products.LINE, np.float32)
    start = -(memory.ctypes.data // memory.itemsize) % products.LINE
    return memory[start : start + count]


class _Rows:
    """Rows of x (N, K), laid out for products with weights of one format after the other."""

    def __init__(self, x: Floats, plan: products.Plan, source: np.ndarray[Any, Any] | None = None) -> None:
        self.x = x.reshape(-1)
        self.columns = x.shape[-1]
        self.plan = plan
        self.source = plan.source if source is None else source
        self.arranged: dict[tuple[int, int], tuple[Floats, Floats]] = {}

    @classmethod
    def of(cls, x: Floats) -> _Rows:
        """Rows for plain matrices."""
        return cls(x, products.plan(np.zeros(len(x), np.uint32), 1, 1))

    def times(self, module: Any) -> Floats:
        """The product with the weights of `module`, its rows (P, N) in the order of the plan."""
        weights = weights_of(module)
        layout = (weights.planes, weights.group)
        if layout not in self.arranged:
            self.arranged[layout] = self._arrange(*layout)
        plan, (x, sums) = self.plan, self.arranged[layout]
        out = np.empty((len(self.source), weights.rows), np.float32)
        products.multiply_rows(out.reshape(-1), x, sums, plan.counts, plan.starts, tuple(weights), _threads())
        return out

    def _arrange(self, planes: int, group: int) -> tuple[Floats, Floats]:
        plan, rows = self.plan, len(self.source)
        out, sums = _aligned(rows * self.columns), np.empty(rows * (self.columns // group), np.float32)
        which = plan.starts, plan.alone, plan.summed
        products.arrange(out, sums, self.x, self.source, *which, self.columns, group, planes)
        return out, sums


def _product(x: mx.array, module: Any) -> mx.array:
    with _lock:
        rows = _numpy(x).reshape(-1, x.shape[-1])
        out = _Rows.of(rows).times(module)[: len(rows)]
    return mx.array(out.reshape(*x.shape[:-1], -1)).astype(x.dtype)


class Linear(nn.Linear):
    """x (.., K) → (.., N)."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if self.training else _product(x, self)


class QuantizedLinear(nn.QuantizedLinear):
    """x (.., K) → (.., N)."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if self.training else _product(x, self)


class Embedding(nn.Embedding):
    """Ids → float32 rows; and as a matrix, for the head of a model with tied embeddings."""

    def __call__(self, ids: mx.array) -> mx.array:
        return super().__call__(ids).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(x, self) if fits(self) and not self.training else super().as_linear(x)


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """Ids → float32 rows; and as a matrix, for the head of a model with tied embeddings."""

    def __call__(self, ids: mx.array) -> mx.array:
        scales, biases = self["scales"][ids], self.get("biases")
        if self.mode == "affine":
            scales, biases = scales.astype(mx.float32), biases[ids].astype(mx.float32)
        rows = mx.dequantize(
            self["weight"][ids], scales, biases, group_size=self.group_size, bits=self.bits, mode=self.mode
        )
        return rows.astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(x, self) if fits(self) and not self.training else super().as_linear(x)


class Experts(SwitchGLU):
    """x (B, T, D), chosen experts (B, T, K) → each chosen expert's output (B, T, K, D)."""

    matrices: tuple[type[nn.Module], ...] = (SwitchLinear, QuantizedSwitchLinear)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        if self.training or not self.is_plain():
            return super().__call__(x, indices)
        mx.eval(x, indices)
        with _lock:
            chosen = np.array(indices, copy=False).reshape(-1)
            rows, place = self.outputs(_numpy(x).reshape(-1, x.shape[-1]), chosen, indices.shape[-1])
            out = rows[place]
        return mx.array(out.reshape(*indices.shape, -1)).astype(x.dtype)

    def is_plain(self) -> bool:
        """Whether nothing has been wrapped around its matrices."""
        return all(type(self[name]) in self.matrices for name in ("gate_proj", "up_proj", "down_proj"))

    def outputs(self, x: Floats, chosen: Indices, per_token: int) -> tuple[Floats, Indices]:
        """x (N, D), chosen (N · K,) → the experts' outputs (P, D), and which row of them answers each choice."""
        plan = products.plan(chosen, self.gate_proj.num_experts, per_token)
        return self._answers(_Rows(x, plan)), plan.place

    def _answers(self, rows: _Rows) -> Floats:
        hidden = rows.times(self.gate_proj)
        products.silu_times(hidden.reshape(-1), rows.times(self.up_proj).reshape(-1))
        return _Rows(hidden, rows.plan, np.arange(len(hidden))).times(self.down_proj)


class StreamedExperts(Experts, streamed.StreamedExperts):
    """The same with weights in slots: what is there is computed with while the rest is read."""

    matrices = (streamed.StreamedLinear, streamed.StreamedQuantizedLinear)

    def outputs(self, x: Floats, chosen: Indices, per_token: int) -> tuple[Floats, Indices]:
        """x (N, D), chosen (N · K,) → the experts' outputs (N · K, D), and where each is."""
        stream, pool = self.stream, self.stream.pool
        stream.begin()
        out = np.empty((len(chosen), x.shape[-1]), np.float32)
        guessed = [
            (guess, _Rows.of(x * np.asarray(guess.ratio)).times(guess.gate)[: len(x)])
            for guess in stream.guesses_for(len(x))
        ]
        for which in stream.waves(chosen.reshape(-1, per_token), guessed):
            plan = products.plan(np.take(pool.slot_of, chosen[which]), pool.num_slots, 1)
            # A wave is its choices as if they were tokens: row n of the plan is choice `which[n]`, of its own token.
            source = np.where(plan.source < 0, -1, which[plan.source] // per_token)
            out[which] = self._answers(_Rows(x, plan, source))[plan.place]
        return out, np.arange(len(chosen))


class DecoderLayer(model.DecoderLayer):
    """Attention, then experts. MLX turns positions and keeps the cache; everything else happens here."""

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        if self.training or not self.is_plain():
            return super().__call__(x, mask, cache)
        with _lock:
            hidden = _numpy(x).reshape(-1, x.shape[-1])
            normalized = _normalized(hidden, self.input_layernorm)
            hidden = hidden + self._attended(normalized.reshape(x.shape), mask, cache)
            self._add_experts(hidden, _normalized(hidden, self.post_attention_layernorm))
        return mx.array(hidden.reshape(x.shape))

    def is_plain(self) -> bool:
        """Whether nothing has been wrapped around its matrices."""
        attention, moe = self.self_attn, self.block_sparse_moe
        matrices = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        return (
            all(type(matrix) in (Linear, QuantizedLinear) for matrix in matrices)
            and type(moe.gate) in (nn.Linear, nn.QuantizedLinear)
            and isinstance(moe.switch_mlp, Experts)
            and moe.switch_mlp.is_plain()
        )

    def _attended(self, x: Floats, mask: Any, cache: Any) -> Floats:
        """x (B, T, D) → (N, D)."""
        B, T, D = x.shape
        attention, rows = self.self_attn, _Rows.of(x.reshape(-1, D))
        queries, keys, values = (
            mx.array(rows.times(part)[: B * T].reshape(B, T, -1, attention.head_dim)).swapaxes(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(cache, "each"):  # Several sequences side by side, each with a past of its own.
            out = np.concatenate(cache.each(self._attend_sequence, queries, keys, values, mask), axis=1)
        else:
            out = self._attend_sequence(queries, keys, values, mask, cache)
        return _Rows.of(out.reshape(B * T, -1)).times(attention.o_proj)[: B * T]

    def _attend_sequence(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any, cache: Any) -> Floats:
        """queries (B, H, T, head) over keys and values, put into `cache` first → (B, T, H, head)."""
        attention = self.self_attn
        offset = cache.offset if cache is not None else 0
        queries, keys = attention.rope(queries, offset=offset), attention.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        if hasattr(cache, "bits"):
            out = scaled_dot_product_attention(queries, keys, values, cache, scale=attention.scale, mask=mask)
            return _numpy(out.swapaxes(1, 2))
        mx.eval(queries, keys, values)
        return _attend(_numpy(queries), _in_rows(keys), _in_rows(values), attention.scale, mask)

    def _add_experts(self, hidden: Floats, x: Floats) -> None:
        """hidden (N, D) += what the experts say to x (N, D), weighted by the router."""
        moe = self.block_sparse_moe
        per_token, experts = moe.num_chosen, len(moe.gate["weight"])
        logits = _Rows.of(x).times(moe.gate)[: len(x)]
        chosen, shares = np.empty(len(x) * per_token, np.int64), np.empty(len(x) * per_token, np.float32)
        products.choose(chosen, shares, logits.reshape(-1), experts, per_token)
        self._add_chosen(hidden, x, chosen, shares)

    def _add_chosen(self, hidden: Floats, x: Floats, chosen: Indices, shares: Floats) -> None:
        """hidden (N, D) += what the `chosen` experts (N · K,) say to x, times their `shares`."""
        moe = self.block_sparse_moe
        rows, place = moe.switch_mlp.outputs(x, chosen, moe.num_chosen)
        products.combine(hidden.reshape(-1), rows.reshape(-1), place, shares, moe.num_chosen, hidden.shape[-1])


def _normalized(x: Floats, norm: nn.RMSNorm) -> Floats:
    scale = 1 / np.sqrt(np.einsum("nd,nd->n", x, x) / np.float32(x.shape[-1]) + np.float32(norm.eps))
    return x * scale[:, None] * _vector(norm["weight"])


def _vector(array: mx.array) -> Floats:
    """A small array as floats, without asking MLX to convert it."""
    if array.dtype == mx.bfloat16:
        return (np.frombuffer(cast(Any, array), np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.array(array, copy=False).astype(np.float32, copy=False)


def _in_rows(array: mx.array) -> Floats:
    """Like `_numpy`, but what lies row by row in a larger array may stay there."""
    view = np.array(array if array.dtype == mx.float32 else array.astype(mx.float32), copy=False)
    whole = view.strides[-1] == view.itemsize and view.strides[-2] == view.itemsize * view.shape[-1]
    return view if whole else np.ascontiguousarray(view)


def _attend(queries: Floats, keys: Floats, values: Floats, scale: float, mask: Any) -> Floats:
    """queries (B, H, T, head) over keys and values (B, H / shared, S, head) → (B, T, H, head).

    `mask` as mlx-lm makes it: None, "causal", or an array that is true where a position is seen, or is added."""
    B, H, T, _ = queries.shape
    heads, length, width = keys.shape[1:]
    hidden = _hidden(mask, (B, T, length))
    first = length - T if isinstance(mask, str) else length
    how = (hidden, H // heads, T, first, np.float32(scale))
    out = np.empty_like(queries)
    if H // heads * T < FEW:
        attend_few(out.reshape(-1), queries.reshape(-1), keys, values, *how)
    else:
        panels = np.empty(B * heads * -(-length // PANEL) * PANEL * width, np.float32)
        transpose_keys(panels, keys)
        attend_many(out.reshape(-1), queries.reshape(-1), panels, values, *how)
    return np.ascontiguousarray(out.swapaxes(1, 2))


def _hidden(mask: Any, shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Where `mask` hides a position: an array of `shape` (B, T, S), or nothing where it is no array."""
    if mask is None or isinstance(mask, str):
        return np.zeros((0, 0, 0), np.bool_)
    B, T, S = shape
    seen = np.array(mask if mask.dtype == mx.bool_ else mask > -1e4)
    return np.ascontiguousarray(np.broadcast_to(~seen, (B, 1, T, S))[:, 0])


CLASSES: Sequence[tuple[type[nn.Module], type[nn.Module]]] = (
    (nn.Linear, Linear),
    (nn.QuantizedLinear, QuantizedLinear),
    (nn.Embedding, Embedding),
    (nn.QuantizedEmbedding, QuantizedEmbedding),
)
"""What MLX has, and what stands for it here."""
