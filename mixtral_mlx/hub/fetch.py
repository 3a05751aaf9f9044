"""Fetch a repository's files one by one, over a network that drops.

Here is what huggingface_hub does not do: going on with half a file, checking every file against the hub's own hash, and
fetching one file ahead. What there is to fetch is `listing`'s business; what is done with the files is left to the
caller."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from ..config import shown
from .listing import HubFile, Listing, cached, explained, not_here, url_of
from .patience import GO_ON, HubError, PassingError, Patience, Setbacks, is_passing, pause_asked

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from the thread that fetches."""
Cancelled = Callable[[], bool]

# What a network read brings at most; less than this is no progress.
CHUNK_BYTES = 64 << 10
# Content networks give out larger objects only in ranges below 50 GB.
_REQUEST_BYTES = 32 << 30
_MAX_REDIRECTS = 8
# Fewer are an accident; after so many in a row, what is missing cannot be had by itself, and all is fetched anew.
_UNFIT_ANSWERS = 3
_RESTARTS = 2


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
    return _fetch(listing, file, folder, on_progress or silent, Turn(cancelled), patience)


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
    turn: Turn | None = None

    def start() -> Ahead | None:
        nonlocal turn
        if (file := next(waiting, None)) is None:
            return None
        turn = Turn(cancelled, room)
        return Ahead(turn, partial(_fetch, listing, file, folder, on_progress or silent, turn, patience))

    ahead = start()
    try:
        while ahead:
            path = ahead.result()
            ahead = start()
            yield path
    finally:
        if turn:
            turn.stopped.set()


class Turn:
    """Says to the one who fetches when to stop, and when to wait for room."""

    def __init__(self, cancelled: Cancelled | None = None, room: Callable[[], int] | None = None) -> None:
        self.cancelled = cancelled or _never
        self.room = room
        self.stopped = threading.Event()
        self.come = threading.Event()

    def is_over(self) -> bool:
        return self.stopped.is_set() or self.cancelled()

    def check(self) -> None:
        if self.is_over():
            raise HubError("The download was cancelled.", code="cancelled", hint=GO_ON)

    def wait_for(self, nbytes: int) -> bool:
        """Return when the file may take `nbytes`; whether that took a wait."""
        self.check()
        waited = False
        while self.room and not self.come.is_set() and self.room() < nbytes:
            waited = True
            self.come.wait(0.05)
            self.check()
        return waited


class Ahead:
    """A path being made on a thread of its own, which never keeps the program from ending."""

    def __init__(self, turn: Turn, work: Callable[[], Path]) -> None:
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
        """The path, once it is there, or the error; a fraction of a second after it was cancelled raises `HubError`."""
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
    listing: Listing, file: HubFile, folder: Path, on_progress: Progress, turn: Turn, patience: Patience
) -> Path:
    path = folder / file.name
    with disk_errors(folder):
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
            raise not_here(listing.repo, file.path)
        download(listing, file, path, folder / f"{file.name}.part", on_progress, turn, patience)
        return path


def download(
    listing: Listing, file: HubFile, path: Path, part: Path, on_progress: Progress, turn: Turn, patience: Patience
) -> None:
    """Bring `file` to `path`, going on with what is in `part`; it appears once it is whole and has the hub's hash.

    Raises `HubError`, and `OSError` for what the disk says; see `disk_errors`."""
    with _Part(part, file, turn) as taken:
        for _ in range(2):
            _Download(listing, file, taken, on_progress, turn, patience).run()
            if taken.digest() == _wanted(file):
                return taken.rename(path)
            taken.restart()
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


def _digest_of(path: Path, file: HubFile, turn: Turn) -> str:
    if path.stat().st_size != file.size:
        return ""
    with path.open("rb") as opened:
        return f"{file.size}:{_hash_on(_hasher(file), opened.fileno(), turn).hexdigest()}"


def _hash_on(hasher: _Hash, fd: int, turn: Turn) -> _Hash:
    """Feed the whole of an open file to `hasher`."""
    offset = 0
    while block := os.pread(fd, 1 << 20, offset):
        turn.check()
        hasher.update(block)
        offset += len(block)
    return hasher


class _Part:
    """The part of a file that is already here, and its hash so far. Held by one process at a time."""

    def __init__(self, path: Path, file: HubFile, turn: Turn) -> None:
        self.path = path
        self.file = file
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            self._take(turn)
        except BaseException:
            os.close(self.fd)
            raise

    def _take(self, turn: Turn) -> None:
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


class _Download:
    """The work of filling a part up to the file's size."""

    def __init__(
        self, listing: Listing, file: HubFile, part: _Part, on_progress: Progress, turn: Turn, patience: Patience
    ) -> None:
        self.listing = listing
        self.file = file
        self.part = part
        self.on_progress = on_progress
        self.turn = turn
        self.setbacks = Setbacks(f"{file.path} of {listing.repo}", patience, turn.check)
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
                raise explained(error, self.listing.repo) from None
            except OfflineModeIsEnabled:
                raise not_here(self.listing.repo, self.file.path) from None
            except (PassingError, httpx2.TransportError, httpx2.StreamError, httpx2.InvalidURL) as error:
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
            raise PassingError(f"the answer ended after {self.part.size - start:,} of {stop - start:,} bytes")

    def _check(self, response: httpx2.Response, start: int) -> None:
        """See that the answer's body goes where it is about to be put."""
        headers, size = response.headers, self.file.size
        encoded = headers.get("Content-Encoding", "identity") != "identity"
        if response.status_code == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            if not span or int(span[1]) != start or span[2] not in ("*", str(size)) or encoded:
                raise PassingError(
                    f"asked for bytes from {start:,} of {size:,}, the server sent "
                    f"{shown(headers.get('Content-Range', 'none it names'))}",
                    unfit=True,
                )
        elif start:
            raise PassingError(f"asked for bytes from {start:,}, the server sent all of the file", unfit=True)
        elif not encoded and headers.get("Content-Length", str(size)) != str(size):
            raise PassingError(f"the file has {size:,} bytes, the server sent {headers['Content-Length'][:20]}")
        etag = headers.get("ETag", "").removeprefix("W/") or None
        if start and etag and self.etag and etag != self.etag:
            raise PassingError("the file changed on the server", unfit=True)
        self.etag = etag or self.etag

    def _take(self, chunk: bytes) -> None:
        if self.part.size + len(chunk) > self.file.size:
            raise PassingError("the server sent more than the file has", unfit=True)
        if self.turn.wait_for(self.part.size + len(chunk)):
            self.setbacks.forget()  # It was our own wish that nothing came.
        self.part.append(chunk)
        self.on_progress(self.part.size, self.file.size)
        if self.part.size >= min(self.reached + CHUNK_BYTES, self.file.size):
            self.reached = self.part.size
            self.setbacks.forget()


@contextmanager
def _answer(listing: Listing, file: HubFile, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
    """The answer to a request for `file`, wherever the hub sends us for it."""
    url = url_of(listing, file)
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
    raise PassingError(f"sent from place to place {_MAX_REDIRECTS} times")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _check_identity(response: httpx2.Response, file: HubFile) -> None:
    """See that the hub means the file that was listed."""
    etag = response.headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG, "").removeprefix("W/").strip('"')
    if file.sha256 and re.fullmatch("[0-9a-f]{64}", etag) and etag != file.sha256:
        raise PassingError("the hub names another file than it listed", unfit=True)


def _check_status(response: httpx2.Response, at_home: bool) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status == 416:
        raise PassingError("the server says that the file is shorter", unfit=True)
    if not at_home or is_passing(status):
        # A refusal by another host is its address grown old; the hub will give a new one.
        raise PassingError(f"the server answered {status}", pause_s=pause_asked(response))
    if status < 400:
        raise PassingError(f"the server answered {status}")
    response.read()
    hf_raise_for_status(response)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
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


def silent(done: int, total: int) -> None:
    """Progress that nobody asked for."""
