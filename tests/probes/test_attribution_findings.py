"""Whatever an attribution measures: its findings, and the report made of them, do not contradict each other."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.metrics.conclusions import LEAST, Left, conclude
from mismatch_probe.metrics.inside import Inside
from mismatch_probe.metrics.ladder import Gap
from mismatch_probe.probes.attribute.attribution import findings_of
from mismatch_probe.report.attribution import attribution_answer, attribution_report
from mismatch_probe.report.model import Items
from mismatch_probe.report.words import all_words, say
from mismatch_probe.results.attribution import NO_GAP, Attribution, BothSides, LeftInFp32, SettingResult
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue
from tests.factories.attribution import (
    NO_FIXES,
    NO_LADDER,
    attribution,
    effect,
    faulty,
    inside,
    ladder,
    layers,
    metric,
    routers,
    setting,
    unchanged,
)
from tests.metrics.insides import results

FAULTS = {"module-stands-out", "module-stands-out-everywhere", "input-stands-out", "layer-code-stands-out"}
FAULTS |= {"step-stands-out", "tensor-not-finite", "differs-outside-modules"}
ROUNDING = {"rounding-explains", "rounding-explains-part", "rounding-does-not-explain", "fault-before-rounding"}
ROUNDING |= {"rounding-not-known"}
ARISES = {"arises-at-rung", "arises-undecided", "arises-by-estimate", "no-ladder", "no-gap", "gap-not-known"}
CLOSE = {"setting-closes-gap", "both-sides-close-gap"}

GAPS = [metric(0.065), MetricValue(0.0, why="there is no gap"), MetricValue(None, why="no token is finite")]
EFFECTS = [None, unchanged(), effect(0.5), effect(0.5, 0.2), effect(0.5, None), effect(2.0), effect(0.5, shift=1e-9)]


@st.composite
def documents(draw: st.DrawFn) -> Attribution:
    """Any insides, ladders, settings and changes of both sides."""
    insides, pair, left, experts = draw(results())
    rungs = [draw(st.sampled_from([-0.5, 0.0, 0.01, 0.4, 0.9])) for _ in range(3)]
    found = draw(st.lists(st.sampled_from(EFFECTS), min_size=2, max_size=2))
    both = draw(st.sampled_from(EFFECTS))
    variants = {"neither": unchanged(), "rollout": found[0], "trainer": found[1], "both": both}
    whole = all(value is not None for value in variants.values())
    sides = BothSides(
        key="float16",
        variants=variants if whole else {},
        best=draw(st.sampled_from(["neither", "both"])) if whole else None,
        hurts=(),
        why="" if whole else "not measured",
    )
    return attribution(
        rollout_dtype=pair[0],
        trainer_dtype=pair[1],
        gap=Gap(draw(st.sampled_from(GAPS)), metric(0.002)),
        ladder=draw(st.sampled_from([NO_LADDER, ladder(*rungs)])),
        settings=(setting("rollout", "float16", found[0]), setting("trainer", "float16", found[1])),
        both_sides=(sides,),
        layers=layers(insides),
        left_in_fp32=LeftInFp32(rms=metric(left.rms), fraction=metric(left.fraction)),
        experts=routers() if experts else None,
        fixes=NO_FIXES,
        failed={},
    )


@given(documents())
@settings(max_examples=300, deadline=None)
def test_findings_hold_together(document: Attribution) -> None:
    found = document.findings
    codes = [one.code for one in found]
    # One statement on where the gap arises, then a fault that makes it, else one on rounding.
    assert [code in ARISES for code in codes] == [True, *[False] * (len(codes) - 1)]
    making = [one for one in found if one.code in FAULTS and one.severity == "fail"]
    rounding = [one for one in found if one.code in ROUNDING]
    if codes[0] in NO_GAP:
        assert not making + rounding
        assert document.answer == found[:1]
    else:
        assert len(rounding) == 1
        assert document.answer == (found[0], (making + rounding)[0])
    assert_inside(document)
    assert_rounding(document, {one.code: one for one in found})
    assert_settings(document, codes)


def assert_inside(document: Attribution) -> None:
    """Each dtype is spoken of once, and as concluded."""
    left = Left(document.left_in_fp32.fraction.value, document.left_in_fp32.rms.value)
    pair = (document.rollout_dtype, document.trainer_dtype)
    concluded = conclude(document.layers.dtypes, pair, left, routers=document.experts is not None)
    spoken = [dtype for one in document.findings if "dtypes" in one.values for dtype in one.names("dtypes")]
    spoken += [one.where for one in document.findings if one.code == "layers-not-compared"]
    assert sorted(spoken) == sorted(document.layers.dtypes)
    for one in document.findings:
        for dtype in one.names("dtypes") if "dtypes" in one.values else ():
            assert concluded.dtypes[dtype].is_fault == (one.code in FAULTS)
            if one.code == "nothing-stands-out":
                assert concluded.dtypes[dtype].score <= one.number("threshold")


def assert_rounding(document: Attribution, found: dict[str, Finding]) -> None:
    """Rounding explains a gap only where no fault is said to make it, and FP32 leaves next to nothing."""
    left = document.left_in_fp32.fraction.value
    if "rounding-explains" in found:
        assert not any(one.code in FAULTS and one.severity == "fail" for one in document.findings)
        assert left is None or left < LEAST or (document.left_in_fp32.rms.value or 0.0) <= 1e-4
    if "differs-outside-modules" in found:
        assert found.keys() & {"rounding-explains-part", "rounding-does-not-explain"}
        assert not any(
            "float32" in one.names("dtypes")
            for one in document.findings
            if one.code in FAULTS - {"differs-outside-modules"}
        )


def assert_settings(document: Attribution, codes: list[str]) -> None:
    """Nothing closes the gap that was not tested, or moves log-probs less than an engine differs from itself."""
    closing = [one for one in document.findings if one.code in CLOSE]
    assert not (closing and set(codes) & {"no-setting-closes-gap", "settings-not-tested"})
    effects = {row.name: row.effect for row in document.settings}
    effects |= {pair.key: pair.variants.get("both") for pair in document.both_sides}
    for one in closing:
        change = effects[one.where]
        assert change is not None
        assert change.differs
        assert (change.shift.value or 0.0) > (0.0 if one.where.startswith("rollout") else 1e-4)
        assert one.metric("closed") == change.closed
    said = closing or set(codes) & {"no-setting-closes-gap", "settings-not-tested"}
    assert codes[0] in NO_GAP or said or not any(row.effect for row in document.settings)


@given(documents())
@settings(max_examples=60, deadline=None)
def test_a_report_says_its_findings_once(document: Attribution) -> None:
    report = attribution_report(document)
    assert report.answer == attribution_answer(document) == tuple(say(one) for one in document.answer)
    assert report.state != "ok" or not any(one.severity in ("fail", "warn") for one in document.findings)
    screen = [*report.answer, *(note.text for note in report.notes)]
    assert len(screen) == len(set(screen))
    # Of whether rounding makes the gap the report speaks once beside its answer, and of each fault in its section.
    listed = [
        item.text
        for s in report.sections
        if s.name == "inside"
        for b in s.blocks
        if isinstance(b, Items)
        for item in b.items
    ]
    for one in document.findings:
        if one.code in FAULTS:
            assert say(one) in listed
    rounding = [say(one) for one in document.findings if one.code in ROUNDING]
    assert [text in screen for text in rounding] == [True] * len(rounding)


def test_every_code_that_is_made_has_words() -> None:
    assert set(all_words()) >= FAULTS | ROUNDING | ARISES | CLOSE


def test_a_fault_of_another_dtype_does_not_make_the_gap() -> None:
    insides = {dtype: Inside("not looked into") for dtype in ("bfloat16", "float32")}
    document = attribution(layers=layers({**insides, "float16": faulty(inside(5e-4))}))
    (fault,) = [one for one in document.findings if one.code in FAULTS]
    assert (fault.severity, fault.names("dtypes")) == ("warn", ("float16",))
    assert document.findings[1].code == "rounding-explains"
    own = attribution(layers=layers({"bfloat16": faulty(inside(4e-3))}))
    assert own.findings[1].code == "module-stands-out"
    assert own.findings[2].code == "fault-before-rounding"
    assert findings_of(own) == own.findings


def test_what_closes_most_comes_first() -> None:
    rows: list[SettingResult] = [setting("rollout", "a", effect(0.9)), setting("trainer", "b", effect(0.5))]
    found = attribution(settings=tuple(rows), both_sides=()).findings
    assert [one.where for one in found if one.code in CLOSE] == ["trainer-b", "rollout-a"]
    assert next(one for one in found if one.where == "trainer-b").metric("closed").value == 0.75
