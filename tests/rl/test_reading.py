"""Sentences of a sweep say its numbers and nothing beyond."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mismatch_probe.metrics.arms import compare_sweep
from mismatch_probe.metrics.runs import Arm, Run
from mismatch_probe.report.rl_data import Place
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.place import sample_ess
from mismatch_probe.rl.reading import notes, reading
from mismatch_probe.types import MetricValue
from tests.report.test_rl_figures import ARMS, arm

CONFIG = RlConfig()


def _comparison(differences: list[float]) -> list[object]:
    first = Arm("A", tuple(Run(i, 0.5 + d, False) for i, d in enumerate(differences)))
    second = Arm("B", tuple(Run(i, 0.5, False) for i in range(len(differences))))
    return list(compare_sweep([(first, second)]))


def test_each_arm_is_said_with_its_numbers() -> None:
    precisions, noise, mantissa, *_ = reading(ARMS, [], CONFIG)
    assert precisions.startswith("Without stress, responses of at most 64 tokens: BF16 has a mean |d| of 1.0e-2 nats")
    assert "NOISE" not in precisions
    assert noise.startswith("Under weight-noise in FAMILY (injected stress, not precision): at a dose of 0.1 ESS 0.600")
    assert "at a dose of 0.2 ESS 0.300, reward 0.400 (clean weights 0.900), 2 collapsed of 4" in noise
    assert "mantissa" in mantissa


def test_one_run_an_arm_is_no_test() -> None:
    said = reading([replace(a, n_runs=1) for a in ARMS], _comparison([0.1]), CONFIG)[-1]
    assert "Each arm is one run" in said
    assert "8 seeds" in said


def test_too_few_seeds_are_no_test() -> None:
    said = reading(ARMS, _comparison([0.1, 0.2, 0.15, 0.1]), CONFIG)[-1]
    assert said.startswith("Final rewards of A were not tested: 4 seeds shared with the reference are too few")
    assert "8 can support a test" in said


def test_a_difference_that_shows_is_said_and_one_that_does_not_has_its_size() -> None:
    clear = [0.1, 0.11, 0.12, 0.09, 0.1, 0.13, 0.08, 0.1, 0.12, 0.1]
    assert "Final reward of A is above that of B" in reading(ARMS, _comparison(clear), CONFIG)[-1]
    noise = [0.1, -0.1, 0.12, -0.09, 0.1, -0.13, 0.08, -0.1]
    said = reading(ARMS, _comparison(noise), CONFIG)[-1]
    assert said.startswith(
        "No difference in final reward from its reference was shown for A; of true differences below"
    )


def test_what_could_not_have_been_shown_is_not_called_absent() -> None:
    """8 pairs and 7 comparisons: after Holm no p can fall below .05."""
    first = [Arm(name, tuple(Run(i, 0.1, False) for i in range(8))) for name in "ABCDEFG"]
    reference = Arm("R", tuple(Run(i, 0.5 + 0.01 * i, False) for i in range(8)))
    *_, said = reading(ARMS, compare_sweep([(arm, reference) for arm in first]), CONFIG)
    assert said.startswith("For A; B; C; D; E; F; G no difference could have been shown: 8 pairs cannot show any")


def test_every_comparison_is_said_once() -> None:
    few = compare_sweep([(Arm("A", (Run(0, 0.1, False),)), Arm("R", (Run(0, 0.5, False),)))])
    many = _comparison([0.1, -0.1, 0.12, -0.09, 0.1, -0.13, 0.08, -0.1])
    said = " ".join(reading(ARMS, [*few, *many], CONFIG))  # type: ignore[list-item]
    assert "Final rewards of A were not tested: 1 seeds" in said
    assert "was shown for A;" in said


@pytest.mark.parametrize(
    ("ess", "said"), [(0.7, "next above the arm MANTISSA"), (0.1, "below every arm"), (None, "cannot be placed")]
)
def test_a_placed_model_is_said_beside_its_neighbour(ess: float | None, said: str) -> None:
    place = Place("mine", "bfloat16", MetricValue(ess), MetricValue(ess, why="too far"), MetricValue(0.04))
    sentence = reading(ARMS, [], CONFIG, places=[place])[-1]
    assert said in sentence
    assert ess is None or "is not shown" in sentence


def test_nothing_has_ended() -> None:
    assert reading([replace(arm(), n_runs=0)], [], CONFIG) == ["No run has ended yet."]


def test_notes_name_what_limits() -> None:
    found = notes([*ARMS, replace(arm("later"), n_runs=0)])
    assert "No run has ended of: LATER." in found
    assert any(note.startswith("10.0 % of the runs collapsed") for note in found)
    assert any("injected stress, not precision" in note for note in found)


@pytest.mark.parametrize(("ess", "n"), [(0.9, 64), (0.5, 64), (0.1, 64), (0.5, 16)])
def test_few_sequences_show_more_than_there_is(ess: float, n: int) -> None:
    rng = np.random.default_rng(5)
    weights = np.exp(rng.normal(0, np.sqrt(-np.log(ess)), (20_000, n)))
    shown = (weights.sum(axis=1) ** 2 / (n * (weights**2).sum(axis=1))).mean()
    assert sample_ess(ess, n) == pytest.approx(shown, abs=0.01)
    assert shown > ess


def test_at_the_ends_there_is_nothing_to_show() -> None:
    assert sample_ess(1.0, 64) == pytest.approx(1.0)
    assert 1 / 64 <= sample_ess(0.0, 64) < 0.03
    assert sample_ess(0.3, 5_000) == pytest.approx(0.3, abs=0.03)
