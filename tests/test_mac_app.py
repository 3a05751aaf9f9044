"""The Swift package's recorded conversation: what the helper says today, and what the schema allows.

`python -m tests.test_mac_app` records it anew. Swift itself is run where there is a toolchain."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from .checkpoints import TINY, write_tiny
from .test_helper import FROM_HELPER, HELLO, TO_HELPER, started

PACKAGE = Path(__file__).parent.parent / "examples" / "mac_app"
TRANSCRIPT = PACKAGE / "Tests" / "MixtralKitTests" / "Fixtures" / "transcript.jsonl"
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
_TOOL = {
    "type": "function",
    "function": {"name": "now", "parameters": _NOTHING},
}
Line = tuple[str, dict[str, Any]]


def transcript() -> list[Line]:
    return [line for text in TRANSCRIPT.read_text().splitlines() for line in json.loads(text).items()]


def test_every_recorded_line_is_what_the_schema_says() -> None:
    lines = transcript()
    for direction, message in lines:
        (TO_HELPER if direction == "to" else FROM_HELPER[message["type"]]).validate(message)
    assert {message["type"] for direction, message in lines if direction == "from"} == set(FROM_HELPER)


def test_the_helper_still_speaks_as_it_was_recorded(tmp_path: Path) -> None:
    assert shape(list(spoken(tmp_path))) == shape(transcript())


def test_every_field_that_swift_reads_is_one_the_helper_may_send() -> None:
    """The names of the Swift structs' fields, with their coding keys, are those of the schema."""
    for message_type, struct in _STRUCTS.items():
        fields = _swift_fields(struct)
        known = FROM_HELPER[message_type].schema["$defs"][_NAMES[message_type]]["properties"].keys() - {"type"}
        assert fields <= known, struct
        assert known - fields <= _NOT_READ.get(message_type, set()), struct


_STRUCTS = {
    "hello": "Hello",
    "loading": "Loading",
    "ready": "Ready",
    "state": "ModelState",
    "prompt": "PromptProgress",
    "text": "TextDelta",
    "tool_call": "ToolCallDelta",
    "done": "Done",
    "ok": "Acknowledgement",
    "stats": "Stats",
    "error": "HelperError",
    "bye": "Bye",
}
_NAMES = {"tool_call": "ToolCall"} | {name: name.capitalize() for name in _STRUCTS if name != "tool_call"}
_NOT_READ = {"stats": {"done"}}


def _swift_fields(struct: str) -> set[str]:
    """The JSON names of a struct's fields, read from the source."""
    source = (PACKAGE / "Sources" / "MixtralKit" / "Messages.swift").read_text()
    body = source.partition(f"public struct {struct}:")[2].partition("\n}")[0]
    lines = [line.strip() for line in body.splitlines()]
    renamed = {a: b.strip('"') for line in lines if line.startswith("case ") and "=" in line for a, _, b in [
        line.removeprefix("case ").partition(" = ")
    ]}  # fmt: skip
    names = [line.removeprefix("public var ").partition(":")[0].strip("`") for line in lines if "public var" in line]
    return {renamed.get(name, name) for name in names}


@pytest.mark.long
@pytest.mark.skipif(shutil.which("swift") is None, reason="there is no Swift toolchain")
def test_the_swift_package_builds_and_keeps_its_promises() -> None:
    subprocess.run(["swift", "test"], cwd=PACKAGE, check=True)


def spoken(tmp_path: Path) -> Iterator[Line]:
    """A conversation with the real helper that has every kind of message in it."""
    with_tools = write_tiny(tmp_path / "model", replace(TINY, vocab_size=32768), tokenizer="v3")
    with started() as app:

        def until(*types: str, id: str | None = None) -> Iterator[Line]:
            return (("from", message) for message in app.until(*types, id=id))

        def asked(**message: Any) -> Iterator[Line]:
            app.send(**message)
            yield "to", message
            yield from until("ready", "done", "ok", "stats", "error", id=message["id"])

        yield from until("hello")
        yield from asked(type="chat", id="early", body={"messages": HELLO})
        yield from asked(type="load", id="load", model="demo", context=512)
        yield from asked(type="chat", id="chat", body={"messages": HELLO, "max_tokens": 6, "temperature": 0})
        scored = {"messages": HELLO, "max_tokens": 2, "temperature": 0, "logprobs": True, "top_logprobs": 2}
        yield from asked(type="chat", id="scored", body=scored)
        calls = {"messages": HELLO, "tools": [_TOOL], "tool_choice": "required", "parallel_tool_calls": False}
        yield from asked(type="load", id="other", model=str(with_tools))
        yield from asked(type="chat", id="calls", body={**calls, "temperature": 0, "max_tokens": 60})
        yield from asked(type="load", id="demo", model="demo")
        yield from asked(type="stats", id="stats")
        endless = {"type": "chat", "id": "endless", "body": {"messages": HELLO, "min_tokens": 400, "max_tokens": 400}}
        app.send(**endless)
        yield "to", endless
        yield from until("text")
        cancel = {"type": "cancel", "id": "cancel", "request": "endless"}
        app.send(**cancel)
        yield "to", cancel
        came = app.until("done", "ok")
        came += app.until("done", "ok")  # Either may be the first.
        ends = {message["type"]: message for message in came}
        yield from (("from", message) for message in (ends["ok"], ends["done"]))
        yield from asked(type="memory_pressure", id="pressure", level=4)
        yield from until("state")
        yield from asked(type="unload", id="unload")
        yield from asked(type="shutdown", id="shutdown")
        yield from until("bye")


def shape(lines: list[Line]) -> list[Any]:
    """What must be the same each time: who says what, with which fields. How often progress is told may differ."""
    said = [
        (direction, message["type"], message.get("id"), sorted(message))
        for direction, message in lines
        if message["type"] not in ("loading", "prompt")
    ]
    return [one for one, _ in groupby(said)]


def record(folder: str) -> None:
    """Write the transcript, without what is different each time and long stretches of the same."""
    kept: list[Line] = []
    for direction, message in spoken(Path(folder)):
        steady = message | {name: value for name, value in _STEADY.items() if name in message}
        if "model" in steady and steady["model"] != "demo":
            steady["model"] = "/Users/ada/Library/Application Support/MixtralApp/Models/mixtral-v0.3"
        kind = direction, message["type"], message.get("id")
        same = [one for one in kept if (one[0], one[1]["type"], one[1].get("id")) == kind]
        if len(same) < 8:
            kept.append((direction, steady))
    TRANSCRIPT.write_text("".join(json.dumps({d: m}) + "\n" for d, m in kept))


_STEADY: dict[str, Any] = {
    "pid": 4242,
    "version": "0.1.0",
    "folder": "/Users/ada/Library/Application Support/MixtralApp/Models/demo",
    "budget_bytes": 12_000_000_000,
    "process_bytes": 415_170_560,
    "load_seconds": 0.52,
    "seconds": {"queued": 0.0, "prompt": 0.02, "generation": 0.11},
}

if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        record(folder)
