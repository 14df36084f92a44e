"""Metrics of the mismatch between two policies, from arrays alone; definitions and signs are those of METRICS.md."""

from __future__ import annotations

from mismatch_probe.metrics.catalog import CATALOG, MetricInfo
from mismatch_probe.metrics.paired import paired_ratio
from mismatch_probe.metrics.sample import count_nonfinite
from mismatch_probe.metrics.summary import compute_metrics

__all__ = ["CATALOG", "MetricInfo", "compute_metrics", "count_nonfinite", "paired_ratio"]
