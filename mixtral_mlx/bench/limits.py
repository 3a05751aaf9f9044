"""What this machine's memory and processor reach, measured in a process of its own that leaves nothing behind.

Where MLX computes on a GPU, MLX measures there in the computing dtype; on the CPU numpy does, in float32 on every core,
since what counts is what the machine can do, not what one library makes of it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from ..memory import chip, cores, ram_bytes
from .process import BenchError

_READ_BYTES = 1 << 30
_SIDE = 2048
_TIMES = 5


@dataclass(frozen=True)
class Limits:
    """Bytes read and operations done per second at most, on `device` ("cpu" or "gpu"), products in `dtype`."""

    device: str
    dtype: str
    bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True)
class Machine:
    """What kind of machine this is."""

    system: str
    processor: str
    cores: int
    ram_bytes: int
    python: str
    mlx: str


def this_machine() -> Machine:
    """The machine this runs on."""
    from importlib.metadata import version

    system = f"{platform.system()} {platform.machine()}"
    return Machine(system, chip(), cores(), ram_bytes(), platform.python_version(), version("mlx"))


def measure(dtype: str) -> Limits:
    """The limits for products in `dtype`; raises `BenchError`."""
    command = [sys.executable, "-m", "mixtral_mlx.bench.limits", dtype]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    try:
        return Limits(**json.loads(done.stdout))
    except (ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BenchError(f"This machine's limits could not be measured: {last[:200]}.", code="no_limits") from None


def on_cpu(read_bytes: int = _READ_BYTES, side: int = _SIDE, times: int = _TIMES) -> Limits:
    """Limits of the processor: a sum of squares over a large array, a part on each core, and a float32 product."""
    import numpy as np

    matrix, parts = np.ones((side, side), np.float32), np.array_split(np.ones(read_bytes // 4, np.float32), cores())
    with ThreadPoolExecutor(len(parts)) as pool:
        read_s = _best(lambda: list(pool.map(lambda part: float(part @ part), parts)), times)
    return Limits("cpu", "float32", read_bytes / read_s, 2 * side**3 / _best(lambda: matrix @ matrix, times))


def on_gpu(dtype: str, read_bytes: int = _READ_BYTES, side: int = 2 * _SIDE, times: int = _TIMES) -> Limits:
    """Limits of the device MLX uses by default: a sum over a large array, and a product in `dtype`."""
    import mlx.core as mx

    matrix, array = mx.ones((side, side), getattr(mx, dtype)), mx.ones(read_bytes // 4, mx.float32)
    mx.eval(matrix, array)
    read_s = _best(lambda: mx.eval(mx.sum(array)), times)
    return Limits("gpu", dtype, read_bytes / read_s, 2 * side**3 / _best(lambda: mx.eval(matrix @ matrix), times))


def _best(run: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest of several runs, the first of which only warms up."""
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    import mlx.core as mx

    (dtype,) = sys.argv[1:]
    on_the_gpu = mx.default_device() == mx.gpu
    print(json.dumps(asdict(on_gpu(dtype) if on_the_gpu else on_cpu())))


if __name__ == "__main__":
    main()
