"""How much memory there is, what kind of machine this is, and what is done when memory runs short.

The one place that asks the operating system; answers can be injected, so what only a Mac says is tested anywhere. How a
budget is divided is `budget`'s business."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import MixtralError

if TYPE_CHECKING:
    import mlx.core as mx

NORMAL, WARNING, CRITICAL = 1, 2, 4
"""Levels of memory pressure, numbered as macOS does."""


class MachineError(MixtralError):
    """Something was asked of this machine that it has not, or that is taken."""


@dataclass(frozen=True)
class Machine:
    """What there is: RAM (a container's share of it), what other processes leave of it, and the processor's name.

    `gpu_bytes` is what Metal recommends to hold at most; None where there is no Metal, or where it was not asked."""

    ram_bytes: int
    available_bytes: int
    chip: str
    gpu_bytes: int | None = None


@dataclass(frozen=True)
class System:
    """Whom the questions below go to: files under `root`, and what macOS answers to sysctl and vm_stat."""

    platform: str = sys.platform
    root: Path = Path("/")
    sysctl: Callable[[str], int] = lambda name: _sysctl(name)
    vm_stat: Callable[[], str] = lambda: _vm_stat()


def machine(*, ask_metal: bool = False, system: System = System()) -> Machine:
    """This machine. `ask_metal` imports MLX, which alone knows what the GPU may hold."""
    return Machine(
        ram_bytes=ram_bytes(system),
        available_bytes=available_bytes(system),
        chip=chip(),
        gpu_bytes=_working_set() if ask_metal else None,
    )


def default_budget(machine: Machine) -> int:
    """Bytes this process may use when the user names no number.

    On a Mac, what macOS lets the GPU hold: other programs' memory is compressed or swapped to make room. Elsewhere the
    out-of-memory killer makes room, so at most nine tenths of all, and of what others leave enough is left that a full
    budget alone is no memory pressure."""
    if machine.gpu_bytes:
        return machine.gpu_bytes
    if machine.chip.startswith("Apple"):
        return mac_budget(machine.ram_bytes)
    spared = round(machine.ram_bytes * (_WARNING_BELOW + 0.01))
    return max(min(machine.ram_bytes * 9 // 10, machine.available_bytes - spared), 0)


def mac_budget(ram_bytes: int) -> int:
    """What macOS lets the GPU hold of so much RAM: two thirds up to 36 GB, three quarters above.

    Recent systems allow more (84 % of 128 GB was seen); only Metal itself can tell."""
    return ram_bytes * 2 // 3 if ram_bytes <= 36 << 30 else ram_bytes * 3 // 4


def ram_bytes(system: System = System()) -> int:
    """Bytes of physical memory, or of the container's share where a cgroup sets one."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(limit for limit, _ in _cgroups(system))])


def available_bytes(system: System = System()) -> int:
    """Bytes that can be taken without driving other programs out; file contents kept in memory count as free."""
    if system.platform == "darwin":
        return _available_on_mac(system.vm_stat())
    with suppress(OSError, StopIteration, ValueError), open(system.root / "proc/meminfo") as lines:
        free = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
        return max(min([free, *(limit - used for limit, used in _cgroups(system))]), 0)
    return ram_bytes(system)


def rss_bytes() -> int:
    """The memory this process holds now, in bytes; on a Mac with what it holds for the GPU."""
    if sys.platform == "darwin":
        with suppress(OSError, AttributeError):
            return _footprint_on_mac()
        return peak_rss_bytes()
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes."""
    with suppress(OSError, StopIteration), open("/proc/self/status") as status:
        # Linux counts what getrusage says from before the program was started: a large parent would be in it.
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Shares of the memory that are left. Linux swaps or kills when there is none. 5 % of 24 GB is 1.2 GB, a third of what
# one slot less in each layer of 8x7B gives back: early enough to do so in time, late enough not to do it for nothing.
_WARNING_BELOW = 0.05
_CRITICAL_BELOW = 0.02


def pressure(system: System = System()) -> int:
    """How short memory is: NORMAL, WARNING or CRITICAL, by macOS itself, elsewhere by the share that is left."""
    if system.platform == "darwin":
        level = system.sysctl("kern.memorystatus_vm_pressure_level")
        return level if level in (NORMAL, WARNING, CRITICAL) else NORMAL
    left = available_bytes(system) / ram_bytes(system)
    return CRITICAL if left < _CRITICAL_BELOW else WARNING if left < _WARNING_BELOW else NORMAL


@dataclass(frozen=True)
class Step:
    """One thing that can be given up, and taken back if it has `restore`. Both say whether there was anything to do."""

    name: str
    relieve: Callable[[], bool]
    restore: Callable[[], bool] | None = None


class Relief:
    """What is done when memory runs short, the cheapest step first; undone one at a time when it has been calm.

    The running loop calls `check` as often as it likes: the system is asked once a second at most. Each time a step has
    to be taken again soon after it was undone, the calm that is waited for doubles, so that it does not swing. `clear`
    gives up what fills again by itself, is done whenever memory is short, and counts as no step."""

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        clear: Callable[[], object] = lambda: None,
        pressure: Callable[[], int] = pressure,
        clock: Callable[[], float] = time.monotonic,
        calm_s: float = 30.0,
    ) -> None:
        self.steps = steps
        self.taken: list[Step] = []
        self._clear = clear
        self._pressure = pressure
        self._clock = clock
        self._calm_s = self._wait_s = calm_s
        self._asked = self._undone = -float("inf")
        self._calm_since: float | None = None

    def check(self) -> list[str]:
        """Ask, and act: at a warning the first step that has something to give, at critical all of them, once each.

        Returns the names of the steps that were taken, or undone (with a `-` before them)."""
        now = self._clock()
        if now - self._asked < _ASK_EVERY_S:
            return []
        self._asked = now
        level = self._pressure()
        if level == NORMAL:
            return self._undo(now)
        self._calm_since = None
        if now - self._undone < self._wait_s:
            self._wait_s, self._undone = min(2 * self._wait_s, _MOST_CALM * self._calm_s), -float("inf")
        return self._take(at_most=len(self.steps) if level == CRITICAL else 1)

    def take_all(self) -> list[str]:
        """Take every step that has something to give, because somebody else knows that memory is short."""
        self._calm_since = None
        return self._take(at_most=len(self.steps))

    def _take(self, at_most: int) -> list[str]:
        names: list[str] = []
        for step in self.steps:
            if len(names) < at_most and step.relieve():
                if step.restore:
                    self.taken.append(step)
                names.append(step.name)
        self._clear()  # Last, since what was given up may only have become free.
        return names

    def _undo(self, now: float) -> list[str]:
        if self._calm_since is None:
            self._calm_since = now
        if now - self._calm_since < self._wait_s:
            return []
        while self.taken:
            step = self.taken.pop()
            if step.restore and step.restore():
                self._calm_since = self._undone = now
                return [f"-{step.name}"]
        return []


_ASK_EVERY_S = 1.0
_MOST_CALM = 16


WIRINGS = ("off", "fit")
_wired = threading.Lock()


@contextmanager
def wire(policy: str, budget_bytes: int, *, mx: Any = None) -> Iterator[int]:
    """Keep up to `budget_bytes` of MLX's memory wired while entered, if `policy` is "fit"; "off" touches nothing.

    Yields the bytes that are wired. A wired limit has brought macOS down when two parts of a program set it (mlx
    #3186), so there is one owner in a process, and nothing happens unless asked for. Raises `MachineError`."""
    if policy not in WIRINGS:
        raise MachineError(f"The wiring is {policy!r}, expected one of {', '.join(WIRINGS)}.", code="bad_option")
    if policy == "off":
        yield 0
        return
    if mx is None:
        import mlx.core as mx
    if not mx.metal.is_available():
        raise MachineError(
            "Memory can be wired for Metal only, and MLX runs without it here.",
            code="not_available",
            hint="Leave --wired out.",
        )
    if not _wired.acquire(blocking=False):
        raise MachineError("This process has wired its memory already.", code="wired_already")
    try:
        limit = min(budget_bytes, mx.device_info()["max_recommended_working_set_size"])
        before = mx.set_wired_limit(limit)
        try:
            yield limit
        finally:
            mx.set_wired_limit(before)
    finally:
        _wired.release()


def chip() -> str:
    """The processor's name, such as `Apple M2 Pro`; empty where it cannot be told."""
    if sys.platform != "darwin":
        with suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
        return ""
    answer = subprocess.run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
    return answer.stdout.strip()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def activation_dtype(asked: str, checkpoint: str, *, chip: Callable[[], str] = chip) -> str:
    """The dtype to compute in. `auto` is the checkpoint's own; M1 and M2 emulate bfloat16, so it is float16 there."""
    if asked != "auto":
        return asked
    if checkpoint == "bfloat16" and re.match(r"Apple M[12]\b", chip()):
        return "float16"
    return checkpoint


@cache
def allocation_streams() -> tuple[mx.ThreadLocalStream, mx.ThreadLocalStream]:
    """Two of MLX's streams to make arrays on by turns, so that two cores share the first touch of their memory."""
    import mlx.core as mx

    # Made once: MLX keeps a thread for every stream, for good.
    return mx.new_thread_local_stream(mx.cpu), mx.new_thread_local_stream(mx.cpu)


@contextmanager
def file_limit_kept() -> Iterator[None]:
    """Keep the limit on open files as it is: importing mlx-lm lowers it, hard limit included, for the whole process."""
    lower = resource.setrlimit

    def setrlimit(which: int, limits: tuple[int, int]) -> Any:
        return None if which == resource.RLIMIT_NOFILE else lower(which, limits)

    resource.setrlimit = setrlimit
    try:
        yield
    finally:
        resource.setrlimit = lower


# Asking.


def _working_set() -> int | None:
    import mlx.core as mx

    if not mx.metal.is_available():
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


def _cgroups(system: System) -> Iterator[tuple[int, int]]:
    """Limit, and what is used of it and cannot be dropped, of each control group around this process that has one."""
    with suppress(OSError), open(system.root / "proc/self/cgroup") as lines:
        for line in lines:
            _, kinds, path = line.rstrip("\n").split(":", 2)
            if kinds not in ("", "memory"):
                continue
            top = system.root / "sys/fs/cgroup" / kinds
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                yield from _cgroup(folder, *(_V1_FILES if kinds else _V2_FILES))
                if folder == top:
                    break


_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2_FILES = ("memory.max", "memory.current", "")


def _cgroup(folder: Path, limit_file: str, used_file: str, prefix: str) -> Iterator[tuple[int, int]]:
    with suppress(OSError, ValueError):  # No such group is visible here, or it has no limit ("max").
        limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
        kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        files = sum(int(kept.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
        yield limit, max(used - files, 0)


def _available_on_mac(vm_stat: str) -> int:
    """Free pages and those that can be dropped or were not used for long, as `vm_stat` counts them."""
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    pages = {name: int(count) for name, count in re.findall(r"^Pages ([a-z ]+):\s+(\d+)\.", vm_stat, re.MULTILINE)}
    free = sum(pages.get(name, 0) for name in ("free", "inactive", "speculative", "purgeable"))
    return free * int(page[1]) if page else 0


def _vm_stat() -> str:
    return subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True).stdout


def _sysctl(name: str) -> int:
    """A number that macOS's sysctl knows; 0 where it does not."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else value.value


def _footprint_on_mac() -> int:
    """`ri_phys_footprint` of macOS's `struct rusage_info_v0`: what Activity Monitor shows as memory."""
    info = (ctypes.c_uint64 * 12)()
    if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), 0, ctypes.byref(info)):
        raise OSError("proc_pid_rusage failed")
    return int(info[9])
