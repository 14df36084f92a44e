"""Logits processors that run inside vLLM's engine: they keep full rows of logits, force given tokens, and add noise.

vLLM has two interfaces for them. Model Runner V1 (CPUs) takes `RowsV1`, which also forces the tokens of a replay:
raw log-probs are taken before processors run, so a forced token's log-prob is the real one. Model Runner V2 (CUDA)
takes `RowsV2`; there vLLM replays tokens itself (`trace_decode_token_ids`). Both see FP32 rows before the
temperature. `NoiseV1` and `NoiseV2` are the same pair for injected noise: each runner refuses the other's classes. A
request says in `extra_args` what it wants, see `request_arguments`.

Line references: vLLM 0.32, v1/sample/logits_processor/ and v1/worker/gpu/sample/logits_processor/. A test drives the
V2 classes with made-up contexts; on a GPU tests marked `gpu` run them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from mismatch_probe.engines.base import Capture
from mismatch_probe.engines.rows import LEAST_WEIGHT, RowWriter, uniform

_KEY = "mismatch_probe"
_NOISE = "mismatch_probe_noise"


@dataclass(frozen=True)
class _Wish:
    """What one request wants of its rows."""

    sequence_id: int
    prompt_length: int
    seed: int
    writer: RowWriter | None
    only: Mapping[int, tuple[float, float]] | None
    forced: Sequence[int]

    def draw(self, position: int) -> float | None:
        """The position's u; None where no row is kept of it whatever its weight, and none is counted."""
        if self.writer is None or position < 0:
            return None
        if self.only is not None:
            return 0.0 if position in self.only else None
        return uniform(self.seed, position)

    def admit(self, position: int, u: float, weight: float) -> int | None:
        """The slot of a row in the file, None where it is not kept."""
        assert self.writer is not None
        if self.only is not None:
            return self.writer.admit(self.sequence_id, position, u, *self.only[position])
        return self.writer.admit(self.sequence_id, position, u, weight)

    def put(self, slot: int, row: torch.Tensor) -> None:
        assert self.writer is not None
        self.writer.put(slot, row.numpy())


def request_arguments(
    sequence_id: int,
    prompt_length: int,
    seed: int,
    capture: Capture | None,
    forced: Sequence[int] = (),
    logit_noise: float = 0.0,
) -> dict[str, Any] | None:
    """What goes into `SamplingParams.extra_args` for a request; None where it wants nothing.

    Args:
        sequence_id: Names the sequence in the file of rows.
        prompt_length: Tokens of the prompt.
        seed: The request's own, which decides with the position what is kept.
        capture: Which rows are kept, and where; None for none.
        forced: Tokens that the processor is to force, V1 only.
        logit_noise: Its standard deviation; such a request neither keeps rows nor replays.
    """
    if logit_noise:
        return {_NOISE: [logit_noise, seed, prompt_length]}
    if capture is None and not forced:
        return None
    wish: dict[str, Any] = {"sequence_id": sequence_id, "prompt_length": prompt_length, "seed": seed}
    wish["forced"] = [int(token) for token in forced]
    if capture is not None:
        chosen = None if capture.positions is None else capture.positions.get(sequence_id, {})
        only = None if chosen is None else [[position, *facts] for position, facts in chosen.items()]
        wish |= {"path": capture.path, "rows": capture.rows, "only": only}
    return {_KEY: wish}


@cache
def _writer(path: str, rows: int) -> RowWriter:
    """The file of a pass, made at its first request in the process that sees the rows."""
    return RowWriter(Path(path), rows)


def _read_wish(params: SamplingParams) -> _Wish | None:
    wish: Mapping[str, Any] | None = (params.extra_args or {}).get(_KEY)
    if wish is None:
        return None
    only = wish.get("only")
    # With tensor parallelism every rank sees all rows; one of them writes.
    writes = "path" in wish and _first_rank()
    return _Wish(
        sequence_id=wish["sequence_id"],
        prompt_length=wish["prompt_length"],
        seed=wish["seed"],
        writer=_writer(wish["path"], wish["rows"]) if writes else None,
        only=None if only is None else {at: (weight, stands_for) for at, weight, stands_for in only},
        forced=wish["forced"],
    )


def _first_rank() -> bool:
    from vllm.distributed import get_tensor_model_parallel_rank, model_parallel_is_initialized

    return not model_parallel_is_initialized() or get_tensor_model_parallel_rank() == 0


def _weights(rows: torch.Tensor) -> torch.Tensor:
    """`[R, V]` logits → `[R]` weights: one minus the likeliest token's probability, no less than the least weight."""
    top = torch.exp(rows.amax(-1) - rows.logsumexp(-1))
    # A row with NaN is kept like the least sure one, since it is what somebody will want to see.
    return (1 - top).nan_to_num(1.0).clamp(LEAST_WEIGHT, 1.0)


class RowsV1(AdapterLogitsProcessor):  # type: ignore[misc]
    """For Model Runner V1."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        wish = _read_wish(params)
        if wish is None:
            return None

        def process(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            position = len(output_ids)
            u = wish.draw(position)
            if u is not None:
                slot = wish.admit(position, u, float(_weights(logits)))
                if slot is not None:
                    wish.put(slot, logits.float().cpu())
            if position < len(wish.forced):
                logits.fill_(-torch.inf)
                logits[wish.forced[position]] = 0.0
            return logits

        return process


@dataclass(frozen=True)
class _Noise:
    """An injected stress of known size, see `rl.stress`, that depends on the request's seed and the position alone.

    The engine must report processed log-probs, which are those of the distribution that was sampled from.
    """

    scale: float
    seed: int
    prompt_length: int

    @classmethod
    def wanted(cls, params: SamplingParams) -> _Noise | None:
        wish: Sequence[Any] | None = (params.extra_args or {}).get(_NOISE)
        return None if wish is None else cls(float(wish[0]), int(wish[1]), int(wish[2]))

    def add_to(self, row: torch.Tensor, position: int) -> torch.Tensor:
        """Changes `[V]` logits in place."""
        # Drawn on the CPU whatever the device, so that both runners add the same.
        generator = torch.Generator().manual_seed((self.seed << 20) + position)
        return row.add_(self.scale * torch.randn(row.shape, generator=generator).to(row))


class NoiseV1(AdapterLogitsProcessor):  # type: ignore[misc]
    """Adds noise for Model Runner V1 to the logits of the requests that ask for it."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        noise = _Noise.wanted(params)
        return None if noise is None else lambda output_ids, logits: noise.add_to(logits, len(output_ids))


class NoiseV2(LogitsProcessor):  # type: ignore[misc]
    """Adds noise for Model Runner V2, without speculative decoding (a request then has one row a step)."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._wanted: dict[int, _Noise] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Slots are recycled, so whatever the last request there wanted is overwritten."""
        noise = _Noise.wanted(sampling_params)
        if noise is None:
            self._wanted.pop(req_idx, None)
            return False
        self._wanted[req_idx] = noise
        return True

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        for row, (slot, seen) in enumerate(zip(ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np, strict=True)):
            noise = self._wanted.get(int(slot))
            # Before the prompt's last chunk no token of the response is being sampled.
            if noise is not None and seen >= noise.prompt_length:
                noise.add_to(logits[row], int(seen) - noise.prompt_length)
        return logits


class RowsV2(LogitsProcessor):  # type: ignore[misc]
    """For Model Runner V2, without speculative decoding (a request then has one row a step)."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._wishes: dict[int, _Wish] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Slots are recycled, so whatever the last request there wanted is overwritten."""
        wish = _read_wish(sampling_params)
        if wish is None:
            self._wishes.pop(req_idx, None)
            return False
        self._wishes[req_idx] = wish
        # Logits stay as they are, but only requests that say so are shown to `apply` as FP32 rows.
        return True

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        found = []
        for row, (slot, seen) in enumerate(zip(ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np, strict=True)):
            wish = self._wishes.get(int(slot))
            # Before the prompt's last chunk no token of the response is being sampled, and the position is negative.
            position = int(seen) - wish.prompt_length if wish is not None else -1
            u = wish.draw(position) if wish is not None else None
            if wish is not None and u is not None:
                found.append((row, wish, position, u))
        if not found:
            return logits
        weights = _weights(logits[[row for row, *_ in found]]).tolist()  # waits for the device, once a step
        kept = [
            (row, wish, slot)
            for (row, wish, position, u), weight in zip(found, weights, strict=True)
            if (slot := wish.admit(position, u, weight)) is not None
        ]
        if kept:
            rows = logits[[row for row, *_ in kept]].float().cpu()
            for (_, wish, slot), values in zip(kept, rows, strict=True):
                wish.put(slot, values)
        return logits
