"""transformers as a rollout engine: its own `generate`, with the tokens drawn as RL jobs draw them.

It serves where vLLM is not installed, and as a control: both sides of a comparison are then one implementation, so a
gap is that of dtypes, batches and caches alone. It holds the model as the trainer engine does, and scores by it.

`generate` has one random generator for a whole batch, so tokens are chosen by a logits processor, each request's by its
own seed; padding, caches and positions are transformers' own affair.

Shape legend: `B` requests of a batch, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mismatch_probe.engines import devices
from mismatch_probe.engines.base import Capture, Found, RolloutEngine, RolloutJob, TrainerJob
from mismatch_probe.engines.batching import MOST_TOKENS
from mismatch_probe.engines.encoding import end_ids
from mismatch_probe.engines.hf.engine import HfTrainer, token_columns
from mismatch_probe.engines.loading import with_weights
from mismatch_probe.engines.logits import add_noise, keep_rows, winner
from mismatch_probe.engines.rows import RowChoice, RowWriter
from mismatch_probe.errors import EngineError, ProbeError
from mismatch_probe.types import Rollout, RolloutRequest, Sampling, ScoreRequest

_OF_BOTH = ("engine", "dtype", "attention", "architecture", "threads", "device_name", "float32_matmul_precision")


class HfRollout(RolloutEngine):
    """A causal language model of transformers behind the `RolloutEngine` protocol."""

    def __init__(self, job: RolloutJob) -> None:
        from transformers import AutoTokenizer

        device: devices.Device = "cuda" if job.device == "cuda" else "cpu"
        self._job = job
        self._trainer = HfTrainer(
            TrainerJob(
                engine=job.engine,
                model_path=job.model_path,
                dtype=job.dtype,
                mode="cast",
                layout="padded",
                attention=job.arguments.get("attn_implementation"),
                device=device,
                temperature=1.0,
                requests=(),
                self_noise_sequences=0,
                memory_budget=int(devices.default_sizes(device).memory_budget_gib * devices.GIB),
                trust_remote_code=job.trust_remote_code,
                flags=job.arguments,
            )
        )
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            job.model_path, trust_remote_code=job.trust_remote_code, local_files_only=True
        )
        self._ends = frozenset(end_ids(job.model_path, self._tokenizer, trust_remote_code=job.trust_remote_code))
        self._writer: RowWriter | None = None
        self.run_on_model(_forget_sampling)

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        capture: Capture | None = None,
    ) -> list[Rollout]:
        if capture is not None and self._writer is None:
            self._writer = RowWriter(Path(capture.path), capture.rows)
        starts = range(0, len(requests), self._job.batch)
        batches = [[self._row(r, sampling, capture) for r in requests[i : i + self._job.batch]] for i in starts]
        return [rollout for batch in batches for rollout in self._decode(batch, sampling, on_tokens)]

    def replay(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        capture: Capture | None = None,
        *,
        keep_cache: bool = False,
    ) -> list[Rollout]:
        """As in `RolloutEngine`; there is no prefix cache to keep."""
        return self.generate(requests, sampling, on_tokens, capture)

    def _row(self, request: RolloutRequest, sampling: Sampling, capture: Capture | None) -> _Row:
        room = self._job.max_model_len - len(request.prompt_token_ids)
        wanted = min(len(request.forced_token_ids) or sampling.max_tokens, sampling.max_tokens, room)
        choice = None if capture is None or self._writer is None else capture.of(request, self._writer)
        return _Row(request, max(0, wanted), self._ends, choice)

    @torch.inference_mode()
    def _decode(self, rows: list[_Row], sampling: Sampling, on_tokens: Callable[[int], None]) -> list[Rollout]:
        """One batch, padded on the left; a response that has ended stays in it up to the last one's end."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        chooser, most = _Chooser(rows, sampling.temperature, on_tokens), max(row.wanted for row in rows)
        prompts = [row.request.prompt_token_ids for row in rows]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        if most:
            # Greedy, because the processor leaves each row one token.
            config = GenerationConfig(do_sample=False, max_new_tokens=most, pad_token_id=0)
            with self._trainer.precision():
                self._trainer.run_on_model(
                    lambda model: model.generate(
                        ids.to(model.device),
                        attention_mask=mask.to(model.device),
                        generation_config=config,
                        logits_processor=LogitsProcessorList([chooser]),
                        stopping_criteria=StoppingCriteriaList([chooser.ended]),
                    )
                )
        return [
            Rollout(
                row.request.sequence_id,
                np.array(row.tokens, np.int32),
                np.array(row.logprobs, np.float32),
                "stop" if row.stopped else "length",
                self._tokenizer.decode(row.tokens),
            )
            for row in rows
        ]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """By the trainer's forward pass, in batches of its own making."""
        requests = [ScoreRequest(i, [int(s[0])], [int(token) for token in s[1:]]) for i, s in enumerate(sequences)]
        scored = [request for request in requests if request.response_token_ids]
        found = {s.sequence_id: s for batch in self._trainer.plan(scored) for s in self._trainer.score(batch, 1.0)}
        empty = np.empty(0, np.float32)
        return [np.asarray(found[i].logprobs, np.float32) if i in found else empty for i in range(len(sequences))]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """As in `RolloutEngine`; what is refused leaves the old weights. For the while the model is in memory twice."""
        try:
            model = self.run_on_model(lambda model: with_weights(model, dict(weights)))
        except (ProbeError, RuntimeError, ValueError) as error:
            what = error.what if isinstance(error, ProbeError) else f"{type(error).__name__}: {str(error)[:200]}"
            raise EngineError(
                f"transformers cannot load new weights into this model ({what}).",
                "Give all tensors of a checkpoint, and no others.",
            ) from error
        _forget_sampling(model)
        self._trainer.hold(model)

    def run_on_model(self, function: Callable[[Any], Found]) -> Found:
        return self._trainer.run_on_model(function)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [self._tokenizer.decode([token]) for token in token_ids]

    def identity(self) -> dict[str, Any]:
        model = self._trainer.identity()
        return {
            **{name: model[name] for name in _OF_BOTH},
            "in_process": True,
            "enforce_eager": True,
            "prefix_caching": False,
            "max_model_len": self._job.max_model_len,
            "max_num_seqs": self._job.batch,
            "max_num_batched_tokens": MOST_TOKENS[self._job.device],
            "arguments": dict(self._job.arguments),
        }

    def close(self) -> None:
        self._trainer.close()


def _forget_sampling(model: Any) -> None:
    """What `generation_config.json` says of sampling stays out, as with vLLM."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()


@dataclass
class _Row:
    """A request of a batch, and its response as far as it goes.

    Attributes:
        request: What is asked for.
        wanted: Tokens, unless one of `ends` comes first.
        ends: Tokens that end a response.
        choice: Which of its rows of logits are kept, if any.
    """

    request: RolloutRequest
    wanted: int
    ends: frozenset[int]
    choice: RowChoice | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    def __post_init__(self) -> None:
        # All at once, since what a request draws must not depend on its company.
        self._draws = np.random.default_rng(self.request.seed).random(self.wanted)

    @property
    def ended(self) -> bool:
        return self.stopped or len(self.tokens) >= self.wanted

    @property
    def draw(self) -> float:
        """The next token's number in [0, 1)."""
        return float(self._draws[len(self.tokens)])

    def forced(self) -> int | None:
        """The next token, where the request brings it."""
        given = self.request.forced_token_ids
        return int(given[len(self.tokens)]) if len(given) else None

    def add(self, token: int, logprob: float) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.stopped = not len(self.request.forced_token_ids) and token in self.ends


class _Chooser:
    """Chooses the tokens of a batch as a logits processor: it leaves each row one."""

    def __init__(self, rows: Sequence[_Row], temperature: float, on_tokens: Callable[[int], None]) -> None:
        self._rows, self._temperature, self._on_tokens = rows, temperature, on_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`[B, V]` FP32 logits → the same with −∞ but for a 0 at the chosen tokens."""
        going = [index for index, row in enumerate(self._rows) if not row.ended]
        chosen = torch.zeros(len(self._rows), dtype=torch.int64, device=scores.device)
        if going:
            tokens = self._choose(going, scores)
            chosen[going] = tokens
            logprobs = token_columns(scores[going], tokens, self._temperature)[0]
            for index, token, logprob in zip(going, tokens.tolist(), logprobs.tolist(), strict=True):
                self._rows[index].add(token, logprob)
            self._on_tokens(len(going))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def ended(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """`[B]` which responses have ended."""
        return torch.tensor([row.ended for row in self._rows], device=input_ids.device)

    def _choose(self, going: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        """The next tokens of the responses that go on; their logits are changed where noise is asked for."""
        rows = [self._rows[index] for index in going]
        keep_rows([(i, row.choice, len(row.tokens)) for i, row in zip(going, rows, strict=True) if row.choice], scores)
        for index, row in zip(going, rows, strict=True):
            if row.request.logit_noise:
                add_noise(scores[index], row.request.logit_noise, row.request.seed, len(row.tokens))
        below = (scores[going].double() / self._temperature).softmax(1).cumsum(1)
        draws = torch.tensor([row.draw for row in rows], dtype=torch.float64, device=scores.device)[:, None]
        # The first token whose sum exceeds the draw; sums end near 1, and never at a token that cannot occur.
        tokens = torch.searchsorted(below, draws * below[:, -1:], right=True)[:, 0].clamp(max=below.shape[1] - 1)
        for place, row in enumerate(rows):
            forced, first = row.forced(), row.request.race_from
            if forced is not None:
                tokens[place] = forced
            elif first is not None:
                logits = scores[going[place]] / self._temperature
                tokens[place] = winner(logits, row.request.seed, first + len(row.tokens))
        return tokens
