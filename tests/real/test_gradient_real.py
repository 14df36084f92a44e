"""`rl gradient` on real models: against full gradients in float64, and from the engines to the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mismatch_probe
from mismatch_probe.engines.gradient import DIRECTIONS
from mismatch_probe.errors import TableError
from mismatch_probe.metrics.gradient import Weighted, gradient_metrics
from mismatch_probe.probes.gradient.plan import pass_data
from mismatch_probe.results.gradient import Gradient
from tests.conftest import Recorder
from tests.real.gradient_runs import plant_run
from tests.real.planted import change_weights

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]


def full_scores(checkpoint: Path, sequences: list[tuple[list[int], list[int]]], weights: list[Any]) -> np.ndarray:
    """`[n, parameters]` ∇ Σ w_t log π(y_t) by plain transformers, all of it in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager").eval()
    rows = []
    for (prompt, response), w in zip(sequences, weights, strict=True):
        logprobs = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        chosen = logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]
        found = torch.autograd.grad((chosen * torch.as_tensor(w)).sum(), list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in found]).numpy())
    return np.stack(rows)


def test_projected_gradients_give_what_full_ones_in_float64_give(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = tiny("llama")
    run = plant_run(tmp_path / "run", checkpoint, {"bfloat16": 0.35, "float32": 0.0})
    result = mismatch_probe.Run.open(run.path).gradient()
    bf16, fp32 = result.document.passes
    assert (bf16.n_sequences, bf16.n_empty, bf16.n_nonfinite) == (15, 1, 0)
    assert bf16.logprob_gap < 1e-5

    data = pass_data(run)[0]["vllm-bfloat16-decode"]
    table = run.sequences("vllm-bfloat16-decode").to_pylist()
    sequences = [(table[i]["prompt_token_ids"], table[i]["response_token_ids"]) for i in data.kept]
    pair = data.pairs[data.reference]
    d = [pair.trainer_logprob[rows] - pair.rollout_logprob[rows] for rows in data.rows]
    w = np.exp([x.sum() for x in d])
    ones, capped = [np.ones(len(x)) for x in d], [np.minimum(np.exp(x), 2.0) for x in d]
    plain, of_tokens = (full_scores(checkpoint, sequences, weights) for weights in (ones, capped))
    zeros = np.zeros(len(d))
    expected = {
        ("none", None): plain,
        ("token-tis", str(data.reference)): of_tokens,
        ("seq-is", str(data.reference)): w[:, None] * plain,
        ("seq-mis", str(data.reference)): np.where(w > 3, 0, w)[:, None] * plain,
    }
    found = {(one.correction, one.trainer_pass): one.metrics for one in bf16.estimates}
    for key, vectors in expected.items():
        exact = gradient_metrics(
            Weighted(vectors, zeros + 1, zeros, zeros), plain, w[:, None] * plain, pair.prompt[data.kept], replicates=20
        )
        for name in ("cosine", "norm_ratio", "added_variance", "effective_batch"):
            value = getattr(exact, name).value
            assert value is not None
            error = abs(getattr(found[key], name).value - value)
            assert error < 5 / np.sqrt(DIRECTIONS * len(d)) + 1e-6, (key, name, error)

    # Without noise the FP32 trainer is the policy that sampled.
    for one in fp32.estimates:
        for name, metric in vars(one.metrics).items():
            same = 0.0 if name == "added_variance" else 1.0
            assert metric.value == pytest.approx(same, abs=1e-6), (one.correction, name)


def test_a_second_call_starts_no_engine_and_says_the_same(tiny: Tiny, tmp_path: Path) -> None:
    run = plant_run(tmp_path / "run", tiny("qwen3"), {"float16": 0.05})
    first, again = Recorder(), Recorder()
    before = mismatch_probe.Run.open(run.path).gradient(progress=first)
    after = mismatch_probe.Run.open(run.path).gradient(progress=again)
    assert (first.begun, again.begun) == (["gradient"], [])
    assert before.document == after.document
    file = run.path / "gradient" / "vllm-float16-decode.npz"
    file.write_bytes(file.read_bytes()[:-100])
    mismatch_probe.Run.open(run.path).gradient(progress=again)
    assert again.begun == ["gradient"]


def test_another_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = change_weights(tiny("qwen3"), tmp_path / "model", lambda weights: None)
    run = plant_run(tmp_path / "run", checkpoint, {"float16": 0.05})
    (checkpoint / "extra.json").write_text("{}")
    with pytest.raises(TableError, match="files have changed"):
        mismatch_probe.Run.open(run.path).gradient()


def test_from_the_engines_to_the_files(tiny: Tiny, tmp_path: Path) -> None:
    result = mismatch_probe.rl_gradient(
        model=str(tiny("qwen3")),
        num_prompts=8,
        max_tokens=16,
        rollout_dtypes=["bfloat16"],
        trainer_dtypes=["bfloat16", "float32"],
        self_noise_tokens=0,
        out=tmp_path / "run",
    )
    folder = tmp_path / "run" / "gradient"
    assert Gradient.read(folder / "gradient.json") == result.document
    assert len((folder / "gradient.csv").read_text().splitlines()) == len(result.frame()) + 1
    assert result.figures == {"gradient": folder / "gradient.png"}
    assert (folder / "gradient.png").stat().st_size > 10_000
    (found,) = result.document.passes
    estimates = {(one.correction, one.trainer_dtype): one.metrics for one in found.estimates}
    assert len(estimates) == 1 + 2 * 5
    # A tiny model in BF16: close to FP32, and not the same.
    assert 0.9 < (estimates["none", None].cosine.value or 0) < 1 - 1e-9
    assert estimates["seq-is", "float32"].cosine.value == 1.0
    assert found.logprob_gap < 1e-4
    assert result.document.missing == ()
