"""The HTTP server: who may ask, what is refused and how, and answers that end as they should, whatever clients do."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from mixtral_mlx import page
from mixtral_mlx.cli import main
from mixtral_mlx.config import MixtralError
from mixtral_mlx.engine.engine import Engine, load
from mixtral_mlx.engine.request import Done, EngineError, PromptProgress, Token
from mixtral_mlx.generate import Usage
from mixtral_mlx.opening import ModelChoice
from mixtral_mlx.protocol import PARSERS
from mixtral_mlx.server import serve as serving
from mixtral_mlx.server import sse
from mixtral_mlx.server.app import Model, create_app
from mixtral_mlx.server.log import Log
from mixtral_mlx.server.serve import Server, listening
from mixtral_mlx.server.settings import ServerError, ServerSettings

from .serving import CHAT, JSON, Answer, Served, answers, events, posted, served

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
ENDLESS = {**HELLO, "max_tokens": 3000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load(max_concurrent=4, max_queue=40) as engine:
        engine.complete([1] * 17, max_tokens=2).result()  # Compiles kernels, for which no client here would wait.
        yield engine


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Served]:
    with served(engine, waiting_s=0.05) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(engine: Engine) -> Iterator[Served]:
    """A server that does not wait long for what it has been promised."""
    with served(engine, headers_s=0.3, body_s=0.3) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_left_running(engine: Engine) -> Iterator[None]:
    yield
    assert until(lambda: engine.health().running == engine.health().queued == 0)


def chunks(answer: Answer) -> list[Any]:
    """The objects of a stream, which ends as OpenAI's do."""
    *said, last = [data for _, data in events(answer.body)]
    assert last == "[DONE]"
    return [json.loads(data) for data in said]


def until(true: Callable[[], bool], timeout_s: float = 10) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + timeout_s
    while not true() and time.monotonic() < end:
        time.sleep(0.002)
    return true()


# On the wire. Expected statuses are those of RFC 9110, 9112 and 6585.

GET = "GET {} HTTP/1.1\r\nHost: localhost\r\n{}\r\n"
SMALL = json.dumps(HELLO)
LONG = 33 << 20


def get(path: str = "/health", headers: str = "") -> bytes:
    return GET.format(path, headers).encode("latin-1")


def at(address: str, *, host: str) -> bytes:
    return f"GET http://{address}/health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def head(*headers: str, path: str = CHAT) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def chunked(*parts: str) -> bytes:
    body = "".join(f"{len(part):x}\r\n{part}\r\n" for part in (*parts, ""))
    return head("Transfer-Encoding: chunked") + body.encode()


@dataclass(frozen=True)
class Wire:
    """Bytes of a client, the statuses it gets for them, and whether it may go on on the same connection."""

    name: str
    sent: bytes
    statuses: tuple[int, ...]
    stays: bool = False
    to_head: bool = field(default=False, kw_only=True)
    ends: bool = field(default=False, kw_only=True)  # The client sends no more, and says so.


WIRE = [
    Wire("a plain request", get(), (200,), True),
    Wire("a trailing question mark", get("/v1/models?"), (200,), True),
    Wire("an unknown query", get("/v1/models?colour=3"), (400,), True),
    Wire("a whole address", get("http://127.0.0.1:8000/v1/models"), (200,), True),
    Wire("a whole address in capitals", get("HTTP://LOCALHOST/v1/models?limit=1"), (200,), True),
    Wire("a whole address without a path", get("http://localhost"), (200,), True),
    Wire("a whole address with nothing but a query", get("http://localhost?a=1"), (200,), True),
    Wire("a whole address after a foreign Host", at("localhost", host="evil.example"), (200,), True),
    Wire("a foreign address", at("evil.example", host="localhost"), (403,), True),
    Wire("a whole address with a name before it", get("http://localhost@evil.example/health"), (403,), True),
    Wire("an address of nobody", get("http:///health"), (400,), True),
    Wire("a whole address and no Host", b"GET http://localhost/health HTTP/1.1\r\n\r\n", (400,)),
    Wire("an address of another scheme", get("https://localhost/health"), (421,)),
    Wire("a part of the models", get("/v1/models?limit=20&beta=true"), (200,), True),
    Wire("a part of no length", get("/v1/models?limit=0"), (400,), True),
    Wire("HEAD", b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n", (200,), True, to_head=True),
    Wire(
        "HEAD where only POST is",
        b"HEAD " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        (405,),
        True,
        to_head=True,
    ),
    Wire("OPTIONS", b"OPTIONS /health HTTP/1.1\r\nHost: localhost\r\n\r\n", (204,), True),
    Wire(
        "OPTIONS where only POST is",
        b"OPTIONS " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        (204,),
        True,
    ),
    Wire("GET where only POST is", get(CHAT), (405,), True),
    Wire("PUT with a body", head("Content-Length: 2").replace(b"POST", b"PUT") + b"{}", (405,)),
    Wire("DELETE", b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", (405,), True),
    Wire("TRACE", b"TRACE /health HTTP/1.1\r\nHost: localhost\r\n\r\n", (405,), True),
    Wire("CONNECT", b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", (404,), True),
    Wire("a method of no kind", b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n", (405,), True),
    Wire("a path of no kind", get("/nothing"), (404,), True),
    Wire("a path that climbs", get("/../../etc/passwd"), (404,), True),
    Wire("NUL in a path", get("/health%00"), (404,), True),
    Wire("a path that is not ASCII", get("/h\xe9alth"), (400,)),
    Wire("a path in percents", get("/%68ealth"), (200,), True),
    Wire("HTTP/1.0", b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n", (200,)),
    Wire("HTTP/1.0 without Host", b"GET /health HTTP/1.0\r\n\r\n", (400,)),
    Wire("no Host", b"GET /health HTTP/1.1\r\n\r\n", (400,)),
    Wire("two Hosts", get(headers="Host: localhost\r\n"), (400,)),
    Wire("a foreign Host", b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", (403,), True),
    Wire("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (505,)),
    Wire("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n", (400,)),
    Wire("no HTTP", b"hello, is anybody there?\r\n\r\n", (400,)),
    Wire("a header without a colon", get(headers="nonsense\r\n"), (400,)),
    Wire("a space before the colon", get(headers="X-Name : 1\r\n"), (400,)),
    Wire("NUL in a header", get(headers="X-Name: a\0b\r\n"), (400,)),
    Wire("a websocket", get(headers="Connection: Upgrade\r\nUpgrade: websocket\r\n"), (200,), True),
    Wire("a header of 64 KiB", get(headers=f"X-Long: {'x' * 65536}\r\n"), (431,)),
    Wire("a path of 64 KiB", get("/" + "x" * 65536), (431,)),
    Wire("101 headers", get(headers="".join(f"X-{k}: 1\r\n" for k in range(101))), (431,)),
    Wire("headers that do not end", get()[:-2], (408,)),
    Wire("a request line that does not end", b"GET /health HT", (408,)),
    Wire("nothing at all", b"", ()),
    Wire("no length and no body", head(), (400,), True),
    Wire("a negative length", head("Content-Length: -1"), (400,)),
    Wire("a length of 2^63", head(f"Content-Length: {1 << 63}"), (413,)),
    Wire("a length of 2^64", head(f"Content-Length: {1 << 64}"), (413,)),
    Wire("a length of 10^30", head(f"Content-Length: {10**30}"), (400,)),
    Wire("a length with a plus", head("Content-Length: +2") + b"{}", (400,)),
    Wire("a length that is no number", head("Content-Length: two") + b"{}", (400,)),
    Wire("two lengths", head("Content-Length: 2", "Content-Length: 3") + b"{}", (400,)),
    Wire("one length twice", head("Content-Length: 2", "Content-Length: 2") + b"{}", (400,), True),
    Wire(
        "length and chunks", head("Content-Length: 2", "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n", (400,)
    ),
    Wire("chunks", chunked(SMALL[:20], SMALL[20:]), (200,), True),
    Wire("a chunk without a size", head("Transfer-Encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n", (400,)),
    Wire("a chunk of a negative size", head("Transfer-Encoding: chunked") + b"-2\r\n{}\r\n0\r\n\r\n", (400,)),
    Wire("chunks that do not end", head("Transfer-Encoding: chunked") + b"2\r\n{}\r\n", (408,)),
    Wire("chunks in gzip", head("Transfer-Encoding: gzip, chunked") + b"2\r\n{}\r\n0\r\n\r\n", (501,)),
    Wire("a body that does not end", head("Content-Length: 100") + b"{", (408,)),
    Wire("a body that is cut off", head("Content-Length: 100") + b"{", (), ends=True),
    Wire("a body of 65 MiB", head(f"Content-Length: {65 << 20}") + bytes(65 << 20), (413,)),
    Wire("chunks of 33 MiB", chunked(*["x" * (1 << 20)] * 33), (413,)),
    Wire(
        "a wait for 100", head(f"Content-Length: {len(SMALL)}", "Expect: 100-continue") + SMALL.encode(), (200,), True
    ),
    Wire("a wait for 100, too long", head(f"Content-Length: {LONG}", "Expect: 100-continue"), (413,)),
    Wire("no content type", head("Content-Length: 2").replace(JSON.encode(), b"") + b"{}", (415,)),
    Wire("a form", head("Content-Length: 2").replace(b"application/json", b"text/plain") + b"{}", (415,)),
    Wire(
        "a charset",
        head(f"Content-Length: {len(SMALL)}").replace(b"json", b"json; charset=UTF-8") + SMALL.encode(),
        (200,),
        True,
    ),
    Wire(
        "a charset of another kind",
        head("Content-Length: 2").replace(b"json", b"json; charset=latin-1") + b"{}",
        (415,),
    ),
    Wire("a compressed body", head("Content-Length: 2", "Content-Encoding: gzip") + b"{}", (415,)),
    Wire("an empty body", posted(b""), (400,), True),
    Wire("bytes that are no UTF-8", posted(b'{"messages": "\xff"}'), (400,), True),
    Wire("UTF-16", posted(SMALL.encode("utf-16")), (400,), True),
    Wire("half of a surrogate pair", posted(b'{"messages":[{"role":"user","content":"\\ud83d"}]}'), (400,), True),
    Wire("NaN", posted(SMALL.replace('"temperature": 0', '"temperature": NaN').encode()), (400,), True),
    Wire(
        "a number beyond a float",
        posted(SMALL.replace('"temperature": 0', '"temperature": 1e999').encode()),
        (400,),
        True,
    ),
    Wire(
        "a number of 5,000 digits",
        posted(SMALL.replace('"temperature": 0', f'"seed": {"9" * 5000}').encode()),
        (400,),
        True,
    ),
    Wire("a name given twice", posted(SMALL.replace("{", '{"max_tokens": 5, ', 1).encode()), (400,), True),
    Wire("100,000 brackets", posted(b"[" * 100_000), (400,), True),
    Wire("a list", posted([HELLO]), (400,), True),
    Wire("two objects", posted(SMALL.encode() * 2), (400,), True),
    Wire("two requests at once", get() + get("/v1/models"), (200, 200), True),
    Wire("a request after a 404", get("/nothing") + get(), (404, 200), True),
    Wire("a request after a bad body", posted(b"{") + get(), (400, 200), True),
    Wire("a request after a body too long", head(f"Content-Length: {LONG}") + get(), (413,)),
    Wire("a request after what is none", b"nonsense\r\n\r\n" + get(), (400,)),
    Wire(
        "a request smuggled in a body",
        head("Content-Length: 2", "Transfer-Encoding: chunked") + b"0\r\n\r\n" + get(),
        (400,),
    ),
]


def test_the_table_of_what_comes_over_the_wire_has_60_cases() -> None:
    assert len({case.name for case in WIRE}) == len(WIRE) >= 60


@pytest.mark.parametrize("case", WIRE, ids=lambda case: case.name)
def test_whatever_comes_over_the_wire_has_its_status_and_hurts_no_one(
    server: Served, hasty: Served, case: Wire
) -> None:
    if 408 in case.statuses or not case.sent:
        server = hasty
    with server.connect() as client:
        sending = threading.Thread(target=_sent, args=[client, case.sent])
        sending.start()
        if case.ends:
            sending.join()
            client.shutdown(socket.SHUT_WR)
        got = answers(client, to_head=case.to_head)
        assert [next(got).status for _ in case.statuses] == list(case.statuses)
        if case.stays:
            client.sendall(get())
            assert next(answers(client)).status == 200
        else:
            assert next(got, None) is None
        sending.join()
    assert server.get("/health").status == 200


def _sent(client: socket.socket, data: bytes) -> None:
    with suppress(ConnectionError, TimeoutError):  # The server has heard enough.
        client.sendall(data)


# Who may ask. The tables say what is expected, not how it is found out.

SELF = ("localhost", "localhost:8080", "LOCALHOST.", "127.0.0.1", "127.0.0.1:8080", "127.8.9.1", "[::1]", "[::1]:8080")
FOREIGN = (
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.nip.io",
    "127.0.0.1@evil.example",
    "localhost:x",
    "[::1",
    "a b",
)
LAN = ("192.168.1.5", "192.168.1.5:8080", "[fd00::5]")
HOSTS = (*SELF, *FOREIGN, *LAN, "0.0.0.0", "0.0.0.0:8080", "mac.example", "mac.example:8080")

BINDS: list[tuple[dict[str, Any], set[str]]] = [
    ({"host": "127.0.0.1"}, {*SELF, "0.0.0.0", "0.0.0.0:8080"}),
    ({"host": "::1"}, {*SELF, "0.0.0.0", "0.0.0.0:8080"}),
    ({"host": "localhost"}, {*SELF, "0.0.0.0", "0.0.0.0:8080"}),
    ({"host": "0.0.0.0", "api_key": "k"}, {*SELF, *LAN, "0.0.0.0", "0.0.0.0:8080"}),
    ({"host": "192.168.1.5", "api_key": "k"}, {"192.168.1.5", "192.168.1.5:8080"}),
    (
        {"host": "127.0.0.1", "allow_hosts": ("mac.example",)},
        {*SELF, "0.0.0.0", "0.0.0.0:8080", "mac.example", "mac.example:8080"},
    ),
]
"""How a server is bound, and what it may be called then."""

ALLOWED = "https://app.example"
ORIGINS = (None, "same", "null", "https://evil.example", "http://localhost.evil.example", "https", "", ALLOWED)
WELCOME = {None, "same", ALLOWED}
KINDS = {
    "application/json": True,
    "application/json; charset=utf-8": True,
    'Application/JSON;charset="UTF-8"': True,
    "text/plain": False,
    "application/x-www-form-urlencoded": False,
    "application/jsonp": False,
    "text/plain; application/json": False,
    "": False,
}


HERE = {"host": "localhost"}
ASKS = {**HERE, "content-type": "application/json"}


def called(
    app: Any, headers: dict[str, str] | None = None, *, method: str = "POST", path: str = CHAT, body: bytes = b"{}"
) -> Answer:
    """An answer without a socket."""
    raw = [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def call() -> None:
        received = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return received.pop() if received else await asyncio.Event().wait()

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
        }
        await app({**scope, "headers": raw, "client": ("127.0.0.1", 1), "root_path": ""}, receive, send)

    asyncio.run(call())
    start, *parts = said
    names = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], names, b"".join(part.get("body", b"") for part in parts))


@pytest.mark.parametrize("bind", range(len(BINDS)))
def test_only_known_hosts_origins_and_content_types_get_to_ask(engine: Engine, bind: int) -> None:
    settings, known = BINDS[bind]
    app = create_app(engine, ServerSettings(**settings, allow_origins=(ALLOWED,)))
    tried = 0
    for host, origin, kind in product(HOSTS, ORIGINS, KINDS):
        if host not in known and kind != "application/json":
            continue  # A host that is refused is refused before that.
        headers = {"host": host, "content-type": kind, "content-length": "2", "x-api-key": "k"}
        if origin is not None:
            headers["origin"] = f"http://{host}" if origin == "same" else origin
        answer = called(app, headers)
        expected = 400 if KINDS[kind] else 415  # {} has no messages, which is said once all else is well.
        if host not in known or origin not in WELCOME:
            expected = 403
        assert answer.status == expected, (host, origin, kind, answer)
        assert answer.headers.get("access-control-allow-origin") == (
            ALLOWED if origin == ALLOWED and host in known else None
        )
        tried += 1
    assert tried >= 250  # Of each of the six binds.


def test_a_browser_may_ask_from_named_origins_only(engine: Engine) -> None:
    app = create_app(engine, ServerSettings(allow_origins=(ALLOWED,), api_key="k"))
    asks = {"host": "localhost", "access-control-request-method": "POST"}
    asks["access-control-request-headers"] = "authorization,content-type"
    yes = called(app, {**asks, "origin": ALLOWED}, method="OPTIONS")
    assert (yes.status, yes.headers["access-control-allow-origin"]) == (204, ALLOWED)
    assert yes.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in yes.headers["access-control-allow-methods"]
    assert yes.headers["vary"] == "Origin"
    no = called(app, {**asks, "origin": "https://evil.example"}, method="OPTIONS")
    assert (no.status, no.headers.get("access-control-allow-origin")) == (403, None)
    # Without the preflight's header it is a question like any other, and needs the key.
    assert called(app, HERE, method="OPTIONS").status == 401


def test_on_a_unix_socket_any_host_is_fine_as_no_page_gets_there(engine: Engine) -> None:
    app = create_app(engine, ServerSettings(host=""))
    assert called(app, {"host": "whatever"}, method="GET", path="/v1/models").status == 200
    assert called(app, method="GET", path="/v1/models").status == 200
    assert called(app, {"origin": "https://evil.example"}, method="GET", path="/v1/models").status == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "mac.example"])
def test_what_other_machines_reach_needs_a_key(host: str) -> None:
    with pytest.raises(ServerError) as refused:
        ServerSettings(host=host)
    assert refused.value.code == "key_required"
    ServerSettings(host=host, api_key="k")


@pytest.mark.parametrize(
    "origin", ["*", "https://*.example", "app.example", "https://app.example/", "https://a@b", "https://a:x"]
)
def test_an_origin_that_is_none_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ServerError, match="expected scheme://host"):
        ServerSettings(allow_origins=(origin,))


RIGHT_KEYS = [{"authorization": "Bearer secret"}, {"authorization": "bearer secret"}, {"x-api-key": "secret"}]
RIGHT_KEYS += [{"api-key": "secret"}, {"authorization": "Bearer none", "x-api-key": "secret"}]
WRONG_KEYS: list[dict[str, str]] = [{}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}]
WRONG_KEYS += [{"x-api-key": "secre"}, {"x-api-key": "secret1"}, {"api-key": ""}, {"authorization": "Basic secret"}]


def test_every_route_but_health_and_the_page_needs_the_key(engine: Engine) -> None:
    app = create_app(engine, ServerSettings(api_key="secret"))
    folder = files("mixtral_mlx") / "page"
    page = {f"/{file.name}" for file in folder.iterdir()} | {"/"} if folder.is_dir() else {"/"}
    tried = 0
    for route in app.routes:
        assert isinstance(route, Route)
        assert route.methods
        for method in sorted({*route.methods, "OPTIONS", "DELETE"}):
            path = route.path.replace("{model:path}", "demo")
            for key in WRONG_KEYS:
                answer = called(app, {**ASKS, **key}, method=method, path=path)
                assert (answer.status == 401) == (path not in page | {"/health"}), (path, method, answer)
                tried += 1
            for key in RIGHT_KEYS:
                assert called(app, {**ASKS, **key}, method=method, path=path).status != 401
    assert tried > 50
    assert called(app, HERE, method="GET", path="/nothing").status == 401  # Nor is it said what there is.


def test_the_page_is_served_without_the_key_and_may_run_nothing_but_its_own(engine: Engine) -> None:
    app = create_app(engine, ServerSettings(api_key="secret"))
    answer = called(app, HERE, method="GET", path="/")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.body == (page.FOLDER / "index.html").read_bytes()
    assert answer.headers["content-security-policy"] == page.CONTENT_SECURITY_POLICY
    assert page.CONTENT_SECURITY_POLICY.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert (answer.headers["x-content-type-options"], answer.headers["referrer-policy"]) == ("nosniff", "no-referrer")
    script = called(app, HERE, method="GET", path="/page.js")
    assert (script.status, script.headers["content-type"]) == (200, "text/javascript; charset=utf-8")
    for path in ("/__init__.py", "/notes", "/page/index.html", "/index.html", "/../page.js"):
        assert called(app, HERE, method="GET", path=path).status == 401
        assert called(app, {**HERE, "x-api-key": "secret"}, method="GET", path=path).status == 404


def test_a_model_is_found_by_every_name_it_may_be_asked_by(engine: Engine) -> None:
    app = create_app(engine, ServerSettings(aliases=("claude-*",)))
    (listed,) = called(app, HERE, method="GET", path="/v1/models").json["data"]
    for name in ("demo", "default", "claude-sonnet-4-5"):
        answer = called(app, HERE, method="GET", path=f"/v1/models/{name}")
        assert (answer.status, answer.json) == (200, listed)
    answer = called(app, HERE, method="GET", path="/v1/models/gpt-4o")
    assert (answer.status, answer.code) == (404, "model_not_found")


def test_choices_of_experts_are_counted_while_somebody_asks_for_them(engine: Engine) -> None:
    app = create_app(engine)
    engine.reset_routing()
    assert called(app, HERE, method="GET", path="/routing").json["tokens"] == 0
    result = engine.complete([1, 22557, 1526], max_tokens=2, ignore_eos=True).result()
    said = called(app, HERE, method="GET", path="/routing").json
    layers, experts = engine.config.num_hidden_layers, engine.config.num_local_experts
    assert (said["layers"], said["experts"], len(said["last"])) == (layers, experts, layers)
    read = result.usage.prompt_tokens - result.usage.cached_tokens + result.usage.completion_tokens - 1
    assert said["tokens"] == read > 0
    assert [sum(layer) for layer in said["counts"]] == [read * engine.config.num_experts_per_tok] * layers


# What comes back.


def test_a_stream_says_the_same_as_the_whole_answer(server: Served) -> None:
    whole = server.post(CHAT, HELLO).json["choices"][0]
    stream = server.post(CHAT, {**HELLO, "stream": True})
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    deltas = [chunk["choices"][0] for chunk in chunks(stream)]
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == whole["message"]["content"]
    assert [d["finish_reason"] for d in deltas if d["finish_reason"]] == [whole["finish_reason"]]


def test_a_stream_tells_how_far_the_prompt_is_and_that_it_waits(engine: Engine, server: Served) -> None:
    running = [engine.complete("Hello", ignore_eos=True, max_tokens=3000) for _ in range(4)]
    try:
        with server.connect() as client:
            client.sendall(posted({**HELLO, "stream": True}))
            file = client.makefile("rb")
            said = b""
            while said.count(b": waiting\n\n") < 3:  # All of the engine's places are taken.
                said += file.readline()
            for reply in running:
                reply.cancel()
            while b"[DONE]" not in said:
                said += file.readline()
            file.close()
    finally:
        for reply in running:
            reply.cancel()
    assert b": prompt " in said


def test_what_is_refused_before_a_stream_begins_has_its_own_status(engine: Engine, server: Served) -> None:
    answer = server.post(CHAT, {**HELLO, "stream": True, "messages": [{"role": "user", "content": "a " * 40_000}]})
    assert (answer.status, answer.code) == (400, "context_length_exceeded")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_no_longer_worked_for(engine: Engine, server: Served, stream: bool) -> None:
    before = engine.stats()["requests"]["cancelled"]
    with server.connect() as client:
        client.sendall(posted({**ENDLESS, "stream": stream}))
        assert until(lambda: engine.health().running == 1)
    assert until(lambda: engine.health().running == 0)
    requests = engine.stats()["requests"]
    assert requests["cancelled"] == before + 1


def test_a_client_that_leaves_while_it_waits_is_forgotten(engine: Engine, server: Served) -> None:
    running = [engine.complete("Hello", ignore_eos=True, max_tokens=3000) for _ in range(4)]
    try:
        with server.connect() as client:
            client.sendall(posted(ENDLESS))
            assert until(lambda: engine.health().queued == 1)
        assert until(lambda: engine.health().queued == 0)
    finally:
        for reply in running:
            reply.cancel()


def test_what_a_client_asks_that_left_is_not_even_encoded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    parse, goes_on, begun = PARSERS[CHAT], threading.Event(), []

    def slowly(body: Any, asks: Any, *, aliases: tuple[str, ...] = ()) -> Any:
        begun.append(body)
        goes_on.wait(10)
        return parse(body, asks, aliases=aliases)

    parsers: dict[str, Any] = PARSERS
    monkeypatch.setitem(parsers, CHAT, slowly)
    with served(engine) as server, ExitStack() as clients:
        for _ in range(40):  # More than there are threads.
            clients.enter_context(server.connect()).sendall(posted(HELLO))
        assert until(lambda: bool(begun) and len(server.server.server_state.tasks) == 40)
        clients.close()
        assert until(lambda: not server.server.server_state.tasks)
        goes_on.set()
    assert len(begun) < 40
    assert engine.health().running == engine.health().queued == 0


def test_counting_tokens_of_long_texts_holds_up_no_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: dict[str, Any] = PARSERS
    goes_on = threading.Event()
    for path in ("/tokenize", "/v1/messages/count_tokens"):
        monkeypatch.setitem(parsers, path, lambda *_, **__: goes_on.wait(10))
    with served(engine) as server, ExitStack() as clients:
        for number in range(40):
            path = ("/tokenize", "/v1/messages/count_tokens")[number % 2]
            clients.enter_context(server.connect()).sendall(posted({}, path=path))
        assert until(lambda: len(server.server.server_state.tasks) == 40)
        assert server.post(CHAT, HELLO).status == 200
        clients.close()
        goes_on.set()


def test_a_client_that_does_not_read_is_let_go_of(engine: Engine) -> None:
    before = engine.stats()["requests"]["cancelled"]
    with served(engine, stalled_s=0.3, send_buffer=4096) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(posted({**ENDLESS, "logprobs": True, "top_logprobs": 20}))
        assert until(lambda: engine.health().running == 1)
        assert until(lambda: engine.health().running == 0)
        assert until(lambda: not server.server.server_state.connections)
    assert engine.stats()["requests"]["cancelled"] == before + 1


EMBEDDINGS, COMPLETIONS = "/v1/embeddings", "/v1/completions"
MANY = [[1, 300 + number] for number in range(100)]
"""More texts than the engine of these tests may run and keep waiting together."""


def test_a_long_list_is_embedded_whole_and_in_order(engine: Engine, server: Served) -> None:
    answer = server.post(EMBEDDINGS, {"input": MANY})
    assert answer.status == 200
    assert [one["index"] for one in answer.json["data"]] == list(range(100))
    assert answer.json["usage"]["prompt_tokens"] == 200
    for place in (0, 57, 99):
        vector = engine.embed(MANY[place])
        scale = sum(value * value for value in vector) ** 0.5
        assert answer.json["data"][place]["embedding"] == pytest.approx([value / scale for value in vector], abs=1e-4)


def test_many_prompts_are_completed_whole_and_streamed(server: Served) -> None:
    body = {"prompt": MANY, "n": 2, "max_tokens": 1, "temperature": 0}
    whole = server.post(COMPLETIONS, body)
    texts = [choice["text"] for choice in whole.json["choices"]]
    assert (whole.status, len(texts), whole.json["usage"]["prompt_tokens"]) == (200, 200, 200)
    streamed = [""] * 200
    for chunk in chunks(server.post(COMPLETIONS, {**body, "stream": True})):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_a_list_waits_where_the_queue_has_no_room_for_more_of_it() -> None:
    with load(max_concurrent=8, max_queue=1) as engine, served(engine) as server:
        assert server.post(EMBEDDINGS, {"input": MANY[:20]}).status == 200


def test_a_long_list_leaves_room_for_others(engine: Engine, server: Served) -> None:
    with server.connect() as client:
        client.sendall(posted({"prompt": MANY, "max_tokens": 200, "ignore_eos": True}, path=COMPLETIONS))
        assert until(lambda: engine.health().running == 4)
        assert server.post(CHAT, HELLO).status == 200
        before = engine.stats()["requests"]["finished"]
        assert engine.health().queued <= 4
    # The client has left: the rest is never asked for.
    assert until(lambda: engine.health().running == engine.health().queued == 0)
    assert engine.stats()["requests"]["finished"] < before + 50


def test_of_a_list_of_which_one_cannot_be_answered_none_is(engine: Engine, server: Served) -> None:
    before = engine.stats()["requests"]
    answer = server.post(EMBEDDINGS, {"input": [*MANY, [5] * 5000]})
    assert (answer.status, answer.code) == (400, "context_length_exceeded")
    assert engine.stats()["requests"] == before


def test_a_list_that_takes_too_long_ends_as_one(engine: Engine) -> None:
    with served(engine, timeout_s=0.3) as server:
        answer = server.post(COMPLETIONS, {"prompt": MANY, "max_tokens": 500, "ignore_eos": True})
        assert (answer.status, answer.code) == (504, "timeout")


def test_more_than_the_queue_holds_is_told_to_come_again() -> None:
    with (
        load(max_concurrent=1, max_queue=2) as engine,
        served(engine) as server,
        server.connect() as first,
        server.connect() as second,
    ):
        first.sendall(posted(ENDLESS))
        assert until(lambda: engine.health().running == 1)
        second.sendall(posted({**ENDLESS, "n": 2}))
        assert until(lambda: engine.health().queued == 2)
        answer = server.post(CHAT, HELLO)
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (429, "queue_full", "1")


def test_more_requests_than_may_run_and_wait_are_not_even_read() -> None:
    with load(max_concurrent=1, max_queue=2) as engine, served(engine) as server, ExitStack() as clients:
        clients.enter_context(server.connect()).sendall(posted(ENDLESS))
        assert until(lambda: engine.health().running == 1)
        for _ in range(2):
            clients.enter_context(server.connect()).sendall(posted(ENDLESS))
        assert until(lambda: engine.health().queued == 2)
        answer = server.post(CHAT, b"{")
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (429, "queue_full", "1")


def test_as_many_requests_are_taken_as_may_run_and_wait() -> None:
    with load(max_concurrent=2, max_queue=100) as engine, served(engine) as server, ExitStack() as clients:
        for _ in range(90):
            clients.enter_context(server.connect()).sendall(posted(ENDLESS))
        assert until(lambda: engine.health().running + engine.health().queued == 90)


def test_more_connections_than_allowed_are_told_so(engine: Engine) -> None:
    with served(engine, max_connections=2) as server, server.connect() as one, server.connect() as two:
        for client in (one, two):
            client.sendall(get())
            assert next(answers(client)).status == 200
        with server.connect() as third:
            answer = next(answers(third))
        assert (answer.status, answer.headers["connection"], answer.headers["retry-after"]) == (503, "close", "1")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends_with_an_error_that_says_so(engine: Engine, stream: bool) -> None:
    with served(engine, timeout_s=0.3) as server:
        answer = server.post(CHAT, {**ENDLESS, "stream": stream})
    assert answer.status == (200 if stream else 504)
    said = chunks(answer)[-1] if stream else answer.json
    assert said["error"]["code"] == "timeout"
    assert "retry-after" not in answer.headers
    assert until(lambda: engine.health().running == 0)


LIMITS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"max_messages": 2}, {**HELLO, "messages": HELLO["messages"] * 3}, "too_many_messages"),  # type: ignore[operator]
    (
        {"max_schema_bytes": 200},
        {**HELLO, "response_format": {"type": "json_schema", "json_schema": {"name": "x" * 300, "schema": {}}}},
        "schema_too_large",
    ),
    ({"max_json_parts": 5}, {**HELLO, "stop": ["a"] * 10}, "body_too_large"),
    ({"max_body": 100}, {**HELLO, "stop": ["a" * 200]}, "body_too_large"),
]


@pytest.mark.parametrize(("settings", "body", "code"), LIMITS, ids=[code + str(limit) for limit, _, code in LIMITS])
def test_a_body_beyond_a_limit_is_413(engine: Engine, settings: dict[str, Any], body: Any, code: str) -> None:
    data = json.dumps(body).encode()
    headers = {**ASKS, "content-length": str(len(data))}
    answer = called(create_app(engine, ServerSettings(**settings)), headers, body=data)
    assert (answer.status, answer.code) == (413, code)


def test_while_the_model_is_loaded_health_says_how_far_and_all_else_to_wait(engine: Engine) -> None:
    model = Model(done=25, total=100)
    app = create_app(model)
    health = called(app, HERE, method="GET", path="/health")
    assert (health.status, health.json) == (503, {"status": "loading", "done_bytes": 25, "total_bytes": 100})
    for method, path in (("GET", "/v1/models"), ("POST", CHAT)):
        answer = called(app, ASKS, method=method, path=path)
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "loading", "1")
        assert "25 %" in answer.json["error"]["message"]
    model.engine = engine
    assert called(app, HERE, method="GET", path="/health").json == {"status": "ok", "state": "ready"}
    assert called(app, HERE, method="GET", path="/v1/models").json["data"][0]["id"] == "demo"


def test_where_no_model_is_to_come_it_is_said_who_has_to_load_one() -> None:
    app = create_app(Model(is_coming=False))
    health = called(app, HERE, method="GET", path="/health")
    assert (health.status, health.json) == (503, {"status": "no_model"})
    for method, path in (("GET", "/v1/models"), ("POST", CHAT)):
        answer = called(app, ASKS, method=method, path=path)
        assert (answer.status, answer.code) == (503, "no_model")
        assert "has to load one" in answer.json["error"]["message"]


def test_prompts_are_logged_only_when_asked_for(engine: Engine) -> None:
    class Lines(Log):
        def __init__(self) -> None:
            self.quiet, self.lines = False, list[str]()

        def complain(self, line: str) -> None:
            self.lines.append(line)

    body = json.dumps(HELLO).encode()
    quiet, loud = Lines(), Lines()
    called(create_app(engine, ServerSettings(), quiet), ASKS, body=body)
    called(create_app(engine, ServerSettings(log_prompts=True), loud), ASKS, body=body)
    assert "Hello" not in "".join(quiet.lines)
    assert any("/v1/chat/completions 200" in line for line in quiet.lines)
    assert "Hello" in "".join(loud.lines)


def test_a_mistake_of_ours_is_a_500_without_a_traceback(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: dict[str, Any] = PARSERS
    monkeypatch.setitem(parsers, CHAT, lambda body, engine, aliases: 1 / 0)
    answer = called(create_app(engine), ASKS)
    assert (answer.status, answer.code) == (500, "internal")
    assert "division" not in answer.body.decode()


def test_numbers_for_prometheus_are_what_was_done(engine: Engine) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    app = create_app(engine)
    before = engine.stats()["requests"]["generated_tokens"]
    called(app, ASKS, body=json.dumps(HELLO).encode())
    text = called(app, HERE, method="GET", path="/metrics").body.decode()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["mixtral_first_token_seconds_count",] == 1
    assert samples["mixtral_token_gap_seconds_count",] == 3
    assert samples["mixtral_tokens_total", "generated"] == before + 4
    assert samples["mixtral_http_requests_total", CHAT, "200"] == 1
    assert samples["mixtral_requests_running",] == 0
    assert samples["mixtral_memory_bytes", "weights"] > 1e6
    stats = called(app, HERE, method="GET", path="/stats").json
    assert stats["requests"]["generated_tokens"] == before + 4
    assert stats["health"]["state"] == "ready"


# Event streams.


def some_stream(engine: Engine, chance: random.Random) -> list[bytes]:
    """The pieces of a stream of made-up events, as they would be sent."""
    n = chance.randint(1, 3)
    body = {
        **HELLO,
        "n": n,
        "stream": True,
        "logprobs": chance.random() < 0.3,
        "stream_options": {"include_usage": chance.random() < 0.5},
    }
    stream = PARSERS[CHAT](body, engine).stream()
    pieces = [*map(sse.encoded, stream.begin())]
    left = list(range(n))
    while left:
        index = chance.choice(left)
        event: Any = Token(some_text(chance), chance.randrange(3, 300), -chance.random())
        if chance.random() < 0.1:
            pieces.append(sse.progress(PromptProgress(3, 9, 1)))
        if chance.random() < 0.2:
            left.remove(index)
            event = Done("stop", Usage(9, 0, 4, 0.1, 0.2))
        if chance.random() < 0.02:
            return [*pieces, *map(sse.encoded, stream.fail(EngineError(some_text(chance), code="closed")))]
        pieces += map(sse.encoded, stream.feed(index, event))
    return [*pieces, *map(sse.encoded, stream.end())]


def some_text(chance: random.Random) -> str:
    alphabet = 'ab \n\r\t\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\ufeff\0é中😀"\\:{}[]data: '
    return "".join(chance.choice(alphabet) for _ in range(chance.randrange(12)))


def check_stream(pieces: Sequence[bytes]) -> None:
    from anthropic._streaming import SSEDecoder as AnthropicDecoder
    from openai._streaming import SSEDecoder as OpenAIDecoder

    for piece in pieces:
        piece.decode()  # No character is split.
    whole = b"".join(pieces)
    expected = events(whole)
    assert expected[-1] == (None, "[DONE]")
    assert sum(data == "[DONE]" for _, data in expected) == 1
    objects = [json.loads(data) for _, data in expected[:-1]]
    reasons = [c["index"] for o in objects for c in o.get("choices", ()) if c["finish_reason"]]
    assert len(reasons) == len(set(reasons))
    failed = [o for o in objects if "error" in o]
    assert len(failed) <= 1
    assert failed or len(reasons) == len({c["index"] for o in objects for c in o["choices"]})
    # Programs that split text rather than bytes see the same lines.
    assert [line for line in whole.decode().splitlines() if line] == [
        line for line in whole.decode().split("\n") if line
    ]
    for decoder in (OpenAIDecoder, AnthropicDecoder):
        bytewise = [(one.event, one.data) for one in decoder().iter_bytes(bytes([byte]) for byte in whole)]
        assert bytewise == expected


def test_streams_cut_at_every_byte_parse_the_same(engine: Engine) -> None:
    for seed in range(100):
        check_stream(some_stream(engine, random.Random(seed)))


@pytest.mark.long
def test_5000_streams_cut_at_every_byte_parse_the_same(engine: Engine) -> None:
    for seed in range(1000, 6000):
        check_stream(some_stream(engine, random.Random(seed)))


# The command.


def started(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mixtral_mlx", "serve", "--quiet", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    with started("--port", "0") as process:
        try:
            yield process
        finally:
            process.kill()


def port_of(process: subprocess.Popen[str]) -> int:
    """Said once requests are answered."""
    assert process.stdout
    line = process.stdout.readline()
    assert line.startswith("Ready: demo at http://127.0.0.1:"), (line, process.stderr and process.stderr.read())
    return int(line.rpartition(":")[2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_properly_and_the_server_within_three_seconds(
    process: subprocess.Popen[str], number: int
) -> None:
    port = port_of(process)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as streaming,
        socket.create_connection(("127.0.0.1", port), timeout=20) as whole,
    ):
        whole.sendall(posted({**ENDLESS, "stream": False}))
        streaming.sendall(posted(ENDLESS))
        assert b"200 OK" in streaming.recv(100)
        begun = time.monotonic()
        process.send_signal(number)
        rest = b""
        while data := streaming.recv(1 << 16):
            rest += data
        assert b'"code":"shutting_down"' in rest
        assert rest.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
        answer = next(answers(whole))
        assert (answer.status, answer.code) == (503, "shutting_down")
    assert process.wait(5) == 0
    assert time.monotonic() - begun < 3
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert process.stderr
    assert process.stderr.read() == ""


def test_a_second_signal_ends_the_process_at_once(process: subprocess.Popen[str]) -> None:
    port_of(process)
    # Stopped meanwhile: an idle server may have ended in good order before the second one is sent.
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    assert process.wait(5) in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        answer = subprocess.run(
            [sys.executable, "-m", "mixtral_mlx", "serve", "--port", str(port)], capture_output=True, text=True
        )
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"error[port_taken]: Another program listens at 127.0.0.1, port {port} already.")


def test_a_model_that_cannot_be_loaded_is_told_of_and_nothing_is_served(tmp_path: Path) -> None:
    with started("--port", "0", "--model", str(tmp_path)) as process:
        assert process.wait(30) == 1
        assert process.stderr
        assert process.stdout
        assert process.stderr.read().startswith("error[")
        assert process.stdout.read() == ""


_FULL_DISK = """
import sys
from mixtral_mlx.server import serve
def load(*args, **how):
    raise OSError(28, "No space left on device")
serve.load = load
from mixtral_mlx.cli import main
sys.exit(main(["serve", "--port", "0", "--quiet"]))
"""


def test_whatever_ends_loading_ends_the_server_which_says_so() -> None:
    answer = subprocess.run([sys.executable, "-c", _FULL_DISK], capture_output=True, text=True, timeout=30)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("error[load_failed]: The model could not be loaded: OSError: [Errno 28] No space")
    assert "Traceback" not in answer.stderr


def test_a_unix_socket_is_the_owners_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))  # Nobody listens there any more.
    with started("--uds", str(path)) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == f"Ready: demo at unix:{path}\n"
            assert path.stat().st_mode & 0o777 == 0o600
            with pytest.raises(MixtralError, match="listens at"):
                listening("", 0, path)
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(10)
                client.connect(str(path))
                client.sendall(posted(HELLO))
                assert next(answers(client)).status == 200
            process.terminate()
            assert process.wait(5) == 0
        finally:
            process.kill()
    assert not path.exists()


def test_serving_on_other_machines_addresses_without_a_key_is_refused() -> None:
    environment = {**os.environ, "MIXTRAL_MLX_API_KEY": ""}
    command = [sys.executable, "-m", "mixtral_mlx", "serve", "--host", "0.0.0.0"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error[key_required]: The address 0.0.0.0 can be reached from other machines")


def test_what_goes_wrong_with_kept_prompts_later_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(*_: Any, on_warning: Callable[[str], None], **__: Any) -> Engine:
        on_warning("The prompt cache in /kept cannot be written to.")
        raise MixtralError("Loading was cancelled.", code="cancelled")

    said: list[str] = []
    log, request = Log(quiet=True), serving.Request(ModelChoice(quiet=True))
    monkeypatch.setattr(log, "complain", said.append)
    monkeypatch.setattr(serving, "load", warned)
    server = Server(create_app(Model(), ServerSettings(), log), ServerSettings())
    serving._Loading(request, Model(), server, log, lambda engine: None)._load()
    assert said == ["The prompt cache in /kept cannot be written to."]


WRONG_OPTIONS = [
    ("--cache-size 1GB", "--cache-size goes with --cache-dir only"),
    ("--port 65536", "--port is '65536', expected a port from 0 to 65535"),
    ("--port http", "--port is 'http'"),
    ("--uds a --host b", "Both --uds and --host were given"),
    ("--uds a --port 1", "Both --uds and --port were given"),
    ("--timeout 0", "--timeout is '0', expected a number of seconds above 0"),
    ("--max-body lots", "--max-body is 'lots', expected a number and a unit"),
    ("--max-queue 0", "--max-queue is '0', expected a whole number of at least 1"),
    ("--workers 4", "mixtral-mlx serve has no option --workers"),
]


@pytest.mark.parametrize(("options", "said"), WRONG_OPTIONS)
def test_a_wrong_option_is_refused_by_name(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *options.split()]) == 2
    assert said in capsys.readouterr().err


def test_an_upload_that_is_under_way_at_the_end_is_told_so(engine: Engine) -> None:
    with served(engine, body_s=20) as server, server.connect() as client:
        client.sendall(head("Content-Length: 100") + b"{")
        assert until(lambda: bool(server.server.server_state.tasks))
        server.server.end()
        answer = next(answers(client))
    assert (answer.status, answer.code) == (503, "shutting_down")


def test_a_file_where_the_socket_should_be_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ServerError):
        listening("", 0, path)
    assert path.read_text() == "mine"
