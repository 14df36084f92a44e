"""The rollout engine: vLLM, sampling as an RL job samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines.attribute.trace import Routers, Routes, TraceRequest
from mismatch_probe.engines.base import Capture, Found, RolloutEngine, RolloutJob
from mismatch_probe.errors import EngineError
from mismatch_probe.types import Rollout, RolloutRequest, Sampling

if TYPE_CHECKING:
    import torch

_NO_SYNC = "Train another model family or use another vLLM version. Commands that do not train are unaffected."


class VllmRollout(RolloutEngine):
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
            # Tokens are drawn from the raw log-probs at temperature 1 only; otherwise from the processed ones.
            "logprobs_mode": "raw_logprobs" if job.sampling.temperature == 1 else "processed_logprobs",
            **job.arguments,
        }
        self._in_process, self._batch = job.in_process, job.batch
        self._native_replay = False
        replays = job.replays
        if replays or job.capture is not None or job.logit_noise:
            options |= self._own_processors(options, replays, "Noise" if job.logit_noise else "Rows")
        self._llm = LLM(**options)
        self._options = options
        self._runs = 0

    def _own_processors(self, options: dict[str, Any], replays: bool, kind: str) -> dict[str, Any]:
        """The arguments that let rows be kept and tokens be forced, or noise be added. Which interface a processor must
        have depends on the model runner, and that on the whole configuration (vllm/config/vllm.py,
        `use_v2_model_runner`).
        """
        from vllm import EngineArgs

        modern = bool(EngineArgs(**options).create_engine_config().use_v2_model_runner)
        if replays and not modern and options["logprobs_mode"] != "raw_logprobs":
            # A processor forces a token by excluding all others, and processed log-probs come after it.
            raise EngineError(
                "Replay with Model Runner V1 needs temperature 1.", "Leave --temperature out, or use a GPU."
            )
        self._native_replay = modern and replays
        name = f"{kind}V2" if modern else f"{kind}V1"
        chosen: dict[str, Any] = {"logits_processors": [f"mismatch_probe.engines.vllm.processors:{name}"]}
        return chosen | ({"enable_trace_replay": True} if self._native_replay else {})

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        capture: Capture | None = None,
    ) -> list[Rollout]:
        return self._decode(requests, sampling, on_tokens, capture, keep_cache=False)

    def replay(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        capture: Capture | None = None,
        *,
        keep_cache: bool = False,
    ) -> list[Rollout]:
        found = self._decode(requests, sampling, on_tokens, capture, keep_cache=keep_cache)
        for request, rollout in zip(requests, found, strict=True):
            if [int(token) for token in rollout.response_token_ids] != _forced(request, sampling):
                raise EngineError(
                    f"vLLM decoded tokens of sequence {request.sequence_id} that differ from the given ones.",
                    "Replay fails in this configuration: leave --engine-arg out.",
                )
        return found

    def _decode(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        capture: Capture | None,
        *,
        keep_cache: bool,
    ) -> list[Rollout]:
        engine = self._llm.llm_engine
        self._runs += 1
        if not keep_cache and not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not empty its prefix cache, so this batch would not start as the others did")
        if not self._in_process:
            # Requests reach a running core one at a time; pausing its scheduler admits them together, as in-process.
            self._llm.sleep(level=0)
        inputs = self._llm.renderer.render_cmpl([{"prompt_token_ids": list(r.prompt_token_ids)} for r in requests])
        for index, (request, prompt) in enumerate(zip(requests, inputs, strict=True)):
            engine.add_request(f"{self._runs}-{index}", prompt, self._params(sampling, request, capture))
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

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `RolloutEngine.load_weights`. Engine core in this process only: tensors are handed over as they are."""
        from mismatch_probe.engines.vllm.weights import load_weights

        assert self._in_process
        try:
            missing = [
                name for names in self._llm.collective_rpc(load_weights, args=(dict(weights),)) for name in names
            ]
        except (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, ValueError) as error:
            raise EngineError(
                f"vLLM cannot load new weights into this model ({type(error).__name__}: {str(error)[:200]}).",
                _NO_SYNC,
            ) from error
        if missing:
            raise EngineError(
                f"The weight sync left {len(missing)} parameters of vLLM's model unset, first {missing[0]}.", _NO_SYNC
            )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        from vllm import SamplingParams

        self._llm.reset_prefix_cache()
        params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        found = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            np.array([row[token].logprob for row, token in zip(o.prompt_logprobs[1:], s[1:], strict=True)], np.float32)
            for o, s in zip(found, sequences, strict=True)
        ]

    def configured(self) -> AbstractContextManager[None]:
        """vLLM runs some families by transformers' own classes, which it changes for that, and which then cannot be
        built without its configuration.
        """
        from vllm.config import set_current_vllm_config

        found: AbstractContextManager[None] = set_current_vllm_config(self._llm.llm_engine.vllm_config)
        return found

    def run_on_model(self, function: Callable[[Any], Found]) -> Found:
        found: Found = self._llm.apply_model(function)[0]
        return found

    def trace(self, request: TraceRequest) -> None:
        from mismatch_probe.engines.vllm import hooks

        self.run_on_model(partial(hooks.start_trace, request))
        self.score(request.sequences)
        self.run_on_model(hooks.finish_trace)

    def routes(self, sequences: Sequence[Sequence[int]], routers: Routers) -> Routes:
        from mismatch_probe.engines.vllm import hooks

        self.run_on_model(partial(hooks.start_routes, sequences, routers))
        # No more at once than one step takes: a sequence that is split over two is in no step as a whole.
        groups: list[list[Sequence[int]]] = []
        for sequence in sequences:
            room = routers.most_tokens - sum(map(len, groups[-1])) if groups else 0
            if len(sequence) <= room and len(groups[-1]) < self._batch:
                groups[-1].append(sequence)
            else:
                groups.append([sequence])
        logprobs = [row for group in groups for row in self.score(group)]
        kept = self.run_on_model(hooks.finish_routes)
        return Routes(kept["layers"], _experts(kept), logprobs)

    def generate_routed(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        routers: Routers,
    ) -> list[Rollout]:
        from mismatch_probe.engines.vllm import hooks

        self._llm.collective_rpc(hooks.start_decoded_routes, args=(routers,))
        found = self.generate(requests, sampling, on_tokens)
        sequences = [
            [*request.prompt_token_ids, *map(int, rollout.response_token_ids)]
            for request, rollout in zip(requests, found, strict=True)
        ]
        kept = self._llm.collective_rpc(hooks.finish_decoded_routes, args=(sequences,))[0]
        if not kept:
            return found
        parts = np.split(_experts(kept), np.cumsum([len(ids) for ids in sequences])[:-1], axis=1)
        return [replace(rollout, routes=part) for rollout, part in zip(found, parts, strict=True)]

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
            "model_runner": "v2" if config.use_v2_model_runner else "v1",
            "arguments": {k: v for k, v in self._options.items() if k != "model"},
        }

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _params(self, sampling: Sampling, request: RolloutRequest, capture: Capture | None) -> Any:
        """Sampling parameters in full: whatever is left out could come from somewhere else."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from mismatch_probe.engines.vllm.processors import request_arguments

        forced = _forced(request, sampling)
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            seed=request.seed,
            max_tokens=len(forced) or sampling.max_tokens,
            # End ids come from the checkpoint's generation config even where its other settings are switched off.
            ignore_eos=bool(forced),
            trace_decode_token_ids=forced if forced and self._native_replay else None,
            extra_args=request_arguments(
                request.sequence_id,
                len(request.prompt_token_ids),
                request.seed,
                capture,
                () if self._native_replay else forced,
                request.logit_noise,
                request.race_from,
            ),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


def _forced(request: RolloutRequest, sampling: Sampling) -> list[int]:
    """The tokens that a request is to decode again."""
    return [int(token) for token in request.forced_token_ids[: sampling.max_tokens]]


def _sampled_logprobs(found: Any, tokens: Sequence[int]) -> list[float]:
    """The sampled tokens' own log-probs; with `logprobs=0` vLLM lists exactly the sampled token at each position."""
    if not tokens:
        return []
    values = list(found.logprobs)
    if list(found.token_ids) != list(tokens):
        raise RuntimeError("vLLM listed log-probs of other tokens than it sampled")
    return values


def _experts(kept: Mapping[str, Any]) -> NDArray[np.int16]:
    """`[L, R, K]` routes as a worker hands them over."""
    return np.frombuffer(kept["routes"], np.int16).reshape(kept["shape"])


def _attention_backends(worker: Any) -> list[str]:
    """Runs in vLLM's worker: the attention backends that its runner chose; they can change with the dtype."""
    from mismatch_probe.engines.vllm.hooks import model_runner

    groups = getattr(model_runner(worker), "attn_groups", None) or []
    return [group.backend.get_name() for per_cache in groups for group in per_cache]
