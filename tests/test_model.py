"""The mathematics against its two oracles, transformers and mlx-lm, and inside mlx-lm's own machinery."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from mixtral_mlx.config import Config
from mixtral_mlx.memory import file_limit_kept
from mixtral_mlx.model import Model
from mixtral_mlx.weights import load

from .checkpoints import Q4, TINY, random_model, read_arrays, write_tiny

with file_limit_kept():
    from mlx_lm.generate import BatchGenerator, generate_step
    from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = ("untied", "tied", "window", "rope_linear", "rope_dynamic", "rope_llama3", "rope_yarn")
SMALL = replace(TINY, vocab_size=200, head_dim=32)
PROMPT = [1, *range(3, 40, 3)]


def chunked(model: Model, ids: mx.array, sizes: list[int]) -> mx.array:
    """Logits of `ids` read through a cache, so many tokens at a time."""
    cache = [KVCache() for _ in model.layers]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    parts = [model(ids[:, start : start + size], cache) for start, size in zip(starts, sizes, strict=True)]
    return mx.concatenate(parts, axis=1)


def difference(ours: mx.array, theirs: mx.array) -> float:
    return float(mx.abs(ours.astype(mx.float32) - theirs.astype(mx.float32)).max())


def greedy(model: nn.Module, prompt: list[int], count: int, **options: Any) -> list[int]:
    """What mlx-lm's `generate_step` continues `prompt` with."""
    steps = generate_step(mx.array(prompt), model, max_tokens=count, **options)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [17, 23], [1, 38, 1]], ids=["whole", "single", "two", "three"])
def test_logits_are_those_of_transformers_however_the_prompt_is_cut(name: str, sizes: list[int]) -> None:
    golden = read_arrays(GOLDEN / name / "golden.safetensors")
    assert golden["logits"].std() > 0.5, "a golden file whose logits hardly vary proves nothing"
    model = load(GOLDEN / name).model
    assert difference(model(golden["ids"]), golden["logits"]) < 1e-4
    assert difference(chunked(model, golden["ids"], sizes), golden["logits"]) < 1e-4


def test_a_window_as_long_as_the_text_changes_nothing_and_a_shorter_one_does() -> None:
    golden = read_arrays(GOLDEN / "window" / "golden.safetensors")
    loaded = load(GOLDEN / "window")
    ids, differences = golden["ids"], []
    for window in (None, 1 << 30, 40, 39, 7):
        model = Model(replace(loaded.config, sliding_window=window))
        model.update(loaded.model.parameters())
        differences.append(difference(model(ids), golden["logits"]))
    assert differences[0] == differences[1] == differences[2] > 0.1
    assert differences[3] > 0.1
    assert differences[4] < 1e-4


def as_in_mlx_lm(folder: Path, config: Config) -> tuple[Model, nn.Module]:
    """The same folder through our loader and through mlx-lm's."""
    write_tiny(folder, config, tokenizer=None)
    return load(folder).model, load_model(folder)[0]


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, head_dim=16),
        replace(SMALL, head_dim=16, quantization=Q4),
        replace(SMALL, head_dim=16, tie_word_embeddings=True, quantization=Q4),
    ],
    ids=["float32", "4-bit", "4-bit tied"],
)
def test_64_greedy_tokens_and_logits_are_those_of_mlx_lm(tmp_path: Path, config: Config) -> None:
    ours, theirs = as_in_mlx_lm(tmp_path / "tiny", config)
    assert greedy(ours, PROMPT, 64) == greedy(theirs, PROMPT, 64)
    ids = mx.array([PROMPT, PROMPT[::-1]])
    reference = theirs(ids)
    assert difference(ours(ids), reference) <= 1e-5 * float(mx.abs(reference).max())


def test_the_router_stays_float32_in_a_bfloat16_model() -> None:
    model = random_model(replace(SMALL, dtype="bfloat16"))
    moe = model.layers[0].block_sparse_moe
    x = mx.random.normal((1, 5, SMALL.hidden_size)).astype(mx.bfloat16)
    assert moe.gate(x.astype(mx.float32)).dtype == mx.float32
    assert moe(x).dtype == mx.bfloat16
    assert model(mx.array([PROMPT])).dtype == mx.bfloat16


def test_four_prompts_in_a_batch_each_get_their_single_runs_tokens() -> None:
    model = random_model(SMALL)
    prompts = [PROMPT, PROMPT[:3], [1, 7, 7, 150], list(range(3, 60))]
    generator = BatchGenerator(model, max_tokens=16)
    numbers = generator.insert(prompts)
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    while responses := generator.next_generated():
        for response in responses:
            answers[response.uid].append(response.token)
    generator.close()
    assert [answers[number] for number in numbers] == [greedy(model, prompt, 16) for prompt in prompts]


def test_a_quantized_cache_stays_near_the_plain_one() -> None:
    model = random_model(SMALL)
    plain = model(mx.array([PROMPT]), [KVCache() for _ in model.layers])
    caches = [QuantizedKVCache(group_size=32, bits=8) for _ in model.layers]
    parts = [model(mx.array([[token]]), caches) for token in PROMPT]
    assert difference(mx.concatenate(parts, axis=1), plain) < 0.05 * float(mx.abs(plain).max())
    assert len(greedy(model, PROMPT, 8, kv_bits=8, kv_group_size=32)) == 8


def test_a_rotating_cache_equals_the_plain_one_until_it_turns_and_goes_on_after() -> None:
    model = random_model(SMALL)
    rotating = [RotatingKVCache(max_size=32) for _ in model.layers]
    assert greedy(model, PROMPT, 16, prompt_cache=rotating) == greedy(model, PROMPT, 16)
    assert len(greedy(model, PROMPT, 64, prompt_cache=make_prompt_cache(model, 16))) == 64


def test_a_rotating_cache_of_the_windows_size_equals_the_sliding_window() -> None:
    golden = read_arrays(GOLDEN / "window" / "golden.safetensors")
    model = load(GOLDEN / "window").model
    cache = [RotatingKVCache(max_size=7) for _ in model.layers]
    parts = [model(golden["ids"][:, n : n + 1], cache) for n in range(40)]
    assert difference(mx.concatenate(parts, axis=1), golden["logits"]) < 1e-4


@pytest.mark.parametrize("quantization", [None, Q4], ids=["float32", "4-bit"])
def test_lora_reaches_attention_and_experts_and_one_step_lowers_the_loss(quantization: Any) -> None:
    model = random_model(replace(SMALL, quantization=quantization))
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    model.train()
    layer = model.layers[0]
    assert isinstance(layer.self_attn.q_proj, LoRALinear)
    assert isinstance(layer.block_sparse_moe.switch_mlp.up_proj, LoRASwitchLinear)
    assert all("lora" in name for name, _ in tree_flatten(model.trainable_parameters()))

    def loss(model: Model, ids: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()

    ids = mx.array([list(range(3, 36))])
    before, gradients = nn.value_and_grad(model, loss)(model, ids)
    optim.SGD(learning_rate=1e-2).update(model, gradients)
    assert float(loss(model, ids)) < float(before)


def test_experts_are_handed_in_from_outside() -> None:
    class Silent(nn.Module):
        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            return mx.zeros((*indices.shape, x.shape[-1]))

    model = random_model(SMALL)
    quiet = Model(SMALL, experts=lambda config, layer: Silent())
    wanted = dict(tree_flatten(quiet.parameters()))
    assert not any("switch_mlp" in name for name in wanted)
    quiet.load_weights([(k, v) for k, v in tree_flatten(model.parameters()) if k in wanted])
    assert difference(quiet(mx.array([PROMPT])), model(mx.array([PROMPT]))) > 0
