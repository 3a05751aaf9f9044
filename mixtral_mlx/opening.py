"""Opening a model from a command line: which one and how, with a bar, and with what there is to say about it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Config, MixtralError
from .session import ChatError, Ready, shown_bytes
from .terminal import Bar, CtrlC, Screen, notice

if TYPE_CHECKING:
    from .distributed.link import Place
    from .distributed.split import Kind
    from .engine.engine import Engine
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
    folder = located(choice.name, offline=choice.offline, quiet=choice.quiet or bool(place.rank))
    with notice("Meeting the other ranks …", quiet=choice.quiet or bool(place.rank)):
        from .distributed.ranks import Loading, together
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


def located(name: str | None, *, offline: bool, quiet: bool) -> Path:
    """The folder of a model. What of a repository is not here is fetched, with a bar; the first Ctrl-C stops that.

    Raises `MixtralError`."""
    from .weights import locate

    with CtrlC() as stopped, fetching(quiet=quiet) as progress:
        return locate(name, offline=offline, on_progress=progress, cancelled=stopped)


@contextmanager
def fetching(*, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Whom to tell how far a repository has been fetched: says how large it is, and then how far."""
    screen = Screen("Fetching", quiet=quiet, size="bytes")
    said = 0

    def progress(done: int, total: int) -> None:
        nonlocal screen, said
        if total != said:
            screen.end()
            screen = Screen("Fetching", quiet=quiet, size="bytes")  # Its clock begins now.
            here = f", {shown_bytes(done)} of it here" if done else ""
            screen.phase(f"Fetching {shown_bytes(total)} into the Hugging Face cache{here}")
            said = total
        screen.progress(done, total)

    try:
        yield progress
    except MixtralError as error:
        screen.end()
        if error.code == "cancelled" and said and not quiet:
            print(f"Stopped. {error.hint}".rstrip(), file=sys.stderr)
        raise
    finally:
        screen.end()


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
    folder = _fetched(choice)
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


def open_engine(choice: ModelChoice, *, instead_of: Engine | None = None, **options: Any) -> Ready:
    """Load a model into an engine of its own, with a progress bar; the first Ctrl-C stops it.

    `instead_of` is an engine whose memory it takes: that one is closed, or has its model again where this fails.
    `options` are others of `mixtral_mlx.load`. Raises `MixtralError`."""
    if instead_of and choice.share:
        raise ChatError("Several machines share this model and have no other.", code="not_available")
    with notice("Starting MLX …", quiet=choice.quiet):
        from . import cpu
        from .weights import locate
    folder = _fetched(choice)
    with _giving_way(instead_of, folder, choice) if instead_of else nullcontext():
        engine = _loaded_engine(folder, choice, options)
    is_demo = folder == locate(None)
    ready = Ready(_shown_name(choice, is_demo=is_demo), engine, is_demo)
    if cpu.is_available() and cpu.has_to_compile(ready.loaded.model):
        with _compiling(choice):
            engine.complete([1] * _FOR_ALL_KERNELS, max_tokens=2).result()
    _say_note(ready.loaded, choice)
    return ready


def _loaded_engine(folder: Path, choice: ModelChoice, options: dict[str, Any]) -> Engine:
    from .engine.engine import load

    with CtrlC() as stopped, _loading(choice) as bar:
        engine = load(
            folder,
            dtype=choice.dtype,
            memory=choice.memory_bytes,
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
    return engine


@contextmanager
def _giving_way(engine: Engine, folder: Path, choice: ModelChoice) -> Iterator[None]:
    """Let go of a model while that in `folder` is loaded: there is memory for one. It comes back where that fails."""
    from .weights import Checkpoint

    Checkpoint.open(folder)  # What is wrong with a folder is said before anything is given up for it.
    engine.unload()
    try:
        yield
    except MixtralError as error:
        with notice("Loading the model from before …", quiet=choice.quiet):
            engine.load()
        error.hint = f"{error.hint}\nThe model from before has been loaded again.".strip()
        raise
    engine.close()


_FOR_ALL_KERNELS = 17
"""Tokens of a prompt that, with one more, has every kernel compiled."""


def _cancelled() -> ChatError:
    """What a Ctrl-C after the last read brings: the same as one between two reads."""
    return ChatError("Loading was cancelled.", code="cancelled")


def _fetched(choice: ModelChoice) -> Path:
    return located(choice.name, offline=choice.offline, quiet=choice.quiet)


def _loading(choice: ModelChoice) -> Bar:
    return Bar("Loading", quiet=choice.quiet, at_least=1 << 27, size="bytes")


def _compiling(choice: ModelChoice) -> AbstractContextManager[None]:
    return notice("Compiling for this processor, once …", quiet=choice.quiet)


def _say_note(loaded: Loaded, choice: ModelChoice) -> None:
    if loaded.note and not choice.quiet:
        print(loaded.note, file=sys.stderr, flush=True)


def _shown_name(choice: ModelChoice, *, is_demo: bool) -> str:
    if is_demo:
        return "the demo model"
    path = Path(choice.name or "").expanduser()
    return path.resolve().name if path.is_dir() else choice.name or ""
