"""The usable tokens of a few whole sequences, and what of a pair is left out because it cannot be a log-prob.

Frameworks write a number where they have no log-prob: −9999 (vLLM's floor), the least float of a dtype, 1, 0. As data
one of them outweighs a thousand tokens. Three bounds tell them from log-probs, each far from both sides:

- Above `LARGEST` there is none. In float32, x − log Σ exp comes out above 0 by the rounding of the logit x (half a unit
  at |x| = 512 is 3e-5) and of the sum (1e-5 in torch). A log-softmax in 16 bits leaves +.001 (FP16, |x| = 1) to +.125.
- Below `SMALLEST` there is none. A token drawn from the rollout has b < −100 in less than one of 1e30 tokens. The
  trainer's a can fall as low as its logits are apart, which is within 100 in a language model and within some hundreds
  in one that diverges. What is written where a logit is masked starts at −9999.
- 0 is a log-prob where p rounds to 1, and near-certain tokens have it on both sides. In float32 that takes
  1 − p < 6e-8, a logit 16 nats above all others together; the other side at `CONTRADICTED` has it 1.3 nats above. No
  rounding does that. A rollout that keeps a single token (top-p .8 and above) reports 0 where the trainer has −.22 or
  more, a log-softmax in BF16 up to −.25 at |x| = 128: both are faults to be measured and stay data. Placeholders
  between `CONTRADICTED` and 0 stay as well: they are near-certain tokens, whose |d| is small. Of 169 placeholders among
  5,163 tokens they are 31 and move mean |d| by 0.5 %; a bound of −.5 moves it by 3.6 %, and −.01 would remove what
  truncated sampling does.

A constant that a log-prob could have shows in runs only: `metrics.constants`. Tokens of weight version −1 were sampled
by no policy.

Shape legend: `N` tokens, `n` usable ones, `s` sequences that have any, `P` prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.column import run_sums
from mismatch_probe.metrics.constants import constant_runs
from mismatch_probe.metrics.intervals import Floats
from mismatch_probe.types import PairArrays

Side = Literal["rollout", "trainer"]
Kind = Literal["nonfinite", "sentinel", "positive", "constant", "unsampled"]

LARGEST = 1e-4
SMALLEST = -1000.0
CONTRADICTED = -0.25
# A side that is broken throughout has a value of its own at every token; the most frequent ones name a placeholder.
_NAMED_VALUES = 5
_POSITIVE, _BELOW = "> 0", f"< {SMALLEST:g}"
WEIGHT_VERSION = "weight_version"
"""Column of a pair: version of the weights that sampled each token, from 0."""
UNSAMPLED = -1
"""Weight version of a token that no policy sampled, such as the text of a tool."""
Ints = NDArray[np.int64]


def possible(logprobs: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """`[N]` which of one side's log-probs are finite and can be those of a token."""
    return np.asarray(np.isfinite(logprobs) & (logprobs <= LARGEST) & (logprobs >= SMALLEST))


def blamed(own: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]] | None) -> NDArray[np.bool_]:
    """`[N]` where a side's own value makes a token unusable; what cannot be a log-prob contradicts nothing.

    Args:
        own: `[N]` log-probs of the side, nats.
        other: `[N]` of the other side, None where it is not recorded: then nothing contradicts a 0.
    """
    odd = ~possible(own)
    return np.asarray(odd if other is None else odd | ((own == 0) & (other < CONTRADICTED) & (other >= SMALLEST)))


def constants(
    own: NDArray[np.floating[Any]],
    other: NDArray[np.floating[Any]] | None,
    sequence: Ints,
    position: Ints,
    own_blamed: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """`[N]` where a side's own value is that of a run of a constant, and not otherwise to blame.

    Args:
        own: `[N]` log-probs of the side, nats.
        other: `[N]` of the other side, None where it is not recorded.
        sequence: `[N]` index of each token's sequence, non-decreasing; all of its tokens that count are here.
        position: `[N]` index in the response.
        own_blamed: `[N]` as `blamed` says.
    """
    values, contradicted = own, None
    if own_blamed.any():
        contradicted = own_blamed & (own == 0)
        values = np.where(own_blamed & ~contradicted, np.nan, own)
    return constant_runs(values, sequence, position, other, contradicted) & ~own_blamed


@dataclass(frozen=True)
class Unusable:
    """Why tokens do not count; a token can have several reasons.

    Attributes:
        blamed: `[N]` by side, its value is not a log-prob, or a 0 that the other side contradicts.
        constant: `[N]` by side, its value is one of a run of a constant, and not otherwise to blame.
        unsampled: `[N]` no policy sampled it.
    """

    blamed: Mapping[Side, NDArray[np.bool_]]
    constant: Mapping[Side, NDArray[np.bool_]]
    unsampled: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        rollout_logprob: NDArray[np.floating[Any]] | None,
        trainer_logprob: NDArray[np.floating[Any]] | None,
        sequence: Ints | None,
        position: Ints | None,
        weight_version: NDArray[Any] | None = None,
    ) -> Unusable:
        """Of tokens of whole sequences, one side of which may be absent.

        Args:
            rollout_logprob: `[N]` b, nats.
            trainer_logprob: `[N]` a, nats.
            sequence: `[N]` index of each token's sequence; None where tokens have no neighbours.
            position: `[N]` index in the response, likewise.
            weight_version: `[N]`, None where it is not known.

        Raises:
            ValueError: There is nothing to say how many tokens there are.
        """
        sides: dict[Side, tuple[NDArray[np.floating[Any]] | None, NDArray[np.floating[Any]] | None]]
        sides = {"rollout": (rollout_logprob, trainer_logprob), "trainer": (trainer_logprob, rollout_logprob)}
        found: dict[Side, NDArray[np.bool_]] = {}
        runs: dict[Side, NDArray[np.bool_]] = {}
        for side, (own, other) in sides.items():
            if own is not None:
                found[side] = blamed(own, other)
                if sequence is not None and position is not None:
                    runs[side] = constants(own, other, sequence, position, found[side])
        some = next((part for part in (rollout_logprob, trainer_logprob, sequence) if part is not None), None)
        if some is None:
            raise ValueError("tokens have log-probs or a sequence")
        nothing = np.zeros(len(some), np.bool_)
        return cls(found, runs, nothing if weight_version is None else np.asarray(weight_version == UNSAMPLED))

    @property
    def any(self) -> NDArray[np.bool_]:
        """`[N]` which tokens do not count."""
        return np.asarray(np.logical_or.reduce([*self.blamed.values(), *self.constant.values(), self.unsampled]))


def usable(
    rollout_logprob: NDArray[np.floating[Any]],
    trainer_logprob: NDArray[np.floating[Any]],
    sequence: Ints | None = None,
    position: Ints | None = None,
    weight_version: NDArray[Any] | None = None,
) -> NDArray[np.bool_]:
    """`[N]` which tokens were sampled and have log-probs on both sides; the arguments are those of `Unusable.of`."""
    return ~Unusable.of(rollout_logprob, trainer_logprob, sequence, position, weight_version).any


@dataclass(frozen=True)
class ExcludedValue:
    """Tokens that are left out because of one side's value.

    Attributes:
        side: Whose value.
        kind: `"nonfinite"`; `"sentinel"` for a number written where there was no log-prob; `"positive"`; `"constant"`
            for a possible value in a run of a constant; `"unsampled"` where no policy sampled the token.
        value: The value as text: `"nan"`, `"inf"`, `"-inf"`, `"-9999"`, `"1"`, `"0"`; `"> 0"` of the positive
            ones, `"< -1000"` of the lowest and `"< 0"` of the constants where there are more than a few values;
            `"weight_version -1"` of unsampled tokens.
        n: Tokens. One that is unusable on both sides is in a row of either.
    """

    side: Side
    kind: Kind
    value: str
    n: int


class Exclusions:
    """What of a pair is left out of every metric; fed chunk by chunk.

    Attributes:
        n_tokens: Tokens left out.
        n_nonfinite: Of those, tokens that are NaN or ±inf on either side.
        abs_log_ratio: Σ |d| of the others, nats.
    """

    def __init__(self) -> None:
        self.n_tokens = self.n_nonfinite = 0
        self.abs_log_ratio = 0.0
        self._values: dict[Side, list[NDArray[np.float64]]] = {"rollout": [], "trainer": []}
        self._constants: dict[Side, list[NDArray[np.float64]]] = {"rollout": [], "trainer": []}
        self._n_unsampled = 0

    def update(self, pair: PairArrays, kept: NDArray[np.bool_]) -> None:
        """Takes in the tokens of a chunk that are not in `kept` `[N]`."""
        if kept.all():
            return
        b, a = pair.rollout_logprob[~kept], pair.trainer_logprob[~kept]
        finite = np.isfinite(b) & np.isfinite(a)
        self.n_tokens += len(b)
        self.n_nonfinite += int((~finite).sum())
        self.abs_log_ratio += float(np.abs(a[finite] - b[finite]).sum())
        why = unusable_rows(pair)
        sides: dict[Side, NDArray[np.float64]] = {"rollout": pair.rollout_logprob, "trainer": pair.trainer_logprob}
        for side, values in sides.items():
            self._values[side].append(values[why.blamed[side] & ~kept])
            self._constants[side].append(values[why.constant[side] & ~kept])
        self._n_unsampled += int((why.unsampled & ~kept).sum())

    def rows(self) -> list[ExcludedValue]:
        """By side and value, the most frequent first, then constants, then unsampled tokens."""
        found = [row for side, parts in self._values.items() if parts for row in _rows(side, np.concatenate(parts))]
        for side, parts in self._constants.items():
            found += _constant_rows(side, np.concatenate(parts)) if parts else []
        if self._n_unsampled:
            found.append(ExcludedValue("rollout", "unsampled", f"{WEIGHT_VERSION} {UNSAMPLED}", self._n_unsampled))
        return found


def _rows(side: Side, values: NDArray[np.float64]) -> Iterable[ExcludedValue]:
    """The rows of one side's values `[n]`."""
    broken = ~np.isfinite(values)
    positive = ~broken & (values > LARGEST) & (values != 1)
    named = ~broken & ~positive
    # Adding 0 makes −0 a 0. 0 and 1 are named whatever else there is.
    counts = dict(zip(*np.unique(values[named] + 0.0, return_counts=True), strict=True))
    listed = sorted(counts, key=lambda value: (value < SMALLEST, -counts[value], value))[:_NAMED_VALUES]
    found = [ExcludedValue(side, "sentinel", f"{value:.9g}", int(counts[value])) for value in listed]
    found += [
        ExcludedValue(side, "nonfinite", text, int(n))
        for text, n in zip(*np.unique(values[broken].astype(str), return_counts=True), strict=True)
    ]
    rest = int(named.sum()) - sum(row.n for row in found if row.kind == "sentinel")
    found += [ExcludedValue(side, "positive", _POSITIVE, n) for n in [int(positive.sum())] if n]
    found += [ExcludedValue(side, "sentinel", _BELOW, n) for n in [rest] if n]
    return sorted(found, key=lambda row: -row.n)


def _constant_rows(side: Side, values: NDArray[np.float64]) -> list[ExcludedValue]:
    """The rows of one side's constants `[n]`."""
    counted = zip(*np.unique(values, return_counts=True), strict=True)
    ordered = sorted(counted, key=lambda row: (-row[1], row[0]))
    found = [ExcludedValue(side, "constant", f"{value:.9g}", int(n)) for value, n in ordered[:_NAMED_VALUES]]
    rest = sum(int(n) for _, n in ordered[_NAMED_VALUES:])
    return [*found, *([ExcludedValue(side, "constant", "< 0", rest)] if rest else [])]


def group_sums(group: Ints, values: NDArray[Any], n_groups: int) -> Floats:
    """`[n_groups]` float64 sums of `values` `[n]` by `group` `[n]`."""
    return np.bincount(group, weights=values, minlength=n_groups).astype(np.float64, copy=False)


@dataclass(frozen=True)
class SequenceRows:
    """The sequences of a chunk that have tokens.

    Attributes:
        sequence: `[s]` index in the pair, increasing.
        start: `[s]` the sequence's first row in the chunk.
        length: `[s]` tokens, unusable ones included.
        n_usable: `[s]` usable tokens.
    """

    sequence: Ints
    start: Ints
    length: Ints
    n_usable: Ints


def sequence_rows(pair: PairArrays, usable: NDArray[np.bool_]) -> SequenceRows:
    """The sequences of `pair`, of whose tokens `[N]` those count that `usable` `[N]` says."""
    start = np.flatnonzero(np.diff(pair.sequence, prepend=-1))
    length = np.diff(start, append=len(pair.sequence))
    whole = len(start) == 0 or bool(usable.all())
    n_usable = length if whole else np.add.reduceat(usable, start, dtype=np.int64)
    return SequenceRows(pair.sequence[start], start, length, n_usable)


def usable_rows(pair: PairArrays) -> NDArray[np.bool_]:
    """`[N]` whether a token counts: as the pair says, or else where it is finite on both sides."""
    if pair.usable is not None:
        return pair.usable
    return np.asarray(np.isfinite(pair.rollout_logprob) & np.isfinite(pair.trainer_logprob))


def unusable_rows(pair: PairArrays) -> Unusable:
    """Why tokens of a pair `[N]` do not count."""
    version = pair.columns.get(WEIGHT_VERSION)
    return Unusable.of(pair.rollout_logprob, pair.trainer_logprob, pair.sequence, pair.position, version)


@dataclass(frozen=True)
class TokenChunk:
    """Usable tokens, those of a sequence next to each other.

    Attributes:
        rollout_logprob: `[n]` b, nats.
        trainer_logprob: `[n]` a, nats.
        position: `[n]`
        columns: Further properties, `[n]` each.
        start: `[s]` first token of each sequence.
        prompt: `[s]` prompt of each sequence.
        n_prompts: P of the pair.
    """

    rollout_logprob: Floats
    trainer_logprob: Floats
    position: Ints
    columns: Mapping[str, NDArray[Any]]
    start: Ints
    prompt: Ints
    n_prompts: int

    @classmethod
    def of(cls, pair: PairArrays, rows: SequenceRows, usable: NDArray[np.bool_], n_prompts: int) -> TokenChunk:
        keep = slice(None) if usable.all() else usable
        some = rows.n_usable > 0
        counts = rows.n_usable[some]
        return cls(
            rollout_logprob=np.asarray(pair.rollout_logprob[keep], dtype=np.float64),
            trainer_logprob=np.asarray(pair.trainer_logprob[keep], dtype=np.float64),
            position=pair.position[keep],
            columns={name: values[keep] for name, values in pair.columns.items()},
            start=np.cumsum(counts) - counts,
            prompt=pair.prompt[rows.sequence[some]],
            n_prompts=n_prompts,
        )

    def __len__(self) -> int:
        return len(self.rollout_logprob)

    def per_sequence(self, values: NDArray[Any]) -> Floats:
        """`[s]` sums of `values` `[n]`."""
        return run_sums(values, self.start)

    def per_prompt(self, values: NDArray[Any]) -> Floats:
        """`[P]` sums of `values` `[n]`."""
        return group_sums(self.prompt, self.per_sequence(values), self.n_prompts)

    @cached_property
    def counts(self) -> Floats:
        """`[P]` tokens of each prompt."""
        lengths = np.diff(self.start, append=len(self))
        return group_sums(self.prompt, lengths, self.n_prompts)

    @cached_property
    def own_prompts(self) -> tuple[Ints, Ints]:
        """The prompts of these tokens, few of many, increasing, and `[n]` which of them each token has."""
        prompts, of_sequence = np.unique(self.prompt, return_inverse=True)
        return prompts, np.repeat(of_sequence, np.diff(self.start, append=len(self)))

    @cached_property
    def log_ratio(self) -> Floats:
        """`[n]` d = a − b."""
        return self.trainer_logprob - self.rollout_logprob

    @cached_property
    def abs_log_ratio(self) -> Floats:
        return np.abs(self.log_ratio)

    @cached_property
    def squared_log_ratio(self) -> Floats:
        return self.log_ratio**2

    def ratio_excess(self, shift: float) -> Floats:
        """`[n]` (ρ − 1)·exp(−`shift`); kept where `shift` is 0, which it nearly always is."""
        return self._ratio_excess if shift == 0.0 else scales.shifted_expm1(self.log_ratio, shift)

    @cached_property
    def _ratio_excess(self) -> Floats:
        return scales.shifted_expm1(self.log_ratio, 0.0)

    def k3(self, shift: float) -> Floats:
        """`[n]` (expm1(d) − d)·exp(−`shift`); kept where `shift` is 0."""
        return self.k3_values if shift == 0.0 else scales.shifted_k3(self.log_ratio, shift)

    @cached_property
    def k3_values(self) -> Floats:
        """`[n]` expm1(d) − d, infinite where that overflows."""
        with np.errstate(over="ignore"):
            return scales.k3(self.log_ratio)

    @cached_property
    def rollout_prob(self) -> Floats:
        return np.exp(self.rollout_logprob)

    @cached_property
    def trainer_prob(self) -> Floats:
        return np.exp(self.trainer_logprob)

    @cached_property
    def prob_diff(self) -> Floats:
        """`[n]` e^a − e^b, from the larger side and expm1, so that it keeps its digits when a is close to b."""
        larger = np.maximum(self.trainer_prob, self.rollout_prob)
        return np.asarray(-np.sign(self.log_ratio) * larger * np.expm1(-self.abs_log_ratio))
