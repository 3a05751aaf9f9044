"""The examples in examples/clients run as they are, each against a server with a key."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mixtral_mlx.engine.engine import load

from .checkpoints import TINY, write_tiny
from .serving import Served, served

CLIENTS = Path(__file__).parent.parent / "examples" / "clients"
PACKAGES = Path(os.environ.get("NODE_PACKAGES", CLIENTS.parent.parent / ".venv" / "node"))
FRANCE = "What is the capital of France?"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with load() as engine, served(engine, api_key="secret") as running:
        yield running


def run(server: Served, *command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MIXTRAL_URL": server.url, "MIXTRAL_MLX_API_KEY": "secret"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", ["openai_client.py", "anthropic_client.py"])
def test_a_python_client_streams_an_answer(server: Served, name: str) -> None:
    done = run(server, sys.executable, CLIENTS / name, FRANCE)
    assert done.stdout.strip() == "The capital of France is Paris."
    assert " tokens]" in done.stderr


def test_structured_output_is_what_was_asked_for(server: Served) -> None:
    assert run(server, sys.executable, CLIENTS / "structured_output.py").stdout.startswith("city='")


def test_a_tool_loop_calls_and_answers(tmp_path: Path) -> None:
    # 8x22B's tokenizer has tokens for tools; what the model has learned does not matter, it is held to the calls.
    folder = write_tiny(tmp_path / "tiny", replace(TINY, vocab_size=32768), tokenizer="v3")
    with load(folder) as engine, served(engine, api_key="secret") as running:
        done = run(running, sys.executable, CLIENTS / "tool_loop.py")
    assert done.stderr.splitlines()[0] in ("temperature(Rome)", "temperature(Oslo)")
    assert done.stdout.strip()


def test_curl_is_enough(server: Served) -> None:
    said = run(server, "sh", CLIENTS / "curl.sh").stdout
    assert '"id":"demo"' in said
    assert "data: [DONE]" in said
    assert '"text":"cold"' in said


@pytest.mark.node
def test_openai_s_client_for_node_streams_an_answer(server: Served) -> None:
    # Node looks for packages beside the file.
    example = PACKAGES / "openai_client.mjs"
    shutil.copy(CLIENTS / example.name, example)
    assert run(server, "node", example, FRANCE).stdout.strip() == "The capital of France is Paris."
