"""Tiny Mixtral checkpoints of seeded random weights, written in the forms people have them in."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mixtral_mlx.config import Config, Packing, Quantization
from mixtral_mlx.model import Model
from mixtral_mlx.weights import save

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
    if config.quantization:

        def packing_of(path: str, module: nn.Module) -> bool | dict[str, object]:
            packing = config.packing(path) if hasattr(module, "to_quantized") else None
            return dict(vars(packing)) if packing else False

        nn.quantize(model, class_predicate=packing_of)
    mx.eval(model.parameters())
    return model


def write_tiny(folder: Path, config: Config = TINY, *, seed: int = 0, tokenizer: str | None = "v1") -> Path:
    """Write a checkpoint folder in mlx-lm's stacked layout, with a real tokenizer; returns the folder."""
    save(folder, random_model(config, seed), config)
    if tokenizer:
        source = files("mistral_common") / "data" / TOKENIZERS[tokenizer]
        shutil.copyfile(str(source), folder / "tokenizer.model")
    return folder


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
