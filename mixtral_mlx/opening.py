"""Opening a model from a command line: which one and how, with a bar, and with what there is to say about it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Config, MixtralError
from .session import ChatError, Ready, shown_bytes
from .terminal import Bar, CtrlC, notice

if TYPE_CHECKING:
    from .distributed.link import Place
    from .distributed.split import Kind
    from .generate import Conversation
    from .prompt import Tokenizer
    from .weights import Loaded, Share

LONG_PROMPT = 512
"""Tokens of a prompt that take long enough to read that a bar says so."""


@dataclass(frozen=True)
class ModelChoice:
    """Which model to open and how; a `name` of None is the built-in demo, `wired` one of `memory.WIRINGS`.

    `parallel` and `split` are how several machines share it, `share` is what this one has then; see `joined`."""

    name: str | None = None
    dtype: str = "auto"
    kv_bits: int | None = None
    context: int | None = None
    memory_bytes: int | None = None
    wired: str = "off"
    offline: bool = False
    quiet: bool = False
    parallel: Kind | None = None
    split: tuple[float, ...] | None = None
    share: Share | None = None


@contextmanager
def wired(choice: ModelChoice) -> Iterator[None]:
    """Keep the memory of whatever model is in use wired while entered, if `choice` asks for it: around all of its use.

    Raises `MachineError`, before anything is loaded."""
    if choice.wired == "off":
        yield
        return
    with notice("Starting MLX …", quiet=choice.quiet):
        from .memory import default_budget, machine, wire

        budget = choice.memory_bytes or default_budget(machine(ask_metal=True))
    with wire(choice.wired, budget):
        yield


@contextmanager
def joined(choice: ModelChoice, on_lost: Callable[[MixtralError], object]) -> Iterator[ModelChoice | None]:
    """`choice` with this process's share of the model, where `mlx.launch` started several; as it is where it is alone.

    None where another process does the talking: this one has followed it to the end. `on_lost` is told when one of them
    is lost; the process ends soon after. Raises `MixtralError`."""
    place = _place()
    if place is None:
        if choice.parallel or choice.split:
            raise MixtralError(
                "A model can be split among several processes only, and this one is alone.",
                code="not_launched",
                hint="Start it with mlx.launch, or leave --parallel and --split out.",
            )
        yield choice
        return
    if place.rank:
        # A Ctrl-C in a terminal is for rank 0, which says what comes of it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with notice("Meeting the other ranks …", quiet=choice.quiet or bool(place.rank)):
        from .distributed.ranks import Loading, together
        from .weights import locate

        folder = _fetched(locate, choice)
    loading = Loading(
        choice.parallel or "pipeline", choice.split, choice.dtype, choice.context, choice.kv_bits, choice.memory_bytes
    )
    with together(folder, loading, place, on_lost=on_lost) as ranks:
        if ranks.rank:
            ranks.follow()
        yield None if ranks.rank else replace(choice, share=ranks.part)


def followed(choice: ModelChoice, on_lost: Callable[[MixtralError], object]) -> bool:
    """Do what another process tells this one to its end, where `mlx.launch` started several and this is not the first.

    For a command whose work is done by another process than its own: that one is to be `joined`. Raises
    `MixtralError`."""
    place = _place()
    if place and place.rank == 0:
        return False
    with joined(choice, on_lost) as mine:
        return mine is None


def ranks() -> int:
    """How many processes `mlx.launch` started to share a model; 1 where it did not."""
    place = _place()
    return place.size if place else 1


def _place() -> Place | None:
    if "MLX_RANK" not in os.environ:
        return None
    from .distributed.link import Place

    return Place.find()


@dataclass(frozen=True)
class Plain:
    """A model for the plain path, on this thread, with what people call it, its tokenizer and one running cache."""

    name: str
    loaded: Loaded
    tokenizer: Tokenizer
    conversation: Conversation


def open_model(choice: ModelChoice) -> Plain:
    """Load a model, with a progress bar; the first Ctrl-C stops it. Raises `MixtralError`."""
    with notice("Starting MLX …", quiet=choice.quiet):
        from . import cpu
        from .generate import Conversation
        from .prompt import Tokenizer
        from .weights import load, locate
    folder = _fetched(locate, choice)
    with CtrlC() as stopped, _loading(choice) as bar:
        # The configuration first: a folder without one is no model, which says more than that it has no tokenizer.
        tokenizer = Tokenizer.read(folder, Config.read(folder).vocab_size)
        loaded = load(
            folder,
            dtype=choice.dtype,
            memory=choice.memory_bytes,
            context=choice.context,
            kv_bits=choice.kv_bits,
            on_progress=bar,
            cancelled=stopped,
            share=choice.share,
        )
    if stopped():
        raise _cancelled()
    if cpu.is_available() and cpu.has_to_compile(loaded.model):
        with _compiling(choice):
            cpu.compile_for(loaded.model)
    _say_note(loaded, choice)
    plan = loaded.plan
    return Plain(
        _shown_name(choice, is_demo=folder == locate(None)),
        loaded,
        tokenizer,
        Conversation(loaded.model, kv_bits=choice.kv_bits, context=plan.context, chunk_tokens=plan.chunk_tokens),
    )


def open_engine(choice: ModelChoice, *, beside_bytes: int = 0, **options: Any) -> Ready:
    """Load a model into an engine of its own, with a progress bar; the first Ctrl-C stops it.

    `beside_bytes` are taken by a model that stays in memory, `options` are others of `mixtral_mlx.load`. Raises
    `MixtralError`."""
    with notice("Starting MLX …", quiet=choice.quiet):
        from . import cpu
        from .engine.engine import load
        from .memory import default_budget, machine
        from .weights import locate
    folder = _fetched(locate, choice)
    memory = choice.memory_bytes
    if beside_bytes and choice.share:
        raise ChatError("Several machines share this model and have no other.", code="not_available")
    if beside_bytes:
        memory = _left_beside(beside_bytes, memory or default_budget(machine(ask_metal=True)))
    with CtrlC() as stopped, _loading(choice) as bar:
        engine = load(
            folder,
            dtype=choice.dtype,
            memory=memory,
            context=choice.context,
            kv_bits=choice.kv_bits,
            progress=bar,
            cancelled=stopped,
            share=choice.share,
            **options,
        )
    if stopped():
        engine.close()
        raise _cancelled()
    is_demo = folder == locate(None)
    ready = Ready(_shown_name(choice, is_demo=is_demo), engine, is_demo)
    if cpu.is_available() and cpu.has_to_compile(ready.loaded.model):
        with _compiling(choice):
            engine.complete([1] * _FOR_ALL_KERNELS, max_tokens=2).result()
    _say_note(ready.loaded, choice)
    return ready


_FOR_ALL_KERNELS = 17
"""Tokens of a prompt that, with one more, has every kernel compiled."""


def _cancelled() -> ChatError:
    """What a Ctrl-C after the last read brings: the same as one between two reads."""
    return ChatError("Loading was cancelled.", code="cancelled")


def _fetched(locate: Callable[..., Path], choice: ModelChoice) -> Path:
    if choice.quiet or not sys.stderr.isatty():
        silence_downloads()
    return locate(choice.name, offline=choice.offline)


def _loading(choice: ModelChoice) -> Bar:
    return Bar("Loading", quiet=choice.quiet, at_least=1 << 27, size="bytes")


def _compiling(choice: ModelChoice) -> AbstractContextManager[None]:
    return notice("Compiling for this processor, once …", quiet=choice.quiet)


def _say_note(loaded: Loaded, choice: ModelChoice) -> None:
    if loaded.note and not choice.quiet:
        print(loaded.note, file=sys.stderr, flush=True)


def silence_downloads() -> None:
    """Keep what fetches a model from drawing bars of its own."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()


def _shown_name(choice: ModelChoice, *, is_demo: bool) -> str:
    if is_demo:
        return "the demo model"
    path = Path(choice.name or "").expanduser()
    return path.resolve().name if path.is_dir() else choice.name or ""


def _left_beside(held: int, budget: int) -> int:
    """What a model may use while another holds `held` bytes, until it takes that one's place."""
    if held >= budget:
        raise ChatError(
            f"The model in use holds {shown_bytes(held)} of {shown_bytes(budget)}: there is no room for another.",
            code="too_large",
            hint="Save the conversation, leave, and start again with --model.",
        )
    return budget - held
