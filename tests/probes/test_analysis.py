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
from mismatch_probe.probes.session import RunResult
from mismatch_probe.tables import RunDirectory

METRICS = ["kl_k3"]


def cell(value: float | None, *, why: str = "", n_excluded: int = 0, dtype: str = "bfloat16") -> dict[str, Any]:
    names = {"rollout_dtype": dtype, "trainer_dtype": "float32", "trainer_mode": "cast"}
    metric = {"value": value, "why": why}
    return {**names, "n_excluded": n_excluded, "n_tokens": 10, "metrics": {"kl_k3": metric}}


class TestJudge:
    @pytest.mark.parametrize(("value", "exceeded"), [(0.5, False), (1.0, False), (1.5, True)])
    def test_a_value(self, value: float, exceeded: bool) -> None:
        (row,) = judge(Limit.parse("kl_k3>1", METRICS), [cell(value)], [])
        assert row == {
            "limit": "kl_k3>1",
            "rollout_dtype": "bfloat16",
            "trainer_dtype": "float32",
            "trainer_mode": "cast",
            "value": value,
            "exceeded": exceeded,
            "why": "",
        }

    def test_what_cannot_be_judged_does_not_pass(self) -> None:
        limit = Limit.parse("kl_k3>1", METRICS)
        absent = {"rollout_dtype": "float16", "trainer_dtype": "float32", "trainer_mode": "cast", "why": "refused"}
        rows = judge(limit, [cell(None, why="too few tokens"), cell(0.5, n_excluded=2)], [absent])
        assert [row["exceeded"] for row in rows] == [True, True, True]
        assert [row["why"] for row in rows] == [
            "too few tokens",
            "2 of 10 tokens have no usable log-probs, so the pair cannot pass",
            "refused",
        ]

    def test_only_the_pairs_that_are_meant(self) -> None:
        limit = Limit.parse("kl_k3>1@bfloat16/float32", METRICS)
        assert len(judge(limit, [cell(2.0), cell(2.0, dtype="float16")], [])) == 1


class TestSummary:
    def test_it_has_the_shape_of_the_design(self, finished: RunResult) -> None:
        document = json.loads((finished.path / "summary.json").read_text())
        assert document["schema_version"] == 1
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

    def test_the_csv_holds_the_same_numbers(self, finished: RunResult) -> None:
        pairs = {(p["rollout_pass"], p["trainer_pass"]): p["metrics"] for p in finished.summary["pairs"]}
        with (finished.path / "summary.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == sum(len(metrics) for metrics in pairs.values())
        for row in rows:
            metric = pairs[row["rollout_pass"], row["trainer_pass"]][row["metric"]]
            for name in ("value", "ci_low", "ci_high"):
                assert (float(row[name]) if row[name] else None) == metric[name]

    def test_the_worst_tokens_are_the_worst(self, finished: RunResult) -> None:
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
        del run.manifest["passes"]["vllm-float16-decode"]
        run.manifest["passes"]["hf-float32-cast"]["covers"].remove("vllm-float32-decode")
        run.manifest["passes"]["hf-bfloat16-cast"] = {"status": "failed", "why": "It broke.", "fix": ""}
        summary = analyse(run).summary
        reasons = {(m["rollout_dtype"], m["trainer_dtype"]): m["why"] for m in summary["missing"]}
        assert len(reasons) == 6
        assert reasons["float16", "float32"] == "this pass has not run yet; continue the run with --resume"
        assert reasons["bfloat16", "bfloat16"] == "It broke."
        assert reasons["float32", "float32"].startswith("the trainer has not scored these sequences yet")
        assert {(p["rollout_dtype"], p["trainer_dtype"]) for p in summary["pairs"]} == {
            ("bfloat16", "float16"),
            ("bfloat16", "float32"),
            ("float32", "float16"),
        }

    def test_limits_on_missing_cells_are_exceeded(self, run_copy: Path) -> None:
        run = RunDirectory.open(run_copy)
        del run.manifest["passes"]["vllm-float16-decode"]
        limits = [Limit.parse("kl_k3>1000@float16", METRICS), Limit.parse("kl_k3>1000@bfloat16", METRICS)]
        assert [row["exceeded"] for row in analyse(run, limits).summary["limits"]] == [True, False]


class TestReportAndPlot:
    @pytest.mark.usefixtures("no_figures")
    def test_a_report_needs_the_tables_alone(
        self, finished: RunResult, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for path in run_copy.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("manifest.json", "sequences.parquet", "tokens.parquet"):
                path.unlink()
        result = mismatch_probe.write_report("copy")
        assert result.summary == finished.summary
        assert (run_copy / "summary.json").read_bytes() == (finished.path / "summary.json").read_bytes()

    @pytest.mark.usefixtures("no_figures")
    def test_other_limits(self, run_copy: Path) -> None:
        assert not mismatch_probe.write_report(run_copy, fail_on=["kl_k3>1000"]).exceeded
        assert mismatch_probe.write_report(run_copy, fail_on=["kl_k3>1e-12@bfloat16"]).exceeded
        with pytest.raises(UsageError, match="unknown metric"):
            mismatch_probe.write_report(run_copy, fail_on=["kl_k9>1"])

    def test_plot_draws_what_the_run_drew(
        self, finished: RunResult, run_copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.rmtree(run_copy / "figures")
        monkeypatch.chdir(run_copy.parent)
        found = mismatch_probe.plot(run_copy.name)
        assert {path.name for path in found.values()} == {path.name for path in finished.figures.values()}
        assert all((run_copy.parent / path).stat().st_size > 0 for path in found.values())

    @pytest.mark.parametrize("again", [mismatch_probe.write_report, mismatch_probe.plot])
    def test_a_corrupt_table(self, run_copy: Path, again: Callable[[Path], Any]) -> None:
        tokens = run_copy / "tokens.parquet"
        tokens.write_bytes(tokens.read_bytes()[:1000])
        with pytest.raises(TableError, match=r"tokens\.parquet is corrupt or truncated"):
            again(run_copy)

    def test_passes_of_different_tokens_are_not_paired(self, run_copy: Path) -> None:
        path = run_copy / "tokens.parquet"
        table = pq.read_table(path)
        ids = table["token_id"].to_pylist()
        ids[-1] += 1
        column = table.schema.get_field_index("token_id")
        changed = table.set_column(column, table.schema.field(column), pa.array(ids, pa.int32()))
        pq.write_table(changed, path)
        with pytest.raises(TableError, match="differ in their token_id column, so they cannot be paired"):
            mismatch_probe.write_report(run_copy)

    @pytest.mark.parametrize("again", [mismatch_probe.write_report, mismatch_probe.plot])
    def test_a_run_in_which_nothing_can_be_compared(self, run_copy: Path, again: Callable[[Path], Any]) -> None:
        run = RunDirectory.open(run_copy)
        run.manifest["passes"] = {}
        run.save()
        with pytest.raises(TableError, match="Nothing can be compared: this pass has not run yet"):
            again(run_copy)


def test_an_infinite_exact_kl_cannot_pass() -> None:
    limit = Limit.parse("kl_exact>0.1", ["kl_exact"])
    cell = {"rollout_dtype": "bfloat16", "trainer_dtype": "bfloat16", "trainer_mode": "cast", "n_nonfinite": 0}
    pair = {**cell, "n_tokens": 20, "n_nonfinite_exact": 3, "metrics": {"kl_exact": {"value": 1e-5}}}
    (row,) = judge(limit, [pair], [])
    assert row["exceeded"]
    assert "not finite at 3 compared positions" in row["why"]
    assert not judge(limit, [{**pair, "n_nonfinite_exact": 0}], [])[0]["exceeded"]
