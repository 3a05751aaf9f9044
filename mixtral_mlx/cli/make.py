"""The commands `convert`, `verify` and `perplexity`: their arguments."""

from __future__ import annotations

from pathlib import Path

from ..config import RECIPES
from .options import Parser, UsageError, add_model_name, add_output, count, one_of, required_model, show

_CONVERT = """Convert any Mixtral checkpoint into a folder that this program and mlx-lm run.

SOURCE is a folder, a .gguf file, `demo`, or a Hugging Face repository (for one of several GGUF models in it,
NAME:FILE). DEST appears when all of it is written. Stopped or killed, the same command goes on where it was."""


_CONVERT_EPILOG = """recipes, by bits of the experts and of the rest (the router always has 8 or more):
  q8 q6 q5 q4   8, 6, 5 or 4, and 8        q4-mini   4, and 4
  q3 q2         3 or 2, and 6              bf16 f16  not quantized
  keep          as MLX has quantized the source

example:
  mixtral-mlx convert mistralai/Mixtral-8x7B-Instruct-v0.1 ~/models/mixtral-q4 --recipe q4"""


def convert(arguments: list[str]) -> int:
    """`mixtral-mlx convert`."""
    parser = Parser("mixtral-mlx convert", description=_CONVERT, epilog=_CONVERT_EPILOG)
    parser.add_argument("source", metavar="SOURCE", help="what to convert")
    parser.add_argument("dest", metavar="DEST", help="the folder to write")
    group = parser.add_argument_group("what to write")
    group.add_argument(
        "--recipe",
        action="append",
        default=[],
        type=one_of(*RECIPES, "keep"),
        metavar="NAME",
        help="how to quantize (q4; what MLX has quantized: keep); given several times, writes DEST-NAME for each",
    )
    group.add_argument("--recipe-file", metavar="F", help='a recipe of your own, as {"*": 4, "*.self_attn.*": 8}')
    group.add_argument("--group-size", type=one_of(32, 64, 128), metavar="N", help="weights that share a scale (64)")
    group.add_argument(
        "--mode",
        type=one_of("affine", "mxfp4", "nvfp4", "mxfp8"),
        metavar="MODE",
        help="form of the experts' numbers: affine, mxfp4, nvfp4, mxfp8 (affine)",
    )
    group.add_argument(
        "--dtype",
        type=one_of("auto", "bfloat16", "float16", "float32"),
        default="auto",
        metavar="T",
        help="of what is not quantized: bfloat16, float16, float32; auto keeps float16, else bfloat16",
    )
    group = parser.add_argument_group("where it comes from")
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of the repository (main)")
    group.add_argument("--offline", action="store_true", help="fetch nothing from the network")
    group.add_argument("--keep-source", action="store_true", help="keep what is fetched, as DEST-source")
    add_output(parser, "print one object, or one a line for several recipes: source_format, recipe, bytes_out …")
    parsed = parser.parse(arguments)
    from ..convert.commands import convert
    from ..convert.run import Request

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
    return show(convert(request, quiet=parsed.quiet), as_json=parsed.json)


def verify(arguments: list[str]) -> int:
    """`mixtral-mlx verify`."""
    parser = Parser(
        "mixtral-mlx verify",
        description="Check offline that a converted folder is bit for bit as it was written.",
        epilog="example:\n  mixtral-mlx verify ~/models/mixtral-q4",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder written by `convert`")
    add_output(parser, "print one object: folder, files, bytes, seconds")
    parsed = parser.parse(arguments)
    from ..convert.commands import verify

    return show(verify(Path(parsed.folder), quiet=parsed.quiet), as_json=parsed.json)


def perplexity(arguments: list[str]) -> int:
    """`mixtral-mlx perplexity`."""
    parser = Parser(
        "mixtral-mlx perplexity",
        description="Measure how well a model predicts a text, and how far it is from another one.\n"
        "One layer at a time is in memory, so neither model needs to fit.",
        epilog="example:\n  mixtral-mlx perplexity --model ~/models/mixtral-q4 --file book.txt",
    )
    add_model_name(parser, "required")
    parser.add_argument("--file", metavar="T", help="the text, in UTF-8 (required)")
    parser.add_argument("--against", metavar="N", help="another model: also print the KL divergence from it")
    parser.add_argument("--context", type=count(2), default=512, metavar="N", help="tokens of a window (512)")
    parser.add_argument("--offline", action="store_true", help="fetch nothing from the network")
    add_output(parser, "print one object: perplexity, tokens, kl, seconds")
    parsed = parser.parse(arguments)
    model = required_model(parsed)
    if not parsed.file:
        raise UsageError("No text was given.", code="no_text", hint="Give --file FILE.")
    from ..convert.commands import perplexity

    models = [None if name == "demo" else name for name in (model, parsed.against) if name]
    answer = perplexity(models, Path(parsed.file), context=parsed.context, offline=parsed.offline, quiet=parsed.quiet)
    return show(answer, as_json=parsed.json)
