"""Working scales of the metrics, and the elementwise functions that keep their digits.

A working scale maps pooled means `[..., K]` to `[...]`, real or complex (see `intervals.Estimate`); its partner maps
the scale to the metric.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.inference import Floats, Working

# Exponentials of numbers up to this are summed as they stand; beyond it they carry a common factor exp(-shift).
_UNSHIFTED = 20.0
# Where no exponent reaches this, w = exp(x) is kept itself, times a common factor: w − 1 would round w away.
_DEEP = -1.0


def plain(means: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(means[..., 0])


def log_mean(means: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.log(means[..., 0]))


def log_root_mean(means: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(0.5 * np.log(means[..., 0]))


def log_shifted_mean(shift: float) -> Working:
    """log of the mean of values that were stored times exp(-shift)."""
    return lambda means: shift + np.log(means[..., 0])


def log_mean_exp(shift: float) -> Working:
    """log mean exp(x) from the mean of `shifted_expm1(x, shift)`; keeps the digits of a mean near 1."""
    if shift == 0.0:
        return lambda means: np.log1p(means[..., 0])
    return lambda means: shift + np.log(math.exp(-shift) + means[..., 0])


def log_ratio_of_means(means: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.log(means[..., 0]) - np.log(means[..., 1]))


def log_temperature(side: float) -> Working:
    """log of the temperature T of π ∝ μ^(1/T) from the means of (x·d, x²), x = log-prob + entropy of what was sampled.

    Args:
        side: 1 where the rollout's distribution was sampled from, T = 1/(1 + δ); −1 for the trainer's, T = 1 − g.
    """
    return lambda means: -side * (np.log(means[..., 1] + side * means[..., 0]) - np.log(means[..., 1]))


def log_variance(means: NDArray[Any]) -> NDArray[Any]:
    """log of the population variance of y from the means of (y, y²)."""
    return np.asarray(np.log(_non_negative(means[..., 1] - means[..., 0] ** 2)))


def log_squared_variation(centre: float) -> Working:
    """log of (standard deviation / mean)² of w from the means of (y, y²), w = centre + y."""
    return lambda means: log_variance(means) - 2 * np.log(centre + means[..., 0])


def log_one_minus_correlation(means: NDArray[Any]) -> NDArray[Any]:
    """log(1 − r) of x and y from the means of (x, y, x², xy, y²) and of (δ, s, δ², δs), δ = x − y, s = x + y.

    1 − r = (Var δ − (σ_x − σ_y)²) / (2 σ_x σ_y) keeps its digits where r is within 1e-16 of 1; where x and y are far
    apart, its numerator is a small difference of large numbers, and 1 − Cov(x, y) / (σ_x σ_y) is as good.
    """
    x, y, delta, total = means[..., 0], means[..., 1], means[..., 5], means[..., 6]
    sd_x, sd_y = np.sqrt(_non_negative(means[..., 2] - x**2)), np.sqrt(_non_negative(means[..., 4] - y**2))
    var_delta, cov = means[..., 7] - delta**2, means[..., 8] - delta * total
    product = sd_x * sd_y
    near = _non_negative(var_delta - (cov / (sd_x + sd_y)) ** 2) / (2 * product)
    far = _non_negative(1 - (means[..., 3] - x * y) / product)
    return np.asarray(np.log(np.where(var_delta.real < product.real, near, far)))


def slope(means: NDArray[Any]) -> NDArray[Any]:
    """Least-squares slope of y on x from the means of (x, y, x², xy)."""
    x, y = means[..., 0], means[..., 1]
    return np.asarray((means[..., 3] - x * y) / (means[..., 2] - x**2))


def intercept(x_centre: float, y_centre: float) -> Working:
    """Intercept of the same line for x and y that were stored centred."""
    return lambda means: y_centre + means[..., 1] - slope(means) * (x_centre + means[..., 0])


def _non_negative(values: NDArray[Any]) -> NDArray[Any]:
    """Zero where rounding made a difference of squares negative; unlike np.maximum it takes complex input."""
    return np.where(values.real > 0, values, 0)


def as_is(x: float) -> float:
    return x


def exp(x: float) -> float:
    return float(np.exp(x))


def expm1(x: float) -> float:
    return float(np.expm1(x))


def one_plus(x: float) -> float:
    return 1.0 + x


def one_plus_exp(x: float) -> float:
    return 1.0 + float(np.exp(x))


def one_minus_exp(x: float) -> float:
    return 1.0 - float(np.exp(x))


def ess_of_log_squared_variation(x: float) -> float:
    """(Σw)² / (n Σw²) = 1 / (1 + (σ_w / mean w)²)."""
    return 1.0 / (1.0 + float(np.exp(x)))


def exp_minus_exp(x: float) -> float:
    return float(np.exp(-np.exp(x)))


def shift_of(x: Floats) -> float:
    """The common factor's exponent for sums of exp(x): 0 unless exp(x) and its powers could overflow."""
    largest = float(x.max())
    return largest if largest > _UNSHIFTED else 0.0


def deep(x: Floats) -> bool:
    """Whether exp(x) − 1 would lose digits of exp(x), x `[n ≥ 1]`, everywhere."""
    return bool(x.max() < _DEEP)


def shifted_expm1(x: Floats, shift: float) -> Floats:
    """(exp(x) − 1)·exp(−shift)."""
    return np.asarray(np.expm1(x) if shift == 0.0 else np.exp(x - shift) - math.exp(-shift))


def k3(d: Floats) -> Floats:
    """expm1(d) − d, never negative; by its series where the difference of two close numbers would lose digits."""
    k3 = np.expm1(d, out=np.empty_like(d))
    k3 -= d
    small = np.abs(d) < 1e-3
    x = d[small]
    k3[small] = 0.5 * x**2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5)))
    return k3


def shifted_k3(d: Floats, shift: float) -> Floats:
    """(expm1(d) − d)·exp(−shift)."""
    if shift == 0.0:
        return k3(d)
    small = k3(np.minimum(d, _UNSHIFTED)) * math.exp(-shift)
    return np.where(d <= _UNSHIFTED, small, np.exp(d - shift) - math.exp(-shift) * (1 + d))


def js_k3(size: Floats) -> Floats:
    """½k3(a − m) + ½k3(b − m), m = log(½e^a + ½e^b), from `size` = |a − b|: the two arguments are x and x − size."""
    larger = -np.log1p(0.5 * np.expm1(-size))
    return np.asarray(0.5 * k3(larger) + 0.5 * k3(larger - size))


def centred(x: Floats) -> Floats:
    """x − mean(x), exactly zero where x only varies by rounding."""
    if np.ptp(x) <= 4 * np.finfo(np.float64).eps * float(np.abs(x).max()):
        return np.zeros_like(x)
    return np.asarray(x - x.mean())
