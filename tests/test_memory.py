"""What the operating system is asked, and that the answers are this process's own."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = "from mixtral_mlx.memory import peak_rss_bytes; print(peak_rss_bytes())"


def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    held = bytearray(b"1") * (300 << 20)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) < len(held)
