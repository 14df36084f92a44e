"""One cell of the matrix: everything that is computed of a rollout pass and a trainer pass, in one read of both."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mismatch_probe.metrics.accumulate import PairSums
from mismatch_probe.metrics.budget import BudgetSums
from mismatch_probe.metrics.exact import ESTIMATOR_COLUMNS, EstimatorCost, ExactRows, estimator_costs, exact_metrics
from mismatch_probe.metrics.frame import exact_rows, pair_chunks, pass_sequences
from mismatch_probe.metrics.intervals import Estimate
from mismatch_probe.metrics.power import PromptsNeeded, prompts_needed
from mismatch_probe.metrics.prefixes import Prefixes, PrefixSums
from mismatch_probe.metrics.ratio_test import RatioTest, ratio_tests
from mismatch_probe.metrics.sample import finite_tokens
from mismatch_probe.metrics.steps import StepResult, StepSums
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.metrics.token import token_metrics
from mismatch_probe.metrics.where import COLUMN_EDGES
from mismatch_probe.probes.planning import Passes, RolloutPass, TrainerPass
from mismatch_probe.tables import RunDirectory
from mismatch_probe.types import MetricValue

_POWER_KEYS = ("mean_abs_logprob_diff", "rms_logprob_diff", "kl_k3")


@dataclass(frozen=True)
class Cell:
    """A rollout pass and a trainer pass."""

    rollout: RolloutPass
    trainer: TrainerPass

    @property
    def diagonal(self) -> str:
        """What figures call this cell; empty where it is off the diagonal. Whatever a file recorded is on it."""
        if self.rollout.dtype == self.trainer.dtype:
            return self.rollout.dtype
        return f"recorded → {self.trainer.dtype}" if self.rollout.dtype == "recorded" else ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "rollout_pass": self.rollout.pass_id,
            "trainer_pass": self.trainer.pass_id,
            "rollout_dtype": self.rollout.dtype,
            "trainer_dtype": self.trainer.dtype,
            "trainer_mode": self.trainer.mode,
        }


@dataclass(frozen=True)
class PairResult:
    """A cell's results.

    Attributes:
        cell: The two passes.
        sums: What everything was computed from.
        metrics: By key of the catalog.
        budget: The error budget, None without a reference.
        estimators: What sampled KL estimators cost on this pair, None where no rows were compared.
        ratio_tests: Whether the mean importance ratio is 1; empty off policy, where it need not be.
        power: How many more prompts a few metrics need, by key; on the diagonal only.
        n_nonfinite_exact: Compared positions at which KL(μ‖π) is infinite or not a number.
        prefixes: Prefix sums of an on-policy pair on the diagonal, from which longer responses are predicted.
        steps: Of a recorded run whose sequences name their training step, a few metrics of each step.
    """

    cell: Cell
    sums: PairSums
    metrics: dict[str, MetricValue]
    budget: dict[str, MetricValue] | None
    estimators: list[EstimatorCost] | None
    ratio_tests: list[RatioTest]
    power: dict[str, PromptsNeeded]
    n_nonfinite_exact: int
    prefixes: Prefixes | None
    steps: list[StepResult]

    def as_dict(self) -> dict[str, Any]:
        """The cell as `summary.json` has it."""
        budget, estimators, excluded = self.budget, self.estimators, self.sums.excluded
        return {
            **self.cell.as_dict(),
            "on_policy": self.sums.on_policy,
            "n_tokens": self.sums.n_tokens,
            "n_sequences": len(self.sums.prompt),
            "n_prompts": len(self.sums.prompt_ids),
            "n_prompts_finite": int(np.count_nonzero(self.sums.tokens.counts)),
            "n_nonfinite": excluded.n_nonfinite,
            "n_excluded": excluded.n_tokens,
            "excluded": [vars(row) for row in excluded.rows()],
            "mean_abs_logprob_diff_all_finite": self.sums.mean_abs_all_finite,
            "n_nonfinite_exact": self.n_nonfinite_exact,
            "metrics": {key: value.as_dict() for key, value in self.metrics.items()},
            "budget": None if budget is None else {key: value.as_dict() for key, value in budget.items()},
            "estimators": None if estimators is None else [asdict(cost) for cost in estimators],
            "ratio_tests": [test.as_dict() for test in self.ratio_tests],
            "prompts_needed": {key: vars(needed) for key, needed in self.power.items()},
            "steps": [step.as_dict() for step in self.steps],
        }


def analyse_pair(run: RunDirectory, passes: Passes, cell: Cell, seed: int) -> PairResult:
    """Reads the two passes, and the reference where it has scored these tokens, once.

    Raises:
        TableError: A table is missing or corrupt, or the passes do not hold the same tokens.
    """
    rollout_pass, trainer_pass = cell.rollout.pass_id, cell.trainer.pass_id
    reference = passes.reference.pass_id if passes.reference is not None else None
    if reference is not None and why_missing(run, rollout_pass, reference):
        reference = None
    chunks = pair_chunks(
        run,
        rollout_pass,
        trainer_pass,
        trainer_columns=("entropy", "rank"),
        reference_pass=reference,
        special_ids=run.manifest.get("special_token_ids", ()),
    )
    sums: PairSums | None = None
    budget: BudgetSums | None = None
    steps = StepSums(pass_sequences(run, rollout_pass).step)
    prefixes: PrefixSums | None = None
    for chunk in chunks:
        if sums is None:
            sums = PairSums(chunk, bins={name: edges for name, edges in COLUMN_EDGES.items() if name in chunk.columns})
            budget = BudgetSums(sums.n_prompts) if reference is not None else None
            prefixes = PrefixSums() if cell.diagonal and chunk.on_policy else None
        sums.update(chunk)
        steps.update(chunk)
        if prefixes is not None:
            prefixes.update(chunk)
        if budget is not None and len(chunk.sequence):
            budget.update(chunk)
    assert sums is not None
    exact = exact_rows(run, rollout_pass, trainer_pass, sums)
    compared = exact is not None and bool(exact.finite(*ESTIMATOR_COLUMNS).any())
    return PairResult(
        cell=cell,
        sums=sums,
        metrics=compute_metrics(sums, exact, seed=seed),
        budget=None if budget is None else budget.metrics(seed=seed),
        estimators=estimator_costs(exact) if exact is not None and compared else None,
        ratio_tests=ratio_tests(sums, seed=seed) if sums.on_policy and sums.n_finite else [],
        power=_power(sums, exact) if cell.diagonal and sums.n_finite else {},
        n_nonfinite_exact=0 if exact is None else int(np.count_nonzero(~exact.finite("kl"))),
        prefixes=None if prefixes is None else prefixes.result(),
        steps=steps.results(seed=seed),
    )


def _power(sums: PairSums, exact: ExactRows | None) -> dict[str, PromptsNeeded]:
    """What ±5 % would take."""
    tokens, metrics = finite_tokens(sums), token_metrics()
    found = {key: metrics[key](tokens) for key in _POWER_KEYS} | {"kl_exact": exact_metrics(exact)["kl_exact"]}
    return {key: prompts_needed(estimate) for key, estimate in found.items() if isinstance(estimate, Estimate)}


def why_missing(run: RunDirectory, rollout_pass: str, trainer_pass: str) -> str:
    """Why two passes cannot be compared; empty where they can."""
    passes = run.manifest["passes"]
    for name in (rollout_pass, trainer_pass):
        if not run.finished(name):
            return str(passes.get(name, {}).get("why", "this pass has not run yet; continue the run with --resume"))
    if run.source_of(rollout_pass) not in passes[trainer_pass].get("covers", []):
        not_yet = "the trainer has not scored these sequences yet; continue the run with --resume"
        return str(passes[trainer_pass].get("extension_failure", not_yet))
    return ""
