"""A fake engine: log-probs by formula, faults by script, no packages. Everything above the engines is tested with it.

A folder whose `config.json` says `"model_type": "scripted"` is its model. The rest of that file is the script:
`vocab_size`, `max_position_embeddings`, `noise` (per dtype, nats), `response_length`. A JSON file `faults` beside it
maps passes to faults (`{"trainer-float16": "die-score"}`); being no file of the model, it may change before a resume.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mismatch_probe.engines.base import RolloutJob, TrainerJob
from mismatch_probe.errors import DtypeRefused
from mismatch_probe.types import Rollout, RolloutRequest, Sampling, Score, ScoreRequest

_NOISE = {"bfloat16": 4e-2, "float16": 5e-3, "float32": 5e-6}


def _uniform(*key: object) -> float:
    """A number in (0, 1) that depends on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**64


class _Script:
    def __init__(self, job: RolloutJob | TrainerJob, side: str) -> None:
        folder = Path(job.model_path)
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.side = side
        self.dtype = job.dtype
        script = folder / "faults"
        faults = json.loads(script.read_text(encoding="utf-8")) if script.exists() else {}
        self.fault = faults.get(f"{side}-{job.dtype}")
        self.act("start")

    def act(self, moment: str) -> None:
        """Does what the script says for this moment, if anything."""
        if self.fault == "refuse" and moment == "start":
            raise DtypeRefused(f"The scripted model does not run in {self.dtype}.", "Leave this dtype out.")
        if self.fault == f"die-{moment}":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == f"memory-{moment}":
            raise MemoryError
        if self.fault == f"crash-{moment}":
            raise RuntimeError("a scripted crash")
        if self.fault == f"hang-{moment}":
            signal.pause()

    def logprob(self, prefix: Sequence[int], token: int) -> float:
        clean = math.log(_uniform("p", tuple(prefix[-3:]), token))
        scale = {**_NOISE, **self.config.get("noise", {})}[self.dtype]
        value = min(
            clean + scale * (2 * _uniform(self.side, self.dtype, tuple(prefix), token) - 1) * min(1.0, -clean), 0.0
        )
        return math.nan if self.fault == "nan" and token % 7 == 0 else value


class ScriptedRollout(_Script):
    """The `RolloutEngine` protocol by formula."""

    def __init__(self, job: RolloutJob) -> None:
        super().__init__(job, "rollout")
        self._in_process = job.in_process
        if self.fault == "crash-in-process" and job.in_process:
            raise RuntimeError("a scripted crash that an engine process of its own avoids")

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: Sampling, on_tokens: Callable[[int], None]
    ) -> list[Rollout]:
        self.act("generate")
        return [self._respond(request, sampling, on_tokens) for request in requests]

    def _respond(self, request: RolloutRequest, sampling: Sampling, on_tokens: Callable[[int], None]) -> Rollout:
        wanted = 0 if self.fault == "empty" else int(self.config.get("response_length", sampling.max_tokens))
        length = min(sampling.max_tokens, wanted)
        prefix, logprobs = list(request.prompt_token_ids), []
        for position in range(length):
            token = int(_uniform("t", request.seed, position) * int(self.config["vocab_size"]))
            logprobs.append(self.logprob(prefix, token))
            prefix.append(token)
        on_tokens(length)
        ids = prefix[len(request.prompt_token_ids) :]
        return Rollout(request.sequence_id, ids, logprobs, "length", "".join(self.token_texts(ids)))

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [chr(token) for token in token_ids]

    def identity(self) -> dict[str, Any]:
        return {"engine": "scripted", "dtype": self.dtype, "in_process": self._in_process}

    def close(self) -> None:
        """Nothing is held."""


class ScriptedTrainer(_Script):
    """The `TrainerEngine` protocol by formula."""

    def __init__(self, job: TrainerJob) -> None:
        super().__init__(job, "trainer")

    def plan(self, requests: Sequence[ScoreRequest]) -> list[list[ScoreRequest]]:
        return [list(requests[i : i + 4]) for i in range(0, len(requests), 4)]

    def score(self, batch: Sequence[ScoreRequest], temperature: float) -> list[Score]:
        self.act("score")
        return [Score(r.sequence_id, self._logprobs(r)) for r in batch]

    def _logprobs(self, request: ScoreRequest) -> list[float]:
        ids = [*request.prompt_token_ids, *request.response_token_ids]
        start = len(request.prompt_token_ids)
        return [self.logprob(ids[:t], ids[t]) for t in range(start, len(ids))]

    def identity(self) -> dict[str, Any]:
        return {"engine": "scripted", "dtype": self.dtype}

    def close(self) -> None:
        """Nothing is held."""
