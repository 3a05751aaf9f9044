"""Scoring experts: what is kept, what is given up, and how often that turns out right."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_mlx.experts.usage import Usage

from .checkpoints import TINY, write_tiny

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "routing.py"
EXPERTS = 8


@pytest.fixture(scope="module")
def routing() -> Iterator[Any]:
    """benchmarks/routing.py, which is no part of the package."""
    spec = spec_from_file_location("routing", SCRIPT)
    assert spec
    assert spec.loader
    module = sys.modules["routing"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["routing"]


@pytest.fixture(scope="module")
def stats(routing: Any) -> Any:
    """Mixtral's layers 4, 12, 20 and 28: percent of choices, and how much likelier the same is chosen again."""
    popularity = [
        [11.7, 13.1, 11.7, 11.1, 13.5, 12.1, 13.9, 12.9],
        [11.1, 11.9, 12.8, 11.5, 13.5, 17.0, 17.0, 5.1],
        [12.8, 12.4, 14.0, 11.7, 11.0, 12.9, 11.8, 13.4],
        [10.9, 15.3, 13.3, 11.0, 11.8, 12.7, 12.9, 12.0],
    ]
    return routing.Stats(np.array(popularity), np.array([0.111, 0.594, 0.335, 0.173]), 0.4)


def choices(tokens: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.array([random.permutation(EXPERTS)[:2] for _ in range(tokens)]).reshape(tokens, 2)


@pytest.mark.parametrize("tokens", [0, 1, 2, 100, 8192])
def test_a_prompt_counts_as_its_tokens_one_by_one(tokens: int) -> None:
    at_once, one_by_one = Usage(EXPERTS), Usage(EXPERTS)
    for usage in (at_once, one_by_one):
        usage.add([3, 5])
    prompt = choices(tokens)
    at_once.add_prompt(prompt)
    for experts in prompt.tolist():
        one_by_one.add(experts)
    assert at_once.scores == pytest.approx(one_by_one.scores, rel=0, abs=1e-9)
    at_once.add([0, 7])
    one_by_one.add([0, 7])
    assert at_once.scores == pytest.approx(one_by_one.scores, rel=0, abs=1e-9)


def test_a_prompt_in_chunks_counts_as_the_whole() -> None:
    whole, chunks = Usage(EXPERTS), Usage(EXPERTS)
    prompt = choices(1000)
    whole.add_prompt(prompt)
    for start, end in pairwise([0, 1, 300, 300, 1000]):
        chunks.add_prompt(prompt[start:end])
    assert chunks.scores == pytest.approx(whole.scores, rel=0, abs=1e-9)


def test_an_expert_not_used_for_long_is_given_up_before_a_fresh_one() -> None:
    usage = Usage(EXPERTS)
    for _ in range(10):
        usage.add([0, 1])
    for _ in range(100):
        usage.add([2, 3])
    for _ in range(10):
        usage.add([4, 5])
    assert usage.scores[0] < usage.scores[4] < usage.scores[2]


def test_what_is_used_often_outlasts_what_was_used_last() -> None:
    usage = Usage(EXPERTS)
    for _ in range(40):
        usage.add([0, 1])
    usage.add([2, 3])
    assert min(usage.scores[:2]) > max(usage.scores[2:])


def test_between_equals_the_one_just_used_is_kept() -> None:
    usage = Usage(EXPERTS)
    for _ in range(200):
        usage.add([0, 1])
        usage.add([2, 3])
    usage.add([0, 1])
    assert min(usage.scores[:2]) > max(usage.scores[2:4])


def test_a_score_is_about_the_chance_to_be_chosen() -> None:
    usage = Usage(EXPERTS)
    usage.add_prompt(choices(4096))
    assert usage.scores == pytest.approx([2 / EXPERTS] * EXPERTS, abs=0.15)


def test_a_step_of_several_sequences_may_use_any_number_of_experts() -> None:
    usage = Usage(EXPERTS)
    usage.add([])
    usage.add(range(EXPERTS))
    assert len(set(usage.scores)) == 1


def test_after_a_prompt_hits_are_four_points_above_lru_at_four_slots(routing: Any, stats: Any) -> None:
    chosen = routing.traces(stats, sequences=8, tokens=512, seed=2)
    ours, lru = (routing.rates(chosen, EXPERTS, name, prompt=256).by_slots for name in ("ours", "LRU"))
    assert ours[4] >= lru[4] + 0.04
    assert all(ours[slots] >= lru[slots] for slots in ours)


def test_with_spare_slots_hits_are_four_points_above_lru_without_a_prompt(routing: Any, stats: Any) -> None:
    chosen = routing.traces(stats, sequences=8, tokens=256, seed=2)
    ours, lru = (routing.rates(chosen, EXPERTS, name, spare=name == "ours").by_slots for name in ("ours", "LRU"))
    assert ours[4] >= lru[4] + 0.04
    assert all(ours[slots] >= lru[slots] for slots in ours)


@pytest.mark.parametrize("tokens", [64, 1000])
def test_no_length_of_text_falls_behind_lru(routing: Any, stats: Any, tokens: int) -> None:
    chosen = routing.traces(stats, sequences=1024 // tokens + 1, tokens=tokens, seed=4)
    ours, lru = (routing.rates(chosen, EXPERTS, name).by_slots for name in ("ours", "LRU"))
    assert all(ours[slots] >= lru[slots] for slots in ours)


def test_nobody_beats_belady(routing: Any, stats: Any) -> None:
    chosen = routing.traces(stats, sequences=1, tokens=256, seed=5)
    for spare in (False, True):
        best = routing.rates(chosen, EXPERTS, "Belady", spare=spare).by_slots
        for name in ("LRU", "LFU", "ours"):
            rates = routing.rates(chosen, EXPERTS, name, spare=spare).by_slots
            assert all(rates[slots] <= best[slots] for slots in rates)


def test_lru_finds_what_a_worked_example_says(routing: Any) -> None:
    chosen = np.array([[[0, 1], [0, 2], [3, 0], [1, 2]]])
    assert routing.replay(chosen, routing.LeastRecent(EXPERTS), slots=[2, 3]) == [2, 3]


def test_a_prompt_leaves_what_the_policy_scores_highest(routing: Any) -> None:
    chosen = np.array([[[0, 1], [2, 3], [2, 3]]])
    assert routing.replay(chosen, routing.LeastRecent(EXPERTS), slots=[2, 4], prompt=2) == [2, 2]


@pytest.mark.parametrize("recall", [(0.96, 0.85), (1, 0.5)])
def test_guesses_come_true_as_often_as_asked_and_clear_ones_more_often(
    routing: Any, stats: Any, recall: tuple[float, float]
) -> None:
    chosen = routing.traces(stats, sequences=8, tokens=512, seed=7)
    logits = routing.guesses(chosen, EXPERTS, recall, seed=0)
    right = np.argsort(-logits, -1)[..., :2] == chosen
    assert right.mean((0, 1, 2)) == pytest.approx(recall, abs=0.02)
    ranked = -np.sort(-logits, -1)
    clear = ranked[..., 1] - ranked[..., 2] > 0.4
    assert right[..., 1][clear].mean() > right[..., 1][~clear].mean()


@pytest.mark.parametrize("slots", [2, 4])
def test_a_model_finds_as_many_experts_as_the_simulation(routing: Any, stats: Any, tmp_path: Path, slots: int) -> None:
    folder = write_tiny(tmp_path / "model", replace(TINY, num_hidden_layers=4), tokenizer=None)
    chosen = routing.traces(stats, sequences=1, tokens=96, seed=6)
    simulated = routing.rates(chosen, EXPERTS, "ours", prompt=64).by_slots
    run = routing.drive(folder, chosen, slots, prompt=64)
    # Threads may finish reading a prompt's experts in another order, which leaves another one in some layer's slots.
    assert run.hit_rate == pytest.approx(simulated[slots], abs=0.03)
    assert run.named_ahead == run.begun_before == 0


def test_a_model_told_the_truth_about_the_next_layer_reads_ahead_nothing_in_vain(
    routing: Any, stats: Any, tmp_path: Path
) -> None:
    folder = write_tiny(tmp_path / "model", replace(TINY, num_hidden_layers=4), tokenizer=None)
    chosen = routing.traces(stats, sequences=1, tokens=96, seed=6)
    run = routing.drive(folder, chosen, 4, 64, [routing.guesses(chosen, EXPERTS, (1, 1), seed=0)])
    assert run.named_ahead > 0
    assert run.came_true == 1
    assert run.begun_before >= run.there_before
