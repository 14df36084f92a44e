"""Log-probs of recorded tokens under hypotheses, from what one forward pass leaves of its rows of logits.

The rows themselves are too many to keep. What is kept of each row gives the exact log-prob of its token at any
temperature, under truncation to the likeliest tokens, and under penalties of tokens that the model has seen.

Shape legend: `N` tokens, `G` temperatures, `K` likeliest tokens, `U` distinct ids of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

CAP = 3.0
"""Nats at which a residual is cut, so that a few tokens do not decide its size."""
MOST_TOP = 1024
"""Likeliest logits that are kept of a row."""
STEP = 0.125
INVERSE_TEMPERATURES: tuple[float, ...] = tuple(STEP * k for k in (3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24))
"""Inverse temperatures at which normalisers are computed, multiples of `STEP`; between them a spline goes."""


def size(residual: Floats) -> float:
    """Mean of |residual| in nats, cut at `CAP`; what is not finite counts as `CAP`. NaN without tokens."""
    if not len(residual):
        return float("nan")
    return float(np.minimum(np.nan_to_num(np.abs(residual), nan=CAP, posinf=CAP), CAP).mean())


@dataclass(frozen=True)
class Target:
    """A side, as a column has to be to be what it recorded.

    Attributes:
        recorded: `[N]` its log-probs, nats.
        use: `[N]` tokens that are judged.
        most: Size of the residual that is small enough.
    """

    recorded: Floats
    use: Mask
    most: float

    def met(self, column: Floats) -> bool:
        """Whether a column `[N]` is what the side recorded."""
        return size((self.recorded - column)[self.use]) <= self.most


def distinct_ids(prompt: Sequence[int], response: Sequence[int]) -> Ints:
    """`[U]` ids of a sequence, each once, in increasing order."""
    return np.unique(np.concatenate([np.asarray(prompt, np.int64), np.asarray(response, np.int64)]))


@dataclass(frozen=True)
class Seen:
    """How often each distinct id of a sequence stands before each of its tokens.

    Attributes:
        prompt: `[N, U]` occurrences in the prompt; 0 beyond a sequence's own ids.
        response: `[N, U]` in the response, before the token.
        own: `[N]` column of the token itself.
    """

    prompt: Ints
    response: Ints
    own: Ints

    @classmethod
    def of(cls, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], counts: Sequence[Mask]) -> Seen:
        """From prompts and responses, and which response tokens count, `N` in all."""
        width = max((len(distinct_ids(*one)) for one in sequences), default=1)
        prompts, responses, owns = [], [], []
        for (prompt, response), use in zip(sequences, counts, strict=True):
            ids = distinct_ids(prompt, response)
            own = np.searchsorted(ids, np.asarray(response, np.int64))
            first = np.bincount(np.searchsorted(ids, np.asarray(prompt, np.int64)), minlength=width)
            hits = np.zeros((len(response), width), np.int64)
            hits[np.arange(len(response)), own] = 1
            prompts.append(np.broadcast_to(first, hits.shape)[use])
            responses.append((hits.cumsum(0) - hits)[use])
            owns.append(own[use])
        return cls(np.concatenate(prompts), np.concatenate(responses), np.concatenate(owns))


@dataclass(frozen=True)
class Rows:
    """What is kept of the rows of logits that predict `N` tokens.

    Attributes:
        logprob: `[N]` at temperature 1, nats.
        chosen: `[N]` logit of the token.
        normaliser: `[N, G]` log Σ exp(βx) at `INVERSE_TEMPERATURES`.
        slope: `[N, G]` its slope in β.
        top: `[N, K]` largest logits, falling.
        distinct: `[N, U]` logits of the sequence's distinct ids; NaN beyond them.
        rest: `[N]` log Σ exp(x) over all other tokens.
        low: `[N]` log-probs by a 16-bit softmax, by how it is made.
        seen: Which of the distinct ids the model has seen.
        temperature: What logits are divided by in `plain`.
    """

    logprob: Floats
    chosen: Floats
    normaliser: Floats
    slope: Floats
    top: Floats
    distinct: Floats
    rest: Floats
    low: Mapping[str, Floats]
    seen: Seen
    temperature: float = 1.0

    @classmethod
    def of(cls, facts: Mapping[str, NDArray[Any]], seen: Seen) -> Rows:
        """From what `engines.diagnose.facts` keeps."""
        wide = {name: np.asarray(values, np.float64) for name, values in facts.items()}
        low = {n: v for n, v in wide.items() if n.startswith(("rounded_", "subtracted_"))}
        return cls(
            wide["logprob"],
            wide["chosen"],
            wide["normaliser"],
            wide["slope"],
            wide["top"],
            wide["distinct"],
            wide["rest"],
            low,
            seen,
        )

    @cached_property
    def plain(self) -> Floats:
        """`[N]` log-probs at the rows' temperature, nats."""
        return self.logprob if self.temperature == 1 else self.at(self.temperature)

    def at_temperature(self, temperature: float) -> Rows:
        """The same rows, of a policy that divides logits by a temperature."""
        return replace(self, temperature=temperature)

    @cached_property
    def _spline(self) -> CubicHermiteSpline:
        return CubicHermiteSpline(np.array(INVERSE_TEMPERATURES), self.normaliser, self.slope, axis=1)

    def normalised(self, temperature: float) -> Floats:
        """`[N]` log Σ exp(x/T)."""
        return np.asarray(self._spline(1 / temperature))

    def at(self, temperature: float) -> Floats:
        """`[N]` log-probs at a temperature, nats."""
        return self.chosen / temperature - self.normalised(temperature)

    @cached_property
    def _top_masses(self) -> Floats:
        """`[N, K]` probabilities of the likeliest tokens."""
        beta = 1 / self.temperature
        return np.asarray(np.exp(beta * self.top - self.normalised(self.temperature)[:, None]))

    @cached_property
    def _cumulated(self) -> Floats:
        return np.asarray(np.minimum(self._top_masses.cumsum(1), 1.0))

    @cached_property
    def rank(self) -> Ints:
        """`[N]` how many tokens are likelier, at most K."""
        return np.asarray((self.top > self.chosen[:, None]).sum(1))

    def _kept(self, last: Ints) -> Floats:
        """`[N]` log-probs where tokens up to rank `last` `[N]` are kept, and the token itself in any case."""
        last = np.clip(np.maximum(last, self.rank), 0, self.top.shape[1] - 1)
        mass = self._cumulated[np.arange(len(last)), last]
        mass = np.where(self.rank >= self.top.shape[1], 1.0, mass)
        return np.asarray(self.plain - np.log(mass))

    def top_p(self, p: float) -> Floats:
        """`[N]` where the likeliest tokens are kept whose masses reach p; beyond the kept logits their mass is p."""
        last = (self._cumulated < p).sum(1)
        beyond = last >= self.top.shape[1]
        return np.asarray(np.where(beyond, self.plain - np.log(p), self._kept(last)))

    def top_k(self, k: int) -> Floats:
        """`[N]` where the k likeliest tokens are kept, k at most K."""
        return self._kept(np.full(len(self.chosen), k - 1))

    def min_p(self, p: float) -> Floats:
        """`[N]` where tokens are kept that are at least p times as likely as the likeliest."""
        least = np.log(p) * self.temperature
        return self._kept((self.top >= self.top[:, :1] + least).sum(1) - 1)

    def top_one(self) -> Floats:
        """`[N]` log-prob of the likeliest token."""
        return np.asarray(self.top[:, 0] / self.temperature - self.normalised(self.temperature))

    def padded(self, log_rows: float) -> Floats:
        """`[N]` with exp(`log_rows`) further tokens whose logits are 0."""
        beta = 1 / self.temperature
        return np.asarray(beta * self.chosen - np.logaddexp(self.normalised(self.temperature), log_rows))

    def penalised(
        self, repetition: float = 1.0, presence: float = 0.0, frequency: float = 0.0, *, prompt: bool = True
    ) -> Floats:
        """`[N]` log-probs under penalties, nats, then the rows' temperature.

        Args:
            repetition: Divides positive logits of seen tokens, multiplies negative ones.
            presence: Taken off the logits of tokens of the response so far.
            frequency: The same for each occurrence.
            prompt: Whether the prompt's tokens count as seen for `repetition`.
        """
        seen = self.seen.response + self.seen.prompt if prompt else self.seen.response
        x = self.distinct
        scaled = np.where(x > 0, x / repetition, x * repetition)
        x = np.where(seen > 0, scaled, x) - presence * (self.seen.response > 0) - frequency * self.seen.response
        beta = 1 / self.temperature
        own = x[np.arange(len(x)), self.seen.own]
        total = logsumexp(np.where(np.isnan(x), -np.inf, beta * x), axis=1)
        return np.asarray(beta * own - np.logaddexp(total, self._rest))

    @cached_property
    def _rest(self) -> Floats:
        """`[N]` log Σ exp(x/T) over tokens that are not in the sequence."""
        if self.temperature == 1:
            return self.rest
        beta = 1 / self.temperature
        own = logsumexp(np.where(np.isnan(self.distinct), -np.inf, beta * self.distinct), axis=1)
        total = self.normalised(self.temperature)
        return np.asarray(total + np.log(np.maximum(-np.expm1(np.minimum(own - total, 0.0)), 1e-12)))


def fitted(column: Callable[[float], Floats], recorded: Floats, grid: Sequence[float], tolerance: float) -> float:
    """The parameter whose column is nearest to what is recorded.

    Args:
        column: `[n]` of a parameter.
        recorded: `[n]` nats.
        grid: Increasing values among which the best is looked for first.
        tolerance: Of the parameter, for the search between the best one's neighbours.
    """

    return _lowest(lambda value: size(recorded - column(value)), grid, tolerance)


def sampled_at(rows: Rows) -> float:
    """The temperature at which the tokens are likeliest, by maximum likelihood."""
    grid = [1 / beta for beta in INVERSE_TEMPERATURES][::-1]
    return _lowest(lambda value: -float(rows.at(value).mean()), grid, 1e-3)


def _lowest(loss: Callable[[float], float], grid: Sequence[float], tolerance: float) -> float:
    """Where a loss is least: at the best of a grid, or between its neighbours where that is at least as low."""
    losses = [loss(value) for value in grid]
    best = int(np.argmin(losses))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": tolerance})
    return float(found.x) if found.fun <= losses[best] else float(grid[best])
