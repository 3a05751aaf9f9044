"""A plan keeps to its budget, gives the experts what is left, and refuses exactly what cannot run."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_mlx.budget import (
    LEAST_CHUNK_TOKENS,
    PROCESS_BYTES,
    BudgetError,
    Footprint,
    Plan,
    SizeError,
    Speeds,
    expected_speed,
    fit,
    hit_rate,
    in_gb,
    parse_size,
)
from mixtral_mlx.config import KNOWN, RECIPES, Config, recipe

GB = 10**9
MIB = 1 << 20
MAC = Speeds(3e9, 100e9, 6e12)


def quantized(model: str, name: str) -> Config:
    return replace(KNOWN[model], quantization=recipe(KNOWN[model], name))


@cache
def footprint(model: str = "8x7B", name: str = "q4", dtype: str = "bfloat16", kv_bits: int | None = None) -> Footprint:
    return Footprint.of(quantized(model, name), dtype, kv_bits)


footprints = st.builds(
    footprint, st.sampled_from(list(KNOWN)), st.sampled_from(list(RECIPES)), st.sampled_from(["bfloat16", "float32"])
)
uneven = st.builds(
    lambda sizes, experts, dense: replace(footprint(), expert_bytes=tuple(sizes), experts=experts, dense_bytes=dense),
    st.lists(st.integers(1, 200 * MIB), min_size=1, max_size=60),
    st.integers(2, 16),
    st.integers(0, 3 * GB),
)
budgets = st.integers(1, 200 * GB)
contexts = st.none() | st.integers(2, 32768)


def tried(model: Footprint, budget: int, context: int | None) -> Plan | None:
    try:
        return fit(model, budget, context=context)
    except BudgetError:
        return None


@settings(deadline=None)
@given(footprints | uneven, budgets, contexts)
def test_a_plan_keeps_to_its_budget(model: Footprint, budget: int, context: int | None) -> None:
    plan = tried(model, budget, context)
    if plan:
        assert sum(plan.parts.values()) <= plan.budget_bytes <= budget
        assert plan.cache_limit_bytes == plan.parts["buffer cache"]
        assert all(1 <= slots <= model.experts for slots in plan.slots)
        assert len(plan.slots) == len(model.expert_bytes)
        assert plan.parts["experts"] == sum(n * size for n, size in zip(plan.slots, model.expert_bytes, strict=True))
        assert LEAST_CHUNK_TOKENS <= plan.chunk_tokens <= 2048 or plan.chunk_tokens == plan.context
        assert plan.context == context or context is None


@settings(deadline=None)
@given(footprints | uneven, budgets, contexts)
def test_resident_means_that_everything_fits(model: Footprint, budget: int, context: int | None) -> None:
    plan = tried(model, budget, context)
    if plan:
        assert (plan.mode == "resident") == (plan.parts["experts"] == model.experts_bytes)
        assert (plan.mode == "resident") == (plan.slots_per_layer == model.experts)


@settings(deadline=None)
@given(footprints | uneven, budgets, st.integers(0, 20 * GB), st.integers(2, 32768))
def test_more_memory_never_gives_less(model: Footprint, budget: int, more: int, context: int) -> None:
    less, plan = tried(model, budget, context), tried(model, budget + more, context)
    if less:
        assert plan
        assert (plan.chunk_tokens, sum(plan.slots)) >= (less.chunk_tokens, sum(less.slots))


@settings(deadline=None)
@given(footprints | uneven, contexts)
def test_a_refusal_says_exactly_what_would_do(model: Footprint, context: int | None) -> None:
    with pytest.raises(BudgetError) as caught:
        fit(model, 1, context=context)
    need = caught.value.need_bytes
    assert sum(caught.value.parts.values()) <= need
    assert fit(model, need, context=context)
    assert tried(model, need - MIB, context) is None


def test_a_refusal_names_need_and_have_part_by_part() -> None:
    with pytest.raises(BudgetError) as caught:
        fit(footprint(), 5 * GB, context=16384)
    error = caught.value
    assert error.code == "over_budget"
    assert error.have_bytes == 5 * GB
    assert in_gb(error.need_bytes) in str(error)
    assert "the budget is 5.0 GB" in str(error)
    for word in ("process", "dense", "experts", "kv cache", "working memory", "--context", "--kv-bits", "fewer bits"):
        assert word in error.hint


def test_left_over_slots_go_to_the_first_layers() -> None:
    slots = fit(footprint(), 12 * GB).slots
    assert slots[0] == slots[-1] + 1
    assert list(slots) == sorted(slots, reverse=True)


def test_a_26_gb_model_runs_within_6_gb_and_a_tight_budget_shortens_the_chunk_before_it_refuses() -> None:
    assert 26 * GB < quantized("8x7B", "q4-mini").nbytes() < 27 * GB
    plan = fit(footprint(name="q4-mini"), 6 * GB)
    assert plan.mode == "streamed"
    assert 1 <= plan.slots_per_layer < 2
    assert fit(footprint(name="q4-mini"), 5 * GB).chunk_tokens < 2048


def test_where_all_fits_the_context_is_the_models_own() -> None:
    assert fit(footprint(), 64 * GB).context == 32768
    assert fit(footprint("8x22B"), 128 * GB).context == 65536


def test_a_streamed_models_cache_is_a_fair_share_unless_asked_for() -> None:
    for budget in (6, 9, 12, 16, 20):
        plan = fit(footprint(), budget * GB)
        assert plan.context == 2048 or plan.parts["kv cache"] * 8 <= budget * GB
    assert fit(footprint(), 12 * GB, context=32768).context == 32768


def test_quantized_keys_and_values_leave_room_for_experts() -> None:
    whole, eight, four = (sum(fit(footprint(kv_bits=bits), 12 * GB, context=16384).slots) for bits in (None, 8, 4))
    assert whole < eight < four


def test_an_impossible_context_is_refused_by_number() -> None:
    for context in (1, 32769):
        with pytest.raises(SizeError, match="expected 2 to 32,768"):
            fit(footprint(), 64 * GB, context=context)


def test_the_footprint_is_that_of_the_published_sizes() -> None:
    model = footprint(name="q4-mini")  # 99.1 MB an expert, 131 KB a token, 12.9 B weights active.
    assert set(model.expert_bytes) == {99_090_432}
    assert model.kv_bytes_per_token == 131_072
    assert model.dense_bytes + model.experts_bytes == quantized("8x7B", "q4-mini").nbytes()
    assert 12.4e9 < model.parameters_per_token < 12.9e9


def test_real_sizes_replace_the_implied_ones() -> None:
    config = quantized("8x7B", "q4")
    sizes = {name: 2 * spec.nbytes("bfloat16") for name, spec in config.tensors().items()}
    assert Footprint.of(config, "bfloat16", nbytes=sizes).expert_bytes[0] == 2 * footprint().expert_bytes[0]


def test_what_the_process_takes_can_be_told() -> None:
    assert fit(footprint(), 12 * GB, process_bytes=GB).parts["process"] == GB
    assert fit(footprint(), 12 * GB).parts["process"] == PROCESS_BYTES


# Speed.


def test_hit_rates_are_the_measured_ones_and_lie_between_them_elsewhere() -> None:
    assert [hit_rate(slots, 8) for slots in range(9)] == [0, 0.168, 0.343, 0.468, 0.590, 0.70, 0.81, 0.91, 1.0]
    assert hit_rate(3, 16) == pytest.approx((0.168 + 0.343) / 2)


@settings(deadline=None)
@given(footprints, budgets, st.integers(0, 20 * GB))
def test_more_memory_is_never_expected_to_be_slower(model: Footprint, budget: int, more: int) -> None:
    less, plan = tried(model, budget, 4096), tried(model, budget + more, 4096)
    if less and plan:
        assert expected_speed(plan, model, MAC).decode_tps >= expected_speed(less, model, MAC).decode_tps * (1 - 1e-9)


def test_a_worked_example_of_expected_speed() -> None:
    model = replace(footprint(), dense_bytes=GB, embedding_bytes=0, expert_bytes=(100 * 10**6,) * 32)
    plan = replace(fit(model, 64 * GB), slots=(4,) * 32, chunk_tokens=1000)
    speed = expected_speed(plan, model, MAC)
    assert speed.missed_bytes == pytest.approx(64 * 100e6 * 0.41)  # 64 uses of 100 MB, of which 41 % are not there
    assert speed.read_s == pytest.approx(2.624e9 / 3e9)
    assert speed.compute_s == pytest.approx(7.4e9 / 60e9)
    assert 1 / speed.decode_tps == pytest.approx(0.8747 + 0.1 * 0.1233, rel=1e-3)
    assert speed.chunk_read_s == pytest.approx(32 * 4 * 100e6 / 3e9)


def test_a_resident_model_reads_nothing() -> None:
    model = footprint()
    speed = expected_speed(fit(model, 64 * GB), model, MAC)
    assert (speed.hit_rate, speed.missed_bytes, speed.chunk_bytes) == (1, 0, 0)
    # M2 Max, 400 GB/s: llama.cpp makes 36.7 tokens/s, M1 Ultra, 800: mlx-lm 54.9 (published).
    assert 20 < expected_speed(fit(model, 64 * GB), model, Speeds(6e9, 400e9, 25e12)).decode_tps < 40
    assert 40 < expected_speed(fit(model, 64 * GB), model, Speeds(6e9, 800e9, 25e12)).decode_tps < 80


# Sizes in words.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * GB),
        ("12.5GB", 12_500_000_000),
        ("800MB", 800_000_000),
        ("12GiB", 12 << 30),
        ("1 tb", 10**12),
        ("4096B", 4096),
        (" 16 gb ", 16 * GB),
    ],
)
def test_sizes_are_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_the_gigabytes_of_memory_chips_are_powers_of_two() -> None:
    assert parse_size("16GB", as_chips=True) == parse_size("16GiB", as_chips=True) == 16 << 30


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "8",
        "8 apples",
        "-8GB",
        "1e9GB",
        "8GB,9GB",
        "٨GB",
        "1XB",
        "infGB",
    ],
)
def test_nonsense_is_no_size(text: str) -> None:
    with pytest.raises(SizeError, match="expected a number and a unit") as caught:
        parse_size(text)
    assert caught.value.code == "bad_size"
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("text", ["0GB", "0.4B", "1001TB", "99999999999TB", "9" * 400 + "GB"])
def test_a_size_that_no_memory_has_is_told_what_can_be(text: str) -> None:
    with pytest.raises(SizeError, match="expected more than 0 and at most 1000TB") as caught:
        parse_size(text)
    assert caught.value.code == "bad_size"
    assert len(str(caught.value)) < 150


@given(st.text("0159.,GMKTBib -+e", max_size=12))
def test_any_text_is_a_size_or_a_refusal(text: str) -> None:
    with suppress(SizeError):
        assert parse_size(text) > 0
