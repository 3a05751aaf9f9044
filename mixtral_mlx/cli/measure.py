"""The commands `plan`, `bench` and `routes`: their arguments."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..budget import parse_size
from ..config import MixtralError
from ..opening import ModelChoice, followed, ranks
from ..terminal import complain
from .options import (
    Parser,
    UsageError,
    add_model,
    add_model_name,
    add_output,
    add_parallel,
    add_settings,
    count,
    given_settings,
    model_choice,
    one_of,
    required_model,
    show,
    size,
    stdin_text,
)

if TYPE_CHECKING:
    from ..distributed.outlook import Wire

_PLAN = """Say what runs in how much memory: resident or streamed from the SSD, with which context, and how fast that
should be. Without --model for the published Mixtrals, without --memory or --ram for this machine. Computed, not run."""


_PLAN_EPILOG = """examples:
  mixtral-mlx plan --measure
  mixtral-mlx plan --ram 16GB,24GB,64GB
  mixtral-mlx plan --model ~/models/mixtral-q4 --memory 12GB --explain
  mixtral-mlx plan --hosts 64GB,36GB --link 10Gb/s,0.3ms"""


def plan(arguments: list[str]) -> int:
    """`mixtral-mlx plan`."""
    parser = Parser("mixtral-mlx plan", description=_PLAN, epilog=_PLAN_EPILOG)
    parser.add_argument("--model", metavar="M", help="a folder, a fetched Hugging Face repository, or `demo`")
    group = parser.add_argument_group("how much there is")
    group.add_argument("--memory", type=_sizes(), default=(), metavar="8GB,12GB", help="what the whole process may use")
    group.add_argument(
        "--ram", type=_sizes(as_chips=True), default=(), metavar="16GB,24GB", help="Macs with so much memory"
    )
    group.add_argument(
        "--hosts", type=_sizes(as_chips=True), default=(), metavar="64GB,36GB", help="Macs that share a model"
    )
    group.add_argument("--link", type=_link, metavar="10Gb/s,0.3ms", help="what is between them (20Gb/s,0.3ms)")
    group.add_argument("--context", type=count(2), metavar="N", help="tokens of prompt and answer (chosen to fit)")
    group.add_argument("--kv-bits", type=one_of(4, 8), metavar="N", help="keep the cache in 4 or 8 bits")
    group = parser.add_argument_group("how it is said")
    group.add_argument(
        "--measure", action="store_true", help="measure this machine's SSD and memory, and keep that for later plans"
    )
    group.add_argument("--explain", action="store_true", help="show the arithmetic of each line")
    add_output(parser, "print one object: plans, each with mode, slots_per_layer, context, parts, generation_tps …")
    given = vars(parser.parse(arguments))
    as_json, quiet = given.pop("json"), given.pop("quiet")
    _check_hosts(given)
    from ..plan import Request, plan

    return show(plan(Request(**given), quiet=quiet), as_json=as_json)


def _check_hosts(given: dict[str, Any]) -> None:
    if given["link"] and not given["hosts"]:
        raise UsageError("--link goes with --hosts only.", code="bad_option")
    if len(given["hosts"]) == 1:
        raise UsageError(
            "--hosts holds one Mac, expected two or more.", code="bad_option", hint="--ram plans for a Mac alone."
        )
    others = [name for name in ("memory", "ram", "measure", "explain") if given[name]]
    if given["hosts"] and others:
        raise UsageError(f"Both --hosts and --{others[0]} were given, expected one.", code="bad_option")


def _link(text: str) -> Wire:
    from ..distributed.outlook import parse_wire

    try:
        return parse_wire(text)
    except MixtralError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("The link ").rstrip(".")) from None


def _sizes(*, as_chips: bool = False) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        from ..budget import SizeError

        sizes = []
        for word in text.split(","):
            try:
                sizes.append(parse_size(word, as_chips=as_chips))
            except SizeError as error:
                raise argparse.ArgumentTypeError(f"holds {str(error).removeprefix('The size is ')}") from None
        return tuple(sizes)

    return parse


_BENCH = """Measure how fast a model runs here: loading, prompts, decoding, batches, quantized caches and memory, each
next to what this machine can do at all. With --vs another engine takes turns with this one, in a process of its own.

Rows that would take too long are shortened and say so. Ctrl-C ends with the rows there are."""


_BENCH_EPILOG = """examples:
  mixtral-mlx bench --model ~/models/mixtral-q4 --vs mlx-lm --save today.json --output today.html
  mixtral-mlx bench --model ~/models/mixtral-q4 --memory 12GB --rows decode,memory
  mixtral-mlx bench --compare yesterday.json today.json"""


def bench(arguments: list[str]) -> int:
    """`mixtral-mlx bench`."""
    parsed = _bench_parser().parse(arguments)
    given = {name: value for name, value in vars(parsed).items() if value is not None}
    as_json, quiet, both = given.pop("json"), given.pop("quiet"), given.pop("compare", None)
    if both and given:
        option = _OPTIONS.get(min(given), min(given))
        raise UsageError(f"--compare measures nothing: it goes with --json, not with --{option}.", code="bad_option")
    if both:
        if "MLX_RANK" in os.environ:
            raise UsageError("--compare is for one process alone.", code="bad_option")
        from ..bench import commands

        return show(commands.compare(*both), as_json=as_json)
    model = required_model(parsed)
    given.pop("model", None)
    name = None if model == "demo" else model
    sharing = _sharing(name, given)
    if sharing is None:
        return 0
    from ..bench import commands

    request = commands.Request(name, **given, **sharing)
    return show(commands.bench(request, quiet=quiet), as_json=as_json)


def _sharing(name: str | None, given: dict[str, Any]) -> dict[str, Any] | None:
    """How others share the model, taken out of what was `given`; None where this process was one of these others."""
    parallel, split = given.pop("parallel", None), given.pop("split", None)
    choice = ModelChoice(
        name,
        given.get("dtype", "auto"),
        memory_bytes=given.get("memory"),
        offline=given.get("offline", False),
        quiet=True,
        parallel=parallel,
        split=split,
    )
    all_ranks = ranks()
    if all_ranks > 1 and "against" in given:
        raise UsageError(f"--vs {given['against']} cannot share a model with other ranks.", code="not_available")
    if followed(choice, complain):
        return None
    options = ("--parallel", parallel) if parallel else ()
    return {"ranks": all_ranks, "sharing": (*options, *(("--split", ",".join(map(str, split))) if split else ()))}


_OPTIONS = {"against": "vs", "groups": "rows"}


def _bench_parser() -> Parser:
    from ..bench import rows, sides

    engines, groups = ", ".join(sides.OTHERS), ",".join(rows.GROUPS)
    parser = Parser("mixtral-mlx bench", description=_BENCH, epilog=_BENCH_EPILOG)
    add_model_name(parser, "required")
    parser.add_argument("--offline", action="store_true", default=None, help="fetch nothing from the network")
    parser.add_argument(
        "--vs", type=one_of(*sides.OTHERS), dest="against", metavar="E", help=f"the engine to compare with: {engines}"
    )
    parser.add_argument(
        "--dtype",
        type=one_of("auto", "bfloat16", "float16", "float32"),
        metavar="T",
        help="both sides compute in bfloat16, float16 or float32; auto is what each would choose (auto)",
    )
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="most our side's whole process may use, as 12GB; experts that have no room are read from the SSD "
        "(what this machine can spare)",
    )
    add_parallel(parser)
    group = parser.add_argument_group("how much to measure")
    group.add_argument("--turns", type=count(1), metavar="N", help="times each figure is measured (5)")
    group.add_argument("--rows", type=_some_of(rows.GROUPS), dest="groups", metavar="A,B", help=f"of {groups} (all)")
    group.add_argument("--seconds", type=count(1), metavar="N", help="most a row takes of each side in a turn (20)")
    group = parser.add_argument_group("what to do with it")
    group.add_argument(
        "--output", type=_named(".html"), metavar="F.html", help="also write a page with a picture: a roofline"
    )
    group.add_argument(
        "--save", type=Path, metavar="F.json", help="also write what --json prints, to compare with later"
    )
    group.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="measure nothing: compare two files"
    )
    add_output(parser, "print one object: machine, limits, model, sides, rows, notes")
    return parser


def _some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        asked = text.split(",")
        for word in asked:
            if word not in known:
                raise argparse.ArgumentTypeError(f"holds {word!r}, expected some of {', '.join(known)}")
        return tuple(word for word in known if word in asked)

    return parse


_ROUTES = """Show which experts each token of a prompt and its answer used, layer by layer, how evenly that loads them,
and how often they come again: as a table, and with --output as a picture."""


_ROUTES_EPILOG = """examples:
  mixtral-mlx routes --model demo --chat --prompt "What do cats eat?" --output routes.png
  mixtral-mlx routes --model ~/models/mixtral-q4 --memory 12GB --prompt "def fib(n):" --output routes.html"""


_ROUTES_TOKENS = 64


def routes(arguments: list[str]) -> int:
    """`mixtral-mlx routes`."""
    parser = Parser("mixtral-mlx routes", description=_ROUTES, epilog=_ROUTES_EPILOG)
    parser.add_argument("--prompt", metavar="TEXT", help="text to complete (stdin)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message, to be answered")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt, with --chat")
    parser.add_argument(
        "--output", type=_named(".png", ".html"), metavar="F.png|F.html", help="draw a picture, or a page with one"
    )
    add_output(parser, "print one object: tokens, choices, weights, counts, by_layer, overall …")
    add_model(parser, "required")
    add_settings(parser, {"temperature": "0", "max_tokens": str(_ROUTES_TOKENS)})
    parsed = parser.parse(arguments)
    name = required_model(parsed)
    if parsed.system and not parsed.chat:
        raise UsageError("--system goes with --chat only.", code="bad_option", hint="Add --chat.")
    text = stdin_text() if parsed.prompt is None else parsed.prompt
    settings = {"max_tokens": _ROUTES_TOKENS, **given_settings(parsed)}
    from ..routes import commands

    request = commands.Request(model_choice(parsed, name), text, parsed.chat, parsed.system, settings, parsed.output)
    return show(commands.routes(request), as_json=parsed.json)


def _named(*endings: str) -> Callable[[str], Path]:
    """Reads the name of a file whose ending says what it is."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"is {text!r}, expected a name that ends in {' or '.join(endings)}")
        return path

    return parse
