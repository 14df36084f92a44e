"""No audit check is ok for want of evidence: each that does has an interval, or the prompts that exclude more."""

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
from mismatch_probe.passes import PassId
from mismatch_probe.probes.audit.checks import Checks
from mismatch_probe.probes.audit.document import answers, not_finite
from mismatch_probe.probes.audit.profile import Profile, load_profile
from mismatch_probe.probes.pairs import PassPair, pair_of
from mismatch_probe.results.audit import Bounds, Check
from mismatch_probe.results.comparison import MissingPair, Pair
from mismatch_probe.results.ranges import Range
from mismatch_probe.types import PairArrays
from tests.factories.audit import activations, audited, check, compared, gradients, measured, overflowing

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
    found: Range | None = None,
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
    both = PassPair(PassId.rollout("vllm", dtypes[0]), PassId.trainer("hf", dtypes[1]))
    row = pair_of(both, sums, compute_metrics(sums, replicates=200)).model_copy(update={"ratio_tests": tuple(tests)})
    checks = Checks(profile, (row,), {}, found or Range(), (), 100)
    return {check.name: check for check in checks.of_pair(row)}


def supported(check: Check, profile: Profile, n_prompts: int) -> bool:
    """Whether an ok has an interval with width, or so many prompts that the rate of its bounds is excluded."""
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
    assert (check.verdict, check.worst) == ("inconclusive", "fail")
    assert check.finding.code == "audit-mean-ratio-untested"
    assert check.settle is not None
    assert check.settle.more_prompts == 16 - len(lengths)


@pytest.mark.parametrize(("kept", "status"), [(0.85, "fail"), (0.97, "fail"), (1.0, "ok")])
def test_with_prompts_and_tokens_it_is_found_and_a_sound_one_passes(kept: float, status: str) -> None:
    noise = np.random.default_rng(0).normal(-0.5 * 0.05**2, 0.05, 64 * 60)
    check = judged(math.log(kept) + noise, [60] * 64)["one_sided"]
    assert check.verdict == status
    assert check.value.ci_low is not None


def test_a_ratio_that_could_as_well_be_two_percent_off_is_not_passed() -> None:
    """Nothing is violated, and a fault of 1 % is not excluded; the prompts that would exclude it are told."""
    noise = np.random.default_rng(3).normal(-0.5 * 0.3**2, 0.3, 40 * 40)
    check = judged(noise, [40] * 40)["one_sided"]
    assert check.verdict == "inconclusive"
    assert (check.finding.code, check.finding.number("within")) == ("audit-mean-ratio-open", 0.01)
    assert check.settle is not None
    assert (check.settle.more_prompts or 0) > 40


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("recorded", "bfloat16")])
def test_every_pair_on_policy_is_tested_for_one_sidedness(dtypes: tuple[str, str]) -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, 64 * 60)
    assert judged(math.log(0.85) + noise, [60] * 64, dtypes=dtypes)["one_sided"].verdict == "fail"
    assert "one_sided" not in judged(noise, [60] * 64, dtypes=dtypes, on_policy=False)


@pytest.mark.parametrize("bias", [-1e-5, 1e-5])
def test_the_bias_of_float32_log_softmax_is_named_as_such(bias: float) -> None:
    noise = np.random.default_rng(0).normal(bias, 1e-6, 64 * 60)
    check = judged(noise, [60] * 64, dtypes=("float32", "float32"))["one_sided"]
    assert check.verdict == "ok"
    assert check.finding.values["negligible"]


def test_confident_disagreements_are_counted_among_what_is_finite() -> None:
    log_ratio = np.random.default_rng(0).normal(0, 1e-3, 64 * 50)
    log_ratio[:1920] = np.nan
    rollout = -np.random.default_rng(1).exponential(1.0, len(log_ratio))
    log_ratio[1920 + np.flatnonzero(rollout[1920:] > -0.5)[:2]] = -3.0
    check = judged(log_ratio, [50] * 64)["confident_disagreement_rate"]
    assert (check.finding.number("n"), check.finding.number("n_tokens")) == (2, 3200)
    assert check.verdict == "warn"


def test_an_event_that_no_prompt_of_64_showed_may_still_show_in_1_of_18() -> None:
    noise = np.random.default_rng(0).normal(0, 1e-3, 64 * 50)
    check = judged(noise, [50] * 64, found=measured())["fp16_overflow_rate"]
    assert (check.verdict, check.worst) == ("inconclusive", "warn")
    assert check.settle is not None
    assert check.settle.more_prompts == 310
    assert check.finding.number("upper") == pytest.approx(0.056, abs=1e-4)
    assert check.value.ci_high == pytest.approx(0.056, abs=1e-4)


def range_of(n_prompts: int) -> Range:
    forward = activations(n_prompts=n_prompts, n_sequences=n_prompts)
    return measured(forward=forward, backward=gradients(n_prompts=min(16, n_prompts)))


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
    checks = judged(log_ratio, lengths, profile=profile, found=range_of(n_prompts), on_policy=on_policy)
    for name, found in checks.items():
        own = {"fp16_loss_scale": min(16, n_prompts), "fp16_loss_scale_start": min(16, n_prompts)}
        prompts = own.get(name, n_prompts if name.startswith("fp16") else n_finite)
        assert found.verdict != "ok" or supported(found, profile, prompts), found


def test_fp16_that_overflows_at_layer_11_fails_beside_fp32_that_is_ok() -> None:
    tensor = "model.layers.11.mlp.down_proj"
    found = Range(forward=overflowing(tensor, 11))
    profile = Profile(name="own", checks={"fp16_headroom": PROFILES[0].checks["fp16_headroom"]})
    lax = Profile(name="own", checks={**profile.checks, "kl_k3": Bounds(fail_above=1.0)})
    noise = np.random.default_rng(0).normal(0, 1e-3, 64 * 20)
    pairs = [
        audited(dtype, dtype, list(judged(noise, [20] * 64, dtypes=(dtype, dtype), profile=lax, found=found).values()))
        for dtype in ("float32", "float16")
    ]
    fp16, bf16, fp32 = answers(pairs, [pairs[0].name], (), ())
    assert (fp16.verdict, fp16.check, fp16.finding.where) == ("fail", "fp16_headroom", tensor)
    assert (bf16.verdict, bf16.compared) == ("inconclusive", False)
    assert (fp32.verdict, fp32.decides, fp32.settle) == ("ok", True, None)


def test_a_dtype_that_the_engine_does_not_support_still_tells_what_its_range_is() -> None:
    checks = Checks(PROFILES[0], (), {}, Range(forward=overflowing()), (), 100)
    pair = audited("float16", "float16", checks.of_unsupported("float16", "float16", "cast", "vLLM has no FP16."))
    assert [check.name for check in pair.checks] == [
        "fp16_unsupported",
        "fp16_headroom",
        "fp16_overflow_rate",
        "fp16_attention_headroom",
    ]
    answer = answers([pair], (), (), ())[0]
    assert (answer.check, answer.also[:1]) == ("fp16_unsupported", ("fp16_headroom",))


def test_every_precision_has_an_answer() -> None:
    """The one that fails says by what, the open one what would settle it, the missing one why."""
    fp16 = audited(
        "float16", "float16", [check("kl_k3", "fail"), check("fp16_headroom", "fail", where="model.layers.4")]
    )
    open_ = [check("kl_k3", "inconclusive"), check("one_sided", "inconclusive")]
    settles = ({"more_prompts": 40}, {"unknown": ("one_sided",), "more_prompts": None})
    bf16 = audited(
        "bfloat16",
        "bfloat16",
        [
            c.model_copy(update={"settle": c.settle.model_copy(update=s)}) if c.settle is not None else c
            for c, s in zip(open_, settles, strict=True)
        ],
    )
    missing = MissingPair(
        rollout_pass="a",
        trainer_pass="b",
        rollout_dtype="float32",
        trainer_dtype="float32",
        trainer_mode="cast",
        why="it died",
    )
    first, second, third = answers([fp16, bf16], [bf16.name], [missing], [])
    assert (first.dtypes, first.verdict, first.check) == (("float16", "float16"), "fail", "fp16_headroom")
    assert (first.also, first.settle) == (("kl_k3",), None)
    assert (second.verdict, second.decides) == ("inconclusive", True)
    assert second.settle is not None
    assert (second.settle.more_prompts, second.settle.unknown) == (40, ("one_sided",))
    assert (third.verdict, third.compared, third.finding.text("why")) == ("inconclusive", False, "it died")
    assert [answer.verdict for answer in answers([], (), (), ())] == ["inconclusive"] * 3


def test_what_is_certain_needs_nothing_that_settles_it() -> None:
    pair = audited("float16", "float16", [check("kl_k3", "warn"), check("one_sided", "open")])
    answer = answers([pair], (), (), ())[0]
    assert (answer.verdict, answer.check, answer.also, answer.settle) == ("warn", "kl_k3", (), None)
    pair = audited("float16", "float16", [check("kl_k3", "ok"), check("one_sided", "open")])
    answer = answers([pair], (), (), ())[0]
    assert answer.settle is not None
    assert (answer.verdict, answer.check, answer.settle.more_prompts) == ("warn", "one_sided", 40)


def test_a_model_without_a_finite_log_prob_is_told_with_the_first_tensor_that_is_not_finite() -> None:
    def pair(n_excluded: int) -> Pair:
        return compared("float16", "float16", n_excluded=n_excluded)

    forward = activations(first_nonfinite="model.layers.3.mlp")
    (told,) = not_finite([pair(1877), pair(1877)], Range(forward=forward))
    assert (told.code, told.where, told.number("n_tokens")) == ("audit-no-finite-logprob", "model.layers.3.mlp", 3754)
    assert not_finite([pair(1877), pair(1876)], Range(forward=forward)) == ()
    assert not_finite([], Range()) == ()
    (told,) = not_finite([pair(1877)], Range())
    assert (told.where, told.values["measured"]) == ("", False)
