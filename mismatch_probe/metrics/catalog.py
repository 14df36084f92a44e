"""What each metric is: its definition, its unit, what others call it, and the thresholds that were published.

`docs/metrics.md` is generated from this. It needs no numpy, so that the command line's help stays cheap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# Prompts from which 95 % intervals cover about 95 % under heavy tails (validation/coverage.py).
CALIBRATED_PROMPTS = 32
# Second moments of heavy tails need more. What a few huge weights decide is marked by these: `sample.few_decide`.
_SECOND_MOMENT_PROMPTS = 64
# Metrics that only `rl gradient` has.
_BESIDE = {"ess_weights": _SECOND_MOMENT_PROMPTS}

SYMBOLS = (
    ("μ", "rollout policy", "the inference engine that sampled the tokens"),
    ("π", "trainer policy", "the training framework's forward pass over the same tokens"),
    ("b", "`rollout_logprob`", "log μ(token | prefix), natural logarithm, of the distribution that was sampled from"),
    ("a", "`trainer_logprob`", "log π(token | prefix), the same token after the same ids"),
    ("d", "`log_ratio`", "a − b, trainer minus rollout, nats"),
    ("ρ", "`importance_ratio`", "exp d"),
    ("T", "`response_length`", "tokens that the policy produced in a sequence, the end-of-sequence token included"),
    ("D", "`seq_log_ratio`", "Σ d over a sequence"),
)
"""Symbol, name in code and meaning, as formulas use them."""

_INF = math.inf


@dataclass(frozen=True)
class Threshold:
    """A published threshold: what it says, and who set it."""

    text: str
    who: str


@dataclass(frozen=True)
class MetricInfo:
    """A metric as tables, figures, reports and `docs/metrics.md` show it.

    Attributes:
        key: Name in every file, e.g. `"kl_k3"`.
        title: A few words for a heading or an axis.
        formula: In `SYMBOLS`.
        unit: `"nats"`, `"probability"`, …; empty for a pure number.
        level: Whether rows are tokens, sequences, or positions of which the full rows of logits were compared.
        needs_on_policy: True where the metric means nothing unless the rollout policy itself sampled the tokens.
        positive: True where the metric is ≥ 0 and is compared by ratio, on a logarithmic axis.
        has_interval: False for extremes, counts and k̂.
        bounds: What no value can lie beyond.
        calibrated_prompts: Below so many prompts its interval is marked uncalibrated.
        sign: What the sign or the size says.
        estimator: How it is computed, and when it fails.
        source: Where the definition comes from.
        names: What other frameworks call it, by framework.
        thresholds: What others have published.
    """

    key: str
    title: str
    formula: str
    unit: str
    level: Literal["token", "sequence", "exact"]
    needs_on_policy: bool = False
    positive: bool = False
    has_interval: bool = True
    bounds: tuple[float, float] = (-_INF, _INF)
    calibrated_prompts: int = CALIBRATED_PROMPTS
    sign: str = ""
    estimator: str = ""
    source: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    thresholds: tuple[Threshold, ...] = ()

    def __post_init__(self) -> None:
        if self.positive:
            object.__setattr__(self, "bounds", (max(self.bounds[0], 0.0), self.bounds[1]))


def calibrated_prompts(key: str) -> int:
    """Below this many prompts the interval of metric `key` is marked uncalibrated."""
    return CATALOG[key].calibrated_prompts if key in CATALOG else _BESIDE.get(key, CALIBRATED_PROMPTS)


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
        thresholds=(Threshold("at most 0.1; at most 1e-6 when deterministic", "slime, continuous integration"),),
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
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
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
            Threshold("below 0.005 normal", "verl, FAQ"),
            Threshold("above 0.01 a problem", "verl, FAQ"),
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
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
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
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
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
        thresholds=(Threshold("above 0.1 in size warns", "verl"),),
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
            Threshold("below 0.001 acceptable as gen_kl_error", "NeMo-RL"),
            Threshold("at most 0.015 at each of 20 steps to merge a model; nightly at most 5e-4", "prime-rl"),
            Threshold("1e-5 to 1e-3 usual of dense models, 1e-3 to 1e-1 of mixtures of experts", "SGLang RL community"),
        ),
    ),
    MetricInfo(
        "token_mult_prob_error",
        "Multiplicative probability error",
        "mean exp|d|",
        "",
        "token",
        bounds=(1.0, _INF),
        sign="1 where both sides agree.",
        names={"NeMo-RL": "token_mult_prob_error"},
        thresholds=(Threshold("above 1.05 investigate; gates at 1.05 to 1.1", "NeMo-RL"),),
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
        bounds=(-1.0, _INF),
        sign="How much variance the weights of tokens add.",
        names={"verl": "rollout_corr/chi2_token"},
        thresholds=(Threshold("above 1 severe", "verl"),),
    ),
    MetricInfo(
        "ess_token",
        "Effective sample size, tokens",
        "(Σρ)² / (n Σρ²)",
        "",
        "token",
        needs_on_policy=True,
        bounds=(0.0, 1.0),
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
        sign="A fraction of the tokens; 1 loses nothing.",
        estimator="Weights are not truncated, unlike verl's.",
        thresholds=(Threshold("below 0.3 warns, below 0.1 is an error", "martingale"),),
    ),
    MetricInfo(
        "mean_ratio",
        "Mean importance ratio",
        "mean ρ",
        "",
        "token",
        needs_on_policy=True,
        bounds=(0.0, _INF),
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
        bounds=(0.0, _INF),
        source="martingale",
        thresholds=(Threshold("1 or more is an error", "martingale"),),
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
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
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
        bounds=(-1.0, _INF),
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
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
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
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
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
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
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
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
        thresholds=(Threshold("outside 0.5 to 2 warns", "verl"),),
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
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
        source="verl 0.8 and later",
        names={"verl": "rollout_corr/rollout_is_std"},
        thresholds=(Threshold("above 1 warns", "verl"),),
    ),
    MetricInfo(
        "verl_ess",
        "verl rollout_is_eff_sample_size",
        "(ΣTw)² / (ΣT ΣTw²), w = min(eᴰ, 2)",
        "",
        "sequence",
        needs_on_policy=True,
        bounds=(0.0, 1.0),
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
        source="verl 0.8 and later",
        names={"verl": "rollout_corr/rollout_is_eff_sample_size"},
        thresholds=(Threshold("below 0.3 warns", "verl"),),
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
        bounds=(0.0, _INF),
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
        bounds=(1.0, _INF),
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
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
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
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
    ),
    MetricInfo(
        "js_exact",
        "Exact Jensen–Shannon",
        "mean JS(μ, π)",
        "nats",
        "exact",
        positive=True,
        bounds=(0.0, math.log(2)),
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
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
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
    ),
    MetricInfo(
        "kl_seq_exact",
        "Sequence KL from exact positions",
        "mean Σₜ KLₜ",
        "nats",
        "exact",
        positive=True,
        calibrated_prompts=_SECOND_MOMENT_PROMPTS,
        estimator="The estimate of the sequence KL with the least variance. Positions that are drawn unequally have "
        "weights of their inverse chance.",
    ),
)

CATALOG: dict[str, MetricInfo] = {info.key: info for info in (*_TOKEN, *_SEQUENCE, *_EXACT)}
