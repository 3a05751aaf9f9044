"""Rows of a file's bytes → MLX arrays, for all containers that hold plain numbers. Knows no container."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from ..weights import bytes_of, opened_file, read_into

DTYPES = {
    **{"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16, "bool": mx.bool_},
    **{"int64": mx.int64, "int32": mx.int32, "int16": mx.int16, "int8": mx.int8, "uint8": mx.uint8},
}


def filled(shape: tuple[int, ...], dtype: str, fill: Callable[[memoryview], None]) -> mx.array:
    """An array whose memory `fill` has written."""
    # On the CPU, so that the memory may be written to, and evaluated, so that it is there.
    array = mx.zeros(shape, DTYPES[dtype], stream=mx.cpu)
    mx.eval(array)
    if array.size:
        fill(bytes_of(array))
    return array


def fill_from(file: Path, view: memoryview, offset: int) -> None:
    """Fill `view` from `offset` of `file`; raises `WeightsError`."""
    with opened_file(file) as fd:
        read_into(file, fd, view, offset)


def bytes_from(file: Path, size: int, offset: int) -> bytes:
    """`size` bytes from `offset` of `file`; raises `WeightsError`."""
    buffer = bytearray(size)
    fill_from(file, memoryview(buffer), offset)
    return bytes(buffer)


def size_of(file: Path) -> int:
    """Bytes of a regular file; raises `WeightsError` for anything else."""
    with opened_file(file) as fd:
        return os.fstat(fd).st_size
