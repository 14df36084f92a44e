"""How a gap is made: rung by rung, and what a change does to it.

A ladder is a row of passes over the same tokens, from the rollout's to the trainer's, each with one change against the
one before. The differences of neighbours, d_rung, add up to d token by token. A rung's contribution is
E[d_rung · d] / E[d²], about zero and not about means, so that a bias counts: contributions add up to 1, a rung that
undoes what others did has a negative one, and another order of the same changes gives other contributions.

The error budget says how far each side is from a reference pass over the same tokens, and whether that explains the
gap. With r the reference's log-prob, e_μ = b − r and e_π = a − r are the two sides' errors and d = e_π − e_μ. If the
errors are independent their squares add: mean d² = mean e_μ² + mean e_π², the quadrature prediction. What they share
(correlation) makes the measured gap smaller.

A fix is a class of the trainer's modules in FP32: what it buys of the gap, and what it costs.

Shape legend: `N` tokens, `P` prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.chunks import group_sums, usable_rows
from mismatch_probe.metrics.inference import SIGNIFICANCE, TESTED_PROMPTS, holm
from mismatch_probe.metrics.intervals import Estimate, evaluate, infer, metric_value, with_interval
from mismatch_probe.types import MetricValue, PairArrays

Floats = NDArray[np.float64]
UNCHANGED = "no token changed"
NO_TOKENS = "no token is finite in all passes"
NO_GAP = "there is no gap"
CLOSED = "no gap is left"
# Times of two passes differ by this much for no reason: below it a cost is none.
_NOISE = 0.05
Part = tuple[Mapping[str, Any], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class TokenPrompts:
    """Which prompt each token answers: the unit of every interval.

    Attributes:
        prompt: `[N]` index of each token's prompt.
        n_prompts: `P`.
    """

    prompt: NDArray[np.int64]
    n_prompts: int

    def sums(self, *columns: Floats) -> Floats:
        """`[P, K]` sums of `[N]` columns."""
        return np.stack([group_sums(self.prompt, column, self.n_prompts) for column in columns], axis=1)

    def counts(self, width: int) -> Floats:
        """`[P, width]` tokens."""
        counts = np.bincount(self.prompt, minlength=self.n_prompts).astype(np.float64)
        return np.repeat(counts[:, None], width, axis=1)

    def estimate(self, working: Any, metric: Any, *columns: Floats) -> Estimate:
        """A function of the means of columns."""
        return Estimate(self.sums(*columns), self.counts(len(columns)), working, metric)

    def where(self, kept: NDArray[np.bool_]) -> TokenPrompts:
        """Of some of the tokens."""
        return TokenPrompts(self.prompt[kept], self.n_prompts)


@dataclass(frozen=True)
class Rung:
    """A step of a ladder.

    Attributes:
        rms: Of d_rung, nats.
        mean: Of d_rung, nats: its bias.
        contribution: To E[d²], as a fraction; negative where the rung undoes what others did.
    """

    rms: MetricValue
    mean: MetricValue
    contribution: MetricValue


@dataclass(frozen=True)
class Gap:
    """How large a gap is.

    Attributes:
        rms: Of d, nats.
        k3: Mean of exp(d) − 1 − d, nats.
    """

    rms: MetricValue
    k3: MetricValue


@dataclass(frozen=True)
class Change:
    """What a change does to a gap, paired by prompt.

    Attributes:
        rms: Of the gap with the change, nats.
        k3: Of the gap with the change, nats.
        rms_ratio: `rms` over that of the gap without it.
        k3_ratio: The same of `k3`.
        shift: RMS by which the change moved log-probs, nats.
        p_value: Two-sided, of `rms_ratio` being 1: below 0.05 exactly where its interval leaves 1 out; None where
            nothing can be tested, as below 16 prompts. Where no gap is left, that of a sign test over the prompts that
            had one.
        p_holm: `p_value` adjusted over a family of changes (Holm 1979), see `tested_together`; None where there is no
            test.
        differs: Whether `p_holm` is below 5 %; None where there is no test.
    """

    rms: MetricValue
    k3: MetricValue
    rms_ratio: MetricValue
    k3_ratio: MetricValue
    shift: MetricValue
    p_value: float | None = None
    p_holm: float | None = None
    differs: bool | None = None

    def alters(self, *, larger: bool) -> bool:
        """Whether a tested change makes the gap larger, or smaller."""
        ratio = self.rms_ratio.value
        return bool(self.differs) and ratio is not None and (ratio > 1) == larger

    @property
    def closed(self) -> MetricValue:
        """The fraction of E[d²] that is gone with the change, 1 − `rms_ratio`²; negative where the gap grows."""
        ratio = self.rms_ratio
        value, low, high = (None if end is None else 1 - end**2 for end in (ratio.value, ratio.ci_high, ratio.ci_low))
        return MetricValue(value, low, high, ratio.why)


def tested_together(changes: Sequence[Change]) -> list[Change]:
    """The changes with `p_holm` and `differs`: all of them are one family of tests."""
    adjusted = holm([change.p_value for change in changes])
    return [
        replace(change, p_holm=p, differs=None if p is None else p < SIGNIFICANCE)
        for change, p in zip(changes, adjusted, strict=True)
    ]


def climb(passes: Sequence[Floats], tokens: TokenPrompts, *, seed: int = 0, replicates: int = 1000) -> list[Rung]:
    """The rungs between neighbouring passes.

    Args:
        passes: `[N]` log-probs each, nats, the rollout's first; two or more.
        tokens: Whose they are.
        seed: Of the bootstrap.
        replicates: Of the bootstrap.
    """
    logprobs = np.stack(passes)
    finite = np.asarray(np.isfinite(logprobs).all(axis=0))
    logprobs, tokens = logprobs[:, finite], tokens.where(finite)
    total, steps = logprobs[-1] - logprobs[0], np.diff(logprobs, axis=0)
    if not finite.any():
        nothing = MetricValue(None, why=NO_TOKENS)
        return [Rung(nothing, nothing, nothing) for _ in steps]
    estimates: dict[str, Estimate] = {}
    contributions: dict[str, Estimate] = {}
    for index, step in enumerate(steps):
        if step.any():
            estimates[f"rms-{index}"] = tokens.estimate(scales.log_root_mean, scales.exp, step**2)
            estimates[f"mean-{index}"] = tokens.estimate(scales.plain, scales.as_is, step)
            if total.any():
                contributions[f"contribution-{index}"] = tokens.estimate(_ratio, scales.as_is, step * total, total**2)
    found = evaluate(estimates, seed=seed, replicates=replicates)
    # A contribution is the same for every prompt where one rung makes all: resampled, it would have no spread.
    found |= evaluate(contributions, seed=seed, replicates=0)
    zero = MetricValue(0.0, why=UNCHANGED)
    none = zero if total.any() else MetricValue(None, why=NO_GAP)
    return [
        Rung(found.get(f"rms-{i}", zero), found.get(f"mean-{i}", zero), found.get(f"contribution-{i}", none))
        for i in range(len(steps))
    ]


def gap(d: Floats, tokens: TokenPrompts, *, seed: int = 0, replicates: int = 1000) -> Gap:
    """How large a gap `[N]` is, nats."""
    finite = np.isfinite(d)
    d, tokens = d[finite], tokens.where(finite)
    if not finite.any():
        return Gap(*[MetricValue(None, why=NO_TOKENS)] * 2)
    if not d.any():
        return Gap(*[MetricValue(0.0, why=NO_GAP)] * 2)
    estimates = {
        "rms": tokens.estimate(scales.log_root_mean, scales.exp, d**2),
        "k3": tokens.estimate(scales.log_mean, scales.exp, scales.k3(d)),
    }
    return Gap(**evaluate(estimates, seed=seed, replicates=replicates))


def change(before: Floats, after: Floats, tokens: TokenPrompts, *, seed: int = 0, replicates: int = 1000) -> Change:
    """What a change does to a gap.

    Args:
        before: `[N]` d without it, nats.
        after: `[N]` d with it.
        tokens: Whose they are.
        seed: Of the bootstrap.
        replicates: Of the bootstrap.

    Returns:
        Nothing in it has a value where the change makes a token not finite that was finite without it: its hardest
        tokens would be missing.
    """
    lost = int((np.isfinite(before) & ~np.isfinite(after)).sum())
    if lost:
        broken = MetricValue(None, why=f"the change makes {lost} tokens not finite")
        return Change(broken, broken, broken, broken, broken)
    finite = np.isfinite(before) & np.isfinite(after)
    before, after, tokens = before[finite], after[finite], tokens.where(finite)
    own = gap(after, tokens, seed=seed, replicates=replicates)
    none = MetricValue(None, why=NO_GAP if finite.any() else NO_TOKENS)
    found = Change(own.rms, own.k3, none, none, none)
    if not finite.any():
        return found
    if not (after - before).any():
        one = MetricValue(1.0, why=UNCHANGED) if before.any() else none
        return replace(found, rms_ratio=one, k3_ratio=one, shift=MetricValue(0.0, why=UNCHANGED))
    estimates = {"shift": tokens.estimate(scales.log_root_mean, scales.exp, (after - before) ** 2)}
    active = len(np.unique(tokens.prompt[(before != 0) | (after != 0)]))
    if before.any() and not after.any():
        sign_test = 2.0 ** (1 - active)  # two-sided: no prompt of those that had a gap has one
        closed = MetricValue(0.0, why=CLOSED)
        if sign_test < SIGNIFICANCE:
            closed = with_interval(0.0, (0.0, 0.0), active, CLOSED)
        found = replace(
            found, rms_ratio=closed, k3_ratio=closed, p_value=sign_test if active >= TESTED_PROMPTS else None
        )
    elif before.any():
        estimates["rms_ratio"] = tokens.estimate(_log_root_ratio, scales.exp, after**2, before**2)
        estimates["k3_ratio"] = tokens.estimate(_log_ratio, scales.exp, scales.k3(after), scales.k3(before))
    inferred = infer(estimates, seed=seed, replicates=replicates)
    measured = {name: metric_value(name, estimates[name], inferred[name]) for name in estimates}
    found = replace(found, shift=measured["shift"])
    if "rms_ratio" not in measured:
        return found
    ratios = {name: measured[name] if active > 1 else _alone(measured[name]) for name in ("rms_ratio", "k3_ratio")}
    tested = ratios["rms_ratio"].ci_low is not None
    p_value = inferred["rms_ratio"].p_value(0.0) if tested else None
    return replace(found, rms_ratio=ratios["rms_ratio"], k3_ratio=ratios["k3_ratio"], p_value=p_value)


def contribution_of(d: Floats, chosen: NDArray[np.bool_], tokens: TokenPrompts, *, seed: int = 0) -> MetricValue:
    """The fraction of Σ d² that lies on some of the tokens."""
    finite = np.isfinite(d)
    d, chosen, tokens = d[finite], chosen[finite], tokens.where(finite)
    if not d.any():
        return MetricValue(None, why=NO_GAP if len(d) else NO_TOKENS)
    if not (d * chosen).any():
        return MetricValue(0.0, why="none of its tokens differs")
    estimate = tokens.estimate(_ratio, scales.as_is, d**2 * chosen, d**2)
    return evaluate({"contribution": estimate}, seed=seed, replicates=0)["contribution"]


def _alone(value: MetricValue) -> MetricValue:
    """Of a single prompt, which has no spread."""
    return MetricValue(value.value, why="no interval: one prompt makes all of it")


def _ratio(means: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(means[..., 0] / means[..., 1])


def _log_ratio(means: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.log(means[..., 0]) - np.log(means[..., 1]))


def _log_root_ratio(means: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(0.5 * _log_ratio(means))


class BudgetSums:
    """Per-prompt sums of the squares and products of both sides' errors; fed chunk by chunk.

    Attributes:
        n_tokens: Usable tokens that the reference has finite.
    """

    def __init__(self, n_prompts: int) -> None:
        self.n_tokens = 0
        self._counts = np.zeros(n_prompts)
        self._sums = np.zeros((n_prompts, 4))

    def update(self, chunk: PairArrays) -> None:
        """Takes in the tokens of a chunk that carries `reference_logprob` `[N]`, nats."""
        reference = chunk.columns["reference_logprob"]
        rollout, trainer = chunk.rollout_logprob - reference, chunk.trainer_logprob - reference
        gap = chunk.trainer_logprob - chunk.rollout_logprob
        finite = usable_rows(chunk) & np.isfinite(reference)
        prompt = chunk.prompt[chunk.sequence[finite]]
        n_prompts = len(self._counts)
        self.n_tokens += int(finite.sum())
        self._counts += np.bincount(prompt, minlength=n_prompts)
        for k, values in enumerate((rollout**2, trainer**2, rollout * trainer, gap**2)):
            self._sums[:, k] += group_sums(prompt, values[finite], n_prompts)

    def metrics(self, *, seed: int = 0, replicates: int = 1000) -> dict[str, MetricValue]:
        """The budget with its intervals.

        Returns:
            `rollout_error_rms`, `trainer_error_rms`, `predicted_gap_rms` = √(e_μ² + e_π²), `measured_gap_rms` (nats),
            `error_correlation` (about zero, not about the means: a bias that both share counts), and
            `measured_over_predicted`.
        """
        names = ("rollout_error_rms", "trainer_error_rms", "predicted_gap_rms", "measured_gap_rms")
        if self.n_tokens == 0:
            none = MetricValue(None, why="no token has usable log-probs in all three passes")
            return dict.fromkeys((*names, "error_correlation", "measured_over_predicted"), none)
        estimates = {
            "rollout_error_rms": self._estimate([0], scales.log_root_mean, scales.exp),
            "trainer_error_rms": self._estimate([1], scales.log_root_mean, scales.exp),
            "predicted_gap_rms": self._estimate([0, 1], _log_root_sum, scales.exp),
            "measured_gap_rms": self._estimate([3], scales.log_root_mean, scales.exp),
        }
        found: dict[str, MetricValue] = {}
        if self._sums[:, :2].any(axis=0).all():
            estimates["error_correlation"] = self._estimate([0, 1, 2], _fisher, np.tanh)
            estimates["measured_over_predicted"] = self._estimate([0, 1, 3], _log_quadrature, scales.exp)
        else:
            none = MetricValue(None, why="one side is the reference itself, or agrees with it exactly")
            found = {"error_correlation": none, "measured_over_predicted": none}
        return found | evaluate(estimates, seed=seed, replicates=replicates)

    def _estimate(self, columns: list[int], working: Any, metric: Any) -> Estimate:
        counts = np.repeat(self._counts[:, None], len(columns), axis=1)
        return Estimate(self._sums[:, columns], counts, working, metric)


def _log_root_sum(means: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(0.5 * np.log(means[..., 0] + means[..., 1]))


def _log_quadrature(means: NDArray[Any]) -> NDArray[Any]:
    """log of the measured over the predicted RMS from the means of (e_μ², e_π², d²)."""
    return np.asarray(0.5 * (np.log(means[..., 2]) - np.log(means[..., 0] + means[..., 1])))


def _fisher(means: NDArray[Any]) -> NDArray[Any]:
    """Fisher's z of the correlation from the means of (e_μ², e_π², e_μ·e_π)."""
    return np.asarray(np.arctanh(means[..., 2] / np.sqrt(means[..., 0] * means[..., 1])))


@dataclass(frozen=True)
class Fix:
    """A set of classes in FP32.

    Attributes:
        classes: Their names, in the order in which they were added.
        left: RMS of the gap over the baseline's.
        cost: Time that it adds, as a part of the baseline's.
    """

    classes: tuple[str, ...]
    left: float
    cost: float

    @classmethod
    def of(cls, classes: tuple[str, ...], rollout_logprobs: NDArray[np.float64], base: Part, part: Part) -> Fix:
        """From two readings (facts with `seconds`, and `logprobs` `[N]`); what breaks tokens closes nothing."""
        after, before = (np.asarray(reading[1]["logprobs"], np.float64) - rollout_logprobs for reading in (part, base))
        finite = np.isfinite(before)
        gaps = [float(np.mean(gap[finite] ** 2)) if finite.any() else 0.0 for gap in (after, before)]
        left = float(np.sqrt(gaps[0] / gaps[1])) if gaps[1] > 0 else 1.0
        left = left if np.isfinite(left) else np.inf
        return cls(classes, left, float(part[0]["seconds"]) / float(base[0]["seconds"]) - 1)


def next_set(fixes: Sequence[Fix], target: float) -> tuple[str, ...] | None:
    """The set to try after those that were tried: the largest tried one, and the next class by gain per time.

    Classes that close nothing by themselves come last, and come: rounding elsewhere can hide what they would do.

    Args:
        fixes: Every class by itself, and the sets so far.
        target: Part of the gap's RMS that may be left.

    Returns:
        None where a set meets the target, or no class is left.
    """
    if any(fix.left <= target for fix in fixes):
        return None
    singles = [fix for fix in fixes if len(fix.classes) == 1]
    order = [fix.classes[0] for fix in sorted(singles, key=_gain_per_time, reverse=True)]
    tried = max((len(fix.classes) for fix in fixes), default=0)
    return tuple(order[: tried + 1]) if tried < len(order) else None


def cheapest(fixes: Sequence[Fix], target: float) -> Fix | None:
    """Of the sets that were tried, the one that meets the target at the least cost; where costs tie, the closest."""
    fit = [fix for fix in fixes if fix.left <= target]
    return min(fit, key=lambda fix: (max(fix.cost, _NOISE), fix.left), default=None)


def _gain_per_time(fix: Fix) -> float:
    """Share of mean d² that goes, by time."""
    return (1 - fix.left**2) / max(fix.cost, _NOISE)
