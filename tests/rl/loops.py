"""The RL loop without vLLM: the same forward pass samples, so that a step takes a tenth of a second.

It stands in for the engine in tests of the loop alone; the loop with the real engine is in `tests/real`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from mismatch_probe.engines.logprobs import Batch, token_logprobs
from mismatch_probe.files import data_path
from mismatch_probe.results.rl_run import Ending
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.loop import Pieces, Training
from mismatch_probe.rl.records import RlDirectory
from mismatch_probe.rl.tasks import Problem, Response
from mismatch_probe.rl.tasks.arithmetic import ChainTask
from mismatch_probe.runs.folder import RL_RUN
from mismatch_probe.types import Rollout, RolloutRequest, Sampling
from tests.conftest import Heard
from tests.factories.rl_run import PROVENANCE

SOURCE = Path(data_path("rl/chain/config.json")).parent
SMALL: dict[str, Any] = {
    "steps": 4,
    "n_problems": 8,
    "operations": 3,
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
    "updates_per_rollout": 2,
    "micro_batch": 4,
    "max_tokens": 8,
    "rollout_dtype": "fp32",
    "trainer_dtype": "fp32",
    "checkpoint_every": 2,
}


class SignalTask(ChainTask):
    """Rewards something that a response of any length has or has not, so that few tokens give a signal."""

    def rewards(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[float]:
        return [float(len(set(response.text)) % 2) for response in responses]


class TorchEngine:
    """Samples with transformers in FP32, one token after another from an empty cache."""

    def __init__(self) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32).eval()
        self.end = int(self.model.config.eos_token_id)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.model.load_state_dict({name: tensor.float() for name, tensor in weights})

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        batch = Batch.of([s[:1] for s in sequences], [s[1:] for s in sequences], torch.device("cpu"))
        rows = token_logprobs(self.model, batch, 1.0)[0].numpy()
        return [row[: len(s) - 1] for row, s in zip(rows, sequences, strict=True)]

    @torch.no_grad()
    def generate(
        self, requests: Sequence[RolloutRequest], sampling: Sampling, on_tokens: Callable[[int], None]
    ) -> list[Rollout]:
        width = max(len(r.prompt_token_ids) for r in requests)
        ids = torch.tensor([[0] * (width - len(r.prompt_token_ids)) + list(r.prompt_token_ids) for r in requests])
        mask = torch.tensor([[0] * (width - len(r.prompt_token_ids)) + [1] * len(r.prompt_token_ids) for r in requests])
        draws = np.stack([np.random.default_rng(r.seed).random(sampling.max_tokens) for r in requests])
        logprobs = []
        for step in range(sampling.max_tokens):
            logits = self.model(ids, attention_mask=mask).logits[:, -1] / sampling.temperature
            below = logits.double().softmax(-1).cumsum(-1)
            token = (
                (below < torch.tensor(draws[:, step : step + 1])).sum(-1, keepdim=True).clamp(max=logits.shape[1] - 1)
            )
            logprobs.append(logits.log_softmax(-1).gather(-1, token))
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        rows = zip(requests, ids[:, width:].tolist(), torch.cat(logprobs, 1).numpy(), strict=True)
        return [self._rollout(request, tokens, values) for request, tokens, values in rows]

    def _rollout(self, request: RolloutRequest, row: list[int], logprobs: NDArray[np.float32]) -> Rollout:
        kept = row[: row.index(self.end) + 1] if self.end in row else row
        reason = "stop" if self.end in row else "length"
        return Rollout(request.sequence_id, np.array(kept, np.int32), logprobs[: len(kept)].copy(), reason, "")


def pieces(path: Path, engine: Any, *, tell: Any = None, **changes: Any) -> Pieces:
    """A loop of `SMALL`, new in `path` or going on there."""
    config = RlConfig.of(SMALL | changes)
    directory = RlDirectory.open(path) if RL_RUN.held_by(path) else RlDirectory.create(path, config, PROVENANCE)
    return Pieces(
        directory=directory,
        engine=engine,
        fresh=False,
        tell=Heard() if tell is None else tell,
        **_of_task(directory.config),
    )


def _of_task(config: RlConfig) -> dict[str, Any]:
    task = SignalTask(config.n_problems, 0, config.operations)
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    return {
        "config": config,
        "source": SOURCE,
        "device": torch.device("cpu"),
        "task": task,
        "problems": task.problems(),
        "prompts": [tokenizer.encode(problem.prompt) for problem in task.problems()],
        "decode": lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        "end_ids": [tokenizer.eos_token_id],
    }


def train(path: Path, engine: Any, **changes: Any) -> Ending:
    """Runs a loop to its end and writes what a worker would."""
    parts = pieces(path, engine, **changes)
    ending = Training(parts).run()
    parts.directory.finish(ending)
    return ending
