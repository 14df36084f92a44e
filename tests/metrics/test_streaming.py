"""Chunks change nothing: streamed sums against one chunk, and both against sums in plain Python."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.metrics import curves
from mismatch_probe.metrics.accumulate import accumulate, as_sums
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.chunks import usable
from mismatch_probe.metrics.paired import paired_ratio
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.metrics.sums import BinnedSums, CentredSums
from mismatch_probe.types import PairArrays

TOLERANCE = 1e-12  # of the mean absolute term


def cut(pair: PairArrays, bounds: list[int]) -> list[PairArrays]:
    """Chunks that begin at the sequences 0 and `bounds`; some may be empty."""
    edges = [0, *np.searchsorted(pair.sequence, sorted(bounds)).tolist(), len(pair.sequence)]
    rows = [slice(start, stop) for start, stop in pairwise(edges)]
    names = ("rollout_logprob", "trainer_logprob", "sequence", "position")
    return [
        replace(
            pair,
            **{name: getattr(pair, name)[some] for name in names},
            columns={name: values[some] for name, values in pair.columns.items()},
            usable=None if pair.usable is None else pair.usable[some],
        )
        for some in rows
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[float], list[float], list[int], list[int]]:
    """Lengths, b, d, prompts and cuts: gaps from FP32-sized to a broken engine's, constant ones, non-finite ones."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=12))
    n = sum(lengths)
    b = draw(st.lists(st.floats(-30, 0), min_size=n, max_size=n))
    scale = 10.0 ** draw(st.integers(-9, 2))
    wild = st.sampled_from([math.nan, math.inf, -math.inf, 30.0, 800.0, -2000.0, 0.0])
    usual = st.floats(-1, 1).map(lambda x: x * scale if abs(x) > 1e-9 else 0.0)  # squares must not underflow
    kinds = {"usual": usual, "some wild": st.one_of(usual, usual, wild), "constant": st.just(draw(usual))}
    d = draw(st.lists(kinds[draw(st.sampled_from(sorted(kinds)))], min_size=n, max_size=n))
    prompts = draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths)))
    cuts = draw(st.lists(st.integers(0, len(lengths)), max_size=6))
    return lengths, b, d, list(np.unique(prompts, return_inverse=True)[1]), cuts


def close(got: float | None, want: float | None, *, rel: float) -> bool:
    return got is want if want is None else got == pytest.approx(want, rel=rel, abs=1e-14)


def allowed(key: str, value: float, pair: PairArrays) -> float:
    """TOLERANCE times the mean absolute term of a metric, in the metric's own unit."""
    d = pair.trainer_logprob - pair.rollout_logprob
    d = d[np.isfinite(d)]
    if key == "kl_k1":
        return TOLERANCE * float(np.abs(d).mean())
    if key == "mean_ratio":  # its terms are ρ − 1
        return TOLERANCE * (abs(value) + 1)
    if key == "chi2_token":
        return TOLERANCE * (abs(value) + 2)
    if key == "pearson_prob":  # its terms are divided by the standard deviations
        some = np.isfinite(pair.trainer_logprob - pair.rollout_logprob)
        sides = [np.exp(side[some]) for side in (pair.trainer_logprob, pair.rollout_logprob)]
        return TOLERANCE * 2 * max(float((side**2).mean() / side.var()) for side in sides)
    if key == "std_prob_diff":  # of its square, as √(v + e) − √v ≤ √e
        gap = np.exp(pair.trainer_logprob) - np.exp(pair.rollout_logprob)
        mean_square = float(np.mean(gap[np.isfinite(gap)] ** 2))
        return TOLERANCE * mean_square / value if value > 1e-6 * math.sqrt(mean_square) else 1e-6 * mean_square**0.5
    if key in ("tail_slope", "logprob_slope", "logprob_offset"):  # of a line, and of what it is a line through
        b = pair.rollout_logprob[np.isfinite(pair.rollout_logprob)]
        x = -np.expm1(np.minimum(b, 30.0)) if key == "tail_slope" else b
        spread = float(x.std()) or 1.0
        size = 1 + float(np.abs(d).max(initial=0)) / spread + abs(value)
        return TOLERANCE * 10 * size * (1 + float(np.abs(x).max(initial=0)) / spread) ** 2
    if key.startswith("temperature"):  # its terms are of any sign; the columns are those of `entropies`
        side = pair.trainer_logprob if key == "temperature_trainer_side" else pair.rollout_logprob
        entropy = pair.columns["entropy" if key == "temperature_trainer_side" else "rollout_entropy"]
        x, gap = side + entropy, pair.trainer_logprob - pair.rollout_logprob
        some = np.isfinite(x) & np.isfinite(gap)
        x, gap = x[some], gap[some]
        size = float((np.abs(x * gap)).sum() / (x * x).sum())
        return TOLERANCE * 10 * (value + max(1.0, value**2) * size)
    return TOLERANCE * abs(value)


def entropies(pair: PairArrays) -> PairArrays:
    """The pair with an entropy of the trainer at every token and one of the rollout at some."""
    place = np.arange(len(pair.position))
    rollout = np.where(place % 3 == 0, np.nan, 1.5 + np.sin(5.0 * place))
    return replace(pair, columns={"entropy": 1.5 + np.cos(3.0 * place), "rollout_entropy": rollout})


@given(cases())
@settings(max_examples=150, deadline=None)
def test_streamed_is_in_memory(make_pair: Any, case: Any) -> None:
    lengths, b, d, prompts, cuts = case
    pair = entropies(make_pair(b, d, lengths, prompts))
    streamed, whole = accumulate(cut(pair, cuts)), as_sums(pair)
    got, want = compute_metrics(streamed, replicates=10), compute_metrics(whole, replicates=10)
    for key in CATALOG:
        if want[key].value is None:
            assert got[key] == want[key], key
            continue
        assert got[key].value == pytest.approx(want[key].value, rel=0, abs=allowed(key, want[key].value or 0, pair)), (
            key
        )
        if CATALOG[key].level == "sequence" and key != "seq_mult_prob_error_max":
            assert got[key] == want[key], key
    for name, sums in streamed.binned.items():
        assert_same_bins(sums, whole.binned[name])
    np.testing.assert_array_equal(streamed.density, whole.density)
    np.testing.assert_array_equal(streamed.log_ratio.whole(), whole.log_ratio.whole())
    for name, column in vars(streamed.largest).items():
        np.testing.assert_array_equal(column, getattr(whole.largest, name))


@given(cases(), st.data())
@settings(max_examples=100, deadline=None)
def test_what_is_left_out_is_the_same_in_chunks(make_pair: Any, case: Any, data: st.DataObject) -> None:
    """Placeholders and impossible values on either side, chunk by chunk and at once."""
    lengths, b, d, prompts, cuts = case
    pair = make_pair(b, d, lengths, prompts)
    odd = st.sampled_from([math.nan, math.inf, -math.inf, -9999.0, 1.0, 0.0, 0.1, -1e30, -5000.5, None, None])
    for side in (pair.rollout_logprob, pair.trainer_logprob):
        for row, value in enumerate(data.draw(st.lists(odd, min_size=len(b), max_size=len(b)))):
            side[row] = side[row] if value is None else value
    pair = replace(pair, usable=usable(pair.rollout_logprob, pair.trainer_logprob))
    streamed, whole = accumulate(cut(pair, cuts)), as_sums(pair)
    assert streamed.excluded.rows() == whole.excluded.rows()
    assert streamed.excluded.n_tokens == whole.excluded.n_tokens == int((~pair.usable).sum())
    assert streamed.excluded.n_nonfinite == whole.excluded.n_nonfinite
    assert close(streamed.mean_abs_all_finite, whole.mean_abs_all_finite, rel=1e-12)
    np.testing.assert_array_equal(streamed.log_ratio.whole(), whole.log_ratio.whole())
    np.testing.assert_array_equal(streamed.sequences.n_usable, whole.sequences.n_usable)


def assert_same_bins(got: BinnedSums, want: BinnedSums) -> None:
    np.testing.assert_array_equal(got.count, want.count)
    np.testing.assert_allclose(got.abs_log_ratio, want.abs_log_ratio, rtol=TOLERANCE)
    np.testing.assert_allclose(got.squared_log_ratio, want.squared_log_ratio, rtol=TOLERANCE)
    assert got.shift == want.shift
    largest = np.abs(want.ratio_excess).max(initial=0)
    np.testing.assert_allclose(got.ratio_excess, want.ratio_excess, rtol=0, atol=10 * TOLERANCE * largest)


@pytest.fixture(scope="module")
def long_pair(make_pair: Any) -> PairArrays:
    """30,000 tokens of BF16-sized gaps over 40 prompts, each with a level of its own."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 400, 150)
    level = np.repeat(np.exp(rng.normal(0, 1, 150)), lengths)
    b = -rng.exponential(1, lengths.sum())
    d = level * rng.standard_t(4, len(b)) * 0.01
    pair: PairArrays = make_pair(b, d, list(lengths), [i % 40 for i in range(150)])
    return replace(pair, columns={"rank": rng.integers(0, 10, len(b)), "entropy": rng.exponential(1, len(b))})


def test_intervals_and_curves_are_those_in_memory(long_pair: PairArrays) -> None:
    streamed = accumulate(cut(long_pair, [1, 2, 40, 41, 90, 149]))
    want = compute_metrics(long_pair)
    for key, got in compute_metrics(streamed).items():
        for name in ("value", "ci_low", "ci_high"):
            assert close(getattr(got, name), getattr(want[key], name), rel=1e-9), key
    for curve in (
        curves.length_curve,
        curves.abs_diff_ccdf,
        curves.abs_diff_by_probability,
        curves.abs_diff_by_position,
    ):
        there, here = vars(curve(streamed)), vars(curve(long_pair))  # type: ignore[operator]
        for name, values in here.items():
            if not isinstance(values, str):
                np.testing.assert_allclose(there[name], values, rtol=1e-9, atol=1e-14)
    assert paired_ratio(streamed, streamed, "kl_k3", replicates=20).value == pytest.approx(1.0)


def test_sums_in_plain_python(long_pair: PairArrays) -> None:
    """Each metric written down by its formula, term by term, and added without rounding."""
    a, b = long_pair.trainer_logprob.tolist(), long_pair.rollout_logprob.tolist()
    d = [x - y for x, y in zip(a, b, strict=True)]
    n = len(d)
    gap = [math.exp(y) * math.expm1(x) for x, y in zip(d, b, strict=True)]
    p, q = [math.exp(x) for x in a], [math.exp(y) for y in b]

    def mean(terms: Any) -> float:
        return math.fsum(terms) / n

    def cov(x: list[float], y: list[float]) -> float:
        mx, my = mean(x), mean(y)
        return math.fsum((u - mx) * (v - my) for u, v in zip(x, y, strict=True))

    size = [abs(x) for x in gap]
    rho = [math.exp(x) for x in d]
    want = {
        "mean_abs_logprob_diff": mean(map(abs, d)),
        "rms_logprob_diff": math.sqrt(mean(x * x for x in d)),
        "max_abs_logprob_diff": max(map(abs, d)),
        "mean_abs_prob_diff": mean(size),
        "std_prob_diff": math.sqrt(cov(size, size) / (n - 1)),
        "pearson_prob": cov(p, q) / math.sqrt(cov(p, p) * cov(q, q)),
        "kl_k1": -mean(d),
        "kl_k2": 0.5 * mean(x * x for x in d),
        "token_mult_prob_error": mean(math.exp(abs(x)) for x in d),
        "chi2_token": mean(math.expm1(2 * x) for x in d),
        "ess_token": math.fsum(rho) ** 2 / (n * math.fsum(x * x for x in rho)),
        "mean_ratio": mean(rho),
        "frac_outside_clip": mean(x < 0.8 or x > 1.28 for x in rho),
    }
    streamed = compute_metrics(accumulate(cut(long_pair, [3, 77])), replicates=10)
    for key, value in want.items():
        assert streamed[key].value == pytest.approx(value, rel=1e-12, abs=1e-15), key
    assert streamed["kl_k3"].value == pytest.approx(mean(math.expm1(x) - x for x in d), rel=1e-10)


def test_fp32_sized_gaps_keep_their_digits_in_chunks(make_pair: Any) -> None:
    """1 − ESS, k3 and the spread of the probabilities at gaps of 1e-7, where float32 has no digit left."""
    e, n = 1e-7, 400
    d = np.resize([e, e, -e, -e], n)
    sums = accumulate(cut(make_pair(np.zeros(n), d, [4] * 100), [1, 50]))
    metrics = compute_metrics(sums, replicates=10)
    assert metrics["kl_k3"].value == pytest.approx(e**2 / 2, rel=1e-6, abs=0)
    variation = sums.tokens.ratio_excess.products.sum() / n
    assert variation == pytest.approx(math.sinh(e) ** 2, rel=1e-9, abs=0)
    assert metrics["mean_abs_prob_diff"].value == pytest.approx(e, rel=1e-7)


def test_chunks_of_other_levels_do_not_cost_digits(make_pair: Any) -> None:
    """A first chunk of three tokens far from all the rest is a bad guess of the mean; the spread keeps its digits."""
    rng = np.random.default_rng(2)
    b = np.concatenate([np.full(3, -1.0), rng.uniform(-1e-3, 0, 90_000)])
    d = np.concatenate([[-0.9, -0.9, -0.9], rng.normal(0, 1e-9, 90_000)])
    pair = make_pair(b, d, [3, *[900] * 100])
    gap = np.abs(np.exp(b) * np.expm1(pair.trainer_logprob - b)).tolist()
    mean = math.fsum(gap) / len(gap)
    want = math.sqrt(math.fsum((x - mean) ** 2 for x in gap) / (len(gap) - 1))
    assert compute_metrics(accumulate(cut(pair, [1, 2])), replicates=5)["std_prob_diff"].value == pytest.approx(
        want, rel=1e-13
    )


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=5))
def test_centred_sums_are_those_about_the_mean(chunks: list[list[float]]) -> None:
    sums = CentredSums(1, 1)
    for chunk in chunks:
        values = np.array(chunk)
        sums.update([values], np.array([float(len(chunk))]), lambda x: np.array([x.sum()]))
    every = [x for chunk in chunks for x in chunk]
    mean = math.fsum(every) / len(every)
    size = max(map(abs, every))
    assert sums.centre[0] == pytest.approx(mean, rel=0, abs=1e-14 * size + 1e-300)
    assert sums.sums[0, 0] == pytest.approx(0.0, abs=1e-13 * size * len(every) + 1e-300)
    assert sums.products[0, 0, 0] == pytest.approx(
        math.fsum((x - mean) ** 2 for x in every), rel=1e-12, abs=1e-28 * size**2 * len(every) + 1e-300
    )


def test_order_of_sequences_is_irrelevant_in_chunks(long_pair: PairArrays) -> None:
    order = np.random.default_rng(3).permutation(len(long_pair.prompt))
    rows = np.concatenate([np.flatnonzero(long_pair.sequence == i) for i in order])
    lengths = np.bincount(long_pair.sequence)[order]
    shuffled = replace(
        long_pair,
        rollout_logprob=long_pair.rollout_logprob[rows],
        trainer_logprob=long_pair.trainer_logprob[rows],
        position=long_pair.position[rows],
        sequence=np.repeat(np.arange(len(order)), lengths),
        prompt=long_pair.prompt[order],
        columns={name: values[rows] for name, values in long_pair.columns.items()},
    )
    want = compute_metrics(long_pair, replicates=10)
    for key, got in compute_metrics(accumulate(cut(shuffled, [10, 60])), replicates=10).items():
        assert close(got.value, want[key].value, rel=1e-10), key


def test_bins_of_a_further_column(long_pair: PairArrays) -> None:
    """All four sums of every cell, in plain Python; a token without the property is in no bin."""
    entropy = long_pair.columns["entropy"].copy()
    entropy[::17] = np.nan
    pair = replace(long_pair, columns={**long_pair.columns, "entropy": entropy})
    edges = np.array([0.0, 0.5, 1.0, 2.0])
    sums = accumulate(cut(pair, [5, 80]), bins={"entropy": edges, "rank": np.arange(11.0)})
    bins = sums.binned["entropy"]
    d, prompt = pair.trainer_logprob - pair.rollout_logprob, pair.prompt[pair.sequence]
    for p in (0, 7, 39):
        for k, (low, high) in enumerate([(0, 0.5), (0.5, 1), (1, math.inf)]):  # the last bin is open-ended
            some = d[(prompt == p) & (entropy >= low) & (entropy < high)].tolist()
            assert bins.count[p, k] == len(some)
            assert bins.abs_log_ratio[p, k] == pytest.approx(math.fsum(map(abs, some)), rel=1e-12)
            assert bins.squared_log_ratio[p, k] == pytest.approx(math.fsum(x * x for x in some), rel=1e-12)
            excess = [math.expm1(x) for x in some]
            assert bins.ratio_excess[p, k] == pytest.approx(
                math.fsum(excess), rel=0, abs=1e-12 * math.fsum(map(abs, excess))
            )
    assert bins.count.sum() == np.isfinite(entropy).sum()
    ranks = sums.binned["rank"].count.sum(axis=0)
    assert ranks.tolist() == np.bincount(pair.columns["rank"], minlength=10).tolist()
    share = sums.binned["rank"].squared_log_ratio.sum(axis=0) / sums.tokens.squared_log_ratio.sum()
    assert share.sum() == pytest.approx(1.0)
    assert len(curves.binned_diff(bins).mean_abs) == 3


def test_merged_bins_hold_the_sums_of_their_parts(long_pair: PairArrays) -> None:
    fine = as_sums(long_pair).binned["position"]
    wide = fine.merged(np.array([0, 8, 96]), end=1e4)
    assert wide.edges.tolist() == [0, 8, 96, 1e4]
    np.testing.assert_allclose(wide.count, np.add.reduceat(fine.count, [0, 8, 96], axis=1))
    assert wide.count.sum() == len(long_pair.sequence)
    assert as_sums(long_pair).binned["position"].merged(np.array([0, 150]), end=1e4).count[:, 1].sum() == 0


def test_ratios_that_overflow_stay_comparable_by_bin(make_pair: Any) -> None:
    sums = accumulate(cut(make_pair(-2500.0, [0.5, 2000.0, 0.0]), [1, 2])).binned["position"]
    assert sums.shift == 2000.0
    assert sums.ratio_excess[:, 0] == pytest.approx([0.0, 1.0, 0.0])


def test_the_largest_tokens(long_pair: PairArrays) -> None:
    d = long_pair.trainer_logprob - long_pair.rollout_logprob
    largest = accumulate(cut(long_pair, [1, 9, 100])).largest
    assert largest.row.tolist() == np.argsort(-np.abs(d), kind="stable")[:5].tolist()
    np.testing.assert_array_equal(largest.sequence, long_pair.sequence[largest.row])
    np.testing.assert_array_equal(largest.position, long_pair.position[largest.row])
    np.testing.assert_array_equal(largest.trainer_logprob - largest.rollout_logprob, d[largest.row])


def test_of_equal_tokens_the_earliest_are_the_largest(make_pair: Any) -> None:
    pair = make_pair(0.0, [0.1, np.nan, -0.1, 0.1, 0.2, 0.1, 0.1, 0.1])
    assert accumulate(cut(pair, [2, 4])).largest.row.tolist() == [4, 0, 2, 3, 5]


def test_sequences_may_not_be_torn_or_out_of_order(make_pair: Any) -> None:
    pair = make_pair(-1.0, [0.1, 0.2, 0.3], [2, 1])
    names = ("rollout_logprob", "trainer_logprob", "sequence", "position")
    torn = [replace(pair, **{name: getattr(pair, name)[rows] for name in names}) for rows in (slice(1), slice(1, 3))]
    for chunks in (torn, cut(pair, [1])[::-1], [replace(pair, sequence=np.array([0, 1, 0]))]):
        with pytest.raises(ValueError, match="whole sequences"):
            accumulate(chunks)
    with pytest.raises(ValueError, match="at least one chunk"):
        accumulate([])
