"""The folder of an RL run: what a killed process, a full disk and a resumed run leave in it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mismatch_probe.errors import DiskFull, TableError, UsageError
from mismatch_probe.results.finding import Finding
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.records import RlDirectory
from mismatch_probe.rl.summary import summarise
from tests.factories.rl_run import PROVENANCE, ending, step

ROWS = [
    step(0, reward=0.1, grad_norm_var=None, n_empty=0),
    step(1, reward=1 / 3, grad_norm_var=1e-300, n_empty=1),
    step(2, reward=1.0, grad_norm_var=2.0, n_empty=0),
]


@pytest.fixture
def directory(tmp_path: Path) -> RlDirectory:
    return RlDirectory.create(tmp_path / "run", RlConfig(steps=3), PROVENANCE)


def lines(directory: RlDirectory) -> bytes:
    return (directory.path / "steps.jsonl").read_bytes()


def table(step: int) -> pa.Table:
    return pa.table({"step": [step], "reward": [0.5]})


def filled(directory: RlDirectory) -> RlDirectory:
    for row in ROWS:
        directory.append_step(row)
        directory.append_rollout(row["step"], table(row["step"]))
    return directory


def test_a_run_is_opened_with_its_configuration(directory: RlDirectory) -> None:
    found = RlDirectory.open(directory.path)
    assert found.config == RlConfig(steps=3)
    assert found.document.provenance == PROVENANCE
    assert found.ending() is None
    assert found.steps().empty


def test_a_folder_in_use_and_a_folder_of_something_else_are_refused(directory: RlDirectory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not empty"):
        RlDirectory.create(directory.path, directory.config, PROVENANCE)
    with pytest.raises(TableError, match="holds no RL run"):
        RlDirectory.open(tmp_path)
    (tmp_path / "run.json").write_text('{"schema_version": 2, "tool_version": "1", "pairs": []}')
    with pytest.raises(TableError, match="no valid RL run: config"):
        RlDirectory.open(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(TableError, match="cannot be read as JSON"):
        RlDirectory.open(tmp_path)


def test_steps_come_back_as_they_were(directory: RlDirectory) -> None:
    found = filled(directory).steps()
    assert found["reward"].tolist() == [row["reward"] for row in ROWS]
    assert found["grad_norm_var"].isna().tolist() == [True, False, False]
    assert found["n_empty"].dtype == "int64"


def test_a_number_that_json_cannot_hold_is_a_bug(directory: RlDirectory) -> None:
    filled(directory)
    before = lines(directory)
    with pytest.raises(ValueError, match="JSON"):
        directory.append_step({"step": 3, "reward": float("nan")})
    assert lines(directory) == before


@pytest.mark.parametrize("first", range(5))
def test_rewinding_leaves_the_steps_before_byte_for_byte(directory: RlDirectory, first: int) -> None:
    whole = lines(filled(directory)).splitlines(keepends=True)
    (directory.path / "rollouts" / ".step-000009.parquet.1.tmp").write_bytes(b"")
    directory.rewind(first)
    assert lines(directory) == b"".join(whole[:first])
    parts = sorted(path.name for path in (directory.path / "rollouts").glob("step-*"))
    assert parts == [f"step-{i:06d}.parquet" for i in range(min(first, 3))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.data())
def test_whatever_a_killed_process_leaves_a_resumed_one_ends_alike(directory: RlDirectory, data: Any) -> None:
    """Cut at any byte, and taken up from any step that was whole by then."""
    path = directory.path / "steps.jsonl"
    path.unlink(missing_ok=True)
    for row in ROWS:
        directory.append_step(row)
    whole = lines(directory)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    finished = directory.steps()
    done = len(finished)
    assert whole[:cut].count(b"\n") <= done <= whole[:cut].count(b"\n") + 1
    step = data.draw(st.integers(0, done))
    directory.rewind(step)
    for row in ROWS[step:]:
        directory.append_step(row)
    assert lines(directory) == whole


def test_a_damaged_line_is_said(directory: RlDirectory) -> None:
    filled(directory)
    (directory.path / "steps.jsonl").write_bytes(b'{"step": 0, "rew{"step": 0}\n' + lines(directory))
    for read in (directory.steps, lambda: directory.rewind(1)):
        with pytest.raises(TableError, match=r"steps\.jsonl cannot be read"):
            read()


def test_a_full_disk_is_said(directory: RlDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(directory)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DiskFull, match=r"steps\.jsonl could not be written"):
        directory.append_step({"step": 3})
    monkeypatch.setattr("mismatch_probe.rl.records.pq.write_table", full)
    with pytest.raises(DiskFull, match=r"step-000003\.parquet could not be written"):
        directory.append_rollout(3, table(3))
    monkeypatch.undo()
    assert len(directory.steps()) == 3


def test_the_end_has_tables_and_a_result(directory: RlDirectory) -> None:
    filled(directory).finish(ending(steps=3))
    found = RlDirectory.open(directory.path).document
    assert found == directory.document
    assert found.ending == ending(steps=3)
    assert found.summary == summarise(directory.steps(), directory.config)
    pd.testing.assert_frame_equal(pd.read_parquet(directory.path / "steps.parquet"), directory.steps())
    assert pq.read_table(directory.path / "rollouts.parquet")["step"].to_pylist() == [0, 1, 2]


def test_a_run_that_ends_before_its_first_step_has_a_result(directory: RlDirectory) -> None:
    directory.finish(ending("rl-not-finite", steps=0))
    found = directory.ending()
    assert found is not None
    assert found.status == "diverged"
    assert pd.read_parquet(directory.path / "steps.parquet").empty
    assert not (directory.path / "rollouts.parquet").exists()


def test_a_failed_step_leaves_its_batch(directory: RlDirectory) -> None:
    cause = Finding(code="rl-not-finite", severity="fail", values={"step": 7, "what": "the loss"})
    directory.save_failure(table(7), cause)
    folder = directory.path / "failure"
    assert pq.read_table(folder / "batch.parquet")["step"].to_pylist() == [7]
    assert Finding(**json.loads((folder / "failure.json").read_text())) == cause
