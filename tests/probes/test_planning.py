"""What a comparison is going to run, before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.config import CompareConfig
from mismatch_probe.engines.devices import default_sizes
from mismatch_probe.errors import PromptError, UsageError
from mismatch_probe.probes.planning import (
    Plan,
    disk_gib,
    estimate,
    kv_cache_gib,
    make_plan,
    request_seed,
)
from mismatch_probe.runs.passes import passes_of
from mismatch_probe.types import DTYPES, EncodedPrompt
from tests.conftest import MakeModel


@pytest.fixture
def plan(scripted_model: MakeModel) -> Plan:
    return make_plan(CompareConfig(model=str(scripted_model()), num_prompts=3, samples_per_prompt=2))


def test_defaults_are_the_devices(scripted_model: MakeModel) -> None:
    found = make_plan(CompareConfig(model=str(scripted_model()), max_tokens=5))
    defaults = default_sizes("cpu")
    assert found.sizes.max_tokens == 5
    assert found.sizes.rollout_batch == defaults.rollout_batch
    assert found.sizes.num_prompts == len(found.prompts.prompts) == defaults.num_prompts


@pytest.mark.parametrize(("asked", "taken"), [(None, 70), (2, 2)])
def test_a_prompt_file_is_taken_whole_unless_a_number_is_asked_for(
    scripted_model: MakeModel, tmp_path: Path, asked: int | None, taken: int
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a prompt\n" * 70)
    found = make_plan(CompareConfig(model=str(scripted_model()), prompts=str(file), num_prompts=asked))
    assert found.sizes.num_prompts == len(found.prompts.prompts) == taken


def test_more_prompts_than_there_are(scripted_model: MakeModel) -> None:
    with pytest.raises(PromptError, match="--num-prompts 97 is outside"):
        make_plan(CompareConfig(model=str(scripted_model()), num_prompts=97))


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"trainer_dtypes": ("bfloat16", "float32")}, ["hf-bfloat16-cast", "hf-float32-cast"]),
        (
            {"trainer_modes": ("cast", "autocast"), "trainer_dtypes": ("float16", "float32")},
            ["hf-float16-cast", "hf-float16-autocast", "hf-float32-cast"],
        ),
        (
            {"trainer_modes": ("autocast",), "trainer_dtypes": ("float32", "bfloat16")},
            ["hf-float32-cast", "hf-bfloat16-autocast"],
        ),
    ],
)
def test_autocast_is_for_16_bits(options: dict[str, Any], passes: list[str]) -> None:
    assert [str(trainer) for trainer in passes_of(CompareConfig(**options)).trainers] == passes


def test_requests_have_ids_of_their_own_and_seeds_that_every_dtype_shares(plan: Plan) -> None:
    encoded = [EncodedPrompt(p.prompt_id, [1, 2]) for p in plan.prompts.prompts]
    by_dtype = {dtype: plan.requests(dtype, encoded) for dtype in DTYPES}
    ids = [request.sequence_id for requests in by_dtype.values() for request in requests]
    assert len(ids) == len(set(ids)) == 3 * 3 * 2
    seeds = [[request.seed for request in requests] for requests in by_dtype.values()]
    assert seeds[0] == seeds[1] == seeds[2]
    assert len(set(seeds[0])) == 6


def test_a_seed_depends_on_run_prompt_and_sample_alone() -> None:
    found = {request_seed(seed, prompt, sample) for seed in (0, 1) for prompt in ("a", "b") for sample in (0, 1)}
    assert len(found) == 8
    assert all(0 <= seed < 1 << 31 for seed in found)
    assert request_seed(0, "a", 0) == 1709443646  # with another value no earlier run could be repeated


def test_estimates_cover_every_pass(plan: Plan) -> None:
    rows = estimate(plan)
    assert [str(row.pass_id) for row in rows] == [
        *(f"vllm-{dtype}-decode" for dtype in DTYPES),
        *(f"hf-{dtype}-cast" for dtype in DTYPES),
    ]
    assert all(row.tokens > 0 and row.seconds > 0 and row.memory_gib is not None for row in rows)
    assert rows[3].tokens == 3 * rows[0].tokens
    assert 0 < disk_gib(plan, rows) < 0.001


@pytest.mark.parametrize(
    ("script", "gib"),
    [
        ({"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8}, 1),
        ({"num_hidden_layers": 200, "num_attention_heads": 128, "hidden_size": 16384}, 16),
        ({"text_config": {"num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}}, 1),
    ],
)
def test_the_kv_cache_stays_between_1_and_16_gib(scripted_model: MakeModel, script: dict[str, Any], gib: int) -> None:
    assert kv_cache_gib(make_plan(CompareConfig(model=str(scripted_model(**script))))) == gib


def test_a_cpu_does_not_replay_at_another_temperature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mismatch_probe.engines.vllm.choose_device", lambda _: "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 9}')
    (tmp_path / "tokenizer.json").write_text("{}")
    config = CompareConfig(model=str(tmp_path), sequences="shared", temperature=0.7)
    with pytest.raises(UsageError, match="cannot decode given ids again at a temperature other than 1"):
        make_plan(config, weights=False)
