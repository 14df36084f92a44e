"""The report of `rl sanity-set`, and how its findings go together."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mismatch_probe.report.sanity import sanity_report
from tests.factories.sanity import sanity_data, sanity_set
from tests.snapshot import assert_snapshots


def test_snapshot() -> None:
    document = sanity_set([0, 1, 3, 5, 5, 6, 8, 9, 10, 10], stopped=2)
    assert_snapshots("sanity", sanity_report(sanity_data(document)))


@pytest.mark.parametrize(
    ("right", "truncated", "codes", "state", "command"),
    [
        ([0, 5, 10], 0.0, ["sanity-kept", "sanity-accuracy"], "ok", "mismatch-probe rl run"),
        ([5, 5, 5], 0.9, ["sanity-kept", "sanity-accuracy", "sanity-truncated"], "ok", "mismatch-probe rl run"),
        ([0, 0, 10], 0.0, ["sanity-nothing-kept"], "warn", ""),
        ([0, 0, 0], 1.0, ["sanity-nothing-kept", "sanity-truncated"], "warn", "mismatch-probe rl sanity-set"),
        ([8], 0.0, ["sanity-kept", "sanity-accuracy"], "ok", "mismatch-probe rl run"),
    ],
)
def test_findings_and_next_step(
    right: Sequence[int], truncated: float, codes: list[str], state: str, command: str
) -> None:
    document = sanity_set(right, truncated=truncated)
    assert [finding.code for finding in document.findings] == codes
    report = sanity_report(sanity_data(document))
    (step,) = report.steps
    assert report.state == state
    assert step.command.startswith(command)
    assert bool(step.command) == bool(command)
    assert len(report.answer) <= 2


def test_an_unfinished_set_is_continued() -> None:
    document = sanity_set([5]).model_copy(update={"outcome": None, "findings": ()})
    report = sanity_report(sanity_data(document))
    assert report.state == "inconclusive"
    assert report.steps[0].command == "mismatch-probe rl sanity-set --resume 'runs/my set'"
