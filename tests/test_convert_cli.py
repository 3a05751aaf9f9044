"""The commands convert, verify and perplexity, as people and programs use them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from mixtral_mlx import cli
from mixtral_mlx.config import Config, Packing
from mixtral_mlx.weights import locate

from .conversions import contents, quick_tokenizer, ticked, write_source

__all__ = ["quick_tokenizer"]
pytestmark = pytest.mark.usefixtures("quick_tokenizer")
NAMES = "source_format recipe tensors bytes_in bytes_out bits_per_weight peak_rss_bytes peak_disk_bytes seconds resumed"
PYTHON_M = (sys.executable, "-m", "mixtral_mlx")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("cli") / "source")


@pytest.fixture(autouse=True)
def _no_model_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXTRAL_MLX_MODEL", raising=False)


def objects(capsys: pytest.CaptureFixture[str], *line: object) -> list[dict[str, Any]]:
    """What a command prints with --json, an object a line."""
    assert cli.main([*map(str, line), "--json"]) == 0
    return [json.loads(text) for text in capsys.readouterr().out.splitlines()]


def error_of(capsys: pytest.CaptureFixture[str], *line: object) -> tuple[int, str, str]:
    """Exit code, error code and message."""
    status = cli.main(list(map(str, line)))
    found = re.match(r"error\[(\w+)\]: (.*)", capsys.readouterr().err, re.DOTALL)
    assert found
    return status, found[1], found[2]


def test_convert_tells_people_what_came_of_it(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", str(source), "dest/"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"safetensors, 9.04 MB → q4 4.61 MB\nWriting the manifest\n", err)
    assert re.fullmatch(
        r"9.04 MB of safetensors in \d+\.\d s\n"
        r"dest: q4, 4.61 MB, 8.15 bits per weight\n"
        r"  runs here within [\d.]+ GB: resident, about [\d,]+ tokens/s \(computed\)\n"
        r"  mixtral-mlx chat --model dest\n",
        out,
    )
    assert cli.main(["verify", "dest"]) == 0
    assert re.fullmatch(r"dest is as it was written: 6 files, 6.47 MB, .* [MG]B/s\n", capsys.readouterr().out)


def test_convert_json_has_the_promised_names(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    (report,) = objects(capsys, "convert", source, tmp_path / "dest", "--recipe", "q3")
    assert set(report) == set(NAMES.split())
    assert (report["source_format"], report["recipe"], report["resumed"]) == ("safetensors", "q3", False)
    assert report["bytes_out"] < report["bytes_in"] < report["peak_rss_bytes"]
    assert report["bytes_out"] < report["peak_disk_bytes"]
    assert 0 < report["seconds"] < 60
    assert 3 < report["bits_per_weight"] < 8


def test_several_recipes_are_an_object_each(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    line = ("convert", source, tmp_path / "d", "--recipe", "q4", "--recipe", "q3", "--group-size", 32, "--quiet")
    reports = objects(capsys, *line)
    assert [report["recipe"] for report in reports] == ["q4", "q3"]
    assert Config.read(tmp_path / "d-q3").packing("lm_head") == Packing(6, 32)


def test_every_option_takes_effect(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    objects(capsys, "convert", source, tmp_path / "a", "--mode", "mxfp4", "--dtype", "float16")
    config = Config.read(tmp_path / "a")
    assert config.packing("model.layers.0.block_sparse_moe.switch_mlp.up_proj") == Packing(4, 32, "mxfp4")
    assert config.dtype == "float16"
    recipe = tmp_path / "own.json"
    recipe.write_text('{"*": 6}')
    objects(capsys, "convert", source, tmp_path / "b", "--recipe-file", recipe)
    assert Config.read(tmp_path / "b").packing("lm_head") == Packing(6, 64)


@pytest.mark.parametrize(
    ("line", "status", "code", "said"),
    [
        ("convert", 2, "bad_option", "SOURCE, DEST"),
        ("convert x", 2, "bad_option", "DEST"),
        ("convert x y z", 2, "unexpected_argument", "'z'"),
        ("convert x y --recipe q9", 2, "bad_option", "--recipe is 'q9', expected one of q8, q6"),
        ("convert x y --group-size 48", 2, "bad_option", "--group-size is '48', expected one of 32, 64, 128"),
        ("convert x y --mode int4", 2, "bad_option", "--mode is 'int4'"),
        ("convert x y --bits 4", 2, "unknown_option", "--bits"),
        ("convert nowhere y", 1, "no_model", "There is no nowhere"),
        ("convert nowhere no/y", 1, "no_folder", "no"),
        ("verify", 2, "bad_option", "FOLDER"),
        ("verify nowhere", 1, "no_model", "nowhere"),
        ("verify .", 1, "no_manifest", "manifest.json"),
        ("perplexity --file x", 2, "no_model", "No model"),
        ("perplexity --model demo", 2, "no_text", "No text"),
        ("perplexity --model nowhere --file x", 1, "no_model", "nowhere"),
        ("perplexity --model demo --file x --context 1", 2, "bad_option", "--context is '1'"),
    ],
)
def test_wrong_usage_is_refused_by_name(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    status: int,
    code: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = error_of(capsys, *line.split())
    assert found[:2] == (status, code)
    assert said in found[2]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--revision=v1", "--keep-source"])
def test_what_says_how_to_fetch_is_refused_where_nothing_is_fetched(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, option: str
) -> None:
    _, code, said = error_of(capsys, "convert", source, tmp_path / "dest", option)
    assert code == "bad_option"
    assert said.startswith(f"{option.split('=')[0]} is for repositories, and {source} is on this machine.")
    assert not list(tmp_path.iterdir())


def test_the_demo_is_a_source_by_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (report,) = objects(capsys, "convert", "demo", "dest")
    assert (report["source_format"], report["recipe"]) == ("safetensors", "keep")
    assert Config.read(tmp_path / "dest") == Config.read(locate(None))


def test_a_recipe_file_that_is_no_json_is_shown_what_one_says(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.txt").write_text("four bits")
    line = ("convert", source, tmp_path / "dest", "--recipe-file", tmp_path / "recipe.txt")
    _, code, said = error_of(capsys, *line)
    assert code == "bad_json"
    assert 'A recipe file says bits by names, as {"*": 4' in said


def test_one_argument_too_many_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Besides options it takes SOURCE and DEST" in error_of(capsys, "convert", "x", "y", "z")[2]
    assert "Besides options it takes FOLDER" in error_of(capsys, "verify", "x", "y")[2]
    assert "Everything is given by options" in error_of(capsys, "perplexity", "x")[2]


def test_errors_are_objects_for_programs(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(source), str(tmp_path), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "exists"
    assert error.keys() == {"code", "message", "hint"}


def test_verify_finds_damage(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    objects(capsys, "convert", source, tmp_path / "dest")
    (report,) = objects(capsys, "verify", tmp_path / "dest")
    assert set(report) == {"folder", "files", "bytes", "seconds"}
    (tmp_path / "dest" / "tokenizer_config.json").write_text("{}")
    status, code, said = error_of(capsys, "verify", tmp_path / "dest")
    assert (status, code) == (1, "damaged")
    assert "tokenizer_config.json is 2 bytes, the manifest says 928" in said


def test_perplexity_says_how_well_and_how_far(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    objects(capsys, "convert", source, tmp_path / "q4")
    text = tmp_path / "text.txt"
    text.write_text("Hello world, this is a text.")
    line = ("perplexity", "--model", tmp_path / "q4", "--file", text, "--context", 64)
    (alone,) = objects(capsys, *line)
    assert set(alone) == {"perplexity", "tokens", "kl", "seconds"}
    assert alone["kl"] is None
    (both,) = objects(capsys, *line, "--against", source)
    assert both["perplexity"] == alone["perplexity"]
    assert both["kl"] > 0
    assert cli.main([*map(str, line), "--against", str(tmp_path / "q4")]) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r"perplexity [\d.]+ over 8 tokens, KL divergence 0\.000000 nats per token\n", out)
    text.write_bytes(b"\xff\xfe")
    assert error_of(capsys, *line)[1] == "not_text"
    text.unlink()
    assert error_of(capsys, *line)[1] == "unreadable"


def test_convert_py_runs_from_a_checkout(source: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "convert.py"
    done = subprocess.run([sys.executable, script, source, tmp_path / "dest", "--json", "--quiet"], capture_output=True)
    assert done.returncode == 0
    assert done.stderr == b""
    assert json.loads(done.stdout)["recipe"] == "q4"


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(source: Path, tmp_path: Path) -> None:
    line = ["convert", str(source), str(tmp_path / "dest")]
    stopped = subprocess.run([sys.executable, "-c", _PRESSED, *line], capture_output=True, text=True)
    assert stopped.returncode == 130
    assert stopped.stdout == ""
    assert stopped.stderr.splitlines()[1:] == ["Stopped. Run the same command again to go on."]
    assert not (tmp_path / "dest").exists()
    assert ticked(tmp_path / "dest.partial")
    done = subprocess.run([*PYTHON_M, *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Going on after" in done.stderr
    assert done.stdout.endswith(f"mixtral-mlx chat --model {tmp_path / 'dest'}\n")


_PRESSED = """
import itertools, os, signal, sys
from mixtral_mlx.convert.names import Matrix
from mixtral_mlx.cli import main
blocks, count = Matrix.blocks, itertools.count()
def pressed(self):
    if next(count) == 20:
        os.kill(os.getpid(), signal.SIGINT)
    return blocks(self)
Matrix.blocks = pressed
sys.exit(main(sys.argv[1:]))
"""


def test_on_a_terminal_there_is_a_bar_with_speed_and_time_left(source: Path, tmp_path: Path) -> None:
    program = """
import sys
from mixtral_mlx import terminal
terminal._AT_LEAST_BYTES = 0
from mixtral_mlx.cli import main
sys.exit(main(sys.argv[1:]))
"""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", program, "convert", source, tmp_path / "dest"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(theirs)
    screen = b""
    try:
        while part := os.read(ours, 4096):
            screen += part
    except OSError:  # The other side is closed.
        pass
    process.communicate()
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode())
    assert re.search(r"Converting .*[\d.]+/9.0 MB (\?|[\d.]+ [kMG]B/s) [-\d:]+", text), text
    assert "safetensors, 9.04 MB → q4 4.61 MB" in text


def test_a_pipe_gets_lines_instead(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from mixtral_mlx.terminal import Screen

    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    screen = Screen("Converting", quiet=False, size="bytes")
    for done in range(0, 100, 5):
        screen.progress(done * 10**9, 100 * 10**9)
        clock[0] += 4
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "Converting: 30 %, 1,250 MB/s, 56.0 s left"
    assert 4 < len(lines) < 8


def test_what_was_converted_by_the_command_is_what_the_library_converts(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    from mixtral_mlx.convert.run import Request, convert

    objects(capsys, "convert", source, tmp_path / "a", "--recipe", "q5")
    convert(Request(str(source), tmp_path / "b", ("q5",)))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
