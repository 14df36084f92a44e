from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from mismatch_probe.report.gradient import draw_gradient, gradient_figure, print_gradient

KEYS = ("cosine", "norm_ratio", "added_variance", "effective_batch", "ess_weights")
CORRECTIONS = ("token-tis", "icepop", "seq-is", "seq-tis", "seq-mis")


def _metric(value: float | None, half: float = 0.02) -> dict[str, Any]:
    if value is None:
        return {"value": None, "ci_low": None, "ci_high": None, "why": "a weight overflows float64"}
    return {"value": value, "ci_low": value - half, "ci_high": value + half}


def _arm(correction: str, trainer: str | None, value: float | None) -> dict[str, Any]:
    return {
        "correction": correction,
        "trainer_pass": trainer and f"hf-{trainer}-cast",
        "trainer_dtype": trainer,
        "trainer_mode": trainer and "cast",
        "metrics": {key: _metric(value) for key in KEYS},
        "draws": {"cosine": None, "norm_ratio": None},
    }


def _pass(dtype: str, value: float) -> dict[str, Any]:
    trainers = list(dict.fromkeys([dtype, "float32"]))
    return {
        "rollout_pass": f"vllm-{dtype}-decode",
        "rollout_dtype": dtype,
        "n_sequences": 32,
        "n_prompts": 32,
        "n_tokens": 3_007,
        "n_empty": 1,
        "n_nonfinite": 0,
        "logprob_gap": 1e-5,
        "pairs": [
            {
                "trainer_pass": f"hf-{trainer}-cast",
                "trainer_dtype": trainer,
                "trainer_mode": "cast",
                "mean_length": 94.0,
                "metrics": {
                    key: _metric(value)
                    for key in ("mean_abs_logprob_diff", "ess_seq", "ess_seq_gaussian", "ess_random_walk")
                },
                "lengths": [{"length": 384, "ess_random_walk": _metric(0.4), "ess_seq": _metric(0.45)}],
                "half_length": {"value": 183.0, "ci_low": 152.0, "ci_high": None},
            }
            for trainer in trainers
        ],
        "arms": [_arm("none", None, value)]
        + [_arm(name, trainer, value + i / 100) for trainer in trainers for i, name in enumerate(CORRECTIONS)],
    }


@pytest.fixture
def document() -> dict[str, Any]:
    passes = [_pass("bfloat16", 0.9), _pass("float16", 0.95), _pass("float32", 0.96)]
    passes[0]["arms"][3] = _arm("seq-is", "bfloat16", None)
    return {
        "model": "smollm2-135m",
        "directions": 16384,
        "advantages": "signs",
        "passes": passes,
        "missing": [{"rollout_pass": "vllm-float16-replay\x1b[31m", "why": "no"}],
    }


def test_every_value_is_a_mark_with_its_interval_at_its_correction(document: dict[str, Any]) -> None:
    figure = gradient_figure(document)
    for axes, key in zip(figure.axes, ("cosine", "effective_batch"), strict=True):
        assert [label.get_text() for label in axes.get_xticklabels()] == ["none", *CORRECTIONS]
        marks = [line for line in axes.lines if line.get_marker() not in ("", "None", None)]
        found = sorted((round(float(m.get_xdata()[0])), round(float(m.get_ydata()[0]), 9)) for m in marks)
        names = ["none", *CORRECTIONS]
        expected = sorted(
            (names.index(arm["correction"]), round(arm["metrics"][key]["value"], 9))
            for found in document["passes"]
            for arm in found["arms"]
            if arm["metrics"][key]["value"] is not None
        )
        assert found == expected
        assert len({float(m.get_xdata()[0]) for m in marks}) == len(marks)  # none hides another
        assert len(axes.collections) == len(marks)


def test_open_marks_are_of_the_fp32_trainer(document: dict[str, Any]) -> None:
    axes = gradient_figure(document).axes[0]
    of = {
        str(line.get_label()): line.get_markerfacecolor() for line in axes.lines if "rollouts" in str(line.get_label())
    }
    assert {label for label, color in of.items() if color == "white"} == {
        "bfloat16 rollouts, FP32 trainer's weights",
        "float16 rollouts, FP32 trainer's weights",
    }
    assert len(of) == 5


def test_no_interval_hides_the_values(document: dict[str, Any]) -> None:
    document["passes"][0]["arms"][0]["metrics"]["cosine"]["ci_low"] = -0.9
    bottom, top = gradient_figure(document).axes[0].get_ylim()
    assert 0.8 < bottom < 0.9 < 1 < top


def test_without_any_value_the_figure_says_so(document: dict[str, Any], tmp_path: Any) -> None:
    for found in document["passes"]:
        found["arms"] = [_arm("seq-is", "float32", None)]
    figure = gradient_figure(document)
    assert all("nothing finite was measured" in [text.get_text() for text in axes.texts] for axes in figure.axes)
    assert draw_gradient(document, tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_terminal_shows_everything_whole(document: dict[str, Any], width: int) -> None:
    out = io.StringIO()
    print_gradient(document, Console(file=out, width=width))
    text = out.getvalue()
    assert "…" not in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    joined = " ".join(text.split())
    for words in (
        "bfloat16 rollouts: 32 sequences of 32 prompts, 3,007 tokens, without 1 empty",
        "at 183 [152, ∞] tokens",
        "(by growth 0.450 [0.430, 0.470])",
        "(1 − c²)/128",
        "Note: bfloat16: a weight overflows float64",
        "Missing: vllm-float16-replay⟨U+001B⟩[31m: no",
    ):
        assert words in joined, words
    row = next(line for line in text.splitlines() if line.lstrip().startswith("seq-tis"))
    assert "0.930" in row
