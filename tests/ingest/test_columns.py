"""The generic format in pickles and as a dict of columns: the rows are those that JSON lines of the same have."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.containers import PICKLES
from mismatch_probe.ingest.formats import GENERIC, formats
from mismatch_probe.ingest.pickles import files
from tests.ingest.rows import Row, read, row, write_jsonl

OTHER = {"ids": "prompt_token_ids", "out": "response_token_ids", "lp": "rollout_logprobs", "hf": "trainer_logprobs"}
SHARED = {"weight_version": 3}
ROWS = [
    row(reward=0.5, loss_mask=[1, 0], step=7, tags="a"),
    row(
        prompt_token_ids=[1],
        response_token_ids=[2, 3, 4],
        rollout_logprobs=[-1.0, -2.0, -3.0],
        trainer_logprobs=[-1.5, -2.5, -3.5],
        loss_mask=[1, 1, 1],
        reward=-1.0,
        step=8,
        tags="b",
    ),
]


def columns(rows: list[Row], pack: Any = list) -> dict[str, Any]:
    return {key: [pack(one[key]) if isinstance(one[key], list) else one[key] for one in rows] for key in rows[0]}


def renamed(fields: dict[str, Any]) -> dict[str, Any]:
    theirs = {ours: theirs for theirs, ours in OTHER.items()}
    return {theirs.get(key, key): value for key, value in fields.items()}


def pad(lists: list[Any], left: bool = False, fill: float = 0) -> torch.Tensor:
    width = max(map(len, lists))
    return torch.tensor([[fill] * (width - len(x)) + x if left else x + [fill] * (width - len(x)) for x in lists])


def padded(rows: list[Row]) -> dict[str, Any]:
    """Prompts padded on the left, responses on the right, and the attention mask of both."""
    held = columns(rows)
    found = {key: pad(value, key == "prompt_token_ids") for key, value in held.items() if isinstance(value[0], list)}
    ones = [pad([[1] * len(x) for x in held[f"{side}_token_ids"]], side == "prompt") for side in ("prompt", "response")]
    return held | found | {"attention_mask": torch.cat(ones, dim=1)}


def whole(rows: list[Row]) -> dict[str, Any]:
    """The same as whole sequences, padded on both sides."""
    held = padded(rows)
    before = torch.zeros_like(held["prompt_token_ids"])
    found = {key: torch.cat([before, held[key]], 1) for key in ("loss_mask", "rollout_logprobs", "trainer_logprobs")}
    ids = torch.cat([held.pop("prompt_token_ids"), held.pop("response_token_ids")], 1)
    return held | found | {"token_ids": ids, "prompt_length": [len(one["prompt_token_ids"]) for one in rows]}


def saved(value: Any, path: Path) -> Path:
    if path.suffix == ".pt":
        torch.save(value, path)
    else:
        path.write_bytes(pickle.dumps(value))
    return path


def same_as_lines(path: Path, folder: Path, rows: list[Row], **options: Any) -> None:
    found, lines = read(path, trust_pickle=True, **options), read(write_jsonl(folder, rows, "lines.jsonl"))
    wanted = [{**each, "row": None} for each in lines.rows]
    assert [{**each, "row": None} for each in found.rows] == wanted
    assert found.file.format == GENERIC


@pytest.mark.parametrize("suffix", [".pt", ".pkl"])
@pytest.mark.parametrize(
    "made",
    [
        lambda rows: rows,
        lambda rows: [{k: torch.tensor(v) if isinstance(v, list) else v for k, v in one.items()} for one in rows],
        columns,
        lambda rows: columns(rows, torch.tensor),
        lambda rows: columns(rows, np.array) | {"reward": torch.tensor([one["reward"] for one in rows])},
        padded,
    ],
    ids=["dicts", "dicts of tensors", "lists", "tensors", "arrays", "padded"],
)
class TestPickles:
    def test_by_its_own_keys(self, tmp_path: Path, suffix: str, made: Any) -> None:
        same_as_lines(saved(made(ROWS), tmp_path / f"run{suffix}"), tmp_path, ROWS)

    def test_by_the_names_of_another(self, tmp_path: Path, suffix: str, made: Any) -> None:
        fields = made(ROWS)
        other = [renamed(one) for one in fields] if isinstance(fields, list) else renamed(fields)
        same_as_lines(saved(other, tmp_path / f"run{suffix}"), tmp_path, ROWS, map=OTHER)


LISTS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LISTS, LISTS), min_size=1, max_size=4), st.sampled_from([padded, whole]))
def test_padding_is_cut(
    tmp_path_factory: pytest.TempPathFactory, ids: list[tuple[list[int], list[int]]], as_: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    rows = [
        row(
            prompt_token_ids=prompt,
            response_token_ids=response,
            rollout_logprobs=[-float(one) for one in response],
            trainer_logprobs=[-2.0 * one for one in response],
            loss_mask=[1 if index == 0 else one % 2 for one in response],
        )
        for index, (prompt, response) in enumerate(ids)
    ]
    same_as_lines(saved(as_(rows), folder / "padded.pt"), folder, rows)


def test_without_an_attention_mask_the_last_token_that_counts_ends_a_padded_response(tmp_path: Path) -> None:
    fields = padded(ROWS[1:] + ROWS[:1])
    del fields["attention_mask"]
    found = read(saved(fields, tmp_path / "run.pt"), trust_pickle=True)
    assert found["response_token_ids"] == [[2, 3, 4], [8]]
    assert found["rollout_logprobs"] == [[-1, -2, -3], [-0.5]]
    assert found["prompt_token_ids"] == [[0, 0, 1], [5, 6, 7]]  # nothing says that they are padded


def test_a_value_of_the_whole_file_is_that_of_every_row(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**columns(ROWS), "step": 3, "weight_version": 4, "tags": "x"}))
    found = read(path)
    assert (found["step"], found["tags"]) == ([3, 3], ["x", "x"])
    assert found["weight_version"] == [[4, 4], [4, 4, 4]]


@pytest.mark.parametrize("key", ["rollout_logprobs", "reward", "prompt_token_ids"])
def test_a_column_of_fewer_sequences(tmp_path: Path, key: str) -> None:
    fields = columns(ROWS)
    fields[key] = fields[key][:1]
    with pytest.raises(IngestError, match=r"of [12] sequences and \w+ of [12]"):
        read(saved(fields, tmp_path / "run.pkl"), trust_pickle=True)


@pytest.mark.parametrize("mask", [[1], [1] * 4, "11111", [[1]]])
def test_an_attention_mask_of_something_else(tmp_path: Path, mask: Any) -> None:
    with pytest.raises(IngestError, match="attention_mask"):
        read(write_jsonl(tmp_path, [row(attention_mask=mask)]))


def test_no_format_that_is_pickled_has_the_keys_of_the_generic_one() -> None:
    """So that the generic format takes no file of theirs."""
    known = formats()
    for name, one in known.items():
        if name != GENERIC and set(PICKLES) & set(one.containers):
            assert all(known[GENERIC].fit(dict.fromkeys(keys)) == 0 for keys in one.layouts)


def test_a_pickle_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = files.load_file

    def counting(path: Path) -> Any:
        loaded.append(path.name)
        return load(path)

    monkeypatch.setattr(files, "load_file", counting)
    path = saved(ROWS, tmp_path / "run.pt")
    for options in ({}, {"format": GENERIC}):
        assert len(read(path, trust_pickle=True, **options)["row"]) == 2
        assert loaded.pop() == "run.pt"
        assert not loaded
    with pytest.raises(IngestError, match="may contain a pickle"):
        read(path)
    assert not loaded
