"""`python convert.py SOURCE DEST …` from a checkout: the same as `mixtral-mlx convert`."""

import sys

from mixtral_mlx.__main__ import run

if __name__ == "__main__":
    sys.exit(run(["convert", *sys.argv[1:]]))
