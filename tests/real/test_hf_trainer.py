"""The trainer engine against plain transformers, in this process: it needs torch but no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mismatch_probe.engines.base import TrainerJob
from mismatch_probe.engines.hf.engine import HfTrainer
from mismatch_probe.errors import DtypeRefused, EngineError
from mismatch_probe.types import ScoreRequest
from tests.real.tiny import ARCHITECTURES, VOCABULARY

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]


def requests(count: int = 7) -> list[ScoreRequest]:
    draw = np.random.default_rng(0)
    made = []
    for index in range(count):
        prompt, response = draw.integers(1, 20), draw.integers(1, 30)
        ids = draw.integers(3, VOCABULARY, prompt + response).tolist()
        made.append(ScoreRequest(index, ids[:prompt], ids[prompt:]))
    return made


def trainer(path: Path, **options: Any) -> HfTrainer:
    defaults: dict[str, Any] = {
        "engine": "hf",
        "dtype": "float32",
        "mode": "cast",
        "layout": "padded",
        "attention": None,
        "device": "cpu",
        "temperature": 1.0,
        "requests": (),
        "self_noise_sequences": 0,
        "memory_budget": 1 << 28,
    }
    return HfTrainer(TrainerJob(model_path=str(path), **{**defaults, **options}))


def scores(engine: HfTrainer, wanted: Sequence[ScoreRequest], temperature: float = 1.0) -> dict[int, np.ndarray]:
    return {
        score.sequence_id: np.array(score.logprobs)
        for batch in engine.plan(wanted)
        for score in engine.score(batch, temperature)
    }


def plain(path: Path, request: ScoreRequest, temperature: float = 1.0) -> np.ndarray:
    """The definition: one sequence, the model's own full forward in float64, nothing fused."""
    from transformers import AutoModelForCausalLM

    # torch's grouped matrix product takes no float64, so experts run one after the other here.
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ids = torch.tensor([[*request.prompt_token_ids, *request.response_token_ids]])
    with torch.inference_mode():
        logprobs = (model(ids).logits[0] / temperature).log_softmax(-1)
    start = len(request.prompt_token_ids)
    return logprobs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0].numpy()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_the_models_own_log_probs(tiny: Tiny, architecture: str) -> None:
    path, wanted = tiny(architecture), requests(3)
    found = scores(trainer(path), wanted)
    for request in wanted:
        np.testing.assert_allclose(found[request.sequence_id], plain(path, request), atol=2e-5)


def test_temperature_divides_logits_before_the_softmax(tiny: Tiny) -> None:
    path, wanted = tiny("qwen3"), requests(2)
    found = scores(trainer(path), wanted, temperature=0.6)
    for request in wanted:
        np.testing.assert_allclose(found[request.sequence_id], plain(path, request, 0.6), atol=2e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt_neox", "qwen3_moe", "olmo2"])
def test_layouts_agree_in_fp32(tiny: Tiny, architecture: str) -> None:
    wanted = requests()
    single = scores(trainer(tiny(architecture), layout="single"), wanted)
    for layout in ("padded", "packed"):
        other = scores(trainer(tiny(architecture), layout=layout), wanted)
        for request in wanted:
            np.testing.assert_allclose(other[request.sequence_id], single[request.sequence_id], atol=1e-5)


def test_packing_that_leaks_is_refused(tiny: Tiny) -> None:
    # OPT counts its positions from the mask alone, so a packed row runs on through its neighbours.
    with pytest.raises(EngineError, match="does not separate packed sequences"):
        trainer(tiny("opt"), layout="packed")


def test_a_small_memory_budget_changes_the_batches_and_not_the_scores(tiny: Tiny) -> None:
    wanted = requests()
    roomy, tight = trainer(tiny("llama")), trainer(tiny("llama"), memory_budget=1 << 18)
    assert len(tight.plan(wanted)) > len(roomy.plan(wanted))
    whole, parts = scores(roomy, wanted), scores(tight, wanted)
    for request in wanted:
        np.testing.assert_allclose(parts[request.sequence_id], whole[request.sequence_id], atol=1e-5)


def test_a_repeat_is_bitwise_equal(tiny: Tiny) -> None:
    wanted = requests()
    first, second = (scores(trainer(tiny("qwen3"), dtype="bfloat16"), wanted) for _ in range(2))
    assert all(np.array_equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_rounding_grows_with_fewer_bits(tiny: Tiny, mode: str) -> None:
    wanted = requests(12)
    exact = scores(trainer(tiny("qwen3")), wanted)
    error = {}
    for dtype in ("bfloat16", "float16"):
        found = scores(trainer(tiny("qwen3"), dtype=dtype, mode=mode), wanted)
        error[dtype] = float(np.mean([np.abs(found[k] - exact[k]).mean() for k in exact]))
    assert 3 < error["bfloat16"] / error["float16"] < 20
    assert error["float16"] > 1e-5


def test_autocast_keeps_fp32_weights(tiny: Tiny) -> None:
    assert trainer(tiny("qwen3"), dtype="bfloat16", mode="autocast").identity()["weights_dtype"] == "float32"
    assert trainer(tiny("qwen3"), dtype="bfloat16", mode="cast").identity()["weights_dtype"] == "bfloat16"


def test_a_soft_cap_of_attention_scores_is_kept_unless_the_user_names_sdpa(tiny: Tiny) -> None:
    assert trainer(tiny("gemma2")).identity()["attention"] == "eager"
    assert trainer(tiny("gemma2"), attention="sdpa").identity()["attention"] == "sdpa"
    assert trainer(tiny("qwen3")).identity()["attention"] == "sdpa"


def test_flash_attention_refuses_float32(tiny: Tiny) -> None:
    with pytest.raises(DtypeRefused, match="does not support float32"):
        trainer(tiny("qwen3"), attention="flash_attention_2")


def test_repeating_grouped_heads_changes_no_score(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import sdpa_attention

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)  # put back afterwards
    wanted = requests()
    grouped = scores(trainer(tiny("qwen3"), layout="single"), wanted)
    repeated = scores(trainer(tiny("qwen3"), layout="single", flags={"sdpa_broadcasts_grouped_heads": False}), wanted)
    for request in wanted:
        np.testing.assert_allclose(repeated[request.sequence_id], grouped[request.sequence_id], atol=1e-5)
