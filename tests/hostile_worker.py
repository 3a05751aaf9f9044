"""The process that hostile folders are opened in: takes one a line on stdin and says what came of it.

What it may say is `used` (it loaded, ran and generated, or was converted) or `refused` with a code, and which paths
were touched. Any other exception is `raised`; a crash or a hang is for the process that watches this one to see."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx

from mixtral_mlx.config import MixtralError
from mixtral_mlx.convert.run import Request, convert
from mixtral_mlx.generate import Sampling, stream_generate
from mixtral_mlx.memory import peak_rss_bytes
from mixtral_mlx.prompt import Message, Tokenizer
from mixtral_mlx.weights import load


class Numbers:
    """Stands in for a tokenizer, so that a model may have any vocabulary."""

    eos_id = 2

    def detokenizer(self, after: Sequence[int] = ()) -> Numbers:
        return self

    def add(self, token: int) -> str:
        return f"{token} "

    def finish(self) -> str:
        return ""


def use_model(folder: Path) -> None:
    """Load, run and generate, greedily and not, within the bounds the model itself gives."""
    loaded = load(folder)
    last = loaded.config.vocab_size - 1
    prompt = [0, last, last // 2]
    mx.eval(loaded.model(mx.array([prompt, prompt[::-1]])))
    for sampling in (Sampling(max_tokens=2), Sampling(max_tokens=2, temperature=1.0, top_p=0.9, top_k=5, seed=1)):
        stand_in: Any = Numbers()
        for chunk in stream_generate(loaded.model, stand_in, prompt, sampling):
            assert chunk.token is None or 0 <= chunk.token <= last


def use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.read(folder, 32768)
    ids = tokenizer.encode("A héllo\n\x00 <s>[INST] 日本 🙂")
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    tokenizer.decode(range(0, tokenizer.vocab_size + 99, 97))
    tokenizer.encode_chat([Message("user", "Hi")])


def use_source(folder: Path) -> None:
    """Convert what is in `folder` to a folder beside it."""
    convert(Request(str(folder), folder.with_name("dest"), ("bf16",)))


TOUCHED: set[str] = set()
"""Every path that was opened, listed, made, moved or removed for the case at hand."""


def heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" or event.startswith(("os.", "shutil.")):
        paths = arguments[:1] if event == "open" else arguments  # What follows there is a mode.
        TOUCHED.update(os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike))


def answer(kind: str, folder: Path) -> dict[str, Any]:
    try:
        {"model": use_model, "tokenizer": use_tokenizer, "source": use_source}[kind](folder)
    except MixtralError as error:
        message = f"{error} {error.hint}"
        if not error.code or len(message) > 1000 or not message.isprintable():
            return {"outcome": "raised", "detail": f"code {error.code!r}, message {message[:2000]!r}"}
        return {"outcome": "refused", "detail": error.code}
    except BaseException:
        return {"outcome": "raised", "detail": traceback.format_exc()}
    return {"outcome": "used", "detail": ""}


if __name__ == "__main__":
    # The first sums are slow, as is what is imported late; time counts from the first case.
    import_module("mistral_common.tokens.tokenizers.mistral")
    mx.eval(mx.softmax(mx.random.normal((4, 4)) @ mx.ones((4, 4))))
    sys.addaudithook(heard)
    print("ready", flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        TOUCHED.clear()
        said = answer(case["kind"], Path(case["folder"]))
        print(json.dumps({**said, "touched": sorted(TOUCHED), "peak": peak_rss_bytes()}), flush=True)
