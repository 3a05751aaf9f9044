"""One model asked from several threads, as a program with a pool of workers would.

python examples/threads.py [FOLDER or REPOSITORY]      without either, the built-in demo model"""

import sys
from concurrent.futures import ThreadPoolExecutor

from mixtral_mlx import load

THREADS = 8
SUMS = [(a, b) for a in (3, 12, 20, 31) for b in (4, 9, 30)]

with load(sys.argv[1] if len(sys.argv) > 1 else None) as mixtral, ThreadPoolExecutor(THREADS) as threads:

    def ask(numbers: tuple[int, int]) -> str:
        return mixtral.chat(f"What is {numbers[0]} + {numbers[1]}?", max_tokens=30).text()

    for answer in threads.map(ask, SUMS):
        print(answer)
    done = mixtral.stats()["requests"]
    print(
        f"{THREADS} threads, {done['finished']} answers, {done['generated_tokens']} tokens in {done['passes']} passes"
    )
