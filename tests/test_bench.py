"""The benchmark: its arithmetic, its turns, its processes and what comes of them when they fail, its reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mixtral_mlx import cli
from mixtral_mlx.bench import commands, floor, limits, sides, table, worker
from mixtral_mlx.bench.commands import Request
from mixtral_mlx.bench.limits import Limits
from mixtral_mlx.bench.page import html
from mixtral_mlx.bench.process import SideError, Streamed, Worker
from mixtral_mlx.bench.report import Measure, PerToken, Report, entry, per_token, read
from mixtral_mlx.bench.rows import Row, all_rows, left_out, shortened
from mixtral_mlx.bench.sides import Side
from mixtral_mlx.bench.turns import Events, Measured, Outcome, Plan, Samples, run
from mixtral_mlx.budget import BudgetError, fit
from mixtral_mlx.config import Config
from mixtral_mlx.weights import Checkpoint, footprint, locate
from mixtral_mlx.writing import WriteError, write_output

from .checkpoints import TINY, write_tiny

LIMITS = Limits("cpu", "float32", bytes_per_s=1e9, operations_per_s=1e10)
DEMO = locate(None)
PROMPT, DECODE = Row("prompt", "prompt", "prompt", "tok/s", 512), Row("decode", "decode", "decode", "tok/s", 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def _no_model_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXTRAL_MLX_MODEL", raising=False)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "asked"


def scripted(name: str, log: Path, habit: str = "", *, first: tuple[str, ...] | None = None) -> Side:
    script = str(Path(__file__).with_name("scripted_worker.py"))
    return Side(name, (sys.executable, script, name, str(log), habit), first)


def asked(log: Path) -> list[str]:
    return [line.strip() for line in log.read_text().splitlines() if " starts " not in line]


def run_turns(two: list[Side], rows: list[Row], *, turns: int = 2, seconds: float = 100, **how: Any) -> Outcome:
    return run(two, rows, Plan(DEMO, TINY, turns, seconds, **how))


# The floor. The demo model has 4 layers, 256 wide, 4 heads of 64 and 2 for keys and values, 8 experts of 192 of which 2
# are chosen, and 32,000 words whose embedding is also the head. Four bits and a float32 scale and bias for every 64
# weights are 40 / 64 bytes a weight, the router's eight bits 72 / 64.


@pytest.fixture(scope="module")
def demo() -> floor.Weighed:
    return floor.weigh(Checkpoint.open(DEMO))


def test_weights_are_weighed_by_how_often_a_token_needs_them(demo: floor.Weighed) -> None:
    attention = 2 * 256 * 256 + 2 * 128 * 256
    assert demo.expert == floor.Part(4 * 3 * 256 * 192 * 40 / 64, 4 * 3 * 256 * 192)
    assert demo.head == demo.embedding == floor.Part(32000 * 256 * 40 / 64, 32000 * 256)
    norms = (2 * 4 + 1) * 256 * 4
    assert demo.dense == floor.Part(4 * (attention * 40 / 64 + 8 * 256 * 72 / 64) + norms, 4 * (attention + 8 * 256))
    assert demo.nbytes == Checkpoint.open(DEMO).nbytes == 8_579_072


def test_the_floor_of_a_step_is_what_it_must_read_and_do(demo: floor.Weighed) -> None:
    step = floor.decode_step(demo, context=0, batch=1, steps=1, dtype="float32")
    # The step that is not timed and the timed one: two tokens in the cache of 4,096 bytes each.
    assert step.nbytes == 5_120_000 + 509_952 + 2 * 368_640 + 2 * 4096 == 6_375_424
    assert step.operations == 2 * (794_624 + 8_192_000 + 2 * 589_824) + 4 * 4 * 4 * 64 * 2 == 20_340_736
    # At 1 GB/s reading takes 6.4 ms, at 10 G operations/s computing takes 2 ms: reading is the floor.
    assert step.seconds(LIMITS) == pytest.approx(0.006375424)


def test_a_batch_reads_as_many_experts_as_it_can_be_expected_to_choose(demo: floor.Weighed) -> None:
    assert floor.distinct_experts(demo.config, 1) == 2
    assert floor.distinct_experts(demo.config, 4) == 8 * (1 - 0.75**4) == 5.46875
    one, four = (floor.decode_step(demo, context=100, batch=b, steps=1, dtype="float32") for b in (1, 4))
    assert four.nbytes - one.nbytes == 3.46875 * 368_640 + 3 * 102 * 4096
    assert four.operations == 4 * one.operations


def test_the_floor_of_a_prompt_reads_all_weights_once(demo: floor.Weighed) -> None:
    prompt = floor.prompt(demo, 32)
    assert prompt.nbytes == demo.nbytes
    seen = 32 * 33 // 2
    assert prompt.operations == 2 * (32 * (794_624 + 2 * 589_824) + 8_192_000) + 4 * 4 * 4 * 64 * seen == 144_900_096
    assert prompt.seconds(LIMITS) == pytest.approx(0.0144900096)


def test_a_quantized_cache_is_read_with_its_scales(demo: floor.Weighed) -> None:
    assert floor.kv_bytes(demo.config, None, "float32") == 2 * 4 * 2 * 64 * 4
    assert floor.kv_bytes(demo.config, 8, "float32") == 2 * 4 * 2 * (64 + 2 * 4)
    assert floor.kv_bytes(demo.config, 4, "bfloat16") == 2 * 4 * 2 * (32 + 2 * 2)


def test_an_embedding_that_is_no_head_is_read_by_the_row() -> None:
    weights = {name: spec.nbytes("float32") for name, spec in TINY.tensors().items()}
    model = floor.weighed(TINY, weights)
    row = 64 * 4
    assert model.nbytes == sum(weights.values())
    assert floor.prompt(model, 16).nbytes == model.nbytes - 32000 * row + 16 * row


def test_a_window_limits_what_a_token_sees(demo: floor.Weighed) -> None:
    windowed = replace(demo, config=replace(demo.config, sliding_window=10))
    steps = [floor.decode_step(windowed, context=c, batch=1, steps=1, dtype="float32") for c in (50, 500)]
    assert steps[0] == steps[1]
    in_window = 10 * 11 // 2 + 22 * 10
    full = floor.prompt(demo, 32).operations - floor.prompt(windowed, 32).operations
    assert full == 4 * 4 * 4 * 64 * (32 * 33 // 2 - in_window)


def test_limits_are_measured_on_this_machine() -> None:
    found = limits.on_cpu(read_bytes=1 << 22, side=64, times=1)
    assert (found.device, found.dtype) == ("cpu", "float32")
    assert found.bytes_per_s > 1e6
    assert found.operations_per_s > 1e6
    assert limits.on_gpu("float32", read_bytes=1 << 20, side=64, times=1).bytes_per_s > 1e5


# Rows.


def test_rows_come_in_order_and_by_group() -> None:
    assert [row.name for row in all_rows(("memory", "load"))] == ["load, cold", "load, warm", "peak memory"]
    assert [row.tokens for row in all_rows(("prompt",))] == [32, 512, 2048, 8192]
    assert [row.context for row in all_rows(("decode",))] == [0, 2048, 8192]
    assert [(row.batch, row.context) for row in all_rows(("batch",))][3:5] == [(16, 0), (1, 128)]
    assert [row.kv_bits for row in all_rows(("kv",))] == [8, 4]
    assert len({row.name for row in all_rows()}) == len(all_rows())


def test_rows_a_model_has_no_room_for_are_left_out_with_the_reason() -> None:
    config = Config.read(DEMO)
    reasons = {row.name: left_out(row, config) for row in all_rows()}
    assert reasons["prompt of 512"] == reasons["decode, context 0"] == reasons["peak memory"] == ""
    assert reasons["prompt of 2,048"] == reasons["8-bit cache, context 2,048"] == "this model's context is 1,024"
    assert left_out(all_rows(("kv",))[0], replace(TINY, max_position_embeddings=9999)) == (
        "heads 16 wide cannot be quantized"
    )


@pytest.mark.parametrize(
    ("tokens", "each", "seconds", "least", "expected"),
    [(512, 0.01, 20, 16, 512), (8192, 0.01, 20, 16, 2000), (2048, 5, 20, 16, 16), (64, 30, 20, 1, 1), (8, 9, 1, 16, 8)],
)
def test_a_row_that_takes_too_long_is_shortened(
    tokens: int, each: float, seconds: float, least: int, expected: int
) -> None:
    assert shortened(tokens, each, seconds, least) == expected


# Turns.


def test_sides_take_turns_within_each_row(log: Path) -> None:
    outcome = run_turns([scripted("a", log), scripted("b", log)], [PROMPT])
    # A warm-up each, another for the speed, then A B A B.
    warm = ["a prompt 16", "a prompt 16"], ["b prompt 16", "b prompt 16"]
    assert asked(log) == [*warm[0], "a prompt 512", *warm[1], "b prompt 512", "a prompt 512", "b prompt 512"]
    assert outcome.measured[0].samples["a"] == Samples((5.12, 5.12), 512)
    assert not outcome.interrupted


def test_prompts_are_shortened_by_the_speed_of_those_before(log: Path) -> None:
    outcome = run_turns([scripted("a", log)], [replace(PROMPT, tokens=32), PROMPT, DECODE], turns=1, seconds=3)
    assert [m.samples["a"].tokens for m in outcome.measured] == [32, 300, 64]
    outcome = run_turns([scripted("a", log)], [PROMPT, DECODE, replace(DECODE, batch=16)], turns=1, seconds=0.1)
    assert [m.samples["a"].tokens for m in outcome.measured] == [16, 5, 1]


def test_loads_and_memory_are_of_fresh_processes(log: Path) -> None:
    rows = all_rows(("load", "memory"))
    outcome = run_turns([scripted("a", log)], rows)
    assert [m.samples["a"].values for m in outcome.measured] == [(0.5, 0.5), (0.5, 0.5), (1000, 1000)]
    starts = [line.split()[2] for line in log.read_text().splitlines() if "starts" in line]
    assert len(set(starts)) == 4 + 1 + 2  # One more to learn the speed of prompts.


def test_where_models_do_not_fit_together_only_one_is_in_memory(log: Path) -> None:
    run_turns([scripted("a", log), scripted("b", log)], [PROMPT], keep_all=False)
    starts = [line.split()[0] for line in log.read_text().splitlines() if "starts" in line]
    assert starts == ["a", "b", "a", "b"]


def test_the_first_token_is_the_command_lines_or_a_workers(log: Path) -> None:
    row = all_rows(("first",))
    says = scripted("a", log, first=(sys.executable, "-c", "print('Paris')"))
    (measured,) = run_turns([says, scripted("b", log)], row, turns=1).measured
    assert 0 < measured.samples["a"].values[0] < 60
    assert measured.samples["b"] == Samples((), 0, "first words are never easy")
    headed = replace(says, first=(sys.executable, "-c", "print('==')"), header="=\n")
    (measured,) = run_turns([headed], row, turns=1).measured
    assert measured.samples["a"].reason == "a ended without a token"
    fails = replace(says, first=(sys.executable, "-c", "exit('no tokenizer')"))
    (measured,) = run_turns([fails], row, turns=1).measured
    assert measured.samples["a"].reason == "a ended without a token: no tokenizer"


def test_a_worker_that_prints_is_understood_all_the_same(log: Path) -> None:
    (measured,) = run_turns([scripted("a", log, "prints")], [DECODE], turns=1).measured
    assert measured.samples["a"].values == (0.02 * 64,)


def test_what_libraries_print_does_not_reach_the_answers(folder: Path) -> None:
    noisy = "import os, sys; from mixtral_mlx.bench import worker\nfd = worker.protected_stdout()\n"
    noisy += "print('noise', flush=True); os.system('echo noise'); print('{\"answer\": 1}', file=fd, flush=True)"
    done = subprocess.run([sys.executable, "-c", noisy], capture_output=True, text=True)
    assert done.stdout == '{"answer": 1}\n'
    assert done.stderr.count("noise") == 2


@pytest.mark.parametrize("engine", [worker.Ours, worker.MlxLm])
def test_both_engines_answer_every_request(engine: Callable[[Path, str], worker.Engine]) -> None:
    side = engine(DEMO, "float32")
    decode = {"op": "decode", "tokens": 2, "kv_bits": None}
    for request in (
        {"op": "prompt", "tokens": 16},
        {**decode, "context": 0, "batch": 1},
        {**decode, "context": 5, "batch": 2},
        {**decode, "context": 5, "batch": 1, "kv_bits": 8},
    ):
        assert 0 < worker.answer(side, request)["seconds"] < 60
    assert worker.answer(side, {"op": "memory"})["peak_bytes"] > 1e6
    assert "command line" in worker.answer(side, {"op": "first", "prompt": "x"})["unsupported"]


@pytest.fixture(scope="module")
def streamed() -> Iterator[worker.Ours]:
    """The demo model with an expert or two of each layer in memory."""
    with pytest.raises(BudgetError) as refused:
        fit(footprint(Checkpoint.open(DEMO), "float32", None), 1 << 20)
    side = worker.Ours(DEMO, "float32", refused.value.need_bytes + (1 << 20))
    assert side.streaming
    yield side
    side.streaming.close()


@pytest.mark.parametrize(("context", "batch"), [(0, 1), (5, 1), (5, 2)])
def test_a_streamed_side_says_what_the_steps_it_timed_took(streamed: worker.Ours, context: int, batch: int) -> None:
    assert streamed.memory
    assert streamed.memory["mode"] == "streamed"
    assert max(streamed.plan.slots) < 8
    said = worker.answer(streamed, {"op": "decode", "tokens": 3, "kv_bits": None, "context": context, "batch": batch})
    took = said["streamed"]
    assert 0 < took["stall_s"] < said["seconds"]
    assert took["bytes_read"] > 0
    # Two experts of each of the four layers in each of the three steps, and no other step's.
    least, most = 3 * 4 * 2, 3 * 4 * 2 * batch
    assert least <= took["hits"] + took["misses"] <= most


def test_a_row_that_has_no_room_in_the_budget_says_so(streamed: worker.Ours) -> None:
    decode = {"op": "decode", "tokens": 1, "kv_bits": None, "batch": 9999}
    said = worker.answer(streamed, {**decode, "context": 900})
    assert "its cache takes 36.9 GB, the budget has room for" in said["unsupported"]


def test_a_budget_is_for_our_side_on_both_of_its_command_lines(tmp_path: Path) -> None:
    with_budget, without = sides.ours(tmp_path, "auto", 450_000_000), sides.ours(tmp_path, "auto")
    assert with_budget.first
    assert without.first
    assert with_budget.worker == (*without.worker, "450000000")
    assert with_budget.first == (*without.first, "--memory", "429MiB")


def test_a_side_that_dies_leaves_a_reason_and_is_started_again(log: Path) -> None:
    two = [scripted("a", log), scripted("b", log, "dies")]
    first, second, third = run_turns(two, [DECODE, PROMPT, DECODE], turns=1).measured
    assert first.samples["b"] == Samples((), 0, "b ended with exit code 1: out of something")
    assert second.samples["b"].values == (5.12,)
    assert third.samples["b"].reason == first.samples["b"].reason
    assert all(m.samples["a"].values for m in (first, second, third))


def test_another_side_that_cannot_load_is_asked_once_and_ours_is_an_error(log: Path) -> None:
    two = [scripted("a", log), scripted("b", log, "cannot load")]
    measured = run_turns(two, [PROMPT, DECODE], turns=1).measured
    assert [m.samples["b"].reason for m in measured] == ["The model is too large"] * 2
    with pytest.raises(SideError) as caught:
        run_turns(two[::-1], [PROMPT])
    assert (caught.value.code, caught.value.hint) == ("too_large", "Use a smaller one.")
    with pytest.raises(SideError) as caught:
        Worker("c", scripted("c", log, "never answers").worker)
    assert (caught.value.code, str(caught.value)) == (
        "side_died",
        "c ended with exit code 1: No module named engine",
    )
    with pytest.raises(SideError, match="c cannot be started"):
        Worker("c", ["/nowhere/engine"])


def test_no_process_outlives_an_interrupted_run(log: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    two = [scripted("a", log), scripted("b", log)]
    outcome = run(two, [PROMPT, DECODE], Plan(DEMO, TINY, 2, 100), Events(progress=stop))
    assert outcome.interrupted
    assert [len(m.samples["a"].values) for m in outcome.measured] == [2, 1]
    for line in log.read_text().splitlines():
        if " starts " in line:
            with pytest.raises(ProcessLookupError):
                os.kill(int(line.split()[2]), 0)


# Reports.


def figures(row: Row, a: tuple[float, ...], b: tuple[float, ...], demo: floor.Weighed, tokens: int = 10) -> Any:
    measured = Measured(row, {"a": Samples(a, tokens), "b": Samples(b, tokens)})
    return entry(measured, Measure(demo, LIMITS, {"a": "float32", "b": "float32"}))


def test_figures_are_medians_with_spread_and_ratio(demo: floor.Weighed) -> None:
    found = figures(replace(DECODE, batch=2), (1, 4, 2), (8, 8, 10), demo)
    a, b = found.figures["a"], found.figures["b"]
    assert (a.median, a.lowest, a.highest, a.values) == (10, 5, 20, (20, 5, 10))
    assert (b.median, found.ratio) == (2.5, 4)
    assert (a.tokens, a.shortened) == (10, 10)
    step = floor.decode_step(demo, context=0, batch=2, steps=10, dtype="float32")
    assert a.floor_share == pytest.approx(step.seconds(LIMITS) / 0.2)
    assert a.operations_per_s == pytest.approx(step.operations / 0.2)
    assert a.bytes_per_token == step.nbytes / 2


def test_the_share_of_the_floor_is_of_time_and_for_memory_of_bytes(demo: floor.Weighed) -> None:
    prompt = figures(PROMPT, (1.0,), (2.0,), demo, tokens=32).figures
    assert prompt["a"].floor_share == pytest.approx(0.0144900096)
    assert prompt["b"].floor_share == pytest.approx(0.0072450048)
    memory, warm, cold = (Row("", "", kind, unit, cold=cold) for kind, unit, cold in _OTHER_KINDS)
    assert figures(memory, (2 * demo.nbytes,), (1.0,), demo).figures["a"].floor_share == 0.5
    assert figures(warm, (1.0,), (1.0,), demo).figures["a"].floor_share == pytest.approx(0.008579072)
    assert figures(cold, (1.0,), (1.0,), demo).figures["a"].floor_share is None


def test_what_streaming_took_is_shared_among_the_tokens_of_all_turns() -> None:
    turn = Streamed(hits=30, misses=10, ahead_reads=4, ahead_used=3, bytes_read=8e6, io_s=0.2, stall_s=0.1)
    other = replace(turn, hits=10, misses=30, bytes_read=24e6)
    expected = PerToken(hit_rate=0.5, bytes_read=3.2e6, io_s=0.04, stall_s=0.02, guesses_true=0.75)
    assert per_token((turn, other), tokens=5) == expected
    assert per_token((), tokens=5) is None
    nothing = per_token((Streamed(0, 0, 0, 0, 0, 0, 0),), tokens=5)
    assert nothing == PerToken(None, 0, 0, 0, None)


_OTHER_KINDS = (("memory", "bytes", False), ("load", "s", False), ("load", "s", True))


def bench_scripted(monkeypatch: pytest.MonkeyPatch, log: Path, *habits: str) -> None:
    """Let `bench` measure scripted sides: ours with the first habit, mlx-lm with the second."""
    monkeypatch.setattr(limits, "measure", lambda dtype: LIMITS)
    monkeypatch.setattr(commands, "ours", lambda folder, dtype, memory: scripted("mixtral-mlx", log, habits[0]))
    monkeypatch.setitem(sides.OTHERS, "mlx-lm", lambda folder, dtype: scripted("mlx-lm", log, habits[-1]))


def test_the_table_says_what_was_shortened_and_left_out(monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    bench_scripted(monkeypatch, log, "", "dies")
    request = Request(None, "mlx-lm", turns=2, seconds=3, groups=("prompt", "decode"))
    lines = commands.bench(request, quiet=True).text.splitlines()
    row = next(line for line in lines if line.startswith("prompt of 512"))
    assert " ".join(row.split()) == "prompt of 512 tok/s 100* 0 % 4.6 % 100* 0 % 4.6 % 28.6 kB 1.00"
    assert "- prompt of 2,048; prompt of 8,192; decode, context 2,048; decode, context 8,192: this model's" in str(
        lines
    )
    assert "- decode, context 0 (mlx-lm): mlx-lm ended with exit code 1: out of something" in lines
    assert any("* shortened to fit the time: prompt of 512: 300 and 300 tokens" in s for s in lines)
    assert max(len(line) for line in lines if not line.startswith("- ")) < 130


def test_under_a_budget_the_report_says_what_each_token_took(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, log: Path, tmp_path: Path
) -> None:
    bench_scripted(monkeypatch, log, "streams", "")
    page = tmp_path / "run.html"
    line = f"bench --model demo --memory 400MB --vs mlx-lm --rows decode,memory --turns 2 --quiet --output {page}"
    assert cli.main(line.split()) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "mixtral-mlx within 400.0 MB: streamed, 5.25 experts of each layer in memory" in lines
    assert "decode, context 0 mixtral-mlx 75 % 2 MB 4.00 ms 1.00 ms 50 %" in lines
    assert "- mlx-lm has no option for a budget: it runs as it is" in lines
    assert "- peak memory: mixtral-mlx may use 400 MB" in lines
    assert "<td>75 %</td><td>2 MB</td><td>4.00 ms</td>" in page.read_text()
    assert _Page(page.read_text()).open == []


def test_a_streamed_side_is_not_held_against_a_floor_of_weights_in_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, log: Path
) -> None:
    bench_scripted(monkeypatch, log, "streams", "")
    line = "bench --model demo --memory 400MB --vs mlx-lm --rows load,decode,memory --turns 1 --quiet --json"
    assert cli.main(line.split()) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row["figures"] for row in found["rows"]}
    for name in ("load, warm", "decode, context 0", "peak memory"):
        assert rows[name]["mixtral-mlx"]["floor_share"] is None
        assert rows[name]["mlx-lm"]["floor_share"] > 0
    assert any(note.startswith("mixtral-mlx has no share of a floor") for note in found["notes"])
    took = {"hit_rate": 0.75, "bytes_read": 2e6, "io_s": 0.004, "stall_s": 0.001, "guesses_true": 0.5}
    assert rows["decode, context 0"]["mixtral-mlx"]["streamed"] == pytest.approx(took)
    assert rows["decode, context 0"]["mlx-lm"]["streamed"] is None
    memory = {"mode": "streamed", "budget_bytes": 400_000_000, "slots_per_layer": 5.25}
    assert [side["memory"] for side in found["sides"]] == [memory, None]
    assert found["settings"]["memory_bytes"] == 400_000_000


def test_a_side_that_says_nonsense_of_its_streaming_is_no_figure(log: Path) -> None:
    (measured,) = run_turns([scripted("a", log, "streams badly")], [DECODE], turns=1).measured
    assert measured.samples["a"].reason == "a answered decode with streamed {'hits': 'many'}"


def test_a_budget_that_cannot_be_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "measure", lambda *_, **__: pytest.fail("measured"))
    assert cli.main(["bench", "--model", "demo", "--memory", "100MB"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error[over_budget]: This model needs at least ")
    assert out == ""


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (1234.5, "tok/s", "1,234"),
        (0.01234, "s", "0.0123"),
        (43.21, "tok/s", "43.2"),
        (None, "s", "–"),
        (3e9, "bytes", "3 GB"),
    ],
)
def test_numbers_are_shown_in_three_digits(value: float | None, unit: str, shown: str) -> None:
    assert table.number(value, unit) == shown


def saved(monkeypatch: pytest.MonkeyPatch, log: Path, file: Path, **how: Any) -> Report:
    """A report of scripted sides, saved in `file`."""
    bench_scripted(monkeypatch, log, "")
    commands.bench(Request(None, "mlx-lm", groups=("prompt", "decode"), save=file, **how), quiet=True)
    return read(file)


def test_a_saved_report_is_what_json_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, log: Path, tmp_path: Path
) -> None:
    bench_scripted(monkeypatch, log, "")
    file = tmp_path / "run.json"
    line = f"bench --model demo --vs mlx-lm --rows prompt --turns 3 --json --quiet --save {file}"
    assert cli.main(line.split()) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text()) == json.loads(commands.as_json(read(file)))
    assert (printed["kind"], printed["settings"]["turns"]) == ("mixtral-mlx bench", 3)
    assert printed["rows"][0]["figures"]["mlx-lm"]["values"] == [100.0] * 3
    assert list(tmp_path.glob("*.partial")) == []


def test_a_report_is_saved_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text("before")

    def fails(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(WriteError) as caught:
        write_output(file, "after")
    assert (caught.value.code, file.read_text(), len(list(tmp_path.iterdir()))) == ("write_failed", "before", 1)


def test_a_place_that_cannot_be_written_is_refused_before_measuring(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "folder.html").mkdir()
    for option in ("--save", "--output"):
        for place in (tmp_path / "folder.html", tmp_path / "no" / "such.html"):
            assert cli.main(["bench", "--model", "demo", option, str(place)]) == 1
            assert capsys.readouterr().err.startswith(f"error[write_failed]: {place} is ")


def test_two_runs_are_compared_row_by_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, log: Path, tmp_path: Path
) -> None:
    report = saved(monkeypatch, log, tmp_path / "a.json", turns=1)
    faster = [
        replace(row, ratio=3.0, figures={**row.figures, "mixtral-mlx": replace(figure, median=figure.median and 300.0)})
        for row in report.rows
        for figure in [row.figures["mixtral-mlx"]]
        if row.name != "prompt of 32"
    ]
    other = replace(report, rows=tuple(faster), machine=replace(report.machine, cores=99))
    write_output(tmp_path / "b.json", commands.as_json(other))
    both = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert cli.main(["bench", "--compare", *both]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "prompt of 512 mixtral-mlx 100 tok/s 300 tok/s 3.00 1.00 3.00" in lines
    assert "prompt of 512 mlx-lm 100 tok/s 100 tok/s 1.00 1.00 3.00" in lines
    assert "prompt of 32 mlx-lm 100 tok/s – – 1.00 –" in lines
    assert lines[-2:] == ["What else differs:", f"- machine, cores: {report.machine.cores} → 99"]
    assert cli.main(["bench", "--compare", *both, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["differences"] == [{"what": "machine, cores", "first": str(report.machine.cores), "second": "99"}]
    assert cli.main(["bench", "--compare", both[0], both[0]]) == 0
    assert "Machine, model and settings are the same." in capsys.readouterr().out


def test_reports_from_before_there_were_budgets_can_be_read(
    monkeypatch: pytest.MonkeyPatch, log: Path, tmp_path: Path
) -> None:
    report = saved(monkeypatch, log, tmp_path / "run.json", turns=1)
    old = report.to_dict()
    del old["settings"]["memory_bytes"]
    for side in old["sides"]:
        del side["memory"]
    for figure in (figure for row in old["rows"] for figure in row["figures"].values()):
        del figure["streamed"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert read(tmp_path / "old.json") == report


def test_what_is_no_saved_report_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, log: Path, tmp_path: Path
) -> None:
    good = tmp_path / "good.json"
    saved(monkeypatch, log, good, turns=1)
    whole = json.loads(good.read_text())
    bad = [
        "",
        "[]",
        "{}",
        "[" * 90_000,
        json.dumps({**whole, "rows": 5}),
        json.dumps({**whole, "format": 99}),
        json.dumps({**whole, "limits": {**whole["limits"], "bytes_per_s": 10**400}}),
        json.dumps({**whole, "limits": {**whole["limits"], "bytes_per_s": float("nan")}}),
        json.dumps({name: value for name, value in whole.items() if name != "notes"}),
    ]
    for content in bad:
        (tmp_path / "bad.json").write_text(content)
        assert cli.main(["bench", "--compare", str(good), str(tmp_path / "bad.json")]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error[not_a_bench]: {tmp_path / 'bad.json'} is not a saved benchmark: "), error
    assert cli.main(["bench", "--compare", str(good), str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("error[unreadable]: ")


class _Page(HTMLParser):
    """Checks that elements are closed in order, and keeps what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: Counter[str] = Counter()
        self.links: list[str | None] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_no_server(monkeypatch: pytest.MonkeyPatch, log: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    report = saved(monkeypatch, log, tmp_path / "run.json", output=page)
    text = page.read_text()
    parsed = _Page(text)
    assert parsed.open == []
    assert parsed.links == []
    assert "//" not in text
    assert "url(" not in text
    points = sum(figure.operations_per_s is not None for row in report.rows for figure in row.figures.values())
    assert parsed.counts["circle"] + parsed.counts["rect"] == parsed.counts["title"] - 1 == points == 6
    assert parsed.counts["tr"] == len(report.rows) + 1
    assert "prefers-color-scheme: dark" in text


def test_a_page_shows_names_as_they_are_and_needs_no_picture(
    monkeypatch: pytest.MonkeyPatch, log: Path, tmp_path: Path
) -> None:
    report = saved(monkeypatch, log, tmp_path / "run.json")
    hostile = replace(report, rows=(), model=replace(report.model, name="<script>alert(1)</script>"))
    parsed = _Page(html(hostile))
    assert (parsed.open, parsed.counts["script"], parsed.counts["svg"]) == ([], 0, 0)


def test_the_readme_gets_the_table_between_its_comments(
    monkeypatch: pytest.MonkeyPatch, log: Path, tmp_path: Path
) -> None:
    saved(monkeypatch, log, tmp_path / "run.json")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- end of bench -->\nafter\n")
    script = Path(__file__).parent.parent / "benchmarks" / "readme_table.py"
    command = [sys.executable, str(script), str(tmp_path / "run.json"), str(readme)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(script.parent.parent)})
    lines = readme.read_text().splitlines()
    assert lines[:3] == ["before", "<!-- bench -->", "|  | mixtral-mlx | of floor | mlx-lm | of floor | ratio |"]
    assert "| prompt of 512 | 100 tok/s | 5 % | 100 tok/s | 5 % | 1.00 |" in lines
    assert lines[-2:] == ["<!-- end of bench -->", "after"]
    assert "old" not in lines


# The command line.


REFUSED = [
    ("", "no_model", "No model was given"),
    ("--model demo --vs torch", "bad_option", "--vs is 'torch', expected one of mlx-lm"),
    ("--model demo --rows prompt,speed", "bad_option", "--rows holds 'speed', expected some of load"),
    ("--model demo --turns 0", "bad_option", "--turns is '0'"),
    ("--model demo --seconds 0.5", "bad_option", "--seconds is '0.5'"),
    ("--model demo --memory lots", "bad_option", "--memory is 'lots', expected a number and a unit, as 12GB"),
    ("--model demo --output o.txt", "bad_option", "--output is 'o.txt', expected a name that ends in .html"),
    ("--model demo --row prompt", "unknown_option", "Did you mean --rows?"),
    ("demo", "unexpected_argument", "'demo'"),
    ("--compare a.json", "bad_option", "--compare expected 2 arguments"),
    ("--compare a.json b.json --turns 5", "bad_option", "not with --turns"),
    ("--compare a.json b.json --vs mlx-lm", "bad_option", "not with --vs"),
    ("--compare a.json b.json --memory 12GB", "bad_option", "not with --memory"),
]


@pytest.mark.parametrize(("line", "code", "said"), REFUSED)
def test_wrong_usage_is_refused_by_name(capsys: pytest.CaptureFixture[str], line: str, code: str, said: str) -> None:
    assert cli.main(["bench", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error[{code}]: ")
    assert said in err
    assert out == ""


def test_a_model_that_cannot_be_opened_is_a_coded_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "--model", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "no_config"


def test_ctrl_c_shows_what_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, log: Path
) -> None:
    bench_scripted(monkeypatch, log, "", "interrupts")
    line = "bench --model demo --vs mlx-lm --rows prompt,decode --turns 2 --quiet"
    assert cli.main(line.split()) == 130
    out, err = capsys.readouterr()
    assert "prompt of 512" in out
    assert "Interrupted: these are the rows there were time for." in out
    assert err == ""


def test_a_real_run_next_to_mlx_lm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(limits, "measure", lambda dtype: LIMITS)
    line = f"bench --model {folder} --vs mlx-lm --rows prompt,decode --turns 1 --seconds 1 --json --dtype float32"
    assert cli.main(line.split()) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [(side["name"], side["dtype"]) for side in found["sides"]] == [
        ("mixtral-mlx", "float32"),
        ("mlx-lm", "float32"),
    ]
    shown = {row["name"]: row for row in found["rows"]}
    assert shown["decode, context 8,192"]["figures"]["mlx-lm"]["reason"] == "this model's context is 2,048"
    for name in ("prompt of 32", "decode, context 0"):
        assert shown[name]["ratio"] > 0, shown[name]
        assert all(figure["median"] > 0 and not figure["reason"] for figure in shown[name]["figures"].values())
        assert f"{name}: mixtral-mlx " in err
