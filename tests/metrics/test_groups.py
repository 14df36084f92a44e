"""Metrics of parts of a pair are those of the parts alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from mismatch_probe.metrics.groups import GROUP_KEYS, Grouping, GroupSums
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.types import PairArrays
from tests.metrics.test_streaming import cut


@pytest.fixture
def pair(make_pair: Any) -> PairArrays:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 30, 40)
    n = int(lengths.sum())
    made = make_pair(-rng.exponential(1, n), rng.normal(0, 0.05, n), list(lengths), [i // 2 for i in range(40)])
    lag = rng.integers(-1, 3, n)
    return replace(cast(PairArrays, made), columns={"lag": lag})


def only(pair: PairArrays, rows: np.ndarray) -> PairArrays:
    """The tokens `rows` of the pair, as a pair of their own with the sequences and prompts that have any."""
    sequences, sequence = np.unique(pair.sequence[rows], return_inverse=True)
    prompt = np.unique(pair.prompt[sequences], return_inverse=True)[1]
    names = ("rollout_logprob", "trainer_logprob", "position")
    tokens = {name: getattr(pair, name)[rows] for name in names}
    return replace(pair, **tokens, sequence=sequence, prompt=prompt, prompt_ids=(), columns={})


def test_groups_of_sequences_and_of_tokens(pair: PairArrays) -> None:
    step = np.arange(40) // 8 % 4
    sums = GroupSums([Grouping("step", step), Grouping("lag", labels=("same", "one", "two"))])
    for chunk in cut(pair, [7, 20]):
        sums.update(chunk)
    results = sums.results()
    assert [(one.key, one.label) for one in results] == [
        *(("step", str(code)) for code in range(4)),
        *(("lag", label) for label in ("same", "one", "two")),
    ]
    tokens = [step[pair.sequence] == code for code in range(4)] + [pair.columns["lag"] == code for code in range(3)]
    for one, rows in zip(results, tokens, strict=True):
        assert one.n_tokens == np.count_nonzero(rows)
        assert tuple(sorted(one.metrics)) == tuple(sorted(GROUP_KEYS))
        want = compute_metrics(only(pair, rows), keys=GROUP_KEYS, replicates=200)
        for key, value in want.items():
            got = one.metrics[key]
            for name in ("value", "ci_low", "ci_high"):
                assert getattr(got, name) == pytest.approx(getattr(value, name), rel=1e-9, abs=1e-14), (one, key)


def test_no_groups(pair: PairArrays) -> None:
    sums = GroupSums([])
    sums.update(pair)
    assert sums.results() == []
    nowhere = GroupSums([Grouping("tag", np.full(40, -1))])
    nowhere.update(pair)
    assert nowhere.results() == []


def test_most_groups(pair: PairArrays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mismatch_probe.metrics.groups.MOST_GROUPS", 2)
    sums = GroupSums([Grouping("step", np.arange(40)), Grouping("lag")])
    sums.update(pair)
    assert [(one.key, one.label) for one in sums.results()] == [
        ("step", "0"),
        ("step", "39"),
        ("lag", "0"),
        ("lag", "1"),
    ]
