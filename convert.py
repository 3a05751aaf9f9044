"""`python convert.py SOURCE DEST …` from a checkout: the same as `mixtral-mlx convert`."""

import sys

from mixtral_mlx.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
