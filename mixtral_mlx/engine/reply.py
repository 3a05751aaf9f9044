"""An answer on its way: what the engine puts in on its thread, and how it is read from any other, waiting or async."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

from .request import Done, Event, Result, Text, Token


class Channel:
    """Events of one request in the order they came; the engine's end of a `Reply`.

    `on_cancel` is called once, on whatever thread cancels."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self.on_cancel: Callable[[], object] = lambda: None
        self._events: deque[Event | BaseException] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def put(self, event: Event | BaseException) -> None:
        """Add an event, or the error the request ends with. After an end nothing more is taken."""
        with self._changed:
            if self._closed:
                return
            self._events.append(event)
            self._closed = isinstance(event, Done | BaseException)
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for loop, future in waiting:
            with suppress(RuntimeError):  # The loop is closed: nobody waits any more.
                loop.call_soon_threadsafe(_wake, future)

    def cancel(self) -> None:
        """Say that nobody wants the rest."""
        with self._changed:
            if self.is_cancelled or self._closed:
                return
            self.is_cancelled = True
        self.on_cancel()

    def abandon(self) -> None:
        """The same where nobody is left to hear of it, from a finalizer: in the midst of anything, so it only notes it.

        The worker looks before each step."""
        self.is_cancelled = self.is_cancelled or not self._closed

    def wait(self) -> Event | BaseException:
        """The next event, once it is there."""
        with self._changed:
            while not self._events:
                self._changed.wait()
            return self._events.popleft()

    async def wait_async(self) -> Event | BaseException:
        """The next event; waits without a thread."""
        while True:
            with self._changed:
                if self._events:
                    return self._events.popleft()
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiting.append((loop, future))
            await future


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Reply:
    """An answer as it comes. Iterate over it (`for` or `async for`) for events, or ask for the `result`.

    Raises `EngineError`, or another `MixtralError`, where the request could not be answered. One reader at a time.
    Dropping it, leaving its `with` block, or cancelling the task that reads it cancels the request. It keeps its
    `engine`, which ends when nobody has it any more, until it has been read to its end."""

    def __init__(self, channel: Channel, engine: object = None) -> None:
        self._channel = channel
        self._engine = engine
        self._seen: list[Event] = []
        self._error: BaseException | None = None
        self._finalizer = weakref.finalize(self, channel.abandon)
        self._finalizer.atexit = False

    def cancel(self) -> None:
        """End the request: within one decode step or one chunk of a prompt, at once where it still waits."""
        self._channel.cancel()

    def result(self) -> Result:
        """The whole answer, once it has ended."""
        for _ in self:
            pass
        return self._result()

    def text(self) -> str:
        """The whole text, once it has ended."""
        return self.result().text

    def pieces(self) -> Generator[str]:
        """The text as it comes."""
        for event in self:
            if isinstance(event, Token | Text) and event.text:
                yield event.text

    def __await__(self) -> Generator[Any, None, Result]:
        return self._awaited().__await__()

    async def _awaited(self) -> Result:
        async for _ in self:
            pass
        return self._result()

    def __iter__(self) -> Reply:
        return self

    def __next__(self) -> Event:
        if self._ended():
            raise StopIteration
        return self._taken(self._channel.wait())

    def __aiter__(self) -> Reply:
        return self

    async def __anext__(self) -> Event:
        if self._ended():
            raise StopAsyncIteration
        try:
            return self._taken(await self._channel.wait_async())
        except asyncio.CancelledError:
            self.cancel()
            raise

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Reply:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def _ended(self) -> bool:
        if self._error:
            raise self._error
        return bool(self._seen) and isinstance(self._seen[-1], Done)

    def _taken(self, event: Event | BaseException) -> Event:
        if isinstance(event, Done | BaseException):
            self._engine = None
        if isinstance(event, BaseException):
            self._error = event
            raise event
        self._seen.append(event)
        return event

    def _result(self) -> Result:
        return Result.of(self._seen)
