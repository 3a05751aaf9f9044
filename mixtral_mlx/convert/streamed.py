"""Convert a repository file by file while its files arrive, each removed once it is converted.

So the disk holds the output and little more than one file. Only for weights of which every file can be converted by
itself; what is there as a whole is left to `run`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import Config
from ..hub.fetch import prefetch
from ..hub.listing import HubFile, Listing, cached
from ..weights import Progress
from .journal import Journal, allocated
from .names import ConvertError, Piece, all_piece_names, some_matrices
from .order import Order
from .pipeline import Conversion, Events, check_room
from .safetensors import open_safetensors
from .source import Source

# Besides the output and the file being converted, the next one may begin to arrive.
_AHEAD = 0.05


def convert_arriving(
    order: Order, journal: Journal, fetching: Fetching, config: Config, origin: dict[str, Any], events: Events
) -> None:
    """Convert each file as it arrives, and remove it."""
    listing, folder, keep = fetching.listing, fetching.folder, order.kept
    targets = order.targets(config)
    largest = max((file.size for file in _uncached(listing)), default=0)
    most = int(largest * (1 + _AHEAD))
    if keep:
        check_fetch(order, journal, config, fetching)
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
        journal.note("source_format", listing.form)
        journal.note("bytes_in", fetching.total)
        conversion.finish(origin, keep=keep)


def check_fetch(order: Order, journal: Journal, config: Config | None, fetching: Fetching) -> None:
    """Raise `ConvertError` if there is no room for all files of the listing and the output, as far as it is known."""
    coming = max(sum(file.size for file in _uncached(fetching.listing)) - allocated(fetching.folder), 0)
    if config and config.quantization and order.keeps():
        coming += fetching.total
    elif config:
        return check_room(journal, order.targets(replace(config, quantization=None)), coming)
    return check_room(journal, (), coming)


@dataclass
class Fetching:
    """How far fetching into `folder` is, over all files of weights.

    Counts bytes of the files before, of the one that comes `now`, and those `converted`. `room` is what the file that
    is fetched ahead may take."""

    listing: Listing
    folder: Path
    before: int = 0
    now: int = 0
    converted: int = 0
    room: int = 0

    @property
    def total(self) -> int:
        return sum(file.size for file in self.listing.weights)

    def fetch_all(self, events: Events) -> None:
        """Fetch all files, before anything is converted."""
        files = self.files(self.listing.weights)
        for _ in prefetch(self.listing, files, self.folder, self.alone(events), events.cancelled):
            pass

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


def _uncached(listing: Listing) -> list[HubFile]:
    return [file for file in listing.weights if cached(listing, file) is None]


def _convert_file(
    conversion: Conversion, fetching: Fetching, file: HubFile, pieces: Sequence[Piece], events: Events
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
