"""What a sweep is asked to do: a TOML file of a base and of grids over it, unfolded into runs. Imports no engine.

[base]                      # keys of `rl run`'s configuration
steps = 60

[[grid]]                    # every combination of the lists; several grids add up
precision = ["bf16/bf16", "fp16/fp16", "fp32/fp32"]      # rollout/trainer
algorithm = ["dr-grpo", "dr-grpo-seq-mis"]
learning_rate = [1e-4]
stress = ["none", "weight-noise:0.2", "mantissa:3"]      # structure:dose
remedy = ["none", "routing-replay", "zero-mismatch"]
seeds = 8                   # 0 to 7, or a list
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mismatch_probe.config.settings import Listed, Positive, Settings
from mismatch_probe.config.toml import read_toml
from mismatch_probe.dtypes import DTYPE_INFOS
from mismatch_probe.errors import TableError, UsageError
from mismatch_probe.results.sweep import RlSweep
from mismatch_probe.rl.config import RlConfig, precision_label
from mismatch_probe.runs.folder import SWEEP, read_document

# Keys that grids set, and `base` must not.
_DECIDED = {"seed": "seeds", "dose": "stress", "stress": "stress"}


class Grid(Settings):
    """Lists whose every combination is a run."""

    precision: Annotated[Listed[str], Field(min_length=1)] | None = Field(
        default=None, description="`rollout/trainer`, e.g. `bf16/fp32`; one dtype means both. By default the base's."
    )
    algorithm: Annotated[Listed[str], Field(min_length=1)] | None = Field(
        default=None, description="By default the base's."
    )
    learning_rate: Annotated[Listed[float], Field(min_length=1)] | None = Field(
        default=None, description="By default the base's."
    )
    stress: Annotated[Listed[str], Field(min_length=1)] = Field(
        default=("none",), description="`structure:dose`, or `none`."
    )
    remedy: Annotated[Listed[str], Field(min_length=1)] | None = Field(
        default=None, description="By default the base's."
    )
    seeds: Positive | Annotated[Listed[int], Field(min_length=1)] = Field(
        default=1, description="How many, from 0; or which."
    )

    @classmethod
    def called(cls, name: str) -> str:
        """A key of a file: it has no option."""
        return name


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: an arm with a seed.

    Attributes:
        name: Of its folder; unique, made of the settings in which runs can differ.
        arm: The same without the seed: runs of an arm differ in nothing else.
        config: Of the run.
    """

    name: str
    arm: str
    config: RlConfig


def read_plan(path: str | Path, seeds: int | None = None) -> list[PlannedRun]:
    """Reads the plan of a sweep.

    Args:
        path: A TOML file, or the folder of an earlier sweep, whose arms it takes.
        seeds: Seeds 0 to `seeds` − 1 for every arm, in place of the plan's.

    Raises:
        UsageError: The file is missing or no TOML, a key is unknown, a value is invalid, or two runs are the same.
        TableError: The folder holds no sweep.
    """
    folder = Path(path)
    runs = _runs_of_sweep(folder) if folder.is_dir() else _read_toml_plan(path)
    if seeds is None:
        return runs
    arms = {run.arm: run.config for run in runs}.values()
    return [planned_run(config.model_copy(update={"seed": seed})) for seed in range(seeds) for config in arms]


def planned_runs(document: RlSweep, path: Path) -> list[PlannedRun]:
    """The planned runs of a sweep's document.

    Raises:
        TableError: Their names, which become paths, do not follow from their settings.
    """
    runs = [planned_run(RlConfig.of(run.config)) for run in document.runs]
    if not runs or [run.name for run in runs] != [run.name for run in document.runs]:
        raise TableError(f"{path} is damaged: names of runs do not match their settings.", "Restore the file.")
    return runs


def _runs_of_sweep(folder: Path) -> list[PlannedRun]:
    return planned_runs(read_document(folder, SWEEP, RlSweep), folder / SWEEP.file)


def _read_toml_plan(path: str | Path) -> list[PlannedRun]:
    document = read_toml(path, "plan")
    unknown = sorted(set(document) - {"base", "grid"})
    if unknown:
        raise UsageError(f"The plan has the unknown table {unknown[0]!r}.", "Write [base] and [[grid]].")
    grids = document.get("grid", [{}])
    if not isinstance(grids, list):
        raise UsageError("The plan's grid is no list of tables.", "Write [[grid]], in two pairs of brackets.")
    return make_runs(document.get("base", {}), grids)


def make_runs(base: Mapping[str, Any], grids: Sequence[Mapping[str, Any]]) -> list[PlannedRun]:
    """Unfolds grids over a base; by seed first, so that a sweep that is cut short has whole sets of arms.

    Raises:
        UsageError: See `read_plan`.
    """
    for name, axis in _DECIDED.items():
        if name in base:
            raise UsageError(f"The key {name!r} of a sweep's base is decided by its grids.", f"Use {axis} in [[grid]].")
    runs = [run for grid in grids for run in _unfold(base, Grid.of(grid))]
    twice = [name for name, n in Counter(run.name for run in runs).items() if n > 1]
    if twice:
        raise UsageError(f"The sweep has the run {twice[0]} more than once.", "Remove it from one of the grids.")
    return sorted(runs, key=lambda run: run.config.seed)


def _unfold(base: Mapping[str, Any], grid: Grid) -> list[PlannedRun]:
    precisions = [{}] if grid.precision is None else [_precision(text) for text in grid.precision]
    algorithms = [{}] if grid.algorithm is None else [{"algorithm": name} for name in grid.algorithm]
    rates = [{}] if grid.learning_rate is None else [{"learning_rate": rate} for rate in grid.learning_rate]
    stresses = [parse_stress(text) for text in grid.stress]
    remedies = [{}] if grid.remedy is None else [{"remedy": name} for name in grid.remedy]
    seeds = range(grid.seeds) if isinstance(grid.seeds, int) else grid.seeds
    found = []
    for parts in itertools.product(precisions, algorithms, rates, stresses, remedies):
        values = dict(base) | {key: value for part in parts for key, value in part.items()}
        found += [planned_run(RlConfig.of(values | {"seed": seed})) for seed in seeds]
    return found


def planned_run(config: RlConfig) -> PlannedRun:
    """The run of a configuration."""
    arm = arm_name(config)
    return PlannedRun(f"{arm}_s{config.seed}", arm, config)


def _precision(text: str) -> dict[str, Any]:
    rollout, _, trainer = text.partition("/")
    return {"rollout_dtype": rollout, "trainer_dtype": trainer or rollout}


def parse_stress(text: str) -> dict[str, Any]:
    """`structure:dose` as keys of a configuration.

    Raises:
        UsageError: It is not of that form.
    """
    structure, colon, dose = text.partition(":")
    if text == "none":
        return {"stress": "none", "dose": 0.0}
    try:
        return {"stress": structure, "dose": float(dose)}
    except ValueError:
        what = f"The stress {text!r} has no dose." if not colon else f"The dose {dose!r} is no number."
        raise UsageError(what, "Write for example weight-noise:0.2.") from None


def arm_name(config: RlConfig) -> str:
    """What a run is apart from its seed, fit for the name of a folder."""
    mode = "" if config.trainer_dtype == "float32" else f"-{config.trainer_mode}"
    precision = f"{_short(config.rollout_dtype)}-{_short(config.trainer_dtype)}{mode}"
    stress = "" if config.stress == "none" else f"_{config.stress}-{config.dose:g}"
    remedy = "" if config.remedy == "none" else f"_{config.remedy}"
    return f"{precision}_{config.algorithm}_lr{config.learning_rate:g}{stress}{remedy}"


def _short(dtype: str) -> str:
    return DTYPE_INFOS[dtype].short


def families(configs: Sequence[RlConfig]) -> list[str]:
    """What each arm is apart from its stress, for people: arms of one family differ in nothing else."""
    return labels([config.model_copy(update={"stress": "none", "dose": 0.0}) for config in configs])


def labels(configs: Sequence[RlConfig]) -> list[str]:
    """A name for each arm that says what tells it from the others, for people."""
    several = {
        "algorithm": len({config.algorithm for config in configs}) > 1,
        "learning_rate": len({config.learning_rate for config in configs}) > 1,
    }
    return [_label(config, several) for config in configs]


def _label(config: RlConfig, several: Mapping[str, bool]) -> str:
    parts = [precision_label(config)]
    if several["algorithm"]:
        parts.append(config.algorithm)
    if several["learning_rate"]:
        parts.append(f"lr {config.learning_rate:g}")
    if config.stress != "none":
        parts.append(f"{config.stress} {config.dose:g}")
    if config.remedy != "none":
        parts.append(config.remedy)
    return ", ".join(parts)
