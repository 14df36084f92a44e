"""Figures of an audit: what is drawn is what the document says, in place of what it lacks is a sentence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mismatch_probe.report.figures.audit import draw_audit, gradients_figure, lag_figure, range_figure
from tests.report.audit_documents import audit_document, bare_document, hostile_document, metric, peak

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def line_of(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    line = next(line for line in axes.lines if line.get_label() == label)
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def texts_of(figure: Figure) -> str:
    return " | ".join(text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title, axes._left_title))


def test_layers_are_drawn_as_they_are_against_the_largest_number() -> None:
    forward = audit_document()["range"]["forward"]
    left, _ = range_figure(audit_document()).axes
    names = {
        "first_token_peak": "first token, largest",
        "rest_peak": "other tokens, largest",
        "rest_p999": "other tokens, 99.9 %",
        "rest_median": "other tokens, median",
    }
    for key, label in names.items():
        x, y = line_of(left, label)
        assert x == [0, 1, 2, 3, 4]
        assert y == [row[key] for row in forward["residual_by_layer"]]
    assert any(np.all(np.asarray(line.get_ydata()) == 65504) for line in left.lines)
    assert left.get_yscale() == "log"
    assert "65504, FP16's largest number" in texts_of(range_figure(audit_document()))
    assert len({(line.get_linestyle(), line.get_marker()) for line in left.lines[1:]}) == 4


def test_peaks_stand_at_their_context_and_end_where_nothing_is_known() -> None:
    figure = range_figure(audit_document())
    right = figure.axes[1]
    rows = audit_document()["range"]["forward"]["by_context"]
    for key, label in (("peak", "any tensor"), ("residual", "residual stream")):
        x, y = line_of(right, label)
        assert y == [row[key] for row in rows]
        assert x == pytest.approx([math.sqrt((r["first"] + 1) * min(r["last"] + 1, 48)) for r in rows])
        assert max(x) <= 48
    assert right.get_xscale() == right.get_yscale() == "log"
    assert "nothing is known\nbeyond\n48 tokens" in texts_of(figure)
    assert right.get_xlim()[1] > 2 * 48


def test_a_peak_beyond_the_largest_number_lies_in_the_shaded_region() -> None:
    document = audit_document()
    document["range"]["forward"]["residual_by_layer"][3]["first_token_peak"] = 1e6
    left = range_figure(document).axes[0]
    assert left.get_ylim()[1] > 1e6


def test_layers_that_are_not_finite_in_fp32_are_marked() -> None:
    document = audit_document()
    document["range"]["forward"]["tensors"] += [
        peak("embed", "residual", None, 0.0, n_nonfinite=1),
        peak("model.layers.2", "residual", 2, 0.0, n_nonfinite=1),
    ]
    document["range"]["forward"]["residual_by_layer"][2]["rest_median"] = 0.0
    left = range_figure(document).axes[0]
    assert line_of(left, "not finite even in FP32")[0] == [2]
    assert math.isnan(line_of(left, "other tokens, median")[1][2])


def test_one_token_of_context_can_be_drawn(tmp_path: Path) -> None:
    document = audit_document()
    forward = document["range"]["forward"]
    forward |= {"longest": 1, "by_context": forward["by_context"][:1], "residual_by_layer": []}
    figure = range_figure(document)
    assert "no residual stream was seen" in texts_of(figure)
    assert "beyond\n1 tokens" in texts_of(figure)
    assert draw_audit(document, tmp_path)["range"].stat().st_size > 1000


def test_gradients_are_shares_of_their_side() -> None:
    axes = gradients_figure(audit_document()).axes[1]
    masses = audit_document()["range"]["backward"]["mass_by_exponent"]
    for side in ("weight", "activation"):
        x, y = line_of(axes, f"gradients of {side}s")
        total = sum(mass for _, mass in masses[side])
        assert x == [exponent + 0.5 for exponent, _ in masses[side]]
        assert y == pytest.approx([mass / total for _, mass in masses[side]])


@pytest.mark.parametrize(
    ("scale", "exponent", "word"), [(2.0**14, 14, "recommended"), (None, 16, "usual first"), (1.0, 0, "recommended")]
)
def test_windows_are_what_fp16_keeps_at_a_loss_scale(scale: float | None, exponent: int, word: str) -> None:
    document = audit_document()
    document["recommendation"]["loss_scale"] = scale
    figure = gradients_figure(document)
    strip, axes = figure.axes
    ends = [np.asarray(line.get_xdata(), float).tolist() for line in strip.lines]
    assert ends[0] == pytest.approx([-25, math.log2(65520)])
    assert ends[1] == pytest.approx([-25 - exponent, math.log2(65520) - exponent])
    lines = [float(np.asarray(line.get_xdata())[0]) for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert sorted(lines) == pytest.approx(sorted([*ends[0], *ends[1]]))
    assert f"{word} one, $2^{{{exponent}}}$" in texts_of(figure)
    assert "loss scales from $2^{13}$ to $2^{26}$ serve every tensor" in texts_of(figure)


def test_without_a_recommendation_the_usual_scale_is_shown() -> None:
    assert "usual first one" in texts_of(gradients_figure(audit_document(recommendation=None)))


def test_an_empty_range_of_scales_and_no_gradient_are_said(tmp_path: Path) -> None:
    document = audit_document()
    backward = document["range"]["backward"]
    backward["scales"] |= {"low": 20, "high": 12}
    assert "no loss scale serves every tensor" in texts_of(gradients_figure(document))
    backward |= {"scales": None, "mass_by_exponent": {"weight": [], "activation": [[-30, 0.0]]}}
    assert "no tensor got a gradient" in texts_of(gradients_figure(document))
    assert draw_audit(document, tmp_path)["gradients"].stat().st_size > 1000


def test_motion_and_gaps_are_drawn_as_they_are() -> None:
    lag = audit_document()["range"]["lag"]
    left, right = lag_figure(audit_document()).axes
    for row in lag["motion"]["rows"]:
        x, y = line_of(left, f"{row['dtype']} engine, rate {row['rate']:g}")
        assert x == [0, 1, 2, 3]
        assert y == [layer["steady_ulp"] for layer in row["by_layer"]]
    marks = [line for line in right.lines if len(line.get_xdata()) == 1]
    assert sorted(float(mark.get_ydata()[0]) for mark in marks) == sorted(
        case["mean_abs_logprob_diff"]["value"] for case in lag["cases"]
    )
    assert [round(float(mark.get_xdata()[0])) for mark in marks] == [0, 1, 2, 0, 1, 2]
    assert len({float(mark.get_xdata()[0]) for mark in marks}) == 6
    segments = [tuple(segment[:, 1]) for found in right.collections for segment in found.get_segments()]
    assert segments == [
        pytest.approx((case["mean_abs_logprob_diff"]["ci_low"], case["mean_abs_logprob_diff"]["ci_high"]))
        for case in lag["cases"]
    ]
    assert [label.get_text() for label in right.get_xticklabels()] == [
        "steady",
        "first step\nat 1e-06",
        "first step\nat 1e-05",
    ]


def test_a_learning_rate_has_one_marker_on_both_sides() -> None:
    left, right = lag_figure(audit_document()).axes
    of_rate = {
        str(line.get_label()).split()[-1]: line.get_marker() for line in left.lines if "rate" in line.get_label()
    }
    marks = [line.get_marker() for line in right.lines if len(line.get_xdata()) == 1]
    assert marks[1:3] == [of_rate["1e-06"], of_rate["1e-05"]]


def test_no_motion_and_no_gap_are_said() -> None:
    document = audit_document()
    lag = document["range"]["lag"]
    for case in lag["cases"]:
        case["mean_abs_logprob_diff"] = metric(None) if case["rate"] else metric(0.0)
    for row in lag["motion"]["rows"]:
        row["by_layer"] = []
    assert "no motion by layer was measured" in texts_of(lag_figure(document))
    assert "no gap above 0" in texts_of(lag_figure(document))
    for row in lag["motion"]["rows"]:
        row["by_layer"] = [{"layer": 0, "steady_ulp": 0.0}]
    assert "no weight moved" in texts_of(lag_figure(document))


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    assert draw_audit(bare_document(), tmp_path) == {}
    document = audit_document()
    document["range"] |= {"backward": None, "lag": None}
    assert list(draw_audit(document, tmp_path)) == ["range"]


@pytest.mark.parametrize("make", [audit_document, hostile_document])
def test_files_are_written_alike_twice(make: Any, tmp_path: Path) -> None:
    first, again = (draw_audit(make(), tmp_path / name) for name in ("a", "b"))
    assert list(first) == ["range", "gradients", "lag"]
    for name, path in first.items():
        assert path.name == f"{name}.png"
        assert path.read_bytes() == again[name].read_bytes()
