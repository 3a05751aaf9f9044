"""Packed weights → floats: the codes of each row, with their scales and biases, as vectors.

Arrays are flat; what is packed and how scales are stored is said by numbers. Multiplying is left to `products`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import compiled, inlined
from .simd import (
    LANES,
    broadcast,
    eight_fields,
    field,
    fma,
    greater,
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
)

# How scales are stored.
FLOAT32, BFLOAT16, FLOAT16, E8M0 = range(4)
# Processors look ahead within a page of memory only; so many bytes are asked for beyond where we are.
AHEAD = 4096


# What is called for each row takes arrays and numbers, not `Weights`: numba would count references to its parts.


@compiled
def read_scales(out: Any, at: int, stored: Any, first: int, count: int, form: int) -> None:
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


@compiled
def unpack(
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


@compiled
def _unpack_floats(out: Any, at: int, step: int, packed: Any, begin: int, count: int, form: int) -> None:
    for n in range(0, count, LANES):
        if form == FLOAT32:
            store(out, at, load_float32(packed, begin // 4 + n))
        elif form == BFLOAT16:
            store(out, at, load_bfloat16(packed, begin // 2 + n))
        else:
            store(out, at, load_float16(packed, begin // 2 + n))
        at += step


@inlined
def _unpack_planes(
    out: Any, at: int, step: int, packed: Any, begin: int, scales: Any, scales_at: int, biases_at: int,
    g0: int, g1: int, bits: int, group: int, planes: int,
) -> None:  # fmt: skip
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


@compiled
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


@compiled
def _fp4(size: Any, sign: Any) -> Any:
    """The floats of codes 0 to 7, which are 0, 1/2, 1, 3/2, 2, 3, 4, 6, and their signs: a line that bends twice."""
    half, one, zero = broadcast(np.float32(0.5)), broadcast(np.float32(1)), broadcast(np.float32(0))
    above_4 = greater(fma(size, one, broadcast(np.float32(-4))), zero)
    above_6 = greater(fma(size, one, broadcast(np.float32(-6))), zero)
    value = fma(size, half, fma(above_4, half, above_6))
    return multiply(value, fma(sign, broadcast(np.float32(-2)), one))


@compiled
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


@compiled
def _word(packed: Any, begin: int, count: int) -> Any:
    word = np.uint64(0)
    for n in range(count):
        word |= np.uint64(packed[begin + n]) << np.uint64(8 * n)
    return word


@compiled
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
