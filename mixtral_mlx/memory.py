"""How much memory there is, and what kind of machine this is.

The one place that asks the operating system; answers can be injected, so what only a Mac says is tested anywhere."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


def ram_bytes() -> int:
    """Bytes of physical memory, or of the container's share where a cgroup sets one."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as limit:
            return min(physical, int(limit.read()))
    except (OSError, ValueError):
        return physical


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes."""
    with suppress(OSError, StopIteration), open("/proc/self/status") as status:
        # Linux counts what getrusage says from before the program was started: a large parent would be in it.
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
