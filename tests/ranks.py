"""Several processes on this machine that MLX joins in a ring, each with a port that was free a moment ago."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
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


def free_ports(count: int) -> int:
    """The first of so many ports in a row that were free a moment ago."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        with ExitStack() as stack, suppress(OSError, OverflowError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return int(first)


def children(pid: int) -> list[int]:
    """The processes that one has started and that still run."""
    path = Path(f"/proc/{pid}/task")
    return [int(word) for task in path.glob("*/children") for word in task.read_text().split()]


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


def run(
    command: Sequence[str], size: int, folder: Path, timeout_s: float = 60, hosts: Sequence[Path] = ()
) -> list[str]:
    """Run `python command` on every rank of a ring, as `hosts` has it for each; what each printed. None may fail."""
    hosts = hosts or [hostfile(folder, size)] * size
    processes = [started(command, hosts[rank], [rank])[0] for rank in range(size)]
    try:
        answers = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [error[-2000:] for process, (_, error) in zip(processes, answers, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
    return [out for out, _ in answers]


class Cable:
    """A way to an address that counts what it carries and can be cut: then nothing comes, and nobody is told."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.is_cut = threading.Event()
        self.carried_bytes = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.open: list[socket.socket] = [self.listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                threading.Thread(target=self._connect, args=[near], daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        self.open.append(near)
        while True:
            try:
                far = socket.create_connection(self.target)
                break
            except OSError:
                if self.is_cut.wait(0.05):
                    return
        self.open.append(far)
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._carry, args=[source, sink], daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while (data := source.recv(1 << 16)) and not self.is_cut.is_set():
                self.carried_bytes += len(data)
                sink.sendall(data)
            if not self.is_cut.is_set():
                sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.is_cut.set()
        for one in self.open:
            one.close()


@contextmanager
def cabled(folder: Path, size: int) -> Iterator[tuple[list[Path], list[Cable]]]:
    """A hostfile for each rank of a ring in which the ways to the others go through cables, one to each rank."""
    hosts = json.loads(hostfile(folder, size).read_text())
    cables = [Cable((host, int(port))) for host, port in (address.split(":") for (address,) in hosts)]
    files = []
    for rank in range(size):
        seen = [own if n == rank else [cable.address] for n, (own, cable) in enumerate(zip(hosts, cables, strict=True))]
        files.append(folder / f"hosts-{rank}.json")
        files[-1].write_text(json.dumps(seen))
    try:
        yield files, cables
    finally:
        for cable in cables:
            cable.close()
