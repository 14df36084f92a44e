"""Figures of an audit: what is drawn is what the document says, in place of what was not measured is a sentence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mismatch_probe.metrics.floats import ScaleRange
from mismatch_probe.report.figures import draw, figures_of
from mismatch_probe.report.figures.audit import gradients_figure, lag_figure, range_figure
from mismatch_probe.results.audit import Audit
from mismatch_probe.results.ranges import Lag, LayerMotion, LayerPeaks
from tests.factories.audit import activations, audit, bare, gradients, lag, measured, peak, value

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def line_of(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    line = next(line for line in axes.lines if line.get_label() == label)
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def texts_of(figure: Figure) -> str:
    texts = [text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title, axes._left_title)]
    return " | ".join(texts)


def of_forward(**changes: Any) -> Audit:
    return audit(found=measured(forward=activations(**changes)))


def of_lag(**changes: Any) -> Audit:
    return audit(found=measured(lag=lag(**changes)))


def test_layers_are_drawn_as_they_are_against_the_largest_number() -> None:
    left, _ = range_figure(audit()).axes
    names = {
        "first_token_peak": "first token, largest",
        "rest_peak": "other tokens, largest",
        "rest_p999": "other tokens, 99.9 %",
        "rest_median": "other tokens, median",
    }
    for key, label in names.items():
        x, y = line_of(left, label)
        assert x == [0, 1, 2, 3, 4]
        assert y == [getattr(row, key) for row in activations().residual_by_layer]
    assert any(np.all(np.asarray(line.get_ydata()) == 65504) for line in left.lines)
    assert left.get_yscale() == "log"
    assert len({(line.get_linestyle(), line.get_marker()) for line in left.lines[1:]}) == 4


def test_peaks_stand_at_their_context_and_end_where_nothing_is_known() -> None:
    right, rows = range_figure(audit()).axes[1], activations().by_context
    for key, label in (("peak", "any tensor"), ("residual", "residual stream")):
        x, y = line_of(right, label)
        assert y == [getattr(row, key) for row in rows]
        assert x == pytest.approx([math.sqrt((r.first + 1) * min(r.last + 1, 48)) for r in rows])
        assert max(x) <= 48
    assert right.get_xscale() == right.get_yscale() == "log"
    assert right.get_xlim()[1] > 2 * 48


def test_a_peak_beyond_the_largest_number_lies_in_the_shaded_region() -> None:
    layer = LayerPeaks(layer=0, first_token_peak=1e6, rest_peak=10.0, rest_median=1.0, rest_p999=5.0)
    left = range_figure(of_forward(residual_by_layer=(layer,))).axes[0]
    assert left.get_ylim()[1] > 1e6


def test_layers_that_are_not_finite_in_fp32_are_marked() -> None:
    found = activations()
    layers = tuple(row.model_copy(update={"rest_median": 0.0}) for row in found.residual_by_layer)
    broken = (
        peak("embed", "residual", None, 0.0, n_nonfinite=1),
        peak("model.layers.2", "residual", 2, 0.0, n_nonfinite=1),
    )
    left = range_figure(of_forward(tensors=(*found.tensors, *broken), residual_by_layer=layers)).axes[0]
    assert line_of(left, "not finite even in FP32")[0] == [2]
    assert math.isnan(line_of(left, "other tokens, median")[1][2])


def test_one_token_of_context_can_be_drawn(tmp_path: Path) -> None:
    found = of_forward(longest=1, by_context=activations().by_context[:1], residual_by_layer=())
    assert "no residual stream was seen" in texts_of(range_figure(found))
    assert draw(found, tmp_path)["range"].stat().st_size > 1000


def test_gradients_are_fractions_of_their_side() -> None:
    axes, masses = gradients_figure(audit()).axes[1], gradients().mass_by_exponent
    for side in ("weight", "activation"):
        x, y = line_of(axes, f"gradients of {side}s")
        total = sum(mass for _, mass in masses[side])
        assert x == [exponent + 0.5 for exponent, _ in masses[side]]
        assert y == pytest.approx([mass / total for _, mass in masses[side]])


@pytest.mark.parametrize(
    ("scale", "exponent", "word"), [(2.0**14, 14, "recommended"), (None, 16, "usual first"), (1.0, 0, "recommended")]
)
def test_windows_are_what_fp16_keeps_at_a_loss_scale(scale: float | None, exponent: int, word: str) -> None:
    found = audit()
    assert found.recommendation is not None
    recommendation = found.recommendation.model_copy(update={"loss_scale": scale})
    figure = gradients_figure(found.model_copy(update={"recommendation": recommendation}))
    strip, axes = figure.axes
    ends = [np.asarray(line.get_xdata(), float).tolist() for line in strip.lines]
    assert ends[0] == pytest.approx([-25, math.log2(65520)])
    assert ends[1] == pytest.approx([-25 - exponent, math.log2(65520) - exponent])
    lines = [float(np.asarray(line.get_xdata())[0]) for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert sorted(lines) == pytest.approx(sorted([*ends[0], *ends[1]]))
    assert f"{word} one, $2^{{{exponent}}}$" in texts_of(figure)


def test_without_a_recommendation_the_usual_scale_is_shown() -> None:
    assert "usual first one" in texts_of(gradients_figure(audit(recommendation=None)))


def test_an_empty_range_of_scales_and_no_gradient_can_be_drawn(tmp_path: Path) -> None:
    empty = gradients(scales=ScaleRange(20, 12, "lm_head", "model.norm"))
    assert "2^12" in texts_of(gradients_figure(audit(found=measured(backward=empty))))
    none = gradients(scales=None, mass_by_exponent={"weight": (), "activation": ((-30, 0.0),)})
    found = audit(found=measured(backward=none))
    assert "no tensor got a gradient" in texts_of(gradients_figure(found))
    assert draw(found, tmp_path)["gradients"].stat().st_size > 1000


def test_motion_and_gaps_are_drawn_as_they_are() -> None:
    left, right = lag_figure(audit()).axes
    found = lag()
    assert found.motion is not None
    for row in found.motion.rows:
        label = {"bfloat16": "BF16", "float16": "FP16"}[row.dtype]
        x, y = line_of(left, f"{label} engine, rate {row.rate:g}")
        assert x == [0, 1, 2, 3]
        assert y == [layer.steady_ulp for layer in row.by_layer]
    marks = [line for line in right.lines if len(line.get_xdata()) == 1]
    gaps = [case.mean_abs_logprob_diff for case in found.cases]
    assert sorted(float(mark.get_ydata()[0]) for mark in marks) == sorted(gap.value or 0.0 for gap in gaps)
    assert [round(float(mark.get_xdata()[0])) for mark in marks] == [0, 1, 2, 0, 1, 2]
    assert len({float(mark.get_xdata()[0]) for mark in marks}) == 6
    segments = [tuple(segment[:, 1]) for drawn in right.collections for segment in drawn.get_segments()]
    assert segments == [pytest.approx((gap.ci_low, gap.ci_high)) for gap in gaps]


def test_a_learning_rate_has_one_marker_on_both_sides() -> None:
    left, right = lag_figure(audit()).axes
    of_rate = {
        str(line.get_label()).split()[-1]: line.get_marker() for line in left.lines if "rate" in line.get_label()
    }
    marks = [line.get_marker() for line in right.lines if len(line.get_xdata()) == 1]
    assert marks[1:3] == [of_rate["1e-06"], of_rate["1e-05"]]


def with_layers(found: Lag, layers: tuple[LayerMotion, ...]) -> Lag:
    assert found.motion is not None
    rows = tuple(row.model_copy(update={"by_layer": layers}) for row in found.motion.rows)
    return found.model_copy(update={"motion": found.motion.model_copy(update={"rows": rows})})


def test_no_motion_and_no_gap_are_told() -> None:
    zero = tuple(
        case.model_copy(update={"mean_abs_logprob_diff": value(None if case.rate else 0.0)}) for case in lag().cases
    )
    still = with_layers(lag(cases=zero), ())
    text = texts_of(lag_figure(audit(found=measured(lag=still))))
    assert "no motion by layer was measured" in text
    assert "no gap above 0" in text
    still = with_layers(lag(), (LayerMotion(layer=0, steady_ulp=0.0),))
    assert "no weight moved" in texts_of(lag_figure(audit(found=measured(lag=still))))


def test_only_what_was_measured_is_drawn() -> None:
    assert figures_of(bare()) == []
    assert [info.name for info in figures_of(audit(found=measured(backward=None, lag=None)))] == ["range"]


def test_files_are_written_alike_twice_whatever_a_tensor_is_called(tmp_path: Path) -> None:
    hostile = gradients(scales=ScaleRange(20, 12, "$x$ <b>\x1b[31m", "$\\frac{"))
    found = audit(found=measured(backward=hostile))
    first, again = (draw(found, tmp_path / name) for name in ("a", "b"))
    assert list(first) == ["range", "gradients", "lag"]
    for name, path in first.items():
        assert path.name == f"{name}.png"
        assert path.read_bytes() == again[name].read_bytes()
