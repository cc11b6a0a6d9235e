"""FP8 as an encoding: one scale a row or a tensor, chosen by the error it leaves, and what solvers make of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.errors import IntegrityError
from llmx.exporters.encoding import CHUNK, ENCODINGS, FLOAT8_ENCODINGS, SOLVABLE, encoding
from llmx.formats.float8_rows import parts
from llmx.quant.awq import Awq, AwqOptions
from llmx.quant.protocol import Floats
from llmx.quant.scale_search import Consumer, choose
from llmx.quant.solve import EFFORTS, Prepared, solve
from llmx.quant.statistics import Inputs, Statistics, statistics
from llmx.quant.transforms import ScalePair
from llmx.quant.workers import workers
from llmx.validate.steps import block_weights, decode_with_error

CHANNEL, TENSOR = "fp8-channel-float32", "fp8-tensor-float32"
every_name = pytest.mark.parametrize("name", [CHANNEL, TENSOR])


def some_weights(rows: int, cols: int, seed: int = 0) -> Floats:
    random = np.random.default_rng(seed)
    return (random.standard_t(5, (rows, cols)) * random.uniform(0.2, 2, (rows, 1))).astype(np.float32)


def some_importance(cols: int) -> Floats:
    return np.random.default_rng(1).gamma(0.3, size=cols).astype(np.float32)


def of_the_largest(weight: Floats, name: str) -> Floats:
    """The weights on the scale that puts the largest on 448, by torch."""
    largest = np.abs(weight).max() if name == TENSOR else np.abs(weight).max(1, keepdims=True)
    scale = torch.from_numpy(np.asarray(largest / np.float32(448)))
    return ((torch.from_numpy(weight) / scale).to(torch.float8_e4m3fn).float() * scale).numpy()


def lost(weight: Floats, value: Floats, columns: Floats | float = 1.0) -> float:
    return float((columns * (weight.astype(np.float64) - value) ** 2).sum())


@every_name
def test_encoding_is_fitting_rounding_and_packing(name: str) -> None:
    weight, importance, kept = some_weights(6, 512), some_importance(512), encoding(name)
    bound = kept.bound(weight, importance)
    scales = bound.grid(512).fit(weight, importance)
    codes = bound.grid(512).round(weight, scales)
    data = kept.encode(weight, importance)
    assert data.shape == (6, kept.row_bytes(512)) and kept.bits(512) == 8 * data.shape[1] / 512
    assert np.array_equal(kept.pack(scales, codes.reshape(6, 512)), data)
    assert np.array_equal(kept.decode(data, 512), bound.grid(512).decode(scales, codes).reshape(6, 512))


@every_name
def test_the_bytes_are_what_torch_rounds_the_scaled_weights_to(name: str) -> None:
    weight = some_weights(16, 320)
    found = parts(encoding(name).encode(weight), 320)
    scaled = torch.from_numpy(weight * (1 / found.scales)[:, None]).clamp(-448, 448)
    theirs = scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert ((found.bits == theirs) | ((found.bits == 0) & (theirs == 0x80))).all()  # ours has no −0


@every_name
@given(st.integers(1, 300), st.integers(1, 4), st.booleans(), st.integers(-20, 20))
@settings(max_examples=40, deadline=None)
def test_rows_of_any_length_come_back_within_half_a_step(
    name: str, cols: int, rows: int, important: bool, power: int
) -> None:
    kept, weight = encoding(name), some_weights(rows, cols, cols) * np.float32(2.0**power)
    data = kept.encode(weight, some_importance(cols) if important else None)
    _, error = decode_with_error(name, data, weight)
    assert error <= 3.6 and block_weights(name, cols) == cols  # half a step; 448 in the place of up to 448 · 448 / 240
    inside = np.abs(weight) <= 448 * parts(data, cols).scales[:, None]
    step = np.maximum(np.abs(weight) / 8, parts(data, cols).scales[:, None] * 2.0**-9)
    assert (np.abs(kept.decode(data, cols) - weight) <= 0.501 * step)[inside].all()


@every_name
def test_scales_leave_no_more_error_than_those_of_the_largest_weight(name: str) -> None:
    weight, importance = some_weights(64, 768), some_importance(768)
    plain = of_the_largest(weight, name)
    for columns in (None, importance):
        value = encoding(name).decode(encoding(name).encode(weight, columns), 768)
        by = 1.0 if columns is None else columns
        assert lost(weight, value, by) <= (0.95 if name == CHANNEL else 1.003) * lost(weight, plain, by)


def test_importance_moves_the_scale_of_a_tensor_to_where_it_loses_less() -> None:
    kept, worse, better = encoding(TENSOR), 0, 0
    for seed in range(8):
        weight = some_weights(16, 64, seed)
        importance = np.random.default_rng(seed).gamma(0.1, size=64).astype(np.float32) + np.float32(1e-6)
        weighed, plain = (lost(weight, kept.decode(kept.encode(weight, c), 64), importance) for c in (importance, None))
        worse, better = worse + (weighed > plain), better + (weighed < plain)
    assert worse == 0 and better > 3


def test_a_tensor_has_one_scale_and_a_channel_its_own() -> None:
    weight = some_weights(8, 256)
    assert len(set(parts(encoding(TENSOR).encode(weight), 256).scales.tolist())) == 1
    assert len(set(parts(encoding(CHANNEL).encode(weight), 256).scales.tolist())) == 8
    assert not encoding(CHANNEL).shared and encoding(CHANNEL).bound(weight) is encoding(CHANNEL)
    assert [name for name, kept in ENCODINGS.items() if kept.shared] == [TENSOR]


@every_name
def test_any_cut_of_rows_makes_the_same_bytes_once_it_is_bound(name: str) -> None:
    cols, importance = 1024, some_importance(1024)
    rows = 2 * CHUNK // cols + 3
    weight = some_weights(rows, cols)
    kept = encoding(name).bound(weight, importance)
    whole = kept.encode(weight, importance)
    pieces = [kept.encode(weight[start : start + 7], importance) for start in range(0, rows, 7)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(encoding(name).encode(weight, importance), whole)


@every_name
def test_zeros_stay_zeros(name: str) -> None:
    weight = some_weights(3, 64)
    weight[1] = 0
    assert not encoding(name).decode(encoding(name).encode(weight), 64)[1].any()
    assert not encoding(name).decode(encoding(name).encode(np.zeros_like(weight)), 64).any()


@every_name
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_weights_that_cannot_be_kept_are_refused(name: str, value: float) -> None:
    weight = some_weights(2, 64)
    weight[1, 3] = value
    for refuse in (encoding(name).encode, encoding(TENSOR).bound):
        with pytest.raises(IntegrityError, match=r"NaN or infinity|largest that"):
            refuse(weight)


def test_a_broken_importance_is_refused() -> None:
    with pytest.raises(IntegrityError, match="64 columns"):
        encoding(CHANNEL).encode(some_weights(2, 64), np.ones(32, np.float32))


@every_name
def test_a_flipped_bit_of_an_exponent_is_far_off_the_grid(name: str) -> None:
    weight = some_weights(4, 64)
    data = encoding(name).encode(weight)
    place = int(np.abs(weight[2]).argmax())
    data[2, place] ^= 1 << 5  # an exponent smaller by four
    assert decode_with_error(name, data, weight)[1] > 5


# ── solvers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def seen(cols: int = 192, tokens: int = 600) -> Statistics:
    """Correlated inputs with a few large channels, the last of four batches held out."""
    random = np.random.default_rng(5)
    mix = (np.eye(cols) + random.standard_normal((cols, cols)) / np.sqrt(cols)) * np.exp(random.normal(0, 1, cols))
    made = []
    for number in range(4):
        x = torch.from_numpy((random.standard_normal((tokens, cols)) @ mix).astype(np.float32))
        made.append(Inputs(x, x, held_out=number == 3))
    with workers(1) as pool:
        return statistics(made, pool)


@every_name
def test_a_solver_loses_less_on_held_out_tokens_than_rounding(name: str) -> None:
    assert name in SOLVABLE and name in FLOAT8_ENCODINGS
    kept, weight = encoding(name), torch.from_numpy(some_weights(48, 192))
    with workers(1) as pool:
        options = replace(EFFORTS["balanced"], repairs=False)
        found = solve(weight, Prepared(seen()), kept.grid(192), options, pool)
    print(f"FP8 {name}: {found.candidates}")
    assert found.method == "gptq" and found.candidates["gptq"] < 0.8 * found.candidates["rtn"]
    data = kept.pack(found.scales, found.codes.reshape(48, 192))
    assert np.allclose(kept.decode(data, 192), found.value.numpy(), rtol=1e-6)


@every_name
def test_awq_finds_scales_that_lose_less_on_held_out_tokens(name: str) -> None:
    known, weight = seen(), some_weights(48, 192)
    squares = known.fitted.hessian.diagonal().numpy()
    grid = encoding(name).grid(192)
    consumer = Consumer("layers.0.q.weight", lambda: weight, grid, squares, known.held_out, known.held_out.tokens)
    pair = ScalePair("layers.0.attention_norm", ("layers.0.q",), (192,))
    with workers(1) as pool:
        candidate, choice = choose(pair, None, [consumer], Awq(AwqOptions()), pool)
    print(f"FP8 {choice.line()}")
    assert candidate is not None and choice.after < choice.before
