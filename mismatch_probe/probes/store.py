"""From what a worker produced to the tables of a run, and from those to what the next worker is asked.

`KeptRows` has the rows of logits that a comparison keeps for exact divergences: how many, which, where, and for how
long. A rollout pass that sampled chooses its positions while it runs; passes that decode the same ids again keep the
rows of the same positions, so that their exact divergences are paired. The files lie in the run's `rows/` until every
trainer pass has compared them.
"""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mismatch_probe.engines.base import Capture, ExactPosition
from mismatch_probe.engines.rows import KeptRow, RowFile, file_bytes, uniform
from mismatch_probe.errors import DiskFull
from mismatch_probe.passes import PassId
from mismatch_probe.probes.planning import Plan
from mismatch_probe.probes.recorded import masks_of
from mismatch_probe.probes.workers import Collected
from mismatch_probe.results.manifest import PassRecord
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.schemas import REFERENCE_SCHEMA, TOKENS_SCHEMA, Masks, exact_table, sequences_table, tokens_table
from mismatch_probe.types import Rollout, RolloutRequest, Sampling, Score, ScoreRequest

# By sequence and position, the weight of a position and what it stands for.
Positions = dict[int, dict[int, tuple[float, float]]]


class KeptRows:
    """The files of rows of one run."""

    def __init__(self, plan: Plan, run: RunDirectory) -> None:
        self._plan = plan
        self._run = run
        self._folder = run.path / "rows"

    @cached_property
    def _masks(self) -> Masks | None:
        return masks_of(self._plan.recorded)

    def path(self, pass_id: str) -> Path:
        return self._folder / f"{pass_id}.rows"

    def capture(self, pass_id: str, requests: Sequence[RolloutRequest], sampling: Sampling) -> Capture | None:
        """What a rollout pass is to keep; None without `--exact-kl`.

        Raises:
            DiskFull: The rows would not fit.
        """
        wanted = self._plan.config.exact_kl
        if wanted == 0:
            return None
        most = sum(min(len(r.forced_token_ids) or sampling.max_tokens, sampling.max_tokens) for r in requests)
        if self._masks is not None:
            most = sum(int(mask.sum()) for mask in self._masks.values())
        rows = most if wanted == "all" else min(int(wanted), most)
        self._check_space(rows)
        chosen = self._chosen(pass_id)
        if chosen is None and self._masks is not None:
            chosen = self._unmasked(requests, rows, most)
        return Capture(str(self.path(pass_id)), rows, chosen)

    def _chosen(self, pass_id: str) -> Positions | None:
        """What another finished pass over the same sequences has kept, if there is one: every file says what its
        positions stand for, whoever chose them.
        """
        if self._plan.passes.source is None:
            return None
        names = [str(rollout) for rollout in self._plan.passes.rollouts if str(rollout) != pass_id]
        found = next((name for name in names if self._run.finished(name) and self.path(name).exists()), None)
        if found is None:
            return None
        chosen: Positions = {}
        for kept in _read(self.path(found)):
            chosen.setdefault(kept.sequence_id, {})[kept.position] = (kept.weight, kept.stands_for)
        return chosen

    def _unmasked(self, requests: Sequence[RolloutRequest], rows: int, total: int) -> Positions:
        """As many tokens as are wanted of those that count, all equally likely."""
        assert self._masks is not None
        draws = [
            (uniform(request.seed, int(position)), request.sequence_id, int(position))
            for request in requests
            for position in np.flatnonzero(self._masks[request.sequence_id])
        ]
        chosen: Positions = {}
        for _, sequence_id, position in sorted(draws)[:rows]:
            chosen.setdefault(sequence_id, {})[position] = (1.0, total / rows)
        return chosen

    def _check_space(self, rows: int) -> None:
        needed = file_bytes(rows, int(self._plan.model.text_config["vocab_size"]))
        free = shutil.disk_usage(self._run.path).free
        if needed > free:
            gib = 1 << 30
            raise DiskFull(
                f"--exact-kl would keep {rows} rows of logits, {needed / gib:.1f} GiB a rollout pass, and "
                f"{free / gib:.1f} GiB are free.",
                "Ask for fewer positions, or choose another --out.",
            )

    def positions(
        self, rollouts: Sequence[str], distinct: Sequence[Sequence[ScoreRequest]]
    ) -> tuple[list[str], dict[int, list[ExactPosition]]]:
        """Where a trainer pass has rows to compare with.

        Args:
            rollouts: Rollout passes whose sequences it scores.
            distinct: Groups of sequences with the same ids; the first of each is scored for all.

        Returns:
            The rollout passes that have rows, and the positions by the sequence that is scored.
        """
        scored_as = {request.sequence_id: group[0].sequence_id for group in distinct for request in group}
        sources = [name for name in rollouts if self.path(name).exists()]
        found: dict[int, list[ExactPosition]] = {}
        for source, name in enumerate(sources):
            for k in _read(self.path(name)):
                at = ExactPosition(source, k.sequence_id, k.position, k.slot, k.weight, k.stands_for)
                found.setdefault(scored_as[k.sequence_id], []).append(at)
        return sources, found

    def discard(self) -> None:
        """Deletes the rows: they are large, and all that was to be learned from them lies in the run's tables."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _read(path: Path) -> list[KeptRow]:
    file = RowFile(path)
    file.close()
    return file.kept


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
