"""One tiny Mixtral in every form that people have checkpoints in.

`FORMS` writes those that need no torch, at test time, out of the folder `hf` beside this file. What needs torch,
transformers or ggml lies beside this file as well and is made by running it:

    python -m tests.sources.make_sources                            # needs torch and transformers
    python -m tests.sources.make_sources --ggml libggml-base.so     # needs numpy, gguf and any build of ggml

All forms of `hf` hold bfloat16 and the same numbers. `kquants.gguf` is of another model, whose rows are 256 wide as
K-quants need: a matrix in each type that ggml quantizes, and in `kquants.safetensors` some rows as ggml reads them."""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
Arrays = dict[str, np.ndarray[Any, Any]]

CONFIG: dict[str, Any] = {
    **{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu"},
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768},
    **{"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False},
    **{"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"},
}
WIDE = {
    **{**CONFIG, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_local_experts": 3},
    **{"num_attention_heads": 32, "num_key_value_heads": 4},
}
LETTERS = {"gate": "w1", "down": "w2", "up": "w3"}


# Weights, under Hugging Face's classic names, and their renaming.


def hf_weights() -> Arrays:
    """The tiny Mixtral, as float32."""
    import mlx.core as mx

    arrays: Arrays = {}
    for file in sorted((HERE / "hf").glob("model*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        arrays |= {name: np.array(array.astype(mx.float32)) for name, array in loaded.items()}
    return arrays


def wide_weights() -> Arrays:
    """Seeded weights with rows of 256."""
    random = np.random.Generator(np.random.PCG64(3))
    return {name: (random.standard_normal(shape) * 0.05).astype(np.float32) for name, shape in _shapes(WIDE).items()}


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.block_sparse_moe.gate.weight": (config["num_local_experts"], hidden),
        }
        for expert in range(config["num_local_experts"]):
            name = f"{layer}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{name}.w1.weight": (ffn, hidden), f"{name}.w3.weight": (ffn, hidden)}
            shapes[f"{name}.w2.weight"] = (hidden, ffn)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _experts(weights: Arrays, layer: int, letter: str) -> np.ndarray[Any, Any]:
    """All experts of a layer, stacked."""
    prefix = f"model.layers.{layer}.block_sparse_moe.experts."
    count = sum(name.startswith(prefix) for name in weights) // 3
    return np.stack([weights[f"{prefix}{expert}.{letter}.weight"] for expert in range(count)])


def _without_experts(weights: Arrays) -> Arrays:
    return {name: array for name, array in weights.items() if ".experts." not in name}


def _layers(weights: Arrays) -> range:
    return range(sum(name.endswith(".input_layernorm.weight") for name in weights))


def _pairs_beside_each_other(array: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a rotary matrix in the order of Mistral and GGUF, as llama.cpp's converter permutes them."""
    rows, width = array.shape
    return array.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def _interleaved(weights: Arrays) -> Arrays:
    head_dim = CONFIG["head_dim"]
    return {
        name: _pairs_beside_each_other(array, len(array) // head_dim)
        if ".q_proj." in name or ".k_proj." in name
        else array
        for name, array in weights.items()
    }


def renamed(weights: Arrays, names: Mapping[str, str]) -> Arrays:
    """`weights` with each part of `names` replaced, whole words only."""
    result: Arrays = {}
    for name, array in weights.items():
        for old, new in names.items():
            name = f".{name}.".replace(f".{old}.", f".{new}." if new else ".").strip(".")
        result[name] = array
    return result


_MISTRAL = {
    **{"model": "", "embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn": "attention"},
    **{"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"{x}_proj": f"w{x}" for x in "qkvo"},
}
_GGUF = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{"self_attn.o_proj": "attn_output", "block_sparse_moe.gate": "ffn_gate_inp"},
}


def torrent_names(weights: Arrays) -> Arrays:
    """As in Mistral's torrent: a tensor for each expert."""
    return renamed(_interleaved(weights), {**_MISTRAL, "block_sparse_moe": "feed_forward"})


def hub_names(weights: Arrays) -> Arrays:
    """As in Mistral's own files on the hub: experts one below the other, w2 transposed."""
    result = renamed(_without_experts(_interleaved(weights)), _MISTRAL)
    for n in _layers(weights):
        for letter in ("w1", "w2", "w3"):
            stack = _experts(weights, n, letter)
            stack = stack.swapaxes(1, 2) if letter == "w2" else stack
            result[f"layers.{n}.block_sparse_moe.{letter}"] = np.ascontiguousarray(stack).reshape(-1, stack.shape[2])
    return result


def fused_names(weights: Arrays) -> Arrays:
    """As transformers 5 holds them: experts stacked, gate and up in one."""
    result = {name.replace("block_sparse_moe", "mlp"): array for name, array in _without_experts(weights).items()}
    for n in _layers(weights):
        gate, up = _experts(weights, n, "w1"), _experts(weights, n, "w3")
        result[f"model.layers.{n}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        result[f"model.layers.{n}.mlp.experts.down_proj"] = _experts(weights, n, "w2")
    return result


def stacked_names(weights: Arrays) -> Arrays:
    """As MLX holds them: experts stacked."""
    result = _without_experts(weights)
    for n in _layers(weights):
        for word, letter in LETTERS.items():
            name = f"model.layers.{n}.block_sparse_moe.switch_mlp.{word}_proj.weight"
            result[name] = _experts(weights, n, letter)
    return result


def gguf_names(weights: Arrays, *, stacked: bool) -> Arrays:
    """As in GGUF files: newer ones have the experts stacked, older ones a tensor for each."""
    result = renamed(_without_experts(_interleaved(weights)), _GGUF)
    for n in _layers(weights):
        for word, letter in LETTERS.items():
            stack = _experts(weights, n, letter)
            if stacked:
                result[f"blk.{n}.ffn_{word}_exps.weight"] = stack
            else:
                result |= {f"blk.{n}.ffn_{word}.{e}.weight": array for e, array in enumerate(stack)}
    return result


# Containers that need no torch.


def write_config(folder: Path, changes: Mapping[str, Any] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(changes or {})}, indent=1))


def write_safetensors(file: Path, arrays: Arrays, dtype: str = "bfloat16") -> None:
    """Floats as `dtype`, integers as they are."""
    import mlx.core as mx

    floats = {n: a for n, a in arrays.items() if a.dtype.kind == "f"}
    tensors = {n: mx.array(a).astype(getattr(mx, dtype)) for n, a in floats.items()}
    tensors |= {n: mx.array(a) for n, a in arrays.items() if n not in floats}
    mx.save_safetensors(str(file), tensors, metadata={"format": "pt"})


def params(*, torrent: bool) -> dict[str, Any]:
    """Mistral's params.json, as in the torrent or as on the hub."""
    c = CONFIG
    if torrent:
        return {
            **{"dim": c["hidden_size"], "n_layers": c["num_hidden_layers"], "head_dim": c["head_dim"]},
            **{"hidden_dim": c["intermediate_size"], "n_heads": c["num_attention_heads"]},
            **{"n_kv_heads": c["num_key_value_heads"], "norm_eps": c["rms_norm_eps"], "vocab_size": c["vocab_size"]},
            "moe": {"num_experts_per_tok": c["num_experts_per_tok"], "num_experts": c["num_local_experts"]},
        }
    keys: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    keys += ("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rms_norm_eps", "rope_theta")
    return {**{key: c[key] for key in keys}, "max_position_embeddings": 32768, "sliding_window": "32768"}


def write_fused(folder: Path) -> None:
    write_config(folder)
    write_safetensors(folder / "model.safetensors", fused_names(hf_weights()))


def write_consolidated(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params(torrent=True)))
    write_safetensors(folder / "consolidated.safetensors", torrent_names(hf_weights()))


def write_mlx(folder: Path, *, stacked: bool = True, bits: int | None = None) -> None:
    """An MLX folder, quantized to `bits` in groups of 32 if given."""
    import mlx.core as mx

    packing = {"group_size": 32, "bits": bits}
    write_config(folder, {"quantization": packing} if bits else None)
    weights = stacked_names(hf_weights()) if stacked else hf_weights()
    tensors = {name: mx.array(array).astype(mx.bfloat16) for name, array in weights.items()}
    for name in [name for name, array in weights.items() if bits and array.ndim > 1]:
        path = name.removesuffix(".weight")
        tensors[name], tensors[f"{path}.scales"], tensors[f"{path}.biases"] = mx.quantize(tensors[name], 32, bits)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})


def write_gguf(
    file: Path,
    kind: str | Callable[[str], str] = "F32",
    *,
    stacked: bool = True,
    weights: Arrays | None = None,
    config: Mapping[str, Any] = CONFIG,
    metadata: Callable[[Any], None] = lambda writer: None,
    tensors_a_file: int = 0,
    quantize: Callable[[np.ndarray[Any, Any], Any], np.ndarray[Any, Any]] | None = None,
) -> None:
    """A GGUF with its matrices of type `kind` (norms and router are float32, as llama.cpp has them)."""
    import gguf

    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama", split_max_tensors=tensors_a_file)
    _add_metadata(writer, config)
    metadata(writer)
    for name, array in gguf_names(weights or hf_weights(), stacked=stacked).items():
        chosen = kind if isinstance(kind, str) else kind(name)
        plain = array.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        type_ = gguf.GGMLQuantizationType["F32" if plain else chosen]
        packed = (quantize or gguf.quants.quantize)(np.ascontiguousarray(array), type_)
        writer.add_tensor(name, packed, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


# AWQ and GPTQ: whole numbers from 0 to 2^bits - 1 with a scale and a zero for each group of inputs.


def quantized(
    weight: np.ndarray[Any, Any], groups: np.ndarray[Any, Any], bits: int = 4
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Numbers (in, out), zeros (groups, out) and float16 scales (groups, out); `groups` says each input's group."""
    columns, top = weight.T, 2**bits - 1
    count = int(groups.max()) + 1
    low = np.stack([np.minimum(columns[groups == g].min(axis=0), 0) for g in range(count)])
    high = np.stack([np.maximum(columns[groups == g].max(axis=0), 0) for g in range(count)])
    scales = ((high - low) / top).astype(np.float16)
    wide = np.maximum(scales.astype(np.float32), 1e-8)
    # Zero itself can be a zero in neither project's older files, where 1 is taken off.
    zeros = np.clip(np.round(-low / wide), 1, top).astype(np.uint32)
    numbers = np.clip(np.round(columns / wide[groups]) + zeros[groups], 0, top).astype(np.uint32)
    return numbers, zeros, scales


def packed_words(
    numbers: np.ndarray[Any, Any], axis: int, order: tuple[int, ...], bits: int = 4
) -> np.ndarray[Any, Any]:
    """32-bit words along `axis`: the i-th number of a word, from the lowest bits up, is its `order[i]`-th."""
    across = np.moveaxis(numbers.astype(np.uint32), axis, -1)
    words = np.zeros((*across.shape[:-1], across.shape[-1] // len(order)), np.uint32)
    for place, which in enumerate(order):
        words |= across[..., which :: len(order)] << np.uint32(bits * place)
    return np.moveaxis(words, -1, axis).view(np.int32)


def _is_packed(name: str) -> bool:
    return "self_attn" in name or ".experts." in name


def write_awq(folder: Path, group_size: int = 32) -> None:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    arrays: Arrays = {}
    for name, weight in hf_weights().items():
        path = name.removesuffix(".weight")
        if not _is_packed(name):
            arrays[name] = weight
            continue
        numbers, zeros, scales = quantized(weight, np.arange(weight.shape[1]) // group_size)
        arrays[f"{path}.qweight"] = packed_words(numbers, 1, order)
        arrays[f"{path}.qzeros"] = packed_words(zeros, 1, order)
        arrays[f"{path}.scales"] = scales
    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    write_config(folder, {"quantization_config": {**settings, "modules_to_not_convert": ["gate"]}})
    write_safetensors(folder / "model.safetensors", arrays, "float16")


def write_gptq(folder: Path, *, bits: int = 4, act_order: bool = False, newer: bool = False) -> None:
    """`newer` is checkpoint_format gptq_v2, where zeros are stored as they are instead of less 1."""
    group_size, order = 32, tuple(range(32 // bits))
    random = np.random.Generator(np.random.PCG64(5))
    arrays: Arrays = {}
    for name, weight in hf_weights().items():
        path = name.removesuffix(".weight")
        if not _is_packed(name):
            arrays[name] = weight
            continue
        groups = (np.arange(weight.shape[1]) // group_size).astype(np.int32)
        groups = random.permutation(groups) if act_order else groups
        numbers, zeros, scales = quantized(weight, groups, bits)
        arrays[f"{path}.qweight"] = packed_words(numbers, 0, order, bits)
        arrays[f"{path}.qzeros"] = packed_words(zeros - np.uint32(not newer), 1, order, bits)
        arrays |= {f"{path}.scales": scales, f"{path}.g_idx": groups}
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": act_order, "sym": False}
    write_config(folder, {"quantization_config": {**settings, "checkpoint_format": "gptq_v2" if newer else "gptq"}})
    write_safetensors(folder / "model.safetensors", arrays, "float16")


def _copied(name: str) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        shutil.copytree(HERE / name, folder, dirs_exist_ok=True)

    return copy


def _gguf_form(kind: str, stacked: bool) -> Callable[[Path], None]:
    return lambda folder: write_gguf(folder / "tiny.gguf", kind, stacked=stacked)


TORCH_FORMS = ("hf", "bin", "bin-sharded", "torrent", "torrent-parts", "hub")
GGUF_KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
FORMS: dict[str, Callable[[Path], None]] = {
    **{name: _copied(name) for name in TORCH_FORMS},
    "fused": write_fused,
    "consolidated": write_consolidated,
    "mlx": write_mlx,
    "mlx-unstacked": lambda folder: write_mlx(folder, stacked=False),
    "mlx-q4": lambda folder: write_mlx(folder, bits=4),
    "mlx-q4-unstacked": lambda folder: write_mlx(folder, stacked=False, bits=4),
    **{f"gguf-{kind.lower()}": _gguf_form(kind, True) for kind in GGUF_KINDS},
    **{f"gguf-{kind.lower()}-split": _gguf_form(kind, False) for kind in GGUF_KINDS},
    "gguf-files": lambda folder: write_gguf(folder / "tiny.gguf", "BF16", tensors_a_file=9),
    "awq": write_awq,
    "gptq": write_gptq,
    "gptq-act-order": lambda folder: write_gptq(folder, act_order=True),
    "gptq-v2": lambda folder: write_gptq(folder, newer=True),
    "gptq-8bit": lambda folder: write_gptq(folder, bits=8),
}
"""Form → writes the model in it into a folder. Those that lose nothing are `LOSSLESS`."""
LOSSLESS = (
    *TORCH_FORMS,
    *("fused", "consolidated", "mlx", "mlx-unstacked"),
    *("gguf-f32", "gguf-f32-split", "gguf-bf16", "gguf-bf16-split", "gguf-files"),
)


# What needs torch and transformers.


def make_torch_forms() -> None:
    import torch

    weights = _make_hf()
    as_numpy = {name: tensor.float().numpy() for name, tensor in weights.items()}
    torrent, hub = (
        {name: torch.from_numpy(array.copy()).bfloat16() for name, array in names(as_numpy).items()}
        for names in (torrent_names, hub_names)
    )
    for name in TORCH_FORMS[1:]:
        shutil.rmtree(HERE / name, ignore_errors=True)
        (HERE / name).mkdir()
        if name.startswith("bin"):
            write_config(HERE / name)
        else:
            (HERE / name / "params.json").write_text(json.dumps(params(torrent=name != "hub"), indent=1))
    torch.save(weights, HERE / "bin" / "pytorch_model.bin")
    files = [f"pytorch_model-{n:05}-of-00003.bin" for n in (1, 2, 3)]
    index = _save_parts(HERE / "bin-sharded", weights, files)
    (HERE / "bin-sharded" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    torch.save(torrent, HERE / "torrent" / "consolidated.00.pth")
    _save_parts(HERE / "torrent-parts", torrent, [f"consolidated.{n:02}.pth" for n in range(4)])
    _save_parts(HERE / "hub", hub, [f"consolidated.{n:02}.pt" for n in range(8)])
    _make_odd_files()


def _make_hf() -> dict[str, Any]:
    """The folder `hf` by transformers, with the logits it computes in float32; returns its weights."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(11)
    model = MixtralForCausalLM(MixtralConfig(**{**CONFIG, "torch_dtype": "float32"})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.15)
            weight.copy_(weight.bfloat16())
        ids = torch.randint(3, CONFIG["vocab_size"], (2, 24))
        logits = model(ids).logits
    shutil.rmtree(HERE / "hf", ignore_errors=True)
    fused = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    model.bfloat16().save_pretrained(HERE / "hf", max_shard_size="80KB")
    write_config(HERE / "hf")
    save_file({"ids": ids, "logits": logits}, HERE / "hf" / "golden.safetensors")
    weights: dict[str, Any] = {}
    for file in sorted((HERE / "hf").glob("model*.safetensors")):
        weights |= load_file(file)
    ours = fused_names({name: tensor.float().numpy() for name, tensor in weights.items()})
    assert ours.keys() == fused.keys()
    assert all(np.array_equal(ours[name], fused[name]) for name in fused)
    return weights


def _save_parts(folder: Path, tensors: dict[str, Any], files: list[str]) -> dict[str, str]:
    """Deal the tensors out to `files`; returns which is where."""
    import torch

    where = {name: files[n % len(files)] for n, name in enumerate(tensors)}
    for file in files:
        torch.save({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
    return where


def _make_odd_files() -> None:
    """Tensors of numbers 0, 1, 2 … in forms that are rare in checkpoints."""
    import torch

    def numbers(*shape: int) -> Any:
        return torch.arange(float(np.prod(shape))).reshape(shape)

    whole = numbers(6, 4)
    tensors = {
        **{"float16": numbers(3, 4).half(), "int32": numbers(5).int(), "transposed": numbers(4, 3).t()},
        **{"whole": whole, "part": whole[2:5], "parameter": torch.nn.Parameter(numbers(2, 2))},
        **{"cube": numbers(2, 3, 4), "one": numbers(1, 5)},
    }
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    state = module.state_dict()
    state["parameter"] = tensors["parameter"]
    torch.save(state, HERE / "odd.pt")
    torch.save(state, HERE / "odd-old.pt", _use_new_zipfile_serialization=False)
    torch.save({"strided": numbers(4, 6)[:, ::2]}, HERE / "strided.pt")


# What needs ggml: its K-quants and IQ types.

K_KINDS = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS"),
    *("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
)


def k_kind(name: str) -> str:
    """Which type tensor `name` of `kquants.gguf` has: each in turn."""
    matrices = [n for n, a in gguf_names(wide_weights(), stacked=False).items() if a.ndim > 1 and "gate_inp" not in n]
    return K_KINDS[matrices.index(name) % len(K_KINDS)] if name in matrices else "F32"


def make_k_quants(library: Path) -> None:
    import gguf
    from safetensors.numpy import save_file

    ggml = ctypes.CDLL(str(library))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    samples: Arrays = {}

    def quantize(array: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
        if kind == gguf.GGMLQuantizationType.F32:
            return array
        rows, width = array.shape
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        packed = np.zeros((rows, width // block * nbytes), np.uint8)
        matters, found = np.ones(width, np.float32), np.zeros((rows, width), np.float32)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (array, packed, matters, found)]
        count = [ctypes.c_int64(n) for n in (0, rows, width)]
        ggml.ggml_quantize_chunk(int(kind), pointers[0], pointers[1], *count, pointers[2])
        name = f"dequantize_row_{kind.name.lower().replace('_k', '_K')}"
        getattr(ggml, name)(pointers[1], pointers[3], ctypes.c_int64(rows * width))
        samples.setdefault(kind.name, np.ascontiguousarray(found[[1, rows - 1]]))
        return packed

    write_gguf(HERE / "kquants.gguf", k_kind, stacked=False, weights=wide_weights(), config=WIDE, quantize=quantize)
    save_file(samples, HERE / "kquants.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ggml", type=Path, help="a libggml-base.so: make kquants.* with it instead")
    arguments = parser.parse_args()
    if arguments.ggml:
        make_k_quants(arguments.ggml)
    else:
        make_torch_forms()
