"""Turn the trained checkpoint into the folder that ships, and ask that folder the questions kept from training.

    python -m mixtral_mlx.demo.ship HF_FOLDER FOLDER      quantize and write
    python -m mixtral_mlx.demo.ship --evaluate FOLDER     exact-answer rate, and how much each expert is used

The trained checkpoint comes in through the same loader as any other Mixtral."""

from __future__ import annotations

import argparse
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mixtral_mlx.config import Config, Packing, Quantization
from mixtral_mlx.convert.tokenizer import write_tokenizer_json
from mixtral_mlx.demo.corpus import Question, held_out, is_correct
from mixtral_mlx.generate import Conversation, Sampling, stream_generate
from mixtral_mlx.model import Model
from mixtral_mlx.prompt import Message, Tokenizer
from mixtral_mlx.weights import Loaded, load, quantize, save


def ship(source: Path, folder: Path) -> None:
    """Quantize the checkpoint `source` to 4 bits, its router to 8, and write it with its tokenizer as `folder`."""
    # Scales and norms stay float32: they are few, and processors without bfloat16 run the demo many times faster.
    loaded = load(source, dtype="float32")
    config = replace(loaded.config, quantization=recipe(loaded.config), dtype="float32")
    quantize(loaded.model, config)
    save(folder, loaded.model, config)
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    write_tokenizer_json(folder / "tokenizer.model", folder)


def recipe(config: Config) -> Quantization:
    """4 bits for everything but the router."""
    routers = (f"model.layers.{n}.block_sparse_moe.gate" for n in range(config.num_hidden_layers))
    return Quantization(Packing(4), {path: Packing(8) for path in routers})


def answer(loaded: Loaded, tokenizer: Tokenizer, messages: Iterable[tuple[str, str]]) -> str:
    """The model's likeliest answer to a conversation."""
    prompt = tokenizer.encode_chat([Message(role, text) for role, text in messages])
    chunks = stream_generate(
        loaded.model, tokenizer, prompt, Sampling(max_tokens=120), conversation=Conversation(loaded.model)
    )
    return "".join(chunk.text for chunk in chunks)


def rates(loaded: Loaded, tokenizer: Tokenizer, questions: Iterable[Question]) -> dict[str, tuple[int, int]]:
    """Kind of question → (answered exactly right, asked)."""
    results: dict[str, list[bool]] = defaultdict(list)
    for question in questions:
        results[question.kind].append(is_correct(question, answer(loaded, tokenizer, question.messages)))
    return {kind: (sum(right), len(right)) for kind, right in results.items()}


class Counted(nn.Module):
    """A layer's experts, counting how often each is chosen."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.counts: Counter[int] = Counter()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self.counts.update(cast(list[int], indices.flatten().tolist()))
        return self.experts(x, indices)


def count_experts(model: Model) -> list[Counter[int]]:
    """Put counters into `model`; the counts, layer by layer, grow as it runs."""
    counters = []
    for layer in model.layers:
        layer.block_sparse_moe.switch_mlp = Counted(layer.block_sparse_moe.switch_mlp)
        counters.append(layer.block_sparse_moe.switch_mlp.counts)
    return counters


def evaluate(folder: Path, count: int, seed: int) -> None:
    """Print the exact-answer rate of `folder` by kind of question, and the share of tokens each expert gets."""
    loaded = load(folder)
    tokenizer = Tokenizer.read(folder, loaded.config.vocab_size)
    used = count_experts(loaded.model)
    results = rates(loaded, tokenizer, held_out(seed, count))
    for kind, (right, asked) in sorted(results.items()):
        print(f"{kind:16} {right:4} of {asked:4}  {right / asked:6.1%}")
    right, asked = map(sum, zip(*results.values(), strict=True))
    print(f"{'all':16} {right:4} of {asked:4}  {right / asked:6.1%}")
    for n, counts in enumerate(used):
        shares = (counts[expert] / counts.total() for expert in range(loaded.config.num_local_experts))
        print(f"layer {n}: " + "  ".join(f"{share:5.1%}" for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.evaluate and not args.folders:
        evaluate(args.evaluate, args.questions, args.seed)
    elif len(args.folders) == 2 and not args.evaluate:
        ship(*args.folders)
    else:
        parser.error("give HF_FOLDER and FOLDER, or --evaluate FOLDER")


if __name__ == "__main__":
    main()
