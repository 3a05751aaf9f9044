"""The commands `serve` and `helper`: their arguments."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..opening import ModelChoice, joined, wired
from ..terminal import complain
from .options import (
    Parser,
    UsageError,
    add_engine,
    add_model,
    add_parallel,
    count,
    engine_options,
    model_choice,
    one_of,
    seconds,
    size,
)

_SERVE = """Serve a model to programs on this machine: OpenAI's and Anthropic's APIs, and a page to chat on at /.

Only this machine is listened to, and no page but the server's own may ask. Ctrl-C or SIGTERM ends what runs with an
error that says so, and the server within three seconds; a second one at once."""


_SERVE_EPILOG = """examples:
  mixtral-mlx serve --model ~/models/mixtral-q4
  mixtral-mlx serve --model demo --port 0 --quiet
  MIXTRAL_MLX_API_KEY=$(openssl rand -hex 16) mixtral-mlx serve --model ~/models/mixtral-q4 --host 0.0.0.0"""


def serve(arguments: list[str]) -> int:
    """`mixtral-mlx serve`."""
    parsed = _serve_parser().parse(arguments)
    if parsed.uds and parsed.host:
        raise UsageError("Both --uds and --host were given, expected one.", code="bad_option")
    if parsed.uds and parsed.port is not None:
        raise UsageError("Both --uds and --port were given, expected one.", code="bad_option")
    options = engine_options(parsed)
    from ..server.serve import Request, serve
    from ..server.settings import ServerSettings

    settings = ServerSettings(
        host="" if parsed.uds else parsed.host or "127.0.0.1",
        api_key=parsed.api_key or os.environ.get("MIXTRAL_MLX_API_KEY", ""),
        allow_origins=tuple(parsed.allow_origin),
        allow_hosts=tuple(parsed.allow_host),
        aliases=tuple(parsed.alias),
        max_body=parsed.max_body,
        timeout_s=parsed.timeout,
        log_prompts=parsed.log_prompts,
    )
    choice = model_choice(parsed, parsed.model or os.environ.get("MIXTRAL_MLX_MODEL") or None)
    port = 8080 if parsed.port is None else parsed.port
    with wired(choice), joined(choice, complain) as mine:
        return 0 if mine is None else serve(Request(mine, settings, port, parsed.uds, options))


def _serve_parser() -> Parser:
    parser = Parser("mixtral-mlx serve", description=_SERVE, epilog=_SERVE_EPILOG)
    add_model(parser, "the demo")
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
    group.add_argument("--max-body", type=size, default=32 << 20, metavar="SIZE", help="longest request (32MiB)")
    group.add_argument(
        "--timeout", type=seconds, default=3600.0, metavar="S", help="seconds that an answer may take (3600)"
    )
    add_engine(parser)
    add_parallel(parser)
    group = parser.add_argument_group("what it says")
    group.add_argument("--log-prompts", action="store_true", help="also log what is asked, which is private")
    group.add_argument("--quiet", action="store_true", help="no progress bar and no line for each request")
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a port from 0 to 65535")
    return int(text)


_HELPER = """Be an app's child process: JSON lines come on stdin and go on stdout, logs go to stderr. Messages are in
mixtral_mlx/helper/schema.json, and how to live with it in docs/EMBEDDING.md.

Ends within 3 s when stdin ends, when the parent has gone, at SIGTERM, or when asked to. Exit codes: 0 it ended as it
should, 1 it failed, 2 wrong usage."""


_HELPER_EPILOG = """example:
  echo '{"type":"stats","id":"1"}' | mixtral-mlx helper"""


def helper(arguments: list[str]) -> int:
    """`mixtral-mlx helper`."""
    parser = Parser("mixtral-mlx helper", description=_HELPER, epilog=_HELPER_EPILOG)
    parser.add_argument(
        "--parent-pid", type=count(2), metavar="N", help="end with this process (the one that started the command)"
    )
    parser.add_argument(
        "--serve", action="store_true", help="also serve the HTTP API, on a port and with a key of its own"
    )
    parser.add_argument(
        "--log",
        type=one_of("debug", "info", "warning"),
        default="warning",
        metavar="L",
        help="debug, info or warning (warning)",
    )
    add_model(parser, "none: wait for a message")
    add_engine(parser)
    parsed = parser.parse(arguments)
    loading = {name: getattr(parsed, name) for name in _LOADING if getattr(parsed, name) is not None}
    loading |= engine_options(parsed)
    from ..helper.helper import Options, run

    model = parsed.model or os.environ.get("MIXTRAL_MLX_MODEL") or None
    with wired(ModelChoice(memory_bytes=parsed.memory, wired=parsed.wired, quiet=True)):
        run(Options(model, loading, parsed.serve, parsed.parent_pid, parsed.log))


_LOADING = ("memory", "context", "dtype", "kv_bits", "offline")
"""What of the model's options `load` takes."""
