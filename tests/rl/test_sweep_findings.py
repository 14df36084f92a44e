"""Which statements a sweep makes: none contradicts another, and every comparison is in exactly one of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from mismatch_probe.report.words import say
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.sweep import Place
from mismatch_probe.rl.sweep_summary import sample_ess, sweep_findings
from mismatch_probe.types import MetricValue
from tests.factories.sweep import ARMS, CLEAR, NOISE, PLACE, arm, compared, comparison, matched, summary

FIRST = {
    "sweep-no-run",
    "sweep-nothing-to-compare",
    "sweep-one-run-per-arm",
    "sweep-arms-differ",
    "sweep-no-difference-shown",
    "sweep-untested",
}
SECOND = {"sweep-runs-healthy", "sweep-runs-lost", "sweep-no-plain-run"}
PAIRS = {
    "clear": comparison("CLEAR", CLEAR),
    "noise": comparison("NOISE", NOISE),
    "few": comparison("FEW", CLEAR[:3]),
    "collapsed": comparison("COLLAPSED", NOISE, collapsed=8),
    "one": comparison("ONE", CLEAR[:1]),
}


def found(**changes: Any) -> dict[str, Finding]:
    every = sweep_findings(summary(**changes))
    assert len({(one.code, one.where) for one in every}) == len(every)
    return {one.code: one for one in every}


@pytest.mark.parametrize("names", [c for n in range(5) for c in itertools.combinations(PAIRS, n)])
@pytest.mark.parametrize("lost", [0, 2])
def test_statements_over_combinations_of_comparisons(names: tuple[str, ...], lost: int) -> None:
    comparisons = compared(*(PAIRS[name] for name in names))
    arms = (arm("plain", n_runs=1 if names == ("one",) else 8, collapsed=min(lost, 1)), *ARMS[1:])
    if names == ("one",):
        arms = tuple(one.model_copy(update={"n_runs": 1, "n_collapsed": 0}) for one in arms)
    every = sweep_findings(summary(arms=arms, comparisons=comparisons))
    codes = [one.code for one in every]
    assert [code for code in codes if code in FIRST] == codes[:1]
    assert [code for code in codes if code in SECOND] == codes[1:2]
    # Each comparison of reward is said once: shown, not shown, not detectable, or not tested.
    said = [
        name
        for one in every
        for name in (
            [*one.metrics("differences")]
            if one.code == "sweep-arms-differ"
            else one.names("arms")
            if one.code in ("sweep-difference-not-shown", "sweep-difference-undetectable", "sweep-few-pairs")
            else ()
        )
    ]
    if codes[0] in ("sweep-arms-differ", "sweep-no-difference-shown"):
        assert sorted(said) == sorted(one.first for one in comparisons)
    else:
        assert said == []
    differ = any(one.reward.differs or one.collapse.differs for one in comparisons)
    assert (codes[0] == "sweep-arms-differ") == differ
    assert all(say(one) for one in every)


def test_one_run_an_arm_is_no_test() -> None:
    first = found(arms=[one.model_copy(update={"n_runs": 1}) for one in ARMS], comparisons=compared(PAIRS["one"]))
    assert first["sweep-one-run-per-arm"].number("needed") == 8
    assert "sweep-few-pairs" not in first


def test_too_few_seeds_are_no_test() -> None:
    every = found(comparisons=compared(PAIRS["few"]))
    assert every["sweep-untested"].number("pairs") == 3
    assert "sweep-few-pairs" not in every  # said once


def test_a_difference_has_its_size_and_p() -> None:
    one = found(comparisons=compared(PAIRS["clear"]))["sweep-arms-differ"]
    assert one.metrics("differences")["CLEAR"].value == pytest.approx(np.mean(CLEAR))
    assert one.names("references") == ("REFERENCE",)
    assert one.values["p"] == {"CLEAR": pytest.approx(2 / 2**10)}


def test_a_difference_of_stressed_arms_alone_is_no_warning() -> None:
    def severity(structure: str) -> str:
        return found(arms=(arm("clear", structure=structure),), comparisons=compared(PAIRS["clear"]))[
            "sweep-arms-differ"
        ].severity

    assert severity("none") == "warn"
    assert severity("mantissa") == "info"


def test_what_could_not_have_been_shown_is_not_called_absent() -> None:
    """8 pairs and 7 comparisons: after Holm no p can fall below .05."""
    pairs = [comparison(name, [-0.4 + 0.001 * i for i in range(8)]) for name in "ABCDEFG"]
    every = found(comparisons=compared(*pairs))
    assert every["sweep-difference-undetectable"].names("arms") == tuple("ABCDEFG")
    assert "sweep-difference-not-shown" not in every


def test_what_limits_a_sweep_is_noted() -> None:
    every = found(arms=(*ARMS, arm("later", n_runs=0)), failures={"run": "no sync"}, n_planned=30)
    assert every["sweep-arms-unfinished"].names("arms") == ("LATER",)
    assert (every["sweep-runs-ended-early"].number("n"), every["sweep-runs-ended-early"].number("total")) == (2, 20)
    assert every["sweep-run-failed"].where == "run"
    assert "sweep-injected-stress" in every
    assert set(found(arms=(arm("later", n_runs=0),))) == {"sweep-no-run", "sweep-no-plain-run"}


def test_runs_without_stress_that_were_lost_are_named() -> None:
    lost = found(arms=(arm("bf16", collapsed=1, diverged=1), arm("fp32")))["sweep-runs-lost"]
    assert (lost.number("n"), lost.number("total"), lost.names("arms")) == (2, 8, ("BF16 2 of 4",))
    assert "sweep-no-plain-run" in found(arms=ARMS[1:3])


def test_the_dose_response_is_said_in_two_statements() -> None:
    response = matched()
    every = found(dose_response=response)
    assert sum(code.startswith("dose-") for code in every) == 1
    assert sum(code.startswith("ess-alone-") for code in every) == 1
    assert every[f"ess-alone-{response.ess_alone}"].number("n_pairs") == len(response.matched)


@pytest.mark.parametrize(("ess", "neighbour"), [(0.7, "MANTISSA"), (0.1, None)])
def test_a_placed_model_stands_beside_its_neighbour(ess: float, neighbour: str | None) -> None:
    place = PLACE.model_copy(update={"ess_seq": MetricValue(ess)})
    assert found(places=(place,))["place-among-arms"].values["neighbour"] == neighbour


def test_a_model_without_a_prediction_has_no_place() -> None:
    unknown = MetricValue(None, why="too far")
    place = Place(**{**dict(PLACE), "predicted_ess": unknown, "ess_seq": unknown})
    assert found(places=(place,))["place-unknown"].text("why") == "too far"


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
