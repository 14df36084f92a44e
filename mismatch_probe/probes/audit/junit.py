"""An audit as JUnit XML, which CI systems show check by check: the gate, then a suite a pair and a case a check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from mismatch_probe.report.names import precision_label

_CONTROLS = {code: None for code in range(32) if code not in (9, 10, 13)}


def junit_xml(document: Mapping[str, Any], *, strict: bool = False) -> str:
    """The document's checks.

    Args:
        document: Content of `audit.json`.
        strict: Whether a warning is a failure.
    """
    root = ElementTree.Element("testsuites", name=_text(f"mismatch-probe audit of {document['model']}"))
    _gate(ElementTree.SubElement(root, "testsuite", name="gate"), document, strict)
    for pair in document["pairs"]:
        label = precision_label(pair)
        name, decides = label.replace(" → ", "/"), label in document["decided_by"]
        suite = ElementTree.SubElement(root, "testsuite", name=_text(name))
        for check in pair["checks"]:
            _case(suite, name, check, _bad(strict) if decides else ())
        _count(suite)
    _count(root, "testsuite/testcase")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _bad(strict: bool) -> tuple[str, ...]:
    """What closes the gate."""
    return ("fail", "warn") if strict else ("fail",)


def _gate(suite: ElementTree.Element, document: Mapping[str, Any], strict: bool) -> None:
    """What the exit code says: the verdict, and the comparison with a baseline."""
    verdict, baseline = document["verdict"], document["baseline"]
    case = ElementTree.SubElement(suite, "testcase", classname="audit.gate", name="verdict")
    if verdict in (*_bad(strict), "not judged"):
        text = _text(f"{verdict}: {', '.join(document['decided_by']) or 'no pair'}")
        ElementTree.SubElement(case, "failure", message=text, type=verdict).text = text
    if baseline is not None:
        case = ElementTree.SubElement(suite, "testcase", classname="audit.gate", name="baseline")
        worse = [
            f"{row['name']} of {row['rollout_dtype']}/{row['trainer_dtype']}: {row['why']}"
            for row in baseline["regressions"]
        ]
        if worse:
            text = _text("; ".join(worse))
            ElementTree.SubElement(case, "failure", message=text, type="regression").text = text
    _count(suite)


def _case(suite: ElementTree.Element, pair: str, check: Mapping[str, Any], bad: tuple[str, ...]) -> None:
    """A check; of a pair that does not decide it is never a failure."""
    case = ElementTree.SubElement(suite, "testcase", classname=_text(f"audit.{pair}"), name=_text(check["name"]))
    where = f" Module: {check['where']}." if check["where"] else ""
    detail = _text(f"{check['evidence']}{where} {check['threshold']} ({check['source']})")
    status = check["status"]
    if status in bad:
        ElementTree.SubElement(case, "failure", message=_text(check["evidence"]), type=status).text = detail
    elif status in ("fail", "not judged"):
        ElementTree.SubElement(case, "skipped", message=_text(f"{status}: {check['evidence']}"))
    ElementTree.SubElement(case, "system-out").text = f"{status}: {detail}"


def _count(element: ElementTree.Element, path: str = "testcase") -> None:
    cases = element.findall(path)
    element.set("tests", str(len(cases)))
    for name, tag in (("failures", "failure"), ("skipped", "skipped")):
        element.set(name, str(sum(case.find(tag) is not None for case in cases)))
    element.set("errors", "0")


def _text(text: str) -> str:
    """What XML can hold."""
    return text.translate(_CONTROLS)
