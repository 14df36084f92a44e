"""The report of `preflight`."""

from __future__ import annotations

from mismatch_probe.report.format import count, size
from mismatch_probe.report.model import STATES, Report, Section, State, Step, Text, Tone, plain, section, table
from mismatch_probe.report.words import all_words, say
from mismatch_probe.results.finding import Finding, Severity
from mismatch_probe.results.preflight import Preflight

_TONES: dict[Severity, Tone] = {"fail": "fail", "warn": "warn", "note": "note", "info": "dim"}


def preflight_report(document: Preflight) -> Report:
    """What will fail, what surprises, and what was read."""
    fails, warnings = document.of("fail"), document.of("warn", "note")
    worst: Severity = document.findings[0].severity if document.findings else "info"
    state: State = STATES["warn"] if worst == "note" else STATES[worst]
    if fails:
        answer = f"{_counted(len(fails), 'problem')} will stop the engines, or make them different models."
    elif warnings:
        answer = f"The checkpoint can be compared; {_counted(len(warnings), 'finding')} may surprise."
    else:
        answer = "The checkpoint can be compared."
    command = "" if fails else f"mismatch-probe compare --model {document.model}"
    fix = all_words()[fails[0].code].fix if fails else "Measure the mismatch:"
    return Report(
        title=f"Preflight of {document.model}",
        state=state,
        answer=(answer,),
        steps=(Step(fix, command),),
        notes=tuple(preflight_note(finding) for finding in document.findings),
        sections=(*_facts(document), *_checks(document)),
    )


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def preflight_note(finding: Finding) -> Text:
    """A finding with what to do about it."""
    fix = all_words()[finding.code].fix
    advice = f" {fix}" if fix and finding.severity in ("fail", "warn") else ""
    return Text(f"{finding.severity}: {say(finding)}{advice}", _TONES[finding.severity])


def _facts(document: Preflight) -> tuple[Section, ...]:
    facts = document.checkpoint
    rows = [
        ("architecture", plain(facts.architecture or facts.model_type)),
        ("weights", plain(count(facts.parameters))),
        ("stored as", plain(", ".join(facts.dtypes) or facts.format)),
        ("files", plain(f"{facts.files:,} ({size(facts.bytes)})")),
        ("context, tokens", plain(count(facts.context))),
        ("vocabulary", plain(count(facts.vocabulary))),
    ]
    return section("checkpoint", "Checkpoint", table(["", "value"], rows), depth="screen")


def _checks(document: Preflight) -> tuple[Section, ...]:
    skipped = [run for run in document.checks if run.skipped_for]
    rows = [(plain(run.name), plain(", ".join(run.skipped_for))) for run in skipped]
    legend = f"{len(document.checks) - len(skipped)} of {len(document.checks)} checks ran in {document.seconds:.2f} s."
    return section("checks", "Checks that did not run", table(["check", "not known"], rows, legend), depth="page")
