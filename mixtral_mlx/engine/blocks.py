"""Keys and values of prompts on disk, in blocks that prompts with the same beginning share.

A block is a file: so many tokens of all layers, named by a hash over the model, the kind, and all tokens up to its
end. So a longer conversation writes only what is new, and no file is ever changed. Which prompts are worth it is for
`prefixes` to say. A folder that cannot be used is refused at once. Nothing that goes wrong later is an error to a
request: what cannot be read is not there, what cannot be written is left out, counted and told to `on_warning`."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, TypeVar

import numpy as np

from .frozen import CLASSES, DTYPES, Form, Frozen, Kind, Views
from .request import EngineError

# What is left over at the end of a prompt is read again, half a block on average, and that takes longer than all else:
# of the time to read 2,000 tokens, 2 % here, 6 % with 128, 18 % with 256. A file is 8 MB for 8x7B in float16.
BLOCK_TOKENS = 64
SUFFIX = ".mixtral-kv"
_NAME = re.compile(r"[0-9a-f]{40}" + re.escape(SUFFIX))
_PARTIAL = re.compile(_NAME.pattern + r"\.[0-9a-f]{8}\.partial")
_MAGIC = b"MXKV\r\n\x1a\x01"  # The last byte counts the formats.
# Everything after the sum is in the sum. CRC-32 finds what disks do, at four times the speed of a hash, and who can
# write here on purpose can also write a hash.
_START = struct.Struct("<8sII")
_MAX_HEADER_BYTES = 4096
_MAX_WAITING = 32
_READERS = 4
_SAMPLE_EVERY, _SAMPLE_BYTES = 64 << 20, 4096
_T = TypeVar("_T")


@dataclass
class Statistics:
    """What the disk did so far, in blocks; `skipped` are prompts that came while too many waited to be written."""

    read: int = 0
    written: int = 0
    evicted: int = 0
    damaged: int = 0
    failed: int = 0
    skipped: int = 0


class Blocks:
    """Blocks of one model in `folder`, which takes at most `most_bytes` with what others have written there.

    `model` says what computed the keys and values: see `fingerprint`. Several processes may share a folder. Raises
    `EngineError` where the folder cannot be used."""

    def __init__(
        self, folder: Path, most_bytes: int, model: str, *, on_warning: Callable[[str], None] | None = None
    ) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self.model = model
        self.statistics = Statistics()
        self._on_warning = on_warning or (lambda text: None)
        self._warned: set[str] = set()
        self._line: _Line | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self.nbytes = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_abandoned()
            self._make_room(0, keep=())
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise EngineError(
                f"The cache_dir {folder} cannot be used: {error.strerror}.",
                code="bad_cache_dir",
                hint="Give a folder that can be written to, or one that can be made.",
            ) from None

    def available(self, kind: Kind, tokens: Sequence[int]) -> int:
        """How many of the first `tokens` seem to be here."""
        for n, key in enumerate(keys := self._keys(kind, tokens)):
            if not _is_file(self._path(key)):
                return n * BLOCK_TOKENS
        return len(keys) * BLOCK_TOKENS

    def read(self, kind: Kind, tokens: Sequence[int]) -> Frozen | None:
        """As many of the first `tokens` as are here and whole, in memory of their own. On the model's thread only."""
        reading = self.begin_read(kind, tokens)
        return reading.result() if reading else None

    def begin_read(
        self, kind: Kind, tokens: Sequence[int], on_done: Callable[[], object] = lambda: None
    ) -> Reading | None:
        """Begin to read as many of the first `tokens` as seem to be here; None where that is nothing.

        Allocates, so on the model's thread only. `on_done` is called on others, with each block and with the last."""
        keys = self._keys(kind, tokens)
        form = self._guarded(keys[0], lambda: _read_form(self._path(keys[0]), keys[0], self.model)) if keys else None
        if form is None or not (keys := self._of_size(keys, form)):
            return None
        if self._readers is None:
            self._readers = ThreadPoolExecutor(_READERS, "prompts from disk")
        reading, now = Reading(Frozen.zeros(form, len(keys) * BLOCK_TOKENS)), time.time_ns()
        reading.blocks = [self._readers.submit(self._read_one, reading, n, key, now) for n, key in enumerate(keys)]
        for block in reading.blocks:
            block.add_done_callback(lambda _: on_done())
        return reading

    def write(self, kind: Kind, tokens: Sequence[int], frozen: Frozen) -> Writing | None:
        """Begin to write what of `frozen`, the evaluated keys and values of `tokens`, is not here yet.

        Whoever lets go of `frozen` before it is done cancels what this returns; None if there is nothing to do."""
        keys = self._keys(kind, tokens[: frozen.length])
        uniform = frozen.nbytes == frozen.length * frozen.form.token_bytes
        if not keys or frozen.is_whole or not uniform:
            return None
        if self._line is None:
            self._line = _Line()
            threading.Thread(target=self._work, args=[self._line], name="prompts to disk", daemon=True).start()
        writing = Writing(keys, frozen.form, frozen.views())
        try:
            self._line.waiting.put_nowait(writing)
        except Full:
            self.statistics.skipped += 1
            return None
        return writing

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what waits, as far as that takes no longer than `timeout_s`; what is being read is not waited for."""
        if self._readers:
            self._readers.shutdown(wait=False, cancel_futures=True)
            self._readers = None
        if self._line:
            self._line.close(timeout_s)
            self._line = None

    # On threads that never touch MLX: readers, and one that writes.

    def _read_one(self, reading: Reading, n: int, key: bytes, now: int) -> bool:
        """Read a block; whether that is now where it belongs."""
        content = self._guarded(key, lambda: _read_block(self._path(key), key, self.model, reading.form))
        if content is None or not reading.fill(n, content):
            return False
        self._touch(key, _time_of(n, now))
        with self._lock:
            self.statistics.read += 1
        return True

    def _work(self, line: _Line) -> None:
        while writing := line.next():
            try:
                self._write_all(writing, line)
            except (OSError, MemoryError) as error:
                with self._lock:
                    self.statistics.failed += 1
                self._warn("cannot be written to", error)
            writing.cancel()
        line.ended.set()

    def _write_all(self, writing: Writing, line: _Line) -> None:
        now = time.time_ns()
        for n, key in enumerate(writing.keys):
            self._touch(key, _time_of(n, now))
        names = [_name(key) for key in writing.keys]
        for n, key in enumerate(writing.keys):
            if line.is_late():
                return
            if os.path.lexists(self._path(key)):
                continue
            content = writing.block(n, self.model)
            # A block without the one before it would never be found.
            if content is None or not self._make_room(len(content), keep=names):
                return
            self._write(self._path(key), content, _time_of(n, now))
            self.statistics.written += 1

    def _write(self, path: Path, content: bytearray, time_ns: int) -> None:
        partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.partial")
        try:
            with open(partial, "xb", opener=_private) as file:
                # Held until the file has its name: who finds one that nobody holds may remove it.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.utime(file.fileno(), ns=(time_ns, time_ns))
                partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            self._count(-len(content))
            raise

    def _make_room(self, nbytes: int, keep: Iterable[str]) -> bool:
        """Have room for `nbytes`, which count from now on; False where even all but `keep` would not do."""
        if nbytes > self.most_bytes:
            return False
        with self._lock:
            if nbytes and self.nbytes + nbytes <= self.most_bytes:
                self.nbytes += nbytes
                return True
            # Only now is it worth to look at what other processes did. Some more goes, so that this is seldom.
            files = self._files()
            self.nbytes = sum(size for _, size, _ in files)
            room = self.most_bytes - nbytes
            enough = room - self.most_bytes // 16 if self.nbytes > room else room
            for _, size, name in files:
                if self.nbytes <= max(enough, 0):
                    break
                if name not in keep:
                    (self.folder / name).unlink(missing_ok=True)
                    self.nbytes -= size
                    self.statistics.evicted += 1
            if self.nbytes > room:
                return False
            self.nbytes += nbytes
            return True

    def _files(self) -> list[tuple[int, int, str]]:
        """Time of last use, bytes and name of every block here, the least recently used first."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name) or _PARTIAL.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            found.append((status.st_mtime_ns, status.st_size, entry.name))
        return sorted(found)

    def _remove_abandoned(self) -> None:
        """Remove what processes that were killed while writing have left."""
        for _, _, name in self._files():
            if _PARTIAL.fullmatch(name):
                with suppress(OSError), open(self.folder / name, "rb", opener=_no_follow) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    (self.folder / name).unlink()

    # Names, times, and what went wrong.

    def _keys(self, kind: Kind, tokens: Sequence[int]) -> list[bytes]:
        """The key of each whole block of `tokens`: a hash over all that its keys and values hang on."""
        key = hashlib.blake2b(json.dumps([self.model, BLOCK_TOKENS, astuple(kind)]).encode(), digest_size=20).digest()
        content = np.asarray(tokens, "<u4").tobytes()
        size = 4 * BLOCK_TOKENS
        keys = []
        for end in range(size, len(content) + 1, size):
            key = hashlib.blake2b(key + content[end - size : end], digest_size=20).digest()
            keys.append(key)
        return keys

    def _of_size(self, keys: list[bytes], form: Form) -> list[bytes]:
        """The first of `keys`, as far as their files are as long as the form says: only for these is there memory."""
        for n, key in enumerate(keys):
            if self._guarded(key, partial(_check_size, self._path(key), form)) is None:
                return keys[:n]
        return keys

    def _path(self, key: bytes) -> Path:
        return self.folder / _name(key)

    def _touch(self, key: bytes, time_ns: int) -> None:
        """Note when a block was used."""
        with suppress(OSError):
            os.utime(self._path(key), ns=(time_ns, time_ns), follow_symlinks=False)

    def _guarded(self, key: bytes, read: Callable[[], _T]) -> _T | None:
        """What `read` makes of a block; None where it is none, which removes it, or cannot be read."""
        try:
            return read()
        except FileNotFoundError:
            pass
        except (OSError, MemoryError) as error:
            with self._lock:
                self.statistics.failed += 1
            self._warn("cannot be read", error)
        except _DamagedError as error:
            with self._lock:
                self.statistics.damaged += 1
            with suppress(OSError):
                self._path(key).unlink()
                self._count(-error.nbytes)
        return None

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes = max(self.nbytes + nbytes, 0)

    def _warn(self, what: str, error: Exception) -> None:
        text = f"The prompt cache in {self.folder} {what}: {getattr(error, 'strerror', None) or error}."
        if text not in self._warned:
            self._warned.add(text)
            self._on_warning(text)


class Reading:
    """A prompt's way back from the disk, into memory that goes at once when it is cancelled, whatever the disk does."""

    def __init__(self, frozen: Frozen) -> None:
        self.form = frozen.form
        self.blocks: list[Future[bool]] = []
        self._frozen: Frozen | None = frozen
        self._views: Views | None = frozen.views()
        self._lock = threading.Lock()

    @property
    def is_done(self) -> bool:
        """Whether `result` has not to be waited for."""
        return self._frozen is None or all(block.done() for block in self.blocks)

    @property
    def copied_bytes(self) -> int:
        """What `result` allocates: where not all blocks could be read, those before the first that could not."""
        count = self._wait()
        return 0 if count == len(self.blocks) else count * BLOCK_TOKENS * self.form.token_bytes

    def cancel(self) -> None:
        """Read no more, and let go of the memory; waits no longer than copying a block takes."""
        with self._lock:
            self._frozen = self._views = None
        for block in self.blocks:
            block.cancel()

    def result(self) -> Frozen | None:
        """What was read, up to the first block that could not be; None where that is nothing, or when cancelled."""
        count, frozen = self._wait(), self._frozen
        if not frozen or not count:
            return None
        return frozen if count == len(self.blocks) else frozen.first(count * BLOCK_TOKENS).evaluated()

    def fill(self, n: int, content: memoryview) -> bool:
        """Put a block where it belongs; False when cancelled."""
        with self._lock:
            if self._views is None:
                return False
            _copy(content, self._views.of_tokens(n * BLOCK_TOKENS, (n + 1) * BLOCK_TOKENS))
        return True

    def _wait(self) -> int:
        """How many blocks were read before the first that could not be, once that is known of all."""
        return [*map(_is_there, self.blocks), False].index(False)


class Writing:
    """A prompt's way to the disk. Its memory may go as soon as it is cancelled or done."""

    def __init__(self, keys: list[bytes], form: Form, views: Views) -> None:
        self.keys = keys
        self.form = form
        self._views: Views | None = views
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Write no more blocks; waits no longer than copying one takes."""
        with self._lock:
            self._views = None

    def block(self, n: int, model: str) -> bytearray | None:
        """The file of block `n`; None when cancelled."""
        header = json.dumps({"model": model, "key": self.keys[n].hex(), "form": asdict(self.form)}).encode()
        begin = _START.size + len(header)
        content = bytearray(begin + BLOCK_TOKENS * self.form.token_bytes)
        # Copied, since writing may take longer than the memory may be held, and piece by piece, to let others run.
        with self._lock, memoryview(content) as target:
            if self._views is None:
                return None
            at = begin
            for piece in self._views.of_tokens(n * BLOCK_TOKENS, (n + 1) * BLOCK_TOKENS):
                target[at : at + piece.nbytes] = piece
                at += piece.nbytes
            target[_START.size : begin] = header
            checksum = _checksum(header, [target[begin:]])
            _START.pack_into(target, 0, _MAGIC, checksum, len(header))
        return content


class _Line:
    """What waits for one worker, and until when it is to go on."""

    def __init__(self) -> None:
        self.waiting: Queue[Writing | None] = Queue(_MAX_WAITING)
        self.ended = threading.Event()
        self._give_up_at = float("inf")

    def next(self) -> Writing | None:
        """What to write next; None at the end."""
        writing = self.waiting.get()
        return None if self.is_late() else writing

    def is_late(self) -> bool:
        return time.monotonic() > self._give_up_at

    def close(self, timeout_s: float) -> None:
        self._give_up_at = time.monotonic() + timeout_s
        with suppress(Full):
            self.waiting.put(None, timeout=timeout_s)
        self.ended.wait(timeout_s)
        with suppress(Empty):
            while True:
                if writing := self.waiting.get_nowait():
                    writing.cancel()
        # For a worker whose disk does not answer yet.
        self.waiting.put_nowait(None)


def fingerprint(folder: Path, dtype: str) -> str:
    """What tells a checkpoint folder, computed in `dtype`, from others: hashed from its configuration and samples."""
    digest = hashlib.blake2b(dtype.encode(), digest_size=16)
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size}".encode())
            # The header is in the first; of other weights any page is another one.
            for offset in range(0, size, _SAMPLE_EVERY):
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))
    return digest.hexdigest()


class _DamagedError(Exception):
    """A file with a block's name that is not that block."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def _check_size(path: Path, form: Form) -> bool:
    status = path.lstat()
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError
    if not 0 <= size - BLOCK_TOKENS * form.token_bytes - _START.size <= _MAX_HEADER_BYTES:
        raise _DamagedError(size)
    return True


def _read_form(path: Path, key: bytes, model: str) -> Form:
    with _opened(path) as fd:
        return _read_header(fd, key, model)[0]


def _read_block(path: Path, key: bytes, model: str, form: Form) -> memoryview:
    """What a block's file holds after its header, checked."""
    # Not read to where it belongs: a disk that does not answer would hold on to all of that memory.
    content = memoryview(bytearray(BLOCK_TOKENS * form.token_bytes))
    with _opened(path) as fd:
        found, header, checksum = _read_header(fd, key, model)
        if found != form or not _fill(fd, content, _START.size + len(header)):
            raise _DamagedError(os.fstat(fd).st_size)
    if _checksum(header, [content]) != checksum:
        raise _DamagedError(_START.size + len(header) + len(content))
    return content


def _read_header(fd: int, key: bytes, model: str) -> tuple[Form, bytes, int]:
    """The form a block's file claims to have, if its size and all else agree; its header, and the sum over all."""
    size = os.fstat(fd).st_size
    try:
        magic, checksum, length = _START.unpack(os.pread(fd, _START.size, 0))
        if magic != _MAGIC or length > _MAX_HEADER_BYTES:
            raise ValueError
        header = os.pread(fd, length, _START.size)
        entries = json.loads(header)
        form = _form(**entries.pop("form"))
        if entries != {"model": model, "key": key.hex()}:
            raise ValueError
        if size != _START.size + length + BLOCK_TOKENS * form.token_bytes:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        raise _DamagedError(size) from None
    return form, header, checksum


def _form(name: str, settings: list[int], layers: int, arrays: list[list[Any]]) -> Form:
    numbers = [*settings, layers, *(number for _, *sizes in arrays for number in sizes)]
    if name not in CLASSES or len(arrays) not in (2, 6) or not {dtype for dtype, *_ in arrays} <= DTYPES.keys():
        raise ValueError
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in numbers) or not layers:
        raise ValueError
    return Form(name, tuple(settings), layers, tuple((dtype, heads, width) for dtype, heads, width in arrays))


def _fill(fd: int, content: memoryview, offset: int) -> bool:
    """Read from `offset` on; False where the file is too short."""
    while content:
        count = os.preadv(fd, [content], offset)
        if count == 0:
            return False
        content, offset = content[count:], offset + count
    return True


def _copy(content: memoryview, pieces: Iterable[memoryview]) -> None:
    """Spread `content` over `pieces`."""
    at = 0
    for piece in pieces:
        piece[:] = content[at : at + piece.nbytes]
        at += piece.nbytes


def _is_there(block: Future[bool]) -> bool:
    try:
        return block.result()
    except CancelledError:
        return False


def _checksum(header: bytes, pieces: Iterable[memoryview]) -> int:
    checksum = zlib.crc32(header, len(header))
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return checksum


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    # Not blocking, so that a pipe with a block's name cannot hang the request.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileNotFoundError
        yield fd
    finally:
        os.close(fd)


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _name(key: bytes) -> str:
    return key.hex() + SUFFIX


def _time_of(n: int, now: int) -> int:
    """Time of last use of a prompt's block `n`: later ones are older, so that they go first."""
    return now - n * 1000


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
