"""What verl makes of overrides of its command line: `python verl_snippets.py INPUT.npz RESULT.json`.

Run by the interpreter of verl's environment. Overrides are composed with verl's own configuration by Hydra, as its
`main_ppo` does, and the composed rollout correction is applied to log-probs by verl's own function. The result holds,
for each list of overrides, a few settings of the composed configuration and the share of tokens whose weight is not
their sequence's or their own importance ratio, or that were taken out of the mask.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import verl.trainer
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

CONFIG = Path(verl.trainer.__file__).parent / "config"
SHOWN = (
    "actor_rollout_ref.rollout.dtype",
    "actor_rollout_ref.rollout.logprobs_mode",
    "actor_rollout_ref.rollout.calculate_log_probs",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype",
    "actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype",
    "algorithm.rollout_correction.rollout_is",
    "algorithm.rollout_correction.rollout_rs",
)


def touched(config: object, rollout: torch.Tensor, trainer: torch.Tensor, mask: torch.Tensor) -> float:
    """The share of tokens that the configured correction caps or masks."""
    found = OmegaConf.to_container(OmegaConf.select(config, "algorithm.rollout_correction"))
    weights, kept, _ = compute_rollout_correction_and_rejection_mask(
        old_log_prob=trainer,
        rollout_log_prob=rollout,
        response_mask=mask,
        **{name: found[name] for name in ("rollout_is", "rollout_is_threshold", "rollout_rs", "rollout_rs_threshold")},
    )
    d = (trainer - rollout) * mask
    plain = d.exp() if found["rollout_is"] == "token" else d.sum(1, keepdim=True).exp().expand_as(d)
    changed = torch.zeros_like(mask, dtype=torch.bool)
    if weights is not None:
        changed |= (weights.batch["rollout_is_weights"] - plain).abs() > 1e-6 * plain
    changed |= kept != mask
    return float((changed & mask.bool()).sum() / mask.sum())


def main(source: str, result: str) -> None:
    arrays = np.load(source)
    rollout, trainer = (torch.from_numpy(arrays[name]) for name in ("rollout", "trainer"))
    mask = torch.from_numpy(arrays["mask"]).long()
    rows = []
    for overrides in json.loads(str(arrays["overrides"])):
        with initialize_config_dir(str(CONFIG), version_base=None):
            config = compose("ppo_trainer", overrides=overrides)
        settings = {name: OmegaConf.select(config, name) for name in SHOWN}
        rows.append({"settings": settings, "touched": touched(config, rollout, trainer, mask)})
    Path(result).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
