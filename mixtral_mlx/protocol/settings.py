"""How an answer is to be made: the fields that OpenAI's APIs share, and ours, as the engine's settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..config import Config
from .bodies import Body, Stop, stops
from .call import Refused

Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
Count = Annotated[int, Field(ge=1, le=1 << 31)]


class Extensions(Body):
    """Our own fields, by the names the engine has for them."""

    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    ignore_eos: bool | None = None
    kv_bits: Literal[4, 8] | None = None
    max_kv: Annotated[int, Field(ge=8, le=1 << 31)] | None = None
    speculate: Literal["n-gram", "draft"] | None = None

    def extensions(self) -> dict[str, Any]:
        """The settings that were given."""
        return {name: value for name in Extensions.model_fields if (value := getattr(self, name)) is not None}


class StreamOptions(Body):
    """Whether a last chunk tells the tokens; chunks are not padded to hide their length."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class OpenAISampling(Extensions):
    """What chat completions and completions have in common."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Count | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def settings(self, config: Config) -> dict[str, Any]:
        """What the engine calls these fields, with these APIs' defaults."""
        return {
            **self.extensions(),
            **temperature_and_top_p(self.temperature, self.top_p),
            "seed": None if self.seed is None else self.seed % (1 << 64),
            "stop": stops(self.stop),
            "max_tokens": self.max_tokens,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": _biases(self.logit_bias or {}, config.vocab_size),
        }

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the tokens that were used."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise Refused(
                "stream_options is for streams.", code="bad_value", hint="Set stream.", param="stream_options"
            )
        return bool(self.stream_options.include_usage)


def temperature_and_top_p(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """These settings; 1 where they were left out."""
    return {
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if top_p is None else top_p,
    }


def _biases(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    biases = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdecimal() and len(token) <= 9 and int(token) < vocab_size):
            raise Refused(
                f"logit_bias names {token[:40]!r}, expected token ids from 0 to {vocab_size - 1}.",
                code="bad_value",
                hint="Ids are those of this model's tokenizer; /tokenize gives them.",
                param="logit_bias",
            )
        biases[int(token)] = bias
    return biases
