"""An attribution in words and tables, in the page of its comparison and in its Markdown."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tests.report.test_audit_page import Page

from mismatch_probe.report.attribute_sections import AttributionView, attribution_view
from mismatch_probe.report.attribute_tables import AttributedSection
from mismatch_probe.report.html import render_html
from mismatch_probe.report.markdown import render_markdown
from mismatch_probe.report.names import ATTRIBUTE_GUIDES
from tests.report.attribute_documents import (
    attribution,
    bare,
    cause,
    concluded,
    empty,
    faulty,
    hostile,
    judged,
    knob,
    located,
    metric,
    nulls,
    routers,
)

if TYPE_CHECKING:
    from pathlib import Path

    from mismatch_probe.report.data import ReportData

SECTIONS = ["causes", "ladder", "anchor", "knobs", "unmeasured", "two-sided", "inside", "layers", "modules", "fixes"]


def section(view: AttributionView, name: str) -> AttributedSection:
    return next(section for section in view.sections if section.name == name)


def row(view: AttributionView, name: str, start: str) -> tuple[str, ...]:
    return next(row for row in section(view, name).table.rows if row[0].startswith(start))


def test_the_nutshell_says_where_the_gap_comes_from() -> None:
    view = attribution_view(attribution())
    assert view.texts == [
        "The gap of bfloat16 → bfloat16 has an RMS of 6.50e-2 [5.85e-2, 7.15e-2] nats over 1,949 tokens of 64 "
        "sequences.",
        "The largest share of E[d²], 70.0 % [63.0 %, 77.0 %], arises at: decode → prefill (vLLM → Hugging Face: "
        "60.0 %; batched as it is trained: -30.0 %).",
        "The change that closes most of E[d²], 99.0 % [89.1 %, 108.9 %], is: FP16 on both sides.",
        "No single layer stands out in bfloat16 and float16: the largest score of a module is 0.900, of a threshold "
        "of 2.",
        "The cheapest FP32 modules at the trainer that leave at most 85.0 % of the RMS of the gap: head + mlp, which "
        "leaves 80.0 % and takes 70.0 % more time; a trainer wholly in FP32 leaves 78.0 %.",
    ]
    assert view.notes == ["trainer-packed failed: EngineError: it died"]
    assert [section.name for section in view.sections] == SECTIONS


def test_a_fault_is_named_and_the_other_dtypes_are_not() -> None:
    texts = attribution_view(faulty()).texts
    assert texts[1] == "In bfloat16, model.layers.11.mlp stands out: its score is 41.3, of a threshold of 2."
    assert any(text.startswith("No single layer stands out in float16: the largest") for text in texts)


@pytest.mark.parametrize(
    ("verdict", "name", "words"),
    [
        ("everywhere", "input_layernorm", "input_layernorm of most layers stands out: its score is ∞"),
        ("outside", "lm_head", "lm_head, outside of the layers, stands out: its score is ∞"),
    ],
)
def test_what_is_everywhere_or_outside_is_said(verdict: str, name: str, words: str) -> None:
    document = attribution()
    document["layers"]["dtypes"]["float16"]["located"] = located(verdict, name, None, 1e30)
    view = attribution_view(concluded(document))
    assert any(words in text for text in view.texts)
    assert words in row(view, "inside", "float16")[4]


def test_no_change_that_helps_is_said() -> None:
    document = attribution(causes=[cause(1, "rung", "decode → prefill", 0.7)])
    assert (
        "No setting that was measured makes the gap smaller, at 5 % for all of them together."
        in attribution_view(document).texts
    )


def test_without_a_test_nothing_is_said_of_settings() -> None:
    document = attribution(causes=[])
    for row in document["knobs"]:
        row |= judged(None)
    texts = attribution_view(document).texts
    assert "Whether a setting makes the gap smaller was not tested: there are too few prompts." in texts
    assert not any("makes the gap smaller, at 5 %" in text for text in texts)


def test_an_interval_that_many_tests_do_not_bear_out_says_so() -> None:
    document = attribution()
    document["knobs"].append(knob("trainer", "fp32-mlp", 0.9, **judged(0.134)))
    view = attribution_view(document)
    assert row(view, "knobs", "fp32-mlp")[2] == "0.900\n[0.855, 0.945]\np = 0.134 among all"
    assert "among all" not in row(view, "knobs", "fp32-head")[2]


def test_a_layer_that_no_module_explains_is_said() -> None:
    document = attribution()
    document["layers"]["dtypes"]["bfloat16"]["layers"][3] |= {"score": 2.5}
    view = attribution_view(concluded(document))
    text = "In bfloat16, the step of layer 3 is beyond the threshold though no module is:"
    assert any(line.startswith(text) and "residual connection" in line for line in view.texts)
    assert text in row(view, "inside", "bfloat16")[4]
    assert "though no module is" not in row(view, "inside", "float16")[4]
    assert any(line.startswith("No single layer stands out in float16:") for line in view.texts)
    view = attribution_view(concluded(document | {"experts": routers()}))
    assert any(line.startswith(text) and "send a router's tokens elsewhere" in line for line in view.texts)


def test_what_reaches_a_module_is_told_from_the_module() -> None:
    document = faulty()
    document["layers"]["dtypes"]["bfloat16"]["located"] |= {"kind": "between"}
    view = attribution_view(concluded(document))
    assert "In bfloat16, what reaches model.layers.11.mlp stands out:" in view.texts[1]
    assert "In bfloat16, model.layers.11.mlp stands out:" in attribution_view(faulty()).texts[1]


def test_the_code_of_a_layer_hides_where_more_is_rounded_and_is_not_called_rounding() -> None:
    document = attribution(left_in_fp32={"rms": metric(0.04), "share": metric(0.4)})
    for name, score in (("float16", 50.0), ("float32", 8e4)):
        found = attribution()["layers"]["dtypes"]["float16"]
        end = {"name": "model.layers.7", "layer": 7, "kind": "end", "apart": 0.003, "trainer_error": 0.0}
        found["modules"].append(end | {"engine_error": 0.0, "score": score})
        found["located"] = located("layer", "model.layers.7", 7, score, "end")
        document["layers"]["dtypes"][name] = found
    view = attribution_view(concluded(document))
    what = "the code of model.layers.7 outside its modules (residual connection, scaling)"
    assert view.texts[1:5] == [
        f"In float16, {what} stands out: its score is 50.0, of a threshold of 2.",
        f"In float32, {what} stands out: its score is 8.00e4, of a threshold of 2.",
        f"Not detectable in bfloat16, whose rounding exceeds what float32 shows: {what}.",
        "FP32 on both sides leaves 40.0 % [36.0 %, 44.0 %] of E[d²], which is not rounding.",
    ]
    assert not any("No single layer" in text for text in view.texts)
    assert section(view, "modules").title == "Modules of layer 7"


def test_a_target_that_no_set_meets_and_one_that_cannot_be_met_are_said() -> None:
    document = attribution()
    document["fixes"] |= {"target": 0.7, "cheapest": None}
    text = attribution_view(document).texts[-1]
    assert text.startswith("No FP32 modules at the trainer that were tried leave at most 70.0 % of the RMS of the gap;")
    assert "head + mlp comes closest with 80.0 %" in text
    document["fixes"] |= {"target": 1.0, "cheapest": {"classes": ["norms"], "left": 0.99, "cost": 0.0}}
    view = attribution_view(document)
    assert "so no set of FP32 modules is sought" in view.texts[-1]
    assert all("cheapest" not in row[4] for row in section(view, "fixes").table.rows)


def test_causes_are_ranked_with_their_share_and_what_to_do() -> None:
    rows = section(attribution_view(faulty()), "causes").table.rows
    assert rows[0] == ("1. in bfloat16, model.layers.11.mlp differs", "–", "Do something about in bfloat16, "
        "model.layers.11.mlp differs.")  # fmt: skip
    assert rows[1] == ("2. decode → prefill", "70.0 %\n[63.0 %, 77.0 %]", "Do something about decode → prefill.")


def test_rungs_settings_and_fixes_are_rows() -> None:
    view = attribution_view(attribution())
    assert row(view, "ladder", "batched") == (
        "batched as it is trained",
        "-30.0 %\n[-33.0 %, -27.0 %]",
        "6.00e-2\n[5.40e-2, 6.60e-2]",
        "-1.00e-3\n[-1.10e-3, -9.00e-4]",
    )
    assert row(view, "knobs", "fp32-head") == (
        "fp32-head changed\nrollout-fp32-head",
        "rollout",
        "0.800\n[0.760, 0.840]",
        "0.640\n[0.576, 0.704]",
        "3.00e-2\n[2.85e-2, 3.15e-2]",
        "1.50×",
        "2.25 GiB\n1.10×",
        "the backend changed with it: A → B",
    )
    assert row(view, "knobs", "prefix-cache")[2] == "1.00\nno token changed"
    assert row(view, "knobs", "float16")[5:] == ("–", "–", "")
    assert [r[0].split()[0] for r in section(view, "knobs").table.rows][:4] == [
        "fp32-head",
        "prefix-cache",
        "batch-1",
        "kv-fp8",
    ]
    assert row(view, "fixes", "head + mlp") == (
        "head + mlp",
        "0.800\n[0.760, 0.840]",
        "0.400\n[0.360, 0.440]",
        "70.0 %",
        "cheapest that meets the target",
    )
    assert row(view, "fixes", "rope") == ("rope", "–", "–", "–", "the model has no rope")


def test_settings_without_a_number_say_why_and_failures_come_first() -> None:
    rows = section(attribution_view(attribution()), "unmeasured").table.rows
    assert rows == (
        ("packed changed\ntrainer-packed", "trainer", "failed", "EngineError: it died"),
        ("compiled changed\ntrainer-compiled", "trainer", "not asked", "slow"),
        ("tensor-parallel changed\nrollout-tensor-parallel", "rollout", "unavailable", "no tensor-parallel here"),
    )


def test_cells_that_are_worse_are_marked() -> None:
    view = attribution_view(attribution())
    assert row(view, "two-sided", "FP16")[1:] == (
        "6.50e-2",
        "9.75e-2\n1.50× [1.43, 1.57]\nlarger than on neither side",
        "9.10e-2\n1.40× [1.33, 1.47]\nlarger than on neither side",
        "6.50e-3\n0.100× [9.50e-2, 0.105]\nsmallest",
    )
    assert row(view, "two-sided", "FP8") == ("FP8 keys and values\nno kv-fp8 here", "–", "–", "–", "–")


def test_of_many_layers_those_that_tell_are_shown() -> None:
    found = section(attribution_view(faulty()), "layers")
    assert [r[0] for r in found.table.rows] == ["0", "2", "4", "6", "7", "8", "10", "11", "12", "14", "15"]
    assert found.table.header == ("layer", "bfloat16", "float16")
    assert found.table.rows[0][1] == "4.00e-3\nscore 0.700, lens 0"
    assert "Of 16 layers, 11 are shown; attribute/attribution.json has them all." in found.text
    few = attribution()
    for dtype in few["layers"]["dtypes"].values():
        dtype["layers"] = dtype["layers"][:8]
    found = section(attribution_view(few), "layers")
    assert len(found.table.rows) == 8
    assert "are shown" not in found.text


def test_modules_are_those_of_the_layer_that_stands_out() -> None:
    found = section(attribution_view(faulty()), "modules")
    assert found.title == "Modules of layer 11"
    assert [r[0] for r in found.table.rows] == ["model.norm\nits own result", "model.layers.11.mlp\nits own result"]
    assert found.table.rows[1][4] == "41.3"
    assert "In bfloat16: the layer that something stands out in" in found.text
    assert "2 of 4 tensors are the same on both sides, bit for bit, and left out." in found.text
    assert section(attribution_view(attribution()), "modules").title == "Modules of layer 7"


def test_what_was_not_looked_into_says_why() -> None:
    assert row(attribution_view(attribution()), "inside", "float32") == (
        "float32",
        "–",
        "–",
        "–",
        "it ran out of memory",
    )


def test_routers_are_a_section_of_models_with_experts() -> None:
    view = attribution_view(attribution(experts=routers()))
    assert "Routers disagree on 5.00 % of the tokens, which make 60.0 % of E[d²]" in view.texts[-1]
    assert "is 64.0 % of what it is with the trainer's own." in view.texts[-1]
    assert row(view, "experts", "lowest agreement")[1] == "96.0 %\nlayer 3"
    assert row(view, "experts", "their share")[1] == "60.0 %\n[54.0 %, 66.0 %]"


def test_parts_that_are_missing_say_why() -> None:
    view = attribution_view(empty())
    assert view.texts == ["The gap of bfloat16 → bfloat16 is not known: no token is finite."]
    shown = {section.name: section.text for section in view.sections}
    assert shown["ladder"] == "Nothing to show here: not measured: resume it."
    assert shown["inside"] == "Nothing to show here: left out: --no-layers."
    assert shown["knobs"] == "No setting was measured."
    assert shown["causes"] == "No cause was found."
    assert set(shown) == {"causes", "ladder", "knobs", "inside", "fixes", "experts"}


def test_what_limits_all_numbers_is_said_once() -> None:
    document = attribution(n_nonfinite=2)
    document["gap"]["rms"]["why"] = "uncalibrated: fewer than 32 prompts"
    notes = attribution_view(document).notes
    assert notes[:2] == [
        "Intervals are uncalibrated: fewer than 32 prompts.",
        "2 tokens are not finite on one side and are left out.",
    ]
    document["gap"]["rms"] = bare(0.0, "there is no gap")
    assert not any("Intervals" in note for note in attribution_view(document).notes)


def test_every_figure_belongs_to_one_section() -> None:
    view = attribution_view(attribution(experts=routers()))
    assert [name for section in view.sections for name in section.figures] == list(ATTRIBUTE_GUIDES)


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.png" for name in ATTRIBUTE_GUIDES}
    for name, path in paths.items():
        path.write_bytes(b"\x89PNG " + name.encode())
    return paths


@pytest.mark.parametrize("make", [attribution, faulty, empty, nulls, hostile])
def test_the_page_takes_it_in_after_the_budget(make: Any, data: ReportData, figures: dict[str, Path]) -> None:
    page = Page(render_html(replace(data, attribution=make()), figures))
    ids = [attributes["id"] for attributes in page.attributes("section")]
    assert ids[ids.index("budget") + 1] == "attribution"
    assert ids[ids.index("attribution") + 1] == "figures"


def test_figures_stand_beside_their_tables(data: ReportData, figures: dict[str, Path]) -> None:
    html = render_html(replace(data, attribution=attribution()), figures)
    section = html.split('<section id="attribution">')[1].split("</section>")[0]
    order = [f'alt="{ATTRIBUTE_GUIDES[f"attribute-{name}"][0]}"' for name in ("ladder", "knobs", "layers", "lens")]
    places = [section.index(text) for text in ('id="attribution-ladder"', *order, 'id="attribution-fixes"')]
    assert places == sorted(places)
    assert "No figures were drawn" not in section
    assert section.count("<img") == len(ATTRIBUTE_GUIDES) - 1


def test_hostile_text_is_shown_as_text(data: ReportData) -> None:
    page = replace(data, attribution=hostile())
    html = render_html(page, {})
    assert "<script" not in html
    assert "\u202e" not in html
    assert "\x1b" not in html
    section = html.split('<section id="attribution">')[1].split("</section>")[0]
    for part in section.split("<h3 "):
        # What is said of routers has no string of the document in it.
        assert "&lt;script&gt;" in part or part.startswith('id="attribution-experts"'), part[:40]
    assert "<script" not in render_markdown(page, {})


def test_a_run_without_one_is_as_it_was(data: ReportData) -> None:
    assert "attribution" not in render_html(data, {})
    assert "Where it comes from" not in render_markdown(data, {})
    with_one = render_html(replace(data, attribution=attribution()), {})
    start = with_one.index('<section id="attribution">')
    end = with_one.index('<section id="figures">')
    assert with_one[:start] + with_one[end:] == render_html(data, {})


def test_markdown_leaves_layers_and_modules_to_the_page(data: ReportData) -> None:
    paths = {name: f"attribute/figures/{name}.png" for name in ATTRIBUTE_GUIDES}
    text = render_markdown(replace(data, attribution=attribution()), paths)
    part = text.split("## Where it comes from")[1].split("\n## ")[0]
    assert "![What each setting does to the gap](attribute/figures/attribute-knobs.png)" in part
    assert "| packed changed<br>trainer-packed | trainer | failed | EngineError: it died |" in part
    assert "### Causes, the largest first" in part
    assert "### Modules" not in part
    assert "### Layer by layer" not in part


def test_a_document_is_not_changed() -> None:
    document = attribution(experts=routers())
    before = json.dumps(document)
    attribution_view(document)
    assert json.dumps(document) == before
