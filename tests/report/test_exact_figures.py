from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from mismatch_probe.report.data import noise_floor
from mismatch_probe.report.figures import figures_of
from mismatch_probe.report.figures.pairs import RATIO_LIMITS, budget_figure, exact_figure
from mismatch_probe.report.figures.tokens import share_figure
from mismatch_probe.report.format import bin_order
from mismatch_probe.types import MetricValue
from tests.factories.comparison import absent
from tests.factories.report_data import make_report_data

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mismatch_probe.report.data import ReportData
    from mismatch_probe.results.comparison import Comparison, Pair

BUDGET = ("rollout_error_rms", "trainer_error_rms", "predicted_gap_rms", "measured_gap_rms")


def _texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def _pair(summary: Comparison, rollout: str, trainer: str) -> Pair:
    return next(pair for pair in summary.pairs if (pair.rollout_dtype, pair.trainer_dtype) == (rollout, trainer))


def _with(summary: Comparison, rollout: str, trainer: str, table: str, **values: MetricValue) -> Comparison:
    """`summary` with other values in a table of one pair."""
    old = _pair(summary, rollout, trainer)
    new = old.model_copy(update={table: getattr(old, table) | values})
    return summary.model_copy(update={"pairs": tuple(new if pair is old else pair for pair in summary.pairs)})


def _budget(summary: Comparison, dtype: str) -> dict[str, MetricValue]:
    budget = _pair(summary, dtype, dtype).budget
    assert budget is not None
    return budget


def _bars(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def _points(axes: Axes, color: str) -> list[tuple[float, float]]:
    """The drawn points of a colour, arrowheads included."""
    lines = [line for line in axes.lines if line.get_color() == color and line.get_marker() not in {"", "None"}]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]  # type: ignore[index]


def _spans(axes: Axes) -> list[tuple[float, float, float]]:
    """(x, low, high) of every interval."""
    segments = [segment for lines in axes.collections for segment in lines.get_segments()]  # type: ignore[attr-defined]
    return [(float(ends[0][0]), float(ends[0][1]), float(ends[1][1])) for ends in segments]


def test_budget_bars_are_the_four_numbers_of_each_dtype_with_their_intervals(exact: ReportData) -> None:
    axes = budget_figure(exact).axes[0]
    dtypes = ("bfloat16", "float16", "float32")
    cells = [_budget(exact.summary, dtype)[key] for dtype in dtypes for key in BUDGET]
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "RMS over tokens (nats)"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(dtypes)
    np.testing.assert_allclose([bar.get_height() for bar in _bars(axes)], [cell.value for cell in cells])
    spans = [(low, high) for _, low, high in _spans(axes)]
    np.testing.assert_allclose(spans, [(cell.ci_low, cell.ci_high) for cell in cells])
    low, high = axes.get_ylim()
    assert all(low < cell.ci_low < cell.ci_high < high for cell in cells)


def test_budget_bars_differ_on_a_grey_print(exact: ReportData) -> None:
    bars = _bars(budget_figure(exact).axes[0])[:4]
    looks = {(round(float(np.dot(to_rgb(bar.get_facecolor()), (0.3, 0.59, 0.11))), 1), bar.get_hatch()) for bar in bars}
    assert len(looks) == 4


def test_the_budget_names_its_reference_and_shows_what_float32_leaves(exact: ReportData) -> None:
    figure = budget_figure(exact)
    note = figure.get_supxlabel().replace("\n", " ")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "against hf-float64-cast" in note
    assert "charges every difference of implementation to the rollout engine" in note
    assert legend[4:] == ["float32–float32 gap: 6.25e-6 nats", "noise floor of a float32 reference: 4.00e-6 nats"]
    lines = {str(line.get_label()): line.get_ydata()[0] for line in figure.axes[0].lines}  # type: ignore[index]
    assert list(lines.values()) == pytest.approx([6.25e-6, 4e-6])


def test_only_a_float64_reference_has_a_noise_floor(exact: ReportData) -> None:
    floor = noise_floor(exact.summary)
    assert floor is not None
    assert floor.value == 4e-6
    assert noise_floor(exact.summary.model_copy(update={"reference": "hf-float32-cast"})) is None


def test_a_budget_without_float32_says_that_nothing_shows_the_implementations(exact: ReportData) -> None:
    pairs = [pair for pair in exact.summary.pairs if "float32" not in (pair.rollout_dtype, pair.trainer_dtype)]
    figure = budget_figure(make_report_data(summary=exact.summary.model_copy(update={"pairs": tuple(pairs)})))
    assert "no float32–float32 pair" in figure.get_supxlabel().replace("\n", " ")
    assert not figure.axes[0].lines


def test_an_error_of_zero_is_written_and_has_no_bar(exact: ReportData) -> None:
    zero, none = MetricValue(0.0, 0.0, 0.0), absent("no token is finite")
    summary = _with(exact.summary, "float32", "float32", "budget", trainer_error_rms=zero, predicted_gap_rms=none)
    axes = budget_figure(make_report_data(summary=summary.model_copy(update={"reference": "hf-float32-cast"}))).axes[0]
    assert [bar.get_height() for bar in _bars(axes)][9:11] == [0.0, 0.0]
    assert _texts(axes)[9:11] == ["0", "–"]


def test_exact_kl_of_every_pair_is_drawn_by_rollout_dtype(exact: ReportData) -> None:
    top, bottom = exact_figure(exact).axes
    pairs = [(pair, pair.metrics["kl_exact"]) for pair in exact.summary.pairs]
    points = [line for line in top.lines if line.get_marker() not in {"", "None"}]
    assert top.get_yscale() == "log"
    np.testing.assert_allclose([line.get_ydata()[0] for line in points], [cell.value for _, cell in pairs])
    np.testing.assert_allclose(
        [(low, high) for _, low, high in _spans(top)], [(cell.ci_low, cell.ci_high) for _, cell in pairs]
    )
    assert [line.get_marker() for line in points] == ["o", "s", "^"] * 3
    assert [tick.get_text() for tick in bottom.get_xticklabels()] == [pair.trainer_dtype for pair, _ in pairs]
    assert [text for text in _texts(top) if text.startswith("μ")] == [
        f"μ: {dtype}" for dtype in ("bfloat16", "float16", "float32")
    ]


def test_estimates_are_drawn_in_units_of_the_exact_value(exact: ReportData) -> None:
    bottom = exact_figure(exact).axes[1]
    np.testing.assert_allclose([y for _, y in _points(bottom, "#111111")], 1.0)
    np.testing.assert_allclose([y for _, y in _points(bottom, "#2166ac")], 1.1 / 0.9)
    np.testing.assert_allclose([y for _, y in _points(bottom, "#4d9221")], 1.0 / 0.9)
    k2 = [(low, high) for x, low, high in _spans(bottom) if x == pytest.approx(0.1)]
    np.testing.assert_allclose(k2, [(0.7 * 1.1 / 0.9, 1.3 * 1.1 / 0.9)])


def test_an_interval_that_leaves_the_panel_ends_in_arrows_and_a_negative_estimate_is_shown(exact: ReportData) -> None:
    bottom = exact_figure(exact).axes[1]
    drawn = [y for _, y in _points(bottom, "#b2182b")]
    assert len(drawn) == 9  # only bfloat16 sampled: three estimates, two arrowheads each
    np.testing.assert_allclose(sorted(set(np.round(drawn, 9))), [RATIO_LIMITS[0], -0.5 / 0.9, RATIO_LIMITS[1]])
    k1 = [(low, high) for x, low, high in _spans(bottom) if x == pytest.approx(-0.1)]
    assert k1 == [RATIO_LIMITS]
    assert "no k1 where another policy sampled" in bottom.get_xlabel()


def test_an_estimate_outside_the_panel_is_given_as_a_number(exact: ReportData) -> None:
    unit = _pair(exact.summary, "bfloat16", "bfloat16").metrics["kl_exact"].value
    assert unit is not None
    far = MetricValue(-812 * unit, -900 * unit, -700 * unit)
    bottom = exact_figure(
        make_report_data(summary=_with(exact.summary, "bfloat16", "bfloat16", "metrics", kl_k1=far))
    ).axes[1]
    assert _texts(bottom) == ["-812×"]
    assert [y for x, y in _points(bottom, "#b2182b") if x == pytest.approx(-0.1)] == [RATIO_LIMITS[0]]


def test_a_pair_without_exact_value_leaves_its_place_empty(exact: ReportData) -> None:
    summary = _with(exact.summary, "float16", "float16", "metrics", kl_exact=MetricValue(0.0, 0.0, 0.0))
    summary = _with(summary, "float16", "float32", "metrics", kl_exact=absent())
    top, bottom = exact_figure(make_report_data(summary=summary)).axes
    assert len([line for line in top.lines if line.get_marker() not in {"", "None"}]) == 7
    assert {"0", "–"} <= set(_texts(top))
    assert len(_points(bottom, "#111111")) == 7


def test_all_exact_values_being_zero_can_be_drawn(exact: ReportData) -> None:
    summary = exact.summary
    for pair in exact.summary.pairs:
        zero = MetricValue(0.0, 0.0, 0.0)
        summary = _with(summary, pair.rollout_dtype, pair.trainer_dtype, "metrics", kl_exact=zero)
    figure = exact_figure(make_report_data(summary=summary))
    figure.draw_without_rendering()
    assert _texts(figure.axes[0]).count("0") == 9


def test_shares_hold_the_data_with_a_row_per_property_and_a_column_per_dtype(exact: ReportData) -> None:
    figure = share_figure(exact)
    panels = np.array(figure.axes).reshape(4, 3)
    names = ("probability", "entropy", "rank", "token_kind")
    for row, name in zip(panels, names, strict=True):
        for axes, dtype in zip(row, ("bfloat16", "float16", "float32"), strict=True):
            bins = exact.summary.where[dtype][name]
            widths = [bar.get_width() for bar in _bars(axes)]
            assert widths == [row.contribution for row in bins] + [row.fraction_of_tokens for row in bins]
        assert [tick.get_text() for tick in row[0].get_yticklabels()] == [row.label for row in bins]
    assert panels[0, 0].get_title(loc="left") == "rollout probability μ(token)"
    assert [_texts(axes)[-1] for axes in panels[0]] == ["bfloat16", "float16", "float32"]


def test_a_bin_that_one_dtype_lacks_keeps_its_place(exact: ReportData) -> None:
    where = {dtype: dict(found) for dtype, found in exact.summary.where.items()}
    where["float16"]["rank"] = where["float16"]["rank"][::2]
    del where["float32"]["rank"]
    panels = np.array(
        share_figure(make_report_data(summary=exact.summary.model_copy(update={"where": where}))).axes
    ).reshape(4, 3)
    assert [bar.get_y() + 0.4 for bar in _bars(panels[2, 1])[:2]] == pytest.approx([0.0, 2.0])
    assert _texts(panels[2, 2]) == ["not known"]


def test_bins_are_ordered_by_their_lower_limit_or_kind() -> None:
    assert bin_order(["≥ 6", "0.1–0.3", "0–0.01", "1–2"]) == ["0–0.01", "0.1–0.3", "1–2", "≥ 6"]
    assert bin_order(["1e-05–0.1", "0–1e-05"]) == ["0–1e-05", "1e-05–0.1"]
    assert bin_order(["100–999", "10–29", "3–4", "0", "0"]) == ["0", "3–4", "10–29", "100–999"]
    assert bin_order(["special", "word", "digit", "??"]) == ["digit", "word", "special", "??"]


def test_figures_without_data_are_not_drawn(exact: ReportData) -> None:
    whole, bare = ({info.name for info in figures_of(data)} for data in (exact, make_report_data()))
    assert whole - bare == {"budget", "exact", "share"}
