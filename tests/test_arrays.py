"""Files of arrays: whole, of something else, or damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mismatch_probe.arrays import load_arrays, save_arrays


def test_what_was_saved_is_loaded_by_its_key_alone(tmp_path: Path) -> None:
    path = tmp_path / "part.npz"
    arrays = {"a": np.arange(5), "b": np.linspace(0, 1, 7, dtype=np.float32)}
    save_arrays(path, "key", {"names": ["x"], "n": None}, arrays)
    found = load_arrays(path, "key")
    assert found is not None
    assert found[0] == {"names": ["x"], "n": None}
    assert set(found[1]) == {"a", "b"}
    np.testing.assert_array_equal(found[1]["b"], arrays["b"])
    assert load_arrays(path, "another") is None
    assert load_arrays(tmp_path / "none.npz", "key") is None


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_none_or_whole(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "part.npz"
    save_arrays(path, "key", {}, {"a": np.arange(300.0)})
    draw, content = np.random.default_rng(seed), bytearray(path.read_bytes())
    for at in draw.integers(len(content), size=30):
        content[at] = draw.integers(256)
    path.write_bytes(content)
    found = load_arrays(path, "key")
    assert found is None or set(found[1]) <= {"a"}
