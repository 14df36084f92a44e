"""What of a dump is accounted for: planted faults are counted exactly, clean dumps have none, chunks do not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mismatch_probe.ingest.accounting import CODES, Accounting
from mismatch_probe.ingest.base import Place
from mismatch_probe.ingest.chunk import Chunk, Lists
from mismatch_probe.report.words import all_words, say
from mismatch_probe.results.finding import Finding
from tests.metrics.test_constants import ROUNDINGS, clean

Floats = NDArray[np.float64]
LISTS = (
    "prompt_token_ids",
    "response_token_ids",
    "rollout_logprobs",
    "trainer_logprobs",
    "loss_mask",
    "weight_version",
)


def chunk(rows: Sequence[dict[str, Any]], first: int = 1, file: str = "d.jsonl") -> Chunk:
    """Rows of the generic format; a key that a row does not have is absent there."""
    lists = {}
    for key in LISTS:
        if any(key in row for row in rows):
            values = [np.asarray(row[key]) for row in rows if key in row]
            lengths = np.array([len(row[key]) if key in row else -1 for row in rows])
            lists[key] = Lists(np.concatenate(values), lengths)
    steps = {"step": [row.get("step") for row in rows]} if any("step" in row for row in rows) else {}
    return Chunk([Place(file, "Line")] * len(rows), np.arange(first, first + len(rows)), lists, steps)


def accounted(rows: Sequence[dict[str, Any]], size: int = 1000, vocabulary: int | None = None) -> tuple[Finding, ...]:
    accounting = Accounting(vocabulary)
    for first in range(0, len(rows), size):
        accounting.update(chunk(rows[first : first + size], first + 1))
    return accounting.findings()


def rows_of(b: Floats | None, a: Floats | None, lengths: Sequence[int], **columns: Any) -> list[dict[str, Any]]:
    """Rows with ids of their own; `columns` run along the tokens."""
    rng = np.random.default_rng(7)
    ends, rows = np.cumsum(lengths), []
    columns |= {f"{side}_logprobs": values for side, values in (("rollout", b), ("trainer", a)) if values is not None}
    for end, length in zip(ends, lengths, strict=True):
        ids = {"prompt_token_ids": rng.integers(0, 1000, 3), "response_token_ids": rng.integers(0, 1000, length)}
        rows.append(ids | {key: values[end - length : end] for key, values in columns.items()})
    return rows


def only(findings: Sequence[Finding], code: str) -> Finding:
    (found,) = [finding for finding in findings if finding.code == code]
    return found


def codes(findings: Sequence[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def test_every_code_has_words() -> None:
    assert set(CODES) <= set(all_words())


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_clean_dump_has_at_most_its_grid(rounding: str) -> None:
    b, a = (ROUNDINGS[rounding](side) for side in clean(60_000))
    rng, lengths = np.random.default_rng(0), []
    while sum(lengths) < 60_000:
        lengths.append(min(int(rng.integers(1, 900)), 60_000 - sum(lengths)))
    for sides in ((b, a), (b, None), (None, a)):
        found = accounted(rows_of(*sides, lengths))
        allowed = {"coarse-grid"} if rounding not in ("float64", "float32") else set()
        # Where both sides are rounded to a quarter of a nat, most of them are equal.
        allowed |= {"equal-sides"} if rounding in ("logits of ¼", "1 decimals") else set()
        assert set(codes(found)) <= allowed, [say(one) for one in found]


GRIDS = {
    "bfloat16": ("bfloat16", 8),
    "float16": ("float16", 11),
    "logits of ¼": ("logits", 2),
    "logits of ⅛": ("logits", 3),
    "logits of 1/32": ("logits", 5),
    **{f"{k} decimals": ("decimals", k) for k in range(1, 7)},
}


@pytest.mark.parametrize("stored", [np.float64, np.float32])
@pytest.mark.parametrize("rounding", GRIDS)
def test_the_grid_of_one_side(rounding: str, stored: type) -> None:
    b, a = clean(20_000)
    b = ROUNDINGS[rounding](b).astype(stored)
    found = only(accounted(rows_of(b, a, [1000] * 20)), "coarse-grid")
    grid, digits = GRIDS[rounding]
    assert (found.values["grid"], found.values["digits"], found.where) == (grid, digits, "rollout")
    if grid == "decimals":
        assert found.number("step") == pytest.approx(10.0**-digits)
    elif grid == "logits":
        assert found.number("step") == 2.0**-digits
    else:
        spacing = float(np.spacing(np.float32(np.median(-b[b <= -1 / 16].astype(float)))))
        assert found.number("step") == spacing * 2.0 ** (24 - digits)
    gap = float(np.abs(a - b.astype(float)).mean())
    assert found.maybe("gap") == pytest.approx(gap, rel=0.02)
    assert found.severity == (
        "warn" if found.number("step") >= gap else "note" if found.number("step") >= gap / 10 else "info"
    )


def test_seven_digits_of_a_16_bit_value_are_on_its_grid() -> None:
    b = np.array([float(f"{v:.7g}") for v in ROUNDINGS["bfloat16"](clean(5000)[0])])
    assert only(accounted(rows_of(b, None, [5000])), "coarse-grid").values["grid"] == "bfloat16"


def test_six_decimals_of_improbable_tokens_are_a_grid() -> None:
    b = np.round(np.random.default_rng(0).normal(-10.4, 0.5, 1000), 6)
    found = only(accounted(rows_of(b, None, [1000])), "coarse-grid")
    assert (found.values["grid"], found.values["digits"]) == ("decimals", 6)


def test_seven_digits_are_no_grid() -> None:
    b, a = (np.array([float(f"{v:.7g}") for v in side.astype(np.float32)]) for side in clean(20_000))
    assert accounted(rows_of(b, a, [1000] * 20)) == ()


PLACEHOLDERS = (-9999.0, 1.0, math.nan, math.inf, -math.inf, -1e9, float(np.finfo(np.float32).min))


@given(
    st.sampled_from(PLACEHOLDERS),
    st.sets(st.integers(0, 299), max_size=40),
    st.sampled_from(["rollout", "trainer"]),
    st.sampled_from([[300], [100, 0, 200], [1] * 300, [7, 93, 150, 50]]),
)
@settings(max_examples=60, deadline=None)
def test_planted_placeholders_are_counted_exactly(value: float, where: set[int], side: str, lengths: list[int]) -> None:
    b, a = clean(300)
    planted = sorted(where)
    (b if side == "rollout" else a)[planted] = value
    found = [f for f in accounted(rows_of(b, a, lengths)) if f.code == "placeholder-logprobs"]
    if not planted:
        assert found == []
        return
    (one,) = found
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    assert (one.where, one.values["value"], one.whole("n")) == (side, f"{value:.9g}", len(planted))
    assert one.whole("n_rows") == len(set(row[planted].tolist()))
    assert one.number("share") == len(planted) / 300
    assert one.names("places") == tuple(f"d.jsonl:{row[i] + 1}[{position[i]}]" for i in planted[:5])
    assert sum(one.values["stands"].values()) == len(planted)  # type: ignore[union-attr]


def test_zeros_count_where_the_other_side_contradicts_them() -> None:
    b, a = clean(300)
    a[:20] = -3.0
    b[:20] = 0.0
    a[40:50], b[40:50] = -0.1, 0.0
    one = only(accounted(rows_of(b, a, [100, 100, 100])), "placeholder-logprobs")
    assert (one.values["value"], one.whole("n"), one.whole("n_kept")) == ("0", 20, 10)


@pytest.mark.parametrize(
    ("planted", "stand"),
    [
        ([0], "first"),
        ([99], "last"),
        ([97, 98, 99], "last"),
        ([40, 41], "runs"),
        ([40, 60], "scattered"),
        (range(100), "whole"),
    ],
)
def test_where_placeholders_stand(planted: Sequence[int], stand: str) -> None:
    b, a = clean(200)
    b[list(planted)] = -9999.0
    one = only(accounted(rows_of(b, a, [100, 100])), "placeholder-logprobs")
    assert one.values["stands"] == {stand: len(planted)}


def test_masked_tokens_are_not_accounted_for() -> None:
    b, a = clean(200)
    mask = np.ones(200, int)
    b[50:60], mask[50:60] = -9999.0, 0
    b[[49, 99, 103, 199]] = np.nan
    mask[95:99] = mask[100:103] = 0
    one = only(accounted(rows_of(b, a, [100, 100], loss_mask=mask)), "placeholder-logprobs")
    assert (one.whole("n"), one.number("share")) == (4, 4 / 183)
    assert one.values["stands"] == {"scattered": 1, "first": 1, "last": 2}
    assert one.names("places") == ("d.jsonl:1[49]", "d.jsonl:1[99]", "d.jsonl:2[3]", "d.jsonl:2[99]")


def test_values_beyond_the_first_few_are_counted_together() -> None:
    b, a = clean(300)
    b[:100] = -2000.0 - np.arange(100)
    b[100], b[101] = np.nan, 1.0
    found = [f for f in accounted(rows_of(b, a, [300])) if f.code == "placeholder-logprobs"]
    counted = {finding.text("value"): finding.whole("n") for finding in found}
    assert counted.pop("< -1000") == 92
    assert len(counted) == 10
    assert set(counted.values()) == {1}


@pytest.mark.parametrize("value", [-0.5, -1.0, -13.8155, -math.log(50_257)])
@pytest.mark.parametrize("one_sided", [False, True])
def test_constant_runs(value: float, one_sided: bool) -> None:
    b, a = clean(400)
    b[180:200] = b[300:330] = value
    one = only(accounted(rows_of(b, None if one_sided else a, [200, 200])), "constant-run")
    assert (one.text("value"), one.whole("n"), one.whole("n_rows")) == (f"{value:.9g}", 50, 2)
    assert one.values["stands"] == {"last": 20, "runs": 30}


def test_positive_log_probs_by_size() -> None:
    b, a = clean(300)
    b[:10], b[20:24], b[30], b[31] = 1e-7, 0.03125, 0.5, 2.0
    one = only(accounted(rows_of(b, a, [300])), "positive-logprobs")
    named = ("n", "n_16_bit", "n_impossible", "n_rounding")
    assert tuple(one.whole(name) for name in named) == (6, 4, 2, 10)
    assert one.number("largest") == 2.0
    b[20:32] = -1.0 - np.arange(12)
    assert accounted(rows_of(b, a, [300])) == ()


def test_equal_sides() -> None:
    b, a = clean(1000)
    assert only(accounted(rows_of(b, b, [1000])), "equal-sides").severity == "warn"
    b[:500] = a[:500] = 0.0
    assert accounted(rows_of(b, a, [1000])) == ()
    b[500:970] = a[500:970]
    one = only(accounted(rows_of(b, a, [1000])), "equal-sides")
    assert (one.severity, one.whole("n"), one.whole("n_compared")) == ("note", 470, 500)


def test_ids_out_of_range() -> None:
    rows = rows_of(*clean(40), [20, 20])
    rows[0]["response_token_ids"][3] = -100
    rows[1]["prompt_token_ids"][[0, 2]] = [1000, 2**40]
    rows[1]["response_token_ids"][5] = 1000
    one = only(accounted(rows, vocabulary=1000), "ids-out-of-range")
    assert {name: one.values[name] for name in ("n", "n_rows", "n_negative", "least", "largest")} == {
        "n": 4,
        "n_rows": 2,
        "n_negative": 1,
        "least": -100,
        "largest": 2**40,
    }
    assert one.names("places") == ("d.jsonl:1 response_token_ids[3]", "d.jsonl:2 prompt_token_ids[0]")
    assert only(accounted(rows), "ids-out-of-range").whole("n") == 2


def test_rows_that_are_left_out() -> None:
    accounting = Accounting()
    for row in range(1, 8):
        accounting.left_out(row, "d.jsonl", "rollout_logprobs", 23, 20, 3)
    accounting.left_out(8, "d.jsonl", "rollout_logprobs", 22, 20, 3)
    accounting.left_out(9, "d.jsonl", "rollout_logprobs", 19, 20, 3)
    accounting.left_out(10, "d.jsonl", "loss_mask", 5, 20, 3)
    accounting.left_out(11, "d.jsonl", "loss_mask", 5, 0)
    accounting.update(chunk(rows_of(*clean(100), [10] * 9), first=12))
    bad = rows_of(*clean(10), [10])
    bad[0]["response_token_ids"][0] = -1
    accounting.left_out_ids(chunk(bad, first=21))
    first, second, third = accounting.findings()
    assert (first.where, first.whole("n"), first.number("share")) == ("rollout_logprobs", 9, 9 / 21)
    assert first.values["reasons"] == {"with-prompt": 7, "with-prompt-shifted": 1, "one-missing": 1}
    assert first.names("places") == tuple(f"d.jsonl:{row}" for row in range(1, 6))
    assert (second.where, second.values["reasons"]) == ("loss_mask", {"other": 1, "no-response": 1})
    assert (third.code, third.names("places")) == ("ids-out-of-range", ("d.jsonl:21 response_token_ids[0]",))


def test_unsampled_tokens() -> None:
    b, a = clean(400)
    version = np.zeros(400, int)
    version[[3, 4, 250]] = -1
    b[100:112], a[100:112] = 0.0, -np.linspace(0.01, 8, 12)
    b[388:400], a[388:400] = 0.0, -4.0  # appended: padding rather than text
    one = only(accounted(rows_of(b, a, [200, 200], weight_version=version)), "unsampled-tokens")
    assert (one.whole("n"), one.whole("n_version"), one.whole("n_text"), one.whole("n_rows")) == (15, 3, 12, 2)
    assert "unsampled-tokens" not in codes(accounted(rows_of(b[112:], a[112:], [88, 200])))


def test_infinities_of_both_signs_are_no_text() -> None:
    b, a = np.full(8, -1.0), np.full(8, -1.0)
    b[1:6], a[2], a[3] = -9999.0, np.inf, -np.inf
    assert "unsampled-tokens" not in codes(accounted(rows_of(b, a, [8])))


def test_duplicated_sequences() -> None:
    b, a = clean(800)
    rows = rows_of(b, a, [100] * 8)
    rows[5] = rows[1]
    rows[7] = rows[1]
    one = only(accounted(rows), "duplicated-sequences")
    assert {name: one.values[name] for name in ("n", "n_total", "n_sequences", "most", "n_by_chance")} == {
        "n": 2,
        "n_total": 8,
        "n_sequences": 1,
        "most": 3,
        "n_by_chance": 0,
    }
    assert one.names("places") == ("d.jsonl:6 = d.jsonl:2", "d.jsonl:8 = d.jsonl:2")
    steps = [row | {"step": i} for i, row in enumerate(rows)]
    assert accounted(steps) == ()
    steps[7] |= {"step": 5}
    assert only(accounted(steps), "duplicated-sequences").names("places") == ("d.jsonl:8 = d.jsonl:6",)


def test_another_prompt_or_another_cut_is_no_copy() -> None:
    rows = rows_of(*clean(301), [100, 100, 101])
    rows[1] = rows[0] | {"prompt_token_ids": rows[0]["prompt_token_ids"] + 1}
    ids = np.concatenate([rows[0]["prompt_token_ids"], rows[0]["response_token_ids"]])
    rows[2] |= {"prompt_token_ids": ids[:2], "response_token_ids": ids[2:]}
    assert accounted(rows) == ()


def test_short_and_near_certain_responses_repeat_by_chance() -> None:
    b, a = clean(800)
    rows = rows_of(b, a, [2] * 200 + [100] * 4)
    rows[100:200] = rows[:100]
    assert accounted(rows) == ()
    b[400:500] = a[400:500] = np.linspace(-0.2, -0.01, 100)
    assert accounted([rows[200]] * 4 + rows[201:]) == ()
    # With a copy among them, both are counted.
    rows[203] = rows[202]
    one = only(accounted(rows), "duplicated-sequences")
    assert (one.whole("n"), one.whole("n_by_chance"), one.severity) == (1, 100, "note")


def test_without_log_probs_long_copies_count() -> None:
    rows = rows_of(None, None, [5, 5, 30, 30])
    rows[1], rows[3] = rows[0], rows[2]
    one = only(accounted(rows), "duplicated-sequences")
    assert (one.whole("n"), one.whole("n_by_chance")) == (1, 1)


def test_rows_without_tokens_are_noted() -> None:
    b, a = clean(30)
    rows = rows_of(b, a, [10, 10, 0, 10], loss_mask=np.repeat([1, 0, 1], 10))
    rows[0]["prompt_token_ids"] = np.empty(0, int)
    found = accounted(rows)
    assert {f.code: f.names("places") for f in found} == {
        "masked-all": ("d.jsonl:2",),
        "empty-responses": ("d.jsonl:3",),
        "empty-prompts": ("d.jsonl:1",),
    }
    assert {f.severity for f in found} == {"note"}


@pytest.mark.parametrize("end", [0, -1])
def test_zeros_at_one_end_of_one_side(end: int) -> None:
    b = np.minimum(clean(2000)[0], -1e-6)
    b.reshape(20, 100)[:, end] = 0.0
    one = only(accounted(rows_of(b, None, [100] * 20)), "zeros-at-one-end")
    assert (one.values["end"], one.whole("n"), one.whole("n_elsewhere")) == ("last" if end else "first", 20, 0)
    b[np.random.default_rng(0).integers(0, 2000, 400)] = 0.0
    assert accounted(rows_of(b, None, [100] * 20)) == ()


@pytest.mark.parametrize("value", [math.nan, -9999.0, 0.0, -1.0])
def test_one_value_throughout(value: float) -> None:
    b, a = np.full(1000, value), clean(1000)[1] - 0.3
    found = accounted(rows_of(b, a, [100] * 10))
    code = "constant-run" if value == -1 else "placeholder-logprobs"
    one = only(found, code)
    assert (one.whole("n"), one.values["stands"]) == (1000, {"whole": 1000})


def test_nothing_at_all() -> None:
    assert Accounting().findings() == ()
    b, a = clean(20)
    found = accounted(rows_of(b, a, [10, 10], loss_mask=np.zeros(20)))
    assert codes(found) == ["masked-all"]
    assert codes(accounted(rows_of(b[:0], a[:0], [0, 0]))) == ["empty-responses"]


def test_a_side_that_some_rows_do_not_have() -> None:
    b, a = clean(300)
    b[5] = np.nan
    rows = rows_of(b, a, [100, 100, 100])
    del rows[1]["rollout_logprobs"], rows[2]["trainer_logprobs"]
    one = only(accounted(rows), "placeholder-logprobs")
    assert (one.where, one.whole("n"), one.number("share")) == ("rollout", 1, 1 / 200)


SPOILED = st.sampled_from([*PLACEHOLDERS, 0.0, -1.0, -1.0, -0.5, -0.25, 0.03, 1e-6, -0.7])


@st.composite
def dumps(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of any sort, with copies, masks, several kinds of values."""
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        n = draw(st.integers(0, 12))
        values = st.lists(st.one_of(SPOILED, st.floats(-30, 0)), min_size=n, max_size=n)
        row: dict[str, Any] = {
            "prompt_token_ids": np.array(draw(st.lists(st.integers(-1, 2**33), max_size=3)), np.int64),
            "response_token_ids": np.array(draw(st.lists(st.integers(-1, 5), min_size=n, max_size=n)), np.int64),
            "step": draw(st.sampled_from([None, 0, 1])),
        }
        for key in draw(st.sets(st.sampled_from(["rollout_logprobs", "trainer_logprobs"]))):
            row[key] = np.array(draw(values), np.float64)
        if draw(st.booleans()):
            row["loss_mask"] = np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)), np.int8)
        if draw(st.booleans()):
            row["weight_version"] = np.array(draw(st.lists(st.integers(-1, 1), min_size=n, max_size=n)), np.int64)
        rows += [row] * draw(st.sampled_from([1, 1, 1, 2]))
    return rows


@given(dumps(), st.integers(1, 5), st.booleans())
@settings(max_examples=100, deadline=None)
def test_how_rows_are_cut_into_chunks_changes_nothing(rows: list[dict[str, Any]], size: int, asked: bool) -> None:
    whole = accounted(rows)
    accounting = Accounting()
    for first in range(0, len(rows), size):
        accounting.update(chunk(rows[first : first + size], first + 1))
        if asked:
            accounting.findings()
    assert accounting.findings() == accounting.findings() == whole
    assert all(say(finding) for finding in whole)
    order = [("fail", "warn", "note", "info").index(finding.severity) for finding in whole]
    assert order == sorted(order)


def test_places_name_the_file_of_the_row() -> None:
    b, a = clean(40)
    b[[3, 25]] = np.nan
    rows, accounting = rows_of(b, a, [20, 20]), Accounting()
    accounting.update(chunk(rows[:1], file="a.jsonl"))
    accounting.update(chunk(rows[1:] + rows[:1], file="b.jsonl"))
    found = accounting.findings()
    assert only(found, "placeholder-logprobs").names("places") == ("a.jsonl:1[3]", "b.jsonl:1[5]", "b.jsonl:2[3]")
    assert only(found, "duplicated-sequences").names("places") == ("b.jsonl:2 = a.jsonl:1",)
