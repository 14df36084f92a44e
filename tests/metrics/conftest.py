"""A factory of pairs for the metric tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pytest
from numpy.typing import ArrayLike

from mismatch_probe.types import PairArrays


class MakePair(Protocol):
    def __call__(
        self,
        rollout: ArrayLike,
        log_ratio: ArrayLike,
        lengths: Sequence[int] | None = None,
        prompts: Sequence[int] | None = None,
        prompt_ids: Sequence[str] | None = None,
        on_policy: bool = True,
        off_policy_why: str = "",
    ) -> PairArrays: ...


@pytest.fixture(scope="session")
def make_pair() -> MakePair:
    """Builds a pair from b and d; by default every token is a sequence of its own and every sequence a prompt."""

    def make(
        rollout: ArrayLike,
        log_ratio: ArrayLike,
        lengths: Sequence[int] | None = None,
        prompts: Sequence[int] | None = None,
        prompt_ids: Sequence[str] | None = None,
        on_policy: bool = True,
        off_policy_why: str = "",
    ) -> PairArrays:
        d = np.asarray(log_ratio, dtype=np.float64)
        b = np.broadcast_to(np.asarray(rollout, dtype=np.float64), d.shape).copy()
        per_sequence = np.ones(len(d), dtype=np.int64) if lengths is None else np.asarray(lengths, dtype=np.int64)
        assert per_sequence.sum() == len(d)
        prompt = np.arange(len(per_sequence)) if prompts is None else np.asarray(prompts, dtype=np.int64)
        names = tuple(f"p{i}" for i in range(int(prompt.max(initial=-1)) + 1))
        return PairArrays(
            rollout_logprob=b,
            trainer_logprob=b + d,
            sequence=np.repeat(np.arange(len(per_sequence)), per_sequence),
            position=np.concatenate([np.arange(n) for n in per_sequence] or [np.empty(0, dtype=np.int64)]),
            prompt=prompt.astype(np.int64),
            prompt_ids=names if prompt_ids is None else tuple(prompt_ids),
            on_policy=on_policy,
            off_policy_why=off_policy_why,
        )

    return make
