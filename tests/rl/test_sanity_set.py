"""A sanity set from command to files, with a scripted model whose problems have known accuracies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import mismatch_probe
from mismatch_probe.engines.events import Advance, Event, Listener, Total
from mismatch_probe.errors import Interrupted, TableError, UsageError
from mismatch_probe.results.sanity import SanityOutcome, SanitySet
from mismatch_probe.rl.config import RlConfig, SanityConfig
from mismatch_probe.rl.sanity import records, run
from mismatch_probe.rl.sanity.run import SanityJob
from mismatch_probe.rl.tasks import Problem, Response, Task, make_task, read_problems
from tests.conftest import Heard, Outcome, Recorder, write_script
from tests.ingest.rows import read

N_PROBLEMS, N_SAMPLES = 11, 20
ACCURACY = np.linspace(0, 1, N_PROBLEMS)


PROBLEMS = make_task("chain", n_problems=N_PROBLEMS, seed=0).problems()
PADDING, MOST = "." * (3 * 16 - 1), 48


def write_model(folder: Path) -> Path:
    """A scripted model that solves problem i with probability i/10; of 100 responses one does not end."""

    def answers(problem: Problem, share: float) -> list[tuple[float, str]]:
        wrong = str((int(problem.answer) + 1) % 10)
        return [(0.01, 10 * PADDING), (0.99 * share, PADDING + problem.answer), (0.99 * (1 - share), PADDING + wrong)]

    script = {p.prompt: answers(p, share) for p, share in zip(PROBLEMS, ACCURACY, strict=True)}
    return write_script(folder, responses=script)


class CountingTask:
    """A task whose grader was killed once per call."""

    def __init__(self, task: Task) -> None:
        self._task, self.killed = task, 0

    def problems(self) -> list[Problem]:
        return self._task.problems()

    def rewards(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[float]:
        self.killed += 1
        return self._task.rewards(problems, responses)

    def close(self) -> None:
        self._task.close()


class InProcess:
    """Runs the job in this process, and interrupts it once so many responses are stored.

    Attributes:
        totals: Tokens of every job that ran.
    """

    stop_at: int | None = None
    totals: list[int] = []  # noqa: RUF012

    def __init__(self, kind: str, environment: dict[str, str], log: Path) -> None:
        assert kind == "scripted"

    def run(self, job: SanityJob, on_event: Listener) -> None:
        done = 0

        class Parent(Heard):
            def send(self, event: Event) -> None:
                nonlocal done
                if isinstance(event, Advance):
                    if InProcess.stop_at is not None and done >= InProcess.stop_at * MOST:
                        raise KeyboardInterrupt
                    done += event.amount
                if isinstance(event, Total):
                    InProcess.totals.append(event.amount)
                on_event(event)

        job.run(Parent())


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "EngineProcess", InProcess)
    monkeypatch.setattr(InProcess, "totals", [])
    monkeypatch.setattr(records, "_CHUNK_RESPONSES", 3 * N_SAMPLES)
    monkeypatch.setattr("mismatch_probe.rl.tasks.make_task", lambda *a, **k: CountingTask(make_task(*a, **k)))


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> Path:
    """Its folder; beside it `make` makes sets."""
    return write_model(tmp_path / "model")


def outcome_of(found: run.SanityResult) -> SanityOutcome:
    assert found.document.outcome is not None
    return found.document.outcome


def make(folder: Path, **more: Any) -> run.SanityResult:
    own: dict[str, Any] = {"model": folder.parent / "model", "rollout_engine": "scripted", "n_problems": N_PROBLEMS}
    return mismatch_probe.rl_sanity_set(out=folder, **{**own, "n_samples": N_SAMPLES, "max_tokens": MOST, **more})


class TestFiles:
    def test_the_set_is_what_the_samples_say(self, tmp_path: Path) -> None:
        found = make(tmp_path / "set")
        samples = pq.read_table(tmp_path / "set" / "samples.parquet").to_pandas()
        accuracy = samples.groupby("prompt_id", sort=False)["reward"].mean()
        assert len(samples) == N_PROBLEMS * N_SAMPLES
        assert accuracy.to_numpy() == pytest.approx(ACCURACY, abs=0.35)
        rows = [json.loads(line) for line in found.problems.read_text().splitlines()]
        kept = accuracy[(accuracy >= 0.2) & (accuracy <= 0.8)]
        assert {row["id"]: row["accuracy"] for row in rows} == kept.to_dict()
        assert {row["n_samples"] for row in rows} == {N_SAMPLES}
        assert SanitySet.read(tmp_path / "set" / "sanity.json") == found.document
        outcome = outcome_of(found)
        assert (outcome.n_problems, outcome.n_kept) == (N_PROBLEMS, len(kept))
        assert outcome.accuracy == pytest.approx(samples["reward"].mean())
        assert outcome.truncated_fraction == (samples["finish_reason"] == "length").mean()
        assert outcome.n_grader_killed == 4  # once per chunk
        assert [engine["engine"] for engine in found.document.engines] == ["scripted"]
        assert found.document.config["seed"] == 0
        assert "config.json" in found.document.provenance.model.files
        names = {path.name for path in (tmp_path / "set").iterdir()}
        assert {"report.html", "report.md"} <= names
        assert "samples" not in names

    def test_rl_run_trains_on_exactly_these(self, tmp_path: Path) -> None:
        found = make(tmp_path / "set")
        kept = read_problems(found.problems)
        config = RlConfig(problems=str(found.problems), n_problems=len(kept), prompts_per_step=4)
        task = make_task(config.task, n_problems=config.n_problems, seed=0, path=config.problems)
        assert task.problems() == kept
        drawn = make_task("chain", n_problems=N_PROBLEMS, seed=0).problems()
        assert [p for p in drawn if p in kept] == kept

    def test_compare_reads_the_samples(self, tmp_path: Path) -> None:
        make(tmp_path / "set")
        assert read(tmp_path / "set" / "samples.parquet").file.n_sequences == N_PROBLEMS * N_SAMPLES

    def test_a_set_can_be_sampled_again(self, tmp_path: Path) -> None:
        first = make(tmp_path / "first", keep=(0.0, 1.0))
        again = make(tmp_path / "again", keep=(0.0, 1.0), problems=str(first.problems))
        tables = [pq.read_table(found.path / "samples.parquet") for found in (first, again)]
        assert tables[0].equals(tables[1])

    def test_another_seed_samples_anew(self, tmp_path: Path) -> None:
        tables = [pq.read_table(make(tmp_path / str(s), seed=s).path / "samples.parquet")["reward"] for s in (0, 1)]
        assert not tables[0].equals(tables[1])

    def test_chunks_change_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = pq.read_table(make(tmp_path / "first").path / "samples.parquet")
        monkeypatch.setattr(records, "_CHUNK_RESPONSES", 1)
        assert pq.read_table(make(tmp_path / "again").path / "samples.parquet").equals(first)

    def test_nothing_kept_is_said(self, tmp_path: Path) -> None:
        found = make(tmp_path / "set", keep=(0.999, 0.9995))
        assert found.problems.read_text() == ""
        assert [finding.code for finding in found.document.findings] == ["sanity-nothing-kept", "sanity-grader-stopped"]


class TestResume:
    def test_a_resumed_set_is_that_of_an_uninterrupted_one(self, tmp_path: Path) -> None:
        whole = make(tmp_path / "whole")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InProcess, "stop_at", 6 * N_SAMPLES)
            with pytest.raises(Interrupted) as stopped:
                make(tmp_path / "part")
        assert stopped.value.fix.endswith(f"rl sanity-set --resume {tmp_path / 'part'}")
        found = mismatch_probe.rl_sanity_set_resume(tmp_path / "part")
        assert InProcess.totals[-1] == (N_PROBLEMS - 6) * N_SAMPLES * MOST
        assert found.document.outcome == whole.document.outcome
        assert found.problems.read_bytes() == whole.problems.read_bytes()
        files = [path / "samples.parquet" for path in (found.path, whole.path)]
        assert pq.read_table(files[0]).equals(pq.read_table(files[1]))

    def test_a_finished_set_is_only_reported(self, tmp_path: Path) -> None:
        found = make(tmp_path / "set")
        assert mismatch_probe.rl_sanity_set_resume(found.path) == found
        assert len(InProcess.totals) == 1

    def test_a_death_while_files_are_written_loses_nothing(self, tmp_path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records, "outcome_of", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                make(tmp_path / "set")
        found = mismatch_probe.rl_sanity_set_resume(tmp_path / "set")
        assert InProcess.totals[-1] == 0
        assert found.document.outcome == make(tmp_path / "other").document.outcome

    def test_other_problems_are_refused(self, tmp_path: Path) -> None:
        problems = make(tmp_path / "first", keep=(0.0, 1.0)).problems
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InProcess, "stop_at", 0)
            with pytest.raises(Interrupted):
                make(tmp_path / "set", problems=str(problems))
        text = problems.read_text()
        problems.write_text(text.replace('"answer": "', '"answer": "x', 1))
        with pytest.raises(TableError, match="problems have changed"):
            mismatch_probe.rl_sanity_set_resume(tmp_path / "set")

    def test_another_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InProcess, "stop_at", 0)
            with pytest.raises(Interrupted):
                make(tmp_path / "set")
        path = tmp_path / "set" / "sanity.json"
        document = json.loads(path.read_text())
        document["provenance"]["model"]["files"]["config.json"] = "other"
        path.write_text(json.dumps(document))
        with pytest.raises(TableError, match="model's files"):
            mismatch_probe.rl_sanity_set_resume(tmp_path / "set")

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(TableError, match="holds no sanity set"):
            mismatch_probe.rl_sanity_set_resume(tmp_path / "empty")
        assert os.listdir(tmp_path / "empty") == []


class TestProgress:
    def test_the_bar_is_filled_whatever_the_lengths(self, tmp_path: Path) -> None:
        class Counter(Recorder):
            total_tokens = done = 0

            def total(self, pass_id: str, tokens: int) -> None:
                self.total_tokens = tokens

            def advance(self, pass_id: str, tokens: int) -> None:
                self.done += tokens

        counter = Counter()
        make(tmp_path / "set", max_tokens=100, progress=counter)
        assert counter.done == counter.total_tokens == N_PROBLEMS * N_SAMPLES * 100


class TestCommand:
    @pytest.fixture
    def own(self, model: Path) -> list[str]:
        return ["--model", str(model), "--rollout-engine", "scripted", "--n-problems", str(N_PROBLEMS)]

    def test_json(self, command: Callable[..., Outcome], own: list[str], tmp_path: Path) -> None:
        ended = command("rl", "sanity-set", *own, "--n-samples", "10", "--out", tmp_path / "set", "--json")
        assert ended.code == 0
        found = json.loads(ended.out)
        assert (found["path"], found["outcome"]["n_samples"]) == (str(tmp_path / "set"), 10)

    def test_what_to_run_next(self, command: Callable[..., Outcome], own: list[str], tmp_path: Path) -> None:
        folder = tmp_path / "set"
        shown = command("rl", "sanity-set", *own, "--keep", "0.1", "0.9", "--max-tokens", "50", "--out", folder).out
        n_kept = len((folder / "sanity-set.jsonl").read_text().splitlines())
        assert f"--problems {folder / 'sanity-set.jsonl'} --n-problems {n_kept}" in shown
        assert "--max-tokens 50" in shown

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--keep", "0.8", "0.2"], "upper bound first"),
            (["--keep", "-1", "0.2"], "keep"),
            (["--task", "math"], "--task math needs"),
            (["--n-samples", "1"], "--n-samples"),
            (["--resume", "x", "--seed", "1"], "--resume"),
        ],
    )
    def test_usage(self, command: Callable[..., Outcome], words: list[str], said: str) -> None:
        ended = command("rl", "sanity-set", *words)
        assert ended.code == 2
        assert said in ended.err

    def test_help_shows_an_example(self, command: Callable[..., Outcome]) -> None:
        assert "mismatch-probe rl sanity-set --task chain" in command("rl", "sanity-set", "-h").out

    def test_short_names_of_dtypes(self) -> None:
        assert SanityConfig(rollout_dtype="fp16").rollout_dtype == "float16"
        with pytest.raises(UsageError, match="--rollout-dtype"):
            SanityConfig(rollout_dtype="fp8")
