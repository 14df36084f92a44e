"""From two passes of a run to the chunks of a pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mismatch_probe import tables
from mismatch_probe.errors import TableError
from mismatch_probe.metrics.frame import pair_arrays, pair_chunks
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.schemas import sequences_table, tokens_table
from mismatch_probe.types import PairArrays, Rollout, RolloutRequest, Score
from tests.factories.manifest import make_manifest, make_pass

ROLLOUTS, TRAINER = ("vllm-bfloat16-decode", "vllm-float16-decode"), "hf-float32-cast"
LENGTHS = [3, 0, 5, 1, 9, 2, 4, 1]


def ids_of(sequence: int) -> list[int]:
    return [100 * sequence + t for t in range(LENGTHS[sequence // 2])]


def logprobs(sequence: int, shift: float) -> np.ndarray:
    return -0.01 * np.array(ids_of(sequence), dtype=np.float32) - np.float32(shift)


def small_row_groups(path: Path, rows: int = 4) -> None:
    """The same table in row groups of at most `rows` rows."""
    pq.write_table(pq.read_table(path), path, row_group_size=rows)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Two passes whose sequence ids interleave, sampled from prompts that are not in order; one trainer scored both."""
    run = RunDirectory.create(tmp_path / "run", make_manifest())
    for parity, name in enumerate(ROLLOUTS):
        sequences = range(parity, 2 * len(LENGTHS), 2)
        requests = [RolloutRequest(i, [1], i) for i in sequences]
        rollouts = [Rollout(i, ids_of(i), logprobs(i, 0.0), "stop") for i in sequences]
        prompts = [f"p{i // 2 % 3}" for i in sequences]
        table = sequences_table(name, requests[::-1], rollouts[::-1], prompts[::-1], [0] * len(requests))
        tokens = tokens_table(name, rollouts, lambda r: r.response_token_ids)
        run.finish_pass(name, make_pass(), {"tokens": tokens, "sequences": table})
    scores = [
        Score(i, logprobs(i, 0.5), np.array(ids_of(i), np.float32), np.array(ids_of(i), np.int32))
        for i in range(2 * len(LENGTHS))
    ]
    tokens = tokens_table(TRAINER, scores, lambda s: ids_of(s.sequence_id))
    run.finish_pass(TRAINER, make_pass(covers=ROLLOUTS), {"tokens": tokens})
    return run


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def assert_is_the_pair(pair: PairArrays, parity: int) -> None:
    """Against the lists that the tables were made from."""
    sequences = range(parity, 2 * len(LENGTHS), 2)
    b = np.concatenate([logprobs(i, 0.0) for i in sequences])
    np.testing.assert_array_equal(pair.rollout_logprob, b.astype(np.float64))
    np.testing.assert_array_equal(
        pair.trainer_logprob, np.concatenate([logprobs(i, 0.5) for i in sequences]).astype(np.float64)
    )
    assert pair.sequence.tolist() == [row for row, n in enumerate(LENGTHS) for _ in range(n)]
    assert pair.position.tolist() == [t for n in LENGTHS for t in range(n)]
    assert pair.prompt_ids == ("p0", "p1", "p2")
    assert pair.prompt.tolist() == [i % 3 for i in range(len(LENGTHS))]


@pytest.mark.parametrize("merged", ["parts", "merged", "small row groups", "one row group"])
@pytest.mark.parametrize("parity", [0, 1])
def test_a_pair_in_memory(run: RunDirectory, merged: str, parity: int) -> None:
    """However the rows lie in row groups, even with several passes in one."""
    if merged != "parts":
        run.merge()
    if merged == "small row groups":
        small_row_groups(run.path / "tokens.parquet")
    if merged == "one row group":
        rewrite(run.path / "tokens.parquet", lambda table: table.combine_chunks())
    assert_is_the_pair(pair_arrays(run, ROLLOUTS[parity], TRAINER), parity)


@pytest.mark.parametrize("batch_rows", [1, 3, 1000])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 25])
def test_chunks_hold_whole_sequences_and_add_up(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, batch_rows: int, chunk_tokens: int
) -> None:
    run.merge()
    small_row_groups(run.path / "tokens.parquet")
    monkeypatch.setattr(tables, "_BATCH_ROWS", batch_rows)
    chunks = list(pair_chunks(run, ROLLOUTS[0], TRAINER, chunk_tokens=chunk_tokens, trainer_columns=["rank"]))
    if chunk_tokens < 7:
        assert len(chunks) > 2
    for chunk in chunks:
        rows, lengths = np.unique(chunk.sequence, return_counts=True)
        assert lengths.tolist() == [LENGTHS[row] for row in rows]
        assert len(chunk.sequence) <= chunk_tokens + max(LENGTHS) + batch_rows
    names = ("rollout_logprob", "trainer_logprob", "sequence", "position")
    joined: dict[str, Any] = {name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names}
    assert_is_the_pair(PairArrays(**joined, prompt=chunks[0].prompt, prompt_ids=chunks[0].prompt_ids), 0)
    rank = np.concatenate([chunk.columns["rank"] for chunk in chunks])
    assert rank.tolist() == [token for i in range(0, 2 * len(LENGTHS), 2) for token in ids_of(i)]


def test_row_groups_of_other_sequences_are_not_read(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.merge()
    small_row_groups(run.path / "tokens.parquet", rows=1)
    read = [table["sequence_id"].to_pylist() for table in run.iter_tokens(TRAINER, ["sequence_id"], ids=(4, 8))]
    assert sorted({i for batch in read for i in batch}) == [4, 5, 6, 7, 8]


def set_value(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(column), pa.array(values).cast(table.schema.field(column).type))


@pytest.mark.parametrize("batch_rows", [1, 1000])
@pytest.mark.parametrize(
    ("column", "row", "value"),
    [("token_id", -1, 7), ("position", -1, 9), ("sequence_id", 0, 2), ("sequence_id", 24, 12), ("sequence_id", 24, 99)],
)
def test_passes_of_different_tokens_are_not_paired(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, batch_rows: int, column: str, row: int, value: int
) -> None:
    """Also where the rollout pass has a row of a sequence that it did not sample (24 is its last row)."""
    run.merge()
    rewrite(run.path / "tokens.parquet", lambda table: set_value(table, column, row, value))
    monkeypatch.setattr(tables, "_BATCH_ROWS", batch_rows)
    parity = 1 if row == -1 else 0
    with pytest.raises(TableError, match=r"differ in their \w+ column, so they cannot be paired"):
        list(pair_chunks(run, ROLLOUTS[parity], TRAINER))


@pytest.mark.parametrize("lost", [0, 15])
def test_a_sequence_that_the_trainer_has_not_scored(run: RunDirectory, lost: int) -> None:
    scores = [Score(i, logprobs(i, 0.5)) for i in range(2 * len(LENGTHS)) if i != lost]
    run.finish_pass(TRAINER, make_pass(), {"tokens": tokens_table(TRAINER, scores, lambda s: ids_of(s.sequence_id))})
    with pytest.raises(TableError, match=r"differ in their (sequence_id|position) column, so they cannot be paired"):
        list(pair_chunks(run, ROLLOUTS[lost % 2], TRAINER))
    other = ROLLOUTS[1 - lost % 2]
    assert_is_the_pair(pair_arrays(run, other, TRAINER), 1 - lost % 2)


def test_a_pass_without_tokens_is_one_empty_chunk(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", make_manifest())
    nothing = tokens_table("r", [], lambda _: [])
    run.finish_pass("r", make_pass(), {"tokens": nothing, "sequences": sequences_table("r", [], [], [], [])})
    run.finish_pass("t", make_pass(), {"tokens": tokens_table("t", [], lambda _: [])})
    (chunk,) = pair_chunks(run, "r", "t", trainer_columns=["rank"])
    assert len(chunk.rollout_logprob) == len(chunk.sequence) == 0
    assert chunk.prompt_ids == ()


class TestTokensInBatches:
    @pytest.mark.parametrize("rows", [range(25), range(3, 4), range(3, 11), range(24, 25), range(7, 7), range(20, 99)])
    @pytest.mark.parametrize("batch_rows", [1, 3, 1000])
    def test_a_range_of_rows(
        self, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, rows: range, batch_rows: int
    ) -> None:
        run.merge()
        small_row_groups(run.path / "tokens.parquet")
        monkeypatch.setattr(tables, "_BATCH_ROWS", batch_rows)
        found = [
            i for table in run.iter_tokens(ROLLOUTS[1], ["token_id"], rows=rows) for i in table["token_id"].to_pylist()
        ]
        assert found == run.tokens(ROLLOUTS[1])["token_id"].to_pylist()[rows.start : rows.stop]

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda p: p.write_bytes(p.read_bytes()[:-200]), "tokens.parquet is corrupt or truncated"),
            (lambda p: p.write_bytes(b""), "tokens.parquet is corrupt or truncated"),
            (lambda p: p.unlink(), "tokens.parquet does not exist"),
            (lambda p: rewrite(p, lambda t: t.drop_columns("logprob")), "has no column logprob"),
            (lambda p: rewrite(p, lambda t: t.drop_columns("pass_id")), "has no column pass_id"),
            (lambda p: rewrite(p, lambda t: t.slice(1)), "has 24 tokens on disk; the manifest says 25"),
        ],
        ids=["cut", "empty", "gone", "no-logprob", "no-pass", "short"],
    )
    def test_damage_is_one_sentence(self, run: RunDirectory, damage: Callable[[Path], None], sentence: str) -> None:
        run.merge()
        damage(run.path / "tokens.parquet")
        with pytest.raises(TableError, match=sentence):
            list(run.iter_tokens(ROLLOUTS[0], ["logprob"]))

    def test_damage_inside_a_row_group(self, run: RunDirectory) -> None:
        run.merge()
        path = run.path / "tokens.parquet"
        content = bytearray(path.read_bytes())
        content[4:400] = b"\xff" * 396
        path.write_bytes(content)
        with pytest.raises(TableError, match="is corrupt or truncated"):
            list(run.iter_tokens(ROLLOUTS[0], ["sequence_id", "position", "logprob"]))

    def test_types_are_those_of_the_schema(self, run: RunDirectory) -> None:
        run.merge()
        path = run.path / "tokens.parquet"
        rewrite(path, lambda t: t.set_column(4, "logprob", t["logprob"].cast(pa.float64())))
        (batch,) = run.iter_tokens(ROLLOUTS[0], ["logprob"])
        assert batch.schema == pa.schema([tables.TOKENS_SCHEMA.field("logprob")])
