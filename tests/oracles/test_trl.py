"""Our metrics against what TRL's GRPO trainer logs under `sampling/` for the same arrays."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.oracles.batches import Batch, make_batch, missing, run_oracle

pytestmark = pytest.mark.slow

Trl = dict[str, dict[str, float]]
DIFFERENCE, RATIO = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"


def with_nan(batch: Batch) -> Batch:
    """vLLM gave no log-prob for one token of each of the first three sequences."""
    rollout = batch.rollout.copy()
    rollout[:3, 0] = np.nan
    return replace(batch, rollout=rollout)


BATCHES = {
    "tiny": make_batch(1, 1e-6),
    "small": make_batch(2, 0.002),
    "large": make_batch(3, 0.3),
    "nan": with_nan(make_batch(3, 0.3)),
}


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trl]:
    if importlib.util.find_spec("trl") is None:
        missing("trl")
    return run_oracle(sys.executable, "trl_oracle.py", BATCHES, tmp_path_factory.mktemp("trl"))


def ours(name: str) -> dict[str, float]:
    return {key: value for key, value in BATCHES[name].metrics().items() if value is not None}


@pytest.mark.parametrize("batch", ["tiny", "small", "large"])
def test_same_metrics(trl: dict[str, Trl], batch: str) -> None:
    metrics, token, sequence = ours(batch), trl[batch]["token"], trl[batch]["sequence"]
    assert metrics["mean_abs_logprob_diff"] == pytest.approx(token[f"{DIFFERENCE}/mean"], rel=1e-12)
    assert metrics["max_abs_logprob_diff"] == pytest.approx(token[f"{DIFFERENCE}/max"], rel=1e-12)
    assert metrics["mean_ratio"] == pytest.approx(token[f"{RATIO}/mean"], rel=1e-12)
    extremes = [abs(math.log(token[f"{RATIO}/{end}"])) for end in ("min", "max")]
    assert metrics["max_abs_logprob_diff"] == pytest.approx(max(extremes), rel=1e-9)
    for end in ("min", "max"):
        assert metrics[f"seq_log_ratio_{end}"] == pytest.approx(math.log(sequence[f"{RATIO}/{end}"]), rel=1e-9)
    # (mean w)² = ess_seq · mean w², so the mean weight that TRL logs must be the one between our ESS and our χ².
    mean = math.sqrt(metrics["ess_seq"] * (1 + metrics["chi2_seq"]))
    assert mean == pytest.approx(sequence[f"{RATIO}/mean"], rel=1e-12)


def test_comparison_is_not_vacuous(trl: dict[str, Trl]) -> None:
    token, sequence = trl["large"]["token"], trl["large"]["sequence"]
    assert token[f"{RATIO}/min"] < 0.6
    assert token[f"{RATIO}/max"] > 1.5
    assert sequence[f"{RATIO}/mean"] > token[f"{RATIO}/mean"] + 0.1
    assert trl["small"]["token"][f"{DIFFERENCE}/mean"] < 0.1 * token[f"{DIFFERENCE}/mean"]


def test_mean_of_sequence_weights(trl: dict[str, Trl]) -> None:
    """On purpose: TRL's mean is over sequences; `verl_is_mean` truncates, and is over tokens, as verl's."""
    batch = BATCHES["large"]
    weight = np.exp(np.where(batch.mask, batch.trainer - batch.rollout, 0.0).sum(axis=1))
    assert trl["large"]["sequence"][f"{RATIO}/mean"] == pytest.approx(weight.mean())
    truncated = np.minimum(weight, 2.0)
    assert ours("large")["verl_is_mean"] == pytest.approx(np.average(truncated, weights=batch.mask.sum(axis=1)))


def test_masked_sequences(trl: dict[str, Trl]) -> None:
    """On purpose: by default TRL sets the weight of sequences with exp D > 3 to 0 and logs that; ours drop nothing."""
    batch, logged = BATCHES["large"], trl["large"]["default"]
    weight = np.exp(np.where(batch.mask, batch.trainer - batch.rollout, 0.0).sum(axis=1))
    kept = np.where(weight > 3, 0.0, weight)
    assert (kept == 0).any()
    assert logged[f"{RATIO}/mean"] == pytest.approx(kept.mean())
    assert logged[f"{RATIO}/min"] == 0
    assert logged[f"{RATIO}/max"] == pytest.approx(kept.max())
    assert math.exp(ours("large")["seq_log_ratio_max"]) > 3
    # Nothing of this reaches the differences of log-probs.
    assert logged[f"{DIFFERENCE}/mean"] == trl["large"]["token"][f"{DIFFERENCE}/mean"]


def test_tokens_without_logprob(trl: dict[str, Trl]) -> None:
    """On purpose: TRL gives a NaN token the ratio 1 and keeps its sequence; we leave both out, and say so."""
    batch, metrics = BATCHES["nan"], ours("nan")
    token, sequence = trl["nan"]["token"], trl["nan"]["sequence"]
    assert metrics["mean_abs_logprob_diff"] == pytest.approx(token[f"{DIFFERENCE}/mean"], rel=1e-12)
    n, n_nan = batch.mask.sum(), np.isnan(batch.rollout[batch.mask]).sum()
    assert n_nan == 3
    assert token[f"{RATIO}/mean"] == pytest.approx(((n - n_nan) * metrics["mean_ratio"] + n_nan) / n, rel=1e-12)
    d = np.where(batch.mask, batch.trainer - batch.rollout, 0.0)
    assert sequence[f"{RATIO}/mean"] == pytest.approx(np.exp(np.nansum(d, axis=1)).mean())
    whole = np.exp(d[3:].sum(axis=1)).mean()
    assert math.sqrt(metrics["ess_seq"] * (1 + metrics["chi2_seq"])) == pytest.approx(whole)
