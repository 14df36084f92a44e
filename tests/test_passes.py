"""Ids of passes: parts, and their text."""

from __future__ import annotations

import pytest

from mismatch_probe.passes import RECORDED_ROLLOUT, RECORDED_TRAINER, PassId

KNOWN = {
    "vllm-bfloat16-decode": PassId.rollout("vllm", "bfloat16"),
    "vllm-float16-replay": PassId.rollout("vllm", "float16", "replay"),
    "hf-float64-cast": PassId.trainer("hf", "float64"),
    "hf-float16-autocast-null": PassId.trainer("hf", "float16", "autocast").repeat,
    "recorded-rollout": RECORDED_ROLLOUT,
    "recorded-trainer": RECORDED_TRAINER,
    "my-engine-float32-decode": PassId("my-engine", "float32", "decode"),
}


@pytest.mark.parametrize("text", KNOWN)
def test_text_and_parts_of_a_pass_follow_from_each_other(text: str) -> None:
    assert PassId.parse(text) == KNOWN[text]
    assert str(KNOWN[text]) == text


@pytest.mark.parametrize(
    "text", ["", "vllm", "vllm-bfloat16", "vllm-bfloat16-prefill", "hf-int8-cast", "encode", "-null", "recorded-score"]
)
def test_other_text_is_no_pass(text: str) -> None:
    with pytest.raises(ValueError, match="not the id of a pass"):
        PassId.parse(text)


def test_a_pass_knows_whose_log_probs_it_holds() -> None:
    assert [text for text, known in KNOWN.items() if known.side == "trainer"] == [
        "hf-float64-cast",
        "hf-float16-autocast-null",
        "recorded-trainer",
    ]
