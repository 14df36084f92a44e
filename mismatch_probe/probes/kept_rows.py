"""The rows of logits that a comparison keeps for exact divergences: how many, which, where, and for how long.

A rollout pass that sampled chooses its positions while it runs; passes that decode the same ids again keep the rows of
the same positions, so that their exact divergences are paired. The files lie in the run's `rows/` until every trainer
pass has compared them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from mismatch_probe.engines.base import Capture, ExactPosition
from mismatch_probe.engines.rows import KeptRow, RowFile, file_bytes
from mismatch_probe.errors import DiskFull
from mismatch_probe.probes.planning import Plan
from mismatch_probe.tables import RunDirectory
from mismatch_probe.types import RolloutRequest, Sampling, ScoreRequest


class KeptRows:
    """The files of rows of one run."""

    def __init__(self, plan: Plan, run: RunDirectory) -> None:
        self._plan = plan
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
        rows = most if wanted == "all" else min(int(wanted), most)
        self._check_space(rows)
        chooser = self._chooser(pass_id)
        if chooser is None:
            return Capture(str(self.path(pass_id)), rows)
        chosen: dict[int, list[int]] = {}
        for kept in _read(self.path(chooser)):
            chosen.setdefault(kept.sequence_id, []).append(kept.position)
        return Capture(str(self.path(pass_id)), rows, chosen)

    def _chooser(self, pass_id: str) -> str | None:
        """The finished pass over the same sequences that chose the positions, if there is one."""
        if self._plan.passes.source is None:
            return None
        earlier = [rollout.pass_id for rollout in self._plan.passes.rollouts]
        earlier = earlier[: earlier.index(pass_id)]
        return next((name for name in earlier if self._run.finished(name) and self.path(name).exists()), None)

    def _check_space(self, rows: int) -> None:
        text = self._plan.model.config.get("text_config") or self._plan.model.config
        needed = file_bytes(rows, int(text["vocab_size"]))
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
            kept = _read(self.path(name))
            chooser = self._chooser(name)
            chosen = _read(self.path(chooser)) if chooser else kept
            sampled = {(k.sequence_id, k.position): (k.weight, k.stands_for) for k in chosen}
            for k in kept:
                at = ExactPosition(source, k.sequence_id, k.position, k.slot, *sampled[k.sequence_id, k.position])
                found.setdefault(scored_as[k.sequence_id], []).append(at)
        return sources, found

    def discard(self) -> None:
        """Deletes the rows: they are large, and all that was to be learned from them lies in the run's tables."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _read(path: Path) -> list[KeptRow]:
    file = RowFile(path)
    file.close()
    return file.kept
