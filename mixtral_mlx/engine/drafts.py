"""Guess what a text goes on with from what it said before, and say how many guesses are worth a pass's time.

The engine appends a draft to a sequence's next row, samples at each place as it would anyway, and keeps the tokens up
to the first that differs from the draft: what is written is the same with and without, only sooner. Plain Python;
knows no model, and of time only what it is told."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence

_TOKEN_BITS = 20  # as many as config allows a vocabulary to have
_GRAM_SIZES = (3, 2)
_LONGEST_MATCH = 16

# What drafts may lose, in plain passes: for each token, for a sequence's first ones, and after much was gained.
_EARNED = 0.03
_SPARE_AT_FIRST = 1.0
_MOST_SPARE = 4.0

_PAYS = 1.05  # Below this, a gain is as likely noise in what was measured.

# Chances follow about the last 30 guesses, and seconds the last 10 passes; seconds not measured for 400 are doubtful.
_KEPT_OF_CHANCES = 0.97
_PRIOR_GUESSES = 4.0
_NEWEST_SHARE = 0.1
_KEPT_OF_SECONDS = 0.997
_KNOWN = 0.3
_PRIOR_PASSES = 0.5
_MOST_TIMES_EXPECTED = 3.0


class Speculation:
    """One sequence's drafts, as many as pay. Tell the engine's `PassSeconds` of a pass before `add` of its tokens.

    Promises that its drafts cost a sequence of N tokens at most the time of 1 + 0.03 N plain passes, whatever the
    text, as far as the seconds it is told of repeat."""

    def __init__(self, tokens: Iterable[int], passes: PassSeconds) -> None:
        self.drafts = Drafts(tokens)
        self.length = DraftLength(passes)

    def draft(self, most: int, other_rows: int = 0) -> list[int]:
        """Up to `most` tokens to append to this sequence's row, in a pass with `other_rows` of other sequences'."""
        if not self.drafts.matched:
            return []
        return self.drafts.propose(self.length.choose(self.drafts.matched, most, other_rows))

    def add(self, tokens: Iterable[int]) -> None:
        """Add what a pass brought: the tokens of the draft that were right, and the one sampled after them."""
        tokens = list(tokens)
        for token in tokens:
            guess = self.drafts.propose(1)
            if guess:
                self.length.learn(self.drafts.matched, guess[0] == token)
            self.drafts.add([token])
        self.length.settle(len(tokens))


class Drafts:
    """What followed when the text last said what it ends with.

    A place found is followed while the text repeats it. Otherwise the latest place after the same 3 tokens is taken,
    or after the same 2. On edited copies this finds what the longest match of any length would."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.matched = 0
        """How many tokens before the place equal the text's last ones, 16 at most; 0 when no place is known."""
        self._tokens: list[int] = []
        self._place = 0
        self._latest: dict[int, dict[int, int]] = {size: {} for size in _GRAM_SIZES}
        self.add(tokens)

    def add(self, tokens: Iterable[int]) -> None:
        """Continue the text."""
        for token in tokens:
            self._index(len(self._tokens))
            follows = self.matched and self._tokens[self._place] == token
            self._tokens.append(token)
            if follows:
                self._place += 1
                self.matched = min(self.matched + 1, _LONGEST_MATCH)
            else:
                self._look_up()

    def propose(self, most: int) -> list[int]:
        """The `most` tokens that followed there; a place so near that it runs into the end goes round and round."""
        if not self.matched:
            return []
        draft = self._tokens[self._place : self._place + most]
        period = len(self._tokens) - self._place
        while len(draft) < most:
            draft.append(draft[len(draft) - period])
        return draft

    def _index(self, end: int) -> None:
        for size in _GRAM_SIZES:
            if end >= size:
                self._latest[size][self._key(size)] = end

    def _look_up(self) -> None:
        self.matched = 0
        for size in _GRAM_SIZES:
            if len(self._tokens) > size and (place := self._latest[size].get(self._key(size))) is not None:
                self._place = place
                self.matched = self._match_length(size)
                return

    def _key(self, size: int) -> int:
        key = 0
        for token in self._tokens[-size:]:
            key = key << _TOKEN_BITS | token
        return key

    def _match_length(self, known: int) -> int:
        tokens, end = self._tokens, len(self._tokens)
        while known < min(_LONGEST_MATCH, self._place) and tokens[self._place - known - 1] == tokens[end - known - 1]:
            known += 1
        return known


class DraftLength:
    """How many tokens of a draft are worth verifying, for one sequence.

    A guess's chance is learned by how many tokens matched before it, or by another number from 0 to 16 that says how
    sure it is, with `prior_chances` for each. Guesses copied from the text are compared with what the model writes
    whether or not they were verified, so that learning costs nothing and no pass is spent on trying. A wrong estimate
    is bounded by `spare`, the time drafts may still lose, counted in tokens: it grows by a little with each token and
    by what drafts gained, and no draft is chosen that could lose more."""

    def __init__(self, passes: PassSeconds, prior_chances: Sequence[float] | None = None) -> None:
        self.spare = _SPARE_AT_FIRST
        self._passes = passes
        self._prior_right = [_PRIOR_GUESSES * chance for chance in prior_chances or _PRIOR_CHANCES]
        self._right = list(self._prior_right)
        self._tried = [_PRIOR_GUESSES for _ in self._right]
        self._drafted = 0
        self._other_rows = 0

    def chance(self, matched: int) -> float:
        """How likely the guess after `matched` tokens is right."""
        matched = min(matched, _LONGEST_MATCH)
        return self._right[matched] / self._tried[matched]

    def choose(self, matched: int, most: int, other_rows: int = 0) -> int:
        """The number of tokens, up to `most`, with which the pass is expected to bring most tokens per second."""
        return self.best([self.chance(matched + n) for n in range(most)], other_rows)

    def best(
        self, chances: Sequence[float], other_rows: int = 0, guessing: Callable[[int], float] = lambda drafted: 0.0
    ) -> int:
        """The same for guesses of these chances; `guessing` says the seconds it takes to make so many of them."""
        rows = other_rows + 1
        best, expected, chance = 0, float(rows), 1.0
        best_rate = _PAYS * expected / (self._passes.expect(rows) + guessing(0))
        for drafted, right in enumerate(chances, 1):
            if not self.can_afford(drafted, other_rows, guessing):
                break
            chance *= right
            expected += chance
            rate = expected / (self._passes.expect(rows + drafted) + guessing(drafted))
            if rate > best_rate:
                best, best_rate = drafted, rate
        self._drafted, self._other_rows = best, other_rows
        return best

    def can_afford(self, drafted: int, other_rows: int, guessing: Callable[[int], float]) -> bool:
        """Whether no more may be lost by so many guesses than there is to lose."""
        rows = other_rows + 1
        lost = self._passes.lost_at_most(rows, drafted) + guessing(drafted) / self._passes.expect(rows) * rows
        return lost <= self.spare

    def learn(self, matched: int, right: bool) -> None:
        """Whether the guess after `matched` tokens was right."""
        matched = min(matched, _LONGEST_MATCH)
        keep = _KEPT_OF_CHANCES
        self._right[matched] = keep * self._right[matched] + (1 - keep) * self._prior_right[matched] + right
        self._tried[matched] = keep * self._tried[matched] + (1 - keep) * _PRIOR_GUESSES + 1

    def settle(self, tokens: int, guessing: float = 0.0) -> None:
        """Count what the last choice gained or lost, now that its pass brought `tokens`.

        `guessing` is how many seconds it took to make the guesses."""
        rows = self._other_rows + 1
        gained = min(max(tokens - 1, 0), self._drafted)
        lost = self._passes.lost(rows, self._drafted) + guessing / self._passes.expect(rows) * rows
        self.spare = min(self.spare + _EARNED * tokens + gained - lost, _MOST_SPARE)
        self._drafted = 0


# Measured on edited copies, prose and code: about as if a match of n tokens had been right n times and wrong 3 times.
_PRIOR_CHANCES = [matched / (matched + 3) for matched in range(_LONGEST_MATCH + 1)]


class PassSeconds:
    """Seconds a pass takes by its number of rows: as measured lately, and before that by what it must read.

    `expert_share` is the part of a one-row pass that goes with the distinct experts of a layer, and `row_share` the
    part that goes with rows; the rest is the same for any number. One object serves all sequences of an engine."""

    def __init__(
        self, num_experts: int = 8, experts_per_token: int = 2, *, expert_share: float = 0.9, row_share: float = 0.0
    ) -> None:
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.expert_share, self.row_share = expert_share, row_share
        self._passes = 0
        self._measured: dict[int, _Measured] = {}
        self._rows: list[int] = []
        self._expected: dict[int, float] = {}

    def learn(self, rows: int, seconds: float) -> None:
        """A pass of `rows` took `seconds`, from when its tokens were known until the next ones were."""
        if rows not in self._measured:
            self._measured[rows] = _Measured()
            insort(self._rows, rows)
        known, weight = self._measured[rows], self._weight(rows)
        if weight >= 2:
            seconds = min(seconds, _MOST_TIMES_EXPECTED * known.seconds)  # One stall must not count as ten passes.
        self._passes += 1
        known.seconds += max(1 / (weight + 1), _NEWEST_SHARE) * (seconds - known.seconds)
        known.weight, known.learned_at = min(weight + 1, 1 / _NEWEST_SHARE), self._passes
        self._expected.clear()

    @property
    def is_measured(self) -> bool:
        """Whether `expect` says seconds yet."""
        return bool(self._rows)

    def expect(self, rows: int) -> float:
        """Seconds a pass of `rows` will take; in passes of one row while nothing was measured."""
        if rows not in self._expected:
            self._expected[rows] = self._estimate(rows)
        return self._expected[rows]

    def ratio(self, rows: int) -> float:
        """Seconds of a pass of `rows` to those of one row, by the experts it is expected to need."""
        experts = expected_experts(self.num_experts, self.experts_per_token, rows) / self.experts_per_token
        return 1 + self.expert_share * (experts - 1) + self.row_share * (rows - 1)

    def lost(self, rows: int, drafted: int) -> float:
        """The tokens that passes of `rows` would have brought in the time that `drafted` more rows take."""
        return max(self.expect(rows + drafted) / self.expect(rows) - 1, 0) * rows

    def lost_at_most(self, rows: int, drafted: int) -> float:
        """The same where it was measured; beyond that, as if each row took as long as a pass without drafts."""
        measured = rows + drafted
        while measured > rows and self._weight(measured) < _KNOWN:
            measured -= 1
        return self.lost(rows, measured - rows) + (rows + drafted - measured)

    def _estimate(self, rows: int) -> float:
        place = bisect_left(self._rows, rows)
        weight = self._weight(rows)
        if not place and weight:
            return self._measured[rows].seconds
        if not self._rows:
            return self.ratio(rows)
        nearest = self._rows[max(place - 1, 0)]
        guess = self.expect(nearest) * self.ratio(rows) / self.ratio(nearest)
        if not weight:
            return guess
        # What was measured long ago fades, so that a machine that was busy then gets another try.
        return (weight * self._measured[rows].seconds + _PRIOR_PASSES * guess) / (weight + _PRIOR_PASSES)

    def _weight(self, rows: int) -> float:
        known = self._measured.get(rows)
        return known.weight * _KEPT_OF_SECONDS ** (self._passes - known.learned_at) if known else 0.0


class _Measured:
    """The decayed mean of a pass's seconds, how many passes it stands for, and when the last of them was."""

    def __init__(self) -> None:
        self.seconds, self.weight, self.learned_at = 0.0, 0.0, 0


def expected_experts(num_experts: int, experts_per_token: int, rows: int) -> float:
    """How many distinct experts of a layer `rows` need, if each chooses regardless of the others."""
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** rows)
