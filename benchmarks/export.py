"""Write a model for other engines: a GGUF file for llama.cpp, a bfloat16 folder for transformers.

    python benchmarks/export.py FOLDER --gguf OUT.gguf [--type q4_0] [--transformers OUT_FOLDER]

FOLDER is anything that can be converted. A matrix is read at a time, as floats, and what is written is quantized anew:
GGUF's q4_0 has other steps than MLX's 4 bits, so the weights are near the folder's, and only their cost is the same."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from mixtral_mlx.config import Config, MixtralError
from mixtral_mlx.convert import mlx as mlx_folders
from mixtral_mlx.convert.layout import Layout
from mixtral_mlx.convert.names import ConvertError, Matrix, matrices
from mixtral_mlx.convert.source import Source, open_source
from mixtral_mlx.prompt import Tokenizer
from mixtral_mlx.weights import bytes_of

_TYPES = {"q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
_GGUF_NAMES = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{"self_attn.o_proj": "attn_output", "block_sparse_moe.gate": "ffn_gate_inp"},
    **{f"block_sparse_moe.switch_mlp.{x}_proj": f"ffn_{x}_exps" for x in ("gate", "up", "down")},
}
_LETTERS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def opened(folder: Path) -> tuple[Source, Config, list[Matrix]]:
    """A source, the configuration of its weights as floats, and its matrices, a stack's experts one after the other."""
    source = open_source(folder)
    plain = replace(source.config, quantization=None)
    tensors = mlx_folders.unpack(source.tensors, source.config) if source.config.quantization else source.tensors
    return source, plain, matrices(tensors, plain)


# For llama.cpp.


def write_gguf(folder: Path, file: Path, kind: str = "q4_0") -> None:
    """All matrices as `kind`; norms and routers are float32, as llama.cpp's own converter has them."""
    _, config, pieces = opened(folder)
    beside = file.with_name(f"{file.name}.part")
    writer = gguf.GGUFWriter(beside, "llama")
    _add_configuration(writer, config, folder.name)
    writer.add_file_type(_TYPES[kind])
    _add_tokenizer(writer, folder, config)
    stacks = [list(stack) for _, stack in groupby(pieces, key=lambda piece: piece.path)]
    for stack in stacks:
        shape, packed = _shape(stack), _type(stack[0], kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[packed]
        nbytes = int(np.prod(shape)) // block * block_bytes
        writer.add_tensor_info(_gguf_name(stack[0].path), shape, np.dtype(np.float32), nbytes, packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for stack in stacks:
        writer.write_tensor_data(_packed(stack, config, kind))
    writer.close()
    beside.replace(file)


def _shape(stack: list[Matrix]) -> tuple[int, ...]:
    return stack[0].shape if stack[0].expert is None else (len(stack), *stack[0].shape)


def _type(matrix: Matrix, kind: str) -> gguf.GGMLQuantizationType:
    plain = len(matrix.shape) == 1 or matrix.path.endswith(".gate")
    return gguf.GGMLQuantizationType["F32" if plain else kind.upper()]


def _gguf_name(path: str) -> str:
    if not path.startswith("model.layers."):
        return f"{_GGUF_NAMES[path]}.weight"
    layer, _, name = path.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_GGUF_NAMES[name]}.weight"


def _packed(stack: list[Matrix], config: Config, kind: str) -> np.ndarray[Any, Any]:
    """A stack as it stands in the file. Experts are packed one by one: as floats a stack is many times as large."""
    parts = []
    for matrix in stack:
        values = matrix.read().astype(mx.float32)
        if matrix.path.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if matrix.path.endswith("q_proj") else config.num_key_value_heads
            values = _pairs_beside_each_other(values, heads)
        packed = _type(matrix, kind)
        q4_0 = packed == gguf.GGMLQuantizationType.Q4_0
        parts.append(_q4_0(values) if q4_0 else gguf.quants.quantize(np.array(values), packed))
    return parts[0] if stack[0].expert is None else np.stack(parts)


def _q4_0(values: mx.array) -> np.ndarray[Any, Any]:
    """What `gguf.quants.quantize` makes of them, up to rounding, in half the time: 8x7B has 47 billion."""
    blocks = values.reshape(-1, 32)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    step = mx.where(high > -low, high, low) / -8
    inverse = mx.where(step == 0, 0, 1 / step)
    nibbles = mx.minimum((blocks * inverse + 8.5).astype(mx.uint8), 15)
    pairs = nibbles[:, :16] | (nibbles[:, 16:] << 4)
    packed = mx.concatenate([step.astype(mx.float16).view(mx.uint8), pairs], -1)
    return np.array(packed).reshape(values.shape[0], -1)


def _pairs_beside_each_other(array: mx.array, heads: int) -> mx.array:
    """Rows of a rotary matrix in llama.cpp's order; ours lie half a head apart."""
    rows, width = array.shape
    return array.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def _add_configuration(writer: gguf.GGUFWriter, config: Config, name: str) -> None:
    if config.rope_scaling is not None:
        raise ConvertError("The model scales its rotary frequencies, which is not written here.", code="rope_scaling")
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: Config) -> None:
    pieces = list(gguf.vocab.SentencePieceVocab(Tokenizer.read(folder, config.vocab_size).file.parent).all_tokens())
    # A model may have more embeddings than its tokenizer has pieces; llama.cpp wants as many of both.
    for n in range(len(pieces), config.vocab_size):
        pieces.append((f"[unused {n}]".encode(), -1000.0, gguf.TokenType.UNUSED))
    texts, scores, kinds = zip(*pieces, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(texts))
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(kinds))
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_ids[0])
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


# For transformers.


def write_transformers(folder: Path, out: Path) -> None:
    """A bfloat16 folder under Hugging Face's classic names, a tensor for each expert."""
    source, config, pieces = opened(folder)
    config = replace(config, dtype="bfloat16")
    layout = Layout.plan(config, {_hugging_face_name(piece): (piece.shape, "BF16") for piece in pieces})
    beside = out.with_name(f"{out.name}.part")
    layout.write_empty(beside)
    for file, group in groupby(pieces, key=lambda piece: layout.places[_hugging_face_name(piece)].file):
        with (beside / file).open("r+b") as stream:
            for piece in group:
                stream.seek(layout.places[_hugging_face_name(piece)].offset)
                stream.write(_bfloat16(piece))
    (beside / "model.safetensors.index.json").write_text(layout.index())
    (beside / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
    source.write_tokenizer(beside)
    beside.rename(out)


def _hugging_face_name(piece: Matrix) -> str:
    moe, _, projection = piece.path.partition(".switch_mlp.")
    path = f"{moe}.experts.{piece.expert}.{_LETTERS[projection]}" if projection else piece.path
    return f"{path}.weight"


def _bfloat16(piece: Matrix) -> memoryview:
    array = piece.read().astype(mx.bfloat16)
    mx.eval(array)
    return bytes_of(array)


def _nbytes(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, metavar="OUT.gguf")
    parser.add_argument("--type", choices=_TYPES, default="q4_0", help="what the GGUF's matrices are packed as")
    parser.add_argument("--transformers", type=Path, metavar="OUT_FOLDER")
    args = parser.parse_args()
    try:
        if args.gguf:
            write_gguf(args.folder, args.gguf, args.type)
        if args.transformers:
            write_transformers(args.folder, args.transformers)
    except MixtralError as error:
        sys.exit(f"{error}\n{error.hint}".strip())
    for path in filter(None, (args.gguf, args.transformers)):
        print(f"{path}: {_nbytes(path) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
