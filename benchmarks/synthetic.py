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
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np

from mixtral_mlx.config import Config, Packing, Quantization, TensorSpec

_PART = 64 << 20
_SHARD = 5 * 10**9


def write_checkpoint(folder: Path, config: Config, seed: int = 0) -> None:
    """Write `config`'s tensors, one file per layer, with the v1 tokenizer beside them.

    Quantized ones are in MLX's layout, floats in Hugging Face's: a tensor per expert, files of up to 5 GB."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    tensors = config.tensors() if config.quantization else _unstacked(config.tensors())
    groups = _by_layer(tensors) if config.quantization else _by_size(tensors, config.dtype)
    weight_map: dict[str, str] = {}
    for file, group in groups.items():
        _write_file(folder / file, group, random)
        weight_map |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    source = files("mistral_common") / "data" / "tokenizer.model.v1"
    shutil.copyfile(str(source), folder / "tokenizer.model")


def _by_layer(tensors: dict[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    groups: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in tensors.items():
        groups.setdefault(_file(name), {})[name] = spec
    return groups


def _by_size(tensors: dict[str, TensorSpec], dtype: str) -> dict[str, dict[str, TensorSpec]]:
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in tensors.items():
        if size + spec.nbytes(dtype) > _SHARD:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.nbytes(dtype)
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, 1)}


def _unstacked(tensors: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    letters = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    result: dict[str, TensorSpec] = {}
    for name, spec in tensors.items():
        moe, found, rest = name.partition(".switch_mlp.")
        if not found:
            result[name] = spec
            continue
        for expert in range(spec.shape[0]):
            result[f"{moe}.experts.{expert}.{letters[rest.split('.')[0]]}.weight"] = TensorSpec(spec.shape[1:])
    return result


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
    part, last = spec.nbytes("bfloat16"), name.rsplit(".", 1)[1]
    if spec.kind == "U32":
        for size in _parts(part):
            write(random.bytes(size))
    elif last == "weight" and len(spec.shape) > 1:
        for size in _parts(part):
            noise = np.frombuffer(random.bytes(size), np.uint16)
            # Sign and mantissa are random, the exponent is that of values between 1/64 and 1/32.
            write((noise & np.uint16(0x807F) | np.uint16(121 << 7)).tobytes())
    else:
        # Nibbles have a mean of 7.5: biases of -7.5 scales centre the weights, so that routing stays even.
        value = {"scales": 0.004, "biases": -7.5 * 0.004, "weight": 1.0}[last]
        bits = np.float32(value).view(np.uint32) >> np.uint32(16)
        write(np.full(math.prod(spec.shape), bits, np.uint16).tobytes())


def _parts(size: int) -> list[int]:
    return [min(_PART, size - at) for at in range(0, size, _PART)]


def config_of(hidden: int, ffn: int, layers: int, kv_heads: int | None = None) -> Config:
    """A Mixtral of that size, 4-bit with an 8-bit router, heads of 128, a quarter as many `kv_heads` if not said."""
    packing = Quantization(Packing(4), {f"model.layers.{n}.block_sparse_moe.gate": Packing(8) for n in range(layers)})
    heads = hidden // 128
    return Config(
        32000,
        hidden,
        ffn,
        layers,
        heads,
        kv_heads or max(heads // 4, 1),
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
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--bfloat16", action="store_true")
    args = parser.parse_args()
    config = config_of(args.hidden, args.ffn, args.layers, args.kv_heads)
    if args.bfloat16:
        config = replace(config, quantization=None)
    write_checkpoint(args.folder, config)
    print(f"{args.folder}: {config.parameters() / 1e9:.2f} B parameters, {config.nbytes() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
