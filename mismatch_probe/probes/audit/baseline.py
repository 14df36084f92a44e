"""Two audits side by side: what differs in how they were made, and which checks are better or worse for it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mismatch_probe.errors import TableError
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.probes.audit.profile import is_extreme

_ORDER = ("pass", "warn", "fail")
# A change of the value alone is a regression only when it is certainly more than this.
TOLERATED = 1.1
# Values that are powers of two; one more or less is what another batch gives.
_EXPONENTS, _ONE_POWER = "fp16_loss_scale", 1.0
_USABLE = ("pass", "warn")
_NAMES = ("rollout_dtype", "trainer_dtype", "trainer_mode")


def read_audit(path: str | Path) -> dict[str, Any]:
    """The content of an `audit.json`, named itself or by the folder that holds it.

    Raises:
        TableError: There is none, or it cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        outer, inner = file / "audit.json", file / "audit" / "audit.json"
        file = inner if inner.is_file() and not outer.is_file() else outer
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TableError(f"There is no audit {file}.", "Name an audit.json, or the folder of its run.") from None
    except (OSError, ValueError) as error:
        raise TableError(f"The audit {file} cannot be read ({error}).", "Restore the file.") from None
    if not isinstance(document, dict) or not _is_audit(document):
        raise TableError(f"{file} is no audit that this release reads.", "Name an audit.json that `audit` wrote.")
    return document


def _is_audit(document: Mapping[str, Any]) -> bool:
    keys = ("model", "profile", "options", "pairs", "provenance")
    if document.get("schema_version") != 1 or any(key not in document for key in keys):
        return False
    pairs = document["pairs"]
    return isinstance(pairs, list) and all(isinstance(pair, dict) and "checks" in pair for pair in pairs)


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
        "regressions": [*_lost(old, new), *(row for row in rows if row["regressed"])],
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


def _lost(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pairs that could be used and now cannot be shown to be: gone, refused, or no longer judged."""
    there = {_pair(pair): pair for pair in new["pairs"]}
    rows = []
    for pair in old["pairs"]:
        if pair["verdict"] not in _USABLE:
            continue
        after = there.get(_pair(pair))
        if after is not None and after["verdict"] in _USABLE:
            continue
        known = {check["name"] for check in pair["checks"]}
        if after is not None and any(check["best"] == "fail" and check["name"] in known for check in after["checks"]):
            continue  # that check says so itself
        why = "the pair is gone" if after is None else f"{pair['verdict']} before, {after['verdict']} now"
        rows.append(
            {
                **{name: pair[name] for name in _NAMES},
                "name": "verdict",
                "before": None,
                "after": None,
                "status_before": pair["verdict"],
                "status_after": "not judged" if after is None else after["verdict"],
                "change": None,
                "regressed": True,
                "why": why,
            }
        )
    return rows


def _row(pair: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    change = _change(before, after)
    why = _why_worse(before, after, change)
    return {
        **{name: pair[name] for name in _NAMES},
        "name": after["name"],
        "before": before["value"],
        "after": after["value"],
        "status_before": before["status"],
        "status_after": after["status"],
        "change": change,
        "regressed": bool(why),
        "why": why,
    }


def _why_worse(before: Mapping[str, Any], after: Mapping[str, Any], change: Mapping[str, Any] | None) -> str:
    """Why a check is a regression; empty where it is none.

    It is one where the status is worse and the value has changed for certain, and where the value alone is worse by
    more than is tolerated. An event that did not occur before and does now is one in any case.
    """
    if change is None:
        return ""
    worse = _ORDER.index(after["best"]) > _ORDER.index(before["best"])
    fell = f"{before['status']} before, {after['status']} now" if worse else ""
    if not after["limits"]:  # an event
        return fell
    unchanged = 1.0 if change["kind"] == "ratio" else 0.0
    exact = bool(before.get("exact") and after["exact"])
    if change["ci_low"] is None and not exact:
        # Of a maximum the status alone tells; anything else without an interval is no ground to stand on.
        return fell if is_extreme(after["name"]) else ""
    low, high = (change["value"],) * 2 if exact else (change["ci_low"], change["ci_high"])
    if low <= unchanged <= high:
        return ""
    if fell:
        return fell
    rises = any(name.endswith("above") for name in after["limits"])
    falls = any(name.endswith("below") for name in after["limits"])
    if rises == falls or (low > unchanged) != rises:  # better, or limits on both sides, where only the status tells
        return ""
    near = low if rises else high
    if change["kind"] == "ratio":
        by = near if rises else 1 / near
        return f"worse by at least {by:.2f} times" if by > TOLERATED else ""
    # Of what is no ratio, against the way that was left to the nearest limit.
    way = min(abs(limit - before["value"]) for limit in after["limits"].values())
    least = max((TOLERATED - 1) * way, _ONE_POWER if after["name"].startswith(_EXPONENTS) else 0.0)
    return f"worse by at least {abs(near):.3g}" if abs(near) > least else ""


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ratio of positive values, or the difference of others, with a 95 % interval where both have one."""
    a, b = before["value"], after["value"]
    if a is None or b is None:
        return None
    info = CATALOG.get(after["name"])
    ends = [before["ci_low"], before["ci_high"], after["ci_low"], after["ci_high"]]
    known = all(end is not None for end in ends)
    # Of exponents it is the difference that tells.
    scaled = info.positive if info is not None else not after["name"].startswith(_EXPONENTS)
    if scaled and a > 0 and b > 0 and not (known and min(ends) <= 0):
        spread = math.hypot(math.log(ends[1] / ends[0]), math.log(ends[3] / ends[2])) / 2 if known else None
        low, high = (None, None) if spread is None else (b / a * math.exp(-spread), b / a * math.exp(spread))
        return {"kind": "ratio", "value": b / a, "ci_low": low, "ci_high": high}
    spread = math.hypot(ends[1] - ends[0], ends[3] - ends[2]) / 2 if known else None
    low, high = (None, None) if spread is None else (b - a - spread, b - a + spread)
    return {"kind": "difference", "value": b - a, "ci_low": low, "ci_high": high}


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
