"""The kernels for processors against MLX's own, and the models they are put into against the plain ones."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mixtral_mlx import cpu
from mixtral_mlx.config import Config, Packing, Quantization
from mixtral_mlx.model import Model
from mixtral_mlx.opening import ModelChoice, open_model
from mixtral_mlx.weights import load

from .checkpoints import Q4, TINY, random_model, write_tiny

modules = pytest.importorskip("mixtral_mlx.cpu.modules", reason="numba is there for Linux")
from mlx_lm.generate import BatchGenerator, generate_step  # noqa: E402
from mlx_lm.models.base import create_causal_mask  # noqa: E402
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache  # noqa: E402
from mlx_lm.models.switch_layers import SwitchGLU  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402

SMALL = replace(TINY, vocab_size=200, head_dim=32)
PROMPT = [1, *range(3, 40, 3)]
AFFINE = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
MODES = [*AFFINE, ("mxfp4", 4, 32)]


def exact(x: np.ndarray[Any, Any], matrix: mx.array) -> np.ndarray[Any, Any]:
    return x.astype(np.float64) @ np.array(matrix.astype(mx.float32)).astype(np.float64).T


def assert_near(ours: Any, expected: Any, tolerance: float = 2e-6) -> None:
    ours, expected = np.array(ours, np.float64), np.array(expected, np.float64)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def linear(rows: int, columns: int, mode: str, bits: int, group: int, dtype: mx.Dtype) -> tuple[nn.Module, mx.array]:
    """A quantized layer, and its weights as floats."""
    mx.random.seed(bits)
    module = nn.QuantizedLinear(columns, rows, False, group, bits, mode=mode)
    module.eval()
    if mode == "affine":
        module.scales, module.biases = module.scales.astype(dtype), module.biases.astype(dtype)
        plain = mx.dequantize(
            module.weight, module.scales.astype(mx.float32), module.biases.astype(mx.float32), group, bits
        )
    else:
        plain = mx.dequantize(module.weight, module.scales, None, group, bits, mode=mode).astype(mx.float32)
    return module, plain


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize(("mode", "bits", "group"), MODES, ids=lambda part: str(part))
def test_every_packing_multiplies_as_its_floats_do(mode: str, bits: int, group: int, dtype: mx.Dtype) -> None:
    module, plain = linear(20, 1280, mode, bits, group, dtype)
    module.__class__ = modules.QuantizedLinear
    for count in (1, 2, 5, 40):
        x = np.random.default_rng(count).standard_normal((count, 1280)).astype(np.float32)
        assert_near(module(mx.array(x)), exact(x, plain))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
def test_floats_multiply_as_they_are_stored(dtype: mx.Dtype) -> None:
    module = nn.Linear(2080, 12, bias=False)
    module.weight = module.weight.astype(dtype)
    module.eval()
    module.__class__ = modules.Linear
    for count in (1, 3, 200):
        x = np.random.default_rng(count).standard_normal((2, count, 2080)).astype(np.float32)
        assert_near(module(mx.array(x)), exact(x, module.weight))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_rows_whatever_their_number(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "_threads", lambda: threads)
    module, plain = linear(36, 256, "affine", 4, 64, mx.bfloat16)
    module.__class__ = modules.QuantizedLinear
    for count in (1, 9):
        x = np.random.default_rng(count).standard_normal((count, 256)).astype(np.float32)
        assert_near(module(mx.array(x)), exact(x, plain))


@pytest.mark.parametrize("tokens", [1, 2, 7, 150])
@pytest.mark.parametrize("packing", [Packing(4), Packing(6, 32), None], ids=str)
def test_each_token_gets_its_own_experts_answers(tokens: int, packing: Packing | None) -> None:
    mx.random.seed(tokens)
    experts = SwitchGLU(128, 64, 5)
    if packing:
        nn.quantize(experts, packing.group_size, packing.bits)
    experts.eval()
    x = mx.random.normal((1, tokens, 128))
    indices = mx.argsort(mx.random.normal((1, tokens, 5)), axis=-1)[..., :2]
    expected = experts(x, indices)
    experts.__class__ = modules.Experts
    assert_near(experts(x, indices), expected, 1e-5)


def test_experts_nobody_chose_and_one_that_everybody_did() -> None:
    experts = SwitchGLU(64, 32, 8)
    experts.eval()
    x = mx.random.normal((1, 300, 64))
    indices = mx.broadcast_to(mx.array([6, 1]), (1, 300, 2))
    expected = experts(x, indices)
    experts.__class__ = modules.Experts
    assert_near(experts(x, indices), expected, 1e-5)


def test_the_router_takes_the_likeliest_and_of_equals_the_first() -> None:
    logits = np.array([[1, 3, 2, 3], [5, 5, 5, 5], [-1, -2, -3, 0]], np.float32)
    chosen, shares = np.empty(6, np.int64), np.empty(6, np.float32)
    modules.products.choose(chosen, shares, logits.reshape(-1), 4, 2)
    assert chosen.tolist() == [1, 3, 0, 1, 3, 0]
    assert_near(shares, [0.5, 0.5, 0.5, 0.5, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))])


MASKS: dict[str, Callable[[int, int], Any]] = {
    "none": lambda tokens, length: None,
    "causal": lambda tokens, length: "causal",
    "window": lambda tokens, length: create_causal_mask(tokens, length - tokens, window_size=9),
    "padding": lambda tokens, length: mx.stack([mx.arange(length) >= 3, mx.arange(length) >= 0])[:, None, None],
    "added": lambda tokens, length: mx.where(mx.arange(length) >= 2, 0.0, -mx.inf)[None],
}
SIZES = [(1, 37), (5, 5), (4, 21), (300, 317)]


@pytest.mark.parametrize(("tokens", "length"), SIZES)
@pytest.mark.parametrize("name", MASKS)
def test_attention_is_mlxs_under_every_mask(name: str, tokens: int, length: int) -> None:
    mask = MASKS[name](tokens, length)
    queries = mx.random.normal((2, 4, tokens, 32))
    # A cache has room for more than is in it.
    keys, values = (mx.random.normal((2, 2, length + 11, 32))[:, :, :length] for _ in range(2))
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask=mask)
    ours = modules._attend(modules._numpy(queries), modules._in_rows(keys), modules._in_rows(values), 0.3, mask)
    assert_near(ours.reshape(2, tokens, 4, 32), expected.swapaxes(1, 2), 1e-5)


def both(config: Config, *, seed: int = 0) -> tuple[Model, Model]:
    """The same weights, in an accelerated model and in a plain one."""
    models = random_model(config, seed), random_model(config, seed)
    for model in models:
        model.eval()
    cpu.accelerate(models[0])
    return models


CONFIGS = {
    "float32": SMALL,
    "bfloat16": replace(SMALL, dtype="bfloat16"),
    "4-bit": replace(SMALL, quantization=Q4),
    "4-bit tied": replace(SMALL, quantization=Q4, tie_word_embeddings=True),
    "window": replace(SMALL, quantization=Q4, sliding_window=7),
    "3-bit": replace(SMALL, quantization=Quantization(Packing(3, 32))),
    "mixed": replace(SMALL, quantization=Quantization(Packing(4, 32), {"model.layers.1.self_attn.q_proj": None})),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_accelerated_model_gives_the_plain_ones_logits_and_tokens(name: str) -> None:
    fast, plain = both(CONFIGS[name])
    plain.set_dtype(mx.float32)
    assert all(type(layer) is modules.DecoderLayer for layer in fast.layers)
    ids = mx.array([PROMPT, PROMPT[::-1]])
    assert_near(fast(ids), plain(ids), 2e-5)
    assert greedy(fast, 64) == greedy(plain, 64)


def greedy(model: Model, count: int, **options: Any) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=count, **options)]


@pytest.mark.parametrize("kind", ["plain", "quantized", "rotating"])
def test_every_cache_of_mlx_lms_works_as_before(kind: str) -> None:
    caches: dict[str, Callable[[], Any]] = {
        "plain": KVCache,
        "quantized": lambda: QuantizedKVCache(group_size=32, bits=8),
        "rotating": lambda: RotatingKVCache(max_size=16),
    }
    answers = []
    for model in both(replace(SMALL, quantization=Q4)):
        cache = [caches[kind]() for _ in model.layers]
        parts = [model(mx.array([PROMPT[:5]]), cache), *(model(mx.array([[token]]), cache) for token in range(5, 30))]
        answers.append(mx.concatenate(parts, axis=1))
    ours, theirs = answers
    assert_near(ours, theirs, 2e-5)


def test_prompts_in_a_batch_get_their_single_runs_tokens() -> None:
    fast, plain = both(replace(SMALL, quantization=Q4))
    prompts = [PROMPT, PROMPT[:3], [1, 7, 7, 150], list(range(3, 60))]
    generator = BatchGenerator(fast, max_tokens=16)
    numbers = generator.insert(prompts)
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    while responses := generator.next_generated():
        for response in responses:
            answers[response.uid].append(response.token)
    generator.close()
    for number, prompt in zip(numbers, prompts, strict=True):
        steps = generate_step(mx.array(prompt), plain, max_tokens=16)
        assert answers[number] == [int(token) for token, _ in steps]


def test_adapters_and_training_are_left_to_mlx() -> None:
    config = replace(SMALL, quantization=Q4)
    fast, plain = both(config)
    for model in (fast, plain):
        model.freeze()
        mx.random.seed(3)
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
        for name, array in tree_flatten(model.trainable_parameters()):
            if name.endswith("lora_b"):
                array[:] = 0.01
    ids = mx.array([PROMPT])
    assert_near(fast(ids), plain(ids), 2e-5)

    def loss(model: Model) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()

    gradients = []
    for model in (fast, plain):
        model.train()
        gradients.append(dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1])))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(mx.allclose(array, gradients[1][name], atol=1e-5) for name, array in gradients[0].items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_kernels_cannot_multiply_stays_mlxs_in_float32(dtype: str) -> None:
    odd = replace(SMALL, vocab_size=198, head_dim=24, num_local_experts=6, dtype=dtype)
    if dtype != "float32":  # MLX's experts have no product of half floats with whole ones.
        odd = replace(odd, quantization=Quantization(Packing(8, 32, "mxfp8")))
    fast, plain = both(odd)
    plain.set_dtype(mx.float32)
    assert not any(isinstance(layer, modules.DecoderLayer) for layer in fast.layers)
    assert_near(fast(mx.array([PROMPT])), plain(mx.array([PROMPT])), 2e-5)


def test_loading_keeps_weights_as_they_are_stored_and_computes_in_float32(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny", replace(SMALL, dtype="bfloat16", quantization=Q4), tokenizer=None)
    for dtype in ("auto", "float32"):
        loaded = load(tmp_path / "tiny", dtype=dtype)
        assert (loaded.dtype, loaded.note) == ("float32", "")
        assert {array.dtype for _, array in tree_flatten(loaded.model.parameters())} == {mx.bfloat16, mx.uint32}
        assert loaded.model(mx.array([PROMPT])).dtype == mx.float32


def test_unquantized_half_floats_compute_the_same_when_left_to_mlx(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny", replace(SMALL, dtype="bfloat16"), tokenizer=None)
    model = load(tmp_path / "tiny").model
    fast = model(mx.array([PROMPT]))
    model.train()
    assert_near(fast, model(mx.array([PROMPT])), 2e-5)


def test_without_numba_mlx_computes_alone_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path / "tiny", replace(TINY, dtype="bfloat16", quantization=Q4))
    fast = load(tmp_path / "tiny").model(mx.array([PROMPT]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ready = open_model(ModelChoice(str(tmp_path / "tiny")))
    assert not any(isinstance(layer, modules.DecoderLayer) for layer in ready.loaded.model.layers)
    assert ready.loaded.dtype == "float32"
    assert_near(fast, ready.loaded.model(mx.array([PROMPT])), 2e-5)
    assert capfd.readouterr().err.splitlines()[-1].startswith("numba is not installed")


def test_what_is_compiled_is_kept_by_the_state_of_the_sources(tmp_path: Path) -> None:
    model = both(replace(SMALL, quantization=Q4))[0]
    cpu.compile_for(model)
    assert not cpu.has_to_compile(model)
    script = (
        "from mixtral_mlx.cpu import jit, products\n"
        "import numba; assert numba.config.CACHE_DIR == ''\n"
        "import numpy as np; products.plan(np.zeros(3, np.uint32), 1, 1)\n"
        "print(jit.folder(), sum(1 for _ in jit.folder().rglob('*.nbi')))"
    )
    kept = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "NUMBA_CACHE_DIR": ""}
    answer = subprocess.run([sys.executable, "-c", script], env=kept, check=True, capture_output=True, text=True)
    folder, count = answer.stdout.split()
    assert Path(folder).is_relative_to(tmp_path)
    assert int(count) == 1


@pytest.mark.long
def test_kernels_just_compiled_give_the_bits_of_kernels_that_were_kept(tmp_path: Path) -> None:
    script = (
        "import hashlib, mlx.core as mx, mlx.nn as nn, numpy as np\n"
        "from mixtral_mlx.cpu import modules\n"
        "mx.random.seed(0)\n"
        "matrix = nn.QuantizedLinear(2048, 256, bias=False, group_size=64, bits=4)\n"
        "x = np.random.default_rng(0).standard_normal((1, 2048), np.float32)\n"
        "print(hashlib.sha256(modules._Rows.of(x).times(matrix).tobytes()).hexdigest())"
    )
    kept = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    compiled, loaded = (
        subprocess.run([sys.executable, "-c", script], env=kept, check=True, capture_output=True) for _ in range(2)
    )
    assert compiled.stdout == loaded.stdout


def test_a_cache_that_cannot_be_written_is_done_without() -> None:
    script = "import numpy as np; from mixtral_mlx.cpu import products; products.plan(np.zeros(3, np.uint32), 1, 1)"
    nowhere = {**os.environ, "XDG_CACHE_HOME": "/proc/nowhere"}
    subprocess.run([sys.executable, "-c", script], env=nowhere, check=True)


def test_threads_are_started_without_changing_the_environment() -> None:
    script = (
        "import os; before = dict(os.environ)\n"
        "from mixtral_mlx.cpu import modules\n"
        "modules._threads(); assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the same vectors are everybody's elsewhere")
def test_processors_with_narrower_vectors_compute_the_same() -> None:
    narrow = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt"}
    chosen = "every_packing and (4-64 or 3-32 or mxfp4) or floats or own_experts or mlxs_under or plain_ones_logits"
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", __file__, "-k", chosen]
    environment = {**os.environ, **narrow, "PYTEST_ADDOPTS": ""}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    script = "from mixtral_mlx.cpu import simd; print(simd.LANES)"
    width = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert width.stdout.strip() == "8"
