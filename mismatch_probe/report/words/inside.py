"""Words of `attribute` on the inside of both models: layers and modules."""

from __future__ import annotations

from mismatch_probe.metrics.inside import THRESHOLD
from mismatch_probe.report.words import words
from mismatch_probe.report.words.attribute import listed, score_text
from mismatch_probe.results.finding import Finding

_INSIDE = {
    "dtypes": "dtypes that show it",
    "scores": "of each dtype: how far apart the sides are, over what rounding lets them be",
    "threshold": "scores beyond it stand out",
}
_PLACE = {
    "verdict": "layer, everywhere, outside or no single layer",
    "kind": "module, between or end",
    "name": "module",
    "layer": "index of the layer",
    "more_layers": "further layers",
    "seen_in": "the dtype with more bits that shows it",
}


def place(finding: Finding) -> str:
    """What stands out, or would."""
    name, verdict = finding.text("name"), finding.text("verdict")
    if verdict == "no single layer":
        more = finding.whole("more_layers")
        return f"the step of layer {finding.text('layer')}{f' (and of {more} more)' if more else ''}"
    if finding.values["kind"] == "end":
        return "the code of most layers" if verdict == "everywhere" else f"the code of {name}"
    where = {"everywhere": f"{name} of most layers", "outside": f"{name}, outside of the layers,"}.get(verdict, name)
    return f"the input of {where}" if finding.values["kind"] == "between" else where


def _in(finding: Finding) -> str:
    return f"In {listed(finding.names('dtypes'))}"


def _scores(finding: Finding) -> str:
    scores = finding.values["scores"]
    assert isinstance(scores, dict)
    known = [scores[dtype] for dtype in finding.names("dtypes")]
    return listed(score_text(score) for score in known if isinstance(score, int | float))


def _stands_out(finding: Finding) -> str:
    times = f"{_scores(finding)} times what rounding explains (threshold {THRESHOLD:g})"
    return f"{_in(finding)}, {place(finding)} stands out: the sides differ by {times}."


words(
    "module-stands-out",
    "A module's result differs by more than rounding, given the same input.",
    _INSIDE | _PLACE,
    "Compare the module's weights on both sides, and constants such as a norm's epsilon: a stale or altered tensor is "
    "likelier than a kernel.",
)(_stands_out)
words(
    "module-stands-out-everywhere",
    "The same module of most layers differs by more than rounding, given the same input.",
    _INSIDE | _PLACE,
    "Compare the module's definition on both sides: the engines compute it differently, whatever the weights.",
)(_stands_out)
words(
    "input-stands-out",
    "What reaches a module differs by more than rounding, though the modules before it do not.",
    _INSIDE | _PLACE,
    "Compare what lies between modules there: residual connection, rotation, softmax scale, mask or window, "
    "activation, order of heads.",
)(_stands_out)
words(
    "layer-code-stands-out",
    "What a layer makes of its modules' results differs by more than rounding.",
    _INSIDE | _PLACE,
    "Compare the layer's own code on both sides: residual connection, scaling of what is added.",
)(_stands_out)


@words(
    "step-stands-out",
    "A layer's step differs by more than rounding, nothing compared in it does, and its end was not compared.",
    _INSIDE | _PLACE,
    "Compare the layer's own code on both sides: residual connection, scaling of what is added.",
)
def _(finding: Finding) -> str:
    return (
        f"{_in(finding)}, {place(finding)} stands out though no module of it does: {_scores(finding)} times what "
        "rounding explains. The layer's own code may differ."
    )


@words(
    "step-adds-up",
    "A layer's step is beyond the threshold, and nothing in it is: small differences add up.",
    _INSIDE | _PLACE,
)
def _(finding: Finding) -> str:
    return (
        f"{_in(finding)}, {place(finding)} is beyond the threshold ({_scores(finding)}), and nothing in it is: small "
        "differences add up."
    )


@words(
    "step-of-routed-layer",
    "A layer's step is beyond the threshold in a mixture of experts: one token that takes other experts does that.",
    _INSIDE | _PLACE,
)
def _(finding: Finding) -> str:
    return (
        f"{_in(finding)}, {place(finding)} is beyond the threshold ({_scores(finding)}), and no module is: a "
        "token that a router sends to other experts does that."
    )


@words(
    "tensor-not-finite",
    "A tensor inside a model is not finite.",
    {**_INSIDE, "name": "the first module"},
    "The model does not fit the dtype: see `mismatch-probe audit`.",
)
def _(finding: Finding) -> str:
    return f"{_in(finding)}, {finding.text('name')} is not finite."


@words(
    "hidden-by-rounding",
    "What a dtype with more bits shows is less than this dtype rounds.",
    _INSIDE | _PLACE,
)
def _(finding: Finding) -> str:
    return f"{_in(finding)}, rounding hides what {finding.text('seen_in')} shows of {place(finding)}."


@words(
    "absent-in-dtype",
    "What a dtype with more bits shows would be more than this dtype rounds, and is not there.",
    _INSIDE | _PLACE,
)
def _(finding: Finding) -> str:
    return f"{_in(finding)}, {place(finding)} does not differ as it does in {finding.text('seen_in')}."


@words("nothing-stands-out", "No module and no layer differs by more than rounding.", _INSIDE)
def _(finding: Finding) -> str:
    many = len(finding.names("dtypes")) > 1
    score = f"the largest {'scores are' if many else 'score is'} {_scores(finding)}, below {THRESHOLD:g}"
    return f"{_in(finding)}, no module and no layer stands out: {score}."


@words("layers-not-compared", "The models' insides were not compared in a dtype.", {"why": "the reason"})
def _(finding: Finding) -> str:
    return f"In {finding.where}, layers were not compared: {finding.text('why')}."


@words(
    "differs-outside-modules",
    "The models differ in float32, and nothing that was compared inside them stands out.",
    fix="Compare what both sides are given and what comes behind the head: ids, positions, mask, scaling of logits, "
    "log-softmax.",
)
def _(_: Finding) -> str:
    return "Both models differ in float32, and nothing that was compared inside them stands out."
