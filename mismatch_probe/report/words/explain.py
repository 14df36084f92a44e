"""Words of `explain` on sizes of logged metrics: against limits and an audit, over steps, and together."""

from __future__ import annotations

from collections.abc import Sequence

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.report.format import clipped, count, metric_title, number, percent
from mismatch_probe.report.model import in_line
from mismatch_probe.report.words import words
from mismatch_probe.results.finding import Finding

NAMES = {"names": "the names that it is about"}
"""Value of a finding about several logged names."""
_LOW_ESS = 1e-3
_OTHERS = {"others": "metrics that do the same"}
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
    "names": "what it is of: k1 and k3, or the mean ratio itself",
    "excess": "mean ρ − 1, mean over steps with a 95 % interval of independent steps",
    "steps": "steps",
}


def _excess(finding: Finding) -> str:
    formula = "k3 − k1" if len(finding.names("names")) > 1 else _this(finding) + " − 1"
    return f"Mean ρ − 1 = {formula} = {in_line(finding.metric('excess'))} over {_steps(finding)}"


@words(
    "log-ratio-not-1",
    "The mean ratio is not 1 over the steps. On policy it is 1 in expectation.",
    _DIRECTION,
    "Rounding does not do this: look for another temperature, top-p, mask or weight version on one side.",
)
def _ratio_not_1(finding: Finding) -> str:
    return f"{_excess(finding)}. On policy it is 0 in expectation."


@words("log-ratio-fits-1", "The mean ratio is compatible with 1 over the steps, as it has to be on policy.", _DIRECTION)
def _ratio_fits_1(finding: Finding) -> str:
    return f"{_excess(finding)}: compatible with 0, as on policy."


@words(
    "log-negative-k1",
    "k1 is negative at some steps. A KL is not; k1 of a few tokens is, by chance, or off policy.",
    {"n_negative": "such steps", "steps": "all steps", "mean": "mean over steps"},
)
def _negative_k1(finding: Finding) -> str:
    n, mean = finding.whole("n_negative"), in_line(finding.metric("mean"), unit="nats")
    if finding.whole("steps") == 1:
        return f"{_this(finding)} is negative, which k1 of few tokens is by chance, or off policy."
    return (
        f"{_this(finding)} is negative at {count(n)} of {_steps(finding)}, with a mean of {mean}: single steps are by "
        "chance, a negative mean over many steps is not on policy."
    )


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
    ess = finding.number("ess")
    share = "below 0.1 %" if ess < _LOW_ESS else f"about {percent(ess)}"
    return (
        f"A response of {_num(finding, 'length')} tokens has a KL of about {_num(finding, 'kl_sequence')} nats (step "
        f"{_at(finding, 'step')}): weights of whole sequences would have an effective sample size of {share}, if "
        "gaps of tokens are independent."
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
