"""Faults that were planted in one weight of one side: which module is named, in real vLLM and real transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mismatch_probe.engines.attribute.trace import TraceFiles
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.engines.vllm.settings import rollout_settings
from mismatch_probe.types import DTYPES
from tests.real.attribute_jobs import TraceFaults
from tests.real.tiny import GROUPED, save_model
from validation.planted_code import FAULTS, WINDOW
from validation.planted_faults import (
    CODE_TOKENS,
    Trainer,
    accuracy,
    code_answers,
    names_it,
    rollout_job,
    trace,
    trace_request,
)

pytestmark = pytest.mark.engine
SIZE = 0.01


def names_of(checkpoint: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as handle:
        return sorted(handle.keys())


@pytest.fixture(scope="module")
def traces(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One engine in BF16: its clean trace, and one for each weight of it that was altered."""
    checkpoint, folder = tiny("llama"), tmp_path_factory.mktemp("traces")
    settings = rollout_settings("cpu", "bfloat16", eager=True, in_process=True, kv_cache_gib=1)
    job = TraceFaults(
        rollout_job(checkpoint, "bfloat16"), trace_request(checkpoint, folder), ["", *names_of(checkpoint)], SIZE
    )
    EngineProcess("vllm", settings.environment, folder / "vllm.log").run(job, lambda *_: None)
    return folder


@pytest.fixture(scope="module")
def trainer(tiny: Callable[[str], Path], traces: Path) -> Trainer:
    return Trainer(tiny("llama"), "bfloat16", traces / "clean")


def test_no_single_layer_of_clean_engines_stands_out(trainer: Trainer) -> None:
    found = trainer.locate()
    assert found.verdict == "no single layer"
    assert found.score < 1.6  # 1.44 on a CPU without BF16 instructions


def test_a_fault_of_the_trainer_is_named(trainer: Trainer) -> None:
    found = accuracy(trainer, list(trainer.weights), SIZE)
    assert found.cases == 30  # three layers of nine weights, embedding, last norm, head
    assert found.module >= 0.95 * found.cases
    assert found.layer >= 0.95 * found.cases


def test_a_fault_of_the_engine_is_named(tiny: Callable[[str], Path], traces: Path) -> None:
    right = {
        name: names_it(Trainer(tiny("llama"), "bfloat16", traces / name).locate(), name)
        for name in names_of(tiny("llama"))
    }
    assert sum(right.values()) >= 0.95 * len(right), [name for name, named in right.items() if not named]


def test_a_fault_below_rounding_is_not_made_up(trainer: Trainer) -> None:
    """At a tenth of what BF16 rounds no module may be blamed, neither the right one nor another."""
    for index, name in enumerate(trainer.weights):
        with trainer.altered(name, 2e-4, index):
            assert trainer.locate().verdict == "no single layer", name


def test_the_altered_weight_is_put_back(trainer: Trainer) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    before = trainer.weights[name].detach().clone()
    with trainer.altered(name, 0.5):
        assert not before.equal(trainer.weights[name].data)
        trainer.locate()
    assert before.equal(trainer.weights[name].data)


def test_traces_are_private(traces: Path) -> None:
    files = list((traces / "clean").iterdir())
    assert len(files) > 4
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    TraceFiles(traces / "nowhere").discard()  # which is not there


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trainer]:
    """A trainer of each dtype beside its engine, of a model whose layers attend to a window."""
    folder = tmp_path_factory.mktemp("windowed")
    checkpoint = save_model("MistralConfig", {**GROUPED, "sliding_window": WINDOW}, folder / "model")
    for dtype in DTYPES:
        trace(checkpoint, dtype, folder / dtype / "trace", CODE_TOKENS)
    return {dtype: Trainer(checkpoint, dtype, folder / dtype / "trace") for dtype in DTYPES}


def test_ends_of_layers_of_clean_engines_are_compared(windowed: dict[str, Trainer]) -> None:
    for trainer in windowed.values():
        inside = trainer.inside()
        assert inside.located is not None
        assert inside.located.verdict == "no single layer"
        ends = [tensor for tensor in inside.tensors if tensor.kind == "end"]
        assert [tensor.layer for tensor in ends] == [0, 1, 2]
        assert max(tensor.score for tensor in ends) < 1.3
        assert inside.end_score is not None
        assert inside.end_score < 1.3


# Layers that are named in bfloat16, float16 and float32; in the others it is said that none could be.
@pytest.mark.parametrize(
    ("fault", "strength", "named"),
    [
        ("MLP added to the residual, times", 1.03, (3, 3, 3)),
        ("MLP added to the residual, times", 1.0003, (0, 0, 3)),
        ("attention added to the residual, times", 1.03, (3, 3, 3)),
        ("softmax scale, times", 1.003, (0, 3, 3)),
        ("cosines and sines in BF16", 16, (0, 0, 3)),
        ("window of so many tokens for 64", WINDOW - 1, (3, 3, 3)),
        ("epsilon of a norm, times", 10, (0, 0, 3)),
    ],
)
def test_a_fault_in_a_layers_code_is_named_where_it_exceeds_rounding(
    windowed: dict[str, Trainer], fault: str, strength: float, named: tuple[int, ...]
) -> None:
    kind = next(kind for kind in FAULTS if kind.name == fault)
    answers = code_answers(windowed, kind, strength)
    assert [answers[dtype].named for dtype in DTYPES] == list(named)
    assert [answers[dtype].hidden for dtype in DTYPES] == [3 - count for count in named]
