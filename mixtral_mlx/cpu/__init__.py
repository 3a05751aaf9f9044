"""Fast products and attention on a processor without a GPU, put into a loaded model from outside.

MLX's CPU backend is made to be right; with quantized weights it reaches a few percent of what the memory could deliver.
`accelerate` replaces the layers where that matters by ones that compute the same with numba's vector code:

    modules     drop-ins for MLX's layers and for our decoder layer
    products    rows of x times packed weights, each row with its own experts
    attention   queries over keys and values
    block       the innermost loop over 4-bit weights, for several rows at once
    unpack      packed weights → floats
    simd        vectors for numba
    jit         how kernels are compiled, and where what was compiled is kept

Weights stay where and as they are; everything is computed in float32. On a GPU nothing of this is imported."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from ..model import Model


MISSING = "numba is not installed: MLX's CPU backend computes alone, ten times slower. Mend it with: pip install numba"


def is_backend() -> bool:
    """Whether MLX computes on the CPU."""
    return mx.default_device() == mx.cpu


def is_available() -> bool:
    """Whether models can be accelerated: MLX computes on the CPU, and numba is installed."""
    return is_backend() and importlib.util.find_spec("numba") is not None


def accelerate(model: Model) -> None:
    """Give the layers of `model` that the kernels can compute the classes of `modules`."""
    from ..experts.streamed import StreamedExperts
    from . import modules

    for layer in model.layers:
        attention, moe = layer.self_attn, layer.block_sparse_moe
        matrices = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        experts = [moe.switch_mlp[name] for name in ("gate_proj", "up_proj", "down_proj")]
        for matrix in matrices:
            _replace(matrix)
        if all(map(modules.fits, experts)):
            streams = isinstance(moe.switch_mlp, StreamedExperts)
            moe.switch_mlp.__class__ = modules.StreamedExperts if streams else modules.Experts
        if all(map(modules.fits, [*matrices, *experts, moe.gate])) and modules.can_attend(attention):
            layer.__class__ = modules.DecoderLayer
            model.runs_ahead = False
    if "embed_tokens" in model.model:  # One of several machines may hold no more than some layers.
        # Whatever its weights, it is to give float32, which is what all that follows computes in.
        _replace(model.model.embed_tokens, always=True)
    if "lm_head" in model:
        _replace(model.lm_head)


def has_to_compile(model: Model) -> bool:
    """Whether the first token of `model` will take some seconds, since its kernels are new to this machine."""
    from . import jit, modules

    return isinstance(model.layers[0], modules.DecoderLayer) and not any(jit.folder().rglob("*.nbi"))


def compile_for(model: Model) -> None:
    """Run `model` over a few tokens, one and several at a time."""
    for tokens in (1, 16):
        mx.eval(model(mx.array([[1] * tokens])))


def _replace(module: nn.Module, *, always: bool = False) -> None:
    from . import modules

    for theirs, ours in modules.CLASSES:
        if type(module) is theirs and (always or modules.fits(module)):
            module.__class__ = ours
