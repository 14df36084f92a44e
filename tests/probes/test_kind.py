"""The kind of a gap, and that no finding contradicts it, over combinations of what can be measured."""

from __future__ import annotations

from itertools import product

import pytest

from mismatch_probe.metrics.chunks import ExcludedValue
from mismatch_probe.metrics.ratio_test import RatioTest
from mismatch_probe.probes.findings import findings, largest_gap
from mismatch_probe.report.words import say
from mismatch_probe.results.comparison import Pair
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue
from tests.factories.comparison import absent, make_metrics, make_pair, value

BF16, FP16, FP32 = value(4e-2), value(5e-3), value(8e-6)
RATIO = MetricValue(8.0, 7.0, 9.0)
FLOORS = {
    "none": None,
    "low": FP32,
    "open": MetricValue(8e-5, 5e-5, 2e-4),
    "no interval": MetricValue(8e-6, why="fewer than 6 prompts"),
    "high": value(3e-3),
    "unusable": absent("no usable tokens"),
}
VERDICTS = (None, "holds", "violated but negligible", "violated", "inconclusive")
FORMATS = {"no": None, "larger": RATIO, "alike": MetricValue(1.2, 0.7, 2.0), "reversed": MetricValue(0.5, 0.3, 0.8)}
SIZES = {"small": BF16, "at the bound": MetricValue(9e-2, 6e-2, 0.2), "large": MetricValue(0.4, 0.3, 0.5)}
# What rounding does not do, and the finding that says so; the size has no finding of its own.
BROKEN = {"fp32-floor", "mean-ratio-not-one", "excluded-tokens", "bf16-over-fp16"}


def ratio_test(verdict: str, n_prompts: int = 64, n_tokens: int = 4000) -> RatioTest:
    mean = MetricValue(0.9, 0.88, 0.92) if verdict == "violated" else MetricValue(1.0, 0.99, 1.01)
    return RatioTest("overall", None, None, n_tokens, n_prompts, mean, verdict=verdict)  # type: ignore[arg-type]


def pair_of(dtype: str, gap: MetricValue, *tests: RatioTest, excluded: int = 0, prompts: int = 64) -> Pair:
    usable = gap.value is not None
    n = 10_240
    return make_pair(
        dtype,
        dtype,
        metrics=make_metrics(0.0, mean_abs_logprob_diff=gap),
        ratio_tests=tests,
        n_prompts_usable=prompts if usable else 0,
        n_excluded=excluded if usable else n,
        excluded=(ExcludedValue("trainer", "nonfinite", "nan", excluded or n),) if excluded or not usable else (),
    )


def found_in(pairs: dict[str, Pair], formats: MetricValue | None = RATIO) -> dict[str, Finding]:
    return {finding.code: finding for finding in findings(tuple(pairs.values()), pairs, formats, {})}


def sound(**changes: Pair) -> dict[str, Pair]:
    whole = {
        "bfloat16": pair_of("bfloat16", BF16, ratio_test("holds")),
        "float16": pair_of("float16", FP16, ratio_test("holds")),
        "float32": pair_of("float32", FP32, ratio_test("holds")),
    }
    return whole | changes


def test_a_sound_run_is_rounding_of_its_formats() -> None:
    found = found_in(sound())
    assert found["kind-rounding"].names("dtypes") == ("bfloat16", "float16")
    assert say(found["kind-rounding"]) == "The gap is rounding, as expected of BF16 and FP16."


@pytest.mark.parametrize(
    ("changes", "formats", "evidence"),
    [
        ({"float32": pair_of("float32", value(3e-3))}, RATIO, "fp32-floor"),
        ({"bfloat16": pair_of("bfloat16", BF16, ratio_test("violated"))}, RATIO, "mean-ratio-not-one"),
        ({"float16": pair_of("float16", FP16, excluded=3)}, RATIO, "excluded-tokens"),
        ({}, FORMATS["reversed"], "bf16-over-fp16"),
        ({"bfloat16": pair_of("bfloat16", SIZES["large"])}, RATIO, "size"),
    ],
)
def test_what_rounding_does_not_do_is_the_evidence(
    changes: dict[str, Pair], formats: MetricValue, evidence: str
) -> None:
    found = found_in(sound(**changes), formats)
    assert found["kind-more-than-rounding"].names("evidence") == (evidence,)


@pytest.mark.parametrize(
    ("changes", "formats", "open_", "more"),
    [
        # The half-width has to fall from 1.2e-4 to 2e-5: 36 times as many prompts.
        ({"float32": pair_of("float32", FLOORS["open"])}, RATIO, "fp32-floor", 64 * 35),
        ({"float32": pair_of("float32", FLOORS["no interval"], prompts=4)}, RATIO, "fp32-floor", 2),
        ({"float16": pair_of("float16", FP16, ratio_test("inconclusive", 10))}, RATIO, "mean-ratio-float16", 6),
        ({"float16": pair_of("float16", FP16, ratio_test("inconclusive", 20, 50))}, RATIO, "mean-ratio-float16", 20),
        ({"bfloat16": pair_of("bfloat16", SIZES["at the bound"])}, RATIO, "size-bfloat16", 64 * 120),
        ({}, MetricValue(1.2, 0.8, 2.0), "bf16-over-fp16", 64 * 3),
    ],
)
def test_what_is_open_says_how_many_prompts_would_settle_it(
    changes: dict[str, Pair], formats: MetricValue, open_: str, more: int
) -> None:
    found = found_in(sound(**changes), formats)["kind-unclear"]
    assert found.names("open") == (open_,)
    assert found.number("more_prompts") == pytest.approx(more, abs=1)


def test_without_fp32_no_number_of_prompts_settles_it() -> None:
    pairs = sound()
    del pairs["float32"]
    found = found_in(pairs)["kind-unclear"]
    assert (found.names("open"), found.maybe("more_prompts")) == (("no-fp32",), None)


def test_the_bound_of_a_format_follows_its_unit_roundoff() -> None:
    assert largest_gap("bfloat16") == 8 * largest_gap("float16") == 0.1


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("size", SIZES)
def test_no_two_findings_contradict_each_other(floor: str, size: str) -> None:
    for verdict, excluded, formats in product(VERDICTS, (0, 5), FORMATS.values()):
        tests = () if verdict is None else (ratio_test(verdict),)
        pairs = {"bfloat16": pair_of("bfloat16", SIZES[size], *tests, excluded=excluded)}
        if formats is not None:
            pairs["float16"] = pair_of("float16", FP16)
        if FLOORS[floor] is not None:
            pairs["float32"] = pair_of("float32", FLOORS[floor])
        found = found_in(pairs, formats)
        (kind,) = [code for code in found if code.startswith("kind-")]
        warned = {code for code in BROKEN if code in found and found[code].severity == "warn"}
        if kind == "kind-more-than-rounding":
            assert set(found[kind].names("evidence")) - {"size"} == warned
        else:
            assert not warned
        if kind == "kind-rounding":
            assert found["fp32-floor"].severity == "info"
            assert formats is None or (formats.ci_low or 0) > 1
        said = [say(finding) for finding in found.values()]
        assert len(set(said)) == len(said)


def test_a_model_of_nans_is_said_once_and_nothing_that_follows_from_it() -> None:
    nothing = absent("no usable tokens")
    pairs = {dtype: pair_of(dtype, nothing) for dtype in ("bfloat16", "float16", "float32")}
    (finding,) = findings(tuple(pairs.values()), pairs, None, {})
    assert (finding.code, finding.severity) == ("all-unusable", "fail")
    assert finding.names("excluded") == ("trainer nan 30720",)
    first, second = findings(tuple(pairs.values()), pairs, None, {}, "interrupted")
    assert (first.code, second.code) == ("all-unusable", "run-unfinished")


def test_one_pair_of_nans_is_said_once() -> None:
    found = findings(
        tuple((pairs := sound(float16=pair_of("float16", absent("no usable tokens")))).values()), pairs, None, {}
    )
    codes = [finding.code for finding in found]
    assert codes == ["excluded-tokens", "kind-more-than-rounding", "fp32-floor"]
