"""Arrays as training frameworks hold them, and how they reach other people's code in a process of its own.

Shape legend: `S` sequences, `T` the longest response.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.types import PairArrays

HERE = Path(__file__).parent
# `make oracles` sets it: there, an oracle that is missing is a failure.
REQUIRED = os.environ.get("MISMATCH_PROBE_ORACLES") == "1"


def missing(what: str) -> NoReturn:
    """Skips the test for want of an oracle, or fails it under `make oracles`."""
    if REQUIRED:
        pytest.fail(f"{what} is missing", pytrace=False)
    pytest.skip(f"{what} is missing: make oracles")


def load(name: str) -> ModuleType:
    """Another project's module, whose warnings at import are its own affair."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError:
        missing(name)


@dataclass(frozen=True)
class Batch:
    """Padded log-probs, nats; what lies in the padding must not matter.

    Attributes:
        rollout: `[S, T]` b of the tokens.
        trainer: `[S, T]` a of the same tokens.
        mask: `[S, T]` which of them are response tokens, the first T_i of each row.
    """

    rollout: NDArray[Any]
    trainer: NDArray[Any]
    mask: NDArray[np.bool_]

    def metrics(self) -> dict[str, float | None]:
        """Ours, each sequence being a prompt of its own."""
        lengths = self.mask.sum(axis=1)
        pair = PairArrays(
            rollout_logprob=self.rollout[self.mask].astype(np.float64),
            trainer_logprob=self.trainer[self.mask].astype(np.float64),
            sequence=np.repeat(np.arange(len(lengths)), lengths),
            position=np.concatenate([np.arange(n) for n in lengths]),
            prompt=np.arange(len(lengths)),
        )
        return {key: value.value for key, value in compute_metrics(pair, replicates=20).items()}


def make_batch(seed: int, spread: float, sequences: int = 48, longest: int = 40) -> Batch:
    """Response lengths from 1 to `longest`, log-probs of which d has standard deviation `spread`.

    Rollout log-probs are float32 numbers, as vLLM returns them; those of the trainer are float64, so that all sides
    start from the same d.
    """
    draw = np.random.default_rng(seed)
    mask = np.arange(longest) < draw.integers(1, longest + 1, sequences)[:, None]
    rollout = -draw.exponential(1.0, mask.shape).astype(np.float32).astype(np.float64)
    trainer = rollout + draw.normal(0.0, spread, mask.shape)
    return Batch(np.where(mask, rollout, -3.0), np.where(mask, trainer, -9.0), mask)


def run_oracle(
    python: str | Path, script: str, batches: Mapping[str, Batch], folder: Path
) -> dict[str, dict[str, dict[str, float]]]:
    """What `script`, run by another project's interpreter, makes of `batches`: metrics by batch and setting."""
    arrays, result = folder / "arrays.npz", folder / "metrics.json"
    np.savez(
        arrays,
        **{
            f"{name}/{part}": getattr(b, part) for name, b in batches.items() for part in ("rollout", "trainer", "mask")
        },
    )
    # Nothing here needs a network or a GPU, and no library may look for one.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(python), "-I", str(HERE / script), str(arrays), str(result)],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found: dict[str, dict[str, dict[str, float]]] = json.loads(result.read_text())
    return found
