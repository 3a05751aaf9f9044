"""AWQ and GPTQ → plain matrices: whole numbers of a few bits, with scales and zeros for groups of inputs.

Both store a matrix as (in, out). AutoAWQ packs outputs into words, in an order of its own; GPTQ packs inputs, and may
have dealt them out to the groups in any order (`g_idx`). Knows no container."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..config import shown
from .names import ConvertError, Stored
from .raw import filled

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of its 8 outputs stands, from the lowest bits up
_CHUNK_ITEMS = 1 << 20

Words = npt.NDArray[np.uint32]
Numbers = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Settings:
    """What `quantization_config` says."""

    awq: bool
    bits: int
    group_size: int | None  # None: all inputs are one group
    zeros_less_1: bool  # GPTQ's first format stores each zero less 1
    act_order: bool

    @property
    def in_word(self) -> int:
        return 32 // self.bits

    @property
    def shifts(self) -> Words:
        """By how much to shift a word down for each of the numbers in it."""
        places = _AWQ_PLACES if self.awq else range(self.in_word)
        return np.array([place * self.bits for place in places], np.uint32)


@dataclass(frozen=True)
class PackedTensor:
    """A packed matrix, (out, in) like any other."""

    settings: _Settings
    shape: tuple[int, int]
    qweight: Stored
    qzeros: Stored
    scales: Stored
    g_idx: Stored | None

    @property
    def nbytes(self) -> int:
        parts = (self.qweight, self.qzeros, self.scales, self.g_idx)
        return sum(part.nbytes for part in parts if part is not None)

    def read(self, start: int, stop: int) -> mx.array:
        """Rows `start` to `stop`, as float32."""
        shape = (stop - start, self.shape[1])
        return filled(shape, "float32", lambda view: self._fill(np.frombuffer(view, np.float32).reshape(shape), start))

    def _fill(self, rows: Numbers, start: int) -> None:
        """A run of rows at a time, because unpacking takes several times their memory."""
        words, zeros, scales, groups = _words(self.qweight), self._zeros(), _floats(self.scales), self._groups()
        step = max(1, _CHUNK_ITEMS // self.shape[1])
        for first in range(0, len(rows), step):
            outputs = slice(start + first, start + min(first + step, len(rows)))
            numbers = self._outputs(words, outputs) if self.settings.awq else self._inputs(words, outputs)
            numbers -= self._outputs(zeros, outputs)[groups]
            numbers *= scales[:, outputs][groups]
            rows[first : first + step] = numbers.T

    def _zeros(self) -> Words:
        words = _words(self.qzeros)
        if self.settings.zeros_less_1:
            # On whole words, carries and all, as GPTQ's own tools turn the first format into the second.
            words = words + np.uint32(sum(1 << at for at in range(0, 32, self.settings.bits)))
        return words

    def _outputs(self, words: Words, outputs: slice) -> Numbers:
        """Columns of a matrix that has its columns packed."""
        each = self.settings.in_word
        first = outputs.start // each
        part = words[:, first : -(-outputs.stop // each)]
        numbers = self._unpacked(part[:, :, None] >> self.settings.shifts).reshape(len(words), -1)
        return numbers[:, outputs.start - first * each : outputs.stop - first * each]

    def _inputs(self, words: Words, outputs: slice) -> Numbers:
        """Columns of a matrix that has its rows packed."""
        part = words[:, None, outputs] >> self.settings.shifts[:, None]
        return self._unpacked(part).reshape(-1, outputs.stop - outputs.start)

    def _unpacked(self, shifted: Words) -> Numbers:
        return (shifted & np.uint32(2**self.settings.bits - 1)).astype(np.float32)

    def _groups(self) -> npt.NDArray[np.int64]:
        """The group of each input."""
        inputs, count = self.shape[1], self.scales.shape[0]
        if self.g_idx is None:
            return np.arange(inputs) // (self.settings.group_size or inputs)
        groups = np.asarray(self.g_idx.read(0, inputs)).astype(np.int64)
        if groups.min(initial=0) < 0 or groups.max(initial=0) >= count:
            _refuse(f"A g_idx names group {groups.max()}, of {count} groups")
        return groups


def unpack(tensors: Mapping[str, Stored], quantization_config: Mapping[str, Any]) -> dict[str, Stored]:
    """`tensors` with every packed matrix under its plain name; raises `ConvertError`.

    `quantization_config` is the entry of that name in config.json. Integer tensors must be read as integers."""
    settings = _settings(quantization_config)
    result: dict[str, Stored] = {}
    for name, stored in tensors.items():
        path, _, part = name.rpartition(".")
        packed = f"{path}.qweight" in tensors
        if packed and part == "qweight":
            result[f"{path}.weight"] = _packed(path, tensors, settings)
        elif packed and part == "bias":
            _check_no_bias(name, stored)
        elif not packed or part not in ("qzeros", "scales", "g_idx"):
            result[name] = stored
    return result


def _packed(path: str, tensors: Mapping[str, Stored], settings: _Settings) -> PackedTensor:
    parts = [tensors.get(f"{path}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")]
    qweight, qzeros, scales, g_idx = parts
    if qweight is None or qzeros is None or scales is None or len(qweight.shape) != 2:
        _refuse(f"{shown(path)} is not packed as a matrix with qweight, qzeros and scales")
    rows, columns = qweight.shape
    each = settings.in_word
    inputs, outputs = (rows, columns * each) if settings.awq else (rows * each, columns)
    # With g_idx, the last group may be an incomplete one.
    groups = -(-inputs // (settings.group_size or inputs))
    if settings.awq or (g_idx is None and settings.act_order is False):
        g_idx = None
    elif g_idx is None or g_idx.shape != (inputs,):
        _refuse(f"{shown(path)} has its inputs in a special order, and no g_idx that says which")
    if scales.shape != (groups, outputs) or qzeros.shape != (groups, outputs // each) or outputs % each:
        _refuse(
            f"{shown(path)} has scales of {list(scales.shape)} and qzeros of {list(qzeros.shape)} "
            f"for {inputs} inputs in {groups} groups and {outputs} outputs"
        )
    return PackedTensor(settings, (outputs, inputs), qweight, qzeros, scales, g_idx)


def _settings(config: Mapping[str, Any]) -> _Settings:
    method, bits, group_size = config.get("quant_method"), config.get("bits"), config.get("group_size", 128)
    if method not in ("awq", "gptq"):
        _refuse(f"The weights are quantized by {shown(method)}, expected awq or gptq")
    if type(bits) is not int or bits not in ((4,) if method == "awq" else (4, 8)):
        _refuse(f"The weights have {shown(bits)} bits by {method}, expected 4{'' if method == 'awq' else ' or 8'}")
    if type(group_size) is not int or not (group_size == -1 or 1 <= group_size <= 1 << 20):
        _refuse(f"The weights have groups of {shown(group_size)}, expected a size or -1")
    if method == "awq":
        _check_awq(config)
    version = str(config.get("checkpoint_format", "gptq")).lower()
    if method == "gptq" and (version not in ("gptq", "gptq_v2") or config.get("is_marlin_format")):
        _refuse(f"The weights are in the format {shown(version)}, expected gptq or gptq_v2")
    return _Settings(
        awq=method == "awq",
        bits=bits,
        group_size=None if group_size == -1 else group_size,
        zeros_less_1=method == "gptq" and version == "gptq",
        act_order=bool(config.get("desc_act")),
    )


def _check_awq(config: Mapping[str, Any]) -> None:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm" or not config.get("zero_point", True):
        zero = "" if config.get("zero_point", True) else " without zeros"
        _refuse(f"The weights are in AWQ's format {shown(version)}{zero}, expected 'gemm'")


def _check_no_bias(name: str, stored: Stored) -> None:
    # Some versions of AutoGPTQ wrote one of zeros beside every matrix.
    if len(stored.shape) != 1 or bool(mx.any(stored.read(0, stored.shape[0]) != 0, stream=mx.cpu)):
        raise ConvertError(f"The source holds {shown(name)}; no Mixtral has it.", code="unexpected_tensor")


def _words(stored: Stored) -> Words:
    array = np.asarray(_whole(stored))
    if array.dtype not in (np.int32, np.uint32):
        _refuse(f"Packed numbers are of type {array.dtype}, expected int32")
    return array.view(np.uint32)


def _floats(stored: Stored) -> Numbers:
    array = _whole(stored).astype(mx.float32, stream=mx.cpu)
    mx.eval(array)
    return np.asarray(array)


def _whole(stored: Stored) -> mx.array:
    return stored.read(0, stored.shape[0])


def _refuse(what: str) -> NoReturn:
    raise ConvertError(
        f"{what}.", code="unsupported_quantization", hint="Take an unquantized version of the model, if there is one."
    )
