"""What a sweep is asked to do: a TOML file of a base and of grids over it, unfolded into cells. Imports no engine.

[base]                      # keys of `rl run`'s configuration
steps = 60

[[grid]]                    # every combination of the lists; several grids add up
precision = ["bf16/bf16", "fp16/fp16", "fp32/fp32"]      # rollout/trainer
algorithm = ["dr-grpo", "dr-grpo-seq-mis"]
learning_rate = [1e-4]
stress = ["none", "weight-noise:0.2", "mantissa:3"]      # structure:dose
seeds = 8                   # 0 to 7, or a list
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from mismatch_probe.errors import UsageError
from mismatch_probe.rl.config import RlConfig, checked, make_config, read_toml

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# What grids decide, and `base` must not.
_DECIDED = {"seed": "seeds", "dose": "stress", "stress": "stress"}


class Grid(BaseModel):
    """Lists whose every combination is a cell.

    Attributes:
        precision: `rollout/trainer`, e.g. `bf16/fp32`; one dtype means both. By default that of the base.
        algorithm, learning_rate: By default those of the base.
        stress: `structure:dose`, or `none`.
        seeds: How many, from 0; or which.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    precision: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    algorithm: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    learning_rate: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    stress: Annotated[tuple[str, ...], Field(min_length=1)] = ("none",)
    seeds: Annotated[int, Field(gt=0)] | Annotated[tuple[int, ...], Field(min_length=1)] = 1


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: Of its folder; unique, and made of what a cell is made of.
        arm: The same without the seed: cells of an arm differ in nothing else.
        config: Of the run.
    """

    name: str
    arm: str
    config: RlConfig


def read_plan(path: str | Path) -> list[Cell]:
    """Reads a TOML file of a sweep.

    Raises:
        UsageError: The file is missing or no TOML, a key is unknown, a value cannot be, or two cells are the same.
    """
    document = read_toml(path, "plan")
    unknown = sorted(set(document) - {"base", "grid"})
    if unknown:
        raise UsageError(f"The plan has the unknown table {unknown[0]!r}.", "Write [base] and [[grid]].")
    grids = document.get("grid", [{}])
    if not isinstance(grids, list):
        raise UsageError("The plan's grid is no list of tables.", "Write [[grid]], in two pairs of brackets.")
    return make_cells(document.get("base", {}), grids)


def make_cells(base: Mapping[str, Any], grids: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Unfolds grids over a base; by seed first, so that a sweep that is cut short has whole sets of arms.

    Raises:
        UsageError: See `read_plan`.
    """
    for name, axis in _DECIDED.items():
        if name in base:
            raise UsageError(f"The key {name!r} of a sweep's base is decided by its grids.", f"Use {axis} in [[grid]].")
    cells = [cell for grid in grids for cell in _unfold(base, checked(Grid, grid))]
    twice = [name for name, n in Counter(cell.name for cell in cells).items() if n > 1]
    if twice:
        raise UsageError(f"The sweep has the cell {twice[0]} more than once.", "Take it out of one of the grids.")
    return sorted(cells, key=lambda cell: cell.config.seed)


def _unfold(base: Mapping[str, Any], grid: Grid) -> list[Cell]:
    precisions = [{}] if grid.precision is None else [_precision(text) for text in grid.precision]
    algorithms = [{}] if grid.algorithm is None else [{"algorithm": name} for name in grid.algorithm]
    rates = [{}] if grid.learning_rate is None else [{"learning_rate": rate} for rate in grid.learning_rate]
    stresses = [parse_stress(text) for text in grid.stress]
    seeds = range(grid.seeds) if isinstance(grid.seeds, int) else grid.seeds
    found = []
    for parts in itertools.product(precisions, algorithms, rates, stresses):
        values = dict(base) | {key: value for part in parts for key, value in part.items()}
        found += [named_cell(make_config(values | {"seed": seed})) for seed in seeds]
    return found


def named_cell(config: RlConfig) -> Cell:
    """The cell of a configuration."""
    arm = arm_name(config)
    return Cell(f"{arm}_s{config.seed}", arm, config)


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
    """What a cell is apart from its seed, fit for a folder's name."""
    mode = "" if config.trainer_dtype == "float32" else f"-{config.trainer_mode}"
    precision = f"{SHORT[config.rollout_dtype]}-{SHORT[config.trainer_dtype]}{mode}"
    stress = "" if config.stress == "none" else f"_{config.stress}-{config.dose:g}"
    return f"{precision}_{config.algorithm}_lr{config.learning_rate:g}{stress}"


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
    rollout, trainer = SHORT[config.rollout_dtype].upper(), SHORT[config.trainer_dtype].upper()
    parts = [rollout if rollout == trainer else f"{rollout}/{trainer}"]
    if several["algorithm"]:
        parts.append(config.algorithm)
    if several["learning_rate"]:
        parts.append(f"lr {config.learning_rate:g}")
    if config.stress != "none":
        parts.append(f"{config.stress} {config.dose:g}")
    return ", ".join(parts)
