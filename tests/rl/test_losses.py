"""Losses, corrections and advantages: closed forms, invariances, and gradients by finite differences.

Shape legend: `B` sequences, `T` response tokens, padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mismatch_probe.engines.corrections import correction_weights
from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.corrections import CORRECTIONS
from mismatch_probe.rl.algorithms import Algorithm, Surrogate, algorithms
from mismatch_probe.rl.algorithms.published import (
    centred,
    cispo,
    clip,
    leave_one_out,
    plain,
    sequence_clip,
    standardised,
)
from mismatch_probe.rl.losses import Scale, policy_loss

ALGORITHMS = algorithms()
NAMES = sorted(ALGORITHMS)
BUDGET = 9
every_algorithm = pytest.mark.parametrize("name", NAMES)
seeds = st.integers(0, 10_000)


@dataclass(frozen=True)
class Batch:
    """`[B, T]` log-probs and mask, `[B]` advantages."""

    current: Tensor
    old: Tensor
    rollout: Tensor
    advantages: Tensor
    mask: Tensor

    @property
    def scale(self) -> Scale:
        return Scale(len(self.mask), int(self.mask.sum()), BUDGET)

    def loss(self, spec: Algorithm, scale: Scale | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_loss(spec, self.current, self.old, self.rollout, self.advantages, self.mask, scale or self.scale)

    def rows(self, index: Any) -> Batch:
        return Batch(*(x[index] for x in (self.current, self.old, self.rollout, self.advantages, self.mask)))

    def gradient(self, spec: Algorithm) -> Tensor:
        leaf = self.current.clone().requires_grad_()
        loss, _ = replace(self, current=leaf).loss(spec)
        (found,) = torch.autograd.grad(loss, leaf)
        return found


def make_batch(seed: int, spread: float = 0.4, sequences: int = 6, longest: int = 5) -> Batch:
    draw = np.random.default_rng(seed)
    current = -draw.exponential(1.0, (sequences, longest))
    old, rollout = (current + draw.normal(0.0, spread, current.shape) for _ in range(2))
    mask = np.arange(longest) < draw.integers(1, longest + 1, sequences)[:, None]
    advantages = draw.normal(0.0, 1.0, sequences)
    return Batch(*(torch.from_numpy(x) for x in (current, old, rollout, advantages, mask)))


def one_token(log_ratio: float, advantage: float) -> Batch:
    """A single response token with log π − log π′ = `log_ratio`, and μ = π′."""
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    return Batch(old + log_ratio, old, old, torch.tensor([advantage]).double(), torch.ones(1, 1, dtype=torch.bool))


def with_log_weights(*rows: list[float]) -> Batch:
    """Sequences with log π′ − log μ = log π − log μ as given, and advantages of 1."""
    log_weights = torch.tensor(rows, dtype=torch.float64)
    same = torch.full_like(log_weights, -2.0)
    return Batch(same, same, same - log_weights, torch.ones(len(rows)).double(), torch.ones_like(same).bool())


@every_algorithm
@given(seed=seeds)
def test_equal_policies_need_no_correction(name: str, seed: int) -> None:
    spec = ALGORITHMS[name]
    batch = make_batch(seed, spread=0.0)
    weights, _ = correction_weights(spec.correction, batch.old, batch.rollout, batch.mask)
    assert weights.shape == ((len(batch.mask), 1) if spec.per_sequence else batch.mask.shape)
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=0)
    _, metrics = batch.loss(spec)
    assert metrics["n_clipped"] == metrics["n_masked"] == metrics["n_truncated"] == 0
    assert metrics["sum_weight"] == metrics["n_sequences" if spec.per_sequence else "n_tokens"]
    # Then every algorithm has the gradient of plain policy gradient with its aggregation.
    uncorrected = replace(spec, surrogate=plain, correction=None)
    torch.testing.assert_close(batch.gradient(spec), batch.gradient(uncorrected))


@every_algorithm
@given(seed=seeds, cut=st.integers(1, 5))
def test_micro_batches_add_up(name: str, seed: int, cut: int) -> None:
    spec, batch = ALGORITHMS[name], make_batch(seed)
    whole, metrics = batch.loss(spec)
    parts = [batch.rows(rows).loss(spec, batch.scale) for rows in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for key, value in metrics.items():
        assert value.dtype == torch.float64
        assert value.shape == ()
        assert not value.requires_grad
        torch.testing.assert_close(parts[0][1][key] + parts[1][1][key], value)


@every_algorithm
@given(seed=seeds, junk=st.sampled_from([-math.inf, math.inf, math.nan, 1e300, 0.0]))
def test_padding_is_irrelevant(name: str, seed: int, junk: float) -> None:
    spec, batch = ALGORITHMS[name], make_batch(seed)
    fill = [torch.where(batch.mask, x, junk) for x in (batch.current, batch.old, batch.rollout)]
    per_token = torch.where(batch.mask, batch.advantages.unsqueeze(1), junk)
    padded = Batch(fill[0], fill[1], fill[2], per_token, batch.mask)
    loss, metrics = padded.loss(spec)
    expected, expected_metrics = batch.loss(spec)
    assert loss == expected
    assert metrics == expected_metrics
    gradient = padded.gradient(spec)
    assert (gradient[~batch.mask] == 0).all()
    torch.testing.assert_close(gradient, batch.gradient(spec), rtol=0, atol=0)


@every_algorithm
@given(seed=seeds)
def test_order_of_sequences_is_irrelevant(name: str, seed: int) -> None:
    spec, batch = ALGORITHMS[name], make_batch(seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(batch.mask)))
    shuffled = batch.rows(order)
    torch.testing.assert_close(shuffled.loss(spec)[0], batch.loss(spec)[0])
    torch.testing.assert_close(shuffled.gradient(spec), batch.gradient(spec)[order])


@every_algorithm
@given(seed=seeds)
def test_a_sequence_without_tokens_counts_for_nothing(name: str, seed: int) -> None:
    spec, batch = ALGORITHMS[name], make_batch(seed)
    mask = batch.mask.clone()
    mask[2] = False
    kept = torch.arange(len(mask)) != 2
    scale = Scale(6, 20, BUDGET)
    loss, metrics = replace(batch, mask=mask).loss(spec, scale)
    expected, expected_metrics = batch.rows(kept).loss(spec, scale)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, expected_metrics)


@every_algorithm
def test_gradient_by_finite_differences(name: str) -> None:
    """Weights, and the ratio of CISPO, stay where they are while log π moves."""
    spec, batch = ALGORITHMS[name], make_batch(3)
    gradient, step = batch.gradient(spec), 1e-6
    for i, t in batch.mask.nonzero().tolist():
        moved = torch.zeros_like(batch.current)
        moved[i, t] = step
        up, down = (frozen_loss(spec, batch, sign * moved) for sign in (1, -1))
        assert float(gradient[i, t]) == pytest.approx(float(up - down) / (2 * step), rel=1e-6, abs=1e-9)


def frozen_loss(spec: Algorithm, batch: Batch, move: Tensor) -> Tensor:
    """The loss written out once more, where only log π outside stop-gradients has moved by `move`."""
    mask, advantage = batch.mask, batch.advantages.unsqueeze(1)
    moved = batch.current + move
    sampled = batch.current if spec.weights_of == "current" else batch.old
    d = torch.where(mask, sampled - batch.rollout, 0.0)
    w = d.sum(1, keepdim=True).exp() if spec.per_sequence else d.exp()
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    weight = torch.ones_like(w)
    if spec.correction is not None:
        floor, cap = spec.correction.low, spec.correction.high
        weight = w * ((w >= floor) & (w <= cap)) if spec.correction.masks else w.clamp(max=cap)
    log_ratio = torch.where(mask, moved - batch.old, 0.0)
    r = log_ratio.exp()
    if spec.surrogate is sequence_clip:
        r = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()
    if spec.surrogate in (clip, sequence_clip):
        tokens = torch.maximum(-advantage * r, -advantage * r.clamp(low, high)).expand_as(mask)
    else:
        fixed = (batch.current - batch.old).exp().clamp(low, high) if spec.surrogate is cispo else 1.0
        tokens = -fixed * advantage * moved
    tokens = torch.where(mask, weight * tokens, 0.0)
    if spec.aggregation == "sequence-mean":
        return (tokens.sum(1) / mask.sum(1)).mean()
    return tokens.sum() / (mask.sum() if spec.aggregation == "token-mean" else len(mask) * BUDGET)


@every_algorithm
def test_value_of_the_loss(name: str) -> None:
    batch = make_batch(4, spread=0.8)
    torch.testing.assert_close(
        batch.loss(ALGORITHMS[name])[0], frozen_loss(ALGORITHMS[name], batch, torch.zeros_like(batch.current))
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope", "clipped"),
    [
        (1.5, 2.0, -2.4, 0.0, 1),  # held at 1.2
        (1.5, -2.0, 3.0, 3.0, 0),  # the worse of the two counts
        (0.5, 2.0, -1.0, -1.0, 0),
        (0.5, -2.0, 1.6, 0.0, 1),  # held at 0.8
        (1.1, 2.0, -2.2, -2.2, 0),
        (0.9, -2.0, 1.8, 1.8, 0),
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
@pytest.mark.parametrize("kind", [clip, sequence_clip])
def test_clip_by_hand(
    kind: Surrogate, ratio: float, advantage: float, value: float, slope: float, clipped: int
) -> None:
    """With one token GSPO's ratio is PPO's."""
    spec = Algorithm(kind, centred, aggregation="token-mean")
    batch = one_token(math.log(ratio), advantage)
    loss, metrics = batch.loss(spec)
    assert float(loss) == pytest.approx(value)
    assert float(batch.gradient(spec)) == pytest.approx(slope)
    assert metrics["n_clipped"] == clipped


def test_cispo_keeps_the_gradient_of_what_it_caps() -> None:
    batch = one_token(math.log(8.0), 2.0)
    _, metrics = batch.loss(ALGORITHMS["cispo"])
    assert metrics["n_clipped"] == 1
    assert float(batch.gradient(ALGORITHMS["cispo"])) == pytest.approx(-5.0 * 2.0)


@pytest.mark.parametrize("log_ratio", [-800.0, 800.0])
@pytest.mark.parametrize("name", [name for name in NAMES if ALGORITHMS[name].surrogate is not plain])
def test_a_clipped_ratio_does_not_overflow(name: str, log_ratio: float) -> None:
    batch = one_token(log_ratio, math.copysign(1.0, log_ratio))
    assert batch.loss(ALGORITHMS[name])[0].isfinite()
    assert batch.gradient(ALGORITHMS[name]).isfinite().all()


@pytest.mark.parametrize("name", ["pg-seq-mis", "grpo-seq-mis", "dr-grpo-seq-mis"])
def test_mis_drops_above_the_cap_alone(name: str) -> None:
    spec = ALGORITHMS[name]
    assert spec.correction is not None
    cap = spec.correction.high
    edge = math.log(cap)
    zeros = torch.zeros(3, 2).double()
    # Subtracted from 0, so that the first weight is the cap to the bit.
    rollout = -torch.tensor([[edge, 0.0], [math.nextafter(edge, 9.0), 0.0], [-50.0, 0.0]], dtype=torch.float64)
    batch = Batch(zeros, zeros, rollout, torch.ones(3).double(), torch.ones(3, 2, dtype=torch.bool))
    weights, _ = correction_weights(spec.correction, zeros, rollout, batch.mask)
    assert weights.flatten().tolist() == pytest.approx([cap, 0.0, math.exp(-50.0)])
    _, metrics = batch.loss(spec)
    assert metrics["n_masked"] == 2  # tokens of one sequence
    assert metrics["n_truncated"] == 0
    assert float(metrics["sum_weight"]) == pytest.approx(cap)


def test_tis_caps() -> None:
    batch = with_log_weights([math.log(4.0), math.log(0.5)], [math.log(8.0), 0.0])
    weights, _ = correction_weights(CORRECTIONS["token-tis"], batch.current, batch.rollout, batch.mask)
    assert weights.flatten().tolist() == pytest.approx([2.0, 0.5, 2.0, 1.0])
    _, metrics = batch.loss(ALGORITHMS["pg-token-tis"])
    assert metrics["n_truncated"] == 2
    assert float(metrics["sum_weight"]) == pytest.approx(5.5)
    assert float(metrics["sum_squared_weight"]) == pytest.approx(9.25)
    weights, _ = correction_weights(CORRECTIONS["seq-tis"], batch.current, batch.rollout, batch.mask)
    assert weights.flatten().tolist() == pytest.approx([2.0, 3.0])
    _, metrics = batch.loss(ALGORITHMS["pg-seq-tis"])
    assert metrics["n_truncated"] == 2
    assert float(metrics["sum_weight"]) == pytest.approx(5.0)


def test_icepop_drops_outside_its_bounds() -> None:
    batch = with_log_weights([math.log(w) for w in (0.49, 0.51, 1.0, 4.9, 5.1)])
    weights, _ = correction_weights(CORRECTIONS["token-mis"], batch.old, batch.rollout, batch.mask)
    assert weights.flatten().tolist() == pytest.approx([0.0, 0.51, 1.0, 4.9, 0.0])
    assert batch.loss(ALGORITHMS["icepop"])[1]["n_masked"] == 2


@pytest.mark.parametrize("name", ["pg-token-tis", "pg-seq-tis", "pg-seq-mis", "icepop"])
def test_a_capped_weight_does_not_overflow(name: str) -> None:
    batch = with_log_weights([2000.0, 0.0], [-2000.0, 0.0])
    loss, metrics = batch.loss(ALGORITHMS[name])
    assert loss.isfinite()
    assert metrics["sum_weight"].isfinite()
    assert batch.gradient(ALGORITHMS[name]).isfinite().all()


def test_which_policy_is_corrected() -> None:
    """Without a ratio π against μ, else π′ against μ: the ratio covers the rest."""
    batch = make_batch(5)
    for name, sampled in {"pg-seq-is": batch.current, "grpo-seq-tis": batch.old}.items():
        weights, _ = correction_weights(ALGORITHMS[name].correction, sampled, batch.rollout, batch.mask)
        assert float(batch.loss(ALGORITHMS[name])[1]["sum_weight"]) == pytest.approx(float(weights.sum()))


@every_algorithm
def test_only_the_trained_policy_gets_a_gradient(name: str) -> None:
    spec, batch = ALGORITHMS[name], make_batch(7)
    leaves = [x.clone().requires_grad_() for x in (batch.current, batch.old, batch.rollout)]
    policy_loss(spec, leaves[0], leaves[1], leaves[2], batch.advantages, batch.mask, batch.scale)[0].backward()
    assert [leaf.grad is None for leaf in leaves] == [False, True, True]
    assert not correction_weights(spec.correction, leaves[0], leaves[2], batch.mask)[0].requires_grad


def test_an_overflow_is_seen_and_stays_in_its_sequence() -> None:
    """e^800 is infinite, and infinity times the padding's 0 would be NaN."""
    batch = with_log_weights([800.0, 0.0], [0.0, 0.0])
    mask = torch.tensor([[True, False], [True, True]])
    loss, _ = replace(batch, mask=mask).loss(ALGORITHMS["pg-seq-is"])
    assert float(loss) == math.inf
    gradient = replace(batch, mask=mask).gradient(ALGORITHMS["pg-seq-is"])
    assert gradient[0].tolist() == [-math.inf, 0.0]
    assert gradient[1].isfinite().all()


def test_a_missing_logprob_is_not_hidden() -> None:
    batch = make_batch(6)
    rollout = batch.rollout.clone()
    rollout[0, 0] = math.nan
    assert replace(batch, rollout=rollout).loss(ALGORITHMS["pg-seq-mis"])[0].isnan()


def test_float32_logprobs_are_summed_in_float64() -> None:
    rollout = torch.full((1, 20_000), -0.1)
    current = rollout + 1e-4
    weight, _ = correction_weights(CORRECTIONS["seq-is"], current, rollout, torch.ones_like(rollout).bool())
    assert float(weight.log()) == pytest.approx(float((current.double() - rollout.double()).sum()), rel=1e-12)
    leaf = current.clone().requires_grad_()
    policy_loss(
        ALGORITHMS["pg"], leaf, current, rollout, torch.ones(1), torch.ones_like(rollout).bool(), Scale(1, 20_000, 1)
    )[0].backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float32


def test_impossible_bounds_are_refused() -> None:
    for options in ({"clip_low": 1.5}, {"clip_high": -0.1}):
        with pytest.raises(ValueError, match="clip range"):
            Algorithm(clip, centred, **options)
    for bounds in ({"high": 0.0}, {"low": 2.0}, {"low": 0.5}):
        with pytest.raises(ValueError, match="bounds"):
            replace(CORRECTIONS["token-tis"], **bounds)


def test_sequences_are_kept_by_their_geometric_mean() -> None:
    batch = with_log_weights([0.01, -0.0095], [0.01, 0.01], [0.01, 0.0])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    weights, outside = correction_weights(CORRECTIONS["geometric"], batch.old, batch.rollout, mask)
    assert weights.flatten().tolist() == [1.0, 0.0, 0.0]
    assert outside.flatten().tolist() == [False, True, True]


def test_constants_of_the_paper() -> None:
    of_sequences = replace(CORRECTIONS["seq-mis"], high=10.0)
    assert ALGORITHMS["pg-seq-mis"] == Algorithm(plain, centred, CORRECTIONS["seq-mis"], "current")
    assert CORRECTIONS["seq-mis"].high == CORRECTIONS["seq-tis"].high == 3
    assert CORRECTIONS["token-tis"].high == 2
    assert ALGORITHMS["grpo-token-tis"] == Algorithm(
        clip, standardised, CORRECTIONS["token-tis"], aggregation="sequence-mean"
    )
    assert ALGORITHMS["dr-grpo-seq-mis"] == Algorithm(clip, centred, of_sequences)
    assert (CORRECTIONS["token-mis"].low, CORRECTIONS["token-mis"].high) == (0.5, 5.0)
    assert ALGORITHMS["icepop"].correction == CORRECTIONS["token-mis"]
    assert len(ALGORITHMS) == 17


def test_advantages_by_hand() -> None:
    rewards, group = np.array([1.0, 5.0, 0.0, 5.0, 1.0, 5.0]), np.array([7, 3, 7, 3, 7, 3])
    np.testing.assert_allclose(centred(rewards, group)[[0, 2, 4]], [1 / 3, -2 / 3, 1 / 3])
    std = np.std([1.0, 0.0, 1.0], ddof=1)
    np.testing.assert_allclose(standardised(rewards, group)[[0, 2, 4]], np.array([1, -2, 1]) / 3 / std, rtol=1e-5)
    np.testing.assert_allclose(leave_one_out(rewards, group)[[0, 2, 4]], [0.5, -1.0, 0.5])
    assert (standardised(rewards, group)[[1, 3, 5]] == 0).all()


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-10, 10)), min_size=1, max_size=20))
def test_advantages_of_a_group_cancel(responses: list[tuple[int, float]]) -> None:
    group, rewards = (np.array(column) for column in zip(*responses, strict=True))
    for kind in (centred, standardised):
        found = kind(rewards, group)
        np.testing.assert_allclose(np.bincount(group, weights=found), 0.0, atol=1e-6)
        np.testing.assert_allclose(found, kind(rewards + 3.0, group), atol=1e-6)


def test_equal_rewards_have_no_advantage_to_the_bit() -> None:
    assert (standardised(np.full(7, 0.1), np.zeros(7, dtype=int)) == 0).all()


def test_leave_one_out_needs_others() -> None:
    with pytest.raises(UsageError, match="single response"):
        leave_one_out(np.array([1.0, 0.0, 1.0]), np.array([0, 0, 1]))
