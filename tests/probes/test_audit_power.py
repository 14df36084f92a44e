"""No audit check passes for want of evidence: each that does has an interval, or the prompts that exclude more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.metrics.accumulate import as_sums
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.ratio_test import ratio_tests
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.probes.audit.checks import Checks
from mismatch_probe.probes.audit.judge import Check
from mismatch_probe.probes.audit.precisions import precisions
from mismatch_probe.probes.audit.profile import Bounds, Profile, load_profile
from mismatch_probe.probes.pairs import PassPair, pair_of
from mismatch_probe.probes.planning import RolloutPass, TrainerPass
from mismatch_probe.types import PairArrays
from tests.factories.comparison import make_comparison
from tests.report.audit_documents import audit_document

PROFILES = [load_profile(name) for name in ("default", "strict", "verl")]
# Every metric that exists, with limits that nothing exceeds.
LAX = Profile(
    name="lax",
    checks={
        name: Bounds(event="fail", rate_below=0.1)
        if name == "confident_disagreement_rate"
        else Bounds(fail_above=1e300)
        for name in CATALOG
    },
)
# Counted over all there is, or of nothing but what ran.
EXACT = ("fp16_weights", "fp16_pass")


def judged(
    log_ratio: Any,
    lengths: Sequence[int],
    *,
    dtypes: tuple[str, str] = ("float16", "float16"),
    profile: Profile = PROFILES[0],
    ranges: Any = None,
    on_policy: bool = True,
) -> dict[str, Check]:
    """The checks of a pair with a prompt a sequence, by name."""
    n = sum(lengths)
    rollout = np.broadcast_to(np.asarray(-np.random.default_rng(1).exponential(1.0, n)), n)
    prompts = np.arange(len(lengths))
    why = "" if on_policy else "replayed"
    pair = PairArrays(
        rollout,
        rollout + log_ratio,
        np.repeat(prompts, lengths),
        np.concatenate([np.arange(length) for length in lengths]),
        prompts,
        tuple(map(str, prompts)),
        on_policy,
        why,
    )
    sums = as_sums(pair)
    tests = ratio_tests(sums, replicates=200) if on_policy and sums.n_usable else []
    metrics = compute_metrics(sums, replicates=200)
    both = PassPair(RolloutPass(dtypes[0], "decode"), TrainerPass(dtypes[1], "cast"))
    row = pair_of(both, sums, metrics).model_copy(update={"ratio_tests": tuple(tests)})
    checks = Checks(profile, make_comparison((), pairs=(row,)), ranges or {}, {}, 100)
    return {check.name: check for check in checks.of_pair(row)}


def supported(check: Check, profile: Profile, n_prompts: int) -> bool:
    """Whether a pass has an interval with width, or so many prompts that the rate of its bounds is excluded."""
    value, bounds = check.value, profile.checks[check.name]
    if check.name in EXACT:
        return value.value is not None
    if bounds.rate_below is not None:
        return 1 - 0.025 ** (1 / max(1, n_prompts)) < bounds.rate_below
    if value.value is None or value.ci_low is None or value.ci_high is None:
        return False
    if bounds.within is not None:
        return n_prompts >= 16 and 1 - bounds.within <= value.ci_low <= value.ci_high <= 1 + bounds.within
    return value.ci_low < value.ci_high or n_prompts >= 32


@pytest.mark.parametrize("lengths", [[20] * 4, [64] * 8, [200] * 15])
def test_a_trainer_15_percent_off_is_not_passed_where_no_test_is_made(lengths: list[int]) -> None:
    noise = np.random.default_rng(0).normal(0, 1e-3, sum(lengths))
    check = judged(math.log(0.85) + noise, lengths)["one_sided"]
    assert (check.status, check.worst) == ("not judged", "fail")
    assert check.more_prompts == 16 - len(lengths)
    assert "too few to judge" in check.evidence


@pytest.mark.parametrize(("kept", "status"), [(0.85, "fail"), (0.97, "fail"), (1.0, "pass")])
def test_with_prompts_and_tokens_it_is_found_and_a_sound_one_passes(kept: float, status: str) -> None:
    noise = np.random.default_rng(0).normal(-0.5 * 0.05**2, 0.05, 64 * 60)
    check = judged(math.log(kept) + noise, [60] * 64)["one_sided"]
    assert check.status == status
    assert check.value.ci_low is not None


def test_a_ratio_that_could_as_well_be_two_percent_off_is_not_passed() -> None:
    """Nothing is violated, and a fault of 1 % is not excluded; the prompts that would exclude it are told."""
    noise = np.random.default_rng(3).normal(-0.5 * 0.3**2, 0.3, 40 * 40)
    check = judged(noise, [40] * 40)["one_sided"]
    assert check.status == "not judged"
    assert "does not exclude a fault of 1%" in check.evidence
    assert check.more_prompts is not None
    assert check.more_prompts > 40


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("recorded", "bfloat16")])
def test_every_pair_on_policy_is_tested_for_one_sidedness(dtypes: tuple[str, str]) -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, 64 * 60)
    assert judged(math.log(0.85) + noise, [60] * 64, dtypes=dtypes)["one_sided"].status == "fail"
    assert "one_sided" not in judged(noise, [60] * 64, dtypes=dtypes, on_policy=False)


@pytest.mark.parametrize("bias", [-1e-5, 1e-5])
def test_the_bias_of_float32_log_softmax_is_named_as_such(bias: float) -> None:
    noise = np.random.default_rng(0).normal(bias, 1e-6, 64 * 60)
    check = judged(noise, [60] * 64, dtypes=("float32", "float32"))["one_sided"]
    assert check.status == "pass"
    assert "off by 1.0e-05: the known bias of float32 log-softmax is up to 0.0001" in check.evidence


def test_confident_disagreements_are_counted_among_what_is_finite() -> None:
    log_ratio = np.random.default_rng(0).normal(0, 1e-3, 64 * 50)
    log_ratio[:1920] = np.nan
    rollout = -np.random.default_rng(1).exponential(1.0, len(log_ratio))
    log_ratio[1920 + np.flatnonzero(rollout[1920:] > -0.5)[:2]] = -3.0
    check = judged(log_ratio, [50] * 64)["confident_disagreement_rate"]
    assert check.evidence == "Confident disagreements: 2 of 3,200 tokens."
    assert check.status == "warn"


def test_an_event_that_no_prompt_of_64_showed_may_still_show_in_1_of_18() -> None:
    ranges = {"forward": audit_document()["range"]["forward"]}
    noise = np.random.default_rng(0).normal(0, 1e-3, 64 * 50)
    check = judged(noise, [50] * 64, ranges=ranges)["fp16_overflow_rate"]
    assert (check.status, check.worst, check.more_prompts) == ("not judged", "warn", 310)
    assert "at most 5.6 % of prompts have one" in check.evidence
    assert check.value.ci_high == pytest.approx(0.056, abs=1e-4)


def ranges_of(n_prompts: int) -> dict[str, Any]:
    found: dict[str, Any] = audit_document()["range"]
    return {
        **found,
        "forward": found["forward"] | {"n_prompts": n_prompts, "n_sequences": n_prompts},
        "backward": found["backward"] | {"n_prompts": min(16, n_prompts)},
    }


@settings(max_examples=60, deadline=None)
@given(
    n_prompts=st.integers(1, 40),
    length=st.sampled_from([1, 3, 20]),
    empty=st.sampled_from([0, 0, 1, 30]),
    kind=st.sampled_from(["equal", "zero", "noise", "one token", "NaN in part", "all NaN", "far", "infinite"]),
    profile=st.sampled_from([*PROFILES, LAX]),
    on_policy=st.booleans(),
)
def test_no_check_passes_without_an_interval_or_the_prompts_for_it(
    n_prompts: int, length: int, empty: int, kind: str, profile: Profile, on_policy: bool
) -> None:
    log_ratio = np.random.default_rng(n_prompts).normal(0, 1e-3, n_prompts * length)
    n_finite = n_prompts
    if kind in ("equal", "zero", "far"):
        log_ratio[:] = {"equal": 1e-3, "zero": 0.0, "far": -50.0}[kind]
    elif kind == "one token":
        log_ratio[0] = -3.0
    elif kind in ("NaN in part", "infinite"):
        log_ratio[:length] = math.nan if kind == "NaN in part" else -math.inf
        n_finite -= 1
    elif kind == "all NaN":
        log_ratio[:] = math.nan
        n_finite = 0
    lengths = [length] * n_prompts + [0] * empty
    checks = judged(log_ratio, lengths, profile=profile, ranges=ranges_of(n_prompts), on_policy=on_policy)
    for name, check in checks.items():
        own = {"fp16_loss_scale": min(16, n_prompts), "fp16_loss_scale_start": min(16, n_prompts)}
        prompts = own.get(name, n_prompts if name.startswith("fp16") else n_finite)
        assert check.status != "pass" or supported(check, profile, prompts), check


def test_every_precision_has_an_answer() -> None:
    """The one that fails says by what number, the open one what would settle it, the missing one why."""
    document = audit_document()
    fp16, bf16 = document["pairs"]
    open_ = {"status": "not judged", "best": "pass", "worst": "fail"}
    fp16 |= {
        "verdict": "fail",
        "checks": [{**c, "best": "fail"} for c in fp16["checks"] if c["name"] == "fp16_headroom"],
    }
    bf16["checks"] = [
        {**check, **open_, "more_prompts": more} for check, more in zip(bf16["checks"], (40, 310, None), strict=True)
    ]
    bf16["verdict"] = "not judged"
    missing = [{"trainer_dtype": "float32", "why": "the pass was not run"}]
    rows = {row["dtype"]: row for row in precisions([fp16, bf16], missing)}
    assert (rows["float16"]["verdict"], rows["float16"]["check"]) == ("fail", "fp16_headroom")
    assert rows["float16"]["evidence"] == "Evidence of fp16_headroom."
    assert rows["bfloat16"]["verdict"] == "not judged"
    assert rows["bfloat16"]["more_prompts"] == 310
    assert rows["bfloat16"]["settle"] == (
        "About 310 more prompts would settle it. More prompts alone do not settle one_sided."
    )
    bf16["checks"][2] |= {"value": None, "evidence": "Measure it."}
    assert precisions([bf16], [])[0]["settle"] == "About 310 more prompts would settle it. one_sided: Measure it."
    assert rows["float32"]["evidence"] == "it was not compared: the pass was not run."
    assert [row["verdict"] for row in precisions([], [])] == ["not judged"] * 3
