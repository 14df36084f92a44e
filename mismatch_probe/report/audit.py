"""An audit as a report: an answer for each precision, what to do, a table of checks, then what it rests on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from pydantic import JsonValue

from mismatch_probe.config import CompareConfig
from mismatch_probe.config.compare import ModelSettings, PromptSettings
from mismatch_probe.dtypes import DTYPE_INFOS, dtype_label
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.corrections import Correction
from mismatch_probe.metrics.floats import FP16, ScalerTrace
from mismatch_probe.report.format import NONE, count, interval, number, percent
from mismatch_probe.report.model import (
    Block,
    Cell,
    Code,
    Column,
    FigureRef,
    Report,
    Section,
    Step,
    Table,
    Text,
    Tone,
    columns,
    estimate,
    flattened,
    fraction,
    json_text,
    numeric,
    plain,
    section,
    table,
)
from mismatch_probe.report.words import say
from mismatch_probe.report.words.audit import check_title, limit_text, pair_label, settle_text
from mismatch_probe.results.audit import (
    PARTS,
    VERDICTS,
    Activations,
    Answer,
    Audit,
    Baseline,
    Check,
    CheckChange,
    Fp16Pass,
    Gradients,
    GradientTensor,
    KindPeak,
    Lag,
    PrecisionPair,
    Settle,
    ValueChange,
    Verdict,
    WeightMotion,
    Weights,
)

_TOP = 10
_TONES: dict[Verdict, Tone] = {"ok": "ok", "warn": "warn", "fail": "fail", "inconclusive": "note"}
_FRAMEWORKS = {"trl": "TRL", "verl": "verl", "vllm": "vLLM's command line"}
# Settings that a command on the same model and prompts takes over.
_KEPT = (*ModelSettings.model_fields, *PromptSettings.model_fields, "temperature")
_BUILT_IN_PROMPTS = 96
_LAG = "audit-engine-lag"
# Checks of the gap itself, whose cause `attribute` looks for.
_OF_GAP = ("fp32_floor", "one_sided", *CATALOG)


def audit_report(audit: Audit, run: PurePath | None = None) -> Report:
    """The report of an audit.

    Args:
        audit: What to show.
        run: Folder of its run, which commands name; `RUN` for None.
    """
    folder = "RUN" if run is None else shlex.quote(str(run))
    broken = bool(audit.findings)
    return Report(
        title=f"May {audit.model} go into RL?",
        state=audit.verdict,
        answer=_answer(audit),
        steps=tuple(_steps(audit, folder)),
        table=None if broken else _checks_by_precision(audit),
        notes=tuple(_notes(audit)),
        sections=(
            *(() if broken else _recommendation(audit)),
            *(() if broken else _pairs(audit)),
            *_measured(audit),
            *_baseline(audit.baseline),
            *section("provenance", "Provenance", table(("entry", "value"), tuple(_provenance(audit))), depth="detail"),
        ),
    )


def _label(pair: PrecisionPair) -> str:
    return pair_label(pair.rollout_dtype, pair.trainer_dtype, pair.trainer_mode)


def _verdict(verdict: Verdict) -> str:
    return {"ok": "is ok", "warn": "warns", "fail": "fails", "inconclusive": "is inconclusive"}[verdict]


def _answer(audit: Audit) -> tuple[str, ...]:
    """The verdict of every precision, then a sentence of each; of a model that computes nothing finite, that alone."""
    names = ", ".join(f"{_label(answer)} {_verdict(answer.verdict)}" for answer in audit.answers)
    if audit.findings:
        return (f"{names}.", *(say(finding) for finding in audit.findings))
    deciding = [_label(answer) for answer in audit.answers if answer.decides]
    whose = "the recommended precision" if not audit.options.pairs else "as --pair asks"
    of = f" The verdict is of {' and '.join(deciding)}, {whose}." if deciding else ""
    return (
        f"{names}.{of}",
        *(_sentence(answer, _decides(audit, answer), audit.max_tokens) for answer in audit.answers),
    )


def _decides(audit: Audit, answer: Answer) -> Check | None:
    pair = audit.pair(answer)
    return None if pair is None else pair.check(answer.check)


def _sentence(answer: Answer, check: Check | None, max_tokens: int) -> str:
    parts = [f"{_label(answer)}: {answer.verdict}. {say(answer.finding)}"]
    if check is not None and check.name in CATALOG and check.value.value is not None:
        parts.append(f"Limit: {limit_text(check.bounds)} ({check.bounds.source}).")
    if answer.also:
        parts.append(f"Also: {', '.join(answer.also)}.")
    if answer.settle is not None:
        parts.append(settle_text(answer.settle, max_tokens))
    return " ".join(part for part in parts if part)


def _steps(audit: Audit, run: str) -> Iterator[Step]:
    if audit.findings:
        weights = any(finding.where for finding in audit.findings)
        yield Step(
            "Compare the checkpoint's files with their source, and load it in FP32 elsewhere."
            if weights
            else "Look at both engines' log-probs in tokens.parquet: no tensor of the model is known not to be finite."
        )
    elif audit.recommendation is not None:
        yield from (Step(say(finding)) for finding in audit.recommendation.findings if finding.code != _LAG)
    unmeasured = any(getattr(audit.range, part) is None for part in PARTS)
    if unmeasured and audit.provenance.config.source is None:
        yield Step("Measure on the model what is missing.", f"mismatch-probe audit --resume {run}")
    if audit.findings:
        return
    if any(check in _OF_GAP for answer in audit.answers for check in _bad_checks(audit, answer)):
        yield Step("Find out where the gap comes from.", _command("attribute", audit.provenance.config))
    yield from _larger_run(audit)


def _bad_checks(audit: Audit, answer: Answer) -> Iterator[str]:
    """Checks of an answered pair that fail or warn for certain."""
    pair = audit.pair(answer)
    yield from (check.name for check in (() if pair is None else pair.checks) if check.verdict in ("fail", "warn"))


def _larger_run(audit: Audit) -> Iterator[Step]:
    """The run that settles what a larger or wider run settles; none for recorded sequences."""
    config, open_ = audit.provenance.config, [answer for answer in audit.answers if answer.settle is not None]
    needs = Settle.all_of(answer.settle for answer in open_ if answer.settle is not None)
    changes: dict[str, str] = {}
    text = f"Settle {', '.join(_label(answer) for answer in open_)}."
    if needs.more_prompts is not None:
        wanted = audit.n_prompts + needs.more_prompts
        changes["num_prompts"] = str(wanted)
        if config.prompts is None and wanted > _BUILT_IN_PROMPTS:
            changes["prompts"] = "PROMPTS.jsonl"
            text += f" The built-in set has {_BUILT_IN_PROMPTS} prompts; name a file with {count(wanted)} or more."
    if needs.max_tokens is not None:
        changes["max_tokens"] = str(needs.max_tokens)
    if needs.dtypes:
        for name in ("rollout_dtypes", "trainer_dtypes"):
            there = {*needs.dtypes, *getattr(config, name)}
            changes[name] = ",".join(info.short for info in DTYPE_INFOS.values() if info.name in there)
    if needs.trainer_modes:
        changes["trainer_modes"] = ",".join(dict.fromkeys((*config.trainer_modes, *needs.trainer_modes)))
    if changes and config.source is None:
        options = audit.options
        profile = "" if options.profile == "default" else f" --profile {shlex.quote(options.profile)}"
        yield Step(text, f"{_command('audit', config, changes)} --planned-tokens {options.planned_tokens}{profile}")


def _command(name: str, config: CompareConfig, changes: Mapping[str, str] | None = None) -> str:
    """A command on the model and the prompts of a run."""
    kept = CompareConfig(**{key: getattr(config, key) for key in _KEPT}).replace(**changes or {})
    return shlex.join(["mismatch-probe", name, *kept.arguments()])


def _checks_by_precision(audit: Audit) -> Table | None:
    """A row a check, a column an answered pair."""
    pairs = [pair for answer in audit.answers if (pair := audit.pair(answer)) is not None]
    names = dict.fromkeys(check.name for pair in pairs for check in pair.checks)
    if not names:
        return None
    verdicts = (Cell(pair.verdict, tone=_TONES[pair.verdict]) for pair in pairs)
    rows = [(Cell("verdict", tone="strong"), *verdicts, Cell(""))]
    for name in names:
        found = [pair.check(name) for pair in pairs]
        bounds = next(check.bounds for check in found if check is not None)
        rows.append(
            (
                Cell(name, below=check_title(name)),
                *(Cell(NONE) if check is None else _outcome(check) for check in found),
                Cell(limit_text(bounds), below=bounds.source),
            )
        )
    legend = (
        f"Profile {audit.profile.name}. A check is judged by its whole 95 % interval: it is inconclusive where that "
        "lies on both sides of a limit, or where too few prompts ran to exclude more."
    )
    columns = (Column("check"), *(Column(_label(pair)) for pair in pairs), Column("limit", rank=1))
    return table(columns, rows, legend)


def _outcome(check: Check) -> Cell:
    value = check.value
    if value.value is None:
        return Cell(check.verdict, below=value.why, tone=_TONES[check.verdict])
    # Of what lies near 1 the distance from 1 counts.
    digits = 5 if 0.9 < value.value < 1.1 else 3
    limits = interval(value.ci_low, value.ci_high, digits)
    return Cell(f"{check.verdict} {number(value.value, digits)}", limits, tone=_TONES[check.verdict])


def _notes(audit: Audit) -> Iterator[Text]:
    if audit.baseline is not None:
        worse = audit.baseline.regressions
        yield from (Text(f"Worse than the baseline: {_regression(row)}.", "fail") for row in worse)
    yield from (Text(say(finding), "note") for finding in audit.missing)
    if audit.findings or not audit.pairs:
        return
    if audit.recommendation is not None:
        yield from (Text(say(finding), "dim") for finding in audit.recommendation.findings if finding.code == _LAG)
    rest = [pair for pair in audit.pairs if pair.key not in {answer.key for answer in audit.answers}]
    counts = [f"{n} {verdict}" for verdict in VERDICTS if (n := sum(p.verdict == verdict for p in rest))]
    if counts:
        yield Text(f"Pairs of mixed precision: {', '.join(counts)}.", "dim")


def _regression(row: CheckChange) -> str:
    why = "" if row.finding is None else say(row.finding)
    values = "" if row.change is None else f" ({number(row.before)} → {number(row.after)})"
    return f"{row.name} of {_label(row)}, {why}{values}"


def _recommendation(audit: Audit) -> tuple[Section, ...]:
    found = audit.recommendation
    if found is None:
        return ()
    chosen = None if found.correction is None else found.correction.name
    rows = [
        (
            Cell(
                row.correction.title,
                below=f"{row.correction.name}{', recommended' if row.correction.name == chosen else ''}",
            ),
            Cell(_bounds(row.correction)),
            Cell(
                percent(row.fraction.value),
                _percents(row.fraction.ci_low, row.fraction.ci_high),
                row.fraction.why,
            ),
        )
        for row in found.corrections
    ]
    header = ("correction", "weight", Column("tokens touched", numeric=True))
    blocks: list[Block] = []
    for snippet in found.snippets:
        blocks.append(Code(snippet.text, _FRAMEWORKS[snippet.framework]))
        blocks.append(Text(" ".join(say(note) for note in snippet.notes)))
    return (
        *section("configuration", f"Configuration of {_label(found)}", *blocks),
        *section("corrections", f"Importance corrections of {_label(found)}", table(header, rows)),
    )


def _bounds(correction: Correction) -> str:
    low, high = correction.low, correction.high
    if not correction.masks:
        return f"capped at {high:g}"
    return f"masked outside [{low:g}, {high:g}]" if low else f"masked above {high:g}"


def _percents(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{percent(low)}, {percent(high)}]"


_CHECK_HEADER = ("check", "verdict", Column("value", numeric=True), "limit", "evidence")


def _pairs(audit: Audit) -> tuple[Section, ...]:
    """The evidence of pairs with an answer, and what is not ok of the others."""
    answered = {answer.key for answer in audit.answers}
    found: list[Section] = []
    for pair in audit.pairs:
        if pair.key in answered:
            rows = [_check(check, audit.max_tokens) for check in _by_verdict(pair.checks)]
            name = "checks-" + "-".join(pair.key)
            found += section(name, f"Checks of {_label(pair)}", table(_CHECK_HEADER, rows))
    every = [
        (
            Cell(_label(pair)),
            Cell(pair.verdict, tone=_TONES[pair.verdict]),
            estimate(pair.mean_abs_logprob_diff),
            Cell(", ".join(f"{check.name} ({check.verdict})" for check in _by_verdict(pair.checks) if _shown(check))),
            Cell(f"{count(pair.n_tokens)} of {count(pair.n_prompts)} prompts"),
        )
        for pair in audit.pairs
    ]
    header = ("rollout → trainer", "verdict", Column("mean |d| (nats)", numeric=True), "checks not ok", "tokens")
    return (*section("pairs", "Every precision pair", table(header, every)), *found)


def _shown(check: Check) -> bool:
    return check.verdict != "ok"


def _by_verdict(checks: Sequence[Check]) -> list[Check]:
    """The worst first, those of one verdict in the profile's order."""
    return sorted(checks, key=lambda check: VERDICTS.index(check.verdict))


def _check(check: Check, max_tokens: int) -> tuple[Cell, ...]:
    open_ = f"{check.best} or {check.worst}" if check.verdict == "inconclusive" else ""
    settle = "" if check.settle is None else settle_text(check.settle, max_tokens)
    return (
        Cell(check.name, below=check_title(check.name)),
        Cell(check.verdict, below=open_, tone=_TONES[check.verdict]),
        estimate(check.value),
        Cell(limit_text(check.bounds), below=check.bounds.source),
        Cell(say(check.finding), below=settle),
    )


def _measured(audit: Audit) -> tuple[Section, ...]:
    """What was measured on the model itself."""
    found = audit.range
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
    """A magnitude, from 1,000 on in full, so that it can be compared with FP16's largest number; 0 was never seen."""
    if value == 0:
        return Cell(NONE, below=below)
    return Cell(f"{value:,.0f}" if 1e3 <= value < 1e7 else number(value), below=below)


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


def _baseline(found: Baseline | None) -> tuple[Section, ...]:
    """What differs in how the two audits were made, and what came of it."""
    if found is None:
        return ()
    worse = len(found.regressions)
    text = (
        f"Baseline: {found.source} ({found.model}). {worse or 'No'} {'check is' if worse == 1 else 'checks are'} "
        f"worse, of {len(found.checks)} that both audits have. A value that changed by no more than its uncertainty "
        "is not worse."
    )
    blocks: list[Block] = [Text(text)]
    if found.gone:
        gone = ", ".join(f"{row.name} of {_label(row)}" for row in found.gone)
        blocks.append(Text(f"No longer checked: {gone}."))
    if not found.changed:
        blocks.append(Text("Nothing is recorded to differ in how the two were made."))
    changed = [(Cell(row.what), Cell(json_text(row.before)), Cell(json_text(row.after))) for row in found.changed]
    blocks += [
        _changes(found.regressions, "What is worse."),
        table(("setting", "before", "now"), changed, "What differs in how the two were made."),
        _changes(sorted(found.checks, key=lambda row: row.finding is None), "Every check that both have."),
    ]
    return section("baseline", "Against the baseline", *blocks)


def _changes(rows: Sequence[CheckChange], legend: str) -> Table:
    cells = [
        (
            Cell(row.name, below=_label(row)),
            Cell(number(row.before), below=row.verdict_before),
            Cell(number(row.after), below=row.verdict_after),
            _change(row.change),
            Cell("" if row.finding is None else say(row.finding)),
        )
        for row in rows
    ]
    header = columns("check", *numeric("before", "now", "change"), "why it is worse")
    return table(header, cells, legend)


def _change(change: ValueChange | None) -> Cell:
    if change is None:
        return Cell(NONE)
    sign = "×" if change.kind == "ratio" else "+" if change.value > 0 else ""
    return Cell(f"{sign}{number(change.value)}", interval(change.ci_low, change.ci_high))


def _provenance(audit: Audit) -> Iterator[tuple[Cell, Cell]]:
    content: dict[str, JsonValue] = {
        "tool_version": audit.tool_version,
        **audit.model_dump(mode="json", include={"profile", "options"}),
        **audit.provenance.model_dump(mode="json"),
    }
    for name, value in flattened(content):
        yield Cell(name), Cell(value)
