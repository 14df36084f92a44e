"""martingale: a ledger with the schema of its `TokenLedger`, and databases that are none."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.read import ReadOptions
from tests.ingest.formats.tensors import rows

SCHEMA = """
CREATE TABLE llm_revisions (digest TEXT PRIMARY KEY, manifest_json TEXT NOT NULL, weights_uri TEXT,
    step INTEGER NOT NULL, created_at REAL NOT NULL);
CREATE TABLE sequences (actor_id INTEGER NOT NULL, sequence_index INTEGER NOT NULL, digest TEXT NOT NULL UNIQUE,
    record_json TEXT NOT NULL, created_at REAL NOT NULL, PRIMARY KEY (actor_id, sequence_index));
CREATE TABLE scores (sequence_digest TEXT NOT NULL, position INTEGER NOT NULL, train_revision_digest TEXT NOT NULL,
    record_json TEXT NOT NULL, PRIMARY KEY (sequence_digest, position, train_revision_digest));
"""


def bits(value: float, kind: str = "f32") -> str:
    return f"{kind}:{struct.pack('>f' if kind == 'f32' else '>d', value).hex()}"


def ledger(path: Path, n: int = 2, scored: bool = True, wal: bool = False, **changes: Any) -> Path:
    with sqlite3.connect(path) as database:
        if wal:
            database.execute("PRAGMA journal_mode=WAL")
        database.executescript(SCHEMA)
        database.executemany("INSERT INTO llm_revisions VALUES (?, '{}', NULL, ?, 0)", [("r3", 3), ("r4", 4)])
        for index in range(n):
            tokens = [
                {"revision_digest": f"r{3 + place % 2}", "token_id": 10 + place, "logprob_bits": bits(-0.1 - place)}
                for place in range(3)
            ]
            record = {
                "actor_id": n - index,
                "prompt_digest": "p",
                "tokens": tokens,
                "reward_bits": bits(0.1, "f64"),
            } | changes
            database.execute(
                "INSERT INTO sequences VALUES (?, 0, ?, ?, 0)", (n - index, f"s{index}", json.dumps(record))
            )
            held = (
                [(f"s{index}", p, "r4", json.dumps({"logprob_bits": bits(-0.3 - p)})) for p in (2, 0)] if scored else []
            )
            held += [("s0", 0, "r3", json.dumps({"logprob_bits": bits(-99.0)}))] if scored and not index else []
            database.executemany("INSERT INTO scores VALUES (?, ?, ?, ?)", held)
    database.close()
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return rows(path, ReadOptions())


def test_values_are_those_of_the_bits(tmp_path: Path) -> None:
    found = read(ledger(tmp_path / "tokens.db"))
    assert [row["replica"] for row in found] == ["1", "2"]
    for row in found:
        assert (row["prompt_token_ids"], row["response_token_ids"]) == ([], [10, 11, 12])
        assert row["rollout_logprobs"] == [float(np.float32(-0.1 - place)) for place in range(3)]
        expected = [float(np.float32(-0.3)), np.nan, float(np.float32(-2.3))]
        np.testing.assert_array_equal(row["trainer_logprobs"], expected)
        assert (row["weight_version"], row["trainer_version"], row["step"]) == ([3, 4, 3], 4, 4)
        assert (row["prompt_id"], row["reward"]) == ("p", 0.1)


def test_values_of_two_widths_are_read_one_by_one(tmp_path: Path) -> None:
    tokens = [{"token_id": 1, "logprob_bits": bits(-0.1, kind), "revision_digest": "r3"} for kind in ("f64", "f32")]
    found = read(ledger(tmp_path / "tokens.db", n=1, scored=False, tokens=tokens))
    assert found[0]["rollout_logprobs"] == [-0.1, float(np.float32(-0.1))]


def test_a_ledger_without_scores_has_one_side(tmp_path: Path) -> None:
    assert "trainer_logprobs" not in read(ledger(tmp_path / "tokens.db", scored=False))[0]


def test_nothing_is_written_beside_it(tmp_path: Path) -> None:
    path = ledger(tmp_path / "tokens.db", wal=True)
    before = path.read_bytes()
    assert len(read(path)) == 2
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_log_beside_it_is_read(tmp_path: Path) -> None:
    path = ledger(tmp_path / "tokens.db", wal=True)
    database = sqlite3.connect(path)
    database.execute("DELETE FROM sequences WHERE actor_id = 1")
    database.commit()
    assert len(read(path)) == 1
    database.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": None}, "Sequence 1 of .* has no tokens"),
        ({"tokens": [1]}, "tokens that are not a list of objects"),
        ({"tokens": [{"token_id": 1, "logprob_bits": "f32:zz"}]}, "are not the bits of a float"),
        ({"tokens": [{"token_id": 1, "logprob_bits": "f32:bf 80 00"}]}, "are not the bits of a float"),
        ({"tokens": [{"token_id": 1, "logprob_bits": bits(-1.0), "revision_digest": "x"}]}, "not in llm_revisions"),
        ({"tokens": [{"token_id": None, "logprob_bits": bits(-1.0)}]}, r"null as response_token_ids\[0\]"),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(IngestError, match=said):
        read(ledger(tmp_path / "tokens.db", scored=False, **change))


def test_other_databases(tmp_path: Path) -> None:
    for name, script, said in (
        ("empty.db", "", "has no rows|no known format|no file"),
        ("other.db", "CREATE TABLE t (x)", "is of no known format; its keys are 't'"),
        (
            "views.db",
            "CREATE VIEW sequences AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT x FROM c;"
            "CREATE TABLE llm_revisions (x); CREATE TABLE scores (x);",
            "no known format",
        ),
        (
            "columns.db",
            "CREATE TABLE llm_revisions (x); CREATE TABLE sequences (x); CREATE TABLE scores (x)",
            "corrupt",
        ),
    ):
        with sqlite3.connect(tmp_path / name) as database:
            database.executescript(script)
        database.close()
        with pytest.raises(IngestError, match=said):
            read(tmp_path / name)
    data = ledger(tmp_path / "tokens.db").read_bytes()
    (tmp_path / "bytes.db").write_bytes(data.replace(b"TABLE llm_rev", b"TABL\x80 llm_rev"))
    with pytest.raises(IngestError, match="corrupt"):
        read(tmp_path / "bytes.db")
    (tmp_path / "text.db").write_text("<html>")
    with pytest.raises(IngestError, match="not a SQLite database"):
        read(tmp_path / "text.db")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 2**15), st.integers(0, 255)), min_size=1, max_size=40),
    cut=st.integers(0, 2**15),
)
def test_mutated_databases_are_read_or_refused(tmp_path: Path, edits: list[tuple[int, int]], cut: int) -> None:
    seed = tmp_path / "seed.db"
    data = bytearray((seed if seed.exists() else ledger(seed)).read_bytes())
    for place, value in edits:
        data[place % len(data)] = value
    (tmp_path / "x.db").write_bytes(data[:cut] if cut % 5 == 0 else data)
    with contextlib.suppress(IngestError):
        assert read(tmp_path / "x.db")
