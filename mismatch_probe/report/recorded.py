"""What a report says of recorded sequences: where they come from, what of them is left out, what their numbers mean."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from mismatch_probe.metrics.groups import STEP
from mismatch_probe.report.accounting import accounting_section
from mismatch_probe.report.data import modes_of, ordered_pairs, pair_label
from mismatch_probe.report.format import NONE, count, metric_title
from mismatch_probe.report.model import (
    STATES,
    Cell,
    Column,
    Depth,
    Report,
    Section,
    Step,
    Text,
    columns,
    estimate,
    numeric,
    plain,
    row,
    section,
    table,
)

if TYPE_CHECKING:
    from mismatch_probe.results.comparison import Comparison
    from mismatch_probe.results.dump import Dump, Recorded, Source
    from mismatch_probe.results.manifest import Manifest

_BESIDE = {
    ("recorded-rollout", "recorded-prefill"): "rollout → its prefill",
    ("recorded-prefill", "recorded-trainer"): "prefill → trainer",
    ("recorded-trainer", "recorded-current"): "trainer → its update pass",
    ("recorded-rollout", "recorded-ref"): "rollout → reference model",
}
_GROUPS = {
    "lag": "age of weights",
    "tags": "tag",
    "finish_reason": "end of the response",
    "pack_index": "place in its pack",
}
_BESIDE_KEYS = {"mean_abs_logprob_diff": "mean |d|", "kl_k3": "KL k3", "max_abs_logprob_diff": "worst |d|"}
# Temperature inside, and renormalised over the kept tokens of top-p and top-k. Read in vLLM 0.32 and SGLang 0.5.23.
_CONVENTIONS = (
    ("vLLM raw_logprobs (its default), and prompt_logprobs", "no", "no"),
    ("vLLM processed_logprobs", "yes", "yes"),
    ("SGLang, log-probs of output", "yes", "no"),
    ("SGLang, log-probs of input", "no", "no"),
    ("trainers (verl, slime, SkyRL, TRL)", "yes", "no"),
)
_MEANINGS = {"raw_logprobs": ("raw_logprobs", "no", "no"), "processed_logprobs": ("processed_logprobs", "yes", "yes")}


def ingest_report(document: Dump, folder: Path) -> Report:
    """What a dump holds, and the command that comes next."""
    recorded, facts = document.recorded, document.recorded.file
    worst = facts.findings[0].severity if facts.findings else "info"
    return Report(
        title=f"Recorded sequences of {facts.path}",
        state=STATES[worst],
        answer=(
            f"{count(facts.n_sequences)} sequences of {count(facts.n_prompts)} prompts with {count(facts.n_tokens)} "
            f"response tokens; {_held(recorded)}.",
        ),
        steps=(_next(recorded, folder),),
        lead=accounting_section(facts.findings),
        sections=source_section(facts, "screen"),
    )


def _held(recorded: Recorded) -> str:
    sides = [side for side, there in (("rollout", recorded.rollout), ("trainer", recorded.trainer)) if there]
    return f"log-probs of {' and '.join(sides)}" if sides else "ids without log-probs"


def _next(recorded: Recorded, folder: Path) -> Step:
    command = f"mismatch-probe compare --from {shlex.quote(str(folder))}"
    if recorded.rollout and recorded.trainer:
        return Step("Compare the two sides:", command)
    if recorded.rollout:
        return Step("Score the ids with the trainer; MODEL is the model that sampled them:", f"{command} --model MODEL")
    return Step("Decode the ids again; MODEL is the model that sampled them:", f"{command} --model MODEL --replay")


def source_section(facts: Source, depth: Depth) -> tuple[Section, ...]:
    """Where recorded sequences come from, and what of them was left out."""
    rows = [
        ("dump", plain(facts.path)),
        ("format", plain(facts.format, below=facts.written_for)),
        ("files", plain(facts.n_files)),
        ("rows", plain(facts.n_rows)),
        ("left out", plain(facts.n_left_out)),
        ("without a response", plain(facts.n_empty_responses)),
        ("sequences", plain(facts.n_sequences)),
        ("prompts", plain(facts.n_prompts)),
        ("response tokens", plain(facts.n_tokens)),
        ("masked tokens", plain(facts.n_masked_tokens)),
        ("longest sequence, tokens", plain(facts.longest_sequence)),
        ("keys", plain(", ".join(facts.keys))),
        ("not read", plain(", ".join(facts.ignored_columns) or None)),
    ]
    legend = "Rows that are left out break a rule of the format; rows without a response hold nothing to compare."
    return section("source", "Recorded sequences", table(["", "value"], rows), Text(legend, "dim"), depth=depth)


def lead_sections(manifest: Manifest) -> tuple[Section, ...]:
    """What has to be known of recorded sequences before the first mean."""
    if manifest.recorded is None:
        return ()
    facts = manifest.recorded.file
    return (*accounting_section(facts.findings), *source_section(facts, "page"))


def beside_section(summary: Comparison) -> tuple[Section, ...]:
    """What else a dump brought, pair by pair."""
    rows = [
        row(
            _BESIDE[pair.rollout_pass, pair.trainer_pass],
            *(estimate(pair.metrics[key]) for key in _BESIDE_KEYS),
            plain(pair.n_tokens),
        )
        for pair in summary.beside
    ]
    titles = (*_BESIDE_KEYS.values(), "tokens")
    header = columns("log-probs", *(Column(title, numeric=True, rank=rank) for rank, title in enumerate(titles)))
    legend = "Mean |d|, KL k3 and the largest |d| of the other log-probs of the dump, in nats."
    return section("beside", "Other log-probs of the dump", table(header, rows, legend), depth="screen")


def groups_section(summary: Comparison) -> tuple[Section, ...]:
    """The metrics of parts of each pair: by replica, tag, turn and age of the weights; steps have their own section."""
    modes, pairs = modes_of(summary), ordered_pairs(summary)
    groups = [(pair, group) for pair in pairs for group in pair.groups if group.key != STEP]
    keys = list(dict.fromkeys(key for _, group in groups for key in group.metrics))
    rows = [
        row(
            pair_label(pair, modes),
            _GROUPS.get(group.key, group.key),
            group.label,
            plain(group.n_tokens),
            *(estimate(group.metrics.get(key)) for key in keys),
        )
        for pair, group in groups
    ]
    header = columns("pair", "by", "group", *numeric("tokens", *map(metric_title, keys)))
    legend = (
        "The mismatch of parts of the tokens, with 95 % intervals over prompts. Age of weights: versions between the "
        "weights that sampled a token and those of the trainer; where the dump does not name these, the newest of the "
        "step."
    )
    return section("groups", "By replica, tag, turn and age of weights", table(header, rows, legend))


def meaning_section(manifest: Manifest) -> tuple[Section, ...]:
    """What the log-probs of each pass hold: whether temperature and truncation are inside."""
    rows = []
    for name, record in manifest.passes.items():
        if record.status != "finished" or record.repeats:
            continue
        mode = str(record.engine.get("logprobs_mode", ""))
        if name.startswith("recorded-"):
            rows.append(row(name, Cell("not recorded", below="one of those below"), NONE, NONE))
        elif mode in _MEANINGS:
            rows.append(row(name, *_MEANINGS[mode]))
        else:
            rows.append(row(name, "log-softmax at --temperature", "yes", "no"))
    header = columns("", "log-probs", "temperature inside", "renormalised over top-p, top-k")
    conventions = [row("", *convention) for convention in _CONVENTIONS] if manifest.recorded is not None else []
    legend = (
        "Both sides have to mean the same. Where one is renormalised over the kept tokens and the other is not, d is "
        "shifted by the log of the kept mass at every token; where one holds the temperature and the other does not, "
        "mean ρ is not 1. At temperature 1 without truncation all conventions agree."
    )
    return section("meaning", "What the log-probs mean", table(header, [*rows, *conventions], legend))
