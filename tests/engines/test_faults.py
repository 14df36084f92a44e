"""What engines raise becomes one sentence of what and one of what to do."""

from __future__ import annotations

import errno
import pickle
from dataclasses import replace
from typing import Any

import pytest

from mismatch_probe.engines import faults
from mismatch_probe.engines.base import RolloutJob, TrainerJob
from mismatch_probe.engines.encoding import EncodeJob
from mismatch_probe.errors import DiskFull, DtypeRefused, EngineError, EngineMissing, ModelError, ProbeError
from mismatch_probe.rl.worker import RlJob
from mismatch_probe.types import Sampling
from tests.conftest import Heard

ENCODE = EncodeJob("/models/m", [], chat=False, trust_remote_code=False)


def rollout(device: str = "cpu") -> RolloutJob:
    return RolloutJob("vllm", "/models/m", "float16", device, Sampling(8), [], 4, 0, 128)


def trainer() -> TrainerJob:
    return TrainerJob("hf", "/models/m", "bfloat16", "autocast", "padded", "sdpa", "cpu", 1.0, [], 0, 1 << 30)


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ValueError("No available memory for the cache blocks."),
        ValueError(
            "To serve one request, 9 GiB KV cache is needed, which is larger than the available KV cache memory"
        ),
        ValueError("Free memory on device (1/80 GiB) is less than desired GPU memory utilization (0.85, 68 GiB)."),
    ],
)
@pytest.mark.parametrize(
    ("job", "subject", "knob"),
    [
        (ENCODE, "The tokenizer", "--rollout-batch"),
        (rollout(), "The vllm rollout in float16", "--rollout-batch"),
        (rollout("cuda"), "The vllm rollout in float16", "gpu_memory_utilization=0.7"),
        (trainer(), r"The hf trainer in bfloat16 \(autocast\)", "--memory-budget"),
        (RlJob([], "", "cuda"), "The RL run", "micro_batch"),
    ],
)
def test_out_of_memory_names_the_knob_of_its_pass(error: Exception, job: Any, subject: str, knob: str) -> None:
    found = faults.classify(error, job)
    assert type(found) is EngineError
    with pytest.raises(EngineError, match=f"{subject} ran out of memory"):
        raise found
    assert knob in found.fix


@pytest.mark.parametrize(
    ("error", "job", "kind", "sentence"),
    [
        (
            ValueError(
                "1 validation error for ModelConfig\n  Value error, The model type 'gemma3' does not support float16. "
                "Reason: Numerical instability. Please use bfloat16 or float32 instead. [type=value_error]"
            ),
            rollout(),
            DtypeRefused,
            "vLLM does not support float16 for model type gemma3: Numerical instability.*instead. Leave this dtype out",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), trainer(), DiskFull, "The disk is full: The hf trainer"),
        (ImportError("No module named 'vllm'"), rollout(), EngineMissing, "No module named 'vllm'.*mismatch-probe env"),
        (ImportError(), rollout(), EngineMissing, "failed to import a module: ImportError"),
        (
            ValueError("Please pass the argument `trust_remote_code=True` to allow custom code to be run."),
            trainer(),
            ModelError,
            "/models/m contains Python code that loading would run. Read that code, then add --trust-remote-code",
        ),
    ],
)
def test_known_failures(error: Exception, job: Any, kind: type[ProbeError], sentence: str) -> None:
    found = faults.classify(error, job)
    assert type(found) is kind
    with pytest.raises(kind, match=sentence):
        raise found


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("Couldn't instantiate the backend tokenizer"), ModelError),
        (OSError("cannot find vocab"), ModelError),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (RuntimeError("boom"), RuntimeError),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def encode(job: Any) -> Any:
        raise error

    monkeypatch.setattr("mismatch_probe.engines.encoding.encode", encode)
    with pytest.raises(kind) as caught:
        ENCODE.run(Heard())
    assert type(caught.value) is kind


@pytest.mark.parametrize("job", [rollout(), trainer()])
def test_nobody_is_told_to_give_a_flag_that_was_given(job: Any) -> None:
    error = ValueError("Please pass the argument `trust_remote_code=True` to allow custom code to be run.")
    assert type(faults.classify(error, job)) is ModelError
    assert faults.classify(error, replace(job, trust_remote_code=True)) is None


def test_an_error_that_is_the_users_already_stays_as_it_is() -> None:
    error = ModelError("What.", "Fix.")
    assert faults.classify(error, rollout()) is error


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("x"), ValueError(), AssertionError()])
def test_what_is_not_known_is_not_guessed(error: Exception) -> None:
    assert faults.classify(error, rollout()) is None


def test_last_words_are_one_line_of_bounded_length() -> None:
    assert faults.first_line(RuntimeError("\n  first \n second")) == "RuntimeError: first"
    assert faults.first_line(RuntimeError()) == "RuntimeError"
    assert len(faults.first_line(RuntimeError("x" * 10_000))) < 400


@pytest.mark.parametrize("kind", [EngineError, DtypeRefused, ModelError, DiskFull])
def test_errors_travel_between_processes(kind: type[ProbeError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("What.", "Fix.")))
    assert (type(copy), copy.what, copy.fix, str(copy)) == (kind, "What.", "Fix.", "What. Fix.")
