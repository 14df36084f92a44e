"""What else the data of a pair say: how far ratios spread, the gap relative to entropy, tails, and straight lines.

Part of the catalogue; `metrics.catalog` has the rest.
"""

from __future__ import annotations

from mismatch_probe.metrics.info import INF, SECOND_MOMENT_PROMPTS, MetricInfo

_CAP = "The cap is the sample's own quantile, which the interval takes as given."
_TEMPERATURE = (
    "Both are exact for a pure change of temperature. A regression of a on b does not give 1/T, since log Σ μ^(1/T) "
    "varies with the entropy."
)
_SLOPES = (
    "Least squares within each sequence of 10 usable tokens or more. One temperature on every token gives every "
    "sequence about the same slope."
)
_TOKEN_KL = (
    "The exact KL where every position has compared rows of logits, which the value then says; otherwise k3 of the "
    "sampled tokens, which is as large as its rarest token."
)

FURTHER_TOKEN = (
    MetricInfo(
        "frac_ratio_beyond_2",
        "Fraction of ratios beyond a factor of 2",
        "mean 1[max(ρ, 1/ρ) > 2]",
        "",
        "token",
        bounds=(0.0, 1.0),
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        sign="F(τ) at τ = 2. `--ratio-limit 1.25` adds `frac_ratio_beyond_1.25`, and so any τ above 1.",
        source="F(τ) of R3 (arXiv 2510.11370); also AReaL",
    ),
    MetricInfo(
        "frac_bitwise_equal",
        "Fraction of bitwise equal log-probs",
        "mean 1[a = b]",
        "",
        "token",
        bounds=(0.0, 1.0),
        sign="1 where both sides are the same computation. Near 1 among different engines, the rollout's log-probs may "
        "be a recomputation.",
        estimator="Of the log-probs as tables hold them: float32, float64 for a reference. A side that was stored in "
        "16 bits is compared after widening.",
        source="torchtitan; TBIK",
    ),
    MetricInfo(
        "kl_entropy_ratio",
        "KL relative to entropy",
        "mean k3 / mean H(π)",
        "",
        "token",
        positive=True,
        sign="How much of the trainer's own uncertainty the gap is.",
        estimator="Over the tokens whose entropy the trainer pass has.",
        names={"prime-rl": "kl_ent_ratio"},
    ),
    MetricInfo(
        "binary_tv",
        "Binary total variation",
        "mean |eᵃ − eᵇ|",
        "probability",
        "token",
        positive=True,
        bounds=(0.0, 1.0),
        sign="A lower bound of the total variation: the sampled token against all others.",
        estimator="The same number as `mean_abs_prob_diff`, under the name that trust regions use.",
        source="DPPO (arXiv 2602.04879); also verl and OpenRLHF",
    ),
    MetricInfo(
        "binary_kl",
        "Binary KL",
        "mean(μ log(μ/π) + (1−μ) log((1−μ)/(1−π))), μ = eᵇ, π = eᵃ",
        "nats",
        "token",
        positive=True,
        sign="A lower bound of the KL: the sampled token against all others.",
        estimator="As μ·k3(d) + (1−μ)·k3(log((1−π)/(1−μ))), whose terms are 0 or more. Tokens at which π rounds to 1 "
        "and μ does not have no finite value; they are left out, and the value says so.",
        source="DPPO (arXiv 2602.04879); also verl and OpenRLHF",
    ),
    MetricInfo(
        "tail_slope",
        "Growth of |d| towards improbable tokens",
        "β of |d| ~ α + β(1 − eᵇ)",
        "nats",
        "token",
        sign="Near 0 where the gap is as large at near-certain tokens as at improbable ones.",
        estimator="Least squares over all tokens.",
        source="DVP (arXiv 2512.23087)",
    ),
    MetricInfo(
        "logprob_slope",
        "Slope of trainer on rollout log-probs",
        "slope of a on b",
        "",
        "token",
        sign="1 where no temperature separates the sides. Above 1 the trainer is sharper.",
        estimator="Least squares over all tokens. It says whether there is a temperature; `temperature_*` say which.",
        source="Fast-LLM",
    ),
    MetricInfo(
        "logprob_offset",
        "Offset of trainer from rollout log-probs",
        "intercept of a on b",
        "nats",
        "token",
        sign="Where b is 0. A renormalisation over fewer tokens shifts it.",
        estimator="Of the same fit.",
        source="Fast-LLM",
    ),
    MetricInfo(
        "temperature_rollout_side",
        "Temperature, if b is what was sampled from",
        "1 / (1 + Σ(b + H(μ))d / Σ(b + H(μ))²)",
        "",
        "token",
        needs_on_policy=True,
        positive=True,
        sign="T of π ∝ μ^(1/T): what only the trainer divides by. 1 without a fault.",
        estimator=f"{_TEMPERATURE} Over the positions whose rollout entropy is known: those with kept rows of logits.",
    ),
    MetricInfo(
        "temperature_trainer_side",
        "Temperature, if a is what was sampled from",
        "1 − Σ(a + H(π))d / Σ(a + H(π))²",
        "",
        "token",
        needs_on_policy=True,
        positive=True,
        sign="T of π ∝ μ^(1/T): what the sampler and the trainer divide by and the rollout's log-probs do not. 1 "
        "without a fault.",
        estimator=f"{_TEMPERATURE} Over the tokens whose entropy the trainer pass has.",
    ),
    MetricInfo(
        "median_log_ratio",
        "Median log ratio",
        "median d",
        "nats",
        "token",
        needs_on_policy=True,
        sign="The robust companion of `kl_k1`, with the other sign. d is skewed, so it need not be 0.",
        estimator="Interval of a quantile, over prompts.",
    ),
    MetricInfo(
        "mean_inverse_ratio",
        "Mean inverse ratio",
        "mean 1/ρ",
        "",
        "token",
        needs_on_policy=True,
        bounds=(0.0, INF),
        sign="1 exactly if a is the distribution that tokens were sampled from, as E[ρ] is 1 if b is. On policy it "
        "exceeds 1 by about mean d².",
        source="a martingale test",
    ),
    MetricInfo(
        "winsorised_ratio",
        "Mean ratio, winsorised",
        "mean min(ρ, q₀.₉₉₉ ρ)",
        "",
        "token",
        needs_on_policy=True,
        bounds=(0.0, INF),
        sign="Robust against a few huge ratios; below `mean_ratio` by what the cap hides.",
        estimator=_CAP,
    ),
    MetricInfo(
        "winsorised_ratio_hidden",
        "What that cap hides of the mean ratio",
        "mean max(ρ − q₀.₉₉₉ ρ, 0)",
        "",
        "token",
        needs_on_policy=True,
        positive=True,
        has_interval=False,
        sign="Where it is large, a few tokens make `mean_ratio`.",
    ),
    MetricInfo(
        "winsorised_inverse_ratio",
        "Mean inverse ratio, winsorised",
        "mean min(1/ρ, q₀.₉₉₉ 1/ρ)",
        "",
        "token",
        needs_on_policy=True,
        bounds=(0.0, INF),
        sign="Robust against a few tokens that the trainer finds nearly impossible.",
        estimator=_CAP,
    ),
    MetricInfo(
        "winsorised_inverse_ratio_hidden",
        "What that cap hides of the mean inverse ratio",
        "mean max(1/ρ − q₀.₉₉₉ 1/ρ, 0)",
        "",
        "token",
        needs_on_policy=True,
        positive=True,
        has_interval=False,
        sign="Where it is large, a few tokens make `mean_inverse_ratio`.",
    ),
)

FURTHER_SEQUENCE = (
    MetricInfo(
        "logprob_slope_seq_p10",
        "Slope of trainer on rollout log-probs, 10th percentile of sequences",
        "q₀.₁ of a sequence's slope of a on b",
        "",
        "sequence",
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        estimator=_SLOPES,
        source="Fast-LLM",
    ),
    MetricInfo(
        "logprob_slope_seq_p90",
        "Slope of trainer on rollout log-probs, 90th percentile of sequences",
        "q₀.₉ of a sequence's slope of a on b",
        "",
        "sequence",
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        estimator=_SLOPES,
        source="Fast-LLM",
    ),
    MetricInfo(
        "seq_max_token_kl_p50",
        "Largest KL of a token in a sequence, median",
        "median of maxₜ KLₜ",
        "nats",
        "sequence",
        positive=True,
        estimator=_TOKEN_KL,
        source="TRM (arXiv 2512.23075)",
    ),
    MetricInfo(
        "seq_max_token_kl_p90",
        "Largest KL of a token in a sequence, 90th percentile",
        "q₀.₉ of maxₜ KLₜ",
        "nats",
        "sequence",
        positive=True,
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        estimator=_TOKEN_KL,
        source="TRM (arXiv 2512.23075)",
    ),
    MetricInfo(
        "seq_max_token_kl_max",
        "Largest KL of a token",
        "max of maxₜ KLₜ",
        "nats",
        "sequence",
        positive=True,
        has_interval=False,
        estimator=_TOKEN_KL,
        source="TRM (arXiv 2512.23075)",
    ),
    MetricInfo(
        "first_order_residual",
        "Residual of the first-order weight",
        "mean |Πρ − (1 + Σ(ρ − 1))|",
        "",
        "sequence",
        needs_on_policy=True,
        positive=True,
        calibrated_prompts=SECOND_MOMENT_PROMPTS,
        sign="What a token-level correction misses of the sequence weight.",
        estimator="As |k3(D) − Σ k3(d)|, the same number without its cancellation.",
        source="arXiv 2512.01374",
    ),
)
