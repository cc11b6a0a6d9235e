"""Scale pairs, AWQ and SmoothQuant: which channels are paired, and that a search helps where it can and never hurts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from llmx.models.folded import Floats  # noqa: E402
from llmx.models.model import Model, open_model  # noqa: E402
from llmx.models.ops_torch import run  # noqa: E402
from llmx.quant.activations import best_scale, rounded_by_row  # noqa: E402
from llmx.quant.activations import rounded as in_8_bits  # noqa: E402
from llmx.quant.awq import Awq, AwqOptions, clip_limits, integer_groups, search_awq  # noqa: E402
from llmx.quant.calibrate import Calibration  # noqa: E402
from llmx.quant.grid import grid  # noqa: E402
from llmx.quant.inputs import batches  # noqa: E402
from llmx.quant.protocol import Grid  # noqa: E402
from llmx.quant.scale_search import Consumer, Scaling, choose, rounded  # noqa: E402
from llmx.quant.smooth import EXTREMES, Smooth, SmoothOptions, sample, samples, search_smooth  # noqa: E402
from llmx.quant.solve import clipped  # noqa: E402
from llmx.quant.statistics import Inputs, Moments, Statistics, statistics  # noqa: E402
from llmx.quant.transforms import Folds, ScalePair, pairs  # noqa: E402
from llmx.quant.workers import Workers, workers  # noqa: E402

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny-qwen3"
SHARED = ROOT.parent / "shared" / "models"
COLS, ROWS, TOKENS = 256, 96, 600
PAIR = ScalePair("layers.0.ffn_norm", ("layers.0.gate", "layers.0.up"), (COLS,))
INT4 = grid("int4-g128-zp", COLS)
INT8 = grid("int8-channel-sym", COLS)
OUTLIERS = [3, 77, 200]
STATIC = SmoothOptions(inputs={"layers.0.up.weight": "uint8"})


@pytest.fixture
def one() -> Iterator[Workers]:
    with workers(1) as pool:
        yield pool


def shared(name: str) -> Model:
    folder = SHARED / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not here")
    return open_model(folder)


def inputs(outlier: float = 1.0, dead: tuple[int, ...] = ()) -> list[Inputs]:
    """Correlated inputs, three channels of them larger; the second batch is held out."""
    random = np.random.default_rng(4)
    mix = np.eye(COLS) + 0.1 * random.standard_normal((COLS, COLS))
    x = random.standard_normal((TOKENS, COLS)) @ mix
    x[:, OUTLIERS] *= outlier
    x[:, list(dead)] = 0
    parts = torch.from_numpy(x.astype(np.float32)).chunk(2)
    return [Inputs(part, part, held_out=number == 1) for number, part in enumerate(parts)]


def consumer(seed: int, batches: list[Inputs], on: Grid, pool: Workers, weight: Floats | None = None) -> Consumer:
    made = np.random.default_rng(seed).standard_normal((ROWS, COLS)).astype(np.float32) if weight is None else weight
    known = statistics(batches, pool)
    squares = known.fitted.hessian.diagonal().numpy()
    tokens = known.held_out.tokens
    return Consumer("layers.0.up.weight", lambda: made, on, squares, known.held_out, tokens, samples(batches))


def some_calibration(model: Model, count: int = 12, length: int = 48) -> Calibration:
    random = np.random.default_rng(0)
    tokens = random.integers(3, model.architecture.vocab, (count, length))
    return Calibration(batches(tokens.tolist(), 3))


def on(name: str, model: Model, *roles: str) -> dict[str, Grid]:
    """The grid of that name for every matrix, or for those of some roles."""
    matrices = [weight for weight in model.weights() if len(weight.spec.shape) > 1]
    return {w.spec.name: grid(name, w.cols) for w in matrices if not roles or w.spec.role in roles}


# ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_gated_model_has_four_pairs_a_layer() -> None:
    found = pairs(open_model(EXAMPLE).architecture)
    names = [pair.name for pair in found if pair.producer.startswith("layers.1.")]
    assert names == [
        "layers.1.attention_norm -> q, k, v",
        "layers.1.v -> o",
        "layers.1.ffn_norm -> gate, up",
        "layers.1.up -> down",
    ]


def test_up_and_down_are_no_pair_across_an_activation() -> None:
    names = [pair.name for pair in pairs(shared("tiny-gpt2").architecture)]
    assert "layers.0.ffn_norm -> up" in names
    assert not any("down" in name for name in names)


def test_experts_share_the_scales_of_the_norm_with_the_router_and_have_their_own_before_down() -> None:
    architecture = shared("tiny-mixtral").architecture
    by_name = {pair.name: pair for pair in pairs(architecture)}
    assert by_name["layers.0.ffn_norm -> router, expert_gate, expert_up"].shape == (architecture.hidden,)
    own = by_name["layers.0.expert_up -> expert_down"]
    assert own.shape == (architecture.experts, architecture.expert_intermediate)


def test_a_key_value_channel_is_read_by_every_query_head_of_its_group() -> None:
    pair = ScalePair("layers.0.v", ("layers.0.o",), (6,), repeat=2, run=3)
    scales = np.arange(1, 7, dtype=np.float32)
    assert pair.columns(scales).tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert np.array_equal(pair.channels(pair.columns(scales)), scales)
    stacked = np.stack([scales, 2 * scales])
    assert np.array_equal(pair.columns(stacked)[1], 2 * pair.columns(scales))


def test_scales_reach_every_tensor_of_the_pair_biases_included() -> None:
    model = shared("tiny-qwen2")
    pair = next(pair for pair in pairs(model.architecture) if pair.name == "layers.0.v -> o")
    folds = Folds({pair: np.full(pair.shape, 2, np.float32)}).tensors(model)
    assert sorted(folds) == ["layers.0.o.weight", "layers.0.v.bias", "layers.0.v.weight"]


# ── the search on made-up layers ─────────────────────────────────────────────────────────────────────────────────────


def test_outlier_channels_cost_half_of_the_loss_once_they_are_scaled(one: Workers) -> None:
    seen = [consumer(seed, inputs(outlier=30), INT4, one) for seed in (1, 2)]
    plain = Awq(AwqOptions(importance=False))
    candidate, choice = choose(PAIR, None, seen, plain, one)
    assert candidate is not None and choice.label is not None
    assert choice.after < 0.5 * choice.before
    assert candidate.scales[OUTLIERS].min() > 3 * np.median(candidate.scales)


def test_scales_that_fit_importance_alone_gain_less_but_never_lose(one: Workers) -> None:
    seen = [consumer(seed, inputs(outlier=30), INT4, one) for seed in (1, 2)]
    _, choice = choose(PAIR, None, seen, Awq(), one)
    assert choice.after <= choice.before


@pytest.mark.parametrize("method", [Awq(), Awq(AwqOptions(importance=False)), Smooth()], ids=["awq", "plain", "smooth"])
@pytest.mark.parametrize("outlier", [0.01, 1.0, 100.0])
def test_the_loss_never_rises(method: Awq | Smooth, outlier: float, one: Workers) -> None:
    seen = [consumer(seed, inputs(outlier), INT8 if isinstance(method, Smooth) else INT4, one) for seed in (1, 2)]
    candidate, choice = choose(PAIR, None, seen, method, one)
    assert choice.after <= choice.before
    assert (candidate is None) == (choice.label is None)
    columns = None if candidate is None else candidate.scales
    again = [sum(method.loss(c.weight(), c.grid, c, scales) for c in seen) for scales in (None, columns)]
    assert again[1] / again[0] == pytest.approx(choice.after / choice.before, rel=1e-4)


def test_where_nothing_is_better_there_is_no_scaling_and_it_is_counted(one: Workers) -> None:
    weight = np.tile(np.arange(16, dtype=np.float32), (ROWS, COLS // 16))  # on the grid as it is
    _, choice = choose(PAIR, None, [consumer(0, inputs(), INT4, one, weight)], Awq(), one)
    assert choice.label is None and choice.before == choice.after
    assert "no scaling" in choice.line()
    assert Scaling(Folds({}), (choice,)).left_alone == 1


@pytest.mark.parametrize("method", [Awq(), Smooth()], ids=["awq", "smooth"])
def test_dead_and_equal_channels_have_finite_scales(method: Awq | Smooth, one: Workers) -> None:
    weight = np.random.default_rng(0).standard_normal((ROWS, COLS)).astype(np.float32)
    weight[:, 9] = 0
    weight[:, 20] = weight[:, 21]
    nothing = [replace(b, float_=b.float_ * 0, quantized=b.quantized * 0) for b in inputs()]
    for batches_ in (inputs(dead=(5, 6)), inputs(dead=tuple(range(COLS))), nothing):
        seen = consumer(0, batches_, INT4, one, weight)
        for candidate in method.candidates(PAIR, [seen]):
            assert np.isfinite(candidate.scales).all() and (candidate.scales > 0).all()
            assert candidate.scales[[9, 5, 6]].tolist() == [1, 1, 1]
        candidate, choice = choose(PAIR, None, [seen], method, one)
        assert np.isfinite([choice.before, choice.after]).all()


@pytest.mark.parametrize("method", [Smooth(), Smooth(STATIC)], ids=["by row", "static"])
def test_smoothing_shares_the_outliers_between_inputs_and_weights(method: Smooth, one: Workers) -> None:
    seen = [consumer(seed, inputs(outlier=100), INT8, one) for seed in (1, 2)]
    candidate, choice = choose(PAIR, None, seen, method, one)
    assert candidate is not None
    assert choice.after < 0.1 * choice.before
    assert candidate.scales[OUTLIERS].min() > 3 * np.median(candidate.scales)


@pytest.mark.parametrize("name", ["by row", "static"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_smoothing_loss_is_that_of_inputs_rounded_to_8_bits(name: str, scaled: bool, one: Workers) -> None:
    given = inputs(outlier=5)
    seen = consumer(1, given, INT8, one)
    columns = None
    if scaled:
        columns = np.ones(COLS, np.float32)
        columns[OUTLIERS] = 4
    weight, x = seen.weight(), given[1].float_.numpy()
    divided = np.asarray(x if columns is None else x / columns, np.float32)
    assert seen.sample is not None
    fitted = seen.sample.fitted if columns is None else seen.sample.fitted.divided(columns)
    best = best_scale(fitted)
    codes = rounded_by_row(divided) if name == "by row" else in_8_bits(divided, best)
    value = rounded(weight, INT8, columns, None, "fast")
    value = value if columns is None else value * columns
    exact = x @ weight.T
    errors, energies = (np.square(part, dtype=np.float64).sum(1) for part in (codes @ value.T - exact, exact))
    found = energies.sum() * (errors / energies).mean()
    method = Smooth() if name == "by row" else Smooth(STATIC)
    assert method.loss(weight, INT8, seen, columns) == pytest.approx(found, rel=0.1)


def test_a_sample_stands_for_all_rows_and_has_the_ends_of_all() -> None:
    given = inputs(outlier=9)
    everything = np.concatenate([batch.float_.numpy() for batch in given])
    some = sample(given)
    assert some.counts.sum() == pytest.approx(len(everything))
    assert np.array_equal(some.largest, np.abs(everything).max(0))
    assert (some.low, some.high) == (everything.min(), everything.max())
    assert np.abs(some.rows[:EXTREMES]).max(1).min() >= np.abs(some.rows[EXTREMES:]).max()


# ── clipping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_clipping_lowers_the_loss_of_rows_with_useless_outliers_and_of_no_row_raises_it(one: Workers) -> None:
    weight = np.random.default_rng(0).standard_normal((ROWS, COLS)).astype(np.float32)
    weight[::2, 50] = 9
    known = statistics(
        [replace(b, float_=b.float_ * _small(50), quantized=b.quantized * _small(50)) for b in inputs()], one
    )
    options = AwqOptions(importance=False)
    limits = clip_limits("up", torch.from_numpy(weight), known, INT4, options, one)
    assert limits is not None and limits.shape == (ROWS, 2)
    cut = clipped(torch.from_numpy(weight), limits).numpy()
    before, after = (
        _row_losses(weight, rounded(part, INT4, None, None, "fast"), known.held_out) for part in (weight, cut)
    )
    assert (after <= before * 1.0001).all()
    assert after[::2].sum() < 0.9 * before[::2].sum()


def _small(column: int) -> torch.Tensor:
    scale = torch.ones(COLS)
    scale[column] = 1e-3
    return scale


def _row_losses(weight: Floats, value: Floats, moments: Moments) -> np.ndarray:
    error = torch.from_numpy(value - weight)
    return (error @ moments.hessian * error).sum(1).numpy()


def test_queries_keys_and_grids_without_integer_groups_are_not_clipped(one: Workers) -> None:
    known: Statistics = statistics(inputs(), one)
    weight = torch.zeros(2, COLS)
    assert clip_limits("q", weight, known, INT4, AwqOptions(), one) is None
    assert clip_limits("up", weight, known, grid("Q4_K", COLS), AwqOptions(), one) is None
    assert [integer_groups(grid(name, COLS)) for name in ("Q4_0", "int3-g64-sym", "mxfp4", "IQ4_NL")] == [
        *(True, True, False, False)
    ]


# ── the walk ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_outliers(model: Model) -> Model:
    """The same function, but four channels of every norm's output thirty times larger."""
    scales = {}
    for pair in pairs(model.architecture):
        if pair.producer.endswith("norm"):
            scales[pair] = np.ones(pair.shape, np.float32)
            scales[pair][:4] = 1 / 30
    return Folds(scales).applied(model)


def test_a_walk_finds_the_scales_of_every_pair_and_the_model_stays_the_same(one: Workers) -> None:
    model = with_outliers(open_model(EXAMPLE))
    options = AwqOptions(importance=False)
    scaling = search_awq(model, some_calibration(model), on("int4-g32-zp", model), options, one)
    assert [choice.pair for choice in scaling.choices] == list(pairs(model.architecture))
    assert all(choice.after <= choice.before for choice in scaling.choices)
    norms = [choice for choice in scaling.choices if choice.pair.producer.endswith("norm")]
    assert np.mean([choice.after / choice.before for choice in norms]) < 0.7
    tokens = list(range(3, 40))
    wanted, found = run(model, tokens), run(scaling.folds.applied(model), tokens)
    assert np.abs(wanted - found).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["tiny-mixtral", "tiny-gpt2"])
def test_experts_and_plain_mlps_go_through_the_walk(name: str, one: Workers) -> None:
    model = shared(name)
    scaling = search_awq(model, some_calibration(model), on("int4-g32-zp", model), AwqOptions(steps=5), one)
    wanted = {pair: pair.shape[0] if len(pair.shape) > 1 else 1 for pair in pairs(model.architecture)}
    assert {pair: sum(choice.pair == pair for choice in scaling.choices) for pair in wanted} == wanted
    tokens = list(range(3, 40))
    logits, found = run(model, tokens), run(scaling.folds.applied(model), tokens)
    assert np.abs(logits - found).max() < 1e-4 * np.abs(logits).max()


@pytest.mark.parametrize("search", ["awq", "smooth"])
def test_one_thread_and_two_find_the_same_scales(search: str) -> None:
    model = open_model(EXAMPLE)
    results = []
    for threads in (1, 2):
        with workers(threads) as pool:
            if search == "awq":
                results.append(
                    search_awq(model, some_calibration(model), on("int4-g32-sym", model), AwqOptions(steps=6), pool)
                )
            else:
                options = SmoothOptions(alphas=(0.5, 0.3, 0.8))
                results.append(
                    search_smooth(model, some_calibration(model), on("int8-channel-sym", model), options, pool)
                )
    first, second = results
    assert first.choices == second.choices
    assert first.folds.scales.keys() == second.folds.scales.keys()
    assert all(np.array_equal(first.folds.scales[pair], second.folds.scales[pair]) for pair in first.folds.scales)


def test_matrices_that_stay_float_are_left_out(one: Workers) -> None:
    model = open_model(EXAMPLE)
    scaling = search_awq(model, some_calibration(model), on("int4-g32-zp", model, "down"), AwqOptions(steps=4), one)
    assert {choice.pair.consumers[0].rpartition(".")[2] for choice in scaling.choices} == {"down"}
