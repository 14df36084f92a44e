"""The rollout engine: vLLM, sampling as an RL job samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mismatch_probe.engines.base import RolloutJob
from mismatch_probe.types import Rollout, RolloutRequest, Sampling


class VllmRollout:
    """vLLM behind the `RolloutEngine` protocol.

    Raises:
        Whatever vLLM raises; `engines.faults` turns it into sentences.
    """

    def __init__(self, job: RolloutJob) -> None:
        from vllm import LLM

        options: dict[str, Any] = {
            "model": job.model_path,
            "dtype": job.dtype,
            "seed": job.sampling.seed,
            "max_model_len": job.max_model_len,
            "max_num_seqs": job.batch,
            "trust_remote_code": job.trust_remote_code,
            "disable_log_stats": True,
            # "vllm" keeps a checkpoint's generation_config.json from changing temperature and top-p.
            "generation_config": "vllm",
            # Raw log-probs are the sampling law at temperature 1 only; otherwise the processed ones are (METRICS.md).
            "logprobs_mode": "raw_logprobs" if job.sampling.temperature == 1 else "processed_logprobs",
            **job.arguments,
        }
        self._in_process = job.in_process
        self._llm = LLM(**options)
        self._options = options
        self._runs = 0

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: Sampling, on_tokens: Callable[[int], None]
    ) -> list[Rollout]:
        engine = self._llm.llm_engine
        self._runs += 1
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not empty its prefix cache, so this batch would not start as the others did")
        if not self._in_process:
            # Requests reach a running core one at a time; pausing its scheduler admits them together, as in-process.
            self._llm.sleep(level=0)
        inputs = self._llm.renderer.render_cmpl([{"prompt_token_ids": list(r.prompt_token_ids)} for r in requests])
        for index, (request, prompt) in enumerate(zip(requests, inputs, strict=True)):
            engine.add_request(f"{self._runs}-{index}", prompt, _params(sampling, request.seed))
        if not self._in_process:
            self._llm.wake_up(tags=["scheduling"])
        ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        reasons = [""] * len(requests)
        while engine.has_unfinished_requests():
            made = 0
            for output in engine.step():
                index = int(output.request_id.split("-")[1])
                completion = output.outputs[0]
                tokens = list(completion.token_ids)
                ids[index] += tokens
                logprobs[index] += _sampled_logprobs(completion.logprobs, tokens)
                reasons[index] = completion.finish_reason or reasons[index]
                made += len(tokens)
            on_tokens(made)
        tokenizer = self._llm.get_tokenizer()
        return [
            Rollout(
                request.sequence_id,
                np.array(ids[i], dtype=np.int32),
                np.array(logprobs[i], dtype=np.float32),
                reasons[i],
                tokenizer.decode(ids[i]),
            )
            for i, request in enumerate(requests)
        ]

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        tokenizer = self._llm.get_tokenizer()
        return [tokenizer.decode([token]) for token in token_ids]

    def identity(self) -> dict[str, Any]:
        config = self._llm.llm_engine.vllm_config
        return {
            "engine": "vllm",
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "in_process": self._in_process,
            "attention_backends": sorted(
                {name for names in self._llm.collective_rpc(_attention_backends) for name in names}
            ),
            "enforce_eager": config.model_config.enforce_eager,
            "logprobs_mode": config.model_config.logprobs_mode,
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "kv_cache_dtype": config.cache_config.cache_dtype,
            "block_size": config.cache_config.block_size,
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "arguments": {k: v for k, v in self._options.items() if k != "model"},
        }

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def _params(sampling: Sampling, seed: int) -> Any:
    """Sampling parameters in full: whatever is left out could come from somewhere else."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=seed,
        max_tokens=sampling.max_tokens,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _sampled_logprobs(found: Any, tokens: Sequence[int]) -> list[float]:
    """The sampled tokens' own log-probs; with `logprobs=0` vLLM lists exactly the sampled token at each position."""
    if not tokens:
        return []
    values = list(found.logprobs)
    if list(found.token_ids) != list(tokens):
        raise RuntimeError("vLLM listed log-probs of other tokens than it sampled")
    return values


def _attention_backends(worker: Any) -> list[str]:
    """Runs in vLLM's worker: the attention backends that its runner chose; they can change with the dtype."""
    runner = getattr(worker, "model_runner", None) or worker.worker.model_runner
    groups = getattr(runner, "attn_groups", None) or []
    return [group.backend.get_name() for per_cache in groups for group in per_cache]
