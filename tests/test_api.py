"""The package as others see it: what importing does, what it offers, and which module may use which."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mixtral_mlx

PACKAGE = Path(mixtral_mlx.__file__).parent

LAYERS: dict[str, set[str]] = {
    "config": set(),
    "writing": {"config"},
    "memory": {"config"},
    "budget": {"config"},
    "speeds": {"bench", "budget", "config", "memory", "writing"},
    "borrowed": {"memory"},
    "model": {"borrowed", "config"},
    "routing": {"model"},
    "hub": {"config", "writing"},
    "weights": {"budget", "config", "cpu", "experts", "hub", "memory", "model"},
    "prompt": {"config"},
    "generate": {"borrowed", "budget", "config", "model", "prompt"},
    "experts": {"borrowed", "config", "memory", "model"},
    "cpu": {"borrowed", "experts", "model"},
    "engine": {"borrowed", "budget", "config", "cpu", "generate", "memory", "model", "prompt", "routing", "weights"},
    "server": {"__version__", "config", "engine", "opening", "page", "protocol", "terminal"},
    "helper": {"__version__", "config", "engine", "memory", "prompt", "protocol", "server"},
    "session": {"config", "engine", "generate", "memory", "prompt", "weights", "writing"},
    "opening": {
        "config",
        "cpu",
        "distributed",
        "engine",
        "generate",
        "memory",
        "prompt",
        "session",
        "terminal",
        "weights",
    },
    "protocol": {"config", "engine", "generate", "prompt"},
    "routes": {"config", "generate", "opening", "prompt", "routing", "session", "terminal", "writing"},
    "page": set(),
    "distributed": {"borrowed", "budget", "config", "cpu", "engine", "memory", "model", "weights", "__version__"},
}


def test_importing_does_nothing() -> None:
    script = """
import json, os, resource, sys, threading
before = resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ), threading.active_count()
import mixtral_mlx
after = resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ), threading.active_count()
loaded = {name.partition(".")[0] for name in sys.modules}
heavy = loaded & {"mlx", "mlx_lm", "transformers", "numpy", "rich", "mistral_common"}
print(json.dumps([before == after, sorted(heavy)]))
"""
    answer = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert json.loads(answer.stdout) == [True, []]
    assert answer.stderr == ""


def test_using_a_model_leaves_the_limit_on_open_files_alone() -> None:
    script = """
import resource
before = resource.getrlimit(resource.RLIMIT_NOFILE)
from mixtral_mlx import load, stream_generate
import mlx_lm
assert mlx_lm.__version__ and callable(mlx_lm.stream_generate)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == before, resource.getrlimit(resource.RLIMIT_NOFILE)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_talking_to_a_model_brings_in_no_transformers() -> None:
    script = """
import sys
from mixtral_mlx import load
with load() as mixtral:
    assert len(mixtral.chat("Hello", max_tokens=3).result().tokens) == 3
assert not sys.modules.keys() & {"transformers", "torch"}, "transformers"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", mixtral_mlx.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    assert getattr(mixtral_mlx, name).__doc__
    assert name in dir(mixtral_mlx)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mixtral_mlx.nonsense


@pytest.mark.parametrize("module", LAYERS)
def test_imports_point_downwards_only(module: str) -> None:
    is_package = (PACKAGE / module).is_dir()
    files = (PACKAGE / module).glob("*.py") if is_package else [PACKAGE / f"{module}.py"]
    imported = {
        (node.module or name.name).split(".")[0]
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 1 + is_package
        for name in node.names
    }
    assert imported <= LAYERS[module]


def test_the_package_docstring_names_every_module() -> None:
    documented = mixtral_mlx.__doc__ or ""
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert {name for name in modules if name not in documented} == set()
