"""The trainer engine: the Hugging Face forward pass as RL trainers run it.

Shape legend: `B` sequences of a batch, `T` tokens of its longest, `R` response tokens of the batch, `H` hidden size,
`V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mismatch_probe.engines.base import ExactPosition, Found, TrainerEngine, TrainerJob
from mismatch_probe.engines.batching import Footprint, plan_batches, plan_in_order, rows_per_chunk
from mismatch_probe.engines.float64 import keep_float64
from mismatch_probe.engines.hf.layouts import BatchLayout, model_inputs
from mismatch_probe.engines.loading import load_model
from mismatch_probe.engines.patching import replaced_forward
from mismatch_probe.engines.rows import RowFile, stacked
from mismatch_probe.errors import DtypeRefused, EngineError
from mismatch_probe.metrics.drift import drift_columns
from mismatch_probe.metrics.exact import divergences
from mismatch_probe.types import Score, ScoreRequest

_TORCH = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class HfTrainer(TrainerEngine):
    """A causal language model of transformers behind the `TrainerEngine` protocol.

    The decoder runs once per batch. The head then runs on the rows that predict response tokens only, some at a time,
    so that logits of `V` columns never exist for a whole batch.
    """

    def __init__(self, job: TrainerJob) -> None:
        from transformers import AutoConfig

        if (job.attention or "").startswith("flash") and job.dtype == "float32":
            raise DtypeRefused("FlashAttention does not support float32.", "Leave float32 out of this side's dtypes.")
        _apply_flags(job.flags)
        config = AutoConfig.from_pretrained(
            job.model_path, trust_remote_code=job.trust_remote_code, local_files_only=True
        ).get_text_config()
        self._job = job
        # What of a pass `changed` changes.
        self._layout: BatchLayout = job.layout
        self._softmax_dtype: torch.dtype | None = None
        self._device = torch.device(job.device)
        self._dtype = _TORCH[job.dtype]
        weights = self._dtype if job.mode == "cast" else torch.float32
        self.hold(
            load_model(
                job.model_path,
                dtype=weights,
                attn_implementation=job.attention or _faithful_attention(config),
                trust_remote_code=job.trust_remote_code,
            )
        )
        self._vocabulary = int(config.vocab_size)
        self._shape = {
            "hidden": config.hidden_size,
            "intermediate": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            "heads": getattr(config, "num_attention_heads", 1),  # a state-space model has none
            "itemsize": weights.itemsize,
        }
        self._sources = [RowFile(Path(path)) for path in job.exact_sources]
        self._check_head()
        if job.layout == "packed":
            self._check_packing()

    def hold(self, model: Any) -> None:
        """Takes a model of the same checkpoint's shape in the place of its own."""
        self._model = model.requires_grad_(False).eval().to(self._device)
        self._decoder = self._model.get_decoder()

    def run_on_model(self, function: Callable[[Any], Found]) -> Found:
        return function(self._model)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self._model.named_parameters())
        for name, value in weights:
            parameters[name].copy_(value)

    @contextmanager
    def changed(self, *, layout: str | None = None, softmax_in_dtype: bool = False) -> Iterator[None]:
        before = self._layout, self._softmax_dtype
        try:
            if layout is not None:
                self._layout = layout  # type: ignore[assignment]
            if layout == "packed":
                self._check_packing()
            if softmax_in_dtype:
                self._softmax_dtype = self._dtype
            yield
        finally:
            self._layout, self._softmax_dtype = before

    def plan(self, requests: Sequence[ScoreRequest]) -> list[list[ScoreRequest]]:
        layout = self._layout if self._layout in ("single", "packed") else "padded"
        return plan_batches(requests, layout, self._footprint(), self._job.memory_budget, self._device.type)

    def plan_as_rollout(
        self, requests: Sequence[ScoreRequest], most_tokens: int, most_rows: int
    ) -> list[list[ScoreRequest]]:
        return plan_in_order(requests, self._footprint(), self._job.memory_budget, most_tokens, most_rows)

    def _footprint(self) -> Footprint:
        return Footprint.of_model(**self._shape, attention=self._model.config._attn_implementation)

    @torch.inference_mode()
    def head_logits(self, states: torch.Tensor) -> torch.Tensor:
        with self.precision(), self._head_only(self._output_type) as head:
            logits: torch.Tensor = head(states)
        return logits

    @torch.inference_mode()
    def rows(self, batch: Sequence[ScoreRequest]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        inputs, rows, targets = model_inputs(batch, self._layout, self._device)
        with self.precision():
            output = self._decoder(**inputs, use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1)[rows]
            step = rows_per_chunk(self._vocabulary, self._job.memory_budget, self._device.type)
            with self._head_only(self._output_type) as head:
                for start in range(0, len(targets), step):
                    logits = _upcast(head(hidden[start : start + step]))
                    if self._softmax_dtype is not None:
                        logits = logits.to(self._softmax_dtype)
                    yield start, logits, targets[start : start + step]

    @torch.inference_mode()
    def score(self, batch: Sequence[ScoreRequest], temperature: float, *, exact: bool = False) -> list[Score]:
        ends = list(accumulate(len(request.response_token_ids) for request in batch))
        wanted = self._wanted(batch, [0, *ends[:-1]]) if exact else {}
        columns: list[tuple[torch.Tensor, ...]] = []
        compared: dict[int, dict[str, Any]] = {}
        for start, logits, targets in self.rows(batch):
            columns.append(token_columns(logits, targets, temperature))
            for row in range(start, start + len(logits)):
                if row in wanted:
                    compared[row] = self._compare(wanted[row], logits[row - start], temperature)
        logprobs, entropy, rank = (
            np.split(torch.cat(column).cpu().numpy(), ends[:-1]) for column in zip(*columns, strict=True)
        )
        return [
            Score(
                request.sequence_id,
                logprobs[i],
                entropy[i].astype(np.float32),
                rank[i].astype(np.int32),
                stacked([compared[row] for row in range(end - len(logprobs[i]), end) if row in compared]),
            )
            for i, (request, end) in enumerate(zip(batch, ends, strict=True))
        ]

    def _wanted(self, batch: Sequence[ScoreRequest], starts: Sequence[int]) -> dict[int, list[ExactPosition]]:
        """What each row of a batch is compared with, by the row's index among the batch's response rows."""
        found: dict[int, list[ExactPosition]] = {}
        for request, start in zip(batch, starts, strict=True):
            for position in self._job.exact.get(request.sequence_id, ()):
                found.setdefault(start + position.position, []).append(position)
        return found

    def _compare(self, positions: Sequence[ExactPosition], logits: torch.Tensor, temperature: float) -> dict[str, Any]:
        """One row `[V]` of the trainer against the rows that rollout passes kept of its position, one at a time."""
        ours = logits.cpu().numpy()[None]
        parts = []
        for position in positions:
            theirs = self._sources[position.source].row(position.slot)[None]
            if theirs.shape != ours.shape:
                raise EngineError(
                    f"The rollout engine returns {theirs.shape[1]} logits per token, the trainer {ours.shape[1]}.",
                    "One side pads its vocabulary: start a run without --exact-kl, and report this model.",
                )
            found = divergences(theirs, ours, temperature) | drift_columns(theirs, ours, temperature)
            parts.append(position.facts() | found)
        return stacked(parts) or {}

    def identity(self) -> dict[str, Any]:
        return {
            "engine": "hf",
            "dtype": self._job.dtype,
            "mode": self._job.mode,
            "weights_dtype": str(self._model.dtype).removeprefix("torch."),
            "layout": self._job.layout,
            "attention": self._model.config._attn_implementation,
            "architecture": type(self._model).__name__,
            "threads": torch.get_num_threads(),
            "flags": dict(self._job.flags),
            "device_name": torch.cuda.get_device_name() if self._device.type == "cuda" else None,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }

    def close(self) -> None:
        for source in self._sources:
            source.close()
        del self._model, self._decoder

    def precision(self) -> AbstractContextManager[Any]:
        if self._job.dtype == "float64":
            return keep_float64(self._model)
        if self._job.mode == "autocast":
            return torch.autocast(self._device.type, self._dtype)
        return nullcontext()

    @contextmanager
    def _head_only(self, output_type: type) -> Iterator[Any]:
        """Yields a function from hidden states `[R, H]` to logits `[R, V]`: the model's own forward, decoder left out.

        The decoder answers with the given states for the while, so whatever the architecture does behind it (bias,
        scaling, soft-capping) is done by its own code.
        """
        current: list[torch.Tensor] = []

        def answer(*_: Any, **__: Any) -> Any:
            return output_type(last_hidden_state=current[0])

        def head(states: torch.Tensor) -> torch.Tensor:
            current[:] = [states[None]]
            logits: torch.Tensor = self._model(inputs_embeds=states[None], use_cache=False).logits[0]
            return logits

        with replaced_forward(self._decoder, answer):
            yield head

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Compares the split forward with the plain one on a few tokens: it relies on how transformers is built."""
        ids = torch.arange(8, device=self._device)[None] % self._vocabulary
        with self.precision():
            plain = _upcast(self._model(input_ids=ids, use_cache=False).logits[0])
            output = self._decoder(input_ids=ids, use_cache=False)
            self._output_type = type(output)
            with self._head_only(self._output_type) as head:
                split = _upcast(head(output.last_hidden_state[0]))
        tolerance = 8 * torch.finfo(self._dtype).eps * plain.abs().max().clamp(min=1)
        if not torch.isnan(plain).any() and (plain - split).abs().max() > tolerance:
            raise EngineError(
                f"{type(self._model).__name__} changes the hidden states between decoder and LM head, "
                "so it cannot be scored in chunks.",
                "Report this architecture.",
            )

    def _check_packing(self) -> None:
        """Scores one sequence behind two different ones of equal length: it must not see which of them it was.

        Rounding is allowed for, since the rows that an expert of a mixture gets depend on its neighbours; a leak moves
        log-probs by whole nats.
        """
        draw = torch.Generator().manual_seed(0)
        first, second, tail = torch.randint(self._vocabulary, (3, 24), generator=draw).tolist()
        behind = [
            self.score([ScoreRequest(0, head[:4], head[4:]), ScoreRequest(1, tail[:4], tail[4:])], 1.0)[1].logprobs
            for head in (first, second)
        ]
        leak = float(np.mean(np.abs(np.subtract(behind[0], behind[1]))))
        # A model with a recurrent state passes on what is small at first, and adds up.
        if getattr(self._model, "_is_stateful", False) or leak > 16 * torch.finfo(self._dtype).eps:
            raise EngineError(
                f"{type(self._model).__name__} with attention {self._job.attention!r} "
                "does not separate packed sequences.",
                "Use --trainer-layout padded.",
            )


def _apply_flags(flags: Any) -> None:
    """Sets what `hf.settings` chose."""
    if "float32_matmul_precision" in flags:
        torch.set_float32_matmul_precision(flags["float32_matmul_precision"])
    if "cudnn_allow_tf32" in flags:
        torch.backends.cudnn.allow_tf32 = flags["cudnn_allow_tf32"]
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        if name in flags:
            setattr(torch.backends.cuda.matmul, name, flags[name])
    if flags.get("sdpa_broadcasts_grouped_heads") is False:
        from transformers.integrations import sdpa_attention

        sdpa_attention.use_gqa_in_sdpa = lambda *_: False


def _faithful_attention(config: Any) -> str | None:
    """The attention where the user named none: transformers' own choice, unless that drops a soft-cap of the attention
    scores (Gemma 2), which SDPA cannot do and vLLM does.
    """
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


def _upcast(logits: torch.Tensor) -> torch.Tensor:
    """Logits as trainers take their softmax: in FP32, and in float64 where all is float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def token_columns(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature) at the targets, the entropy of that distribution in nats, and how many tokens
    are likelier than the target. `logits [R, V]`, `targets [R]` → three `[R]`.
    """
    if temperature != 1:
        logits = logits / temperature
    normaliser = logits.logsumexp(1)
    chosen = logits.gather(1, targets[:, None])
    # In place, since a row is long; a token that cannot occur has the logit −inf, and its 0 · −inf adds nothing.
    expected = (logits - normaliser[:, None]).exp_().mul_(logits).nan_to_num_(0.0).sum(1)
    return _upcast(chosen[:, 0] - normaliser), _upcast(normaliser - expected), (logits > chosen).sum(1)
