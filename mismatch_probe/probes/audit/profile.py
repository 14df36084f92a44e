"""Thresholds of an audit: the profiles that ship with the tool, and a user's own, in TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.resources import data_path

PROFILES = ("default", "nemo-rl", "verl", "prime-rl", "strict")
# Checks beside the metrics of the catalog, with what their value is. Events are judged by whether they occur.
OWN_CHECKS: dict[str, str] = {
    "nonfinite_logprobs": "log-probs that are not finite or impossible",
    "fp32_floor": "mean |d| of the FP32 pair, nats",
    "one_sided": "mean importance ratio where it is not 1",
    "ess_seq_planned": "predicted ESS of sequence weights at the planned length",
    "fp16_refusal": "vLLM's own refusal of float16",
    "fp16_headroom": "65504 over the largest activation",
    "fp16_overflow_rate": "tokens with an activation that FP16 has no number for",
    "fp16_attention_headroom": "65504 over the largest product q·k",
    "fp16_weights": "relative error of the weight tensor that FP16 keeps worst",
    "fp16_loss_scale": "room between loss scales that flush and that overflow, powers of two",
    "fp16_loss_scale_start": "room above the usual first loss scale of 2^16, powers of two",
    "fp16_pass": "tensors that are not finite in a real FP16 forward and backward pass",
}
# Those of them that are maxima over the sequences that ran.
_OWN_EXTREMES = ("fp16_headroom", "fp16_attention_headroom", "fp16_loss_scale", "fp16_loss_scale_start")
RARE = ("nonfinite_logprobs", "one_sided", "fp16_overflow_rate", "confident_disagreement_rate")


def title_of(check: str) -> str:
    """A check in a few words."""
    return CATALOG[check].title if check in CATALOG else OWN_CHECKS.get(check, check)


def is_extreme(check: str) -> bool:
    """Whether a check is of a maximum, a minimum or a count, of which what was not seen says little."""
    return check in _OWN_EXTREMES or (check in CATALOG and not CATALOG[check].has_interval and check != "pareto_k")


class Bounds(BaseModel):
    """When a check warns and fails.

    Attributes:
        warn_above, fail_above, warn_below, fail_below: Limits of the value.
        event: Of a rare event: what one occurrence is.
        rate_below: Of a rare event that did not occur, and of a maximum that exceeds no limit: the upper 95 % limit of
            the share of prompts that would show it has to be below this, or the check is not judged. Without it such a
            check never passes.
        within: Of `one_sided`: the interval of the mean importance ratio has to lie within 1 ± this, or the check is
            not judged.
        source: Who says so.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    warn_above: float | None = None
    fail_above: float | None = None
    warn_below: float | None = None
    fail_below: float | None = None
    event: Literal["warn", "fail"] | None = None
    rate_below: float | None = Field(default=None, gt=0)
    within: float | None = Field(default=None, gt=0)
    source: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.limits and self.event is None:
            raise ValueError("names no limit")
        for warn, fail, order in (("warn_above", "fail_above", 1), ("warn_below", "fail_below", -1)):
            first, second = getattr(self, warn), getattr(self, fail)
            if first is not None and second is not None and order * (second - first) < 0:
                raise ValueError(f"{warn} = {first:g} would never warn before {fail} = {second:g}")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits of the value that there are, by name."""
        names = ("warn_above", "fail_above", "warn_below", "fail_below")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def text(self) -> str:
        """In words: `warn above 0.001, fail above 0.015`."""
        parts = [f"{name.replace('_', ' ')} {value:g}" for name, value in self.limits.items()]
        if self.event is not None:
            parts.append(f"{self.event} when one occurs")
        if self.rate_below is not None:
            parts.append(f"judged when at most {self.rate_below:g} of prompts can show more")
        if self.within is not None:
            parts.append(f"judged when the interval lies within 1 ± {self.within:g}")
        return ", ".join(parts)


class Profile(BaseModel):
    """A set of thresholds.

    Attributes:
        name: Of a shipped profile, or the file's name without its suffix.
        description: One sentence.
        extends: A shipped profile whose checks this one takes over; its own replace those of the same name.
        skip: Checks of it that are left out.
        checks: By name, a metric of the catalog or one of `OWN_CHECKS`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    extends: Literal["default", "nemo-rl", "verl", "prime-rl", "strict"] | None = None
    skip: tuple[str, ...] = ()
    checks: dict[str, Bounds] = {}

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = [*CATALOG, *OWN_CHECKS]
        for name in (*self.checks, *self.skip):
            if name not in known:
                raise ValueError(f"there is no check {name!r}; known are {', '.join(known)}")
        for name, bounds in self.checks.items():
            rare = name in RARE
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
        UsageError: There is no such profile or file, it is no TOML, a key or a check is unknown, or a limit cannot be.
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
        raise UsageError(f"The profile {name} cannot be read: {error}.", "Mend the file.") from None
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
