"""How often the 95 % intervals cover: every metric that has one, over synthetic pairs whose true metrics are known.

    python validation/coverage.py --replications 400 --prompts 8,16,32,64,256,1024,4096

Prints a table per generator of generators.py. A cell is the share of the intervals that hold the truth, in per cent,
`-` where no replication gave an interval; `/5` says that 5 % of replications gave none, and `*` that more than half of
the intervals were marked as uncalibrated. The entropy of a token is (1 − b) / 2 on both sides. Exact metrics come from
full rows of logits at 8 positions per prompt, `ess_weights` from one importance weight per sequence. At the end stand
the cells that are not marked and whose intervals miss the truth in more than 10 % of all replications.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import click
import numpy as np
from generators import GENERATORS

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.exact import ExactRows
from mismatch_probe.metrics.gradient import Weighted, gradient_metrics
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.types import DIVERGENCES, MetricValue, PairArrays

KEYS = tuple(key for key, info in CATALOG.items() if info.has_interval)
WEIGHTS = "ess_weights"
# The error of a truth is then 4 % of the standard error at 64 prompts, which moves the coverage by less than 0.1 %.
TRUTH_PROMPTS = 40_000
REPLICATES = 500
COMPARED = 8
# Prompts beyond which fewer replications are drawn, since each takes longer.
_MANY = 64


@dataclass(frozen=True)
class Cell:
    """What the replications of one metric gave.

    Attributes:
        covered: Share of the intervals that hold the truth; NaN where there is none.
        withheld: Share of the replications without an interval.
        marked: Share of the intervals that are marked as uncalibrated.
    """

    covered: float
    withheld: float
    marked: float

    @property
    def wrong(self) -> float:
        """Share of the replications whose interval misses the truth. What is withheld misses nothing: these are most
        often the widest ones, so that the rest covers a little less than all would.
        """
        return 0.0 if np.isnan(self.covered) else (1 - self.covered) * (1 - self.withheld)

    def __str__(self) -> str:
        if np.isnan(self.covered):
            return "-"
        withheld = f"/{100 * self.withheld:.0f}" if self.withheld >= 0.005 else ""
        return f"{100 * self.covered:.0f}{withheld}{'*' if self.marked > 0.5 else ''}"


def exact_rows(rng: np.random.Generator, pair: PairArrays) -> ExactRows:
    """Rows of `COMPARED` positions per prompt whose divergences follow the pair's own d²."""
    d = pair.trainer_logprob - pair.rollout_logprob
    prompt = pair.prompt[pair.sequence]
    n_prompts = len(pair.prompt_ids)
    tokens = np.bincount(prompt, minlength=n_prompts).astype(np.float64)
    start = np.cumsum(tokens) - tokens
    chosen = (start[:, None] + rng.random((n_prompts, COMPARED)) * tokens[:, None]).astype(np.int64).ravel()
    of = np.repeat(np.arange(n_prompts), COMPARED)
    square = d[chosen] ** 2
    values = dict.fromkeys(DIVERGENCES, 0.5 * square) | {
        "tv": np.minimum(1.0, 0.4 * np.abs(d[chosen])),
        "flip": (np.abs(d[chosen]) > 0.05) * 1.0,
        "entropy_rollout": -pair.rollout_logprob[chosen],
        "entropy_trainer": -pair.rollout_logprob[chosen],
    }
    sequences = np.bincount(pair.prompt, minlength=n_prompts).astype(np.float64)
    return ExactRows(values, np.ones(len(of)), np.repeat(tokens / COMPARED, COMPARED), of, tokens, sequences)


def measure(
    generator: str,
    rng: np.random.Generator,
    n_prompts: int,
    seed: int,
    replicates: int,
    keys: Collection[str] = (*KEYS, WEIGHTS),
) -> Mapping[str, MetricValue]:
    """Metrics of one drawn pair."""
    pair = GENERATORS[generator](rng, n_prompts)
    entropy = 0.5 * (1 - pair.rollout_logprob)
    pair = replace(pair, columns={"entropy": entropy, "rollout_entropy": entropy})
    rows = exact_rows(rng, pair) if any(key in CATALOG and CATALOG[key].level == "exact" for key in keys) else None
    found = compute_metrics(pair, rows, keys=keys, seed=seed, replicates=replicates)
    if WEIGHTS not in keys:
        return found
    d = pair.trainer_logprob - pair.rollout_logprob
    weights = np.exp(np.bincount(pair.sequence, weights=d))
    score = np.ones((len(weights), 1))
    weighted = Weighted(weights[:, None] * score, np.ones(len(weights)), weights - 1, (weights - 1) ** 2)
    gradient = gradient_metrics(weighted, score, score, pair.prompt, seed=seed, replicates=replicates)
    return {**found, WEIGHTS: gradient.ess_weights}


def truth(generator: str, n_prompts: int = TRUTH_PROMPTS) -> dict[str, float]:
    """Each metric of the generator's law."""
    values = measure(generator, np.random.default_rng(99), n_prompts, 0, 2)
    return {key: metric.value for key, metric in values.items() if metric.value is not None}


def coverage(job: tuple[str, int, Mapping[str, float]], replications: int, seed: int = 1) -> dict[str, Cell]:
    """What the intervals of each metric did whose truth is not 0.

    Args:
        job: Generator, prompts per replication, and the truths.
        replications: How many pairs are drawn.
        seed: Seed of the pairs.
    """
    generator, n_prompts, truths = job
    rng = np.random.default_rng((seed, n_prompts))
    keys = [key for key, value in truths.items() if value != 0]
    hits, given, marked = (dict.fromkeys(keys, 0) for _ in range(3))
    for replication in range(replications):
        values = measure(generator, rng, n_prompts, replication, REPLICATES, keys)
        for key in keys:
            got = values[key]
            if got.ci_low is not None and got.ci_high is not None:
                given[key] += 1
                hits[key] += got.ci_low <= truths[key] <= got.ci_high
                marked[key] += "uncalibrated" in got.why
    return {
        key: Cell(
            hits[key] / given[key] if given[key] else np.nan,
            1 - given[key] / replications,
            marked[key] / given[key] if given[key] else 0.0,
        )
        for key in keys
    }


@click.command()
@click.option("--replications", default=400, show_default=True, help="A quarter of them beyond 64 prompts.")
@click.option("--prompts", default="8,16,32,64,256,1024,4096", show_default=True, help="Prompts per pair.")
@click.option("--generators", default=",".join(GENERATORS), show_default=True)
@click.option("--processes", default=2, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(replications: int, prompts: str, generators: str, processes: int, seed: int) -> None:
    """Print the coverage of every metric's 95 % interval."""
    # The matrices are small, and the processes, which inherit this, share the cores.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    names, sizes = generators.split(","), [int(size) for size in prompts.split(",")]
    count = {size: replications if size <= _MANY else max(1, replications // 4) for size in sizes}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        truths = dict(zip(names, pool.map(truth, names), strict=True))
        running = {
            (name, size): pool.submit(
                partial(coverage, replications=count[size], seed=seed), (name, size, truths[name])
            )
            for name in names
            for size in sizes
        }
        cells = {job: future.result() for job, future in running.items()}
    print(f"coverage in per cent; replications: {', '.join(f'{count[size]} at {size} prompts' for size in sizes)}")
    for name in names:
        doc = (GENERATORS[name].__doc__ or "").split("\n")[0]
        print(f"\n{name}: {doc}\n{'prompts':<28}" + "".join(f"{size:>9}" for size in sizes))
        for key in cells[name, sizes[0]]:
            print(f"{key:<28}" + "".join(f"{cells[name, size][key]!s:>9}" for size in sizes))
    low = [
        f"{name}, {size} prompts, {key}: {cell}"
        for (name, size), row in cells.items()
        for key, cell in row.items()
        if cell.marked <= 0.5 and cell.wrong > 0.1
    ]
    print("\nnot marked, wrong in more than 10 %:", *(low or ["none"]), sep="\n  ")


if __name__ == "__main__":
    main()
