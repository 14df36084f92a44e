"""Files are never half-written, and a folder has one user at a time."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.errors import DiskFull, TableError, UsageError
from mismatch_probe.files import atomic_path, locked, write_json, write_text


class TestAtomicity:
    def test_a_write_that_fails_leaves_the_old_file_and_no_other(self, tmp_path: Path) -> None:
        path = tmp_path / "file.json"
        write_json(path, {"old": 1})
        with pytest.raises(ValueError, match="Out of range float"):
            write_json(path, {"new": math.nan})
        assert json.loads(path.read_text()) == {"old": 1}
        assert list(tmp_path.iterdir()) == [path]

    def test_the_old_file_stays_until_the_new_one_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "below" / "file"
        write_text(path, "old")
        with atomic_path(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
            assert temporary.parent == path.parent  # a rename across file systems would not be atomic
        assert path.read_text() == "new"
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    @pytest.mark.parametrize("moment", ["fsync", "replace"])
    def test_a_full_disk_is_a_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, code: int
    ) -> None:
        path = tmp_path / "tokens.parquet"
        write_text(path, "old")

        def full(*_: Any) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, moment, full)
        with pytest.raises(DiskFull, match=r"The disk is full: tokens\.parquet could not be written\. Free some space"):
            write_text(path, "new")
        monkeypatch.undo()
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_another_failure_is_a_table_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(TableError, match="cannot be written: File exists"):
            write_text(tmp_path / "file" / "below", "text")


class TestLock:
    def test_it_makes_its_folder_and_ends_with_its_block(self, tmp_path: Path) -> None:
        folder = tmp_path / "a" / "b"
        with locked(folder):
            assert folder.is_dir()
            with pytest.raises(UsageError, match=r"Another process is using .*/a/b\."), locked(folder):
                pass
        with pytest.raises(ZeroDivisionError), locked(folder):
            raise ZeroDivisionError
        with locked(folder):
            pass

    def test_it_keeps_other_processes_out_and_ends_with_its_process(self, tmp_path: Path) -> None:
        holder = (
            "import sys; from pathlib import Path; from mismatch_probe.files import locked\n"
            "with locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(UsageError, match="Another process is using"), locked(tmp_path):
                pass
            other.kill()
        with locked(tmp_path):
            pass

    @pytest.mark.parametrize("below", ["", "deeper"])
    def test_a_file_is_no_folder(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_text("")
        sentence = r"cannot be used as a run folder \((File exists|Not a directory)\)"
        with pytest.raises(UsageError, match=sentence), locked(tmp_path / "file" / below):
            pass
