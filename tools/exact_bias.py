"""What each algorithm's gradient estimates, in expectation and without sampling, where everything can be enumerated.

`make docs` writes the page `docs/algorithms.md`. The policies are tables: a softmax of its own after each prefix. A
loss is a sum over responses of terms proportional to the size of their advantage, so an advantage times the probability
of its group makes the very code that trains compute an expectation.

Shape legend: `P` prompts, `K` prefixes, `V` tokens of the vocabulary, `Y` responses, `T` their longest length, `G`
responses of a group, `M` different groups of a prompt, `R` = P × M × G rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mismatch_probe.metrics.corrections import CORRECTIONS
from mismatch_probe.rl.algorithms import Algorithm, algorithms
from mismatch_probe.rl.losses import Scale, policy_loss

PAGE = Path(__file__).parents[1] / "docs" / "algorithms.md"
Setting = Literal["on-policy", "mismatch", "stale"]
Baseline = Literal["oracle", "group"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
P, V, T = 8, 3, 3
END = 0
# In a smaller group of mixed 0 and 1 rewards the standard deviation can only be one number, so it would bias nothing.
GROUP_SIZE = 4
# Standard deviations of the logits: of π, and of how far μ and π′ lie from it; so far that caps and clips hold some.
_SPREAD, _MISMATCH, _STALENESS = 0.5, 0.6, 0.25
_SEED = 0


def responses() -> list[tuple[int, ...]]:
    """All `Y` responses: up to the end token, or cut at the longest length."""
    found = itertools.chain.from_iterable(itertools.product(range(V), repeat=length) for length in range(1, T + 1))
    return [y for y in found if END not in y[:-1] and (y[-1] == END or len(y) == T)]


def rewards() -> Tensor:
    """`[P, Y]`, 0 or 1 by one of four rules in turn, of unequal difficulty; 0 for a response that is cut."""
    rules: list[Callable[[tuple[int, ...]], bool]] = [
        lambda y: y.count(1) == 1,
        lambda y: y == (1, 1, END),
        lambda y: y[-2:] == (2, END),
        lambda y: len(y) == 2,
    ]
    return torch.tensor(
        [[float(y[-1] == END and rules[p % len(rules)](y)) for y in responses()] for p in range(P)],
        dtype=torch.float64,
    )


@cache
def _indices() -> tuple[Tensor, Tensor, Tensor]:
    """Of each response's tokens, `[Y, T]`: the prefix before it, itself, and whether there is one."""
    prefixes = {y: k for k, y in enumerate(y for n in range(T) for y in itertools.product(range(1, V), repeat=n))}
    prefix, token = (torch.zeros(len(responses()), T, dtype=torch.long) for _ in range(2))
    mask = torch.zeros(len(responses()), T, dtype=torch.bool)
    for i, y in enumerate(responses()):
        for t, now in enumerate(y):
            prefix[i, t], token[i, t], mask[i, t] = prefixes[y[:t]], now, True
    return prefix, token, mask


def logprobs(logits: Tensor) -> Tensor:
    """`[P, Y, T]` log-probs, nats, of every token of every response, 0 in the padding, from `[P, K, V]` logits."""
    prefix, token, mask = _indices()
    return torch.where(mask, logits.log_softmax(dim=-1)[:, prefix, token], 0.0)


def objective(logits: Tensor) -> Tensor:
    """J: the expected reward, mean over prompts."""
    return (logprobs(logits).sum(dim=-1).exp() * rewards()).sum() / P


@dataclass(frozen=True)
class Policies:
    """`[P, K, V]` logits of the policy that is trained, of that before the updates, and of the one that samples."""

    trained: Tensor
    before: Tensor
    sampling: Tensor


def policies(setting: Setting) -> Policies:
    """All three the same; μ apart from π = π′; or all three apart. π and μ are the same in each setting."""
    prefixes = sum((V - 1) ** n for n in range(T))
    draw = np.random.default_rng(_SEED).standard_normal((3, P, prefixes, V))
    trained, mismatch, staleness = torch.from_numpy(draw * np.reshape([_SPREAD, _MISMATCH, _STALENESS], (3, 1, 1, 1)))
    if setting == "on-policy":
        return Policies(trained, trained, trained)
    return Policies(trained, trained if setting == "mismatch" else trained + staleness, trained + mismatch)


@cache
def _groups() -> tuple[Tensor, Tensor]:
    """`[M, G]` responses of every different group, and `[M]` the number of orders that it can be drawn in."""
    members = list(itertools.combinations_with_replacement(range(len(responses())), GROUP_SIZE))
    orders = [
        math.factorial(GROUP_SIZE) / math.prod(math.factorial(group.count(y)) for y in set(group)) for group in members
    ]
    return torch.tensor(members), torch.tensor(orders, dtype=torch.float64)


def _advantages(spec: Algorithm, baseline: Baseline, trained: Tensor) -> Tensor:
    """`[P, M, G]` of the members of every group: R − V^π, or from the rewards of the group as the algorithm does."""
    members, _ = _groups()
    if baseline == "oracle":
        value = (logprobs(trained).sum(dim=-1).exp() * rewards()).sum(dim=-1, keepdim=True)
        return (rewards() - value)[:, members]
    of_members = rewards()[:, members]
    group = np.repeat(np.arange(P * len(members)), GROUP_SIZE)
    found = spec.advantages(of_members.flatten().numpy(), group)
    return torch.from_numpy(found).reshape(of_members.shape)


def expected_gradient(spec: Algorithm, policy: Policies, baseline: Baseline) -> Tensor:
    """`[P, K, V]` expectation of the direction of ascent in the logits of π.

    A minibatch is one group of G responses to one of the prompts, drawn from μ. `budget` is T, and is taken out
    again, so that an unbiased algorithm gives ∇J itself.
    """
    members, orders = _groups()
    mask = _indices()[2][members.flatten()].repeat(P, 1)
    logits = policy.trained.clone().requires_grad_()
    tables = [logprobs(x) for x in (logits, policy.before, policy.sampling)]
    chance = orders * tables[2].sum(dim=-1)[:, members].sum(dim=-1).exp()
    if spec.aggregation == "token-mean":
        chance = chance / _indices()[2][members].sum(dim=(1, 2))
    elif spec.aggregation == "budget":
        chance = chance * T
    advantages = chance.unsqueeze(-1) * _advantages(spec, baseline, policy.trained)
    rows = [table[:, members].reshape(-1, T) for table in tables]
    scale = Scale(sequences=P * GROUP_SIZE, tokens=P, budget=T)
    loss, _ = policy_loss(spec, rows[0], rows[1], rows[2], advantages.flatten(), mask, scale)
    (gradient,) = torch.autograd.grad(-loss, logits)
    return gradient


def objective_gradient(logits: Tensor) -> Tensor:
    """`[P, K, V]` ∇J."""
    logits = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(logits), logits)
    return gradient


@dataclass(frozen=True)
class Closeness:
    """How an expected gradient g lies to a vector v.

    Attributes:
        cosine: Of the angle between them.
        norm: |g| / |v|.
        distance: |g − v| / |v|.
    """

    cosine: float
    norm: float
    distance: float


def closeness(gradient: Tensor, target: Tensor) -> Closeness:
    norm, size = float(gradient.norm()), float(target.norm())
    cosine = float((gradient * target).sum()) / (norm * size)
    return Closeness(cosine, norm / size, float((gradient - target).norm()) / size)


@dataclass(frozen=True)
class Row:
    """One algorithm in one setting.

    Attributes:
        algorithm: Its registered name.
        setting: Of the policies.
        baseline: What the advantages were made with.
        to_objective: Its expected gradient against ∇J.
        to_own: The same against its own expected gradient on policy.
    """

    algorithm: str
    setting: Setting
    baseline: Baseline
    to_objective: Closeness
    to_own: Closeness


def bias_table() -> list[Row]:
    """Every algorithm, setting and baseline."""
    target = objective_gradient(policies("on-policy").trained)
    gradients = {
        (name, setting, baseline): expected_gradient(spec, policies(setting), baseline)
        for setting, (name, spec), baseline in itertools.product(SETTINGS, algorithms().items(), BASELINES)
    }
    return [
        Row(*key, closeness(found, target), closeness(found, gradients[key[0], "on-policy", key[2]]))
        for key, found in gradients.items()
    ]


def gap(trained: Tensor, other: Tensor) -> tuple[float, float]:
    """Of π against another policy that samples: mean |d| of its tokens, nats; sequence ESS, mean over prompts."""
    mask = _indices()[2]
    of_other = logprobs(other)
    d = logprobs(trained) - of_other
    chance = of_other.sum(dim=-1).exp()
    mean_abs = (chance.unsqueeze(-1) * d.abs()).sum() / (chance.unsqueeze(-1) * mask).sum()
    ess = 1 / (chance * (2 * d.sum(dim=-1)).exp()).sum(dim=-1)
    return float(mean_abs), float(ess.mean())


def markdown(table: list[Row]) -> str:
    """The page of the documentation, from `bias_table`."""
    return "\n".join(
        [*_introduction(), *_corrections(), *(line for setting in SETTINGS for line in _section(setting, table))]
    )


def _introduction() -> list[str]:
    stale = policies("stale")
    mean_abs, ess = gap(stale.trained, stale.sampling)
    before, before_ess = gap(stale.trained, stale.before)
    return [
        "# What each algorithm's gradient estimates",
        "",
        "Expected gradients of the losses in `mismatch_probe/rl/losses.py`, computed by that code in float64 over "
        "every possible group of responses, so that nothing here is a sample.",
        "",
        f"Setting: {P} prompts, a vocabulary of {V} tokens of which one ends the response, at most {T} tokens, hence "
        f"{len(responses())} responses a prompt; rewards 0 and 1, of unequal difficulty; softmax policies with logits "
        f"of their own after each prefix; groups of {GROUP_SIZE}, a minibatch being one of them. Where μ differs from "
        f"π, the mean |d| of its tokens is {mean_abs:.3f} nats and the sequence ESS {ess:.3f}; π′ differs from π by "
        f"{before:.3f} nats, ESS {before_ess:.3f}. That is far more per token than BF16 does, because {T} tokens have "
        "to stand for thousands. For the same reason nearly every response is outside GSPO's clip between updates, "
        "while no token reaches CISPO's.",
        "",
        "*Oracle* advantages are R − V^π(prompt) for every algorithm; *group* advantages are the algorithm's own, and "
        f"a mean that includes the response itself leaves 1 − 1/{GROUP_SIZE} of ∇J. *cos* is the cosine with the other "
        "vector, *norm* the ratio of lengths, *distance* the length of the difference over that of the other vector. "
        f"The budget of {T} is taken out; other divisors stay in, so that the cosine is what compares algorithms that "
        "average over tokens. All of this is bias: nothing is said of variance.",
        "",
        "Generated by `make docs`.",
        "",
    ]


def _corrections() -> list[str]:
    return [
        "## Corrections",
        "",
        "What multiplies the loss of a token: ρ = exp(d) of the token, w = exp(D) of its sequence, g = exp(D / T) of "
        "its sequence of T tokens. The table is `mismatch_probe/metrics/corrections.py`; the audit, `rl gradient` and "
        "the algorithms take it from there.",
        "",
        "| name | correction | factor | source |",
        "|---|---|---|---|",
        *(f"| {one.name} | {one.title} | {one.formula} | {one.source} |" for one in CORRECTIONS.values()),
        "",
        "`grpo-seq-*` and `dr-grpo-seq-*` bound w at 10. `icepop` is `grpo` with token-mis.",
        "",
    ]


_TITLES: dict[Setting, str] = {
    "on-policy": "On policy: μ = π′ = π",
    "mismatch": "Mismatch, before the first update: μ ≠ π′ = π",
    "stale": "Mismatch, between updates: μ ≠ π′ ≠ π",
}


def _section(setting: Setting, table: list[Row]) -> list[str]:
    rows = {(row.algorithm, row.baseline): row for row in table if row.setting == setting}
    targets = {"∇J": {key: row.to_objective for key, row in rows.items()}}
    if setting != "on-policy":
        targets["its own gradient on policy"] = {key: row.to_own for key, row in rows.items()}
    lines = [f"## {_TITLES[setting]}", ""]
    for title, found in targets.items():
        columns = [f"{baseline}: {name}" for baseline in BASELINES for name in ("cos", "norm", "distance")]
        lines += [f"Against {title}:", "", f"| algorithm | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        for algorithm in algorithms():
            cells = [x for baseline in BASELINES for x in astuple(found[algorithm, baseline])]
            # Not of −0.0004, which would be "-0.000".
            lines.append(f"| {algorithm} | {' | '.join(f'{round(x, 3) + 0.0:.3f}' for x in cells)} |")
        lines.append("")
    return lines


if __name__ == "__main__":
    PAGE.write_text(markdown(bias_table()), encoding="utf-8")
