"""A model larger than memory: how fast each engine decodes under a budget, one process at a time, in turns.

    python benchmarks/export.py FOLDER --gguf F.gguf
    python benchmarks/streaming.py FOLDER --memory 6 9 12 16 20 --gguf F.gguf --python OTHER_PYTHON [--mlx-lm]

OTHER_PYTHON is that of an environment with llama-cpp-python. Each engine runs in a memory cgroup of the budget's size,
where what it allocates and the pages of files it reads or maps both count, and starts with none of the model's pages
cached. Before each, the disk is measured: some drift. Without --memory there is no limit and no --memory for ours. Ours
and llama.cpp have room for the same context.

After a prompt of --context ids, as many tokens as fit into --seconds are timed, --tokens at most, drawn at random so
that random weights route them evenly: ours at temperature 1, the others are given them. Peak RSS, bytes read and CPU
seconds are the kernel's figures, seen from outside. Ours adds hits, the seconds its readers were busy, all together,
and those it stalled; the rest counts as compute. Linux, as root."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from disk import forget, parallel_read_speed
from peer import drawn_ids

_HERE = Path(__file__).parent
_ROOM = 64  # more of a context than is asked for


class EngineError(Exception):
    """An engine that gave no figure; `str()` says why, what it measured up to then is lost."""


@dataclass(frozen=True)
class Work:
    """What every engine is asked, and how long it may take: seconds for its first tokens, and for those timed."""

    context: int
    tokens: int
    threads: int
    first_s: float
    timed_s: float


@dataclass(frozen=True)
class Engine:
    """A name, the files its weights are in, and what runs it; `measure` fills in what it learns."""

    name: str
    files: tuple[Path, ...]
    measure: Callable[[Work, int | None, Watched], Decoded]
    preload: Path | None = None


@dataclass(frozen=True)
class Decoded:
    """Seconds and, where known, other things per decoded token. `said` is all that the engine told."""

    tokens: int
    token_s: float
    token_bytes: float | None = None
    token_cpu_s: float | None = None
    token_faults: float | None = None
    hit_rate: float | None = None
    io_s: float | None = None
    compute_s: float | None = None
    stall_s: float | None = None
    said: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """Bytes: the most a process held, what it read, and the most its cgroup held, page cache and kernel's included."""

    rss: int
    anonymous: int
    file: int
    read: int
    group: int | None


@dataclass(frozen=True)
class Measurement:
    """One engine's turn at one budget. No `decoded`, and `outcome` says what happened instead."""

    engine: str
    budget_bytes: int | None
    turn: int
    disk_gb_per_s: float
    wall_s: float
    seen: Seen
    decoded: Decoded | None
    outcome: str


class MemoryGroup:
    """A memory cgroup below this process's own, for one process and as long as the `with` block."""

    def __init__(self, limit_bytes: int) -> None:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        inside = next((line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"), None)
        if inside is None:
            raise EngineError("There is no memory controller of cgroup v1, which --memory needs.")
        self._folder = Path(f"/sys/fs/cgroup/memory{inside}") / f"streaming-{os.getpid()}"
        self._limit_bytes = limit_bytes

    def __enter__(self) -> MemoryGroup:
        try:
            self._folder.mkdir()
            (self._folder / "memory.limit_in_bytes").write_text(str(self._limit_bytes))
        except OSError as error:
            raise EngineError(f"A memory cgroup cannot be made ({error}); --memory needs root.") from None
        return self

    def __exit__(self, *_: object) -> None:
        for _attempt in range(50):  # A killed process's pages take a moment to go.
            with suppress(OSError):
                self._folder.rmdir()
                return
            time.sleep(0.1)

    def join(self) -> None:
        """Called in the process that is to be held, before it becomes the engine."""
        (self._folder / "cgroup.procs").write_text("0")

    def peak_bytes(self) -> int:
        return int((self._folder / "memory.max_usage_in_bytes").read_text())

    def has_killed(self) -> bool:
        lines = (self._folder / "memory.oom_control").read_text().splitlines()
        return any(line.startswith("oom_kill ") and line != "oom_kill 0" for line in lines)


class Watched:
    """A process whose memory is sampled from outside, and which is killed when an answer takes too long."""

    def __init__(self, engine: Engine, threads: int, group: MemoryGroup | None) -> None:
        self._name, self._group = engine.name, group
        self._preload = {"LD_PRELOAD": str(engine.preload)} if engine.preload else {}
        self._threads = str(threads)
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._most = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0, "read_bytes": 0}
        self._late = False

    def start(self, command: Sequence[str]) -> None:
        """Begin it, after the end of the one before."""
        if self._process:
            self._process.wait()
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **dict.fromkeys(names, self._threads), **self._preload},
            preexec_fn=self._group.join if self._group else None,
        )
        threading.Thread(target=self._sample, args=(self._process.pid,), daemon=True).start()

    def ask(self, request: dict[str, Any] | None, limit_s: float) -> dict[str, Any]:
        """Its answer to a request, or the line it says unasked; raises `EngineError`."""
        assert self._process
        assert self._process.stdin
        assert self._process.stdout
        if request:
            with suppress(BrokenPipeError):  # What ended it is said by the missing answer.
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
        timer = threading.Timer(limit_s, self._give_up)
        timer.start()
        # An indented object is many lines: an answer ends where it can be parsed.
        text = ""
        while line := self._process.stdout.readline():
            text += line
            with suppress(json.JSONDecodeError):
                answer: dict[str, Any] = json.loads(text)
                timer.cancel()
                return self._checked(answer)
        timer.cancel()
        raise EngineError(self._ending(limit_s))

    def counters(self) -> tuple[int, float, int]:
        """Bytes it has had read from disk, its CPU seconds, and its page faults that waited for the disk."""
        assert self._process
        io = dict(line.split(": ") for line in Path(f"/proc/{self._process.pid}/io").read_text().splitlines())
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(io["read_bytes"]), (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"), int(stat[9])

    def close(self) -> Seen:
        if self._process:
            self._process.kill()
            self._process.wait()
        self._errors.close()
        group = self._group.peak_bytes() if self._group else None
        rss, anonymous, file, read = self._most.values()
        return Seen(rss, anonymous, file, read, group)

    def _sample(self, pid: int) -> None:
        folder = Path(f"/proc/{pid}")
        with suppress(OSError):
            while True:
                for line in [*(folder / "status").open(), *(folder / "io").open()]:
                    name, _, value = line.partition(":")
                    if name in self._most:
                        unit = 1024 if value.endswith("kB\n") else 1
                        self._most[name] = max(self._most[name], int(value.split()[0]) * unit)
                time.sleep(0.02)

    def _give_up(self) -> None:
        assert self._process
        self._late = True
        self._process.kill()

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if isinstance(answer.get("error"), dict):
            raise EngineError(answer["error"]["message"])
        if "unsupported" in answer:
            raise EngineError(answer["unsupported"])
        return answer

    def _ending(self, limit_s: float) -> str:
        assert self._process
        code = self._process.wait()
        if self._late:
            return f"no answer in {limit_s:.0f} s"
        if self._group and self._group.has_killed():
            return "killed, out of memory"
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return f"exit code {code}: {''.join(last)}"


# How each engine decodes.


def ours(folder: Path, vocab_size: int, room: int) -> Callable[[Work, int | None, Watched], Decoded]:
    def generate(work: Work, budget_bytes: int | None, process: Watched, tokens: int) -> dict[str, Any]:
        ids = ",".join(map(str, drawn_ids(vocab_size, work.context)))
        command = [sys.executable, "-m", "mixtral_mlx", "generate", "--model", str(folder), "--prompt-ids", ids]
        command += ["--max-tokens", str(tokens), "--json", "--quiet"]
        command += ["--temperature", "1", "--seed", "1"]  # What random weights think likeliest soon repeats itself.
        if budget_bytes is not None:
            command += ["--memory", f"{budget_bytes / 1e9:g}GB", "--context", str(room)]
        process.start(command)
        return process.ask(None, work.first_s + work.timed_s)

    def measure(work: Work, budget_bytes: int | None, process: Watched) -> Decoded:
        return _ours_decoded(generate(work, budget_bytes, process, work.tokens + 1))

    return measure


def _ours_decoded(said: dict[str, Any]) -> Decoded:
    tokens = said["usage"]["completion_tokens"] - 1
    decode = said["memory"].get("decode")
    if tokens < 1 or decode is None:
        raise EngineError("it ended before the second token, or streamed nothing")
    # Rounded to hundredths of a token per second, generation_tps is too coarse.
    token_s = (decode["compute_s"] + decode["stall_s"]) / tokens
    uses = decode["expert_hits"] + decode["expert_misses"]
    return Decoded(
        tokens,
        token_s,
        token_bytes=decode["bytes_read"] / tokens,
        hit_rate=decode["expert_hits"] / uses if uses else None,
        io_s=decode["io_s"] / tokens,
        compute_s=decode["compute_s"] / tokens,
        stall_s=decode["stall_s"] / tokens,
        said={name: value for name, value in said.items() if name != "text"},
    )


def peer(*command: str) -> Callable[[Work, int | None, Watched], Decoded]:
    """A worker that speaks `peer.py`'s protocol."""

    def measure(work: Work, _: int | None, process: Watched) -> Decoded:
        process.start(command)
        end = time.monotonic() + work.first_s
        about = process.ask(None, work.first_s)
        process.ask({"op": "prompt", "tokens": work.context}, end - time.monotonic())
        decode = {"op": "decode", "context": work.context, "drawn": True}
        first = process.ask({**decode, "tokens": 1}, end - time.monotonic())
        tokens = max(min(work.tokens, int(work.timed_s / first["seconds"])), 2)
        before = process.counters()
        seconds = process.ask({**decode, "tokens": tokens}, work.timed_s + work.first_s)["seconds"]
        # Two steps come before those timed, the same work each.
        read, cpu_s, faults = (
            (after - start) / (tokens + 2) for after, start in zip(process.counters(), before, strict=True)
        )
        return Decoded(tokens, seconds / tokens, read, cpu_s, faults, said=about)

    return measure


# One turn, all turns, and what they show.


def run(engine: Engine, work: Work, budget_bytes: int | None, turn: int) -> Measurement:
    """Measure the disk on the engine's own files, then the engine."""
    forget(engine.files)
    disk = parallel_read_speed(engine.files) / 1e9
    start = time.monotonic()
    with _group(budget_bytes) as group:
        process = Watched(engine, work.threads, group)
        decoded, outcome = None, "decoded"
        try:
            decoded = engine.measure(work, budget_bytes, process)
        except EngineError as error:
            outcome = str(error)
        finally:
            wall_s = time.monotonic() - start
            seen = process.close()
    return Measurement(engine.name, budget_bytes, turn, disk, wall_s, seen, decoded, outcome)


@contextmanager
def _group(budget_bytes: int | None) -> Iterator[MemoryGroup | None]:
    if budget_bytes is None:
        yield None
        return
    with MemoryGroup(budget_bytes) as group:
        yield group


_COLUMNS = (
    ("engine", 16),
    ("budget", 7),
    ("disk", 5),
    ("tok/s", 6),
    ("s/token", 7),
    ("RSS", 6),
    ("anon", 6),
    ("cgroup", 6),
    ("hits", 5),
    ("MB/token", 8),
    ("CPU s", 6),
    ("io s", 5),
    ("compute", 7),
    ("stall", 5),
)


def head() -> str:
    return "  ".join(name.ljust(width) if width > 8 else name.rjust(width) for name, width in _COLUMNS)


def row(m: Measurement) -> str:
    """One line: budget and peaks in GB, the disk in GB/s, the rest per token."""
    speed = 1 / m.decoded.token_s if m.decoded else None
    cells = [m.engine, _number(m.budget_bytes, "g", 1e9), _number(m.disk_gb_per_s, ".2f"), _number(speed, ".3f")]
    cells += [_per_token(m, "token_s")]
    cells += [_number(size, ".2f", 1e9) for size in (m.seen.rss, m.seen.anonymous, m.seen.group)]
    cells += [_per_token(m, "hit_rate"), _per_token(m, "token_bytes", ".0f", 1e6), _per_token(m, "token_cpu_s")]
    cells += [_per_token(m, name) for name in ("io_s", "compute_s", "stall_s")]
    wide = (c.ljust(width) if width > 8 else c.rjust(width) for c, (_, width) in zip(cells, _COLUMNS, strict=True))
    return "  ".join(wide) + ("" if m.decoded else f"  {m.outcome} after {m.wall_s:.0f} s")


def _per_token(m: Measurement, name: str, form: str = ".3f", unit: float = 1) -> str:
    return _number(getattr(m.decoded, name, None), form, unit)


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "–" if value is None else format(value / unit, form)


def ratios(measurements: Sequence[Measurement]) -> list[str]:
    """The first engine's median speed over each other's, by budget."""
    names = list(dict.fromkeys(m.engine for m in measurements))
    lines = []
    for budget in dict.fromkeys(m.budget_bytes for m in measurements):
        medians = {name: _median(measurements, name, budget) for name in names}
        first = medians[names[0]]
        for name in names[1:]:
            other = medians[name]
            ratio = f"{other / first:.2f}" if first and other else "–"
            lines.append(f"{_number(budget, 'g', 1e9)} GB: {names[0]} / {name} = {ratio}")
    return lines


def _median(measurements: Sequence[Measurement], name: str, budget: int | None) -> float | None:
    found = [m.decoded.token_s for m in measurements if (m.engine, m.budget_bytes) == (name, budget) and m.decoded]
    return statistics.median(found) if found else None


def over_budget(measurements: Sequence[Measurement]) -> list[str]:
    """A sentence for each time ours held more than it was allowed."""
    return [
        f"{m.engine} held {m.seen.rss / 1e9:.3f} GB under a budget of {m.budget_bytes / 1e9:g} GB."
        for m in measurements
        if m.engine == "mixtral-mlx" and m.budget_bytes is not None and m.seen.rss > m.budget_bytes
    ]


def _engines(args: argparse.Namespace) -> list[Engine]:
    weights = tuple(sorted(args.folder.glob("*.safetensors")))
    vocab_size = int(json.loads((args.folder / "config.json").read_text())["vocab_size"])
    room = args.context + args.tokens + _ROOM
    engines = [Engine("mixtral-mlx", weights, ours(args.folder, vocab_size, room))]
    if args.gguf:
        command = (args.python, str(_HERE / "peer_llama.py"), str(args.gguf), str(args.threads), str(room))
        engines.append(Engine("llama.cpp", (args.gguf,), peer(*command, "mapped"), args.preload))
        if args.repacked:
            engines.append(Engine("llama.cpp repack", (args.gguf,), peer(*command), args.preload))
    if args.mlx_lm:
        worker = (sys.executable, str(_HERE / "peer_mlx_lm.py"), str(args.folder))
        engines += [Engine("mlx-lm", weights, peer(*worker)), Engine("mlx-lm lazy", weights, peer(*worker, "lazy"))]
    return engines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", type=float, nargs="*", default=[], metavar="GB", help="budgets, of 10⁹ bytes")
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp")
    parser.add_argument("--python", default=sys.executable, metavar="OTHER_PYTHON", help="where llama.cpp is installed")
    parser.add_argument("--preload", type=Path, metavar="F.so", help="a library loaded into llama.cpp, as no_amx.c")
    parser.add_argument("--repacked", action="store_true", help="also llama.cpp as it comes, with weights copied")
    parser.add_argument("--mlx-lm", action="store_true", help="also mlx-lm, loading as it does and lazily")
    parser.add_argument("--context", type=int, default=16, help="ids of the prompt")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--first", type=float, default=300.0, metavar="S", help="the longest until tokens are timed")
    parser.add_argument("--seconds", type=float, default=120.0, help="about the longest that tokens are timed")
    parser.add_argument("--json", type=Path, metavar="F.jsonl", help="add each measurement to this file, on a line")
    args = parser.parse_args()
    if args.context < 2 or args.tokens < 2 or args.turns < 1 or args.threads < 1:
        parser.error("--context and --tokens must be at least 2, --turns and --threads 1")
    # Ended from outside, it still ends its engine and removes the cgroup.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    budgets = [round(size * 1e9) for size in args.memory] or [None]
    work = Work(args.context, args.tokens, args.threads, args.first, args.seconds)
    print("Budgets and peaks in GB, the disk in GB/s, the rest for each decoded token.\n\n" + head(), flush=True)
    measurements = []
    for budget in budgets:
        for turn in range(args.turns):
            for engine in _engines(args):
                measurements.append(run(engine, work, budget, turn))
                print(row(measurements[-1]), flush=True)
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps(asdict(measurements[-1])) + "\n")
    print("\n" + "\n".join(ratios(measurements)))
    if broken := over_budget(measurements):
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
