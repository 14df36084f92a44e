"""A dump is read as it was written, from either container, and what was left out of it is counted."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import tempfile
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest import collect, containers
from mismatch_probe.ingest.collect import Lists
from mismatch_probe.ingest.read import read_dump
from tests.ingest.rows import Row, read, row, write_jsonl, write_parquet

LISTS = ("prompt_token_ids", "response_token_ids", "rollout_logprobs", "trainer_logprobs", "loss_mask")


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
    @given(recorded(), st.integers(1, 3), st.integers(1, 3))
    def test_both_containers_give_what_was_written(self, rows: list[Row], batch: int, chunk: int) -> None:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(containers, "_BATCH_ROWS", batch)
            patch.setattr(collect, "_CHUNK_ROWS", chunk)
            runs = [read(write(Path(folder), rows)) for write in (write_jsonl, write_parquet)]
        assert repr(runs[0].rows) == repr(runs[1].rows)  # in which NaN is NaN
        kept = [(number, each) for number, each in enumerate(rows, start=1) if each["response_token_ids"]]
        names: Counter[Any] = Counter()
        for index, (number, each) in enumerate(kept):
            found = runs[0].rows[index]
            assert found["row"] == number
            for key in LISTS:
                assert (key in found) == (key in each)
                if key in each:
                    expected = [math.nan if value is None else value for value in each[key]]
                    np.testing.assert_array_equal(np.array(found[key], float), np.array(expected, float))
            assert found["finish_reason"] == each.get("finish_reason")
            assert found.get("step") == each.get("step")
            name = each.get("prompt_id", tuple(each["prompt_token_ids"]))
            assert found["sample_id"] == names[name]
            names[name] += 1
        for run in runs:
            file = run.file
            assert file.n_sequences == run.table.num_rows == len(kept)
            assert (file.n_rows, file.n_left_out) == (len(rows), 0)
            assert file.n_sequences + file.n_empty_responses == len(rows)
            assert file.n_prompts == len(names)
            assert file.n_tokens == sum(len(each["response_token_ids"]) for each in rows)
            assert file.n_prompt_tokens == sum(len(each["prompt_token_ids"]) for _, each in kept)
            assert file.n_masked_tokens == sum(each.get("loss_mask", []).count(0) for each in rows)
            assert file.longest_prompt == max(len(each["prompt_token_ids"]) for _, each in kept)
            assert file.longest_response == max(len(each["response_token_ids"]) for _, each in kept)
            assert file.largest_id == max(max(e["prompt_token_ids"] + e["response_token_ids"]) for _, e in kept)

    def test_types(self, tmp_path: Path) -> None:
        numbers = row(loss_mask=[0, 1], step=3, turn=[0, 1], advantages=[0.5, 1], reward=1)
        schema = read(write_jsonl(tmp_path, [numbers] * 2)).table.schema
        kinds = {name: schema.field(name).type for name in schema.names}
        assert {kinds.pop(key).value_type for key in ("prompt_token_ids", "response_token_ids")} == {pa.int32()}
        floats = ("rollout_logprobs", "trainer_logprobs", "advantages")
        assert {kinds.pop(key).value_type for key in floats} == {pa.float64()}
        assert kinds.pop("loss_mask").value_type == pa.bool_()
        assert kinds.pop("turn").value_type == kinds.pop("step") == kinds.pop("row") == pa.int64()
        assert kinds.pop("reward") == pa.float64()
        assert kinds.pop("sample_id") == pa.int32()
        assert set(kinds.values()) == {pa.dictionary(pa.int32(), pa.string())}

    def test_one_side_is_enough(self, tmp_path: Path) -> None:
        rollout = read(write_jsonl(tmp_path, [row(trainer_logprobs=None)]))
        trainer = read(write_parquet(tmp_path, [row(rollout_logprobs=None)]))
        assert (rollout.sides, "trainer_logprobs" in rollout.table.schema.names) == (("rollout",), False)
        assert (trainer.sides, "rollout_logprobs" in trainer.table.schema.names) == (("trainer",), False)

    def test_null_is_absent(self, tmp_path: Path) -> None:
        line = json.dumps({**row(), "trainer_logprobs": None, "loss_mask": None, "step": None, "prompt_id": None})
        (tmp_path / "run.jsonl").write_text(line)
        found = read(tmp_path / "run.jsonl")
        assert not {"trainer_logprobs", "loss_mask", "step"} & set(found.table.schema.names)
        untyped = pa.table({key: pa.array([value]) for key, value in json.loads(line).items()})
        pq.write_table(untyped, tmp_path / "run.parquet")
        assert read(tmp_path / "run.parquet").rows == found.rows

    @pytest.mark.parametrize("list_of", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)])
    @pytest.mark.parametrize("ids", [pa.int8(), pa.uint16(), pa.int32(), pa.uint64()])
    @pytest.mark.parametrize("floats", [pa.float16(), pa.float32(), pa.float64()])
    def test_any_list_and_number_of_arrow(self, tmp_path: Path, list_of: Any, ids: Any, floats: Any) -> None:
        rows = [row(rollout_logprobs=[-0.5, None]), row(response_token_ids=[1, 2])]
        types = {"response_token_ids": list_of(ids), "rollout_logprobs": list_of(floats)}
        found = read(write_parquet(tmp_path, rows, **types))
        assert found["response_token_ids"] == [[8, 9], [1, 2]]
        np.testing.assert_array_equal(found.values("rollout_logprobs"), [-0.5, np.nan, -0.5, -1.25])
        assert found.values("rollout_logprobs").dtype == np.float64

    @pytest.mark.parametrize("list_of", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)])
    def test_rows_without_a_list_among_others(self, tmp_path: Path, list_of: Any) -> None:
        rows = [row(), {"prompt_token_ids": [1], "response_token_ids": []}, row(rollout_logprobs=[-3, -4])]
        types = {"rollout_logprobs": list_of(pa.float32()), "trainer_logprobs": list_of(pa.float64())}
        found = read(write_parquet(tmp_path, rows, **types))
        assert found["rollout_logprobs"] == [[-0.5, -1.25], [-3, -4]]
        assert (found["row"], found.file.n_empty_responses) == ([1, 3], 1)

    def test_encoded_labels_and_integers_for_names(self, tmp_path: Path) -> None:
        rows = [row(prompt_id="a", finish_reason="stop"), row(prompt_id="b"), row(prompt_id="a")]
        encoded = pa.dictionary(pa.int32(), pa.string())
        found = read(write_parquet(tmp_path, rows, prompt_id=encoded, finish_reason=encoded))
        assert found["prompt_id"] == ["a", "b", "a"]
        assert found["sample_id"] == [0, 0, 1]
        assert found["finish_reason"] == ["stop", None, None]
        mixed = read(write_jsonl(tmp_path, [row(prompt_id="q", finish_reason="stop"), row(prompt_id=7)]))
        assert (mixed["prompt_id"], mixed["finish_reason"]) == (["q", "7"], ["stop", None])
        assert read(write_parquet(tmp_path, [row(prompt_id=7)], prompt_id=pa.uint8()))["prompt_id"] == ["7"]

    def test_several_row_groups(self, tmp_path: Path) -> None:
        table = pq.read_table(write_parquet(tmp_path, [row(step=index) for index in range(10)]))
        pq.write_table(table, tmp_path / "run.parquet", row_group_size=3)
        found = read(tmp_path / "run.parquet")
        assert found["step"] == list(range(10))
        assert found["row"] == list(range(1, 11))

    def test_several_chunks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(collect, "_CHUNK_TOKENS", 5)
        rows = [row(step=index, tags="a" if index % 2 else None, reward=None) for index in range(100)]
        rows[70]["reward"] = 0.5
        path = write_jsonl(tmp_path, rows)
        found = read(path)
        assert found["step"] == list(range(100))
        assert found["tags"] == [None, "a"] * 50
        assert found["sample_id"] == list(range(100))
        assert [index for index, one in enumerate(found["reward"]) if one is not None] == [70]
        assert {"tags", "reward"} <= set(found.file.keys)
        assert set(found["file"]) == {str(path)}

    def test_home_is_expanded_and_the_path_kept_as_typed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_jsonl(tmp_path, [row()], "RUN.JSONL")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert read("~/RUN.JSONL").file.path == "~/RUN.JSONL"


class TestJson:
    def test_every_spelling_of_a_value_that_is_not_finite(self, tmp_path: Path) -> None:
        path = tmp_path / "run.jsonl"
        path.write_text(
            '{"prompt_token_ids": [], "response_token_ids": [1, 2, 3, 4, 5],'
            ' "trainer_logprobs": [null, NaN, Infinity, -Infinity, 0]}'
        )
        found = read(path)
        np.testing.assert_array_equal(found.values("trainer_logprobs"), [np.nan, np.nan, np.inf, -np.inf, 0.0])

    def test_float64_is_kept_to_the_last_bit(self, tmp_path: Path) -> None:
        values = [-0.1 - 2**-55, -5e-324, -1.7976931348623157e308, -0.0]
        path = write_jsonl(tmp_path, [row(response_token_ids=[1] * 4, rollout_logprobs=values, trainer_logprobs=None)])
        assert read(path).values("rollout_logprobs").tobytes() == np.array(values).tobytes()

    def test_bom_crlf_blank_lines_and_separators_inside_text(self, tmp_path: Path) -> None:
        lines = [json.dumps(row(prompt_id=name), ensure_ascii=False) for name in ("a\u2028b", "c\u0085d")]
        path = tmp_path / "run.jsonl"
        path.write_bytes(("\ufeff\r\n" + lines[0] + "\r\n\r\n  \t\n" + lines[1]).encode())
        found = read(path)
        assert found["prompt_id"] == ["a\u2028b", "c\u0085d"]
        assert found["row"] == [2, 5]
        assert found.file.n_rows == 2

    def test_a_line_of_ten_megabytes(self, tmp_path: Path) -> None:
        n = 400_000
        rows = [
            row(response_token_ids=[151_643] * n, rollout_logprobs=[-0.1234567] * n, trainer_logprobs=None),
            row(trainer_logprobs=None),
        ]
        path = write_jsonl(tmp_path, rows)
        assert path.stat().st_size > 8_000_000
        assert [len(ids) for ids in read(path)["response_token_ids"]] == [n, 2]

    def test_a_key_twice_is_no_matter_where_it_holds_no_list(self, tmp_path: Path) -> None:
        path = tmp_path / "run.jsonl"
        path.write_text(json.dumps(row())[:-1] + ', "extra": 1, "extra": {"a": 1, "a": 2}}')
        assert read(path).file.ignored_columns == ("extra",)

    def test_a_document_of_rows_or_of_one(self, tmp_path: Path) -> None:
        expected = read(write_jsonl(tmp_path, [row(), row(step=None)])).rows
        for content, n in (([row(), row()], 2), (row(), 1)):
            (tmp_path / "run.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
            assert read(tmp_path / "run.json").rows == expected[:n]
        (tmp_path / "data").write_text(" \n" + json.dumps([row()]))
        assert read(tmp_path / "data").rows == expected[:1]

    @pytest.mark.parametrize("name", ["run.jsonl.gz", "RUN.JSONL.GZ"])
    def test_gzip(self, tmp_path: Path, name: str) -> None:
        plain = write_jsonl(tmp_path, [row(step=index) for index in range(99)])
        packed = gzip.compress(plain.read_bytes())
        (tmp_path / name).write_bytes(packed)
        found = read(tmp_path / name)
        assert found.rows == read(plain).rows
        assert found.file.sha256 == hashlib.sha256(packed).hexdigest()
        for damaged in (packed[:-20], b"\x1f\x8b\x08" + packed[3:40] + b"\0" * 40, plain.read_bytes()):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(IngestError, match=r"is a damaged gzip file|is not valid JSON"):
                read(tmp_path / name)


class TestFacts:
    def test_digest_is_of_the_file(self, tmp_path: Path) -> None:
        for path in (write_jsonl(tmp_path, [row()]), write_parquet(tmp_path, [row()])):
            source = read(path).file
            assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
            assert (source.path, source.format, source.n_files) == (str(path), "generic", 1)

    def test_what_is_left_out_is_counted(self, tmp_path: Path) -> None:
        empty = {"response_token_ids": [], "rollout_logprobs": [], "trainer_logprobs": []}
        rows = [
            row(loss_mask=[False, True], prompt_token_ids=[]),
            row(loss_mask=[], **empty),
            row(loss_mask=[0, 0.0], rollout_logprobs=[0.5, 0.5]),
            row(loss_mask=[1.0, 1], rollout_logprobs=[1e-7, 0.01], trainer_logprobs=[math.inf, -1.0]),
            row(loss_mask=[1, 1], rollout_logprobs=[-1.0]),
        ]
        source = read(write_jsonl(tmp_path, rows)).file
        facts = source.model_dump(mode="json")
        del facts["path"], facts["sha256"], facts["keys"]
        codes = {found["code"] for found in facts.pop("findings")}
        assert {"mismatched-lengths", "empty-responses", "positive-logprobs"} <= codes
        assert facts == {
            "format": "generic",
            "written_for": "mismatch-probe",
            "n_files": 1,
            "n_rows": 5,
            "n_left_out": 1,
            "n_empty_responses": 1,
            "n_sequences": 3,
            "n_prompts": 2,
            "n_prompt_tokens": 6,
            "n_tokens": 6,
            "n_masked_tokens": 3,
            "n_masked_sequences": 1,
            "n_empty_prompts": 1,
            "longest_prompt": 3,
            "longest_response": 2,
            "longest_sequence": 5,
            "largest_id": 9,
            "ignored_columns": [],
        }
        json.dumps(source.model_dump(mode="json"), allow_nan=False)

    def test_an_empty_response_may_leave_out_what_it_has_no_values_for(self, tmp_path: Path) -> None:
        aborted = {"prompt_token_ids": [1], "response_token_ids": []}
        for write in (write_jsonl, write_parquet):
            found = read(write(tmp_path, [aborted, row(loss_mask=[1, 1]), aborted]))
            assert (found.file.n_sequences, found.file.n_empty_responses, found["row"]) == (1, 2, [2])

    def test_ignored_columns_are_listed_safely(self, tmp_path: Path) -> None:
        hostile = "\x1b[31m" + "x" * 1000
        rows = [row(score=1.0, reward=1.0), row(**{hostile: {"deep": []}, "advantage": 0})]
        ignored = read(write_jsonl(tmp_path, rows)).file.ignored_columns
        assert ignored[1:] == ("advantage", "score")
        assert ignored[0].startswith("\\x1b[31mxxx")
        assert len(ignored[0]) < 80
        many = read(write_jsonl(tmp_path, [row(**{f"k{index:03}": 0 for index in range(150)})])).file.ignored_columns
        assert (len(many), many[-1]) == (101, "and 50 more")
        one = read(write_parquet(tmp_path, [row(score=1.0)], score=pa.float32()))
        assert one.file.ignored_columns == ("score",)


class TestPrompts:
    def test_equal_ids_are_one_prompt_whatever_the_file(self, tmp_path: Path) -> None:
        rows = [row(), row(prompt_token_ids=[5, 6]), row(response_token_ids=[1, 2]), row(prompt_token_ids=[])]
        runs = [read(write(tmp_path, rows)) for write in (write_jsonl, write_parquet)]
        assert runs[0]["prompt_id"] == runs[1]["prompt_id"]
        first, second, third, fourth = runs[0]["prompt_id"]
        assert first == third
        assert len({first, second, fourth}) == 3
        assert runs[0]["sample_id"] == [0, 0, 1, 0]
        assert runs[0].file.n_prompts == 3

    def test_the_digest_is_that_of_little_endian_int32(self, tmp_path: Path) -> None:
        expected = hashlib.sha256(b"\x05\0\0\0\x06\0\0\0\x07\0\0\0").hexdigest()[:16]
        assert read(write_jsonl(tmp_path, [row()]))["prompt_id"] == [expected]


class TestColumns:
    @given(st.lists(st.none() | st.lists(st.floats(), max_size=4), max_size=9), st.data())
    def test_lists(self, lists: list[list[float] | None], data: st.DataObject) -> None:
        lengths = np.array([-1 if one is None else len(one) for one in lists], np.int64)
        column = Lists(np.array([value for one in lists for value in one or ()]), lengths)
        parts = [column.values[start:end].tolist() for start, end in pairwise(column.offsets.tolist())]
        assert repr(parts) == repr([one or [] for one in lists])
        wanted = np.array(data.draw(st.lists(st.booleans(), min_size=len(column.values), max_size=len(column.values))))
        seen = {}
        for index in np.flatnonzero(wanted).tolist():
            owner = next(i for i, end in enumerate(column.offsets[1:].tolist()) if index < end)
            seen.setdefault(owner, index - int(column.offsets[owner]))
        assert [(owner, place) for owner, place, _ in column.first(wanted.astype(bool))] == sorted(seen.items())
        kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(lists), max_size=len(lists))), bool)
        rest = column.keep(kept)
        assert rest.lengths.tolist() == lengths[kept].tolist()
        assert repr(rest.values.tolist()) == repr(
            [v for one, k in zip(lists, kept, strict=True) if k for v in one or ()]
        )

    def test_a_million_tokens_of_parquet_make_no_python_object_each(self, tmp_path: Path) -> None:
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
        path, out = tmp_path / "run.parquet", tmp_path / "recorded.parquet"
        pq.write_table(
            pa.table({key: pa.ListArray.from_arrays(offsets, pa.array(values)) for key, values in columns.items()}),
            path,
        )
        tracemalloc.start()
        facts = read_dump(path, out).file
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 60e6  # a chunk; a list of floats would be 32 bytes for each of five million values
        found = pq.read_table(out)
        for key, values in columns.items():
            np.testing.assert_array_equal(pc.list_flatten(found[key]).to_numpy(), values)
        assert (facts.n_tokens, facts.n_masked_tokens) == (rows * length, rows * length // 2)
