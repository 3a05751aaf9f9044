"""Perplexity and divergence, layer by layer, against what the whole model says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mixtral_mlx.config import MixtralError
from mixtral_mlx.convert import perplexity as module
from mixtral_mlx.convert.perplexity import perplexity
from mixtral_mlx.prompt import Tokenizer
from mixtral_mlx.weights import load

from .checkpoints import Q4, TINY, write_tiny

TEXT = "The quick brown fox jumps over the lazy dog.\nGrüße aus 北京, and so on. " * 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the same one quantized."""
    folder = tmp_path_factory.mktemp("models")
    return write_tiny(folder / "float"), write_tiny(folder / "q4", replace(TINY, quantization=Q4))


def log_probabilities(folder: Path, context: int) -> tuple[mx.array, list[int]]:
    """All rows of the whole model's log-probabilities in windows, and the tokens they are for."""
    model, tokenizer = load(folder, dtype="float32").model, Tokenizer.read(folder)
    ids = tokenizer.encode(TEXT, bos=False)
    rows = []
    for at in range(0, len(ids), context - 1):
        window = [1, *ids[at : at + context - 1]]
        logits = model(mx.array([window]))[0, :-1]
        rows.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return mx.concatenate(rows), ids


@pytest.mark.parametrize("context", [7, 512])
def test_layer_by_layer_is_the_whole_model(models: tuple[Path, Path], context: int) -> None:
    for folder in models:
        log_p, ids = log_probabilities(folder, context)
        expected = mx.exp(-mx.take_along_axis(log_p, mx.array(ids)[:, None], axis=-1).mean()).item()
        score = perplexity(folder, TEXT, context=context)
        assert score.tokens == len(ids)
        assert score.perplexity == pytest.approx(expected, rel=1e-5)
        assert score.kl is None


def test_divergence_is_that_of_the_whole_models(models: tuple[Path, Path]) -> None:
    floats, quantized = models
    log_q, log_p = (log_probabilities(folder, 100)[0] for folder in models)
    expected = (mx.exp(log_q) * (log_q - log_p)).sum(axis=-1).mean().item()
    score = perplexity(quantized, TEXT, against=floats, context=100)
    assert score.kl == pytest.approx(expected, rel=1e-4)
    assert (score.kl or 0) > 1e-4


def test_nothing_diverges_from_itself(models: tuple[Path, Path]) -> None:
    for folder in models:
        assert perplexity(folder, TEXT, against=folder).kl == 0


def test_a_long_text_takes_rounds_and_says_the_same(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perplexity(models[1], TEXT, against=models[0], context=16)
    monkeypatch.setattr(module, "_STATE_BYTES", 16 * 64 * 4 * 2 * 2)
    steps: list[tuple[int, int]] = []
    rounds = perplexity(
        models[1], TEXT, against=models[0], context=16, on_progress=lambda done, total: steps.append((done, total))
    )
    assert rounds.tokens == whole.tokens
    assert rounds.perplexity == pytest.approx(whole.perplexity, rel=1e-9)
    assert rounds.kl == pytest.approx(whole.kl, rel=1e-9)
    assert len(steps) == steps[-1][1] >= 8


def test_memory_holds_a_layer_and_not_the_model(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 6):
        config = replace(TINY, num_hidden_layers=layers, hidden_size=128, intermediate_size=512, dtype="float32")
        folder = write_tiny(tmp_path / str(layers), config)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        perplexity(folder, "Hello world, this is it.", context=32)
        peaks.append(mx.get_peak_memory() - before)
    layer = (config.nbytes() - 2 * config.vocab_size * config.hidden_size * 4) / 6
    assert layer > 6e6
    assert peaks[1] < peaks[0] + layer / 4


@pytest.mark.parametrize("text", ["", "  "])
def test_hardly_any_text_is_no_crash(models: tuple[Path, Path], text: str) -> None:
    if text:
        assert perplexity(models[0], text).tokens == 1
        return
    with pytest.raises(MixtralError) as refused:
        perplexity(models[0], text)
    assert refused.value.code == "empty_text"


def test_models_of_other_vocabularies_and_broken_ones_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "v3", replace(TINY, vocab_size=32768, num_hidden_layers=1), tokenizer="v3")
    with pytest.raises(MixtralError) as refused:
        perplexity(models[0], TEXT, against=other)
    assert refused.value.code == "not_comparable"
    broken = tmp_path / "broken"
    write_tiny(broken, replace(TINY, rms_norm_eps=0.5))
    file = next(broken.glob("*.safetensors"))
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * float("nan")
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, metadata={"format": "mlx"})
    with pytest.raises(MixtralError) as refused:
        perplexity(broken, TEXT)
    assert refused.value.code == "not_finite"


def test_a_context_beyond_a_models_own_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    short = write_tiny(tmp_path / "short", replace(TINY, max_position_embeddings=64, num_hidden_layers=1))
    for folder, against, most in ((models[0], None, "2,048"), (models[0], short, "64")):
        with pytest.raises(MixtralError, match=f"expected 2 to {most}, this model's own limit") as refused:
            perplexity(folder, TEXT, against=against, context=4096 if against is None else 65)
        assert refused.value.code == "bad_context"


def test_scoring_can_be_stopped(models: tuple[Path, Path]) -> None:
    with pytest.raises(MixtralError) as stopped:
        perplexity(models[0], TEXT, cancelled=lambda: True)
    assert stopped.value.code == "cancelled"
