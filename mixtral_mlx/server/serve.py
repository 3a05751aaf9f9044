"""The command `serve`: sockets, loading while it listens already, signals, and an end within three seconds."""

from __future__ import annotations

import asyncio
import errno
import functools
import itertools
import os
import resource
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette

from .. import protocol
from ..config import MixtralError
from ..engine.engine import Engine, load
from ..opening import ModelChoice, fetching
from ..terminal import Bar
from .app import Model, create_app
from .http1 import Connection
from .log import Log
from .settings import ServerError, ServerSettings

_END_WITHIN_S = 2.3
_LAST_WORDS_S = 1.0
_OPEN_FILES = 4096
_BACKLOG = 2048


@dataclass(frozen=True)
class Request:
    """What `serve` was asked: which model, how it answers, where it listens and who may ask."""

    choice: ModelChoice
    settings: ServerSettings = field(default_factory=ServerSettings)
    port: int = 8080
    uds: Path | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    """What `engine.load` takes besides the model."""


def serve(request: Request) -> int:
    """Serve until a signal ends it; returns the exit code. Raises `MixtralError` where it cannot begin."""
    quiet = request.choice.quiet
    sockets = listening(request.settings.host, request.port, request.uds)
    allow_open_files()
    model, log = Model(), Log(quiet=quiet)
    server = Server(create_app(model, request.settings, log), request.settings)
    where = url(sockets[0], request.settings)
    loading = _Loading(request, model, server, log, lambda engine: _say_ready(engine, where))
    try:
        with server.signals():
            if not quiet:
                print(f"Listening at {where}; requests are answered once the model is loaded.", file=sys.stderr)
            loading.start()
            server.run(sockets)
            loading.end()
    finally:
        if request.uds:
            request.uds.unlink(missing_ok=True)
    return 0


def _say_ready(engine: Engine, where: str) -> None:
    with suppress(OSError):  # Nobody reads, which is no reason not to serve.
        print(f"Ready: {protocol.model(engine)['id']} at {where}", flush=True)


class Server(uvicorn.Server):
    """uvicorn's, serving `app` on sockets that are bound already; `end` may be called from any thread."""

    def __init__(self, app: Starlette, settings: ServerSettings) -> None:
        config = uvicorn.Config(
            app,
            http=cast(Any, functools.partial(Connection, settings=settings)),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # What it would say is in our own log.
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=cast(int, settings.idle_s),
            timeout_graceful_shutdown=cast(int, _LAST_WORDS_S),
        )
        super().__init__(config)
        self._app = app
        self._signals = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.stop()
        await super().shutdown(sockets)
        if tasks := self.server_state.tasks:  # They were cancelled, and still say so to their clients.
            await asyncio.wait(tasks, timeout=_LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            cast(Connection, connection).transport.abort()
        await asyncio.sleep(0)

    def end(self) -> None:
        """Take no more requests, let those that run say a last word, and return from `run`."""
        self.should_exit = True
        if self._loop:
            with suppress(RuntimeError):  # It has ended already.
                self._loop.call_soon_threadsafe(self._app.state.stop)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While entered, SIGTERM or Ctrl-C ends the server, and a second one the process at once."""
        before = {number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        # Counted in one step: the second one may come in the middle of this.
        if next(self._signals) or self.should_exit:
            os._exit(128 + number)
        late = threading.Timer(_END_WITHIN_S, os._exit, [0])
        late.daemon = True
        late.start()
        self.end()


class _Loading:
    """Loads the model on a thread of its own, so that the server can answer meanwhile."""

    def __init__(
        self, request: Request, model: Model, server: Server, log: Log, on_ready: Callable[[Engine], None]
    ) -> None:
        self._request = request
        self._model = model
        self._server = server
        self._log = log
        self._on_ready = on_ready
        self._error: MixtralError | None = None
        self._done = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._load, name="mixtral-load", daemon=True).start()

    def end(self) -> None:
        """Let go of the model, once it is certain that there is one or none. Raises what loading did."""
        self._done.wait()
        if self._model.engine:
            self._model.engine.close()
        if self._error and self._error.code != "cancelled":
            raise self._error

    def _load(self) -> None:
        choice = self._request.choice
        try:
            with (
                fetching(quiet=choice.quiet) as show_fetched,
                Bar("Loading", quiet=choice.quiet, at_least=1 << 27, size="bytes") as bar,
            ):

                def fetched(done: int, total: int) -> None:
                    self._model.done, self._model.total = done, total
                    show_fetched(done, total)

                def progress(done: int, total: int) -> None:
                    self._model.done, self._model.total = done, total
                    bar(done, total)

                engine = load(
                    choice.name,
                    memory=choice.memory_bytes,
                    context=choice.context,
                    dtype=choice.dtype,
                    kv_bits=choice.kv_bits,
                    offline=choice.offline,
                    progress=progress,
                    fetching=fetched,
                    cancelled=lambda: self._server.should_exit,
                    on_warning=self._log.complain,
                    share=choice.share,
                    **self._request.engine,
                )
            # The first conversation takes longer, and so do the first tokens where products are compiled.
            with suppress(MixtralError):
                engine.chat("Hello", max_tokens=1).result()
            self._model.engine = engine
            self._on_ready(engine)
        except BaseException as error:
            # Whatever it is, nothing will come: better no server than one that is never ready.
            self._error = error if isinstance(error, MixtralError) else _cannot_load(error)
            self._server.end()
        finally:
            self._done.set()


def _cannot_load(error: BaseException) -> ServerError:
    return ServerError(
        f"The model could not be loaded: {type(error).__name__}: {error}",
        code="load_failed",
        hint="If that is no fault of this machine's, please report it.",
    )


# Sockets.


def listening(host: str, port: int, uds: Path | None) -> list[socket.socket]:
    """Sockets bound to where the server is to listen. Raises `ServerError`."""
    if uds:
        return [_unix_socket(uds)]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ServerError(
            f"The host {host!r} is no address of this machine: {error}.", code="bad_host", hint="127.0.0.1 is."
        ) from None
    sockets: list[socket.socket] = []
    for family, _, _, _, address in dict.fromkeys(found):
        sockets.append(_tcp_socket(family, (address[0], port or _port_of(sockets), *address[2:])))
    return sockets


def _port_of(sockets: Sequence[socket.socket]) -> int:
    return sockets[0].getsockname()[1] if sockets else 0


def _tcp_socket(family: int, address: tuple[Any, ...]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise _cannot_listen(f"{address[0]}, port {address[1]}", error, "--port 0 takes a free one.") from None
    return made


def _unix_socket(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_left_over(path)
        made.bind(str(path))
        path.chmod(0o600)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise _cannot_listen(str(path), error, "Give another --uds PATH.") from None
    return made


def _remove_left_over(path: Path) -> None:
    """Remove the socket of a server that is no more; nothing else."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


def _cannot_listen(where: str, error: OSError, hint: str) -> ServerError:
    if error.errno == errno.EADDRINUSE:
        return ServerError(f"Another program listens at {where} already.", code="port_taken", hint=hint)
    return ServerError(f"Cannot listen at {where}: {error.strerror or error}.", code="cannot_listen", hint=hint)


def url(sock: socket.socket, settings: ServerSettings) -> str:
    """Where a client finds the server."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def allow_open_files() -> None:
    """Let the process have enough of them: each connection is one, and macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _OPEN_FILES:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES if hard < 0 else min(_OPEN_FILES, hard), hard))
