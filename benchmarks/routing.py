"""How often an expert is already in memory, by slots per layer and by who decides which expert is given up.

    python benchmarks/routing.py STATS.json [--sequences 8] [--tokens 256] [--prompt 0] [--seed 0] [--json]
    python benchmarks/routing.py STATS.json --replay FOLDER [--slots 4] [--recall 0.96,0.85 0.90,0.75] [--turns 1] ...

Draws routing that is like Mixtral's in what was measured of it (how popular each expert is, how much that differs
between texts, how often the next token chooses the same), and replays the same tokens through each policy. All
sequences pass through one cache, and no policy is told where a new one begins.

A policy gives up an expert that the present token does not need, when it needs the slot. With spare slots, which all
layers share, a token's experts are used first and any of them may be the one given up. A prompt passes through the
cache, and what the policy then scores highest stays.

Without --replay no model is loaded and no expert is read. With it, the same choices drive the model in FOLDER: what
its routers say is put aside, all else is what it always does, from attention to the disk. It is loaded anew for each
run, without reading ahead and with, in turns. Guesses about a layer come from the trace as well: its first and its
second choice are named as often as --recall says, the clear ones more often, for the next layer and for the one after.
0.96 and 0.90 were measured on Mixtral; what is said of the second choice is an assumption."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mixtral_mlx.borrowed import KVCache
from mixtral_mlx.budget import Plan
from mixtral_mlx.config import Config, MixtralError
from mixtral_mlx.experts import Streaming
from mixtral_mlx.experts.streamed import Guess, StreamedExperts
from mixtral_mlx.experts.usage import Usage
from mixtral_mlx.weights import Checkpoint, load

_SLOTS = range(1, 8)
# Fewer tokens are taken for steps of decoding, which is not how a prompt is simulated.
_LEAST_PROMPT = 9
_CACHE_LIMIT = 64 << 20
# Mean distance between neighbours among a router's logits, when they are sorted.
_GAP = 0.4


@dataclass(frozen=True)
class Stats:
    """What was measured of a model's routing (L layers, E experts)."""

    popularity: np.ndarray  # (L, E) how often each expert was chosen, in any unit
    again: np.ndarray  # (L,) what is added to the logit of an expert that the token before chose
    taste: float  # standard deviation of what a text adds to each logit

    @classmethod
    def read(cls, path: Path) -> Stats:
        entry = json.loads(path.read_text())
        sim = entry["sim"]
        return cls(np.array(entry["popularity_h39s_counts"], float), np.array(sim["a_per_layer"]), sim["sigma_seq"])


def traces(stats: Stats, sequences: int, tokens: int, seed: int) -> np.ndarray:
    """The two experts that each token chooses in each layer, as (sequences, tokens, L, 2)."""
    random = np.random.default_rng(seed)
    shape = (sequences, *stats.popularity.shape)
    logits = np.log(stats.popularity) + random.normal(0, stats.taste, shape)  # (sequences, L, E)
    latest, chosen = np.zeros(shape), np.empty((sequences, tokens, shape[1], 2), np.int32)
    for token in range(tokens):
        noisy = logits + stats.again[:, None] * latest + random.gumbel(size=shape)
        chosen[:, token] = np.argsort(-noisy, -1)[..., :2]
        latest[:] = 0
        np.put_along_axis(latest, chosen[:, token].astype(np.intp), 1, -1)
    return chosen


class Policy(Protocol):
    """Scores the experts of a layer by what was chosen so far; the lowest is given up."""

    scores: list[float]

    def add(self, chosen: Sequence[int]) -> None: ...

    def add_prompt(self, chosen: np.ndarray) -> None: ...


class LeastRecent:
    """Gives up what was used longest ago."""

    def __init__(self, experts: int) -> None:
        self.scores = [0.0] * experts
        self._token = 0

    def add(self, chosen: Sequence[int]) -> None:
        self._token += 1
        for expert in chosen:
            self.scores[expert] = self._token

    def add_prompt(self, chosen: np.ndarray) -> None:
        for experts in chosen.tolist():
            self.add(experts)


class LeastFrequent:
    """Gives up what was used least, where the use by each decoded token counts 2 % less than by the next."""

    def __init__(self, experts: int) -> None:
        self.scores = [0.0] * experts

    def add(self, chosen: Sequence[int]) -> None:
        self.scores = [0.98 * score for score in self.scores]
        for expert in chosen:
            self.scores[expert] += 1

    def add_prompt(self, chosen: np.ndarray) -> None:
        pass


class Belady:
    """Knows all that will be decoded, and gives up what is wanted last: nobody can do better."""

    def __init__(self, experts: int, decoded: Sequence[Sequence[int]]) -> None:
        next_use = [-float(len(decoded))] * experts
        self._scores = []
        for token in range(len(decoded) - 1, -1, -1):
            self._scores.append(next_use.copy())
            for expert in decoded[token]:
                next_use[expert] = -float(token)
        self.scores = next_use

    def add(self, chosen: Sequence[int]) -> None:
        self.scores = self._scores.pop()

    def add_prompt(self, chosen: np.ndarray) -> None:
        pass


def replay(
    chosen: np.ndarray, policy: Policy, slots: Sequence[int] = _SLOTS, prompt: int = 0, spare: bool = False
) -> list[int]:
    """Experts found in the cache, for each number of slots, as one layer's tokens (sequences, tokens, 2) pass by."""
    caches: list[set[int]] = [set() for _ in slots]
    hits = [0] * len(caches)
    for sequence in chosen:
        policy.add_prompt(sequence[:prompt])
        for at, cached in enumerate(caches):
            cached.update(sequence[:prompt].ravel().tolist())
            while len(cached) > slots[at]:
                cached.remove(min(cached, key=policy.scores.__getitem__))
        for experts in sequence[prompt:].tolist():
            policy.add(experts)
            for at, cached in enumerate(caches):
                hits[at] += len(cached.intersection(experts))
                cached.update(experts)
                while len(cached) > slots[at]:
                    # One slot cannot hold both of a token's experts.
                    others = cached if spare else cached.difference(experts) or cached
                    cached.remove(min(others, key=policy.scores.__getitem__))
    return hits


@dataclass(frozen=True)
class Rates:
    """The share of experts found in the cache under a policy, by slots per layer."""

    policy: str
    spare: bool
    by_slots: dict[int, float]


_POLICIES: dict[str, Callable[[int, Sequence[Sequence[int]]], Policy]] = {
    "LRU": lambda experts, decoded: LeastRecent(experts),
    "LFU": lambda experts, decoded: LeastFrequent(experts),
    "ours": lambda experts, decoded: Usage(experts),
    "Belady": Belady,
}


def rates(chosen: np.ndarray, experts: int, policy: str, prompt: int = 0, spare: bool = False) -> Rates:
    """Replay traces (sequences, tokens, L, 2), whose first `prompt` tokens are read and not decoded."""
    hits = np.zeros(len(_SLOTS))
    decoded = chosen[:, prompt:]
    for layer in range(chosen.shape[2]):
        ahead = decoded[:, :, layer].reshape(-1, chosen.shape[3]).tolist()
        hits += replay(chosen[:, :, layer], _POLICIES[policy](experts, ahead), prompt=prompt, spare=spare)
    return Rates(policy, spare, dict(zip(_SLOTS, (hits / decoded.size).tolist(), strict=True)))


def table(results: Sequence[Rates]) -> str:
    """A line for each number of slots."""
    heads = [result.policy + " + spare" * result.spare for result in results]
    lines = ["slots  " + "  ".join(f"{head:>14}" for head in heads)]
    for slots in _SLOTS:
        lines.append(f"{slots:5}  " + "  ".join(f"{result.by_slots[slots]:14.3f}" for result in results))
    return "\n".join(lines)


def guesses(chosen: np.ndarray, experts: int, recall: Sequence[float], seed: int) -> np.ndarray:
    """Choices (.., 2) → logits (.., E) of somebody who names the first and the second as often as `recall` says.

    Instead of what was chosen others are named, more often where the logit is hardly above the one that follows it."""
    random = np.random.default_rng(seed)
    gaps = random.exponential(_GAP, (*chosen.shape[:-1], experts))
    wrong = random.random(chosen.shape) < 2 * (1 - np.array(recall)) * np.exp(-gaps[..., :2] / _GAP)
    places = random.random(gaps.shape)  # the lower, the surer
    np.put_along_axis(places, chosen.astype(np.intp), 2, -1)
    named = np.where(wrong, np.argsort(places, -1)[..., :2], chosen)
    np.put_along_axis(places, named.astype(np.intp), [-2, -1], -1)
    logits = np.empty_like(gaps)
    values = gaps - np.cumsum(gaps, -1)
    np.put_along_axis(logits, np.argsort(places, -1), values, -1)
    return logits


class TracedExperts(StreamedExperts):
    """A layer that is asked for the experts `traced` (N, K), whichever its router chose."""

    traced: np.ndarray

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return super().__call__(x, mx.array(self.traced).reshape(indices.shape))

    def outputs(self, x: np.ndarray, chosen: np.ndarray, per_token: int) -> Any:
        kernels: Any = super()
        return kernels.outputs(x, self.traced.reshape(-1), per_token)


class TracedGuess(Guess):
    """A guess that says `traced` (N, E), whatever the later layer's router says. That is computed all the same."""

    traced: np.ndarray

    def act(self, logits: np.ndarray) -> None:
        super().act(self.traced)


@dataclass(frozen=True)
class Run:
    """What a replayed model did per decoded token, and three views on how well its reads were hidden.

    `named_ahead` experts were read on a guess; `came_true` is the share of these that was asked for. Of all bytes read,
    `there_before` had come before they were asked for, and `begun_before` are those of experts whose reading had
    begun. `not_waited` is the share of the time with reads under way in which the model did not wait for them."""

    reads_ahead: bool
    hit_rate: float
    token_s: float
    token_bytes: float
    io_s: float
    stall_s: float
    named_ahead: float
    came_true: float
    there_before: float
    begun_before: float
    not_waited: float


def drive(folder: Path, chosen: np.ndarray, slots: int, prompt: int = 0, named: Sequence[np.ndarray] = ()) -> Run:
    """Have the model in `folder` decode with the routing of traces (sequences, tokens, L, 2), after their prompts.

    `named[0]` are logits (sequences, tokens, L, E) of guesses about each layer made in the one before it, `named[1]` in
    the one before that; without any, nothing is read ahead."""
    sequences, length, layers, _ = chosen.shape
    plan = Plan("streamed", 0, (slots,) * layers, length, max(prompt, 1), {"experts": 0}, _CACHE_LIMIT)
    loaded = load(folder, memory=plan)
    streaming: Any = loaded.streaming
    streaming.before_step = lambda: None  # It keeps its slots, however short memory becomes.
    _trace(streaming, len(named))
    ids = np.random.default_rng(0).integers(3, loaded.config.vocab_size, (sequences, length))
    decoding, seconds = dict.fromkeys(asdict(streaming.statistics), 0.0), list[float]()

    def step(sequence: int, tokens: slice) -> None:
        _ask_for(streaming, chosen[sequence, tokens], [logits[sequence, tokens] for logits in named])
        mx.eval(loaded.model(mx.array(ids[None, sequence, tokens]), cache=caches))

    for sequence in range(sequences):
        caches = [KVCache() for _ in range(layers)]
        if prompt:
            step(sequence, slice(prompt))
        before = asdict(streaming.statistics)
        for token in range(prompt, length):
            start = time.perf_counter()
            step(sequence, slice(token, token + 1))
            seconds.append(time.perf_counter() - start)
        for name, value in asdict(streaming.statistics).items():
            decoding[name] += value - before[name]
    streaming.close()
    return _run(decoding, float(np.median(seconds)), len(seconds), bool(named))


def _trace(streaming: Streaming, layers_ahead: int) -> None:
    """Give the layers and the first guesses of each the classes that can be told what to say; drop other guesses."""
    for experts in streaming.layers:
        experts.__class__ = type("Traced", (TracedExperts, type(experts)), {})
        experts.stream.about.clear()
    for n, experts in enumerate(streaming.layers):
        del experts.stream.guesses[layers_ahead:]
        for guess, later in zip(experts.stream.guesses, streaming.layers[n + 1 :], strict=False):
            guess.__class__ = TracedGuess
            later.stream.about.append(guess)


def _ask_for(streaming: Streaming, chosen: np.ndarray, named: Sequence[np.ndarray]) -> None:
    layers: Any = streaming.layers
    for n, experts in enumerate(layers):
        experts.traced = chosen[:, n].astype(np.int64)
        for later, (guess, logits) in enumerate(zip(experts.stream.guesses, named, strict=False), n + 1):
            guess.traced = logits[:, later]


def _run(counts: dict[str, float], token_s: float, tokens: int, reads_ahead: bool) -> Run:
    nbytes = counts["bytes_read"] or 1
    return Run(
        reads_ahead,
        hit_rate=counts["hits"] / (counts["hits"] + counts["misses"]),
        token_s=token_s,
        token_bytes=counts["bytes_read"] / tokens,
        io_s=counts["io_s"] / tokens,
        stall_s=counts["stall_s"] / tokens,
        named_ahead=counts["ahead_reads"] / tokens,
        came_true=counts["ahead_used"] / (counts["ahead_reads"] or 1),
        there_before=counts["hidden_bytes"] / nbytes,
        begun_before=counts["ahead_used_bytes"] / nbytes,
        not_waited=1 - counts["stall_s"] / (counts["io_s"] or 1),
    )


_ROWS: Sequence[tuple[str, Callable[[Run, float], str]]] = (
    ("there when asked for", lambda run, lru: f"{run.hit_rate:.3f}"),
    ("points over LRU", lambda run, lru: f"{100 * (run.hit_rate - lru):+.1f}"),
    ("seconds per token, median", lambda run, lru: f"{run.token_s:.3f}"),
    ("  with reads under way", lambda run, lru: f"{run.io_s:.3f}"),
    ("  waited for reads", lambda run, lru: f"{run.stall_s:.3f}"),
    ("MB read per token", lambda run, lru: f"{run.token_bytes / 1e6:.1f}"),
    ("experts read ahead per token", lambda run, lru: f"{run.named_ahead:.1f}"),
    ("  of these asked for", lambda run, lru: f"{run.came_true:.3f}"),
    ("bytes there before asked for", lambda run, lru: f"{run.there_before:.3f}"),
    ("bytes of experts begun before", lambda run, lru: f"{run.begun_before:.3f}"),
    ("reading time not waited for", lambda run, lru: f"{run.not_waited:.3f}"),
)


def runs_table(simulated: dict[str, float], runs: Sequence[Run]) -> str:
    """The simulated hit rates, then a column for each run."""
    lines = ["simulated: " + ", ".join(f"{name} {rate:.3f}" for name, rate in simulated.items()), ""]
    heads = ["ours + ahead" if run.reads_ahead else "ours" for run in runs]
    lines.append(f"{'':30}" + "".join(f"{head:>14}" for head in heads))
    for name, figure in _ROWS:
        lines.append(f"{name:30}" + "".join(f"{figure(run, simulated['LRU']):>14}" for run in runs))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stats", type=Path, metavar="STATS.json")
    parser.add_argument("--sequences", type=int, help="8, or 1 with --replay")
    parser.add_argument("--tokens", type=int, help="decoded in each sequence: 256, or 64 with --replay")
    parser.add_argument("--prompt", type=int, help="tokens read before them: 0, or 64 with --replay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print numbers for programs")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="have this model do it")
    parser.add_argument("--slots", type=int, default=4, help="of each layer, when replaying")
    parser.add_argument("--recall", type=_recall, nargs="+", default=[(0.96, 0.85), (0.90, 0.75)], metavar="A,B")
    parser.add_argument("--turns", type=int, default=1, help="of replaying without and with reading ahead")
    args = parser.parse_args(arguments)
    for name, simulated, replayed in (("sequences", 8, 1), ("tokens", 256, 64), ("prompt", 0, 64)):
        if getattr(args, name) is None:
            setattr(args, name, replayed if args.replay else simulated)
    if min(args.sequences, args.tokens, args.turns) < 1 or args.prompt < 0:
        parser.error("--sequences, --tokens and --turns must be at least 1, --prompt at least 0")
    if args.replay and (0 < args.prompt < _LEAST_PROMPT or args.slots not in _SLOTS):
        parser.error(f"--replay needs a --prompt of 0 or of {_LEAST_PROMPT} tokens and more, and 1 to 7 --slots")
    try:
        stats = Stats.read(args.stats)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{args.stats} cannot be read as routing statistics: {error!r}")
    if args.replay:
        _replay(args, stats)
    else:
        _simulate(args, stats)


def _recall(text: str) -> tuple[float, float]:
    first, second = map(float, text.split(","))
    if not (0.5 <= first <= 1 and 0.5 <= second <= 1):
        raise argparse.ArgumentTypeError(f"{text} has a share that is not between 0.5 and 1")
    return first, second


def _simulate(args: argparse.Namespace, stats: Stats) -> None:
    chosen, experts = traces(stats, args.sequences, args.prompt + args.tokens, args.seed), stats.popularity.shape[1]
    columns = [*((name, False) for name in _POLICIES), ("ours", True), ("Belady", True)]
    results = [rates(chosen, experts, name, args.prompt, spare) for name, spare in columns]
    if args.json:
        settings = {name: getattr(args, name) for name in ("sequences", "tokens", "prompt", "seed")}
        print(json.dumps({**settings, "rates": [asdict(result) for result in results]}, indent=1))
    else:
        print(table(results))


def _replay(args: argparse.Namespace, stats: Stats) -> None:
    try:
        config = Checkpoint.open(args.replay).config
    except MixtralError as error:
        sys.exit(str(error))
    layers, experts = config.num_hidden_layers, stats.popularity.shape[1]
    _check(config, stats, args.replay)
    chosen = traces(stats, args.sequences, args.prompt + args.tokens, args.seed)[:, :, :layers]
    simulated = {name: rates(chosen, experts, name, args.prompt).by_slots[args.slots] for name in _POLICIES}
    named = [guesses(chosen, experts, recall, args.seed + 1 + n) for n, recall in enumerate(args.recall)]
    runs = []
    for logits in [[], named] * args.turns:
        runs.append(drive(args.replay, chosen, args.slots, args.prompt, logits))
        print(runs[-1], file=sys.stderr)
        gc.collect()  # The model's slots, before the next one's are made.
    if args.json:
        settings = {name: getattr(args, name) for name in ("sequences", "tokens", "prompt", "seed", "slots", "recall")}
        print(json.dumps({**settings, "simulated": simulated, "runs": [asdict(run) for run in runs]}, indent=1))
    else:
        print(f"{layers} layers, {args.slots} slots each; prompt {args.prompt}, {args.tokens} tokens decoded")
        print(runs_table(simulated, runs))


def _check(config: Config, stats: Stats, folder: Path) -> None:
    layers, experts = stats.popularity.shape
    if config.num_hidden_layers > layers or (config.num_local_experts, config.num_experts_per_tok) != (experts, 2):
        sys.exit(
            f"{folder} has {config.num_hidden_layers} layers and {config.num_experts_per_tok} of "
            f"{config.num_local_experts} experts per token, expected at most {layers} layers and 2 of {experts}."
        )


if __name__ == "__main__":
    main()
