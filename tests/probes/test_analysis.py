"""From tables to summary: what is judged, what is missing, and that nothing but the tables is read."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mismatch_probe
from mismatch_probe.config import Limit
from mismatch_probe.errors import TableError, UsageError
from mismatch_probe.probes.analysis import analyse, judge
from mismatch_probe.results.comparison import Pair
from mismatch_probe.run import Run
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.types import MetricValue
from tests.factories.comparison import make_metrics, make_missing, make_pair
from tests.factories.manifest import make_pass

METRICS = ["kl_k3"]


def pair(value: float | None, *, why: str = "", dtype: str = "bfloat16", **changes: Any) -> Pair:
    return make_pair(
        dtype, "float32", metrics=make_metrics(0.0, kl_k3=MetricValue(value, why=why)), n_tokens=10, **changes
    )


class TestJudge:
    @pytest.mark.parametrize(("value", "verdict"), [(0.5, "ok"), (1.0, "ok"), (1.5, "fail")])
    def test_a_value(self, value: float, verdict: str) -> None:
        (row,) = judge(Limit.parse("kl_k3>1", METRICS), [pair(value)], [])
        assert (row.rollout_dtype, row.trainer_dtype, row.trainer_mode) == ("bfloat16", "float32", "cast")
        assert (row.limit, row.value, row.verdict, row.why) == ("kl_k3>1", value, verdict, "")

    def test_what_cannot_be_judged_is_inconclusive(self) -> None:
        limit = Limit.parse("kl_k3>1", METRICS)
        pairs = [pair(None, why="too few tokens"), pair(0.5, n_excluded=2), pair(1.5, n_excluded=2)]
        rows = judge(limit, pairs, [make_missing("float16", "float32", "it failed")])
        assert [row.verdict for row in rows] == ["inconclusive", "inconclusive", "fail", "inconclusive"]
        assert [row.value for row in rows] == [None, 0.5, 1.5, None]
        assert (rows[0].why, rows[3].why) == ("too few tokens", "it failed")
        assert rows[1].why.startswith("2 of 10 tokens")

    def test_only_the_pairs_that_are_meant(self) -> None:
        limit = Limit.parse("kl_k3>1@bfloat16/float32", METRICS)
        assert len(judge(limit, [pair(2.0), pair(2.0, dtype="float16")], [])) == 1

    @pytest.mark.parametrize(("broken", "verdict"), [(0, "ok"), (3, "inconclusive")])
    def test_an_infinite_exact_kl_is_never_ok(self, broken: int, verdict: str) -> None:
        found = make_pair(metrics=make_metrics(0.0, kl_exact=MetricValue(1e-5)), n_nonfinite_exact=broken)
        (row,) = judge(Limit.parse("kl_exact>0.1", ["kl_exact"]), [found], [])
        assert row.verdict == verdict


class TestSummary:
    def test_it_has_the_shape_of_the_design(self, finished: Run) -> None:
        document = json.loads((finished.path / "summary.json").read_text())
        assert document["schema_version"] == 3
        keys = {
            "rollout_pass",
            "trainer_pass",
            "rollout_dtype",
            "trainer_dtype",
            "trainer_mode",
            "on_policy",
            "n_tokens",
            "n_sequences",
            "n_nonfinite",
            "n_excluded",
            "excluded",
            "metrics",
        }
        for pair in document["pairs"]:
            assert keys <= pair.keys()
            for metric in pair["metrics"].values():
                assert {"value", "ci_low", "ci_high"} <= metric.keys()
                assert metric["value"] is not None or metric["why"]

    def test_the_csv_holds_the_same_numbers(self, finished: Run) -> None:
        pairs = {(p.rollout_pass, p.trainer_pass): p.metrics for p in finished.summary.pairs}
        with (finished.path / "summary.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == sum(len(metrics) for metrics in pairs.values())
        for row in rows:
            metric = pairs[row["rollout_pass"], row["trainer_pass"]][row["metric"]]
            for name in ("value", "ci_low", "ci_high"):
                assert (float(row[name]) if row[name] else None) == getattr(metric, name)

    def test_the_worst_tokens_are_the_worst(self, finished: Run) -> None:
        run = RunDirectory.open(finished.path)
        (worst, *_) = [token for token in finished.data.worst_tokens if token.pair == "bfloat16"]
        rollout, trainer = (run.tokens(name).to_pylist() for name in ("vllm-bfloat16-decode", "hf-bfloat16-cast"))
        differences = {
            (a["sequence_id"], a["position"]): b["logprob"] - a["logprob"]
            for a, b in zip(rollout, trainer, strict=False)
        }
        assert abs(worst.log_ratio) == max(map(abs, differences.values()))
        assert differences[worst.sequence_id, worst.position] == worst.log_ratio
        (row,) = [r for r in rollout if (r["sequence_id"], r["position"]) == (worst.sequence_id, worst.position)]
        assert (row["token_id"], row["token_text"]) == (worst.token_id, worst.token_text)


class TestMissing:
    def test_passes_that_have_not_run(self, run_copy: Path) -> None:
        run = RunDirectory.open(run_copy)
        del run.manifest.passes["vllm-float16-decode"]
        scored = run.manifest.passes["hf-float32-cast"]
        scored.covers = tuple(name for name in scored.covers if name != "vllm-float32-decode")
        run.manifest.passes["hf-bfloat16-cast"] = make_pass(status="failed", why="It broke.")
        summary = analyse(run).report().summary
        reasons = {(m.rollout_dtype, m.trainer_dtype): m.why for m in summary.missing}
        assert len(reasons) == 6
        assert reasons["float16", "float32"] == "this pass has not run yet; continue the run with --resume"
        assert reasons["bfloat16", "bfloat16"] == "It broke."
        assert reasons["float32", "float32"].startswith("the trainer has not scored these sequences yet")
        assert {(p.rollout_dtype, p.trainer_dtype) for p in summary.pairs} == {
            ("bfloat16", "float16"),
            ("bfloat16", "float32"),
            ("float32", "float16"),
        }

    def test_limits_on_missing_pairs_are_inconclusive(self, run_copy: Path) -> None:
        run = RunDirectory.open(run_copy)
        del run.manifest.passes["vllm-float16-decode"]
        limits = [Limit.parse("kl_k3>1000@float16", METRICS), Limit.parse("kl_k3>1000@bfloat16", METRICS)]
        assert [row.verdict for row in analyse(run).report(limits).summary.limits] == ["inconclusive", "ok"]


class TestReportAndPlot:
    @pytest.mark.usefixtures("no_figures")
    def test_a_report_needs_the_tables_alone(
        self, finished: Run, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for path in run_copy.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("manifest.json", "sequences.parquet", "tokens.parquet"):
                path.unlink()
        result = mismatch_probe.Run.open("copy").report()
        assert result.summary == finished.summary
        assert (run_copy / "summary.json").read_bytes() == (finished.path / "summary.json").read_bytes()

    @pytest.mark.usefixtures("no_figures")
    def test_other_limits(self, run_copy: Path) -> None:
        assert not mismatch_probe.Run.open(run_copy).report(fail_on=["kl_k3>1000"]).exceeded
        assert mismatch_probe.Run.open(run_copy).report(fail_on=["kl_k3>1e-12@bfloat16"]).exceeded
        with pytest.raises(UsageError, match="unknown metric"):
            mismatch_probe.Run.open(run_copy).report(fail_on=["kl_k9>1"])

    @pytest.mark.usefixtures("no_figures")
    def test_other_factors_of_the_ratio(self, finished: Run, run_copy: Path) -> None:
        limit, key = "frac_ratio_beyond_1.0001>0.01@bfloat16", "frac_ratio_beyond_1.0001"
        with pytest.raises(UsageError, match="unknown metric") as caught:
            mismatch_probe.Run.open(run_copy).report(fail_on=[limit])
        assert caught.value.fix == "Add --ratio-limit 1.0001."
        found = mismatch_probe.Run.open(run_copy).report(fail_on=[limit], ratio_limits=[1.0001])
        assert found.exceeded
        for pair, before in zip(found.summary.pairs, finished.summary.pairs, strict=True):
            value = pair.metrics[key].value
            assert value is not None
            assert before.metrics["frac_ratio_beyond_2"].value <= value <= 1
            assert {name: one for name, one in pair.metrics.items() if name != key} == before.metrics
            assert list(pair.metrics).index(key) == list(pair.metrics).index("frac_ratio_beyond_2") + 1
        with (run_copy / "summary.csv").open() as file:
            assert sum(row["metric"] == key for row in csv.DictReader(file)) == len(found.summary.pairs)
        assert "Fraction of ratios beyond a factor of 1.0001" in (run_copy / "report.md").read_text()

    def test_plot_draws_what_the_run_drew(self, finished: Run, run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.rmtree(run_copy / "figures")
        monkeypatch.chdir(run_copy.parent)
        found = mismatch_probe.Run.open(run_copy.name).plot()
        assert {path.name for path in found.values()} == {path.name for path in finished.figures.values()}
        assert all((run_copy.parent / path).stat().st_size > 0 for path in found.values())

    @pytest.mark.parametrize("again", [Run.report, Run.plot])
    def test_a_corrupt_table(self, run_copy: Path, again: Callable[[Run], Any]) -> None:
        tokens = run_copy / "tokens.parquet"
        tokens.write_bytes(tokens.read_bytes()[:1000])
        with pytest.raises(TableError, match=r"tokens\.parquet is corrupt or truncated"):
            again(Run.open(run_copy))

    def test_passes_of_different_tokens_are_not_paired(self, run_copy: Path) -> None:
        path = run_copy / "tokens.parquet"
        table = pq.read_table(path)
        ids = table["token_id"].to_pylist()
        ids[-1] += 1
        column = table.schema.get_field_index("token_id")
        changed = table.set_column(column, table.schema.field(column), pa.array(ids, pa.int32()))
        pq.write_table(changed, path)
        with pytest.raises(TableError, match="differ in their token_id column, so they cannot be paired"):
            mismatch_probe.Run.open(run_copy).report()

    @pytest.mark.parametrize("again", [Run.report, Run.plot])
    def test_a_run_in_which_nothing_can_be_compared(self, run_copy: Path, again: Callable[[Run], Any]) -> None:
        run = RunDirectory.open(run_copy)
        run.manifest.passes = {}
        run.save()
        with pytest.raises(TableError, match="Nothing can be compared: this pass has not run yet"):
            again(Run.open(run_copy))
