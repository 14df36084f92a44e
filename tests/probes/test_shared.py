"""Shared sequences, kept rows and the reference, with the scripted engine: one samples, the others follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import mismatch_probe
from mismatch_probe.config import CompareConfig
from mismatch_probe.errors import DiskFull, TableError, UsageError
from mismatch_probe.metrics.curves import KINDS, kind_of
from mismatch_probe.probes import store
from mismatch_probe.run import Run
from mismatch_probe.types import DRIFT_BUCKETS, MetricValue
from tests.conftest import SMALL, MakeModel, Recorder, write_script

Compare = Callable[..., Run]
SHARED: dict[str, Any] = {
    **SMALL,
    "num_prompts": 6,
    "max_tokens": 5,
    "sequences": "shared",
    "exact_kl": 9,
    "rollout_dtypes": ("bfloat16", "float16"),
    "trainer_dtypes": ("bfloat16", "float32"),
}
SAMPLER, REPLAY = "vllm-bfloat16-decode", "vllm-float16-replay"


@pytest.fixture
def compare(tmp_path: Path, no_figures: None) -> Compare:
    def run(model: Path, out: str = "run", **options: Any) -> Run:
        return mismatch_probe.compare(model=str(model), **{**SHARED, **options}, out=tmp_path / out)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with every row kept and a float64 reference; read it, never change it."""
    folder = tmp_path_factory.mktemp("shared")
    options = {**SHARED, "exact_kl": "all", "reference": "float64"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mismatch_probe.report.figures.draw", lambda data, folder: {})
        model = write_script(folder / "model", vocab_size=40)
        return mismatch_probe.compare(model=str(model), **options, out=folder / "run")


@pytest.fixture
def model(scripted_model: MakeModel) -> Path:
    return scripted_model(vocab_size=40)


def table(run: Run, name: str) -> Any:
    return pq.read_table(run.path / f"{name}.parquet").to_pandas()


def cell(run: Run, rollout: str, trainer: str) -> dict[str, Any]:
    return next(p for p in run.summary.pairs if (p.rollout_dtype, p.trainer_dtype) == (rollout, trainer))


class TestReplay:
    def test_every_dtype_decodes_the_samplers_ids(self, finished: Run) -> None:
        tokens = table(finished, "tokens")
        by_pass = {name: rows.reset_index(drop=True) for name, rows in tokens.groupby("pass_id", observed=True)}
        keys = ["sequence_id", "position", "token_id"]
        assert by_pass[REPLAY][keys].equals(by_pass[SAMPLER][keys])
        assert not by_pass[REPLAY]["logprob"].equals(by_pass[SAMPLER]["logprob"])
        assert set(table(finished, "sequences")["rollout_pass"]) == {SAMPLER}

    def test_only_the_sampler_is_on_policy(self, finished: Run) -> None:
        assert cell(finished, "bfloat16", "bfloat16").on_policy is True
        replayed = cell(finished, "float16", "bfloat16")
        assert replayed.on_policy is False
        assert replayed.metrics["kl_k1"] == MetricValue(None, why=f"these tokens were sampled by {SAMPLER}")
        assert replayed.metrics["kl_k3"].value > 0

    def test_a_replay_has_self_noise(self, finished: Run) -> None:
        noise = {found.pass_id: found.measured for found in finished.summary.self_noise}
        assert noise[REPLAY].max_abs_logprob_diff == 0
        assert noise[REPLAY].n_tokens == 6 * SMALL["self_noise_tokens"]

    def test_the_trainer_scores_each_sequence_once(self, finished: Run) -> None:
        counts = finished.data.manifest.passes["hf-bfloat16-cast"].counts
        assert counts["n_sequences"] == 6

    def test_without_the_sampler_there_is_nothing_to_decode(self, compare: Compare, scripted_model: MakeModel) -> None:
        with pytest.raises(TableError, match="Nothing can be compared"):
            compare(scripted_model({"rollout-bfloat16": "crash-generate"}, vocab_size=40))

    def test_a_sampler_that_is_refused_ends_the_comparison(self, compare: Compare, scripted_model: MakeModel) -> None:
        with pytest.raises(TableError, match=r"Nothing can be compared: .*is unsupported, so there is nothing"):
            compare(scripted_model({"rollout-bfloat16": "refuse"}, vocab_size=40))

    def test_a_refused_replay_leaves_its_cells_empty(self, compare: Compare, scripted_model: MakeModel) -> None:
        run = compare(scripted_model({"rollout-float16": "refuse"}, vocab_size=40))
        assert run.complete
        assert {row.rollout_pass for row in run.summary.missing} == {REPLAY}

    def test_dtypes_sample_for_themselves_by_default(self, compare: Compare, model: Path) -> None:
        run = compare(model, sequences="own")
        assert all(pair.on_policy for pair in run.summary.pairs)
        assert "vllm-float16-decode" in run.data.manifest.passes


class TestRows:
    def test_every_pass_keeps_the_same_positions(self, compare: Compare, model: Path) -> None:
        exact = table(compare(model), "exact")
        places = {
            names: list(zip(rows["sequence_id"], rows["position"], rows["stands_for"], strict=True))
            for names, rows in exact.groupby(["rollout_pass", "pass_id"], observed=True)
        }
        assert len(places) == 4
        assert all(found == places[SAMPLER, "hf-bfloat16-cast"] for found in places.values())
        assert len(places[SAMPLER, "hf-bfloat16-cast"]) == 9

    def test_dtypes_that_sample_choose_their_own(self, compare: Compare, model: Path) -> None:
        exact = table(compare(model, sequences="own"), "exact")
        assert set(exact["rollout_pass"]) == {"vllm-bfloat16-decode", "vllm-float16-decode"}
        assert exact.groupby(["rollout_pass", "pass_id"], observed=True).size().tolist() == [9] * 4

    def test_sketches_become_a_score_drift(self, finished: Run) -> None:
        assert all(len(found) == DRIFT_BUCKETS for found in table(finished, "exact")["drift_sketch"])
        for pair in finished.summary.pairs:
            found = pair.metrics["score_drift"]
            assert found.value is not None
            assert 0 < found.value < 1
            assert found.why.startswith("sign flips of prompts reach ")

    def test_all_means_every_token(self, finished: Run) -> None:
        exact = table(finished, "exact")
        assert len(exact) == 6 * cell(finished, "bfloat16", "bfloat16").n_tokens
        assert set(exact["stands_for"]) == {1.0}

    def test_the_summary_has_the_tables_means(self, finished: Run) -> None:
        exact = table(finished, "exact")
        rows = exact[(exact["rollout_pass"] == REPLAY) & (exact["pass_id"] == "hf-float32-cast")]
        metrics = cell(finished, "float16", "float32").metrics
        assert metrics["kl_exact"].value == pytest.approx(rows["kl"].mean())
        assert metrics["kl_seq_exact"].value == pytest.approx(rows.groupby("sequence_id")["kl"].sum().mean())
        estimators = {row.key: row for row in cell(finished, "float16", "float32").estimators}
        assert estimators["kl_exact"].mean == pytest.approx(rows["kl"].mean())
        assert estimators["kl_k1"].tokens_needed > estimators["kl_exact"].tokens_needed

    def test_rows_are_deleted_once_all_are_compared(self, compare: Compare, model: Path) -> None:
        assert not (compare(model).path / "rows").exists()

    def test_rows_wait_for_a_trainer_that_failed(self, compare: Compare, scripted_model: MakeModel) -> None:
        run = compare(scripted_model({"trainer-float32": "die-score"}, vocab_size=40))
        assert not run.complete
        assert {path.name for path in (run.path / "rows").iterdir()} == {f"{SAMPLER}.rows", f"{REPLAY}.rows"}
        scripted_model(vocab_size=40)
        recorder = Recorder()
        resumed = mismatch_probe.Run.open(run.path).resume(progress=recorder)
        assert recorder.begun == ["encode", "hf-float32-cast"]
        assert resumed.complete
        assert cell(resumed, "float16", "float32").metrics["kl_exact"].value > 0
        assert not (run.path / "rows").exists()

    def test_a_replay_that_comes_late_is_compared_too(self, compare: Compare, scripted_model: MakeModel) -> None:
        whole = compare(scripted_model(vocab_size=40), out="whole")
        late = compare(scripted_model({"rollout-float16": "die-generate"}, vocab_size=40))
        assert {row.rollout_dtype for row in late.summary.missing} == {"float16"}
        scripted_model(vocab_size=40)
        resumed = mismatch_probe.Run.open(late.path).resume()
        assert resumed.complete
        assert resumed.summary.pairs == whole.summary.pairs
        tokens = [table(run, "tokens").astype({"pass_id": str}) for run in (resumed, whole)]
        first, second = (
            rows.sort_values(["pass_id", "sequence_id", "position"]).reset_index(drop=True) for rows in tokens
        )
        pd.testing.assert_frame_equal(first, second, check_categorical=False)

    def test_a_late_replay_without_rows_needs_no_trainer(self, compare: Compare, scripted_model: MakeModel) -> None:
        late = compare(scripted_model({"rollout-float16": "die-generate"}, vocab_size=40), exact_kl=0)
        scripted_model(vocab_size=40)
        recorder = Recorder()
        assert mismatch_probe.Run.open(late.path).resume(progress=recorder).complete
        assert recorder.begun == ["encode", REPLAY]

    def test_late_passes_follow_whoever_chose(self, compare: Compare, scripted_model: MakeModel) -> None:
        """The first replay fails, the second one chooses; when the first comes late it follows the second."""
        path = scripted_model({"rollout-float16": "die-generate", "trainer-float32": "die-score"}, vocab_size=40)
        options = {"rollout_dtypes": ("bfloat16", "float16", "float32")}
        late = compare(path, **options)
        (late.path / "rows" / f"{SAMPLER}.rows").unlink()  # and the sampler's own file is lost
        scripted_model(vocab_size=40)
        resumed = mismatch_probe.Run.open(late.path).resume()
        assert resumed.complete
        exact = table(resumed, "exact")
        kept = exact[exact["rollout_pass"] == REPLAY].drop_duplicates(["sequence_id", "position"])
        assert len(kept) == 9
        assert kept["stands_for"].sum() == pytest.approx(30, rel=0.5)  # 6 sequences of 5 tokens
        assert (kept["stands_for"] > 1).any()

    def test_a_file_of_rows_that_is_cut_off_is_one_sentence(self, compare: Compare, scripted_model: MakeModel) -> None:
        run = compare(scripted_model({"trainer-float32": "die-score"}, vocab_size=40))
        path = run.path / "rows" / f"{REPLAY}.rows"
        path.write_bytes(path.read_bytes()[:100])
        scripted_model(vocab_size=40)
        with pytest.raises(TableError, match="truncated"):
            mismatch_probe.Run.open(run.path).resume()

    def test_rows_that_are_gone_leave_exact_metrics_empty(self, compare: Compare, scripted_model: MakeModel) -> None:
        run = compare(scripted_model({"trainer-float32": "die-score"}, vocab_size=40))
        for path in (run.path / "rows").iterdir():
            path.unlink()
        scripted_model(vocab_size=40)
        metrics = cell(mismatch_probe.Run.open(run.path).resume(), "float16", "float32").metrics
        assert metrics["kl_exact"].value is None
        assert metrics["kl_k3"].value > 0

    def test_rows_that_would_not_fit_are_refused_before_anything_runs(
        self, compare: Compare, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(DiskFull, match=r"would keep 9 rows of logits.* are free"):
            compare(model)

    def test_two_runs_agree_to_the_byte(self, compare: Compare, model: Path) -> None:
        first, second = (compare(model, out=name).path / "summary.json" for name in "ab")
        assert first.read_bytes() == second.read_bytes()


class TestSmallRuns:
    @pytest.mark.parametrize("sizes", [{"num_prompts": 1}, {"max_tokens": 1}, {"num_prompts": 1, "max_tokens": 1}])
    def test_figures_of_next_to_nothing(self, scripted_model: MakeModel, tmp_path: Path, sizes: dict[str, int]) -> None:
        options = {
            **SHARED,
            "trainer_dtypes": ("bfloat16",),
            "rollout_dtypes": ("bfloat16",),
            "self_noise_tokens": 0,
            **sizes,
        }
        model = scripted_model(vocab_size=40)
        run = mismatch_probe.compare(model=str(model), **options, out=tmp_path / "run")
        assert (run.path / "report.html").exists()
        assert run.figures["length"].exists()


class TestReference:
    def test_float64_is_a_pass_of_its_own_and_no_column(self, finished: Run) -> None:
        assert finished.summary.reference == "hf-float64-cast"
        assert {pair.trainer_dtype for pair in finished.summary.pairs} == {"bfloat16", "float32"}
        assert pq.read_schema(finished.path / "reference.parquet").field("logprob").type == "double"
        assert "hf-float64-cast" not in set(table(finished, "tokens")["pass_id"])

    def test_errors_are_those_of_the_tables(self, finished: Run) -> None:
        tokens = table(finished, "tokens").pivot(index=["sequence_id", "position"], columns="pass_id", values="logprob")
        reference = table(finished, "reference").set_index(["sequence_id", "position"])["logprob"]
        reference = reference[~reference.index.duplicated()]
        budget = cell(finished, "float16", "bfloat16").budget
        error = tokens[REPLAY] - reference
        assert budget["rollout_error_rms"].value == pytest.approx(np.sqrt((error**2).mean()), rel=1e-6)
        error = tokens["hf-bfloat16-cast"] - reference
        assert budget["trainer_error_rms"].value == pytest.approx(np.sqrt((error**2).mean()), rel=1e-6)

    def test_float32_serves_where_it_is_a_column(self, compare: Compare, model: Path) -> None:
        run = compare(model)
        assert run.summary.reference == "hf-float32-cast"
        assert cell(run, "bfloat16", "float32").budget["trainer_error_rms"].value == 0
        without = compare(model, out="without", trainer_dtypes=("bfloat16",))
        assert without.summary.reference is None
        assert without.summary.pairs[0].budget is None


class TestWhere:
    def test_bins_share_out_tokens_and_squares(self, finished: Run) -> None:
        where = finished.summary.where["bfloat16"]
        assert list(where) == ["probability", "entropy", "rank", "position", "token_kind"]
        for bins in where.values():
            assert sum(row.fraction_of_tokens for row in bins) == pytest.approx(1)
            assert sum(row.contribution for row in bins) == pytest.approx(1)
            assert sum(row.n_tokens for row in bins) == cell(finished, "bfloat16", "bfloat16").n_tokens

    def test_kinds_are_those_of_the_texts(self, finished: Run) -> None:
        tokens = table(finished, "tokens")
        sampled = tokens[tokens["pass_id"] == SAMPLER]
        codes = [KINDS.index("special") if not id_ else kind_of(chr(id_)) for id_ in sampled["token_id"]]
        kinds = {row.label: row.n_tokens for row in finished.summary.where["bfloat16"]["token_kind"]}
        assert kinds == {KINDS[code]: codes.count(code) for code in sorted(set(codes))}


class TestUsage:
    @pytest.mark.parametrize("value", [-1, "some", 2.5])
    def test_exact_kl(self, value: Any) -> None:
        with pytest.raises(UsageError, match="--exact-kl must be a number of positions or all"):
            CompareConfig(exact_kl=value)

    @pytest.mark.parametrize("options", [{"sequences": "none"}, {"reference": "float16"}])
    def test_choices(self, options: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="does not accept"):
            CompareConfig(**options)
