"""Whatever the insides of both models show: what an attribution says of them in one place it says in all."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import given, settings

from mismatch_probe.metrics.conclusions import Left, conclude
from mismatch_probe.probes.attribute.causes import ranked_causes
from mismatch_probe.report.attribute_sections import attribution_view
from mismatch_probe.report.attribute_words import ELSEWHERE
from tests.metrics.insides import results
from tests.report.attribute_documents import attribution, metric, routers

DTYPE = re.compile(r"\b(?:bfloat16|float16|float32)\b")
ROUNDS = re.compile("round differently|Rounding makes")
RUNG = {"key": "engine", "change": "vLLM → Hugging Face, batched alike", "share": metric(0.9)}


def document_of(rows: dict[str, Any], pair: tuple[str, str], left: Left, experts: bool) -> dict[str, Any]:
    document = attribution(experts=routers() if experts else None)
    for row in rows.values():
        layers = [layer | {"relative_error": 1e-3, "lens_kl": None} for layer in row["layers"]]
        beyond = [layer["layer"] for layer in layers if layer["score"] > 2]
        row |= {"why": "", "n_tokens": 9, "n_sequences": 2, "growth_per_layer": metric(1.0), "layers": layers}
        row |= {"first_beyond": min(beyond, default=None), "worst_layer": 0 if layers else None}
        for module in row["modules"]:
            module |= {"engine_error": 0.0}
    document["layers"]["dtypes"] = rows
    document["left_in_fp32"] = {"share": metric(left.share), "rms": metric(left.rms)}
    document["conclusions"] = conclude(rows, pair, left, routers=experts).as_dict()
    document["ladder"] = document["ladder"] | {"rungs": [RUNG | {"rms": metric(0.1), "mean": metric(0.0)}]}
    return document | {"causes": ranked_causes(document)}


@given(results())
@settings(max_examples=120, deadline=None)
def test_sentences_tables_and_causes_agree(given_: tuple[dict[str, Any], tuple[str, str], Left, bool]) -> None:
    document = document_of(*given_)
    view = attribution_view(document)
    concluded, causes = document["conclusions"], document["causes"]
    quiet = DTYPE.findall(next((text for text in view.texts if text.startswith("No single layer")), ""))
    inside = next((s for s in view.sections if s.name == "inside"), None)
    verdicts = {row[0].split("\n")[0]: row[4] for row in inside.table.rows} if inside else {}
    faults = [cause for cause in causes if cause["kind"] == "fault"]
    for dtype, found in concluded["dtypes"].items():
        own = [text for text in view.texts if text.startswith((f"In {dtype},", f"Not detectable in {dtype},"))]
        assert len(own) + (dtype in quiet) == (found["code"] != "not compared")
        assert all(text in verdicts[dtype] for text in own)
        assert ("No single layer stands out" in verdicts[dtype]) == (dtype in quiet)
        named = [cause["text"] for cause in faults if dtype in DTYPE.findall(cause["text"])]
        assert bool(named) == found["fault"] or ELSEWHERE in named
        if found["fault"] and found["code"] != "step":
            assert any(found["located"]["name"] in text for text in named)
    code = concluded["rounding"]["code"]
    said = [cause["action"] for cause in causes if ROUNDS.search(cause["action"])]
    assert bool(said) == (code == "cause")
    refused = [text for text in view.texts if "which is not rounding" in text or "more than FP32 rounds" in text]
    assert len(refused) == (code in ("part", "no cause"))
    # What rounding does not explain comes first.
    assert [cause["kind"] for cause in causes[: len(faults)]] == ["fault"] * len(faults)
