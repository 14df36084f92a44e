"""transformers as a rollout engine against transformers' own `generate` and the trainer engine, in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import mismatch_probe
from mismatch_probe.engines.base import Capture, RolloutJob
from mismatch_probe.engines.hf.rollout import HfRollout
from mismatch_probe.engines.logits import add_noise
from mismatch_probe.engines.rows import RowFile
from mismatch_probe.errors import EngineError, UsageError
from mismatch_probe.types import Rollout, RolloutRequest, Sampling, ScoreRequest
from tests.conftest import Outcome
from tests.real.test_hf_trainer import plain, scores, trainer
from tests.real.tiny import ARCHITECTURES, VOCABULARY

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]
LONG = Sampling(12)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are so small here that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rollout(path: Path, **options: Any) -> HfRollout:
    defaults: dict[str, Any] = {"dtype": "float32", "batch": 4, "max_model_len": 64, "sampling": LONG}
    chosen = {**defaults, **options}
    return HfRollout(
        RolloutJob(engine="hf", model_path=str(path), device="cpu", requests=(), self_noise_tokens=0, **chosen)
    )


def requests(count: int = 6) -> list[RolloutRequest]:
    draw = np.random.default_rng(0)
    return [RolloutRequest(i, draw.integers(3, VOCABULARY, draw.integers(1, 20)).tolist(), i) for i in range(count)]


def generated(engine: HfRollout, wanted: Sequence[RolloutRequest], sampling: Sampling = LONG) -> list[Rollout]:
    return engine.generate(wanted, sampling, lambda n: None)


def ids(request: RolloutRequest, found: Rollout) -> list[int]:
    return [*request.prompt_token_ids, *map(int, found.response_token_ids)]


def scored(request: RolloutRequest, found: Rollout) -> ScoreRequest:
    return ScoreRequest(request.sequence_id, request.prompt_token_ids, [int(t) for t in found.response_token_ids])


def as_saved(engine: HfRollout, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of a checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    return engine.run_on_model(lambda model: dict(revert_weight_conversion(model, dict(weights))))


def moved(engine: HfRollout) -> dict[str, torch.Tensor]:
    """Its weights, each a little off."""
    draw = torch.Generator().manual_seed(1)
    own = engine.run_on_model(lambda model: model.state_dict())
    named = {name: 1.05 * value + 0.02 * torch.randn(value.shape, generator=draw) for name, value in own.items()}
    tied = engine.run_on_model(lambda model: model.config.tie_word_embeddings)
    if tied and "lm_head.weight" in named:
        named["lm_head.weight"] = named["model.embed_tokens.weight"]
    return as_saved(engine, named)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_log_probs_are_those_of_the_trainer(tiny: Tiny, architecture: str) -> None:
    wanted = requests()
    found = generated(rollout(tiny(architecture)), wanted)
    assert [r.sequence_id for r in found] == [r.sequence_id for r in wanted]
    theirs = scores(trainer(tiny(architecture)), [scored(*both) for both in zip(wanted, found, strict=True)])
    for one in found:
        np.testing.assert_allclose(one.logprobs, theirs[one.sequence_id], atol=5e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scores_are_the_trainers_own_to_the_bit(tiny: Tiny, dtype: str) -> None:
    wanted = [request.prompt_token_ids for request in requests() if len(request.prompt_token_ids) > 1]
    found = rollout(tiny("qwen3"), dtype=dtype).score([*wanted, [5]])
    theirs = scores(trainer(tiny("qwen3"), dtype=dtype), [ScoreRequest(i, s[:1], s[1:]) for i, s in enumerate(wanted)])
    assert [len(row) for row in found] == [*(len(s) - 1 for s in wanted), 0]
    assert all(np.array_equal(row, theirs[i]) for i, row in enumerate(found[:-1]))


@pytest.mark.parametrize("architecture", ["qwen3", "gpt_neox", "qwen3_moe", "opt"])
def test_without_heat_it_is_transformers_greedy_decoding(tiny: Tiny, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    wanted = requests()
    found = generated(rollout(tiny(architecture)), wanted, Sampling(12, temperature=1e-5))
    model = AutoModelForCausalLM.from_pretrained(tiny(architecture), dtype=torch.float32).eval()
    for request, one in zip(wanted, found, strict=True):
        prompt = torch.tensor([request.prompt_token_ids])
        greedy = model.generate(prompt, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(prompt))
        assert ids(request, one) == greedy[0].tolist()
        assert one.finish_reason == ("stop" if one.response_token_ids[-1] == 2 else "length")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_are_drawn_from_the_models_distribution(tiny: Tiny, temperature: float) -> None:
    """χ² of first tokens, and of second ones given the likeliest first one, against enumerated probabilities."""
    from transformers import AutoModelForCausalLM

    prompt, n = [7, 30, 11, 90], 4000
    engine = rollout(tiny("llama"), batch=500, sampling=Sampling(2, temperature))
    drawn = [RolloutRequest(i, prompt, seed=1000 + i) for i in range(n)]
    found = generated(engine, drawn, Sampling(2, temperature))
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float64).eval()

    def probabilities(prefix: list[int], heat: float) -> np.ndarray:
        with torch.inference_mode():
            return (model(torch.tensor([prefix])).logits[0, -1] / heat).softmax(-1).numpy()

    def p_value(tokens: Sequence[int], law: np.ndarray) -> float:
        expected, seen = law * len(tokens), np.bincount(tokens, minlength=VOCABULARY)
        common = expected >= 5
        observed = np.array([*seen[common], seen[~common].sum()])
        wanted = np.array([*expected[common], expected[~common].sum()])
        return float(stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue)

    firsts = [int(one.response_token_ids[0]) for one in found]
    assert p_value(firsts, probabilities(prompt, temperature)) > 1e-3
    assert p_value(firsts, probabilities(prompt, 0.8 * temperature)) < 1e-9
    likeliest = int(np.argmax(np.where(np.arange(VOCABULARY) == 2, 0, probabilities(prompt, temperature))))
    seconds = [int(one.response_token_ids[1]) for one, first in zip(found, firsts, strict=True) if first == likeliest]
    assert len(seconds) > 100
    assert p_value(seconds, probabilities([*prompt, likeliest], temperature)) > 1e-3
    one = next(one for one in found if len(one.response_token_ids) == 2)
    request = scored(drawn[one.sequence_id], one)
    np.testing.assert_allclose(one.logprobs, plain(tiny("llama"), request, temperature), atol=5e-5)


def test_what_a_request_draws_depends_on_its_seed_alone(tiny: Tiny) -> None:
    engine, wanted = rollout(tiny("qwen3")), requests()
    found = {one.sequence_id: list(one.response_token_ids) for one in generated(engine, wanted)}
    turned = [replace(request, seed=request.seed) for request in reversed(wanted)]
    assert {one.sequence_id: list(one.response_token_ids) for one in generated(engine, turned)} == found
    (alone,) = generated(engine, wanted[2:3], Sampling(5))
    assert list(alone.response_token_ids) == found[2][:5]
    others = generated(engine, [replace(request, seed=request.seed + 100) for request in wanted])
    assert {one.sequence_id: list(one.response_token_ids) for one in others} != found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replay_gives_the_bits_of_the_decode(tiny: Tiny, dtype: str) -> None:
    engine, wanted = rollout(tiny("qwen3"), dtype=dtype), requests()
    steps: list[int] = []
    found = engine.generate(wanted, LONG, steps.append)
    assert sum(steps) == sum(len(one.response_token_ids) for one in found)
    forced = [replace(r, forced_token_ids=one.response_token_ids) for r, one in zip(wanted, found, strict=True)]
    again = engine.replay(forced, LONG, steps.append)
    for first, second in zip(found, again, strict=True):
        assert np.array_equal(first.response_token_ids, second.response_token_ids)
        assert np.array_equal(first.logprobs, second.logprobs)
    (ended,) = engine.replay([replace(wanted[0], forced_token_ids=[5, 2, 6, 7])], Sampling(3), steps.append)
    assert list(ended.response_token_ids) == [5, 2, 6]  # an end that was given ends nothing


def test_responses_end_at_the_context(tiny: Tiny) -> None:
    wanted = [RolloutRequest(0, [5] * 15, 0), RolloutRequest(1, [5] * 3, 0), RolloutRequest(2, [5] * 20, 0)]
    found = generated(rollout(tiny("llama"), max_model_len=17), wanted)
    assert [len(one.response_token_ids) <= room for one, room in zip(found, (2, 12, 0), strict=True)] == [True] * 3
    assert found[2].finish_reason == "length"


def test_generation_config_ends_responses_and_changes_no_distribution(tiny: Tiny, tmp_path: Path) -> None:
    wanted = requests()
    found = generated(rollout(tiny("qwen3")), wanted)
    copy = Path(shutil.copytree(tiny("qwen3"), tmp_path / "copy"))
    end = int(found[0].response_token_ids[3])
    written = {"eos_token_id": [2, end], "do_sample": True, "top_k": 1, "temperature": 0.3, "repetition_penalty": 2.0}
    (copy / "generation_config.json").write_text(json.dumps(written))
    for first, second in zip(found, generated(rollout(copy), wanted), strict=True):
        tokens = [int(token) for token in first.response_token_ids]
        kept = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert list(second.response_token_ids) == tokens[:kept]
        assert np.array_equal(second.logprobs, first.logprobs[:kept]) or kept < len(tokens)


def test_kept_rows_are_the_models_logits(tiny: Tiny, tmp_path: Path) -> None:
    engine, wanted = rollout(tiny("qwen3")), requests()
    found = engine.generate(wanted, LONG, lambda n: None, Capture(str(tmp_path / "rows"), 10))
    rows = RowFile(tmp_path / "rows")
    assert len(rows.kept) == 10
    total = sum(len(one.response_token_ids) for one in found)
    assert sum(kept.stands_for for kept in rows.kept) == pytest.approx(total, rel=0.3)
    for kept in rows.kept:
        prefix = ids(wanted[kept.sequence_id], found[kept.sequence_id])
        prefix = prefix[: len(wanted[kept.sequence_id].prompt_token_ids) + kept.position]
        own = engine.run_on_model(lambda model, prefix=prefix: model(torch.tensor([prefix])).logits[0, -1].detach())
        np.testing.assert_allclose(rows.row(kept.slot), own.numpy(), atol=1e-4)
        assert kept.weight == pytest.approx(max(0.1, 1 - float(own.softmax(-1).max())), abs=1e-4)


def test_noise_is_sampled_from_and_reported(tiny: Tiny) -> None:
    engine, wanted = rollout(tiny("qwen3")), requests()
    clean = generated(engine, wanted, Sampling(1))
    noisy = generated(engine, [replace(request, logit_noise=0.5) for request in wanted], Sampling(1))
    assert any(a.logprobs[0] != b.logprobs[0] for a, b in zip(clean, noisy, strict=True))
    for request, one in zip(wanted, noisy, strict=True):
        logits = engine.run_on_model(
            lambda model, request=request: model(torch.tensor([request.prompt_token_ids])).logits[0, -1].detach()
        )
        law = add_noise(logits.clone(), 0.5, request.seed, 0).log_softmax(-1)
        assert one.logprobs[0] == pytest.approx(float(law[int(one.response_token_ids[0])]), abs=1e-4)


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("qwen3", "bfloat16"), ("llama", "float32"), ("qwen3_moe", "float32")]
)
def test_new_weights_score_as_a_fresh_load(tiny: Tiny, tmp_path: Path, architecture: str, dtype: str) -> None:
    engine, sequences = rollout(tiny(architecture), dtype=dtype), [r.prompt_token_ids for r in requests()]
    before = engine.score(sequences)
    wide = rollout(tiny(architecture))
    weights = moved(wide)
    wide.load_weights(weights.items())
    wide.run_on_model(lambda model: model.save_pretrained(tmp_path / "new"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny(architecture) / name, tmp_path / "new" / name)
    engine.load_weights(weights.items())
    found, fresh = engine.score(sequences), rollout(tmp_path / "new", dtype=dtype).score(sequences)
    assert all(np.array_equal(a, b) for a, b in zip(found, fresh, strict=True))
    assert max(float(np.abs(a - b).max()) for a, b in zip(found, before, strict=True) if len(a)) > 0.1


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("model.norm.weight"),
        lambda weights: weights.update(extra=torch.ones(1)),
        lambda weights: weights.update({"model.norm.weight": torch.ones(3)}),
    ],
)
def test_weights_of_another_model_are_refused_and_the_old_ones_stay(tiny: Tiny, change: Callable[..., Any]) -> None:
    engine, sequences = rollout(tiny("llama")), [request.prompt_token_ids for request in requests()]
    before = engine.score(sequences)
    weights = dict(moved(engine))
    change(weights)
    with pytest.raises(EngineError):
        engine.load_weights(weights.items())
    assert all(np.array_equal(a, b) for a, b in zip(engine.score(sequences), before, strict=True))


def test_what_it_does_not_show_is_refused(tiny: Tiny) -> None:
    engine = rollout(tiny("llama"))
    with pytest.raises(EngineError, match="does not show its layers"):
        engine.trace(None)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="does not show its routers"):
        engine.routes([], None)  # type: ignore[arg-type]


def test_attention_is_an_argument_and_others_are_refused(tiny: Tiny) -> None:
    chosen = rollout(tiny("qwen3"), arguments={"attn_implementation": "eager"})
    assert chosen.identity()["attention"] == "eager"
    with pytest.raises(UsageError, match="has no block_size"):
        mismatch_probe.compare(model=str(tiny("qwen3")), rollout_engine="hf", engine_args={"block_size": 16})


def test_a_comparison_of_transformers_with_itself(
    command: Callable[..., Outcome], tmp_path: Path, no_figures: None
) -> None:
    """The built-in model, sampled by the one engine and scored by the other: in FP32 nothing separates them."""
    words = ["--rollout-engine", "hf", "--rollout-dtypes", "fp32,bf16", "--trainer-dtypes", "fp32"]
    sizes = ["--num-prompts", "2", "--max-tokens", "4", "--self-noise-tokens", "2", "--exact-kl", "3"]
    ended = command("compare", *words, *sizes, "--sequences", "shared", "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    run = mismatch_probe.Run.open(tmp_path / "run")
    names = ["hf-float32-decode", "hf-bfloat16-replay", "hf-float32-cast"]
    assert [name for name in run.data.manifest.passes if not name.endswith("-null")] == names
    gaps = {pair.rollout_dtype: pair.metrics["mean_abs_logprob_diff"].value for pair in run.summary.pairs}
    assert gaps["float32"] < 1e-4 < gaps["bfloat16"]
    assert {one.self_noise_pass for one in run.summary.self_noise} == {f"{name}-null" for name in names}
