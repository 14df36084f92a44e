"""The report and the figure of `rl gradient`, and how its findings go together."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from mismatch_probe.config import CompareConfig
from mismatch_probe.report.figures import draw
from mismatch_probe.report.figures.gradient import gradient_figure
from mismatch_probe.report.gradient import gradient_report
from mismatch_probe.results.gradient import Gradient, GradientEstimate, MissingPass
from mismatch_probe.types import MetricValue
from tests.factories.gradient import CORRECTIONS, estimate, gradient, metric, rollout
from tests.snapshot import assert_snapshots

NONE = MetricValue(None, why="a weight overflows float64")
# One cosine for each way in which its limits can lie about 1 − cosine² = 1 %.
COSINES = {
    "gradient-turned": metric(0.9),
    "gradient-agrees": metric(0.998),
    "gradient-undecided": MetricValue(0.99, 0.5, 0.999),
}


CORRECTIONS_JUDGED = {"gradient-closest-correction", "gradient-no-closer"}


def codes(document: Gradient) -> list[str]:
    return [finding.code for finding in document.findings]


def test_snapshot() -> None:
    turned = rollout("bfloat16", 0.9).model_copy(update={"n_empty": 1, "n_impossible": 2})
    undecided = rollout("float16", MetricValue(0.99, 0.5, 0.999, "uncalibrated: fewer than 64 prompts"))
    missing = (MissingPass(rollout_pass="vllm-float16-replay\x1b[31m", why="it decoded foreign sequences"),)
    document = gradient(passes=(turned, undecided, rollout("float32", 0.999)), missing=missing)
    assert_snapshots("gradient", gradient_report(document))


@pytest.mark.parametrize("verdicts", list(itertools.product(COSINES, repeat=3)))
def test_every_dtype_has_one_verdict_and_only_a_turned_gradient_gets_a_correction(verdicts: tuple[str, ...]) -> None:
    dtypes = ("bfloat16", "float16", "float32")
    document = gradient({dtype: COSINES[code] for dtype, code in zip(dtypes, verdicts, strict=True)})
    said = {dtype: f.code for f in document.findings if f.code in COSINES for dtype in f.metrics("cosine")}
    assert said == dict(zip(dtypes, verdicts, strict=True))
    assert sum(f.code in COSINES for f in document.findings) == len(set(verdicts))
    judged = [f.text("dtype") for f in document.findings if f.code in CORRECTIONS_JUDGED]
    assert judged == [dtype for dtype, code in said.items() if code == "gradient-turned"]
    report = gradient_report(document)
    states = {"gradient-turned": "warn", "gradient-undecided": "inconclusive", "gradient-agrees": "ok"}
    assert report.state == next(state for code, state in states.items() if code in verdicts)
    assert 1 <= len(report.answer) <= 2
    commands = [step.command for step in report.steps]
    assert sum("rl run" in command for command in commands) == len(judged)
    assert sum("rl gradient" in command for command in commands) == ("gradient-undecided" in verdicts)
    assert report.steps


@pytest.mark.parametrize("cosine", [MetricValue(0.9), NONE, MetricValue(-0.999, -1.0, 0.999), MetricValue(0.99)])
def test_no_interval_decides_nothing(cosine: MetricValue) -> None:
    assert "gradient-undecided" in codes(gradient({"bfloat16": cosine}))


def test_an_estimate_that_points_backwards_is_turned() -> None:
    assert "gradient-turned" in codes(gradient({"bfloat16": MetricValue(-0.99, -0.999, -0.98)}))


def test_a_correction_is_recommended_where_it_is_closer_by_the_intervals() -> None:
    found = rollout("bfloat16", 0.9)  # [0.898, 0.902]
    reference = estimate("seq-is", "float32", metric(0.99))  # training has no such weights
    for cosine, code in ((0.95, "gradient-closest-correction"), (0.904, "gradient-no-closer")):
        equal = [estimate(name, "bfloat16", metric(cosine)) for name in ("seq-tis", "seq-mis")]
        worse = estimate("token-tis", "bfloat16", metric(0.89))
        estimates = (found.estimates[0], worse, *equal, reference)
        document = gradient(passes=(found.model_copy(update={"estimates": estimates}),))
        (judged,) = [f for f in document.findings if f.code in CORRECTIONS_JUDGED]
        assert judged.code == code
        assert judged.names("corrections") == ("seq-tis", "seq-mis")
        assert judged.metric("cosine").value == cosine
        (step,) = gradient_report(document).steps
        assert ("--algorithm pg-seq-tis" in step.command) == (code == "gradient-closest-correction")
        assert ("attribute --model smollm2-135m --pair bfloat16" in step.command) == (code == "gradient-no-closer")


def test_without_a_correction_nothing_is_recommended() -> None:
    found = rollout("bfloat16", 0.9)
    estimates = (found.estimates[0], estimate("seq-is", "bfloat16", NONE))
    assert "gradient-no-closer" in codes(gradient(passes=(found.model_copy(update={"estimates": estimates}),)))


def test_more_prompts_are_asked_for_as_the_run_was_configured() -> None:
    config = CompareConfig(model="my model", temperature=0.7, rollout_dtypes=("bfloat16",))
    (step,) = gradient_report(gradient({"bfloat16": NONE}, config=config)).steps
    assert step.command == (
        "mismatch-probe rl gradient --model 'my model' --num-prompts 128 --rollout-dtypes bf16 --temperature 0.7"
    )
    recorded = CompareConfig(source="rollouts.jsonl", model="m")
    (step,) = gradient_report(gradient({"recorded": NONE}, config=recorded)).steps
    assert step.command == ""


def test_each_limit_is_said_once_with_its_dtypes() -> None:
    cosine = MetricValue(0.9, 0.8, 0.95, "first; second")
    limits = {
        f.text("why"): f.names("dtypes")
        for f in gradient({"bfloat16": cosine, "float16": cosine}).findings
        if f.code == "gradient-limited"
    }
    assert limits == {"first": ("bfloat16", "float16"), "second": ("bfloat16", "float16")}


class TestFigure:
    def test_every_value_is_a_mark_with_its_interval_at_its_correction(self) -> None:
        document = gradient()
        names = ["none", *CORRECTIONS]
        figure = gradient_figure(document)
        assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == names
        for axes in figure.axes:
            marks = [line for line in axes.lines if line.get_marker() not in ("", "None", None)]
            found = sorted((round(float(m.get_xdata()[0])), float(m.get_ydata()[0])) for m in marks)
            every = [one for found in document.passes for one in found.estimates]
            assert found == sorted((names.index(one.correction), one.metrics.cosine.value) for one in every)
            assert len({float(m.get_xdata()[0]) for m in marks}) == len(marks)  # none hides another
            assert len(axes.collections) == len(marks)

    def test_open_marks_are_of_the_fp32_trainer(self) -> None:
        lines = [line for line in gradient_figure(gradient()).axes[0].lines if "weights" in str(line.get_label())]
        faces = {str(line.get_label()): line.get_markerfacecolor() for line in lines}
        opened = {label for label, color in faces.items() if color == "white"}
        assert opened == {"bfloat16, FP32 trainer's weights", "float16, FP32 trainer's weights"}
        assert len(faces) == 5

    def test_no_interval_hides_the_values(self) -> None:
        document = gradient({"bfloat16": MetricValue(0.9, -0.9, 0.95)})
        bottom, top = gradient_figure(document).axes[0].get_ylim()
        assert 0.8 < bottom < 0.9 < 1 < top < 1.1

    def test_without_any_value_the_figure_says_so(self, tmp_path: Path) -> None:
        none: tuple[GradientEstimate, ...] = (estimate("none", None, NONE), estimate("seq-is", "float32", NONE))
        document = gradient(passes=(rollout("bfloat16", 0.9).model_copy(update={"estimates": none}),))
        assert all([text.get_text() for text in axes.texts] for axes in gradient_figure(document).axes)
        assert draw(document, tmp_path)["gradient"].stat().st_size > 1000
