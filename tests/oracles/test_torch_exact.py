"""Exact divergences against torch.distributions in float64, and below the rounding of that, against long double.

Shape legend: `R` positions, `V` vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from mismatch_probe.metrics.exact import divergences

V = 50_257
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def logits(precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`[R, V]` float64 logits of the trainer, and the same as a rollout engine of this precision rounds them.

    Rows go from almost certain to almost flat; in the last two the two likeliest tokens are so close that BF16 makes
    them equal, where the first of them wins.
    """
    rows = torch.randn(6, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows *= torch.tensor([6.0, 4.0, 2.0, 0.5, 2.0, 2.0]).unsqueeze(1)
    rows[4, 100], rows[4, 200] = 20.0, 20.01
    rows[5, 100], rows[5, 200] = 20.01, 20.0
    return rows.to(PRECISIONS[precision]).double(), rows


def by_torch(rollout: torch.Tensor, trainer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same `[R]` values by torch's own distributions and textbook sums."""
    mu, pi = Categorical(logits=rollout), Categorical(logits=trainer)
    middle = Categorical(probs=0.5 * (mu.probs + pi.probs))
    d = pi.logits - mu.logits
    return {
        "kl": kl_divergence(mu, pi),
        "kl_reverse": kl_divergence(pi, mu),
        "js": 0.5 * (kl_divergence(mu, middle) + kl_divergence(pi, middle)),
        "tv": 0.5 * (mu.probs - pi.probs).abs().sum(dim=1),
        "flip": (mu.logits.argmax(dim=1) != pi.logits.argmax(dim=1)).double(),
        "entropy_rollout": mu.entropy(),
        "entropy_trainer": pi.entropy(),
        "chi2": torch.logsumexp(2 * pi.logits - mu.logits, dim=1).expm1(),
        "k1_square": (mu.probs * d.square()).sum(dim=1),
        "k2_square": (mu.probs * (0.5 * d.square()).square()).sum(dim=1),
        "k3_square": (mu.probs * (d.expm1() - d).square()).sum(dim=1),
    }


def ours(rollout: torch.Tensor, trainer: torch.Tensor, temperature: float = 1.0) -> dict[str, np.ndarray]:
    found = divergences(rollout.numpy(), trainer.numpy(), temperature)
    assert all(value.dtype == np.float64 for value in found.values())
    return found


DIFFERENCES = ("kl", "kl_reverse", "js", "chi2")


def compare(found: dict[str, np.ndarray], theirs: dict[str, torch.Tensor], rel: float, noise: float) -> None:
    """`noise` is what torch's differences of logarithms leave of float64, in nats."""
    assert set(found) == set(theirs)
    for key, value in theirs.items():
        assert found[key] == pytest.approx(value.numpy(), rel=rel, abs=noise if key in DIFFERENCES else 0.0), key


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_against_torch(precision: str) -> None:
    rollout, trainer = logits(precision)
    compare(ours(rollout, trainer), by_torch(rollout, trainer), rel=1e-6, noise=1e-14)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_temperature(temperature: float) -> None:
    rollout, trainer = logits("bfloat16")
    theirs = by_torch(rollout / temperature, trainer / temperature)
    compare(ours(rollout, trainer, temperature), theirs, rel=1e-6, noise=1e-14)


def test_fp32_gap_is_below_torchs_rounding() -> None:
    """KL is about 1e-15 there: torch agrees only within the rounding of its sum, which is as large."""
    rollout, trainer = logits("float32")
    found, theirs = ours(rollout, trainer), by_torch(rollout, trainer)
    compare(found, theirs, rel=1e-6, noise=1e-12)
    for key in DIFFERENCES:
        assert (found[key] > 0).all()
        assert (abs(theirs[key].numpy() / found[key] - 1) > 0.01).any(), f"torch's {key} is as good as ours"


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is no longer than double here")
def test_fp32_gap_against_long_double() -> None:
    rollout, trainer = logits("float32")

    def log_softmax(rows: torch.Tensor) -> np.ndarray:
        x = rows.numpy().astype(np.longdouble)
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    log_mu, log_pi = log_softmax(rollout), log_softmax(trainer)
    mu, pi = np.exp(log_mu), np.exp(log_pi)
    log_middle = np.log(0.5 * (mu + pi))
    found = ours(rollout, trainer)
    textbook = {
        "kl": (mu * (log_mu - log_pi)).sum(axis=1),
        "kl_reverse": (pi * (log_pi - log_mu)).sum(axis=1),
        "js": 0.5 * (mu * (log_mu - log_middle) + pi * (log_pi - log_middle)).sum(axis=1),
        "chi2": (pi * pi / mu).sum(axis=1) - 1,
    }
    for key, value in textbook.items():
        assert found[key] == pytest.approx(value.astype(np.float64), rel=1e-2), key


def test_sizes_of_the_precisions() -> None:
    """The comparisons are of three sizes: with 3 and 13 bits more, a flat row's KL is 2⁶ and 2²⁶ times less."""
    flat = 3
    kl = {precision: ours(*logits(precision))["kl"][flat] for precision in PRECISIONS}
    assert math.log2(kl["bfloat16"] / kl["float16"]) == pytest.approx(6, abs=0.1)
    assert math.log2(kl["float16"] / kl["float32"]) == pytest.approx(26, abs=0.1)


def test_flips() -> None:
    """Only BF16 confuses 20 with 20.01, and it takes the first of them."""
    assert ours(*logits("bfloat16"))["flip"].tolist() == [0, 0, 0, 0, 1, 0]
    assert ours(*logits("float16"))["flip"].tolist() == [0, 0, 0, 0, 0, 0]


def test_float32_rows() -> None:
    """Rows as an engine gives them, float32, are computed in float64: nothing but their own rounding is lost."""
    rollout, trainer = (rows.float() for rows in logits("bfloat16"))
    compare(ours(rollout, trainer), by_torch(rollout.double(), trainer.double()), rel=1e-6, noise=1e-14)


def test_masked_slice() -> None:
    """A slice that the rollout cannot sample: KL(μ‖π) is −log of what the trainer gives to the rest."""
    trainer = logits("float32")[1]
    rollout = trainer.clone()
    rollout[:, :1000] = -math.inf
    found, theirs = ours(rollout, trainer), by_torch(rollout, trainer)
    for key in ("kl", "kl_reverse", "js", "tv", "entropy_rollout", "entropy_trainer"):
        assert found[key] == pytest.approx(theirs[key].numpy(), rel=1e-9), key
    kept = Categorical(logits=trainer).probs[:, 1000:].sum(dim=1)
    assert found["kl"] == pytest.approx(-kept.log().numpy(), rel=1e-9)
    assert np.isinf(found["kl_reverse"]).all()
