"""`mixtral-mlx plan`: what it says, on which grounds, and what it leaves behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from mixtral_mlx import cli, speeds
from mixtral_mlx.bench import limits
from mixtral_mlx.budget import Speeds
from mixtral_mlx.config import KNOWN, MixtralError, recipe
from mixtral_mlx.memory import Machine
from mixtral_mlx.plan import outlook

from .checkpoints import Q4, TINY, write_tiny

MACS = "8GB,16GB,18GB,24GB,32GB,36GB,48GB,64GB,96GB,128GB,192GB"


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where speeds are kept, and no model of this machine's owner in reach."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "mixtral-mlx"


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*line: str, status: int = 0) -> str:
        assert cli.main(["plan", *line]) == status
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return out if not status else err

    return run


@pytest.fixture
def plans(plan: Callable[..., str]) -> Callable[..., list[dict[str, Any]]]:
    return lambda *line: json.loads(plan(*line, "--json"))["plans"]


def test_without_a_model_the_table_is_for_this_machine(plan: Callable[..., str]) -> None:
    out = plan()
    assert re.search(r"^this machine +[\d.]+ [GM]B +8x7B", out, re.MULTILINE)
    assert "8x22B" in out
    assert "Computed, not measured" in out
    assert "Speeds assumed" in out


def test_the_table_is_narrow_and_says_what_does_not_run_and_why(plan: Callable[..., str]) -> None:
    out = plan("--ram", MACS)
    assert max(map(len, out.splitlines())) <= 110
    assert re.search(r"^8 GB Mac +5\.7 GB +8x7B q4 +streamed, 1 of 8 experts in memory ", out, re.MULTILINE)
    assert re.search(r"^ +8x22B q2 +no: needs 10\.8 GB$", out, re.MULTILINE)
    assert "8x22B q2 needs 10.8 GB even with one expert of each layer in memory: process" in " ".join(out.split())
    assert [int(size) for size in re.findall(r"^(\d+) GB Mac", out, re.MULTILINE)] == [
        int(size[:-2]) for size in MACS.split(",")
    ]


def test_who_has_more_memory_is_offered_no_less(plans: Callable[..., list[dict[str, Any]]]) -> None:
    for model in KNOWN:
        best = []
        for size in MACS.split(","):
            runs = [row for row in plans("--ram", size) if row["model"] == model and row["mode"]]
            best.append(max((row["mode"] == "resident", row["recipe"]) for row in runs) if runs else (False, ""))
        assert best == sorted(best)


def test_two_numbers_of_memory_are_two_kinds_of_question(plans: Callable[..., list[dict[str, Any]]]) -> None:
    (budget, *_), (mac, *_) = plans("--memory", "16GB"), plans("--ram", "16GB")
    assert budget["budget_bytes"] == 16 * 10**9
    assert mac["budget_bytes"] == (16 << 30) * 2 // 3
    both = {row["memory"] for row in plans("--memory", "9GB,12.5GB", "--ram", "24GB")}
    assert both == {"9.0 GB", "12.5 GB", "24 GB Mac"}


def test_json_has_the_promised_names(plans: Callable[..., list[dict[str, Any]]]) -> None:
    first, *_ = plans("--ram", "16GB")
    assert first.keys() == {
        *("memory", "budget_bytes", "model", "recipe", "mode", "slots_per_layer", "experts", "context"),
        *("chunk_tokens", "parts", "generation_tps", "prompt_tps", "hit_rate", "speeds"),
    }
    assert sum(first["parts"].values()) <= first["budget_bytes"]
    refused = plans("--ram", "8GB")[-1]
    assert refused["refused"].keys() == {"code", "message", "need_bytes"}
    assert (refused["mode"], refused["refused"]["code"]) == (None, "over_budget")


def test_explain_shows_sums_that_are_right(plan: Callable[..., str]) -> None:
    out = plan("--ram", "16GB", "--explain")
    read, speed, seconds = re.search(r"([\d.]+) GB missed ÷ ([\d.]+) GB/s = ([\d.]+) s", out).groups()  # type: ignore[union-attr]
    assert float(read) / float(speed) == pytest.approx(float(seconds), rel=0.02)
    touched, share, memory, computing = map(
        float,
        re.search(r"([\d.]+) GB touched ÷ \(([\d.]+) × ([\d.]+) GB/s\) = ([\d.]+) s", out).groups(),  # type: ignore[union-attr]
    )
    assert touched / (share * memory) == pytest.approx(computing, rel=0.02)
    for part in ("process", "dense", "experts", "kv cache", "working memory", "buffer cache", "margin"):
        assert re.search(rf"^ +{part} [\d.]+ [GM]B", out, re.MULTILINE)


def test_explained_sums_of_a_small_model_are_no_zeros(plan: Callable[..., str]) -> None:
    out = plan("--model", "demo", "--memory", "1GB", "--explain")
    assert re.search(r"experts [\d.]+ MB \(32 of 32, ", out)
    assert re.search(r"2 × 0\.0\d*[1-9] G × ", out)


def test_a_folder_is_planned_as_its_files_are(tmp_path: Path, plans: Callable[..., list[dict[str, Any]]]) -> None:
    folder = write_tiny(tmp_path / "tiny", replace(TINY, quantization=Q4))
    (row,) = plans("--model", str(folder), "--memory", "2GB")
    (named,) = plans("--model", str(folder), "--memory", "1GB", "--context", "512", "--kv-bits", "8")
    assert (row["mode"], row["slots_per_layer"], row["context"]) == ("resident", 8, 2048)
    assert row["parts"]["experts"] + row["parts"]["dense"] == replace(TINY, quantization=Q4).nbytes()
    assert (named["context"], named["mode"]) == (512, "resident")
    assert named["parts"]["kv cache"] < row["parts"]["kv cache"] / 4


def test_a_config_alone_is_enough(tmp_path: Path, plans: Callable[..., list[dict[str, Any]]]) -> None:
    config = replace(KNOWN["8x7B"], quantization=recipe(KNOWN["8x7B"], "q4"))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (row,) = plans("--model", str(tmp_path), "--memory", "12GB")
    assert (row["model"], row["recipe"], row["mode"]) == ("Mixtral 8x7B", "at 4 bits", "streamed")
    assert 1 < row["slots_per_layer"] < 8


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("--memory 8XB", 2, "--memory holds '8XB', expected a number and a unit, as 12GB"),
        ("--memory 8GB,,9GB", 2, "--memory holds ''"),
        ("--memory 12", 2, "--memory holds '12'"),
        ("--memory 0GB", 2, "--memory holds '0GB', expected more than 0 and at most 1000TB"),
        ("--ram lots", 2, "--ram holds 'lots'"),
        ("--context 1", 2, "--context is '1'"),
        ("--kv-bits 2", 2, "--kv-bits is '2'"),
        ("--dtype x", 2, "no option --dtype"),
        ("more", 2, "takes no argument 'more'"),
        ("--model /nowhere", 1, "error[no_model]: /nowhere is no folder"),
        ("--model some/repository", 1, "no repository that was fetched"),
    ],
)
def test_what_cannot_be_is_refused_by_name(plan: Callable[..., str], line: str, status: int, said: str) -> None:
    assert said in plan(*line.split(), status=status)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, plan: Callable[..., str]) -> None:
    assert "error[no_config]" in plan("--model", str(tmp_path), status=1)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "error[not_mixtral]" in plan("--model", str(tmp_path), status=1)


def test_a_context_beyond_the_models_own_is_a_line_of_the_table(plan: Callable[..., str]) -> None:
    out = plan("--ram", "64GB", "--context", "40000")
    assert re.search(r"8x7B q2 +no: context at most 32,768", out)
    assert re.search(r"8x22B q\d +(resident|streamed).* 40,000 ", out)


def test_help_comes_at_once() -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mixtral_mlx", "plan", "--help"], capture_output=True
    )
    assert done.returncode == 0
    assert b"mlx.core" not in done.stderr
    assert time.perf_counter() - start < 3


def test_the_outlook_of_a_converted_folder_is_one_line(tmp_path: Path) -> None:
    line = outlook(write_tiny(tmp_path / "tiny"))
    assert re.fullmatch(r"runs here within [\d.]+ GB: resident, about [\d,.]+ tokens/s \(computed\)", line)


# Speeds.


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in no time: a small file, and a memory of 50 GB/s."""
    monkeypatch.setattr(speeds, "_FILE_BYTES", 16 << 20)
    monkeypatch.setattr(limits, "measure", lambda dtype: limits.Limits("cpu", dtype, 50e9, 1e12))


@pytest.mark.usefixtures("_quick")
def test_what_is_measured_is_kept_and_later_plans_say_so(plan: Callable[..., str], kept: Path) -> None:
    assert "Speeds assumed" in plan("--memory", "12GB")
    assert re.search(r"Speeds measured here: SSD [\d.]+ GB/s, memory 50 GB/s", plan("--measure", "--memory", "12GB"))
    assert "Speeds measured here" in plan("--memory", "12GB")
    assert "Speeds assumed for a Mac with a base chip" in plan("--ram", "16GB")
    assert [file.name for file in kept.iterdir()] == ["speeds.json"]


def without_the_cache(kept: Path) -> None:
    kept.parent.mkdir()
    kept.write_text("a file, not a folder")


@pytest.mark.usefixtures("_quick")
def test_what_cannot_be_kept_is_planned_with_all_the_same(
    plan: Callable[..., str], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_the_cache(kept)
    (tmp_path / "weights").write_bytes(b"1" * (16 << 20))
    monkeypatch.setattr(speeds, "_largest", lambda folder: tmp_path / "weights")
    out = plan("--measure", "--memory", "12GB")
    assert "Speeds measured here" in out
    assert f"What was measured is not kept for later plans: {kept / 'speeds.json'} cannot be written" in " ".join(
        out.split()
    )
    assert "not kept" in json.loads(plan("--measure", "--memory", "12GB", "--json"))["not_kept"]


def test_without_a_place_for_a_file_to_measure_with_a_model_is_asked_for(plan: Callable[..., str], kept: Path) -> None:
    without_the_cache(kept)
    err = plan("--measure", status=1)
    assert "error[write_failed]" in err
    assert "Give --model FOLDER" in err


@pytest.mark.usefixtures("_quick")
def test_ctrl_c_while_measuring_leaves_nothing_behind(
    plan: Callable[..., str], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pressed = lambda file, **how: speeds._stop_if(lambda: True)  # noqa: E731
    monkeypatch.setattr(speeds, "read_speed", pressed)
    plan("--measure", "--memory", "12GB", status=130)
    assert list(kept.iterdir()) == []


def test_ctrl_c_stops_between_two_reads(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1" * (8 << 20))
    asked = iter(range(100))
    with open(tmp_path / "file", "rb") as file, pytest.raises(MixtralError) as caught:
        speeds.read_speed(file, stopped=lambda: next(asked) >= 3, part_bytes=1 << 20)
    assert caught.value.code == "cancelled"
    assert next(asked) < 20


def test_the_models_own_files_are_read_where_they_are_large_enough(tmp_path: Path) -> None:
    for name, size in {"small": 1, "large": 300 << 20, "larger": 400 << 20}.items():
        with open(tmp_path / f"{name}.safetensors", "wb") as file:
            file.truncate(size)
    with speeds._file(tmp_path, lambda: False) as file:
        assert file.name == str(tmp_path / "larger.safetensors")


def test_without_room_for_a_file_nothing_is_written(plan: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "_FILE_BYTES", 1 << 60)
    assert "error[no_room]" in plan("--measure", status=1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"chip": "Apple M9"}',
        '{"chip": "other", "ssd_bytes_per_s": 1, "memory_bytes_per_s": 1, "operations_per_s": 1}',
        '{"chip": "Apple M9", "ssd_bytes_per_s": -1, "memory_bytes_per_s": 1, "operations_per_s": 1}',
        '{"chip": "Apple M9", "ssd_bytes_per_s": NaN, "memory_bytes_per_s": 1, "operations_per_s": 1}',
        '{"chip": "Apple M9", "ssd_bytes_per_s": [], "memory_bytes_per_s": 1, "operations_per_s": 1}',
    ],
)
def test_speeds_of_another_machine_or_a_damaged_file_are_as_if_never_measured(tmp_path: Path, text: str) -> None:
    (tmp_path / "speeds.json").write_text(text)
    assert speeds.kept("Apple M9", tmp_path / "speeds.json") is None


def test_speeds_are_kept_as_they_were_measured(tmp_path: Path) -> None:
    measured = Speeds(3.1e9, 95e9, 5e12, "measured")
    assert speeds.kept("Apple M9", speeds.keep(measured, "Apple M9", tmp_path / "new" / "speeds.json")) == measured
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["speeds.json"]


@pytest.mark.parametrize(
    ("chip", "ram", "kind"),
    [
        ("Apple M2", 24, "base"),
        ("Apple M3 Pro", 18, "Pro"),
        ("Apple M1 Max", 32, "Max"),
        ("Apple M2 Ultra", 64, "Ultra"),
        ("Apple", 16, "base"),
        ("Apple", 36, "Pro"),
        ("Apple", 128, "Max"),
        ("Apple", 192, "Ultra"),
        ("AMD EPYC", 24, "PC"),
        ("", 24, "PC"),
    ],
)
def test_what_is_assumed_hangs_on_the_chip(chip: str, ram: int, kind: str) -> None:
    assert f" {kind} " in speeds.assumed(Machine(ram << 30, ram << 29, chip)).name


def test_macs_that_share_a_model_hold_all_of_it(plan: Callable[..., str]) -> None:
    splits = json.loads(plan("--hosts", "64GB,64GB", "--json"))["splits"]
    whole = {name: replace(KNOWN[name], quantization=recipe(KNOWN[name], "q4")).nbytes() for name in KNOWN}
    assert {split["split"] for split in splits} == {"tensor", "expert", "pipeline"}
    for split in splits:
        held = sum(rank["weights_bytes"] for rank in split["ranks"])
        assert held == pytest.approx(whole[split["model"].split()[0]], rel=0.001)
        assert split["generation_tps"] > 0
        assert all(rank["mode"] == "resident" for rank in split["ranks"])


def test_the_first_split_named_is_the_fastest(plan: Callable[..., str]) -> None:
    for link in ("10Gb/s,0.3ms", "1Gb/s,2ms"):
        splits = json.loads(plan("--hosts", "64GB,36GB", "--link", link, "--json"))["splits"]
        for model in ("8x7B q4", "8x22B q4"):
            speeds = [split["generation_tps"] or 0 for split in splits if split["model"] == model]
            assert speeds == sorted(speeds, reverse=True)


def test_macs_that_share_a_model_are_told_what_each_holds(plan: Callable[..., str]) -> None:
    out = plan("--hosts", "64GB,36GB")
    assert re.search(r"rank 1, 36 GB Mac: experts 5 to 7, 3 key/value heads", out)
    assert "Computed, not measured" in out


def test_one_mac_alone_shares_nothing(plan: Callable[..., str]) -> None:
    assert "--hosts holds one Mac, expected two or more" in plan("--hosts", "64GB", status=2)


@pytest.mark.parametrize("line", [("--link", "10Gb/s,1ms"), ("--hosts", "64GB,36GB", "--ram", "64GB")])
def test_options_that_do_not_go_with_hosts_are_refused(line: tuple[str, ...], plan: Callable[..., str]) -> None:
    assert "error[bad_option]" in plan(*line, status=2)
