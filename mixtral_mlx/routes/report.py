"""What was found about a text's routes: the choices, how evenly experts are loaded, how often they come again.

N tokens, L layers, E experts, K chosen experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from ..routing import Array, Choices, counted


@dataclass(frozen=True)
class Token:
    """A token that went through the experts; `piece` is how the vocabulary writes it."""

    id: int
    piece: str
    is_answer: bool


@dataclass(frozen=True)
class Figures:
    """How experts are chosen, for each layer or as the mean of all.

    `evenness` is the entropy of the experts' loads as a share of what it could be: 1 where all have the same. `busiest`
    is the largest load in even shares. `same_first` is how many tokens have the first expert of the token before them,
    `again` how many of a token's experts the token before had too; None for a single token."""

    evenness: float
    busiest: float
    same_first: float | None
    again: float | None


MEASURED = {
    "Mixtral-8x7B-Instruct, chats": Figures(evenness=0.994, busiest=1.22, same_first=None, again=0.343),
    "Mixtral-8x7B, web text": Figures(evenness=0.997, busiest=1.11, same_first=None, again=None),
}
"""What others have counted over long texts, as the mean of 32 layers. The chats are logs of h39s/mlsys: 199,000 choices
in each layer, and how often a cache of the two experts used last had the next one. The web text is C4, counted for
MC-MoE."""


@dataclass(frozen=True)
class Report:
    """A text's routes: its `tokens`, what was chosen for each, and the answer's `text`."""

    model: str
    dtype: str
    mode: str
    experts: int
    tokens: tuple[Token, ...]
    choices: Choices
    text: str
    finish_reason: str

    @property
    def layers(self) -> int:
        return int(self.choices.experts.shape[1])

    @property
    def prompt_tokens(self) -> int:
        return sum(not token.is_answer for token in self.tokens)

    @cached_property
    def counts(self) -> Array:
        """How often each layer chose each expert: (L, E)."""
        return counted(self.choices, self.experts)

    @cached_property
    def by_layer(self) -> list[Figures]:
        """The figures of each layer."""
        return figures(self.choices, self.experts)

    @cached_property
    def overall(self) -> Figures:
        """The mean over the layers."""
        return _mean(self.by_layer)

    @cached_property
    def by_chance(self) -> Figures:
        """What a router without preferences would show over as many tokens: few cannot be spread evenly."""
        return by_chance(len(self.tokens), self.experts, self.choices.experts.shape[-1])

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints. Other programs read these names."""
        return {
            "model": self.model,
            "layers": self.layers,
            "experts": self.experts,
            "prompt_tokens": self.prompt_tokens,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "tokens": [asdict(token) for token in self.tokens],
            "choices": self.choices.experts.tolist(),
            "weights": np.round(self.choices.weights.astype(float), 4).tolist(),
            "counts": self.counts.tolist(),
            "by_layer": [rounded(one) for one in self.by_layer],
            "overall": rounded(self.overall),
            "by_chance": rounded(self.by_chance),
            "measured": {name: rounded(one) for name, one in MEASURED.items()},
        }


def figures(choices: Choices, experts: int) -> list[Figures]:
    """The figures of each layer."""
    counts = counted(choices, experts)
    shares = counts / counts.sum(axis=-1, keepdims=True)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=-1)
    evenness = entropy / np.log(experts) if experts > 1 else np.ones(len(shares))
    busiest = shares.max(axis=-1) * experts
    same: Sequence[float | None]
    again: Sequence[float | None]
    same = again = [None] * len(shares)
    if len(choices) > 1:
        before, after = choices.experts[:-1], choices.experts[1:]  # (N - 1, L, K)
        same = (before[..., 0] == after[..., 0]).mean(axis=0).tolist()
        again = (before[..., None, :] == after[..., :, None]).any(axis=-1).mean(axis=(0, 2)).tolist()
    return [Figures(*each) for each in zip(evenness.tolist(), busiest.tolist(), same, again, strict=True)]


_TRIALS = 200
_MOST_DRAWN = 100_000


def by_chance(tokens: int, experts: int, per_token: int) -> Figures:
    """The mean of many routers' figures that draw `per_token` different experts for each token."""
    random = np.random.default_rng(0)
    trials = max(min(_TRIALS, _MOST_DRAWN // tokens), 1)
    drawn = random.random((tokens, trials, experts)).argsort(axis=-1)[..., :per_token]
    even = _mean(figures(Choices(drawn, np.ones(drawn.shape)), experts))
    return Figures(even.evenness, even.busiest, 1 / experts, per_token / experts)


def _mean(some: Sequence[Figures]) -> Figures:
    def mean(name: str) -> Any:
        values = [getattr(one, name) for one in some]
        return None if None in values else float(np.mean(values))

    return Figures(**{field.name: mean(field.name) for field in fields(Figures)})


def rounded(one: Figures) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 4) for name, value in vars(one).items()}


def table(report: Report) -> list[tuple[str, ...]]:
    """What is printed and drawn of the figures, a heading first: this text, chance, and what others measured."""
    rows = {"this text": report.overall, "by chance": report.by_chance} | MEASURED
    return [
        ("", "evenness", "busiest", "same first", "again"),
        *((name, *shown(one)) for name, one in rows.items()),
    ]


def shown(one: Figures) -> tuple[str, str, str, str]:
    """Figures as people read them."""
    shares = [None if value is None else f"{value:.0%}".replace("%", " %") for value in (one.same_first, one.again)]
    return f"{one.evenness:.3f}", f"{one.busiest:.2f} ×", shares[0] or "–", shares[1] or "–"
