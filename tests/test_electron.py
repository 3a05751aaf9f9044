"""The Electron example without Electron: its main process with a stand-in, its page in a Chromium."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .chromium import expect
from .test_node import ENDLESS, REAL, ROOT, program

if TYPE_CHECKING:
    from playwright.sync_api import Browser

APP = ROOT / "examples" / "node_app"
HELLO = [{"role": "user", "content": "Hello"}]


@dataclass
class Window:
    """What the page would send and be sent."""

    process: subprocess.Popen[str]

    def send(self, *what: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def until(self, wanted: Callable[[list[Any]], bool]) -> list[Any]:
        """The first of what it is sent that is wanted."""
        assert self.process.stdout
        for line in self.process.stdout:
            if wanted(what := json.loads(line)):
                return list(what)
        raise AssertionError(f"the app has ended: {self.process.communicate()}")

    def state(self, name: str) -> None:
        """Wait for a state."""
        self.until(lambda what: what[:2] == ["state", name])

    def failure(self) -> str:
        """What the state line says of a failure."""
        return str(self.until(lambda what: what[:2] == ["state", "failed"] and len(what) > 2)[2])

    def close(self) -> None:
        """Close it; the app ends without a word of complaint."""
        self.send("close")
        _, complaints = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, complaints
        assert "Error" not in complaints


@pytest.fixture
def window(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    folder = tmp_path / "app"
    shutil.copytree(APP, folder, ignore=shutil.ignore_patterns("node_modules"))
    electron = folder / "node_modules" / "electron"
    electron.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "node" / "electron.mjs", electron)
    (electron / "package.json").write_text('{"name": "electron", "exports": "./electron.mjs"}')
    opened: list[subprocess.Popen[str]] = []

    def open_window(**environment: str | Path) -> Window:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = ["node", str(folder / "electron" / "main.mjs")]
        environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        opened.append(subprocess.Popen(command, env=environment, text=True, **pipes))
        return Window(opened[-1])

    yield open_window
    for process in opened:
        process.kill()
        process.communicate()


@pytest.mark.node
def test_the_page_hears_of_the_model_and_gets_its_answer(window: Callable[..., Window], tmp_path: Path) -> None:
    app = window(MIXTRAL_MLX=program(tmp_path, *REAL), MODEL="demo")
    app.state("ready")
    app.send("chat", 1, HELLO)
    done = app.until(lambda what: what[0] == "message" and what[1]["type"] == "done")
    assert done[1]["id"] == 1
    app.close()


@pytest.mark.node
def test_a_helper_that_cannot_start_is_said_to_and_can_be_tried_again(
    window: Callable[..., Window], tmp_path: Path
) -> None:
    app = window(MIXTRAL_MLX=tmp_path / "mixtral-mlx")
    assert "ENOENT" in app.failure()
    program(tmp_path, *ENDLESS)
    app.send("begin")
    app.state("ready")
    app.close()


@pytest.mark.node
def test_a_model_that_cannot_be_loaded_is_said_with_what_to_do(window: Callable[..., Window], tmp_path: Path) -> None:
    app = window(MIXTRAL_MLX=program(tmp_path, *REAL), MODEL=tmp_path / "nowhere")
    said = app.failure()
    assert str(tmp_path / "nowhere") in said
    app.send("begin")
    assert app.failure() == said
    app.close()


@pytest.mark.node
def test_a_window_that_is_closed_while_an_answer_comes_is_sent_nothing_more(
    window: Callable[..., Window], tmp_path: Path
) -> None:
    app = window(MIXTRAL_MLX=program(tmp_path, *ENDLESS))
    app.state("ready")
    app.send("chat", 1, HELLO)
    app.until(lambda what: what[0] == "message" and what[1]["type"] == "text")
    app.close()


@pytest.mark.node
def test_a_packaged_app_starts_its_own_python_and_has_it_write_nothing(
    window: Callable[..., Window], tmp_path: Path
) -> None:
    python = tmp_path / "python" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >&2\nexit 2\n')
    python.chmod(0o755)
    app = window(RESOURCES=tmp_path)
    assert "exit code 2" in app.failure()
    log = app.process.communicate('["close"]\n')[1]
    assert log.startswith("-I -B -m mixtral_mlx helper --parent-pid ")


@pytest.mark.browser
def test_the_page_lets_ask_only_what_can_be_answered(browser: Browser) -> None:
    page = browser.new_page()
    page.add_init_script(
        """window.sent = []; window.mixtral = {
          begin: () => sent.push("begin"), chat: (id) => sent.push(id), stop: () => sent.push("stop"),
          onState: (heard) => (window.state = heard), onMessage: (heard) => (window.message = heard) };"""
    )
    page.goto((APP / "electron" / "index.html").as_uri())
    send, again = page.get_by_role("button", name="Send"), page.get_by_role("button", name="Try again")
    page.evaluate("state('failed', 'There is no model. Convert one.')")
    expect(page.get_by_role("status")).to_have_text("failed: There is no model. Convert one.")
    expect(send).to_be_disabled()
    again.click()
    page.evaluate("state('ready')")
    expect(again).to_be_hidden()
    page.get_by_label("Message").fill("Hello")
    send.click()
    page.evaluate("state('waiting')")  # The helper has died, and with it the answer.
    page.evaluate("message({type: 'error', id: 1, message: 'The helper has ended.'})")
    expect(send).to_be_disabled()
    page.evaluate("state('unloaded')")
    expect(send).to_be_enabled()
    assert page.evaluate("sent") == ["begin", 1]
    page.close()
