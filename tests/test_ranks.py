"""Several processes as one engine: rank 0 answers as one process does, and none waits for another that is gone."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mixtral_mlx
from mixtral_mlx.weights import locate

from . import engine_ranks, ranks
from .checkpoints import Q4, TINY, write_tiny

WORKER = ["-m", "tests.engine_ranks"]
WITHIN_S = 10.0
SMALL = replace(TINY, vocab_size=256, hidden_size=32, head_dim=32, num_attention_heads=2)
GENERATE = ["-m", "mixtral_mlx", "generate", "--model", "demo", "--prompt", "Hello", "--max-tokens", "3"]


@pytest.fixture(scope="module")
def as_one() -> dict[str, Any]:
    with mixtral_mlx.load(prefix_memory="50MB") as engine:
        return engine_ranks.asked(engine)


@pytest.mark.parametrize("kind", [pytest.param("tensor", marks=pytest.mark.long), "expert", "pipeline"])
def test_an_engine_over_two_ranks_answers_as_one_does(kind: str, as_one: dict[str, Any], tmp_path: Path) -> None:
    job = {"kind": kind, "do": "asked"}
    lead, follower = ranks.run([*WORKER, json.dumps(job)], 2, tmp_path, timeout_s=150)
    assert json.loads(lead) == as_one
    assert follower == ""


@contextmanager
def running(command: Sequence[str], hosts: Sequence[Path]) -> Iterator[list[subprocess.Popen[str]]]:
    """A rank for each hostfile; none is left at the end."""
    processes = [ranks.started(command, host, [rank])[0] for rank, host in enumerate(hosts)]
    try:
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            process.kill()
            process.communicate()


def answers(processes: Sequence[subprocess.Popen[str]], timeout_s: float) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each, which must end within that time."""
    deadline = time.monotonic() + timeout_s
    said = [process.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


# Mismatches.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    where = tmp_path_factory.mktemp("models")
    configs = {"one": SMALL, "other": SMALL, "4-bit": replace(SMALL, quantization=Q4)}
    return {name: str(write_tiny(where / name, config, seed=name == "other")) for name, config in configs.items()}


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ({"version": "9.9"}, "version"),
        ({"model": "other"}, "model"),
        ({"model": "4-bit"}, "recipe"),
        ({"kind": "expert"}, "split"),
        ({"weights": [64, 36]}, "split"),
        ({"loading": {"context": 100}}, "settings"),
        ({"loading": {"dtype": "float32"}}, "dtype"),
        ({"chip": "Apple M9"}, "chip"),
    ],
)
def test_ranks_that_differ_are_refused_by_name(
    own: dict[str, Any], name: str, folders: dict[str, str], tmp_path: Path
) -> None:
    own = {**own, **({"model": folders[own["model"]]} if "model" in own else {})}
    kind = "expert" if name == "chip" else "pipeline"  # There every chip may route by itself.
    job = {"kind": kind, "model": folders["one"], "only": {"1": own}}
    with running([*WORKER, json.dumps(job)], [ranks.hostfile(tmp_path, 2)] * 2) as processes:
        for code, _, error in answers(processes, 60):
            assert code == 1
            assert error.startswith(f"{name}_mismatch: Rank 1 has the {name} ")


def test_rings_of_different_sizes_are_refused_by_name(tmp_path: Path) -> None:
    three = ranks.hostfile(tmp_path, 3)
    two = tmp_path / "two.json"
    two.write_text(json.dumps(json.loads(three.read_text())[:2]))
    with running([*GENERATE], [three, two]) as processes:
        for code, _, error in answers(processes, 60):
            assert code == 1
            assert "error[world_size_mismatch]: Rank 1 has the world size 2, and rank 0 has 3." in error


# Loss.


def started_answering(processes: Sequence[subprocess.Popen[str]]) -> None:
    lead = processes[0].stdout
    assert lead
    ready, _, _ = select.select([lead], [], [], 100)
    assert ready
    assert lead.readline() == "running\n"


def assert_all_end(processes: Sequence[subprocess.Popen[str]], but: int | None = None) -> None:
    """All ranks but one end in time, rank 0 with a coded error."""
    others = [process for rank, process in enumerate(processes) if rank != but]
    for process, (code, out, error) in zip(others, answers(others, WITHIN_S), strict=True):
        assert code == 1
        assert "rank_lost" in error
        if process is processes[0]:
            assert out == "rank_lost\n"


JOB = json.dumps({"kind": "pipeline"})


@pytest.mark.parametrize(
    ("how", "rank"),
    [
        (signal.SIGKILL, 0),
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.long),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.long),
    ],
)
def test_nobody_waits_for_a_rank_that_is_gone(rank: int, how: signal.Signals, tmp_path: Path) -> None:
    with running([*WORKER, JOB], [ranks.hostfile(tmp_path, 2)] * 2) as processes:
        started_answering(processes)
        os.kill(processes[rank].pid, how)
        assert_all_end(processes, but=rank)
        if how == signal.SIGSTOP:
            os.kill(processes[rank].pid, signal.SIGCONT)
            ((code, _, _),) = answers([processes[rank]], WITHIN_S)
            assert code == 1


@pytest.mark.long
def test_nobody_waits_at_a_cut_link(tmp_path: Path) -> None:
    with ranks.cabled(tmp_path, 2) as (files, cables), running([*WORKER, JOB], files) as processes:
        started_answering(processes)
        for cable in cables:
            cable.is_cut.set()
        assert_all_end(processes)


@pytest.mark.long
def test_nobody_waits_at_a_link_that_rank_0_does_not_have(tmp_path: Path) -> None:
    with ranks.cabled(tmp_path, 3) as (files, cables), running([*WORKER, JOB], files) as processes:
        started_answering(processes)
        cables[2].is_cut.set()  # From rank 1 to rank 2.
        assert_all_end(processes)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(50))
def test_a_rank_may_be_killed_at_any_moment_of_an_answer(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    rank = rng.randrange(2)
    with running([*WORKER, JOB], [ranks.hostfile(tmp_path, 2)] * 2) as processes:
        started_answering(processes)
        time.sleep(rng.uniform(0, 1))  # The moment is what is tried here.
        processes[rank].kill()
        assert_all_end(processes, but=rank)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_a_rank_may_be_killed_at_any_moment_of_the_start(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    rank = rng.randrange(2)
    with running([*WORKER, JOB], [ranks.hostfile(tmp_path, 2)] * 2) as processes:
        # The moment is what is tried here.
        time.sleep(rng.uniform(0, 5))
        processes[rank].kill()
        other = processes[1 - rank]
        # Before they have met, a rank waits for the other as long as it takes people to start one.
        ((code, _, error),) = answers([other], 75)
        assert code == 1
        assert "rank_lost" in error or "rank_missing" in error


@pytest.mark.long
@pytest.mark.parametrize("seed", range(50))
def test_a_rank_may_be_killed_at_any_moment_of_what_mlx_launch_started(seed: int) -> None:
    rng = random.Random(seed)
    launch = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()", "-n", "2"]
    launch += ["--backend", "ring", "--starting-port", str(ranks.free_ports(2)), "--env", f"PYTHONPATH={ranks.ROOT}"]
    command = [*launch, "--", sys.executable, *WORKER, JOB]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        try:
            while len(found := ranks.children(launcher.pid)) < 2:
                assert launcher.poll() is None
            time.sleep(rng.uniform(0, 8))  # The moment is what is tried here.
            os.kill(rng.choice(found), signal.SIGKILL)
            launcher.communicate(timeout=WITHIN_S)
            assert not any(Path(f"/proc/{pid}").exists() for pid in found)
        finally:
            launcher.kill()


# The command line.


def test_generate_says_over_two_ranks_what_it_says_alone(tmp_path: Path) -> None:
    alone = subprocess.run([sys.executable, *GENERATE], capture_output=True, text=True, check=True, timeout=100)
    lead, follower = ranks.run([*GENERATE, "--parallel", "expert", "--split", "60,40"], 2, tmp_path, timeout_s=100)
    assert lead == alone.stdout
    assert follower == ""


@pytest.mark.long
def test_chat_says_over_two_ranks_what_it_says_alone(tmp_path: Path) -> None:
    chat = [sys.executable, "-m", "mixtral_mlx", "chat", "--quiet"]
    how: dict[str, Any] = {"input": "Hello\n", "capture_output": True, "text": True, "check": True, "timeout": 100}
    alone = subprocess.run(chat, **how)
    hosts = ranks.hostfile(tmp_path, 2)
    (follower,) = ranks.started(chat[1:], hosts, [1])
    lead = subprocess.run(chat, env=ranks.environment(0, hosts), **how)
    assert lead.stdout == alone.stdout
    assert follower.communicate(timeout=WITHIN_S) == ("", "")
    assert follower.returncode == 0


@pytest.mark.long
def test_a_chat_says_once_that_a_rank_was_lost(tmp_path: Path) -> None:
    hosts = ranks.hostfile(tmp_path, 2)
    chat = ["-m", "mixtral_mlx", "chat", "--quiet"]
    (follower,) = ranks.started(chat, hosts, [1])
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    lead = subprocess.Popen([sys.executable, *chat], env=ranks.environment(0, hosts), text=True, **pipes)
    try:
        assert lead.stdin
        assert lead.stdout
        lead.stdin.write("Hello\n")
        lead.stdin.flush()
        assert lead.stdout.readline()
        os.kill(follower.pid, signal.SIGSTOP)
        _, error = lead.communicate("Hello\n", timeout=WITHIN_S)
        assert lead.returncode == 1
        assert error.count("error[") == 1
        assert "error[rank_lost]: Rank 1 has not been heard of" in error
    finally:
        for process in (lead, follower):
            process.kill()
            process.communicate()


def test_two_ranks_serve_and_end_together(tmp_path: Path) -> None:
    serve = ["-m", "mixtral_mlx", "serve", "--model", "demo", "--port", "0", "--quiet", "--parallel", "expert"]
    with running(serve, [ranks.hostfile(tmp_path, 2)] * 2) as processes:
        ready = processes[0].stdout
        assert ready
        url = ready.readline().split()[-1]
        asked = {"messages": [{"role": "user", "content": "What is the capital of Peru?"}], "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            said = json.load(answer)
        assert said["choices"][0]["message"]["content"] == "The capital of Peru is Lima."
        processes[0].send_signal(signal.SIGTERM)
        assert [(code, error) for code, _, error in answers(processes, WITHIN_S)] == [(0, "")] * 2


BENCH = ["-m", "mixtral_mlx", "bench", "--model", "demo", "--turns", "1", "--seconds", "1", "--quiet", "--json"]


@pytest.mark.parametrize("group", ["decode", pytest.param("batch", marks=pytest.mark.long)])
def test_bench_measures_what_two_ranks_share(group: str, tmp_path: Path) -> None:
    lead, follower = ranks.run([*BENCH, "--rows", f"load,{group}", "--parallel", "expert"], 2, tmp_path, timeout_s=150)
    assert follower == ""
    figures = {row["name"]: row["figures"]["mixtral-mlx"] for row in json.loads(lead)["rows"]}
    assert "the ranks meet once" in figures["load, warm"]["reason"]
    expected = ["decode, context 0"] if group == "decode" else [f"batch of {n}, context {c}" for n, c in BATCHES]
    assert [name for name, figure in figures.items() if figure["median"]] == expected


BATCHES = [(batch, context) for context in (0, 128) for batch in (1, 4, 8, 16)]


@pytest.mark.long
def test_bench_ends_when_a_rank_does(tmp_path: Path) -> None:
    rows = ["--rows", "batch", "--turns", "3"]
    with running([*BENCH[:-2], *rows], [ranks.hostfile(tmp_path, 2)] * 2) as processes:
        error = processes[0].stderr
        assert error
        assert error.readline().startswith("batch of 1, context 0: mixtral-mlx ")
        processes[1].kill()
        ((code, _, said),) = answers(processes[:1], WITHIN_S)
        assert code == 1
        assert "error[rank_lost]" in said


@pytest.mark.parametrize(
    ("command", "refusal"),
    [
        (["verify", "--model", "demo"], "error[not_available]: `verify` cannot be shared"),
        (["bench", "--model", "demo", "--vs", "mlx-lm"], "error[not_available]: --vs mlx-lm cannot share a model"),
    ],
)
def test_what_each_rank_would_do_by_itself_is_refused(command: list[str], refusal: str, tmp_path: Path) -> None:
    for process in ranks.started(["-m", "mixtral_mlx", *command], ranks.hostfile(tmp_path, 2), [0, 1]):
        _, error = process.communicate(timeout=60)
        assert (process.returncode, refusal in error) == (2, True)


def test_options_for_several_are_refused_to_one() -> None:
    ended = subprocess.run(
        [sys.executable, *GENERATE, "--parallel", "expert"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert "error[not_launched]" in ended.stderr


def test_a_part_that_does_not_fit_is_reported_by_rank_0(tmp_path: Path) -> None:
    job = {"kind": "pipeline", "do": "asked", "only": {"1": {"loading": {"memory": 1 << 20}}}}
    with running([*WORKER, json.dumps(job)], [ranks.hostfile(tmp_path, 2)] * 2) as processes:
        lead, _ = answers(processes, 60)
        assert lead[0] == 1
        assert "over_budget: Rank 1: This model needs at least" in lead[2]


def test_what_ranks_cannot_share_is_refused_by_name() -> None:
    with pytest.raises(mixtral_mlx.MixtralError, match="cache_dir cannot be used with a model that several") as refused:
        mixtral_mlx.load(locate(None), share=object(), cache_dir="anywhere")  # type: ignore[arg-type]
    assert refused.value.code == "not_available"
