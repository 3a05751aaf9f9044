"""When the disk misbehaves: a coded error that names the file, never a wrong token, and the next request is fine."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_mlx import cli
from mixtral_mlx.config import MixtralError
from mixtral_mlx.engine.engine import load as load_engine
from mixtral_mlx.experts import ExpertsError
from mixtral_mlx.experts.readers import Load, Readers
from mixtral_mlx.generate import Conversation
from mixtral_mlx.opening import Plain
from mixtral_mlx.prompt import Tokenizer
from mixtral_mlx.session import Ready, Session
from mixtral_mlx.weights import Loaded, load, locate

from .checkpoints import streamed, write_tiny
from .test_experts import Q4, answers, prompt, same

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def faults() -> Iterator[Any]:
    """benchmarks/faults.py, which is no part of the package."""
    spec = spec_from_file_location("faults", SCRIPT)
    assert spec
    assert spec.loader
    module = sys.modules["faults"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["faults"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("faults") / "q4", Q4)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[np.ndarray]:
    """What the resident model answers."""
    return answers(load(folder).model, prompt(17))


@pytest.fixture
def loaded(folder: Path) -> Iterator[Loaded]:
    with streamed(folder, 2) as loaded:
        yield loaded


@pytest.fixture
def weights(faults: Any, folder: Path) -> Iterator[Any]:
    (file,) = folder.glob("*.safetensors")
    weights = faults.Weights(file)
    yield weights
    weights.restore()
    weights.aside.unlink()


def fails_with(loaded: Loaded, file: Path) -> str:
    with pytest.raises(ExpertsError) as caught:
        answers(loaded.model, prompt(17))
    sys.modules["faults"].let_reads_end(loaded.streaming)
    assert str(file) in str(caught.value)
    assert caught.value.hint
    return caught.value.code


@pytest.mark.parametrize("number", [errno.EIO, errno.ENXIO, errno.EINTR])
@pytest.mark.parametrize("start", [1, 30, 150])
def test_a_failed_read_ends_the_request_and_the_next_one_is_right(
    faults: Any, loaded: Loaded, weights: Any, expected: list[np.ndarray], number: int, start: int
) -> None:
    with faults.in_place_of_reads(faults.Disk([faults.failing(number)], start, 1 << 30)):
        assert fails_with(loaded, weights.path) == "read_failed"
        assert fails_with(loaded, weights.path) == "read_failed"
    assert same(answers(loaded.model, prompt(17)), expected)


def test_reads_that_come_back_early_harm_nothing(faults: Any, loaded: Loaded, expected: list[np.ndarray]) -> None:
    chance = faults.random.Random(0)
    with faults.in_place_of_reads(faults.Disk([faults.short(chance)], 1, 1 << 30)):
        assert same(answers(loaded.model, prompt(17)), expected)


@pytest.mark.parametrize("size", [0, 5000, 40 * 4096, 40 * 4096 + 1])
def test_a_truncated_file_is_noticed_and_taken_again_when_it_is_whole(
    loaded: Loaded, weights: Any, expected: list[np.ndarray], size: int
) -> None:
    weights.truncate(size)
    assert fails_with(loaded, weights.path) == "file_changed"
    assert fails_with(loaded, weights.path) == "file_changed"
    weights.restore()
    assert same(answers(loaded.model, prompt(17)), expected)


def test_a_file_that_was_written_to_is_refused_until_it_is_what_it_was(
    loaded: Loaded, weights: Any, expected: list[np.ndarray]
) -> None:
    weights.overwrite()
    for _ in range(3):
        assert fails_with(loaded, weights.path) == "file_changed"
    weights.restore()
    assert same(answers(loaded.model, prompt(17)), expected)


@pytest.mark.parametrize("harm", ["replace", "remove"])
def test_a_file_that_lost_its_name_goes_on_being_read(
    loaded: Loaded, weights: Any, expected: list[np.ndarray], harm: str
) -> None:
    getattr(weights, harm)()
    assert same(answers(loaded.model, prompt(17)), expected)


@pytest.mark.parametrize(("harm", "code"), [("replace", "file_changed"), ("remove", "missing_file")])
def test_after_a_failed_read_only_the_same_file_is_taken(
    faults: Any, loaded: Loaded, weights: Any, expected: list[np.ndarray], harm: str, code: str
) -> None:
    getattr(weights, harm)()
    with faults.in_place_of_reads(faults.Disk([faults.failing(errno.EIO)], 1, 1 << 30)):
        assert fails_with(loaded, weights.path) in ("read_failed", code)
    for _ in range(2):
        assert fails_with(loaded, weights.path) == code
    weights.restore()
    assert same(answers(loaded.model, prompt(17)), expected)


def test_a_disk_that_is_always_late_changes_nothing(
    faults: Any, loaded: Loaded, expected: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read comes back before somebody waits for one."""
    waited_for = threading.Event()
    first_done: Callable[[Readers, Sequence[Load]], None] = Readers.first_done

    def wait(readers: Readers, loads: Sequence[Load]) -> None:
        waited_for.set()
        first_done(readers, loads)
        waited_for.clear()

    def late(read: Any, *where: Any) -> int:
        waited_for.wait()
        return read(*where)

    monkeypatch.setattr(Readers, "first_done", wait)
    with faults.in_place_of_reads(faults.Disk([late], 1, 1 << 30)):
        try:
            assert same(answers(loaded.model, prompt(17)), expected)
        finally:
            waited_for.set()
            assert loaded.streaming
            loaded.streaming.close()


def test_seeded_faults_of_all_kinds_give_no_wrong_token_and_leave_nothing_open(faults: Any) -> None:
    assert len(list(faults.runs(locate(None), 6, seed=1))) == 6


# What people see.


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose model knows every token of its tokenizer."""
    return write_tiny(tmp_path_factory.mktemp("faults") / "talking", replace(Q4, vocab_size=32000))


def test_an_error_in_the_middle_of_a_reply_leaves_the_chat_usable(faults: Any, talking: Path) -> None:
    plan = load(talking).plan
    settings = {"temperature": 0.0, "max_tokens": 400}
    with (
        Session(Ready("resident", load_engine(talking)), _no_other, settings=settings) as fresh,
        Session(
            Ready(
                "streamed",
                load_engine(talking, memory=replace(plan, mode="streamed", slots=(2,) * Q4.num_hidden_layers)),
            ),
            _no_other,
            settings=settings,
        ) as session,
    ):
        session.handle("Hello")
        disk = faults.Disk([faults.failing(errno.EIO)], 1 << 30, 1 << 30)
        shown: list[str] = []

        def listen() -> None:
            for text in session.reply():
                shown.append(text)
                disk.start = 0

        with faults.in_place_of_reads(disk), pytest.raises(MixtralError) as caught:
            listen()
        assert caught.value.code == "read_failed"
        assert "".join(turn.reply for turn in session.turns).strip() == "".join(shown).strip() != ""
        for each in (session, fresh):
            each.settings["max_tokens"] = 12
            each.handle("/clear")
            each.handle("Hello")
            list(each.reply())
        assert session.turns == fresh.turns


def _no_other(name: str, instead_of: Any) -> Ready:
    raise AssertionError


@pytest.mark.parametrize("as_json", [False, True])
def test_generate_says_what_failed_and_exits_with_1(
    faults: Any, talking: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    (file,) = talking.glob("*.safetensors")
    with streamed(talking, 2) as loaded:
        broken = Plain(talking.name, loaded, Tokenizer.read(talking), Conversation(loaded.model))
        monkeypatch.setattr("mixtral_mlx.cli.talk.open_model", lambda choice: broken)
        with faults.in_place_of_reads(faults.Disk([faults.failing(errno.EIO)], 20, 1 << 30)):
            line = ["generate", "--model", str(talking), "--prompt", "Hello there, how are you?"]
            assert cli.main([*line, "--json"] if as_json else line) == 1
    out, err = capsys.readouterr()
    assert f"error[read_failed]: {file} cannot be read: {os.strerror(errno.EIO)}." in err
    assert "Traceback" not in err
    if as_json:
        assert json.loads(out)["error"]["code"] == "read_failed"
