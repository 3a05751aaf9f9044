"""The README keeps its promises: its table follows from the arithmetic, its code runs, its links and commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mixtral_mlx.config import KNOWN, recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| (\d+) GB \| ([\d.]+) GB \| (.+) \|$", README, re.MULTILINE)


def needed_bytes(name: str, bits: int) -> float:
    config = KNOWN[name]
    quantized = replace(config, quantization=recipe(config, f"q{bits}"))
    return quantized.nbytes() + 8192 * config.kv_nbytes_per_token() + 1e9


@pytest.mark.parametrize(("memory", "share", "runs"), ROWS)
def test_the_memory_table_is_what_the_arithmetic_says(memory: str, share: str, runs: str) -> None:
    limit = int(memory) * (2 / 3 if int(memory) <= 36 else 3 / 4)
    assert share == f"{limit:.1f}"
    listed = {name: int(bits) for name, bits in re.findall(r"(8x\d+B) at (\d) bits", runs)}
    fitting = {
        name: max(bits)
        for name in KNOWN
        if (bits := [b for b in (2, 3, 4, 5, 6, 8) if needed_bytes(name, b) <= limit * 1e9])
    }
    if listed.keys() == {"8x22B"}:
        fitting.pop("8x7B")  # Where the larger model fits well, the smaller goes without saying.
    assert listed == fitting


def test_the_table_has_rows() -> None:
    assert len(ROWS) >= 8


def test_the_python_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    answered = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answered.stdout == "The capital of Japan is Tokyo."


def test_the_pipe_example_gives_the_printed_output() -> None:
    prompts, expected = re.search(r"printf '(.+?)' \| mixtral-mlx chat --quiet\n(.+?)```", README, re.DOTALL).groups()  # type: ignore[union-attr]
    command = [sys.executable, "-m", "mixtral_mlx", "chat", "--quiet"]
    text = prompts.replace("\\n", "\n")
    answered = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    assert answered.stdout == expected


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_every_local_link_exists(link: str) -> None:
    assert (ROOT / link).exists()


def test_every_make_target_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_quickstart_example_holds_a_conversation() -> None:
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    answered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "The capital of France is Paris." in answered
    assert "The capital of Italy is Rome." in answered
    assert answered.endswith(" new]\n")
