"""Calibration of the length prediction: fitted at a length L, compared with the truth at 1, 2, 4 and 8 times L.

With `--synthetic`, D follows laws whose ESS, shares, KL, spread and growth exponent are known; printed is how often the
band covers them, how often a sound law is withheld, and how often the ESS is marked as uncalibrated. With `--run`, the
sequences of a finished run are cut to short prefixes, and the bands are compared with what longer prefixes measure.

    python validation/length_calibration.py --synthetic
    python validation/length_calibration.py --run RUN
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from scipy import special

from mismatch_probe.metrics.accumulate import accumulate
from mismatch_probe.metrics.frame import pair_arrays
from mismatch_probe.metrics.length import fit_length
from mismatch_probe.metrics.length_prediction import predict
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.metrics.sums import Prefixes, PrefixSums
from mismatch_probe.probes.pairs import PassPair, why_missing
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.types import MetricValue, PairArrays

Floats = NDArray[np.float64]
FACTORS = (1, 2, 4, 8)
KEYS = ("ess_seq", "frac_seq_outside_2", "frac_seq_outside_3", "kl_seq")
SPREAD = "seq_log_ratio_std"
# Of the fitted length, over which the growth exponent is measured.
FRACTIONS = 0.5 ** np.arange(4)
# Prompts that have to reach a prefix for it to be fitted or measured.
MIN_PROMPTS = 16
# Sequences whose ESS is the truth where that of infinitely many is 0.
HEAVY_BATCH = 16_384
# Laplace increments: their share among the tokens, the rest being 0.
SPARSE = 0.1


@dataclass(frozen=True)
class Case:
    """A law of d: `draw(rng, S, L)` gives `[S, L]` log ratios, `variance(L)` Var D, `truth(L)` the values of KEYS."""

    draw: Callable[[np.random.Generator, int, int], Floats]
    variance: Callable[[float], float]
    truth: Callable[[float], dict[str, float]]
    samples: int = 1


def outside(k: float, mean: Floats, variance: Floats) -> float:
    std = np.sqrt(variance)
    return float(np.mean(special.ndtr((-np.log(k) - mean) / std) + special.ndtr((-np.log(k) + mean) / std)))


def normal_truth(variance: Floats | float) -> dict[str, float]:
    """KEYS of normal D with mean −½V, averaged over equally likely variances V."""
    v = np.atleast_1d(np.asarray(variance, dtype=np.float64))
    values = (1 / np.mean(np.exp(v)), outside(2, -v / 2, v), outside(3, -v / 2, v), float(v.mean() / 2))
    return dict(zip(KEYS, values, strict=True))


def gaussian(walk: float, lasting: float, length: int, *, trend: float = 1.0, moving: float = 0.0) -> Case:
    """Var D = walk·(L/length)^trend + lasting·(L/length)², by increments that a moving average may correlate."""

    def variance(n: float) -> float:
        correlated = 1.0 if moving == 0 else (1 + moving) ** 2 - 2 * moving / n
        return walk * correlated * (n / length) ** trend + lasting * (n / length) ** 2

    def draw(rng: np.random.Generator, s: int, n: int) -> Floats:
        total = np.append(0.0, walk * (np.arange(1, n + 1) / length) ** trend)
        noise = rng.normal(size=(s, n + 1)) * np.sqrt(np.diff(total))[np.r_[0, :n]]
        noise = noise[:, 1:] + moving * noise[:, :-1]
        rate = rng.normal(size=(s, 1)) * np.sqrt(lasting) / length
        drift = np.diff([0.0, *(variance(t) for t in range(1, n + 1))]) / 2
        return noise + rate - drift

    return Case(draw, variance, lambda n: normal_truth(variance(n)))


def sparse_laplace(v: float, length: int) -> Case:
    """A tenth of the tokens differ, by a Laplace law; closed forms but for the shares, which come from 10⁶ draws."""
    scale = np.sqrt(v / length / SPARSE / 2)
    shift = np.log1p(SPARSE * (1 / (1 - scale**2) - 1))
    second = np.log1p(SPARSE * (1 / (1 - 4 * scale**2) - 1)) - 2 * shift

    def draw(rng: np.random.Generator, s: int, n: int) -> Floats:
        return np.where(rng.random((s, n)) < SPARSE, rng.laplace(0, scale, (s, n)), 0.0) - shift

    def truth(n: float) -> dict[str, float]:
        rng = np.random.default_rng(0)
        hits = rng.binomial(int(n), SPARSE, 1_000_000)
        d = scale * (rng.standard_gamma(hits) - rng.standard_gamma(hits)) - shift * n
        shares = [float(np.mean(np.abs(d) > np.log(k))) for k in (2, 3)]
        return dict(zip(KEYS, (float(np.exp(-second * n)), *shares, float(shift * n)), strict=True))

    return Case(draw, lambda n: v * n / length, truth)


def varying_scale(v: float, length: int) -> Case:
    """A random walk whose variance is uniform in [0.3, 1.7] times v from prompt to prompt; two samples of each."""
    grid = np.linspace(0.3, 1.7, 2001)

    def draw(rng: np.random.Generator, s: int, n: int) -> Floats:
        variance = np.repeat(rng.uniform(0.3, 1.7, s // 2), 2)[:, None] * v / length
        return rng.normal(size=(s, n)) * np.sqrt(variance) - variance / 2

    def total(n: float) -> float:
        return v * n / length + 1.4**2 / 12 * (v * n / length / 2) ** 2

    return Case(draw, total, lambda n: normal_truth(grid * v * n / length), samples=2)


def lognormal_scale(v: float, s: float, length: int) -> Case:
    """A random walk whose noise has the scale exp(N(0, s²)) from prompt to prompt, with mean variance v.

    E exp(2D) is infinite: the ESS of ever more sequences falls to 0. The truth is the median ESS of batches of
    `HEAVY_BATCH` sequences; the other truths have closed forms or are means over 10⁵ quantiles of the scale.
    """
    quantile = special.ndtri((np.arange(100_000) + 0.5) / 100_000)

    def variance(z: Floats, n: float) -> Floats:
        return np.asarray(v * n / length * np.exp(2 * s * z - 2 * s**2))

    def draw(rng: np.random.Generator, count: int, n: int) -> Floats:
        each = variance(rng.normal(size=(count, 1)), n) / n
        return rng.normal(size=(count, n)) * np.sqrt(each) - each / 2

    def truth(n: float) -> dict[str, float]:
        rng = np.random.default_rng(0)
        batches = []
        for _ in range(40):
            total = variance(rng.normal(size=HEAVY_BATCH), n)
            w = np.exp(rng.normal(-total / 2, np.sqrt(total)))
            batches.append(w.mean() ** 2 / np.mean(w**2))
        total = variance(quantile, n)
        shares = [outside(k, -total / 2, total) for k in (2, 3)]
        return dict(zip(KEYS, (float(np.median(batches)), *shares, v * n / length / 2), strict=True))

    def total(n: float) -> float:
        return v * n / length + (v * n / length / 2) ** 2 * float(np.expm1(4 * s**2))

    return Case(draw, total, truth)


def cases(length: int, v: float) -> dict[str, Case]:
    return {
        "random walk": gaussian(v, 0.0, length),
        "heavy tails": sparse_laplace(v, length),
        "scale by prompt": varying_scale(v, length),
        "correlated (MA)": gaussian(v / 1.96, 0.0, length, moving=0.4),
        "trend L^1.3": gaussian(v, 0.0, length, trend=1.3),
        "persistent 90%": gaussian(0.1 * v, 0.9 * v, length),
        "mixture 50%": gaussian(0.5 * v, 0.5 * v, length),
        "mixture 15%": gaussian(0.85 * v, 0.15 * v, length),
        "lognormal scale, s 0.5": lognormal_scale(v, 0.5, length),
        "lognormal scale, s 1": lognormal_scale(v, 1.0, length),
    }


def as_pair(d: Floats, samples: int, tokens: NDArray[np.int64] | None = None) -> PairArrays:
    """Sequences of d `[S, L]`, or of the first `tokens` `[S]` of each."""
    s, n = d.shape
    kept = np.arange(n) < (np.full(s, n) if tokens is None else tokens)[:, None]
    sequence, position = np.nonzero(kept)
    return PairArrays(np.zeros(len(sequence)), d[kept], sequence, position, np.arange(s) // samples)


def with_ends(case: Case, rng: np.random.Generator, prompts: int, length: int) -> PairArrays:
    """Sequences of a few tokens more than the grid's `length`, a quarter of which end early, as responses do."""
    n = round(1.06 * length)
    d = case.draw(rng, prompts * case.samples, n)
    return as_pair(d, case.samples, np.where(rng.random(len(d)) < 0.75, n, rng.integers(1, n, len(d))))


def prefixes_of(pair: PairArrays) -> Prefixes:
    sums = PrefixSums()
    sums.update(pair)
    return sums.result()


def run_synthetic(length: int, prompts: int, repeats: int, seed: int, variance: float) -> None:
    """Of the bands that were made, the share that covers the truth; `held back`: fits without any or some predictions,
    of sequences that end in a law which does hold.

    `marked`: bands of the ESS at 2, 4 and 8 times the fitted length that say they are uncalibrated.
    """
    print(f"{prompts} prompts, fitted at {length} tokens, Var D there {variance}, {repeats} repetitions")
    print(
        f"coverage of nominal 95 %{'':9}γ   " + "".join(f"{f'{f}L':^32}" for f in FACTORS) + f"{'held back':^14}marked"
    )
    heads = "".join(f"{head:>6}" for head in ("ESS", "out2", "out3", "KL", "std"))
    print(f"{'':36}" + f"{heads}  " * len(FACTORS) + "    all  some    2L    4L    8L")
    totals: dict[int, list[float]] = {factor: [] for factor in FACTORS}
    for number, (name, case) in enumerate(cases(length, variance).items()):
        exponent = np.polyfit(np.log(FRACTIONS), np.log([case.variance(n * length) for n in FRACTIONS]), 1)[0]
        truths = {f: case.truth(f * length) | {SPREAD: case.variance(f * length) ** 0.5} for f in FACTORS}
        hits: dict[tuple[int, str], list[bool]] = {(f, key): [] for f in FACTORS for key in (*KEYS, SPREAD)}
        marked: dict[int, list[bool]] = {factor: [] for factor in FACTORS}
        gamma: list[bool] = []
        without_law = without_some = 0
        for repeat in range(repeats):
            rng = np.random.default_rng([seed, number, repeat])
            d = case.draw(rng, prompts * case.samples, length)
            fit = fit_length(prefixes_of(as_pair(d, case.samples)), seed=repeat)
            ending = fit_length(prefixes_of(with_ends(case, rng, prompts, length)), seed=repeat)
            without_law += not ending.predictable
            without_some += ending.predictable and bool(ending.contradicted)
            if fit.predictable:
                gamma.append(covers(fit.variance_exponent, exponent))
            for factor in FACTORS:
                found = predict(fit, factor * length).values
                made = {key: band for key, band in found.items() if band.value is not None}
                for key, band in made.items():
                    hits[factor, key].append(covers(band, truths[factor][key]))
                if "ess_seq" in made:
                    marked[factor].append("uncalibrated" in made["ess_seq"].why)
        cells = ""
        for factor in FACTORS:
            rates = [float(np.mean(hits[factor, key])) for key in (*KEYS, SPREAD)]
            totals[factor] += rates
            cells += "".join(f"{rate:6.2f}" for rate in rates) + "  "
        held = f"{without_law / repeats:7.3f}{without_some / repeats:6.3f}"
        marks = "".join(f"{np.mean(marked[factor]):6.2f}" for factor in FACTORS[1:])
        print(f"{name:<27}{np.mean(gamma):6.2f}   {cells}{held}{marks}", flush=True)
    print("all bands: " + ", ".join(f"{f}L {np.mean(totals[f]):.3f}" for f in FACTORS))


def covers(band: MetricValue, truth: float) -> bool:
    assert band.ci_low is not None
    assert band.ci_high is not None
    return band.ci_low <= truth <= band.ci_high


def measured(prefixes: Prefixes, column: int) -> dict[str, tuple[float, float, float]]:
    """KEYS of D(L) with their 95 % intervals, and `Σk3`, which on policy has the same expectation as `kl_seq`.

    To the metrics, every sequence is one token with the log ratio D, or with Σk3.
    """
    rows = ~np.isnan(prefixes.log_ratio[:, column])

    def metrics(values: Floats, k: float) -> dict[str, MetricValue]:
        pair = replace(as_pair(values[rows, column][:, None], 1), prompt=prefixes.prompt[rows])
        return compute_metrics(accumulate([pair], clip=(1 / k, k)))

    twice, thrice = metrics(prefixes.log_ratio, 2.0), metrics(prefixes.log_ratio, 3.0)
    k3 = metrics(prefixes.k3, 2.0)["mean_abs_logprob_diff"]
    found = (twice["ess_token"], twice["frac_outside_clip"], thrice["frac_outside_clip"], twice["kl_k1"], k3)
    return {key: (m.value, m.ci_low, m.ci_high) for key, m in zip((*KEYS, "Σk3"), found, strict=True)}


def run_real(path: Path) -> None:
    run = RunDirectory.open(path)
    rows: list[tuple[bool, bool]] = []
    passes = run.passes
    for both in (PassPair(rollout, trainer) for rollout in passes.rollouts for trainer in passes.trainers):
        names = str(both.rollout), str(both.trainer)
        if not both.diagonal or why_missing(run, both):
            continue
        prefixes = prefixes_of(pair_arrays(run, *names))
        print(" → ".join(names))
        print(f"{'L':>6}{'to':>6}{'n':>5}  {'':20}{'predicted band':<36}{'measured [95 %]':<36}in band  agrees")
        for length in (2**k for k in range(4, 21)):
            for factor in FACTORS:
                rows += compare_at(prefixes, length, factor)
    inside, agreeing = (sum(column) for column in zip(*rows, strict=True)) if rows else (0, 0)
    print(
        f"measured value in the band: {inside} of {len(rows)}; agrees within both intervals: {agreeing} of {len(rows)}"
    )


def compare_at(prefixes: Prefixes, length: int, factor: int) -> list[tuple[bool, bool]]:
    """Prints the bands fitted at `length` beside what is measured at `factor` times it.

    Returns:
        For each of them whether the value lies in the band, and whether it agrees within both intervals. An ESS of
        fewer than 10 sequences is shown and not counted: there its sample value is biased upwards.
    """
    column = int(np.searchsorted(prefixes.length, factor * length))
    if column >= len(prefixes.length) or prefixes.reached_by()[column] < MIN_PROMPTS:
        return []
    n = int(np.count_nonzero(~np.isnan(prefixes.log_ratio[:, column])))
    fit = fit_length(up_to(prefixes, length))
    bands = predict(fit, factor * length).values
    counted = []
    for key, (value, low, high) in measured(prefixes, column).items():
        band = bands["kl_seq" if key == "Σk3" else key]
        if band.value is None or value is None or low is None:
            why = band.why or "not measured with an interval"
            print(f"{fit.observed_length:>6}{factor * length:>6}{n:>5}  {key:<20}{why}")
            continue
        verdict = band.ci_low <= value <= band.ci_high, agrees(band, value, low, high)
        few = key == "ess_seq" and value * n < 10
        if not few:
            counted.append(verdict)
        predicted = f"{band.value:.3g} [{band.ci_low:.3g}, {band.ci_high:.3g}]"
        shown = "n·ESS below 10" if few else f"{verdict[0]!s:<9}{verdict[1]}"
        print(
            f"{fit.observed_length:>6}{factor * length:>6}{n:>5}  {key:<20}{predicted:<36}"
            f"{f'{value:.3g} [{low:.3g}, {high:.3g}]':<36}{shown}"
        )
    return counted


def agrees(band: MetricValue, value: float, low: float, high: float) -> bool:
    """Whether the 95 % interval of measured minus predicted holds 0 (Zou and Donner 2008)."""
    if value >= band.value:
        return value - band.value <= np.hypot(value - low, band.ci_high - band.value)
    return band.value - value <= np.hypot(high - value, band.value - band.ci_low)


def up_to(prefixes: Prefixes, length: int) -> Prefixes:
    """What a run that had stopped every sequence at `length` tokens would know."""
    width = int(np.searchsorted(prefixes.length, length, side="right"))
    sums = {name: getattr(prefixes, name)[:, :width] for name in ("log_ratio", "squares", "k3", "chi2")}
    cut = prefixes.n_tokens > length
    # Lengths of powers of 2 are on the grid.
    total = np.where(cut, prefixes.log_ratio[:, width - 1], prefixes.total)
    n_tokens = np.minimum(prefixes.n_tokens, length)
    return replace(prefixes, length=prefixes.length[:width], n_tokens=n_tokens, total=total, **sums)


@click.command()
@click.option("--synthetic", is_flag=True, help="Laws with known answers.")
@click.option("--run", "run", type=click.Path(exists=True, path_type=Path), help="A finished run directory.")
@click.option("--length", default=256, show_default=True, help="Fitted length of the synthetic laws, tokens.")
@click.option("--prompts", default=64, show_default=True)
@click.option("--variance", default=0.2, show_default=True, help="Var D at that length.")
@click.option("--repeats", default=100, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    synthetic: bool, run: Path | None, length: int, prompts: int, variance: float, repeats: int, seed: int
) -> None:
    if synthetic:
        run_synthetic(length, prompts, repeats, seed, variance)
    if run is not None:
        run_real(run)
    if not synthetic and run is None:
        raise click.UsageError("Give --synthetic, --run RUN, or both.")


if __name__ == "__main__":
    main()
