"""Words of `explain`: logged metrics, how they differ from their definitions, and what fits together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.report.format import clipped, count, metric_title, number, percent
from mismatch_probe.report.model import in_line
from mismatch_probe.report.words import words
from mismatch_probe.results.finding import Finding

_NAMES = {"names": "the names that it is about"}
_OTHERS = {"others": "metrics that do the same"}
_N = {"n": "how often"}
_OF_STEPS = {"n": "steps where it is so", "steps": "steps that have both"}


def logged(name: str) -> str:
    """A logged name inside a sentence."""
    return clipped(name, 80)


def grouped(names: Sequence[str]) -> str:
    """Names with those of one path together: `a/{b, c}, d`."""
    by_path: dict[str, list[str]] = {}
    for name in names:
        path, separator, last = name.rpartition("/")
        by_path.setdefault(path + separator, []).append(last)
    return ", ".join(
        f"{path}{{{', '.join(found)}}}" if path and len(found) > 1 else ", ".join(path + one for one in found)
        for path, found in by_path.items()
    )


def step(value: float) -> str:
    """A training step."""
    return count(int(value)) if value == int(value) else number(value)


def unit_of(key: str) -> str:
    """Unit of a metric of the catalogue."""
    return CATALOG[key].unit if key in CATALOG else ""


def _this(finding: Finding) -> str:
    """The metric that a finding is about."""
    return logged(finding.where)


def _num(finding: Finding, name: str) -> str:
    return number(finding.number(name))


def _at(finding: Finding, name: str) -> str:
    return step(finding.number(name))


def _audit(finding: Finding) -> str:
    """What the audit measured."""
    predicted = in_line(finding.metric("predicted"), unit=unit_of(finding.text("metric")))
    return f"the audit measured for {finding.text('pair')}: {predicted}"


def _size(finding: Finding, name: str) -> str:
    unit = unit_of(finding.text("metric"))
    return f"{number(finding.number(name))}{unit and ' ' + unit}"


def _of(finding: Finding) -> str:
    """`2 of 300 steps`."""
    return f"{count(finding.whole('n'))} of {_steps(finding)}"


def _steps(finding: Finding) -> str:
    """`300 steps`."""
    n = finding.whole("steps")
    return "1 step" if n == 1 else f"{count(n)} steps"


_LIMIT = {
    "metric": "the metric",
    "last": "its last value",
    "bound": "the limit",
    "side": "above or below",
    "text": "the limit as it was published",
    "who": "who set it",
    "others": "whose limits it is beyond, too",
    "n": "steps beyond it",
    "steps": "all steps",
    "first_beyond": "the first step beyond it",
    "from_start": "whether that is the first step of the file",
}


@words("log-limit-exceeded", "The last logged value is beyond a published limit.", _LIMIT)
def _limit_exceeded(finding: Finding) -> str:
    if finding.whole("steps") == 1:
        return f"{_beyond(finding)}."
    return f"{_beyond(finding)} at the last step, {_since(finding)}."


@words("log-limit-was-exceeded", "Some logged value is beyond a published limit, the last one is not.", _LIMIT)
def _limit_was_exceeded(finding: Finding) -> str:
    bound = f"{finding.text('side')} {finding.number('bound'):g} ({finding.text('who')}{_also(finding)})"
    return (
        f"{_this(finding)} is {bound} at {_of(finding)}, first at step {_at(finding, 'first_beyond')}. The last is not."
    )


def _beyond(finding: Finding) -> str:
    return (
        f"{_this(finding)} is {_size(finding, 'last')}, {finding.text('side')} {finding.number('bound'):g} "
        f"({finding.text('who')}: {finding.text('text')}{_also(finding)})"
    )


def _also(finding: Finding) -> str:
    others = finding.names("others")
    return f"; also {', '.join(others)}" if others else ""


def _since(finding: Finding) -> str:
    start = (
        "from the first step on" if finding.values["from_start"] else (f"first at step {_at(finding, 'first_beyond')}")
    )
    return f"{start} ({_of(finding)})"


_AUDITED = {
    "metric": "the metric",
    "last": "its last value",
    "predicted": "what the audit measured",
    "ratio": "last over predicted",
    "pair": "the pair of the audit",
}


@words("log-above-prediction", "A logged metric is above what the audit measured on the model.", _AUDITED)
def _above_prediction(finding: Finding) -> str:
    ratio = number(finding.maybe("ratio"))
    return f"{_this(finding)} is {_size(finding, 'last')}, {ratio} times what {_audit(finding)}."


@words("log-within-prediction", "A logged metric is not above what the audit measured on the model.", _AUDITED)
def _within_prediction(finding: Finding) -> str:
    return f"{_this(finding)} is {_size(finding, 'last')}, not above what {_audit(finding)}."


@words(
    "log-above-alarm",
    "A logged KL exceeds the alarm that the audit names.",
    {"metric": "the metric", "last": "its last value", "alarm": "the audit's alarm", "pair": "the pair of the audit"},
)
def _above_alarm(finding: Finding) -> str:
    return (
        f"{_this(finding)} is {_size(finding, 'last')}, above the audit's alarm for {finding.text('pair')}: "
        f"{_size(finding, 'alarm')}."
    )


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
    "Values of a metric are null, NaN or infinite. They are counted and left out of every other number.",
    {"null": "null values", "nan": "NaN values", "inf": "infinite values", "finite": "finite values"},
    "Look for the first such step: one log-prob that is not finite makes a mean NaN.",
)
def _not_finite(finding: Finding) -> str:
    kinds = (("null", "null"), ("nan", "NaN"), ("inf", "infinite"))
    found = ", ".join(f"{count(finding.whole(key))} {name}" for key, name in kinds if finding.whole(key))
    return f"{_this(finding)} has {found} beside {count(finding.whole('finite'))} finite values."


@words(
    "log-averaged-steps",
    "A wandb export averages steps: its largest value is below the largest of the steps.",
    {"largest": "largest value of a step", "shown": "largest exported mean"},
    "Export with full fidelity, or read wandb.Api().run(PATH).scan_history().",
)
def _averaged_steps(finding: Finding) -> str:
    return (
        f"{_this(finding)}: the export averages steps; the largest value is {_num(finding, 'largest')}, "
        f"not {_num(finding, 'shown')}."
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
    return f"{count(n)} values of {_this(finding)} are of steps that were logged again; the last counts.{restarts}"


@words("log-steps-out-of-order", "Steps are not in order; they were sorted.", {"n": "how often the step went back"})
def _steps_out_of_order(finding: Finding) -> str:
    return f"Steps of {_this(finding)} are not in order ({count(finding.whole('n'))} times); they are sorted."


@words("log-steps-missing", "No step is logged beside the values; they are counted in the order of the file, from 0.")
def _steps_missing(finding: Finding) -> str:
    return f"No step is logged beside {_this(finding)}: values are counted in the order of the file, from 0."


@words("log-several-frameworks", "Metrics of several frameworks were found; each is read as its own.", _NAMES)
def _several_frameworks(finding: Finding) -> str:
    return f"Metrics of several frameworks: {', '.join(finding.names('names'))}. Each is read by its own definition."


@words(
    "log-name-shared",
    "Several frameworks use these names; they were read as those of the one that other names point to.",
    _NAMES | {"others": "who else uses them"},
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

    @words(f"log-{_trait}", f"A logged metric is {_text}.", _NAMES)
    def _differs(finding: Finding) -> str:
        trait = finding.code.removeprefix("log-")
        shown = clipped(grouped(finding.names("names")), 160)
        setting = f": {_LEVELS[finding.where]}" if trait == "level-by-setting" and finding.where in _LEVELS else ""
        return f"{shown}: {_TRAITS[trait]}{setting}."


@words(
    "log-impossible",
    "A logged metric has values that its definition excludes.",
    {"metric": "the metric", "n": "such steps", "steps": "all steps", "value": "the worst value"},
    "Check the sign convention, the setting that chooses the kind, and the precision that it is computed in.",
)
def _impossible(finding: Finding) -> str:
    low, high = CATALOG[finding.text("metric")].bounds
    limits = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
    return (
        f"{_this(finding)} is {_num(finding, 'value')}, but {metric_title(finding.text('metric'))} is "
        f"{limits} by definition ({_of(finding)})."
    )


@words(
    "log-all-zero",
    "The gap is exactly 0 at every step: both sides are the same numbers.",
    {"names": "the metrics", "steps": "steps"},
    "Check that the trainer recomputes log-probs: frameworks can use the rollout's as the old ones.",
)
def _all_zero(finding: Finding) -> str:
    names = ", ".join(logged(name) for name in finding.names("names"))
    return (
        f"{names}: exactly 0 at all {count(finding.whole('steps'))} steps. Either both engines agree to the bit, or "
        "the rollout's log-probs are compared with themselves."
    )


@words(
    "log-not-same-tokens",
    "A KL is smaller than mean |d| of the same tokens allows, so the two are not means over the same tokens.",
    {
        "mean": "name of mean |d|",
        "value": "the KL",
        "least": "the least that mean |d| allows",
        "step": "first such step",
    }
    | _OF_STEPS,
)
def _not_same_tokens(finding: Finding) -> str:
    return (
        f"{_this(finding)} is {_num(finding, 'value')} at step {_at(finding, 'step')}, below the "
        f"{_num(finding, 'least')} that {logged(finding.text('mean'))} implies for the same tokens ({_of(finding)}): "
        "the two are weighted differently."
    )


@words(
    "log-mean-above-maximum",
    "A mean is larger than the maximum beside it, so the two are not of the same tokens.",
    {"maximum": "name of the maximum"} | _OF_STEPS,
)
def _mean_above_maximum(finding: Finding) -> str:
    return f"{_this(finding)} is above {logged(finding.text('maximum'))} at {_of(finding)}: not of the same tokens."


_DIRECTION = {
    "k1": "name of k1",
    "k3": "name of k3",
    "excess": "mean ρ − 1 = k3 − k1, mean over steps with a 95 % interval of independent steps",
    "k3_mean": "mean k3 over steps",
    "n_negative": "steps where k1 is negative",
    "steps": "steps that have both",
}


@words(
    "log-ratio-not-1",
    "k3 − k1, which is the mean ratio − 1, is not 0 over the steps. On policy the mean ratio is 1 in expectation.",
    _DIRECTION,
    "Rounding does not do this: look for another temperature, top-p, mask or weight version on one side.",
)
def _ratio_not_1(finding: Finding) -> str:
    return (
        f"Mean ρ − 1 = k3 − k1 = {in_line(finding.metric('excess'))} over {_steps(finding)}, "
        f"beside a mean k3 of {_num(finding, 'k3_mean')} nats. On policy it is 0 in expectation. {_negative(finding)}"
    )


@words(
    "log-ratio-fits-1",
    "k3 − k1, which is the mean ratio − 1, is compatible with 0, as it has to be on policy, or too few steps tell.",
    _DIRECTION,
)
def _ratio_fits_1(finding: Finding) -> str:
    excess = finding.metric("excess")
    tells = "compatible with 0, as on policy" if excess.ci_low is not None else f"{excess.why}, so no interval"
    return f"Mean ρ − 1 = k3 − k1 = {in_line(excess)} over {_steps(finding)}: {tells}. {_negative(finding)}"


def _negative(finding: Finding) -> str:
    return f"k1 is negative at {count(finding.whole('n_negative'))} of {_steps(finding)}."


@words(
    "log-negative-k1",
    "k1 is negative at some steps. A KL is not; k1 of a few tokens is, by chance, or off policy.",
    {"n_negative": "such steps", "steps": "all steps", "mean": "mean over steps"},
)
def _negative_k1(finding: Finding) -> str:
    return (
        f"{_this(finding)}: {_negative(finding)} Its mean is {in_line(finding.metric('mean'), unit='nats')}. Single "
        "steps are negative by chance; over many steps a negative mean is not of on-policy tokens."
    )


@words(
    "log-mean-ratio",
    "The logged mean ratio less 1; on policy it is 0 in expectation, unless weights are truncated first.",
    {"excess": "mean over steps of ρ − 1", "steps": "steps", "truncated": "whether weights are truncated first"},
)
def _mean_ratio(finding: Finding) -> str:
    why = "weights are truncated first, so it may differ from 0" if finding.values["truncated"] else "0 in expectation"
    return f"{_this(finding)} − 1 is {in_line(finding.metric('excess'))} over {_steps(finding)}; on policy: {why}."


@words(
    "log-capped",
    "The largest weight is the same number at several steps: the truncation, not the weight.",
    {"cap": "the number", "n": "steps with it", "steps": "all steps"},
)
def _capped(finding: Finding) -> str:
    return (
        f"{_this(finding)} is exactly {finding.number('cap'):g} at {_of(finding)}: that is the bound, not the weight."
    )


@words(
    "log-pearson-low",
    "The correlation of probabilities is low although they differ little.",
    {"pearson": "correlation", "difference": "mean |Δ probability|", "step": "the last such step"} | _OF_STEPS,
)
def _pearson_low(finding: Finding) -> str:
    return (
        f"{_this(finding)} is {_num(finding, 'pearson')} at step {_at(finding, 'step')} with a mean "
        f"|Δ probability| of {_num(finding, 'difference')}: a few tokens far off, or probabilities that are nearly "
        f"all the same ({_of(finding)})."
    )


_TAIL = {"mean": "name of mean |d|", "factor": "KL over that of a normal d with the same mean |d|", "steps": "steps"}


@words(
    "log-heavy-tail", "The KL is several times that of a normal d with the same mean |d|: few tokens decide it.", _TAIL
)
def _heavy_tail(finding: Finding) -> str:
    return (
        f"{_this(finding)} is {_num(finding, 'factor')} times what a normal d with the same "
        f"{logged(finding.text('mean'))} has: few tokens with a large gap decide it."
    )


@words("log-tail", "The KL over that of a normal d with the same mean |d|.", _TAIL)
def _tail(finding: Finding) -> str:
    return (
        f"{_this(finding)} is {_num(finding, 'factor')} times what a normal d with the same "
        f"{logged(finding.text('mean'))} has."
    )


@words(
    "log-sequence-effect",
    "What the KL per token is for a whole response.",
    {
        "length": "mean response length, tokens",
        "length_name": "name of the length",
        "kl": "KL per token, nats",
        "kl_sequence": "KL of a response, nats",
        "ess": "effective sample size, exp(−2 KL), if D is normal and tokens independent",
        "step": "the step",
    },
)
def _sequence_effect(finding: Finding) -> str:
    return (
        f"At step {_at(finding, 'step')} a response of {_num(finding, 'length')} tokens has a KL of about "
        f"{_num(finding, 'kl_sequence')} nats; if gaps of tokens are independent, the effective fraction of "
        f"sequences is about {percent(finding.number('ess'))}."
    )


@words(
    "log-jump",
    "A metric jumps from one step to the next by at least 10 robust standard deviations of its changes.",
    {
        "before_step": "step before",
        "before": "value",
        "after_step": "step after",
        "after": "value",
        "units": "its size",
    }
    | _OTHERS,
)
def _jump(finding: Finding) -> str:
    return (
        f"{_this(finding)} jumps from {_num(finding, 'before')} (step {_at(finding, 'before_step')}) "
        f"to {_num(finding, 'after')} (step {_at(finding, 'after_step')}): "
        f"{_num(finding, 'units')} robust standard deviations of its changes.{_with(finding, 'jump')}"
    )


@words(
    "log-trend",
    "A metric rises or falls steadily (Kendall's |τ| at least 0.3, p at most 0.01).",
    {
        "slope": "Theil–Sen slope per 100 steps",
        "tau": "Kendall's τ",
        "early": "median of the first tenth of the steps",
        "late": "median of the last tenth",
        "steps": "steps",
    }
    | _OTHERS,
)
def _trend(finding: Finding) -> str:
    word = "rises" if finding.number("tau") > 0 else "falls"
    return (
        f"{_this(finding)} {word}: median {_num(finding, 'early')} in the first tenth of the steps, "
        f"{_num(finding, 'late')} in the last; {in_line(finding.metric('slope'))} per 100 steps "
        f"(τ {number(finding.number('tau'), 2)}).{_with(finding, word.removesuffix('s'))}"
    )


def _with(finding: Finding, verb: str) -> str:
    """Which other metrics do the same."""
    others = finding.names("others")
    return f" So does {others[0]}." if len(others) == 1 else f" {len(others)} more {verb}, too." if others else ""


_BLIND: Mapping[str, tuple[str, str]] = {
    "log-blind-to-tokens": (
        "A table of metrics does not say which tokens differ.",
        "Which tokens differ: first or last of a response, unlikely ones, after a tool's text, a placeholder such as 0 "
        "or −9999 among the log-probs. A mean over masked, missing or shifted tokens looks like any other.",
    ),
    "log-blind-to-side": (
        "A table of metrics does not say which side is off.",
        "Which side is off: log-probs of one more pass, or of a reference in FP32, are needed.",
    ),
    "log-blind-to-direction": (
        "These metrics do not say whether one side is off in one direction.",
        "Whether the gap goes one way: mean ρ, or k1 beside k3, would say it; sizes alone do not.",
    ),
    "log-blind-to-cause": (
        "A table of metrics does not separate rounding from a fault.",
        "Rounding, staleness or a fault: the same size comes from all three. Tokens of one step, with both log-probs "
        "and weight versions, separate them.",
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
