"""A fake engine: log-probs by formula, faults by script, no packages. Everything above the engines is tested with it.

A folder whose `config.json` says `"model_type": "scripted"` is its model. The rest of that file is the script:
`vocab_size`, `max_position_embeddings`, `noise` (per dtype, nats), `response_length`, and `responses`: by prompt the
texts that answer it, each with its probability, of which a request's seed chooses. A JSON file `faults` beside it maps
passes to faults (`{"trainer-float16": "die-score"}`); being no file of the model, it may change before a resume.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines.base import (
    Capture,
    Found,
    RolloutEngine,
    RolloutJob,
    TrainerEngine,
    TrainerJob,
)
from mismatch_probe.engines.devices import Device, EngineSettings
from mismatch_probe.engines.events import Encoded
from mismatch_probe.engines.registry import Engine
from mismatch_probe.engines.rows import LEAST_WEIGHT, RowChoice, RowFile, RowWriter, stacked
from mismatch_probe.errors import DtypeRefused, EngineError
from mismatch_probe.metrics.drift import drift_columns
from mismatch_probe.metrics.exact import divergences
from mismatch_probe.types import (
    Dtype,
    EncodedPrompt,
    Prompt,
    Rollout,
    RolloutRequest,
    Sampling,
    Score,
    ScoreRequest,
    TrainerDtype,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

_NOISE = {"bfloat16": 4e-2, "float16": 5e-3, "float32": 5e-6, "float64": 0.0}


def _uniform(*key: object) -> float:
    """A number in (0, 1) that depends on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**64


class Network:
    """The model: a table of log-probs by formula, and what is added to it.

    Attributes:
        weights: `bias` `[V]`, added to the log-prob of each token, 0 to begin with; nats.
    """

    def __init__(self, vocabulary: int) -> None:
        self.weights: dict[str, NDArray[np.float32]] = {"bias": np.zeros(vocabulary, np.float32)}


class _Script:
    def __init__(self, job: RolloutJob | TrainerJob, side: str) -> None:
        folder = Path(job.model_path)
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.side = side
        self.dtype = job.dtype
        self.network = Network(int(self.config["vocab_size"]))
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
        clean = math.log(_uniform("p", tuple(prefix[-3:]), token)) + float(self.network.weights["bias"][token])
        scale = {**_NOISE, **self.config.get("noise", {})}[self.dtype]
        value = min(
            clean + scale * (2 * _uniform(self.side, self.dtype, tuple(prefix), token) - 1) * min(1.0, -clean), 0.0
        )
        return math.nan if self.fault == "nan" and token % 7 == 0 else value

    def row(self, prefix: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits after `prefix`: log-probs by the same formula, which are not normalised."""
        return np.array([self.logprob(prefix, token) for token in range(int(self.config["vocab_size"]))], np.float32)

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        self.act("load")
        given = {name: np.asarray(value, np.float32) for name, value in weights}
        wrong = [
            n for n, v in given.items() if n not in self.network.weights or v.shape != self.network.weights[n].shape
        ]
        missing = self.network.weights.keys() - given.keys() if self.side == "rollout" else ()
        if wrong or missing:
            raise EngineError(f"The scripted model has no such weights: {[*wrong, *missing][0]}.", "Give its own.")
        self.network.weights |= given

    def run_on_model(self, function: Callable[[Any], Found]) -> Found:
        return function(self.network)

    def identity(self) -> dict[str, Any]:
        return {"engine": "scripted", "dtype": self.dtype}

    def close(self) -> None:
        """Nothing is held."""


class ScriptedRollout(_Script, RolloutEngine):
    """The `RolloutEngine` protocol by formula."""

    def __init__(self, job: RolloutJob) -> None:
        super().__init__(job, "rollout")
        self._job = job
        self._writer: RowWriter | None = None
        if self.fault == "crash-in-process" and job.in_process:
            raise RuntimeError("a scripted crash that an engine process of its own avoids")

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        capture: Capture | None = None,
    ) -> list[Rollout]:
        self.act("generate")
        if capture is not None and self._writer is None:
            self._writer = RowWriter(Path(capture.path), capture.rows)
        return [self._respond(request, sampling, on_tokens, capture) for request in requests]

    def replay(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        capture: Capture | None = None,
        *,
        keep_cache: bool = False,
    ) -> list[Rollout]:
        return self.generate(requests, sampling, on_tokens, capture)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        self.act("score")
        return [np.array([self.logprob(s[:t], s[t]) for t in range(1, len(s))], np.float32) for s in sequences]

    def _keep(self, choice: RowChoice, prefix: Sequence[int], position: int) -> None:
        u = choice.draw(position)
        if u is None:
            return
        row = self.row(prefix)
        weight = max(LEAST_WEIGHT, 1 - float(np.exp(row.max() - np.logaddexp.reduce(row))))
        slot = choice.admit(position, u, weight)
        if slot is not None:
            choice.writer.put(slot, row)

    def _respond(
        self, request: RolloutRequest, sampling: Sampling, on_tokens: Callable[[int], None], capture: Capture | None
    ) -> Rollout:
        forced: Sequence[int] = request.forced_token_ids
        wanted = 0 if self.fault == "empty" else int(self.config.get("response_length", sampling.max_tokens))
        answer = self._answer(request)
        if answer is not None and not len(forced):
            forced = [ord(character) for character in answer]
        length = min(sampling.max_tokens, len(forced) or wanted)
        prefix, logprobs = list(request.prompt_token_ids), []
        choice = None if capture is None or self._writer is None else capture.of(request, self._writer)
        for position in range(length):
            drawn = int(_uniform("t", request.seed, position) * int(self.config["vocab_size"]))
            token = int(forced[position]) if len(forced) else drawn
            if choice is not None:
                self._keep(choice, prefix, position)
            logprobs.append(self.logprob(prefix, token))
            prefix.append(token)
        on_tokens(length)
        ids = prefix[len(request.prompt_token_ids) :]
        reason = "stop" if answer is not None and len(answer) == length else "length"
        return Rollout(request.sequence_id, ids, logprobs, reason, "".join(self.token_texts(ids)))

    def _answer(self, request: RolloutRequest) -> str | None:
        """The text that the script has for a prompt, chosen by the seed."""
        texts = self.config.get("responses", {}).get("".join(map(chr, request.prompt_token_ids)))
        if texts is None:
            return None
        ends = np.cumsum([probability for probability, _ in texts])
        at = int(np.searchsorted(ends, _uniform("r", request.seed), side="right"))
        return str(texts[min(at, len(texts) - 1)][1])

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [chr(token) for token in token_ids]

    def identity(self) -> dict[str, Any]:
        about = {
            "in_process": self._job.in_process,
            "max_num_seqs": self._job.batch,
            "arguments": {**self._job.arguments},
        }
        return super().identity() | about


class ScriptedTrainer(_Script, TrainerEngine):
    """The `TrainerEngine` protocol by formula."""

    def __init__(self, job: TrainerJob) -> None:
        super().__init__(job, "trainer")
        self._job = job
        self._sources = [RowFile(Path(path)) for path in job.exact_sources]

    def plan(self, requests: Sequence[ScoreRequest]) -> list[list[ScoreRequest]]:
        return [list(requests[i : i + 4]) for i in range(0, len(requests), 4)]

    def score(self, batch: Sequence[ScoreRequest], temperature: float, *, exact: bool = False) -> list[Score]:
        self.act("score")
        return [self._score(request, temperature, exact) for request in batch]

    def _score(self, request: ScoreRequest, temperature: float, exact: bool) -> Score:
        ids = [*request.prompt_token_ids, *request.response_token_ids]
        start = len(request.prompt_token_ids)
        parts = []
        for at in self._job.exact.get(request.sequence_id, ()) if exact else ():
            theirs, ours = self._sources[at.source].row(at.slot)[None], self.row(ids[: start + at.position])[None]
            found = divergences(theirs, ours, temperature) | drift_columns(theirs, ours, temperature)
            parts.append(at.facts() | found)
        steps = range(start, len(ids))
        return Score(
            request.sequence_id,
            [self.logprob(ids[:t], ids[t]) for t in steps],
            np.array([10 * _uniform("entropy", tuple(ids[:t])) for t in steps], np.float32),
            np.array([int(100 * _uniform("rank", tuple(ids[:t]))) for t in steps], np.int32),
            stacked(parts),
        )

    def identity(self) -> dict[str, Any]:
        about = {"mode": self._job.mode, "layout": self._job.layout, "attention": self._job.attention}
        return super().identity() | about | {"memory_budget": self._job.memory_budget}

    def plan_as_rollout(
        self, requests: Sequence[ScoreRequest], most_tokens: int, most_rows: int
    ) -> list[list[ScoreRequest]]:
        return [list(requests[i : i + most_rows]) for i in range(0, len(requests), most_rows)]

    def precision(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def head_logits(self, states: Any) -> Any:
        """States are the last token of each row's prefix."""
        return np.stack([self.row([int(token)]) for token in states])

    @contextmanager
    def changed(self, *, layout: str | None = None, softmax_in_dtype: bool = False) -> Iterator[None]:
        """Layouts and dtypes leave the formula alone."""
        yield


def encode_scripted(prompts: Sequence[Prompt], token_ids: Sequence[int]) -> Encoded:
    """Characters as tokens, each with its code point as id."""
    encoded = [EncodedPrompt(p.prompt_id, [ord(c) for c in p.text or str(p.messages)]) for p in prompts]
    return Encoded(encoded, {token: chr(token) for token in token_ids}, special=[0])


class Scripted(Engine):
    """Both sides by formula."""

    name = "scripted"
    own_process = True

    def choose_device(self, requested: str) -> Device:
        return "cpu"

    def rollout(self, job: RolloutJob) -> ScriptedRollout:
        return ScriptedRollout(job)

    def trainer(self, job: TrainerJob) -> ScriptedTrainer:
        return ScriptedTrainer(job)

    def rollout_settings(self, device: Device, dtype: Dtype, **how: Any) -> EngineSettings:
        return EngineSettings(reusable=True)

    def trainer_settings(self, device: Device, dtype: TrainerDtype) -> EngineSettings:
        return EngineSettings(reusable=True)


ENGINE = Scripted()
