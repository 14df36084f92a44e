"""Names of passes, which are their files', too."""

from __future__ import annotations

from mismatch_probe.engines.attribute.trainer import UNCHANGED

FOLDER = "attribute"
# What settings are compared with: decoded again, by prefill, and the trainer once more.
REPLAY, PREFILL, TRAINER = "rollout-replay", "rollout-prefill", UNCHANGED
# Passes of the ladder.
AT_ROLLOUT, CAST = "trainer-at-rollout-batching", "trainer-cast-as-laid-out"
SAME_DTYPE = "trainer-in-rollout-dtype"
FOLLOWED = "trainer-routes"
# The engine in FP32, by prefill, where it did not sample in FP32: with the trainer in FP32 it tells what is left of the
# gap without rounding.
WIDE_PREFILL = "rollout-float32-prefill"


def inside_name(dtype: str) -> str:
    """The pass that compares layers in a dtype."""
    return f"inside-{dtype}"
