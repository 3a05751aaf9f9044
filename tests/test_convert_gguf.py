"""GGUF: every type and both generations give the model's matrices, and hostile files an error with a code."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import sentencepiece

from mixtral_mlx.config import Config, MixtralError
from mixtral_mlx.convert.gguf import open_gguf, parts_of
from mixtral_mlx.convert.names import ConvertError, _half_split, matrices
from mixtral_mlx.prompt import Tokenizer

from .checkpoints import TOKENIZERS, read_arrays
from .sources import make_sources
from .sources.make_sources import CONFIG, FORMS, HERE, K_KINDS, WIDE, hf_weights, k_kind, stacked_names, write_gguf

LIMIT_S = 2.0
ODD = [
    *("", " ", "  a  b ", "Hello world", "\n\n\ttab", "日本語 🙂‍↔️", "\x00\x07", "[INST] <s> </s>"),
    *("é" * 40, "<0x41>", "▁x", "١٢٣"),
]
BOUNDS = {"F16": 1e-3, "Q4_0": 0.1, "Q4_1": 0.09, "Q5_0": 0.05, "Q5_1": 0.045, "Q8_0": 0.006}
K_BOUNDS = {  # what each type costs, relative to the weights, on normally distributed ones
    **{"Q2_K": 0.35, "Q3_K": 0.18, "Q4_K": 0.09, "Q5_K": 0.045, "Q6_K": 0.025, "IQ4_NL": 0.09, "IQ4_XS": 0.09},
    **{"IQ3_S": 0.18, "IQ3_XXS": 0.21, "IQ2_S": 0.31, "IQ2_XS": 0.34, "IQ2_XXS": 0.39, "IQ1_S": 0.58, "IQ1_M": 0.55},
    **BOUNDS,
}


def read_model(paths: list[Path]) -> tuple[dict[tuple[str, int | None], np.ndarray[Any, Any]], Config]:
    tensors, raw, _ = open_gguf(paths)
    config = Config.from_dict(raw)
    found = {(m.path, m.expert): np.array(m.read().astype(mx.float32)) for m in matrices(tensors, config)}
    return found, config


def distance(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def compare(
    found: dict[tuple[str, int | None], np.ndarray[Any, Any]],
    weights: dict[str, np.ndarray[Any, Any]],
    bound: Callable[[str, int | None], float],
) -> None:
    expected = stacked_names(weights)
    assert {f"{path}.weight" for path, _ in found} == expected.keys()
    for (path, expert), array in found.items():
        values = expected[f"{path}.weight"]
        values = values if expert is None else values[expert]
        exact = values.ndim == 1 or path.endswith(".gate") or bound(path, expert) == 0
        assert distance(array, values) <= (0 if exact else bound(path, expert)), (path, expert)


@pytest.mark.parametrize("form", [name for name in FORMS if name.startswith("gguf")])
def test_every_gguf_form_holds_the_matrices_of_the_hugging_face_form(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path)
    paths = sorted(tmp_path.glob("*.gguf"))
    assert parts_of(paths[0]) == paths
    found, config = read_model(paths[::-1])
    kind = form.split("-")[1].upper()
    compare(found, hf_weights(), lambda path, expert: BOUNDS.get(kind, 0))
    dtype = {"F16": "float16", "F32": "float32"}.get(kind, "bfloat16")
    assert config == Config.from_dict({**CONFIG, "torch_dtype": dtype})


def test_k_quants_and_iq_types_are_read_as_ggml_reads_them() -> None:
    """`kquants.gguf` was quantized by ggml itself, and ggml read the rows in `kquants.safetensors` back."""
    tensors, _, _ = open_gguf([HERE / "kquants.gguf"])
    samples = read_arrays(HERE / "kquants.safetensors")
    weights = make_sources.gguf_names(make_sources.wide_weights(), stacked=False)
    kinds = {name: k_kind(name) for name in tensors if k_kind(name) != "F32"}
    assert set(kinds.values()) == samples.keys() >= {kind for kind in K_KINDS if kind.endswith("_K") or "IQ" in kind}
    for kind in samples:
        name = next(name for name in kinds if kinds[name] == kind)
        last = tensors[name].shape[0] - 1
        found = mx.concatenate([tensors[name].read(1, 2), tensors[name].read(last, last + 1)])
        np.testing.assert_array_equal(np.array(found), np.array(samples[kind]))
        whole = np.array(tensors[name].read(0, last + 1))
        assert distance(whole, weights[name]) <= K_BOUNDS[kind], (kind, distance(whole, weights[name]))


def test_a_model_of_mixed_types_is_read() -> None:
    found, config = read_model([HERE / "kquants.gguf"])
    assert config == Config.from_dict(WIDE)
    compare(found, make_sources.wide_weights(), lambda path, expert: max(K_BOUNDS.values()))


def test_a_block_of_q4_k_by_hand(tmp_path: Path) -> None:
    """256 numbers: d × scale × nibble − dmin × min, with a scale and a min of 6 bits for each 32 of them."""
    chance = np.random.default_rng(4)
    scales, mins, nibbles = chance.integers(0, 64, 8), chance.integers(0, 64, 8), chance.integers(0, 16, (8, 32))
    packed = [int(s & 63 | (scales[n + 4] >> 4) << 6) for n, s in enumerate(scales[:4])]
    packed += [int(m & 63 | (mins[n + 4] >> 4) << 6) for n, m in enumerate(mins[:4])]
    packed += [int(scales[n] & 15 | (mins[n] & 15) << 4) for n in range(4, 8)]
    bytes_ = np.concatenate([nibbles[n] | nibbles[n + 1] << 4 for n in range(0, 8, 2)]).astype(np.uint8).tobytes()
    block = struct.pack("<2e", 0.5, 0.25) + bytes(packed) + bytes_

    def quantize(array: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
        if kind == gguf.GGMLQuantizationType.F32:
            return array
        return np.tile(np.frombuffer(block, np.uint8), (array.shape[0], array.shape[1] // 256))

    weights = make_sources.wide_weights()
    write_gguf(tmp_path / "x.gguf", "Q4_K", stacked=False, weights=weights, config=WIDE, quantize=quantize)
    expected = (0.5 * scales[:, None] * nibbles - 0.25 * mins[:, None]).reshape(-1)
    tensors, _, _ = open_gguf([tmp_path / "x.gguf"])
    np.testing.assert_array_equal(np.array(tensors["output.weight"].read(3, 4))[0], expected)


def test_rows_are_read_alone_together_and_from_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("BF16", "Q5_1"):
        write_gguf(tmp_path / f"{kind}.gguf", kind)
        stored = open_gguf([tmp_path / f"{kind}.gguf"])[0]["blk.1.ffn_down_exps.weight"]
        whole = np.array(stored.read(0, 8).astype(mx.float32))
        assert whole.shape == (8, 32, 64)
        with ThreadPoolExecutor(4) as pool:
            rows = pool.map(lambda n, s=stored: np.array(s.read(n, n + 1).astype(mx.float32)), range(8))
        np.testing.assert_array_equal(np.concatenate(list(rows)), whole)
        monkeypatch.setattr("mixtral_mlx.convert.gguf._CHUNK_ITEMS", 64 * 5)
        np.testing.assert_array_equal(np.array(stored.read(2, 5).astype(mx.float32)), whole[2:5])


def test_memory_is_bounded_by_the_rows_asked_for(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", "Q8_0", weights=make_sources.wide_weights(), config=WIDE)
    stored = open_gguf([tmp_path / "x.gguf"])[0]["blk.0.ffn_up_exps.weight"]
    tracemalloc.start()
    stored.read(1, 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 256 * 256


def test_undoing_the_rotary_order_gives_the_same_attention_scores() -> None:
    """Mistral and llama.cpp turn neighbours, rows 2i and 2i + 1; Hugging Face and MLX rows i and i + half a head."""
    heads, size, width, positions = 4, 8, 32, 5
    chance = np.random.default_rng(0)
    queries, keys = (chance.standard_normal((heads * size, width)) for _ in range(2))
    inputs = chance.standard_normal((positions, width))
    angles = np.arange(positions)[:, None] * 1e4 ** (-np.arange(0, size, 2) / size)

    def neighbours(matrix: Any) -> Any:
        rows = (inputs @ matrix.T).reshape(positions, heads, size // 2, 2)
        turned = (rows[..., 0] + 1j * rows[..., 1]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(positions, heads, size)

    def halves(matrix: Any) -> Any:
        rows = (inputs @ matrix.T).reshape(positions, heads, size)
        one, two = rows[..., : size // 2], rows[..., size // 2 :]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    undo = _half_split(heads)
    ours = [halves(np.array(undo(mx.array(m, mx.float32)))) for m in (queries, keys)]
    theirs = [neighbours(m) for m in (queries, keys)]
    found, expected = (np.einsum("thd,shd->hts", *pair) for pair in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# Metadata.


def changed(folder: Path, change: Callable[[Any], None], **options: Any) -> Path:
    write_gguf(folder / "x.gguf", metadata=change, **options)
    return folder / "x.gguf"


def without(key: str) -> Callable[[Any], None]:
    def change(writer: Any) -> None:
        del writer.kv_data[0][key]

    return change


def having(key: str, value: Any, kind: gguf.GGUFValueType) -> Callable[[Any], None]:
    def change(writer: Any) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind)

    return change


NUMBER, FLOAT, TEXT, LIST = (gguf.GGUFValueType[n] for n in ("UINT32", "FLOAT32", "STRING", "ARRAY"))


def config_of(file: Path) -> Config:
    return Config.from_dict(open_gguf([file])[1])


def test_what_llama_cpp_takes_for_granted_is_taken_for_granted(tmp_path: Path) -> None:
    assert config_of(changed(tmp_path, without("llama.rope.freq_base"))).rope_theta == 10000.0
    assert config_of(changed(tmp_path, without("llama.rope.dimension_count"))).head_dim == 8
    assert config_of(changed(tmp_path, without("tokenizer.ggml.eos_token_id"))).eos_token_ids == (2,)
    linear = having("llama.rope.scale_linear", 2.0, FLOAT)
    assert config_of(changed(tmp_path, linear)).rope_scaling == {"rope_type": "linear", "factor": 2.0}
    a_layer_each = having("llama.attention.head_count_kv", [2, 2], LIST)
    assert config_of(changed(tmp_path, a_layer_each)).num_key_value_heads == 2
    tied = {name: array for name, array in hf_weights().items() if name != "lm_head.weight"}
    assert config_of(changed(tmp_path, lambda writer: None, weights=tied)).tie_word_embeddings


OTHER_MODELS: dict[str, tuple[Callable[[Any], None], str]] = {
    "another architecture": (having("general.architecture", "qwen2moe", TEXT), "not_mixtral"),
    "no architecture": (without("general.architecture"), "not_mixtral"),
    "no experts": (without("llama.expert_count"), "not_mixtral"),
    "0 experts": (having("llama.expert_count", 0, NUMBER), "not_mixtral"),
    "shared experts": (having("llama.expert_shared_count", 1, NUMBER), "not_mixtral"),
    "a scale of the logits": (having("llama.logit_scale", 0.5, FLOAT), "not_mixtral"),
    "half the head rotated": (having("llama.rope.dimension_count", 4, NUMBER), "not_mixtral"),
    "values of another size": (having("llama.attention.value_length", 16, NUMBER), "not_mixtral"),
    "yarn": (having("llama.rope.scaling.type", "yarn", TEXT), "unsupported_rope"),
    "layers that differ": (having("llama.feed_forward_length", [64, 128], LIST), "bad_config"),
    "no layers": (without("llama.block_count"), "bad_config"),
    "no context length": (without("llama.context_length"), "bad_config"),
    "no epsilon": (without("llama.attention.layer_norm_rms_epsilon"), "bad_config"),
    "no number of chosen experts": (without("llama.expert_used_count"), "bad_config"),
    "a width in words": (having("llama.embedding_length", "wide", TEXT), "bad_config"),
    "a huge number of layers": (having("llama.block_count", 1 << 31, NUMBER), "bad_config"),
    "no heads": (having("llama.attention.head_count", 0, NUMBER), "not_mixtral"),
    "alignment of 12": (having("general.alignment", 12, NUMBER), "bad_gguf"),
    "alignment in words": (having("general.alignment", "32", TEXT), "bad_gguf"),
    "part 2 of 3": (having("split.no", 1, NUMBER), "bad_gguf"),
    "more tensors than there are": (having("split.tensors.count", 999, NUMBER), "bad_gguf"),
    "one of several files": (having("split.count", 2, NUMBER), "missing_file"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_are_refused_by_name(name: str, tmp_path: Path) -> None:
    change, code = OTHER_MODELS[name]
    with pytest.raises(MixtralError) as error:
        config_of(changed(tmp_path, change))
    assert error.value.code == code


def test_rope_factors_that_say_something_are_refused(tmp_path: Path) -> None:
    def factors(value: float) -> Path:
        array = np.full(4, value, np.float32)
        return changed(tmp_path, lambda writer: writer.add_tensor("rope_freqs.weight", array))

    assert "rope_freqs.weight" not in open_gguf([factors(1.0)])[0]
    with pytest.raises(ConvertError) as error:
        open_gguf([factors(8.0)])
    assert error.value.code == "not_mixtral"


def test_types_that_cannot_be_unpacked_are_refused_at_once(tmp_path: Path) -> None:
    file = changed(tmp_path, lambda writer: writer.add_tensor("x", np.zeros((32, 32), np.int8)))
    with pytest.raises(ConvertError) as error:
        open_gguf([file])
    assert error.value.code == "unsupported_dtype"


def test_a_missing_or_doubled_part_is_refused(tmp_path: Path) -> None:
    FORMS["gguf-files"](tmp_path)
    paths = sorted(tmp_path.glob("*.gguf"))
    assert len(paths) > 2
    for given in (paths[1:], paths[:-1], [paths[0], *paths[:-1]], [paths[0]] * len(paths), paths[1:2]):
        with pytest.raises(MixtralError) as error:
            open_gguf(given)
        assert error.value.code in ("missing_file", "bad_gguf", "duplicate_tensor")


# The tokenizer.


def vocabulary(version: str) -> tuple[Path, list[str], list[float], list[int]]:
    """A published tokenizer's file, pieces, scores and kinds."""
    file = Path(str(files("mistral_common") / "data" / TOKENIZERS[version]))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    ids = range(pieces.vocab_size())
    kinds = [2 if pieces.is_unknown(n) else 3 if pieces.is_control(n) else 6 if pieces.is_byte(n) else 1 for n in ids]
    return file, [pieces.id_to_piece(n) for n in ids], [pieces.get_score(n) for n in ids], kinds


def with_tokenizer(folder: Path, tokens: list[str], scores: list[float], kinds: list[int]) -> Path:
    def change(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)

    return changed(folder, change)


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_a_tokenizer_comes_back_as_it_was(version: str, tmp_path: Path) -> None:
    file, tokens, scores, kinds = vocabulary(version)
    written = open_gguf([with_tokenizer(tmp_path, tokens, scores, kinds)])[2](tmp_path)
    assert written == tmp_path / "tokenizer.model"
    assert written.read_bytes() == file.read_bytes()
    ours = Tokenizer.read(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    assert [ours.encode(text, bos=False) for text in ODD] == [theirs.encode(text) for text in ODD]


def test_pieces_added_by_a_finetune_are_kept(tmp_path: Path) -> None:
    file, tokens, scores, kinds = vocabulary("v1")
    added = ["<|im_end|>", "<|im_start|>", "[PAD32002]", "wördchen"]
    source = with_tokenizer(tmp_path, [*tokens, *added], [*scores, *[0.0] * 4], [*kinds, 3, 4, 5, 1])
    open_gguf([source])[2](tmp_path)
    ours, theirs = (
        sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        for path in (tmp_path / "tokenizer.model", file)
    )
    assert [ours.id_to_piece(n) for n in range(32000, ours.vocab_size())] == added
    assert ours.is_control(32000)
    assert ours.is_unused(32002)
    assert [ours.encode(text) for text in ODD] == [theirs.encode(text) for text in ODD]
    assert ours.encode("a<|im_start|>b")[-2] == 32001
    assert Tokenizer.read(tmp_path).vocab_size == 32004


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    _, tokens, scores, kinds = vocabulary("v1")
    sources = {
        "no_tokenizer": [changed(tmp_path / "none", lambda writer: None)],
        "unknown_tokenizer": [
            with_tokenizer(tmp_path / "short", tokens[:-1], scores[:-1], kinds[:-1]),
            with_tokenizer(tmp_path / "changed", [*tokens[:500], "x", *tokens[501:]], scores, kinds),
        ],
        "bad_tokenizer": [with_tokenizer(tmp_path / "twice", [*tokens, "the"], [*scores, 0.0], [*kinds, 1])],
    }
    for code, paths in sources.items():
        for path in paths:
            with pytest.raises(MixtralError) as error:
                open_gguf([path])[2](tmp_path)
            assert error.value.code == code


# Hostile files.


def refused(file: Path) -> str:
    """The code with which `file` is refused, quickly and without taking memory."""
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(MixtralError) as error:
        open_gguf([file])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    assert time.perf_counter() - start < LIMIT_S
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()
    return error.value.code


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def header(tensors: int = 0, entries: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries)


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor_entry(name: bytes = b"x", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "a magic alone": b"GGUF",
    "another magic": header(magic=b"GGML"),
    "version 1": header(version=1),
    "version 4": header(version=4),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^64 entries": header(entries=2**64 - 1),
    "2^64 tensors": header(tensors=2**64 - 1),
    "entries that are not there": header(entries=9),
    "a key of 2^63 bytes": header(entries=1) + text(b"k", 2**63),
    "a key of 2^31 bytes": header(entries=1) + text(b"k", 2**31),
    "an unknown type": header(entries=1) + entry(b"k", 99, b"\0" * 8),
    "a list of 2^63 numbers": header(entries=1) + entry(b"k", 9, struct.pack("<IQ", 4, 2**63)),
    "a list of 2^20 numbers that are not there": header(entries=1) + entry(b"k", 9, struct.pack("<IQ", 4, 2**20)),
    "a list of 2^63 texts": header(entries=1) + entry(b"k", 9, struct.pack("<IQ", 8, 2**63)),
    "a list of lists": header(entries=1) + entry(b"k", 9, struct.pack("<IQ", 9, 5) + b"\0" * 99),
    "a list of nothing known": header(entries=1) + entry(b"k", 9, struct.pack("<IQ", 77, 5) + b"\0" * 99),
    "lists of lists of lists": header(entries=1) + entry(b"k", 9, struct.pack("<IQ", 9, 1) * 100_000),
    "two of a key": header(entries=2) + entry(b"k", 4, b"\0" * 4) * 2,
    "no architecture": header(),
    "an architecture that is a list": header(entries=1) + entry(b"general.architecture", 9, struct.pack("<IQ", 4, 0)),
    "0 dimensions": header(1) + tensor_entry(shape=()) + b"\0" * 256,
    "5 dimensions": header(1) + tensor_entry(shape=(1,) * 5) + b"\0" * 256,
    "2^32 dimensions": header(1) + text(b"x") + b"\xff" * 64,
    "sizes that overflow": header(1) + tensor_entry(shape=(2**62, 2**62)) + b"\0" * 256,
    "sizes that overflow to 0": header(1) + tensor_entry(shape=(2**32, 2**32)) + b"\0" * 256,
    "a size of 0": header(1) + tensor_entry(shape=(0, 5)) + b"\0" * 256,
    "half a block": header(1) + tensor_entry(shape=(33,), kind=2) + b"\0" * 256,
    "an unknown kind": header(1) + tensor_entry(kind=4) + b"\0" * 256,
    "a kind of 2^32": header(1) + tensor_entry(kind=2**32 - 1) + b"\0" * 256,
    "an offset beyond the file": header(1) + tensor_entry(offset=2**40) + b"\0" * 256,
    "an offset of 2^64": header(1) + tensor_entry(offset=2**64 - 32) + b"\0" * 256,
    "an odd offset": header(1) + tensor_entry(offset=1) + b"\0" * 256,
    "a tensor cut short": header(1) + tensor_entry(shape=(320,)) + b"\0" * 256,
    "tensors that overlap": header(2) + tensor_entry() + tensor_entry(b"y", offset=32) + b"\0" * 256,
    "two of a name": header(2) + tensor_entry() + tensor_entry(offset=128) + b"\0" * 512,
    "a name of control characters": header(1) + tensor_entry(b"\x1b[31m\n" * 20, shape=(0,)) + b"\0" * 256,
    "a pickle": b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(HOSTILE[name])
    assert refused(file) in ("bad_gguf", "unsupported_gguf", "unsupported_dtype", "not_mixtral")


def test_mutated_files_are_refused_or_read(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    write_gguf(file, "Q8_0", tensors_a_file=0)
    original = file.read_bytes()
    header_bytes = original.index(b"blk.1.ffn_up_exps.weight") + 100
    expected, config = read_model([file])
    chance = random.Random(2)
    slowest, same = 0.0, 0
    for number in range(500):
        data = bytearray(original)
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[chance.randrange(header_bytes)] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        file.write_bytes(data if number % 5 else data[: chance.randrange(len(data))])
        start = time.perf_counter()
        try:
            found, changed_config = read_model([file])
        except MixtralError:
            continue
        finally:
            slowest = max(slowest, time.perf_counter() - start)
        if changed_config == config:
            same += sum(np.array_equal(found[key], array, equal_nan=True) for key, array in expected.items())
    assert slowest < LIMIT_S
    assert same > 0


def test_other_things_than_files_are_refused(tmp_path: Path) -> None:
    for path, code in ((tmp_path / "none.gguf", "missing_file"), (tmp_path, "unreadable")):
        with pytest.raises(MixtralError) as error:
            open_gguf([path])
        assert error.value.code == code
