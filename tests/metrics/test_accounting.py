"""Which values are log-probs, what is left out because of those that are not, and that nothing else changes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.metrics.accumulate import as_sums
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.chunks import ExcludedValue, possible, usable
from mismatch_probe.metrics.corrections import touched_shares
from mismatch_probe.metrics.groups import Grouping, GroupSums
from mismatch_probe.metrics.ladder import BudgetSums
from mismatch_probe.metrics.self_noise import self_noise
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.metrics.sums import PrefixSums
from mismatch_probe.types import PairArrays

LOWEST = {name: float(np.finfo(name).min) for name in ("float16", "float32")}
PLACEHOLDERS = (-9999.0, -1e4, -1e9, *LOWEST.values(), 1.0, 0.03, 0.125, math.nan, math.inf, -math.inf)
# Rounding of a float32 log-softmax, improbable tokens, and a policy that diverges.
LOGPROBS = (0.0, -0.0, 1e-6, 1e-5, 6e-5, 1e-4, -1e-7, -41.8, -200.0, -999.0, -1000.0)


@pytest.mark.parametrize("value", PLACEHOLDERS)
@pytest.mark.parametrize("side", ["rollout", "trainer"])
def test_what_no_token_has(value: float, side: str) -> None:
    own, other = np.array([value, -1.0]), np.array([-1.0, -1.0])
    assert possible(own).tolist() == [False, True]
    assert possible(own.astype(np.float32)).tolist() == [False, True]
    assert usable(*((own, other) if side == "rollout" else (other, own))).tolist() == [False, True]


@pytest.mark.parametrize("value", LOGPROBS)
def test_what_a_token_can_have(value: float) -> None:
    assert possible(np.array([value])).all()
    assert usable(np.array([value]), np.array([value])).all()


def test_the_bounds() -> None:
    above, below = math.nextafter(1e-4, 1), math.nextafter(-1000.0, -math.inf)
    assert possible(np.array([1e-4, above, -1000.0, below])).tolist() == [True, False, True, False]


def test_a_zero_is_a_log_prob_until_the_other_side_contradicts_it() -> None:
    other = np.array([0.0, -1e-7, -0.01, -0.25, math.nextafter(-0.25, -1), -0.5, -13.0])
    zero = np.zeros(len(other))
    want = [True, True, True, True, False, False, False]
    assert usable(zero, other).tolist() == usable(other, zero).tolist() == usable(-zero, other).tolist() == want


@pytest.mark.parametrize("noise", [1e-5, 0.05, 0.5])
def test_near_certain_tokens_are_all_kept(noise: float) -> None:
    """Float32 log-probs at logits up to 40 nats apart, moved by rounding of FP32, FP16 and half a nat of BF16."""
    rng = np.random.default_rng(0)
    margin = rng.uniform(-10, 40, 400_000)
    others = [np.exp(-(margin + rng.normal(0, noise, len(margin)))).astype(np.float32) for _ in range(2)]
    b, a = (-np.log(np.float32(1) + other) for other in others)
    assert (b == 0).sum() > 100_000
    assert usable(b, a).all()


def test_truncated_sampling_is_measured_not_left_out() -> None:
    """A rollout that keeps one token by top-p .8 reports 0 where the trainer has up to log .8, with rounding."""
    assert usable(np.zeros(3), np.log([0.8, 0.9, 0.99]) - 0.02).all()


def judged(pair: PairArrays) -> PairArrays:
    """As it comes from the tables of a run."""
    return replace(pair, usable=usable(pair.rollout_logprob, pair.trainer_logprob))


def test_counts_by_side_and_value(make_pair: Any) -> None:
    pair = make_pair(np.full(16, -1.0), np.zeros(16), [4] * 4)
    b, a = pair.rollout_logprob, pair.trainer_logprob
    b[:4], b[4:6], b[6], b[7] = -9999.0, -0.0, 0.05, 1.0
    a[3], a[4], a[8], a[9] = math.nan, -2.0, -math.inf, LOWEST["float32"]
    excluded = as_sums(judged(pair)).excluded
    assert excluded.rows() == [
        ExcludedValue("rollout", "sentinel", "-9999", 4),
        ExcludedValue("rollout", "sentinel", "0", 2),
        ExcludedValue("rollout", "sentinel", "1", 1),
        ExcludedValue("rollout", "positive", "> 0", 1),
        ExcludedValue("trainer", "sentinel", "-3.40282347e+38", 1),
        ExcludedValue("trainer", "nonfinite", "-inf", 1),
        ExcludedValue("trainer", "nonfinite", "nan", 1),
    ]
    assert (excluded.n_tokens, excluded.n_nonfinite) == (10, 2)


def test_many_values_are_counted_together(make_pair: Any) -> None:
    """A broken side has a value of its own at every token; what is named stays short, 0 is always named."""
    pair = make_pair(np.append(-2000.0 - np.arange(50), [-9999.0, -9999.0, 0.0]), np.zeros(53))
    pair.trainer_logprob[:] = -1.0
    rows = as_sums(judged(pair)).excluded.rows()
    assert len(rows) == 6
    assert {"-9999": 2, "0": 1}.items() <= {row.value: row.n for row in rows}.items()
    assert rows[0] == ExcludedValue("rollout", "sentinel", "< -1000", 47)
    assert sum(row.n for row in rows) == 53


def test_both_means_are_given(make_pair: Any) -> None:
    pair = make_pair(np.full(4, -1.0), [0.1, -0.1, 0.2, 0.2])
    assert as_sums(judged(pair)).mean_abs_all_finite is None
    pair.rollout_logprob[3] = -9999.0
    sums = as_sums(judged(pair))
    want = (0.4 + abs(pair.trainer_logprob[3] + 9999)) / 4
    assert sums.mean_abs_all_finite == pytest.approx(want)
    assert compute_metrics(sums)["mean_abs_logprob_diff"].value == pytest.approx(0.4 / 3)
    pair.rollout_logprob[3] = math.nan
    assert as_sums(judged(pair)).mean_abs_all_finite is None


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[list[int], list[float], list[float], list[int], list[list[tuple[float, float]]]]:
    """Lengths, b, a and prompts of a sound pair, and the placeholders that follow each of its sequences."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
    n = sum(lengths)
    b = draw(st.lists(st.floats(-30, -1e-3), min_size=n, max_size=n))
    a = [min(x + d, -1e-3) for x, d in zip(b, draw(st.lists(st.floats(-2, 2), min_size=n, max_size=n)), strict=True)]
    prompts = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    odd = st.sampled_from([(value, -1.0) for value in (*PLACEHOLDERS, 0.0)])
    token = st.one_of(odd, odd.map(lambda pair: (pair[1], pair[0])), st.just((-9999.0, -9999.0)))
    after = draw(st.lists(st.lists(token, max_size=3), min_size=len(lengths), max_size=len(lengths)))
    return lengths, b, a, [int(p) for p in np.unique(prompts, return_inverse=True)[1]], after


def built(make_pair: Any, lengths: list[int], b: list[float], a: list[float], prompts: list[int]) -> PairArrays:
    pair = make_pair(b, np.zeros(len(b)), lengths, prompts)
    pair.trainer_logprob[:] = a
    return judged(pair)


def same(pairs: tuple[PairArrays, PairArrays], level: str) -> None:
    """The metrics of a level, to the bit, whatever is said beside them."""
    there, here = (compute_metrics(pair, replicates=10) for pair in pairs)
    for key in (key for key, info in CATALOG.items() if info.level == level):
        for name in ("value", "ci_low", "ci_high"):
            assert getattr(there[key], name) == getattr(here[key], name), key


@given(spoiled())
@settings(max_examples=100, deadline=None)
def test_placeholders_change_no_metric_of_tokens_and_are_all_counted(make_pair: Any, case: Any) -> None:
    lengths, b, a, prompts, after = case
    sound = built(make_pair, lengths, b, a, prompts)
    assert sound.usable is not None
    assert sound.usable.all()
    longer_b: list[float] = []
    longer_a: list[float] = []
    for stop, length, extra in zip(np.cumsum(lengths).tolist(), lengths, after, strict=True):
        longer_b += [*b[stop - length : stop], *(pair[0] for pair in extra)]
        longer_a += [*a[stop - length : stop], *(pair[1] for pair in extra)]
    grown = [length + len(extra) for length, extra in zip(lengths, after, strict=True)]
    other = built(make_pair, grown, longer_b, longer_a, prompts)
    same((sound, other), "token")
    odd = [pair for extra in after for pair in extra]
    excluded = as_sums(other).excluded
    assert excluded.n_tokens == len(odd)
    assert excluded.n_nonfinite == sum(not all(map(math.isfinite, pair)) for pair in odd)
    assert sum(row.n for row in excluded.rows()) == len(odd) + odd.count((-9999.0, -9999.0))


@given(spoiled())
@settings(max_examples=50, deadline=None)
def test_sequences_of_placeholders_change_no_metric_at_all(make_pair: Any, case: Any) -> None:
    lengths, b, a, prompts, after = case
    whole = [extra for extra in after if extra]
    odd = [pair for extra in whole for pair in extra]
    sound = built(make_pair, lengths, b, a, prompts)
    other = built(
        make_pair,
        lengths + [len(extra) for extra in whole],
        b + [pair[0] for pair in odd],
        a + [pair[1] for pair in odd],
        prompts + [0] * len(whole),
    )
    same((sound, other), "token")
    same((sound, other), "sequence")
    assert as_sums(other).excluded.n_tokens == len(odd)


def test_sequences_with_a_placeholder_leave_sequence_metrics(make_pair: Any) -> None:
    pair = make_pair(-1.0, np.linspace(-0.2, 0.3, 12), [3] * 4)
    pair.rollout_logprob[4] = -9999.0
    metrics = compute_metrics(judged(pair), replicates=20)
    assert metrics["mean_abs_logprob_diff"].why.startswith("computed over the 11 of 12 tokens with usable log-probs")
    assert metrics["kl_seq"].why.startswith("computed over the 3 of 4 sequences with usable log-probs")
    assert abs(metrics["seq_log_ratio_mean"].value or 0) < 1


def test_whatever_else_reads_a_pair_leaves_the_same_tokens_out(make_pair: Any) -> None:
    pair = make_pair(-1.0, np.linspace(-0.2, 0.3, 12), [3] * 4)
    reference = np.full(12, -1.1)
    results = []
    for value in (-9999.0, math.nan):
        pair.rollout_logprob[4] = value
        chunk = replace(judged(pair), columns={"reference_logprob": reference})
        prefixes, budget, steps = PrefixSums(), BudgetSums(4), GroupSums([Grouping("step", np.array([0, 0, 1, 1]))])
        for sums in (prefixes, budget, steps):
            sums.update(chunk)  # type: ignore[attr-defined]
        assert prefixes.result().n_cut == 1
        assert budget.n_tokens == 11
        results.append(
            (touched_shares([chunk]), budget.metrics(replicates=20), prefixes.result().log_ratio, steps.results())
        )
    impossible, missing = results
    np.testing.assert_array_equal(impossible[2], missing[2])
    assert impossible[:2] == missing[:2]
    assert impossible[3] == missing[3]


def test_an_engine_against_itself() -> None:
    ids = np.arange(4)
    first, again = np.array([-1.0, -9999.0, -9999.0, np.nan]), np.array([-1.5, -9999.0, -2.0, -1.0])
    stat = self_noise(ids, first, ids, again, np.zeros(4, int))
    assert (stat.n_tokens, stat.n_nonfinite, stat.n_excluded) == (4, 1, 3)
    assert stat.mean_abs_logprob_diff == stat.max_abs_logprob_diff == 0.5
