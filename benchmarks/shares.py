"""How evenly a checkpoint routes: the share of tokens each expert gets, in its first layers.

    python benchmarks/shares.py FOLDER [--layers 4 --tokens 512]

Random weights ought to give each of 8 experts about 1/8 of the choices: caches and reads of a benchmark hang on it.
Only the first layers are loaded, from files that hold a layer each, as `synthetic.py` writes them."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from peer import drawn_ids

from mixtral_mlx.config import Config
from mixtral_mlx.model import Model
from mixtral_mlx.weights import load


class Listening(nn.Module):
    """A router whose scores are kept."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.scores: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.scores.append(self.gate(x))
        return self.scores[-1]  # (B, T, E)


@dataclass(frozen=True)
class Shares:
    """Each expert's part of a layer's choices, and how often a token chooses an expert that the one before it did."""

    layer: int
    experts: list[float]
    repeated: float


def measure(folder: Path, layers: int, tokens: int) -> list[Shares]:
    """Route one prompt of random ids through the first `layers`."""
    with tempfile.TemporaryDirectory() as temporary:
        _write_first_layers(folder, Path(temporary), layers)
        loaded = load(Path(temporary))
        assert isinstance(loaded.model, Model)
        listening = []
        for layer in loaded.model.layers:
            listening.append(Listening(layer.block_sparse_moe.gate))
            layer.block_sparse_moe.gate = listening[-1]
        mx.eval(loaded.model.model(mx.array([drawn_ids(loaded.config.vocab_size, tokens)])))
    chosen = loaded.config.num_experts_per_tok
    return [_shares(n, gate.scores[0][0], chosen) for n, gate in enumerate(listening)]


def _shares(layer: int, scores: mx.array, chosen: int) -> Shares:
    """From scores (T, E)."""
    best = mx.argsort(-scores, axis=-1)[:, :chosen]  # (T, K)
    taken = (best[..., None] == mx.arange(scores.shape[-1])).sum(axis=1)  # (T, E), 0 or 1
    experts: Any = (taken.sum(axis=0) / best.size).tolist()
    repeated: Any = ((taken[1:] * taken[:-1]).sum() / best[1:].size).item()
    return Shares(layer, experts, repeated)


def _write_first_layers(folder: Path, dest: Path, layers: int) -> None:
    """A folder of links to the files that a model of fewer layers needs."""
    config = Config.read(folder)
    layers = min(layers, config.num_hidden_layers)
    assert config.quantization is not None
    packing = config.quantization
    kept = {path: own for path, own in packing.overrides.items() if _layer(path) < layers}
    config = replace(config, num_hidden_layers=layers, quantization=replace(packing, overrides=kept))
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    weight_map = {name: file for name, file in weight_map.items() if _layer(name) < layers}
    for file in set(weight_map.values()):
        (dest / file).symlink_to((folder / file).resolve())
    (dest / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (dest / "config.json").write_text(json.dumps(config.to_dict()))


def _layer(name: str) -> int:
    """The layer that a tensor or module belongs to; of those outside all layers -1."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    found = measure(args.folder, args.layers, args.tokens)
    for shares in found:
        print(f"layer {shares.layer:2}: " + " ".join(f"{share:.3f}" for share in shares.experts), end="")
        print(f"   again in the next token {shares.repeated:.3f}")
    every = [share for shares in found for share in shares.experts]
    means = [sum(column) / len(found) for column in zip(*(shares.experts for shares in found), strict=True)]
    print("mean    : " + " ".join(f"{share:.3f}" for share in means))
    print(f"lowest {min(every):.3f}, highest {max(every):.3f}; even would be {1 / len(means):.3f}")


if __name__ == "__main__":
    main()
