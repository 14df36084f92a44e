"""False alarms of E[ρ] = 1 and of the audit on sound runs, and what both find of a trainer that is off on every token.

    python validation/false_alarms.py                       # a table by size of the run
    python validation/false_alarms.py --shift               # how far rounding alone moves the mean of a bin

A sound run has nine pairs, as `compare` has by default: three rollout dtypes that sample their own tokens, each scored
by three trainer dtypes. Logits are one law's plus errors of each side (BF16 8 times FP16); softmax makes d grow with
uncertainty. A share of the positions is near certain, and errors are on both sides or the rollout's alone. The mean
importance ratio of every such pair is exactly 1, and up to a noise of .04 no limit of the default profile that fails a
pair is exceeded. A fault multiplies every probability of the BF16 trainer by .85 or .99, as a vocabulary does of which
a part is never sampled; the other pairs stay sound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy import special

from mismatch_probe.metrics.accumulate import PairSums
from mismatch_probe.metrics.ratio_test import adjusted_together, ratio_tests
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.metrics.sums import PROBABILITY_EDGES
from mismatch_probe.passes import PassId
from mismatch_probe.probes.audit.checks import Checks
from mismatch_probe.probes.audit.judge import verdict_of
from mismatch_probe.probes.audit.profile import load_profile
from mismatch_probe.probes.pairs import PassPair, pair_of
from mismatch_probe.results.comparison import Pair
from mismatch_probe.results.ranges import Range
from mismatch_probe.types import PairArrays

Floats = NDArray[np.float32]
Pass = tuple[str, str]
# Standard deviation of the errors of a logit over BF16's: each has 3 bits more than the one before, FP32 13 more.
NOISE = {"bfloat16": 1.0, "float16": 2.0**-3, "float32": 2.0**-16}
FAULTS = {"15 %": 0.85, "1 %": 0.99}
BF16 = ("bfloat16", "bfloat16")
NEAR = (0.0, 0.5, 0.8)
_CHUNK = 50_000
# Tokens, prompts, and runs per kind of policy.
SIZES = (
    (5_000, 16, 30),
    (5_000, 64, 30),
    (26_000, 64, 30),
    (102_000, 256, 12),
    (512_000, 512, 3),
    (1_000_000, 512, 2),
    (1_000_000, 4096, 1),
)


def base_logits(
    rng: np.random.Generator, n: int, near: float, *, margin: float = 6.0, spread: float = 2.0, vocabulary: int = 16
) -> Floats:
    """`[n, vocabulary]` logits of the law that both sides err about: normal with deviation `spread`, but that one token
    of a share `near` of the positions leads by about `margin`."""
    logits = rng.standard_normal((n, vocabulary), np.float32) * np.float32(spread)
    certain = rng.random(n) < near
    logits[certain, 0] = logits[certain].max(axis=1) + rng.normal(margin, 1.5, int(certain.sum()))
    return logits


def erring(rng: np.random.Generator, logits: Floats, scale: Floats) -> Floats:
    """Log-probs of one side, whose logits are off by normal errors of standard deviation `scale` `[n, 1]`."""
    own = logits + scale * rng.standard_normal(logits.shape, np.float32)
    own -= own.max(axis=1, keepdims=True)
    return np.asarray(own - np.log(np.exp(own).sum(axis=1, keepdims=True)))


def chunks(
    rng: np.random.Generator, lengths: NDArray[np.int64], near: float, one_side: bool, noise: float
) -> Iterator[dict[Pass, PairArrays]]:
    """Tokens of the nine pairs, a few sequences at a time; a sequence a prompt, of which some are noisier."""
    ids = tuple(map(str, range(len(lengths))))
    scale_of = noise * np.exp(0.5 * rng.standard_normal(len(lengths)))
    first = 0
    while first < len(lengths):
        fits = int(np.searchsorted(lengths[first:].cumsum(), _CHUNK, side="right"))
        rows = np.arange(first, min(len(lengths), first + max(1, fits)))
        first = int(rows[-1]) + 1
        n = int(lengths[rows].sum())
        sequence = np.repeat(rows, lengths[rows])
        position = np.arange(n) - np.repeat(lengths[rows].cumsum() - lengths[rows], lengths[rows])
        scale = scale_of[sequence][:, None].astype(np.float32)
        found: dict[Pass, PairArrays] = {}
        for rollout, bits in NOISE.items():
            logits = base_logits(rng, n, near)
            b = erring(rng, logits, scale * np.float32(bits))
            p = np.exp(b).cumsum(axis=1)
            token = (p < rng.random((n, 1)) * p[:, -1:]).sum(axis=1)
            for trainer, other in NOISE.items():
                own = np.float32(0 if one_side else other)
                a = erring(rng, logits, scale * own)
                sides = (side[np.arange(n), token].astype(np.float64) for side in (b, a))
                found[rollout, trainer] = PairArrays(*sides, sequence, position, np.arange(len(ids)), ids)
        yield found


def lengths_of(rng: np.random.Generator, n_tokens: int, n_prompts: int) -> NDArray[np.int64]:
    """Lengths that differ, with the sum of about `n_tokens`."""
    share = rng.uniform(0.4, 1.6, n_prompts)
    return np.maximum(1, (share / share.sum() * n_tokens).round()).astype(np.int64)


def shifted(pair: PairArrays, kept: float) -> PairArrays:
    """The pair with every trainer probability times `kept`."""
    return PairArrays(
        pair.rollout_logprob,
        pair.trainer_logprob + np.log(kept),
        pair.sequence,
        pair.position,
        pair.prompt,
        pair.prompt_ids,
    )


def sums_of(
    rng: np.random.Generator, n_tokens: int, n_prompts: int, near: float, one_side: bool, noise: float
) -> tuple[dict[Pass, PairSums], dict[str, PairSums]]:
    """Sums of the nine sound pairs, and of the BF16 pair under each fault."""
    sound: dict[Pass, PairSums] = {}
    faulty: dict[str, PairSums] = {}
    for found in chunks(rng, lengths_of(rng, n_tokens, n_prompts), near, one_side, noise):
        sound = sound or {name: PairSums(pair) for name, pair in found.items()}
        faulty = faulty or {name: PairSums(found[BF16]) for name in FAULTS}
        for name, pair in found.items():
            sound[name].update(pair)
        for fault, kept in FAULTS.items():
            faulty[fault].update(shifted(found[BF16], kept))
    return sound, faulty


class Judge:
    """Runs the ratio tests and the audit's checks over the pairs of a run.

    Args:
        seed, replicates: Of the bootstrap.
    """

    def __init__(self, seed: int, replicates: int) -> None:
        self._options = {"seed": seed, "replicates": replicates}
        self._profile = load_profile("default")
        self._keys = [name for name in self._profile.checks if not name.startswith("fp16")]
        self._keys += ["confident_disagreement_count", "mean_ratio", "mean_abs_logprob_diff", "kl_exact"]

    def result(self, name: Pass, sums: PairSums) -> Pair:
        """A pair, whose tests are not adjusted yet over the others."""
        both = PassPair(PassId.rollout("vllm", name[0]), PassId.trainer("hf", name[1]))
        pair = pair_of(both, sums, compute_metrics(sums, keys=self._keys, **self._options))
        return pair.model_copy(update={"ratio_tests": tuple(ratio_tests(sums, **self._options))})

    def run(self, results: list[Pair]) -> tuple[bool, bool, str]:
        """Whether any pair shows a violation, whether the audit fails any, and its verdict on one-sidedness of BF16."""
        tests = adjusted_together([result.ratio_tests for result in results])
        pairs = tuple(
            result.model_copy(update={"ratio_tests": tuple(own)}) for result, own in zip(results, tests, strict=True)
        )
        checks = Checks(self._profile, pairs, {}, Range(), (), 0)
        judged = {(pair.rollout_dtype, pair.trainer_dtype): checks.of_pair(pair) for pair in pairs}
        violated = any(test.verdict == "violated" for own in tests for test in own)
        failed = any(verdict_of(found) == "fail" for found in judged.values())
        return violated, failed, next(check.verdict for check in judged[BF16] if check.name == "one_sided")


def measured(
    size: tuple[int, int, int], near: float, one_side: bool, noise: float, seed: int, replicates: int
) -> Counter[str]:
    """Counts over the runs of one kind."""
    n_tokens, n_prompts, runs = size
    counts: Counter[str] = Counter(runs=runs)
    for run in range(runs):
        rng = np.random.default_rng((seed, n_tokens, n_prompts, int(10 * near), one_side, run))
        judge = Judge(run, replicates)
        sound, faulty = sums_of(rng, n_tokens, n_prompts, near, one_side, noise)
        results = {name: judge.result(name, sums) for name, sums in sound.items()}
        violated, failed, verdict = judge.run(list(results.values()))
        counts.update(violated=violated, failed=failed, ok=verdict == "ok")
        for fault, sums in faulty.items():
            off = {**results, BF16: judge.result(BF16, sums)}
            verdict = judge.run(list(off.values()))[2]
            counts.update({f"found {fault}": verdict == "fail", f"ok {fault}": verdict == "ok"})
    return counts


def shift(near: float, one_side: bool, seed: int, n: int = 400_000, **law: Any) -> list[float]:
    """How far errors alone move the mean ratio of the bin that they move most: over the mean d² of all tokens, over the
    larger of that and the bin's own, and over the largest of a bin.

    Without the error of sampling: every token counts, of the laws of `n` positions.
    """
    rng = np.random.default_rng(seed)
    sums = np.zeros((3, len(PROBABILITY_EDGES) - 1))
    for _ in range(max(1, n // _CHUNK)):
        logits = base_logits(rng, _CHUNK, near, **law)
        scale = np.full((_CHUNK, 1), 0.1, np.float32)
        b, a = erring(rng, logits, scale), erring(rng, logits, scale * np.float32(not one_side))
        mu, pi = np.exp(b.astype(np.float64)).ravel(), np.exp(a.astype(np.float64)).ravel()
        bins = np.clip(np.searchsorted(PROBABILITY_EDGES, mu, side="right") - 1, 0, sums.shape[1] - 1)
        for row, column in zip(sums, (mu, pi - mu, mu * (a - b).ravel() ** 2), strict=True):
            row += np.bincount(bins, column, sums.shape[1])
    mass, moved, squares = sums
    seen = mass > 1e-4 * mass.sum()
    ratio, own = np.abs(moved[seen] / mass[seen]), squares[seen] / mass[seen]
    every = squares.sum() / mass.sum()
    return [float(x.max()) for x in (ratio / every, ratio / np.maximum(every, own), ratio / own.max())]


def _share(k: int, n: int) -> str:
    """`k/n`, and the upper 95 % limit of the share."""
    return f"{k}/{n} (≤ {100 * float(special.betaincinv(k + 1, n - k, 0.975)) if k < n else 100:.0f} %)"


@click.command()
@click.option("--scale", default=1.0, show_default=True, help="Multiplies the number of runs of every kind.")
@click.option("--replicates", default=200, show_default=True, help="Of the bootstrap; `compare` takes 1,000.")
@click.option("--noise", default=0.03, show_default=True, help="Standard deviation of BF16's errors of a logit.")
@click.option("--seed", default=1, show_default=True)
@click.option("--shift", "shifts", is_flag=True, help="Shows how far rounding moves bins of probability.")
def main(scale: float, replicates: int, noise: float, seed: int, shifts: bool) -> None:
    """False alarms and power, pooled over shares of near-certain tokens (0, .5, .8) and errors of both sides or one."""
    if shifts:
        print("near certain, law | errors | largest shift over mean d² of all | of all or the bin | of any bin")
        laws: list[dict[str, Any]] = [{}, {"margin": 4.0}, {"margin": 8.0}, {"spread": 1.0}, {"spread": 4.0}]
        laws += [{"vocabulary": 64, "spread": spread} for spread in (0.5, 1.0, 2.0)]
        for near, one_side, law in product((*NEAR, 0.95), (False, True), laws):
            cells = " | ".join(f"{x:.2f}" for x in shift(near, one_side, seed, **law))
            print(f"{near:.2f} {law or ''} | {'one side' if one_side else 'both sides'} | {cells}", flush=True)
        return
    print("tokens | prompts | violated anywhere | audit fails any pair | BF16 ok | found, falsely ok: 15 % | 1 %")
    for n_tokens, n_prompts, runs in SIZES:
        counts: Counter[str] = Counter()
        for near, one_side in product(NEAR, (False, True)):
            size = (n_tokens, n_prompts, max(1, round(runs * scale)))
            counts += measured(size, near, one_side, noise, seed, replicates)
        n = counts["runs"]
        cells = [_share(counts[key], n) for key in ("violated", "failed")]
        cells += [f"{counts['ok']}/{n}"]
        cells += [f"{counts[f'found {fault}']}/{n}, {counts[f'ok {fault}']}/{n}" for fault in FAULTS]
        print(f"{n_tokens:,} | {n_prompts:,} | {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
