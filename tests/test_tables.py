"""Nothing is ever half-written, nothing is read that is not whole, and every fault of a file is a sentence."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe import tables
from mismatch_probe.errors import DiskFull, TableError, UsageError
from mismatch_probe.files import locked
from mismatch_probe.results.manifest import Manifest
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.schemas import sequences_table, tokens_table
from mismatch_probe.types import Rollout, RolloutRequest, Score
from tests.factories.manifest import make_manifest, make_pass

ROLLOUT, TRAINER = "vllm-bfloat16-decode", "hf-bfloat16-cast"


def rollout_tables(pass_id: str = ROLLOUT, first: int = 0, count: int = 3) -> tuple[pa.Table, pa.Table]:
    """Sequences and tokens of `count` responses of 1, 2, … tokens."""
    requests = [RolloutRequest(first + i, [100 + i], i) for i in range(count)]
    rollouts = [
        Rollout(first + i, list(range(i + 1)), [-0.5 * (t + 1) for t in range(i + 1)], "length", "x" * (i + 1))
        for i in range(count)
    ]
    sequences = sequences_table(pass_id, requests, rollouts, [f"p{i}" for i in range(count)], [0] * count)
    return sequences, tokens_table(pass_id, rollouts, lambda r: r.response_token_ids, lambda token: f"<{token}>")


def trainer_tokens(pass_id: str = TRAINER, count: int = 3) -> pa.Table:
    scores = [Score(i, [-1.0] * (i + 1)) for i in range(count)]
    return tokens_table(pass_id, scores, lambda score: list(range(score.sequence_id + 1)))


def run_with_two_passes(folder: Path) -> RunDirectory:
    run = RunDirectory.create(folder / "run", make_manifest())
    sequences, tokens = rollout_tables()
    run.finish_pass(ROLLOUT, make_pass(), {"tokens": tokens, "sequences": sequences})
    run.finish_pass(TRAINER, make_pass(covers=(ROLLOUT,)), {"tokens": trainer_tokens()})
    return run


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


class TestSchema:
    """Foreign readers rely on these columns."""

    def test_sequences(self, tmp_path: Path) -> None:
        run = run_with_two_passes(tmp_path)
        run.merge()
        schema = pq.read_schema(run.path / "sequences.parquet")
        assert schema.names == [
            "sequence_id",
            "prompt_id",
            "sample_id",
            "rollout_pass",
            "prompt_token_ids",
            "response_token_ids",
            "finish_reason",
            "text",
            "step",
        ]
        for name in ("prompt_id", "rollout_pass", "finish_reason"):
            assert pa.types.is_dictionary(schema.field(name).type)

    def test_tokens(self, tmp_path: Path) -> None:
        run = run_with_two_passes(tmp_path)
        run.merge()
        schema = pq.read_schema(run.path / "tokens.parquet")
        assert schema.names[:5] == ["sequence_id", "position", "token_id", "pass_id", "logprob"]
        assert schema.field("logprob").type == pa.float32()
        assert pa.types.is_dictionary(schema.field("pass_id").type)

    def test_row_groups_hold_one_pass_each_sorted_by_sequence_and_position(self, tmp_path: Path) -> None:
        run = run_with_two_passes(tmp_path)
        run.merge()
        file = pq.ParquetFile(run.path / "tokens.parquet")
        groups = [file.read_row_group(i) for i in range(file.num_row_groups)]
        assert [set(group["pass_id"].to_pylist()) for group in groups] == [{ROLLOUT}, {TRAINER}]
        for group in groups:
            keys = list(zip(group["sequence_id"].to_pylist(), group["position"].to_pylist(), strict=True))
            assert keys == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]

    def test_pandas_reads_it(self, tmp_path: Path) -> None:
        pandas = pytest.importorskip("pandas")
        run = run_with_two_passes(tmp_path)
        run.merge()
        frame = pandas.read_parquet(run.path / "tokens.parquet")
        assert frame.groupby("pass_id", observed=True)["logprob"].sum().to_dict() == {ROLLOUT: -5.0, TRAINER: -6.0}


class TestStreams:
    def parts(self, table: pa.Table, size: int) -> Iterator[pa.Table]:
        return (table.slice(start, size) for start in range(0, table.num_rows, size))

    @pytest.mark.parametrize("size", [1, 2, 100])
    def test_a_pass_in_parts_is_the_pass(self, tmp_path: Path, size: int) -> None:
        whole, streamed = run_with_two_passes(tmp_path), RunDirectory.create(tmp_path / "parts", make_manifest())
        sequences, tokens = rollout_tables()
        record = make_pass()
        streamed.finish_pass(
            ROLLOUT, record, {"tokens": self.parts(tokens, size), "sequences": self.parts(sequences, size)}
        )
        assert record.rows == {"tokens": 6, "sequences": 3}
        assert streamed.tokens(ROLLOUT).equals(whole.tokens(ROLLOUT))
        assert streamed.sequences(ROLLOUT).equals(whole.sequences(ROLLOUT))
        assert sorted(one.name for one in (streamed.path / "passes").iterdir()) == [
            f"{ROLLOUT}.sequences.3.parquet",
            f"{ROLLOUT}.tokens.6.parquet",
        ]

    def test_parts_that_end_early_leave_nothing(self, tmp_path: Path) -> None:
        def broken() -> Iterator[pa.Table]:
            yield rollout_tables()[1]
            raise KeyboardInterrupt

        run = RunDirectory.create(tmp_path / "run", make_manifest())
        with pytest.raises(KeyboardInterrupt):
            run.finish_pass(ROLLOUT, make_pass(), {"tokens": broken()})
        assert not run.finished(ROLLOUT)
        assert list((run.path / "passes").iterdir()) == []

    @pytest.mark.parametrize(("rows", "groups"), [(1, 12), (4, 4), (100, 2)])
    def test_row_groups_of_a_merged_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, groups: int
    ) -> None:
        """A row group holds one pass, and about so many rows of it."""
        monkeypatch.setattr(tables, "_BATCH_ROWS", 1)
        monkeypatch.setattr(tables, "_GROUP_ROWS", rows)
        run = run_with_two_passes(tmp_path)
        before = {name: run.tokens(name) for name in (ROLLOUT, TRAINER)}
        run.merge()
        with pq.ParquetFile(run.path / "tokens.parquet") as file:
            assert file.num_row_groups == groups
            assert all(len(set(file.read_row_group(i)["pass_id"].to_pylist())) == 1 for i in range(groups))
        for name, table in before.items():
            assert run.tokens(name).equals(table)
            assert pa.concat_tables(run.iter_tokens(name, table.column_names)).to_pylist() == table.to_pylist()


class TestTokensTable:
    def test_sequences_may_come_in_any_order(self) -> None:
        scores = [Score(2, [-3.0]), Score(0, [-1.0, -2.0])]
        table = tokens_table("p", scores, lambda score: [7] * len(score.logprobs))
        assert table["sequence_id"].to_pylist() == [0, 0, 2]
        assert table["logprob"].to_pylist() == [-1.0, -2.0, -3.0]

    def test_an_engine_that_returns_too_few_values_is_caught(self) -> None:
        with pytest.raises(TableError, match="2 log-probs for the 3 tokens of sequence 5"):
            tokens_table("p", [Score(5, [-1.0, -1.0])], lambda _: [1, 2, 3])

    def test_arrays_do_as_well_as_lists(self) -> None:
        ids, logprobs = [[5, 6], [], [7]], [[-1.5, -2.25], [], [-0.1]]
        requests = [RolloutRequest(i, [100], i) for i in range(3)]
        lists = [Rollout(i, ids[i], logprobs[i], "length") for i in range(3)]
        arrays = [
            Rollout(i, np.array(ids[i], dtype=np.int32), np.array(logprobs[i], dtype=np.float32), "length")
            for i in range(3)
        ]
        both = [sequences_table("p", requests, rollouts, ["a", "b", "c"], [0] * 3) for rollouts in (lists, arrays)]
        assert both[0].equals(both[1])
        assert both[1]["response_token_ids"].to_pylist() == ids
        of_lists, of_arrays = (tokens_table("p", rows, lambda r: r.response_token_ids) for rows in (lists, arrays))
        of_scores = tokens_table("p", [Score(r.sequence_id, r.logprobs) for r in arrays], lambda s: ids[s.sequence_id])
        assert of_lists.equals(of_arrays)
        assert of_lists.equals(of_scores)
        assert of_arrays["logprob"].to_pylist() == [-1.5, -2.25, float(np.float32(-0.1))]

    def test_no_sequence_and_empty_ones(self) -> None:
        assert tokens_table("p", [], lambda _: []).num_rows == 0
        assert tokens_table("p", [Score(0, []), Score(1, [-1.0])], lambda s: [1] * len(s.logprobs)).num_rows == 1

    @settings(max_examples=15, deadline=None)
    @given(
        st.dictionaries(
            st.integers(0, 2**40),
            st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(width=32)), max_size=6),
            max_size=5,
        )
    )
    def test_what_is_written_is_read_bit_for_bit(self, responses: dict[int, list[tuple[int, float]]]) -> None:
        scores = [Score(key, [value for _, value in rows]) for key, rows in responses.items()]
        table = tokens_table("p", scores, lambda s: [token for token, _ in responses[s.sequence_id]], chr_or_none)
        with tempfile.TemporaryDirectory() as folder:
            run = RunDirectory.create(Path(folder) / "run", make_manifest())
            run.finish_pass("p", make_pass(), {"tokens": table})
            part = RunDirectory.open(run.path).tokens("p")
            run.merge()
            merged = RunDirectory.open(run.path).tokens("p")
        flat = [(key, i, *row) for key in sorted(responses) for i, row in enumerate(responses[key])]
        for found in (part, merged):
            assert found.schema == tables.TOKENS_SCHEMA
            names = ("sequence_id", "position", "token_id")
            assert list(zip(*(found[name].to_pylist() for name in names), strict=True)) == [row[:3] for row in flat]
            expected = np.array([row[3] for row in flat], dtype=np.float32)
            np.testing.assert_array_equal(found["logprob"].to_numpy(), expected)
            assert found["token_text"].to_pylist() == [chr_or_none(row[2]) for row in flat]


def chr_or_none(token: int) -> str | None:
    return chr(token) if token < 0xD800 else None


class TestAtomicity:
    def test_a_parquet_write_that_fails_midway_leaves_the_old_file(self, tmp_path: Path) -> None:
        run = run_with_two_passes(tmp_path)
        run.merge()
        before = (run.path / "tokens.parquet").read_bytes()
        run.finish_pass("late", make_pass(), {"tokens": trainer_tokens("late")})
        (run.path / "passes" / "late.tokens.6.parquet").write_bytes(b"broken")
        with pytest.raises(TableError, match="corrupt"):
            run.merge()
        assert (run.path / "tokens.parquet").read_bytes() == before
        assert not leftovers(run.path)

    def test_a_disk_that_fills_up_inside_a_parquet_writer(self, tmp_path: Path) -> None:
        run = run_with_two_passes(tmp_path)
        finished = run.finished_passes()

        class Full(pq.ParquetWriter):  # type: ignore[misc]
            def write_table(self, *_: Any, **__: Any) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pq, "ParquetWriter", Full)
            with pytest.raises(DiskFull):
                run.finish_pass("late", make_pass(), {"tokens": trainer_tokens("late")})
        again = RunDirectory.open(run.path)
        assert again.finished_passes() == finished
        assert not leftovers(run.path)
        again.merge()
        assert again.tokens(TRAINER).num_rows == 6


class TestDamage:
    """Every way a file can be broken gets a sentence that names the file."""

    @pytest.fixture
    def merged(self, tmp_path: Path) -> RunDirectory:
        run = run_with_two_passes(tmp_path)
        run.merge()
        return run

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda p: p.write_bytes(p.read_bytes()[:-200]), "tokens.parquet is corrupt or truncated"),
            (lambda p: p.write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1"), "tokens.parquet is corrupt or truncated"),
            (lambda p: p.write_bytes(b""), "tokens.parquet is corrupt or truncated"),
            (lambda p: p.unlink(), "tokens.parquet does not exist"),
            (lambda p: rewrite(p, lambda t: t.drop_columns("logprob")), "has no column logprob"),
            (lambda p: rewrite(p, lambda t: t.drop_columns("pass_id")), "tokens.parquet is corrupt or truncated"),
            (lambda p: rewrite(p, mistyped), "tokens.parquet is corrupt or truncated"),
            (lambda p: rewrite(p, lambda t: t.slice(1)), "has 5 tokens on disk; the manifest says 6"),
            (lambda p: rewrite(p, lambda t: pa.concat_tables([t, t])), "has 12 tokens on disk; the manifest says 6"),
        ],
        ids=["cut", "garbage", "empty", "gone", "no-logprob", "no-pass", "type", "short", "long"],
    )
    def test_tokens(self, merged: RunDirectory, damage: Callable[[Path], None], sentence: str) -> None:
        damage(merged.path / "tokens.parquet")
        with pytest.raises(TableError, match=sentence) as caught:
            merged.tokens(ROLLOUT)
        assert "run the comparison again" in caught.value.fix

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda p: p.unlink(), "sequences.parquet does not exist"),
            (lambda p: rewrite(p, lambda t: t.slice(1)), "has 2 sequences on disk; the manifest says 3"),
        ],
    )
    def test_sequences(self, merged: RunDirectory, damage: Callable[[Path], None], sentence: str) -> None:
        damage(merged.path / "sequences.parquet")
        with pytest.raises(TableError, match=sentence):
            merged.sequences(ROLLOUT)

    def test_a_part_that_is_gone_is_missed_by_the_merge(self, tmp_path: Path) -> None:
        run = run_with_two_passes(tmp_path)
        (run.path / "passes" / f"{ROLLOUT}.sequences.3.parquet").unlink()
        with pytest.raises(TableError, match=r"sequences\.parquet does not exist"):
            run.merge()

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("not json", "cannot be read as JSON"),
            ("", "cannot be read as JSON"),
            ("[" * 100_000, "cannot be read as JSON"),
            ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "cannot be read as JSON"),
            ("[1, 2]", "no schema version"),
            ('{"schema_version": 4}', "schema 4"),
            ('{"schema_version": 2, "status": "complete"}', "tool_version: field required"),
        ],
    )
    def test_manifest(self, merged: RunDirectory, text: str, sentence: str) -> None:
        (merged.path / "manifest.json").write_text(text)
        with pytest.raises(TableError, match=sentence):
            RunDirectory.open(merged.path)

    def test_a_folder_without_a_manifest_is_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(TableError, match="holds no comparison"):
            RunDirectory.open(tmp_path)

    def test_a_json_file_that_cannot_be_opened(self, tmp_path: Path) -> None:
        with pytest.raises(TableError, match="cannot be read as JSON"):
            Manifest.read(tmp_path)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def mistyped(table: pa.Table) -> pa.Table:
    return table.set_column(table.schema.get_field_index("logprob"), "logprob", pa.array(["x"] * table.num_rows))


class TestRunDirectory:
    def test_a_new_run_needs_an_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        RunDirectory.create(tmp_path / "empty", make_manifest())
        with pytest.raises(UsageError, match="is not empty"):
            RunDirectory.create(tmp_path / "empty", make_manifest())

    def test_a_lock_does_not_fill_a_folder(self, tmp_path: Path) -> None:
        with locked(tmp_path / "run"):
            RunDirectory.create(tmp_path / "run", make_manifest())

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match=r"cannot be used as a run folder \(Not a directory\)"):
            RunDirectory.create(tmp_path / "file", make_manifest())

    def test_a_name_too_long_is_a_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="File name too long"):
            RunDirectory.create(tmp_path / ("x" * 5000), make_manifest())

    def test_passes_survive_a_restart(self, tmp_path: Path) -> None:
        run = run_with_two_passes(tmp_path)
        again = RunDirectory.open(run.path)
        assert again.finished_passes() == [ROLLOUT, TRAINER]
        assert again.tokens(ROLLOUT).equals(rollout_tables()[1])
        assert again.sequences(ROLLOUT).equals(rollout_tables()[0])

    def test_merging_drops_the_parts_and_changes_no_row(self, tmp_path: Path) -> None:
        run = run_with_two_passes(tmp_path)
        run.merge()
        assert not (run.path / "passes").exists()
        assert run.tokens(TRAINER).to_pylist() == trainer_tokens().to_pylist()
        run.merge()
        assert run.sequences(ROLLOUT).to_pylist() == rollout_tables()[0].to_pylist()

    def test_merging_again_after_a_pass_was_missing(self, tmp_path: Path) -> None:
        run = run_with_two_passes(tmp_path)
        run.merge()
        other = "vllm-float16-decode"
        sequences, tokens = rollout_tables(other, first=10)
        run = RunDirectory.open(run.path)
        run.finish_pass(other, make_pass(), {"tokens": tokens, "sequences": sequences})
        # The trainer's pass is stored again, with the new sequences added: its part has to win over its merged rows.
        run.finish_pass(TRAINER, make_pass(), {"tokens": trainer_tokens(count=2)})
        run.merge()
        assert [run.tokens(name).num_rows for name in (ROLLOUT, TRAINER, other)] == [6, 3, 6]
        assert run.sequences(other).to_pylist() == sequences.to_pylist()
        assert run.sequences(ROLLOUT).num_rows == 3
        assert not (run.path / "passes").exists()

    @pytest.mark.parametrize("merged", [True, False])
    def test_a_kill_between_an_extended_pass_and_the_manifest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merged: bool
    ) -> None:
        """The manifest still says which rows are valid, wherever they lie."""
        run = run_with_two_passes(tmp_path)
        if merged:
            run.merge()

        class Killed(BaseException):
            pass

        def kill(_: RunDirectory) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "save", kill)
            with pytest.raises(Killed):
                run.finish_pass(TRAINER, make_pass(covers=(ROLLOUT, "more")), {"tokens": trainer_tokens(count=4)})
        assert (run.path / "passes" / f"{TRAINER}.tokens.10.parquet").exists()
        again = RunDirectory.open(run.path)
        assert again.tokens(TRAINER).to_pylist() == trainer_tokens().to_pylist()
        again.finish_pass(TRAINER, make_pass(covers=(ROLLOUT, "more")), {"tokens": trainer_tokens(count=4)})
        again.merge()
        assert again.tokens(TRAINER).to_pylist() == trainer_tokens(count=4).to_pylist()
        assert not (again.path / "passes").exists()

    def test_what_a_killed_process_left_does_not_stop_a_merge(self, tmp_path: Path) -> None:
        run = run_with_two_passes(tmp_path)
        (run.path / "passes" / ".hf-float16-cast.tokens.parquet.1.tmp").write_bytes(b"half")
        (run.path / "passes" / "hf-float16-cast.tokens.parquet").write_bytes(b"its manifest was never saved")
        run.merge()
        assert not (run.path / "passes").exists()

    def test_a_pass_that_is_not_in_the_manifest(self, tmp_path: Path) -> None:
        run = run_with_two_passes(tmp_path)
        run.merge()
        with pytest.raises(TableError, match="Pass nothing has 0 tokens on disk; the manifest says None"):
            run.tokens("nothing")
