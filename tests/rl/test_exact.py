"""The control without mismatch: equal bits on both sides, the trainer's distribution, drafts that decide neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from mismatch_probe.engines.events import Message
from mismatch_probe.engines.hf.rollout import HfRollout
from mismatch_probe.engines.logits import winner
from mismatch_probe.engines.logprobs import Batch
from mismatch_probe.errors import EngineError
from mismatch_probe.rl.exact import ExactSampler
from mismatch_probe.rl.loop import Training
from mismatch_probe.types import Rollout, RolloutRequest, Sampling
from tests.conftest import Heard
from tests.rl.loops import JOB, pieces, train

CONTROL = {"remedy": "zero-mismatch", "updates_per_rollout": 1, "steps": 3}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16-autocast": {"trainer_dtype": "bf16", "temperature": 0.7, "learning_rate": 1e-3},
    "fp16-autocast": {"trainer_dtype": "fp16", "initial_loss_scale": 1024.0},
    "bf16-cast": {"trainer_dtype": "bf16", "trainer_mode": "cast", "micro_batch": 3},
}


@pytest.fixture(scope="module")
def engine() -> HfRollout:
    return HfRollout(JOB)


class _Garbage(HfRollout):
    """Drafts what nobody asked for: nothing, too much, or tokens that the model would never say."""

    def generate(self, requests: Sequence[RolloutRequest], *_: Any) -> list[Rollout]:
        drafts = [[], [7] * 40, [5, 2, 9, 11]]
        return [
            Rollout(r.sequence_id, tokens, [0.0] * len(tokens), "stop")
            for r in requests
            for tokens in [drafts[r.sequence_id % 3]]
        ]


def _tables(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    return pd.read_parquet(path / "steps.parquet"), pq.read_table(path / "rollouts.parquet").to_pandas()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rollout_and_trainer_have_the_same_bits(tmp_path: Path, engine: HfRollout, precision: str) -> None:
    train(tmp_path / "run", engine, **CONTROL | PRECISIONS[precision])
    steps, rollouts = _tables(tmp_path / "run")
    assert len(rollouts) == 3 * 16
    for row in rollouts.itertuples():
        # The update's own pass, which keeps gradients, included.
        assert row.rollout_logprobs.tobytes() == row.old_logprobs.tobytes() == row.current_logprobs.tobytes()
        assert len(row.response_token_ids) == len(row.rollout_logprobs) > 0
    assert (steps[["max_abs_logprob_diff", "movement_mean_abs"]] == 0).all(axis=None)
    assert (steps["ess_seq"] == 1).all()
    assert (steps["n_draft_rounds"] >= 1).all()
    # The engine's FP32 forward pass differs from the trainer's by rounding.
    assert (steps["draft_accepted"] > (0.999 if precision == "fp32" else 0.9)).all()


def test_drafts_decide_nothing_but_the_time(tmp_path: Path, engine: HfRollout) -> None:
    for name, drafting in (("good", engine), ("bad", _Garbage(JOB))):
        train(tmp_path / name, drafting, check_sync=False, **CONTROL)
    (good, ours), (bad, theirs) = _tables(tmp_path / "good"), _tables(tmp_path / "bad")
    pd.testing.assert_frame_equal(ours, theirs)
    assert (bad["n_draft_rounds"] >= 8).all()
    assert (good["n_draft_rounds"] < 4).all()
    assert (bad["draft_accepted"] < 0.5).all()


def test_other_runs_have_no_drafts(tmp_path: Path, engine: HfRollout) -> None:
    train(tmp_path / "run", engine, steps=1)
    steps, _ = _tables(tmp_path / "run")
    assert steps[["n_draft_rounds", "draft_accepted"]].isna().all(axis=None)


def test_a_pass_that_does_not_repeat_its_bits_ends_the_run(tmp_path: Path, engine: HfRollout) -> None:
    training = Training(pieces(tmp_path / "run", engine, **CONTROL))
    own = training._sample

    def sample(chosen: Sequence[int], step: int) -> list[Rollout]:
        found = own(chosen, step)
        first = np.asarray(found[2].logprobs)
        first[0] = np.nextafter(first[0], np.float32(-9))
        return found

    training._sample = sample  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="in step 0 1 of 16 responses differ"):
        training.run()


VOCABULARY, END, MOST = 4, 3, 3


class _Table:
    """A policy of four tokens whose logits depend on the last one alone."""

    def __init__(self) -> None:
        self.logits = 1.2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2))

    def logprobs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        at = batch.first[:, None] + torch.arange(batch.mask.shape[1]) - 1
        logits = self.logits[batch.ids.gather(1, at.clamp(max=batch.ids.shape[1] - 1))]
        return logits.log_softmax(-1).gather(2, batch.targets()[..., None])[..., 0], logits

    def law(self) -> dict[tuple[int, ...], float]:
        """The probability of every response."""
        rows, done, going = self.logits.double().softmax(-1).tolist(), {}, {(0,): 1.0}
        while going:
            prefix, p = going.popitem()
            for token in range(VOCABULARY):
                ended = token == END or len(prefix) == MOST
                (done if ended else going)[*prefix, token] = p * rows[prefix[-1]][token]
        return {tokens[1:]: p for tokens, p in done.items()}


class _Drafter:
    """An engine of nearly the same distribution, which draws with the given noise, with its own, or not at all."""

    def __init__(self, policy: _Table, kind: str) -> None:
        self._policy, self._kind, self._draw = policy, kind, torch.Generator().manual_seed(9)

    def generate(self, requests: Sequence[RolloutRequest], sampling: Sampling, *_: Any) -> list[Rollout]:
        return [
            Rollout(r.sequence_id, tokens, [0.0] * len(tokens), "stop")
            for r in requests
            for tokens in [[self._token(r, t) for t in range(sampling.max_tokens)]]
        ]

    def _token(self, request: RolloutRequest, position: int) -> int:
        assert request.race_from is not None
        assert request.race_from == len(request.prompt_token_ids) - 1
        if self._kind == "constant":
            return 1
        logits = self._policy.logits[request.prompt_token_ids[-1]] + torch.tensor([0.2, 0.0, -0.2, 0.0])
        if self._kind == "given":
            return int(winner(logits, request.seed, request.race_from + position))
        return int(torch.multinomial(logits.softmax(0), 1, generator=self._draw))


def _sampled(kind: str, n: int) -> tuple[list[Rollout], ExactSampler, Heard]:
    policy, told = _Table(), Heard()
    parts: Any = SimpleNamespace(
        engine=_Drafter(policy, kind),
        end_ids=[END],
        config=SimpleNamespace(max_tokens=MOST),
        device=torch.device("cpu"),
        tell=told,
    )
    sampler = ExactSampler(parts, policy)  # type: ignore[arg-type]
    seeds = np.random.default_rng(4).integers(0, 1 << 31, n)
    requests = [RolloutRequest(i, [0], int(seed)) for i, seed in enumerate(seeds)]
    parts = [list(range(i, min(i + 64, n))) for i in range(0, n, 64)]
    return sampler.sample(requests, Sampling(MOST), parts), sampler, told


@pytest.mark.parametrize("kind", ["given", "own", "constant"])
def test_responses_have_the_trainers_law(kind: str) -> None:
    rollouts, sampler, told = _sampled(kind, 3000)
    law = _Table().law()
    assert sum(law.values()) == pytest.approx(1)
    found = [tuple(int(token) for token in r.response_token_ids) for r in rollouts]
    counts = pd.Series(found).value_counts().reindex(list(law), fill_value=0)
    assert counts.sum() == 3000
    assert stats.chisquare(counts, 3000 * np.array(list(law.values()))).pvalue > 1e-3
    for tokens, rollout in zip(found, rollouts, strict=True):
        assert (rollout.finish_reason == "stop") == (tokens[-1] == END)
        assert float(np.sum(rollout.logprobs)) == pytest.approx(np.log(law[tokens]), abs=1e-5)
    # Noise of its own agrees as two draws do by chance, and is named once.
    assert [type(event) for event in told] == ([] if kind == "given" else [Message])
    assert sampler.drafts.accepted is not None
    assert (sampler.drafts.accepted > 0.85) == (kind == "given")


def test_engines_draw_the_winner(engine: HfRollout) -> None:
    prompt, logits = [5, 9, 4, 8], _logits(engine)
    whole = RolloutRequest(0, prompt, 31, race_from=0)
    for temperature in (1.0, 0.6):
        (first,) = engine.generate([whole], Sampling(6, temperature), lambda _: None)
        tokens = [int(token) for token in first.response_token_ids]
        assert tokens == [int(winner(logits(prompt + tokens[:t]) / temperature, 31, t)) for t in range(len(tokens))]
        rest = replace(whole, prompt_token_ids=prompt + tokens[:2], race_from=2)
        (second,) = engine.generate([rest], Sampling(4, temperature), lambda _: None)
        assert [int(token) for token in second.response_token_ids] == tokens[2:]


def _logits(engine: HfRollout) -> Any:
    return lambda ids: engine.run_on_model(lambda model: model(torch.tensor([ids])).logits[0, -1].detach())


def test_noise_differs_by_every_bit_of_seed_and_position() -> None:
    flat = torch.zeros(1 << 16)
    keys = [(5, 0), (5, 1), (6, 0), (5 + (1 << 12), 0), (5 + (1 << 20), 0), (5 + (1 << 30), 0)]
    assert len({int(winner(flat, *key)) for key in keys}) == len(keys)
    # Never a token that cannot occur.
    assert int(winner(torch.tensor([-torch.inf, 0.0, -torch.inf]), 3, 0)) == 1
