"""Batches: every request once, within the budget, whatever the lengths."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mismatch_probe.engines.batching import Footprint, plan_batches, rows_per_chunk
from mismatch_probe.types import ScoreRequest, TrainerLayout

LAYOUTS: list[TrainerLayout] = ["single", "padded", "packed"]
FOOTPRINT = Footprint.of_model(hidden=64, intermediate=256, heads=4, itemsize=2, attention="sdpa")
UNMASKED = Footprint.of_model(hidden=64, intermediate=256, heads=4, itemsize=2, attention="flash_attention_2")

lengths = st.lists(st.integers(2, 3000), max_size=40)
layouts = st.sampled_from(LAYOUTS)
budgets = st.integers(1, 1 << 28)
device_types = st.sampled_from(["cpu", "cuda"])


def requests(sizes: list[int]) -> list[ScoreRequest]:
    """Requests of the given lengths in tokens, with ids out of order."""
    return [ScoreRequest((7 * i) % 1009, [1], [2] * (size - 1)) for i, size in enumerate(sizes)]


@settings(max_examples=40, deadline=None)
@given(lengths, layouts, budgets, device_types)
def test_every_request_lands_in_exactly_one_batch(
    sizes: list[int], layout: TrainerLayout, budget: int, device: str
) -> None:
    wanted = requests(sizes)
    batches = plan_batches(wanted, layout, FOOTPRINT, budget, device)
    assert all(batches)
    landed = [request.sequence_id for batch in batches for request in batch]
    assert sorted(landed) == sorted(request.sequence_id for request in wanted)


@settings(max_examples=40, deadline=None)
@given(lengths, layouts, budgets, device_types)
def test_the_budget_holds_except_for_single_sequences(
    sizes: list[int], layout: TrainerLayout, budget: int, device: str
) -> None:
    most = {"cpu": 512, "cuda": 32768}[device]
    for batch in plan_batches(requests(sizes), layout, FOOTPRINT, budget, device):
        if len(batch) > 1:
            found = [request.length for request in batch]
            assert FOOTPRINT.of_batch(found, layout) <= budget
            assert (sum(found) if layout == "packed" else max(found) * len(found)) <= most


@settings(max_examples=40, deadline=None)
@given(lengths, layouts, budgets, device_types)
def test_the_longest_come_first_whatever_the_order_of_the_requests(
    sizes: list[int], layout: TrainerLayout, budget: int, device: str
) -> None:
    wanted = requests(sizes)
    batches = plan_batches(wanted, layout, FOOTPRINT, budget, device)
    found = [request.length for batch in batches for request in batch]
    assert found == sorted(found, reverse=True)
    assert plan_batches(wanted[::-1], layout, FOOTPRINT, budget, device) == batches


@settings(max_examples=40, deadline=None)
@given(lengths, budgets, device_types)
def test_single_means_one(sizes: list[int], budget: int, device: str) -> None:
    batches = plan_batches(requests(sizes), "single", FOOTPRINT, budget, device)
    assert [len(batch) for batch in batches] == [1] * len(sizes)


@settings(max_examples=40, deadline=None)
@given(lengths, st.sampled_from(["padded", "packed"]), device_types, st.integers(10, 28))
def test_a_larger_budget_makes_no_more_batches(
    sizes: list[int], layout: TrainerLayout, device: str, exponent: int
) -> None:
    smaller, larger = (
        plan_batches(requests(sizes), layout, UNMASKED, budget, device) for budget in (1 << exponent, 1 << exponent + 1)
    )
    assert len(larger) <= len(smaller)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 3000), st.integers(1, 20), layouts)
def test_one_length_needs_no_mask_where_rows_are_apart(size: int, count: int, layout: TrainerLayout) -> None:
    masked, plain = (footprint.of_batch([size] * count, layout) for footprint in (FOOTPRINT, UNMASKED))
    # In a pack it is the mask that keeps the sequences apart.
    assert (masked == plain) == (layout != "packed" or count == 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 300), min_size=2, max_size=6))
def test_what_a_mask_costs(sizes: list[int]) -> None:
    assume(min(sizes) < max(sizes))
    rows, width = len(sizes), max(sizes)
    extra = FOOTPRINT.of_batch(sizes, "padded") - UNMASKED.of_batch(sizes, "padded")
    assert extra == rows * width**2 * (1 + 2)
    assert FOOTPRINT.of_batch(sizes, "packed") - UNMASKED.of_batch(sizes, "packed") == sum(sizes) ** 2 * (1 + 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 1 << 20), st.integers(1, 1 << 40), device_types)
def test_logits_stay_within_a_quarter_of_the_budget_whatever_the_length_of_a_response(
    vocabulary: int, budget: int, device: str
) -> None:
    rows = rows_per_chunk(vocabulary, budget, device)
    assert 1 <= rows <= {"cpu": 128, "cuda": 4096}[device]
    assert rows == 1 or rows * vocabulary * 12 <= budget // 4


def test_eager_attention_holds_scores_of_every_head_with_or_without_a_mask() -> None:
    eager = Footprint.of_model(hidden=64, intermediate=256, heads=4, itemsize=2, attention="eager")
    for lengths_ in ([100], [100, 60]):
        rows = len(lengths_) * 100 * 100
        assert eager.of_batch(lengths_, "padded") - FOOTPRINT.of_batch(lengths_, "padded") == rows * 4 * (2 * 2 + 4)
