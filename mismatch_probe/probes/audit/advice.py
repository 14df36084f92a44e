"""What to do: precision, loss scale, correction, and the mismatch to raise an alarm at, each with the number behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mismatch_probe.metrics.corrections import CORRECTIONS, Correction
from mismatch_probe.metrics.floats import FIRST_SCALE, NO_SCALE
from mismatch_probe.probes.audit.checks import planned_ess, said
from mismatch_probe.probes.audit.judge import Status
from mismatch_probe.probes.audit.ranges import scales_of
from mismatch_probe.results.comparison import Comparison
from mismatch_probe.types import MetricValue

Document = Mapping[str, Any]
_RANK: dict[str, int] = {"pass": 0, "warn": 1, "not judged": 2, "fail": 3}
_SHORT = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}
# Predicted ESS of sequence weights, by which end of its band they are good for what.
ALL_BUT_ONE, HALF, TENTH = 0.95, 0.5, 0.1
# The alarm is this many times the upper limit of what was measured: a step's own KL estimate scatters.
ALARM_FACTOR = 3.0
# Left above the first loss scale, powers of two: gradients were measured a sequence at a time, and a trainer that adds
# up 128 of them in FP16 has sums that are some 2^3.5 times larger.
_ROOM = 4
# Shares of tokens that a correction touches.
MANY, FEW = 0.01, 0.1


@dataclass(frozen=True)
class Choice:
    """What an audit recommends.

    Attributes:
        pair: Of the audit's document.
        loss_scale: Exponent of the first loss scale; None where the trainer needs none.
        correction: None for no correction.
        sentences: The reasons, each with its number.
        alarm: KL k3 per token, nats, that a run should not exceed; None where it was not measured.
    """

    pair: Document
    loss_scale: int | None
    correction: Correction | None
    sentences: tuple[str, ...]
    alarm: float | None

    def as_dict(self) -> dict[str, Any]:
        found = self.correction
        return {
            "rollout_dtype": self.pair["rollout_dtype"],
            "trainer_dtype": self.pair["trainer_dtype"],
            "trainer_mode": self.pair["trainer_mode"],
            "verdict": self.pair["verdict"],
            "loss_scale": None if self.loss_scale is None else 2.0**self.loss_scale,
            "correction": None if found is None else vars(found),
            "alarm_kl_k3": self.alarm,
            "sentences": list(self.sentences),
        }


def best_pair(pairs: Sequence[Document]) -> Document | None:
    """The pair with the best verdict, of equal ones the one whose sides are closest, among those of one dtype on both
    sides where there are any. FP32 costs several times as much: it is chosen where no 16-bit pair passes or warns.
    """
    candidates = [p for p in pairs if p["rollout_dtype"] == p["trainer_dtype"]] or list(pairs)

    def order(pair: Document) -> tuple[bool, bool, int, float]:
        gap, rank = pair["mean_abs_logprob_diff"]["value"], _RANK[pair["verdict"]]
        wide = "float32" in (pair["rollout_dtype"], pair["trainer_dtype"])
        return rank > _RANK["warn"], wide, rank, math.inf if gap is None else gap

    return min(candidates, key=order, default=None)


def advise(
    pair: Document,
    pairs: Sequence[Document],
    summary: Comparison,
    ranges: Mapping[str, Document | None],
    touched: Mapping[str, MetricValue],
    planned: int,
) -> Choice:
    """Recommends a configuration for a pair.

    Args:
        pair: Chosen by `best_pair`.
        pairs: All of them.
        summary: Of the comparison.
        ranges: Parts of the audit.
        touched: By correction, the share of the pair's tokens that it touches.
        planned: Response length, tokens.
    """
    sentences = [_precision(pair, pairs)]
    scale, text = _loss_scale(pair, ranges.get("backward"))
    sentences += [text] if text else []
    source = next(p for p in summary.pairs if _same(dict(p), pair))
    correction, texts = _correction(pair["verdict"], planned_ess(summary, source), touched, planned)
    sentences += texts
    lag = _lag(pair, ranges.get("lag"))
    sentences += [lag] if lag else []
    exact = source.metrics["kl_exact"]
    kl = source.metrics["kl_k3"] if exact.value is None else exact
    name = "KL k3" if exact.value is None else "exact KL"
    alarm = None
    if kl.value is not None and kl.ci_high is not None:
        alarm = ALARM_FACTOR * kl.ci_high
        sentences.append(
            f"Expect a {name} of {said(kl)} nats per token before the first update, and raise an alarm above "
            f"{alarm:.2g} ({ALARM_FACTOR:g} times the upper limit): a mismatch that grows is not this rounding."
        )
    return Choice(pair, scale, correction, tuple(sentences), alarm)


def _precision(pair: Document, pairs: Sequence[Document]) -> str:
    name = _name(pair)
    gap = MetricValue.of_dict(pair["mean_abs_logprob_diff"])
    text = f"{name}: {pair['verdict']}" + ("" if gap.value is None else f", mean |d| {said(gap)} nats")
    others = [
        f"{_name(other)} {other['verdict']}"
        + ("" if (found := other["mean_abs_logprob_diff"]["value"]) is None else f" ({found:.2g} nats)")
        for other in pairs
        if other is not pair and other["rollout_dtype"] == other["trainer_dtype"]
    ]
    ranked = sorted(pair["checks"], key=lambda c: -_RANK[c["status"]] if c["status"] != "not judged" else 0)
    reason = ranked[0]["evidence"] if ranked and ranked[0]["status"] in ("fail", "warn") else ""
    text += f"; of the others {', '.join(others)}." if others else "."
    return f"{text} {reason}".strip()


def _loss_scale(pair: Document, backward: Document | None) -> tuple[int | None, str]:
    if pair["trainer_dtype"] != "float16":
        return None, ""
    scales = None if backward is None else scales_of(backward)
    if backward is None or scales is None:
        return None, "No loss scale can be recommended: gradients were not measured."
    if scales.high == NO_SCALE:
        return None, f"No loss scale serves every tensor: {scales.high_by} is not finite even in FP32."
    if scales.empty:
        return None, f"No loss scale serves every tensor: {scales.high_by} overflows above 2^{scales.high}."
    start = max(scales.low, min(FIRST_SCALE, scales.high - _ROOM))
    return start, (
        f"Start dynamic loss scaling at 2^{start}: 2^{scales.low} to 2^{scales.high} serve every tensor for a loss "
        f"averaged over {backward['step_tokens']:,} tokens; of twice as many the range lies one power of two higher."
    )


def _correction(
    verdict: Status, ess: MetricValue | None, touched: Mapping[str, MetricValue], planned: int
) -> tuple[Correction | None, list[str]]:
    by_name = {correction.name: correction for correction in CORRECTIONS}
    token, masked = by_name["token-tis"], touched.get("token-tis", MetricValue(None))
    if verdict == "fail":
        return None, ["No correction is recommended: it would hide what fails here, and not mend it."]
    if ess is None or ess.ci_low is None or ess.ci_high is None or "extrapolated" in ess.why:
        why = "" if ess is None or not ess.why else f" ({ess.why})"
        return token, [
            f"Whether sequence weights serve at {planned:,} tokens is not known{why}; cap token weights at "
            f"{token.high:g}, which touches {_share(masked)} of the tokens."
        ]
    band = f"{said(ess)} of the sequences at {planned:,} tokens" + (f" ({ess.why})" if ess.why else "")
    if ess.ci_low >= ALL_BUT_ONE:
        return None, [f"No correction is needed: sequence weights would leave {band}, so they are nearly 1."]
    if ess.ci_low >= HALF:
        found = by_name["seq-tis"]
        return found, [
            f"Sequence weights serve: they leave {band}. Cap them at {found.high:g}, which touches "
            f"{_share(touched[found.name])} of the tokens at the observed length."
        ]
    if ess.ci_low >= TENTH:
        found = by_name["seq-mis"]
        return found, [
            f"Sequence weights are noisy: they leave {band}. Mask those above {found.high:g}, which touches "
            f"{_share(touched[found.name])} of the tokens at the observed length, and more at the planned one."
        ]
    usable = "are not usable" if ess.ci_high < HALF else "cannot be relied on"
    if (masked.value or 0.0) > MANY:
        # Capping that many tokens is a bias of its own.
        geometric = by_name["geometric"]
        out = touched[geometric.name].value
        found = geometric if out is not None and out < FEW else by_name["token-mis"]
        whose = "sequences by their geometric mean" if found is geometric else "tokens by their weight"
        return found, [
            f"Sequence weights {usable}: they leave {band}; and {_share(masked)} of the tokens have a weight above "
            f"{token.high:g}. Mask {whose}, outside [{found.low:g}, {found.high:g}], which takes out "
            f"{_share(touched[found.name])}. A mismatch of this size is better mended than corrected."
        ]
    return token, [
        f"Sequence weights {usable}: they leave {band}. Cap token weights at {token.high:g}, which touches "
        f"{_share(masked)} of the tokens and leaves the rest of the bias."
    ]


def _lag(pair: Document, lag: Document | None) -> str:
    dtype = pair["rollout_dtype"]
    if lag is None or dtype not in ("bfloat16", "float16"):
        return ""
    steady = next(case for case in lag["cases"] if case["dtype"] == dtype and case["rate"] is None)
    gap = said(MetricValue.of_dict(steady["mean_abs_logprob_diff"]))
    text = f"The {_SHORT[dtype]} engine lags behind FP32 masters by {gap} nats of mean |d|"
    row = next((row for row in lag["motion"]["rows"] if row["dtype"] == dtype), None) if lag["motion"] else None
    if row is None or row["straight_steps"] is None:
        return f"{text}."
    return (
        f"{text}; at a learning rate of {row['rate']:g} a typical weight's change reaches it after "
        f"{row['straight_steps']:,.0f} steps in one direction, and later where its gradient is noise."
    )


def _share(value: MetricValue) -> str:
    if value.value is None:
        return "an unknown share"
    limits = (
        ""
        if value.ci_low is None or value.ci_high is None
        else f" [{100 * value.ci_low:.2g}, {100 * value.ci_high:.2g}]"
    )
    return f"{100 * value.value:.2g} %{limits}"


def _name(pair: Document) -> str:
    rollout, trainer = (_SHORT.get(pair[side], pair[side]) for side in ("rollout_dtype", "trainer_dtype"))
    return f"{rollout} rollouts and {trainer} training" if rollout != trainer else f"{rollout} on both sides"


def _same(pair: Document, other: Document) -> bool:
    return all(pair[key] == other[key] for key in ("rollout_dtype", "trainer_dtype", "trainer_mode"))
