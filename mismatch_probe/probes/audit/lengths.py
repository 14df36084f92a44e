"""Lengths that an audit assumes where it is not told them."""

from __future__ import annotations

from mismatch_probe.config import AuditOptions
from mismatch_probe.metrics.length_prediction import FURTHEST
from mismatch_probe.runs.comparison import RunDirectory

# The paper's step: 64 prompts × 8 samples in 4 minibatches.
STEP_SEQUENCES = 128


def planned_tokens(options: AuditOptions, run: RunDirectory) -> int:
    """The planned response length: as far as growth is predicted, where none was given."""
    return options.planned_tokens or FURTHEST * run.manifest.sizes.max_tokens


def loss_tokens(options: AuditOptions, run: RunDirectory) -> int:
    """Response tokens that a step's loss is averaged over."""
    return options.step_tokens or STEP_SEQUENCES * planned_tokens(options, run)
