"""Recorded sequences (`--from`), with the scripted engine: both sides, one side, masks, steps, and what is refused."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import mismatch_probe
from mismatch_probe.config import CompareConfig
from mismatch_probe.errors import DiskFull, IngestError, Interrupted, UsageError
from mismatch_probe.metrics.chunks import ExcludedValue
from mismatch_probe.metrics.groups import GROUP_KEYS, Grouping, GroupSums
from mismatch_probe.probes import recorded
from mismatch_probe.results.dump import Dump
from mismatch_probe.run import Run
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.types import PairArrays
from tests.conftest import MakeModel, Outcome, Recorder

Record = Callable[..., Path]
Compare = Callable[..., Run]
LENGTHS = (3, 1, 4, 2)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Writes a file of four sequences of two prompts; `change` edits each row."""

    def write(
        sides: tuple[str, ...] = ("rollout", "trainer"), change: Callable[[int, dict[str, Any]], None] | None = None
    ) -> Path:
        rng = np.random.default_rng(0)
        lines = []
        for index, length in enumerate(LENGTHS):
            row: dict[str, Any] = {
                "prompt_token_ids": [65 + index // 2, 66],
                "response_token_ids": rng.integers(67, 90, length).tolist(),
            }
            for side in sides:
                row[f"{side}_logprobs"] = (-rng.exponential(1, length)).tolist()
            if change is not None:
                change(index, row)
            lines.append(json.dumps(row))
        path = tmp_path / "recorded.jsonl"
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.fixture
def compare(tmp_path: Path, no_figures: None) -> Compare:
    def run(source: Path, out: str = "run", progress: Any = None, **options: Any) -> Run:
        return mismatch_probe.compare(
            source=str(source), self_noise_tokens=0, **options, out=tmp_path / out, progress=progress
        )

    return run


def pairs(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    return {(p.rollout_dtype, p.trainer_dtype): p for p in run.summary.pairs}


class TestBothSides:
    def test_they_are_compared_as_they_are(self, compare: Compare, record: Record) -> None:
        path, recorder = record(), Recorder()
        run = compare(path, progress=recorder)
        assert recorder.begun == []
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        d = np.concatenate([np.subtract(r["trainer_logprobs"], r["rollout_logprobs"]) for r in rows])
        (pair,) = run.summary.pairs
        assert pair.metrics["mean_abs_logprob_diff"].value == pytest.approx(np.abs(d).mean(), rel=1e-6)
        assert pair.metrics["kl_k1"].value == pytest.approx(-d.mean(), rel=1e-5)
        assert (pair.rollout_pass, pair.trainer_pass) == ("recorded-rollout", "recorded-trainer")
        assert (pair.on_policy, pair.n_tokens, pair.n_sequences, pair.n_prompts) == (True, 10, 4, 2)
        assert run.summary.model == f"the recorded run {path}"
        assert run.complete

    def test_the_file_is_named_and_hashed(self, compare: Compare, record: Record) -> None:
        manifest = compare(record(change=lambda i, row: row.update(extra=1))).data.manifest
        assert manifest.recorded.file.ignored_columns == ("extra",)
        assert len(manifest.recorded.file.sha256) == 64
        assert manifest.prompts.n == 2
        assert manifest.model.files is None  # no model took part, so that an audit may name one

    def test_masked_tokens_do_not_count(self, compare: Compare, record: Record) -> None:
        def mask(index: int, row: dict[str, Any]) -> None:
            row["loss_mask"] = [int(t != 1) for t in range(len(row["response_token_ids"]))]

        run = compare(record(change=mask))
        assert run.summary.pairs[0].n_tokens == 10 - 3
        assert run.data.manifest.passes["recorded-rollout"].counts["n_dropped"] == 3
        tokens = pq.read_table(run.path / "tokens.parquet").to_pandas()
        assert set(tokens["position"]) == {0, 2, 3}

    def test_steps_are_kept(self, compare: Compare, record: Record) -> None:
        path = record(change=lambda i, row: row.update(step=i % 2))
        run = compare(path)
        assert pq.read_table(run.path / "sequences.parquet")["step"].to_pylist() == [0, 1, 0, 1]
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for step in run.summary.pairs[0].groups:
            own = [r for r in rows if str(r["step"]) == step.label]
            of = [np.subtract(r["trainer_logprobs"], r["rollout_logprobs"]) for r in own]
            d = np.concatenate(of)
            assert step.n_tokens == len(d)
            assert step.metrics["mean_abs_logprob_diff"].value == pytest.approx(np.abs(d).mean(), rel=1e-6)
            assert set(step.metrics) == set(GROUP_KEYS)

    def test_long_runs_are_shown_by_a_selection_of_steps(
        self, compare: Compare, record: Record, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr("mismatch_probe.metrics.groups.MOST_GROUPS", 2)
        run = compare(record(change=lambda i, row: row.update(step=10 * i)))
        assert [step.label for step in run.summary.pairs[0].groups] == ["0", "30"]

    def test_what_is_not_finite_is_counted(self, compare: Compare, record: Record) -> None:
        def spoil(index: int, row: dict[str, Any]) -> None:
            if index == 2:
                row["trainer_logprobs"][1] = None

        (pair,) = compare(record(change=spoil)).summary.pairs
        assert pair.n_nonfinite == 1

    @pytest.mark.parametrize(
        ("value", "kind"), [(-9999.0, "sentinel"), (1.0, "sentinel"), (0.0, "sentinel"), (0.125, "positive")]
    )
    @pytest.mark.parametrize("side", ["rollout", "trainer"])
    def test_what_no_token_has_is_counted_first_and_left_out(
        self, compare: Compare, record: Record, tmp_path: Path, side: str, value: float, kind: str
    ) -> None:
        other = "trainer" if side == "rollout" else "rollout"

        def spoil(index: int, row: dict[str, Any]) -> None:
            row.update({f"{name}_logprobs": [x - 0.5 for x in row[f"{name}_logprobs"]] for name in (side, other)})
            if index == 2:
                row[f"{side}_logprobs"][3] = value

        run = compare(record(change=spoil))
        (pair,) = run.summary.pairs
        assert (pair.n_excluded, pair.n_nonfinite) == (1, 0)
        text = "> 0" if kind == "positive" else f"{value:g}"
        assert pair.excluded == (ExcludedValue(side, kind, text, 1),)
        rows = [json.loads(line) for line in (tmp_path / "recorded.jsonl").read_text().splitlines()]
        d = np.concatenate([np.subtract(r["trainer_logprobs"], r["rollout_logprobs"]) for r in rows])
        kept = np.delete(d, 3 + 1 + 3)
        mean = pair.metrics["mean_abs_logprob_diff"]
        assert mean.value == pytest.approx(np.abs(kept).mean(), rel=1e-6)
        assert mean.why.startswith("computed over the 9 of 10 tokens")
        assert pair.metrics["seq_log_ratio_mean"].why.startswith("computed over the 3 of 4 sequences")
        assert pair.mean_abs_logprob_diff_all_finite == pytest.approx(np.abs(d).mean(), rel=1e-6)
        first = run.summary.findings[0]
        assert (first.code, first.names("excluded")) == ("excluded-tokens", (f"{side} {text} 1",))
        tokens = pq.read_table(run.path / "tokens.parquet").to_pandas()
        own = tokens[tokens["pass_id"] == f"recorded-{side}"]["logprob"]
        assert own.iloc[7] == np.float32(value)

    def test_a_pair_with_a_placeholder_cannot_pass(
        self, command: Callable[..., Outcome], no_figures: None, record: Record, tmp_path: Path
    ) -> None:
        """Through the command line: exit 3 though no metric is beyond the limit, and 0 once the token is masked."""

        def spoil(index: int, row: dict[str, Any]) -> None:
            row["rollout_logprobs"][0] = -9999.0 if index == 2 else row["rollout_logprobs"][0]

        def mask(index: int, row: dict[str, Any]) -> None:
            spoil(index, row)
            row["loss_mask"] = [int(not (index == 2 and t == 0)) for t in range(len(row["response_token_ids"]))]

        for name, change, code in (("spoiled", spoil, 3), ("masked", mask, 0)):
            limit = ("--out", tmp_path / name, "--fail-on", "kl_k3>1e9", "--json")
            ended = command("compare", "--from", record(change=change), *limit)
            assert ended.code == code
            (row,) = json.loads(ended.out)["limits"]
            assert row["verdict"] == ("inconclusive" if code else "ok")
            assert ("1 of 10 tokens have no usable log-probs" in row["why"]) == bool(code)

    def test_limits_apply(self, tmp_path: Path, no_figures: None, record: Record) -> None:
        config = {"source": str(record())}
        run = mismatch_probe.compare(**config, out=tmp_path / "run", fail_on=["kl_k3>1e-9@recorded"])
        assert run.exceeded
        with pytest.raises(UsageError, match="applies to no pair"):
            mismatch_probe.compare(**config, out=tmp_path / "other", fail_on=["kl_k3>1e-9@bf16"])

    def test_it_is_reported_and_resumed_without_engines(self, compare: Compare, record: Record) -> None:
        run = compare(record())
        assert mismatch_probe.Run.open(run.path).report().summary == run.summary
        assert mismatch_probe.Run.open(run.path).resume().summary == run.summary

    def test_a_finished_run_is_a_source_as_a_file_is(self, compare: Compare, record: Record) -> None:
        run = compare(record())
        again = mismatch_probe.compare(source=str(run.path))
        assert (again.path, again.summary) == (run.path, run.summary)
        with pytest.raises(UsageError, match="cannot be combined with --from RUN"):
            compare(run.path, out="new")
        with pytest.raises(UsageError, match="cannot be combined with --from RUN"):
            mismatch_probe.compare(source=str(run.path), model="m")

    def test_an_audit_takes_a_file_too(self, command: Any, record: Record, tmp_path: Path) -> None:
        ended = command("audit", "--from", record(), "--out", tmp_path / "run")
        assert (ended.code, "names no model to measure" in ended.err) == (2, True)
        assert command("audit", "--from", tmp_path / "run", "--json").out.startswith("{")

    def test_rescoring_puts_a_trainer_beside_the_recorded_one(
        self, compare: Compare, record: Record, scripted_model: MakeModel
    ) -> None:
        run = compare(record(), model=str(scripted_model()), rescore=True, trainer_dtypes=("float32",))
        assert set(pairs(run)) == {("recorded", "recorded"), ("recorded", "float32")}
        assert pairs(run)["recorded", "recorded"].budget["trainer_error_rms"].value > 0

    def test_next_to_nothing_has_a_report(self, record: Record, tmp_path: Path) -> None:
        def same(index: int, row: dict[str, Any]) -> None:
            row["trainer_logprobs"] = row["rollout_logprobs"]

        run = mismatch_probe.compare(source=str(record(change=same)), out=tmp_path / "run")
        assert (run.path / "report.html").exists()

    def test_interrupted_between_its_two_passes(
        self, compare: Compare, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = RunDirectory.finish_pass

        def stop(self: RunDirectory, pass_id: str, *rest: Any) -> None:
            if pass_id == "recorded-trainer":
                raise KeyboardInterrupt
            real(self, pass_id, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "finish_pass", stop)
            with pytest.raises(Interrupted):
                compare(record())
        assert mismatch_probe.Run.open(tmp_path / "run").resume().complete

    def test_steps_keep_sums_for_their_own_prompts_only(self) -> None:
        n = 400
        names = tuple(map(str, range(n)))
        pair = PairArrays(
            np.full(n, -1.0),
            np.full(n, -1.1),
            np.arange(n),
            np.zeros(n, np.int64),
            np.arange(n),
            names,
        )
        sums = GroupSums([Grouping("step", np.arange(n) // 8)])
        sums.update(pair)
        assert {kept.n_prompts for kept in sums._parts[0]._sums.values()} == {8}
        assert [result.n_tokens for result in sums.results()] == [8] * 50


class TestOneSide:
    def test_a_rollout_is_scored_by_every_trainer(
        self, compare: Compare, record: Record, scripted_model: MakeModel
    ) -> None:
        recorder = Recorder()
        run = compare(record(("rollout",)), model=str(scripted_model()), progress=recorder)
        assert recorder.begun == ["encode", "hf-bfloat16-cast", "hf-float16-cast", "hf-float32-cast"]
        assert set(pairs(run)) == {("recorded", dtype) for dtype in ("bfloat16", "float16", "float32")}
        assert all(pair.on_policy for pair in run.summary.pairs)
        assert {t.pair for t in run.data.worst_tokens} == {
            f"recorded → {d}" for d in ("bfloat16", "float16", "float32")
        }
        assert all(token.token_text for token in run.data.worst_tokens)

    def test_replayed_on_request(self, compare: Compare, record: Record, scripted_model: MakeModel) -> None:
        options = {"rollout_dtypes": ("float16", "float32"), "trainer_dtypes": ("float32",), "exact_kl": "all"}
        run = compare(record(("rollout",)), model=str(scripted_model(vocab_size=90)), replay=True, **options)
        found = pairs(run)
        assert set(found) == {("recorded", "float32"), ("float16", "float32"), ("float32", "float32")}
        assert found["float16", "float32"].on_policy is False
        assert found["float16", "float32"].metrics["kl_exact"].value > 0
        assert found["recorded", "float32"].metrics["kl_exact"].value is None

    def test_a_masked_replay_counts_the_same_tokens(
        self, compare: Compare, record: Record, scripted_model: MakeModel
    ) -> None:
        def mask(index: int, row: dict[str, Any]) -> None:
            row["loss_mask"] = [int(t % 2 == 0) for t in range(len(row["response_token_ids"]))]

        options = {"rollout_dtypes": ("float16",), "trainer_dtypes": ("float32",), "exact_kl": "all"}
        path = record(("rollout",), mask)
        run = compare(path, model=str(scripted_model(vocab_size=90)), replay=True, **options)
        assert {pair.n_tokens for pair in run.summary.pairs} == {6}
        assert pq.read_table(run.path / "exact.parquet").num_rows == 6

    def test_a_trainer_alone_needs_a_replay(self, compare: Compare, record: Record, scripted_model: MakeModel) -> None:
        path, model = record(("trainer",)), str(scripted_model())
        with pytest.raises(UsageError, match=r"holds no rollout_logprobs.*Add --replay"):
            compare(path, model=model)
        run = compare(path, model=model, replay=True, rollout_dtypes=("float32",))
        assert set(pairs(run)) == {("float32", "recorded")}


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"prompts": "x.txt"}, "--prompts cannot be combined with --from"),
            ({"chat": True}, "--chat cannot be combined with --from"),
            ({"samples_per_prompt": 2}, "--samples-per-prompt cannot be combined with --from"),
            ({"max_tokens": 2}, "--max-tokens cannot be combined with --from"),
            ({"sequences": "shared"}, "--sequences cannot be combined with --from"),
        ],
    )
    def test_options_that_make_no_sense(self, options: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UsageError, match=sentence):
            CompareConfig(source="x.jsonl", **options)

    @pytest.mark.parametrize("name", ["replay", "rescore"])
    def test_options_that_need_a_file(self, name: str) -> None:
        with pytest.raises(UsageError, match=f"--{name} needs recorded sequences"):
            CompareConfig(**{name: True})

    @pytest.mark.parametrize(
        ("change", "script", "sentence"),
        [
            (lambda i, row: row.update(prompt_token_ids=[]), {}, "Row 1 .* has an empty prompt"),
            (lambda i, row: row.update(prompt_token_ids=[5, 70 + i]), {"vocab_size": 72}, "is outside 0 to 71"),
            (lambda i, row: None, {"max_position_embeddings": 5}, r"Row 3 .* has 6 tokens; the context .* is 5"),
        ],
    )
    def test_sequences_that_the_model_cannot_have_made(
        self,
        compare: Compare,
        record: Record,
        scripted_model: MakeModel,
        change: Any,
        script: dict[str, Any],
        sentence: str,
    ) -> None:
        with pytest.raises(IngestError, match=sentence):
            compare(record(("rollout",), change), model=str(scripted_model(**script)))

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"exact_kl": 5}, "--exact-kl needs rows of logits, and a file brings none. Add --replay"),
            ({"reference": "float64"}, "--reference float64 needs a trainer engine.*--rescore"),
            ({"temperature": 0.7}, "--temperature needs a trainer engine.*--rescore"),
        ],
    )
    def test_options_that_could_do_nothing(
        self, compare: Compare, record: Record, options: dict[str, Any], sentence: str
    ) -> None:
        with pytest.raises(UsageError, match=sentence):
            compare(record(), **options)

    def test_a_model_nobody_named(self, compare: Compare, record: Record) -> None:
        with pytest.raises(UsageError, match=r"needs the model that sampled them.*--model"):
            compare(record(("rollout",)))


def hidden(folder: Path) -> list[Path]:
    """Scratch folders that are left over."""
    gc.collect()
    return list(folder.glob(".mismatch-probe-*"))


class TestIngested:
    def test_a_folder_of_ingest_is_compared_as_its_dump_is(
        self, compare: Compare, record: Record, tmp_path: Path
    ) -> None:
        path = record(change=lambda i, row: row.update(loss_mask=[1] * LENGTHS[i], step=i // 2))
        found = mismatch_probe.read_dump(path, out=tmp_path / "dump")
        assert {one.name for one in found.path.iterdir()} >= {"recorded.parquet", "recorded.json", "report.html"}
        assert Dump.read(found.path / "recorded.json") == found.document
        direct = compare(path, "direct")
        path.unlink()
        run = compare(found.path)
        assert run.summary.pairs == direct.summary.pairs
        assert run.data.manifest.recorded == direct.data.manifest.recorded == found.document.recorded
        shutil.rmtree(found.path)
        assert mismatch_probe.Run.open(run.path).resume().summary == run.summary
        assert hidden(tmp_path) == []

    def test_a_folder_of_steps(self, compare: Compare, record: Record, tmp_path: Path) -> None:
        (tmp_path / "dump").mkdir()
        for step in (2, 10):
            record(change=lambda i, row, step=step: row.update(step=step)).rename(tmp_path / f"dump/{step}.jsonl")
        run = compare(tmp_path / "dump")
        assert pq.read_table(run.path / "sequences.parquet")["step"].to_pylist() == [2] * 4 + [10] * 4
        assert run.data.manifest.recorded.file.n_files == 2

    def test_columns_of_other_names(self, compare: Compare, record: Record) -> None:
        def rename(index: int, row: dict[str, Any]) -> None:
            row["behaviour"] = row.pop("rollout_logprobs")

        run = compare(record(change=rename), dump_map=("behaviour=rollout_logprobs",))
        assert set(pairs(run)) == {("recorded", "recorded")}
        assert mismatch_probe.Run.open(run.path).resume().complete

    def test_ids_alone_are_replayed(
        self, compare: Compare, record: Record, scripted_model: MakeModel, tmp_path: Path
    ) -> None:
        path, model = record(()), str(scripted_model(vocab_size=90))
        with pytest.raises(UsageError, match="Add --replay"):
            compare(path, model=model)
        assert hidden(tmp_path) == []
        options = {"rollout_dtypes": ("float32",), "trainer_dtypes": ("float32",)}
        run = compare(path, model=model, replay=True, **options)
        (pair,) = run.summary.pairs
        assert (pair.rollout_pass, pair.n_tokens, pair.n_nonfinite) == ("vllm-float32-replay", sum(LENGTHS), 0)
        assert run.complete

    def test_columns_that_may_hold_them_are_named(self, compare: Compare, record: Record) -> None:
        def rename(index: int, row: dict[str, Any]) -> None:
            row["behaviour"] = [-1.0] * LENGTHS[index]

        with pytest.raises(UsageError, match="--map: not read are behaviour"):
            compare(record((), rename))

    def test_ids_beyond_the_vocabulary(
        self, compare: Compare, record: Record, scripted_model: MakeModel, tmp_path: Path
    ) -> None:
        """A dump is read for a model, whose rows of other ids are left out; a folder of `ingest` is taken as it is."""

        def one(index: int, row: dict[str, Any]) -> None:
            row["response_token_ids"] = [70 + index] * LENGTHS[index]

        path, model = record(("rollout",), one), str(scripted_model(vocab_size=73))
        run = compare(path, model=model, trainer_dtypes=("float32",))
        assert (run.data.manifest.recorded.file.n_left_out, run.summary.pairs[0].n_sequences) == (1, 3)
        found = mismatch_probe.read_dump(path, out=tmp_path / "dump")
        with pytest.raises(IngestError, match=r"Row 4 of .* has an id beyond the vocabulary of .* \(73\)"):
            compare(found.path, "other", model=model)

    def test_a_run_has_its_own_copy(self, compare: Compare, record: Record) -> None:
        path = record()
        run = compare(path)
        record(change=lambda i, row: row.update(step=1))
        assert mismatch_probe.Run.open(run.path).resume().summary == run.summary
        path.unlink()
        assert mismatch_probe.Run.open(run.path).resume().summary == run.summary

    def test_an_interrupted_run_goes_on_without_its_dump(
        self, compare: Compare, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = record()
        with monkeypatch.context() as patch:
            patch.setattr("mismatch_probe.probes.compare.store_recorded", interrupt)
            with pytest.raises(Interrupted):
                compare(path)
        path.unlink()
        assert mismatch_probe.Run.open(tmp_path / "run").resume().complete

    def test_without_copy_and_dump_it_cannot(self, compare: Compare, record: Record) -> None:
        path = record()
        run = compare(path)
        (run.path / "recorded.parquet").unlink()
        record(change=lambda i, row: row.update(step=1))
        with pytest.raises(mismatch_probe.ProbeError, match="have changed since this run began"):
            mismatch_probe.Run.open(run.path).resume()
        path.unlink()
        with pytest.raises(IngestError, match="does not exist"):
            mismatch_probe.Run.open(run.path).resume()

    def test_it_is_copied_where_it_cannot_be_linked(
        self, compare: Compare, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def other_disk(*_: Any) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        found = mismatch_probe.read_dump(record(), out=tmp_path / "dump")
        monkeypatch.setattr(os, "link", other_disk)
        run = compare(found.path)
        kept = run.path / "recorded.parquet"
        assert kept.read_bytes() == (found.path / "recorded.parquet").read_bytes()
        assert not kept.samefile(found.path / "recorded.parquet")

    def test_a_folder_that_is_not_empty(self, record: Record, tmp_path: Path) -> None:
        (tmp_path / "dump").mkdir()
        mismatch_probe.read_dump(record(), out=tmp_path / "dump")
        with pytest.raises(UsageError, match="is not empty"):
            mismatch_probe.read_dump(record(), out=tmp_path / "dump")
        assert hidden(tmp_path) == []

    def test_a_folder_that_was_filled_while_the_dump_was_read(
        self, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = recorded.read_dump

        def meanwhile(*arguments: Any) -> Any:
            (tmp_path / "dump").mkdir()
            (tmp_path / "dump" / "recorded.parquet").write_bytes(b"mine")
            return real(*arguments)

        monkeypatch.setattr(recorded, "read_dump", meanwhile)
        with pytest.raises(UsageError, match="is not empty"):
            mismatch_probe.read_dump(record(), out=tmp_path / "dump")
        assert (tmp_path / "dump" / "recorded.parquet").read_bytes() == b"mine"
        assert hidden(tmp_path) == []

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
    @pytest.mark.parametrize("compared", [True, False])
    def test_nothing_is_left_of_a_reading_that_ends_early(
        self,
        compare: Compare,
        record: Record,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: BaseException,
        compared: bool,
    ) -> None:
        def early(*_: Any, **__: Any) -> None:
            raise error

        path = record()
        monkeypatch.setattr(pq.ParquetWriter, "write_table", early)
        wanted = DiskFull if isinstance(error, OSError) else (KeyboardInterrupt, Interrupted)
        with pytest.raises(wanted):
            compare(path) if compared else mismatch_probe.read_dump(path, out=tmp_path / "run")
        assert {one.name for one in tmp_path.iterdir()} == {path.name}

    def test_nor_of_a_dump_that_cannot_be_read(self, compare: Compare, record: Record, tmp_path: Path) -> None:
        path = record()
        path.write_text("{")
        with pytest.raises(IngestError):
            compare(path)
        with pytest.raises(IngestError):
            mismatch_probe.read_dump(path, out=tmp_path / "run")
        assert {one.name for one in tmp_path.iterdir()} == {path.name}

    def test_nor_of_a_plan(self, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert mismatch_probe.plan(source=str(record())).sizes.num_prompts == 2
        assert hidden(tmp_path) == []


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
