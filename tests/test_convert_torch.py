"""Torch files: real ones give their tensors, hostile ones give an error with a code, and none runs anything."""

from __future__ import annotations

import copyreg
import pickle
import random
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mixtral_mlx.config import Config, MixtralError
from mixtral_mlx.convert.gguf import open_gguf
from mixtral_mlx.convert.names import ConvertError, matrices
from mixtral_mlx.convert.safetensors import open_safetensors
from mixtral_mlx.convert.torch import open_torch
from mixtral_mlx.memory import peak_rss_bytes

from .sources.make_sources import CONFIG, HERE, hf_weights, stacked_names, write_fused

LIMIT_S = 5.0
EXTENSIONS = {1: 7, 2: 700, 4: 70000}


def torch_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])


def numbers(*shape: int) -> np.ndarray[Any, Any]:
    return np.arange(float(np.prod(shape))).reshape(shape)


# Files that torch itself wrote.


@pytest.mark.parametrize("form", ["bin", "bin-sharded", "torrent", "torrent-parts", "hub"])
def test_every_torch_form_holds_the_matrices_of_the_hugging_face_form(form: str) -> None:
    config = Config.from_dict(CONFIG)
    expected = stacked_names(hf_weights())
    found = matrices(open_torch(torch_files(HERE / form)), config)
    assert len(found) == 2 * (6 + 1 + 3 * 8) + 3
    for matrix in found:
        array = expected[f"{matrix.path}.weight"]
        array = array if matrix.expert is None else array[matrix.expert]
        values = matrix.read()
        assert values.dtype == mx.bfloat16
        np.testing.assert_array_equal(np.array(values.astype(mx.float32)), array)


@pytest.mark.parametrize("file", ["odd.pt", "odd-old.pt"])
def test_views_transposes_parameters_and_the_old_form_are_read(file: str) -> None:
    tensors = open_torch([HERE / file])
    expected = {
        **{"float16": numbers(3, 4), "int32": numbers(5), "transposed": numbers(4, 3).T, "whole": numbers(6, 4)},
        **{"part": numbers(6, 4)[2:5], "parameter": numbers(2, 2), "cube": numbers(2, 3, 4), "one": numbers(1, 5)},
    }
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        stored = tensors[name]
        assert stored.shape == array.shape
        for start, stop in ((0, len(array)), (1, len(array)), (0, 1), (1, 1)):
            np.testing.assert_array_equal(np.array(stored.read(start, stop)), array[start:stop])
    assert tensors["float16"].read(0, 3).dtype == mx.float16
    assert tensors["int32"].read(0, 5).dtype == mx.int32


def test_threads_read_rows_of_one_tensor_at_once() -> None:
    for _ in range(20):
        stored = open_torch([HERE / "odd.pt"])["whole"]
        with ThreadPoolExecutor(4) as pool:
            rows = list(pool.map(lambda n, s=stored: np.array(s.read(n, n + 1)), range(6)))
        np.testing.assert_array_equal(np.concatenate(rows), numbers(6, 4))


def test_other_strides_are_refused() -> None:
    with pytest.raises(ConvertError, match="strides") as error:
        open_torch([HERE / "strided.pt"])
    assert error.value.code == "unsupported_layout"


def test_a_name_in_two_files_is_refused() -> None:
    with pytest.raises(ConvertError) as error:
        open_torch([HERE / "odd.pt", HERE / "odd-old.pt"])
    assert error.value.code == "duplicate_tensor"


def test_torch_is_never_imported() -> None:
    open_torch(torch_files(HERE / "bin"))
    assert "torch" not in sys.modules


# Pickles by hand.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def count(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def storage(kind: bytes = b"ctorch\nFloatStorage\n", key: str = "0", items: bytes = count(6)) -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + items + b"tQ"


def tensor(
    stored: bytes = storage(),
    offset: bytes = count(0),
    shape: bytes = count(2) + count(3) + b"\x86",
    strides: bytes = count(3) + count(1) + b"\x86",
    hooks: bytes = b"ccollections\nOrderedDict\n)R",
) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + offset + shape + strides + b"\x89" + hooks + b"tR"


def state(value: bytes, key: bytes = text("weight")) -> bytes:
    return b"\x80\x02}" + key + value + b"s."


GOOD = state(tensor())


def archive(file: Path, made: bytes = GOOD, entries: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A zip as torch writes it: the pickle, and the storage "0" of six float32 numbers."""
    entries = {"a/data.pkl": made, "a/byteorder": b"little", "a/data/0": numbers(6).astype("<f4").tobytes()} | (
        entries or {}
    )
    with zipfile.ZipFile(file, "w", **options) as target:
        for name, data in entries.items():
            target.writestr(zipfile.ZipInfo(name), data, **options)
    return file


def test_a_pickle_by_hand_is_read(tmp_path: Path) -> None:
    stored = open_torch([archive(tmp_path / "good.pt")])["weight"]
    np.testing.assert_array_equal(np.array(stored.read(0, 2)), numbers(2, 3))


def made(path: str) -> bytes:
    """The arguments (path,)."""
    return text(path) + b"\x85"


def lazily(path: str) -> bytes:
    """Arguments for a class that will run through them: map(os.mkdir, [path])."""
    return b"cbuiltins\nmap\ncos\nmkdir\n]" + text(path) + b"a\x86\x81\x85"


def nested_pickle(path: str) -> bytes:
    inner = b"cos\nmkdir\n" + made(path) + b"R."
    return b"cpickle\nloads\nB" + struct.pack("<I", len(inner)) + inner + b"\x85R."


# Each of these makes a folder when it is unpickled, which the test first sees it do.
LIVE: dict[str, Callable[[str], bytes]] = {
    "reduce os.system": lambda p: b"cos\nsystem\n" + made(f"mkdir {p}") + b"R.",
    "global posix.system": lambda p: b"\x80\x02cposix\nsystem\n" + made(f"mkdir {p}") + b"R.",
    "protocol 0": lambda p: b"cos\nmkdir\n(V" + p.encode() + b"\ntR.",
    "stack_global": lambda p: b"\x80\x04" + text("os") + text("mkdir") + b"\x93" + made(p) + b"R.",
    "stack_global, memoized": lambda p: (
        b"\x80\x04\x8c\x02os\x94\x8c\x05mkdir\x94\x93\x94\x8c" + bytes([len(p)]) + p.encode() + b"\x94\x85\x94R\x94."
    ),
    "inst": lambda p: b"(" + text(p) + b"ios\nmkdir\n.",
    "obj": lambda p: b"(cos\nmkdir\n" + text(p) + b"o.",
    "newobj": lambda p: b"\x80\x02cbuiltins\ntuple\n" + lazily(p) + b"\x81.",
    "newobj_ex": lambda p: b"\x80\x04cbuiltins\ntuple\n" + lazily(p) + b"}\x92.",
    "build with __setstate__": lambda p: (
        b"\x80\x02cfunctools\npartial\ncbuiltins\nprint\n\x85\x81(cos\nmkdir\n" + made(p) + b"}NtbR)R."
    ).replace(b"tbR)R", b"tb)R"),
    "nested in a dictionary": lambda p: state(b"cos\nmkdir\n" + made(p) + b"R"),
    "as a dictionary's key": lambda p: state(tensor(), key=b"cos\nmkdir\n" + made(p) + b"R").replace(tensor(), b"N"),
    "extension code of 1 byte": lambda p: b"\x80\x02\x82" + bytes([EXTENSIONS[1]]) + made(p) + b"R.",
    "extension code of 2 bytes": lambda p: b"\x80\x02\x83" + struct.pack("<H", EXTENSIONS[2]) + made(p) + b"R.",
    "extension code of 4 bytes": lambda p: b"\x80\x02\x84" + struct.pack("<I", EXTENSIONS[4]) + made(p) + b"R.",
    "dotted name in a known module": lambda p: (
        b"\x80\x04cbuiltins\ngetattr\n"
        + (text("collections") + text("_sys.modules.get") + b"\x93" + made("os") + b"R")
        + (text("mkdir") + b"\x86R" + made(p) + b"R.")
    ),
    "eval": lambda p: b"cbuiltins\neval\n" + made(f"__import__('os').mkdir({p!r})") + b"R.",
    "exec": lambda p: b"cbuiltins\nexec\n" + made(f"import os; os.mkdir({p!r})") + b"R.",
    "pickle in a pickle": nested_pickle,
    "getattr": lambda p: (
        b"cbuiltins\ngetattr\ncbuiltins\n__import__\n" + made("os") + b"R" + text("mkdir") + b"\x86R" + made(p) + b"R."
    ),
    "popped from the stack": lambda p: b"cos\nmkdir\n" + made(p) + b"R0}.",
    "subprocess": lambda p: b"csubprocess\ncall\n]" + text("mkdir") + b"a" + text(p) + b"a\x85R.",
}
# These would call something through torch's own functions, or through what a reader of persistent ids may do.
IN_TORCH: dict[str, Callable[[str], bytes]] = {
    "as a tensor's hooks": lambda p: state(tensor(hooks=b"cos\nmkdir\n" + made(p) + b"R")),
    "as a storage's kind": lambda p: state(tensor(storage(kind=b"cos\nmkdir\n" + made(p) + b"R"))),
    "as a storage's class": lambda p: state(tensor(storage(kind=b"cos\nmkdir\n", key=p))),
    "textual persistent id": lambda p: b"Pos.mkdir " + p.encode() + b"\n.",
    "persistent id of a module": lambda p: (
        b"\x80\x02(" + text("module") + b"cos\nmkdir\n" + text(p) + text("") + b"tQ."
    ),
    "torch.storage._load_from_bytes": lambda p: (
        b"\x80\x02ctorch.storage\n_load_from_bytes\nC" + bytes([len(p)]) + p.encode() + b"\x85R."
    ),
    "torch.load": lambda p: b"\x80\x02ctorch\nload\n" + made(p) + b"R.",
    "a known name with a space in it": lambda p: (
        b"\x80\x04" + text("torch._utils _rebuild_tensor_v2") + text("__globals__") + b"\x93" + made(p) + b"R."
    ),
    "build on a known name": lambda p: (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("__code__") + text(p) + b"sb."
    ),
    "call of a dtype": lambda p: b"\x80\x02ctorch\nfloat32\n" + made(p) + b"R.",
    "call of a storage": lambda p: b"\x80\x02ctorch\nFloatStorage\n" + made(p) + b"R.",
    "a whole model": lambda p: b"\x80\x02c__torch__\nModel\n)\x81}" + text("p") + text(p) + b"sb.",
}


@pytest.fixture
def extensions() -> Iterator[None]:
    """Codes 7, 700 and 70000 for os.mkdir, as a program may have registered them."""
    names = dict(zip(("mkdir", "makedirs", "mknod"), EXTENSIONS.values(), strict=True))
    for name, code in names.items():
        copyreg.add_extension("os", name, code)
    yield
    for name, code in names.items():
        copyreg.remove_extension("os", name, code)


@pytest.mark.usefixtures("extensions")
@pytest.mark.parametrize("name", LIVE)
def test_a_canary_never_sings(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    made = LIVE[name](str(canary))
    pickle.loads(made)
    assert canary.exists(), "this pickle is no canary"
    canary.rmdir() if canary.is_dir() else canary.unlink()
    refuse_everywhere(made, tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("name", IN_TORCH)
def test_a_canary_for_torch_is_refused(name: str, tmp_path: Path) -> None:
    refuse_everywhere(IN_TORCH[name](str(tmp_path / "canary")), tmp_path)
    assert not (tmp_path / "canary").exists()


def refuse_everywhere(made: bytes, folder: Path) -> None:
    """In the zip form, in each place of the old form, bare, and under the name of another container."""
    with pytest.raises(ConvertError) as error:
        open_torch([archive(folder / "x.bin", made)])
    assert error.value.code == "unsafe_pickle"
    old = (HERE / "odd-old.pt").read_bytes()
    for bad in (made, old[:15] + made, old[:21] + made, old.replace(old[137:], made)):
        (folder / "old.bin").write_bytes(bad)
        refused(folder / "old.bin")
    for opened, suffix in ((open_safetensors, "safetensors"), (open_gguf, "gguf")):
        for data in (made, (folder / "x.bin").read_bytes()):
            (folder / f"x.{suffix}").write_bytes(data)
            with pytest.raises(MixtralError):
                opened([folder / f"x.{suffix}"])


def refused(file: Path) -> str:
    """The code with which `file` is refused, and quickly."""
    start = time.perf_counter()
    with pytest.raises(MixtralError) as error:
        read_all([file])
    assert time.perf_counter() - start < LIMIT_S
    assert error.value.code
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()
    return error.value.code


def read_all(files: list[Path]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.array(stored.read(0, stored.shape[0])) for name, stored in open_torch(files).items()}


# Pickles that would take all memory or time.

BOMBS: dict[str, Callable[[], bytes]] = {
    "billion laughs": lambda: (
        b"\x80\x02]q\x00" + b"".join(b"(" + b"h%c" % n * 40 + b"lq%c" % (n + 1) for n in range(60)) + b"."
    ),
    "billion laughs in tuples": lambda: b")" + b"2\x86" * 100_000 + b".",
    "billion laughs through the memo": lambda: b")q\x00" + b"h\x00h\x00\x86q\x00" * 100_000 + b".",
    "memo far away": lambda: b"Nr\xff\xff\xff\xff0" + b".",
    "memo everywhere": lambda: (
        b"N" + b"".join(b"r" + struct.pack("<I", n * 4099 % 2**32) for n in range(400_000)) + b"."
    ),
    "huge number in bytes": lambda: b"\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"1" * 1000 + b".",
    "huge number in digits": lambda: b"L" + b"9" * 4_000_000 + b"L\n.",
    "huge number of digits, short": lambda: b"I" + b"9" * 4_000_000 + b"\n.",
    "huge bytes": lambda: b"\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "huge text": lambda: b"\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
    "huge byte array": lambda: b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "deep tuples": lambda: b")" + b"\x85" * 400_000 + b".",
    "deep tuples as a key": lambda: b"})" + b"\x85" * 400_000 + b"Ns.",
    "deep lists": lambda: b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep dictionaries": lambda: b"".join(b"}" + text("a") for _ in range(100_000)) + b"N" + b"s" * 100_000 + b".",
    "numbers that collide": lambda: (
        b"}(" + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(200_000)) + b"u."
    ),
    "marks": lambda: b"(" * 1_000_000,
    "endless": lambda: b"N0" * 1_000_000,
    "a list in itself": lambda: b"]q\x00h\x00a.",
    "frames that lie": lambda: b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "nothing": lambda: b"",
    "only a stop": lambda: b".",
    "no stop": lambda: b"\x80\x02}",
    "no mark": lambda: b"Nt.",
    "recalls nothing": lambda: b"h\x07.",
    "recalls nothing far away": lambda: b"j\xff\xff\xff\xff.",
    "sets on a number": lambda: b"K\x01K\x01K\x01s.",
    "appends to a dictionary": lambda: b"}Na.",
    "text that is no text": lambda: b"X\x02\x00\x00\x00\xff\xff.",
    "unknown operation": lambda: b"\xfe.",
    "a number for a tensor": lambda: state(b"K\x01"),
    "tensors in a list": lambda: b"\x80\x02]" + tensor() + b"a.",
    "negative shape": lambda: state(tensor(shape=count(-2) + count(3) + b"\x86")),
    "huge shape": lambda: state(tensor(shape=b"\x8a\x08" + b"\xff" * 7 + b"\x7fK\x03\x86")),
    "shape beyond the storage": lambda: state(tensor(shape=count(3) + count(3) + b"\x86")),
    "offset beyond the storage": lambda: state(tensor(offset=count(1))),
    "negative offset": lambda: state(tensor(offset=count(-1))),
    "strides of another length": lambda: state(tensor(strides=count(3) + b"\x85")),
    "zero strides": lambda: state(tensor(strides=count(0) + count(0) + b"\x86")),
    "shape of true": lambda: state(tensor(shape=b"\x88\x88\x86")),
    "storage of another size": lambda: state(tensor(storage(items=count(7)))),
    "storage of a huge size": lambda: state(tensor(storage(items=b"\x8a\x10" + b"\x7f" * 16))),
    "storage that is not there": lambda: state(tensor(storage(key="1"))),
    "storage outside": lambda: state(tensor(storage(key="../data.pkl"))),
    "storage in five words": lambda: b"\x80\x02(" + text("storage") * 5 + b"tQ.",
    "no storage": lambda: state(tensor(b"N")),
    "a parameter of nothing": lambda: state(b"ctorch._utils\n_rebuild_parameter\n)R"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_bounded_in_time_and_memory(name: str, tmp_path: Path) -> None:
    bomb = BOMBS[name]()
    before = peak_rss_bytes()
    code = refused(archive(tmp_path / "bomb.bin", bomb))
    assert code in ("unsafe_pickle", "bad_torch_file", "unsupported_layout")
    assert peak_rss_bytes() - before < 250e6


# Zip files that lie.


def flipped(data: bytes, at: int, bits: int = 1) -> bytes:
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


def patched(data: bytes, signature: bytes, at: int, new: bytes, which: int = 0) -> bytes:
    """`data` with `new` at `at` of the record of number `which` that starts with `signature`."""
    place = -1
    for _ in range(which + 1):
        place = data.index(signature, place + 1)
    return data[: place + at] + new + data[place + at + len(new) :]


CENTRAL, LOCAL, END = b"PK\1\2", b"PK\3\4", b"PK\5\6"
large = struct.pack("<HHQQQ", 1, 24, 24, 24, 1 << 40)
LIES: dict[str, Callable[[bytes], bytes]] = {
    "flipped bit in a tensor": lambda d: flipped(d, d.index(numbers(6).astype("<f4").tobytes()) + 9),
    "flipped bit in the pickle": lambda d: d.replace(b"weight", b"veight", 1),
    "wrong crc": lambda d: patched(d, CENTRAL, 16, b"\0\0\0\0", 2),
    "size beyond the file": lambda d: patched(d, CENTRAL, 20, struct.pack("<II", 1 << 30, 1 << 30), 2),
    "two sizes": lambda d: patched(d, CENTRAL, 24, struct.pack("<I", 4), 2),
    "offset beyond the file": lambda d: patched(d, CENTRAL, 42, struct.pack("<I", 1 << 30), 2),
    "offset of another entry": lambda d: patched(d, CENTRAL, 42, struct.pack("<I", 0), 2),
    "zip64 numbers missing": lambda d: patched(d, CENTRAL, 20, b"\xff" * 8, 2),
    "zip64 offset missing": lambda d: patched(d, CENTRAL, 42, b"\xff" * 4, 2),
    "compressed by name": lambda d: patched(d, CENTRAL, 10, struct.pack("<H", 8), 2),
    "compressed in the local header": lambda d: patched(d, LOCAL, 8, struct.pack("<H", 8), 2),
    "encrypted": lambda d: patched(d, CENTRAL, 8, struct.pack("<H", 1), 2),
    "other name in the local header": lambda d: patched(d, LOCAL, 30, b"b", 2),
    "long extra in the local header": lambda d: patched(d, LOCAL, 28, struct.pack("<H", 60000), 2),
    "more entries than there are": lambda d: patched(d, END, 8, struct.pack("<HH", 9, 9)),
    "fewer entries than there are": lambda d: patched(d, END, 8, struct.pack("<HH", 1, 1)),
    "65,535 entries": lambda d: patched(d, END, 8, b"\xff" * 4),
    "directory elsewhere": lambda d: patched(d, END, 16, struct.pack("<I", 0)),
    "directory larger than the file": lambda d: patched(d, END, 12, struct.pack("<I", 1 << 31)),
    "several disks": lambda d: patched(d, END, 4, struct.pack("<H", 1)),
    "a comment": lambda d: patched(d, END, 20, struct.pack("<H", 4)) + b"PK\5\6",
    "zip64 locator that points nowhere": lambda d: d[:-22] + b"PK\6\7" + b"\xff" * 16 + d[-22:],
    "zip64 end that contradicts": lambda d: (
        d[:-22] + struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 0, 0, 0, 0, 1 << 60, 1 << 60, 1 << 60, 0)
        + struct.pack("<4sIQI", b"PK\6\7", 0, len(d) - 22, 1) + d[-22:]
    ),
    "bytes in front": lambda d: b"PK\3\4" + d,
    "bytes behind": lambda d: d + b"\0",
    "cut short": lambda d: d[: len(d) // 2],
    "only a signature": lambda d: d[:4],
    "nothing": lambda d: b"",
    "a text": lambda d: b"version https://git-lfs.github.com/spec/v1\n",
    "a tar": lambda d: b"pickle" + b"\0" * 251 + b"ustar  \0" + b"\0" * 1000,
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lying_zip_is_refused(name: str, tmp_path: Path) -> None:
    file = archive(tmp_path / "lie.bin")
    file.write_bytes(LIES[name](file.read_bytes()))
    expected = "bad_crc" if "flipped" in name or "crc" in name else "bad_torch_file"
    assert refused(file) == expected


ENTRIES: dict[str, dict[str, bytes]] = {
    "a path outside": {"a/data/../../../etc/x": b"x"},
    "an absolute path": {"/a/data/1": b"x"},
    "a backslash": {"a/data\\1": b"x"},
    "two pickles": {"b/data.pkl": GOOD},
    "a big-endian machine": {"a/byteorder": b"big"},
    "a storage of another size": {"a/data/0": b"x" * 20},
    "an entry without a name": {"": b"x"},
    "control characters": {"a/\x1b[31m": b"x"},
    "a huge pickle": {"a/data.pkl": GOOD + b"N" * (9 << 20)},
    "a script": {"a/constants.pkl": b"N.", "a/data.pkl": b"\x80\x02c__torch__\nA\n)\x81}b."},
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_zip_with_other_entries_is_refused(name: str, tmp_path: Path) -> None:
    assert refused(archive(tmp_path / "x.bin", entries=ENTRIES[name])) in ("bad_torch_file", "unsafe_pickle")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_and_compressed_entries_are_refused(tmp_path: Path) -> None:
    file = archive(tmp_path / "twice.bin")
    with zipfile.ZipFile(file, "a") as target:
        target.writestr("a/data.pkl", b"cos\nmkdir\n" + made(str(tmp_path / "canary")) + b"R.")
    assert refused(file) == "bad_torch_file"
    file = tmp_path / "deflated.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("a/data.pkl", GOOD + b"\0" * 5_000_000)
    assert refused(file) == "bad_torch_file"
    assert not (tmp_path / "canary").exists()


def test_the_crc_is_checked_before_any_part_is_used(tmp_path: Path) -> None:
    file = archive(tmp_path / "x.bin")
    data = file.read_bytes()
    file.write_bytes(flipped(data, data.index(numbers(6).astype("<f4").tobytes()) + 23))
    stored = open_torch([file])["weight"]
    for _ in range(2):
        with pytest.raises(ConvertError) as error:
            stored.read(0, 1)
        assert error.value.code == "bad_crc"


def test_a_zip_with_64_bit_numbers_is_read(tmp_path: Path) -> None:
    """As torch writes every archive's end, and the entries of those beyond 4 GiB."""
    data = archive(tmp_path / "x.bin").read_bytes()
    place = data.rindex(CENTRAL)
    fields = list(struct.unpack("<4s6H3I5H2I", data[place : place + 46]))
    size, offset = fields[9], fields[16]
    fields[8] = fields[9] = fields[16] = 0xFFFFFFFF
    fields[11] = 28
    name = data[place + 46 : place + 46 + fields[10]]
    record = struct.pack("<4s6H3I5H2I", *fields) + name + struct.pack("<HHQQQ", 1, 24, size, size, offset)
    start = data.index(CENTRAL)
    body = data[:place] + record
    end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(body) - start, start)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, len(body), 1)
    (tmp_path / "x.bin").write_bytes(body + end + struct.pack("<4s4HIIH", END, 0, 0, 3, 3, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    np.testing.assert_array_equal(np.array(open_torch([tmp_path / "x.bin"])["weight"].read(0, 2)), numbers(2, 3))


def test_mutated_files_are_refused_or_read_as_they_were(tmp_path: Path) -> None:
    original = (HERE / "odd.pt").read_bytes()
    expected = read_all([HERE / "odd.pt"])
    chance = random.Random(1)
    file = tmp_path / "x.pt"
    for _ in range(500):
        data = bytearray(original)
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        file.write_bytes(data[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
        try:
            found = read_all([file])
        except MixtralError:
            continue
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MixtralError) as error:
        open_torch([tmp_path / "none.bin"])
    assert error.value.code == "missing_file"
    with pytest.raises(MixtralError) as error:
        open_torch([tmp_path])
    assert error.value.code == "unreadable"


def test_the_fused_form_holds_the_same(tmp_path: Path) -> None:
    write_fused(tmp_path)
    config = Config.from_dict(CONFIG)
    hf = matrices(open_safetensors(sorted((HERE / "hf").glob("model*.safetensors"))), config)
    for one, two in zip(hf, matrices(open_safetensors([tmp_path / "model.safetensors"]), config), strict=True):
        assert mx.array_equal(one.read(), two.read())
