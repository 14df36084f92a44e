"""The report of `rl gradient`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from mismatch_probe.config import CompareConfig
from mismatch_probe.report import model
from mismatch_probe.report.format import NONE, interval, number
from mismatch_probe.report.model import Cell, Column, FigureRef, Report, Step, Text, section
from mismatch_probe.report.words import say

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mismatch_probe.report.model import State, Table
    from mismatch_probe.results.finding import Finding
    from mismatch_probe.results.gradient import Gradient, GradientEstimate, LengthEss, PairEss, RolloutGradient
    from mismatch_probe.types import MetricValue

_STATES: dict[str, State] = {"gradient-turned": "warn", "gradient-undecided": "inconclusive", "gradient-agrees": "ok"}
_IN_STEPS = ("gradient-closest-correction", "gradient-no-closer")
# Intervals shrink with the square root of the prompts: these halve them, and are enough to be calibrated.
_MORE, _LEAST_PROMPTS = 4, 64
_LEGEND = (
    "Reference: one weight π/μ a sequence, π by the FP32 trainer; cosine and norm ratio are against it. Effective "
    "batch: fraction of an unweighted batch with the same ratio of signal to noise. Added variance: against weights of "
    "1, less 1. ESS of weights: Kish's fraction. [95 % interval over prompts]"
)


def gradient_report(document: Gradient) -> Report:
    """The document as a report."""
    verdicts = [finding for finding in document.findings if finding.code in _STATES]
    others = [f for f in document.findings if f.code not in _STATES and f.code not in _IN_STEPS]
    return Report(
        title=f"Policy gradient under mismatch, {document.model}",
        state=_STATES[verdicts[0].code] if verdicts else "none",
        answer=tuple(say(finding) for finding in verdicts[:2]),
        steps=tuple(_steps(document)),
        table=_table(((found, one) for found in document.passes for one in found.estimates if found.own(one)), _LEGEND),
        notes=tuple(Text(say(finding), "note") for finding in (*verdicts[2:], *others)),
        sections=(
            *section("figure", "Cosine and effective batch, by correction", FigureRef("gradient")),
            *section("reference-weights", "Weights by the FP32 trainer", _of_reference(document), _beside(document)),
            *section("ess", "What sequence weights leave of the batch", _ess(document)),
            *section("draws", "How much depends on the advantages of this batch", _draws(document), depth="detail"),
            *section("method", "How it is measured", *_method(document)),
        ),
    )


def _steps(document: Gradient) -> Iterator[Step]:
    codes = {finding.code: finding for finding in document.findings}
    for finding in document.findings:
        if finding.code == "gradient-closest-correction":
            yield Step(say(finding), _train(document, finding))
        elif finding.code == "gradient-no-closer":
            yield Step(say(finding), _explain(document, finding))
    if "gradient-undecided" in codes:
        yield _more(document)
    elif "gradient-turned" not in codes:
        yield Step("No correction is needed at these lengths. Measure again when responses get longer.")


def _train(document: Gradient, finding: Finding) -> str:
    words = ["mismatch-probe", "rl", "run", "--model", document.config.model]
    if document.config.revision:
        words += ["--revision", document.config.revision]
    dtype = finding.text("dtype")
    return shlex.join(
        [*words, "--rollout-dtype", dtype, "--trainer-dtype", dtype, "--algorithm", finding.text("algorithm")]
    )


def _explain(document: Gradient, finding: Finding) -> str:
    config = document.config
    same = CompareConfig(model=config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    pair = ["--pair", finding.text("dtype")]
    return shlex.join(["mismatch-probe", "attribute", *same.arguments(), *pair]) if config.source is None else ""


def _more(document: Gradient) -> Step:
    n_prompts = max([_LEAST_PROMPTS, *(_MORE * found.n_prompts for found in document.passes)])
    if document.config.source is not None:
        return Step(f"Record {n_prompts:,} prompts and compare them: four times as many halve the interval.")
    config = document.config.replace(num_prompts=n_prompts)
    text = f"Measure {n_prompts:,} prompts: four times as many halve the interval."
    return Step(text, shlex.join(["mismatch-probe", "rl", "gradient", *config.arguments()]))


def _table(rows: Iterable[tuple[RolloutGradient, GradientEstimate]], legend: str = "") -> Table:
    header: list[str | Column] = [
        "rollouts",
        "correction",
        Column("weights by", rank=2),
        Column("cosine", numeric=True),
        Column("effective batch", numeric=True, rank=1),
        Column("norm ratio", numeric=True, rank=3),
        Column("added variance", numeric=True, rank=4),
        Column("ESS of weights", numeric=True, rank=5),
    ]
    cells: list[list[Cell | str]] = [
        [
            found.rollout_dtype,
            one.correction,
            one.trainer_dtype or NONE,
            model.estimate(one.metrics.cosine),
            model.estimate(one.metrics.effective_batch),
            model.estimate(one.metrics.norm_ratio),
            model.estimate(one.metrics.added_variance),
            model.estimate(one.metrics.ess_weights),
        ]
        for found, one in rows
    ]
    return model.table(header, cells, legend)


def _of_reference(document: Gradient) -> Text:
    return Text(
        "Training in 16 bits does not have these log-probs. They show what a correction would give without the "
        f"trainer's own rounding; {document.reference.correction} is the reference itself."
    )


def _beside(document: Gradient) -> Table:
    return _table((found, one) for found in document.passes for one in found.estimates if not found.own(one))


def _ess(document: Gradient) -> Table:
    pairs = [(found, pair) for found in document.passes for pair in found.pairs]
    lengths = list(dict.fromkeys(one.length for _, pair in pairs for one in pair.lengths))
    header: list[str | Column] = [
        "rollouts",
        "weights by",
        Column("mean |d|, nats", numeric=True),
        Column("ESS", numeric=True),
        Column("ESS, uncorrelated gaps", numeric=True),
        *(Column(f"ESS at {length:,} tokens", numeric=True) for length in lengths),
        Column("ESS below 0.5 from, tokens", numeric=True),
    ]
    rows = [_ess_row(found, pair, lengths) for found, pair in pairs]
    legend = (
        "ESS: effective sample size of one weight a sequence, a fraction of the sequences. Uncorrelated gaps: "
        "exp(−E d²·T) at the mean length. At other lengths: predicted from the growth of the sequence log ratio, below "
        "it for uncorrelated gaps."
    )
    return model.table(header, rows, legend)


def _ess_row(found: RolloutGradient, pair: PairEss, lengths: list[int]) -> list[Cell | str]:
    predicted = {one.length: one for one in pair.lengths}
    ahead = [_ahead(predicted[length]) if length in predicted else Cell(NONE) for length in lengths]
    return [
        found.rollout_dtype,
        pair.trainer_dtype,
        model.estimate(pair.mean_abs_logprob_diff),
        model.estimate(pair.ess_seq),
        model.estimate(pair.ess_random_walk, below=f"at {number(pair.mean_length)} tokens"),
        *ahead,
        _crossing(pair.half_length),
    ]


def _ahead(predicted: LengthEss) -> Cell:
    return model.estimate(predicted.ess_seq, below=f"uncorrelated: {model.in_line(predicted.ess_random_walk)}")


def _crossing(length: MetricValue) -> Cell:
    """A length in tokens, ∞ for what lies beyond the furthest prediction, or why there is none."""
    ends = (length.value, length.ci_low, length.ci_high)
    if all(end is None for end in ends):
        return Cell(NONE, below=length.why)
    value, low, high = ("∞" if end is None else f"{end:,.0f}" for end in ends)
    return Cell(value, f"[{low}, {high}]", length.why)


def _draws(document: Gradient) -> Table:
    header: list[str | Column] = ["rollouts", "correction", "weights by", "cosine", "norm ratio"]
    rows = [
        [
            found.rollout_dtype,
            one.correction,
            one.trainer_dtype or NONE,
            *(interval(*(limits or (None, None))) or NONE for limits in (one.draws.cosine, one.draws.norm_ratio)),
        ]
        for found in document.passes
        for one in found.estimates
    ]
    return model.table(header, rows, "The central 95 % of draws of the advantages for these very sequences.")


def _method(document: Gradient) -> tuple[Text | Table, ...]:
    root = document.directions**0.5
    header: list[str | Column] = [
        "rollouts",
        *(Column(name, numeric=True) for name in ("sequences", "prompts", "tokens", "largest |Δ log-prob|, nats")),
    ]
    rows: list[list[Cell | str]] = [
        [
            found.rollout_dtype,
            *map(model.plain, (found.n_sequences, found.n_prompts, found.n_tokens, found.logprob_gap)),
        ]
        for found in document.passes
    ]
    return (
        Text(
            "Every row is an estimate from the same sequences and the same FP32 scores, with other weights. The "
            f"reference has one weight π/μ a sequence ({document.reference.correction}), π by "
            f"{document.reference.trainer_pass}. Advantages are synthetic, +1 or −1 at random, one a sequence, seeded "
            "by its token ids. So the numbers are the noise that weights bring, not a bias towards a reward."
        ),
        Text(
            f"Gradients are projected on {document.directions:,} components: a cosine c has a standard error of about "
            f"(1 − c²)/{root:.0f} from that. The last column is how far the gradient's forward pass is from the run's "
            "FP32 trainer pass."
        ),
        model.table(header, rows),
    )
