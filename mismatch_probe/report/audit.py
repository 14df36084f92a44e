"""An audit as a report: an answer for each precision, what to do, a table of checks, then what it rests on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from pydantic import JsonValue

from mismatch_probe.config import CompareConfig
from mismatch_probe.config.compare import ModelSettings, PromptSettings
from mismatch_probe.dtypes import DTYPE_INFOS
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.corrections import Correction
from mismatch_probe.report.format import NONE, count, digits_of, interval, number, percent
from mismatch_probe.report.model import (
    Block,
    Cell,
    Code,
    Column,
    Report,
    Section,
    Step,
    Table,
    Text,
    Tone,
    columns,
    estimate,
    flattened,
    json_text,
    numeric,
    section,
    table,
)
from mismatch_probe.report.ranges import range_sections
from mismatch_probe.report.words import say
from mismatch_probe.report.words.audit import check_title, limit_text, pair_label, settle_text
from mismatch_probe.results.audit import (
    VERDICTS,
    Answer,
    Audit,
    Baseline,
    Check,
    CheckChange,
    PrecisionPair,
    Settle,
    ValueChange,
    Verdict,
)
from mismatch_probe.results.ranges import PARTS

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
            *range_sections(audit.range),
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
    digits = digits_of(value.value)
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
