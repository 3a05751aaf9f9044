"""The engine: what many requests at once, kept prompts and drafts bring, in one process and in turns.

    python benchmarks/engine.py batches FOLDER [--concurrent 1 2 4 8 16 --tokens 16 --turns 3 --mlx-lm]
    python benchmarks/engine.py gap FOLDER [--prompt 4000]
    python benchmarks/engine.py follow-up FOLDER [--prompt 2000 --turns 3]
    python benchmarks/engine.py speculation FOLDER [--draft FOLDER --memory 12GB --tokens 96 --turns 3]

batches: tokens per second of all requests together, with prompts of 8 random ids, drawn at temperature 1; next to
mlx-lm on the same weights in float32, with --their-tokens each, since it may be slow. gap: the longest pause of a
running stream while a long prompt is read, over what one chunk of that prompt takes alone. follow-up: seconds to the
first token after a long prompt that was read before, from memory, and from disk after a restart, over the cold ones.
speculation: with guesses and without, copied from the text or a draft model's, on a text to be copied with edits (by a
model that can, which copier.py builds), on one token again and again (where every copied guess is right), and on free
text at temperature 1, where hardly any is. Ratios are of runs that followed each other."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, Literal

import copier
import numpy as np
from agreement import theirs_in_float32

from mixtral_mlx import Engine, Reply, Token, load, locate
from mixtral_mlx.budget import parse_size

_WARM_UP_TOKENS = 2


def random_ids(count: int, vocab: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab, count).tolist()


def timed(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


# Many requests at once.


def ours_together(engine: Engine, concurrent: int, tokens: int, turn: int) -> float:
    """Tokens per second of so many requests, from when all have their first."""
    vocab = engine.config.vocab_size
    replies = [
        engine.complete(
            random_ids(8, vocab, turn * 100 + n), max_tokens=tokens + 1, temperature=1.0, seed=n, ignore_eos=True
        )
        for n in range(concurrent)
    ]
    for reply in replies:
        _until_first(reply)
    return concurrent * tokens / timed(lambda: [reply.result() for reply in replies])


def _until_first(reply: Reply) -> None:
    next(event for event in reply if isinstance(event, Token))


def theirs_together(model: Any, concurrent: int, tokens: int, turn: int, vocab: int) -> float:
    """The same of mlx-lm's batch generator."""
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    generator = BatchGenerator(model, sampler=make_sampler(temp=1.0), completion_batch_size=concurrent)
    generator.insert([random_ids(8, vocab, turn * 100 + n) for n in range(concurrent)], [tokens + 1] * concurrent)
    generator.next_generated()
    done = 0

    def run() -> None:
        nonlocal done
        while done < concurrent * tokens:
            done += len(generator.next_generated())

    seconds = timed(run)
    generator.close()
    return done / seconds


def batches(args: argparse.Namespace) -> None:
    theirs = theirs_in_float32(args.folder) if args.mlx_lm else None
    with load(args.folder, dtype="float32", max_concurrent=max(args.concurrent)) as engine:
        ours_together(engine, 1, _WARM_UP_TOKENS, 0)
        ours: dict[int, list[float]] = {n: [] for n in args.concurrent}
        other: dict[int, list[float]] = {n: [] for n in args.concurrent}
        for turn in range(1, args.turns + 1):
            for n in args.concurrent:
                ours[n].append(ours_together(engine, n, args.tokens, turn))
                if theirs:
                    other[n].append(theirs_together(theirs, n, args.their_tokens, turn, engine.config.vocab_size))
    print("requests  ours tok/s  × one alone  mlx-lm tok/s  ratio")
    for n in args.concurrent:
        fast = median(ours[n])
        line = f"{n:8}  {fast:10.1f}  {fast / median(ours[args.concurrent[0]]):11.2f}"
        if theirs:
            line += f"  {median(other[n]):12.2f}  {fast / median(other[n]):5.1f}"
        print(line)


# A long prompt beside a running stream.


def gap(args: argparse.Namespace) -> None:
    with load(args.folder, dtype="float32") as engine:
        vocab = engine.config.vocab_size
        chunk = engine.chunk_tokens
        for seed in (1, 2):  # The first warms up.
            alone = timed(engine.complete(random_ids(chunk + 1, vocab, seed), max_tokens=1).result)
        running = engine.complete(random_ids(8, vocab, 3), ignore_eos=True)
        _until_first(running)
        for _ in range(8):
            _until_first(running)
        gaps, last = [], time.perf_counter()
        with ThreadPoolExecutor(1) as threads:
            long = threads.submit(engine.complete(random_ids(args.prompt, vocab, 4), max_tokens=1).result)
            for event in running:
                if isinstance(event, Token):
                    now = time.perf_counter()
                    gaps.append(now - last)
                    last = now
                if long.done():
                    break
        running.cancel()
    print(f"a chunk of {chunk} tokens alone: {alone:.2f} s, with its request's first token")
    print(f"a prompt of {args.prompt:,} beside a stream: {len(gaps)} tokens, the longest gap {max(gaps):.2f} s")
    print(f"ratio {max(gaps) / alone:.2f}")


# Prompts that were read before.


def follow_up(args: argparse.Namespace) -> None:
    cold, warm, disk = [], [], []
    with tempfile.TemporaryDirectory() as cache:
        for turn in range(args.turns):
            with load(args.folder, cache_dir=cache) as engine:
                vocab = engine.config.vocab_size
                prompt = random_ids(args.prompt, vocab, turn)
                engine.complete(random_ids(40, vocab, 99), max_tokens=2).result()
                cold.append(_first_token(engine, [*prompt, 5, 6, 7]))
                warm.append(_first_token(engine, [*prompt, 8, 9, 10]))
            with load(args.folder, cache_dir=cache) as engine:
                engine.complete(random_ids(40, vocab, 98), max_tokens=2).result()
                disk.append(_first_token(engine, [*prompt, 11, 12, 13]))
    print(f"first token after {args.prompt:,} tokens: cold {median(cold):.3f} s, median of {args.turns}")
    print(f"from memory {median(warm):.3f} s, ratio {median(warm) / median(cold):.3f}")
    print(f"from disk after a restart {median(disk):.3f} s, ratio {median(disk) / median(cold):.3f}")


def _first_token(engine: Engine, prompt: Sequence[int]) -> float:
    return engine.complete(prompt, max_tokens=1).result().usage.prompt_seconds


# Drafts.


def speculation(args: argparse.Namespace) -> None:
    ways: list[Literal["n-gram", "draft"] | None] = [None, "n-gram"]
    if args.draft:
        ways.append("draft")
    with load(args.folder, memory=args.memory, draft=args.draft) as engine:
        edited, _ = copier.task(engine.tokenizer)
        kinds: list[tuple[str, list[int], dict[str, Any]]] = [
            ("edit", edited, {"temperature": 0.0}),
            ("loop", edited, {"temperature": 0.0, "logit_bias": {edited[5]: 1000.0}}),
            ("free", engine.tokenizer.encode("Once upon a time"), {"temperature": 1.0, "seed": 1}),
        ]
        print("text  guesses  tokens per pass   tok/s  × without  lowest  same tokens")
        for name, prompt, how in (kind for kind in kinds if kind[0] in args.texts):
            rates: dict[Any, list[float]] = {way: [] for way in ways}
            texts, per_pass = set(), dict.fromkeys(ways, 0.0)
            for _ in range(args.turns + 1):  # The first warms up.
                for way in ways:
                    before = engine.stats()["requests"]["passes"]
                    result = engine.complete(
                        prompt, max_tokens=args.tokens, ignore_eos=True, speculate=way, **how
                    ).result()
                    rates[way].append(result.usage.generation_tps)
                    texts.add(result.tokens)
                    per_pass[way] = len(result.tokens) / (engine.stats()["requests"]["passes"] - before)
            for way in ways:
                pairs = zip(rates[way][1:], rates[None][1:], strict=True)
                ratios = sorted(fast / plain for fast, plain in pairs)
                print(
                    f"{name:4}  {way or 'none':7}  {per_pass[way]:15.2f}  {median(rates[way][1:]):6.2f}"
                    f"  {median(ratios):9.2f}  {ratios[0]:6.2f}  {len(texts) == 1}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("batches", batches), ("gap", gap), ("follow-up", follow_up), ("speculation", speculation)):
        command = commands.add_parser(name)
        command.add_argument("folder", type=lambda text: locate(None if text == "demo" else text))
        command.set_defaults(run=run)
        if name != "gap":
            command.add_argument("--turns", type=int, default=3)
        if name in ("batches", "speculation"):
            command.add_argument("--tokens", type=int, default=16 if name == "batches" else 96)
        if name in ("gap", "follow-up"):
            command.add_argument("--prompt", type=int, default=4000 if name == "gap" else 2000)
        if name == "batches":
            command.add_argument("--concurrent", type=int, nargs="+", default=[1, 2, 4, 8, 16])
            command.add_argument("--mlx-lm", action="store_true")
            command.add_argument("--their-tokens", type=int, default=4)
        if name == "speculation":
            command.add_argument("--memory", type=parse_size)
            command.add_argument(
                "--texts", nargs="+", choices=["edit", "loop", "free"], default=["edit", "loop", "free"]
            )
            command.add_argument("--draft", type=lambda text: locate(None if text == "demo" else text))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
