"""Floats from the dtype they are stored in to another, bit for bit as MLX converts them; on any thread."""

from __future__ import annotations

from functools import partial

import numpy as np

from .readers import Convert

_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def converter(stored: str, target: str) -> Convert | None:
    """From dtype `stored` to `target`, both of "F32", "F16", "BF16"; None where they are the same."""
    return None if stored == target else partial(_convert, stored, target)


def _convert(stored: str, target: str, source: memoryview, view: memoryview) -> None:
    values = np.frombuffer(source, _NUMPY[stored])
    if stored == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    out = np.frombuffer(view, _NUMPY[target])
    if target == "BF16":
        out[:] = _rounded(values.astype(np.float32, copy=False))
    else:
        with np.errstate(over="ignore"):
            out[:] = values


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 → the upper half of its bits, to the nearest, ties to even; what is no number stays none."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
