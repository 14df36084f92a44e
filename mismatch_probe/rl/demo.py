"""The bundled demo: three precisions without stress, and four doses of weight noise in FP32."""

from __future__ import annotations

from mismatch_probe.rl.plan import Cell, make_cells

# From a dose that training hardly feels to one under which the sampled policy is another one.
DOSES = (0.11, 0.13, 0.15, 0.2)
_BASE = {"steps": 60, "record_rollouts": False}


def demo_cells(seeds: int = 1) -> list[Cell]:
    """7 arms.

    Args:
        seeds: Runs of each.
    """
    return make_cells(
        _BASE,
        [
            {"precision": ["bf16", "fp16", "fp32"], "seeds": seeds},
            {"precision": ["fp32"], "stress": [f"weight-noise:{dose:g}" for dose in DOSES], "seeds": seeds},
        ],
    )
