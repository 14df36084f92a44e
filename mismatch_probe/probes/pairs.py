"""One pair: everything that is computed of a rollout pass and a trainer pass, in one read of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mismatch_probe.metrics.accumulate import PairSums
from mismatch_probe.metrics.column import Scratch
from mismatch_probe.metrics.curves import COLUMN_EDGES
from mismatch_probe.metrics.exact import ESTIMATOR_COLUMNS, ExactRows, estimator_costs, exact_metrics
from mismatch_probe.metrics.frame import exact_rows, pair_chunks, pass_sequences
from mismatch_probe.metrics.groups import STEP, Grouping, GroupSums
from mismatch_probe.metrics.intervals import Estimate
from mismatch_probe.metrics.ladder import BudgetSums
from mismatch_probe.metrics.power import PromptsNeeded, prompts_needed
from mismatch_probe.metrics.ratio_test import ratio_tests
from mismatch_probe.metrics.sample import usable_tokens
from mismatch_probe.metrics.summary import compute_metrics, token_metrics
from mismatch_probe.metrics.sums import Prefixes, PrefixSums
from mismatch_probe.passes import PassId
from mismatch_probe.probes.groups import RecordedGroups
from mismatch_probe.results.comparison import Pair, PairName
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.runs.passes import Passes
from mismatch_probe.types import MetricValue

_POWER_KEYS = ("mean_abs_logprob_diff", "rms_logprob_diff", "kl_k3")


@dataclass(frozen=True)
class PassPair:
    """A rollout pass and a trainer pass."""

    rollout: PassId
    trainer: PassId

    @property
    def diagonal(self) -> str:
        """What figures call this pair; empty where its dtypes differ. Whatever a file recorded is on the diagonal."""
        if self.rollout.dtype == self.trainer.dtype:
            return self.rollout.dtype
        return f"recorded → {self.trainer.dtype}" if self.rollout.recorded else ""

    @property
    def name(self) -> PairName:
        """What the summary calls it."""
        return PairName(
            rollout_pass=str(self.rollout),
            trainer_pass=str(self.trainer),
            rollout_dtype=self.rollout.dtype,
            trainer_dtype=self.trainer.dtype,
            trainer_mode=self.trainer.mode,
        )


@dataclass(frozen=True)
class PairResult:
    """A pair's results.

    Attributes:
        passes: The two passes.
        pair: What the summary says of them.
        sums: What everything was computed from.
        prefixes: Prefix sums of an on-policy pair on the diagonal, from which longer responses are predicted.
    """

    passes: PassPair
    pair: Pair
    sums: PairSums
    prefixes: Prefixes | None


def analyse_pair(
    run: RunDirectory,
    passes: Passes,
    both: PassPair,
    seed: int,
    recorded: RecordedGroups | None = None,
    ratio_limits: Sequence[float] = (),
) -> PairResult:
    """Reads the two passes, and the reference where it has scored these tokens, once.

    Args:
        run: Of the two passes.
        passes: Of the run.
        both: The two passes.
        seed: Of the intervals.
        recorded: By what the tokens can be sorted; None where no dump says.
        ratio_limits: Factors of F(τ) beside the fixed one.

    Raises:
        TableError: A table is missing or corrupt, or the passes do not hold the same tokens.
    """
    rollout_pass, trainer_pass = str(both.rollout), str(both.trainer)
    reference = None
    if passes.reference is not None and not why_missing(run, PassPair(both.rollout, passes.reference)):
        reference = str(passes.reference)
    chunks = pair_chunks(
        run,
        rollout_pass,
        trainer_pass,
        trainer_columns=("entropy", "rank"),
        reference_pass=reference,
        special_ids=run.manifest.special_token_ids,
        rollout_entropy=True,
        beside=None if recorded is None else recorded.columns(),
    )
    scratch = Scratch(run.path)
    sums: PairSums | None = None
    budget: BudgetSums | None = None
    step = pass_sequences(run, rollout_pass).step
    by_step = [] if step is None else [Grouping(STEP, step)]
    groups = GroupSums(by_step if recorded is None else recorded.groupings, scratch)
    prefixes: PrefixSums | None = None
    for chunk in chunks:
        if sums is None:
            bins = {name: edges for name, edges in COLUMN_EDGES.items() if name in chunk.columns}
            sums = PairSums(chunk, bins=bins, scratch=scratch)
            budget = BudgetSums(sums.n_prompts) if reference is not None else None
            prefixes = PrefixSums() if both.diagonal and chunk.on_policy else None
        sums.update(chunk)
        groups.update(chunk)
        if prefixes is not None:
            prefixes.update(chunk)
        if budget is not None and len(chunk.sequence):
            budget.update(chunk)
    assert sums is not None
    exact = exact_rows(run, rollout_pass, trainer_pass, sums)
    compared = exact is not None and bool(exact.finite(*ESTIMATOR_COLUMNS).any())
    pair = pair_of(both, sums, compute_metrics(sums, exact, ratio_limits=ratio_limits, seed=seed)).model_copy(
        update={
            "n_nonfinite_exact": 0 if exact is None else int(np.count_nonzero(~exact.finite("kl"))),
            "budget": None if budget is None else budget.metrics(seed=seed),
            "estimators": tuple(estimator_costs(exact)) if exact is not None and compared else None,
            "ratio_tests": tuple(ratio_tests(sums, seed=seed)) if sums.on_policy and sums.n_usable else (),
            "prompts_needed": _prompts_needed(sums, exact) if both.diagonal and sums.n_usable else {},
            "groups": tuple(groups.results(seed=seed)),
        }
    )
    return PairResult(both, pair, sums, None if prefixes is None else prefixes.result())


def pair_of(both: PassPair, sums: PairSums, metrics: dict[str, MetricValue]) -> Pair:
    """A pair's counts and metrics, without all that takes more than its sums."""
    excluded = sums.excluded
    return Pair(
        **dict(both.name),
        on_policy=sums.on_policy,
        n_tokens=sums.n_tokens,
        n_sequences=len(sums.prompt),
        n_prompts=len(sums.prompt_ids),
        n_prompts_usable=int(np.count_nonzero(sums.tokens.counts)),
        n_nonfinite=excluded.n_nonfinite,
        n_excluded=excluded.n_tokens,
        excluded=tuple(excluded.rows()),
        mean_abs_logprob_diff_all_finite=sums.mean_abs_all_finite,
        metrics=metrics,
    )


def _prompts_needed(sums: PairSums, exact: ExactRows | None) -> dict[str, PromptsNeeded]:
    """What ±5 % would take."""
    tokens, metrics = usable_tokens(sums), token_metrics()
    found = {key: metrics[key](tokens) for key in _POWER_KEYS} | {"kl_exact": exact_metrics(exact)["kl_exact"]}
    return {key: prompts_needed(estimate) for key, estimate in found.items() if isinstance(estimate, Estimate)}


def why_missing(run: RunDirectory, pair: PassPair) -> str:
    """Why two passes cannot be compared; empty where they can."""
    rollout_pass, trainer_pass = str(pair.rollout), str(pair.trainer)
    for name in (rollout_pass, trainer_pass):
        if not run.finished(name):
            record = run.record_of(name)
            not_yet = "this pass has not run yet; continue the run with --resume"
            return not_yet if record is None else record.why
    trainer = run.manifest.passes[trainer_pass]
    if run.source_of(rollout_pass) not in trainer.covers:
        not_yet = "the trainer has not scored these sequences yet; continue the run with --resume"
        return trainer.extension_failure or not_yet
    return ""
