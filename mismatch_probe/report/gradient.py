"""What `rl gradient` shows: a figure, and the table that it leaves on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from mismatch_probe.files import atomic_path
from mismatch_probe.report.figures.style import DPI, Look, look, plot_settings, say
from mismatch_probe.report.format import NONE, clipped, estimate, number, visible

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes
    from rich.console import Console

_GRID = "#e4e4e4"
_PANELS = {
    "cosine": "cosine with the FP32-consistent gradient",
    "effective_batch": "effective batch, share of the sequences",
}
# Of the room between two corrections, what the marks of one take.
_WIDTH = 0.64
_WHY_CHARACTERS = 90
_COLUMNS = {
    "cosine": "cosine",
    "norm_ratio": "norm",
    "added_variance": "added\nvar.",
    "ess_weights": "ESS of\nweights",
    "effective_batch": "effective\nbatch",
}
_WITH_INTERVAL = ("cosine", "effective_batch")
ROOMY_FROM = 100
_LEGEND = (
    "Each row is an estimate from the same sequences and scores in FP32, with other weights; [95 % interval over "
    "prompts], the others in gradient.csv. cosine, norm: against one weight π/μ a sequence, π that of the FP32 trainer "
    "(FP32-consistent). added var.: variance against weights of 1, less 1. ESS of weights: Kish's share, of tokens or "
    "of sequences. effective batch: share of an unweighted batch with the same ratio of signal to noise. Advantages "
    "are synthetic ({advantages}), so this is the noise that weights bring, not a bias towards a reward. Gradients are "
    "projected on {directions:,} components: a cosine c has a standard error of about (1 − c²)/{root:.0f} from that."
)


def gradient_figure(document: Mapping[str, Any]) -> Figure:
    """Cosine and effective batch by correction; a color and a marker for each rollout dtype.

    Filled markers have weights of the trainer of the rollout's own dtype (or none), open ones of the FP32 trainer.
    """
    with plot_settings():
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        panels = dict(zip(_PANELS, figure.subplots(1, 2), strict=True))
        corrections = list(dict.fromkeys(arm["correction"] for found in document["passes"] for arm in found["arms"]))
        for key, axes in panels.items():
            drawn = _draw(axes, document["passes"], corrections, key)
            axes.set(ylabel=_PANELS[key])
            axes.set_xticks(range(len(corrections)), corrections, rotation=30, ha="right", rotation_mode="anchor")
            axes.axhline(1.0, color="#777777", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)
            axes.grid(visible=True, axis="y", color=_GRID, linewidth=0.6)
            if drawn:
                # An interval of few prompts can be longer than everything else; it runs out of the panel then.
                lowest = min(drawn)
                axes.set_ylim(bottom=max(axes.get_ylim()[0], lowest - max(0.02, (1 - lowest) / 2)))
            else:
                say(axes, "nothing finite was measured")
        handles, labels = panels["cosine"].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        if unique:
            figure.legend(unique.values(), unique, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _draw(axes: Axes, passes: list[dict[str, Any]], corrections: list[str], key: str) -> list[float]:
    """Draws one metric and returns its values."""
    slots = [(found["rollout_pass"], own) for found in passes for own in (True, False)]
    drawn = []
    for index, found in enumerate(passes):
        mark = look(found["rollout_dtype"], index)
        for arm in found["arms"]:
            metric, own = arm["metrics"][key], arm["trainer_dtype"] in (None, found["rollout_dtype"])
            if metric["value"] is None:
                continue
            slot = slots.index((found["rollout_pass"], own))
            x = corrections.index(arm["correction"]) + _WIDTH * ((slot + 0.5) / len(slots) - 0.5)
            label = f"{visible(found['rollout_dtype'])} rollouts, {'own' if own else 'FP32'} trainer's weights"
            _mark(axes, x, metric, mark, own, label)
            drawn.append(float(metric["value"]))
    return drawn


def _mark(axes: Axes, x: float, metric: Mapping[str, Any], mark: Look, filled: bool, label: str) -> None:
    if metric["ci_low"] is not None:
        axes.vlines(x, metric["ci_low"], metric["ci_high"], color=mark.color, linewidth=1.2)
    axes.plot(
        [x],
        [metric["value"]],
        mark.marker,
        color=mark.color,
        markerfacecolor=mark.color if filled else "white",
        markersize=6,
        label=label,
        zorder=3,
    )


def draw_gradient(document: Mapping[str, Any], path: Path) -> Path:
    """Writes the figure as PNG, by atomic rename.

    Raises:
        TableError: The file cannot be written.
    """
    with atomic_path(path) as partial, plot_settings():
        gradient_figure(document).savefig(partial, format="png", dpi=DPI, metadata={"Software": None})
    return path


def print_gradient(document: Mapping[str, Any], console: Console) -> None:
    """Prints, for each rollout pass, ESS as measured and predicted, and the table of corrections.

    Needs 80 columns; from 100 on an interval stands beside its value.
    """
    console.print(Text(f"Policy gradient under mismatch, {visible(document['model'])}", style="bold"))
    for found in document["passes"]:
        console.print()
        for line in _ess_lines(found):
            console.print(Text(line))
        console.print(_table(found, roomy=console.width >= ROOMY_FROM))
    legend = _LEGEND.format(
        advantages=document["advantages"], directions=document["directions"], root=document["directions"] ** 0.5
    )
    console.print(Text(legend, style="dim"))
    for note in _notes(document):
        console.print(Text(note))
    for row in document["missing"]:
        console.print(Text(f"Missing: {visible(row['rollout_pass'])}: {visible(row['why'])}", style="yellow"))


def _notes(document: Mapping[str, Any]) -> list[str]:
    """What limits the numbers of the tables, each reason once for a rollout dtype."""
    whys = {
        (found["rollout_dtype"], arm["metrics"][key].get("why", ""))
        for found in document["passes"]
        for arm in found["arms"]
        for key in _COLUMNS
    }
    return [f"Note: {visible(dtype)}: {visible(why)}" for dtype, why in sorted(whys) if why]


def _ess_lines(found: Mapping[str, Any]) -> list[str]:
    """Of each trainer, what sequence weights leave of the batch."""
    kinds = {"n_empty": "empty", "n_nonfinite": "not finite", "n_impossible": "with impossible log-probs"}
    dropped = [f"{found[key]} {what}" for key, what in kinds.items() if found.get(key)]
    without = f", without {' and '.join(dropped)}" if dropped else ""
    size = f"{found['n_sequences']} sequences of {found['n_prompts']} prompts, {found['n_tokens']:,} tokens"
    lines = [f"{visible(found['rollout_dtype'])} rollouts: {size}{without}"]
    for pair in found["pairs"]:
        metrics = pair["metrics"]
        parts = [
            f"mean |Δlogp| {_said(metrics['mean_abs_logprob_diff'])}",
            f"ESS of sequences {_said(metrics['ess_seq'])}",
            f"exp(−E d²·T) {_said(metrics['ess_random_walk'])} at mean length {pair['mean_length']:.0f}",
            *(
                f"{_said(row['ess_random_walk'])} at {row['length']:,} (by growth {_said(row['ess_seq'])})"
                for row in pair["lengths"]
            ),
            f"ESS below 0.5 by growth: {_crossing(pair['half_length'])}",
        ]
        lines.append(f"  {visible(pair['trainer_dtype'])} trainer: {', '.join(parts)}")
    return lines


def _crossing(length: Mapping[str, Any]) -> str:
    """A length in tokens, ∞ for what lies beyond the furthest prediction, or why there is none."""
    ends = [length[key] for key in ("value", "ci_low", "ci_high")]
    if not any(end is not None for end in ends):
        return clipped(visible(length.get("why", NONE)), _WHY_CHARACTERS)
    value, low, high = ("∞" if end is None else f"{end:,.0f}" for end in ends)
    return f"at {value} [{low}, {high}] tokens"


def _table(found: Mapping[str, Any], *, roomy: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("correction", "weights\nby"):
        table.add_column(name, no_wrap=True)
    for name in _COLUMNS.values():
        table.add_column(name, justify="right", no_wrap=True)
    for arm in found["arms"]:
        values = [_cell(arm["metrics"][key], roomy=roomy, full=key in _WITH_INTERVAL) for key in _COLUMNS]
        table.add_row(arm["correction"], visible(arm["trainer_dtype"] or NONE), *values)
    return table


def _cell(metric: Mapping[str, Any], *, roomy: bool, full: bool) -> Text:
    text = Text(_digits(metric["value"]))
    if full and metric["ci_low"] is not None:
        limits = f"[{_digits(metric['ci_low'])}, {_digits(metric['ci_high'])}]"
        text.append(f"{' ' if roomy else chr(10)}{limits}", style="dim")
    return text


def _digits(value: float | None) -> str:
    """Three decimals: what is to be seen is how far a share or a cosine is from 1."""
    return NONE if value is None else f"{value + 0.0:.3f}" if abs(value) >= 5e-4 or value == 0 else number(value, 1)


def _said(metric: Mapping[str, Any]) -> str:
    return estimate(metric["value"], metric["ci_low"], metric["ci_high"])
