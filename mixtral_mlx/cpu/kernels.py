"""Products with quantized weights, and attention, on a processor's vector units.

All arrays are flat and C-contiguous: weights and their scales as bytes, everything else float32 or int64. Which rows of
x meet which weights is said by a `Plan`; who calls, and where the arrays come from, is left to others.

E experts (1 for a plain matrix), N rows of a weight matrix, K its columns, G = K / group scales to a row, P rows of x
in the order of their experts, padded."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from .simd import (
    LANES,
    add,
    broadcast,
    divide,
    eight_fields,
    exp,
    field,
    fma,
    greater,
    greatest,
    load,
    load_bfloat16,
    load_bytes,
    load_e8m0,
    load_float16,
    load_float32,
    load_word,
    multiply,
    prefetch,
    read_bfloat16,
    read_e8m0,
    read_float16,
    read_float32,
    store,
    total,
)

# A step multiplies ROWS rows of weights by COLUMNS rows of x: as many sums as registers hold beside what is loaded.
ROWS = 4
COLUMNS = 2 if LANES == 8 else 4
# Weights are unpacked so many columns at a time, so that they and the x they meet stay in the first-level cache.
DEPTH = 1024
# More of x than so many floats is done in several rounds, so that what a round needs stays in the second-level cache.
ROUND = 1 << 18

# Processors look ahead within a page of memory only; so many bytes are asked for beyond where we are.
AHEAD = 4096

# Keys stand in panels of so many positions: two vectors, which a step multiplies with four rows of queries.
PANEL = 2 * LANES
# Attention of so many rows of queries at a time, a multiple of four; fewer rows than FEW are not worth panels.
QUERIES = 32
FEW = 16

# How scales are stored.
FLOAT32, BFLOAT16, FLOAT16, E8M0 = range(4)

_compiled = njit(nogil=True, boundscheck=False, fastmath={"reassoc", "contract", "nsz"})
# What is called from Python takes arrays and plain tuples only: numba's cache on disk must be readable, to be found out
# of date, by later versions of this file, which may not have the same classes.
_entry = njit(nogil=True, boundscheck=False, parallel=True, cache=True)


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
    place (T · per_token,): the row that answers each choice."""

    counts: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]
    source: np.ndarray[Any, Any]
    place: np.ndarray[Any, Any]
    alone: np.ndarray[Any, Any]


def plan(chosen: np.ndarray[Any, Any], experts: int, per_token: int) -> Plan:
    """The plan for `chosen` experts (T · per_token,), each token having `per_token` of them."""
    return Plan(*_plan(chosen, experts, per_token))


@njit(nogil=True, cache=True)
def _plan(chosen: Any, experts: int, per_token: int) -> Any:
    counts = np.zeros(experts, np.int64)
    for expert in chosen:
        counts[expert] += 1
    starts = np.zeros(experts, np.int64)
    rows = 0
    for expert in range(experts):
        starts[expert] = rows
        rows += 1 if counts[expert] == 1 else -(-counts[expert] // COLUMNS) * COLUMNS
    source, alone = np.full(rows, -1), np.zeros(rows, np.bool_)
    place = np.empty(len(chosen), np.int64)
    filled = starts.copy()
    for n in range(len(chosen)):
        row = filled[chosen[n]]
        filled[chosen[n]] += 1
        source[row], place[n] = n // per_token, row
        alone[row] = counts[chosen[n]] == 1
    return counts, starts, source, place, alone


@_entry
def arrange(
    out: Any, sums: Any, x: Any, source: Any, starts: Any, alone: Any, columns: int, group: int, planes: int
) -> None:
    """Lay out the rows of `x` (T, K) that `source` names: `out` (P, K), and the `sums` (P, G) of lone ones' groups."""
    threads = 1 if len(source) < 2 * COLUMNS else len(source)
    for thread in prange(threads):
        for row in range(thread * len(source) // threads, (thread + 1) * len(source) // threads):
            first = source[row] * columns
            if alone[row]:
                _arrange_row(out, row * columns, LANES, x, first, columns, planes)
                if group:
                    _sum_groups(sums, row * (columns // group), x, first, columns, group)
            else:
                start = 0
                for n in range(len(starts)):
                    start = starts[n] if starts[n] <= row else start
                column = (row - start) % COLUMNS
                at = (row - column) * columns + column * LANES
                _arrange_row(out, at, COLUMNS * LANES, x, first, columns, planes)


@_compiled
def _arrange_row(out: Any, at: int, step: int, x: Any, first: int, columns: int, planes: int) -> None:
    """A row of x, vector after vector `step` apart, in the order of the planes; zeros for padding."""
    for begin in range(0, columns, planes * LANES):
        for plane in range(planes):
            for lane in range(LANES):
                out[at + lane] = x[first + begin + lane * planes + plane] if first >= 0 else np.float32(0)
            at += step


@_compiled
def _sum_groups(sums: Any, at: int, x: Any, first: int, columns: int, group: int) -> None:
    for g in range(columns // group):
        result = np.float32(0)
        for k in range(group):
            result += x[first + g * group + k]
        sums[at + g] = result


# What is called for each row takes arrays and numbers, not `Weights`: numba would count references to its parts.


@_compiled
def _read_scales(out: Any, at: int, stored: Any, first: int, count: int, form: int) -> None:
    """Put `count` scales, from the `first` on, into `out[at:]` as floats."""
    vectors = count - count % LANES
    if form == BFLOAT16:
        for n in range(0, vectors, LANES):
            store(out, at + n, load_bfloat16(stored, first + n))
        for n in range(vectors, count):
            out[at + n] = read_bfloat16(stored, first + n)
    elif form == FLOAT16:
        for n in range(0, vectors, LANES):
            store(out, at + n, load_float16(stored, first + n))
        for n in range(vectors, count):
            out[at + n] = read_float16(stored, first + n)
    elif form == FLOAT32:
        for n in range(0, vectors, LANES):
            store(out, at + n, load_float32(stored, first + n))
        for n in range(vectors, count):
            out[at + n] = read_float32(stored, first + n)
    else:
        for n in range(0, vectors, LANES):
            store(out, at + n, load_e8m0(stored, first + n))
        for n in range(vectors, count):
            out[at + n] = read_e8m0(stored, first + n)


@_compiled
def _unpack(
    out: Any, at: int, step: int, packed: Any, begin: int, scales: Any, scales_at: int, biases_at: int,
    g0: int, g1: int, bits: int, group: int, planes: int, fp4: bool, form: int,
) -> None:  # fmt: skip
    """Put groups `g0` to `g1` of a row, whose codes `begin` there, into `out`, vector after vector `step` apart."""
    begin += g0 * group * bits // 8
    if bits >= 16:
        _unpack_floats(out, at, step, packed, begin, (g1 - g0) * group, form)
    elif fp4:
        _unpack_fp4(out, at, step, packed, begin, scales, scales_at, g0, g1, group)
    elif bits == 4 and group == 64 and planes == 2:
        _unpack_planes(out, at, step, packed, begin, scales, scales_at, biases_at, g0, g1, 4, 64, 2)
    elif bits == 8:
        _unpack_planes(out, at, step, packed, begin, scales, scales_at, biases_at, g0, g1, 8, group, 1)
    elif planes > 1:
        _unpack_planes(out, at, step, packed, begin, scales, scales_at, biases_at, g0, g1, bits, group, planes)
    elif LANES >= 8 and group % LANES == 0:
        _unpack_fields(out, at, step, packed, begin, scales, scales_at, biases_at, g0, g1, bits, group)
    else:
        _unpack_codes(out, at, step, packed, begin, scales, scales_at, biases_at, g0, g1, bits, group)


@_compiled
def _unpack_floats(out: Any, at: int, step: int, packed: Any, begin: int, count: int, form: int) -> None:
    for n in range(0, count, LANES):
        if form == FLOAT32:
            store(out, at, load_float32(packed, begin // 4 + n))
        elif form == BFLOAT16:
            store(out, at, load_bfloat16(packed, begin // 2 + n))
        else:
            store(out, at, load_float16(packed, begin // 2 + n))
        at += step


@njit(inline="always")
def _unpack_planes(
    out: Any, at: int, step: int, packed: Any, begin: int, scales: Any, scales_at: int, biases_at: int,
    g0: int, g1: int, bits: int, group: int, planes: int,
) -> None:  # fmt: skip
    # Inlined, since numbers that are known make straight code.
    mask = np.int32((1 << bits) - 1)
    for g in range(g0, g1):
        scale, bias = broadcast(scales[scales_at + g]), broadcast(scales[biases_at + g])
        prefetch(packed, begin + AHEAD)
        for _ in range(group // (planes * LANES)):
            some = load_bytes(packed, begin)
            for plane in range(planes):
                store(out, at + plane * step, fma(field(some, np.int32(plane * bits), mask), scale, bias))
            begin += LANES
            at += planes * step


@_compiled
def _unpack_fp4(
    out: Any, at: int, step: int, packed: Any, begin: int, scales: Any, scales_at: int, g0: int, g1: int, group: int
) -> None:
    for g in range(g0, g1):
        scale = broadcast(scales[scales_at + g])
        for _ in range(group // (2 * LANES)):
            some = load_bytes(packed, begin)
            for plane in range(2):
                size, sign = field(some, np.int32(4 * plane), 7), field(some, np.int32(4 * plane + 3), 1)
                store(out, at, multiply(_fp4(size, sign), scale))
                at += step
            begin += LANES


@_compiled
def _fp4(size: Any, sign: Any) -> Any:
    """The floats of codes 0 to 7, which are 0, 1/2, 1, 3/2, 2, 3, 4, 6, and their signs: a line that bends twice."""
    half, one, zero = broadcast(np.float32(0.5)), broadcast(np.float32(1)), broadcast(np.float32(0))
    above_4 = greater(fma(size, one, broadcast(np.float32(-4))), zero)
    above_6 = greater(fma(size, one, broadcast(np.float32(-6))), zero)
    value = fma(size, half, fma(above_4, half, above_6))
    return multiply(value, fma(sign, broadcast(np.float32(-2)), one))


@_compiled
def _unpack_fields(
    out: Any, at: int, step: int, packed: Any, begin: int, scales: Any, scales_at: int, biases_at: int,
    g0: int, g1: int, bits: int, group: int,
) -> None:  # fmt: skip
    """Codes that do not divide a byte: eight of them are `bits` bytes, and are taken as one number."""
    last = len(packed) - 16
    for g in range(g0, g1):
        scale, bias = broadcast(scales[scales_at + g]), broadcast(scales[biases_at + g])
        prefetch(packed, begin + AHEAD)
        for _ in range(group // LANES):
            if begin <= last:
                low, high = load_word(packed, begin), load_word(packed, begin + bits)
            else:  # Beyond the end there is nothing to load.
                low, high = _word(packed, begin, bits), _word(packed, begin + bits * (LANES // 8 - 1), bits)
            store(out, at, fma(eight_fields(low, high, bits), scale, bias))
            begin += bits * LANES // 8
            at += step


@_compiled
def _word(packed: Any, begin: int, count: int) -> Any:
    word = np.uint64(0)
    for n in range(count):
        word |= np.uint64(packed[begin + n]) << np.uint64(8 * n)
    return word


@_compiled
def _unpack_codes(
    out: Any, at: int, step: int, packed: Any, begin: int, scales: Any, scales_at: int, biases_at: int,
    g0: int, g1: int, bits: int, group: int,
) -> None:  # fmt: skip
    mask, lane = np.uint64((1 << bits) - 1), 0
    for g in range(g0, g1):
        for _ in range(group // 8):
            word = _word(packed, begin, bits)
            begin += bits
            for n in range(8):
                code = np.float32(np.int32(word >> np.uint64(bits * n) & mask))
                out[at + lane] = code * scales[scales_at + g] + scales[biases_at + g]
                lane += 1
                if lane == LANES:
                    lane, at = 0, at + step


@_entry
def multiply_rows(out: Any, x: Any, sums: Any, counts: Any, starts: Any, stored: Any, threads: int) -> None:
    """Multiply the arranged `x` with its experts' weights: `out` (P, N).

    `stored` is a plain tuple of the fields of `Weights`."""
    weights = Weights(*stored)
    for thread in prange(threads):
        begin = thread * (weights.rows // ROWS) // threads * ROWS
        end = (thread + 1) * (weights.rows // ROWS) // threads * ROWS
        work = np.zeros(ROWS * (DEPTH + 2 * (weights.columns // weights.group)), np.float32)
        for expert in range(len(counts)):
            if counts[expert] == 1 and weights.bits == 4 and weights.planes == 2 and not weights.fp4:
                _one_row(out, x, sums, starts[expert], weights, expert, begin, end, work)
                continue
            most = max(ROUND // weights.columns // COLUMNS, 1) * COLUMNS
            for done in range(0, counts[expert], most):
                count = min(most, counts[expert] - done)
                _some_rows(out, x, starts[expert] + done, count, counts[expert] == 1, weights, expert, begin, end, work)


@_compiled
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
        _read_scales(scales, 0, stored_scales, row * groups, ROWS * groups, form)
        _read_scales(scales, ROWS * groups, stored_biases, row * groups, ROWS * groups, form)
        for r in range(ROWS):
            w_at, biases_at = (row + r) * (columns // 2), (ROWS + r) * groups
            result = _vector_dot(scales, biases_at, sums, start * groups, groups - groups % LANES)
            if group == 64:
                result = _scaled_codes(result, packed, w_at, x, start * columns, scales, r * groups, groups, 64)
            else:
                result = _scaled_codes(result, packed, w_at, x, start * columns, scales, r * groups, groups, group)
            value = total(result)
            for g in range(groups - groups % LANES, groups):
                value += scales[biases_at + g] * sums[start * groups + g]
            out[start * rows + n + r] = value


@njit(inline="always")
def _scaled_codes(
    result: Any, packed: Any, w_at: int, x: Any, x_at: int, scales: Any, scales_at: int, groups: int, group: int
) -> Any:
    """result + scale · code · x, lane by lane. Inlined, since a group size that is known makes straight code."""
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


@njit(inline="always")
def _vector_dot(a: Any, a_at: int, b: Any, b_at: int, count: int) -> Any:
    """a · b over `count` elements, a multiple of LANES, still in lanes."""
    result = broadcast(np.float32(0))
    for n in range(0, count, LANES):
        result = fma(load(a, a_at + n), load(b, b_at + n), result)
    return result


@_compiled
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
            _read_scales(work, scales_at, stored_scales, first * groups, ROWS * groups, form)
        if len(stored_biases):
            biases_at = scales_at + ROWS * groups
            _read_scales(work, biases_at, stored_biases, first * groups, ROWS * groups, form)
        for k0 in range(0, columns, DEPTH):
            k1 = min(columns, k0 + DEPTH)
            for r in range(ROWS):
                at = scales_at + r * groups
                _unpack(
                    work, r * LANES, ROWS * LANES, packed, (first + r) * (columns * bits // 8), work, at,
                    at + ROWS * groups, k0 // group, k1 // group, bits, group, planes, fp4, form,
                )  # fmt: skip
            _blocks(out, x, start, count, alone, rows, columns, n, k0, (k1 - k0) // LANES, work)


@_compiled
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


@_compiled
def _put(out: Any, at: int, onto: bool, a: Any, b: Any, c: Any, d: Any) -> None:
    """Put the sums of four vectors into `out`, onto what is there if `onto`."""
    if not onto:
        out[at : at + 4] = 0
    out[at] += total(a)
    out[at + 1] += total(b)
    out[at + 2] += total(c)
    out[at + 3] += total(d)


@_compiled
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


@_compiled
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


@_compiled
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


@_entry
def silu_times(gate: Any, up: Any) -> None:
    """gate ← silu(gate) · up, with silu(g) = g / (1 + e^-g)."""
    one, minus = broadcast(np.float32(1)), broadcast(np.float32(-1))
    for vector in prange(len(gate) // LANES):
        at = vector * LANES
        g = load(gate, at)
        sigmoid = divide(one, add(one, exp(multiply(g, minus))))
        store(gate, at, multiply(multiply(g, sigmoid), load(up, at)))


@_entry
def combine(out: Any, rows: Any, place: Any, shares: Any, per_token: int, columns: int) -> None:
    """out (T, columns) += the `rows` at each token's places, times their `shares` (T · per_token,)."""
    for token in prange(len(place) // per_token):
        for n in range(token * per_token, (token + 1) * per_token):
            _add_scaled(out, token * columns, rows, place[n] * columns, columns, shares[n])


@njit(nogil=True, cache=True)
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


# Attention: queries (B, H, T, D) over keys and values (B, H / shared, S, D), each head being D wide. The `shared` heads
# that use the same keys are rows of one matrix, shared · T of them. Row r is of token r % T, which sees the positions
# up to `first` + r % T; where `hidden` (B, T, S) has rows, it says instead what is not seen.


@_entry
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
                dot = total(_vector_dot(queries, at + row * width, keys, keys_at + s * width, width))
                scores[row * length + s] = dot * scale
        for row in range(rows):
            _weigh(scores, row * length, length, hidden, b, row % tokens, first)
        out[at : at + rows * width] = 0
        for s in range(length):
            for row in range(rows):
                _add_scaled(out, at + row * width, values, values_at + s * width, width, scores[row * length + s])


@_entry
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


@_entry
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


@_compiled
def _position(array: Any, b: int, head: int) -> int:
    """Where (b, head) begins in memory, counted in elements."""
    return (b * array.strides[0] + head * array.strides[1]) // 4


@_compiled
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


@_compiled
def _add_two(out: Any, at: int, a: Any, b: Any) -> None:
    store(out, at, add(load(out, at), a))
    store(out, at + LANES, add(load(out, at + LANES), b))


@_compiled
def _add_scaled(out: Any, at: int, values: Any, values_at: int, width: int, scale: float) -> None:
    factor = broadcast(scale)
    for n in range(0, width, LANES):
        store(out, at + n, fma(load(values, values_at + n), factor, load(out, at + n)))


@_compiled
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


@_compiled
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
