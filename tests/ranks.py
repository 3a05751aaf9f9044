"""Several processes on this machine that MLX joins in a ring, each with a port that was free a moment ago."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def hostfile(folder: Path, size: int) -> Path:
    """A ring of `size` ranks on loopback."""
    sockets = [socket.socket() for _ in range(size)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    path = folder / "hosts.json"
    path.write_text(json.dumps(hosts))
    return path


def environment(rank: int, hosts: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What `mlx.launch` gives a rank."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), **(more or {})}


def started(
    command: Sequence[str], hosts: Path, ranks: Sequence[int], more: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Some ranks of a ring, running `python command`."""
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(rank, hosts, more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]


def run(command: Sequence[str], size: int, folder: Path, timeout_s: float = 60) -> list[str]:
    """Run `python command` on every rank of a ring; what each printed. None of them may fail."""
    processes = started(command, hostfile(folder, size), range(size))
    try:
        answers = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [error[-2000:] for process, (_, error) in zip(processes, answers, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
    return [out for out, _ in answers]
