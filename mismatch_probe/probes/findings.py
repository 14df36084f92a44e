"""The sentences that a comparison ends in: what was found, with its interval, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mismatch_probe.metrics.accounting import CONTRADICTED
from mismatch_probe.metrics.accumulate import PairSums
from mismatch_probe.metrics.conclusions import FP32_FLOOR
from mismatch_probe.metrics.length_prediction import LengthForecast
from mismatch_probe.metrics.paired import paired_ratio
from mismatch_probe.metrics.ratio_test import RatioTest
from mismatch_probe.probes.pairs import PairResult
from mismatch_probe.report.format import number
from mismatch_probe.report.matrix import pair_label, trainer_modes
from mismatch_probe.types import MetricValue

METRIC = "mean_abs_logprob_diff"


def findings(
    diagonal: Mapping[str, PairResult], forecasts: Mapping[str, LengthForecast], seed: int
) -> list[dict[str, Any]]:
    """What the diagonal pairs (same dtype on both sides) say, as rows of `summary.json`."""
    rows = []
    if "bfloat16" in diagonal and "float16" in diagonal:
        bf16, fp16 = diagonal["bfloat16"].sums, diagonal["float16"].sums
        ratio = paired_ratio(bf16, fp16, METRIC, seed=seed)
        rows.append({"name": "bf16_over_fp16", "text": _ratio_text(ratio, bf16), **ratio.as_dict()})
    if "float32" in diagonal:
        floor = diagonal["float32"].metrics[METRIC]
        rows.append({"name": "fp32_floor", "text": _floor_text(floor), **floor.as_dict()})
    broken = _one_sided(diagonal)
    if broken:
        rows.append({"name": "one_sided", "text": _one_sided_text(broken)})
    exact = {name: r.metrics["kl_exact"] for name, r in diagonal.items() if r.metrics["kl_exact"].value is not None}
    if exact:
        rows.append({"name": "exact_kl", "text": _exact_text(exact), "values": _as_dicts(exact)})
    ratio_of = {name: (r.budget or {}).get("measured_over_predicted") for name, r in diagonal.items()}
    quadrature = {name: ratio for name, ratio in ratio_of.items() if ratio is not None and ratio.value is not None}
    if quadrature:
        rows.append({"name": "error_budget", "text": _budget_text(quadrature), "values": _as_dicts(quadrature)})
    for name, found in forecasts.items():
        half = found.crossings[0.5]
        if half.value is not None:
            text = _length_text(name, found)
            rows.append({"name": f"ess_half_length_{name}", "text": text, **half.as_dict()})
        elif found.fit.contradicted and not found.fit.predictable:
            text = f"Longer responses are not predicted, {name}: {found.fit.why}."
            rows.append({"name": f"no_forecast_{name}", "text": text})
    return rows


def excluded_findings(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What of the pairs of a summary is left out of every metric; comes before whatever the metrics say."""
    modes = trainer_modes({"pairs": pairs})
    texts = [f"{pair_label(pair, modes)}: {_excluded_text(pair)}" for pair in pairs if pair["n_excluded"]]
    return [{"name": "excluded", "text": " ".join(texts)}] if texts else []


def _excluded_text(pair: Mapping[str, Any]) -> str:
    parts = [f"{_value_text(row)}: {row['n']:,}" for row in pair["excluded"]]
    text = (
        f"{pair['n_excluded']:,} of {pair['n_tokens']:,} tokens have no usable log-probs and are left out of every "
        f"metric ({'; '.join(parts)}), so this pair cannot pass."
    )
    with_them, without = pair["mean_abs_logprob_diff_all_finite"], pair["metrics"][METRIC]["value"]
    if with_them is None:
        return text
    return f"{text} With the finite ones mean |Δlogp| would be {number(with_them)} nats, not {number(without)}."


def _value_text(row: Mapping[str, Any]) -> str:
    other = "trainer" if row["side"] == "rollout" else "rollout"
    against = f" where the {other} has less than {CONTRADICTED}" if row["value"] == "0" else ""
    return f"{row['side']} {row['value']}{against}"


def _length_text(name: str, found: LengthForecast) -> str:
    half, tenth = found.crossings[0.5], found.crossings[0.1]
    text = (
        f"Predicted from responses of {found.fit.observed_length:,} tokens, {name}: the ESS of sequence weights falls "
        f"below 0.5 at {_tokens(half)} and below 0.1 at {_tokens(tenth)}."
    )
    mark = found.mark(0.5)
    return f"{text} The first is {mark}." if mark else text


def _tokens(length: MetricValue) -> str:
    if length.value is None:
        return "a length beyond reach"
    high = "…" if length.ci_high is None else f"{length.ci_high:,.0f}"
    limits = "" if length.ci_low is None else f" [{length.ci_low:,.0f}, {high}]"
    return f"{length.value:,.0f}{limits} tokens"


def _one_sided(diagonal: Mapping[str, PairResult]) -> dict[str, RatioTest]:
    """The largest violation of E[ρ] = 1 in each pair."""
    broken = {name: [t for t in result.ratio_tests if t.verdict == "violated"] for name, result in diagonal.items()}
    return {name: max(tests, key=_size) for name, tests in broken.items() if tests}


def _size(test: RatioTest) -> float:
    return abs((test.mean_ratio.value or 1.0) - 1.0)


def _one_sided_text(broken: Mapping[str, RatioTest]) -> str:
    """On policy the mean importance ratio is 1 whatever rounding does."""
    parts = [f"{name} {test.mean_ratio.value:.4f} ({test.family})" for name, test in broken.items()]
    return (
        f"The mean importance ratio is not 1: {', '.join(parts)}. Rounding does not do that on policy; look for a "
        "truncated or rescaled law, or a padded vocabulary, on one side."
    )


def _as_dicts(values: Mapping[str, MetricValue]) -> dict[str, Any]:
    return {name: value.as_dict() for name, value in values.items()}


def _exact_text(exact: Mapping[str, MetricValue]) -> str:
    parts = [f"{name} {value.value:.2e}{_limits(value, '.2e')}" for name, value in exact.items()]
    text = f"Exact KL(μ‖π), nats per token: {', '.join(parts)}."
    if "bfloat16" in exact and exact.get("float16", MetricValue(0.0)).value:
        ratio = (exact["bfloat16"].value or 0.0) / (exact["float16"].value or 1.0)
        text += f" BF16 is {ratio:.0f} times FP16; rounding alone predicts 2⁶ = 64."
    return text


def _budget_text(quadrature: Mapping[str, MetricValue]) -> str:
    parts = [f"{name} {value.value:.2f}{_limits(value, '.2f')}" for name, value in quadrature.items()]
    return (
        f"The measured gap over the one that independent errors of both sides would give: {', '.join(parts)}; "
        "below 1 they share errors."
    )


def _limits(value: MetricValue, form: str) -> str:
    return "" if value.ci_low is None else f" [{value.ci_low:{form}}, {value.ci_high:{form}}]"


def _ratio_text(ratio: MetricValue, pair: PairSums) -> str:
    if ratio.value is None:
        return f"BF16 and FP16 cannot be compared: {ratio.why}."
    if ratio.ci_low is None or ratio.ci_high is None:
        return f"BF16 is {ratio.value:.1f}× as far apart as FP16 (mean |Δlogp|), without an interval: {ratio.why}."
    interval = f"[{ratio.ci_low:.1f}, {ratio.ci_high:.1f}]"
    basis = f"mean |Δlogp|, paired over {len(pair.prompt_ids)} prompts, 95 % interval"
    basis += f", {ratio.why}" if ratio.why else ""
    if ratio.ci_low > 1:
        return f"BF16 is {ratio.value:.1f}× {interval} further apart than FP16 ({basis})."
    if ratio.ci_high < 1:
        text = f"FP16 is further apart than BF16: the ratio is {ratio.value:.2f} {interval} ({basis})."
        return f"{text} That is not rounding."
    return (
        f"BF16 and FP16 do not differ measurably: the ratio is {ratio.value:.2f} {interval} ({basis}); "
        f"a ratio beyond {ratio.ci_high / ratio.value:.2f} would have shown."
    )


def _floor_text(floor: MetricValue) -> str:
    if floor.value is None:
        return f"The FP32 floor is not known: {floor.why}."
    if floor.ci_high is not None and floor.ci_high < FP32_FLOOR:
        return f"In FP32 both engines agree to {floor.value:.1e} nats, so what is left in 16 bits is rounding."
    if floor.value < FP32_FLOOR:
        return f"In FP32 both engines agree to {floor.value:.1e} nats, which does not exclude {FP32_FLOOR:g} and more."
    return (
        f"In FP32 the engines still differ by {floor.value:.1e} nats, more than rounding leaves: "
        "they do not compute the same thing, and no precision will mend that."
    )
