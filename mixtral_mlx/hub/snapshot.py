"""A repository as a folder: its files in the Hugging Face cache, where later runs and other programs find them.

What the cache lacks is fetched, the weights only once the small files have passed a gate and the disk has room. The
cache's layout is huggingface_hub's: `blobs` by hash, `snapshots` of links to them, `refs` that name a snapshot."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from ..writing import write_whole
from .fetch import Ahead, Cancelled, Progress, Turn, disk_errors, download, silent
from .listing import HubFile, Listing, cache_folder, cached, in_words, list_files, not_here
from .patience import HubError, Patience

Gate = Callable[[Path], Collection[str] | None]
"""Given a folder with all of a repository but its weights, names the files of weights that belong to it, or raises.

None: those that are weights by their names."""

_OPENED = re.compile(r"(model|weights)[\w.-]*\.safetensors")
_LOCK_TRY_S = 0.2


def snapshot(
    repo: str,
    gate: Gate,
    *,
    offline: bool = False,
    on_progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    patience: Patience = Patience(),
) -> Path:
    """The folder of a repository with safetensors, complete; raises `HubError`, and what `gate` raises.

    `offline` takes what is in the cache and asks nothing; so does a hub that cannot be asked, if the cache has all.
    `on_progress` is called while weights are fetched, with bytes here and bytes of all weights."""
    turn = Turn(cancelled)
    filling = _Filling(repo, gate, on_progress or silent, turn, patience)
    try:
        # On a thread of its own, since a hub that is silent would hold up whoever wants to stop.
        return Ahead(turn, lambda: filling.run(offline or constants.is_offline_mode())).result()
    finally:
        turn.stopped.set()


@dataclass(frozen=True)
class _Filling:
    """A repository's way into the cache."""

    repo: str
    gate: Gate
    on_progress: Progress
    turn: Turn
    patience: Patience

    def run(self, offline: bool) -> Path:
        here: Listing | None = None
        try:
            here = _listed(self.repo, True, self.patience)
        except HubError:
            if offline:
                raise
        if here and offline:
            return self.fill(here)
        try:
            # Where there is something to open without the hub, it is asked once.
            listing = _listed(self.repo, False, replace(self.patience, tries=1) if here else self.patience)
        except HubError:
            if here:
                with suppress(HubError):
                    return self.fill(here)
            raise
        return self.fill(listing)

    def fill(self, listing: Listing) -> Path:
        """The snapshot's folder, with all that is needed in it."""
        folder = cache_folder(listing.repo) / "snapshots" / listing.commit
        self.bring(listing, listing.beside, folder, silent)
        self.bring(listing, _belonging(listing, self.gate(folder)), folder, self.on_progress)
        _give_name(listing)
        return folder

    def bring(self, listing: Listing, files: Sequence[HubFile], folder: Path, on_progress: Progress) -> None:
        """Have `files` in `folder`, fetching those that are not in the cache."""
        missing = [file for file in files if cached(listing, file) is None]
        if missing and listing.offline:
            raise not_here(listing.repo, missing[0].path)
        _check_room(listing, missing)
        total = sum(file.size for file in files)
        done = total - sum(file.size for file in missing)
        for file in files:

            def progress(now: int, _: int, before: int = done) -> None:
                on_progress(before + now, total)

            if cached(listing, file) != folder / file.path:
                self.link(listing, file, folder / file.path, progress)
            done += file.size if file in missing else 0

    def link(self, listing: Listing, file: HubFile, link: Path, on_progress: Progress) -> None:
        """Make `link`, as huggingface_hub would, fetching what it points to first if it is not there."""
        blob = _blob(listing, file)
        with disk_errors(cache_folder(listing.repo)):
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            with _alone(listing, blob, self.turn, lambda: on_progress(_nbytes(_part(blob)), file.size)):
                if cached(listing, file) is None:
                    download(listing, file, blob, _part(blob), on_progress, self.turn, self.patience)
                if cached(listing, file) != link:
                    link.unlink(missing_ok=True)  # It led to something that is gone.
                    link.symlink_to(os.path.relpath(blob, link.parent))


def _listed(repo: str, offline: bool, patience: Patience) -> Listing:
    """What there is of a repository that can be opened as it is."""
    try:
        listing = list_files(repo, offline=offline, patience=patience)
    except HubError as error:
        if error.code == "hub_choose":
            raise _to_convert(repo, "several GGUF models", f"{repo}:FILE") from None
        if error.code == "no_weights" and offline:
            raise not_here(repo, "model*.safetensors") from None
        raise
    if not all(_OPENED.fullmatch(file.path) for file in listing.weights):
        raise _to_convert(repo, listing.weights[0].path, repo)
    return listing


def _to_convert(repo: str, found: str, source: str) -> HubError:
    return HubError(
        f"{repo} holds {found}, and only model*.safetensors can be opened without converting.",
        code="no_weights",
        hint=f"Make a folder of it: mixtral-mlx convert {source} DEST",
    )


def _belonging(listing: Listing, names: Collection[str] | None) -> Sequence[HubFile]:
    if names is None:
        return listing.weights
    files = [file for file in listing.files if file.path in names]
    if missing := set(names) - {file.path for file in files}:
        if listing.offline:
            raise not_here(listing.repo, min(missing))
        raise HubError(
            f"{listing.repo} lacks {len(missing)} of the {len(names)} files that its index lists, as {min(missing)}.",
            code="hub_incomplete",
            hint="Choose another repository.",
        )
    return files


def _check_room(listing: Listing, missing: Sequence[HubFile]) -> None:
    """Raise `HubError` if the disk has no room for what is to be fetched."""
    needed = sum(file.size - min(_nbytes(_part(_blob(listing, file))), file.size) for file in missing)
    folder = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if needed > (free := shutil.disk_usage(there).free):
        raise HubError(
            f"Fetching {listing.repo} takes {in_words(needed)}, and the disk of {folder} has {in_words(free)} free.",
            code="disk_full",
            hint="Make room, or have HF_HUB_CACHE name a folder on a larger disk.",
        )


def _blob(listing: Listing, file: HubFile) -> Path:
    """Where the cache keeps a file's content."""
    if not (hashed := file.sha256 or file.blob_id):
        raise HubError(
            f"{constants.ENDPOINT} does not say what hash {file.path} of {listing.repo} has.", code="hub_failing"
        )
    return cache_folder(listing.repo) / "blobs" / hashed


def _part(blob: Path) -> Path:
    """Where a blob lies before it is whole; what is left there is found by `hf cache prune`."""
    return blob.with_name(f"{blob.name}.incomplete")


def _nbytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _alone(listing: Listing, blob: Path, turn: Turn, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold huggingface_hub's lock on a blob. Another process that fetches the same, `waiting` for it is said."""
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / cache_folder(listing.repo).name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        while True:
            turn.check()
            try:
                held.enter_context(WeakFileLock(lock, timeout=_LOCK_TRY_S))
                break
            except TimeoutError:
                waiting()
        yield


def _give_name(listing: Listing) -> None:
    """Have the revision mean this commit also where nobody can be asked. A cache that is only read stays as it is."""
    ref = cache_folder(listing.repo) / "refs" / listing.revision
    if listing.offline or listing.revision == listing.commit:
        return
    with suppress(OSError):
        if ref.is_file() and ref.read_text() == listing.commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_whole(ref, listing.commit)
