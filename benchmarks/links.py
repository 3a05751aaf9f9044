"""Two ranks on this machine whose messages go by way of relays that are as slow as a link: which split is fastest, and
which one `plan` would have named, for machines as fast as one rank is here alone. The best of some runs counts.

python benchmarks/links.py FOLDER [--links 10Gb/s,0.3ms 1Gb/s,2ms] [--tokens 24]"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from mixtral_mlx import speeds
from mixtral_mlx.distributed import KINDS
from mixtral_mlx.distributed.outlook import Host, Wire, outlooks, parse_wire
from mixtral_mlx.memory import machine
from mixtral_mlx.plan import Own


def main() -> None:
    """Measure every split over every link and say what was expected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--links", nargs="+", default=["10Gb/s,0.3ms", "1Gb/s,2ms"])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    own = Own.read(asked.folder)
    here = machine()
    assumed = Host("here", here.ram_bytes // 2, speeds.assumed(here).speeds)
    alone = outlooks(own.config, "", [assumed], Wire(1e9, 0))[0]
    tps = max(run(asked.folder, None, asked.tokens, None) for _ in range(asked.runs))
    assert alone.decode_tps
    memory = assumed.speeds.memory_bytes_per_s * tps / alone.decode_tps
    host = replace(assumed, speeds=replace(assumed.speeds, memory_bytes_per_s=memory))
    print(f"alone: {tps:.1f} tok/s", flush=True)
    for text in asked.links:
        wire = parse_wire(text)
        expected = {one.kind: one.decode_tps for one in outlooks(own.config, "", [host, host], wire)}
        runs = [{kind: run(asked.folder, kind, asked.tokens, wire) for kind in KINDS} for _ in range(asked.runs)]
        measured = {kind: max(one[kind] for one in runs) for kind in KINDS}
        print(f"{wire}:")
        for kind in KINDS:
            print(f"  {kind}: {measured[kind]:.1f} tok/s measured, {expected[kind] or 0:.1f} computed")
        best, named = (
            max(measured, key=lambda kind: measured[kind]),
            max(expected, key=lambda kind: expected[kind] or 0),
        )
        print(f"  fastest: {best}; plan names: {named}", flush=True)


def run(folder: Path, kind: str | None, tokens: int, wire: Wire | None) -> float:
    """Tokens per second of rank 0; of a single process where there is no link."""
    line = ["-m", "mixtral_mlx", "generate", "--model", str(folder), "--prompt-ids", "1,22557,28725,574,1141,349"]
    line += ["--max-tokens", str(tokens), "--json", "--quiet"]
    if not (wire and kind):
        out = subprocess.run(
            [sys.executable, *line], env={**os.environ, "NUMBA_NUM_THREADS": "1"}, capture_output=True, check=True
        )
        return float(json.loads(out.stdout)["timings"]["generation_tps"])
    line += ["--parallel", kind]
    with joined(wire) as hostfiles:
        processes = [
            subprocess.Popen(
                [sys.executable, *line],
                env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "NUMBA_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, hosts in enumerate(hostfiles)
        ]
        try:
            text, _ = processes[0].communicate(timeout=150)
            processes[1].wait(30)
            return float(json.loads(text)["timings"]["generation_tps"])
        finally:
            for process in processes:
                process.kill()


@contextmanager
def joined(wire: Wire) -> Iterator[list[Path]]:
    """A hostfile for each of two ranks, in which the other's address is a relay's."""
    where = Path(tempfile.mkdtemp())
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    relays = [Relay(port, wire) for port in ports]
    files = [where / f"hosts-{rank}.json" for rank in range(2)]
    for rank, file in enumerate(files):
        seen = [port if n == rank else relay.port for n, (port, relay) in enumerate(zip(ports, relays, strict=True))]
        file.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in seen]))
    try:
        yield files
    finally:
        for relay in relays:
            relay.listener.close()
        shutil.rmtree(where)


class Relay:
    """Carries what comes to its port on to another, as late and as slowly as `wire` would."""

    def __init__(self, target: int, wire: Wire) -> None:
        self.target = target
        self.wire = wire
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                threading.Thread(target=self._connect, args=[near], daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with suppress(OSError):
                far = socket.create_connection(("127.0.0.1", self.target))
                for source, sink in ((near, far), (far, near)):
                    sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    queue: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
                    threading.Thread(target=self._read, args=[source, queue], daemon=True).start()
                    threading.Thread(target=self._write, args=[sink, queue], daemon=True).start()
                return
            time.sleep(0.02)

    def _read(self, source: socket.socket, queue: SimpleQueue[tuple[float, bytes]]) -> None:
        free_at, data = 0.0, b"-"
        with suppress(OSError):
            while data:
                data = source.recv(1 << 16)
                free_at = max(free_at, time.monotonic()) + len(data) / self.wire.bytes_per_s
                queue.put((free_at + self.wire.latency_s, data))

    def _write(self, sink: socket.socket, queue: SimpleQueue[tuple[float, bytes]]) -> None:
        with suppress(OSError):
            while True:
                due, data = queue.get()
                time.sleep(max(due - time.monotonic(), 0))
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)


if __name__ == "__main__":
    main()
