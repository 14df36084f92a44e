"""What logged metrics say: of simulated tokens, whose metrics numpy computes, and of what people paste."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import stats

import mismatch_probe
from mismatch_probe.errors import IngestError, ProbeError, UsageError
from mismatch_probe.metrics.reported import SWITCHES, table
from mismatch_probe.report.explain import explain_report
from mismatch_probe.results.explanation import Explanation
from mismatch_probe.results.finding import Finding
from tests.frozen import FROZEN
from tests.ingest.event_files import event_file
from tests.ingest.test_metric_log import PIECES
from tests.snapshot import screen

Floats = NDArray[np.float64]
AUDIT = FROZEN / "audit" / "audit" / "audit.json"
DIFF, KL, K1, CHI2 = "sampling/sampling_logp_difference/mean", "rollout_corr/k3_kl", "rollout_corr/kl", "chi2_token"


def explain(content: str | bytes, **options: str) -> Explanation:
    data = content.encode() if isinstance(content, str) else content
    return mismatch_probe.explain(io.BytesIO(data), name="it", **options)


def lines(records: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in records)


def series(values: Iterable[float | None], name: str = "gen_kl_error") -> str:
    return lines({"step": n, name: value} for n, value in enumerate(values, 1))


def codes(document: Explanation, *severities: str) -> list[str]:
    return [one.code for one in document.of(*(severities or ("fail", "warn", "note", "info")))]


def told(document: Explanation, code: str) -> Finding:
    (found,) = [one for one in document.findings if one.code == code]
    return found


def logged(steps: Sequence[Floats]) -> str:
    """What verl and TRL log of log ratios `d` of each step."""
    return lines(
        {
            "step": n,
            "rollout_corr/kl": float(-d.mean()),
            "rollout_corr/k3_kl": float((np.expm1(d) - d).mean()),
            "rollout_corr/chi2_token": float(np.exp(2 * d).mean() - 1),
            "actor/entropy": 0.5,
            "response_length/mean": 100,
        }
        for n, d in enumerate(steps)
    )


# --- identities and inequalities


@given(arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 30)), elements=st.floats(-3, 3)))
def test_what_follows_from_logged_metrics_is_that_of_the_tokens(steps: Floats) -> None:
    found = {one.key: one for one in explain(logged(list(steps))).derived}
    last = steps[-1]
    assert found["mean_ratio"].last.value == pytest.approx(np.exp(last).mean(), rel=1e-9)
    assert found["ess_token"].last.value == pytest.approx(
        np.exp(last).sum() ** 2 / (last.size * np.exp(2 * last).sum()), rel=1e-9
    )
    assert found["kl_entropy_ratio"].last.value == pytest.approx((np.expm1(last) - last).mean() / 0.5, abs=1e-12)
    assert found["mean_ratio"].n == len(steps)


@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(-4, 4)))
def test_means_of_the_same_tokens_are_never_called_different(d: Floats) -> None:
    size = np.abs(d)
    document = explain(
        lines(
            [
                {
                    "policy/rollout_train_logprobs_abs_diff_mean": float(size.mean()),
                    "policy/rollout_train_logprobs_abs_diff_max": float(size.max()),
                }
            ]
        )
    )
    assert "log-mean-above-maximum" not in codes(document)
    for name, value in (
        ("train_rollout_kl", (np.expm1(d) - d).mean()),
        ("mis_k3_kl", (np.expm1(d) - d).mean()),
    ):
        both = explain(lines([{"train_rollout_logprob_abs_diff": float(size.mean()), name: float(value)}]))
        assert "log-not-same-tokens" not in codes(both)
        assert "log-impossible" not in codes(both)


def test_a_kl_below_what_mean_d_allows() -> None:
    document = explain(lines([{"train_rollout_logprob_abs_diff": 0.5, "train_rollout_kl": 0.05}]))
    found = told(document, "log-not-same-tokens")
    assert found.number("least") == pytest.approx(np.exp(-0.5) - 1 + 0.5)
    assert found.number("value") == 0.05


def test_a_mean_above_its_maximum() -> None:
    found = told(explain(lines([{DIFF: 0.5, DIFF.replace("mean", "max"): 0.4}])), "log-mean-above-maximum")
    assert (found.severity, found.whole("n")) == ("warn", 1)


@pytest.mark.parametrize(("shift", "code"), [(0.0, "log-ratio-fits-1"), (2e-3, "log-ratio-not-1")])
def test_mean_ratio_over_steps(shift: float, code: str) -> None:
    rng = np.random.default_rng(3)
    steps = [rng.normal(-0.5 * 0.05**2 + shift, 0.05, 4000) for _ in range(30)]  # E[exp d] = exp(shift)
    document = explain(logged(steps))
    found = told(document, code)
    ratios = np.array([np.exp(d).mean() - 1 for d in steps])
    low, high = stats.t.interval(0.95, 29, ratios.mean(), stats.sem(ratios))
    excess = found.metric("excess")
    assert (excess.value, excess.ci_low, excess.ci_high) == pytest.approx((ratios.mean(), low, high), rel=1e-6)
    assert found.names("names") == (K1, KL)


def test_the_logged_mean_ratio_itself() -> None:
    found = told(explain(series([1.01, 1.011] * 5, "train/tis")), "log-ratio-not-1")
    assert found.metric("excess").value == pytest.approx(0.0105)
    assert "log-ratio-not-1" not in codes(explain(series([1.01, 1.011] * 5, "sampling_importance_ratio")))


def test_one_step_does_not_test_the_mean_ratio() -> None:
    assert not {"log-ratio-not-1", "log-ratio-fits-1"} & set(codes(explain(lines([{K1: 1e-3, KL: 5e-3}]))))


def test_a_negative_k1() -> None:
    found = told(explain(series([-0.1, 0.2, 0.3], K1)), "log-negative-k1")
    assert (found.whole("n_negative"), found.whole("steps"), found.severity) == (1, 3, "info")


@pytest.mark.parametrize(
    ("name", "value"),
    [("training/rollout_probs_diff_mean", 1.2), ("gen_kl_error", -0.5), ("token_mult_prob_error", 0.9)],
)
def test_values_that_cannot_be(name: str, value: float) -> None:
    found = told(explain(lines([{name: value}])), "log-impossible")
    assert found.number("value") == value


def test_exactly_equal_log_probs() -> None:
    assert "log-all-zero" in codes(explain(series([0.0, 0.0])), "warn")
    assert "log-all-zero" not in codes(explain(series([0.0, 1e-9])))
    assert "log-all-zero" not in codes(explain("Step 1 | Loss 0.1 | Mismatch KL 0.0000 | LR 1\n"))


def test_the_bound_of_weights() -> None:
    found = told(explain(series([1.5, 2.0, 2.0], "rollout_corr/rollout_is_max")), "log-capped")
    assert (found.number("cap"), found.whole("n")) == (2.0, 2)


@pytest.mark.parametrize(("heavy", "code"), [(False, "log-tail"), (True, "log-heavy-tail")])
def test_tail_beside_a_normal_distribution(heavy: bool, code: str) -> None:
    rng = np.random.default_rng(4)
    d = rng.normal(0, 0.01, 200_000)
    if heavy:
        d[:200] = 2
    values = {"train_rollout_logprob_abs_diff": np.abs(d).mean(), "train_rollout_kl": (np.expm1(d) - d).mean()}
    factor = told(explain(lines([values])), code).number("factor")
    assert factor == pytest.approx(1, rel=0.02) if not heavy else factor > 4


def test_effect_on_whole_sequences() -> None:
    # For D of a normal distribution on policy, KL = Var D / 2, and ESS = exp(-Var D).
    found = told(explain(lines([{KL: 1e-3, "response_length/mean": 400}])), "log-sequence-effect")
    assert found.number("kl_sequence") == pytest.approx(0.4)
    assert found.number("ess") == pytest.approx(np.exp(-0.8))


def test_a_low_correlation() -> None:
    values = {"training/rollout_actor_probs_pearson_corr": 0.9, "training/rollout_probs_diff_mean": 1e-3}
    assert told(explain(lines([values])), "log-pearson-low").number("pearson") == 0.9


# --- limits, jumps, trends


def test_limits_of_the_last_step_and_of_earlier_ones() -> None:
    exceeded = told(explain(series([1e-4, 2e-3, 3e-3])), "log-limit-exceeded")
    assert (exceeded.severity, exceeded.number("bound"), exceeded.whole("n")) == ("warn", 1e-3, 2)
    assert exceeded.number("first_beyond") == 2
    was = told(explain(series([1e-4, 2e-2, 1e-4])), "log-limit-was-exceeded")
    assert (was.severity, was.number("bound")) == ("note", 0.015)


@pytest.mark.parametrize(
    ("name", "kept", "beyond"),
    [
        ("gen_kl_error", 1e-3, 1.001e-3),
        ("token_mult_prob_error", 1.05, 1.051),
        ("training/rollout_probs_diff_mean", 5e-3, 5.1e-3),
        (K1, -0.1, -0.11),
        ("train_rollout_logprob_abs_diff", 0.1, 0.11),
        ("rollout_corr/rollout_is_mean", 0.5, 0.49),
        ("rollout_corr/rollout_is_eff_sample_size", 0.3, 0.29),
        ("rollout_corr/chi2_token", 1.0, 1.1),
    ],
)
def test_published_limits(name: str, kept: float, beyond: float) -> None:
    assert "log-limit-exceeded" not in codes(explain(lines([{name: kept}])))
    assert "log-limit-exceeded" in codes(explain(lines([{name: beyond}])))


def test_a_jump_and_a_trend() -> None:
    values = 1e-4 * np.random.default_rng(5).lognormal(0, 0.05, 60)
    values[40:] *= 20
    jump = told(explain(series(values.tolist())), "log-jump")
    assert (jump.number("before_step"), jump.number("after_step")) == (40, 41)
    slow = 1e-4 * (1 + np.arange(60) / 60) + np.random.default_rng(6).normal(0, 1e-6, 60)
    document = explain(series(slow.tolist()))
    assert told(document, "log-trend").metric("slope").value == pytest.approx(1e-4 / 60 * 100, rel=0.1)
    assert "log-jump" not in codes(document)
    assert document.series[0].median == np.median(slow)


def test_noise_has_neither() -> None:
    assert not {"log-jump", "log-trend"} & set(
        codes(explain(series((1e-4 * np.random.default_rng(7).lognormal(0, 0.1, 200)).tolist())))
    )


# --- what was read


def test_values_that_are_not_finite() -> None:
    document = explain(series([1e-4, None, float("nan"), float("inf"), 2e-4]))
    found = told(document, "log-not-finite")
    assert [found.whole(key) for key in ("missing", "nan", "inf", "finite")] == [1, 1, 1, 2]
    assert document.series[0].n == 2


def test_nothing_finite_is_still_told() -> None:
    document = explain(series([float("nan")]))
    assert document.series[0].last is None
    assert "log-not-finite" in codes(document, "warn")
    assert screen(explain_report(document))


def test_a_restart_counts_the_last_value_of_a_step() -> None:
    document = explain(lines({"step": n, KL: v} for n, v in ((1, 1e-4), (2, 2e-4), (3, 9e-4), (2, 3e-4), (3, 4e-4))))
    assert told(document, "log-steps-repeated").whole("n") == 2
    assert (document.series[0].n, document.series[0].last.value) == (3, 4e-4)  # type: ignore[union-attr]


def test_names_that_several_frameworks_use() -> None:
    alone = explain(series([0.01], "train/train_rollout_logprob_abs_diff"))
    assert told(alone, "log-name-shared").where == alone.frameworks[0]
    miles = explain(lines([{"train/train_rollout_logprob_abs_diff": 0.01, "train/train_rollout_kl": 1e-4}]))
    assert miles.frameworks == ("miles",)


def test_an_export_that_averages() -> None:
    text = f"Step,run - {KL},run - {KL}__MIN,run - {KL}__MAX\n1,0.1,0.1,0.5\n2,0.2,0.1,0.2\n"
    found = told(explain(text), "log-averaged-steps")
    assert (found.number("largest"), found.number("shown"), found.whole("series")) == (0.5, 0.2, 1)


def test_a_trait_that_cannot_matter_is_not_told() -> None:
    assert "log-float32" in codes(explain(series([1e-9])))
    assert "log-float32" not in codes(explain(series([1e-3])))


@pytest.mark.parametrize("framework", SWITCHES)
def test_every_framework_has_a_dump_that_a_reader_takes(framework: str) -> None:
    name = next(one.name for one in table() if one.framework == framework and not one.context)
    document = explain(json.dumps({name.replace("*", "all"): 0.01}))
    dumps = {one.framework: one for one in document.dumps}
    one = dumps.get(framework, next(iter(dumps.values())))
    assert one.switch
    assert one.written_for
    assert one.command.startswith("mismatch-probe compare --from DIR")
    assert ("--trust-pickle" in one.command) == one.pickles


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{'loss': 0.1, 'reward': 0.5, 'completions/mean_length': 9}", "vllm_importance_sampling_correction"),
        ("{'sampling_logps_difference/mean': 0.3}", "sampling/sampling_logp_difference/mean"),
        ('{"token_ids": [1], "generation_logprobs": [-0.1]}', "compare --from it"),
        ("nothing here", "no line with metrics"),
    ],
)
def test_no_metric_of_the_mismatch(content: str, said: str) -> None:
    with pytest.raises(IngestError) as raised:
        explain(content)
    assert said in str(raised.value)


# --- beside an audit


def test_beside_an_audit() -> None:
    audit = json.loads(AUDIT.read_text())
    predicted = {
        pair["rollout_dtype"] + "/" + pair["trainer_dtype"]: pair["mean_abs_logprob_diff"]["value"]
        for pair in audit["pairs"]
    }
    document = explain(series([0.05], DIFF), audit=str(AUDIT), pair="fp16/fp16")
    assert document.audit is not None
    (one,) = document.audit.predictions
    assert one.predicted.value == predicted["float16/float16"]
    assert one.ratio == pytest.approx(0.05 / predicted["float16/float16"])
    assert "log-above-prediction" in codes(document)
    # k1 is signed: a ratio to what was measured says nothing.
    signed = explain(series([0.05], K1), audit=str(AUDIT), pair="fp16/fp16")
    assert signed.audit is not None
    assert not signed.audit.predictions
    alarm = explain(series([0.05], KL), audit=str(AUDIT), pair="fp16/fp16")
    assert "log-above-alarm" in codes(alarm, "warn")
    within = explain(series([1e-9], DIFF), audit=str(AUDIT.parent), pair="fp16/fp16")
    assert "log-within-prediction" in codes(within)


@pytest.mark.parametrize("pair", ["fp64/fp64", "bf16", "nonsense/bf16"])
def test_a_pair_that_the_audit_does_not_have(pair: str) -> None:
    with pytest.raises(UsageError):
        explain(series([0.05], DIFF), audit=str(AUDIT), pair=pair)


# --- anything


@given(
    st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=8)), max_size=12).map(b"".join),
    st.dictionaries(
        st.sampled_from([one.name.replace("*", "all") for one in table()]),
        st.lists(st.none() | st.floats(), min_size=1, max_size=12),
        max_size=6,
    ),
    st.sampled_from(["jsonl", "python", "csv", "events"]),
)
def test_any_file_gives_a_document_or_an_error(junk: bytes, columns: dict[str, list[float | None]], shape: str) -> None:
    n = max((len(values) for values in columns.values()), default=0)
    rows = [{"step": step} | {k: v[step] for k, v in columns.items() if step < len(v)} for step in range(n)]
    if shape == "events":
        data = event_file(
            (step, {k: float(np.clip(v, -3e38, 3e38)) for k, v in row.items() if v is not None})
            for step, row in enumerate(rows)
        )
    elif shape == "csv":
        header = ["step", *columns]
        data = "\n".join([",".join(header), *(",".join(str(row.get(k, "")) for k in header) for row in rows)]).encode()
    else:
        data = "\n".join(json.dumps(row) if shape == "jsonl" else repr(row) for row in rows).encode()
    try:
        document = explain(data + junk)
    except ProbeError as error:
        assert_told = error.what and len(str(error)) < 20_000
        assert assert_told
        return
    assert screen(explain_report(document))
    again = json.dumps(document.content(), allow_nan=False)
    assert Explanation.model_validate(json.loads(again)).n_unknown == document.n_unknown


def test_a_long_log_is_streamed(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "log"
    with path.open("w") as file:
        for n in range(20_000):
            file.write(
                f"step:{n} - {KL}:{1e-4 + n * 1e-9:.9f} - " + " - ".join(f"perf/{k}:{n}" for k in range(20)) + "\n"
            )
    tracemalloc.start()
    document = mismatch_probe.explain(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert document.series[0].n == 20_000
    assert peak < 24 << 20
