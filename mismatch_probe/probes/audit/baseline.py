"""Two audits side by side: what differs in how they were made, and which checks are better or worse for it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mismatch_probe.errors import TableError
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.probes.audit.profile import RARE

_ORDER = ("pass", "warn", "fail")
# A change of the value alone is a regression only when it is certainly more than this.
TOLERATED = 1.1
_NAMES = ("rollout_dtype", "trainer_dtype", "trainer_mode")


def read_audit(path: str | Path) -> dict[str, Any]:
    """The content of an `audit.json`, named itself or by the folder that holds it.

    Raises:
        TableError: There is none, or it cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        file = next(
            (f for f in (file / "audit.json", file / "audit" / "audit.json") if f.is_file()), file / "audit.json"
        )
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TableError(f"There is no audit {file}.", "Name an audit.json, or the folder of its run.") from None
    except (OSError, ValueError) as error:
        raise TableError(f"The audit {file} cannot be read ({error}).", "Restore the file.") from None
    if not isinstance(document, dict) or document.get("schema_version") != 1 or "pairs" not in document:
        raise TableError(f"{file} is no audit that this release reads.", "Name an audit.json that `audit` wrote.")
    return document


def compare_audits(old: Mapping[str, Any], new: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Every check that both audits have, with its change, and what is worse.

    The two audits count as independent; where they share prompts, an interval of the change is wider than it had to be.

    Args:
        old: The baseline.
        new: What is compared with it.
        source: Where the baseline was found.
    """
    rows = [_row(pair, before, after) for pair, before, after in _both(old, new)]
    return {
        "source": source,
        "model": old["model"],
        "changed": _changed(old["provenance"], new["provenance"], old, new),
        "checks": rows,
        "regressions": [row for row in rows if row["regressed"]],
        "gone": _gone(old, new),
    }


def _both(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]:
    known = {(*_pair(pair), check["name"]): check for pair in old["pairs"] for check in pair["checks"]}
    for pair in new["pairs"]:
        for check in pair["checks"]:
            before = known.get((*_pair(pair), check["name"]))
            if before is not None:
                yield pair, before, check


def _row(pair: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    change = _change(before, after)
    worse = _ORDER.index(after["best"]) > _ORDER.index(before["best"])
    lost = before["status"] != "not judged" and after["status"] == "not judged"
    # A value that moved across a threshold by no more than its own uncertainty has not got worse; a rare event has.
    certain = change is None or change["certain"] or after["name"] in RARE
    grown = change is not None and change["worse_by"] is not None and change["worse_by"] > TOLERATED
    why = ""
    if worse and certain:
        why = f"{before['status']} before, {after['status']} now"
    elif grown:
        assert change is not None
        why = f"worse by at least {change['worse_by']:.2f} times"
    return {
        **{name: pair[name] for name in _NAMES},
        "name": after["name"],
        "before": before["value"],
        "after": after["value"],
        "status_before": before["status"],
        "status_after": after["status"],
        "change": None if change is None else {key: change[key] for key in ("kind", "value", "ci_low", "ci_high")},
        "regressed": bool(why),
        "why": why or ("it can no longer be judged" if lost else ""),
    }


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ratio of positive values, or the difference of others, with a 95 % interval where both have one.

    `certain` says whether the interval excludes no change, `worse_by` by what factor at least the value got worse.
    """
    a, b = before["value"], after["value"]
    if a is None or b is None:
        return None
    info = CATALOG.get(after["name"])
    positive = (info is None or info.positive) and a > 0 and b > 0
    falls = "below" in after["threshold"].split(",")[0] and "judged" not in after["threshold"].split(",")[0]
    ends = [before["ci_low"], before["ci_high"], after["ci_low"], after["ci_high"]]
    known = all(end is not None for end in ends) and not (positive and min(ends) <= 0)
    if positive:
        value = b / a
        spread = math.hypot(math.log(ends[1] / ends[0]), math.log(ends[3] / ends[2])) / 2 if known else None
        low, high = (None, None) if spread is None else (value * math.exp(-spread), value * math.exp(spread))
        worst = None if low is None or high is None else (1 / high if falls else low)
        certain = True if low is None or high is None else not low <= 1 <= high
        return {"kind": "ratio", "value": value, "ci_low": low, "ci_high": high, "certain": certain, "worse_by": worst}
    value = b - a
    spread = math.hypot(ends[1] - ends[0], ends[3] - ends[2]) / 2 if known else None
    low, high = (None, None) if spread is None else (value - spread, value + spread)
    certain = value != 0 if low is None or high is None else not low <= 0 <= high
    return {"kind": "difference", "value": value, "ci_low": low, "ci_high": high, "certain": certain, "worse_by": None}


def _changed(
    before: Mapping[str, Any], after: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What differs in how the two audits were made, by name."""
    first = {**_flat(before), "profile": old["profile"]["name"], **_flat({"options": old["options"]})}
    second = {**_flat(after), "profile": new["profile"]["name"], **_flat({"options": new["options"]})}
    return [
        {"what": name, "before": first.get(name), "after": second.get(name)}
        for name in dict.fromkeys((*first, *second))
        if first.get(name) != second.get(name) and name != "created"
    ]


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        rows |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return rows


def _gone(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Checks of the baseline that this audit does not have."""
    there = {(*_pair(pair), check["name"]) for pair in new["pairs"] for check in pair["checks"]}
    return [
        f"{check['name']} of {pair['rollout_dtype']} → {pair['trainer_dtype']}"
        for pair in old["pairs"]
        for check in pair["checks"]
        if (*_pair(pair), check["name"]) not in there
    ]


def _pair(pair: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(pair[name] for name in _NAMES)
