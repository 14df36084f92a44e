"""Limits of an audit: the profiles that ship with the tool, and a user's own, in TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mismatch_probe.errors import UsageError
from mismatch_probe.files import data_path
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.probes.audit.checks import is_extreme, is_rare, own_checks
from mismatch_probe.results.audit import Bounds

PROFILES = ("default", "nemo-rl", "verl", "prime-rl", "strict")


class Profile(BaseModel):
    """A set of limits.

    Attributes:
        name: Of a shipped profile, or the file's name without its suffix.
        description: One sentence.
        extends: A shipped profile whose checks this one takes over; its own replace those of the same name.
        skip: Checks of it that are left out.
        checks: By name, a metric of the catalog or one of `own_checks`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    extends: Literal["default", "nemo-rl", "verl", "prime-rl", "strict"] | None = None
    skip: tuple[str, ...] = ()
    checks: dict[str, Bounds] = {}

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = [*CATALOG, *own_checks()]
        for name in (*self.checks, *self.skip):
            if name not in known:
                raise ValueError(f"there is no check {name!r}; known are {', '.join(known)}")
        for name, bounds in self.checks.items():
            rare = is_rare(name)
            if rare and bounds.limits:
                raise ValueError(f"{name} is a rare event: give it `event` and `rate_below`")
            if not rare and (bounds.event or (bounds.rate_below and not is_extreme(name))):
                raise ValueError(f"{name} is no rare event: give it `warn_above` or the like")
            if (name == "one_sided") != (bounds.within is not None):
                raise ValueError("one_sided, and nothing else, needs `within`: how near to 1 its interval has to lie")
        return self


def load_profile(name: str) -> Profile:
    """A shipped profile by its name, or a file's.

    Raises:
        UsageError: There is no such profile or file, it is not TOML, a key or a check is unknown, or a limit cannot be.
    """
    own = name not in PROFILES
    path = Path(name) if own else data_path(f"audit/{name}.toml")
    if own and path.suffix != ".toml":
        raise UsageError(f"There is no profile {name!r}.", f"Known are {', '.join(PROFILES)}, or name a .toml file.")
    try:
        with path.open("rb") as handle:
            document = tomllib.load(handle)
    except FileNotFoundError:
        raise UsageError(f"The profile {name} does not exist.", "Check its path.") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"The profile {name} cannot be read: {error}.", "Correct the file.") from None
    profile = _validated(document, path)
    if profile.extends is None:
        return profile
    base = load_profile(profile.extends)
    checks = {**base.checks, **profile.checks}
    return profile.model_copy(update={"checks": {k: v for k, v in checks.items() if k not in profile.skip}})


def _validated(document: Mapping[str, Any], path: Path) -> Profile:
    try:
        return Profile.model_validate({"name": path.stem, **document})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = str(first["msg"]).removeprefix("Value error, ")
        raise UsageError(
            f"The profile {path.name}: {f'{where}: ' if where else ''}{what}.",
            "Write for example [checks.kl_k3] with warn_above = 0.001 and fail_above = 0.01.",
        ) from None
