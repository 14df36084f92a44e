"""The collapse rule: what it must see, what it must not, and how often noise alone sets it off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.results.finding import Finding
from mismatch_probe.rl.summary import CollapseDetector

RESPONSES = 64


def feed(detector: CollapseDetector, rewards: Sequence[float], n: int = RESPONSES, start: int = 0) -> list[Finding]:
    found = [detector.update(start + i, float(reward), n) for i, reward in enumerate(rewards)]
    return [verdict for verdict in found if verdict is not None]


def first_collapse(rewards: Sequence[float], window: int = 10, n: int = RESPONSES) -> int | None:
    detector = CollapseDetector(window)
    for step, reward in enumerate(rewards):
        verdict = detector.update(step, float(reward), n)
        if verdict is not None and verdict.code == "rl-collapsed":
            return step
    return None


def noisy(rng: np.random.Generator, mean: float, steps: int, unequal: float) -> list[float]:
    """Mean rewards of 8 problems with 8 responses each; the larger `unequal`, the more problems differ."""
    share = rng.beta(mean / unequal, (1 - mean) / unequal, (steps, 8)) if unequal else np.full((steps, 8), mean)
    return list(rng.binomial(8, share).mean(1) / 8)


def test_a_fall_from_a_plateau_is_seen_with_the_last_healthy_step() -> None:
    rng = np.random.default_rng(0)
    rewards = noisy(rng, 0.7, 60, 1.0) + noisy(rng, 0.05, 40, 1.0)
    at = first_collapse(rewards)
    assert at is not None
    assert 60 <= at < 80
    detector = CollapseDetector()
    verdicts = feed(detector, rewards[: at + 1])
    assert verdicts[-1].code == "rl-collapsed"
    assert detector.last_healthy_step is not None
    assert detector.last_healthy_step < 64
    best = np.mean(rewards[detector.last_healthy_step - 9 : detector.last_healthy_step + 1])
    assert verdicts[-1].values == {
        "step": at,
        "best": best,
        "best_step": detector.last_healthy_step,
        "present": np.mean(rewards[at - 9 : at + 1]),
        "window": 10,
    }


def test_a_rise_then_a_fall_is_seen() -> None:
    rewards = [*np.linspace(0.1, 0.9, 100), *np.linspace(0.9, 0.0, 20), *np.zeros(10)]
    at = first_collapse(rewards)
    assert at is not None
    assert 110 <= at < 125


def test_a_fall_by_less_than_half_is_none() -> None:
    rewards = [*[0.8] * 50, *[0.41] * 100]
    assert first_collapse(rewards) is None
    assert first_collapse([*[0.8] * 50, *[0.39] * 100]) is not None


def test_a_slow_collapse_is_seen_however_far_back_the_best_window_lies() -> None:
    """Within any 100 steps it loses less than half, so a rule that looks no further back would never end the run."""
    rng = np.random.default_rng(3)
    means = [*np.linspace(0.8, 0.27, 400), *[0.27] * 50]
    assert all(after > 0.5 * before for before, after in zip(means, means[100:], strict=False))
    at = first_collapse([noisy(rng, mean, 1, 1.0)[0] for mean in means])
    assert at is not None
    assert at > 250


def test_very_unequal_problems_drawn_as_the_loop_draws_them_are_no_collapse() -> None:
    """A step of hard ones after a step of easy ones is chance; a switch for good would be a collapse to the rule."""
    rng = np.random.default_rng(4)
    difficulty = np.repeat([0.95, 0.05], 64)
    for _ in range(20):
        order = np.concatenate([rng.permutation(128) for _ in range(20)]).reshape(-1, 8)
        assert first_collapse([float(rng.binomial(8, difficulty[step]).mean() / 8) for step in order]) is None
    sorted_by_difficulty = [0.95] * 40 + [0.05] * 40
    assert first_collapse(sorted_by_difficulty) is not None


def test_windows_do_not_overlap() -> None:
    """While the best window reaches into the last one, there is nothing to compare."""
    at = first_collapse([*[0.9] * 10, *[0.0] * 20])
    assert at == 19


@pytest.mark.parametrize("window", [2, 3, 5, 10])
def test_a_sudden_fall_is_seen_after_more_than_36_steps_over_the_window(window: int) -> None:
    """The fall's own square is in the run's spread: of T steps D² / (2 (T − 1)), and two windows' means have it."""
    at = first_collapse([*[1.0] * window, *[0.0] * 40], window)
    assert at == max(2 * window - 1, 36 // window + 1)


def test_too_few_steps_say_nothing() -> None:
    detector = CollapseDetector()
    assert feed(detector, [1.0] * 9) == []
    assert detector.last_healthy_step is None
    assert feed(detector, [0.5], start=9) == []
    assert detector.last_healthy_step == 9


@pytest.mark.parametrize("window", [5, 10])
@pytest.mark.parametrize("mean", [0.1, 0.3])
@pytest.mark.parametrize("unequal", [0.0, 1.0, 5.0])
def test_flat_rewards_do_not_collapse(window: int, mean: float, unequal: float) -> None:
    """The best of hundreds of windows is good by luck, the present one bad, and either's spread small."""
    rng = np.random.default_rng((window, int(100 * mean), int(unequal)))
    assert sum(first_collapse(noisy(rng, mean, 300, unequal), window) is not None for _ in range(8)) == 0


def test_a_lucky_window_of_equal_rewards_is_not_taken_for_certainty() -> None:
    """Two equal steps have no spread of their own; the run's has to stand in."""
    rewards = [0.0, 1.0, 0.0, 1.0, 0.5, 1.0, 1.0, 0.0, 0.5, 0.0, 0.0]
    assert first_collapse(rewards, window=2, n=1000) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(0, 60), st.integers(2, 6))
def test_a_restored_detector_goes_on_alike(rewards: list[float], cut: int, window: int) -> None:
    cut = min(cut, len(rewards))
    straight = CollapseDetector(window)
    expected = [straight.update(i, reward, 8) for i, reward in enumerate(rewards)]
    first = CollapseDetector(window)
    begun: list[Any] = [first.update(i, reward, 8) for i, reward in enumerate(rewards[:cut])]
    state = first.state()
    kept = json.dumps(state)
    second = CollapseDetector.from_state(json.loads(kept))
    begun += [second.update(cut + i, reward, 8) for i, reward in enumerate(rewards[cut:])]
    assert begun == expected
    assert second.state() == straight.state()
    assert second.last_healthy_step == straight.last_healthy_step
    feed(first, [0.5], start=cut)
    assert json.dumps(state) == kept


def test_no_signal_is_said_once_until_there_is_one_again() -> None:
    rewards = [0.0] * 30 + [0.5] + [1.0] * 25
    detector = CollapseDetector(30)
    said = [(i, v) for i, r in enumerate(rewards) if (v := detector.update(i, r, 8)) is not None]
    assert [(i, v.code) for i, v in said] == [(19, "rl-no-signal"), (50, "rl-no-signal")]
    assert said[0][1].values == {"step": 19, "n_steps": 20}


def test_equal_rewards_other_than_0_and_1_are_told_by_the_caller() -> None:
    detector = CollapseDetector(30)
    said = [detector.update(i, 0.5, 8, equal=True) for i in range(20)]
    assert [v is not None for v in said] == [False] * 19 + [True]
    detector = CollapseDetector(30)
    assert not any(detector.update(i, 0.0, 8, equal=False) for i in range(40))


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_a_bug(reward: float) -> None:
    """It would be the best window for ever, or never."""
    with pytest.raises(AssertionError):
        CollapseDetector().update(0, reward, 8)


def test_steps_come_one_after_another() -> None:
    with pytest.raises(AssertionError):
        CollapseDetector().update(1, 0.5, 8)
