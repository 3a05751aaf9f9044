"""Recipes: how many bits where, what that adds up to, and that mlx-lm reads what comes out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx_lm
import pytest
import sentencepiece
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mlx_lm.models.cache import make_prompt_cache

from mixtral_mlx.config import KNOWN, RECIPES, Config, ConfigError, Packing, recipe, recipe_of_patterns
from mixtral_mlx.convert.run import Request, convert
from mixtral_mlx.weights import load

from .checkpoints import read_arrays
from .conversions import SOURCE, quick_tokenizer, write_source
from .test_tokenizer_json import carried, conversations, odd_texts

__all__ = ["quick_tokenizer"]
PATTERNS = {"*": {"bits": 4, "group_size": 32}, "*.layers.1.*": 3, "model.embed_tokens": None}
WAYS: dict[str, dict[str, Any]] = {
    **{name: {"recipes": (name,)} for name in RECIPES},
    "q4 by 32": {"recipes": ("q4",), "group_size": 32},
    "mxfp4": {"recipes": ("q4",), "mode": "mxfp4"},
    "nvfp4": {"recipes": ("q4",), "mode": "nvfp4"},
    "mxfp8": {"recipes": ("q8",), "mode": "mxfp8"},
    "file": {"recipe_file": PATTERNS},
    "keep": {"recipes": ("keep",)},
}
SOME = ("q4", "q3", "q4-mini", "bf16", "nvfp4", "file", "keep")  # Of each kind one.
TEXT = "Grüß dich, 你好  \n\tworld 🙂"
PROMPT = [1, 733, 16289, 28793, 22557, 733, 28748]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("recipes") / "source")


def converted(source: Path, folder: Path, way: dict[str, Any]) -> tuple[Path, float]:
    """The converted folder and what the report says of bits per weight."""
    if "recipe_file" in way:
        file = folder / "recipe.json"
        file.write_text(json.dumps(way["recipe_file"]))
        way = {"recipe_file": file}
    if way.get("recipes") == ("keep",):
        convert(Request(str(source), folder / "quantized"))
        source = folder / "quantized"
    report = convert(Request(str(source), folder / "dest", **way))
    return folder / "dest", report.written[0].bits_per_weight


def greedy(model: Any, count: int = 32) -> list[int]:
    cache, tokens, ids = make_prompt_cache(model), list[int](), PROMPT
    for _ in range(count):
        ids = cast(list[int], mx.argmax(model(mx.array([ids]), cache)[:, -1], axis=-1).tolist())
        tokens += ids
    return tokens


@pytest.mark.usefixtures("quick_tokenizer")
@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in WAYS]
)
def test_every_recipe_takes_the_bits_it_says_and_loads_in_mlx_lm_to_the_same_tokens(
    source: Path, tmp_path: Path, name: str
) -> None:
    folder, reported = converted(source, tmp_path, WAYS[name])
    assert reported == pytest.approx(bits_per_weight(Config.read(folder)), rel=1e-12)
    assert sum(array.nbytes for array in read_arrays(folder).values()) * 8 == pytest.approx(
        reported * SOURCE.parameters()
    )
    ours = load(folder, dtype="float32").model
    theirs, tokenizer = mlx_lm.load(str(folder))[:2]
    theirs.set_dtype(mx.float32)  # What it computes in otherwise rounds the router.
    tokens = greedy(ours)
    assert len(set(tokens)) > 8
    assert greedy(theirs) == tokens
    assert tokenizer.encode(TEXT) == [1, *sentencepiece_ids(folder, [TEXT])[0]]


def sentencepiece_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    model: Any = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids: list[list[int]] = model.encode(texts)
    return ids


def test_what_mlx_lm_loads_encodes_2000_odd_texts_and_100_chats_as_the_references_do(
    source: Path, tmp_path: Path
) -> None:
    folder, _ = converted(source, tmp_path, {})
    tokenizer: Any = mlx_lm.load(str(folder))[1]
    texts = [TEXT, *odd_texts(2100)]
    assert len(texts) > 2000
    for text, ids in zip(texts, sentencepiece_ids(folder, texts), strict=True):
        assert tokenizer.encode(text) == [1, *ids], text
    reference = MistralTokenizer.from_file(carried("v1"))
    for messages in conversations(100):
        request: Any = ChatCompletionRequest.model_validate({"messages": messages})
        expected = reference.encode_chat_completion(request).tokens
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == expected, messages


@pytest.mark.usefixtures("quick_tokenizer")
def test_experts_equal_those_mlx_lm_makes(source: Path, tmp_path: Path) -> None:
    ours, _ = converted(source, tmp_path, {"recipes": ("q8",)})
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), quantize=True, q_bits=8, q_group_size=64)
    theirs = read_arrays(tmp_path / "theirs")
    arrays = read_arrays(ours)
    assert arrays.keys() == theirs.keys()
    assert all(bool(mx.array_equal(array, theirs[name])) for name, array in arrays.items())


def bits(packing: Packing | None) -> float:
    """Bits a weight takes: its own and its share of the group's scale (and bias): 16 each, 8 in the MX forms."""
    if packing is None:
        return 16
    return packing.bits + {"affine": 32, "mxfp4": 8, "nvfp4": 8, "mxfp8": 8}[packing.mode] / packing.group_size


def bits_per_weight(config: Config) -> float:
    sizes = {path: math.prod(shape) for path, shape in config.modules().items()}
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    total = sum(size * bits(config.packing(path)) for path, size in sizes.items()) + norms * 16
    return total / (sum(sizes.values()) + norms)


PROMISED = {"q8": (8, 8), "q6": (6, 8), "q5": (5, 8), "q4": (4, 8), "q4-mini": (4, 4), "q3": (3, 6), "q2": (2, 6)}


@pytest.mark.parametrize("name", PROMISED)
def test_experts_take_the_named_bits_and_the_rest_keeps_what_is_promised(name: str) -> None:
    for config in (SOURCE, *KNOWN.values()):
        quantized = replace(config, quantization=recipe(config, name))
        experts, rest = PROMISED[name]
        for path in config.modules():
            packing = quantized.packing(path)
            assert packing
            expected = experts if ".switch_mlp." in path else 8 if path.endswith(".gate") else rest
            assert (packing.bits, packing.group_size, packing.mode) == (expected, 64, "affine"), path


def test_the_router_never_goes_below_8_bits() -> None:
    for patterns in ({"*": 2}, {"*.gate": 4, "*.q_proj": 4}, {"*": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}):
        config = replace(SOURCE, quantization=recipe_of_patterns(SOURCE, patterns))
        packing = config.packing("model.layers.0.block_sparse_moe.gate")
        assert packing
        assert packing.bits == 8
        assert packing.mode == "affine"


def test_of_several_patterns_the_last_counts() -> None:
    config = replace(SOURCE, quantization=recipe_of_patterns(SOURCE, {"*": 4, "*.layers.0.*": 8, "lm_head": None}))
    assert config.packing("model.layers.0.self_attn.q_proj") == Packing(8)
    assert config.packing("model.layers.1.self_attn.q_proj") == Packing(4)
    assert config.packing("lm_head") is None
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({}, "an object of patterns"),
        ([4], "an object of patterns"),
        ({"*": None}, "quantizes nothing"),
        ({"*": 7}, "7 bits"),
        ({"*": "4"}, "'4' bits"),
        ({"*": True}, "True bits"),
        ({"*": {"bits": 4, "groupsize": 32}}, "'groupsize'"),
        ({"*": {"bits": 4, "mode": "int4"}}, "'int4'"),
        ({"*": {"bits": 4, "mode": "mxfp4", "group_size": 64}}, "groups of 64"),
        ({"*": 4, "*.attn.*": 8}, "'*.attn.*' fits no module"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(patterns: Any, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe_of_patterns(SOURCE, patterns)
    assert said in str(refused.value)
