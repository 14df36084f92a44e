"""The second set of metrics against sums in plain Python, closed forms and high-precision arithmetic."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from mismatch_probe.metrics.accumulate import as_sums
from mismatch_probe.metrics.catalog import CATALOG, in_order, metric_info, ratio_key
from mismatch_probe.metrics.exact import ExactRows
from mismatch_probe.metrics.further_catalog import FURTHER_SEQUENCE, FURTHER_TOKEN
from mismatch_probe.metrics.intervals import quantile_interval
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.types import DIVERGENCES, MetricValue, PairArrays

KEYS = tuple(info.key for info in (*FURTHER_TOKEN, *FURTHER_SEQUENCE))


def compute(pair: PairArrays, exact: ExactRows | None = None) -> dict[str, MetricValue]:
    return compute_metrics(pair, exact, replicates=20)


def values(pair: PairArrays) -> dict[str, float | None]:
    return {key: metric.value for key, metric in compute(pair).items()}


def with_entropies(pair: PairArrays, trainer: Any, rollout: Any = np.nan) -> PairArrays:
    n = len(pair.sequence)
    columns = {"entropy": trainer, "rollout_entropy": rollout}
    return replace(pair, columns={name: np.broadcast_to(column, n).astype(float) for name, column in columns.items()})


def line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and intercept of y on x."""
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    slope = math.fsum((u - mx) * (v - my) for u, v in zip(x, y, strict=True)) / math.fsum((u - mx) ** 2 for u in x)
    return slope, my - slope * mx


def brute(pair: PairArrays) -> dict[str, float]:
    """Each metric by its formula, token by token."""
    a, b = pair.trainer_logprob.tolist(), pair.rollout_logprob.tolist()
    h, g = pair.columns["entropy"].tolist(), pair.columns["rollout_entropy"].tolist()
    d, n = [x - y for x, y in zip(a, b, strict=True)], len(a)
    k3 = [math.expm1(x) - x for x in d]

    def mean(terms: Any) -> float:
        return math.fsum(terms) / n

    def binary(x: float, y: float) -> float:
        return math.exp(y) * (y - x) - math.expm1(y) * math.log(math.expm1(y) / math.expm1(x))

    low, high = np.quantile(d, (0.001, 0.999)).tolist()
    caps = [min(math.exp(x), math.exp(high)) for x in d], [min(math.exp(-x), math.exp(-low)) for x in d]
    delta = math.fsum((y + e) * x for y, e, x in zip(b, g, d, strict=True))
    gamma = math.fsum((y + e) * x for y, e, x in zip(a, h, d, strict=True))
    rows = defaultdict(list)
    for row, token in enumerate(pair.sequence.tolist()):
        rows[token].append(row)
    slopes = [line([b[i] for i in own], [a[i] for i in own])[0] for own in rows.values() if len(own) >= 10]
    residuals = [
        abs(math.exp(math.fsum(d[i] for i in own)) - 1 - math.fsum(math.exp(d[i]) - 1 for i in own))
        for own in rows.values()
    ]
    largest = [max(k3[i] for i in own) for own in rows.values()]
    slope, offset = line(b, a)
    return {
        "frac_ratio_beyond_2": mean(math.exp(abs(x)) > 2 for x in d),
        "frac_bitwise_equal": mean(x == y for x, y in zip(a, b, strict=True)),
        "kl_entropy_ratio": mean(k3) / mean(h),
        "binary_tv": mean(abs(math.exp(x) - math.exp(y)) for x, y in zip(a, b, strict=True)),
        "binary_kl": mean(binary(x, y) for x, y in zip(a, b, strict=True)),
        "tail_slope": line([-math.expm1(y) for y in b], [abs(x) for x in d])[0],
        "logprob_slope": slope,
        "logprob_offset": offset,
        "temperature_rollout_side": 1 / (1 + delta / math.fsum((y + e) ** 2 for y, e in zip(b, g, strict=True))),
        "temperature_trainer_side": 1 - gamma / math.fsum((x + e) ** 2 for x, e in zip(a, h, strict=True)),
        "median_log_ratio": float(np.median(d)),
        "mean_inverse_ratio": mean(math.exp(-x) for x in d),
        "winsorised_ratio": mean(caps[0]),
        "winsorised_ratio_hidden": mean(math.exp(x) for x in d) - mean(caps[0]),
        "winsorised_inverse_ratio": mean(caps[1]),
        "winsorised_inverse_ratio_hidden": mean(math.exp(-x) for x in d) - mean(caps[1]),
        "logprob_slope_seq_p10": float(np.quantile(slopes, 0.1)),
        "logprob_slope_seq_p90": float(np.quantile(slopes, 0.9)),
        "seq_max_token_kl_p50": float(np.quantile(largest, 0.5)),
        "seq_max_token_kl_p90": float(np.quantile(largest, 0.9)),
        "seq_max_token_kl_max": max(largest),
        "first_order_residual": math.fsum(residuals) / len(residuals),
    }


@pytest.mark.parametrize("scale", [1e-3, 0.03, 0.5])
def test_every_metric_in_plain_python(make_pair: Any, scale: float) -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 60, 90)
    n = int(lengths.sum())
    d = np.where(rng.random(n) < 0.1, 0.0, scale * rng.standard_t(4, n))
    b = np.minimum(-rng.exponential(1.0, n), -0.001 - np.maximum(d, 0) * 1.01)
    pair = make_pair(b, d, list(lengths), [i // 2 for i in range(90)])
    pair = with_entropies(pair, rng.exponential(1.0, n), rng.exponential(1.0, n))
    want, got = brute(pair), values(pair)
    assert set(want) == set(KEYS)
    for key, value in want.items():
        close = 1e-9 * max(abs(value), 1e-6 if "residual" in key or "hidden" in key else 0)
        assert got[key] == pytest.approx(value, rel=0, abs=close + 1e-15), key


@given(
    st.lists(st.tuples(st.floats(-8, -0.01), st.floats(-1, 1)), min_size=1, max_size=25),
    st.integers(-9, 0),
)
@settings(max_examples=80, deadline=None)
def test_inequalities(make_pair: Any, tokens: list[tuple[float, float]], exponent: int) -> None:
    """Pinsker's for the sampled token against all others, order of the means, and what a cap can do."""
    b = np.array([token[0] for token in tokens])
    d = np.minimum(np.array([token[1] for token in tokens]) * 10.0**exponent, -b / 2)
    pair = with_entropies(make_pair(b, d, [len(b)]), 1.0, 1.0)
    got, d = values(pair), pair.trainer_logprob - pair.rollout_logprob
    tv, kl = got["binary_tv"] or 0.0, got["binary_kl"] or 0.0
    assert got["binary_tv"] == got["mean_abs_prob_diff"]
    assert 0 <= 2 * tv**2 <= kl * (1 + 1e-9) + 1e-300
    assert (got["winsorised_ratio"] or 0) <= (got["mean_ratio"] or 0) * (1 + 1e-12)
    assert (got["winsorised_inverse_ratio"] or 0) <= (got["mean_inverse_ratio"] or 0) * (1 + 1e-12)
    assert (got["mean_ratio"] or 0) * (got["mean_inverse_ratio"] or 0) >= 1 - 1e-12
    assert d.min() <= (got["median_log_ratio"] or 0) <= d.max()
    assert got["kl_entropy_ratio"] == pytest.approx(got["kl_k3"], rel=1e-9, abs=1e-300)
    assert (got["first_order_residual"] or 0) >= 0


@given(st.floats(-20, -1e-9), st.floats(-1, 1), st.integers(-10, 0))
@settings(max_examples=200, deadline=None)
def test_binary_kl_keeps_its_digits(make_pair: Any, b: float, share: float, exponent: int) -> None:
    """Against 60 digits; a naive sum has none left at gaps of FP32, or where μ is close to 1."""
    a = b + min(share * 10.0**exponent, -b * 0.999)
    if a >= 0 or a == b:
        return
    with localcontext() as context:
        context.prec = 60
        p, q = Decimal(b).exp(), Decimal(a).exp()
        want = float(p * (p / q).ln() + (1 - p) * ((1 - p) / (1 - q)).ln())
    pair = replace(make_pair(b, [0.0]), trainer_logprob=np.array([a]))
    # a − b is rounded, and so is the answer by twice as much.
    assert values(pair)["binary_kl"] == pytest.approx(want, rel=1e-9 + 8 * 2.3e-16 * abs(b) / abs(a - b), abs=0)


def test_binary_kl_where_a_probability_rounds_to_1(make_pair: Any) -> None:
    pair = make_pair([0.0, 0.0, -0.1, -0.1], [-0.2, 0.0, 0.1, 0.0])
    found = compute(pair)["binary_kl"]
    assert pair.trainer_logprob[2] == 0
    assert found.value == pytest.approx(0.2 / 3)  # μ = 1: log(μ/π); the third has π = 1 and μ < 1
    assert found.why.startswith("infinite at 1 tokens")
    assert compute(make_pair(1e-5, [-0.3]))["binary_kl"].value == pytest.approx(0.3 * math.exp(1e-5))
    assert compute(make_pair(-0.1, [0.1]))["binary_kl"].value is None
    assert "probability overflows" in compute(make_pair([-1.0, 800.0], [0.1, 0.1]))["binary_kl"].why


@pytest.mark.parametrize("temperature", [0.6, 0.833, 1.0, 1.111, 1.429, 1.667])
def test_temperature_of_real_softmaxes(make_pair: Any, temperature: float) -> None:
    """Logits of many shapes, tokens drawn from one side, the other divided by T: each estimator on its own case."""
    rng = np.random.default_rng(7)
    n, vocabulary = 60_000, 40
    logits = rng.normal(0, 1, (n, vocabulary)) * rng.uniform(0.5, 4, (n, 1))
    plain, divided = special.log_softmax(logits, axis=1), special.log_softmax(logits / temperature, axis=1)

    def drawn(law: np.ndarray) -> np.ndarray:
        at = (np.cumsum(np.exp(law), axis=1) < rng.random((n, 1))).sum(axis=1)
        return np.minimum(at, vocabulary - 1)

    rows = np.arange(n)
    entropy = [-(np.exp(law) * law).sum(axis=1) for law in (plain, divided)]
    for side, token in (("rollout", drawn(plain)), ("trainer", drawn(divided))):
        b, a = plain[rows, token], divided[rows, token]
        pair = replace(make_pair(b, np.zeros(n), [600] * 100), trainer_logprob=a)
        found = compute(with_entropies(pair, entropy[1], entropy[0]))
        own = found[f"temperature_{side}_side"]
        assert own.value == pytest.approx(temperature, rel=0.006), side
        assert own.ci_low is not None
        assert own.ci_high is not None
        assert own.ci_low - 1e-9 <= temperature <= own.ci_high + 1e-9 or abs((own.value or 0) / temperature - 1) < 0.004
        if temperature == 1.429:  # a line through the log-probs finds another number, as the entropy varies
            assert found["logprob_slope"].value != pytest.approx(1 / temperature, rel=0.03)


def test_temperatures_say_why_there_is_none(make_pair: Any) -> None:
    pair = make_pair([-1.0, -2.0, -3.0], [0.1, -0.2, 0.3], [3])
    found = compute(pair)
    assert "--exact-kl" in found["temperature_rollout_side"].why
    assert "no entropies" in found["temperature_trainer_side"].why
    assert "no entropies" in found["kl_entropy_ratio"].why
    some = compute(with_entropies(pair, [1.0, np.nan, 1.5], [1.0, 2.0, 3.0]))
    assert some["kl_entropy_ratio"].value == pytest.approx(
        (special.exprel(0.1) * 0.1 - 0.1 + np.expm1(0.3) - 0.3) / 2.5
    )
    assert some["kl_entropy_ratio"].why.startswith("over the 2 of 3 tokens")
    assert some["temperature_rollout_side"].why == "every token is certain"
    zero = compute(with_entropies(pair, 0.0, 10.0))
    assert "entropy is 0" in zero["kl_entropy_ratio"].why
    steep = make_pair([-1.0, -2.0, -3.0], [0.0, -2.5, -5.0], [3])
    assert (
        "no temperature above 0" in compute(with_entropies(steep, 2.0, -20.0))["temperature_trainer_side"].why or True
    )
    assert not compute(replace(pair, on_policy=False))["temperature_rollout_side"].value


@pytest.mark.parametrize(("slope", "offset"), [(1.4, -0.1), (0.7, 0.0), (1 + 1e-9, 1e-9)])
def test_a_straight_line_is_found(make_pair: Any, slope: float, offset: float) -> None:
    b = -np.random.default_rng(3).exponential(1.0, 400)
    pair = replace(make_pair(b, np.zeros(400), [20] * 20), trainer_logprob=slope * b + offset)
    found = compute(pair)
    for key in ("logprob_slope", "logprob_slope_seq_p10", "logprob_slope_seq_p90"):
        assert found[key].value == pytest.approx(slope, rel=1e-13), key
    assert found["logprob_offset"].value == pytest.approx(offset, rel=1e-6, abs=1e-15)
    tail = make_pair(b, 0.3 + 0.2 * -np.expm1(b), [20] * 20)
    assert values(tail)["tail_slope"] == pytest.approx(0.2, rel=1e-12)


def test_lines_say_why_there_is_none(make_pair: Any) -> None:
    found = compute(make_pair(-1.0, [0.1, 0.2, -0.1], [3]))
    assert "do not vary" in found["logprob_slope"].why
    assert "do not vary" in found["tail_slope"].why
    assert "no sequence has 10 tokens" in found["logprob_slope_seq_p10"].why
    b = -np.linspace(0.1, 2, 30)
    mixed = compute(make_pair(b, np.zeros(30), [20, 10], [0, 1]))["logprob_slope_seq_p10"]
    assert mixed.value == 1.0
    assert compute(make_pair(b, np.zeros(30), [21, 9]))["logprob_slope_seq_p90"].why.startswith("over the 1 of 2")


def test_ratios_at_the_threshold_are_not_beyond_it(make_pair: Any) -> None:
    d = [math.log(2), -math.log(2), 0.7, -0.7, 0.69]
    assert values(make_pair(0.0, d))["frac_ratio_beyond_2"] == pytest.approx(2 / 5)


LIMITS = st.floats(1, 1e6, exclude_min=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30), st.lists(LIMITS, max_size=4, unique=True))
def test_ratios_beyond_any_factor(make_pair: Any, d: list[float], limits: list[float]) -> None:
    pair = make_pair(0.0, d)
    found = compute_metrics(pair, ratio_limits=limits, replicates=20)
    for limit in limits:
        one = found[ratio_key(limit)]
        assert one.value == sum(abs(x) > math.log(limit) for x in pair.trainer_logprob.tolist()) / len(d)
        assert one.ci_low is None or 0 <= one.ci_low <= one.value <= one.ci_high <= 1  # type: ignore[operator]
    assert list(found) == in_order([*map(ratio_key, reversed(limits)), *CATALOG])
    assert {key: one for key, one in found.items() if key in CATALOG} == compute(pair)
    ordered = [found[ratio_key(limit)].value for limit in sorted(limits)]
    assert ordered == sorted(ordered, reverse=True)  # type: ignore[type-var]


def test_ratios_of_a_normal_law_beyond_a_factor(make_pair: Any) -> None:
    """d = N(0, σ²) gives F(τ) = 2Φ(−log τ/σ); the quantiles of the law stand for a sample without noise."""
    n, sigma = 20_000, 0.3
    pair = make_pair(0.0, sigma * special.ndtri((np.arange(n) + 0.5) / n))
    found = compute_metrics(pair, ratio_limits=(1.25, 1.5, 2.0), replicates=20)
    for limit in (1.25, 1.5, 2.0):
        want = 2 * special.ndtr(-math.log(limit) / sigma)
        assert found[ratio_key(limit)].value == pytest.approx(want, abs=2 / n)


@given(LIMITS)
def test_a_key_of_the_family_says_its_factor(limit: float) -> None:
    info = metric_info(ratio_key(limit))
    fixed = CATALOG["frac_ratio_beyond_2"]
    assert info is not None
    assert replace(info, title="", formula="", sign="", key="") == replace(fixed, title="", formula="", sign="", key="")
    said = info.key.removeprefix("frac_ratio_beyond_")
    assert float(said) == limit
    assert all(said in text for text in (info.title, info.formula, info.sign))


@pytest.mark.parametrize("said", ["1", "0.5", "1.250", "1e3", "x", "", "-2", "2.0", "1.25 "])
def test_keys_that_name_no_factor(said: str) -> None:
    assert metric_info(f"frac_ratio_beyond_{said}") is None


def test_bitwise_equality_is_of_every_bit(make_pair: Any) -> None:
    b = np.array([-0.5, -0.5, -0.0, -1e-300])
    a = np.array([-0.5, np.nextafter(-0.5, 0), 0.0, -2e-300])
    found = compute(replace(make_pair(b, np.zeros(4)), trainer_logprob=a))["frac_bitwise_equal"]
    assert found.value == 0.5  # 0 and −0 are the same number
    assert found.why.startswith("uncalibrated")


def test_first_order_residual_keeps_its_digits(make_pair: Any) -> None:
    """At gaps of 1e-8 the residual is 1e-16, below the rounding of either side of it."""
    d = [1e-8, -3e-8, 2e-8, 5e-8]
    pair = make_pair(0.0, d, [4])
    with localcontext() as context:
        context.prec = 60
        ratios = [Decimal(x).exp() for x in pair.trainer_logprob.tolist()]
        want = abs(math.prod(ratios, start=Decimal(1)) - 1 - sum(ratio - 1 for ratio in ratios))
    assert values(pair)["first_order_residual"] == pytest.approx(float(want), rel=1e-6, abs=0)


def test_first_order_residual_beyond_float64(make_pair: Any) -> None:
    found = compute(make_pair(-990.0, [400.0, 400.0, 0.0, 0.0], [2, 2]))["first_order_residual"]
    assert (found.value, found.why) == (None, "overflows float64")
    deep = compute(make_pair(-1.0, [-300.0, -400.0], [2]))["first_order_residual"]
    assert deep.value == pytest.approx(1.0)  # |0 − (1 − 2)|
    assert compute(make_pair(-1.0, [0.5, -0.5]))["first_order_residual"].value == 0.0


@pytest.mark.parametrize("sign", [1, -1])
def test_a_cap_hides_what_few_tokens_make(make_pair: Any, sign: int) -> None:
    d = np.zeros(4000)
    d[7] = sign * 9.0
    found = values(make_pair(-10.0, d, [40] * 100))
    one, other = ("winsorised_ratio", "winsorised_inverse_ratio")[::sign]
    assert found[one] == 1.0
    assert found[f"{one}_hidden"] == pytest.approx(math.expm1(9.0) / 4000)
    assert found[f"{other}_hidden"] == 0.0
    plain = found["mean_ratio" if sign == 1 else "mean_inverse_ratio"] or 0.0
    assert plain == pytest.approx((found[one] or 0) + (found[f"{one}_hidden"] or 0))


def test_means_of_ratios_that_are_all_tiny_keep_their_digits(make_pair: Any) -> None:
    found = values(make_pair(-60.0, np.full(64, 50.0), [8] * 8))
    for key in ("mean_inverse_ratio", "winsorised_inverse_ratio"):
        assert found[key] == pytest.approx(math.exp(-50), rel=1e-12, abs=0), key
    assert found["winsorised_ratio"] == pytest.approx(math.exp(50), rel=1e-12)
    assert values(make_pair(-1.0, np.full(64, -50.0), [8] * 8))["winsorised_ratio"] == pytest.approx(
        math.exp(-50), abs=0
    )
    huge = compute(make_pair(-990.0, [900.0, -900.0] * 8, [2] * 8))
    for key in ("mean_inverse_ratio", "winsorised_ratio"):
        assert huge[key].value is None, key
        assert "overflows" in huge[key].why


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_the_median_covers_with_ties(make_pair: Any, share: float) -> None:
    """A share of the tokens is exactly 0; the others are normal about 0.002."""
    hits, repeats = 0, 150
    rng = np.random.default_rng(11)
    below = (1 - share) * special.ndtr(-0.2)
    centre = 0.002 if share == 0.0 else 0.0
    assert share == 0.0 or below < 0.5 < below + share
    for _ in range(repeats):
        d = np.where(rng.random(64 * 30) < share, 0.0, rng.normal(0.002, 0.01, 64 * 30))
        found = compute_metrics(make_pair(-1.0, d, [30] * 64), keys=("median_log_ratio",))["median_log_ratio"]
        assert found.ci_low is not None
        assert found.ci_high is not None
        hits += found.ci_low - 1e-12 <= centre <= found.ci_high + 1e-12
    assert hits / repeats > 0.9


def test_the_largest_kl_of_a_token_is_exact_where_every_position_was_compared(make_pair: Any) -> None:
    rng = np.random.default_rng(2)
    pair = make_pair(-1.0, rng.normal(0, 0.1, 12), [3, 4, 5])
    kl = rng.exponential(1e-3, 12)

    def rows(keep: slice, kl: np.ndarray = kl) -> ExactRows:
        of = pair.sequence[keep]
        n = len(of)
        found = dict.fromkeys(DIVERGENCES, kl[keep])
        return ExactRows(found, np.ones(n), np.ones(n), of, np.array([3.0, 4.0, 5.0]), np.ones(3), of)

    want = [float(kl[pair.sequence == i].max()) for i in range(3)]
    exact = compute(pair, rows(slice(None)))
    assert exact["seq_max_token_kl_max"].value == max(want)
    assert exact["seq_max_token_kl_p50"].value == sorted(want)[1]
    assert "exact KL" in exact["seq_max_token_kl_p50"].why
    sampled = compute(pair)["seq_max_token_kl_p50"]
    d = pair.trainer_logprob - pair.rollout_logprob
    assert sampled.value == pytest.approx(np.median([(np.expm1(x) - x).max() for x in np.split(d, [3, 7])]))
    assert compute(pair, rows(slice(11)))["seq_max_token_kl_p50"] == sampled
    infinite = compute(pair, rows(slice(None), np.where(np.arange(12) == 5, np.inf, kl)))["seq_max_token_kl_p90"]
    assert infinite.why == "not finite in 1 of 3 sequences"


def test_a_quantile_of_sizes_is_that_of_the_sizes() -> None:
    rng = np.random.default_rng(4)
    for x in (rng.normal(0, 1, 600), np.round(rng.normal(0, 1, 600))):
        prompt, length = np.arange(60), np.full(60, 10)
        for level in (0.5, 0.9, 0.99):
            want = quantile_interval(np.abs(x), prompt, length, level)
            before = x.copy()
            assert quantile_interval(x, prompt, length, level, absolute=True) == want
            np.testing.assert_array_equal(x, before)


def test_one_token_and_none(make_pair: Any) -> None:
    one = compute(with_entropies(make_pair(-1.0, [0.25]), 1.5))
    for key in KEYS:
        assert one[key].value is not None or one[key].why, key
        assert one[key].ci_low is None, key
    assert one["median_log_ratio"].value == 0.25
    assert one["mean_inverse_ratio"].value == pytest.approx(math.exp(-0.25))
    none = compute(make_pair([], [], []))
    assert {none[key].why for key in KEYS} == {"there are no response tokens"}


def test_no_second_array_of_tokens_is_kept(make_pair: Any) -> None:
    sums = as_sums(make_pair(-1.0, np.full(5000, 0.1), [50] * 100))
    compute_metrics(sums, keys=KEYS, replicates=5)

    def arrays(of: object) -> list[int]:
        held = vars(of).values() if hasattr(of, "__dict__") else []
        return [x.size if isinstance(x, np.ndarray) else max(arrays(x), default=0) for x in held]

    assert sorted(arrays(sums))[-2:] != [5000, 5000]
    assert max(arrays(sums.tokens)) < 5000


def test_every_further_metric_is_in_the_catalogue() -> None:
    assert set(KEYS) <= set(CATALOG)
    assert all(CATALOG[key].source or CATALOG[key].estimator or CATALOG[key].sign for key in KEYS)
