"""The output, planned byte for byte before any of it is written: which tensor lies in which file, and where."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..weights import shards

_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_Tensors = Mapping[str, tuple[tuple[int, ...], str]]
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U32": 4, "U8": 1}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `nbytes` from `offset` in `file`. A stack's experts follow each other in equal parts."""

    file: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]

    def of_expert(self, expert: int | None) -> tuple[int, int]:
        """Offset and bytes of one expert's part, or of the whole tensor."""
        if expert is None:
            return self.offset, self.nbytes
        part = self.nbytes // self.shape[0]
        return self.offset + expert * part, part


@dataclass(frozen=True)
class Layout:
    """A planned folder: its configuration, the header of each file, its size, and every tensor's place."""

    config: Config
    headers: dict[str, bytes]
    sizes: dict[str, int]
    places: dict[str, Place]

    @classmethod
    def plan(cls, config: Config, tensors: _Tensors | None = None) -> Layout:
        """Plan the files for `config`, at most 5 GiB each; `tensors` where they are not what it implies.

        `tensors` gives shape and dtype, in safetensors' names, by tensor."""
        if tensors is None:
            code = _CODES[config.dtype]
            specs = config.tensors().items()
            tensors = {name: (spec.shape, code if spec.kind == "float" else spec.kind) for name, spec in specs}
        headers: dict[str, bytes] = {}
        sizes: dict[str, int] = {}
        places: dict[str, Place] = {}
        for file, names in shards({name: _nbytes(*tensor) for name, tensor in tensors.items()}).items():
            headers[file], sizes[file] = _file(file, {name: tensors[name] for name in names}, places)
        return cls(config, headers, sizes, places)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def write_empty(self, folder: Path) -> None:
        """Make the files, headers written and at their full size; what tensors hold already is left as it is."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, header in self.headers.items():
            fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                # After a power cut the size may have survived, and the header not.
                if os.pread(fd, len(header), 0) != header:
                    os.pwrite(fd, header, 0)
                os.ftruncate(fd, self.sizes[name])
            finally:
                os.close(fd)

    def index(self) -> str:
        """The text of model.safetensors.index.json."""
        weight_map = {name: place.file for name, place in sorted(self.places.items())}
        total = sum(place.nbytes for place in self.places.values())
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)


def _nbytes(shape: tuple[int, ...], code: str) -> int:
    return math.prod(shape) * _ITEM_BYTES[code]


def _file(file: str, tensors: _Tensors, places: dict[str, Place]) -> tuple[bytes, int]:
    """Header and size of one file; adds its tensors to `places`."""
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    starts = {}
    end = 0
    for name, (shape, code) in tensors.items():
        starts[name], end = end, end + _nbytes(shape, code)
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    for name, (shape, code) in tensors.items():
        places[name] = Place(file, len(header) + starts[name], _nbytes(shape, code), shape)
    return header, len(header) + end
