"""What we borrow of mlx-lm: masks, attention, rotary positions, expert layers, caches, samplers.

Importing mlx-lm as a whole brings in transformers, which takes longer than loading a small model and is used by nothing
here. So its package is put in place without running its front door; that runs when somebody asks for what is behind it
(`mlx_lm.load`, say), as if it had been imported then."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

from .memory import file_limit_kept


class _Package(ModuleType):
    """A package whose `__init__` has not run yet."""

    def __getattr__(self, name: str) -> Any:
        inside = not name.startswith("__") or name in ("__all__", "__version__")
        if not inside or self.__spec__ is None or self.__spec__.loader is None:
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        with file_limit_kept():
            self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _put_in_place(name: str) -> None:
    spec = None if name in sys.modules else find_spec(name)
    if spec:
        package = module_from_spec(spec)
        package.__class__ = _Package
        sys.modules[name] = package


_put_in_place("mlx_lm")

from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention  # noqa: E402
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache  # noqa: E402
from mlx_lm.models.rope_utils import initialize_rope  # noqa: E402
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear  # noqa: E402
from mlx_lm.sample_utils import make_logits_processors, make_sampler  # noqa: E402

__all__ = [
    "KVCache",
    "QuantizedKVCache",
    "QuantizedSwitchLinear",
    "RotatingKVCache",
    "SwitchGLU",
    "SwitchLinear",
    "create_attention_mask",
    "initialize_rope",
    "make_logits_processors",
    "make_sampler",
    "scaled_dot_product_attention",
]
