"""Cost as work grows: the slopes and what they are expected to be, and the files and tables of a run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mixtral_mlx import cpu
from mixtral_mlx.bench import floor
from mixtral_mlx.bench.limits import Limits

from .checkpoints import TINY, write_tiny

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scaling.py"
LIMITS = Limits("cpu", "float32", 1e9, 1e10)
# A layer's expert is 3 matrices of 64 by 128 in float32; there are two layers.
EXPERT_BYTES = 2 * 3 * 64 * 128 * 4
KV_BYTES = 2 * 2 * 2 * 16 * 4


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    spec = spec_from_file_location("scaling", SCRIPT)
    assert spec
    assert spec.loader
    module = sys.modules["scaling"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling"]


@pytest.fixture(scope="module")
def tiny() -> floor.Weighed:
    return floor.weighed(TINY, {name: spec.nbytes("float32") for name, spec in TINY.tensors().items()})


def curve_of(script: Any, model: floor.Weighed, kind: int, seconds: list[list[float]], **sizes: Any) -> Any:
    series = script.all_series(script.Sizes(**sizes))[kind]
    return script._curve(series, dict(zip(series.rows, seconds, strict=False)), model, LIMITS, "float32")


def test_a_slope_is_the_step_between_medians_over_the_step_between_sizes(script: Any, tiny: floor.Weighed) -> None:
    seconds = [[0.010, 0.030, 0.011], [0.013], [0.017]]
    contexts = curve_of(script, tiny, 0, seconds, contexts=(0, 500, 1500))
    # 2 ms for 500 positions, then 4 ms for 1,000.
    assert contexts.slopes(lambda point: point.median_s) == pytest.approx([4, 4])
    batches = curve_of(script, tiny, 1, [[0.001], [0.002], [0.006]], batches=(1, 2, 4))
    assert batches.slopes(lambda point: point.median_s) == pytest.approx([1, 2])


def test_a_context_is_expected_to_cost_the_reading_of_its_keys_and_values(script: Any, tiny: floor.Weighed) -> None:
    contexts = curve_of(script, tiny, 0, [[1.0]] * 3, contexts=(0, 256, 1024))
    expected = 1000 * 1000 * KV_BYTES / LIMITS.bytes_per_s
    assert contexts.slopes(lambda point: point.bytes_s) == pytest.approx([expected, expected])


def test_a_batch_is_expected_to_read_the_experts_it_newly_touches(script: Any, tiny: floor.Weighed) -> None:
    batches = curve_of(script, tiny, 1, [[1.0]] * 3, batches=(1, 2, 4))
    # Of 8 experts one token touches 2, two 8 · (1 − 0.75²) = 3.5, four 5.46875; 128 positions, the step that is not
    # timed, and half of the 16 that are; a row of the embedding.
    each = (128 + 2 + 15 / 2) * KV_BYTES + 64 * 4
    expected = [1.5 * EXPERT_BYTES + each, 1.96875 / 2 * EXPERT_BYTES + each]
    assert batches.slopes(lambda point: point.bytes_s) == pytest.approx([1e-6 * nbytes for nbytes in expected])


def test_a_prompt_is_expected_to_compute_and_to_read_what_its_chunks_touch(script: Any, tiny: floor.Weighed) -> None:
    prompts = curve_of(script, tiny, 2, [[1.0]] * 3, prompts=(1, 2, 4))
    active = tiny.dense.parameters + 2 * tiny.expert.parameters
    # Two layers of 4 heads of 16: every token attends to itself and those before it, 1, 3 and 10 in all.
    attended = [4 * 2 * 4 * 16 * more for more in (2, 7 / 2)]
    expected = [1000 * (2 * active + more) / LIMITS.operations_per_s for more in attended]
    assert prompts.slopes(lambda point: point.operations_s) == pytest.approx(expected)
    assert script.prompt_work(tiny, 1).nbytes == tiny.dense.nbytes + 64 * 4 + tiny.head.nbytes + 2 * EXPERT_BYTES
    two_chunks = script.prompt_work(tiny, 4096).nbytes - floor.prompt(tiny, 4096).nbytes
    assert two_chunks == pytest.approx(tiny.dense.nbytes + 8 * EXPERT_BYTES)


def test_what_is_expected_is_the_longer_of_reading_and_computing(script: Any) -> None:
    assert script.Point(1, (1.0,), 0.2, 0.3).expected_s == 0.3
    assert script.Point(1, (1.0,), 0.4, 0.3).expected_s == 0.4


def test_every_turn_measures_each_size_once_upwards_then_downwards(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def seconds_of(engine: Any, row: Any) -> float:
        seen.append(row.name)
        return len(seen)

    monkeypatch.setattr(script, "seconds_of", seconds_of)
    rows = [script.Row(name, "prompt", "prompt", "s", 1000) for name in "abc"]
    assert script.measure(None, rows, 3) == {rows[0]: [1, 6, 7], rows[1]: [2, 5, 8], rows[2]: [3, 4, 9]}
    assert "".join(seen) == "abccbaabc"


@pytest.fixture(scope="module")
def run(script: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder a run wrote to, and what it printed."""
    folder = write_tiny(tmp_path_factory.mktemp("scaling") / "tiny", tokenizer=None)
    output, capture = folder.parent / "new" / "output", pytest.MonkeyPatch()
    printed: list[str] = []
    with capture.context() as patch:
        patch.setattr(script.limits, "measure", lambda dtype: LIMITS)
        patch.setattr(cpu, "is_available", lambda: False)  # Kernels would be compiled for longer than anything runs.
        patch.setattr(script, "print", lambda text, **to: None if to else printed.append(text), raising=False)
        sizes = script.Sizes(contexts=(0, 16, 4096), batches=(1, 2), batch_context=8, prompts=(1, 4))
        script.main([str(folder), "--output", str(output), "--turns", "1"], sizes)
    return output, "\n".join(printed)


def test_a_run_prints_three_tables_and_says_what_it_left_out(run: tuple[Path, str]) -> None:
    lines = run[1].splitlines()
    assert sum(line.startswith("| ---:") for line in lines) == 3
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ") and line[2].isdigit()] == [
        *("0", "16"),
        *("1", "2"),
        *("1", "4"),
    ]
    assert "Left out: context 4,096: this model's context is 2,048." in run[1]
    assert "2.0 for 1, 3.5 for 2" in run[1]


def test_a_run_writes_all_its_numbers(run: tuple[Path, str]) -> None:
    written = json.loads((run[0] / "scaling.json").read_text())
    contexts, batches, prompts = written["curves"]
    assert [[point["size"] for point in curve["points"]] for curve in (contexts, batches, prompts)] == [
        [0, 16],
        [1, 2],
        [1, 4],
    ]
    assert all(len(point["seconds"]) == 1 and point["seconds"][0] > 0 for point in contexts["points"])
    low, high = (point["median_s"] for point in prompts["points"])
    assert prompts["slopes_ms"]["measured"] == pytest.approx([1000 * (high - low) / 3])
    assert written["limits"]["bytes_per_s"] == LIMITS.bytes_per_s


def test_the_picture_is_well_formed_asks_nobody_for_anything_and_suits_light_and_dark(run: tuple[Path, str]) -> None:
    text = (run[0] / "scaling.svg").read_text()
    picture = ElementTree.fromstring(text)
    tags = [element.tag.rpartition("}")[2] for element in picture.iter()]
    assert (tags.count("g"), tags.count("circle"), tags.count("script")) == (3, 6, 0)
    assert all(word not in text for word in ("href", "url(", "@import"))
    assert "prefers-color-scheme: dark" in text
    places = [float(circle.attrib[axis]) for circle in picture.iter("{*}circle") for axis in ("cx", "cy")]
    assert all(map(math.isfinite, places))
