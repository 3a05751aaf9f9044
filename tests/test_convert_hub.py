"""Converting straight from the hub: same bytes as from a folder, little disk, and nothing fetched twice."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session  # type: ignore[attr-defined]

from mixtral_mlx.config import Config, MixtralError
from mixtral_mlx.convert import run, streamed
from mixtral_mlx.convert.pipeline import Events
from mixtral_mlx.convert.run import Request, convert
from mixtral_mlx.convert.verify import verify
from mixtral_mlx.hub.patience import Patience

from .checkpoints import TINY, write_tiny, write_weights
from .conversions import SOURCE, Task, contents, quick_tokenizer, run_task, ticked, used_up, write_source
from .hub_server import TOKEN, Fault, HubServer, Repo, hub_server

__all__ = ["quick_tokenizer"]
pytestmark = pytest.mark.usefixtures("quick_tokenizer")
REPO = "org/mix"
SHARDS = [f"model-{n:05}-of-00006.safetensors" for n in range(1, 7)]
LARGE = replace(TINY, dtype="bfloat16", hidden_size=256, intermediate_size=1024, num_hidden_layers=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("hub") / "source", 6)


@pytest.fixture(autouse=True, scope="module")
def own_session() -> Iterator[None]:
    """huggingface_hub keeps its connections for as long as the process lives; these tests begin and end without any."""
    close_session()
    yield
    close_session()


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with the source on it, for a person who is logged in and never waits."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server() as server:
        server.repos[REPO] = Repo(contents(source))
        go_to(server.url, tmp_path / "cache", monkeypatch.setattr)
        yield server


def go_to(url: str, cache: Path, put: Callable[[object, str, object], None] = setattr) -> None:
    """Let huggingface_hub ask `url`, and nobody wait between two tries."""
    put(constants, "ENDPOINT", url)
    put(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    put(constants, "HF_HUB_CACHE", str(cache))
    put(constants, "HF_HUB_OFFLINE", False)
    patience = Patience(sleep=lambda seconds: None)
    for module, name in ((run, "list_files"), (run, "fetch"), (streamed, "prefetch")):
        put(module, name, partial(getattr(module, name), patience=patience))


def disk_of(folder: Path) -> int:
    """Bytes of disk below `folder`, as `du` counts them."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_dir() else path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def large_shards(folder: Path) -> dict[str, bytes]:
    """A checkpoint in six shards of like size, all but the last."""
    write_tiny(folder, LARGE)
    weights = mx.load(str(next(folder.glob("*.safetensors"))))
    assert isinstance(weights, dict)
    for file in folder.glob("model*"):
        file.unlink()
    shards: list[dict[str, mx.array]] = [{} for _ in SHARDS]
    for name, array in weights.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        shards[int(layer) if layer else {"model.embed_tokens": 3, "lm_head": 4}.get(name[:-7], 5)][name] = array
    write_weights(folder, *shards)
    return contents(folder)


def test_disk_never_holds_more_than_the_output_and_one_shard(hub: HubServer, tmp_path: Path) -> None:
    files = large_shards(tmp_path / "large")
    hub.repos[REPO] = Repo(files)
    place, seen, calls = tmp_path / "place", [0], [0]
    place.mkdir()

    def look(*_: object) -> None:
        calls.append(0)
        if len(calls) % 16 == 0:
            seen.append(disk_of(place))

    def converting(line: str) -> None:
        """Let the file ahead have all the time it wants."""
        sent = -1
        while line.startswith("Converting") and sent < (sent := sum(hub.sent.values())):
            threading.Event().wait(0.2)

    hub.on_sent = look
    report = convert(Request(REPO, place / "dest", ("q8",)), Events(converting, look))
    shard = max(map(len, files.values()))
    output = disk_of(place / "dest")
    assert max(seen) <= output + 1.1 * shard
    assert max(seen) <= report.peak_disk_bytes + 0.02 * shard
    assert output + 0.5 * shard < report.peak_disk_bytes <= output + 1.1 * shard
    assert [path.name for path in place.iterdir()] == ["dest"]
    verify(place / "dest")


def test_with_every_trouble_on_the_way_it_is_the_local_conversion(hub: HubServer, source: Path, tmp_path: Path) -> None:
    sizes = {name: len(data) for name, data in hub.repos[REPO].files.items()}
    for n, name in enumerate(SHARDS):
        hub.fault(name, Fault("cut", at=sizes[name] // 3), Fault("reset", at=7_000 * n))
    hub.fault(SHARDS[0], Fault("status", status=429), Fault("short", at=9_000), Fault("wrong range", at=3))
    hub.fault(SHARDS[1], Fault("status", status=503), Fault("no range"))
    hub.fault(SHARDS[2], Fault("flip", at=99_999))
    convert(Request(str(source), tmp_path / "local", ("q4",)))
    convert(Request(REPO, tmp_path / "dest", ("q4",)))
    assert contents(tmp_path / "dest", manifest=False) == contents(tmp_path / "local", manifest=False)
    verify(tmp_path / "dest")
    assert "cccc" in (tmp_path / "dest" / "manifest.json").read_text()
    assert hub.asked("files")
    assert not any("authorization" in request.headers for request in hub.asked("files"))
    assert not (tmp_path / "dest.partial").exists()


def test_the_source_is_kept_if_asked_for(hub: HubServer, source: Path, tmp_path: Path) -> None:
    convert(Request(REPO, tmp_path / "dest", keep_source=True))
    kept = contents(tmp_path / "dest-source")
    assert kept == {name: data for name, data in contents(source).items() if name in kept}
    assert set(SHARDS) < kept.keys()
    with pytest.raises(MixtralError) as refused:
        convert(Request(REPO, tmp_path / "other", keep_source=True, recipes=("q4", "q9")))
    assert refused.value.code == "bad_recipe"
    (tmp_path / "third-source").mkdir()
    with pytest.raises(MixtralError) as refused:
        convert(Request(REPO, tmp_path / "third", keep_source=True))
    assert refused.value.code == "exists"


def test_what_is_in_the_cache_is_used_and_left_alone(
    hub: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    before, sent = contents(snapshot), dict(hub.sent)
    report = convert(Request(REPO, tmp_path / "dest"))
    assert {name: hub.sent[name] for name in SHARDS} == {name: sent[name] for name in SHARDS}
    assert contents(snapshot) == before
    convert(Request(REPO, tmp_path / "offline", offline=True))
    assert contents(tmp_path / "offline", manifest=False) == contents(tmp_path / "dest", manifest=False)
    # What is linked takes no disk of ours.
    assert report.peak_disk_bytes < disk_of(tmp_path / "dest") + (1 << 20)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_hub_folder_that_mlx_quantized_is_fetched_whole(
    hub: HubServer, source: Path, tmp_path: Path, quantized: bool
) -> None:
    convert(Request(str(source), tmp_path / "q8", ("q8",)))
    hub.repos["mlx/q8"] = Repo(contents(tmp_path / "q8"))
    convert(Request("mlx/q8", tmp_path / "dest", ("q4",) if quantized else (), keep_source=True))
    assert Config.read(tmp_path / "dest").packing("lm_head", lambda path: True) is not None
    verify(tmp_path / "dest")
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "dest-source" / name).read_bytes() == (tmp_path / "q8" / name).read_bytes()
    if not quantized:
        assert (tmp_path / "dest" / name).read_bytes() == (tmp_path / "q8" / name).read_bytes()


def test_too_little_room_is_said_before_the_weights_are_fetched(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil._ntuple_diskusage(10, 9, 1_234_567)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MixtralError) as refused:
        convert(Request(REPO, tmp_path / "dest"))
    assert refused.value.code == "disk_full"
    assert "1,234,567 bytes free" in str(refused.value)
    assert not any(hub.sent[name] for name in SHARDS)
    assert not (tmp_path / "dest.partial").exists()


def test_a_repository_without_a_part_or_that_is_not_there_is_refused(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(MixtralError) as refused:
        convert(Request("org/nothing", tmp_path / "dest"))
    assert refused.value.code == "hub_not_found"
    files = hub.repos[REPO].files
    hub.repos["org/half"] = Repo({name: data for name, data in files.items() if name != SHARDS[3]})
    with pytest.raises(MixtralError) as refused:
        convert(Request("org/half", tmp_path / "dest"))
    assert refused.value.code == "hub_incomplete"
    hub.repos["org/mute"] = Repo({name: data for name, data in files.items() if "tokenizer" not in name})
    with pytest.raises(MixtralError) as refused:
        convert(Request("org/mute", tmp_path / "dest"))
    assert refused.value.code == "no_tokenizer"
    assert not any(hub.sent[name] for name in SHARDS)


def test_a_repository_that_changes_meanwhile_is_finished_as_it_was(
    hub: HubServer, source: Path, tmp_path: Path
) -> None:
    done: list[int] = []
    events = Events(progress=lambda now, total: done.append(now), cancelled=lambda: len(ticked(work)) > 30)
    work = tmp_path / "dest.partial"
    with pytest.raises(MixtralError) as stopped:
        convert(Request(REPO, tmp_path / "dest", ("q4",)), events)
    assert stopped.value.code == "cancelled"
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join()
    asked = len(hub.requests)
    convert(Request(REPO, tmp_path / "dest", ("q4",)))
    assert all("main" not in request.path for request in hub.requests[asked:])
    convert(Request(str(source), tmp_path / "local", ("q4",)))
    assert contents(tmp_path / "dest", manifest=False) == contents(tmp_path / "local", manifest=False)


def test_what_a_power_cut_lost_of_a_removed_file_is_fetched_again(hub: HubServer, source: Path, tmp_path: Path) -> None:
    work = tmp_path / "dest.partial"
    with pytest.raises(MixtralError):
        convert(Request(REPO, tmp_path / "dest", ("q4",)), Events(cancelled=lambda: len(used_up(work)) > 2))
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join()
    assert not (work / "source" / SHARDS[0]).exists()
    (output,) = (work / "output" / "dest").glob("*.safetensors")
    output.write_bytes(bytes(output.stat().st_size))
    convert(Request(REPO, tmp_path / "dest", ("q4",)))
    assert hub.sent[SHARDS[0]] == 2 * len(hub.repos[REPO].files[SHARDS[0]])
    convert(Request(str(source), tmp_path / "local", ("q4",)))
    assert contents(tmp_path / "dest", manifest=False) == contents(tmp_path / "local", manifest=False)


def test_progress_reaches_the_end_and_never_beyond(hub: HubServer, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    phase = [""]
    events = Events(
        phase=lambda line: phase.__setitem__(0, line),
        progress=lambda done, total: seen.append((phase[0], done, total)),
    )
    convert(Request(REPO, tmp_path / "dest"), events)
    total = sum(len(hub.repos[REPO].files[name]) for name in SHARDS)
    steps = [done for name, done, of in seen if of == total]
    assert steps == sorted(steps)
    assert steps[-1] == total


def kill_and_resume(hub: HubServer, tmp_path: Path, tokenizer: str, whole: dict[str, bytes], moment: int) -> None:
    """Kill a conversion before one of its disk calls; then see that it goes on and fetches nothing again."""
    dest = tmp_path / f"killed-{moment}"
    task = Task(Request(REPO, dest, ("q4",)), tokenizer, moment, prepare=go_to, arguments=(hub.url, tmp_path / "cache"))
    process = multiprocessing.get_context("forkserver").Process(target=run_task, args=(task,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if dest.exists():
        verify(dest)
    work = dest.with_name(dest.name + ".partial")
    missing = {name: bytes_to_come(work, name, len(hub.repos[REPO].files[name])) for name in SHARDS}
    hub.sent.clear()
    if not dest.exists() or (work / "journal").exists():
        before = ticked(work)
        assert convert(task.request).resumed == bool(before)
        assert {name: hub.sent[name] for name in SHARDS} == missing
    assert contents(dest) == whole


def bytes_to_come(work: Path, name: str, size: int) -> int:
    """How much of a file is neither here nor converted."""
    if (work / "source" / name).exists() or name in used_up(work):
        return 0
    part = work / "source" / f"{name}.part"
    return size - (part.stat().st_size if part.exists() else 0)


@pytest.mark.parametrize("count", [3, pytest.param(100, marks=pytest.mark.long)])
def test_a_killed_conversion_goes_on_and_fetches_nothing_twice(
    hub: HubServer, tmp_path: Path, quick_tokenizer: str, count: int
) -> None:
    log = tmp_path / "log"
    task = Task(
        Request(REPO, tmp_path / "whole", ("q4",)),
        quick_tokenizer,
        log=log,
        prepare=go_to,
        arguments=(hub.url, tmp_path / "cache"),
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conversions", "tests.test_convert_hub"])
    process = context.Process(target=run_task, args=(task,))
    process.start()
    process.join()
    assert process.exitcode == 0
    calls = len(log.read_text().split())
    for n in range(count):
        kill_and_resume(hub, tmp_path, quick_tokenizer, contents(tmp_path / "whole"), 10 + n * (calls - 40) // count)


def test_files_without_an_index_are_taken_one_by_one_as_well(hub: HubServer, source: Path, tmp_path: Path) -> None:
    files = contents(source)
    only = {name: data for name, data in files.items() if not name.endswith(".index.json")}
    hub.repos[REPO] = Repo(only)
    convert(Request(REPO, tmp_path / "dest", ("q4",)))
    assert Config.read(tmp_path / "dest").hidden_size == SOURCE.hidden_size
    convert(Request(str(source), tmp_path / "local", ("q4",)))
    assert contents(tmp_path / "dest", manifest=False) == contents(tmp_path / "local", manifest=False)
