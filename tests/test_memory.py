"""What the operating system is asked, that the answers are this process's, and what is done when memory runs short."""

from __future__ import annotations

import mmap
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mixtral_mlx import memory
from mixtral_mlx.memory import (
    CRITICAL,
    NORMAL,
    WARNING,
    Machine,
    MachineError,
    Relief,
    Step,
    System,
    default_budget,
    wire,
)

PROGRAM = "from mixtral_mlx.memory import peak_rss_bytes; print(peak_rss_bytes())"
GB = 10**9
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            300000.
Pages inactive:                           20000.
Pages speculative:                         3000.
Pages throttled:                              0.
Pages wired down:                         90000.
Pages purgeable:                           2000.
"Translation faults":                 123456789.
"""


def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    held = bytearray(b"1") * (300 << 20)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) < len(held)


def test_resident_memory_grows_and_shrinks_with_what_is_held() -> None:
    before = memory.rss_bytes()
    # A map of its own: what Python frees elsewhere may be used again without growing.
    with mmap.mmap(-1, 200 << 20) as held:
        held.write(bytes(100 << 20))
        held.write(bytes(100 << 20))
        assert memory.rss_bytes() - before > 150 << 20
    assert memory.rss_bytes() - before < 100 << 20
    assert memory.rss_bytes() <= memory.peak_rss_bytes()


def test_asking_for_the_machine_imports_no_mlx() -> None:
    script = (
        "import sys; from mixtral_mlx.memory import machine; m = machine(); assert 'mlx' not in sys.modules; print(m)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Machine(ram_bytes=")


def test_this_machine_has_memory_and_no_more_left_than_it_has() -> None:
    here = memory.machine(ask_metal=True)
    assert 0 < here.available_bytes <= here.ram_bytes
    assert here.gpu_bytes is None or here.gpu_bytes <= here.ram_bytes


# Linux: files in place of the kernel's.


def linux(root: Path, *, free: int, groups: dict[str, tuple[str, int, int]], line: str = "0::/box/inner") -> System:
    """A system of so many bytes free, with control groups of (limit, used, of which files)."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {free // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    names = ("memory.max", "memory.current", "inactive_file")
    if ":memory:" in line:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for path, (limit, used, files) in groups.items():
        folder = root / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {files}\n")
    return System(platform="linux", root=root)


@pytest.mark.parametrize("line", ["0::/box/inner", "4:memory:/box/inner"])
def test_the_tightest_control_group_around_the_process_counts(tmp_path: Path, line: str) -> None:
    top = "memory/" if ":memory:" in line else ""
    groups = {f"{top}box/inner": ("max", 5, 0), f"{top}box": (str(1000 << 20), 700 << 20, 100 << 20)}
    system = linux(tmp_path, free=900 << 20, groups=groups, line=line)
    assert memory.ram_bytes(system) == 1000 << 20
    assert memory.available_bytes(system) == 400 << 20  # What files take can be dropped.


def test_without_a_control_group_the_kernel_says_what_is_left(tmp_path: Path) -> None:
    system = linux(tmp_path, free=123 << 20, groups={})
    assert memory.available_bytes(system) == 123 << 20
    assert memory.ram_bytes(system) == memory.ram_bytes(System(root=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("used", "level"), [(0, NORMAL), (940, NORMAL), (960, WARNING), (985, CRITICAL), (2000, CRITICAL)]
)
def test_pressure_is_by_the_share_that_is_left(tmp_path: Path, used: int, level: int) -> None:
    system = linux(tmp_path, free=64 * GB, groups={"box": (str(1000 << 20), used << 20, 0)})
    assert memory.pressure(system) == level


# macOS: answers in place of the system's.


def test_on_a_mac_what_is_free_or_unused_for_long_is_available() -> None:
    assert memory.available_bytes(System(platform="darwin", vm_stat=lambda: VM_STAT)) == 35000 * 16384


@pytest.mark.parametrize(("said", "level"), [(1, NORMAL), (2, WARNING), (4, CRITICAL), (0, NORMAL), (77, NORMAL)])
def test_on_a_mac_the_system_itself_says_how_short_memory_is(said: int, level: int) -> None:
    system = System(platform="darwin", sysctl={"kern.memorystatus_vm_pressure_level": said}.__getitem__)
    assert memory.pressure(system) == level


@pytest.mark.parametrize(
    ("ram", "budget"), [(8, 16 / 3), (16, 32 / 3), (24, 16), (32, 64 / 3), (36, 24), (64, 48), (128, 96)]
)
def test_a_macs_default_budget_is_what_the_gpu_may_hold(ram: int, budget: float) -> None:
    # 10922.67, 21845.34 and 49152.00 MiB are what llama.cpp printed on Macs of 16, 32 and 64 GB.
    assert default_budget(Machine(ram << 30, ram << 29, "Apple M2")) == int(budget * 2**30)


def test_metals_own_answer_comes_before_the_rule() -> None:
    assert default_budget(Machine(128 << 30, 64 << 30, "Apple M5 Max", gpu_bytes=107 << 30)) == 107 << 30


def test_elsewhere_the_default_budget_leaves_others_what_they_have_and_causes_no_pressure() -> None:
    assert default_budget(Machine(100 * GB, 99 * GB, "AMD EPYC")) == 90 * GB
    assert default_budget(Machine(100 * GB, 50 * GB, "AMD EPYC")) == 44 * GB
    assert default_budget(Machine(100 * GB, 1 * GB, "AMD EPYC")) == 0


# Relief.


class Play:
    """A system whose level and clock are set by hand, and things of which some can be given up."""

    def __init__(self, **have: int) -> None:
        self.now, self.level, self.asked = 0.0, NORMAL, 0
        self.have = dict(have)
        self.most = dict(have)
        steps = [Step(name, partial(self.move, name, -1), partial(self.move, name, 1)) for name in have]
        self.relief = Relief(steps, pressure=self.pressure, clock=lambda: self.now)

    def pressure(self) -> int:
        self.asked += 1
        return self.level

    def move(self, name: str, by: int) -> bool:
        if not 0 <= self.have[name] + by <= self.most[name]:
            return False
        self.have[name] += by
        return True

    def after(self, seconds: float, level: int) -> list[str]:
        self.now += seconds
        self.level = level
        return self.relief.check()


def test_a_warning_gives_up_the_cheapest_thing_and_goes_on_while_it_lasts() -> None:
    play = Play(cache=1, prompts=1, slots=2)
    assert [play.after(1, WARNING) for _ in range(6)] == [["cache"], ["prompts"], ["slots"], ["slots"], [], []]
    assert play.have == {"cache": 0, "prompts": 0, "slots": 0}


def test_at_critical_everything_gives_something_at_once() -> None:
    play = Play(cache=1, prompts=0, slots=3)
    assert play.after(1, CRITICAL) == ["cache", "slots"]
    assert play.after(1, CRITICAL) == ["slots"]


def test_who_is_told_by_others_gives_up_everything_once_and_has_it_back_when_it_is_calm() -> None:
    play = Play(cache=1, prompts=0, slots=3)
    assert play.relief.take_all() == ["cache", "slots"]
    assert play.after(1, NORMAL) == []
    assert play.after(30, NORMAL) == ["-slots"]


def test_things_come_back_one_at_a_time_and_the_last_given_up_first() -> None:
    play = Play(cache=1, slots=2)
    for _ in range(3):
        play.after(1, WARNING)
    assert play.after(1, NORMAL) == []
    assert play.after(29, NORMAL) == []
    assert play.after(1, NORMAL) == ["-slots"]
    assert play.after(29, NORMAL) == []
    assert play.after(1, NORMAL) == ["-slots"]
    assert play.after(30, NORMAL) == ["-cache"]
    assert play.after(300, NORMAL) == []
    assert play.have == play.most


def test_pressure_in_between_starts_the_wait_anew() -> None:
    play = Play(cache=1)
    play.after(1, WARNING)
    play.after(1, NORMAL)
    play.after(28, WARNING)
    assert play.after(1, NORMAL) == []
    assert play.after(29, NORMAL) == []
    assert play.after(1, NORMAL) == ["-cache"]


def test_what_had_to_be_given_up_again_at_once_comes_back_later_next_time() -> None:
    play = Play(slots=1)
    play.after(1, WARNING)
    play.after(1, NORMAL)
    assert play.after(30, NORMAL) == ["-slots"]
    assert play.after(5, WARNING) == ["slots"]
    play.after(1, NORMAL)
    assert play.after(31, NORMAL) == []
    assert play.after(29, NORMAL) == ["-slots"]


def test_a_thing_that_cannot_come_back_does_not_hold_up_the_others() -> None:
    play = Play(cache=1, prompts=1)
    play.after(1, CRITICAL)
    play.most["prompts"] = 0
    play.after(1, NORMAL)
    assert play.after(30, NORMAL) == ["-cache"]


def test_what_fills_again_by_itself_is_cleared_each_time_and_never_instead_of_a_step() -> None:
    cleared: list[int] = []
    slots = [2]

    def give_up() -> bool:
        slots[0] -= slots[0] > 0
        return slots[0] > 0

    seconds = iter(range(100))
    steps = [Step("slots", give_up)]
    relief = Relief(
        steps, clear=lambda: cleared.append(slots[0]), pressure=lambda: WARNING, clock=lambda: next(seconds)
    )
    assert [relief.check() for _ in range(3)] == [["slots"], [], []]
    assert cleared == [1, 0, 0]  # After the step, whose memory is only free then.
    assert relief.taken == []  # What cannot come back is not waited for.


def test_the_system_is_asked_once_a_second_at_most() -> None:
    play = Play(cache=1)
    for _ in range(100):
        play.after(0.1, NORMAL)
    assert 9 <= play.asked <= 11


# Wiring.


class Metal:
    """MLX with Metal, as far as wiring goes."""

    def __init__(self) -> None:
        self.limits = [7]
        self.metal = self

    def is_available(self) -> bool:
        return True

    def device_info(self) -> dict[str, Any]:
        return {"max_recommended_working_set_size": 1000}

    def set_wired_limit(self, limit: int) -> int:
        self.limits.append(limit)
        return self.limits[-2]


def test_wiring_is_undone_at_the_end_whatever_happens() -> None:
    mx = Metal()
    with pytest.raises(KeyError), wire("fit", 500, mx=mx):
        raise KeyError
    assert mx.limits == [7, 500, 7]


def test_no_more_is_wired_than_metal_recommends() -> None:
    with wire("fit", 5000, mx=Metal()) as wired:
        assert wired == 1000
    with wire("fit", 500, mx=Metal()) as wired:
        assert wired == 500


def test_nothing_is_wired_unless_asked() -> None:
    mx = Metal()
    with wire("off", 500, mx=mx) as wired:
        assert wired == 0
    assert mx.limits == [7]


def test_a_process_wires_its_memory_once() -> None:
    mx = Metal()
    with wire("fit", 500, mx=mx):
        with pytest.raises(MachineError, match="wired its memory already") as caught, wire("fit", 500, mx=mx):
            pass
        with wire("off", 500, mx=mx):
            pass
    assert caught.value.code == "wired_already"
    assert mx.limits == [7, 500, 7]
    with wire("fit", 500, mx=mx):
        pass


def test_without_metal_wiring_is_refused_by_name() -> None:
    mx = Metal()
    mx.is_available = lambda: False  # type: ignore[method-assign]
    with pytest.raises(MachineError, match="for Metal only") as caught, wire("fit", 500, mx=mx):
        pass
    assert caught.value.code == "not_available"
    with pytest.raises(MachineError, match="expected one of off, fit"), wire("all", 500, mx=mx):
        pass
    assert mx.limits == [7]
