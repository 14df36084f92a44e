"""The report of `diagnose`."""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.report.accounting import accounting_section
from mismatch_probe.report.experiments import experiments_answer, experiments_section
from mismatch_probe.report.format import clipped, count, fitted, number, percent
from mismatch_probe.report.model import (
    Cell,
    Column,
    Items,
    Report,
    Section,
    State,
    Step,
    Text,
    plain,
    section,
    table,
)
from mismatch_probe.results.diagnosis import DiagnosedClass, Diagnosis, Outcome

_STATES: dict[Outcome, State] = {
    "fault": "fail",
    "rounding": "ok",
    "length-product": "ok",
    "cannot-tell": "inconclusive",
}
KINDS = {
    "labels": "one side's numbers mean something else",
    "rows": "rows do not line up",
    "weights": "the sides have other weights",
    "forward": "the sides have the same weights and another forward pass",
}


def diagnosis_report(document: Diagnosis) -> Report:
    """What it is, how sure that is, the numbers and tokens that show it, and the fix."""
    return Report(
        title=f"Diagnosis of {clipped(document.source.path, 200, keep_end=True)}",
        state=_STATES[document.outcome],
        answer=tuple(_answer(document)),
        steps=tuple(_steps(document)),
        table=table(
            [
                "class",
                Column("confidence", numeric=True),
                Column("tokens that show it", numeric=True),
                Column("mean |d| there", numeric=True),
                Column("once explained", numeric=True),
                Column("gain", numeric=True, rank=1),
            ],
            [_row(one) for one in document.classes],
            "Mean |d| in nats, cut at 3 nats a token. Gain: log-likelihood of held-out prompts, nats a token. "
            "Confidence: how often such an answer was right on recorded runs with a known fault, of which a quarter "
            "was of a kind that no signature knows.",
        )
        if document.classes
        else None,
        notes=tuple(Text(text) for text in _notes(document)),
        sections=(
            *(experiments_section(document.active) if document.active is not None else ()),
            *(part for one in document.classes for part in _class(one)),
            *_left(document),
            *accounting_section(document.findings, "page"),
        ),
    )


def _answer(document: Diagnosis) -> Iterator[str]:
    left = document.remainder
    if document.active is not None:
        yield experiments_answer(document.active)
    if document.outcome == "fault":
        for index, one in enumerate(document.classes):
            alone = "By the table alone: " if document.active is not None else ""
            yield f"{'Also: ' if index else alone}{one.title} ({one.name}, confidence {number(one.confidence, 2)})."
    elif document.outcome == "cannot-tell":
        yield (
            f"Cannot tell: noise of RMS {number(left.rms, 2)} nats without a pattern, more than rounding usually "
            "makes. A table cannot tell older weights, quantisation, dropout and coarser rounding apart."
        )
    elif document.outcome == "length-product":
        yield (
            f"No fault: symmetric noise of RMS {number(left.rms, 2)} nats a token. Over responses it adds up to a "
            f"standard deviation of {number(left.sequence_spread, 2)} nats: products of ratios are far from 1."
        )
    else:
        yield f"No fault: symmetric noise of RMS {number(left.rms, 2)} nats a token, as rounding makes."
    extent = f"{count(document.n_tokens)} tokens of {count(document.n_sequences)} sequences"
    yield f"{extent}, {count(document.n_prompts)} prompts."


def _steps(document: Diagnosis) -> Iterator[Step]:
    if document.active is not None and document.active.cause is not None:
        yield Step(document.active.cause.fix)
        return
    for one in document.classes:
        yield Step(one.fix)
        yield Step(f"To confirm {one.name}: {one.confirm}")
    if document.outcome == "cannot-tell":
        yield Step(
            "Measure what rounding alone makes of this model, then give its audit with --audit:",
            "mismatch-probe audit --model MODEL --out runs/before",
        )
        yield Step("Score the same ids with the older checkpoint, and with the trainer twice.")
    if document.outcome == "length-product":
        yield Step("Correct per token, or with truncated or geometric-mean weights; see `audit` for the choice.")


def _row(one: DiagnosedClass) -> list[Cell | str]:
    return [
        Cell(one.name, below=KINDS[one.kind]),
        plain(one.confidence, digits=2),
        Cell(count(one.n_shown), below=percent(one.share_shown)),
        plain(one.gap_before),
        plain(one.gap_after),
        plain(one.gain),
    ]


def _notes(document: Diagnosis) -> Iterator[str]:
    if document.n_tokens < document.source.n_tokens - document.source.n_masked_tokens:
        yield (
            f"Signatures are fitted to {count(document.n_tokens)} of {count(document.source.n_tokens)} tokens: whole "
            "prompts, spread evenly over the dump."
        )
    if document.remainder.baseline is None and document.active is None:
        yield (
            "Whether the noise that is left is the rounding of this model in its precision is not known: name an audit "
            "of the model with --audit."
        )


def _class(one: DiagnosedClass) -> tuple[Section, ...]:
    rivals = ", ".join(f"{rival.name} ({number(rival.gain, 2)})" for rival in one.rivals)
    lines = [
        *fitted(one.parameters),
        f"gain: {number(one.gain)} nats a token on held-out prompts, {number(one.gain_units, 3)} standard errors",
        f"usual causes: {', '.join(one.causes)}",
        *([f"other classes that explain part of it (nats a token): {rivals}"] if rivals else []),
    ]
    rows: list[list[Cell | str]] = [
        [
            clipped(shown.place, 60, keep_end=True),
            plain(shown.token_id),
            plain(shown.rollout_logprob),
            plain(shown.trainer_logprob),
        ]
        for shown in one.tokens
    ]
    header: list[str | Column] = [
        "token",
        Column("id", numeric=True),
        Column("rollout log-prob", numeric=True),
        Column("trainer log-prob", numeric=True),
    ]
    return section(
        one.name,
        f"What shows {one.name}",
        Items(tuple(Text(line) for line in lines)),
        table(header, rows) if rows else None,
        depth="screen",
    )


def _left(document: Diagnosis) -> tuple[Section, ...]:
    left = document.remainder
    facts = [
        ("RMS, nats a token", left.rms),
        ("mean, nats a token", left.mean),
        ("E[ρ], 1 where b is the distribution that sampled", left.mean_ratio),
        ("E[1/ρ], 1 where a is", left.mean_inverse_ratio),
        ("degrees of freedom of Student's t", left.degrees),
        ("standard deviation over sequences of their sums, nats", left.sequence_spread),
        *([("mean |d| by the audit, nats a token", left.baseline)] if left.baseline is not None else []),
    ]
    rows: list[list[Cell | str]] = [[name, plain(value)] for name, value in facts]
    return section("remainder", "What is left", table(["what", Column("value", numeric=True)], rows), depth="page")
