"""The configurations that an audit recommends, read by TRL and by verl: their keys, and what corrections touch."""

from __future__ import annotations

import inspect
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mismatch_probe.metrics.corrections import CORRECTIONS, Correction, touched_shares
from mismatch_probe.probes.audit.advice import snippets
from mismatch_probe.results.audit import Snippet
from mismatch_probe.types import PairArrays
from tests.factories.audit import recommendation
from tests.oracles.batches import HERE, Batch, load, make_batch, missing
from tests.oracles.test_verl import PYTHON

pytestmark = pytest.mark.slow
CHOICES: list[tuple[str, Correction | None]] = [
    (dtype, correction) for dtype in ("bfloat16", "float16") for correction in (None, *CORRECTIONS.values())
]


def snippet(framework: str, dtype: str, correction: Correction | None) -> Snippet:
    choice = recommendation(dtype, correction, 2.0**10 if dtype == "float16" else None)
    return next(found for found in snippets(choice, "model") if found.framework == framework)


@pytest.mark.parametrize(("dtype", "correction"), CHOICES)
def test_trl_takes_its_configuration(dtype: str, correction: Correction | None, tmp_path: Path) -> None:
    trl = load("trl")
    found = snippet("trl", dtype, correction)
    given: dict[str, Any] = eval(found.text, {"GRPOConfig": dict})
    config = trl.GRPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, **given)
    assert (config.fp16, config.bf16) == (dtype == "float16", dtype == "bfloat16")
    # TRL meets an unknown mode only when it trains, so its source is asked.
    mode = given.get("vllm_importance_sampling_mode")
    assert mode is None or f'"{mode}"' in inspect.getsource(load("trl.trainer.grpo_trainer"))
    assert (mode is None) == (correction is None or correction.level == "geometric")
    lacks = "audit-trl-has-no-correction" in {note.code for note in found.notes}
    assert lacks == (correction is not None and correction.level == "geometric")


def arrays_of(batch: Batch) -> PairArrays:
    lengths = batch.mask.sum(axis=1)
    return PairArrays(
        batch.rollout[batch.mask].astype(np.float64),
        batch.trainer[batch.mask].astype(np.float64),
        np.repeat(np.arange(len(lengths)), lengths),
        np.concatenate([np.arange(n) for n in lengths]),
        np.arange(len(lengths)),
        tuple(map(str, range(len(lengths)))),
    )


def test_verl_takes_its_overrides_and_touches_the_tokens_that_we_say(tmp_path: Path) -> None:
    if not PYTHON.exists():
        missing("verl")
    batch = make_batch(7, 0.3)
    overrides = [shlex.split(snippet("verl", *choice).text.replace("\\\n", " "))[3:] for choice in CHOICES]
    np.savez(
        tmp_path / "in.npz",
        rollout=batch.rollout,
        trainer=batch.trainer,
        mask=batch.mask,
        overrides=np.array(json.dumps(overrides)),
    )
    done = subprocess.run(
        [
            str(PYTHON.absolute()),
            "-I",
            str(HERE / "verl_snippets.py"),
            str(tmp_path / "in.npz"),
            str(tmp_path / "out.json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout
    ours = {name: share.value for name, share in touched_shares([arrays_of(batch)]).items()}
    assert min(share for share in ours.values() if share is not None) > 0
    for (dtype, correction), row in zip(CHOICES, json.loads((tmp_path / "out.json").read_text()), strict=True):
        short = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
        settings = row["settings"]
        assert settings["actor_rollout_ref.rollout.dtype"] == dtype
        assert settings["actor_rollout_ref.rollout.logprobs_mode"] == "processed_logprobs"
        for side in ("actor", "ref"):
            assert settings[f"actor_rollout_ref.{side}.fsdp_config.mixed_precision.param_dtype"] == short
        expected = 0.0 if correction is None else ours[correction.name]
        assert row["touched"] == pytest.approx(expected, abs=1e-6), correction
