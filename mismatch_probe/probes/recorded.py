"""A recorded run (`--from FILE`) as passes of a comparison: its sequences and the log-probs that it brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines.models import ModelRef
from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.base import RecordedRun, Side
from mismatch_probe.passes import RECORDED_ROLLOUT, RECORDED_TRAINER
from mismatch_probe.results.manifest import PassRecord, Recorded
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.schemas import Masks, sequences_table, tokens_table
from mismatch_probe.types import Rollout, RolloutRequest


def recorded_of(recorded: RecordedRun) -> Recorded:
    """What the manifest says of the file."""
    rollout, trainer = (side in recorded.sides for side in ("rollout", "trainer"))
    return Recorded(rollout=rollout, trainer=trainer, file=recorded.source)


def check_recorded(recorded: RecordedRun, model: ModelRef) -> None:
    """Checks that a model's engines can take the recorded ids; without a model there is nothing to check.

    Raises:
        IngestError: An id is not in its vocabulary, a sequence is longer than its context, or a prompt is empty.
    """
    if not model.config:
        return
    vocabulary = int(model.text_config["vocab_size"])
    prompts, responses = recorded.prompt_token_ids, recorded.response_token_ids
    total = prompts.lengths + responses.lengths
    empty = np.flatnonzero(prompts.lengths == 0)
    if len(empty):
        raise IngestError(
            f"Row {recorded.rows[empty[0]]} of {recorded.source.path} has an empty prompt, and an engine needs "
            "something before the first token.",
            "Give at least a begin-of-sequence token.",
        )
    if max(int(prompts.values.max(initial=0)), int(responses.values.max(initial=0))) >= vocabulary:
        row = next(i for i in range(len(recorded)) if max(prompts[i].max(), responses[i].max()) >= vocabulary)
        raise IngestError(
            f"Row {recorded.rows[row]} of {recorded.source.path} has an id beyond the vocabulary of {model.name} "
            f"({vocabulary}).",
            "Name with --model the model that sampled these sequences.",
        )
    if model.context is not None and int(total.max()) > model.context:
        row = int(total.argmax())
        raise IngestError(
            f"Row {recorded.rows[row]} of {recorded.source.path} has {total[row]} tokens; the context of {model.name} "
            f"is {model.context}.",
            "Take it out of the file, or name another --model.",
        )


def masks_of(recorded: RecordedRun) -> Masks | None:
    """Which response tokens count, by sequence; None where all do."""
    return None if recorded.loss_mask is None else dict(enumerate(recorded.loss_mask))


def store_recorded(run: RunDirectory, recorded: RecordedRun, texts: Mapping[int, str]) -> None:
    """Finishes the passes that a file brings: its rollout, its trainer, or both; the first holds the sequences."""
    requests = [RolloutRequest(i, ids.tolist(), 0) for i, ids in enumerate(recorded.prompt_token_ids)]
    responses, source, masks = list(recorded.response_token_ids), "", masks_of(recorded)
    for side in recorded.sides:
        pass_id = str(RECORDED_ROLLOUT if side == "rollout" else RECORDED_TRAINER)
        if run.finished(pass_id):
            source = source or pass_id
            continue
        values = _logprobs(recorded, side)
        rollouts = [
            Rollout(i, ids, logprobs, reason)
            for i, (ids, logprobs, reason) in enumerate(zip(responses, values, recorded.finish_reasons, strict=True))
        ]
        tokens = tokens_table(pass_id, rollouts, lambda r: r.response_token_ids, texts.get, masks=masks)
        tables: dict[str, Any] = {"tokens": tokens}
        record = PassRecord(status="finished", counts=_counts(recorded, values), sequences_of=source)
        if side == "trainer":
            record.covers = (source or pass_id,)
        if not source:
            steps = None if recorded.step is None else recorded.step.tolist()
            samples = recorded.sample_ids.tolist()
            tables["sequences"] = sequences_table(pass_id, requests, rollouts, recorded.prompt_ids, samples, steps)
            source = pass_id
        run.finish_pass(pass_id, record, tables)


def _logprobs(recorded: RecordedRun, side: Side) -> list[NDArray[Any]]:
    values = recorded.rollout_logprobs if side == "rollout" else recorded.trainer_logprobs
    assert values is not None
    return list(values)


def _counts(recorded: RecordedRun, values: list[NDArray[Any]]) -> dict[str, int]:
    facts = recorded.source
    return {
        "n_sequences": facts.n_sequences,
        "n_tokens": facts.n_tokens - facts.n_masked_tokens,
        "n_nonfinite": int(sum(np.count_nonzero(~np.isfinite(v)) for v in values)),
        "n_dropped": facts.n_masked_tokens,
        "n_empty": facts.n_empty_responses,
    }
