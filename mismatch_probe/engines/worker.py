"""The child's side of an engine process: `python -m mismatch_probe.engines.worker FD KIND`.

It imports what its kind needs, receives one job, sends events, and ends. Events are pairs of a name and a payload:
`identity`, `total`, `progress`, `encoded`, `special`, `rollouts`, `self_noise_rollouts`, `texts`, `scores`,
`self_noise_scores`, `phase`, `done`, `error`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from mismatch_probe.engines import devices, faults
from mismatch_probe.engines.base import EncodeJob, RolloutEngine, RolloutJob, TrainerEngine, TrainerJob
from mismatch_probe.types import EncodedPrompt, RolloutRequest, Sampling


class _ParentGone(BaseException):
    """The parent has ended, and with it the reason to go on."""


class _Channel:
    """Talks with the parent and times phases."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._since = time.perf_counter()

    def send(self, name: str, payload: Any = None) -> None:
        try:
            self._connection.send((name, payload))
        except OSError:
            raise _ParentGone from None

    def receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise _ParentGone from None

    def phase(self, name: str) -> None:
        """Ends a phase: everything since the last one took this long."""
        now = time.perf_counter()
        self.send("phase", (name, now - self._since))
        self._since = now


def run_encode(job: EncodeJob, channel: _Channel) -> None:
    """Encodes the prompts with the model's tokenizer."""
    from mismatch_probe.engines.encoding import Encoded, encode

    if _is_scripted(job.model_path):
        prompts = [EncodedPrompt(p.prompt_id, [ord(c) for c in p.text or str(p.messages)]) for p in job.prompts]
        found = Encoded(prompts, {token: chr(token) for token in job.token_ids}, special=[0])
    else:
        found = encode(job)
    channel.send("encoded", found.prompts)
    channel.send("texts", found.texts)
    channel.send("special", found.special)


def run_rollout(job: RolloutJob, channel: _Channel) -> None:
    """Samples, at most `job.batch` requests at once, then the first batch's leading tokens again."""
    engine: RolloutEngine
    if job.engine == "scripted":
        from mismatch_probe.engines.scripted import ScriptedRollout

        engine = ScriptedRollout(job)
    else:
        from mismatch_probe.engines.vllm.engine import VllmRollout

        engine = VllmRollout(job)
    channel.phase("load")
    channel.send("identity", engine.identity() | devices.running())
    # The first batch runs alone, so that its repeat meets the same company; the rest is the scheduler's to arrange.
    batches = [batch for batch in (job.requests[: job.batch], job.requests[job.batch :]) if batch]
    repeat = replace(job.sampling, max_tokens=min(job.self_noise_tokens, job.sampling.max_tokens))
    again = batches[0] if repeat.max_tokens else []
    channel.send("total", _longest(job.requests, job.sampling) + _longest(again, repeat))
    seen: set[int] = set()
    for batch in batches:
        rollouts = engine.generate(batch, job.sampling, lambda n: channel.send("progress", n), job.capture)
        seen.update(int(token) for rollout in rollouts for token in rollout.response_token_ids)
        channel.send("rollouts", rollouts)
        short = _longest(batch, job.sampling) - sum(len(r.response_token_ids) for r in rollouts)
        channel.send("progress", short)
    channel.send("texts", dict(zip(sorted(seen), engine.token_texts(sorted(seen)), strict=True)))
    channel.phase("generate")
    if again:
        channel.send("self_noise_rollouts", engine.generate(again, repeat, lambda n: channel.send("progress", n)))
        channel.phase("self_noise")
    engine.close()


def _longest(requests: Sequence[RolloutRequest], sampling: Sampling) -> int:
    """Tokens of all responses if none ends early."""
    return sum(min(len(r.forced_token_ids) or sampling.max_tokens, sampling.max_tokens) for r in requests)


def run_trainer(job: TrainerJob, channel: _Channel) -> None:
    """Scores in planned batches, then the first batches again."""
    engine: TrainerEngine
    if job.engine == "scripted":
        from mismatch_probe.engines.scripted import ScriptedTrainer

        engine = ScriptedTrainer(job)
    else:
        from mismatch_probe.engines.hf import HfTrainer

        engine = HfTrainer(job)
    channel.phase("load")
    channel.send("identity", engine.identity() | devices.running())
    batches = engine.plan(job.requests)
    again = 0
    while again < len(batches) and sum(map(len, batches[:again])) < job.self_noise_sequences:
        again += 1
    channel.send("total", sum(r.length for batch in [*batches, *batches[:again]] for r in batch))
    for event, repeated, phase in (("scores", batches, "score"), ("self_noise_scores", batches[:again], "self_noise")):
        for batch in repeated:
            channel.send(event, engine.score(batch, job.temperature, exact=event == "scores"))
            channel.send("progress", sum(r.length for r in batch))
        channel.phase(phase)
    engine.close()


def _is_scripted(model_path: str) -> bool:
    from mismatch_probe.engines.checkpoint import read_config

    return read_config(model_path).get("model_type") == "scripted"


def _import(kind: str) -> None:
    """Imports ahead of the job, while another engine may still be at work."""
    if kind == "vllm":
        import vllm  # noqa: F401
    elif kind == "hf":
        from transformers import AutoModelForCausalLM  # noqa: F401

        import mismatch_probe.engines.hf  # noqa: F401


def _run(job: Any, channel: _Channel) -> None:
    if isinstance(job, EncodeJob):
        run_encode(job, channel)
    elif isinstance(job, RolloutJob):
        run_rollout(job, channel)
    elif isinstance(job, TrainerJob):
        run_trainer(job, channel)
    else:
        job.run(channel)


def _serve(channel: _Channel, kind: str) -> None:
    """Does one job; what fails is reported to the parent."""
    job: Any = None
    try:
        # An import that fails, in whatever way, is reported as the job's failure, in the job's terms.
        failure: Exception | None = None
        try:
            _import(kind)
        except Exception as error:
            failure = error
        channel.phase("import")
        job = channel.receive()
        channel.phase("wait")
        if failure is not None:
            raise ImportError(faults.first_line(failure)) from failure
        _run(job, channel)
        channel.send("done")
    except _ParentGone:
        raise
    except BaseException as error:
        traceback.print_exc()
        known = faults.classify(error, job) if job is not None else None
        channel.send("error", known or faults.first_line(error))


def main(arguments: list[str]) -> None:
    try:
        _serve(_Channel(Connection(int(arguments[0]))), arguments[1])
    except _ParentGone:
        os.killpg(0, signal.SIGKILL)  # this process leads its session: vLLM's own processes must not outlive it
    sys.stdout.flush()
    sys.stderr.flush()
    # Skips the interpreter's tear-down, in which vLLM spends seconds; all that mattered has been sent and closed.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
