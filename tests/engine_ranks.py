"""A rank of an engine over several processes, and what it is asked: the same can be asked of one process."""

from __future__ import annotations

import json
import sys
from typing import Any

from mixtral_mlx import load
from mixtral_mlx.config import MixtralError
from mixtral_mlx.distributed import ranks as ranks_module
from mixtral_mlx.distributed.link import Place
from mixtral_mlx.distributed.ranks import Loading, together
from mixtral_mlx.engine.engine import Engine
from mixtral_mlx.weights import locate

GREEDY: dict[str, Any] = {"ignore_eos": True, "temperature": 0.0}


def asked(engine: Engine) -> dict[str, Any]:
    """Requests of all kinds, and what came of them."""
    prompts = ["Hello", "The capital of France is", "What is 2 plus 2?", "Tell me about lists"]
    together = [engine.complete(prompt, max_tokens=6, **GREEDY) for prompt in prompts]
    said: dict[str, Any] = {"side by side": [reply.result().tokens for reply in together]}
    long = engine.tokenizer.encode("one two three four five six seven eight nine ten " * 12)
    said["long"] = engine.complete(long, max_tokens=4, **GREEDY).result().tokens
    more = engine.complete([*long, *engine.tokenizer.encode("and then", bos=False)], max_tokens=4, **GREEDY).result()
    said["cached"] = more.tokens, more.usage.cached_tokens > 64
    stopped = engine.complete("Count", max_tokens=500, **GREEDY)
    next(iter(stopped))
    stopped.cancel()
    said["after a cancelled one"] = engine.complete("Count", max_tokens=4, **GREEDY).result().tokens
    for name, how in HOW.items():
        said[name] = [engine.complete(long[:100], max_tokens=5, **{**GREEDY, **how}).result().tokens for _ in range(2)]
    said["score"] = [round(value, 3) for value in engine.score("The capital of France is", " Paris").logprobs]
    engine.unload()
    said["loaded again"] = engine.complete("Hello", max_tokens=4, **GREEDY).result().tokens
    return json.loads(json.dumps(said))


HOW: dict[str, dict[str, Any]] = {
    "quantized": {"kv_bits": 8},
    "window": {"max_kv": 64},
    "guessed": {"speculate": "n-gram"},
    "seeded": {"temperature": 1.0, "seed": 5},
}


def main() -> None:
    """Run a job given as JSON: kind, weights, model, what to do, and options that may differ between ranks."""
    job = json.loads(sys.argv[1])
    place = Place.find()
    assert place
    own = {**job, **job.get("only", {}).get(str(place.rank), {})}
    folder = locate(own.get("model"))
    if version := own.get("version"):
        vars(ranks_module)["__version__"] = version
    if chip := own.get("chip"):
        vars(ranks_module)["chip"] = lambda: chip
    weights = own.get("weights")
    loading = Loading(own["kind"], tuple(weights) if weights else None, **own.get("loading", {}))
    with together(folder, loading, place, on_lost=_complain) as ranks:
        if ranks.rank:
            ranks.follow()
            return
        with load(folder, share=ranks.part, prefix_memory="50MB") as engine:
            if own.get("do") == "asked":
                print(json.dumps(asked(engine)))
                return
            reply = engine.complete("Hello", max_tokens=4000, **GREEDY)
            next(iter(reply))
            print("running", flush=True)
            try:
                reply.result()
            except MixtralError as error:
                print(error.code, flush=True)
                sys.exit(1)


def _complain(error: MixtralError) -> None:
    print(f"lost: {error.code}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except MixtralError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        sys.exit(1)
