"""Files of settings: TOML with the names of the fields as keys."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mismatch_probe.config.settings import Settings, settings_of, unknown_key
from mismatch_probe.errors import UsageError


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """Reads a TOML file, which an error calls `what`.

    Raises:
        UsageError: The file is missing or not valid TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"The {what} {path} cannot be read ({reason}).", "Check its path.") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"The {what} {path} is not valid TOML: {error}.", "Correct that line.") from None


def read_settings(path: str | Path, kind: type[Settings]) -> dict[str, Any]:
    """The values of a file of settings, by field; they are checked with the others.

    Args:
        path: A TOML file.
        kind: Whose fields are known.

    Raises:
        UsageError: The file is missing or not valid TOML, or a key is unknown or only for the command line.
    """
    values, known = read_toml(path, "configuration"), settings_of(kind)
    for name in values:
        if name not in known:
            raise unknown_key(name, known, f"{path} has the unknown key")
        if not known[name].file:
            raise UsageError(
                f"{path} sets {name}, which only the command line can.", f"Remove it, and give {known[name].flag}."
            )
    return values


def toml_of(settings: Settings) -> str:
    """The file of settings that asks for the same. What was not given is a comment, so that it stays not given; what is
    None and what only the command line can set is left out.

    Raises:
        UsageError: TOML cannot represent a value: an argument of vLLM is null.
    """
    known = settings_of(type(settings))
    lines = [
        f"# {known[name].help}\n{'' if name in settings.model_fields_set else '# '}{name} = {_value(name, value)}\n"
        for name, value in settings.model_dump(mode="json").items()
        if value is not None and known[name].file
    ]
    return "\n".join(lines)


def _value(name: str, value: Any) -> str:
    match value:
        case str():
            # Strings of JSON are strings of TOML, which escapes one character more.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool() | int() | float():
            return json.dumps(value)
        case list():
            return f"[{', '.join(_value(name, part) for part in value)}]"
        case Mapping():
            return f"{{{', '.join(f'{_value(name, key)} = {_value(name, part)}' for key, part in value.items())}}}"
        case _:
            raise UsageError(f"{name} has an empty value, which TOML cannot represent.", "Leave that argument out.")
