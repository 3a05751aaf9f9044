"""What Node makes of the helper and of the server: the example app, and OpenAI's client through fifteen scenarios.

Run by `make test-node`, which installs the packages these need into .venv/node."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from .checkpoints import TINY, write_tiny
from .test_helper import started

ROOT = Path(__file__).parent.parent
PACKAGES = Path(os.environ.get("NODE_PACKAGES", ROOT / ".venv" / "node"))
REAL = [sys.executable, "-m", "mixtral_mlx"]
ENDLESS = ["node", str(ROOT / "tests" / "node" / "endless_helper.mjs")]

pytestmark = pytest.mark.node


def passed(*files: Path, **environment: str) -> int:
    """Run Node's tests in these files; how many have passed, which all must."""
    ran = subprocess.run(
        ["node", "--test", *map(str, files)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = re.search(r"^\S+ pass (\d+)$", ran.stdout, re.MULTILINE)
    assert found, ran.stdout
    return int(found[1])


def test_the_example_app_starts_supervises_and_streams_from_the_helper() -> None:
    file = ROOT / "examples" / "node_app" / "helper.test.mjs"
    assert passed(file, HELPER_COMMAND=json.dumps([*REAL, "helper"])) == 12


def program(folder: Path, *command: str | Path) -> Path:
    """A `mixtral-mlx` in this folder that is really this command."""
    path = folder / "mixtral-mlx"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, command))} "$@"\n')
    path.chmod(0o755)
    return path


def question(helper: Path, **environment: str) -> subprocess.Popen[str]:
    """The example that asks one question, in a process group of its own, as a terminal has it."""
    return subprocess.Popen(
        ["node", str(ROOT / "examples" / "node_app" / "main.mjs"), "Hello"],
        env={**os.environ, "MIXTRAL_MLX": str(helper), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_example_answers_from_the_command_line(tmp_path: Path) -> None:
    asked = question(program(tmp_path, *REAL), MODEL="demo")
    answer, log = asked.communicate()
    assert asked.returncode == 0, log
    assert answer.strip()
    assert re.search(r"\[\d+ tokens\]", log)


def test_ctrl_c_stops_the_answer_and_ends_the_example_as_it_should(tmp_path: Path) -> None:
    asked = question(program(tmp_path, *ENDLESS))
    assert asked.stdout
    assert asked.stdout.read(4) == "Once"
    os.killpg(asked.pid, signal.SIGINT)
    log = asked.communicate()[1]
    assert asked.returncode == 0, log
    assert "[1 tokens]" in log


def test_a_second_ctrl_c_ends_the_example_at_once(tmp_path: Path) -> None:
    asked = question(program(tmp_path, *ENDLESS), DEAF="1")
    assert asked.stdout
    assert asked.stdout.read(4) == "Once"
    os.killpg(asked.pid, signal.SIGINT)
    assert asked.stderr
    assert "helper: asked to cancel\n" in iter(asked.stderr.readline, "")
    os.killpg(asked.pid, signal.SIGINT)
    # Its end is also that of the helper, which holds these pipes as well.
    assert "Error" not in asked.communicate()[1]
    assert asked.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    "file", sorted((ROOT / "examples" / "node_app" / "electron").glob("*.*js")), ids=lambda f: f.name
)
def test_the_electron_files_can_at_least_be_parsed(file: Path) -> None:
    subprocess.run(["node", "--check", str(file)], check=True)


def test_openai_node_through_fifteen_scenarios(tmp_path: Path) -> None:
    with_tools = write_tiny(tmp_path / "model", replace(TINY, vocab_size=32768), tokenizer="v3")
    with started("--serve") as app, started("--serve") as tools:
        serving = app.ask("1", type="load", model="demo")[-1]["serving"]
        other = tools.ask("1", type="load", model=str(with_tools))[-1]["serving"]
        count = passed(
            ROOT / "tests" / "node" / "openai.test.mjs",
            NODE_PACKAGES=str(PACKAGES),
            SERVER_URL=serving["url"],
            SERVER_KEY=serving["key"],
            TOOLS_URL=other["url"],
            TOOLS_KEY=other["key"],
        )
    assert count == 15
