"""What an audit measured on the model itself, as sentences and tables: activations, weights, gradients, engine lag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mismatch_probe.metrics.floats import FP16
from mismatch_probe.report.format import NONE, count, interval, number, percent, visible
from mismatch_probe.report.view import Table, stacked

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Document = Mapping[str, Any]

_TOP = 10
_FOLD_FROM = 12


@dataclass(frozen=True)
class Block:
    """A table under a heading of its own; a long one is folded unless it is `open`."""

    title: str
    table: Table
    open: bool = False

    @property
    def folded(self) -> bool:
        return not self.open and len(self.table.rows) > _FOLD_FROM


Content = tuple[tuple[str, ...], tuple[Block, ...]]


def _forward(found: Document) -> Content:
    rate, first = found["overflow_tokens"], found["first_overflow"]
    text = (
        f"Peaks of |activation| over {count(found['n_tokens'])} tokens of {count(found['n_sequences'])} sequences of "
        f"{count(found['n_prompts'])} prompts, in FP32; first tokens stand apart, since they often carry the largest."
    )
    over = (
        f"{count(rate['n'])} of {count(found['n_tokens'])} tokens have an activation of "
        f"{FP16.overflows_from:,.0f} or more ({percent(rate['value'])}{_upper(rate)})"
        + ("." if first is None else f", first at {visible(first)}.")
    )
    known = f"The longest context seen is {count(found['longest'])} tokens: nothing is known beyond it."
    source = f"Half of the largest peak is first reached at {visible(found['source'])}."
    kinds = Table(
        ("kind", "peak", "first token", "rest", "rest, 99.9 %", f"{FP16.largest:.0f} / peak", "overflows in"),
        tuple(_kind(name, row) for name, row in found["kinds"].items()),
    )
    note = (
        "Products q·k and softmax inputs are not counted as overflows: fused attention keeps them in FP32."
        if found["fused_attention"]
        else "This trainer's attention makes products q·k and softmax inputs in the dtype, so that they count."
    )
    header = ("tensor", "kind", "peak", "first token", "rest", "overflows", "not finite in FP32", "where")
    worst = sorted(found["tensors"], key=lambda row: (row["n_nonfinite"] == 0, -row["peak"]))[:_TOP]
    tensors = tuple(
        (
            visible(row["name"]),
            visible(row["kind"]),
            *(_peak(row[key]) for key in ("peak", "first_token_peak", "rest_peak")),
            count(row["n_overflow"]),
            count(row["n_nonfinite"]),
            f"sequence {row['sequence']}" + ("" if row["position"] is None else f", token {row['position']}"),
        )
        for row in worst
    )
    texts = (text, known, over, source, note)
    return texts, (Block("Largest peak by kind", kinds), Block("Largest peaks", Table(header, tensors)))


def _kind(name: str, row: Document) -> tuple[str, ...]:
    over = [visible(dtype) for dtype, hit in row["overflow"].items() if hit]
    broken = f"{count(row['n_nonfinite'])} not finite in FP32" if row["n_nonfinite"] else ""
    return (
        stacked(visible(name), visible(row["name"])),
        stacked(_peak(row["peak"]), broken),
        *(_peak(row[key]) for key in ("first_token_peak", "rest_peak", "rest_p999")),
        _peak(FP16.largest / row["peak"]) if row["peak"] > 0 else NONE,
        ", ".join(over) or "none",
    )


def _weights(found: Document) -> Content:
    texts = ["The error of a tensor is the norm of what rounding takes from it, over its own."]
    for dtype in ("float16", "bfloat16"):
        row = found[dtype]
        texts.append(
            f"In {dtype}, of {count(row['n'])} weights {count(row['n_overflow'])} overflow, {count(row['n_flushed'])} "
            f"become 0 and {count(row['n_subnormal'])} lose digits."
        )
    others = {row["name"]: row["error"] for row in found["tensors"] if row["dtype"] == "bfloat16"}
    order = ("n_overflow", "error", "n_flushed", "n_subnormal")
    worst = sorted(
        (row for row in found["tensors"] if row["dtype"] == "float16"),
        key=lambda row: tuple(-row[key] for key in order),
    )
    header = ("tensor", "error in FP16", "in BF16", "largest", "weights", "overflow", "become 0", "lose digits")
    rows = tuple(
        (
            visible(row["name"]),
            number(row["error"]),
            number(others.get(row["name"])),
            _peak(row["largest"]),
            *(count(row[key]) for key in ("n", "n_overflow", "n_flushed", "n_subnormal")),
        )
        for row in worst[:_TOP]
    )
    return tuple(texts), (Block("Worst in FP16", Table(header, rows)),)


def _backward(found: Document) -> Content:
    texts = [
        f"Loss: {visible(found['loss'])}, over {count(found['n_sequences'])} sequences with {count(found['n_tokens'])} "
        f"response tokens, with N = {count(found['step_tokens'])} tokens a step: twice as many halve every gradient.",
        f"The largest gradient is {number(found['largest'])}; without a loss scale FP16 turns "
        f"{percent(found['flushed_unscaled'])} of Σ|g| into 0.",
        _scales(found["scales"]),
    ]
    if found["overflow_at_start"] is not None:
        first = visible(found["overflow_at_start"])
        texts.append(f"At the usual first scale of 2^{found['start_exponent']} {first} overflows first.")
    texts.append(_scaler(found["scaler"]))
    lost = sorted(found["tensors"], key=lambda row: -row["flushed_unscaled"])
    tight = [row for row in found["tensors"] if row["scale_high"] is not None]
    tight.sort(key=lambda row: row["scale_high"])
    blocks = (
        Block("What loses most without a loss scale", _gradients(lost)),
        Block("What overflows first", _gradients(tight)),
    )
    return tuple(texts), blocks


def _gradients(rows: Sequence[Document]) -> Table:
    header = ("tensor", "largest scale", "becomes 0", "smallest scale", "largest |g|", "not finite")
    return Table(
        header,
        tuple(
            (
                visible(row["name"]),
                _power(row["scale_high"]),
                percent(row["flushed_unscaled"]),
                _power(row["scale_low"]),
                number(row["largest"]),
                count(row["n_nonfinite"]),
            )
            for row in rows[:_TOP]
        ),
    )


def _power(exponent: int | None) -> str:
    return NONE if exponent is None else f"2^{exponent}"


def _scales(scales: Document | None) -> str:
    if scales is None:
        return "No loss scale can be named, since no tensor got a gradient."
    low_by, high_by = visible(scales["low_by"]), visible(scales["high_by"])
    if scales["low"] > scales["high"]:
        return (
            f"No loss scale serves every tensor: {high_by} overflows above 2^{scales['high']}, and {low_by} loses more "
            f"than 0.1 % below 2^{scales['low']}."
        )
    return (
        f"Loss scales from 2^{scales['low']} to 2^{scales['high']} serve every tensor: below, {low_by} loses more than "
        f"0.1 %; above, {high_by} overflows."
    )


def _scaler(trace: Document | None) -> str:
    if trace is None:
        return "No dynamic scaler was simulated, since no sequence had a finite gradient."
    low, high = trace["settled"]
    end = f"2^{low}" if low == high else f"2^{low} to 2^{high}"
    return (
        f"A dynamic scaler as torch's skips {count(trace['skipped_at_start'])} steps before it takes the first, at "
        f"2^{trace['first']}; it ends at {end} and skips {count(trace['skipped'])} of "
        f"{count(trace['steps'])} simulated steps."
    )


def _proof(found: Document) -> Content:
    ran = f"{count(found['n_sequences'])} sequences ran forward and backward in FP16 ({visible(found['mode'])})"
    if found["finite"]:
        text = f"{ran} with every tensor finite, at a loss scale of 2^{found['exponent']}."
    else:
        way = "forward" if found["first_nonfinite_forward"] else "backward"
        first = found[f"first_nonfinite_{way}"]
        text = (
            f"{ran}, the last of them without success: the {way} pass is not finite, first at {visible(first or NONE)}."
        )
    rows = tuple(
        (
            f"2^{row['exponent']}",
            visible(row["forward"] or "finite"),
            visible(row["backward"] or NONE),  # nothing comes back from a loss that is not finite
        )
        for row in found["attempts"]
        if row["forward"] or row["backward"]
    )
    header = ("loss scale", "forward, first that is not finite", "backward")
    return (text,), (Block("Scales that failed", Table(header, rows)),) if rows else ()


def _lag(found: Document) -> Content:
    text = (
        "A trainer keeps FP32 masters of which the engine has a 16-bit copy. Both sides of a gap compute in FP32, over "
        f"{count(found['n_sequences'])} sequences, so nothing but the cast of the weights is in it. Steady: masters "
        "anywhere within half a unit of the engine's weights, as after many steps; first step: one step of Adam from a "
        f"16-bit checkpoint, on {count(found['batch'])} sequences."
    )
    cases = tuple(
        (
            stacked(visible(case["dtype"]), "steady" if case["rate"] is None else f"first step at {case['rate']:g}"),
            percent(case["changed"]),
            value_cell(case["mean_abs_logprob_diff"]),
            value_cell(case["kl_k3"]),
        )
        for case in found["cases"]
    )
    gaps = Table(("engine", "weights that differ from the start", "mean |d| (nats)", "KL k3 (nats)"), cases)
    block = Block("Gap that the lag makes", gaps)
    if found["motion"] is None:
        return (text, "The motion of weights was not measured."), (block,)
    adam, moves = _motion(found["motion"])
    return (text, adam), (block, Block("When a step reaches the engine", moves))


def _motion(motion: Document) -> tuple[str, Table]:
    unmoved = f", and {count(motion['n_without_gradient'])} without a gradient" if motion["n_without_gradient"] else ""
    text = (
        f"Motion is that of {count(motion['n_weights'])} sampled weights{unmoved} in {count(motion['steps'])} "
        f"simulated steps of Adam (β = {', '.join(f'{beta:g}' for beta in motion['betas'])}), in units of the last "
        "place (ulp) of the engine's format. In one direction a weight moves by the learning rate in every step; a "
        "random walk draws each step's signs anew. From a checkpoint a weight has half a unit to go, in steady state "
        "it starts anywhere within."
    )

    def walk(row: Document, suffix: str) -> str:
        step, share = row[f"walk_steps{suffix}"], percent(row[f"walk_reached{suffix}"])
        typical = f"over {count(motion['steps'])}" if step is None else count(step)
        return stacked(typical, f"{share} in {count(motion['steps'])}")

    rows = tuple(
        (
            stacked(visible(row["dtype"]), f"rate {row['rate']:g}"),
            stacked(number(row["first_ulp"]), f"{percent(row['first_reached'])} reach the engine"),
            stacked(number(row["steady_ulp"]), f"median {number(row['steady_ulp_median'])}"),
            NONE if row["straight_steps"] is None else f"{row['straight_steps']:,.0f}",
            walk(row, ""),
            walk(row, "_generic"),
        )
        for row in motion["rows"]
    )
    header = (
        "engine",
        "first step (ulp)",
        "mean later step (ulp)",
        "steps in one direction",
        "random walk from a checkpoint",
        "random walk, steady",
    )
    return text, Table(header, rows)


def value_cell(value: Document) -> str:
    limits = interval(value["ci_low"], value["ci_high"])
    return stacked(number(value["value"]), limits, visible(value.get("why", "")))


def _upper(rate: Document) -> str:
    return "" if rate["ci_high"] is None else f", at most {percent(rate['ci_high'])} with 95 % confidence"


def _peak(value: float) -> str:
    """A magnitude, from 1,000 on in full, so that it can be compared with FP16's largest number; 0 was never seen."""
    if value == 0:
        return NONE
    return f"{value:,.0f}" if 1e3 <= value < 1e7 else number(value)


CONTENTS: dict[str, tuple[str, str, Callable[..., Content]]] = {
    "forward": ("range", "FP16 range of activations", _forward),
    "weights": ("weights", "Weights in 16 bits", _weights),
    "backward": ("gradients", "Gradients and loss scale", _backward),
    "proof": ("pass", "A pass in FP16", _proof),
    "lag": ("lag", "Lag of the engine", _lag),
}
"""By part of the document: the section's name, its title, and what makes its sentences and tables."""
