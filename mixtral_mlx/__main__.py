"""The program: `mixtral-mlx`, and `python -m mixtral_mlx`. A Ctrl-C at any moment ends it with 130 and no traceback."""

from __future__ import annotations

import sys


def run(argv: list[str] | None = None) -> int:
    """Run a command line, interrupted or not; returns the exit code."""
    try:
        from .cli import main  # Takes a tenth of a second, in which Ctrl-C may come too.

        return main(argv)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
