"""Do weights or data change the mismatch over an RL run? `python -m validation.checkpoints RUN OUT`.

RUN is a run of `rl run` with checkpoints. At the initial weights and at each checkpoint the policy samples the prompts
of the run's task, and both sides are compared on that: the mismatch as training meets it. Then, with `compare --from
--replay`, the engine decodes the first policy's responses with the weights of each checkpoint (other weights, the same
data), and each checkpoint's responses with the initial weights (other data, the same weights). Printed as Markdown,
with the distance of the weights from the initial ones. OUT gets a folder a comparison; one that is there is used.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import pandas as pd
from safetensors.torch import load_file

import mismatch_probe
from mismatch_probe.files import write_text
from mismatch_probe.probes.analysis import analyse
from mismatch_probe.probes.progress import Progress
from mismatch_probe.report.format import number
from mismatch_probe.report.model import in_line
from mismatch_probe.results.comparison import Pair
from mismatch_probe.rl.records import RlDirectory, checkpoints, step_of
from mismatch_probe.rl.run import resolve_model
from mismatch_probe.rl.worker import Setup
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.runs.folder import COMPARISON
from mismatch_probe.types import Dtype

# Responses of a comparison to each prompt.
SAMPLES = 17
# Positions whose whole distributions are compared, for entropy and score drift.
POSITIONS = 2048
COLUMNS = {
    "mean_abs_logprob_diff": "mean abs d (nats)",
    "rms_logprob_diff": "RMS d",
    "seq_log_ratio_std": "std of D",
    "ess_seq": "ESS/n",
    "entropy_trainer": "entropy",
    "score_drift": "score drift",
}


def compared(out: Path, weights: Path, precision: tuple[Dtype, Dtype], **given: Any) -> Pair:
    """What a comparison in OUT says of these weights; it is made if it is not there."""
    if not COMPARISON.held_by(out):
        mismatch_probe.compare(
            out=out,
            model=str(weights),
            rollout_dtypes=[precision[0]],
            trainer_dtypes=[precision[1]],
            trainer_modes=["autocast"],
            exact_kl=POSITIONS,
            rollout_batch=256,
            **given,
        )
    pairs = analyse(RunDirectory.open(out)).report().summary.pairs
    return next(pair for pair in pairs if (pair.rollout_dtype, pair.trainer_dtype) == precision)


def distance(one: Path, other: Path) -> float:
    """‖θ − θ′‖ of two checkpoints, by the tensors of `model.safetensors`."""
    a, b = (load_file(path / "model.safetensors") for path in (one, other))
    squares = (float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return math.sqrt(sum(squares))


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
def main(run: Path, out: Path) -> None:
    """Compares initial weights and checkpoints of RUN on their own responses and on each other's."""
    directory = RlDirectory.open(run)
    config = directory.config
    precision = (config.rollout_dtype, config.trainer_dtype)
    initial = resolve_model([config], Progress()).path
    problems = Setup.of(config, str(initial)).problems
    prompts = out / "prompts.jsonl"
    write_text(prompts, "".join(json.dumps({"prompt": one.prompt}) + "\n" for one in problems))
    asked = {"prompts": str(prompts), "samples_per_prompt": SAMPLES, "max_tokens": config.max_tokens}
    weights = {0: initial} | {step_of(one): one for one in checkpoints(directory.checkpoints)}
    rows = [(step, step, compared(out / f"own-{step:03d}", path, precision, **asked)) for step, path in weights.items()]
    for step, path in list(weights.items())[1:]:
        first, own = (responses(out / f"own-{one:03d}") for one in (0, step))
        rows.append((step, 0, compared(out / f"weights-{step:03d}", path, precision, **again(first))))
        rows.append((0, step, compared(out / f"data-{step:03d}", initial, precision, **again(own))))
    click.echo(f"| weights after step | distance | data of step | {' | '.join(COLUMNS.values())} |")
    click.echo(f"|{'---|' * (3 + len(COLUMNS))}")
    for at, of, pair in rows:
        values = [in_line(pair.metrics[name]) for name in COLUMNS]
        click.echo(f"| {at} | {number(distance(initial, weights[at]))} | {of} | {' | '.join(values)} |")


def responses(run: Path) -> Path:
    """A file of a comparison's prompts and responses, as `compare --from` takes it."""
    file = run.with_suffix(".parquet")
    columns = ["prompt_id", "prompt_token_ids", "response_token_ids"]
    pd.read_parquet(run / "sequences.parquet", columns=columns).to_parquet(file, index=False)
    return file


def again(source: Path) -> dict[str, Any]:
    """The same responses with other weights."""
    return {"source": str(source), "replay": True, "rescore": True}


if __name__ == "__main__":
    main()
