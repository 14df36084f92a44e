"""Runs of the scripted engine: what they leave on disk, how they fail, and how they go on."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mismatch_probe
from mismatch_probe.config import CompareConfig
from mismatch_probe.engines import devices
from mismatch_probe.engines.models import ModelRef
from mismatch_probe.engines.scripted import Scripted
from mismatch_probe.errors import DiskFull, Interrupted, PromptError, TableError, UsageError
from mismatch_probe.files import locked
from mismatch_probe.passes import PassId
from mismatch_probe.probes.planning import make_plan
from mismatch_probe.run import Run
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.runs.folder import run_folder
from mismatch_probe.types import DTYPES
from tests.conftest import SMALL, MakeModel, Recorder

BF16, FP16, FP32 = (f"vllm-{dtype}-decode" for dtype in DTYPES)
TRAINER = "hf-bfloat16-cast"
TWO_BY_ONE: dict[str, Any] = {**SMALL, "rollout_dtypes": ("bfloat16", "float16")}
Compare = Callable[..., Run]


@pytest.fixture
def compare(tmp_path: Path, no_figures: None) -> Compare:
    def run(model: Path, out: str = "run", recorder: Recorder | None = None, **options: Any) -> Run:
        config = dict(model=str(model), **{**SMALL, **options})
        return mismatch_probe.compare(**config, out=tmp_path / out, progress=recorder)

    return run


def manifest(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return document


def pass_status(path: Path) -> dict[str, str]:
    return {name: record["status"] for name, record in manifest(path)["passes"].items()}


class Counting(Recorder):
    """Also remembers messages, and how many tokens each pass had to do."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.totals: dict[str, int] = {}

    def message(self, text: str) -> None:
        self.messages.append(text)

    def total(self, pass_id: str, tokens: int) -> None:
        self.totals[pass_id] = tokens


class TestFinishedRun:
    def test_all_nine_pairs_with_their_self_noise(self, finished: Run) -> None:
        pairs = finished.summary.pairs
        assert {(p.rollout_dtype, p.trainer_dtype) for p in pairs} == {(r, t) for r in DTYPES for t in DTYPES}
        assert finished.summary.missing == ()
        for pair in pairs:
            assert (pair.n_sequences, pair.n_tokens, pair.n_nonfinite) == (40, 240, 0)
            assert pair.on_policy is True
            for side in ("rollout", "trainer"):
                measured = getattr(pair.self_noise, side).measured
                assert measured.mean_abs_logprob_diff == 0
                assert measured.n_tokens > 0

    def test_metrics_find_the_noise_that_was_scripted(self, finished: Run) -> None:
        found = {
            (p.rollout_dtype, p.trainer_dtype): p.metrics["mean_abs_logprob_diff"].value for p in finished.summary.pairs
        }
        assert found["bfloat16", "bfloat16"] > 3 * found["float16", "float16"] > 0
        assert found["float32", "float32"] < 1e-4

    def test_files(self, finished: Run) -> None:
        names = {path.name for path in finished.path.iterdir() if not path.name.startswith(".")}
        assert names == {
            "manifest.json",
            "sequences.parquet",
            "tokens.parquet",
            "summary.json",
            "summary.csv",
            "figures",
            "report.html",
            "report.md",
            "logs",
        }
        assert all(path.stat().st_size > 0 for path in finished.figures.values())

    def test_the_manifest_says_what_was_run(self, finished: Run) -> None:
        found = manifest(finished.path)
        assert found["status"] == "complete"
        assert found["model"]["files"].keys() == {"config.json"}
        assert found["prompts"]["n"] == 40
        assert {"versions", "machine", "variables"} <= found["environment"].keys()
        record = found["passes"][BF16]
        assert record["counts"] == {
            "n_sequences": 40,
            "n_tokens": 240,
            "n_nonfinite": 0,
            "n_truncated": 40,
            "n_empty": 0,
        }
        assert record["engine"]["dtype"] == "bfloat16"
        assert record["timings"].keys() >= {"wait", "load", "generate"}
        assert found["config"]["num_prompts"] == 40

    def test_every_pass_says_where_and_with_what_it_ran(self, finished: Run) -> None:
        passes = manifest(finished.path)["passes"]
        ran = [record for record in passes.values() if not record["repeats"]]
        assert len(ran) == 6
        for record in ran:
            assert {"versions", "machine", "environment"} <= record["engine"].keys()
            assert {"cpu", "gpus"} <= record["engine"]["machine"].keys()

    def test_each_distinct_sequence_is_scored_once(self, finished: Run) -> None:
        """The scripted engine samples the same ids in every dtype."""
        counts = manifest(finished.path)["passes"][TRAINER]["counts"]
        assert (counts["n_sequences"], counts["n_distinct_sequences"]) == (120, 40)

    def test_resuming_it_runs_nothing(self, run_copy: Path, no_figures: None) -> None:
        recorder = Recorder()
        before = (run_copy / "summary.json").read_bytes()
        assert mismatch_probe.Run.open(run_copy).resume(progress=recorder).complete
        assert recorder.begun == ["encode"]
        assert (run_copy / "summary.json").read_bytes() == before


class TestRepeatability:
    def test_the_same_seed_gives_the_same_bytes(self, scripted_model: MakeModel, compare: Compare) -> None:
        model = scripted_model()
        first, second = (compare(model, out) for out in ("first", "second"))
        other = compare(model, "other", seed=1)
        for name in ("summary.json", "summary.csv", "tokens.parquet", "sequences.parquet"):
            assert (first.path / name).read_bytes() == (second.path / name).read_bytes()
        assert (first.path / "summary.json").read_bytes() != (other.path / "summary.json").read_bytes()


class TestFailedPasses:
    def test_a_refused_dtype_leaves_the_other_cells(self, scripted_model: MakeModel, compare: Compare) -> None:
        model = scripted_model(faults={"rollout-float16": "refuse", "trainer-float32": "refuse"})
        result = compare(model, **{**TWO_BY_ONE, "trainer_dtypes": ("bfloat16", "float32")})
        assert result.complete
        assert pass_status(result.path)[FP16] == pass_status(result.path)["hf-float32-cast"] == "unsupported"
        assert [(p.rollout_dtype, p.trainer_dtype) for p in result.summary.pairs] == [("bfloat16", "bfloat16")]
        reasons = {(m.rollout_dtype, m.trainer_dtype): m.why for m in result.summary.missing}
        assert reasons["float16", "bfloat16"] == "The scripted model does not run in float16."
        assert reasons["bfloat16", "float32"] == "The scripted model does not run in float32."

    def test_a_refused_dtype_is_not_asked_again(self, scripted_model: MakeModel, compare: Compare) -> None:
        faults = {"rollout-float16": "refuse", "trainer-float32": "refuse"}
        result = compare(scripted_model(faults=faults), **{**TWO_BY_ONE, "trainer_dtypes": ("bfloat16", "float32")})
        recorder = Recorder()
        mismatch_probe.Run.open(result.path).resume(progress=recorder)
        assert recorder.begun == ["encode"]

    def test_a_killed_engine_and_its_resume(self, scripted_model: MakeModel, compare: Compare) -> None:
        result = compare(scripted_model(faults={"rollout-float16": "die-generate"}), **TWO_BY_ONE)
        assert not result.complete
        assert manifest(result.path)["status"] == "incomplete"
        assert "was killed (signal 9)" in result.summary.missing[0].why
        before = {name: RunDirectory.open(result.path).tokens(name) for name in (BF16, TRAINER)}
        timings = manifest(result.path)["passes"][BF16]["timings"]

        scripted_model()
        recorder = Recorder()
        again = mismatch_probe.Run.open(result.path).resume(progress=recorder)
        assert again.complete
        assert recorder.begun == ["encode", FP16, TRAINER]
        assert len(again.summary.pairs) == 2
        run = RunDirectory.open(result.path)
        assert run.manifest.passes[BF16].timings == timings
        assert run.tokens(BF16).equals(before[BF16])
        trainer = run.tokens(TRAINER)
        assert trainer.num_rows == 2 * before[TRAINER].num_rows
        assert trainer.slice(0, before[TRAINER].num_rows).to_pylist() == before[TRAINER].to_pylist()
        assert not (run.path / "passes").exists()

    def test_it_ends_as_if_nothing_had_failed(
        self, scripted_model: MakeModel, compare: Compare, tmp_path: Path
    ) -> None:
        model = scripted_model(faults={"rollout-float16": "die-start", "trainer-bfloat16": "die-score"})
        with pytest.raises(TableError, match="Nothing can be compared"):
            compare(model, "failed", **TWO_BY_ONE)
        scripted_model()
        recorder = Recorder()
        path = mismatch_probe.Run.open(tmp_path / "failed").resume(progress=recorder).path
        assert recorder.begun == ["encode", FP16, TRAINER]
        whole = compare(model, "whole", **TWO_BY_ONE)
        assert (path / "summary.json").read_bytes() == (whole.path / "summary.json").read_bytes()
        assert (path / "tokens.parquet").read_bytes() == (whole.path / "tokens.parquet").read_bytes()

    @pytest.mark.parametrize(
        ("faults", "failed", "sentence"),
        [
            ({"rollout-float16": "memory-generate"}, FP16, "ran out of memory. Lower --rollout-batch"),
            ({"rollout-float16": "crash-start"}, FP16, "a scripted crash The engine's log is"),
            ({"rollout-float16": "empty"}, FP16, "The engine generated no tokens. Check the prompts"),
            ({"trainer-bfloat16": "die-score"}, TRAINER, "was killed (signal 9)"),
            ({"trainer-bfloat16": "memory-start"}, TRAINER, "ran out of memory. Lower --memory-budget"),
        ],
    )
    def test_what_failed_is_said(
        self, scripted_model: MakeModel, compare: Compare, faults: dict[str, str], failed: str, sentence: str
    ) -> None:
        recorder = Recorder()
        options = {**TWO_BY_ONE, "trainer_dtypes": ("bfloat16", "float16")}
        result = compare(scripted_model(faults=faults), recorder=recorder, **options)
        assert not result.complete
        assert sentence in recorder.ends[failed]
        record = manifest(result.path)["passes"][failed]
        assert f"{record['why']} {record['fix']}" == recorder.ends[failed]
        assert {row.why for row in result.summary.missing} == {record["why"]}
        assert len(result.summary.pairs) == len(result.summary.missing) == 2

    @pytest.mark.parametrize("side", ["rollout", "trainer"])
    def test_nan_is_counted_and_left_out(self, scripted_model: MakeModel, compare: Compare, side: str) -> None:
        result = compare(scripted_model(faults={f"{side}-bfloat16": "nan"}))
        (pair,) = result.summary.pairs
        assert 0 < pair.n_nonfinite < pair.n_tokens
        counted = manifest(result.path)["passes"][BF16 if side == "rollout" else TRAINER]["counts"]["n_nonfinite"]
        assert counted == pair.n_nonfinite
        assert pair.metrics["mean_abs_logprob_diff"].value > 0
        assert result.complete

    def test_nothing_to_compare(self, scripted_model: MakeModel, compare: Compare, tmp_path: Path) -> None:
        model = scripted_model(faults={"rollout-bfloat16": "refuse"})
        with pytest.raises(TableError, match=r"Nothing can be compared: The scripted model does not run in bfloat16\."):
            compare(model)
        assert manifest(tmp_path / "run")["status"] == "complete"


class TestExtension:
    """A rollout that failed has finished on resume, and the trainers score its sequences, too."""

    @pytest.fixture
    def extendable(self, scripted_model: MakeModel, compare: Compare) -> Run:
        """A run whose trainer has scored the only rollout that did not fail."""
        return compare(scripted_model(faults={"rollout-float16": "die-start"}), **TWO_BY_ONE)

    @pytest.mark.parametrize("fault", ["die-start", "memory-score", "crash-score", "refuse"])
    def test_a_trainer_that_fails_keeps_what_it_has(
        self, extendable: Run, scripted_model: MakeModel, fault: str
    ) -> None:
        before = manifest(extendable.path)["passes"][TRAINER]
        tokens = RunDirectory.open(extendable.path).tokens(TRAINER).to_pylist()
        scripted_model(faults={"trainer-bfloat16": fault})
        recorder = Recorder()
        failed = mismatch_probe.Run.open(extendable.path).resume(progress=recorder)
        assert not failed.complete
        assert manifest(failed.path)["status"] == "incomplete"
        record = manifest(failed.path)["passes"][TRAINER]
        why, record["extension_failure"] = record["extension_failure"], ""
        assert recorder.ends[TRAINER].startswith(why)
        assert record == before
        assert RunDirectory.open(failed.path).tokens(TRAINER).to_pylist() == tokens
        (missing,) = failed.summary.missing
        assert (missing.rollout_pass, missing.trainer_pass, missing.why) == (FP16, TRAINER, why)
        assert [(p.rollout_pass, p.trainer_pass) for p in failed.summary.pairs] == [(BF16, TRAINER)]

    def test_the_next_resume_scores_only_what_is_missing(self, extendable: Run, scripted_model: MakeModel) -> None:
        scripted_model(faults={"trainer-bfloat16": "die-score"})
        mismatch_probe.Run.open(extendable.path).resume()
        scripted_model(faults={"trainer-bfloat16": "nan"})
        counting = Counting()
        result = mismatch_probe.Run.open(extendable.path).resume(progress=counting)
        assert result.complete
        assert counting.begun == ["encode", TRAINER]
        run = RunDirectory.open(result.path)
        sequences = run.sequences(FP16).to_pylist()
        lengths = [len(row["prompt_token_ids"]) + len(row["response_token_ids"]) for row in sequences]
        assert counting.totals[TRAINER] == sum(lengths)
        record = run.manifest.passes[TRAINER]
        assert not record.extension_failure
        assert record.covers == (BF16, FP16)
        later = {row["sequence_id"] for row in sequences}
        nonfinite = [row for row in run.tokens(TRAINER).to_pylist() if not math.isfinite(row["logprob"])]
        assert {row["sequence_id"] for row in nonfinite} <= later
        assert nonfinite
        assert record.counts == {
            "n_sequences": 8,
            "n_distinct_sequences": 8,
            "n_tokens": 32,
            "n_nonfinite": len(nonfinite),
        }
        assert (run.tokens(TRAINER).num_rows, run.manifest.passes[str(PassId.parse(TRAINER).repeat)].rows) == (
            32,
            {"tokens": 16},
        )
        assert [pair.n_tokens for pair in result.summary.pairs] == [16, 16]

    def test_a_kill_between_table_and_manifest(
        self,
        extendable: Run,
        scripted_model: MakeModel,
        compare: Compare,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        model = scripted_model()
        tokens = RunDirectory.open(extendable.path).tokens(TRAINER).to_pylist()
        real = RunDirectory.save

        class Killed(BaseException):
            pass

        def save(self: RunDirectory) -> None:
            if len(self.manifest.passes[TRAINER].covers) == 2:
                raise Killed
            real(self)

        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "save", save)
            with pytest.raises(Killed):
                mismatch_probe.Run.open(extendable.path).resume()
        assert (extendable.path / "passes" / f"{TRAINER}.tokens.32.parquet").exists()
        run = RunDirectory.open(extendable.path)
        assert run.manifest.passes[TRAINER].covers == (BF16,)
        assert run.tokens(TRAINER).to_pylist() == tokens
        recorder = Recorder()
        result = mismatch_probe.Run.open(extendable.path).resume(progress=recorder)
        assert result.complete
        assert recorder.begun == ["encode", TRAINER]
        assert not (result.path / "passes").exists()
        whole = compare(model, "whole", **TWO_BY_ONE)
        assert [pair.metrics for pair in result.summary.pairs] == [pair.metrics for pair in whole.summary.pairs]


class TestInProcess:
    """An engine is tried in-process first, and in a process of its own where that fails."""

    def test_what_fails_only_there_goes_to_the_process(self, scripted_model: MakeModel, compare: Compare) -> None:
        counting = Counting()
        model = scripted_model(faults={"rollout-bfloat16": "crash-in-process"})
        result = compare(model, recorder=counting, **TWO_BY_ONE)
        assert result.complete
        assert counting.begun == ["encode", BF16, BF16, FP16, TRAINER]
        assert counting.messages.count("the engine failed in-process; trying a process of its own") == 1
        passes = manifest(result.path)["passes"]
        for name in (BF16, FP16):
            assert passes[name]["engine"]["in_process"] is False
            assert "a scripted crash that an engine process of its own avoids" in passes[name]["in_process_failure"]
            assert passes[name]["deterministic"]["promised"] is False
        assert passes[TRAINER]["deterministic"]["promised"] is True

    def test_a_failure_in_both_says_nothing_about_the_next_dtype(
        self, scripted_model: MakeModel, compare: Compare
    ) -> None:
        recorder = Recorder()
        model = scripted_model(faults={"rollout-bfloat16": "crash-start"})
        result = compare(model, recorder=recorder, **TWO_BY_ONE)
        assert not result.complete
        assert recorder.begun == ["encode", BF16, BF16, FP16, TRAINER]
        record = manifest(result.path)["passes"][FP16]
        assert record["engine"]["in_process"] is True
        assert not record["in_process_failure"]
        assert record["deterministic"]["promised"] is True

    @pytest.mark.parametrize("fault", ["crash-in-process", "crash-start"])
    def test_the_user_may_ask_for_the_process(
        self, scripted_model: MakeModel, compare: Compare, monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        monkeypatch.setattr(Scripted, "in_process_wanted", lambda engine: False)
        recorder = Recorder()
        result = compare(scripted_model(faults={"rollout-bfloat16": fault}), recorder=recorder, **TWO_BY_ONE)
        assert recorder.begun == ["encode", BF16, FP16, TRAINER]
        record = manifest(result.path)["passes"][FP16]
        assert record["engine"]["in_process"] is False
        assert not record["in_process_failure"]
        assert result.complete is (fault == "crash-in-process")


class TestStopped:
    def test_ctrl_c_keeps_what_is_finished(self, scripted_model: MakeModel, compare: Compare, tmp_path: Path) -> None:
        class Impatient(Recorder):
            def advance(self, pass_id: str, tokens: int) -> None:
                if pass_id == FP16:
                    raise KeyboardInterrupt

        with pytest.raises(Interrupted, match=r"finished passes are kept.*compare --resume .*/run"):
            compare(scripted_model(), recorder=Impatient(), **TWO_BY_ONE)
        found = manifest(tmp_path / "run")
        assert found["status"] == "interrupted"
        assert found["model"]["files"]
        recorder = Recorder()
        assert mismatch_probe.Run.open(tmp_path / "run").resume(progress=recorder).complete
        assert recorder.begun == ["encode", FP16, TRAINER]

    def test_ctrl_c_does_not_wait_for_the_models_hashes(
        self, scripted_model: MakeModel, compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = threading.Event()

        def slow(_: ModelRef) -> dict[str, str]:
            read.wait(60)
            return {}

        class Impatient(Recorder):
            def advance(self, pass_id: str, tokens: int) -> None:
                if pass_id == FP16:
                    raise KeyboardInterrupt

        try:
            with monkeypatch.context() as patch:
                patch.setattr(ModelRef, "file_hashes", slow)
                with pytest.raises(Interrupted):
                    compare(scripted_model(), recorder=Impatient(), **TWO_BY_ONE)
        finally:
            read.set()
        found = manifest(tmp_path / "run")
        assert found["status"] == "interrupted"
        assert found["model"]["files"] is None
        mismatch_probe.Run.open(tmp_path / "run").resume()
        assert manifest(tmp_path / "run")["model"]["files"].keys() == {"config.json"}

    def test_ctrl_c_on_a_model_that_cannot_be_hashed(
        self, scripted_model: MakeModel, compare: Compare, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreadable(_: ModelRef) -> dict[str, str]:
            raise PermissionError("model.safetensors")

        class Impatient(Recorder):
            def advance(self, pass_id: str, tokens: int) -> None:
                if pass_id == FP16:
                    raise KeyboardInterrupt

        monkeypatch.setattr(ModelRef, "file_hashes", unreadable)
        with pytest.raises(Interrupted):
            compare(scripted_model(), recorder=Impatient(), **TWO_BY_ONE)

    def test_a_full_disk_keeps_what_is_finished(
        self, scripted_model: MakeModel, compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = RunDirectory.finish_pass

        def full(self: RunDirectory, pass_id: str, *rest: Any) -> None:
            if pass_id == TRAINER:
                raise DiskFull("The disk is full.", "Free some space.")
            real(self, pass_id, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "finish_pass", full)
            with pytest.raises(DiskFull):
                compare(scripted_model())
        assert manifest(tmp_path / "run")["status"] == "running"
        recorder = Recorder()
        assert mismatch_probe.Run.open(tmp_path / "run").resume(progress=recorder).complete
        assert recorder.begun == ["encode", TRAINER]


class TestWhatMayNotChange:
    @pytest.fixture
    def interrupted(self, scripted_model: MakeModel, compare: Compare) -> Run:
        prompts = scripted_model(faults={"rollout-float16": "die-start"}).parent / "prompts.txt"
        prompts.write_text("one\ntwo\nthree\nfour\n")
        return compare(prompts.parent / "model", prompts=str(prompts), **{**TWO_BY_ONE, "num_prompts": None})

    def test_the_model(self, interrupted: Run, scripted_model: MakeModel) -> None:
        scripted_model(vocab_size=999)
        recorder = Recorder()
        with pytest.raises(TableError, match="The model's files have changed since this run began"):
            mismatch_probe.Run.open(interrupted.path).resume(progress=recorder)
        assert recorder.begun == []

    @pytest.mark.parametrize("text", ["one\ntwo\nthree\nfive\n", "one\ntwo\nthree\nfour\nfive\n"])
    def test_the_prompts(self, interrupted: Run, text: str) -> None:
        (interrupted.path.parent / "prompts.txt").write_text(text)
        with pytest.raises(TableError, match="The prompts have changed since this run began"):
            mismatch_probe.Run.open(interrupted.path).resume()

    def test_how_they_are_encoded(self, interrupted: Run) -> None:
        run = RunDirectory.open(interrupted.path)
        run.manifest.prompts.token_ids_sha256 = "0" * 64
        run.save()
        with pytest.raises(TableError, match="encoded to other ids than when this run began"):
            mismatch_probe.Run.open(interrupted.path).resume()

    def test_the_device(self, interrupted: Run) -> None:
        run = RunDirectory.open(interrupted.path)
        run.manifest.device = "cuda"
        run.save()
        with pytest.raises(UsageError, match="began on cuda, and this machine offers cpu"):
            mismatch_probe.Run.open(interrupted.path).resume()

    def test_sizes_stay_when_the_machines_defaults_differ(
        self, scripted_model: MakeModel, compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = scripted_model(faults={"rollout-float16": "die-start"})
        compare(model, **{**TWO_BY_ONE, "max_tokens": None})
        before = manifest(tmp_path / "run")["sizes"]["max_tokens"]
        real = devices.default_sizes
        monkeypatch.setattr(devices, "default_sizes", lambda device: replace(real(device), max_tokens=before + 3))
        scripted_model()
        result = mismatch_probe.Run.open(tmp_path / "run").resume()
        assert [pair.n_tokens for pair in result.summary.pairs] == [4 * before] * 2


class TestWhatMayChange:
    ROLLOUT_CHANGES: Mapping[str, Any] = {"rollout_batch": 2, "engine_args": {"block_size": 32}, "eager": True}

    def test_the_memory_budget_at_any_time(self, run_copy: Path, no_figures: None) -> None:
        mismatch_probe.Run.open(run_copy).resume(memory_budget_gib=2.5)
        found = manifest(run_copy)
        assert found["config"]["memory_budget_gib"] == found["sizes"]["memory_budget_gib"] == 2.5
        mismatch_probe.Run.open(run_copy).resume()
        assert manifest(run_copy)["sizes"] == found["sizes"]

    def test_the_trainer_until_a_trainer_pass_is_finished(
        self, scripted_model: MakeModel, compare: Compare, tmp_path: Path
    ) -> None:
        with pytest.raises(TableError, match="Nothing can be compared"):
            compare(scripted_model(faults={"trainer-bfloat16": "memory-score"}))
        before = manifest(tmp_path / "run")
        scripted_model()
        changes: dict[str, Any] = {"trainer_layout": "single", "trainer_attn": "eager", "memory_budget_gib": 0.5}
        assert mismatch_probe.Run.open(tmp_path / "run").resume(**changes).complete
        after = manifest(tmp_path / "run")
        trainer = after["passes"][TRAINER]["engine"]
        assert (trainer["layout"], trainer["attention"], trainer["memory_budget"]) == (
            "single",
            "eager",
            devices.GIB // 2,
        )
        assert after["config"] == {**before["config"], **changes}
        assert after["sizes"] == {**before["sizes"], "memory_budget_gib": 0.5}
        late: list[dict[str, Any]] = [{"trainer_layout": "padded"}, {"trainer_attn": "sdpa"}]
        for change in late:
            with pytest.raises(UsageError, match=r"cannot change any more: hf-bfloat16-cast has finished without it\."):
                mismatch_probe.Run.open(tmp_path / "run").resume(**change)
        assert manifest(tmp_path / "run") == after

    def test_the_rollout_engine_until_a_rollout_is_finished(
        self, scripted_model: MakeModel, compare: Compare, tmp_path: Path
    ) -> None:
        with pytest.raises(TableError, match="Nothing can be compared"):
            compare(scripted_model(faults={"rollout-bfloat16": "memory-generate"}))
        before = manifest(tmp_path / "run")
        scripted_model()
        assert mismatch_probe.Run.open(tmp_path / "run").resume(**self.ROLLOUT_CHANGES).complete
        after = manifest(tmp_path / "run")
        rollout = after["passes"][BF16]["engine"]
        assert (rollout["max_num_seqs"], rollout["arguments"]) == (2, {"block_size": 32})
        assert after["config"] == {**before["config"], **self.ROLLOUT_CHANGES}
        assert after["sizes"] == {**before["sizes"], "rollout_batch": 2}

    @pytest.mark.parametrize("change", ROLLOUT_CHANGES)
    def test_a_finished_rollout_fixes_its_engine(self, run_copy: Path, change: str) -> None:
        before = manifest(run_copy)
        with pytest.raises(UsageError, match=f"cannot change any more: {BF16} has finished without it"):
            mismatch_probe.Run.open(run_copy).resume(**{change: self.ROLLOUT_CHANGES[change]})
        assert manifest(run_copy) == before

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"seed": 1}, "--seed cannot be combined with --resume: a run continues as it was configured"),
            ({"model": "other"}, "--model cannot be combined with --resume"),
            ({"memory_budget_gib": 1.0, "max_tokens": 9}, "--max-tokens cannot be combined with --resume"),
            ({"memory_budget_gib": 0.0}, "--memory-budget must be above 0"),
            ({"engine_args": {"hf_token": "x"}}, "--engine-arg"),
        ],
    )
    def test_nothing_else(self, run_copy: Path, changes: dict[str, Any], sentence: str) -> None:
        before = manifest(run_copy)
        with pytest.raises(UsageError, match=sentence):
            mismatch_probe.Run.open(run_copy).resume(**changes)
        assert manifest(run_copy) == before

    def test_a_hub_id_stays_at_its_commit(self, run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The branch that the user named may have moved since."""
        run = RunDirectory.open(run_copy)
        run.manifest.config = run.manifest.config.replace(revision="main")
        run.manifest.model.revision = "c" * 40
        run.save()
        asked: list[str | None] = []

        def plan(config: CompareConfig, *rest: Any) -> Any:
            asked.append(config.revision)
            return make_plan(config.replace(revision=None), *rest)  # the scripted model is no hub id

        monkeypatch.setattr("mismatch_probe.probes.comparison.make_plan", plan)
        mismatch_probe.Run.open(run_copy).resume()
        assert asked == ["c" * 40]
        assert manifest(run_copy)["config"]["revision"] == "main"


class TestRefusals:
    def test_another_process_is_at_work(self, run_copy: Path) -> None:
        with locked(run_copy), pytest.raises(UsageError, match="Another process is using"):
            mismatch_probe.Run.open(run_copy).resume()

    def test_a_prompt_longer_than_the_context(
        self, scripted_model: MakeModel, compare: Compare, tmp_path: Path
    ) -> None:
        with pytest.raises(PromptError, match=r"has \d+ tokens; the model's context is 8"):
            compare(scripted_model(max_position_embeddings=8))
        assert manifest(tmp_path / "run")["status"] == "failed"

    @pytest.mark.parametrize(("max_tokens", "said"), [(3, 0), (4, 1)])
    def test_responses_that_may_meet_the_context(
        self, scripted_model: MakeModel, compare: Compare, tmp_path: Path, max_tokens: int, said: int
    ) -> None:
        (tmp_path / "prompts.txt").write_text("one\nfour\nfive5\n")
        counting = Counting()
        model = scripted_model(max_position_embeddings=8)
        options = {"prompts": str(tmp_path / "prompts.txt"), "num_prompts": None, "max_tokens": max_tokens}
        compare(model, recorder=counting, **options)
        sentence = "responses end at the model's context of 8 tokens, prompt included"
        assert counting.messages.count(sentence) == said

    def test_a_limit_that_applies_to_no_pair(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        config = dict(model=str(scripted_model()), **SMALL)
        with pytest.raises(UsageError, match="applies to no pair of this comparison"):
            mismatch_probe.compare(**config, out=tmp_path / "run", fail_on=["kl_k3>1@float32"])
        assert not (tmp_path / "run").exists()

    def test_a_folder_that_is_in_use(self, run_copy: Path, scripted_model: MakeModel) -> None:
        with pytest.raises(UsageError, match=r"is not empty.*--resume"):
            mismatch_probe.compare(model=str(scripted_model()), out=run_copy)

    def test_a_folder_that_is_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(TableError, match="holds no comparison"):
            mismatch_probe.Run.open(tmp_path).resume()


def test_a_new_run_is_named_after_its_model() -> None:
    assert run_folder(None, "org/a model\x1b[31m").name.startswith("a-model-31m-")
    assert run_folder(None, "/").name.startswith("model-")


def test_parts_move_to_another_folder_with_their_run(
    scripted_model: MakeModel, compare: Compare, tmp_path: Path
) -> None:
    """A run directory holds no absolute path of its own, so a half-finished one can be moved and resumed."""
    result = compare(scripted_model(faults={"rollout-float16": "die-start"}), **TWO_BY_ONE)
    moved = shutil.move(result.path, tmp_path / "moved")
    scripted_model()
    assert mismatch_probe.Run.open(moved).resume().complete
