"""The rows of logits that a comparison keeps for exact divergences: how many, which, where, and for how long.

A rollout pass that sampled chooses its positions while it runs; passes that decode the same ids again keep the rows of
the same positions, so that their exact divergences are paired. The files lie in the run's `rows/` until every trainer
pass has compared them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mismatch_probe.engines.base import Capture, ExactPosition
from mismatch_probe.engines.rows import KeptRow, RowFile, file_bytes, uniform
from mismatch_probe.errors import DiskFull
from mismatch_probe.probes.planning import Plan
from mismatch_probe.probes.recorded import masks_of
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.types import RolloutRequest, Sampling, ScoreRequest

# By sequence and position, the weight of a position and what it stands for.
Positions = dict[int, dict[int, tuple[float, float]]]


class KeptRows:
    """The files of rows of one run."""

    def __init__(self, plan: Plan, run: RunDirectory) -> None:
        self._plan = plan
        self._masks = None if plan.recorded is None else masks_of(plan.recorded)
        self._run = run
        self._folder = run.path / "rows"

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
