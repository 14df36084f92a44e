"""Keys of the generic format: whole sequences, single values, names, and columns that are called otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.keys import KEYS, PER_TOKEN
from mismatch_probe.ingest.read import parse_map
from tests.ingest.rows import Row, read, row, write_jsonl, write_parquet

WRITERS = pytest.mark.parametrize("write", [write_jsonl, write_parquet])
INTEGERS, FLOATS = pa.list_(pa.int64()), pa.list_(pa.float64())


def refusal(path: Path, **options: Any) -> IngestError:
    with pytest.raises(IngestError) as caught:
        read(path, **options)
    assert (caught.value.what + caught.value.fix).isprintable()
    return caught.value


def written(write: Any, folder: Path, rows: list[Row], **types: pa.DataType) -> Path:
    path: Path = write(folder, rows, **(types if write is write_parquet else {}))
    return path


@WRITERS
class TestWholeSequences:
    TYPES: ClassVar[dict[str, Any]] = {
        "token_ids": INTEGERS,
        "prompt_length": pa.int32(),
        "turn": INTEGERS,
        "advantages": FLOATS,
    }

    def whole(self, **changes: Any) -> Row:
        good: Row = {"token_ids": [5, 6, 7, 8, 9], "rollout_logprobs": [-0.1, -0.2, -0.3, -0.4, -0.5]}
        return good | changes

    def test_a_length_says_where_the_response_begins(self, tmp_path: Path, write: Any) -> None:
        rows = [self.whole(prompt_length=3, loss_mask=[0, 0, 0, 1, 0]), self.whole(prompt_length=0, loss_mask=[1] * 5)]
        found = read(written(write, tmp_path, rows, **self.TYPES))
        assert found["prompt_token_ids"] == [[5, 6, 7], []]
        assert found["response_token_ids"] == [[8, 9], [5, 6, 7, 8, 9]]
        assert found["rollout_logprobs"] == [[-0.4, -0.5], rows[1]["rollout_logprobs"]]
        assert found["loss_mask"] == [[True, False], [True] * 5]
        assert not {"token_ids", "prompt_length"} & set(found.table.schema.names)

    def test_or_the_first_token_that_counts(self, tmp_path: Path, write: Any) -> None:
        row_ = self.whole(loss_mask=[0, 0, 1, 0, 1], turn=[0, 0, 0, 1, 1], step=4)
        found = read(written(write, tmp_path, [row_], **self.TYPES))
        assert (found["prompt_token_ids"], found["response_token_ids"]) == ([[5, 6]], [[7, 8, 9]])
        assert (found["loss_mask"], found["turn"], found["step"]) == ([[True, False, True]], [[0, 1, 1]], [4])

    def test_lists_along_the_response_are_taken_as_they_are(self, tmp_path: Path, write: Any) -> None:
        row_ = self.whole(prompt_length=3, trainer_logprobs=[-1.0, -2.0])
        found = read(written(write, tmp_path, [row_], **self.TYPES))
        assert (found["rollout_logprobs"], found["trainer_logprobs"]) == ([[-0.4, -0.5]], [[-1, -2]])

    def test_a_mask_of_only_zeros_leaves_no_response(self, tmp_path: Path, write: Any) -> None:
        rows = [self.whole(loss_mask=[0] * 5), self.whole(loss_mask=[0, 0, 0, 0, 1])]
        found = read(written(write, tmp_path, rows, **self.TYPES))
        assert (found["row"], found.file.n_empty_responses) == ([2], 1)

    @pytest.mark.parametrize(
        "changes",
        [{}, {"prompt_length": 6}, {"prompt_length": -1}, {"loss_mask": [0, 1]}, {"loss_mask": []}],
        ids=range(5),
    )
    def test_nothing_says_where_it_begins(self, tmp_path: Path, write: Any, changes: Row) -> None:
        error = refusal(written(write, tmp_path, [self.whole(**changes)], **self.TYPES))
        assert "nothing says where the response begins" in error.what
        assert "prompt_length" in error.fix

    def test_a_response_of_its_own_wins(self, tmp_path: Path, write: Any) -> None:
        found = read(written(write, tmp_path, [row(token_ids=[1, 2, 3])], token_ids=INTEGERS))
        assert (found["prompt_token_ids"], found["response_token_ids"]) == ([[5, 6, 7]], [[8, 9]])


@pytest.mark.parametrize("value", [True, 1.0, "3", [3]])
def test_a_length_that_is_none(tmp_path: Path, value: Any) -> None:
    path = write_jsonl(tmp_path, [{"token_ids": [1, 2], "rollout_logprobs": [0, 0], "prompt_length": value}])
    assert "nothing says where the response begins" in refusal(path).what


@pytest.mark.parametrize("mask", [["a", "b"], [[1], [0]], [0, [1]], {"0": 1}, "01"])
def test_a_mask_that_is_none(tmp_path: Path, mask: Any) -> None:
    path = write_jsonl(tmp_path, [{"token_ids": [1, 2], "rollout_logprobs": [0, 0], "loss_mask": mask}])
    assert "loss_mask" in refusal(path).what


@WRITERS
class TestValues:
    def test_one_number_stands_for_all_tokens(self, tmp_path: Path, write: Any) -> None:
        rows = [row(weight_version=3, advantages=-0.5), row(weight_version=4, advantages=1)]
        found = read(written(write, tmp_path, rows, weight_version=pa.int16(), advantages=pa.float32()))
        assert found["weight_version"] == [[3, 3], [4, 4]]
        assert found["advantages"] == [[-0.5, -0.5], [1, 1]]
        assert {"weight_version", "advantages"} <= set(found.file.keys)

    def test_or_each_token_has_its_own(self, tmp_path: Path, write: Any) -> None:
        found = read(written(write, tmp_path, [row(weight_version=[3, -1])], weight_version=pa.list_(pa.int8())))
        assert found["weight_version"] == [[3, -1]]

    @pytest.mark.parametrize("key", [name for name in PER_TOKEN if KEYS[name].kind == "logprob"])
    def test_a_log_prob_is_a_list(self, tmp_path: Path, write: Any, key: str) -> None:
        error = refusal(written(write, tmp_path, [row(**{key: -0.5})], **{key: pa.float64()}))
        assert f"has {key} that is a number, not a list" in error.what

    def test_every_log_prob_is_read(self, tmp_path: Path, write: Any) -> None:
        keys = [name for name in PER_TOKEN if KEYS[name].kind in ("logprob", "number")]
        values = {name: [-float(index), math.nan] for index, name in enumerate(keys)}
        found = read(written(write, tmp_path, [row(**values)], **dict.fromkeys(keys, FLOATS)))
        for name in keys:
            np.testing.assert_array_equal(found.values(name), values[name])
        assert set(keys) <= set(found.file.keys)

    def test_tags_are_texts_numbers_or_lists_of_them(self, tmp_path: Path, write: Any) -> None:
        found = read(written(write, tmp_path, [row(tags=["math", "gsm8k"]), row(tags=[])], tags=pa.list_(pa.string())))
        assert found["tags"] == ["math, gsm8k", ""]
        found = read(written(write, tmp_path, [row(tags=[1, 2])], tags=pa.list_(pa.int32())))
        assert found["tags"] == ["1, 2"]
        error = refusal(written(write, tmp_path, [row(tags=[["a"]])], tags=pa.list_(pa.list_(pa.string()))))
        assert "has a tags that is a list" in error.what

    def test_values_of_a_row(self, tmp_path: Path, write: Any) -> None:
        values = {"trainer_version": 3, "pack_index": 0, "pack_id": "7", "reward": 0.5, "replica": "r"}
        types = {"trainer_version": pa.int8(), "pack_index": pa.uint8(), "pack_id": pa.string()}
        types |= {"reward": pa.float16(), "replica": pa.string()}
        found = read(written(write, tmp_path, [row(**values)], **types))
        assert {key: found[key] for key in values} == {key: [value] for key, value in values.items()}

    def test_integers_beyond_64_bits(self, tmp_path: Path, write: Any) -> None:
        rows = [row(weight_version=[1, 2**64 - 1])]
        error = refusal(written(write, tmp_path, rows, weight_version=pa.list_(pa.uint64())))
        assert "has a number in weight_version that is outside 64 bits" in error.what
        assert "has a step that is" in refusal(written(write, tmp_path, [row(step=2**63)], step=pa.uint64())).what


@pytest.mark.parametrize("key", ["reward", "advantages"])
def test_a_number_no_float_holds(tmp_path: Path, key: str) -> None:
    path = write_jsonl(tmp_path, [row(**{key: 10**400})])
    assert "outside what a float64 holds" in refusal(path).what


@pytest.mark.parametrize("value", [True, "1", {"a": 1}, [1.0]])
def test_a_reward_that_is_none(tmp_path: Path, value: Any) -> None:
    assert "has a reward that is " in refusal(write_jsonl(tmp_path, [row(reward=value)])).what


class TestMap:
    OTHER: ClassVar[dict[str, Any]] = {
        "prompt_tokens": [5, 6, 7],
        "output_tokens": [8, 9],
        "engine_lp": [-0.5, -1.25],
        "learner_lp": [-0.75, -1.0],
        "mask": [1, 0],
        "train_step": 3,
        "note": "x",
    }
    MAP: ClassVar[dict[str, Any]] = {
        "prompt_tokens": "prompt_token_ids",
        "output_tokens": "response_token_ids",
        "engine_lp": "rollout_logprobs",
        "learner_lp": "trainer_logprobs",
    }
    TYPES: ClassVar[dict[str, Any]] = {
        "prompt_tokens": INTEGERS,
        "output_tokens": INTEGERS,
        "engine_lp": FLOATS,
        "learner_lp": FLOATS,
        "mask": INTEGERS,
        "train_step": pa.int64(),
        "note": pa.string(),
    }

    @WRITERS
    def test_columns_are_renamed(self, tmp_path: Path, write: Any) -> None:
        path = written(write, tmp_path, [self.OTHER], **self.TYPES)
        found = read(path, map=self.MAP)
        assert found.rows == read(write(tmp_path, [row()])).rows
        assert found.file.ignored_columns == ("mask", "note", "train_step")

    @WRITERS
    def test_what_is_probably_meant_can_be_typed(self, tmp_path: Path, write: Any) -> None:
        """What the error says to type is read as it is."""
        error = refusal(written(write, tmp_path, [self.OTHER], **self.TYPES))
        keys = "'engine_lp', 'learner_lp', 'mask', 'note', 'output_tokens', 'prompt_tokens', 'train_step'"
        assert f"is of no known format; its keys are {keys}" in error.what
        typed = error.fix.partition("--map ")[2].rstrip(".").split(",")
        assert parse_map(typed) == {**self.MAP, "mask": "loss_mask", "train_step": "step"}
        found = read(written(write, tmp_path, [self.OTHER], **self.TYPES), map=parse_map(typed))
        assert (found["loss_mask"], found["step"]) == ([[True, False]], [3])

    def test_a_key_of_the_dump_gives_way_to_one_that_is_named(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path, [row(recomputed=[-3.0, -4.0])])
        found = read(path, map={"recomputed": "rollout_logprobs"})
        assert found["rollout_logprobs"] == [[-3, -4]]

    def test_two_keys_change_places(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path, [row()])
        swap = {"rollout_logprobs": "trainer_logprobs", "trainer_logprobs": "rollout_logprobs"}
        assert read(path, map=swap)["rollout_logprobs"] == [[-0.75, -1.0]]

    @WRITERS
    def test_a_column_that_is_not_there(self, tmp_path: Path, write: Any) -> None:
        error = refusal(write(tmp_path, [row()]), map={"engine_lp": "rollout_logprobs"})
        assert "has no engine_lp, which --map names; its keys are 'prompt_token_ids'" in error.what

    def test_ids_that_are_not_named(self, tmp_path: Path) -> None:
        error = refusal(write_jsonl(tmp_path, [self.OTHER]), map={"engine_lp": "rollout_logprobs"})
        assert "has no prompt_token_ids" in error.what

    def test_it_is_for_the_generic_format(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path, [self.OTHER])
        assert read(path, map=self.MAP, format="generic").file.format == "generic"

    @pytest.mark.parametrize(
        ("text", "what", "fix"),
        [
            (
                "rollout_logprobs=engine_lp",
                "'engine_lp', which is not a key of the generic",
                "engine_lp=rollout_",
            ),
            ("engine_lp=rollout_logprob", "'rollout_logprob', which is not a key", "rollout_logprobs"),
            ("engine_lp", "is not of the form theirs=ours", "--map theirs=ours"),
            ("=step", "is not of the form theirs=ours", "--map theirs=ours"),
            ("engine_lp=", "'', which is not a key", "rollout_logprobs"),
            ("a\x1b=b\x1b", r"'b\x1b', which is not a key", "rollout_logprobs"),
        ],
    )
    def test_mistakes(self, text: str, what: str, fix: str) -> None:
        with pytest.raises(IngestError) as caught:
            parse_map([text])
        assert what in caught.value.what
        assert fix in caught.value.fix
        assert caught.value.what.isprintable()

    def test_names_with_an_equals_sign(self) -> None:
        assert parse_map(["a=b=step", "c=reward"]) == {"a=b": "step", "c": "reward"}

    def test_two_columns_for_one_key(self) -> None:
        with pytest.raises(IngestError, match="step twice"):
            parse_map(["a=step", "b=step"])

    def test_nothing_is_suggested_for_what_looks_like_nothing(self, tmp_path: Path) -> None:
        error = refusal(write_jsonl(tmp_path, [{"loss": 0.5, "lr": 1e-5}]))
        assert "is of no known format; its keys are 'loss', 'lr'" in error.what
        assert "--map" in error.fix


def mangled(draw: st.DrawFn) -> Any:
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(-9999.0)
    return draw(leaf | st.lists(leaf, max_size=3) | st.lists(st.lists(leaf, max_size=2), max_size=2))


@st.composite
def hostile(draw: st.DrawFn) -> list[Row]:
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        one: Row = row()
        for key in draw(st.lists(st.sampled_from([*KEYS, "token_ids", "prompt_length", "x"]), max_size=3)):
            one[key] = mangled(draw)
        rows.append(one)
    return rows


@settings(max_examples=300, deadline=None)
@given(hostile(), st.integers(0, 5), st.binary(max_size=4))
def test_whatever_is_there_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], cut: int, junk: bytes
) -> None:
    """Nothing but `IngestError` ends a reading, and what is read adds up."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    text = "".join(json.dumps(one) + "\n" for one in rows).encode()
    for content in (text, text[: len(text) - 7 * cut] + junk):
        path.write_bytes(content)
        try:
            file = read(path).file
        except IngestError:
            pass
        else:
            assert file.n_rows == file.n_sequences + file.n_left_out + file.n_empty_responses
