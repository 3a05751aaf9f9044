"""How often an expert is already in memory, by slots per layer and by who decides which expert is given up.

    python benchmarks/routing.py STATS.json [--sequences 8] [--tokens 256] [--prompt 0] [--seed 0] [--json]

Draws routing that is like Mixtral's in what was measured of it (how popular each expert is, how much that differs
between texts, how often the next token chooses the same), and replays the same tokens through each policy. Loads no
model and reads no expert. All sequences pass through one cache, and no policy is told where a new one begins.

A policy gives up an expert that the present token does not need, when it needs the slot. With spare slots, which all
layers share, a token's experts are used first and any of them may be the one given up."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mixtral_mlx.experts.usage import Usage

_SLOTS = range(1, 8)


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stats", type=Path, metavar="STATS.json")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="decoded in each sequence")
    parser.add_argument("--prompt", type=int, default=0, help="tokens read before them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print numbers for programs")
    args = parser.parse_args(arguments)
    if min(args.sequences, args.tokens) < 1 or args.prompt < 0:
        parser.error("--sequences and --tokens must be at least 1, --prompt at least 0")
    try:
        stats = Stats.read(args.stats)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{args.stats} cannot be read as routing statistics: {error!r}")
    chosen, experts = traces(stats, args.sequences, args.prompt + args.tokens, args.seed), stats.popularity.shape[1]
    columns = [*((name, False) for name in _POLICIES), ("ours", True), ("Belady", True)]
    results = [rates(chosen, experts, name, args.prompt, spare) for name, spare in columns]
    if args.json:
        settings = {name: getattr(args, name) for name in ("sequences", "tokens", "prompt", "seed")}
        print(json.dumps({**settings, "rates": [asdict(result) for result in results]}, indent=1))
    else:
        print(table(results))


if __name__ == "__main__":
    main()
