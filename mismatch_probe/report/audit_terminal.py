"""What an audit says in a few lines: the verdict, the pairs, the checks that are not passed, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from mismatch_probe.report.format import interval, number, visible
from mismatch_probe.report.names import precision_label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

STATUSES = ("fail", "warn", "not judged", "pass")
"""What a check or a pair can be, the worst first."""
_ANSWERS = {"pass": "Yes", "warn": "Yes, with warnings", "fail": "No", "not judged": "Not judged"}
_STYLES = {"fail": "bold red", "warn": "yellow", "not judged": "yellow", "pass": "green"}
_GAP = "mean_abs_logprob_diff"


def question(document: Mapping[str, Any]) -> str:
    """What the audit was asked."""
    return f"May {visible(document['model'])} go into RL?"


def answer(document: Mapping[str, Any]) -> str:
    """The verdict in words, and of which pairs it is."""
    names = ", ".join(visible(name) for name in document["decided_by"])
    wanted = ", ".join(visible(name) for name in document["options"]["pairs"])
    if wanted and document["verdict"] == "not judged":
        names = f"{wanted} was asked for" + (f", {names} was compared" if names else " and was not compared")
    why = "no pair of precisions ran" if document["pairs"] else "no pair of precisions was compared"
    return f"{_ANSWERS[document['verdict']]}: {names or why}"


def precision_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(verdict, sentence) of each precision that the model could be trained in: what decides, and what would settle."""
    rows = []
    for found in document["precisions"]:
        name = visible(found["pair"] or found["dtype"])
        check = f"{visible(found['check'])}: " if found["check"] else ""
        rows.append(
            (found["verdict"], f"{name}: {check}{visible(found['evidence'])} {visible(found['settle'])}".rstrip())
        )
    return rows


def deciding_pairs(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pairs that the verdict is of."""
    return [pair for pair in document["pairs"] if precision_label(pair) in document["decided_by"]]


def by_status(checks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Checks with the worst first, those of one status in the profile's order."""
    return sorted(checks, key=lambda check: STATUSES.index(check["status"]))


def counts(checks: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many checks have each status."""
    return {status: sum(check["status"] == status for check in checks) for status in STATUSES}


def print_audit(document: Mapping[str, Any], console: Console) -> None:
    """Prints the verdict, then its reasons, then the recommendation; needs 80 columns."""
    console.print(Text(f"{question(document)} {answer(document)}", style=_STYLES[document["verdict"]]))
    rows = [(Text(state, style=_STYLES[state]), Text(text)) for state, text in precision_rows(document)]
    console.print(_hanging(rows))
    if document["profile"]["description"]:
        profile = document["profile"]
        console.print(Text(f"Profile {visible(profile['name'])}: {visible(profile['description'])}", style="dim"))
    if document["pairs"]:
        console.print()
        console.print(_pairs_table(document["pairs"]))
    for pair in deciding_pairs(document):
        _print_checks(pair, console)
    if document["recommendation"] is not None:
        _headline("Recommendation", console)
        console.print(_hanging([(Text("·"), Text(visible(t))) for t in document["recommendation"]["sentences"]]))
    if document["baseline"] is not None:
        _print_baseline(document["baseline"], console)
    if document["missing"]:
        console.print()
    for row in document["missing"]:
        console.print(Text(f"Missing: {visible(row['what'])}: {visible(row['why'])}", style="yellow"))


def _headline(text: str, console: Console) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _hanging(rows: Sequence[tuple[Text, Text]]) -> Table:
    """Each row's text beside its mark, wrapped under itself."""
    lines = Table.grid(padding=(0, 1, 0, 0))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for row in rows:
        lines.add_row(*row)
    return lines


def _pairs_table(pairs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("rollout → trainer")
    table.add_column("verdict", no_wrap=True)
    for name in ("mean |d| (nats)", "fail", "warn", "not judged"):
        table.add_column(name, justify="right", no_wrap=name != "not judged")
    for pair in pairs:
        gap, found = pair[_GAP], counts(pair["checks"])
        estimate = Text(number(gap["value"]))
        limits = interval(gap["ci_low"], gap["ci_high"], digits=2)
        estimate.append(f" {limits}" if limits else "", style="dim")
        verdict = Text(pair["verdict"], style=_STYLES[pair["verdict"]])
        numbers = (str(found[status]) for status in ("fail", "warn", "not judged"))
        table.add_row(Text(visible(precision_label(pair))), verdict, estimate, *numbers)
    return table


def _print_checks(pair: Mapping[str, Any], console: Console) -> None:
    """A line for each check that is not passed, and how many are."""
    checks = [check for check in by_status(pair["checks"]) if check["status"] != "pass"]
    _headline(f"Checks of {visible(precision_label(pair))}", console)
    rows = []
    for check in checks:
        line = Text(visible(check["name"]), style="bold")
        line.append(f": {visible(check['evidence'])}", style="not bold")
        rows.append((Text(check["status"], style=_STYLES[check["status"]]), line))
    passed = f"{len(pair['checks']) - len(checks)} of {len(pair['checks'])} checks"
    console.print(_hanging([*rows, (Text("pass", style=_STYLES["pass"]), Text(passed))]))


def _print_baseline(baseline: Mapping[str, Any], console: Console) -> None:
    _headline(f"Against {visible(baseline['source'])}", console)
    for row in baseline["regressions"]:
        text = f"{visible(row['name'])} of {visible(precision_label(row))}: {visible(row['why'])}"
        values = "" if row["change"] is None else f" ({number(row['before'])} → {number(row['after'])})"
        console.print(Text(f"Worse: {text}{values}", style=_STYLES["fail"]))
    if not baseline["regressions"]:
        console.print(Text(f"None of {len(baseline['checks'])} checks is worse."))
    for name in baseline["gone"]:
        console.print(Text(f"No longer checked: {visible(name)}", style="yellow"))
