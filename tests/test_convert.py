"""Conversions from beginning to end: what comes out, and what is refused before anything is touched."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import pytest

from mixtral_mlx import weights
from mixtral_mlx.config import Config, MixtralError, Packing
from mixtral_mlx.convert.names import ConvertError
from mixtral_mlx.convert.run import Request, convert
from mixtral_mlx.convert.verify import verify
from mixtral_mlx.prompt import Message, Tokenizer
from mixtral_mlx.weights import load

from .checkpoints import read_arrays, unstacked, write_tiny, write_weights
from .conversions import SOURCE, contents, quick_tokenizer, source_arrays, write_source

__all__ = ["quick_tokenizer"]
pytestmark = pytest.mark.usefixtures("quick_tokenizer")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("convert") / "source")


def bits_of(array: mx.array) -> bytes:
    return bytes(memoryview(array.flatten()).cast("B"))  # type: ignore[arg-type]


def assert_same(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert bits_of(array) == bits_of(theirs[name]), name


# What comes out.


def test_what_comes_out_is_what_mlx_quantize_makes_of_the_source(source: Path, tmp_path: Path) -> None:
    convert(Request(str(source), tmp_path / "dest", ("q4",)))
    config = Config.read(tmp_path / "dest")
    expected: dict[str, mx.array] = {}
    for name, array in source_arrays(source).items():
        packing = config.packing(name.removesuffix(".weight")) if array.ndim > 1 else None
        arrays = mx.quantize(array, packing.group_size, packing.bits) if packing else (array,)
        parts = (name, name.replace("weight", "scales"), name.replace("weight", "biases"))
        expected |= dict(zip(parts, arrays, strict=False))
    assert_same(read_arrays(tmp_path / "dest"), expected)


def test_floats_come_out_bit_for_bit(source: Path, tmp_path: Path) -> None:
    convert(Request(str(source), tmp_path / "dest", ("bf16",)))
    assert_same(read_arrays(tmp_path / "dest"), source_arrays(source))


def test_what_fills_several_files_is_cut_like_a_saved_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(Request(str(source), tmp_path / "one", ("q4",)))
    monkeypatch.setattr(weights, "_MAX_SHARD_BYTES", 1 << 20)
    convert(Request(str(source), tmp_path / "dest", ("q4",)))
    loaded = load(tmp_path / "dest")
    weights.save(tmp_path / "saved", loaded.model, loaded.config)
    assert_same(read_arrays(tmp_path / "dest"), read_arrays(tmp_path / "one"))
    names = [path.name for path in sorted((tmp_path / "dest").glob("model*"))]
    assert len(names) > 3
    assert names == [path.name for path in sorted((tmp_path / "saved").glob("model*"))]
    verify(tmp_path / "dest")


def test_two_recipes_in_one_pass_are_two_passes(source: Path, tmp_path: Path) -> None:
    report = convert(Request(str(source), tmp_path / "both", ("q4", "q3")))
    assert [written.folder for written in report.written] == ["both-q4", "both-q3"]
    for name in ("q4", "q3"):
        convert(Request(str(source), tmp_path / name, (name,)))
        assert contents(tmp_path / name) == contents(tmp_path / f"both-{name}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_mlx_has_quantized_is_stacked_without_loss(source: Path, tmp_path: Path, dtype: str) -> None:
    convert(Request(str(source), tmp_path / "q4", ("q4",), group_size=32, dtype=dtype))
    stacked = read_arrays(tmp_path / "q4")
    config = json.loads((tmp_path / "q4" / "config.json").read_text())
    # As other programs do: the dtype the model once had, a router left as it was, and norms that are wider.
    gate = "model.layers.1.block_sparse_moe.gate"
    config |= {"torch_dtype": "bfloat16", "quantization_config": None}
    del config["quantization"][gate], stacked[f"{gate}.scales"], stacked[f"{gate}.biases"]
    stacked[f"{gate}.weight"] = mx.ones((8, 64), getattr(mx, dtype))
    wide = "model.layers.0.input_layernorm.weight"
    stacked[wide] = stacked[wide].astype(mx.float32)
    old = tmp_path / "old"
    old.mkdir()
    write_weights(old, unstacked(stacked))
    (old / "config.json").write_text(json.dumps(config))
    shutil.copyfile(source / "tokenizer.model", old / "tokenizer.model")
    report = convert(Request(str(old), tmp_path / "new"))
    assert report.written[0].recipe == "keep"
    assert_same(read_arrays(tmp_path / "new"), stacked)
    assert Config.read(tmp_path / "new").dtype == dtype


def test_what_mlx_has_quantized_can_be_quantized_anew(source: Path, tmp_path: Path) -> None:
    convert(Request(str(source), tmp_path / "q8", ("q8",)))
    convert(Request(str(tmp_path / "q8"), tmp_path / "q4", ("q4",)))
    gate = "model.layers.1.block_sparse_moe.switch_mlp.gate_proj"
    eight, four = read_arrays(tmp_path / "q8"), read_arrays(tmp_path / "q4")
    floats = mx.dequantize(eight[f"{gate}.weight"], eight[f"{gate}.scales"], eight[f"{gate}.biases"], bits=8)
    assert bits_of(mx.quantize(floats, bits=4)[0]) == bits_of(four[f"{gate}.weight"])


def test_a_converted_folder_prompts_like_its_source(source: Path, tmp_path: Path) -> None:
    convert(Request(str(source), tmp_path / "dest"))
    messages = [Message("user", "Grüß dich, wie geht’s?  \n")]
    ours, theirs = Tokenizer.read(tmp_path / "dest"), Tokenizer.read(source)
    assert ours.encode_chat(messages) == theirs.encode_chat(messages)
    from tokenizers import Tokenizer as Other

    other = Other.from_file(str(tmp_path / "dest" / "tokenizer.json"))
    assert other.encode("Grüß dich").ids == theirs.encode("Grüß dich")
    assert load(tmp_path / "dest").config == Config.read(tmp_path / "dest")


def test_the_report_counts_what_is_there(source: Path, tmp_path: Path) -> None:
    report = convert(Request(str(source), tmp_path / "dest"))
    (written,) = report.written
    files = list((tmp_path / "dest").glob("*.safetensors"))
    assert written.nbytes == sum(file.stat().st_size for file in files)
    assert written.tensors == len(read_arrays(tmp_path / "dest"))
    assert report.bytes_in == sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert report.source_format == "safetensors"
    assert not report.resumed
    everything = sum(file.stat().st_blocks * 512 for file in (tmp_path / "dest").iterdir())
    assert everything <= report.peak_disk_bytes <= everything + (64 << 10)


# What is refused, and that it leaves everything as it was.


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every path below `folder` and what is there."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
    }


def assert_refused(request: Request, code: str, said: str = "") -> None:
    """The conversion fails with `code` and leaves everything around DEST as it was."""
    parent = Path(os.path.abspath(request.dest)).parent  # noqa: PTH100
    before = tree(parent)
    with pytest.raises(MixtralError) as refused:
        convert(request)
    assert refused.value.code == code
    assert said in str(refused.value)
    assert tree(parent) == before


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with things in it that must not be touched."""
    folder = tmp_path / "place"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "notes.txt").write_text("mine")
    (folder / "mine.txt").write_text("mine")
    (folder / "link").symlink_to("mine")
    (folder / "nowhere").symlink_to("not there")
    yield folder
    assert (folder / "mine" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["mine", "mine/", "mine.txt", "link", "nowhere", ".", "mine/..", "mine/."])
def test_a_destination_that_exists_is_refused(
    source: Path, place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert_refused(Request(str(source), Path(name)), "exists")
    assert_refused(Request(str(source), Path(f"{place}/{name}")), "exists")


def test_a_destination_that_exists_is_refused_before_the_network_is_asked(place: Path) -> None:
    assert_refused(Request("org/repo", place / "mine"), "exists")
    assert_refused(Request("org/repo", place / "nowhere" / "x"), "no_folder")


def test_several_recipes_refuse_each_destination(source: Path, place: Path) -> None:
    (place / "new-q3").mkdir()
    assert_refused(Request(str(source), place / "new", ("q4", "q3")), "exists", "new-q3")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_lies_where_the_work_folder_would_be_is_left_alone(source: Path, place: Path, kind: str) -> None:
    work = place / "new.partial"
    if kind == "folder":
        shutil.copytree(place / "mine", work)
    elif kind == "file":
        work.write_text("mine")
    else:
        work.symlink_to("mine")
    assert_refused(Request(str(source), place / "new"), "exists", "in the way")


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (Request("", Path(), ("q4", "q4")), "bad_recipe", "twice"),
        (Request("", Path(), ("q9",)), "bad_recipe", "q9"),
        (Request("", Path(), ("keep",)), "bad_recipe", "Only what MLX has quantized"),
        (Request("", Path(), ("keep", "q4")), "bad_recipe", "alone"),
        (Request("", Path(), ("q4",), group_size=48), "bad_quantization", "48"),
        (Request("", Path(), ("q4",), group_size=128), "bad_quantization", "64 inputs"),
        (Request("", Path(), ("q4",), mode="mxfp8"), "bad_recipe", "mxfp8"),
        (Request("", Path(), ("bf16",), group_size=32), "bad_recipe", "group_size"),
        (Request("", Path(), ("bf16",), mode="mxfp4"), "bad_recipe", "mode"),
        (Request("", Path(), ("bf16",), dtype="float16"), "bad_recipe", "dtype"),
        (Request("", Path(), ("q4",), recipe_file=Path("x.json")), "unreadable", "x.json"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    source: Path, place: Path, request_: Request, code: str, said: str
) -> None:
    assert_refused(replace(request_, source=str(source), dest=place / "new"), code, said)


def test_a_quantized_source_that_is_kept_takes_no_options(source: Path, place: Path) -> None:
    convert(Request(str(source), place / "q4"))
    assert_refused(Request(str(place / "q4"), place / "new", group_size=32), "bad_recipe", "group_size")


def test_a_source_that_is_not_there_or_no_mixtral_is_refused(source: Path, place: Path, tmp_path: Path) -> None:
    assert_refused(Request(str(place / "not there"), place / "new"), "no_model")
    assert_refused(Request(str(place / "mine"), place / "new"), "no_weights", "notes.txt")
    llama = tmp_path / "llama"
    shutil.copytree(source, llama)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert_refused(Request(str(llama), place / "new"), "not_mixtral")


def test_a_missing_shard_and_a_missing_tokenizer_are_found_at_once(source: Path, place: Path, tmp_path: Path) -> None:
    for name, code in (("model-00002-of-00003.safetensors", "missing_file"), ("tokenizer.model", "no_tokenizer")):
        shutil.copytree(source, tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(MixtralError) as refused:
            convert(Request(str(tmp_path / name), place / "new"))
        assert refused.value.code == code
        assert not (place / "new").exists()
        # Nothing is lost, so nothing stands in the way of the next try, of whatever it is.
        convert(Request(str(source), place / "new", ("q3",)))
        shutil.rmtree(place / "new")


def test_names_too_long_for_a_path_are_refused(source: Path, place: Path) -> None:
    assert_refused(Request("x" * 300, place / "new"), "no_model")
    assert_refused(Request(f"org/repo{'/x' * 3000}", place / "new"), "no_model")
    assert_refused(Request(str(source), place / ("x" * 300)), "unwritable", "File name too long")


def test_a_tensor_that_stands_twice_is_named_in_plain_text(source: Path, place: Path, tmp_path: Path) -> None:
    twice = {"\x1b[2J": mx.zeros((1,))}
    shutil.copytree(source, tmp_path / "twice")
    write_weights(tmp_path / "twice", twice, twice)
    (tmp_path / "twice" / "model.safetensors.index.json").unlink()
    assert_refused(Request(str(tmp_path / "twice"), place / "new"), "duplicate_tensor", r"'\x1b[2J'")


# The disk.


def test_too_little_room_is_said_before_anything_is_written(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10, 9, 1_234_567)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    planned = SOURCE.nbytes()
    assert_refused(Request(str(source), place / "new", ("bf16",)), "disk_full", "1,234,567 bytes free")
    with pytest.raises(ConvertError) as refused:
        convert(Request(str(source), place / "new", ("bf16",)))
    needed = int(str(refused.value).split(" bytes more")[0].replace(",", ""))
    assert planned < needed < planned + (16 << 20)


@pytest.mark.parametrize("call", ["pwrite", "write", "ftruncate"])
def test_a_disk_that_fills_up_is_no_loss(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    convert(Request(str(source), tmp_path / "whole"))
    real, count = getattr(os, call), [0]

    def full(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] > 40 or call == "ftruncate":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(ConvertError) as failed:
            convert(Request(str(source), tmp_path / "dest"))
    assert failed.value.code == "disk_full"
    assert "bytes free" in str(failed.value)
    assert not (tmp_path / "dest").exists()
    report = convert(Request(str(source), tmp_path / "dest"))
    assert report.resumed == (call != "ftruncate")
    assert contents(tmp_path / "dest") == contents(tmp_path / "whole")


def _limited(source: str, dest: str, answer: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
    try:
        convert(Request(source, Path(dest), ("bf16",)))
    except MixtralError as error:
        answer.send((error.code, str(error)))


def test_a_limit_on_the_size_of_files_is_said(source: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=_limited, args=(str(source), str(tmp_path / "dest"), there))
    process.start()
    there.close()
    code, said = here.recv()
    process.join()
    assert code == "disk_full"
    assert "bytes more are needed" in said
    assert not (tmp_path / "dest").exists()


def use_a_small_disk(source: Path, disk: Path) -> None:
    """Convert to a disk of 16 MiB: half full, and empty."""
    (disk / "mine").write_bytes(bytes(8 << 20))
    assert_refused(Request(str(source), disk / "new", ("bf16",)), "disk_full", "bytes free")
    (disk / "mine").unlink()
    convert(Request(str(source), disk / "new", ("q2",)))
    verify(disk / "new")


def with_a_small_disk(disk: Path) -> list[str]:
    """What a command starts with to have a disk of 16 MiB at `disk`, which nobody else sees and ends with it."""
    mount = 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"'
    for options in (
        "--user --map-root-user --mount",
        "--mount",
    ):  # The first takes no root, the second no namespace of users.
        start = ["unshare", *options.split(), "sh", "-c", mount, str(disk)]
        if shutil.which("unshare") and subprocess.run([*start, "true"], capture_output=True).returncode == 0:
            return start
    pytest.skip("nobody may mount a disk of their own here")


@pytest.mark.long
def test_a_small_disk_that_is_full_is_no_loss(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    program = """
import sys
from pathlib import Path
from tests.test_convert import use_a_small_disk
use_a_small_disk(*map(Path, sys.argv[1:]))
"""
    command = [*with_a_small_disk(disk), sys.executable, "-c", program, str(source), str(disk)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(disk.iterdir())


def test_a_folder_that_cannot_be_written_is_said(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: Any, **options: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert_refused(Request(str(source), place / "new"), "unwritable", "Permission denied")


def test_a_folder_that_came_to_exist_meanwhile_is_not_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixtral_mlx.convert.pipeline import Events

    dest = tmp_path / "dest"
    with pytest.raises(ConvertError) as refused:
        convert(Request(str(source), dest), Events(progress=lambda done, total: dest.mkdir(exist_ok=True)))
    assert refused.value.code == "exists"
    assert not list(dest.iterdir())
    dest.rmdir()
    assert convert(Request(str(source), dest)).resumed
    verify(dest)
    assert not (tmp_path / "dest.partial").exists()


def test_a_folder_named_like_what_is_in_the_work_folder(source: Path, tmp_path: Path) -> None:
    for name in ("source", "output", "journal"):
        convert(Request(str(source), tmp_path / name))
        verify(tmp_path / name)


def test_a_recipe_in_a_file(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.json"
    recipe.write_text('{"*": 4, "*.self_attn.*": {"bits": 6, "group_size": 32}, "lm_head": null}')
    report = convert(Request(str(source), tmp_path / "dest", recipe_file=recipe))
    assert report.written[0].recipe == "mine"
    config = Config.read(tmp_path / "dest")
    assert config.packing("model.layers.0.self_attn.q_proj") == Packing(6, 32)
    assert config.packing("model.layers.0.block_sparse_moe.gate") == Packing(8, 64)
    assert config.packing("lm_head") is None
    load(tmp_path / "dest")


def test_tied_embeddings_have_no_head(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tied", replace(SOURCE, tie_word_embeddings=True))
    convert(Request(str(tmp_path / "tied"), tmp_path / "dest"))
    assert not any(name.startswith("lm_head") for name in read_arrays(tmp_path / "dest"))
    load(tmp_path / "dest")
