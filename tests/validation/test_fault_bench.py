"""The fault bench without an engine: its edits do what they say, and its plan has what a test half needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.ingest.keys import KEYS
from validation.faults import edits
from validation.faults.catalog import FAULTS, cases, split_of
from validation.faults.edits import Row

B = np.array([-0.5, -1.0, -2.0, -0.001, -3.0])
A = np.array([-0.6, -0.9, -2.5, -0.002, -2.8])
ROW = Row([1, 2], [3, 4, 5, 6, 7], B, A, {"finish_reason": "length"})


def test_shift_takes_later_tokens() -> None:
    assert edits.shifted(B, 1).tolist() == [-1.0, -2.0, -0.001, -3.0, -3.0]
    assert edits.shifted(B, -2).tolist() == [-0.5, -0.5, -0.5, -1.0, -2.0]


def test_labels_of_a_pack_shift_from_its_second_sequence_on() -> None:
    rows = [replace(ROW, a=np.arange(3.0) + 10 * i, b=B[:3], response=[1, 2, 3]) for i in range(4)]
    found = edits.relabelled_packs(rows, 3, growing=False)
    assert [row.a.tolist() for row in found] == [[0, 1, 2], [11, 12, 20], [21, 22, 22], [30, 31, 32]]
    assert [row.keys["pack_index"] for row in found] == [0, 1, 2, 0]
    assert edits.relabelled_packs(rows, 3, growing=True)[2].a.tolist() == [22, 22, 22]


def test_retokenised_is_clean_up_to_the_place_and_joins_two_tokens() -> None:
    found = edits.retokenised(ROW, 1, "a")
    assert found.a.tolist() == [-0.6, -3.4, -0.002, -2.8, 0.0]
    assert np.array_equal(found.b, B)


def test_placeholders() -> None:
    assert edits.last(ROW, 2, 1.0).b.tolist() == [-0.5, -1.0, -2.0, 1.0, 1.0]
    assert np.isnan(edits.null_where_certain(ROW, 0.01).b).tolist() == [False, False, False, True, False]
    long = replace(ROW, b=np.full(4000, -1.0))
    assert np.mean(edits.scattered(long, 0.1, 0.0, 1).b == 0) == pytest.approx(0.1, abs=0.02)


def test_storage() -> None:
    import torch

    values = np.random.default_rng(0).normal(size=1000).astype(np.float32).astype(np.float64)
    stored = edits.stored_bf16(replace(ROW, b=values), "b").b
    assert np.array_equal(stored, torch.tensor(values).float().bfloat16().double().numpy())
    assert edits.decimals(ROW, "a", 1).a.tolist() == [-0.6, -0.9, -2.5, -0.0, -2.8]


@given(st.floats(1.5, 10), st.floats(-5, -1e-3), st.floats(-0.3, 0.3))
def test_inflation_multiplies_log_odds_and_stays_a_probability(times: float, a: float, gap: float) -> None:
    b = min(a + gap * abs(a), -1e-6)
    found = edits.inflated(Row([], [1], np.array([b]), np.array([a])), times).b[0]

    def odds(x: float) -> float:
        return float(x - np.log(-np.expm1(x)))

    assert found <= 0
    assert odds(a) - odds(found) == pytest.approx(times * (odds(a) - odds(b)), abs=1e-6)


def test_the_tail_changes_in_capped_rows_alone() -> None:
    other = np.full(5, -9.0)
    assert edits.tail_from(ROW, other, 2).b.tolist() == [-0.5, -1.0, -2.0, -9.0, -9.0]
    stopped = ROW.with_keys(finish_reason="stop")
    assert edits.tail_from(stopped, other, 2) is stopped


def test_edits_leave_their_input() -> None:
    before = (B.copy(), A.copy())
    edits.last(ROW, 1, 0.0)
    edits.scattered(ROW, 1.0, 0.0, 0)
    edits.tail_from(ROW, B, 2)
    assert np.array_equal(ROW.b, before[0])
    assert np.array_equal(ROW.a, before[1])


def test_some_rows_are_the_same_ones_each_time() -> None:
    rows = [ROW] * 10
    changed = [edits.some(rows, 0.3, edits.recomputed, seed=4) for _ in range(2)]
    picked = [[i for i, row in enumerate(found) if row is not ROW] for found in changed]
    assert len(picked[0]) == 3
    assert picked[0] == picked[1]


def test_a_line_has_keys_of_the_generic_format_and_null_for_nan() -> None:
    found = edits.document(replace(ROW, b=np.array([np.nan, -1.0, 0.0, 1.0, -9999.0])).with_keys(pack_index=1))
    assert set(found) <= set(KEYS)
    assert found["rollout_logprobs"] == [None, -1.0, 0.0, 1.0, -9999.0]


def test_names_of_cases_are_unique() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))


def test_the_split_is_a_rule_of_model_and_strength() -> None:
    assert split_of("smollm2", 0) == "dev"
    assert split_of("smollm2", 1) == split_of("chain", 0) == split_of("mixture", 3) == "test"
    for case in cases():
        assert case.place.split == case.split == split_of(case.model, case.index)


def test_the_halves_have_what_they_need() -> None:
    planned = cases()
    test, dev = (Counter(case.fault.cause for case in planned if case.split == half) for half in ("test", "dev"))
    pairs = [fault for fault in FAULTS if "+" in fault.class_]
    assert len(pairs) == 20
    for fault in FAULTS:
        if fault in pairs:
            assert (test[fault.cause], dev[fault.cause]) == (2, 0), fault.cause
        elif not fault.clean:
            assert test[fault.cause] >= 5, fault.cause
            assert dev[fault.cause] >= 5, fault.cause
    assert sum(case.split == "test" and not case.fault.clean for case in planned) >= 200
    assert sum(case.split == "test" and case.fault.clean for case in planned) >= 60
    assert sum(case.split == "dev" and case.fault.clean for case in planned) >= 30
