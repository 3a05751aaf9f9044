"""A side's process seen from outside: start it, ask it, end it. The protocol is described in `worker.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from typing import Any, BinaryIO

from ..config import MixtralError

_PATIENCE_S = 10.0


class BenchError(MixtralError):
    """A benchmark that cannot be run, read or compared."""


class SideError(BenchError):
    """A side that cannot load (`at_start`), died, or cannot do what it was asked."""

    def __init__(self, message: str, *, code: str, hint: str = "", at_start: bool = False) -> None:
        super().__init__(message, code=code, hint=hint)
        self.at_start = at_start


@dataclass(frozen=True)
class Memory:
    """How a side keeps to its budget: with all experts "resident", or "streamed" through slots in each layer."""

    mode: str
    budget_bytes: int
    slots_per_layer: float


@dataclass(frozen=True)
class Ready:
    """What a worker says of itself when its model is loaded."""

    engine: str
    version: str
    dtype: str
    load_s: float
    memory: Memory | None = None

    @property
    def streams(self) -> bool:
        """Whether experts are read while it runs."""
        return self.memory is not None and self.memory.mode == "streamed"


@dataclass(frozen=True)
class Streamed:
    """What streaming experts took while tokens were made, counted as in `experts.Statistics`."""

    hits: float
    misses: float
    ahead_reads: float
    ahead_used: float
    bytes_read: float
    io_s: float
    stall_s: float


class Worker:
    """A worker's process; starting one waits until its model is loaded. Raises `SideError`."""

    def __init__(self, name: str, command: Sequence[str], *, is_shared: bool = False) -> None:
        self.name = name
        self.is_shared = is_shared
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self.started = time.perf_counter()
        with ExitStack() as on_failure:
            on_failure.callback(self._errors.close)
            self._process = _started(name, command, self._errors)
            on_failure.callback(self.kill)
            self.ready = self._hello()
            on_failure.pop_all()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The answer to a request; raises `SideError` where the side cannot or dies."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # What ended it is said by the missing answer.
            self._process.stdin.write(json.dumps({"op": op, **request}).encode() + b"\n")
            self._process.stdin.flush()
        answered = self._answer()
        if "unsupported" in answered:
            raise SideError(_one_line(answered["unsupported"]), code="unsupported")
        return answered

    def number(self, name: str, op: str, **request: Any) -> float:
        """One number of the answer to a request."""
        return self._number(name, op, self.ask(op, **request))

    def decode(self, **request: Any) -> tuple[float, Streamed | None]:
        """Seconds for the steps of a request to make tokens, and what streaming took in them, if it said so."""
        answered = self.ask("decode", **request)
        return self._number("seconds", "decode", answered), self._streamed(answered.get("streamed"))

    def _number(self, name: str, op: str, answered: dict[str, Any]) -> float:
        value = answered.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise SideError(f"{self.name} answered {op} with {name} {value!r}", code="bad_answer")
        return float(value)

    def _streamed(self, said: Any) -> Streamed | None:
        try:
            return said and Streamed(**{field.name: float(said[field.name]) for field in fields(Streamed)})
        except (KeyError, TypeError, ValueError):
            message = f"{self.name} answered decode with streamed {str(said)[:80]}"
            raise SideError(message, code="bad_answer") from None

    def close(self) -> None:
        """End the process, in order if it will."""
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            if self._process.stdin:
                self._process.stdin.write(b'{"op": "exit"}\n')
                self._process.stdin.close()
            self._process.wait(_PATIENCE_S)
        self.kill()

    def kill(self) -> None:
        """End the process, and what it started, now."""
        end(self._process)
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(BrokenPipeError):
                if pipe:
                    pipe.close()

    def _hello(self) -> Ready:
        said = self._answer(at_start=True)
        try:
            words = str(said["engine"]), str(said["version"]), str(said["dtype"])
            return Ready(*words, float(said["load_s"]), _memory(said.get("memory")))
        except (KeyError, TypeError, ValueError):
            raise SideError(f"{self.name} began with {str(said)[:80]}", code="bad_answer", at_start=True) from None

    def _answer(self, *, at_start: bool = False) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            # A library that found a way around the worker's care is no reason to stop.
            with suppress(ValueError):
                if isinstance(parsed := json.loads(line), dict):
                    _raise_error(parsed.get("error"), at_start=at_start)
                    return parsed
        status = self._process.wait()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with exit code {status}"
        raise SideError(f"{self.name} {how}{last_words(self._errors)}", code="side_died", at_start=at_start)


def _raise_error(said: Any, *, at_start: bool) -> None:
    if isinstance(said, dict):
        message, hint = _one_line(said.get("message", "")), str(said.get("hint", ""))
        raise SideError(message, code=str(said.get("code", "cannot_load")), hint=hint, at_start=at_start)


def _memory(said: Any) -> Memory | None:
    return said and Memory(str(said["mode"]), int(said["budget_bytes"]), float(said["slots_per_layer"]))


def _started(name: str, command: Sequence[str], errors: BinaryIO) -> subprocess.Popen[bytes]:
    try:
        # Out of reach of the terminal's Ctrl-C: this process decides when the other ends.
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
    except OSError as error:
        raise SideError(f"{name} cannot be started: {error}", code="cannot_start", at_start=True) from None


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its own session, with all of its children."""
    if process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_words(errors: BinaryIO) -> str:
    """The last line a process wrote to stderr, to be put after a sentence."""
    errors.seek(0)
    lines = [line for line in errors.read()[-4096:].decode(errors="replace").splitlines() if line.strip()]
    return f": {_one_line(lines[-1])}" if lines else ""


def first_token_s(name: str, command: Sequence[str], header: str = "") -> float:
    """Seconds from starting a command line to the first character of text it writes to stdout.

    The characters of `header` may come before the text, and do not count."""
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = _started(name, command, errors)
        assert process.stdout
        assert process.stdin
        process.stdin.close()
        try:
            while (came := process.stdout.read(1)) and came in header.encode():
                pass
            seconds = time.perf_counter() - start
            if not came:
                raise SideError(f"{name} ended without a token{last_words(errors)}", code="side_died")
            process.stdout.read()
            process.wait()
        finally:
            end(process)
            process.stdout.close()
    return seconds


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())[:200].rstrip(".")
