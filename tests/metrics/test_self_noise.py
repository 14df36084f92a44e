"""One engine against itself."""

from __future__ import annotations

import numpy as np
import pytest

from mismatch_probe.metrics.self_noise import self_noise


def test_only_the_common_prefix_counts() -> None:
    sequence = np.array([0, 0, 0, 1, 1, 3])
    first, second = np.array([5, 6, 7, 5, 6, 9]), np.array([5, 9, 7, 5, 6, 9])
    b = np.full(6, -1.0)
    stat = self_noise(first, b, second, b + np.array([0.1, 5.0, 5.0, 0.3, 0.0, -0.2]), sequence)
    assert (stat.n_tokens, stat.n_sequences, stat.n_diverged_sequences) == (4, 3, 1)
    assert stat.mean_abs_logprob_diff == pytest.approx(0.15)
    assert stat.max_abs_logprob_diff == pytest.approx(0.3)


def test_divergence_at_the_first_token_leaves_nothing() -> None:
    ids, b = np.array([1, 2]), np.zeros(2)
    stat = self_noise(ids, b, ids + 1, b, np.array([4, 4]))
    assert (stat.n_tokens, stat.n_sequences, stat.n_diverged_sequences) == (0, 1, 1)
    assert stat.mean_abs_logprob_diff is None
    assert stat.max_abs_logprob_diff is None


def test_divergence_ends_with_its_sequence() -> None:
    first, second = np.array([1, 2, 3, 4]), np.array([1, 9, 3, 4])
    stat = self_noise(first, np.zeros(4), second, np.zeros(4), np.array([0, 0, 1, 1]))
    assert (stat.n_tokens, stat.n_diverged_sequences) == (3, 1)


def test_nonfinite_is_counted_not_averaged() -> None:
    ids = np.array([1, 2, 3])
    stat = self_noise(ids, np.array([-1.0, np.nan, -np.inf]), ids, np.array([-1.5, -1.0, -np.inf]), np.zeros(3, int))
    assert (stat.n_tokens, stat.n_nonfinite) == (3, 2)
    assert stat.mean_abs_logprob_diff == 0.5


def test_no_tokens() -> None:
    empty, ids = np.empty(0), np.empty(0, dtype=np.int64)
    stat = self_noise(ids, empty, ids, empty, ids)
    assert (stat.n_tokens, stat.n_sequences, stat.n_diverged_sequences) == (0, 0, 0)
