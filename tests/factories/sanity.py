"""Sanity sets made by hand: how many right responses each problem has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mismatch_probe.report.sanity import SanityData
from mismatch_probe.results.sanity import SanitySet
from mismatch_probe.rl.config import SanityConfig
from mismatch_probe.rl.sanity.records import findings_of, outcome_of
from tests.factories.rl_run import PROVENANCE

N_SAMPLES = 10


def sanity_set(right: Sequence[int], *, truncated: float = 0.0, stopped: int = 0) -> SanitySet:
    """A finished set of problems with so many right responses of ten; the first responses are truncated."""
    n = len(right) * N_SAMPLES
    config = SanityConfig(n_samples=N_SAMPLES)
    lengths = np.arange(n) % 50 + 1
    outcome = outcome_of(np.array(right), N_SAMPLES, config.keep, lengths, np.arange(n) < truncated * n, stopped)
    return SanitySet(
        schema_version=2,
        tool_version="0.1.0",
        config=config.model_dump(mode="json"),
        provenance=PROVENANCE,
        outcome=outcome,
        findings=tuple(findings_of(outcome)),
    )


def sanity_data(document: SanitySet) -> SanityData:
    return SanityData(
        folder="runs/my set",
        document=document,
        model="chain",
        rollout_dtype="bfloat16",
        temperature=1.0,
        train=("--model", "chain", "--problems", "runs/my set/sanity-set.jsonl"),
        longer=("--max-tokens", "128"),
    )
