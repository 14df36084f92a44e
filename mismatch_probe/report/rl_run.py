"""The report of an RL run."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from mismatch_probe.report.format import count, number
from mismatch_probe.report.model import (
    STATES,
    Cell,
    FigureRef,
    Items,
    Report,
    Section,
    Step,
    Table,
    Text,
    columns,
    fraction,
    numeric,
    plain,
    section,
    table,
)
from mismatch_probe.report.words import say
from mismatch_probe.report.words.rl import collapse_rule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pydantic import JsonValue

    from mismatch_probe.report.data import RlRunData
    from mismatch_probe.results.finding import Finding
    from mismatch_probe.results.rl_run import Provenance, RunSummary, Window

_SECTIONED = frozenset({"rl-gap-source"})
_RUN = "mismatch-probe rl run"


def rl_run_report(data: RlRunData) -> Report:
    """How a run ended, whether it learned, and what its mismatch did meanwhile."""
    outcome, gap, *rest = data.run.findings
    summary = data.run.summary
    assert summary is not None
    return Report(
        title=f"RL run of {data.model}: task {data.task}, {data.precision}, {data.algorithm}",
        state=STATES[outcome.severity],
        answer=(say(outcome), say(gap)),
        steps=_next(data),
        table=_windows(summary),
        notes=tuple(_note(found) for found in rest if found.code not in _SECTIONED),
        sections=(
            *_source([found for found in rest if found.code in _SECTIONED]),
            *section("steps", "Step by step", FigureRef("run")),
            *_sync(summary),
            *_details(summary),
            *_time(summary),
            *settings_section("Settings", data.run.config),
            *section("provenance", "Provenance", provenance_table(data.run.provenance), depth="detail"),
        ),
    )


def _note(found: Finding) -> Text:
    return Text(say(found), "plain" if found.severity == "info" else "note")


def _next(data: RlRunData) -> tuple[Step, ...]:
    """What to run next: the first step belongs to the outcome, the others to any run."""
    folder, ending = shlex.quote(data.folder), data.run.ending
    if ending is None:
        return (Step("Continue the run.", f"{_RUN} --resume {folder}"),)
    again = f"{_RUN} --config {folder}"
    found = []
    learning = None if data.run.summary is None else data.run.summary.learning
    if ending.status != "complete":
        found.append(_after_failure(data, again))
    elif learning == "unknown":
        found.append(Step("Train for more steps.", f"{again} --steps {max(60, 4 * data.planned)}"))
    elif learning == "fell":
        found.append(_after_failure(data, again))
    if data.recorded:
        source = shlex.quote(f"{data.folder}/rollouts.parquet")
        found.append(Step("See every mismatch metric of these rollouts.", f"mismatch-probe compare --from {source}"))
    if ending.status == "complete" and learning != "unknown":
        text = "Repeat with another seed: one run does not show what varies by chance."
        found.append(Step(text, f"{again} --seed {data.seed + 1}"))
    return tuple(found)


def _after_failure(data: RlRunData, again: str) -> Step:
    cause = None if data.run.ending is None else data.run.ending.cause
    if cause is not None and cause.code == "rl-loss-scale-lost":
        return Step(
            "Train in BF16, whose gradients do not overflow.", f"{again} --rollout-dtype bf16 --trainer-dtype bf16"
        )
    flags = "" if data.exact else " --rollout-dtype fp32 --trainer-dtype fp32"
    flags += " --stress none --dose 0" if data.stressed else ""
    what = " or ".join(name for name, on in (("precision", not data.exact), ("injected stress", data.stressed)) if on)
    if flags:
        changed = "in FP32 without stress" if data.stressed else "in FP32"
        return Step(f"Train {changed} to see whether {what} is the cause.", f"{again}{flags}")
    text = "Lower the learning rate: in FP32 without stress precision is not the cause."
    return Step(text, f"{again} --learning-rate {data.learning_rate / 3:.2g}")


def _windows(summary: RunSummary) -> Table | None:
    """The first and the last steps side by side."""
    start, end = summary.start, summary.end
    if start is None or end is None:
        return None
    rows: list[tuple[str, str, Callable[[Window], float | None]]] = [
        ("reward", "", lambda w: w.reward),
        ("mismatch, mean |Δ log-prob|", "nats", lambda w: w.mean_abs_logprob_diff),
        ("staleness, mean |Δ log-prob|", "nats", lambda w: w.staleness_mean_abs),
        ("policy movement, mean |Δ log-prob|", "nats", lambda w: w.movement_mean_abs),
        ("sequence ESS", "%", lambda w: w.ess_seq),
        ("KL k3", "nats", lambda w: w.kl_k3),
        ("entropy of a token", "nats", lambda w: w.entropy),
        ("gradient norm", "", lambda w: w.grad_norm),
        ("response length", "tokens", lambda w: w.response_length),
        ("truncated responses", "%", lambda w: w.truncated),
    ]
    spans = numeric(_span(start), _span(end))
    cells = [(name, _value(read(start), unit), _value(read(end), unit), unit) for name, unit, read in rows]
    legend = (
        "Mismatch: engine and trainer with the same weights. Staleness: the trainer's weights against those that "
        "sampled. Policy movement: the step's own updates. ESS counts the mismatch alone."
    )
    return table(["mean over steps", *spans, "unit"], cells, legend)


def _value(value: float | None, unit: str) -> Cell:
    if unit == "%" and value is not None:
        return Cell(number(100 * value))
    return plain(value)


def _span(window: Window) -> str:
    last = window.first_step + window.n_steps - 1
    return f"step {window.first_step}" if window.n_steps == 1 else f"steps {window.first_step}–{last}"


def _source(found: Sequence[Finding]) -> tuple[Section, ...]:
    return section("source", "Where the gap comes from", Items(tuple(Text(say(one)) for one in found)), depth="screen")


def _sync(summary: RunSummary) -> tuple[Section, ...]:
    sync = summary.sync
    rows = [
        ("syncs checked and accepted", plain(sync.n_checked)),
        ("largest gap after a sync, nats", plain(sync.largest_gap)),
        ("at step", plain(sync.at_step)),
    ]
    text = Text(
        "After a sync the engine scores fixed sequences; the trainer scores them in FP32 with the same weights."
    )
    shown = table(["weight sync", *numeric("value")], rows)
    return section("sync", "Weight sync", text, shown) if sync.checked else ()


def _details(summary: RunSummary) -> tuple[Section, ...]:
    start, end = summary.start, summary.end
    if start is None or end is None:
        return ()
    rows: list[tuple[str, Callable[[Window], float | None]]] = [
        ("mismatch and staleness, mean |Δ log-prob|, nats", lambda w: w.off_policy_mean_abs),
        ("sequence ESS of mismatch and staleness", lambda w: w.off_policy_ess_seq),
        ("token ESS", lambda w: w.ess_token),
        ("tokens clipped", lambda w: w.clip_fraction),
        ("tokens masked by the correction", lambda w: w.mask_fraction),
        ("tokens with a truncated weight", lambda w: w.truncated_fraction),
        ("weights that change in the engine's dtype", lambda w: w.weights_changed),
        ("gap after a weight sync, nats", lambda w: w.sync_gap),
        ("seconds of a step", lambda w: w.seconds),
    ]
    if end.router_agreement is not None:
        rows += [
            ("routers that choose the same experts on both sides", lambda w: w.router_agreement),
            ("tokens that a router sends to other experts in some layer", lambda w: w.router_flipped_tokens),
        ]
    counts = [
        ("responses", summary.n_responses),
        ("truncated responses", summary.n_truncated),
        ("responses without a token", summary.n_empty),
        ("responses whose grader was stopped", summary.n_grader_killed),
        ("updates skipped in FP16", summary.n_skipped),
    ]
    spans = numeric(_span(start), _span(end))
    cells = [(name, plain(read(start)), plain(read(end))) for name, read in rows]
    shown = table(["mean over steps", *spans], cells)
    total = table(["over all steps", *numeric("count")], [(name, plain(n)) for name, n in counts])
    return section("measured", "What else was measured", shown, total, depth="detail")


def _time(summary: RunSummary) -> tuple[Section, ...]:
    whole = sum(summary.seconds.values())
    rows = [
        (name.replace("_", " and "), plain(seconds), fraction(seconds / whole if whole else None))
        for name, seconds in summary.seconds.items()
    ]
    header = columns("phase", *numeric("seconds", "of all"))
    return section("time", "Time", table(header, rows if whole else []), depth="detail")


def settings_section(title: str, config: Mapping[str, JsonValue]) -> tuple[Section, ...]:
    """Settings, and the rule of collapse that follows from them."""
    rows = [(name, "–" if value is None else str(value)) for name, value in config.items()]
    window = config.get("collapse_window")
    rule = Text(collapse_rule(window)) if isinstance(window, int) else None
    return section("settings", title, table(("setting", "value"), rows), rule, depth="detail")


def provenance_table(provenance: Provenance) -> Table:
    """When, where and from what runs were started."""
    machine = provenance.environment.machine
    rows = [
        ("started", provenance.created),
        ("model", provenance.model.name),
        ("revision", provenance.model.revision or "–"),
        ("device", provenance.device),
        ("processor", f"{machine.cpu}, {count(machine.cores)} cores"),
        ("GPUs", ", ".join(machine.gpus) or "none"),
        ("platform", machine.platform),
        *((f"{name}", version) for name, version in provenance.environment.versions.items()),
        *((name, value) for name, value in provenance.environment.variables.items()),
        *((f"SHA-256 of {name}", digest[:16]) for name, digest in provenance.model.files.items()),
    ]
    return table(("what", "value"), rows)
