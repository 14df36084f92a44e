"""The gap that is taken apart: a pair of a finished comparison, and how its two engines ran.

Shape legend: `N` response tokens of the pair, `S` sequences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.config import AttributeOptions, CompareConfig
from mismatch_probe.engines import devices
from mismatch_probe.engines.checkpoint import read_config
from mismatch_probe.errors import EngineError, UsageError
from mismatch_probe.metrics.chunks import usable_rows
from mismatch_probe.metrics.frame import pair_arrays
from mismatch_probe.metrics.ladder import TokenPrompts
from mismatch_probe.passes import PassId
from mismatch_probe.probes.attribute.settings import Context
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.types import RolloutRequest, ScoreRequest

# Of what a pass holds; another number makes all of them anew.
PASSES = 1


@dataclass(frozen=True)
class AttributedPair:
    """The pair whose gap is taken apart, and what is known of its engines.

    Attributes:
        run: The comparison.
        config: Its configuration.
        rollout, trainer: The pair's passes.
        context: What decides which settings exist.
        sequences: `S` prompts with responses, in the order of the pair's tokens.
        rollout_logprobs, trainer_logprobs: `[N]` nats, NaN on both sides where the pair leaves a token out.
        float32_logprobs: `[N]` of the trainer in FP32, None where the run has no such pass.
        tokens: Which prompt each token answers.
        n_impossible: Tokens that the pair leaves out though both sides are finite.
    """

    run: RunDirectory
    config: CompareConfig
    rollout: PassId
    trainer: PassId
    context: Context
    sequences: tuple[ScoreRequest, ...]
    rollout_logprobs: NDArray[np.float64]
    trainer_logprobs: NDArray[np.float64]
    float32_logprobs: NDArray[np.float64] | None
    tokens: TokenPrompts
    n_impossible: int = 0

    @property
    def engine(self) -> Mapping[str, Any]:
        """What the rollout pass said of itself."""
        return self.context.engine

    @property
    def eager(self) -> bool:
        """Whether the rollout ran without compilation and CUDA graphs."""
        return bool(self.engine.get("enforce_eager", self.context.device == "cpu"))

    @property
    def in_process(self) -> bool:
        """Whether vLLM's core ran in the process that called it, as it then does again."""
        return bool(self.engine.get("in_process", True))

    @property
    def most_tokens(self) -> int:
        """Tokens that the engine's scheduler takes at once."""
        return int(self.engine.get("max_num_batched_tokens", 1))

    @property
    def batch(self) -> int:
        """Requests in the engine at once."""
        return self.run.manifest.sizes.rollout_batch

    def requests(self) -> list[RolloutRequest]:
        """The sequences, to be decoded again."""
        seed = self.config.seed
        return [RolloutRequest(s.sequence_id, s.prompt_token_ids, seed, s.response_token_ids) for s in self.sequences]

    def starts(self) -> NDArray[np.int64]:
        """`[S + 1]` index of each sequence's first token, and the end."""
        return np.cumsum([0, *(len(s.response_token_ids) for s in self.sequences)])

    def key(self, name: str, *about: Any) -> str:
        """A digest of all that a pass depends on."""
        config = self.config
        # Not the versions of packages: a run is read elsewhere and later, and every pass says what made it.
        known: list[Any] = [PASSES, name, *map(repr, about), self.run.manifest.device]
        known += [self.run.manifest.model.files, str(self.rollout), str(self.trainer)]
        known += [config.trainer_layout, config.trainer_attn, config.memory_budget_gib]
        known += [config.engine_args, config.eager, self.batch, self.in_process]
        return _digest([*known, self._ids_digest])

    @cached_property
    def _ids_digest(self) -> str:
        """Of all tokens, which every key depends on."""
        return _digest([[list(s.prompt_token_ids), list(s.response_token_ids)] for s in self.sequences])


def _digest(known: Any) -> str:
    return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()


def open_pair(run: RunDirectory, options: AttributeOptions) -> AttributedPair:
    """Reads a run's pair.

    Raises:
        UsageError: The run has no such pair, or none that could be run again.
        EngineError: A pass of it did not finish.
    """
    config = run.manifest.config
    wanted_rollout, wanted_trainer = options.dtypes
    passes = run.passes
    rollout = next((r for r in passes.rollouts if r.dtype == wanted_rollout), None)
    trainer = next((t for t in passes.trainers if t.dtype == wanted_trainer), None)
    if rollout is None or trainer is None:
        known = ", ".join(f"{r.dtype}/{t.dtype}" for r in passes.rollouts for t in passes.trainers)
        raise UsageError(
            f"This run has no pair {wanted_rollout}/{wanted_trainer}.", f"It has {known}: choose by --pair."
        )
    if config.temperature != 1:
        raise UsageError(
            "An attribution needs temperature 1: prefill gives log-probs at no other.",
            "Compare without --temperature.",
        )
    for name in (str(rollout), str(trainer)):
        if not run.finished(name):
            record = run.record_of(name)
            why = "it did not run" if record is None else record.why
            raise EngineError(f"Pass {name} has not finished: {why}", "Continue the comparison with --resume.")
    source = run.source_of(str(rollout))
    rows = {row["sequence_id"]: row for row in run.sequences(source).to_pylist() if row["response_token_ids"]}
    if any(not row["prompt_token_ids"] for row in rows.values()):
        raise UsageError("A sequence of this run has no prompt, so no engine can score it.", "Compare with prompts.")
    arrays = pair_arrays(run, str(rollout), str(trainer))
    if len(arrays.rollout_logprob) != sum(len(row["response_token_ids"]) for row in rows.values()):
        raise UsageError("Some tokens of this run were left out of the comparison.", "Compare the model's own samples.")
    wide = str(PassId.trainer(trainer.engine, "float32"))
    float32 = pair_arrays(run, str(rollout), wide).trainer_logprob if run.finished(wide) else None
    usable = usable_rows(arrays)
    finite = np.isfinite(arrays.rollout_logprob) & np.isfinite(arrays.trainer_logprob)
    rollout_logprobs, trainer_logprobs = (
        np.where(usable, side, np.nan) for side in (arrays.rollout_logprob, arrays.trainer_logprob)
    )
    ordered = [rows[key] for key in sorted(rows)]
    context = Context(
        device=run.manifest.device,
        gpus=len(devices.gpu_names()),
        rollout_dtype=str(rollout.dtype),
        trainer_dtype=str(trainer.dtype),
        trainer_mode=str(trainer.mode),
        trainer_layout=config.trainer_layout,
        model=read_config(run.manifest.model.path),
        engine=run.manifest.passes[str(rollout)].engine,
        rollout_engine=rollout.engine,
        attention=str(run.manifest.passes[str(trainer)].engine.get("attention", "")),
    )
    return AttributedPair(
        run,
        config,
        rollout,
        trainer,
        context,
        tuple(ScoreRequest(i, r["prompt_token_ids"], r["response_token_ids"]) for i, r in enumerate(ordered)),
        rollout_logprobs,
        trainer_logprobs,
        float32,
        TokenPrompts(arrays.prompt[arrays.sequence], len(arrays.prompt_ids)),
        int((finite & ~usable).sum()),
    )
