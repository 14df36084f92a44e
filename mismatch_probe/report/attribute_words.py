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
        measured = any(row["status"] == "measured" for row in document["knobs"])
        return (
            "No setting that was measured makes the gap smaller, at 5 % for all of them together." if measured else ""
        )
    best = max(changes, key=lambda cause: cause["share"])
    share = share_text({"value": best["share"], "ci_low": best["ci_low"], "ci_high": best["ci_high"]})
    return f"The change that closes most of E[d²], {share}, is: {visible(best['text'])}."


def places(document: Document) -> tuple[list[str], str]:
    """A sentence for each dtype that something stands out in, and one for all the others."""
    found = {
        name: row["located"]
        for name, row in document["layers"]["dtypes"].items()
        if row["located"] is not None and row["modules"]
    }
    quiet = [name for name in dtype_order(found) if found[name]["verdict"] == NO_LAYER]
    faults = [place(found[name], name) for name in dtype_order(found) if name not in quiet]
    steps = [unexplained(document["layers"]["dtypes"][name], name) for name in quiet]
    faults += [text for text in steps if text]
    if not quiet:
        return faults, ""
    largest = max(found[name]["score"] for name in quiet)
    names = listed([visible(name) for name in quiet])
    return faults, (
        f"No single layer stands out in {names}: the largest score of a module is {score_text(largest)}, of a "
        f"threshold of {THRESHOLD:g}."
    )


def unexplained(row: Document, dtype: str) -> str:
    """What a layer's step says that no module in it does; nothing where they agree."""
    first = row["first_beyond"]
    if first is None or row["located"]["verdict"] != NO_LAYER:
        return ""
    return (
        f"In {visible(dtype)}, the step of layer {first} is beyond the threshold though no module is: small "
        "differences add up or send a router's tokens elsewhere, or the layers of this model hand on their result in a "
        "way that is not known here."
    )


def place(located: Document, dtype: str) -> str:
    """What stands out in a dtype."""
    name = visible(located["name"])
    where = {"everywhere": f"{name} of most layers", "outside": f"{name}, outside of the layers,"}
    subject = where.get(located["verdict"], name)
    reaches = "what reaches " if located.get("kind") == "between" else ""
    return (
        f"In {visible(dtype)}, {reaches}{subject} stands out: its score is "
        f"{score_text(located['score'])}, of a threshold of {THRESHOLD:g}."
    )


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
