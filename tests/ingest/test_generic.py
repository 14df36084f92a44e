"""Recorded sequences: what is read, what is refused and with which words, and that both formats give the same."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest import read_recorded
from mismatch_probe.ingest.base import RecordedRun

ROW: dict[str, Any] = {
    "prompt_token_ids": [1, 2],
    "response_token_ids": [3, 4, 5],
    "rollout_logprobs": [-0.5, -1.0, -2.5],
}
Write = Callable[..., Path]


@pytest.fixture
def jsonl(tmp_path: Path) -> Write:
    def write(*rows: Any) -> Path:
        path = tmp_path / "run.jsonl"
        lines = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
        return path

    return write


@pytest.fixture
def parquet(tmp_path: Path) -> Write:
    def write(rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
        path = tmp_path / "run.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        return path

    return write


def same(first: RecordedRun, second: RecordedRun) -> None:
    for name in ("prompt_token_ids", "response_token_ids", "rollout_logprobs", "trainer_logprobs", "loss_mask"):
        here, there = getattr(first, name), getattr(second, name)
        assert (here is None) == (there is None), name
        if here is not None:
            np.testing.assert_array_equal(here.offsets, there.offsets)
            np.testing.assert_array_equal(here.values, there.values)
    assert first.prompt_ids == second.prompt_ids
    assert first.finish_reasons == second.finish_reasons
    np.testing.assert_array_equal(first.sample_ids, second.sample_ids)
    if first.step is not None or second.step is not None:
        np.testing.assert_array_equal(first.step, second.step)


LOGPROB = st.floats(-50, 0) | st.just(math.nan) | st.just(-math.inf)


@st.composite
def recorded_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    sides = draw(st.sampled_from([("rollout",), ("trainer",), ("rollout", "trainer")]))
    masked, stepped = draw(st.booleans()), draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 5))
        row: dict[str, Any] = {
            "prompt_token_ids": draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3)),
            "response_token_ids": draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)),
        }
        for side in sides:
            row[f"{side}_logprobs"] = draw(st.lists(LOGPROB, min_size=length, max_size=length))
        if masked:
            row["loss_mask"] = [1, *draw(st.lists(st.sampled_from([0, 1]), min_size=length - 1, max_size=length - 1))]
        if stepped:
            row["step"] = draw(st.integers(0, 9))
        rows.append(row)
    return rows


@settings(deadline=None, max_examples=60)
@given(rows=recorded_rows())
def test_both_formats_give_the_same(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("formats")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    first, second = read_recorded(folder / "a.jsonl"), read_recorded(folder / "a.parquet")
    same(first, second)
    assert first.response_token_ids[0].tolist() == rows[0]["response_token_ids"]
    assert first.sides == tuple(side for side in ("rollout", "trainer") if f"{side}_logprobs" in rows[0])
    assert first.source.n_tokens == sum(len(row["response_token_ids"]) for row in rows)


class TestWhatIsRead:
    def test_prompts_are_clusters(self, jsonl: Write) -> None:
        other = {**ROW, "prompt_token_ids": [9]}
        run = read_recorded(jsonl(ROW, other, ROW))
        assert run.prompt_ids[0] == run.prompt_ids[2] != run.prompt_ids[1]
        assert run.sample_ids.tolist() == [0, 0, 1]

    def test_names_of_the_files_own(self, jsonl: Write) -> None:
        run = read_recorded(jsonl({**ROW, "prompt_id": "q", "finish_reason": "stop"}, {**ROW, "prompt_id": 7}))
        assert run.prompt_ids == ("q", "7")
        assert run.finish_reasons == ("stop", "")

    def test_non_finite_values_stay(self, jsonl: Write) -> None:
        path = jsonl(json.dumps({**ROW, "rollout_logprobs": [None, math.nan, -math.inf]}))
        values = read_recorded(path).rollout_logprobs
        assert values is not None
        assert np.isnan(values[0][:2]).all()
        assert values[0][2] == -math.inf

    def test_what_was_left_out_is_counted(self, jsonl: Write) -> None:
        empty = {**ROW, "response_token_ids": [], "rollout_logprobs": []}
        masked = {**ROW, "loss_mask": [0, 0, 0], "rollout_logprobs": [0.5, -1.0, -1.0]}
        first = {**ROW, "loss_mask": [1, 0, True], "rollout_logprobs": [1e-7, 3.0, 0.25]}
        source = read_recorded(jsonl(first, empty | {"loss_mask": []}, "", masked)).source
        assert (source.n_rows, source.n_sequences, source.n_empty_responses) == (3, 2, 1)
        assert (source.n_tokens, source.n_masked_tokens, source.n_masked_sequences) == (6, 4, 1)
        assert source.n_positive == {"rollout": 1}

    def test_other_columns_are_named(self, jsonl: Write) -> None:
        assert read_recorded(jsonl({**ROW, "reward": 1, "a\x1b[31m": 2})).source.ignored_columns == (
            "a\\x1b[31m",
            "reward",
        )

    def test_a_bom_and_windows_line_ends(self, jsonl: Write) -> None:
        line = json.dumps(ROW).encode()
        assert len(read_recorded(jsonl(b"\xef\xbb\xbf" + line + b"\r", line + b"\r"))) == 2

    def test_a_line_separator_inside_a_string(self, jsonl: Write) -> None:
        assert len(read_recorded(jsonl(json.dumps({**ROW, "note": "a\u2028b"}, ensure_ascii=False), ROW))) == 2

    def test_float32_columns_stay_narrow(self, parquet: Write) -> None:
        schema = pa.schema(
            [
                ("prompt_token_ids", pa.list_(pa.int64())),
                ("response_token_ids", pa.large_list(pa.int32())),
                ("rollout_logprobs", pa.list_(pa.float32())),
            ]
        )
        values = read_recorded(parquet([ROW], schema)).rollout_logprobs
        assert values is not None
        assert values.values.dtype == np.float32

    def test_a_million_tokens_make_no_python_objects(self, tmp_path: Path) -> None:
        import tracemalloc

        n, length = 1000, 1000
        ids = pa.ListArray.from_arrays(
            np.arange(0, n * length + 1, length, dtype=np.int32), np.zeros(n * length, np.int32)
        )
        values = pa.ListArray.from_arrays(ids.offsets, np.full(n * length, -1.0, np.float32))
        table = pa.table({"prompt_token_ids": ids, "response_token_ids": ids, "rollout_logprobs": values})
        pq.write_table(table, tmp_path / "big.parquet")
        tracemalloc.start()
        run = read_recorded(tmp_path / "big.parquet")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert run.source.n_tokens == n * length
        assert peak < 60e6  # 12 bytes a token are kept; a list of floats would be 32 for each


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("row", "sentence"),
        [
            (
                {**ROW, "rollout_logprobs": [-1.0] * 5},
                "Line 2 .* has 5 rollout_logprobs for 3 .*cover prompt and response",
            ),
            ({**ROW, "rollout_logprobs": [-1.0] * 4}, "without the first token"),
            ({**ROW, "rollout_logprobs": [-1.0] * 2}, "One value is missing"),
            ({**ROW, "loss_mask": [1]}, "has 1 loss_mask for 3"),
            ({**ROW, "loss_mask": [1, 2, 0]}, r"has 2.* as loss_mask\[1\], which is neither 0 nor 1"),
            (
                {**ROW, "response_token_ids": [3, 4.0, 5]},
                r"has 4.0 as response_token_ids\[1\], which is not an integer",
            ),
            ({**ROW, "response_token_ids": [3, True, 5]}, r"true or false as response_token_ids\[1\]"),
            ({**ROW, "response_token_ids": [3, -4, 5]}, r"has -4 as response_token_ids\[1\], which is outside"),
            ({**ROW, "response_token_ids": [3, 2**31, 5]}, "outside 0 to 2147483647"),
            ({**ROW, "response_token_ids": [3, 2**70, 5]}, "outside 0 to 2147483647"),
            ({**ROW, "rollout_logprobs": ["a", 0, 0]}, r"text as rollout_logprobs\[0\]"),
            ({**ROW, "rollout_logprobs": "abc"}, "has rollout_logprobs that is text, not a list"),
            ({**ROW, "step": 3}, "has step, which line 1 does not have"),
            ({**ROW, "trainer_logprobs": [0, 0, 0]}, "has trainer_logprobs, which line 1 does not have"),
            ({k: v for k, v in ROW.items() if k != "rollout_logprobs"}, "has no rollout_logprobs, which line 1 has"),
            ({**ROW, "prompt_id": "x"}, "has prompt_id, which line 1 does not have"),
            ({"prompt_token_ids": [1], "x\x1b": 1}, r"has no response_token_ids; its keys are .*x\\x1b"),
            ({"prompt": "Hi", "completion": "there"}, "has text but no prompt_token_ids.*can give other ids"),
            ({"prompt_token_ids": "Hi", "response_token_ids": [1]}, "has text but no prompt_token_ids"),
            ("[1, 2]", "is a list, not a JSON object"),
            ('{"a": 1} x', "is not valid JSON"),
            ("[" * 100_000, "nests too deeply"),
            (b'{"prompt_id": "\xff"}', "is not valid UTF-8"),
            (json.dumps(ROW)[:-1] + ', "rollout_logprobs": [0, 0, 0]}', "has the key rollout_logprobs twice"),
            ('{"prompt_token_ids": [1], "response_token_ids": [2], "rollout_logprobs": [1e999]}', None),
        ],
    )
    def test_lines(self, jsonl: Write, row: Any, sentence: str | None) -> None:
        path = jsonl(ROW, row)
        if sentence is None:  # JSON reads 1e999 as infinity, which is a value
            assert len(read_recorded(path)) == 2
            return
        with pytest.raises(IngestError, match=sentence) as refused:
            read_recorded(path)
        assert refused.value.fix
        assert "\x1b" not in str(refused.value)
        assert len(str(refused.value)) < 1500

    @pytest.mark.parametrize("step", [1.5, True, "7", 2**63])
    def test_steps(self, jsonl: Write, step: Any) -> None:
        with pytest.raises(IngestError, match=r"has a step that is .*, not a 64-bit integer"):
            read_recorded(jsonl({**ROW, "step": step}))

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (b"", "has no rows"),
            (b"\n\n", "has no rows"),
            (json.dumps({**ROW, "response_token_ids": [], "rollout_logprobs": []}).encode(), "no response token"),
            (json.dumps({**ROW, "loss_mask": [0, 0, 0]}).encode(), "loss_mask of only zeros"),
            (json.dumps({k: v for k, v in ROW.items() if "log" not in k}).encode(), "has neither rollout_logprobs nor"),
        ],
    )
    def test_files(self, tmp_path: Path, content: bytes, sentence: str) -> None:
        path = tmp_path / "run.jsonl"
        path.write_bytes(content)
        with pytest.raises(IngestError, match=sentence):
            read_recorded(path)

    @pytest.mark.parametrize("suffix", [".pt", ".pkl", ".npz", ".bin"])
    def test_pickles_are_never_opened(self, tmp_path: Path, suffix: str) -> None:
        with pytest.raises(IngestError, match="may contain a pickle"):
            read_recorded(tmp_path / f"run{suffix}")  # it need not even exist

    @pytest.mark.parametrize("name", ["run.csv", "run", "run.arrow"])
    def test_other_suffixes(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(IngestError, match=r"supported are \.jsonl and \.parquet"):
            read_recorded(tmp_path / name)

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(IngestError, match="does not exist"):
            read_recorded(tmp_path / "none.jsonl")
        (tmp_path / "folder.jsonl").mkdir()
        os.mkfifo(tmp_path / "pipe.jsonl")
        for name in ("folder.jsonl", "pipe.jsonl", "a\x00.jsonl"):
            with pytest.raises(IngestError, match="is not a regular file"):
                read_recorded(tmp_path / name)

    @pytest.mark.parametrize(
        ("column", "values", "sentence"),
        [
            ("response_token_ids", [["a"]], "has text but no response_token_ids"),
            ("response_token_ids", [[1.5, 2.0, 3.0]], "has the type .* in the column response_token_ids"),
            ("response_token_ids", [3], "has the type .* in the column response_token_ids"),
            ("rollout_logprobs", [["x"]], "has the type .* in the column rollout_logprobs"),
            ("response_token_ids", [[1, None, 3]], r"has null as response_token_ids\[1\]"),
            ("response_token_ids", [None], "has null as response_token_ids"),
        ],
    )
    def test_columns(self, parquet: Write, column: str, values: list[Any], sentence: str) -> None:
        with pytest.raises(IngestError, match=sentence):
            read_recorded(parquet([{**ROW, column: values[0]}]))

    def test_a_cut_parquet_file(self, parquet: Write) -> None:
        path = parquet([ROW] * 50)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(IngestError, match="truncated or not a Parquet file"):
            read_recorded(path)
