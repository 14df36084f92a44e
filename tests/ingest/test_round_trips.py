"""A recorded run is read as it was written, from either format, and what was left out of it is counted."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.ingest import parquet, read_recorded
from mismatch_probe.ingest.base import Ragged, RecordedRun
from mismatch_probe.ingest.collect import _GROWTH, _Growing
from tests.ingest.rows import Row, row, write_jsonl, write_parquet

LISTS = ("prompt_token_ids", "response_token_ids", "rollout_logprobs", "trainer_logprobs", "loss_mask")


def as_rows(run: RecordedRun) -> list[Row]:
    """The run as Python values, NaN told apart by text."""
    rows: list[Row] = []
    for index in range(len(run)):
        lists = {key: getattr(run, key)[index].tolist() for key in LISTS if getattr(run, key) is not None}
        rest = {
            "step": None if run.step is None else int(run.step[index]),
            "prompt_id": run.prompt_ids[index],
            "sample_id": int(run.sample_ids[index]),
            "finish_reason": run.finish_reasons[index],
            "row": int(run.rows[index]),
        }
        rows.append({key: repr(value) for key, value in (lists | rest).items()})
    return rows


@st.composite
def recorded(draw: st.DrawFn) -> list[Row]:
    """Rows with some set of the optional columns, and any float at all as a log-prob."""
    ids = st.integers(0, 2**31 - 1)
    sides = draw(
        st.sampled_from([("rollout_logprobs",), ("trainer_logprobs",), ("rollout_logprobs", "trainer_logprobs")])
    )
    optional = draw(st.sets(st.sampled_from(["loss_mask", "step", "prompt_id", "finish_reason"])))
    prompts = draw(st.lists(st.lists(ids, max_size=3), min_size=1, max_size=3))
    rows = []
    for length in draw(st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any)):
        each: Row = {
            "prompt_token_ids": draw(st.sampled_from(prompts)),
            "response_token_ids": draw(st.lists(ids, min_size=length, max_size=length)),
        }
        for side in sides:
            each[side] = draw(st.lists(st.none() | st.floats(), min_size=length, max_size=length))
        if "loss_mask" in optional:
            each["loss_mask"] = [1] * min(length, 1) + draw(
                st.lists(st.sampled_from([0, 1]), min_size=max(length - 1, 0), max_size=max(length - 1, 0))
            )
        if "step" in optional:
            each["step"] = draw(st.integers(-(2**63), 2**63 - 1))
        if "prompt_id" in optional:
            each["prompt_id"] = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=3))
        if "finish_reason" in optional:
            each["finish_reason"] = draw(st.sampled_from(["stop", "length", None]))
        rows.append(each)
    return rows


class TestRoundTrip:
    @settings(max_examples=60, deadline=None)
    @given(recorded(), st.integers(1, 3))
    def test_both_formats_give_what_was_written(self, rows: list[Row], batch: int) -> None:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(parquet, "_BATCH", batch)
            runs = [read_recorded(write(Path(folder), rows)) for write in (write_jsonl, write_parquet)]
        assert as_rows(runs[0]) == as_rows(runs[1])
        kept = [(number, each) for number, each in enumerate(rows, start=1) if each["response_token_ids"]]
        names: Counter[Any] = Counter()
        for index, (number, each) in enumerate(kept):
            run = runs[0]
            assert run.rows[index] == number
            for key in LISTS:
                column = getattr(run, key)
                assert (column is None) == (key not in each)
                if column is not None:
                    expected = [math.nan if value is None else value for value in each[key]]
                    np.testing.assert_array_equal(column[index], np.array(expected, column.values.dtype))
            assert run.finish_reasons[index] == (each.get("finish_reason") or "")
            name = each.get("prompt_id", tuple(each["prompt_token_ids"]))
            assert run.sample_ids[index] == names[name]
            names[name] += 1
        assert len(run) == len(kept) == run.source.n_sequences
        for run in runs:
            assert run.source.n_rows == len(rows) == run.source.n_sequences + run.source.n_empty_responses
            assert run.source.n_tokens == sum(len(each["response_token_ids"]) for each in rows)
            assert run.source.n_masked_tokens == sum(each.get("loss_mask", []).count(0) for each in rows)

    def test_types_and_shared_offsets(self, tmp_path: Path) -> None:
        run = read_recorded(write_jsonl(tmp_path, [row(loss_mask=[0, 1], step=3)] * 2))
        assert run.rollout_logprobs is not None
        assert run.loss_mask is not None
        assert run.step is not None
        assert run.prompt_token_ids.values.dtype == run.response_token_ids.values.dtype == np.int32
        assert run.rollout_logprobs.values.dtype == np.float64
        assert run.loss_mask.values.dtype == bool
        assert run.step.dtype == run.rows.dtype == np.int64
        assert run.rollout_logprobs.offsets is run.response_token_ids.offsets
        assert run.response_token_ids.lengths.tolist() == [2, 2]
        assert run.sides == ("rollout", "trainer")

    def test_one_side_is_enough(self, tmp_path: Path) -> None:
        rollout = read_recorded(write_jsonl(tmp_path, [row(trainer_logprobs=None)]))
        trainer = read_recorded(write_parquet(tmp_path, [row(rollout_logprobs=None)]))
        assert (rollout.sides, rollout.trainer_logprobs) == (("rollout",), None)
        assert (trainer.sides, trainer.rollout_logprobs) == (("trainer",), None)

    def test_null_is_absent(self, tmp_path: Path) -> None:
        line = json.dumps({**row(), "trainer_logprobs": None, "loss_mask": None, "step": None, "prompt_id": None})
        (tmp_path / "run.jsonl").write_text(line)
        run = read_recorded(tmp_path / "run.jsonl")
        assert (run.trainer_logprobs, run.loss_mask, run.step) == (None, None, None)
        untyped = pa.table({key: pa.array([value]) for key, value in json.loads(line).items()})
        pq.write_table(untyped, tmp_path / "run.parquet")
        assert as_rows(read_recorded(tmp_path / "run.parquet")) == as_rows(run)

    @pytest.mark.parametrize("list_of", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)])
    @pytest.mark.parametrize("ids", [pa.int8(), pa.uint16(), pa.int32(), pa.uint64()])
    @pytest.mark.parametrize("floats", [pa.float16(), pa.float32(), pa.float64()])
    def test_any_list_and_number_of_arrow(self, tmp_path: Path, list_of: Any, ids: Any, floats: Any) -> None:
        rows = [row(rollout_logprobs=[-0.5, None]), row(response_token_ids=[1, 2])]
        types = {"response_token_ids": list_of(ids), "rollout_logprobs": list_of(floats)}
        run = read_recorded(write_parquet(tmp_path, rows, **types))
        assert run.response_token_ids.values.tolist() == [8, 9, 1, 2]
        assert run.rollout_logprobs is not None
        np.testing.assert_array_equal(run.rollout_logprobs.values, [-0.5, np.nan, -0.5, -1.25])
        assert run.rollout_logprobs.values.dtype == (np.float64 if floats == pa.float64() else np.float32)

    def test_encoded_labels_and_integers_for_names(self, tmp_path: Path) -> None:
        rows = [row(prompt_id="a", finish_reason="stop"), row(prompt_id="b"), row(prompt_id="a")]
        encoded = pa.dictionary(pa.int32(), pa.string())
        run = read_recorded(write_parquet(tmp_path, rows, prompt_id=encoded, finish_reason=encoded))
        assert run.prompt_ids == ("a", "b", "a")
        assert run.sample_ids.tolist() == [0, 0, 1]
        assert run.finish_reasons == ("stop", "", "")
        assert read_recorded(write_jsonl(tmp_path, [row(prompt_id=7)])).prompt_ids == ("7",)

    def test_several_row_groups(self, tmp_path: Path) -> None:
        table = pq.read_table(write_parquet(tmp_path, [row(step=index) for index in range(10)]))
        pq.write_table(table, tmp_path / "run.parquet", row_group_size=3)
        run = read_recorded(tmp_path / "run.parquet")
        assert run.step is not None
        assert run.step.tolist() == list(range(10))
        assert run.rows.tolist() == list(range(1, 11))

    def test_home_is_expanded_and_the_path_kept_as_typed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_jsonl(tmp_path, [row()], "RUN.JSONL")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert read_recorded("~/RUN.JSONL").source.path == "~/RUN.JSONL"


class TestJson:
    def test_every_spelling_of_a_value_that_is_not_finite(self, tmp_path: Path) -> None:
        path = tmp_path / "run.jsonl"
        path.write_text(
            '{"prompt_token_ids": [], "response_token_ids": [1, 2, 3, 4, 5],'
            ' "trainer_logprobs": [null, NaN, Infinity, -Infinity, 0]}'
        )
        run = read_recorded(path)
        assert run.trainer_logprobs is not None
        np.testing.assert_array_equal(run.trainer_logprobs.values, [np.nan, np.nan, np.inf, -np.inf, 0.0])

    def test_float64_is_kept_to_the_last_bit(self, tmp_path: Path) -> None:
        values = [-0.1 - 2**-55, -5e-324, -1.7976931348623157e308, -0.0]
        run = read_recorded(
            write_jsonl(tmp_path, [row(response_token_ids=[1] * 4, rollout_logprobs=values, trainer_logprobs=None)])
        )
        assert run.rollout_logprobs is not None
        assert run.rollout_logprobs.values.tobytes() == np.array(values).tobytes()

    def test_bom_crlf_blank_lines_and_separators_inside_text(self, tmp_path: Path) -> None:
        lines = [json.dumps(row(prompt_id=name), ensure_ascii=False) for name in ("a\u2028b", "c\u0085d")]
        path = tmp_path / "run.jsonl"
        path.write_bytes(("\ufeff\r\n" + lines[0] + "\r\n\r\n  \t\n" + lines[1]).encode())
        run = read_recorded(path)
        assert run.prompt_ids == ("a\u2028b", "c\u0085d")
        assert run.rows.tolist() == [2, 5]
        assert run.source.n_rows == 2

    def test_a_line_of_ten_megabytes(self, tmp_path: Path) -> None:
        n = 400_000
        rows = [
            row(response_token_ids=[151_643] * n, rollout_logprobs=[-0.1234567] * n, trainer_logprobs=None),
            row(trainer_logprobs=None),
        ]
        path = write_jsonl(tmp_path, rows)
        assert path.stat().st_size > 8_000_000
        assert read_recorded(path).response_token_ids.lengths.tolist() == [n, 2]

    def test_a_key_twice_is_no_matter_where_it_is_ignored(self, tmp_path: Path) -> None:
        path = tmp_path / "run.jsonl"
        path.write_text(json.dumps(row())[:-1] + ', "extra": 1, "extra": {"a": 1, "a": 2}}')
        assert read_recorded(path).source.ignored_columns == ("extra",)


class TestFacts:
    def test_digest_is_of_the_file(self, tmp_path: Path) -> None:
        for path in (write_jsonl(tmp_path, [row()]), write_parquet(tmp_path, [row()])):
            source = read_recorded(path).source
            assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
            assert (source.path, source.format) == (str(path), path.suffix[1:])

    def test_what_is_left_out_is_counted(self, tmp_path: Path) -> None:
        empty = {"response_token_ids": [], "rollout_logprobs": [], "trainer_logprobs": []}
        rows = [
            row(loss_mask=[False, True], prompt_token_ids=[]),
            row(loss_mask=[], **empty),
            row(loss_mask=[0, 0.0], rollout_logprobs=[0.5, 0.5]),
            row(loss_mask=[1.0, 1], rollout_logprobs=[1e-7, 0.01], trainer_logprobs=[math.inf, -1.0]),
        ]
        source = read_recorded(write_jsonl(tmp_path, rows)).source
        facts = source.model_dump(mode="json")
        del facts["path"], facts["sha256"]
        assert facts == {
            "format": "jsonl",
            "n_rows": 4,
            "n_empty_responses": 1,
            "n_sequences": 3,
            "n_tokens": 6,
            "n_masked_tokens": 3,
            "n_masked_sequences": 1,
            "n_empty_prompts": 1,
            "n_positive": {"rollout": 1, "trainer": 0},
            "ignored_columns": [],
        }
        json.dumps(source.model_dump(mode="json"), allow_nan=False)

    def test_an_empty_response_may_leave_out_what_it_has_no_values_for(self, tmp_path: Path) -> None:
        aborted = {"prompt_token_ids": [1], "response_token_ids": []}
        for write in (write_jsonl, write_parquet):
            run = read_recorded(write(tmp_path, [aborted, row(loss_mask=[1, 1]), aborted]))
            assert (len(run), run.source.n_empty_responses, run.rows.tolist()) == (1, 2, [2])

    def test_ignored_columns_are_listed_safely(self, tmp_path: Path) -> None:
        hostile = "\x1b[31m" + "x" * 1000
        run = read_recorded(write_jsonl(tmp_path, [row(reward=1.0), row(**{hostile: {"deep": []}, "advantage": 0})]))
        assert run.source.ignored_columns[1:] == ("advantage", "reward")
        assert run.source.ignored_columns[0].startswith("\\x1b[31mxxx")
        assert len(run.source.ignored_columns[0]) < 80
        many = read_recorded(write_jsonl(tmp_path, [row(**{f"k{index:03}": 0 for index in range(150)})]))
        assert (len(many.source.ignored_columns), many.source.ignored_columns[-1]) == (101, "and 50 more")
        one = read_recorded(write_parquet(tmp_path, [row(reward=1.0)], reward=pa.float32()))
        assert one.source.ignored_columns == ("reward",)


class TestPrompts:
    def test_equal_ids_are_one_prompt_whatever_the_file(self, tmp_path: Path) -> None:
        rows = [row(), row(prompt_token_ids=[5, 6]), row(response_token_ids=[1, 2]), row(prompt_token_ids=[])]
        runs = [read_recorded(write(tmp_path, rows)) for write in (write_jsonl, write_parquet)]
        assert runs[0].prompt_ids == runs[1].prompt_ids
        first, second, third, fourth = runs[0].prompt_ids
        assert first == third
        assert len({first, second, fourth}) == 3
        assert runs[0].sample_ids.tolist() == [0, 0, 1, 0]

    def test_the_digest_is_that_of_little_endian_int32(self, tmp_path: Path) -> None:
        expected = hashlib.sha256(b"\x05\0\0\0\x06\0\0\0\x07\0\0\0").hexdigest()[:16]
        assert read_recorded(write_jsonl(tmp_path, [row()])).prompt_ids == (expected,)


class TestColumns:
    def test_ragged_gives_views_and_no_others(self) -> None:
        ragged = Ragged(np.arange(5), np.array([0, 2, 2, 5]))
        assert [part.tolist() for part in ragged] == [[0, 1], [], [2, 3, 4]]
        assert ragged[0].base is ragged.values
        for index in (3, -1):
            with pytest.raises(IndexError):
                ragged[index]

    @given(st.lists(st.lists(st.floats(), max_size=20), max_size=20))
    def test_growing_is_concatenation(self, parts: list[list[float]]) -> None:
        growing = _Growing(np.float64)
        for part in parts:
            growing.extend(np.array(part, np.float64))
        np.testing.assert_array_equal(growing.done(), np.array([value for part in parts for value in part]))

    def test_growing_holds_little_more_than_its_content(self) -> None:
        growing = _Growing(np.int32)
        for length in range(1, 2000, 7):
            growing.extend(np.zeros(length, np.int64))
        assert len(growing._array) <= _GROWTH * growing._length
        assert growing.done().dtype == np.int32

    def test_a_million_tokens_of_parquet_make_no_python_object_each(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows, length = 500, 2000
        offsets = pa.array(np.arange(rows + 1) * length, pa.int32())
        ids = np.arange(rows * length) % 50_000
        logprobs = -np.random.default_rng(0).exponential(size=rows * length)
        columns = {
            "prompt_token_ids": ids,
            "response_token_ids": ids,
            "rollout_logprobs": logprobs,
            "trainer_logprobs": logprobs.astype(np.float32),
            "loss_mask": ids % 2 == 0,
        }
        path = tmp_path / "run.parquet"
        pq.write_table(
            pa.table({key: pa.ListArray.from_arrays(offsets, pa.array(values)) for key, values in columns.items()}),
            path,
        )
        made = 0
        original = parquet._lists

        def counted(*arguments: Any) -> Any:
            nonlocal made
            lists = original(*arguments)
            assert isinstance(lists.values, np.ndarray)
            assert lists.values.dtype != object
            made += len(lists.values)
            return lists

        monkeypatch.setattr(parquet, "_lists", counted)
        run = read_recorded(path)
        assert made == 5 * rows * length
        assert run.rollout_logprobs is not None
        assert run.trainer_logprobs is not None
        np.testing.assert_array_equal(run.response_token_ids.values, ids)
        np.testing.assert_array_equal(run.rollout_logprobs.values, logprobs)
        np.testing.assert_array_equal(run.trainer_logprobs.values, logprobs.astype(np.float32))
        assert run.trainer_logprobs.values.dtype == np.float32
        assert run.source.n_masked_tokens == rows * length // 2
