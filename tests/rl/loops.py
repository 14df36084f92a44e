"""The RL loop with the rollout engine of transformers, so that a step takes a tenth of a second.

The loop with vLLM is in `tests/real`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from mismatch_probe.engines.base import RolloutJob
from mismatch_probe.files import data_path
from mismatch_probe.results.rl_run import Ending
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.loop import Pieces, Training
from mismatch_probe.rl.records import RlDirectory
from mismatch_probe.rl.tasks import Problem, Response
from mismatch_probe.rl.tasks.arithmetic import ChainTask
from mismatch_probe.runs.folder import RL_RUN
from mismatch_probe.types import Sampling
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


JOB = RolloutJob("hf", str(SOURCE), "float32", "cpu", Sampling(8), (), batch=16, self_noise_tokens=0, max_model_len=256)


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
