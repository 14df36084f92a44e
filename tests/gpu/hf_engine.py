"""A rollout engine made of transformers, so that the RL loop runs where there is no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mismatch_probe.engines.base import RolloutJob
from mismatch_probe.rl.policy import TORCH_DTYPES
from mismatch_probe.types import Rollout, RolloutRequest, Sampling


class HfRollout:
    """Samples token by token with the model's whole forward; slow, and good for tiny models only."""

    def __init__(self, job: RolloutJob) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(job.model_path, dtype=TORCH_DTYPES[job.dtype])
        self._model: Any = model.to(job.device).eval()
        self._device = torch.device(job.device)
        self._tokenizer = AutoTokenizer.from_pretrained(job.model_path)

    @torch.no_grad()
    def generate(
        self, requests: Sequence[RolloutRequest], sampling: Sampling, on_tokens: Callable[[int], None]
    ) -> list[Rollout]:
        found = []
        by_length: dict[int, list[RolloutRequest]] = {}
        for request in requests:
            by_length.setdefault(len(request.prompt_token_ids), []).append(request)
        for group in by_length.values():
            ids = torch.tensor([request.prompt_token_ids for request in group], device=self._device)
            draw = torch.Generator(self._device).manual_seed(group[0].seed)
            start, chosen = ids.shape[1], []
            for _ in range(sampling.max_tokens):
                logprobs = (self._model(ids).logits[:, -1].float() / sampling.temperature).log_softmax(-1)
                token = torch.multinomial(logprobs.exp(), 1, generator=draw)
                chosen.append(logprobs.gather(1, token))
                ids = torch.cat([ids, token], 1)
            tokens, values = ids[:, start:].tolist(), torch.cat(chosen, 1).cpu().numpy()
            found += [self._rollout(r, row, values[i]) for i, (r, row) in enumerate(zip(group, tokens, strict=True))]
        return sorted(found, key=lambda rollout: rollout.sequence_id)

    def _rollout(self, request: RolloutRequest, tokens: list[int], values: NDArray[np.float32]) -> Rollout:
        end = self._tokenizer.eos_token_id
        n, reason = (tokens.index(end) + 1, "stop") if end in tokens else (len(tokens), "length")
        return Rollout(request.sequence_id, np.array(tokens[:n], np.int32), values[:n], reason, "")

    def configured(self) -> AbstractContextManager[None]:
        return nullcontext()

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._model.load_state_dict(dict(weights), strict=False)

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        found = []
        for sequence in sequences:
            ids = torch.tensor([list(sequence)], device=self._device)
            logprobs = self._model(ids).logits[0].float().log_softmax(-1)
            found.append(logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].cpu().numpy())
        return found

    def identity(self) -> dict[str, Any]:
        return {"engine": "hf"}

    def close(self) -> None:
        del self._model
