"""The report of `explain`."""

from __future__ import annotations

import json
from pathlib import Path

import mismatch_probe
from mismatch_probe.report.explain import explain_report
from mismatch_probe.results.explanation import Explanation
from tests.frozen import FROZEN, assert_frozen
from tests.snapshot import assert_snapshots, screen

DOCUMENT = FROZEN / "documents" / "explanation-1.json"


def log() -> str:
    """50 steps of verl: a slow rise, a jump at step 31, a missing value, and a name that is nearly known."""
    lines = []
    for step in range(1, 51):
        kl = 4e-4 * (1 + step / 200) * (1 + 0.02 * (step * 7 % 5)) * (12 if step > 30 else 1)
        values = {
            "training/rollout_probs_diff_mean": 0.1 * kl**0.5,
            "training/rollout_probs_diff_max": kl**0.5,
            "rollout_corr/kl": kl + 1e-4 * (step * 3 % 7 - 3),
            "rollout_corr/k3_kl": kl,
            "rollout_corr/rollout_is_max": 2.0 if step % 2 else 1.9,
            "actor/entropy": 0.25,
            "response_length/mean": 800.0,
            "training/rollout_prob_diff_std": 0.1,
        }
        if step == 9:
            values["rollout_corr/k3_kl"] = float("nan")
        lines.append(f"(TaskRunner pid=1) step:{step} - " + " - ".join(f"{k}:{v:.8g}" for k, v in values.items()))
    return "\n".join(lines) + "\n"


def document(tmp_path: Path) -> Explanation:
    (tmp_path / "train.log").write_text(log())
    audit = str(FROZEN / "audit" / "audit" / "audit.json")
    found = mismatch_probe.explain(tmp_path / "train.log", name="train.log", audit=audit, pair="fp16/fp16")
    assert found.audit is not None
    return found.model_copy(update={"audit": found.audit.model_copy(update={"source": "audit.json"})})


def test_snapshot() -> None:
    assert_snapshots("explain", explain_report(Explanation.read(DOCUMENT)))


def test_the_frozen_document_is_what_the_log_gives(tmp_path: Path) -> None:
    assert_frozen(document(tmp_path), DOCUMENT)


def test_the_answer_names_what_exceeds_a_limit() -> None:
    report = explain_report(Explanation.read(DOCUMENT))
    assert report.state == "warn"
    assert "rollout_corr/k3_kl" in report.answer[0]
    assert report.steps[-1].command.startswith("mismatch-probe compare --from DIR")


def test_many_findings_are_cut(tmp_path: Path) -> None:
    runs = ",".join(f"run{n} - gen_kl_error" for n in range(40))
    (tmp_path / "export.csv").write_text(f"Step,{runs}\n" + f"1,{','.join(['0.5'] * 40)}\n")
    found = mismatch_probe.explain(tmp_path / "export.csv")
    assert len(found.of("warn")) == 40
    assert len(explain_report(found).notes) == 13
    assert "28 more findings" in screen(explain_report(found))


def test_the_class_for_trl_is_python(tmp_path: Path) -> None:
    (tmp_path / "line").write_text(json.dumps({"sampling/sampling_logp_difference/mean": 0.01}))
    report = explain_report(mismatch_probe.explain(tmp_path / "line"))
    (section,) = [one for one in report.sections if one.name == "dump-trl"]
    codes = [block.text for block in section.blocks if type(block).__name__ == "Code"]
    compile(codes[0], "trl", "exec")
