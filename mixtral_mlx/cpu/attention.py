"""Attention: queries (B, H, T, D) over keys and values (B, H / shared, S, D), each head being D wide.

Queries and what comes out are flat; keys and values may be parts of larger arrays, whole from row to row. The `shared`
heads that use the same keys are rows of one matrix, shared · T of them. Row r is of token r % T, which sees the
positions up to `first` + r % T; where `hidden` (B, T, S) has rows, it says instead what is not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from .jit import compiled, entry
from .simd import (
    LANES,
    add,
    add_scaled,
    broadcast,
    exp,
    fma,
    greater,
    greatest,
    load,
    multiply,
    store,
    total,
    vector_dot,
)

# Keys stand in panels of so many positions: two vectors, which a step multiplies with four rows of queries.
PANEL = 2 * LANES
# So many rows of queries at a time, a multiple of four; fewer rows than FEW are not worth panels.
QUERIES = 32
FEW = 16
# So many positions of the values at a time, so that they stay in the cache for all rows.
DEPTH = 1024


@entry
def attend_few(
    out: Any, queries: Any, keys: Any, values: Any, hidden: Any, shared: int, tokens: int, first: int, scale: float
) -> None:
    """Attention of few queries: memory is what it takes, so each key and value is read once."""
    batch, heads, length, width = keys.shape
    rows = shared * tokens
    for item in prange(batch * heads):
        b, head = item // heads, item % heads
        keys_at, values_at = _position(keys, b, head), _position(values, b, head)
        at, scores = item * rows * width, np.zeros(rows * length, np.float32)
        for s in range(length):
            for row in range(rows):
                dot = total(vector_dot(queries, at + row * width, keys, keys_at + s * width, width))
                scores[row * length + s] = dot * scale
        for row in range(rows):
            _weigh(scores, row * length, length, hidden, b, row % tokens, first)
        out[at : at + rows * width] = 0
        for s in range(length):
            for row in range(rows):
                add_scaled(out, at + row * width, values, values_at + s * width, width, scores[row * length + s])


@entry
def transpose_keys(out: Any, keys: Any) -> None:
    """Keys in panels of PANEL positions, each (D, PANEL); zeros after the last position."""
    batch, heads, length, width = keys.shape
    panels = -(-length // PANEL)
    for item in prange(batch * heads * panels):
        b, head, panel = item // panels // heads, item // panels % heads, item % panels
        for s in range(PANEL):
            position = panel * PANEL + s
            for d in range(width):
                value = keys[b, head, position, d] if position < length else np.float32(0)
                out[(item * width + d) * PANEL + s] = value


@entry
def attend_many(
    out: Any, queries: Any, panels: Any, values: Any, hidden: Any, shared: int, tokens: int, first: int, scale: float
) -> None:
    """Attention of many queries, QUERIES rows at a time, over keys in panels."""
    batch, heads, length, width = values.shape
    rows, count = shared * tokens, -(-length // PANEL)
    blocks = -(-rows // QUERIES)
    for item in prange(batch * heads * blocks):
        b, head, block = item // blocks // heads, item // blocks % heads, item % blocks
        pair, begin, stride = b * heads + head, block * QUERIES, count * PANEL
        some = min(QUERIES, rows - begin)
        mine, scores = np.zeros(QUERIES * width, np.float32), np.zeros(QUERIES * stride, np.float32)
        at = (pair * rows + begin) * width
        for n in range(some * width):
            mine[n] = queries[at + n] * scale
        seen = 0
        for row in range(some):
            seen = max(seen, min(length, first + (begin + row) % tokens + 1))
        for panel in range(-(-seen // PANEL)):
            b_at, s = (pair * count + panel) * width * PANEL, panel * PANEL
            for row in range(0, some, 4):
                _tile(scores, row * stride + s, stride, mine, row * width, width, panels, b_at, PANEL, width)
        for row in range(some):
            _weigh(scores, row * stride, length, hidden, b, (begin + row) % tokens, first)
        mine[:] = 0
        for s in range(0, seen, DEPTH):
            steps, b_at = min(DEPTH, seen - s), _position(values, b, head) + s * width
            for d in range(0, width, PANEL):
                for row in range(0, some, 4):
                    a_at = row * stride + s
                    _tile(mine, row * width + d, width, scores, a_at, stride, values, b_at + d, width, steps)
        out[at : at + some * width] = mine[: some * width]


@compiled
def _position(array: Any, b: int, head: int) -> int:
    """Where (b, head) begins in memory, counted in elements."""
    return (b * array.strides[0] + head * array.strides[1]) // 4


@compiled
def _tile(
    out: Any, at: int, stride: int, a: Any, a_at: int, a_stride: int, b: Any, b_at: int, b_stride: int, depth: int
) -> None:
    """out += a · b for four rows of a (4, depth) and PANEL columns of b (depth, PANEL)."""
    c00 = c01 = c10 = c11 = c20 = c21 = c30 = c31 = broadcast(np.float32(0))
    for k in range(depth):
        b0, b1 = load(b, b_at + k * b_stride), load(b, b_at + k * b_stride + LANES)
        x = broadcast(a[a_at + k])
        c00, c01 = fma(x, b0, c00), fma(x, b1, c01)
        x = broadcast(a[a_at + a_stride + k])
        c10, c11 = fma(x, b0, c10), fma(x, b1, c11)
        x = broadcast(a[a_at + 2 * a_stride + k])
        c20, c21 = fma(x, b0, c20), fma(x, b1, c21)
        x = broadcast(a[a_at + 3 * a_stride + k])
        c30, c31 = fma(x, b0, c30), fma(x, b1, c31)
    _add_two(out, at, c00, c01)
    _add_two(out, at + stride, c10, c11)
    _add_two(out, at + 2 * stride, c20, c21)
    _add_two(out, at + 3 * stride, c30, c31)


@compiled
def _add_two(out: Any, at: int, a: Any, b: Any) -> None:
    store(out, at, add(load(out, at), a))
    store(out, at + LANES, add(load(out, at + LANES), b))


@compiled
def _weigh(scores: Any, at: int, length: int, hidden: Any, b: int, token: int, first: int) -> None:
    """A row's scores → its weights: softmax over what it sees, 0 elsewhere."""
    end = length
    if len(hidden):
        for s in range(length):
            if hidden[b, token, s]:
                scores[at + s] = -np.inf
    else:
        end = min(length, first + token + 1)
        scores[at + end : at + length] = 0
    _softmax(scores, at, at + end)


@compiled
def _softmax(x: Any, begin: int, end: int) -> None:
    """Softmax of `x[begin:end]` in place; the first of them must be seen (not minus infinity), or another."""
    vectors = begin + (end - begin) // LANES * LANES
    most = broadcast(np.float32(-np.inf))
    for n in range(begin, vectors, LANES):
        most = greater(most, load(x, n))
    top = greatest(most)
    for n in range(vectors, end):
        top = max(top, x[n])
    sums, shift, one = broadcast(np.float32(0)), broadcast(-top), broadcast(np.float32(1))
    for n in range(begin, vectors, LANES):
        power = exp(fma(load(x, n), one, shift))
        store(x, n, power)
        sums = add(sums, power)
    rest = total(sums)
    for n in range(vectors, end):
        x[n] = np.exp(x[n] - top)
        rest += x[n]
    inverse = broadcast(np.float32(1) / rest)
    for n in range(begin, vectors, LANES):
        store(x, n, multiply(load(x, n), inverse))
    for n in range(vectors, end):
        x[n] /= rest
