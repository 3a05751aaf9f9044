"""Folder ↔ model: find a checkpoint, check it, load it, write one.

One strict gate stands before any byte is used: file headers are parsed here by the rules of the safetensors format, and
names and shapes must be exactly those the configuration implies. Then each tensor goes from disk into MLX's own memory
once; experts that have no room in memory are left to `experts`. Knows nothing of prompts."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import struct
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import cpu
from .budget import Footprint, Plan, fit
from .config import Config, MixtralError, TensorSpec, exists, parse_json, read_json, shown
from .memory import Relief, Step, activation_dtype, allocation_streams, default_budget, machine, pressure

if TYPE_CHECKING:
    from .experts import StackedTensor, Streaming
    from .model import Model

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

# 8x22B, an expert at a time and quantized, has 4,800 tensors and 0.6 MB of headers.
_MAX_HEADER_BYTES = 4 << 20
_MAX_TENSORS = 1 << 14
_MAX_SHARD_BYTES = 5 << 30
_READERS = 4
_READ_BYTES = 16 << 20
_ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
MLX_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}
_KINDS = {"F32": "float", "F16": "float", "BF16": "float", "U32": "U32", "U8": "U8"}
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_EXPERT = re.compile(
    r"(model\.layers\.\d+\.block_sparse_moe)\.experts\.(0|[1-9][0-9]{0,3})\.(w[123])\.(weight|scales|biases)"
)
_EXPERTS_TENSOR = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.switch_mlp\.(.+)")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_INDEX = "model.safetensors.index.json"
_DAMAGED = "The file is damaged or was not fetched whole. Fetch it again."


class WeightsError(MixtralError):
    """A checkpoint that cannot be found, is not what its configuration says, or cannot be read."""


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes are: `nbytes` from `offset` in `file`, row-major, `dtype` in safetensors' names.

    A part of a tensor may lie in pieces of `piece_bytes`, one every `stride_bytes`; 0 is a single piece."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    piece_bytes: int = 0
    stride_bytes: int = 0

    def part(self, axis: int, start: int, stop: int) -> Span:
        """What lies between `start` and `stop` along `axis`. The span is to be of one piece."""
        assert not self.piece_bytes
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        row = self.nbytes // math.prod(self.shape[: axis + 1])
        nbytes = math.prod(shape[: axis + 1]) * row
        single = math.prod(shape[:axis]) == 1
        return Span(
            self.file,
            self.dtype,
            shape,
            self.offset + start * row,
            nbytes,
            0 if single else (stop - start) * row,
            0 if single else self.shape[axis] * row,
        )


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model and the spans it is made of: one, or an expert each, to be stacked."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    spans: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.spans)

    @property
    def is_experts(self) -> bool:
        """Whether it holds something of all experts of a layer."""
        return ".switch_mlp." in self.name

    def dtype_as(self, dtype: str | None) -> str:
        """Its dtype in memory, in safetensors' names, with floats held as `dtype`; None leaves it as it is."""
        if dtype is None or _KINDS[self.dtype] != "float":
            return self.dtype
        return next(name for name, ours in _DTYPE_NAMES.items() if ours == dtype)

    def nbytes_as(self, dtype: str | None) -> int:
        """Its bytes in memory with floats held as `dtype`; None leaves it as it is."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype_as(dtype)]


@dataclass(frozen=True)
class Checkpoint:
    """A folder that passed the gate: its configuration and every tensor the model needs, in the order of use."""

    folder: Path
    config: Config
    tensors: tuple[Tensor, ...]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Check `folder` without reading any weights; raises `ConfigError` or `WeightsError`."""
        config = Config.read(folder)
        pieces = _by_destination(_spans(folder), config)
        tensors = tuple(_assemble(name, spec, pieces) for name, spec in _expected(config, pieces).items())
        if pieces:
            raise WeightsError(
                f"{folder} holds {len(pieces)} tensors that its configuration does not imply, as {shown(min(pieces))}.",
                code="unexpected_tensor",
                hint="config.json and the weights are not of the same model.",
            )
        return cls(folder, config, tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def nbytes_as(self, dtype: str | None) -> int:
        """Bytes in memory with all floats held as `dtype`; None leaves each as it is."""
        return sum(tensor.nbytes_as(dtype) for tensor in self.tensors)

    @property
    def has_float_experts(self) -> bool:
        """Whether some layer's experts are not quantized."""
        return any(t.is_experts and t.name.endswith(".weight") and t.dtype != "U32" for t in self.tensors)

    @property
    def dtype(self) -> str:
        """The dtype the checkpoint computes in: that of its last norm."""
        return next(_DTYPE_NAMES[tensor.dtype] for tensor in self.tensors if tensor.name == "model.norm.weight")


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, with its configuration, the folder it came from and what loading took.

    Where it is one machine's share of a model, so is all else. `plan` says who got how much memory. `streaming` is
    there when experts are read as they are needed. `note` says what would make it faster, if anything. `read_bytes`
    came from the disk before it was ready."""

    model: Model
    config: Config
    folder: Path
    dtype: str
    weights_bytes: int
    seconds: float
    plan: Plan
    streaming: Streaming | None = None
    note: str = ""
    read_bytes: int = 0


class Share(Protocol):
    """The part of a model that one of several machines holds, and how it works together with the others."""

    @property
    def dtype(self) -> str:
        """What all of them compute in, whatever this one would by itself; auto where that is not said."""

    def of(self, checkpoint: Checkpoint) -> Checkpoint:
        """The tensors of this part, and a configuration that describes it."""

    def shape(self, model: Model) -> None:
        """Give a model made from that configuration, with nothing in it yet, exactly the parameters of this part."""

    def check(self, plan: Plan) -> None:
        """Raise `MixtralError` where this part cannot run so."""

    def join(self, model: Model, dtype: str, plan: Plan) -> Plan:
        """Have a loaded part work with the others; the plan that all of them have room for."""

    def when_lost(self, call: Callable[[MixtralError], object]) -> None:
        """Have `call` called, on any thread, when the others are lost and nothing can be computed any more."""


def locate(
    model: str | Path | None,
    *,
    offline: bool = False,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Path:
    """The folder of `model`: a path, a Hugging Face repository (fetched unless `offline`), or None for the demo.

    What of a repository is not in the Hugging Face cache is fetched, the weights only of a Mixtral and if the disk has
    room for them; `on_progress` and `cancelled` are for that. After an error or a kill the next call goes on. Raises
    `MixtralError`."""
    if model is None:
        return Path(__file__).parent / "demo" / "model"
    folder = Path(model)
    with suppress(OSError, RuntimeError):  # A name too long for a path, or a ~ that is nobody's home.
        folder = folder.expanduser()
        if folder.is_dir():
            return folder
        if folder.exists():
            raise WeightsError(
                f"{folder} is a file, expected a folder with a Mixtral checkpoint in it.", code="not_a_folder"
            )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) and not str(model).startswith("."):
        return _in_cache(str(model), offline, on_progress, cancelled)
    raise WeightsError(
        f"There is no folder {folder}.",
        code="no_model",
        hint="Give a checkpoint folder, or a Hugging Face repository such as mistralai/Mixtral-8x7B-Instruct-v0.1.",
    )


def _in_cache(repo: str, offline: bool, on_progress: Progress | None, cancelled: Callable[[], bool] | None) -> Path:
    """The folder of a repository in the Hugging Face cache, complete."""
    # Here, since most models are folders, and huggingface_hub takes long to import.
    from .hub.patience import HubError
    from .hub.snapshot import snapshot

    try:
        return snapshot(repo, _weights_of, offline=offline, on_progress=on_progress, cancelled=cancelled)
    except HubError as error:
        if error.code not in ("hub_not_found", "bad_repository", "offline"):
            raise
        # It may have been meant as a folder.
        raise WeightsError(f"There is no folder {repo} here. {error}", code="no_model", hint=error.hint) from None


def _weights_of(folder: Path) -> Collection[str] | None:
    """The files of weights that belong to the configuration in `folder`, a Mixtral's, as far as an index lists them."""
    Config.read(folder)
    return set(_read_index(index).values()) if exists(index := folder / _INDEX) else None


def load(
    folder: str | Path,
    *,
    dtype: str = "auto",
    memory: int | Plan | None = None,
    context: int | None = None,
    kv_bits: int | None = None,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    share: Share | None = None,
) -> Loaded:
    """Load a checkpoint folder into memory, or as much of it as a budget has room for.

    `dtype` is what to compute in: "bfloat16", "float16", "float32", or "auto" (the checkpoint's own, float16 on M1
    and M2, float32 on MLX's CPU backend). Takes our folders, mlx-community's, older unstacked ones and plain Hugging
    Face ones. `memory` is what the whole process may use, in bytes, with a cache of `context` tokens in `kv_bits`; None
    is what the machine can spare, a plan is taken as it is. What does not fit is streamed. `cancelled` is asked
    between reads; when it says yes, `WeightsError` with code "cancelled" is raised. With a `share`, only that part of
    the model is read, and its dtype goes before `dtype`. Run the model on this thread, with the context and the prompt
    chunks of its `plan`: those of `Conversation` may be larger."""
    start = time.perf_counter()
    if share and share.dtype != "auto":
        dtype = share.dtype
    if cpu.is_backend():
        mx.disable_compile()  # There it would call a C++ compiler, for a second and a half and no gain.
    if dtype != "auto" and dtype not in _DTYPE_NAMES.values():
        raise WeightsError(
            f"The dtype is {dtype!r}, expected auto, {', '.join(_DTYPE_NAMES.values())}.", code="unsupported_dtype"
        )
    folder = Path(folder)
    whole = Checkpoint.open(folder)
    target, cast_to = dtypes_for(dtype, whole)
    checkpoint = share.of(whole) if share else whole
    plan = memory if isinstance(memory, Plan) else _plan(checkpoint, target, cast_to, memory, context, kv_bits)
    if share:
        share.check(plan)
    mx.set_cache_limit(plan.cache_limit_bytes)
    tensors = [tensor for tensor in checkpoint.tensors if plan.mode == "resident" or not tensor.is_experts]
    slots_bytes = plan.parts["experts"] if plan.mode == "streamed" else 0
    reader = _Reader(sum(tensor.nbytes for tensor in tensors) + slots_bytes, on_progress, cancelled)
    arrays, streaming = reader.read(tensors, cast_to), None
    if plan.mode == "streamed":
        from .experts import Streaming

        streaming = Streaming(stored_experts(checkpoint, cast_to), plan.slots, on_slots=reader.note)
        arrays += streaming.arrays()
    model = _built(checkpoint.config, arrays, streaming, share)
    if target == "float32" and cpu.is_available():
        cpu.accelerate(model)
    if share:
        plan = share.join(model, target, plan)
    note = cpu.MISSING if cpu.is_backend() and not cpu.is_available() else ""
    weights_bytes = sum(array.nbytes for _, array in arrays)
    seconds = time.perf_counter() - start
    read_bytes = sum(tensor.nbytes for tensor in tensors)
    return Loaded(model, checkpoint.config, folder, target, weights_bytes, seconds, plan, streaming, note, read_bytes)


def _built(
    config: Config, arrays: list[tuple[str, mx.array]], streaming: Streaming | None, share: Share | None
) -> Model:
    """The model with these parameters; its experts as far as `streaming` has slots for them, if they are streamed."""
    # Here, since it brings mlx-lm, which takes seconds to import and converting can do without.
    from .model import Model, resident_experts

    names = {name for name, _ in arrays}
    # The model's own initial weights stay unevaluated: they never take memory.
    model = Model(config, streaming.experts if streaming else resident_experts)
    if share:
        share.shape(model)
    quantize(model, config, lambda path: f"{path}.scales" in names)
    model.load_weights(arrays, strict=True)
    model.eval()
    if streaming:
        streaming.attach(model)
        streaming.before_step = relief(streaming).check
    return model


def footprint(checkpoint: Checkpoint, dtype: str, cast_to: str | None, kv_bits: int | None = None) -> Footprint:
    """What `checkpoint` asks of memory when it computes in `dtype` with floats held as `cast_to` (None: as stored)."""
    sizes = {tensor.name: tensor.nbytes_as(cast_to) for tensor in checkpoint.tensors}
    return Footprint.of(checkpoint.config, dtype, kv_bits, sizes)


def _plan(
    checkpoint: Checkpoint,
    dtype: str,
    cast_to: str | None,
    memory: int | None,
    context: int | None,
    kv_bits: int | None,
) -> Plan:
    asked = footprint(checkpoint, dtype, cast_to, kv_bits)
    return fit(asked, default_budget(machine(ask_metal=True)) if memory is None else memory, context=context)


def relief(streaming: Streaming | None, *between: Step, pressure: Callable[[], int] = pressure) -> Relief:
    """What is given up when the machine runs short of memory: MLX's cache, what is `between`, then expert slots."""
    slots = [Step("a slot per layer", streaming.give_up, streaming.take_back)] if streaming else []
    return Relief([*between, *slots], clear=mx.clear_cache, pressure=pressure)


def stored_experts(checkpoint: Checkpoint, dtype: str | None) -> list[list[StackedTensor]]:
    """For each layer the tensors an expert is made of, and where they are stored; floats to be held as `dtype`."""
    from .experts import StackedTensor, WeightFile, converter

    files: dict[Path, WeightFile] = {}
    layers: list[list[StackedTensor]] = [[] for _ in range(checkpoint.config.num_hidden_layers)]
    for tensor in (tensor for tensor in checkpoint.tensors if tensor.is_experts):
        number, name = _EXPERTS_TENSOR.findall(tensor.name)[0]
        held = tensor.dtype_as(dtype)
        size = tensor.nbytes // tensor.shape[0]
        places = []
        for expert in range(tensor.shape[0]):
            stacked = len(tensor.spans) == 1
            span = tensor.spans[0 if stacked else expert]
            if span.file not in files:
                files[span.file] = WeightFile(span.file)
            places.append((files[span.file], span.offset + (expert * size if stacked else 0)))
        layers[int(number)].append(
            StackedTensor(name, tensor.shape[1:], MLX_DTYPES[held], tuple(places), size, converter(tensor.dtype, held))
        )
    return layers


def dtypes_for(asked: str, checkpoint: Checkpoint) -> tuple[str, str | None]:
    """What to compute in, and what to cast all floats to (None: each stays as it is)."""
    if cpu.is_backend():
        # There half types cost more than they save: what computes in them there is scalar code.
        if asked in ("auto", "float32"):
            return "float32", None if cpu.is_available() else "float32"
        if checkpoint.has_float_experts:  # MLX multiplies these in float32 only.
            raise WeightsError(
                f"{checkpoint.folder} has unquantized experts, which on the CPU run in float32, not in {asked}.",
                code="unsupported_dtype",
                hint="Leave the dtype out, or use a quantized checkpoint.",
            )
    target = activation_dtype(asked, checkpoint.dtype)
    # Nothing is cast unless another dtype was chosen: a checkpoint may keep some tensors wider on purpose.
    return target, None if target == checkpoint.dtype and asked == "auto" else target


def read_tensors(
    tensors: Sequence[Tensor],
    dtype: str | None,
    *,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[tuple[str, mx.array]]:
    """Read `tensors` of a checked checkpoint; floats are cast to `dtype`, or kept as they are where it is None."""
    reader = _Reader(sum(tensor.nbytes for tensor in tensors), on_progress, cancelled)
    return reader.read(tensors, dtype)


def save(folder: Path, model: nn.Module, config: Config) -> None:
    """Write `model` as a checkpoint folder, which appears whole or not at all; raises `WeightsError`."""
    if folder.exists():
        raise WeightsError(f"{folder} exists already.", code="exists", hint="Choose another name or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        _write_folder(partial, dict(tree_flatten(model.parameters())), config)
        partial.rename(folder)
        _fsync(folder.parent)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{folder} could not be written: {error}.", code="write_failed") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_folder(folder: Path, arrays: dict[str, mx.array], config: Config) -> None:
    weight_map: dict[str, str] = {}
    for file, names in shards({name: array.nbytes for name, array in arrays.items()}).items():
        mx.save_safetensors(str(folder / file), {name: arrays[name] for name in names}, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
    folder.chmod(0o755)
    for path in [*folder.iterdir(), folder]:
        _fsync(path)


def shards(nbytes: Mapping[str, int]) -> dict[str, list[str]]:
    """File name → the tensors it is to hold: in the order of `nbytes`, their sizes, and at most 5 GiB in a file."""
    groups: list[list[str]] = []
    room = 0
    for name, size in nbytes.items():
        if not groups or size > room:
            groups.append([])
            room = _MAX_SHARD_BYTES
        groups[-1].append(name)
        room -= size
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": names for n, names in enumerate(groups, 1)}


def quantize(model: Model, config: Config, has_scales: Callable[[str], bool] = lambda path: True) -> None:
    """Quantize `model`'s matrices as `config` says; see `Config.packing` for `has_scales`."""

    def packing_of(path: str, module: nn.Module) -> bool | dict[str, Any]:
        packing = config.packing(path, has_scales) if hasattr(module, "to_quantized") else None
        return dict(vars(packing)) if packing else False

    if config.quantization:
        nn.quantize(model, class_predicate=packing_of)


def read_header(file: Path, fd: int) -> dict[str, Span]:
    """Parse a safetensors file's header as strictly as the format is written down; raises `WeightsError`.

    The tensors must cover the file's data exactly, without overlap, hole or trailing bytes."""
    size = os.fstat(fd).st_size
    if size < 8:
        raise _damaged(file, f"is {size} bytes long")
    (length,) = struct.unpack("<Q", _pread(file, fd, 8, 0))
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise _damaged(file, f"claims a header of {length:,} bytes in a file of {size:,}")
    try:
        header = parse_json(_pread(file, fd, length, 8).decode(), object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise _damaged(file, f"has a header that is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(file, "has a header that is no JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # MLX itself writes null where it has none.
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "has metadata that is not text")
    if len(header) > _MAX_TENSORS:
        raise _damaged(file, f"lists {len(header):,} tensors, more than any Mixtral has")
    spans = {name: _span(file, name, entry, start=8 + length) for name, entry in header.items()}
    end = 8 + length
    for span in sorted(spans.values(), key=lambda span: (span.offset, span.nbytes)):
        if span.offset != end:
            raise _damaged(file, f"has tensors that overlap or leave a hole at byte {min(end, span.offset):,}")
        end += span.nbytes
    if end != size:
        raise _damaged(file, f"is {size:,} bytes long, its tensors end at {end:,}")
    return spans


def _span(file: Path, name: str, entry: Any, *, start: int) -> Span:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"describes tensor {name[:80]!r} in no known form")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _damaged(file, f"has tensor {name[:80]!r} of unknown dtype {str(dtype)[:40]!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise _damaged(file, f"has tensor {name[:80]!r} with an impossible shape or position")
    nbytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise _damaged(
            file, f"gives tensor {name[:80]!r} {offsets[1] - offsets[0]:,} bytes, its shape needs {nbytes:,}"
        )
    return Span(file, dtype, tuple(shape), start + offsets[0], nbytes)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key stands twice")
    # JSON can spell half a character, which no text may hold.
    "".join(text for pair in pairs for text in pair if isinstance(text, str)).encode()
    return unique


def _spans(folder: Path) -> dict[str, Span]:
    """Every tensor in the folder's safetensors files, which must be those its index lists, if it has one."""
    index_file = folder / _INDEX
    index = _read_index(index_file) if exists(index_file) else None
    files = sorted(set(index.values())) if index else _weight_files(folder)
    spans: dict[str, Span] = {}
    for name in files:
        with opened_file(folder / name) as fd:
            found = read_header(folder / name, fd)
        if twice := spans.keys() & found.keys():
            raise WeightsError(f"{folder} holds tensor {shown(min(twice))} twice.", code="duplicate_tensor")
        spans |= found
        if len(spans) > _MAX_TENSORS:
            raise _damaged(folder, f"lists more than {_MAX_TENSORS:,} tensors, more than any Mixtral has")
    if index is not None:
        wrong = {
            name
            for name in index.keys() | spans.keys()
            if name not in spans or spans[name].file.name != index.get(name)
        }
        if wrong:
            raise WeightsError(
                f"{index_file} and the files it lists disagree about tensor {shown(min(wrong))}.",
                code="index_mismatch",
                hint="Fetch index and weights again from one place.",
            )
    return spans


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path} has no weight_map.", code="bad_index", hint=_DAMAGED)
    for file in weight_map.values():
        # A plain name only: whatever the index says, nothing outside the folder is opened.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]{0,250}\.safetensors", file, re.ASCII):
            raise WeightsError(
                f"{path} lists the file {str(file)[:80]!r}, expected a plain name ending in .safetensors.",
                code="bad_index",
            )
    return weight_map


def _weight_files(folder: Path) -> list[str]:
    for pattern in ("model*.safetensors", "weights*.safetensors"):
        if files := sorted(path.name for path in folder.glob(pattern)):
            return files
    try:
        others = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise WeightsError(f"{folder} cannot be read: {error.strerror}.", code="unreadable") from None
    raise WeightsError(
        f"{folder} holds no model*.safetensors (found: {', '.join(map(shown, others[:6])) or 'nothing'}).",
        code="no_weights",
        hint="Only safetensors checkpoints in the Hugging Face or MLX layout can be loaded.",
    )


_Pieces = dict[str, dict[int | None, Span]]
"""Tensor name → its spans by expert, or by None where the tensor lies in one piece."""


def _by_destination(spans: dict[str, Span], config: Config) -> _Pieces:
    pieces: _Pieces = {}
    for name, span in spans.items():
        if name.endswith(".rotary_emb.inv_freq") or (config.tie_word_embeddings and name.startswith("lm_head.")):
            continue  # Old checkpoints store what the configuration already says.
        expert = None
        if match := _EXPERT.fullmatch(name):
            moe, number, matrix, part = match.groups()
            name, expert = f"{moe}.switch_mlp.{_PROJECTIONS[matrix]}.{part}", int(number)
        pieces.setdefault(name, {})[expert] = span
    return pieces


def _expected(config: Config, pieces: _Pieces) -> dict[str, TensorSpec]:
    return config.tensors(has_scales=lambda path: f"{path}.scales" in pieces)


def _assemble(name: str, spec: TensorSpec, pieces: _Pieces) -> Tensor:
    """Take from `pieces` what makes up tensor `name`, which must be exactly what `spec` asks for."""
    found = pieces.pop(name, None)
    if found is None:
        raise WeightsError(
            f"Tensor {name} is missing.",
            code="missing_tensor",
            hint="Some of the checkpoint's files are missing, or config.json is of another model.",
        )
    stacked = None not in found
    wanted = list(range(spec.shape[0])) if stacked else [None]
    if sorted(found, key=str) != sorted(wanted, key=str):
        raise WeightsError(
            f"Tensor {name} should have {len(wanted)} experts, found {len(found)}.", code="missing_tensor"
        )
    spans = tuple(found[key] for key in wanted)
    shape, dtype = spec.shape[1:] if stacked else spec.shape, spans[0].dtype
    for span in spans:
        if span.shape != shape or span.dtype != dtype or _KINDS.get(dtype) != spec.kind:
            raise WeightsError(
                f"Tensor {name} in {span.file.name} is {span.dtype} {list(span.shape)}, "
                f"expected {spec.kind} {list(shape)}.",
                code="wrong_shape",
                hint="config.json and the weights are not of the same model.",
            )
    return Tensor(name, spec.shape, dtype, spans)


class _Reader:
    """Reads tensors into MLX arrays from several threads, telling how far it is. Arrays are made on one thread only."""

    def __init__(self, total: int, on_progress: Progress | None, cancelled: Callable[[], bool] | None) -> None:
        self.total = total
        self.on_progress = on_progress or (lambda done, total: None)
        self.cancelled = cancelled or (lambda: False)
        self.done = 0
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def read(self, tensors: Sequence[Tensor], dtype: str | None) -> list[tuple[str, mx.array]]:
        """Every tensor by name; floats as `dtype`, or as they are in the file."""
        arrays = []
        with ExitStack() as opened, ThreadPoolExecutor(_READERS) as pool:
            files = sorted({span.file for tensor in tensors for span in tensor.spans})
            fds = {file: opened.enter_context(opened_file(file)) for file in files}
            pending: list[Future[None]] = []
            try:
                for tensor, array in _allocated(tensors, dtype):
                    if array.dtype == MLX_DTYPES[tensor.dtype]:
                        pending += self._submit(pool, fds, tensor.spans, bytes_of(array))
                    else:
                        self._read_cast(pool, fds, tensor, array)
                    arrays.append((tensor.name, array))
                    self._report()
                self._finish(pending)
            except BaseException:
                self.stopped.set()
                raise
        return arrays

    def note(self, nbytes: int) -> None:
        """So many bytes more have been made ready."""
        self.done += nbytes
        self._report()

    def _read_cast(self, pool: ThreadPoolExecutor, fds: dict[Path, int], tensor: Tensor, array: mx.array) -> None:
        """A span at a time, so that no more than one is ever held twice."""
        view = bytes_of(array)
        size = view.nbytes // len(tensor.spans)
        for n, span in enumerate(tensor.spans):
            scratch = mx.zeros(span.shape, MLX_DTYPES[span.dtype])
            mx.eval(scratch)
            self._finish(self._submit(pool, fds, (span,), bytes_of(scratch)))
            converted = scratch.astype(array.dtype)
            mx.eval(converted)
            view[n * size : (n + 1) * size] = bytes_of(converted)

    def _submit(
        self, pool: ThreadPoolExecutor, fds: dict[Path, int], spans: tuple[Span, ...], view: memoryview
    ) -> Iterator[Future[None]]:
        start = 0
        for span in spans:
            # As many whole pieces at a time as a read is to have, or so much of a single one.
            piece, stride = span.piece_bytes or 1, span.stride_bytes or 1
            step = max(_READ_BYTES // piece, 1) * piece
            for at in range(0, span.nbytes, step):
                part = view[start + at : start + min(at + step, span.nbytes)]
                offset = span.offset + at // piece * stride
                yield pool.submit(self._read_part, span.file, fds[span.file], part, offset, span)
            start += span.nbytes

    def _read_part(self, file: Path, fd: int, part: memoryview, offset: int, span: Span) -> None:
        if self.stopped.is_set():
            return
        piece = span.piece_bytes or part.nbytes
        for n, at in enumerate(range(0, part.nbytes, piece)):
            read_into(file, fd, part[at : at + piece], offset + n * span.stride_bytes)
        with self.lock:
            self.done += part.nbytes

    def _finish(self, pending: Iterable[Future[None]]) -> None:
        left = set(pending)
        while left:
            finished, left = wait(left, timeout=0.1)
            for future in finished:
                future.result()
            self._report()

    def _report(self) -> None:
        if self.cancelled():
            raise WeightsError("Loading was cancelled.", code="cancelled")
        self.on_progress(self.done, self.total)


def read_into(file: Path, fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` from `offset` of an open file; raises `WeightsError` naming the file when it cannot."""
    while view:
        try:
            count = os.preadv(fd, [view], offset)
        except OSError as error:
            raise WeightsError(f"{file} cannot be read: {error.strerror}.", code="read_failed") from None
        if count == 0:
            raise WeightsError(f"{file} became shorter while it was read.", code="read_failed", hint=_DAMAGED)
        view, offset = view[count:], offset + count


def bytes_of(array: mx.array) -> memoryview:
    """The memory of an evaluated array, writable where it is."""
    return memoryview(cast(Any, array)).cast("B")


def _allocated(tensors: Sequence[Tensor], dtype: str | None) -> Iterator[tuple[Tensor, mx.array]]:
    """Each tensor with an evaluated array for it; the next two are being made meanwhile.

    First touch of memory takes as long as reading into it, so it is shared between cores as well."""
    streams = allocation_streams()
    ahead: deque[tuple[Tensor, mx.array]] = deque()
    for n, tensor in enumerate(tensors):
        array = mx.zeros(tensor.shape, MLX_DTYPES[tensor.dtype_as(dtype)], stream=streams[n % 2])
        mx.async_eval(array)
        ahead.append((tensor, array))
        if len(ahead) > 2:
            yield _evaluated(*ahead.popleft())
    while ahead:
        yield _evaluated(*ahead.popleft())


def _evaluated(tensor: Tensor, array: mx.array) -> tuple[Tensor, mx.array]:
    mx.eval(array)
    return tensor, array


@contextmanager
def opened_file(file: Path) -> Iterator[int]:
    """A regular file open for reading, as a descriptor; raises `WeightsError` for anything else."""
    try:
        # Not blocking, so that a pipe with a weight file's name cannot hang the load.
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        code = "missing_file" if isinstance(error, FileNotFoundError) else "unreadable"
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"{file} cannot be opened: {reason}.", code=code, hint=_DAMAGED) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise WeightsError(f"{file} is not a regular file.", code="unreadable")
        yield fd
    finally:
        os.close(fd)


def _pread(file: Path, fd: int, size: int, offset: int) -> bytes:
    buffer = bytearray(size)
    read_into(file, fd, memoryview(buffer), offset)
    return bytes(buffer)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _damaged(file: Path, what: str) -> WeightsError:
    return WeightsError(f"{file} {what}.", code="bad_safetensors", hint=_DAMAGED)
