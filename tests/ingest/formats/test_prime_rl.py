"""prime-rl's token export; records as its exporter writes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.errors import IngestError
from tests.ingest.formats.dumps import assert_row, read, write_lines


def sequence(**changes: Any) -> dict[str, Any]:
    nothing = [None] * 5
    return {
        "schema_version": 1,
        "step": 3,
        "rank": 0,
        "micro_step": 1,
        "micro_sequence_idx": 0,
        "export_sequence_idx": 0,
        "env_name": "math",
        "token_ids": [21, 22, 23, 24, 25],
        "position_ids": [0, 1, 2, 3, 4],
        "loss_mask": [False, False, True, False, True],
        "advantages": [0.0, 0.0, 1.0, 0.0, 1.0],
        "inference_logprobs": [0.0, 0.0, -0.5, 0.0, None],
        "trainer_logprobs": [-11.9, -2.0, -0.75, -4.0, -1.0],
        "entropy": [11.9, 0.5, 0.25, 0.125, 1.0],
        "mismatch_kl": nothing,
        "rl_weights": nothing,
        "ce_weights": nothing,
        "ref_kl_weights": nothing,
    } | changes


def export(folder: Path, step: int, ranks: int = 1, stable: bool = True, **changes: Any) -> Path:
    for rank in range(ranks):
        records = [
            sequence(step=step, rank=rank, micro_step=index // 2, micro_sequence_idx=index % 2, **changes)
            for index in range(3)
        ]
        write_lines(folder / "token_exports" / f"step_{step}" / f"rank_{rank}.jsonl", records)
    if stable:
        (folder / "token_exports" / f"step_{step}" / "STABLE").touch()
    return folder


def test_comes_back_exactly(tmp_path: Path) -> None:
    recorded, (row,) = read(write_lines(tmp_path / "rank_0.jsonl", [sequence()]), tmp_path)
    assert_row(
        row,
        {
            "prompt_token_ids": [21, 22],
            "response_token_ids": [23, 24, 25],
            "loss_mask": [True, False, True],
            "rollout_logprobs": [-0.5, 0.0, math.nan],
            "trainer_logprobs": [-0.75, -4.0, -1.0],
            "trainer_entropy": [0.25, 0.125, 1.0],
            "advantages": [1.0, 0.0, 1.0],
            "step": 3,
            "replica": "0",
            "pack_index": 0,
            "pack_id": "3/0/1",
            "tags": "math",
        },
    )
    assert recorded.file.written_for == "prime-rl 0.8"


@pytest.mark.parametrize("under", [".", "run_abc"])
def test_steps_and_ranks_in_natural_order(tmp_path: Path, under: str) -> None:
    for step in (10, 2):
        export(tmp_path / "out" / under, step, ranks=2)
    _, rows = read(tmp_path / "out", tmp_path)
    assert [(row["step"], row["replica"]) for row in rows[::3]] == [(2, "0"), (2, "1"), (10, "0"), (10, "1")]
    assert [row["pack_index"] for row in rows[:3]] == [0, 1, 0]
    assert rows[0]["pack_id"] == rows[1]["pack_id"] != rows[2]["pack_id"]


def test_steps_without_marker_are_left_out_and_said(tmp_path: Path) -> None:
    out = export(export(tmp_path / "out", 1), 2, ranks=2, stable=False)
    (out / "token_exports" / "step_2" / "rank_1.jsonl").write_text('{"schema_version": 1, "token_i')
    said: list[str] = []
    recorded, rows = read(out, tmp_path, said)
    assert {row["step"] for row in rows} == {1}
    assert recorded.file.n_files == 1
    assert len(said) == 1
    assert said[0].startswith("2 files")
    assert "STABLE" in said[0]


def test_only_steps_without_marker(tmp_path: Path) -> None:
    out = export(tmp_path / "out", 2, stable=False)
    with pytest.raises(IngestError, match="STABLE"):
        read(out, tmp_path)
    assert read(out / "token_exports" / "step_2" / "rank_0.jsonl", tmp_path)[0].file.n_sequences == 3


@pytest.mark.parametrize(
    ("weights", "mask"),
    [
        ({"rl_weights": [0.0, 0.0, 1.0, 0.0, 0.0]}, [True, False, False]),
        ({"ref_kl_weights": [0.0, 0.0, 0.0, 0.0, 0.5]}, [True, False, True]),
        ({"rl_weights": [0.0] * 5, "ref_kl_weights": [0.0, 0.0, 0.0, 0.0, 0.5]}, [False, False, True]),
    ],
)
def test_tokens_of_a_frozen_model_are_masked(tmp_path: Path, weights: dict[str, Any], mask: list[bool]) -> None:
    _, (row,) = read(write_lines(tmp_path / "a.jsonl", [sequence(**weights)]), tmp_path)
    assert row["loss_mask"] == mask
    assert row["response_token_ids"] == [23, 24, 25]


@pytest.mark.parametrize("version", [2, "1", None, True])
def test_another_schema(tmp_path: Path, version: Any) -> None:
    with pytest.raises(IngestError, match="schema_version"):
        read(write_lines(tmp_path / "a.jsonl", [sequence(schema_version=version)]), tmp_path)


@pytest.mark.parametrize("key", ["inference_logprobs", "trainer_logprobs", "rank", "micro_step"])
def test_a_missing_key_is_named_with_project_and_version(tmp_path: Path, key: str) -> None:
    record = sequence()
    del record[key]
    with pytest.raises(IngestError) as error:
        read(write_lines(tmp_path / "a.jsonl", [record]), tmp_path)
    assert key in error.value.what
    assert "prime-rl 0.8" in error.value.fix


def test_wrong_lengths(tmp_path: Path) -> None:
    records = [sequence(), sequence(trainer_logprobs=[-1.0] * 4)]
    recorded, rows = read(write_lines(tmp_path / "a.jsonl", records), tmp_path)
    assert (len(rows), recorded.file.n_left_out) == (1, 1)
    with pytest.raises(IngestError, match="component weights"):
        read(write_lines(tmp_path / "a.jsonl", [sequence(rl_weights=[1.0])]), tmp_path)
