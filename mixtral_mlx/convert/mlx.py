"""Folders MLX wrote, as a source: quantized matrices taken apart for another recipe, or kept bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..config import Config, Packing
from ..weights import Checkpoint, Tensor
from .layout import Layout
from .names import Block, ConvertError, Stored
from .safetensors import read_rows


@dataclass(frozen=True)
class Unpacked:
    """A quantized matrix, or stack of them, read as floats."""

    weight: Stored
    scales: Stored
    biases: Stored | None
    packing: Packing

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.weight.shape[:-1], self.weight.shape[-1] * 32 // self.packing.bits)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes + (self.biases.nbytes if self.biases else 0)

    def read(self, start: int, stop: int) -> mx.array:
        array = mx.dequantize(
            self.weight.read(start, stop),
            self.scales.read(start, stop),
            self.biases.read(start, stop) if self.biases else None,
            group_size=self.packing.group_size,
            bits=self.packing.bits,
            mode=self.packing.mode,
        )
        mx.eval(array)
        return array


def unpack(tensors: Mapping[str, Stored], config: Config) -> dict[str, Stored]:
    """The same tensors with every quantized matrix seen as floats; `config` says how each is quantized."""
    result: dict[str, Stored] = {}
    for name, stored in tensors.items():
        path = name.rpartition(".")[0]
        if not name.endswith((".weight", ".scales", ".biases")) or f"{path}.scales" not in tensors:
            result[name] = stored
        elif name.endswith(".weight"):
            packing = config.packing(_module(path))
            if packing is None:
                raise ConvertError(f"config.json does not say how {path} is quantized.", code="bad_quantization")
            result[name] = Unpacked(stored, tensors[f"{path}.scales"], tensors.get(f"{path}.biases"), packing)
    return result


def _module(path: str) -> str:
    """The module a quantized tensor belongs to: of an unstacked expert, its stack."""
    moe, found, expert = path.partition(".experts.")
    if not found:
        return path
    letter = expert.rpartition(".")[2]
    projection = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(letter, letter)
    return f"{moe}.switch_mlp.{projection}"


@dataclass(frozen=True)
class Kept:
    """One matrix in the form it has, for copying."""

    path: str
    expert: int | None
    tensors: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        return self.path if self.expert is None else f"{self.path}.{self.expert}"

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes // (1 if self.expert is None else t.shape[0]) for t in self.tensors)

    def blocks(self) -> Iterator[Block]:
        yield Block(0, 1, 1, [_read_part(tensor, self.expert) for tensor in self.tensors])

    def packed(self, values: list[mx.array], config: Config) -> list[mx.array]:
        return values


def kept(folder: Path) -> tuple[Layout, list[Kept]]:
    """The stacked form of an MLX folder with every tensor as it is, and its matrices, experts one by one.

    Raises `MixtralError`."""
    checkpoint = Checkpoint.open(folder)
    by_path: dict[str, list[Tensor]] = {}
    for tensor in checkpoint.tensors:
        by_path.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    pieces = []
    for path, tensors in by_path.items():
        experts = range(tensors[0].shape[0]) if ".switch_mlp." in path else [None]
        pieces += [Kept(path, expert, tuple(tensors)) for expert in experts]
    # A configuration may name another dtype than the tensors have.
    config = replace(checkpoint.config, dtype=checkpoint.dtype)
    return Layout.plan(config, {t.name: (t.shape, t.dtype) for t in checkpoint.tensors}), pieces


def _read_part(tensor: Tensor, expert: int | None) -> mx.array:
    if expert is None:
        return read_rows(tensor.spans[0], 0, tensor.spans[0].shape[0])
    if len(tensor.spans) == 1:
        return read_rows(tensor.spans[0], expert, expert + 1)
    return read_rows(tensor.spans[expert], 0, tensor.spans[expert].shape[0])
