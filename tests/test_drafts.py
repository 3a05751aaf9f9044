"""Drafts copied from the text so far: what is proposed, how much of it, and what it can cost at most."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_mlx.engine.drafts import DraftLength, Drafts, PassSeconds, Speculation, expected_experts

COSTS: dict[str, Callable[[int], float]] = {
    "resident, CPU": lambda rows: 0.1 + 0.9 * rows,
    "resident, flat GPU": lambda rows: 1 + 0.02 * (rows - 1),
    "resident, bound by bandwidth": lambda rows: 0.12 + 0.44 * expected_experts(8, 2, rows),
    "streamed": lambda rows: 0.02 + 0.49 * expected_experts(8, 2, rows),
}
ACCEPTANCES: dict[str, Callable[[int], float]] = {
    "never": lambda place: 0,
    "sometimes": lambda place: 0.3,
    "mostly": lambda place: 0.9,
    "in turns": lambda place: 0.95 if place // 100 % 2 == 0 else 0,
}


def naive_place(tokens: Sequence[int]) -> int | None:
    """Where what followed is read from, found by searching all of the text again for each of its beginnings."""
    place: int | None = None
    for end in range(1, len(tokens) + 1):
        if place is not None and tokens[place] == tokens[end - 1]:
            place += 1
            continue
        ends = [(size, at) for size in (3, 2) for at in range(end - 1, size - 1, -1) if end >= size]
        place = next((at for size, at in ends if tokens[at - size : at] == tokens[end - size : end]), None)
    return place


def naive_draft(tokens: list[int], most: int) -> list[int]:
    place = naive_place(tokens)
    if place is None:
        return []
    text = list(tokens)
    for step in range(most):
        text.append(text[place + step])
    return text[len(tokens) :]


@given(st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=9), st.integers(0, 12))
def test_a_draft_is_what_a_naive_search_finds_however_the_text_was_added(parts: list[list[int]], most: int) -> None:
    tokens = [token for part in parts for token in part]
    drafts = Drafts()
    for part in parts:
        drafts.add(part)
    assert drafts.propose(most) == Drafts(tokens).propose(most) == naive_draft(tokens, most)


@given(st.lists(st.integers(0, 2), max_size=60))
def test_matched_counts_the_equal_tokens_before_the_place(tokens: list[int]) -> None:
    place = naive_place(tokens)
    equal = 0
    while place is not None and equal < min(16, place) and tokens[place - equal - 1] == tokens[-equal - 1]:
        equal += 1
    assert Drafts(tokens).matched == equal


@pytest.mark.parametrize(("text", "expected"), [("aaa", "aaaaaa"), ("abab", "ababab"), ("xabcabc", "abcabc")])
def test_a_loop_goes_round_and_round(text: str, expected: str) -> None:
    assert Drafts(map(ord, text)).propose(6) == list(map(ord, expected))


def test_nothing_is_proposed_for_a_text_that_says_nothing_twice() -> None:
    assert Drafts().propose(8) == Drafts([7]).propose(8) == Drafts(range(100)).propose(8) == []


def test_a_copy_is_followed_through_a_place_that_a_later_text_says_otherwise() -> None:
    original, elsewhere = [1, 2, 3, 4, 5, 6, 7, 8, 9], [40, 4, 5, 6, 41]
    assert Drafts([*original, *elsewhere, 1, 2, 3, 4, 5, 6]).propose(3) == [7, 8, 9]


def test_an_edited_copy_takes_few_passes() -> None:
    original = random.Random(0).choices(range(1000), k=400)
    edited = [token if place % 50 else 5000 + place for place, token in enumerate(original)]
    text, passes = write(edited, original, COSTS["resident, flat GPU"], PassSeconds())
    assert text == edited
    assert passes < len(edited) / 4


def test_free_text_is_written_without_drafts() -> None:
    free = random.Random(0).choices(range(30), k=600)
    text, passes = write(free, [], COSTS["streamed"], PassSeconds())
    assert text == free
    assert passes > 0.98 * len(free)


def write(
    answer: list[int], prompt: list[int], seconds: Callable[[int], float], passes: PassSeconds
) -> tuple[list[int], int]:
    """What a model that wants to write `answer` does write, and in how many passes."""
    speculation, written, count = Speculation(prompt, passes), list[int](), 0
    while len(written) < len(answer):
        draft = speculation.draft(15)
        rest = answer[len(written) :]
        right = next((n for n, (a, b) in enumerate(zip(draft, rest, strict=False)) if a != b), len(draft))
        passes.learn(1 + len(draft), seconds(1 + len(draft)))
        new = rest[: right + 1]
        speculation.add(new)
        written += new
        count += 1
    return written, count


def speed(
    seconds: Callable[[int], float],
    acceptance: Callable[[int], float],
    tokens: int,
    seed: int,
    passes: PassSeconds | None = None,
) -> float:
    """How many times as fast as without drafts `tokens` come, if guesses are right as often as `acceptance` says."""
    random_ = random.Random(seed)
    passes = passes or PassSeconds()
    length, done, took, matched = DraftLength(passes), 0, 0.0, 0
    while done < tokens:
        drafted = length.choose(matched, 15) if matched else 0
        noisy = seconds(1 + drafted) * random_.uniform(0.95, 1.05)
        took += noisy
        passes.learn(1 + drafted, noisy)
        before = done
        while done <= before + drafted:
            right = matched > 0 and random_.random() < acceptance(done)
            if matched:
                length.learn(matched, right)
            matched = min(matched + 1, 16) if right else random_.choice([0, 0, 2, 3, 4])
            done += 1
            if not right:
                break
        length.settle(done - before)
    return done * seconds(1) / took


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("cost", COSTS)
def test_drafts_never_cost_a_twentieth_of_the_speed(cost: str, acceptance: str) -> None:
    speeds = [speed(COSTS[cost], ACCEPTANCES[acceptance], 200, seed) for seed in range(10)]
    assert min(speeds) >= 0.95


@pytest.mark.parametrize("tokens", [20, 50, 500])
def test_even_where_a_row_takes_as_long_as_two_passes_the_loss_is_bounded(tokens: int) -> None:
    def awful(rows: int) -> float:
        return 1 + 2 * (rows - 1)

    for seed in range(10):
        lost = tokens / speed(awful, ACCEPTANCES["mostly"], tokens, seed) - tokens
        assert lost <= 2 + 0.04 * tokens  # The first draft may cost twice what was thought possible.


@pytest.mark.parametrize(("cost", "expected"), [("resident, flat GPU", 4), ("streamed", 1.3), ("resident, CPU", 0.98)])
def test_drafts_pay_where_guesses_are_mostly_right(cost: str, expected: float) -> None:
    speeds = [speed(COSTS[cost], ACCEPTANCES["mostly"], 1000, seed) for seed in range(5)]
    assert sum(speeds) / len(speeds) >= expected


def test_a_second_sequence_profits_from_the_seconds_a_first_one_measured() -> None:
    cost, acceptance = COSTS["resident, bound by bandwidth"], ACCEPTANCES["mostly"]
    passes = PassSeconds()
    alone = [speed(cost, acceptance, 100, seed, PassSeconds()) for seed in range(5)]
    after = [speed(cost, acceptance, 100, seed, passes) for seed in [9, *range(5)]][1:]
    assert sum(after) > 1.1 * sum(alone)


def test_drafts_return_when_a_busy_machine_is_free_again() -> None:
    passes = PassSeconds()
    busy, free = (lambda rows: 1 + 3.0 * (rows - 1)), COSTS["resident, flat GPU"]
    assert speed(busy, ACCEPTANCES["mostly"], 500, 0, passes) < 1.05
    speed(free, ACCEPTANCES["mostly"], 3000, 1, passes)
    assert speed(free, ACCEPTANCES["mostly"], 500, 2, passes) > 2


def test_one_stall_does_not_count_as_ten_passes() -> None:
    passes = PassSeconds()
    for _ in range(10):
        passes.learn(1, 0.01)
    passes.learn(1, 5.0)
    assert passes.expect(1) < 0.02


@pytest.mark.parametrize(("cost", "pays"), [("resident, CPU", False), ("resident, flat GPU", True)])
def test_rows_beside_other_sequences_are_drafted_only_where_the_whole_pass_profits(cost: str, pays: bool) -> None:
    passes = PassSeconds()
    for rows in range(1, 20):
        passes.learn(rows, COSTS[cost](rows))
    assert (DraftLength(passes).choose(16, 8, other_rows=7) > 0) == pays


def test_no_more_is_drafted_than_may_be_lost() -> None:
    length = DraftLength(PassSeconds(expert_share=0, row_share=0.01))
    first = length.choose(16, 15)
    length.settle(1)
    assert first == 1  # Nothing was measured, so a row may take as long as a pass, and one is all there is to lose.
    assert length.spare == pytest.approx(1 + 0.03 - 0.01)


def test_expected_experts_are_those_of_a_worked_example() -> None:
    assert expected_experts(8, 2, 1) == pytest.approx(2)
    assert expected_experts(8, 2, 2) == pytest.approx(3.5)
    assert expected_experts(8, 2, 1000) == pytest.approx(8)


def test_before_anything_is_measured_a_pass_takes_what_its_experts_do() -> None:
    passes = PassSeconds(8, 2, expert_share=1)
    assert passes.expect(2) / passes.expect(1) == pytest.approx(1.75)
    passes.learn(1, 0.2)
    assert passes.expect(2) == pytest.approx(0.35)
