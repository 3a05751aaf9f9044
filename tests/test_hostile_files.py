"""2,000 broken and malicious files, each opened in a process that is watched: refused with a code, or fit for use.

Nothing in a checkpoint may crash the program, hang it, or raise anything but `MixtralError`; what loads is then run."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten

from mixtral_mlx.config import Config, Packing, Quantization
from mixtral_mlx.weights import WeightsError, read_header

from .checkpoints import TOKENIZERS, parsed_elsewhere, random_model, unstacked, write_weights

LIMIT_S = 2.0
MICRO = Config(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    num_local_experts=3,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    dtype="float32",
)
PACKED = replace(MICRO, quantization=Quantization(Packing(4, 32)))
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

Write = Callable[[Path], None]
"""Puts something in the place of a file."""
Changes = dict[str, bytes | Write | None]
"""File name → what stands there instead; None for nothing."""


@dataclass(frozen=True)
class Case:
    """A base folder with some of its files replaced."""

    label: str
    base: Path
    changes: Changes
    kind: str = "model"

    def write(self, folder: Path) -> None:
        folder.mkdir()
        for file in self.base.iterdir():
            if file.name not in self.changes:
                os.link(file, folder / file.name)
        for name, change in self.changes.items():
            if isinstance(change, bytes):
                (folder / name).write_bytes(change)
            elif change is not None:
                change(folder / name)


# ------------------------------------------------------------------------------------------------------------------
# Watching


class Watched:
    """A worker process that is given cases one by one, and replaced when it dies or takes too long."""

    def __init__(self) -> None:
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile_worker"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        return process

    def ask(self, case: Case, folder: Path) -> dict[str, Any]:
        """What came of a case: the worker's answer, or that it crashed or hung."""
        assert self.process.stdin
        assert self.process.stdout
        start = time.monotonic()
        self.process.stdin.write(json.dumps({"kind": case.kind, "folder": str(folder)}).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], LIMIT_S)[0]:
            self.restart()
            return {"outcome": "hung", "detail": f"no answer in {LIMIT_S} s", "peak": 0}
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.restart()
            name = signal.Signals(-code).name if code < 0 else f"exit {code}"
            return {"outcome": "crashed", "detail": name, "peak": 0}
        return {**json.loads(line), "seconds": time.monotonic() - start}

    def restart(self) -> None:
        self.close()
        self.process = self._started()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def watched() -> Iterator[Watched]:
    worker = Watched()
    yield worker
    worker.close()


def survive(watched: Watched, cases: Iterable[Case], scratch: Path) -> Counter[str]:
    """Open every case; fails with all that were neither refused nor used. Prints and returns what came of them."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    slowest, peak = 0.0, 0
    for number, case in enumerate(cases):
        folder = scratch / str(number)
        case.write(folder)
        said = watched.ask(case, folder)
        if said["outcome"] == "hung":
            said = watched.ask(case, folder)  # On a busy machine anything may be slow once.
        counts[said["outcome"] if said["outcome"] != "refused" else said["detail"]] += 1
        slowest, peak = max(slowest, said.get("seconds", LIMIT_S)), max(peak, said["peak"])
        if said["outcome"] not in ("used", "refused"):
            wrong.append(f"{case.label}: {said['outcome']}: {said['detail']}")
        shutil.rmtree(folder)
    print(f"{counts.total()} cases, slowest {slowest:.2f} s, peak {peak / 1e6:.0f} MB: {dict(counts.most_common())}")
    assert not wrong, "\n".join(wrong[:20])
    return counts


# ------------------------------------------------------------------------------------------------------------------
# The folders that are damaged


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stacked and 4-bit, in one file."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "config.json").write_text(json.dumps(PACKED.to_dict()))
    return write_weights(folder, dict(tree_flatten(random_model(PACKED).parameters())), index=False)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Hugging Face has it: an expert at a time, two files and their index."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "config.json").write_text(json.dumps(MICRO.to_dict()))
    arrays = unstacked(dict(tree_flatten(random_model(MICRO).parameters())))
    names = list(arrays)
    return write_weights(folder, *({name: arrays[name] for name in names[start::2]} for start in (0, 1)))


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copyfile(str(files("mistral_common") / "data" / TOKENIZERS["v1"]), folder / "tokenizer.model")
    return folder


Entries = list[tuple[str, Any]]
"""A safetensors header as pairs, so that a key may stand twice."""


def parsed(file: Path) -> tuple[Entries, bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return list(json.loads(data[8 : 8 + length]).items()), data[8 + length :]


def built(entries: Entries | bytes, data: bytes, length: int | None = None) -> bytes:
    if isinstance(entries, bytes):
        header = entries
    else:
        header = ("{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in entries) + "}").encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


# ------------------------------------------------------------------------------------------------------------------
# Safetensors: what a header can say

WILD: list[Any] = [
    *(-1, 0, 1, 2, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**300, -(1 << 63)),
    *(None, True, False, 1.0, 0.5, -0.0, float("nan"), float("inf"), "", "32", [], [[]], {}, {"a": 1}, [1, [2]]),
]
NAMES = [
    *("", "\0", "\x1b[31m", "\ud800", "../../etc/passwd", "a" * 100_000, "__metadata__", "model.norm.weight", "é" * 50),
    *("model.layers.0.block_sparse_moe.experts.0.w1.weight", "model.layers.0.block_sparse_moe.experts.00.w1.weight"),
    *("model.layers.0.block_sparse_moe.experts.3.w1.weight", "model.layers.99999999999999999999.self_attn"),
    *("model.layers.0.block_sparse_moe.experts.٣.w1.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    *(f"model.layers.0.block_sparse_moe.experts.{'9' * 5000}.w1.weight", "lm_head.bias", "lm_head.scales"),
]
DTYPES: list[Any] = [
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64", "F8_E4M3"),
    *("F8_E5M2", "F4", "f32", "float32", "", "\0", 32, None, True, [], ["F32"], {}),
]
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}
Mutation = Callable[[random.Random, Entries, bytes], bytes]


def pick(rng: random.Random, entries: Entries) -> int:
    return rng.choice([n for n, (name, _) in enumerate(entries) if name != "__metadata__"])


def wild_shape(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    entry = entries[pick(rng, entries)][1]
    shape = entry["shape"]
    choices = [
        [*shape[:-1], rng.choice(WILD)],
        [rng.choice(WILD), *shape[1:]],
        [rng.choice(WILD) for _ in range(rng.randint(0, 5))],
        [-size for size in shape],
        [*shape, 1],
        [1, *shape],
        shape[::-1],
        shape[:-1],
        [1 << 32, 1 << 32, *shape],
        [1 << 63, 2, *shape],
        [0, *shape],
        [1] * 1000,
        rng.choice(WILD),
    ]
    entry["shape"] = rng.choice(choices)
    return built(entries, data)


def wild_offsets(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    entry = entries[pick(rng, entries)][1]
    start, end = entry["data_offsets"]
    step = rng.choice([1, 4, 64, len(data), 1 << 32, 1 << 63, (1 << 64) - 8])
    choices = [
        [start + step, end + step],
        [start - step, end - step],
        [start, end + step],
        [start - step, end],
        [end, start],
        [start, start],
        [rng.choice(WILD), end],
        [start, rng.choice(WILD)],
        [rng.choice(WILD), rng.choice(WILD)],
        [start, end, end],
        [start],
        rng.choice(WILD),
    ]
    entry["data_offsets"] = rng.choice(choices)
    return built(entries, data)


def overlap(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    one, other = entries[pick(rng, entries)][1], entries[pick(rng, entries)][1]
    one["data_offsets"] = other["data_offsets"]
    if rng.random() < 0.5:
        one["shape"], one["dtype"] = other["shape"], other["dtype"]
    return built(entries, data)


def hole(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    at = sorted(entry["data_offsets"][0] for name, entry in entries if name != "__metadata__")
    cut, gap = rng.choice(at), rng.choice([1, 4, 8, 4096])
    for name, entry in entries:
        if name != "__metadata__" and entry["data_offsets"][0] >= cut:
            entry["data_offsets"] = [offset + gap for offset in entry["data_offsets"]]
    return built(entries, data[:cut] + bytes(gap) + data[cut:])


def wild_dtype(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    entries[pick(rng, entries)][1]["dtype"] = rng.choice(DTYPES)
    return built(entries, data)


def recast(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Some tensors hold another dtype, and the file is otherwise in perfect order."""
    chosen = {pick(rng, entries) for _ in range(rng.randint(1, 4))}
    result, position = b"", 0
    for n, (name, entry) in enumerate(entries):
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        part, width = data[start:end], WIDTHS[entry["dtype"]]
        if n in chosen:
            entry["dtype"] = rng.choice(list(WIDTHS))
            part = rng.randbytes(len(part) // width * WIDTHS[entry["dtype"]])
        entry["data_offsets"] = [position, position + len(part)]
        position, result = position + len(part), result + part
    return built(entries, result)


def twice(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    entries.insert(rng.randrange(len(entries)), entries[rng.randrange(len(entries))])
    return built(entries, data)


def rename(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    n = pick(rng, entries)
    name = rng.choice([*NAMES, entries[pick(rng, entries)][0], entries[n][0][:-1], entries[n][0] + "\0"])
    entries[n] = (name, entries[n][1])
    return built(entries, data)


def add_or_drop(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    if rng.random() < 0.5:
        del entries[pick(rng, entries)]
        return built(entries, data)
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
    return built([*entries, (rng.choice(NAMES), entry)], data + bytes(8))


def odd_entry(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    n = pick(rng, entries)
    name, entry = entries[n]
    key = rng.choice(["dtype", "shape", "data_offsets"])
    choices = [
        rng.choice(WILD),
        {**entry, "extra": 1},
        {k: v for k, v in entry.items() if k != key},
        {**entry, key: rng.choice(WILD)},
        [entry],
    ]
    entries[n] = (name, rng.choice(choices))
    return built(entries, data)


def metadata(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    odd = rng.choice([*WILD, {"format": 1}, {"format": None}, {"a": {"b": "c"}}, {"a" * 9999: "x" * 99_999}, {"": ""}])
    kept = [pair for pair in entries if pair[0] != "__metadata__"]
    return built(rng.choice([[("__metadata__", odd), *kept], [*kept, ("__metadata__", odd)], kept]), data)


def header_length(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    whole = built(entries, data)
    (right,) = struct.unpack("<Q", whole[:8])
    wrong = [0, 1, 2, right - 1, right + 1, right - 8, len(whole), len(whole) - 8, len(whole) - 7, len(whole) + 1]
    wrong += [16 << 20, (16 << 20) + 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, (1 << 64) - 8, rng.getrandbits(64)]
    return built(entries, data, rng.choice(wrong))


def header_text(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", built(entries, b"")[:8])
    header = built(entries, b"")[8:]
    depth = rng.choice([10, 900, 1100, 100_000])
    choices = [
        *(b"", b"{", b"{}", b"[]", b"null", b"1", b'"text"', b"\0" * length, b" " * length, rng.randbytes(length)),
        *(header + b" " * rng.randint(1, 64), b" " + header, b"\n" + header, header + b"\0", header + b"x", header * 2),
        *(header.decode().encode("utf-16"), b"\xef\xbb\xbf" + header, header.replace(b"weight", b"w\xffight", 1)),
        *(header.replace(b"weight", b"w\\ud800ght", 1), header.replace(b'"F32"', b"NaN", 1)),
        *(
            header.replace(b"[", b"[" * depth, 1),
            b"[" * depth,
            b'{"a":' * depth,
            b'{"a":' * depth + b"1" + b"}" * depth,
        ),
        *(header.replace(b"32", b"1e400", 1), header.replace(b"32", b"9" * rng.choice([30, 5000, 100_000]), 1)),
        *(header.replace(b"32", b"Infinity", 1), header.replace(b"32", b"-32", 1), header.replace(b"32", b"0x20", 1)),
        *(header.replace(b"32", b"32.0", 1), header.replace(b"32", b"032", 1), header.replace(b"32", b"3_2", 1)),
        *(header.replace(b",", b",,", 1), header.replace(b":", b"=", 1), header[:-1] + b",}", b"//c\n" + header),
    ]
    return built(rng.choice(choices), data)


def cut(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    whole = built(entries, data)
    return whole[: rng.choice([0, 1, 7, 8, 9, len(whole) - 1, rng.randrange(len(whole))])]


def longer(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    return built(entries, data + bytes(rng.choice([1, 7, 8, 4096])))


def flipped(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """A few bits, mostly in the header."""
    whole = bytearray(built(entries, data))
    end = len(whole) - len(data) if rng.random() < 0.8 else len(whole)
    for _ in range(rng.choice([1, 1, 2, 8])):
        whole[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(whole)


def spliced(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    whole = built(entries, data)
    at, size = rng.randrange(len(whole)), rng.choice([1, 2, 8, 100])
    return whole[:at] + rng.choice([b"", rng.randbytes(size), whole[:size]]) + whole[at + rng.choice([0, size]) :]


def wild_data(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """The header is true; the numbers are NaN, infinite or noise."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 3, len(entries)])):
        start, end = entries[pick(rng, entries)][1]["data_offsets"]
        size = end - start
        fill = rng.choice([b"\xff", b"\0", b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0"])
        changed[start:end] = rng.choice([fill * size, rng.randbytes(size)])[:size]
    return built(entries, bytes(changed))


HEADERS: list[Mutation] = [
    *(wild_shape, wild_shape, wild_offsets, wild_offsets, overlap, hole, wild_dtype, recast, recast, twice, rename),
    *(add_or_drop, odd_entry, metadata, header_length, header_text, header_text, cut, longer, flipped, flipped),
    *(spliced, wild_data, wild_data),
]


def header_cases(bases: list[Path], count: int, seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    for n in range(count):
        base, mutation = bases[n % len(bases)], HEADERS[n % len(HEADERS)]
        file = rng.choice(sorted(base.glob("*.safetensors")))
        yield Case(f"{mutation.__name__} {seed}/{n}", base, {file.name: mutation(rng, *parsed(file))})


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 8))])
def test_damaged_safetensors_are_refused_or_fit_for_use(
    watched: Watched, packed: Path, plain: Path, tmp_path: Path, seed: int
) -> None:
    counts = survive(watched, header_cases([packed, plain], 230, seed), tmp_path)
    assert counts["used"] > 10
    assert counts["bad_safetensors"] > 100


def test_the_gate_accepts_no_file_that_the_safetensors_package_refuses(packed: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    (file,) = packed.glob("*.safetensors")
    accepted = 0
    for n in range(600):
        content = HEADERS[n % len(HEADERS)](rng, *parsed(file))
        (tmp_path / "x").write_bytes(content)
        fd = os.open(tmp_path / "x", os.O_RDONLY)
        try:
            ours = read_header(tmp_path / "x", fd)
        except WeightsError:
            continue
        finally:
            os.close(fd)
        theirs = {name: entry["shape"] for name, entry in parsed_elsewhere(content).items()}
        assert theirs == {name: list(span.shape) for name, span in ours.items()}
        accepted += 1
    assert accepted > 50


# ------------------------------------------------------------------------------------------------------------------
# What may lie in the place of a file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def unix_socket(path: Path) -> None:
    # A socket's path may be 100 bytes long only, so it is made by its name alone.
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def link_to(target: str) -> Write:
    return lambda path: path.symlink_to(target)


def sparse(size: int) -> Write:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return write


IN_PLACE: Changes = {
    "missing": None,
    "empty": b"",
    "fifo": fifo,
    "folder": Path.mkdir,
    "loop": loop,
    "socket": unix_socket,
    "dangling": link_to("nowhere"),
    "endless": link_to("/dev/zero"),
    "null": link_to("/dev/null"),
    "kernel": link_to("/proc/self/mem"),
    "passwd": link_to("/etc/passwd"),
    "sparse GB": sparse(1 << 30),
    "sparse TB": sparse(1 << 40),
    "nul bytes": bytes(4096),
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


def test_what_is_no_regular_file_is_refused_without_waiting_for_it(
    watched: Watched, packed: Path, plain: Path, tokenizers: Path, tmp_path: Path
) -> None:
    cases = [
        Case(f"{label} as {name}", base, {name: change}, kind)
        for base, name, kind in [
            *((plain, name, "model") for name in ("config.json", INDEX, SHARD)),
            *((packed, name, "model") for name in ("config.json", "model.safetensors")),
            *((tokenizers, name, "tokenizer") for name in ("tokenizer.model", "tokenizer.json", "tekken.json")),
        ]
        for label, change in IN_PLACE.items()
    ]
    cases += [Case(f"{label} beside", packed, {"model-x.safetensors": change}) for label, change in IN_PLACE.items()]
    cases += [
        Case(f"{label} params", packed, {"config.json": None, "params.json": IN_PLACE[label]}) for label in IN_PLACE
    ]
    survive(watched, cases, tmp_path)


# ------------------------------------------------------------------------------------------------------------------
# The index

PATHS = [
    *(
        "../" + SHARD,
        "/etc/passwd",
        "..",
        ".",
        "",
        "./" + SHARD,
        "a/" + SHARD,
        "..\\" + SHARD,
        "C:\\" + SHARD,
        SHARD + "/",
    ),
    *(
        SHARD + "\0",
        "\0",
        "\n" + SHARD,
        SHARD + "\n",
        "model.safetensors\x1b[2J",
        "a" * 300 + ".safetensors",
        "missing",
    ),
    *("missing.safetensors", INDEX, "config.json", ".safetensors", "..safetensors", "file:///" + SHARD, "~/" + SHARD),
    *(
        "model-00001-of-00002.SAFETENSORS",
        "mödel.safetensors",
        "\ud800.safetensors",
        "-rf.safetensors",
        "%2e%2e/x.safetensors",
    ),
]


def index_cases(plain: Path, count: int) -> Iterator[Case]:
    rng = random.Random(7)
    text = (plain / INDEX).read_bytes()
    for path in PATHS:
        for whole in (False, True):
            index = json.loads(text)
            names = list(index["weight_map"]) if whole else [rng.choice(list(index["weight_map"]))]
            index["weight_map"] |= dict.fromkeys(names, path)
            yield Case(f"index {path!r}", plain, {INDEX: json.dumps(index).encode()})
    for odd in WILD:
        for index in (
            {"weight_map": odd},
            odd,
            {"weight_map": {**json.loads(text)["weight_map"], "lm_head.weight": odd}},
        ):
            yield Case(f"index value {odd!r}", plain, {INDEX: json.dumps(index).encode()})
    for n in range(count):
        index = json.loads(text)
        names = list(index["weight_map"])
        for name in rng.sample(names, rng.choice([1, 2, len(names)])):
            changed = rng.choice([*NAMES, rng.choice(names)])
            index["weight_map"][changed] = index["weight_map"].pop(name, SHARD)
        yield Case(f"index names {n}", plain, {INDEX: json.dumps(index).encode()})
    for n in range(count):
        yield Case(f"index bytes {n}", plain, {INDEX: scrambled(rng, text)})


def scrambled(rng: random.Random, text: bytes) -> bytes:
    """JSON text with damage that has nothing to do with its meaning, or much."""
    at = rng.randrange(len(text))
    digits = [m for m in range(len(text)) if text[m : m + 1].isdigit()]
    digit = rng.choice(digits)
    wild = rng.choice([b"NaN", b"Infinity", b"-Infinity", b"1e400", b"9" * 5000, b"-1", b"1.0", b"true", b"[" * 2000])
    flipped = bytearray(text)
    flipped[at] ^= 1 << rng.randrange(8)
    choices = [
        text[:at],
        bytes(flipped),
        text[:digit] + wild + text[digit + 1 :],
        text[:at] + rng.choice([b"\xff", b"\0", b"{", b"}", b'"', b",", b"\\", b"[" * 5000]) + text[at + 1 :],
        text * 2,
        b"\xef\xbb\xbf" + text,
        text.decode().encode(rng.choice(["utf-16", "utf-32", "utf-16-be"])),
        text[1:],
        text[:-1] + b"," + text[1:],  # Every key twice.
    ]
    return rng.choice(choices)


def test_damaged_indexes_are_refused_or_fit_for_use(watched: Watched, plain: Path, tmp_path: Path) -> None:
    counts = survive(watched, index_cases(plain, 60), tmp_path)
    assert counts["bad_index"] > 50
    assert counts["index_mismatch"] > 20


# ------------------------------------------------------------------------------------------------------------------
# The configuration

FIELDS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("sliding_window", "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
    *("torch_dtype", "dtype", "model_type", "hidden_act", "architectures", "quantization", "quantization_config"),
    *("rope_parameters", "model_file", "auto_map", "text_config"),
]
ODD: list[Any] = [
    *WILD,
    *(3, 4, 5, 16, 31, 33, 64, 127, 1 << 16, 1 << 20, 1 << 30, 1e-300, 1e300, 5e-324, 1e-45, 1.0000001, -1e-5, 1e6),
    *("mixtral", "mistral", "silu", "float16", "bfloat16", "float64", "\0", "\ud800", "x" * 100_000, "../x.py"),
    *([0], [2, 3], [31], [32], [1] * 10_000, {"a": {"b": {}}}, {"type": "linear"}, {"bits": 4, "group_size": 32}),
]
ROPES: list[dict[str, Any]] = [
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 16,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "original_max_position_embeddings": 16},
]
PATHS_IN_MODEL = [
    "lm_head",
    "model.layers.0.block_sparse_moe.gate",
    "model.layers.0.block_sparse_moe.switch_mlp.up_proj",
    "x",
]


def config_cases(packed: Path, plain: Path, seed: int, count: int) -> Iterator[Case]:
    rng = random.Random(seed)
    for n in range(count):
        base = rng.choice([packed, plain])
        text = (base / "config.json").read_bytes()
        config = json.loads(text)
        kind = rng.choice(["field", "field", "field", "drop", "rope", "quantization", "bytes"])
        if kind == "bytes":
            yield Case(f"config bytes {seed}/{n}", base, {"config.json": scrambled(rng, text)})
            continue
        if kind == "field":
            for name in rng.sample(FIELDS, rng.choice([1, 1, 1, 2, 3])):
                config[name] = rng.choice(ODD)
        elif kind == "drop":
            for name in rng.sample(sorted(config), rng.choice([1, 2])):
                del config[name]
        elif kind == "rope":
            rope = {**rng.choice(ROPES)}
            rope[rng.choice([*rope, "mscale_all_dim", "mscale", "attention_factor"])] = rng.choice(ODD)
            config[rng.choice(["rope_scaling", "rope_parameters"])] = rope
            if rng.random() < 0.3:
                config["rope_theta"] = rng.choice([1, 1.0000001, 2, 1e11])
        else:
            entry: dict[str, Any] = {"bits": 4, "group_size": 32, "mode": "affine"}
            entry[rng.choice(sorted(entry))] = rng.choice([*ODD, 2, 3, 8, 16, 128, "mxfp4", "nvfp4", "mxfp8"])
            override = {"bits": rng.choice([2, 3, 8, 1, 7]), "group_size": rng.choice([32, 64, 16, 0])}
            if rng.random() < 0.5:
                entry[rng.choice(PATHS_IN_MODEL)] = rng.choice([override, True, False, None, rng.choice(ODD)])
            config["quantization"] = entry
        yield Case(f"config {kind} {seed}/{n}", base, {"config.json": json.dumps(config).encode()})


@pytest.mark.parametrize("seed", range(2))
def test_damaged_configurations_are_refused_or_fit_for_use(
    watched: Watched, packed: Path, plain: Path, tmp_path: Path, seed: int
) -> None:
    counts = survive(watched, config_cases(packed, plain, seed, 260), tmp_path)
    assert counts["bad_config"] > 50
    assert counts["used"] > 20


# ------------------------------------------------------------------------------------------------------------------
# Sizes


def whole_model(config: Config, fill: Callable[[str], bytes] | None = None) -> tuple[bytes, int]:
    """The header of a file that holds every tensor of `config`, and the bytes of data it claims."""
    entries: Entries = []
    end = 0
    for name, spec in config.tensors().items():
        start, end = end, end + spec.nbytes("float32")
        kind = "F32" if spec.kind == "float" else spec.kind
        entries.append((name, {"dtype": kind, "shape": list(spec.shape), "data_offsets": [start, end]}))
    return built(entries, b""), end


def model_case(label: str, packed: Path, config: Config, *, nan: bool = False, short: int = 0) -> Case:
    """A folder that is right in every particular, of zeros (without blocks on disk) or NaN."""
    header, size = whole_model(config)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(header)
            if nan:
                file.write(b"\xff" * size)
            file.truncate(max(len(header) + size - short, 0))

    text = json.dumps(config.to_dict()).encode()
    return Case(label, packed, {"config.json": text, "model.safetensors": write})


def large_cases(packed: Path, plain: Path) -> Iterator[Case]:
    for size in (1 << 12, 1 << 14, 1 << 16):
        huge = replace(MICRO, vocab_size=1 << 20, hidden_size=size, intermediate_size=size, num_hidden_layers=2)
        yield model_case(f"{size} wide, sparse", packed, huge)
        yield model_case(f"{size} wide, cut short", packed, huge, short=1)
    yield model_case("256 experts of NaN", packed, replace(MICRO, num_local_experts=256), nan=True)
    yield model_case(
        "all experts of NaN", packed, replace(MICRO, num_local_experts=256, num_experts_per_tok=256), nan=True
    )
    yield model_case("packed NaN", packed, PACKED, nan=True)
    yield model_case("one expert", packed, replace(MICRO, num_local_experts=1, num_experts_per_tok=1))
    yield model_case("least heads", packed, replace(MICRO, head_dim=4, num_attention_heads=1))
    yield model_case(
        "least of all", packed, replace(MICRO, vocab_size=3, hidden_size=1, intermediate_size=1, head_dim=4)
    )
    yield model_case(
        "1024 heads", packed, replace(MICRO, num_attention_heads=1024, num_key_value_heads=1024, head_dim=4)
    )
    yield model_case("40 layers", packed, replace(MICRO, num_hidden_layers=40))
    # The most that is read of any JSON: what takes longest to parse, and what is deepest.
    for part in (b"[", b"[],", b"{},", b'{"a":', b"9", b"1,", b'"",'):
        text = b'{"weight_map":[' + part * ((4 << 20) // len(part) - 9) + b"1]}"
        for name in ("config.json", INDEX):
            yield Case(f"4 MB of {part!r} as {name}", plain, {name: text})
        yield Case(f"header of {part!r}", packed, {"model.safetensors": built(text, b"")})
    for name, shards in (("shards", [f"s{n}.safetensors" for n in range(100_000)]), ("names", [SHARD] * 100_000)):
        index = json.dumps({"weight_map": {f"t{n}": shard for n, shard in enumerate(shards)}}).encode()
        yield Case(f"100,000 {name}", plain, {INDEX: index})
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    parts = [built([(f"{part}.{n}", empty) for n in range(6_000)], b"") for part in range(4)]
    yield Case("6,000 tensors", packed, {"model.safetensors": parts[0]})
    named = {f"model-{n}.safetensors": part for n, part in enumerate(parts)}
    yield Case("24,000 tensors in parts", packed, {"model.safetensors": None, **named})
    yield Case("17,000 tensors", packed, {"model.safetensors": built([(f"{n}", empty) for n in range(17_000)], b"")})
    deep = {"dtype": "U8", "shape": [1] * 1_000_000, "data_offsets": [0, 1]}
    yield Case("1,000,000 dimensions", packed, {"model.safetensors": built([("t", deep)], b"\0")})
    overrides = {"bits": 4, "group_size": 32, **{f"m{n}": False for n in range(200_000)}}
    config = {**PACKED.to_dict(), "quantization": overrides}
    yield Case("200,000 overrides", packed, {"config.json": json.dumps(config).encode()})
    for length in (5 << 20, 17 << 20):
        yield Case("a header too long", packed, {"model.safetensors": built(b"{}".ljust(length), b"")})
        yield Case("a config too long", packed, {"config.json": b"{}".ljust(length)})


def test_files_that_ask_for_too_much_are_refused_in_time(
    watched: Watched, packed: Path, plain: Path, tmp_path: Path
) -> None:
    survive(watched, large_cases(packed, plain), tmp_path)


# ------------------------------------------------------------------------------------------------------------------
# The tokenizer


def tokenizer_cases(tokenizers: Path, count: int) -> Iterator[Case]:
    rng = random.Random(3)
    model = (tokenizers / "tokenizer.model").read_bytes()
    for n in range(count):
        changed = bytearray(model)
        # The pieces come first, the settings (normalizer, special ids) in the last bytes.
        place = rng.choice([len(model), 2000, -500])
        for _ in range(rng.choice([1, 1, 2, 20])):
            at = rng.randrange(place) if place > 0 else len(model) + rng.randrange(place, 0)
            changed[at] = rng.choice([changed[at] ^ (1 << rng.randrange(8)), 0, 0xFF, 0x7F, 0x80])
        damaged = rng.choice([bytes(changed)] * 4 + [model[: rng.randrange(len(model))], model + rng.randbytes(50)])
        yield Case(f"tokenizer {n}", tokenizers, {"tokenizer.model": damaged}, "tokenizer")
    for n in range(count // 4):
        noise = rng.randbytes(rng.choice([1, 10, 1000]))
        yield Case(f"tokenizer noise {n}", tokenizers, {"tokenizer.model": noise}, "tokenizer")
    text = json.dumps(
        {"model": {"vocab": {f"piece{n}": n for n in range(200)}}, "added_tokens": [{"id": 0, "content": "<s>"}]}
    )
    for n in range(count // 2):
        changes: Changes = {"tokenizer.model": None, "tokenizer.json": scrambled(rng, text.encode())}
        yield Case(f"tokenizer.json {n}", tokenizers, changes, "tokenizer")
    for odd in WILD:
        contents: list[Any] = [odd, {"model": odd}, {"model": {"vocab": odd}}]
        for content in [*contents, {"model": {"vocab": {}}, "added_tokens": odd}]:
            changes = {"tokenizer.model": None, "tokenizer.json": json.dumps(content).encode()}
            yield Case(f"tokenizer.json {odd!r}", tokenizers, changes, "tokenizer")


def test_damaged_tokenizers_are_refused_or_fit_for_use(watched: Watched, tokenizers: Path, tmp_path: Path) -> None:
    counts = survive(watched, tokenizer_cases(tokenizers, 80), tmp_path)
    assert counts["bad_tokenizer"] > 50
