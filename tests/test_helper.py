"""The helper as apps meet it: a process that is started, spoken to in JSON lines, and always ends in time."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast, get_args

import httpx
import openai
import pytest
from jsonschema import Draft202012Validator

import mixtral_mlx
from mixtral_mlx.helper import messages
from mixtral_mlx.helper.helper import Helper, _Load
from mixtral_mlx.helper.life import end_of
from mixtral_mlx.protocol import PARSERS

from .serving import posted

PACKAGE = Path(mixtral_mlx.__file__).parent
SCHEMA = json.loads((PACKAGE / "helper" / "schema.json").read_text())
WITHIN_S = 3.0
"""What is promised: the helper is gone so soon after its end was asked for, or its parent has gone."""
_PATIENCE_S = 60.0


def validator(direction: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/$defs/{direction}", "$defs": SCHEMA["$defs"]})


FROM_HELPER = {
    SCHEMA["$defs"][cls.__name__]["properties"]["type"]["const"]: validator(cls.__name__)
    for cls in get_args(messages.Outgoing)
}
"""By the type of message, which is many times as fast as to try all."""
TO_HELPER = validator("Incoming")
HELLO: Any = [{"role": "user", "content": "Hello"}]
ENDLESS: Any = {"messages": HELLO, "max_tokens": 900, "min_tokens": 900}
"""A body whose answer takes long enough to do something meanwhile."""
LONG = {"min_tokens": 900, "max_tokens": 900}


class App:
    """A program that has started a helper. Each line it is sent must be what the schema says."""

    def __init__(self, *arguments: str, command: tuple[str, ...] = ("-m", "mixtral_mlx", "helper"), **how: Any) -> None:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, *command, *arguments], bufsize=0, text=False, **pipes
        )
        self.log = b""
        self._begun = b""
        self._lines: list[bytes] = []
        self.ready: dict[str, Any] = {}

    def send(self, **message: Any) -> None:
        TO_HELPER.validate(message)
        self.send_line(json.dumps(message).encode())

    def send_line(self, line: bytes) -> None:
        assert self.process.stdin
        left = memoryview(line + b"\n")
        while left:  # An unbuffered pipe takes what it has room for.
            left = left[os.write(self.process.stdin.fileno(), left) :]

    def next(self, *, within_s: float = _PATIENCE_S) -> dict[str, Any]:
        """The next message."""
        line = self._next_line(time.monotonic() + within_s)
        assert line is not None, f"stdout ended; stderr: {self.log.decode()}"
        return checked(line)

    def until(self, *types: str, id: str | None = None) -> list[dict[str, Any]]:
        """The messages up to the first of these types, and of this id."""
        messages = [self.next()]
        while messages[-1]["type"] not in types or (id and messages[-1].get("id") != id):
            messages.append(self.next())
        return messages

    def ask(self, id: str, **message: Any) -> list[dict[str, Any]]:
        """Send a message; what comes with its id, to its end."""
        self.send(id=id, **message)
        came = self.until("ready", "done", "ok", "stats", "error", id=id)
        return [one for one in came if one.get("id") == id]

    def chat(self, id: str, **body: Any) -> list[dict[str, Any]]:
        return self.ask(id, type="chat", body={"messages": HELLO, "temperature": 0, **body})

    def rest(self) -> list[dict[str, Any]]:
        """All that comes until stdout ends."""
        deadline = time.monotonic() + _PATIENCE_S
        return [checked(line) for line in iter(lambda: self._next_line(deadline), None)]

    def ends(self) -> int:
        """The exit code of a process that ends in time."""
        return self.process.wait(WITHIN_S)

    def _next_line(self, deadline: float) -> bytes | None:
        out, err = self.process.stdout, self.process.stderr
        assert out
        while not self._lines:
            ready = select.select([out, *([err] if err else [])], [], [], max(deadline - time.monotonic(), 0))[0]
            assert ready, f"nothing came in time; stderr: {self.log.decode()}"
            if err in ready:
                self.log += (data := os.read(err.fileno(), 1 << 16))
                err = err if data else None
            if out in ready:
                data = os.read(out.fileno(), 1 << 16)
                if not data:
                    assert self._begun == b"", "a line was cut"
                    return None
                *self._lines, self._begun = (self._begun + data).split(b"\n")
        return self._lines.pop(0)


def checked(line: bytes) -> dict[str, Any]:
    message = json.loads(line)
    FROM_HELPER[message["type"]].validate(message)
    assert line.isascii()
    return message


@contextmanager
def started(*arguments: str, **how: Any) -> Iterator[App]:
    app = App(*arguments, **how)
    try:
        yield app
    finally:
        app.process.kill()
        app.process.wait()
        for pipe in (app.process.stdin, app.process.stdout, app.process.stderr):
            if pipe:
                pipe.close()


@contextmanager
def loaded(*arguments: str, **how: Any) -> Iterator[App]:
    with started("--model", "demo", *arguments, **how) as app:
        app.ready = app.until("ready")[-1]
        yield app


@pytest.fixture(scope="module")
def shared() -> Iterator[App]:
    """A helper with the demo model, for what leaves it as it was."""
    with loaded() as app:
        yield app


def text(came: list[dict[str, Any]]) -> str:
    return "".join(one["text"] for one in came if one["type"] == "text")


# The messages.


def test_the_schema_in_the_package_is_that_of_the_messages() -> None:
    """Written anew by: python -m mixtral_mlx.helper.messages > mixtral_mlx/helper/schema.json"""
    Draft202012Validator.check_schema(SCHEMA)
    assert len(SCHEMA["$defs"]["Outgoing"]["oneOf"]) == len(FROM_HELPER)
    assert messages.schema() == SCHEMA


def test_the_guide_names_every_message_and_its_links_lead_somewhere() -> None:
    guide = (PACKAGE.parent / "docs" / "EMBEDDING.md").read_text()
    for direction in ("Incoming", "Outgoing"):
        for reference in SCHEMA["$defs"][direction]["oneOf"]:
            kind = SCHEMA["$defs"][reference["$ref"].rpartition("/")[2]]["properties"]["type"]["const"]
            assert f"`{kind}`" in guide or f'"{kind}"' in guide
    for link in re.findall(r"\]\((?!http)([^)#]+)", guide):
        assert (PACKAGE.parent / "docs" / link).exists(), link


def test_the_first_line_says_who_speaks() -> None:
    with started() as app:
        assert app.next() == {
            "type": "hello",
            "protocol": 1,
            "version": mixtral_mlx.__version__,
            "pid": app.process.pid,
        }


def test_a_chat_is_streamed_and_is_what_the_engine_says(shared: App) -> None:
    came = shared.chat("chat", max_tokens=12)
    assert {one["type"] for one in came[:-1]} == {"prompt", "text"}
    done = came[-1]
    with mixtral_mlx.load() as engine:
        result = engine.chat("Hello", max_tokens=12).result()
    assert text(came) == result.text
    assert done["finish_reasons"] == [result.finish_reason]
    assert done["usage"]["completion_tokens"] == len(result.tokens)
    assert done["usage"]["prompt_tokens"] == result.usage.prompt_tokens


def test_two_chats_at_once_take_turns_and_say_what_each_says_alone(shared: App) -> None:
    bodies = {
        name: {
            "messages": [{"role": "user", "content": f"Count to {name}"}],
            "max_tokens": 40,
            "min_tokens": 40,
            "temperature": 0,
        }
        for name in ("two", "ten")
    }
    alone = {name: text(shared.ask(f"alone-{name}", type="chat", body=body)) for name, body in bodies.items()}
    for name, body in bodies.items():
        shared.send(type="chat", id=name, body=body)
    came = shared.until("done")
    first = came[-1]["id"]
    assert {one["id"] for one in came} == set(bodies)
    came += shared.until("done")
    assert came[-1]["id"] == ({*bodies} - {first}).pop()
    assert {name: text([one for one in came if one["id"] == name]) for name in bodies} == alone


def test_a_cancelled_chat_ends_at_once_and_the_next_is_answered(shared: App) -> None:
    shared.send(type="chat", id="endless", body=ENDLESS)
    shared.until("text")
    shared.send(type="cancel", id="stop", request="endless")
    came = shared.until("done", id="endless")
    assert came[-1]["finish_reasons"] == ["cancelled"]
    assert came[-1]["usage"]["completion_tokens"] < 900
    if not any(one.get("id") == "stop" for one in came):
        assert shared.next() == {"type": "ok", "id": "stop"}
    assert shared.chat("after", max_tokens=2)[-1]["type"] == "done"


def test_of_more_chats_than_are_taken_each_ends_once_and_all_can_be_stopped() -> None:
    chats = [f"chat-{number}" for number in range(300)]
    cancels = [f"cancel-{number}" for number in range(300)]
    with loaded() as app:
        for id in chats:
            app.send(type="chat", id=id, body=ENDLESS)
        for id, request in zip(cancels, chats, strict=True):
            app.send(type="cancel", id=id, request=request)
        ended: list[dict[str, Any]] = []
        while len(ended) < 600:
            message = app.next()
            ended += [message] if message["type"] in ("done", "ok", "error") else []
        app.send(type="shutdown", id="end")
        assert [one["type"] for one in app.rest() if one["type"] not in ("text", "prompt")] == ["ok", "bye"]
    assert sorted(one["id"] for one in ended) == sorted(chats + cancels)
    assert {one["code"] for one in ended if one["type"] == "error"} == {"queue_full"}
    assert {reason for one in ended if one["type"] == "done" for reason in one["finish_reasons"]} == {"cancelled"}


def test_cancelling_what_has_ended_is_no_mistake(shared: App) -> None:
    assert shared.ask("late", type="cancel", request="gone") == [{"type": "ok", "id": "late"}]


def test_logprobs_come_with_the_text_they_belong_to(shared: App) -> None:
    came = shared.chat("scores", max_tokens=5, logprobs=True, top_logprobs=3)
    tokens = [token for one in came if one["type"] == "text" for token in one["tokens"]]
    assert len(tokens) == 5
    assert "".join(token["text"] for token in tokens) == text(came)
    for token in tokens:
        assert len(token["top_logprobs"]) == 3
        assert token["logprob"] == pytest.approx(token["top_logprobs"][0]["logprob"])  # The likeliest was taken.


def test_likely_tokens_are_written_as_over_http(shared: App) -> None:
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 5, "logprobs": True, "top_logprobs": 20}
    came = shared.ask("likely", type="chat", body=body)
    tokens = [token for one in came if one["type"] == "text" for token in one["tokens"]]
    with mixtral_mlx.load() as engine:
        call = PARSERS["/v1/chat/completions"](body, engine)
        answer = call.answer([engine.submit(call.asked[0][0]).result()])
    expected = [entry["top_logprobs"] for entry in answer["choices"][0]["logprobs"]["content"]]
    likely = [[other["text"] for other in token["top_logprobs"]] for token in tokens]
    assert likely == [[other["token"] for other in entry] for entry in expected]
    assert any(text.startswith(" ") for text in likely[1])


def test_statistics_count_what_was_done() -> None:
    with loaded() as app:
        before = app.ask("1", type="stats")[0]
        app.chat("2", max_tokens=7, min_tokens=7)
        after = app.ask("3", type="stats")[0]
        deadline = time.monotonic() + _PATIENCE_S
        while not after["done"]["requests"]["finished"]:  # Counted a moment after the last token was sent.
            assert time.monotonic() < deadline
            after = app.ask("4", type="stats")[0]
    assert before["state"] == after["state"] == "ready"
    assert (before["done"]["requests"]["finished"], after["done"]["requests"]["finished"]) == (0, 1)
    assert after["done"]["requests"]["generated_tokens"] == 7
    assert after["memory"]["process_bytes"] > 0
    assert after["log_lines_dropped"] == 0


# Models.


def test_a_model_is_loaded_with_progress_replaced_and_let_go_of() -> None:
    with started() as app:
        app.next()
        assert app.chat("0")[-1]["code"] == "not_loaded"
        came = app.ask("1", type="load", model="demo", context=256)
        progress = [one for one in came if one["type"] == "loading"]
        assert progress[-1]["done_bytes"] == progress[-1]["total_bytes"] > 0
        assert (came[-1]["type"], came[-1]["context"]) == ("ready", 256)
        assert app.ask("2", type="load", model="demo", context=128)[-1]["context"] == 128
        assert app.ask("3", type="unload") == [{"type": "ok", "id": "3"}]
        assert app.ask("4", type="stats")[0]["state"] == "no_model"
        assert app.chat("5")[-1]["code"] == "not_loaded"


def test_what_cannot_be_loaded_is_an_error_and_the_helper_goes_on(tmp_path: Path) -> None:
    with started() as app:
        app.next()
        for id, model, code in (
            ("1", str(tmp_path / "nothing"), "no_model"),
            ("2", str(tmp_path), "no_config"),
            ("3", "\0", "no_model"),
        ):
            error = app.ask(id, type="load", model=model)[-1]
            assert (error["type"], error["id"], error["retryable"]) == ("error", id, False)
            assert error["code"] == code, error
        assert app.ask("4", type="stats")[0]["state"] == "no_model"


def test_a_bad_model_on_the_command_line_is_an_error_without_an_id() -> None:
    with started("--model", "nowhere/") as app:
        error = app.until("error")[-1]
        assert (error["code"], error.get("id")) == ("no_model", None)
        assert app.ask("1", type="load", model="demo")[-1]["type"] == "ready"


def test_a_model_can_be_replaced_as_soon_as_its_last_answer_has_ended() -> None:
    with loaded() as app:
        for number in range(3):
            assert app.chat(f"chat-{number}", max_tokens=2)[-1]["type"] == "done"
            assert app.ask(f"load-{number}", type="load", model="demo")[-1]["type"] == "ready"


def test_a_model_in_use_is_neither_replaced_nor_let_go_of(shared: App) -> None:
    shared.send(type="chat", id="endless", body=ENDLESS)
    shared.until("text")
    for id, asked in (("load", {"type": "load", "model": "demo"}), ("unload", {"type": "unload"})):
        error = shared.ask(id, **asked)[-1]
        assert (error["code"], error["retryable"]) == ("busy", True)
    shared.send(type="cancel", id="stop", request="endless")
    assert shared.until("done", id="endless")[-1]["finish_reasons"] == ["cancelled"]
    assert shared.chat("after-busy", max_tokens=1)[-1]["type"] == "done"


@contextmanager
def silent_hub() -> Iterator[dict[str, str]]:
    """An environment in which Hugging Face is a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}


def test_a_load_that_hangs_can_be_cancelled_and_hinders_nothing() -> None:
    with silent_hub() as environment, started(env=environment) as app:
        app.next()
        app.send(type="load", id="1", model="some/model")
        assert app.ask("2", type="stats")[0]["state"] == "loading"
        assert app.ask("3", type="load", model="demo")[-1]["code"] == "busy"
        app.send(type="cancel", id="4", request="1")
        came = app.until("error", id="1")
        assert came[-1]["code"] == "cancelled"
        assert app.ask("5", type="load", model="demo")[-1]["type"] == "ready"


# Memory pressure.


def test_pressure_drops_kept_prompts_then_the_idle_model_which_comes_back() -> None:
    with loaded() as app:
        app.chat("1", max_tokens=2)
        assert app.ask("2", type="stats")[0]["memory"]["prefix_bytes"] > 0
        assert app.ask("3", type="memory_pressure", level=1)[-1]["type"] == "ok"
        assert app.ask("4", type="stats")[0]["memory"]["prefix_bytes"] > 0
        assert app.ask("5", type="memory_pressure", level=2)[-1]["type"] == "ok"
        stats = app.ask("6", type="stats")[0]
        assert (stats["memory"]["prefix_bytes"], stats["state"]) == (0, "ready")
        app.send(type="memory_pressure", id="7", level=4)
        came = app.until("state")
        assert came[-1]["state"] == "unloaded"
        assert app.ask("8", type="stats")[0]["memory"]["weights_bytes"] == 0
        app.send(type="chat", id="9", body={"messages": HELLO, "max_tokens": 2})
        came = app.until("done")
        assert [one.get("id") for one in came if one["type"] == "loading"][-1] is None
        assert came[-1]["finish_reasons"] == ["length"]


def test_critical_pressure_lets_a_running_answer_end_first() -> None:
    with loaded() as app:
        app.send(type="chat", id="1", body={"messages": HELLO, "max_tokens": 100, "min_tokens": 100})
        app.until("text")
        app.send(type="memory_pressure", id="2", level=4)
        came = app.until("done")
        assert came[-1]["usage"]["completion_tokens"] == 100
        assert "unloaded" not in {one.get("state") for one in came}
        assert app.until("state")[-1]["state"] == "unloaded"


# Lines that are no messages.


@pytest.mark.parametrize(
    ("line", "code", "id"),
    [
        (b"nonsense", "not_json", None),
        (b"[1, 2]", "not_json", None),
        (b"\xff\xfe", "not_utf8", None),
        (b'{"type":"stats","id":"a","id":NaN}', "not_json", None),
        (b"[" * 100_000, "not_json", None),
        (b'{"id":"a","type":' + b"9" * 5000 + b"}", "not_json", None),
        (b'{"id":"a"}', "unknown_type", "a"),
        (b'{"type":"dance","id":"a"}', "unknown_type", "a"),
        (b'{"type":["stats"],"id":"a"}', "unknown_type", "a"),
        (b'{"type":"stats"}', "bad_message", None),
        (b'{"type":"stats","id":7}', "bad_message", None),
        (b'{"type":"stats","id":""}', "bad_message", None),
        (b'{"type":"stats","id":"a b"}', "bad_message", None),
        (b'{"type":"stats","id":"\\ud800"}', "bad_message", None),
        (b'{"type":"stats","id":"a","colour":1}', "bad_message", "a"),
        (b'{"type":"chat","id":"a"}', "bad_message", "a"),
        (b'{"type":"chat","id":"a","body":[]}', "bad_message", "a"),
        (b'{"type":"load","id":"a","model":"demo","kv_bits":3}', "bad_message", "a"),
        (b'{"type":"load","id":"a","model":"demo","deterministic":1}', "bad_message", "a"),
        (b'{"type":"memory_pressure","id":"a","level":3}', "bad_message", "a"),
    ],
)
def test_a_line_that_is_no_message_is_refused_and_nothing_is_lost(
    shared: App, line: bytes, code: str, id: str | None
) -> None:
    shared.send(type="stats", id="before")
    shared.send_line(line)
    shared.send(type="stats", id="after")
    came = [*shared.until("stats", id="after")]
    assert [one["type"] for one in came] == ["stats", "error", "stats"]
    assert (came[1]["code"], came[1].get("id")) == (code, id)
    with suppress(ValueError, RecursionError):
        assert not TO_HELPER.is_valid(json.loads(line)), "the schema takes what the helper refuses"


def test_an_unknown_field_is_named(shared: App) -> None:
    shared.send_line(b'{"type":"stats","id":"a","colour":1}')
    assert '"colour"' in shared.next()["message"]


def test_a_line_longer_than_is_taken_is_skipped_to_its_end(shared: App) -> None:
    shared.send_line(b'{"type":"stats","id":"' + b"a" * messages.MOST_LINE_BYTES + b'"}')
    assert shared.next()["code"] == "line_too_long"
    assert shared.ask("after-long", type="stats")[-1]["type"] == "stats"


def test_empty_lines_and_those_of_windows_are_no_mistakes(shared: App) -> None:
    shared.send_line(b"\r\n\n\r")
    shared.send_line(b'{"type":"cancel","id":"crlf","request":"none"}\r')
    assert shared.next() == {"type": "ok", "id": "crlf"}


def test_an_id_in_use_is_refused_and_its_owner_goes_on(shared: App) -> None:
    shared.send(type="chat", id="twin", body=ENDLESS)
    shared.until("text")
    shared.send(type="stats", id="twin")
    error = shared.until("error")[-1]
    assert (error["code"], error["line_id"], error.get("id")) == ("id_in_use", "twin", None)
    shared.send(type="cancel", id="stop-twin", request="twin")
    assert shared.until("done", id="twin")[-1]["finish_reasons"] == ["cancelled"]
    assert shared.ask("twin", type="stats")[-1]["type"] == "stats"


def test_a_refused_chat_says_why_and_harms_no_other(shared: App) -> None:
    shared.send(type="chat", id="good", body=ENDLESS)
    shared.until("text")
    for id, body in (
        ("empty", {}),
        ("field", {"messages": HELLO, "colour": "red"}),
        ("range", {"messages": HELLO, "temperature": -1}),
        ("long", {"messages": [{"role": "user", "content": "word " * 5000}]}),
    ):
        error = shared.ask(id, type="chat", body=body)[-1]
        assert error["type"] == "error", body
        assert error["message"]
    shared.send(type="cancel", id="stop-good", request="good")
    assert shared.until("done", id="good")[-1]["finish_reasons"] == ["cancelled"]


# stdout and stderr.

_NOISY = """
import ctypes, os, subprocess, sys, warnings
from mixtral_mlx.engine import engine
load, libc = engine.load, ctypes.CDLL(None)
def noisy(*args, **how):
    print("from print")
    sys.__stdout__.write("from the first stdout\\n"); sys.__stdout__.flush()
    os.write(1, b"from write\\n")
    libc.puts(b"from C"); libc.fflush(None)
    subprocess.run(["echo", "from a child"])
    warnings.warn("from a warning")
    print("stdin has", len(sys.stdin.read()), file=sys.stderr)
    return load(*args, **how)
engine.load = noisy
from mixtral_mlx.cli import main
main(["helper", *sys.argv[1:]])
"""


def test_nothing_but_messages_ever_reaches_stdout() -> None:
    with started(command=("-c", _NOISY)) as app:
        app.next()
        assert app.ask("1", type="load", model="demo")[-1]["type"] == "ready"
        app.send(type="shutdown", id="2")
        app.rest()  # Each line is a message.
        assert app.process.stderr
        log = (app.log + app.process.stderr.read()).decode()
    for said in ("print", "the first stdout", "write", "C", "a child", "a warning"):
        assert f"from {said}\n" in log
    assert "stdin has 0\n" in log


def _flooded(app: App, megabytes: float, *, read: bool) -> None:
    """Make the helper log so much, by questions whose answers are read or not."""
    line = json.dumps({"type": "cancel", "id": "a", "request": "b"}).encode()
    # It logs each message that comes, and each that goes: 90 bytes.
    for number in range(int(megabytes * 1e6 / 90 / 100)):
        app.send_line(b"\n".join([line.replace(b'"a"', b'"%d"' % (number * 100 + k)) for k in range(100)]))
        while read and not app.next()["id"].endswith("99"):
            pass


@pytest.mark.parametrize("megabytes", [1, pytest.param(10, marks=pytest.mark.long)])
def test_an_unread_stderr_holds_nothing_up(megabytes: float) -> None:
    with started("--log", "debug") as app:
        app.next()
        assert app.process.stderr
        unread, app.process.stderr = app.process.stderr, None
        _flooded(app, megabytes, read=True)
        stats = app.ask("stats", type="stats")[-1]
        assert stats["log_lines_dropped"] > 1000
        began = time.monotonic()
        app.send(type="shutdown", id="end")
        assert [one["type"] for one in app.rest()] == ["ok", "bye"]
        assert app.ends() == 0
        assert time.monotonic() - began < WITHIN_S
        unread.close()


@pytest.mark.parametrize("megabytes", [1, pytest.param(10, marks=pytest.mark.long)])
def test_an_unread_log_says_how_much_of_it_is_missing_once_it_is_read(megabytes: float) -> None:
    with started("--log", "debug") as app:
        app.next()
        assert app.process.stderr
        unread, app.process.stderr = app.process.stderr, None
        _flooded(app, megabytes, read=True)
        app.process.stderr = unread
        app.ask("read", type="stats")
        while b"lines of log were not read in time" not in app.log:
            app.ask("more", type="stats")


def test_an_unread_stdout_holds_up_neither_the_end_nor_memory() -> None:
    """Answers wait in a queue of 1 MB, and then nothing more is read: the parent's own pipe fills up."""
    with started() as app:
        app.next()
        assert app.process.stdin
        os.set_blocking(app.process.stdin.fileno(), False)
        lines = b"".join(b'{"type":"stats","id":"%d"}\n' % number for number in range(1000))
        written = stuck = 0
        deadline = time.monotonic() + _PATIENCE_S
        while stuck < 5:
            assert time.monotonic() < deadline
            assert written < 10_000_000, "10 MB of questions were taken, though no answer was read"
            if select.select([], [app.process.stdin], [], 0.1)[1]:
                written += os.write(app.process.stdin.fileno(), lines[written % len(lines) :])
                stuck = 0
            else:
                stuck += 1
        app.process.stdin.close()
        app.process.stdin = None
        assert app.ends() == 0


def test_what_waited_for_a_slow_reader_comes_in_full_and_in_order() -> None:
    """Each refusal is some 200 bytes: twice as much as may wait, so the questions wait too."""
    count, question = 10_000, '{"type":"nonsense","id":"%d"}'
    with started() as app:
        app.next()
        asking = f"for number in range({count}): print({question!r} % number)"
        writer = subprocess.Popen([sys.executable, "-c", asking], stdout=app.process.stdin)
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(2)  # It is held up, for as long as nobody reads.
        answered = [app.next()["id"] for _ in range(count)]
        assert writer.wait() == 0
    assert answered == [str(number) for number in range(count)]


# The HTTP API beside it.


def test_serve_opens_the_api_with_a_key_of_its_own_until_the_end() -> None:
    with started("--serve") as app, started("--serve") as other:
        serving = [one.ask("1", type="load", model="demo")[-1]["serving"] for one in (app, other)]
        assert serving[0]["url"] != serving[1]["url"]
        assert serving[0]["key"] != serving[1]["key"]
        url, key = serving[0]["url"], serving[0]["key"]
        assert url.startswith("http://127.0.0.1:")
        with (
            openai.OpenAI(base_url=url + "/v1", api_key="guessed", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
        with openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0) as client:
            said = client.chat.completions.create(model="demo", messages=HELLO, max_tokens=8, temperature=0)
            assert said.choices[0].message.content == text(app.chat("2", max_tokens=8))
            assert app.ask("3", type="unload")[-1]["type"] == "ok"
            with pytest.raises(openai.InternalServerError):
                client.chat.completions.create(model="demo", messages=HELLO)
            app.ask("4", type="load", model="demo")
            chunks = client.chat.completions.create(model="demo", messages=HELLO, stream=True, extra_body=LONG)
            next(iter(chunks))
            app.send(type="shutdown", id="5")
            with suppress(openai.APIError):
                list(chunks)
        assert app.ends() == 0


def test_over_http_a_helper_without_a_model_says_so(tmp_path: Path) -> None:
    with silent_hub() as environment, loaded("--serve", env=environment) as app:
        url, key = app.ready["serving"]["url"], app.ready["serving"]["key"]

        def health() -> Any:
            return httpx.get(f"{url}/health").json()

        assert health() == {"status": "ok", "state": "ready"}
        assert app.ask("1", type="unload")[-1]["type"] == "ok"
        assert health() == {"status": "no_model"}
        app.send(type="load", id="hangs", model="some/model")
        assert app.ask("2", type="stats")[0]["state"] == "loading"
        deadline = time.monotonic() + _PATIENCE_S
        while health() != {"status": "loading", "done_bytes": 0, "total_bytes": 0}:
            assert time.monotonic() < deadline
        app.send(type="cancel", id="stop", request="hangs")
        assert app.until("error", id="hangs")[-1]["code"] == "cancelled"
        assert health() == {"status": "no_model"}
        assert app.ask("3", type="load", model="demo")[-1]["type"] == "ready"
        assert app.ask("4", type="load", model=str(tmp_path))[-1]["code"] == "no_config"
        answer = httpx.get(f"{url}/v1/models", headers={"x-api-key": key})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_model")


def test_over_http_as_many_requests_are_taken_as_may_run_and_wait() -> None:
    with loaded("--serve", "--max-queue", "150", "--max-concurrent", "2") as app, ExitStack() as clients:
        serving = app.ready["serving"]
        port, key = int(serving["url"].rpartition(":")[2]), serving["key"]
        for _ in range(140):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            client.sendall(posted(ENDLESS, headers=f"x-api-key: {key}\r\n"))
        deadline = time.monotonic() + _PATIENCE_S
        while (stats := app.ask("many", type="stats")[0])["running"] + stats["queued"] < 140:
            assert time.monotonic() < deadline, stats


# The end.


def test_shutdown_ends_what_runs_and_says_so_last() -> None:
    with loaded() as app:
        app.send(type="chat", id="1", body=ENDLESS)
        app.until("text")
        began = time.monotonic()
        app.send(type="shutdown", id="2")
        came = app.rest()
        assert app.ends() == 0
        assert time.monotonic() - began < WITHIN_S
    ended = {one["id"]: one for one in came if one["type"] in ("done", "ok", "error")}
    assert ended["1"]["finish_reasons"] == ["cancelled"]
    assert ended["2"]["type"] == "ok"
    assert came[-1] == {"type": "bye", "reason": "shutdown"}


def _begin_idle(app: App) -> None:
    app.until("hello")


def _begin_loading(app: App) -> None:
    app.until("hello")
    app.send(type="load", id="load", model="some/model")


def _begin_generating(app: App) -> None:
    app.until("hello")
    app.ask("load", type="load", model="demo")
    app.send(type="chat", id="chat", body=ENDLESS)
    app.until("text")


def _begin_stuck(app: App) -> None:
    """So much is answered and not read that the helper waits to write, and reads no more."""
    app.until("hello")
    line = b'{"type":"nonsense","id":"' + b"a" * 60 + b'"}\n'
    assert app.process.stdin
    os.set_blocking(app.process.stdin.fileno(), False)
    while select.select([], [app.process.stdin], [], 0.5)[1]:
        with suppress(BlockingIOError):
            os.write(app.process.stdin.fileno(), line * 100)


STATES = {
    "idle": _begin_idle,
    "loading": _begin_loading,
    "generating": _begin_generating,
    "stuck": _begin_stuck,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("end", ["stdin", "stdout", "sigterm"])
def test_the_helper_ends_in_time_in_every_state(state: str, end: str) -> None:
    """When stdin ends, when nobody will read stdout, and when it is told to."""
    with silent_hub() as environment, started(env=environment) as app:
        STATES[state](app)
        stdin, stdout = app.process.stdin, app.process.stdout
        assert stdin
        assert stdout
        if end == "stdin":
            stdin.close()
        elif end == "stdout":
            stdout.close()
        else:
            app.process.send_signal(signal.SIGTERM)
        assert app.ends() == 0


def test_a_second_sigterm_ends_it_at_once() -> None:
    with loaded() as app:
        app.send(type="chat", id="1", body=ENDLESS)
        app.until("text")
        app.process.send_signal(signal.SIGTERM)
        app.process.send_signal(signal.SIGTERM)
        assert app.ends() == 0


def test_ctrl_c_in_its_parents_terminal_is_for_the_parent(shared: App) -> None:
    shared.send(type="chat", id="interrupted", body={"messages": HELLO, "max_tokens": 60, "min_tokens": 60})
    shared.until("text")
    shared.process.send_signal(signal.SIGINT)
    assert shared.until("done", id="interrupted")[-1]["finish_reasons"] == ["length"]
    assert shared.ask("after-interrupt", type="stats")[-1]["state"] == "ready"


def test_ctrl_c_in_a_terminal_of_its_own_ends_it() -> None:
    ours, its = pty.openpty()
    with started(stdin=its) as app:
        app.next()
        app.process.send_signal(signal.SIGINT)
        assert app.rest() == [{"type": "bye", "reason": "signal"}]
        assert app.ends() == 0
    os.close(ours)
    os.close(its)


def test_it_ends_with_another_process_that_is_named() -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with started("--parent-pid", str(other.pid)) as app:
        app.next()
        assert app.ask("1", type="cancel", request="none")[-1]["type"] == "ok"
        other.kill()  # It is not waited for: what has ended may stay a zombie for long.
        assert app.rest() == [{"type": "bye", "reason": "parent_gone"}]
        assert app.ends() == 0
        other.communicate()
    with started("--parent-pid", str(other.pid)) as app:  # It has ended before.
        assert app.rest()[-1] == {"type": "bye", "reason": "parent_gone"}
        assert app.ends() == 0


_PARENT = """
import os, sys
sys.path.insert(0, os.environ["TESTS_IN"])
from tests.test_helper import STATES, App
app = App()
STATES[sys.argv[1]](app)
print(app.process.pid, flush=True)
sys.stdin.read()
"""


def _killed_parent_leaves_nothing(state: str) -> None:
    """A parent is killed, while its standard streams stay open in somebody else's hands."""
    with silent_hub() as environment:
        environment["TESTS_IN"] = str(Path(__file__).parent.parent)
        parent = subprocess.Popen(
            [sys.executable, "-c", _PARENT, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert parent.stdin
        assert parent.stdout
        helper = int(parent.stdout.readline())
        watched = end_of(helper)
        assert watched is not None
        parent.kill()
        ended = select.select([watched], [], [], WITHIN_S)[0]
        parent.wait()
        parent.stdin.close()
        parent.stdout.close()
        if not ended:
            os.kill(helper, signal.SIGKILL)
        assert ended, f"the helper is an orphan, in the state {state}"


@pytest.mark.parametrize("state", STATES)
def test_a_killed_parent_leaves_no_orphan(state: str) -> None:
    _killed_parent_leaves_nothing(state)


@pytest.mark.long
@pytest.mark.parametrize("state", STATES)
def test_fifty_killed_parents_leave_no_orphan(state: str) -> None:
    for _ in range(13):  # In each of four states.
        _killed_parent_leaves_nothing(state)


def test_what_goes_wrong_with_kept_prompts_later_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def warned(*_: Any, on_warning: Callable[[str], None], **__: Any) -> mixtral_mlx.Engine:
        on_warning("The prompt cache in /kept cannot be written to.")
        raise mixtral_mlx.MixtralError("Stopped.", code="cancelled")

    async def loaded() -> None:
        _Load("1", "demo", cast(Helper, None)).run({})

    monkeypatch.setattr("mixtral_mlx.engine.engine.load", warned)
    with pytest.raises(mixtral_mlx.MixtralError, match="Stopped"):
        asyncio.run(loaded())
    assert caplog.messages == ["The prompt cache in /kept cannot be written to."]
