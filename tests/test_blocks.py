"""Beginnings of prompts kept on disk: over restarts, shared, capped, and whatever is in the folder."""

from __future__ import annotations

import gc
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest

from mixtral_mlx.engine import blocks as blocks_module
from mixtral_mlx.engine.blocks import BLOCK_TOKENS, SUFFIX, Blocks, fingerprint
from mixtral_mlx.engine.frozen import Form, Frozen
from mixtral_mlx.engine.prefixes import Kind, Prefixes
from mixtral_mlx.engine.request import EngineError
from mixtral_mlx.model import Model

from .checkpoints import TINY, random_model
from .test_prefixes import FLOATS, KINDS, PLAIN, continued, filled, fresh, prompt, read

B = BLOCK_TOKENS
BLOCK_BYTES = B * 2 * 2 * 8 * 4
FILE_BYTES = BLOCK_BYTES + 512
"""A block of `filled`, and with its header at most."""


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(replace(TINY, vocab_size=512, hidden_size=32, intermediate_size=32, head_dim=32))


def frozen(length: int, value: float = 1.0) -> Frozen:
    caches = Frozen.of(filled(length, value=value), length)
    assert caches
    return caches.evaluated()


def write(folder: Path, *chats: list[int], most_bytes: int = PLAIN, model: str = "m") -> Blocks:
    """Blocks of caches without a model, written one after the other; all is on disk on return."""
    blocks = Blocks(folder, most_bytes, model)
    for chat in chats:
        blocks.write(FLOATS, chat, frozen(len(chat)))
        blocks.close()
    return blocks


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: -path.stat().st_mtime_ns)


def found_in(prefixes: Prefixes, kind: Kind, tokens: list[int], multiple_of: int = 1) -> tuple[int, list[Any]] | None:
    """What is found in memory, or is worth it to be read from disk and waited for."""
    reading = prefixes.begin_reading(kind, tokens, multiple_of=multiple_of)
    return prefixes.find(kind, tokens, multiple_of=multiple_of, read=reading)


def length_in(blocks: Blocks, chat: list[int], kind: Kind = FLOATS) -> int:
    found = blocks.read(kind, chat)
    return found.length if found else 0


@pytest.mark.parametrize("name", ["float", "8 bits", "4 bits", "rotating"])
def test_after_a_restart_the_model_goes_on_where_it_was(model: Model, tmp_path: Path, name: str) -> None:
    kind = KINDS[name] if name != "rotating" else Kind(max_kv=1024)
    first = prompt(2 * B + 40)
    prefixes, caches = Prefixes(PLAIN, Blocks(tmp_path, PLAIN, "m")), fresh(kind)
    read(model, first, caches)
    prefixes.keep(kind, first, caches)
    assert prefixes.disk
    prefixes.disk.close()

    restarted, second = Prefixes(PLAIN, Blocks(tmp_path, PLAIN, "m")), first + prompt(20, seed=1)
    for disk_hits in (1, 1):
        found = found_in(restarted, kind, second)
        assert found
        length, caches = found
        assert length == 2 * B
        assert restarted.statistics.disk_hits == disk_hits
        plain = fresh(kind)
        logits, expected = read(model, second, caches, length), read(model, second, plain)
        if not kind.kv_bits:
            assert np.array_equal(logits, expected)
        assert continued(model, logits, caches) == continued(model, expected, plain)


def test_bytes_come_back_as_they_were(tmp_path: Path) -> None:
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        caches = fresh(FLOATS, 3)
        for n, cache in enumerate(caches):
            mx.random.seed(n)
            arrays = (mx.random.normal((1, 2, 3 * B + 5, 8)).astype(dtype) for _ in range(2))
            cache.update_and_fetch(*arrays)
        kept = Frozen.of(caches, 3 * B + 5)
        assert kept
        kept, blocks = kept.evaluated(), Blocks(tmp_path, PLAIN, str(dtype))
        blocks.write(FLOATS, prompt(3 * B + 5), kept)
        blocks.close()
        found = Blocks(tmp_path, PLAIN, str(dtype)).read(FLOATS, prompt(3 * B + 5))
        assert found
        assert (found.form, found.length) == (kept.form, 3 * B)
        for ours, theirs in zip(found.layers, kept.layers, strict=True):
            assert all(mx.array_equal(one, other[..., : 3 * B, :]) for one, other in zip(ours, theirs, strict=True))


def test_conversations_share_blocks_and_a_longer_one_writes_only_its_new_ones(tmp_path: Path) -> None:
    system = prompt(2 * B)
    chats = [system + prompt(B, seed) for seed in (1, 2)]
    blocks = write(tmp_path, chats[0], chats[1], chats[1] + prompt(B, 3), chats[1])
    assert blocks.statistics.written == len(files(tmp_path)) == 5
    assert length_in(blocks, chats[1] + prompt(B, 3)) == 4 * B


def test_what_is_in_memory_is_not_read_from_disk(tmp_path: Path) -> None:
    disk, chat = Blocks(tmp_path, PLAIN, "m"), prompt(3 * B + 9)
    prefixes = Prefixes(PLAIN, disk)
    prefixes.keep(FLOATS, chat, filled(len(chat)))
    disk.close()
    assert found_in(prefixes, FLOATS, chat)
    assert disk.statistics.read == 0
    prefixes.clear()
    found = found_in(prefixes, FLOATS, chat, multiple_of=50)
    assert found
    assert found[0] == 3 * B // 50 * 50
    assert found_in(prefixes, FLOATS, chat[: 3 * B])
    assert disk.statistics.read == 3


def test_what_is_too_large_to_be_kept_is_still_used(tmp_path: Path) -> None:
    chat = prompt(3 * B + 9)
    write(tmp_path, chat)
    small = Prefixes(BLOCK_BYTES, Blocks(tmp_path, PLAIN, "m"))
    found = found_in(small, FLOATS, chat)
    assert found
    assert found[0] == 3 * B
    assert small.nbytes == 0


def test_what_is_kept_gives_way_before_memory_is_taken_for_what_comes_from_disk(tmp_path: Path) -> None:
    chat = prompt(3 * B)
    write(tmp_path, chat)
    prefixes, zeros = Prefixes(4 * BLOCK_BYTES, Blocks(tmp_path, PLAIN, "m")), Frozen.zeros
    prefixes.keep(FLOATS, prompt(4 * B, seed=1), filled(4 * B))

    def allocate(form: Form, length: int) -> Frozen:
        assert prefixes.nbytes == 0
        return zeros(form, length)

    with patch.object(Frozen, "zeros", allocate):
        reading = prefixes.begin_reading(FLOATS, [*chat, 1], most_kept=BLOCK_BYTES)
    assert reading
    found = prefixes.find(FLOATS, [*chat, 1], read=reading)
    assert found
    assert prefixes.nbytes == 3 * BLOCK_BYTES


class HeldDisk:
    """A disk whose blocks come only when they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.go, self.count = threading.Event(), threading.Event(), 0
        read_block = blocks_module._read_block

        def held(*which: Any) -> memoryview:
            self.count += 1
            self.asked.set()
            assert self.go.wait(60)
            return read_block(*which)

        monkeypatch.setattr(blocks_module, "_read_block", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldDisk]:
    disk = HeldDisk(monkeypatch)
    yield disk
    disk.go.set()


def test_what_is_read_is_there_when_it_says_so(tmp_path: Path, held: HeldDisk) -> None:
    chat, done = prompt(9 * B), threading.Event()
    blocks = write(tmp_path, chat)

    def on_done() -> None:
        if reading and reading.is_done:
            done.set()

    reading = blocks.begin_read(FLOATS, chat, on_done)
    assert reading
    assert held.asked.wait(60)
    assert not reading.is_done
    held.go.set()
    assert done.wait(60)
    found = reading.result()
    assert found
    assert found.length == 9 * B


def test_what_is_cancelled_leaves_memory_though_the_disk_does_not_answer(tmp_path: Path, held: HeldDisk) -> None:
    chat = prompt(9 * B)
    blocks = write(tmp_path, chat)
    gc.collect()  # What others have left must not go just now.
    before = mx.get_active_memory()
    reading = blocks.begin_read(FLOATS, chat)
    assert reading
    assert held.asked.wait(60)
    assert mx.get_active_memory() >= before + 9 * BLOCK_BYTES
    reading.cancel()
    assert reading.is_done
    assert mx.get_active_memory() == before
    held.go.set()
    assert reading.result() is None
    assert length_in(blocks, chat) == 9 * B


def test_closing_waits_for_nothing_that_is_read(tmp_path: Path, held: HeldDisk) -> None:
    chat = prompt(9 * B)
    blocks = write(tmp_path, chat)
    reading = blocks.begin_read(FLOATS, chat)
    assert reading
    assert held.asked.wait(60)
    blocks.close()
    held.go.set()
    found = reading.result()  # The blocks that were under way; the pool takes no others.
    assert found is None or found.length < 9 * B
    assert length_in(blocks, chat) == 9 * B


def test_another_model_or_kind_finds_nothing_and_removes_nothing(tmp_path: Path) -> None:
    chat = prompt(B)
    write(tmp_path, chat)
    assert length_in(Blocks(tmp_path, PLAIN, "other"), chat) == 0
    assert length_in(Blocks(tmp_path, PLAIN, "m"), chat, Kind(adapter="a")) == 0
    assert length_in(Blocks(tmp_path, PLAIN, "m"), chat) == B


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def forged(content: bytes, **changes: Any) -> bytes:
    """The file with other entries in its header, and a sum that agrees."""
    magic, _, length = struct.unpack_from("<8sII", content)
    entries = json.loads(content[16 : 16 + length])
    header = json.dumps(entries | {"form": entries["form"] | changes}).encode()
    rest = header + content[16 + length :]
    return struct.pack("<8sII", magic, zlib.crc32(rest, len(header)), len(header)) + rest


DAMAGES: dict[str, Any] = {
    **{f"bit at {at}": (lambda content, at=at: flip(content, at)) for at in (0, 8, 12, 15, 16, 30, 200, 1000, -1)},
    **{f"cut to {size}": (lambda content, size=size: content[:size]) for size in (0, 1, 15, 16, 100, 5000, -1)},
    "longer": lambda content: content + b"x",
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"Dear diary" * 100,
    "safetensors": lambda content: struct.pack("<Q", 2) + b"{}",
    "no object": lambda content: struct.pack("<8sII", content[:8], 0, 2) + b"[]",
    "deep": lambda content: struct.pack("<8sII", content[:8], 0, 4000) + b"[" * 4000,
    "unknown class": lambda content: forged(content, name="object"),
    "more layers": lambda content: forged(content, layers=1 << 30),
    "negative": lambda content: forged(content, layers=-1),
    "not a number": lambda content: forged(content, settings=[True]),
    "no arrays": lambda content: forged(content, arrays=[]),
    "odd dtype": lambda content: forged(content, arrays=[["float64", 2, 8]] * 2),
    "another form": lambda content: forged(content, arrays=[["float32", 1, 16], ["float32", 1, 16]]),
    "extra": lambda content: forged(content, extra=1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", [0, 2])
def test_a_damaged_block_is_removed_and_what_comes_before_it_still_used(
    tmp_path: Path, damage: str, place: int
) -> None:
    chat = prompt(3 * B)
    write(tmp_path, chat)
    file = files(tmp_path)[place]
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    warnings: list[str] = []
    blocks = Blocks(tmp_path, PLAIN, "m", on_warning=warnings.append)
    if (damage, place) == ("another form", 0):
        assert length_in(blocks, chat) in (0, B)  # It is whole in itself; those after it do not go with it.
        return
    assert length_in(blocks, chat) == place * B
    assert not file.exists()
    assert blocks.statistics.damaged == 1
    assert blocks.nbytes == sum(path.stat().st_size for path in files(tmp_path))
    assert warnings == []
    blocks.write(FLOATS, chat, frozen(3 * B))
    blocks.close()
    assert length_in(blocks, chat) == 3 * B


def test_a_block_under_another_ones_name_is_removed(tmp_path: Path) -> None:
    chat = prompt(B)
    write(tmp_path / "m", chat)
    write(tmp_path / "other", chat, model="other")
    (ours,), (theirs,) = files(tmp_path / "m"), files(tmp_path / "other")
    ours.write_bytes(theirs.read_bytes())
    assert length_in(Blocks(tmp_path / "m", PLAIN, "m"), chat) == 0
    assert not ours.exists()


def test_links_folders_and_pipes_in_a_blocks_place_neither_hang_nor_are_followed(tmp_path: Path) -> None:
    chat = prompt(B)
    write(tmp_path / "cache", chat)
    (file,) = files(tmp_path / "cache")
    aside = file.rename(tmp_path / "aside")
    for make in (lambda path: path.symlink_to(aside), os.mkfifo, Path.mkdir):
        make(file)
        blocks = write(tmp_path / "cache", chat)
        assert length_in(blocks, chat) == 0
        assert blocks.nbytes == blocks.statistics.written == 0
        file.rename(tmp_path / str(len(list(tmp_path.iterdir()))))
    assert aside.exists()


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    names = ["notes.txt", f"notes{SUFFIX}", f"{'g' * 40}{SUFFIX}", f"{'a' * 40}{SUFFIX}.partial", "a.partial"]
    for name in names:
        (tmp_path / name).write_bytes(b"x" * 5000)
    blocks = write(tmp_path, *(prompt(B, seed) for seed in range(5)), most_bytes=2 * FILE_BYTES)
    assert blocks.statistics.evicted > 0
    assert all((tmp_path / name).read_bytes() == b"x" * 5000 for name in names)


def test_the_folder_never_takes_more_than_the_cap(tmp_path: Path) -> None:
    numbers, most_bytes = random.Random(0), 12 * FILE_BYTES
    blocks = Blocks(tmp_path, most_bytes, "m")
    system, kept = prompt(B), frozen(6 * B)
    for n in range(30):
        chat = system + prompt(5 * B, seed=n % 7)
        blocks.write(FLOATS, chat[: numbers.randrange(1, 7) * B], kept)
        blocks.close()
        total = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert total == blocks.nbytes <= most_bytes
        assert not set(tmp_path.iterdir()) - set(files(tmp_path))
        length_in(blocks, system + prompt(5 * B, seed=numbers.randrange(7)))
    # All that is here can be found: nothing has lost the blocks before it.
    chats = [system + prompt(5 * B, seed) for seed in range(7)]
    found = {blocks._path(key) for chat in chats for key in blocks._keys(FLOATS, chat[: length_in(blocks, chat)])}
    assert found == set(files(tmp_path))
    smaller = Blocks(tmp_path, 3 * FILE_BYTES, "m")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == smaller.nbytes <= 3 * FILE_BYTES


def test_the_least_recently_used_go_first_and_ends_before_beginnings(tmp_path: Path) -> None:
    chats = [prompt(3 * B, seed) for seed in range(4)]
    blocks = write(tmp_path, chats[0], chats[1], chats[2], most_bytes=9 * FILE_BYTES)
    assert length_in(blocks, chats[0]) == 3 * B
    blocks.write(FLOATS, chats[3], frozen(3 * B))
    blocks.close()
    lengths = [length_in(blocks, chat) // B for chat in chats]
    assert lengths[0] == lengths[3] == 3
    assert lengths[1] < lengths[2] or lengths[1] == 0
    assert len(files(tmp_path)) == sum(lengths)


def test_a_prompt_larger_than_the_cap_leaves_its_beginning(tmp_path: Path) -> None:
    blocks = write(tmp_path, prompt(8 * B), most_bytes=4 * FILE_BYTES)
    assert length_in(blocks, prompt(8 * B)) == 4 * B
    assert write(tmp_path / "none", prompt(B), most_bytes=100).nbytes == 0


def test_two_on_one_folder_use_what_the_other_wrote_and_survive_what_it_removed(tmp_path: Path) -> None:
    most_bytes = 6 * FILE_BYTES
    one, other = (Blocks(tmp_path, most_bytes, "m") for _ in range(2))
    for seed in range(12):
        writer, reader = (one, other) if seed % 2 else (other, one)
        chat = prompt(2 * B, seed)
        writer.write(FLOATS, chat, frozen(2 * B))
        writer.close()
        assert length_in(reader, chat) == 2 * B
        total = sum(path.stat().st_size for path in files(tmp_path))
        assert total <= 2 * most_bytes
    for path in files(tmp_path):
        path.unlink()
    assert length_in(one, chat) == length_in(other, chat) == 0
    one.write(FLOATS, chat, frozen(2 * B))
    one.close()
    assert length_in(other, chat) == 2 * B
    assert one.statistics.failed == other.statistics.failed == 0


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_killed_while_writing_it_leaves_no_half_block(tmp_path: Path, moment: str) -> None:
    script = f"""
import os, sys
from pathlib import Path
from tests.test_blocks import FLOATS, PLAIN, B, Blocks, frozen, prompt
def kill(*args, **options): os._exit(9)
blocks = Blocks(Path(sys.argv[1]), PLAIN, "m")
{"Path.rename" if moment == "rename" else f"os.{moment}"} = kill
blocks.write(FLOATS, prompt(B), frozen(B))
blocks.close(60)
"""
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == 9
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    blocks = Blocks(tmp_path, PLAIN, "m")
    assert list(tmp_path.iterdir()) == []
    assert blocks.nbytes == 0
    assert length_in(write(tmp_path, prompt(B)), prompt(B)) == B


def test_what_another_process_is_writing_is_left_to_it(tmp_path: Path) -> None:
    import fcntl

    partial = tmp_path / f"{'a' * 40}{SUFFIX}.{'b' * 8}.partial"
    with open(partial, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Blocks(tmp_path, PLAIN, "m")
        assert partial.exists()
    Blocks(tmp_path, PLAIN, "m")
    assert not partial.exists()


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    warnings: list[str] = []
    blocks = Blocks(tmp_path, PLAIN, "m", on_warning=warnings.append)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for seed in range(3):
            blocks.write(FLOATS, prompt(B, seed), frozen(B))
            blocks.close()
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert blocks.statistics.failed == 3
    assert blocks.nbytes == len(list(tmp_path.iterdir())) == 0
    blocks.write(FLOATS, prompt(B), frozen(B))
    blocks.close()
    assert length_in(blocks, prompt(B)) == B


@pytest.mark.parametrize("name", ["file", "file/cache"])
def test_a_folder_that_cannot_be_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(EngineError, match=rf"The cache_dir {tmp_path / name} cannot be used: \w") as refused:
        Blocks(tmp_path / name, PLAIN, "m")
    assert refused.value.code == "bad_cache_dir"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # Root may write anywhere.
    with pytest.raises(EngineError, match="Permission denied"):
        Blocks(tmp_path, PLAIN, "m")


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that does not answer until the end of the test."""
    answer = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda fd: answer.wait())
    yield
    answer.set()


@pytest.mark.usefixtures("stuck")
def test_a_slow_disk_stalls_neither_requests_nor_the_end(tmp_path: Path) -> None:
    prefixes = Prefixes(PLAIN, Blocks(tmp_path, PLAIN, "m"))
    assert prefixes.disk
    start = time.perf_counter()
    for seed in range(100):
        prefixes.keep(FLOATS, prompt(B, seed), filled(B))
    prefixes.clear()
    prefixes.disk.close(timeout_s=0.05)
    assert time.perf_counter() - start < 5
    assert prefixes.disk.statistics.skipped >= 60


def test_what_waits_when_time_is_up_is_left_out_and_later_prompts_are_written(tmp_path: Path) -> None:
    blocks = Blocks(tmp_path, PLAIN, "m")
    blocks.write(FLOATS, prompt(9 * B), frozen(9 * B))
    blocks.close(timeout_s=0)
    blocks.write(FLOATS, prompt(B, seed=1), frozen(B))
    blocks.close(timeout_s=60)
    assert length_in(blocks, prompt(B, seed=1)) == B


@pytest.mark.usefixtures("stuck")
def test_what_is_dropped_leaves_memory_though_it_waits_to_be_written(tmp_path: Path) -> None:
    before = mx.get_active_memory()
    prefixes = Prefixes(PLAIN, Blocks(tmp_path, PLAIN, "m"))
    for seed in range(4):
        prefixes.keep(FLOATS, prompt(2 * B, seed), filled(2 * B, width=128))
    prefixes.clear()
    assert mx.get_active_memory() == before


def test_a_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    def folder(name: str, config: bytes, weights: bytes) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(config)
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        return tmp_path / name

    same = [folder(name, b"{}", b"12") for name in ("one", "copy")]
    others = [folder("config", b"{ }", b"12"), folder("weights", b"{}", b"13"), folder("longer", b"{}", b"123")]
    assert fingerprint(same[0], "float16") == fingerprint(same[1], "float16")
    assert len({fingerprint(path, "float16") for path in (same[0], *others)} | {fingerprint(same[0], "float32")}) == 5
