"""What marks an ESS of sequences: how often its interval covers, by the variance of D and by what makes Σ w².

    python validation/ess_marks.py

D is normal with E exp D = 1, of one variance or of variances that are lognormal between sequences (σ = 0.7, at most 3
times the mean), so that the true ESS, 1 / E exp(variance), is known. Prints coverage in per cent, `/5` where 5 % of the
replications have no interval, the median of the sequences that make the squared weights, and how many are marked.
"""

from __future__ import annotations

import click
import numpy as np

from mismatch_probe.metrics.intervals import evaluate, kish
from mismatch_probe.metrics.sample import Sequences, few_decide
from mismatch_probe.metrics.summary import sequence_metrics

KEYS = ("ess_seq", "chi2_seq", "ess_seq_gaussian")


def variances(rng: np.random.Generator, mean: float, n: int, unequal: bool) -> np.ndarray:
    """`[n]` variance of each D."""
    return np.minimum(mean * np.exp(rng.normal(0, 0.7, n) - 0.245), 3 * mean) if unequal else np.full(n, mean)


def row(mean: float, n: int, unequal: bool, replications: int) -> str:
    """One line of the table."""
    many = variances(np.random.default_rng(6), mean, 2_000_000, unequal)
    second = float(np.exp(many).mean())
    truths = {
        "ess_seq": 1 / second,
        "chi2_seq": second - 1,
        "ess_seq_gaussian": np.exp(-many.mean() - (many / 2).var()),
    }
    rng = np.random.default_rng((1, n))
    hits, given = dict.fromkeys(KEYS, 0), dict.fromkeys(KEYS, 0)
    sequences, marked = [], 0
    for replication in range(replications):
        v = variances(rng, mean, n, unequal)
        d = rng.normal(-v / 2, np.sqrt(v))
        sequences.append(kish(np.exp(2 * (d - d.max()))))
        marked += bool(few_decide(d))
        rows = Sequences(np.arange(n), n, d, np.full(n, 50.0), 0.0, d, d, False, d)
        estimates = {key: sequence_metrics()[key](rows) for key in KEYS}
        for key, value in evaluate(estimates, seed=replication, replicates=200).items():  # type: ignore[arg-type]
            if value.ci_low is not None and value.ci_high is not None:
                given[key] += 1
                hits[key] += value.ci_low <= truths[key] <= value.ci_high
    cells = [f"{100 * hits[k] / max(1, given[k]):.0f}/{100 * (1 - given[k] / replications):.0f}" for k in KEYS]
    return (
        f"{truths['ess_seq']:8.3f}"
        + "".join(f"{c:>17}" for c in cells)
        + (f"{np.median(sequences):11.1f}{100 * marked / replications:9.0f} %")
    )


@click.command()
@click.option("--replications", default=100, show_default=True)
@click.option("--prompts", default="64,256,1024,4096", show_default=True, help="One sequence each.")
def main(replications: int, prompts: str) -> None:
    """Print how the intervals of ESS and χ² cover."""
    print("variances   Var D  prompts     ESS" + "".join(f"{key:>17}" for key in KEYS) + "  sequences    marked")
    for unequal in (False, True):
        for mean in (0.05, 0.2, 0.5, 1.0, 2.0, 4.0):
            for n in map(int, prompts.split(",")):
                name = "lognormal" if unequal else "one"
                print(f"{name:<9}{mean:8.2f}{n:9}{row(mean, n, unequal, replications)}", flush=True)


if __name__ == "__main__":
    main()
