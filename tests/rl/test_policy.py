"""The trained policy: log-probs, optimizer steps, loss scale, and going on bit for bit.

Shape legend: `B` sequences, `T` response tokens of the longest, `V` vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import special
from transformers import AutoModelForCausalLM

from mismatch_probe.dtypes import DTYPE_INFOS
from mismatch_probe.engines.logprobs import Batch, entropies, token_logprobs
from mismatch_probe.errors import ModelError, TableError
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.policy import TORCH_DTYPES, NonFinite, Policy, StepFacts
from tests.real.tiny import VOCABULARY, save_tiny

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
RESPONSES = [[20, 21], [22, 23, 24, 25, 26], [], [27]]
FLOAT32 = {"trainer_dtype": "float32"}
BF16_CAST = {"trainer_dtype": "bfloat16", "trainer_mode": "cast"}
FP16_AUTOCAST = {"trainer_dtype": "float16", "trainer_mode": "autocast", "initial_loss_scale": 1024.0}
FP16_CAST = {**FP16_AUTOCAST, "trainer_mode": "cast"}
every_mode = pytest.mark.parametrize(
    "mode",
    [FLOAT32, {"trainer_dtype": "bfloat16"}, BF16_CAST, FP16_AUTOCAST, FP16_CAST],
    ids=["fp32", "bf16-autocast", "bf16-cast", "fp16-autocast", "fp16-cast"],
)
OVERFLOW = 1e9


def make_policy(checkpoint: Path, **options: Any) -> Policy:
    return Policy(str(checkpoint), RlConfig.of(options), CPU)


def make_batch(rows: slice = slice(None)) -> Batch:
    return Batch.of(PROMPTS[rows], RESPONSES[rows], CPU)


def add_gradient(policy: Policy, size: float = 1.0, rows: slice = slice(None)) -> None:
    """That of a weighted mean of log-probs."""
    batch = make_batch(rows)
    logprobs, _ = policy.logprobs(batch)
    policy.backward(-size * (logprobs[batch.mask].double() * 0.1).sum())


def one_step(policy: Policy, size: float = 1.0) -> StepFacts:
    add_gradient(policy, size)
    return policy.step()


def snapshot(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.weights().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def compute_copy(policy: Policy) -> Any:
    return policy._compute


class TestBatch:
    @given(
        st.lists(
            st.tuples(st.lists(st.integers(1, 99), min_size=1, max_size=6), st.lists(st.integers(1, 99), max_size=6)),
            min_size=1,
            max_size=6,
        )
    )
    def test_every_token_is_where_it_should_be(self, rows: list[tuple[list[int], list[int]]]) -> None:
        prompts, responses = zip(*rows, strict=True)
        batch = Batch.of(prompts, responses, CPU)
        targets = batch.targets()
        assert targets.shape == batch.mask.shape
        for i, (prompt, response) in enumerate(rows):
            assert batch.ids[i][batch.attention[i].bool()].tolist() == prompt + response
            assert batch.ids[i, batch.first[i] :][: len(response)].tolist() == response
            assert targets[i][batch.mask[i]].tolist() == response
            assert batch.mask[i].tolist() == sorted(batch.mask[i].tolist(), reverse=True)
        assert batch.mask.any(dim=0)[1:].all()  # no longer than the longest response

    def test_an_empty_prompt_has_no_row_that_predicts_the_first_token(self) -> None:
        with pytest.raises(AssertionError):
            Batch.of([[1], []], [[2], [3]], CPU)


class TestLogprobs:
    @pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
    @pytest.mark.parametrize("checkpoint", ["tied", "untied"])
    def test_against_the_log_softmax_of_all_logits_in_float64(
        self, request: pytest.FixtureRequest, checkpoint: str, temperature: float
    ) -> None:
        policy = make_policy(request.getfixturevalue(checkpoint), temperature=temperature, **FLOAT32)
        batch = make_batch()
        with torch.no_grad():
            found, logits = policy.logprobs(batch)
        assert found.shape == batch.mask.shape
        assert logits.shape == (*batch.mask.shape, VOCABULARY)
        wide = deepcopy(policy.model).double()
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            with torch.no_grad():
                every = (wide(torch.tensor([prompt + response])).logits[0] / temperature).numpy()
            for t, token in enumerate(response):
                row = every[len(prompt) + t - 1]
                assert float(found[i, t]) == pytest.approx(row[token] - special.logsumexp(row), abs=2e-5)
                np.testing.assert_allclose(logits[i, t].numpy(), row, atol=2e-5)

    @every_mode
    def test_padding_and_neighbours_change_rounding_only(self, tied: Path, mode: dict[str, Any]) -> None:
        policy, batch = make_policy(tied, **mode), make_batch()
        scale = torch.finfo(TORCH_DTYPES[mode["trainer_dtype"]]).eps
        with torch.no_grad():
            together, _ = policy.logprobs(batch)
            for i, response in enumerate(RESPONSES):
                if response:
                    alone, _ = policy.logprobs(make_batch(slice(i, i + 1)))
                    assert (alone[0] - together[i, : len(response)]).abs().max() < 30 * scale

    def test_clean_ones_are_those_of_the_weights_that_are_given(self, tied: Path) -> None:
        """In FP32 and at temperature 1, with a head of its own where it is given one."""
        policy = make_policy(tied, temperature=0.5, **BF16_CAST)
        draw = torch.Generator().manual_seed(0)
        given = {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=draw) for name, tensor in policy.weights().items()
        }
        assert not torch.equal(given["lm_head.weight"], given["model.embed_tokens.weight"])
        before = snapshot(policy)
        found = policy.clean_logprobs(make_batch(), given)
        assert same(snapshot(policy), before)
        other = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32, tie_word_embeddings=False)
        other.load_state_dict(given)
        with torch.no_grad():
            expected, _ = token_logprobs(other, make_batch(), 1.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert not found.requires_grad

    @pytest.mark.parametrize("trained", ["bfloat16", "float16"])
    def test_cast_computes_what_transformers_does_in_that_dtype(self, tied: Path, trained: str) -> None:
        """Its rotary frequencies stay in FP32: cast along, their angles would be off by more the later the position."""
        policy = make_policy(tied, trainer_dtype=trained, trainer_mode="cast")
        other = AutoModelForCausalLM.from_pretrained(tied, dtype=TORCH_DTYPES[trained]).eval()
        ids = torch.randint(4, 100, (400,), generator=torch.Generator().manual_seed(0)).tolist()
        batch = Batch.of([ids[:4]], [ids[4:]], CPU)
        with torch.no_grad():
            assert torch.equal(policy.logprobs(batch)[0], token_logprobs(other, batch, 1.0)[0])

    def test_entropies_against_scipy(self) -> None:
        logits = 4 * torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
        logits[0, 0, 3:] = -math.inf
        logits[0, 1, 1:] = -math.inf
        expected = special.entr(special.softmax(logits.double().numpy(), axis=-1)).sum(-1)
        np.testing.assert_allclose(entropies(logits).numpy(), expected, rtol=1e-5, atol=1e-7)
        assert entropies(torch.zeros(7)).item() == pytest.approx(math.log(7))

    @pytest.mark.parametrize("junk", [math.nan, math.inf])
    def test_an_entropy_of_no_distribution_is_no_number(self, junk: float) -> None:
        assert entropies(torch.tensor([0.0, junk, 1.0])).isnan()


class TestStep:
    @pytest.mark.parametrize("max_grad_norm", [0.0, 0.05, 1e6])
    def test_against_adam_by_hand_in_float64(self, tied: Path, max_grad_norm: float) -> None:
        rate, decay, beta1, beta2, epsilon = 1e-3, 0.1, 0.7, 0.9, 1e-8
        policy = make_policy(
            tied,
            learning_rate=rate,
            weight_decay=decay,
            beta1=beta1,
            beta2=beta2,
            max_grad_norm=max_grad_norm,
            warmup_steps=2,
            schedule="linear",
            steps=2,
            prompts_per_step=3,
            updates_per_rollout=3,
            **FLOAT32,
        )
        parameters = dict(policy.model.named_parameters())
        weights = {name: p.detach().double() for name, p in parameters.items()}
        first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
        for step, factor in enumerate([0.5, 1.0, 1.0, 0.75, 0.5, 0.25], 1):
            add_gradient(policy)
            gradients = {name: p.grad.double() for name, p in parameters.items() if p.grad is not None}
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
            facts = policy.step()
            clip = min(1.0, max_grad_norm / norm) if max_grad_norm else 1.0
            assert facts.learning_rate == pytest.approx(rate * factor)
            assert facts.grad_norm == pytest.approx(norm, rel=1e-5)
            assert (facts.loss_scale, facts.skipped) == (1.0, False)
            for name, w in weights.items():
                g = clip * gradients[name]
                first[name] = beta1 * first[name] + (1 - beta1) * g
                second[name] = beta2 * second[name] + (1 - beta2) * g**2
                root = (second[name] / (1 - beta2**step)).sqrt() + epsilon
                w -= rate * factor * (decay * w + first[name] / (1 - beta1**step) / root)
                # A step's size is that of the rate, whatever the gradient's; 16 ulps of weights of up to 0.5.
                torch.testing.assert_close(parameters[name].detach().double(), w, rtol=0, atol=2e-6)
            weights = {name: p.detach().double() for name, p in parameters.items()}

    @pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
    @pytest.mark.parametrize("warmup", [0, 1, 4, 12, 30])
    def test_schedules_count_optimizer_steps(self, tied: Path, schedule: str, warmup: int) -> None:
        policy = make_policy(
            tied, schedule=schedule, warmup_steps=warmup, steps=4, updates_per_rollout=4, learning_rate=1.0, **FLOAT32
        )
        factors = []
        for policy.updates in range(20):
            factors.append(policy._rate_factor())
        assert all(0 <= f <= 1 for f in factors)
        np.testing.assert_allclose(factors[:warmup], (np.arange(min(warmup, 20)) + 1) / max(1, warmup))
        rest = factors[warmup:]
        if schedule == "constant":
            assert set(rest) <= {1.0}
        elif rest:
            assert rest[0] == 1.0 or warmup >= 16
            assert rest == sorted(rest, reverse=True)
            assert factors[16:] == pytest.approx([0.0] * 4) or warmup >= 16
            middle = 16 - (16 - warmup) // 2
            if warmup in (0, 4, 12):
                assert factors[middle] == pytest.approx(0.5)

    @every_mode
    @pytest.mark.parametrize("checkpoint", ["tied", "untied"])
    def test_a_step_goes_down(self, request: pytest.FixtureRequest, checkpoint: str, mode: dict[str, Any]) -> None:
        policy, batch = make_policy(request.getfixturevalue(checkpoint), learning_rate=1e-3, **mode), make_batch()
        with torch.no_grad():
            before = policy.logprobs(batch)[0][batch.mask].sum()
        for _ in range(3):
            assert not one_step(policy).skipped
        with torch.no_grad():
            assert policy.logprobs(batch)[0][batch.mask].sum() > before + 0.05
        assert policy.updates == 3
        assert all(p.grad is None for p in policy.model.parameters())

    @pytest.mark.parametrize("mode", [BF16_CAST, FP16_CAST], ids=["bf16", "fp16"])
    def test_the_copy_is_the_cast_of_the_masters(self, tied: Path, mode: dict[str, Any]) -> None:
        policy = make_policy(tied, learning_rate=1e-5, **mode)
        copy = compute_copy(policy)
        assert copy is not policy.model
        assert copy.lm_head.weight is copy.model.embed_tokens.weight
        for _ in range(2):
            one_step(policy)
            masters, dtype = dict(policy.model.named_parameters()), TORCH_DTYPES[mode["trainer_dtype"]]
            for name, parameter in copy.named_parameters():
                assert parameter.dtype == dtype
                assert torch.equal(parameter, masters[name].to(dtype))
        # Steps below the dtype's resolution add up in the masters.
        assert any((m.to(dtype).float() != m).any() for m in masters.values())

    def test_other_modes_compute_with_the_masters(self, tied: Path) -> None:
        for mode in (FLOAT32, {**FLOAT32, "trainer_mode": "cast"}, {"trainer_dtype": "bfloat16"}, FP16_AUTOCAST):
            policy = make_policy(tied, **mode)
            assert compute_copy(policy) is policy.model
            assert {p.dtype for p in policy.model.parameters()} == {torch.float32}

    @pytest.mark.parametrize("mode", [FLOAT32, BF16_CAST], ids=["fp32", "bf16-cast"])
    def test_micro_batches_add_up(self, tied: Path, mode: dict[str, Any]) -> None:
        """In FP32 whatever the pass computes in: a 16-bit sum would lose what each further micro-batch brings."""
        policy = make_policy(tied, **mode)
        add_gradient(policy)
        whole = {n: p.grad.clone() for n, p in policy.model.named_parameters()}
        policy.drop_gradients()
        repeats = 16
        for _ in range(repeats):
            add_gradient(policy)
        for name, parameter in policy.model.named_parameters():
            torch.testing.assert_close(parameter.grad, repeats * whole[name], rtol=1e-5, atol=1e-6)

    def test_weights_hold_the_tied_tensor_under_both_names(self, tied: Path) -> None:
        policy = make_policy(tied, **FLOAT32)
        found = policy.weights()
        assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()
        assert not any(tensor.requires_grad for tensor in found.values())
        one_step(policy)
        assert torch.equal(policy.weights()["lm_head.weight"], policy.model.lm_head.weight)


class TestLossScale:
    @pytest.mark.parametrize("mode", [FP16_AUTOCAST, FP16_CAST], ids=["autocast", "cast"])
    def test_gradients_are_unscaled_before_they_are_clipped(self, tied: Path, mode: dict[str, Any]) -> None:
        plain = make_policy(tied, **FLOAT32, max_grad_norm=0.05)
        scaled = make_policy(tied, **mode, max_grad_norm=0.05)
        expected, found = one_step(plain), one_step(scaled)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2)
        assert expected.grad_norm > 0.05
        for policy in (plain, scaled):  # (1 − β₁)·g is of the clipped length
            moments, _ = policy.state()
            squares = sum(float((m.double() ** 2).sum()) for name, m in moments.items() if name.endswith("exp_avg"))
            assert math.sqrt(squares) == pytest.approx(0.1 * 0.05, rel=1e-3)

    @pytest.mark.parametrize("mode", [FP16_AUTOCAST, FP16_CAST], ids=["autocast", "cast"])
    def test_an_overflow_in_one_micro_batch_skips_the_step(self, tied: Path, mode: dict[str, Any]) -> None:
        policy = make_policy(tied, **mode, warmup_steps=10)
        first = one_step(policy)
        weights, (moments, numbers) = snapshot(policy), deepcopy(policy.state())
        for size in (1.0, OVERFLOW, 1.0):
            add_gradient(policy, size)
        facts = policy.step()
        assert facts.skipped
        assert not math.isfinite(facts.grad_norm)
        assert facts.loss_scale == 512.0 == first.loss_scale / 2
        assert same(snapshot(policy), weights)
        assert same(policy.state()[0], moments)
        # Neither Adam's bias correction nor the schedule counts it.
        assert policy.updates == numbers["updates"] == 1
        assert all(float(m) == 1 for name, m in policy.state()[0].items() if name.endswith(".step"))
        after = one_step(policy)
        assert (after.skipped, after.loss_scale) == (False, 512.0)
        assert after.learning_rate == pytest.approx(2 * first.learning_rate)
        assert not same(snapshot(policy), weights)

    def test_the_scale_grows_after_as_many_good_steps_in_a_row(self, tied: Path) -> None:
        policy = make_policy(tied, **FP16_AUTOCAST, loss_scale_growth_interval=3)
        sizes = [1.0, 1.0, OVERFLOW, 1.0, 1.0, 1.0, 1.0]
        scales = [one_step(policy, size).loss_scale for size in sizes]
        assert scales == [1024, 1024, 512, 512, 512, 1024, 1024]

    def test_a_scale_can_fall_below_one(self, tied: Path) -> None:
        """Where to stop is for the run to say."""
        policy = make_policy(tied, **{**FP16_AUTOCAST, "initial_loss_scale": 2.0}, minimum_loss_scale=0.25)
        found = [one_step(policy, 1e30) for _ in range(4)]
        assert [facts.loss_scale for facts in found] == [1.0, 0.5, 0.25, 0.125]
        assert all(facts.skipped for facts in found)
        assert policy.updates == 0

    def test_the_result_does_not_depend_on_the_scale(self, tied: Path) -> None:
        """Powers of two are exact as long as nothing overflows or underflows."""
        steps = []
        for scale in (256.0, 2048.0):
            policy = make_policy(tied, **{**FP16_AUTOCAST, "initial_loss_scale": scale})
            one_step(policy)
            steps.append(policy)
        moments = [policy.state()[0] for policy in steps]
        for name, moment in moments[0].items():
            torch.testing.assert_close(moments[1][name], moment, rtol=1e-2, atol=1e-6)


class TestNonFinite:
    @pytest.mark.parametrize("junk", [math.nan, math.inf])
    @pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
    @pytest.mark.parametrize("mode", [FLOAT32, BF16_CAST], ids=["fp32", "bf16-cast"])
    def test_the_gradient_is_named_and_nothing_is_stepped(
        self, tied: Path, mode: dict[str, Any], max_grad_norm: float, junk: float
    ) -> None:
        policy = make_policy(tied, **mode, max_grad_norm=max_grad_norm)
        one_step(policy)
        before, (moments, _) = snapshot(policy), deepcopy(policy.state())
        add_gradient(policy)
        victim = "model.layers.1.mlp.up_proj.weight"
        policy.model.get_parameter(victim).grad[3, 4] = junk
        with pytest.raises(NonFinite, match=f"^gradient of {victim}$"):
            policy.step()
        assert same(snapshot(policy), before)
        assert same(policy.state()[0], moments)
        assert policy.updates == 1
        policy.drop_gradients()
        assert policy.non_finite() is None
        one_step(policy)

    def test_a_weight_is_named(self, tied: Path) -> None:
        policy = make_policy(tied, **FLOAT32)
        assert policy.non_finite() is None
        with torch.no_grad():
            policy.model.model.layers[1].self_attn.q_proj.weight[0, 0] = math.nan
        assert policy.non_finite() == "model.layers.1.self_attn.q_proj.weight"


class TestState:
    @every_mode
    def test_a_restored_policy_goes_on_bit_for_bit(self, tied: Path, mode: dict[str, Any]) -> None:
        options = {**mode, "schedule": "cosine", "steps": 2, "warmup_steps": 1, "learning_rate": 1e-3}
        options |= {"weight_decay": 0.01, "loss_scale_growth_interval": 2}
        sizes = [1.0, OVERFLOW if mode["trainer_dtype"] == "float16" else 2.0, 3.0, 1.0, 1.0, 0.5]
        straight = make_policy(tied, **options)
        expected = [one_step(straight, size) for size in sizes]
        first = make_policy(tied, **options)
        for size in sizes[:3]:
            one_step(first, size)
        moments, numbers = first.state()
        kept = {name: tensor.clone() for name, tensor in moments.items()}
        second = make_policy(tied, **options)
        second.restore(snapshot(first), moments, json.loads(json.dumps(numbers)))
        assert [one_step(second, size) for size in sizes[3:]] == expected[3:]
        assert same(snapshot(second), snapshot(straight))
        assert same(second.state()[0], straight.state()[0])
        assert second.state()[1] == straight.state()[1]
        assert same(dict(compute_copy(second).state_dict()), dict(compute_copy(straight).state_dict()))
        # What it was restored from is not what it steps with.
        assert same(moments, kept)

    def test_a_new_policy_can_be_restored_from_a_new_one(self, tied: Path) -> None:
        policy = make_policy(tied, **FLOAT32)
        moments, numbers = policy.state()
        assert moments == {}
        other = make_policy(tied, **FLOAT32)
        other.restore(policy.weights(), moments, numbers)
        assert one_step(other) == one_step(policy)
        assert same(snapshot(other), snapshot(policy))

    def test_a_parameter_without_moments_stays_without(self, tied: Path) -> None:
        policies = [make_policy(tied, **FLOAT32) for _ in range(2)]
        for policy in policies:
            policy.model.model.layers[1].mlp.requires_grad_(requires_grad=False)
        one_step(policies[0])
        moments, numbers = policies[0].state()
        assert not any(name.startswith("model.layers.1.mlp") for name in moments)
        policies[1].restore(snapshot(policies[0]), moments, numbers)
        assert one_step(policies[1]) == one_step(policies[0])
        assert same(snapshot(policies[1]), snapshot(policies[0]))

    @pytest.mark.parametrize("part", ["weights", "moments"])
    @pytest.mark.parametrize(
        "damage",
        [
            lambda tensors, name: tensors.pop(name),
            lambda tensors, name: tensors.update({name: tensors[name][:1]}),
            lambda tensors, name: tensors.update({f"{name}.more": tensors[name]}),
        ],
        ids=["missing", "cut", "unknown"],
    )
    def test_tensors_of_another_model_are_refused(
        self, tied: Path, part: str, damage: Callable[[dict[str, torch.Tensor], str], Any]
    ) -> None:
        policy = make_policy(tied, **FLOAT32)
        one_step(policy)
        weights, (moments, numbers) = snapshot(policy), policy.state()
        if part == "weights":
            damage(weights, "model.layers.0.mlp.up_proj.weight")
        else:
            damage(moments, "model.layers.0.mlp.up_proj.weight.exp_avg")
        other = make_policy(tied, **FLOAT32)
        before = snapshot(other)
        with pytest.raises(TableError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
            other.restore(weights, moments, numbers)
        assert same(snapshot(other), before)

    @pytest.mark.parametrize("mode", [FLOAT32, BF16_CAST], ids=["fp32", "bf16-cast"])
    def test_other_weights_are_held_for_the_while_only(self, tied: Path, mode: dict[str, Any]) -> None:
        policy, batch = make_policy(tied, **mode), make_batch()
        own = snapshot(policy)
        older = make_policy(tied, **mode)
        one_step(older, 100.0)
        with torch.no_grad():
            expected = older.logprobs(batch)[0]
            before = policy.logprobs(batch)[0]
            with policy.holding(older.weights()):
                assert torch.equal(policy.logprobs(batch)[0], expected)
            assert torch.equal(policy.logprobs(batch)[0], before)
        assert not torch.equal(before, expected)
        assert same(snapshot(policy), own)

    @pytest.mark.parametrize("mode", [FLOAT32, BF16_CAST], ids=["fp32", "bf16-cast"])
    def test_an_error_while_others_are_held_leaves_the_own(self, tied: Path, mode: dict[str, Any]) -> None:
        policy, batch = make_policy(tied, **mode), make_batch()
        own = snapshot(policy)
        other = {name: tensor + 1 for name, tensor in own.items()}
        with pytest.raises(KeyError), policy.holding(other):
            raise KeyError
        del other["model.norm.weight"]
        with pytest.raises(RuntimeError, match=r"model\.norm\.weight"), policy.holding(other):
            raise AssertionError
        assert same(snapshot(policy), own)
        with torch.no_grad():
            torch.testing.assert_close(policy.logprobs(batch)[0], make_policy(tied, **mode).logprobs(batch)[0])


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "qwen3"])
def test_weights_are_handed_on_as_a_checkpoint_has_them(tmp_path: Path, architecture: str) -> None:
    """Experts one by one, by the names that engines load; a tied head, which a file leaves out, under its own."""
    policy = make_policy(save_tiny(architecture, tmp_path), **FLOAT32)
    saved, found = load_file(tmp_path / "model.safetensors"), policy.as_saved(policy.weights())
    assert found.keys() - saved.keys() <= {"lm_head.weight"}
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    assert any(".experts.0." in name for name in found) == (architecture != "qwen3")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers draws them at random, and every number that follows would be of another model."""
    file = save_tiny("qwen3", tmp_path) / "model.safetensors"
    victim = "model.layers.1.mlp.down_proj.weight"
    weights = {name: tensor for name, tensor in load_file(file).items() if name != victim}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"has no values for 1 tensors, first {victim}"):
        make_policy(tmp_path, **FLOAT32)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_what_float32_rounds_is_measured_with_experts(tmp_path: Path, architecture: str) -> None:
    """torch's grouped product takes no float64; the model goes on with it afterwards."""
    policy, batch = make_policy(save_tiny(architecture, tmp_path), **FLOAT32), make_batch()
    before = policy.model.config._experts_implementation
    exact = policy.rounded_logprobs(batch, policy.weights(), "float32")[batch.mask]
    clean = policy.clean_logprobs(batch, policy.weights())[batch.mask]
    assert exact.dtype == torch.float64
    assert 1e-9 < (exact - clean.double()).abs().mean() < 1e-5
    assert policy.model.config._experts_implementation == before != "eager"


@every_mode
def test_memory_of_a_weight_is_what_a_step_holds(tied: Path, mode: dict[str, Any]) -> None:
    policy = make_policy(tied, **mode)
    one_step(policy)
    add_gradient(policy)
    held = [t for p in policy.model.parameters() for t in (p, p.grad) if t is not None]
    held += [t for entry in policy.optimizer.state.values() for t in entry.values() if t.ndim]
    if policy._compute is not policy.model:
        held += 2 * list(policy._compute.parameters())  # its gradients have just been handed on
    config = RlConfig.of(mode)
    n_weights = sum(p.numel() for p in policy.model.parameters())
    expected = config.bytes_per_weight - DTYPE_INFOS[config.rollout_dtype].bytes
    assert sum(t.numel() * t.element_size() for t in held) == n_weights * expected
