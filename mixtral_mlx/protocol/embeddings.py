"""OpenAI's embeddings of texts or ids."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Collection, Sequence
from typing import Any, Literal

from ..engine.request import Request, Result
from .answers import Total, check_model, served
from .bodies import Body, read
from .call import Asks, Call, Stream
from .completions import Prompts, check_lengths, each
from .errors import refusing

PATH = "/v1/embeddings"
_MOST_INPUTS = 2048


class EmbeddingBody(Body):
    """The body of `/v1/embeddings`."""

    input: Prompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


def parse(body: object, asks: Asks, *, aliases: Collection[str] = ()) -> Call:
    """The call a body makes. Raises `Refused`."""
    asked = read(PATH, EmbeddingBody, body)
    check_model(asked.model, asks, aliases)
    texts = each(asked.input, _MOST_INPUTS, "input")
    check_lengths(texts, asks, "input")
    with refusing("input"):
        requests = [asks.embed_request(text) for text in texts]
    return EmbeddingCall(requests, asked, asks)


class EmbeddingCall(Call):
    """Texts as vectors of length 1, as OpenAI's are."""

    def __init__(self, requests: Sequence[Request], asked: EmbeddingBody, asks: Asks) -> None:
        super().__init__([(request, 1) for request in requests])
        self._as_base64 = asked.encoding_format == "base64"
        self._model = served(asks)

    def answer(self, results: Sequence[Result]) -> dict[str, Any]:
        total = Total.of([result.usage for result in results], [1] * len(results))
        data = [
            {"object": "embedding", "index": index, "embedding": self._written(result.embedding)}
            for index, result in enumerate(results)
        ]
        usage = {"prompt_tokens": total.prompt_tokens, "total_tokens": total.prompt_tokens}
        return {"object": "list", "data": data, "model": self._model, "usage": usage}

    def stream(self) -> Stream:
        raise AssertionError("Embeddings do not stream.")

    def _written(self, values: Sequence[float]) -> list[float] | str:
        length = math.hypot(*values) or 1.0
        values = [value / length for value in values]
        if not self._as_base64:
            return values
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
