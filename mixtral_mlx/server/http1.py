"""HTTP/1.1 on one connection: uvicorn's, with deadlines, the right status for what is no request, and a gentle end.

Who may ask and what is answered is the application's business."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..protocol import Refused, error_body
from .settings import ServerSettings

LINGER_S = 1.0


class Connection(H11Protocol):
    """One client's connection. Refuses what is no HTTP, headers that do not come to an end, and one client too many.

    A client that does not read what is ready for it for `stalled_s` is let go of."""

    conn: _Parser
    transport: _Gentle

    def __init__(self, *args: Any, settings: ServerSettings, **more: Any) -> None:
        super().__init__(*args, **more)
        self.conn = _Parser(h11.SERVER, settings.max_header_bytes)
        self._settings = settings
        self._headers_due: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Gentle(transport, self.loop, self._has_unread, self._settings.stalled_s))
        if len(self.connections) > self._settings.max_connections:
            self._refuse(
                503, f"There are {self._settings.max_connections} connections already.", "too_many_connections"
            )
            return
        self._watch_headers(is_new=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport.lost()
        for timer in (self._headers_due, self._stalled, self.timeout_keep_alive_task):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():  # What still comes then is for nobody.
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        self._watch_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        if not self._stalled:
            self._stalled = self.loop.call_later(self._settings.stalled_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()
            self._stalled = None

    def shutdown(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        status = self.conn.refused_as
        code = {421: "misdirected", 431: "headers_too_large", 501: "not_implemented"}.get(status, "bad_http")
        self._refuse(status, f"This is no HTTP request that can be answered: {self.conn.reason}.", code)

    def _watch_headers(self, *, is_new: bool = False) -> None:
        """See to it that headers that have begun, or a first request, come to an end in time."""
        awaited = self.conn.their_state is h11.IDLE and (is_new or bool(self.conn.trailing_data[0]))
        if awaited and not self._headers_due:
            self._headers_due = self.loop.call_later(self._settings.headers_s, self._headers_late)
        elif not awaited and self._headers_due and self.conn.their_state is not h11.IDLE:
            self._headers_due.cancel()
            self._headers_due = None

    def _headers_late(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(408, f"The headers took more than {self._settings.headers_s:g} seconds.", "request_timeout")
        else:
            self.transport.close()

    def _has_unread(self) -> bool:
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self.conn.trailing_data[0])

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer instead of the application, if nothing has been answered yet, and close."""
        if self.cycle and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status, said = error_body("", Refused(message, code=code, status=status))
            body = json.dumps(said).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            headers += [("retry-after", "1")] if status == 503 else []
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Parser(h11.Connection):
    """h11's, which also remembers why it refused something, and takes the whole addresses that proxies ask for."""

    refused_as = 400
    reason = ""

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            return _without_address(event) if isinstance(event, h11.Request) else event
        except h11.RemoteProtocolError as error:
            self.refused_as, self.reason = error.error_status_hint, str(error)
            raise


_ADDRESS = re.compile(rb"([a-z][a-z0-9+.-]*)://([^/?]*)(.*)", re.IGNORECASE)


def _without_address(request: h11.Request) -> h11.Request:
    """The request, with what comes before the path of an absolute target as its Host (RFC 9112, 3.2.2)."""
    if not (found := _ADDRESS.fullmatch(request.target)):
        return request
    scheme, authority, rest = found.groups()
    if scheme.lower() != b"http":
        # RFC 9110, 7.4: nobody has proven to be that host.
        raise h11.RemoteProtocolError("its address is not http://", error_status_hint=421)
    headers = [(name, value) for name, value in request.headers if name != b"host"]
    return h11.Request(
        method=request.method,
        headers=[(b"host", authority), *headers],
        target=rest if rest.startswith(b"/") else b"/" + rest,
        http_version=request.http_version,
    )


class _Gentle(asyncio.Transport):
    """asyncio's transport, but `close` waits until the client has stopped sending, and not forever until it has read.

    A socket closed with something unread in it takes back what was said last."""

    def __init__(
        self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop, has_unread: Callable[[], bool], flush_s: float
    ) -> None:
        super().__init__()
        self._inner = inner
        self._loop = loop
        self._has_unread = has_unread
        self._flush_s = flush_s
        self._closing = False
        self._timers: list[asyncio.TimerHandle] = []

    def close(self) -> None:
        if self.is_closing():
            return
        self._closing = True
        self._timers.append(self._loop.call_later(self._flush_s, self._inner.abort))
        if not self._has_unread():
            self._inner.close()
            return
        with suppress(OSError):
            self._inner.write_eof()
        self._inner.resume_reading()
        self._timers.append(self._loop.call_later(LINGER_S, self._inner.close))

    def lost(self) -> None:
        """The connection is no more."""
        self._closing = True
        for timer in self._timers:
            timer.cancel()

    def is_closing(self) -> bool:
        return self._closing or self._inner.is_closing()

    def write(self, data: Any) -> None:
        if not self._closing:
            self._inner.write(data)

    def abort(self) -> None:
        self._inner.abort()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()
