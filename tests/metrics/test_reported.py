"""What frameworks call metrics: every name is found again, and nothing is named twice."""

from __future__ import annotations

import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.reported import _DIFFERS, _MORE, SWITCHES, Reported, Trait, find, nearest, table

TABLE = table()


def named(name: str) -> str:
    return name.replace("*", "all")


@pytest.mark.parametrize("one", TABLE, ids=lambda one: f"{one.framework}:{one.name}")
def test_every_name_is_found(one: Reported) -> None:
    assert one in find(named(one.name))
    assert one.key == "" or one.key in CATALOG
    assert one.formula or one.context
    assert not (one.key and one.what)


def test_no_framework_names_one_thing_twice() -> None:
    places = [(one.framework, one.name) for one in TABLE]
    assert len(set(places)) == len(places)


def test_names_of_the_catalogue_stand_there_alone() -> None:
    held = {(framework, name) for info in CATALOG.values() for framework, name in info.names.items()}
    assert not held & {(one.framework, one.name) for one in _MORE}
    assert held <= {(one.framework, one.name) for one in TABLE}


def test_every_difference_is_of_a_name_in_the_catalogue() -> None:
    assert {(framework, key) for framework, key in _DIFFERS if framework not in CATALOG[key].names} == set()


def test_every_trait_is_used() -> None:
    assert {trait for one in TABLE for trait in one.traits} == set(typing.get_args(Trait))


def test_every_framework_has_a_switch() -> None:
    frameworks = {one.framework for one in TABLE if not one.context}
    assert frameworks - SWITCHES.keys() == {"ArviZ", "Oat"}
    assert SWITCHES.keys() <= frameworks


@pytest.mark.parametrize(
    ("name", "framework", "key"),
    [
        ("sampling/sampling_logp_difference/mean", "TRL", "mean_abs_logprob_diff"),
        ("train/sampling/sampling_logp_difference/mean", "TRL", "mean_abs_logprob_diff"),
        ("training/rollout_probs_diff_mean", "verl", "mean_abs_prob_diff"),
        ("rollout_corr/k3_kl", "verl", "kl_k3"),
        ("rollout_corr/kl", "verl", "kl_k1"),
        ("train/gen_kl_error", "NeMo-RL", "kl_k3"),
        ("token_mult_prob_error", "NeMo-RL", "token_mult_prob_error"),
        ("mismatch_kl/math/mean", "prime-rl", "kl_k3"),
        ("Mismatch KL", "prime-rl", "kl_k3"),
        ("train/train_rollout_logprob_abs_diff", "slime", "mean_abs_logprob_diff"),
        ("train/train_rollout_kl", "miles", "kl_k3"),
        ("policy/rollout_train_logprobs_abs_diff_mean", "SkyRL", "mean_abs_logprob_diff"),
        ("debug/vllm_vs_local_logprob_diff_mean", "open-instruct", "mean_abs_logprob_diff"),
        ("vllm_kl", "OpenRLHF", "kl_k1"),
        ("optim/kl_sample_train_v1", "Tinker", "kl_k1"),
        ("optim/kl_sample_train_v2", "Tinker", "kl_k2"),
        ("gen_kl_error:mean", "NeMo-RL", "kl_k3"),
    ],
)
def test_a_framework_s_name(name: str, framework: str, key: str) -> None:
    assert key in {one.key for one in find(name) if one.framework == framework}


@pytest.mark.parametrize(
    "name", ["loss", "kl", "rollout/kl_loss", "lr", "", "/", "step", "other/reward", "mean", "max"]
)
def test_names_of_other_things_are_no_mismatch(name: str) -> None:
    assert all(one.context for one in find(name))


def test_a_name_is_read_with_context_only_where_it_may_stand() -> None:
    assert find("train/entropy")
    assert not find("tokens_of/entropy")


@given(st.text(max_size=60))
def test_any_text_is_looked_up(name: str) -> None:
    assert all(isinstance(one, Reported) for one in find(name))
    assert len(nearest(name)) <= 2


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("sampling_logps_difference/mean", "sampling/sampling_logp_difference/mean"),
        ("training/rollout_prob_diff_mean", "training/rollout_probs_diff_mean"),
        ("gen_kl_eror", "gen_kl_error"),
    ],
)
def test_a_name_that_is_nearly_known(name: str, known: str) -> None:
    assert known in nearest(name)


def test_nothing_is_near_to_a_name_of_other_things() -> None:
    assert not nearest("learning_rate")
