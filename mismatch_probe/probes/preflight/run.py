"""Runs the checks: for `mismatch-probe preflight`, and before a command starts an engine."""

from __future__ import annotations

import time
from collections import Counter

from mismatch_probe.engines.models import ModelRef
from mismatch_probe.errors import ModelError
from mismatch_probe.probes.preflight import Subject, Use, all_checks
from mismatch_probe.probes.progress import Progress
from mismatch_probe.report.words import all_words, say
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.preflight import CheckpointFacts, CheckRun, Preflight

_SEVERITIES = ("fail", "warn", "note", "info")
_MOST_LINES = 4


def preflight(model: ModelRef, use: Use) -> Preflight:
    """Runs every check whose needs are met."""
    began = time.perf_counter()
    subject = Subject(model, use)
    runs, findings = [], list[Finding]()
    for one in all_checks().values():
        unmet = tuple(need for need in one.needs if not subject.has(need))
        runs.append(CheckRun(name=one.name, skipped_for=unmet))
        findings += [] if unmet else one.look(subject)
    findings.sort(key=lambda finding: _SEVERITIES.index(finding.severity))
    return Preflight(
        **Preflight.stamp(),
        model=model.name,
        revision=model.revision,
        checkpoint=_facts(subject),
        checks=tuple(runs),
        findings=tuple(findings),
        seconds=time.perf_counter() - began,
    )


def _facts(subject: Subject) -> CheckpointFacts:
    checkpoint = subject.checkpoint
    dtypes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] += tensor.elements
    vocabulary = subject.config.get("vocab_size")
    return CheckpointFacts(
        model_type=subject.model_type,
        architecture=next((str(name) for name in subject.model.config.get("architectures") or ()), ""),
        format=checkpoint.format,
        files=len(checkpoint.files),
        bytes=checkpoint.bytes,
        tensors=len(checkpoint.tensors),
        parameters=checkpoint.parameters,
        dtypes=dict(dtypes),
        context=subject.model.context,
        vocabulary=vocabulary if isinstance(vocabulary, int) else None,
    )


def guard(model: ModelRef, use: Use, progress: Progress) -> None:
    """Stops what will fail before an engine starts, and says what surprises in a line each.

    Raises:
        ModelError: Something will fail.
    """
    if model.scripted:
        return
    found = preflight(model, use)
    fails, warnings = found.of("fail"), found.of("warn", "note")
    command = f"mismatch-probe preflight {model.name}"
    if fails:
        first, others = fails[0], len(fails) - 1
        more = f" `{command}` lists {others} more {'reason' if others == 1 else 'reasons'}." if others else ""
        raise ModelError(say(first), all_words()[first.code].fix + more)
    for warning in warnings[:_MOST_LINES]:
        progress.message(f"Note: {say(warning)}")
    if len(warnings) > _MOST_LINES:
        progress.message(f"{len(warnings) - _MOST_LINES} more: {command}")
