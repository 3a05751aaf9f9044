"""AWQ and GPTQ: the matrices that their formulas give, from words packed here by each project's published layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mixtral_mlx.config import Config, MixtralError, read_json
from mixtral_mlx.convert.names import ConvertError, Stored, matrices
from mixtral_mlx.convert.packed import unpack

from .checkpoints import read_arrays
from .sources.make_sources import CONFIG, FORMS, hf_weights, stacked_names

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


@dataclass(frozen=True)
class InMemory:
    """A tensor that is there already."""

    array: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def read(self, start: int, stop: int) -> mx.array:
        return self.array[start:stop]


def stored(**arrays: Any) -> dict[str, Stored]:
    return {f"m.{name}": InMemory(mx.array(array)) for name, array in arrays.items()}


def awq_tensors(numbers: Any, zeros: Any, scales: Any) -> dict[str, Stored]:
    """AutoAWQ's gemm: of 8 outputs in a word, those at 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up."""

    def words(values: Any) -> Any:
        packed = np.zeros((values.shape[0], values.shape[1] // 8), np.int64)
        for place, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            for column in range(packed.shape[1]):
                packed[:, column] |= values[:, column * 8 + output].astype(np.int64) << (4 * place)
        return packed.astype(np.uint32).view(np.int32)

    return stored(qweight=words(numbers), qzeros=words(zeros), scales=scales.astype(np.float16))


def gptq_tensors(numbers: Any, zeros: Any, scales: Any, bits: int = 4, less: int = 1, **more: Any) -> dict[str, Stored]:
    """GPTQ: inputs one after the other in a word of qweight, outputs in one of qzeros, each zero less 1."""
    each = 32 // bits
    qweight = np.zeros((numbers.shape[0] // each, numbers.shape[1]), np.int64)
    for row in range(numbers.shape[0]):
        qweight[row // each] |= numbers[row].astype(np.int64) << (bits * (row % each))
    qzeros = np.zeros((zeros.shape[0], zeros.shape[1] // each), np.int64)
    for column in range(zeros.shape[1]):
        qzeros[:, column // each] += (zeros[:, column].astype(np.int64) - less) << (bits * (column % each))
    words = {"qweight": qweight, "qzeros": qzeros}
    packed = {name: (array % 2**32).astype(np.uint32).view(np.int32) for name, array in words.items()}
    return stored(**packed, scales=scales.astype(np.float16), **more)


def random_parts(inputs: int, outputs: int, groups: int, top: int = 15) -> tuple[Any, Any, Any]:
    chance = np.random.default_rng(inputs + outputs + top)
    numbers = chance.integers(0, top + 1, (inputs, outputs))
    return numbers, chance.integers(0, top + 1, (groups, outputs)), chance.random((groups, outputs)).astype(np.float16)


def expected(numbers: Any, zeros: Any, scales: Any, groups: Any) -> Any:
    """One number at a time, as the papers have it: scale times (number minus zero)."""
    result = np.zeros(numbers.T.shape, np.float32)
    for row in range(numbers.shape[0]):
        for column in range(numbers.shape[1]):
            group = groups[row]
            difference = int(numbers[row, column]) - int(zeros[group, column])
            result[column, row] = np.float32(scales[group, column]) * np.float32(difference)
    return result


def check(tensors: dict[str, Stored], config: dict[str, Any], values: Any) -> None:
    matrix = unpack(tensors, config)["m.weight"]
    assert matrix.shape == values.shape
    outputs = values.shape[0]
    for start, stop in ((0, outputs), (3, outputs - 5), (8, 9), (outputs, outputs)):
        found = matrix.read(start, stop)
        assert found.dtype == mx.float32
        np.testing.assert_array_equal(np.array(found), values[start:stop])


def test_awq_gives_what_its_formula_gives() -> None:
    numbers, zeros, scales = random_parts(96, 40, 3)
    check(awq_tensors(numbers, zeros, scales), AWQ, expected(numbers, zeros, scales, np.arange(96) // 32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
def test_gptq_gives_what_its_formula_gives(bits: int, version: str | None) -> None:
    """Also for zeros of 0, which less 1 borrow from the number above them."""
    numbers, zeros, scales = random_parts(64, 32, 2, 2**bits - 1)
    zeros[0, :] = 0
    config = {**GPTQ, "bits": bits} | ({"checkpoint_format": version} if version else {})
    tensors = gptq_tensors(numbers, zeros, scales, bits, less=0 if version == "gptq_v2" else 1)
    check(tensors, config, expected(numbers, zeros, scales, np.arange(64) // 32))


def test_gptq_with_inputs_in_another_order_is_read_by_its_g_idx() -> None:
    numbers, zeros, scales = random_parts(64, 32, 2)
    groups = np.random.default_rng(1).permutation(np.arange(64) // 32).astype(np.int32)
    tensors = gptq_tensors(numbers, zeros, scales, g_idx=groups)
    for act_order in (True, False):
        check(tensors, {**GPTQ, "desc_act": act_order}, expected(numbers, zeros, scales, groups))


def test_one_group_of_all_inputs() -> None:
    numbers, zeros, scales = random_parts(64, 32, 1)
    values = expected(numbers, zeros, scales, np.zeros(64, int))
    check(gptq_tensors(numbers, zeros, scales), {**GPTQ, "group_size": -1}, values)
    check(awq_tensors(numbers, zeros, scales), {**AWQ, "group_size": -1}, values)


def test_large_matrices_are_unpacked_in_runs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, zeros, scales = random_parts(64, 40, 2)
    values = expected(numbers, zeros, scales, np.arange(64) // 32)
    for items in (1, 64 * 3, 64 * 8):
        monkeypatch.setattr("mixtral_mlx.convert.packed._CHUNK_ITEMS", items)
        check(awq_tensors(numbers, zeros, scales), AWQ, values)
        check(gptq_tensors(numbers, zeros, scales), GPTQ, values)


# Whole models. Rounding to 4 bits in groups of 32 moves a weight by half a step, a fifteenth of the group's range.


@pytest.mark.parametrize("form", ["awq", "gptq", "gptq-act-order", "gptq-v2", "gptq-8bit"])
def test_every_packed_form_holds_the_matrices_of_the_hugging_face_form(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path)
    settings = read_json(tmp_path / "config.json")["quantization_config"]
    packed: dict[str, Stored] = {name: InMemory(array) for name, array in read_arrays(tmp_path).items()}
    tensors = unpack(packed, settings)
    steps = 2 ** settings["bits"] - 1
    weights = stacked_names(hf_weights())
    for matrix in matrices(tensors, Config.from_dict(CONFIG)):
        array = weights[f"{matrix.path}.weight"]
        array = array if matrix.expert is None else array[matrix.expert]
        found = np.array(matrix.read().astype(mx.float32))
        if "self_attn" in matrix.path or "switch_mlp" in matrix.path:
            # By half a step, or a whole one where zero was kept from being the lowest number.
            bound = (array.max() - array.min()) / steps * 1.01
            assert np.abs(found - array).max() <= bound
            assert np.linalg.norm(found - array) / np.linalg.norm(array) < (0.1 if steps == 15 else 0.01)
        else:
            np.testing.assert_allclose(found, array, rtol=1e-3, atol=1e-6)


# What is refused.

PARTS = random_parts(64, 32, 2)
WRONG: dict[str, Callable[[], tuple[dict[str, Stored], dict[str, Any]]]] = {
    "another method": lambda: (awq_tensors(*PARTS), {**AWQ, "quant_method": "bitsandbytes"}),
    "no method": lambda: (awq_tensors(*PARTS), {"bits": 4}),
    "awq of 8 bits": lambda: (awq_tensors(*PARTS), {**AWQ, "bits": 8}),
    "awq in another layout": lambda: (awq_tensors(*PARTS), {**AWQ, "version": "gemv"}),
    "awq without zeros": lambda: (awq_tensors(*PARTS), {**AWQ, "zero_point": False}),
    "gptq of 3 bits": lambda: (gptq_tensors(*PARTS), {**GPTQ, "bits": 3}),
    "gptq of true bits": lambda: (gptq_tensors(*PARTS), {**GPTQ, "bits": True}),
    "marlin": lambda: (gptq_tensors(*PARTS), {**GPTQ, "checkpoint_format": "marlin"}),
    "marlin, older": lambda: (gptq_tensors(*PARTS), {**GPTQ, "is_marlin_format": True}),
    "groups of nothing": lambda: (gptq_tensors(*PARTS), {**GPTQ, "group_size": 0}),
    "groups of text": lambda: (gptq_tensors(*PARTS), {**GPTQ, "group_size": "128"}),
    "groups of another size": lambda: (gptq_tensors(*PARTS), {**GPTQ, "group_size": 16}),
    "no scales": lambda: ({k: v for k, v in awq_tensors(*PARTS).items() if "scales" not in k}, AWQ),
    "no zeros": lambda: ({k: v for k, v in awq_tensors(*PARTS).items() if "qzeros" not in k}, AWQ),
    "a special order without g_idx": lambda: (gptq_tensors(*PARTS), {**GPTQ, "desc_act": True}),
    "a short g_idx": lambda: (gptq_tensors(*PARTS, g_idx=np.zeros(9, np.int32)), GPTQ),
    "a g_idx beyond the groups": lambda: (gptq_tensors(*PARTS, g_idx=np.full(64, 2, np.int32)), GPTQ),
    "a negative g_idx": lambda: (gptq_tensors(*PARTS, g_idx=np.full(64, -1, np.int32)), GPTQ),
    "floats for words": lambda: (awq_tensors(*PARTS) | stored(qweight=np.zeros((64, 4), np.float32)), AWQ),
    "words in three dimensions": lambda: (awq_tensors(*PARTS) | stored(qweight=np.zeros((2, 64, 4), np.int32)), AWQ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_unpacked_is_refused(name: str) -> None:
    tensors, config = WRONG[name]()
    with pytest.raises(MixtralError) as error:
        unpack(tensors, config)["m.weight"].read(0, 32)
    assert error.value.code == "unsupported_quantization"


def test_a_bias_of_zeros_is_left_out_and_another_refused() -> None:
    tensors = gptq_tensors(*PARTS)
    assert list(unpack(tensors | stored(bias=np.zeros(32, np.float16)), GPTQ)) == ["m.weight"]
    with pytest.raises(ConvertError) as error:
        unpack(tensors | stored(bias=np.ones(32, np.float16)), GPTQ)
    assert error.value.code == "unexpected_tensor"


def test_other_tensors_pass_through() -> None:
    other: dict[str, Stored] = {"model.norm.weight": InMemory(mx.ones(4)), "scales": InMemory(mx.ones(4))}
    assert unpack(other, AWQ) == other
