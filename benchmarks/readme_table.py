"""Put the table of a saved benchmark into the README, between its two comments.

python benchmarks/readme_table.py F.json [README.md]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mixtral_mlx.bench.report import read
from mixtral_mlx.bench.table import markdown
from mixtral_mlx.writing import write_whole

BEGIN, END = "<!-- bench -->", "<!-- end of bench -->"
README = Path(__file__).parent.parent / "README.md"


def with_table(text: str, table: str) -> str:
    """`text` with `table` in place of what stands between the comments."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"The README has no {BEGIN} with an {END} after it.")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("readme", type=Path, nargs="?", default=README)
    args = parser.parse_args()
    write_whole(args.readme, with_table(args.readme.read_text(encoding="utf-8"), markdown(read(args.report))))


if __name__ == "__main__":
    main()
