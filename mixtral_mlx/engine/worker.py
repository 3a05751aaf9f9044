"""The thread that owns MLX: it loads the model, decides what goes into the next pass, runs it, hands out the results.

Everybody else talks to it through queues, from any thread. What one request does in a pass is `answering`'s business,
what is kept for later ones `prefixes`'."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from ..budget import Footprint, in_gb
from ..config import MixtralError
from ..generate import Sampled, taken
from . import batch, parking
from .answering import Answering
from .request import EngineError

if TYPE_CHECKING:
    from ..memory import Relief
    from ..prompt import Tokenizer
    from ..weights import Loaded
    from .blocks import Reading
    from .drafting import DraftModel
    from .drafts import PassSeconds
    from .frozen import Kind
    from .prefixes import Prefixes
    from .routing import Watch, Watched

T = TypeVar("T")
_CLEAR_CACHE_EVERY = 256
_GROWTH_TOKENS = 256  # Caches grow by so many tokens, as mlx-lm's do.
_WORTH_WAITING_FOR = 64
"""Tokens that two prompts must have in common for one to wait until they have been read for the other."""
_MOST_DRAFT_ROWS = 64
_DRAFT_CHUNK_TOKENS = 128
"""What the draft model reads of a prompt in a step that others wait for; it is many times as fast as the model."""
_WRITE_WITHIN_S = 2.0


@dataclass(frozen=True)
class Limits:
    """How many requests run and wait at most, and after how many seconds an idle model goes; None: never.

    `deterministic` computes each sequence by itself and reads its prompt in the same chunks, so that its logits are the
    same bits whatever its neighbours. Otherwise sums may be taken in another order, and differ in the last digits."""

    max_concurrent: int = 16
    max_queue: int = 64
    idle_unload_s: float | None = None
    deterministic: bool = False


@dataclass
class Counts:
    """What has been done since the start. `paused` requests gave their memory to older ones for a while."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    paused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    passes: int = 0
    pass_seconds: float = 0.0
    loads: int = 0


@dataclass(frozen=True)
class Opened:
    """A model in memory; `kv_bytes` is what keys and values may take together, those kept for later included.

    `all_kv_bytes` is what that would be without an adapter. `chunk_tokens` is how many tokens a pass has at most."""

    loaded: Loaded
    relief: Relief
    kv_bytes: int
    chunk_tokens: int
    all_kv_bytes: int
    draft: DraftModel | None = None


@dataclass(frozen=True)
class _Launched:
    """A pass under way since `begun`: who is in it with what, and what will come of each."""

    group: Sequence[tuple[Answering, batch.Part]]
    results: Sequence[list[Sampled]]
    watched: Watched
    begun: float


class Worker:
    """Answers requests on a thread of its own, on which `open_model` loads the model when it is needed.

    Public methods may be called from any thread."""

    def __init__(
        self,
        open_model: Callable[[Callable[[], bool]], Opened],
        tokenizer: Tokenizer,
        prefixes: Prefixes,
        passes: PassSeconds,
        watch: Watch,
        limits: Limits,
    ) -> None:
        self.counts = Counts()
        self.state = "unloaded"
        self.limits = limits
        self.opened: Opened | None = None
        self.busy_since: float | None = None
        self.adapter = ""
        """What tells the model's adapter apart from others; only to be set within `call_between`."""
        self._open_model = open_model
        self._tokenizer = tokenizer
        self._prefixes = prefixes
        self._passes = passes
        self._watch = watch
        self._changed = threading.Condition()
        self._waiting: deque[Answering] = deque()
        self._calls: deque[Callable[[], object]] = deque()
        self._calls_between: deque[tuple[Callable[[], object], list[Answering]]] = deque()
        self._closing = False
        self._unload_when_idle = False
        self.lost: MixtralError | None = None
        self._running: list[Answering] = []
        self._ahead: _Launched | None = None
        self._last_pass_end = 0.0
        self._turn = 0
        self._footprints: dict[int | None, Footprint] = {}
        self._thread_id: int | None = None
        self._ended = parking.run(self._work)

    # From any thread.

    @property
    def is_alive(self) -> bool:
        """Whether requests can still be answered."""
        return not (self._closing or self._ended.is_set())

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def submit(self, *answerings: Answering) -> None:
        """Have requests answered, all of them or none; raises `EngineError` where they cannot even wait."""
        with self._changed:
            if self._closing:
                raise self.why_closed()
            if len(self._waiting) + len(answerings) > self.limits.max_queue:
                raise EngineError(
                    f"{len(self._waiting)} requests wait already, and no more than {self.limits.max_queue} may.",
                    code="queue_full",
                    hint="Try again when some have been answered.",
                    retryable=True,
                )
            self._waiting.extend(answerings)
            self._changed.notify_all()

    def cancel(self, answering: Answering) -> None:
        """A request's reader wants no more of it: it ends at once where it waits, else before the next step."""
        self._cancel_waiting(answering)
        self.wake()

    def wake(self) -> None:
        """Look again: something that was waited for is there."""
        with self._changed:
            self._changed.notify_all()

    def call(self, function: Callable[[Opened], T]) -> Future[T]:
        """Run `function` with the model, loaded if need be, between two steps."""
        return self._call(lambda: function(self._open()), self._calls.append)

    def call_between(self, function: Callable[[Opened], T]) -> Future[T]:
        """Run `function` with the model after the requests there are now, and before all that follow."""
        return self._call(
            lambda: function(self._open()), lambda run: self._calls_between.append((run, list(self._waiting)))
        )

    def unload(self) -> None:
        """Let go of the model; the next request loads it again. Raises `EngineError` while requests run or wait."""
        self._call(self._unload, self._calls.append).result()

    def relieve(self, *, unload: bool) -> None:
        """Give up what only saves time, before the next step; with `unload` all that can be, and the idle model too."""
        self._call(lambda: self._relieve(unload), self._calls.append).result()

    def close(self, timeout_s: float | None = None) -> None:
        """End what runs and waits with an error and let go of the model; waits for that no longer than `timeout_s`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.get_ident() != self._thread_id:
            self._ended.wait(timeout_s)

    def lose(self, error: MixtralError) -> None:
        """Nothing can be computed any more, and the thread may never come back: end all there is with `error`."""
        with self._changed:
            self.lost, self._closing = error, True
            those = [*self._running, *self._waiting]
            self._changed.notify_all()
        for answering in those:
            if not answering.finished:
                answering.fail(error)

    def why_closed(self) -> MixtralError:
        """What everything ends with that is asked once this has ended."""
        return self.lost or EngineError("The engine is closed.", code="closed", hint="Load the model again.")

    def _call(self, function: Callable[[], T], queue: Callable[[Callable[[], object]], None]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(coded(error))

        with self._changed:
            if self._closing:
                raise self.why_closed()
            queue(run)
            self._changed.notify_all()
        return future

    def _take_from_queue(self, answering: Answering) -> bool:
        with self._changed, suppress(ValueError):
            self._waiting.remove(answering)
            return True
        return False

    def _cancel_waiting(self, answering: Answering) -> None:
        if self._take_from_queue(answering):
            self.counts.cancelled += 1
            answering.cancel()
            answering.let_go()  # It may have run before, and been paused.

    # The thread.

    def _work(self) -> None:
        self._thread_id = threading.get_ident()
        while self._has_work():
            self.busy_since = time.monotonic()
            try:
                self._step()
            except BaseException as error:
                self._break_off(self._running, error)
            self.busy_since = None
        self._break_off([*self._running, *self._waiting], self.why_closed())
        self._waiting.clear()
        for call in (*self._calls, *(call for call, _ in self._calls_between)):
            call()  # They find the engine closed.
        self._let_go()
        self.state = "closed"

    def _has_work(self) -> bool:
        """Wait for something to do; False when the thread is to end."""
        idle_since = time.monotonic()
        while True:
            with self._changed:
                while not (self._closing or self._running or self._has_calls or any(a.is_ready for a in self._next())):
                    if not self._changed.wait(self._until_unload(idle_since)) and not self._waiting:
                        break
                else:
                    return not self._closing
            self._let_go()

    @property
    def _has_calls(self) -> bool:
        return bool(self._calls or (self._calls_between and all(a.is_ready for a in self._before_call())))

    def _before_call(self) -> list[Answering]:
        """Those of the waiting that come before the first call between requests."""
        with self._changed:
            return [a for a in self._waiting if a.has_started or a in self._calls_between[0][1]]

    def _until_unload(self, idle_since: float) -> float | None:
        after = 0.0 if self._unload_when_idle else self.limits.idle_unload_s
        if after is None or self.opened is None or self._waiting:
            return None  # What waits, for its grammar, is not idle.
        return max(idle_since + after - time.monotonic(), 0)

    def _step(self) -> None:
        while self._calls:
            self._calls.popleft()()
        self._drop_cancelled()
        while self._calls_between and not self._running and not self._before_call():
            self._calls_between.popleft()[0]()
        self._admit()
        self._make_room()
        if self._ahead:
            self._finish(self._ahead)
            return
        self._read_with_draft()
        for group in self._groups():
            if launched := self._launch(group):
                self._finish(launched)

    def _open(self) -> Opened:
        if self._closing:
            raise self.why_closed()
        if self.opened is None:
            self.state = "loading"
            try:
                self.opened = self._open_model(lambda: self._closing)
            except BaseException:
                self.state = "failed"
                raise
            self.counts.loads += 1
            self.state = "ready"
        return self.opened

    def _unload(self) -> None:
        self._drop_cancelled()
        if self._running or self._waiting:
            raise EngineError("Requests are running.", code="busy", hint="Cancel them first.", retryable=True)
        self._let_go()

    def _relieve(self, unload: bool) -> None:
        self._prefixes.clear()
        mx.clear_cache()
        if unload and self.opened:
            self.opened.relief.take_all()
            self._unload_when_idle = True

    def _let_go(self) -> None:
        self._unload_when_idle = False
        opened, self.opened = self.opened, None
        self._prefixes.finish_writing(_WRITE_WITHIN_S)
        self._prefixes.clear()
        if opened and opened.loaded.streaming:
            opened.loaded.streaming.close()
        del opened
        gc.collect()  # Modules refer to each other in circles.
        mx.clear_cache()
        self.state = "unloaded"

    def _drop_cancelled(self) -> None:
        for answering in [a for a in self._running if a.channel.is_cancelled]:
            answering.cancel()
            self._leave(answering)
        with self._changed:
            waiting = list(self._waiting)
        for answering in waiting:
            if answering.channel.is_cancelled:
                self._cancel_waiting(answering)

    # Who runs.

    def _next(self) -> list[Answering]:
        """Those of the waiting that may start now."""
        with self._changed:
            return self._before_call() if self._calls_between else list(self._waiting)

    def _admit(self) -> None:
        """Start what waits, in its order, while there is room; what waits for a grammar or a disk lets others pass.

        First comes what the disk was read for, which holds its memory already."""
        ready = [answering for answering in self._next() if answering.is_ready]
        for answering in sorted(ready, key=lambda answering: not answering.readings):
            if len(self._running) >= self.limits.max_concurrent or not self._start(answering):
                break

    def _start(self, answering: Answering) -> bool:
        """Begin a request; False if it has to wait, and all that come after it."""
        try:
            opened = self._open()
            answering.kind = replace(answering.kind, adapter=self.adapter)
            answering.behind = self._fetching_for(answering)
            if answering.behind or self._waits_for_prefix(answering):
                return True  # Others need not wait with it.
            if not self._has_room(answering, opened):
                if not self._running:  # Then it is those with memory for what comes from disk who have to go on first.
                    answering.behind = next(iter(self._fetching), None)
                return False
            if self._fetch(answering, opened) or not self._take_from_queue(answering):
                return True
            if not answering.has_started:
                answering.start(opened.loaded.model, self._tokenizer, opened.draft)
            answering.begin_reading(opened.loaded.model, self._found(answering, opened))
            if drafting := answering.drafting:
                kind = drafting.model.kind
                drafting.resume(self._prefixes.find(kind, drafting.tokens, read=answering.readings.get(kind)))
            answering.stop_fetching()
            self.counts.cached_tokens += answering.read
        except BaseException as error:
            self._take_from_queue(answering)
            self._end(answering, error)
            return True
        self._running.append(answering)
        return True

    def _found(self, answering: Answering, opened: Opened) -> tuple[int, list[Any]] | None:
        """What is kept of its tokens' beginning, or has come from disk."""
        read = answering.readings.get(answering.kind)
        return self._prefixes.find(answering.kind, answering.findable, multiple_of=self._in_chunks(opened), read=read)

    def _in_chunks(self, opened: Opened) -> int:
        """No more than whole chunks are found where sums may not depend on that."""
        return opened.chunk_tokens if self.limits.deterministic else 1

    def _waits_for_prefix(self, answering: Answering) -> bool:
        """Whether most of it is being read for another just now: then that is worth waiting for."""
        return not answering.has_started and any(
            other.is_reading and other.cached < _shared_enough(answering) and _begin_alike(other, answering)
            for other in self._running
        )

    # What comes from disk, which nobody else waits for.

    def _fetch(self, answering: Answering, opened: Opened) -> bool:
        """Begin, once, to read from disk what was read before of its beginning; whether that has to be waited for."""
        if answering.readings:
            return False
        begin = partial(
            self._prefixes.begin_reading,
            most_kept=opened.kv_bytes - self._reserved_beside(answering) - self._reserved(answering),
            on_done=self.wake,
        )
        read = begin(answering.kind, answering.findable, multiple_of=self._in_chunks(opened))
        self._hold(answering, answering.kind, read)
        if opened.draft and answering.request.speculate == "draft":
            self._hold(answering, opened.draft.kind, begin(opened.draft.kind, answering.tokens))
        return bool(answering.readings)

    def _hold(self, answering: Answering, kind: Kind, reading: Reading | None) -> None:
        """Let it have what is read for it, unless it was cancelled meanwhile."""
        if reading is None:
            return
        with self._changed:
            if answering in self._waiting:
                answering.readings = {**answering.readings, kind: reading}
                return
        reading.cancel()

    @property
    def _fetching(self) -> list[Answering]:
        """Those of the waiting that have memory for what comes from disk, filled or not, as it is reserved for them."""
        with self._changed:
            return [answering for answering in self._waiting if answering.readings]

    def _fetching_for(self, answering: Answering) -> Answering | None:
        """Another for whom most of it comes from disk just now: it is read once."""
        others = [] if answering.readings else self._fetching
        return next((other for other in others if _begin_alike(other, answering)), None)

    # Memory.

    def _has_room(self, answering: Answering, opened: Opened) -> bool:
        """Whether its cache fits beside the others'; what is kept for later gives way before the next pass."""
        need = self._kv_bytes(answering, answering.most_tokens)
        if need > opened.kv_bytes:
            raise EngineError(
                f"This request needs up to {in_gb(need)} for keys and values, and there are {in_gb(opened.kv_bytes)}.",
                code="over_budget",
                hint="Use a shorter prompt, fewer max_tokens or kv_bits, or give the engine more memory.",
            )
        return self._reserved_beside(answering) + self._reserved(answering) <= opened.kv_bytes

    def _reserved_beside(self, answering: Answering) -> int:
        return sum(self._reserved(other) for other in [*self._running, *self._fetching] if other is not answering)

    def _reserved(self, answering: Answering) -> int:
        """Bytes of cache that are kept free for a request: for its tokens so far and some more, or for all to come."""
        all_at_once = self.limits.deterministic  # Read again, a paused one would have other bits.
        tokens = answering.most_tokens if all_at_once else len(answering.tokens) + _GROWTH_TOKENS
        return self._kv_bytes(answering, tokens)

    def _kv_bytes(self, answering: Answering, tokens: int) -> int:
        assert self.opened
        bits, loaded = answering.request.kv_bits, self.opened.loaded
        if bits not in self._footprints:
            self._footprints[bits] = Footprint.of(loaded.config, loaded.dtype, bits)
        tokens = min(tokens, answering.most_tokens)
        draft = self.opened.draft if answering.request.speculate == "draft" else None
        return self._footprints[bits].kv_bytes(tokens) + (draft.kv_bytes(tokens) if draft else 0)

    def _make_room(self) -> None:
        """Give up what is kept for later, what comes from disk, then the youngest caches, until the next pass fits."""
        if self.opened is None:
            return
        if not self.opened.loaded.streaming:  # Streamed experts ask by themselves, as each pass begins.
            self.opened.relief.check()
        while True:
            fetching = self._fetching
            used = sum(map(self._reserved, [*self._running, *fetching]))
            if used <= self.opened.kv_bytes or len(self._running) + len(fetching) <= 1:
                self._prefixes.shrink_to(self.opened.kv_bytes - used)
                return
            if fetching:
                fetching[-1].stop_fetching()
                continue
            youngest = self._running.pop()
            youngest.pause()
            self.counts.paused += 1
            with self._changed:
                self._waiting.appendleft(youngest)

    # What a pass is made of.

    def _groups(self) -> list[list[tuple[Answering, batch.Part]]]:
        """The passes of this step: one of all sequences, or one of each where they may not depend on each other."""
        if not self._running:
            return []
        assert self.opened
        chunk = self.opened.chunk_tokens
        decoding = [answering for answering in self._running if not answering.is_reading]
        reading = self._in_turn([answering for answering in self._running if answering.is_reading])
        if self.limits.deterministic:
            parts = [(a, a.to_decode(0, 0)) for a in decoding] + [(a, a.to_read(chunk)) for a in reading[:1]]
            return [[part] for part in parts]
        parts = self._decoded_together(decoding, alone=not reading)
        left = chunk - sum(len(part.ids) for _, part in parts)
        for answering in reading:
            if left <= 0:
                break
            part = answering.to_read(left)
            left -= len(part.ids)
            parts.append((answering, part))
        return [parts]

    def _decoded_together(self, decoding: Sequence[Answering], *, alone: bool) -> list[tuple[Answering, batch.Part]]:
        """The next token of each; guesses too, unless a prompt is read in the same pass, which is slow as it is."""
        parts: list[tuple[Answering, batch.Part]] = []
        rows = len(decoding)
        for answering in decoding:
            part = answering.to_decode(max(_MOST_DRAFT_ROWS - rows, 0) if alone else 0, rows - 1)
            rows += len(part.ids) - 1
            parts.append((answering, part))
        return parts

    def _read_with_draft(self) -> None:
        """Let the draft model read on in one prompt, unless others wait for theirs to be read."""
        behind = [a for a in self._running if a.drafting and a.drafting.is_behind]
        if not behind or any(a.is_reading for a in self._running if a is not behind[0]) or self._waits_for_room:
            return
        assert self.opened
        assert behind[0].drafting
        alone = len(self._running) == 1
        behind[0].drafting.read_on(self.opened.chunk_tokens if alone else _DRAFT_CHUNK_TOKENS)

    @property
    def _waits_for_room(self) -> bool:
        with self._changed:
            return any(answering.is_ready for answering in self._waiting)

    def _in_turn(self, reading: Sequence[Answering]) -> list[Answering]:
        self._turn += 1
        first = self._turn % len(reading) if reading else 0
        return [*reading[first:], *reading[:first]]

    # A pass.

    def _launch(self, group: Sequence[tuple[Answering, batch.Part]]) -> _Launched | None:
        """Describe a pass to MLX, which begins it where it runs by itself; None where that already failed."""
        assert self.opened
        begun = time.perf_counter()
        try:
            logits, watched = self._watch.run(self.opened.loaded.model, [part for _, part in group])
            results = [self._results(a, part, rows) for (a, part), rows in zip(group, logits, strict=True)]
            if self.opened.loaded.model.runs_ahead:
                mx.async_eval(results, watched.arrays)  # Else its tokens would wait for the pass described next.
        except BaseException as error:
            self._break_off([answering for answering, _ in group], error)
            return None
        return _Launched(group, results, watched, begun)

    def _finish(self, launched: _Launched) -> None:
        """Wait for a pass and hand out what came of it, the next one under way meanwhile where that is possible."""
        group, results, watched = launched.group, launched.results, launched.watched
        self._ahead = None
        try:
            following = self._launch_ahead(launched)
            mx.eval(results, watched.arrays, [layer.state for a, _ in group if a.is_reading for layer in a.cache])
        except BaseException as error:
            self._break_off([answering for answering, _ in group], error)
            return
        self._account(launched)
        self._watch.add(watched)
        for (answering, part), some in zip(group, results, strict=True):
            self._hand_out(answering, part, some)
        if following and any(not answering.finished for answering, _ in following.group):
            self._ahead = following

    def _launch_ahead(self, launched: _Launched) -> _Launched | None:
        """The pass after `launched`, begun before anybody has seen the tokens that go into it."""
        assert self.opened
        if not self.opened.loaded.model.runs_ahead or self.limits.deterministic:
            return None
        if len(self._running) > len(launched.group):
            return None  # Somebody has come, and is to be in the next pass.
        group = [
            (answering, part)
            for (answering, _), results in zip(launched.group, launched.results, strict=True)
            if (part := answering.to_run_ahead(results, len(launched.group) - 1)) and not answering.finished
        ]
        if len(group) < len(launched.group):
            return None  # What the others need has to be seen first.
        logits, watched = self._watch.run(self.opened.loaded.model, [part for _, part in group])
        results = [self._results(a, part, rows, ahead=True) for (a, part), rows in zip(group, logits, strict=True)]
        mx.async_eval(results, watched.arrays)
        return _Launched(group, results, watched, time.perf_counter())

    def _results(self, answering: Answering, part: batch.Part, rows: mx.array, *, ahead: bool = False) -> list[Sampled]:
        try:
            return answering.results(part, rows, ahead=ahead)
        except Exception as error:  # A grammar's or a sampler's: this request's alone.
            self._end(answering, error)
            return []

    def _hand_out(self, answering: Answering, part: batch.Part, results: Sequence[Sampled]) -> None:
        if answering.finished:
            return
        try:
            if not answering.is_reading:
                self.counts.generated_tokens += answering.take([taken(one) for one in results])
            else:
                answering.has_read(len(part.ids), results)
                if not answering.is_reading:
                    self._share(answering)
        except Exception as error:
            self._end(answering, error)
            return
        if answering.finished:
            self._leave(answering)

    def _share(self, answering: Answering) -> None:
        """Keep what was read just now, if another request waits for it."""
        with self._changed:
            waiting = list(self._waiting)
        if any(_begin_alike(answering, other) for other in waiting):
            self._keep(answering)

    def _account(self, launched: _Launched) -> None:
        group, now = launched.group, time.perf_counter()
        seconds = now - max(launched.begun, self._last_pass_end)
        self._last_pass_end = now
        read = sum(len(part.ids) for answering, part in group if answering.is_reading)
        self.counts.prompt_tokens += read
        self.counts.passes += 1
        self.counts.pass_seconds += seconds
        if not read:
            self._passes.learn(sum(len(part.ids) for _, part in group), seconds)
        if read or self.counts.passes % _CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()

    # How requests end.

    def _leave(self, answering: Answering) -> None:
        """A request has ended as it should, or was cancelled: keep what was read for it, and count it."""
        self._running.remove(answering)
        self.counts.finished += not answering.channel.is_cancelled
        self.counts.cancelled += answering.channel.is_cancelled
        try:
            self._keep(answering)
            self._keep_of_draft(answering)
        except (RuntimeError, MemoryError):  # No room for what only saves time.
            self._prefixes.clear()
        answering.let_go()

    def _keep(self, answering: Answering) -> None:
        assert self.opened
        tokens = answering.tokens[: answering.read]
        if self.limits.deterministic:
            # What was decoded has other bits than what is read; of a prompt whole chunks are the same for everybody.
            prompt = min(answering.read, len(answering.request.prompt) - 1)
            tokens = tokens[: prompt // self.opened.chunk_tokens * self.opened.chunk_tokens]
        if tokens := tokens[: self._tokens_to_spare(answering, answering.cache, answering.read)]:
            self._prefixes.keep(answering.kind, tokens, answering.cache)

    def _keep_of_draft(self, answering: Answering) -> None:
        answering.cache = []
        if (drafting := answering.drafting) and drafting.read:
            drafting.forget_guesses()
            if tokens := drafting.tokens[: self._tokens_to_spare(answering, drafting.cache, drafting.read)]:
                self._prefixes.keep(drafting.model.kind, tokens, drafting.cache)

    def _tokens_to_spare(self, answering: Answering, cache: Sequence[Any], read: int) -> int:
        """How many of the tokens read into its cache can be copied: while that is done, they are in memory twice."""
        assert self.opened
        held = sum(layer.nbytes for layer in cache)
        others = self._reserved_beside(answering)
        spare = self.opened.kv_bytes + self.opened.loaded.plan.parts["working memory"] - others - held
        fitting = min(spare, held) * read // max(held, 1)
        self._prefixes.shrink_to(spare - fitting * held // max(read, 1))
        return max(fitting, 0)

    def _end(self, answering: Answering, error: BaseException) -> None:
        """A request has failed."""
        self.counts.failed += 1
        error = self.why_closed() if self._closing else error
        if answering in self._running:
            self._running.remove(answering)
        answering.fail(coded(error))
        answering.let_go()

    def _break_off(self, those: Sequence[Answering], error: BaseException) -> None:
        self._ahead = None
        for answering in list(those):
            if not answering.finished:
                self._end(answering, error)
        mx.clear_cache()


def coded(error: BaseException) -> MixtralError:
    """`error` as one with a code."""
    if isinstance(error, MixtralError):
        return error
    if isinstance(error, MemoryError) or "alloc" in str(error).lower():
        return EngineError(
            f"There was not enough memory for this step ({error}).",
            code="out_of_memory",
            hint="Use a shorter prompt or fewer requests at once, or a smaller memory budget for the engine.",
            retryable=True,
        )
    return EngineError(
        f"The step failed: {type(error).__name__}: {error}",
        code="step_failed",
        hint="The engine goes on with other requests. If it happens again, please report it.",
        retryable=True,
    )


def _shared_enough(other: Answering) -> int:
    """Tokens that another must have in common with this one for it to wait for them."""
    return max(_WORTH_WAITING_FOR, len(other.tokens) // 2)


def _begin_alike(one: Answering, other: Answering) -> bool:
    """Whether what is read for one is at least half of what the other needs, and not too little to wait for."""
    count = _shared_enough(other)
    return one.kind == other.kind and len(one.tokens) > count and one.tokens[:count] == other.tokens[:count]
