"""Logits processors that run inside vLLM's engine: they keep full rows of logits, force given tokens, add noise,
and let noise of our own choose.

vLLM has two interfaces for them. Model Runner V1 (CPUs) takes `RowsV1`, which also forces the tokens of a replay:
raw log-probs are taken before processors run, so a forced token's log-prob is the real one. Model Runner V2 (CUDA)
takes `RowsV2`; there vLLM replays tokens itself (`trace_decode_token_ids`). Both see FP32 rows before the
temperature. `NoiseV1` and `NoiseV2` are the same pair for injected noise and for races: each runner refuses the other's
classes. A request says in `extra_args` what it wants, see `request_arguments`.

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
from mismatch_probe.engines.logits import add_noise, keep_rows, leave_winner
from mismatch_probe.engines.rows import RowChoice, RowWriter

_KEY = "mismatch_probe"
_NOISE = "mismatch_probe_noise"
_RACE = "mismatch_probe_race"


@dataclass(frozen=True)
class _Wish:
    """What one request wants of its rows; without `rows` none is kept."""

    prompt_length: int
    rows: RowChoice | None
    forced: Sequence[int]


def request_arguments(
    sequence_id: int,
    prompt_length: int,
    seed: int,
    capture: Capture | None,
    forced: Sequence[int] = (),
    logit_noise: float = 0.0,
    race_from: int | None = None,
) -> dict[str, Any] | None:
    """What goes into `SamplingParams.extra_args` for a request; None where it wants nothing.

    Args:
        sequence_id: Names the sequence in the file of rows.
        prompt_length: Tokens of the prompt.
        seed: The request's own, which decides with the position what is kept.
        capture: Which rows are kept, and where; None for none.
        forced: Tokens that the processor is to force, V1 only.
        logit_noise: Its standard deviation; such a request neither keeps rows nor replays.
        race_from: Position that a race for the tokens begins at, None for none; such a request does nothing else.
    """
    if race_from is not None:
        return {_RACE: [race_from, seed, prompt_length]}
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
    chosen = None if only is None else {at: (weight, stands_for) for at, weight, stands_for in only}
    rows = RowChoice(_writer(wish["path"], wish["rows"]), wish["sequence_id"], wish["seed"], chosen) if writes else None
    return _Wish(wish["prompt_length"], rows, wish["forced"])


def _first_rank() -> bool:
    from vllm.distributed import get_tensor_model_parallel_rank, model_parallel_is_initialized

    return not model_parallel_is_initialized() or get_tensor_model_parallel_rank() == 0


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
            if wish.rows is not None:
                keep_rows([(0, wish.rows, position)], logits[None])
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

    def apply(self, row: torch.Tensor, position: int) -> torch.Tensor:
        """Changes `[V]` logits in place."""
        return add_noise(row, self.scale, self.seed, position)


@dataclass(frozen=True)
class _Race:
    """Tokens that `engines.logits.winner` draws: the one that wins is all that is left to the engine."""

    first: int
    seed: int
    prompt_length: int
    temperature: float

    @classmethod
    def wanted(cls, params: SamplingParams) -> _Race | None:
        wish: Sequence[Any] | None = (params.extra_args or {}).get(_RACE)
        return None if wish is None else cls(int(wish[0]), int(wish[1]), int(wish[2]), float(params.temperature))

    def apply(self, row: torch.Tensor, position: int) -> torch.Tensor:
        """Changes `[V]` logits in place."""
        return leave_winner(row, self.temperature, self.seed, self.first + position)


def _read_noise(params: SamplingParams) -> _Noise | _Race | None:
    return _Noise.wanted(params) or _Race.wanted(params)


class NoiseV1(AdapterLogitsProcessor):  # type: ignore[misc]
    """Noise for Model Runner V1 in the logits of the requests that ask for it."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        noise = _read_noise(params)
        return None if noise is None else lambda output_ids, logits: noise.apply(logits, len(output_ids))


class NoiseV2(LogitsProcessor):  # type: ignore[misc]
    """Noise for Model Runner V2, without speculative decoding (a request then has one row a step)."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._wanted: dict[int, _Noise | _Race] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Slots are recycled, so whatever the last request there wanted is overwritten."""
        noise = _read_noise(sampling_params)
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
                noise.apply(logits[row], int(seen) - noise.prompt_length)
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
            if wish is not None and wish.rows is not None:
                # Before the prompt's last chunk no token of the response is being sampled: the position is negative.
                found.append((row, wish.rows, int(seen) - wish.prompt_length))
        keep_rows(found, logits)
        return logits
