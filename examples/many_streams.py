"""Fifty conversations at once from asyncio, some of which are given up half-way.

python examples/many_streams.py [FOLDER or REPOSITORY]      without either, the built-in demo model"""

import asyncio
import random
import sys

from mixtral_mlx import Engine, Token, load

STREAMS = 50
COUNTRIES = ("France", "Italy", "Japan", "Spain", "Norway")


async def ask(mixtral: Engine, number: int, patience: float) -> str:
    """The answer's text, as far as it came before `patience` (seconds) ended."""
    text = ""
    try:
        async with asyncio.timeout(patience):
            async for event in mixtral.chat(f"What is the capital of {COUNTRIES[number % len(COUNTRIES)]}?"):
                if isinstance(event, Token):
                    text += event.text
    except TimeoutError:
        return f"{text} [given up]"  # Leaving the loop has cancelled the request.
    return text


async def main() -> None:
    chosen = random.Random(0)
    patience = [chosen.choice([0.05, 0.2, 60]) for _ in range(STREAMS)]
    async with load(sys.argv[1] if len(sys.argv) > 1 else None) as mixtral:
        answers = await asyncio.gather(*(ask(mixtral, n, patience[n]) for n in range(STREAMS)))
        print("\n".join(sorted(set(answers))))
        given_up = sum(answer.endswith("[given up]") for answer in answers)
        print(f"{STREAMS} streams, {given_up} of them given up, {mixtral.stats()['requests']['passes']} passes")


asyncio.run(main())
