"""A server for tests: on a free port in a thread of its own, and clients that say exactly what they are told to."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mixtral_mlx.engine.engine import Engine
from mixtral_mlx.server.app import Model, create_app
from mixtral_mlx.server.log import Log
from mixtral_mlx.server.serve import Server, listening
from mixtral_mlx.server.settings import ServerSettings

JSON = "Content-Type: application/json\r\n"
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Served:
    """A running server."""

    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=8)

    def get(self, path: str, headers: str = "") -> Answer:
        """One request on a connection of its own."""
        with self.connect() as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode())
            return next(answers(client))

    def post(self, path: str, body: Any, headers: str = "") -> Answer:
        with self.connect() as client:
            client.sendall(posted(body, path=path, headers=headers))
            return next(answers(client))


@contextmanager
def served(model: Engine | Model, log: Log | None = None, *, send_buffer: int = 0, **settings: Any) -> Iterator[Served]:
    """A server on a free port of this machine; `send_buffer` is how much the system holds of what is sent."""
    made = ServerSettings(**settings)
    with serving(create_app(model, made, log), made, send_buffer) as running:
        yield running


@contextmanager
def serving(app: Any, settings: ServerSettings, send_buffer: int = 0) -> Iterator[Served]:
    """The same for an application that is made already."""
    sockets = listening("127.0.0.1", 0, None)
    if send_buffer:
        sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = sockets[0].getsockname()[1]
    server = Server(app, settings)
    thread = threading.Thread(target=server.run, args=[sockets])
    thread.start()
    try:
        yield Served(server, port)
    finally:
        server.end()
        thread.join(20)
        assert not thread.is_alive()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The stable code of an error."""
        return self.json["error"]["code"]


def posted(body: Any, *, path: str = CHAT, headers: str = "", host: str = "localhost") -> bytes:
    """A request with a JSON body: an object, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{JSON}Content-Length: {len(data)}\r\n{headers}\r\n"
    return head.encode("latin-1") + data


def answers(client: socket.socket, *, to_head: bool = False) -> Iterator[Answer]:
    """The answers that come on a connection, until the server closes it."""
    with client.makefile("rb") as file:
        while line := file.readline():
            status = int(line.split()[1])
            headers = {}
            while line := file.readline().strip():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
            if status == 100:
                continue
            yield Answer(status, headers, b"" if to_head or status == 204 else _body(file, headers))


def _body(file: Any, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return file.read(int(headers.get("content-length", "0")))
    parts = []
    while size := int(file.readline() or b"0", 16):
        parts.append(file.read(size))
        file.readline()
    file.readline()
    return b"".join(parts)


def events(stream: bytes) -> list[tuple[str | None, str]]:
    """What an event stream says, by the standard's rules: each event's name and data. Comments are skipped."""
    found: list[tuple[str | None, str]] = []
    name: str | None = None
    data: list[str] = []
    for line in stream.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                found.append((name, "\n".join(data)))
            name, data = None, []
        elif key == "data":
            data.append(value)
        elif key == "event":
            name = value
    return found
