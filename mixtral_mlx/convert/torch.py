"""Torch's weight files (.bin, .pt, .pth), without torch and without running anything in them.

A file is a zip of stored, uncompressed entries: one pickle that describes the tensors, and each tensor's bytes, read
from where they lie. Files from before torch 1.6 hold the same things one after the other."""

from __future__ import annotations

import re
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import mlx.core as mx

from ..config import shown
from .names import ConvertError, Stored
from .pickled import Storage, View, describe
from .raw import DTYPES, bytes_from, fill_from, filled, size_of

_MAX_PICKLE_BYTES = 8 << 20
_MAX_DIRECTORY_BYTES = 32 << 20
_MAX_ENTRIES = 1 << 15
_CRC_BYTES = 8 << 20
_NAME = re.compile(r"[A-Za-z0-9_][\w. +()@=-]*(/\.?[A-Za-z0-9_][\w.-]*)*", re.ASCII)
_OLD_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_PROTOCOL = 1001


class _Blob:
    """A run of bytes in a file, checked against its CRC before any of them is used."""

    def __init__(self, file: Path, offset: int, nbytes: int, crc: int | None) -> None:
        self.file = file
        self.offset = offset
        self.nbytes = nbytes
        self._crc = crc
        self._checked = crc is None
        self._lock = threading.Lock()

    def read_into(self, view: memoryview, start: int) -> None:
        if view.nbytes == self.nbytes:
            fill_from(self.file, view, self.offset)
            if not self._checked:
                self._check(zlib.crc32(view))
        else:
            self._check_whole()
            fill_from(self.file, view, self.offset + start)

    def bytes(self) -> bytes:
        data = bytearray(self.nbytes)
        self.read_into(memoryview(data), 0)
        return bytes(data)

    def _check_whole(self) -> None:
        with self._lock:
            if self._checked:
                return
            crc, buffer = 0, memoryview(bytearray(min(_CRC_BYTES, self.nbytes)))
            for at in range(0, self.nbytes, _CRC_BYTES):
                part = buffer[: min(_CRC_BYTES, self.nbytes - at)]
                fill_from(self.file, part, self.offset + at)
                crc = zlib.crc32(part, crc)
            self._check(crc)

    def _check(self, crc: int) -> None:
        if crc != self._crc:
            raise ConvertError(
                f"{self.file} holds other bytes at {self.offset:,} than its checksum was made of.",
                code="bad_crc",
                hint="The file is damaged. Fetch it again.",
            )
        self._checked = True


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of a torch file: `start` bytes into a blob, row after row or, if `transposed`, column after column."""

    blob: _Blob
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    transposed: bool

    def read(self, start: int, stop: int) -> mx.array:
        """Rows `start` to `stop`; integers stay integers."""
        if self.dtype not in DTYPES:
            raise ConvertError(
                f"{self.blob.file} holds {self.dtype} tensors, expected 16 or 32 bit floats.", code="unsupported_dtype"
            )
        if self.transposed:
            columns = filled(self.shape[::-1], self.dtype, lambda view: self.blob.read_into(view, self.start))
            rows = mx.contiguous(columns[:, start:stop].T, stream=mx.cpu)
            mx.eval(rows)
            return rows
        before = self.start + start * (self.nbytes // max(self.shape[0], 1))
        return filled((stop - start, *self.shape[1:]), self.dtype, lambda view: self.blob.read_into(view, before))


def open_torch(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors of `files` by name.

    Raises `MixtralError` for a damaged file, one that asks for more than tensors, or a name that stands twice."""
    tensors: dict[str, Stored] = {}
    for file in files:
        found = _open(file)
        if twice := tensors.keys() & found.keys():
            raise ConvertError(f"{file} holds {shown(min(twice))}, another file too.", code="duplicate_tensor")
        tensors |= found
    return tensors


def _open(file: Path) -> Mapping[str, TorchTensor]:
    size = size_of(file)
    head = bytes_from(file, min(size, 16), 0)
    if head.startswith(b"PK\3\4"):
        root, blobs = _archive(file, size)
    elif head.startswith(_OLD_MAGIC):
        root, blobs = _old_file(file, size)
    else:
        _damaged(file, "is no torch file")
    if type(root) is not dict or not all(type(name) is str and isinstance(v, View) for name, v in root.items()):
        raise ConvertError(
            f"{file} holds other things than tensors by name.",
            code="bad_torch_file",
            hint="Only plain state dictionaries can be read, not whole models or training states.",
        )
    return {name: _tensor(file, name, view, blobs) for name, view in root.items()}


def _tensor(file: Path, name: str, view: View, blobs: Mapping[str, _Blob]) -> TorchTensor:
    blob = blobs.get(view.storage.key)
    if blob is None or blob.nbytes != view.storage.nbytes:
        _damaged(file, f"lacks the bytes of tensor {shown(name)}, or has them in another size")
    count = 1
    strides: list[int] = []
    for size in view.shape[::-1]:
        strides.insert(0, count)
        count *= size
    columns = (1, view.shape[0]) if len(view.shape) == 2 else ()
    if not _same_order(view, tuple(strides)) and not _same_order(view, columns):
        raise ConvertError(
            f"{file} holds tensor {shown(name)} with strides {shown(view.strides)}, expected rows one after the other.",
            code="unsupported_layout",
        )
    start, transposed = view.offset * view.item_bytes, not _same_order(view, tuple(strides))
    return TorchTensor(blob, view.dtype, view.shape, start, count * view.item_bytes, transposed)


def _same_order(view: View, strides: tuple[int, ...]) -> bool:
    """Whether the items lie as `strides` has them; those of a dimension of one item do not matter."""
    return len(strides) == len(view.shape) and (
        0 in view.shape
        or all(size == 1 or a == b for size, a, b in zip(view.shape, view.strides, strides, strict=True))
    )


# The zip form. Only what torch writes is known here; anything else a zip may be is refused.


def _archive(file: Path, size: int) -> tuple[object, dict[str, _Blob]]:
    entries = _entries(file, size)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        _damaged(file, f"holds {len(pickles)} descriptions of tensors, expected one data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(root + "byteorder")
    if order is not None and (order.nbytes > 16 or order.bytes() != b"little"):
        _damaged(file, "was written on a big-endian machine")
    if entries[pickles[0]].nbytes > _MAX_PICKLE_BYTES:
        _damaged(file, f"has a description of {entries[pickles[0]].nbytes:,} bytes, more than any Mixtral's")
    made = _describe(file, BytesIO(entries[pickles[0]].bytes()))
    prefix = root + "data/"
    return made, {name.removeprefix(prefix): blob for name, blob in entries.items() if name.startswith(prefix)}


def _describe(file: Path, stream: BytesIO) -> object:
    try:
        return describe(stream)
    except ConvertError as error:
        raise ConvertError(f"{file}: {error}", code=error.code, hint=error.hint) from None


def _entries(file: Path, size: int) -> dict[str, _Blob]:
    """Name → bytes of every entry, none of which overlap, compressed or outside the file."""
    start, length, count = _directory(file, size)
    directory = bytes_from(file, length, start)
    entries: dict[str, _Blob] = {}
    places: list[tuple[int, int]] = []
    at = 0
    for _ in range(count):
        name, header, nbytes, crc, at = _record(file, directory, at)
        if name in entries:
            _damaged(file, f"has two entries {shown(name)}")
        offset = _data_offset(file, name, header, start)
        if offset + nbytes > start:
            _damaged(file, f"has an entry {shown(name)} that reaches beyond its data")
        entries[name] = _Blob(file, offset, nbytes, crc)
        places.append((header, offset + nbytes))
    if at != length:
        _damaged(file, "has a directory of another length than it says")
    places.sort()
    for (_, end), (header, _) in pairwise(places):
        if header < end:
            _damaged(file, f"has entries that overlap at byte {header:,}")
    return entries


def _directory(file: Path, size: int) -> tuple[int, int, int]:
    """Offset, bytes and number of entries of the zip's directory."""
    if size < 22:
        _damaged(file, "is cut short")
    tail = bytes_from(file, min(size, 98), size - min(size, 98))
    magic, disk, first, here, count, length, start, comment = struct.unpack("<4s4HIIH", tail[-22:])
    if magic != b"PK\5\6" or comment or disk or first or here != count:
        _damaged(file, "is cut short, or is no zip file that torch wrote")
    end = size - 22
    if tail[-42:-38] == b"PK\6\7":
        end = _check_locator(file, tail, size)
        *_, here, count, length, start = struct.unpack("<4sQHHII4Q", tail[-98:-42])
    if count > _MAX_ENTRIES or length > min(_MAX_DIRECTORY_BYTES, size) or start + length != end:
        _damaged(file, f"says its directory of {count:,} entries lies at {start:,}, where it is not")
    return start, length, count


def _check_locator(file: Path, tail: bytes, size: int) -> int:
    """Check the end records of the large form of zip; returns where they begin."""
    if len(tail) < 98:
        _damaged(file, "is cut short")
    magic, rest, _, _, disk, first, here, count = struct.unpack("<4sQHHIIQQ", tail[:40])
    _, locator_disk, at, disks = struct.unpack("<4sIQI", tail[-42:-22])
    found = (magic, rest, disk, first, count, locator_disk, at)
    if found != (b"PK\6\6", 44, 0, 0, here, 0, size - 98) or disks > 1:
        _damaged(file, "has end records that contradict each other")
    return size - 98


def _record(file: Path, directory: bytes, at: int) -> tuple[str, int, int, int, int]:
    """One entry of the directory: name, offset of its header, bytes, CRC, and where the next record begins."""
    fields = directory[at : at + 46]
    if len(fields) < 46 or fields[:4] != b"PK\1\2":
        _damaged(file, "has a damaged directory")
    flags, method, _, crc, packed, nbytes, names, extras, comments = struct.unpack("<8xHHIIIIHHH", fields[:34])
    disk, _, _, header = struct.unpack("<HHII", fields[34:])
    end = at + 46 + names + extras + comments
    raw = directory[at + 46 : at + 46 + names]
    name = raw.decode("ascii", "replace")
    if end > len(directory) or disk or not _NAME.fullmatch(name) or len(name) > 512:
        _damaged(file, f"has an entry {shown(name)}, which torch does not write")
    if flags & ~0x0808 or method:
        _damaged(file, f"has its entry {shown(name)} compressed or encrypted, which torch does not do")
    large = iter(_large(file, directory[at + 46 + names : at + 46 + names + extras]))
    nbytes, packed, header = (next(large, -1) if value == 0xFFFFFFFF else value for value in (nbytes, packed, header))
    if nbytes != packed or min(nbytes, header) < 0:
        _damaged(file, f"gives entry {shown(name)} sizes that contradict each other")
    return name, header, nbytes, crc, end


def _large(file: Path, extras: bytes) -> Iterator[int]:
    """The 64-bit numbers that stand in for those of a record that do not fit."""
    at = 0
    while at + 4 <= len(extras):
        kind, length = struct.unpack_from("<HH", extras, at)
        if at + 4 + length > len(extras):
            _damaged(file, "has a damaged directory")
        if kind == 1:
            yield from (number for (number,) in struct.iter_unpack("<Q", extras[at + 4 : at + 4 + length // 8 * 8]))
            return
        at += 4 + length


def _data_offset(file: Path, name: str, header: int, limit: int) -> int:
    if header + 30 > limit:
        _damaged(file, f"has an entry {shown(name)} that lies outside its data")
    fields = bytes_from(file, 30, header)
    flags, method, names, extras = struct.unpack("<6xHH16xHH", fields)
    if fields[:4] != b"PK\3\4" or flags & ~0x0808 or method or names != len(name):
        _damaged(file, f"has an entry {shown(name)} that is not where its directory says")
    if bytes_from(file, names, header + 30) != name.encode():
        _damaged(file, f"has an entry {shown(name)} under another name in its directory")
    return header + 30 + names + extras


# The old form: pickles of a magic number, a version, facts on the machine, the tensors and the storages' order, and
# then each storage, its number of items before it.


def _old_file(file: Path, size: int) -> tuple[object, dict[str, _Blob]]:
    stream = BytesIO(bytes_from(file, min(size, _MAX_PICKLE_BYTES), 0))
    _describe(file, stream)
    protocol, machine, root, order = (_describe(file, stream) for _ in range(4))
    if protocol != _OLD_PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        _damaged(file, "is of an unknown old form")
    if not isinstance(order, list) or not all(isinstance(key, str) for key in order):
        _damaged(file, "lists its storages in no known form")
    storages = _storages(root)
    if len(set(order)) != len(order) or storages.keys() != set(order):
        _damaged(file, "lists other storages than its tensors use")
    return root, _old_blobs(file, size, stream.tell(), [storages[key] for key in order])


def _old_blobs(file: Path, size: int, at: int, storages: list[Storage]) -> dict[str, _Blob]:
    blobs: dict[str, _Blob] = {}
    for storage in storages:
        if at + 8 + storage.nbytes > size:
            _damaged(file, "is cut short")
        if struct.unpack("<Q", bytes_from(file, 8, at)) != (storage.count,):
            _damaged(file, f"has a storage of another size than its tensors say at {at:,}")
        blobs[storage.key] = _Blob(file, at + 8, storage.nbytes, None)
        at += 8 + storage.nbytes
    if at != size:
        _damaged(file, f"is {size:,} bytes long, its tensors end at {at:,}")
    return blobs


def _storages(root: object) -> dict[str, Storage]:
    views = root.values() if isinstance(root, dict) else ()
    return {view.storage.key: view.storage for view in views if isinstance(view, View)}


def _damaged(file: Path, what: str) -> NoReturn:
    raise ConvertError(f"{file} {what}.", code="bad_torch_file", hint="Fetch the file again.")
