"""`mismatch-probe preflight`, and what stops a command before it starts an engine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.engines.models import resolve
from mismatch_probe.errors import ModelError
from mismatch_probe.probes.own_pass import model_of
from mismatch_probe.probes.progress import Progress
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.run import resolve_model
from mismatch_probe.runs.comparison import RunDirectory
from tests.factories.checkpoint import write_checkpoint
from tests.factories.manifest import make_manifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def cut(model: Path) -> Path:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 1)
    return model


def test_a_clean_checkpoint(model: Path, command: Callable[..., Any]) -> None:
    shown = command("preflight", model)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.replace("\n", "").startswith(f"Preflight of {model}")


def test_warnings_are_not_an_error(model: Path, command: Callable[..., Any]) -> None:
    assert command("preflight", model, "--max-tokens", "600").code == 0


def test_json_is_one_document(model: Path, command: Callable[..., Any]) -> None:
    shown = command("preflight", cut(model), "--json")
    assert shown.code == 3
    assert [finding["code"] for finding in json.loads(shown.out)["findings"]] == ["weights-truncated"]


def test_a_folder_that_is_not_there(command: Callable[..., Any], tmp_path: Path) -> None:
    assert command("preflight", tmp_path / "nothing").code == 1


@pytest.mark.parametrize("name", ["compare", "audit", "attribute"])
def test_commands_stop_before_an_engine_starts(
    name: str, model: Path, command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mismatch_probe.engines.vllm.choose_device", lambda requested: "cpu")
    shown = command(name, "--model", cut(model), "--out", tmp_path / "run")
    assert shown.code == 1
    assert "truncated" in shown.err


def test_rl_stops_as_well(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mismatch_probe.engines.vllm.choose_device", lambda requested: "cpu")
    with pytest.raises(ModelError, match="truncated"):
        resolve_model([RlConfig(model=str(cut(model)))], Progress())


def test_a_pass_that_is_added_to_a_run_stops_as_well(model: Path, tmp_path: Path) -> None:
    """`rl gradient --from RUN`, `attribute --resume RUN` and `audit --resume RUN` find their model so."""
    run = RunDirectory.create(tmp_path / "run", make_manifest(config={"model": str(cut(model))}))
    with pytest.raises(ModelError, match="truncated"):
        model_of(run, run.manifest.config, Progress(), 4)


@pytest.mark.parametrize("name", ["compare", "attribute"])
def test_a_plan_shows_what_would_surprise(
    name: str, model: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mismatch_probe.engines.vllm.choose_device", lambda requested: "cpu")
    asked = (name, "--plan", "--model", model, "--max-tokens", "600")
    found = json.loads(command(*asked, "--json").out)["findings"]
    assert [(one["code"], one["severity"]) for one in found] == [("responses-cut", "warn")]
    assert "512" in command(*asked).out


@pytest.mark.parametrize("asked", [("compare",), ("rl", "run", "--steps", "1")])
def test_disk_is_asked_where_the_run_goes(
    asked: tuple[str, ...], model: Path, command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mismatch_probe.engines.vllm.choose_device", lambda requested: "cpu")
    full = tmp_path / "full"
    full.mkdir()
    real = shutil.disk_usage
    monkeypatch.setattr(
        "mismatch_probe.probes.preflight.resources.shutil.disk_usage",
        lambda path: real(path)._replace(free=0 if Path(path) == full else 1 << 50),
    )
    shown = command(*asked, "--model", model, "--out", full / "run")
    assert shown.code == 1
    assert str(full) in shown.err
    assert not (full / "run").exists()


@pytest.mark.parametrize(("at_once", "fits"), [(1, True), (2, False)])
def test_runs_at_once_share_the_memory(
    at_once: int, fits: bool, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mismatch_probe.rl.run.device_of", lambda config: "cpu")
    configs = [RlConfig(model=str(model), seed=seed) for seed in range(2)]
    needed = int(configs[0].bytes_per_weight * resolve(str(model)).parameters())
    memory = "mismatch_probe.probes.preflight.resources.memory_bytes"
    monkeypatch.setattr(memory, lambda device: (int(1.5 * needed), needed))
    with nullcontext() if fits else pytest.raises(ModelError, match="memory"):
        resolve_model(configs, Progress(), tmp_path / "out", at_once)
