"""Write a 4-bit Mixtral checkpoint of seeded random weights, a tensor at a time: big ones need little memory.

python benchmarks/synthetic.py FOLDER [--layers 16 --hidden 2048 --ffn 7168]"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from importlib.resources import files
from itertools import groupby
from pathlib import Path

import numpy as np

from mixtral_mlx.config import Config, Packing, Quantization, TensorSpec

_PART = 64 << 20


def write_checkpoint(folder: Path, config: Config, seed: int = 0) -> None:
    """Write `config`'s tensors, one file per layer, with the v1 tokenizer beside them."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    named = sorted(config.tensors().items(), key=lambda item: _file(item[0]))
    for file, group in groupby(named, key=lambda item: _file(item[0])):
        tensors = dict(group)
        _write_file(folder / file, tensors, random)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    source = files("mistral_common") / "data" / "tokenizer.model.v1"
    shutil.copyfile(str(source), folder / "tokenizer.model")


def _file(tensor: str) -> str:
    layer = re.match(r"model\.layers\.(\d+)\.", tensor)
    return f"model-layer-{int(layer[1]):03}.safetensors" if layer else "model-rest.safetensors"


def _write_file(path: Path, tensors: dict[str, TensorSpec], random: np.random.Generator) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, spec in tensors.items():
        start, end = end, end + spec.nbytes("bfloat16")
        dtype = "BF16" if spec.kind == "float" else spec.kind
        header[name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, spec in tensors.items():
            _write_tensor(file.write, name, spec, random)


def _write_tensor(write: Callable[[bytes], object], name: str, spec: TensorSpec, random: np.random.Generator) -> None:
    if spec.kind == "U32":
        left = spec.nbytes("bfloat16")
        while left:
            part = min(left, _PART)
            write(random.bytes(part))
            left -= part
        return
    # Nibbles have a mean of 7.5: biases of -7.5 scales centre the weights, so that routing stays even.
    value = {"scales": 0.004, "biases": -7.5 * 0.004, "weight": 1.0}[name.rsplit(".", 1)[1]]
    bits = np.float32(value).view(np.uint32) >> np.uint32(16)
    write(np.full(math.prod(spec.shape), bits, np.uint16).tobytes())


def config_of(hidden: int, ffn: int, layers: int) -> Config:
    """A Mixtral of that size, 4-bit with an 8-bit router, heads of 128."""
    packing = Quantization(Packing(4), {f"model.layers.{n}.block_sparse_moe.gate": Packing(8) for n in range(layers)})
    heads = hidden // 128
    return Config(
        32000,
        hidden,
        ffn,
        layers,
        heads,
        max(heads // 4, 1),
        128,
        8,
        2,
        quantization=packing,
        dtype="bfloat16",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=7168)
    parser.add_argument("--layers", type=int, default=16)
    args = parser.parse_args()
    config = config_of(args.hidden, args.ffn, args.layers)
    write_checkpoint(args.folder, config)
    print(f"{args.folder}: {config.parameters() / 1e9:.2f} B parameters, {config.nbytes() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
