"""What limits the numbers of a report, in as few sentences as it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mismatch_probe.report.format import visible
from mismatch_probe.report.matrix import modes_of, pair_label
from mismatch_probe.report.view import HEADLINE_METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mismatch_probe.report.data import ReportData
    from mismatch_probe.results.comparison import Pair


def notes(data: ReportData) -> list[str]:
    """What limits the numbers: an unfinished run, off-policy pairs, reasons beside headline metrics."""
    lines = []
    status = data.manifest.status
    if status != "complete":
        lines.append(f"The run is {status}: numbers cover finished passes only.")
    modes, pairs = modes_of(data.summary), data.summary.pairs
    return lines + _off_policy_notes(pairs, modes) + _limiting_notes(pairs, modes)


def _off_policy_notes(pairs: Sequence[Pair], modes: Sequence[str]) -> list[str]:
    """One line for all pairs whose tokens one other policy sampled."""
    by_reason: dict[str, list[Pair]] = {}
    for pair in pairs:
        if not pair.on_policy:
            sampled = pair.metrics["ess_seq"]
            reason = sampled.why if sampled.value is None else ""
            by_reason.setdefault(visible(reason or "the rollout policy did not sample these tokens"), []).append(pair)
    return [
        f"{_named(some, pairs, modes)}: {reason}, so metrics that need the rollout policy's own are absent."
        for reason, some in by_reason.items()
    ]


def _limiting_notes(pairs: Sequence[Pair], modes: Sequence[str]) -> list[str]:
    """Reasons beside headline metrics, those that several metrics share said once."""
    names: dict[tuple[str, str], list[str]] = {}
    for key, name in HEADLINE_METRICS.items():
        cells = [(pair, pair.metrics[key]) for pair in pairs]
        # Why a value is absent has been said where another policy sampled; exact ones are absent by request.
        open_cells = [
            (pair, cell)
            for pair, cell in cells
            if cell.value is not None or not (key == "kl_exact" or not pair.on_policy)
        ]
        for why in dict.fromkeys(visible(cell.why) for _, cell in open_cells if cell.why):
            some = [pair for pair, cell in open_cells if visible(cell.why) == why]
            names.setdefault((why, _named(some, [pair for pair, _ in open_cells], modes)), []).append(name)
    return [f"{', '.join(known)}, {where}: {why}.".replace("..", ".") for (why, where), known in names.items()]


def _named(some: Sequence[Pair], pairs: Sequence[Pair], modes: Sequence[str]) -> str:
    """The labels of `some` of `pairs`: `all pairs`, or `float16 → all` where no trainer of a rollout is missing."""
    if len(some) == len(pairs) > 1:
        return "all pairs"
    names = []
    for rollout in dict.fromkeys(pair.rollout_dtype for pair in some):
        chosen, everyone = ([p for p in group if p.rollout_dtype == rollout] for group in (some, pairs))
        whole = len(chosen) == len(everyone) > 1
        names += [f"{rollout} → all"] if whole else [pair_label(pair, modes) for pair in chosen]
    return visible(", ".join(names))
