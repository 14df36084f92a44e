"""The ladder: from what the engine sampled to what the trainer trains on, one change a rung."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mismatch_probe.metrics import ladder
from mismatch_probe.probes.attribute.evidence import Evidence, Floats
from mismatch_probe.probes.attribute.names import AT_ROLLOUT, CAST, PREFILL, SAME_DTYPE


@dataclass(frozen=True)
class _Level:
    """A reading on the ladder.

    Attributes:
        text: What it is.
        key, change: The rung that leads to it: its name, and what changes on it.
        logprobs: `[N]` nats; None where it is not there.
        name: Of the reading; empty where it is the comparison's own.
    """

    text: str
    key: str
    change: str
    logprobs: Floats | None
    name: str = ""


def ladder_rows(evidence: Evidence) -> dict[str, Any]:
    """The rungs from the rollout's log-probs to the trainer's, and each level's error against the trainer in FP32."""
    base, levels = evidence.base, _levels(evidence)
    missing = next((level.name for level in levels if level.logprobs is None), None)
    if missing is not None:
        return {"rungs": [], "anchor": [], "n_nonfinite": 0, "squares_over_gap": None, "why": evidence.why(missing)}
    readings = [np.asarray(level.logprobs) for level in levels]
    rungs = ladder.climb(readings, base.tokens, seed=evidence.seed)
    rows = [
        {
            "key": level.key,
            "from": before.text,
            "to": level.text,
            "change": level.change,
            "rms": rung.rms.as_dict(),
            "mean": rung.mean.as_dict(),
            "share": rung.share.as_dict(),
        }
        for before, level, rung in zip(levels, levels[1:], rungs, strict=False)
    ]
    anchor = []
    if base.float32_logprobs is not None:
        for level, reading in zip(levels, readings, strict=True):
            error = ladder.gap(reading - base.float32_logprobs, base.tokens, seed=evidence.seed)
            anchor.append({"level": level.text, "error_rms": error["rms"].as_dict()})
    finite = np.isfinite(np.stack(readings)).all(axis=0)
    gap = (readings[-1] - readings[0])[finite]
    squares = sum((rung.rms.value or 0.0) ** 2 for rung in rungs)
    return {
        "rungs": rows,
        "anchor": anchor,
        # 1 where rungs are independent; above it the more they undo each other.
        "n_nonfinite": int((~finite).sum()),
        "squares_over_gap": float(squares / np.mean(gap**2)) if gap.any() else None,
        "why": "",
    }


def _levels(evidence: Evidence) -> list[_Level]:
    """From the engine to the trainer."""
    base = evidence.base
    layout = ("layout", f"batched as the rollout → {base.config.trainer_layout}, as it is trained")
    found = [
        _Level("the engine as it sampled", "", "", base.rollout_logprobs),
        _Level(
            "the engine by prefill", "prefill", "decode → prefill of the same ids", evidence.reading(PREFILL), PREFILL
        ),
    ]
    engine, at = ("engine", "vLLM → Hugging Face, batched alike"), evidence.reading(AT_ROLLOUT)
    if base.context.mixed:
        same = evidence.reading(SAME_DTYPE)
        found.append(_Level("the trainer in the rollout's dtype, batched as the rollout", *engine, same, SAME_DTYPE))
        engine = ("dtype", f"{base.context.rollout_dtype} → {base.context.trainer_dtype} at the trainer")
    found.append(_Level("the trainer, batched as the rollout", *engine, at, AT_ROLLOUT))
    last = layout
    if base.context.trainer_mode == "autocast":
        found.append(_Level("the trainer cast, as it is laid out", *layout, evidence.reading(CAST), CAST))
        last = ("mode", "cast → autocast")
    return [*found, _Level("the trainer as it is trained", *last, base.trainer_logprobs)]
