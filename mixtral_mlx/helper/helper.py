"""What the messages do: one model in memory, many requests answered at once, and an end in time.

An asyncio loop does everything that is quick. A model is loaded on a thread of its own, prompts are encoded on another;
answers are read without threads."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from .. import __version__
from ..config import MixtralError
from ..memory import rss_bytes
from ..prompt import Message
from . import messages as m
from .life import Parent, end_in_time
from .streams import Log, LogFile, TooLong, Writer, is_hung_up, lines, take_over

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.reply import Reply
    from ..engine.request import Event, Token
    from ..prompt import Tokenizer
    from ..protocol import Asks, Call
    from ..protocol.answers import ShownTokens
    from .beside import Beside

T = TypeVar("T")
LOG_LEVELS = ("debug", "info", "warning")
_MOST_REQUESTS = 256
"""That are begun and have not ended, whatever they ask for."""
_WATCH_EVERY_S = 0.2
_PROGRESS_EVERY_S = 0.1
_IDLE_TRIES, _IDLE_TRY_S = 10, 0.02
# Parts of the time in which the process has to end.
_LAST_EVENTS_S = 0.6
_CLOSE_S = 0.7
_FLUSH_S = 0.2

_log = logging.getLogger("mixtral_mlx.helper")


@dataclass(frozen=True)
class Options:
    """How to start: `model` is loaded at once, None waits for a message.

    `loading` are arguments of `load` that hold where a message does not name them. `serve` opens the HTTP API too.
    `parent_pid` is whose end is this process's; None is who started it."""

    model: str | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)
    serve: bool = False
    parent_pid: int | None = None
    log: str = "warning"


def run(options: Options) -> NoReturn:
    """Speak with the parent until it has gone or wants no more, and end the process."""
    parent = Parent(options.parent_pid)
    mine = take_over()
    log = Log(mine.log)
    sys.stdout = sys.stderr = LogFile(log)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if not os.isatty(mine.lines_in):
        # Ctrl-C in a terminal reaches all that was started there. It is for the parent, who says what becomes of us.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("mixtral_mlx").addHandler(log)
    logging.getLogger("mixtral_mlx").setLevel(options.log.upper())
    status = 1
    try:
        status = asyncio.run(Helper(options, parent, log, mine.lines_in, mine.lines_out).run())
    except Exception as error:
        _log.error("The helper failed: %s: %s", type(error).__name__, error)
    log.finish(_FLUSH_S)
    # Nothing is left to be written. The engine's threads may be in the midst of a step, and are not waited for.
    os._exit(status)


class Helper:
    """The conversation with the parent."""

    def __init__(self, options: Options, parent: Parent, log: Log, lines_in: int, lines_out: int) -> None:
        self._options = options
        self._parent = parent
        self._log_lines = log
        self._lines_in, self._lines_out = lines_in, lines_out
        self._loop: asyncio.AbstractEventLoop
        self._reason: asyncio.Future[m.Reason]
        self._end_once = threading.Lock()
        self._writer = Writer(lines_out, lambda: self._end("parent_gone"))
        self._room = asyncio.Event()
        self._engine: Engine | None = None
        self._state = "no_model"
        self._load: _Load | None = None
        self._beside: Beside | None = None
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._replies: dict[str, list[Reply]] = {}
        self._cancelled: set[str] = set()
        self._encoder = ThreadPoolExecutor(1, "helper-encoder")
        self._handing_over_since: float | None = None

    async def run(self) -> int:
        """Speak until the end; returns the exit code."""
        self._loop = asyncio.get_running_loop()
        self._reason = self._loop.create_future()
        self._loop.add_signal_handler(signal.SIGTERM, self._take_signal)
        if os.isatty(self._lines_in):
            self._loop.add_signal_handler(signal.SIGINT, self._take_signal)
        self._put(m.Hello(protocol=m.PROTOCOL, version=__version__, pid=os.getpid()))
        for work in (self._read, self._watch):
            threading.Thread(target=work, name=f"helper{work.__name__}", daemon=True).start()
        if self._options.model is not None:
            self._begin(None, self._do_load(None, self._options.model, {}))
        noticing = asyncio.create_task(self._notice_states())
        reason = await self._reason
        noticing.cancel()
        await self._finish(reason)
        return 0

    # The end.

    def _end(self, reason: m.Reason) -> None:
        """Begin to end, from any thread. The clock runs even where the loop does not."""
        if self._end_once.acquire(blocking=False):
            end_in_time()
            _log.info("Ending: %s.", reason)
            self._loop.call_soon_threadsafe(self._reason.set_result, reason)

    def _take_signal(self) -> None:
        if self._end_once.locked():  # The second one: at once.
            os._exit(0)
        self._end("signal")

    async def _finish(self, reason: m.Reason) -> None:
        for request_id in self._requests:
            self._cancel(request_id)
        if self._load:
            self._load.cancel()
        tasks = [*self._requests.values()]
        is_read = reason != "parent_gone" and not self._writer.is_full
        if tasks and is_read:
            await asyncio.wait(tasks, timeout=_LAST_EVENTS_S)
        for task in tasks:
            task.cancel()
        if self._beside:
            self._beside.end()
        if self._engine:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._in_thread(self._engine.close), _CLOSE_S)
        self._put(m.Bye(reason=reason))
        self._writer.flush(_FLUSH_S)

    # Lines in.

    def _read(self) -> None:
        """Hand over each line and wait until it is taken: while the parent reads nothing, nothing more is read."""
        for line in lines(self._lines_in, m.MOST_LINE_BYTES):
            self._handing_over_since = time.monotonic()
            asyncio.run_coroutine_threadsafe(self._take(line), self._loop).result()
            self._handing_over_since = None
        self._end("stdin_closed")

    def _watch(self) -> None:
        """End when the parent has gone, also where nothing can be read or written at the moment."""
        while True:
            time.sleep(_WATCH_EVERY_S)
            since = self._handing_over_since
            is_held_up = since is not None and time.monotonic() - since > _WATCH_EVERY_S
            if self._parent.is_gone() or is_hung_up(self._lines_out):
                return self._end("parent_gone")
            if is_held_up and is_hung_up(self._lines_in):
                return self._end("stdin_closed")

    async def _take(self, line: bytes | TooLong) -> None:
        try:
            await self._has_room()
            message = self._parsed(line)
            # However much is going on, it can be stopped.
            if len(self._requests) >= _MOST_REQUESTS and not isinstance(message, m.Cancel | m.Shutdown):
                raise m.LineError(
                    f"{len(self._requests)} requests have not ended, and no more may be.",
                    code="queue_full",
                    hint="Try again when some have ended.",
                    line_id=message.id,
                )
        except m.LineError as error:
            _log.debug("A line was refused: %s", error)
            self._refuse(error)
            return
        self._begin(message.id, self._do(message))

    def _parsed(self, line: bytes | TooLong) -> m.Incoming:
        if isinstance(line, TooLong):
            raise m.LineError(f"The line has more than {m.MOST_LINE_BYTES:,} bytes.", code="line_too_long")
        message = m.parse(line)
        _log.debug("A message %s %s came, %d bytes.", message.type, message.id, len(line))
        if message.id in self._requests:
            raise m.LineError(
                f"The id {message.id} belongs to a request that has not ended.",
                code="id_in_use",
                hint="Give each request an id of its own.",
                line_id=message.id,
            )
        return message

    def _refuse(self, error: m.LineError) -> None:
        in_use = error.line_id in self._requests
        self._put(
            m.Error(
                id=None if in_use else error.line_id,
                line_id=error.line_id if in_use else None,
                code=error.code,
                message=str(error),
                hint=error.hint,
                retryable=error.code == "queue_full",
            )
        )

    # Lines out.

    async def _send(self, message: m.Outgoing) -> None:
        await self._has_room()
        self._put(message)

    async def _has_room(self) -> None:
        self._room.clear()
        while not self._writer.has_room(lambda: self._loop.call_soon_threadsafe(self._room.set)):
            await self._room.wait()
            self._room.clear()

    def say(self, message: m.Outgoing) -> None:
        """Send what is only progress, from any thread: where the parent does not read it is left out."""
        with suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(self._put_if_room, message)

    def _put_if_room(self, message: m.Outgoing) -> None:
        if not self._writer.is_full:
            self._put(message)

    def _put(self, message: m.Outgoing) -> None:
        _log.debug("A message %s goes.", message.type)
        self._writer.put(m.written(message))

    # Requests.

    def _begin(self, request_id: str | None, work: Coroutine[Any, Any, m.Outgoing]) -> None:
        name = request_id or ""
        self._requests[name] = asyncio.create_task(self._answer(name, request_id, work))

    async def _answer(self, name: str, request_id: str | None, work: Coroutine[Any, Any, m.Outgoing]) -> None:
        """Do what a message asks and send what ends it: one message, whatever happens."""
        try:
            last = await work
        except MixtralError as error:
            last = _as_message(error, request_id)
        except asyncio.CancelledError:
            last = _as_message(MixtralError("The helper ends.", code="closed"), request_id)
        except Exception as error:
            _log.error("A request failed: %s: %s", type(error).__name__, error)
            last = m.Error(id=request_id, code="failed", message=f"{type(error).__name__}: {error}")
        try:
            await self._has_room()
        finally:
            self._put(last)
            self._requests.pop(name, None)
            self._replies.pop(name, None)
            self._cancelled.discard(name)

    async def _do(self, message: m.Incoming) -> m.Outgoing:
        match message:
            case m.Load():
                given = message.model_dump(exclude_unset=True, exclude={"type", "id", "model"})
                return await self._do_load(message.id, message.model, given)
            case m.Chat():
                return await self._do_chat(message)
            case m.Cancel():
                self._cancel(message.request)
            case m.Unload():
                await self._do_unload()
            case m.MemoryPressure():
                if engine := self._engine:
                    await self._in_thread(lambda: engine.relieve(message.level))
            case m.GetStats():
                return self._stats(message.id)
            case m.Shutdown():
                self._loop.call_soon(self._end, "shutdown")
        return m.Ok(id=message.id)

    def _cancel(self, request_id: str) -> None:
        if request_id not in self._requests:
            return
        self._cancelled.add(request_id)
        for reply in self._replies.get(request_id, ()):
            reply.cancel()
        if self._load and self._load.request_id == (request_id or None):
            self._load.cancel()

    # The model.

    async def _do_load(self, request_id: str | None, model: str, given: dict[str, Any]) -> m.Outgoing:
        if self._load:
            raise _busy("A model is being loaded.", "Wait until it is there, or cancel that.")
        self._load = load = _Load(request_id, model, self)
        began = time.monotonic()
        try:
            await self._do_unload()
            if self._options.serve and self._beside is None:
                self._beside = await self._in_thread(_serve_beside)
            self._await_model(0, 0)
            engine = await self._loaded(load, given)
            self._use(engine, "ready")
        finally:
            self._load = None
            if self._beside:
                self._beside.use(self._engine)  # None where it did not come.
        beside = self._beside
        memory = engine.memory()
        return m.Ready(
            id=request_id,
            model=engine.name,
            folder=str(engine.folder),
            context=engine.context,
            budget_bytes=memory.budget_bytes,
            weights_bytes=memory.weights_bytes,
            load_seconds=time.monotonic() - began,
            serving=m.Serving(url=beside.url, key=beside.key) if beside else None,
        )

    async def _loaded(self, load: _Load, given: dict[str, Any]) -> Engine:
        working = asyncio.ensure_future(self._in_thread(lambda: load.run({**self._options.loading, **given})))
        # What stops soon, stops by itself: nobody waits for its thread.
        await asyncio.wait([working, load.cancelled], return_when=asyncio.FIRST_COMPLETED)
        if load.is_cancelled:
            working.add_done_callback(_forget)
            raise _stopped()
        return working.result()

    def say_loading(self, message: m.Loading) -> None:
        """Say how far a model has come, from any thread; over HTTP too, while there is none."""
        self.say(message)
        with suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(self._await_model, message.done_bytes, message.total_bytes)

    def _await_model(self, done: int, total: int) -> None:
        if self._beside and self._load:
            self._beside.await_model(done, total)

    async def _do_unload(self) -> None:
        if self._engine is None:
            return
        engine = self._engine
        if self._replies or not await self._is_idle(engine):
            raise _busy("Requests are running.", "Cancel them first, or wait until they have ended.")
        self._use(None, "no_model")
        await self._in_thread(engine.close)

    async def _is_idle(self, engine: Engine) -> bool:
        """Whether it answers nobody, over HTTP neither. It counts a request for a moment after its last event."""
        for _ in range(_IDLE_TRIES):
            health = engine.health()
            if not (health.running or health.queued):
                return True
            await asyncio.sleep(_IDLE_TRY_S)
        return False

    def _use(self, engine: Engine | None, state: str) -> None:
        self._engine, self._state = engine, state
        if self._beside:
            self._beside.use(engine)

    async def _notice_states(self) -> None:
        """Say when the engine has let go of its model, or brought it back."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            if self._engine and (state := self._engine.health().state) != self._state:
                self._state = state
                await self._send(m.State(state=cast(m.ModelState, state)))

    def _stats(self, request_id: str) -> m.Stats:
        engine, health = self._engine, self._engine.health() if self._engine else None
        return m.Stats(
            id=request_id,
            state="loading" if self._load else cast(m.ModelState, health.state) if health else "no_model",
            running=health.running if health else 0,
            queued=health.queued if health else 0,
            process_bytes=rss_bytes(),
            log_lines_dropped=self._log_lines.dropped,
            memory=asdict(engine.memory()) if engine else None,
            done=engine.stats() if engine else None,
        )

    # Chats.

    async def _do_chat(self, message: m.Chat) -> m.Outgoing:
        if self._engine is None:
            raise _no_model(is_loading=self._load is not None)
        engine = self._engine
        self._replies[message.id] = []
        call, replies = await self._loop.run_in_executor(self._encoder, lambda: _asked(engine, message.body))
        self._replies[message.id] = replies
        if message.id in self._cancelled:
            for reply in replies:
                reply.cancel()
        passings = [
            _Passing(
                message.id, choice, engine.tokenizer, _shown(call, engine) if message.body.get("logprobs") else None
            )
            for choice in range(len(replies))
        ]
        ended = await asyncio.gather(*[self._pass_on(passing, replies) for passing in passings], return_exceptions=True)
        if failed := [end for end in ended if isinstance(end, BaseException)]:
            raise failed[0]
        results = [reply.result() for reply in replies]
        return m.Done(
            id=message.id,
            finish_reasons=[cast(m.FinishReason, result.finish_reason) for result in results],
            usage=m.Usage(
                prompt_tokens=results[0].usage.prompt_tokens,
                completion_tokens=sum(result.usage.completion_tokens for result in results),
                cached_tokens=results[0].usage.cached_tokens,
            ),
            seconds=m.Timings(
                queued=max(result.queued_seconds for result in results),
                prompt=max(result.usage.prompt_seconds for result in results),
                generation=max(result.usage.generation_seconds for result in results),
            ),
        )

    async def _pass_on(self, passing: _Passing, replies: Sequence[Reply]) -> None:
        """Send a choice's events as they come. One choice that fails ends all."""
        try:
            async for event in replies[passing.choice]:
                if message := passing.message(event):
                    await self._send(message)
        except BaseException:
            for reply in replies:
                reply.cancel()
            raise

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """What `work` returns, done on a thread that the end of the process does not wait for."""
        future: asyncio.Future[T] = self._loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if not future.done():
                future.set_exception(error) if error else future.set_result(result)  # type: ignore[arg-type]

        def done() -> None:
            result, failed = None, None
            try:
                result = work()
            except BaseException as error:
                failed = error
            with suppress(RuntimeError):  # The loop is closed: nobody waits any more.
                self._loop.call_soon_threadsafe(settle, result, failed)

        threading.Thread(target=done, daemon=True).start()
        return await future


def _serve_beside() -> Beside:
    from .beside import serve_beside

    return serve_beside()


class _Load:
    """A model on its way into memory, for a message or for the command line."""

    def __init__(self, request_id: str | None, model: str, helper: Helper) -> None:
        self.request_id = request_id
        self.is_cancelled = False
        self.cancelled = asyncio.get_running_loop().create_future()
        self._model = model
        self._helper = helper
        self._said = 0.0
        self._is_done = False

    def cancel(self) -> None:
        """Nobody wants the model any more."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self.cancelled.set_result(None)

    def run(self, how: dict[str, Any]) -> Engine:
        """The engine, once it is ready. Takes long; on a thread of its own."""
        from ..engine.engine import load

        engine = load(
            None if self._model == "demo" else self._model,
            **how,
            progress=partial(self._progress, "loading"),
            fetching=partial(self._progress, "fetching"),
            cancelled=lambda: self.is_cancelled,
            on_warning=_log.warning,
        )
        # The first conversation to be encoded takes a second: better now than when somebody waits for an answer.
        engine.tokenizer.encode_chat([Message("user", "Hello")])
        self._is_done = True
        if self.is_cancelled:
            engine.close()
            raise _stopped()
        return engine

    def _progress(self, phase: m.Phase, done: int, total: int) -> None:
        """Called by the engine, also when it loads the model again later: then no message has asked for it."""
        now = time.monotonic()
        if done == total or now - self._said >= _PROGRESS_EVERY_S:
            self._said = now
            request_id = None if self._is_done else self.request_id
            loading = m.Loading(id=request_id, model=self._model, phase=phase, done_bytes=done, total_bytes=total)
            self._helper.say_loading(loading)


def _forget(working: asyncio.Future[Engine]) -> None:
    """Let go of a model that came when nobody wanted it any more."""
    if not working.cancelled() and working.exception() is None:
        threading.Thread(target=working.result().close, daemon=True).start()


@dataclass(frozen=True)
class _Passing:
    """Makes messages of the events of one choice of a request; `shown` is for log probabilities, if they are wanted."""

    request_id: str
    choice: int
    tokenizer: Tokenizer
    shown: ShownTokens | None

    def message(self, event: Event) -> m.Outgoing | None:
        """The message, or None for an event that has none of its own."""
        from ..engine.request import PromptProgress, Text, Token, ToolCallDelta

        match event:
            case PromptProgress():
                return m.Prompt(
                    id=self.request_id, choice=self.choice, done=event.done, total=event.total, cached=event.cached
                )
            case Token() if event.text or self.shown:
                scores = [self._score(event, self.shown)] if self.shown else None
                return m.Text(id=self.request_id, choice=self.choice, text=event.text, tokens=scores)
            case Text():
                return m.Text(id=self.request_id, choice=self.choice, text=event.text)
            case ToolCallDelta():
                return m.ToolCall(
                    id=self.request_id,
                    choice=self.choice,
                    call=event.index,
                    call_id=event.id,
                    name=event.name,
                    arguments=event.arguments,
                )
        return None

    def _score(self, token: Token, shown: ShownTokens) -> m.TokenScore:
        shown.add(token)
        others = zip(token.top_logprobs, shown.latest.others(self.tokenizer), strict=True)
        return m.TokenScore(
            id=token.id,
            text=token.text,
            logprob=_finite(token.logprob),
            top_logprobs=[
                m.Alternative(id=other, text=text, logprob=_finite(logprob))
                for (other, _), (text, _, logprob) in others
            ],
        )


def _shown(call: Call, engine: Engine) -> ShownTokens:
    from ..protocol.answers import ShownTokens

    return ShownTokens(engine.tokenizer, call.asked[0][0].prompt)


def _finite(logprob: float) -> float:
    """JSON has no infinity: what could not have come is as unlikely as OpenAI's API says it."""
    return max(logprob, -9999.0)


def _asked(engine: Engine, body: dict[str, Any]) -> tuple[Call, list[Reply]]:
    """What a body asks for, and the answers, one for each choice."""
    from ..protocol import PARSERS, Refused

    if "stream_options" in body or body.get("stream") is False:
        param = "stream_options" if "stream_options" in body else "stream"
        raise Refused(
            f"The body has {param}, but the helper always streams and always tells the tokens.",
            hint="Leave it out.",
            param=param,
        )
    call = PARSERS["/v1/chat/completions"](body, cast("Asks", engine))
    return call, [reply for request, count in call.asked for reply in engine.choices(count, request)]


def _as_message(error: MixtralError, request_id: str | None) -> m.Error:
    return m.Error(
        id=request_id,
        code=error.code,
        message=str(error),
        hint=error.hint,
        param=getattr(error, "param", None),
        retryable=getattr(error, "retryable", False),
    )


class HelperError(MixtralError):
    """Something that cannot be done now. `retryable`: later it may be."""

    def __init__(self, message: str, *, code: str, hint: str = "", retryable: bool = True) -> None:
        super().__init__(message, code=code, hint=hint)
        self.retryable = retryable


def _busy(found: str, hint: str) -> HelperError:
    return HelperError(found, code="busy", hint=hint)


def _stopped() -> HelperError:
    return HelperError("Loading was cancelled.", code="cancelled", hint="Send load again.")


def _no_model(*, is_loading: bool) -> HelperError:
    if is_loading:
        return HelperError("The model is not in memory yet.", code="not_loaded", hint="Wait for ready.")
    return HelperError("There is no model.", code="not_loaded", hint="Send load first.", retryable=False)
