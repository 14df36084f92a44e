"""Profiles: those that ship, and what a user's own file may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.probes.audit.checks import is_extreme, is_rare, own_checks
from mismatch_probe.probes.audit.profile import PROFILES, load_profile
from mismatch_probe.report.words.audit import CHECK_TITLES, limit_text


@pytest.mark.parametrize("name", PROFILES)
def test_shipped_profiles_load_and_say_who_says_so(name: str) -> None:
    profile = load_profile(name)
    assert profile.description
    assert profile.checks
    for check, bounds in profile.checks.items():
        assert check in CATALOG or check in own_checks()
        assert bounds.source, check
        assert limit_text(bounds)
        assert is_rare(check) == (bounds.event is not None)


def test_maxima_and_counts_are_extremes_and_k_hat_is_not() -> None:
    assert is_extreme("max_abs_logprob_diff")
    assert is_extreme("seq_log_ratio_min")
    assert not is_extreme("pareto_k")
    assert not is_extreme("kl_k3")
    assert is_extreme("fp16_headroom")
    assert not is_extreme("fp16_weights")


def test_every_own_check_is_in_the_default_profile_and_has_a_title() -> None:
    assert set(own_checks()) <= set(load_profile("default").checks)
    assert set(own_checks()) == set(CHECK_TITLES)


def test_limits_of_the_contract() -> None:
    checks = load_profile("default").checks
    assert (checks["kl_k3"].warn_above, checks["kl_k3"].fail_above) == (1e-3, 1.5e-2)
    assert (checks["token_mult_prob_error"].warn_above, checks["token_mult_prob_error"].fail_above) == (1.05, 1.1)
    assert (checks["mean_abs_prob_diff"].warn_above, checks["mean_abs_prob_diff"].fail_above) == (5e-3, 1e-2)
    assert "mean_abs_prob_diff" not in load_profile("prime-rl").checks
    assert load_profile("verl").checks["verl_ess"].warn_below == 0.3


def test_strict_is_never_laxer_than_default() -> None:
    strict, default = load_profile("strict").checks, load_profile("default").checks
    for name, bounds in default.items():
        for limit, value in bounds.limits.items():
            other = getattr(strict[name], limit)
            # A limit that strict lacks must be one that it fails before.
            other = strict[name].limits.get(limit.replace("warn", "fail")) if other is None else other
            assert other is not None, (name, limit)
            assert other <= value if "above" in limit else other >= value, (name, limit)
        order = (None, "warn", "fail")
        assert order.index(strict[name].event) >= order.index(bounds.event), name
        if bounds.rate_below is not None:
            assert (strict[name].rate_below or 1.0) <= bounds.rate_below, name


def write(folder: Path, text: str) -> str:
    path = folder / "ours.toml"
    path.write_text(text)
    return str(path)


def test_an_own_profile_extends_and_replaces_and_skips(tmp_path: Path) -> None:
    profile = load_profile(
        write(tmp_path, 'extends = "default"\nskip = ["kl_k1"]\n[checks.kl_k3]\nfail_above = 0.5\nsource = "us"\n')
    )
    assert profile.name == "ours"
    assert profile.checks["kl_k3"].limits == {"fail_above": 0.5}
    assert "kl_k1" not in profile.checks
    assert "chi2_token" in profile.checks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[checks.kl_k4]\nwarn_above = 1\n", "there is no check 'kl_k4'"),
        ("[checks.kl_k3]\nwarn_over = 1\n", "warn_over"),
        ("[checks.kl_k3]\nwarn_above = 2\nfail_above = 1\n", "would never warn"),
        ("[checks.kl_k3]\nsource = 'us'\n", "names no limit"),
        ("[checks.kl_k3]\nevent = 'fail'\n", "is no rare event"),
        ("[checks.nonfinite_logprobs]\nwarn_above = 1\n", "is a rare event"),
        ("[checks.kl_k3]\nwarn_above = nan\n", "warn_above"),
        ("[checks.nonfinite_logprobs]\nrate_below = 1e-3\n", "names no limit"),
        ("[checks.kl_k3]\nwarn_above = 1\nrate_below = 1e-3\n", "is no rare event"),
        ("[checks.one_sided]\nevent = 'fail'\n", "needs `within`"),
        ("[checks.kl_k3]\nwarn_above = 1\nwithin = 0.1\n", "needs `within`"),
        ("extends = 'lax'\n", "extends"),
        ("[checks.kl_k3\n", "cannot be read"),
    ],
)
def test_a_bad_file_is_told_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_profile(write(tmp_path, text))
    assert message in error.value.what
    assert error.value.fix


def test_a_name_or_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no profile 'lenient'"):
        load_profile("lenient")
    with pytest.raises(UsageError, match="does not exist"):
        load_profile(str(tmp_path / "none.toml"))
