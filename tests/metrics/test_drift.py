"""Score drift: closed forms, full vectors in float64 against their sketches, and the test by sign flips."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, getcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mismatch_probe.metrics import drift
from mismatch_probe.metrics.accumulate import PairSums
from mismatch_probe.metrics.drift import NO_SKETCH, drift_columns, score_drift, sketch
from mismatch_probe.metrics.exact import ExactRows, divergences, exact_metrics
from mismatch_probe.metrics.frame import exact_rows
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.schemas import exact_table, sequences_table
from mismatch_probe.types import DRIFT_BUCKETS, MetricValue, Rollout, RolloutRequest, Score
from tests.factories.manifest import make_manifest, make_pass

VECTORS = arrays(np.float64, (2, 50), elements=st.floats(-1, 1, width=32))
ROLLOUT, TRAINER = "vllm-bfloat16-decode", "hf-bfloat16-cast"
DRIFT = ["drift_square", "drift_sketch"]
BUCKETS = [21, 10, 120, 21, 82, 71, 35, 27]
SIGNS = [1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0]


def value_of(x: np.ndarray, prompt: np.ndarray, times: np.ndarray | None = None, seed: int = 0) -> MetricValue:
    times = np.ones(len(x)) if times is None else times
    return score_drift(sketch(x), (x**2).sum(axis=1), times, prompt, seed)


def number(found: MetricValue) -> float:
    assert found.value is not None
    return found.value


def p_of(found: MetricValue) -> float:
    return float(found.why.rpartition("p = ")[2].rstrip(")"))


def by_hand(x: np.ndarray, times: np.ndarray) -> float:
    mean = (times[:, None] * x).sum(axis=0) / times.sum()
    return float(np.linalg.norm(mean) / np.sqrt((times * (x**2).sum(axis=1)).sum() / times.sum()))


@given(VECTORS)
def test_a_sketch_is_linear(x: np.ndarray) -> None:
    np.testing.assert_allclose(sketch(x).sum(axis=0), sketch(x.sum(axis=0)[None])[0], atol=1e-5)


def test_inner_products_are_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over draws of buckets and signs, against the products of the full vectors."""
    x, y = np.random.default_rng(0).standard_normal((2, 400)) + 1  # where only signs cancel what shares a bucket
    y += 0.5 * x
    draws = []
    for seed in range(400):
        drift._buckets.cache_clear()
        monkeypatch.setattr(drift, "_HASH_SEED", seed)
        here, there = sketch(np.stack([x, y])).astype(np.float64)
        draws.append((here @ here, here @ there))
    drift._buckets.cache_clear()
    squares, products = np.array(draws).T
    for found, want in ((squares, x @ x), (products, x @ y)):
        assert abs(found.mean() - want) < 4 * found.std() / np.sqrt(len(found))
    assert squares.std() / (x @ x) == pytest.approx(np.sqrt(2 / DRIFT_BUCKETS), rel=0.2)


def test_buckets_and_signs_are_part_of_the_format() -> None:
    """Sketches of another process, or of another vocabulary's size, can be added; and both are used evenly."""
    bucket, sign = drift._buckets(100_000)
    assert bucket[:8].tolist() == BUCKETS
    assert sign[:8].tolist() == SIGNS
    assert np.array_equal(drift._buckets(1000)[0], bucket[:1000])
    counts = np.bincount(bucket, minlength=DRIFT_BUCKETS)
    assert len(counts) == DRIFT_BUCKETS
    assert abs(counts - 100_000 / DRIFT_BUCKETS).max() < 5 * np.sqrt(100_000 / DRIFT_BUCKETS)
    assert abs(sign.sum()) < 4 * np.sqrt(100_000)


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e-15])
def test_one_bias_everywhere_is_near_1(size: float) -> None:
    x = size * np.tile(np.random.default_rng(1).standard_normal(3000), (40, 1))
    found = value_of(x, np.repeat(np.arange(10), 4))
    assert number(found) == pytest.approx(1, abs=0.2)
    assert p_of(found) < 0.02


def test_flips_that_give_the_same_value_count() -> None:
    """Of 6 prompts 2 of 64 choices of signs: none of them, and all."""
    x = np.tile(np.random.default_rng(1).standard_normal(3000), (6, 1))
    assert p_of(value_of(x, np.arange(6))) == pytest.approx(2 / 64, abs=0.02)


def test_noise_averages_out() -> None:
    values, ps = [], []
    for seed in range(60):
        x = np.random.default_rng(seed).standard_normal((100, 1000))
        found = value_of(x, np.repeat(np.arange(20), 5), seed=seed)
        values.append(number(found) ** 2)
        ps.append(p_of(found))
    assert np.mean(values) == pytest.approx(1 / 100, rel=0.15)
    for share in (0.1, 0.25, 0.5, 0.75):
        assert np.mean(np.array(ps) <= share) == pytest.approx(share, abs=0.2)


@pytest.mark.parametrize("bias", [0.3, 1.0, 3.0])
def test_the_sketch_agrees_with_the_full_vectors(bias: float) -> None:
    errors = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((64, 800)) + bias * rng.standard_normal(800)
        times = rng.uniform(1, 5, 64)
        errors.append(number(value_of(x, np.arange(64), times)) / by_hand(x, times) - 1)
    assert abs(np.mean(errors)) < 0.05
    assert np.std(errors) < 0.1


@given(VECTORS, st.floats(1e-12, 1e12))
def test_it_is_a_share_and_has_no_scale(x: np.ndarray, size: float) -> None:
    x = np.where(abs(x) < 1e-6, 0.0, x)
    found, scaled = (value_of(each, np.arange(2)) for each in (x, size * x))
    if not x.any():
        assert found == MetricValue(None, why="μ and π are equal at every compared position")
        return
    assert 0 <= number(found) <= 1
    # Near 0 the square is a small difference, of float32 sketches.
    assert number(scaled) ** 2 == pytest.approx(number(found) ** 2, abs=1e-5)


@pytest.mark.parametrize("seed", [2, 5, 7])
def test_one_position_is_all_of_itself(seed: int) -> None:
    """Also where its sketch is shorter than itself."""
    found = value_of(np.random.default_rng(seed).standard_normal((1, 900)), np.array([0]))
    assert number(found) == pytest.approx(1)
    assert found.why == "too few prompts for a test: fewer than 6"


def flipped_by_hand(x: np.ndarray, prompt: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The value under every choice of the prompts' signs, from the full vectors."""
    n = prompt.max() + 1
    return np.array([by_hand(np.array(signs)[prompt, None] * x, times) for signs in product((1.0, -1.0), repeat=n)])


@pytest.mark.parametrize("bias", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_value_and_test_are_those_of_the_full_vectors(bias: float, seed: int) -> None:
    """Over tokens that share no bucket, where a sketch loses nothing, against all flips of the signs."""
    rng = np.random.default_rng(seed)
    own = np.unique(drift._buckets(900)[0], return_index=True)[1][:40]
    x = np.zeros((30, 900))
    x[:, own] = rng.standard_normal((30, 40)) + bias * rng.standard_normal(40)
    prompt, times = rng.permutation(np.repeat(np.arange(10), 3)), rng.uniform(1, 5, 30)
    found = value_of(x, prompt, times)
    assert number(found) == pytest.approx(by_hand(x, times), rel=1e-5)
    null = flipped_by_hand(x, prompt, times)
    p = np.mean(null >= by_hand(x, times) * (1 - 1e-9))
    assert p_of(found) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 1000) + 2e-3)
    reached = float(found.why.split("reach ")[1].split()[0])
    low, high = np.quantile(null, [0.92, 0.98])
    assert low - 0.005 <= reached <= high + 0.005


def test_with_a_sketch_the_test_is_nearly_that_of_the_full_vectors() -> None:
    pairs = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((30, 900)) + 0.12 * rng.standard_normal(900)
        prompt = np.repeat(np.arange(10), 3)
        null = flipped_by_hand(x, prompt, np.ones(30))
        pairs.append((p_of(value_of(x, prompt)), np.mean(null >= by_hand(x, np.ones(30)) * (1 - 1e-9))))
    sketched, full = np.array(pairs).T
    assert abs(sketched - full).mean() < 0.1


def test_signs_of_prompts_are_flipped_and_not_of_positions() -> None:
    """A bias of each prompt's own is no drift, however many positions share it."""
    rng = np.random.default_rng(3)
    x = np.repeat(rng.standard_normal((8, 1000)), 50, axis=0)
    assert p_of(value_of(x, np.repeat(np.arange(8), 50))) > 0.05
    assert p_of(value_of(x, np.arange(400))) < 0.01


def test_fp32_gaps_keep_their_digits() -> None:
    getcontext().prec = 50
    rng = np.random.default_rng(4)
    first = rng.normal(0, 2, 30)
    second = first + 1e-9 * rng.standard_normal(30)

    def law(logits: np.ndarray) -> list[Decimal]:
        weights = [Decimal(float(value)).exp() for value in logits]
        return [weight / sum(weights) for weight in weights]

    want = np.array([float(m - p) for m, p in zip(law(first), law(second), strict=True)])
    got = drift_columns(first[None], second[None])
    assert got["drift_square"][0] == pytest.approx(want @ want, rel=1e-5)
    np.testing.assert_allclose(got["drift_sketch"][0], sketch(want[None])[0], rtol=1e-4, atol=1e-15)


def test_rows_with_nan_are_nan_and_alone() -> None:
    logits = np.zeros((2, 3))
    logits[0, 1] = np.nan
    got = drift_columns(logits, np.zeros((2, 3)))
    assert np.isnan(got["drift_sketch"][0]).all()
    assert np.isnan(got["drift_square"][0])
    assert np.isfinite(got["drift_sketch"][1]).all()
    assert got["drift_square"][1] == 0
    with pytest.raises(ValueError, match="cannot be compared"):
        drift_columns(logits, np.zeros((2, 4)))


def test_a_temperature_divides_both() -> None:
    first, second = np.random.default_rng(8).standard_normal((2, 3, 50))
    got, want = drift_columns(first, second, 0.5), drift_columns(2 * first, 2 * second)
    assert all(np.array_equal(got[name], want[name]) for name in DRIFT)


def test_excluded_tokens_count() -> None:
    mu, pi = np.array([[0.5, 0.3, 0.2, 0.0]]), np.array([[0.1, 0.6, 0.0, 0.3]])
    with np.errstate(divide="ignore"):
        got = drift_columns(np.log(mu), np.log(pi))
    assert got["drift_square"][0] == pytest.approx(((mu - pi) ** 2).sum(), rel=1e-12)
    np.testing.assert_allclose(got["drift_sketch"], sketch(mu - pi), rtol=1e-6)
    assert got["drift_sketch"].dtype == np.float32


def test_positions_with_nan_are_left_out_and_counted() -> None:
    x = np.random.default_rng(5).standard_normal((12, 100))
    x[3] = np.nan
    found, without = value_of(x, np.arange(12)), value_of(np.delete(x, 3, 0), np.delete(np.arange(12), 3))
    assert number(found) == number(without)
    assert found.why == f"computed over the 11 of 12 positions that are finite; {without.why}"


def scores_of(count: int, nan: bool = False) -> list[Score]:
    """Scores of sequences of two compared positions each."""
    rng = np.random.default_rng(6)
    found = []
    for sequence in range(count):
        first = rng.standard_normal((2, 40))
        if nan and sequence == 0:
            first[0, 0] = np.nan
        facts = {
            "source": np.zeros(2, np.int64),
            "sequence_id": np.full(2, sequence),
            "position": np.array([1, 0]),
            "weight": np.ones(2),
            "stands_for": np.ones(2),
        }
        second = first + 0.1 * rng.standard_normal((2, 40))
        exact = facts | divergences(first, second) | drift_columns(first, second)
        found.append(Score(sequence, [-1.0, -1.0], exact=exact))
    return found


def run_of(folder: Path, scores: list[Score]) -> RunDirectory:
    table = exact_table(TRAINER, [ROLLOUT], scores)
    assert table is not None
    n = len(scores)
    requests = [RolloutRequest(i, [1], i) for i in range(n)]
    rollouts = [Rollout(i, [2, 3], [-1.0, -1.0], "length") for i in range(n)]
    sequences = sequences_table(ROLLOUT, requests, rollouts, [f"p{i}" for i in range(n)], [0] * n)
    run = RunDirectory.create(folder / "run", make_manifest())
    run.finish_pass(ROLLOUT, make_pass(), {"sequences": sequences})
    run.finish_pass(TRAINER, make_pass(covers=(ROLLOUT,)), {"exact": table})
    return run


def rows_of(run: RunDirectory, n: int) -> ExactRows:
    of = SimpleNamespace(prompt=np.arange(n), length=np.full(n, 2.0))
    rows = exact_rows(run, ROLLOUT, TRAINER, cast(PairSums, SimpleNamespace(sequences=of, n_prompts=n)))
    assert rows is not None
    return rows


@pytest.mark.parametrize("merged", [False, True])
def test_tables_give_back_what_was_compared(tmp_path: Path, merged: bool) -> None:
    scores = scores_of(8, nan=True)
    run = run_of(tmp_path, scores)
    if merged:
        run.merge()
        assert (run.path / "exact.parquet").exists()
    rows = rows_of(run, 8)
    parts: list[Any] = [score.exact for score in scores]
    # Positions were given in the other order.
    np.testing.assert_array_equal(rows.drift_square, np.concatenate([part["drift_square"][::-1] for part in parts]))
    np.testing.assert_array_equal(rows.drift_sketch, np.concatenate([part["drift_sketch"][::-1] for part in parts]))
    found = exact_metrics(rows)["score_drift"]
    assert isinstance(found, MetricValue)
    assert found.why.startswith("computed over the 15 of 16 positions")


def test_files_of_earlier_releases_have_no_value(tmp_path: Path) -> None:
    run = run_of(tmp_path, scores_of(8))
    run.merge()
    path = run.path / "exact.parquet"
    pq.write_table(pq.read_table(path).drop_columns(DRIFT), path)
    rows = rows_of(run, 8)
    assert rows.drift_sketch is None
    found = exact_metrics(rows)
    assert found["score_drift"] == MetricValue(None, why=NO_SKETCH)
    (batch,) = run._reader(TRAINER, "exact").batches(["kl", *DRIFT])
    assert batch["drift_sketch"].null_count == batch["drift_square"].null_count == 16


def test_engines_need_not_sketch(tmp_path: Path) -> None:
    scores = scores_of(8)
    bare = [
        replace(score, exact={name: column for name, column in (score.exact or {}).items() if name not in DRIFT})
        for score in scores
    ]
    rows, whole = rows_of(run_of(tmp_path, bare), 8), rows_of(run_of(tmp_path / "whole", scores), 8)
    assert (rows.drift_square, rows.drift_sketch) == (None, None)
    np.testing.assert_array_equal(rows.values["kl"], whole.values["kl"])
    assert exact_metrics(rows)["score_drift"] == MetricValue(None, why=NO_SKETCH)


def test_a_table_of_which_only_some_rows_have_sketches(tmp_path: Path) -> None:
    """As a run of an earlier release leaves it that is continued."""
    run = run_of(tmp_path, scores_of(8))
    run.merge()
    path = run.path / "exact.parquet"
    table = pq.read_table(path)
    whole = table.schema
    earlier = table.slice(0, 4).drop_columns(DRIFT)
    for name in DRIFT:
        earlier = earlier.append_column(name, pa.nulls(4, whole.field(name).type))
    pq.write_table(pa.concat_tables([earlier.select(whole.names), table.slice(4)]), path)
    rows = rows_of(run, 8)
    assert rows.drift_sketch is not None
    assert np.isnan(rows.drift_sketch).all(axis=1).tolist() == [True] * 4 + [False] * 12
    found = exact_metrics(rows)["score_drift"]
    assert isinstance(found, MetricValue)
    assert found.why.startswith("computed over the 12 of 16 positions")
