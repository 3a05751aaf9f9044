"""Requests handed to the engine, and their answers, whole or as a stream, for as long as the client is there for them.

A client that leaves, a server that stops and a time that is over cancel what was asked within one decode step."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..engine.engine import Engine
from ..engine.reply import Reply
from ..engine.request import Done, EngineError, Event, PromptProgress, Request
from ..engine.worker import coded
from . import sse
from .metrics import Clock, Metrics
from .settings import ServerSettings

if TYPE_CHECKING:
    from starlette.types import Send

    from ..protocol import Call, Frame, Stream


class Answers:
    """Gives answers; `stop` ends those that are being given."""

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self.is_stopping = False
        self._settings = settings
        self._metrics = metrics
        self._inboxes: set[_Inbox] = set()

    def stop(self) -> None:
        """End what runs with an error that says why, and begin nothing more. From the loop's thread only."""
        self.is_stopping = True
        for inbox in self._inboxes:
            inbox.put(_shutting_down())

    async def whole(self, call: Call, engine: Engine, client: asyncio.Future[None]) -> dict[str, Any]:
        """The whole answer. Raises `MixtralError`, and ConnectionError once `client` is done: it has left."""
        async with self._coming(call, engine, client) as (inbox, replies):
            while not inbox.is_done:
                for item in await inbox.take(None):
                    if isinstance(item, BaseException):
                        raise item
        # The replies have ended, so this waits for nothing.
        return call.answer([await reply for reply in replies])

    async def streamed(self, call: Call, engine: Engine, client: asyncio.Future[None], send: Send) -> None:
        """Send an answer as it comes. Raises what `whole` does where it ends before anything was sent."""
        pieces = self._pieces(call, engine, client)
        try:
            first = await anext(pieces)
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await pieces.aclose()

    async def _pieces(self, call: Call, engine: Engine, client: asyncio.Future[None]) -> AsyncGenerator[bytes]:
        stream, begun = call.stream(), False
        async with self._coming(call, engine, client) as (inbox, _):
            while not inbox.is_done:
                items = await inbox.take(self._settings.waiting_s)
                error = next((item for item in items if isinstance(item, BaseException)), None)
                if error and (not begun or isinstance(error, ConnectionError)):
                    raise error
                parts = [] if begun else [_encoded(stream.begin())]
                begun = True
                parts += [_part(stream, item) for item in items if not isinstance(item, BaseException)]
                if error:
                    yield b"".join([*parts, _encoded(stream.fail(coded(error)))])
                    return
                if not items:
                    parts.append(sse.WAITING)
                if piece := b"".join(parts):
                    yield piece
        yield _encoded([*([] if begun else stream.begin()), *stream.end()])

    @asynccontextmanager
    async def _coming(
        self, call: Call, engine: Engine, client: asyncio.Future[None]
    ) -> AsyncGenerator[tuple[_Inbox, Sequence[Reply]]]:
        """Where all that happens to an answer comes together; what has not ended when it is left is cancelled."""
        inbox = _Inbox(sum(n for _, n in call.asked))
        asking = _Asking(engine, inbox, self._metrics)
        asking.begin(call.asked)
        self._inboxes.add(inbox)
        others = asyncio.ensure_future(asking.go_on())
        client.add_done_callback(inbox.client_left)
        late = asyncio.get_running_loop().call_later(self._settings.timeout_s, lambda: inbox.put(self._too_late()))
        if self.is_stopping:
            inbox.put(_shutting_down())
        try:
            yield inbox, asking.replies
        finally:
            late.cancel()
            self._inboxes.discard(inbox)
            client.remove_done_callback(inbox.client_left)
            others.cancel()
            await asyncio.wait([others])
            await asking.end()

    def _too_late(self) -> EngineError:
        return EngineError(
            f"The answer took more than {self._settings.timeout_s:g} seconds.",
            code="timeout",
            hint="Ask for fewer tokens, or start the server with a larger --timeout.",
        )


_Item = tuple[int, Event] | BaseException


class _Inbox:
    """What came since it was last looked at: events with their reply's place, or what ends the answer."""

    def __init__(self, replies: int) -> None:
        self._left = replies
        self._items: deque[_Item] = deque()
        self._has_some = asyncio.Event()

    @property
    def is_done(self) -> bool:
        """Whether every reply has ended, and all was taken."""
        return not (self._left or self._items)

    def put(self, item: _Item) -> None:
        self._items.append(item)
        self._has_some.set()

    def client_left(self, _: object = None) -> None:
        self.put(ConnectionError("The client left."))

    async def take(self, timeout_s: float | None) -> list[_Item]:
        """All there is, once there is something; nothing where that takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_some.wait()
        self._has_some.clear()
        items = list(self._items)
        self._items.clear()
        self._left -= sum(isinstance(item, tuple) and isinstance(item[1], Done) for item in items)
        return items


_ASK_AGAIN_S = 0.05


class _Asking:
    """Has the engine answer what a call asks, no more at a time than it answers at once.

    So a call with thousands of texts takes no more of the queue than that, and who comes later waits for no more."""

    def __init__(self, engine: Engine, inbox: _Inbox, metrics: Metrics) -> None:
        self.replies: list[Reply] = []
        """In the order of what was asked; all there are once the call is answered."""
        self._engine = engine
        self._inbox = inbox
        self._metrics = metrics
        self._left: deque[tuple[Request, int]] = deque()
        self._pumps: set[asyncio.Task[None]] = set()

    def begin(self, asked: Sequence[tuple[Request, int]]) -> None:
        """Ask the first. Raises `MixtralError` where not even that may wait."""
        self._left.extend(asked)
        if self._left:
            self._ask()

    async def go_on(self) -> None:
        """Ask the others, each once there is room for it."""
        try:
            while self._left:
                await self._room()
                try:
                    self._ask()
                except EngineError as error:
                    if error.code != "queue_full":
                        raise
                    await asyncio.sleep(_ASK_AGAIN_S)  # The queue is full of what others ask.
        except Exception as error:
            self._inbox.put(error)

    async def end(self) -> None:
        """Cancel what has not ended."""
        for reply in self.replies:
            reply.cancel()
        for pump in (pumps := [*self._pumps]):
            pump.cancel()
        if pumps:
            await asyncio.wait(pumps)

    async def _room(self) -> None:
        most = self._engine.limits.max_concurrent
        while self._pumps and len(self._pumps) + self._left[0][1] > most:
            await asyncio.wait(self._pumps, return_when=asyncio.FIRST_COMPLETED)

    def _ask(self) -> None:
        request, n = self._left[0]
        replies = self._engine.choices(n, request) if n > 1 else [self._engine.submit(request)]
        self._left.popleft()
        for place, reply in enumerate(replies, len(self.replies)):
            pump = asyncio.ensure_future(_pump(place, reply, self._inbox, self._metrics))
            pump.add_done_callback(self._pumps.discard)
            self._pumps.add(pump)
        self.replies += replies


async def _pump(place: int, reply: Reply, inbox: _Inbox, metrics: Metrics) -> None:
    clock = Clock(metrics, time.monotonic())
    try:
        async for event in reply:
            clock.saw(event)
            inbox.put((place, event))
    except Exception as error:
        inbox.put(error)


def _part(stream: Stream, item: tuple[int, Event]) -> bytes:
    place, event = item
    frames = _encoded(stream.feed(place, event))
    return sse.progress(event) + frames if isinstance(event, PromptProgress) else frames


def _encoded(frames: Sequence[Frame]) -> bytes:
    return b"".join(map(sse.encoded, frames))


def _shutting_down() -> EngineError:
    return EngineError("The server is shutting down.", code="shutting_down", retryable=True)
