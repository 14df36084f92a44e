"""Logs and pasted lines: dicts as Python or JSON prints them, `key:value` and `key=value`, tables, labels.

Other text, ANSI codes and the prefixes of ranks and processes may stand around them. Dicts are read pair by pair, so
that neither a cut line nor `np.float64(…)` hides the rest; nothing is evaluated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from pydantic import JsonValue

from mismatch_probe.ingest.metric_log import MOST_NAMES, Reading, Record, is_text, metric_reader, text_lines
from mismatch_probe.ingest.metric_log.objects import NUMBER, number, record, records_of

_VALUE = rf"{NUMBER}|[-+]?(?:nan|NaN|inf(?:inity)?|Infinity)|None|null"
_END = r"(?![\w%/]|\.\d)"
_ANSI = re.compile(r"\x1b\[[0-9;?]{0,20}[A-Za-z]|\[\d{1,3}(?:;\d{1,3}){0,4}m")  # pages lose the escape itself
_QUOTED = re.compile(
    rf"""(['"])(?P<name>[^'"\n]{{1,200}})\1\s{{0,8}}:\s{{0,8}}(?:[\w.]{{1,30}}\()?['"]?(?P<value>{_VALUE}){_END}"""
)
_PAIR = re.compile(
    rf"(?<![\w./])(?P<name>[A-Za-z_][\w./@\-]{{0,199}})(?P<between>[ \t]{{0,60}}[:=|│┃]?[ \t]{{0,60}})"
    rf"(?:np\.\w{{1,20}}\()?(?P<value>{_VALUE}){_END}"
)
_PIECE = re.compile(rf"\s*(?P<name>[A-Za-z][\w. ]{{0,60}}?)(?:\s{{1,8}}|:\s{{0,8}})(?P<value>{_VALUE})\s*")
_LABEL = re.compile(rf"\W{{0,20}}(?P<name>[A-Z][\w .]{{1,60}}):\s{{0,8}}(?P<value>{_VALUE})\s*")
_HEADING = re.compile(r"\W{0,80}Step\s{1,8}(\d{1,15})(?:\s?/\s?\d{1,15})?\W{0,80}")
_STEP = re.compile(r"(?<![A-Za-z])(?:global[_ ])?[Ss]tep[ :=]{1,3}(\d{1,15})(?![\d.])")
_PROCESS = re.compile(r"\s{0,8}(?:\([\w.:]{1,80} pid=\d{1,10}(?:, ip=[\d.]{1,15})?\)|\[rank ?\d{1,6}\]:?) ?")
_MICRO = "Micro Step"  # prime-rl's lines of a single rank


@metric_reader("text", lambda head, suffix: is_text(head))
def read(handle: BinaryIO, reading: Reading) -> Iterator[Record]:
    """The records of the lines. A heading `Step 3/100` holds for the lines below it that name no step."""
    heading: float | None = None
    for line in text_lines(handle, reading):
        bare = _PROCESS.sub("", _ANSI.sub("", line), count=1)
        if (found := _HEADING.fullmatch(bare)) is not None:
            heading = float(found[1])
            continue
        if (whole := _json(bare)) is not None:
            yield from records_of(whole, reading)
            continue
        one = record_of(bare, reading)
        if one is not None:
            yield one if one.step is not None else Record(one.values, heading, one.run)


def record_of(line: str, reading: Reading) -> Record | None:
    """What a line says, None where it says nothing."""
    if _MICRO in line:
        return None
    values: dict[str, float | None] = {}
    for match in _QUOTED.finditer(line):
        _add(values, match, reading)
    if not values:
        label = _LABEL.fullmatch(line)
        rest = line
        for match in [label] if label else _pieces(line):
            _add(values, match, reading)
            rest = rest.replace(match[0], " ", 1)
        for match in _PAIR.finditer(rest):
            if match["between"].strip() or "_" in match["name"] or "/" in match["name"]:
                _add(values, match, reading)
    step = _STEP.search(line.split("{", 1)[0])
    return record(values, float(step[1]) if step else None) if values else None


def _pieces(line: str) -> Iterator[re.Match[str]]:
    """`name value` between bars."""
    if " | " in line:
        for part in line.split("|"):
            if (found := _PIECE.fullmatch(part)) is not None:
                yield found


def _add(values: dict[str, float | None], match: re.Match[str], reading: Reading) -> None:
    if len(values) < MOST_NAMES:
        values[match["name"].strip()] = number(match["value"])
    else:
        reading.damage["names-left-out"] += 1


def _json(line: str) -> dict[str, JsonValue] | None:
    """The object that a line is."""
    text = line.strip()
    if not (text.startswith("{") and text.endswith("}")) or text.startswith("{'"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
