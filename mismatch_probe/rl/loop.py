"""The colocated loop: sync, sample with vLLM, reward, advantages, updates, and what is measured of each step.

Every random choice follows from the seed and the step, so a resumed run needs no generator's state: it draws what the
uninterrupted one would have drawn.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mismatch_probe.engines.base import RolloutEngine
from mismatch_probe.engines.events import Found, Listener, Message, StepDone, Total
from mismatch_probe.engines.logprobs import Batch, entropies
from mismatch_probe.metrics.chunks import possible
from mismatch_probe.metrics.intervals import share_interval
from mismatch_probe.results.finding import Finding, Value
from mismatch_probe.results.rl_run import Ending, Status
from mismatch_probe.rl.algorithms import algorithms
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.exact import ExactSampler, require_equal
from mismatch_probe.rl.instruments import Rolled, finite
from mismatch_probe.rl.losses import Scale, policy_loss
from mismatch_probe.rl.policy import (
    Checkpoint,
    NonFinite,
    Policy,
    StepFacts,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from mismatch_probe.rl.records import RlDirectory, checkpoints, step_of
from mismatch_probe.rl.routing import Agreement, sample, with_routes
from mismatch_probe.rl.stress import stressed
from mismatch_probe.rl.summary import CollapseDetector
from mismatch_probe.rl.sync import WeightSync, cast, changed_share
from mismatch_probe.rl.tasks import Problem, Response, Task
from mismatch_probe.types import Rollout, RolloutRequest, Sampling

Floats = NDArray[np.float64]
# Sequences of the sync check, and tokens of each where prompts are shorter.
_PROBES, _PROBE_TOKENS = 8, 64
_EVALUATED = 128
# Micro-batches: an evaluation keeps no gradients.
_EVALUATED_AT_ONCE = 8


@dataclass(frozen=True)
class Pieces:
    """What a loop is made of, so that a sweep can use one engine for many.

    Attributes:
        config: What is asked.
        directory: Where it is written.
        source: Folder of the initial model.
        device: Of the trainer.
        engine: The loop loads its own weights.
        fresh: Whether the engine has the weights of `source` as it loaded them itself, and no others so far.
        task: With its problems.
        prompts: Token ids of each problem's prompt.
        decode: From response ids to text without special tokens.
        tell: Told `Total` in steps, `StepDone`, `Found` and `Message`.
    """

    config: RlConfig
    directory: RlDirectory
    source: Path
    device: torch.device
    engine: RolloutEngine
    fresh: bool
    task: Task
    problems: Sequence[Problem]
    prompts: Sequence[Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    end_ids: Sequence[int]
    tell: Listener


class _Stopped(Exception):
    """Training cannot go on; `cause` says why."""

    def __init__(self, cause: Finding) -> None:
        super().__init__(cause.code)
        self.cause = cause


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("rollout", "sync", "forward_backward", "other"), 0.0)
        self._since = time.perf_counter()

    def ends(self, phase: str) -> None:
        """Everything since the last phase belongs to this one."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._since
        self._since = now


class Training:
    """One run, new or resumed from the newest checkpoint of its folder."""

    def __init__(self, pieces: Pieces) -> None:
        self._p, self._config = pieces, pieces.config
        self._algorithm = algorithms()[self._config.algorithm]
        self._policy = Policy(str(pieces.source), self._config, pieces.device)
        self._exact = ExactSampler(pieces, self._policy) if self._config.remedy == "zero-mismatch" else None
        self._detector = CollapseDetector(window=self._config.collapse_window)
        self._step = 0
        stale = int(self._config.dose) if self._config.stress == "stale" else 0
        self._history: deque[dict[str, torch.Tensor]] = deque(maxlen=stale + 1)
        # By problem, successes and responses of each of the last steps: the sanity test's clusters.
        self._recent: deque[tuple[Floats, Floats]] = deque(maxlen=self._config.pass_window)
        self._first_above: int | None = None
        self._sync = WeightSync(
            pieces.engine,
            self._policy,
            self._config.rollout_dtype,
            self._probes(),
            check=self._config.check_sync,
            fresh=pieces.fresh,
            tell=lambda text: pieces.tell(Message(text)),
        )
        found = checkpoints(pieces.directory.checkpoints)
        start = found[-1] if found else self._config.start_from
        if start is not None:
            self._restore(load_checkpoint(Path(start)))
        pieces.directory.rewind(self._step)

    def run(self) -> Ending:
        """Trains to the end, to a collapse, or to a number that is not finite."""
        config = self._config
        status: Status = "complete"
        cause: Finding | None = None
        self._p.tell(Total(config.steps - self._step))
        while self._step < config.steps and cause is None:
            try:
                row = self._one_step()
            except _Stopped as stopped:
                status, cause = "diverged", stopped.cause
                break
            self._p.directory.append_step(row)
            self._p.tell(StepDone(row))
            self._step += 1
            status, cause = self._judge(row)
            if self._first_above is None and self._above():
                self._first_above = row["step"]
            if self._step % config.checkpoint_every == 0 or self._step == config.steps:
                self._save()
        healthy = self._healthy_checkpoint()
        return Ending(
            status=status,
            cause=cause,
            steps=self._step,
            last_healthy_checkpoint=healthy,
            passed=self._above() if status == "complete" else False,
            first_above_step=self._first_above,
            clean_reward=self._evaluate(self._step) if config.evaluate_at_end and status != "diverged" else None,
        )

    def _one_step(self) -> dict[str, Any]:
        clock, config, step = _Clock(), self._config, self._step
        before = cast(self._policy.weights(), config.rollout_dtype)
        engine_weights = self._engine_weights()
        clock.ends("other")
        synced = self._sync.send(stressed(engine_weights, config.stress, config.dose, seed=config.seed, step=step))
        clock.ends("sync")
        chosen = self._chosen(step)
        rollouts = self._sample(chosen, step)
        clock.ends("rollout")
        owners = np.repeat(np.array(chosen), config.samples_per_prompt)
        problems = [self._p.problems[i] for i in owners]
        texts = [self._p.decode([int(t) for t in r.response_token_ids]) for r in rollouts]
        answers = [Response(text, r.finish_reason) for text, r in zip(texts, rollouts, strict=True)]
        killed = self._p.task.killed
        rewards = np.asarray(self._p.task.rewards(problems, answers), np.float64)
        advantages = self._algorithm.advantages(rewards, owners)
        batches = self._batches(owners, rollouts)
        clock.ends("other")
        old, entropy = self._score(batches)
        sampled = old
        if len(self._history) > 1:
            with self._policy.holding(engine_weights):
                sampled, _ = self._score(batches)
        clock.ends("forward_backward")
        rolled = Rolled(
            step,
            [problem.problem_id for problem in problems],
            [self._p.prompts[i] for i in owners],
            [[int(token) for token in r.response_token_ids] for r in rollouts],
            texts,
            [r.finish_reason for r in rollouts],
            rewards,
            advantages,
            [np.asarray(r.logprobs, np.float64) for r in rollouts],
            old,
            [np.empty(0)] * len(rollouts),
            sampled,
        )
        self._check_logprobs(rolled)
        if self._exact is not None:
            require_equal(rolled)
        facts, sums, current = self._guarded_update(batches, rolled, clock)
        rolled = Rolled(**{**vars(rolled), "current": current})
        if config.record_rollouts:
            self._p.directory.append_rollout(step, rolled.table())
        self._recent.append(self._by_problem(owners, rewards))
        norms = np.array([f.grad_norm for f in facts])
        row = {
            "step": step,
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "entropy": entropy,
            "response_length": float(np.mean([len(r) for r in rolled.responses])),
            "n_responses": len(rewards),
            "n_truncated": sum(reason == "length" for reason in rolled.finish_reasons),
            "n_grader_killed": self._p.task.killed - killed,
            "n_empty": sum(len(r) == 0 for r in rolled.responses),
            "grad_norm": float(norms.mean()),
            "grad_norm_var": float(norms.var(ddof=1)) if len(norms) > 1 else None,
            "learning_rate": facts[-1].learning_rate,
            "loss_scale": facts[-1].loss_scale,
            "n_skipped": sum(f.skipped for f in facts),
            "clip_fraction": sums["n_clipped"] / max(1.0, sums["n_tokens"]),
            "mask_fraction": sums["n_masked"] / max(1.0, sums["n_tokens"]),
            "truncated_fraction": sums["n_truncated"] / max(1.0, sums["n_tokens"]),
            "sync_gap": synced.gap,
            **self._agreement.columns(),
            "weights_changed": changed_share(before, cast(self._policy.weights(), config.rollout_dtype)),
            **rolled.metrics(),
            "n_draft_rounds": None if self._exact is None else self._exact.drafts.n_rounds,
            "draft_accepted": None if self._exact is None else self._exact.drafts.accepted,
        }
        due = config.evaluate_every and (step + 1) % config.evaluate_every == 0
        row["clean_reward"] = self._evaluate(step) if due else None
        clock.ends("other")
        return finite({**row, **{f"seconds_{phase}": seconds for phase, seconds in clock.seconds.items()}})

    def _engine_weights(self) -> dict[str, torch.Tensor]:
        """FP32 weights that the engine gets before stress: the present ones, or older ones where they are stale."""
        if self._history.maxlen == 1:
            return self._policy.weights()
        self._history.append({name: tensor.clone() for name, tensor in self._policy.weights().items()})
        return self._history[0]

    def _chosen(self, step: int) -> list[int]:
        """Problems of a step: a fresh shuffle each time that all have been seen."""
        n, size = len(self._p.problems), self._config.prompts_per_step
        at = np.arange(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng((self._config.seed, int(epoch))).permutation(n) for epoch in np.unique(at // n)
        }
        return [int(orders[i // n][i % n]) for i in at]

    def _sample(self, chosen: Sequence[int], step: int) -> list[Rollout]:
        config = self._config
        noise = config.dose if config.stress == "logit-noise" else 0.0
        n = len(chosen) * config.samples_per_prompt
        seeds = np.random.default_rng((config.seed, step, 1)).integers(0, 1 << 31, n)
        requests = [
            RolloutRequest(i, list(self._p.prompts[chosen[i // config.samples_per_prompt]]), int(seeds[i]), (), noise)
            for i in range(n)
        ]
        sampling = Sampling(config.max_tokens, config.temperature, config.seed)
        if self._exact is not None:
            return self._exact.sample(requests, sampling, [rows for part in self._parts(n) for rows in part])
        return sample(self._p.engine, requests, sampling, self._policy.routers)

    def _parts(self, n: int) -> list[list[list[int]]]:
        """Indices of `n` sequences, by minibatch and micro-batch."""
        per, size = n // self._config.updates_per_rollout, self._config.micro_batch
        return [
            [list(range(first, min(first + size, start + per))) for first in range(start, start + per, size)]
            for start in range(0, n, per)
        ]

    def _batches(self, owners: NDArray[np.int64], rollouts: Sequence[Rollout]) -> list[list[tuple[list[int], Batch]]]:
        """Minibatches of micro-batches, each with the indices of its sequences. Scoring and updates use the very same
        ones, so that before the first update both give the same bits.
        """
        found = []
        for part in self._parts(len(rollouts)):
            micro = []
            for rows in part:
                prompts = [self._p.prompts[owners[i]] for i in rows]
                responses = [[int(t) for t in rollouts[i].response_token_ids] for i in rows]
                batch = Batch.of(prompts, responses, self._p.device)
                micro.append((rows, with_routes(batch, [rollouts[i] for i in rows])))
            found.append(micro)
        return found

    @torch.no_grad()
    def _score(self, batches: Sequence[Sequence[tuple[list[int], Batch]]]) -> tuple[list[Floats], float]:
        """Log-probs of every sequence, and the mean entropy of a token, nats."""
        found: dict[int, Floats] = {}
        entropy, n, self._agreement = 0.0, 0, Agreement()
        for rows, batch in (micro for minibatch in batches for micro in minibatch):
            logprobs, logits = self._policy.logprobs(batch)
            self._agreement.add(batch, self._policy.routers)
            found |= _rows(rows, batch, logprobs)
            entropy += float(entropies(logits)[batch.mask].sum())
            n += int(batch.mask.sum())
        return [found[i] for i in sorted(found)], entropy / max(1, n)

    def _guarded_update(
        self, batches: Sequence[Sequence[tuple[list[int], Batch]]], rolled: Rolled, clock: _Clock
    ) -> tuple[list[StepFacts], dict[str, float], list[Floats]]:
        """Updates; what stops them leaves the batch behind for replay."""
        try:
            return self._update(batches, rolled)
        except NonFinite as error:
            raise self._failure(rolled, "rl-not-finite", {"what": str(error)}) from None
        finally:
            clock.ends("forward_backward")

    def _update(
        self, batches: Sequence[Sequence[tuple[list[int], Batch]]], rolled: Rolled
    ) -> tuple[list[StepFacts], dict[str, float], list[Floats]]:
        facts: list[StepFacts] = []
        totals: dict[str, float] = {}
        current: dict[int, Floats] = {}
        for minibatch in batches:
            tokens = sum(int(batch.mask.sum()) for _, batch in minibatch)
            scale = Scale(sum(len(rows) for rows, _ in minibatch), max(1, tokens), self._config.max_tokens)
            for rows, batch in minibatch:
                logprobs, _ = self._policy.logprobs(batch)
                old, rollout = (_padded([side[i] for i in rows], batch) for side in (rolled.old, rolled.rollout))
                advantages = torch.tensor(rolled.advantages[rows], device=self._p.device)
                loss, sums = policy_loss(self._algorithm, logprobs, old, rollout, advantages, batch.mask, scale)
                if not torch.isfinite(loss):
                    raise NonFinite("the loss")
                self._policy.backward(loss)
                current |= _rows(rows, batch, logprobs.detach())
                # Read together: each read of its own would wait for the device.
                for name, value in zip(sums, torch.stack([*sums.values()]).tolist(), strict=True):
                    totals[name] = totals.get(name, 0.0) + value
            facts.append(self._policy.step())
        return facts, totals, [current[i] for i in sorted(current)]

    def _check_logprobs(self, rolled: Rolled) -> None:
        for name, side in (("rollout", rolled.rollout), ("trainer", rolled.old)):
            for i, values in enumerate(side):
                broken = ~possible(values)
                if broken.any():
                    at = int(np.flatnonzero(broken)[0])
                    tensor = self._policy.non_finite()
                    found: dict[str, Value] = {"side": name, "sequence": i, "position": at, "tensor": tensor}
                    value = float(values[at]) if np.isfinite(values[at]) else None
                    raise self._failure(rolled, "rl-impossible-logprob", {**found, "value": value})

    def _failure(self, rolled: Rolled, code: str, values: Mapping[str, Value]) -> _Stopped:
        """Keeps the batch of the step that failed, for replay."""
        cause = Finding(code=code, severity="fail", values={"step": self._step, **values})
        self._p.directory.save_failure(rolled.table(), cause)
        self._policy.drop_gradients()
        return _Stopped(cause)

    def _judge(self, row: dict[str, Any]) -> tuple[Status, Finding | None]:
        """Whether the run may go on: its status, and what ends it."""
        config = self._config
        if config.trainer_dtype == "float16" and row["loss_scale"] < config.minimum_loss_scale:
            values = {"step": row["step"], "loss_scale": row["loss_scale"], "minimum": config.minimum_loss_scale}
            return "diverged", Finding(code="rl-loss-scale-lost", severity="fail", values=values)
        found = self._detector.update(row["step"], row["reward"], row["n_responses"])
        if found is None:
            return "complete", None
        if found.code == "rl-no-signal":
            self._p.tell(Found(found))
            return "complete", None
        return "collapsed", found

    def _by_problem(self, owners: NDArray[np.int64], rewards: Floats) -> tuple[Floats, Floats]:
        n = len(self._p.problems)
        return np.bincount(owners, rewards, n).astype(float), np.bincount(owners, minlength=n).astype(float)

    def _above(self) -> bool:
        """The sanity test: whether the lower 95 % limit of the mean reward over the last window, clustered by problem,
        exceeds the threshold. The level holds for one look, the one at the end; of hundreds of windows the first above
        is above by luck.
        """
        if len(self._recent) < self._config.pass_window:
            return False
        hits, counts = (np.sum([part[k] for part in self._recent], axis=0) for k in (0, 1))
        interval = share_interval(hits, counts)
        return interval is not None and interval[0] > self._config.pass_above

    def _evaluate(self, step: int) -> float:
        """Mean reward of the clean weights: FP32, no stress, transformers' own sampling, one response a problem, or
        several where there are few problems.
        """
        times = max(1, _EVALUATED // len(self._p.problems))
        problems = list(self._p.problems[:_EVALUATED]) * times
        prompts = [list(ids) for ids in self._p.prompts[:_EVALUATED]] * times
        texts = self._clean_responses(prompts, self._config.max_tokens, self._config.seed * 1_000_003 + step)
        answers = [Response(self._p.decode(ids), "stop" if ids[-1] in self._p.end_ids else "length") for ids in texts]
        return float(np.mean(self._p.task.rewards(problems, answers)))

    def _probes(self) -> list[list[int]]:
        """Fixed sequences for the sync check: prompts and what the initial model writes after short ones. Each begins
        a token later than the one before it, since prompts of a task can begin alike: all of them would show what
        rounding does to that beginning.
        """
        found = [list(prompt)[: 2 * _PROBE_TOKENS] for prompt in self._p.prompts[:_PROBES] if len(prompt) > 1]
        missing = _PROBE_TOKENS - min(map(len, found), default=_PROBE_TOKENS)
        if missing > 0 and self._config.check_sync:
            # The engine has room for a prompt and its response.
            written = self._clean_responses(found, min(missing + _PROBES, self._config.max_tokens), seed=0)
            found = [prompt + text for prompt, text in zip(found, written, strict=True)]
        return [probe[skipped:] for skipped, probe in enumerate(found) if len(probe) > skipped + 1]

    @torch.no_grad()
    def _clean_responses(self, prompts: Sequence[list[int]], most: int, seed: int) -> list[list[int]]:
        """Token ids up to the end token, or `most` of them."""
        size = _EVALUATED_AT_ONCE * self._config.micro_batch
        devices = [self._p.device] if self._p.device.type == "cuda" else []
        found: list[list[int]] = []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), size):
                found += self._batch_of_responses(prompts[start : start + size], most)
        return found

    def _batch_of_responses(self, prompts: Sequence[list[int]], most: int) -> list[list[int]]:
        from transformers import GenerationConfig

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self._p.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._p.device)
        sampling = GenerationConfig(
            do_sample=True,
            temperature=self._config.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=most,
            eos_token_id=list(self._p.end_ids),
            pad_token_id=self._p.end_ids[0],
        )
        out = self._policy.model.generate(input_ids=ids, attention_mask=mask, generation_config=sampling)
        found = []
        for row in out[:, longest:].tolist():
            ends = [i for i, token in enumerate(row) if token in self._p.end_ids]
            found.append(row[: ends[0] + 1] if ends else row)
        return found

    def _save(self) -> None:
        moments, numbers = self._policy.state()
        history = list(self._history)
        state = {"step": self._step, **numbers, "detector": self._detector.state(), "n_history": len(history)}
        state["first_above"] = self._first_above
        state["recent"] = [[part.tolist() for part in parts] for parts in self._recent]
        folder = self._p.directory.checkpoints
        content = Checkpoint(self._policy.weights(), moments, history, state)
        save_checkpoint(folder, self._policy.model, content, self._p.source)
        prune(folder, [name] if (name := self._healthy_checkpoint()) else [])

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._policy.restore(checkpoint.weights, checkpoint.moments, checkpoint.state)
        self._detector = CollapseDetector.from_state(checkpoint.state["detector"])
        self._step, self._first_above = int(checkpoint.state["step"]), checkpoint.state["first_above"]
        device = self._p.device
        self._history.extend({k: tensor.to(device) for k, tensor in weights.items()} for weights in checkpoint.history)
        for hits, counts in checkpoint.state["recent"]:
            self._recent.append((np.array(hits), np.array(counts)))

    def _healthy_checkpoint(self) -> str | None:
        """The newest checkpoint not later than the last healthy step."""
        healthy = self._detector.last_healthy_step
        found = checkpoints(self._p.directory.checkpoints)
        fit = [path.name for path in found if healthy is None or step_of(path) <= healthy + 1]
        return fit[-1] if fit else None


def _rows(rows: Sequence[int], batch: Batch, logprobs: torch.Tensor) -> dict[int, Floats]:
    """The response tokens' values of a micro-batch, by sequence."""
    values, lengths = logprobs.double().cpu().numpy(), batch.mask.sum(1).tolist()
    return {i: values[k, :n].copy() for k, (i, n) in enumerate(zip(rows, lengths, strict=True))}


def _padded(values: Sequence[Floats], batch: Batch) -> torch.Tensor:
    found = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for i, row in enumerate(values):
        found[i, : len(row)] = torch.from_numpy(np.ascontiguousarray(row))
    return found.to(batch.mask.device)
