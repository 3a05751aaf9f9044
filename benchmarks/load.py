"""Loading next to mlx-lm: seconds, cold and warm, and peak memory, each turn in a process of its own, interleaved.

    python benchmarks/load.py [FOLDER] [--turns 5]

Without FOLDER a synthetic 4-bit checkpoint of more than 3 GB is written to a temporary folder and removed again.
Both sides are timed after their imports, from the call to weights in memory and a tokenizer to use."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_SIDES = {
    "mixtral-mlx": """
import time
from mixtral_mlx.memory import peak_rss_bytes
from mixtral_mlx.prompt import Tokenizer
from mixtral_mlx.weights import load
import mixtral_mlx.model, mistral_common.tokens.tokenizers.sentencepiece
from mixtral_mlx import cpu
if cpu.is_available():
    import mixtral_mlx.cpu.modules
before = peak_rss_bytes()
start = time.perf_counter()
loaded, tokenizer = load(folder), Tokenizer.read(folder)
""",
    "mlx-lm": """
import time
import mlx_lm, transformers
from mixtral_mlx.memory import peak_rss_bytes
before = peak_rss_bytes()
start = time.perf_counter()
model, tokenizer = mlx_lm.load(str(folder))
""",
    # The floor for both: the same bytes by one read after the other, into memory already touched.
    "read only": """
import time
from mixtral_mlx.memory import peak_rss_bytes
buffer = bytearray(16 << 20)
before = peak_rss_bytes()
start = time.perf_counter()
for file in sorted(folder.glob("*.safetensors")):
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass
""",
}
_REPORT = """
print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_rss_bytes(), "before": before}))
"""


def turn(side: str, folder: Path, *, cold: bool) -> dict[str, float]:
    """One load in a fresh process; `cold` first drops the files from the page cache."""
    if cold:
        drop_from_page_cache(folder)
    script = f"import json, pathlib\nfolder = pathlib.Path({str(folder)!r})\n{_SIDES[side]}{_REPORT}"
    answer = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def drop_from_page_cache(folder: Path) -> None:
    if not hasattr(os, "posix_fadvise"):
        sys.exit("A cold run needs posix_fadvise; on a Mac run `sudo purge` before each and use --warm-only.")
    for file in folder.glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def touch_memory(size: int) -> None:
    """Make the machine back its memory once: virtual machines are slow to at first touch, whoever goes first."""
    subprocess.run([sys.executable, "-c", f"b = bytearray({size}); b[::4096] = b'1' * len(b[::4096])"], check=True)


def compare(folder: Path, turns: int, *, warm_only: bool) -> None:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    touch_memory(int(size * 1.5))
    print(f"{size / 1e9:.2f} GB of weights, {turns} turns each, interleaved; medians (lowest to highest)")
    print(f"{'':14} {'':5} {'seconds':>22} {'GB/s':>6} {'peak RSS':>10} {'over weights':>13}")
    medians = {}
    for cold in (False,) if warm_only else (True, False):
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in _SIDES}
        for side in _SIDES:
            turn(side, folder, cold=False)
        for _ in range(turns):
            for side, results in runs.items():
                results.append(turn(side, folder, cold=cold))
        for side, results in runs.items():
            seconds = [run["seconds"] for run in results]
            peak = max(run["peak"] for run in results)
            medians[side, cold] = statistics.median(seconds)
            print(
                f"{side:14} {'cold' if cold else 'warm':5} "
                f"{medians[side, cold]:6.2f} ({min(seconds):5.2f} to {max(seconds):5.2f}) "
                f"{size / 1e9 / medians[side, cold]:6.2f} {peak / 1e9:7.2f} GB {(peak - size) / 1e6:+10.0f} MB"
            )
    for cold in sorted({cold for _, cold in medians}, reverse=True):
        ratio = medians["mixtral-mlx", cold] / medians["mlx-lm", cold]
        print(f"{'cold' if cold else 'warm'}: mixtral-mlx takes {ratio:.2f} x the time of mlx-lm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--warm-only", action="store_true")
    args = parser.parse_args()
    if args.folder:
        compare(args.folder, args.turns, warm_only=args.warm_only)
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from synthetic import config_of, write_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        write_checkpoint(folder, config_of(hidden=2048, ffn=7168, layers=16))
        compare(folder, args.turns, warm_only=args.warm_only)


if __name__ == "__main__":
    main()
