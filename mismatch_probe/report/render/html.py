"""A report as one HTML file: no script, no request, figures inside, and a policy that forbids everything else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from mismatch_probe.report.figures import captions
from mismatch_probe.report.format import LEVELS, details, level, visible

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mismatch_probe.report.model import Report, Token

BADGES = {"ok": "OK", "warn": "Warning", "fail": "Fail", "inconclusive": "Inconclusive", "none": ""}


def html_page(report: Report, figures: Mapping[str, Path]) -> str:
    """A page that needs nothing but itself.

    Args:
        report: What to show; any text in it may be hostile.
        figures: Name of each drawn figure to its PNG file; a section's figures that are absent are left out.

    Raises:
        OSError: A figure cannot be read.
    """
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    allowed = f"img-src data:; style-src 'sha256-{digest}'"
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            badge=BADGES[report.state],
            figures={name: (info, _data_uri(figures[name])) for name, info in captions(figures).items()},
            levels=LEVELS,
            style=Markup(style),
            policy=f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'",
        )
    )


def _style() -> str:
    # Own file without "<", so that it needs no escaping; its hash is the only style that the policy lets through.
    return resources.files(__package__).joinpath("templates/page.css").read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mismatch_probe.report.render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {"kind": _kind, "lines": _lines, "token": _token}
    return environment


def _finalize(value: Any) -> Any:
    """Every text is made visible before it is escaped; markup is our own."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _kind(block: object) -> str:
    return type(block).__name__


def _lines(text: str) -> Markup:
    """A snippet with its line breaks."""
    return Markup("\n").join(escape(visible(line)) for line in text.split("\n"))


def _token(token: Token) -> Markup:
    """A token in its colour; what lies behind it shows on hover and on tap."""
    shown = Markup("↵<br>").join(escape(visible(line)) for line in token.text.split("\n")) or "∅"
    classes = f"t d{level(token)}"
    return Markup('<span class="{}" tabindex="-1" data-x="{}">{}</span>').format(classes, details(token), shown)


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
