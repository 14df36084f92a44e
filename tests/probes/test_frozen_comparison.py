"""A frozen run of the built-in model: shared sequences, exact KL, an FP64 reference, both trainer modes."""

from __future__ import annotations

from mismatch_probe.config import Limit
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.probes.analysis import analyse
from mismatch_probe.runs.comparison import RunDirectory
from tests.frozen import FROZEN, assert_frozen

LIMITS = ("kl_k3>0.001@bf16", "mean_abs_logprob_diff>1e-9")


def test_its_tables_give_the_frozen_summary() -> None:
    folder = FROZEN / "comparison"
    limits = [Limit.parse(text, list(CATALOG)) for text in LIMITS]
    assert_frozen(analyse(RunDirectory.open(folder)).report(limits).summary, folder / "summary.json.gz")
