"""What a run's steps show: windows, learning, and which statements a run makes."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.summary import MIN_STEPS, run_findings, summarise
from tests.factories.rl_run import CAUSES, ending, noisy, step, steps

CONFIG = RlConfig()
ENDS = (None, "", *CAUSES)


def codes(rows: pd.DataFrame, cause: str | None = "", config: RlConfig = CONFIG) -> list[str]:
    ended = None if cause is None else ending(cause)
    return [found.code for found in run_findings(config, ended, summarise(rows, config))]


@pytest.mark.parametrize(
    ("rewards", "learning"),
    [
        (noisy(0.3, 0.6), "rose"),
        (noisy(0.6, 0.3), "fell"),
        (noisy(0.5, 0.5), "flat"),
        ([0.0] * 10 + [1.0] * 10, "rose"),
        ([0.0] * 20, "flat"),
        ([0.3] * (MIN_STEPS - 1) + [0.9] * (MIN_STEPS - 1), "unknown"),
        ([0.3], "unknown"),
        ([], "unknown"),
    ],
)
def test_learning_is_what_the_interval_says(rewards: list[float], learning: str) -> None:
    summary = summarise(steps(rewards), CONFIG)
    assert summary.learning == learning
    assert (summary.reward_change.ci_low is None) == bool(summary.reward_change.why)


def test_flat_rewards_are_seldom_called_a_change() -> None:
    """Welch's interval over steps keeps its level, with steps as noisy as 64 responses make them."""
    rng, called = np.random.default_rng(1), 0
    rows = steps([0.0] * 20)
    for _ in range(400):
        rows["reward"] = rng.binomial(64, 0.4, 20) / 64
        called += summarise(rows, CONFIG).learning != "flat"
    assert called / 400 < 0.08


def test_windows_are_means_of_their_steps_and_never_overlap() -> None:
    rows = pd.DataFrame([step(i, reward=i / 100, gap=10.0 ** -(3 + (i >= 15))) for i in range(30)])
    rows.loc[2, "ess_seq"] = None
    summary = summarise(rows, CONFIG)
    assert summary.start is not None
    assert summary.end is not None
    assert (summary.start.first_step, summary.start.n_steps) == (0, 10)
    assert (summary.end.first_step, summary.end.n_steps) == (20, 10)
    assert summary.start.reward == pytest.approx(0.045)
    assert summary.end.mean_abs_logprob_diff == pytest.approx(1e-4)
    assert summary.start.ess_seq == pytest.approx(0.99)
    assert summary.start.truncated == pytest.approx(1 / 16)
    assert summary.end.seconds == 4.0
    assert summary.n_responses == 480
    short = summarise(rows.head(7), CONFIG)
    assert short.start is not None
    assert short.start.n_steps == 3


def test_the_largest_sync_gap_is_placed() -> None:
    rows = pd.DataFrame([step(i, sync_gap=gap) for i, gap in enumerate([1e-4, 3e-3, 2e-4])])
    sync = summarise(rows, CONFIG).sync
    assert (sync.n_checked, sync.largest_gap, sync.at_step) == (3, 3e-3, 1)
    unchecked = summarise(rows.assign(sync_gap=None), RlConfig(check_sync=False)).sync
    assert (unchecked.n_checked, unchecked.largest_gap) == (0, None)


def test_the_source_is_the_largest_part() -> None:
    def largest(**parts: float) -> object:
        found = run_findings(CONFIG, ending(), summarise(steps(noisy(0.3, 0.6), **parts), CONFIG))
        return next(one.text("largest") for one in found if one.code == "rl-gap-source")

    assert largest(gap=1e-1) == "mismatch"
    assert largest(staleness_mean_abs=1e-1) == "staleness"
    assert largest(movement_mean_abs=1e-1) == "movement"


@pytest.mark.parametrize("cause", ENDS)
@pytest.mark.parametrize("rewards", [noisy(0.3, 0.6), noisy(0.6, 0.3), noisy(0.5, 0.5), [0.5], []])
@pytest.mark.parametrize("passed", [False, True])
def test_one_statement_says_how_a_run_ended(cause: str | None, rewards: list[float], passed: bool) -> None:
    """A run that collapsed or diverged is not said to have learned, nor to have passed or missed a test of its end."""
    ended = None if cause is None else ending(cause, passed=passed and not cause)
    summary = summarise(steps(rewards), CONFIG)
    found = [one.code for one in run_findings(CONFIG, ended, summary)]
    outcomes = [code for code in found if code in CAUSES or code.startswith("rl-reward") or code == "rl-unfinished"]
    assert outcomes == found[:1]
    assert found[1] in ("rl-gap", "rl-gap-unmeasured")
    assert len(found) == len(set(found))
    early = cause is None or cause != ""
    assert any(code.startswith("rl-sanity") for code in found) == (not early)
    assert ("rl-healthy-checkpoint" in found) == bool(cause)
    if cause == "":
        assert found[0] == f"rl-reward-{summary.learning}"
        fine = passed or summary.learning == "rose"
        assert (run_findings(CONFIG, ended, summary)[0].severity == "info") == fine


def test_what_limits_a_run_is_noted() -> None:
    rows = steps(noisy(0.3, 0.6), n_skipped=1, n_grader_killed=2, n_empty=3)
    found = codes(rows, "", RlConfig(check_sync=False, stress="mantissa", dose=3))
    limits = ["rl-injected-stress", "rl-sync-unchecked", "rl-updates-skipped", "rl-grader-killed", "rl-empty-responses"]
    assert set(limits) <= set(found)
    assert not set(limits) & set(codes(steps(noisy(0.3, 0.6))))


def test_steps_without_a_token_measure_no_gap() -> None:
    rows = steps(noisy(0.3, 0.6)).assign(mean_abs_logprob_diff=math.nan, movement_mean_abs=None)
    found = codes(rows)
    assert "rl-gap-unmeasured" in found
    assert "rl-gap-source" not in found
