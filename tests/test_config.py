"""What a configuration may say, what follows from it, and how it is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_mlx.config import KNOWN, Config, ConfigError, Packing, Quantization, read_json

# config.json of mistralai/Mixtral-8x7B-Instruct-v0.1.
HF: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
TORRENT = {
    **{"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8},
    **{"norm_eps": 1e-05, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8}},
}
HUB_PARAMS = {
    key: HF[key]
    for key in (
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
        *("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rms_norm_eps", "rope_theta"),
    )
}
GB = 1e9


def refusal(**changes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({**HF, **changes})
    assert caught.value.code
    assert len(str(caught.value)) < 600
    return caught.value


def test_the_published_config_is_8x7b() -> None:
    config = Config.from_dict(HF)
    assert config == KNOWN["8x7B"]
    assert config.name == "Mixtral 8x7B"
    assert (config.head_dim, config.dtype, config.sliding_window) == (128, "bfloat16", None)


def test_transformers_5_puts_rope_in_an_entry_of_its_own() -> None:
    old = Config.from_dict(HF)
    new = {key: value for key, value in HF.items() if key not in ("rope_theta", "torch_dtype")}
    new |= {"dtype": "bfloat16", "head_dim": None}
    assert Config.from_dict({**new, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}) == old
    assert Config.from_dict({**new, "rope_parameters": {"rope_theta": 5e5}}).rope_theta == 5e5
    linear = {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}
    scaling = Config.from_dict({**new, "rope_parameters": linear}).rope_scaling
    assert scaling is not None
    assert scaling["factor"] == 2.0
    assert scaling == Config.from_dict({**HF, "rope_scaling": {"type": "linear", "factor": 2.0}}).rope_scaling


def test_both_of_mistrals_own_forms_say_the_same() -> None:
    assert Config.from_params(TORRENT) == KNOWN["8x7B"]
    assert Config.from_params(HUB_PARAMS) == KNOWN["8x7B"]
    assert Config.from_params({**HUB_PARAMS, "sliding_window": "4096"}).sliding_window == 4096
    assert Config.from_params({**HUB_PARAMS, "sliding_window": None}).sliding_window is None


def test_a_dense_mistral_is_refused_in_either_form(tmp_path: Path) -> None:
    dense = {key: value for key, value in TORRENT.items() if key != "moe"}
    with pytest.raises(ConfigError, match="mixture of experts") as caught:
        Config.from_params(dense)
    assert caught.value.code == "not_mixtral"
    assert refusal(model_type="mistral").code == "not_mixtral"
    assert refusal(model_type=None).code == "not_mixtral"
    assert refusal(hidden_act="gelu").code == "bad_config"
    (tmp_path / "params.json").write_text(json.dumps(TORRENT))
    assert Config.read(tmp_path) == KNOWN["8x7B"]


SIZES = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "num_local_experts", "num_experts_per_tok"),
]
FIELDS = {
    *SIZES,
    *("head_dim", "rms_norm_eps", "rope_theta", "sliding_window", "max_position_embeddings", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "torch_dtype", "model_type", "hidden_act"),
    *("quantization", "rope_scaling", "rope_parameters"),
}
NO_SIZE: list[Any] = [None, 0, -1, 1.5, 32.0, True, "32", [32], {}, float("nan"), float("inf"), 1 << 31, 10**400]


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_missing_or_no_sensible_number_is_refused_by_name(name: str) -> None:
    for value in NO_SIZE:
        assert f"`{name}`" in str(refusal(**{name: value}))
    with pytest.raises(ConfigError, match=f"`{name}`"):
        Config.from_dict({key: value for key, value in HF.items() if key != name})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("head_dim", [0, -2, 1.0, True, "128", 4096, []]),
        ("rms_norm_eps", [0, -1e-5, 1.0, float("nan"), float("inf"), "1e-5", True, [], 10**400]),
        ("rope_theta", [0, -1, 1, float("nan"), float("inf"), 1e300, "1e6", False, {}]),
        ("sliding_window", [0, -1, 4096.0, "4096", True, (1 << 30) + 1, []]),
        ("max_position_embeddings", [0, -1, 1.5, "many", True, (1 << 30) + 1]),
        ("tie_word_embeddings", [0, 1, "false", [], {}]),
        ("bos_token_id", [-1, 1.0, "1", [], [None], True, 1 << 40]),
        ("eos_token_id", [-1, 2.0, "2", [], [2, "2"], {}, [True], [[2]]]),
        ("torch_dtype", ["float8", "int8", 16, ["float16"], True]),
        ("rope_scaling", [1, "linear", [1], True]),
        ("rope_parameters", [1, "linear", [1], True]),
        ("quantization", [4, "4bit", [4], True]),
        ("hidden_act", ["gelu", 1, [], True]),
    ],
)
def test_every_other_field_is_checked_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        assert name in str(refusal(**{name: value}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_key_value_heads": 7}, "7 key/value heads do not divide evenly"),
        ({"num_experts_per_tok": 9}, "9 experts per token but there are only 8 experts"),
        ({"num_attention_heads": 31}, "head_dim"),
        ({"head_dim": 127}, "rotary embedding needs an even one"),
        ({"eos_token_id": [2, 32000]}, "outside its vocabulary of 32000"),
        ({"vocab_size": 1}, "outside its vocabulary of 1"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(changes: dict[str, Any], said: str) -> None:
    error = refusal(**changes)
    assert said in str(error)
    assert "Mixtral" in error.hint


ROPES: list[dict[str, Any]] = [
    {"type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2},
    {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "beta_fast": 32},
]
NO_NUMBER = [0, -1, "2", True, [], [1], {}, float("nan"), float("inf"), 1e300, 1e-300, 10**400]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.get("rope_type", "linear"))
def test_every_number_of_a_rope_scaling_is_checked_by_name(rope: dict[str, Any]) -> None:
    scaling = Config.from_dict({**HF, "rope_scaling": rope}).rope_scaling
    assert scaling is not None
    assert scaling["rope_type"] == rope.get("rope_type", "linear")
    for name in rope:
        for value in NO_NUMBER:
            assert "`rope_scaling." in str(refusal(rope_scaling={**rope, name: value}))
    assert "'mystery' for `rope_scaling`" in str(refusal(rope_scaling={**rope, "mystery": 1}))
    kinds: list[Any] = ["longrope", "mrope", "proportional", "su", 1, [], {"rope": "yarn"}]
    for kind in kinds:
        assert "rope_scaling" in str(refusal(rope_scaling={**rope, "rope_type": kind}))


def test_a_rope_scaling_cannot_mean_one_thing_here_and_another_to_mlx_lm() -> None:
    scaling = Config.from_dict(
        {**HF, "rope_scaling": {"rope_type": "linear", "type": "mrope", "factor": 2}}
    ).rope_scaling
    assert scaling == {"rope_type": "linear", "factor": 2}


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"bits": 4},
        {"group_size": 64},
        {"bits": 7, "group_size": 64},
        {"bits": 4.0, "group_size": 64},
        {"bits": True, "group_size": 64},
        {"bits": 4, "group_size": 48},
        {"bits": 4, "group_size": 0},
        {"bits": 4, "group_size": 64, "mode": "int4"},
        {"bits": 4, "group_size": 64, "mode": ["affine"]},
        {"bits": 4, "group_size": 64, "mode": "mxfp4"},
        {"bits": 4, "group_size": 64, "lm_head": {"bits": 1, "group_size": 64}},
        {"bits": 4, "group_size": 64, "lm_head": {}},
    ],
)
def test_a_quantization_mlx_does_not_know_is_refused(entry: dict[str, Any]) -> None:
    if entry:
        assert refusal(quantization=entry).code == "bad_quantization"
    else:
        assert Config.from_dict({**HF, "quantization": entry}).quantization is None


def test_a_group_that_does_not_fit_and_foreign_quantizations_are_refused() -> None:
    assert "group size 128" in str(refusal(intermediate_size=14336 + 64, quantization={"bits": 4, "group_size": 128}))
    for method in ("awq", "gptq", "bitsandbytes"):
        error = refusal(quantization_config={"quant_method": method, "bits": 4})
        assert error.code == "unsupported_quantization"
        assert method in str(error)


def test_quantization_settings_survive_a_round_trip() -> None:
    entry = {
        **{"bits": 4, "group_size": 64, "lm_head": False, "model.embed_tokens": True},
        "model.layers.0.block_sparse_moe.gate": {"bits": 8, "group_size": 32},
    }
    config = Config.from_dict({**HF, "quantization": entry})
    assert config.packing("lm_head") is None
    assert config.packing("model.embed_tokens") == Packing(4, 64)
    assert config.packing("model.layers.0.block_sparse_moe.gate") == Packing(8, 32)
    assert config.packing("model.layers.1.block_sparse_moe.gate", lambda path: False) is None
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Config.from_dict({**HF, "quantization_config": entry}) == config


@pytest.mark.parametrize("name", KNOWN)
def test_known_sizes_survive_a_round_trip(name: str) -> None:
    config = replace(KNOWN[name], eos_token_ids=(2, 3), sliding_window=4096, rope_scaling=None)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def quantized(name: str, bits: int) -> Config:
    return replace(KNOWN[name], quantization=Quantization(Packing(bits, 64)))


def test_bytes_are_those_of_the_arithmetic() -> None:
    small, large = KNOWN["8x7B"], KNOWN["8x22B"]
    # Published parameter counts, and the sizes of the published bf16 files.
    assert small.parameters() == 46_702_792_704
    assert large.parameters() == 140_630_071_296
    assert small.nbytes() == 93_405_585_408
    assert large.nbytes() / GB == pytest.approx(281, abs=0.5)
    assert quantized("8x7B", 4).nbytes() / GB == pytest.approx(26.3, abs=0.05)
    assert quantized("8x22B", 4).nbytes() / GB == pytest.approx(79, abs=0.2)
    experts = [quantized("8x7B", bits).expert_nbytes() / 1e6 for bits in (4, 3, 2)]
    assert experts == pytest.approx([99.1, 77.1, 55.1], abs=0.05)
    experts = [quantized("8x22B", bits).expert_nbytes() / 1e6 for bits in (4, 2)]
    assert experts == pytest.approx([169.9, 94.4], abs=0.05)
    assert small.kv_nbytes_per_token() == 131_072
    assert large.kv_nbytes_per_token() == 229_376


def test_names_of_other_sizes_say_how_large_they_are() -> None:
    assert replace(KNOWN["8x7B"], num_hidden_layers=2).name == "Mixtral (3.2 B parameters)"


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"nothing", b"\xff\xfe", b'{"a": "\xff"}', b"[" * 100_000, b'{"a":' * 100_000),
        b'{"vocab_size": ' + b"9" * 10_000 + b"}",
        *(b"[]", b"1", b'"text"', b"null", b"{}", b"\x00" * 100),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        Config.read(tmp_path)
    assert caught.value.code in ("bad_json", "bad_config", "not_mixtral")


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json") as caught:
        Config.read(tmp_path)
    assert caught.value.code == "no_config"
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="not a regular file"):
        Config.read(tmp_path)


def test_a_huge_json_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "index.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="too large for a JSON file"):
        read_json(tmp_path / "index.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=8), values, max_size=4),
    max_leaves=8,
)
ODD = JSON | st.sampled_from([10**300, -(10**300), 1e308, 5e-324, 0.5, 1, 2, 32, "linear", "yarn", "llama3"])
ROPE = st.dictionaries(
    st.sampled_from(sorted({key for rope in ROPES for key in rope} | {"mscale", "beta_slow", "rope_theta"})),
    ODD,
)
QUANTIZATION = st.dictionaries(
    st.sampled_from(["bits", "group_size", "mode", "lm_head", "quant_method"]), ODD | st.just({"bits": 4})
)
CHANGES = st.dictionaries(st.sampled_from([*HF, "head_dim", "dtype"]), ODD, max_size=3)


@settings(max_examples=100, deadline=None)
@given(raw=JSON | CHANGES.map(lambda changes: HF | changes), rope=JSON | ROPE, packed=JSON | QUANTIZATION)
def test_whatever_the_json_only_a_config_error_is_raised(raw: Any, rope: Any, packed: Any) -> None:
    candidates = [raw]
    if isinstance(raw, dict):
        candidates += [{**raw, "rope_scaling": rope}, {**raw, "rope_parameters": rope}]
        candidates += [{**raw, "quantization": packed}, {**raw, "moe": rope, "dim": 1}]
    for candidate in candidates:
        for build in (Config.from_dict, Config.from_params):
            with suppress(ConfigError):
                config = build(candidate)
                assert config.parameters() > 0
                json.dumps(config.to_dict())


@pytest.mark.parametrize("field", [*HF, "head_dim", "quantization", "rope_scaling", "rope_parameters"])
def test_values_nested_as_deep_as_json_allows_are_refused_and_shown_short(field: str) -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    unused = HF.keys() - FIELDS
    if field in unused:
        assert Config.from_dict({**HF, field: deep}) == KNOWN["8x7B"]
    else:
        assert field in str(refusal(**{field: deep}))
