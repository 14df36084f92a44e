"""The ladder: from what the engine sampled to what the trainer trains on, one change a rung."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mismatch_probe.metrics.ladder import climb
from mismatch_probe.probes.attribute.evidence import Evidence, Floats
from mismatch_probe.probes.attribute.names import AT_ROLLOUT, CAST, PREFILL, SAME_DTYPE
from mismatch_probe.results.attribution import Ladder, LadderPass, LadderRung, PassKey, RungKey


@dataclass(frozen=True)
class _Pass:
    """A pass on the ladder.

    Attributes:
        key: Which.
        rung: What changes on the rung that leads to it; of the first pass nothing does.
        logprobs: `[N]` nats; None where it is not there.
        name: Of its file; empty where it is the comparison's own.
    """

    key: PassKey
    rung: RungKey
    logprobs: Floats | None
    name: str = ""


def ladder_of(evidence: Evidence) -> Ladder:
    """The rungs from the rollout's log-probs to the trainer's, and each pass's error against the trainer in FP32."""
    pair, passes = evidence.pair, _passes(evidence)
    missing = next((found.name for found in passes if found.logprobs is None), None)
    if missing is not None:
        return Ladder(rungs=(), passes=(), n_nonfinite=0, squares_over_gap=None, why=evidence.why(missing))
    logprobs = [np.asarray(found.logprobs) for found in passes]
    rungs = climb(logprobs, pair.tokens, seed=evidence.seed)
    rows = tuple(
        LadderRung(
            key=after.rung,
            before=before.key,
            after=after.key,
            rms=rung.rms,
            mean=rung.mean,
            contribution=rung.contribution,
        )
        for (before, after), rung in zip(pairwise(passes), rungs, strict=True)
    )
    reference = pair.float32_logprobs
    errors = [None if reference is None else evidence.size(own - reference).rms for own in logprobs]
    finite = np.isfinite(np.stack(logprobs)).all(axis=0)
    gap = (logprobs[-1] - logprobs[0])[finite]
    squares = sum((rung.rms.value or 0.0) ** 2 for rung in rungs)
    return Ladder(
        rungs=rows,
        passes=tuple(LadderPass(key=p.key, error_rms=error) for p, error in zip(passes, errors, strict=True)),
        n_nonfinite=int((~finite).sum()),
        squares_over_gap=float(squares / np.mean(gap**2)) if gap.any() else None,
        why="",
    )


def _passes(evidence: Evidence) -> list[_Pass]:
    """From the engine to the trainer."""
    pair = evidence.pair
    at: RungKey = "engine"
    last: RungKey = "layout"
    found = [
        _Pass("sampled", "prefill", pair.rollout_logprobs),
        _Pass("prefill", "prefill", evidence.logprobs(PREFILL), PREFILL),
    ]
    if pair.context.mixed:
        found.append(_Pass("rollout-dtype", at, evidence.logprobs(SAME_DTYPE), SAME_DTYPE))
        at = "dtype"
    found.append(_Pass("rollout-batching", at, evidence.logprobs(AT_ROLLOUT), AT_ROLLOUT))
    if pair.context.trainer_mode == "autocast":
        found.append(_Pass("cast", "layout", evidence.logprobs(CAST), CAST))
        last = "mode"
    return [*found, _Pass("trained", last, pair.trainer_logprobs)]
