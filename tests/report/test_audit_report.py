"""An audit's report: an answer for every precision first, and no two statements that contradict each other."""

from __future__ import annotations

from itertools import product
from pathlib import PurePath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.metrics.floats import NO_SCALE, ScaleRange
from mismatch_probe.report.audit import audit_report
from mismatch_probe.report.model import Report, Table
from mismatch_probe.report.words import all_words, say
from mismatch_probe.results.audit import Audit, AuditedPair
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.ranges import Range
from mismatch_probe.types import MetricValue
from tests.factories.audit import (
    LEVELS,
    PEAK,
    activations,
    audit,
    audited,
    bare,
    baseline,
    check,
    gradients,
    measured,
    value,
)
from tests.snapshot import assert_snapshots

LABELS = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}
KINDS = tuple(LEVELS)


def test_an_audit_reads_like_this() -> None:
    assert_snapshots("audit", audit_report(audit(baseline=baseline()), PurePath("runs/my-run")))


def test_every_precision_is_answered_first() -> None:
    """The recommended one is not all that is told: FP16 that overflows at layer 11 fails beside FP32 that is ok."""
    tensor = "model.layers.11.mlp.down_proj"
    overflow = Finding(
        code="audit-activation-overflow",
        severity="fail",
        where=tensor,
        values=PEAK | {"peak": 1.2e5, "tensor": tensor},
    )
    fp16 = audited("float16", "float16", [check("fp16_headroom", "fail", 0.5, finding=overflow)])
    fp32 = audited("float32", "float32", [check("kl_k3", "ok")])
    found = audit((fp16, fp32))
    report = audit_report(found)
    assert found.verdict == report.state == "ok"
    assert [name.dtypes for name in found.decided_by] == [("float32", "float32")]
    assert report.answer[0].startswith("FP16 fails, BF16 is inconclusive, FP32 is ok.")
    assert report.answer[1].startswith("FP16: fail. ")
    assert tensor in report.answer[1]
    assert report.answer[2].startswith("BF16: inconclusive. ")
    assert report.answer[3].startswith("FP32: ok. ")


def test_a_model_that_computes_nothing_finite_is_told_once_and_without_a_table_of_dashes() -> None:
    broken = [
        audited(dtype, dtype, [check("nonfinite_logprobs", "fail", 1.0), check("kl_k3", "inconclusive", None)])
        for dtype in LABELS
    ]
    told = Finding(
        code="audit-no-finite-logprob",
        severity="fail",
        where="model.layers.3.mlp",
        values={"n_tokens": 300, "n_pairs": 3, "weight": None, "tensor": "model.layers.3.mlp", "measured": True},
    )
    report = audit_report(audit(broken, findings=(told,)))
    assert report.state == "fail"
    assert report.answer == ("FP16 fails, BF16 fails, FP32 fails.", say(told))
    assert "model.layers.3.mlp" in report.answer[1]
    assert "checkpoint" in report.steps[0].text
    elsewhere = told.model_copy(update={"where": "", "values": {**told.values, "tensor": None}})
    assert "tokens.parquet" in audit_report(audit(broken, findings=(elsewhere,))).steps[0].text
    assert report.table is None
    assert report.notes == ()
    names = {section.name for section in report.sections}
    assert "range" in names
    assert not names & {"pairs", "configuration", "corrections"}


def test_nothing_compared_and_nothing_measured_is_told() -> None:
    report = audit_report(bare())
    assert report.state == "inconclusive"
    assert report.table is None
    assert [section.name for section in report.sections] == ["provenance"]
    assert [step.command for step in report.steps if step.command.startswith("mismatch-probe audit --resume")]


def test_commands_are_exact() -> None:
    pairs = [audited(dtype, dtype, [check("kl_k3", "inconclusive")]) for dtype in ("float16", "bfloat16")]
    report = audit_report(audit(pairs, measured(proof=None)), PurePath("runs/a b"))
    commands = [step.command for step in report.steps if step.command]
    assert commands == [
        "mismatch-probe audit --resume 'runs/a b'",
        "mismatch-probe audit --model smollm2-135m --prompts PROMPTS.jsonl --num-prompts 104 "
        "--rollout-dtypes fp16,bf16,fp32 --trainer-dtypes fp16,bf16,fp32 --planned-tokens 1024",
    ]


def test_what_was_asked_for_and_is_not_there_has_an_answer() -> None:
    found = audit(wanted=(("float32", "float16"), ("float16", "bfloat16")))
    assert found.verdict == "inconclusive"
    asked = [answer for answer in found.answers if answer.decides]
    assert [(answer.dtypes, answer.compared, answer.verdict) for answer in asked] == [
        (("float16", "bfloat16"), True, "inconclusive"),
        (("float32", "float16"), False, "inconclusive"),
    ]


def test_both_modes_of_a_dtype_are_answered() -> None:
    pairs = [
        audited("float16", "float16", [check("kl_k3", kind)], mode)
        for kind, mode in (("fail", "cast"), ("ok", "autocast"))
    ]
    answers = audit(pairs).answers
    assert [(answer.trainer_mode, answer.verdict) for answer in answers[:2]] == [("cast", "fail"), ("autocast", "ok")]


def test_every_code_of_an_audit_has_words_with_a_meaning() -> None:
    codes = [words for code, words in all_words().items() if code.startswith("audit-")]
    assert len(codes) > 50
    assert all(words.meaning for words in codes)


def verdicts_shown(report: Report) -> dict[str, list[str]]:
    """By column of the table, what stands in it as a verdict of the pair, of each answer, and of the headline."""
    assert isinstance(report.table, Table)
    row = next(row for row in report.table.rows if row[0].text == "verdict")
    return {
        column.title: [cell.text]
        for column, cell in zip(report.table.columns, row, strict=True)
        if column.title not in ("check", "limit")
    }


def texts_of(report: Report) -> str:
    steps = " ".join(step.text for step in report.steps)
    return " ".join((*report.answer, steps, *(note.text for note in report.notes)))


def consistent(found: Audit) -> None:
    report = audit_report(found)
    shown = verdicts_shown(report)
    assert report.state == found.verdict
    for answer, sentence in zip(found.answers, report.answer[1:], strict=True):
        pair = found.pair(answer)
        label = LABELS[answer.rollout_dtype]
        assert sentence.startswith(f"{label}: {answer.verdict}. ")
        assert (pair is None) == (label not in shown)
        if pair is not None:
            assert shown[label] == [pair.verdict] == [answer.verdict]
            # What decides has the verdict, or may have it where the verdict is open.
            decides = pair.check(answer.check)
            assert (decides is None) == (answer.verdict == "ok")
            if decides is not None:
                assert decides.verdict in (answer.verdict, "inconclusive")
            for name in answer.also:
                other = pair.check(name)
                assert other is not None
                assert other.verdict in (answer.verdict, "inconclusive")
        assert answer.settle is None or answer.verdict in ("inconclusive", "warn")
    text = texts_of(report)
    fails = found.verdict == "fail"
    assert ("Run " in text and " on both sides" in text) == (found.verdict in ("ok", "warn"))
    if fails:
        assert found.recommendation is None or found.recommendation.snippets == ()
        assert "Cap " not in text
        assert "Start dynamic loss scaling" not in text
    if "No loss scale serves" in text:
        assert "Start dynamic loss scaling" not in text


@settings(max_examples=60, deadline=None)
@given(
    outcomes=st.fixed_dictionaries(
        {dtype: st.one_of(st.none(), st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS))) for dtype in LABELS}
    ),
    scales=st.sampled_from([(13, 26), (20, 12), (0, NO_SCALE), None]),
    ess=st.sampled_from([value(0.99, 0.01), value(0.6), value(0.3), value(0.04), MetricValue(None, why="few")]),
)
def test_answer_table_steps_and_notes_agree(
    outcomes: dict[str, tuple[str, str] | None], scales: tuple[int, int] | None, ess: MetricValue
) -> None:
    pairs: list[AuditedPair] = []
    for dtype, kinds in outcomes.items():
        if kinds is not None:
            name = "fp16_headroom" if dtype == "float16" else "fp32_floor"
            checks = [
                check("kl_k3", kinds[0]),
                check(name, kinds[1], where="model.layers.1" if name[:4] == "fp16" else ""),
            ]
            pairs.append(audited(dtype, dtype, checks))
    found = None if scales is None else ScaleRange(*scales, "lm_head", "model.norm")
    if pairs:
        consistent(audit(pairs, Range(forward=activations(), backward=gradients(scales=found)), ess=ess))


@pytest.mark.parametrize(
    ("low", "high", "code"), [(13, 26, "loss-scales"), (20, 12, "no-loss-scale"), (0, NO_SCALE, "gradient-not-finite")]
)
def test_whether_a_loss_scale_serves_has_one_wording(low: int, high: int, code: str) -> None:
    found = gradients(scales=ScaleRange(low, high, "lm_head", "model.norm"))
    told = found.loss_scales()
    assert told.code == f"audit-{code}"
    report = audit_report(audit(found=measured(backward=found)))
    (section,) = (section for section in report.sections if section.name == "gradients")
    assert say(told) in [getattr(block, "text", "") for block in section.blocks]
    recommended = audit(found=measured(backward=found)).recommendation
    assert recommended is not None
    assert (recommended.loss_scale is None) == (code != "loss-scales")
    codes = {finding.code for finding in recommended.findings}
    assert ("audit-first-loss-scale" if code == "loss-scales" else told.code) in codes


@pytest.mark.parametrize("part", ["weights", "forward", "backward", "lag", "proof"])
def test_any_part_may_be_absent(part: str) -> None:
    names = {"weights": "weights", "forward": "range", "backward": "gradients", "lag": "lag", "proof": "pass"}
    every, without = (
        {section.name for section in audit_report(audit(found=found)).sections}
        for found in (measured(), measured(**{part: None}))
    )
    assert every - without == {names[part]}


def test_combinations_cover_every_verdict() -> None:
    seen = {
        audit([audited("float16", "float16", [check("a", x), check("b", y)])]).verdict for x, y in product(KINDS, KINDS)
    }
    assert seen == {"ok", "warn", "fail", "inconclusive"}
