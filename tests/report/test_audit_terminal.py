"""What an audit leaves on the terminal: verdict first, reasons after it, 80 columns, and no text is markup."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from mismatch_probe.report.audit_terminal import print_audit
from tests.report.audit_documents import audit_document, bare_document, baseline, hostile_document
from tests.report.terminal_text import assert_fits


def printed(document: dict[str, Any], width: int = 80, *, color: bool = False) -> str:
    out = io.StringIO()
    print_audit(document, Console(file=out, width=width, force_terminal=color, legacy_windows=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("make", [audit_document, bare_document, hostile_document])
def test_lines_fit_and_hold_no_control_character(make: Any, width: int) -> None:
    text = printed(make(), width)
    assert_fits(text, width)


def test_the_verdict_comes_first_and_its_reasons_follow() -> None:
    text = printed(audit_document(baseline=baseline()))
    assert text.startswith("May smollm2-135m go into RL? Yes, with warnings: float16 → float16\n")
    joined = " ".join(text.split())
    order = [
        "fail bfloat16 → bfloat16 (autocast): kl_k3: Evidence of kl_k3.",
        "not judged float32: Evidence of None. About 40 more prompts.",
        "Profile default: Limits that frameworks publish.",
        "float16 → float16 warn 5.36e-3 [4.8e-3, 5.9e-3] 0 1 1",
        "bfloat16 → bfloat16 fail 5.36e-3 [4.8e-3, 5.9e-3] 1 0 1 (autocast)",
        "Checks of float16 → float16",
        "warn fp16_headroom: Evidence of fp16_headroom.",
        "not judged ess_seq_planned: Evidence of ess_seq_planned.",
        "pass 2 of 4 checks",
        "Recommendation",
        "Start dynamic loss scaling at 2^14.",
        "Against runs/before/audit/audit.json",
        "Worse: kl_k3 of float16 → float16: pass before, warn now (1.00e-4 → 2.00e-4)",
        "No longer checked: fp32_floor of float16 → float16",
        "Missing: float32 → float32: the pass was not run",
    ]
    places = [joined.index(order[0])]
    for part in order[1:]:
        places.append(joined.index(part, places[-1]))


def test_only_pairs_that_decide_are_explained() -> None:
    assert "fp16_pass" not in printed(audit_document())
    both = audit_document(decided_by=["float16 → float16", "bfloat16 → bfloat16 (autocast)"])
    assert "fp16_pass: Evidence of fp16_pass." in printed(both)


def test_at_80_columns_nothing_is_cut_and_long_evidence_wraps_under_itself() -> None:
    document = audit_document()
    document["pairs"][0]["checks"][3]["evidence"] = "model.layers." + "x" * 60 + " and " + "many words " * 12
    text = printed(document)
    assert "…" not in text
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("warn ") and "→" not in line)
    indent = lines[start].index("fp16_headroom")
    assert lines[start + 1].startswith(" " * indent)
    assert "".join(line.strip() for line in lines[start : start + 5]).count("x") == 60


def test_no_regression_is_said_and_no_baseline_is_not() -> None:
    same = baseline() | {"regressions": [], "gone": []}
    assert "None of 3 checks is worse." in printed(audit_document(baseline=same))
    assert "worse" not in printed(audit_document())


def test_an_empty_audit_says_so_and_nothing_else() -> None:
    text = printed(bare_document())
    assert text.startswith("May smollm2-135m go into RL? Not judged: no pair of precisions was compared\n")
    assert "Recommendation" not in text
    assert "Checks" not in text


def test_no_text_is_markup() -> None:
    red = "[red]x[/red] :smile:"
    document = audit_document(model=red, missing=[{"what": red, "why": red}])
    document["profile"]["description"] = red
    document["pairs"][0]["checks"][3] |= {"name": red, "evidence": red}
    document["recommendation"]["sentences"] = [red]
    assert printed(document, 160).count(red) == 7


def test_on_a_colour_terminal_only_styling_is_escaped() -> None:
    styled = printed(hostile_document(), 100, color=True)
    assert "\x1b[" in styled
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", re.sub(r"\x1b\[[0-9;]*m", "", styled))
    assert "\x1b[31m⟨" not in styled
