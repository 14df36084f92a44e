"""Layouts that no framework writes and people do: what is suggested reads them, or what cannot be read is said."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.read import parse_map
from mismatch_probe.ingest.suggest import suggested
from tests.ingest.rows import Read, Row, read, write_jsonl

P, R, B, A, REF = [5, 6, 7], [8, 9], [-0.5, -1.25], [-0.75, -1.0], [-0.625, -1.5]
NAMES = {"P": "prompt_token_ids", "R": "response_token_ids", "B": "rollout_logprobs", "A": "trainer_logprobs"}


def refusal(path: Path) -> IngestError:
    with pytest.raises(IngestError) as caught:
        read(path, trust_pickle=True)
    assert (caught.value.what + caught.value.fix).isprintable()
    assert "is of no known format" in caught.value.what
    return caught.value


def typed_back(path: Path) -> Read:
    """The dump, read as its error says to."""
    typed = refusal(path).fix.partition("--map ")[2].partition(";")[0].rstrip(".").split(",")
    return read(path, map=parse_map(typed), trust_pickle=True)


def holds(found: Read, **values: Any) -> None:
    wanted = {"prompt_token_ids": P, "response_token_ids": R, "rollout_logprobs": B, "trainer_logprobs": A, **values}
    for key, value in wanted.items():
        if value is None:
            assert key not in found.table.schema.names
        else:
            assert found[key] == [value], key


READ: dict[str, tuple[Row, Row]] = {
    "whole with a mask": (
        {"tokens": P + R, "logprobs": [0.0] * 3 + B, "ref_logps": [0.0] * 3 + REF, "response_mask": [0, 0, 0, 1, 1]},
        {"trainer_logprobs": None, "ref_logprobs": REF, "loss_mask": [True, True]},
    ),
    "whole with a length": (
        {"tokens": P + R, "logprobs": [0.0] * 3 + B, "ref_logps": [0.0] * 3 + REF, "prompt_len": 3},
        {"trainer_logprobs": None, "ref_logprobs": REF},
    ),
    "nested": (
        {
            "sample": {"input_ids": P, "output_ids": R, "output_logprobs": B, "mask": [1, 0]},
            "train": {"logprobs": A, "reward": 0.5},
            "iteration": 4,
        },
        {"loss_mask": [True, False], "step": 4, "reward": 0.5},
    ),
    "by role": (
        {
            "prompt_ids": P,
            "completion_ids": R,
            "policy_logps": A,
            "inference_logps": B,
            "token_advantages": [-1.0, -1.0],
        },
        {"advantages": None},
    ),
    "old, new and the engine's": (
        {"old_logprobs": A, "new_logprobs": REF, "vllm_logprobs": B, "prompt": "2+2", "prompt_ids": P, "output_ids": R},
        {"trainer_logprobs_2": REF},
    ),
    "old and new": (
        {"new_log_probs": A, "old_log_probs": B, "query_tokens": P, "response_tokens": R, "entropies": [0.1, 0.2]},
        {},
    ),
    "camelCase": (
        {
            "trainerLogProbs": A,
            "policyRefLogProbs": REF,
            "rolloutLogProbs": B,
            "lossMask": [1, 0],
            "responseTokenIds": R,
            "promptTokenIds": P,
            "groupId": "g",
            "attentionMask": [1] * 5,
        },
        {"ref_logprobs": REF, "loss_mask": [True, False], "prompt_id": "g"},
    ),
    "some of it in our words": (
        {"engine_lp": REF, "rollout_logprobs": B, "learner_lp": A, "prompt_token_ids": P, "completion": R},
        {},
    ),
    "prompt and response under vague names": ({"prompt": P, "tokens": R, "lp_vllm": B, "lp_hf": A}, {}),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_suggested_is_typed_back(tmp_path: Path, name: str) -> None:
    layout, values = READ[name]
    holds(typed_back(write_jsonl(tmp_path, [layout])), **values)


def test_one_parquet_column_of_prompt_and_response(tmp_path: Path) -> None:
    layout = {"input_ids": P + R, "loss_mask": [0, 0, 0, 1, 1], "gen_logprobs": [0.0] * 3 + B, "hf_lp": [0.0] * 3 + A}
    path = tmp_path / "run.parquet"
    pq.write_table(pa.table({key: [value] for key, value in layout.items()}), path)
    holds(typed_back(path), loss_mask=[True, True])


@pytest.mark.parametrize("pack", [list, np.array, torch.tensor])
def test_a_pickled_dict_of_columns(tmp_path: Path, pack: Any) -> None:
    """Rewards and steps, a number per sequence, are not taken for lists along tokens."""
    layout = {
        "rewards": pack([-0.5, -1.0]),
        "train_step": pack([3, 3]),
        "query_ids": pack([P, P]),
        "response_ids": pack([R, R]),
        "sampler_logps": pack([B, B]),
        "actor_logps": pack([A, A]),
        "attention_mask": pack([[0, 1, 1, 1, 1]] * 2),
    }
    path = tmp_path / "run.pkl"
    path.write_bytes(pickle.dumps(layout))
    found = typed_back(path)
    assert (found["prompt_token_ids"], found["response_token_ids"]) == ([[6, 7]] * 2, [R, R])
    assert (found["rollout_logprobs"], found["trainer_logprobs"]) == ([B, B], [A, A])
    assert (found["reward"], found["step"]) == ([-0.5, -1.0], [3, 3])


def test_an_old_policy_can_be_of_either_side() -> None:
    found = suggested(READ["old and new"][0])
    assert found.unsure == ("old_log_probs",)
    assert suggested(READ["old, new and the engine's"][0]).unsure == ()


UNREAD: dict[str, tuple[Row, tuple[str, ...], str]] = {
    "nothing splits the sequence": (
        {"tokens": P + R, "logprobs": [0.0] * 3 + B, "ref_logps": [0.0] * 3 + REF},
        ("tokens=token_ids", "logprobs=rollout_logprobs", "ref_logps=ref_logprobs"),
        "nothing says where the response begins: write prompt_length",
    ),
    "no prompt": (
        {"completion_ids": R, "inference_logps": B, "policy_logps": A},
        ("completion_ids=response_token_ids", "inference_logps=rollout_logprobs", "policy_logps=trainer_logprobs"),
        "nothing looks like prompt_token_ids",
    ),
    "probabilities": (
        {"prompt_ids": P, "completion_ids": R, "rollout_probs": [0.6, 0.25], "trainer_probs": [1.0, 0.5]},
        ("prompt_ids=prompt_token_ids", "completion_ids=response_token_ids"),
        "rollout_probs holds probabilities, not log-probs: write their natural logarithm",
    ),
    "objects per token": (
        {"prompt_ids": P, "output": [{"token_id": 8, "logprob": -0.5}, {"token_id": 9, "logprob": -1.25}]},
        ("prompt_ids=prompt_token_ids",),
        "output is a list of objects (token_id, logprob), and --map names lists of numbers only",
    ),
    "text tokens": (
        {"prompt_ids": P, "output_tokens": ["four", "."], "token_logprobs": B},
        ("prompt_ids=prompt_token_ids", "token_logprobs=rollout_logprobs"),
        "output_tokens is a list of text, not of numbers",
    ),
    "log-probs as text": (
        {"prompt_ids": P, "completion_ids": R, "gen_logprobs": ["-0.5", "-1.25"]},
        ("prompt_ids=prompt_token_ids", "completion_ids=response_token_ids"),
        "gen_logprobs is a list of text, not of numbers",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_no_map_reads_is_said(tmp_path: Path, name: str) -> None:
    layout, mapped, why = UNREAD[name]
    error = refusal(write_jsonl(tmp_path, [layout]))
    assert set(error.fix.partition("--map ")[2].partition(";")[0].split(",")) == set(mapped)
    assert why in error.fix


@pytest.mark.parametrize(
    "key", ["token_rewards", "policy_advantages", "rollout_entropy", "actor_loss", "trainer_logits"]
)
def test_what_is_below_0_and_no_log_prob(key: str) -> None:
    assert key not in suggested({"prompt_ids": P, "completion_ids": R, key: B}).map


leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = leaf | st.lists(leaf, max_size=3) | st.lists(st.lists(leaf, max_size=2), max_size=2)
names = st.sampled_from(["prompt_ids", "tokens", "logprobs", "old_lp", "mask", "a.b", "step"]) | st.text(max_size=4)


@given(st.dictionaries(names, values | st.dictionaries(names, values, max_size=2), max_size=6))
def test_any_record_gets_keys_that_can_be_typed(fields: Row) -> None:
    found = suggested(fields).map
    assert parse_map(f"{theirs}={ours}" for theirs, ours in found.items()) == found
    assert all(theirs.isprintable() for theirs in found)
