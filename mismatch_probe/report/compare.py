"""The report of a comparison: is the gap rounding, how large is it in each pair, and where does it lie?"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from mismatch_probe.metrics.catalog import in_order
from mismatch_probe.report.attribution import attribution_answer
from mismatch_probe.report.data import (
    DEFAULT_METRIC,
    EXACT,
    diagonal_pairs,
    dtype_order,
    has_exact,
    modes_of,
    noise_floor,
    ordered_pairs,
    pair_label,
    steps_of,
)
from mismatch_probe.report.format import (
    NONE,
    WHERE_TITLES,
    bin_order,
    clipped,
    interval,
    metric_formula,
    metric_title,
    number,
    percent,
)
from mismatch_probe.report.further import further_section
from mismatch_probe.report.model import (
    Cell,
    Column,
    FigureRef,
    Items,
    Report,
    Section,
    State,
    Step,
    Table,
    Text,
    Tokens,
    Tone,
    columns,
    estimate,
    flattened,
    fraction,
    in_line,
    numeric,
    plain,
    row,
    section,
    table,
)
from mismatch_probe.report.recorded import beside_section, groups_section, lead_sections, meaning_section
from mismatch_probe.report.words import say

if TYPE_CHECKING:
    from mismatch_probe.report.data import ReportData
    from mismatch_probe.results.comparison import Comparison, Pair
    from mismatch_probe.results.finding import Finding
    from mismatch_probe.results.manifest import Manifest
    from mismatch_probe.types import MetricValue

KINDS: dict[str, State] = {"kind-rounding": "ok", "kind-more-than-rounding": "warn", "kind-unclear": "inconclusive"}
"""Codes of the answer, and the state that each gives the report."""
_ALL_UNUSABLE = "all-unusable"
_COLUMNS = {
    "kl_k3": ("KL k3", 2),
    EXACT: ("KL exact", 3),
    "ess_seq": ("ESS", 1),
    "max_abs_logprob_diff": ("worst |d|", 4),
}
_LEGEND = (
    "Mean |d|: a token's log-prob at the trainer minus the one at the rollout engine, in nats, with a 95 % interval "
    "over prompts. Self-noise: the mean |d| of an engine against itself. KL: sampled estimate of KL(μ‖π), nats per "
    "token. ESS: effective fraction of sequences after importance weighting."
)
_ESTIMATORS = {EXACT: "exact rows", "kl_k1": "k1 = −d", "kl_k2": "k2 = ½d²", "kl_k3": "k3 = eᵈ − 1 − d"}
_ERRORS = {
    "rollout_error_rms": "error of μ",
    "trainer_error_rms": "error of π",
    "predicted_gap_rms": "predicted gap",
    "measured_gap_rms": "measured gap",
    "measured_over_predicted": "measured / predicted",
    "error_correlation": "correlation of errors",
}
_COUNTS = ("n_sequences", "n_tokens", "n_nonfinite", "n_truncated", "n_empty", "n_dropped")
_TOKEN_CHARACTERS, _CONTEXT_CHARACTERS = 60, 160


def compare_report(data: ReportData) -> Report:
    """The report of a run folder."""
    summary = data.summary
    kind = next((found for found in summary.findings if found.code in (*KINDS, _ALL_UNUSABLE)), None)
    results = [found for found in summary.findings if found is not kind and found.severity != "note"]
    return Report(
        title=f"Rollout–trainer mismatch of {summary.model}",
        state=_state(data, kind),
        answer=_answer(summary, kind, results),
        steps=_steps_after(data, kind),
        lead=lead_sections(data.manifest),
        table=None if kind is not None and kind.code == _ALL_UNUSABLE else pairs_table(summary),
        notes=_notes(data),
        sections=(
            *section("findings", "Findings", Items(tuple(Text(say(found)) for found in results[1:])), depth="screen"),
            *_worst(data),
            *beside_section(summary),
            *_attribution(data),
            *section("limits", "Limits", _limits(summary)),
            *section("policy", "Token probabilities and sequences by length", FigureRef("policy"), FigureRef("ccdf")),
            *section("matrix", "Every rollout dtype with every trainer dtype", FigureRef("matrix")),
            *_exact(summary),
            *_budget(summary),
            *_where(summary),
            *further_section(summary),
            *_length(summary),
            *_comparisons(summary),
            *_ratio_tests(summary),
            *_power(summary),
            *_training_steps(summary),
            *section("tokens", "Token view", Tokens(data.tokens), depth="detail"),
            *groups_section(summary),
            *meaning_section(data.manifest),
            *section("metrics", "All metrics", _metrics(summary), depth="detail"),
            *_passes(data),
        ),
    )


def _answer(summary: Comparison, kind: Finding | None, results: list[Finding]) -> tuple[str, ...]:
    found = [*([] if kind is None else [kind]), *results[:1]]
    return (*_over(summary), *(say(one) for one in found)) or ("Nothing was compared.",)


def _state(data: ReportData, kind: Finding | None) -> State:
    if any(limit.verdict != "ok" for limit in data.summary.limits) or (kind is not None and kind.code == _ALL_UNUSABLE):
        return "fail"
    return "inconclusive" if kind is None else KINDS[kind.code]


def _steps_after(data: ReportData, kind: Finding | None) -> tuple[Step, ...]:
    """What to do next: finish the run first, then what the kind of gap asks for."""
    steps, folder = [], shlex.quote(str(data.folder))
    if data.manifest.status != "complete":
        steps.append(
            Step(
                "Finish the run: some passes are missing.",
                f"mismatch-probe compare --resume {folder}",
            )
        )
    match None if kind is None else kind.code:
        case "kind-rounding":
            steps.append(Step("Check the model before RL.", f"mismatch-probe audit --resume {folder}"))
        case "kind-more-than-rounding" | "kind-unclear" if _is_all_recorded(data.manifest):
            source = shlex.quote(str(data.manifest.config.source))
            command = f"mismatch-probe compare --from {source} --model MODEL --rescore --replay"
            text = "Score and decode the ids here to see which side is off; MODEL is the model that sampled them."
            steps.append(Step(text, command))
        case "kind-more-than-rounding" if data.attribution is None:
            steps.append(Step("Find where the gap arises.", f"mismatch-probe attribute --resume {folder}"))
        case "kind-unclear" if kind is not None and kind.maybe("more_prompts") is not None:
            wanted = data.manifest.prompts.n + int(kind.number("more_prompts"))
            command = f"mismatch-probe compare --model {shlex.quote(data.summary.model)} --num-prompts {wanted}"
            steps.append(Step(f"Compare over {wanted:,} prompts.", command))
    return tuple(steps)


def _is_all_recorded(manifest: Manifest) -> bool:
    """Whether no engine has run, so that no model is known."""
    return manifest.recorded is not None and not manifest.config.model


def pairs_table(summary: Comparison) -> Table | None:
    """A row per pair: mean |d| with its interval, self-noise, and a few metrics more; None without a pair."""
    keys = [key for key in _COLUMNS if key != EXACT or has_exact(summary)]
    modes = modes_of(summary)
    rows = [
        row(
            Cell(pair_label(pair, modes)),
            estimate(pair.metrics[DEFAULT_METRIC], tone="strong"),
            plain(pair.self_noise.mean_abs, digits=2),
            *(Cell(estimate(pair.metrics[key]).text) for key in keys),
            plain(pair.n_tokens),
        )
        for pair in ordered_pairs(summary)
    ]
    header = columns(
        "rollout → trainer",
        Column("mean |d|", numeric=True),
        Column("self-noise", numeric=True, rank=5),
        *(Column(name, numeric=True, rank=rank) for name, rank in (_COLUMNS[key] for key in keys)),
        Column("tokens", numeric=True, rank=6),
    )
    return table(header, rows, _LEGEND) if rows else None


def _notes(data: ReportData) -> tuple[Text, ...]:
    summary, modes = data.summary, modes_of(data.summary)
    met = [limit.verdict == "ok" for limit in summary.limits]
    notes = [Text(f"All {len(met)} limits of --fail-on are met.", "ok")] if met and all(met) else []
    notes += [Text(f"{pair_label(pair, modes)} is missing: {pair.why}", "warn") for pair in summary.missing]
    return (*notes, *(Text(say(found), "note") for found in summary.findings if _is_note(found)))


def _is_note(found: Finding) -> bool:
    return found.severity == "note" and found.code not in KINDS


def _over(summary: Comparison) -> tuple[str, ...]:
    """That limits of `--fail-on` are not met: the first thing to say."""
    over = [limit for limit in summary.limits if limit.verdict != "ok"]
    if not over:
        return ()
    first = over[0]
    where = pair_label(first, modes_of(summary))
    return (f"{len(over)} of {len(summary.limits)} limits of --fail-on are not met, e.g. {first.limit} at {where}.",)


def _limits(summary: Comparison) -> Table:
    modes = modes_of(summary)
    order = ("fail", "inconclusive", "ok")
    rows = [
        row(
            limit.limit,
            pair_label(limit, modes),
            Cell(limit.verdict, tone=_TONES[limit.verdict]),
            plain(limit.value, below=limit.why),
        )
        for limit in sorted(summary.limits, key=lambda limit: order.index(limit.verdict))
    ]
    return table(columns("limit", "pair", "verdict", *numeric("measured")), rows)


_TONES: dict[str, Tone] = {"fail": "fail", "inconclusive": "warn", "ok": "ok"}


def _worst(data: ReportData) -> tuple[Section, ...]:
    """The token with the largest |d| of each pair on the screen, the others on the page."""
    first = {token.pair: token for token in reversed(data.worst_tokens)}
    lines = tuple(
        Text(
            f"{name}: “{clipped(token.token_text, _TOKEN_CHARACTERS)}” of {token.prompt_id}, position "
            f"{token.position}: log μ {number(token.rollout_logprob)}, log π {number(token.trainer_logprob)}"
        )
        for name, token in reversed(first.items())
    )
    rows = [
        row(
            token.pair,
            plain(token.log_ratio),
            plain(token.rollout_logprob),
            plain(token.trainer_logprob),
            fraction(token.contribution),
            Cell(f"sequence {token.sequence_id}", below=f"{token.prompt_id}, position {token.position}"),
            Cell(
                f"“{clipped(token.token_text, _TOKEN_CHARACTERS)}”",
                below=clipped(token.context, _CONTEXT_CHARACTERS, keep_end=True),
            ),
        )
        for token in data.worst_tokens
    ]
    numbers = numeric("d", "log μ", "log π", "contribution to Σd²")
    return (
        *section("worst", "Worst token of each pair of equal dtypes", Items(lines), depth="screen"),
        *section("worst-tokens", "Worst tokens", table(columns("pair", *numbers, "where", "token, after"), rows)),
    )


def _attribution(data: ReportData) -> tuple[Section, ...]:
    if data.attribution is None:
        return ()
    lines = (*attribution_answer(data.attribution), "The details are in attribute/report.html.")
    return section("attribution", "Where the gap arises", Items(tuple(Text(line) for line in lines)), depth="screen")


def _exact(summary: Comparison) -> tuple[Section, ...]:
    if not has_exact(summary):
        return ()
    modes = modes_of(summary)
    rows = [
        row(
            pair_label(pair, modes),
            estimate(pair.metrics[EXACT]),
            estimate(pair.metrics["kl_k3"]),
            fraction(pair.metrics["top1_flip_rate"].value),
        )
        for pair in ordered_pairs(summary)
    ]
    header = columns("pair", *numeric("KL exact", "KL k3", "likeliest token differs"))
    legend = (
        "KL(μ‖π) in nats per token, with 95 % intervals over prompts. Exact: summed over the whole vocabulary at the "
        "positions whose rows of logits were kept."
    )
    return section("exact", "Exact KL", table(header, rows, legend), _estimators(summary), FigureRef("exact"))


def _estimators(summary: Comparison) -> Table:
    rows = []
    for name, pair in diagonal_pairs(summary).items():
        costs = {cost.key: cost for cost in pair.estimators or ()}
        rows += [
            row(
                name,
                title,
                *(plain(value) for value in (cost.mean, cost.bias, cost.standard_deviation)),
                plain(cost.tokens_needed),
            )
            for key, title in _ESTIMATORS.items()
            if (cost := costs.get(key)) is not None
        ]
    numbers = ("mean", "bias", "standard deviation of one token", "tokens for ±10 %")
    legend = (
        "What each estimator of KL(μ‖π) converges to, in nats, its bias, and the independent tokens that it needs for "
        "±10 % with 95 % confidence. Computed from the full rows, without sampling noise."
    )
    return table(columns("pair", "estimator", *numeric(*numbers)), rows, legend)


def _budget(summary: Comparison) -> tuple[Section, ...]:
    modes = modes_of(summary)
    rows = [
        row(pair_label(pair, modes), *(estimate(pair.budget.get(key)) for key in _ERRORS))
        for pair in ordered_pairs(summary)
        if pair.budget is not None
    ]
    floor = noise_floor(summary)
    legend = (
        f"RMS over tokens, nats, against {summary.reference}. Predicted: √((error of μ)² + (error of π)²), the gap if "
        "the errors of both sides are independent. A Hugging Face reference charges every difference of "
        "implementation to the rollout engine; the float32 pair shows how large those are."
    )
    if floor is not None:
        legend += f" Error of a float32 reference itself: {in_line(floor, unit='nats')}."
    header = columns("pair", *numeric(*_ERRORS.values()))
    return section("budget", "Error budget", table(header, rows, legend), FigureRef("budget"))


def _where(summary: Comparison) -> tuple[Section, ...]:
    pairs = dtype_order(summary.where)
    rows = []
    for key, title in WHERE_TITLES.items():
        bins = {name: {one.label: one for one in summary.where[name].get(key, ())} for name in pairs}
        for label in bin_order(label for found in bins.values() for label in found):
            cells = [
                Cell(
                    percent(one.contribution),
                    below=f"{percent(one.fraction_of_tokens)} of tokens; mean |d| {number(one.mean_abs)} "
                    f"{interval(one.ci_low, one.ci_high)}".rstrip(),
                )
                if (one := bins[name].get(label)) is not None
                else Cell(NONE)
                for name in pairs
            ]
            rows.append(row(title, label, *cells))
    legend = "Contribution of each bin to Σd², its part of the tokens, and its mean |d| in nats."
    bins_table = table(columns("property", "bin", *numeric(*pairs)), rows, legend)
    return (
        *section("where", "Which tokens make the gap", FigureRef("where"), FigureRef("share")),
        *section("where-bins", "Which tokens make the gap, in numbers", bins_table, depth="detail"),
    )


def _length(summary: Comparison) -> tuple[Section, ...]:
    rows = []
    for name in dtype_order(summary.length):
        for prediction in summary.length[name].predictions:
            keys = ("ess_seq", "frac_seq_outside_2", "frac_seq_outside_3")
            values = [prediction.values[key] for key in keys if key in prediction.values]
            kl = prediction.values.get("kl_seq")
            whys = [value.why for value in (*values, *([] if kl is None else [kl])) if value.why]
            rows.append(
                row(
                    name,
                    Cell(f"{prediction.length:,}", below=whys[0] if whys else ""),
                    *(_percents(prediction.values.get(key)) for key in keys),
                    estimate(kl),
                )
            )
    weights = ("ESS", "weights outside [½, 2]", "outside [⅓, 3]", "sequence KL (nats)")
    header = columns("pair", *numeric("response length", *weights))
    legend = (
        "Predicted from each pair's own samples, with 95 % bands: the effective sample size of the sequence weights, "
        "the fraction of weights that truncation would touch, and the KL of whole responses. The bands hold if these "
        "prompts show how much prompts differ. A prediction that contradicts the measured values is left out."
    )
    return section("length", "Longer responses", FigureRef("length"), table(header, rows, legend))


def _percents(value: MetricValue | None) -> Cell:
    if value is None or value.value is None:
        return Cell(NONE)
    low, high = value.ci_low, value.ci_high
    return Cell(percent(value.value), "" if low is None or high is None else f"[{percent(low)}, {percent(high)}]")


def _comparisons(summary: Comparison) -> tuple[Section, ...]:
    rows = []
    for one in summary.comparisons:
        below = ""
        if one.differs is None:
            below = one.ratio.why
        elif not one.differs and one.detectable_ratio is not None:
            below = f"a ratio of {number(one.detectable_ratio)} would have shown"
        differ = "inconclusive" if one.differs is None else "yes" if one.differs else "no"
        rows.append(
            row(
                f"{one.numerator} / {one.denominator}",
                metric_title(one.key),
                estimate(one.ratio),
                plain(one.p_value, digits=2),
                plain(one.p_holm, digits=2),
                Cell(differ, below=below),
            )
        )
    numbers = numeric("ratio", "p", "p, Holm")
    legend = (
        "Ratios between pairs of equal dtypes, paired by prompt, with 95 % intervals. p-values are adjusted over all "
        "rows (Holm)."
    )
    found = table(columns("pairs", "metric", *numbers, "differ"), rows, legend)
    return section("comparisons", "Between dtypes", found, depth="detail")


def _ratio_tests(summary: Comparison) -> tuple[Section, ...]:
    modes = modes_of(summary)
    rows = []
    for pair in ordered_pairs(summary):
        for test in pair.ratio_tests:
            mean = test.mean_ratio
            where = test.family if test.left is None else f"{test.family} {number(test.left)}–{number(test.right)}"
            why = mean.why if test.verdict == "inconclusive" else ""
            cells = (estimate(mean, digits=6), plain(test.p_holm, digits=2), Cell(test.verdict, below=why))
            rows.append(row(pair_label(pair, modes), where, plain(test.n_tokens), *cells))
    numbers = numeric("tokens", "mean ρ", "p, Holm")
    legend = (
        "On policy the mean of ρ = π/μ is 1 in every bin, however large the rounding errors are. A violation means "
        "that one side's sampling distribution is truncated or rescaled. Bins of probability allow for the d² that "
        "rounding adds. p-values are adjusted over all rows (Holm). Violations below 1e-4 are negligible: float32 "
        "log-softmax alone is off by some 1e-5."
    )
    found = table(columns("pair", "bin", *numbers, "E[ρ] = 1"), rows, legend)
    return section("ratio-tests", "Is the mean importance ratio 1?", found, depth="detail")


def _power(summary: Comparison) -> tuple[Section, ...]:
    modes = modes_of(summary)
    rows = [
        row(
            pair_label(pair, modes),
            metric_title(key),
            Cell(NONE if needed.half_width is None else f"±{percent(needed.half_width)}"),
            Cell(f"±{percent(needed.precision)}"),
            plain(needed.more, below=needed.why),
        )
        for pair in ordered_pairs(summary)
        for key, needed in pair.prompts_needed.items()
    ]
    numbers = numeric("now", "wanted", "more prompts")
    legend = (
        "Half the width of the 95 % interval, and how many more prompts of the same kind make it narrow enough nine "
        "times in ten; less often where few prompts differ most."
    )
    return section(
        "power", "How many more prompts?", table(columns("pair", "metric", *numbers), rows, legend), depth="detail"
    )


def _training_steps(summary: Comparison) -> tuple[Section, ...]:
    modes = modes_of(summary)
    pairs = [pair for pair in ordered_pairs(summary) if steps_of(pair)]
    keys = list(dict.fromkeys(key for pair in pairs for step in steps_of(pair) for key in step.metrics))
    rows = [
        row(
            pair_label(pair, modes),
            step.label,
            plain(step.n_tokens),
            *(estimate(step.metrics.get(key)) for key in keys),
        )
        for pair in pairs
        for step in steps_of(pair)
    ]
    header = columns("pair", "step", *numeric("tokens", *map(metric_title, keys)))
    legend = "The mismatch of each training step that the recorded sequences name."
    return section("steps", "Training steps", FigureRef("steps"), table(header, rows, legend))


def _metrics(summary: Comparison) -> Table:
    pairs = diagonal_pairs(summary)
    keys = in_order(key for pair in pairs.values() for key in pair.metrics)
    rows = [
        row(
            Cell(metric_title(key), below=key),
            *(_metric(pair, key) for pair in pairs.values()),
            metric_formula(key),
        )
        for key in keys
    ]
    return table(columns("metric", *numeric(*pairs), "formula"), rows)


def _metric(pair: Pair, key: str) -> Cell:
    value = pair.metrics.get(key)
    return estimate(value, below="" if value is None else value.why)


def _passes(data: ReportData) -> tuple[Section, ...]:
    """What each pass produced, each engine against itself, and where everything came from."""
    rows = []
    for name, state in data.manifest.passes.items():
        promise = state.deterministic
        same = NONE if promise is None else "promised" if promise.promised else "not promised"
        rows.append(
            row(
                name,
                Cell(state.status, below=state.why),
                *(plain(state.counts.get(key)) for key in _COUNTS),
                Cell(same, below="" if promise is None else promise.why),
            )
        )
    counts = ("sequences", "tokens", "non-finite", "truncated", "empty", "dropped")
    passes = table(columns("pass", "status", *numeric(*counts), "same bits again"), rows)
    noise = [
        row(
            Cell(one.pass_id, below=one.self_noise_pass),
            plain(one.measured.n_tokens),
            plain(one.measured.n_sequences),
            plain(one.measured.n_diverged_sequences),
            plain(one.measured.mean_abs_logprob_diff),
            plain(one.measured.max_abs_logprob_diff),
        )
        for one in data.summary.self_noise
    ]
    numbers = ("tokens", "sequences", "diverged sequences", "mean |d| (nats)", "max |d| (nats)")
    noise_table = table(columns("pass", *numeric(*numbers)), noise)
    provenance = table(["entry", "value"], list(flattened(data.manifest.content())))
    return (
        *section("passes", "Passes", passes, depth="detail"),
        *section("self-noise", "Self-noise: each engine against itself", noise_table, depth="detail"),
        *section("provenance", "Provenance", provenance, depth="detail"),
    )
