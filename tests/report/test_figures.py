from __future__ import annotations

from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.patches import Rectangle

from mismatch_probe.errors import TableError
from mismatch_probe.report.data import Curves, ReportData
from mismatch_probe.report.figures import draw
from mismatch_probe.report.figures.pairs import matrix_figure
from mismatch_probe.report.figures.tokens import ccdf_figure, policy_figure, where_figure
from mismatch_probe.types import MetricValue
from tests.factories.attribution import attribution
from tests.factories.comparison import make_comparison, make_metrics, make_missing, make_pair
from tests.factories.manifest import make_manifest
from tests.factories.report_data import make_curves, make_report_data

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

HATCHED = "///"
ALWAYS = {"policy", "ccdf", "matrix", "where"}


def of(curves: Curves) -> ReportData:
    return make_report_data(curves=curves)


def _texts(axes: Axes) -> str:
    return "\n".join(text.get_text() for text in axes.texts)


def _array(artist: ScalarMappable) -> NDArray[np.float64]:
    """The artist's data with NaN where it draws nothing."""
    masked: Any = artist.get_array()
    filled: NDArray[np.float64] = masked.filled(np.nan)
    return filled


def _line(axes: Axes, label: str) -> Any:
    return next(line for line in axes.lines if line.get_label() == label)


@pytest.mark.parametrize("dtypes", [("bfloat16",), ("bfloat16", "float16"), ("bfloat16", "float16", "float32")])
def test_policy_figure_shows_the_data_of_each_dtype(dtypes: tuple[str, ...]) -> None:
    curves = make_curves(dtypes)
    figure = policy_figure(of(curves))
    panels = figure.axes[: 2 * len(dtypes)]
    for dtype, top, bottom in zip(dtypes, panels[: len(dtypes)], panels[len(dtypes) :], strict=True):
        assert top.get_title().startswith(dtype)
        assert f"{curves.density[dtype].n:,} tokens" in top.get_title()
        mesh = next(artist for artist in top.collections if isinstance(artist, QuadMesh))
        drawn = _array(mesh)
        np.testing.assert_array_equal(np.nan_to_num(drawn.reshape(10, 10)), curves.density[dtype].counts.T)
        dots, fit = _line(bottom, "sequences"), _line(bottom, "fit")
        np.testing.assert_array_equal(dots.get_xdata(), curves.length[dtype].response_length)
        np.testing.assert_array_equal(dots.get_ydata(), curves.length[dtype].seq_log_ratio)
        slope, intercept = curves.length[dtype].slope_per_1k, curves.length[dtype].intercept
        assert slope is not None
        assert intercept is not None
        np.testing.assert_allclose(fit.get_ydata(), intercept + slope * np.array(fit.get_xdata()) / 1000)


def test_policy_axes_are_labelled_with_units() -> None:
    curves = make_curves(("bfloat16",))
    top, bottom = policy_figure(of(curves)).axes[:2]
    assert top.get_xlabel() == "rollout probability μ(token)"
    assert top.get_ylabel() == "trainer probability π(token)"
    assert bottom.get_xlabel() == "response length (tokens)"
    assert bottom.get_ylabel() == "log(π/μ) of a sequence (nats)"


def test_long_responses_are_drawn_in_thousands_and_the_line_stays() -> None:
    curves = make_curves(("bfloat16",), longest=26_000)
    bottom = policy_figure(of(curves)).axes[1]
    assert bottom.get_xlabel() == "response length (thousand tokens)"
    assert max(_line(bottom, "sequences").get_xdata()) == 26.0
    curve = curves.length["bfloat16"]
    assert curve.slope_per_1k is not None
    assert curve.intercept is not None
    assert _line(bottom, "fit").get_ydata()[1] == pytest.approx(curve.intercept + 26.0 * curve.slope_per_1k)


def test_sixteen_bit_panels_share_a_symmetric_scale_and_float32_says_that_it_has_its_own() -> None:
    curves = make_curves()
    bf16, fp16, fp32 = policy_figure(of(curves)).axes[3:6]
    assert bf16.get_ylim() == fp16.get_ylim()
    low, high = fp32.get_ylim()
    assert low == -high
    assert high < bf16.get_ylim()[1] / 100
    assert [axes.get_title(loc="right") for axes in (bf16, fp16, fp32)] == [
        "shared y-scale",
        "shared y-scale",
        "own y-scale",
    ]


def test_the_slope_carries_its_interval_or_the_reason_why_there_is_none() -> None:
    curves = make_curves(("bfloat16", "float16"))
    why = "lengths hardly vary: $\\frac"
    curves.length["float16"] = replace(
        curves.length["float16"], slope_per_1k=None, intercept=None, slope_ci=None, why=why
    )
    fitted, not_fitted = policy_figure(of(curves)).axes[2:4]
    assert "slope -8.00e-2 [-0.120, -4.00e-2]" in _texts(fitted)
    assert "not fitted: lengths hardly vary" in _texts(not_fitted)
    assert not [line for line in not_fitted.lines if line.get_label() == "fit"]


def test_a_fit_shows_what_limits_it() -> None:
    curves = make_curves(("bfloat16",))
    curves.length["bfloat16"] = replace(curves.length["bfloat16"], why="uncalibrated: 8 prompts")
    assert "uncalibrated: 8 prompts" in _texts(policy_figure(of(curves)).axes[1])


def test_a_dtype_with_half_of_its_curves_leaves_the_other_panel_saying_so() -> None:
    curves = make_curves(("bfloat16", "float16"))
    del curves.length["float16"]
    del curves.density["bfloat16"]
    axes = policy_figure(of(curves)).axes
    assert _texts(axes[0]) == "no tokens"
    assert _texts(axes[3]) == "no sequences"


def test_ccdf_holds_the_data_and_tells_dtypes_apart_without_colour() -> None:
    curves = make_curves()
    axes = ccdf_figure(of(curves)).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel().endswith("(nats)")
    for dtype, curve in curves.ccdf.items():
        np.testing.assert_array_equal(_line(axes, dtype).get_xdata(), curve.abs_diff)
        np.testing.assert_array_equal(_line(axes, dtype).get_ydata(), curve.share)
    assert len({line.get_linestyle() for line in axes.lines}) == 3


def test_where_holds_the_data_and_skips_intervals_that_do_not_exist() -> None:
    curves = make_curves()
    left, right = where_figure(of(curves)).axes[:2]
    for axes, binned in ((left, curves.by_probability), (right, curves.by_position)):
        bands = [artist for artist in axes.collections if isinstance(artist, PolyCollection)]
        assert len(bands) == 3
        assert all(np.isfinite(path.vertices).all() for band in bands for path in band.get_paths())
        for dtype, curve in binned.items():
            np.testing.assert_array_equal(_line(axes, dtype).get_ydata(), curve.mean_abs)
    assert left.get_ylabel() == "mean |d| (nats)"
    assert right.get_xlabel() == "position in the response (tokens)"
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0–0.01", "0.01–0.1", "0.1–0.5", "0.5–0.9", "0.9–1"]


def test_bins_that_only_one_dtype_has_keep_their_place() -> None:
    curves = make_curves(("bfloat16", "float16"))
    short = curves.by_probability["float16"]
    fields = ("left", "right", "n", "mean_abs", "ci_low", "ci_high")
    curves.by_probability["float16"] = replace(short, **{name: getattr(short, name)[2:] for name in fields})
    axes = where_figure(of(curves)).axes[0]
    assert list(_line(axes, "float16").get_xdata()) == [2, 3, 4]


def test_no_difference_is_said_and_not_drawn() -> None:
    curves = make_curves(scale=0.0)
    assert "No difference above 0." in _texts(ccdf_figure(of(curves)).axes[0])
    assert all("No difference above 0." in _texts(axes) for axes in where_figure(of(curves)).axes)


def test_one_dtype_without_difference_is_named_in_the_legend() -> None:
    mixed = make_curves(("bfloat16",)).ccdf | make_curves(("float32",), scale=0.0).ccdf
    legend = ccdf_figure(of(Curves(ccdf=mixed))).axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["bfloat16", "float32: no difference above 0"]


def test_matrix_cells_carry_value_interval_and_self_noise(data: ReportData) -> None:
    axes = matrix_figure(data).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == ["4.00e-2", "[3.60e-2, 4.40e-2]\nself-noise 1.2e-4"]
    assert "[4.50e-6, 5.50e-6]\nself-noise 0" in texts
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["bfloat16", "float16", "float32"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["bfloat16", "float16", "float32"]
    image = _array(axes.images[0])
    np.testing.assert_array_equal(image[:, 0], [4e-2, np.nan, 4e-2])


def test_missing_cells_are_hatched_and_say_why(data: ReportData) -> None:
    axes = matrix_figure(data).axes[0]
    hatched = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch() == HATCHED]
    assert [patch.get_xy() for patch in hatched] == [(-0.5, 0.5)]
    assert "no float16 in vLLM" in _texts(axes)


def test_several_trainer_modes_get_a_column_each() -> None:
    axes = matrix_figure(
        make_report_data(summary=make_comparison(("bfloat16", "float16"), modes=("cast", "autocast")))
    ).axes[0]
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels == ["bfloat16\n(cast)", "bfloat16\n(autocast)", "float16\n(cast)", "float16\n(autocast)"]


def _rendered(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), None, 3e-3])
def test_matrix_of_one_odd_value_can_be_drawn(tmp_path: Path, value: float | None) -> None:
    pair = make_pair(metrics=make_metrics(1.0, mean_abs_logprob_diff=MetricValue(value)))
    _rendered(matrix_figure(make_report_data(summary=make_comparison((), pairs=(pair,)))), tmp_path / "matrix.png")


def test_draw_writes_every_figure_reproducibly_and_leaves_nothing_else(tmp_path: Path) -> None:
    data = ReportData(make_comparison(("bfloat16",)), make_manifest(), make_curves(("bfloat16",)), [])
    first, second = draw(data, tmp_path / "a"), draw(data, tmp_path / "b")
    assert first == {name: tmp_path / "a" / f"{name}.png" for name in ALWAYS}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(f"{name}.png" for name in ALWAYS)
    for name in ALWAYS:
        content = first[name].read_bytes()
        assert content.startswith(b"\x89PNG")
        assert content == second[name].read_bytes()
        assert b"tEXt" not in content
        assert b"tIME" not in content


WITHOUT_MORE = {*ALWAYS, "exact", "budget", "share"}


@pytest.mark.parametrize(
    ("run", "drawn"),
    [("empty", set()), ("data", ALWAYS), ("hostile", WITHOUT_MORE), ("exact", WITHOUT_MORE)],
)
def test_draw_draws_what_the_run_has(run: str, drawn: set[str], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert set(draw(request.getfixturevalue(run), tmp_path)) == drawn


def test_draw_of_curves_without_a_single_difference(tmp_path: Path) -> None:
    draw(ReportData(make_comparison(()), make_manifest(), make_curves(("bfloat16",), scale=0.0), []), tmp_path)


def test_reasons_in_other_scripts_raise_no_warning(tmp_path: Path) -> None:
    summary = make_comparison(("bfloat16",), missing=(make_missing("float16", "bfloat16", "显存不足 $x_{$"),))
    draw(ReportData(summary, make_manifest(), Curves(), []), tmp_path)


def test_a_failed_write_leaves_no_partial_file(data: ReportData, tmp_path: Path) -> None:
    (tmp_path / "policy.png").mkdir()
    with pytest.raises(TableError, match=r"policy\.png"):
        draw(data, tmp_path)
    assert all(path.suffix == ".png" for path in tmp_path.iterdir())


def test_figures_do_without_pyplot_and_its_global_state() -> None:
    sources = [path for path in resources.files("mismatch_probe.report.figures").iterdir() if path.name.endswith(".py")]
    assert len(sources) == 10
    assert not [source for source in sources if "pyplot" in source.read_text(encoding="utf-8")]


def test_figures_of_an_unchanged_document_are_not_drawn_again(tmp_path: Path) -> None:
    found = attribution()
    before = {name: path.stat().st_ino for name, path in draw(found, tmp_path).items()}
    assert before
    assert {name: path.stat().st_ino for name, path in draw(found, tmp_path).items()} == before
    lost = next(iter(before))
    (tmp_path / f"{lost}.png").write_bytes(b"")
    again = {name: path.stat().st_ino for name, path in draw(found, tmp_path).items()}
    assert (tmp_path / f"{lost}.png").stat().st_size > 0
    assert {name for name in before if again[name] != before[name]} <= {lost}
    changed = found.model_copy(update={"n_tokens": found.n_tokens + 1})
    after = {name: path.stat().st_ino for name, path in draw(changed, tmp_path).items()}
    assert all(after[name] != again[name] for name in after)
