"""Fetch a checkpoint from the Hugging Face hub, file by file, over a network that drops.

huggingface_hub says what there is, where it lies and who may have it. Here is what it does not do: going on with half
a file, checking every file against the hub's own hash, and fetching one file ahead. Converting, and removing what has
been converted, is left to the caller."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name, try_to_load_from_cache
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
)

from ..config import MixtralError, shown

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from the thread that fetches."""
Cancelled = Callable[[], bool]
_T = TypeVar("_T")

# What a network read brings at most; less than this is no progress.
CHUNK_BYTES = 64 << 10
# Content networks give out larger objects only in ranges below 50 GB.
_REQUEST_BYTES = 32 << 30
_MAX_REDIRECTS = 8
_LONGEST_PAUSE_S = 60.0
# Fewer are an accident; after so many in a row, what is missing cannot be had by itself, and all is fetched anew.
_UNFIT_ANSWERS = 3
_RESTARTS = 2
_GO_ON = "Run the same command again to go on; what has been fetched is kept."

_FORMS = {
    "safetensors": [
        r"model-\d+-of-(\d+)\.safetensors",
        r"model\.safetensors",
        r"model[\w.-]*\.safetensors",
        r"weights[\w.-]*\.safetensors",
        r"consolidated[\w.-]*\.safetensors",
    ],
    "torch": [
        r"pytorch_model-\d+-of-(\d+)\.bin",
        r"pytorch_model\.bin",
        r"pytorch_model[\w.-]*\.bin",
        r"consolidated[\w.-]*\.pth",
        r"consolidated[\w.-]*\.pt",
    ],
}
_BESIDE = re.compile(
    r"(config|params|generation_config|quantize_config|quant_config|special_tokens_map|added_tokens)\.json"
    r"|[\w-]*tokenizer[\w.-]*|chat_template\.jinja"
)
_INDEXES = {"safetensors": "model.safetensors.index.json", "torch": "pytorch_model.bin.index.json"}
_GGUF_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_SAFE_PATH = re.compile(r"(?:[\w-][\w.-]{0,250}/)*[\w-][\w.-]{0,250}", re.ASCII)


class HubError(MixtralError):
    """Something cannot be had from the hub, or could not be fetched whole."""


@dataclass(frozen=True)
class Patience:
    """How long to go on when nothing new arrives: `tries` in a row, `seconds` in all; and how to wait."""

    tries: int = 10
    seconds: float = 1800.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: `path` in it, bytes, and the hub's hash of it (`sha256` or git's `blob_id`)."""

    path: str
    size: int
    sha256: str | None = None
    blob_id: str | None = None

    @property
    def name(self) -> str:
        """What it is called on this machine."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Listing:
    """A repository at one commit: all its files, and those a conversion needs, small ones first, then `weights`."""

    repo: str
    revision: str
    commit: str
    form: str
    files: tuple[HubFile, ...]
    beside: tuple[HubFile, ...]
    weights: tuple[HubFile, ...]
    offline: bool = False

    @property
    def needed(self) -> tuple[HubFile, ...]:
        return self.beside + self.weights

    @property
    def nbytes(self) -> int:
        """Bytes of all needed files."""
        return sum(file.size for file in self.needed)


def list_files(
    source: str, revision: str | None = None, *, offline: bool = False, patience: Patience = Patience()
) -> Listing:
    """List what `source`, a repository or `repository:file.gguf`, has and what of it is needed; raises `HubError`.

    Also finds out whether this person may fetch it. `offline` looks into the Hugging Face cache only."""
    repo, _, choice = source.partition(":")
    asked = revision or constants.DEFAULT_REVISION
    if offline or constants.is_offline_mode():
        commit, files = _in_cache(repo, asked)
        return _listing(repo, asked, commit, files, choice, offline=True)
    # An answer to so small a question either comes soon or not at all.
    patience = replace(patience, tries=min(patience.tries, 4))
    commit, files = _persist(lambda: _on_hub(repo, asked), repo, patience)
    listing = _listing(repo, asked, commit, files, choice, offline=False)
    if first := next((file for file in listing.needed if cached(listing, file) is None), None):
        # The list is public even where the files are not.
        _persist(lambda: get_hf_file_metadata(_url(listing, first)), repo, patience)
    return listing


def fetch(
    listing: Listing,
    file: HubFile,
    folder: Path,
    on_progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    *,
    patience: Patience = Patience(),
) -> Path:
    """Bring `file` into `folder`, going on from its `.part` if there is one; raises `HubError`.

    The file appears once it is whole and has the hub's hash. One that is in the Hugging Face cache is not copied: the
    path is then a link to it, and removing the path removes nothing else."""
    return _fetch(listing, file, folder, on_progress or _ignore, _Turn(cancelled or _never), patience)


def prefetch(
    listing: Listing,
    files: Iterable[HubFile],
    folder: Path,
    on_progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    *,
    room: Callable[[], int] | None = None,
    patience: Patience = Patience(),
) -> Generator[Path, None, None]:
    """Yield `files` in order as they arrive in `folder`, fetching one ahead while the caller works on the last.

    `room` says how many bytes the one fetched ahead may take right now. It is asked again and again, and no longer
    once that file's turn has come. `on_progress` counts each file by itself. Close the iterator to stop fetching."""
    waiting = iter(files)
    turn: _Turn | None = None

    def start() -> _Ahead | None:
        nonlocal turn
        if (file := next(waiting, None)) is None:
            return None
        turn = _Turn(cancelled or _never, room)
        return _Ahead(turn, partial(_fetch, listing, file, folder, on_progress or _ignore, turn, patience))

    ahead = start()
    try:
        while ahead:
            path = ahead.result()
            ahead = start()
            yield path
    finally:
        if turn:
            turn.stopped.set()


def cached(listing: Listing, file: HubFile) -> Path | None:
    """Where `file` lies in the Hugging Face cache, if it does."""
    paths = []
    found = try_to_load_from_cache(listing.repo, file.path, revision=listing.commit)
    if isinstance(found, str):
        paths.append(Path(found))
    if hashed := file.sha256 or file.blob_id:
        # Another commit of the same repository, as after an edit of its README, shares the file.
        paths.append(_cache_folder(listing.repo) / "blobs" / hashed)
    return next((path for path in paths if path.is_file() and path.stat().st_size == file.size), None)


# What there is


def _on_hub(repo: str, revision: str) -> tuple[str, list[HubFile]]:
    info = HfApi(endpoint=constants.ENDPOINT).model_info(
        repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    )
    if not isinstance(info.sha, str) or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise ValueError(f"names commit {str(info.sha)[:60]!r}")
    files = [
        HubFile(
            sibling.rfilename,
            sibling.lfs.size if sibling.lfs else sibling.size,
            _hex(sibling.lfs.sha256 if sibling.lfs else None, 64),
            _hex(sibling.blob_id, 40),
        )
        for sibling in info.siblings or []
        if type(sibling.size) is int and sibling.size >= 0
    ]
    return info.sha, files


def _hex(text: str | None, digits: int) -> str | None:
    return text if isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", text) else None


def _in_cache(repo: str, revision: str) -> tuple[str, list[HubFile]]:
    try:
        # The pattern matches nothing: where the snapshot lies is all that is asked.
        snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns="*/-"))
    except (LocalEntryNotFoundError, HFValidationError):
        raise HubError(
            f"{shown(repo)} at {shown(revision)} is not in the Hugging Face cache, and offline nothing is fetched.",
            code="offline",
            hint="Run it once with a network, or give a folder.",
        ) from None
    paths = sorted(path for path in snapshot.rglob("*") if path.is_file())
    return snapshot.name, [_cached_file(path, path.relative_to(snapshot).as_posix()) for path in paths]


def _cached_file(path: Path, name: str) -> HubFile:
    """A file of the cache, which calls it by the hub's hash of it."""
    hashed = path.readlink().name if path.is_symlink() else None
    return HubFile(name, path.stat().st_size, _hex(hashed, 64), _hex(hashed, 40))


def _cache_folder(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _listing(repo: str, revision: str, commit: str, files: Sequence[HubFile], choice: str, *, offline: bool) -> Listing:
    # Whatever the hub says, nothing outside the folder is written.
    files = sorted((file for file in files if _SAFE_PATH.fullmatch(file.path)), key=lambda file: file.path)
    form, weights = _gguf(repo, files, choice) if choice else _weights(repo, files)
    index = _INDEXES.get(form) if not choice else None
    beside = [file for file in files if _BESIDE.fullmatch(file.path) or file.path == index]
    return Listing(repo, revision, commit, form, tuple(files), tuple(beside), tuple(weights), offline)


def _weights(repo: str, files: Sequence[HubFile]) -> tuple[str, list[HubFile]]:
    """The one form to convert from: a repository often holds the same weights several times."""
    for form, patterns in _FORMS.items():
        for pattern in patterns:
            matches = [(file, match) for file in files if (match := re.fullmatch(pattern, file.path, re.ASCII))]
            if matches and matches[0][1].groups():
                return form, _whole_set(repo, [(file, int(match[1])) for file, match in matches])
            if matches:
                return form, [file for file, _ in matches]
    return _gguf(repo, files, "")


def _whole_set(repo: str, parts: Sequence[tuple[HubFile, int]]) -> list[HubFile]:
    """The parts of the first set that has as many as its names say."""
    counts = sorted({count for _, count in parts})
    for count in counts:
        found = [file for file, of in parts if of == count]
        if len(found) == count:
            return found
    found = [file for file, of in parts if of == counts[0]]
    raise HubError(
        f"{repo} has {len(found)} of the {counts[0]} parts that {found[0].path} is one of.",
        code="hub_incomplete",
        hint="Fetch the missing ones with a network, or choose another repository or revision.",
    )


def _gguf(repo: str, files: Sequence[HubFile], choice: str) -> tuple[str, list[HubFile]]:
    """The GGUF file, or the parts of one, that `choice` names by its path or an unmistakable part of it."""
    models: dict[str, list[tuple[HubFile, int]]] = {}
    for file in files:
        if file.path.endswith(".gguf"):
            part = _GGUF_PART.fullmatch(file.path)
            models.setdefault(part[1] + ".gguf" if part else file.path, []).append((file, int(part[2]) if part else 1))
    exact = [name for name, parts in models.items() if choice in (name, *(file.path for file, _ in parts))]
    fitting = exact or [name for name in models if choice.lower() in name.lower()]
    if len(fitting) == 1:
        return "gguf", _whole_set(repo, models[fitting[0]])
    if models:
        sizes = {name: sum(file.size for file, _ in models[name]) for name in fitting or models}
        found = "".join(f"\n  {repo}:{name}  {size / 1e9:.1f} GB" for name, size in sizes.items())
        asked = f"none is {shown(choice)}" if not fitting else "say which"
        raise HubError(f"{repo} has {len(sizes)} GGUF models; {asked}:{found}", code="hub_choose", hint="Add its name.")
    names = ", ".join(shown(file.path) for file in files[:8]) or "nothing"
    raise HubError(
        f"{repo} holds no {f'GGUF file {shown(choice)}' if choice else 'weights in a known form'} (found: {names}).",
        code="no_weights",
        hint="Known are model*.safetensors, pytorch_model*.bin, consolidated.* and *.gguf.",
    )


# One file


class _Turn:
    """Says to the one who fetches when to stop, and when to wait for room."""

    def __init__(self, cancelled: Cancelled, room: Callable[[], int] | None = None) -> None:
        self.cancelled = cancelled
        self.room = room
        self.stopped = threading.Event()
        self.come = threading.Event()

    def is_over(self) -> bool:
        return self.stopped.is_set() or self.cancelled()

    def check(self) -> None:
        if self.is_over():
            raise HubError("The download was cancelled.", code="cancelled", hint=_GO_ON)

    def wait_for(self, nbytes: int) -> bool:
        """Return when the file may take `nbytes`; whether that took a wait."""
        self.check()
        waited = False
        while self.room and not self.come.is_set() and self.room() < nbytes:
            waited = True
            self.come.wait(0.05)
            self.check()
        return waited


class _Ahead:
    """A file being fetched on a thread of its own, which never keeps the program from ending."""

    def __init__(self, turn: _Turn, work: Callable[[], Path]) -> None:
        self.turn = turn
        self.work = work
        self.path: Path | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="fetch", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.path = self.work()
        except BaseException as error:
            self.error = error

    def result(self) -> Path:
        self.turn.come.set()
        while self.thread.is_alive():
            self.thread.join(0.2)
            if self.turn.cancelled():  # The thread may be waiting for an answer.
                self.turn.check()
        if self.error:
            raise self.error
        assert self.path is not None
        return self.path


def _fetch(
    listing: Listing, file: HubFile, folder: Path, on_progress: Progress, turn: _Turn, patience: Patience
) -> Path:
    path = folder / file.name
    with _disk_errors(folder):
        if path.is_symlink():
            path.unlink()
        if path.is_file() and _digest_of(path, file, turn) == _wanted(file):
            on_progress(file.size, file.size)
            return path
        if found := cached(listing, file):
            path.symlink_to(found.resolve())
            on_progress(file.size, file.size)
            return path
        if listing.offline:
            raise _not_here(listing.repo, file.path)
        with _Part(folder / f"{file.name}.part", file, turn) as part:
            for last_try in (False, True):
                _Download(listing, file, part, on_progress, turn, patience).run()
                if part.digest() == _wanted(file):
                    part.rename(path)
                    return path
                part.restart()
                if last_try:
                    break
    raise HubError(
        f"{file.path} of {listing.repo} arrived twice with another content than the hub says it has.",
        code="hub_wrong_hash",
        hint="Something between this machine and the hub changes the file. Try another network, or later.",
    )


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class _NoHash:
    def update(self, data: bytes | memoryview, /) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def _hasher(file: HubFile) -> _Hash:
    if file.sha256:
        return hashlib.sha256()
    if file.blob_id:
        return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return _NoHash()


def _wanted(file: HubFile) -> str:
    return f"{file.size}:{file.sha256 or file.blob_id or ''}"


def _digest_of(path: Path, file: HubFile, turn: _Turn) -> str:
    if path.stat().st_size != file.size:
        return ""
    with path.open("rb") as opened:
        return f"{file.size}:{_hash_on(_hasher(file), opened.fileno(), turn).hexdigest()}"


def _hash_on(hasher: _Hash, fd: int, turn: _Turn) -> _Hash:
    """Feed the whole of an open file to `hasher`."""
    offset = 0
    while block := os.pread(fd, 1 << 20, offset):
        turn.check()
        hasher.update(block)
        offset += len(block)
    return hasher


class _Part:
    """The part of a file that is already here, and its hash so far. Held by one process at a time."""

    def __init__(self, path: Path, file: HubFile, turn: _Turn) -> None:
        self.path = path
        self.file = file
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            self._take(turn)
        except BaseException:
            os.close(self.fd)
            raise

    def _take(self, turn: _Turn) -> None:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise HubError(
                f"Another process is fetching {self.path}.", code="in_use", hint="Let it finish, or stop it."
            ) from None
        self.size = os.fstat(self.fd).st_size
        if self.size > self.file.size:
            self.restart()
        self.hasher = _hash_on(_hasher(self.file), self.fd, turn)

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def append(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            count = os.pwrite(self.fd, view, self.size)
            # Only what is on disk counts: a full disk may take half a chunk.
            self.hasher.update(view[:count])
            self.size += count
            view = view[count:]

    def restart(self) -> None:
        os.ftruncate(self.fd, 0)
        self.size, self.hasher = 0, _hasher(self.file)

    def digest(self) -> str:
        return f"{self.size}:{self.hasher.hexdigest()}"

    def rename(self, path: Path) -> None:
        os.fsync(self.fd)
        self.path.rename(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _PassingError(Exception):
    """Something went wrong that may go right the next time, after `pause_s` if the server said so.

    `unfit`: the answer was not what was asked for."""

    def __init__(self, found: str, *, pause_s: float = 0.0, unfit: bool = False) -> None:
        super().__init__(found)
        self.pause_s = pause_s
        self.unfit = unfit


class _Setbacks:
    """Counts what goes wrong in a row: waits longer each time, and gives up in the end."""

    def __init__(self, what: str, patience: Patience, turn: _Turn) -> None:
        self.what = what
        self.patience = patience
        self.turn = turn
        self.forget()

    def forget(self) -> None:
        self.tries = 0
        self.since = self.patience.clock()

    def bear(self, error: Exception) -> None:
        """Wait until it is time to try again, or raise `HubError`."""
        self.tries += 1
        pause = max(getattr(error, "pause_s", 0.0), min(0.5 * 2 ** (self.tries - 1), _LONGEST_PAUSE_S))
        spent = self.patience.clock() - self.since
        if self.tries >= self.patience.tries or spent + pause > self.patience.seconds:
            raise self.given_up(error) from None
        while pause > 0:
            self.turn.check()
            self.patience.sleep(min(pause, 0.5))
            pause -= 0.5

    def given_up(self, error: Exception) -> HubError:
        asked = getattr(error, "pause_s", 0.0)
        wait = f" The server asks to wait {asked:.0f} s." if asked > _LONGEST_PAUSE_S else ""
        found = f"{self.what} could not be fetched: {_reason(error)} (try {self.tries}).{wait}"
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
            hint = f"Check the network, and HF_ENDPOINT if it is set. {_GO_ON}"
            return HubError(found, code="hub_unreachable", hint=hint)
        return HubError(found, code="hub_failing", hint=_GO_ON)


class _Download:
    """The work of filling a part up to the file's size."""

    def __init__(
        self, listing: Listing, file: HubFile, part: _Part, on_progress: Progress, turn: _Turn, patience: Patience
    ) -> None:
        self.listing = listing
        self.file = file
        self.part = part
        self.on_progress = on_progress
        self.turn = turn
        self.setbacks = _Setbacks(f"{file.path} of {listing.repo}", patience, turn)
        self.etag: str | None = None
        self.reached = part.size
        self.restarts = 0

    def run(self) -> None:
        unfit = 0
        self.on_progress(self.part.size, self.file.size)
        while self.part.size < self.file.size:
            self.turn.check()
            try:
                self._ask(self.part.size)
                unfit = 0
            except HfHubHTTPError as error:
                raise _explained(error, self.listing.repo) from None
            except OfflineModeIsEnabled:
                raise _not_here(self.listing.repo, self.file.path) from None
            except (_PassingError, httpx2.TransportError, httpx2.StreamError, httpx2.InvalidURL) as error:
                unfit = unfit + 1 if getattr(error, "unfit", False) else 0
                self.setbacks.bear(error)
                if unfit == _UNFIT_ANSWERS:
                    unfit = 0
                    self._restart(error)

    def _restart(self, error: Exception) -> None:
        self.restarts += 1
        if self.restarts > _RESTARTS:
            raise self.setbacks.given_up(error) from None
        self.part.restart()
        self.etag, self.reached = None, 0

    def _ask(self, start: int) -> None:
        """Ask for what is missing from `start` and take what comes."""
        stop = min(self.file.size, start + _REQUEST_BYTES)
        ranged = {"Range": f"bytes={start}-{stop - 1}"} if start or stop < self.file.size else {}
        with _answer(self.listing, self.file, ranged) as response:
            self._check(response, start)
            for chunk in response.iter_bytes():
                self._take(chunk)
        if self.part.size < stop:
            raise _PassingError(f"the answer ended after {self.part.size - start:,} of {stop - start:,} bytes")

    def _check(self, response: httpx2.Response, start: int) -> None:
        """See that the answer's body goes where it is about to be put."""
        headers, size = response.headers, self.file.size
        encoded = headers.get("Content-Encoding", "identity") != "identity"
        if response.status_code == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            if not span or int(span[1]) != start or span[2] not in ("*", str(size)) or encoded:
                raise _PassingError(
                    f"asked for bytes from {start:,} of {size:,}, the server sent "
                    f"{shown(headers.get('Content-Range', 'none it names'))}",
                    unfit=True,
                )
        elif start:
            raise _PassingError(f"asked for bytes from {start:,}, the server sent all of the file", unfit=True)
        elif not encoded and headers.get("Content-Length", str(size)) != str(size):
            raise _PassingError(f"the file has {size:,} bytes, the server sent {headers['Content-Length'][:20]}")
        etag = headers.get("ETag", "").removeprefix("W/") or None
        if start and etag and self.etag and etag != self.etag:
            raise _PassingError("the file changed on the server", unfit=True)
        self.etag = etag or self.etag

    def _take(self, chunk: bytes) -> None:
        if self.part.size + len(chunk) > self.file.size:
            raise _PassingError("the server sent more than the file has", unfit=True)
        if self.turn.wait_for(self.part.size + len(chunk)):
            self.setbacks.forget()  # It was our own wish that nothing came.
        self.part.append(chunk)
        self.on_progress(self.part.size, self.file.size)
        if self.part.size >= min(self.reached + CHUNK_BYTES, self.file.size):
            self.reached = self.part.size
            self.setbacks.forget()


# HTTP


def _url(listing: Listing, file: HubFile) -> str:
    return hf_hub_url(listing.repo, file.path, revision=listing.commit, endpoint=constants.ENDPOINT)


@contextmanager
def _answer(listing: Listing, file: HubFile, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
    """The answer to a request for `file`, wherever the hub sends us for it."""
    url = _url(listing, file)
    home = _origin(url)
    own = {key: value for key, value in build_hf_headers().items() if key.lower() in ("user-agent", "authorization")}
    for _ in range(_MAX_REDIRECTS):
        at_home = _origin(url) == home
        # The token is for the hub alone, not for the hosts that keep its files.
        sent = {key: value for key, value in own.items() if at_home or key.lower() != "authorization"}
        with get_session().stream(
            "GET",
            url,
            headers={**sent, **headers, "Accept-Encoding": "identity"},
            follow_redirects=False,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            if at_home:
                _check_identity(response, file)
            if not response.has_redirect_location:
                _check_status(response, at_home)
                yield response
                return
            url = urljoin(url, response.headers["Location"])
    raise _PassingError(f"sent from place to place {_MAX_REDIRECTS} times")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _check_identity(response: httpx2.Response, file: HubFile) -> None:
    """See that the hub means the file that was listed."""
    etag = response.headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG, "").removeprefix("W/").strip('"')
    if file.sha256 and _hex(etag, 64) not in (None, file.sha256):
        raise _PassingError("the hub names another file than it listed", unfit=True)


def _check_status(response: httpx2.Response, at_home: bool) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status == 416:
        raise _PassingError("the server says that the file is shorter", unfit=True)
    if not at_home or _is_passing(status):
        # A refusal by another host is its address grown old; the hub will give a new one.
        raise _PassingError(f"the server answered {status}", pause_s=_pause_asked(response))
    if status < 400:
        raise _PassingError(f"the server answered {status}")
    response.read()
    hf_raise_for_status(response)


def _is_passing(status: int) -> bool:
    return status in (408, 425, 429) or status >= 500


def _pause_asked(response: httpx2.Response) -> float:
    """Seconds the server asks to be left alone for."""
    if (limit := parse_ratelimit_headers(response.headers)) and limit.remaining == 0 and response.status_code == 429:
        return limit.reset_in_seconds + 1.0
    after = response.headers.get("Retry-After", "").strip()
    return float(after) if re.fullmatch(r"\d{1,6}", after) else 0.0


def _persist(ask: Callable[[], _T], repo: str, patience: Patience) -> _T:
    """The hub's answer to `ask`, asking again while there is hope; raises `HubError`."""
    setbacks = _Setbacks(repo, patience, _Turn(_never))
    while True:
        try:
            return ask()
        except HfHubHTTPError as error:
            if not _is_passing(error.response.status_code):
                raise _explained(error, repo) from None
            setbacks.bear(_PassingError(_reason(error), pause_s=_pause_asked(error.response)))
        except httpx2.TransportError as error:
            setbacks.bear(error)
        except OfflineModeIsEnabled:
            raise _not_here(repo, "") from None
        except HFValidationError:
            raise HubError(
                f"{shown(repo)} is no name of a repository.",
                code="bad_repository",
                hint="Repositories are named like mistralai/Mixtral-8x7B-Instruct-v0.1.",
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # Its answer is not of the hub's form.
            raise HubError(
                f"{constants.ENDPOINT} does not answer like a hub about {repo} ({_reason(error)}).",
                code="hub_failing",
                hint="Check the network, and HF_ENDPOINT if it is set.",
            ) from None


def _explained(error: HfHubHTTPError, repo: str) -> HubError:
    """What the hub refuses and what a person can do about it."""
    page = f"{constants.ENDPOINT}/{repo}"
    status = error.response.status_code
    login = "run: hf auth login"
    if isinstance(error, GatedRepoError):
        code, found, hint = "hub_gated", "asks for its licence to be accepted", f"Accept it on {page}, then {login}"
    elif isinstance(error, RevisionNotFoundError):
        code, found, hint = "hub_no_revision", "has no such revision", f"Its revisions are on {page}/tree/main"
    elif isinstance(error, EntryNotFoundError):
        code, found, hint = "hub_no_file", "no longer has a file that it listed", "Run the same command again."
    elif isinstance(error, DisabledRepoError):
        code, found, hint = "hub_disabled", "was disabled by the hub", "Choose another repository."
    elif status == 401 and "Invalid" in (error.response.headers.get("X-Error-Message") or ""):
        code, found, hint = "hub_token", "cannot be had with this token", f"Renew it: {login}, or set HF_TOKEN anew."
    elif isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        code, found = "hub_not_found", "does not exist, or is private"
        hint = f"Check the name; for a private one {login}"
    elif status == 403:
        code, found = "hub_forbidden", "is closed to this token"
        hint = f"Give the token the right to read it on {constants.ENDPOINT}/settings/tokens"
    else:
        code, found, hint = "hub_failing", f"could not be fetched ({_reason(error)})", _GO_ON
    return HubError(f"On the hub, {repo} {found}.", code=code, hint=hint)


def _not_here(repo: str, path: str) -> HubError:
    return HubError(
        f"{f'{path} of ' if path else ''}{repo} is not in the Hugging Face cache, and offline nothing is fetched.",
        code="offline",
        hint="Run it once without --offline and HF_HUB_OFFLINE.",
    )


def _reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a full or failing disk says into an error with the bytes that are free."""
    try:
        yield
    except HfHubHTTPError:  # Also an OSError.
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = 0
            with suppress(OSError):
                free = shutil.disk_usage(folder).free
            raise HubError(
                f"The disk of {folder} is full or a file may not grow further; {free:,} bytes are free.",
                code="disk_full",
                hint="Make room, then run the same command again to go on.",
            ) from None
        raise HubError(f"Writing in {folder} failed: {error.strerror or error}.", code="unwritable") from None


def _never() -> bool:
    return False


def _ignore(done: int, total: int) -> None:
    pass
