"""Canonical weights: bits and values exactly as stored, every tensor accounted for, memory handed back."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmx.errors import IntegrityError, UnsupportedError
from llmx.formats.safetensors import write_safetensors
from llmx.models.families import describe
from llmx.models.model import FLOATS, Model, check_finite, open_model

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "models"

LLAMA = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "phi3": {**LLAMA, "model_type": "phi3", "num_key_value_heads": 1},
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 1, "num_local_experts": 3},
    "qwen3_moe": {
        **LLAMA,
        "model_type": "qwen3_moe",
        "num_key_value_heads": 1,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 5,
        "mlp_only_layers": [0],
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 20, "n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 16},
}
FUSED = ["model.embed_tokens.weight", "model.layers.1.mlp.experts.gate_up_proj"]
Arrays = dict[str, np.ndarray]


def _stored_shapes(config: Mapping[str, Any], names: list[str] | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes in the checkpoint, worked out from the canonical tensors independently of the code under test."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in describe(config, names).tensors:
        shape = spec.shape[1:] if len(spec.source.names) > 1 else spec.shape
        axis = len(shape) - (2 if len(shape) > 1 else 1)
        if spec.source.rows is not None:
            shape = tuple(spec.source.rows[1] if n == axis else size for n, size in enumerate(shape))
        shape = shape[::-1] if spec.source.transpose else shape
        for name in spec.source.names:
            shapes[name] = tuple(np.maximum(shapes.get(name, shape), shape).tolist())
    return shapes


def _random_bits(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    kinds: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "F32": lambda x: x.view(np.uint32),
        "F16": lambda x: x.astype(np.float16).view(np.uint16),
        "BF16": lambda x: (x.view(np.uint32) >> 16).astype(np.uint16),
    }
    return kinds[dtype](values)


def _values(bits: np.ndarray, dtype: str) -> np.ndarray:
    """float32 of stored bits, by struct arithmetic that has nothing in common with the reader's."""
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return np.ldexp(bits.astype(np.uint64), 0 if dtype == "F32" else 16).astype(np.uint32).view(np.float32)


def _write(folder: Path, config: Mapping[str, Any], arrays: Arrays, dtype: str = "BF16") -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    stored = [(name, dtype, bits.shape, [np.ascontiguousarray(bits).data.cast("B")]) for name, bits in arrays.items()]
    write_safetensors(folder / "model.safetensors", stored)
    return folder


def _arrays(config: Mapping[str, Any], dtype: str = "BF16", names: list[str] | None = None) -> Arrays:
    shapes = _stored_shapes(config, names)
    return {name: _random_bits(shape, dtype, seed) for seed, (name, shape) in enumerate(shapes.items())}


def _expected(model: Model, arrays: Arrays, name: str) -> np.ndarray:
    spec = model.weight(name).spec
    parts = [arrays[source].T if spec.source.transpose else arrays[source] for source in spec.source.names]
    whole = np.stack(parts) if len(parts) > 1 else parts[0]
    if spec.source.rows is not None:
        begin, end = spec.source.rows
        whole = whole[begin:end] if whole.ndim < 3 else whole[:, begin:end]
    assert whole.shape == spec.shape
    return whole.reshape(-1, spec.shape[-1]) if whole.ndim > 1 else whole.reshape(1, -1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_read_bit_for_bit(name: str, dtype: str, tmp_path: Path) -> None:
    arrays = _arrays(CONFIGS[name], dtype)
    model = open_model(_write(tmp_path, CONFIGS[name], arrays, dtype))
    for weight in model.weights():
        bits = _expected(model, arrays, weight.spec.name)
        assert (weight.rows, weight.cols, weight.dtype) == (*bits.shape, dtype)
        assert np.array_equal(weight.read_raw().view(bits.dtype), bits)
        values = weight.read()
        assert values.dtype == np.float32 and values.flags.c_contiguous and values.flags.writeable
        assert np.array_equal(values, _values(bits, dtype))
        assert weight.read_raw().dtype == (np.float32 if dtype == "F32" else np.uint16)


@pytest.mark.parametrize("name", CONFIGS)
def test_any_range_of_rows_is_that_part_of_the_whole(name: str, tmp_path: Path) -> None:
    model = open_model(_write(tmp_path, CONFIGS[name], _arrays(CONFIGS[name])))
    for weight in model.weights():
        whole = weight.read()
        cuts = sorted({0, 1, weight.rows // 3, weight.rows // 2 + 1, weight.rows})
        for start in cuts:
            for stop in cuts:
                if start <= stop <= weight.rows:
                    assert np.array_equal(weight.read(start, stop), whole[start:stop])
                    weight.release(start, stop)


def test_fused_experts_are_sliced_expert_by_expert(tmp_path: Path) -> None:
    config = CONFIGS["qwen3_moe"]
    arrays = _arrays(config, names=FUSED)
    assert arrays["model.layers.1.mlp.experts.gate_up_proj"].shape == (3, 10, 8)
    model = open_model(_write(tmp_path, config, arrays))
    for part in ("gate", "up", "down"):
        weight = model.weight(f"layers.1.expert_{part}.weight")
        assert np.array_equal(weight.read_raw(), _expected(model, arrays, weight.spec.name))
        assert np.array_equal(weight.read_raw(3, 12), weight.read_raw()[3:12])


def test_reads_from_many_threads_agree(tmp_path: Path) -> None:
    model = open_model(_write(tmp_path, CONFIGS["mixtral"], _arrays(CONFIGS["mixtral"])))
    weights = list(model.weights()) * 20

    def read(weight: Any) -> bytes:
        data = weight.read().tobytes()
        weight.release()
        return data

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, weights)) == [read(weight) for weight in weights]


def _drop(arrays: Arrays) -> None:
    del arrays["model.layers.0.self_attn.q_proj.weight"], arrays["model.norm.weight"]


def _add(arrays: Arrays) -> None:
    arrays["model.layers.2.mlp.up_proj.weight"] = arrays["model.layers.1.mlp.up_proj.weight"]
    arrays["model.layers.0.self_attn.q_proj.bias"] = arrays["model.norm.weight"]


def _reshape(arrays: Arrays) -> None:
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        arrays[name] = arrays[name].T


def _all_of_it(arrays: Arrays) -> None:
    _reshape(arrays)
    _add(arrays)
    _drop(arrays)


WRONG: dict[str, tuple[Callable[[Arrays], None], list[str]]] = {
    "missing tensors": (
        _drop,
        ["q_proj.weight is missing (needed for layers.0.q.weight)", "model.norm.weight is missing"],
    ),
    "left-over tensors": (_add, ["layers.2.mlp.up_proj.weight is left over", "q_proj.bias is left over"]),
    "wrong shapes": (_reshape, ["lm_head.weight has shape [8, 20], [20, 8] is expected", "up_proj.weight has shape"]),
    "all of these at once": (_all_of_it, ["is missing", "is left over", "has shape"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_do_not_fit_are_all_listed(name: str, tmp_path: Path) -> None:
    spoil, messages = WRONG[name]
    arrays = _arrays(LLAMA)
    spoil(arrays)
    with pytest.raises(IntegrityError) as caught:
        open_model(_write(tmp_path, LLAMA, arrays))
    assert len(caught.value.problems) == (6 if len(messages) == 3 else 2)
    for message in messages:
        assert message in str(caught.value)


def test_a_fused_tensor_of_a_wrong_size_is_refused(tmp_path: Path) -> None:
    arrays = _arrays(CONFIGS["phi3"])
    name = "model.layers.0.self_attn.qkv_proj.weight"
    arrays[name] = np.concatenate([arrays[name], arrays[name][:1]])
    with pytest.raises(IntegrityError, match=r"has shape \[17, 8\], \[16, 8\] is expected"):
        open_model(_write(tmp_path, CONFIGS["phi3"], arrays))


def test_a_missing_expert_is_refused_by_name(tmp_path: Path) -> None:
    arrays = _arrays(CONFIGS["mixtral"])
    del arrays["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    with pytest.raises(IntegrityError, match=r"experts\.2\.w2\.weight is missing \(needed for layers\.1\.expert_down"):
        open_model(_write(tmp_path, CONFIGS["mixtral"], arrays))


def test_tensors_that_are_known_to_be_redundant_are_passed_over(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    arrays = _arrays(config)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = arrays["model.norm.weight"]
    model = open_model(_write(tmp_path, config, arrays))
    assert not model.has("head.weight") and model.has("embedding.weight")


def test_masks_of_old_gpt2_checkpoints_and_names_without_prefix_are_accepted(tmp_path: Path) -> None:
    arrays = {name.removeprefix("transformer."): bits for name, bits in _arrays(CONFIGS["gpt2"]).items()}
    arrays["h.0.attn.bias"] = arrays["ln_f.bias"]
    model = open_model(_write(tmp_path, CONFIGS["gpt2"], arrays))
    assert np.array_equal(model.weight("layers.1.v.bias").read_raw()[0], arrays["h.1.attn.c_attn.bias"][16:])


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    arrays = _arrays(config)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    arrays["lm_head.weight"][-1, -1] ^= 1
    with pytest.raises(IntegrityError, match="set tie_word_embeddings to false"):
        open_model(_write(tmp_path, config, arrays))


def test_weights_in_integers_are_refused(tmp_path: Path) -> None:
    arrays = {name: bits.astype(np.int8) for name, bits in _arrays(LLAMA).items()}
    with pytest.raises(UnsupportedError, match=r"model\.embed_tokens\.weight is stored as I8"):
        open_model(_write(tmp_path, LLAMA, arrays, dtype="I8"))


def test_experts_of_different_dtypes_are_refused(tmp_path: Path) -> None:
    arrays = _arrays(CONFIGS["mixtral"])
    folder = _write(tmp_path, CONFIGS["mixtral"], arrays)
    odd = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    stored = [(name, "F16" if name == odd else "BF16", bits.shape, [bits.tobytes()]) for name, bits in arrays.items()]
    write_safetensors(folder / "model.safetensors", stored)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.expert_gate\.weight are stored as BF16, F16"):
        open_model(folder)


BAD_BITS = {"F32": [0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF], "F16": [0x7C00, 0xFC00, 0x7C01, 0xFFFF]}
BAD_BITS["BF16"] = [0x7F80, 0xFF80, 0x7F81, 0xFFFF]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["layers.1.q.weight", "layers.0.expert_down.weight", "final_norm.weight"])
def test_the_first_bad_value_is_found_wherever_it_is(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmx.models.model.SCAN_BYTES", 64)  # many chunks
    config = CONFIGS["mixtral"]
    clean = _arrays(config, dtype)
    model = open_model(_write(tmp_path, config, clean, dtype))
    size = model.weight(name).rows * model.weight(name).cols
    scan = check_finite(model.weight(name))
    assert scan.first_bad is None and scan.largest == np.abs(model.weight(name).read()).max()
    source = model.weight(name).spec.source.names
    for number, bits in enumerate(BAD_BITS[dtype]):
        place = (size - 1) * number // 3
        spoiled = {**clean, **{key: clean[key].copy() for key in source}}
        each = size // len(source)
        spoiled[source[place // each]].reshape(-1)[place % each] = bits
        spoiled[source[-1]].reshape(-1)[-1] = bits  # a later one must not hide it
        model = open_model(_write(tmp_path, config, spoiled, dtype))
        assert check_finite(model.weight(name)).first_bad == place


def test_the_scan_of_a_transposed_slice_counts_in_canonical_order(tmp_path: Path) -> None:
    arrays = _arrays(CONFIGS["gpt2"])
    arrays["transformer.h.0.attn.c_attn.weight"][3, 8 + 5] = 0x7F80  # stored [in, out]: row 5, column 3 of k
    model = open_model(_write(tmp_path, CONFIGS["gpt2"], arrays))
    assert check_finite(model.weight("layers.0.k.weight")).first_bad == 5 * 8 + 3
    assert check_finite(model.weight("layers.0.q.weight")).first_bad is None


@pytest.mark.parametrize("value", [-70000.0, 70000.0])
def test_the_scan_tells_values_that_overflow_f16(value: float, tmp_path: Path) -> None:
    arrays = _arrays(LLAMA, "F32")
    arrays["model.norm.weight"][2] = np.array(value, np.float32).view(np.uint32)
    model = open_model(_write(tmp_path, LLAMA, arrays, "F32"))
    scan = check_finite(model.weight("final_norm.weight"))
    assert scan.first_bad is None and scan.largest == 70000.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
def test_memory_does_not_follow_the_model(tmp_path: Path) -> None:
    config = {**LLAMA, "vocab_size": 1 << 16, "hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 256}
    arrays = {name: np.zeros(shape, np.uint16) for name, shape in _stored_shapes(config).items()}
    model = open_model(_write(tmp_path, config, arrays))
    del arrays
    tracemalloc.start()
    try:
        for weight in model.weights():
            assert check_finite(weight).first_bad is None
            for start in range(0, weight.rows, 4096):
                weight.read(start, min(start + 4096, weight.rows))
        _, highest = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert model.checkpoint.nbytes > 64 << 20
    assert 4 << 20 < highest < 20 << 20
    assert not any(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def _shared_models() -> list[Path]:
    return [*sorted(path.parent for path in SHARED.glob("*/config.json")), ROOT / "examples" / "tiny-qwen3"]


@pytest.mark.parametrize("folder", _shared_models(), ids=lambda folder: folder.name)
def test_trained_checkpoints_open_whole_and_finite(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not here")
    model = open_model(folder)
    assert sum(weight.rows * weight.cols for weight in model.weights()) * 2 <= model.checkpoint.nbytes * 2
    used = {name for weight in model.weights() for name in weight.spec.source.names}
    assert used == set(model.checkpoint.tensors)
    assert all(check_finite(weight).first_bad is None for weight in model.weights())
