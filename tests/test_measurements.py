"""Files of arrays: whole, of something else, or damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mismatch_probe.runs.measurements import Measurement, Store, failures


def test_what_was_saved_is_loaded_by_its_key_alone(tmp_path: Path) -> None:
    path = tmp_path / "part.npz"
    arrays = {"a": np.arange(5), "b": np.linspace(0, 1, 7, dtype=np.float32)}
    Measurement(path, "key").save({"names": ["x"], "n": None}, arrays)
    found = Measurement(path, "key").load()
    assert found is not None
    assert found[0] == {"names": ["x"], "n": None}
    assert set(found[1]) == {"a", "b"}
    np.testing.assert_array_equal(found[1]["b"], arrays["b"])
    assert Measurement(path, "another").load() is None
    assert Measurement(tmp_path / "none.npz", "key").load() is None


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_none_or_whole(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "part.npz"
    Measurement(path, "key").save({}, {"a": np.arange(300.0)})
    draw, content = np.random.default_rng(seed), bytearray(path.read_bytes())
    for at in draw.integers(len(content), size=30):
        content[at] = draw.integers(256)
    path.write_bytes(content)
    found = Measurement(path, "key").load()
    assert found is None or set(found[1]) <= {"a"}


def test_a_store_knows_what_is_there_and_what_is_stale(tmp_path: Path) -> None:
    """Of three: one as asked for, one of other settings, one that is not there."""
    store, before = (Store(tmp_path, lambda name, of=of: f"{name} of {of}") for of in ("now", "before"))
    store.at("new").save({}, {"a": np.arange(2)})
    before.at("old").save({}, {"a": np.arange(2)})
    names = ("new", "old", "none")
    assert list(store.load(names)) == ["new"]
    assert [name for name in names if store.has(name)] == ["new"]
    assert store.stale(names) == ["old"]
    assert store.missing(names) == [name for name in names if name != "new"]
    assert store.at("new").beside("other") == Measurement(tmp_path / "other.npz", "new of now")


def test_what_failed_is_known_until_it_is_forgotten(tmp_path: Path) -> None:
    store = Store(tmp_path, lambda name: name)
    store.at("a").save({"failed": "no memory"}, {})
    store.at("b").save({"seconds": 1}, {})
    assert store.failed(["a", "b", "c"]) == failures(tmp_path) == {"a": "no memory"}
    assert store.missing(["a", "b", "c"]) == ["c"]
    store.forget(["a", "c"])
    assert store.missing(["a", "b", "c"]) == ["a", "c"]
