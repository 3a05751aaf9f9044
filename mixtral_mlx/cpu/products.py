"""Products of rows of x with packed weights: a plain matrix, or each row with its own experts.

All arrays are flat and C-contiguous: weights and their scales as bytes, everything else float32 or int64. Which rows of
x meet which weights is said by a `Plan`; who calls, and where the arrays come from, is left to others.

E experts (1 for a plain matrix), N rows of a weight matrix, K its columns, G = K / group scales to a row, P rows of x
in the order of their experts, padded."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from .block import scaled_block
from .jit import compiled, entry, inlined, serial_entry
from .simd import (
    LANES,
    add,
    add_scaled,
    broadcast,
    divide,
    exp,
    field,
    fma,
    load,
    load_bytes,
    multiply,
    prefetch,
    store,
    total,
    vector_dot,
)
from .unpack import AHEAD, read_scales, unpack

# A step multiplies ROWS rows of weights by COLUMNS rows of x: as many sums as registers hold beside what is loaded.
ROWS = 4
COLUMNS = 2 if LANES == 8 else 4
FEW = 2 * COLUMNS  # So many rows of x are multiplied as they come, more by unpacking the weights first.
PAIR = 2  # Of few rows of x the sums for so many rows of weights, and for all of x, fit into the registers.
LINE = 16  # floats of a cache line
# Weights are unpacked so many columns at a time, so that they and the x they meet stay in the first-level cache.
DEPTH = 1024
# More of x than so many floats is done in several rounds, so that what a round needs stays in the second-level cache.
ROUND = 1 << 18


class Weights(NamedTuple):
    """Weights as stored: E × N rows of K codes, with G scales each, and biases (none: no bytes).

    `planes` is the number of codes that are taken from a byte with one mask; 1 where they are read one by one, or are
    bytes. `fp4`: codes are floats of 2 exponent bits and 1 mantissa bit. `form` is how scales are stored, or, where
    the weights are floats of 16 or 32 `bits`, how these are."""

    packed: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]
    biases: np.ndarray[Any, Any]
    rows: int
    columns: int
    bits: int
    group: int
    planes: int
    fp4: bool
    form: int


class Plan(NamedTuple):
    """Which rows of x meet which expert, and how they are laid out.

    An expert with a single row has it alone; one with more has blocks of COLUMNS rows, their vectors side by side.

    counts (E,), starts (E,): its rows of the P. source (P,): the row of x (-1: padding). alone (P,): not in a block.
    summed (P,): not more than FEW. place (T · per_token,): the row that answers each choice."""

    counts: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]
    source: np.ndarray[Any, Any]
    place: np.ndarray[Any, Any]
    alone: np.ndarray[Any, Any]
    summed: np.ndarray[Any, Any]


def plan(chosen: np.ndarray[Any, Any], experts: int, per_token: int) -> Plan:
    """The plan for `chosen` experts (T · per_token,), each token having `per_token` of them."""
    return Plan(*_plan(chosen, experts, per_token))


@serial_entry
def _plan(chosen: Any, experts: int, per_token: int) -> Any:
    counts = np.zeros(experts, np.int64)
    for expert in chosen:
        counts[expert] += 1
    starts = np.zeros(experts, np.int64)
    rows = 0
    for expert in range(experts):
        starts[expert] = rows
        rows += 1 if counts[expert] == 1 else -(-counts[expert] // COLUMNS) * COLUMNS
    source, alone, summed = np.full(rows, -1), np.zeros(rows, np.bool_), np.zeros(rows, np.bool_)
    place = np.empty(len(chosen), np.int64)
    filled = starts.copy()
    for n in range(len(chosen)):
        row = filled[chosen[n]]
        filled[chosen[n]] += 1
        source[row], place[n] = n // per_token, row
        alone[row] = counts[chosen[n]] == 1
        summed[row] = counts[chosen[n]] <= FEW
    return counts, starts, source, place, alone, summed


@entry
def arrange(
    out: Any,
    sums: Any,
    x: Any,
    source: Any,
    starts: Any,
    alone: Any,
    summed: Any,
    columns: int,
    group: int,
    planes: int,
) -> None:
    """Lay out the rows of `x` (T, K) that `source` names: `out` (P, K), and the `sums` (P, G) of groups of `summed`."""
    parts = 1 if len(source) < 2 * COLUMNS else len(source)
    for part in prange(parts):
        for row in range(part * len(source) // parts, (part + 1) * len(source) // parts):
            first = source[row] * columns
            if alone[row]:
                _arrange_row(out, row * columns, LANES, x, first, columns, planes)
            else:
                start = 0
                for n in range(len(starts)):
                    start = starts[n] if starts[n] <= row else start
                column = (row - start) % COLUMNS
                at = (row - column) * columns + column * LANES
                _arrange_row(out, at, COLUMNS * LANES, x, first, columns, planes)
            if summed[row]:
                _sum_groups(sums, row * (columns // group), x, first, columns, group)


@compiled
def _arrange_row(out: Any, at: int, step: int, x: Any, first: int, columns: int, planes: int) -> None:
    """A row of x, vector after vector `step` apart, in the order of the planes; zeros for padding."""
    for begin in range(0, columns, planes * LANES):
        for plane in range(planes):
            for lane in range(LANES):
                out[at + lane] = x[first + begin + lane * planes + plane] if first >= 0 else np.float32(0)
            at += step


@compiled
def _sum_groups(sums: Any, at: int, x: Any, first: int, columns: int, group: int) -> None:
    for g in range(columns // group):
        result = broadcast(np.float32(0))
        for k in range(0, group, LANES):
            result = add(result, load(x, first + g * group + k))
        sums[at + g] = total(result)


@entry
def multiply_rows(out: Any, x: Any, sums: Any, counts: Any, starts: Any, stored: Any, threads: int) -> None:
    """Multiply the arranged `x` with its experts' weights: `out` (P, N).

    `stored` is a plain tuple of the fields of `Weights`."""
    weights = Weights(*stored)
    for thread in prange(threads):
        begin = thread * (weights.rows // ROWS) // threads * ROWS
        end = (thread + 1) * (weights.rows // ROWS) // threads * ROWS
        memory = np.zeros(ROWS * (DEPTH + 2 * (weights.columns // weights.group)) + LINE, np.float32)
        work = memory[-(memory.ctypes.data // 4) % LINE :]  # No vector of it lies in two cache lines.
        for expert in range(len(counts)):
            if 0 < counts[expert] <= FEW and weights.bits == 4 and weights.planes == 2 and not weights.fp4:
                if counts[expert] == 1:
                    _one_row(out, x, sums, starts[expert], weights, expert, begin, end, work)
                else:
                    _few_rows(out, x, sums, starts[expert], counts[expert], weights, expert, begin, end, work)
                continue
            most = max(ROUND // weights.columns // COLUMNS, 1) * COLUMNS
            for done in range(0, counts[expert], most):
                count = min(most, counts[expert] - done)
                _some_rows(out, x, starts[expert] + done, count, counts[expert] == 1, weights, expert, begin, end, work)


@compiled
def _one_row(
    out: Any, x: Any, sums: Any, start: int, weights: Weights, expert: int, begin: int, end: int, scales: Any
) -> None:
    """Rows `begin` to `end` of an expert's 4-bit weights times its single row of x, the one at `start`."""
    packed, stored_scales, stored_biases = weights.packed, weights.scales, weights.biases
    columns, group, form, rows = weights.columns, weights.group, weights.form, weights.rows
    groups = columns // group
    for n in range(begin, end, ROWS):
        row = expert * rows + n
        # The scales' own reading ahead: they are too few bytes a row for the processor to see where this goes.
        prefetch(stored_scales, (row + 2 * ROWS) * groups * 2)
        prefetch(stored_biases, (row + 2 * ROWS) * groups * 2)
        read_scales(scales, 0, stored_scales, row * groups, ROWS * groups, form)
        read_scales(scales, ROWS * groups, stored_biases, row * groups, ROWS * groups, form)
        for r in range(ROWS):
            w_at, biases_at = (row + r) * (columns // 2), (ROWS + r) * groups
            result = vector_dot(scales, biases_at, sums, start * groups, groups - groups % LANES)
            if group == 64:
                result = _scaled_codes(result, packed, w_at, x, start * columns, scales, r * groups, groups, 64)
            else:
                result = _scaled_codes(result, packed, w_at, x, start * columns, scales, r * groups, groups, group)
            value = total(result)
            for g in range(groups - groups % LANES, groups):
                value += scales[biases_at + g] * sums[start * groups + g]
            out[start * rows + n + r] = value


@inlined
def _scaled_codes(
    result: Any, packed: Any, w_at: int, x: Any, x_at: int, scales: Any, scales_at: int, groups: int, group: int
) -> Any:
    """result + scale · code · x, lane by lane."""
    for g in range(groups):
        part = broadcast(np.float32(0))
        prefetch(packed, w_at + AHEAD)
        for _ in range(group // (2 * LANES)):
            some = load_bytes(packed, w_at)
            part = fma(field(some, 0, 15), load(x, x_at), part)
            part = fma(field(some, 4, 15), load(x, x_at + LANES), part)
            w_at += LANES
            x_at += 2 * LANES
        result = fma(part, broadcast(scales[scales_at + g]), result)
    return result


@compiled
def _few_rows(
    out: Any,
    x: Any,
    sums: Any,
    start: int,
    count: int,
    weights: Weights,
    expert: int,
    begin: int,
    end: int,
    work: Any,
) -> None:
    """The same for 2 to FEW rows of x, in blocks from `start` on: each code is taken from its byte once for a block.

    Sums are taken in the order of a single row's, so that a row's are the same bits in either company."""
    groups = weights.columns // weights.group
    for n in range(begin, end, ROWS):
        row = expert * weights.rows + n
        # The scales' own reading ahead: they are too few bytes a row for the processor to see where this goes.
        prefetch(weights.scales, (row + 2 * ROWS) * groups * 2)
        prefetch(weights.biases, (row + 2 * ROWS) * groups * 2)
        read_scales(work, 0, weights.scales, row * groups, ROWS * groups, weights.form)
        read_scales(work, ROWS * groups, weights.biases, row * groups, ROWS * groups, weights.form)
        for done in range(0, count, COLUMNS):
            # What is alone in the last block is multiplied with the padding beside it.
            some = max(min(count - done, COLUMNS), 2)
            _some_columns(out, x, sums, start + done, some, weights, expert, n, work)


@compiled
def _some_columns(
    out: Any, x: Any, sums: Any, start: int, count: int, weights: Weights, expert: int, n: int, work: Any
) -> None:
    """ROWS rows of an expert's weights from the `n`-th on, whose scales and biases `work` has, times a block of x."""
    packed, columns, group, rows = weights.packed, weights.columns, weights.group, weights.rows
    groups, per_round = columns // group, max(DEPTH // group, 1)
    whole, sums_at = groups - groups % LANES, 2 * ROWS * groups
    row, w_step = expert * rows + n, columns // 2
    for r in range(ROWS):
        for c in range(count):
            dot = vector_dot(work, (ROWS + r) * groups, sums, (start + c) * groups, whole)
            store(work, sums_at + (r * COLUMNS + c) * LANES, dot)
    # A part of x at a time, which stays in the first-level cache for all rows of weights.
    for g in range(0, groups, per_round):
        some, x_at = min(per_round, groups - g), start * columns + g * group * COLUMNS
        for r in range(0, ROWS, PAIR):
            at, w_at, scales_at = sums_at + r * COLUMNS * LANES, (row + r) * w_step + g * group // 2, r * groups + g
            if group == 64:
                _add_scaled(count, work, at, packed, w_at, w_step, x, x_at, scales_at, groups, some, 64)
            else:
                _add_scaled(count, work, at, packed, w_at, w_step, x, x_at, scales_at, groups, some, group)
    for r in range(ROWS):
        for c in range(count):
            value = total(load(work, sums_at + (r * COLUMNS + c) * LANES))
            for g in range(whole, groups):
                value += work[(ROWS + r) * groups + g] * sums[(start + c) * groups + g]
            out[(start + c) * rows + n + r] = value


_times_2, _times_3, _times_4 = (scaled_block(PAIR, count, COLUMNS, ahead=ROWS) for count in (2, 3, 4))


@inlined
def _add_scaled(
    count: int, work: Any, at: int, packed: Any, w_at: int, w_step: int, x: Any, x_at: int, scales_at: int,
    scales_step: int, groups: int, group: int,
) -> None:  # fmt: skip
    """Onto PAIR × `count` sums in `work`: scale · code · x, lane by lane."""
    if COLUMNS == 2 or count == 2:
        _times_2(work, at, packed, w_at, w_step, x, x_at, scales_at, scales_step, groups, group)
    elif count == 3:
        _times_3(work, at, packed, w_at, w_step, x, x_at, scales_at, scales_step, groups, group)
    else:
        _times_4(work, at, packed, w_at, w_step, x, x_at, scales_at, scales_step, groups, group)


@compiled
def _some_rows(
    out: Any,
    x: Any,
    start: int,
    count: int,
    alone: bool,
    weights: Weights,
    expert: int,
    begin: int,
    end: int,
    work: Any,
) -> None:
    """Rows `begin` to `end` of an expert's weights, ROWS at a time, times its `count` rows of x."""
    packed, stored_scales, stored_biases = weights.packed, weights.scales, weights.biases
    form, rows, columns = weights.form, weights.rows, weights.columns
    bits, group, planes, fp4 = weights.bits, weights.group, weights.planes, weights.fp4
    groups, scales_at = columns // group, ROWS * DEPTH
    for n in range(begin, end, ROWS):
        first = expert * rows + n
        if len(stored_scales):
            read_scales(work, scales_at, stored_scales, first * groups, ROWS * groups, form)
        if len(stored_biases):
            biases_at = scales_at + ROWS * groups
            read_scales(work, biases_at, stored_biases, first * groups, ROWS * groups, form)
        for k0 in range(0, columns, DEPTH):
            k1 = min(columns, k0 + DEPTH)
            for r in range(ROWS):
                at = scales_at + r * groups
                unpack(
                    work, r * LANES, ROWS * LANES, packed, (first + r) * (columns * bits // 8), work, at,
                    at + ROWS * groups, k0 // group, k1 // group, bits, group, planes, fp4, form,
                )  # fmt: skip
            _blocks(out, x, start, count, alone, rows, columns, n, k0, (k1 - k0) // LANES, work)


@compiled
def _blocks(
    out: Any, x: Any, start: int, count: int, alone: bool, rows: int, columns: int, n: int, k0: int, steps: int, w: Any
) -> None:
    """The unpacked rows, from the `n`-th on, times `count` rows of x, over `steps` vectors from column `k0` on."""
    if alone:
        _block_1(out, start * rows + n, k0 > 0, w, x, start * columns + k0, steps)
        return
    for m in range(start, start + count, COLUMNS):
        if COLUMNS == 4:
            _block_4(out, m * rows + n, rows, k0 > 0, w, x, m * columns + k0 * COLUMNS, steps)
        else:
            _block_2(out, m * rows + n, rows, k0 > 0, w, x, m * columns + k0 * COLUMNS, steps)


@compiled
def _put(out: Any, at: int, onto: bool, a: Any, b: Any, c: Any, d: Any) -> None:
    """Put the sums of four vectors into `out`, onto what is there if `onto`."""
    if not onto:
        out[at : at + 4] = 0
    out[at] += total(a)
    out[at + 1] += total(b)
    out[at + 2] += total(c)
    out[at + 3] += total(d)


@compiled
def _block_1(out: Any, at: int, onto: bool, w: Any, x: Any, x_at: int, steps: int) -> None:
    """Four rows of weights times a row of x: four sums, kept in registers over all steps. So do those below."""
    a0 = a1 = a2 = a3 = broadcast(np.float32(0))
    for n in range(steps):
        w_at, v = n * 4 * LANES, load(x, x_at + n * LANES)
        a0 = fma(load(w, w_at), v, a0)
        a1 = fma(load(w, w_at + LANES), v, a1)
        a2 = fma(load(w, w_at + 2 * LANES), v, a2)
        a3 = fma(load(w, w_at + 3 * LANES), v, a3)
    _put(out, at, onto, a0, a1, a2, a3)


@compiled
def _block_2(out: Any, at: int, rows: int, onto: bool, w: Any, x: Any, x_at: int, steps: int) -> None:
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = broadcast(np.float32(0))
    for n in range(steps):
        w_at, v_at = n * 4 * LANES, x_at + n * 2 * LANES
        w0, w1, w2, w3 = load(w, w_at), load(w, w_at + LANES), load(w, w_at + 2 * LANES), load(w, w_at + 3 * LANES)
        v = load(x, v_at)
        a0, a1, a2, a3 = fma(w0, v, a0), fma(w1, v, a1), fma(w2, v, a2), fma(w3, v, a3)
        v = load(x, v_at + LANES)
        b0, b1, b2, b3 = fma(w0, v, b0), fma(w1, v, b1), fma(w2, v, b2), fma(w3, v, b3)
    _put(out, at, onto, a0, a1, a2, a3)
    _put(out, at + rows, onto, b0, b1, b2, b3)


@compiled
def _block_4(out: Any, at: int, rows: int, onto: bool, w: Any, x: Any, x_at: int, steps: int) -> None:
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = broadcast(np.float32(0))
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = broadcast(np.float32(0))
    for n in range(steps):
        w_at, v_at = n * 4 * LANES, x_at + n * 4 * LANES
        w0, w1, w2, w3 = load(w, w_at), load(w, w_at + LANES), load(w, w_at + 2 * LANES), load(w, w_at + 3 * LANES)
        v = load(x, v_at)
        a0, a1, a2, a3 = fma(w0, v, a0), fma(w1, v, a1), fma(w2, v, a2), fma(w3, v, a3)
        v = load(x, v_at + LANES)
        b0, b1, b2, b3 = fma(w0, v, b0), fma(w1, v, b1), fma(w2, v, b2), fma(w3, v, b3)
        v = load(x, v_at + 2 * LANES)
        c0, c1, c2, c3 = fma(w0, v, c0), fma(w1, v, c1), fma(w2, v, c2), fma(w3, v, c3)
        v = load(x, v_at + 3 * LANES)
        d0, d1, d2, d3 = fma(w0, v, d0), fma(w1, v, d1), fma(w2, v, d2), fma(w3, v, d3)
    _put(out, at, onto, a0, a1, a2, a3)
    _put(out, at + rows, onto, b0, b1, b2, b3)
    _put(out, at + 2 * rows, onto, c0, c1, c2, c3)
    _put(out, at + 3 * rows, onto, d0, d1, d2, d3)


@entry
def silu_times(gate: Any, up: Any) -> None:
    """gate ← silu(gate) · up, with silu(g) = g / (1 + e^-g)."""
    one, minus = broadcast(np.float32(1)), broadcast(np.float32(-1))
    for vector in prange(len(gate) // LANES):
        at = vector * LANES
        g = load(gate, at)
        sigmoid = divide(one, add(one, exp(multiply(g, minus))))
        store(gate, at, multiply(multiply(g, sigmoid), load(up, at)))


@entry
def combine(out: Any, rows: Any, place: Any, shares: Any, per_token: int, columns: int) -> None:
    """out (T, columns) += the `rows` at each token's places, times their `shares` (T · per_token,)."""
    for token in prange(len(place) // per_token):
        for n in range(token * per_token, (token + 1) * per_token):
            add_scaled(out, token * columns, rows, place[n] * columns, columns, shares[n])


@serial_entry
def choose(chosen: Any, shares: Any, logits: Any, experts: int, per_token: int) -> None:
    """The `per_token` experts with the greatest `logits` (T, E), and the softmax over these: both (T · per_token,)."""
    for token in range(len(logits) // experts):
        at, total_share = token * per_token, np.float32(0)
        for n in range(per_token):
            best = -1
            for expert in range(experts):
                taken = False
                for other in range(n):
                    taken |= chosen[at + other] == expert
                if not taken and (best < 0 or logits[token * experts + expert] > logits[token * experts + best]):
                    best = expert
            chosen[at + n] = best
            shares[at + n] = np.exp(logits[token * experts + best] - logits[token * experts + chosen[at]])
            total_share += shares[at + n]
        shares[at : at + per_token] /= total_share
