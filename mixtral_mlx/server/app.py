"""The routes, as an ASGI application: which path answers what, from the engine that is handed in.

Who may ask is the guard's business, what a request means `protocol`'s."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from .. import protocol
from ..config import MixtralError
from ..engine.engine import Engine
from ..engine.worker import Limits
from ..page import CONTENT_SECURITY_POLICY, FOLDER, MEDIA_TYPES
from ..protocol import PARSERS, Refused
from . import bodies, metrics, openapi, sse
from .answers import Answers
from .guard import Guard, refusal
from .log import Log
from .settings import ServerSettings


@dataclass
class Model:
    """The engine that answers, once it is there. If it is coming, `done` bytes of `total` have been loaded."""

    engine: Engine | None = None
    is_coming: bool = True
    done: int = 0
    total: int = 0


def create_app(model: Engine | Model, settings: ServerSettings = ServerSettings(), log: Log | None = None) -> Starlette:
    """The application. Its `state.stop()`, called on its loop, ends what runs and refuses what still comes."""
    house = _House(model if isinstance(model, Model) else Model(model), settings, log)
    page = _page()
    routes = [*house.routes(), *(Route(path, _file(*file)) for path, file in page.items())]
    guard = Middleware(
        Guard,
        settings=settings,
        open_paths={"/health", *page},
        is_stopping=lambda: house.answers.is_stopping,
        log=log,
        count=house.count,
    )
    app = Starlette(
        routes=routes,
        middleware=[guard],
        exception_handlers={HTTPException: _no_such_route, MixtralError: _refused},
    )
    app.router.redirect_slashes = False
    app.state.stop = house.answers.stop
    return app


_QUERIES = {
    "/v1/messages": {"beta"},
    "/v1/messages/count_tokens": {"beta"},
    "/v1/models": {"beta", "limit", "after_id", "before_id"},
    "/v1/models/{model:path}": {"beta"},
}
"""What may stand after the ? of a path: clients of Anthropic's API say there that they know its latest fields."""


_LOOKED_AT_S = 5.0
"""So long after being asked for them, choices of experts are counted."""


_COUNTING = frozenset({"/tokenize", "/v1/messages/count_tokens"})
"""Paths for texts of any length. They have threads of their own, so that they hold up no one who wants an answer."""
_COUNTING_THREADS = 2
_ENCODING_THREADS = 8


class _House:
    """All that the routes share."""

    def __init__(self, model: Model, settings: ServerSettings, log: Log | None) -> None:
        self.model = model
        self.settings = settings
        self.metrics = metrics.Metrics(lambda: model.engine)
        self.answers = Answers(settings, self.metrics)
        self._log = log
        self._calls = 0
        self._encoding = ThreadPoolExecutor(_ENCODING_THREADS, "mixtral-encoding")
        self._counting = ThreadPoolExecutor(_COUNTING_THREADS, "mixtral-counting")
        self._paths: set[str] = set()

    def routes(self) -> list[Route]:
        gets: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/health": self._health,
            "/v1/models": self._models,
            "/v1/models/{model:path}": self._model,
            "/stats": self._stats,
            "/routing": self._routing,
            "/metrics": self._metrics,
            "/openapi.json": self._openapi,
        }
        routes = [
            Route(path, _with_query(get, _QUERIES.get(path, set())), methods=["GET"]) for path, get in gets.items()
        ]
        routes += [Route(path, _Calls(self, path), methods=["POST"]) for path in PARSERS]
        self._paths = {route.path for route in routes}
        return routes

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """Note an answer; paths that there are not are counted together."""
        path = scope["path"] if scope["path"] in self._paths else "other"
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.seconds.labels(path).observe(seconds)

    @property
    def engine(self) -> Engine:
        if self.model.engine:
            return self.model.engine
        if not self.model.is_coming:
            raise Refused(
                "There is no model, and none is being loaded.",
                code="no_model",
                status=503,
                hint="The app that started this server has to load one.",
            )
        raise Refused(
            f"The model is being loaded{self._so_far()}.",
            code="loading",
            status=503,
            hint="Try again; /health says when it is there.",
        )

    def _so_far(self) -> str:
        return f": {100 * self.model.done // self.model.total} %" if self.model.total else ""

    @contextmanager
    def place(self, limits: Limits) -> Iterator[None]:
        """Room for a request, of which there are no more than may run and wait: its body is in memory, too."""
        if self._calls >= limits.max_concurrent + limits.max_queue:
            raise Refused(
                f"{self._calls} requests are being answered or wait, and no more may.",
                code="queue_full",
                status=429,
                hint="Try again when some have been answered.",
            )
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    async def understood(self, path: str, body: object, engine: Engine, client: asyncio.Future[None]) -> protocol.Call:
        """What a body asks. Not begun for a client that has left by then: long prompts take a while to encode."""
        pool = self._counting if path in _COUNTING else self._encoding
        work = functools.partial(_understood, path, body, engine, self.settings.aliases)
        understanding = asyncio.get_running_loop().run_in_executor(pool, work)
        either: list[asyncio.Future[Any]] = [understanding, client]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if understanding.done():
                return understanding.result()
            raise ConnectionError("The client left.")
        finally:
            understanding.cancel()

    def say_prompt(self, path: str, body: dict[str, Any]) -> None:
        if self._log and self.settings.log_prompts:
            self._log.complain(f"{path} {sse.dumped(body)}")

    # What is asked with GET.

    async def _health(self, request: Request) -> Response:
        engine = self.model.engine
        if engine is None and not self.model.is_coming:
            return JSONResponse({"status": "no_model"}, 503, {"retry-after": "1"})
        if engine is None:
            loading = {"status": "loading", "done_bytes": self.model.done, "total_bytes": self.model.total}
            return JSONResponse(loading, 503, {"retry-after": "1"})
        health = engine.health()
        if not health.is_alive:
            return JSONResponse({"status": health.state}, 503, {"retry-after": "1"})
        return JSONResponse({"status": "ok", "state": health.state})

    async def _models(self, request: Request) -> Response:
        return JSONResponse(protocol.models(self.engine, request.query_params))

    async def _model(self, request: Request) -> Response:
        protocol.check_model(request.path_params["model"], self.engine, self.settings.aliases)
        return JSONResponse(protocol.model(self.engine))

    async def _stats(self, request: Request) -> Response:
        engine = self.engine
        stats = {**engine.stats(), "memory": asdict(engine.memory()), "health": asdict(engine.health())}
        return Response(sse.dumped(stats), media_type="application/json")

    async def _routing(self, request: Request) -> Response:
        engine = self.engine
        engine.watch_routing(_LOOKED_AT_S)  # Who goes on looking asks again before that.
        return Response(sse.dumped(asdict(engine.routing())), media_type="application/json")

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": metrics.CONTENT_TYPE})

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(openapi.document(with_key=bool(self.settings.api_key)))


class _Calls:
    """A path of an API as an ASGI application: a JSON body in, an answer out, whole or as a stream."""

    def __init__(self, house: _House, path: str) -> None:
        self._house = house
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        house = self._house
        _check_query(Request(scope), _QUERIES.get(self._path, set()))
        engine = house.engine
        with house.place(engine.limits):
            body = await self._body(receive)
            async with _watched(receive) as client:
                call = await house.understood(self._path, body, engine, client)
                house.say_prompt(self._path, body)
                if call.streams:
                    await house.answers.streamed(call, engine, client, send)
                else:
                    answer = await house.answers.whole(call, engine, client)
                    await Response(sse.dumped(answer), media_type="application/json")(scope, receive, send)

    async def _body(self, receive: Receive) -> dict[str, Any]:
        settings = self._house.settings
        try:
            async with asyncio.timeout(settings.body_s):
                data = await bodies.read(receive, settings)
        except TimeoutError:
            raise Refused(
                f"The body took more than {settings.body_s:g} seconds.", code="request_timeout", status=408
            ) from None
        return await asyncio.to_thread(bodies.parsed, data, settings)


@asynccontextmanager
async def _watched(receive: Receive) -> AsyncIterator[asyncio.Future[None]]:
    """Done once the client has left."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    client = asyncio.ensure_future(gone())
    try:
        yield client
    finally:
        client.cancel()


def _understood(path: str, body: object, engine: Engine, aliases: tuple[str, ...]) -> protocol.Call:
    """What a body asks, all of which can be answered. Raises `MixtralError`."""
    call = PARSERS[path](body, engine, aliases=aliases)
    for request, _ in call.asked:
        engine.check(request)
    return call


def _with_query(
    get: Callable[[Request], Awaitable[Response]], known: set[str]
) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        _check_query(request, known)
        return await get(request)

    return answer


def _check_query(request: Request, known: set[str]) -> None:
    """Refuse what would be ignored."""
    for name in request.query_params:
        if name not in known:
            raise Refused(
                f"The query holds {name[:60]!r}, which is not known here.", code="unknown_parameter", param=name[:60]
            )


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = ", ".join(sorted({*dict(error.headers or {}).get("Allow", "").split(", "), "OPTIONS"} - {""}))
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers={"allow": allowed})
    if error.status_code == 405:
        what = f"{request.method[:20]} is not for {request.url.path[:100]}, expected one of {allowed}."
        answer = refusal(request.scope, Refused(what, code="method_not_allowed", status=405))
        answer.headers["allow"] = allowed
        return answer
    what = f"There is no {request.url.path[:100]} here."
    return refusal(
        request.scope, Refused(what, code="not_found", status=404, hint="/openapi.json lists what there is.")
    )


async def _refused(request: Request, error: Exception) -> Response:
    return refusal(request.scope, error)


# The page.


def _page() -> dict[str, tuple[bytes, str]]:
    """The page's files by path, each with its media type."""
    return {
        "/" if file.name == "index.html" else f"/{file.name}": (file.read_bytes(), MEDIA_TYPES[file.suffix])
        for file in sorted(FOLDER.iterdir())
        if file.suffix in MEDIA_TYPES
    }


def _file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return Response(
            content,
            headers={
                "content-type": kind,
                "content-security-policy": CONTENT_SECURITY_POLICY,
                "cache-control": "no-cache",
            },
        )

    return answer
