"""What TRL's GRPO trainer logs of batches of log-probs: `python trl_oracle.py ARRAYS.npz METRICS.json`.

Its statistics are computed inside the method that generates and scores. So that very method runs, on a trainer with a
toy model, and only its two sources are replaced: what vLLM returned, and what the forward pass returned.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it has not heard of the newest vLLM, which it does not use here
    from trl import GRPOConfig, GRPOTrainer

# Mode, and the bounds of the ratio; the first two neither mask nor truncate, the last is TRL's default.
SETTINGS: dict[str, tuple[str, float | None]] = {
    "token": ("token_mask", None),
    "sequence": ("sequence_mask", None),
    "default": ("sequence_mask", 3.0),
}


class Trainer(GRPOTrainer):
    """GRPO trainer whose log-probs come from arrays `[S, T]`."""

    rollout: np.ndarray
    trainer: np.ndarray
    mask: np.ndarray

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        logprobs = [row[keep].tolist() for row, keep in zip(self.rollout, self.mask, strict=True)]
        ids = [[1] * len(row) for row in logprobs]
        return [[1]] * len(ids), ids, None, [""] * len(ids), logprobs, {}, None, None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None, None]:
        return torch.from_numpy(self.trainer), None, None


def make_trainer(folder: Path) -> Trainer:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<end>": 0, "word": 1}, unk_token="word")),
        eos_token="<end>",
        pad_token="<end>",
    )
    config = Qwen2Config(
        vocab_size=2,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    arguments = GRPOConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", num_generations=2, per_device_train_batch_size=2
    )
    trainer = Trainer(
        model=Qwen2ForCausalLM(config),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "word"}]),
        processing_class=tokenizer,
    )
    trainer.use_vllm = True  # only now, so that no vLLM is started
    return trainer


def main(source: str, target: str) -> None:
    arrays = np.load(source)
    trainer = make_trainer(Path(target).parent / "trl")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in sorted({key.split("/")[0] for key in arrays}):
        trainer.rollout, trainer.trainer, trainer.mask = (arrays[f"{name}/{x}"] for x in ("rollout", "trainer", "mask"))
        # As wide as its longest response, which is what TRL pads to.
        trainer.trainer = trainer.trainer[:, : trainer.mask.sum(axis=1).max()]
        found[name] = {}
        for setting, (mode, bound) in SETTINGS.items():
            trainer.vllm_importance_sampling_mode, trainer.vllm_importance_sampling_clip_max = mode, bound
            trainer._metrics["train"].clear()
            trainer._generate_and_score_completions([{"prompt": "word"}] * len(trainer.mask))
            logged = {key: values for key, values in trainer._metrics["train"].items() if key.startswith("sampling/")}
            found[name][setting] = {key: value for key, [value] in logged.items()}
    Path(target).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
