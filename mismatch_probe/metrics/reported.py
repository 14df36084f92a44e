"""What training frameworks call metrics in their logs, what each is there, and how it differs from the catalogue's.

Names that the catalogue has (`MetricInfo.names`) are taken from there; here stand where they differ (`_DIFFERS`), what
the catalogue has no key for (`_MORE`), and metrics that only help to read the others (`_CONTEXT`). Read in the
projects' sources in July and August 2026: TRL 1.10 and verl 0.8 before their releases, NeMo-RL, prime-rl, slime, miles,
SkyRL, open-instruct, OpenRLHF and tinker-cookbook.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from typing import Literal

from mismatch_probe.metrics.catalog import CATALOG

Trait = Literal[
    "rank-means",
    "sequence-means",
    "micro-batch-means",
    "after-truncation",
    "truncation-by-version",
    "level-by-setting",
    "kl-by-setting",
    "clamped-20",
    "clamped-10",
    "nan-left-out",
    "nonfinite-as-zero",
    "padding-as-zero",
    "against-update",
    "stale",
    "kept-tokens",
    "weighted-by-probability",
    "update-ratio",
    "float32",
    "four-decimals",
]
Context = Literal["", "entropy", "length", "reward", "reference KL", "gradient norm", "clipped", "validity"]


@dataclass(frozen=True)
class Reported:
    """A metric as a framework logs it.

    Attributes:
        framework: Whose.
        name: As it is logged; `*` stands for one part of a path. A name with a space is a label of a printed line.
        key: The catalogue's metric; empty where it has none that is the same.
        what: What it is, in the catalogue's symbols; empty where `key` says it.
        context: What it helps with, for what is not a metric of the mismatch.
        traits: How it differs from the catalogue's definition.
    """

    framework: str
    name: str
    key: str = ""
    what: str = ""
    context: Context = ""
    traits: tuple[Trait, ...] = ()

    @property
    def formula(self) -> str:
        """What it is, in the catalogue's symbols."""
        return self.what or (CATALOG[self.key].formula if self.key in CATALOG else "")


_DIFFERS: dict[tuple[str, str], tuple[Trait, ...]] = {
    ("TRL", "mean_abs_logprob_diff"): ("rank-means", "nan-left-out"),
    ("TRL", "max_abs_logprob_diff"): ("nan-left-out",),
    ("SkyRL", "mean_abs_logprob_diff"): ("rank-means",),
    ("slime", "mean_abs_logprob_diff"): ("sequence-means", "against-update"),
    ("verl", "kl_k3"): ("float32",),
    ("verl", "chi2_token"): ("clamped-20",),
    ("verl", "chi2_seq"): ("clamped-20",),
    ("verl", "verl_is_mean"): ("truncation-by-version", "level-by-setting", "clamped-20"),
    ("verl", "verl_is_std"): ("level-by-setting", "clamped-20"),
    ("verl", "verl_ess"): ("level-by-setting", "clamped-20"),
    ("prime-rl", "kl_k3"): ("stale", "float32"),
    ("NeMo-RL", "kl_k3"): ("kl-by-setting", "float32"),
    ("OpenRLHF", "kl_k1"): ("micro-batch-means",),
}
"""How a name of the catalogue differs from its definition, by framework and key."""

_ABS_DIFF = {"max": "max |d|", "std": "sd |d|", "min": "min |d|"}
_K3 = "eᵈ − 1 − d"


def _mis(framework: str) -> tuple[Reported, ...]:
    """Metrics of importance sampling that slime and miles share."""
    return (
        Reported(framework, "mis_kl", "kl_k1", traits=("sequence-means",)),
        Reported(framework, "mis_k3_kl", "kl_k3", traits=("sequence-means", "float32")),
        Reported(framework, "mis_chi2_token", "chi2_token", traits=("sequence-means", "clamped-20")),
        Reported(framework, "mis_chi2_seq", "chi2_seq", traits=("clamped-20",)),
        Reported(framework, "mis_log_ppl_diff", "log_ppl_diff"),
        Reported(framework, "mis_log_ppl_abs_diff", what="mean over sequences of |D/T|"),
        Reported(framework, "mis_ppl_ratio", "ppl_ratio"),
        Reported(framework, "mis_tis_weight_before_bound", what="mean w",
                 traits=("level-by-setting", "clamped-20")),
        Reported(framework, "mis_tis_weight_after_bound", what="mean w, bounded",
                 traits=("after-truncation", "level-by-setting")),
        Reported(framework, "tis", "mean_ratio", traits=("sequence-means",)),
        Reported(framework, "tis_abs", what="mean |ρ − 1|", traits=("sequence-means",)),
        Reported(framework, "tis_clipfrac", what="clipped ρ, fraction", traits=("sequence-means",)),
        Reported(framework, "ois", what="mean π_current/π_old",
                 traits=("update-ratio",)),
    )  # fmt: skip


_MORE = (
    Reported("TRL", "sampling/importance_sampling_ratio/mean", what="mean w",
             traits=("after-truncation", "level-by-setting", "nan-left-out")),
    Reported("TRL", "sampling/importance_sampling_ratio/max", what="max w", traits=("after-truncation",
             "level-by-setting")),
    Reported("TRL", "sampling/importance_sampling_ratio/min", what="min w", traits=("after-truncation",
             "level-by-setting")),
    Reported("verl", "rollout_corr/rollout_is_max", what="max w", traits=("truncation-by-version",
             "level-by-setting", "clamped-20")),
    Reported("verl", "rollout_corr/rollout_is_min", what="min w", traits=("level-by-setting",)),
    Reported("verl", "rollout_corr/rollout_is_ratio_fraction_high", what="fraction w > bound",
             traits=("level-by-setting",)),
    Reported("verl", "rollout_corr/rollout_is_ratio_fraction_low", what="fraction w < 1/bound",
             traits=("level-by-setting",)),
    Reported("verl", "rollout_corr/rollout_rs_masked_fraction", what="rejected tokens, fraction"),
    Reported("verl", "rollout_corr/rollout_rs_seq_masked_fraction", what="rejected sequences, fraction"),
    Reported("verl", "rollout_corr/log_ppl_abs_diff", what="mean over sequences of |D/T|"),
    Reported("verl", "rollout_corr/log_ppl_diff_max", what="max over sequences of −D/T"),
    Reported("verl", "rollout_corr/log_ppl_diff_min", what="min over sequences of −D/T"),
    Reported("NeMo-RL", "policy_kl_error", what="mean(e⁻ᵈ − 1 + d)", traits=("kl-by-setting",)),
    Reported("NeMo-RL", "sampling_importance_ratio", "mean_ratio", traits=("after-truncation", "nonfinite-as-zero")),
    Reported("NeMo-RL", "max_seq_mult_prob_error", "seq_mult_prob_error_max"),
    Reported("NeMo-RL", "mean_seq_mult_prob_error", what="mean over sequences of mean exp|d|"),
    Reported("NeMo-RL", "max_seq_mult_prob_error_after_mask", what="max over kept sequences of mean exp|d|",
             traits=("kept-tokens",)),
    Reported("NeMo-RL", "is_oob_ratio", what="out of bounds, fraction"),
    Reported("NeMo-RL", "Generation KL Error", "kl_k3", traits=("kl-by-setting", "float32", "four-decimals")),
    Reported("prime-rl", "mismatch_kl/*/mean", "kl_k3", traits=("stale", "float32")),
    *(Reported("prime-rl", f"mismatch_kl/*/{one}", what=f"{one}({_K3})", traits=("stale",))
      for one in ("max", "std", "median", "min")),
    Reported("prime-rl", "mismatch_kl/mean", "kl_k3", traits=("stale", "float32")),
    Reported("prime-rl", "mismatch_kl/max", what=f"max({_K3})", traits=("stale",)),
    Reported("prime-rl", "unmasked_mismatch_kl/mean", what=f"mean({_K3}) over kept tokens",
             traits=("stale", "kept-tokens")),
    Reported("prime-rl", "masked_mismatch_kl/mean", what=f"mean({_K3}) over masked tokens",
             traits=("stale", "kept-tokens")),
    Reported("prime-rl", "trainer_mismatch_kl", "kl_k3", traits=("stale", "float32")),
    Reported("prime-rl", "Mismatch KL", "kl_k3", traits=("stale", "float32", "four-decimals")),
    Reported("prime-rl", "kl_ent_ratio/mean", "kl_entropy_ratio", traits=("stale",)),
    Reported("prime-rl", "trainer_kl_ent_ratio", "kl_entropy_ratio", traits=("stale",)),
    Reported("prime-rl", "is_masked/mean", what="masked tokens, fraction", traits=("stale",)),
    Reported("miles", "train_rollout_logprob_abs_diff", "mean_abs_logprob_diff", traits=("sequence-means",
             "nonfinite-as-zero")),
    Reported("miles", "train_rollout_kl", "kl_k3", traits=("sequence-means", "nonfinite-as-zero", "clamped-10")),
    *_mis("slime"),
    *_mis("miles"),
    *(Reported("SkyRL", f"policy/rollout_train_logprobs_abs_diff_{one}", "max_abs_logprob_diff" if one == "max" else "",
               "" if one == "max" else what) for one, what in _ABS_DIFF.items()),
    Reported("SkyRL", "minibatch_rollout_logprobs_abs_diff_mean", "mean_abs_logprob_diff", traits=("against-update",
             "micro-batch-means")),
    Reported("SkyRL", "minibatch_rollout_logprobs_abs_diff_max", "max_abs_logprob_diff", traits=("against-update",)),
    Reported("SkyRL", "minibatch_rollout_logprobs_abs_diff_std", what="sd |d|", traits=("against-update",)),
    Reported("SkyRL", "is_ratio_mean", "mean_ratio", traits=("clamped-20", "micro-batch-means")),
    Reported("SkyRL", "is_ratio_std", what="sd ρ", traits=("clamped-20", "padding-as-zero")),
    Reported("SkyRL", "is_ratio_max", what="max ρ", traits=("clamped-20",)),
    Reported("SkyRL", "is_ratio_min", what="min ρ", traits=("padding-as-zero",)),
    Reported("SkyRL", "tis_token_clip_high_ratio", what="capped ρ, fraction"),
    Reported("SkyRL", "tis_seq_clip_high_ratio", what="capped eᴰ, fraction"),
    Reported("open-instruct", "debug/vllm_vs_local_logprob_diff_mean", "mean_abs_logprob_diff",
             traits=("against-update", "nan-left-out")),
    Reported("open-instruct", "debug/vllm_vs_local_logprob_diff_max", "max_abs_logprob_diff",
             traits=("against-update", "nan-left-out")),
    Reported("open-instruct", "debug/vllm_vs_local_logprob_diff_std", what="sd |d|", traits=("nan-left-out",)),
    Reported("open-instruct", "debug/vllm_local_reverse_kl", what="mean eᵇ(b − a)",
             traits=("weighted-by-probability", "against-update", "nan-left-out")),
    Reported("Tinker", "optim/kl_sample_train_v1", "kl_k1", traits=("stale",)),
    Reported("Tinker", "optim/kl_sample_train_v2", "kl_k2", traits=("stale",)),
)  # fmt: skip

_CONTEXT: dict[Context, dict[str, tuple[str, ...]]] = {
    "entropy": {
        "TRL": ("entropy",),
        "verl": ("actor/entropy", "actor/entropy_loss"),
        "NeMo-RL": ("approx_entropy",),
        "prime-rl": ("entropy/all/mean", "entropy/mean", "Entropy"),
        "slime": ("entropy_loss",),
        "SkyRL": ("policy_entropy",),
        "Tinker": ("optim/entropy",),
    },
    "length": {
        "TRL": ("completions/mean_length",),
        "verl": ("response_length/mean",),
        "NeMo-RL": ("mean_gen_tokens_per_sample", "Mean Generation Length"),
        "prime-rl": ("seq_len/all/mean",),
        "slime": ("rollout/response_lengths", "rollout/response_len/mean"),
        "SkyRL": ("generate/avg_num_tokens",),
        "open-instruct": ("val/sequence_lengths",),
        "OpenRLHF": ("response_length", "rollout/response_length_mean"),
    },
    "reward": {
        "TRL": ("reward",),
        "verl": ("critic/rewards/mean", "critic/score/mean"),
        "NeMo-RL": ("Avg Reward",),
        "prime-rl": ("reward/all/mean",),
        "slime": ("rollout/raw_reward",),
        "SkyRL": ("reward/avg_raw_reward",),
        "Tinker": ("env/all/reward/total",),
    },
    "reference KL": {
        "TRL": ("kl",),
        "verl": ("actor/kl_loss", "actor/reward_kl_penalty"),
        "NeMo-RL": ("kl_penalty",),
        "slime": ("kl_loss",),
    },
    "gradient norm": {
        "TRL": ("grad_norm",),
        "verl": ("actor/grad_norm",),
        "prime-rl": ("optim/grad_norm", "Grad. Norm"),
        "OpenRLHF": ("actor_grad_norm",),
    },
    "validity": {"verl": ("training/rollout_probs_diff_valid",)},
    "clipped": {
        "TRL": ("clip_ratio/region_mean", "clip_ratio"),
        "verl": ("actor/pg_clipfrac",),
        "slime": ("pg_clipfrac",),
        "OpenRLHF": ("ppo_clip_ratio",),
    },
}
"""Metrics that help to read the others, by what they are and by framework."""

STEPS = frozenset(
    {"step", "_step", "Step", "global_step", "train/global_step", "training/global_step", "train/step", "rollout/step",
     "trainer/global_step", "progress/step", "progress/batch", "iteration"}
)  # fmt: skip
"""Names of the training step, the same in every framework."""

# What may stand before a name: the part of a run that logged it.
_PREFIXES = frozenset(
    {
        "train",
        "eval",
        "val",
        "actor",
        "policy",
        "training",
        "rollout",
        "loss_metrics",
        "metrics",
        "trainer",
        "debug",
        "data",
    }
)
_PREFIX = 3  # parts of a path that may come before a name
_CLOSE = 0.8  # of difflib
_SPECIFIC = 8  # a shorter rest of a name could be anything's


@cache
def table() -> tuple[Reported, ...]:
    """Every name of every framework."""
    named = (
        Reported(framework, name, key, traits=_DIFFERS.get((framework, key), ()))
        for key, info in CATALOG.items()
        for framework, name in info.names.items()
    )
    context = (
        Reported(framework, name, context=kind)
        for kind, frameworks in _CONTEXT.items()
        for framework, names in frameworks.items()
        for name in names
    )
    return (*named, *_MORE, *context)


@lru_cache(maxsize=20_000)
def find(name: str) -> tuple[Reported, ...]:
    """What a logged name can be, one entry per framework; empty where no framework is known to log it.

    A prefix such as `train/` and the suffix of an aggregate such as `:mean` may be there; the longest match wins.
    """
    bare = re.sub(r":(mean|max|min)$", "", name.strip())
    parts = bare.split("/")
    for start in range(min(len(parts), _PREFIX + 1)):
        rest = "/".join(parts[start:])
        allowed = set(parts[:start]) <= _PREFIXES
        found = [one for one in _matches(rest) if allowed or not one.context]
        if found:
            return _one_each(found)
    return find(bare.removeprefix("eval_")) if bare.startswith("eval_") else ()


def _one_each(found: list[Reported]) -> tuple[Reported, ...]:
    by_framework: dict[str, Reported] = {}
    for one in found:
        by_framework.setdefault(one.framework, one)
    return tuple(by_framework.values())


def _matches(name: str) -> list[Reported]:
    exact, patterns = _index()
    return exact.get(name, []) + [one for pattern, one in patterns if pattern.fullmatch(name)]


@cache
def _index() -> tuple[dict[str, list[Reported]], list[tuple[re.Pattern[str], Reported]]]:
    exact: dict[str, list[Reported]] = {}
    patterns: list[tuple[re.Pattern[str], Reported]] = []
    for one in table():
        if "*" in one.name:
            patterns.append((re.compile(re.escape(one.name).replace(r"\*", r"[^/]+")), one))
            continue
        for name in _shortened(one):
            exact.setdefault(name, []).append(one)
    return exact, patterns


def _shortened(one: Reported) -> Iterator[str]:
    """The name, and what is left of it without its first parts where that is specific enough."""
    yield one.name
    parts = one.name.split("/")
    for start in range(1, len(parts)):
        rest = "/".join(parts[start:])
        if not one.context and "_" in rest and len(rest) >= _SPECIFIC:
            yield rest


def nearest(name: str, n: int = 2) -> tuple[str, ...]:
    """Known names of mismatch metrics that look like `name`, the nearest first."""
    known = {one.name: None for one in table() if not one.context}
    last = {end: full for full in known if len(end := full.rsplit("/", 1)[-1]) >= _SPECIFIC}
    close = get_close_matches(name, known, n, _CLOSE)
    close += (last[one] for one in get_close_matches(name.rsplit("/", 1)[-1], last, n, _CLOSE))
    return tuple(dict.fromkeys(close))[:n]


SWITCHES: dict[str, str] = {
    "TRL": "use_vllm=True and vllm_importance_sampling_correction=True",
    "verl": "actor_rollout_ref.rollout.calculate_log_probs=True",
    "NeMo-RL": "",
    "prime-rl": "",
    "slime": "--get-mismatch-metrics",
    "miles": "--get-mismatch-metrics",
    "SkyRL": "trainer.algorithm.off_policy_correction.tis_ratio_type=token",
    "open-instruct": "",
    "OpenRLHF": "--algo.advantage.is_correction_enable",
    "Tinker": "",
}
"""By framework, what switches metrics of the mismatch on; empty where they are always logged."""
