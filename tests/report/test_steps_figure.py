"""The figure of training steps."""

from __future__ import annotations

import pytest

from mismatch_probe.metrics.groups import GroupResult
from mismatch_probe.report.figures.sequences import has_steps, steps_figure
from mismatch_probe.results.comparison import Comparison
from tests.factories.comparison import absent, make_comparison, make_pair, value
from tests.factories.report_data import make_report_data

KEYS = ("mean_abs_logprob_diff", "kl_k3", "ess_seq")


def recorded(*means: float | None) -> Comparison:
    """A recorded run with a step for each of `means`."""
    found = [absent("no tokens") if mean is None else value(mean) for mean in means]
    steps = tuple(
        GroupResult("step", str(number), 1000, dict.fromkeys(KEYS, mean)) for number, mean in enumerate(found)
    )
    return make_comparison((), pairs=(make_pair("recorded", "recorded", "recorded", groups=steps),))


def test_the_steps_figure_shows_every_step_and_its_band() -> None:
    summary = recorded(0.01, 0.02, 0.03, 0.04, 0.05)
    assert has_steps(summary)
    figure = steps_figure(make_report_data(summary=summary))
    for axes in figure.axes[:3]:
        (line,) = axes.lines
        assert list(line.get_xdata()) == [0, 1, 2, 3, 4]
        assert list(line.get_ydata()) == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
        assert len(axes.collections) == 1
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[2].get_yscale() == "linear"


def test_one_step_is_no_course_and_missing_values_are_said() -> None:
    assert not has_steps(recorded(0.01))
    assert "no values" in [
        text.get_text() for text in steps_figure(make_report_data(summary=recorded(None, None))).axes[0].texts
    ]
