"""A server for the page that plays what it is told: it gives out the page with its policy and streams scripted replies.

Every request is written down. What a script waits for is released by the test, so nothing depends on time."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mixtral_mlx import page

MEMORY = {
    "budget_bytes": 28_000_000_000,
    "process_bytes": 26_300_000_000,
    "mlx_bytes": 25_900_000_000,
    "mlx_cache_bytes": 400_000_000,
    "weights_bytes": 24_600_000_000,
    "kv_limit_bytes": 1_100_000_000,
    "prefix_bytes": 210_000_000,
}


@dataclass(frozen=True)
class Comment:
    """A line that clients may skip; ours tells how much of the prompt has been read."""

    text: str


@dataclass(frozen=True)
class Failure:
    """An error inside the stream, which then ends."""

    error: Mapping[str, Any]


class Hold:
    """The stream waits here until the test says go on, or the client leaves."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.released = threading.Event()
        self.client_left = threading.Event()

    def wait(self, connection: socket.socket) -> None:
        self.reached.set()
        while not self.released.is_set():
            readable, _, _ = select.select([connection], [], [], 0.02)
            if readable and not connection.recv(1, socket.MSG_PEEK):
                self.client_left.set()
                raise ConnectionResetError


@dataclass(frozen=True)
class Play:
    """One answer. Another `status` than 200 comes with `error` and `headers`; no `finish`: the stream is cut off."""

    steps: Sequence[str | Comment | Failure | Hold] = ()
    status: int = 200
    error: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    finish: str | None = "stop"
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any = None


class PageServer(ThreadingHTTPServer):
    """Plays `plays` in order, then answers with the number of the reply. With a `key` all but the page asks for it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plays: deque[Play] = deque()
        self.asked: list[Asked] = []
        self.key: str | None = None
        self.routing: dict[str, Any] | None = None
        self.loading: deque[int] = deque()
        self.models = ["mixtral-8x7b-instruct-q4"]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    @property
    def bodies(self) -> list[Any]:
        """What was asked of the model."""
        return [asked.body for asked in self.asked if asked.path == "/v1/chat/completions"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are part of the play."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._note()
        file = page.FOLDER / (self.path[1:] or "index.html")
        if file.parent == page.FOLDER and file.suffix in page.MEDIA_TYPES and file.is_file():
            self._answer(200, file.read_bytes(), page.MEDIA_TYPES[file.suffix])
        elif self.path == "/health":
            self._json(200, {"status": "ok", "state": "ready"})
        elif not self._has_key():
            self._unauthorized()
        elif self.path == "/v1/models" and self.server.loading:
            so_far = self.server.loading.popleft()
            self._json(503, {"error": {"message": f"The model is being loaded: {so_far} %.", "code": "loading"}})
        elif self.path == "/v1/models":
            models = [{"id": name, "object": "model"} for name in self.server.models]
            self._json(200, {"object": "list", "data": models})
        elif self.path == "/stats":
            self._json(200, {"memory": MEMORY, "requests": {"finished": 12}, "experts": {"hits": 930, "misses": 70}})
        elif self.path == "/routing" and self.server.routing:
            self._json(200, self.server.routing)
        else:
            self._json(404, {"error": {"message": f"There is no {self.path} here.", "code": "not_found"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._note(body)
        if not self._has_key():
            return self._unauthorized()
        play = self.server.plays.popleft() if self.server.plays else Play([f"Reply {len(self.server.bodies)}."])
        if play.status != 200:
            return self._json(play.status, {"error": play.error}, play.headers)
        return self._stream(play)

    def _stream(self, play: Play) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for piece in _events(play, self.connection):
            self.wfile.write(piece)
            self.wfile.flush()

    def _note(self, body: Any = None) -> None:
        self.server.asked.append(Asked(self.command, self.path, dict(self.headers), body))

    def _has_key(self) -> bool:
        return self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}"

    def _unauthorized(self) -> None:
        self._json(401, {"error": {"message": "The API key is missing or wrong.", "code": "invalid_api_key"}})

    def _json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), "application/json", headers)

    def _answer(self, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", page.CONTENT_SECURITY_POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _events(play: Play, connection: socket.socket) -> Iterator[bytes]:
    pieces = 0
    for step in play.steps:
        match step:
            case str():
                pieces += 1
                yield _data({"choices": [{"index": 0, "delta": {"content": step}, "finish_reason": None}]})
            case Comment():
                yield f": {step.text}\n\n".encode()
            case Failure():
                yield _data({"error": step.error})
                return
            case Hold():
                step.wait(connection)
    if play.finish is None:
        return
    yield _data({"choices": [{"index": 0, "delta": {}, "finish_reason": play.finish}]})
    usage = {
        "prompt_tokens": 41,
        "completion_tokens": pieces,
        "total_tokens": 41 + pieces,
        "prompt_tokens_details": {"cached_tokens": 12},
    }
    yield _data({"choices": [], "usage": usage, "timings": dict(play.timings)})
    yield b"data: [DONE]\n\n"


def _data(value: Any) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


@contextmanager
def page_server() -> Iterator[PageServer]:
    """A running one, gone at the end."""
    server = PageServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
