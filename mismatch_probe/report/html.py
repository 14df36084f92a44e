"""The report as one HTML file: no script, no request, figures inside, and a policy that forbids everything else."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mismatch_probe.report import view, view_exact
from mismatch_probe.report.attribution import attribution_answer
from mismatch_probe.report.data import ReportData
from mismatch_probe.report.figures import all_figures
from mismatch_probe.report.format import visible
from mismatch_probe.report.sections import sections

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class EmbeddedFigure:
    """A figure inside a page: `source` is a data URI."""

    title: str
    guide: str
    source: str


def render_page(template: str, **context: Any) -> str:
    """A page that needs nothing but itself; everything in `context` is escaped."""
    # Own file without "<", so that it needs no escaping; its hash is the only style that the policy lets through.
    style = resources.files(__package__).joinpath("templates/report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=PackageLoader("mismatch_probe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        style=Markup(style),
        policy=f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        **context,
    )


def embedded(figures: Mapping[str, Path], guides: Mapping[str, tuple[str, str]]) -> list[EmbeddedFigure]:
    """Figures in the order of their guides.

    Raises:
        OSError: A figure cannot be read.
    """
    return [
        EmbeddedFigure(title, guide, _data_uri(figures[name]))
        for name, (title, guide) in guides.items()
        if name in figures
    ]


def guides() -> dict[str, tuple[str, str]]:
    """Title and reading guide of each figure of a comparison."""
    return {info.name: (info.title, info.guide) for info in all_figures().values() if info.of is ReportData}


def render_html(data: ReportData, figures: Mapping[str, Path]) -> str:
    """A self-contained page.

    Args:
        data: What to show; model text in it may be hostile.
        figures: Figure name (as registered) to its PNG file; absent figures are left out.

    Raises:
        OSError: a figure cannot be read.
    """
    state, sentence = view.verdict(data.summary)
    answer = () if data.attribution is None else attribution_answer(data.attribution)
    return render_page(
        "report.html.j2",
        model=view.model_name(data),
        headlines=view.findings(data)[: view.HEADLINES],
        details=view.findings(data)[view.HEADLINES :],
        notes=view.notes(data),
        missing=view.missing_lines(data.summary),
        state=state,
        verdict=sentence,
        limits=view.limit_lines(data.summary),
        matrix=view.matrix_table(data.summary),
        exact=view_exact.exact_table(data.summary),
        estimators=view_exact.estimators_table(data.summary),
        budget=view_exact.budget_table(data.summary),
        texts={**view_exact.TEXTS, "budget": view_exact.budget_text(data.summary)},
        where=view_exact.where_table(data.summary),
        attribution=[visible(text) for text in answer],
        figures=embedded(figures, guides()),
        sections=sections(data.summary),
        metrics=view.metrics_table(data.summary),
        worst=view.worst_rows(data.worst_tokens),
        passes=view.passes_table(data.manifest),
        self_noise=view.self_noise_table(data.summary),
        provenance=view.provenance_table(data.manifest.model_dump(mode="json", exclude_none=True)),
    )


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
