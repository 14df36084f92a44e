"""Words of `explain` on what was read: what could not be, how metrics are defined, what they cannot tell."""

from __future__ import annotations

from collections.abc import Mapping

from mismatch_probe.report.format import clipped, count, number
from mismatch_probe.report.words import words
from mismatch_probe.report.words.explain import NAMES, grouped, logged
from mismatch_probe.results.finding import Finding

_N = {"n": "how often"}

_DAMAGE = {
    "log-line-cut": ("Lines longer than 1 MiB were read to that length.", "lines longer than 1 MiB are read to there"),
    "log-json-cut": (
        "The JSON is not whole; its lines were read singly.",
        "the JSON is not whole; lines are read singly",
    ),
    "log-record-damaged": (
        "Records of an event file have a wrong checksum or content and were left out.",
        "records are damaged and left out",
    ),
    "log-tail-cut": ("An event file ends within a record, as that of a running or killed job.", "ends within a record"),
    "log-row-short": ("Rows of a CSV file have fewer fields than its header, or cannot be parsed.", "rows are short"),
    "log-names-left-out": ("The file has more names than are kept.", "values of further names are left out"),
}
for _code, (_meaning, _short) in _DAMAGE.items():

    @words(_code, _meaning, _N)
    def _damaged(finding: Finding) -> str:
        n = finding.whole("n")
        return f"{clipped(finding.where, 80, keep_end=True)}: {_DAMAGE[finding.code][1]} ({count(n)})."


@words(
    "log-not-finite",
    "Values of a metric are missing, NaN or infinite. They are counted and left out of every other number.",
    {
        "missing": "steps logged without a value",
        "nan": "NaN values",
        "inf": "values that are infinite or beyond 1e100",
        "finite": "finite values",
    },
    "Look for the first such step: one log-prob that is not finite makes a mean NaN.",
)
def _not_finite(finding: Finding) -> str:
    kinds = (("missing", "missing"), ("nan", "NaN"), ("inf", "infinite"))
    found = ", ".join(f"{count(finding.whole(key))} {name}" for key, name in kinds if finding.whole(key))
    return f"{logged(finding.where)} has {found} beside {count(finding.whole('finite'))} finite values."


@words(
    "log-averaged-steps",
    "A wandb export averages steps: its largest value is below the largest of the steps.",
    {
        "largest": "largest value of a step",
        "shown": "largest exported mean",
        "series": "metrics of which it is so, of which this is furthest off",
    },
    "Export with full fidelity, or read wandb.Api().run(PATH).scan_history().",
)
def _averaged_steps(finding: Finding) -> str:
    more = finding.whole("series") - 1
    others = f" So it is with {count(more)} more." if more else ""
    return (
        f"The export averages steps: the largest value of {logged(finding.where)} is "
        f"{number(finding.number('largest'))}, not {number(finding.number('shown'))}.{others}"
    )


@words(
    "log-steps-repeated",
    "Steps were logged more than once, as after a restart. The last value of each step counts.",
    {"n": "values that are left out", "series": "metrics with such steps", "backwards": "how often the step went back"},
)
def _steps_repeated(finding: Finding) -> str:
    n, backwards = finding.whole("n"), finding.whole("backwards")
    times = "once" if backwards == 1 else f"{count(backwards)} times"
    restarts = f" The step went back {times}, as after a restart." if backwards else ""
    return (
        f"{count(n)} values of {logged(finding.where)} are of steps that were logged again; the last counts.{restarts}"
    )


@words("log-steps-out-of-order", "Steps are not in order; they were sorted.", {"n": "how often the step went back"})
def _steps_out_of_order(finding: Finding) -> str:
    return f"Steps of {logged(finding.where)} are not in order ({count(finding.whole('n'))} times); they are sorted."


@words("log-steps-missing", "No step is logged beside the values; they are counted in the order of the file, from 0.")
def _steps_missing(finding: Finding) -> str:
    return f"No step is logged beside {logged(finding.where)}: values are counted in the order of the file, from 0."


@words("log-several-frameworks", "Metrics of several frameworks were found; each is read as its own.", NAMES)
def _several_frameworks(finding: Finding) -> str:
    return f"Metrics of several frameworks: {', '.join(finding.names('names'))}. Each is read by its own definition."


@words(
    "log-name-shared",
    "Several frameworks use these names; they were read as those of the one that other names point to.",
    NAMES | {"others": "who else uses them"},
)
def _name_shared(finding: Finding) -> str:
    others = ", ".join(finding.names("others"))
    return f"{grouped(finding.names('names'))}: read as {finding.where} logs them. {others} uses the same names."


_LEVELS = {
    "TRL": "vllm_importance_sampling_mode (by default whole sequences, 0 beyond the bound)",
    "verl": "algorithm.rollout_correction.rollout_is",
    "slime": "tis_level",
    "miles": "tis_level",
}
_TRAITS: dict[str, str] = {
    "rank-means": "the mean of the means of ranks: a rank with few tokens counts as much as one with many",
    "sequence-means": "the mean of the means of sequences: a token of a short sequence counts more than one of a long "
    "sequence, unless the loss is per token (--calculate-per-token-loss)",
    "micro-batch-means": "a mean of means of micro-batches, so tokens of small micro-batches count more",
    "after-truncation": "of weights that are already truncated or masked: the largest is at most the bound, and the "
    "mean need not be 1",
    "truncation-by-version": "of truncated weights from verl 0.8 on, of weights before truncation in earlier releases",
    "level-by-setting": "of tokens or of whole sequences, by a setting",
    "kl-by-setting": "of the kind that loss_fn.reference_policy_kl_type names: k3 only by default",
    "clamped-20": "of log ratios that are clamped at ±20",
    "clamped-10": "clamped to at most 10 per token",
    "nan-left-out": "taken without NaN values, which are not counted",
    "nonfinite-as-zero": "a mean in which NaN and infinite values count as 0, which makes it smaller",
    "padding-as-zero": "taken with padded positions as 0: a minimum is 0, a spread too large",
    "against-update": "measured against the policy under update where old log-probs are not recomputed: after the "
    "first mini-batch it holds the update, too",
    "stale": "of the trainer's current weights against those that sampled, which are older in asynchronous training: "
    "it holds staleness, too",
    "kept-tokens": "of a part of the tokens, chosen by the mismatch itself",
    "weighted-by-probability": "weighted by the token's probability: no KL, since tokens were sampled by it already; "
    "unlikely tokens hardly count",
    "update-ratio": "the ratio of the current to the old trainer policy: the update, not the mismatch, unless rollout "
    "log-probs serve as the old ones",
    "float32": "computed as exp(d) − 1 − d in float32: at gaps of FP32 it is rounding noise, and can be negative",
    "four-decimals": "printed with four decimals: below 0.001 few digits are left, and 0.0000 is not 0",
}
for _trait, _text in _TRAITS.items():

    @words(f"log-{_trait}", f"A logged metric is {_text}.", NAMES)
    def _differs(finding: Finding) -> str:
        trait = finding.code.removeprefix("log-")
        shown = clipped(grouped(finding.names("names")), 160)
        setting = f": {_LEVELS[finding.where]}" if trait == "level-by-setting" and finding.where in _LEVELS else ""
        return f"{shown}: {_TRAITS[trait]}{setting}."


_BLIND: Mapping[str, tuple[str, str]] = {
    "log-blind-to-tokens": (
        "A table of metrics does not say which tokens differ.",
        "Which tokens differ: a mean over masked, missing or shifted tokens looks like any other.",
    ),
    "log-blind-to-side": (
        "A table of metrics does not say which side is off.",
        "Which side is off: that takes log-probs of one more pass, or of a reference in FP32.",
    ),
    "log-blind-to-direction": (
        "These metrics do not say whether the gap goes one way.",
        "Whether the gap goes one way: mean ρ, or k1 beside k3, says it; sizes alone do not.",
    ),
    "log-blind-to-cause": (
        "A table of metrics does not separate rounding, staleness and a fault.",
        "Rounding, staleness or a fault: all three make the same sizes. Both log-probs of the tokens of one step, with "
        "weight versions, separate them.",
    ),
}
for _code, (_meaning, _) in _BLIND.items():

    @words(_code, _meaning)
    def _blind(finding: Finding) -> str:
        return _BLIND[finding.code][1]


TRAITS = frozenset(f"log-{trait}" for trait in _TRAITS)
"""Codes of how a logged metric differs from its definition."""
BLIND = frozenset(_BLIND)
"""Codes of what a table cannot say."""
