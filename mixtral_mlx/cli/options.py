"""What commands have in common: a parser that refuses by name, groups of options, and values of them."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..budget import parse_size
from ..config import MixtralError
from ..opening import ModelChoice
from ..session import SETTINGS, parse_setting
from ..terminal import Answer, clean, complain


class UsageError(MixtralError):
    """A command line that asks for what there is not, or cannot be."""


def failed(error: MixtralError, as_json: bool) -> int:
    """Say what went wrong, as JSON too if that was asked for; the exit code it makes."""
    if as_json:
        print_json({"error": {"code": error.code, "message": str(error), "hint": error.hint}})
    if error.code == "cancelled":
        return 130
    complain(error)
    return 2 if isinstance(error, UsageError) or error.code in WRONG_USAGE else 1


WRONG_USAGE = frozenset(
    {
        *("bad_option", "bad_sampling", "bad_context", "bad_token", "bad_recipe"),
        *("bad_link", "bad_split", "not_launched", "bad_host", "key_required"),
    }
)
"""Codes of what only a command line can have asked for, though it is found out further down."""


def print_json(data: dict[str, Any]) -> None:
    """An object on a line of stdout."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(encoding="utf-8")  # JSON is UTF-8, wherever it is printed.
    print(json.dumps(data, ensure_ascii=False), flush=True)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint where `word` is nearly one of those that are known."""
    begun = [option for option in known if option.startswith(word)]
    near = begun or difflib.get_close_matches(word, known, 1)
    return f"Did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
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

    def _taken(self) -> str:
        names = [str(action.metavar) for action in self._actions if not action.option_strings]
        return f"Besides options it takes {' and '.join(names)}" if names else "Everything is given by options"

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            raise UsageError(
                f"{self.prog} takes no argument {word!r}.",
                code="unexpected_argument",
                hint=f"{self._taken()}; see --help.",
            )
        raise UsageError(
            f"{self.prog} has no option {word}.",
            code="unknown_option",
            hint=did_you_mean(word, self._option_string_actions) or f"{self.prog} --help lists them.",
        )


def add_model(parser: Parser, default: str) -> None:
    """Options that say which model runs, and how; `default` is what runs without --model."""
    group = parser.add_argument_group("the model")
    add_model_name(group, default)
    group.add_argument("--offline", action="store_true", help="fetch nothing from the network")
    group.add_argument(
        "--dtype",
        type=one_of("auto", "bfloat16", "float16", "float32"),
        default="auto",
        metavar="T",
        help="compute in bfloat16, float16 or float32; auto is the checkpoint's own, on M1 and M2 float16, "
        "without a GPU float32",
    )
    group.add_argument(
        "--context", type=count(2), metavar="N", help="most tokens of prompt and answer (the model's own limit)"
    )
    group.add_argument("--kv-bits", type=one_of(4, 8), metavar="N", help="keep the cache in 4 or 8 bits")
    group.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="most the whole process may use, as 12GB; experts that have no room are read from the SSD when they are "
        "needed (what this machine can spare)",
    )
    group.add_argument(
        "--wired",
        type=one_of("off", "fit"),
        default="off",
        metavar="W",
        help="fit keeps what fits into --memory from being compressed or swapped while other programs need memory, on "
        "Metal only; off by default, as macOS has crashed where two programs set this limit (off)",
    )


def add_model_name(group: argparse._ActionsContainer, default: str) -> None:
    """The option --model; `default` is what runs without it."""
    group.add_argument(
        "--model",
        metavar="M",
        help=f"a folder, a Hugging Face repository, or `demo`; MIXTRAL_MLX_MODEL names it too ({default})",
    )


def add_parallel(parser: Parser) -> None:
    """Options of commands that several machines can share."""
    group = parser.add_argument_group("several Macs, started with mlx.launch")
    group.add_argument(
        "--parallel",
        type=one_of("tensor", "expert", "pipeline"),
        metavar="P",
        help="split heads and each expert (tensor), heads and whole experts (expert), or layers (pipeline)",
    )
    group.add_argument(
        "--split",
        type=_numbers,
        metavar="64,36",
        help="how much of the model each of them gets (as much as it has memory)",
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"is {text[:60]!r}, expected numbers above 0 with commas between them")
    return numbers


def add_engine(parser: Parser) -> None:
    """Options of commands that answer many requests at once."""
    group = parser.add_argument_group("how requests share it")
    group.add_argument("--max-concurrent", type=count(1), metavar="N", help="requests answered at a time (16)")
    group.add_argument("--max-queue", type=count(1), metavar="N", help="requests that may wait (64)")
    group.add_argument(
        "--prefix-memory", type=size, metavar="SIZE", help="most that read prompts may keep (what is left of --memory)"
    )
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help="keep read prompts there over restarts (nowhere)")
    group.add_argument("--cache-size", type=size, metavar="SIZE", help="most they take there (10GB)")
    group.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA adapter in mlx-lm's format")
    group.add_argument(
        "--draft", metavar="M", help='a small model with the same tokenizer, for requests with "speculate": "draft"'
    )
    group.add_argument(
        "--idle-unload",
        dest="idle_unload_s",
        type=seconds,
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


def engine_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was given of what `load` takes besides the model."""
    if parsed.cache_size is not None and parsed.cache_dir is None:
        raise UsageError("--cache-size goes with --cache-dir only.", code="bad_option", hint="Add --cache-dir DIR.")
    return {name: getattr(parsed, name) for name in _ENGINE if getattr(parsed, name) not in (None, False)}


def add_settings(parser: Parser, defaults: dict[str, str]) -> None:
    """Options that say how tokens are chosen, with the defaults that are worth naming."""
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


def one_of(*values: Any) -> Callable[[str], Any]:
    """Reads one of `values`."""

    def parse(text: str) -> Any:
        for value in values:
            if text == str(value):
                return value
        raise argparse.ArgumentTypeError(f"is {text!r}, expected one of {', '.join(map(str, values))}")

    return parse


def size(text: str) -> int:
    """Reads bytes, as 12GB."""
    try:
        return parse_size(text)
    except MixtralError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("The size ")) from None


def count(low: int) -> Callable[[str], int]:
    """Reads a whole number of at least `low`."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"is {text!r}, expected a whole number of at least {low}")
        return int(text)

    return parse


def model_choice(parsed: argparse.Namespace, name: str | None) -> ModelChoice:
    """The model that was asked for; `name` None or demo is the built-in one."""
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


def given_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given."""
    given = {name: getattr(parsed, name) for name in SETTINGS if getattr(parsed, name) is not None}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    return given


def required_model(parsed: argparse.Namespace) -> str:
    """The model's name, which there has to be."""
    name: str | None = parsed.model or os.environ.get("MIXTRAL_MLX_MODEL")
    if not name:
        raise UsageError(
            "No model was given.", code="no_model", hint="Give --model FOLDER, or --model demo for the built-in toy."
        )
    return name


def stdin_text() -> str:
    """All of stdin, without its last line end."""
    if sys.stdin.isatty():
        print("Reading the prompt from the keyboard; Ctrl-D on a line of its own ends it.", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompt on stdin is not UTF-8 text: {error.reason}.", code="not_text") from None


def seconds(text: str) -> float:
    """Reads seconds above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e6:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a number of seconds above 0")
    return seconds


def add_output(parser: Parser, json_help: str) -> None:
    """Options that say what is printed."""
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.add_argument("--quiet", action="store_true", help="no progress")


def show(answer: Answer, *, as_json: bool) -> int:
    """Print an answer for people, or as JSON; the exit code."""
    for entry in answer.objects if as_json else ():
        print_json(entry)
    if not as_json:
        print(clean(answer.text))
    return 130 if answer.interrupted else 0
