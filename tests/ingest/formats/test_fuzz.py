"""Arbitrary changes to a valid record of any format: either it is read, or an error says what is wrong and the fix."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.read import ReadOptions, read_dump
from mismatch_probe.results.dump import Recorded
from tests.ingest.formats import test_nemo_rl, test_prime_rl, test_servers
from tests.ingest.formats.test_conversations import TestOpenInstruct, TestTorchtitan, TestVerifiers, turns

TOKENS = turns("prompt_ids", "completion_ids", "completion_logprobs")
CALLS = turns("prompt_token_ids", "generation_token_ids", "generation_log_probs")
GRAPH = TestVerifiers().graph()
WORK = {"type": "train", "step": 4, "policy": {"start": 3, "end": 3}}
RECORDS: list[tuple[str, dict[str, Any]]] = [
    ("nemo-rl", test_nemo_rl.nested(test_nemo_rl.sample(agent_ref={"name": "a"}))),
    ("nemo-rl", test_nemo_rl.sample()),
    ("prime-rl", test_prime_rl.sequence(rl_weights=[1.0] * 5)),
    ("open-instruct", TestOpenInstruct().sample(logprobs=[-0.5, -1.0, None])),
    ("torchtitan", TestTorchtitan().rollout()),
    ("verifiers", TOKENS[0] | {"completion_mask": [1, 0]}),
    ("verifiers", {"trajectory": [{"tokens": tokens} for tokens in TOKENS], "reward": 1.0, "advantage": 0.5}),
    ("verifiers", {"env": {"id": "e"}, "task": {}, "traces": [GRAPH], "run": {"work": WORK}}),
    ("nemo-gym", {"responses_create_params": {}, "response": {"output": CALLS}, "reward": 1.0}),
    ("nemo-gym", CALLS[0]),
    ("vllm", test_servers.completion()),
    ("vllm", test_servers.chat()),
    ("vllm", test_servers.request_output()),
    ("vllm", {"request": {"token_ids": [1, 2]}, "response": test_servers.generated()}),
    ("sglang", test_servers.sglang(weight_versions=[{"version": "1", "start": 0, "end": 2}])),
    ("token-difr", {"config": {}, "samples": [{"prompt_token_ids": [1], "outputs": [{"token_ids": [2, 3]}]}]}),
]
NUMBERS = st.integers(-3, 8) | st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -1e308, 0.5, -9999])
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=4) | st.sampled_from(["\ud800", "<b>"])
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn) -> tuple[str, Any]:
    """The format of a record, and the record after one to three changes anywhere in it."""
    name, record = draw(st.sampled_from(RECORDS))
    record = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 3))):
        at: Any = record
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and at[key] and draw(st.integers(0, 3)):
                at = at[key]
                continue
            kind = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "repeat"]))
            if kind == "replace":
                at[key] = draw(JSON)
            elif kind == "remove":
                del at[key]
            elif kind == "wrap":
                at[key] = [at[key]]
            elif isinstance(at, list):
                at.insert(key, copy.deepcopy(at[key]))
            break
    return name, record


def outcome(path: Path, name: str) -> Recorded | IngestError:
    """What reading gave; any other error is a failure of the test."""
    try:
        return read_dump(path, path.parent / "out.parquet", ReadOptions(format=name))
    except IngestError as refused:
        error = refused
    assert error.what.endswith((".", "?"))
    assert error.fix
    assert len(str(error)) < 5000
    return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(drawn=changed(), before=st.booleans(), auto=st.booleans())
@example(drawn=("prime-rl", test_prime_rl.sequence(loss_mask=[1e308] * 5)), before=False, auto=True)
@example(drawn=("nemo-rl", test_nemo_rl.sample(token_loss_mask=[0, 0, 1e308, 0, 1, 0, 0])), before=False, auto=False)
@example(drawn=("verifiers", {"completion_ids": [3], "completion_logprobs": [[-0.5], -1.0]}), before=False, auto=True)
def test_any_change_is_read_or_refused(folder: Path, drawn: tuple[str, Any], before: bool, auto: bool) -> None:
    name, record = drawn
    good = next(one for other, one in RECORDS if other == name)
    path = folder / "dump.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ([good, record] if before else [record])))
    found = outcome(path, "auto" if auto else name)
    assert isinstance(found, Recorded | IngestError)


@pytest.mark.parametrize(("name", "record"), RECORDS)
def test_the_records_themselves_are_read(folder: Path, name: str, record: dict[str, Any]) -> None:
    if name == "token-difr":
        pytest.skip("has no log-probs")
    path = folder / "good.jsonl"
    path.write_text(json.dumps(record) + "\n")
    found = outcome(path, "auto")
    assert isinstance(found, Recorded)
    assert found.file.format == name


@settings(deadline=None, max_examples=60)
@given(cut=st.floats(0, 1), record=st.sampled_from(RECORDS), junk=st.binary(max_size=6))
def test_truncated_and_spliced_bytes(folder: Path, cut: float, record: tuple[str, Any], junk: bytes) -> None:
    text = json.dumps(record[1]).encode()
    path = folder / "cut.jsonl"
    path.write_bytes(text[: int(cut * len(text))] + junk + text[int(cut * len(text)) + 1 :])
    outcome(path, "auto")
