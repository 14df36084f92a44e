"""Two faults at once, of different classes: what one explains has to be taken off before the other is seen.

All lie in the half `test`. A pair is right when the classes that are named are its two, in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from validation.faults import edits
from validation.faults.bench import Bench, Place
from validation.faults.catalog import FAULTS, Combination, Made, fault
from validation.faults.edits import Row
from validation.faults.forward import by_tag, packs

_PLACES: tuple[Combination, ...] = (("chain", "bfloat16"), ("mixture", "bfloat16"))
_Make = Callable[[Bench, Place], Made | list[Row]]
_Edit = Callable[[list[Row]], list[Row]]


def _of(cause: str, strength: Any) -> _Make:
    """A fault that is made alone elsewhere."""
    return lambda bench, place: next(one for one in FAULTS if one.cause == cause).make(bench, place, strength)


def _end(value: float) -> _Edit:
    return lambda rows: [edits.last(row, 1, value) for row in rows]


def _inside(value: float, share: float) -> _Edit:
    return lambda rows: [edits.scattered(row, share, value, 700 + i) for i, row in enumerate(rows)]


def _nan(share: float) -> _Edit:
    return lambda rows: edits.some(rows, share, lambda row: replace(row, b=np.full(len(row.b), np.nan)), seed=11)


def _shifted(by: int) -> _Edit:
    return lambda rows: [row.edited("b", lambda values: edits.shifted(values, by)) for row in rows]


def _tempered(**view: Any) -> _Make:
    return lambda bench, place: bench.rows(place.recording(), place.view(temperature=0.7, **view))


PAIRS: tuple[tuple[tuple[str, str], _Make, _Edit | None], ...] = (
    (("temperature", "end-placeholders"), _of("trainer-temperature", 0.7), _end(0.0)),
    (("temperature", "placeholders"), _of("trainer-temperature", 1.5), _inside(1.0, 0.05)),
    (("temperature", "missing-values"), _of("rollout-raw-temperature", 0.7), _nan(0.2)),
    (("temperature", "shift"), _of("trainer-temperature", 0.7), _shifted(1)),
    (
        ("temperature", "packing"),
        lambda bench, place: packs(_tempered(layout="packed-leak", batch=4)(bench, place), 4),
        None,
    ),
    (
        ("temperature", "prompts-differ"),
        lambda bench, place: by_tag(bench, place, "tagged", {"temperature": 0.7}, drop=1),
        None,
    ),
    (("truncation", "end-placeholders"), _of("top-p", "b:0.9"), _end(-9999.0)),
    (("truncation", "missing-values"), _of("top-p", "b:0.8"), _nan(0.2)),
    (("penalty", "end-placeholders"), _of("repetition-penalty", 1.2), _end(0.0)),
    (("packing", "placeholders"), _of("packing-leak", 4), _inside(0.0, 0.05)),
    (("prompts-differ", "end-placeholders"), _of("missing-bos", "tagged"), _end(0.0)),
    (("prompts-differ", "shift"), _of("other-system-text", "tagged"), _shifted(1)),
    (("positions", "end-placeholders"), _of("rope-long-positions", "half:40"), _end(0.0)),
    (("weight-lag", "end-placeholders"), _of("async-staleness", "hi"), _end(0.0)),
    (("falls-behind", "missing-values"), _of("restored-first-checkpoint", "hi"), _nan(0.2)),
    (("one-step", "placeholders"), _of("resume-serves-reference", "plain"), _inside(1.0, 0.05)),
    (("step-change", "shift"), _of("partial-load-at-update", 1), _shifted(1)),
    (("replica", "end-placeholders"), _of("replica-topology", 8), _end(0.0)),
    (("other-forward", "end-placeholders"), _of("older-weights", "hi:4"), _end(0.0)),
    (("other-forward", "shift"), _of("adapter-ignored", 0.2), _shifted(1)),
)


def _register(classes: tuple[str, str], first: _Make, edit: _Edit | None) -> None:
    @fault(f"pair-{'-and-'.join(classes)}", "+".join(classes), 0, 1, combinations=_PLACES, per_place=1)
    def _make(bench: Bench, place: Place, strength: int) -> Made:
        made = first(bench, place)
        made = made if isinstance(made, Made) else Made(made)
        return made if edit is None else replace(made, rows=edit(list(made.rows)))


for _pair in PAIRS:
    _register(*_pair)
