"""Weight sync that is checked: after each one the engine's log-probs of fixed sequences are compared with those of the
very weights that it was given.

vLLM only logs a tensor that is missing, and on a CPU its packed weights cannot be read back. So a fault is found by
what it does. The trainer's FP32 forward pass tries on hypotheses: the weights that were sent, the ones before them, the
sent ones with one tensor left as it was, the sent ones cast to another dtype. The hypothesis that reproduces the engine
names the fault, and where it is one tensor, the tensor. Only compute rounding separates the engine from the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mismatch_probe.engines.logprobs import Batch
from mismatch_probe.errors import EngineError
from mismatch_probe.rl.policy import TORCH_DTYPES, Policy
from mismatch_probe.types import Dtype

# In FP32 both sides compute the same function: METRICS.md and FACTS.md put the floor at 1e-6 nats and below.
FP32_LIMIT = 1e-5
# A 16-bit gap is rounding as long as it stays within so many times the gap right after the engine loaded the weights.
GROWTH_LIMIT = 4.0
# Beyond that a gap is rounding within an order of magnitude of the error that the trainer's own forward pass makes in
# the engine's dtype with these weights: under injected noise even FP32 can round by more than its limit.
ROUNDING_LIMIT = 10.0
# A hypothesis changes log-probs by δ. Where it holds, the engine's difference from the weights that were sent is δ and
# rounding, so that taking δ off leaves the rounding: it has to explain at least this share of the squared difference.
# Not by a test of correlation: 16-bit rounding errors are so far from independent that among a hundred tensors one
# correlates by many standard errors. So in 16 bits a tensor that is missing shows once its change outgrows rounding.
_EXPLAINED = 0.5
# Hypotheses of one tensor take a forward pass each, so they are tried at the first sync that changes anything, at
# every so many after it against the weights that the engine had first, and wherever something is wrong.
SCAN_EVERY = 100
# Tensors of a model that is no toy: 545 forward passes of SmolLM2 took 3 minutes on 2 cores.
_MANY = 100
Weights = Mapping[str, torch.Tensor]
Floats = NDArray[np.float64]


class SyncError(EngineError):
    """The engine does not have the weights that it was given."""


class ScoringEngine(Protocol):
    """What the check needs of an engine."""

    def load_weights(self, weights: Weights) -> None: ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]: ...


@dataclass(frozen=True)
class SyncFacts:
    """A sync that was accepted.

    Attributes:
        gap: Mean |Δlogp| at the fixed sequences, engine against the FP32 forward of the weights that were sent, nats;
            None where it was not checked.
    """

    gap: float | None


class WeightSync:
    """Hands weights to an engine and checks that they arrived.

    Args:
        engine: It holds the weights of `policy` as they are now.
        policy: For its forward pass.
        dtype: The engine's.
        probes: Fixed sequences of at least 2 tokens.
        check: Whether to check; names are compared in any case.
        scan_every: Syncs that change something from one trial of every hypothesis to the next.
        tell: Told before such a trial that takes its time.

    Raises:
        SyncError: The engine's log-probs are not those of the weights that it loaded.
    """

    def __init__(
        self,
        engine: ScoringEngine,
        policy: Policy,
        dtype: Dtype,
        probes: Sequence[Sequence[int]],
        *,
        check: bool,
        scan_every: int = SCAN_EVERY,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._engine, self._policy, self._dtype, self._check = engine, policy, dtype, check
        self._scan_every, self._tell = scan_every, tell
        self._probes = [list(probe) for probe in probes]
        device = next(policy.model.parameters()).device
        self._batch = Batch.of([p[:1] for p in self._probes], [p[1:] for p in self._probes], device)
        self._names = frozenset(policy.weights())
        self._sent = cast(policy.weights(), dtype)
        self._first, self._changes, self._clean_gap = self._sent, 0, np.inf
        if check:
            self._clean_gap = self._judge(self._engine_logprobs(), self._sent, self._sent)

    def send(self, weights: Weights) -> SyncFacts:
        """Gives the engine new weights.

        Raises:
            SyncError: A tensor is missing or too many, or the engine does not have what it was given.
        """
        self._compare_names(weights)
        new, old = cast(weights, self._dtype), self._sent
        self._engine.load_weights(new)
        gap = self._judge(self._engine_logprobs(), new, old) if self._check else None
        self._sent = new
        return SyncFacts(gap)

    def resend(self, weights: Weights) -> None:
        """Gives the engine weights without asking whether they arrived, e.g. after a fault was mended."""
        self._sent = cast(weights, self._dtype)
        self._engine.load_weights(self._sent)

    def _compare_names(self, weights: Weights) -> None:
        differing = sorted(self._names ^ set(weights))
        if differing:
            verb = "lacks" if differing[0] in self._names else "has the unknown"
            raise SyncError(
                f"The weights for the engine {verb} {differing[0]} ({len(differing)} names differ).",
                "Give the whole state_dict(), tied heads included; named_parameters() leaves those out.",
            )

    def _judge(self, seen: Floats, new: Weights, old: Weights) -> float:
        """Stops on a gap that the dtype does not explain, or that a fault explains. Returns the gap."""
        ours = self._logprobs(new)
        gap = float(np.abs(seen - ours).mean())
        limit = FP32_LIMIT if self._dtype == "float32" else max(FP32_LIMIT, GROWTH_LIMIT * self._clean_gap)
        if gap > limit:
            rounded = self._policy.rounded_logprobs(self._batch, new, self._dtype)
            limit = max(limit, ROUNDING_LIMIT * float(np.abs(self._of_probes(rounded) - ours).mean()))
        suspicious = not gap <= limit  # NaN is suspicious
        changed = any(not torch.equal(new[name], old[name]) for name in new)
        self._changes += changed
        scan = suspicious or (changed and (self._changes - 1) % self._scan_every == 0)
        if scan and len(new) > _MANY:
            self._tell(f"checking the weight sync tensor by tensor, with up to {2 * len(new)} forward passes")
        best, clause = np.inf, ""
        for said, weights in self._hypotheses(new, old, scan) if changed or suspicious else ():
            left = _left_over(seen - ours, self._logprobs(weights) - ours)
            if left is not None and left < best:
                best, clause = left, said
        if suspicious or clause:
            raise SyncError(
                f"After a weight sync the engine's log-probs are {gap:.1e} nats from those of the weights that it was "
                f"given ({limit:.1e} would be rounding): {clause or 'no single fault explains it'}.",
                "Do not train on: see how weights reach the engine; checkpoints up to here are kept.",
            )
        return gap

    def _hypotheses(self, new: Weights, old: Weights, scan: bool) -> Iterable[tuple[str, Weights]]:
        yield "it still has the weights of the sync before (stale)", old
        yield "it still has the weights that it began with (stale)", self._first
        if not scan:
            return
        for name in new:
            for earlier in (old, self._first):
                if not torch.equal(new[name], earlier[name]):
                    yield f"{name} did not arrive (partial sync)", {**new, name: earlier[name]}
        for other in TORCH_DTYPES:
            if other != self._dtype:
                rounded = cast(cast(new, other), self._dtype)
                yield f"its weights were rounded to {other} on the way (wrong cast)", rounded

    def _engine_logprobs(self) -> Floats:
        return np.concatenate([np.asarray(row, np.float64) for row in self._engine.score(self._probes)])

    def _logprobs(self, weights: Weights) -> Floats:
        return self._of_probes(self._policy.clean_logprobs(self._batch, weights))

    def _of_probes(self, values: torch.Tensor) -> Floats:
        return np.asarray(values[self._batch.mask].double().cpu().numpy())


def cast(weights: Weights, dtype: str) -> dict[str, torch.Tensor]:
    """Copies in an engine's dtype; what is no floating-point number stays as it is."""
    wanted = TORCH_DTYPES[dtype]
    return {
        name: tensor.to(wanted, copy=True) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in weights.items()
    }


def changed_share(before: Weights, after: Weights) -> float:
    """Share of the weights whose value differs; of casts, the share whose change an engine of that dtype sees."""
    changed = sum(int((after[name] != before[name]).sum()) for name in after)
    return changed / max(1, sum(tensor.numel() for tensor in after.values()))


def _left_over(difference: Floats, delta: Floats) -> float | None:
    """What is left of the engine's squared difference if a hypothesis holds; None where it explains too little.

    Args:
        difference: `[N]` log-probs of the engine less those of the weights that were sent.
        delta: `[N]` those of the hypothesis less those of the weights that were sent.
    """
    total = float(difference @ difference)
    if not np.isfinite(total) or not np.isfinite(delta).all():
        return None
    left = float(((difference - delta) ** 2).sum())
    return left if left <= (1 - _EXPLAINED) * total and delta.any() else None
