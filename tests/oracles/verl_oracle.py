"""What verl's own functions say of batches of log-probs: `python verl_oracle.py ARRAYS.npz METRICS.json`.

Run by the interpreter of verl's environment, so nothing of this project is imported. The result holds, per batch, the
metrics of each setting: `debug`, and the rollout correction of tokens and of sequences, with verl's usual threshold and
with one that truncates nothing.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from verl.protocol import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.utils.debug.metrics import calculate_debug_metrics

THRESHOLDS = {"": 2.0, "_untruncated": 1e9}
# The bounds of k1 are those of 1/ρ: [1/1.28, 1/0.8] keeps the tokens whose ρ lies in [0.8, 1.28].
REJECTION = {"token_k1": "0.78125_1.25", "token_k2": "1e9", "token_k3": "1e9", "seq_sum_k1": "1e-9_1e9"}


def metrics(rollout: torch.Tensor, trainer: torch.Tensor, mask: torch.Tensor) -> dict[str, dict[str, float]]:
    """Metrics by setting; all three are `[S, T]`."""
    tensors = {"rollout_log_probs": rollout, "old_log_probs": trainer, "response_mask": mask, "responses": mask}
    found = {"debug": calculate_debug_metrics(DataProto.from_dict(tensors=tensors))}
    for level in ("token", "sequence"):
        for suffix, threshold in THRESHOLDS.items():
            _, _, found[level + suffix] = compute_rollout_correction_and_rejection_mask(
                old_log_prob=trainer,
                rollout_log_prob=rollout,
                response_mask=mask,
                rollout_is=level,
                rollout_is_threshold=threshold,
                rollout_rs=",".join(REJECTION),
                rollout_rs_threshold=",".join(REJECTION.values()),
            )
    return found


def main(source: str, target: str) -> None:
    arrays = np.load(source)
    found = {}
    for name in sorted({key.split("/")[0] for key in arrays}):
        rollout, trainer, mask = (torch.from_numpy(arrays[f"{name}/{part}"]) for part in ("rollout", "trainer", "mask"))
        found[name] = metrics(rollout, trainer, mask.long())
    with open(target, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
