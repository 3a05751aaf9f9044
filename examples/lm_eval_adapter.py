"""Evaluate a model with lm-evaluation-harness (pip install lm-eval), many requests at once.

python examples/lm_eval_adapter.py FOLDER TASK [TASK ...] [--memory 12GB] [--limit N]

For a MacBook take few documents (--limit): a benchmark's thousands are hours of reading prompts."""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM

from mixtral_mlx import Engine, Request, Result, load

AT_ONCE = 32


class MixtralLM(LM):
    """What the harness asks of a model, answered by an engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log probability, and whether greedy decoding would write it."""
        asked = (self._score(*request.args) for request in requests)
        return [(result.scores.logprob, all(result.scores.is_likeliest)) for result in self._answered(asked)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log probability of each whole text, in windows of the context's length where it is longer."""
        sums = []
        for request in requests:
            ids, room = self.engine.tokenizer.encode(request.args[0], bos=False), self.engine.context - 1
            windows = [ids[at : at + room] for at in range(0, len(ids), room)]
            asked = (self.engine.score_request([self.engine.tokenizer.bos_id], window) for window in windows)
            sums.append(sum(result.scores.logprob for result in self._answered(asked)))
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each (context, settings): the text up to one of the strings in `until`."""
        asked = (self._continue(*request.args) for request in requests)
        return [result.text for result in self._answered(asked)]

    def _score(self, context: str, continuation: str) -> Request:
        # Where words join hangs on what they are joined to, so both are encoded together.
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        encode = self.engine.tokenizer.encode
        both, before = encode(context + continuation), len(encode(context)) if context else 1
        most = self.engine.context
        start = max(len(both) - most, 0)  # A context that is too long loses its beginning.
        return self.engine.score_request(both[start:before], both[before:])

    def _continue(self, context: str, settings: dict[str, Any]) -> Request:
        until = settings.get("until") or []
        most = settings.get("max_gen_toks", 256)
        ids = self.engine.tokenizer.encode(context)
        return self.engine.completion_request(
            ids[max(len(ids) + most - self.engine.context, 0) :],
            stop=[until] if isinstance(until, str) else [text for text in until if text],
            max_tokens=most,
            temperature=settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0,
            seed=0,
        )

    def _answered(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results in order, while some more requests are under way."""
        under_way: deque[Callable[[], Result]] = deque()
        for request in requests:
            if len(under_way) == AT_ONCE:
                yield under_way.popleft()()
            under_way.append(self.engine.submit(request).result)
        while under_way:
            yield under_way.popleft()()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("task", nargs="+")
    parser.add_argument("--memory")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    with load(args.folder, memory=args.memory) as engine:
        found = simple_evaluate(model=MixtralLM(engine), tasks=args.task, limit=args.limit)
    print(json.dumps(found["results"], indent=1, default=str))


if __name__ == "__main__":
    main()
