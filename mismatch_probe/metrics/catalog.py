"""What each metric is: its definition, its unit, what others call it, and the thresholds that were published.

`docs/metrics.md` is generated from this. It needs no numpy, so that the command line's help stays cheap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace

from mismatch_probe.metrics.further_catalog import FURTHER_SEQUENCE, FURTHER_TOKEN
from mismatch_probe.metrics.info import CALIBRATED_PROMPTS, INF, SECOND_MOMENT_PROMPTS, MetricInfo, Threshold

# Metrics that only `rl gradient` has.
_BESIDE = {"ess_weights": SECOND_MOMENT_PROMPTS}

SYMBOLS = (
    ("μ", "rollout policy", "the inference engine that sampled the tokens"),
    ("π", "trainer policy", "the training framework's forward pass over the same tokens"),
    ("b", "`rollout_logprob`", "log μ(token | prefix), natural logarithm, of the distribution that was sampled from"),
    ("a", "`trainer_logprob`", "log π(token | prefix), the same token after the same ids"),
    ("d", "`log_ratio`", "a − b, trainer minus rollout, nats"),
    ("ρ", "`importance_ratio`", "exp d"),
    ("T", "`response_length`", "tokens that the policy produced in a sequence, the end-of-sequence token included"),
    ("D", "`seq_log_ratio`", "Σ d over a sequence"),
    ("H", "`entropy`", "entropy of a distribution over the whole vocabulary, nats"),
)
"""Symbol, name in code and meaning, as formulas use them."""


def calibrated_prompts(key: str) -> int:
    """Below this many prompts the interval of metric `key` is marked uncalibrated."""
    info = metric_info(key)
    return _BESIDE.get(key, CALIBRATED_PROMPTS) if info is None else info.calibrated_prompts


_TOKEN = (
    MetricInfo(
        "mean_abs_logprob_diff",
        "Mean |Δ log-prob|",
        "mean |d|",
        "nats",
        "token",
        positive=True,
        sign="0 where both sides agree to the bit.",
        names={
            "TRL": "sampling/sampling_logp_difference/mean",
            "SkyRL": "policy/rollout_train_logprobs_abs_diff_mean",
            "slime": "train_rollout_logprob_abs_diff",
        },
        thresholds=(
            Threshold("at most 0.1; at most 1e-6 when deterministic", "slime, continuous integration", above=(0.1,)),
        ),
    ),
    MetricInfo(
        "rms_logprob_diff",
        "RMS Δ log-prob",
        "sqrt(mean d²)",
        "nats",
        "token",
        positive=True,
        estimator="Weighs large gaps more than the mean does; its square is what contributions add up to.",
    ),
    MetricInfo(
        "p99_abs_logprob_diff",
        "99th percentile |Δ log-prob|",
        "q₀.₉₉ |d|",
        "nats",
        "token",
        positive=True,
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        estimator="Interval of a quantile, over prompts.",
    ),
    MetricInfo(
        "max_abs_logprob_diff",
        "Largest |Δ log-prob|",
        "max |d|",
        "nats",
        "token",
        positive=True,
        has_interval=False,
        estimator="Grows with the number of tokens, so two runs of unequal size do not compare.",
        names={"TRL": "sampling/sampling_logp_difference/max"},
    ),
    MetricInfo(
        "mean_abs_prob_diff",
        "Mean |Δ probability|",
        "mean |eᵃ − eᵇ|",
        "probability",
        "token",
        positive=True,
        bounds=(0.0, 1.0),
        names={"verl": "training/rollout_probs_diff_mean"},
        thresholds=(
            Threshold("below 0.005 normal", "verl, FAQ", above=(0.005,)),
            Threshold("above 0.01 a problem", "verl, FAQ", above=(0.01,)),
        ),
    ),
    MetricInfo(
        "std_prob_diff",
        "Standard deviation of |Δ probability|",
        "sd |eᵃ − eᵇ|",
        "probability",
        "token",
        positive=True,
        bounds=(0.0, 1.0),
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        names={"verl": "training/rollout_probs_diff_std"},
    ),
    MetricInfo(
        "max_abs_prob_diff",
        "Largest |Δ probability|",
        "max |eᵃ − eᵇ|",
        "probability",
        "token",
        positive=True,
        has_interval=False,
        bounds=(0.0, 1.0),
        names={"verl": "training/rollout_probs_diff_max"},
    ),
    MetricInfo(
        "pearson_prob",
        "Correlation of probabilities",
        "corr(eᵃ, eᵇ)",
        "",
        "token",
        bounds=(-1.0, 1.0),
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        sign="1 where the probabilities are proportional.",
        names={"verl": "training/rollout_actor_probs_pearson_corr"},
    ),
    MetricInfo(
        "kl_k1",
        "KL estimate k1",
        "mean(b − a)",
        "nats",
        "token",
        needs_on_policy=True,
        sign="Positive where the trainer finds the tokens less likely. Unbiased for KL(μ‖π), and often negative by "
        "chance.",
        estimator="Off policy, for tokens of another policy q, it estimates KL(q‖π) − KL(q‖μ): near 0 or negative "
        "however large the mismatch is.",
        names={"verl": "rollout_corr/kl", "OpenRLHF": "vllm_kl", "Oat": "kl_sample_train_v1"},
        thresholds=(Threshold("above 0.1 in size warns", "verl", above=(0.1,), of_size=True),),
    ),
    MetricInfo(
        "kl_k2",
        "KL estimate k2",
        "½ mean d²",
        "nats",
        "token",
        positive=True,
        estimator="Correct to second order in d, also off policy.",
        names={"verl": "rollout_corr/rollout_rs_token_k2_mean", "Oat": "kl_sample_train_v2"},
    ),
    MetricInfo(
        "kl_k3",
        "KL estimate k3",
        "mean(eᵈ − 1 − d)",
        "nats",
        "token",
        positive=True,
        sign="Every token adds 0 or more.",
        estimator="expm1(d) − d in float64; in float32 an FP32 comparison loses every digit. NeMo-RL's "
        "follows a setting; this is its default kind.",
        names={"verl": "rollout_corr/k3_kl", "prime-rl": "mismatch_kl", "NeMo-RL": "gen_kl_error"},
        thresholds=(
            Threshold("below 0.001 acceptable as gen_kl_error", "NeMo-RL", above=(1e-3,)),
            Threshold(
                "at most 0.015 at each of 20 steps to merge a model; nightly at most 5e-4", "prime-rl", above=(0.015,)
            ),
            Threshold(
                "1e-5 to 1e-3 usual of dense models, 1e-3 to 1e-1 of mixtures of experts",
                "SGLang RL community",
                above=(1e-3, 0.1),
            ),
        ),
    ),
    MetricInfo(
        "token_mult_prob_error",
        "Multiplicative probability error",
        "mean exp|d|",
        "",
        "token",
        bounds=(1.0, INF),
        sign="1 where both sides agree.",
        names={"NeMo-RL": "token_mult_prob_error"},
        thresholds=(Threshold("above 1.05 investigate; gates at 1.05 to 1.1", "NeMo-RL", above=(1.05, 1.1)),),
    ),
    MetricInfo(
        "js_k3",
        "Jensen–Shannon estimate",
        "mean(½k3(a‖m) + ½k3(b‖m))",
        "nats",
        "token",
        positive=True,
        estimator="m = log(½eᵃ + ½eᵇ), at the sampled tokens alone.",
        names={"NeMo-RL": "js_divergence_error"},
    ),
    MetricInfo(
        "chi2_token",
        "χ² per token",
        "mean ρ² − 1",
        "",
        "token",
        needs_on_policy=True,
        bounds=(-1.0, INF),
        sign="How much variance the weights of tokens add.",
        names={"verl": "rollout_corr/chi2_token"},
        thresholds=(Threshold("above 1 severe", "verl", above=(1.0,)),),
    ),
    MetricInfo(
        "ess_token",
        "Effective sample size, tokens",
        "(Σρ)² / (n Σρ²)",
        "",
        "token",
        needs_on_policy=True,
        bounds=(0.0, 1.0),
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        sign="A fraction of the tokens; 1 loses nothing.",
        estimator="Weights are not truncated, unlike verl's.",
        thresholds=(Threshold("below 0.3 warns, below 0.1 is an error", "martingale", below=(0.3, 0.1)),),
    ),
    MetricInfo(
        "mean_ratio",
        "Mean importance ratio",
        "mean ρ",
        "",
        "token",
        needs_on_policy=True,
        bounds=(0.0, INF),
        sign="On policy E[ρ] = 1 exactly: an interval that excludes 1 is a one-sided fault, and rounding does not do "
        "that.",
        estimator="Also tested by position and by probability.",
        source="a martingale test",
    ),
    MetricInfo(
        "frac_outside_clip",
        "Fraction of ratios outside the clip range",
        "mean 1[ρ ∉ clip]",
        "",
        "token",
        bounds=(0.0, 1.0),
        estimator="Clip range [0.8, 1.28]: what a PPO clip would at most touch if rollout log-probs served as the old "
        "ones.",
    ),
    MetricInfo(
        "confident_disagreement_rate",
        "Confident disagreements",
        "mean 1[b > −0.7, d < −2]",
        "",
        "token",
        bounds=(0.0, 1.0),
        sign="Tokens that the rollout finds likely and the trainer does not.",
        estimator="Interval of a rare event (Poisson).",
        source="martingale, as a count",
    ),
    MetricInfo(
        "confident_disagreement_count",
        "Number of confident disagreements",
        "Σ 1[b > −0.7, d < −2]",
        "tokens",
        "token",
        has_interval=False,
        bounds=(0.0, INF),
        source="martingale",
        thresholds=(Threshold("1 or more is an error", "martingale", above=(0.0,)),),
    ),
)

_ON_POLICY_NOISE = "Its relative error is about 2/(σ_D √N), so it stands beside Σ k3 and `kl_seq_exact`."
_SEQUENCE = (
    MetricInfo(
        "seq_log_ratio_mean",
        "Mean sequence log ratio",
        "mean D",
        "nats",
        "sequence",
        needs_on_policy=True,
        sign="On policy −E D is the sequence KL, so it is negative in expectation.",
    ),
    MetricInfo(
        "seq_log_ratio_std",
        "Spread of the sequence log ratio",
        "sd D",
        "nats",
        "sequence",
        positive=True,
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
    ),
    MetricInfo("seq_log_ratio_min", "Smallest sequence log ratio", "min D", "nats", "sequence", has_interval=False),
    MetricInfo("seq_log_ratio_max", "Largest sequence log ratio", "max D", "nats", "sequence", has_interval=False),
    MetricInfo(
        "kl_seq",
        "Sequence KL",
        "−mean D",
        "nats",
        "sequence",
        needs_on_policy=True,
        estimator=_ON_POLICY_NOISE,
        source="KL[μ‖π] in the figures of arXiv 2510.26788; its code is not published, so this is a reading",
        names={"verl": "rollout_corr/rollout_rs_seq_sum_k1_seq_mean"},
    ),
    MetricInfo(
        "seq_log_ratio_slope_per_1k",
        "Sequence log ratio per 1,000 tokens, slope",
        "slope of D on T/1000",
        "nats per 1,000 tokens",
        "sequence",
        needs_on_policy=True,
        estimator="Least squares; no value where lengths vary by less than 5 % of their mean.",
        source="the fit of arXiv 2510.26788",
    ),
    MetricInfo(
        "seq_log_ratio_intercept",
        "Sequence log ratio at length 0",
        "intercept of D on T/1000",
        "nats",
        "sequence",
        needs_on_policy=True,
        estimator="Of the same fit.",
    ),
    MetricInfo(
        "seq_log_ratio_rate_per_1k",
        "Sequence log ratio per 1,000 tokens, rate",
        "1000 ΣD / ΣT",
        "nats per 1,000 tokens",
        "sequence",
        needs_on_policy=True,
        estimator="The robust companion of the slope: lengths need not vary.",
    ),
    MetricInfo(
        "chi2_seq",
        "χ² per sequence",
        "mean e²ᴰ − 1",
        "",
        "sequence",
        needs_on_policy=True,
        bounds=(-1.0, INF),
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        estimator="The product over tokens; ms-swift's takes the geometric mean.",
        names={"verl": "rollout_corr/chi2_seq"},
    ),
    MetricInfo(
        "ess_seq",
        "Effective sample size, sequences",
        "(Σw)² / (N Σw²), w = eᴰ",
        "",
        "sequence",
        needs_on_policy=True,
        bounds=(0.0, 1.0),
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        sign="A fraction of the sequences; 1 loses nothing.",
        estimator="In log space. Biased upwards when small: marked where `ess_seq`·N is below 10.",
    ),
    MetricInfo(
        "ess_seq_gaussian",
        "Effective sample size, Gaussian D",
        "exp(−Var D)",
        "",
        "sequence",
        needs_on_policy=True,
        bounds=(0.0, 1.0),
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        estimator="The companion that does not saturate at 1/N.",
    ),
    MetricInfo(
        "ess_seq_truncated",
        "Effective sample size, truncated weights",
        "(Σw)² / (N Σw²), w = min(eᴰ, 2)",
        "",
        "sequence",
        needs_on_policy=True,
        bounds=(0.0, 1.0),
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
    ),
    MetricInfo(
        "verl_is_mean",
        "verl rollout_is_mean",
        "ΣTw / ΣT, w = min(eᴰ, 2)",
        "",
        "sequence",
        needs_on_policy=True,
        bounds=(0.0, 2.0),
        estimator="Averaged over tokens, so long sequences weigh more. verl clamps D at ±20; this does not.",
        source="verl 0.8 and later",
        names={"verl": "rollout_corr/rollout_is_mean"},
        thresholds=(Threshold("outside 0.5 to 2 warns", "verl", above=(2.0,), below=(0.5,)),),
    ),
    MetricInfo(
        "verl_is_std",
        "verl rollout_is_std",
        "sd of w over tokens, w = min(eᴰ, 2)",
        "",
        "sequence",
        needs_on_policy=True,
        positive=True,
        bounds=(0.0, 1.0),
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        source="verl 0.8 and later",
        names={"verl": "rollout_corr/rollout_is_std"},
        thresholds=(Threshold("above 1 warns", "verl", above=(1.0,)),),
    ),
    MetricInfo(
        "verl_ess",
        "verl rollout_is_eff_sample_size",
        "(ΣTw)² / (ΣT ΣTw²), w = min(eᴰ, 2)",
        "",
        "sequence",
        needs_on_policy=True,
        bounds=(0.0, 1.0),
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        source="verl 0.8 and later",
        names={"verl": "rollout_corr/rollout_is_eff_sample_size"},
        thresholds=(Threshold("below 0.3 warns", "verl", below=(0.3,)),),
    ),
    MetricInfo(
        "pareto_k",
        "Pareto k̂",
        "k̂ of eᴰ",
        "",
        "sequence",
        needs_on_policy=True,
        has_interval=False,
        sign="Shape of the weights' upper tail: above the threshold no finite sample estimates their mean well.",
        estimator="No value below 200 sequences, or where Var D is negligible: k̂ has no scale and can be 0.7 for "
        "weights of 1 ± 1e-5.",
        source="Pareto-smoothed importance sampling",
        names={"ArviZ": "pareto_k"},
        thresholds=(Threshold("min(0.7, 1 − 1/log₁₀ N)", "ArviZ"),),
    ),
    MetricInfo(
        "log_ppl_diff",
        "Log perplexity gap",
        "mean over sequences of −D/T",
        "nats",
        "sequence",
        needs_on_policy=True,
        sign="Positive where the trainer finds the responses less likely.",
        names={"verl": "rollout_corr/log_ppl_diff"},
    ),
    MetricInfo(
        "ppl_ratio",
        "Perplexity ratio",
        "mean exp(−D/T)",
        "",
        "sequence",
        needs_on_policy=True,
        bounds=(0.0, INF),
        sign="Trainer's perplexity over the rollout's, averaged over sequences.",
        names={"verl": "rollout_corr/ppl_ratio"},
    ),
    MetricInfo(
        "seq_mult_prob_error_max",
        "Largest multiplicative probability error of a sequence",
        "max over sequences of mean exp|d|",
        "",
        "sequence",
        has_interval=False,
        bounds=(1.0, INF),
        source="NeMo-RL's masking of sequences",
    ),
)

_EXACT = (
    MetricInfo(
        "kl_exact",
        "Exact KL(μ‖π)",
        "mean Σ μ (log μ − log π)",
        "nats",
        "exact",
        positive=True,
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        estimator="As Σ μ·(expm1(x) − x), x = log π − log μ, which keeps its digits: a direct sum in float32 "
        "is negative half of the time at gaps of FP32.",
    ),
    MetricInfo(
        "kl_exact_reverse",
        "Exact KL(π‖μ)",
        "mean Σ π (log π − log μ)",
        "nats",
        "exact",
        positive=True,
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
    ),
    MetricInfo(
        "js_exact",
        "Exact Jensen–Shannon",
        "mean JS(μ, π)",
        "nats",
        "exact",
        positive=True,
        bounds=(0.0, math.log(2)),
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
    ),
    MetricInfo(
        "tv_exact",
        "Exact total variation",
        "mean ½ Σ |μ − π|",
        "probability",
        "exact",
        positive=True,
        bounds=(0.0, 1.0),
    ),
    MetricInfo(
        "top1_flip_rate",
        "Likeliest token differs",
        "mean 1[argmax μ ≠ argmax π]",
        "",
        "exact",
        bounds=(0.0, 1.0),
        sign="A fraction of the positions.",
    ),
    MetricInfo("entropy_rollout", "Entropy of the rollout policy", "mean H(μ)", "nats", "exact", positive=True),
    MetricInfo("entropy_trainer", "Entropy of the trainer policy", "mean H(π)", "nats", "exact", positive=True),
    MetricInfo(
        "chi2_exact",
        "Exact χ²",
        "mean Σ π²/μ − 1",
        "",
        "exact",
        positive=True,
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
    ),
    MetricInfo(
        "kl_seq_exact",
        "Sequence KL from exact positions",
        "mean Σₜ KLₜ",
        "nats",
        "exact",
        positive=True,
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        estimator="The estimate of the sequence KL with the least variance. Positions that are drawn unequally have "
        "weights of their inverse chance.",
    ),
    MetricInfo(
        "score_drift",
        "Persistent share of μ − π",
        "‖mean(μ − π)‖ / √mean ‖μ − π‖²",
        "",
        "exact",
        positive=True,
        has_interval=False,
        bounds=(0.0, 1.0),
        sign="Near 0 where the difference is noise that averages out over positions, near 1 where it is one bias at "
        "all of them. Noise alone gives about 1/√n at n positions.",
        estimator="From count sketches of 128 buckets, which leave a standard error of about 6 % of the value; beyond "
        "0 and 1 it is set to these. In place of an interval stands a test: how large the value becomes when the signs "
        "of whole prompts are flipped at random, and p, how often it becomes as large as it is.",
        source="Score centering (arXiv 2609.20807)",
    ),
)

CATALOG: dict[str, MetricInfo] = {
    info.key: info for info in (*_TOKEN, *FURTHER_TOKEN, *_SEQUENCE, *FURTHER_SEQUENCE, *_EXACT)
}
_RATIO_2 = "frac_ratio_beyond_2"
_BEYOND = re.compile(r"frac_ratio_beyond_(\d+(?:\.\d+)?)")


def ratio_key(limit: float) -> str:
    """Key of F(τ), the fraction of ratios beyond a factor τ, which it names: `frac_ratio_beyond_1.25`."""
    return f"frac_ratio_beyond_{limit!r}".removesuffix(".0")


def metric_info(key: str) -> MetricInfo | None:
    """What the catalogue says of a metric, F(τ) of any τ above 1 included; None where it does not have it."""
    limit = _ratio_limit(key)
    if key in CATALOG or limit is None:
        return CATALOG.get(key)
    said = key.removeprefix("frac_ratio_beyond_")
    return replace(
        CATALOG[_RATIO_2],
        key=key,
        title=f"Fraction of ratios beyond a factor of {said}",
        formula=f"mean 1[max(ρ, 1/ρ) > {said}]",
        sign=f"F(τ) at τ = {said}.",
    )


def in_order(keys: Iterable[str]) -> list[str]:
    """`keys` without repeats in the catalogue's order, F(τ) by τ behind the fixed one, unknown ones last."""
    place = {key: index for index, key in enumerate(CATALOG)}

    def rank(key: str) -> tuple[int, float]:
        limit = _ratio_limit(key)
        if key in place or limit is None:
            return place.get(key, len(place)), 0.0
        return place[_RATIO_2], limit

    return sorted(dict.fromkeys(keys), key=rank)


def _ratio_limit(key: str) -> float | None:
    """The τ of a key of F(τ); None of another key, or where τ is written otherwise than `ratio_key` does."""
    found = _BEYOND.fullmatch(key)
    limit = float(found[1]) if found else 0.0
    return limit if limit > 1 and ratio_key(limit) == key else None
