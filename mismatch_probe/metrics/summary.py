"""All metrics of a pair of policies over the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TypeVar

from mismatch_probe.metrics.accumulate import PairSums, as_sums
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.exact import ExactRows, exact_metrics
from mismatch_probe.metrics.intervals import Estimate, evaluate, join_why
from mismatch_probe.metrics.sample import Pair, count_excluded, usable_sequences, usable_tokens
from mismatch_probe.metrics.sequence import sequence_metrics
from mismatch_probe.metrics.token import token_metrics
from mismatch_probe.types import MetricValue

Rows = TypeVar("Rows")
Result = Estimate | MetricValue

NO_TOKENS = "there are no response tokens"
OFF_POLICY = "the rollout policy did not sample these tokens"


def compute_metrics(
    pair: Pair,
    exact: ExactRows | None = None,
    *,
    keys: Collection[str] = tuple(CATALOG),
    seed: int = 0,
    replicates: int = 1000,
) -> dict[str, MetricValue]:
    """Metrics of the catalog, in its order, each with its value or the reason why it has none.

    Unusable tokens are left out of token metrics, sequences with any of them out of sequence metrics, and then every
    metric says over how many rows it was computed.

    Args:
        pair: The paired log-probs, or their sums where they came in chunks or another clip range is wanted.
        exact: The positions at which full rows of logits were compared; without them exact metrics have no value.
        keys: Which ones; all by default.
        seed: Seed of the bootstrap; the same pair and seed give the same intervals.
        replicates: Bootstrap replicates.
    """
    sums = as_sums(pair)
    n_tokens, n_sequences = sums.n_tokens, len(sums.sequences.length)
    if n_tokens == 0:
        return dict.fromkeys((key for key in CATALOG if key in keys), MetricValue(None, why=NO_TOKENS))
    tokens, sequences = usable_tokens(sums), usable_sequences(sums)
    no_token = f"none of the {n_tokens} tokens has usable log-probs"
    no_sequence = f"none of the {n_sequences} sequences has usable log-probs throughout"
    of_tokens = {key: metric for key, metric in token_metrics().items() if key in keys}
    of_sequences = {key: metric for key, metric in sequence_metrics().items() if key in keys}
    results = {
        **_build(of_tokens, tokens, len(tokens), sums, no_token),
        **_build(of_sequences, sequences, len(sequences), sums, no_sequence),
        **{key: result for key, result in exact_metrics(exact).items() if key in keys},
    }
    estimates = {key: result for key, result in results.items() if isinstance(result, Estimate)}
    values = evaluate(estimates, seed=seed, replicates=replicates)
    values |= {key: result for key, result in results.items() if isinstance(result, MetricValue)}
    notes = {"token": "", "sequence": "", "exact": ""}
    if count_excluded(sums):
        notes["token"] = f"computed over the {len(tokens)} of {n_tokens} tokens with usable log-probs"
        notes["sequence"] = f"computed over the {len(sequences)} of {n_sequences} sequences with usable log-probs"
    return {key: _annotate(values[key], notes[info.level]) for key, info in CATALOG.items() if key in keys}


def _build(
    metrics: Mapping[str, Callable[[Rows], Result]], rows: Rows, n_rows: int, pair: PairSums, why_none: str
) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for key, metric in metrics.items():
        off_policy = off_policy_why(pair, key)
        if off_policy or n_rows == 0:
            results[key] = MetricValue(None, why=off_policy or why_none)
        else:
            results[key] = metric(rows)
    return results


def off_policy_why(pair: Pair, key: str) -> str:
    """Why metric `key` does not apply to `pair`; empty where it does."""
    if pair.on_policy or not CATALOG[key].needs_on_policy:
        return ""
    return pair.off_policy_why or OFF_POLICY


def _annotate(value: MetricValue, note: str) -> MetricValue:
    return value if value.value is None else replace(value, why=join_why(note, value.why))
