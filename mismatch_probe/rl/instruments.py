"""What is measured at every step, through the same metrics as a comparison's.

Three log-probs of a token are kept apart: the engine's when it sampled (`rollout`), the trainer's before the step's
updates (`old`), and the trainer's when an update saw it (`current`). old − rollout is the mismatch, or mismatch and
staleness where the engine had older weights; then the trainer scores with those weights, too (`sampled`), and
sampled − rollout is the mismatch, old − sampled the staleness. current − old is how far the step's own updates moved.

Shape legend: `S` sequences of a rollout, `T` response tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.types import PairArrays

Floats = NDArray[np.float64]
METRICS = (
    "mean_abs_logprob_diff",
    "rms_logprob_diff",
    "max_abs_logprob_diff",
    "kl_k1",
    "kl_k3",
    "mean_ratio",
    "ess_token",
    "ess_seq",
    "ess_seq_gaussian",
    "chi2_seq",
    "seq_log_ratio_std",
    "frac_outside_clip",
    "token_mult_prob_error",
)


@dataclass(frozen=True)
class Rolled:
    """A rollout with everything that is known of it.

    Attributes:
        step: Which.
        problem_ids: `[S]`
        prompts, responses: `[S]` token ids.
        texts, finish_reasons: `[S]`
        rewards: `[S]`
        advantages: `[S]`
        rollout, old, current, sampled: `[S]` arrays of log-probs in nats, one per response token; `sampled` is `old`
            where the engine had the present weights.
    """

    step: int
    problem_ids: Sequence[str]
    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    texts: Sequence[str]
    finish_reasons: Sequence[str]
    rewards: Floats
    advantages: Floats
    rollout: Sequence[Floats]
    old: Sequence[Floats]
    current: Sequence[Floats]
    sampled: Sequence[Floats]

    def metrics(self) -> dict[str, float | None]:
        """Mismatch metrics of the step, how far staleness and the updates went, and how far both, mismatch and
        staleness, take the rollout from the trained policy (`off_policy_*`); None for what has no value.
        """
        found = self._metrics(self.sampled, METRICS)
        total = found if self.sampled is self.old else self._metrics(self.old, ("ess_seq", "mean_abs_logprob_diff"))
        found |= {"off_policy_ess_seq": total["ess_seq"], "off_policy_mean_abs": total["mean_abs_logprob_diff"]}
        tokens = {name: np.concatenate([np.empty(0), *getattr(self, name)]) for name in ("old", "current", "sampled")}
        found["staleness_mean_abs"] = _mean_abs(tokens["old"] - tokens["sampled"])
        found["movement_mean_abs"] = _mean_abs(tokens["current"] - tokens["old"])
        return found

    def _metrics(self, trainer: Sequence[Floats], keys: Sequence[str]) -> dict[str, float | None]:
        values = compute_metrics(self._pair(trainer), keys=keys, replicates=20)
        return {key: value.value for key, value in values.items()}

    def _pair(self, trainer: Sequence[Floats]) -> PairArrays:
        lengths = [len(response) for response in self.responses]
        names, prompt = np.unique(np.array(self.problem_ids, dtype=str), return_inverse=True)
        return PairArrays(
            rollout_logprob=np.concatenate([np.empty(0), *self.rollout]),
            trainer_logprob=np.concatenate([np.empty(0), *trainer]),
            sequence=np.repeat(np.arange(len(lengths)), lengths),
            position=np.concatenate([np.empty(0, np.int64), *(np.arange(n) for n in lengths)]),
            prompt=prompt.astype(np.int64),
            prompt_ids=tuple(str(name) for name in names),
        )

    def table(self) -> pa.Table:
        """A row per sequence, in the format that `compare --from` reads, with reward, advantage and the other two
        log-probs beside it.
        """
        n = len(self.responses)
        return pa.table(
            {
                "step": pa.array([self.step] * n, pa.int64()),
                "prompt_id": pa.array(list(self.problem_ids), pa.string()),
                "prompt_token_ids": pa.array([list(ids) for ids in self.prompts], pa.list_(pa.int32())),
                "response_token_ids": pa.array([list(ids) for ids in self.responses], pa.list_(pa.int32())),
                "rollout_logprobs": _lists(self.rollout),
                "trainer_logprobs": _lists(self.sampled),
                "old_logprobs": _lists(self.old),
                "current_logprobs": _lists(self.current),
                "reward": pa.array(self.rewards, pa.float64()),
                "advantage": pa.array(self.advantages, pa.float64()),
                "finish_reason": pa.array(list(self.finish_reasons), pa.string()),
                "text": pa.array(list(self.texts), pa.string()),
            }
        )


def _lists(values: Sequence[Floats]) -> pa.Array:
    return pa.array([np.asarray(row, np.float32) for row in values], pa.list_(pa.float32()))


def _mean_abs(values: Floats) -> float | None:
    return float(np.abs(values).mean()) if len(values) and np.isfinite(values).all() else None


def finite(document: dict[str, Any]) -> dict[str, Any]:
    """The document with None in place of what JSON cannot hold."""
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in document.items()
    }
