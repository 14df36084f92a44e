"""What the parts of an attribution come to: causes of the gap, the largest first, each with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mismatch_probe.probes.attribute.effects import alters

# A share below this is not worth a line of its own.
LEAST = 0.02
_RUNG_ACTIONS = {
    "prefill": "Decoding and prefill use other kernels: batch-invariant mode (CUDA), or score rollouts by prefill.",
    "engine": "The engines' kernels round differently: a dtype with more bits on both sides (FP16), or token-level "
    "importance weights. The tables of layers and modules say where.",
    "dtype": "The two sides have different dtypes: give them the same one.",
    "layout": "The trainer's own batching: score as it is batched, or correct for it by importance weights.",
    "mode": "How the trainer holds its weights: see whether cast serves as well.",
}


def ranked_causes(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rungs by their share of E[d²], changes that close part of the gap by the share that they close, a located fault,
    and routers.

    Shares of rungs add up to 1. A change's share is 1 − E[d'²]/E[d²], which overlaps with them and with other changes.
    """
    found = [*_located(document), *_rungs(document), *_changes(document), *_experts(document)]
    order = {"fault": 0, "rung": 1, "change": 1, "experts": 1}
    found.sort(key=lambda cause: (order[cause["kind"]], -(cause["share"] or 0.0)))
    return [{"rank": index, **cause} for index, cause in enumerate(found, start=1)]


def _cause(kind: str, text: str, action: str, share: Mapping[str, Any] | None) -> dict[str, Any]:
    share = share or {}
    return {
        "kind": kind,
        "text": text,
        "action": action,
        "share": share.get("value"),
        "ci_low": share.get("ci_low"),
        "ci_high": share.get("ci_high"),
        "why": share.get("why", ""),
    }


def _rungs(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = document["ladder"]["rungs"]
    kept = [row for row in rows if abs(row["share"]["value"] or 0.0) >= LEAST]
    return [_cause("rung", row["change"], _RUNG_ACTIONS[row["key"]], row["share"]) for row in kept]


def _changes(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings that make the gap smaller, tested as one family, and move log-probs more than noise does."""
    found = []
    for row in document["knobs"]:
        if row["status"] == "measured" and _helps(row, [document["nulls"][row["side"]]]):
            text, share = f"{row['change']} at the {row['side']}", _closed(row["rms_ratio"])
            found.append(_cause("change", text, _sentence(row["action"]), share))
    for row in document["two_sided"]:
        if row["best"] == "both" and _helps(row["cells"]["both"], list(document["nulls"].values())):
            share = _closed(row["cells"]["both"]["rms_ratio"])
            found.append(_cause("change", f"{row['name']} on both sides", _BOTH[row["name"]], share))
    return found


def _helps(row: Mapping[str, Any], nulls: Sequence[Mapping[str, Any]]) -> bool:
    noise = max((null["value"] or 0.0) for null in nulls)
    moved = (row["shift"]["value"] or 0.0) > noise
    return alters(row, larger=False) and moved and _closed(row["rms_ratio"])["value"] >= LEAST


_BOTH = {
    "FP32 head": "Give both sides an FP32 head (vLLM: hf_overrides={'head_dtype': 'float32'}).",
    "FP16": "Rounding makes this share: run both sides in FP16 if `mismatch-probe audit` lets the model.",
    "FP8 keys and values": "Round keys and values at the trainer as the engine's cache does, or keep the cache wide.",
}


def _closed(ratio: Mapping[str, Any]) -> dict[str, Any]:
    """The share of E[d²] that goes, from the ratio of RMS."""
    ends = [None if ratio.get(k) is None else 1 - ratio[k] ** 2 for k in ("value", "ci_high", "ci_low")]
    return {"value": ends[0], "ci_low": ends[1], "ci_high": ends[2], "why": ratio.get("why", "")}


def _located(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for dtype, row in document["layers"]["dtypes"].items():
        located = row.get("located")
        if located is None or located["verdict"] == "no single layer":
            continue
        if located["verdict"] == "not finite":
            text = f"in {dtype}, {located['name']} is not finite"
            found.append(_cause("fault", text, "The model does not fit this dtype: see `mismatch-probe audit`.", None))
            continue
        where = f"{located['name']} of most layers" if located["verdict"] == "everywhere" else located["name"]
        between = located["kind"] == "between"
        what = f"what reaches {where}" if between else where
        text = f"in {dtype}, {what} differs {_times(located['score'])} times as much as rounding explains"
        if between:
            action = (
                "Look at what is between modules there: rotation, softmax scale, mask or window, activation, order of "
                "heads."
            )
        elif located["verdict"] == "everywhere":
            action = "Both engines compute this module differently, whatever the weights: compare its definition."
        else:
            action = "Compare this module's weights on both sides: a stale or altered tensor is likelier than a kernel."
        found.append(_cause("fault", text, action, None))
    return found


def _experts(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    experts = document["experts"]
    if not experts or not experts["layers"]:
        return []
    ratio = experts["engine_routes"]["rms_ratio"]
    if ratio["value"] is None or ratio["ci_high"] is None or ratio["ci_high"] >= 1:
        return []
    text = f"routers disagree on {100 * experts['flipped_tokens']:.1f} % of the tokens"
    action = "Replay the engine's routes in the trainer (R3), or freeze routers; FP32 routers agree more often."
    return [_cause("experts", text, action, _closed(ratio))]


def _times(score: float) -> str:
    return f"{score:.1f}" if score < 1000 else "over 1,000"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
