"""`rl gradient` above the engine: which passes count, what is reused, what is refused, and what is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mismatch_probe
from mismatch_probe.engines.gradient import WEIGHTED, PassTask, PassVectors, SequenceTask, Vectors
from mismatch_probe.errors import ProbeError, TableError, UsageError
from mismatch_probe.metrics.gradient import GRADIENT_KEYS
from mismatch_probe.passes import RECORDED_ROLLOUT, PassId
from mismatch_probe.probes.gradient import session
from mismatch_probe.probes.gradient.plan import PassData, pass_data, task_of
from mismatch_probe.results.gradient import Gradient
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.types import MetricValue, PairArrays
from tests.conftest import SMALL, MakeModel, Outcome

REFERENCE = PassId.trainer("hf", "float32")
WIDTH = 256  # of a vector, where the worker has `DIRECTIONS`


def vectors_of(task: SequenceTask, row: int) -> Vectors:
    """As the worker would give them, of scores that are drawn."""
    score = np.random.default_rng(row).normal(size=WIDTH)
    of_tokens, weights = {}, {}
    for name in (found.name for found in WEIGHTED):
        for trainer, logprobs in task.trainers.items():
            ratio = np.exp(logprobs - task.rollout)
            if name.startswith("seq"):
                weights[name, trainer] = ratio.prod(keepdims=True)
            else:
                weights[name, trainer], of_tokens[name, trainer] = ratio, ratio.mean() * score
    return Vectors(score, of_tokens, weights, task.trainers[str(REFERENCE)])


def save(task: PassTask) -> None:
    rows = [vectors_of(sequence, row) for row, sequence in enumerate(task.sequences)]
    PassVectors.of(rows, task).save(task)


@pytest.fixture
def measured(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished 3×3 run, with a worker that draws its gradients."""
    monkeypatch.setattr(session, "_make_missing", lambda run, config, tasks, progress: [save(t) for t in tasks])
    return run_copy


def test_every_rollout_dtype_has_its_own_trainer_and_the_one_in_fp32(run_copy: Path) -> None:
    found, missing = pass_data(RunDirectory.open(run_copy))
    assert {name: [str(trainer) for trainer in data.pairs] for name, data in found.items()} == {
        "vllm-bfloat16-decode": ["hf-bfloat16-cast", "hf-float32-cast"],
        "vllm-float16-decode": ["hf-float16-cast", "hf-float32-cast"],
        "vllm-float32-decode": ["hf-float32-cast"],
    }
    assert missing == {}


def test_document_csv_and_pages(measured: Path) -> None:
    result = mismatch_probe.Run.open(measured).gradient(predict_lengths=(9, 17))
    assert Gradient.read(measured / "gradient" / "gradient.json") == result.document
    passes = {found.rollout_dtype: found for found in result.document.passes}
    assert [len(found.estimates) for found in passes.values()] == [11, 11, 6]
    for found in passes.values():
        assert found.estimates[0].correction == "none"
        assert found.n_tokens == 40 * 6
        for pair in found.pairs:
            assert [row.length for row in pair.lengths] == [9, 17]
            assert pair.mean_length == 6
    # A BF16 rollout is off by more than an FP16 one, and both by more than FP32.
    cosines = [found.estimates[0].metrics.cosine.value or 0.0 for found in passes.values()]
    assert cosines[0] < cosines[1] < cosines[2] <= 1
    own = {one.trainer_dtype: one for one in passes["bfloat16"].estimates if one.correction == "seq-is"}
    assert own["float32"].metrics.cosine.value == 1
    for draws in (own["float32"].draws.cosine, own["float32"].draws.norm_ratio):
        assert draws == pytest.approx((1, 1))
    assert own["bfloat16"].draws.cosine is not None
    low, high = own["bfloat16"].draws.cosine
    assert low < (own["bfloat16"].metrics.cosine.value or 0.0) < high < 1
    rows = pd.read_csv(measured / "gradient" / "gradient.csv")
    assert len(rows) == len(result.frame()) == (11 + 11 + 6) * len(GRADIENT_KEYS)
    row = rows.query("rollout_dtype == 'bfloat16' and trainer_pass == 'hf-bfloat16-cast' and metric == 'cosine'")
    assert row.set_index("correction").loc["seq-is", "value"] == own["bfloat16"].metrics.cosine.value
    assert {"report.html", "report.md", "gradient.png"} <= {path.name for path in (measured / "gradient").iterdir()}


def test_measured_ess_is_that_of_the_comparison(measured: Path) -> None:
    result = mismatch_probe.Run.open(measured).gradient()
    summary = json.loads((measured / "summary.json").read_text())
    for found in result.document.passes:
        for pair in found.pairs:
            (row,) = [
                row
                for row in summary["pairs"]
                if (row["rollout_pass"], row["trainer_pass"]) == (found.rollout_pass, pair.trainer_pass)
            ]
            for key in ("mean_abs_logprob_diff", "ess_seq", "ess_seq_gaussian"):
                assert getattr(pair, key) == MetricValue(**row["metrics"][key])


@pytest.fixture
def task(run_copy: Path) -> PassTask:
    """What the worker would be asked for the first rollout pass."""
    run = RunDirectory.open(run_copy)
    (data, *_) = pass_data(run)[0].values()
    return task_of(run, run.manifest.config, data)


class TestReuse:
    def test_finished_files_are_kept_whatever_else_is_asked(
        self, measured: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mismatch_probe.Run.open(measured).gradient()
        asked: list[PassTask] = []
        monkeypatch.setattr(session, "_make_missing", lambda run, config, tasks, progress: asked.extend(tasks))
        mismatch_probe.Run.open(measured).gradient(predict_lengths=(50,))
        assert all(PassVectors.load(task) is not None for task in asked)

    def test_other_log_probs_are_other_gradients(self, run_copy: Path) -> None:
        run = RunDirectory.open(run_copy)
        config = run.manifest.config
        (data, *_) = pass_data(run)[0].values()
        task = task_of(run, config, data)
        pairs = {trainer: _shifted(pair, 1e-12) for trainer, pair in data.pairs.items()}
        other = task_of(run, config, PassData.of(data.rollout, pairs))
        assert task.file.key == task_of(run, config, data).file.key != other.file.key

    @pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"PK"])
    def test_a_damaged_file_is_none(self, task: PassTask, damage: Callable[[bytes], bytes]) -> None:
        save(task)
        path = task.file.path
        assert PassVectors.load(task) is not None
        assert PassVectors.load(replace(task, file=replace(task.file, key="another"))) is None
        path.write_bytes(damage(path.read_bytes()))
        assert PassVectors.load(task) is None

    def test_a_file_holds_what_was_computed(self, task: PassTask) -> None:
        rows = [vectors_of(sequence, row) for row, sequence in enumerate(task.sequences)]
        made = PassVectors.of(rows, task)
        made.save(task)
        read = PassVectors.load(task)
        assert read is not None
        assert list(read.sums) == list(made.sums)
        for arm in made.sums:
            one, other = made.weighted(arm), read.weighted(arm)
            for name in ("vectors", "n_weights", "excess", "squared_excess"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            first = rows[3].of_tokens.get(arm, rows[3].weights[arm][0] * rows[3].score)
            np.testing.assert_allclose(one.vectors[3], first, rtol=1e-6)
            assert one.n_weights[3] == len(rows[3].weights[arm])


def _shifted(pair: PairArrays, by: float) -> PairArrays:
    return replace(pair, trainer_logprob=pair.trainer_logprob + by)


def test_sequences_that_are_empty_or_not_finite_are_counted_and_left_out() -> None:
    pair = PairArrays(
        rollout_logprob=np.array([-1.0, -2.0, np.nan, -1.0, -3.0]),
        trainer_logprob=np.full(5, -1.0),
        sequence=np.array([0, 0, 2, 2, 3]),
        position=np.array([0, 1, 0, 1, 0]),
        prompt=np.array([0, 0, 1, 1]),
    )
    data = PassData.of(REFERENCE, {REFERENCE: pair})  # type: ignore[arg-type]
    assert data.kept.tolist() == [0, 3]
    assert list(data.rows) == [slice(0, 2), slice(4, 5)]
    assert (data.n_empty, data.n_nonfinite, data.n_impossible) == (1, 1, 0)


def test_sequences_with_an_impossible_log_prob_are_counted_and_left_out() -> None:
    pair = PairArrays(
        rollout_logprob=np.array([-1.0, -9999.0, np.nan, -1.0, -3.0]),
        trainer_logprob=np.full(5, -1.0),
        sequence=np.array([0, 1, 2, 2, 3]),
        position=np.array([0, 0, 0, 1, 0]),
        prompt=np.zeros(4, np.int64),
        usable=np.array([True, False, False, True, True]),
    )
    data = PassData.of(REFERENCE, {REFERENCE: pair})  # type: ignore[arg-type]
    assert data.kept.tolist() == [0, 3]
    assert (data.n_empty, data.n_nonfinite, data.n_impossible) == (0, 1, 1)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, no_figures: None) -> None:
    """A worker that draws its gradients."""
    monkeypatch.setattr(session, "_make_missing", lambda run, config, tasks, progress: [save(t) for t in tasks])


class TestSources:
    def test_a_file_of_recorded_sequences(self, scripted_model: MakeModel, tmp_path: Path, drawn: None) -> None:
        rows = [
            {
                "prompt_token_ids": [65, 66 + i],
                "response_token_ids": [67, 68, 69],
                "rollout_logprobs": [-1.0, -2.0, -0.5],
            }
            for i in range(4)
        ]
        file = tmp_path / "recorded.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        result = mismatch_probe.rl_gradient(
            source=file, model=scripted_model(), trainer_dtypes=("bfloat16", "float32"), out=tmp_path / "run"
        )
        (found,) = result.document.passes
        assert (found.rollout_pass, found.n_tokens) == (str(RECORDED_ROLLOUT), 12)

    @pytest.mark.parametrize(("option", "n_passes"), [("--from", 1), ("--resume", 2)])
    def test_from_takes_a_run_as_it_is_and_resume_completes_it(
        self,
        option: str,
        n_passes: int,
        scripted_model: MakeModel,
        tmp_path: Path,
        drawn: None,
        command: Callable[..., Outcome],
    ) -> None:
        model = scripted_model(faults={"rollout-float16": "die-start"})
        asked = {**SMALL, "rollout_dtypes": ("bfloat16", "float16"), "trainer_dtypes": ("float32",)}
        run = mismatch_probe.compare(model=model, **asked, out=tmp_path / "run")
        assert not run.complete
        scripted_model()
        found = command("rl", "gradient", option, run.path, "--json")
        assert found.code == 0
        assert len(json.loads(found.out)["passes"]) == n_passes
        assert RunDirectory.open(run.path).complete == (n_passes == 2)


class TestRefusals:
    def test_a_run_without_the_fp32_trainer(self, scripted_model: MakeModel, tmp_path: Path, no_figures: None) -> None:
        run = mismatch_probe.compare(model=str(scripted_model()), **SMALL, out=tmp_path / "run")
        with pytest.raises(UsageError, match="no FP32 trainer pass"):
            mismatch_probe.Run.open(run.path).gradient()
        with pytest.raises(UsageError, match="needs an FP32 trainer pass"):
            mismatch_probe.rl_gradient(model=str(scripted_model()), **SMALL, out=tmp_path / "other")
        assert not (tmp_path / "other").exists()

    def test_a_model_without_weights(self, run_copy: Path) -> None:
        with pytest.raises(UsageError, match="no weights"):
            mismatch_probe.Run.open(run_copy).gradient()

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(TableError):
            mismatch_probe.Run.open(tmp_path / "nothing").gradient()
        assert not (tmp_path / "nothing").exists()

    def test_a_length_that_cannot_be(self, run_copy: Path) -> None:
        with pytest.raises(ProbeError, match="predict-length"):
            mismatch_probe.Run.open(run_copy).gradient(predict_lengths=(0,))

    def test_passes_that_decoded_foreign_sequences_are_named(
        self, scripted_model: MakeModel, tmp_path: Path, no_figures: None
    ) -> None:
        config = {
            "model": str(scripted_model()),
            "num_prompts": 4,
            "max_tokens": 4,
            "sequences": "shared",
            "rollout_dtypes": ("bfloat16", "float16"),
            "trainer_dtypes": ("bfloat16", "float32"),
        }
        run = mismatch_probe.compare(**config, out=tmp_path / "run")
        found, missing = pass_data(RunDirectory.open(run.path))
        assert list(found) == ["vllm-bfloat16-decode"]
        assert "did not sample them" in missing["vllm-float16-replay"]


class TestCommand:
    def test_table(self, measured: Path, command: Callable[..., Outcome]) -> None:
        found = command("rl", "gradient", "--from", measured)
        assert found.code == 0
        assert "seq-mis" in found.out
        assert str(measured / "gradient" / "report.html") in found.out

    def test_json_is_the_file(self, measured: Path, command: Callable[..., Outcome]) -> None:
        document = json.loads(command("rl", "gradient", "--from", measured, "--json").out)
        assert document == json.loads((measured / "gradient" / "gradient.json").read_text())

    def test_a_finished_run_takes_no_options_of_a_new_one(
        self, run_copy: Path, command: Callable[..., Outcome]
    ) -> None:
        found = command("rl", "gradient", "--from", run_copy, "--max-tokens", "5")
        assert found.code == 2
        assert "--max-tokens cannot be combined with --from or --resume" in found.err

    def test_help_shows_examples(self, command: Callable[..., Outcome]) -> None:
        found = command("rl", "gradient", "-h")
        assert found.code == 0
        assert "mismatch-probe rl gradient --from runs/" in found.out
        assert "--num-prompts" in found.out

    def test_from_and_resume_exclude_each_other(self, run_copy: Path, command: Callable[..., Outcome]) -> None:
        found = command("rl", "gradient", "--from", run_copy, "--resume", run_copy)
        assert found.code == 2
        assert "--from and --resume" in found.err
