"""Injected stress on weights: its size, its seeds, and what it leaves alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.rl.config import Structure
from mismatch_probe.rl.stress import round_mantissa, stressed

FORMATS = [(7, torch.bfloat16), (10, torch.float16), (23, torch.float32)]
normal = st.floats(2.0**-126, 2.0**126, width=32)
signed = st.builds(math.copysign, normal, st.sampled_from([-1.0, 1.0]))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights() -> dict[str, torch.Tensor]:
    """With a tied head, a whole-number buffer, and two tensors of one shape."""
    shared = draw(200, 30)
    return {
        "embed.weight": shared,
        "lm_head.weight": shared,
        "a.weight": draw(100, 40, seed=1),
        "b.weight": draw(100, 40, seed=1),
        "steps": torch.tensor([3, 4]),
    }


@given(signed, st.integers(1, 22))
def test_rounding_against_float64(value: float, bits: int) -> None:
    """In FP32 nothing may be lost on the way: the nearest multiple of the unit in the last place kept, ties to even."""
    unit = 2.0 ** (math.floor(math.log2(abs(value))) - bits)
    if abs(value) < 2.0 ** math.floor(math.log2(abs(value))):  # log2 was rounded up to a power of two
        unit /= 2
    expected = np.float64(np.rint(np.float64(value) / unit) * unit)
    found = round_mantissa(torch.tensor([value]), bits)
    assert found.dtype == torch.float32
    assert found.item() == expected
    assert torch.equal(round_mantissa(found, bits), found)


@pytest.mark.parametrize(("bits", "dtype"), FORMATS)
def test_rounding_to_the_bits_of_a_format_is_that_format(bits: int, dtype: torch.dtype) -> None:
    values = draw(10_000)
    values = values[values.abs() > 2.0**-14]  # FP16 has no more exponents than this without losing bits
    ties = torch.tensor([1 + (n + 0.5) * 2.0**-bits for n in range(8)], dtype=torch.float64)
    for each in (values, -values, ties.float()):
        assert torch.equal(round_mantissa(each, bits), each.to(dtype).float())
    # In float64 the ties of FP32 exist too.
    assert torch.equal(round_mantissa(ties, bits), ties.to(dtype).double())


def test_rounding_at_the_ends_of_the_range() -> None:
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3e38, -3e38])
    assert torch.equal(round_mantissa(values, 7), values.bfloat16().float())
    assert round_mantissa(torch.tensor([math.nan]), 7).isnan()


def test_mantissa_rounds_every_floating_point_tensor() -> None:
    given = weights()
    found = stressed(given, "mantissa", 5.0, seed=0, step=0)
    for name, tensor in given.items():
        assert torch.equal(found[name], round_mantissa(tensor, 5) if tensor.is_floating_point() else tensor)


def test_weight_noise_is_normal_with_the_dose_as_its_relative_size() -> None:
    given, dose = weights(), 0.02
    found = stressed(given, "weight-noise", dose, seed=0, step=0)
    noise = ((found["embed.weight"].double() / given["embed.weight"].double() - 1) / dose).flatten().numpy()
    n = len(noise)
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / n)
    # Of tensors that are equal but do not share memory, each has its own.
    a, b = ((found[name] / given[name] - 1).flatten().double().numpy() for name in ("a.weight", "b.weight"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(len(a))


@pytest.mark.parametrize(("structure", "dose"), [("weight-noise", 0.1), ("mantissa", 3.0)])
def test_what_is_given_stays_and_ties_stay_ties(structure: Structure, dose: float) -> None:
    given = weights()
    before = {name: tensor.clone() for name, tensor in given.items()}
    found = stressed(given, structure, dose, seed=0, step=0)
    assert set(found) == set(given)
    assert all(torch.equal(given[name], before[name]) for name in given)
    assert torch.equal(found["lm_head.weight"], found["embed.weight"])
    assert torch.equal(found["steps"], given["steps"])
    assert all((t.dtype, t.shape) == (given[name].dtype, given[name].shape) for name, t in found.items())
    assert not torch.equal(found["a.weight"], given["a.weight"])


def test_noise_follows_from_seed_and_step_alone() -> None:
    given = weights()

    def noise(seed: int, step: int, order: int = 1) -> torch.Tensor:
        names = list(given)[::order]
        return stressed({name: given[name] for name in names}, "weight-noise", 0.1, seed=seed, step=step)["a.weight"]

    assert torch.equal(noise(1, 2), noise(1, 2))
    assert torch.equal(noise(1, 2), noise(1, 2, order=-1))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    different = [noise(*key) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (2**31 - 1, 10**6))]
    assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("structure", ["none", "logit-noise", "stale"])
def test_other_structures_leave_the_weights(structure: Structure) -> None:
    given = weights()
    found = stressed(given, structure, 1.0, seed=0, step=0)
    assert all(found[name] is given[name] for name in given)
