"""A run in miniature: complete, hostile and empty."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mismatch_probe.report.data import Curves, ReportData
from mismatch_probe.results.finding import Finding
from tests.factories.comparison import (
    absent,
    make_comparison,
    make_limit,
    make_missing,
    make_pair,
    make_where,
    value,
    with_exact,
)
from tests.factories.manifest import finished_manifest, make_manifest, make_pass
from tests.factories.report_data import make_curves, make_report_data, make_worst

HOSTILE = "</td><script>alert(1)</script>\x1b[31m\u202e[bold]|`$x$` &lt; https://evil.example \ud800" + "A" * 500


@pytest.fixture
def exact() -> ReportData:
    """A complete run with full rows of logits, a float64 reference and sorted tokens."""
    return make_report_data(summary=with_exact(make_comparison()))


@pytest.fixture
def data() -> ReportData:
    """A complete run with a missing pair, a limit of each verdict and a worst token."""
    summary = make_comparison()
    limits = (
        make_limit("kl_k3>1", 2e-3, "ok"),
        make_limit("ess_seq>2@float16", None, "inconclusive", "tokens are not finite"),
        make_limit("kl_k3>0.001@bfloat16/bfloat16", 2e-3, "fail"),
    )
    missing = (make_missing("float16", "bfloat16", "no float16 in vLLM"),)
    pairs = summary.pairs[:3] + summary.pairs[4:]
    return make_report_data(
        summary=summary.model_copy(update={"pairs": pairs, "missing": missing, "limits": limits}),
        manifest=finished_manifest(),
    )


@pytest.fixture
def hostile() -> ReportData:
    """A run in which every string that a model, engine or file name can reach tries to break out."""
    summary = with_exact(make_comparison(("bfloat16",)), reference=HOSTILE)
    (pair,) = summary.pairs
    assert pair.budget is not None
    pair = pair.model_copy(
        update={
            "metrics": pair.metrics | {"kl_exact": replace(value(1e-3), why=HOSTILE), "kl_k3": absent(HOSTILE)},
            "budget": pair.budget | {"error_correlation": absent(HOSTILE)},
        }
    )
    recorded = make_pair("recorded", "bfloat16", on_policy=False, budget={"rollout_error_rms": absent(HOSTILE)})
    recorded = recorded.model_copy(
        update={"metrics": recorded.metrics | {key: absent(HOSTILE) for key in ("kl_exact", "ess_seq")}}
    )
    named = replace(make_where()["token_kind"][0], label=HOSTILE)
    found = Finding(code="no-forecast", severity="note", where=HOSTILE, values={"why": HOSTILE})
    summary = summary.model_copy(
        update={
            "model": HOSTILE,
            "where": summary.where | {"recorded → bfloat16": {"token_kind": (named,)}},
            "pairs": (pair, recorded),
            "missing": (make_missing("float16", "bfloat16", HOSTILE),),
            "limits": (make_limit(HOSTILE, 1.0, "fail", HOSTILE),),
            "findings": (found,),
        }
    )
    token = make_worst(prompt_id=HOSTILE, token_text=HOSTILE, context=HOSTILE, pair=HOSTILE)
    manifest = make_manifest(status="failed", passes={HOSTILE: make_pass(status="failed", why=HOSTILE)})
    return ReportData(summary, manifest, make_curves(("bfloat16",)), [token])


@pytest.fixture
def empty() -> ReportData:
    """A run in which nothing was compared."""
    return ReportData(make_comparison((), findings=(), self_noise=()), make_manifest(status="complete"), Curves(), [])
