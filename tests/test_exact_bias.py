"""Expected gradients against closed forms, finite differences and sampling, and what the documentation says of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mismatch_probe.rl.algorithms import algorithms
from mismatch_probe.rl.algorithms.published import clip, standardised
from mismatch_probe.rl.losses import Scale, policy_loss
from tools import exact_bias
from tools.exact_bias import (
    BASELINES,
    GROUP_SIZE,
    SETTINGS,
    Baseline,
    Row,
    Setting,
    closeness,
    expected_gradient,
    logprobs,
    objective,
    objective_gradient,
    policies,
    rewards,
)

LEFT = 1 - 1 / GROUP_SIZE
ALGORITHMS = algorithms()
WITH_LENGTHS = [name for name, spec in ALGORITHMS.items() if spec.aggregation != "budget"]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return exact_bias.bias_table()


@pytest.fixture(scope="module")
def table(rows: list[Row]) -> dict[tuple[str, Setting, Baseline], Row]:
    return {(row.algorithm, row.setting, row.baseline): row for row in rows}


def test_the_page_is_what_the_code_says(rows: list[Row]) -> None:
    assert exact_bias.PAGE.read_text(encoding="utf-8") == exact_bias.markdown(rows), "`make docs` writes it"


def test_responses_are_all_there_are() -> None:
    for setting in SETTINGS:
        policy = policies(setting)
        for logits in (policy.trained, policy.before, policy.sampling):
            total = logprobs(logits).sum(dim=-1).exp().sum(dim=-1)
            torch.testing.assert_close(total, torch.ones_like(total))


def score_function_gradient(logits: Tensor) -> Tensor:
    """Σ π R ∇log π / P, one response at a time."""
    leaf = logits.clone().requires_grad_()
    log_chance = logprobs(leaf).sum(dim=-1)
    weight = (log_chance.exp() * rewards()).detach() / len(logits)
    (found,) = torch.autograd.grad((weight * log_chance).sum(), leaf)
    return found


def test_gradient_of_the_objective() -> None:
    logits = policies("on-policy").trained
    found, step = objective_gradient(logits), 1e-6
    torch.testing.assert_close(found, score_function_gradient(logits))
    for index in np.random.default_rng(0).permutation(logits.numel())[:25]:
        moved = torch.zeros_like(logits).flatten()
        moved[index] = step
        difference = objective(logits + moved.view_as(logits)) - objective(logits - moved.view_as(logits))
        assert float(found.flatten()[index]) == pytest.approx(float(difference) / (2 * step), abs=1e-9)


def test_weights_without_a_cap_are_unbiased(table: dict[tuple[str, Setting, Baseline], Row]) -> None:
    target = objective_gradient(policies("on-policy").trained)
    for setting in SETTINGS:
        found = expected_gradient(ALGORITHMS["pg-seq-is"], policies(setting), "oracle")
        torch.testing.assert_close(found, target)
        # The baseline of a group contains the response itself, whose part of it is not independent.
        found = expected_gradient(ALGORITHMS["pg-seq-is"], policies(setting), "group")
        torch.testing.assert_close(found, LEFT * target)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in WITH_LENGTHS])
def test_sums_over_a_budget_are_unbiased_on_policy(name: str) -> None:
    target = objective_gradient(policies("on-policy").trained)
    for baseline, share in (("oracle", 1.0), ("group", LEFT)):
        found = expected_gradient(ALGORITHMS[name], policies("on-policy"), baseline)
        torch.testing.assert_close(found, share * target)


@pytest.mark.parametrize("name", WITH_LENGTHS)
def test_averages_over_tokens_are_biased_on_policy(name: str, table: dict[tuple[str, Setting, Baseline], Row]) -> None:
    for baseline in BASELINES:
        assert table[name, "on-policy", baseline].to_objective.cosine < 0.999


def test_standard_deviation_reweights_prompts() -> None:
    """With rewards of 0 and 1 it turns no prompt's gradient, only changes how much each counts."""
    spec = replace(ALGORITHMS["dr-grpo"], advantages=standardised)
    found = expected_gradient(spec, policies("on-policy"), "group")
    target = objective_gradient(policies("on-policy").trained)
    of_prompts = [closeness(g, v) for g, v in zip(found, target, strict=True)]
    assert [x.cosine for x in of_prompts] == pytest.approx([1.0] * len(target))
    norms = [x.norm for x in of_prompts]
    assert max(norms) > 1.05 * min(norms)
    assert closeness(found, target).cosine < 1 - 1e-5


def test_mismatch_biases_what_does_not_correct_for_it(table: dict[tuple[str, Setting, Baseline], Row]) -> None:
    def distance(name: str) -> float:
        return table[name, "mismatch", "oracle"].to_objective.distance

    assert distance("pg") > distance("pg-token-tis") > distance("pg-seq-mis") > distance("pg-seq-tis") > 0.01
    assert distance("dr-grpo") == pytest.approx(distance("pg"))
    assert table["gspo", "mismatch", "group"].to_own.distance > 0.1


def test_sequence_weights_undo_the_mismatch_but_not_the_staleness(
    table: dict[tuple[str, Setting, Baseline], Row],
) -> None:
    spec = ALGORITHMS["dr-grpo-seq-tis"]
    assert spec.correction is not None
    spec = replace(spec, correction=replace(spec.correction, high=1e6))
    target = objective_gradient(policies("on-policy").trained)
    torch.testing.assert_close(expected_gradient(spec, policies("mismatch"), "oracle"), target)
    assert table["dr-grpo-seq-tis", "stale", "oracle"].to_objective.distance > 0.1


def test_every_limit_holds_something(table: dict[tuple[str, Setting, Baseline], Row]) -> None:
    """Else the table would compare algorithms that do the same."""
    for name, spec in ALGORITHMS.items():
        if spec.correction is None or not spec.correction.bounded:
            continue
        freed = replace(spec, correction=replace(spec.correction, low=0.0, high=1e9))
        bound, free = (expected_gradient(x, policies("stale"), "oracle") for x in (spec, freed))
        assert closeness(bound, free).distance > 1e-4, name


def test_how_far_the_clips_of_gspo_and_cispo_reach() -> None:
    """As the document says."""
    policy = policies("stale")
    trained, before = (logprobs(x) for x in (policy.trained, policy.before))
    mask = before < 0
    ratio = ((trained - before).sum(dim=-1) / mask.sum(dim=-1)).exp() - 1
    spec = ALGORITHMS["gspo"]
    assert ((ratio < -spec.clip_low) | (ratio > spec.clip_high)).double().mean() > 0.95
    assert (trained - before).max().exp() < 1 + ALGORITHMS["cispo"].clip_high


@pytest.mark.parametrize("name", ["grpo-token-tis", "cispo"])
def test_sampling_agrees(name: str) -> None:
    """Groups drawn at random, through the loss as a training loop calls it: no probability enters an advantage."""
    spec, policy, n = ALGORITHMS[name], policies("stale"), 60_000
    draw = np.random.default_rng(1)
    chance = logprobs(policy.sampling).sum(dim=-1).exp().numpy()
    prompt = draw.integers(0, len(chance), n)
    below = draw.random((n, GROUP_SIZE, 1)) > chance.cumsum(axis=1)[prompt][:, None, :]
    drawn = torch.from_numpy(np.minimum(below.sum(axis=2), chance.shape[1] - 1))
    prompts = torch.from_numpy(prompt).unsqueeze(1).expand_as(drawn)
    reward = rewards()[prompts, drawn].flatten().numpy()
    advantages = torch.from_numpy(spec.advantages(reward, np.repeat(np.arange(n), GROUP_SIZE)))
    leaf = policy.trained.clone().requires_grad_()
    rows = [logprobs(x)[prompts, drawn].flatten(0, 1) for x in (leaf, policy.before, policy.sampling)]
    mask = rows[2] < 0
    if spec.aggregation == "token-mean":  # each group is a minibatch
        advantages = advantages / mask.sum(dim=1).view(n, -1).sum(dim=1).repeat_interleave(GROUP_SIZE)
    scale = Scale(sequences=n * GROUP_SIZE, tokens=n, budget=1)
    loss, metrics = policy_loss(spec, rows[0], rows[1], rows[2], advantages, mask, scale)
    assert (metrics["n_clipped"] > 0) == (spec.surrogate is clip)
    (found,) = torch.autograd.grad(-loss, leaf)
    assert closeness(found, expected_gradient(spec, policy, "group")).distance < 0.03
