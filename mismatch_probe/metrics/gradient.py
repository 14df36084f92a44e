"""How far a policy-gradient estimate lies from another one, under advantages of random sign.

A batch's estimate is g = (1/n) Σ_i A_i v_i. Its vectors are v_i = Σ_t w_it ∇log π(y_it), with the weights w of a
correction. A_i is +1 or −1 with even chance, independent between sequences: there is no task, so nothing says which
responses are good. Then E g = 0, products between sequences vanish, and what is left is exact and needs no draws:
n² E⟨g, h⟩ = Σ_i ⟨v_i, u_i⟩. All of it is variance, which is most of any policy gradient of a batch; that a correction
is biased towards some reward cannot show here.

Everything below is written with differences e_i = v_i − u_i, so that a cosine within 1e-12 of 1 keeps its digits.

Shape legend: `n` sequences, `K` components, `P` prompts, `R` draws of signs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.chunks import Ints, group_sums
from mismatch_probe.metrics.intervals import Estimate, Floats, evaluate
from mismatch_probe.metrics.sample import SPREAD_PROMPTS, PairTokens, few_decide, usable_tokens
from mismatch_probe.types import MetricValue


@dataclass(frozen=True)
class Weighted:
    """The vectors of a correction, and its weights as sums.

    Attributes:
        vectors: `[n, K]` v_i.
        n_weights: `[n]` weights of each sequence: 1, or its tokens.
        excess: `[n]` Σ (w − 1) over them.
        squared_excess: `[n]` Σ (w − 1)².
    """

    vectors: Floats
    n_weights: Floats
    excess: Floats
    squared_excess: Floats


@dataclass(frozen=True)
class GradientMetrics:
    """What a correction does to the gradient of a batch: v its vectors, u the reference's, s those without weights.

    Attributes:
        cosine: Σ⟨v, u⟩ / sqrt(Σ|v|² Σ|u|²): that of root-mean-square estimates with the reference.
        norm_ratio: sqrt(Σ|v|² / Σ|u|²).
        added_variance: Σ|v|² / Σ|s|² − 1: the trace of the estimate's covariance against that of a batch whose sampling
            policy is the trained one. Negative where weights shrink the gradient itself.
        effective_batch: (Σ⟨v, s⟩)² / (Σ|v|² Σ|s|²), a fraction of the sequences: the unweighted batch with the same
            ratio of signal to noise, if the signal is along s. With one weight a sequence it is Kish's fraction, each
            sequence counted by |s|².
        ess_weights: Kish's (Σw)² / (m Σw²) over the m weights themselves, those of tokens or of sequences; a fraction.
    """

    cosine: MetricValue
    norm_ratio: MetricValue
    added_variance: MetricValue
    effective_batch: MetricValue
    ess_weights: MetricValue

    @classmethod
    def without(cls, why: str) -> GradientMetrics:
        """None of them, with the reason."""
        return cls(**dict.fromkeys(GRADIENT_KEYS, MetricValue(None, why=why)))


GRADIENT_KEYS = tuple(part.name for part in fields(GradientMetrics))


def gradient_metrics(
    corrected: Weighted,
    plain: Floats,
    reference: Floats,
    prompt: Ints,
    *,
    seed: int = 0,
    replicates: int = 1000,
) -> GradientMetrics:
    """What a correction does to the gradient of a batch.

    Args:
        corrected: v and its weights.
        plain: `[n, K]` s.
        reference: `[n, K]` u.
        prompt: `[n]` index of each sequence's prompt: the unit of every interval.
        seed: Seed of the bootstrap.
        replicates: Bootstrap replicates.
    """
    if not (np.isfinite(corrected.vectors).all() and np.isfinite(reference).all()):
        return GradientMetrics.without("a weight overflows float64")
    if not corrected.vectors.any() or not reference.any():
        return GradientMetrics.without("every weighted gradient is 0")
    n_prompts = int(prompt.max()) + 1

    def estimate(
        columns: list[Floats], working: Any, metric: Callable[[float], float], counts: Floats, why: str = ""
    ) -> Estimate:
        sums = np.stack([group_sums(prompt, column, n_prompts) for column in columns], axis=1)
        n = group_sums(prompt, counts, n_prompts)
        return Estimate(sums, np.stack([n] * len(columns), axis=1), working, metric, why, SPREAD_PROMPTS)

    ones = np.ones(len(prompt))
    to_reference, to_plain = _products(corrected.vectors, reference), _products(corrected.vectors, plain)
    weights, mean_excess = (
        [corrected.excess, corrected.squared_excess],
        corrected.excess / np.maximum(corrected.n_weights, 1),
    )
    estimates = {
        "cosine": estimate(to_reference, _log_odds, lambda x: float(-np.tanh(x / 2)), ones),
        "norm_ratio": estimate(to_reference, lambda means: 0.5 * _log_square_ratio(means), scales.exp, ones),
        "added_variance": estimate(to_plain, _log_square_ratio, scales.expm1, ones),
        "effective_batch": estimate(to_plain, _log_squared_tangent, scales.ess_of_log_squared_variation, ones),
        "ess_weights": estimate(
            weights,
            scales.log_squared_variation(1.0),
            scales.ess_of_log_squared_variation,
            corrected.n_weights,
            few_decide(np.log(np.maximum(1 + mean_excess, np.finfo(np.float64).tiny))),
        ),
    }
    return GradientMetrics(**evaluate(estimates, seed=seed, replicates=replicates))


def _products(v: Floats, u: Floats) -> list[Floats]:
    """`[n]` each: |e|², ⟨e, v + u⟩ = |v|² − |u|², |v|², |u|²."""
    e = v - u
    return [np.einsum("nk,nk->n", a, b) for a, b in ((e, e), (e, v + u), (v, v), (u, u))]


def _one_minus_cosine(means: NDArray[Any]) -> NDArray[Any]:
    """1 − cos = (|e|² − (|v| − |u|)²) / (2|v||u|)."""
    ee, es, vv, uu = (means[..., k] for k in range(4))
    v, u = np.sqrt(vv), np.sqrt(uu)
    numerator = ee - (es / (v + u)) ** 2
    return np.asarray(np.where(numerator.real > 0, numerator, 0) / (2 * v * u))


def _log_odds(means: NDArray[Any]) -> NDArray[Any]:
    """log((1 − cos)/(1 + cos)): −2 times Fisher's z, so that no limit leaves [−1, 1]."""
    distance = _one_minus_cosine(means)
    return np.asarray(np.log(distance) - np.log(2 - distance))


def _log_squared_tangent(means: NDArray[Any]) -> NDArray[Any]:
    """log((1 − cos²)/cos²)."""
    distance = _one_minus_cosine(means)
    return np.asarray(np.log(distance) + np.log(2 - distance) - 2 * np.log(1 - distance))


def _log_square_ratio(means: NDArray[Any]) -> NDArray[Any]:
    """log(|v|² / |u|²)."""
    return np.asarray(np.log1p(means[..., 1] / means[..., 3]))


def sign_draws(vectors: Floats, reference: Floats, signs: Floats) -> tuple[Floats, Floats]:
    """Cosine and ratio of norms of the two estimates of this very batch, for each draw of its advantages.

    Args:
        vectors: `[n, K]` v.
        reference: `[n, K]` u.
        signs: `[R, n]` advantages.

    Returns:
        Two `[R]`.
    """
    with np.errstate(all="ignore"):
        # Through n × n products, as K is most often far larger than n.
        pairs = ((vectors, reference), (vectors, vectors), (reference, reference))
        gh, gg, hh = (np.einsum("rn,rn->r", signs @ (v @ u.T), signs) for v, u in pairs)
        norm, size = np.sqrt(gg), np.sqrt(hh)
        return gh / (norm * size), norm / size


def random_walk_ess(
    pair: PairTokens, lengths: Mapping[str, float], *, seed: int = 0, replicates: int = 1000
) -> dict[str, MetricValue]:
    """exp(−E d²·T): `ess_seq_gaussian` where the d of a sequence are uncorrelated, from the tokens' mean d².

    Args:
        pair: The paired log-probs.
        lengths: Response lengths T in tokens, by name.
        seed: Seed of the bootstrap.
        replicates: Bootstrap replicates.
    """
    tokens = usable_tokens(pair)
    if not len(tokens):
        return dict.fromkeys(lengths, MetricValue(None, why="no usable tokens"))

    def at(length: float) -> Estimate:
        squares = [tokens.sums.squared_log_ratio]
        return tokens.estimate(squares, scales.log_mean, lambda x: float(np.exp(-length * np.exp(x))))

    return evaluate({name: at(length) for name, length in lengths.items()}, seed=seed, replicates=replicates)
