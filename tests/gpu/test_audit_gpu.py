"""An audit's measurements on a CUDA device, against the same on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mismatch_probe.engines.audit.job import PARTS, AuditJob, histograms_of
from mismatch_probe.engines.base import TrainerJob
from mismatch_probe.engines.hf.settings import trainer_settings
from mismatch_probe.runs.measurements import Measurement
from tests.conftest import Heard
from tests.real.test_hf_trainer import requests

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
Tiny = Callable[[str], Path]


def parts(path: Path, folder: Path, device: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    flags = trainer_settings(device, "float32").arguments if device == "cuda" else {}
    trainer = TrainerJob("hf", str(path), "float32", "cast", "padded", None, device, 1.0, (), 0, 1 << 28, flags=flags)
    files = {name: Measurement(folder / f"{name}.npz", "k") for name in PARTS}
    wide = {name: file for name, file in files.items() if name != "proof"}
    for dtype, made in (("float32", wide), ("float16", {"proof": files["proof"]})):
        AuditJob(replace(trainer, dtype=dtype), made, requests(6), 4, 4, 2, 64, (1e-5,)).run(Heard())
    found = {name: file.load() for name, file in files.items()}
    return {name: part for name, part in found.items() if part is not None}


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gptj"])
def test_a_card_measures_what_the_cpu_measures(tiny: Tiny, tmp_path: Path, architecture: str) -> None:
    cpu, cuda = (parts(tiny(architecture), tmp_path / device, device) for device in ("cpu", "cuda"))
    assert set(cpu) == set(cuda) == set(PARTS)
    names = [place["name"] for place in cpu["forward"][0]["places"]]
    there = {place["name"]: i for i, place in enumerate(cuda["forward"][0]["places"])}
    # Fused experts are multiplied by other functions on a card.
    shared = [name for name in names if "experts" not in name]
    assert set(shared) <= set(there)
    for key in ("first", "rest"):
        ours = cuda["forward"][1][key][[there[name] for name in shared]]
        theirs = cpu["forward"][1][key][[names.index(name) for name in shared]]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert cuda["weights"][0]["rows"] == cpu["weights"][0]["rows"]
    mine, other = (histograms_of(*found["backward"]) for found in (cuda, cpu))
    for name in set(mine) & set(other):
        assert mine[name].largest == pytest.approx(other[name].largest, rel=1e-3)
        assert mine[name].mass.sum() == pytest.approx(other[name].mass.sum(), rel=1e-3)
    assert cuda["proof"][0]["finite"]
    for name in (case["name"] for case in cpu["lag"][0]["cases"]):
        gaps = [np.abs(f["lag"][1][f"masters-{name}"] - f["lag"][1][f"engine-{name}"]).mean() for f in (cuda, cpu)]
        assert gaps[0] == pytest.approx(gaps[1], rel=0.2)


def test_autocast_is_proven_too(tiny: Tiny, tmp_path: Path) -> None:
    path = str(tiny("llama"))
    trainer = TrainerJob("hf", path, "float16", "autocast", "padded", None, "cuda", 1.0, (), 0, 1 << 28, flags={})
    proof = Measurement(tmp_path / "proof.npz", "k")
    AuditJob(trainer, {"proof": proof}, requests(3), 2, 2, 2, 64, (1e-5,)).run(Heard())
    found = proof.load()
    assert found is not None
    assert found[0]["finite"]
    assert found[0]["mode"] == "autocast"
