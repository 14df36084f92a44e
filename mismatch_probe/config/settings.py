"""A group of settings: every field once, with its type, default, limits, help text and option of the command line."""

from __future__ import annotations

import difflib
import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from mismatch_probe.dtypes import DTYPE_INFOS, SHORT_DTYPES
from mismatch_probe.errors import UsageError
from mismatch_probe.types import DTYPES, Dtype

T = TypeVar("T")
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Device = Literal["auto", "cpu", "cuda"]


def _long_name(value: Any) -> Any:
    return SHORT_DTYPES.get(value.strip(), value.strip()) if isinstance(value, str) else value


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) != len(values):
        raise ValueError("has a value twice")
    return values


def _split(value: Any) -> Any:
    """Texts with commas as their parts; anything else as it is."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple):
        return value
    parts = [part for one in values for part in (one.split(",") if isinstance(one, str) else [one])]
    return [part.strip() if isinstance(part, str) else part for part in parts]


PathText = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, PurePath) else value)]
"""A file or folder, or a name; a path of Python is taken, too."""
DtypeName = Annotated[Dtype, BeforeValidator(_long_name)]
"""A dtype; short names (`bf16`) are taken, too."""
Listed = Annotated[tuple[T, ...], BeforeValidator(_split), AfterValidator(_distinct)]
"""Several values, each once: a sequence, or a text with commas."""
Dtypes = Annotated[Listed[DtypeName], Field(min_length=1)]


@dataclass(frozen=True)
class Option:
    """What of an option does not follow from its field's name, type and default.

    Attributes:
        flag: Its name, where that is not the field's.
        default: What stands for a default of None or nothing, e.g. `by device`.
        metavar: What its value is, e.g. a unit.
        path: Whether it is a file or a folder.
        file: Whether a file of settings may set it.
        fix: What to do about a value that is not allowed.
        known: Names of a registry, of which the value must be one.
    """

    flag: str = ""
    default: str = ""
    metavar: str = ""
    path: bool = False
    file: bool = True
    fix: str = "Leave it out for the default."
    known: Callable[[], Iterable[str]] | None = None


@dataclass(frozen=True)
class Setting:
    """A field of a group, as the command line and pages need it.

    Attributes:
        name: Of the field, of its Python keyword and of its key in a file.
        flag: `--name`.
        help: One or two sentences.
        kind: `flag`, `choice`, `integer`, `number`, `path`, `text`, `pairs` (key=value).
        choices: Of a choice.
        several: Whether it takes several values, separated by commas.
        n: How many values it takes at once, e.g. 2 of a range.
        default: In words; empty where there is none.
        metavar: What stands for the value.
        file: Whether a file of settings may set it.
        fix: What to do about a value that is not allowed.
        known: Names of a registry, of which the value must be one.
    """

    name: str
    flag: str
    help: str
    kind: Literal["flag", "choice", "integer", "number", "path", "text", "pairs"]
    choices: tuple[str, ...]
    several: bool
    n: int
    default: str
    metavar: str
    file: bool
    fix: str
    known: Callable[[], Iterable[str]] | None


S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """A group of settings. Values are checked at once; what is wrong is one sentence with its fix."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    TITLE: ClassVar[str] = ""
    """Of the group's options in the help."""

    def __init__(self, **values: Any) -> None:
        """Raises:
        UsageError: A name is unknown, or a value is not allowed.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._complaint(error) from None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Settings from values whose types are not known, e.g. those of a file.

        Raises:
            UsageError: A name is unknown, or a value is not allowed.
        """
        return cls(**values)

    @model_validator(mode="after")
    def _of_registries(self) -> Self:
        for name, info in type(self).model_fields.items():
            known = _option(info).known
            if known is not None and (value := getattr(self, name)) not in (names := tuple(known())):
                raise UsageError(f"{self.called(name)} does not accept {value!r}.", f"Known are: {', '.join(names)}.")
        return self

    def replace(self, **changes: Any) -> Self:
        """The same with changes.

        Raises:
            UsageError: A name is unknown, or a value is not allowed.
        """
        return self.of({**dict(self), **changes})

    @property
    def changed(self) -> dict[str, Any]:
        """Settings that are not at their defaults."""
        fields = type(self).model_fields
        return {name: value for name, value in self if value != fields[name].get_default(call_default_factory=True)}

    def arguments(self) -> list[str]:
        """The options that ask for these settings; those at their defaults are left out."""
        return [word for name, value in self.changed.items() for word in _words(setting(type(self), name), value)]

    def part(self, kind: type[S], without: type[Settings] | None = None) -> S:
        """Settings of another class, as far as this one has them.

        Args:
            kind: The class.
            without: Whose fields stay at their defaults, because they mean something else here.
        """
        names = kind.model_fields.keys() - (set() if without is None else without.model_fields.keys())
        return kind.of({name: value for name, value in self if name in names})

    @classmethod
    def sections(cls) -> dict[str, list[Setting]]:
        """Every field, by title of its group."""
        found: dict[str, list[Setting]] = {}
        for name in cls.model_fields:
            owner = next(one for one in reversed(cls.__mro__) if name in inspect.get_annotations(one))
            found.setdefault(getattr(owner, "TITLE", "") or cls.TITLE, []).append(setting(cls, name))
        return found

    @classmethod
    def called(cls, name: str) -> str:
        """What a message calls a field."""
        return flag(cls, name) if name in cls.model_fields else name

    @classmethod
    def _complaint(cls, error: ValidationError) -> UsageError:
        """The first thing that is wrong."""
        first = error.errors(include_url=False)[0]
        inner = first.get("ctx", {}).get("error")
        if isinstance(inner, UsageError):
            return inner
        where, value = str(first["loc"][0]) if first["loc"] else "", first["input"]
        if first["type"] == "extra_forbidden":
            return unknown_key(where, cls.model_fields, "There is no setting")
        if where not in cls.model_fields:
            return UsageError(f"{first['msg'].removeprefix('Value error, ')}.", "Change one of them.")
        what = f"{cls.called(where)} {_wrong(first['type'], first.get('ctx', {}), value)}."
        found = setting(cls, where)
        names = first["type"] == "literal_error"
        return UsageError(what, f"Known are: {', '.join(found.choices)}." if names else found.fix)


def _wrong(kind: str, limits: Mapping[str, Any], value: Any) -> str:
    """What of a value is wrong, by pydantic's code."""
    shown = f"{value:g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)
    match kind:
        case "greater_than":
            return f"must be above {limits['gt']:g}, not {shown}"
        case "greater_than_equal":
            return f"must be {limits['ge']:g} or more, not {shown}"
        case "less_than":
            return f"must be below {limits['lt']:g}, not {shown}"
        case "less_than_equal":
            return f"must be {limits['le']:g} or less, not {shown}"
        case "literal_error":
            return f"does not accept {shown}"
        case "too_short":
            return "needs a value"
        case "too_long":
            return f"takes {limits['max_length']} values, not {limits['actual_length']}"
        case "missing":
            return "takes more values"
        case "finite_number":
            return f"must be a finite number, not {shown}"
        case "value_error":
            return str(limits["error"])
        case _ if kind.startswith("int_"):
            return f"must be a whole number, not {shown}"
        case _ if kind.startswith("float_"):
            return f"must be a number, not {shown}"
        case _ if kind.startswith("bool_"):
            return f"must be true or false, not {shown}"
        case _ if kind.startswith("string_"):
            return f"must be text, not {shown}"
        case _:
            return f"does not accept {shown}"


def unknown_key(name: str, known: Iterable[str], what: str) -> UsageError:
    """The error of a key that nobody knows.

    Args:
        name: The key.
        known: Those that there are.
        what: Beginning of the sentence.
    """
    names = list(known)
    near = difflib.get_close_matches(name.replace("-", "_"), names, 1, 0.0)
    return UsageError(f"{what} {name!r}.", f"The nearest known one is {near[0]!r}." if near else "Remove it.")


def flag(group: type[Settings], name: str) -> str:
    """The option of a field."""
    return _option(group.model_fields[name]).flag or "--" + name.replace("_", "-")


def settings_of(group: type[Settings]) -> dict[str, Setting]:
    """Every field of a group, its bases' included, by name."""
    return {name: setting(group, name) for name in group.model_fields}


def setting(group: type[Settings], name: str) -> Setting:
    """A field of a group."""
    info = group.model_fields[name]
    option, inner, several, n = _option(info), _plain(info.annotation), False, 1
    if get_origin(inner) is tuple:
        parts = get_args(inner)
        several, n = Ellipsis in parts, 1 if Ellipsis in parts else len(parts)
        inner = _plain(parts[0])
    choices: tuple[str, ...] = get_args(inner) if get_origin(inner) is Literal else ()
    kind = _kind(inner, option)
    shown = _short if choices == DTYPES else str
    default = option.default or _in_words(info.get_default(call_default_factory=True), shown)
    metavar = option.metavar or _METAVARS.get(kind, f"[{'|'.join(map(shown, choices))}]")
    return Setting(
        name=name,
        flag=flag(group, name),
        help=info.description or "",
        kind=kind,
        choices=choices,
        several=several,
        n=n,
        default=default,
        metavar=metavar,
        file=option.file,
        fix=option.fix,
        known=option.known,
    )


_METAVARS = {"flag": "", "integer": "N", "number": "X", "path": "PATH", "text": "TEXT", "pairs": "KEY=VALUE"}


def _kind(annotation: Any, option: Option) -> Literal["flag", "choice", "integer", "number", "path", "text", "pairs"]:
    if annotation is bool:
        return "flag"
    if get_origin(annotation) is Literal:
        return "choice"
    if option.path:
        return "path"
    if get_origin(annotation) is Mapping or annotation is Mapping:
        return "pairs"
    return {int: "integer", float: "number"}.get(annotation, "text")  # type: ignore[return-value]


def _option(info: FieldInfo) -> Option:
    return next((found for found in info.metadata if isinstance(found, Option)), Option())


def _plain(annotation: Any) -> Any:
    """The type without what is said about it and without None."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, types.UnionType):
            rest = [part for part in get_args(annotation) if part is not type(None)]
            if len(rest) > 1:
                return str
            annotation = rest[0]
        else:
            return annotation


def _in_words(value: Any, shown: Callable[[Any], str]) -> str:
    match value:
        case None | "" | () | bool() | Mapping():
            return ""
        case tuple():
            return ",".join(_in_words(part, shown) for part in value)
        case float():
            return f"{value:g}"
        case _:
            return shown(value)


def _words(of: Setting, value: Any) -> list[str]:
    match value:
        case True:
            return [of.flag]
        case False:
            return [of.flag.replace("--", "--no-", 1)]
        case Mapping():
            return [word for key, one in value.items() for word in (of.flag, f"{key}={json.dumps(one)}")]
        case tuple() if of.several:
            return [of.flag, ",".join(_short(part) for part in value)]
        case tuple():
            return [of.flag, *map(str, value)]
        case _:
            return [of.flag, _short(value)]


def _short(value: Any) -> str:
    return DTYPE_INFOS[value].short if value in DTYPES else str(value)
