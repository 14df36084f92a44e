"""An attribution as a report: where a gap arises, and what each setting, layer and module has to do with it."""

from __future__ import annotations

import shlex

from mismatch_probe.metrics.inside import THRESHOLD, Inside, LayerRow
from mismatch_probe.metrics.ladder import Change
from mismatch_probe.report.format import NONE, count, number
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
    Tone,
    columns,
    estimate,
    fraction,
    numeric,
    plain,
    section,
    table,
)
from mismatch_probe.report.preflight import preflight_note
from mismatch_probe.report.words import say
from mismatch_probe.report.words.attribute import (
    PASSES,
    PLACES,
    SETTINGS,
    advice,
    fix_of,
    part_interval,
    part_text,
    rung_label,
    score_text,
)
from mismatch_probe.results.attribution import WHERE, Attribution, AttributionPlan, SettingResult
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

FILE = "attribution.json"
_CLOSING = ("setting-closes-gap", "both-sides-close-gap", "routes-close-gap")
# So many layers are all shown; of more, about this many and those that stand out.
_LAYERS = 12
_MANY_PROMPTS = 256
_KINDS = {"module": "its own result", "between": "what reaches its input", "end": "its code outside its modules"}
_INSIDE = ("layers", "module", "input", "layer-code", "step", "tensor", "hidden", "absent", "nothing-stands", "differs")
_SCORE = (
    "A score is how far the sides are apart, over √2 times the rounding error that one of them makes against a wider "
    f"forward pass of the same input; rounding alone stays below {THRESHOLD:g}."
)


def attribution_report(found: Attribution, run: str = "RUN") -> Report:
    """Everything that is shown of an attribution; `run` is the folder that commands name."""
    return Report(
        title=f"Where the gap of {found.model} arises: {_pair(found)}",
        state=_state(found),
        answer=attribution_answer(found),
        steps=_steps(found, run),
        table=_table(found),
        notes=tuple(Text(say(one), "note") for one in found.findings if one not in found.answer and _noted(one)),
        sections=(
            *_ladder(found),
            *_settings(found),
            *_both_sides(found),
            *_inside(found),
            *_modules(found),
            *_fixes(found),
            *_experts(found),
            *_not_measured(found),
            *_layers(found),
        ),
    )


def attribution_answer(found: Attribution) -> tuple[str, ...]:
    """Where the gap arises, and a fault or whether rounding explains it."""
    return tuple(say(one) for one in found.answer)


def plan_report(plan: AttributionPlan) -> Report:
    """What an attribution would run."""
    rows = [*plan.passes, *plan.processes]
    processes = [(row.name, plain(row.n_passes), _duration(row.seconds)) for row in rows]
    measured = [row for row in plan.settings if not row.why]
    settings = [(row.name, row.change, Cell(row.why, tone="dim")) for row in plan.settings if row.why]
    return Report(
        title=f"Plan of an attribution of {plan.model} on {plan.device}",
        state="none",
        answer=(f"About {_duration(plan.seconds)} in all; expect a factor of two or three either way.",),
        notes=tuple(preflight_note(finding) for finding in plan.findings),
        table=table(
            ("process", *numeric("passes", "time, roughly")),
            processes,
            f"Recorded layers take up to {plan.disk_gib:.1f} GiB of disk while they are compared.",
        ),
        sections=(
            *section(
                "measured",
                "Settings that are measured",
                table(("setting", "change"), [(row.name, row.change) for row in measured]),
                depth="screen",
            ),
            *section(
                "skipped",
                "Settings that are not",
                table(("setting", Column("change", rank=1), "why"), settings),
                depth="screen",
            ),
        ),
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _pair(found: Attribution) -> str:
    mode = " (autocast)" if found.trainer_mode == "autocast" else ""
    return f"{found.rollout_dtype} → {found.trainer_dtype}{mode}"


def _state(found: Attribution) -> State:
    codes = {one.code for one in found.findings}
    if any(one.severity == "fail" for one in found.findings):
        return "fail"
    if codes & {"gap-not-known", "no-ladder", "arises-by-estimate", "rounding-not-known"}:
        return "inconclusive"
    return "warn" if any(one.severity == "warn" for one in found.findings) else "ok"


def _noted(finding: Finding) -> bool:
    """What stands beside the answer: rows of the table are not said again, and what is sound stands in its section."""
    return finding.code not in _CLOSING and (finding.severity != "info" or finding.code.startswith("rounding-"))


def _of(found: Attribution, *codes: str) -> list[Finding]:
    return [one for one in found.findings if one.code.startswith(codes)]


# What to do next.


def _steps(found: Attribution, run: str) -> tuple[Step, ...]:
    """The fix of what the answer says, the setting that closes most, and what is not measured yet."""
    model = shlex.quote(found.model)
    commands = {
        "arises-undecided": f"mismatch-probe attribute --model {model} --num-prompts {_MANY_PROMPTS}",
        "rounding-explains": "" if found.rollout_dtype == "float16" else f"mismatch-probe audit --model {model}",
    }
    commands["arises-by-estimate"] = commands["arises-undecided"]
    steps = [Step(fix_of(one), commands.get(one.code, "")) for one in found.answer[::-1] if fix_of(one)]
    best = next(iter(_of(found, "setting-closes-gap", "both-sides-close-gap")), None)
    if best is not None:
        steps += _try(found, best)
    again = any(row.status == "failed" or "--resume" in row.why for row in found.settings)
    if again or found.failed or _of(found, "no-ladder"):
        steps.append(Step("Run what is missing:", f"mismatch-probe attribute --resume {shlex.quote(run)}"))
    return tuple(steps)


def _try(found: Attribution, finding: Finding) -> list[Step]:
    """The comparison with a setting, where `compare` has options for it."""
    rows = {row.name: row for row in found.settings}
    names = [finding.where] if finding.where in rows else [f"rollout-{finding.where}", f"trainer-{finding.where}"]
    known = [rows[name] for name in names if name in rows]
    what = SETTINGS.get(finding.where, finding.text("change"))
    if not known or not all(row.options or row.environment for row in known):
        return [Step(advice(row.key)) for row in known[:1]]
    environment = [f"{name}={value}" for row in known for name, value in row.environment.items()]
    own = {"--rollout-dtypes": found.rollout_dtype, "--trainer-dtypes": found.trainer_dtype}
    options = [option for row in known for option in row.options]
    for name, dtype in own.items():
        options += [] if name in options else [name, dtype]
    words = [*environment, "mismatch-probe", "compare", "--model", found.model, *options]
    return [Step(f"Compare again with the change that closes most, {what}:", shlex.join(words))]


# The table.


def _table(found: Attribution) -> Table | None:
    """Rungs in their order, then what closes part of the gap."""
    rows: list[tuple[Cell, ...]] = [
        (
            Cell(rung_label(rung.key, found)),
            _part(rung.contribution),
            estimate(rung.rms, digits=2),
            Cell(_rung_advice(found, rung.key)),
        )
        for rung in found.ladder.rungs
    ]
    rows += [_closing_row(found, one) for one in _of(found, *_CLOSING)]
    if not rows:
        return None
    rows.append((Cell("the whole gap", tone="strong"), Cell("100 %"), estimate(found.gap.rms, digits=2), Cell("")))
    return table(
        (
            "what changes",
            Column("part of E[d²]", numeric=True),
            Column("RMS (nats)", numeric=True, rank=1),
            Column("what to do", rank=2),
        ),
        rows,
        f"{count(found.n_tokens)} tokens of {count(found.n_sequences)} sequences. Rungs change one thing after another "
        "from rollout to trainer and add up to the whole gap; a negative one undoes part of it. The part of a setting "
        "is what it closes, so that settings overlap with rungs and with each other; RMS is then what is left.",
    )


def _rung_advice(found: Attribution, key: str) -> str:
    """Between the engines that of the finding on rounding, so that no two say different things."""
    if key != "engine":
        return advice(key)
    return next((fix_of(one) for one in _of(found, "rounding-", "fault-before-rounding")), "")


def _closing_row(found: Attribution, finding: Finding) -> tuple[Cell, ...]:
    """What closes part of the gap: by how much, what is left, and what to do."""
    match finding.code:
        case "setting-closes-gap":
            row = next(row for row in found.settings if row.name == finding.where)
            name, effect, todo = f"{row.change}, {row.side}", row.effect, advice(row.key)
        case "both-sides-close-gap":
            pair = next(pair for pair in found.both_sides if pair.key == finding.where)
            name, effect, todo = f"{SETTINGS[pair.key]}, both sides", pair.variants["both"], advice(pair.key)
        case _:
            effect = found.experts.engine_routes if found.experts else None
            name, todo = "the engine's routes, trainer", fix_of(finding)
    left = estimate(effect.rms if effect else None, digits=2)
    return Cell(name), _part(finding.metric("closed")), left, Cell(todo)


def _part(metric: MetricValue) -> Cell:
    return Cell(part_text(metric.value), part_interval(metric), metric.why if metric.value is None else "")


# Sections.


def _ladder(found: Attribution) -> tuple[Section, ...]:
    ladder = found.ladder
    means = [None, *(rung.mean for rung in ladder.rungs)]
    rows = [
        (PASSES[row.key], estimate(mean), estimate(row.error_rms))
        for row, mean in zip(ladder.passes, means, strict=False)
    ]
    text = (
        "The same tokens are run again, one thing changed at a time. Another order of the changes would give other "
        "contributions: E[d_rung · d] / E[d²]. RMS of rungs do not add up."
    )
    if ladder.squares_over_gap is not None:
        text += (
            f" Their squares add up to {number(ladder.squares_over_gap)} times the gap's: 1 for independent rungs, "
            "more where they undo each other."
        )
    header = (
        "pass",
        Column("mean change to the pass before (nats)", numeric=True, rank=1),
        Column("RMS error against FP32 (nats)", numeric=True),
    )
    return section(
        "ladder", "Pass by pass", Text(text), FigureRef("attribute-ladder"), table(header, rows), depth="screen"
    )


def _settings(found: Attribution) -> tuple[Section, ...]:
    measured = [(row, row.effect) for row in found.settings if row.effect is not None]
    measured.sort(key=lambda pair: (pair[0].side, _order(pair[1].rms_ratio)))
    noise = [
        f"{number(value.value)} nats at the {side}"
        for side, value in (("rollout", found.self_noise.rollout), ("trainer", found.self_noise.trainer))
        if value.value is not None
    ]
    text = (
        "One setting changed at a time, against the same pass without it. A ratio below 1 is a smaller gap; the shift "
        "is how far the setting moves log-probs. Whether a setting alters the gap is tested for all of them together "
        "(Holm, 5 %)."
    )
    if noise:
        text += f" Self-noise, the RMS of a pass against itself: {' and '.join(noise)}; a smaller shift means nothing."
    header = columns("setting", "side", *numeric(*_SETTING_COLUMNS), "note")
    return section(
        "settings",
        f"Settings: {len(measured)} measured of {len(found.settings)}",
        Text(text),
        FigureRef("attribute-settings"),
        table(header, [_measured(row, effect) for row, effect in measured]),
        Items(tuple(Text(say(one)) for one in _of(found, "no-setting", "settings-not"))),
    )


_SETTING_COLUMNS = ("RMS of the gap, ratio", "KL k3, ratio", "shift (nats)", "time, ratio", "peak memory (GiB)")


def _measured(row: SettingResult, effect: Change) -> tuple[Cell, ...]:
    memory = "" if row.memory_ratio is None else f"ratio {number(row.memory_ratio)}"
    return (
        Cell(row.change, below=row.name),
        Cell(row.side),
        _ratio(effect),
        estimate(effect.k3_ratio),
        estimate(effect.shift),
        plain(row.time_ratio),
        plain(row.peak_gib, below=memory),
        Cell("; ".join(say(note) for note in row.notes)),
    )


def _ratio(effect: Change) -> Cell:
    """A ratio; its interval may leave 1 out by chance where so many settings are tested, which is then said."""
    ratio = effect.rms_ratio
    limits = (ratio.ci_low, ratio.ci_high)
    outside = limits[0] is not None and limits[1] is not None and not limits[0] <= 1 <= limits[1]
    unsure = outside and effect.differs is False
    return estimate(ratio, below=f"p = {number(effect.p_holm)} among all settings" if unsure else "")


def _order(ratio: MetricValue) -> float:
    """What rows are sorted by: those without a ratio come last."""
    return float("inf") if ratio.value is None else ratio.value


def _both_sides(found: Attribution) -> tuple[Section, ...]:
    rows = []
    for pair in found.both_sides:
        if not pair.variants:
            rows.append((Cell(SETTINGS[pair.key], below=pair.why), *[Cell(NONE)] * len(WHERE)))
            continue
        cells = []
        for where in WHERE:
            effect = pair.variants[where]
            words = [f"ratio {number(effect.rms_ratio.value)}"] if where != "neither" else []
            words += ["smallest"] * (where == pair.best) + ["larger than on neither side"] * (where in pair.hurts)
            cells.append(estimate(effect.rms, below=", ".join(words)))
        rows.append((Cell(SETTINGS[pair.key]), *cells))
    text = Text("Settings that exist on both sides: RMS of the gap in nats. What helps on both sides may hurt on one.")
    header = columns("setting", *numeric(*(PLACES[where] for where in WHERE)))
    return section("both-sides", "On one side or on both", text, table(header, rows))


def _inside(found: Attribution) -> tuple[Section, ...]:
    """What both models' insides show, by dtype."""
    layers = found.layers
    shift = layers.eager_vs_compiled_shift
    text = (
        "The trainer's forward pass over the engine's recorded activations. The error of the residual stream holds "
        "what all layers before have added; a layer's step is what it adds itself when both sides are given the same "
        f"input. {_SCORE} Layers are recorded in eager mode"
    )
    text += ", in which the rollout ran." if layers.rollout_eager else ", in which the rollout did not run."
    if shift is not None and shift.value is not None:
        text += f" RMS between eager and compiled log-probs: {number(shift.value)} nats."
    findings = [Text(say(one), _tone(one)) for one in _of(found, *_INSIDE)]
    titles = ("error at the end", "growth a layer", "largest score of a step", "score at the end")
    header = columns("dtype", *numeric(*titles))
    rows = [_dtype_row(name, inside) for name, inside in layers.dtypes.items()]
    if not rows:
        return section("inside", "Inside both models", Items((Text(f"Nothing was compared: {layers.why}."),)))
    figures = (FigureRef("attribute-layers"), FigureRef("attribute-lens"))
    return section("inside", "Inside both models", Items(tuple(findings)), Text(text), *figures, table(header, rows))


def _tone(finding: Finding) -> Tone:
    return finding.severity if finding.severity in ("warn", "fail") else "plain"


def _dtype_row(name: str, inside: Inside) -> tuple[Cell, ...]:
    if not inside.layers:
        return (Cell(name, below=inside.why), *[Cell(NONE)] * 4)
    worst = max(inside.layers, key=lambda row: row.score)
    return (
        Cell(name, below=f"{count(inside.n_tokens)} tokens of {count(inside.n_sequences)} sequences"),
        plain(inside.layers[-1].relative_error),
        estimate(inside.growth_per_layer),
        Cell(score_text(worst.score), below=f"layer {worst.layer}"),
        Cell(score_text(inside.end_score)),
    )


def _modules(found: Attribution) -> tuple[Section, ...]:
    """Tensors of the layer that stands out, or whose step scores highest, in the dtype that says most of the pair."""
    shown = {name: inside for name, inside in found.layers.dtypes.items() if inside.tensors}
    if not shown:
        return ()
    name = min(shown, key=lambda dtype: (not _stands_out(shown[dtype]), dtype != found.rollout_dtype))
    inside = shown[name]
    own = inside.located.layer if inside.located else None
    layer = inside.worst_layer if own is None else own
    there = [tensor for tensor in inside.tensors if tensor.layer in (layer, None)]
    apart = [tensor for tensor in there if tensor.apart != 0]
    rows = [
        (
            Cell(tensor.name, below=_KINDS[tensor.kind]),
            plain(tensor.apart),
            plain(tensor.engine_error),
            plain(tensor.trainer_error),
            Cell(score_text(tensor.score), tone="warn" if tensor.score > THRESHOLD else "plain"),
        )
        for tensor in apart
    ]
    text = (
        f"In {name}: tensors of layer {layer} and of what lies outside of the layers, each given the engine's input. "
        "Errors are relative."
    )
    same = len(there) - len(apart)
    if same:
        text += f" {same} of {len(there)} tensors are the same on both sides, bit for bit, and left out."
    header = columns("module", *numeric("sides apart", "engine's error", "trainer's error", "score"))
    title = "Modules outside of the layers" if layer is None else f"Modules of layer {layer}"
    return section("modules", title, Text(text), table(header, rows))


def _stands_out(inside: Inside) -> bool:
    return inside.located is not None and inside.located.verdict != "no single layer"


def _fixes(found: Attribution) -> tuple[Section, ...]:
    fixes = found.fixes
    rows = []
    for row in fixes.rows:
        if row.effect is None:
            rows.append((Cell(" + ".join(row.classes), below=f"{row.status}: {row.why}"), *[Cell(NONE)] * 3))
            continue
        chosen = fixes.cheapest is not None and row.classes == fixes.cheapest.classes
        name = Cell(" + ".join(row.classes), below="cheapest that meets the target" if chosen else "")
        left = estimate(row.effect.rms_ratio)
        rows.append((name, left, estimate(row.trainer_error_ratio), fraction(row.added_time)))
    said = [Text(say(one)) for one in _of(found, "fp32-")] + ([Text(f"{fixes.why}.")] if fixes.why else [])
    text = (
        "Classes of the trainer's modules computed in FP32, alone and together: the RMS of the gap and of the "
        "trainer's own error against FP32 with them, each over that without. Times are of one pass each, and vary."
    )
    header = columns("modules in FP32", *numeric("gap left, ratio", "trainer's error left, ratio", "time added"))
    figure = FigureRef("attribute-fixes") if rows else None
    blocks = (Items(tuple(said)), Text(text), figure, table(header, rows))
    return section("fixes", "FP32 modules at the trainer", *(blocks if rows else blocks[:1]))


def _experts(found: Attribution) -> tuple[Section, ...]:
    experts = found.experts
    if experts is None:
        return ()
    if not experts.layers or experts.own_routes is None or experts.engine_routes is None:
        return section("experts", "Routers", Items((Text(f"Routers were not compared: {experts.why}."),)))
    lowest = min(experts.layers, key=lambda row: row.agreement)
    rows = [
        ("tokens that a router sends to other experts in some layer", fraction(experts.flipped_tokens)),
        ("their contribution to E[d²]", _part(experts.contribution or MetricValue(None))),
        ("lowest agreement of a layer", fraction(lowest.agreement, below=f"layer {lowest.layer}")),
        ("RMS of the gap with the trainer's own routes (nats)", estimate(experts.own_routes.rms)),
        ("RMS of the gap with the engine's routes (nats)", estimate(experts.engine_routes.rms)),
        ("ratio of the two", estimate(experts.engine_routes.rms_ratio)),
    ]
    said = Items(tuple(Text(say(one)) for one in _of(found, "rout")))
    text = Text("The gap here is that of the trainer to the engine by prefill, whose routes were kept.")
    header = ("what", Column("value", numeric=True))
    return section("experts", "Routers", said, text, FigureRef("attribute-experts"), table(header, rows))


def _not_measured(found: Attribution) -> tuple[Section, ...]:
    order = {"failed": 0, "skipped": 1, "unsupported": 2}
    left = sorted((row for row in found.settings if row.effect is None), key=lambda row: order.get(row.status, 3))
    rows = [(Cell(row.change, below=row.name), Cell(row.side), Cell(row.status), Cell(row.why)) for row in left]
    text = Text("These could make a gap too, and this run says nothing about them.")
    return section(
        "not-measured", "Settings that were not measured", text, table(("setting", "side", "status", "why"), rows)
    )


def _layers(found: Attribution) -> tuple[Section, ...]:
    """All layers, or those spread over the depth and those that stand out."""
    shown = {name: inside for name, inside in found.layers.dtypes.items() if inside.layers}
    rows = {name: {row.layer: row for row in inside.layers} for name, inside in shown.items()}
    every = sorted({layer for own in rows.values() for layer in own})
    kept = every
    if len(every) > _LAYERS:
        marked = {row.layer for own in rows.values() for row in own.values() if row.score > THRESHOLD}
        marked |= {inside.worst_layer for inside in shown.values() if inside.worst_layer is not None}
        kept = sorted({*every[:: -(-len(every) // (_LAYERS - 2))], every[-1], *marked})
    cells = [(plain(layer), *(_layer_cell(own.get(layer)) for own in rows.values())) for layer in kept]
    text = (
        "Relative error of the residual stream after each layer; below it the score of the layer's own step, and the "
        "KL (nats) of what both residual streams would predict if the head came next (the logit lens)."
    )
    if len(kept) < len(every):
        text += f" Of {len(every)} layers {len(kept)} are shown; {FILE} has them all."
    header = columns("layer", *numeric(*rows))
    return section("layers", "Layer by layer", Text(text), table(header, cells), depth="detail")


def _layer_cell(row: LayerRow | None) -> Cell:
    if row is None:
        return Cell(NONE)
    lens = "" if row.lens_kl is None else f", lens {number(row.lens_kl)}"
    return plain(row.relative_error, below=f"score {score_text(row.score)}{lens}")
