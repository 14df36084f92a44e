"""What a run folder is, how far it has come, and what continues it: `show` and `runs`. Reads documents, no table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mismatch_probe.errors import TableError
from mismatch_probe.files import in_use
from mismatch_probe.results.finding import Finding
from mismatch_probe.runs.folder import (
    COMPARISON,
    DUMP,
    RL_RUN,
    SANITY_SET,
    SWEEP,
    UNRELEASED,
    Kind,
    kind_of,
    read_document,
)
from mismatch_probe.runs.measurements import failures

if TYPE_CHECKING:
    from mismatch_probe.results.rl_run import Provenance

SET = "sanity-set.jsonl"
# Files that a reader opens, where they are there.
_DOCUMENTS = (
    *("summary.json", "summary.csv", "report.html", "report.md", "sequences.parquet", "tokens.parquet"),
    "recorded.parquet",
    *("steps.parquet", "rollouts.parquet", "runs.parquet", "samples.parquet", SET),
    *("audit/audit.json", "audit/junit.xml", "audit/report.html"),
    *("attribute/attribution.json", "attribute/report.html", "gradient/gradient.json", "gradient/report.html"),
)


@dataclass(frozen=True)
class Missing:
    """Something that a run has not got yet.

    Attributes:
        what: A pass, a run of a sweep, or a document.
        why: The reason; empty where it was not tried.
    """

    what: str
    why: str = ""


@dataclass(frozen=True)
class RunState:
    """A run folder.

    Attributes:
        path: The folder.
        kind: What it is.
        status: `running`, `interrupted`, `failed`, `incomplete`, `complete`, `collapsed` or `diverged`.
        model: Its name.
        created: Local time at which it began, ISO 8601.
        missing: What has not run.
        resume: The command that runs it; empty where nothing is missing.
        documents: Files of results, relative to the folder.
        finding: The first one of its document; None where there is none yet.
    """

    path: Path
    kind: Kind
    status: str
    model: str
    created: str
    missing: tuple[Missing, ...]
    resume: str
    documents: tuple[str, ...]
    finding: Finding | None


def state_of(path: Path) -> RunState:
    """How far a run has come.

    Raises:
        TableError: The folder holds no run, or its document cannot be read.
    """
    kind = kind_of(path)
    if kind is None:
        fix = f"Name a folder that `mismatch-probe runs FOLDER` lists. {UNRELEASED}"
        raise TableError(f"{path} holds no run.", fix)
    read = {COMPARISON: _comparison, RL_RUN: _rl_run, SWEEP: _sweep, SANITY_SET: _sanity_set, DUMP: _dump}
    return read[kind](path)


def states_of(folder: Path) -> tuple[list[RunState], dict[str, str]]:
    """The runs in a folder by date, and by name why others cannot be read.

    Raises:
        TableError: The folder cannot be read.
    """
    found, damaged = [], {}
    try:
        paths = sorted(path for path in folder.iterdir() if kind_of(path) is not None)
    except OSError as error:
        raise TableError(f"{folder} cannot be read ({error.strerror}).", "Name the folder of the runs.") from None
    for path in paths:
        try:
            found.append(state_of(path))
        except TableError as error:
            damaged[path.name] = error.what
    return sorted(found, key=lambda state: (state.created, state.path)), damaged


def _state(
    path: Path,
    kind: Kind,
    status: str,
    about: tuple[str, str],
    missing: Iterable[Missing],
    findings: tuple[Finding, ...],
    resume: str = "",
) -> RunState:
    left = tuple(missing)
    if status == "running" and not in_use(path):
        status = "interrupted"  # its process was killed
    there = tuple(name for name in (kind.file, *_DOCUMENTS) if (path / name).is_file())
    command = (resume or kind.resume(path)) if left else ""
    return RunState(path, kind, status, *about, left, command, there, findings[0] if findings else None)


def _comparison(path: Path) -> RunState:
    from mismatch_probe.results.comparison import Comparison
    from mismatch_probe.results.manifest import Manifest
    from mismatch_probe.runs.passes import passes_of

    manifest = read_document(path, COMPARISON, Manifest)
    wanted, missing, resume = passes_of(manifest.config, manifest.recorded), [], ""
    for name in dict.fromkeys(map(str, (*wanted.rollouts, *wanted.trainers, *wanted.scored))):
        record = manifest.passes.get(name)
        if record is None or record.status == "failed" or record.extension_failure:
            missing.append(Missing(name, "" if record is None else record.why or record.extension_failure))
    summary = path / "summary.json"
    if not missing and not summary.exists():
        missing.append(Missing(summary.name))
        resume = f"mismatch-probe report {path}"
    for command, file, asked in (
        ("audit", "audit/audit.json", manifest.audit is not None),
        ("attribute", "attribute/attribution.json", manifest.attribution is not None),
        ("rl gradient", "gradient/gradient.json", (path / "gradient").is_dir()),
    ):
        left = [Missing(file)] if asked and not (path / file).exists() else []
        if command == "attribute":
            left += [Missing(name, why) for name, why in failures(path / command / "passes").items()]
        if left:
            missing += left
            resume = f"mismatch-probe {command} --resume {path}"
    findings = Comparison.read(summary).findings if summary.exists() else ()
    about = manifest.model.name, manifest.created
    return _state(path, COMPARISON, manifest.status, about, missing, findings, resume)


def _rl_run(path: Path) -> RunState:
    from mismatch_probe.results.rl_run import RlRun

    document = read_document(path, RL_RUN, RlRun)
    missing = []
    if document.ending is None:
        missing.append(Missing(f"steps {_steps(path)} to {int(str(document.config['steps'])) - 1}"))
    status = "running" if document.ending is None else document.ending.status
    return _state(path, RL_RUN, status, _about(document.provenance), missing, document.findings)


def _about(provenance: Provenance) -> tuple[str, str]:
    return provenance.model.name, provenance.created


def _steps(path: Path) -> int:
    """Finished steps; a process that was killed while it wrote leaves half a line."""
    try:
        lines = (path / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    return sum(line.endswith("}") for line in lines)


def _sweep(path: Path) -> RunState:
    from mismatch_probe.results.rl_run import FailedRun
    from mismatch_probe.results.sweep import RlSweep

    document = read_document(path, SWEEP, RlSweep)
    missing = []
    for run in document.runs:
        failure = path / "runs" / run.name / "failed.json"
        if failure.exists():
            missing.append(Missing(run.name, FailedRun.read(failure).why))
        elif not _ended(path / "runs" / run.name / RL_RUN.file):
            missing.append(Missing(run.name))
    tried = document.summary is not None and all(one.why for one in missing)
    status = "running" if not tried else "incomplete" if missing else "complete"
    return _state(path, SWEEP, status, _about(document.provenance), missing, document.findings)


def _ended(file: Path) -> bool:
    """Whether an RL run has ended."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["ending"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sanity_set(path: Path) -> RunState:
    from mismatch_probe.results.sanity import SanitySet

    document = read_document(path, SANITY_SET, SanitySet)
    status, missing = ("running", [Missing(SET)]) if document.outcome is None else ("complete", [])
    return _state(path, SANITY_SET, status, _about(document.provenance), missing, document.findings)


def _dump(path: Path) -> RunState:
    from mismatch_probe.results.dump import Dump

    document = read_document(path, DUMP, Dump)
    facts = document.recorded.file
    return _state(path, DUMP, "complete", (facts.path, document.created), [], facts.findings)
