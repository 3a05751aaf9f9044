"""The command `mixtral-mlx`: arguments, dispatch, errors and exit codes; and the command `generate`.

Answers `--help` and refuses mistakes without importing MLX. The argparse namespace stays in this file: what runs is
given dataclasses."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .budget import parse_size
from .config import RECIPES, MixtralError
from .opening import LONG_PROMPT, ModelChoice, Plain, joined, open_model, wired
from .prompt import Message
from .session import SETTINGS, mlx_failures, parse_setting, peak_bytes
from .terminal import Bar, CtrlC, PlainText, clean, complain

if TYPE_CHECKING:
    from .bench.commands import Answer as Measured
    from .convert.commands import Answer
    from .experts import Statistics
    from .generate import Chunk, Sampling, Usage
    from .plan import Answer as Planned
    from .prompt import Tokenizer
    from .routes.commands import Answer as Routed


class UsageError(MixtralError):
    """A command line that asks for what there is not, or cannot be."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    _mend_streams()
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except OSError as error:
        # Nothing more can be written; and Python would try again, and complain, when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            where = error.filename or "the output"
            complain(MixtralError(f"Cannot use {where}: {error.strerror or error}.", code="system_error"))
        return 1


def _mend_streams() -> None:
    """Make the standard streams usable where a parent has closed them or their encoding lacks characters."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open to the end
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _run(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    try:
        return _dispatch(arguments)
    except MixtralError as error:
        return _failed(error, as_json)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _failed(MixtralError("Interrupted.", code="cancelled"), as_json)
    except SystemExit as leaving:  # after --help, or SIGTERM
        return int(leaving.code or 0)


def _failed(error: MixtralError, as_json: bool) -> int:
    if as_json:
        _print_json({"error": {"code": error.code, "message": str(error), "hint": error.hint}})
    if error.code == "cancelled":
        return 130
    complain(error)
    return 2 if isinstance(error, UsageError) or error.code in ("bad_sampling", "bad_context") else 1


def _print_json(data: dict[str, Any]) -> None:
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(encoding="utf-8")  # JSON is UTF-8, wherever it is printed.
    print(json.dumps(data, ensure_ascii=False), flush=True)


# Arguments.

_EPILOG = """commands:
  chat         talk with a model in the terminal
  generate     complete one prompt
  convert      make a folder this program runs from any Mixtral checkpoint
  serve        answer programs: OpenAI's and Anthropic's APIs, and a page to chat on
  plan         say what runs in how much memory, and how fast that should be
  verify       check that a converted folder is as it was written
  perplexity   measure how well a model predicts a text
  bench        measure how fast a model runs here, next to mlx-lm
  routes       show which experts each token of a text used
  helper       answer an app that started this, in JSON lines on stdin and stdout

`mixtral-mlx COMMAND --help` says more."""


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        raise UsageError("No command was given.", code="no_command", hint="mixtral-mlx --help lists them.")
    command, *rest = arguments
    if command in ("-h", "--help"):
        _top_parser().print_help()
    elif command == "--version":
        print(f"mixtral-mlx {__version__}")
    elif command in _COMMANDS:
        _check_launched(command)
        return _COMMANDS[command](rest)
    else:
        _refuse_command(command)
    return 0


_SHARED = ("chat", "generate", "serve")


def _check_launched(command: str) -> None:
    """Refuse what several processes of `mlx.launch` would each do by themselves."""
    if command not in _SHARED and "MLX_RANK" in os.environ:
        raise UsageError(
            f"`{command}` cannot be shared by several machines, only {', '.join(_SHARED)} can.", code="not_available"
        )


def _refuse_command(command: str) -> NoReturn:
    if command.startswith("-"):
        raise UsageError(
            f"{command} stands before the command.", code="no_command", hint="Write: mixtral-mlx COMMAND [OPTIONS]"
        )
    raise UsageError(
        f"There is no command {command!r}, there are: {', '.join(_COMMANDS)}.",
        code="unknown_command",
        hint=_did_you_mean(command, _COMMANDS),
    )


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    begun = [option for option in known if option.startswith(word)]
    near = begun or difflib.get_close_matches(word, known, 1)
    return f"Did you mean {near[0]}?" if near else ""


class _Parser(argparse.ArgumentParser):
    """argparse with errors of our form: unknown options refused by name, nothing abbreviated."""

    def __init__(self, prog: str, **how: Any) -> None:
        super().__init__(prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **how)

    def error(self, message: str) -> NoReturn:
        found = re.fullmatch(r"argument (-[^:]*): (.*)", message, re.DOTALL)
        text = f"{found[1]} {found[2]}" if found else message
        missing = message.endswith("expected one argument")
        hint = "A value that begins with a dash is written --option=VALUE." if missing else ""
        raise UsageError(f"{text.rstrip('.')}.", code="bad_option", hint=hint)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Like `parse_args`, but says what was probably meant."""
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            self._refuse(unknown[0].split("=")[0])
        return parsed

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            raise UsageError(
                f"{self.prog} takes no argument {word!r}.",
                code="unexpected_argument",
                hint="Everything is given by options; see --help.",
            )
        raise UsageError(
            f"{self.prog} has no option {word}.",
            code="unknown_option",
            hint=_did_you_mean(word, self._option_string_actions) or f"{self.prog} --help lists them.",
        )


def _top_parser() -> _Parser:
    parser = _Parser(
        "mixtral-mlx",
        description="Mixtral 8x7B and 8x22B with MLX.",
        usage="mixtral-mlx COMMAND [OPTIONS]",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    return parser


def _add_model(parser: _Parser, default: str) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model",
        metavar="M",
        help=f"a folder, a Hugging Face repository, or `demo`; MIXTRAL_MLX_MODEL names it too ({default})",
    )
    group.add_argument("--offline", action="store_true", help="fetch nothing from the network")
    group.add_argument(
        "--dtype",
        type=_one_of("auto", "bfloat16", "float16", "float32"),
        default="auto",
        metavar="T",
        help="compute in bfloat16, float16 or float32; auto is the checkpoint's own, on M1 and M2 float16, "
        "without a GPU float32",
    )
    group.add_argument(
        "--context", type=_count(2), metavar="N", help="most tokens of prompt and answer (the model's own limit)"
    )
    group.add_argument("--kv-bits", type=_one_of(4, 8), metavar="N", help="keep the cache in 4 or 8 bits")
    group.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="most the whole process may use, as 12GB; experts that have no room are read from the SSD when they are "
        "needed (what this machine can spare)",
    )
    group.add_argument(
        "--wired",
        type=_one_of("off", "fit"),
        default="off",
        metavar="W",
        help="fit keeps what fits into --memory from being compressed or swapped while other programs need memory, on "
        "Metal only; off by default, as macOS has crashed where two programs set this limit (off)",
    )


def _add_parallel(parser: _Parser) -> None:
    group = parser.add_argument_group("several Macs, started with mlx.launch")
    group.add_argument(
        "--parallel",
        type=_one_of("tensor", "expert", "pipeline"),
        metavar="P",
        help="split heads and each expert (tensor), heads and whole experts (expert), or layers (pipeline)",
    )
    group.add_argument(
        "--split", type=_numbers, metavar="64,36", help="how much of the model each of them gets (all the same)"
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text[:60]!r}, expected numbers with commas between them") from None


def _add_engine(parser: _Parser) -> None:
    group = parser.add_argument_group("how requests share it")
    group.add_argument("--max-concurrent", type=_count(1), metavar="N", help="requests answered at a time (16)")
    group.add_argument("--max-queue", type=_count(1), metavar="N", help="requests that may wait (64)")
    group.add_argument(
        "--prefix-memory", type=_size, metavar="SIZE", help="most that read prompts may keep (what is left of --memory)"
    )
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help="keep read prompts there over restarts (nowhere)")
    group.add_argument("--cache-size", type=_size, metavar="SIZE", help="most they take there (10GB)")
    group.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA adapter in mlx-lm's format")
    group.add_argument(
        "--draft", metavar="M", help='a small model with the same tokenizer, for requests with "speculate": "draft"'
    )
    group.add_argument(
        "--idle-unload",
        dest="idle_unload_s",
        type=_seconds,
        metavar="S",
        help="let go of the model after so many idle seconds (never)",
    )
    group.add_argument(
        "--deterministic", action="store_true", help="answers are the same bits whatever else runs; slower"
    )


_ENGINE = (
    *("max_concurrent", "max_queue", "prefix_memory", "cache_dir", "cache_size"),
    *("adapter", "draft", "idle_unload_s", "deterministic"),
)


def _engine_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was given of what `load` takes besides the model."""
    return {name: getattr(parsed, name) for name in _ENGINE if getattr(parsed, name) not in (None, False)}


def _add_settings(parser: _Parser, defaults: dict[str, str]) -> None:
    group = parser.add_argument_group("how to choose tokens")
    for name, setting in SETTINGS.items():
        option = "--" + name.replace("_", "-")
        default = f" ({defaults[name]})" if name in defaults else ""
        group.add_argument(
            option,
            type=_setting(name),
            action="append" if name == "stop" else "store",
            metavar="TEXT" if name == "stop" else "N",
            help=setting.help + ("; may be given several times" if name == "stop" else default),
        )


def _setting(name: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return parse_setting(name, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _one_of(*values: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        for value in values:
            if text == str(value):
                return value
        raise argparse.ArgumentTypeError(f"is {text!r}, expected one of {', '.join(map(str, values))}")

    return parse


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except MixtralError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("The size ")) from None


def _count(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"is {text!r}, expected a whole number of at least {low}")
        return int(text)

    return parse


def _model_choice(parsed: argparse.Namespace, name: str | None) -> ModelChoice:
    return ModelChoice(
        name=None if name == "demo" else name,
        dtype=parsed.dtype,
        kv_bits=parsed.kv_bits,
        context=parsed.context,
        memory_bytes=parsed.memory,
        wired=parsed.wired,
        offline=parsed.offline,
        quiet=parsed.quiet,
        parallel=getattr(parsed, "parallel", None),
        split=getattr(parsed, "split", None),
    )


def _settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given."""
    given = {name: getattr(parsed, name) for name in SETTINGS if getattr(parsed, name) is not None}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    return given


# chat


def _chat(arguments: list[str]) -> int:
    parser = _Parser(
        "mixtral-mlx chat",
        description="Talk with a model. In a pipe, each line of stdin is a message, and the replies go to stdout.",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    parser.add_argument("--one", action="store_true", help="all of stdin is one message")
    parser.add_argument("--quiet", action="store_true", help="no banner and no progress bars")
    _add_model(parser, "the demo")
    _add_parallel(parser)
    _add_settings(parser, {"temperature": "0.7; for the demo 0", "top_p": "0.95; for the demo 1"})
    parsed = parser.parse(arguments)
    from .chat import run

    name = parsed.model or os.environ.get("MIXTRAL_MLX_MODEL") or None
    choice = _model_choice(parsed, name)
    with wired(choice), joined(choice, complain) as mine:
        return 0 if mine is None else run(mine, system=parsed.system, settings=_settings(parsed), one=parsed.one)


# generate

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


def _generate(arguments: list[str]) -> int:
    request = _parse_generate(arguments)
    lost = partial(_failed, as_json=request.as_json)
    with wired(request.choice), joined(request.choice, lost) as choice:
        if choice is None:
            return 0
        if not request.ids and request.text is None:
            request = replace(request, text=_stdin_text())
        ready = open_model(choice)
        prompt = _prompt_ids(request, ready.tokenizer)
        answered = _complete(request, ready, prompt)
    chunks = answered.chunks
    last = chunks[-1]
    if request.as_json:
        _print_json(_report(ready, answered))
    elif last.finish_reason == "length" and sys.stderr.isatty() and not request.choice.quiet:
        print(f"[cut off after {last.usage.completion_tokens:,} tokens, see --max-tokens]", file=sys.stderr)
    return 130 if last.finish_reason == "cancelled" else 0


def _parse_generate(arguments: list[str]) -> _Request:
    parser = _Parser("mixtral-mlx generate", description=_GENERATE)
    parser.add_argument("--prompt", metavar="TEXT", help="text to complete")
    parser.add_argument("--prompt-ids", type=_ids, metavar="1,2,3", help="token ids to complete, taken as they are")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message, to be answered")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt, with --chat")
    parser.add_argument("--json", action="store_true", help="print one object: text, tokens, usage, timings, memory")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    _add_model(parser, "required")
    _add_parallel(parser)
    _add_settings(parser, {"temperature": "0", "max_tokens": str(_MAX_TOKENS)})
    parsed = parser.parse(arguments)
    name = _required_model(parsed)
    if parsed.prompt is not None and parsed.prompt_ids is not None:
        raise UsageError("Both --prompt and --prompt-ids were given, expected one.", code="bad_option")
    if parsed.prompt_ids is not None and parsed.chat:
        raise UsageError("--chat needs text, got --prompt-ids.", code="bad_option")
    if parsed.system and not parsed.chat:
        raise UsageError("--system goes with --chat only.", code="bad_option", hint="Add --chat.")
    settings = {"max_tokens": _MAX_TOKENS, **_settings(parsed)}
    ids = tuple(parsed.prompt_ids or ())
    return _Request(_model_choice(parsed, name), parsed.prompt, ids, parsed.chat, parsed.system, settings, parsed.json)


_MAX_TOKENS = 512


def _required_model(parsed: argparse.Namespace) -> str:
    name: str | None = parsed.model or os.environ.get("MIXTRAL_MLX_MODEL")
    if not name:
        raise UsageError(
            "No model was given.", code="no_model", hint="Give --model FOLDER, or --model demo for the built-in toy."
        )
    return name


def _ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"is {text[:60]!r}, expected whole numbers with commas between them")
    return [int(part) for part in parts]


def _stdin_text() -> str:
    if sys.stdin.isatty():
        print("Reading the prompt from the keyboard; Ctrl-D on a line of its own ends it.", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompt on stdin is not UTF-8 text: {error.reason}.", code="not_text") from None


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
    from .generate import stream_generate

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
    from .generate import Sampling

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


# convert, verify, perplexity

_CONVERT = """Convert any Mixtral checkpoint into a folder that this program and mlx-lm run.

SOURCE is a folder, a .gguf file, or a Hugging Face repository (for one of several GGUF models in it, NAME:FILE). DEST
appears when all of it is written. Stopped or killed, the same command goes on where it was."""
_CONVERT_EPILOG = """recipes, by bits of the experts and of the rest (the router always has 8 or more):
  q8 q6 q5 q4   8, 6, 5 or 4, and 8        q4-mini   4, and 4
  q3 q2         3 or 2, and 6              bf16 f16  not quantized
  keep          as MLX has quantized the source

example:
  mixtral-mlx convert mistralai/Mixtral-8x7B-Instruct-v0.1 ~/models/mixtral-q4 --recipe q4"""


def _convert(arguments: list[str]) -> int:
    parser = _Parser("mixtral-mlx convert", description=_CONVERT, epilog=_CONVERT_EPILOG)
    parser.add_argument("source", metavar="SOURCE", help="what to convert")
    parser.add_argument("dest", metavar="DEST", help="the folder to write")
    group = parser.add_argument_group("what to write")
    group.add_argument(
        "--recipe",
        action="append",
        default=[],
        type=_one_of(*RECIPES, "keep"),
        metavar="NAME",
        help="how to quantize (q4; what MLX has quantized: keep); given several times, writes DEST-NAME for each",
    )
    group.add_argument("--recipe-file", metavar="F", help='a recipe of your own, as {"*": 4, "*.self_attn.*": 8}')
    group.add_argument("--group-size", type=_one_of(32, 64, 128), metavar="N", help="weights that share a scale (64)")
    group.add_argument(
        "--mode",
        type=_one_of("affine", "mxfp4", "nvfp4", "mxfp8"),
        metavar="MODE",
        help="form of the experts' numbers: affine, mxfp4, nvfp4, mxfp8 (affine)",
    )
    group.add_argument(
        "--dtype",
        type=_one_of("auto", "bfloat16", "float16", "float32"),
        default="auto",
        metavar="T",
        help="of what is not quantized: bfloat16, float16, float32; auto keeps float16, else bfloat16",
    )
    group = parser.add_argument_group("where it comes from")
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of the repository (main)")
    group.add_argument("--offline", action="store_true", help="fetch nothing from the network")
    group.add_argument("--keep-source", action="store_true", help="keep what is fetched, as DEST-source")
    _add_output(parser, "print one object, or one a line for several recipes: source_format, recipe, bytes_out …")
    parsed = parser.parse(arguments)
    from .convert.commands import convert
    from .convert.run import Request

    request = Request(
        source=parsed.source,
        dest=Path(parsed.dest),
        recipes=tuple(parsed.recipe),
        recipe_file=Path(parsed.recipe_file) if parsed.recipe_file else None,
        group_size=parsed.group_size,
        mode=parsed.mode,
        dtype=parsed.dtype,
        revision=parsed.revision,
        offline=parsed.offline,
        keep_source=parsed.keep_source,
    )
    return _show(convert(request, quiet=parsed.quiet), as_json=parsed.json)


def _verify(arguments: list[str]) -> int:
    parser = _Parser(
        "mixtral-mlx verify",
        description="Check offline that a converted folder is bit for bit as it was written.",
        epilog="example:\n  mixtral-mlx verify ~/models/mixtral-q4",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder written by `convert`")
    _add_output(parser, "print one object: folder, files, bytes, seconds")
    parsed = parser.parse(arguments)
    from .convert.commands import verify

    return _show(verify(Path(parsed.folder), quiet=parsed.quiet), as_json=parsed.json)


def _perplexity(arguments: list[str]) -> int:
    parser = _Parser(
        "mixtral-mlx perplexity",
        description="Measure how well a model predicts a text, and how far it is from another one.\n"
        "One layer at a time is in memory, so neither model needs to fit.",
        epilog="example:\n  mixtral-mlx perplexity --model ~/models/mixtral-q4 --file book.txt",
    )
    parser.add_argument("--model", metavar="M", help="a folder, a Hugging Face repository, or `demo` (required)")
    parser.add_argument("--file", metavar="T", help="the text, in UTF-8 (required)")
    parser.add_argument("--against", metavar="N", help="another model: also print the KL divergence from it")
    parser.add_argument("--context", type=_count(2), default=512, metavar="N", help="tokens of a window (512)")
    parser.add_argument("--offline", action="store_true", help="fetch nothing from the network")
    _add_output(parser, "print one object: perplexity, tokens, kl, seconds")
    parsed = parser.parse(arguments)
    model = parsed.model or os.environ.get("MIXTRAL_MLX_MODEL")
    if not model:
        raise UsageError("No model was given.", code="no_model", hint="Give --model FOLDER, or --model demo.")
    if not parsed.file:
        raise UsageError("No text was given.", code="no_text", hint="Give --file FILE.")
    from .convert.commands import perplexity

    models = [None if name == "demo" else name for name in (model, parsed.against) if name]
    answer = perplexity(models, Path(parsed.file), context=parsed.context, offline=parsed.offline, quiet=parsed.quiet)
    return _show(answer, as_json=parsed.json)


# serve

_SERVE = """Serve a model to programs on this machine: OpenAI's and Anthropic's APIs, and a page to chat on at /.

Only this machine is listened to, and no page but the server's own may ask. Ctrl-C or SIGTERM ends what runs with an
error that says so, and the server within three seconds; a second one at once."""
_SERVE_EPILOG = """examples:
  mixtral-mlx serve --model ~/models/mixtral-q4
  mixtral-mlx serve --model demo --port 0 --quiet
  MIXTRAL_MLX_API_KEY=$(openssl rand -hex 16) mixtral-mlx serve --model ~/models/mixtral-q4 --host 0.0.0.0"""


def _serve(arguments: list[str]) -> int:
    parsed = _serve_parser().parse(arguments)
    if parsed.uds and parsed.host:
        raise UsageError("Both --uds and --host were given, expected one.", code="bad_option")
    if parsed.uds and parsed.port is not None:
        raise UsageError("Both --uds and --port were given, expected one.", code="bad_option")
    from .server.serve import Request, serve
    from .server.settings import ServerSettings

    settings = ServerSettings(
        host="" if parsed.uds else parsed.host or "127.0.0.1",
        api_key=parsed.api_key or os.environ.get("MIXTRAL_MLX_API_KEY", ""),
        allow_origins=tuple(parsed.allow_origin),
        allow_hosts=tuple(parsed.allow_host),
        aliases=tuple(parsed.alias),
        max_body=parsed.max_body,
        max_requests=(parsed.max_concurrent or 16) + (parsed.max_queue or 64),
        timeout_s=parsed.timeout,
        log_prompts=parsed.log_prompts,
    )
    choice = _model_choice(parsed, parsed.model or os.environ.get("MIXTRAL_MLX_MODEL") or None)
    port = 8080 if parsed.port is None else parsed.port
    with wired(choice), joined(choice, complain) as mine:
        return 0 if mine is None else serve(Request(mine, settings, port, parsed.uds, _engine_options(parsed)))


def _serve_parser() -> _Parser:
    parser = _Parser("mixtral-mlx serve", description=_SERVE, epilog=_SERVE_EPILOG)
    _add_model(parser, "the demo")
    group = parser.add_argument_group("where it listens, and to whom")
    group.add_argument("--host", metavar="H", help="address to listen at; another machine's needs a key (127.0.0.1)")
    group.add_argument("--port", type=_port, metavar="N", help="port to listen at; 0 takes a free one (8080)")
    group.add_argument("--uds", type=Path, metavar="PATH", help="a Unix socket to listen at instead")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help="what programs have to send; better given as MIXTRAL_MLX_API_KEY, as others see command lines (none)",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages from there ask, as https://app.example; may be given several times (none)",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that leads to this server; may be given several times (localhost, and addresses)",
    )
    group.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="NAME",
        help="a name to ask for the model by, besides its own, as gpt-4o or claude-*; may be given several times",
    )
    group = parser.add_argument_group("how much it does")
    group.add_argument("--max-body", type=_size, default=32 << 20, metavar="SIZE", help="longest request (32MiB)")
    group.add_argument(
        "--timeout", type=_seconds, default=3600.0, metavar="S", help="seconds that an answer may take (3600)"
    )
    _add_engine(parser)
    _add_parallel(parser)
    group = parser.add_argument_group("what it says")
    group.add_argument("--log-prompts", action="store_true", help="also log what is asked, which is private")
    group.add_argument("--quiet", action="store_true", help="no progress bar and no line for each request")
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a port from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e6:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a number of seconds above 0")
    return seconds


# plan

_PLAN = """Say what runs in how much memory: resident or streamed from the SSD, with which context, and how fast that
should be. Without --model for the published Mixtrals, without --memory or --ram for this machine. Computed, not run."""
_PLAN_EPILOG = """examples:
  mixtral-mlx plan --measure
  mixtral-mlx plan --ram 16GB,24GB,64GB
  mixtral-mlx plan --model ~/models/mixtral-q4 --memory 12GB --explain
  mixtral-mlx plan --hosts 64GB,36GB --link 10Gb/s,0.3ms"""


def _plan(arguments: list[str]) -> int:
    parser = _Parser("mixtral-mlx plan", description=_PLAN, epilog=_PLAN_EPILOG)
    parser.add_argument("--model", metavar="M", help="a folder, a fetched Hugging Face repository, or `demo`")
    group = parser.add_argument_group("how much there is")
    group.add_argument("--memory", type=_sizes(), default=(), metavar="8GB,12GB", help="what the whole process may use")
    group.add_argument(
        "--ram", type=_sizes(as_chips=True), default=(), metavar="16GB,24GB", help="Macs with so much memory"
    )
    group.add_argument(
        "--hosts", type=_sizes(as_chips=True), default=(), metavar="64GB,36GB", help="Macs that share a model"
    )
    group.add_argument("--link", metavar="10Gb/s,0.3ms", help="what is between them (20Gb/s,0.3ms)")
    group.add_argument("--context", type=_count(2), metavar="N", help="tokens of prompt and answer (chosen to fit)")
    group.add_argument("--kv-bits", type=_one_of(4, 8), metavar="N", help="keep the cache in 4 or 8 bits")
    group = parser.add_argument_group("how it is said")
    group.add_argument(
        "--measure", action="store_true", help="measure this machine's SSD and memory, and keep that for later plans"
    )
    group.add_argument("--explain", action="store_true", help="show the arithmetic of each line")
    _add_output(parser, "print one object: plans, each with mode, slots_per_layer, context, parts, generation_tps …")
    given = vars(parser.parse(arguments))
    as_json, quiet = given.pop("json"), given.pop("quiet")
    _check_hosts(given)
    from .plan import Request, plan

    return _show(plan(Request(**given), quiet=quiet), as_json=as_json)


def _check_hosts(given: dict[str, Any]) -> None:
    if given["link"] and not given["hosts"]:
        raise UsageError("--link goes with --hosts only.", code="bad_option")
    others = [name for name in ("memory", "ram", "measure", "explain") if given[name]]
    if given["hosts"] and others:
        raise UsageError(f"Both --hosts and --{others[0]} were given, expected one.", code="bad_option")


def _sizes(*, as_chips: bool = False) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        from .budget import SizeError, parse_size

        sizes = []
        for word in text.split(","):
            try:
                sizes.append(parse_size(word, as_chips=as_chips))
            except SizeError:
                raise argparse.ArgumentTypeError(
                    f"holds {word[:40]!r}, expected sizes as 12GB, 800MB or 12.5GiB, with commas between them"
                ) from None
        return tuple(sizes)

    return parse


# bench

_BENCH = """Measure how fast a model runs here: loading, prompts, decoding, batches, quantized caches and memory, each
next to what this machine can do at all. With --vs another engine takes turns with this one, in a process of its own.

Rows that would take too long are shortened and say so. Ctrl-C ends with the rows there are."""
_BENCH_EPILOG = """examples:
  mixtral-mlx bench --model ~/models/mixtral-q4 --vs mlx-lm --save today.json --output today.html
  mixtral-mlx bench --model ~/models/mixtral-q4 --memory 12GB --rows decode,memory
  mixtral-mlx bench --compare yesterday.json today.json"""


def _bench(arguments: list[str]) -> int:
    parsed = _bench_parser().parse(arguments)
    given = {name: value for name, value in vars(parsed).items() if value is not None}
    as_json, quiet, both = given.pop("json"), given.pop("quiet"), given.pop("compare", None)
    if both and given:
        option = _OPTIONS.get(min(given), min(given))
        raise UsageError(f"--compare measures nothing: it goes with --json, not with --{option}.", code="bad_option")
    from .bench import commands

    if both:
        return _show(commands.compare(*both), as_json=as_json)
    model = given.pop("model", None) or os.environ.get("MIXTRAL_MLX_MODEL")
    if not model:
        raise UsageError("No model was given.", code="no_model", hint="Give --model FOLDER, or --model demo.")
    request = commands.Request(None if model == "demo" else model, **given)
    answer = commands.bench(request, quiet=quiet)
    _show(answer, as_json=as_json)
    return 130 if answer.interrupted else 0


_OPTIONS = {"against": "vs", "groups": "rows"}


def _bench_parser() -> _Parser:
    from .bench import rows, sides

    engines, groups = ", ".join(sides.OTHERS), ",".join(rows.GROUPS)
    parser = _Parser("mixtral-mlx bench", description=_BENCH, epilog=_BENCH_EPILOG)
    parser.add_argument("--model", metavar="M", help="a folder, a Hugging Face repository, or `demo` (required)")
    parser.add_argument("--offline", action="store_true", default=None, help="fetch nothing from the network")
    parser.add_argument(
        "--vs", type=_one_of(*sides.OTHERS), dest="against", metavar="E", help=f"the engine to compare with: {engines}"
    )
    parser.add_argument(
        "--dtype",
        type=_one_of("auto", "bfloat16", "float16", "float32"),
        metavar="T",
        help="both sides compute in bfloat16, float16 or float32; auto is what each would choose (auto)",
    )
    parser.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="most our side's whole process may use, as 12GB; experts that have no room are read from the SSD "
        "(what this machine can spare)",
    )
    group = parser.add_argument_group("how much to measure")
    group.add_argument("--turns", type=_count(1), metavar="N", help="times each figure is measured (5)")
    group.add_argument("--rows", type=_some_of(rows.GROUPS), dest="groups", metavar="A,B", help=f"of {groups} (all)")
    group.add_argument("--seconds", type=_count(1), metavar="N", help="most a row takes of each side in a turn (20)")
    group = parser.add_argument_group("what to do with it")
    group.add_argument("--output", type=Path, metavar="F.html", help="also write a page with a picture: a roofline")
    group.add_argument(
        "--save", type=Path, metavar="F.json", help="also write what --json prints, to compare with later"
    )
    group.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="measure nothing: compare two files"
    )
    _add_output(parser, "print one object: machine, limits, model, sides, rows, notes")
    return parser


def _some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        asked = text.split(",")
        for word in asked:
            if word not in known:
                raise argparse.ArgumentTypeError(f"holds {word!r}, expected some of {', '.join(known)}")
        return tuple(word for word in known if word in asked)

    return parse


# routes

_ROUTES = """Show which experts each token of a prompt and its answer used, layer by layer, how evenly that loads them,
and how often they come again: as a table, and with --output as a picture."""
_ROUTES_EPILOG = """examples:
  mixtral-mlx routes --model demo --chat --prompt "What do cats eat?" --output routes.png
  mixtral-mlx routes --model ~/models/mixtral-q4 --memory 12GB --prompt "def fib(n):" --output routes.html"""
_ROUTES_TOKENS = 64


def _routes(arguments: list[str]) -> int:
    parser = _Parser("mixtral-mlx routes", description=_ROUTES, epilog=_ROUTES_EPILOG)
    parser.add_argument("--prompt", metavar="TEXT", help="text to complete (stdin)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message, to be answered")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt, with --chat")
    parser.add_argument("--output", type=_picture, metavar="F.png|F.html", help="draw a picture, or a page with one")
    _add_output(parser, "print one object: tokens, choices, weights, counts, by_layer, overall …")
    _add_model(parser, "required")
    _add_settings(parser, {"temperature": "0", "max_tokens": str(_ROUTES_TOKENS)})
    parsed = parser.parse(arguments)
    name = _required_model(parsed)
    if parsed.system and not parsed.chat:
        raise UsageError("--system goes with --chat only.", code="bad_option", hint="Add --chat.")
    text = _stdin_text() if parsed.prompt is None else parsed.prompt
    settings = {"max_tokens": _ROUTES_TOKENS, **_settings(parsed)}
    from .routes import commands

    request = commands.Request(_model_choice(parsed, name), text, parsed.chat, parsed.system, settings, parsed.output)
    answer = commands.routes(request)
    _show(answer, as_json=parsed.json)
    return 130 if answer.interrupted else 0


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".png", ".html"):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a name that ends in .png or .html")
    return path


# helper

_HELPER = """Be an app's child process: JSON lines come on stdin and go on stdout, logs go to stderr. Messages are in
mixtral_mlx/helper/schema.json, and how to live with it in docs/EMBEDDING.md.

Ends within 3 s when stdin ends, when the parent has gone, at SIGTERM, or when asked to. Exit codes: 0 it ended as it
should, 1 it failed, 2 wrong usage."""
_HELPER_EPILOG = """example:
  echo '{"type":"stats","id":"1"}' | mixtral-mlx helper"""


def _helper(arguments: list[str]) -> int:
    parser = _Parser("mixtral-mlx helper", description=_HELPER, epilog=_HELPER_EPILOG)
    parser.add_argument(
        "--parent-pid", type=_count(2), metavar="N", help="end with this process (the one that started the command)"
    )
    parser.add_argument(
        "--serve", action="store_true", help="also serve the HTTP API, on a port and with a key of its own"
    )
    parser.add_argument(
        "--log",
        type=_one_of("debug", "info", "warning"),
        default="warning",
        metavar="L",
        help="debug, info or warning (warning)",
    )
    _add_model(parser, "none: wait for a message")
    _add_engine(parser)
    parsed = parser.parse(arguments)
    from .helper.helper import Options, run

    model = parsed.model or os.environ.get("MIXTRAL_MLX_MODEL") or None
    loading = {name: getattr(parsed, name) for name in _LOADING if getattr(parsed, name) is not None}
    loading |= _engine_options(parsed)
    with wired(ModelChoice(memory_bytes=parsed.memory, wired=parsed.wired, quiet=True)):
        run(Options(model, loading, parsed.serve, parsed.parent_pid, parsed.log))


_LOADING = ("memory", "context", "dtype", "kv_bits", "offline")
"""What of the model's options `load` takes."""


def _add_output(parser: _Parser, json_help: str) -> None:
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _show(answer: Answer | Measured | Planned | Routed, *, as_json: bool) -> int:
    for entry in answer.objects if as_json else ():
        _print_json(entry)
    if not as_json:
        print(clean(answer.text))
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "chat": _chat,
    "generate": _generate,
    "convert": _convert,
    "verify": _verify,
    "perplexity": _perplexity,
    "bench": _bench,
    "plan": _plan,
    "routes": _routes,
    "serve": _serve,
    "helper": _helper,
}
