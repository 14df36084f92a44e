"""How numbers, foreign text, metrics and properties of tokens are written, the same in every report."""

from __future__ import annotations

import math
import unicodedata
from typing import TYPE_CHECKING

from mismatch_probe.metrics.catalog import metric_info
from mismatch_probe.metrics.curves import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mismatch_probe.report.model import Token

NONE = "–"
_NAMED = {"\n": "↵", "\t": "⇥"}
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
WHERE_TITLES = {
    "probability": "rollout probability μ(token)",
    "entropy": "entropy of the trainer (nats)",
    "rank": "rank at the trainer (0 = likeliest)",
    "token_kind": "kind of token",
    "position": "position in the response",
}
EDGES = (1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.3, 1.0)
LEVELS = tuple(f"≥ {edge:g}" for edge in EDGES)


def number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits: `0.983`, `12.4`, `4.18e-2`, `–` for None.

    Plain from 0.1 to below 1000 and scientific outside, decided after rounding.
    """
    if value is None:
        return NONE
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -1 <= power <= 2:
        return f"{value:.{max(digits - 1 - power, 0)}f}"
    return f"{mantissa}e{power}"


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """`[low, high]`, or nothing when a limit is absent."""
    if low is None or high is None:
        return ""
    return f"[{number(low, digits)}, {number(high, digits)}]"


def estimate(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """`value [low, high]`, without brackets when there is no interval."""
    return f"{number(value, digits)} {interval(low, high, digits)}".rstrip()


def digits_of(value: float | None) -> int:
    """Digits of a value for `number`: near 1 the distance from 1 counts, so that it gets more."""
    return 5 if value is not None and 0.9 < value < 1.1 else 3


def magnitude(value: float) -> str:
    """A magnitude, from 1,000 on in full, so that it can be compared with FP16's largest number."""
    return f"{value:,.0f}" if 1e3 <= value < 1e7 else number(value)


def percent(share: float | None) -> str:
    """A share as a percentage with three significant digits: `12.7 %`, `–` for None."""
    return NONE if share is None else f"{number(100.0 * share)} %"


def count(value: int | None) -> str:
    """A count with thousands separated, `–` for None."""
    return NONE if value is None else f"{value:,}"


def fitted(parameters: Mapping[str, float | str]) -> list[str]:
    """What was fitted, `name value` each; whole numbers without digits behind them."""

    def told(value: float | str) -> str:
        if isinstance(value, str):
            return value
        return count(int(value)) if float(value).is_integer() else number(value)

    return [f"{name.replace('_', ' ')} {told(value)}" for name, value in parameters.items()]


def size(n_bytes: float) -> str:
    """A size in bytes in the unit that a reader would choose: `12.6 GiB`, `257 MiB`."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n_bytes >= 1 << power:
            return f"{number(n_bytes / (1 << power))} {unit}"
    return f"{n_bytes:,.0f} bytes"


def visible(text: object) -> str:
    """`text` on one line with nothing in it that acts.

    Controls, bidi overrides, other format characters, surrogates and unassigned code points are spelled out: a newline
    becomes `↵`, a tab `⇥`, anything else `⟨U+001B⟩`. Idempotent.
    """
    return "".join(_visible_character(character) for character in str(text))


def _visible_character(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if unicodedata.category(character) in _UNSAFE:
        return f"⟨U+{ord(character):04X}⟩"
    return character


def clipped(text: str, limit: int, *, keep_end: bool = False) -> str:
    """At most `limit` characters of `text`, with `…` where something was cut, keeping its start or its end."""
    if len(text) <= limit:
        return text
    return "…" + text[len(text) - limit + 1 :] if keep_end else text[: limit - 1] + "…"


def metric_title(key: str) -> str:
    """The metric's title with its unit where it has one, or the key of a metric that is not in the catalogue."""
    info = metric_info(key)
    if info is None:
        return key
    return f"{info.title} ({info.unit})" if info.unit else info.title


def metric_formula(key: str) -> str:
    """The metric's formula, empty for a metric that is not in the catalogue."""
    info = metric_info(key)
    return info.formula if info else ""


"""What a token is sorted by: keys of a comparison's `where`, with the words for an axis or a table."""


def bin_order(labels: Iterable[str]) -> list[str]:
    """Bins without repeats in the order of their lower limits, or of the kinds of token."""

    def place(label: str) -> float:
        if label in KINDS:
            return KINDS.index(label)
        try:
            return float(label.removeprefix("≥ ").split("–")[0])
        except ValueError:
            return float("inf")

    return sorted(dict.fromkeys(labels), key=place)


"""Lower limits of the levels 1 to 7 of |d|, nats; level 0 lies below the first."""


def level(token: Token) -> int:
    """0 to 7, and 8 where a log-prob is not finite."""
    size = abs(token.trainer_logprob - token.rollout_logprob)
    return sum(size >= edge for edge in EDGES) if size < float("inf") else len(EDGES) + 1


def details(token: Token) -> str:
    """log μ, log π, d, rank and entropy in one line; nats."""
    parts = [
        f"log μ {number(token.rollout_logprob)}",
        f"log π {number(token.trainer_logprob)}",
        f"d {number(token.trainer_logprob - token.rollout_logprob)}",
    ]
    parts += [] if token.rank is None else [f"rank {token.rank}"]
    parts += [] if token.entropy is None else [f"entropy {number(token.entropy)}"]
    return " · ".join(parts)
