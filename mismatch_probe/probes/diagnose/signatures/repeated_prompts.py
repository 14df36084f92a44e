"""The prefix cache holds what older weights made."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, State, by_level, likeliest
from mismatch_probe.probes.diagnose.evidence import Evidence, Mask
from mismatch_probe.probes.diagnose.signatures import signature
from mismatch_probe.probes.diagnose.signatures.steps import step_index

_FIRST = 8


@signature(
    "repeated-prompts",
    kind="weights",
    title="Prompts that were sampled at an earlier step are off, new ones are not",
    causes=("stale-prefix-cache",),
    confirm="Reset the prefix cache, or start a new engine, and sample the same prompts.",
    fix="Reset the prefix cache at every weight update: vLLM `reset_prefix_cache()`, or `enable_prefix_caching=False`.",
)
def repeated_prompts(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """More noise where the prompt was there before, most at the first tokens, and not just at some steps."""
    again = repeated(evidence)
    level = np.where(evidence.of_sequence(again), np.where(evidence.position < _FIRST, 2, 1), 0)
    fit = by_level(evidence, state, train, level, {}, rising=True)
    steps = step_index(evidence, 1)
    if fit is None or steps is None:
        return fit
    by_step = by_level(evidence, state, train, steps[0], {})
    return fit if likeliest([fit, by_step], train) is fit else None


def repeated(evidence: Evidence) -> Mask:
    """`[S]` whether the prompt was sampled at an earlier step, or, without steps, in an earlier block of rows."""
    steps = evidence.rows.get("step")
    change = np.diff(evidence.prompt, prepend=-1) != 0
    block = np.cumsum(change) if steps is None else steps
    first = np.full(int(evidence.prompt.max(initial=0)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, evidence.prompt, block)
    return np.asarray(block > first[evidence.prompt])
