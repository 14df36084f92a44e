"""The section of further metrics: what it shows, and that it vanishes where there is nothing."""

from __future__ import annotations

from mismatch_probe.metrics.further_catalog import FURTHER_SEQUENCE, FURTHER_TOKEN
from mismatch_probe.report.compare import compare_report
from mismatch_probe.report.further import GROUPS, further_section
from mismatch_probe.report.model import Table
from mismatch_probe.types import MetricValue
from tests.factories.comparison import make_comparison, make_metrics, make_pair, value
from tests.factories.report_data import make_report_data
from tests.snapshot import screen

KEYS = [key for keys in GROUPS.values() for key in keys]


def test_every_further_metric_has_its_place_once() -> None:
    own = {info.key for info in (*FURTHER_TOKEN, *FURTHER_SEQUENCE)}
    assert set(KEYS) == own | {"mean_ratio", "score_drift"}
    assert len(KEYS) == len(set(KEYS))


def test_rows_are_the_metrics_that_some_pair_has() -> None:
    found = {"mean_ratio": value(1.0), "logprob_slope": MetricValue(1.25, 1.2, 1.3), "binary_kl": value(1e-4)}
    pairs = (
        make_pair("bfloat16", "bfloat16", metrics=make_metrics(0.1, **found)),
        make_pair("float32", "float32", metrics=make_metrics(0.1, tail_slope=value(0.2))),
    )
    (section,) = further_section(make_comparison((), pairs=pairs))
    (shown,) = section.blocks
    assert isinstance(shown, Table)
    assert section.depth == "page"
    assert [cells[0].text for cells in shown.rows] == [
        about for about, keys in GROUPS.items() for key in keys if key in {*found, "tail_slope"}
    ]
    line = shown.rows[-1]
    assert (line[2].text, line[2].interval, line[3].text) == ("1.25", "[1.20, 1.30]", "–")
    assert shown.rows[0][2].text == "1.0000"


def test_older_documents_have_no_such_section() -> None:
    assert not further_section(make_comparison())
    only = make_pair(metrics=make_metrics(0.1, mean_ratio=value(1.0)))
    assert not further_section(make_comparison((), pairs=(only,)))
    few = make_pair(metrics={"mean_abs_logprob_diff": value(0.1)})
    assert not further_section(make_comparison((), pairs=(few,)))


def test_the_screen_stays_short() -> None:
    pair = make_pair(metrics=make_metrics(0.1, logprob_slope=value(1.0)))
    data = make_report_data(summary=make_comparison((), pairs=(pair,)))
    assert "Slope of trainer" not in screen(compare_report(data))
