"""What a report of a comparison is made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mismatch_probe.metrics.curves import BinnedDiff, Ccdf, LengthCurve, PolicyDensity
from mismatch_probe.report.data import Curves, ReportData, WorstToken
from tests.factories.comparison import SCALES, make_comparison
from tests.factories.manifest import finished_manifest


def make_curves(dtypes: Sequence[str] = tuple(SCALES), *, scale: float = 1.0, longest: int = 300) -> Curves:
    """Curves of some dtypes; `scale=0` makes every difference zero."""
    curves = Curves()
    rng = np.random.default_rng(0)
    edges = np.linspace(0.0, 1.0, 11)
    for dtype in dtypes:
        size = SCALES[dtype] * scale
        counts = np.diag(np.arange(1, 11)) + np.eye(10, k=1, dtype=np.int64) * 3
        curves.density[dtype] = PolicyDensity(edges, counts, int(counts.sum()))
        length = np.linspace(20, longest, 12).astype(np.int64)
        ratio = rng.normal(0.0, 10.0 * size, 12) if size else np.zeros(12)
        slope = -2.0 * size
        curves.length[dtype] = LengthCurve(length, ratio, slope, 0.1 * size, (1.5 * slope, 0.5 * slope), "")
        points = np.geomspace(size / 100, size * 30, 20) if size else np.empty(0)
        curves.ccdf[dtype] = Ccdf(points, np.geomspace(1.0, 1e-3, len(points)) if size else np.empty(0))
        curves.by_probability[dtype] = _binned(np.array([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]), size)
        curves.by_position[dtype] = _binned(np.linspace(0, longest, 6).round(), size)
    return curves


def _binned(edges: np.ndarray[tuple[int], np.dtype[np.float64]], size: float) -> BinnedDiff:
    mean = size * np.linspace(2.0, 0.2, len(edges) - 1)
    low, high = mean * 0.8, mean * 1.25
    low[-1] = high[-1] = np.nan
    return BinnedDiff(edges[:-1], edges[1:], np.full(len(mean), 50), mean, low, high)


def make_worst(**changes: Any) -> WorstToken:
    fields: dict[str, Any] = {
        "pair": "bfloat16",
        "sequence_id": 3,
        "prompt_id": "math-017",
        "position": 41,
        "token_id": 512,
        "token_text": " therefore",
        "context": "so x = 3 and",
        "rollout_logprob": -3.2,
        "trainer_logprob": -4.9,
        "log_ratio": -1.7,
        "contribution": 0.0464,
    }
    return WorstToken(**(fields | changes))


def make_report_data(**changes: Any) -> ReportData:
    """A complete run of three dtypes."""
    fields: dict[str, Any] = {
        "summary": make_comparison(),
        "manifest": finished_manifest(),
        "curves": make_curves(),
        "worst_tokens": [make_worst()],
    }
    return ReportData(**(fields | changes))
