"""Make the golden folders beside this file: tiny Mixtrals as transformers saves them, and the logits it computes.

Run with torch, transformers and safetensors installed; the tests themselves need only what this leaves behind:

    python tests/golden/make_golden.py

Each folder is what `save_pretrained` writes, plus `golden.safetensors`: `ids` (B, T), `logits` (B, T, V) in float32; in
`untied` also `logits.bfloat16` and `logits.float16`, computed in float32 from weights rounded to that dtype."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

HERE = Path(__file__).parent
TOKENS = 40
BASE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 16, "num_local_experts": 2}
FOLDERS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True, "head_dim": 12, "num_key_value_heads": 1},
    "window": {"sliding_window": 7, "num_local_experts": 5, "num_experts_per_tok": 3},
    "rope_linear": SMALL | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "rope_dynamic": SMALL | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "rope_llama3": SMALL
    | {
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        }
    },
    "rope_yarn": SMALL
    | {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            **{"original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0},
        }
    },
}


def make(name: str, changes: dict[str, Any], seed: int) -> None:
    """Write one folder; the first of them in several shards with an index."""
    torch.manual_seed(seed)
    config = MixtralConfig(**{**BASE, **changes}, dtype="float32", attn_implementation="eager")
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            # Large enough that logits differ clearly; transformers' own start makes them nearly alike.
            weight.copy_(torch.randn_like(weight) * 0.25 + (1.0 if path.endswith("norm.weight") else 0.0))
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size="60KB" if name == "untied" else "5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)

    ids = torch.randint(3, config.vocab_size, (2, TOKENS))
    golden = {"ids": ids.to(torch.int32), "logits": logits(model, ids)}
    for dtype in (torch.bfloat16, torch.float16) if name == "untied" else ():
        rounded = MixtralForCausalLM(config).eval()
        rounded.load_state_dict({key: w.to(dtype).float() for key, w in model.state_dict().items()})
        golden[f"logits.{str(dtype).removeprefix('torch.')}"] = logits(rounded, ids)
    save_file(golden, folder / "golden.safetensors")


def logits(model: MixtralForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float().contiguous()


if __name__ == "__main__":
    for seed, (name, changes) in enumerate(FOLDERS.items()):
        make(name, changes, seed)
