"""From what a worker produced to the tables of a run, and from those to what the next worker is asked."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from mismatch_probe.passes import PassId
from mismatch_probe.probes.workers import Collected
from mismatch_probe.results.manifest import PassRecord
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.schemas import REFERENCE_SCHEMA, TOKENS_SCHEMA, Masks, exact_table, sequences_table, tokens_table
from mismatch_probe.types import Rollout, RolloutRequest, Score, ScoreRequest


def store_rollouts(
    run: RunDirectory,
    pass_id: PassId,
    requests: Sequence[RolloutRequest],
    samples: Sequence[tuple[str, int]],
    collected: Collected,
    record: PassRecord,
) -> None:
    """Finishes a rollout pass, its repeat first, so that a pass that is finished has its self-noise.

    Args:
        run: Where to.
        pass_id: Which pass.
        requests: What was asked, in the order of `collected.rollouts`.
        samples: Prompt id and sample number of each request.
        collected: What the worker produced.
        record: Of the pass; what the worker said of itself is filled in.
    """
    name = str(pass_id)
    tokens = _rollout_tokens(name, collected.rollouts, collected.texts)
    prompt_ids, sample_ids = zip(*samples, strict=True)
    sequences = sequences_table(name, requests, collected.rollouts, prompt_ids, sample_ids)
    counts = {
        "n_sequences": len(requests),
        **_counts(tokens),
        "n_truncated": sum(r.finish_reason == "length" for r in collected.rollouts),
        "n_empty": sum(len(r.response_token_ids) == 0 for r in collected.rollouts),
    }
    _store_self_noise(run, pass_id, collected)
    run.finish_pass(name, _filled(record, collected, counts), {"tokens": tokens, "sequences": sequences})


def store_replay(
    run: RunDirectory,
    pass_id: PassId,
    source: PassId,
    collected: Collected,
    record: PassRecord,
    masks: Masks | None,
) -> None:
    """Finishes a pass that decoded the sequences of `source` again; it has tokens, and no sequences of its own."""
    tokens = _rollout_tokens(str(pass_id), collected.rollouts, collected.texts, masks)
    counts = {"n_sequences": len(collected.rollouts), **_counts(tokens)}
    _store_self_noise(run, pass_id, collected, masks)
    record.sequences_of = str(source)
    run.finish_pass(str(pass_id), _filled(record, collected, counts), {"tokens": tokens})


def _store_self_noise(run: RunDirectory, pass_id: PassId, collected: Collected, masks: Masks | None = None) -> None:
    if collected.self_noise_rollouts:
        repeat = str(pass_id.repeat)
        again = _rollout_tokens(repeat, collected.self_noise_rollouts, collected.texts, masks)
        run.finish_pass(repeat, PassRecord(status="finished", repeats=str(pass_id)), {"tokens": again})


def store_scores(
    run: RunDirectory,
    pass_id: PassId,
    distinct: list[list[ScoreRequest]],
    rows_of: Sequence[str],
    collected: Collected,
    record: PassRecord,
    masks: Masks | None = None,
) -> None:
    """Finishes a trainer pass, or extends one by sequences that were sampled later.

    Args:
        run: Where to.
        pass_id: Which pass.
        distinct: Groups of sequences with the same ids; the first of each was scored for all.
        rows_of: The rollout passes whose rows it compared, in the order of the job's sources.
        collected: What the worker produced.
        record: Of the pass; what the worker said of itself is filled in.
        masks: Which response tokens count, by sequence; None for all.
    """
    name = str(pass_id)
    twins = {group[0].sequence_id: group for group in distinct}
    ids = {request.sequence_id: request.response_token_ids for group in distinct for request in group}

    kind, schema = ("reference", REFERENCE_SCHEMA) if pass_id.dtype == "float64" else ("tokens", TOKENS_SCHEMA)

    def table(of: str, scores: list[Score]) -> pa.Table:
        every = [replace(s, sequence_id=twin.sequence_id) for s in scores for twin in twins[s.sequence_id]]
        return tokens_table(of, every, lambda score: ids[score.sequence_id], schema=schema, masks=masks)

    tokens, n_distinct = table(name, collected.scores), len(distinct)
    exact = exact_table(name, rows_of, collected.scores, masks)
    if run.finished(name):
        # A sequence that was scored again, for the rows of a later replay, replaces itself.
        earlier, compared = run.tokens(name), run.exact(name)
        again = pc.is_in(earlier["sequence_id"], value_set=pa.array(list(ids), pa.int64()))
        if not pc.any(again).as_py():
            n_distinct += run.manifest.passes[name].counts["n_distinct_sequences"]
        order = [("sequence_id", "ascending"), ("position", "ascending")]
        tokens = pa.concat_tables([earlier.filter(pc.invert(again)), tokens]).sort_by(order)
        both = [table for table in (compared, exact) if table is not None]
        exact = pa.concat_tables(both) if both else None
    counts = {
        "n_sequences": pc.count_distinct(tokens["sequence_id"]).as_py(),
        # Engines often sample the same response from the same seed; the forward pass sees each one once.
        "n_distinct_sequences": n_distinct,
        **_counts(tokens),
    }
    if collected.self_noise_scores:
        repeat, again_of = str(pass_id.repeat), PassRecord(status="finished", repeats=str(pass_id))
        run.finish_pass(repeat, again_of, {kind: table(repeat, collected.self_noise_scores)})
    tables = {kind: tokens} | ({} if exact is None else {"exact": exact})
    run.finish_pass(name, _filled(record, collected, counts), tables)


def distinct_requests(sequences: Sequence[pa.Table]) -> list[list[ScoreRequest]]:
    """Sequences to score, in groups of the same ids, each served by one forward pass. Empty responses are left out."""
    groups: dict[tuple[bytes, bytes], list[ScoreRequest]] = {}
    for table in sequences:
        columns = (table[name].to_pylist() for name in ("sequence_id", "prompt_token_ids", "response_token_ids"))
        for request in (ScoreRequest(*row) for row in zip(*columns, strict=True) if row[2]):
            key = (array("i", request.prompt_token_ids).tobytes(), array("i", request.response_token_ids).tobytes())
            groups.setdefault(key, []).append(request)
    return list(groups.values())


def _rollout_tokens(
    pass_id: str, rollouts: list[Rollout], texts: dict[int, str], masks: Masks | None = None
) -> pa.Table:
    if masks is not None:  # a repeat has the first tokens of a sequence
        masks = {r.sequence_id: masks[r.sequence_id][: len(r.response_token_ids)] for r in rollouts}
    return tokens_table(pass_id, rollouts, lambda rollout: rollout.response_token_ids, texts.get, masks=masks)


def _counts(tokens: pa.Table) -> dict[str, int]:
    finite = pc.sum(pc.is_finite(tokens["logprob"])).as_py()
    return {"n_tokens": tokens.num_rows, "n_nonfinite": tokens.num_rows - finite}


def _filled(record: PassRecord, collected: Collected, counts: dict[str, int]) -> PassRecord:
    record.engine, record.timings, record.counts = collected.identity, collected.timings, counts
    return record
