"""Safetensors files as a source: tensors read by row from where the checked header says they are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..config import shown
from ..weights import MLX_DTYPES, Span, bytes_of, opened_file, read_header, read_into
from .names import ConvertError, Stored

_READABLE = MLX_DTYPES | {"I32": mx.int32, "I64": mx.int64}  # AWQ and GPTQ pack into integers.


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor of a safetensors file."""

    span: Span
    has_rows = True  # A few can be read as cheaply as all.

    @property
    def shape(self) -> tuple[int, ...]:
        return self.span.shape

    @property
    def nbytes(self) -> int:
        return self.span.nbytes

    def read(self, start: int, stop: int) -> mx.array:
        return read_rows(self.span, start, stop)


def open_safetensors(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors of `files` by name; raises `MixtralError` for a damaged file or a name that stands twice."""
    tensors: dict[str, Stored] = {}
    for file in files:
        with opened_file(file) as fd:
            spans = read_header(file, fd)
        if twice := tensors.keys() & spans.keys():
            raise ConvertError(f"{file} holds {shown(min(twice))}, another file too.", code="duplicate_tensor")
        tensors |= {name: SafetensorsTensor(span) for name, span in spans.items()}
    return tensors


def read_rows(span: Span, start: int, stop: int) -> mx.array:
    """Rows `start` to `stop` of a row-major tensor, into MLX's own memory."""
    if span.dtype not in _READABLE:
        raise ConvertError(f"{span.file} holds {span.dtype} tensors, expected floats.", code="unsupported_dtype")
    row = math.prod(span.shape[1:])
    array = mx.zeros((stop - start, *span.shape[1:]), _READABLE[span.dtype], stream=mx.cpu)
    mx.eval(array)
    if not array.size:
        return array
    view = bytes_of(array)
    with opened_file(span.file) as fd:
        read_into(span.file, fd, view, span.offset + start * row * array.itemsize)
    return array
