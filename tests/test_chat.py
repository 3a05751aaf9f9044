"""The chat at a real terminal and in a pipe."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pexpect
import platformdirs
import pytest
from rich.cells import cell_len

from mixtral_mlx.cli import main
from mixtral_mlx.opening import ModelChoice, open_engine
from mixtral_mlx.session import Session
from mixtral_mlx.weights import save

from .checkpoints import TINY, random_model, write_tiny

_FROM_OUTSIDE = ("NO_COLOR", "COLUMNS", "LINES", "MIXTRAL_MLX_MODEL")
CTRL_J, ALT_ENTER, CTRL_D = "\n", "\x1b\r", "\x04"
PROMPT = r"\x1b\[\?2004h[^>]*>"  # Ready for pastes, then the sign.
CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A terminal that does not answer questions about its cursor, and a home of its own."""
    kept = {key: value for key, value in os.environ.items() if key not in _FROM_OUTSIDE}
    own = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(tmp_path / "state")}
    own["XDG_CACHE_HOME"] = platformdirs.user_cache_dir()  # Compiled kernels stay: each home would make its own.
    return {**kept, **own, "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}


Start = Callable[..., Any]


@pytest.fixture
def start(folder: Path, environment: dict[str, str]) -> Iterator[Start]:
    running = []

    def begin(*options: str, columns: int = 100, **env: str) -> Any:
        line = ["-m", "mixtral_mlx.chat", "--model", str(folder), "--temperature", "0", *options]
        chat = pexpect.spawn(
            sys.executable,
            line,
            env={**environment, **env},
            dimensions=(30, columns),
            encoding="utf-8",
            timeout=120,  # A kernel may have to be compiled on a busy machine.
        )
        running.append(chat)
        return chat

    yield begin
    for chat in running:
        chat.close(force=True)


def enter(chat: Any, line: str) -> None:
    """Wait for the prompt, type a line and send it."""
    chat.expect(PROMPT)
    chat.send(line + "\r")


def words(folder: Path, *messages: str, tokens: int = 20) -> list[str]:
    """The plain words in the reply to the last of `messages`, each answered in `tokens` tokens."""

    def no_other(name: str, instead_of: Any) -> Any:
        raise AssertionError

    session = Session(
        open_engine(ModelChoice(str(folder))), no_other, settings={"temperature": 0, "max_tokens": tokens}
    )
    for message in messages:
        session.say(message)
        list(session.reply())
    return re.findall("[A-Za-z]{4,}", session.turns[-1].reply)


def test_a_conversation_at_a_terminal(start: Start, folder: Path, tmp_path: Path) -> None:
    chat = start("--max-tokens", "1500")
    chat.expect("tiny · float32 · resident, 18.1 MB · context 2,048")
    enter(chat, "Hello there")
    for word in words(folder, "Hello there")[:3]:
        chat.expect(word)  # It streams: 1,500 tokens are not there yet.
    chat.sendintr()
    chat.expect(re.escape("[stopped]"))

    enter(chat, "/set max_tokens 8")
    chat.expect("max_tokens = 8")
    enter(chat, "/clear")
    chat.expect("is empty")
    enter(chat, f"one{CTRL_J}two{ALT_ENTER}three")
    for word in words(folder, "one\ntwo\nthree", tokens=8)[:2]:
        chat.expect(word)
    chat.expect("cut off after 8 tokens")
    enter(chat, "/stats on")
    enter(chat, "/regen")
    chat.expect(r"8 tokens, [\d.]+ tok/s .* first token [\d.]+ s")

    file = tmp_path / "talk.json"
    enter(chat, f"/save {file}")
    chat.expect("Saved 1 turn")
    saved = json.loads(file.read_text())
    assert saved["messages"][0] == {"role": "user", "content": "one\ntwo\nthree"}
    assert len(saved["messages"]) == 2
    enter(chat, "/undo")
    chat.expect("Taken back: one two three")
    enter(chat, f"/load {file}")
    chat.expect(r"Loaded 1 turn\.")
    enter(chat, "/edit")
    chat.expect("three")
    chat.send(" four\r")
    chat.expect("cut off")
    enter(chat, "/nope")
    chat.expect(re.escape("error[unknown_command]"))
    chat.expect(PROMPT)
    chat.sendintr()
    chat.expect("Ctrl-C again")
    chat.expect(PROMPT)
    chat.sendintr()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 130


def test_history_pasting_narrow_windows_and_no_colour(start: Start, tmp_path: Path) -> None:
    state = tmp_path / "state" / "mixtral-mlx"
    state.mkdir(parents=True)
    (state / "chat_history").write_text("\n# 2026-01-01\n+from another day\n")
    chat = start("--max-tokens", "30", columns=28, NO_COLOR="1")
    chat.expect("/help: commands")
    chat.expect(PROMPT)
    chat.send("\x1b[A\r")  # the arrow up
    chat.expect("from another day")
    chat.expect("cut off")
    chat.expect(PROMPT)
    chat.send("\x1b[200~def f():\n    return 1\n\x1b[201~")
    chat.expect("return 1")
    chat.send("\r")
    chat.expect("cut off")
    written = [CODES.sub("", line) for line in re.split(r"\r|\n|\x1b\[2K", chat.before)]
    assert max(map(cell_len, written)) <= 28
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3[0-7]|38|48|9[0-7])[;m]", chat.before), "a colour"
    chat.expect(PROMPT)
    chat.send(CTRL_D)
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    history = (state / "chat_history").read_text()
    assert "+def f():\n+    return 1\n" in history


def test_a_dumb_terminal_gets_plain_text(start: Start) -> None:
    chat = start("--max-tokens", "5", "--quiet", TERM="dumb")
    chat.expect("> ")
    chat.send("Hello\r")
    chat.expect("cut off")
    assert "\x1b" not in chat.before
    chat.expect("> ")
    chat.send(CTRL_D)
    chat.expect(pexpect.EOF)


@pytest.fixture(scope="module")
def hostile(folder: Path) -> Path:
    """A model that answers nothing but escape characters."""
    model = random_model(TINY)
    escape = (mx.arange(TINY.vocab_size) == 3 + 0x1B)[:, None]  # after <unk>, <s>, </s> come the bytes
    first = (mx.arange(TINY.hidden_size) == 0)[None]
    embedding = model.model.embed_tokens
    embedding.weight = mx.where(first, 100.0, embedding.weight)
    model.lm_head.weight = mx.where(escape & first, 1.0, 0.0)
    path = folder.with_name("hostile")
    save(path, model, TINY)
    shutil.copyfile(folder / "tokenizer.model", path / "tokenizer.model")
    return path


def test_escape_characters_from_a_model_do_not_reach_a_terminal_and_do_reach_a_file(
    hostile: Path, environment: dict[str, str]
) -> None:
    line = ["-m", "mixtral_mlx", "generate", "--model", str(hostile), "--quiet", "--prompt", "x", "--max-tokens", "9"]
    at_terminal = pexpect.run(shlex.join([sys.executable, *line]), env=environment, timeout=120)
    assert at_terminal == b"\r\n"
    in_file = subprocess.run([sys.executable, *line], env=environment, capture_output=True, timeout=120)
    assert in_file.stdout == b"\x1b" * 9 + b"\n"


def test_escape_characters_from_a_model_do_not_reach_the_chat(hostile: Path, start: Start) -> None:
    chat = start("--model", str(hostile), "--max-tokens", "9")
    enter(chat, "Hello")
    chat.expect("cut off after 9 tokens")
    assert "\x1b\x1b" not in chat.before


def test_in_a_pipe_each_line_is_a_message_and_only_replies_are_printed(
    folder: Path, environment: dict[str, str]
) -> None:
    data = "Hello there\n\n/set max_tokens 8\nAnd más\n//x\n".encode()
    line = [sys.executable, "-m", "mixtral_mlx", "chat", "--model", str(folder), "--temperature", "0"]
    done = subprocess.run([*line, "--max-tokens", "8"], input=data, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"max_tokens = 8" in done.stderr
    expected = words(folder, "Hello there", "And más", "/x", tokens=8)
    assert expected
    assert re.findall("[A-Za-z]{4,}", done.stdout.decode())[-len(expected) :] == expected


def talk(monkeypatch: pytest.MonkeyPatch, folder: Path, data: bytes, *options: str) -> int:
    """Talk with `data` on stdin; returns the exit code."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return main(["chat", "--model", str(folder), "--temperature", "0", *options])


def test_in_a_pipe_a_bad_line_is_reported_and_the_others_are_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, folder, b"/bogus\n\xff\xfe\nHello\n/edit\n/exit\nnever", "--max-tokens", "3") == 1
    out, err = capsys.readouterr()
    assert re.findall(r"error\[(\w+)\]", err) == ["unknown_command", "not_text", "no_text"]
    assert re.findall("[A-Za-z]{4,}", out) == words(folder, "Hello", tokens=3)


def test_with_one_all_of_the_input_is_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, folder, b"/these are\ntwo lines\n", "--one", "--max-tokens", "8") == 0
    assert re.findall("[A-Za-z]{4,}", capsys.readouterr().out) == words(folder, "/these are\ntwo lines", tokens=8)
