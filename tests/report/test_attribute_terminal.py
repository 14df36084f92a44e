"""What an attribution leaves on the terminal: the result first, 80 columns, and no text is markup."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from mismatch_probe.report.attribute_terminal import print_attribution
from tests.report.attribute_documents import attribution, cause, empty, faulty, hostile, judged, nulls, routers
from tests.report.terminal_text import assert_fits


def printed(document: dict[str, Any], width: int = 80, *, color: bool = False) -> str:
    out = io.StringIO()
    print_attribution(document, Console(file=out, width=width, force_terminal=color, legacy_windows=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("make", [attribution, faulty, empty, nulls, hostile])
def test_lines_fit_and_hold_no_control_character(make: Any, width: int) -> None:
    text = printed(make(), width)
    assert_fits(text, width)


def test_the_result_comes_first_and_its_parts_follow() -> None:
    joined = " ".join(printed(faulty()).split())
    order = [
        "Where the gap of smollm2-135m comes from: bfloat16 → bfloat16",
        "· The gap of bfloat16 → bfloat16 has an RMS of 6.50e-2",
        "· In bfloat16, model.layers.11.mlp stands out: its score is 41.3, of a threshold of 2.",
        "Note: trainer-packed failed: EngineError: it died",
        "1. fault in bfloat16, model.layers.11.mlp differs Do something about in bfloat16",
        "2. 70.0 % decode → prefill [63.0 %, 77.0 %] Do something about decode → prefill.",
        "rung share of E[d²] RMS (nats)",
        "batched as it is trained -30.0 % [-33.0 %, -27.0 %] 6.00e-2 [5.4e-2, 6.6e-2]",
        "fp32-head changed (the backend changed rollout 0.800× [0.760, 0.840] 1.50× with it: A → B)",
        "kv-fp8 changed rollout 5.00× [2.00, 150] 1.50×",
        "float16 changed trainer 0.700× [0.665, 0.735] –",
        "3 of 8 settings were not measured, 1 of which failed: report.html says why",
        "Layers in float32: it ran out of memory",
    ]
    places = [joined.index(order[0])]
    for part in order[1:]:
        assert part in joined
        places.append(joined.index(part, places[-1]))


def test_settings_that_are_in_doubt_are_left_to_the_report() -> None:
    text = printed(attribution())
    assert "prefix-cache" not in text
    assert "batch-1" not in text


def test_of_many_causes_the_first_are_shown() -> None:
    text = printed(attribution(causes=[cause(i, "change", f"setting {i}", 0.5) for i in range(1, 12)]))
    assert "setting 8" in text
    assert "setting 9" not in text
    assert "and 3 more in the report" in text


def test_what_is_missing_says_why_in_place_of_a_table() -> None:
    text = printed(empty())
    assert "No ladder: not measured: resume it" in text
    assert "Layers: left out: --no-layers" in text
    assert "FP32 modules: not measured: resume it" in text
    assert "Routers: not measured: resume it" in text
    assert "Rung by rung" not in text
    assert "Causes" not in text


def test_routers_are_part_of_the_result() -> None:
    assert "Routers disagree on 5.00 %" in printed(attribution(experts=routers()))


def test_a_large_change_that_many_tests_do_not_bear_out_is_shown_with_its_doubt() -> None:
    document = attribution()
    document["knobs"][2] |= judged(0.183)
    assert "(p = 0.183 among all)" in " ".join(printed(document, 120).split())


def test_no_text_is_markup() -> None:
    red = "[red]x[/red] :smile:"
    document = attribution(model=red, causes=[cause(1, "rung", red, 0.5)])
    document["ladder"]["rungs"][0]["change"] = red
    document["knobs"][3] |= {"change": red, "note": red}
    assert printed(document, 200).count(red) == 7


def test_on_a_colour_terminal_only_styling_is_escaped() -> None:
    styled = printed(hostile(), 100, color=True)
    assert "\x1b[" in styled
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", re.sub(r"\x1b\[[0-9;]*m", "", styled))
    assert "\x1b[31m⟨" not in styled
