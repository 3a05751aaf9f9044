"""The mathematics of Mixtral: attention, router, decoder.

Parameter names are those of mlx-lm's layout, so a checkpoint's tensors load without a map, and the model is a drop-in
for mlx-lm's generation, batching, caches and LoRA. Experts are handed in: this file never asks where they live.

B batch, T tokens, D hidden, H heads, E experts, K chosen experts, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .borrowed import SwitchGLU, create_attention_mask, initialize_rope, scaled_dot_product_attention
from .config import Config

Experts = Callable[[mx.array, mx.array], mx.array]
"""`experts(x, indices)`: x (B, T, D) and chosen experts (B, T, K) → each chosen expert's output (B, T, K, D)."""


def resident_experts(config: Config, layer: int) -> nn.Module:
    """All experts of a layer as stacks of weights in memory."""
    return SwitchGLU(config.hidden_size, config.intermediate_size, config.num_local_experts)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        queries, keys = self.num_heads * config.head_dim, self.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.rope = initialize_rope(
            config.head_dim,
            base=config.rope_theta,
            traditional=False,
            scaling_config=dict(config.rope_scaling) if config.rope_scaling else None,
            max_position_embeddings=config.max_position_embeddings,
        )

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        B, T, _ = x.shape
        queries = self.q_proj(x).reshape(B, T, self.num_heads, -1).swapaxes(1, 2)  # (B, H, T, head_dim)
        keys = self.k_proj(x).reshape(B, T, self.num_kv_heads, -1).swapaxes(1, 2)
        values = self.v_proj(x).reshape(B, T, self.num_kv_heads, -1).swapaxes(1, 2)

        if hasattr(cache, "each"):  # Several sequences side by side, each with a past of its own.
            out = mx.concatenate(cache.each(self.attend, queries, keys, values, mask), axis=2)
        else:
            out = self.attend(queries, keys, values, mask, cache)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, T, -1))

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any, cache: Any) -> mx.array:
        """queries (B, H, T, head_dim) over keys and values, put into `cache` first → (B, H, T, head_dim)."""
        offset = cache.offset if cache is not None else 0
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)


class MoE(nn.Module):
    """Routes each token to K experts and sums what they say, weighted by the router."""

    def __init__(self, config: Config, experts: nn.Module) -> None:
        super().__init__()
        self.num_chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.switch_mlp = experts

    def __call__(self, x: mx.array) -> mx.array:
        chosen, weights = self.route(x)
        outputs = self.switch_mlp(x, chosen)  # (B, T, K, D)
        return (outputs * weights[..., None]).sum(axis=-2).astype(x.dtype)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x (B, T, D) → the experts chosen for each token and their weights, (B, T, K) both."""
        # Which expert answers hangs on small differences, so the router keeps float32 whatever the rest runs in.
        logits = self.gate(x.astype(mx.float32))  # (B, T, E)
        chosen = mx.argpartition(-logits, kth=self.num_chosen - 1, axis=-1)[..., : self.num_chosen]
        chosen = mx.stop_gradient(chosen)  # (B, T, K)
        return chosen, mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1)


class DecoderLayer(nn.Module):
    """Attention, then experts, each on a normalized input and added to the stream."""

    def __init__(self, config: Config, experts: nn.Module) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.block_sparse_moe = MoE(config, experts)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids → hidden states."""

    def __init__(self, config: Config, experts: Callable[[Config, int], nn.Module]) -> None:
        super().__init__()
        self.sliding_window = config.sliding_window
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, experts(config, n)) for n in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings  # (B, T, D)
        return self.norm(self.through(x, cache))

    def read(self, inputs: mx.array, cache: Sequence[Any]) -> None:
        """Put ids into `cache`, of which nothing else is wanted; what comes of them need not be computed to its end."""
        self(inputs, cache)

    def through(self, x: mx.array, cache: Sequence[Any] | None) -> mx.array:
        """x (B, T, D) through all layers, without the last norm."""
        caches = cache or [None] * len(self.layers)
        mask = create_attention_mask(x, caches[0], window_size=self.sliding_window)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, mask, layer_cache)
        return x


class Model(nn.Module):
    """Mixtral for causal language modelling: ids (B, T) → logits (B, T, V).

    `experts(config, layer)` makes the module that holds a layer's experts; by default all are resident. `runs_ahead`
    says whether a call only describes what MLX then does by itself: then it pays to call before results are needed."""

    def __init__(self, config: Config, experts: Callable[[Config, int], nn.Module] = resident_experts) -> None:
        super().__init__()
        self.args = config
        self.model_type = config.model_type
        self.runs_ahead = True
        self.model = Decoder(config, experts)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self.logits(self.model(inputs, cache, input_embeddings))

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden states (.., D) → (.., V)."""
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers
