"""The report of `rl sanity-set`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mismatch_probe.report.format import percent
from mismatch_probe.report.model import Report, Step, Text, estimate, fraction, numeric, plain, section, table
from mismatch_probe.report.rl_run import provenance_table
from mismatch_probe.report.words import say

if TYPE_CHECKING:
    from mismatch_probe.report.model import Table
    from mismatch_probe.results.sanity import SanityOutcome, SanitySet


@dataclass(frozen=True)
class SanityData:
    """What the report of a sanity set shows.

    Attributes:
        folder: Its folder.
        document: The content of `sanity.json`.
        model: The model, as the user named it.
        rollout_dtype: What sampled.
        temperature: Sampling temperature.
        train: Options of `rl run` that train on the set.
        longer: Options of `rl sanity-set` that sample again with twice the response budget.
    """

    folder: str
    document: SanitySet
    model: str
    rollout_dtype: str
    temperature: float
    train: tuple[str, ...]
    longer: tuple[str, ...]


def sanity_report(data: SanityData) -> Report:
    """How many problems were kept, what they are worth, and how to train on them."""
    document, outcome = data.document, data.document.outcome
    title = f"Sanity set of {data.model}"
    if outcome is None:
        command = shlex.join(["mismatch-probe", "rl", "sanity-set", "--resume", data.folder])
        step = Step("Sample what is missing.", command)
        return Report(title, "inconclusive", ("Sampling has not ended yet.",), (step,))
    first, *rest = document.findings
    codes = {finding.code for finding in document.findings}
    answer = (say(first), *(say(finding) for finding in rest if finding.code == "sanity-accuracy"))
    notes = [finding for finding in rest if finding.code != "sanity-accuracy"]
    return Report(
        title=title,
        state="warn" if "sanity-nothing-kept" in codes else "ok",
        answer=answer,
        steps=(_step(data, outcome, codes),),
        table=_problems(outcome),
        notes=tuple(Text(say(finding), "note") for finding in notes),
        sections=(
            *section("responses", "Responses", _responses(data, outcome)),
            *section("by-right", "Problems by right responses", _by_right(outcome), depth="detail"),
            *section("provenance", "Provenance", provenance_table(document.provenance), depth="detail"),
        ),
    )


def _step(data: SanityData, outcome: SanityOutcome, codes: set[str]) -> Step:
    if "sanity-nothing-kept" not in codes:
        return Step("Train on the set.", shlex.join(["mismatch-probe", "rl", "run", *data.train]))
    if "sanity-truncated" in codes:
        command = shlex.join(["mismatch-probe", "rl", "sanity-set", *data.longer])
        return Step("Sample again with twice the response budget.", command)
    return Step("Try easier problems." if outcome.n_below > outcome.n_above else "Try harder problems.")


def _problems(outcome: SanityOutcome) -> Table:
    low, high = map(percent, outcome.keep)
    never, always = outcome.problems_by_right[0], outcome.problems_by_right[-1]
    rows = [
        (f"below {low}", outcome.n_below, f"never right: {never:,}"),
        (f"{low} to {high}: kept", outcome.n_kept, ""),
        (f"above {high}", outcome.n_above, f"always right: {always:,}"),
    ]
    cells = [(name, plain(n), fraction(n / outcome.n_problems), note) for name, n, note in rows]
    return table(["accuracy", *numeric("problems", "of all"), "of them"], cells)


def _responses(data: SanityData, outcome: SanityOutcome) -> Table:
    lengths = outcome.response_tokens
    rows = [
        ("responses to each problem", plain(outcome.n_samples)),
        ("rollout dtype", plain(data.rollout_dtype)),
        ("temperature", plain(data.temperature)),
        ("right, all problems", fraction(outcome.accuracy)),
        ("right, kept problems, as sampled", fraction(outcome.accuracy_of_kept_as_sampled)),
        ("right, kept problems, without the luck of the choice", estimate(outcome.accuracy_of_kept_estimate)),
        ("mean length, tokens", plain(lengths.mean)),
        ("median length, tokens", plain(lengths.median)),
        ("90th percentile, tokens", plain(lengths.p90)),
        ("longest, tokens", plain(lengths.max)),
        ("truncated", fraction(outcome.truncated_fraction)),
        ("graded 0 because the grader was stopped", plain(outcome.n_grader_killed)),
    ]
    legend = (
        "Problems are chosen by a noisy accuracy, so the kept ones' accuracy as sampled regresses to the mean on fresh "
        "samples. Without that luck: all samples of a problem but one choose, and the one counts, averaged over which "
        "it is."
    )
    return table(["responses", *numeric("value")], rows, legend)


def _by_right(outcome: SanityOutcome) -> Table:
    rows = [(plain(right), plain(n)) for right, n in enumerate(outcome.problems_by_right) if n]
    return table(numeric(f"right of {outcome.n_samples:,}", "problems"), rows)
