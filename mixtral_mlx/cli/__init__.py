"""The command `mixtral-mlx`: dispatch, errors and exit codes. Each command's arguments are in a file of its own.

Answers `--help` and refuses mistakes without importing MLX. The argparse namespace stays in this package: what runs is
given dataclasses.

options    what commands have in common: a parser that refuses by name, groups of options, values
talk       chat, generate
make       convert, verify, perplexity
measure    plan, bench, routes
serve      serve, helper"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from .. import __version__
from ..config import MixtralError
from ..terminal import complain
from .options import Parser, UsageError, did_you_mean, failed


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
        return failed(error, as_json)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return failed(MixtralError("Interrupted.", code="cancelled"), as_json)
    except SystemExit as leaving:  # after --help, or SIGTERM
        return int(leaving.code or 0)


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
        run: Callable[[list[str]], int] = getattr(import_module(f".{_COMMANDS[command]}", __name__), command)
        return run(rest)
    else:
        _refuse_command(command)
    return 0


_SHARED = ("chat", "generate", "serve", "bench")


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
        hint=did_you_mean(command, _COMMANDS),
    )


def _top_parser() -> Parser:
    parser = Parser(
        "mixtral-mlx",
        description="Mixtral 8x7B and 8x22B with MLX.",
        usage="mixtral-mlx COMMAND [OPTIONS]",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    return parser


_COMMANDS = {
    "chat": "talk",
    "generate": "talk",
    "convert": "make",
    "verify": "make",
    "perplexity": "make",
    "bench": "measure",
    "plan": "measure",
    "routes": "measure",
    "serve": "serve",
    "helper": "serve",
}
"""Each command, and the file that has a function of its name."""
