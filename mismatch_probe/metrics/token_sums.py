"""What token metrics are computed from: per-prompt sums over the usable tokens of a pair.

Shape legend: `P` prompts.
"""

from __future__ import annotations

import math

import numpy as np

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.chunks import TokenChunk
from mismatch_probe.metrics.moments import CentredSums, Range, ShiftedSums

Clip = tuple[float, float]

DEFAULT_CLIP: Clip = (0.8, 1.28)
# A confident disagreement: the rollout gave the token about even odds or better, the trainer e² times less.
CONFIDENT_ROLLOUT_LOGPROB = -0.7
CONFIDENT_LOG_RATIO = -2.0


class TokenSums:
    """Per-prompt sums `[P]` over the usable tokens, and what else token metrics need.

    Attributes:
        counts: Tokens.
        log_ratio: Σ d.
        abs_log_ratio: Σ |d|.
        squared_log_ratio: Σ d².
        abs_prob_diff: Σ |e^a − e^b|.
        js_k3: Σ of the Jensen–Shannon estimator.
        outside_clip: Tokens whose ρ lies outside the clip range.
        confident: Confident disagreements.
        ratio: Σ k3(d) and Σ (ρ − 1).
        ratio_excess: ρ − 1 about its mean, times exp(−shift) of `ratio`.
        squared_ratio: Σ (ρ² − 1).
        abs_ratio: Σ (exp|d| − 1).
        prob_gap: |e^a − e^b| about its mean.
        probs: e^a and e^b about their means.
        prob_contrasts: e^a − e^b and e^a + e^b about their means.
        ranges: Of `"abs_log_ratio"`, `"rollout_logprob"` and `"trainer_logprob"`.
    """

    def __init__(self, n_prompts: int, clip: Clip) -> None:
        self.counts, self.log_ratio, self.abs_log_ratio, self.squared_log_ratio = np.zeros((4, n_prompts))
        self.abs_prob_diff, self.js_k3, self.outside_clip, self.confident = np.zeros((4, n_prompts))
        self.ratio = ShiftedSums(n_prompts, 2)
        self.squared_ratio, self.abs_ratio = ShiftedSums(n_prompts, 1), ShiftedSums(n_prompts, 1)
        self.ratio_excess, self.prob_gap = CentredSums(n_prompts, 1), CentredSums(n_prompts, 1)
        self.probs, self.prob_contrasts = CentredSums(n_prompts, 2), CentredSums(n_prompts, 2)
        self.ranges = {name: Range() for name in ("abs_log_ratio", "rollout_logprob", "trainer_logprob")}
        self._log_clip = (math.log(clip[0]), math.log(clip[1]))

    def update(self, tokens: TokenChunk) -> None:
        """Takes in at least one token."""
        d, size = tokens.log_ratio, tokens.abs_log_ratio
        self.counts += tokens.counts
        self.log_ratio += tokens.per_prompt(d)
        self.abs_log_ratio += tokens.per_prompt(size)
        self.squared_log_ratio += tokens.per_prompt(tokens.squared_log_ratio)
        self.js_k3 += tokens.per_prompt(scales.js_k3(size))
        self.outside_clip += tokens.per_prompt((d < self._log_clip[0]) | (d > self._log_clip[1]))
        confident = (tokens.rollout_logprob > CONFIDENT_ROLLOUT_LOGPROB) & (d < CONFIDENT_LOG_RATIO)
        self.confident += tokens.per_prompt(confident)
        self._update_ratios(tokens)
        # A broken engine's log-probs can be so far above 0 that these overflow; the metrics then say so.
        with np.errstate(over="ignore", invalid="ignore"):
            self._update_probabilities(tokens)
        for name, seen in self.ranges.items():
            seen.update(getattr(tokens, name))

    def _update_ratios(self, tokens: TokenChunk) -> None:
        d, size = tokens.log_ratio, tokens.abs_log_ratio
        before, shift = self.ratio.shift, max(self.ratio.shift, scales.shift_of(d))
        excess = tokens.ratio_excess(shift)
        self.ratio.update([tokens.per_prompt(scales.shifted_k3(d, shift)), tokens.per_prompt(excess)], shift)
        self.ratio_excess.scale(math.exp(before - shift))
        self.ratio_excess.update([excess], tokens.counts, tokens.per_prompt)
        for sums, x in ((self.squared_ratio, 2 * d), (self.abs_ratio, size)):
            shift = scales.shift_of(x)
            sums.update([tokens.per_prompt(scales.shifted_expm1(x, shift))], shift)

    def _update_probabilities(self, tokens: TokenChunk) -> None:
        gap = np.abs(tokens.prob_diff)
        self.abs_prob_diff += tokens.per_prompt(gap)
        self.prob_gap.update([gap], tokens.counts, tokens.per_prompt)
        sides = [tokens.trainer_prob, tokens.rollout_prob]
        self.probs.update(sides, tokens.counts, tokens.per_prompt)
        self.prob_contrasts.update([tokens.prob_diff, sides[0] + sides[1]], tokens.counts, tokens.per_prompt)
