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
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import mixtral_mlx
from mixtral_mlx.config import MixtralError
from mixtral_mlx.engine.engine import Engine, load
from mixtral_mlx.engine.request import Done, EngineError, PromptProgress, Token
from mixtral_mlx.generate import Usage
from mixtral_mlx.protocol import PARSERS
from mixtral_mlx.server import sse
from mixtral_mlx.server.app import Model, create_app
from mixtral_mlx.server.serve import listening
from mixtral_mlx.server.settings import ServerError, ServerSettings

from .serving import CHAT, JSON, Answer, Served, answers, events, posted, served

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
ENDLESS = {**HELLO, "max_tokens": 3000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load(max_concurrent=4, max_queue=40) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Served]:
    with served(engine, headers_s=0.4, body_s=0.4, waiting_s=0.05) as running:
        yield running


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
    Wire("an unknown query", get("/v1/models?limit=3"), (400,), True),
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
def test_whatever_comes_over_the_wire_has_its_status_and_hurts_no_one(server: Served, case: Wire) -> None:
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
    try:
        client.sendall(data)
    except (ConnectionError, TimeoutError):
        pass  # The server has heard enough.
