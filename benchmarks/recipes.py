"""What each recipe costs and loses: bits per weight, size of both Mixtrals, and on a checkpoint its perplexity and its
divergence from the unquantized model, with the router at 8 bits as the recipes have it and at 4 as others do.

    python benchmarks/recipes.py FLOAT_CHECKPOINT

Meant for the demo model, unquantized: the text is of its kind. What ships has learned to live on a grid of 4 bits, so
let its weights leave it first:

    python benchmarks/export.py mixtral_mlx/demo/model --transformers START
    python -m mixtral_mlx.demo.train --start START --exact --minutes 10 --output FLOAT_CHECKPOINT --tokenizer T"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

from mixtral_mlx.config import KNOWN, RECIPES, Config, Packing, Quantization, recipe
from mixtral_mlx.convert.journal import Journal
from mixtral_mlx.convert.names import matrices
from mixtral_mlx.convert.perplexity import Score, perplexity
from mixtral_mlx.convert.pipeline import Conversion, Target
from mixtral_mlx.convert.source import Source, open_source
from mixtral_mlx.demo.corpus import conversations


def text_of_its_kind(count: int = 150) -> str:
    """Conversations as the demo model reads them."""
    lines = []
    for talk in islice(conversations(seed=987), count):
        turns = [f"[INST] {text} [/INST]" if role == "user" else text for role, text in talk if role != "system"]
        lines.append(" ".join(turns))
    return "\n".join(lines)


def with_router(quantization: Quantization, config: Config, bits: int) -> Quantization:
    """The same recipe with its router at `bits`."""
    routers = {path: Packing(bits) for path in config.modules() if path.endswith(".gate")}
    return Quantization(quantization.default, {**quantization.overrides, **routers})


def score(source: Source, name: str, quantization: Quantization | None, text: str, reference: Path | None) -> Score:
    """Convert `source` with `quantization`, score it on `text`, and remove it."""
    with tempfile.TemporaryDirectory() as temporary:
        dest = Path(temporary) / "dest"
        target = Target.plan(dest, name, source.config, quantization, "float32")
        with Journal(dest.with_name("dest.partial"), {}) as journal, Conversion(journal, [target]) as conversion:
            conversion.write_tokenizer(source.write_tokenizer)
            conversion.fill(matrices(source.tensors, source.config), lambda done, total: None)
            conversion.finish({})
        return perplexity(dest, text, against=reference)


def size_of(name: str, config: Config) -> tuple[float, float]:
    """GB and bits per weight of a published Mixtral in recipe `name`."""
    nbytes = replace(config, quantization=recipe(config, name)).nbytes("bfloat16")
    return nbytes / 1e9, nbytes * 8 / config.parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    source, text = open_source(args.checkpoint), text_of_its_kind()
    print("| recipe | bits/weight | 8x7B | 8x22B | perplexity | KL | perplexity, 4-bit router | KL, 4-bit router |")
    print("|---|---|---|---|---|---|---|---|")
    for name in RECIPES:
        (small, bits), (large, _) = (size_of(name, KNOWN[size]) for size in ("8x7B", "8x22B"))
        quantization = recipe(source.config, name)
        ours = score(source, name, quantization, text, args.checkpoint)
        row = f"| {name} | {bits:.2f} | {small:.1f} GB | {large:.1f} GB | {ours.perplexity:.4f} | {ours.kl:.5f} "
        if quantization:
            other = score(source, name, with_router(quantization, source.config, 4), text, args.checkpoint)
            row += f"| {other.perplexity:.4f} | {other.kl:.5f} |"
        else:
            row += "| – | – |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
