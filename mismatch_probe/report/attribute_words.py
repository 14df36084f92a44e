"""What an attribution says in sentences: the result in a nutshell, for the page, the Markdown and the terminal.

Every string has been through `visible`, none has been escaped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mismatch_probe.metrics.inside import THRESHOLD
from mismatch_probe.report.format import count, estimate, number, percent, visible
from mismatch_probe.report.matrix import dtype_order
from mismatch_probe.report.names import precision_label

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Document = Mapping[str, Any]

# The document has this in place of infinity.
_ENDLESS = 1e30
# From here on a share is written as other numbers are.
_LARGE_SHARE = 10.0
NO_LAYER = "no single layer"
"""A verdict on layers: nothing stands out."""
ELSEWHERE = "nothing that was compared inside both models in float32 stands out, though they differ there"
"""Of a gap that FP32 shows, and no layer."""


def nutshell(document: Document) -> list[str]:
    """The gap, a fault if there is one, the largest rung, the most helpful change, and what FP32 modules buy."""
    faults, rest = places(document)
    texts = [_gap(document), *faults, _rung(document), _change(document), rest]
    return [text for text in (*texts, fixes_text(document["fixes"]), experts_text(document["experts"])) if text]


def _gap(document: Document) -> str:
    rms = document["gap"]["rms"]
    tokens, sequences = count(document["n_tokens"]), count(document["n_sequences"])
    if rms["value"] is None:
        return f"The gap of {visible(precision_label(document))} is not known: {visible(rms.get('why', ''))}."
    size = estimate(rms["value"], rms["ci_low"], rms["ci_high"])
    pair = visible(precision_label(document))
    return f"The gap of {pair} has an RMS of {size} nats over {tokens} tokens of {sequences} sequences."


def _rung(document: Document) -> str:
    rungs = [rung for rung in document["ladder"]["rungs"] if rung["share"]["value"] is not None]
    if not rungs:
        return ""
    largest, *others = sorted(rungs, key=lambda rung: rung["share"]["value"], reverse=True)
    text = f"The largest share of E[d²], {share_text(largest['share'])}, arises at: {visible(largest['change'])}"
    rest = "; ".join(f"{visible(rung['change'])}: {share_percent(rung['share']['value'])}" for rung in others)
    return f"{text} ({rest})." if rest else f"{text}."


def _change(document: Document) -> str:
    changes = [cause for cause in document["causes"] if cause["kind"] == "change" and cause["share"] is not None]
    if not changes:
        measured = [row for row in document["knobs"] if row["status"] == "measured"]
        if any(row["shift"]["value"] for row in measured) and all(row["p_holm"] is None for row in measured):
            return "Whether a setting makes the gap smaller was not tested: there are too few prompts."
        return (
            "No setting that was measured makes the gap smaller, at 5 % for all of them together." if measured else ""
        )
    best = max(changes, key=lambda cause: cause["share"])
    share = share_text({"value": best["share"], "ci_low": best["ci_low"], "ci_high": best["ci_high"]})
    return f"The change that closes most of E[d²], {share}, is: {visible(best['text'])}."


def places(document: Document) -> tuple[list[str], str]:
    """A sentence for each dtype that something stands out in or hides in, one on what FP32 leaves of the gap, and one
    for all dtypes in which nothing stands out.
    """
    found = document["conclusions"]["dtypes"]
    order = dtype_order(found)
    shown = [name for name in order if found[name]["code"] in ("fault", "not finite", "step")]
    unseen = [name for name in order if found[name]["code"] in ("hidden", "absent")]
    quiet = [name for name in order if found[name]["code"] == "quiet"]
    texts = [conclusion(found[name], name) for name in (*shown, *unseen)]
    texts += [text for text in (_left(document),) if text]
    if not quiet:
        return texts, ""
    largest = max(found[name]["score"] for name in quiet)
    return texts, _nothing(f" in {listed([visible(name) for name in quiet])}", largest)


def conclusion(found: Document, dtype: str) -> str:
    """What is concluded of a dtype; nothing where it was not compared."""
    code, name = found["code"], visible(dtype)
    if code == "quiet":
        return _nothing("", found["score"])
    if code == "step":
        return _step(found, name)
    if code in ("fault", "not finite"):
        text = f"In {name}, {visible(where_words(found['located']))}"
        score = f"its score is {score_text(found['score'])}, of a threshold of {THRESHOLD:g}."
        return f"{text} is not finite." if code == "not finite" else f"{text} stands out: {score}"
    if code == "not compared":
        return ""
    located, wide = found["located"], visible(found["seen_in"])
    what = step_words(found) if located["verdict"] == NO_LAYER else where_words(located)
    if code == "absent":
        return f"In {name}, {visible(what)} does not differ as it does in {wide}."
    return f"Not detectable in {name}, whose rounding exceeds what {wide} shows: {visible(what)}."


def _nothing(where: str, largest: float) -> str:
    return (
        f"No single layer stands out{where}: the largest score of a module is {score_text(largest)}, of a threshold of "
        f"{THRESHOLD:g}."
    )


def _step(found: Document, dtype: str) -> str:
    """What a layer's step says that nothing does that was compared in it."""
    text = f"In {dtype}, {step_words(found)} is beyond the threshold though no module is: "
    if found["routers"]:
        return f"{text}small differences add up or send a router's tokens elsewhere."
    if found["ends"]:
        return f"{text}neither is anything between its modules, so that small differences add up."
    return (
        f"{text}the difference lies in the layer's own code outside its modules (residual connection, scaling), or its "
        "layers hand on their result in a way that is not known here."
    )


def step_words(found: Document) -> str:
    """Layers whose step stands out, the first of many."""
    layers = found["layers"]
    more = f" (and of {len(layers) - 1} more)" if len(layers) > 1 else ""
    return f"the step of layer {layers[0]}{more}"


def where_words(located: Document) -> str:
    """What stands out, as it is in the document."""
    name, most = located["name"], located["verdict"] == "everywhere"
    if located["kind"] == "end":
        owner = "most layers outside their modules" if most else f"{name} outside its modules"
        return f"the code of {owner} (residual connection, scaling)"
    where = {"everywhere": f"{name} of most layers", "outside": f"{name}, outside of the layers,"}
    return f"{'what reaches ' if located['kind'] == 'between' else ''}{where.get(located['verdict'], name)}"


def _left(document: Document) -> str:
    """What FP32 leaves of the gap, where it leaves something."""
    rounding, share = document["conclusions"]["rounding"], document["left_in_fp32"]["share"]
    if rounding["code"] not in ("part", "no cause"):
        return ""
    text = "The gap is more than FP32 rounds"
    if rounding["left"] is not None:
        text = f"FP32 on both sides leaves {share_text(share)} of E[d²], which is not rounding"
    return f"{text}; {ELSEWHERE}." if rounding["elsewhere"] else f"{text}."


def fix_wanted(fixes: Document) -> Document | None:
    """The cheapest set of modules in FP32; None where none meets the target, or there is nothing to gain."""
    target, cheapest = fixes.get("target"), fixes.get("cheapest")
    return cheapest if target is not None and target < 1 else None


def fixes_text(fixes: Document) -> str:
    """What classes of modules in FP32 buy."""
    tried = [row for row in fixes["rows"] if row["status"] == "measured" and row["rms_ratio"]["value"] is not None]
    if not tried:
        return ""
    whole = (fixes.get("whole_trainer_in_fp32") or {}).get("value")
    beside = "" if whole is None else f"; a trainer wholly in FP32 leaves {percent(whole)}"
    target, chosen = fixes["target"], fix_wanted(fixes)
    if target is None or target >= 1:
        left = "" if whole is None else f" (it leaves {percent(whole)})"
        return f"An FP32 trainer does not make the RMS of the gap smaller{left}, so no set of FP32 modules is sought."
    if chosen is not None:
        return (
            f"The cheapest FP32 modules at the trainer that leave at most {percent(target)} of the RMS of the gap: "
            f"{class_names(chosen['classes'])}, which leaves {percent(chosen['left'])} and takes "
            f"{percent(chosen['cost'])} more time{beside}."
        )
    best = min(tried, key=lambda row: row["rms_ratio"]["value"])
    return (
        f"No FP32 modules at the trainer that were tried leave at most {percent(target)} of the RMS of the gap; "
        f"{class_names(best['classes'])} comes closest with {percent(best['rms_ratio']['value'])}{beside}."
    )


def experts_text(experts: Document | None) -> str:
    """How far the routers part; nothing of a dense model."""
    if not experts or not experts["layers"]:
        return ""
    left = experts["engine_routes"]["rms_ratio"]["value"]
    return (
        f"Routers disagree on {percent(experts['flipped_tokens'])} of the tokens, which make "
        f"{share_percent(experts['share_of_squares']['value'])} of E[d²] against the engine by prefill; with its "
        f"routes the RMS of that gap is {percent(left)} of what it is with the trainer's own."
    )


def warnings(document: Document) -> list[str]:
    """What limits the numbers."""
    found = []
    # Hundreds of intervals share this reason, so that it is given once.
    why = document["gap"]["rms"].get("why", "")
    if why and document["gap"]["rms"]["ci_low"] is not None:
        found.append(f"Intervals are {visible(why)}.")
    if document["n_nonfinite"]:
        found.append(f"{count(document['n_nonfinite'])} tokens are not finite on one side and are left out.")
    if document.get("n_impossible"):
        found.append(f"{count(document['n_impossible'])} tokens have an impossible log-prob and are left out.")
    return [*found, *(f"{visible(name)} failed: {visible(why)}" for name, why in document["failed"].items())]


def order_of(ratio: Document) -> float:
    """What rows are sorted by: those without a ratio come last."""
    value = ratio.get("value")
    return math.inf if value is None else float(value)


def leaves_one_out(ratio: Document) -> bool:
    """Whether the interval of a ratio does not hold 1."""
    low, high = ratio["ci_low"], ratio["ci_high"]
    return low is not None and high is not None and not low <= 1.0 <= high


def doubt(row: Document) -> str:
    """What is said of a setting whose interval leaves 1 out, but which so many tests may have brought about."""
    unsure = leaves_one_out(row["rms_ratio"]) and row["differs"] is False
    return f"p = {number(row['p_holm'])} among all" if unsure else ""


def unmeasured(document: Document) -> list[Document]:
    """The settings that have no number, those that failed first."""
    rows = [row for row in document["knobs"] if row["status"] != "measured"]
    order = ("failed", "not measured", "not asked")
    return sorted(rows, key=lambda row: order.index(row["status"]) if row["status"] in order else len(order))


def share_text(metric: Document) -> str:
    """`38.2 % [32.6 %, 43.8 %]`."""
    return f"{share_percent(metric['value'])} {share_percents(metric)}".rstrip()


def share_percents(metric: Document) -> str:
    """The interval of a share, or nothing where an end is absent."""
    low, high = metric.get("ci_low"), metric.get("ci_high")
    return "" if low is None or high is None else f"[{share_percent(low)}, {share_percent(high)}]"


def share_percent(share: float | None) -> str:
    """A share to a tenth of a per cent: less than that is no share worth a digit."""
    return percent(share) if share is None or abs(share) >= _LARGE_SHARE else f"{100 * share:.1f} %"


def score_text(score: float | None) -> str:
    """A score; what no number says is infinite."""
    return "∞" if score is not None and (score >= _ENDLESS or math.isinf(score)) else number(score)


def class_names(classes: Sequence[str]) -> str:
    """A set of classes of modules."""
    return " + ".join(visible(name) for name in classes)


def listed(names: Iterable[str]) -> str:
    """`a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
