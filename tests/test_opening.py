"""Opening a model from a command line: a Ctrl-C is never lost, and an empty folder is called that."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from mixtral_mlx import cli, weights
from mixtral_mlx.config import MixtralError
from mixtral_mlx.engine import engine
from mixtral_mlx.opening import ModelChoice, open_engine

from .checkpoints import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


class Loaded:
    """An engine that was loaded, and whether it was closed."""

    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def pressed(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """What loads in whichever way; Ctrl-C is pressed when all has been read."""
    loaded = Loaded()

    def load(*_: Any, **__: Any) -> Loaded:
        signal.raise_signal(signal.SIGINT)
        return loaded

    monkeypatch.setattr(weights, "load", load)
    monkeypatch.setattr(engine, "load", load)
    return loaded


@pytest.mark.parametrize("line", ["chat --quiet", "generate --prompt x --quiet", "routes --prompt x --quiet"])
@pytest.mark.usefixtures("pressed")
def test_ctrl_c_after_the_last_read_ends_a_command(line: str, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert cli.main([*line.split(), "--model", str(folder)]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("line", ["generate --prompt x", "routes --prompt x", "perplexity --file x", "chat"])
def test_an_empty_folder_is_said_to_hold_no_model(
    line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("text")
    (tmp_path / "empty").mkdir()
    assert cli.main([*line.split(), "--model", "empty", "--quiet"]) == 1
    assert capsys.readouterr().err.startswith("error[no_config]: empty holds no config.json")


def test_ctrl_c_after_the_last_read_leaves_no_engine_behind(pressed: Loaded, folder: Path) -> None:
    with pytest.raises(MixtralError) as caught:
        open_engine(ModelChoice(str(folder)))
    assert caught.value.code == "cancelled"
    assert pressed.closed
