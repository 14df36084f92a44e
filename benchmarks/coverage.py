"""How often the 95 % intervals cover: every metric that has one, over synthetic pairs whose true metrics are known.

    python benchmarks/coverage.py --replications 400 --prompts 8,16,32,64

Prints a table per generator of generators.py: the share of replications whose interval holds the truth, in per cent.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import click
import numpy as np
from generators import GENERATORS

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.summary import compute_metrics

KEYS = tuple(key for key, info in CATALOG.items() if info.has_interval and info.level != "exact")
# The error of a truth is then 4 % of the standard error at 64 prompts, which moves the coverage by less than 0.1 %.
TRUTH_PROMPTS = 40_000
REPLICATES = 500


def truth(generator: str, n_prompts: int = TRUTH_PROMPTS) -> dict[str, float]:
    """Each metric of the generator's law."""
    pair = GENERATORS[generator](np.random.default_rng(99), n_prompts)
    values = compute_metrics(pair, keys=KEYS, replicates=2)
    return {key: metric.value for key, metric in values.items() if metric.value is not None}


def coverage(job: tuple[str, int, Mapping[str, float]], replications: int, seed: int = 1) -> dict[str, float]:
    """Share of replications whose interval covers.

    Args:
        job: Generator, prompts per replication, and the truths.
        replications: How many pairs are drawn.
        seed: Seed of the pairs.

    Returns:
        Share per metric whose truth is not 0; a replication without an interval counts as not covered.
    """
    generator, n_prompts, truths = job
    rng = np.random.default_rng((seed, n_prompts))
    keys = [key for key, value in truths.items() if value != 0]
    hits = dict.fromkeys(keys, 0)
    for replication in range(replications):
        pair = GENERATORS[generator](rng, n_prompts)
        for key, got in compute_metrics(pair, keys=keys, seed=replication, replicates=REPLICATES).items():
            if got.ci_low is not None and got.ci_high is not None:
                hits[key] += got.ci_low <= truths[key] <= got.ci_high
    return {key: count / replications for key, count in hits.items()}


@click.command()
@click.option("--replications", default=400, show_default=True)
@click.option("--prompts", default="8,16,32,64", show_default=True, help="Prompts per pair, comma-separated.")
@click.option("--generators", default=",".join(GENERATORS), show_default=True)
@click.option("--processes", default=2, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(replications: int, prompts: str, generators: str, processes: int, seed: int) -> None:
    """Print the coverage of every metric's 95 % interval."""
    # The matrices are small, and the processes, which inherit this, share the cores.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    names, sizes = generators.split(","), [int(size) for size in prompts.split(",")]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        truths = dict(zip(names, pool.map(truth, names), strict=True))
        jobs = [(name, size, truths[name]) for name in names for size in sizes]
        table = pool.map(partial(coverage, replications=replications, seed=seed), jobs)
        cells = {(name, size): cell for (name, size, _), cell in zip(jobs, table, strict=True)}
    error = 100 * (0.95 * 0.05 / replications) ** 0.5
    print(f"coverage in per cent, {replications} replications, Monte-Carlo standard error {error:.1f} at 95")
    for name in names:
        doc = (GENERATORS[name].__doc__ or "").split("\n")[0]
        print(f"\n{name}: {doc}\n{'prompts':<28}" + "".join(f"{size:>8}" for size in sizes))
        for key in cells[name, sizes[0]]:
            print(f"{key:<28}" + "".join(f"{100 * cells[name, size].get(key, np.nan):8.1f}" for size in sizes))


if __name__ == "__main__":
    main()
