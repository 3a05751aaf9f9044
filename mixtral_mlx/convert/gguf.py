"""GGUF, llama.cpp's files: tensors by row as floats, and the configuration and tokenizer in their metadata.

The header is parsed here, because a file may be hostile and the gguf package trusts what it reads; how each of
llama.cpp's types packs numbers is that package's knowledge."""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import mlx.core as mx
import numpy as np

from ..config import shown
from ..prompt import _PUBLISHED, Tokenizer, _carried, _carried_file
from ..weights import opened_file, read_into
from .names import ConvertError, Stored
from .raw import filled

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_MAX_HEADER_BYTES = 64 << 20
_MAX_TEXT_BYTES = 4 << 20
_MAX_ITEMS = 1 << 21  # in all lists together; a Mixtral's tokenizer has 32,768 pieces, three lists of them
_MAX_TENSORS = 1 << 16
_MAX_ENTRIES = 1 << 12
_MAX_FILES = 1 << 10
_CHUNK_ITEMS = 1 << 21
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NUMBERS = dict(enumerate(("B", "b", "<H", "<h", "<I", "<i", "<f", "?")))
_NUMBERS |= {10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_ADDED_KINDS = (_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED)
_PUT_TOKENIZER = "Put the model's tokenizer.model beside it."
_GET_ANOTHER = "Fetch the file again, or take another conversion of the model."

WriteTokenizer = Callable[[Path], Path]
"""Writes `tokenizer.model` into a folder and returns it; raises `MixtralError` if the file has no usable tokenizer."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file, its axes in our order: the one that lies together last."""

    file: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, start: int, stop: int) -> mx.array:
        """Rows `start` to `stop`: plain floats as they are, packed ones as float32."""
        each = self.nbytes // self.shape[0]
        shape, offset = (stop - start, *self.shape[1:]), self.offset + start * each
        with opened_file(self.file) as fd:
            if self.kind.name in _FLOATS:
                return filled(shape, _FLOATS[self.kind.name], lambda view: read_into(self.file, fd, view, offset))
            return filled(shape, "float32", lambda view: self._unpack(fd, offset, view))

    def _unpack(self, fd: int, offset: int, view: memoryview) -> None:
        """A run of rows at a time, because unpacking takes several times a row's memory."""
        from gguf.quants import dequantize

        width = self.shape[-1]
        rows = np.frombuffer(view, np.float32).reshape(-1, width)
        row_bytes = self.nbytes // math.prod(self.shape[:-1])
        step = max(1, _CHUNK_ITEMS // width)
        for first in range(0, len(rows), step):
            packed = np.empty((min(step, len(rows) - first), row_bytes), np.uint8)
            read_into(self.file, fd, packed.data.cast("B"), offset + first * row_bytes)
            with np.errstate(all="ignore"):  # A file may hold infinite scales.
                rows[first : first + len(packed)] = dequantize(packed, self.kind)


@dataclass
class _Header:
    """What stands before the tensors' bytes in one file."""

    file: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)


def open_gguf(files: Sequence[Path]) -> tuple[dict[str, Stored], dict[str, Any], WriteTokenizer]:
    """The tensors of a GGUF model, its configuration as `config.json` data, and what writes its tokenizer.

    `files` are all parts of one model, in any order. Raises `MixtralError` for damaged files and other models."""
    headers = _in_order([_read_header(file) for file in files])
    metadata, file = headers[0].metadata, headers[0].file
    tensors: dict[str, GgufTensor] = {}
    for header in headers:
        if twice := tensors.keys() & header.tensors.keys():
            raise ConvertError(f"{header.file} holds {shown(min(twice))} again.", code="duplicate_tensor")
        tensors |= header.tensors
    total = metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        _damaged(file, f"says there are {shown(total)} tensors, found {len(tensors)}")
    _check_kinds(file, tensors.values())
    config = _config(file, metadata, tensors)
    return dict(_without_rope_factors(file, tensors)), config, lambda folder: _write_tokenizer(file, metadata, folder)


def parts_of(file: Path) -> list[Path]:
    """All files of the model whose part `file` is, by llama.cpp's way of naming them."""
    match = re.fullmatch(r"(.+)-[0-9]{5}-of-([0-9]{5})\.gguf", file.name)
    if not match or not 1 <= int(match[2]) <= _MAX_FILES:
        return [file]
    return [file.with_name(f"{match[1]}-{n:05}-of-{match[2]}.gguf") for n in range(1, int(match[2]) + 1)]


def _in_order(headers: list[_Header]) -> list[_Header]:
    """The parts of one model, first to last, none missing."""
    count = headers[0].metadata.get("split.count", 0) or 1
    parts = sorted(headers, key=lambda header: _part(header, len(headers)))
    numbers = [_part(header, len(headers)) for header in parts]
    if count != len(headers) or numbers != list(range(count)):
        raise ConvertError(
            f"{headers[0].file} is of a model in {shown(count)} files, given were {len(headers)}.",
            code="missing_file",
            hint="Give the folder with all of its -00001-of-... files, and nothing else.",
        )
    return parts


def _part(header: _Header, count: int) -> int:
    number = header.metadata.get("split.no", 0)
    if type(number) is not int or not 0 <= number < count:
        _damaged(header.file, f"says it is part {shown(number)} of a model, of {count} files given")
    return number


# The header.


class _Cursor:
    """Reads numbers and texts one after the other, never beyond the file."""

    def __init__(self, file: Path, stream: BinaryIO, size: int) -> None:
        self.file = file
        self.stream = stream
        self.left = min(size, _MAX_HEADER_BYTES)
        self.items = _MAX_ITEMS

    def take(self, count: int) -> bytes:
        if count > self.left:
            _damaged(self.file, "is cut short, or has an impossible header")
        self.left -= count
        data = self.stream.read(count)
        if len(data) != count:
            _damaged(self.file, "became shorter while it was read")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        if length > _MAX_TEXT_BYTES:
            _damaged(self.file, f"has a text of {length:,} bytes")
        # Not every piece of every tokenizer is whole UTF-8.
        return self.take(length).decode("utf-8", "replace")

    def value(self) -> Any:
        kind = self.number("<I")
        if kind != _LIST:
            return self.scalar(kind)
        kind, count = self.number("<I"), self.number("<Q")
        self.items -= count
        if self.items < 0:
            _damaged(self.file, "has more metadata than any Mixtral's")
        if kind in _NUMBERS:
            form = _NUMBERS[kind].removeprefix("<")
            return struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(f"<{form}")))
        return tuple([self.scalar(kind) for _ in range(count)])

    def scalar(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind not in _NUMBERS:
            _damaged(self.file, f"has metadata of an unknown type {kind}")
        return self.number(_NUMBERS[kind])


def _read_header(file: Path) -> _Header:
    with opened_file(file) as fd, open(fd, "rb", closefd=False, buffering=1 << 16) as stream:
        size = os.fstat(fd).st_size
        cursor = _Cursor(file, stream, size)
        entries, tensors = _counts(cursor)
        header = _Header(file)
        for _ in range(entries):
            key = cursor.text()
            if key in header.metadata:
                _damaged(file, f"has two entries {shown(key)}")
            header.metadata[key] = cursor.value()
        found = [_tensor_entry(cursor) for _ in range(tensors)]
        _place(header, found, stream.tell(), size)
    return header


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """How many entries of metadata there are, and tensors."""
    if cursor.take(4) != b"GGUF":
        _damaged(cursor.file, "is no GGUF file")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ConvertError(
            f"{cursor.file} is GGUF version {version}, expected 2 or 3 (little-endian).", code="unsupported_gguf"
        )
    tensors, entries = cursor.number("<Q"), cursor.number("<Q")
    if tensors > _MAX_TENSORS or entries > _MAX_ENTRIES:
        _damaged(cursor.file, f"lists {tensors:,} tensors and {entries:,} entries, more than any Mixtral's")
    return entries, tensors


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape in our order, number of its type, and where it begins."""
    name, dimensions = cursor.text(), cursor.number("<I")
    if len(name) > 256 or not 1 <= dimensions <= 4:
        _damaged(cursor.file, f"has tensor {shown(name)} of {dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    return name, shape, cursor.number("<I"), cursor.number("<Q")


def _place(header: _Header, entries: Iterable[tuple[str, tuple[int, ...], int, int]], end: int, size: int) -> None:
    """Add the tensors to `header`, each checked to lie within the file and over no other."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    file, alignment = header.file, header.metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in (1 << n for n in range(3, 21)):
        _damaged(file, f"has an alignment of {shown(alignment)}")
    start, known = -(-end // alignment) * alignment, {int(kind) for kind in GGMLQuantizationType}
    for name, shape, number, offset in entries:
        if number not in known:
            raise ConvertError(f"{file} has {shown(name)} of an unknown type {number}.", code="unsupported_dtype")
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        nbytes = math.prod(shape) // block * block_bytes
        if name in header.tensors or 0 in shape or shape[-1] % block or offset % alignment:
            _damaged(file, f"has an impossible tensor {shown(name)}")
        if start + offset + nbytes > size:
            _damaged(file, f"is {size:,} bytes long, its {shown(name)} ends at {start + offset + nbytes:,}")
        header.tensors[name] = GgufTensor(file, kind, shape, start + offset, nbytes)
    for one, two in pairwise(sorted(header.tensors.values(), key=lambda tensor: tensor.offset)):
        if one.offset + one.nbytes > two.offset:
            _damaged(file, f"has tensors that overlap at byte {two.offset:,}")


def _check_kinds(file: Path, tensors: Iterable[GgufTensor]) -> None:
    """Refuse types that the gguf package cannot unpack, before hours of work instead of after."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    for kind in {tensor.kind for tensor in tensors}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise ConvertError(
                f"{file} has tensors of type {kind.name}, which cannot be unpacked.",
                code="unsupported_dtype",
                hint="Take another conversion of the model: Q8_0, a K-quant or a float type.",
            ) from None


def _without_rope_factors(file: Path, tensors: Mapping[str, GgufTensor]) -> dict[str, GgufTensor]:
    """All but `rope_freqs.weight`, which must say nothing: a Mixtral's rotary frequencies follow from its settings."""
    factors = tensors.get("rope_freqs.weight")
    if factors is not None and (math.prod(factors.shape) > 4096 or bool(mx.any(_all(factors) != 1))):
        raise ConvertError(
            f"{file} changes its rotary frequencies one by one, which no Mixtral does.", code="not_mixtral"
        )
    return {name: tensor for name, tensor in tensors.items() if name != "rope_freqs.weight"}


def _all(tensor: GgufTensor) -> mx.array:
    return tensor.read(0, tensor.shape[0])


# The configuration.


def _config(file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """`config.json` data; what stands in it is checked where every configuration is."""
    values = _Metadata(file, metadata)
    values.check_kind()
    embeddings = tensors.get("token_embd.weight")
    if embeddings is None:
        _damaged(file, "has no token embeddings")
    heads, hidden = values.number("attention.head_count"), values.number("embedding_length")
    head_dim = values.number("attention.key_length", hidden // max(heads, 1))
    return {
        "model_type": "mixtral",
        "vocab_size": embeddings.shape[0],
        "hidden_size": hidden,
        "intermediate_size": values.number("feed_forward_length"),
        "num_hidden_layers": values.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.number("attention.head_count_kv", heads),
        "head_dim": values.same(head_dim, "attention.value_length", "rope.dimension_count"),
        "num_local_experts": values.number("expert_count"),
        "num_experts_per_tok": values.number("expert_used_count"),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        # Where it is missing, this is what llama.cpp runs the file with.
        "rope_theta": values.number("rope.freq_base", 10000.0),
        "rope_scaling": values.rope_scaling(),
        "sliding_window": values.number("attention.sliding_window", 0) or None,
        "max_position_embeddings": values.number("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", 1),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id", 2),
        "torch_dtype": _dtype(tensors.values()),
    }


def _dtype(tensors: Iterable[GgufTensor]) -> str:
    """The float type that most of the weights have; a packed model's was bfloat16."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.kind.name] = sizes.get(tensor.kind.name, 0) + tensor.nbytes
    return _FLOATS.get(max(sizes, key=lambda kind: sizes[kind]), "bfloat16")


class _Metadata:
    """Typed access to a GGUF's entries about its architecture."""

    # What these change, no Mixtral has changed: the sums would not be the same.
    _UNCHANGED: Mapping[str, tuple[Any, ...]] = {
        **{"expert_shared_count": (0,), "expert_gating_func": (0, 1), "expert_weights_scale": (0.0, 1.0)},
        **{"logit_scale": (0.0, 1.0), "attention.scale": (0.0,), "attention.clamp_kqv": (0.0,)},
        **{"residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0), "use_parallel_residual": (False,)},
        **{"attention.causal": (True,), "rope.scaling.attn_factor": (0.0, 1.0), "leading_dense_block_count": (0,)},
    }

    def __init__(self, file: Path, metadata: Mapping[str, Any]) -> None:
        self.file = file
        self.metadata = metadata

    def check_kind(self) -> None:
        architecture = self.metadata.get("general.architecture")
        experts = self.metadata.get("llama.expert_count", 0)
        if architecture != "llama" or not experts:
            found = "a dense llama" if architecture == "llama" else f"a model of architecture {shown(architecture)}"
            raise ConvertError(
                f"{self.file} is {found}, expected a Mixtral (llama with experts).",
                code="not_mixtral",
                hint="Only Mixtral 8x7B, 8x22B and models of the same kind can be converted.",
            )
        for key, allowed in self._UNCHANGED.items():
            value = self.metadata.get(f"llama.{key}", allowed[0])
            if value not in allowed:
                raise ConvertError(
                    f"{self.file} has {shown(value)} for llama.{key}, which no Mixtral has.", code="not_mixtral"
                )

    def number(self, key: str, default: float | None = None) -> Any:
        value = self.metadata.get(f"llama.{key}")
        # Newer files may give a number for each layer; Mixtral's layers are all alike.
        if isinstance(value, tuple) and value and all(one == value[0] for one in value):
            value = value[0]
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConvertError(
                f"{self.file} has {'nothing' if value is None else shown(value)} for llama.{key}, expected a number.",
                code="bad_config",
                hint=_GET_ANOTHER,
            )
        # Stored as float32: the shortest number that is the same there, 1e-05 and not 9.99999974e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def same(self, value: int, *keys: str) -> int:
        for key in keys:
            if (other := self.number(key, value)) != value:
                raise ConvertError(
                    f"{self.file} has {shown(other)} for llama.{key}, expected its head size {value}.",
                    code="not_mixtral",
                )
        return value

    def rope_scaling(self) -> dict[str, Any] | None:
        older = self.number("rope.scale_linear", 1.0)
        kind = self.metadata.get("llama.rope.scaling.type", "none" if older == 1.0 else "linear")
        if kind not in ("none", "linear"):
            raise ConvertError(
                f"{self.file} has rope scaling {shown(kind)}, expected none or linear.", code="unsupported_rope"
            )
        factor = self.number("rope.scaling.factor", older)
        return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1.0 else None


# The tokenizer. A Mixtral's is a published one, with pieces added behind it at most.


def _write_tokenizer(file: Path, metadata: Mapping[str, Any], folder: Path) -> Path:
    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, tuple) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ConvertError(f"{file} holds no tokenizer.", code="no_tokenizer", hint=_PUT_TOKENIZER)
    published, size = _published_with(tokens)
    if published is None:
        raise ConvertError(
            f"{file} has a tokenizer of {len(tokens):,} pieces that does not begin with a published Mixtral's.",
            code="unknown_tokenizer",
            hint=_PUT_TOKENIZER,
        )
    if not isinstance(kinds, tuple) or len(kinds) != len(tokens):
        kinds = (_NORMAL,) * len(tokens)
    target = folder / "tokenizer.model"
    # A SentencePiece model is a protobuf message, in which more of a list may follow at the end.
    target.write_bytes(published.read_bytes() + b"".join(map(_piece, tokens[size:], kinds[size:])))
    Tokenizer.read(folder)
    return target


def _published_with(tokens: Sequence[str]) -> tuple[Path | None, int]:
    """The published tokenizer whose pieces `tokens` begin with, and how many it has.

    Scores are not compared: some converters leave them out."""
    for known in _PUBLISHED:
        pieces = _carried(known)
        size = pieces.vocab_size()
        if len(tokens) >= size and all(pieces.id_to_piece(n) == tokens[n] for n in range(size)):
            return _carried_file(known), size
    return None, 0


def _piece(text: str, kind: Any) -> bytes:
    """A piece as SentencePiece's protobuf message has it: text, score and kind."""
    data = text.encode("utf-8", "replace")
    message = b"\x0a" + _varint(len(data)) + data
    message += b"\x15" + struct.pack("<f", 0.0) + b"\x18" + _varint(kind if kind in _ADDED_KINDS else _UNUSED)
    return b"\x0a" + _varint(len(message)) + message


def _varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def _damaged(file: Path, what: str) -> NoReturn:
    raise ConvertError(f"{file} {what}.", code="bad_gguf", hint=_GET_ANOTHER)
