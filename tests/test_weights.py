"""Every form of folder people have loads to the same model, and what is written can be read by others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mixtral_mlx import cpu, weights
from mixtral_mlx.budget import BudgetError
from mixtral_mlx.config import Config, Packing, Quantization
from mixtral_mlx.memory import activation_dtype, file_limit_kept
from mixtral_mlx.model import Model
from mixtral_mlx.weights import Checkpoint, WeightsError, load, locate, save

from .checkpoints import Q4, TINY, parsed_elsewhere, random_model, read_arrays, unstacked, write_tiny, write_weights

with file_limit_kept():
    from mlx_lm.utils import load_model

GOLDEN = Path(__file__).parent / "golden"
SMALL = replace(TINY, vocab_size=96)
IDS = mx.array([[1, 5, 9, 44, 3, 80]])
ON_CPU = cpu.is_backend()
GATES = tuple(f"model.layers.{n}.block_sparse_moe.gate" for n in range(2))


def parameters(model: Model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def write_config(folder: Path, config: Config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def halves(arrays: Mapping[str, mx.array]) -> list[dict[str, mx.array]]:
    """The tensors dealt out to two shards, so that an expert's matrices and a stack's experts are torn apart."""
    names = list(arrays)
    return [{name: arrays[name] for name in names[start::2]} for start in (0, 1)]


def same(ours: Mapping[str, mx.array], theirs: Mapping[str, mx.array]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and bool(mx.array_equal(ours[name], theirs[name])) for name in ours
    )


@pytest.mark.parametrize("quantization", [None, Q4], ids=["float", "4-bit"])
@pytest.mark.parametrize("form", ["stacked", "unstacked"])
@pytest.mark.parametrize("files", ["one file", "two files", "one file with index"])
def test_every_form_of_folder_loads_to_the_same_bits(
    tmp_path: Path, quantization: Quantization | None, form: str, files: str
) -> None:
    config = replace(SMALL, quantization=quantization)
    model = random_model(config)
    arrays = parameters(model) if form == "stacked" else unstacked(parameters(model))
    folder = write_config(tmp_path, config)
    write_weights(folder, *(halves(arrays) if files == "two files" else [arrays]), index=files != "one file")
    loaded = load(folder)
    assert same(parameters(loaded.model), parameters(model))
    # On MLX's CPU backend what is loaded adds up in another order.
    assert mx.allclose(loaded.model(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    assert loaded.weights_bytes == sum(array.nbytes for array in arrays.values())
    assert (loaded.dtype, loaded.config) == ("float32", config)


PACKINGS = [
    *(Packing(bits, 32) for bits in (2, 3, 4, 5, 6, 8)),
    *(Packing(4, group) for group in (64, 128)),
    *(Packing(4, 32, "mxfp4"), Packing(8, 32, "mxfp8"), Packing(4, 16, "nvfp4")),
]


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: f"{p.mode}-{p.bits}-{p.group_size}")
@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_every_quantization_loads_and_computes_as_in_mlx_lm(tmp_path: Path, packing: Packing, form: str) -> None:
    wide = replace(SMALL, hidden_size=128, head_dim=32, dtype="bfloat16", quantization=Quantization(packing))
    arrays = parameters(random_model(wide))
    folder = write_config(tmp_path, wide)
    write_weights(folder, arrays if form == "stacked" else unstacked(arrays))
    ours = load(folder, dtype="float32").model
    theirs = load_model(folder)[0]
    theirs.set_dtype(mx.float32)
    reference = theirs(IDS)
    own = load(folder)
    assert same(parameters(own.model), arrays)
    for dtype in ("bfloat16", "float16"):
        logits = load(folder, dtype=dtype).model(IDS).astype(mx.float32)
        assert float(mx.abs(logits - reference).mean()) < 0.05 * float(mx.abs(reference).max())
    assert float(mx.abs(ours(IDS) - reference).max()) <= 1e-5 * float(mx.abs(reference).max())


def test_each_module_may_be_packed_its_own_way_or_not_at_all(tmp_path: Path) -> None:
    experts = "model.layers.1.block_sparse_moe.switch_mlp"
    overrides: dict[str, Packing | None] = {
        **dict.fromkeys(GATES, Packing(8, 64)),
        "model.embed_tokens": Packing(6, 32),
        "model.layers.0.self_attn.q_proj": None,
        f"{experts}.up_proj": Packing(2, 32),
        f"{experts}.down_proj": Packing(3, 64),
        f"{experts}.gate_proj": Packing(4, 32, "mxfp4"),
        "lm_head": None,
    }
    config = replace(SMALL, quantization=Quantization(Packing(4, 64), overrides))
    model = random_model(config)
    for form in (parameters(model), unstacked(parameters(model))):
        folder = write_config(tmp_path / str(len(form)), config)
        loaded = load(write_weights(folder, form))
        assert same(parameters(loaded.model), parameters(model))
        assert mx.allclose(loaded.model(IDS), model(IDS), rtol=1e-5, atol=1e-5)
        assert mx.allclose(loaded.model(IDS), load_model(folder)[0](IDS), rtol=1e-4, atol=1e-4)


def test_a_module_without_scales_stays_unquantized_as_in_mlx_lm(tmp_path: Path) -> None:
    packed = replace(SMALL, quantization=Quantization(Packing(4, 32), dict.fromkeys(GATES)))
    arrays = parameters(random_model(packed))
    # Older folders say nothing of the gate, which mlx-community left as floats.
    folder = write_config(tmp_path, replace(packed, quantization=Quantization(Packing(4, 32))))
    assert same(parameters(load(write_weights(folder, arrays)).model), arrays)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_plain_hugging_face_folder_in_half_precision_gives_transformers_logits(tmp_path: Path, dtype: str) -> None:
    arrays = read_arrays(GOLDEN / "untied")
    golden = {name: arrays.pop(name) for name in ("ids", "logits", "logits.bfloat16", "logits.float16")}
    halved = {name: array.astype(getattr(mx, dtype)) for name, array in arrays.items()}
    write_config(tmp_path, replace(load(GOLDEN / "untied").config, dtype=dtype))
    write_weights(tmp_path, *halves(halved))
    loaded = load(tmp_path, dtype="float32")
    assert float(mx.abs(loaded.model(golden["ids"]) - golden[f"logits.{dtype}"]).max()) < 1e-4


def test_loaded_bits_are_the_files_own_read_by_the_safetensors_package(tmp_path: Path) -> None:
    config = replace(SMALL, dtype="bfloat16", quantization=Q4)
    write_tiny(tmp_path / "tiny", config, tokenizer=None)
    ours = parameters(load(tmp_path / "tiny").model)
    (file,) = (tmp_path / "tiny").glob("*.safetensors")
    theirs = parsed_elsewhere(file.read_bytes())
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        view: Any = array
        assert memoryview(view).tobytes() == bytes(theirs[name]["data"])
        assert list(array.shape) == theirs[name]["shape"]


def test_unquantized_experts_run_in_float32_on_the_cpu_and_in_their_own_dtype_elsewhere(tmp_path: Path) -> None:
    config = replace(SMALL, dtype="bfloat16")
    write_tiny(tmp_path / "tiny", config, tokenizer=None)
    loaded = load(tmp_path / "tiny")
    assert loaded.dtype == ("float32" if ON_CPU else "bfloat16")
    assert loaded.model(IDS).dtype == getattr(mx, loaded.dtype)
    # Every bfloat16 is a float32, so no bit is lost.
    assert same(
        {name: array.astype(mx.bfloat16) for name, array in parameters(loaded.model).items()},
        parameters(random_model(config)),
    )
    if ON_CPU:
        with pytest.raises(WeightsError, match="float32") as caught:
            load(tmp_path / "tiny", dtype="bfloat16")
        assert caught.value.code == "unsupported_dtype"


@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("target", "quantization"),
    [
        *((target, Q4) for target in ("bfloat16", "float16", "float32")),
        *((target, None) for target in (("float32",) if ON_CPU else ("bfloat16", "float16", "float32"))),
    ],
)
def test_a_dtype_casts_every_float_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str, quantization: Quantization | None
) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: False)  # Its kernels read any float as it is stored.
    config = replace(SMALL, dtype=source, quantization=quantization)
    model = random_model(config)
    write_weights(write_config(tmp_path, config), unstacked(parameters(model)))
    loaded = load(tmp_path, dtype=target)
    assert loaded.dtype == target
    assert loaded.weights_bytes == sum(array.nbytes for array in parameters(loaded.model).values())
    expected = {
        name: array if array.dtype == mx.uint32 else array.astype(getattr(mx, target))
        for name, array in parameters(model).items()
    }
    assert same(parameters(loaded.model), expected)
    assert loaded.model(IDS).dtype == getattr(mx, target)


def test_auto_computes_in_float16_where_bfloat16_is_emulated() -> None:
    def chosen(asked: str, checkpoint: str, chip: str) -> str:
        return activation_dtype(asked, checkpoint, chip=lambda: chip)

    for chip in ("Apple M1", "Apple M1 Pro", "Apple M2 Ultra"):
        assert chosen("auto", "bfloat16", chip) == "float16"
        assert chosen("auto", "float32", chip) == "float32"
        assert chosen("bfloat16", "bfloat16", chip) == "bfloat16"
    for chip in ("Apple M3", "Apple M4 Max", "Apple M10", "Apple M21", "", "Intel(R) Xeon(R)"):
        assert chosen("auto", "bfloat16", chip) == "bfloat16"
        assert chosen("auto", "float16", chip) == "float16"


@pytest.mark.parametrize(("chip", "dtype"), [("Apple M1 Pro", "float16"), ("Apple M3 Max", "bfloat16")])
def test_auto_casts_a_bfloat16_folder_on_m1_and_not_on_m3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chip: str, dtype: str
) -> None:
    monkeypatch.setattr(cpu, "is_backend", lambda: False)
    monkeypatch.setattr(weights, "activation_dtype", partial(activation_dtype, chip=lambda: chip))
    write_tiny(tmp_path / "tiny", replace(SMALL, dtype="bfloat16", quantization=Q4), tokenizer=None)
    loaded = load(tmp_path / "tiny")
    assert loaded.dtype == dtype
    assert {str(array.dtype) for array in parameters(loaded.model).values()} == {f"mlx.core.{dtype}", "mlx.core.uint32"}


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_progress_only_rises_and_ends_at_the_files_bytes(tmp_path: Path, dtype: str) -> None:
    config = replace(SMALL, quantization=Q4)
    model = random_model(config)
    write_weights(write_config(tmp_path, config), *halves(unstacked(parameters(model))))
    seen: list[tuple[int, int]] = []
    load(tmp_path, dtype=dtype, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {sum(array.nbytes for array in parameters(model).values())}
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) > 10


@pytest.mark.parametrize("after", [0, 1, 7])
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_cancelled_load_stops_and_says_so(tmp_path: Path, after: int, dtype: str) -> None:
    write_tiny(tmp_path / "tiny", replace(SMALL, quantization=Q4), tokenizer=None)
    asked = iter(range(1000))
    with pytest.raises(WeightsError) as caught:
        load(tmp_path / "tiny", dtype=dtype, cancelled=lambda: next(asked) == after)
    assert caught.value.code == "cancelled"
    assert next(asked) == after + 1
    assert load(tmp_path / "tiny").model(IDS).shape == (1, 6, 96)


def test_a_mistake_in_the_callers_progress_is_not_swallowed(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny", SMALL, tokenizer=None)

    def mistaken(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load(tmp_path / "tiny", on_progress=mistaken)


def test_a_checkpoint_larger_than_its_budget_is_streamed_and_one_that_fits_is_not(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", SMALL, tokenizer=None)
    resident = load(folder, memory=1 << 36)
    assert (resident.plan.mode, resident.streaming) == ("resident", None)
    least = refusal(folder, memory=1 << 20).need_bytes
    loaded = load(folder, memory=least)
    assert loaded.streaming
    assert loaded.plan.mode == "streamed"
    assert loaded.plan.needed_bytes <= loaded.plan.budget_bytes <= least
    assert mx.array_equal(loaded.model(IDS), resident.model(IDS))
    loaded.streaming.close()


def refusal(folder: Path, **options: Any) -> BudgetError:
    with pytest.raises(BudgetError) as caught:
        load(folder, **options)
    assert caught.value.code == "over_budget"
    return caught.value


def test_what_cannot_even_be_streamed_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(tmp_path / "tiny", SMALL, tokenizer=None)
    monkeypatch.setattr(weights, "read_tensors", None)
    monkeypatch.setattr(weights, "default_budget", lambda machine: 1 << 20)
    for refused in (refusal(folder), refusal(folder, memory=1 << 20)):
        assert refused.need_bytes > refused.have_bytes == 1 << 20


def test_a_cast_that_makes_the_weights_larger_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: False)  # Its kernels need no cast.
    config = replace(SMALL, vocab_size=32000, dtype="float16", quantization=Q4)
    folder = write_tiny(tmp_path / "tiny", config, tokenizer=None)
    as_stored, cast = (
        load(folder, dtype=dtype, memory=1 << 36, context=64).plan.parts for dtype in ("float16", "float32")
    )
    assert cast["dense"] > as_stored["dense"]
    assert cast["experts"] > as_stored["experts"]


# ------------------------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("shard_bytes", [5 << 30, 100_000])
def test_a_saved_folder_reads_back_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(weights, "_MAX_SHARD_BYTES", shard_bytes)
    config = replace(SMALL, dtype="bfloat16", quantization=Q4)
    model = random_model(config)
    folder = tmp_path / "deep" / "tiny"
    save(folder, model, config)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes > 1 << 30 else len(files))
    assert all(len(file.read_bytes()) < 2 * shard_bytes for file in files)
    theirs = [name for file in files for name in parsed_elsewhere(file.read_bytes())]
    assert sorted(theirs) == sorted(parameters(model))
    loaded = load(folder)
    assert loaded.config == config
    assert same(parameters(loaded.model), parameters(model))
    assert same(dict(tree_flatten(load_model(folder)[0].parameters())), parameters(model))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == Checkpoint.open(folder).nbytes == config.nbytes()


def test_saving_over_a_folder_is_refused_and_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("keep")
    with pytest.raises(WeightsError) as caught:
        save(tmp_path / "mine", random_model(SMALL), SMALL)
    assert caught.value.code == "exists"
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "note"]


def test_an_interrupted_save_leaves_no_folder_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mx, "save_safetensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "tiny", random_model(SMALL), SMALL)
    assert not (tmp_path / "tiny").exists()
    save(tmp_path / "tiny", random_model(SMALL), SMALL)
    assert load(tmp_path / "tiny").config == SMALL
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


# ------------------------------------------------------------------------------------------------------------------
# Finding


def test_no_name_means_the_demo_model() -> None:
    assert locate(None).parts[-3:] == ("mixtral_mlx", "demo", "model")


def test_a_folder_is_itself_and_a_tilde_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mix").mkdir()
    assert locate(tmp_path / "mix") == tmp_path / "mix"
    assert locate(str(tmp_path / "mix")) == tmp_path / "mix"
    assert locate("~/mix") == tmp_path / "mix"


@pytest.mark.parametrize(
    "name",
    [
        *("missing", "./a/b", "../a/b", "/a/b", "a/b/c", "~nobody-at-all/mix", "x" * 5000, "a/" + "b" * 300),
        *("nul\0byte", "new\nline/mix", "https://huggingface.co/a/b", "a b/c", "\udcff/mix"),
    ],
)
def test_a_name_that_is_neither_folder_nor_repository_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError) as caught:
        locate(name, offline=True)
    assert caught.value.code == "no_model"
    assert caught.value.hint


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mix.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match="is a file") as caught:
        locate(tmp_path / "mix.gguf")
    assert caught.value.code == "not_a_folder"


def test_files_without_metadata_load_as_mlx_writes_them(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny", SMALL, tokenizer=None)
    file = tmp_path / "tiny" / "model-00001-of-00001.safetensors"
    arrays = mx.load(str(file))
    mx.eval(arrays)
    mx.save_safetensors(str(file), cast(dict[str, mx.array], arrays))
    assert b'"__metadata__":null' in file.read_bytes()[:200_000]
    assert load(tmp_path / "tiny").weights_bytes > 0


def test_mlx_keeps_no_more_buffers_than_the_plan_says(tmp_path: Path) -> None:
    loaded = load(write_tiny(tmp_path / "tiny", SMALL, tokenizer=None))
    before = mx.set_cache_limit(loaded.plan.cache_limit_bytes)
    assert before == loaded.plan.cache_limit_bytes
