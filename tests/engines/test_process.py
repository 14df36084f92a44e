"""An engine process ends with its job, with its parent, and with every kind of failure; and says which it was."""

from __future__ import annotations

import os
import pickle
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.engines.base import Job, RolloutJob, TrainerJob
from mismatch_probe.engines.encoding import EncodeJob
from mismatch_probe.engines.events import (
    Advance,
    Encoded,
    Event,
    Identity,
    Phase,
    Rollouts,
    Scores,
    Texts,
    Total,
)
from mismatch_probe.engines.process import EngineProcess, UnexpectedEngineError
from mismatch_probe.errors import DtypeRefused, EngineError, EngineMissing
from mismatch_probe.types import Prompt, Rollout, RolloutRequest, Sampling, ScoreRequest
from tests.conftest import Heard, MakeModel, ended


def rollout_job(model: Path, **options: Any) -> RolloutJob:
    requests = [RolloutRequest(i, [65, 66], seed=i) for i in range(5)]
    sampling = Sampling(max_tokens=options.pop("max_tokens", 4))
    return RolloutJob("scripted", str(model), "float16", "cpu", sampling, requests, 2, 3, 128, **options)


def trainer_job(model: Path) -> TrainerJob:
    requests = [ScoreRequest(i, [65], [66, 67]) for i in range(10)]
    return TrainerJob("scripted", str(model), "float16", "cast", "padded", "sdpa", "cpu", 1.0, requests, 5, 1 << 30)


def run(job: Job, folder: Path, environment: dict[str, str] | None = None) -> tuple[EngineProcess, Heard]:
    process, events = EngineProcess("scripted", environment or {}, folder / "logs" / "engine.log"), Heard()
    process.run(job, events)
    return process, events


def done(events: Heard) -> int:
    """Units of work that were reported."""
    return sum(event.amount for event in events.of(Advance))


def responses(events: Heard, *, again: bool = False) -> list[Sequence[Rollout]]:
    return [event.rollouts for event in events.of(Rollouts) if event.again is again]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


class TestEvents:
    def test_a_rollout(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        process, events = run(rollout_job(scripted_model()), tmp_path, {"OMP_NUM_THREADS": "1", "HF_TOKEN": "secret"})
        batches = responses(events)
        assert [len(batch) for batch in batches] == [2, 3]  # the first alone, the others to the engine's scheduler
        first = {r.sequence_id: r for batch in batches for r in batch}
        assert sorted(first) == [0, 1, 2, 3, 4]
        (null,) = responses(events, again=True)
        assert [r.response_token_ids for r in null] == [first[i].response_token_ids[:3] for i in (0, 1)]
        assert [r.logprobs for r in null] == [first[i].logprobs[:3] for i in (0, 1)]
        assert done(events) == events.of(Total)[0].amount == 5 * 4 + 2 * 3
        assert [event.name for event in events.of(Phase)] == [
            "import",
            "wait",
            "load",
            "first_step",
            "generate",
            "self_noise",
        ]
        (texts,) = (event.texts for event in events.of(Texts))
        assert all(texts[token] == chr(token) for r in first.values() for token in r.response_token_ids)
        (identity,) = (event.facts for event in events.of(Identity))
        assert identity["environment"]["OMP_NUM_THREADS"] == "1"
        assert {"versions", "machine"} <= identity.keys()
        assert "secret" not in str(identity)
        assert gone(process.pid)

    def test_short_responses_still_fill_the_bar(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        _, events = run(rollout_job(scripted_model(response_length=1)), tmp_path)
        assert done(events) == 5 * 4 + 2

    def test_one_batch_is_enough_for_few_requests(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        _, events = run(replace(rollout_job(scripted_model()), batch=8), tmp_path)
        assert [len(batch) for batch in responses(events)] == [5]
        assert [len(batch) for batch in responses(events, again=True)] == [5]

    def test_a_trainer(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        _, events = run(trainer_job(scripted_model()), tmp_path)
        scores = [score for event in events.of(Scores) if not event.again for score in event.scores]
        again = [score for event in events.of(Scores) if event.again for score in event.scores]
        assert [s.sequence_id for s in scores] == list(range(10))
        assert [s.logprobs for s in again] == [
            s.logprobs for s in scores[:8]
        ]  # whole batches of four, at least five sequences
        assert done(events) == events.of(Total)[0].amount == (10 + 8) * 3

    def test_encoding(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        prompts = [Prompt("a", text="AB"), Prompt("b", messages=({"role": "user", "content": "C"},))]
        _, events = run(EncodeJob(str(scripted_model()), prompts, False, False), tmp_path)
        ((first, second),) = (event.prompts for event in events.of(Encoded))
        assert (first.prompt_id, first.token_ids, second.prompt_id) == ("a", [65, 66], "b")


class TestSeveralJobs:
    def test_each_is_what_it_is_in_a_process_of_its_own(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        model = scripted_model()
        process = EngineProcess("scripted", {}, tmp_path / "engine.log")
        for index, job in enumerate(jobs := [rollout_job(model), trainer_job(model), rollout_job(model)]):
            last, shared, (_, own) = index == len(jobs) - 1, Heard(), run(job, tmp_path)
            process.run(job, shared, last=last)
            assert gone(process.pid) is last
            for kind in (Identity, Total, Advance, Rollouts, Scores, Texts):
                assert repr(shared.of(kind)) == repr(own.of(kind))  # type: ignore[type-var]

    def test_one_that_fails_ends_it(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        process = EngineProcess("scripted", {}, tmp_path / "engine.log")
        process.run(trainer_job(scripted_model()), Heard(), last=False)
        broken = scripted_model(faults={"rollout-float16": "crash-generate"})
        with pytest.raises(UnexpectedEngineError, match="a scripted crash"):
            process.run(rollout_job(broken), Heard(), last=False)
        assert gone(process.pid)


class TestFailures:
    @pytest.mark.parametrize(
        ("fault", "kind", "sentence"),
        [
            ("refuse", DtypeRefused, "does not run in float16"),
            ("memory-start", EngineError, "The scripted rollout in float16 ran out of memory. Lower --rollout-batch"),
            ("memory-generate", EngineError, "ran out of memory"),
            ("crash-start", UnexpectedEngineError, "failed: RuntimeError: a scripted crash .*log is .*engine.log"),
            ("crash-generate", UnexpectedEngineError, "failed: RuntimeError: a scripted crash"),
            ("die-start", EngineError, r"was killed \(signal 9\)"),
            ("die-generate", EngineError, r"was killed \(signal 9\)"),
        ],
    )
    def test_each_fault_is_a_sentence(
        self, scripted_model: MakeModel, tmp_path: Path, fault: str, kind: type[EngineError], sentence: str
    ) -> None:
        model = scripted_model(faults={"rollout-float16": fault})
        with pytest.raises(kind, match=sentence) as caught:
            run(rollout_job(model), tmp_path)
        assert caught.value.fix

    def test_the_log_holds_the_whole_story(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        model = scripted_model(faults={"rollout-float16": "crash-generate"})
        with pytest.raises(UnexpectedEngineError) as caught:
            run(rollout_job(model), tmp_path)
        named = re.search(r"log is (.*)\.$", caught.value.fix)
        assert named is not None
        text = Path(named[1]).read_text()
        assert "Traceback" in text
        assert "RuntimeError: a scripted crash" in text

    def test_death_before_the_job(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        process = EngineProcess("scripted", {}, tmp_path / "engine.log")
        os.kill(process.pid, signal.SIGSEGV)
        with pytest.raises(UnexpectedEngineError, match="its process ended with signal 11"):
            process.run(rollout_job(scripted_model()), lambda *_: None)

    @pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "OSError"])
    def test_a_package_that_does_not_import(self, scripted_model: MakeModel, tmp_path: Path, error: str) -> None:
        """Broken binary packages raise anything; the reason has to reach the user all the same."""
        (tmp_path / "vllm.py").write_text(f"raise {error}('operator torchvision::nms does not exist')")
        process = EngineProcess("vllm", {"PYTHONPATH": str(tmp_path)}, tmp_path / "engine.log")
        with pytest.raises(
            EngineMissing, match=r"failed to import a module: .*torchvision::nms does not exist.*probe env"
        ):
            process.run(rollout_job(scripted_model()), lambda *_: None)

    def test_what_ended_an_import_ahead_of_the_job_is_told(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        said = "Fatal Python error: Illegal instruction"
        (tmp_path / "vllm.py").write_text(f"import os\nos.write(2, b'{said}\\n')\nos._exit(1)\n")
        process = EngineProcess("vllm", {"PYTHONPATH": str(tmp_path)}, tmp_path / "engine.log")
        assert select.select([process._connection], [], [], 60)[0]  # the process has ended
        with pytest.raises(UnexpectedEngineError, match=said):
            process.run(rollout_job(scripted_model()), lambda *_: None)

    def test_an_end_of_file_in_the_engine_is_the_engines(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        """It is not the parent that has gone."""
        (tmp_path / "vllm.py").write_text(
            "LLM = None\nfrom mismatch_probe.engines import scripted\n"
            "def generate(*_):\n    raise EOFError('Ran out of input')\n"
            "scripted.ScriptedRollout.generate = generate\n"
        )
        process = EngineProcess("vllm", {"PYTHONPATH": str(tmp_path)}, tmp_path / "engine.log")
        with pytest.raises(UnexpectedEngineError, match="failed: EOFError: Ran out of input"):
            process.run(rollout_job(scripted_model()), lambda *_: None)

    def test_an_error_of_the_listener_is_its_own(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        """A closed terminal, for one, is no death of the engine."""

        def broken(event: Event) -> None:
            raise BrokenPipeError("stderr is closed")

        process = EngineProcess("scripted", {}, tmp_path / "engine.log")
        with pytest.raises(BrokenPipeError, match="stderr is closed"):
            process.run(rollout_job(scripted_model()), broken)
        assert gone(process.pid)


class TestLifetime:
    def test_closing_ends_a_process_that_waits_for_its_job(self, tmp_path: Path) -> None:
        process = EngineProcess("scripted", {}, tmp_path / "engine.log")
        assert not gone(process.pid)
        process.close()
        assert gone(process.pid)

    def test_it_is_out_of_reach_of_the_terminals_ctrl_c(self, tmp_path: Path) -> None:
        process = EngineProcess("scripted", {}, tmp_path / "engine.log")
        try:
            assert os.getsid(process.pid) == process.pid != os.getsid(0)
        finally:
            process.close()

    @pytest.mark.parametrize("moment", ["waits", "works", "hears the end"])
    def test_it_ends_when_its_parent_is_killed(self, scripted_model: MakeModel, tmp_path: Path, moment: str) -> None:
        """And with it what it has started, as vLLM starts its engine core.

        The parent tells the worker's pid, and is killed before it gives it the job, after the first rollouts, or after
        the job's end, of which the worker hears nothing.
        """
        (tmp_path / "vllm.py").write_text(
            "LLM = None\nimport pathlib, subprocess\nchild = subprocess.Popen(['sleep', '300'])\n"
            "pathlib.Path(__file__).with_name('child').write_text(str(child.pid))\n"
        )
        parent = (
            "import os, pickle, signal, sys\nfrom pathlib import Path\n"
            "from mismatch_probe.engines.process import EngineProcess\n"
            "log = Path(sys.argv[1])\n"
            "process = EngineProcess('vllm', {'PYTHONPATH': str(log.parent)}, log)\n"
            "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            "print(process.pid, flush=True)\n"
            "sys.argv[2] == 'waits' and die()\n"
            "process._process.wait = die\n"  # the first thing that the parent does after the job's end
            "last = sys.argv[2] == 'works' and 'Rollouts'\n"
            "process.run(pickle.load(sys.stdin.buffer), lambda event: type(event).__name__ == last and die())\n"
        )
        job = pickle.dumps(rollout_job(scripted_model(), max_tokens=600))
        command = [sys.executable, "-c", parent, str(tmp_path / "engine.log"), moment]
        done = subprocess.run(command, input=job, capture_output=True, check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL
        assert ended(int(done.stdout)), "the worker outlived its parent"
        assert ended(int((tmp_path / "child").read_text())), "the worker's child outlived it"
