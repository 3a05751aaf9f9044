"""A small server that behaves like the Hugging Face hub, and misbehaves as it is told.

Large files are not given out by the hub itself: it sends the client to a second server under another host name, as the
real one does. Both write down every request. Faults are asked for by file, one for each request for its bytes."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_only_for_the_hub"
LARGE_BYTES = 10_000
"""From this size on a file is in LFS: it has a sha256 and lies on the other host."""


@dataclass
class Repo:
    """A repository: its files, and who may have them."""

    files: dict[str, bytes]
    commit: str = "c" * 40
    gated: bool = False
    private: bool = False
    moved_to: str = ""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer.

    `kind`: "cut" (after `at` more bytes), "reset" (the same, rudely), "short" (claims to be whole), "status",
    "no range" (all of the file instead), "wrong range", "wrong total", "flip" (one bit), "etag" (another one, and other
    bytes)."""

    kind: str
    at: int = 0
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"


@dataclass(frozen=True)
class Request:
    """A request as it came: `host` is "hub" or "files"."""

    host: str
    method: str
    path: str
    headers: dict[str, str]


class HubServer:
    """The two servers, what they hold, what they were asked, and how many bytes of files they sent."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.requests: list[Request] = []
        self.sent: dict[str, int] = defaultdict(int)
        self.on_sent: Callable[[str, int], None] = lambda path, count: None
        self.lock = threading.Lock()
        self.hub = _Server(self, "hub")
        self.files = _Server(self, "files")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.hub.server_port}"

    @property
    def files_url(self) -> str:
        return f"http://localhost:{self.files.server_port}"

    def fault(self, path: str, *faults: Fault) -> None:
        self.faults[path].extend(faults)

    def next_fault(self, path: str) -> Fault:
        with self.lock:
            return self.faults[path].popleft() if self.faults[path] else Fault("none")

    def count(self, path: str, nbytes: int) -> None:
        with self.lock:
            self.sent[path] += nbytes
            total = self.sent[path]
        self.on_sent(path, total)

    def asked(self, host: str) -> list[Request]:
        return [request for request in self.requests if request.host == host]


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run both servers on free ports."""
    server = HubServer()
    threads = [threading.Thread(target=part.serve_forever, args=(0.02,)) for part in (server.hub, server.files)]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        for part in (server.hub, server.files):
            part.shutdown()
            part.server_close()
        for thread in threads:
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, shared: HubServer, name: str) -> None:
        self.shared = shared
        self.name = name
        super().__init__(("127.0.0.1", 0), _Handler)

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        connection, address = super().get_request()
        # Little is under way when a client stops reading, so that what was sent is what was received.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
        return connection, address

    def handle_error(self, *_: object) -> None:
        pass  # Clients that are killed or stop reading are what these tests are about.


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        shared = self.server.shared
        parts = urlsplit(self.path)  # A proxy is asked with the whole address.
        path = unquote(parts.path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        shared.requests.append(Request(self.server.name, self.command, self.path, headers))
        if path.startswith("/files/"):
            return self.file(path.removeprefix("/files/"), whole_etag=False)
        if path.startswith("/api/models/"):
            return self.api(path.removeprefix("/api/models/"))
        name, _, rest = path.strip("/").partition("/resolve/")
        commit, _, file = rest.partition("/")
        if (repo := self.repo(name)) is None:
            return None
        if repo.moved_to:
            return self.answer(307, b"", {"Location": f"/{repo.moved_to}/resolve/{rest}"})
        if commit not in ("main", repo.commit):
            return self.refuse(404, "RevisionNotFound")
        if repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        if file not in repo.files:
            return self.refuse(404, "EntryNotFound")
        data = repo.files[file]
        if len(data) < LARGE_BYTES:
            return self.file(f"{name}/{file}", whole_etag=True)
        sha256 = hashlib.sha256(data).hexdigest()
        return self.answer(
            302,
            b"",
            {
                "Location": f"{shared.files_url}/files/{name}/{file}?signature=s",
                "X-Repo-Commit": repo.commit,
                "X-Linked-Etag": f'"{sha256}"',
                "X-Linked-Size": str(len(data)),
                "ETag": f'"{sha256}"',
            },
        )

    do_HEAD = do_GET  # noqa: N815

    def repo(self, name: str) -> Repo | None:
        authorization = self.headers.get("Authorization")
        repo = self.server.shared.repos.get(name)
        if authorization not in (None, f"Bearer {TOKEN}") and not (repo and repo.gated):
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and authorization is None):
            self.refuse(401 if authorization is None else 404, "RepoNotFound")
        else:
            return repo
        return None

    def api(self, path: str) -> None:
        name, call, revision = next(
            (path.partition(f"/{call}/")[0], call, path.partition(f"/{call}/")[2])
            for call in ("revision", "tree", "none")
            if f"/{call}/" in path or call == "none"
        )
        fault = self.server.shared.next_fault(f"api/{name}")
        if fault.kind == "status":
            return self.answer(fault.status, fault.body, fault.headers)
        if (repo := self.repo(name)) is None:
            return None
        if revision not in ("main", repo.commit):
            return self.refuse(404, "RevisionNotFound")
        entries = [_entry(path, data) for path, data in repo.files.items()]
        if call == "tree":
            return self.answer(200, json.dumps([_tree_entry(entry) for entry in entries]).encode())
        info = {"id": name, "sha": repo.commit, "siblings": entries, "private": repo.private, "gated": repo.gated}
        return self.answer(200, json.dumps(info).encode())

    def file(self, path: str, *, whole_etag: bool) -> None:
        """Give out a file's bytes, in the way its next fault says."""
        shared = self.server.shared
        repo, file = next((r, path[len(name) + 1 :]) for name, r in shared.repos.items() if path.startswith(f"{name}/"))
        data = repo.files[file]
        etag = _git_hash(data) if whole_etag else hashlib.md5(data).hexdigest()
        fault = shared.next_fault(file) if self.command == "GET" else Fault("none")
        if fault.kind == "status":
            return self.answer(fault.status, b"no", fault.headers)
        if fault.kind == "flip":
            at = min(fault.at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if fault.kind == "etag":
            data, etag = data[::-1], hashlib.md5(data[::-1]).hexdigest()
        wanted = self.headers.get("Range")
        start, stop = 0, len(data)
        if wanted and fault.kind != "no range":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(len(data), int(last) + 1 if last else len(data))
            if start >= len(data):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        self.send_response(200 if not wanted or fault.kind == "no range" else 206)
        if wanted and fault.kind != "no range":
            if fault.kind == "wrong range":
                start = fault.at
            total = fault.at if fault.kind == "wrong total" else len(data)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        if fault.kind == "short":
            stop = min(stop, start + fault.at)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{etag}"')
        if whole_etag:
            self.send_header("X-Repo-Commit", repo.commit)
        self.end_headers()
        if self.command == "GET":
            self.send(file, data[start:stop], fault)
        return None

    def send(self, file: str, body: bytes, fault: Fault) -> None:
        cut = fault.kind in ("cut", "reset")
        body = body[: fault.at] if cut else body
        for start in range(0, len(body), 16 << 10):
            piece = body[start : start + (16 << 10)]
            self.wfile.write(piece)
            self.server.shared.count(file, len(piece))
        if fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = cut

    def refuse(self, status: int, code: str, message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        self.answer(status, b"{}", {**headers, "X-Error-Message": message or "no"})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, object]:
    lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    entry: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": _git_hash(data)}
    return entry | ({"lfs": lfs} if len(data) >= LARGE_BYTES else {})


def _tree_entry(entry: dict[str, object]) -> dict[str, object]:
    lfs = entry.get("lfs")
    shared = {"type": "file", "path": entry["rfilename"], "size": entry["size"], "oid": entry["blobId"]}
    if isinstance(lfs, dict):
        shared["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    return shared
