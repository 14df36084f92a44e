"""What an audit says of each precision that its user could train in: outcome, reason, and what would settle it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mismatch_probe.probes.audit.advice import best_pair
from mismatch_probe.report.names import precision_label

Document = Mapping[str, Any]
_TRAINED = ("bfloat16", "float16", "float32")


def precisions(pairs: Sequence[Document], missing: Sequence[Document]) -> list[dict[str, Any]]:
    """A row for each trainer dtype, of its pair with rollouts in the same dtype, or the best one where there is none.

    Args:
        pairs: Of the audit's document.
        missing: Pairs of the comparison that were not made, with `why`.
    """
    return [_row(dtype, pairs, missing) for dtype in _TRAINED]


def _row(dtype: str, pairs: Sequence[Document], missing: Sequence[Document]) -> dict[str, Any]:
    pair = best_pair([pair for pair in pairs if pair["trainer_dtype"] == dtype])
    row: dict[str, Any] = {"dtype": dtype, "pair": None, "verdict": "not judged", "check": None, "more_prompts": None}
    if pair is None:
        whys = [entry["why"] for entry in missing if entry["trainer_dtype"] == dtype]
        why = f"it was not compared{f': {whys[0]}' if whys else ''}."
        return row | {"evidence": why, "settle": ""}
    row |= {"pair": precision_label(pair), "verdict": pair["verdict"]}
    deciding = _deciding(pair)
    if not deciding:
        return row | {"evidence": f"all {len(pair['checks'])} checks are ok.", "settle": ""}
    first, more = deciding[0], len(deciding) - 1
    evidence = first["evidence"] + (f" ({more} more {'check' if more == 1 else 'checks'} alike.)" if more else "")
    prompts, settle = _settle([check for check in deciding if check["status"] == "not judged"])
    return row | {"check": first["name"], "evidence": evidence, "more_prompts": prompts, "settle": settle}


def _deciding(pair: Document) -> list[Document]:
    """The checks that make a pair's verdict, those first that are certain."""
    checks, verdict = pair["checks"], pair["verdict"]
    if verdict == "fail":
        return [check for check in checks if check["best"] == "fail"]
    if verdict == "not judged":
        return [check for check in checks if check["worst"] == "fail"]
    return [check for check in checks if check["best"] == "warn"] + [
        check for check in checks if check["best"] == "pass" and check["worst"] == "warn"
    ]


def _settle(open_: Sequence[Document]) -> tuple[int | None, str]:
    """Further prompts that would settle the checks, as far as prompts do, and what else they need, in a sentence."""
    prompts = [check["more_prompts"] for check in open_ if check["more_prompts"] is not None]
    texts = [f"About {max(prompts):,} more prompts would settle it."] if prompts else []
    rest = [check for check in open_ if check["more_prompts"] is None]
    by_why: dict[str, list[str]] = {}
    for check in rest:
        by_why.setdefault("" if check["value"] is not None else check["evidence"], []).append(check["name"])
    for why, names in by_why.items():
        texts.append(f"{', '.join(names)}: {why}" if why else f"More prompts alone do not settle {', '.join(names)}.")
    return max(prompts, default=None), " ".join(texts)
