"""What every document has in common: strict fields, a schema version, and how it reaches the disk and comes back."""

from __future__ import annotations

import json
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from mismatch_probe.errors import TableError
from mismatch_probe.files import write_json

PACKAGE = "mismatch-probe"


class Result(BaseModel):
    """A part of a document. Fields are fixed after construction, and unknown ones are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # as they are, which `write_json` refuses; else they become null without a word
    )


class Document(Result):
    """A document of its own, in a file of its own.

    A subclass sets `KIND`, what a message calls the document; `VERSION`, the newest schema that this release writes;
    `OLDEST`, the oldest that `upgrade` can bring up to date; and `AGAIN`, the command that writes the document again,
    with `{folder}` for the folder of the file.
    """

    KIND: ClassVar[str]
    VERSION: ClassVar[int]
    OLDEST: ClassVar[int]
    AGAIN: ClassVar[str]

    schema_version: int
    """Version of this document's schema; each kind of document counts its own."""
    tool_version: str
    """Release of mismatch-probe that wrote the document."""

    @classmethod
    def stamp(cls) -> dict[str, Any]:
        """The first two fields of a new document."""
        return {"schema_version": cls.VERSION, "tool_version": package_version(PACKAGE)}

    @classmethod
    def upgrade(cls, raw: dict[str, Any], version: int) -> dict[str, Any]:
        """One step: a document of schema `version` becomes one of `version + 1`.

        Raises:
            NotImplementedError: The subclass declares an `OLDEST` that it cannot read.
        """
        raise NotImplementedError(f"{cls.KIND} {version}: {len(raw)} fields")

    def content(self) -> dict[str, Any]:
        """The document as JSON values."""
        return self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Writes the document atomically.

        Raises:
            DiskFull: No space is left on the device.
            TableError: The file cannot be written.
        """
        write_json(path, self.content())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the document, bringing an older schema up to date.

        Raises:
            TableError: The file is missing, is no such document, is of a newer release, or a field of it is wrong.
        """
        again = f"Restore the file, or run `{cls.AGAIN.format(folder=path.parent)}` again."
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TableError(f"{path} does not exist.", f"Run `{cls.AGAIN.format(folder=path.parent)}`.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise TableError(f"{path} cannot be read as JSON ({error}).", again) from None
        if not isinstance(raw, dict) or not isinstance(raw.get("schema_version"), int):
            raise TableError(f"{path} is no {cls.KIND}: it has no schema version.", again)
        found = raw["schema_version"]
        if found > cls.VERSION:
            raise _newer(path, cls, raw)
        if found < cls.OLDEST:
            what = f"{path} is a {cls.KIND} of schema {found}, which was never released."
            raise TableError(what, again)
        for version in range(found, cls.VERSION):
            raw = {**cls.upgrade(raw, version), "schema_version": version + 1}
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            message = first["msg"][:1].lower() + first["msg"][1:]
            raise TableError(f"{path} is no valid {cls.KIND}: {where}: {message}.", again) from None


def _newer(path: Path, cls: type[Document], raw: dict[str, Any]) -> TableError:
    maker = raw.get("tool_version")
    what = f"{path} is a {cls.KIND} of schema {raw['schema_version']}; this release reads up to {cls.VERSION}."
    release = f"{PACKAGE}>={maker}" if isinstance(maker, str) and maker else f"a newer {PACKAGE}"
    return TableError(what, f"Install {release}.")
