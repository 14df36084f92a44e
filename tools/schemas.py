"""JSON schemas of every document, from the models in `mismatch_probe.results`: `make schema` writes `data/schemas/`."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mismatch_probe import results
from mismatch_probe.results.base import Document

FOLDER = Path(__file__).parents[1] / "data" / "schemas"
_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_ATTRIBUTE = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)*): (?P<text>.*(?:\n {8}.*)*)", re.MULTILINE)


def documents() -> dict[str, type[Document]]:
    """Every document, by the name of its schema's file."""
    for module in pkgutil.walk_packages(results.__path__, f"{results.__name__}."):
        importlib.import_module(module.name)
    found = {f"{kind.KIND.lower().replace(' ', '-')}.json": kind for kind in _subclasses(Document)}
    return dict(sorted(found.items()))


def _subclasses(kind: type[Document]) -> Iterator[type[Document]]:
    for one in kind.__subclasses__():
        if one.__module__.startswith(results.__name__):
            yield one
        yield from _subclasses(one)


def schema(kind: type[Document]) -> dict[str, Any]:
    """The schema of what `kind` writes."""
    found = {"$schema": _DRAFT, **kind.model_json_schema(mode="serialization")}
    found["properties"]["schema_version"]["const"] = kind.VERSION
    for part in found.get("$defs", {}).values():
        _describe(part)
    return found


def _describe(part: dict[str, Any]) -> None:
    """Gives the fields of a dataclass the descriptions of its docstring."""
    summary, _, attributes = str(part.get("description", "")).partition("\n\nAttributes:\n")
    if not attributes:
        return
    part["description"] = summary
    for match in _ATTRIBUTE.finditer(attributes):
        for name in match["names"].split(", "):
            if name in part["properties"]:
                part["properties"][name].setdefault("description", re.sub(r"\s+", " ", match["text"]))


def text(kind: type[Document]) -> str:
    """The file of a schema."""
    return json.dumps(schema(kind), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Writes all files, and removes those of documents that are no more."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = documents()
    for path in FOLDER.glob("*.json"):
        if path.name not in found:
            path.unlink()
    for name, kind in found.items():
        (FOLDER / name).write_text(text(kind), encoding="utf-8")


if __name__ == "__main__":
    main()
