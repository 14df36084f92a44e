"""The folder of a sanity set, which problems it keeps, and what their accuracy is worth.

sanity.json         the document: settings, provenance, engines, and at the end what was found
problems.jsonl      every problem that is tried
samples/            a Parquet file per chunk of problems, as it ends
samples.parquet     all of them at the end, in the format of `compare --from`
sanity-set.jsonl    the problems that are kept
report.html, report.md      the report

The construction is that of arXiv 2510.26788: sample n responses to each problem, keep those whose accuracy lies within
bounds. Accuracy of n samples is noisy, so a problem also gets in, or stays out, by luck, and the kept ones' sampled
accuracy regresses to the mean when they are sampled again. Samples that had no part in the selection tell by how much.

Shape legend: `P` problems, `S` responses.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import JsonValue

from mismatch_probe.errors import TableError
from mismatch_probe.files import atomic_path, write_text
from mismatch_probe.metrics.intervals import share_interval
from mismatch_probe.results.base import Document
from mismatch_probe.results.finding import Finding, Value
from mismatch_probe.results.rl_run import Provenance
from mismatch_probe.results.sanity import ResponseLengths, SanityOutcome, SanitySet
from mismatch_probe.rl.config import SanityConfig
from mismatch_probe.rl.records import RlFolder
from mismatch_probe.rl.tasks import Problem, read_problems
from mismatch_probe.runs.folder import SANITY_SET, Kind
from mismatch_probe.runs.state import SET
from mismatch_probe.types import MetricValue

_KILLED = b"n_grader_killed"
# A chunk keeps the engine busy, and is what an interrupted run loses.
_CHUNK_RESPONSES = 1024

SAMPLES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("response_token_ids", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("n_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("reward", pa.float64()),
        ("text", pa.string()),
    ]
)


class SanityDirectory(RlFolder[SanitySet]):
    """The folder of a sanity set."""

    KIND: ClassVar[Kind] = SANITY_SET
    DOCUMENT: ClassVar[type[Document]] = SanitySet

    def __init__(self, path: Path, document: SanitySet) -> None:
        super().__init__(path, document)
        self.config = SanityConfig.of(document.config)

    @classmethod
    def create(cls, path: Path, config: SanityConfig, provenance: Provenance) -> SanityDirectory:
        """Makes a new folder.

        Raises:
            UsageError: The folder exists and is not empty, or is no folder.
        """
        return cls._create(
            path, SanitySet(**SanitySet.stamp(), config=config.model_dump(mode="json"), provenance=provenance)
        )

    @property
    def complete(self) -> bool:
        return self.document.outcome is not None

    def _update(self, **changes: object) -> None:
        self.write(self.document.model_copy(update=changes))

    def note_engine(self, identity: dict[str, JsonValue]) -> None:
        """Remembers an engine that samples; a resumed run can have several."""
        if identity not in self.document.engines:
            self._update(engines=(*self.document.engines, identity))

    def fix_problems(self, problems: Sequence[Problem]) -> None:
        """Writes the problems down, or checks that they are still the same.

        Raises:
            TableError: They have changed.
        """
        path = self.path / "problems.jsonl"
        if not path.exists():
            write_text(path, "".join(_line(problem) for problem in problems))
        elif read_problems(path) != list(problems):
            raise TableError("The problems have changed since this run started.", "Restore them, or start a new run.")

    def chunks(self, n_problems: int) -> list[range]:
        """Problems by chunk."""
        size = max(1, _CHUNK_RESPONSES // self.config.n_samples)
        return [range(start, min(start + size, n_problems)) for start in range(0, n_problems, size)]

    def missing(self, n_problems: int) -> list[tuple[int, range]]:
        """Chunks that have not been sampled yet, with their numbers."""
        return [(i, chunk) for i, chunk in enumerate(self.chunks(n_problems)) if not self._part(i).exists()]

    def append(self, chunk: int, table: pa.Table, n_killed: int) -> None:
        """Stores a finished chunk."""
        table = table.cast(SAMPLES).replace_schema_metadata({_KILLED: str(n_killed)})
        with atomic_path(self._part(chunk)) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def _part(self, chunk: int) -> Path:
        return self.path / "samples" / f"chunk-{chunk:06d}.parquet"

    def finish(self) -> None:
        """Joins the samples, writes the set and then the document, which says that there is nothing left to do."""
        problems, config = read_problems(self.path / "problems.jsonl"), self.config
        path = self._join([self._part(i) for i in range(len(self.chunks(len(problems))))])
        rows = pq.read_table(path, columns=["reward", "n_tokens", "finish_reason"])
        rewards = rows["reward"].to_numpy().reshape(len(problems), config.n_samples)
        right: NDArray[np.int64] = (rewards > 0).sum(axis=1).astype(np.int64)
        kept = keeps(right / config.n_samples, config.keep)
        write_text(
            self.path / SET,
            "".join(
                _line(problem, accuracy=int(k) / config.n_samples, n_samples=config.n_samples)
                for problem, k, chosen in zip(problems, right, kept, strict=True)
                if chosen
            ),
        )
        outcome = outcome_of(
            right,
            config.n_samples,
            config.keep,
            rows["n_tokens"].to_numpy().astype(np.int64),
            np.array(rows["finish_reason"].to_pylist()) == "length",
            int((pq.read_schema(path).metadata or {})[_KILLED]),
        )
        self._update(outcome=outcome, findings=tuple(findings_of(outcome)))
        shutil.rmtree(self.path / "samples", ignore_errors=True)

    def _join(self, parts: Sequence[Path]) -> Path:
        """One table of all chunks, of which one is in memory at a time."""
        path = self.path / "samples.parquet"
        killed = sum(int(pq.read_schema(part).metadata[_KILLED]) for part in parts)
        schema = SAMPLES.with_metadata({_KILLED: str(killed)})
        with (
            atomic_path(path) as temporary,
            pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
        ):
            for part in parts:
                writer.write_table(pq.read_table(part).replace_schema_metadata(schema.metadata))
        return path


def _line(problem: Problem, **more: Any) -> str:
    row = {"id": problem.problem_id, "problem": problem.prompt, "answer": problem.answer, **more}
    return json.dumps(row, ensure_ascii=False) + "\n"


Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
# From this fraction of truncated responses on, the budget may be why problems are not solved.
_TRUNCATED = 0.5


def keeps(accuracy: Floats, keep: tuple[float, float]) -> NDArray[np.bool_]:
    """Whether an accuracy lies within the bounds, both included."""
    return np.asarray((accuracy >= keep[0]) & (accuracy <= keep[1]))


def leave_one_out(right: Counts, n_samples: int, keep: tuple[float, float]) -> tuple[Floats, Floats]:
    """Lets n − 1 samples choose and counts the other one, in expectation over which it is.

    It is right with chance k/n, of a problem with k right samples, and then k − 1 of the choosing ones are. It is
    independent of the choice, so the ratio of the sums over problems is free of selection. Fewer choosing samples would
    estimate the accuracy of another set, since a noisier choice lets in more of the problems outside the bounds.

    Args:
        right: `[P]` right responses of each problem.
        n_samples: n ≥ 2, responses to each problem.
        keep: The bounds.

    Returns:
        `[P]` expected right responses among those that count, and `[P]` expected responses that count, at most 1; both
        0 where the problem is never chosen.
    """
    share, others = right / n_samples, n_samples - 1
    hits = share * keeps((right - 1) / others, keep)
    return hits, hits + (1 - share) * keeps(right / others, keep)


def outcome_of(
    right: Counts,
    n_samples: int,
    keep: tuple[float, float],
    lengths: Counts,
    truncated: NDArray[np.bool_],
    n_grader_killed: int = 0,
) -> SanityOutcome:
    """What is said of a set.

    Args:
        right: `[P]` right responses of each problem.
        n_samples: Responses to each problem.
        keep: The bounds.
        lengths: `[S]` tokens of each response.
        truncated: `[S]` whether it used up its budget.
        n_grader_killed: Responses graded 0 because their grader was stopped.
    """
    accuracy = right / n_samples
    kept = keeps(accuracy, keep)
    hits, counts = leave_one_out(right, n_samples, keep)
    limits = (share_interval(hits, counts) if counts.sum() else None) or (None, None)
    estimate = MetricValue(None, why="no problem is chosen when one of its samples is set aside")
    return SanityOutcome(
        n_problems=len(right),
        n_kept=int(kept.sum()),
        n_below=int((accuracy < keep[0]).sum()),
        n_above=int((accuracy > keep[1]).sum()),
        n_samples=n_samples,
        keep=keep,
        problems_by_right=tuple(np.bincount(right, minlength=n_samples + 1).tolist()),
        accuracy=float(accuracy.mean()),
        accuracy_of_kept_as_sampled=float(accuracy[kept].mean()) if kept.any() else None,
        accuracy_of_kept_estimate=(
            MetricValue(float(hits.sum() / counts.sum()), *limits) if counts.sum() else estimate
        ),
        response_tokens=ResponseLengths(
            mean=float(lengths.mean()),
            median=float(np.median(lengths)),
            p90=float(np.quantile(lengths, 0.9)),
            max=int(lengths.max()),
        ),
        truncated_fraction=float(truncated.mean()),
        n_grader_killed=n_grader_killed,
    )


def findings_of(outcome: SanityOutcome) -> Iterator[Finding]:
    """What was kept first, then what limits it."""
    low, high = outcome.keep
    values: dict[str, Value] = {
        "kept": outcome.n_kept,
        "tried": outcome.n_problems,
        "low": low,
        "high": high,
        "n_samples": outcome.n_samples,
    }
    if not outcome.n_kept:
        yield Finding(code="sanity-nothing-kept", severity="warn", values=values)
    else:
        yield Finding(code="sanity-kept", severity="info", values=values)
    estimate = outcome.accuracy_of_kept_estimate
    if outcome.accuracy_of_kept_as_sampled is not None and estimate.value is not None:
        accuracies: dict[str, Value] = {"as_sampled": outcome.accuracy_of_kept_as_sampled, "estimate": estimate}
        yield Finding(code="sanity-accuracy", severity="info", values=accuracies)
    if outcome.truncated_fraction >= _TRUNCATED:
        yield Finding(code="sanity-truncated", severity="note", values={"fraction": outcome.truncated_fraction})
    if outcome.n_grader_killed:
        yield Finding(code="sanity-grader-stopped", severity="note", values={"responses": outcome.n_grader_killed})
