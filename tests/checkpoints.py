"""Tiny Mixtral checkpoints of seeded random weights, written in the forms people have them in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import safetensors

from mixtral_mlx import experts
from mixtral_mlx.config import Config, Packing, Quantization
from mixtral_mlx.experts.streaming import LAYERS_AHEAD
from mixtral_mlx.model import Model
from mixtral_mlx.weights import Loaded, load, quantize, save

TINY = Config(
    vocab_size=32000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=2048,
    dtype="float32",
)
Q4 = Quantization(Packing(4, 32), {f"model.layers.{n}.block_sparse_moe.gate": Packing(8, 32) for n in range(8)})
TOKENIZERS = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}


def random_model(config: Config, seed: int = 0) -> Model:
    """A model of weights large enough that its logits differ clearly; quantized as `config` says."""
    model = Model(config)
    mx.random.seed(seed)
    weights = [
        (name, mx.ones(spec.shape) if name.endswith("norm.weight") else mx.random.normal(spec.shape) * 0.1)
        for name, spec in replace(config, quantization=None).tensors().items()
    ]
    model.load_weights([(name, array.astype(getattr(mx, config.dtype))) for name, array in weights])
    quantize(model, config)
    mx.eval(model.parameters())
    return model


def write_tiny(folder: Path, config: Config = TINY, *, seed: int = 0, tokenizer: str | None = "v1") -> Path:
    """Write a checkpoint folder in mlx-lm's stacked layout, with a real tokenizer; returns the folder."""
    save(folder, random_model(config, seed), config)
    if tokenizer:
        source = files("mistral_common") / "data" / TOKENIZERS[tokenizer]
        shutil.copyfile(str(source), folder / "tokenizer.model")
    return folder


@contextmanager
def streamed(
    folder: Path, slots: int | Sequence[int], *, layers_ahead: int = LAYERS_AHEAD, **options: Any
) -> Iterator[Loaded]:
    """The folder's model with so many slots in each layer; its threads end with the context."""
    plan = load(folder, **options).plan
    counts = (slots,) * len(plan.slots) if isinstance(slots, int) else tuple(slots)
    plan = replace(plan, mode="streamed", slots=counts)
    with patch.object(experts, "Streaming", partial(experts.Streaming, layers_ahead=layers_ahead)):
        loaded = load(folder, memory=plan, **options)
    assert loaded.streaming
    try:
        yield loaded
    finally:
        loaded.streaming.close()


def unstacked(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The same tensors under Hugging Face's names: an expert at a time, w1 gate, w2 down, w3 up."""
    letters = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    result: dict[str, mx.array] = {}
    for name, array in weights.items():
        moe, found, rest = name.partition(".switch_mlp.")
        if not found:
            result[name] = array
            continue
        projection, part = rest.split(".")
        for expert in range(array.shape[0]):
            result[f"{moe}.experts.{expert}.{letters[projection]}.{part}"] = mx.contiguous(array[expert])
    return result


def write_weights(folder: Path, *shards: Mapping[str, mx.array], index: bool = True) -> Path:
    """Write safetensors files with an index, or a single one without."""
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    names = names if index else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        mx.save_safetensors(str(folder / name), dict(shard), metadata={"format": "mlx"})
    if index:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read_arrays(file: Path) -> dict[str, mx.array]:
    """All tensors of a safetensors file, or of all such files in a folder."""
    files = sorted(file.glob("*.safetensors")) if file.is_dir() else [file]
    result: dict[str, mx.array] = {}
    for path in files:
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        result |= arrays
    return result


def parsed_elsewhere(content: bytes) -> dict[str, dict[str, Any]]:
    """A safetensors file as the safetensors package reads it: name → shape, dtype and data."""
    parse: Any = safetensors.deserialize
    return dict(parse(content))
