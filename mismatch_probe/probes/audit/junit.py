"""An audit as JUnit XML, which CI systems show check by check: a suite a pair, a case a check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

_CONTROLS = {code: None for code in range(32) if code not in (9, 10, 13)}


def junit_xml(document: Mapping[str, Any], *, strict: bool = False) -> str:
    """The document's checks.

    Args:
        document: Content of `audit.json`.
        strict: Whether a warning is a failure.
    """
    root = ElementTree.Element("testsuites", name=_text(f"mismatch-probe audit of {document['model']}"))
    for pair in document["pairs"]:
        name = f"{pair['rollout_dtype']}/{pair['trainer_dtype']}"
        name += f" ({pair['trainer_mode']})" if pair["trainer_mode"] == "autocast" else ""
        suite = ElementTree.SubElement(root, "testsuite", name=_text(name))
        for check in pair["checks"]:
            _case(suite, name, check, strict)
        _count(suite)
    _count(root, "testsuite/testcase")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, pair: str, check: Mapping[str, Any], strict: bool) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=_text(f"audit.{pair}"), name=_text(check["name"]))
    where = f" Module: {check['where']}." if check["where"] else ""
    detail = _text(f"{check['evidence']}{where} {check['threshold']} ({check['source']})")
    status = check["status"]
    if status == "fail" or (strict and status == "warn"):
        ElementTree.SubElement(case, "failure", message=_text(check["evidence"]), type=status).text = detail
    elif status == "not judged":
        ElementTree.SubElement(case, "skipped", message=_text(f"not judged: {check['evidence']}"))
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
