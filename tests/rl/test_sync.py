"""Checked weight sync against the rollout engine of transformers, with faults planted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mismatch_probe.engines.base import RolloutJob
from mismatch_probe.engines.hf.rollout import HfRollout
from mismatch_probe.rl import sync
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.policy import TORCH_DTYPES, Policy
from mismatch_probe.rl.sync import SyncError, WeightSync, _left_over, _typical, cast, changed_share
from mismatch_probe.types import Dtype, Sampling

CPU = torch.device("cpu")
VICTIM = "model.layers.1.mlp.down_proj.weight"
# A step that in BF16 hides in rounding, and explains half of the gap.
SLIGHT = 5e-3
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
Weights = dict[str, torch.Tensor]


class Engine(HfRollout):
    """The rollout engine of transformers, with faults planted in what it is given and says."""

    def __init__(self, path: Path, dtype: Dtype) -> None:
        super().__init__(RolloutJob("hf", str(path), dtype, "cpu", Sampling(1), (), 16, 0, 64))
        self.weights: Weights = Policy(str(path), RlConfig(), CPU).as_saved(self._own())
        self.drop: set[str] = set()
        self.zero: set[str] = set()
        self.through: torch.dtype | None = None
        self.loads = self.scored = 0
        self.noise = 0.0

    def _own(self) -> Weights:
        return self.run_on_model(lambda model: {name: tensor.clone() for name, tensor in model.state_dict().items()})

    @property
    def names(self) -> set[str]:
        return set(self.weights)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loads += 1
        for name, tensor in weights:
            if name not in self.drop:
                through = tensor if self.through is None else tensor.to(self.through)
                self.weights[name] = through.to(tensor.dtype).clone()
            if name in self.zero:
                self.weights[name].zero_()
        super().load_weights(self.weights.items())

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        self.scored += 1
        return [row + np.float32(self.noise) for row in super().score(sequences)]


Spoil = Callable[[Engine], None]


def _leave(engine: Engine) -> None:
    pass


class Setup:
    """A policy with an engine that has its weights, and the sync between them.

    Every trial of all hypotheses takes some fifty forward passes, so `fresh` (a trial before the first step) and
    `scan_every=1` (one at every sync) are asked for only where they are the subject.
    """

    def __init__(self, path: Path, dtype: Dtype, *, n_probes: int = 6, spoil: Spoil = _leave, **options: Any) -> None:
        self.policy = Policy(str(path), RlConfig(trainer_dtype="float32", rollout_dtype=dtype), CPU)
        self.engine = Engine(path, dtype)
        spoil(self.engine)
        self._draw = torch.Generator().manual_seed(1)
        probes = torch.randint(4, 100, (n_probes, 32), generator=self._draw).tolist()
        self.sync = WeightSync(
            self.engine, self.policy, dtype, probes, **{"check": True, "fresh": False, "scan_every": 100, **options}
        )

    def move(self, size: float = 2e-3) -> Weights:
        with torch.no_grad():
            for parameter in self.policy.model.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=self._draw))
        return self.policy.weights()


@every_dtype
@pytest.mark.parametrize("checkpoint", ["tied", "untied", "mixture"])
def test_weights_that_arrive_are_accepted(request: pytest.FixtureRequest, checkpoint: str, dtype: Dtype) -> None:
    setup = Setup(request.getfixturevalue(checkpoint), dtype, fresh=True)
    before = setup.policy.clean_logprobs(setup.sync._batch, setup.policy.weights())
    for _ in range(3):
        gap = setup.sync.send(setup.move()).gap
        assert gap is not None
        assert gap < (1e-5 if dtype == "float32" else 0.1)
    after = setup.policy.clean_logprobs(setup.sync._batch, setup.policy.weights())
    assert (after - before).abs().mean() > 0.01
    # Nothing that changes, nothing to find.
    again = setup.sync.send(setup.policy.weights()).gap
    assert again == pytest.approx(gap)


def _leave_experts_out(engine: Engine) -> None:
    engine.drop |= {name for name in engine.names if ".experts." in name}


def _leave_all_out(engine: Engine) -> None:
    engine.drop |= engine.names


def _zero_one(engine: Engine) -> None:
    engine.zero |= {"model.layers.1.self_attn.o_proj.weight"}


@every_dtype
@pytest.mark.parametrize("fault", [_leave_experts_out, _leave_all_out, _zero_one])
def test_a_fault_stops_before_the_first_step_and_later(mixture: Path, fault: Spoil, dtype: Dtype) -> None:
    """Whether it spoils the engine's own load of the checkpoint, the trial before the first step, or a sync."""

    def load_wrong(engine: Engine) -> None:
        other = {name: (1 + 0.3 * torch.randn(tensor.shape)) * tensor for name, tensor in engine.weights.items()}
        fault(engine)
        engine.drop = engine.names - engine.drop  # what does not arrive from now on is other than the checkpoint has
        engine.load_weights(other.items())

    torch.manual_seed(0)
    with pytest.raises(SyncError, match="After loading the checkpoint"):
        Setup(mixture, dtype, spoil=load_wrong, fresh=True)
    with pytest.raises(SyncError, match="does not load new weights"):
        Setup(mixture, dtype, spoil=fault, fresh=True)
    setup = Setup(mixture, dtype, scan_every=3)
    for step in range(2):
        setup.sync.send(setup.move())
        if step:
            fault(setup.engine)
    with pytest.raises(SyncError, match="After a weight sync") as caught:
        setup.sync.send(setup.move(2e-2))
    said = {
        _leave_experts_out: "the weights of experts did not",
        _leave_all_out: "(stale)",
        _zero_one: "no single fault",
    }
    assert said[fault] in str(caught.value)


@every_dtype
def test_stale_weights_are_named(tied: Path, dtype: Dtype) -> None:
    setup = Setup(tied, dtype, scan_every=2)
    setup.sync.send(setup.move())
    setup.engine.drop = set(setup.policy.weights())
    with pytest.raises(SyncError, match=r"the weights of the previous sync \(stale\)"):
        setup.sync.send(setup.move())


@pytest.mark.parametrize(
    ("victim", "dtype"),
    [
        *((name, dtype) for name in (VICTIM, "lm_head.weight", "model.embed_tokens.weight") for dtype in TORCH_DTYPES),
        # In 16 bits what this one does is lost in rounding.
        ("model.norm.weight", "float32"),
    ],
)
def test_a_tensor_that_did_not_arrive_is_named(tied: Path, dtype: Dtype, victim: str) -> None:
    setup = Setup(tied, dtype, scan_every=1)
    setup.engine.drop = {victim}
    with pytest.raises(SyncError, match=f"{victim} did not arrive"):
        setup.sync.send(setup.move(1e-2))


@pytest.mark.parametrize(("dtype", "other"), [("float32", "bfloat16"), ("float32", "float16"), ("float16", "bfloat16")])
def test_a_wrong_cast_is_named(tied: Path, dtype: Dtype, other: str) -> None:
    setup = Setup(tied, dtype, scan_every=1)
    setup.engine.through = TORCH_DTYPES[other]
    with pytest.raises(SyncError, match=f"rounded to {other} on the way"):
        setup.sync.send(setup.move())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_changes_that_arrive_are_never_accused(tied: Path, dtype: Dtype) -> None:
    """Fifty hypotheses at every sync, all of them below rounding: correlation alone would accuse some."""
    setup = Setup(tied, dtype, fresh=True, scan_every=1)
    for size in (1e-5, 1e-4, 3e-4, 1e-3):
        setup.sync.send(setup.move(size))


def test_weights_that_never_arrive_are_found_once_it_shows(tied: Path) -> None:
    setup = Setup(tied, "bfloat16")
    setup.engine.drop = set(setup.policy.weights())

    def send_many() -> None:
        for _ in range(40):
            setup.sync.send(setup.move(5e-4))

    with pytest.raises(SyncError, match=r"\(stale\)"):
        send_many()


def test_a_trial_that_takes_its_time_is_announced(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    setup = Setup(tied, "float32", scan_every=2, tell=said.append)
    for _ in range(2):
        setup.sync.send(setup.move())
    assert said == []  # a toy's is over at once
    monkeypatch.setattr(sync, "_MANY", 3)
    setup.sync.send(setup.move())
    assert said == []
    setup.sync.send(setup.move())
    assert said == [f"checking the weight sync tensor by tensor, with up to {2 * len(setup.move())} forward passes"]


def test_a_fault_that_no_hypothesis_explains_is_caught(tied: Path) -> None:
    setup = Setup(tied, "float32")
    setup.engine.noise = 1e-3
    with pytest.raises(SyncError, match=r"1\.0e-03 nats .*no single fault explains it"):
        setup.sync.send(setup.policy.weights())


@every_dtype
def test_nan_is_caught(tied: Path, dtype: Dtype) -> None:
    setup = Setup(tied, dtype)
    setup.engine.noise = float("nan")
    with pytest.raises(SyncError, match="nan nats"):
        setup.sync.send(setup.move())


def test_an_engine_with_other_weights_is_caught_at_once(tied: Path, untied: Path) -> None:
    policy = Policy(str(tied), RlConfig(trainer_dtype="float32"), CPU)
    engine = Engine(tied, "float32")
    engine.load_weights((name, tensor * 1.01) for name, tensor in policy.weights().items())
    with pytest.raises(SyncError):
        WeightSync(engine, policy, "float32", [[5, 6, 7, 8], [9, 10, 11]], check=True, fresh=True)


def test_after_a_fault_is_mended_the_sync_goes_on(tied: Path) -> None:
    setup = Setup(tied, "float32")
    setup.engine.drop = {VICTIM}
    with pytest.raises(SyncError):
        setup.sync.send(setup.move())
    setup.engine.drop = set()
    setup.sync.resend(setup.policy.weights())
    gap = setup.sync.send(setup.move()).gap
    assert gap is not None
    assert gap < 1e-5


def test_a_partial_sync_below_the_limit_is_found_at_a_scan_only(tied: Path) -> None:
    """In 16 bits a tensor that stays behind can be within the limit; the scan sees that it explains the gap."""
    setup = Setup(tied, "bfloat16", scan_every=3, n_probes=12)
    setup.sync.send(setup.move(1e-3))
    setup.engine.drop = {VICTIM}
    setup.sync.send(setup.move(SLIGHT))
    with pytest.raises(SyncError, match=f"{VICTIM} did not arrive"):
        setup.sync.send(setup.move(SLIGHT))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("lm_head.weight"), "have no lm_head.weight"),
        (lambda w: w.update(extra=torch.ones(1)), "have the unknown extra"),
    ],
)
def test_names_are_compared_before_anything_is_loaded(tied: Path, change: Any, said: str) -> None:
    setup = Setup(tied, "float32", check=False)
    weights = dict(setup.move())
    change(weights)
    with pytest.raises(SyncError, match=said):
        setup.sync.send(weights)
    assert setup.engine.loads == 0


def test_unchecked_syncs_score_nothing(tied: Path) -> None:
    setup = Setup(tied, "float32", check=False)
    setup.engine.drop = {VICTIM}
    assert setup.sync.send(setup.move()).gap is None
    assert (setup.engine.loads, setup.engine.scored) == (1, 0)


@every_dtype
def test_a_cast_copies_and_leaves_whole_numbers(dtype: Dtype) -> None:
    given = {"a": torch.tensor([1.00001, 3.0]), "n": torch.tensor([1, 2])}
    found = cast(given, dtype)
    assert found["a"].dtype == TORCH_DTYPES[dtype]
    assert torch.equal(found["a"], given["a"].to(TORCH_DTYPES[dtype]))
    assert found["n"].dtype == torch.int64
    for name, tensor in found.items():
        tensor.add_(1)
        assert not torch.equal(tensor, given[name])


def test_the_changed_share_counts_weights() -> None:
    before = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    after = {"a": torch.tensor([[0.0, 1e-9, 0.0], [0.0, 0.0, -1.0]]), "b": torch.ones(4)}
    assert changed_share(before, after) == 0.2
    assert changed_share(cast(before, "float16"), cast(after, "float16")) == 0.1
    assert changed_share({}, {}) == 0.0


@given(st.integers(0, 10_000), st.floats(0.0, 3.0))
def test_noise_hides_a_hypothesis_only_where_it_is_larger(seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    delta = rng.normal(0, 1, 400)
    rest = noise * rng.normal(0, 1, 400)
    # True, it leaves what is noise; where nothing of it is there, it is not taken.
    left = _left_over([delta + rest], [delta], 0)
    if noise < 0.6:
        assert left == pytest.approx(_typical([rest]), abs=1e-9)
    elif noise > 1.6:
        assert left is None
    assert _left_over([rest], [delta], 0) is None
    assert _left_over([delta], [10 * delta], 0) is None
    assert _left_over([delta], [np.zeros(400)], 0) is None
    assert _left_over([np.full(400, np.nan)], [delta], 0) is None


@given(st.integers(101, 160).filter(lambda n: n != 130), st.floats(0.01, 100.0))
def test_a_hypothesis_is_judged_by_30_effective_tokens_or_not_at_all(tokens: int, size: float) -> None:
    """Of 400 the 100 that it moves most do not count: equal changes on so many more are so many effective ones."""
    delta = np.zeros(400)
    delta[:tokens] = size
    assert (_left_over([delta], [delta], 30) is not None) == (tokens > 130)
    assert _left_over([delta], [delta], 0) == 0.0


@given(st.integers(0, 10_000), st.integers(1, 60))
def test_tokens_that_go_to_other_experts_either_way_accuse_nobody(seed: int, flips: int) -> None:
    """Rounding and a change below it send the same tokens to the same experts: most of both squares."""
    rng = np.random.default_rng(seed)
    difference, delta = 1e-2 * rng.normal(size=272), 5e-3 * rng.normal(size=272)
    difference[:flips] += 1.0
    delta[:flips] += 1.0
    assert float(((difference - delta) ** 2).sum()) < 0.1 * float(difference @ difference)
    assert _left_over([difference], [delta], 30) is None


@given(st.integers(0, 10_000), st.integers(8, 400), st.floats(1.0, 1e6))
def test_a_quarter_of_tokens_cannot_move_what_is_judged_and_more_can(seed: int, n: int, size: float) -> None:
    differences = np.random.default_rng(seed).normal(0, 1e-3, n)
    plain = _typical([differences])
    few, many = differences.copy(), differences.copy()
    few[: n // 4], many[: n // 4 + 2] = size, size
    assert _typical([few]) <= 4 * plain + 1e-2
    assert _typical([many]) > size / n
    assert _typical([-differences]) == plain
    differences[0] = np.nan
    assert np.isnan(_typical([differences]))


@given(st.integers(0, 10_000), st.integers(0, 8))
def test_what_moves_most_sequences_accuses_and_what_moves_few_does_not(seed: int, moved: int) -> None:
    """Another expert for the first token of a sequence moves every token of it, and of no other."""
    rng = np.random.default_rng(seed)
    rounding = list(1e-3 * rng.normal(size=(8, 64)))
    delta = [rng.normal(size=64) if i < moved else 1e-4 * rng.normal(size=64) for i in range(8)]
    difference = [a + b for a, b in zip(rounding, delta, strict=True)]
    assert (_left_over(difference, delta, 30) is not None) == (moved >= 6)
    assert (_typical(difference) > 1e-2) == (moved >= 4)  # at 4 of 8 the median lies between both kinds
