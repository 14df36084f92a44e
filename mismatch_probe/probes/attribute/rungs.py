"""The ladder: from what the engine sampled to what the trainer trains on, one change a rung."""

from __future__ import annotations

from typing import Any

from mismatch_probe.metrics import ladder
from mismatch_probe.probes.attribute.evidence import Evidence
from mismatch_probe.probes.attribute.knobs import PREFILL
from mismatch_probe.probes.attribute.measure import AT_ROLLOUT, CAST


def ladder_rows(evidence: Evidence) -> dict[str, Any]:
    """The rungs from the rollout's log-probs to the trainer's, and each level's error against the trainer in FP32."""
    base, autocast = evidence.base, evidence.base.context.trainer_mode == "autocast"
    names = [(PREFILL, "the engine by prefill", "decode → prefill of the same ids")]
    names += [(AT_ROLLOUT, "the trainer, batched as the rollout", "vLLM → Hugging Face, batched alike")]
    layout = f"batched as the rollout → {base.config.trainer_layout}, as it is trained"
    if autocast:
        names += [(CAST, "the trainer in the same dtype, as it is laid out", layout)]
    last = "cast → autocast" if autocast else layout
    levels = [("", "the engine as it sampled", base.rollout_logprobs, "")]
    for name, text, step in names:
        found = evidence.reading(name)
        if found is None:
            return {"rungs": [], "anchor": [], "why": evidence.why(name)}
        levels.append((name, text, found, step))
    levels.append(("", "the trainer as it is trained", base.trainer_logprobs, last))
    rungs = ladder.climb([level[2] for level in levels], base.tokens, seed=evidence.seed)
    rows = [
        {
            "from": before[1],
            "to": after[1],
            "change": after[3],
            "rms": rung.rms.as_dict(),
            "mean": rung.mean.as_dict(),
            "share": rung.share.as_dict(),
        }
        for before, after, rung in zip(levels, levels[1:], rungs, strict=False)
    ]
    anchor = []
    if base.float32_logprobs is not None:
        for _, text, found, _ in levels:
            error = ladder.gap(found - base.float32_logprobs, base.tokens, seed=evidence.seed)
            anchor.append({"level": text, "error_rms": error["rms"].as_dict()})
    return {"rungs": rows, "anchor": anchor, "why": ""}
