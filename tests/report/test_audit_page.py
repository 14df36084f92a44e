"""The page of an audit: everything in it in order, nothing in it acts, and what is not there is said."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from mismatch_probe.report.audit_page import GUIDES, render_audit
from mismatch_probe.resources import data_path
from tests.report.audit_documents import (
    audit_document,
    bare_document,
    baseline,
    check,
    hostile_document,
    metric,
    pair,
)

if TYPE_CHECKING:
    from pathlib import Path

VOID = {"meta", "img", "br"}
SECTIONS = ["verdict", "pairs", "recommendation", "checks", "others", "range", "weights", "gradients", "pass", "lag"]


class Page(HTMLParser):
    """Tags, attributes, text and rows of cells; fails when elements are not properly nested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text, self.style = "", ""
        self.rows: list[list[str]] = []
        self.blocks: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")
        elif tag == "pre":
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.style += data
            return
        self.text += data
        if "tr" in self._open and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += (" " if self._open[-1] == "small" else "") + data
        if "pre" in self._open:
            self.blocks[-1] += data

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def row(self, *start: str) -> list[str]:
        """The first row whose cells begin with these."""
        found = (
            row
            for row in self.rows
            if len(row) >= len(start) and all(c.startswith(s) for c, s in zip(row, start, strict=False))
        )
        return next(found)


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.png" for name in GUIDES}
    for name, path in paths.items():
        path.write_bytes(b"\x89PNG " + name.encode())
    return paths


def test_the_page_reads_in_order(figures: dict[str, Path]) -> None:
    page = Page(render_audit(audit_document(baseline=baseline()), figures))
    sections = [attributes["id"] for attributes in page.attributes("section")]
    assert sections == [*SECTIONS, "baseline", "missing", "provenance"]
    order = [
        "May smollm2-135m go into RL?",
        "Yes, with warnings: float16 → float16",
        "bfloat16 → bfloat16 (autocast): kl_k3: Evidence of kl_k3.",
        "float32: Evidence of None. About 40 more prompts.",
        "1 check is worse than in the baseline",
        "Evidence of fp16_headroom.",
        "FP16 on both sides: warn.",
        "nothing is known beyond it",
        "smollm2-135m): 1 of 3 checks",
        "the pass was not run",
        "2.13.0",
    ]
    places = [page.text.index(order[0])]
    for text in order[1:]:
        places.append(page.text.index(text, places[-1]))


@pytest.mark.parametrize(
    ("verdict", "words", "state"),
    [
        ("pass", "Yes: float16 → float16", "within"),
        ("warn", "Yes, with warnings: float16 → float16", "not-judged"),
        ("fail", "No: float16 → float16", "exceeded"),
        ("not judged", "Not judged: float16 → float16", "not-judged"),
    ],
)
def test_the_verdict_is_an_answer(verdict: str, words: str, state: str) -> None:
    page = Page(render_audit(audit_document(verdict=verdict), {}))
    assert words in page.text
    assert {"class": f"verdict {state}"} in page.attributes("p")


def test_a_pair_that_was_asked_for_and_is_missing_is_named() -> None:
    document = audit_document(verdict="not judged", decided_by=[])
    document["options"]["pairs"] = ["fp32/fp32"]
    assert "Not judged: fp32/fp32 was asked for and was not compared" in Page(render_audit(document, {})).text
    document["decided_by"] = ["float16 → float16"]
    assert "fp32/fp32 was asked for, float16 → float16 was compared" in Page(render_audit(document, {})).text


def test_no_pair_that_ran_is_said() -> None:
    refused = pair("float16", "float16", "fail", [check("fp16_refusal", "fail", 1.0)])
    refused |= {"n_tokens": 0, "mean_abs_logprob_diff": {**metric(None), "why": "the pair was not run"}}
    document = audit_document(verdict="fail", decided_by=[], pairs=[refused], recommendation=None)
    page = Page(render_audit(document, {}))
    assert "No: no pair of precisions ran" in page.text
    assert page.row("float16 → float16")[2] == "– the pair was not run"
    assert "none can be recommended" in page.text
    assert "Evidence of fp16_refusal." in page.text


def test_the_document_of_these_tests_is_one() -> None:
    schema = json.loads(data_path("audit.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(audit_document())


def test_pairs_and_checks_say_what_was_found() -> None:
    page = Page(render_audit(audit_document(), {}))
    assert page.row("float16 → float16") == [
        "float16 → float16",
        "warn",
        "5.36e-3 [4.82e-3, 5.90e-3]",
        "0",
        "1",
        "1",
        "2",
        "1,877 of 64 prompts",
    ]
    assert page.row("bfloat16 → bfloat16 (autocast)", "fail")[3:7] == ["1", "0", "1", "1"]
    assert page.row("warn", "fp16_headroom") == [
        "warn",
        "fp16_headroom fp16_headroom",
        "2.29 [2.06, 2.52]",
        "warn above fp16_headroom source of fp16_headroom",
        "Evidence of fp16_headroom. model.layers.4",
    ]
    assert page.row("not judged")[:3] == [
        "not judged pass or warn",
        "ess_seq_planned ess_seq_planned",
        "0.930 extrapolated",
    ]
    assert page.row("pass", "kl_k3 kl_k3")
    statuses = [row[0].split(" pass")[0] for row in page.rows if len(row) == 5 and row[0] in {"warn", "pass"}]
    assert statuses == ["warn", "pass", "pass"]


def test_of_other_pairs_only_what_is_not_passed_is_shown() -> None:
    page = Page(render_audit(audit_document(), {}))
    rows = [row for row in page.rows if len(row) == 6 and row[0].startswith("bfloat16 → bfloat16")]
    assert [row[1] for row in rows] == ["fail", "not judged pass or warn"]
    assert rows[1][3] == "– too little data"


def test_the_recommendation_has_its_corrections_and_snippets() -> None:
    page = Page(render_audit(audit_document(), {}))
    assert page.row("sequence truncated") == [
        "sequence truncated importance sampling seq-tis, recommended",
        "capped at 3",
        "0.200 % [0.180 %, 0.220 %]",
    ]
    assert page.row("geometric mean geometric")[1] == "masked outside [0.999, 1.001]"
    assert page.row("geometric mean seq-mis")[1:] == ["masked above 1.001", "– too little data"]
    assert page.blocks == ["GRPOConfig(\n    fp16=True,\n)", "vllm serve smollm2-135m"]


def test_the_range_says_how_far_it_was_seen() -> None:
    page = Page(render_audit(audit_document(), {}))
    for text in (
        "over 2,607 tokens of 64 sequences of 64 prompts",
        "The longest context seen is 48 tokens: nothing is known beyond it.",
        "0 of 2,607 tokens have an activation of 65,520 or more (0 %, at most 5.60 % with 95 % confidence).",
        "Half of the largest peak is first reached at model.layers.4.",
        "fused attention keeps them in FP32",
    ):
        assert text in page.text
    assert page.row("residual model.layers.4") == [
        "residual model.layers.4",
        "25,600",
        "25,600",
        "2,560",
        "256",
        "2.56",
        "none",
    ]
    assert page.row("attention product scores")[-2:] == ["0.936", "float16"]
    start = page.rows.index(
        ["tensor", "kind", "peak", "first token", "rest", "overflows", "not finite in FP32", "where"]
    )
    worst = page.rows[start + 1 : start + 11]
    assert [row[0] for row in worst[:3]] == ["scores", "model.layers.4", "model.layers.3"]
    assert worst[0][5:] == ["3", "0", "sequence 49, token 0"]


def test_what_is_not_finite_comes_first_and_a_first_overflow_is_named() -> None:
    document = audit_document()
    forward = document["range"]["forward"]
    forward["tensors"][7] |= {"n_nonfinite": 2, "peak": 0.0}
    forward["kinds"]["residual"] |= {"n_nonfinite": 2, "peak": 0.0}
    forward |= {"first_overflow": "model.layers.2.mlp"}
    forward["overflow_tokens"] = {"value": 0.5, "ci_low": None, "ci_high": None, "n": 1300}
    page = Page(render_audit(document, {}))
    assert (
        "1,300 of 2,607 tokens have an activation of 65,520 or more (50.0 %), first at model.layers.2.mlp." in page.text
    )
    assert page.row("model.layers.2.mlp", "mlp product")[6] == "2"
    assert page.row("residual")[1:2] + page.row("residual")[5:6] == ["– 2 not finite in FP32", "–"]


def test_tables_hold_the_worst_ten() -> None:
    page = Page(render_audit(audit_document(), {}))
    weights = [row for row in page.rows if len(row) == 8 and row[0].endswith(".weight")]
    assert [row[0] for row in weights] == [f"model.layers.{i}.weight" for i in range(11, 1, -1)]
    assert weights[0][1:3] == ["1.20e-3", "1.20e-2"]
    gradients = [row[0] for row in page.rows if len(row) == 6 and row[0].startswith("tensor ")]
    assert gradients == [f"tensor {i}" for i in (*range(13, 3, -1), *range(13, 3, -1))]
    assert page.row("tensor 13") == ["tensor 13", "2^27", "65.0 %", "2^13", "1.00e-3", "0"]


def test_gradients_pass_and_lag_are_said_in_words() -> None:
    page = Page(render_audit(audit_document(), {}))
    for text in (
        "with N = 131,072 tokens a step",
        "turns 6.53 % of Σ|g| into 0",
        "Loss scales from 2^13 to 2^26 serve every tensor: below, lm_head (activation) loses",
        "it ends at 2^18 to 2^19 and skips 7 of 6,000 simulated steps",
        "4 sequences ran forward and backward in FP16 (cast) with every tensor finite, at a loss scale of 2^15.",
        "139,264 sampled weights, and 12 without a gradient",
    ):
        assert text in page.text
    assert page.row("2^16") == ["2^16", "finite", "model.norm.weight"]
    assert page.row("float16 steady") == [
        "float16 steady",
        "0.550 %",
        "2.00e-3 [1.80e-3, 2.20e-3]",
        "4.00e-6 [3.60e-6, 4.40e-6]",
    ]
    assert page.row("bfloat16 rate 1e-06")[3:] == ["5,453", "over 500 25.0 % in 500", "13 50.0 % in 500"]
    assert page.row("float16 rate 1e-05")[4] == "26 25.0 % in 500"


def test_scales_that_serve_nothing_and_a_pass_that_fails_are_said() -> None:
    document = audit_document()
    backward, proof = document["range"]["backward"], document["range"]["proof"]
    backward["scales"] |= {"low": 20, "high": 12}
    backward |= {"overflow_at_start": "model.norm.weight"}
    proof |= {"finite": False, "exponent": None, "first_nonfinite_forward": "model.layers.3"}
    proof["attempts"] = [{"exponent": 16, "forward": "model.layers.3", "backward": None}]
    page = Page(render_audit(document, {}))
    assert "No loss scale serves every tensor: model.embed_tokens.weight overflows above 2^12" in page.text
    assert "At the usual first scale of 2^16 model.norm.weight overflows first." in page.text
    assert "the forward pass is not finite, first at model.layers.3" in page.text
    assert page.row("2^16") == ["2^16", "model.layers.3", "–"]
    backward |= {"scales": None, "scaler": None, "tensors": []}
    text = Page(render_audit(document, {})).text
    assert "No loss scale can be named" in text
    assert "No dynamic scaler was simulated" in text


def test_a_baseline_has_its_regressions_first() -> None:
    page = Page(render_audit(audit_document(baseline=baseline()), {}))
    rows = [row for row in page.rows if len(row) == 5 and row[0].endswith("float16 → float16")]
    assert [row[0].split()[0] for row in rows] == ["kl_k3", "kl_k3", "kl_k1", "chi2_token"]
    assert rows[0] == [
        "kl_k3 float16 → float16",
        "1.00e-4 pass",
        "2.00e-4 warn",
        "×2.00 [1.80, 2.20]",
        "pass before, warn now",
    ]
    assert rows[2][3:] == ["–", "it can no longer be judged"]
    assert rows[3][3] == "+0.250"
    assert page.row("versions.torch") == ["versions.torch", "2.12.0", "2.13.0"]
    assert page.row("options.learning_rates")[1:] == ["–", "[1e-06, 1e-05]"]
    assert "No longer checked: fp32_floor of float16 → float16." in page.text


def test_a_baseline_that_is_equal_says_so() -> None:
    same = baseline() | {"regressions": [], "changed": [], "gone": []}
    for row in same["checks"]:
        row["regressed"] = False
    page = Page(render_audit(audit_document(baseline=same), {}))
    assert "none of 3 checks that both have are worse" in page.text
    assert "Nothing is recorded to differ in how they were made." in page.text
    assert "Regressions" not in page.text
    assert "worse than in the baseline" not in page.text


def test_an_empty_audit_says_what_is_not_there() -> None:
    page = Page(render_audit(bare_document(), {}))
    sections = [attributes["id"] for attributes in page.attributes("section")]
    assert sections == [*SECTIONS, "missing", "provenance"]
    for sentence in (
        "Not judged: no pair of precisions was compared",
        "none can be recommended",
        "No pair decides",
        "No other pair has a check that is not passed.",
        "Nothing that was asked for.",
    ):
        assert sentence in page.text
    assert page.text.count("This was not measured.") == 5


@pytest.mark.parametrize("part", ["weights", "forward", "backward", "lag", "proof"])
def test_any_part_may_be_absent(part: str, figures: dict[str, Path]) -> None:
    document = audit_document()
    document["range"][part] = None
    page = Page(render_audit(document, figures))
    assert page.text.count("This was not measured.") == 1
    assert len(page.attributes("img")) == 3 - (part in {"forward", "backward", "lag"})


def test_figures_are_embedded_in_their_sections_with_a_guide_each(figures: dict[str, Path]) -> None:
    page = Page(render_audit(audit_document(), figures))
    images = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.attributes("img")]
    assert images == [figures[name].read_bytes() for name in GUIDES]
    assert len(page.attributes("figcaption")) == len(GUIDES)
    assert not Page(render_audit(audit_document(), {})).attributes("img")


def test_long_tables_are_folded_but_never_the_checks_that_decide() -> None:
    many = [check(f"check_{i}", "warn") for i in range(20)]
    pairs = [pair("float16", "float16", "warn", many), pair("bfloat16", "bfloat16", "warn", many)]
    html = render_audit(audit_document(pairs=pairs), {})
    assert re.findall(r"<summary>(.*?)</summary>", html) == ["20 rows", "12 entries"]
    checks = html[html.index('<section id="checks">') : html.index('<section id="others">')]
    assert "<details>" not in checks


@pytest.mark.parametrize("make", [audit_document, bare_document, hostile_document])
def test_nothing_in_the_page_acts_or_leaves_it(make: Any, figures: dict[str, Path]) -> None:
    html = render_audit(make(), figures)
    page = Page(html)
    assert not {"script", "iframe", "a", "link", "object", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on") or name in {"style", "href", "srcset"}}
        assert attributes.get("src", "data:").startswith("data:")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", html)
    html.encode("utf-8")
    (policy,) = [meta["content"] for meta in page.attributes("meta") if "http-equiv" in meta]
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:")
    assert f"style-src 'sha256-{digest}'" in policy


def test_hostile_text_is_shown_as_text_everywhere() -> None:
    html = render_audit(hostile_document(), {})
    shown = "<script>alert(1)</script>⟨U+001B⟩[31m⟨U+202E⟩[bold]|`$x$`"
    page = Page(html)
    assert "<script" not in html
    assert page.blocks[0].startswith(f"GRPOConfig(\n    fp16=True,\n)\n</td>{shown}")
    for section in html.split("<section ")[1:]:
        assert "&lt;script&gt;" in section, section[:40]


def test_every_table_image_and_snippet_scrolls_in_a_box_of_its_own(figures: dict[str, Path]) -> None:
    page = Page(render_audit(audit_document(baseline=baseline()), figures))
    for index, (tag, _) in enumerate(page.tags):
        if tag in {"table", "img", "pre"}:
            box, attributes = page.tags[index - 1]
            assert (box, attributes["class"]) == ("div", "scroll")
            assert attributes["aria-label"]
