"""Log-probs under hypotheses, from what is kept of a row, against the whole rows in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from mismatch_probe.metrics.hypotheses import (
    CAP,
    INVERSE_TEMPERATURES,
    Rows,
    Seen,
    Target,
    distinct_ids,
    fitted,
    sampled_at,
    size,
)

V = 60


class Whole:
    """Sequences with their whole rows of logits, and what is kept of them."""

    def __init__(self, seed: int, n_sequences: int = 3) -> None:
        draw = np.random.default_rng(seed)
        self.sequences = [
            (draw.integers(0, V, 4).tolist(), draw.integers(0, V, 9).tolist()) for _ in range(n_sequences)
        ]
        counts = [np.ones(9, np.bool_)] * n_sequences
        counts[0] = np.arange(9) != 4
        self.before = [
            (prompt, response[:t])
            for (prompt, response), use in zip(self.sequences, counts, strict=True)
            for t in np.flatnonzero(use)
        ]
        self.ids = np.array(
            [i for (_, response), use in zip(self.sequences, counts, strict=True) for i in np.array(response)[use]]
        )
        self.x = 3 * draw.standard_normal((len(self.ids), V))
        own = [distinct_ids(*one) for one, use in zip(self.sequences, counts, strict=True) for _ in range(use.sum())]
        width = max(map(len, own))
        distinct, rest = np.full((len(own), width), np.nan), np.zeros(len(own))
        for n, ids in enumerate(own):
            distinct[n, : len(ids)] = self.x[n, ids]
            rest[n] = logsumexp(np.delete(self.x[n], ids))
        beta = np.array(INVERSE_TEMPERATURES)
        scaled = beta[:, None] * self.x[:, None, :]
        slope = (np.exp(log_softmax(scaled, -1)) * self.x[:, None, :]).sum(-1)
        self.rows = Rows(
            logprob=self.chosen(self.x),
            chosen=self.x[np.arange(len(self.ids)), self.ids],
            normaliser=logsumexp(scaled, -1),
            slope=slope,
            top=-np.sort(-self.x, 1),
            distinct=distinct,
            rest=rest,
            low={},
            seen=Seen.of(self.sequences, counts),
        )

    def chosen(self, x: np.ndarray) -> np.ndarray:
        return log_softmax(x, -1)[np.arange(len(self.ids)), self.ids]


@given(seed=st.integers(0, 1000), temperature=st.floats(0.4, 2.5))
def test_temperature(seed: int, temperature: float) -> None:
    whole = Whole(seed)
    np.testing.assert_allclose(whole.rows.at(temperature), whole.chosen(whole.x / temperature), atol=5e-3)
    assert whole.rows.at(1.0) == pytest.approx(whole.rows.logprob, abs=1e-12)


def _kept(x: np.ndarray, keep: np.ndarray, ids: np.ndarray) -> np.ndarray:
    keep = keep.copy()
    keep[np.arange(len(ids)), ids] = True
    # Whatever is likelier than a token that was sampled is kept, too.
    keep |= x >= x[np.arange(len(ids)), ids][:, None]
    return np.where(keep, x, -np.inf)


@given(seed=st.integers(0, 1000), p=st.floats(0.05, 0.99), k=st.integers(1, V), temperature=st.sampled_from([1.0, 2.0]))
def test_truncation(seed: int, p: float, k: int, temperature: float) -> None:
    whole = Whole(seed)
    rows, x = whole.rows.at_temperature(temperature), whole.x / temperature
    order = np.argsort(-x, 1)
    probability = np.exp(log_softmax(x, -1))
    before = np.take_along_axis(probability, order, 1).cumsum(1) - np.take_along_axis(probability, order, 1)
    nucleus = np.zeros(x.shape, np.bool_)
    np.put_along_axis(nucleus, order, before < p, 1)
    ranks = np.argsort(order, 1)
    wanted = {
        "top_p": (rows.top_p(p), nucleus),
        "top_k": (rows.top_k(k), ranks < k),
        "min_p": (rows.min_p(p), probability >= p * probability.max(1, keepdims=True)),
    }
    for name, (found, keep) in wanted.items():
        expected = whole.chosen(_kept(x, keep, whole.ids))
        np.testing.assert_allclose(found, expected, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("prompt", [True, False])
@given(
    seed=st.integers(0, 1000),
    repetition=st.floats(0.5, 2.0),
    presence=st.floats(-1, 1),
    frequency=st.floats(-1, 1),
    temperature=st.sampled_from([1.0, 0.5]),
)
def test_penalties(
    prompt: bool, seed: int, repetition: float, presence: float, frequency: float, temperature: float
) -> None:
    whole = Whole(seed)
    expected = whole.x.copy()
    for n, (before, response) in enumerate(whole.before):
        for token in set(response) | (set(before) if prompt else set()):
            value = expected[n, token]
            expected[n, token] = value / repetition if value > 0 else value * repetition
        for token in set(response):
            expected[n, token] -= presence + frequency * response.count(token)
    found = whole.rows.at_temperature(temperature).penalised(repetition, presence, frequency, prompt=prompt)
    np.testing.assert_allclose(found, whole.chosen(expected / temperature), atol=1e-7)


@given(seed=st.integers(0, 1000), n=st.integers(1, 500))
def test_padded_vocabulary_and_likeliest_token(seed: int, n: int) -> None:
    whole = Whole(seed)
    wide = np.concatenate([whole.x, np.zeros((len(whole.x), n))], 1)
    np.testing.assert_allclose(whole.rows.padded(np.log(n)), whole.chosen(wide), atol=1e-9)
    np.testing.assert_allclose(whole.rows.top_one(), log_softmax(whole.x, -1).max(1), atol=1e-9)


@given(seed=st.integers(0, 200), temperature=st.floats(0.5, 2.0))
def test_a_fit_finds_the_parameter(seed: int, temperature: float) -> None:
    rows = Whole(seed, 8).rows
    column: Callable[[float], np.ndarray] = rows.at
    grid = [1 / beta for beta in INVERSE_TEMPERATURES][::-1]
    assert fitted(column, rows.at(temperature), grid, 1e-5) == pytest.approx(temperature, rel=1e-2)


def test_the_ids_say_at_which_temperature_they_were_sampled() -> None:
    draw = np.random.default_rng(0)
    x = 3 * draw.standard_normal((4000, V))
    for temperature in (0.6, 1.0, 1.5):
        ids = (x / temperature + draw.gumbel(size=x.shape)).argmax(1)
        beta = np.array(INVERSE_TEMPERATURES)
        scaled = beta[:, None] * x[:, None, :]
        slope = (np.exp(log_softmax(scaled, -1)) * x[:, None, :]).sum(-1)
        chosen = x[np.arange(len(ids)), ids]
        none = np.zeros((len(ids), 1))
        seen = Seen(none.astype(int), none.astype(int), np.zeros(len(ids), int))
        rows = Rows(chosen - logsumexp(x, 1), chosen, logsumexp(scaled, -1), slope, none, none, none[:, 0], {}, seen)
        assert sampled_at(rows) == pytest.approx(temperature, rel=0.05)


def test_sizes_are_cut_and_count_what_is_not_finite() -> None:
    assert size(np.array([0.5, -0.5, 100.0, np.nan, -np.inf])) == pytest.approx((1 + 3 * CAP) / 5)
    assert np.isnan(size(np.empty(0)))
    recorded = np.array([-1.0, -2.0, -3.0])
    target = Target(recorded, np.array([True, True, False]), 0.11)
    assert target.met(np.array([-1.1, -2.1, 0.0]))
    assert not target.met(np.array([-1.2, -2.1, -3.0]))
