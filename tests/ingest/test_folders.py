"""A folder is one dump: which files of it are read, in which order, and what is said where they do not fit together."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest import collect, read
from mismatch_probe.ingest.read import ReadOptions, read_dump
from mismatch_probe.results.dump import Dump
from tests.factories.dump import make_dump
from tests.ingest import rows
from tests.ingest.rows import row, write_jsonl, write_parquet

Files = dict[str, list[Any]]


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    folder = tmp_path / "dump"
    folder.mkdir()
    return folder


def write(folder: Path, files: Files) -> Path:
    """Writes JSON lines or Parquet, by the suffix."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (write_parquet if name.endswith(".parquet") else write_jsonl)(path.parent, content, path.name)
    return folder


def refusal(folder: Path, **options: Any) -> IngestError:
    with pytest.raises(IngestError) as caught:
        rows.read(folder, **options)
    assert (caught.value.what + caught.value.fix).isprintable()
    return caught.value


class TestWhichFiles:
    def test_steps_and_ranks_in_natural_order(self, dump: Path) -> None:
        names = [
            "s2/worker_0.jsonl",
            "s2/worker_10.jsonl",
            "s2/worker_9.jsonl",
            "s10/worker_0.jsonl",
            "9.jsonl",
        ]
        write(dump, {name: [row(step=index), row(step=index)] for index, name in enumerate(names)})
        found = rows.read(dump)
        expected = [
            "9.jsonl",
            "s2/worker_0.jsonl",
            "s2/worker_9.jsonl",
            "s2/worker_10.jsonl",
            "s10/worker_0.jsonl",
        ]
        assert found["file"] == [f"{dump}/{name}" for name in expected for _ in range(2)]
        assert found["step"] == [names.index(name) for name in expected for _ in range(2)]
        assert found["row"] == [1, 2] * 5
        assert found["sample_id"] == list(range(10))
        assert (found.file.n_files, found.file.n_rows, found.file.path) == (5, 10, str(dump))
        digests = [hashlib.sha256((dump / name).read_bytes()).hexdigest() for name in expected]
        assert found.file.sha256 == hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def test_containers_of_one_format_may_be_mixed(self, dump: Path) -> None:
        found = rows.read(
            write(dump, {"a.jsonl": [row(step=1)], "b.parquet": [row(step=2)], "c.ndjson": [row(step=3)]})
        )
        assert (found["step"], found.file.n_files) == ([1, 2, 3], 3)

    def test_what_is_hidden_or_of_another_kind_is_not_read(self, dump: Path) -> None:
        write(dump, {"a.jsonl": [row()], ".b.jsonl": [row()], ".cache/c.jsonl": [row()]})
        (dump / "config.yaml").write_text("a: 1")
        (dump / "log.txt").write_text("{")
        (dump / "metadata.json").write_text('{"project": "x"}')
        os.mkfifo(dump / "pipe.jsonl")
        found = rows.read(dump)
        assert (found["file"], found.file.n_files) == ([f"{dump}/a.jsonl"], 1)

    def test_empty_files_among_others(self, dump: Path) -> None:
        write(dump, {"0.jsonl": [], "1.jsonl": [row(step=1)], "2.jsonl": [], "3.jsonl": [row(step=3)]})
        (dump / "4.jsonl").write_bytes(b"\n\n")
        assert rows.read(dump)["step"] == [1, 3]

    @pytest.mark.parametrize("files", [{}, {"a.jsonl": []}, {"a.jsonl": [], "b.jsonl": []}])
    def test_nothing_in_it(self, dump: Path, files: Files) -> None:
        error = refusal(write(dump, files))
        assert str(dump) in error.what
        assert "has no rows" in error.what if files else "has no file of a kind that can be read" in error.what

    def test_many_small_files_share_row_groups(self, dump: Path, tmp_path: Path) -> None:
        import pyarrow.parquet as pq

        write(dump, {f"{index}.jsonl": [row(step=index)] for index in range(50)})
        read_dump(dump, tmp_path / "out.parquet")
        with pq.ParquetFile(tmp_path / "out.parquet") as file:
            assert file.num_row_groups == 1
            assert file.read()["step"].to_pylist() == list(range(50))

    def test_too_many_files(self, dump: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(read, "_MOST_FILES", 3)
        write(dump, {f"{index}.jsonl": [row()] for index in range(4)})
        assert "has more than 3 files" in refusal(dump).what

    def test_links_to_its_own_files_and_folders_are_not_read_twice(self, dump: Path, tmp_path: Path) -> None:
        write(dump, {"step_1/a.jsonl": [row(step=1)], "step_2/a.jsonl": [row(step=2)]})
        (dump / "latest").symlink_to("step_2")
        (dump / "loop").symlink_to(dump)
        (dump / "last.jsonl").symlink_to("step_2/a.jsonl")
        write_jsonl(tmp_path, [row(step=3)], "blob.jsonl")
        (dump / "z.jsonl").symlink_to(tmp_path / "blob.jsonl")
        assert rows.read(dump)["step"] == [1, 2, 3]
        (tmp_path / "link").symlink_to(dump)
        assert rows.read(tmp_path / "link")["step"] == [1, 2, 3]

    @pytest.mark.parametrize("target", ["gone.jsonl", "b.jsonl"])
    def test_links_to_nothing_are_said(self, dump: Path, target: str) -> None:
        write(dump, {"a.jsonl": [row()]})
        (dump / "b.jsonl").symlink_to(target)
        assert f"{dump}/b.jsonl cannot be read" in refusal(dump).what

    def test_folders_of_earlier_runs_are_not_read(self, dump: Path) -> None:
        write(dump, {"a.jsonl": [row()], "runs/x/recorded.parquet": [row()], "own/recorded.parquet": [row()]})
        make_dump().write(dump / "runs/x/recorded.json")
        assert rows.read(dump)["file"] == [f"{dump}/a.jsonl", f"{dump}/own/recorded.parquet"]

    def test_a_subfolder_that_cannot_be_read_is_said(self, dump: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(dump, {"a.jsonl": [row()], "step_2/a.jsonl": [row()]})
        real = os.scandir

        def denied(path: Any) -> Any:
            if str(path).endswith("step_2"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, "scandir", denied)  # mode bits do not stop root, as whom tests may run
        assert refusal(dump).what == f"{dump}/step_2 cannot be read: Permission denied."

    @pytest.mark.parametrize("name", [b"\x1b[31mred.jsonl", b"\xff.jsonl", "\u202etxt.jsonl".encode()])
    def test_hostile_names(self, dump: Path, name: bytes) -> None:
        path = Path(os.fsdecode(bytes(dump) + b"/" + name))
        path.write_text(json.dumps(row()))
        (found,) = rows.read(dump)["file"]
        assert found.isprintable()
        path.write_text("{")
        refusal(dump)


class TestFormats:
    def test_several_formats_are_counted(self, dump: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from mismatch_probe.ingest import formats
        from mismatch_probe.ingest.formats import Format

        toy = Format("toy", "Toy", "1.0", ("jsonl",), (frozenset({"toy_ids"}),), lambda record: iter(()))
        known = formats.formats()
        monkeypatch.setattr(read, "formats", lambda: known | {"toy": toy})
        write(dump, {"a.jsonl": [row()], "b.jsonl": [row()], "c.jsonl": [{"toy_ids": [1]}]})
        error = refusal(dump)
        assert "has files of several formats: 2 of generic, 1 of toy" in error.what
        assert "--format" in error.fix

    def test_a_named_format_reads_files_whatever_they_look_like(self, dump: Path) -> None:
        write(dump, {"a.jsonl": [row()], "b.jsonl": [{"other": 1}]})
        assert rows.read(dump)["file"] == [f"{dump}/a.jsonl"]
        assert "b.jsonl has no prompt_token_ids" in refusal(dump, format="generic").what

    @pytest.mark.parametrize("name", ["nothing", "", "AUTO"])
    def test_a_format_that_is_not_there(self, dump: Path, name: str) -> None:
        error = refusal(write(dump, {"a.jsonl": [row()]}), format=name)
        assert "There is no format" in error.what
        assert "generic" in error.fix

    def test_no_file_of_a_named_format(self, dump: Path) -> None:
        (dump / "a.db").write_bytes(b"SQLite format 3")
        assert "has no file of the format generic" in refusal(dump, format="generic").what

    def test_pickles_among_others_are_left_alone(self, dump: Path) -> None:
        write(dump, {"a.jsonl": [row()]})
        (dump / "b.pt").write_bytes(b"\x80\x04N.")
        assert rows.read(dump).file.n_files == 1
        (dump / "a.jsonl").unlink()
        assert "--trust-pickle" in refusal(dump).fix


class TestAcrossFiles:
    def test_a_column_is_in_every_file_or_in_none(self, dump: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for chunk in (1, 100):
            monkeypatch.setattr(collect, "_CHUNK_ROWS", chunk)
            error = refusal(write(dump, {"a.jsonl": [row()] * 2, "b.parquet": [row(), row(step=1)]}))
            assert error.what == f"Row 2 of {dump}/b.parquet has step, which line 1 of {dump}/a.jsonl does not have."
            error = refusal(write(dump, {"a.jsonl": [row()], "b.parquet": [row(trainer_logprobs=None)]}))
            assert (
                error.what == f"Row 1 of {dump}/b.parquet has no trainer_logprobs, which line 1 of {dump}/a.jsonl has."
            )

    def test_some_columns_may_be_missing_anywhere(self, dump: Path) -> None:
        found = rows.read(write(dump, {"a.jsonl": [row(tags="x", reward=1)], "b.jsonl": [row(finish_reason="stop")]}))
        assert (found["tags"], found["reward"], found["finish_reason"]) == (["x", None], [1, None], [None, "stop"])

    def test_rows_left_out_have_no_say(self, dump: Path) -> None:
        short = row(loss_mask=[1], step=4)
        found = rows.read(write(dump, {"a.jsonl": [short, row()], "b.jsonl": [short]}))
        assert (found.file.n_left_out, found.file.n_masked_tokens, found["row"]) == (2, 0, [2])

    def test_equal_prompts_of_several_files_are_one(self, dump: Path) -> None:
        found = rows.read(write(dump, {f"{index}.jsonl": [row()] * 2 for index in range(3)}))
        assert (found["sample_id"], found.file.n_prompts) == ([0, 1, 2, 3, 4, 5], 1)

    def test_a_damaged_file_is_named(self, dump: Path) -> None:
        write(dump, {"a.jsonl": [row()], "b.jsonl": [row()], "c.parquet": [row()]})
        good = (dump / "b.jsonl").read_bytes()
        (dump / "b.jsonl").write_bytes(good + good[:20])
        assert refusal(dump).what.startswith(f"Line 2 of {dump}/b.jsonl is not valid JSON")
        (dump / "b.jsonl").write_bytes(good)
        (dump / "c.parquet").write_bytes((dump / "c.parquet").read_bytes()[:-9])
        assert f"{dump}/c.parquet is corrupt" in refusal(dump).what
        (dump / "c.parquet").unlink()
        (dump / "d.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00 broken")
        assert f"{dump}/d.jsonl.gz is a damaged gzip file" in refusal(dump).what


def test_the_caller_hears_of_what_is_not_read_and_of_what_is_loaded_whole(dump: Path, tmp_path: Path) -> None:
    write(dump, {"a.jsonl": [row()], "c.jsonl": [{"other": 1}], "d.jsonl": []})
    (dump / "b.json").write_text(json.dumps([row()]))
    heard: list[str] = []
    read_dump(dump, tmp_path / "out.parquet", ReadOptions(), heard.append)
    assert heard == [
        f"{dump}/b.json (0 MiB) is loaded whole",
        "2 of 4 files are empty or no generic, and are not read",
    ]


def test_a_document_is_read_back(tmp_path: Path) -> None:
    make_dump().write(tmp_path / "recorded.json")
    assert Dump.read(tmp_path / "recorded.json") == make_dump()


def test_lines_of_objects_in_a_file_named_json(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(f"{json.dumps(row())}\n{json.dumps(row())}\n")
    assert len(rows.read(path).rows) == 2
