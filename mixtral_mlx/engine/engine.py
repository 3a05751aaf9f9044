"""The API that programs embed: load a model once, ask it anything from any thread, or from asyncio."""

from __future__ import annotations

import math
import secrets
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack

import mlx.core as mx

from ..budget import Plan, in_gb, parse_size
from ..config import Config, MixtralError
from ..generate import GenerateError, Sampling, check_kv_bits, is_number, room_after
from ..memory import CRITICAL, NORMAL, WARNING, Step, rss_bytes
from ..prompt import Message, Tokenizer, Tool, ToolCall
from ..weights import Checkpoint, Loaded, Progress, Share, locate, relief
from ..weights import load as load_weights
from .adapters import Adapter, put, take_out
from .answering import Answering
from .blocks import Blocks, fingerprint
from .drafting import DraftFolder
from .drafts import PassSeconds
from .grammar import Compiler, Format, Grammar, Vocabulary
from .prefixes import Prefixes
from .reply import Channel, Reply
from .request import EngineError, Request, Scores
from .routing import Routing, Watch
from .tools import ToolChoice, tool_rules
from .worker import Limits, Opened, Worker

Messages = str | Sequence[Message | Mapping[str, Any]]
"""A user's message, or a conversation; mappings have the fields of `Message`, as those of tools have `Tool`'s."""
_T = TypeVar("_T")
_CHUNK_TOKENS = 512
"""Tokens in a pass where experts are in memory: few enough not to hold other streams up for long."""
_COMPILING_THREADS = 2
_CLOSE_WITHIN_S = 3.0


class Settings(TypedDict, total=False):
    """How a request is to be answered: the fields of `Sampling` and `Request`."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    max_tokens: int | None
    min_tokens: int
    stop: Sequence[str]
    top_logprobs: int
    ignore_eos: bool
    kv_bits: int | None
    max_kv: int | None
    speculate: Literal["n-gram", "draft"] | None
    response_format: Format | Mapping[str, Any] | None


_SAMPLING = frozenset(field.name for field in fields(Sampling))


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. What the process may use and does, what MLX holds and keeps for reuse, and what that is made of.

    `kv_limit_bytes` is what keys and values may take, of which prompts that were read before keep `prefix_bytes`."""

    budget_bytes: int
    process_bytes: int
    mlx_bytes: int
    mlx_cache_bytes: int
    weights_bytes: int
    kv_limit_bytes: int
    prefix_bytes: int


@dataclass(frozen=True)
class Health:
    """How the engine is. `state` is unloaded, loading, ready, failed (to load, the next request tries again) or closed.

    `step_seconds` is how long the step under way has been going on; a large number means that it is stuck."""

    state: str
    is_alive: bool
    running: int
    queued: int
    step_seconds: float


@dataclass(frozen=True)
class Loading:
    """How a model is brought into memory, each time anew, with the folder of a draft model; see `load`."""

    dtype: str
    memory: int | Plan | None
    context: int | None
    kv_bits: int | None
    prefix_bytes: int | None
    progress: Progress | None
    cancelled: Callable[[], bool]
    draft: Path | None = None
    share: Share | None = None


class Engine:
    """A Mixtral that answers many requests at once. Made by `load`; close it, or use it in a `with` block.

    Everything may be called from any thread. The model lives on a thread of its own."""

    def __init__(
        self, name: str, folder: Path, loading: Loading, limits: Limits, open_disk: Callable[[str], Blocks] | None
    ) -> None:
        checkpoint = Checkpoint.open(folder)  # Says at once what is wrong with a folder.
        self.name = name
        self.folder = folder
        self.config: Config = checkpoint.config
        check_kv_bits(self.config, loading.kv_bits)
        self.tokenizer = Tokenizer.read(folder, self.config.vocab_size)
        self._loading = loading
        self._limits = limits
        self._passes = PassSeconds(self.config.num_local_experts, self.config.num_experts_per_tok)
        tokenizer, config = self.tokenizer, self.config
        self._compiler = Compiler(lambda: Vocabulary(tokenizer, config.vocab_size, config.eos_token_ids))
        self._disk = open_disk(fingerprint(folder, f"{loading.dtype} {checkpoint.dtype}")) if open_disk else None
        self._prefixes = Prefixes(0, self._disk)
        self._draft = (
            DraftFolder.open(loading.draft, loading.dtype, self.tokenizer, self.config.vocab_size)
            if loading.draft
            else None
        )
        self._opener = _Opener(folder, loading, self._prefixes, self._draft)
        self._watch = Watch(self.config)
        self._worker = Worker(self._opener, self.tokenizer, self._prefixes, self._passes, self._watch, limits)
        if loading.share:
            loading.share.when_lost(self._worker.lose)
        self._compilers = ThreadPoolExecutor(_COMPILING_THREADS, "mixtral-grammar")
        self._finalizer = weakref.finalize(self, _close, self._worker, self._compilers)

    # Asking.

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        tool_choice: str | ToolChoice | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        **settings: Unpack[Settings],
    ) -> Reply:
        """Answer the last message of a conversation; the reply can be read while it is written.

        `tool_choice` is "auto", "none", "required" or a function's name. Raises `MixtralError` at once for what cannot
        be asked; what goes wrong later is raised by the reply."""
        request = self.chat_request(
            messages, tools=tools, tool_choice=tool_choice, parallel_tool_calls=parallel_tool_calls, **settings
        )
        return self.submit(request)

    def complete(self, prompt: str | Sequence[int], *, echo: bool = False, **settings: Unpack[Settings]) -> Reply:
        """Continue a text, or ids as they are. `echo` repeats the text first."""
        return self.submit(self.completion_request(prompt, echo=echo, **settings))

    def chat_request(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        tool_choice: str | ToolChoice | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        **settings: Unpack[Settings],
    ) -> Request:
        """What `chat` asks, to be handed to `submit` or `choices`."""
        offered = [_made(Tool, tool, "tool", "bad_tool") for tool in tools or ()]
        chosen = ToolChoice.of(tool_choice) if isinstance(tool_choice, str) else tool_choice
        choice = _made(ToolChoice, chosen, "tool_choice", "bad_tool_choice")
        if not (choice.parallel and parallel_tool_calls):
            # Only a grammar keeps a model from calling several at once.
            choice = replace(choice, parallel=False, strict=choice.strict or bool(offered))
        rules = tool_rules(offered, choice, self.tokenizer)
        if rules.tools and settings.get("response_format"):
            raise EngineError(
                "Both tools and a response_format were given, and a reply cannot be held to both.",
                code="bad_request",
                hint='Give one of them, or tool_choice="none".',
            )
        prompt = self.tokenizer.encode_chat(_as_messages(messages), rules.tools)
        return replace(_request(prompt, settings), rules=rules)

    def completion_request(
        self, prompt: str | Sequence[int], *, echo: bool = False, **settings: Unpack[Settings]
    ) -> Request:
        """What `complete` asks, to be handed to `submit` or `choices`."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        shown = (prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)) if echo else ""
        return replace(_request(ids, settings), echo=shown)

    def score(self, prompt: str | Sequence[int], continuation: str | Sequence[int]) -> Scores:
        """How likely the model finds `continuation` after `prompt`, token by token."""
        return self.submit(self.score_request(prompt, continuation)).result().scores

    def score_request(self, prompt: str | Sequence[int], continuation: str | Sequence[int]) -> Request:
        """What `score` asks, to be handed to `submit`; its result has `scores`."""
        before = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        after = self.tokenizer.encode(continuation, bos=False) if isinstance(continuation, str) else list(continuation)
        if not before or not after:
            raise GenerateError("There is nothing to score.", code="empty_prompt", hint="Give both texts.")
        return Request((*before, *after), purpose="score", scored_from=len(before))

    def embed(self, text: str | Sequence[int]) -> tuple[float, ...]:
        """The mean of the last hidden states over a text, (D,). Mixtral was not made for this: expect little of it."""
        return self.submit(self.embed_request(text)).result().embedding

    def embed_request(self, text: str | Sequence[int]) -> Request:
        """What `embed` asks, to be handed to `submit`; its result has an `embedding`."""
        return Request(tuple(self.tokenizer.encode(text) if isinstance(text, str) else text), purpose="embed")

    def check(self, request: Request) -> None:
        """Raise `MixtralError` for a request that cannot be answered, whatever else is asked."""
        self._checked(self._with_defaults(request))

    def submit(self, request: Request) -> Reply:
        """Answer a request. Raises `MixtralError` at once where it cannot be answered or has to wait too long."""
        return self._submit([request])[0]

    def choices(self, n: int, request: Request) -> list[Reply]:
        """Answer a request `n` times; its prompt is read once. With a seed, the k-th is that of seed + k alone."""
        if not (is_number(n, int) and 1 <= n <= self._limits.max_queue):
            raise GenerateError(f"n is {n!r}, expected 1 to {self._limits.max_queue}.", code="bad_sampling")
        seed = _seed(request)
        each = [(seed + k) % (1 << 64) for k in range(n)]
        return self._submit([replace(request, sampling=replace(request.sampling, seed=one)) for one in each])

    def _submit(self, requests: Sequence[Request]) -> list[Reply]:
        requests = [self._with_defaults(request) for request in requests]
        limits = [self._checked(request) for request in requests]
        grammar = self._compiled(requests[0])  # They differ in their seeds only.
        answerings = [
            _answering(request, limit, grammar, self._passes, self._worker)
            for request, limit in zip(requests, limits, strict=True)
        ]
        self._worker.submit(*answerings)
        return [Reply(answering.channel, self) for answering in answerings]

    def _with_defaults(self, request: Request) -> Request:
        sampling = replace(request.sampling, seed=_seed(request))
        bits = request.kv_bits
        if bits is None and request.max_kv is None:
            bits = self._loading.kv_bits
        return replace(request, sampling=sampling, kv_bits=bits)

    def _checked(self, request: Request) -> int:
        """The most tokens that may be generated; raises `MixtralError` for a request that cannot be answered."""
        window, answers = request.max_kv, request.purpose == "answer"
        # A window takes no more memory, but the model knows no positions past its own limit.
        context = self.config.max_position_embeddings if window else self.context
        room = room_after(request.prompt, self.config.vocab_size, context, least=answers)
        check_kv_bits(self.config, request.kv_bits)
        if window is not None and not (is_number(window, int) and 8 <= window <= self.context):
            raise GenerateError(f"max_kv is {window!r}, expected 8 to {self.context:,}.", code="bad_sampling")
        if window and request.kv_bits:
            raise _not_together("kv_bits and max_kv", "a window cannot be quantized")
        if not isinstance(request.response_format, Format | None):
            raise EngineError(
                f"response_format is a {type(request.response_format).__name__}, expected a Format.",
                code="bad_response_format",
            )
        if request.speculate not in (None, "n-gram", "draft"):
            raise GenerateError(f"speculate is {request.speculate!r}, expected n-gram or draft.", code="bad_sampling")
        if request.speculate == "draft" and not self._draft:
            raise GenerateError(
                "speculate is 'draft', and there is no draft model.",
                code="no_draft",
                hint='Load the model with draft="FOLDER", or use speculate="n-gram".',
            )
        if window and request.speculate:
            raise _not_together("speculate and max_kv", "a window cannot take back what was guessed wrong")
        if request.speculate and self._limits.deterministic:
            raise _not_together("speculate and deterministic", "how much is guessed hangs on measured times")
        if not (is_number(request.scored_from, int) and 1 <= request.scored_from <= len(request.prompt)):
            raise GenerateError(
                f"scored_from is {request.scored_from!r}, expected 1 to {len(request.prompt)}.", code="bad_sampling"
            )
        if not answers:
            _check_reads_only(request)
        return min(room, request.sampling.max_tokens or room) if answers else 0

    def _compiled(self, request: Request) -> Future[Grammar] | None:
        """The request's grammar, compiled elsewhere."""
        if request.rules.grammar:
            asked, begins = Format("lark", request.rules.grammar), False
        elif request.response_format:
            asked, begins = request.response_format, self.tokenizer.begins(request.prompt)
        else:
            return None
        try:
            return self._compilers.submit(self._compiler.compiled, asked, begins=begins)
        except RuntimeError:
            raise self._worker.why_closed() from None

    def use_adapter(self, folder: str | Path | None) -> None:
        """Put a LoRA adapter in mlx-lm's format into the model, or none; replaces the one that is there.

        Requests asked before it end with the one they began with; returns once it is done. Raises `MixtralError`, and
        after an adapter that does not fit the model, or its memory, has none."""
        if folder is not None and self._loading.share:
            raise _not_split("An adapter")
        adapter = Adapter.read(Path(folder).expanduser()) if folder is not None else None
        opener, worker = self._opener, self._worker

        def swap(opened: Opened) -> None:
            opener.adapter, worker.adapter = None, ""
            # Out first: after one that is refused there is none, whatever it was refused for.
            worker.opened = opener.adapted(opened, None)
            worker.opened = opener.adapted(worker.opened, adapter)
            opener.adapter, worker.adapter = adapter, adapter.key if adapter else ""

        worker.call_between(swap).result()

    # How it is.

    @property
    def limits(self) -> Limits:
        """How many requests run and wait at most."""
        return self._limits

    @property
    def loaded(self) -> Loaded | None:
        """What is in memory, and how; None while nothing is. To be looked at only: its arrays are the engine's."""
        opened = self._worker.opened
        return opened.loaded if opened else None

    @property
    def lost(self) -> MixtralError | None:
        """What ended everything for good: the loss of another machine that had a share of the model."""
        return self._worker.lost

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._opener.context

    @property
    def chunk_tokens(self) -> int:
        """Tokens of prompts that go into one pass."""
        return self._opener.chunk_tokens

    def memory(self) -> MemoryUse:
        """Who holds how much memory now."""
        opened = self._worker.opened
        return MemoryUse(
            budget_bytes=opened.loaded.plan.budget_bytes if opened else 0,
            process_bytes=rss_bytes(),
            mlx_bytes=mx.get_active_memory(),
            mlx_cache_bytes=mx.get_cache_memory(),
            weights_bytes=opened.loaded.weights_bytes + (opened.draft.nbytes if opened.draft else 0) if opened else 0,
            kv_limit_bytes=opened.kv_bytes if opened else 0,
            prefix_bytes=self._prefixes.nbytes,
        )

    def stats(self) -> dict[str, Any]:
        """What was done so far, in numbers: requests and tokens, kept prompts, their files, streamed experts, and
        since the model was loaded the draft model's guesses."""
        opened = self._worker.opened
        streaming = opened.loaded.streaming if opened else None
        return {
            "requests": asdict(self._worker.counts),
            "prefixes": asdict(self._prefixes.statistics),
            "prefix_files": asdict(self._disk.statistics) if self._disk else None,
            "experts": asdict(streaming.statistics) if streaming else None,
            "draft": asdict(opened.draft.counts) if opened and opened.draft else None,
        }

    def watch_routing(self, seconds: float = math.inf) -> None:
        """Count which experts are chosen, for so many seconds from now at least; 0 ends it for everybody.

        Who shows `routing` now and then renews this each time, and need not say when they stop looking."""
        if not seconds >= 0:
            raise EngineError(f"seconds is {seconds}, expected 0 or more.", code="bad_option")
        self._watch.look(seconds)

    def routing(self) -> Routing:
        """Which experts were chosen while `watch_routing` was on, since the model was made or `reset_routing`."""
        return self._watch.now()

    def reset_routing(self) -> None:
        """Begin to count anew."""
        self._watch.reset()

    def health(self) -> Health:
        """Whether requests are answered, and how many there are."""
        worker, since = self._worker, self._worker.busy_since
        return Health(
            state=worker.state,
            is_alive=worker.is_alive,
            running=worker.running,
            queued=worker.queued,
            step_seconds=time.monotonic() - since if since else 0.0,
        )

    def forget(self) -> None:
        """Let go of what is kept in memory of prompts that were read; the next ones are read anew, or from disk."""
        self._worker.call(lambda opened: self._prefixes.clear()).result()

    def load(self) -> None:
        """Bring the model into memory now rather than with the next request. Raises `MixtralError`."""
        self._worker.call(lambda opened: None).result()

    def unload(self) -> None:
        """Let go of the model's memory; the next request loads it again. Raises `EngineError` while requests run."""
        self._worker.unload()

    def relieve(self, level: int) -> None:
        """Give up memory, for a program that was told how short it is: `level` is one of macOS's, 1, 2 or 4.

        At 2 prompts kept for later go, at 4 also what streaming can spare, and the model once nothing is asked; the
        next request loads it again. Needs no call where the engine itself is left to notice. Raises `EngineError`."""
        if level not in (NORMAL, WARNING, CRITICAL):
            raise EngineError(f"The level of memory pressure is {level}, expected 1, 2 or 4.", code="bad_option")
        if level != NORMAL:
            self._worker.relieve(unload=level == CRITICAL)

    def close(self) -> None:
        """End everything: requests end with the code "closed", the model's memory is free after the step under way."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def load(
    model: str | Path | None = None,
    *,
    memory: str | int | Plan | None = None,
    context: int | None = None,
    dtype: str = "auto",
    kv_bits: int | None = None,
    adapter: str | Path | None = None,
    draft: str | Path | None = None,
    prefix_memory: str | int | None = None,
    cache_dir: str | Path | None = None,
    cache_size: str | int = "10GB",
    max_concurrent: int = 16,
    max_queue: int = 64,
    idle_unload_s: float | None = None,
    deterministic: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
    fetching: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    on_warning: Callable[[str], None] | None = None,
    share: Share | None = None,
) -> Engine:
    """A model ready to answer: a folder, a repository on Hugging Face, or the demo model for None.

    `memory` is what the whole process may use ("12GB", bytes, or a plan of its own; None: what the machine can spare):
    experts that do not fit are streamed. `context` is how many tokens a prompt and its answer may have. `kv_bits`
    quantizes keys and values of requests without a window. `adapter` is for `use_adapter`. `draft` is a small Mistral
    or Mixtral with the same tokenizer, for requests with `speculate="draft"`; the budget has to do for it too. What
    prompts have in common is kept in memory, up to `prefix_memory` of what running requests leave of the budget, and in
    `cache_dir` over restarts, up to `cache_size`. An idle model is let go of after `idle_unload_s` and comes back with
    the next request. While weights are read, `progress` is called with bytes done and in all, on the engine's thread,
    and so is `fetching`, on a thread of its own, while what a repository has is brought here; left out, `progress` is
    told of that, too. `cancelled` is asked whether to give up; what was fetched by then is kept, and gone on with.
    `on_warning` is told, on any thread, what went wrong with `cache_dir` and is no error to a request. A `share` is the
    part of the model that this machine has of it, where several work together. Raises `MixtralError`."""
    _check_limits(max_concurrent, max_queue, idle_unload_s)
    for what, given in (("An adapter", adapter), ("A cache_dir", cache_dir), ("A draft", draft)):
        if share and given:
            raise _not_split(what)
    here = partial(locate, offline=offline, on_progress=fetching or progress, cancelled=cancelled)
    beside = here(draft) if draft is not None else None
    loading = Loading(
        dtype, _size(memory), context, kv_bits, _size(prefix_memory), progress, cancelled or _never, beside, share
    )
    limits = Limits(max_concurrent, max_queue, idle_unload_s, deterministic)
    disk = None
    if cache_dir is not None:
        disk = partial(Blocks, Path(cache_dir).expanduser(), _size(cache_size), on_warning=on_warning)
    name = "demo" if model is None else str(model)
    engine = Engine(name, here(model), loading, limits, disk)
    try:
        engine.load()
        if adapter is not None:
            engine.use_adapter(adapter)
    except BaseException:
        engine.close()
        raise
    return engine


class _Opener:
    """Loads the model and says what goes where; knows the engine's parts but not the engine, which may be dropped."""

    def __init__(self, folder: Path, loading: Loading, prefixes: Prefixes, draft: DraftFolder | None) -> None:
        self.folder = folder
        self.loading = loading
        self.prefixes = prefixes
        self.draft = draft
        self.adapter: Adapter | None = None
        self.context = self.chunk_tokens = 0
        """What the last plan had, known once the model has been loaded."""

    def __call__(self, cancelled: Callable[[], bool]) -> Opened:
        how = self.loading
        memory = self._with_room_for_draft()
        draft = self.draft.load() if self.draft else None
        loaded = load_weights(
            self.folder,
            dtype=how.dtype,
            memory=memory,
            context=how.context,
            kv_bits=how.kv_bits,
            on_progress=how.progress,
            cancelled=lambda: cancelled() or how.cancelled(),
            share=how.share,
        )
        plan = loaded.plan
        resident = plan.mode == "resident"
        kv_bytes = plan.parts["kv cache"] + (max(plan.budget_bytes - plan.needed_bytes, 0) if resident else 0)
        if draft and memory is how.memory:
            kv_bytes -= draft.nbytes  # A plan that was given knows of no draft.
        self.prefixes.most_bytes = kv_bytes if how.prefix_bytes is None else min(kv_bytes, how.prefix_bytes)
        eased = relief(loaded.streaming, Step("kept prompts", self.prefixes.clear))
        if loaded.streaming:
            loaded.streaming.before_step = eased.check
        chunk = min(plan.chunk_tokens, _CHUNK_TOKENS) if resident else plan.chunk_tokens
        self.context, self.chunk_tokens = plan.context, chunk
        return self.adapted(Opened(loaded, eased, kv_bytes, chunk, kv_bytes, draft), self.adapter)

    def _with_room_for_draft(self) -> int | Plan | None:
        """The memory there is, divided already where a draft model is to be beside the model."""
        how = self.loading
        if not self.draft:
            return how.memory
        if not isinstance(how.memory, Plan):
            return self.draft.plan(
                self.folder, dtype=how.dtype, memory=how.memory, context=how.context, kv_bits=how.kv_bits
            )
        have = how.memory.parts["kv cache"]
        if how.memory.mode == "resident":
            have += max(how.memory.budget_bytes - how.memory.needed_bytes, 0)
        if self.draft.nbytes >= have:
            raise EngineError(
                f"The draft model takes {in_gb(self.draft.nbytes)}, and the plan has {in_gb(have)} for it together "
                "with keys and values.",
                code="over_budget",
                hint="Plan with more memory, or say how much there is and leave the plan out.",
            )
        return how.memory

    def adapted(self, opened: Opened, adapter: Adapter | None) -> Opened:
        """`opened` with this adapter, whose memory keys and values go without."""
        if adapter is None:
            take_out(opened.loaded.model)
            return replace(opened, kv_bytes=opened.all_kv_bytes)
        if adapter.nbytes >= opened.all_kv_bytes:
            raise EngineError(
                f"The adapter takes {in_gb(adapter.nbytes)}, and the budget has {in_gb(opened.all_kv_bytes)} for it "
                "together with keys and values.",
                code="over_budget",
                hint="Load the model with a larger context or more memory.",
            )
        put(opened.loaded.model, adapter)
        return replace(opened, kv_bytes=opened.all_kv_bytes - adapter.nbytes)


def _answering(
    request: Request, limit: int, grammar: Future[Grammar] | None, passes: PassSeconds, worker: Worker
) -> Answering:
    channel = Channel()
    answering = Answering(request, channel, limit, grammar, passes)
    channel.on_cancel = lambda: worker.cancel(answering)
    if grammar:
        grammar.add_done_callback(lambda _: worker.wake())
    return answering


def _not_split(what: str) -> EngineError:
    return EngineError(f"{what} cannot be used with a model that several machines share.", code="not_available")


def _not_together(what: str, why: str) -> GenerateError:
    return GenerateError(f"There are {what}, and {why}.", code="bad_sampling", hint="Leave one of them out.")


def _check_reads_only(request: Request) -> None:
    """Refuse what says how to answer where nothing is to be answered."""
    read = Request(
        request.prompt, Sampling(seed=request.sampling.seed), request.kv_bits, request.max_kv, purpose=request.purpose
    )
    if wrong := [
        field.name
        for field in fields(Request)
        if field.name != "scored_from" and getattr(request, field.name) != getattr(read, field.name)
    ]:
        raise EngineError(
            f"The request's purpose is {request.purpose!r}, and {wrong[0]} is for answers.", code="bad_request"
        )


def _close(worker: Worker, compilers: ThreadPoolExecutor) -> None:
    worker.close(_CLOSE_WITHIN_S)
    compilers.shutdown(wait=False, cancel_futures=True)


def _request(prompt: Sequence[int], settings: Settings) -> Request:
    asked: dict[str, Any] = dict(settings)
    if isinstance(stop := asked.get("stop"), Sequence):
        asked["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if unknown := sorted(asked.keys() - Settings.__annotations__.keys()):
        raise GenerateError(
            f"There is no setting {unknown[0]!r}.", code="unknown_setting", hint=f"There are {_names()}."
        )
    if asked.get("response_format") is not None:
        asked["response_format"] = _made(Format, asked["response_format"], "response_format", "bad_response_format")
    sampling = Sampling(**{name: value for name, value in asked.items() if name in _SAMPLING})
    return Request(tuple(prompt), sampling, **{name: value for name, value in asked.items() if name not in _SAMPLING})


def _names() -> str:
    return ", ".join(Settings.__annotations__)


def _seed(request: Request) -> int:
    seed = request.sampling.seed
    return secrets.randbits(64) if seed is None else seed


def _as_messages(messages: Messages) -> list[Message]:
    if isinstance(messages, str):
        return [Message("user", messages)]
    made = [_made(Message, message, "message", "bad_message") for message in messages]
    return [
        replace(
            message,
            tool_calls=tuple(_made(ToolCall, call, "tool call", "bad_message") for call in message.tool_calls or ()),
        )
        for message in made
    ]


def _made(cls: type[_T], given: _T | Mapping[str, Any], what: str, code: str) -> _T:
    """`given`, made of its fields where it is a mapping."""
    if isinstance(given, cls):
        return given
    try:
        return cls(**given)  # type: ignore[arg-type]
    except TypeError as error:
        names = ", ".join(field.name for field in fields(cls))  # type: ignore[arg-type]
        raise GenerateError(f"There is no such {what}: {error}.", code=code, hint=f"It has {names}.") from None


def _never() -> bool:
    return False


def _size(size: str | _T) -> int | _T:
    return parse_size(size) if isinstance(size, str) else size


def _check_limits(max_concurrent: int, max_queue: int, idle_unload_s: float | None) -> None:
    for name, value, least in (
        ("max_concurrent", max_concurrent, 1),
        ("max_queue", max_queue, 1),
        ("idle_unload_s", idle_unload_s, 0),
    ):
        if value is not None and not value >= least:
            raise EngineError(f"{name} is {value}, expected {least} or more.", code="bad_option")
