from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from mismatch_probe.metrics.length_prediction import LengthForecast, forecast_pair
from mismatch_probe.report.data import Curves
from mismatch_probe.report.figures.sequences import length_figure
from mismatch_probe.types import PairArrays
from tests.factories.report_data import make_report_data


def _pair(scale: float) -> PairArrays:
    rng = np.random.default_rng(0)
    d = rng.normal(0, scale, (40, 64)) - scale**2 / 2
    return PairArrays(
        rollout_logprob=np.zeros(d.size),
        trainer_logprob=d.ravel(),
        sequence=np.repeat(np.arange(40), 64),
        position=np.tile(np.arange(64), 40),
        prompt=np.arange(40),
    )


@pytest.fixture(scope="module")
def forecasts() -> dict[str, LengthForecast]:
    return {dtype: forecast_pair([_pair(s)]) for dtype, s in (("float16", 0.005), ("bfloat16", 0.1), ("float32", 0.0))}


def _legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curves_bands_and_measured_points_are_those_of_the_forecast(forecasts: dict[str, LengthForecast]) -> None:
    figure = length_figure(make_report_data(curves=Curves(forecast=forecasts)))
    spread, ess = figure.axes
    assert spread.get_xlabel() == "response length L (tokens)"
    assert "(nats)" in spread.get_ylabel()
    for axes, key, name in ((spread, "seq_log_ratio_std", "std"), (ess, "ess_seq", "ess")):
        found = forecasts["bfloat16"]
        line = next(line for line in axes.lines if str(line.get_label()).startswith("bfloat16"))
        assert np.array_equal(line.get_xdata(), [p.length for p in found.curve])
        assert np.array_equal(line.get_ydata(), [p.values[key].value for p in found.curve])
        seen = getattr(found.fit.measured, name)
        assert any(set(np.asarray(x.get_ydata())) == set(seen[found.fit.measured.length >= 4]) for x in axes.lines)
        band = next(c for c in axes.collections if isinstance(c, PolyCollection)).get_paths()[0].vertices
        limits = [limit for p in found.curve for limit in (p.values[key].ci_low, p.values[key].ci_high)]
        assert set(np.asarray(band)[:, 1]) == {float(limit) for limit in limits if limit is not None}


def test_crossings_are_marked_and_named(forecasts: dict[str, LengthForecast]) -> None:
    figure = length_figure(make_report_data(curves=Curves(forecast=forecasts)))
    crossing = forecasts["bfloat16"].crossings[0.5]
    assert crossing.value is not None
    marked = [(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[1].lines if len(line.get_xdata()) == 1]
    assert (crossing.value, 0.5) in marked
    bfloat16, float16, float32 = _legend(figure)
    assert f"ESS < 0.5 at {crossing.value:,.0f} [" in bfloat16
    assert "ESS < 0.1 at >512 tokens" in float16
    assert float32 == "float32"
    assert "float32: D is 0 everywhere" in figure.get_supxlabel()


def test_an_open_upper_limit_is_an_arrow() -> None:
    found = forecast_pair([_pair(0.1)])
    open_ended = replace(found.crossings[0.5], value=None, ci_high=None)
    figure = length_figure(
        make_report_data(curves=Curves(forecast={"bfloat16": replace(found, crossings={0.5: open_ended})}))
    )
    assert ">" in [line.get_marker() for line in figure.axes[1].lines]
    assert f"at >512 [{open_ended.ci_low:,.0f}, >512] tokens" in _legend(figure)[0]


def test_what_could_not_be_predicted_says_why_as_plain_text() -> None:
    pair = replace(_pair(0.1), on_policy=False, off_policy_why="$x$ \x1b[31m")
    figure = length_figure(make_report_data(curves=Curves(forecast={"bfloat16": forecast_pair([pair])})))
    assert "bfloat16: $x$ ⟨U+001B⟩[31m" in figure.get_supxlabel()
    figure.canvas.draw()


def test_no_tokens_are_drawn_without_warning() -> None:
    length_figure(make_report_data(curves=Curves(forecast={"bfloat16": forecast_pair([])}))).canvas.draw()
