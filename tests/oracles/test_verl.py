"""Our metrics against verl's rollout correction on the same arrays, key by key; where they differ, by how much and why.

verl runs in an environment of its own, because it asks for a transformers that vLLM refuses: `make oracles` makes it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.oracles.batches import Batch, make_batch, missing, run_oracle

pytestmark = pytest.mark.slow

Verl = dict[str, dict[str, float]]
PYTHON = Path(os.environ.get("VERL_PYTHON", ".venv-verl/bin/python"))
C = 2.0  # verl's default threshold, and ours for its keys

# Ours, verl's setting, verl's key. verl's sign of k1 is b − a.
SAME = [
    ("mean_abs_prob_diff", "debug", "training/rollout_probs_diff_mean"),
    ("std_prob_diff", "debug", "training/rollout_probs_diff_std"),
    ("max_abs_prob_diff", "debug", "training/rollout_probs_diff_max"),
    ("pearson_prob", "debug", "training/rollout_actor_probs_pearson_corr"),
    ("kl_k1", "token", "rollout_corr/kl"),
    ("kl_k1", "token", "rollout_corr/rollout_rs_token_k1_mean"),
    ("kl_k2", "token", "rollout_corr/rollout_rs_token_k2_mean"),
    ("kl_k3", "token", "rollout_corr/k3_kl"),
    ("kl_k3", "token", "rollout_corr/rollout_rs_token_k3_mean"),
    ("chi2_token", "token", "rollout_corr/chi2_token"),
    ("mean_ratio", "token_untruncated", "rollout_corr/rollout_is_mean"),
    ("ess_token", "token_untruncated", "rollout_corr/rollout_is_eff_sample_size"),
    ("frac_outside_clip", "token", "rollout_corr/rollout_rs_token_k1_masked_fraction"),
    ("kl_seq", "sequence", "rollout_corr/rollout_rs_seq_sum_k1_seq_mean"),
    ("seq_log_ratio_std", "sequence", "rollout_corr/rollout_rs_seq_sum_k1_seq_std"),
    ("chi2_seq", "sequence", "rollout_corr/chi2_seq"),
    ("log_ppl_diff", "sequence", "rollout_corr/log_ppl_diff"),
    ("ppl_ratio", "sequence", "rollout_corr/ppl_ratio"),
    ("verl_is_mean", "sequence", "rollout_corr/rollout_is_mean"),
    ("verl_is_std", "sequence", "rollout_corr/rollout_is_std"),
    ("verl_ess", "sequence", "rollout_corr/rollout_is_eff_sample_size"),
]


def in_float32(batch: Batch) -> Batch:
    return replace(batch, rollout=batch.rollout.astype(np.float32), trainer=batch.trainer.astype(np.float32))


def with_empty_row(batch: Batch) -> Batch:
    mask = batch.mask.copy()
    mask[0] = False
    return replace(batch, mask=mask)


def with_far_sequences(batch: Batch, total: float) -> Batch:
    """The first sequence gets D = `total` through its first token, the second D = −`total`."""
    trainer = batch.trainer.copy()
    d = np.where(batch.mask, batch.trainer - batch.rollout, 0.0).sum(axis=1)
    trainer[0, 0] += total - d[0]
    trainer[1, 0] += -total - d[1]
    return replace(batch, trainer=trainer)


BATCHES = {
    "small": make_batch(1, 0.002),
    "medium": make_batch(2, 0.05),
    "large": make_batch(3, 0.3),
    "large_float32": in_float32(make_batch(3, 0.3)),
    "tiny_float32": in_float32(make_batch(4, 1e-7)),
    "empty_row": with_empty_row(make_batch(2, 0.05)),
    "far": with_far_sequences(make_batch(2, 0.05), 25.0),
}


@pytest.fixture(scope="module")
def verl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verl]:
    if not PYTHON.exists():
        missing("the environment of verl")
    return run_oracle(PYTHON.absolute(), "verl_oracle.py", BATCHES, tmp_path_factory.mktemp("verl"))


@pytest.mark.parametrize("batch", ["small", "medium", "large"])
def test_same_metrics(verl: dict[str, Verl], batch: str) -> None:
    ours = BATCHES[batch].metrics()
    theirs = {(key, name): verl[batch][setting][name] for key, setting, name in SAME}
    # verl adds 1e-8 to the denominators of its ESS, and takes k3 and χ² as differences of numbers near 1.
    assert {pair: ours[pair[0]] for pair in theirs} == pytest.approx(theirs, rel=1e-7, abs=1e-15)


def test_comparison_is_not_vacuous(verl: dict[str, Verl]) -> None:
    """No two metrics of the largest batch are alike by chance, and some ratios are outside of the clip range."""
    theirs = {name: verl["large"][setting][name] for _, setting, name in SAME}
    aliases = {"rollout_corr/rollout_rs_token_k1_mean", "rollout_corr/rollout_rs_token_k3_mean"}
    values = sorted(abs(value) for name, value in theirs.items() if name not in aliases)
    assert min(values) > 1e-4
    assert np.diff(values).min() > 1e-6
    assert 0.1 < theirs["rollout_corr/rollout_rs_token_k1_masked_fraction"] < 0.9


def test_same_extremes_of_sequences(verl: dict[str, Verl]) -> None:
    ours, theirs = BATCHES["large"].metrics(), verl["large"]["sequence"]
    assert ours["seq_log_ratio_min"] == pytest.approx(-theirs["rollout_corr/rollout_rs_seq_sum_k1_seq_max"])
    assert ours["seq_log_ratio_max"] == pytest.approx(-theirs["rollout_corr/rollout_rs_seq_sum_k1_seq_min"])
    assert ours["seq_log_ratio_max"] == pytest.approx(np.log(theirs["rollout_corr/rollout_is_max"]))


def test_same_perplexities(verl: dict[str, Verl]) -> None:
    theirs = verl["large"]["token"]
    gap = theirs["rollout_corr/training_log_ppl"] - theirs["rollout_corr/rollout_log_ppl"]
    assert BATCHES["large"].metrics()["log_ppl_diff"] == pytest.approx(gap, rel=1e-9)


def test_float32_is_enough_for_16_bit_gaps(verl: dict[str, Verl]) -> None:
    """On float32 tensors, which verl has in training, both sides still agree to three digits."""
    ours = BATCHES["large_float32"].metrics()
    theirs = {(key, name): verl["large_float32"][setting][name] for key, setting, name in SAME}
    assert {pair: ours[pair[0]] for pair in theirs} == pytest.approx(theirs, rel=1e-3)


def test_float32_loses_an_fp32_gap(verl: dict[str, Verl]) -> None:
    """On purpose: our k3 is expm1(d) − d in float64; verl's exp(d) − d − 1 in float32 is nothing but rounding."""
    batch = BATCHES["tiny_float32"]
    d = (batch.trainer.astype(np.float64) - batch.rollout)[batch.mask]
    ours = batch.metrics()
    assert ours["kl_k3"] == pytest.approx(0.5 * np.square(d).mean(), rel=1e-5)
    theirs = verl["tiny_float32"]["token"]
    assert ours["kl_k2"] == pytest.approx(theirs["rollout_corr/rollout_rs_token_k2_mean"], rel=1e-5)
    assert not 0.1 < theirs["rollout_corr/k3_kl"] / ours["kl_k3"] < 10


def test_weights_that_verl_truncates(verl: dict[str, Verl]) -> None:
    """The batch is one where truncation matters, so that agreement on `verl_is_*` means agreement about it."""
    assert verl["large"]["sequence_untruncated"]["rollout_corr/rollout_is_max"] > 1.5 * C
    mean, untruncated = (
        verl["large"][setting]["rollout_corr/rollout_is_mean"] for setting in ("sequence", "sequence_untruncated")
    )
    assert untruncated > 1.2 * mean


def test_far_sequences(verl: dict[str, Verl]) -> None:
    """On purpose: verl clamps d and D at ±20 before it exponentiates, without a word; we clamp nothing."""
    batch, theirs = BATCHES["far"], verl["far"]["sequence"]
    ours, n_sequences, n_tokens = batch.metrics(), len(batch.mask), batch.mask.sum()
    others = BATCHES["medium"].metrics()["chi2_seq"]
    assert others is not None
    assert others < 1
    assert theirs["rollout_corr/chi2_seq"] == pytest.approx(np.exp(40) / n_sequences)
    assert ours["chi2_seq"] == pytest.approx(np.exp(50) / n_sequences)
    # The token that carries it is beyond the bound too.
    assert theirs["rollout_corr/chi2_token"] == pytest.approx(np.exp(40) / n_tokens)
    assert ours["chi2_token"] == pytest.approx(np.exp(2 * (batch.trainer - batch.rollout)[0, 0]) / n_tokens)
    # k3_kl is not clamped, the k3 that verl rejects by is.
    assert ours["kl_k3"] == pytest.approx(theirs["rollout_corr/k3_kl"])
    assert theirs["rollout_corr/rollout_rs_token_k3_mean"] == pytest.approx(np.exp(20) / n_tokens)


def test_empty_sequences(verl: dict[str, Verl]) -> None:
    """On purpose: a row without tokens is no sequence to us; verl's means over sequences count it, with D = 0."""
    batch, theirs = BATCHES["empty_row"], verl["empty_row"]["sequence"]
    ours = batch.metrics()
    share = 1 - 1 / len(batch.mask)
    for key in ("chi2_seq", "log_ppl_diff"):
        assert theirs[f"rollout_corr/{key}"] == pytest.approx(ours[key] * share, rel=1e-9)
    assert theirs["rollout_corr/ppl_ratio"] == pytest.approx(ours["ppl_ratio"] * share + 1 - share, rel=1e-9)
    # What it rejects by counts valid rows only, as we do.
    assert theirs["rollout_corr/rollout_rs_seq_sum_k1_seq_mean"] == pytest.approx(ours["kl_seq"], rel=1e-9)
