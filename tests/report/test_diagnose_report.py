"""The report of `diagnose` with experiments."""

from __future__ import annotations

from mismatch_probe.report.diagnose import diagnosis_report
from mismatch_probe.results.diagnosis import (
    Active,
    Cause,
    DiagnosedClass,
    Diagnosis,
    Experiment,
    NotRun,
    Remainder,
    Rival,
    ShownToken,
    SideSizes,
)
from tests.factories.dump import make_source
from tests.snapshot import assert_snapshots, screen


def experiment(name: str, hypothesis: str, rollout: float, trainer: float, **more: object) -> Experiment:
    facts = {"parameters": {}, "forwards": 1, "seconds": 1.5, "explains": (), "why": ""}
    sizes = SideSizes(rollout=rollout, trainer=trainer)
    return Experiment.model_validate(facts | {"name": name, "hypothesis": hypothesis, "sizes": sizes} | more)


CAUSE = Cause(
    name="older-weights",
    side="rollout",
    title="One side has older weights",
    fix="Check that every update reaches the engine.",
    experiment="older-checkpoint",
    parameters={"share_of_sequences": 0.5},
    before=0.0181,
    after=0.0036,
    floor=0.0034,
    gain=0.8,
    as_well=("adapter-ignored",),
)
ACTIVE = Active(
    model="run/checkpoint-4",
    dtype="float32",
    n_tokens=1518,
    n_sequences=24,
    n_judged=1400,
    floor=0.0034,
    floor_dtype="bfloat16",
    plain=SideSizes(rollout=0.0181, trainer=0.0034),
    shared="",
    ruled_out=(),
    settled="cause",
    side="rollout",
    cause=CAUSE,
    experiments=(
        experiment("temperature", "rollout at another temperature", 0.0179, 0.004, parameters={"temperature": 1.01}),
        experiment("adapter", "with the adapter", 0, 0).model_copy(update={"sizes": None, "why": "<no> layers"}),
        experiment("older-checkpoint", "older checkpoint", 0.0036, 0.0181, explains=("rollout",)),
    ),
    left=(
        NotRun(name="quantised", forwards=4, needs=""),
        NotRun(name="base-model", forwards=13, needs="--base-model"),
    ),
    seconds=12.3,
)
CLASS = DiagnosedClass(
    name="other-forward",
    title="The two sides compute other distributions",
    kind="forward",
    confidence=0.7,
    gain=0.2,
    gain_units=8.0,
    parameters={"mean_abs": 0.018},
    n_shown=1400,
    share_shown=0.92,
    gap_before=0.018,
    gap_after=0.018,
    tokens=(ShownToken(place="d.jsonl:1[3]", token_id=7, rollout_logprob=-1.5, trainer_logprob=None),),
    causes=("older-weights", "adapter-ignored"),
    rivals=(Rival(name="positions", gain=0.01),),
    confirm="Score the same ids with the older checkpoint.",
    fix="Check that the engine has every tensor.",
)


def diagnosis(active: Active, **more: object) -> Diagnosis:
    left = Remainder(
        rms=0.02,
        mean_abs=0.018,
        mean=0.0,
        degrees=4.0,
        mean_ratio=1.0,
        mean_inverse_ratio=1.0,
        sequence_spread=0.1,
        baseline=None,
    )
    facts = {"outcome": "fault", "classes": (CLASS,), "findings": (), "n_tokens": 5000, "n_sequences": 80}
    return Diagnosis.model_validate(
        Diagnosis.stamp()
        | facts
        | {"source": make_source(), "n_prompts": 40, "remainder": left, "active": active}
        | more
    )


def test_snapshot() -> None:
    assert_snapshots("diagnose", diagnosis_report(diagnosis(ACTIVE)))


def test_what_experiments_rule_out_is_told_and_is_no_fault() -> None:
    both = {"settled": "numerics", "side": None, "cause": None, "ruled_out": ("other-forward",), "shared": "top-p 0.9"}
    shown = screen(
        diagnosis_report(diagnosis(ACTIVE.model_copy(update=both), outcome="rounding", classes=())), width=400
    )
    assert "other-forward" in shown
    assert "top-p 0.9" in shown
    assert CLASS.fix not in shown


def test_a_cause_of_neither_side_names_none() -> None:
    cause = CAUSE.model_copy(update={"side": None})
    shown = screen(diagnosis_report(diagnosis(ACTIVE.model_copy(update={"cause": cause, "side": None}))), width=400)
    assert "None" not in shown
    assert cause.fix in shown
