"""What experiments with the model found, in the report of `diagnose`."""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.report.format import clipped, count, fitted, number
from mismatch_probe.report.model import Cell, Column, Section, Text, plain, section, table
from mismatch_probe.results.diagnosis import Active, Cause, Experiment

_MOST_ROWS = 3


def experiments_answer(active: Active) -> str:
    """The sentence that the report begins with."""
    gap = f"mean |a − h| {number(active.plain.trainer, 2)} and |b − h| {number(active.plain.rollout, 2)} nats a token"
    if active.cause is not None:
        return _cause(active.cause)
    if active.settled == "numerics":
        both = f" with {active.shared} on both sides" if active.shared else ""
        out = f" That rules out what a table suggests: {', '.join(active.ruled_out)}." if active.ruled_out else ""
        floor = number(active.floor, 2)
        return f"No fault: {active.model}{both} reproduces both sides within rounding ({gap}; rounding: {floor}).{out}"
    if active.settled == "side":
        return (
            f"The {active.side} is at fault: {active.model} reproduces the other side ({gap}; "
            f"rounding: {number(active.floor, 2)}). No experiment explains it."
        )
    return (
        f"Neither side is what {active.model} gives ({gap}; rounding: {number(active.floor, 2)}). Check that it has "
        "the weights of this dump."
    )


def _cause(cause: Cause) -> str:
    found = "".join(f", {one}" for one in fitted(cause.parameters))
    also = f" (or {', '.join(cause.as_well)})" if cause.as_well else ""
    said = f"Cause, by experiment: {cause.title[:1].lower() + cause.title[1:]} ({cause.name}{found}){also}."
    if cause.side is None:
        return said
    left = "" if cause.experiment == "plain" else f" and is {number(cause.after, 2)} under this hypothesis"
    return (
        f"{said} The {cause.side} is at fault: its distance to the model is {number(cause.before, 2)} nats a "
        f"token{left}; rounding makes {number(cause.floor, 2)}."
    )


def experiments_section(active: Active) -> tuple[Section, ...]:
    """The path: what was run, what it left of each side, and what going on would cost."""
    first: list[Cell | str] = [
        Cell("plain"),
        Cell("the model as it is"),
        *_sizes(active.plain.rollout, active.plain.trainer),
    ]
    rows: list[list[Cell | str]] = [first]
    for name in dict.fromkeys(one.name for one in active.experiments):
        some = [one for one in active.experiments if one.name == name]
        rows += [_row(one) for one in sorted(some, key=_rank)[:_MOST_ROWS]]
    header: list[str | Column] = [
        "experiment",
        "hypothesis",
        Column("rollout left", numeric=True),
        Column("trainer left", numeric=True),
    ]
    note = (
        f"Mean distance of each side to the column, nats a token, cut at 3; of {count(active.n_judged)} of "
        f"{count(active.n_tokens)} tokens in {count(active.n_sequences)} sequences, scored in {active.dtype}. Rounding "
        f"makes {number(active.floor, 2)}. It took {number(active.seconds, 2)} s. Of each experiment the nearest "
        f"{_MOST_ROWS} columns; forward passes are tried on a part of the tokens first."
    )
    return section("experiments", "What experiments show", table(header, rows, note), *_left(active), depth="screen")


def _left(active: Active) -> Iterator[Text]:
    going = [one for one in active.left if not one.needs]
    if going:
        some = ", ".join(f"{one.name} ({count(one.forwards)})" for one in going)
        yield Text(f"Not needed; forward passes that it would cost: {some}.")
    needs = [one for one in active.left if one.needs]
    if needs:
        yield Text("With further options: " + ", ".join(f"{one.name} ({one.needs})" for one in needs) + ".")


def _rank(one: Experiment) -> tuple[bool, float]:
    return not one.explains, float("inf") if one.sizes is None else min(one.sizes.rollout, one.sizes.trainer)


def _row(one: Experiment) -> list[Cell | str]:
    found = ", ".join(fitted(one.parameters))
    about = Cell(clipped(one.hypothesis, 80), below=one.why or found)
    name = Cell(one.name, below=f"explains the {' and the '.join(one.explains)}" if one.explains else "")
    if one.sizes is None:
        return [name, about, plain(None), plain(None)]
    return [name, about, *_sizes(one.sizes.rollout, one.sizes.trainer)]


def _sizes(rollout: float, trainer: float) -> tuple[Cell, Cell]:
    return plain(rollout), plain(trainer)
