"""What the parts of an attribution come to: causes of the gap, the largest first, each with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mismatch_probe.metrics.conclusions import LEAST
from mismatch_probe.probes.attribute.effects import alters
from mismatch_probe.report.attribute_words import ELSEWHERE, listed, share_percent, step_words, where_words

_RUNG_ACTIONS = {
    "prefill": "Decoding and prefill use other kernels: batch-invariant mode (CUDA), or score rollouts by prefill.",
    "dtype": "The two sides have different dtypes: give them the same one.",
    "layout": "The trainer's own batching: score as it is batched, or correct for it by importance weights.",
    "mode": "How the trainer holds its weights: see whether cast serves as well.",
}
# By what is concluded on rounding.
_ENGINE_ACTIONS = {
    "cause": "The engines' kernels round differently: a dtype with more bits on both sides (FP16), or token-level "
    "importance weights. The tables of layers and modules say where.",
    "part": "FP32 on both sides leaves {left} of E[d²], which is not rounding: mend that first. Of the rest a dtype "
    "with more bits on both sides (FP16) leaves less.",
    "no cause": "This is not rounding, since FP32 shows it as well: the sides compute different functions, which no "
    "dtype mends.",
    "fault first": "FP32 on both sides leaves none of it, and something stands out in the pair's own dtype: mend that, "
    "and measure again, before you put the rest down to rounding.",
    "unknown": "The engines' kernels or their code differ: layers in float32 tell which.",
}
_CODE_ACTION = (
    "Compare the layer's own code on both sides, outside its modules: residual connection, scaling of what is added."
)
_ELSEWHERE_ACTION = (
    "Look at what both sides are given and at what comes behind the head: ids, positions, mask, scaling of logits, "
    "log-softmax."
)


def ranked_causes(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rungs by their share of E[d²], changes that close part of the gap by the share that they close, faults, and
    routers. What is said of rounding and of places follows `conclusions`.

    Shares of rungs add up to 1. A change's share is 1 − E[d'²]/E[d²], which overlaps with them and with other changes.
    """
    found = [*_faults(document), *_rungs(document), *_changes(document), *_experts(document)]
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
    rounding = document["conclusions"]["rounding"]
    engine = _ENGINE_ACTIONS[rounding["code"]].format(left=share_percent(rounding["left"]))
    actions = _RUNG_ACTIONS | {"engine": engine}
    return [_cause("rung", row["change"], actions[row["key"]], row["share"]) for row in kept]


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
            action = _BOTH[row["name"]]
            if row["name"] == "FP16" and document["conclusions"]["rounding"]["code"] == "cause":
                action = f"Rounding makes this share: {action[0].lower()}{action[1:]}"
            found.append(_cause("change", f"{row['name']} on both sides", action, share))
    return found


def _helps(row: Mapping[str, Any], nulls: Sequence[Mapping[str, Any]]) -> bool:
    noise = max((null["value"] or 0.0) for null in nulls)
    moved = (row["shift"]["value"] or 0.0) > noise
    return alters(row, larger=False) and moved and _closed(row["rms_ratio"])["value"] >= LEAST


_BOTH = {
    "FP32 head": "Give both sides an FP32 head (vLLM: hf_overrides={'head_dtype': 'float32'}).",
    "FP16": "Run both sides in FP16 if `mismatch-probe audit` lets the model.",
    "FP8 keys and values": "Round keys and values at the trainer as the engine's cache does, or keep the cache wide.",
}


def _closed(ratio: Mapping[str, Any]) -> dict[str, Any]:
    """The share of E[d²] that goes, from the ratio of RMS."""
    ends = [None if ratio.get(k) is None else 1 - ratio[k] ** 2 for k in ("value", "ci_high", "ci_low")]
    return {"value": ends[0], "ci_low": ends[1], "ci_high": ends[2], "why": ratio.get("why", "")}


def _faults(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What stands out, once for all dtypes that show it, and a gap of FP32 of which nothing inside tells."""
    concluded = document["conclusions"]
    found: dict[Any, dict[str, Mapping[str, Any]]] = {}
    for dtype, row in concluded["dtypes"].items():
        if row["fault"]:
            where = row["located"]
            key = (row["code"], where["verdict"], where["kind"], where["name"], *row["layers"])
            found.setdefault(key, {})[dtype] = row
    faults = [_fault(list(rows), list(rows.values())) for rows in found.values()]
    if concluded["rounding"]["elsewhere"]:
        faults.append(_cause("fault", ELSEWHERE, _ELSEWHERE_ACTION, None))
    return faults


def _fault(dtypes: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row, located = rows[0], rows[0]["located"]
    where = f"in {listed(dtypes)}, "
    if row["code"] == "not finite":
        action = "The model does not fit this dtype: see `mismatch-probe audit`."
        return _cause("fault", f"{where}{located['name']} is not finite", action, None)
    times = f"differs {listed([_times(r['score']) for r in rows])} times as much as rounding explains"
    if row["code"] == "step":
        what, action = step_words(row), _CODE_ACTION
    else:
        what, action = where_words(located), _action(located)
    return _cause("fault", f"{where}{what} {times}", action, None)


def _action(located: Mapping[str, Any]) -> str:
    if located["kind"] == "end":
        return _CODE_ACTION
    if located["kind"] == "between":
        return (
            "Look at what is between modules there: residual connection, rotation, softmax scale, mask or window, "
            "activation, order of heads."
        )
    if located["verdict"] == "everywhere":
        return "Both engines compute this module differently, whatever the weights: compare its definition."
    return (
        "Compare this module's weights on both sides, and constants such as a norm's epsilon: a stale or altered "
        "tensor is likelier than a kernel."
    )


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
