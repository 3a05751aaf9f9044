"""Converting next to mlx-lm: wall time and peak memory, interleaved, on true 8x7B shapes with few layers.

    python benchmarks/convert.py [--layers 2 4] [--turns 3] [--folder WORK]

Each side converts the same bfloat16 source to 4 bits in a process of its own. About 10 GB of disk per layer is needed;
everything written is removed."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import config_of, write_checkpoint

_SIDES = {
    "mixtral-mlx": """
from mixtral_mlx.convert.run import Request, convert
convert(Request(source, dest, ("q4",)))
""",
    "mlx-lm": """
from mlx_lm.convert import convert
convert(source, mlx_path=str(dest), quantize=True, q_bits=4, q_group_size=64)
""",
}
_SCRIPT = """
import json, sys, time
from pathlib import Path
source, dest = sys.argv[1], Path(sys.argv[2])
{body}
from mixtral_mlx.memory import peak_rss_bytes
print(json.dumps({{"peak": peak_rss_bytes()}}))
"""


def turn(side: str, source: Path, dest: Path) -> tuple[float, int]:
    """Seconds of wall time, from process start to end, and peak bytes of memory."""
    shutil.rmtree(dest, ignore_errors=True)
    start = time.perf_counter()
    command = [sys.executable, "-c", _SCRIPT.format(body=_SIDES[side]), str(source), str(dest)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(dest)
    return seconds, json.loads(answer.stdout.splitlines()[-1])["peak"]


def compare(work: Path, layers: int, turns: int) -> None:
    source = work / f"source-{layers}"
    write_checkpoint(source, replace(config_of(4096, 14336, layers), quantization=None))
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    runs: dict[str, list[tuple[float, int]]] = {side: [] for side in _SIDES}
    for _ in range(turns):
        for side, results in runs.items():
            results.append(turn(side, source, work / "dest"))
    shutil.rmtree(source)
    medians = {side: statistics.median(seconds for seconds, _ in results) for side, results in runs.items()}
    for side, results in runs.items():
        seconds = sorted(seconds for seconds, _ in results)
        peak = max(peak for _, peak in results)
        print(
            f"{layers} layers, {size / 1e9:5.1f} GB  {side:12} {medians[side]:7.1f} s "
            f"({seconds[0]:.1f} to {seconds[-1]:.1f})  peak RSS {peak / 1e9:6.3f} GB",
            flush=True,
        )
    print(f"{layers} layers: mixtral-mlx takes {medians['mixtral-mlx'] / medians['mlx-lm']:.2f} x the time of mlx-lm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        for layers in args.layers:
            compare(Path(temporary), layers, args.turns)


if __name__ == "__main__":
    main()
