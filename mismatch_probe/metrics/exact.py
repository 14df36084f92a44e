"""Exact divergences of two policies at a position, from the full rows of logits on both sides.

Everything is float64 and sums over the whole vocabulary, in forms whose terms are small where the two policies are
close: KL as Σ μ·(e − x), x = log π − log μ, e = expm1(x), which adds Σ(π − μ) = 0 to the textbook sum and so never is
the difference of two large numbers. The other sums follow from e as well: π = μ(1 + e).

Shape legend: `R` positions, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.chunks import group_sums
from mismatch_probe.metrics.drift import score_drift
from mismatch_probe.metrics.intervals import (
    NO_INTERVAL,
    UPPER_TAIL,
    Estimate,
    Floats,
    join_why,
    kish,
    share_interval,
    with_interval,
)
from mismatch_probe.types import DIVERGENCES, MetricValue


def divergences(
    rollout_logits: NDArray[Any], trainer_logits: NDArray[Any], temperature: float = 1.0
) -> dict[str, Floats]:
    """Divergences of μ = softmax(rollout_logits / temperature) and π = softmax(trainer_logits / temperature).

    Args:
        rollout_logits: `[R, V]`, −inf for tokens that cannot occur.
        trainer_logits: `[R, V]`
        temperature: Of the sampling distribution.

    Returns:
        `[R]` float64 per key of `DIVERGENCES`, in nats where they have a unit: `kl` is KL(μ‖π), `kl_reverse` KL(π‖μ),
        `js` Jensen–Shannon, `tv` total variation, `flip` 1 where the likeliest tokens differ, `chi2` Σ π²/μ − 1;
        `k1_square`, `k2_square`, `k3_square` are the second moments under y ~ μ of the estimators k1 = −d, k2 = ½d²
        and k3 = expm1(d) − d, d = log π(y) − log μ(y) (their means are `kl`, ½·`k1_square` and `kl`). Rows with NaN
        give NaN; a token that π excludes and μ does not gives an infinite `kl`.

    Raises:
        ValueError: The shapes differ.
    """
    if rollout_logits.shape != trainer_logits.shape:
        raise ValueError(f"logits of shapes {rollout_logits.shape} and {trainer_logits.shape} cannot be compared")
    with np.errstate(all="ignore"):  # rows with NaN, −inf or an overflow are dealt with by their results
        log_mu, mu = _log_softmax(rollout_logits, temperature)
        log_pi, pi = _log_softmax(trainer_logits, temperature)
        # A token that one side excludes has a logit of −inf; one whose probability underflows it does not exclude.
        both = (log_mu > -np.inf) & (log_pi > -np.inf)
        only_mu, only_pi = (np.where(both, 0.0, p).sum(axis=1) for p in (mu, pi))
        x = np.where(both, log_pi - log_mu, 0.0)
        far = np.abs(x) > _NEAR
        shared = np.where(both & ~far, mu, 0.0)
        x = np.where(far, 0.0, x)
        e = np.expm1(x)
        half = np.log1p(0.5 * e)  # of the middle of both policies, over μ
        square, k3 = x * x, e - x
        terms = {
            "kl": k3,
            "kl_reverse": x + e * x - e,
            "js": 0.5 * (e * (x - half) + x - 2.0 * half),
            "tv": 0.5 * np.abs(e),
            "chi2": e * e,
            "k1_square": square,
            "k2_square": 0.25 * square * square,
            "k3_square": k3 * k3,
        }
        sums = {key: np.einsum("rv,rv->r", shared, values) for key, values in terms.items()}
        for key, values in _far_terms(log_mu[far], log_pi[far]).items():
            sums[key] += np.bincount(np.nonzero(far)[0], values, minlength=len(mu))
    no_mu, no_pi = (np.where(only > 0, np.inf, 0.0) for only in (only_pi, only_mu))
    # Over the shared tokens alone Σ(π − μ) is only_mu − only_pi, which is put back.
    rest = {
        "kl": only_pi + no_pi,
        "kl_reverse": only_mu + no_mu,
        "js": 0.5 * np.log(2) * (only_mu + only_pi),
        "tv": 0.5 * (only_mu + only_pi),
        "chi2": only_mu + no_mu,
        **dict.fromkeys(("k1_square", "k2_square", "k3_square"), no_pi),
    }
    sums = {key: values + rest[key] for key, values in sums.items()} | {
        "flip": 1.0 * (rollout_logits.argmax(axis=1) != trainer_logits.argmax(axis=1)),
        "entropy_rollout": _entropy(log_mu, mu),
        "entropy_trainer": _entropy(log_pi, pi),
    }
    broken = np.isnan(rollout_logits).any(axis=1) | np.isnan(trainer_logits).any(axis=1)
    return {key: np.where(broken, np.nan, sums[key]) for key in DIVERGENCES}


def _far_terms(log_mu: Floats, log_pi: Floats) -> dict[str, Floats]:
    """The same terms of tokens `[K]` whose ratio is far from 1: differences of numbers that are not close, in which
    nothing overflows that has a finite value.
    """
    mu, pi, x = np.exp(log_mu), np.exp(log_pi), log_pi - log_mu
    middle = np.logaddexp(log_mu, log_pi) - np.log(2)
    rho_pi = np.exp(2 * log_pi - log_mu)  # π²/μ
    # expm1(x) − x times √μ, whose square is wanted: ρ√μ − (1 + x)√μ.
    root = np.exp(log_pi - 0.5 * log_mu) - (1 + x) * np.exp(0.5 * log_mu)
    return {
        "kl": pi - mu - mu * x,
        "kl_reverse": mu - pi + pi * x,
        "js": 0.5 * (mu * (log_mu - middle) + pi * (log_pi - middle)),
        "tv": 0.5 * np.abs(pi - mu),
        "chi2": rho_pi - 2 * pi + mu,
        "k1_square": mu * x**2,
        "k2_square": 0.25 * mu * x**4,
        "k3_square": root**2,
    }


def _entropy(log_p: Floats, p: Floats) -> Floats:
    return np.asarray(-np.einsum("rv,rv->r", p, np.where(p > 0, log_p, 0.0)))


def _log_softmax(logits: NDArray[Any], temperature: float) -> tuple[Floats, Floats]:
    """log softmax and softmax `[R, V]` in float64."""
    scaled = logits.astype(np.float64) / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    weights = np.exp(scaled)
    total = weights.sum(axis=1)[:, None]
    return scaled - np.log(total), weights / total


@dataclass(frozen=True)
class ExactRows:
    """The compared positions of a pair.

    Attributes:
        values: `[R]` per key of `DIVERGENCES`.
        weight: `[R]` weight w with which positions were sampled.
        stands_for: `[R]` how many positions each stands for; Σ w·stands_for is the sum of w over all positions.
        prompt: `[R]` prompt of each position, 0 … P−1.
        tokens: `[P]` response tokens of each prompt, compared or not.
        sequences: `[P]` sequences of each prompt.
        sequence: `[R]` index of each position's sequence in the pair; None where that is not known.
        drift_square: `[R]` Σ (μ − π)², NaN where not known; None where it is nowhere.
        drift_sketch: `[R, DRIFT_BUCKETS]` of μ − π, likewise.
    """

    values: Mapping[str, Floats]
    weight: Floats
    stands_for: Floats
    prompt: NDArray[np.int64]
    tokens: Floats
    sequences: Floats
    sequence: NDArray[np.int64] | None = None
    drift_square: Floats | None = None
    drift_sketch: NDArray[np.float32] | None = None

    @property
    def mean_weight(self) -> float:
        """Mean of w over all positions, compared or not."""
        return float((self.weight * self.stands_for).sum() / self.tokens.sum())

    def finite(self, *keys: str) -> NDArray[np.bool_]:
        """`[R]` positions at which all these divergences are finite.

        One can be infinite where another is not: below a mask on the rollout side only, KL(π‖μ) is and KL(μ‖π) is not.
        """
        return np.asarray(np.isfinite(np.stack([self.values[key] for key in keys])).all(axis=0))

    def largest_kl(self, sequence: NDArray[np.int64], length: NDArray[np.int64]) -> Floats | None:
        """`[S]` largest KL(μ‖π) of the tokens of each `sequence` `[S]`, increasing, which has `length` `[S]` tokens, at
        least one. None where a token was not compared.
        """
        if self.sequence is None:
            return None
        row = np.searchsorted(sequence, self.sequence)
        if not np.array_equal(np.bincount(row, minlength=len(sequence)), length):
            return None
        largest = np.full(len(sequence), -np.inf)
        np.maximum.at(largest, row, self.values["kl"])
        return largest


@dataclass(frozen=True)
class EstimatorCost:
    """What a sampled estimator of KL(μ‖π) costs on this model.

    Attributes:
        key: `kl_k1`, `kl_k2`, `kl_k3`, or `kl_exact` for the full rows themselves.
        mean: What it converges to, nats.
        bias: That minus KL(μ‖π), nats.
        standard_deviation: Of one token, over positions and over the token that is sampled there.
        tokens_needed: Independent tokens for ±10 % with 95 % confidence; None where the KL is 0.
    """

    key: str
    mean: float
    bias: float
    standard_deviation: float
    tokens_needed: int | None


# Beyond this |x| a term is a difference of numbers that are not close to each other.
_NEAR = 1.0
# Metric keys, the column behind each, and how its mean becomes the metric.
_MEANS = {
    "kl_exact": "kl",
    "kl_exact_reverse": "kl_reverse",
    "js_exact": "js",
    "tv_exact": "tv",
    "top1_flip_rate": "flip",
    "entropy_rollout": "entropy_rollout",
    "entropy_trainer": "entropy_trainer",
    "chi2_exact": "chi2",
}
# What the costs of the sampled estimators are made of.
ESTIMATOR_COLUMNS = ("kl", "k1_square", "k2_square", "k3_square")
_PRECISION = 0.1
NO_ROWS = "no rows of logits were compared; --exact-kl keeps some"


def exact_metrics(rows: ExactRows | None, seed: int = 0) -> dict[str, Estimate | MetricValue]:
    """The metrics of level `exact` over all positions of the pair.

    A compared position stands for others, so a prompt's Σ y·stands_for estimates its sum over all of its positions, and
    what the sums are divided by, tokens or sequences, is known for each prompt (Horvitz and Thompson 1952): that
    prompts differ in these is part of the spread. `seed` is of the null of `score_drift`.
    """
    if rows is None:
        return dict.fromkeys((*_MEANS, "kl_seq_exact", "score_drift"), MetricValue(None, why=NO_ROWS))
    found = {key: _over_finite(rows, column, rows.tokens) for key, column in _MEANS.items()}
    found["kl_seq_exact"] = _over_finite(rows, "kl", rows.sequences)
    found["score_drift"] = score_drift(rows.drift_sketch, rows.drift_square, rows.stands_for, rows.prompt, seed)
    return found


def _over_finite(rows: ExactRows, column: str, units: Floats) -> Estimate | MetricValue:
    """Sum of a column per unit `[P]`, from the positions at which it is finite."""
    keep = rows.finite(column)
    if not keep.any():
        return MetricValue(None, why=f"finite at none of the {len(keep)} compared positions")
    why = "" if keep.all() else f"computed over the {int(keep.sum())} of {len(keep)} positions that are finite"
    times, prompt, n_prompts = rows.stands_for[keep], rows.prompt[keep], len(rows.tokens)
    sums = group_sums(prompt, rows.values[column][keep] * times, n_prompts)
    weight = rows.weight * rows.stands_for
    counts = units * (1.0 if keep.all() else float(weight[keep].sum() / weight.sum()))
    if column == "flip":
        return _share_of(sums, counts, kish(times), why)
    if not sums.any():
        return MetricValue(0.0, 0.0, 0.0, why)
    return Estimate(sums[:, None], counts[:, None], scales.log_mean, scales.exp, why)


def _share_of(hits: Floats, counts: Floats, most: float, why: str) -> MetricValue:
    """A share of hits among positions, of which so many were compared as `most` equal ones amount to."""
    share = min(1.0, float(hits.sum() / counts.sum()))
    interval = share_interval(np.minimum(hits, counts), counts, most=most)
    if interval is None:
        return MetricValue(share, why=join_why(why, NO_INTERVAL))
    interval = min(interval[0], share), max(interval[1], share)
    return with_interval(share, interval, int(np.count_nonzero(counts)), why, effective=kish(counts))


def estimator_costs(rows: ExactRows) -> list[EstimatorCost]:
    """How k1, k2 and k3 would do on this pair, without sampling noise, beside the rows themselves.

    Each estimator's mean and second moment under y ~ μ are known at every compared position; over positions they are
    weighted means. The variance counts both what the sampled token adds and how positions differ; that tokens of one
    prompt resemble each other is not in it.
    """
    keep = rows.finite(*ESTIMATOR_COLUMNS)
    weight, mean_weight = rows.stands_for[keep], rows.mean_weight

    def mean(values: Floats) -> float:
        return mean_weight * float((values * weight).sum() / (rows.weight[keep] * weight).sum())

    column = {key: rows.values[key][keep] for key in ESTIMATOR_COLUMNS}
    kl = mean(column["kl"])
    moments = {
        "kl_k1": (kl, mean(column["k1_square"])),
        "kl_k2": (0.5 * mean(column["k1_square"]), mean(column["k2_square"])),
        "kl_k3": (kl, mean(column["k3_square"])),
        "kl_exact": (kl, mean(column["kl"] ** 2)),
    }
    return [
        EstimatorCost(key, first, first - kl, math.sqrt(max(0.0, second - first**2)), _needed(second - first**2, kl))
        for key, (first, second) in moments.items()
    ]


def _needed(variance: float, kl: float) -> int | None:
    if kl <= 0:
        return None
    z = float(special.ndtri(UPPER_TAIL))
    return max(1, math.ceil(max(0.0, variance) * (z / (_PRECISION * kl)) ** 2))
