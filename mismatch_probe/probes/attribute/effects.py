"""What each setting does to the gap, and what settings of both sides do together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from mismatch_probe.metrics import ladder
from mismatch_probe.metrics.multiplicity import SIGNIFICANCE, holm
from mismatch_probe.probes.attribute.evidence import NOT_MEASURED, Evidence
from mismatch_probe.probes.attribute.knobs import Knob
from mismatch_probe.probes.attribute.names import REPLAY, TRAINER

# Knobs that exist on both sides, by what they are called together.
TWO_SIDED = {
    "FP32 head": ("rollout-fp32-head", "trainer-fp32-head"),
    "FP16": ("rollout-float16", "trainer-float16"),
    "FP8 keys and values": ("rollout-kv-fp8", "trainer-kv-fp8"),
}


def knob_row(evidence: Evidence, knob: Knob) -> dict[str, Any]:
    """A row: measured, or why it is not."""
    base = evidence.base
    row: dict[str, Any] = {
        "name": knob.name,
        "side": knob.side,
        "key": knob.key,
        "change": knob.change,
        "action": knob.action,
        "status": "unavailable",
        "why": knob.why_missing(base.context),
    }
    if row["why"] and not evidence.measured(knob.name):
        return row
    if knob not in evidence.readings.chosen and not evidence.measured(knob.name):
        text = "slow, so only with --knobs all, or its name" if knob.slow else "not asked for"
        return row | {"status": "not asked", "why": text}
    part = evidence.parts.get(knob.name)
    if part is None or not evidence.measured(knob.baseline):
        return row | {"status": "not measured", "why": NOT_MEASURED if part is None else evidence.why(knob.baseline)}
    if not evidence.measured(knob.name):
        status = "unavailable" if "unavailable" in part[0] else "failed"
        return row | {"status": status, "why": evidence.why(knob.name)}
    return row | {"status": "measured", "why": ""} | _effect(evidence, knob)


def _effect(evidence: Evidence, knob: Knob) -> dict[str, Any]:
    """What a knob does to the gap, and what it costs."""
    base, part, before = evidence.base, evidence.parts[knob.name], evidence.parts[knob.baseline]
    mask = np.zeros(len(base.rollout_logprobs), np.bool_)
    starts = base.starts()
    lengths = part[1].get("tokens", np.diff(starts)[part[1]["index"]])
    for sequence, length in zip(part[1]["index"], lengths, strict=True):
        mask[starts[sequence] : starts[sequence] + length] = True
    changed, plain = (np.asarray(p[1]["logprobs"], np.float64) for p in (part, before))
    same = len(plain) == len(changed)
    plain = plain if same else plain[mask]  # the baseline has all tokens, or the same ones
    if knob.side == "rollout":
        other = base.trainer_logprobs[mask]
        gaps = (other - plain, other - changed)
    else:
        other = base.rollout_logprobs[mask]
        gaps = (plain - other, changed - other)
    peaks = (part[0].get("peak_bytes"), before[0].get("peak_bytes"))
    return {
        **ladder.change(*gaps, base.tokens.where(mask), seed=evidence.seed).as_dict(),
        "n_tokens": int(mask.sum()),
        "time_ratio": part[0]["seconds"] / before[0]["seconds"] if same else None,
        "n_nonfinite": int((~np.isfinite(changed)).sum()),
        "peak_gib": None if peaks[0] is None else peaks[0] / 2**30,
        "memory_ratio": peaks[0] / peaks[1] if peaks[0] and peaks[1] else None,
        "note": _note(part[0].get("identity", {}), before[0].get("identity", {}), knob.key),
    }


def _note(after: Mapping[str, Any], before: Mapping[str, Any], key: str) -> str:
    """What changed along with a setting, or kept it from doing anything."""
    for name in ("attention_backends", "attention"):
        if after.get(name) != before.get(name) and not key.startswith("attention"):
            return f"attention changed with it: {_words(before.get(name))} → {_words(after.get(name))}"
    if key == "prefix-cache" and "block_size" in after:
        return f"only whole blocks of {after['block_size']} tokens are cached"
    return ""


def two_sided_rows(evidence: Evidence, knobs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Changes that exist on both sides, on neither, one, and both; `knobs` are the rows of all by name."""
    rows: list[dict[str, Any]] = []
    for name, (rollout, trainer) in TWO_SIDED.items():
        sides = [evidence.reading(reading) for reading in (REPLAY, rollout, TRAINER, trainer)]
        if any(side is None for side in sides):
            missing = rollout if sides[1] is None else trainer
            why = knobs[missing]["why"] or evidence.why(missing)
            rows.append({"name": name, "cells": {}, "best": None, "hurts": [], "why": why})
            continue
        plain_b, changed_b, plain_a, changed_a = (np.asarray(side) for side in sides)
        # All of readings that were made again, so that the four have one reference.
        neither = plain_a - plain_b
        gaps = {
            "neither": neither,
            "rollout": plain_a - changed_b,
            "trainer": changed_a - plain_b,
            "both": changed_a - changed_b,
        }
        cells = {
            cell: ladder.change(neither, gap, evidence.base.tokens, seed=evidence.seed).as_dict()
            for cell, gap in gaps.items()
        }
        known = {cell: found["rms"]["value"] for cell, found in cells.items() if found["rms"]["value"] is not None}
        best = min(known, key=lambda cell: known[cell]) if known else None
        rows.append({"name": name, "cells": cells, "best": best, "hurts": [], "why": ""})
    return rows


def effect_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a measured setting does to the gap, without what it costs."""
    return {item.name: row[item.name] for item in fields(ladder.Change)}


def judge(knobs: Mapping[str, dict[str, Any]], two_sided: Sequence[Mapping[str, Any]]) -> None:
    """Adds to each setting, and to each change of both sides, whether it alters the gap: all are one family of tests.

    `p_holm` is the p-value adjusted over the family (Holm 1979), `differs` whether it is below 5 %; both are None where
    there is no test. A change on one side has those of its setting. `hurts` are the cells of a change that make the gap
    larger.
    """
    pairs = [row for row in two_sided if row["cells"]]
    tests = [row for row in knobs.values() if row["status"] == "measured"]
    tests += [row["cells"]["both"] for row in pairs]
    for test, p in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
        test.update(p_holm=p, differs=None if p is None else p < SIGNIFICANCE)
    for row in pairs:
        cells = row["cells"]
        for side, name in zip(("rollout", "trainer"), TWO_SIDED[row["name"]], strict=True):
            cells[side] |= {key: knobs[name][key] for key in ("p_holm", "differs")}
        row["hurts"].extend(cell for cell in ("rollout", "trainer", "both") if alters(cells[cell], larger=True))


def alters(row: Mapping[str, Any], *, larger: bool) -> bool:
    """Whether a judged change makes the gap larger, or smaller."""
    return bool(row["differs"]) and (row["rms_ratio"]["value"] > 1) == larger


def _words(names: Sequence[str] | str | None) -> str:
    return names if isinstance(names, str) else ", ".join(names or ()) or "none"
