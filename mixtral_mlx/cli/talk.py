"""The commands `chat` and `generate`."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..opening import LONG_PROMPT, ModelChoice, Plain, joined, open_model, wired
from ..prompt import Message
from ..session import mlx_failures, peak_bytes
from ..terminal import Bar, CtrlC, PlainText, clean, complain

if TYPE_CHECKING:
    from ..experts import Statistics
    from ..generate import Chunk, Sampling, Usage
    from ..prompt import Tokenizer
from .options import (
    Parser,
    UsageError,
    add_model,
    add_parallel,
    add_settings,
    failed,
    given_settings,
    model_choice,
    print_json,
    required_model,
    stdin_text,
)


def chat(arguments: list[str]) -> int:
    """`mixtral-mlx chat`."""
    parser = Parser(
        "mixtral-mlx chat",
        description="Talk with a model. In a pipe, each line of stdin is a message, and the replies go to stdout.",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    parser.add_argument("--one", action="store_true", help="all of stdin is one message")
    parser.add_argument("--quiet", action="store_true", help="no banner and no progress bars")
    add_model(parser, "the demo")
    add_parallel(parser)
    add_settings(parser, {"temperature": "0.7; for the demo 0", "top_p": "0.95; for the demo 1"})
    parsed = parser.parse(arguments)
    from ..chat import run

    name = parsed.model or os.environ.get("MIXTRAL_MLX_MODEL") or None
    choice = model_choice(parsed, name)
    with wired(choice), joined(choice, complain) as mine:
        return 0 if mine is None else run(mine, system=parsed.system, settings=given_settings(parsed), one=parsed.one)


_GENERATE = """Complete a prompt: --prompt, --prompt-ids, or stdin, whose last line end is not part of it.
The text goes to stdout as it comes and ends with a new line."""


@dataclass(frozen=True)
class _Request:
    """What `generate` was asked: a prompt as text or as ids (neither: on stdin), and what to do with it."""

    choice: ModelChoice
    text: str | None
    ids: tuple[int, ...]
    chat: bool
    system: str
    settings: dict[str, Any]
    as_json: bool


def generate(arguments: list[str]) -> int:
    """`mixtral-mlx generate`."""
    request = _parse_generate(arguments)
    lost = partial(failed, as_json=request.as_json)
    with wired(request.choice), joined(request.choice, lost) as choice:
        if choice is None:
            return 0
        if not request.ids and request.text is None:
            request = replace(request, text=stdin_text())
        ready = open_model(choice)
        prompt = _prompt_ids(request, ready.tokenizer)
        answered = _complete(request, ready, prompt)
    chunks = answered.chunks
    last = chunks[-1]
    if request.as_json:
        print_json(_report(ready, answered))
    elif last.finish_reason == "length" and sys.stderr.isatty() and not request.choice.quiet:
        print(f"[cut off after {last.usage.completion_tokens:,} tokens, see --max-tokens]", file=sys.stderr)
    return 130 if last.finish_reason == "cancelled" else 0


def _parse_generate(arguments: list[str]) -> _Request:
    parser = Parser("mixtral-mlx generate", description=_GENERATE)
    parser.add_argument("--prompt", metavar="TEXT", help="text to complete")
    parser.add_argument("--prompt-ids", type=_ids, metavar="1,2,3", help="token ids to complete, taken as they are")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message, to be answered")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt, with --chat")
    parser.add_argument("--json", action="store_true", help="print one object: text, tokens, usage, timings, memory")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_model(parser, "required")
    add_parallel(parser)
    add_settings(parser, {"temperature": "0", "max_tokens": str(_MAX_TOKENS)})
    parsed = parser.parse(arguments)
    name = required_model(parsed)
    if parsed.prompt is not None and parsed.prompt_ids is not None:
        raise UsageError("Both --prompt and --prompt-ids were given, expected one.", code="bad_option")
    if parsed.prompt_ids is not None and parsed.chat:
        raise UsageError("--chat needs text, got --prompt-ids.", code="bad_option")
    if parsed.system and not parsed.chat:
        raise UsageError("--system goes with --chat only.", code="bad_option", hint="Add --chat.")
    settings = {"max_tokens": _MAX_TOKENS, **given_settings(parsed)}
    ids = tuple(parsed.prompt_ids or ())
    return _Request(model_choice(parsed, name), parsed.prompt, ids, parsed.chat, parsed.system, settings, parsed.json)


_MAX_TOKENS = 512


def _ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"is {text[:60]!r}, expected whole numbers with commas between them")
    return [int(part) for part in parts]


def _prompt_ids(request: _Request, tokenizer: Tokenizer) -> list[int]:
    if request.text is None:
        return list(request.ids)
    if not request.chat:
        return tokenizer.encode(request.text)
    system = [Message("system", request.system)] if request.system else []
    return tokenizer.encode_chat([*system, Message("user", request.text)])


@dataclass(frozen=True)
class _Answered:
    """An answer's chunks, and what streaming had done when the first came."""

    chunks: list[Chunk]
    at_first: Statistics | None


def _complete(request: _Request, ready: Plain, prompt: list[int]) -> _Answered:
    """Generate, showing text as it comes unless it is to be JSON."""
    from ..generate import stream_generate

    quiet = request.choice.quiet
    view = None if request.as_json else PlainText()
    shown = clean if sys.stdout.isatty() else str
    collected: list[Chunk] = []
    streaming, at_first = ready.loaded.streaming, None
    with mlx_failures(), CtrlC() as stopped, Bar("Reading the prompt", quiet=quiet, at_least=LONG_PROMPT) as bar:
        chunks = stream_generate(
            ready.loaded.model,
            ready.tokenizer,
            prompt,
            _sampling(request),
            conversation=ready.conversation,
            on_prompt=bar,
            cancelled=stopped,
        )
        for chunk in chunks:
            if streaming and not collected:
                at_first = streaming.statistics
            collected.append(chunk)
            if view:
                view.add(shown(chunk.text))
    if view:
        view.finish()
    return _Answered(collected, at_first)


def _sampling(request: _Request) -> Sampling:
    from ..generate import Sampling

    return Sampling(**request.settings)


def _report(ready: Plain, answered: _Answered) -> dict[str, Any]:
    """The object `--json` prints. Other programs read these names."""
    chunks = answered.chunks
    usage: Usage = chunks[-1].usage
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "tokens": [chunk.token for chunk in chunks if chunk.token is not None],
        "finish_reason": chunks[-1].finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "timings": {
            "load_s": round(ready.loaded.seconds, 4),
            "first_token_s": round(usage.prompt_seconds, 4),
            "prompt_tps": round(usage.prompt_tps, 2),
            "generation_tps": round(usage.generation_tps, 2),
        },
        "memory": _memory(ready, answered),
    }


def _memory(ready: Plain, answered: _Answered) -> dict[str, Any]:
    loaded, usage = ready.loaded, answered.chunks[-1].usage
    report = {
        "mode": loaded.plan.mode,
        "budget_bytes": loaded.plan.budget_bytes,
        "peak_bytes": peak_bytes(),
        "slots_per_layer": loaded.plan.slots_per_layer,
    }
    if loaded.streaming is None or answered.at_first is None:
        # With every expert resident none is ever looked for: no hits, no misses, and each weight read once.
        return report | {"expert_hits": 0, "expert_misses": 0, "bytes_read": loaded.weights_bytes}
    done = loaded.streaming.statistics
    report |= _streamed(done, usage.prompt_seconds + usage.generation_seconds)
    # After the first token there is no prompt in it.
    return report | {"decode": _streamed(done - answered.at_first, usage.generation_seconds)}


def _streamed(done: Statistics, seconds: float) -> dict[str, Any]:
    """What streaming did in so many seconds, under the names that are printed."""
    entry = asdict(done) | {"compute_s": seconds - done.stall_s}
    entry = {name: round(value, 3) if name.endswith("_s") else value for name, value in entry.items()}
    return {"expert_hits": entry.pop("hits"), "expert_misses": entry.pop("misses"), **entry}
