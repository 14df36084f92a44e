"""Signatures of faults on toy policies whose distributions are known: what each finds, and what none may find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from mismatch_probe.probes.diagnose.base import State, group_spread, normalised, robust_fit
from mismatch_probe.probes.diagnose.evidence import Evidence
from mismatch_probe.probes.diagnose.noise import Noise, fit_noise, t_log_density
from mismatch_probe.probes.diagnose.one_sided import one_sided
from mismatch_probe.probes.diagnose.run import explain_away, outcome, remainder
from mismatch_probe.probes.diagnose.signatures import penalty, scaled_logprobs, signatures, temperature
from tests.probes.toy_dump import Toy, log_softmax, moved, resampled, toy

Floats = NDArray[np.float64]


def top_p(logits: Floats, p: float) -> Floats:
    """Logits with −inf for what top-p leaves out."""
    logprobs = log_softmax(logits)
    order = np.argsort(-logprobs, -1)
    before = np.cumsum(np.exp(np.take_along_axis(logprobs, order, -1)), -1)
    before -= np.exp(np.take_along_axis(logprobs, order, -1))
    keep = np.zeros(logits.shape, np.bool_)
    np.put_along_axis(keep, order, before < p, -1)
    return np.where(keep, logits, -np.inf)


def by_row(one: Toy, codes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.asarray(codes[one.sequence])


def raw_rollout() -> Toy:
    one = toy(temperature=0.7)
    return replace(one, trainer=one.trainer / 0.7)


def trainer_temperature() -> Toy:
    one = toy()
    return replace(one, trainer=one.trainer / 1.5)


def divided() -> Toy:
    one = toy()
    return replace(one, trainer_logprobs=one.chosen(one.trainer) / 1.3)


def truncated_rollout() -> Toy:
    one = toy()
    return resampled(one, top_p(one.engine, 0.9))


def truncated_trainer() -> Toy:
    one = truncated_rollout()
    return replace(one, engine=one.trainer, trainer=one.engine)


def padded_vocabulary() -> Toy:
    """The rollout's softmax sums over 30 rows of zeros that are no tokens."""
    one = toy()
    zeros = np.zeros((len(one.ids), 30))
    return replace(one, rollout_logprobs=one.chosen(np.concatenate([one.engine, zeros], axis=1)))


def penalised(change: Callable[[Floats], Floats]) -> Toy:
    """The rollout changes the logits of tokens that stand earlier in the response, and samples from that."""
    one = toy(length=120)
    engine, ids = one.engine.copy(), one.ids.copy()
    for i in range(len(ids)):
        first = i - one.position[i]
        seen = np.unique(ids[first:i])
        engine[i, seen] = change(engine[i, seen])
        ids[i] = int((engine[i] + one.rng.gumbel(size=engine.shape[1])).argmax())
    return replace(one, engine=engine, ids=ids)


def repetition_penalty() -> Toy:
    return penalised(lambda logits: np.where(logits > 0, logits / 1.3, logits * 1.3))


def presence_penalty() -> Toy:
    return penalised(lambda logits: logits - 0.5)


def top1() -> Toy:
    one = toy()
    return replace(one, rollout_logprobs=log_softmax(one.engine).max(-1))


def shifted() -> Toy:
    one = toy()
    return replace(one, rollout_logprobs=np.roll(one.chosen(one.engine), 1))


def shifted_in_packs() -> Toy:
    """Each sequence of a pack is off by one more token."""
    one = toy()
    b = one.chosen(one.engine)
    one.rows["pack_index"] = np.arange(one.n_sequences) % 3
    lag = by_row(one, one.rows["pack_index"])
    index = np.arange(len(b)) - lag
    inside = one.position >= lag
    return replace(one, rollout_logprobs=np.where(inside, b[np.maximum(index, 0)], b))


def retokenised() -> Toy:
    one = toy()
    b = one.chosen(one.engine)
    for sequence in range(0, one.n_sequences, 2):
        where = np.flatnonzero(one.sequence == sequence)
        tail = where[len(where) // 2 :]
        b[tail] = np.roll(b[tail], 1)
    return replace(one, rollout_logprobs=b)


def end_placeholders() -> Toy:
    one = toy()
    b = one.chosen(one.engine)
    b[np.flatnonzero(np.diff(one.sequence, append=-1))] = -9999.0
    return replace(one, rollout_logprobs=b)


def placeholders() -> Toy:
    one = toy()
    b = one.chosen(one.engine)
    return replace(one, rollout_logprobs=np.where(one.rng.random(len(b)) < 0.03, 1.0, b))


def missing_values() -> Toy:
    one = toy()
    b = one.chosen(one.engine)
    return replace(one, rollout_logprobs=np.where(b > -0.01, np.nan, b))


def recomputed() -> Toy:
    one = toy()
    return replace(one, trainer=one.engine)


def replica() -> Toy:
    one = toy()
    one.rows["replica"], one.labels["replica"] = one.rng.integers(0, 4, one.n_sequences), ("a", "b", "c", "d")
    bad = by_row(one, one.rows["replica"]) == 2
    return replace(one, trainer=np.where(bad[:, None], one.engine + 4 * (one.trainer - one.engine), one.trainer))


def packed() -> Toy:
    one = toy()
    one.rows["pack_index"] = one.rng.integers(0, 4, one.n_sequences)
    return moved(one, 1.0, (by_row(one, one.rows["pack_index"]) > 0) & (one.position < 20))


def later_turns() -> Toy:
    one = toy()
    one.tokens["turn"] = one.position // 20
    return moved(one, 0.5, one.tokens["turn"] > 0)


def with_steps() -> Toy:
    one = toy()
    one.rows["step"] = np.arange(one.n_sequences) // 6
    return one


def falls_behind() -> Toy:
    one = with_steps()
    change = one.rng.standard_normal(one.engine.shape) * 0.03
    return resampled(one, one.engine + change * by_row(one, one.rows["step"])[:, None])


def step_change() -> Toy:
    one = with_steps()
    return moved(one, 0.6, by_row(one, one.rows["step"]) >= 3)


def one_step() -> Toy:
    one = with_steps()
    return moved(one, 0.6, by_row(one, one.rows["step"]) == 4)


def lag() -> Toy:
    one = toy()
    one.tokens["weight_version"] = by_row(one, one.rng.integers(2, 6, one.n_sequences))
    one.rows["trainer_version"] = np.full(one.n_sequences, 5)
    old = 0.06 * (5 - one.tokens["weight_version"])[:, None]
    return resampled(one, one.engine + one.rng.standard_normal(one.engine.shape) * old)


def positions() -> Toy:
    one = toy(length=120)
    return moved(one, 0.5, one.position + by_row(one, one.prompt_length) >= 80)


def prompts_differ() -> Toy:
    one = toy()
    fading = 0.8 * np.exp(-one.position / 6)[:, None]
    return resampled(one, one.engine + one.rng.standard_normal(one.engine.shape) * fading)


def some_sequences() -> Toy:
    one = toy()
    return moved(one, 0.8, one.sequence % 6 == 0)


def padded() -> Toy:
    one = toy()
    longest = one.prompt_length.reshape(-1, 8).max(1).repeat(8)
    return moved(one, 0.6, by_row(one, one.prompt_length) < by_row(one, longest))


def capped_tail() -> Toy:
    one = toy()
    lengths = np.bincount(one.sequence)
    capped = lengths >= 50
    one.rows["finish_reason"], one.labels["finish_reason"] = capped.astype(np.int64), ("stop", "length")
    return moved(one, 1.5, by_row(one, capped) & (one.position >= by_row(one, lengths) - 3))


def repeated_prompts() -> Toy:
    one = toy()
    again = np.arange(one.n_sequences) >= 24
    one.rows["step"] = again.astype(np.int64)
    one = replace(one, prompt=np.where(np.arange(one.n_sequences) < 36, np.arange(one.n_sequences) % 24, np.arange(48)))
    return moved(one, 0.7, by_row(one, again & (one.prompt < 24)))  # type: ignore[operator]


FAULTS: dict[str, list[Callable[[], Toy]]] = {
    "temperature": [raw_rollout, trainer_temperature],
    "scaled-logprobs": [divided],
    "truncation": [truncated_rollout, truncated_trainer, padded_vocabulary],
    "penalty": [repetition_penalty, presence_penalty],
    "top1-logprobs": [top1],
    "shift": [shifted, shifted_in_packs],
    "retokenised": [retokenised],
    "end-placeholders": [end_placeholders],
    "placeholders": [placeholders],
    "missing-values": [missing_values],
    "recomputed": [recomputed],
    "replica": [replica],
    "packing": [packed],
    "later-turns": [later_turns],
    "falls-behind": [falls_behind],
    "step-change": [step_change],
    "one-step": [one_step],
    "weight-lag": [lag],
    "positions": [positions],
    "prompts-differ": [prompts_differ],
    "some-sequences": [some_sequences],
    "padding": [padded],
    "capped-tail": [capped_tail],
    "repeated-prompts": [repeated_prompts],
}


@pytest.mark.parametrize(("name", "make"), [(name, make) for name, makes in FAULTS.items() for make in makes])
def test_a_planted_fault_is_found_first_and_alone(name: str, make: Callable[[], Toy]) -> None:
    found, _ = explain_away(make().evidence())
    assert [one.candidate.signature.name for one in found] == [name]


def keyed() -> Toy:
    """Nothing is wrong, and every key is there."""
    one = with_steps()
    one.rows["replica"], one.labels["replica"] = one.rng.integers(0, 4, one.n_sequences), ("a", "b", "c", "d")
    one.rows["pack_index"] = one.rng.integers(0, 4, one.n_sequences)
    one.tokens["turn"] = one.position // 20
    one.tokens["weight_version"] = by_row(one, one.rng.integers(2, 6, one.n_sequences))
    one.rows["finish_reason"], one.labels["finish_reason"] = one.rng.integers(0, 2, one.n_sequences), ("stop", "length")
    one.rows["tags"], one.labels["tags"] = one.rng.integers(0, 3, one.n_sequences), ("x", "y", "z")
    return one


@pytest.mark.parametrize("make", [toy, lambda: toy(noise=0.003), lambda: toy(noise=0.06), keyed])
def test_rounding_is_found_where_nothing_is_planted(make: Callable[[], Toy]) -> None:
    evidence = make().evidence()
    found, state = explain_away(evidence)
    assert found == []
    assert outcome(found, remainder(evidence, state)) == "rounding"


@pytest.mark.parametrize("size", [0.3, 1.0])
def test_other_weights_without_a_key_cannot_be_told(size: float) -> None:
    evidence = moved(toy(), size).evidence()
    found, state = explain_away(evidence)
    assert outcome(found, remainder(evidence, state)) == ("cannot-tell" if size < 1 else "fault")
    assert [one.candidate.signature.name for one in found] == ([] if size < 1 else ["other-forward"])


def packed_with_ends() -> Toy:
    one = packed()
    b = one.chosen(one.engine)
    b[np.flatnonzero(np.diff(one.sequence, append=-1))] = 1.0
    return replace(one, rollout_logprobs=b)


def packed_at_a_temperature() -> Toy:
    """What packing breaks says nothing of whether log-probs sum to 1."""
    one = toy(n_sequences=96)
    one.rows["pack_index"] = np.arange(one.n_sequences) % 3
    one = moved(one, 3.0, by_row(one, one.rows["pack_index"]) > 0)
    return replace(one, trainer=one.trainer / 1.5)


def zeros_where_the_trainer_is_broken() -> Toy:
    """The trainer denies certain tokens as often as placeholders; only these are 0."""
    one = positions()
    one = moved(one, 6.0, one.position + by_row(one, one.prompt_length) >= 80)
    b = one.chosen(one.engine)
    return replace(one, rollout_logprobs=np.where(one.rng.random(len(b)) < 0.1, 0.0, b))


def missing_while_it_falls_behind() -> Toy:
    """What a missing value gains is no measure for what comes after it."""
    one = falls_behind()
    b = one.chosen(one.engine)
    return replace(one, rollout_logprobs=np.where(one.sequence % 5 == 0, np.nan, b))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (packed_with_ends, {"packing", "end-placeholders"}),
        (packed_at_a_temperature, {"packing", "temperature"}),
        (zeros_where_the_trainer_is_broken, {"positions", "placeholders"}),
        (missing_while_it_falls_behind, {"falls-behind", "missing-values"}),
    ],
)
def test_two_faults_of_different_kinds_are_both_found(make: Callable[[], Toy], names: set[str]) -> None:
    found, _ = explain_away(make().evidence())
    assert {one.candidate.signature.name for one in found} == names


def test_certain_tokens_that_a_broken_trainer_denies_are_no_placeholders() -> None:
    """Where log-probs round to 0 others nearly do."""
    one = toy(length=120)
    certain = one.rng.random(len(one.ids)) < 0.1
    one = moved(one, 3.0, one.position + by_row(one, one.prompt_length) >= 80)
    b = np.where(
        certain,
        -np.where(one.rng.random(len(one.ids)) < 0.5, 0.0, 10 ** one.rng.uniform(-7, -5, len(one.ids))),
        one.chosen(one.engine),
    )
    a = np.where(certain & (one.position + by_row(one, one.prompt_length) < 80), b, one.chosen(one.trainer))
    found, _ = explain_away(replace(one, rollout_logprobs=b, trainer_logprobs=a).evidence())
    assert "placeholders" not in {other.candidate.signature.name for other in found}


def test_growth_that_is_faster_than_the_steps_falls_behind() -> None:
    one = with_steps()
    change = one.rng.standard_normal(one.engine.shape) * 0.002
    one = resampled(one, one.engine + change * by_row(one, one.rows["step"])[:, None] ** 3.0)
    found, _ = explain_away(one.evidence())
    assert [other.candidate.signature.name for other in found] == ["falls-behind"]


def test_steps_whose_noise_wanders_are_neither_repeated_prompts_nor_one_step() -> None:
    """Later steps repeat prompts of earlier ones, which says nothing where all that differs are steps."""
    one = with_steps()
    one = replace(one, prompt=np.arange(one.n_sequences) % 24)
    size = np.array([0.1, 0.3, 0.15, 0.5, 0.4, 0.7, 0.2, 0.6])[by_row(one, one.rows["step"])]
    one = resampled(one, one.engine + one.rng.standard_normal(one.engine.shape) * size[:, None])
    found, _ = explain_away(one.evidence())
    assert not {"repeated-prompts", "one-step"} & {other.candidate.signature.name for other in found}


@pytest.mark.parametrize(("make", "name", "value"), [(divided, "factor", 1 / 1.3), (shifted, "tokens", 1.0)])
def test_parameters_are_those_that_were_planted(make: Callable[[], Toy], name: str, value: float) -> None:
    found, _ = explain_away(make().evidence())
    assert found[0].candidate.fit.parameters[name] == pytest.approx(value, rel=0.02)


def with_copies(one: Toy, values: Floats) -> tuple[Evidence, NDArray[np.bool_], int]:
    """The table with its first sequence again for each of `values`, which its middle token has at the trainer there.

    Returns:
        The table, its tokens without the copies, and the token's place in a copy.
    """
    evidence = one.evidence()
    own = np.flatnonzero(evidence.sequence == 0)
    n, middle = len(values), len(own) // 2
    index = np.concatenate([np.arange(len(evidence)), np.tile(own, n)])
    rows = np.concatenate([np.arange(len(evidence.prompt)), np.zeros(n, np.int64)])
    trainer = evidence.trainer[index]
    trainer[len(evidence) + middle + len(own) * np.arange(n)] = values
    copies = np.repeat(len(evidence.prompt) + np.arange(n), len(own))
    table = replace(
        evidence,
        rollout=evidence.rollout[index],
        trainer=trainer,
        unusable=np.zeros(len(index), np.bool_),
        ids=evidence.ids[index],
        position=evidence.position[index],
        sequence=np.concatenate([evidence.sequence, copies]),
        seen=evidence.seen[index],
        again=evidence.again[index],
        tokens={key: column[index] for key, column in evidence.tokens.items()},
        rows={key: column[rows] for key, column in evidence.rows.items()},
        prompt=evidence.prompt[rows],
        prompt_length=evidence.prompt_length[rows],
        length=evidence.length[rows],
        places=tuple(evidence.places[row] for row in rows),
    )
    return table, np.arange(len(index)) < len(evidence), middle


@pytest.mark.parametrize(
    ("name", "make"),
    [
        (name, FAULTS[name][0])
        for name in ("temperature", "scaled-logprobs", "truncation", "penalty", "top1-logprobs", "shift", "packing")
    ],
)
def test_what_competes_is_a_density_of_the_trainers_log_prob(
    name: str, make: Callable[[], Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all values that one token's log-prob can have it integrates to 1: else a signature could gain by nothing."""
    one = make()
    # Whether a signature is asked at all is a question to the table without the copies.
    sums_to_1 = normalised(one.evidence(), State.start(one.evidence()))
    for module in (penalty, scaled_logprobs, temperature):
        monkeypatch.setattr(module, "normalised", lambda *_: sums_to_1)
    centre = float(one.evidence().trainer[int((one.sequence == 0).sum()) // 2])
    steps = np.sinh(np.linspace(-12, 12, 801)) * 1e-4
    table, train, middle = with_copies(one, centre + steps)
    fit = signatures()[name].fit(table, State.start(table), train)
    assert fit is not None
    density = np.exp(fit.log_density[~train].reshape(len(steps), -1)[:, middle])
    assert np.trapezoid(density, steps) == pytest.approx(1, abs=0.02)


def test_student_t_is_scipys() -> None:
    z = np.linspace(-30, 30, 101)
    for degrees in (1.0, 2.5, 30.0):
        np.testing.assert_allclose(t_log_density(z, degrees), stats.t.logpdf(z, degrees), rtol=1e-12)


@pytest.mark.parametrize("degrees", [1.5, 3.0, 10.0])
def test_the_fitted_noise_is_the_drawn_one(degrees: float) -> None:
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(-6, 0, 20_000))
    scale = 0.05 * np.exp(0.8 * x)
    found = fit_noise(scale * rng.standard_t(degrees, len(x)), x)
    assert found.degrees == degrees
    middle = (x > -5) & (x < -0.7)
    np.testing.assert_allclose(np.log(found.scale(x[middle])), np.log(scale[middle]), atol=0.2)


def test_fitted_noise_gains_nothing_by_another_scale() -> None:
    rng = np.random.default_rng(2)
    x = rng.uniform(-6, 0, 5_000)
    residual = 0.1 * np.exp(0.5 * x) * rng.standard_t(3.0, len(x))
    found = fit_noise(residual, x)
    best = found.log_density(residual, x).sum()
    for step in (-0.1, 0.1):
        other = Noise(found.knots, found.log_scale + step, found.degrees, found.drift)
        assert other.log_density(residual, x).sum() < best


def test_the_factor_of_a_group_is_the_planted_one() -> None:
    one = toy(n_sequences=120)
    level = (one.sequence % 3 == 0).astype(np.int64)
    noisy = replace(
        one, trainer=np.where(level[:, None] == 1, one.engine + 5 * (one.trainer - one.engine), one.trainer)
    )
    evidence = noisy.evidence()
    spread = group_spread(evidence, State.start(evidence), np.ones(len(evidence), np.bool_), level, 2)
    assert np.exp(spread[1] - spread[0]) == pytest.approx(5, rel=0.1)


def test_the_robust_fit_is_least_squares_where_noise_is_normal() -> None:
    one = toy(noise=0.02)
    evidence = one.evidence()
    column = np.where(evidence.seen, 0.4, 0.0)
    shifted_by = replace(evidence, trainer=evidence.trainer + column)
    state = State.start(shifted_by)
    found = robust_fit(shifted_by, state, np.ones(len(evidence), np.bool_), np.stack([evidence.seen.astype(float)]))
    assert found.max() == pytest.approx(0.4, abs=0.01)


def test_a_mixture_of_shifts_is_fitted_where_one_half_lacks_a_bin() -> None:
    one = toy().evidence()
    state = State.start(one)
    rare = np.isin(np.arange(len(one)), np.argsort(one.rollout)[:3])  # the least certain ones
    found = one_sided(one, state, ~rare, [lambda lost: -lost * np.ones(len(one))], rare.astype(np.int64))
    assert found is not None
    assert np.isfinite(found.log_density).all()


def test_every_signature_is_in_the_table_of_planted_faults() -> None:
    """So that a new one comes with its test; the others need what a toy does not have."""
    assert set(signatures()) == {
        *FAULTS,
        "decode-prefill",
        "coarse-logprobs",
        "environment-tokens",
        "trainer-noise",
        "other-forward",
    }
