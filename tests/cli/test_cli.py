"""The command line: exit codes, what goes to which stream, and no traceback for what a user can cause."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mismatch_probe
from mismatch_probe.files import locked
from mismatch_probe.run import Run
from tests.conftest import MakeModel, Outcome, Recorder, children, ended

Command = Callable[..., Outcome]
SMALL = ("--rollout-dtypes", "bf16", "--trainer-dtypes", "bf16", "--num-prompts", "4", "--max-tokens", "4")
TWO_BY_ONE = ("--rollout-dtypes", "bf16,fp16", "--trainer-dtypes", "bf16", "--num-prompts", "4", "--max-tokens", "4")
TOOL = [sys.executable, "-m", "mismatch_probe"]


def tool(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `mismatch-probe` in a process of its own."""
    return subprocess.run([*TOOL, *map(str, arguments)], capture_output=True, text=True, check=False, **options)


class TestHelp:
    def test_every_command_is_listed(self, command: Command) -> None:
        out = command("-h").out
        assert all(
            re.search(rf"^  {name} ", out, re.MULTILINE) for name in ("compare", "report", "plot", "models", "env")
        )

    def test_version(self, command: Command) -> None:
        assert re.fullmatch(r"mismatch-probe, version \d+\.\d+\.\d+\n", command("--version").out)

    @pytest.mark.parametrize("words", [["-h"], ["compare", "-h"]])
    def test_help_imports_nothing_heavy(self, words: list[str]) -> None:
        code = (
            "import sys\nfrom mismatch_probe.cli.main import main\n"
            "try:\n    main(sys.argv[1:])\nfinally:\n    print(*sys.modules, file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        loaded = {name.split(".")[0] for name in done.stderr.split()}
        assert not loaded & {
            "torch",
            "transformers",
            "vllm",
            "pandas",
            "pyarrow",
            "matplotlib",
            "numpy",
            "scipy",
            "rich",
        }
        assert "click" in loaded


class TestCompare:
    @pytest.mark.usefixtures("no_figures")
    def test_it_prints_the_summary_and_says_where_the_report_is(
        self, command: Command, scripted_model: MakeModel, tmp_path: Path
    ) -> None:
        found = command("compare", "--model", scripted_model(), *SMALL, "--out", tmp_path / "run")
        assert found.code == 0
        assert "bfloat16 → bfloat16" in found.out
        assert f"Report: {tmp_path / 'run' / 'report.html'}" in found.err
        assert "vllm-bfloat16-decode: done in" in found.err

    @pytest.mark.usefixtures("no_figures")
    def test_json_is_one_document_on_stdout(self, command: Command, scripted_model: MakeModel, tmp_path: Path) -> None:
        found = command("compare", "--model", scripted_model(), *SMALL, "--out", tmp_path / "run", "--json")
        assert json.loads(found.out) == json.loads((tmp_path / "run" / "summary.json").read_text())

    @pytest.mark.usefixtures("no_figures")
    @pytest.mark.parametrize(
        ("limits", "code"),
        [
            (["kl_k3>1000"], 0),
            (["kl_k3>1e-12"], 3),
            (["kl_k3>1000", "mean_abs_logprob_diff>1e-9@bf16"], 3),
            (["mean_abs_logprob_diff<1000@bf16/bf16"], 3),
        ],
    )
    def test_limits(self, command: Command, run_copy: Path, limits: list[str], code: int) -> None:
        options = [word for limit in limits for word in ("--fail-on", limit)]
        assert command("report", run_copy, *options).code == code

    @pytest.mark.usefixtures("no_figures")
    def test_nan_fails_a_limit(self, command: Command, scripted_model: MakeModel, tmp_path: Path) -> None:
        model = scripted_model({"trainer-bfloat16": "nan"})
        found = command("compare", "--model", model, *SMALL, "--out", tmp_path / "r", "--fail-on", "kl_k3>1000")
        assert found.code == 3

    @pytest.mark.usefixtures("no_figures")
    def test_a_failed_pass_is_an_error_that_says_how_to_go_on(
        self, command: Command, scripted_model: MakeModel, tmp_path: Path
    ) -> None:
        model = scripted_model({"rollout-float16": "die-generate"})
        run = tmp_path / "run"
        found = command("compare", "--model", model, *TWO_BY_ONE, "--out", run)
        assert found.code == 1
        assert "was killed (signal 9)" in found.err
        assert f"mismatch-probe compare --resume {run}" in found.err
        scripted_model()
        assert command("compare", "--resume", run).code == 0

    @pytest.mark.usefixtures("no_figures")
    def test_a_refused_dtype_is_no_error(self, command: Command, scripted_model: MakeModel, tmp_path: Path) -> None:
        model = scripted_model({"rollout-float16": "refuse"})
        found = command("compare", "--model", model, *TWO_BY_ONE, "--out", tmp_path / "run")
        assert found.code == 0
        assert "does not run in float16" in found.out

    def test_by_default_a_run_lies_under_runs(
        self, command: Command, scripted_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = scripted_model({"rollout-bfloat16": "refuse"})
        monkeypatch.chdir(tmp_path)
        assert command("compare", "--model", model, *SMALL).code == 1
        (run,) = (tmp_path / "runs").iterdir()
        assert re.fullmatch(r"model-\d{8}-\d{6}", run.name)

    @pytest.mark.parametrize("as_json", [[], ["--json"]])
    def test_a_plan_runs_and_writes_nothing(
        self,
        command: Command,
        scripted_model: MakeModel,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        as_json: list[str],
    ) -> None:
        monkeypatch.setattr("mismatch_probe.probes.workers.EngineProcess", None)
        monkeypatch.chdir(tmp_path)
        model = scripted_model()
        before = sorted(tmp_path.rglob("*"))
        found = command("compare", "--model", model, "--plan", "--out", "run", *as_json)
        assert found.code == 0
        assert sorted(tmp_path.rglob("*")) == before
        if as_json:
            document = json.loads(found.out)
            assert len(document["passes"]) == 6
            assert document["seconds"] == sum(row["seconds"] for row in document["passes"])
        else:
            assert "vllm-float16-decode" in found.out
            assert "factor of 2" in found.out


class TestUsage:
    """Exit code 2, one sentence of what and one of what to do."""

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--temperature", "0"], "--temperature must be above 0"),
            (["--num-prompts", "0"], "--num-prompts must be above 0"),
            (["--num-prompts", "many"], "--num-prompts must be a whole number, not 'many'"),
            (["--rollout-dtypes", "int8"], "--rollout-dtypes does not accept 'int8'"),
            (["--rollout-dtypes", ""], "--rollout-dtypes does not accept ''"),
            (["--trainer-dtypes", "bf16,bf16"], "--trainer-dtypes has a value twice"),
            (["--trainer-mode", "autocast", "--trainer-dtypes", "fp32"], "Autocast does not support float32"),
            (["--fail-on", "kl_k3>=1"], "has no finite number"),
            (["--fail-on", "nonsense>1"], "unknown metric 'nonsense'"),
            (["--fail-on", "kl_k3>1@fp16", "--rollout-dtypes", "bf16"], "applies to no pair"),
            (["--engine-arg", "hf_token=s3cret"], "--engine-arg hf_token is not allowed"),
            (["--engine-arg", "worker_cls=x.Y"], "--engine-arg worker_cls is not allowed"),
            (["--engine-arg", "dtype=half"], "Use --rollout-dtypes"),
            (["--engine-arg", "block_size"], "is not of the form name=value"),
            (["--engine-arg", "trust-remote-code=true"], "is not of the form name=value"),
            (["--engine-arg", "x=NaN"], "has a value that JSON cannot represent"),
            (["--no-such-option"], "No such option"),
            (["--device", "tpu"], "--device does not accept 'tpu'"),
        ],
    )
    def test_what_cannot_be(self, command: Command, arguments: list[str], sentence: str) -> None:
        found = command("compare", "--model", "scripted", *arguments)
        assert (found.code, found.out) == (2, "")
        assert sentence in found.err
        assert "s3cret" not in found.err
        assert "Traceback" not in found.err

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["--max-tokens", "9"], "--max-tokens"),
            (["--trainer-mode", "cast"], "--trainer-mode"),
            (["--chat"], "--chat"),
            (["--seed", "1"], "--seed"),
            (["--self-noise-tokens", "0"], "--self-noise-tokens"),
            (["--rollout-dtypes", "bf16"], "--rollout-dtypes"),
        ],
    )
    def test_a_resumed_run_stays_what_it_was(
        self, command: Command, finished: Run, arguments: list[str], named: str
    ) -> None:
        found = command("compare", "--resume", finished.path, *arguments)
        assert (found.code, found.out) == (2, "")
        assert found.err == (
            f"Error: {named} cannot be combined with --resume: a run continues as it was configured.\n  Leave it out.\n"
        )

    @pytest.mark.parametrize(("arguments", "named"), [(["--out", "other"], "--out"), (["--plan"], "--plan")])
    def test_a_resumed_run_has_its_folder_and_its_plan(
        self, command: Command, finished: Run, arguments: list[str], named: str
    ) -> None:
        found = command("compare", "--resume", finished.path, *arguments)
        assert (found.code, found.out) == (2, "")
        assert (
            found.err
            == f"Error: {named} cannot be combined with --resume: it applies only to new runs.\n  Leave it out.\n"
        )

    @pytest.mark.parametrize(
        ("arguments", "named", "finished_pass"),
        [
            (["--engine-arg", "a=1"], "--engine-arg", "vllm-bfloat16-decode"),
            (["--rollout-batch", "2"], "--rollout-batch", "vllm-bfloat16-decode"),
            (["--eager"], "--eager", "vllm-bfloat16-decode"),
            (["--trainer-layout", "single"], "--trainer-layout", "hf-bfloat16-cast"),
            (["--trainer-attn", "eager"], "--trainer-attn", "hf-bfloat16-cast"),
        ],
    )
    def test_changes_that_come_too_late(
        self, command: Command, finished: Run, arguments: list[str], named: str, finished_pass: str
    ) -> None:
        before = (finished.path / "manifest.json").read_bytes()
        found = command("compare", "--resume", finished.path, *arguments)
        assert (found.code, found.out) == (2, "")
        assert found.err == (
            f"Error: {named} cannot change any more: {finished_pass} has finished without it.\n"
            "  Leave it out, or start a new run.\n"
        )
        assert (finished.path / "manifest.json").read_bytes() == before

    @pytest.mark.usefixtures("no_figures")
    def test_a_resumed_run_may_get_another_memory_budget(self, command: Command, run_copy: Path) -> None:
        assert command("compare", "--resume", run_copy, "--memory-budget", "2.5").code == 0
        manifest = json.loads((run_copy / "manifest.json").read_text())
        assert manifest["config"]["memory_budget_gib"] == manifest["sizes"]["memory_budget_gib"] == 2.5

    def test_an_output_folder_in_use(self, command: Command, scripted_model: MakeModel, run_copy: Path) -> None:
        found = command("compare", "--model", scripted_model(), "--out", run_copy)
        assert found.code == 2
        assert "is not empty" in found.err

    def test_two_processes_on_one_run(self, command: Command, run_copy: Path) -> None:
        with locked(run_copy):
            found = command("compare", "--resume", run_copy)
        assert found.code == 2
        assert "Another process is using" in found.err

    def test_an_unknown_command(self, command: Command) -> None:
        assert command("explode").code == 2


class TestErrors:
    """Exit code 1, and never a traceback."""

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["compare", "--model", "./nothing"], "The model folder './nothing'"),
            (["compare", "--model", "{model}", "--prompts", "gone.txt"], "gone.txt does not exist"),
            (["compare", "--model", "{model}", "--prompts", "gone.csv"], "has the suffix '.csv'"),
            (["compare", "--model", "{model}", "--num-prompts", "1000"], "--num-prompts 1000 is outside 1 to 96"),
            (["compare", "--model", "{model}", "--out", "{model}/config.json/x"], "cannot be used as a run folder"),
            (["compare", "--resume", "{model}"], "holds no comparison"),
            (["compare", "--resume", "{model}/config.json"], "holds no comparison"),
            (["report", "{model}"], "holds no comparison"),
            (["report", "x" * 5000], "holds no comparison"),
            (["plot", "{model}"], "holds no comparison"),
            (["models", "path", "nothing"], "'nothing' is not a built-in model"),
            (["models", "pull", "./nothing"], "The model folder"),
        ],
    )
    def test_a_sentence_and_an_advice(
        self, command: Command, scripted_model: MakeModel, arguments: list[str], sentence: str
    ) -> None:
        model = str(scripted_model())
        found = command(*(word.replace("{model}", model) for word in arguments))
        assert found.code == (2 if "run folder" in sentence else 1)
        assert found.out == ""
        first, advice = found.err.splitlines()[-2:]
        assert first.startswith("Error: ")
        assert sentence in first
        assert advice.startswith("  ")
        assert "Traceback" not in found.err

    @pytest.mark.parametrize("option", ["--model", "--prompts", "--fail-on", "--rollout-dtypes", "--resume"])
    def test_hostile_text_does_not_reach_the_terminal(self, command: Command, tmp_path: Path, option: str) -> None:
        hostile = f"{tmp_path}/\x1b]0;owned\x07\x1b[31m\x9b\u202e.txt"
        found = command("compare", option, hostile)
        assert found.code in (1, 2)
        assert "owned" in found.err
        assert not set("\x1b\x07\x9b\u202e") & set(found.err)

    def test_hostile_options_do_not_either(self, command: Command) -> None:
        assert "\x1b" not in command("compare", "--\x1b[31mred").err
        assert "\x1b" not in command("\x1b[31mred").err

    @pytest.mark.usefixtures("no_figures")
    def test_an_engines_last_words_do_not_either(
        self, command: Command, scripted_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mismatch_probe.engines import faults

        real = faults.unexpected
        monkeypatch.setattr(faults, "unexpected", lambda error, *rest: real("\x1b[31mred", *rest))
        model = scripted_model({"rollout-float16": "crash-start"})
        found = command("compare", "--model", model, *TWO_BY_ONE, "--out", tmp_path / "run")
        assert found.code == 1
        assert "red" in found.err
        assert "\x1b" not in found.err + found.out

    def test_report_and_plot_of_a_corrupt_table(self, command: Command, run_copy: Path) -> None:
        (run_copy / "tokens.parquet").write_bytes(b"PAR1")
        for name in ("report", "plot"):
            found = command(name, run_copy)
            assert (found.code, found.out) == (1, "")
            assert "tokens.parquet is corrupt or truncated" in found.err

    def test_a_bug_keeps_its_traceback(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        def bug(**_: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(mismatch_probe, "plan", bug)
        from mismatch_probe.cli.main import main

        with pytest.raises(RuntimeError, match="a bug"):
            main(["compare", "--plan"])


class TestModels:
    def test_list_and_path(self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MISMATCH_PROBE_CACHE", str(tmp_path))
        assert json.loads(command("models", "list", "--json").out)["smollm2-135m"]["path"] is None
        assert "models pull smollm2-135m" in command("models", "list").out
        assert command("models", "path", "smollm2-135m").code == 1
        folder = tmp_path / "models" / "smollm2-135m"
        folder.mkdir(parents=True)
        assert command("models", "path", "smollm2-135m").out == f"{folder}\n"
        assert str(folder) in command("models", "list").out

    def test_pull_prints_the_folder(self, command: Command, scripted_model: MakeModel) -> None:
        model = scripted_model()
        assert command("models", "pull", model).out == f"{model}\n"


class TestEnv:
    """Exit codes and output; what is found out, and how, is tested with `engines.environment`."""

    @pytest.fixture
    def found(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
        """Sets what the check in a child finds, on a machine that vLLM's build fits."""
        monkeypatch.setattr("mismatch_probe.engines.vllm.choose_device", lambda requested: "cpu")
        return lambda found: monkeypatch.setattr(
            "mismatch_probe.engines.environment._probe", lambda: {"failure": "", **found}
        )

    def test_usable(self, command: Command, found: Callable[[dict[str, Any]], None]) -> None:
        found({"hf": "", "vllm": "", "platform": "cpu", "dtypes": ["bfloat16", "float32"], "torch": {"devices": []}})
        shown = command("env", "--json")
        document = json.loads(shown.out)
        assert shown.code == 0
        assert document["engines"]["vllm"]["dtypes"]["bfloat16"] == ""
        assert "does not support" in document["engines"]["vllm"]["dtypes"]["float16"]
        assert "float16   no: vLLM's build" in command("env").out

    @pytest.mark.parametrize("broken", ["vllm", "hf"])
    def test_a_comparison_needs_both_engines(
        self, command: Command, found: Callable[[dict[str, Any]], None], broken: str
    ) -> None:
        found({"hf": "", "vllm": "", "platform": "cpu", "dtypes": ["bfloat16"], broken: "ImportError: broken"})
        shown = command("env")
        assert shown.code == 3
        assert shown.out.count("not usable: ImportError: broken") == 1

    def test_nothing_usable(self, command: Command, found: Callable[[dict[str, Any]], None]) -> None:
        found({"failure": "ModuleNotFoundError: No module named 'torch'"})
        shown = command("env")
        assert shown.code == 3
        assert shown.out.count("not usable: ModuleNotFoundError: No module named 'torch' Run: pip install") == 2


class TestSignals:
    """A run that is stopped from outside leaves no process, and a folder that goes on."""

    def start(self, run: Path, model: Path, *, until: str, work: int = 4) -> subprocess.Popen[str]:
        """Starts a run of `work` prompts and tokens, and returns when its stderr has said `until`."""
        sizes = ["--num-prompts", str(work), "--max-tokens", str(work)]
        options = [*TWO_BY_ONE, *sizes, "--model", str(model), "--out", str(run)]
        process = subprocess.Popen([*TOOL, "compare", *options], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if until in line:
                return process
        raise AssertionError("the run ended too early")

    @pytest.mark.usefixtures("no_figures")
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_polite_stop(self, scripted_model: MakeModel, tmp_path: Path, number: signal.Signals) -> None:
        run = tmp_path / "run"
        model = scripted_model({"rollout-float16": "hang-generate"})
        with self.start(run, model, until="vllm-float16-decode: starting") as process:
            workers = children(process.pid)
            process.send_signal(number)
            assert process.stderr is not None
            said = process.stderr.read()
        assert process.returncode == 130
        assert "Error: Stopped; finished passes are kept." in said
        assert f"Continue with: mismatch-probe compare --resume {run}" in said
        assert "Traceback" not in said
        assert workers
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
        assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
        scripted_model()
        recorder = Recorder()
        assert mismatch_probe.Run.open(run).resume(progress=recorder).complete
        assert recorder.begun == ["encode", "vllm-float16-decode", "hf-bfloat16-cast"]

    @pytest.mark.usefixtures("no_figures")
    def test_a_kill(self, scripted_model: MakeModel, tmp_path: Path) -> None:
        run = tmp_path / "run"
        with self.start(run, scripted_model(), until="vllm-float16-decode: starting", work=50) as process:
            workers = children(process.pid)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert all(ended(pid) for pid in workers), "a worker outlived its parent"
        assert json.loads((run / "manifest.json").read_text())["status"] == "running"
        recorder = Recorder()
        assert mismatch_probe.Run.open(run).resume(progress=recorder).complete
        assert recorder.begun == ["encode", "vllm-float16-decode", "hf-bfloat16-cast"]

    def test_a_reader_that_goes_away_is_no_traceback(self, finished: Run) -> None:
        """`mismatch-probe report RUN --json | head -1`"""
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as stdout:
            done = subprocess.run(
                [*TOOL, "models", "list"], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
