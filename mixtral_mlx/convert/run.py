"""Run a conversion from beginning to end: a folder, a file or a hub repository → one folder per recipe.

Converts what is there with all its files. What comes file by file from the hub, each removed once converted, is left to
`streamed`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..hub.fetch import fetch
from ..hub.listing import in_words, list_files
from ..weights import locate
from . import mlx as mlx_folders
from .journal import SOURCE, Journal, disk_errors
from .names import ConvertError, Piece, matrices
from .order import KEEP, Order, Request
from .pipeline import Conversion, Events, Target, Written, check_room, deliver, is_finished
from .source import Source, open_source, read_config
from .streamed import Fetching, check_fetch, convert_arriving

__all__ = ["Report", "Request", "convert", "in_words"]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(:.+)?", re.ASCII)


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
    order = Order(request)
    local = _local(request.source)
    if local is None and not _REPOSITORY.fullmatch(request.source):
        raise ConvertError(
            f"There is no {request.source}.",
            code="no_model",
            hint="Give a folder, a .gguf file, or a repository such as mistralai/Mixtral-8x7B-Instruct-v0.1.",
        )
    if local:
        order.check_here()
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


def _local(source: str) -> Source | None:
    """The source where it is on this machine: a path, or `demo`, the built-in model where no path has that name."""
    path = Path(os.path.abspath(os.path.expanduser(source)))  # noqa: PTH100, PTH111 - links are not followed
    if os.path.exists(path):  # noqa: PTH110 - a name may be too long for a path
        return open_source(path)
    return open_source(locate(None)) if source == "demo" else None


def _from_here(order: Order, journal: Journal, source: Source, events: Events) -> None:
    origin = {"name": source.folder.name, "files": {file.name: file.stat().st_size for file in source.files}}
    _whole(order, journal, source, origin, events)


def _from_hub(order: Order, journal: Journal, events: Events) -> None:
    request = order.request
    # Should the repository change meanwhile, what was begun is finished as it was.
    revision = journal.facts.get("commit") or request.revision
    listing = list_files(request.source, revision, offline=request.offline)
    journal.note("commit", listing.commit)
    fetching = Fetching(listing, journal.work / SOURCE)
    with disk_errors(fetching.folder):
        fetching.folder.mkdir(exist_ok=True)
    events.phase(f"{listing.repo} at {listing.commit[:8]}: {len(listing.weights)} files, {in_words(fetching.total)}")
    for file in listing.beside:
        fetch(listing, file, fetching.folder, cancelled=events.cancelled)
    origin = {"repository": listing.repo, "revision": listing.commit}
    config, packed = (None, None) if listing.form == "gguf" else read_config(fetching.folder)
    if config and not packed and config.quantization is None:
        return convert_arriving(order, journal, fetching, config, origin, events)
    # Their matrices are spread over tensors that may lie in different files: all must be there.
    check_fetch(order, journal, config, fetching)
    journal.begun = True
    fetching.fetch_all(events)
    first = fetching.folder / listing.weights[0].name
    source = open_source(first if listing.form == "gguf" else fetching.folder)
    return _whole(order, journal, source, origin, events, keep=order.kept)


def _whole(
    order: Order,
    journal: Journal,
    source: Source,
    origin: dict[str, Any],
    events: Events,
    *,
    keep: tuple[str, str] | None = None,
) -> None:
    """Convert a source all of whose files are there."""
    targets, pieces = _planned(order, source)
    events.phase(f"{source.format}, {in_words(source.nbytes)} → {_sizes(targets)}")
    check_room(journal, targets)
    with Conversion(journal, targets, events) as conversion:
        conversion.write_tokenizer(source.write_tokenizer)
        conversion.fill(pieces, events.progress)
        journal.note("source_format", source.format)
        journal.note("bytes_in", source.nbytes)
        conversion.finish(origin, keep=keep)


def _planned(order: Order, source: Source) -> tuple[list[Target], Sequence[Piece]]:
    if source.config.quantization is None:
        return order.targets(source.config), matrices(source.tensors, source.config)
    if order.keeps():
        layout, pieces = mlx_folders.kept(source.folder)
        return [Target(order.dest, KEEP, layout)], pieces
    plain = replace(source.config, quantization=None)
    return order.targets(plain), matrices(mlx_folders.unpack(source.tensors, source.config), plain)


def _sizes(targets: Sequence[Target]) -> str:
    return ", ".join(f"{target.recipe} {in_words(target.layout.nbytes)}" for target in targets)
