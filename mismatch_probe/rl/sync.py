"""Weight sync that is checked: after each one the engine's log-probs of fixed sequences are compared with those of the
very weights that it was given.

On a CPU vLLM packs its weights, and they cannot be read back. So a fault is found by what it does. The trainer's FP32
forward pass tries on hypotheses: the weights that were sent, the ones before them, the sent ones with one tensor or
all experts left as they were, the sent ones cast to another dtype. The hypothesis that reproduces the engine names the
fault, and where it is one tensor, the tensor. Only compute rounding separates the engine from the right one.

How much rounding that is must not be read off the engine, which is what is judged: it is what the trainer's own forward
pass makes of the same weights in the engine's dtype. The first judgement is of the engine as it loaded the checkpoint
itself; then it gets weights so far from those that what stays behind shows in 16 bits, too, unless it is a single small
tensor. So a family that cannot be synced is refused before anything is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mismatch_probe.engines.base import RolloutEngine
from mismatch_probe.engines.logprobs import Batch
from mismatch_probe.errors import EngineError
from mismatch_probe.rl.policy import TORCH_DTYPES, Policy
from mismatch_probe.rl.stress import stressed
from mismatch_probe.types import Dtype

# In FP32 both sides compute the same function up to rounding, whose floor is about 1e-6 nats.
FP32_LIMIT = 1e-5
# Beyond that a gap is rounding up to so many times what the trainer's own forward pass rounds in the engine's dtype at
# these weights. vLLM's kernels round as much: medians of 71 pairs (9 tiny families, three dtypes, before and after
# syncs) lie between .67 and 1.29 times the trainer's, means over all tokens between .1 and 2.4 times.
ROUNDING_LIMIT = 5.0
# Of a sequence its mean difference over the tokens with the smallest is judged, this share of them. In a mixture of
# experts rounding sends 2 to 9 % of tokens to other experts, and so does the smallest change of a weight: these carry
# most of a mean over all. What is wrong with weights moves nearly every token. Of all sequences the median is judged,
# and a hypothesis has to explain this share of them: another expert for a sequence's first token moves all after it.
_TYPICAL = 0.75
# A hypothesis changes log-probs by δ. Where it holds, the engine's difference from the weights that were sent is δ and
# rounding, so that taking δ off leaves the rounding: of the difference at most this share may be left. Not by a test of
# correlation: 16-bit rounding errors are so far from independent that among a hundred tensors one correlates by many
# standard errors. So in 16 bits a tensor that is missing shows once its change outgrows rounding.
_LEFT = 0.5**0.5
# By chance a hypothesis explains that much where δ is of few tokens: one of 300 tensors in 5 to 8 % of scans at 10 to
# 15 effective tokens, (Σδ²)² / Σδ⁴, in none at 50. With fewer than so many no gap is accused that rounding explains.
_FEWEST_TOKENS = 30
# Relative noise on every weight in the trial before the first step. SmolLM2 moves by 1.1 nats, and in BF16 half of the
# tensors that were tried show one by one; with .5 it is chaos, where rounding alone is 6 nats.
_TRIAL_NOISE = 0.1
# Hypotheses of one tensor take a forward pass each, so they are tried in that trial, at every so many syncs after it
# against the weights that the engine had first, and wherever something is wrong.
SCAN_EVERY = 100
# Tensors of a model that is no toy: 545 forward passes of SmolLM2 took 3 minutes on 2 cores.
_MANY = 100
_DIFFER = "Run `mismatch-probe compare` on the checkpoint. check_sync = false skips this check."
_STOP = "Fix the transfer of weights to the engine before training on. Earlier checkpoints are kept."
Weights = Mapping[str, torch.Tensor]
Floats = NDArray[np.float64]
# A number for each token after the first, `[N]` of each sequence.
Probed = Sequence[Floats]


class SyncError(EngineError):
    """The engine does not have the weights that it was given."""


@dataclass(frozen=True)
class SyncFacts:
    """A sync that was accepted.

    Attributes:
        gap: Mean |d| at the fixed sequences, engine against the FP32 forward of the weights that were sent, nats;
            None where it was not checked.
    """

    gap: float | None


class WeightSync:
    """Hands weights to an engine and checks that they arrived.

    Args:
        engine: What gets them, by the names of a checkpoint.
        policy: For its forward pass. Its weights are still those of the checkpoint.
        dtype: The engine's.
        probes: Fixed sequences of at least 2 tokens, which do not begin alike.
        check: Whether to check; names are compared in any case.
        fresh: Whether the engine has the checkpoint's weights as it loaded them itself, and was not shown yet to take
            others: it is judged at once, and again with other weights, which it then has.
        scan_every: Syncs that change something from one trial of every hypothesis to the next.
        tell: Told before such a trial that takes its time.

    Raises:
        SyncError: The engine loaded the checkpoint wrong, or does not take new weights.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        policy: Policy,
        dtype: Dtype,
        probes: Sequence[Sequence[int]],
        *,
        check: bool,
        fresh: bool,
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
        self._first, self._changes = self._sent, 0
        if check and fresh:
            self._judge(self._sent, self._sent, "After loading the checkpoint", _DIFFER)
            self._try_others()

    def _try_others(self) -> None:
        """Whether weights arrive, asked with noise on each; tied ones stay equal."""
        noisy = stressed(self._policy.weights(), "weight-noise", _TRIAL_NOISE, seed=0, step=0)
        new = cast(noisy, self._dtype)
        if not np.isfinite(self._limit(new, self._logprobs(new))):
            self._tell("the weight sync was not tried in advance: with noise on the weights the model overflows")
            return
        self._load(new)
        when = "The engine does not load new weights of this model correctly: after a trial sync"
        self._judge(new, self._sent, when, "Use another model family or another --rollout-dtype.", scan=True)
        self._sent = new

    def send(self, weights: Weights) -> SyncFacts:
        """Gives the engine new weights.

        Raises:
            SyncError: A tensor is missing or too many, or the engine does not have what it was given.
        """
        self._compare_names(weights)
        new, old = cast(weights, self._dtype), self._sent
        self._load(new)
        gap = self._judge(new, old, "After a weight sync", _STOP) if self._check else None
        self._sent = new
        return SyncFacts(gap)

    def resend(self, weights: Weights) -> None:
        """Gives the engine weights without asking whether they arrived, e.g. after a fault was fixed."""
        self._sent = cast(weights, self._dtype)
        self._load(self._sent)

    def _load(self, weights: Weights) -> None:
        self._engine.load_weights(self._policy.as_saved(weights).items())

    def _compare_names(self, weights: Weights) -> None:
        differing = sorted(self._names ^ set(weights))
        if differing:
            verb = "have no" if differing[0] in self._names else "have the unknown"
            raise SyncError(
                f"The weights for the engine {verb} {differing[0]} ({len(differing)} names differ).",
                "Give the whole state_dict() with tied heads; named_parameters() omits them.",
            )

    def _judge(self, new: Weights, old: Weights, when: str, fix: str, *, scan: bool = False) -> float:
        """Stops on a gap that the dtype does not explain, or that a fault explains. Returns the gap.

        Args:
            new: What the engine should have.
            old: What it had before.
            when: Begins the sentence.
            fix: What can be done.
            scan: Try the hypotheses of one tensor in any case.
        """
        ours = self._logprobs(new)
        found = _less(self._engine_logprobs(), ours)
        gap, typical, limit = float(np.abs(np.concatenate(found)).mean()), _typical(found), self._limit(new, ours)
        suspicious = not typical <= limit  # NaN is suspicious
        changed = any(not torch.equal(new[name], old[name]) for name in new)
        self._changes += changed
        scan = scan or suspicious or (changed and self._changes % self._scan_every == 0)
        if scan and len(new) > _MANY:
            self._tell(f"checking the weight sync tensor by tensor, with up to {2 * len(new)} forward passes")
        best, clause = np.inf, ""
        for said, weights in self._hypotheses(new, old, scan) if changed or suspicious else ():
            delta = _less(self._logprobs(weights), ours)
            left = _left_over(found, delta, fewest_tokens=0 if suspicious else _FEWEST_TOKENS)
            if left is not None and left < best:
                best, clause = left, said
        if suspicious or clause:
            raise SyncError(
                f"{when} the engine's log-probs are {gap:.1e} nats from those of the weights that were sent "
                f"({typical:.1e} in the median sequence without its largest quarter; {self._explained(limit)}): "
                f"{clause or 'no single fault explains it'}.",
                fix,
            )
        return gap

    def _limit(self, weights: Weights, ours: Probed) -> float:
        """Typical difference that rounding explains, nats; infinite or NaN where the dtype overflows."""
        rounded = self._of_probes(self._policy.rounded_logprobs(self._batch, weights, self._dtype))
        return float(np.maximum(FP32_LIMIT, ROUNDING_LIMIT * _typical(_less(rounded, ours))))

    def _explained(self, limit: float) -> str:
        if np.isfinite(limit):
            return f"rounding explains up to {limit:.1e}"
        return f"the trainer's own forward pass overflows in {self._dtype}"

    def _hypotheses(self, new: Weights, old: Weights, scan: bool) -> Iterable[tuple[str, Weights]]:
        yield "it still has the weights of the previous sync (stale)", old
        # Up to the first sync both are the same: each hypothesis takes a forward pass, so none is tried twice.
        earlier = (old,) if old is self._first else (old, self._first)
        if len(earlier) > 1:
            yield "it still has the initial weights (stale)", self._first
        if not scan:
            return
        experts = [name for name in new if ".experts." in name]
        for before in earlier if experts else ():
            left_out = {name: before[name] for name in experts}
            yield "the weights of experts did not arrive (partial sync)", {**new, **left_out}
        for name in new:
            for before in earlier:
                if not torch.equal(new[name], before[name]):
                    yield f"{name} did not arrive (partial sync)", {**new, name: before[name]}
        for other in TORCH_DTYPES:
            if other != self._dtype:
                rounded = cast(cast(new, other), self._dtype)
                yield f"its weights were rounded to {other} on the way (wrong cast)", rounded

    def _engine_logprobs(self) -> Probed:
        return [np.asarray(row, np.float64) for row in self._engine.score(self._probes)]

    def _logprobs(self, weights: Weights) -> Probed:
        return self._of_probes(self._policy.clean_logprobs(self._batch, weights))

    def _of_probes(self, values: torch.Tensor) -> Probed:
        rows = values.double().cpu().numpy()
        return [row[kept] for row, kept in zip(rows, self._batch.mask.cpu().numpy(), strict=True)]


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


def _less(values: Probed, others: Probed) -> Probed:
    return [value - other for value, other in zip(values, others, strict=True)]


def _smallest(values: Floats) -> Floats:
    """The sizes that are judged of `[N]` values, ascending."""
    return np.sort(np.abs(values))[: max(1, round(_TYPICAL * len(values)))]


def _sizes(differences: Probed) -> Floats:
    """Mean size of each sequence's differences over the smallest; NaN where one is not finite."""
    return np.array([_smallest(one).mean() if np.isfinite(one).all() else np.nan for one in differences])


def _typical(differences: Probed) -> float:
    """The median of these; NaN where one is."""
    return float(np.median(_sizes(differences)))


def _left_over(difference: Probed, delta: Probed, fewest_tokens: int) -> float | None:
    """What is left of the engine's typical difference if a hypothesis holds; None where it explains too little, or too
    few sequences, or is of too few tokens.

    Args:
        difference: Log-probs of the engine less those of the weights that were sent.
        delta: Those of the hypothesis less those of the weights that were sent.
        fewest_tokens: Least (Σδ²)² / Σδ⁴.
    """
    if not any(one.any() for one in delta):
        return None
    left, squares = _sizes(_less(difference, delta)), _smallest(np.concatenate(delta)) ** 2
    judged = squares.sum() ** 2 >= fewest_tokens * (squares**2).sum()
    explained = np.mean(left <= _LEFT * _sizes(difference))
    return float(np.median(left)) if judged and explained >= _TYPICAL else None
