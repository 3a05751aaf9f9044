"""The README keeps its promises: its table follows from the arithmetic, its code runs, its links and commands exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_mlx import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_memory_table_is_what_plan_prints(capsys: pytest.CaptureFixture[str]) -> None:
    line, expected = re.search(r"\$ mixtral-mlx (plan --ram .+)\n((?:.*\n)+?)```", README).groups()  # type: ignore[union-attr]
    assert cli.main(line.split()) == 0
    assert capsys.readouterr().out == expected
    for size in (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192):
        assert f"\n{size} GB Mac " in expected
    assert "Computed, not measured" in expected


def test_the_first_table_says_what_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    (sizes,) = re.findall(r"plan --ram (\S+)", README)
    assert cli.main(["plan", "--ram", sizes, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    for memory in dict.fromkeys(plan["memory"] for plan in plans):
        cells = [memory.removesuffix(" Mac")]
        for mode in ("resident", "streamed"):
            found = [plan for plan in plans if plan["memory"] == memory and plan["mode"] == mode]
            texts = [f"{p['model']} {p['recipe']}: {p['generation_tps']:.2g} tok/s" for p in found]
            cells.append("<br>".join(texts) or "–")
        assert f"\n| {' | '.join(cells)} |\n" in README


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
    file, _, heading = link.partition("#")
    text = (ROOT / file).read_bytes().decode(errors="replace") if file else README
    headings = [re.sub(r"[^\w-]", "", line.lower().replace(" ", "-")) for line in re.findall(r"^#+ (.+)$", text, re.M)]
    assert not heading or heading in headings


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
