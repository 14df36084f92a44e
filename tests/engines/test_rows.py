"""The sample of positions and the file that holds their rows."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from mismatch_probe.engines.rows import RowFile, RowWriter, file_bytes, stacked, uniform
from mismatch_probe.errors import TableError

VOCABULARY = 5


def row(*at: int) -> np.ndarray:
    """A row that says where it was made."""
    return np.array([*at, *([0.5] * (VOCABULARY - len(at)))], dtype=np.float32)


def sample(path: Path, capacity: int, weights: np.ndarray, seed: int = 0) -> RowFile:
    """What is kept of `weights` `[S, T]`, offered sequence by sequence."""
    writer = RowWriter(path, capacity)
    for sequence, of in enumerate(weights):
        for position, weight in enumerate(of):
            slot = writer.admit(sequence, position, uniform(seed + sequence, position), float(weight))
            if slot is not None:
                writer.put(slot, row(sequence, position))
    file = RowFile(path)
    file.close()
    return file


def test_uniform_depends_on_seed_and_position_alone() -> None:
    values = [uniform(seed, position) for seed in range(40) for position in range(50)]
    assert uniform(3, 4) == uniform(3, 4) != uniform(4, 3)
    assert 0 < min(values) < 0.01
    assert 0.99 < max(values) < 1
    assert abs(np.mean(values) - 0.5) < 0.03


def test_everything_is_kept_when_it_fits(tmp_path: Path) -> None:
    file = sample(tmp_path / "rows", 100, np.full((3, 4), 0.5))
    assert sorted((k.sequence_id, k.position) for k in file.kept) == [(s, t) for s in range(3) for t in range(4)]
    assert [k.stands_for for k in file.kept] == [1.0] * 12


def test_what_was_written_is_read(tmp_path: Path) -> None:
    sample(tmp_path / "rows", 7, np.random.default_rng(0).uniform(0.1, 1, (5, 6)))
    file = RowFile(tmp_path / "rows")
    assert file.vocabulary == VOCABULARY
    assert len(file.kept) == 7
    for kept in file.kept:
        np.testing.assert_array_equal(file.row(kept.slot), row(kept.sequence_id, kept.position))
    file.close()
    assert (tmp_path / "rows").stat().st_size == file_bytes(7, VOCABULARY)


def test_rows_are_their_owners_alone(tmp_path: Path) -> None:
    sample(tmp_path / "deep" / "rows", 2, np.full((1, 3), 1.0))
    assert stat.S_IMODE((tmp_path / "deep" / "rows").stat().st_mode) == 0o600


def test_a_pass_that_runs_again_starts_anew(tmp_path: Path) -> None:
    sample(tmp_path / "rows", 50, np.full((5, 9), 0.7))
    assert len(sample(tmp_path / "rows", 50, np.full((1, 2), 0.7)).kept) == 2


def test_the_same_positions_are_kept_in_whatever_order_they_come(tmp_path: Path) -> None:
    weights = np.random.default_rng(1).uniform(0.1, 1, (8, 9))
    places = [(s, t) for s in range(8) for t in range(9)]
    found = []
    by_step = sorted(places, key=lambda place: (place[1], place[0]))
    for order in (places, by_step, sorted(by_step, key=lambda place: (place[1], -place[0]))):
        writer = RowWriter(tmp_path / "rows", 20)
        for s, t in order:
            slot = writer.admit(s, t, uniform(s, t), float(weights[s, t]))
            if slot is not None:
                writer.put(slot, row(s, t))
        file = RowFile(tmp_path / "rows")
        file.close()
        found.append({(k.sequence_id, k.position): round(k.stands_for, 12) for k in file.kept})
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 20


def test_keys_decide_by_brute_force(tmp_path: Path) -> None:
    weights = np.random.default_rng(2).uniform(0.1, 1, (6, 7))
    keys = {(s, t): uniform(s, t) / weights[s, t] for s in range(6) for t in range(7)}
    smallest = sorted(keys, key=lambda place: keys[place])
    file = sample(tmp_path / "rows", 10, weights)
    assert {(k.sequence_id, k.position) for k in file.kept} == set(smallest[:10])
    threshold = keys[smallest[10]]
    inverse = {(k.sequence_id, k.position): 1 / min(1.0, k.weight * threshold) for k in file.kept}
    scale = weights.sum() / sum(k.weight * inverse[k.sequence_id, k.position] for k in file.kept)
    for kept in file.kept:
        assert kept.stands_for == pytest.approx(inverse[kept.sequence_id, kept.position] * scale)


def test_sums_over_what_was_kept_are_those_over_everything(tmp_path: Path) -> None:
    """Over many draws, for a quantity that follows the weight and for one that goes against it."""
    rng = np.random.default_rng(3)
    weights = np.maximum(0.1, rng.beta(0.5, 1.0, (20, 15)))
    along, against = weights * rng.lognormal(0, 0.5, weights.shape), 1.2 - weights
    estimates: list[tuple[float, float]] = []
    for seed in range(300):
        kept = sample(tmp_path / "rows", 60, weights, seed=1000 * seed).kept
        estimates.append(
            tuple(sum(of[k.sequence_id, k.position] * k.stands_for for k in kept) for of in (along, against))
        )
    means = np.mean(estimates, axis=0)
    errors = np.std(estimates, axis=0) / np.sqrt(len(estimates))
    assert abs(means[0] - along.sum()) < 4 * errors[0] + 0.01 * along.sum()
    assert abs(means[1] - against.sum()) < 4 * errors[1] + 0.02 * against.sum()
    assert np.std([e[0] for e in estimates]) < 0.1 * along.sum()


def test_chosen_positions_all_stay(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "rows", 3)
    for position in (2, 5, 7):
        slot = writer.admit(0, position, 0.0, 0.3)
        assert slot is not None
        writer.put(slot, row(0, position))
    file = RowFile(tmp_path / "rows")
    file.close()
    assert [k.position for k in file.kept] == [2, 5, 7]


def test_a_position_that_comes_again_replaces_its_row_and_counts_once(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "rows", 4)
    for content, weight in ((1, 0.2), (2, 0.9), (3, 0.4)):  # a prompt in three chunks; the last row is the real one
        slot = writer.admit(7, 0, uniform(7, 0), weight)
        assert slot == 0
        writer.put(slot, row(content))
    file = RowFile(tmp_path / "rows")
    (kept,) = file.kept
    assert (kept.weight, kept.stands_for) == (0.2, 1.0)
    np.testing.assert_array_equal(file.row(0), row(3))
    file.close()


def test_a_preempted_request_counts_its_positions_once(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "rows", 9)
    for position in (0, 1, 2, 3, 1, 2, 3, 4):  # computed again in chunks from position 1 on
        slot = writer.admit(0, position, uniform(0, position), 0.5)
        assert slot is not None
        writer.put(slot, row(position))
    file = RowFile(tmp_path / "rows")
    file.close()
    assert [kept.stands_for for kept in file.kept] == [1.0] * 5


def test_given_positions_keep_what_they_were_given(tmp_path: Path) -> None:
    """So that any file can be the one that others follow."""
    writer = RowWriter(tmp_path / "rows", 9)
    for position, stands_for in ((3, 7.5), (8, 2.0)):
        writer.put(writer.admit(0, position, 0.0, 0.4, stands_for) or 0, row(position))
    file = RowFile(tmp_path / "rows")
    file.close()
    assert [(k.position, k.weight, k.stands_for) for k in file.kept] == [(3, 0.4, 7.5), (8, 0.4, 2.0)]


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    sample(tmp_path / "rows", 7, np.full((2, 6), 0.5))
    (tmp_path / "rows").write_bytes((tmp_path / "rows").read_bytes()[:100])
    with pytest.raises(TableError, match="truncated"):
        RowFile(tmp_path / "rows")


def test_a_disk_that_takes_part_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RowWriter(tmp_path / "rows", 7)
    slot = writer.admit(0, 0, 0.1, 1.0) or 0
    monkeypatch.setattr("mismatch_probe.engines.rows.os.pwrite", lambda *_: 3)
    with pytest.raises(OSError, match="No space left"):
        writer.put(slot, row(1))


def test_rows_of_two_lengths_are_refused(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "rows", 4)
    writer.put(writer.admit(0, 0, 0.1, 1.0) or 0, row(1))
    with pytest.raises(ValueError, match="rows of 5 and of 3 logits"):
        writer.put(writer.admit(0, 1, 0.1, 1.0) or 0, np.zeros(3, np.float32))


@pytest.mark.parametrize("content", [None, b"", b"MPROWS99" + bytes(60), b"short"])
def test_what_is_no_such_file(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "rows").write_bytes(content)
    with pytest.raises(TableError, match="holds no captured rows"):
        RowFile(tmp_path / "rows")


def test_stacking() -> None:
    assert stacked([]) is None
    found = stacked([{"a": np.array([1])}, {"a": np.array([2, 3])}])
    assert found is not None
    assert found["a"].tolist() == [1, 2, 3]
