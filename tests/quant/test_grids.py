"""The grids of integer groups and small floats: their error, what they never do, and their names."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.errors import UnsupportedError
from llmx.formats.ggml_decode import decode
from llmx.formats.ggml_packers import pack
from llmx.formats.microfloats import E2M1_DOUBLED, E4M3, E4M3_BITS, UE4M3
from llmx.quant.compiled import compiled
from llmx.quant.grid import FACTORIES, GRIDS, grid
from llmx.quant.microscaling import MxGrid
from llmx.quant.nonlinear import nearest_e2m1, nearest_e4m3
from llmx.quant.protocol import EFFORTS, Floats, Grid
from llmx.quant.stores import STORES

ROWS, COLS = 16, 512
INTEGERS = (
    *(
        "int4-g128-sym",
        "int4-g32-zp",
        "int4-g64-pos",
        "int8-channel-sym",
        "int8-g128-zp",
        "int2-g16-zp",
        "int3-g32-sym",
    ),
    *("int8-channel-zp", "int4-g256-zp-bfloat16", "int8-g16-pos-float32"),
)
FLOATS = ("MXFP4", "NVFP4", "nvfp4", "fp8-channel-float32", "fp8-tensor-float32")
NAMES = (*INTEGERS, *FLOATS)
every_name = pytest.mark.parametrize("name", NAMES)


def weights(seed: int = 0, rows: int = ROWS, cols: int = COLS) -> Floats:
    random = np.random.default_rng(seed)
    return (random.standard_t(6, (rows, cols)) * random.uniform(0.5, 2, (rows, 1))).astype(np.float32)


def importance(seed: int = 1, cols: int = COLS) -> Floats:
    return np.exp(np.random.default_rng(seed).normal(0, 1, cols)).astype(np.float32)


def again(kind: Grid, weight: Floats, columns: Floats | None = None, effort: str = "balanced") -> Floats:
    scales = kind.fit(weight, columns, effort)  # type: ignore[arg-type]
    return kind.decode(scales, kind.round(weight, scales)).reshape(weight.shape)


def lost(weight: Floats, decoded: Floats, columns: Floats | float = 1.0) -> float:
    return float((columns * (weight.astype(np.float64) - decoded) ** 2).sum())


def plain(name: str, weight: Floats) -> Floats:
    """The weights as plain rounding gives them: each group's largest weight on the largest level, no search."""
    kind = grid(name, weight.shape[1])
    groups = weight.reshape(-1, kind.size)
    levels = kind.levels[kind.allowed[0] : kind.allowed[1] + 1]
    largest, low = np.abs(groups).max(1, keepdims=True), np.float32(0)
    scale = largest / np.float32(min(-levels[0], levels[-1]) or 1)
    if kind.name in ("MXFP4", "mxfp4"):  # OCP MX v1.0, section 6.3
        scale = 2.0 ** (np.floor(np.log2(largest)) - 3)
    elif kind.name in ("NVFP4", "nvfp4"):
        tensor = np.abs(weight).max() / (12 * 224)
        scale = tensor / 2 * UE4M3[np.abs(largest / tensor / 6 - UE4M3).argmin(1)][:, None]
    elif kind.name == "fp8-tensor-float32":
        scale = np.abs(weight).max() / np.float32(448)
    elif "zp" in kind.name:
        low = np.minimum(groups.min(1, keepdims=True), 0)
        scale = (np.maximum(groups.max(1, keepdims=True), 0) - low) / levels[-1]
        low = np.rint(low / scale) * scale
    place = np.searchsorted((levels[1:] + levels[:-1]) / 2, (groups - low) / scale)
    return (levels[place] * scale + low).reshape(weight.shape).astype(np.float32)


@every_name
def test_the_error_is_below_that_of_plain_rounding(name: str) -> None:
    weight, kind = weights(), grid(name, COLS)
    share = 0.99 if name.startswith("int") else 1.0
    for effort in EFFORTS[1:]:
        assert lost(weight, again(kind, weight, None, effort)) <= share * lost(weight, plain(name, weight))


@every_name
def test_importance_lowers_the_error_it_weighs(name: str) -> None:
    weight, columns, kind = weights(rows=64), importance(), grid(name, COLS)
    if name != "fp8-tensor-float32":
        assert lost(weight, again(kind, weight, columns), columns) < lost(weight, again(kind, weight), columns)


@every_name
def test_more_effort_does_not_raise_the_error(name: str) -> None:
    weight, kind = weights(3, rows=64), grid(name, COLS)
    fast, balanced, best = (lost(weight, again(kind, weight, None, effort)) for effort in EFFORTS)
    assert best <= balanced * 1.01  # a little: the search counts small weights more than this sum does
    assert balanced <= fast * 1.01


@every_name
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-4, 6))
def test_a_power_of_two_goes_through(name: str, seed: int, power: int) -> None:
    weight, kind = weights(seed, rows=4), grid(name, COLS)
    factor = np.float32(2.0**power)
    assert np.array_equal(again(kind, weight * factor), again(kind, weight) * factor)


@every_name
def test_zero_rows_stay_zero(name: str) -> None:
    weight, kind = weights(rows=3), grid(name, COLS)
    weight[1] = 0
    assert not again(kind, weight)[1].any()
    assert not again(kind, np.zeros_like(weight)).any()


@every_name
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e-8, 1e3, 1e5])
def test_tiny_and_large_weights_never_become_nan(name: str, size: float) -> None:
    kind = grid(name, COLS)
    weight = np.clip(weights(rows=4) * size, -kind.limit(), kind.limit()).astype(np.float32)
    decoded = again(kind, weight, importance())
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - weight).max() <= max(np.abs(weight).max(), 16 * 2**-24)


@every_name
def test_a_weight_at_the_limit_is_stored(name: str) -> None:
    kind = grid(name, COLS)
    weight = weights(rows=2)
    for sign in (1, -1):
        weight[1, 7] = np.float32(sign * kind.limit())
        assert again(kind, weight)[1, 7] == pytest.approx(weight[1, 7], rel=0.5)


@every_name
def test_rows_fitted_in_parts_are_the_whole_once_the_grid_knows_the_tensor(name: str) -> None:
    weight = weights(rows=7)
    kind = grid(name, COLS).bound(weight)
    parts = [again(kind, weight[cut], importance()) for cut in (slice(0, 1), slice(1, 5), slice(5, 7))]
    assert np.array_equal(np.concatenate(parts), again(kind, weight, importance()))
    assert np.array_equal(again(kind, weight), again(grid(name, COLS), weight))


@every_name
def test_rounding_finds_the_nearest_level_of_every_weight(name: str) -> None:
    weight, kind = weights(rows=2), grid(name, COLS)
    scales = kind.fit(weight)
    scale, offset = kind.expand(scales)
    levels = kind.levels[kind.allowed[0] : kind.allowed[1] + 1]
    values = scale[..., None] * levels + (0 if offset is None else offset[..., None])
    wanted = np.abs(weight.reshape(*scale.shape, -1, 1) - values[:, :, None]).min(-1)
    got = np.abs(weight.reshape(-1) - kind.decode(scales, kind.round(weight, scales)).reshape(-1))
    assert got == pytest.approx(wanted.reshape(-1), abs=1e-5)


@pytest.mark.parametrize(
    "name", ["int4-channel-zp", "int8-channel-sym", "int4-channel-sym", "fp8-channel-float32", "fp8-tensor-float32"]
)
def test_a_row_of_any_length_is_one_group(name: str) -> None:
    for cols in (1, 30, 67):
        weight = weights(rows=5, cols=cols)
        columns = importance(cols=cols)
        decoded = again(grid(name, cols), weight, columns)
        assert lost(weight, decoded) <= 0.05 * float((weight**2).sum())


def test_a_zero_point_beats_none_on_one_sided_weights() -> None:
    weight = np.abs(weights())
    assert lost(weight, again(grid("int4-g32-zp", COLS), weight)) < 0.4 * lost(
        weight, again(grid("int4-g32-sym", COLS), weight)
    )


def test_positive_scales_are_positive_and_symmetric_ones_of_either_sign() -> None:
    weight = weights()
    assert (grid("int4-g64-pos", COLS).fit(weight).d > 0).all()
    assert (grid("int4-g64-sym", COLS).fit(weight).d < 0).any()
    assert (grid("fp8-channel-float32", COLS).fit(weight).d > 0).all()


def test_scales_are_values_that_their_store_holds() -> None:
    for store, mask in (("float16", 0x1FFF), ("bfloat16", 0xFFFF), ("float32", 0)):
        suffix = "" if store == "float16" else f"-{store}"
        d = grid(f"int4-g32-zp{suffix}", COLS).fit(weights()).d
        assert not (d.view(np.uint32) & np.uint32(mask)).any()
        assert np.array_equal(STORES[store].rounded(d), d)
    wild = np.array([1e38, -1e38, 7e4], np.float32)
    assert np.array_equal(STORES["float16"].rounded(wild), np.array([65504, -65504, 65504], np.float32))


def test_mxfp4_blocks_hold_what_the_grid_says_and_nvfp4_blocks_all_but_the_tensors_scale() -> None:
    weight = weights()
    for name in ("MXFP4", "NVFP4"):
        kind = grid(name, COLS)
        scales = kind.fit(weight)
        codes = kind.round(weight, scales)
        data = pack(name, scales, codes).reshape(ROWS, -1)
        tensor = scales.d[0] if name == "NVFP4" else 1
        assert np.allclose(decode(name, data) * tensor, kind.decode(scales, codes).reshape(weight.shape), rtol=1e-6)
    assert isinstance(GRIDS["MXFP4"], MxGrid)


def test_the_nearest_small_floats_are_the_nearest() -> None:
    @compiled
    def nearest(values, e2m1, e4m3):
        for i in range(values.size):
            e2m1[i] = nearest_e2m1(values[i])
            e4m3[i] = nearest_e4m3(values[i])

    values = np.concatenate([np.linspace(0, 15, 3001), np.geomspace(1e-4, 600, 5001), np.abs(E4M3)]).astype(np.float32)
    e2m1, e4m3 = np.empty_like(values), np.empty_like(values)
    nearest(values, e2m1, e4m3)
    for got, levels in ((e2m1, E2M1_DOUBLED), (e4m3, E4M3)):
        assert np.isin(got, levels).all()
        wanted = np.concatenate([np.abs(part[:, None] - levels).min(1) for part in np.array_split(values, 16)])
        assert np.abs(values - got) == pytest.approx(wanted, abs=1e-6)


def test_the_codes_of_fp8_are_the_bytes_of_torch() -> None:
    torch = pytest.importorskip("torch")
    weight, kind = weights(), grid("fp8-channel-float32", COLS)
    scales = kind.fit(weight)
    stored = E4M3_BITS[kind.round(weight, scales)].reshape(weight.shape)
    theirs = torch.from_numpy(weight * (1 / scales.d)[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    theirs = theirs.view(torch.uint8).numpy()
    assert ((stored == theirs) | ((stored == 0) & (theirs == 0x80))).all()  # ours has no −0


def test_every_name_makes_its_grid() -> None:
    for name in FACTORIES:
        assert grid(name, 512).name == name
    assert {name for name in FACTORIES if name.isupper()} == {*GRIDS, "NVFP4"}


def test_a_name_that_is_none_and_a_row_of_no_whole_groups_are_refused_with_the_choices() -> None:
    with pytest.raises(UnsupportedError, match="int5-g32-sym") as told:
        grid("int5-g32-sym", 512)
    assert all(word in str(told.value.fix) for word in ("Q4_K", "nvfp4", "channel", "zp", "bfloat16"))
    with pytest.raises(UnsupportedError, match="blocks of 128"):
        grid("int4-g128-sym", 192)
