"""How the mismatch falls with every mantissa bit: an FP32 model whose trainer keeps k of its weights' bits.

vLLM samples once in FP32. The trainer scores those tokens in FP32 with its weights rounded to k = 1 … 10 stored
mantissa bits, with unrounded ones (the floor), and with the whole forward in BF16 (7 bits) and FP16 (10 bits). A bit
less doubles a rounding error, so log2 of mean |d| should fall by 1 per bit and log2 of k3, a square, by 2: three bits
from BF16 to FP16 make 2^3 and 2^6 (Qi et al., arXiv 2510.26788). All intervals are 95 % over prompts.

A checkpoint of 16 bits has no bits below its own to round off. It is filled first: every weight moves to a random point
of the interval that its format would round back to it, as if the FP32 master weights had been kept.

    python validation/mantissa_bits.py --out results
    python validation/mantissa_bits.py --model path/to/checkpoint --num-prompts 32 --out results
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from scipy import stats

from mismatch_probe.metrics.intervals import Estimate, evaluate
from mismatch_probe.metrics.paired import paired_ratio
from mismatch_probe.metrics.sample import usable_tokens
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.report.figures.style import DPI, look, plot_settings
from mismatch_probe.types import MetricValue, PairArrays, Rollout, RolloutRequest, Sampling, ScoreRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BITS = tuple(range(1, 11))
# From here on a rounded model is a slightly wrong one; with fewer bits it is another model, and |d| saturates.
SMALL_FROM = 4
FORMATS = {"bfloat16": 7, "float16": 10}
# Name, label, symbol, and by how much log2 should change per bit.
METRICS = (("mean_abs_logprob_diff", "mean |d| (nats)", "mean |d|", -1), ("kl_k3", "k3 (nats)", "k3", -2))


@dataclass(frozen=True)
class Fit:
    """log2 metric = intercept + slope · bits, least squares.

    Attributes:
        first: Fewest bits that it was fitted to.
        slope: With its interval over prompts, which takes the rounded weights as given.
        intercept: At 0 bits.
        scatter: Half the width of the usual 95 % interval of a regression, which rests on how the points lie about the
            line and so holds what is accidental in how one set of weights happens to round at each k.
    """

    first: int
    slope: MetricValue
    intercept: float
    scatter: float


def filled(values: Any, bits: int, generator: Any) -> Any:
    """FP32 weights of which a format of so many mantissa bits keeps `values`, uniformly at random."""
    import torch

    exponent = torch.frexp(values)[1]
    # A number in [2^(e−1), 2^e) stands for what lies within 2^(e−1)·2^−bits / 2 of it.
    half = torch.ldexp(torch.ones_like(values), exponent - 2 - bits)
    return torch.where(values == 0, values, values + (2 * torch.rand(values.shape, generator=generator) - 1) * half)


def save_changed(source: Path, folder: Path, change: Callable[[Any], Any]) -> Path:
    """A checkpoint with every weight changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    changed = {name: change(tensor).contiguous() for name, tensor in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_fp32(source: Path, folder: Path) -> Path:
    """The FP32 checkpoint that both sides start from."""
    import torch

    kept = {torch.bfloat16: 7, torch.float16: 10}
    generator = torch.Generator().manual_seed(0)

    def change(tensor: Any) -> Any:
        wide = tensor.float()
        return filled(wide, kept[tensor.dtype], generator) if tensor.dtype in kept else wide

    return save_changed(source, folder, change)


def sample(model: Path, prompts: Sequence[list[int]], max_tokens: int, log: Path) -> list[Rollout]:
    from mismatch_probe.engines.base import RolloutJob
    from mismatch_probe.engines.process import EngineProcess
    from mismatch_probe.engines.vllm.settings import rollout_settings
    from mismatch_probe.probes.progress import Progress
    from mismatch_probe.probes.workers import drive

    settings = rollout_settings("cpu", "float32", eager=True, in_process=True, kv_cache_gib=1)
    requests = [RolloutRequest(i, prompt, i) for i, prompt in enumerate(prompts)]
    job = RolloutJob(
        engine="vllm",
        model_path=str(model),
        dtype="float32",
        device="cpu",
        sampling=Sampling(max_tokens),
        requests=requests,
        batch=len(requests),
        self_noise_tokens=0,
        max_model_len=max(map(len, prompts)) + max_tokens,
        arguments=settings.arguments,
    )
    return drive(EngineProcess("vllm", settings.environment, log), "rollout", job, Progress()).rollouts


def score(model: Path, dtype: Any, prompts: Sequence[list[int]], rollouts: Sequence[Rollout]) -> PairArrays:
    """The trainer's log-probs in `dtype` beside those of the rollouts."""
    from mismatch_probe.engines.base import TrainerJob
    from mismatch_probe.engines.devices import GIB
    from mismatch_probe.engines.hf.engine import HfTrainer

    wanted = [
        ScoreRequest(r.sequence_id, prompt, [int(token) for token in r.response_token_ids])
        for prompt, r in zip(prompts, rollouts, strict=True)
    ]
    engine = HfTrainer(TrainerJob("hf", str(model), dtype, "cast", "padded", "sdpa", "cpu", 1.0, wanted, 0, GIB))
    found = {s.sequence_id: s.logprobs for batch in engine.plan(wanted) for s in engine.score(batch, 1.0)}
    engine.close()
    lengths = [len(request.response_token_ids) for request in wanted]
    return PairArrays(
        rollout_logprob=np.concatenate([np.asarray(r.logprobs, np.float64) for r in rollouts]),
        trainer_logprob=np.concatenate([np.asarray(found[r.sequence_id], np.float64) for r in rollouts]),
        sequence=np.repeat(np.arange(len(wanted)), lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        prompt=np.arange(len(wanted)),
        prompt_ids=tuple(str(request.sequence_id) for request in wanted),
    )


def fit(pairs: Mapping[int, PairArrays], key: str, first: int) -> Fit:
    """The slope of log2 of a metric per bit, from `first` bits on, with its interval over prompts."""
    bits = np.array([k for k in sorted(pairs) if k >= first], np.float64)
    tokens = [usable_tokens(pairs[int(k)]) for k in bits]
    if key == "kl_k3":
        # Σ (ρ − 1 − d), kept by the sums in a scale of their own.
        sums = [t.sums.ratio.sums[:, 0] * np.exp(t.sums.ratio.shift) for t in tokens]
    else:
        sums = [t.sums.abs_log_ratio for t in tokens]
    centred = bits - bits.mean()
    estimate = Estimate(
        np.stack(sums, axis=1),
        np.stack([t.sums.counts for t in tokens], axis=1),
        lambda means: (np.log2(means) * centred).sum(-1) / (centred**2).sum(),
        lambda slope: slope,
    )
    slope = evaluate({"slope": estimate}, seed=0, replicates=1000)["slope"]
    assert slope.value is not None
    line = stats.linregress(bits, np.log2(estimate.sums.sum(axis=0) / estimate.counts.sum(axis=0)))
    return Fit(first, slope, float(line.intercept), float(stats.t.ppf(0.975, len(bits) - 2) * line.stderr))


def text(metric: MetricValue, digits: int = 3) -> str:
    if metric.value is None:
        return metric.why
    if metric.ci_low is None or metric.ci_high is None:
        return f"{metric.value:.{digits}g}"
    return f"{metric.value:.{digits}g} [{metric.ci_low:.{digits}g}, {metric.ci_high:.{digits}g}]"


def bits_figure(
    points: Mapping[str, Mapping[int, MetricValue]],
    formats: Mapping[str, Mapping[str, MetricValue]],
    floor: Mapping[str, float],
    fits: Mapping[str, Fit],
) -> Figure:
    """A panel per metric against the stored mantissa bits of the trainer's weights.

    Args:
        points: By metric, by bits.
        formats: By metric, by dtype of a whole forward.
        floor: By metric, of unrounded weights.
        fits: By metric.
    """
    from matplotlib.figure import Figure

    with plot_settings():
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        for axes, (key, label, _, power) in zip(figure.subplots(1, 2), METRICS, strict=True):
            _draw(axes, points[key], formats[key], fits[key], power)
            axes.axhline(floor[key], color="#777777", linewidth=1.0, linestyle=(0, (1, 2)), label="FP32 on both sides")
            axes.set(xlabel="stored mantissa bits k of the trainer's weights", ylabel=label, xticks=BITS)
            # Between the points and the floor there is always room.
            box = {"facecolor": "white", "edgecolor": "none", "framealpha": 1.0}
            axes.legend(**box, handlelength=3.2, fontsize=8.0, loc="lower left", bbox_to_anchor=(0, 0.06))
    return figure


def _draw(
    axes: Axes,
    points: Mapping[int, MetricValue],
    formats: Mapping[str, MetricValue],
    fit: Fit,
    power: int,
) -> None:
    axes.set_yscale("log", base=2)
    axes.grid(visible=True, axis="y", color="#e4e4e4", linewidth=0.6)
    x = np.array(sorted(points), np.float64)
    _draw_points(axes, x, [points[int(k)] for k in x], color="#111111", marker="o", label="weights rounded to k bits")
    assert fit.slope.value is not None
    slope = f"{fit.slope.value:.2f} [{fit.slope.ci_low:.2f}, {fit.slope.ci_high:.2f}]".replace("-", "−")
    line = x[x >= fit.first]
    axes.plot(
        line,
        2.0 ** (fit.intercept + fit.slope.value * line),
        color="#111111",
        linewidth=1.4,
        zorder=3,
        label=f"fit from k = {fit.first}: slope {slope} per bit",
    )
    middle = float(line.mean())
    axes.plot(
        x,
        2.0 ** (fit.intercept + fit.slope.value * middle + power * (x - middle)),
        color="#8a8a8a",
        linewidth=2.2,
        linestyle="--",
        label=f"{'half' if power == -1 else 'a quarter'} per bit (2$^{{{power}}}$)",
    )
    for dtype, metric in formats.items():
        bits = np.array([FORMATS[dtype]], np.float64)
        mark = look(dtype)
        label = f"whole forward in {dtype}"
        _draw_points(axes, bits, [metric], color=mark.color, marker=mark.marker, label=label, hollow=True)


def _draw_points(
    axes: Axes,
    x: np.ndarray,
    metrics: Sequence[MetricValue],
    *,
    color: str,
    marker: str,
    label: str,
    hollow: bool = False,
) -> None:
    y = np.array([m.value for m in metrics], np.float64)
    limits = np.array([[y - m.ci_low, m.ci_high - y] for y, m in zip(y, metrics, strict=True)], np.float64).T
    axes.errorbar(
        x,
        y,
        yerr=limits,
        fmt=marker,
        color=color,
        markersize=9 if hollow else 5,
        markerfacecolor="none" if hollow else color,
        markeredgewidth=1.6 if hollow else 1.0,
        capsize=2.5,
        elinewidth=1.0,
        label=label,
    )


def collect(model: Path, num_prompts: int, max_tokens: int, scratch: Path) -> dict[int | str, PairArrays]:
    """Pairs by the bits of the trainer's weights, by dtype of its forward, and under `"floor"` of neither."""
    from mismatch_probe.engines.encoding import EncodeJob, encode
    from mismatch_probe.prompts import load_prompts
    from mismatch_probe.rl.stress import round_mantissa

    base = save_fp32(model, scratch / "base")
    prompts = [
        prompt.token_ids
        for prompt in encode(EncodeJob(str(base), load_prompts(None, num_prompts).prompts, False, False)).prompts
    ]
    rollouts = sample(base, prompts, max_tokens, scratch / "vllm.log")
    print(f"vLLM sampled {sum(len(r.response_token_ids) for r in rollouts)} tokens in {len(prompts)} sequences")
    found: dict[int | str, PairArrays] = {"floor": score(base, "float32", prompts, rollouts)}
    for dtype in FORMATS:
        found[dtype] = score(base, dtype, prompts, rollouts)
    for bits in BITS:
        rounded = save_changed(base, scratch / "rounded", partial(round_mantissa, bits=bits))
        found[bits] = score(rounded, "float32", prompts, rollouts)
        shutil.rmtree(rounded)
    return found


def report(
    found: Mapping[int | str, PairArrays], metrics: Mapping[int | str, Mapping[str, MetricValue]]
) -> dict[str, Fit]:
    """Prints everything and returns the fits, by metric, that the figure shows."""
    print(f"{'trainer':>10}  {'mean |d|':<34} {'k3':<34}")
    for name, values in metrics.items():
        print(f"{name!s:>10}  {text(values['mean_abs_logprob_diff']):<34} {text(values['kl_k3']):<34}")
    rounded = {bits: found[bits] for bits in BITS}
    fits = {}
    for key, _, symbol, power in METRICS:
        for first in (1, SMALL_FROM):
            fits[key] = fit(rounded, key, first)
            slope = f"{text(fits[key].slope, 4)}, ± {fits[key].scatter:.2g} from the scatter of the points"
            print(f"slope of log2 {symbol} per bit, k = {first} … {BITS[-1]}: {slope} (expected {power})")
        for name, above, below in (
            ("7 bits of the weights over 10", 7, 10),
            ("BF16 over FP16, whole forward", "bfloat16", "float16"),
        ):
            ratio = paired_ratio(found[above], found[below], key)
            print(f"{symbol}, {name}: {text(ratio)} (expected {2 ** (-3 * power)})")
    return fits


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="Built-in name or checkpoint folder.")
@click.option("--num-prompts", default=64, show_default=True)
@click.option("--max-tokens", default=16, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for mantissa_bits.png.")
def main(model: str, num_prompts: int, max_tokens: int, out: Path) -> None:
    from mismatch_probe.engines.models import resolve

    with tempfile.TemporaryDirectory() as scratch:
        found = collect(resolve(model).path, num_prompts, max_tokens, Path(scratch))
    metrics = {name: compute_metrics(pair) for name, pair in found.items()}
    fits = report(found, metrics)
    figure = bits_figure(
        {key: {bits: metrics[bits][key] for bits in BITS} for key, *_ in METRICS},
        {key: {dtype: metrics[dtype][key] for dtype in FORMATS} for key, *_ in METRICS},
        {key: metrics["floor"][key].value or 0.0 for key, *_ in METRICS},
        fits,
    )
    out.mkdir(parents=True, exist_ok=True)
    with plot_settings():
        figure.savefig(out / "mantissa_bits.png", dpi=DPI, metadata={"Software": None})
    print(f"wrote {out / 'mantissa_bits.png'}")


if __name__ == "__main__":
    main()
