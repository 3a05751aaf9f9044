"""What is written for other engines, read back: the demo model's weights, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mixtral_mlx.demo
from mixtral_mlx.convert import mlx as mlx_folders
from mixtral_mlx.convert.names import matrices
from mixtral_mlx.convert.source import open_source
from mixtral_mlx.prompt import Message, Tokenizer
from mixtral_mlx.weights import load

ROOT = Path(__file__).parent.parent
DEMO = Path(mixtral_mlx.demo.__file__).parent / "model"


def export(*arguments: str | Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "export.py"), str(DEMO), *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def floats(path: Path) -> dict[str, mx.array]:
    """Every matrix of a model in our layout."""
    source = open_source(path)
    packed = source.config.quantization
    tensors = mlx_folders.unpack(source.tensors, source.config) if packed else source.tensors
    return {m.name: m.read() for m in matrices(tensors, replace(source.config, quantization=None))}


@pytest.mark.parametrize(("kind", "most"), [("q8_0", 0.01), ("q4_0", 0.08)])
def test_an_exported_gguf_holds_the_models_weights_as_near_as_its_type_can(
    tmp_path: Path, kind: str, most: float
) -> None:
    export("--gguf", tmp_path / "demo.gguf", "--type", kind)
    theirs, ours = floats(tmp_path / "demo.gguf"), floats(DEMO)
    assert theirs.keys() == ours.keys()
    for name, array in ours.items():
        exact = array.ndim == 1 or name.endswith(".gate")
        error: Any = (mx.linalg.norm(theirs[name] - array) / mx.linalg.norm(array)).item()
        assert error <= (0 if exact else most), name


def test_an_exported_folder_answers_as_the_model_does(tmp_path: Path) -> None:
    export("--transformers", tmp_path / "hf")
    prompt = Tokenizer.read(tmp_path / "hf").encode_chat([Message("user", "What is the capital of France?")])
    ours, theirs = (load(path, dtype="float32").model(mx.array([prompt])) for path in (DEMO, tmp_path / "hf"))
    assert mx.array_equal(mx.argmax(ours[0], axis=-1), mx.argmax(theirs[0], axis=-1))
    assert mx.allclose(ours, theirs, atol=0.2)
