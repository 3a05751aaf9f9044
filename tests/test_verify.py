"""Verifying a converted folder: nothing that changed since goes unseen."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from mixtral_mlx.config import MixtralError
from mixtral_mlx.convert.run import Request, convert
from mixtral_mlx.convert.verify import verify

from .conversions import quick_tokenizer, write_source

__all__ = ["quick_tokenizer"]


@pytest.fixture
def folder(tmp_path: Path, quick_tokenizer: str) -> Path:
    convert(Request(str(write_source(tmp_path / "source", 1)), tmp_path / "dest", ("q2",)))
    return tmp_path / "dest"


def problem(folder: Path) -> str:
    with pytest.raises(MixtralError) as found:
        verify(folder)
    assert found.value.code in ("damaged", "bad_json")
    return str(found.value)


def test_what_was_written_is_found_whole(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    verified = verify(folder, on_progress=lambda done, total: seen.append((done, total)))
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    assert verified.files == len(files) == 6
    assert verified.nbytes == sum(path.stat().st_size for path in files)
    assert seen[-1] == (verified.nbytes, verified.nbytes)


@pytest.mark.parametrize("flips", [40, pytest.param(200, marks=pytest.mark.long)])
def test_every_flipped_bit_is_found(folder: Path, flips: int) -> None:
    rng = random.Random(flips)
    files = sorted(folder.iterdir())
    for n in range(flips):
        file = files[n % len(files)]  # All of them alike: most bytes are in one.
        at, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
        with file.open("r+b") as opened:
            opened.seek(at)
            byte = opened.read(1)[0]
            opened.seek(at)
            opened.write(bytes([byte ^ 1 << bit]))
            opened.flush()
            assert file.name in problem(folder), (file.name, at, bit)
            opened.seek(at)
            opened.write(bytes([byte]))
    verify(folder)


def test_missing_extra_and_cut_files_are_named(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shutil.copyfile(shard, folder / "model-00002-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors is not in the manifest" in problem(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "README.md").write_text("my notes")
    verify(folder)
    with shard.open("r+b") as file:
        file.truncate(1000)
    assert "is 1,000 bytes, the manifest says" in problem(folder)
    shard.unlink()
    (folder / "tokenizer.model").unlink()
    said = problem(folder)
    assert f"{shard.name} is missing" in said
    assert "tokenizer.model is missing" in said


@pytest.mark.parametrize("files", [{}, [], None, {"../x": {"bytes": 1, "sha256": ""}}, {"x": {"bytes": "1"}}])
def test_a_manifest_that_is_not_as_it_was_written_is_refused(folder: Path, files: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
    assert "manifest.json is damaged" in problem(folder)


def test_what_was_not_converted_cannot_be_verified(folder: Path, tmp_path: Path) -> None:
    for path, code in ((tmp_path / "source", "no_manifest"), (tmp_path / "nowhere", "no_model")):
        with pytest.raises(MixtralError) as refused:
            verify(path)
        assert refused.value.code == code


def test_verifying_can_be_stopped(folder: Path) -> None:
    with pytest.raises(MixtralError) as stopped:
        verify(folder, cancelled=lambda: True)
    assert stopped.value.code == "cancelled"
