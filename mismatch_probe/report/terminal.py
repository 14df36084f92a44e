"""The summary that a finished run leaves on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from mismatch_probe.report import view
from mismatch_probe.report.format import clipped, count, interval, number
from mismatch_probe.report.matrix import DEFAULT_METRIC, has_exact, modes_of

if TYPE_CHECKING:
    from rich.console import Console

    from mismatch_probe.report.data import ReportData

ROOMY_FROM = 100
_TOKEN_CHARACTERS = 24
_LEGEND = (
    "|Δlogp|: a token's log-prob at the trainer against the rollout engine, in nats [95 % interval over prompts]. "
    "self-noise: mean |Δlogp| of an engine against itself. KL k3: sampled estimate of KL(μ‖π), nats per token{exact}. "
    "ESS: share of sequences left after importance weighting. worst: largest |Δlogp| of a token."
)
_EXACT_LEGEND = "; KL exact: the same from full rows of logits"
_STYLES = {"fail": "bold red", "inconclusive": "yellow", "ok": "green"}


def print_summary(data: ReportData, console: Console) -> None:
    """Print the table of pairs, then findings, limits, and what limits the numbers.

    Needs 80 columns; from 100 on an interval stands beside its value. Control characters in names and text are spelled
    out.
    """
    modes = modes_of(data.summary)
    title = f"Rollout–trainer mismatch of {view.model_name(data)}"
    if len(modes) == 1:
        title += f" (trainer: {modes[0]})"
    console.print(Text(title, style="bold"))
    if data.summary.pairs:
        exact = has_exact(data.summary)
        console.print(_pairs_table(data, roomy=console.width >= ROOMY_FROM, exact=exact))
        console.print(Text(_LEGEND.format(exact=_EXACT_LEGEND if exact else ""), style="dim"))
    else:
        console.print(Text("No pair was compared."))
    console.print()
    for index, text in enumerate(view.findings(data)):
        console.print(Text(text, style="bold" if index < view.HEADLINES else ""))
    for pair, why in view.missing_lines(data.summary):
        console.print(Text(f"Missing: {pair}: {why}", style="yellow"))
    for note in view.notes(data):
        console.print(Text(f"Note: {note}", style="yellow"))
    _print_worst(data, console)
    for line in view.limit_lines(data.summary):
        console.print(Text(f"Limit {line.state}: {line.text}", style=_STYLES[line.state]))


def _pairs_table(data: ReportData, *, roomy: bool, exact: bool) -> Table:
    """A row per pair; where room is short, the interval stands below its value and the exact KL below its estimate."""
    keys = [key for key in view.HEADLINE_METRICS if key != DEFAULT_METRIC and (exact or key != "kl_exact")]
    names = {key: view.HEADLINE_METRICS[key] for key in keys}
    if exact and not roomy:
        names["kl_k3"] = f"{names['kl_k3']}\n{names.pop('kl_exact')}"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("rollout → trainer")
    for name in (view.HEADLINE_METRICS[DEFAULT_METRIC], "self-noise", *names.values(), "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, pair in view.pair_rows(data.summary):
        mean = pair.metrics[DEFAULT_METRIC]
        limits = interval(mean.ci_low, mean.ci_high, digits=3 if roomy else 2)
        values = {key: number(pair.metrics[key].value) for key in keys}
        if exact and not roomy:
            values["kl_k3"] = f"{values['kl_k3']}\n{values.pop('kl_exact')}"
        estimate = Text(number(mean.value), style="bold")
        estimate.append(f"{' ' if roomy else chr(10)}{limits}" if limits else "", style="not bold")
        table.add_row(
            Text(label), estimate, number(pair.self_noise.mean_abs, 2), *values.values(), count(pair.n_tokens)
        )
    return table


def _print_worst(data: ReportData, console: Console) -> None:
    """One line for the worst token of each pair."""
    seen = set()
    for row in view.worst_rows(data.worst_tokens):
        if row.pair not in seen:
            seen.add(row.pair)
            token, prompt = clipped(row.token, _TOKEN_CHARACTERS), clipped(row.prompt, _TOKEN_CHARACTERS)
            what = f"Worst token, {row.pair}: “{token}” ({prompt}, position {row.position})"
            console.print(Text(f"{what}: log μ {row.rollout_logprob}, log π {row.trainer_logprob}"))
