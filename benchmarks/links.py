"""Two ranks in two network namespaces, joined by a veth of so many Gb/s (tc's tbf) and so many ms: tokens per second of
every split, and which one `plan` names for the link as it was measured and machines as fast as one core is here alone.

Each rank has a core of its own; the median of some runs counts. A process between the namespaces holds every frame back
for the latency, as netem would, which not every kernel has. Needs Linux, root, and iproute2.

python benchmarks/links.py FOLDER... [--links 10Gb/s,0.3ms 1Gb/s,2ms] [--tokens 24] [--runs 5]"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from statistics import median

from mixtral_mlx import speeds
from mixtral_mlx.distributed import KINDS
from mixtral_mlx.distributed.outlook import Host, Wire, outlooks, parse_wire
from mixtral_mlx.memory import machine
from mixtral_mlx.plan import Own

_NAMES, _ENDS = ("mixtral-a", "mixtral-b"), ("mxa", "mxb")
_ADDRESSES, _PORT = ("10.77.0.1", "10.77.0.2"), 5555
_MTU = 60_000
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15  # of linux/if_packet.h
_PINGS, _BULK_BYTES = 200, 64 << 20


def main() -> None:
    """Measure every split over every link and say what was expected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--links", nargs="+", default=["10Gb/s,0.3ms", "1Gb/s,2ms"])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--forward", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--probe", choices=("ask", "echo"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.forward is not None:
        forward(asked.forward)
    elif asked.probe:
        {"ask": ask, "echo": echo}[asked.probe]()
    elif not asked.folders:
        parser.error("Give at least one checkpoint folder.")
    for folder in asked.folders:
        compare(folder, [parse_wire(text) for text in asked.links], asked.tokens, asked.runs)


def compare(folder: Path, wires: list[Wire], tokens: int, runs: int) -> None:
    """A model's table."""
    own = Own.read(folder)
    here = machine()
    assumed = Host("here", here.ram_bytes // 2, speeds.assumed(here).speeds)
    alone = outlooks(own.config, "", [assumed], Wire(1e9, 0))[0]
    tps = median(run(folder, tokens) for _ in range(runs))
    assert alone.decode_tps
    memory = assumed.speeds.memory_bytes_per_s * tps / alone.decode_tps
    host = replace(assumed, speeds=replace(assumed.speeds, memory_bytes_per_s=memory))
    print(f"{folder.resolve().name}, alone on a core: {tps:.1f} tok/s", flush=True)
    for wire in wires:
        with joined(wire) as (files, found):
            turns = [{kind: run(folder, tokens, kind, files) for kind in KINDS} for _ in range(runs)]
        measured = {kind: median(turn[kind] for turn in turns) for kind in KINDS}
        planned = outlooks(own.config, "", [host, host], found)
        expected = {one.kind: one.decode_tps or 0.0 for one in planned}
        print(f"  asked for {wire}, measured {found.bytes_per_s * 8 / 1e9:.1f} Gb/s, {found.latency_s * 1e3:.2f} ms")
        for kind in KINDS:
            print(f"    {kind}: {measured[kind]:.1f} tok/s measured, {expected[kind]:.1f} computed")
        best = max(KINDS, key=lambda kind: measured[kind])
        print(f"    fastest: {best}; plan names: {planned[0].kind}", flush=True)


def run(folder: Path, tokens: int, kind: str = "", files: Path | None = None) -> float:
    """Tokens per second of rank 0, or of a process that is alone."""
    line = ["-m", "mixtral_mlx", "generate", "--model", str(folder), "--prompt-ids", "1,22557,28725,574,1141,349"]
    line += ["--max-tokens", str(tokens), "--json", "--quiet", *(["--parallel", kind] if kind else [])]
    processes = [
        subprocess.Popen(
            [
                *(["ip", "netns", "exec", _NAMES[rank]] if files else []),
                "taskset",
                "-c",
                str(rank),
                sys.executable,
                *line,
            ],
            env={**os.environ, "NUMBA_NUM_THREADS": "1", **_place(rank, files)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2 if files else 1)
    ]
    try:
        text, _ = processes[0].communicate(timeout=300)
        for process in processes:
            process.wait(30)
        return float(json.loads(text)["timings"]["generation_tps"])
    finally:
        for process in processes:
            process.kill()


def _place(rank: int, files: Path | None) -> dict[str, str]:
    return {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(files)} if files else {}


# The link.


@contextmanager
def joined(wire: Wire) -> Iterator[tuple[Path, Wire]]:
    """A hostfile of two namespaces, and what the link between them was measured to be."""
    with ExitStack() as at_end:
        for n, (name, end) in enumerate(zip(_NAMES, _ENDS, strict=True)):
            ip("netns", "add", name)
            at_end.callback(ip, "netns", "del", name)
            ip("link", "add", f"{end}0", "mtu", str(_MTU), "type", "veth", "peer", "name", f"{end}1", "mtu", str(_MTU))
            at_end.callback(ip, "link", "del", f"{end}1")
            # Frames are to be no longer than the link can carry.
            ip("link", "set", f"{end}0", "netns", name, "gso_max_segs", "1")
            ip("-n", name, "addr", "add", f"{_ADDRESSES[n]}/24", "dev", f"{end}0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"{end}0", "up")
            ip("link", "set", f"{end}1", "up")
            shaped = ["rate", f"{wire.bytes_per_s * 8:.0f}", "burst", "1mb", "latency", "200ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", f"{end}0", "root", "tbf", *shaped], check=True)
        forwarder = subprocess.Popen([sys.executable, __file__, "--forward", str(wire.latency_s)])
        at_end.callback(forwarder.wait)
        at_end.callback(forwarder.kill)
        hosts = Path(at_end.enter_context(tempfile.TemporaryDirectory())) / "hosts.json"
        hosts.write_text(json.dumps([[f"{address}:{_PORT}"] for address in _ADDRESSES]))
        yield hosts, _measured()


def ip(*words: str) -> None:
    """Run iproute2's `ip`."""
    subprocess.run(["ip", *words], check=True)


def forward(latency_s: float) -> None:
    """Carry frames between the outer ends of the two veths, each `latency_s` late, until killed."""
    # A link does not wait for processors that are busy.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    near, far = (_raw(f"{end}1") for end in _ENDS)
    threading.Thread(target=_carry, args=[near, far, latency_s], daemon=True).start()
    _carry(far, near, latency_s)


def _raw(device: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    # Each frame with what the kernel knows of it: checksums, which a veth leaves out, are nobody's to make here.
    made.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    made.bind((device, 0))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 25)
    return made


def _carry(source: socket.socket, sink: socket.socket, latency_s: float) -> None:
    queue: SimpleQueue[tuple[float, bytes]] = SimpleQueue()

    def read() -> None:
        while True:
            frame, address = source.recvfrom(1 << 17)
            if address[2] != socket.PACKET_OUTGOING:
                queue.put((time.monotonic() + latency_s, frame))

    threading.Thread(target=read, daemon=True).start()
    while True:
        due, frame = queue.get()
        time.sleep(max(due - time.monotonic(), 0))
        with suppress(OSError):
            sink.send(frame)


def _measured() -> Wire:
    """The link as any two programs would find it."""
    echo, probe = (["ip", "netns", "exec", name, sys.executable, __file__, "--probe"] for name in reversed(_NAMES))
    with subprocess.Popen([*echo, "echo"], stdout=subprocess.PIPE, text=True) as answering:
        assert answering.stdout
        answering.stdout.readline()
        try:
            found = subprocess.run([*probe, "ask"], stdout=subprocess.PIPE, text=True, check=True)
        finally:
            answering.kill()
    return Wire(*json.loads(found.stdout))


def ask() -> None:
    """Print bytes per second to the other side, and seconds until a byte is there."""
    with socket.create_connection((_ADDRESSES[1], _PORT + 1)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(_PINGS):
            begun = time.perf_counter()
            client.sendall(b"-")
            client.recv(1)
            times.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        client.sendall(bytes(_BULK_BYTES))
        client.shutdown(socket.SHUT_WR)
        client.recv(1)
        print(json.dumps([_BULK_BYTES / (time.perf_counter() - begun), median(times) / 2]))


def echo() -> None:
    """Answer some bytes one by one, then take all that comes."""
    with socket.create_server((_ADDRESSES[1], _PORT + 1)) as server:
        print("ready", flush=True)
        with server.accept()[0] as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(_PINGS):
                client.sendall(client.recv(1))
            while client.recv(1 << 20):
                pass


if __name__ == "__main__":
    main()
