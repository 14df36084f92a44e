"""How experiments look for a parameter, and what a dump tells of a cause without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from mismatch_probe.engines.diagnose.changes import ForwardChange
from mismatch_probe.metrics.hypotheses import Rows, Seen
from mismatch_probe.probes.diagnose.experiments import experiments
from mismatch_probe.probes.diagnose.experiments.base import Named, Subject
from mismatch_probe.probes.diagnose.readings import read_causes
from mismatch_probe.probes.diagnose.sample import Sample
from mismatch_probe.probes.diagnose.signatures import signatures
from mismatch_probe.results.finding import Finding, Severity
from mismatch_probe.types import ScoreRequest
from tests.probes.toy_dump import toy

CAUSE = Named("window-missing", "A window", "None.")
N, LENGTH = 100, 20


def subject(truth: float, *, passes: list[int], share: float = 1.0, n: int = N) -> Subject:
    """A side whose log-probs are off by how far a number is from the truth, in logarithms; plain is off by 1."""
    sequence = np.repeat(np.arange(n), LENGTH)
    zero = np.zeros(n * LENGTH)
    trainer = np.where(sequence < share * n, 0.0, 1.0)
    use = np.ones(n * LENGTH, np.bool_)
    requests = tuple(ScoreRequest(i, [1, 2], [3] * LENGTH) for i in range(n))
    counts = tuple(np.ones(LENGTH, np.bool_) for _ in range(n))
    step = np.zeros(n, np.int64)
    sample = Sample(requests, counts, zero + 1, trainer, {}, use, sequence, step, (), tuple(range(n)))
    nothing = np.zeros((n * LENGTH, 1))
    seen = Seen(nothing.astype(np.int64), nothing.astype(np.int64), np.zeros(n * LENGTH, np.int64))
    rows = Rows(zero + 1, zero, nothing, nothing, nothing, nothing, zero, {}, seen)

    def columns(
        some: Subject, of: str, changes: Sequence[ForwardChange]
    ) -> Iterator[tuple[ForwardChange, NDArray[np.float64], str, float]]:
        assert of == "model"
        for change in changes:
            passes.append(len(some.sample))
            yield change, np.zeros(len(some.sample)) + abs(np.log(change.value / truth)), "", 0.1

    return Subject(sample, rows, use, use, ("trainer",), frozenset(), columns, 9, None, 2, frozenset())


def width(value: float) -> ForwardChange:
    return ForwardChange(f"{value}", kind="window", value=value)


def test_a_scan_finds_a_number_between_those_of_the_grid_on_a_part_and_confirms_it_on_all() -> None:
    passes: list[int] = []
    one = subject(48, passes=passes)
    found = list(one.scan(width, (16, 32, 64, 128), CAUSE, integer=True))
    whole = [hypothesis for hypothesis in found if hypothesis.column is not None]
    assert whole[0].about in ("47.0, all tokens", "48.0, all tokens", "49.0, all tokens")
    assert one.size("trainer", whole[0].column) <= 0.05  # type: ignore[arg-type]
    assert set(passes) == {len(one.part.sample), N * LENGTH}
    assert passes.count(N * LENGTH) == len(whole) <= 2
    assert len(one.part.sample) < N * LENGTH / 2


def test_a_scan_that_explains_nothing_costs_its_grid_on_a_part() -> None:
    passes: list[int] = []
    one = subject(1e6, passes=passes)
    assert all(hypothesis.column is None for hypothesis in one.scan(width, (16, 32, 64), CAUSE))
    assert passes == [len(one.part.sample)] * 3


def test_a_small_sample_is_its_own_part() -> None:
    one = subject(32, passes=[], n=10)
    assert one.part is one
    assert [h.column is None for h in one.forward("model", [width(32), width(64)], lambda _: CAUSE)] == [False, False]


def test_a_hypothesis_of_some_sequences_is_taken_where_it_is_nearer() -> None:
    one = subject(32, passes=[], share=0.25)
    column, share = one.mixed("trainer", np.zeros(N * LENGTH))
    assert share == 0.25
    assert one.size("trainer", column) == 0


def test_a_part_keeps_its_tokens_together() -> None:
    part = subject(32, passes=[]).part.sample
    assert [one.sequence_id for one in part.requests] == list(range(len(part.requests)))
    assert len(part) == sum(int(use.sum()) for use in part.counts) == len(part.sequence)
    assert part.sequence[-1] == len(part.requests) - 1


def test_labels_of_packs_that_lag_more_with_each_sequence_are_made_so() -> None:
    one = subject(32, passes=[])
    plain = np.arange(len(one.plain), dtype=np.float64)
    packs = tuple((i, i + 1, i + 2) for i in range(0, N - 2, 3))
    one = replace(one, sample=replace(one.sample, packs=packs), rows=replace(one.rows, logprob=plain))
    found = {h.about: h.column for h in experiments()["shift"].run(one)}
    columns = [found[f"log-probs of the token -1{text}"] for text in ("", " more with each sequence")]
    place = np.r_[np.arange(99) % 3, 0][one.sample.sequence]
    inside = np.arange(len(plain)) % LENGTH >= 2
    for column, lag in zip(columns, (1, place), strict=True):
        np.testing.assert_array_equal(column[inside], (plain - lag)[inside])


@pytest.mark.parametrize(
    ("prefill", "decode", "cause"), [(0.0, 0.0, "engine-forward"), (1.0, 0.0, "decode-differs-from-prefill")]
)
def test_what_the_engines_prefill_shows_too_is_no_fault_of_its_decode(
    prefill: float, decode: float, cause: str
) -> None:
    one = subject(32, passes=[])
    rollout = np.zeros(N * LENGTH)
    made = {"prefill": rollout + prefill, "decode": rollout + decode}
    one = replace(
        one,
        sample=replace(one.sample, rollout=rollout),
        columns=lambda _, of, changes: iter((change, made[change.kind], "", 0.1) for change in changes),
    )
    found = {h.about: h for h in experiments()["engine"].run(one)}
    decoded = found["the engine's decode"]
    assert decoded.cause is not None
    assert (decoded.cause.name, decoded.only) == (cause, "rollout")


def test_every_class_of_an_experiment_is_a_signature() -> None:
    assert {name for one in experiments().values() for name in one.classes} <= set(signatures())


@pytest.mark.parametrize(
    ("name", "last", "inside", "cause"),
    [
        ("end-placeholders", 1, 0, "eos-placeholder"),
        ("end-placeholders", 3, 0, "padding-counted"),
        ("placeholders", 0, 1, "missing-logprobs"),
        ("placeholders", 0, 6, "tool-tokens-zero"),
        ("missing-values", 5, 0, "nan-row"),
        ("missing-values", 1, 0, "eos-placeholder"),
    ],
)
def test_runs_tell_causes(name: str, last: int, inside: int, cause: str) -> None:
    evidence = toy().evidence()
    shown = (evidence.from_end < last) | ((evidence.position >= 2) & (evidence.position < 2 + inside))
    causes = signatures()[name].causes
    assert cause in causes
    assert read_causes(name, causes, evidence, shown) == (cause,)


def test_missing_values_of_certain_tokens_are_told_by_the_other_side() -> None:
    evidence = toy().evidence()
    shown = evidence.position == 3
    evidence = replace(evidence, trainer=np.where(shown, -1e-4, evidence.trainer))
    causes = signatures()["missing-values"].causes
    assert read_causes("missing-values", causes, evidence, shown) == ("missing-at-certain-tokens",)


@pytest.mark.parametrize(
    ("grid", "side", "severity", "causes"),
    [
        ("logits", "trainer", "warn", ("softmax-16-bit",)),
        ("decimals", "trainer", "warn", ("rounded-storage",)),
        ("bfloat16", "rollout", "warn", ("rounded-storage",)),
        ("bfloat16", "trainer", "warn", ("softmax-16-bit", "rounded-storage")),
        ("decimals", "rollout", "note", ("rounded-storage",)),
    ],
)
def test_grids_tell_causes(grid: str, side: str, severity: Severity, causes: tuple[str, ...]) -> None:
    finding = Finding(code="coarse-grid", severity=severity, where=side, values={"grid": grid})
    evidence = replace(toy().evidence(), findings=(finding,))
    shown = np.ones(len(evidence), np.bool_)
    assert read_causes("coarse-logprobs", signatures()["coarse-logprobs"].causes, evidence, shown) == causes


@pytest.mark.parametrize(("step", "cause"), [(0, "async-staleness"), (1, "switch-within-response")])
def test_versions_within_a_response_tell_a_switch(step: int, cause: str) -> None:
    evidence = toy().evidence()
    version = 4 + step * (evidence.position > 1)
    evidence = replace(evidence, tokens={"weight_version": version})
    causes = signatures()["weight-lag"].causes
    assert read_causes("weight-lag", causes, evidence, np.ones(len(evidence), np.bool_)) == (cause,)
