"""An audit as JUnit XML, which CI systems show check by check: the gate, then a suite a pair and a case a check."""

from __future__ import annotations

from xml.etree import ElementTree

from mismatch_probe.report.words import say
from mismatch_probe.report.words.audit import limit_text
from mismatch_probe.results.audit import Audit, Check, PrecisionPair, Verdict

_CONTROLS = {code: None for code in range(32) if code not in (9, 10, 13)}


def junit_xml(audit: Audit) -> str:
    """The checks of an audit. What closes its gate is a failure; a check that fails or is inconclusive and does not is
    skipped."""
    bad: tuple[Verdict, ...] = ("fail", "warn") if audit.options.strict else ("fail",)
    root = ElementTree.Element("testsuites", name=_text(f"mismatch-probe audit of {audit.model}"))
    _gate(ElementTree.SubElement(root, "testsuite", name="gate"), audit, bad)
    deciding = {pair.key for pair in audit.decided_by}
    for pair in audit.pairs:
        name = _name(pair)
        suite = ElementTree.SubElement(root, "testsuite", name=_text(name))
        for check in pair.checks:
            _case(suite, name, check, bad if pair.key in deciding else ())
        _count(suite)
    _count(root, "testsuite/testcase")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _name(pair: PrecisionPair) -> str:
    mode = " (autocast)" if pair.trainer_mode == "autocast" else ""
    return f"{pair.rollout_dtype}/{pair.trainer_dtype}{mode}"


def _gate(suite: ElementTree.Element, audit: Audit, bad: tuple[Verdict, ...]) -> None:
    """What the exit code says: the verdict, and the comparison with a baseline."""
    case = ElementTree.SubElement(suite, "testcase", classname="audit.gate", name="verdict")
    if audit.verdict in (*bad, "inconclusive"):
        text = _text(f"{audit.verdict}: {', '.join(_name(pair) for pair in audit.decided_by) or 'no pair'}")
        ElementTree.SubElement(case, "failure", message=text, type=audit.verdict).text = text
    if audit.baseline is not None:
        case = ElementTree.SubElement(suite, "testcase", classname="audit.gate", name="baseline")
        worse = [
            f"{row.name} of {_name(row)}: {'' if row.finding is None else say(row.finding)}"
            for row in audit.baseline.regressions
        ]
        if worse:
            text = _text("; ".join(worse))
            ElementTree.SubElement(case, "failure", message=text, type="regression").text = text
    _count(suite)


def _case(suite: ElementTree.Element, pair: str, check: Check, bad: tuple[Verdict, ...]) -> None:
    """A check; of a pair that does not decide it is never a failure."""
    case = ElementTree.SubElement(suite, "testcase", classname=_text(f"audit.{pair}"), name=_text(check.name))
    evidence = say(check.finding)
    detail = _text(f"{evidence} Limit: {limit_text(check.bounds)} ({check.bounds.source})")
    if check.verdict in bad:
        ElementTree.SubElement(case, "failure", message=_text(evidence), type=check.verdict).text = detail
    elif check.verdict in ("fail", "inconclusive"):
        ElementTree.SubElement(case, "skipped", message=_text(f"{check.verdict}: {evidence}"))
    ElementTree.SubElement(case, "system-out").text = f"{check.verdict}: {detail}"


def _count(element: ElementTree.Element, path: str = "testcase") -> None:
    cases = element.findall(path)
    element.set("tests", str(len(cases)))
    for name, tag in (("failures", "failure"), ("skipped", "skipped")):
        element.set(name, str(sum(case.find(tag) is not None for case in cases)))
    element.set("errors", "0")


def _text(text: str) -> str:
    """What XML can hold."""
    return text.translate(_CONTROLS)
