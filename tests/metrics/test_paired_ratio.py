"""Ratios and differences of pairs, paired by prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.inference import holm
from mismatch_probe.metrics.paired import PAIRED_KEYS, compare_pairs, paired_ratio
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.types import PairArrays


@pytest.fixture
def pairs(make_pair: Any) -> tuple[PairArrays, PairArrays]:
    rng = np.random.default_rng(0)
    scale = np.repeat(np.exp(rng.normal(0, 1, 64)), 30)
    wide, narrow = (scale * rng.normal(0, s, 64 * 30) for s in (8e-3, 1e-3))
    b = -rng.exponential(1, 64 * 30)
    return make_pair(b, wide, [30] * 64), make_pair(b, narrow, [30] * 64)


@pytest.mark.parametrize("key", PAIRED_KEYS)
def test_value_is_the_ratio_of_the_metrics(pairs: tuple[PairArrays, PairArrays], key: str) -> None:
    above, below = (compute_metrics(pair, replicates=20)[key].value for pair in pairs)
    got = paired_ratio(pairs[0], pairs[1], key, replicates=100)
    assert above is not None
    assert below is not None
    assert got.value == pytest.approx(above / below, rel=1e-10)
    assert got.ci_low is not None
    assert got.ci_high is not None
    assert got.ci_low < above / below < got.ci_high
    assert got.why == ""
    assert CATALOG[key].positive


def test_pairing_narrows_the_interval(pairs: tuple[PairArrays, PairArrays]) -> None:
    """Both pairs share the prompts' scale, which cancels: the ratio is known better than either metric."""
    ratio = paired_ratio(pairs[0], pairs[1], "mean_abs_logprob_diff")
    alone = compute_metrics(pairs[0])["mean_abs_logprob_diff"]
    assert None not in (ratio.ci_low, ratio.ci_high, alone.ci_low, alone.ci_high)
    assert np.log(ratio.ci_high / ratio.ci_low) < 0.5 * np.log(alone.ci_high / alone.ci_low)  # type: ignore[operator]


def test_a_pair_over_itself_is_one(pairs: tuple[PairArrays, PairArrays]) -> None:
    got = paired_ratio(pairs[0], pairs[0], "kl_k3", replicates=50)
    assert (got.value, got.ci_low, got.ci_high) == pytest.approx((1.0, 1.0, 1.0))


def test_inverse(pairs: tuple[PairArrays, PairArrays]) -> None:
    there, back = paired_ratio(pairs[0], pairs[1], "kl_k3"), paired_ratio(pairs[1], pairs[0], "kl_k3")
    assert there.value is not None
    assert there.ci_low is not None
    assert (back.value, back.ci_high) == pytest.approx((1 / there.value, 1 / there.ci_low), rel=1e-9)


def test_prompts_are_matched_by_name_not_by_place(make_pair: Any) -> None:
    d = np.random.default_rng(1).normal(0, 0.1, 40)
    names = [f"q{i}" for i in range(40)]
    forward = make_pair(-1.0, d, prompt_ids=names)
    backward = make_pair(-1.0, 0.5 * d[::-1], prompt_ids=names[::-1])
    got = paired_ratio(forward, backward, "mean_abs_logprob_diff", replicates=50)
    assert (got.value, got.ci_low, got.ci_high) == pytest.approx((2.0, 2.0, 2.0))


def test_prompts_of_one_pair_only_are_dropped(make_pair: Any) -> None:
    first = make_pair(-1.0, [0.2] * 40 + [9.0], prompt_ids=[f"q{i}" for i in range(41)])
    second = make_pair(-1.0, [0.1] * 40, prompt_ids=[f"q{i}" for i in range(40)])
    got = paired_ratio(first, second, "mean_abs_logprob_diff", replicates=50)
    assert got.value == pytest.approx(2.0)
    assert got.why == "over the 40 prompts that both pairs have"


def test_nonfinite_tokens_are_named(make_pair: Any) -> None:
    d = np.full(40, 0.1)
    spoiled = d.copy()
    spoiled[3] = np.nan
    got = paired_ratio(make_pair(-1.0, spoiled), make_pair(-1.0, d), "kl_k2", replicates=50)
    assert got.value == pytest.approx(1.0)
    assert "without 1 tokens that have no usable log-probs" in got.why


def test_what_cannot_be_compared_says_why(make_pair: Any) -> None:
    some, zero = make_pair(-1.0, [0.1, 0.2]), make_pair(-1.0, [0.0, 0.0])
    other = make_pair(-1.0, [0.1], prompt_ids=["elsewhere"])
    empty = make_pair(-1.0, [np.nan, np.nan])
    assert paired_ratio(some, zero, "kl_k3").why == "kl_k3 of the denominator is 0"
    assert paired_ratio(zero, some, "kl_k3").value == 0.0
    assert paired_ratio(some, other, "kl_k3").why == "the pairs share no prompt"
    assert paired_ratio(empty, some, "kl_k3").why == "numerator: no usable tokens"
    assert paired_ratio(some, empty, "seq_log_ratio_std").why == "denominator: no usable sequences"
    assert "no interval" in paired_ratio(some, some, "kl_k3").why
    with pytest.raises(UsageError, match="kl_k1"):
        paired_ratio(some, some, "kl_k1")
    with pytest.raises(UsageError, match="prompt_ids"):
        paired_ratio(make_pair(-1.0, [0.1], prompt_ids=[]), some, "kl_k3")


def three(make_pair: Any, seed: int, scales: tuple[float, ...], n_prompts: int = 64) -> dict[str, PairArrays]:
    """Pairs whose d share the prompts' scale; each has its own size."""
    rng = np.random.default_rng(seed)
    prompt_scale = np.repeat(np.exp(rng.normal(0, 0.7, n_prompts)), 20)
    names = ("bfloat16", "float16", "float32")
    return {
        name: make_pair(-1.0, scale * prompt_scale * rng.laplace(0, 1, len(prompt_scale)), [20] * n_prompts)
        for name, scale in zip(names, scales, strict=False)
    }


def test_all_pairs_and_metrics_are_one_family(make_pair: Any) -> None:
    pairs = three(make_pair, 0, (8e-3, 1e-3, 1e-6))
    rows = compare_pairs(pairs)
    assert [(row.numerator, row.denominator) for row in rows[:: len(PAIRED_KEYS)]] == [
        ("bfloat16", "float16"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
    ]
    assert [row.key for row in rows] == list(PAIRED_KEYS) * 3
    assert [row.p_holm for row in rows] == holm([row.p_value for row in rows])
    metrics = {name: compute_metrics(pair, replicates=20) for name, pair in pairs.items()}
    for row in rows:
        above, below = (metrics[name][row.key].value for name in (row.numerator, row.denominator))
        assert above is not None
        assert below is not None
        assert row.ratio == paired_ratio(pairs[row.numerator], pairs[row.denominator], row.key)
        assert row.difference.value == pytest.approx(above - below, rel=1e-9)
        assert row.difference.ci_low is not None
        assert 0 < row.difference.ci_low < above - below
        assert row.differs is True
        assert row.n_prompts == 64
        assert row.detectable_ratio is not None
        assert 1 < row.detectable_ratio < 5


def test_p_value_is_below_5_percent_exactly_where_the_interval_excludes_1(make_pair: Any) -> None:
    seen = set()
    for seed, factor in enumerate(np.linspace(1.0, 1.35, 25)):
        pairs = three(make_pair, seed, (factor, 1.0), n_prompts=40)
        (row,) = compare_pairs(pairs, ["kl_k2"], replicates=200)
        if row.ratio.ci_low is None:
            assert row.p_value is None
            continue
        assert row.ratio.ci_high is not None
        assert row.p_value is not None
        assert (row.p_value < 0.05) == (not row.ratio.ci_low <= 1 <= row.ratio.ci_high)
        seen.add(row.p_value < 0.05)
    assert seen == {True, False}


def test_equal_pairs_rarely_differ_and_the_detectable_ratio_is_found(make_pair: Any) -> None:
    """No false positive in more than about 5 % of families; a true ratio of the detectable size in about 80 %."""
    keys = ("mean_abs_logprob_diff", "kl_k2")
    equal = [compare_pairs(three(make_pair, seed, (1.0, 1.0)), keys, replicates=200) for seed in range(120)]
    assert sum(any(row.differs for row in rows) for rows in equal) <= 12
    detectable = float(np.median([rows[0].detectable_ratio or np.nan for rows in equal]))
    found = [
        compare_pairs(three(make_pair, 1000 + seed, (detectable, 1.0)), keys[:1], replicates=200)[0]
        for seed in range(120)
    ]
    assert 0.68 <= np.mean([(row.p_value or 0) < 0.05 for row in found]) <= 0.92


def test_difference_is_paired_too(pairs: tuple[PairArrays, PairArrays]) -> None:
    """A pair minus 0.99 of itself: what is left of the prompts' variation is 1 % of it."""
    near = pairs[0].rollout_logprob + 0.99 * (pairs[0].trainer_logprob - pairs[0].rollout_logprob)
    scaled = PairArrays(**{**vars(pairs[0]), "trainer_logprob": near})
    (row,) = compare_pairs({"a": pairs[0], "b": scaled}, ["mean_abs_logprob_diff"])
    alone = compute_metrics(pairs[0])["mean_abs_logprob_diff"]
    assert None not in (row.difference.ci_low, row.difference.ci_high, alone.ci_low, alone.ci_high)
    width = row.difference.ci_high - row.difference.ci_low  # type: ignore[operator]
    assert width == pytest.approx(0.01 * (alone.ci_high - alone.ci_low), rel=0.5)  # type: ignore[operator]


def test_comparisons_without_a_value_say_why_and_leave_the_family(make_pair: Any) -> None:
    d = np.random.default_rng(2).normal(0, 0.1, 40)
    rows = compare_pairs({"a": make_pair(-1.0, d), "b": make_pair(-1.0, 0 * d), "c": make_pair(-1.0, 2 * d)}, ["kl_k2"])
    over_zero, real, of_zero = rows
    assert (over_zero.ratio.value, over_zero.ratio.why) == (None, "kl_k2 of the denominator is 0")
    assert (over_zero.p_value, over_zero.differs) == (None, None)
    assert of_zero.ratio.value == 0.0
    assert of_zero.p_value is None
    assert real.p_holm == real.p_value
    assert compare_pairs({"a": make_pair(-1.0, d)}, ["kl_k2"]) == []
