"""Several processes that `mlx.launch` started, as one model: rank 0 is asked and tells, the others follow.

The caller on rank 0 loads the model with `part` as its share and uses it as any other. The others call `follow`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..budget import Plan
from ..config import Config, MixtralError
from ..memory import chip, default_budget, machine
from ..weights import Checkpoint, Loaded, dtypes_for, load, opened_file, read_into, relief
from .layers import Joint
from .link import START_S, Link, Place, meet
from .mirror import Mirror, Notes
from .part import Part
from .split import DistributedError, Kind, Split

_SAMPLE_BYTES = 256
_MANY_TOKENS = 64
"""A pass of more leaves buffers behind that the next ones have no use for."""
GRACE_S = 2.0
"""After a rank was lost the process has so long to say so; then it is ended, whatever it waits for."""


@dataclass(frozen=True)
class Loading:
    """How the ranks load their parts: a kind of split with each rank's weight in it, and options of `weights.load`.

    `memory` is this rank's own, in bytes. Without `weights` each rank gets as much as it has memory."""

    kind: Kind = "pipeline"
    weights: tuple[float, ...] | None = None
    dtype: str = "auto"
    context: int | None = None
    kv_bits: int | None = None
    memory: int | None = None


class Ranks:
    """This process among the others; made by `together`."""

    def __init__(self, folder: Path, split: Split, loading: Loading, link: Link, group: mx.distributed.Group) -> None:
        self.folder = folder
        self.link = link
        self.joint = Joint(group)
        part = Part(split, self.joint, loading.dtype)
        self.part = _Told(part, link) if self.joint.rank == 0 else part
        self._loading = loading

    @property
    def rank(self) -> int:
        return self.joint.rank

    def follow(self) -> None:
        """Load this rank's part and do what rank 0 tells, until it leaves. Raises `MixtralError`."""
        how = self._loading
        try:
            loaded = load(
                self.folder,
                memory=how.memory,
                context=how.context,
                kv_bits=how.kv_bits,
                cancelled=lambda: self.link.is_over,
                share=self.part,
            )
            self.link.tell(_room(loaded))
            mirror = Mirror(loaded.config, getattr(mx, loaded.dtype))
            eased = relief(None)  # Where experts are streamed, these look by themselves.
            while (told := self.link.hear()) is not None:
                inputs, caches = mirror.for_pass(told)
                eased.check()
                if caches and not told["wanted"]:
                    loaded.model.model.read(inputs, caches)
                else:
                    mx.eval(loaded.model.model(inputs, caches))
                if inputs.size > _MANY_TOKENS:
                    mx.clear_cache()
        except BaseException as error:
            if self.link.is_over:
                return  # Nobody waits for this rank any more.
            raise self.link.why(error, _as_told(error, self.rank)) from None


class _Told:
    """Rank 0's part: its passes are told to the others. A `weights.Share`."""

    def __init__(self, part: Part, link: Link) -> None:
        self._part = part
        self._link = link
        self._notes = Notes()
        self._room: list[dict[str, Any]] = []
        self.dtype, self.of, self.shape, self.check = part.dtype, part.of, part.shape, part.check
        part.joint.passing = self._passing

    def join(self, model: Any, dtype: str, plan: Plan) -> Plan:
        """Also waits until the others are ready, and asks no more of them than they have room for."""
        plan = self._part.join(model, dtype, plan)
        self._room = self._room or self._link.hear_all()
        return _for_all(plan, self._room, model.args, dtype)

    def fill(self, caches: Sequence[Any], batch: int, length: int) -> None:
        """Have the others fill theirs as long as `caches`, new ones, are being filled here, to measure what follows."""
        self._notes.fill(caches, batch, length)

    def when_lost(self, call: Callable[[MixtralError], object]) -> None:
        """Have what cannot be answered any more ended with an error, should another rank be lost."""
        before = self._link.on_lost

        def both(error: DistributedError) -> None:
            call(error)
            before(error)

        self._link.on_lost = both

    @contextmanager
    def _passing(self, inputs: mx.array, cache: Sequence[Any] | None, wanted: bool) -> Iterator[None]:
        if self._link.lost:
            raise self._link.lost
        self._link.tell({**self._notes.of_pass(inputs, cache), "wanted": wanted})
        try:
            yield
        except BaseException as error:
            raise self._link.why(error, _as_told(error, 0)) from None


def _as_told(error: BaseException, rank: int) -> DistributedError:
    hint = getattr(error, "hint", "")
    code = error.code if isinstance(error, MixtralError) else "rank_failed"
    if isinstance(error, DistributedError) and str(error).startswith("Rank "):
        return error
    return DistributedError(f"Rank {rank}: {str(error) or type(error).__name__}", code=code, hint=hint)


# How much there is room for.


def _kv_bytes(plan: Plan) -> int:
    """What keys and values may take, as the engine has it."""
    spare = max(plan.budget_bytes - plan.needed_bytes, 0) if plan.mode == "resident" else 0
    return plan.parts["kv cache"] + spare


def _room(loaded: Loaded) -> dict[str, Any]:
    plan, per_token = loaded.plan, max(loaded.config.kv_nbytes_per_token(loaded.dtype), 1)
    return {
        "context": plan.context,
        "chunk": plan.chunk_tokens,
        "kv_tokens": _kv_bytes(plan) // per_token,
        "held_bytes": loaded.weights_bytes,
        "read_bytes": loaded.read_bytes,
    }


def _for_all(plan: Plan, rooms: Sequence[Mapping[str, Any]], config: Config, dtype: str) -> Plan:
    """`plan` with no more tokens than there is room for everywhere."""
    per_token = max(config.kv_nbytes_per_token(dtype), 1)
    most = min([_kv_bytes(plan), *(room["kv_tokens"] * per_token for room in rooms)])
    context = min(plan.context, *(room["context"] for room in rooms))
    chunk = min(plan.chunk_tokens, *(room["chunk"] for room in rooms))
    kv = min(plan.parts["kv cache"], most)
    parts = {**plan.parts, "kv cache": kv}
    budget = sum(parts.values()) + most - kv if plan.mode == "resident" else plan.budget_bytes
    return replace(plan, context=context, chunk_tokens=chunk, parts=parts, budget_bytes=min(budget, plan.budget_bytes))


# Coming together.


@contextmanager
def together(
    folder: Path, loading: Loading, place: Place, *, on_lost: Callable[[DistributedError], object]
) -> Iterator[Ranks]:
    """Meet the other ranks, and leave them in good order at the end. Raises `MixtralError`.

    When another rank is lost, requests end with an error, `on_lost` is called with it, and the process ends: what waits
    in a sum with a rank that is gone cannot be woken."""
    checkpoint = Checkpoint.open(folder)
    Split.of(loading.kind, place.size, loading.weights).portions(checkpoint.config)
    link = meet(place, about(checkpoint, loading))
    terminal = _terminal_state()

    def end(error: DistributedError) -> None:
        deadline = time.monotonic() + GRACE_S
        with suppress(Exception):
            on_lost(error)
        time.sleep(max(deadline - time.monotonic(), 0))
        _restore(terminal)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(1)

    link.on_lost = end
    try:
        loading = agreed(link, loading, dtypes_for(loading.dtype, checkpoint)[0])
        split = Split.of(loading.kind, place.size, loading.weights)
        yield Ranks(folder, split, loading, link, _group(link, place))
    except MixtralError:
        if link.lost:
            # What is raised is what `on_lost` was told: one of them is enough.
            threading.Event().wait(2 * GRACE_S)
        raise
    finally:
        link.close()


def agreed(link: Link, loading: Loading, dtype: str) -> Loading:
    """`loading` with one dtype for all ranks, and weights by memory where it has none. Call it on every rank.

    `dtype` is what this rank would compute in by itself: M1 and M2 have float16 for what is bfloat16 on later chips."""
    own = {"budget_bytes": loading.memory or default_budget(machine(ask_metal=True)), "dtype": dtype}
    if link.place.rank:
        link.tell(own)
        if (told := link.hear()) is None:
            raise DistributedError("Rank 0 has left before anything was loaded.", code="rank_lost")
    else:
        each = [own, *link.hear_all()]
        dtypes = {said["dtype"] for said in each}
        common = dtype if len(dtypes) == 1 else "float32" if "float32" in dtypes else "float16"
        told = {"budgets": [max(said["budget_bytes"], 1) for said in each], "dtype": common}
        link.tell(told)
    return replace(loading, weights=loading.weights or tuple(told["budgets"]), dtype=told["dtype"])


def _group(link: Link, place: Place) -> mx.distributed.Group:
    """MLX's own connections, which wait for ever for a rank that does not come."""
    what = f"MLX's {place.backend} has not come together"
    met = threading.Event()

    def watch() -> None:
        if not met.wait(START_S):
            link.lose(
                DistributedError(
                    f"{what}.",
                    code="rank_missing",
                    hint="Every machine must reach the next one in the hostfile, in the way given there.",
                )
            )

    threading.Thread(target=watch, name="mixtral-meet", daemon=True).start()
    try:
        group = mx.distributed.init(strict=True, backend=place.backend)
    except RuntimeError as error:
        broken = DistributedError(f"{what}: {error}", code="rank_missing")
        link.lose(broken)
        raise broken from None
    finally:
        met.set()
    assert (group.rank(), group.size()) == (place.rank, place.size)
    return group


def about(checkpoint: Checkpoint, loading: Loading) -> dict[str, str]:
    """What must be the same on all ranks, by name."""
    config = checkpoint.config
    packing = config.quantization.to_dict() if config.quantization else {}
    numbers = {name: value for name, value in config.to_dict().items() if not name.startswith("quantization")}
    weights = ", ".join(f"{weight:g}" for weight in loading.weights or ()) or "by memory"
    # Where every rank routes by itself, all must choose the same experts, so their last digits must be the same.
    alike = {} if loading.kind == "pipeline" else {"chip": chip()}
    return {
        "version": f"{__version__} with MLX {_mlx_version()}",
        "split": f"{loading.kind} {weights}",
        "settings": f"context {loading.context}, kv_bits {loading.kv_bits}",
        "dtype": loading.dtype,
        "recipe": f"{packing.get('bits', 'no')} bits {_digest(packing)}",
        "model": f"{config.name} {_digest(numbers)} {_content(checkpoint)}",
        **alike,
    }


def _mlx_version() -> str:
    return str(getattr(mx, "__version__", ""))


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _content(checkpoint: Checkpoint) -> str:
    """A hash of every tensor's form and of some bytes from its middle, however the files are cut."""
    digest = hashlib.sha256()
    for tensor in checkpoint.tensors:
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
    spans = [tensor.spans[len(tensor.spans) // 2] for tensor in checkpoint.tensors]
    for file in sorted({span.file for span in spans}):
        with opened_file(file) as fd:
            for span in (span for span in spans if span.file == file):
                sample = bytearray(min(_SAMPLE_BYTES, span.nbytes))
                read_into(file, fd, memoryview(sample), span.offset + (span.nbytes - len(sample)) // 2)
                digest.update(sample)
    return digest.hexdigest()[:16]


def _terminal_state() -> Any:
    with suppress(Exception):
        import termios

        return termios.tcgetattr(sys.stdin.fileno())
    return None


def _restore(state: Any) -> None:
    with suppress(Exception):
        import termios

        if state:
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, state)
