"""Sweeps: who trains which run, what a failure costs, and what goes on after a stop. Runs are scripted here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import mismatch_probe
from mismatch_probe.engines.events import InRun, Listener, RunBegins, RunEnded, StepDone, Total
from mismatch_probe.engines.process import UnexpectedEngineError
from mismatch_probe.errors import DiskFull, EngineError, Interrupted, ProbeError, TableError, UsageError
from mismatch_probe.results.sweep import RlSweep, SweepRun
from mismatch_probe.rl import sweep
from mismatch_probe.rl.plan import make_runs
from mismatch_probe.rl.records import RlDirectory, SweepDirectory
from mismatch_probe.rl.sweep import Slot, slots
from mismatch_probe.rl.sweep_summary import against_reference, arm_results
from tests.conftest import Recorder
from tests.factories.rl_run import PROVENANCE, ending, step

BASE = {"steps": 3, "pass_window": 2, "collapse_window": 2}
GRID = {"precision": ["bf16", "fp32"], "stress": ["none", "weight-noise:0.3"], "seeds": 2}


MODEL: Any = SimpleNamespace(path=Path("model"))


class Script:
    """Plays the workers: every run goes to its end, unless `faults` raises for it."""

    def __init__(self, faults: Callable[[str, int], BaseException | None]) -> None:
        self.faults, self.jobs, self.environments = faults, [], []
        self.tries: dict[str, int] = {}
        self.lock = threading.Lock()

    def process(self, kind: str, environment: dict[str, str], log: Path) -> Script._Process:
        with self.lock:
            self.environments.append(environment)
        return Script._Process(self)

    class _Process:
        def __init__(self, script: Script) -> None:
            self.script = script

        def close(self) -> None:
            """Nothing runs."""

        def run(self, job: Any, on_event: Listener) -> None:
            with self.script.lock:
                self.script.jobs.append(job)
            for folder in job.folders:
                path = Path(folder)
                with self.script.lock:
                    if (path / "taken").exists():
                        continue
                    (path / "taken").touch()
                self._train(path, on_event)

        def _train(self, path: Path, on_event: Listener) -> None:
            directory = RlDirectory.open(path)
            on_event(InRun(str(path), RunBegins()))
            on_event(InRun(str(path), Total(3)))
            tries = self.script.tries[path.name] = self.script.tries.get(path.name, 0) + 1
            error = self.script.faults(path.name, tries)
            if error is not None:
                (path / "taken").unlink()
                raise error
            noisy = directory.config.stress != "none"
            for i in range(3):
                row = step(i, reward=0.2, ess=0.3, gap=0.4) if noisy else step(i, reward=0.5 + 0.1 * i, ess=1.0)
                directory.append_step(row)
                on_event(InRun(str(path), StepDone(row)))
            collapsed = noisy and directory.config.seed == 1
            result = ending("rl-collapsed" if collapsed else "", steps=3, clean_reward=0.6)
            directory.finish(result)
            on_event(InRun(str(path), RunEnded(result)))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    def install(faults: Callable[[str, int], BaseException | None] = lambda name, tries: None) -> Script:
        script = Script(faults)
        monkeypatch.setattr(sweep, "EngineProcess", script.process)
        # Figures take most of a scripted sweep's time; `tests/report/test_sweep.py` draws them.
        monkeypatch.setattr("mismatch_probe.report.figures.draw", lambda data, folder: {})
        monkeypatch.setattr("mismatch_probe.engines.vllm.choose_device", lambda requested: "cpu")
        return script

    return install


def test_every_run_is_trained_once_and_engines_are_shared(tmp_path: Path, scripted: Any) -> None:
    script, told = scripted(), Recorder()
    runs = make_runs(BASE, [GRID])
    result = mismatch_probe.rl_sweep(runs, out=tmp_path / "sweep", workers=2, progress=told)
    assert script.tries == {run.name: 1 for run in runs}
    assert all(len({Path(f).name.split("-")[0] for f in job.folders}) == 1 for job in script.jobs)
    assert {tuple(job.cores) for job in script.jobs} <= {slot.cores for slot in slots("cpu", 2)}
    assert set(told.begun) == {run.name for run in runs} | {"sweep"}
    assert "8 runs have ended" in told.ends["sweep"]
    runs = pd.read_parquet(tmp_path / "sweep" / "runs.parquet")
    assert len(runs) == 8
    assert runs.loc[runs["stress"] == "none", "final_reward"].tolist() == pytest.approx([0.65] * 4)
    assert runs.loc[runs["stress"] == "none", "reward_kept"].tolist() == pytest.approx([1.0] * 4)
    assert (runs.loc[runs["seed"] == 1, "status"] == "collapsed").sum() == 2
    assert len(pd.read_parquet(tmp_path / "sweep" / "steps.parquet")) == 24
    assert [arm.label for arm in result.summary.arms] == [
        "BF16",
        "BF16, weight-noise 0.3",
        "FP32",
        "FP32, weight-noise 0.3",
    ]
    assert result.exit_code == 0  # only stressed runs collapsed
    assert result.summary.arms[1].n_collapsed == 1
    assert RlSweep.read(tmp_path / "sweep" / "sweep.json") == result.document
    assert {path.name for path in (tmp_path / "sweep").glob("report.*")} == {"report.html", "report.md"}


def test_a_run_whose_engine_dies_gets_one_more_try(tmp_path: Path, scripted: Any) -> None:
    victim = "fp32-fp32_dr-grpo_lr0.0001_s1"
    script = scripted(lambda name, tries: EngineError("killed") if name == victim and tries == 1 else None)
    result = mismatch_probe.rl_sweep(make_runs(BASE, [GRID]), out=tmp_path / "sweep", workers=1)
    assert script.tries[victim] == 2
    assert not result.summary.failures
    assert result.exit_code == 0


@pytest.mark.parametrize("error", [UnexpectedEngineError("what"), ProbeError("sync")])
def test_a_run_that_fails_leaves_the_others(tmp_path: Path, scripted: Any, error: ProbeError) -> None:
    victim = "fp32-fp32_dr-grpo_lr0.0001_s0"
    script = scripted(lambda name, tries: error if name == victim else None)
    result = mismatch_probe.rl_sweep(make_runs(BASE, [GRID]), out=tmp_path / "sweep", workers=2)
    assert script.tries[victim] == (2 if isinstance(error, UnexpectedEngineError) else 1)
    assert list(result.summary.failures) == [victim]
    assert result.exit_code == 1
    runs = result.runs().set_index("run")
    assert runs.loc[victim, "status"] == "failed"
    assert (runs.drop(victim)["status"] != "failed").all()
    assert [one.where for one in result.document.findings if one.code == "sweep-run-failed"] == [victim]
    again = scripted()
    resumed = mismatch_probe.rl_sweep_resume(tmp_path / "sweep", workers=1)
    assert list(again.tries) == [victim]
    assert resumed.exit_code == 0


def test_an_engine_that_cannot_start_fails_its_runs_alone(tmp_path: Path, scripted: Any, monkeypatch: Any) -> None:
    scripted()
    own = Script._Process.run

    def run(self: Any, job: Any, on_event: Any) -> None:
        if "bf16" in job.folders[0]:
            raise EngineError("vLLM refuses bfloat16")
        own(self, job, on_event)

    monkeypatch.setattr(Script._Process, "run", run)
    result = mismatch_probe.rl_sweep(make_runs(BASE, [GRID]), out=tmp_path / "sweep", workers=2)
    assert len(result.summary.failures) == 4
    assert all(name.startswith("bf16") for name in result.summary.failures)
    assert len(result.runs()[result.runs()["status"] == "unfinished"]) == 0


def test_an_engine_that_fails_beside_another_fails_no_run_of_the_other(
    tmp_path: Path, scripted: Any, monkeypatch: Any
) -> None:
    """Slot 1 runs out of memory at each start, while slot 0 trains what both of them were given."""
    scripted()
    own, starts = Script._Process.run, []
    begun, over = threading.Event(), threading.Event()

    def run(self: Any, job: Any, on_event: Any) -> None:
        def hold(event: InRun) -> None:
            begun.set()
            if isinstance(event.event, Total):
                over.wait(60)
            on_event(event)

        starts.append(job)
        if len(starts) == 1:
            own(self, job, hold)
            return
        begun.wait(60)
        if len(starts) > 2:
            over.set()
        raise EngineError("out of memory")

    monkeypatch.setattr(Script._Process, "run", run)
    runs = make_runs(BASE, [{"precision": ["fp32"], "seeds": 3}])
    result = mismatch_probe.rl_sweep(runs, out=tmp_path / "sweep", workers=2)
    assert result.exit_code == 0
    assert set(result.runs()["status"]) == {"complete"}


def test_a_run_that_another_process_holds_is_not_waited_for_without_end(
    tmp_path: Path, scripted: Any, monkeypatch: Any
) -> None:
    script = scripted()
    monkeypatch.setattr(Script._Process, "run", lambda self, job, on_event: script.jobs.append(job))
    result = mismatch_probe.rl_sweep(make_runs(BASE, [{"seeds": 2}]), out=tmp_path / "sweep", workers=1)
    assert len(script.jobs) == 1
    assert result.exit_code == 1
    assert all("Another process is using" in why for why in result.summary.failures.values())


def test_a_run_that_ended_unheard_is_not_run_again(tmp_path: Path, scripted: Any, monkeypatch: Any) -> None:
    """The worker writes its result and dies before it can tell."""
    script = scripted()
    own = Script._Process.run

    def run(self: Any, job: Any, on_event: Any) -> None:
        own(self, job, lambda event: None if isinstance(event.event, RunEnded) else on_event(event))
        raise EngineError("killed")

    monkeypatch.setattr(Script._Process, "run", run)
    runs = make_runs(BASE, [{"seeds": 2}])
    result = mismatch_probe.rl_sweep(runs, out=tmp_path / "sweep", workers=1)
    assert script.tries == {run.name: 1 for run in runs}
    assert result.exit_code == 0


def test_what_stops_a_sweep_stops_a_worker_that_is_just_starting(
    tmp_path: Path, scripted: Any, monkeypatch: Any
) -> None:
    script = scripted()
    closed: list[object] = []
    monkeypatch.setattr(Script._Process, "close", lambda self: closed.append(self))
    runs = make_runs(BASE, [GRID])
    directory = SweepDirectory.create(tmp_path / "sweep", runs, PROVENANCE)
    working = sweep.Scheduler(directory, MODEL, "cpu", slots("cpu", 1), Recorder())
    working._stop(DiskFull("full"))
    working._serve(slots("cpu", 1)[0], runs)
    assert len(closed) == 1
    assert not script.jobs


def test_failures_are_kept_for_a_later_report(tmp_path: Path, scripted: Any) -> None:
    victim = "fp32-fp32_dr-grpo_lr0.0001_s0"
    scripted(lambda name, tries: ProbeError("no sync", "see") if name == victim else None)
    mismatch_probe.rl_sweep(make_runs(BASE, [GRID]), out=tmp_path / "sweep", workers=1)
    again = mismatch_probe.rl_report(tmp_path / "sweep")
    assert again.summary.failures == {victim: "no sync see"}
    assert again.exit_code == 1


def test_a_precision_is_compared_with_itself_without_mismatch() -> None:
    """Where there is such an arm; all others with FP32."""
    grids = [
        {"precision": ["bf16"], "remedy": ["none", "zero-mismatch", "routing-replay"]},
        {"precision": ["fp16", "fp32", "bf16/fp32"]},
        {"precision": ["bf16"], "stress": ["mantissa:3"]},
    ]
    planned = make_runs(BASE, grids)
    measured = dict.fromkeys(("final_reward", "clean_reward", "reward_kept", "ess_seq", "mean_abs_logprob_diff"), 0.5)
    runs = pd.DataFrame({"arm": run.arm, "seed": 0, "status": "complete", **measured} for run in planned)
    found = {one.first: one.second for one in against_reference(planned, runs)}
    control = "BF16, zero-mismatch"
    assert found == {
        "BF16": control,
        "BF16, routing-replay": control,
        control: "FP32",
        "FP16": "FP32",
        "BF16/FP32": "FP32",
        "BF16, mantissa 3": "FP32",
    }
    arms = {one.label: one for one in arm_results(planned, runs)}
    assert (arms[control].precision, arms[control].remedy) == ("bfloat16", "zero-mismatch")


def test_algorithms_are_not_taken_for_structures(tmp_path: Path, scripted: Any) -> None:
    scripted()
    grid = {"precision": ["fp32"], "stress": ["none", "mantissa:8"], "algorithm": ["pg", "dr-grpo"]}
    result = mismatch_probe.rl_sweep(make_runs(BASE, [grid]), out=tmp_path / "sweep", workers=1)
    response = result.summary.dose_response
    assert response is not None
    assert all("dr-grpo" not in pair.comparison.first + pair.comparison.second for pair in response.matched)
    assert response.n_arms == 2


@pytest.mark.parametrize("planned", [(), (SweepRun(name="../../outside", arm="../..", config={"steps": 3}),)])
def test_a_damaged_sweep_writes_nothing_outside_itself(tmp_path: Path, planned: tuple[SweepRun, ...]) -> None:
    RlSweep(**RlSweep.stamp(), runs=planned, provenance=PROVENANCE).write(tmp_path / "sweep" / "sweep.json")
    with pytest.raises(TableError, match="is damaged"):
        mismatch_probe.rl_report(tmp_path / "sweep")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


def test_runs_that_diverged_count_as_nothing_gained(tmp_path: Path) -> None:
    runs = make_runs(BASE, [{"precision": ["fp32"], "seeds": 2}])
    directory = SweepDirectory.create(tmp_path / "sweep", runs, PROVENANCE)
    for planned in runs:
        run = directory.folder_of(planned)
        for i in range(3):
            run.append_step(step(i, reward=0.8, ess=1.0))
        run.finish(ending("rl-not-finite", steps=3))
    arm = sweep.write_sweep(directory).summary.arms[0]
    assert (arm.reward.value, arm.reward_kept.value, arm.clean_reward.value) == (0.0, 0.0, 0.0)


def test_a_full_disk_ends_the_sweep(tmp_path: Path, scripted: Any) -> None:
    scripted(lambda name, tries: DiskFull("full"))
    with pytest.raises(DiskFull):
        mismatch_probe.rl_sweep(make_runs(BASE, [GRID]), out=tmp_path / "sweep", workers=2)


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, scripted: Any, monkeypatch: Any) -> None:
    scripted()
    monkeypatch.setattr(sweep.threading.Thread, "is_alive", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match="finished runs are kept") as stopped:
        mismatch_probe.rl_sweep(make_runs(BASE, [GRID]), out=tmp_path / "sweep", workers=1)
    assert f"rl sweep --resume {tmp_path / 'sweep'}" in stopped.value.fix


def test_the_slowest_engine_starts_first(tmp_path: Path, scripted: Any) -> None:
    script = scripted()
    mismatch_probe.rl_sweep(make_runs(BASE, [{"precision": ["bf16", "fp16"]}]), out=tmp_path / "sweep", workers=1)
    assert [Path(job.folders[0]).name.split("-")[0] for job in script.jobs] == ["fp16", "bf16"]


def test_the_slowest_run_of_an_engine_starts_first(tmp_path: Path, scripted: Any) -> None:
    script = scripted()
    grid = {"precision": ["bf16"], "remedy": ["none", "zero-mismatch"], "seeds": 2}
    base = BASE | {"updates_per_rollout": 1}
    mismatch_probe.rl_sweep(make_runs(base, [grid]), out=tmp_path / "sweep", workers=1)
    (job,) = script.jobs
    order = [("zero-mismatch" in name, name[-1]) for name in (Path(folder).name for folder in job.folders)]
    assert order == [(True, "0"), (False, "0"), (True, "1"), (False, "1")]


def test_a_folder_that_is_none_of_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="holds no sweep"):
        mismatch_probe.rl_sweep_resume(tmp_path)
    with pytest.raises(TableError, match="holds no sweep"):
        mismatch_probe.rl_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_report_without_a_finished_run_says_so(tmp_path: Path) -> None:
    runs = make_runs(BASE, [GRID])
    SweepDirectory.create(tmp_path / "sweep", runs, PROVENANCE)
    result = mismatch_probe.rl_report(tmp_path / "sweep")
    assert result.document.findings[0].code == "sweep-no-run"
    assert set(result.runs()["status"]) == {"unfinished"}


def test_cores_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda pid: {2, 3, 4, 7})
    assert [slot.cores for slot in slots("cpu", None)] == [(2,), (3,), (4,), (7,)]
    assert [slot.cores for slot in slots("cpu", 2)] == [(2, 4), (3, 7)]
    assert slots("cpu", 2)[0].environment() == {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "2,4"}
    with pytest.raises(UsageError, match="exceeds the 4 available cores"):
        slots("cpu", 5)
    with pytest.raises(UsageError, match="less than 1"):
        slots("cpu", 0)


def test_gpus_are_dealt_out_by_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sweep.devices, "gpu_names", lambda: ("a", "b"))
    assert slots("cuda", None) == [Slot(0, gpu="0"), Slot(1, gpu="1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert [slot.environment() for slot in slots("cuda", None)] == [
        {"CUDA_VISIBLE_DEVICES": "3"},
        {"CUDA_VISIBLE_DEVICES": "GPU-5"},
    ]
