"""The report of `preflight`."""

from __future__ import annotations

import pytest

from mismatch_probe.report.preflight import preflight_report
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.preflight import CheckpointFacts, CheckRun, Preflight
from tests.frozen import FROZEN
from tests.snapshot import assert_snapshots

TRUNCATED = Finding(
    code="weights-truncated", severity="fail", where="model-2.safetensors", values={"bytes": 10, "wanted": 20}
)
SAMPLING = Finding(
    code="sampling-changed", severity="warn", where="generation_config.json", values={"top_p": 0.8, "top_k": 20.0}
)
STOPS = Finding(code="stops-added", severity="info", where="generation_config.json", values={"ids": "7"})


def document(*findings: Finding) -> Preflight:
    facts = CheckpointFacts(
        model_type="llama",
        architecture="LlamaForCausalLM",
        format="safetensors",
        files=2,
        bytes=13_476_839_424,
        tensors=291,
        parameters=6_738_415_616,
        dtypes={"BF16": 6_738_415_616},
        context=4096,
        vocabulary=32_000,
    )
    checks = (CheckRun(name="weights"), CheckRun(name="shapes", skipped_for=("tensors",)))
    return Preflight(
        schema_version=1,
        tool_version="0.1.0",
        model="models/\x1b[31mllama",
        revision=None,
        checkpoint=facts,
        checks=checks,
        findings=findings,
        seconds=0.25,
    )


def test_snapshot() -> None:
    assert_snapshots("preflight", preflight_report(document(TRUNCATED, SAMPLING, STOPS)))


def test_the_frozen_document_is_this_one() -> None:
    assert Preflight.read(FROZEN / "documents" / "preflight-1.json") == document(TRUNCATED, SAMPLING, STOPS)


@pytest.mark.parametrize(
    ("findings", "state", "runs"),
    [((), "ok", True), ((STOPS,), "ok", True), ((SAMPLING, STOPS), "warn", True), ((TRUNCATED, STOPS), "fail", False)],
)
def test_state_and_next_step(findings: tuple[Finding, ...], state: str, runs: bool) -> None:
    report = preflight_report(document(*findings))
    assert report.state == state
    assert bool(report.steps[0].command) == runs
    assert len(report.notes) == len(findings)
