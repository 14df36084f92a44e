"""How sure an answer is: a monotone map of what a signature gains, and of its lead over rivals. Not calibrated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mismatch_probe.probes.diagnose.search import Candidate


def margin(best: Candidate, rivals: Sequence[Candidate]) -> float:
    """The share of the gain that the next rival does not have, in [0, 1]."""
    second = max((one.gain for one in rivals), default=0.0)
    return float(np.clip(1 - second / best.gain, 0.0, 1.0)) if best.gain > 0 else 0.0


def confidence(best: Candidate, rivals: Sequence[Candidate]) -> float:
    """In [0, 1], of a class of such a gain and margin."""
    size = np.log10(max(best.total, 1.0))
    score = -1.5 + 1.2 * (size - 1) + 3.0 * margin(best, rivals)
    return float(np.clip(1 / (1 + np.exp(-score)), 0.02, 0.99))
