"""Run a conversion from beginning to end: a folder, a file or a hub repository → one folder per recipe.

Chooses between the two ways a source can come: all there, or file by file from the hub, each removed once converted."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import RECIPES, Config, Quantization, read_json, recipe, recipe_of_patterns, shown
from ..weights import Progress
from . import mlx as mlx_folders
from .fetch import fetch, prefetch
from .hub import HubFile, Listing, cached, list_files
from .journal import SOURCE, Journal, allocated, disk_errors
from .names import ConvertError, Piece, all_piece_names, matrices, some_matrices
from .pipeline import Conversion, Events, Target, Written, check_room, deliver, is_finished, versions
from .safetensors import open_safetensors
from .source import Source, open_source, read_config

KEEP = "keep"
FLOAT_RECIPES = {"bf16": "bfloat16", "f16": "float16"}
_DEFAULT_RECIPE = "q4"
_GROUP_SIZE = 64
_RECIPES_HINT = f"There are {', '.join(RECIPES)}, and {KEEP} for what MLX has quantized."
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(:.+)?", re.ASCII)
# Besides the output and the file being converted, the next one may begin to arrive.
_AHEAD = 0.05


@dataclass(frozen=True)
class Request:
    """What to convert, to where, and how. Several `recipes` are written in one pass, to `dest`-RECIPE each.

    Without any recipe, a source MLX has quantized is kept as it is, any other becomes q4. `dtype` is that of the
    floats: "auto" keeps float16 and makes everything else bfloat16. `group_size` and `mode` are for the recipes; None
    is 64 and affine."""

    source: str
    dest: Path
    recipes: tuple[str, ...] = ()
    recipe_file: Path | None = None
    group_size: int | None = None
    mode: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    offline: bool = False
    keep_source: bool = False


@dataclass(frozen=True)
class Report:
    """What came of a request. `resumed`: an earlier try had converted a part of it."""

    source_format: str
    written: tuple[Written, ...]
    bytes_in: int
    peak_disk_bytes: int
    seconds: float
    resumed: bool


def convert(request: Request, events: Events = Events()) -> Report:
    """Convert; raises `MixtralError`. After an error or a kill, the same request goes on where it was."""
    start = time.perf_counter()
    order = _Order(request)
    path = Path(os.path.abspath(os.path.expanduser(request.source)))  # noqa: PTH100, PTH111 - links are not followed
    local = open_source(path) if path.exists() else None
    if local is None and not _REPOSITORY.fullmatch(request.source):
        raise ConvertError(
            f"There is no {request.source}.",
            code="no_model",
            hint="Give a folder, a .gguf file, or a repository such as mistralai/Mixtral-8x7B-Instruct-v0.1.",
        )
    with Journal(order.work, order.plan(local)) as journal:
        if not is_finished(journal):
            order.check_free()
            if local:
                _from_here(order, journal, local, events)
            else:
                _from_hub(order, journal, events)
        else:
            deliver(journal)
        facts = journal.facts
    return Report(
        source_format=facts["source_format"],
        written=tuple(Written(**entry) for entry in facts["written"]),
        bytes_in=facts["bytes_in"],
        peak_disk_bytes=facts["peak_disk_bytes"],
        seconds=time.perf_counter() - start,
        resumed=journal.resumed,
    )


class _Order:
    """A request whose options have been checked, and the folders it is about."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.patterns = read_json(request.recipe_file) if request.recipe_file else None
        self.names = self._recipe_names()
        self.dest = _absolute(request.dest)
        self.work = self.dest.with_name(self.dest.name + ".partial")
        self.folders = [self.dest]
        if len(self.names) > 1:
            self.folders = [self.dest.with_name(f"{self.dest.name}-{name}") for name in self.names]
        self.kept_source = self.dest.with_name(self.dest.name + "-source")
        if not self.work.parent.is_dir():
            raise ConvertError(f"There is no folder {self.work.parent}.", code="no_folder", hint="Create it first.")
        if not self.work.exists():
            self.check_free()

    def _recipe_names(self) -> tuple[str, ...]:
        names = (self.request.recipe_file.stem,) if self.request.recipe_file else self.request.recipes
        if self.request.recipe_file and self.request.recipes:
            raise ConvertError("Both recipes and a recipe file were given, expected one.", code="bad_recipe")
        for name in self.request.recipes:
            if name not in (*RECIPES, KEEP):
                raise ConvertError(f"There is no recipe {shown(name)}.", code="bad_recipe", hint=_RECIPES_HINT)
        if len(set(names)) < len(names):
            raise ConvertError("A recipe was given twice.", code="bad_recipe")
        if KEEP in names and len(names) > 1:
            raise ConvertError("`keep` stands alone: it copies what MLX has quantized.", code="bad_recipe")
        return names

    def check_free(self) -> None:
        """Raise `ConvertError` if something already has the name of what is to be written."""
        for path in [*self.folders, *([self.kept_source] if self.request.keep_source else [])]:
            if os.path.lexists(path):
                raise ConvertError(f"{path} exists already.", code="exists", hint="Choose another name, or remove it.")

    def plan(self, local: Source | None) -> dict[str, Any]:
        """All that what is written depends on, but for the commit of a repository."""
        request = self.request
        source: dict[str, Any] = {"repository": request.source, "revision": request.revision}
        if local:
            # Whoever changes the source between two tries would get a mixture of both.
            stats = {path: path.stat() for path in (*local.files, *_beside(local.folder))}
            source = {str(path): [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
        options = [request.group_size, request.mode, request.dtype]
        return {
            "source": source,
            "folders": [folder.name for folder in self.folders],
            "recipes": [self.patterns, *self.names, *options],
            "versions": versions(),
        }

    def targets(self, config: Config) -> list[Target]:
        """A target for each recipe, `config` being without quantization."""
        return [
            Target.plan(folder, name, config, *self._quantization(name, config))
            for folder, name in zip(self.folders, self.names or (_DEFAULT_RECIPE,), strict=True)
        ]

    def _quantization(self, name: str, config: Config) -> tuple[Quantization | None, str]:
        """The recipe called `name`, and the dtype of what it leaves as floats."""
        request = self.request
        if request.recipe_file:
            self._refuse_options("a recipe file", group_size=request.group_size, mode=request.mode)
            return recipe_of_patterns(config, self.patterns), self._dtype(config)
        if name == KEEP:
            raise ConvertError("Only what MLX has quantized can be kept as it is.", code="bad_recipe")
        if name in FLOAT_RECIPES:
            dtype = None if request.dtype in ("auto", FLOAT_RECIPES[name]) else request.dtype
            self._refuse_options(f"recipe {name}", group_size=request.group_size, mode=request.mode, dtype=dtype)
            return None, FLOAT_RECIPES[name]
        group_size = request.group_size or _GROUP_SIZE
        return recipe(config, name, group_size=group_size, mode=request.mode or "affine"), self._dtype(config)

    def keeps(self) -> bool:
        """Whether what MLX has quantized is to be kept as it is."""
        request = self.request
        if request.recipe_file or self.names not in ((), (KEEP,)):
            return False
        dtype = None if request.dtype == "auto" else request.dtype
        self._refuse_options("keeping a quantization", group_size=request.group_size, mode=request.mode, dtype=dtype)
        return True

    def _refuse_options(self, what: str, **options: object) -> None:
        for name, value in options.items():
            if value is not None:
                raise ConvertError(
                    f"{name} {value} does not go with {what}.",
                    code="bad_recipe",
                    hint="Leave it out, or choose a recipe such as q4.",
                )

    def _dtype(self, config: Config) -> str:
        if self.request.dtype != "auto":
            return self.request.dtype
        return "float16" if config.dtype == "float16" else "bfloat16"


def _absolute(dest: Path) -> Path:
    """`dest` with its parent's links followed, but not its own."""
    dest = dest.expanduser()
    return dest.resolve() if dest.name in ("", "..") else dest.parent.resolve() / dest.name


def _beside(folder: Path) -> list[Path]:
    """The small files that also make a difference."""
    names = ("config.json", "params.json", "tokenizer.model")
    return [folder / name for name in names if (folder / name).is_file()]


def _from_here(order: _Order, journal: Journal, source: Source, events: Events) -> None:
    origin = {"name": source.folder.name, "files": {file.name: file.stat().st_size for file in source.files}}
    _whole(order, journal, source, origin, events)


def _whole(
    order: _Order, journal: Journal, source: Source, origin: dict[str, Any], events: Events, *, keep: bool = False
) -> None:
    """Convert a source all of whose files are there."""
    targets, pieces = _planned(order, source)
    events.phase(f"{source.format}, {in_words(source.nbytes)} → {_sizes(targets)}")
    check_room(journal, targets)
    with Conversion(journal, targets, events) as conversion:
        conversion.write_tokenizer(source.write_tokenizer)
        conversion.fill(pieces, events.progress)
        _finish(order, conversion, source.format, source.nbytes, origin, keep=keep)


def _finish(
    order: _Order, conversion: Conversion, form: str, bytes_in: int, origin: dict[str, Any], *, keep: bool
) -> None:
    conversion.journal.note("source_format", form)
    conversion.journal.note("bytes_in", bytes_in)
    conversion.finish(origin, keep=(SOURCE, order.kept_source.name) if keep else None)


def _planned(order: _Order, source: Source) -> tuple[list[Target], Sequence[Piece]]:
    if source.config.quantization is None:
        return order.targets(source.config), matrices(source.tensors, source.config)
    if order.keeps():
        layout, pieces = mlx_folders.kept(source.folder)
        return [Target(order.dest, KEEP, layout)], pieces
    plain = replace(source.config, quantization=None)
    return order.targets(plain), matrices(mlx_folders.unpack(source.tensors, source.config), plain)


def _sizes(targets: Sequence[Target]) -> str:
    return ", ".join(f"{target.recipe} {in_words(target.layout.nbytes)}" for target in targets)


def in_words(nbytes: float) -> str:
    """A size as people read it."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


# From the hub.


def _from_hub(order: _Order, journal: Journal, events: Events) -> None:
    request = order.request
    # Should the repository change meanwhile, what was begun is finished as it was.
    revision = journal.facts.get("commit") or request.revision
    listing = list_files(request.source, revision, offline=request.offline)
    journal.note("commit", listing.commit)
    folder = journal.work / SOURCE
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    nbytes = sum(file.size for file in listing.weights)
    events.phase(f"{listing.repo} at {listing.commit[:8]}: {len(listing.weights)} files, {in_words(nbytes)}")
    for file in listing.beside:
        fetch(listing, file, folder, cancelled=events.cancelled)
    origin = {"repository": listing.repo, "revision": listing.commit}
    config, packed = (None, None) if listing.form == "gguf" else read_config(folder)
    if config and not packed and config.quantization is None:
        return _streamed(order, journal, _Fetching(listing, folder, nbytes), config, origin, events)
    # Their matrices are spread over tensors that may lie in different files: all must be there.
    _check_fetch(order, journal, config, listing, folder)
    journal.begun = True
    fetching = _Fetching(listing, folder, nbytes)
    for _ in prefetch(listing, fetching.files(listing.weights), folder, fetching.alone(events), events.cancelled):
        pass
    first = folder / listing.weights[0].name
    source = open_source(first if listing.form == "gguf" else folder)
    return _whole(order, journal, source, origin, events, keep=request.keep_source)


def _check_fetch(order: _Order, journal: Journal, config: Config | None, listing: Listing, folder: Path) -> None:
    """Raise `ConvertError` if there is no room for all files of the listing and the output, as far as it is known."""
    coming = max(sum(file.size for file in _uncached(listing)) - allocated(folder), 0)
    if config and config.quantization and order.keeps():
        coming += sum(file.size for file in listing.weights)
    elif config:
        return check_room(journal, order.targets(replace(config, quantization=None)), coming)
    return check_room(journal, (), coming)


def _uncached(listing: Listing) -> list[HubFile]:
    return [file for file in listing.weights if cached(listing, file) is None]


@dataclass
class _Fetching:
    """How far fetching is, over all files: bytes of the files before, of the one that comes `now`, and `converted`.

    `room` is what the file that is fetched ahead may take."""

    listing: Listing
    folder: Path
    total: int
    before: int = 0
    now: int = 0
    converted: int = 0
    room: int = 0

    def files(self, files: Sequence[HubFile]) -> Iterator[HubFile]:
        """`files`, each counted from when the next is asked for."""
        self.before = self.converted = self.total - sum(file.size for file in files)
        for file in files:
            yield file
            self.before, self.now = self.before + file.size, 0

    @property
    def half(self) -> int:
        """Progress of both: a byte counts half when it has come, and half when it is converted."""
        return (self.before + self.now + self.converted) // 2

    def alone(self, events: Events) -> Progress:
        """Progress of fetching that is followed by converting as a step of its own."""

        def progress(done: int, total: int) -> None:
            self.now = done
            events.progress(self.before + done, self.total)

        return progress

    def halves(self, events: Events) -> Progress:
        """Progress of fetching while converting goes on."""

        def progress(done: int, total: int) -> None:
            self.now = done
            events.progress(self.half, self.total)

        return progress


def _streamed(
    order: _Order, journal: Journal, fetching: _Fetching, config: Config, origin: dict[str, Any], events: Events
) -> None:
    """Convert each file as it arrives, and remove it."""
    listing, folder, keep = fetching.listing, fetching.folder, order.request.keep_source
    targets = order.targets(config)
    largest = max((file.size for file in _uncached(listing)), default=0)
    most = int(largest * (1 + _AHEAD))
    if keep:
        _check_fetch(order, journal, config, listing, folder)
    else:
        check_room(journal, targets, max(most - allocated(folder), 0))
    with Conversion(journal, targets, events) as conversion:
        conversion.write_tokenizer(Source(folder, config, {}, (), listing.form).write_tokenizer)
        needed = [f for f in listing.weights if not journal.is_used_up(f.name) or (keep and not _is_there(folder, f))]
        journal.begun = True
        progress, room = fetching.halves(events), None if keep else lambda: fetching.room
        files = prefetch(listing, fetching.files(needed), folder, progress, events.cancelled, room=room)
        with closing(files) as arrived:
            for file, path in zip(needed, arrived, strict=True):
                pieces = some_matrices(_tensors(path, listing.form), config)
                fetching.room = most - _size_here(path) + conversion.left_after(pieces)
                _convert_file(conversion, fetching, file, pieces, events)
                fetching.room = 0  # Until it is known what comes of the next.
                if not keep:
                    path.unlink()
        _check_whole(journal, config, listing)
        _finish(order, conversion, listing.form, fetching.total, origin, keep=keep)


def _convert_file(
    conversion: Conversion, fetching: _Fetching, file: HubFile, pieces: Sequence[Piece], events: Events
) -> None:
    events.phase(f"Converting {file.name}")
    before = fetching.converted

    def progress(done: int, total: int) -> None:
        fetching.converted = before + file.size * done // max(total, 1)
        events.progress(fetching.half, fetching.total)

    conversion.fill(pieces, progress)
    conversion.sync()
    conversion.journal.use_up(file.name, [piece.name for piece in pieces])
    conversion.note_disk()


def _is_there(folder: Path, file: HubFile) -> bool:
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.size


def _size_here(path: Path) -> int:
    """Bytes a fetched file takes in the work folder: none if it is a link into the cache."""
    return 0 if path.is_symlink() else path.stat().st_size


def _check_whole(journal: Journal, config: Config, listing: Listing) -> None:
    if missing := [name for name in all_piece_names(config) if name not in journal.sums]:
        raise ConvertError(
            f"{listing.repo} lacks {len(missing)} matrices, the first {missing[0]}.", code="missing_tensor"
        )


def _tensors(path: Path, form: str) -> Mapping[str, Any]:
    if form == "safetensors":
        return open_safetensors([path])
    from .torch import open_torch

    return open_torch([path])
