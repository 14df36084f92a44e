"""What tests above the engines share: the scripted model, a finished run of it, and commands in this process."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings

import mismatch_probe
from mismatch_probe.engines.base import TrainerEngine
from mismatch_probe.engines.devices import gpu_present
from mismatch_probe.engines.events import Event
from mismatch_probe.probes.progress import Progress
from mismatch_probe.run import Run

# No test asserts a wall-clock time.
settings.register_profile("any-speed", deadline=None)
settings.load_profile("any-speed")

MakeModel = Callable[..., Path]
E = TypeVar("E", bound=Event)
SMALL: dict[str, Any] = {
    "rollout_dtypes": ("bfloat16",),
    "trainer_dtypes": ("bfloat16",),
    "num_prompts": 4,
    "max_tokens": 4,
    "self_noise_tokens": 2,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not gpu_present():
            item.add_marker(pytest.mark.skip(reason="gpu: nvidia-smi lists none"))


def write_script(folder: Path, faults: dict[str, str] | None = None, **script: Any) -> Path:
    """A model folder for the scripted engine; `faults` says which pass fails, and how."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "scripted", "vocab_size": 1000, "max_position_embeddings": 4096, **script}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "faults").write_text(json.dumps(faults or {}))
    return folder


def children(pid: int) -> list[int]:
    """The processes that this one has started and that have not ended."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(pid: int) -> bool:
    """Whether a process, not necessarily a child, ends within a minute."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 60)[0])
    finally:
        os.close(handle)


@pytest.fixture
def scripted_model(tmp_path: Path) -> MakeModel:
    """Makes `tmp_path/model`, or makes it anew: `scripted_model({"rollout-float16": "refuse"}, vocab_size=9)`."""
    return lambda faults=None, **script: write_script(tmp_path / "model", faults, **script)


class Heard(list[Event]):
    """A channel, or a listener, that remembers what it was told."""

    def send(self, event: Event) -> None:
        self.append(event)

    __call__ = send

    def phase(self, name: str) -> None:
        """Nobody times it."""

    def of(self, kind: type[E]) -> list[E]:
        """The events of a class."""
        return [event for event in self if isinstance(event, kind)]


def network(engine: TrainerEngine) -> Any:
    """A trainer's own model."""
    return engine.run_on_model(lambda model: model)


class Recorder(Progress):
    """Remembers which passes began, and how each ended."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ends: dict[str, str] = {}

    def begin(self, pass_id: str, text: str) -> None:
        self.begun.append(pass_id)

    def end(self, pass_id: str, text: str) -> None:
        self.ends[pass_id] = text


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of a small run's time; few tests look at them."""
    monkeypatch.setattr("mismatch_probe.report.figures.draw", lambda data, folder: {})


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished 3×3 run with figures; read it, never change it."""
    folder = tmp_path_factory.mktemp("finished")
    model = write_script(folder / "scripted")
    config = {"model": str(model), "num_prompts": 40, "max_tokens": 6, "self_noise_tokens": 3}
    return mismatch_probe.compare(**config, out=folder / "run")


@pytest.fixture
def run_copy(finished: Run, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished.path, tmp_path / "copy"))


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Runs `mismatch-probe` in this process."""
    from mismatch_probe.cli.main import main

    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, captured.out, captured.err)

    yield run
    signal.signal(signal.SIGTERM, before)
