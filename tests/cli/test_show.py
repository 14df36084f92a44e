"""`show` and `runs`: what a folder is, how far it has come, and what continues it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.files import locked, write_text
from mismatch_probe.results.manifest import AuditRecord
from mismatch_probe.rl.config import RlConfig, SanityConfig
from mismatch_probe.rl.plan import make_runs
from mismatch_probe.rl.records import RlDirectory, SweepDirectory
from mismatch_probe.rl.sanity.records import SanityDirectory
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.runs.measurements import Measurement
from tests.factories.comparison import make_comparison
from tests.factories.manifest import make_manifest, make_pass
from tests.factories.rl_run import PROVENANCE, ending, step
from tests.snapshot import assert_snapshot

Run = Callable[..., Any]
TWO = {"rollout_dtypes": ("bfloat16",), "trainer_dtypes": ("bfloat16", "float32")}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of one run of each kind, and a comparison that has ended."""
    monkeypatch.chdir(tmp_path)
    runs = Path("runs")
    failed = make_pass(status="failed", why="The engine ran out of memory.")
    passes = {"vllm-bfloat16-decode": make_pass(), "hf-bfloat16-cast": failed}
    RunDirectory.create(runs / "half", make_manifest(config=TWO, passes=passes))
    every = {name: make_pass() for name in ("vllm-bfloat16-decode", "hf-bfloat16-cast", "hf-float32-cast")}
    whole = RunDirectory.create(runs / "whole", make_manifest(config=TWO, passes=every, status="complete"))
    make_comparison().write(whole.path / "summary.json")
    RlDirectory.create(runs / "rl", RlConfig(steps=3), PROVENANCE).append_step(step(0))
    planned = make_runs({"steps": 1}, [{"precision": ["bf16", "fp32"], "seeds": 6}])
    sweep = SweepDirectory.create(runs / "sweep", planned, PROVENANCE)
    first = sweep.folder_of(sweep.runs[0])
    first.append_step(step(0))
    first.finish(ending("", steps=1))
    SanityDirectory.create(runs / "sanity", SanityConfig(problems="p.jsonl"), PROVENANCE)


def test_each_kind_of_folder_says_what_it_is_and_what_is_missing(command: Run) -> None:
    said = []
    for name in ("half", "whole", "rl", "sweep", "sanity"):
        shown = command("show", f"runs/{name}")
        assert (shown.code, shown.err) == (0, "")
        said.append(shown.out)
    assert_snapshot("show.txt", "\n".join(said))


def test_a_folder_of_runs(command: Run) -> None:
    (Path("runs") / "broken").mkdir()
    write_text(Path("runs/broken/run.json"), "{")
    (Path("runs") / "notes").mkdir()
    listed = command("runs")
    assert listed.code == 0
    assert_snapshot("runs.txt", listed.out)
    found = json.loads(command("runs", "--json").out)
    assert [one["kind"] for one in found["runs"]] == ["comparison", "comparison", "RL run", "sanity set", "sweep"]
    assert list(found["damaged"]) == ["broken"]


def test_a_run_as_json(command: Run) -> None:
    found = json.loads(command("show", "runs/half", "--json").out)
    assert (found["kind"], found["status"]) == ("comparison", "interrupted")
    assert found["missing"] == [
        {"what": "hf-bfloat16-cast", "why": "The engine ran out of memory."},
        {"what": "hf-float32-cast", "why": ""},
    ]
    assert found["resume"] == "mismatch-probe compare --resume runs/half"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("audit", "audit/audit.json"),
        ("attribute", "attribute/attribution.json"),
        ("rl gradient", "gradient/gradient.json"),
    ],
)
def test_what_was_begun_with_a_comparison_continues_it(command: Run, name: str, file: str) -> None:
    run = RunDirectory.open(Path("runs/whole"))
    if name == "audit":
        run.manifest.audit = AuditRecord(options={}, unsupported={})
    elif name == "attribute":
        run.manifest.attribution = {}
    else:
        (run.path / "gradient").mkdir()
    run.save()
    found = json.loads(command("show", "runs/whole", "--json").out)
    assert found["missing"] == [{"what": file, "why": ""}]
    assert found["resume"] == f"mismatch-probe {name} --resume runs/whole"


def test_a_measurement_that_failed_says_why(command: Run) -> None:
    folder = Path("runs/whole/attribute/passes")
    for name, facts in (("rollout-eager", {"failed": "It ran out of memory."}), ("replay", {"seconds": 1.0})):
        Measurement(folder / f"{name}.npz", "key").save(facts, {})
    (folder / "damaged.npz").write_bytes(b"PK")
    found = json.loads(command("show", "runs/whole", "--json").out)
    assert found["missing"] == [{"what": "rollout-eager", "why": "It ran out of memory."}]
    assert found["resume"] == "mismatch-probe attribute --resume runs/whole"


def test_a_run_that_a_process_holds_is_running(command: Run) -> None:
    with locked(Path("runs/half")):
        assert json.loads(command("show", "runs/half", "--json").out)["status"] == "running"


@pytest.mark.parametrize("name", ["none", ".", "runs"])
def test_another_folder_holds_no_run(command: Run, name: str) -> None:
    shown = command("show", name)
    assert (shown.code, shown.out) == (1, "")
    assert "holds no run" in shown.err
    assert not Path("none").exists()
