"""Requests handed to the engine, and their answers, whole or as a stream, for as long as the client is there for them.

A client that leaves, a server that stops and a time that is over cancel what was asked within one decode step."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..config import MixtralError
from ..engine.engine import Engine
from ..engine.reply import Reply
from ..engine.request import Done, EngineError, Event, PromptProgress
from ..engine.worker import coded
from . import sse
from .metrics import Clock, Metrics
from .settings import ServerSettings

if TYPE_CHECKING:
    from starlette.types import Receive, Send

    from ..protocol import Call, Frame, Stream


def submit(call: Call, engine: Engine) -> list[Reply]:
    """Have all that a call asks answered, or none of it."""
    replies: list[Reply] = []
    try:
        for request, n in call.asked:
            replies += engine.choices(n, request) if n > 1 else [engine.submit(request)]
    except MixtralError:
        for reply in replies:
            reply.cancel()
        raise
    return replies


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

    async def whole(self, call: Call, replies: Sequence[Reply], receive: Receive) -> dict[str, Any]:
        """The whole answer. Raises `MixtralError`, and ConnectionError where the client leaves."""
        async with self._coming(replies, receive) as inbox:
            while not inbox.is_done:
                for item in await inbox.take(None):
                    if isinstance(item, BaseException):
                        raise item
        # The replies have ended, so this waits for nothing.
        return call.answer([await reply for reply in replies])

    async def streamed(self, stream: Stream, replies: Sequence[Reply], receive: Receive, send: Send) -> None:
        """Send an answer as it comes. Raises what `whole` does where it ends before anything was sent."""
        pieces = self._pieces(stream, replies, receive)
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

    async def _pieces(self, stream: Stream, replies: Sequence[Reply], receive: Receive) -> AsyncGenerator[bytes]:
        begun = False
        async with self._coming(replies, receive) as inbox:
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
    async def _coming(self, replies: Sequence[Reply], receive: Receive) -> AsyncGenerator[_Inbox]:
        """Where all that happens to an answer comes together; what has not ended when it is left is cancelled."""
        inbox = _Inbox(len(replies))
        self._inboxes.add(inbox)
        watches = [_pump(place, reply, inbox, self._metrics) for place, reply in enumerate(replies)]
        tasks = [asyncio.ensure_future(watch) for watch in (*watches, _until_gone(receive, inbox))]
        late = asyncio.get_running_loop().call_later(self._settings.timeout_s, lambda: inbox.put(self._too_late()))
        if self.is_stopping:
            inbox.put(_shutting_down())
        try:
            yield inbox
        finally:
            late.cancel()
            self._inboxes.discard(inbox)
            for reply in replies:
                reply.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

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


async def _pump(place: int, reply: Reply, inbox: _Inbox, metrics: Metrics) -> None:
    clock = Clock(metrics, time.monotonic())
    try:
        async for event in reply:
            clock.saw(event)
            inbox.put((place, event))
    except Exception as error:
        inbox.put(error)


async def _until_gone(receive: Receive, inbox: _Inbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.put(ConnectionError("The client left."))


def _part(stream: Stream, item: tuple[int, Event]) -> bytes:
    place, event = item
    frames = _encoded(stream.feed(place, event))
    return sse.progress(event) + frames if isinstance(event, PromptProgress) else frames


def _encoded(frames: Sequence[Frame]) -> bytes:
    return b"".join(map(sse.encoded, frames))


def _shutting_down() -> EngineError:
    return EngineError("The server is shutting down.", code="shutting_down", retryable=True)
