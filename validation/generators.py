"""Synthetic on-policy pairs whose metrics are known, for the coverage simulation.

Each generator draws independent prompts; a metric's true value is the metric of the law, taken from a sample of very
many prompts (`truth` in coverage.py), which tests compare with closed forms where there is one.

Shape legend: `N` tokens, `S` sequences, `P` prompts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.types import PairArrays

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Generator = Callable[[np.random.Generator, int], PairArrays]

# A prompt's scale relative to the middle one, as measured on real models: a few prompts are much noisier than the rest.
PROMPT_SCALE = np.array([0.3, 0.6, 1.0, 1.5, 2.5])
PROMPT_SHARE = np.array([0.15, 0.25, 0.3, 0.2, 0.1])


def _pair(rng: np.random.Generator, log_ratio: Floats, lengths: Ints, samples: int = 1) -> PairArrays:
    """A pair from d `[N]`; half of the tokens are near-certain, as in sampled text."""
    n = len(log_ratio)
    rollout = -rng.exponential(1.0, n) * rng.choice([0.02, 2.0], n)
    sequences = len(lengths)
    starts = np.cumsum(lengths) - lengths
    return PairArrays(
        rollout_logprob=rollout,
        trainer_logprob=rollout + log_ratio,
        sequence=np.repeat(np.arange(sequences), lengths),
        position=np.arange(n) - np.repeat(starts, lengths),
        prompt=np.arange(sequences) // samples,
        prompt_ids=tuple(map(str, range(sequences // samples))),
    )


def _prompt_scale(rng: np.random.Generator, n_prompts: int) -> Floats:
    return rng.choice(PROMPT_SCALE, n_prompts, p=PROMPT_SHARE)


def _normal(rng: np.random.Generator, scale: Floats) -> Floats:
    """d with E[exp d] = 1 exactly: normal with mean −s²/2 and standard deviation s `[N]`."""
    return np.asarray(rng.normal(0, 1, len(scale)) * scale - 0.5 * scale**2)


def laplace(rng: np.random.Generator, n_prompts: int) -> PairArrays:
    """Laplace tokens whose scale varies by prompt (0.3 … 2.5) and by token (5 % are 8 times larger)."""
    lengths = rng.integers(20, 120, n_prompts)
    scale = 0.01 * np.repeat(_prompt_scale(rng, n_prompts), lengths)
    factor = rng.choice([1.0, 8.0], len(scale), p=[0.95, 0.05])
    return _pair(rng, rng.laplace(0, 1, len(scale)) * scale * factor, lengths)


def student(rng: np.random.Generator, n_prompts: int) -> PairArrays:
    """Student-t tokens (5 degrees of freedom) under lognormal prompt scales (σ = 0.6).

    Both are cut off far out: exp(d) of an unbounded t has no mean, that of an unbounded lognormal scale no usable one.
    """
    lengths = rng.integers(20, 120, n_prompts)
    scale = np.repeat(0.01 * np.exp(0.6 * np.clip(rng.normal(0, 1, n_prompts), -2.5, 2.5)), lengths)
    return _pair(rng, np.clip(rng.standard_t(5, len(scale)), -12, 12) * scale, lengths)


def gaussian(rng: np.random.Generator, n_prompts: int) -> PairArrays:
    """The easy case: normal tokens, the same scale everywhere."""
    lengths = rng.integers(40, 80, n_prompts)
    return _pair(rng, _normal(rng, np.full(int(lengths.sum()), 0.05)), lengths)


def mixed(rng: np.random.Generator, n_prompts: int) -> PairArrays:
    """Normal tokens on policy, the scale varies by prompt and by token (10 % are 4 times larger)."""
    lengths = rng.integers(20, 120, n_prompts)
    scale = 0.02 * np.repeat(_prompt_scale(rng, n_prompts), lengths)
    return _pair(rng, _normal(rng, scale * rng.choice([1.0, 4.0], len(scale), p=[0.9, 0.1])), lengths)


def _of_samples(rng: np.random.Generator, n_prompts: int, samples: int) -> PairArrays:
    lengths = rng.integers(20, 60, samples * n_prompts)
    prompt = np.repeat(np.arange(samples * n_prompts) // samples, lengths)
    scale = 0.02 * _prompt_scale(rng, n_prompts)[prompt]
    common, own = rng.normal(0, 1, n_prompts)[prompt], rng.normal(0, 1, len(prompt))
    log_ratio = scale * (np.sqrt(0.1) * common + np.sqrt(0.9) * own) - 0.5 * scale**2
    return _pair(rng, log_ratio, lengths, samples)


def correlated(rng: np.random.Generator, n_prompts: int) -> PairArrays:
    """Two sequences per prompt; a tenth of a token's variance is common to its prompt, whose scale varies."""
    return _of_samples(rng, n_prompts, 2)


def tiny(rng: np.random.Generator, n_prompts: int) -> PairArrays:
    """FP32: d of 1e-6, weights of 1 ± 1e-5, scale varies by prompt, token factors lognormal."""
    lengths = rng.integers(20, 120, n_prompts)
    scale = 1e-6 * np.repeat(_prompt_scale(rng, n_prompts), lengths)
    return _pair(rng, _normal(rng, scale * np.exp(rng.normal(0, 0.7, len(scale)))), lengths)


def outliers(rng: np.random.Generator, n_prompts: int) -> PairArrays:
    """Normal tokens and, in a quarter of the prompts, about 2 % that the trainer finds much less likely (d near −3)."""
    lengths = rng.integers(40, 80, n_prompts)
    hit = np.repeat(rng.random(n_prompts) < 0.25, lengths) & (rng.random(int(lengths.sum())) < 0.02)
    return _pair(rng, np.where(hit, rng.normal(-3, 0.3, len(hit)), _normal(rng, np.full(len(hit), 0.02))), lengths)


def four_samples(rng: np.random.Generator, n_prompts: int) -> PairArrays:
    """Four sequences per prompt; a tenth of a token's variance is common to its prompt, whose scale varies."""
    return _of_samples(rng, n_prompts, 4)


def unequal(rng: np.random.Generator, n_prompts: int) -> PairArrays:
    """Lognormal lengths (σ = 1, at most 1,000 tokens), so that prompts amount to about half of their number."""
    lengths = np.clip(40 * np.exp(rng.normal(0, 1, n_prompts)), 2, 1000).astype(np.int64)
    scale = 0.02 * np.repeat(_prompt_scale(rng, n_prompts), lengths)
    return _pair(rng, _normal(rng, scale), lengths)


def rare_huge(rng: np.random.Generator, n_prompts: int) -> PairArrays:
    """Normal tokens, and one of 5,000 that the trainer finds far less likely (d near −3): small samples miss it."""
    lengths = rng.integers(40, 80, n_prompts)
    huge = rng.random(int(lengths.sum())) < 2e-4
    return _pair(rng, np.where(huge, rng.normal(-3, 0.3, len(huge)), _normal(rng, np.full(len(huge), 0.02))), lengths)


def low_ess(rng: np.random.Generator, n_prompts: int) -> PairArrays:
    """Normal tokens of a BF16 mixture over long responses: Var D is 1, the ESS of sequences 0.37."""
    lengths = rng.integers(40, 80, n_prompts)
    return _pair(rng, _normal(rng, np.full(int(lengths.sum()), 60.0**-0.5)), lengths)


GENERATORS: dict[str, Generator] = {
    "laplace": laplace,
    "student": student,
    "gaussian": gaussian,
    "mixed": mixed,
    "correlated": correlated,
    "tiny": tiny,
    "outliers": outliers,
    "four_samples": four_samples,
    "unequal": unequal,
    "rare_huge": rare_huge,
    "low_ess": low_ess,
}
