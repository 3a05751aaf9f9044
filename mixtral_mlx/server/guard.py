"""Every request on its way in: how it is framed, who asks, from where, with what key; and a line about it in the log.

What is refused here has been read no further than its headers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config import MixtralError
from ..protocol import Refused, error_body
from .bodies import too_long
from .log import Log
from .settings import ServerSettings, knows_host, knows_origin

_TOKENS = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?: *, *[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
_ALWAYS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """Lets requests through to `app` that may be asked, and answers the others itself.

    Whatever path is not in `open_paths` needs the key, if there is one."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        open_paths: Collection[str],
        is_stopping: Callable[[], bool],
        log: Log | None,
        count: Callable[[Scope, int, float], None],
    ) -> None:
        self._app = app
        self._settings = settings
        self._open_paths = frozenset(open_paths)
        self._is_stopping = is_stopping
        self._log = log
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passage = _Passage(scope, receive, send)
        try:
            await self._answer(passage)
        except ConnectionError:
            passage.status = passage.status or 499  # As others log a client that left before there was an answer.
        except asyncio.CancelledError:
            if passage.status or not self._is_stopping():
                raise
            await refusal(scope, _shutting_down())(scope, passage.receive, passage.send)
        except Exception as error:
            if self._log:  # Not with the error's message, which may hold a prompt.
                self._log.complain(f"error[internal]: {type(error).__name__} at {_place(error)}")
            if passage.status:
                raise
            await refusal(scope, error)(scope, passage.receive, passage.send)
        finally:
            seconds = time.monotonic() - passage.since
            self._count(scope, passage.status, seconds)
            if self._log:
                self._log.say(_line(scope, passage.status, seconds))

    async def _answer(self, passage: _Passage) -> None:
        scope, headers = passage.scope, Headers(scope=passage.scope)
        try:
            passage.closes = True
            self._check_framing(scope, headers)
            passage.closes = False
            self._check_place(passage, headers)
            if _is_preflight(scope, headers):
                answer: ASGIApp = _preflight(headers)
            else:
                self._check_request(scope, headers)
                answer = self._app
        except Refused as error:
            answer = refusal(scope, error)
        await answer(scope, passage.receive, passage.send)

    def _check_framing(self, scope: Scope, headers: Headers) -> None:
        if scope["http_version"] not in ("1.0", "1.1"):
            raise Refused("This is HTTP/1.1.", code="bad_http", status=505)
        if "content-length" in headers and "transfer-encoding" in headers:
            # Two answers to where the request ends: proxies and servers have been played off against each other so.
            raise Refused("There are both Content-Length and Transfer-Encoding.", code="bad_http", status=400)
        most = self._settings.max_headers
        if len(headers.raw) > most:
            raise Refused(
                f"There are {len(headers.raw)} headers, expected {most} at most.", code="headers_too_large", status=431
            )
        target = len(scope["raw_path"]) + len(scope["query_string"])
        if target + sum(len(name) + len(value) for name, value in headers.raw) > self._settings.max_header_bytes:
            raise Refused(
                f"The headers have more than {self._settings.max_header_bytes:,} bytes.",
                code="headers_too_large",
                status=431,
            )

    def _check_place(self, passage: _Passage, headers: Headers) -> None:
        """Refuse what a page from elsewhere could have sent."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._settings.host and not host:
            raise Refused("There is no Host header.", code="host_not_allowed", status=400)
        if not knows_host(self._settings, host):
            raise Refused(
                f"The Host is {host[:100]!r}, which is not known here.",
                code="host_not_allowed",
                status=403,
                hint="Start the server with --allow-host NAME for a name that leads to it.",
            )
        if origin is not None and not knows_origin(self._settings, origin, host):
            raise Refused(
                f"Pages from {origin[:100]!r} may not ask.",
                code="origin_not_allowed",
                status=403,
                hint="Start the server with --allow-origin ORIGIN to let them.",
            )
        if origin in self._settings.allow_origins:
            passage.allowed_origin = origin
        passage.varies = bool(self._settings.allow_origins)

    def _check_request(self, scope: Scope, headers: Headers) -> None:
        if self._is_stopping():
            raise _shutting_down()
        if scope["path"] not in self._open_paths and not self._has_key(headers):
            raise Refused(
                "A key is needed, and it was not given or is another.",
                code="invalid_api_key",
                status=401,
                hint="Send it as Authorization: Bearer KEY, x-api-key or api-key.",
            )
        if scope["method"] != "POST":
            return
        kind, _, parameters = headers.get("content-type", "").partition(";")
        charset = re.search(r"charset=\"?([^\";]*)", parameters, re.IGNORECASE)
        if kind.strip().lower() != "application/json" or (charset and charset[1].strip().lower() not in _UTF_8):
            raise Refused(
                f"The Content-Type is {headers.get('content-type', '')[:100]!r}, expected application/json.",
                code="unsupported_media_type",
                status=415,
            )
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused("The body is compressed, expected it plain.", code="unsupported_media_type", status=415)
        if int(headers.get("content-length", "0")) > self._settings.max_body:
            raise too_long(self._settings)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key"), headers.get("api-key")]
        right = [_is_same(key or "", self._settings.api_key) for key in given]
        return not self._settings.api_key or any(right)


_UTF_8 = ("utf-8", "utf8")


class _Passage:
    """A request and its answer: `status` is the answer's, once it has begun; `closes`: the connection ends with it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.status = 0
        self.since = time.monotonic()
        self.allowed_origin: str | None = None
        self.varies = False
        self.closes = False
        self._receive = receive
        self._send = send
        headers = Headers(scope=scope)
        self._unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._add_headers(MutableHeaders(scope=message))
        await self._send(message)

    def _add_headers(self, headers: MutableHeaders) -> None:
        for name, value in _ALWAYS.items():
            headers.setdefault(name, value)
        headers.setdefault("cache-control", "no-store")
        headers.setdefault("content-security-policy", "default-src 'none'; frame-ancestors 'none'")
        if self.closes or self._unread or self.status == 503:
            headers["connection"] = "close"  # Else what is left of the body would be taken for the next request.
        if self.varies:
            headers.add_vary_header("Origin")
        if self.allowed_origin:
            headers["access-control-allow-origin"] = self.allowed_origin
            headers["access-control-expose-headers"] = "Retry-After, X-Should-Retry"
            headers["cross-origin-resource-policy"] = "cross-origin"


def refusal(scope: Scope, error: Exception) -> Response:
    """An error as an answer, in the form that the path's clients know."""
    if not isinstance(error, MixtralError):
        error = MixtralError("Something went wrong here that should not; the server's log says more.", code="internal")
    status, body = error_body(scope["path"], error)
    return JSONResponse(body, status, _REFUSED_WITH.get(status))


_REFUSED_WITH = {
    401: {"www-authenticate": "Bearer"},
    429: {"retry-after": "1"},
    503: {"retry-after": "1"},
    # OpenAI's and Anthropic's clients ask again after any 5xx but this; it would take as long again, and end the same.
    504: {"x-should-retry": "false"},
}
"""Headers of a refusal, by its status."""


def _shutting_down() -> Refused:
    return Refused("The server is shutting down.", code="shutting_down", status=503)


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


def _preflight(headers: Headers) -> Response:
    asked = headers.get("access-control-request-headers", "")
    allowed = {"access-control-allow-headers": asked} if _TOKENS.fullmatch(asked) else {}
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": "GET, HEAD, POST, OPTIONS",
            "access-control-max-age": "600",
            **allowed,
        },
    )


def _is_same(one: str, other: str) -> bool:
    """In a time that tells nothing of how much of it is right, nor how long it is."""
    digests = [hashlib.sha256(text.encode(errors="surrogateescape")).digest() for text in (one, other)]
    return hmac.compare_digest(*digests)


def _line(scope: Scope, status: int, seconds: float) -> str:
    client = scope["client"][0] if scope.get("client") else "-"
    path = (scope.get("raw_path") or b"").decode("latin-1")[:200]
    return f"{time.strftime('%H:%M:%S')} {client} {scope['method'][:20]} {path} {status} {seconds:.3f}s"


def _place(error: BaseException) -> str:
    at = error.__traceback__
    while at and at.tb_next:
        at = at.tb_next
    return f"{at.tb_frame.f_code.co_filename.rpartition('/')[2]}:{at.tb_lineno}" if at else "?"
