"""Every way to get a dump wrong gets a sentence that names the file, the row and the key."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mismatch_probe.errors import DiskFull, IngestError, ProbeError
from mismatch_probe.ingest import containers
from mismatch_probe.ingest.base import Place, Record
from mismatch_probe.ingest.containers import DumpFile
from tests.ingest.rows import Row, read, row, write_jsonl, write_parquet

GOOD = json.dumps(row())


def refusal(path: Path, **options: Any) -> IngestError:
    with pytest.raises(IngestError) as caught:
        read(path, **options)
    error = caught.value
    assert isinstance(error, ProbeError)
    assert str(path) in error.what
    assert error.what.endswith(".")
    assert error.fix.endswith(".")
    assert len(error.what) < 1700 + len(str(path))
    assert (error.what + error.fix).replace(str(path), "").isprintable()
    return error


# A row that is left out, and what is said where no other is left, whichever container it came in.
LEFT_OUT: list[tuple[Row, str, str]] = [
    (row(response_token_ids=[8, -100]), "has -100 as response_token_ids[1], which is outside 0 to", "without padding"),
    (row(response_token_ids=[8, 2**32 + 1]), "has 4294967297 as response_token_ids[1], which is", "without padding"),
    (row(prompt_token_ids=[2**31]), "has 2147483648 as prompt_token_ids[0], which is outside 0 to", "without padding"),
    (row(rollout_logprobs=[-1.0] * 5), "has 5 rollout_logprobs for 2 response_token_ids", "leave out the first 3"),
    (
        row(trainer_logprobs=[-1.0] * 4),
        "has 4 trainer_logprobs for 2",
        "without the first token",
    ),
    (row(trainer_logprobs=[-1.0]), "has 1 trainer_logprobs for 2", "One value is missing"),
    (row(trainer_logprobs=[-1.0] * 9), "has 9 trainer_logprobs for 2", "one log-prob per response token, and null"),
    (row(rollout_logprobs=[]), "has 0 rollout_logprobs for 2", "one log-prob per response token, and null"),
    (row(response_token_ids=[]), "has 2 rollout_logprobs for 0", "Record the ids of the response"),
    (row(prompt_token_ids=[], rollout_logprobs=[-1.0]), "has 1 rollout_logprobs for 2", "One value is missing"),
    (row(loss_mask=[0, 0, 0, 1, 1]), "has 5 loss_mask for 2", "leave out the first 3"),
    (row(loss_mask=[1] * 7), "has 7 loss_mask for 2", "one 0 or 1 per response token"),
]

# What the second row has, and why nothing is read then.
ROWS: list[tuple[Row, str, str]] = [
    (row(loss_mask=[1, 2]), "has 2.0 as loss_mask[1], which is neither 0 nor 1", "one 0 or 1"),
    (row(loss_mask=[1, 1]), "has loss_mask, which {word} 1 does not have", "in every row or in none"),
    (row(trainer_logprobs=None), "has no trainer_logprobs, which {word} 1 has", "in every row or in none"),
    (row(step=1), "has step, which {word} 1 does not have", "in every row or in none"),
    (row(prompt_id="a"), "has prompt_id, which {word} 1 does not have", "in every row or in none"),
]


@pytest.mark.parametrize(("bad", "what", "fix"), LEFT_OUT)
def test_a_row_that_breaks_a_rule_is_left_out(tmp_path: Path, bad: Row, what: str, fix: str) -> None:
    for write, word in ((write_jsonl, "Line"), (write_parquet, "Row")):
        good = row(loss_mask=[1] * 2) if "loss_mask" in bad else row()
        found = read(write(tmp_path, [good, bad, good]))
        assert (found.file.n_rows, found.file.n_left_out, found.file.n_sequences) == (3, 1, 2)
        assert found["row"] == [1, 3]
        path = write(tmp_path, [bad, bad])
        error = refusal(path)
        assert error.what.startswith(f"{word} 1 of {path} ")
        assert what in error.what
        assert fix in error.fix


@pytest.mark.parametrize(("second", "what", "fix"), ROWS)
def test_bad_row_of_either_format(tmp_path: Path, second: Row, what: str, fix: str) -> None:
    for write, word in ((write_jsonl, "Line"), (write_parquet, "Row")):
        types = {"loss_mask": pa.list_(pa.float64())}
        path = write(tmp_path, [row(), second], **(types if write is write_parquet else {}))
        error = refusal(path)
        assert error.what.startswith(f"{word} 2 of {path} ")
        assert what.format(word=word.lower()) in error.what
        assert fix in error.fix


def test_the_row_is_the_right_one_in_a_later_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_BATCH_ROWS", 100)
    rows = [row(prompt_token_ids=list(range(index % 5))) for index in range(700)]
    rows[612] = row(response_token_ids=[1, -7])
    found = read(write_parquet(tmp_path, rows))
    assert (found.file.n_left_out, 613 in found["row"]) == (1, False)
    rows[612] = row(trainer_logprobs=None)
    error = refusal(write_parquet(tmp_path, rows))
    assert error.what.startswith("Row 613 of ")
    assert "which row 1 has" in error.what


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
class TestWholeFile:
    def test_ids_alone_are_no_fault(self, tmp_path: Path, write: Any) -> None:
        found = read(write(tmp_path, [row(rollout_logprobs=None, trainer_logprobs=None)] * 2))
        assert (found.sides, found.file.n_tokens) == ((), 4)
        assert found.file.keys == ("prompt_token_ids", "response_token_ids")

    def test_nothing_that_counts(self, tmp_path: Path, write: Any) -> None:
        assert "has a loss_mask of only zeros" in refusal(write(tmp_path, [row(loss_mask=[0, 0])])).what

    def test_no_response(self, tmp_path: Path, write: Any) -> None:
        assert (
            "has no response tokens"
            in refusal(write(tmp_path, [{"prompt_token_ids": [1], "response_token_ids": []}])).what
        )

    @pytest.mark.parametrize("step", [1.5, "7", True])
    def test_step(self, tmp_path: Path, write: Any, step: Any) -> None:
        kinds = {"step": pa.array([step]).type} if write is write_parquet else {}
        assert "has a step that is " in refusal(write(tmp_path, [row(step=step)], **kinds)).what

    @pytest.mark.parametrize("key", ["prompt_id", "finish_reason"])
    def test_labels(self, tmp_path: Path, write: Any, key: str) -> None:
        kinds = {key: pa.float64()} if write is write_parquet else {}
        assert f"has a {key} that is a number" in refusal(write(tmp_path, [row(**{key: 1.5})], **kinds)).what

    def test_missing_key_lists_those_that_are_there(self, tmp_path: Path, write: Any) -> None:
        kinds = {"completion_token_ids": pa.list_(pa.int64())} if write is write_parquet else {}
        path = write(tmp_path, [row(response_token_ids=None, completion_token_ids=[1, 2])], **kinds)
        error = refusal(path)
        assert "is of no known format; its keys are 'completion_token_ids', 'prompt_token_ids'" in error.what
        assert "--map completion_token_ids=response_token_ids" in error.fix
        error = refusal(path, format="generic")
        assert "has no response_token_ids; its keys are 'completion_token_ids', 'prompt_token_ids'" in error.what

    @pytest.mark.parametrize(
        "text", [{"input": "2+2", "output": "4", "score": 1.0}, {"prompt": "x", "completion": "y"}]
    )
    def test_text(self, tmp_path: Path, write: Any, text: Row) -> None:
        kinds = (
            {key: pa.string() for key, value in text.items() if isinstance(value, str)}
            if write is write_parquet
            else {}
        )
        error = refusal(write(tmp_path, [text], **kinds))
        assert "has text but no response_token_ids" in error.what
        assert "Encoding text again can give other ids" in error.fix

    def test_chat(self, tmp_path: Path, write: Any) -> None:
        chat = [{"role": "user", "content": "x"}]
        kinds = {"messages": pa.array([chat]).type} if write is write_parquet else {}
        assert "has text but no" in refusal(write(tmp_path, [{"messages": chat}], **kinds)).what

    @pytest.mark.parametrize("text", ["1 2 3", ["a", "b"]])
    def test_text_where_ids_belong(self, tmp_path: Path, write: Any, text: Any) -> None:
        kinds = {"response_token_ids": pa.array([text]).type} if write is write_parquet else {}
        assert (
            "has text but no response_token_ids"
            in refusal(write(tmp_path, [row(response_token_ids=text)], **kinds)).what
        )


# The second line of a JSONL file, and what is said about it.
LINES = [
    ("{", "is not valid JSON (Expecting property name"),
    (GOOD[:-20], "is not valid JSON ("),
    (GOOD + " x", "is not valid JSON (Extra data, column "),
    (GOOD + GOOD, "is not valid JSON (Extra data"),
    ("\0" * 100, "is not valid JSON (Expecting value, column 1)"),
    ("\ufeff" + GOOD, "is not valid JSON"),
    ("[" * 200_000, "is JSON that nests too deeply"),
    (GOOD[:-1] + ', "extra": ' + "[" * 100_000 + "]" * 100_000 + "}", "is JSON that nests too deeply"),
    (GOOD.replace("-0.5", "-" + "9" * 5000), "has a number of thousands of digits"),
    (f"[{GOOD}]", "is a list, not a JSON object"),
    ("3", "is a number, not a JSON object"),
    ("null", "is null, not a JSON object"),
    (GOOD[:-1] + ', "rollout_logprobs": [0, 0]}', "has the key rollout_logprobs twice"),
    (GOOD.replace("[8, 9]", "null"), "has no response_token_ids; its keys are"),
    (GOOD.replace("[8, 9]", "8"), "has response_token_ids that is a number, not a list"),
    (GOOD.replace("[8, 9]", "{}"), "has response_token_ids that is an object, not a list"),
    (GOOD.replace("[8, 9]", "[8, 9.0]"), "has 9.0 as response_token_ids[1], which is not an integer"),
    (GOOD.replace("[8, 9]", "[8, true]"), "has true or false as response_token_ids[1], which is not an integer"),
    (GOOD.replace("[8, 9]", "[8, null]"), "has null as response_token_ids[1], which is not an integer"),
    (GOOD.replace("[8, 9]", "[[8, 9]]"), "has a list as response_token_ids[0], which is not an integer"),
    (GOOD.replace("[8, 9]", "[8, NaN]"), "has nan as response_token_ids[1], which is not an integer"),
    (GOOD.replace("[8, 9]", "[8, 9223372036854775808]"), "has a number in response_token_ids that is outside 0 to 214"),
    (GOOD.replace("-0.5", '"-0.5"'), "has text as rollout_logprobs[0], which is not a number or null"),
    (GOOD.replace("-0.5", "false"), "has true or false as rollout_logprobs[0], which is not a number or null"),
    (GOOD.replace("-0.5", '{"8": -0.5}'), "has an object as rollout_logprobs[0], which is not a number or null"),
    (GOOD.replace("-0.5", "-1" + "0" * 400), "has a number in rollout_logprobs that is outside what a float64 holds"),
    (GOOD[:-1] + ', "loss_mask": [1, null]}', "has null as loss_mask[1], which is not 0 or 1"),
    (GOOD[:-1] + ', "loss_mask": [1, NaN]}', "has nan as loss_mask[1], which is neither 0 nor 1"),
    (GOOD[:-1] + ', "loss_mask": "11"}', "has loss_mask that is text, not a list"),
]


@pytest.mark.parametrize(("line", "says"), LINES, ids=range(len(LINES)))
def test_bad_line(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(f"{GOOD}\n{line}\n".encode())
    error = refusal(path)
    assert error.what.startswith(f"Line 2 of {path} ")
    assert says in error.what


def test_labels_that_no_table_takes(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for key in ("prompt_id", "finish_reason"):
        path.write_text(GOOD[:-1] + f', "{key}": "\\ud83d"}}')
        assert f"has a {key} with an unpaired surrogate" in refusal(path).what
    path.write_text(GOOD[:-1] + ', "step": 9223372036854775808}')
    assert "has a step that is a number, not a 64-bit integer" in refusal(path).what


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"\n\xff\xfe\n")
    assert refusal(path).what.startswith(f"Line 2 of {path} is not valid UTF-8")


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_file_without_a_row(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.jsonl").write_bytes(content)
    assert "has no rows" in refusal(tmp_path / "run.jsonl").what
    assert "has no rows" in refusal(write_no_rows(tmp_path)).what


def write_no_rows(folder: Path) -> Path:
    table = pq.read_table(write_parquet(folder, [row()]))
    pq.write_table(table.slice(0, 0), folder / "run.parquet")
    return folder / "run.parquet"


def test_hostile_text_never_reaches_a_message_raw(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\u202e" + "A" * 5_000_000
    error = refusal(write_jsonl(tmp_path, [{evil: 1, "response_token_ids": [1]}]))
    assert "\\x1b]0;owned\\x07\\u202e" in error.what
    refusal(write_jsonl(tmp_path, [row(step=evil)]))
    refusal(write_jsonl(tmp_path, [row(rollout_logprobs=[evil, evil])]))
    many = refusal(write_jsonl(tmp_path, [{f"{index}{evil[:99]}": 1 for index in range(1000)}]))
    assert "and 980 more" in many.what
    refusal(write_parquet(tmp_path, [{evil[:1000]: 1}], **{evil[:1000]: pa.int8()}))
    nested = pa.struct([(evil[:1000], pa.int8())])
    refusal(write_parquet(tmp_path, [row(loss_mask=[{evil[:1000]: 1}])], loss_mask=pa.list_(nested)))


class TestParquet:
    @pytest.mark.parametrize(
        ("key", "values", "said"),
        [
            ("prompt_token_ids", [[1.0]], "prompt_token_ids of the type float64"),
            ("prompt_token_ids", [[True]], "prompt_token_ids of the type bool"),
            ("response_token_ids", [3], "response_token_ids that is a number, not a list"),
            ("response_token_ids", [[[8, 9]]], "a list as response_token_ids[0], which is not an integer"),
            ("rollout_logprobs", [["x", "y"]], "text as rollout_logprobs[0], which is not a number or null"),
            ("rollout_logprobs", [[True, False]], "rollout_logprobs of the type bool"),
            ("trainer_logprobs", [-1.0], "trainer_logprobs that is a number, not a list"),
            ("loss_mask", [["1", "1"]], "text as loss_mask[0], which is not 0 or 1"),
        ],
    )
    def test_column_type(self, tmp_path: Path, key: str, values: list[Any], said: str) -> None:
        column = pa.array(values)
        error = refusal(write_parquet(tmp_path, [row(**{key: values[0]})], **{key: column.type}))
        assert error.what.startswith("Row 1 of ")
        assert f"has {said}" in error.what

    @pytest.mark.parametrize(
        ("second", "says"),
        [
            (row(response_token_ids=None), "has no response_token_ids"),
            (row(response_token_ids=[8, None]), "has null as response_token_ids[1]"),
            (row(loss_mask=[None, 1]), "has null as loss_mask[0]"),
        ],
    )
    @pytest.mark.parametrize("mask", [pa.bool_(), pa.int8(), pa.float32()])
    def test_null(self, tmp_path: Path, second: Row, says: str, mask: pa.DataType) -> None:
        flag = bool if pa.types.is_boolean(mask) else int
        rows = [row(loss_mask=[1, 1]), {"loss_mask": [1, 1]} | second]
        for each in rows:
            each["loss_mask"] = [None if value is None else flag(value) for value in each["loss_mask"]]
        error = refusal(write_parquet(tmp_path, rows, loss_mask=pa.list_(mask)))
        assert error.what.startswith("Row 2 of ")
        # Arrow has no null among numpy's floats but NaN.
        assert (says.replace("null", "nan") if mask == pa.float32() and "mask" in says else says) in error.what

    def test_ids_beyond_int64(self, tmp_path: Path) -> None:
        path = write_parquet(
            tmp_path, [row(response_token_ids=[1, 2**64 - 1])], response_token_ids=pa.list_(pa.uint64())
        )
        assert "has 18446744073709551615 as response_token_ids[1], which is outside" in refusal(path).what

    @pytest.mark.parametrize("key", ["prompt_id", "finish_reason"])
    def test_text_that_is_not_utf8(self, tmp_path: Path, key: str) -> None:
        table = pq.read_table(write_parquet(tmp_path, [row()]))
        invalid = pa.Array.from_buffers(
            pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xf6")]
        )
        pq.write_table(table.append_column(key, invalid), tmp_path / "run.parquet")
        assert "codec can't decode byte 0xf6" in refusal(tmp_path / "run.parquet").what

    def test_a_column_twice(self, tmp_path: Path) -> None:
        table = pq.read_table(write_parquet(tmp_path, [row()]))
        pq.write_table(table.append_column("rollout_logprobs", table["rollout_logprobs"]), tmp_path / "run.parquet")
        assert "has the column rollout_logprobs twice" in refusal(tmp_path / "run.parquet").what

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: b"",
            lambda content: content[:-9],
            lambda content: b"PAR1" + b"\0" * 100 + b"PAR1",
            lambda content: GOOD.encode(),
            lambda content: content[:4] + b"\xff" * 400 + content[404:],
        ],
        ids=["empty", "cut", "garbage", "json", "pages"],
    )
    def test_damaged_file(self, tmp_path: Path, damage: Any) -> None:
        rows = [row(response_token_ids=[i, 1], rollout_logprobs=[-i / 7, -1.0]) for i in range(200)]
        path = write_parquet(tmp_path, rows)
        path.write_bytes(damage(path.read_bytes()))
        assert "truncated or not a Parquet file" in refusal(path).what


class TestPath:
    def test_missing_pipe_and_impossible_names(self, tmp_path: Path) -> None:
        assert "does not exist" in refusal(tmp_path / "none.jsonl").what
        os.mkfifo(tmp_path / "pipe.jsonl")
        for name in ("pipe.jsonl", "x" * 5000 + ".jsonl"):
            assert "is neither a file nor a folder, or is not accessible" in refusal(tmp_path / name).what
        with pytest.raises(IngestError, match="is neither a file nor a folder"):
            read("nul\0.jsonl")

    def test_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_jsonl(tmp_path, [row()])

        def denied(*_: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", denied)  # mode bits do not stop root, as whom tests may run
        assert "cannot be read: Permission denied" in refusal(path).what

    @pytest.mark.parametrize("after", [0, 1])
    def test_a_disk_that_fails_while_reading(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        def broken(file: DumpFile) -> Iterator[Record]:
            for number in range(after):
                yield Record(row(), Place(file.name, "Line"), number + 1)
            raise OSError(5, "Input/output error")

        monkeypatch.setitem(containers.CONTAINERS, "jsonl", broken)
        assert "cannot be read: Input/output error" in refusal(write_jsonl(tmp_path, [row()])).what

    def test_a_disk_that_is_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        path = write_jsonl(tmp_path, [row()])
        monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(DiskFull) as caught:
            read(path)
        assert "--resume" not in caught.value.fix  # there is no run yet

    @pytest.mark.parametrize("name", ["run.csv", "run.arrow", "run", ".jsonl", "run.parquet.1", "RUN.NDJSON"])
    def test_other_suffixes_are_told_by_their_first_bytes(self, tmp_path: Path, name: str) -> None:
        write_jsonl(tmp_path, [row()], name)
        assert read(tmp_path / name).rows == read(write_jsonl(tmp_path, [row()])).rows

    def test_parquet_by_another_name(self, tmp_path: Path) -> None:
        assert len(read(write_parquet(tmp_path, [row()], "run.bin"))["row"]) == 1

    @pytest.mark.parametrize(
        "content", [b"", b"step,loss\n1,2\n", b"\x93NUMPY", b"\x1f\x8b\x08", b"hello"], ids=range(5)
    )
    def test_what_is_none_of_them(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "run.dat").write_bytes(content)
        error = refusal(tmp_path / "run.dat")
        assert "is neither JSON, Parquet, SQLite nor a pickle" in error.what
        assert "row per sequence" in error.fix

    @pytest.mark.parametrize("suffix", [".pt", ".PKL", ".pickle", ".npz", ".pth", ".npy", ".bin"])
    def test_a_pickle_is_never_opened(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"run{suffix}"
        path.write_bytes(pickle.dumps(Bomb()))
        assert "may contain a pickle" in refusal(path).what
        assert not (tmp_path / "ran").exists()

    def test_a_pickle_by_another_name_is_not_run_either(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("run.jsonl", "run.parquet"):
            (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
            refusal(tmp_path / name)
        assert not (tmp_path / "ran").exists()


class Bomb:
    """A pickle of it makes the folder `ran` where it is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_numpy_warns_of_nothing_in_extreme_values(tmp_path: Path) -> None:
    values = [1e308, -1e308, float("nan"), float("inf")]
    found = read(
        write_jsonl(tmp_path, [row(response_token_ids=[1] * 4, rollout_logprobs=values, trainer_logprobs=None)])
    )
    np.testing.assert_array_equal(found.values("rollout_logprobs"), values)
