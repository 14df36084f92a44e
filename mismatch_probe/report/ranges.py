"""The sections of an audit's report on the model itself: activations, weights, gradients, a pass in FP16, lag."""

from __future__ import annotations

from collections.abc import Sequence

from mismatch_probe.dtypes import dtype_label
from mismatch_probe.metrics.floats import FP16, ScalerTrace
from mismatch_probe.report.format import NONE, count, magnitude, number, percent
from mismatch_probe.report.model import (
    Block,
    Cell,
    FigureRef,
    Section,
    Table,
    Text,
    columns,
    estimate,
    fraction,
    numeric,
    plain,
    section,
    table,
)
from mismatch_probe.report.words import say
from mismatch_probe.results.ranges import (
    Activations,
    Fp16Pass,
    Gradients,
    GradientTensor,
    KindPeak,
    Lag,
    Range,
    WeightMotion,
    Weights,
)

_TOP = 10


def range_sections(found: Range) -> tuple[Section, ...]:
    """What was measured on the model itself."""
    return (
        *(() if found.forward is None else _activations(found.forward)),
        *(() if found.weights is None else _weights(found.weights)),
        *(() if found.backward is None else _gradients(found.backward)),
        *(() if found.proof is None else _proof(found.proof)),
        *(() if found.lag is None else _lag(found.lag)),
    )


def _activations(found: Activations) -> tuple[Section, ...]:
    text = (
        f"Peaks of |activation| over {count(found.n_tokens)} tokens of {count(found.n_sequences)} sequences of "
        f"{count(found.n_prompts)} prompts, in FP32. First tokens stand apart: they often carry the largest. Nothing "
        f"is known beyond the longest context, {count(found.longest)} tokens."
    )
    note = (
        "Products q·k and softmax inputs do not count as overflows: fused attention keeps them in FP32."
        if found.fused_attention
        else "Products q·k and softmax inputs count as overflows: eager attention makes them in the dtype."
    )
    kinds = [_kind(kind, row) for kind, row in found.kinds.items()]
    worst = sorted(found.tensors, key=lambda row: (row.n_nonfinite == 0, -row.peak))[:_TOP]
    rows = [
        (
            Cell(row.name, below=row.kind),
            _peak(row.peak),
            _peak(row.first_token_peak),
            _peak(row.rest_peak),
            plain(row.n_overflow),
            plain(row.n_nonfinite),
            Cell(f"sequence {row.sequence}" + ("" if row.position is None else f", token {row.position}")),
        )
        for row in worst
    ]
    by_kind = columns(
        "kind",
        *numeric("peak", "first token", "others", "others, 99.9 %", f"{FP16.largest:,.0f} / peak"),
        "overflows",
    )
    by_tensor = columns(
        "tensor",
        *numeric("peak", "first token", "others", "tokens over FP16", "not finite in FP32"),
        "largest at",
    )
    return section(
        "range",
        "Range of activations",
        Text(text),
        Text(note),
        FigureRef("range"),
        table(by_kind, kinds, "Largest peak of each kind of tensor."),
        table(by_tensor, rows, "Tensors with the largest peaks; those that are not finite first."),
    )


def _kind(name: str, row: KindPeak) -> tuple[Cell, ...]:
    over = ", ".join(dtype_label(dtype) for dtype in row.overflows_in)
    broken = f"{count(row.n_nonfinite)} not finite in FP32" if row.n_nonfinite else ""
    return (
        Cell(name, below=row.name),
        _peak(row.peak, broken),
        *(_peak(value) for value in (row.first_token_peak, row.rest_peak, row.rest_p999)),
        _peak(FP16.largest / row.peak if row.peak > 0 else 0.0),
        Cell(over or "none"),
    )


def _peak(value: float, below: str = "") -> Cell:
    """A magnitude; 0 was never seen."""
    return Cell(magnitude(value) if value else NONE, below=below)


def _weights(found: Weights) -> tuple[Section, ...]:
    totals = [
        (
            Cell(dtype_label(dtype)),
            *(plain(n) for n in (row.n, row.n_overflow, row.n_flushed, row.n_subnormal, row.n_nonfinite)),
        )
        for dtype, row in (("float16", found.float16), ("bfloat16", found.bfloat16))
    ]
    others = {row.name: row.error for row in found.tensors if row.dtype == "bfloat16"}
    worst = sorted(
        (row for row in found.tensors if row.dtype == "float16"),
        key=lambda row: (-row.n_nonfinite, -row.n_overflow, -row.error, -row.n_flushed, -row.n_subnormal),
    )
    rows = [
        (
            Cell(row.name),
            plain(row.error),
            plain(others.get(row.name)),
            _peak(row.largest),
            *(plain(n) for n in (row.n, row.n_overflow, row.n_flushed, row.n_subnormal)),
        )
        for row in worst[:_TOP]
    ]
    header = columns(
        "tensor",
        *numeric("error in FP16", "in BF16", "largest", "weights", "overflow", "become 0", "lose digits"),
    )
    return section(
        "weights",
        "Weights in 16 bits",
        Text("The error of a tensor is the norm of what rounding takes from it, over the norm of the tensor."),
        table(
            columns("converted to", *numeric("weights", "overflow", "become 0", "lose digits", "not finite before")),
            totals,
        ),
        table(header, rows, "Tensors that FP16 keeps worst."),
    )


def _gradients(found: Gradients) -> tuple[Section, ...]:
    texts = [
        f"Gradients of −Σ A log π / N over {count(found.n_tokens)} response tokens of {count(found.n_sequences)} "
        f"sequences, A = ±1, one sequence at a time, with N = {count(found.step_tokens)} tokens a step. Twice as many "
        "tokens halve every gradient.",
        f"The largest gradient is {number(found.largest)}. Without a loss scale, FP16 turns "
        f"{percent(found.flushed_unscaled)} of Σ|g| into 0.",
        say(found.loss_scales()),
    ]
    if found.overflow_at_start is not None:
        texts.append(f"At the usual first scale of 2^{found.start_exponent} {found.overflow_at_start} overflows first.")
    texts.append(_scaler(found.scaler))
    lost = sorted(found.tensors, key=lambda row: -row.flushed_unscaled)
    tight = sorted(
        (row for row in found.tensors if row.scale_high is not None or row.n_nonfinite),
        key=lambda row: (row.n_nonfinite == 0, 0 if row.scale_high is None else row.scale_high),
    )
    return section(
        "gradients",
        "Gradients and loss scale",
        *(Text(text) for text in texts),
        FigureRef("gradients"),
        _gradient_table(lost, "Tensors that lose most without a loss scale."),
        _gradient_table(tight, "Tensors that overflow first."),
    )


def _gradient_table(rows: Sequence[GradientTensor], legend: str) -> Table:
    header = columns(
        "tensor",
        *numeric("largest scale", "becomes 0", "smallest scale", "largest |g|", "not finite"),
    )
    cells = [
        (
            Cell(row.name),
            Cell(_power(row.scale_high)),
            fraction(row.flushed_unscaled),
            Cell(_power(row.scale_low)),
            plain(row.largest),
            plain(row.n_nonfinite),
        )
        for row in rows[:_TOP]
    ]
    return table(header, cells, legend)


def _power(exponent: int | None) -> str:
    return NONE if exponent is None else f"2^{exponent}"


def _scaler(trace: ScalerTrace | None) -> str:
    if trace is None:
        return "No dynamic scaler was simulated: no sequence had a finite gradient."
    low, high = trace.settled
    end = f"2^{low}" if low == high else f"2^{low} to 2^{high}"
    return (
        f"A dynamic scaler like torch's skips {count(trace.skipped_at_start)} steps before the first, at "
        f"2^{trace.first}. It ends at {end} and skips {count(trace.skipped)} of {count(trace.steps)} simulated steps."
    )


def _proof(found: Fp16Pass) -> tuple[Section, ...]:
    rows = [
        (
            Cell(_power(row.exponent)),
            Cell(row.forward or "all finite"),
            # Nothing comes back from a loss that is not finite.
            Cell(row.backward or (NONE if row.forward else "all finite")),
        )
        for row in found.attempts
    ]
    if not found.attempts:
        return ()
    tried = "The first scale that was tried, and every one that failed."
    header = ("loss scale", "first tensor of the forward pass that is not finite", "of the backward pass")
    text = f"{count(found.n_sequences)} sequences ran forward and backward in FP16 ({found.mode}). " + (
        f"Every tensor is finite at a loss scale of {_power(found.exponent)}."
        if found.finite
        else "The last one stayed without a finite pass."
    )
    return section("pass", "A pass in FP16", Text(text), table(header, rows, tried))


def _lag(found: Lag) -> tuple[Section, ...]:
    text = (
        "A trainer keeps FP32 masters, of which the engine has a 16-bit copy. Both sides of the gap compute in FP32 "
        f"over {count(found.n_sequences)} sequences, so only the cast of the weights is in it. Steady: masters "
        "anywhere within half a unit of the engine's weights, as after many steps. First step: one step of Adam from a "
        f"16-bit checkpoint, on {count(found.batch)} sequences."
    )
    cases = [
        (
            Cell(dtype_label(case.dtype), below="steady" if case.rate is None else f"first step at {case.rate:g}"),
            fraction(case.changed),
            estimate(case.mean_abs_logprob_diff),
            estimate(case.kl_k3),
        )
        for case in found.cases
    ]
    gaps = table(
        columns("engine", *numeric("weights that differ from the start", "mean |d| (nats)", "KL k3 (nats)")),
        cases,
        "Gap that the lag makes.",
    )
    blocks: list[Block] = [Text(text), FigureRef("lag"), gaps]
    if found.motion is None:
        blocks.append(Text("The motion of weights is not known: gradients were not measured."))
    else:
        motion = found.motion
        betas = ", ".join(f"{beta:g}" for beta in motion.betas)
        blocks.append(
            Text(
                f"Motion of {count(motion.n_weights)} sampled weights with a gradient "
                f"({count(motion.n_without_gradient)} without) in {count(motion.steps)} simulated steps of Adam "
                f"(β = {betas}), in units in the last place (ulp) of the engine's dtype. In one direction, every step "
                "moves a weight by the learning rate. A random walk draws the sign of each step anew. From a "
                "checkpoint a weight has half a unit to go; in steady state it starts anywhere within."
            )
        )
        header = columns(
            "engine",
            *numeric(
                "first step (ulp)",
                "mean later step (ulp)",
                "steps in one direction",
                "random walk from a checkpoint",
                "random walk, steady",
            ),
        )
        rows = [_motion(row, motion.steps) for row in motion.rows]
        blocks.append(table(header, rows, "When a step reaches the engine."))
    return section("lag", "Lag of the engine", *blocks)


def _motion(row: WeightMotion, steps: int) -> tuple[Cell, ...]:
    def walk(step: int | None, reached: float | None) -> Cell:
        typical = f"over {count(steps)}" if step is None else count(step)
        return Cell(typical, below=f"{percent(reached)} in {count(steps)}")

    return (
        Cell(dtype_label(row.dtype), below=f"rate {row.rate:g}"),
        Cell(number(row.first_ulp), below=f"{percent(row.first_reached)} reach the engine"),
        Cell(number(row.steady_ulp), below=f"median {number(row.steady_ulp_median)}"),
        Cell(NONE if row.straight_steps is None else f"{row.straight_steps:,.0f}"),
        walk(row.walk_steps, row.walk_reached),
        walk(row.walk_steps_generic, row.walk_reached_generic),
    )
