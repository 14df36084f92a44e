"""docs/extending.md as a test: a toy of each kind, from a single module."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mismatch_probe
from mismatch_probe.engines import registry
from mismatch_probe.engines.base import Job, RolloutJob, TrainerJob
from mismatch_probe.engines.events import Rollouts, Scores
from mismatch_probe.engines.models import resolve
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.errors import EngineMissing, IngestError, TableError, UsageError
from mismatch_probe.files import data_path
from mismatch_probe.ingest import formats
from mismatch_probe.probes import preflight
from mismatch_probe.probes.attribute import settings
from mismatch_probe.probes.audit import checks
from mismatch_probe.probes.audit.profile import Profile
from mismatch_probe.probes.preflight.run import preflight as run_preflight
from mismatch_probe.report import figures, words
from mismatch_probe.results.base import Document
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.ranges import Range
from mismatch_probe.rl import algorithms, tasks
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.losses import Scale, policy_loss
from mismatch_probe.types import MetricValue, RolloutRequest, Sampling, ScoreRequest
from tests.conftest import Heard
from tests.factories.checkpoint import write_checkpoint
from tests.factories.comparison import make_pair
from tests.ingest.rows import read

_ENGINE = """
import numpy as np

from mismatch_probe.engines.base import RolloutEngine, TrainerEngine
from mismatch_probe.engines.registry import Engine
from mismatch_probe.types import Rollout, Score


class ToyRollout(RolloutEngine):
    def __init__(self, job):
        import toypackage

    def generate(self, requests, sampling, on_tokens, capture=None):
        on_tokens(2 * len(requests))
        return [Rollout(r.sequence_id, [1, 2], [-0.5, -0.25], "stop", "ab") for r in requests]

    def token_texts(self, token_ids):
        return ["?" for _ in token_ids]

    def identity(self):
        return {"engine": "toy"}

    def close(self):
        pass


class ToyTrainer(TrainerEngine):
    def plan(self, requests):
        return [list(requests)]

    def score(self, batch, temperature, *, exact=False):
        return [Score(r.sequence_id, np.full(len(r.response_token_ids), -0.5)) for r in batch]

    def identity(self):
        return {"engine": "toy"}

    def close(self):
        pass


class Toy(Engine):
    name = "toy"
    packages = ("toypackage",)

    def rollout(self, job):
        return ToyRollout(job)

    def trainer(self, job):
        return ToyTrainer()


ENGINE = Toy()
"""

_FORMAT = """
from mismatch_probe.ingest.formats import dump_format


@dump_format(
    "toy-trainer", project="Toy", version="1.0", containers=("jsonl", "json", "parquet"),
    layouts=(("ctx_ids", "samples"),), sides="rollout", switch="Set toy.dump: true.",
)
def toy_rows(record):
    for sample in record.need("samples"):
        yield {
            "prompt_token_ids": record.need("ctx_ids"),
            "response_token_ids": sample["ids"],
            "rollout_logprobs": sample["lp"],
            "step": record.fields.get("iteration"),
        }
"""

_FIGURE = """
from dataclasses import dataclass

from matplotlib.figure import Figure

from mismatch_probe.report.figures import figure


@dataclass(frozen=True)
class Toys:
    sizes: tuple[float, ...]


@figure(
    "toy-sizes", of=Toys, title="Sizes", guide="Higher is larger.", alt="One dot for each toy.",
    needs=lambda toys: bool(toys.sizes), order=999,
)
def draw_sizes(toys: Toys) -> Figure:
    drawn = Figure()
    drawn.subplots().plot(toys.sizes, "o")
    return drawn
"""

_WORDS = """
from mismatch_probe.report.model import in_line
from mismatch_probe.report.words import words
from mismatch_probe.results.finding import Finding


@words("toy-too-large", "A toy exceeds the box.", values={"size": "of the toy, metres"}, fix="Take a larger box.")
def _too_large(found: Finding) -> str:
    return f"{found.where} measures {in_line(found.metric('size'), unit='m')}."
"""

_CHECK = """
from collections.abc import Iterator

from mismatch_probe.probes.preflight import Subject, check, found
from mismatch_probe.results.finding import Finding


@check("toy-layers", needs=("tensors",))
def few_layers(subject: Subject) -> Iterator[Finding]:
    layers = subject.config.get("num_hidden_layers")
    if layers is not None and layers < 4:
        yield found("toy-too-small", "warn", subject.model_type, layers=layers)
"""


_SETTING = """
from mismatch_probe.probes.attribute.settings import Setting, settings


@settings
def toy_settings(context):
    def why_not(c):
        return "" if c.device == "cuda" else "a CPU has no toys"

    return [Setting("rollout", "toy", "a toy", why_not, arguments={"toy_size": 3})]
"""

_AUDIT_CHECK = """
from mismatch_probe.probes.audit.checks import check, finding
from mismatch_probe.probes.audit.judge import judged
from mismatch_probe.types import MetricValue


@check("toy-tokens")
def enough_tokens(subject, bounds):
    if subject.pair is None:
        return None
    n = subject.pair.n_tokens
    return judged("toy-tokens", MetricValue(float(n)), bounds, finding("toy-few-tokens", n_tokens=n), exact=True)
"""

_ALGORITHM = """
from mismatch_probe.metrics.corrections import CORRECTIONS
from mismatch_probe.rl.algorithms import algorithm
from mismatch_probe.rl.algorithms.published import centred


@algorithm("toy-squared", centred, correction=CORRECTIONS["token-tis"])
def squared(of, current, old, advantage, mask):
    return -advantage * (current - old + 1) ** 2, mask.new_zeros(mask.shape)
"""

_TASK = """
from mismatch_probe.rl.tasks import Problem, task


class Echo:
    killed = 0

    def __init__(self, problems):
        self._problems = problems

    def problems(self):
        return list(self._problems)

    def rewards(self, problems, responses):
        return [float(response.text == problem.answer) for problem, response in zip(problems, responses, strict=True)]

    def close(self):
        pass


@task("toy-echo")
def _echo(problems, asked):
    return Echo(problems or [Problem(f"echo-{i}", str(i), str(i)) for i in range(asked.n_problems or 10)])
"""


@pytest.fixture
def add_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[ModuleType, str], None]]:
    """Adds a module `toy` to a package, for one test."""
    added = []

    def add(package: ModuleType, source: str) -> None:
        package._REGISTRY.all()  # its own modules register before the registry is set aside
        (tmp_path / "toy.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        monkeypatch.setattr(package._REGISTRY, "known", dict(package._REGISTRY.known))
        added.append(f"{package.__name__}.toy")

    yield add
    for name in added:
        sys.modules.pop(name, None)


@pytest.fixture
def toy_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package of one module that brings the engine `toy`, which needs the package `toypackage`."""
    (tmp_path / "toy_engine.py").write_text(_ENGINE)
    (tmp_path / "toypackage.py").write_text("")
    about = tmp_path / "toy_engine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-engine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[mismatch_probe.engines]\ntoy = toy_engine:ENGINE\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def _run(job: Job, folder: Path) -> Heard:
    process, heard = EngineProcess("toy", {"PYTHONPATH": str(folder)}, folder / "log"), Heard()
    process.run(job, heard)
    return heard


_SCORED = TrainerJob("toy", "m", "float32", "cast", "padded", None, "cpu", 1.0, [ScoreRequest(7, [1], [2, 3])], 0, 0)
_SAMPLED = RolloutJob("toy", "m", "float32", "cpu", Sampling(4), [RolloutRequest(7, [1], 0)], 1, 0, 8)


def test_an_engine(toy_engine: Path) -> None:
    assert registry.find("toy").name == "toy"
    (rollouts,) = _run(_SAMPLED, toy_engine).of(Rollouts)
    assert [(r.sequence_id, r.response_token_ids) for r in rollouts.rollouts] == [(7, [1, 2])]
    (scores,) = _run(_SCORED, toy_engine).of(Scores)
    assert scores.scores[0].logprobs == pytest.approx([-0.5, -0.5])


def test_a_command_takes_an_engine_by_its_name(
    toy_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{toy_engine}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "prompts.txt").write_text("1+2=\n3+4=\n")
    chain = str(data_path("rl/chain/config.json").parent)
    about: dict[str, Any] = {"rollout_dtypes": "fp32", "trainer_dtypes": "fp32", "max_tokens": 2, "device": "cpu"}
    about |= {"model": chain, "prompts": tmp_path / "prompts.txt", "out": tmp_path / "run"}
    run = mismatch_probe.compare(**about, rollout_engine="toy", trainer_engine="toy")
    assert [name for name in run.data.manifest.passes if "null" not in name] == [
        "toy-float32-decode",
        "toy-float32-cast",
    ]
    (pair,) = run.summary.pairs
    assert pair.metrics["mean_abs_logprob_diff"].value == pytest.approx(0.125)
    for side, name in (("rollout_engine", "nothing"), ("trainer_engine", "vllm")):
        with pytest.raises(UsageError):
            mismatch_probe.compare(**about | {side: name, "out": tmp_path / "none"})
    assert not (tmp_path / "none").exists()


def test_an_engine_whose_package_is_missing_names_the_line_that_installs_it(toy_engine: Path) -> None:
    (toy_engine / "toypackage.py").unlink()
    with pytest.raises(EngineMissing) as caught:
        _run(_SAMPLED, toy_engine)
    assert caught.value.fix == "Run: pip install toypackage."


def test_an_engine_that_is_not_there() -> None:
    for name in ("nothing", "worker", "../vllm"):
        with pytest.raises(UsageError):
            registry.find(name)


@pytest.mark.parametrize("name", ["vllm", "hf", "scripted"])
def test_the_engines_here_are_found_by_name(name: str) -> None:
    assert registry.find(name).name == name


def test_a_format_of_recorded_sequences(add_module: Callable[[ModuleType, str], None], tmp_path: Path) -> None:
    add_module(formats, _FORMAT)
    path = tmp_path / "run.jsonl"
    samples = [{"ids": [3], "lp": [-0.5]}, {"ids": [5, 6], "lp": [-1.0, -2.0]}]
    path.write_text(json.dumps({"ctx_ids": [1, 2], "samples": samples, "iteration": 4}))
    found = read(path)
    assert (found.file.format, found.file.written_for) == ("toy-trainer", "Toy 1.0")
    assert (found.sides, found["prompt_token_ids"]) == (("rollout",), [[1, 2]] * 2)
    assert (found["rollout_logprobs"], found["step"], found["row"]) == ([[-0.5], [-1, -2]], [4, 4], [1, 1])
    path.write_text(json.dumps({"ctx_ids": [1], "samples": [{"ids": [2, 3], "lp": [-0.5]}]}))
    with pytest.raises(IngestError, match=r"^Line 1 of .* has 1 rollout_logprobs for 2 response_token_ids"):
        read(path)
    path.write_text(json.dumps({"ctx_ids": [1], "samples": None}))
    with pytest.raises(IngestError, match=r"^Line 1 of .* has no samples; its keys are 'ctx_ids', 'samples'"):
        read(path)


def test_a_figure(add_module: Callable[[ModuleType, str], None], tmp_path: Path) -> None:
    add_module(figures, _FIGURE)
    assert figures.all_figures()["toy-sizes"].alt == "One dot for each toy."
    toys = sys.modules["mismatch_probe.report.figures.toy"].Toys
    assert [info.name for info in figures.figures_of(toys((1.0, 2.0)))] == ["toy-sizes"]
    assert figures.figures_of(toys(())) == []
    drawn = figures.draw(toys((1.0, 2.0)), tmp_path / "figures")
    assert drawn["toy-sizes"].read_bytes().startswith(b"\x89PNG")


def test_a_finding(add_module: Callable[[ModuleType, str], None]) -> None:
    add_module(words, _WORDS)
    found = Finding(code="toy-too-large", severity="warn", where="bear", values={"size": MetricValue(1.25, 1.0, 1.5)})
    assert words.say(found) == "bear measures 1.25 m [1.00, 1.50]."
    assert words.all_words()["toy-too-large"].fix == "Take a larger box."


def test_a_preflight_check(add_module: Callable[[ModuleType, str], None], tmp_path: Path) -> None:
    add_module(preflight, _CHECK)
    model = resolve(str(write_checkpoint(tmp_path / "m")))
    (found,) = run_preflight(model, preflight.Use()).findings
    assert (found.code, found.severity, found.where, found.values) == ("toy-too-small", "warn", "llama", {"layers": 3})


def test_a_setting_of_an_attribution(add_module: Callable[[ModuleType, str], None]) -> None:
    add_module(settings, _SETTING)
    context = settings.Context("cpu", 0, "bfloat16", "bfloat16", "cast", "padded", {}, rollout_engine="scripted")
    every = settings.settings_of(context)
    (toy,) = settings.choose(every, ["rollout:toy"])
    assert (toy.name, toy.options) == ("rollout-toy", ("--engine-arg", "toy_size=3"))
    assert toy.why_not(context) == "a CPU has no toys"
    assert [one.side for one in every] == sorted(one.side for one in every)


def test_an_audit_check(add_module: Callable[[ModuleType, str], None]) -> None:
    add_module(checks, _AUDIT_CHECK)
    bounds = {"toy-tokens": {"fail_below": 100.0, "source": "a toy"}}
    profile = Profile.model_validate({"name": "toy", "checks": bounds})
    pair = make_pair()
    made = checks.Checks(profile, [pair], {}, Range(), (), 32)
    (found,) = made.of_pair(pair)
    assert (found.name, found.finding.code, found.value.value) == ("toy-tokens", "toy-few-tokens", pair.n_tokens)
    assert found.verdict == ("fail" if pair.n_tokens < 100 else "ok")
    # A pair that did not run has the one check that says so.
    assert [one.name for one in made.of_unsupported("float16", "float16", "cast", "why")] == ["fp16_unsupported"]


def test_an_algorithm(add_module: Callable[[ModuleType, str], None]) -> None:
    add_module(algorithms, _ALGORITHM)
    assert RlConfig(algorithm="toy-squared").algorithm == "toy-squared"
    current = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    rollout, mask = current.detach() - math.log(3.0), torch.ones(1, 2, dtype=torch.bool)
    toy = algorithms.algorithms()["toy-squared"]
    loss, sums = policy_loss(toy, current, current.detach(), rollout, torch.tensor([1.0]), mask, Scale(1, 2, 2))
    assert loss.item() == -2  # a weight of 3 is capped at 2
    assert sums["n_truncated"] == 2
    loss.backward()
    assert current.grad is not None
    assert current.grad.tolist() == [[-2, -2]]


def test_a_task(add_module: Callable[[ModuleType, str], None]) -> None:
    add_module(tasks, _TASK)
    assert RlConfig(task="toy-echo").task == "toy-echo"
    toy = tasks.make_task("toy-echo", n_problems=3, seed=0)
    answers = [tasks.Response(text, "stop") for text in "012"]
    assert toy.rewards(toy.problems(), answers) == [1, 1, 1]


class Toybox(Document):
    """A document whose schema 2 added `n_bears`."""

    KIND, VERSION, OLDEST, AGAIN = "toy box", 2, 1, "toy write {folder}"

    n_toys: int
    """Toys in the box."""
    n_bears: int
    """Those that are bears."""

    @classmethod
    def upgrade(cls, raw: dict[str, Any], version: int) -> dict[str, Any]:
        return {**raw, "n_bears": 0} if version == 1 else super().upgrade(raw, version)


def written(folder: Path, **fields: Any) -> Path:
    path = folder / "toybox.json"
    path.write_text(json.dumps({"tool_version": "9.8.7", **fields}), encoding="utf-8")
    return path


def test_a_document_of_an_older_schema_is_upgraded(tmp_path: Path) -> None:
    box = Toybox.read(written(tmp_path, schema_version=1, n_toys=3))
    assert (box.schema_version, box.n_toys, box.n_bears) == (2, 3, 0)
    box.write(tmp_path / "toybox.json")
    assert Toybox.read(tmp_path / "toybox.json") == box


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"schema_version": 3, "n_toys": 3}, r"schema 3.*reads up to 2.*mismatch-probe>=9\.8\.7"),
        ({"schema_version": 0, "n_toys": 3}, "schema 0"),
        ({"schema_version": 2, "n_toys": 3}, "n_bears"),
        ({"schema_version": 2, "n_toys": 3, "n_bears": "many"}, "n_bears"),
        ({"schema_version": 2, "n_toys": 3, "n_bears": 1, "colour": "red"}, "colour"),
        ({"n_toys": 3}, "no schema version"),
    ],
)
def test_other_documents_are_refused(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(TableError, match=told):
        Toybox.read(written(tmp_path, **fields))
