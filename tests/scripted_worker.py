"""A side of a benchmark that only says what it is told to: `scripted_worker.py NAME LOG [HABIT]`.

It speaks the protocol with made-up times (10 ms for each token of a prompt, 20 ms for each step of a sequence), writes
what it was asked into LOG, and may have one habit, most of them bad."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def seconds(request: dict[str, Any]) -> float:
    if request["op"] == "prompt":
        return 0.01 * request["tokens"]
    return 0.02 * request["tokens"] * request["batch"]


def misbehave(habit: str, request: dict[str, Any]) -> None:
    if habit == "prints":
        print("a library says hello\n[1, 2]\n{", flush=True)
    if request["op"] != "decode":
        return
    if habit == "dies":
        sys.exit("out of something\n")
    if habit == "interrupts" and request["tokens"] > 1:
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()


def streamed(request: dict[str, Any]) -> dict[str, float]:
    """For each token 6 experts that are there and 2 that are not, 1 MB each; of two guesses one comes true."""
    made = request["tokens"] * request["batch"]
    counts = {"hits": 6 * made, "misses": 2 * made, "ahead_reads": 2 * made, "ahead_used": made, "hidden_bytes": 0}
    return {**counts, "bytes_read": 2_000_000 * made, "io_s": 0.004 * made, "stall_s": 0.001 * made}


def main() -> None:
    name, log, habit = (*sys.argv[1:], "")[:3]
    if habit == "cannot load":
        say({"error": {"code": "too_large", "message": "The model is too large.", "hint": "Use a smaller one."}})
        return
    if habit == "never answers":
        sys.exit("No module named engine")
    with Path(log).open("a") as asked:
        print(name, "starts", os.getpid(), file=asked, flush=True)
        ready = {"ready": True, "engine": name, "version": "1", "dtype": "float32", "load_s": 0.5}
        if habit == "streams":
            ready["memory"] = {"mode": "streamed", "budget_bytes": 400_000_000, "slots_per_layer": 5.25}
        say(ready)
        for line in sys.stdin:
            request = json.loads(line)
            print(name, request["op"], request.get("tokens", ""), file=asked, flush=True)
            if request["op"] == "exit":
                return
            misbehave(habit, request)
            if request["op"] == "memory":
                say({"peak_bytes": 1000})
            elif request["op"] == "first":
                say({"unsupported": "first words are never easy"})
            elif habit == "streams" and request["op"] == "decode":
                say({"seconds": seconds(request), "streamed": streamed(request)})
            elif habit == "streams badly":
                say({"seconds": seconds(request), "streamed": {"hits": "many"}})
            else:
                say({"seconds": seconds(request)})


if __name__ == "__main__":
    main()
