"""Conversions that are killed, resumed, or lose what they wrote."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from mixtral_mlx.convert.names import ConvertError
from mixtral_mlx.convert.pipeline import Events
from mixtral_mlx.convert.run import Request, convert
from mixtral_mlx.convert.verify import verify

from .conversions import Task, contents, convert_counting, quick_tokenizer, run_task, ticked, write_source

__all__ = ["quick_tokenizer"]
RECIPES = ("q4", "q3")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("killed") / "source")


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Makes processes that have everything imported, and nothing done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conversions", "tests.test_convert_killed"])
    return context


def request(source: Path, dest: Path) -> Request:
    return Request(str(source), dest, RECIPES, group_size=32)


def run(processes: ForkServerContext, task: Task) -> int | None:
    process = processes.Process(target=run_task, args=(task,))
    process.start()
    process.join()
    return process.exitcode


class Trials:
    """Kills conversions of one request before chosen disk calls, and sees what comes of them."""

    def __init__(self, source: Path, folder: Path, processes: ForkServerContext, tokenizer: str) -> None:
        self.folder = folder
        self.processes = processes
        self.task = Task(request(source, folder / "whole"), tokenizer, log=folder / "log")
        assert run(processes, self.task) == 0
        self.calls = (folder / "log").read_text().split()
        self.whole = {name: contents(folder / f"whole-{name}") for name in RECIPES}

    def indices(self, *names: str) -> list[int]:
        return [n for n, name in enumerate(self.calls) if name in names]

    def kill_and_resume(self, kill_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
        dest = self.folder / f"killed-{kill_before}"
        task = replace(self.task, request=replace(self.task.request, dest=dest), kill_before=kill_before)
        status = run(self.processes, task)
        # The count of calls differs by a few from run to run, as threads meet.
        assert status == -signal.SIGKILL or (status == 0 and kill_before > len(self.calls) - 20)
        folders = [dest.with_name(f"{dest.name}-{name}") for name in RECIPES]
        for folder in folders:
            if folder.exists():
                verify(folder)
        work = dest.with_name(dest.name + ".partial")
        if all(folder.exists() for folder in folders) and not (work / "journal").exists():
            assert not work.exists() or not list(work.iterdir())
            return
        before, after = ticked(work), list[str]()
        report = convert_counting(task.request, after, monkeypatch)
        assert report.resumed == bool(before)
        assert len(set(before + after)) == len(before + after) == 65
        assert {folder.name[-2:]: contents(folder) for folder in folders} == self.whole
        assert not work.exists()


def test_killed_conversion_resumes_to_the_same_bytes_and_does_no_piece_twice(
    source: Path,
    tmp_path: Path,
    processes: ForkServerContext,
    quick_tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trials = Trials(source, tmp_path, processes, quick_tokenizer)
    filling, renames = trials.indices("pwrite"), trials.indices("rename")
    assert len(renames) == 2
    removals = [n for n in trials.indices("unlink", "rmdir") if n > renames[-1]]
    for moment in (filling[40], filling[-3], *renames, *removals):
        trials.kill_and_resume(moment, monkeypatch)


@pytest.mark.long
def test_killed_at_100_random_moments_it_resumes_to_the_same_bytes(
    source: Path,
    tmp_path: Path,
    processes: ForkServerContext,
    quick_tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trials = Trials(source, tmp_path, processes, quick_tokenizer)
    rng = random.Random(3)
    ending = trials.indices("rename")[0] - 30
    moments = rng.sample(range(ending), 60) + rng.sample(range(ending, len(trials.calls)), 40)
    for moment in moments:
        trials.kill_and_resume(moment, monkeypatch)


def stopped_after(pieces: int) -> Events:
    """Cancels once so many pieces are done."""
    done: list[int] = []
    return Events(progress=lambda now, total: done.append(now), cancelled=lambda: len(done) > pieces)


def half_done(source: Path, dest: Path) -> Path:
    """Begin a conversion and stop it; returns its work folder."""
    with pytest.raises(ConvertError) as stopped:
        convert(request(source, dest), stopped_after(30))
    assert stopped.value.code == "cancelled"
    work = dest.with_name(dest.name + ".partial")
    assert 30 <= len(ticked(work)) < 65
    return work


@pytest.mark.usefixtures("quick_tokenizer")
def test_what_a_power_cut_lost_is_done_again_and_nothing_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(request(source, tmp_path / "whole"))
    work = half_done(source, tmp_path / "dest")
    before, after = ticked(work), list[str]()
    file = next((work / "output" / "dest-q3").glob("*.safetensors"))
    damaged = _damage(file, before[7])
    # Nor may the header have survived, nor the journal's last line.
    with file.open("r+b") as opened:
        opened.write(bytes(512))
    (work / "journal").write_bytes((work / "journal").read_bytes()[:-9])
    convert_counting(request(source, tmp_path / "dest"), after, monkeypatch)
    assert sorted(after) == sorted({*set(_all(source)) - set(before), damaged, before[-1]})
    for name in RECIPES:
        assert contents(tmp_path / f"dest-{name}") == contents(tmp_path / f"whole-{name}")


def _all(source: Path) -> list[str]:
    from mixtral_mlx.convert.names import all_piece_names

    from .conversions import SOURCE

    return all_piece_names(SOURCE)


def _damage(file: Path, piece: str) -> str:
    """Flip a bit of what a piece wrote."""
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    path, _, expert = piece.rpartition(".")
    name, part = (f"{path}.weight", int(expert)) if expert.isdigit() else (f"{piece}.weight", 0)
    start, _ = header[name]["data_offsets"]
    size = (header[name]["data_offsets"][1] - start) // (header[name]["shape"][0] if expert.isdigit() else 1)
    content[8 + length + start + part * size] ^= 4
    file.write_bytes(content)
    return piece


@pytest.mark.usefixtures("quick_tokenizer")
def test_what_an_earlier_try_left_beside_the_weights_does_not_come_along(source: Path, tmp_path: Path) -> None:
    work = half_done(source, tmp_path / "dest")
    (work / "output" / "dest-q4" / ".tokenizer.json.x1y2").write_text("half")
    convert(request(source, tmp_path / "dest"))
    verify(tmp_path / "dest-q4")
    assert not list((tmp_path / "dest-q4").glob(".*"))


@pytest.mark.usefixtures("quick_tokenizer")
def test_progress_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    half_done(source, tmp_path / "dest")
    seen: list[tuple[str, int, int]] = []
    phase = [""]
    events = Events(
        phase=lambda line: phase.__setitem__(0, line),
        progress=lambda done, total: seen.append((phase[0], done, total)),
    )
    convert(request(source, tmp_path / "dest"), events)
    for name in {name for name, _, _ in seen}:
        steps = [(done, total) for phase, done, total in seen if phase == name]
        assert steps[-1][0] == steps[-1][1] or name.startswith("Writing")
    filling = [(done, total) for name, done, total in seen if name.startswith("Going on")]
    assert 0 < filling[0][0] < filling[0][1]


@pytest.mark.usefixtures("quick_tokenizer")
def test_a_source_that_changed_meanwhile_is_not_mixed_in(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    work = half_done(source, tmp_path / "dest")
    file = source / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes())
    before = contents(work / "output" / "dest-q4")
    with pytest.raises(ConvertError) as refused:
        convert(request(source, tmp_path / "dest"))
    assert refused.value.code == "other_conversion"
    assert contents(work / "output" / "dest-q4") == before


@pytest.mark.usefixtures("quick_tokenizer")
def test_another_conversion_of_the_same_name_is_left_alone(source: Path, tmp_path: Path) -> None:
    work = half_done(source, tmp_path / "dest")
    before = ticked(work)
    for other in (
        replace(request(source, tmp_path / "dest"), recipes=("q4", "q2")),
        replace(request(source, tmp_path / "dest"), group_size=64),
    ):
        with pytest.raises(ConvertError) as refused:
            convert(other)
        assert refused.value.code == "other_conversion"
    assert ticked(work) == before


@pytest.mark.usefixtures("quick_tokenizer")
def test_two_at_once_do_not_meet(source: Path, tmp_path: Path) -> None:
    codes: list[str] = []

    def second(done: int, total: int) -> None:
        if not codes:
            with pytest.raises(ConvertError) as refused:
                convert(request(source, tmp_path / "dest"))
            codes.append(refused.value.code)

    convert(request(source, tmp_path / "dest"), Events(progress=second))
    assert codes == ["in_use"]
    verify(tmp_path / "dest-q4")
